"""What collect_cot refuses before it asks for anything, and that no file is destroyed."""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoint import RewardConfig, stored_video_budget
from cot_support import MODEL, run_collect, write_bare_csv
from infer_utils.cot_options import build_prompts, parse_options
from stage1_support import STAGE_DIR, TINY_BASE, write_pairs_csv

pytest_plugins = ["cot_fixtures"]
BUDGET = stored_video_budget(str(TINY_BASE))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "other"}, "has no model 'other', only judge"),
        ({"max_tokens": 4090}, "exceed the 4096 that the model takes"),
        ({"max_length": 60}, "leaves no room for a CoT under --max_length 60"),
        ({"temperature": 0}, "add --num_samples 1"),
        ({"num_samples": 0}, "must be at least 1"),
        ({"processor": STAGE_DIR / "ds_config"}, "with --processor"),
        ({"format_prompt": "nowhere.jinja"}, "--format_prompt nowhere.jinja"),
        ({"api_key_file": "nowhere"}, "--api_key_file nowhere"),
        ({"endpoint": "localhost:8000"}, "give http://host:port/v1"),
        ({"eval_dim": "motion"}, "missing column motion"),
    ],
)
def test_wrong_settings_are_told_before_anything_is_asked(server, bare_csv, tmp_path, capsys, options, message):
    assert run_collect(bare_csv, tmp_path / "out.csv", server, **options) == 2
    assert message in capsys.readouterr().err
    assert server.requests == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.csv"]


def test_wrong_files_are_told_and_none_is_destroyed(server, tmp_path, clips, capsys, monkeypatch):
    path = write_bare_csv(tmp_path / "pairs.csv", clips, labels=["A", "B"])
    content = path.read_bytes()
    monkeypatch.chdir(tmp_path)

    def refuse(csv_path: Path, output: str, message: str, **options: object) -> None:
        assert run_collect(csv_path, Path(output), server, **options) == 2
        assert message in capsys.readouterr().err

    refuse(path, "pairs.csv", "--output is the input")
    refuse(path, "out.txt", "ends in .csv")
    refuse(path, "none/out.csv", "folder does not exist")
    Path("mine.csv").write_text("a,b\n")
    refuse(path, "mine.csv", "exists, by no run of this")
    assert Path("mine.csv").read_text() == "a,b\n"
    refuse(Path("none.csv"), "out.csv", "file not found")
    os.symlink(clips[0], "a.mp4")
    Path("deeper").mkdir()
    relative = write_bare_csv(tmp_path / "relative.csv", clips, labels=["A"], videos=["['a.mp4', 'a.mp4']"])
    refuse(relative, "deeper/out.csv", "video paths are relative to")
    missing = write_bare_csv(tmp_path / "missing.csv", clips, labels=["A"], videos=["['a.mp4', 'b.mp4']"])
    refuse(missing, "out.csv", "row 1: video not found")
    reserved = write_bare_csv(tmp_path / "reserved.csv", clips, labels=["A"], problem=["<video><Reward>"])
    refuse(reserved, "out.csv", "row 1, video A: problem contains the reserved token '<Reward>'")
    special = write_bare_csv(tmp_path / "special.csv", clips, labels=["A"], problem=["<video><|im_start|>"])
    refuse(special, "out.csv", "row 1, video A: problem contains the reserved token '<|im_start|>'")
    whole = write_pairs_csv(tmp_path / "whole.csv", clips, labels=["A"])
    refuse(whole, "out.csv", "every row of")
    assert server.requests == []

    assert run_collect(path, Path("mine.csv"), server, overwrite=True) == 0
    refuse(path, "mine.csv", "sampling (", temperature=0.5)
    refuse(path, "mine.csv", "source ('endpoint, clip' there, 'endpoint, file' now)", send_video="file")
    refuse(reserved, "mine.csv", "reserved token")
    other = write_bare_csv(tmp_path / "other.csv", clips, labels=["A"])
    refuse(other, "mine.csv", "data (")
    server.models = (200, {"data": [{"id": MODEL}, {"id": "other"}]})
    refuse(path, "mine.csv", "model ('judge' there, 'other' now)", model="other")
    assert run_collect(path, Path("mine.csv"), server, overwrite=True, temperature=0.5) == 0
    assert path.read_bytes() == content


def test_flags_that_would_do_nothing_are_refused(bare_csv, tmp_path, capsys, caplog):
    common = [str(bare_csv), "--output", str(tmp_path / "out.csv"), "--model", str(TINY_BASE)]
    for extra, message in (
        (["--concurrency", "4"], "--concurrency needs --endpoint"),
        (["--endpoint", "http://a/v1", "--max_num_seqs", "4"], "--max_num_seqs goes without --endpoint"),
        (["--tie_margin", "-1"], "must not be negative"),
        (["--max_length", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            parse_options("", [*common, *extra])
        assert message in capsys.readouterr().err
    options = parse_options("", [*common, "--fps", "4", "--max_pixels", "9216"])
    assert build_prompts(options)[1] == replace(BUDGET, fps=4.0, max_pixels=9216)
    assert "flags override the video budget" in caplog.text


def test_format_prompt_of_the_model_holds_unless_another_is_given(tmp_path):
    model, mine = tmp_path / "model", tmp_path / "mine.jinja"
    shutil.copytree(TINY_BASE, model)
    RewardConfig(base_model=None, format_prompt="So: {{ content }}").save(model)
    mine.write_text("Mine: {{ content }}")
    common = ["pairs.csv", "--output", "out.csv", "--model", str(model)]
    assert "So: a cat" in build_prompts(parse_options("", common))[0].render("a cat")
    assert "Mine: a cat" in build_prompts(parse_options("", [*common, "--format_prompt", str(mine)]))[0].render(
        "a cat"
    )


@pytest.mark.parametrize("page", ["README.md", "datasets/train/README.md", "infer_utils/collect_cot.py"])
def test_documented_commands_and_flags_exist(page):
    text = (STAGE_DIR / page).read_text().replace("\\\n", " ")
    commands = re.findall(r"^ +python -m infer_utils\.collect_cot (.*)$", text, re.MULTILINE)
    assert commands
    for command in commands:
        parse_options("", command.split())
    section = text[text.index("collect_cot") :].partition("\n##")[0]
    known = (STAGE_DIR / "infer_utils" / "cot_options.py").read_text()
    servers = {"--media-io-kwargs", "--trust-request-mm-kwargs"}
    for flag in set(re.findall(r"--[a-z_-]+[a-z]", section)) - servers:
        assert f'"{flag}"' in known, flag


def test_vllm_is_asked_for_where_it_is_missing(bare_csv, tmp_path, capsys, monkeypatch):
    from infer_utils import collect_cot

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    common = [str(bare_csv), "--output", str(tmp_path / "out.csv"), "--model", str(TINY_BASE)]
    assert collect_cot.main(common) == 2
    assert "pip install vllm" in capsys.readouterr().err
