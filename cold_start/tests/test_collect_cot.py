"""Collecting CoTs as users do, from a real server whose answers a test decides."""

import base64
import io
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from checkpoint import RewardConfig
from collect import collect_cot, endpoint
from collect.collect_cot import build_endpoint, parse_options
from collect.endpoint import encode_clip, encode_frames
from cot_support import (
    DIMENSIONS,
    DROP,
    MODEL,
    as_flags,
    completion,
    failure,
    make_cot,
    random_cot,
    request_text,
    run_chat_server,
    write_bare_csv,
)
from data import PairDataset, PairDraw
from descore.answers import parse_annotation
from preference_csv import CsvNeeds, read_pairs
from stage1_support import STAGE_DIR, TINY_BASE
from toy_world.tables import read_table
from verl.reward.function import load_reward_function
from vision_process import load_video

REWARD_FILE = STAGE_DIR.parent / "dual_rl" / "examples" / "reward_function" / "r1ta_subdim_head.py"
BUDGET = RewardConfig.resolve(TINY_BASE).video
LABELS = ["A", "B", "same", "invalid", "A", "B"]


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    with run_chat_server() as server:
        yield server


@pytest.fixture
def bare_csv(tmp_path, clips) -> Path:
    return write_bare_csv(tmp_path / "pairs.csv", clips, labels=LABELS)


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "out.csv"


def flags(path: Path, output: Path, server: SimpleNamespace, **options: object) -> list[str]:
    common = {"model": MODEL, "endpoint": server.url, "processor": TINY_BASE, "max_tokens": 512, "concurrency": 4}
    return [str(path), "--output", str(output), *as_flags(**{**common, **options})]


def run_collect(path: Path, output: Path, server: SimpleNamespace, **options: object) -> int:
    """`python -m collect.collect_cot` in this process; the exit status."""
    return collect_cot.main(flags(path, output, server, **options))


def read_report(output: Path) -> dict:
    return json.loads(output.with_suffix(".report.json").read_text())


def sent_url(request: dict) -> str:
    """The video that was sent."""
    return request["messages"][0]["content"][0]["video_url"]["url"]


def row_of(request: dict) -> int:
    """The row of the CSV that a request belongs to."""
    return int(re.search(r"number (\d+)\n", request_text(request)).group(1)) + 1


def test_frames_are_sent_as_training_sees_them(clips):
    for clip in clips:
        video = load_video(clip, BUDGET)
        expected = video.frames.permute(0, 2, 3, 1).numpy()
        with av.open(io.BytesIO(base64.b64decode(encode_clip(video).partition(",")[2]))) as container:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
            rate = float(container.streams.video[0].average_rate)
        assert np.array_equal(frames, expected)
        assert min(max(int(len(frames) / rate * 2), 4), len(frames)) == len(frames)  # of a server at 2 per second
        times = np.array(video.frame_indices) / video.source_fps
        assert np.abs(np.arange(len(frames)) / rate - times).max() <= 0.5 / video.source_fps + 1e-6
        url, fields = encode_frames(video)
        pictures = [Image.open(io.BytesIO(base64.b64decode(part))) for part in url.partition(",")[2].split(",")]
        assert np.array_equal(np.stack(pictures), expected)
        assert fields["media_io_kwargs"]["video"]["frames_indices"] == list(video.frame_indices)


