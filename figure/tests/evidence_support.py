"""Results made up for tests: what run_evidence.py would collect."""

from evidence.plan import MAIN_ARMS, MASKED, OWN
from evidence.results import SETS

CORRECT = {
    "discriminative": "0101", "coupled": "0111", "coupled_fast": "0101", "stage1": "0111", "descore": "1111",
    "stage1_short": "0110",
}  # fmt: skip


def make_score(arm: str, seed: int, name: str, *, read: str, correct: str) -> dict:
    return {
        "arm": arm, "seed": seed, "set": name, "read": read, "pairs": f"digest of {name}", "correct": correct,
        "num_ties": 1, "with_ties": 0.5, "threshold": None, "mean_reward": 0.1, "sub_scores": 0.75, "num_unscored": 0,
    }  # fmt: skip


def make_content(seeds: tuple[int, ...] = (1, 2)) -> dict:
    """Four pairs a set, of which a model gets the same right in every set and seed; curves of three steps."""
    reads = {"discriminative": MASKED, "coupled": "text", "coupled_fast": "text"}
    scores = [
        make_score(arm, seed, name, read=reads.get(arm, OWN), correct=CORRECT[arm])
        for arm in MAIN_ARMS for seed in seeds for name in SETS
    ]  # fmt: skip
    curves = [
        {"run": run, "seed": seed, "metric": metric, "values": [1.0, None, 3.0]}
        for run in ("stage1", "discriminative", "coupled", "descore") for seed in seeds
        for metric in ("seconds", "accuracy", "grad_norm", "bt_loss")
    ]  # fmt: skip
    jobs = [{"name": "world", "command": "make", "commit": "abc", "started": "2026-01-01", "seconds": 7200.0}]
    settings = {"short_steps": 1, "long_steps": 2}
    return {"size": "small", "settings": settings, "device": {}, "jobs": jobs, "scores": scores, "curves": curves}
