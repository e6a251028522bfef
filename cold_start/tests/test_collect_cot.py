"""Collecting CoTs as users do, from a real server whose answers a test decides."""

import base64
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
from PIL import Image

from checkpoint import stored_video_budget
from cot_support import (
    LABELS,
    completion,
    flags,
    make_cot,
    random_cot,
    read_rows,
    run_collect,
    write_bare_csv,
)
from data import PairDataset, PairDraw
from descore.answers import parse_annotation
from infer_utils.cot_endpoint import encode_clip, encode_frames
from infer_utils.cot_options import build_prompts, parse_options
from preference_csv import CsvNeeds, read_pairs
from stage1_support import STAGE_DIR, TINY_BASE, write_pairs_csv
from verl.reward.function import load_reward_function
from vision_process import load_video

pytest_plugins = ["cot_fixtures"]
REWARD_FILE = STAGE_DIR.parent / "dual_rl" / "examples" / "reward_function" / "r1ta_subdim_head.py"
BUDGET = stored_video_budget(str(TINY_BASE))


def read_report(output: Path) -> dict:
    return json.loads(output.with_suffix(".report.json").read_text())


def files_of(output: Path) -> list[bytes]:
    return [output.read_bytes(), output.with_suffix(".report.json").read_bytes()]


def of_side(request: dict) -> str:
    """A or B, where the sides' videos differ in size."""
    return request["messages"][0]["content"][0]["video_url"]["url"]


def decode_clip(url: str) -> tuple[np.ndarray, float]:
    """Frames, uint8 [n, height, width, 3], and rate of an mp4 data URL."""
    with av.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return np.stack(frames), float(container.streams.video[0].average_rate)


def test_frames_are_sent_as_training_sees_them(clips):
    for clip in clips:
        video = load_video(clip, BUDGET)
        expected = video.frames.permute(0, 2, 3, 1).numpy()
        frames, rate = decode_clip(encode_clip(video))
        assert np.array_equal(frames, expected)
        assert min(max(int(len(frames) / rate * 2), 4), len(frames)) == len(
            frames
        )  # what a server takes at 2 a second
        times = np.array(video.frame_indices) / video.source_fps
        assert np.abs(np.arange(len(frames)) / rate - times).max() <= 0.5 / video.source_fps + 1e-6
        url, fields = encode_frames(video)
        pictures = [Image.open(io.BytesIO(base64.b64decode(part))) for part in url.partition(",")[2].split(",")]
        assert np.array_equal(np.stack(pictures), expected)
        assert fields["media_io_kwargs"]["video"]["frames_indices"] == list(video.frame_indices)
        assert fields["mm_processor_kwargs"] == {"do_resize": False}


def test_rows_get_cots_and_answers_that_both_stages_take(server, bare_csv, tmp_path, capsys):
    output = tmp_path / "out.csv"
    assert run_collect(bare_csv, output, server, num_samples=6) == 0
    before, rows, report = read_rows(bare_csv), read_rows(output), read_report(output)
    assert list(rows[0]) == [*before[0], "CoT_A", "CoT_B", "answer"]
    assert [{name: row[name] for name in before[0]} for row in rows] == before
    assert len(server.requests) == report["samples"] == 6 * 2 * len(LABELS)
    assert report["rows_with_collected_cots"] == len(LABELS)
    assert report["rows_agreeing"] == sum(label != "invalid" for label in LABELS)
    written = {random_cot(request) for request in server.requests}
    assert all(row[name] in written for row in rows for name in ("CoT_A", "CoT_B"))
    assert capsys.readouterr().out.startswith("12 videos, 72 samples, 0 malformed\n6 rows got CoTs: 5 agree")

    pairs = read_pairs(output, CsvNeeds())
    options = parse_options("", [str(output), "--output", "x.csv", *flags(server)])
    dataset = PairDataset(pairs, *build_prompts(options))
    encoded = dataset[PairDraw(0, is_masked=False)]
    cot_ids = dataset.builder.encode_cot(rows[0]["CoT_A"])
    assert encoded.sequence_a.input_ids.tolist()[-len(cot_ids) - 2 : -2] == cot_ids

    compute_score = load_reward_function(f"{REWARD_FILE}:compute_score", {})
    for row in rows:
        annotation = parse_annotation(row["answer"])
        assert annotation.preference == {"A": 1, "B": -1, "same": 0, "invalid": None}[row["GSB"]]
        for side in "AB":
            response = {"response": row[f"CoT_{side}"], "response_length": 9, "ground_truth": row["answer"]}
            score = compute_score([{**response, "side": side}])[0]
            assert (score["format"], score["sub"]) == (1.0, float(row["GSB"] != "invalid"))


