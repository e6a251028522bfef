"""The command line of the reward server; what concerns scoring has the names and defaults of `inference.py`."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from scoring.options import add_model_flags
from serving.limits import ServerLimits


def parse_arguments(argv: Sequence[str], *, description: str) -> argparse.Namespace:
    """The options as argparse gives them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines")
    add("--port", type=int, default=8000, help="0 for any that is free")
    add("--roots", nargs="+", default=[], metavar="DIR", help="folders whose videos may be asked for by path")
    add("--token_file", help="file with the token that clients must give")
    add("--grace_seconds", type=float, default=60.0, help="to finish what was accepted after SIGTERM")
    for limit in dataclasses.fields(ServerLimits):
        add(f"--{limit.name}", type=type(limit.default), default=limit.default, help=limit.metadata["help"])
    add_model_flags(parser)
    return parser.parse_args(argv)


def build_limits(options: argparse.Namespace) -> ServerLimits:
    """Raises ValueError for impossible limits."""
    return ServerLimits(**{limit.name: getattr(options, limit.name) for limit in dataclasses.fields(ServerLimits)})


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
