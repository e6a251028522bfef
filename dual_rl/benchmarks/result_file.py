"""Where the benchmarks of this folder leave their results."""

import json
from collections.abc import Mapping
from pathlib import Path


def write_result(result: Mapping, path: Path | None) -> None:
    """Write `result` to a JSON file, whose folder is made; nothing for None.

    Benchmarks in several parts call it after each, so that one that is stopped leaves what it has measured.
    """
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
