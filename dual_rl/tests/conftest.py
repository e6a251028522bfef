"""Fixtures of the tests of whole runs."""

from pathlib import Path

import pytest

from model_support import write_small_model
from training_support import Running, Workplace


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """A random reward model."""
    return write_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def workplace(tmp_path, small_model) -> Workplace:
    """A workplace of the test's own."""
    return Workplace.make(tmp_path / "work", **{"worker.actor.model.model_path": small_model})


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, small_model) -> tuple[Workplace, Running]:
    """Three steps on one rank, without trouble: what interrupted, spread and continued runs must equal.

    It goes on beside the first tests; `wait` for it.
    """
    workplace = Workplace.make(tmp_path_factory.mktemp("work") / "w", **{"worker.actor.model.model_path": small_model})
    return workplace, workplace.start()
