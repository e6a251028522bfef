"""Training data of the tiny base: clips are rendered once, requests and texts are drawn for every batch.

Clips are encoded, read back and preprocessed as in every later use. Requests are the clip's scene with random changes:
the prompt says little about what the clip shows, so that the model has to look.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from checkpoint import RewardConfig
from scored_sequence import VIDEO_PLACEHOLDER, judge_problem
from toy_world.render import encode_clip, sample_nuisance
from toy_world.scene import ATTRIBUTES, DIMENSIONS, Request, Scene, is_held_out, sample_clip_scene, sample_request
from toy_world.texts import misperceive, phrase, write_cot, write_prompt
from vision_process import load_video

TINY_BASE = Path(__file__).resolve().parent / "tiny_base"
TINY_BUDGET = RewardConfig.load(TINY_BASE).video
# Weights of tokens in the loss: what the clip shows, verdicts and scores, the text around them.
SEEN, DECISION, PLAIN = 4.0, 2.0, 0.2
TRIPLE = ("color", "shape", "motion")
BALANCING_ROUNDS = 3
CHANGE_RATES = (0.1, 0.7)  # range of the probability that an attribute of the request differs from the clip's
USER_START, USER_END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
VIDEO_BLOCK = "<|vision_start|><|video_pad|><|vision_end|>"
SCORE_CHARACTERS = "0123456789N."


@dataclass(frozen=True)
class ToyClip:
    """A preprocessed clip that shows `scene`, made for `request` (None: to be paired with any).

    `patches`: uint8 [t * h * w, patch_dim]; `prefix_ids`: the user turn up to the end of the video.
    """

    scene: Scene
    request: Request | None
    patches: np.ndarray
    grid_thw: tuple[int, int, int]
    prefix_ids: list[int]


@dataclass(frozen=True)
class TextBatch:
    """Sequences `prefix, prompt, CoT, EOS` of the clips `clip_indices` [B], padded on the right.

    `input_ids`: int64 [B, L]. `weights`: float32 [B, L], of each token in the loss; 0 before the CoT.
    """

    clip_indices: np.ndarray
    input_ids: torch.Tensor
    weights: torch.Tensor


class ToyClips(Dataset):
    """Clips by index; held-out ones belong to a request. The seed and the index determine a clip."""

    def __init__(self, processor, *, size: int, seed: int, held_out: bool) -> None:
        self.processor, self.size, self.seed, self.held_out = processor, size, seed, held_out
        self.triples = balance_triples()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> ToyClip:
        rng = np.random.default_rng([self.seed, int(self.held_out), index])
        request = sample_request(rng, held_out=True) if self.held_out else None
        scene = sample_clip_scene(request, rng, held_out=True) if request else draw_scene(rng, self.triples)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            encode_clip(path, scene, sample_nuisance(rng))
            video = load_video(path, TINY_BUDGET)
        inputs = self.processor(
            text=[USER_START + VIDEO_BLOCK],
            videos=[video.frames],
            video_metadata=[video.metadata],
            do_resize=False,
            do_sample_frames=False,
            return_tensors="np",
        )
        # The processor made (value / 255 - 0.5) / 0.5 of it.
        patches = ((inputs["pixel_values_videos"] + 1) * 127.5).round().astype(np.uint8)
        grid_thw, prefix_ids = inputs["video_grid_thw"][0].tolist(), inputs["input_ids"][0].tolist()
        return ToyClip(scene, request, patches, tuple(grid_thw), prefix_ids)


def balance_triples() -> np.ndarray:
    """Probabilities of (color, shape, motion), float [6, 6, 7]: 0 for held-out triples, pairs about equally frequent.

    Without this a color would be far rarer with some shapes, whose triples are held out, and the model would learn
    that. A few rounds of iterative proportional fitting; more would leave some triples almost no probability.
    """
    any_scene = Scene(*(values[0] for values in ATTRIBUTES.values()))
    table = np.ones([len(ATTRIBUTES[name]) for name in TRIPLE])
    for index in np.ndindex(table.shape):
        table[index] = not is_held_out(_with_triple(any_scene, index))
    for _ in range(BALANCING_ROUNDS):
        for axis in range(table.ndim):
            pairs = table.sum(axis=axis, keepdims=True)
            table /= pairs * pairs.size
    return table / table.sum()


def _with_triple(scene: Scene, index: Sequence[int]) -> Scene:
    return replace(scene, **{name: ATTRIBUTES[name][i] for name, i in zip(TRIPLE, index, strict=True)})


def draw_scene(rng: np.random.Generator, triples: np.ndarray) -> Scene:
    """A scene for a training clip; `triples` as `balance_triples` gives them."""
    index = np.unravel_index(rng.choice(triples.size, p=triples.ravel()), triples.shape)
    return _with_triple(sample_request(rng, held_out=False).scene, index)


def draw_request(scene: Scene, rng: np.random.Generator) -> Request:
    """A request for a clip that shows `scene`: each attribute differs with a probability drawn from CHANGE_RATES."""
    mentioned = sample_request(rng, held_out=False).mentioned
    while True:
        asked = misperceive(scene, rng, rng.uniform(*CHANGE_RATES))
        if not is_held_out(asked):
            return Request(asked, mentioned)


def make_texts(tokenizer, clips: Sequence[ToyClip], clip_indices: np.ndarray, rng: np.random.Generator) -> TextBatch:
    """A prompt and a CoT for each of the clips."""
    rows = []
    for clip in (clips[index] for index in clip_indices):
        request = clip.request or draw_request(clip.scene, rng)
        prompt = judge_problem(write_prompt(request, rng)).replace(VIDEO_PLACEHOLDER, "") + USER_END
        cot = write_cot(request, clip.scene, rng)
        head = clip.prefix_ids + tokenizer(prompt)["input_ids"]
        answer = tokenizer(cot, return_offsets_mapping=True)
        weights = weigh_tokens(cot, clip.scene, [start for start, _ in answer["offset_mapping"]])
        ids = [*head, *answer["input_ids"], tokenizer.eos_token_id]
        rows.append((torch.tensor(ids), torch.tensor([*[0.0] * len(head), *weights, DECISION])))
    input_ids, weights = zip(*rows, strict=True)
    return TextBatch(
        clip_indices,
        pad_sequence(input_ids, batch_first=True, padding_value=tokenizer.pad_token_id),
        pad_sequence(weights, batch_first=True).float(),
    )


def weigh_tokens(cot: str, seen: Scene, token_starts: Sequence[int]) -> np.ndarray:
    """SEEN where a CoT first names an attribute of the clip, DECISION for verdicts and scores, else PLAIN.

    `token_starts` [num_tokens]: the first character of each token. Returns float [num_tokens].
    """
    weights = np.full(len(cot), PLAIN)
    line_start = 0
    for names in DIMENSIONS.values():
        line_end = cot.index("\n", line_start)
        verdict = cot.find(";", line_start, line_end)
        if verdict >= 0:
            weights[verdict + 1 : line_end] = DECISION
        for name in names:
            words = f" {phrase(name, getattr(seen, name))}"
            start = cot.index(words, line_start, line_end)
            weights[start : start + len(words)] = SEEN
        line_start = line_end + 1
    weights[line_start:] = [DECISION if letter in SCORE_CHARACTERS else PLAIN for letter in cot[line_start:]]
    return np.maximum.reduceat(weights, token_starts)
