"""Best-of-N: of several clips made for one prompt, keep the one that the reward prefers."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path

from scoring.scoring import VideoTask

CLIP_SUFFIXES = frozenset({".mp4", ".mov", ".webm", ".mkv", ".avi"})
PROMPT_FILE = "prompt.txt"


@dataclass(frozen=True)
class Candidates:
    """The clips that were made for one prompt, by the name of their folder."""

    name: str
    prompt: str
    clips: tuple[Path, ...]


def find_candidates(folder: Path) -> list[Candidates]:
    """The sub-folders of `folder`, each with a `prompt.txt` and its clips, in order of their names.

    Raises ValueError that lists every sub-folder without prompt or clip.
    """
    found, problems = [], []
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ():
        prompt = inner / PROMPT_FILE
        clips = tuple(sorted(path for path in inner.iterdir() if path.suffix.lower() in CLIP_SUFFIXES))
        text = prompt.read_text(encoding="utf-8").strip() if prompt.is_file() else ""
        if not text:
            problems.append(f"{inner} has no text in {PROMPT_FILE}")
        if not clips:
            problems.append(f"{inner} has no clip ({', '.join(sorted(CLIP_SUFFIXES))})")
        found.append(Candidates(inner.name, text, clips))
    if not found:
        problems.append(f"{folder} has no sub-folder; make one for each prompt, with its clips and {PROMPT_FILE}")
    if problems:
        raise ValueError("\n".join(problems))
    return found


def build_tasks(candidates: Sequence[Candidates], problems: Sequence[str]) -> list[VideoTask]:
    """A task for each clip, named `folder/clip`. `problems`: the user turn of each of `candidates`."""
    return [
        VideoTask(f"{group.name}/{clip.name}", str(clip), problem)
        for group, problem in zip(candidates, problems, strict=True)
        for clip in group.clips
    ]


def compute_expected_best(rewards: Sequence[float], values: Sequence[float], *, n: int) -> float:
    """Mean of `values` at the highest reward over all ways to draw `n` of the clips; equal rewards share alike.

    Of K clips in ascending order of reward, the i-th (from 0) is the best of comb(i, n - 1) of the comb(K, n) draws.

    Example: rewards (1, 2, 3), values (0, 0, 1), n = 2: the third clip is the best of two of the three draws: 2/3.
    """
    assert len(rewards) == len(values), "one value for each reward"
    assert 1 <= n <= len(rewards), f"cannot draw {n} of {len(rewards)} clips"
    order = sorted(range(len(rewards)), key=lambda place: rewards[place])
    total, start = 0.0, 0
    while start < len(order):
        end = start
        while end < len(order) and rewards[order[end]] == rewards[order[start]]:
            end += 1
        draws = sum(comb(place, n - 1) for place in range(start, end))
        total += draws * sum(values[place] for place in order[start:end]) / (end - start)
        start = end
    return total / comb(len(rewards), n)