def test_run_that_is_killed_and_one_that_is_refused_go_on_to_the_same_files(server, bare_csv, tmp_path):
    whole, killed, refused = (tmp_path / f"{name}.csv" for name in ("whole", "killed", "refused"))
    assert run_collect(bare_csv, whole, server) == 0
    num_requests = len(server.requests)

    command = [sys.executable, "-m", "infer_utils.collect_cot", str(bare_csv), "--output", str(killed)]
    process = subprocess.Popen([*command, *flags(server, concurrency=2)], cwd=STAGE_DIR, stderr=subprocess.DEVNULL)
    journal = killed.with_suffix(".samples.jsonl")
    server.answer = lambda request: time.sleep(0.02) or (200, completion(random_cot(request)))
    while not journal.exists() or journal.read_bytes().count(b"\n") < 10:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not killed.exists()
    with journal.open("ab") as file:
        file.write(b'{"key": [6, "B", 3], "is_fin')  # torn
    num_kept = journal.read_bytes().count(b"\n") - 1
    server.requests.clear()
    assert run_collect(bare_csv, killed, server, concurrency=5) == 0
    assert len(server.requests) == num_requests - num_kept
    assert files_of(killed) == files_of(whole)

    server.answer = lambda request: (
        (200, completion(random_cot(request))) if len(server.requests) % 20 else (404, {"error": "model gone"})
    )
    statuses = []
    while not statuses or statuses[-1] != 0:
        server.requests.clear()
        statuses.append(run_collect(bare_csv, refused, server, concurrency=3))
    assert statuses == [2, 2, 0]
    assert files_of(refused) == files_of(whole)


def test_more_samples_are_added_to_those_that_are_there(server, bare_csv, tmp_path):
    assert run_collect(bare_csv, tmp_path / "out.csv", server, num_samples=1) == 0
    assert run_collect(bare_csv, tmp_path / "out.csv", server, num_samples=3) == 0
    assert len(server.requests) == 3 * 2 * len(LABELS)
    assert run_collect(bare_csv, tmp_path / "once.csv", server, num_samples=3) == 0
    assert files_of(tmp_path / "out.csv") == files_of(tmp_path / "once.csv")


def test_malformed_samples_are_counted_and_rows_without_cots_listed(server, bare_csv, tmp_path, capsys):
    def answer(request: dict) -> tuple:
        row = next(n for n in range(6) if f"number {n}\n" in request["messages"][0]["content"][1]["text"])
        texts = ["no answer", "<Reward> " + make_cot([2] * 5, 3), "<|im_end|>" + make_cot([2] * 5, 3), "", None]
        good = completion(random_cot(request))
        replies = [*map(completion, texts), completion(make_cot([2] * 5, 3), finish_reason="length")]
        return 200, replies[row] if row != 4 and request["seed"] % 2 else good if row != 3 else replies[3]

    server.answer = answer
    output = tmp_path / "out.csv"
    assert run_collect(bare_csv, output, server) == 0
    report, rows = read_report(output), read_rows(output)
    assert set(report["malformed"]) == {
        "no <answer>...</answer>",
        "a reserved token in the text",
        "empty",
        "cut off before its end (--max_tokens)",
    }
    without = [row["row"] for row in report["rows_without_cots"]]
    assert 4 in without
    assert [n for n, row in enumerate(rows, start=1) if not row["CoT_A"] or not row["CoT_B"]] == without
    entry = next(entry for entry in report["rows_without_cots"] if entry["row"] == 4)
    assert entry["reason"] == (
        "video A: none of 4 CoTs is well-formed: 4 empty; video B: none of 4 CoTs is well-formed: 4 empty"
    )
    assert f"row 4: {entry['reason']}" in capsys.readouterr().out
    assert rows[3]["answer"] == '<answer>{"gsb_result": "invalid"}</answer>'
    assert run_collect(bare_csv, output, server, drop_incomplete=True) == 0
    assert [row["prompt"] for row in read_rows(output)] == [
        row["prompt"] for n, row in enumerate(rows, start=1) if n not in without
    ]


