"""Public sets in the form in which they are published, each read by stage 1 afterwards."""

import csv
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from infer_utils import import_data
from infer_utils.public_sets import SETS
from preference_csv import CsvNeeds, read_pairs
from stage1_support import STAGE_DIR

PROMPTS = ["a red circle moves left", "a star", "a ring, still", "a blue square", "two dots", "a wave"]
WEIGHTS = {"1": [0.9, 0.1, 0.5, 0.7, 0.2, 0.6], "2": [0.1, 0.9, 0.5, 0.3, 0.8, 0.4]}
LABELS = ["A", "B", "same", "A", "B", "A"]
"""Of the main dimension, row by row; also what WEIGHTS say."""


def names_of(clips) -> tuple[list[str], list[str]]:
    """File names of A and B of six rows."""
    names = [path.name for path in clips]
    return names, names[1:] + names[:1]


def weighted(dimensions: tuple[str, ...]) -> dict:
    return {f"weighted_results{n}_{name}": WEIGHTS[n] for name in dimensions for n in "12"}


def rows_of(columns: dict) -> list[dict]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def write_videogen(folder, a, b):
    labels = {name: LABELS for name in ("VQ", "MQ", "TA", "Overall")}
    rows = {
        "path_A": [f"videos/{x}" for x in a],
        "path_B": [f"videos/{x}" for x in b],
        "A_model": "m1",
        "B_model": "m2",
    }
    pd.DataFrame({**rows, "prompt": PROMPTS, **labels, "fps_A": 8.0}).to_csv(folder / "videogen-rewardbench.csv")


def write_videoalign(folder, a, b):
    labels = {name: LABELS for name in ("VQ", "MQ", "TA")}
    pd.DataFrame({"path_A": a, "path_B": b, "prompt": PROMPTS, **labels}).to_csv(folder / "train.csv")


def write_genai(folder, a, b):
    votes = {"A": "leftvote", "B": "rightvote", "same": "bothbad_vote"}
    links = {
        side: [f"https://host/some/{x}" for x in names] for side, names in (("left_video", a), ("right_video", b))
    }
    rows = {**links, "left_model": "m1", "right_model": "m2", "vote_type": [votes[label] for label in LABELS]}
    (folder / "video_generation").mkdir()
    pd.DataFrame({"prompt": PROMPTS, **rows}).to_parquet(folder / "video_generation" / "test-0.parquet")


def write_feedback(folder, a, b):
    scores = {name: [4, 2, 3, 3, 1, 2] for name in SETS["videofeedback"].needs[1:]}
    rows = {"id": [x.removesuffix(".mp4") for x in a], "images": [["0.jpg"]] * 6, "video link": "https://x/y.mp4"}
    pd.DataFrame({**rows, "text prompt": ["one", "one", "two", "two", "three", "three"], **scores}).to_parquet(
        folder / "train.parquet"
    )


def write_feedback_2(folder, a, b):
    scores = {name: [5, 1, 2, 2, 1, 4] for name in ("visual_score", "t2v_score", "phy_score")}
    rows = {"video_name": a, "prompt": ["one"] * 2 + ["two"] * 2 + ["three"] * 2, **scores, "thinking": ["..."] * 6}
    (folder / "test.json").write_text(json.dumps(rows_of(rows)))


def write_rapidata(folder, a, b):
    rows = {"prompt": PROMPTS, "file_name1": a, "file_name2": b, **weighted(("Preference", "Coherence", "Alignment"))}
    pd.DataFrame(rows).to_parquet(folder / "train-0.parquet")


def write_datapoint(folder, a, b):
    """Videos lie in the table."""
    contents = {name: (folder / "clips" / name).read_bytes() for name in a}
    videos = {f"video{n}": [{"bytes": contents[x], "path": x} for x in names] for n, names in ((1, a), (2, b))}
    rows = {"prompt": PROMPTS, **videos, "model1": "m1", "model2": "m2"}
    labels = weighted(("Coherence", "Aesthetic", "Prompt_Adherence"))
    pd.DataFrame({**rows, **labels}).to_parquet(folder / "train-0.parquet")
    for path in (folder / "clips").iterdir():
        path.unlink()


def write_dpo(folder, a, b):
    """The winner is named first."""
    clips = [{"basic": {"clip_path": f"clips/{x}", "clip_duration": 2.0}} for x in a]
    (folder / "metadata.json").write_text(json.dumps(clips))
    pairs = [
        {"video1": i, "video2": (i + 1) % 6, "frame_caption": [text], "score": 0.5} for i, text in enumerate(PROMPTS)
    ]
    (folder / "pair.json").write_text(json.dumps(pairs))


