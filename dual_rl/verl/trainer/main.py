"""Stage 2's entry point: `python3 -m verl.trainer.main config=examples/config.yaml key=value ...`, from dual_rl/.

Settings, data, model files and the reward function are checked before a worker starts. A mistake ends in one message
and exit status 1.
"""

import logging
import sys
from collections.abc import Sequence

from verl.config import Config
from verl.config_loading import load_config
from verl.trainer.checkpoints import CheckpointFolder, find_resume, load_state, step_of
from verl.trainer.cluster import WorkerError, connect, disconnect
from verl.trainer.inputs import check_inputs, read_identity, require_same_run
from verl.trainer.trainer import DualTrainer

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

logger = logging.getLogger("verl")


def run(config: Config) -> None:
    """Train as `config` says. Raises ValueError or WorkerError with a message for the user."""
    checkpoints = CheckpointFolder(config.trainer.output_folder)
    checkpoints.lock()
    checkpoints.clean()
    checkpoint = find_resume(checkpoints, config.trainer)
    inputs = check_inputs(config)
    if checkpoint is not None:
        saved = read_identity(checkpoint, load_state(checkpoint))
        require_same_run(saved, inputs.identity, checkpoint=checkpoint)
    connect(config.trainer)
    trainer = DualTrainer(config, inputs, checkpoints, start_step=step_of(checkpoint) if checkpoint else 0)
    try:
        if checkpoint is not None:
            logger.info("continuing from %s", checkpoint)
            trainer.resume(checkpoint)
        trainer.fit()
        trainer.list_dropped()
    finally:
        trainer.close()


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("verl").setLevel(logging.INFO)
    try:
        run(load_config(argv))
    except (ValueError, WorkerError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command continues from the last checkpoint\n")
        return INTERRUPTED
    finally:
        disconnect()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
