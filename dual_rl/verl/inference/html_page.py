"""One self-contained HTML page to look through scored videos: what it holds, and how it is written.

The content is embedded as JSON, the page's own script draws it: see html_report.js. Nothing in it can run or load:
the JSON cannot end its element, the script inserts text as text, and a content security policy names the hashes of the
page's own script and style and allows no sources but the clips, which lie beside the page by relative path.
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from verl.inference.report_charts import Bars, Points
from verl.trainer.checkpoints import write_atomically

TEMPLATE = Path(__file__).with_name("html_report.html")
"""Its style and script lie beside it."""
POLICY = (
    "default-src 'none'; media-src 'self' file:; style-src {style}; script-src {script}; "
    "base-uri 'none'; form-action 'none'"
)
SUFFIXES = (".html", ".htm")
_PLACE = re.compile(r"@(POLICY|STYLE|SCRIPT|DATA)@")
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class Table:
    """Text in rows and columns; `note` says how to read it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class View:
    """The rows as one label column sees them: per row `labels` +1, -1, 0 or None, and one of `Page.verdicts`."""

    name: str
    labels: tuple[int | None, ...]
    verdicts: tuple[str, ...]
    charts: tuple[Bars | Points, ...]
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class Item:
    """A video and what the model made of it. `clip`: URL relative to the page, None without a file.

    `name`: for people. `reward`: as shown, None for an unscored one. `note`: what a reader must know, such as why it
    has no score.
    """

    clip: str | None
    name: str
    reward: float | None
    thought: str | None
    note: str


@dataclass(frozen=True)
class Row:
    """A pair, or a single video. `items`, `prompt`: places in `Page.items` and `Page.prompts`; `models`: of the items.

    `numbers`: in the order of `Page.sorts`. `facets`: per name in `Page.facets` the values that it is found under.
    `score_columns`, `scores`: sub-scores, one line a dimension, which comes first; empty without.
    """

    number: int
    items: tuple[int, ...]
    prompt: int
    models: tuple[str, ...]
    summary: str
    numbers: tuple[float | None, ...]
    facets: tuple[tuple[str, ...], ...]
    score_columns: tuple[str, ...]
    scores: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Page:
    """All that is shown. `main`: the place of the view to begin with. `sides`: names of a row's items, "" for one.

    `verdicts`: what rows are filtered by; `facets` likewise, each with a choice among the values that occur.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    tables: tuple[Table, ...]
    failures: tuple[str, ...]
    sides: tuple[str, ...]
    sorts: tuple[str, ...]
    verdicts: tuple[str, ...]
    facets: tuple[str, ...]
    main: int
    views: tuple[View, ...]
    prompts: tuple[str, ...]
    items: tuple[Item, ...]
    rows: tuple[Row, ...]


def check_page_path(path: str | os.PathLike) -> None:
    """Raises ValueError for a name that browsers would not open as a page."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"the report is {path}; name a .html file")


def write_page(path: str | os.PathLike, page: Page) -> None:
    """Write the page, complete or not at all; its folder is made if need be."""
    path = Path(path)
    check_page_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render_page(page))


def render_page(page: Page) -> str:
    """The HTML."""
    template, style, script = (TEMPLATE.with_suffix(suffix).read_text() for suffix in (".html", ".css", ".js"))
    policy = POLICY.format(style=_hash_source(style), script=_hash_source(script))
    parts = {"POLICY": policy, "STYLE": style, "SCRIPT": script, "DATA": embed_json(page)}
    return _PLACE.sub(lambda match: parts[match[1]], template)


def embed_json(content: object) -> str:
    """JSON that can stand in a script element: `<` only as an escape, no NaN, no half of a surrogate pair."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=vars)
    return _LONE_SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text.replace("<", "\\u003c"))


def _hash_source(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def relative_path(video: str | os.PathLike, page: str | os.PathLike) -> str:
    """Path of a file as seen from the page's folder, links to folders followed on both sides."""
    target, folder = Path(video), Path(page).resolve().parent
    return Path(os.path.relpath(target.parent.resolve() / target.name, folder)).as_posix()


def quote_path(path: str) -> str:
    """The URL of a relative path, whatever its bytes are."""
    return quote(os.fsencode(path))


def merge_scores(by_column: Sequence[dict[str, str]]) -> tuple[tuple[str, ...], ...]:
    """Lines of a table: dimension, then its score in each column, "-" where one has none; in order of first mention.

    Example: ({"subject": "2"}, {"style": "0", "subject": "1"}) -> (("subject", "2", "1"), ("style", "-", "0")).
    """
    dimensions = dict.fromkeys(name for scores in by_column for name in scores)
    return tuple((name, *(scores.get(name, "-") for scores in by_column)) for name in dimensions)
