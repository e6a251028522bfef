"""Public preference sets as CSVs of this project: `python -m infer_utils.import_data SET --source X --output DIR`.

Writes train.csv, val.csv and test.csv as stage 1 reads them (column `prompt`, the main dimension as GSB, every other
one as a column of its own, `answer` for stage 2 where a set has sub-scores), bench.csv with the test pairs for stage
2's `inference.py --bench_type react`, and report.json. No prompt is in two of the files. Nothing is downloaded; videos
are found in the source folder and its zip files, from which those that are needed are unpacked.

Ratings of single videos become pairs of one prompt: per dimension the higher score wins, equal ones tie, and a
difference below --margin is no label.
"""

import argparse
import csv
import hashlib
import itertools
import json
import random
import sys
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlparse

import pandas as pd
import pyarrow.parquet as pq

from descore.csv_table import shorten
from infer_utils.public_sets import SETS, Comparison, PublicSet, Rating, Record, Video, larger_of, pair_set

VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".avi", ".mkv", ".gif")
ROWS_AT_A_TIME = 5_000
EMBEDDED_ROWS_AT_A_TIME = 50
"""Of parquet files, whose rows may hold videos."""
SPLITS = ("train", "val", "test")
REPORT = "report.json"
MOST_NAMED = 10
"""Missing videos in the report."""


class VideoFiles:
    """The videos under a folder and in its zip files, looked up by any end of their path."""

    def __init__(self, source: Path, output: Path) -> None:
        self.source, self.output = source, output
        self.files: dict[str, list[tuple[Path, str | None]]] = defaultdict(list)
        for path in sorted(source.rglob("*")):
            if path.is_relative_to(output):
                continue
            if path.suffix.lower() in VIDEO_SUFFIXES:
                self.files[path.name].append((path, None))
            elif path.suffix.lower() == ".zip":
                for member in _open_zip(path).namelist():
                    if member.lower().endswith(VIDEO_SUFFIXES):
                        self.files[PurePosixPath(member).name].append((path, member))
        self.archives = ExitStack()
        self.opened: dict[Path, zipfile.ZipFile] = {}

    def find(self, video: Video) -> str | None:
        """Where the CSV finds the video, relative to the output folder or absolute; None if it is not there.

        Raises ValueError when the name fits several files.
        """
        if video.content:
            suffix = PurePosixPath(video.name).suffix or ".mp4"
            return self._write(hashlib.sha256(video.content).hexdigest()[:24] + suffix, video.content)
        parts = PurePosixPath(unquote(urlparse(video.name).path if "://" in video.name else video.name)).parts
        found = self.files.get(parts[-1], []) if parts else []
        exact = [(path, member) for path, member in found if self._parts(path, member) == parts]
        if len(exact) == 1:
            return self._place(*exact[0])
        for length in range(len(parts), 0, -1):
            fitting = [
                (path, member) for path, member in found if self._parts(path, member)[-length:] == parts[-length:]
            ]
            if len(fitting) == 1:
                return self._place(*fitting[0])
            if fitting:
                names = ", ".join("/".join(self._parts(path, member)) for path, member in fitting[:3])
                raise ValueError(f"video {shorten(video.name)} fits {len(fitting)} files ({names})")
        return None

    def close(self) -> None:
        self.archives.close()

    def _parts(self, path: Path, member: str | None) -> tuple[str, ...]:
        return PurePosixPath(member).parts if member else path.relative_to(self.source).parts

    def _place(self, path: Path, member: str | None) -> str:
        if member is None:
            return str(path.resolve())
        if path not in self.opened:
            self.opened[path] = self.archives.enter_context(_open_zip(path))
        name = f"{path.stem}/{'/'.join(part for part in PurePosixPath(member).parts if part not in ('..', '/'))}"
        if (self.output / "videos" / name).is_file():
            return f"videos/{name}"
        return self._write(name, self.opened[path].read(member))

    def _write(self, name: str, content: bytes) -> str:
        target = self.output / "videos" / name
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{target.name}.partial")
            partial.write_bytes(content)
            partial.rename(target)
        return f"videos/{name}"


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is not a zip file that can be read: {error}. Fetch it again.") from error


def prepare_output(options: argparse.Namespace) -> None:
    """An empty output folder, or one of an earlier import of the same source, whose CSVs go. Raises ValueError."""
    output, report = options.output, options.output / REPORT
    if output.resolve() == options.source.resolve():
        raise ValueError(f"--output is the source, {output}. Name another folder.")
    if output.is_dir() and any(output.iterdir()):
        before = json.loads(report.read_text()) if report.is_file() else {}
        if before.get("import") != [options.set, str(options.source.resolve())]:
            raise ValueError(f"{output} holds other files than an import of {options.source}. Name another --output.")
        for name in (*SPLITS, "bench"):
            (output / f"{name}.csv").unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps({"import": [options.set, str(options.source.resolve())]}) + "\n")


