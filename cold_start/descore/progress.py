"""Progress of long work: a bar on a terminal; elsewhere a line every 30 s, so that log files stay readable."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


class _Lines:
    """A file for tqdm that writes its bars as lines."""

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(
    items: Iterable | None = None, *, total: int | None = None, description: str, unit: str = "it", **options: object
) -> tqdm:
    """A tqdm bar over `items`, or one to update by hand; `options` are tqdm's."""
    if not sys.stderr.isatty():
        options |= {"file": _Lines(), "ascii": True, "ncols": 100, "miniters": 1}
        options |= {"mininterval": SECONDS_BETWEEN_LINES, "delay": SECONDS_BETWEEN_LINES}
    return tqdm(items, total=total, desc=description, unit=unit, dynamic_ncols=True, **options)
