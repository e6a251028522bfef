"""Files of reward models: reads those of stage 1, and writes those that stage 1 and inference read.

    checkpoint-N/ (stage 1)     adapter and tuned weights for a base model: merged while reading
    merged/, huggingface/       a complete Hugging Face model with `<Reward>` in its embedding

Both hold `rm_head.pth` (`{"rm_head.weight": fp32 [1, hidden]}`), the processor, and `reward_config.json` (base model,
video budget, format prompt).
"""

import copy
import dataclasses
import hashlib
import json
import logging
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoProcessor, GenerationConfig, PreTrainedConfig

from descore.base_models import as_in_files, find_model_class
from descore.format_prompt import FormatPrompt
from verl.data.scored_sequence import DEFAULT_FORMAT_PROMPT, REWARD_TOKEN, reward_token_id
from verl.data.vision_process import VideoBudget

HEAD_FILE, CONFIG_FILE = "rm_head.pth", "reward_config.json"
ADAPTER_CONFIG_FILE, TUNED_FILE = "adapter_config.json", "tuned_weights.safetensors"
WEIGHTS_FILE, WEIGHTS_INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
HEAD_KEY = "rm_head.weight"
HEAD_KEYS = (HEAD_KEY, f"base_model.model.{HEAD_KEY}")
ROW_KEY, EMBEDDING_KEY = "reward_embedding", "model.language_model.embed_tokens.weight"
EMBEDDING_ROWS_MULTIPLE = 64
SHARD_BYTES = 5 * 10**9
PROBES_PER_FILE, PROBE_BYTES = 256, 4096

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PolicyCheckpoint:
    """A reward model as stage 2 needs it.

    `config`: with as many embedding rows as the weights have. `video_budget`, `format_prompt`: of its training.
    `reward_embedding`: fp32 [hidden], the `<Reward>` row. `head_weight`: fp32 [1, hidden]. `weights`: the merged
    weights under Hugging Face names, as they lie in memory, on the CPU; None if they were not asked for.
    """

    config: PreTrainedConfig
    generation_config: GenerationConfig
    processor: object
    video_budget: VideoBudget
    format_prompt: str
    reward_embedding: torch.Tensor
    head_weight: torch.Tensor
    weights: dict[str, torch.Tensor] | None = None


def load_checkpoint(
    model_path: str | os.PathLike, head_path: str | os.PathLike | None = None, *, with_weights: bool
) -> PolicyCheckpoint:
    """Read stage 1's `checkpoint-N/` or a merged model; its weights in fp32.

    `head_path`: an `rm_head.pth` or its folder; None for the one in `model_path`. Raises ValueError that says what is
    missing and how to get it.
    """
    if (Path(model_path) / "config.json").is_file():
        _read_config(Path(model_path))  # another family is refused before its processor is read
    with _loading(f"the processor of {model_path}"):
        processor = AutoProcessor.from_pretrained(model_path)
    if REWARD_TOKEN not in processor.tokenizer.get_vocab():
        raise ValueError(
            f"{model_path} is no reward model: it does not know {REWARD_TOKEN!r}. Train it in stage 1 first, "
            f"MODEL_PATH={model_path} bash cold_start/train.sh, and give the checkpoint-N it writes as model_path"
        )
    folder = find_folder(model_path)
    row = _load_reward_row(folder, reward_token_id(processor.tokenizer))
    head = load_head(_find_head(folder, head_path), hidden_size=len(row))
    checkpoint = _describe_model(folder, processor, row, head)
    if not with_weights:
        return checkpoint
    return dataclasses.replace(checkpoint, weights=dict(stream_weights(model_path, checkpoint, dtype=torch.float32)))


