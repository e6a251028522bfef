"""A reward plug-in for tests of whole runs: notes every call, and fails in the way that a file asks for.

`fault`: a file with a word and the number of the call, from 1, in which it happens; no file, no fault.
    kill_worker SIGKILL to one of the run's ranks
    remove      every video of the folder `videos`; `remove:a.mp4` one of them
    raise       what a plug-in can do wrong
"""

import json
from pathlib import Path

import psutil

calls = 0


def compute_score(reward_inputs: list[dict], *, log: str, fault: str, videos: str) -> list[dict]:
    """A reward that depends on every character; `log` gets one line per call."""
    global calls
    calls += 1
    with open(log, "a") as file:
        noted = [[item["ground_truth"], item["side"], item["response"]] for item in reward_inputs]
        file.write(json.dumps(noted) + "\n")
    name, _, call = Path(fault).read_text().partition(" ") if Path(fault).is_file() else ("", "", "0")
    if int(call) == calls:
        _fail(name, videos=Path(videos))
    return [{"overall": sum(map(ord, item["response"])) % 7 / 7} for item in reward_inputs]


def _fail(name: str, *, videos: Path) -> None:
    if name == "kill_worker":
        children = psutil.Process().children(recursive=True)
        next(child for child in reversed(children) if child.name().startswith("ray::Worker")).kill()
    elif name == "raise":
        raise KeyError("no such dimension")
    else:
        for path in videos.glob(name.removeprefix("remove").removeprefix(":") or "*"):
            path.unlink()
