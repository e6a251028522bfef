"""The flags of collect_cot, and what they build."""

import argparse
import logging
from dataclasses import asdict
from pathlib import Path

from transformers import AutoProcessor

from checkpoint import choose_format_prompt, stored_video_budget
from infer_utils.chat_client import ChatClient
from infer_utils.cot_endpoint import VIDEO_FORMS, EndpointSource
from infer_utils.cot_plan import CollectInput, CotSource, Sampling
from infer_utils.cot_results import SelectionRules
from infer_utils.cot_vllm import VllmSettings, VllmSource
from infer_utils.scorer import MAX_COT_TOKENS
from model_qwen3 import add_reward_token
from scored_sequence import SequenceBuilder
from vision_process import VideoBudget

logger = logging.getLogger(__name__)

ENDPOINT_DEFAULTS = {"api_key_file": None, "send_video": "clip", "concurrency": 16, "timeout": 600.0}
VLLM_DEFAULTS = asdict(VllmSettings())
JOURNAL_SUFFIX = ".samples.jsonl"


def parse_options(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; a wrong one ends the process with 2."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("csv", help="preference CSV: videos, GSB, problem or prompt; see datasets/train/README.md")
    add("--output", required=True, help="CSV to write, in the folder that the input's video paths are relative to")
    add("--model", required=True, help="a Qwen3-VL: folder, hub name, or the name that the server knows it by")
    add("--eval_dim", default="GSB", help="label column")
    add("--overwrite", action="store_true", help="start clean where another run wrote --output")
    add_sampling_flags(parser.add_argument_group("sampling"))
    add_selection_flags(parser.add_argument_group("selection"))
    add_prompt_flags(parser.add_argument_group("prompt and video, as in training"))
    add_engine_flags(parser.add_argument_group("vLLM in this process (without --endpoint)"))
    add_server_flags(parser.add_argument_group("server"))
    return check_flags(parser, parser.parse_args(arguments))


def add_sampling_flags(group) -> None:
    add = group.add_argument
    add("--num_samples", type=int, default=4, help="CoTs a video; a larger number later adds to those that are there")
    add("--temperature", type=float, default=0.7)
    add("--top_p", type=float, default=0.95)
    add("--max_tokens", type=int, default=MAX_COT_TOKENS, help="longest CoT; one that is cut off is not used")
    add("--seed", type=int, default=0)


def add_selection_flags(group) -> None:
    add = group.add_argument
    add("--require_agreement", action="store_true", help="no CoTs for rows where none agree with the label")
    add("--tie_margin", type=float, default=0.25, help="points that overall scores may differ by under the label same")
    add("--drop_incomplete", action="store_true", help="leave rows without CoTs out of the output")
    add("--replace_cots", action="store_true", help="think again about rows that have both CoTs")
    add("--replace_answers", action="store_true", help="write stage 2's answer anew where there is one")


def add_prompt_flags(group) -> None:
    add = group.add_argument
    add("--processor", help="folder or hub name of the tokenizer and video settings; default: --model")
    add(
        "--format_prompt",
        help="Jinja file with the variable `content` around each problem; default: the processor's, if any",
    )
    add("--fps", type=float, help="sampled frames per second; default: as stored with the processor, or 2")
    add("--min_frames", type=int, help="fewest frames of a clip; default likewise, or 4")
    add("--min_pixels", "--min_frame_pixels", type=int, help="fewest pixels of a frame; default likewise, or 4096")
    add("--max_pixels", "--max_frame_pixels", type=int, help="most pixels of a frame; default likewise, or 200704")
    add("--max_length", type=int, default=8192, help="most tokens of a training sequence; a longer CoT is not used")


def add_engine_flags(group) -> None:
    add = group.add_argument
    add("--tensor_parallel_size", type=int, help="GPUs that share the model; default: 1")
    add("--gpu_memory_utilization", type=float, help="share of a GPU's memory; default: 0.9")
    add("--max_num_seqs", type=int, help="samples at a time; default: 64")


def add_server_flags(group) -> None:
    add = group.add_argument
    add("--endpoint", help="http://host:port/v1 of any OpenAI-compatible server")
    add("--api_key_file", help="file that holds the server's key")
    add("--send_video", choices=VIDEO_FORMS, help="form of the videos, see the README; default: clip")
    add("--concurrency", type=int, help="requests at a time; default: 16")
    add("--timeout", type=float, help="seconds that a reply may take; default: 600")


def check_flags(parser: argparse.ArgumentParser, options: argparse.Namespace) -> argparse.Namespace:
    """Fill defaults in, and refuse flags that would do nothing."""
    unused, used = VLLM_DEFAULTS, ENDPOINT_DEFAULTS
    if options.endpoint is None:
        unused, used = used, unused
    for name in unused:
        if getattr(options, name) is not None:
            place = "needs --endpoint" if options.endpoint is None else "goes without --endpoint: the server decides"
            parser.error(f"--{name} {place}")
    for name, default in used.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    for name in ("max_length", "concurrency", "tensor_parallel_size", "max_num_seqs"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.tie_margin < 0 or (options.timeout is not None and options.timeout <= 0):
        parser.error("--tie_margin must not be negative, and --timeout be above 0")
    return options


def check_output(options: argparse.Namespace, data: CollectInput) -> tuple[Path, Path]:
    """Paths of the output and of its journal. Raises ValueError where writing would destroy a file, or break the
    relative video paths in it."""
    source, output = Path(options.csv).resolve(), Path(options.output).resolve()
    journal = output.with_suffix(JOURNAL_SUFFIX)
    if output.suffix != ".csv":
        raise ValueError(f"--output {options.output}: give it a name that ends in .csv")
    if output == source:
        raise ValueError("--output is the input; give it another name")
    if not output.parent.is_dir():
        raise ValueError(f"--output {options.output}: its folder does not exist")
    if output.exists() and not journal.exists() and not options.overwrite:
        raise ValueError(f"--output {options.output} exists, by no run of this: choose another name, or --overwrite")
    if output.parent != source.parent and data.has_relative_videos:
        raise ValueError(f"--output {options.output}: video paths are relative to {source.parent}, so put it there")
    return output, journal


def build_sampling(options: argparse.Namespace) -> Sampling:
    """Raises ValueError on values outside their range."""
    names = ("num_samples", "temperature", "top_p", "max_tokens", "seed")
    sampling = Sampling(**{name: getattr(options, name) for name in names})
    sampling.validate()
    return sampling


def build_rules(options: argparse.Namespace) -> SelectionRules:
    return SelectionRules(**{name: getattr(options, name) for name in SelectionRules.__dataclass_fields__})


def build_prompts(options: argparse.Namespace) -> tuple[SequenceBuilder, VideoBudget]:
    """What makes prompts as training does. Raises ValueError when the processor cannot be loaded."""
    source = options.processor or options.model
    remedy = "name the folder or hub name of one with --processor"
    try:
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{source} holds no processor ({reason}); {remedy}") from error
    if not hasattr(processor, "video_processor"):
        raise ValueError(f"{source} holds a {type(processor).__name__}, not a Qwen3-VL processor; {remedy}")
    add_reward_token(processor)
    stored = stored_video_budget(source)
    budget = (stored or VideoBudget()).replace(
        fps=options.fps, min_frames=options.min_frames, min_pixels=options.min_pixels, max_pixels=options.max_pixels
    )
    if stored is not None and budget != stored:
        logger.warning("flags override the video budget of %s: %s becomes %s", source, stored, budget)
    format_prompt = None
    if options.format_prompt is not None:
        format_prompt = read_file(options.format_prompt, "--format_prompt")
    return SequenceBuilder(processor, format_prompt=choose_format_prompt(source, format_prompt)), budget


def build_source(
    options: argparse.Namespace, builder: SequenceBuilder, budget: VideoBudget, sampling: Sampling
) -> CotSource:
    """What writes the CoTs; nothing is loaded or asked yet."""
    common = {"builder": builder, "budget": budget, "sampling": sampling}
    if options.endpoint is None:
        settings = VllmSettings(**{name: getattr(options, name) for name in VLLM_DEFAULTS})
        return VllmSource(options.model, **common, settings=settings)
    key = None
    if options.api_key_file is not None:
        key = read_file(options.api_key_file, "--api_key_file").strip()
    client = ChatClient(options.endpoint, api_key=key, timeout=options.timeout)
    return EndpointSource(client, options.model, **common, form=options.send_video, concurrency=options.concurrency)


def read_file(path: str, flag: str) -> str:
    """Raises ValueError that names the flag."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {path}: {error}") from error
