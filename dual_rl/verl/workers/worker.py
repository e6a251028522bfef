"""One rank: the sharded policy, its optimizer and a rollout engine in one process. One Ray actor per GPU or CPU rank.

Every method is called on all ranks at once, because FSDP's collectives (and tensor-parallel engines) need them all.
"""

import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import ray
import torch

from verl.config import Config
from verl.core.losses import compute_kl
from verl.model.precision import resolve_precision
from verl.temporary import temporary_folder
from verl.types import PairRollout, Response, ResponseKey, Sampling, VideoPrompt
from verl.workers.experience import ExperienceMaker, RankBatch
from verl.workers.learner import Learner
from verl.workers.model_setup import build_rollout_engine, build_runtime, read_checkpoint, save_actor
from verl.workers.offload import WeightOffload
from verl.workers.parallel import iterate_weights, join_process_group
from verl.workers.state import load_training_state, save_training_state

GIB = 2**30


class Worker:
    """Cheap to construct; `start` joins the other ranks and loads the model."""

    def __init__(self, config: Config, rank: int, world_size: int) -> None:
        self.config = config
        self.index, self.world_size = rank, world_size
        self.engine_files = ExitStack()

    def choose_meeting_point(self) -> tuple[str, int]:
        """Address of this rank's node and a free port."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, address: str, port: int) -> None:
        """Join the process group, build the policy, the reference and the engine, and hand over the first weights."""
        actor = self.config.worker.actor
        self.rank = join_process_group(index=self.index, world_size=self.world_size, address=address, port=port)
        # Rank 0's copy of the weights must not outlive this line: it takes as much host memory as the model in fp32.
        self.runtime = build_runtime(
            read_checkpoint(self.config, with_weights=self.index == 0), self.config, self.rank
        )
        self.experience = ExperienceMaker(
            self.runtime,
            micro_batch_size=actor.micro_batch_size_per_device_for_experience,
            temperature=self.config.worker.rollout.temperature,
        )
        self.learner = Learner(self.runtime, self.experience, self.config)
        folder = self.engine_files.enter_context(temporary_folder("engine"))
        self.engine = build_rollout_engine(self.config, self.runtime, folder)
        self.is_engine_awake = True
        self.batch: RankBatch | None = None
        self.offloaded_weights = []
        if actor.offload.offload_params:
            self.offloaded_weights.append(WeightOffload(self.runtime.actor.parameters()))
        if self.config.worker.ref.offload.offload_params and self.runtime.reference is not None:
            self.offloaded_weights.append(WeightOffload(self.runtime.reference.parameters()))
        self.hand_over_weights()

    def hand_over_weights(self) -> None:
        """Give the engine the policy's current weights, in memory, and free the memory of the training step."""
        self.batch = None
        if not self.is_engine_awake:
            torch.cuda.empty_cache()
            self.engine.wake()
            self.is_engine_awake = True
        self._restore_policy()
        dtype = resolve_precision(self.config.worker.rollout.precision, self.rank.device)
        self.engine.load_weights(iterate_weights(self.runtime.actor, dtype=dtype))
        self._release_policy()

    def generate(self, prompts: Sequence[ray.ObjectRef], sampling: Sampling) -> list[list[Response]]:
        """n responses per video. `prompts`: one object per pair, its two VideoPrompts."""
        both: list[tuple[VideoPrompt, VideoPrompt]] = ray.get(list(prompts))
        return self.engine.generate([prompt for of_pair in both for prompt in of_pair], sampling)

    def prepare(self, mini_batches: Sequence[Sequence[PairRollout]], filler: PairRollout) -> dict[ResponseKey, float]:
        """Take this rank's pairs of a step, put the engine to sleep, and compute what is fixed before the update.

        Returns each response's summed KL to the reference if the reward takes it.
        """
        self.rollout_memory = self._device_memory()
        self.engine.sleep()
        self.is_engine_awake = False
        self._restore_policy()
        self.batch = batch = fetch_batch(mini_batches, filler)
        algorithm, actor = self.config.algorithm, self.config.worker.actor
        if actor.model.freeze_vision_tower:
            self.experience.encode_vision(batch)
        if algorithm.has_kl_reward or len(mini_batches) * actor.ppo_epochs > 1:
            batch.old_log_probs = self.experience.old_log_probs(batch)
        if not algorithm.disable_kl and algorithm.kl_penalty != "full":
            batch.ref_log_probs = self.experience.ref_log_probs(batch)
        if not algorithm.has_kl_reward:
            return {}
        return {
            key: float(compute_kl(old, batch.ref_log_probs[key], kind=algorithm.kl_penalty).sum())
            for key, old in batch.old_log_probs.items()
        }

    def update(self, advantages: Mapping[ResponseKey, float], step: int, lr_factor: float) -> dict[str, float]:
        """All optimizer steps on the pairs of `prepare`; returns metrics, the same on every rank but for memory."""
        assert self.batch is not None, "prepare comes before update"
        metrics = self.learner.learn(self.batch, advantages, step=step, lr_factor=lr_factor)
        if self.rank.device.type == "cuda":
            metrics["perf/rollout_memory_gib"] = self.rollout_memory
            metrics["perf/update_memory_gib"] = self._device_memory()  # its peak, which the allocator still holds
        return metrics

    def score(self, rollouts: Sequence[PairRollout], filler: PairRollout) -> dict[ResponseKey, float]:
        """The head's reward of every response."""
        self._restore_policy()
        rewards = self.experience.rewards(fetch_batch([rollouts], filler))
        self._release_policy()
        return rewards

    def save(self, folder: str) -> None:
        """Write `actor/`: Hugging Face model, head and, unless save_model_only, the state for resuming."""
        self._restore_policy()
        target = Path(folder) / "actor"
        dtype = resolve_precision(self.config.worker.actor.fsdp.precision, self.rank.device)
        save_actor(target, self.runtime, dtype=dtype)
        if not self.config.trainer.save_model_only:
            save_training_state(target, self.runtime.actor, self.runtime.optimizer)
        self._release_policy()

    def load(self, folder: str) -> None:
        """Resume from what `save` wrote, on any number of ranks, and hand over the weights."""
        self._restore_policy()
        load_training_state(Path(folder) / "actor", self.runtime.actor, self.runtime.optimizer)
        if self.config.worker.actor.offload.offload_optimizer:
            self.learner.moments.release()
        self.hand_over_weights()

    def close(self) -> None:
        """Remove the engine's files, in any state of this rank; the process is ended from outside."""
        self.engine_files.close()

    def _restore_policy(self) -> None:
        for weights in self.offloaded_weights:
            weights.restore()

    def _release_policy(self) -> None:
        """Free the device memory of the weights, if `offload_params` asks for it."""
        for weights in self.offloaded_weights:
            weights.release()
        torch.cuda.empty_cache()  # nothing on a CPU

    def _device_memory(self) -> float:
        """GiB of device memory in use, the engine's included; 0 on a CPU.

        Torch's own counter would include the sleeping engine's memory, although that is free again.
        """
        if self.rank.device.type != "cuda":
            return 0.0
        free, total = torch.cuda.mem_get_info()
        return (total - free) / GIB


def fetch_batch(mini_batches: Sequence[Sequence[PairRollout]], filler: PairRollout) -> RankBatch:
    """A rank's pairs with their prompts, from Ray's object store."""
    batch = RankBatch(mini_batches, filler, {})
    fetched = ray.get([rollout.prompts for rollout in batch.needed_rollouts])
    batch.prompts = {prompt.key: prompt for both in fetched for prompt in both}
    return batch