def test_cots_that_contradict_the_label_are_kept_or_left_out(server, tmp_path, clips):
    path, output = write_bare_csv(tmp_path / "pairs.csv", clips, labels=["A", "same"]), tmp_path / "out.csv"
    urls: list[str] = []

    def answer(request: dict) -> tuple:
        if of_side(request) not in urls:
            urls.append(of_side(request))
        side = urls.index(of_side(request)) % 2
        return 200, completion(make_cot([side] * 5, 2.0 + side))  # B is better by a point, whatever the label

    server.answer = answer
    assert run_collect(path, output, server, num_samples=2, concurrency=1) == 0
    assert read_report(output)["rows_disagreeing"] == [1, 2]
    assert all(row["CoT_A"] and row["CoT_B"] for row in read_rows(output))
    assert [row["answer"] for row in read_rows(output)] == [
        f'<answer>{{"gsb_result": "{label}"}}</answer>' for label in ("A", "same")
    ]
    assert run_collect(path, output, server, num_samples=2, require_agreement=True) == 1
    assert read_report(output)["rows_without_cots"][0] == {
        "row": 1,
        "reason": "no pair of CoTs agrees with the label A; A minus B is -1.00 at the nearest",
    }
    assert run_collect(path, output, server, num_samples=2, require_agreement=True, tie_margin=1) == 0
    assert read_report(output)["rows_agreeing"] == 1
    assert len(server.requests) == 8  # selection asks for nothing anew


def test_damaged_video_and_refused_request_leave_their_rows(server, bare_csv, tmp_path, clips):
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(clips[0].read_bytes()[:600])
    rows = read_rows(bare_csv)
    rows[1]["videos"] = repr([str(clips[0]), str(damaged)])
    write_bare_csv(bare_csv, clips, labels=LABELS, videos=[row["videos"] for row in rows])
    server.answer = lambda request: (
        (400, {"error": {"message": "no such luck"}})
        if "number 2\n" in request["messages"][0]["content"][1]["text"]
        else (200, completion(random_cot(request)))
    )
    output = tmp_path / "out.csv"
    assert run_collect(bare_csv, output, server) == 0
    missing = {entry["row"]: entry["reason"] for entry in read_report(output)["rows_without_cots"]}
    assert list(missing) == [2, 3]
    assert "video B: video does not decode" in missing[2]
    assert missing[3] == "video A: status 400: no such luck; video B: status 400: no such luck"
    assert not any("number 1\n" in str(request) for request in server.requests)
    server.answer = lambda request: (200, completion(random_cot(request)))  # failures are tried again
    assert run_collect(bare_csv, output, server) == 0
    assert [entry["row"] for entry in read_report(output)["rows_without_cots"]] == [2]


def test_nothing_collected_is_an_error(server, bare_csv, tmp_path):
    server.answer = lambda _: (200, completion("half a character: \ud83d"))
    assert run_collect(bare_csv, tmp_path / "out.csv", server, num_samples=1) == 1
    assert len(read_rows(tmp_path / "out.csv")) == len(LABELS)


