"""The best-of-N example as users run it."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

from toy_world.tables import read_table

DUAL_RL = Path(__file__).resolve().parents[1]
CLIPS = sorted((DUAL_RL / "data" / "videos").glob("*.mp4"))


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        spec = importlib.util.spec_from_file_location("best_of_n", DUAL_RL / "examples" / "best_of_n.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two prompts with three clips each."""
    for number in range(2):
        inner = tmp_path / "clips" / f"prompt_{number}"
        inner.mkdir(parents=True)
        (inner / "prompt.txt").write_text(f"shape number {number}\n")
        for index, clip in enumerate(CLIPS[3 * number : 3 * number + 3]):
            shutil.copy(clip, inner / f"{index}.mp4")
    return tmp_path / "clips"


def test_folders_that_lack_something_are_listed(example, folder, capsys):
    (folder / "prompt_0" / "prompt.txt").unlink()
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=r"(?s)empty has no text.*empty has no clip.*prompt_0 has no text") as error:
        example.find_tasks(folder)
    assert "prompt_1" not in str(error.value)
    with pytest.raises(ValueError, match="has no sub-folder"):
        example.find_tasks(folder / "prompt_1")


def test_clips_are_ranked_and_failures_listed(example, folder, small_model, tmp_path, capsys):
    (folder / "prompt_1" / "2.mp4").write_bytes(b"no video")
    output = tmp_path / "best.csv"
    places = ["--model_ckpt", str(small_model), "--clips", str(folder), "--output", str(output)]
    assert example.main([*places, "--backend", "hf", "--max_new_tokens", "6"]) == 0
    console = capsys.readouterr()
    assert "failed: prompt_1/2.mp4: video does not decode" in console.err
    rows = read_table(output)
    assert [row["rank"] for row in rows] == ["1", "2", "3", "1", "2", ""]
    assert {row["video"] for row in rows} == {str(path) for path in folder.glob("*/*.mp4")}
    for name in ("prompt_0", "prompt_1"):
        rewards = [float(row["reward"]) for row in rows if row["folder"] == name and row["reward"]]
        assert rewards == sorted(rewards, reverse=True)
    assert f"prompt_0: {rows[0]['video']}" in console.out
