"""Which text layers keep their activations for the backward pass, and which compute them again.

Computing a layer again costs its forward pass once more; keeping costs device memory. Before each forward pass with a
gradient as many layers keep as the device has room for, the last ones, whose memory is free again first. What a layer
keeps for each token is measured in the first such pass, in which one layer keeps.
"""

from collections.abc import Sequence

import torch
from torch import nn

SPARE_SHARE = 0.06
"""Of device memory, left free for fragmentation and what else a step allocates."""
SPARE_BYTES = 3 * 2**30
"""Left free for buckets of gradients and the vision tower's backward pass."""
WORKING_LAYERS = 2
"""Room, in layers that keep, for the one that is computed again and its gradients."""


class ActivationPlan:
    """Chooses, before each forward pass with a gradient, which of `layers` compute again in the backward pass.

    `layers`: the text layers, made with gradient checkpointing, in order. `trained`: the parameters that the backward
    pass makes gradients for. `max_kept`: most layers that may keep theirs, None for as many as fit. Off GPUs every
    layer computes again.
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
        if self.is_active:
            layers[-1].forward = self._measured(layers[-1].forward)

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
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        missing_gradients = sum(p.numel() * p.element_size() for p in self.trained if p.grad is None)
        room = free + cached - SPARE_SHARE * total - SPARE_BYTES - missing_gradients
        by_layer = self._bytes_per_token * num_tokens
        return max(0, int(room / by_layer) - WORKING_LAYERS)

    def _measured(self, forward):
        def measure(*arguments, **named):
            before = torch.cuda.memory_allocated(self.device)
            output = forward(*arguments, **named)
            if torch.is_grad_enabled() and self._num_tokens and self._bytes_per_token is None:
                self._bytes_per_token = (torch.cuda.memory_allocated(self.device) - before) / self._num_tokens
            return output

        return measure