def test_cots_and_answers_that_are_there_stay(server, tmp_path, clips):
    path = write_pairs_csv(tmp_path / "pairs.csv", clips, labels=["A", "B", "A"])
    cells = {"CoT_A": ["mine", "", make_cot([2] * 5, 4)], "CoT_B": ["mine too", "half", make_cot([1] * 5, 3)]}
    answers = ["Video 1 is better", "", ""]
    write_bare_csv(path, clips, labels=["A", "B", "A"], **cells, answer=answers)
    output = tmp_path / "out.csv"
    assert run_collect(path, output, server, num_samples=6) == 0
    rows = read_rows(output)
    assert [(row["CoT_A"], row["CoT_B"]) for row in rows[::2]] == list(zip(*cells.values(), strict=True))[::2]
    assert rows[0]["answer"] == "Video 1 is better"
    assert parse_annotation(rows[2]["answer"]).scores["B"]["style"] == 1
    assert all(random_cot(request) != "half" for request in server.requests)
    assert len(server.requests) == 12
    again = tmp_path / "again.csv"
    assert run_collect(path, again, server, num_samples=6, replace_cots=True, replace_answers=True) == 0
    assert all(row["CoT_A"] not in cells["CoT_A"] for row in read_rows(again))
    assert all(row["answer"].startswith("<answer>{") for row in read_rows(again))


def test_annotators_scores_make_the_answer(server, tmp_path, clips):
    names = ("subject", "dynamics", "camera", "environment", "style")
    opinions = {f"MOS_{side}_{name}": ["4.2" if side == "A" else "1"] for side in "AB" for name in names}
    path = write_bare_csv(tmp_path / "pairs.csv", clips, labels=["A"], **opinions | {"MOS_B_style": [""]})
    assert run_collect(path, tmp_path / "out.csv", server) == 0
    annotation = parse_annotation(read_rows(tmp_path / "out.csv")[0]["answer"])
    assert annotation.scores == {"A": dict.fromkeys(names, 2), "B": dict.fromkeys(names, 0) | {"style": "N/A"}}
    assert read_report(tmp_path / "out.csv")["answers"] == {"label and MOS columns": 1}


def test_other_columns_come_out_as_they_went_in(server, tmp_path, clips):
    notes = ['a "quoted", note', "two\r\nlines", "a lone \r return", " spaces ", "007", "NA"]
    path = write_bare_csv(tmp_path / "pairs.csv", clips, labels=LABELS, **{"": "012345", "notes": notes})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"a lone \r return", b'"a lone \r return"'))
    assert run_collect(path, tmp_path / "out.csv", server, num_samples=1) == 0
    rows = read_rows(tmp_path / "out.csv")
    assert [row["notes"] for row in rows] == notes
    assert [row[""] for row in rows] == list("012345")
    assert len(read_pairs(tmp_path / "out.csv", CsvNeeds())) == len(LABELS)


def test_prompt_of_another_length_is_told_or_ends_the_run(server, bare_csv, tmp_path, capsys):
    server.answer = lambda request: (200, completion(random_cot(request), prompt_tokens=7))
    assert run_collect(bare_csv, tmp_path / "out.csv", server) == 0
    assert read_report(tmp_path / "out.csv")["samples_with_another_prompt"] == 48
    assert "another length" in capsys.readouterr().out
    assert run_collect(bare_csv, tmp_path / "exact.csv", server, send_video="frames") == 2
    assert "the server reads a prompt of 7 tokens" in capsys.readouterr().err
    server.answer = lambda _: (400, {"error": {"message": "Start the server with --trust-request-mm-kwargs"}})
    assert run_collect(bare_csv, tmp_path / "other.csv", server, send_video="frames") == 2
    assert "--trust-request-mm-kwargs. Or send another form" in capsys.readouterr().err


def test_files_are_sent_as_they_are_and_the_key_with_them(server, bare_csv, tmp_path, clips):
    key = tmp_path / "key"
    key.write_text("secret\n")
    options = {"send_video": "file", "num_samples": 1, "api_key_file": key, "temperature": 0, "seed": 3}
    assert run_collect(bare_csv, tmp_path / "out.csv", server, **options) == 0
    assert server.keys == {"Bearer secret"}
    sent = {base64.b64decode(of_side(request).partition(",")[2]) for request in server.requests}
    assert sent == {clip.read_bytes() for clip in clips}
    assert {(request["temperature"], request["max_tokens"]) for request in server.requests} == {(0.0, 512)}


def test_reasoning_that_the_server_takes_out_is_told(server, bare_csv, tmp_path, capsys):
    server.answer = lambda _: (200, completion("2", reasoning_content="I think"))
    assert run_collect(bare_csv, tmp_path / "out.csv", server) == 2
    assert "start it without a reasoning parser" in capsys.readouterr().err
