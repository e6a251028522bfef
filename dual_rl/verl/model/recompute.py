"""Which text layers keep their activations for the backward pass, and which recompute them.

Recomputing a layer costs its forward pass once more; keeping costs device memory. Before each forward pass with a
gradient, as many layers keep as fit on the device: the last ones, whose memory is freed first. The bytes that a layer
keeps per token are measured in the first such pass, in which one layer keeps.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

SPARE_SHARE = 0.06  # of device memory, for fragmentation and other allocations of a step
SPARE_BYTES = 3 * 2**30  # for a chunk of logits and its temporaries
WORKING_LAYERS = 2  # room, in layers that keep, for the one that is being recomputed and its gradients


class ActivationPlan:
    """Chooses, before each forward pass with a gradient, which of `layers` recompute in the backward pass.

    `layers`: the text layers in order, with gradient checkpointing. `trained`: the parameters that get gradients.
    `max_kept`: how many layers may keep theirs, None for as many as fit. On CPUs every layer recomputes.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        trained: Sequence[nn.Parameter],
        device: torch.device,
        *,
        max_kept: int | None = None,
    ) -> None:
        self.layers = layers
        self.trained = trained
        self.device = device
        self.max_kept = len(layers) if max_kept is None else min(max_kept, len(layers))
        self.is_active = device.type == "cuda"
        self.num_kept = 0
        self._num_tokens = 0  # of the row that `prepare` was called for
        self._bytes_per_token: float | None = None
        self._unusable_bytes = 0
        if self.is_active:
            layers[-1].forward = self._measured(layers[-1].forward)

    def start(self) -> None:
        """Call before the passes of a step: notes cached memory that is not usable (a sleeping engine's)."""
        if self.is_active:
            torch.cuda.empty_cache()
            self._unusable_bytes = self._cached_bytes()

    def prepare(self, num_tokens: int) -> None:
        """Choose for a row of `num_tokens` tokens."""
        if not self.is_active:
            return
        self._num_tokens = num_tokens
        num_fitting = 1 if self._bytes_per_token is None else self._count_fitting(num_tokens)
        self.num_kept = min(num_fitting, self.max_kept)
        first_kept = len(self.layers) - self.num_kept
        for number, layer in enumerate(self.layers):
            layer.gradient_checkpointing = number < first_kept

    def _count_fitting(self, num_tokens: int) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        missing_gradients = sum(_local_bytes(parameter) for parameter in self.trained if parameter.grad is None)
        cached = self._cached_bytes() - self._unusable_bytes
        room = free + cached - SPARE_SHARE * total - SPARE_BYTES - missing_gradients
        by_layer = self._bytes_per_token * num_tokens
        return max(0, int(room / by_layer) - WORKING_LAYERS)

    def _cached_bytes(self) -> int:
        return torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def _measured(self, forward):
        def measure(*arguments, **named):
            before = torch.cuda.memory_allocated(self.device)
            output = forward(*arguments, **named)
            if torch.is_grad_enabled() and self._num_tokens and self._bytes_per_token is None:
                self._bytes_per_token = (torch.cuda.memory_allocated(self.device) - before) / self._num_tokens
            return output

        return measure


def _local_bytes(parameter: nn.Parameter) -> int:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local.numel() * local.element_size()
