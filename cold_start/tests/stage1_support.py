"""What the tests of stage 1 share: a small random model of the real architecture, and a preference CSV of clips."""

import copy
import multiprocessing
import socket
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from checkpoint import RewardConfig
from experts import with_experts
from scored_sequence import judge_problem
from vision_process import VideoBudget

STAGE_DIR = Path(__file__).resolve().parents[1]
TINY_BASE = STAGE_DIR / "model" / "tiny_base"
REAL_VIDEOS = STAGE_DIR.parents[1] / "shared" / "videos"
SMALL_BUDGET = VideoBudget(max_frames=8, min_pixels=64 * 64, max_pixels=64 * 96)
COT = 'The clip shows a circle, so {score}.\n<answer>\n{{"dimensional_scores": {{"subject": {score}}}}}\n</answer>'


def forkserver() -> multiprocessing.context.BaseContext:
    """A context whose processes start with the slow imports done."""
    context = multiprocessing.get_context("forkserver")
    slow = ("deepspeed", "peft", "pytest", "torchvision", "pandas", "transformers.models.qwen3_vl.modeling_qwen3_vl")
    context.set_forkserver_preload([*slow])
    return context


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_small_base(folder: Path, *, tied: bool = False, has_experts: bool = False, spare_rows: int = 8) -> Path:
    """A random two-layer Qwen3-VL with the tiny base's processor; `spare_rows` embedding rows beyond its tokens."""
    config = copy.deepcopy(Qwen3VLConfig.from_pretrained(TINY_BASE))
    processor = AutoProcessor.from_pretrained(TINY_BASE)
    config.text_config.num_hidden_layers = 2
    config.text_config.vocab_size = len(processor.tokenizer) + spare_rows
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = tied
    config.vision_config.depth = 2
    config.vision_config.deepstack_visual_indexes = [0]
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config)
    for parameter in model.parameters():  # stock initialisation hardly lets inputs show in the outputs
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    if has_experts:
        model = with_experts(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    RewardConfig(base_model=None, video=SMALL_BUDGET).save(folder)
    return folder


def write_pairs_csv(path: Path, clips: Sequence[Path], *, labels: Sequence[str], **columns: Sequence[str]) -> Path:
    """A stage 1 CSV with one row per label, over the clips in turn; `columns` replace the written ones."""
    rows = []
    for index, label in enumerate(labels):
        videos = [str(clips[(2 * index + side) % len(clips)]) for side in (0, 1)]
        prompt = f"a red circle number {index}"
        rows.append(
            {
                "videos": repr(videos),
                "problem": judge_problem(prompt),
                "prompt": prompt,
                "CoT_A": COT.format(score=2),
                "CoT_B": COT.format(score=index % 3),
                "GSB": label,
                "MOS_A_GSB": 4.0 - index % 3,
                "MOS_B_GSB": 2.5,
            }
        )
    pd.DataFrame(rows).assign(**columns).to_csv(path, index=False)
    return path