def _describe_model(folder: Path, processor, row: torch.Tensor, head: torch.Tensor) -> PolicyCheckpoint:
    """A checkpoint without weights, of the model in `folder` with the `<Reward>` row and the head given."""
    values, source = _read_reward_config(folder), _find_base(folder)
    config = _read_config(source)
    text, num_tokens = config.text_config, len(processor.tokenizer)
    if text.vocab_size < num_tokens:  # as resize_token_embeddings(num_tokens, pad_to_multiple_of=64) does
        text.vocab_size = -(-num_tokens // EMBEDDING_ROWS_MULTIPLE) * EMBEDDING_ROWS_MULTIPLE
    try:
        generation_config = GenerationConfig.from_pretrained(source)
    except OSError:  # the model has none
        generation_config = GenerationConfig.from_model_config(config)
    return PolicyCheckpoint(
        config=config,
        generation_config=generation_config,
        processor=processor,
        video_budget=VideoBudget(**values.get("video", {})),
        format_prompt=values.get("format_prompt", DEFAULT_FORMAT_PROMPT),
        reward_embedding=row,
        head_weight=head,
    )


def stream_weights(
    model_path: str | os.PathLike, checkpoint: PolicyCheckpoint, *, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pairs of Hugging Face name and whole weight, on the CPU in `dtype`, as stage 1 merges them.

    `checkpoint`: of the same path, read by `load_checkpoint`. Needs host memory for the whole model.
    """
    folder = find_folder(model_path)
    source = _find_base(folder)
    with _loading(f"the weights of {source}"):
        backbone = find_model_class(checkpoint.config, source).from_pretrained(source, dtype=dtype)
    if backbone.get_input_embeddings().num_embeddings < checkpoint.config.text_config.vocab_size:
        backbone.resize_token_embeddings(checkpoint.config.text_config.vocab_size, mean_resizing=False)
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        backbone = PeftModel.from_pretrained(backbone, str(folder)).merge_and_unload()
    if (folder / TUNED_FILE).is_file():
        tuned = load_file(folder / TUNED_FILE)
        tuned.pop(ROW_KEY)
        unexpected = backbone.load_state_dict(tuned, strict=False).unexpected_keys
        if unexpected:
            raise ValueError(f"{folder / TUNED_FILE} does not fit the base: it has no {', '.join(unexpected[:3])}")
    embedding = backbone.get_input_embeddings().weight.detach()
    embedding[reward_token_id(checkpoint.processor.tokenizer)] = checkpoint.reward_embedding.to(dtype)
    yield from ((name, tensor.detach()) for name, tensor in backbone.state_dict().items())


def fingerprint(model_path: str | os.PathLike, checkpoint: PolicyCheckpoint) -> str:
    """16 hex digits over head, `<Reward>` row, and samples of every file of weights, including a base model's.

    Copies of a model have the same, wherever they are. `checkpoint`: read from `model_path`, with the head in use.
    """
    digest = hashlib.blake2b(digest_size=8)
    for tensor in (checkpoint.head_weight, checkpoint.reward_embedding):
        digest.update(tensor.contiguous().numpy().tobytes())
    folder = find_folder(model_path)
    for each in dict.fromkeys((folder, find_folder(_find_base(folder)))):
        for path in sorted(each.glob("*.safetensors")):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with open(path, "rb") as file:  # evenly spaced samples of a long file, all of a short one
                for offset in range(0, size, max(PROBE_BYTES, size // PROBES_PER_FILE)):
                    file.seek(offset)
                    digest.update(file.read(PROBE_BYTES))
    return digest.hexdigest()


def find_folder(model_path: str | os.PathLike) -> Path:
    """The folder itself, or the local copy of a model on the hub."""
    return Path(model_path) if os.path.isdir(model_path) else Path(snapshot_download(str(model_path)))


@contextmanager
def _loading(what: object) -> Iterator[None]:
    """Raise ValueError that names `what` if it does not load."""
    try:
        yield
    except (OSError, ValueError, LookupError, SafetensorError) as error:
        raise ValueError(f"{what} does not load: {str(error).splitlines()[0]}") from error


def _read_reward_config(folder: Path) -> dict:
    file = folder / CONFIG_FILE
    if not file.is_file():
        logger.warning("%s has no %s: using the default video budget and format prompt", folder, CONFIG_FILE)
        return {}
    with _loading(file):
        values = json.loads(file.read_text())
    FormatPrompt(values.get("format_prompt", DEFAULT_FORMAT_PROMPT), source=str(file))
    mode = values.get("reward_token", "special")
    if mode != "special":
        raise ValueError(
            f"{folder} was trained with --reward_token {mode}, but stage 2 reads the reward at {REWARD_TOKEN}. Train "
            "it with --reward_token special."
        )
    return values


def _read_config(source: Path | str) -> PreTrainedConfig:
    """The config of a model. Raises ValueError where it is not a Qwen3-VL one."""
    with _loading(source):
        config = AutoConfig.from_pretrained(source)
    find_model_class(config, source)
    return config


def _find_base(folder: Path) -> Path | str:
    """The model, a folder or one on the hub, that the files in `folder` change; a complete model is its own."""
    file = folder / CONFIG_FILE
    base_model = json.loads(file.read_text()).get("base_model") if file.is_file() else None
    if base_model and os.path.isabs(base_model) and not os.path.isdir(base_model):
        raise ValueError(
            f"{folder} was trained from {base_model}, which is gone; put it back, or merge where it is: "
            f"cd cold_start && python -m infer_utils.merge {folder} OUT"
        )
    return base_model or folder


def _find_head(folder: Path, head_path: str | os.PathLike | None) -> Path:
    path = folder if head_path is None else Path(head_path)
    if path.is_dir():
        path = path / HEAD_FILE
    if not path.is_file():
        raise ValueError(
            f"no reward head at {path}: name the rm_head.pth that belongs to {folder} with "
            "worker.actor.model.head_path (HEAD_PATH) or --rm_ckpt, or train one in stage 1 (bash cold_start/train.sh)"
        )
    return path


def load_head(path: str | os.PathLike, *, hidden_size: int) -> torch.Tensor:
    """Read a head, fp32 [1, hidden_size], in any of its three known layouts. Raises ValueError otherwise."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"{path}: torch cannot load the head: {reason}") from error
    outer = state if isinstance(state, Mapping) else {f"a {type(state).__name__}": None}
    inner = outer["model"] if isinstance(outer.get("model"), Mapping) else {}
    tensors = [tensor for key in HEAD_KEYS for tensor in (outer.get(key), inner.get(key)) if torch.is_tensor(tensor)]
    if not tensors:
        raise ValueError(f"{path}: no {' or '.join(HEAD_KEYS)} in it, only {', '.join(map(str, outer))}")
    if tensors[0].shape[1:] == (hidden_size,) and len(tensors[0]) > 1:
        raise ValueError(
            f"{path} gives {len(tensors[0])} rewards, one per dimension, and stage 2 takes one. Choose it: "
            f"cd cold_start && python -m infer_utils.merge {Path(path).parent} OUT --reward_dim NAME"
        )
    if tensors[0].shape != (1, hidden_size):
        raise ValueError(
            f"{path}: a head of shape {tuple(tensors[0].shape)} does not fit the model, whose hidden size is "
            f"{hidden_size}. Give the head that belongs to it."
        )
    return tensors[0].float()


def _load_reward_row(folder: Path, token_id: int) -> torch.Tensor:
    """fp32 [hidden], read without the rest of the weights."""
    if (folder / TUNED_FILE).is_file():
        with _loading(folder / TUNED_FILE), safe_open(folder / TUNED_FILE, framework="pt") as file:
            return file.get_tensor(ROW_KEY).float()
    with _loading(f"the embedding of {folder}"), _open_embedding(folder) as file:
        return file.get_slice(EMBEDDING_KEY)[token_id].float()


def _open_embedding(folder: Path):
    """The open safetensors file that holds the embedding."""
    index = folder / WEIGHTS_INDEX_FILE
    name = json.loads(index.read_text())["weight_map"][EMBEDDING_KEY] if index.is_file() else WEIGHTS_FILE
    return safe_open(folder / name, framework="pt")


def save_head(path: Path, weight: torch.Tensor) -> None:
    """Write a head as `{"rm_head.weight": fp32 [1, hidden]}`."""
    torch.save({HEAD_KEY: weight.detach().float().cpu().clone()}, path)


def save_policy(
    folder: Path,
    *,
    weights: Iterable[tuple[str, torch.Tensor]],
    head_weight: torch.Tensor,
    checkpoint: PolicyCheckpoint,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a complete Hugging Face folder that stage 1's loader and inference read as a merged reward model.

    `weights`: whole tensors under Hugging Face names, with the `<Reward>` row; all of them are brought into host
    memory. `checkpoint`: the start of training, for config, processor, video budget and format prompt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    on_host = {name: as_in_files(name, tensor.detach()).cpu().contiguous() for name, tensor in weights}
    save_torch_state_dict(on_host, folder, max_shard_size=shard_bytes, metadata={"format": "pt"})
    umask = os.umask(0)  # safetensors makes files that only their owner can read
    os.umask(umask)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o666 & ~umask)
    save_engine_folder(folder, checkpoint, dtype=next(iter(on_host.values())).dtype)
    values = {
        "base_model": None,
        "reward_token": "special",
        "video": dataclasses.asdict(checkpoint.video_budget),
        "format_prompt": checkpoint.format_prompt,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n")
    save_head(folder / HEAD_FILE, head_weight)


def save_engine_folder(folder: Path, checkpoint: PolicyCheckpoint, *, dtype: torch.dtype) -> None:
    """Write what an engine needs besides weights: config (of weights in `dtype`), generation config, processor."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(checkpoint.config)
    config.architectures = [find_model_class(config, folder).__name__]
    config.dtype = config.text_config.dtype = config.vision_config.dtype = dtype
    config.save_pretrained(folder)
    checkpoint.generation_config.save_pretrained(folder)
    checkpoint.processor.save_pretrained(folder)
