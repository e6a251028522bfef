"""Fixtures of the tests of whole runs."""

from pathlib import Path

import pytest

from model_support import write_small_model
from training_support import Workplace


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What the tests check is remembered for these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """A random reward model."""
    return write_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def workplace(tmp_path, small_model) -> Workplace:
    """A workplace of the test's own."""
    return Workplace.make(tmp_path / "work", **{"worker.actor.model.model_path": small_model})