def test_rows_get_cots_and_answers_that_both_stages_take(server, bare_csv, output):
    assert run_collect(bare_csv, output, server, num_samples=6) == 0
    before, rows, report = read_table(bare_csv), read_table(output), read_report(output)
    assert list(rows[0]) == [*before[0], "CoT_A", "CoT_B", "answer"]
    assert [{name: row[name] for name in before[0]} for row in rows] == before
    assert len(server.requests) == report["samples"] == 6 * 2 * len(LABELS)
    assert report["rows_agreeing"] == sum(label != "invalid" for label in LABELS)
    written = {random_cot(request) for request in server.requests}
    assert all(row[name] in written for row in rows for name in ("CoT_A", "CoT_B"))

    builder = build_endpoint(parse_options(flags(output, Path("x.csv"), server))).builder
    dataset = PairDataset(read_pairs(output, CsvNeeds()), builder, BUDGET)
    cot_ids = dataset.builder.encode_cot(rows[0]["CoT_A"])
    assert dataset[PairDraw(0, is_masked=False)].sequence_a.input_ids.tolist()[-len(cot_ids) - 2 : -2] == cot_ids

    compute_score = load_reward_function(f"{REWARD_FILE}:compute_score", {})
    for row in rows:
        assert parse_annotation(row["answer"]).preference == {"A": 1, "B": -1, "same": 0, "invalid": None}[row["GSB"]]
        for side in "AB":
            response = {"response": row[f"CoT_{side}"], "response_length": 9, "ground_truth": row["answer"]}
            score = compute_score([{**response, "side": side}])[0]
            assert (score["format"], score["sub"]) == (1.0, float(row["GSB"] != "invalid"))


def test_interrupted_run_resumes_with_more_samples_to_the_files_of_an_uninterrupted_one(
    server, bare_csv, output, tmp_path, capsys, request
):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    whole, journal = tmp_path / "whole.csv", output.with_suffix(".samples.jsonl")
    assert run_collect(bare_csv, whole, server) == 0
    num_requests = len(server.requests)

    first, is_over = threading.Lock(), threading.Event()

    def press_ctrl_c(request: dict) -> tuple:
        """At the twelfth request, which gets no reply, nor do later ones."""
        if len(server.requests) >= num_requests + 12:
            if first.acquire(blocking=False):
                os.kill(os.getpid(), signal.SIGINT)
            is_over.wait(60)
        return completion(random_cot(request))

    server.answer = press_ctrl_c
    assert run_collect(bare_csv, output, server, num_samples=3, concurrency=4) == 130
    is_over.set()
    assert capsys.readouterr().err.endswith("collect_cot: interrupted. The same command resumes.\n")
    assert not output.exists()
    num_kept = journal.read_bytes().count(b"\n") - 1
    assert 0 < num_kept < 12
    with journal.open("ab") as file:
        file.write(b'{"key": [6, "B", 3], "is_fin')  # torn, as a kill leaves it
    server.requests.clear()
    assert run_collect(bare_csv, output, server, concurrency=5) == 0
    assert len(server.requests) == num_requests - num_kept
    for suffix in (".csv", ".report.json"):
        assert output.with_suffix(suffix).read_bytes() == whole.with_suffix(suffix).read_bytes()


def test_malformed_samples_are_counted_and_rows_without_cots_listed(server, bare_csv, output):
    good = make_cot([2] * 5, 3)
    replies = [
        completion("half a character: \ud83d"),
        completion("<Reward> " + good),
        completion(good),
        completion(None),
        completion(good, finish_reason="length"),
        completion(good),
    ]
    server.answer = lambda request: replies[row_of(request) - 1]
    assert run_collect(bare_csv, output, server, drop_incomplete=True) == 0
    report = read_report(output)
    cut, reserved = "cut off before its end (--max_tokens)", "a reserved token in the text"
    no_answer = "no <answer> with a JSON object that has dimensional_scores"
    assert report["malformed"] == {no_answer: 8, reserved: 8, "empty": 8, cut: 8}
    reason = "video A: none of 4 CoTs is well-formed: 4 empty; video B: none of 4 CoTs is well-formed: 4 empty"
    assert report["rows_without_cots"][2] == {"row": 4, "reason": reason}
    assert [row["prompt"] for row in read_table(output)] == ["a red circle number 2", "a red circle number 5"]


