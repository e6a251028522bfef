"""Damaged and hostile videos: each is an error of its own that names the file, and the process lives on."""

import os
import struct
import subprocess
import sys

import av
import numpy as np
import pytest
import torch
from qwen_vl_utils.vision_process import VIDEO_READER_BACKENDS

import vision_process
from descore import decoder
from stage1_support import REAL_VIDEOS, STAGE_DIR
from vision_process import VideoBudget, VideoError, load_video, probe_video, probe_videos, resize_frames

IDENTITY = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
QUARTER_TURN = struct.pack(">9i", 0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)
BUDGET = VideoBudget(max_pixels=64 * 96)


@pytest.fixture
def write(tmp_path):
    """Writes a video of any content: `write(name, content)` returns its path."""

    def make(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return make


def test_a_video_that_ends_its_decoder_fails_alone(write, clips):
    content = clips[0].read_bytes()
    start = content.index(b"stts") + 12  # the number of samples in the table of decoding times
    bomb = write("bomb.mp4", content[:start] + struct.pack(">I", 1 << 28) + content[start + 4 :])
    with pytest.raises(VideoError, match=r"ends its decoder \(status -6; .*bomb\.mp4"):
        load_video(bomb, BUDGET)
    assert load_video(clips[1], BUDGET) is not None


def test_what_fails_to_load_fails_the_check(write, clips):
    content = clips[0].read_bytes()
    videos = {"cut.mp4": content[: len(content) // 2], "empty.mp4": b"", "text.mp4": b"this is not a video"}
    paths = [*(write(name, content) for name, content in videos.items()), "/gone.mp4"]
    found = probe_videos([*paths, str(clips[0])], BUDGET)
    assert found[str(clips[0])] == probe_video(clips[0])
    reasons = ("does not decode", "0 bytes", "does not decode", "not found")
    for path, reason in zip(paths, reasons, strict=True):
        with pytest.raises(VideoError, match=f"{reason}.*{os.path.basename(path)}"):
            load_video(path, BUDGET)
        assert isinstance(found[path], VideoError)


def test_a_turned_clip_passes_the_check_only_if_it_loads(write, clips, tmp_path):
    """decord takes some turned frames, such as those of 96 x 48, for others of another size."""
    with av.open(tmp_path / "wide.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 48, "yuv420p"
        for _ in range(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 96, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    turned = []
    for clip in (clips[0], tmp_path / "wide.mp4"):
        content = clip.read_bytes()
        start = content.index(IDENTITY, content.index(b"tkhd"))
        turned.append(write(f"turned_{clip.name}", content[:start] + QUARTER_TURN + content[start + len(IDENTITY) :]))
    found = probe_videos(turned, BUDGET)
    upright, header = probe_video(clips[0]), found[turned[0]]
    assert (header.width, header.height) == (upright.height, upright.width)
    assert load_video(turned[0], BUDGET).total_frames == header.total_frames
    assert isinstance(found[turned[1]], VideoError)
    with pytest.raises(VideoError, match=r"does not decode.*turned_wide\.mp4"):
        load_video(turned[1], BUDGET)


def test_frames_over_the_limit_are_refused(clips, monkeypatch):
    monkeypatch.setattr(decoder, "MAX_FRAME_PIXELS", 1000)
    with pytest.raises(VideoError, match=rf"frames of \d+ x \d+ pixels are over 1000 pixels.*{clips[0].name}"):
        probe_video(clips[0])


def test_a_file_that_gives_other_frames_each_time_is_refused(write, clips):
    content = clips[0].read_bytes()
    path = write("changing.mp4", content)
    load_video(path, BUDGET)
    stat, start = os.stat(path), content.index(b"mdat") - 4
    byte = start + struct.unpack(">I", content[start : start + 4])[0] - 12  # in the last frame
    write("changing.mp4", content[:byte] + bytes([content[byte] ^ 0x55]) + content[byte + 1 :])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # looks like the same file
    with pytest.raises(VideoError, match=r"gives other frames each time it is decoded.*changing\.mp4"):
        load_video(path, BUDGET)


def test_a_file_that_is_removed_meanwhile_is_that_videos_fault(write, clips, monkeypatch):
    path = write("removed.mp4", clips[0].read_bytes())

    def remove_and_resize(*args, **kwargs):
        os.remove(path)
        return resize_frames(*args, **kwargs)

    monkeypatch.setattr(vision_process, "resize_frames", remove_and_resize)
    with pytest.raises(VideoError, match=r"removed while it was decoded.*removed\.mp4"):
        load_video(path, BUDGET)


def test_ctrl_c_leaves_decoding_to_whoever_asked_for_it(clips):
    """A server that is stopped still answers what it has accepted."""
    program = """
import os, signal, sys
from vision_process import VideoBudget, load_video

load_video(sys.argv[1], VideoBudget())
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.killpg(0, signal.SIGINT)
load_video(sys.argv[2], VideoBudget())
"""
    command = [sys.executable, "-c", program, str(clips[0]), str(clips[1])]
    subprocess.run(command, cwd=STAGE_DIR, check=True, start_new_session=True, timeout=120)


@pytest.mark.skipif(not REAL_VIDEOS.is_dir(), reason="real videos are not beside this checkout")
def test_frames_are_those_of_qwen_vl_utils():
    for path in sorted(REAL_VIDEOS.glob("*.mp4")):
        budget = VideoBudget()
        request = {"video": str(path), "fps": budget.fps, "min_frames": 4, "max_frames": budget.max_frames}
        frames, metadata, _ = VIDEO_READER_BACKENDS["decord"](request)
        loaded = load_video(path, budget)
        assert list(loaded.frame_indices) == metadata["frames_indices"]
        assert loaded.source_fps == metadata["fps"]
        assert torch.equal(loaded.frames, resize_frames(frames, budget))


def test_checks_are_remembered_until_the_file_changes(write, clips):
    path = write("clip.mp4", clips[0].read_bytes())
    header = probe_videos([path], BUDGET)[path]
    stat = os.stat(path)
    write("clip.mp4", bytes(stat.st_size))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert probe_videos([path], BUDGET)[path] == header  # the file was not opened again
    os.utime(path)
    for _ in range(2):  # faults are not remembered
        assert isinstance(probe_videos([path], BUDGET)[path], VideoError)
