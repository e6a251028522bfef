"""The command line of the reward server; what concerns scoring has the names and defaults of `inference.py`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from verl.inference.options import add_model_flags
from verl.serving.limits import ServerLimits


def parse_arguments(argv: Sequence[str], *, description: str) -> argparse.Namespace:
    """The options as argparse gives them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines")
    add("--port", type=int, default=8000, help="0 for any that is free")
    add("--roots", nargs="+", default=[], metavar="DIR", help="folders whose videos may be asked for by path")
    add("--token_file", help="file with the token that clients must give")
    add("--grace_seconds", type=float, default=60.0, help="to finish what was accepted after SIGTERM")
    _add_limits(parser)
    add_model_flags(parser)
    return parser.parse_args(argv)


def build_limits(options: argparse.Namespace) -> ServerLimits:
    """Raises ValueError for limits that cannot be."""
    return ServerLimits(**{name: getattr(options, name) for name in ServerLimits.__dataclass_fields__})


def read_token(path: str | None) -> str | None:
    """The token in a file, None without one. Raises ValueError for a file without a token."""
    if path is None:
        return None
    try:
        token = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--token_file {path}: {error}") from error
    if not token or not token.isprintable() or " " in token:
        raise ValueError(f"--token_file {path}: it must hold one word, such as `openssl rand -hex 32` writes")
    return token


def _add_limits(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, ServerLimits()
    add("--max_body_mb", type=float, default=default.max_body_mb, help="of one upload")
    add("--max_videos", type=int, default=default.max_videos, help="of one request")
    add("--max_prompt_chars", type=int, default=default.max_prompt_chars)
    add("--max_queue", type=int, default=default.max_queue, help="videos that wait; more are refused with 503")
    add("--max_receiving", type=int, default=default.max_receiving, help="bodies on their way at a time")
    add("--body_timeout", type=float, default=default.body_timeout, help="seconds for the whole of a body")
