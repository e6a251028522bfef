"""Files of a stage 1 checkpoint ("What comes out" in the README): writing them, and loading them to score or to train.

A merged model holds Hugging Face weights instead of adapter and tuned weights and is loaded by the same function.
"""

import copy
import dataclasses
import hashlib
import json
import logging
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoProcessor

from arguments import RewardTokenMode
from descore.base_models import as_in_files
from descore.format_prompt import FormatPrompt
from model_qwen3 import (
    EMBEDDING_MODULE,
    PEFT_PREFIX,
    RewardModel,
    add_reward_token,
    hub_name,
    load_backbone,
    require_qwen3_vl,
)
from scored_sequence import DEFAULT_FORMAT_PROMPT, SequenceBuilder, reward_token_id
from vision_process import VideoBudget

logger = logging.getLogger(__name__)

HEAD_FILE = "rm_head.pth"
CONFIG_FILE = "reward_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
TUNED_FILE = "tuned_weights.safetensors"
STATE_FILE = "trainer_state.json"
HEAD_KEY = "rm_head.weight"
HEAD_KEYS = (HEAD_KEY, f"{PEFT_PREFIX}{HEAD_KEY}")
ROW_KEY = "reward_embedding"
PROBES_PER_FILE, PROBE_BYTES = 256, 4096
PEFT_ROW_KEY = f"{PEFT_PREFIX}model.language_model.{EMBEDDING_MODULE}.token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class RewardConfig:
    """What scoring needs besides the weights. `base_model` is None for a merged model or a base.

    `dimensions`: names of the head's rows where it has several; the file leaves it out where it has one.
    """

    base_model: str | None = None
    reward_token: RewardTokenMode = "special"
    video: VideoBudget = field(default_factory=VideoBudget)
    format_prompt: str = DEFAULT_FORMAT_PROMPT
    dimensions: tuple[str, ...] = ()

    @property
    def num_rewards(self) -> int:
        return max(1, len(self.dimensions))

    def row_of(self, dimension: str | None) -> int:
        """The head's row for a dimension, by default the first. Raises ValueError for an unknown one."""
        if dimension is None:
            return 0
        if dimension not in self.dimensions:
            names = ", ".join(self.dimensions) or "one reward without a name"
            raise ValueError(f"the model has no dimension {dimension!r}, but {names}.")
        return self.dimensions.index(dimension)

    def save(self, folder: Path) -> None:
        values = dataclasses.asdict(self)
        if not self.dimensions:
            del values["dimensions"]
        write_json(folder / CONFIG_FILE, values)

    @classmethod
    def find(cls, folder: str | Path) -> "RewardConfig | None":
        """The config in a folder; None where there is none. Raises ValueError that names a damaged file."""
        file = Path(folder) / CONFIG_FILE
        if not file.is_file():
            return None
        try:
            values = json.loads(file.read_text())
            own_types = {"video": VideoBudget(**values["video"]), "dimensions": tuple(values.get("dimensions", ()))}
            config = cls(**(values | own_types))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file} is damaged: {error}. Copy the checkpoint again.") from error
        FormatPrompt(config.format_prompt, source=str(file))
        return config

    @classmethod
    def load(cls, folder: Path) -> "RewardConfig":
        """The config in a folder. Raises ValueError where there is none."""
        config = cls.find(folder)
        if config is None:
            raise ValueError(f"{folder} is not a reward checkpoint: it holds no {CONFIG_FILE}")
        return config

    @classmethod
    def resolve(cls, path: str | Path, *, format_prompt: str | None = None, **changes: float | None) -> "RewardConfig":
        """The config for a model: its own, else the default, with what flags change. Warns if they override its own.

        `format_prompt`: a Jinja file. `changes`: to the video budget; None leaves a field as it is.
        """
        own = cls.find(path)
        config = own or cls()
        text = config.format_prompt if format_prompt is None else Path(format_prompt).read_text(encoding="utf-8")
        FormatPrompt(text, source="--format_prompt")
        resolved = dataclasses.replace(config, video=config.video.replace(**changes), format_prompt=text)
        for name, what in (("video", "video budget"), ("format_prompt", "format prompt")) if own else ():
            was, now = getattr(own, name), getattr(resolved, name)
            if was != now:
                logger.warning("flags override the %s of %s: %r becomes %r", what, path, was, now)
        return resolved


