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
pytestmark = [
    pytest.mark.parametrize("causal", [False, True]),
    pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS),
]


def attend_packed(query, key, value, *, lengths, causal):
    bounds = torch.tensor([0, *lengths], device=query.device).cumsum(0).int()
    row = {"cu_seq_lens_q": bounds, "max_length_q": max(lengths)}
    module = SimpleNamespace(is_causal=causal)
    return packed_attention(module, query, key, value, None, scaling=DIM**-0.5, **row)[0]


def attend_by_operator(query, key, value, *, lengths, causal):
    """As `attend_packed` on a GPU."""
    flat = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    bounds = torch.tensor([0, *lengths], device=query.device).cumsum(0).int()
    return packed_flash(*flat, bounds, max(lengths), causal, DIM**-0.5)[0].unsqueeze(0)


def attend_one_by_one(*tensors, lengths, causal):
    """The same in float64 on the CPU, with keys and values repeated for their groups of heads."""
    query, key, value = (tensor.double().cpu() for tensor in tensors)
    key, value = (tensor.repeat_interleave(HEADS // KV_HEADS, dim=1) for tensor in (key, value))
    pieces = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [F.scaled_dot_product_attention(*piece, is_causal=causal) for piece in pieces]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def largest_error(attend, lengths, causal, *, device="cpu", dtype=torch.float32, is_compiled=False) -> float:
    """Largest relative error of the output and the three gradients; compiled, with some work around the attention."""
    torch.manual_seed(0)
    shapes = [(1, heads, sum(lengths), DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    tensors = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]
    weights = torch.randn(1, sum(lengths), HEADS, DIM, dtype=torch.float64)
    results, factor = [], 1.5 if is_compiled else 1.0
    for function in (attend, attend_one_by_one):

        def run(*tensors, function=function):
            return factor * function(*(factor * tensor for tensor in tensors), lengths=lengths, causal=causal)

        if is_compiled and function is attend:
            run = torch.compile(run, dynamic=True, fullgraph=True, backend="aot_eager")
        output = run(*tensors)
        gradients = torch.autograd.grad((output * weights.to(output)).sum(), tensors)
        results.append([tensor.detach().double().cpu() for tensor in (output, *gradients)])
    return max(float((found - expected).norm() / expected.norm()) for found, expected in zip(*results, strict=True))


def test_packed_attention_equals_attention_one_by_one(lengths, causal):
    assert largest_error(attend_packed, lengths, causal) < 1e-5


@pytest.mark.parametrize("is_compiled", [False, True])
def test_flash_operator_equals_attention_one_by_one(request, monkeypatch, lengths, causal, is_compiled):
    """Compiled: within one graph, with what stands around it."""
    monkeypatch.setattr(attention, "choose_kernels", lambda _: PlainKernels)
    if is_compiled:
        request.getfixturevalue("compiling")
    assert largest_error(attend_by_operator, lengths, causal, is_compiled=is_compiled) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
def test_packed_attention_on_a_gpu_equals_attention_one_by_one(lengths, causal, dtype, bound):
    assert largest_error(attend_packed, lengths, causal, device="cuda", dtype=dtype) < bound


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", [FlashAttention2, FlashAttention4])
def test_flash_kernels_equal_attention_one_by_one(monkeypatch, lengths, causal, kernels):
    if kernels is FlashAttention4 and not has_flash4(torch.device("cuda")):
        pytest.skip("flash-attn-4 is not installed, or this is not a Hopper GPU")
    monkeypatch.setattr(attention, "choose_kernels", lambda _: kernels)
    assert largest_error(attend_packed, lengths, causal, device="cuda", dtype=torch.bfloat16) < 2e-2
