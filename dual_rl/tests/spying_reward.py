"""A reward plug-in for tests of whole runs: notes every call, and kills one of the run's ranks if a file says so.

`fault`: a file with the number of the call, from 1, in which it happens; no file, no fault.
"""

import json
from pathlib import Path

import psutil

calls = 0


def compute_score(reward_inputs: list[dict], *, log: str, fault: str) -> list[dict]:
    """A reward that depends on every character; `log` gets one line per call."""
    global calls
    calls += 1
    with open(log, "a") as file:
        noted = [[item["ground_truth"], item["side"], item["response"]] for item in reward_inputs]
        file.write(json.dumps(noted) + "\n")
    if Path(fault).is_file() and int(Path(fault).read_text()) == calls:
        children = psutil.Process().children(recursive=True)
        next(child for child in reversed(children) if child.name().startswith("ray::Worker")).kill()
    return [{"overall": sum(map(ord, item["response"])) % 7 / 7} for item in reward_inputs]
