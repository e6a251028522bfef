"""One rank: the sharded policy, its optimizer and a rollout engine in one process. A Ray actor per GPU or CPU rank.

Every method is called on all ranks at once, because FSDP's collectives (and tensor-parallel engines) need them all.
"""

import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import ray
import torch

from verl.model.precision import resolve_precision
from verl.temporary import temporary_folder
from verl.trainer.config import Config
from verl.types import SIDES, PairRollout, PreferencePair, ResponseKey, Sampling, VideoKey, VideoPrompt
from verl.workers.experience import ExperienceMaker, sum_kl_by_response
from verl.workers.model_setup import build_rollout_engine, build_runtime, save_actor
from verl.workers.offload import WeightOffload
from verl.workers.parallel import iterate_weights, join_process_group
from verl.workers.shard import Shard
from verl.workers.state import load_training_state, save_training_state
from verl.workers.updater import Updater

GIB = 2**30
PairPrompts = tuple[VideoPrompt, VideoPrompt]


class Worker:
    """Made empty and cheaply; `start` joins the other ranks and loads the model."""

    def __init__(self, config: Config, rank: int, world_size: int) -> None:
        self.config = config
        self.index, self.world_size = rank, world_size

    def choose_meeting_point(self, port: int) -> tuple[str, int]:
        """Address of this rank's node and `port`, or a free one for 0. Raises ValueError when the port is taken."""
        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # closed connections of the last run may linger
            try:
                probe.bind(("", port))
                probe.listen()
            except OSError as error:
                raise ValueError(
                    f"port {port} on {address} is in use; choose another with trainer.master_port, or 0 for a free one"
                ) from error
            return address, probe.getsockname()[1]

    def start(self, address: str, port: int) -> None:
        """Join the process group, build the policy, the reference and the engine, and hand the first weights over."""
        actor = self.config.worker.actor
        self.rank = join_process_group(index=self.index, world_size=self.world_size, address=address, port=port)
        self.runtime = build_runtime(self.config, self.rank)
        self.experience = ExperienceMaker(
            self.runtime,
            micro_batch_size=actor.micro_batch_size_per_device_for_experience,
            temperature=self.config.worker.rollout.temperature,
        )
        self.updater = Updater(self.runtime, self.experience, self.config)
        self.engine_files = ExitStack()
        folder = self.engine_files.enter_context(temporary_folder("engine"))
        self.engine = build_rollout_engine(self.config, self.runtime, folder)
        self.is_engine_awake = True
        self.shard: Shard | None = None
        self.offloaded_weights = self._find_offloaded_weights()
        self.hand_over_weights()

    def hand_over_weights(self) -> None:
        """Give the engine the policy's current weights, in memory, and free what the training step held."""
        self.shard = None
        if not self.is_engine_awake:
            self._release_device_memory()
            self.engine.wake()
            self.is_engine_awake = True
        self._restore_policy()
        dtype = resolve_precision(self.config.worker.rollout.precision, self.rank.device)
        self.engine.load_weights(iterate_weights(self.runtime.actor, dtype=dtype))
        self._release_policy()

    def generate(
        self, pairs: Sequence[PreferencePair], prompts: Sequence[ray.ObjectRef], sampling: Sampling
    ) -> list[PairRollout]:
        """Write n responses for both videos of each pair. `prompts`: one object of PairPrompts per pair."""
        fetched: list[PairPrompts] = ray.get(list(prompts))
        responses = self.engine.generate([prompt for both in fetched for prompt in both], sampling)
        by_pair = zip(pairs, fetched, responses[0::2], responses[1::2], strict=True)
        return [
            PairRollout(
                pair=pair,
                responses_a=tuple(responses_a),
                responses_b=tuple(responses_b),
                prompt_tokens=tuple(prompt.input_ids.numel() for prompt in both),
            )
            for pair, both, responses_a, responses_b in by_pair
        ]

    def prepare_step(
        self, mini_batches: Sequence[Sequence[PairRollout]], prompts: Mapping[int, ray.ObjectRef]
    ) -> dict[ResponseKey, float]:
        """Take this rank's pairs of a step, put the engine to sleep, and compute what is fixed before the update.

        `prompts`: by pair_id. Returns each response's summed KL to the reference where that goes into the reward.
        """
        self.rollout_memory = self._device_memory()
        self.engine.sleep()
        self.is_engine_awake = False
        self._restore_policy()
        self.shard = self._build_shard(mini_batches, prompts)
        algorithm, actor = self.config.algorithm, self.config.worker.actor
        if actor.model.freeze_vision_tower:
            self.experience.encode_vision(self.shard)
        has_kl_in_reward = not algorithm.disable_kl and not algorithm.use_kl_loss
        if has_kl_in_reward or len(mini_batches) * actor.ppo_epochs > 1:
            self.shard.old_log_probs = self.experience.old_log_probs(self.shard)
        if not algorithm.disable_kl and algorithm.kl_penalty != "full":
            self.shard.ref_log_probs = self.experience.ref_log_probs(self.shard)
        return sum_kl_by_response(self.shard, kind=algorithm.kl_penalty) if has_kl_in_reward else {}

    def update(self, advantages: Mapping[ResponseKey, float], step: int, lr_factor: float) -> dict[str, float]:
        """All optimizer steps on the pairs of `prepare_step`; returns metrics, the same on every rank."""
        assert self.shard is not None, "prepare_step comes before update"
        metrics = self.updater.update(self.shard, advantages, step=step, lr_factor=lr_factor)
        return {**metrics, **self._memory_metrics()}

    def score(self, rollouts: Sequence[PairRollout], prompts: Mapping[int, ray.ObjectRef]) -> dict[ResponseKey, float]:
        """The head's reward of every response."""
        self._restore_policy()
        shard = self._build_shard([rollouts], prompts)
        rewards = self.experience.rewards(shard)
        self._release_policy()
        return rewards

    def save(self, folder: str) -> None:
        """Write `actor/`: Hugging Face model, head, and unless save_model_only the state for resuming."""
        self._restore_policy()
        target = Path(folder) / "actor"
        dtype = resolve_precision(self.config.worker.actor.fsdp.precision, self.rank.device)
        save_actor(target, self.runtime, dtype=dtype)
        if not self.config.trainer.save_model_only:
            save_training_state(target, self.runtime.actor, self.runtime.optimizer)
        self._release_policy()

    def load(self, folder: str) -> None:
        """Continue from what `save` wrote, on any number of ranks, and hand the weights over."""
        self._restore_policy()
        load_training_state(Path(folder) / "actor", self.runtime.actor, self.runtime.optimizer)
        self.hand_over_weights()

    def close(self) -> None:
        """Remove the engine's files; the process is ended from outside."""
        self.engine_files.close()

    def _build_shard(
        self, mini_batches: Sequence[Sequence[PairRollout]], prompts: Mapping[int, ray.ObjectRef]
    ) -> Shard:
        pair_ids = [rollout.pair.pair_id for mini_batch in mini_batches for rollout in mini_batch]
        fetched: list[PairPrompts] = ray.get([prompts[pair_id] for pair_id in pair_ids])
        by_video = {
            VideoKey(pair_id, side): prompt
            for pair_id, both in zip(pair_ids, fetched, strict=True)
            for side, prompt in zip(SIDES, both, strict=True)
        }
        return Shard(tuple(tuple(mini_batch) for mini_batch in mini_batches), by_video)

    def _find_offloaded_weights(self) -> list[WeightOffload]:
        actor, reference = self.config.worker.actor.offload, self.config.worker.ref.offload
        models = [self.runtime.actor] if actor.offload_params else []
        if reference.offload_params and self.runtime.reference is not None:
            models.append(self.runtime.reference)
        return [WeightOffload(model.parameters()) for model in models]

    def _restore_policy(self) -> None:
        for weights in self.offloaded_weights:
            weights.restore()

    def _release_policy(self) -> None:
        """Give up the device memory of the weights, where `offload_params` asks for that."""
        for weights in self.offloaded_weights:
            weights.release()
        self._release_device_memory()

    def _memory_metrics(self) -> dict[str, float]:
        """Device memory while responses are written and in the update, whose peak the allocator still holds.

        Not torch's own counter, which counts the sleeping engine's memory although the device has it back.
        """
        if self.rank.device.type != "cuda":
            return {}
        return {
            "perf/update_memory_gib": self._device_memory() / GIB,
            "perf/rollout_memory_gib": self.rollout_memory / GIB,
        }

    def _device_memory(self) -> int:
        """Bytes of device memory in use, the engine's included."""
        if self.rank.device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info()
        return total - free

    def _release_device_memory(self) -> None:
        if self.rank.device.type == "cuda":
            torch.cuda.empty_cache()