def write_mj(folder, a, b):
    choice = {"A": "video_0", "B": "video_1", "same": "same"}
    rows = {
        "caption": PROMPTS,
        "video_0_path": a,
        "video_1_path": b,
        "video_0_label": [{f"criterion {n}": 2 for n in range(28)}] * 6,
        "video_1_label": [{f"criterion {n}": n % 3 for n in range(28)}] * 6,
        "overall_preference": [choice[label] for label in LABELS],
        "discard": [False] * 6,
    }
    (folder / "data.json").write_text(json.dumps(rows_of(rows)))


def write_vbench(folder, a, b):
    won = {"A": 1, "B": 0, "same": 0.5}
    rows = [
        {"prompt_en": prompt, "videos": {"lavie": first, "pika": second},
         "human_anno": {"lavie": {"pika": won[label]}, "pika": {"lavie": 1 - won[label]}}}
        for prompt, first, second, label in zip(PROMPTS, a, b, LABELS, strict=True)
    ]  # fmt: skip
    (folder / "annotations.json").write_text(json.dumps(rows))


FORMS: dict[str, tuple[Callable, list[str]]] = {
    "videogen-rewardbench": (write_videogen, LABELS),
    "videoalign": (write_videoalign, LABELS),
    "genai-bench": (write_genai, LABELS),
    "rapidata": (write_rapidata, LABELS),
    "datapointai": (write_datapoint, LABELS),
    "videodpo": (write_dpo, ["A"] * 6),
    "mj-bench-video": (write_mj, LABELS),
    "vbench": (write_vbench, LABELS),
    "videofeedback": (write_feedback, ["A or B", "A or B", "same"]),
    "videofeedback2": (write_feedback_2, ["A or B", "A or B", "same"]),
}
"""How each set lies on disk, and the labels that it must give."""


@pytest.fixture
def source(tmp_path, clips) -> Path:
    folder = tmp_path / "download"
    (folder / "clips").mkdir(parents=True)
    for clip in clips:
        (folder / "clips" / clip.name).write_bytes(clip.read_bytes())
    return folder


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["import_data", *map(str, arguments)])
    return import_data.main()


def read_rows(folder: Path, name: str) -> list[dict]:
    path = folder / f"{name}.csv"
    return list(csv.DictReader(path.open(newline=""))) if path.is_file() else []


@pytest.mark.parametrize("name", SETS)
def test_a_set_of_the_published_form_becomes_pairs(source, clips, tmp_path, monkeypatch, name):
    write, expected = FORMS[name]
    write(source, *names_of(clips))
    output = tmp_path / "out"
    assert run(monkeypatch, name, "--source", source, "--output", output, "--test", 0, "--val", 0) == 0
    pairs = read_pairs(output / "train.csv", CsvNeeds(cots=False))
    assert all(Path(path).is_file() for pair in pairs for path in (pair.video_a, pair.video_b))
    labels = [pair.label for pair in pairs]
    known = labels if "A or B" not in expected else sorted("A or B" if x in "AB" else x for x in labels)
    assert known == expected
    dimensions = SETS[name].dimensions
    assert all(row["GSB"] == row[dimensions[0]] for row in read_rows(output, "train"))
    report = json.loads((output / "report.json").read_text())
    assert report["counts"]["train"] == len(expected)
    assert sum(report["labels"][dimensions[0]].values()) == len(expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_an_imported_set_trains_in_all_of_its_dimensions(source, clips, small_base, tmp_path, monkeypatch, name):
    FORMS[name][0](source, *names_of(clips))
    output = tmp_path / "out"
    assert run(monkeypatch, name, "--source", source, "--output", output, "--test", 0, "--val", 0) == 0
    paths = {"DATA": output / "train.csv", "MODEL_PATH": small_base, "OUTPUT_DIR": tmp_path / "run"}
    environment = {name: str(value) for name, value in (paths | {"NUM_GPUS": 0, "OMP_NUM_THREADS": 1}).items()}
    flags = "--max_steps 2 --drop_prob 1 --lora_r 4 --dataloader_num_workers 0 --report_to none --eval_dim"
    command = ["bash", STAGE_DIR / "train.sh", *flags.split(), *SETS[name].dimensions]
    subprocess.run(command, env=os.environ | environment, check=True)
    head = torch.load(tmp_path / "run/checkpoint-2/rm_head.pth", weights_only=True)["rm_head.weight"]
    assert len(head) == len(SETS[name].dimensions)


def test_a_prompt_is_in_one_split_only_and_benchmarks_are_for_testing(source, clips, tmp_path, monkeypatch):
    write_videogen(source, *names_of(clips))
    assert run(monkeypatch, "videogen-rewardbench", "--source", source, "--output", tmp_path / "bench") == 0
    bench = read_rows(tmp_path / "bench", "bench")
    assert [row["GSB_Overall"] for row in bench] == LABELS
    assert bench[0]["A_model"] == "m1"
    write_rapidata(source, *names_of(clips))
    shares = ["--val", 0.3, "--test", 0.3]
    assert run(monkeypatch, "rapidata", "--source", source, "--output", tmp_path / "split", *shares) == 0
    prompts = {
        name: {row["prompt"] for row in read_rows(tmp_path / "split", name)} for name in ("train", "val", "test")
    }
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values())) == 6


