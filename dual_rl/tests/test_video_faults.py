"""Whatever a damaged file makes the decoder do, it is that video's failure; in both stages."""

from collections.abc import Callable

import decord
import pytest

import vision_process as stage1_vision
from serving_support import CLIPS, announce_frames
from verl.data import vision_process as stage2_vision
from verl.data.decoded_size import check_decoded_size

STAGES = pytest.mark.parametrize("vision", [stage1_vision, stage2_vision], ids=["stage1", "stage2"])


@pytest.fixture
def announcing(tmp_path) -> Callable[[int], str]:
    """Writes a clip that announces so many frames."""

    def write(num_frames: int) -> str:
        (tmp_path / "announcing.mp4").write_bytes(announce_frames(num_frames))
        return str(tmp_path / "announcing.mp4")

    return write


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


def test_size_is_read_off_the_container():
    pixels = 16 * 104 * 112  # frames of the clip, its height and width
    check_decoded_size(str(CLIPS[0]), pixels / 1e9)
    message = rf"too large to decode: .*{CLIPS[0].name}: 16 frames or more of 112 x 104 pixels"
    with pytest.raises(stage2_vision.VideoError, match=message):
        check_decoded_size(str(CLIPS[0]), (pixels - 1) / 1e9)


def test_header_that_announces_too_much_is_believed(announcing):
    with pytest.raises(stage2_vision.VideoError, match=r"2000000000 frames or more .* 4 gigapixels are the limit"):
        check_decoded_size(announcing(2_000_000_000), 4.0)


def test_header_that_announces_too_little_is_not(announcing):
    with pytest.raises(stage2_vision.VideoError, match="2 frames or more"):
        check_decoded_size(announcing(1), 1.5 * 104 * 112 / 1e9)


@pytest.mark.parametrize("content", [b"", b"no video", CLIPS[0].read_bytes()[:400]], ids=["empty", "text", "cut"])
def test_files_that_do_not_open_are_named(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(stage2_vision.VideoError, match=r"does not decode .*a\.mp4"):
        check_decoded_size(str(path), 4.0)
    with pytest.raises(stage2_vision.VideoError, match=r"does not decode .*b\.mp4"):
        check_decoded_size(str(tmp_path / "b.mp4"), 4.0)
