"""Which layers keep their activations, in both stages: by what a device has room for. Its numbers are given here."""

import pytest
import torch
from torch import nn

import recompute
from verl.model.recompute import ActivationPlan

GIB = 2**30
TOTAL = 80 * GIB


class Layer(nn.Module):
    gradient_checkpointing = True

    def forward(self, device: "Device", num_bytes: int) -> None:
        """Keeps so much."""
        device.allocated += num_bytes


class Device:
    """What CUDA would say; `allocated` grows by `bytes_of_layer` in a layer that keeps."""

    def __init__(self, monkeypatch, *, free: int, allocated: int = 10 * GIB, cached: int = 0) -> None:
        self.free, self.allocated, self.cached = free, allocated, cached
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (self.free, TOTAL))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: self.allocated)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: self.allocated + self.cached)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


PLANS = {"stage 1": recompute.ActivationPlan, "stage 2": ActivationPlan}


@pytest.fixture(params=PLANS.values(), ids=PLANS)
def kind(request):
    """The class of either stage."""
    return request.param


def make_plan(kind=ActivationPlan, trained=(), **options) -> ActivationPlan:
    layers = [Layer() for _ in range(10)]
    return kind(layers, list(trained), torch.device("cuda"), **options)


def recomputed(plan: ActivationPlan) -> list[bool]:
    return [layer.gradient_checkpointing for layer in plan.layers]


def measure(plan: ActivationPlan, device: Device, *, num_tokens: int, bytes_of_layer: int) -> None:
    """The first pass, in which the last layer is seen to keep so much."""
    plan.prepare(num_tokens)
    plan.layers[-1](device, bytes_of_layer)


def test_the_first_pass_keeps_one_layer_and_later_ones_what_fits(monkeypatch, kind):
    device = Device(monkeypatch, free=40 * GIB)
    plan = make_plan(kind)
    measure(plan, device, num_tokens=1000, bytes_of_layer=4 * GIB)
    assert recomputed(plan) == [True] * 9 + [False]
    plan.prepare(1000)  # 40 less 3 and 6% of 80, by 4: 8 layers, of which 2 are room to work in
    assert recomputed(plan) == [True] * 4 + [False] * 6
    plan.prepare(500)
    assert recomputed(plan) == [False] * 10
    plan.prepare(100_000)
    assert recomputed(plan) == [True] * 10


def test_cached_memory_counts_but_not_what_was_cached_before_the_step(monkeypatch):
    device = Device(monkeypatch, free=20 * GIB, cached=20 * GIB)
    plan = make_plan()
    plan.start()  # the cache of a sleeping engine
    measure(plan, device, num_tokens=1000, bytes_of_layer=4 * GIB)
    plan.prepare(1000)
    assert plan.num_kept == 1
    device.cached += 20 * GIB
    plan.prepare(1000)
    assert plan.num_kept == 6


def test_gradients_that_are_still_to_come_take_room(monkeypatch, kind):
    device = Device(monkeypatch, free=40 * GIB)
    parameter = nn.Parameter(torch.empty(3 * GIB, device="meta"))  # 12 GiB in fp32
    plan = make_plan(kind, trained=[parameter])
    measure(plan, device, num_tokens=1000, bytes_of_layer=4 * GIB)
    plan.prepare(1000)
    assert plan.num_kept == 3


def make_plan_with_blocks(device: Device, **options) -> recompute.ActivationPlan:
    """Stage 1's with vision blocks that keep 2 GiB each, text layers 4, for the same row; after its first pass."""
    blocks = [Layer() for _ in range(5)]
    plan = make_plan(recompute.ActivationPlan, vision_blocks=blocks, **options)
    plan.prepare(1000, num_patches=8000)
    assert (plan.num_kept, plan.num_kept_blocks) == (min(1, options.get("max_kept", 1)),) * 2
    blocks[-1](device, 2 * GIB)
    plan.layers[-1](device, 4 * GIB)
    return plan


@pytest.mark.parametrize(
    ("free", "layers", "blocks"),
    [(50, 8, 0), (56, 10, 0), (62, 10, 1), (66, 10, 3), (100, 10, 5)],  # 48 GiB and 3 and 4.8 that are spared: text
)
def test_vision_blocks_keep_what_text_layers_leave(monkeypatch, free, layers, blocks):
    device = Device(monkeypatch, free=free * GIB)
    plan = make_plan_with_blocks(device)
    plan.prepare(1000, num_patches=8000)
    assert (plan.num_kept, plan.num_kept_blocks) == (layers, blocks)
    assert [block.gradient_checkpointing for block in plan._vision.layers] == [True] * (5 - blocks) + [False] * blocks


def test_with_a_limit_for_text_layers_no_vision_block_keeps(monkeypatch):
    device = Device(monkeypatch, free=100 * GIB)
    plan = make_plan_with_blocks(device, max_kept=0)
    plan.prepare(1000, num_patches=8000)
    assert (plan.num_kept, plan.num_kept_blocks) == (0, 0)


@pytest.mark.parametrize(("limit", "expected"), [(0, 0), (2, 2), (99, 6), (None, 6)])
def test_a_limit_keeps_fewer(monkeypatch, kind, limit, expected):
    device = Device(monkeypatch, free=40 * GIB)
    plan = make_plan(kind, max_kept=limit)
    measure(plan, device, num_tokens=1000, bytes_of_layer=4 * GIB)
    plan.prepare(1000)
    assert plan.num_kept == expected


def test_on_a_cpu_every_layer_recomputes(kind):
    layers = [Layer(), Layer()]
    plan = kind(layers, [], torch.device("cpu"))
    plan.prepare(10)
    assert all(layer.gradient_checkpointing for layer in layers)


def test_a_pass_that_was_not_announced_runs_and_is_not_measured(kind, monkeypatch):
    device = Device(monkeypatch, free=40 * GIB)
    plan = make_plan(kind)
    plan.layers[-1](device, 4 * GIB)
    plan.prepare(1000)
    assert plan.num_kept == 1  # as in a first pass
