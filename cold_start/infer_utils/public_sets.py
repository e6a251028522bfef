"""The published preference sets that `import_data` reads: their files, columns and labels.

A set is a declaration. Its records are comparisons of two videos, or single videos with scores, from which pairs are
formed. `source` says where its columns were seen.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from descore.answers import parse_label

Record = Mapping[str, object]
VOTES = {
    **{"leftvote": "A", "rightvote": "B", "tievote": "same", "bothbad_vote": "same"},  # GenAI-Bench
    **{"video_0": "A", "video_1": "B"},  # MJ-Bench-Video
}
WORDS = {1: "A", -1: "B", 0: "same", None: "invalid"}


class Video(NamedTuple):
    """A video of a record. `name`: a path or URL, or what to call the `content` that the record itself holds."""

    name: str
    model: str = ""
    content: bytes | None = None


class Comparison(NamedTuple):
    """Two videos of one prompt. `labels`: A, B, same or invalid by dimension. `sub_scores`: of A and B, 0 to 2."""

    prompt: str
    videos: tuple[Video, Video]
    labels: Mapping[str, str]
    sub_scores: tuple[Mapping[str, int], Mapping[str, int]] | None = None


class Rating(NamedTuple):
    """One video with its scores by dimension."""

    prompt: str
    video: Video
    scores: Mapping[str, float]


Items = Iterator[Comparison | Rating]


@dataclass(frozen=True)
class PublicSet:
    """`files`: patterns of its tables under the source folder. `needs`: columns that every record must have.

    `read`: record and its table -> comparisons or ratings; raises ValueError that names the column. `dimensions`: of
    the labels, of which the first becomes GSB. `download`: how to fetch it. `is_benchmark`: all of it is for testing.
    """

    source: str
    download: str
    files: tuple[str, ...]
    needs: tuple[str, ...]
    dimensions: tuple[str, ...]
    read: Callable[[Record, Path], Items]
    is_benchmark: bool = False


def text_of(record: Record, column: str) -> str:
    """The cell as text, empty for a blank or missing one. A list of texts counts as its first."""
    value = record.get(column)
    value = value[0] if isinstance(value, list) and value else value
    return "" if value is None or value != value else str(value).strip()


def label_of(record: Record, column: str) -> str:
    """A, B, same or invalid; invalid for a blank cell."""
    text = text_of(record, column)
    try:
        return WORDS[parse_label(VOTES.get(text.lower(), text))] if text else "invalid"
    except ValueError as error:
        raise ValueError(f"{column}: {error}") from error


def number_of(record: Record, column: str) -> float | None:
    """The cell as a number, None for a blank one."""
    text = text_of(record, column)
    try:
        number = float(text) if text else math.nan
        return number if math.isfinite(number) else None
    except ValueError as error:
        raise ValueError(f"{column} is {text[:80]!r}, not a number") from error


def larger_of(first: float | None, second: float | None) -> str:
    if first is None or second is None:
        return "invalid"
    return WORDS[(first > second) - (first < second)]


def video_of(record: Record, column: str, model: str = "") -> Video:
    """A path, a URL, or Hugging Face's {"bytes": ..., "path": ...}."""
    value = record.get(column)
    if isinstance(value, Mapping):
        return Video(str(value.get("path") or column), text_of(record, model), value.get("bytes"))
    return Video(text_of(record, column), text_of(record, model))


def rating_set(*, prompt: str, video: Callable[[Record], Video], scores: Mapping[str, str], **fields) -> PublicSet:
    """A set of one rated video per record. `scores`: dimension -> column."""

    def read(record: Record, _: Path) -> Items:
        numbers = {dimension: number_of(record, column) for dimension, column in scores.items()}
        given = {dimension: number for dimension, number in numbers.items() if number is not None}
        yield Rating(text_of(record, prompt), video(record), given)

    return PublicSet(needs=(prompt, *scores.values()), dimensions=tuple(scores), read=read, **fields)


def pair_set(
    *,
    prompt: str = "prompt",
    videos: tuple[str, str],
    models: tuple[str, str] = ("", ""),
    labels: Mapping[str, str | tuple[str, str]],
    **fields,
) -> PublicSet:
    """A set of one comparison per record. `labels`: dimension -> column of words, or the columns of the two videos'
    numbers, of which the larger wins."""

    def read(record: Record, _: Path) -> Items:
        found = {
            dimension: label_of(record, columns)
            if isinstance(columns, str)
            else larger_of(number_of(record, columns[0]), number_of(record, columns[1]))
            for dimension, columns in labels.items()
        }
        both = tuple(video_of(record, video, model) for video, model in zip(videos, models, strict=True))
        yield Comparison(text_of(record, prompt), both, found)

    columns = [name for value in labels.values() for name in ((value,) if isinstance(value, str) else value)]
    return PublicSet(needs=(prompt, *videos, *columns), dimensions=tuple(labels), read=read, **fields)


def read_video_dpo(record: Record, table: Path) -> Items:
    """`video1`, the winner, and `video2` are indices into metadata.json beside the table."""
    clips = _read_clips(table.parent / "metadata.json")
    try:
        names = [str(clips[int(record[column])]["basic"]["clip_path"]) for column in ("video1", "video2")]
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"video1 or video2 is not the index of a clip in metadata.json ({error!r})") from error
    yield Comparison(text_of(record, "frame_caption"), tuple(map(Video, names)), {"Overall": "A"})


