"""Training data of the tiny base: clips rendered once, paired anew with requests and texts for every batch.

A clip is encoded as H.264, read back by `vision_process.load_video` and preprocessed by the checkpoint's own
processor, so that training sees what every later user sees. Requests are the clip's scene with attributes changed at
random, so that what the prompt asks for says little about what the clip shows and the model has to look.

`batch_source.py` calls all this from worker processes; the pool of clips lies on the training device.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from build_tiny import TINY_BUDGET
from scored_sequence import VIDEO_PLACEHOLDER, judge_problem
from toy_world.judge import misperceive, write_cot
from toy_world.render import encode_clip, sample_nuisance
from toy_world.scene import (
    ATTRIBUTES,
    COLORS,
    DIMENSIONS,
    MOTIONS,
    SHAPES,
    Request,
    Scene,
    is_held_out,
    motion_phrase,
    sample_clip_scene,
    sample_request,
    write_prompt,
)
from vision_process import load_video

Grid = tuple[int, int, int]

# What a token of the text is, for its weight in the loss and for the metrics.
NO_LABEL, PLAIN, DECISION, FIRST_ATTRIBUTE = 0, 1, 2, 3
ATTRIBUTE_KINDS = {name: FIRST_ATTRIBUTE + index for index, name in enumerate(ATTRIBUTES)}
DIMENSION_ATTRIBUTES = {
    "subject": ("color", "shape"),
    "dynamics": ("motion",),
    "camera": ("camera",),
    "environment": ("place", "light"),
    "style": ("style",),
}
_ANY_SCENE = Scene("circle", "red", "still", "still", "city", "day", "flat")
BALANCING_ROUNDS = 3
CHANGE_RATES = (0.1, 0.7)  # range of the probability that an attribute of the request differs from the clip's
VIDEO_BLOCK = "<|vision_start|><|video_pad|><|vision_end|>"
USER_START, USER_END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
SCORE_CHARACTERS = "0123456789N."
LENGTH_MULTIPLE = 16


@dataclass(frozen=True)
class ToyClip:
    """A preprocessed clip that shows `scene`, made for `request` (None: to be paired with any).

    `patches`: uint8 [t * h * w, patch_dim]; `prefix_ids`: int16, the user turn up to the end of the video.
    """

    scene: Scene
    request: Request | None
    patches: np.ndarray
    grid_thw: Grid
    prefix_ids: np.ndarray


@dataclass(frozen=True)
class TextBatch:
    """Sequences `prefix, prompt, CoT, EOS`, padded on the right.

    `input_ids`: int64 [B, L]. `rows`, `columns`: int64 [N], the places of the N labelled tokens. `kinds`: int64 [N].
    """

    input_ids: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    kinds: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """A TextBatch with its clips: `pixel_values` float32 [B * t * h * w, patch_dim], all of the grid `grid_thw`."""

    text: TextBatch
    pixel_values: torch.Tensor
    grid_thw: Grid


def balance_triples() -> np.ndarray:
    """Probabilities of (color, shape, motion), float [6, 6, 7]: 0 for held-out triples, pairs about equally frequent.

    Without this a color would go with some shapes far more rarely than with others, because their triples are held
    out, and the model would learn that as a fact about the world. A few rounds of iterative proportional fitting: more
    would bring the pairs closer still, but leave some triples next to nothing.
    """
    axes = (COLORS, SHAPES, MOTIONS)
    table = np.ones([len(axis) for axis in axes])
    for index in np.ndindex(table.shape):
        color, shape, motion = (axis[i] for axis, i in zip(axes, index, strict=True))
        table[index] = not is_held_out(replace(_ANY_SCENE, color=color, shape=shape, motion=motion))
    for _ in range(BALANCING_ROUNDS):
        for axis in range(table.ndim):
            pairs = table.sum(axis=axis, keepdims=True)
            table /= pairs * pairs.size
    return table / table.sum()


def draw_scene(rng: np.random.Generator, triples: np.ndarray) -> Scene:
    """A scene for a training clip; `triples` as `balance_triples` gives them."""
    color, shape, motion = np.unravel_index(rng.choice(triples.size, p=triples.ravel()), triples.shape)
    scene = sample_request(rng, held_out=False).scene
    return replace(scene, color=COLORS[color], shape=SHAPES[shape], motion=MOTIONS[motion])


def make_clips(processor, *, seed: int, count: int, held_out: bool) -> list[ToyClip]:
    """Render, encode, decode and preprocess `count` clips; held-out ones belong to a request."""
    rng = np.random.default_rng(seed)
    triples = balance_triples()
    clips = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        for _ in range(count):
            request = sample_request(rng, held_out=True) if held_out else None
            scene = sample_clip_scene(request, rng, held_out=True) if held_out else draw_scene(rng, triples)
            encode_clip(path, scene, sample_nuisance(rng))
            video = load_video(path, TINY_BUDGET)
            inputs = processor(
                text=[USER_START + VIDEO_BLOCK],
                videos=[video.frames],
                video_metadata=[video.metadata],
                do_resize=False,
                do_sample_frames=False,
                return_tensors="pt",
            )
            pixels = inputs["pixel_values_videos"]  # (value / 255 - 0.5) / 0.5
            clips.append(
                ToyClip(
                    scene=scene,
                    request=request,
                    patches=((pixels + 1) * 127.5).round().to(torch.uint8).numpy(),
                    grid_thw=tuple(inputs["video_grid_thw"][0].tolist()),
                    prefix_ids=inputs["input_ids"][0].numpy().astype(np.int16),
                )
            )
    return clips


def draw_request(scene: Scene, rng: np.random.Generator) -> Request:
    """A request for a clip that shows `scene`: each attribute differs with a probability drawn from CHANGE_RATES."""
    mentioned = sample_request(rng, held_out=False).mentioned
    while True:
        asked = misperceive(scene, rng, rng.uniform(*CHANGE_RATES))
        if not is_held_out(asked):
            return Request(asked, mentioned)


def label_kinds(cot: str, seen: Scene, token_starts: np.ndarray) -> np.ndarray:
    """What each token of a CoT is: an attribute of the clip where first named, a verdict or score, or plain text.

    `token_starts`: int [num_tokens], first character of each token. Returns uint8 [num_tokens].
    """
    kinds = np.full(len(cot), PLAIN, dtype=np.uint8)
    line_start = 0
    for dimension in DIMENSIONS:
        line_end = cot.index("\n", line_start)
        verdict = cot.find(";", line_start, line_end)
        if verdict >= 0:
            kinds[verdict + 1 : line_end] = DECISION
        for attribute in DIMENSION_ATTRIBUTES[dimension]:
            value = getattr(seen, attribute)
            words = motion_phrase(value) if attribute in ("motion", "camera") else value
            start = cot.index(f" {words}", line_start, line_end)
            kinds[start : start + 1 + len(words)] = ATTRIBUTE_KINDS[attribute]
        line_start = line_end + 1
    kinds[line_start:] = [DECISION if letter in SCORE_CHARACTERS else PLAIN for letter in cot[line_start:]]
    return np.maximum.reduceat(kinds, token_starts)


def make_texts(
    processor, *, seed: int, clips: list[tuple[Scene, Request | None, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """A prompt and a CoT for each (scene, request, prefix_ids): `input_ids` int16 [B, L] and `kinds` uint8 [B, L]."""
    rng = np.random.default_rng(seed)
    tokenizer = processor.tokenizer.backend_tokenizer
    requests = [request or draw_request(scene, rng) for scene, request, _ in clips]
    problems = [judge_problem(write_prompt(request, rng)) for request in requests]
    rests = [problem.replace(VIDEO_PLACEHOLDER, "") + USER_END for problem in problems]
    cots = [write_cot(request, clip[0], rng) for request, clip in zip(requests, clips, strict=True)]
    rows = []
    encoded = zip(clips, cots, tokenizer.encode_batch(rests), tokenizer.encode_batch(cots), strict=True)
    for (scene, _, prefix_ids), cot, rest, answer in encoded:
        token_starts = np.array([start for start, _ in answer.offsets])
        head = [*prefix_ids, *rest.ids]
        kinds = [*np.zeros(len(head), np.uint8), *label_kinds(cot, scene, token_starts), DECISION]
        rows.append(([*head, *answer.ids, processor.tokenizer.eos_token_id], kinds))
    length = -(-max(len(ids) for ids, _ in rows) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    input_ids = np.zeros((len(rows), length), dtype=np.int16)
    all_kinds = np.full((len(rows), length), NO_LABEL, dtype=np.uint8)
    for row, (ids, kinds) in enumerate(rows):
        input_ids[row, : len(ids)], all_kinds[row, : len(ids)] = ids, kinds
    return input_ids, all_kinds


def to_text_batch(input_ids: np.ndarray, kinds: np.ndarray, device: torch.device) -> TextBatch:
    """Move what `make_texts` returned to the training device."""
    rows, columns = kinds.nonzero()
    arrays = (input_ids.astype(np.int64), rows, columns, kinds[rows, columns].astype(np.int64))
    return TextBatch(*(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays))


class ClipPool:
    """Clips on the training device, in buckets of equal grid."""

    def __init__(self, device: torch.device, capacity: int) -> None:
        self.device, self.capacity = device, capacity
        self.patches: dict[Grid, torch.Tensor] = {}  # uint8 [capacity, t * h * w, patch_dim]
        self.items: dict[Grid, list[tuple[Scene, Request | None, np.ndarray]]] = {}

    def __len__(self) -> int:
        return sum(len(items) for items in self.items.values())

    def add(self, clips: list[ToyClip]) -> None:
        """Store clips; beyond the capacity of a bucket they are dropped."""
        for clip in clips:
            grid = clip.grid_thw
            if grid not in self.items:
                self.items[grid] = []
                shape = (self.capacity, *clip.patches.shape)
                self.patches[grid] = torch.empty(shape, dtype=torch.uint8, device=self.device)
            items = self.items[grid]
            if len(items) < self.capacity:
                self.patches[grid][len(items)] = torch.from_numpy(clip.patches).to(self.device, non_blocking=True)
                items.append((clip.scene, clip.request, clip.prefix_ids))

    def draw(self, rng: np.random.Generator, size: int) -> tuple[Grid, np.ndarray]:
        """A bucket, in proportion to its clips, and indices of clips in it."""
        grids = list(self.items)
        counts = np.array([len(self.items[grid]) for grid in grids])
        grid = grids[rng.choice(len(grids), p=counts / counts.sum())]
        return grid, rng.integers(len(self.items[grid]), size=size)

    def pixel_values(self, grid: Grid, indices: np.ndarray) -> torch.Tensor:
        """Normalised patches as the processor gives them, float32 [len(indices) * t * h * w, patch_dim]."""
        chosen = self.patches[grid][torch.from_numpy(indices).to(self.device)]
        return (chosen.flatten(0, 1).float() / 127.5) - 1.0
