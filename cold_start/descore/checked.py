"""Remembers what passed its checks, so that a second run or a resume looks only at what is new."""

import hashlib
import json
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from descore.progress import progress

logger = logging.getLogger(__name__)

FILE_NAME = "checked.sqlite"
ITEMS_PER_BLOCK = 1000
"""Results are written after every so many items."""
MAX_THREADS = 8

Item = TypeVar("Item")


class CheckCache:
    """Results of checks by key, in the user's cache folder ($XDG_CACHE_HOME or ~/.cache).

    Ranks and runs may share it. Where it cannot be read or written, a warning says so and nothing is remembered.
    """

    def __init__(self) -> None:
        self._path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "descore" / FILE_NAME
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = _open(self._path)
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)

    def get(self, keys: Iterable[str]) -> dict[str, object]:
        """The results of those keys that are known."""
        query = "SELECT result FROM checked WHERE key = ?"
        try:
            rows = ((key, self._connection.execute(query, (key,)).fetchone()) for key in keys)
            return {key: json.loads(row[0]) for key, row in rows if row}
        except sqlite3.Error as error:
            self._give_up(error)
            return {}

    def put(self, results: Mapping[str, object]) -> None:
        """Store results, which must be JSON values."""
        rows = [(key, json.dumps(result)) for key, result in results.items()]
        try:
            with self._connection:
                self._connection.executemany("INSERT OR REPLACE INTO checked VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        logger.warning("%s cannot be used (%s): checks of this run are not remembered", self._path, error)
        self._connection = _open(":memory:")


def _open(path: str | os.PathLike) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=60)
    with connection:
        connection.execute("CREATE TABLE IF NOT EXISTS checked (key TEXT PRIMARY KEY, result TEXT)")
    return connection


def digest(*parts: object) -> str:
    """A key made of everything that a check depends on."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def check_all(
    items: Iterable[Item],
    check: Callable[[Item], object],
    *,
    key: Callable[[Item], str],
    description: str,
    num_threads: int = 1,
    is_quiet: bool = False,
) -> dict[Item, object]:
    """What `check` returns for each distinct item, a JSON value, or the ValueError that it or `key` raises.

    `key` names everything that the result depends on; known results come from the cache, errors are never cached.
    Checks run in `num_threads` threads, with their progress and the time left on stderr.
    """
    items = list(dict.fromkeys(items))
    cache = CheckCache()
    with ThreadPoolExecutor(min(num_threads, len(items)) or 1) as pool:
        keys = dict(zip(items, pool.map(lambda item: _try(key, item), items), strict=True))
        results = {item: value for item, value in keys.items() if isinstance(value, ValueError)}
        known = cache.get(value for value in keys.values() if not isinstance(value, ValueError))
        results |= {item: known[keys[item]] for item in items if item not in results and keys[item] in known}
        missing = [item for item in items if item not in results]
        with progress(total=len(items), initial=len(results), description=description, disable=is_quiet) as bar:
            for start in range(0, len(missing), ITEMS_PER_BLOCK):
                block = missing[start : start + ITEMS_PER_BLOCK]
                fresh = {}
                for item, result in zip(block, pool.map(lambda item: _try(check, item), block), strict=True):
                    fresh[item] = result
                    bar.update()
                results |= fresh
                cache.put({keys[i]: result for i, result in fresh.items() if not isinstance(result, ValueError)})
    return results


def num_check_threads() -> int:
    """Threads for checks that wait for processes or files."""
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))


def _try(function: Callable[[Item], object], item: Item) -> object:
    try:
        return function(item)
    except ValueError as error:
        return error
