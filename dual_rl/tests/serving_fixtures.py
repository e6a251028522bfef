"""Fixtures of the tests of the reward server: servers in threads around one small model."""

import threading
from collections.abc import Callable, Iterator

import pytest

from model_support import CLIPS
from scoring.reward_model import RewardModel
from scoring.types import Outcome, ScoringSettings
from serving_support import PROMPTS, SECONDS, Serving


class Gate:
    """Stands before the model's work: while closed, nothing becomes ready; `failure` is raised by it."""

    def __init__(self, model: RewardModel) -> None:
        self.is_open = threading.Event()
        self.is_open.set()
        self.failure: Exception | None = None
        self.advance = model.advance

    def __call__(self) -> list[Outcome]:
        assert self.is_open.wait(SECONDS)
        if self.failure is not None:
            raise self.failure
        return self.advance()


@pytest.fixture(scope="session")
def reward_model(small_model) -> Iterator[RewardModel]:
    settings = ScoringSettings(backend="hf", batch_size=8, max_new_tokens=8, num_threads=1)
    with RewardModel.from_pretrained(small_model, settings=settings) as model:
        yield model


@pytest.fixture(scope="session")
def offline(reward_model) -> list[dict]:
    """What the clips score without a server."""
    scores = reward_model.score(CLIPS, PROMPTS)
    return [{"reward": reward, "cot": cot} for reward, cot in zip(*scores, strict=True)]


@pytest.fixture
def serving(reward_model, tmp_path) -> Iterator[Callable[..., Serving]]:
    """Starts servers, one at a time."""
    started: list[Serving] = []

    def start(**options: object) -> Serving:
        started.append(Serving(reward_model, tmp_path / f"uploads_{len(started)}", **options))
        return started[-1]

    yield start
    for server in started:
        server.stop()
    while reward_model.num_pending:  # of servers that were stopped early
        reward_model.advance()


@pytest.fixture
def gate(reward_model, monkeypatch) -> Iterator[Gate]:
    """Before the model's work; closed."""
    gate = Gate(reward_model)
    monkeypatch.setattr(reward_model, "advance", gate)
    gate.is_open.clear()
    yield gate
    gate.failure = None
    gate.is_open.set()


@pytest.fixture
def scored_paths(reward_model, monkeypatch) -> list[str]:
    """Paths of all videos that the model is given."""
    paths: list[str] = []
    submit = reward_model.submit

    def record(tasks) -> None:
        paths.extend(task.video for task in tasks)
        submit(tasks)

    monkeypatch.setattr(reward_model, "submit", record)
    return paths
