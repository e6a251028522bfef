"""Serves the rewards of a model over HTTP. README.md says more, serving/app.py describes the routes.

    python serve.py --model_ckpt CHECKPOINT --roots /data/videos
    python serve.py --model_ckpt CHECKPOINT --host 0.0.0.0 --token_file token.txt      for other machines

The model is on one GPU, the first that CUDA_VISIBLE_DEVICES names. Clients: reward_client.py.
"""

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging as transformers_logging

from scoring.options import build_source
from scoring.source import choose_prompt_length, load_model_scale, read_checkpoint
from serving.app import RewardService
from serving.metrics import ServerMetrics
from serving.options import build_limits, parse_arguments, read_token
from serving.paths import AllowedRoots
from serving.scoring_thread import ScoringThread
from serving.server import choose_port, run_server
from verl.temporary import temporary_folder

SECONDS_TO_CLOSE = 20.0
"""For the engine to end after its last step; one that is in the middle of a long step ends with the process."""

logger = logging.getLogger("verl.serve")


def build_service(options: argparse.Namespace, folder: Path) -> RewardService:
    """Everything but the port, after a look at checkpoint and settings. Raises ValueError for mistakes."""
    source, limits, metrics = build_source(options), build_limits(options), ServerMetrics()
    roots, token = AllowedRoots(options.roots), read_token(options.token_file)
    checkpoint = read_checkpoint(source.model_ckpt, source.rm_ckpt, fresh_head_seed=source.fresh_head_seed)
    choose_prompt_length(checkpoint, source.settings)
    scale = load_model_scale(source.model_ckpt, checkpoint, source.settings) if options.normalize else None
    scoring = ScoringThread(source.load, max_queue=limits.max_queue, metrics=metrics)
    return RewardService(scoring, source.model_ckpt, folder, roots, limits, metrics, token, scale)


def serve(options: argparse.Namespace) -> tuple[int, bool]:
    """Serve until told to stop; the exit status, and whether the engine has ended."""
    with temporary_folder("server") as folder:
        service = build_service(options, folder)
        port = choose_port(options.host, options.port)
        tempfile.tempdir = str(folder)  # bodies on their way and the engine's files go with it
        if service.token is None and options.host not in ("127.0.0.1", "::1", "localhost"):
            logger.warning("without --token_file, everyone who reaches %s can use the server", options.host)
        logger.info("listening on %s port %d", options.host, port)
        service.scoring.start()
        status = run_server(service, options.host, port, grace_seconds=options.grace_seconds)
        service.scoring.join(SECONDS_TO_CLOSE if service.scoring.has_model else 0.0)
    return status, not service.scoring.is_alive()


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 0 after SIGTERM or Ctrl-C, 1 for a mistake or a failure of the engine."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("verl").setLevel(logging.INFO)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        status, has_ended = serve(parse_arguments(argv, description=__doc__))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    if not has_ended:
        sys.stderr.flush()
        os._exit(status)  # a thread inside the engine would crash the interpreter's own way out
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