def test_cots_that_contradict_the_label_are_kept_or_left_out(server, clips, output, tmp_path):
    path = write_bare_csv(tmp_path / "pairs.csv", clips, labels=["A", "same"])
    urls: dict[str, int] = {}

    def answer(request: dict) -> tuple:
        side = urls.setdefault(sent_url(request), len(urls)) % 2
        return completion(make_cot([side] * 5, 2.0 + side))  # B is better by a point, whatever the label

    server.answer = answer
    assert run_collect(path, output, server, num_samples=2, concurrency=1) == 0
    assert read_report(output)["rows_disagreeing"] == [1, 2]
    assert all(row["CoT_A"] and row["CoT_B"] for row in read_table(output))
    assert [row["answer"] for row in read_table(output)] == [
        f'<answer>{{"gsb_result": "{label}"}}</answer>' for label in ("A", "same")
    ]
    assert run_collect(path, output, server, num_samples=2, require_agreement=True) == 1
    reason = "no pair of CoTs agrees with the label A; A minus B is -1.00 at the nearest"
    assert read_report(output)["rows_without_cots"][0] == {"row": 1, "reason": reason}
    assert run_collect(path, output, server, num_samples=2, require_agreement=True, tie_margin=1) == 0
    assert read_report(output)["rows_agreeing"] == 1
    assert len(server.requests) == 8  # selection asks for nothing again


def test_damaged_video_and_failed_requests_leave_their_rows_and_busy_servers_are_asked_again(
    server, bare_csv, output, tmp_path, clips
):
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(clips[0].read_bytes()[:600])
    videos = [row["videos"] for row in read_table(bare_csv)]
    videos[1] = repr([str(clips[0]), str(damaged)])
    write_bare_csv(bare_csv, clips, labels=LABELS, videos=videos)
    passing = iter([DROP, failure(429), failure(503)])

    def answer(request: dict) -> tuple:
        row = row_of(request)
        if row == 5:
            time.sleep(2)
        if row == 1 and (trouble := next(passing, None)):
            return trouble
        return {3: failure(400), 4: failure(500)}.get(row, completion(random_cot(request)))

    server.answer = answer
    assert run_collect(bare_csv, output, server, timeout=1.5) == 0
    assert next(passing, None) is None
    missing = {entry["row"]: entry["reason"] for entry in read_report(output)["rows_without_cots"]}
    assert list(missing) == [2, 3, 4, 5]
    assert "video B: video does not decode" in missing[2]
    assert missing[3] == "video A: Error code: 400 - no such luck; video B: Error code: 400 - no such luck"
    assert missing[4] == missing[3].replace("400", "500")
    assert missing[5] == "video A: no reply within 1.5 s; video B: no reply within 1.5 s"
    assert not any(row_of(request) == 2 for request in server.requests)
    server.answer = lambda request: completion(random_cot(request))  # failures are tried again
    assert run_collect(bare_csv, output, server) == 0
    assert [entry["row"] for entry in read_report(output)["rows_without_cots"]] == [2]


def test_prompt_of_another_length_is_reported_or_ends_the_run(server, bare_csv, output, tmp_path, capsys):
    server.answer = lambda request: completion(random_cot(request), prompt_tokens=7)
    assert run_collect(bare_csv, output, server, num_samples=1) == 0
    assert read_report(output)["samples_with_another_prompt"] == 2 * len(LABELS)
    assert "another length" in capsys.readouterr().out
    assert run_collect(bare_csv, tmp_path / "exact.csv", server, send_video="frames") == 2
    assert "the server's prompt of 7 tokens is not training's" in capsys.readouterr().err