def load_builder(path: str | Path, config: RewardConfig | None = None) -> SequenceBuilder:
    """A model's own processor, with `<Reward>` added, and a format prompt, by default its own too."""
    processor = AutoProcessor.from_pretrained(path)
    add_reward_token(processor)
    return SequenceBuilder(processor, format_prompt=(config or RewardConfig.resolve(path)).format_prompt)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def save_reward_files(
    folder: Path, *, model: RewardModel, weights: dict[str, torch.Tensor], processor, config: RewardConfig
) -> None:
    """Write a checkpoint without the trainer's state.

    `weights`: the trained parameters of `model` by name, whole (not partitioned), on any device.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_head(folder / HEAD_FILE, weights["rm_head.weight"])
    tuned = {hub_name(n): t for n, t in weights.items() if n.startswith("backbone.") and "lora_" not in n}
    save_file({**tuned, ROW_KEY: weights[ROW_KEY]}, folder / TUNED_FILE, metadata={"format": "pt"})
    if isinstance(model.backbone, PeftModel):
        lora = {name.removeprefix("backbone."): tensor for name, tensor in weights.items() if "lora_" in name}
        adapter = get_peft_model_state_dict(model.backbone, state_dict=lora, save_embedding_layers=False)
        adapter[PEFT_ROW_KEY] = weights[ROW_KEY].unsqueeze(0)
        save_file(adapter, folder / ADAPTER_FILE, metadata={"format": "pt"})
        peft_config = copy.deepcopy(model.backbone.peft_config[model.backbone.active_adapter])
        peft_config.trainable_token_indices = {EMBEDDING_MODULE: [reward_token_id(processor.tokenizer)]}
        peft_config.inference_mode = True
        peft_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    _apply_umask(folder)
    config.save(folder)


def _apply_umask(folder: Path) -> None:
    """Give safetensors files, which only their owner may read, the mode of any other new file."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o666 & ~umask)


def save_head(path: Path, weight: torch.Tensor) -> None:
    """Write a head as `{"rm_head.weight": fp32 [num_rewards, hidden]}`."""
    torch.save({HEAD_KEY: weight.detach().float().cpu().clone()}, path)


def load_head(path: str | os.PathLike, *, num_rewards: int, hidden_size: int) -> torch.Tensor:
    """Read a head, fp32 [num_rewards, hidden_size], in any of the three known layouts. Raises ValueError otherwise."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"no reward head at {path}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{path}: no head that torch can load: {reason}; copy the checkpoint again") from error
    candidates = (state, state.get("model")) if isinstance(state, Mapping) else ()
    tables = [table for table in candidates if isinstance(table, Mapping)]
    weights = [table[key] for table in tables for key in HEAD_KEYS if isinstance(table.get(key), torch.Tensor)]
    if not weights:
        raise ValueError(f"{path}: no {' or '.join(HEAD_KEYS)} in it. Save it as {{'{HEAD_KEY}': weight}}.")
    shape = (num_rewards, hidden_size)
    if weights[0].shape != shape:
        raise ValueError(f"{path}: head of shape {tuple(weights[0].shape)}, not {shape} as needed")
    return weights[0].float()


@dataclass(frozen=True)
class LoadedReward:
    """A model ready to score, merged and in evaluation mode, with what builds its sequences."""

    model: RewardModel
    builder: SequenceBuilder
    config: RewardConfig

    def pick(self, dimension: str) -> "LoadedReward":
        """The same model with one row of the head. Raises ValueError for an unknown dimension."""
        row = self.config.row_of(dimension)
        self.model.rm_head.weight = nn.Parameter(self.model.rm_head.weight[[row]], requires_grad=False)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, dimensions=()))


def fingerprint_weights(folder: Path) -> str:
    """16 hex digits over evenly spaced pieces of a local model's weight files; the path does not matter."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for offset in range(0, size, max(PROBE_BYTES, size // PROBES_PER_FILE)):
                file.seek(offset)
                digest.update(file.read(PROBE_BYTES))
    return digest.hexdigest()


def is_reward_checkpoint(path: str) -> bool:
    """Whether a folder holds a reward model of this project."""
    return (Path(path) / HEAD_FILE).is_file()


