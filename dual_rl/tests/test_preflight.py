"""What makes a run the same run: compared before a checkpoint is resumed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from verl.config import Config
from verl.config_loading import save_config
from verl.model.reward_files import load_checkpoint
from verl.trainer.inputs import Identity, describe_run, read_identity, require_same_run
from verl.types import PreferencePair

CHECKPOINT = Path("results/mine/global_step_2")
PAIRS = [PreferencePair(i, (f"{i}a.mp4", f"{i}b.mp4"), f"problem {i}", "A", 1) for i in range(3)]


def describe(folder: Path, *, pairs=PAIRS, fps: float | None = None, seed: int = 1, alpha: int = 128) -> Identity:
    config = Config()
    config.worker.actor.model.model_path = str(folder)
    config.data.seed, config.worker.actor.model.lora.alpha = seed, alpha
    checkpoint = load_checkpoint(folder, with_weights=False)
    budget = checkpoint.video_budget.replace(fps=fps)
    return json.loads(json.dumps(describe_run(config, replace(checkpoint, video_budget=budget), pairs)))


def test_a_run_is_the_same_wherever_model_and_videos_are(small_model, tmp_path):
    shutil.copytree(small_model, tmp_path / "moved")
    moved = [replace(pair, videos=("/new/a.mp4", "/new/b.mp4")) for pair in PAIRS]
    require_same_run(describe(small_model), describe(tmp_path / "moved", pairs=moved), checkpoint=CHECKPOINT)


def test_another_run_is_refused_and_all_differences_are_named(small_model, tmp_path):
    before = describe(small_model)
    changed = describe(small_model, pairs=[*PAIRS[:2], replace(PAIRS[2], answer="B")], fps=1.0, seed=2, alpha=8)
    with pytest.raises(ValueError, match="global_step_2 belongs to another run: ") as raised:
        require_same_run(before, changed, checkpoint=CHECKPOINT)
    for words in ("data.seed was 1 and is 2", "lora.alpha was 128 and is 8", "other training data", "other frames"):
        assert words in str(raised.value)
    assert "weights" not in str(raised.value)
    shutil.copytree(small_model, tmp_path / "other")
    weights = bytearray((tmp_path / "other" / "model.safetensors").read_bytes())
    weights[-2] ^= 1
    (tmp_path / "other" / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"another run: other weights\. Set"):
        require_same_run(before, describe(tmp_path / "other"), checkpoint=CHECKPOINT)


def test_older_checkpoints_without_one_record_are_read_from_their_parts(small_model, tmp_path):
    """Data order beside the stream's position, the model beside that, settings in YAML."""
    now = describe(small_model)
    stream = {"epoch": 1, "batch_in_epoch": 0, "batch_size": 128, "shuffle": True, "seed": 1}
    stream["fingerprint"] = now["training data"]
    config = Config()
    config.worker.actor.model.lora.alpha = 64
    save_config(config, tmp_path)
    parts = {name: now[name] for name in ("weights", "frames", "format prompt")}
    saved = read_identity(tmp_path, {"stream": stream, "model": parts})
    assert saved == now | {"worker.actor.model.lora.alpha": 64}
    assert read_identity(tmp_path, {"identity": now, "stream": {}}) == now
