"""The protocols of trainers of video generators, each on a route of its own beside ours.

    POST /flow_grpo   Flow-GRPO's remote rewards (flow_grpo/rewards.py, reward-server): a pickled {"images", "prompts"}
                      answered by a pickled {"outputs": rewards}. An image is JPEG bytes there; a video is a list of
                      those here, or an array of frames.
    POST /score       UniRL's RewardService, protocol version 1 (unirl-reward-service/reward_service/schemas.py): JSON
                      with a base64 file per video, answered by {"results", "errors", "identities"}

Flow-GRPO's answer has no place for the error of one video: it is refused as a whole, with the reason.
"""

import base64
import io
import math
import pickle
import pickletools
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ValidationError, model_validator

from serving.requests import RETRY_LATER, AllowedRoots, ServerLimits, Video, describe_invalid, refuse
from verl.data.vision_process import VideoError, VideoFrames

REWARD_NAME = "descore"
DEFAULT_FPS = 16.0
"""Of frames that come without a rate: Wan 2.1's."""
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
MAX_CLIP_PIXELS = 1 << 29
"""Of all frames of a clip that comes as images: 250 of 1080p, in 1.5 GiB."""
MAX_OPCODES = 1 << 20
"""Of a pickle, each takes about a microsecond to look at; a frame is two or three."""

NOT_A_REQUEST = (
    pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError, OverflowError,
    RecursionError, MemoryError,
)  # fmt: skip
"""What reading a pickle of something else raises."""

FrameSampler = Callable[..., VideoFrames]
"""`sample_frames` for the model: of all frames, uint8 [num_frames, height, width, 3], and `fps`."""


class _ArrayType:
    """Stands for numpy.ndarray, which a pickle could call for any amount of memory."""


def _empty_array(kind: type, shape: tuple[int, ...], typecode: bytes) -> np.ndarray:
    """As numpy's pickles begin an array; the data follows."""
    if kind is not _ArrayType or shape != (0,):
        raise pickle.UnpicklingError("it holds an array that numpy does not write so")
    return np.ndarray(shape, np.int8)


def _scalar(kind: np.dtype, data: bytes) -> np.generic:
    """A number or text. numpy's own would allocate any amount of memory where there are no data."""
    if kind.kind not in "biufU":
        raise pickle.UnpicklingError(f"it holds a scalar of type {kind}")
    return np._core.multiarray.scalar(kind, data)


_PICKLED = {("numpy", "ndarray"): _ArrayType, ("numpy", "dtype"): np.dtype}
for _core in ("numpy.core", "numpy._core"):  # numpy 1, numpy 2
    _PICKLED[f"{_core}.multiarray", "_reconstruct"] = _empty_array
    _PICKLED[f"{_core}.multiarray", "scalar"] = _scalar
    _PICKLED[f"{_core}.numeric", "_frombuffer"] = np._core.numeric._frombuffer


