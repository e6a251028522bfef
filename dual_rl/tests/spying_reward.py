"""A reward plug-in for tests of whole runs: notes every call, and fails in the way that a file asks for.

`fault`: a file that holds a word and the number of the call, from 1, in which it happens; no file, no fault.
    kill_run    SIGKILL to this very process, whose children's ids are left in the file `<fault>.children`
    kill_worker SIGKILL to one of the run's ranks
    remove      every video of the folder `videos`; `remove:a.mp4` one of them
    raise, short, nan  what a plug-in can do wrong
"""

import json
import os
import signal
from pathlib import Path

import psutil

calls = 0


def compute_score(reward_inputs: list[dict], *, log: str, fault: str, videos: str) -> list[dict]:
    """A reward that depends on every character; `log` gets one line a call."""
    global calls
    calls += 1
    with open(log, "a") as file:
        file.write(
            json.dumps([[item["ground_truth"], item["side"], item["response"]] for item in reward_inputs]) + "\n"
        )
    scores = [{"overall": sum(map(ord, item["response"])) % 7 / 7} for item in reward_inputs]
    name, _, call = Path(fault).read_text().partition(" ") if Path(fault).is_file() else ("", "", "")
    return _fail(name, scores, fault=Path(fault), videos=Path(videos)) if call and int(call) == calls else scores


def _fail(name: str, scores: list[dict], *, fault: Path, videos: Path) -> list[dict]:
    if name == "kill_run":
        children = {process.pid: process.name() for process in psutil.Process().children(recursive=True)}
        fault.with_suffix(".children").write_text(json.dumps(children))
        os.kill(os.getpid(), signal.SIGKILL)
    elif name == "kill_worker":
        _find_ranks()[-1].kill()
    elif name.startswith("remove"):
        for path in videos.glob(name.partition(":")[2] or "*"):
            path.unlink()
    elif name == "raise":
        raise KeyError("no such dimension")
    elif name == "short":
        return scores[:-1]
    elif name == "nan":
        return [{"overall": float("nan")}, *scores[1:]]
    return scores


def _find_ranks() -> list[psutil.Process]:
    """Processes that train for this run."""
    processes = psutil.Process().children(recursive=True)
    return [process for process in processes if process.name().startswith("ray::Worker")]
