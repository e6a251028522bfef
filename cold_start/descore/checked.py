"""Remembers what was found sound, so that a second run or a resume looks only at what is new."""

import hashlib
import json
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from descore.progress import progress

logger = logging.getLogger(__name__)

FILE_NAME = "checked.sqlite"
ITEMS_PER_BLOCK = 1000
"""Items between two moments at which results are written down."""
KEYS_PER_QUERY = 500
MAX_THREADS = 8

Item = TypeVar("Item")


class CheckCache:
    """Results of checks by key, in the user's cache folder ($XDG_CACHE_HOME or ~/.cache).

    Ranks and runs may share it. Where it cannot be read or written, a warning says so and nothing is remembered.
    """

    def __init__(self) -> None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "descore"
        self._connection: sqlite3.Connection | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(folder / FILE_NAME, timeout=60)
            with self._connection:
                self._connection.execute("CREATE TABLE IF NOT EXISTS checked (key TEXT PRIMARY KEY, result TEXT)")
        except (OSError, sqlite3.Error) as error:
            self._give_up(folder, error)

    def get(self, keys: Sequence[str]) -> dict[str, object]:
        """The results of those keys that are known."""
        found: dict[str, object] = {}
        for start in range(0, len(keys), KEYS_PER_QUERY):
            if self._connection is None:
                break
            block = keys[start : start + KEYS_PER_QUERY]
            query = f"SELECT key, result FROM checked WHERE key IN ({','.join('?' * len(block))})"
            try:
                found |= {key: json.loads(result) for key, result in self._connection.execute(query, block)}
            except sqlite3.Error as error:
                self._give_up(FILE_NAME, error)
        return found

    def put(self, results: Mapping[str, object]) -> None:
        """Write results down; they must be JSON values."""
        if self._connection is None or not results:
            return
        rows = [(key, json.dumps(result)) for key, result in results.items()]
        try:
            with self._connection:
                self._connection.executemany("INSERT OR REPLACE INTO checked VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            self._give_up(FILE_NAME, error)

    def _give_up(self, path: str | os.PathLike, error: Exception) -> None:
        logger.warning("%s cannot be used (%s): checks of this run are not remembered", path, error)
        self._connection = None


def digest(*parts: object) -> str:
    """A key of what a check depends on."""
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

    `key` names everything that the result depends on; results of keys that were checked before are taken from the
    cache, errors are not kept. Checks run in `num_threads` threads, with their progress and the time left on stderr.
    """
    items = list(dict.fromkeys(items))
    cache = CheckCache()
    with ThreadPoolExecutor(min(num_threads, len(items)) or 1) as pool:
        keys = dict(zip(items, pool.map(lambda item: _try(key, item), items), strict=True))
        results = {item: value for item, value in keys.items() if isinstance(value, ValueError)}
        known = cache.get([value for value in keys.values() if not isinstance(value, ValueError)])
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
