"""Stage 2's entry point: `python3 -m verl.trainer.main config=examples/config.yaml key=value ...`, from dual_rl/.

Everything that can be wrong with settings, data, model files and the reward function is looked at before a worker
starts. A mistake ends in one message and exit status 1.
"""

import logging
import sys
from collections.abc import Sequence

import ray

from verl.data.batches import BatchStream
from verl.trainer.checkpoints import CheckpointFolder, find_resume, load_state, step_of
from verl.trainer.cluster import WorkerError, WorkerGroup, connect
from verl.trainer.config import Config
from verl.trainer.generation import Generator
from verl.trainer.preflight import Inputs, check_inputs, check_same_model
from verl.trainer.settings import check_resume, load_config, output_folder, read_config
from verl.trainer.tracking import Tracker
from verl.trainer.trainer import DualTrainer, Parts, count_steps
from verl.trainer.validation import Validator

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

logger = logging.getLogger("verl")


def run(config: Config) -> None:
    """Train as `config` says. Raises ValueError or WorkerError with a message for people."""
    checkpoints = CheckpointFolder(output_folder(config.trainer))
    checkpoints.lock()
    checkpoints.clean()
    checkpoint = find_resume(checkpoints, config.trainer)
    if checkpoint is not None:
        check_resume(read_config(checkpoint), config)
    inputs = check_inputs(config)
    if checkpoint is not None:
        check_same_model(load_state(checkpoint).get("model"), inputs.model_identity, checkpoint=checkpoint)
    connect(config.trainer)
    trainer, tracker = build_trainer(config, inputs, checkpoints, start_step=step_of(checkpoint) if checkpoint else 0)
    try:
        if checkpoint is not None:
            logger.info("continuing from %s", checkpoint)
            trainer.resume(checkpoint)
        trainer.fit()
        trainer.workers.call("close")
    finally:
        inputs.loader.close()
        tracker.close()


def build_trainer(
    config: Config, inputs: Inputs, checkpoints: CheckpointFolder, *, start_step: int
) -> tuple[DualTrainer, Tracker]:
    """Start the workers and put the parts together."""
    data = config.data
    stream = BatchStream(inputs.train_pairs, batch_size=data.rollout_batch_size, shuffle=data.shuffle, seed=data.seed)
    workers = WorkerGroup(config)
    generator = Generator(config, workers, inputs)
    validator = Validator(config, inputs.val_pairs, generator, workers) if inputs.val_pairs else None
    tracker = Tracker(config, start_step, num_steps=count_steps(config, stream))
    parts = Parts(workers, stream, generator, validator, checkpoints, tracker, inputs.model_identity)
    return DualTrainer(config, parts, start_step=start_step), tracker


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
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
