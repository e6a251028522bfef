"""What the tests of CoT collection share: a chat server that says what a test wants, and CSVs without CoTs."""

import json
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

from stage1_support import write_pairs_csv
from toy_world.tables import read_table, write_table

MODEL = "judge"
DIMENSIONS = ("subject", "dynamics", "camera", "environment", "style")
DROP = (0, None)
"""In place of an answer: close the connection without one."""
Answer = tuple[int, object]
"""Status and body of a reply."""


def make_cot(
    scores: Sequence[int | str], overall: float | None, *, reasoning: str = "The clip shows a circle."
) -> str:
    """A well-formed CoT; `scores` in the order of DIMENSIONS."""
    answer: dict[str, object] = {"dimensional_scores": dict(zip(DIMENSIONS, scores, strict=True))}
    answer |= {} if overall is None else {"overall_score": overall}
    return f"{reasoning}\n<answer>\n{json.dumps(answer)}\n</answer>"


def request_text(request: Mapping) -> str:
    """The texts of a request's user turn."""
    return " ".join(block["text"] for block in request["messages"][0]["content"] if block["type"] == "text")


def random_cot(request: Mapping) -> str:
    """A well-formed CoT that depends on the seed and the prompt of a request, and on nothing else."""
    rng = random.Random(f"{request['seed']} {request_text(request)}")
    scores = [rng.choice([0, 1, 2, "N/A"]) for _ in DIMENSIONS]
    return make_cot(scores, round(rng.uniform(1, 5), 2), reasoning=f"I see a {rng.choice(['red', 'blue'])} thing.")


def completion(
    text: str | None, *, finish_reason: str = "stop", prompt_tokens: int | None = None, **message
) -> Answer:
    """A successful reply."""
    choice = {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish_reason}
    return 200, {"choices": [choice], "usage": {"prompt_tokens": prompt_tokens}}


def failure(status: int, message: str = "no such luck") -> Answer:
    return status, {"error": {"message": message}}


@contextmanager
def run_chat_server() -> Iterator[SimpleNamespace]:
    """A real HTTP server. `answer`: what a chat request gets; `models`: what /models gets; `url`: up to /v1.

    `requests`: all chat requests, parsed, in order of arrival. `keys`: the Authorization headers that came.
    """
    answer: Callable[[dict], Answer] = lambda request: completion(random_cot(request))  # noqa: E731
    models = (200, {"data": [{"id": MODEL, "max_model_len": 4096}]})
    state = SimpleNamespace(answer=answer, models=models, requests=[], keys=set())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(state.models)

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.keys.add(self.headers["Authorization"])
            state.requests.append(request)
            self.reply(state.answer(request))

        def reply(self, answer: Answer) -> None:
            if answer == DROP:
                self.close_connection = True
                return
            data = json.dumps(answer[1]).encode()
            self.send_response(answer[0])
            self.send_header("Content-Type", "application/json")
            self.send_header("retry-after-ms", "1")
            self.send_header("Content-Length", str(len(data)))
            with suppress(ConnectionError):  # the client may have given up
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield state
    server.shutdown()
    server.server_close()


def write_bare_csv(path: Path, clips: Sequence[Path], *, labels: Sequence[str], **columns: Sequence[str]) -> Path:
    """A preference CSV without CoTs and MOS columns; `columns` are added, or replace the written ones."""
    rows = read_table(write_pairs_csv(path, clips, labels=labels))
    for index, row in enumerate(rows):
        for name in [name for name in row if name.startswith(("CoT", "MOS"))]:
            del row[name]
        row.update({name: cells[index] for name, cells in columns.items()})
    write_table(path, rows)
    return path


def as_flags(**options: object) -> list[str]:
    """Command-line flags; True stands for a flag without a value."""
    parts = [[f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in options.items()]
    return [part for flag in parts for part in flag]