def test_cots_and_answers_that_exist_stay(server, output, tmp_path, clips):
    cells = {"CoT_A": ["mine", "", make_cot([2] * 5, 4)], "CoT_B": ["mine too", "half", make_cot([1] * 5, 3)]}
    answers = ["Video 1 is better", "", ""]
    path = write_bare_csv(tmp_path / "pairs.csv", clips, labels=["A", "B", "A"], **cells, answer=answers)
    assert run_collect(path, output, server, num_samples=6) == 0
    rows = read_table(output)
    assert [(row["CoT_A"], row["CoT_B"]) for row in rows[::2]] == list(zip(*cells.values(), strict=True))[::2]
    assert rows[0]["answer"] == "Video 1 is better"
    assert parse_annotation(rows[2]["answer"]).scores["B"]["style"] == 1
    assert {row_of(request) for request in server.requests} == {2}
    again = tmp_path / "again.csv"
    assert run_collect(path, again, server, num_samples=6, replace_cots=True, replace_answers=True) == 0
    assert all(row["CoT_A"] not in cells["CoT_A"] for row in read_table(again))
    assert all(row["answer"].startswith("<answer>{") for row in read_table(again))


def test_other_columns_come_out_as_they_went_in_and_opinions_make_the_answer(server, output, tmp_path, clips):
    notes = ['a "quoted", note', "two\r\nlines", "a lone \r return", " spaces ", "007", "NA"]
    opinions = {f"MOS_{side}_{name}": ["4.2" if side == "A" else "1"] * 6 for side in "AB" for name in DIMENSIONS}
    opinions["MOS_B_style"] = [""] * 6
    path = write_bare_csv(tmp_path / "pairs.csv", clips, labels=LABELS, empty=[""] * 6, notes=notes, **opinions)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"a lone \r return", b'"a lone \r return"'))
    assert run_collect(path, output, server, num_samples=1) == 0
    rows = read_table(output)
    assert [(row["notes"], row["empty"]) for row in rows] == [(note, "") for note in notes]
    assert len(read_pairs(output, CsvNeeds())) == len(LABELS)
    scores = {"A": dict.fromkeys(DIMENSIONS, 2), "B": dict.fromkeys(DIMENSIONS, 0) | {"style": "N/A"}}
    assert parse_annotation(rows[0]["answer"]).scores == scores
    assert read_report(output)["answers"] == {"label and MOS columns": 6}


def test_wrong_settings_and_files_are_refused_and_none_is_destroyed(server, tmp_path, clips, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(endpoint, "NUM_RETRIES", 0)
    Path("mine.csv").write_text("a,b\n")
    Path("key").write_text("secret\n")
    path = write_bare_csv(tmp_path / "pairs.csv", clips, labels=["A", "B"])
    for output, message, options in (
        ("out.csv", "has no model 'other', only judge", {"model": "other"}),
        ("out.csv", "and a CoT of 4090 exceed the model's 4096", {"max_tokens": 4090}),
        ("out.csv", "with --processor", {"processor": STAGE_DIR / "ds_config"}),
        ("out.csv", "cannot be reached", {"endpoint": "http://127.0.0.1:9/v1"}),
        ("pairs.csv", "--output is the input", {}),
        ("mine.csv", "collect_cot did not write it", {}),
    ):
        assert run_collect(path, Path(output), server, **options) == 2
        assert message in capsys.readouterr().err
    for columns, message in (
        ({"videos": ["['a.mp4', 'b.mp4']"]}, "row 1, video A: video not found"),
        ({"problem": ["<video><Reward>"]}, "row 1, video A: problem contains the reserved token"),
    ):
        faulty = write_bare_csv(tmp_path / "one.csv", clips, labels=["A"], **columns)
        assert run_collect(faulty, Path("out.csv"), server) == 2
        assert message in capsys.readouterr().err
    assert Path("mine.csv").read_text() == "a,b\n"
    assert server.requests == []

    sent_as_files = {"overwrite": True, "send_video": "file", "api_key_file": "key"}
    assert run_collect(path, Path("mine.csv"), server, **sent_as_files) == 0
    assert server.keys == {"Bearer secret"}
    sent = {base64.b64decode(sent_url(request).partition(",")[2]) for request in server.requests}
    assert sent == {clip.read_bytes() for clip in clips[:4]}
    assert run_collect(path, Path("mine.csv"), server, temperature=0.5) == 2
    message = capsys.readouterr().err
    assert "sampling (" in message
    assert "source ('endpoint, file' there, 'endpoint, clip' now)" in message