def test_videos_come_out_of_zip_files_and_missing_ones_are_reported(source, clips, tmp_path, monkeypatch, capsys):
    a, b = names_of(clips)
    write_videogen(source, ["elsewhere.mp4", *a[1:]], b)
    with zipfile.ZipFile(source / "videos.zip", "w") as archive:
        for clip in clips:
            archive.write(clip, f"videos/{clip.name}")
            (source / "clips" / clip.name).unlink()
    output = tmp_path / "out"
    assert run(monkeypatch, "videogen-rewardbench", "--source", source, "--output", output) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["counts"] == {"rows": 6, "left out: video not found": 1, "test": 5}
    assert report["missing_videos"] == {"distinct": 1, "first": ["videos/elsewhere.mp4"]}
    paths = [path for row in read_rows(output, "bench") for path in (row["path_A"], row["path_B"])]
    assert all((output / path).is_file() for path in paths)


def test_sub_scores_become_the_answer_of_stage_2(source, clips, tmp_path, monkeypatch):
    write_mj(source, *names_of(clips))
    assert (
        run(monkeypatch, "mj-bench-video", "--source", source, "--output", tmp_path / "out", "--test", 0, "--val", 0)
        == 0
    )
    answer = json.loads(
        read_rows(tmp_path / "out", "train")[1]["answer"].removeprefix("<answer>").removesuffix("</answer>")
    )
    assert answer["gsb_result"] == "B"
    assert len(answer["video_1_scores"]) == 28
    assert answer["video_2_scores"]["criterion 1"] == 1


def test_ratings_closer_than_the_margin_are_no_preference(source, clips, tmp_path, monkeypatch):
    write_feedback(source, *names_of(clips))
    arguments = ["--source", source, "--output", tmp_path / "out", "--test", 0, "--val", 0, "--margin", 2]
    assert run(monkeypatch, "videofeedback", *arguments) == 0
    assert sorted(row["GSB"] == "same" for row in read_rows(tmp_path / "out", "train")) == [False, True]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vote_type": None}, "row 1: column vote_type is missing"),
        ({"vote_type": ["left", *["leftvote"] * 5]}, "row 1: vote_type: 'left' is not a label"),
        ({"left_video": ["https://host/none.mp4"] * 6}, "Name the folder of the videos"),
    ],
)
def test_another_form_is_one_message(source, clips, tmp_path, monkeypatch, capsys, change, words):
    write_genai(source, *names_of(clips))
    path = next(source.rglob("*.parquet"))
    table = pd.read_parquet(path)
    for column, values in change.items():
        table = table.drop(columns=column) if values is None else table.assign(**{column: values})
    table.to_parquet(path)
    assert run(monkeypatch, "genai-bench", "--source", source, "--output", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert words in error
    assert str(path) in error
    assert not (tmp_path / "out" / "test.csv").exists()


def test_any_table_with_a_column_map(source, clips, tmp_path, monkeypatch):
    a, b = names_of(clips)
    rows = rows_of(
        {"caption": PROMPTS, "left": a, "right": b, "winner": LABELS, "s1": WEIGHTS["1"], "s2": WEIGHTS["2"]}
    )
    (source / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = ["prompt=caption", "video_a=left", "video_b=right", "label.GSB=winner"]
    arguments = ["--source", source / "mine.jsonl", "--output", tmp_path / "out", "--test", 0, "--val", 0]
    assert run(monkeypatch, "table", *arguments, "--columns", *columns) == 0
    assert [row["GSB"] for row in read_rows(tmp_path / "out", "train")] == LABELS
    assert run(monkeypatch, "table", *arguments, "--columns", *columns[:2]) == 1


def test_an_output_is_of_one_import_and_holds_its_last_run_only(source, clips, tmp_path, monkeypatch, capsys):
    write_rapidata(source, *names_of(clips))
    arguments = ["rapidata", "--source", source, "--output", source / "out"]
    assert run(monkeypatch, *arguments, "--test", 0) == 0
    assert run(monkeypatch, *arguments, "--test", 1) == 0
    assert not read_rows(source / "out", "train")
    assert len(read_rows(source / "out", "test")) == 6
    write_videoalign(tmp_path, *names_of(clips))
    assert run(monkeypatch, "videoalign", "--source", tmp_path, "--output", source / "out") == 1
    assert "Name another --output" in capsys.readouterr().err
    (source / "videos.zip").write_bytes(b"PK, and then something else")
    assert run(monkeypatch, *arguments) == 1
    assert "videos.zip is not a zip file" in capsys.readouterr().err