def find_tables(source: Path, patterns: Iterable[str]) -> list[Path]:
    """The files of the first pattern that fits any. Raises ValueError when none does."""
    if source.is_file():
        return [source]
    for pattern in patterns:
        if found := sorted(path for path in source.glob(pattern) if path.is_file()):
            return found
    raise ValueError(f"{source} has no file like {' or '.join(patterns)}. Give the folder of the download.")


def read_records(path: Path) -> Iterator[Record]:
    """The rows of a CSV, JSON, JSON lines or parquet file, a part at a time where the format allows it."""
    try:
        if path.suffix == ".parquet":
            for batch in pq.ParquetFile(path).iter_batches(batch_size=EMBEDDED_ROWS_AT_A_TIME):
                yield from batch.to_pylist()
        elif path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            yield from content if isinstance(content, list) else content.values()
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:
                yield from map(json.loads, filter(str.strip, file))
        else:
            options = {"dtype": str, "keep_default_na": False, "chunksize": ROWS_AT_A_TIME}
            for part in pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index_col=False, **options):
                yield from part.to_dict("records")
    except (OSError, ValueError) as error:  # pandas', pyarrow's and json's errors are ValueErrors
        raise ValueError(f"{path} cannot be read as {path.suffix[1:] or 'a table'}: {error}") from error


def read_items(form: PublicSet, tables: Iterable[Path], report: Counter) -> Iterator[Comparison | Rating]:
    """What the records say. Raises ValueError that names file, row and column for a record of another form."""
    for table in tables:
        for number, record in enumerate(read_records(table), start=1):
            missing = [name for name in form.needs if name not in record] if isinstance(record, dict) else form.needs
            if missing:
                has = shorten(", ".join(record) if isinstance(record, dict) else repr(record), 300)
                raise ValueError(
                    f"{table}, row {number}: column {', '.join(missing)} is missing; it has {has}. The published form "
                    "may have changed: import it as `table`, and name its columns with --columns."
                )
            report["rows"] += 1
            try:
                yield from form.read(record, table)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                message = error if isinstance(error, ValueError) else f"the row has another form ({error!r})"
                raise ValueError(f"{table}, row {number}: {message}. Correct or remove the row.") from error


def form_pairs(ratings: Iterable[Rating], options: argparse.Namespace) -> Iterator[Comparison]:
    """Comparisons of the videos of each prompt, at most `pairs_per_prompt`, in random order of A and B."""
    by_prompt: dict[str, list[Rating]] = defaultdict(list)
    for rating in filter(lambda rating: rating.prompt, ratings):
        by_prompt[rating.prompt].append(rating)
    draws = random.Random(options.seed)
    for prompt, rated in by_prompt.items():
        num_pairs = len(rated) * (len(rated) - 1) // 2
        drawn: dict[tuple[int, ...], None] = {}
        while len(drawn) < min(num_pairs, options.pairs_per_prompt):
            drawn[tuple(sorted(draws.sample(range(len(rated)), 2)))] = None
        for pair in drawn:
            first, second = (rated[index] for index in draws.sample(pair, 2))
            labels = {}
            for name in first.scores.keys() & second.scores.keys():
                difference = first.scores[name] - second.scores[name]
                labels[name] = (
                    larger_of(difference, 0) if difference == 0 or abs(difference) >= options.margin else "invalid"
                )
            yield Comparison(prompt, (first.video, second.video), labels)


def choose_split(prompt: str, options: argparse.Namespace) -> str:
    """By a hash of the prompt and the seed, so that a prompt is in one file only, whatever the order of rows."""
    digest = hashlib.blake2b(f"{options.seed}\0{prompt}".encode(), digest_size=8).digest()
    share = int.from_bytes(digest) / 2**64
    return "test" if share < options.test else "val" if share < options.test + options.val else "train"


class Writer:
    """The CSVs of the splits and of the benchmark; partial until `finish`."""

    def __init__(self, output: Path, dimensions: tuple[str, ...]) -> None:
        self.output, self.dimensions = output, dimensions
        self.files, self.writers = {}, {}

    def add(self, split: str, pair: Comparison, paths: tuple[str, str]) -> None:
        labels = {name: pair.labels.get(name, "invalid") for name in self.dimensions}
        main = labels[self.dimensions[0]]
        row = {"videos": repr(list(paths)), "prompt": pair.prompt, "GSB": main, **labels}
        if pair.sub_scores:
            scores = {f"video_{side}_scores": of for side, of in enumerate(pair.sub_scores, start=1)}
            row["answer"] = f"<answer>{json.dumps({**scores, 'gsb_result': main})}</answer>"
        self._write(split, row)
        if split == "test":
            models = dict(zip(("A_model", "B_model"), (video.model for video in pair.videos), strict=True))
            names = {f"GSB_{name}": label for name, label in labels.items()}
            self._write("bench", {"path_A": paths[0], "path_B": paths[1], **models, "prompt": pair.prompt, **names})

    def finish(self) -> None:
        """Close the files and give them their names."""
        for name, file in self.files.items():
            file.close()
            Path(file.name).rename(self.output / f"{name}.csv")

    def _write(self, name: str, row: dict[str, str]) -> None:
        if name not in self.writers:
            self.files[name] = (self.output / f"{name}.csv.partial").open("w", newline="", encoding="utf-8")
            self.writers[name] = csv.DictWriter(self.files[name], list(row))
            self.writers[name].writeheader()
        self.writers[name].writerow(row)