def require_trainable_base(path: str) -> None:
    """Raise ValueError unless training can start from `path`: a Qwen3-VL model, or a merged reward model."""
    if (Path(path) / ADAPTER_CONFIG_FILE).is_file() or (Path(path) / TUNED_FILE).is_file():
        raise ValueError(
            f"{path} is a checkpoint beside its base; merge it first: python -m infer_utils.merge {path} OUT"
        )
    require_qwen3_vl(path)


def build_reward_model(path: str, processor, config: RewardConfig, *, dtype: torch.dtype) -> RewardModel:
    """The model that training starts from: a plain Qwen3-VL with a fresh head, or a merged reward model with its own.

    `processor`: the model's own, with `<Reward>` added. `config`: of the model to be. Raises ValueError if a reward
    model has other dimensions.
    """
    if is_reward_checkpoint(path):
        loaded = load_reward_model(path, dtype=dtype)
        if loaded.config.dimensions != config.dimensions:
            names = " ".join(loaded.config.dimensions) or "one label column"
            raise ValueError(f"{path} has a head for {names}. Train it on the same with --eval_dim.")
        loaded.model.reward_token = config.reward_token
        return loaded.model
    backbone = load_backbone(path, dtype=dtype, num_tokens=len(processor.tokenizer))
    token_id = reward_token_id(processor.tokenizer)
    row = backbone.get_input_embeddings().weight[:token_id].float().mean(dim=0)  # of the tokens before it
    return RewardModel(
        backbone, reward_embedding=row, num_rewards=config.num_rewards, reward_token=config.reward_token
    )


def load_reward_model(
    path: str | os.PathLike,
    *,
    base_model: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LoadedReward:
    """Load `checkpoint-N/` or a merged model. Adapter and tuned weights are merged into the backbone.

    `base_model` overrides the path of the base model. Raises ValueError that names what is missing.
    """
    folder = Path(path)
    if not (folder / HEAD_FILE).is_file():
        raise ValueError(f"{folder} is not a reward checkpoint: it holds no {HEAD_FILE}")
    config = RewardConfig.load(folder)
    source = str(folder) if config.base_model is None else base_model or config.base_model
    if os.path.isabs(source) and not os.path.isdir(source):
        raise ValueError(f"{folder} was trained from {source}, which is gone; give its path with --base_model")
    processor = AutoProcessor.from_pretrained(folder)
    token_id = reward_token_id(processor.tokenizer)
    backbone = load_backbone(source, dtype=dtype, num_tokens=len(processor.tokenizer))
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        backbone = PeftModel.from_pretrained(backbone, str(folder)).merge_and_unload()
    rows = backbone.get_input_embeddings().weight
    if (folder / TUNED_FILE).is_file():
        tuned = load_file(folder / TUNED_FILE)
        row = tuned.pop(ROW_KEY)
        with torch.no_grad():
            rows[token_id] = row.to(rows.dtype)
        unknown = backbone.load_state_dict(tuned, strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"{folder / TUNED_FILE} does not fit the base model: it has no {', '.join(unknown[:3])}")
    else:
        row = rows[token_id]
    model = RewardModel(
        backbone, reward_embedding=row, num_rewards=config.num_rewards, reward_token=config.reward_token
    )
    head = load_head(folder / HEAD_FILE, num_rewards=config.num_rewards, hidden_size=model.rm_head.in_features)
    model.rm_head.load_state_dict({"weight": head})
    model.requires_grad_(False).eval().to(device)
    return LoadedReward(model, SequenceBuilder(processor, format_prompt=config.format_prompt), config)


def save_merged(folder: Path, loaded: LoadedReward) -> None:
    """Write a plain Hugging Face model (the `<Reward>` row inside the embedding) with head, processor and config."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = loaded.model.qwen.get_input_embeddings().weight
    with torch.no_grad():
        rows[loaded.builder.reward_token_id] = loaded.model.reward_embedding.to(rows.dtype)
    generator = loaded.model.generator
    weights = {name: as_in_files(name, tensor).contiguous() for name, tensor in generator.state_dict().items()}
    generator.save_pretrained(folder, state_dict=weights, save_original_format=False)
    _apply_umask(folder)
    loaded.builder.processor.save_pretrained(folder)
    save_head(folder / HEAD_FILE, loaded.model.rm_head.weight)
    dataclasses.replace(loaded.config, base_model=None).save(folder)
