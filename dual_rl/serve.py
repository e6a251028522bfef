"""Serves the rewards of a model over HTTP. README.md says more, serving/app.py describes the routes.

    python serve.py --model_ckpt CHECKPOINT --roots /data/videos
    python serve.py --model_ckpt CHECKPOINT --host 0.0.0.0 --token_file token.txt      for other machines
    python serve.py --model_ckpt CHECKPOINT --num_replicas auto                         one engine on each GPU

The model is on one GPU, the first that CUDA_VISIBLE_DEVICES names, or a copy of it on each of several GPUs of this
machine, or of the Ray cluster that RAY_ADDRESS names. Clients: reward_client.py.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from scoring.options import add_model_flags, add_settings, configure_console
from serving.requests import ServerLimits
from serving.server import serve


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Flags about scoring have the names and defaults of inference.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines")
    add("--port", type=int, default=8000, help="0 for any that is free")
    add("--roots", nargs="+", default=[], metavar="DIR", help="folders whose videos clients may name by path")
    add("--token_file", help="file with the token that clients must give")
    add("--grace_seconds", type=float, default=60.0, help="to finish what was accepted after SIGTERM")
    add("--num_replicas", type=read_count, default=1, help="engines, by Ray Serve if several; auto: one per free GPU")
    add_settings(parser, ServerLimits)
    add_model_flags(parser)
    return parser.parse_args(argv)


def read_count(text: str) -> int | None:
    """A positive number, or None for auto."""
    if text != "auto" and not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text} is neither a positive number nor auto")
    return None if text == "auto" else int(text)


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 0 after SIGTERM or Ctrl-C, 1 for a mistake or a failure of the engine."""
    configure_console()
    try:
        status, has_ended = serve(parse_arguments(argv))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    if not has_ended:
        sys.stderr.flush()
        os._exit(status)  # a thread inside the engine would crash the interpreter's own way out
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