def import_set(form: PublicSet, options: argparse.Namespace) -> dict:
    """Write the CSVs; returns the report. Raises ValueError for a source of another form or without any video."""
    report, labels, missing = Counter(), defaultdict(Counter), Counter()
    tables = find_tables(options.source, form.files)
    prepare_output(options)
    videos = VideoFiles(
        options.videos or (options.source if options.source.is_dir() else options.source.parent), options.output
    )
    writer = Writer(options.output, form.dimensions)
    items = read_items(form, tables, report)
    first = next(items, None)
    if first is None:
        raise ValueError(f"{tables[0]} has no rows. Give another --source.")
    items = itertools.chain([first], items)
    for pair in items if isinstance(first, Comparison) else form_pairs(items, options):
        if not pair.prompt:
            report["left out: no prompt"] += 1
            continue
        paths = tuple(map(videos.find, pair.videos))
        if None in paths:
            report["left out: video not found"] += 1
            missing.update(video.name for video, path in zip(pair.videos, paths, strict=True) if path is None)
        elif all(label == "invalid" for label in pair.labels.values()):
            report["left out: no label"] += 1
        else:
            split = choose_split(pair.prompt, options)
            writer.add(split, pair, paths)
            report[split] += 1
            for name, label in pair.labels.items():
                labels[name][label] += 1
    videos.close()
    if not any(report[split] for split in SPLITS):
        raise ValueError(
            f"no pair of {tables[0]} can be used ({dict(report)}); {next(iter(missing), 'no video')} for one was "
            f"looked for under {videos.source}. Name the folder of the videos or their zip files with --videos."
        )
    writer.finish()
    return {
        "import": [options.set, str(options.source.resolve())],
        "source": form.source,
        "tables": [str(table) for table in tables],
        "counts": dict(report),
        "labels": {name: dict(counts) for name, counts in sorted(labels.items())},
        "missing_videos": {"distinct": len(missing), "first": list(missing)[:MOST_NAMED]},
        "settings": {name: getattr(options, name) for name in ("seed", "val", "test", "margin", "pairs_per_prompt")},
    }


def declare_table(columns: Iterable[str]) -> PublicSet:
    """A set of any table, from `prompt=caption video_a=left video_b=right label.GSB=winner`. Raises ValueError."""
    named = dict(column.partition("=")[::2] for column in columns)
    labels = {name.removeprefix("label."): value for name, value in named.items() if name.startswith("label.")}
    known = {"prompt", "video_a", "video_b", "model_a", "model_b", *(f"label.{name}" for name in labels)}
    if not {"prompt", "video_a", "video_b"} <= named.keys() <= known or not labels or not all(named.values()):
        raise ValueError(
            "--columns needs prompt=, video_a=, video_b= and at least one label.NAME=, and may have model_a=, model_b="
        )
    return pair_set(
        source="a table",
        download="",
        files=("*.csv", "*.jsonl", "*.json", "*.parquet", "*.tsv"),
        prompt=named["prompt"],
        videos=(named["video_a"], named["video_b"]),
        models=(named.get("model_a", ""), named.get("model_b", "")),
        labels=labels,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=[*SETS, "table"], metavar="SET", help=f"{', '.join(SETS)}, or table")
    parser.add_argument("--source", type=Path, required=True, help="the download: a folder, or its table")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--videos", type=Path, help="folder of the videos or of their zip files, if it is another")
    parser.add_argument("--columns", nargs="+", default=[], metavar="NAME=COLUMN", help="columns of a `table`")
    parser.add_argument("--val", type=float, default=0.05, help="share of prompts for validation")
    parser.add_argument("--test", type=float, help="share for testing; by default 0.05, all of a benchmark")
    parser.add_argument("--margin", type=float, default=1.0, help="smallest difference of scores that is a preference")
    parser.add_argument("--pairs_per_prompt", type=int, default=10, help="most pairs formed of one prompt's ratings")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    try:
        form = declare_table(options.columns) if options.set == "table" else SETS[options.set]
        if options.test is None:
            options.test = 1.0 if form.is_benchmark else 0.05
        if not (0 <= options.val <= 1 and 0 <= options.test <= 1):
            raise ValueError("--val and --test are shares of the prompts, from 0 to 1")
        if not options.source.exists():
            raise ValueError(f"{options.source} does not exist. Fetch the set first: {form.download}")
        report = import_set(form, options)
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: of an encrypted zip file
        sys.stderr.write(f"error: {error}\n")
        return 1
    (options.output / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
