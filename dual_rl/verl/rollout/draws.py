"""Draws of a whole batch in one launch, inside vLLM on a GPU.

By itself vLLM launches a kernel for each seeded request and token, and takes every token's log-prob to the host, where
each becomes an object. Here one kernel draws for all rows, by a counter (`draw_kernel`), and log-probs stay on the
device until the responses are finished. A logits processor, which changes no logits, tracks which request is in which
row; `install` replaces vLLM's own draw.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch


def can_draw_on(device: torch.device) -> bool:
    """Whether the kernel runs there: on GPUs, and anywhere in Triton's interpreter."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class _Row:
    """Of the batch. `output_ids` is vLLM's own list, which grows with the response."""

    seed: int
    slot: int
    output_ids: list[int]


class DeviceDraws:
    """The draws of one engine, and the log-probs of what was drawn."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rows: dict[int, _Row] = {}
        self.slots: dict[int, int] = {}
        self.log_probs = torch.zeros(1, 1, device=device)

    def begin(self, seeds: Sequence[int], *, max_tokens: int) -> None:
        """Make room for the log-probs of the responses with these seeds."""
        self.slots = {seed: slot for slot, seed in enumerate(dict.fromkeys(seeds))}
        self.log_probs = torch.zeros(len(self.slots), max_tokens, device=self.device)

    def end(self) -> dict[int, torch.Tensor]:
        """By seed, float32 [max_tokens] on the CPU: the log-prob of each token of the response, then zeros."""
        log_probs = self.log_probs.cpu()
        return {seed: log_probs[slot] for seed, slot in self.slots.items()}

    def logits_processor(self) -> type:
        """The class for vLLM's `logits_processors`."""
        from vllm.v1.sample.logits_processor import LogitsProcessor, process_dict_updates

        draws = self

        class FollowRows(LogitsProcessor):
            def __init__(self, vllm_config, device: torch.device, is_pin_memory: bool) -> None:
                """Nothing to keep here."""

            def is_argmax_invariant(self) -> bool:
                return True

            def update_state(self, batch_update) -> None:
                process_dict_updates(draws.rows, batch_update, draws._row)

            def apply(self, logits: torch.Tensor) -> torch.Tensor:
                return logits

        return FollowRows

    def install(self, llm) -> None:
        """Replace the draw of vLLM's sampler, in the worker of this process."""
        llm.collective_rpc(_replace_draw, args=(_Draw(self),))

    def _row(self, parameters, _prompt_ids, output_ids: list[int]) -> _Row | None:
        if parameters.seed is None:
            return None
        return _Row(parameters.seed, self.slots.get(parameters.seed, -1), output_ids)

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """Token ids int64 [num_rows] from logits [num_rows, vocab] after temperature and cuts."""
        from verl.rollout.draw_kernel import draw_tokens

        rows = [self.rows[index] for index in range(len(logits))]
        table = [[row.seed for row in rows], [len(row.output_ids) for row in rows], [row.slot for row in rows]]
        on_host = torch.tensor(table, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        return draw_tokens(logits, on_host.to(self.device, non_blocking=True), self.log_probs)


class _Draw(torch.nn.Module):
    """Replaces vLLM's `TopKTopPSampler`."""

    def __init__(self, draws: DeviceDraws) -> None:
        super().__init__()
        self.draws = draws

    def forward(
        self, logits: torch.Tensor, generators: dict, top_k: torch.Tensor | None, top_p: torch.Tensor | None
    ) -> tuple[torch.Tensor, None]:
        """Tokens, and no log-probs for vLLM to take along."""
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

        return self.draws.draw(apply_top_k_top_p(logits, top_k, top_p)), None


def _replace_draw(worker, draw: _Draw) -> None:
    worker.model_runner.sampler.topk_topp_sampler = draw
