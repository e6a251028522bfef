"""Which layers keep their activations for the backward pass, and which compute them again.

Recomputing a layer costs another forward pass; keeping its activations costs device memory. Before each forward pass
with a gradient, as many layers keep theirs as the device has room for: first text layers, which save more time per
byte, then vision blocks; of each kind the last ones, whose memory is freed first. The bytes that a layer keeps per
token (a block per patch) are measured in the first such pass, in which one layer of each kind keeps its activations.
"""

from collections.abc import Sequence

import torch
from torch import nn

SPARE_SHARE = 0.06
"""Share of device memory left free for fragmentation and whatever else a step allocates."""
SPARE_BYTES = 3 * 2**30
"""Left free for gradient buckets and the vision tower's backward pass."""
WORKING_LAYERS = 2
"""Room, in layers that keep, for the layer being recomputed and its gradients."""


class _Stack:
    """Layers of one kind. `size`: tokens or patches of the next pass; `most`: how many layers may keep activations."""

    def __init__(self, layers: Sequence[nn.Module], device: torch.device, *, most: int) -> None:
        self.layers = layers
        self.device = device
        self.most = most
        self.size = 0
        self.num_kept = 0
        self._bytes_per_unit: float | None = None
        layers[-1].forward = self._measured(layers[-1].forward)

    def keep(self, room: float) -> float:
        """Choose by the free bytes (until it is measured, one layer keeps); returns the bytes left over."""
        if self._bytes_per_unit is None:
            fitting, by_layer = 1, 0.0
        else:
            by_layer = self._bytes_per_unit * self.size
            fitting = max(0, int(room / by_layer) - WORKING_LAYERS)
        self.num_kept = min(fitting, self.most)
        first_kept = len(self.layers) - self.num_kept
        for number, layer in enumerate(self.layers):
            layer.gradient_checkpointing = number < first_kept
        return room - (self.num_kept + WORKING_LAYERS) * by_layer

    @property
    def is_kept(self) -> bool:
        """Whether all layers keep theirs."""
        return self.num_kept == len(self.layers)

    def _measured(self, forward):
        def measure(*arguments, **named):
            before = torch.cuda.memory_allocated(self.device)
            output = forward(*arguments, **named)
            if torch.is_grad_enabled() and self.size and self._bytes_per_unit is None:
                self._bytes_per_unit = max(1, torch.cuda.memory_allocated(self.device) - before) / self.size
            return output

        return measure


class ActivationPlan:
    """Chooses, before each forward pass with a gradient, which layers recompute in the backward pass.

    `layers`: the text layers in order, with gradient checkpointing enabled; `vision_blocks`: the same of the vision
    tower. `trained`: the parameters that get gradients. `max_kept`: maximum number of text layers that keep
    activations, None for as many as fit; with fewer than all, no vision block keeps any. Without a GPU every layer
    recomputes.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        trained: Sequence[nn.Parameter],
        device: torch.device,
        *,
        max_kept: int | None = None,
        vision_blocks: Sequence[nn.Module] = (),
    ) -> None:
        self.layers = layers
        self.trained = trained
        self.device = device
        self.is_active = device.type == "cuda"
        if self.is_active:
            most = len(layers) if max_kept is None else min(max_kept, len(layers))
            self._text = _Stack(layers, device, most=most)
            most_blocks = len(vision_blocks) if most == len(layers) else 0
            self._vision = _Stack(vision_blocks, device, most=most_blocks) if vision_blocks else None

    @property
    def num_kept(self) -> int:
        """Number of text layers that keep activations."""
        return self._text.num_kept if self.is_active else 0

    @property
    def num_kept_blocks(self) -> int:
        """Number of vision blocks that keep activations."""
        return self._vision.num_kept if self.is_active and self._vision else 0

    def prepare(self, num_tokens: int, *, num_patches: int = 0) -> None:
        """Choose for a row of `num_tokens` tokens whose videos have `num_patches` patches."""
        if not self.is_active:
            return
        self._text.size = num_tokens
        room = self._text.keep(self._count_room())
        if self._vision:
            self._vision.size = num_patches
            self._vision.keep(room if self._text.is_kept else 0.0)

    def _count_room(self) -> float:
        free, total = torch.cuda.mem_get_info(self.device)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        missing_gradients = sum(p.numel() * p.element_size() for p in self.trained if p.grad is None)
        return free + cached - SPARE_SHARE * total - SPARE_BYTES - missing_gradients
