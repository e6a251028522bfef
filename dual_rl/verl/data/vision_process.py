"""Video frames for the reward model: one function and one budget for training, rollout and scoring.

Frame sampling and the resize rule are those of qwen-vl-utils with decord. Its `fetch_video` is not used: it retries a
decoding error with another reader, whereas here a video either decodes, in a process of its own, or fails with its
path and the reason.
"""

import dataclasses
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from qwen_vl_utils.vision_process import smart_resize
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv_functional

from descore.checked import check_all, digest, num_check_threads
from descore.decoder import VideoError, VideoHeader, existing_file, open_video


@dataclass(frozen=True)
class VideoBudget:
    """How a clip becomes frames. Travels with the checkpoint in `reward_config.json`.

    Frames are taken uniformly at `fps` per second of the clip, an even number of them, at least `min_frames`; sides
    are multiples of patch size x merge size (32). Example: of 126 frames at 24 per second (5.25 s) fps 2 takes 10.
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


def probe_video(path: str | os.PathLike, *, min_frames: int = VideoBudget.min_frames) -> VideoHeader:
    """Open a clip and decode its first frame only: the checks of `load_video`, much cheaper. Raises VideoError."""
    with open_video(path) as video:
        _require_frames(video.path, video.header.total_frames, min_frames)
        return video.header


def probe_videos(
    paths: Iterable[str], budget: VideoBudget, *, should_decode: bool = False, is_quiet: bool = False
) -> dict[str, VideoHeader | VideoError]:
    """The header of each distinct video, or its error; headers are remembered by file size and modification time.

    `should_decode`: decode all sampled frames, twice, since some damaged videos give different frames each time.
    """

    def check(path: str) -> tuple:
        header = probe_video(path, min_frames=budget.min_frames)
        for _ in range(2 * should_decode):
            load_video(path, budget)
        return dataclasses.astuple(header)

    def key(path: str) -> str:
        stat = os.stat(existing_file(path))
        settings = (budget.min_frames, budget if should_decode else None)
        return digest("video", path, stat.st_size, stat.st_mtime_ns, *settings)

    found = check_all(paths, check, key=key, description="videos", num_threads=num_check_threads(), is_quiet=is_quiet)
    return {path: value if isinstance(value, VideoError) else VideoHeader(*value) for path, value in found.items()}


def load_video(path: str | os.PathLike, budget: VideoBudget, *, size_factor: int = 32) -> VideoFrames:
    """Decode, sample and resize one clip.

    `size_factor`: both sides of the result are multiples of it (patch size x merge size).
    Raises VideoError naming the file when it is missing, empty, undecodable, too large, shorter than
    `budget.min_frames` frames, or gives different frames from when this process loaded it before.
    """
    with open_video(path) as video:
        header = video.header
        _require_frames(video.path, header.total_frames, budget.min_frames)
        indices = sampled_indices(header, budget)
        try:
            blocks = [
                resize_frames(torch.from_numpy(block).permute(0, 3, 1, 2), budget, size_factor=size_factor)
                for block in video.read(indices)
            ]
        except VideoError:
            raise
        except ValueError as error:  # an extreme aspect ratio
            raise VideoError(f"video has a size that the model cannot take: {video.path}: {error}") from error
    loaded = VideoFrames(torch.cat(blocks), header.fps, indices, header.total_frames)
    _require_same_as_before(video.path, loaded)
    return loaded


def sample_frames(
    frames: np.ndarray | torch.Tensor, *, fps: float, budget: VideoBudget, size_factor: int = 32
) -> VideoFrames:
    """`load_video` for a clip in memory: all its frames, `fps` of them per second.

    `frames`: uint8, an array [num_frames, height, width, 3] or a tensor [num_frames, 3, height, width]. Raises
    VideoError for another dtype or shape, or too few frames.
    """
    clip = (
        torch.from_numpy(frames).permute(0, 3, 1, 2) if isinstance(frames, np.ndarray) and frames.ndim == 4 else frames
    )
    if not isinstance(clip, torch.Tensor) or clip.ndim != 4 or clip.shape[1] != 3 or clip.dtype != torch.uint8:
        raise VideoError(
            f"frames of shape {tuple(frames.shape)} and {frames.dtype}: give a uint8 array [frames, height, width, 3] "
            "or a uint8 tensor [frames, 3, height, width]"
        )
    total, _, height, width = clip.shape
    header = VideoHeader(width=width, height=height, total_frames=total, fps=fps)
    _require_frames("the clip in memory", total, budget.min_frames)
    indices = sampled_indices(header, budget)
    return VideoFrames(resize_frames(clip[list(indices)], budget, size_factor=size_factor), fps, indices, total)


def resize_frames(frames: torch.Tensor, budget: VideoBudget, *, size_factor: int = 32) -> torch.Tensor:
    """Bicubic, antialiased resize of uint8 [num_frames, 3, height, width] into the pixel budget; stays uint8."""
    height, width = budgeted_size(frames.shape[-2], frames.shape[-1], budget, size_factor=size_factor)
    return tv_functional.resize(frames, [height, width], interpolation=InterpolationMode.BICUBIC, antialias=True)


def budgeted_size(height: int, width: int, budget: VideoBudget, *, size_factor: int = 32) -> tuple[int, int]:
    """Height and width in pixels of a frame of the given size after `resize_frames`."""
    return smart_resize(height, width, size_factor, min_pixels=budget.min_pixels, max_pixels=budget.max_pixels)


def sampled_indices(header: VideoHeader, budget: VideoBudget) -> tuple[int, ...]:
    """Which frames `load_video` takes from a clip with this header: an even number, evenly spread."""
    wanted = max(header.duration * budget.fps, budget.min_frames)
    num_frames = int(min(wanted, budget.max_frames, header.total_frames)) // 2 * 2
    return tuple(torch.linspace(0, header.total_frames - 1, num_frames).round().long().tolist())


_checksums: dict[int, int] = {}


def _require_same_as_before(path: str, loaded: VideoFrames) -> None:
    """Catches damaged files that decode to different frames each time, from uninitialised memory."""
    try:
        stat = os.stat(path)
    except FileNotFoundError as error:
        raise VideoError(f"video was removed while it was decoded: {path}") from error
    key = (path, stat.st_size, stat.st_mtime_ns, loaded.frame_indices, loaded.frames.shape)
    checksum = zlib.crc32(np.ascontiguousarray(loaded.frames))
    if _checksums.setdefault(hash(key), checksum) != checksum:
        raise VideoError(f"video gives other frames each time it is decoded (damaged?); encode it again: {path}")


def _require_frames(path: str, total_frames: int, min_frames: int) -> None:
    if total_frames < min_frames:
        raise VideoError(f"video has {total_frames} frames, at least {min_frames} are needed: {path}")