@cache
def _read_clips(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def read_mj_bench_video(record: Record, _: Path) -> Items:
    """28 criteria of 0 to 2 for each video are sub-scores; records marked `discard` have no label."""
    both = tuple(record[f"video_{side}_label"] for side in (0, 1))
    sub_scores = tuple({name: int(value) for name, value in labels.items()} for labels in both)
    for side, scores in enumerate(sub_scores):
        if not set(scores.values()) <= {0, 1, 2}:
            raise ValueError(f"video_{side}_label holds other scores than 0, 1 and 2")
    is_discarded = text_of(record, "discard").lower() in ("true", "1")
    label = "invalid" if is_discarded else label_of(record, "overall_preference")
    videos = tuple(Video(text_of(record, f"video_{side}_path")) for side in (0, 1))
    yield Comparison(text_of(record, "caption"), videos, {"Overall": label}, sub_scores)


def read_vbench(record: Record, _: Path) -> Items:
    """human_anno[m1][m2] is 1 where m1 won, 0 where m2 did, 0.5 for a tie."""
    videos = {model: Video(str(path), model) for model, path in record["videos"].items()}
    for first, others in record["human_anno"].items():
        for second, won in others.items():
            if first < second or first not in record["human_anno"].get(second, {}):
                label = larger_of(float(won), 0.5)
                yield Comparison(text_of(record, "prompt_en"), (videos[first], videos[second]), {"Overall": label})


def preferences_of(*dimensions: str) -> dict[str, tuple[str, str]]:
    """Rapidata's columns: shares of the annotators that prefer each video."""
    return {name: (f"weighted_results1_{name}", f"weighted_results2_{name}") for name in dimensions}


FETCH = "hf download --repo-type dataset --local-dir FOLDER "
SEEN, TOLD = "columns as in public loaders", "columns not confirmed"
SETS: dict[str, PublicSet] = {
    "videogen-rewardbench": pair_set(
        source=f"KlingTeam/VideoGen-RewardBench ({SEEN})",
        download=FETCH + "KlingTeam/VideoGen-RewardBench",
        files=("videogen-rewardbench.csv",),
        videos=("path_A", "path_B"),
        models=("A_model", "B_model"),
        labels={name: name for name in ("Overall", "VQ", "MQ", "TA")},
        is_benchmark=True,
    ),
    "videoalign": pair_set(
        source=f"VideoAlign's form of training data ({SEEN}): VideoGen-RewardBench's without models and Overall",
        download="see github.com/KlingTeam/VideoAlign",
        files=("*.csv", "*.jsonl"),
        videos=("path_A", "path_B"),
        labels={name: name for name in ("TA", "VQ", "MQ")},
    ),
    "genai-bench": pair_set(
        source=f"TIGER-Lab/GenAI-Bench, video_generation ({SEEN}); its videos are links, to be fetched before",
        download=FETCH + "TIGER-Lab/GenAI-Bench",
        files=("video_generation/*.parquet", "**/*.parquet", "*.csv"),
        videos=("left_video", "right_video"),
        models=("left_model", "right_model"),
        labels={"Overall": "vote_type"},
        is_benchmark=True,
    ),
    "videofeedback": rating_set(
        source=f"TIGER-Lab/VideoFeedback ({SEEN}; videos are taken to be named by `id`)",
        download=FETCH + "TIGER-Lab/VideoFeedback",
        files=("**/*.parquet", "*.json"),
        prompt="text prompt",
        video=lambda record: Video(f"{text_of(record, 'id')}.mp4"),
        scores={
            "text_alignment": "text-to-video alignment",
            "visual_quality": "visual quality",
            "temporal_consistency": "temporal consistency",
            "dynamic_degree": "dynamic degree",
            "factual_consistency": "factual consistency",
        },
    ),
    "videofeedback2": rating_set(
        source=f"TIGER-Lab/VideoFeedback2, test ({TOLD})",
        download=FETCH + "TIGER-Lab/VideoFeedback2",
        files=("**/*.parquet", "*.json", "*.jsonl"),
        prompt="prompt",
        video=lambda record: video_of(record, "video_name"),
        scores={"text_alignment": "t2v_score", "visual_quality": "visual_score", "physics": "phy_score"},
    ),
    "rapidata": pair_set(
        source=f"Rapidata's text-to-video preferences ({SEEN})",
        download=FETCH + "Rapidata/text-2-video-human-preferences",
        files=("**/*.parquet",),
        videos=("file_name1", "file_name2"),
        labels=preferences_of("Preference", "Coherence", "Alignment"),
    ),
    "datapointai": pair_set(
        source="datapointai/text-2-video-human-preferences-motion-v2 (columns as on its page; videos in the table)",
        download=FETCH + "datapointai/text-2-video-human-preferences-motion-v2-medium",
        files=("**/*.parquet",),
        videos=("video1", "video2"),
        models=("model1", "model2"),
        labels=preferences_of("Coherence", "Aesthetic", "Prompt_Adherence"),
    ),
    "videodpo": PublicSet(
        source=f"VideoDPO ({TOLD})",
        download="see videodpo.github.io",
        files=("**/pair.json",),
        needs=("video1", "video2", "frame_caption"),
        dimensions=("Overall",),
        read=read_video_dpo,
    ),
    "mj-bench-video": PublicSet(
        source=f"MJ-Bench-Video (paths and labels as in its own loader; overall_preference and discard: {TOLD})",
        download="see github.com/aiming-lab/MJ-Video",
        files=("*.json",),
        needs=("caption", "video_0_path", "video_1_path", "video_0_label", "video_1_label", "overall_preference"),
        dimensions=("Overall",),
        read=read_mj_bench_video,
    ),
    "vbench": PublicSet(
        source=f"VBench's human preference annotations ({TOLD})",
        download="see github.com/Vchitect/VBench",
        files=("**/*.json",),
        needs=("prompt_en", "videos", "human_anno"),
        dimensions=("Overall",),
        read=read_vbench,
        is_benchmark=True,
    ),
}
