"""Fixtures of the tests of collect_cot: a chat server, and a preference CSV without CoTs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cot_support import LABELS, ChatServer, write_bare_csv


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer() as server:
        yield server


@pytest.fixture
def bare_csv(tmp_path, clips) -> Path:
    return write_bare_csv(tmp_path / "pairs.csv", clips, labels=LABELS)
