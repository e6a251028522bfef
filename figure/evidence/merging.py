"""Results of several machines in one file, each of which ran some of the jobs of a size."""

from collections.abc import Sequence
from pathlib import Path

from evidence.plan import MASKED, OWN, Plan, Scoring
from evidence.results import Results

FREE_SETTINGS = ("seeds", "ablation_seeds")
"""Sizes may differ in these: each machine has seeds of its own."""


def merge(results: dict, others: Sequence[Path], plan: Plan) -> dict:
    """`results`, which may be empty, with what the files `others` have of the plan's jobs.

    Of a job that several have done, the first one's record stays. Raises ValueError when a file holds other work: of
    another size or kind of device, or on other pairs.
    """
    for path in others:
        other = Results.load(path).content
        if not results["jobs"]:
            results = {**results, "device": other["device"]}
        _require_same_work(path, results, other)
        results = {
            **results,
            "jobs": _join(results["jobs"], other["jobs"], ("name",)),
            "scores": _join(results["scores"], other["scores"], ("arm", "seed", "set", "read")),
            "curves": _join(results["curves"], other["curves"], ("run", "seed", "metric")),
        }
    place = {name: number for number, name in enumerate(plan.jobs)}
    jobs_of = {"jobs": lambda job: job["name"], "scores": _name_scoring, "curves": _name_training}
    for key, name in jobs_of.items():
        kept = [record for record in results[key] if name(record) in place]
        results = {**results, key: sorted(kept, key=lambda record, name=name: place[name(record)])}
    return results


def _require_same_work(path: Path, results: dict, other: dict) -> None:
    def settings(content: dict) -> dict:
        return {key: value for key, value in content["settings"].items() if key not in FREE_SETTINGS}

    digests = {(score["set"], score["pairs"]) for score in results["scores"] + other["scores"]}
    for what, is_same in (
        ("another size", (results["size"], settings(results)) == (other["size"], settings(other))),
        ("another kind of device", results["device"]["num_gpus"] == other["device"]["num_gpus"]),
        ("other pairs", len(digests) == len({name for name, _ in digests})),
    ):
        if not is_same:
            raise ValueError(f"{path} holds results of {what}: the two cannot be compared, leave it out")


def _join(records: list[dict], further: list[dict], key: tuple[str, ...]) -> list[dict]:
    known = {tuple(record[name] for name in key) for record in records}
    return records + [record for record in further if tuple(record[name] for name in key) not in known]


def _name_scoring(score: dict) -> str:
    return Scoring(score["arm"], score["seed"], MASKED if score["read"] == MASKED else OWN).name


def _name_training(curve: dict) -> str:
    return f"{curve['run']}_{curve['seed']}"
