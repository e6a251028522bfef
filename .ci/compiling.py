"""A fixture of both stages' tests."""

import pytest
from torch._dynamo.utils import counters


@pytest.fixture
def compiling(monkeypatch):
    """torch.compile compiles, even if an engine of vLLM turned that off in this process, and the test must use it."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    counters.clear()
    yield
    assert counters["stats"]["unique_graphs"] > 0
