"""Video frames for the reward model: one function and one budget, whoever asks.

Decoding, frame sampling and the resize rule are those of qwen-vl-utils with decord. Its `fetch_video` is not called
as a whole: it answers a decoding error with another reader, whereas here a video either decodes with decord or fails
with its path and the reason.
"""

import dataclasses
import os
from dataclasses import dataclass

import decord
import torch
from qwen_vl_utils.vision_process import VIDEO_READER_BACKENDS, smart_resize
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv_functional

UNDECODABLE = (
    decord.DECORDError,
    RuntimeError,  # decord, where it cannot open a file
    AssertionError,  # decord, on a video without frames
    StopIteration,  # decord, where a frame is missing that the file announces
    IndexError,
    ArithmeticError,  # a frame rate of zero
    OSError,  # the file went away, or may not be read
)
"""What a damaged or vanishing file makes decord and its callers raise. Memory that runs out is not its fault."""


class VideoError(ValueError):
    """A video that cannot be used: missing, empty, undecodable or too short. The message names the file."""


@dataclass(frozen=True)
class VideoBudget:
    """How a clip becomes frames. Travels with the checkpoint in `reward_config.json`.

    Frames are taken uniformly at `fps` per second of the clip, an even number of them, at least `min_frames`. A frame
    has between `min_pixels` and `max_pixels` pixels, both sides multiples of patch size x merge size (32 for
    Qwen3-VL).

    Example: a clip of 126 frames at 24 per second is 5.25 s long; at fps 2 that is 10 frames.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int = 4 * 32 * 32
    max_pixels: int = 448 * 448

    def __post_init__(self) -> None:
        if self.fps <= 0:
            raise ValueError(f"video fps must be positive, not {self.fps}")
        if not 2 <= self.min_frames <= self.max_frames:
            raise ValueError(f"need 2 <= min_frames <= max_frames, not {self.min_frames} and {self.max_frames}")
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(f"need 0 < min_pixels <= max_pixels, not {self.min_pixels} and {self.max_pixels}")

    def replace(self, **changes: float | None) -> "VideoBudget":
        """A copy with the given fields changed; None leaves a field as it is."""
        return dataclasses.replace(self, **{name: value for name, value in changes.items() if value is not None})


@dataclass(frozen=True)
class VideoFrames:
    """Sampled and resized frames of one clip.

    `frames`: uint8 [num_frames, 3, height, width]. `source_fps`: frames per second of the file. `frame_indices`: which
    of the file's `total_frames` frames were taken, so that timestamps are index / source_fps seconds.
    """

    frames: torch.Tensor
    source_fps: float
    frame_indices: tuple[int, ...]
    total_frames: int

    @property
    def duration(self) -> float:
        """Length of the whole clip in seconds."""
        return self.total_frames / self.source_fps

    @property
    def metadata(self) -> dict:
        """What the Qwen3-VL processor and vLLM need to write the same timestamps."""
        return {
            "fps": self.source_fps,
            "frames_indices": list(self.frame_indices),
            "total_num_frames": self.total_frames,
            "video_backend": "decord",
            "height": self.frames.shape[-2],
            "width": self.frames.shape[-1],
        }


@dataclass(frozen=True)
class VideoHeader:
    """What a clip's container and first frame tell: size in pixels, number of frames, frames per second."""

    width: int
    height: int
    total_frames: int
    fps: float

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return self.total_frames / self.fps


def probe_video(path: str | os.PathLike, *, min_frames: int = VideoBudget.min_frames) -> VideoHeader:
    """Open a clip and decode its first frame only. Raises VideoError as `load_video` does, far cheaper."""
    path = _existing_file(path)
    try:
        reader = decord.VideoReader(path, num_threads=1)
        height, width, _ = reader[0].shape
        header = VideoHeader(width=width, height=height, total_frames=len(reader), fps=float(reader.get_avg_fps()))
    except UNDECODABLE as error:
        raise VideoError(_undecodable(path, error)) from error
    _require_frames(path, header.total_frames, min_frames)
    return header


def load_video(path: str | os.PathLike, budget: VideoBudget, *, size_factor: int = 32) -> VideoFrames:
    """Decode, sample and resize one clip.

    `size_factor`: both sides of the result are multiples of it (patch size x merge size).
    Raises VideoError naming the file when it is missing, empty, undecodable or shorter than `budget.min_frames`
    frames.
    """
    path = _existing_file(path)
    request = {
        "video": path,
        "fps": budget.fps,
        "min_frames": budget.min_frames,
        "max_frames": budget.max_frames,
    }
    try:
        video, metadata, _ = VIDEO_READER_BACKENDS["decord"](request)
    except ValueError as error:  # fewer than two frames
        raise VideoError(f"video is too short: {path}: {error}") from error
    except UNDECODABLE as error:
        raise VideoError(_undecodable(path, error)) from error
    _require_frames(path, int(metadata["total_num_frames"]), budget.min_frames)
    try:
        frames = resize_frames(video, budget, size_factor=size_factor)
    except ValueError as error:  # far longer than high, or the other way round
        raise VideoError(f"video has a size that the model cannot take: {path}: {error}") from error
    return VideoFrames(
        frames=frames,
        source_fps=float(metadata["fps"]),
        frame_indices=tuple(int(index) for index in metadata["frames_indices"]),
        total_frames=int(metadata["total_num_frames"]),
    )


def resize_frames(frames: torch.Tensor, budget: VideoBudget, *, size_factor: int = 32) -> torch.Tensor:
    """Bicubic, antialiased resize of uint8 [num_frames, 3, height, width] into the pixel budget; stays uint8."""
    height, width = budgeted_size(frames.shape[-2], frames.shape[-1], budget, size_factor=size_factor)
    return tv_functional.resize(frames, [height, width], interpolation=InterpolationMode.BICUBIC, antialias=True)


def budgeted_size(height: int, width: int, budget: VideoBudget, *, size_factor: int = 32) -> tuple[int, int]:
    """Height and width in pixels that a frame of the given size has after `resize_frames`."""
    return smart_resize(height, width, size_factor, min_pixels=budget.min_pixels, max_pixels=budget.max_pixels)


def num_sampled_frames(header: VideoHeader, budget: VideoBudget) -> int:
    """How many frames `load_video` takes from a clip with this header (an even number)."""
    wanted = max(header.duration * budget.fps, budget.min_frames)
    return int(min(wanted, budget.max_frames, header.total_frames)) // 2 * 2


def _existing_file(path: str | os.PathLike) -> str:
    path = os.fspath(path)
    try:
        size = os.path.getsize(path) if os.path.isfile(path) else None
    except OSError:  # it went away between the two questions
        size = None
    if size is None:
        raise VideoError(f"video not found: {path}")
    if size == 0:
        raise VideoError(f"video is empty (0 bytes): {path}")
    return path


def _require_frames(path: str, total_frames: int, min_frames: int) -> None:
    if total_frames < min_frames:
        raise VideoError(f"video has {total_frames} frames, at least {min_frames} are needed: {path}")


def _undecodable(path: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return f"video does not decode (truncated or damaged?): {path}: {reason}"
