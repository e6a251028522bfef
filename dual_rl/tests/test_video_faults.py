"""Whatever a damaged file makes the decoder do, it is that video's failure; in both stages."""

import decord
import pytest

import vision_process as stage1_vision
from serving_support import CLIPS
from verl.data import vision_process as stage2_vision

STAGES = pytest.mark.parametrize("vision", [stage1_vision, stage2_vision], ids=["stage1", "stage2"])


@STAGES
@pytest.mark.parametrize(
    "error",
    [
        decord.DECORDError("broken packet"),
        RuntimeError("Error reading"),
        AssertionError("Invalid frame count: 0"),
        StopIteration(),
        IndexError("out of bound"),
        ZeroDivisionError("float division by zero"),
        FileNotFoundError("gone"),
        PermissionError("not yours"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_error_of_decoding_names_the_video(vision, error, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setitem(vision.VIDEO_READER_BACKENDS, "decord", fail)
    monkeypatch.setattr(vision.decord, "VideoReader", fail)
    for open_video in (vision.probe_video, lambda path: vision.load_video(path, vision.VideoBudget())):
        with pytest.raises(vision.VideoError, match=CLIPS[0].name) as raised:
            open_video(CLIPS[0])
        assert str(error) in str(raised.value)


@STAGES
def test_memory_that_runs_out_is_no_fault_of_the_video(vision, monkeypatch):
    def fail(_: object) -> None:
        raise MemoryError

    monkeypatch.setitem(vision.VIDEO_READER_BACKENDS, "decord", fail)
    with pytest.raises(MemoryError):
        vision.load_video(CLIPS[0], vision.VideoBudget())


@STAGES
def test_video_that_vanishes_or_has_an_impossible_shape_is_named(vision, monkeypatch):
    clip = CLIPS[0]
    with monkeypatch.context() as patched:
        patched.setattr("os.path.getsize", lambda path: (_ for _ in ()).throw(FileNotFoundError(path)))
        with pytest.raises(vision.VideoError, match="video not found"):
            vision.probe_video(clip)
    monkeypatch.setattr(vision, "smart_resize", lambda *_, **__: (_ for _ in ()).throw(ValueError("aspect ratio 255")))
    with pytest.raises(vision.VideoError, match=rf"cannot take: .*{clip.name}: aspect ratio 255"):
        vision.load_video(clip, vision.VideoBudget())
