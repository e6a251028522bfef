"""Which layers keep their activations, in both stages: as many as a GPU has room for; none on CPUs."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import recompute
from model_support import DUAL_RL
from verl.model.recompute import SPARE_BYTES, SPARE_SHARE, WORKING_LAYERS, ActivationPlan

GIB = 2**30
KEPT_BYTES = GIB
NUM_LAYERS = 10


class Layer(nn.Module):
    gradient_checkpointing = True

    def forward(self, device: str) -> torch.Tensor:
        """Keeps KEPT_BYTES, as long as the caller keeps the result."""
        return torch.empty(KEPT_BYTES, dtype=torch.uint8, device=device)


@pytest.fixture(params=[recompute.ActivationPlan, ActivationPlan], ids=["stage 1", "stage 2"])
def kind(request):
    """The class of either stage."""
    return request.param


def count_kept(plan) -> int:
    """Layers that keep; they must be the last ones."""
    recomputed = [layer.gradient_checkpointing for layer in plan.layers]
    assert recomputed == sorted(recomputed, reverse=True)
    return recomputed.count(False)


@pytest.fixture
def room_for_six() -> Iterator[None]:
    """Fills the GPU up but for what six layers need beside the parts that are spared."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    left = SPARE_SHARE * total + SPARE_BYTES + (6 + WORKING_LAYERS + 1.5) * KEPT_BYTES  # one is kept while measured
    ballast = torch.empty(int(free - left), dtype=torch.uint8, device="cuda")
    yield
    del ballast
    torch.cuda.empty_cache()


def measured_plan(kind, *, trained=(), **options):
    """A plan after its first pass of 1000 tokens, and what that pass keeps."""
    plan = kind([Layer() for _ in range(NUM_LAYERS)], list(trained), torch.device("cuda"), **options)
    plan.prepare(1000)
    assert count_kept(plan) == min(1, options.get("max_kept", 1))
    return plan, plan.layers[-1]("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnGpu:
    def test_the_first_pass_keeps_one_layer_and_later_ones_what_fits(self, kind, room_for_six):
        plan, _kept = measured_plan(kind)
        for num_tokens, expected in ((1000, 6), (100, NUM_LAYERS), (100_000, 0)):
            plan.prepare(num_tokens)
            assert count_kept(plan) == expected

    def test_gradients_that_are_still_to_come_take_room(self, kind, room_for_six):
        parameter = nn.Parameter(torch.empty(3 * GIB // 4, device="meta"))  # 3 GiB in fp32
        plan, _kept = measured_plan(kind, trained=[parameter])
        plan.prepare(1000)
        assert count_kept(plan) == 3

    @pytest.mark.parametrize("limit", [0, 2])
    def test_a_limit_keeps_fewer(self, kind, room_for_six, limit):
        plan, _kept = measured_plan(kind, max_kept=limit)
        plan.prepare(1000)
        assert count_kept(plan) == limit

    def test_vision_blocks_keep_what_text_layers_leave(self, room_for_six):
        blocks = [Layer() for _ in range(5)]
        plan, _kept = measured_plan(recompute.ActivationPlan, vision_blocks=blocks)
        plan.prepare(1000, num_patches=1000)
        _kept_block = blocks[-1]("cuda")
        plan.prepare(100, num_patches=100)
        assert count_kept(plan) == NUM_LAYERS
        assert [block.gradient_checkpointing for block in blocks] == [False] * 5
        plan.prepare(1000, num_patches=1000)
        assert [block.gradient_checkpointing for block in blocks] == [True] * 5


def test_on_a_cpu_every_layer_recomputes(kind):
    plan = kind([Layer() for _ in range(NUM_LAYERS)], [], torch.device("cpu"))
    plan.prepare(10)
    assert count_kept(plan) == 0


@pytest.mark.slow
def test_the_table_of_other_sizes_is_what_its_script_computes():
    command, environment = [sys.executable, "benchmarks/plan_memory.py"], os.environ | {"PYTHONPATH": "."}
    rows = subprocess.run(command, cwd=DUAL_RL, env=environment, capture_output=True, text=True, check=True).stdout
    *rows, measured = rows.splitlines()
    assert "\n".join(rows) in (DUAL_RL / "MEASUREMENTS.md").read_text()
    assert measured == "within 0.5 GiB of what was measured"
