"""What makes a run the same run, and what is looked at before anything is learned from a step."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model_support import write_small_model
from verl.config import Config
from verl.config_loading import save_config
from verl.model.reward_files import load_checkpoint, save_head
from verl.trainer.identity import Identity, describe_run, read_identity, require_same_run
from verl.types import PreferencePair

PLACE = Path("results/mine/global_step_2")
PAIRS = [PreferencePair(i, (f"{i}a.mp4", f"{i}b.mp4"), f"problem {i}", "A", 1) for i in range(3)]


@pytest.fixture
def model(tmp_path) -> Path:
    return write_small_model(tmp_path / "model")


def describe(folder: Path, *, pairs=PAIRS, fps: float | None = None, **settings: object) -> Identity:
    config = Config()
    config.worker.actor.model.model_path = str(folder)
    config.data.seed = settings.get("seed", 1)
    config.worker.actor.model.lora.alpha = settings.get("alpha", 128)
    checkpoint = load_checkpoint(folder, with_weights=False)
    budget = checkpoint.video_budget.replace(fps=fps)
    return json.loads(json.dumps(describe_run(config, replace(checkpoint, video_budget=budget), pairs)))


def test_a_run_is_the_same_wherever_model_and_videos_lie(model, tmp_path):
    shutil.copytree(model, tmp_path / "moved")
    moved = [replace(pair, videos=("/new/a.mp4", "/new/b.mp4")) for pair in PAIRS]
    require_same_run(describe(model), describe(tmp_path / "moved", pairs=moved), checkpoint=PLACE)


def test_another_run_is_refused_and_all_that_differs_is_named(model):
    before = describe(model)
    changed = describe(model, pairs=PAIRS[::-1], fps=1.0, seed=2, alpha=8)
    with pytest.raises(ValueError, match="global_step_2 belongs to another run: ") as raised:
        require_same_run(before, changed, checkpoint=PLACE)
    for words in ("data.seed was 1 and is 2", "lora.alpha was 128 and is 8", "other training data", "other frames"):
        assert words in str(raised.value)
    assert "weights" not in str(raised.value)
    save_head(model / "rm_head.pth", torch.ones(1, 128))
    with pytest.raises(ValueError, match=r"another run: other weights\. Set"):
        require_same_run(before, describe(model), checkpoint=PLACE)


@pytest.mark.parametrize("change", [PAIRS[:2], [*PAIRS[:2], replace(PAIRS[2], answer="B")]])
def test_other_rows_are_other_data(model, change):
    with pytest.raises(ValueError, match="other training data"):
        require_same_run(describe(model), describe(model, pairs=change), checkpoint=PLACE)


def test_checkpoints_without_one_record_are_read_from_their_parts(model, tmp_path):
    """As they were written before: data order with the stream's position, the model beside it, settings in YAML."""
    now = describe(model)
    stream = {"epoch": 1, "batch_in_epoch": 0, "batch_size": 128, "shuffle": True, "seed": 1}
    stream["fingerprint"] = now["training data"]
    parts = {name: now[name] for name in ("weights", "frames", "format prompt")}
    config = Config()
    config.worker.actor.model.lora.alpha = 64
    save_config(config, tmp_path)
    saved = read_identity(tmp_path, {"stream": stream, "model": parts})
    assert saved == now | {"worker.actor.model.lora.alpha": 64}
    assert read_identity(tmp_path, {"identity": now, "stream": {}}) == now