class PlainUnpickler(pickle.Unpickler):
    """Reads numpy arrays in plain containers; anything else, which could run code, is an UnpicklingError."""

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle may name."""
        if (module, name) not in _PICKLED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}. Send numpy arrays, bytes, text and numbers only")
        return _PICKLED[module, name]


def _unpickle(body: bytes) -> Any:
    """What is pickled in `body`. Raises UnpicklingError or ValueError for more memory than its bytes account for."""
    for number, (opcode, argument, _) in enumerate(pickletools.genops(body)):  # it finds false lengths itself
        has_long_memo = "PUT" in opcode.name and argument > number  # which is as long as its last index
        if number > MAX_OPCODES or has_long_memo:
            raise pickle.UnpicklingError("it is not written as pickle.dumps does")
    return PlainUnpickler(io.BytesIO(body)).load()


def read_flow_grpo(body: bytes, limits: ServerLimits, sample: FrameSampler) -> tuple[list[Video], list[str]]:
    """Sampled videos and prompts of a pickled request. Raises HTTPException for anything else.

    `images` or `videos`: each a list of encoded frames, or an array [num_frames, height, width, 3] or [num_frames, 3,
    height, width], uint8 or floating point in [0, 1]. `prompts`: text. Optional `fps`: frames per second, one for all
    or one each. Other keys are ignored.
    """
    try:
        asked = _unpickle(body)
        clips = _read_list(asked["videos"] if "videos" in asked else asked["images"], limits)
        prompts = _read_list(asked["prompts"], limits)
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("prompts are not text")
        limits.check(len(clips), prompts)
        fps = asked.get("fps", DEFAULT_FPS)
        rates = [fps] * len(clips) if isinstance(fps, int | float | np.number) else _read_list(fps, limits)
        names = [f"videos[{index}]" for index in range(len(clips))]
        clips = list(zip(names, clips, map(float, rates), strict=True))
    except NOT_A_REQUEST as error:
        raise refuse(422, f"the body is not a pickled dict of images and prompts: {error}") from error
    return [Video(_sample(*clip, sample), clip[0]) for clip in clips], prompts


def _read_list(values: Any, limits: ServerLimits) -> list:
    """The values, at most as many as videos in a request. Arrays without data can be of any length."""
    if len(values) > limits.max_videos:
        raise ValueError(f"{len(values)} videos, prompts or rates. Send at most {limits.max_videos}")
    return list(values)


def _sample(name: str, clip: Any, fps: float, sample: FrameSampler) -> VideoFrames:
    try:
        if not 0 < fps < math.inf:
            raise ValueError(f"fps is {fps}. Give the frames per second")
        return sample(_to_frames(clip), fps=fps)
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError, VideoError) as error:
        raise refuse(422, f"{name}: {error}") from error  # SyntaxError and struct.error: PIL's, of damaged files


def _to_frames(clip: Any) -> np.ndarray:
    """uint8 [num_frames, height, width, 3]. Raises ValueError, and what PIL raises."""
    if isinstance(clip, list | tuple) and clip and all(isinstance(frame, bytes) for frame in clip):
        images = [Image.open(io.BytesIO(frame), formats=IMAGE_FORMATS) for frame in clip]  # no pixels are read yet
        if sum(image.width * image.height for image in images) > MAX_CLIP_PIXELS:
            raise ValueError(f"its frames have over {MAX_CLIP_PIXELS} pixels. Send fewer or smaller ones")
        clip = np.stack([np.asarray(image.convert("RGB")) for image in images])
    if not isinstance(clip, np.ndarray) or clip.ndim != 4 or clip.dtype.kind not in "uf":
        raise ValueError("it is not a video. Send an array of frames, or a list of JPEG or PNG bytes")
    if clip.shape[-1] != 3:
        clip = clip.transpose(0, 2, 3, 1)
    if clip.dtype.kind == "f":
        if not (clip.size and clip.min() >= 0 and clip.max() <= 1):
            raise ValueError("its values are not all in [0, 1]. Scale them, or send uint8")
        clip = np.rint(255 * clip.astype(np.float32)).astype(np.uint8)
    return np.ascontiguousarray(clip)


def write_flow_grpo(results: Sequence[dict[str, Any]]) -> bytes:
    """Rewards in order. Raises HTTPException if a video has none."""
    if errors := [result["error"] for result in results if "error" in result]:
        raise refuse(422, "videos could not be scored: " + "; ".join(errors))
    return pickle.dumps({"outputs": [result["reward"] for result in results]})


class _Turn(BaseModel):
    text: str
    video_b64: str | None = None
    video_path: str | None = None

    @model_validator(mode="after")
    def has_a_video(self) -> "_Turn":
        """Exactly one."""
        if (self.video_b64 is None) == (self.video_path is None):
            raise ValueError("give video_b64 or video_path; images are not scored")
        return self


class _Request(BaseModel):
    """Keys that are not here, of metadata and differentiable scoring, are ignored, as in UniRL's own service."""

    history: list[_Turn]
    required_rewards: list[Literal["descore"]]
    request_id: str | None = None
    sample_id: str | None = None
    group_id: str | None = None
    source_rank: int | None = None
    policy_version: int | None = None
    scorer_version: None = None
    idempotency_key: str | None = None


class _UnirlBody(BaseModel):
    protocol_version: Literal["1"] = "1"
    grad_mode: Literal[False] = False
    requests: list[_Request]


class UnirlRequest:
    """A request to UniRL's `/score`. `videos`: files in `folder` or below a root, or errors; the last turn's count."""

    def __init__(self, body: bytes, limits: ServerLimits, roots: AllowedRoots, folder: Path) -> None:
        """Raises HTTPException for anything else than protocol version 1."""
        try:
            self._asked = _UnirlBody.model_validate_json(body).requests
            turns = [request.history[-1] for request in self._asked]
        except ValidationError as error:
            raise refuse(422, f"the body is not a request to score: {describe_invalid(error)}") from error
        except IndexError as error:
            raise refuse(422, "the body is not a request to score: history is empty. Give one turn") from error
        self.prompts = [turn.text for turn in turns]
        limits.check(len(turns), self.prompts)
        self.videos = [self._find(turn, index, roots, folder) for index, turn in enumerate(turns)]

    @staticmethod
    def _find(turn: _Turn, index: int, roots: AllowedRoots, folder: Path) -> Video | str:
        if turn.video_path is not None:
            return roots.find(turn.video_path) or f"no file below the server's --roots: {turn.video_path}"
        path, content = folder / f"video_{index}", turn.video_b64
        turn.video_b64 = None  # nothing of the body is kept while the video waits
        try:
            path.write_bytes(base64.b64decode(content, validate=True))
        except ValueError as error:
            return f"requests[{index}]: video_b64 is not base64: {error}"
        except OSError as error:
            raise refuse(503, f"the video cannot be kept: {error.strerror}", retry_after=RETRY_LATER) from error
        return Video(str(path), f"requests[{index}]")

    def write(self, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The answer; a reward is absent where there is an error."""
        identity = set(_Request.model_fields) - {"history", "required_rewards"}
        return {
            "results": [{} if "error" in one else {REWARD_NAME: {REWARD_NAME: one["reward"]}} for one in results],
            "errors": [{REWARD_NAME: one["error"]} if "error" in one else {} for one in results],
            "identities": [request.model_dump(include=identity) for request in self._asked],
            "protocol_version": "1",
        }
