"""Packed attention against plain attention over each sequence by itself."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import attention
from attention import packed_attention, packed_flash
from flash_kernels import FlashAttention2, FlashAttention4, has_flash4
from plain_kernels import PlainKernels

HEADS, KV_HEADS, DIM = 8, 2, 64
LENGTHS = {"unequal": [5, 130, 64, 1], "equal": [48, 48, 48]}


def run_packed(tensors, lengths, *, causal):
    bounds = torch.tensor([0, *lengths], device=tensors[0].device).cumsum(0).int()
    output, _ = packed_attention(
        SimpleNamespace(is_causal=causal),
        *tensors,
        None,
        scaling=DIM**-0.5,
        cu_seq_lens_q=bounds,
        max_length_q=max(lengths),
    )
    return output


def run_one_by_one(tensors, lengths, *, causal):
    """The same in float64 on the CPU, with keys and values repeated for their groups of heads."""
    query, key, value = (tensor.double().cpu() for tensor in tensors)
    key, value = (tensor.repeat_interleave(HEADS // KV_HEADS, dim=1) for tensor in (key, value))
    pieces = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*piece, is_causal=causal) for piece in pieces], dim=2).transpose(
        1, 2
    )


def relative_error(found, expected) -> float:
    return ((found.double().cpu() - expected).norm() / expected.norm()).item()


def compare(device, dtype, lengths, *, causal, runs=None) -> list[float]:
    """Relative errors of the output and of the three gradients."""
    torch.manual_seed(0)
    shapes = [(1, heads, sum(lengths), DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    tensors = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]
    weights = torch.randn(1, sum(lengths), HEADS, DIM, dtype=torch.float64)
    results = []
    for run in runs or (run_packed, run_one_by_one):
        output = run(tensors, lengths, causal=causal)
        gradients = torch.autograd.grad((output * weights.to(output)).sum(), tensors)
        results.append([output.detach(), *gradients])
    return [relative_error(found, expected.double().cpu()) for found, expected in zip(*results, strict=True)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_attention_equals_attention_one_by_one(lengths, causal):
    assert max(compare("cpu", torch.float32, lengths, causal=causal)) < 1e-5


def run_operator(query, key, value, lengths, *, causal):
    """As `run_packed` on a GPU."""
    flat = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    bounds = torch.tensor([0, *lengths], device=query.device).cumsum(0).int()
    return packed_flash(*flat, bounds, max(lengths), causal, DIM**-0.5)[0].unsqueeze(0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_flash_operator_equals_attention_one_by_one(request, monkeypatch, causal, is_compiled):
    """Compiled: within one graph, with what stands around it."""
    monkeypatch.setattr(attention, "choose_kernels", lambda _: PlainKernels)

    def run(tensors, lengths, *, causal):
        return 1.5 * run_operator(*(2 * tensor for tensor in tensors), lengths, causal=causal)

    def expect(tensors, lengths, *, causal):
        return 1.5 * run_one_by_one([2 * tensor for tensor in tensors], lengths, causal=causal)

    if is_compiled:
        request.getfixturevalue("compiling")
        run = torch.compile(run, dynamic=True, fullgraph=True, backend="aot_eager")
    for lengths in LENGTHS.values():
        errors = compare("cpu", torch.float32, lengths, causal=causal, runs=(run, expect))
        assert max(errors) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_attention_on_a_gpu_equals_attention_one_by_one(lengths, causal, dtype, bound):
    assert max(compare("cuda", dtype, lengths, causal=causal)) < bound


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", [FlashAttention2, FlashAttention4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_flash_kernels_equal_attention_one_by_one(monkeypatch, lengths, causal, kernels):
    if kernels is FlashAttention4 and not has_flash4(torch.device("cuda")):
        pytest.skip("flash-attn-4 is not installed, or this is no Hopper GPU")
    monkeypatch.setattr(attention, "choose_kernels", lambda _: kernels)
    assert max(compare("cuda", torch.bfloat16, lengths, causal=causal)) < 2e-2
