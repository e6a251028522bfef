"""Attention over shared-prompt rows and packed frames against plain masked attention in float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from plain_kernels import PlainKernels
from verl.core.packing import SharedPromptLayout
from verl.model.attention import SharedPromptFlash, merge_attention, shared_prompt_attention
from verl.model.flash_kernels import FlashAttention2, FlashAttention4, has_flash4

HEADS, KV_HEADS, DIM = 8, 2, 64
SCALING = 0.9 * DIM**-0.5
LAYOUTS = {
    "one": SharedPromptLayout((3,), ((2,),)),
    "unequal": SharedPromptLayout((70, 1, 130), ((65, 1, 129), (4,), (1, 1))),
    "equal": SharedPromptLayout((48, 48), ((32, 32), (32, 32))),
}


def run_module(query, key, value, layout):
    return shared_prompt_attention(None, query, key, value, None, scaling=SCALING, layout=layout)[0]


def run_merged_passes(query, key, value, layout, kernels=PlainKernels):
    flat = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return SharedPromptFlash.apply(*flat, layout, SCALING, kernels, merge_attention).unsqueeze(0)


def run_masked(query, key, value, layout):
    """float64 on the CPU with the whole mask: earlier, and of the prompt or of the same response."""
    segment, group = [], []
    for index, (prompt, responses) in enumerate(zip(layout.prompt_lengths, layout.response_lengths, strict=True)):
        for number, length in enumerate((prompt, *responses)):
            segment += [number] * length
            group += [index] * length
    segment, group = torch.tensor(segment), torch.tensor(group)
    is_seen = (group[:, None] == group) & ((segment[:, None] == segment) | (segment == 0))
    is_seen &= torch.ones_like(is_seen).tril()
    query, key, value = (tensor.double().cpu() for tensor in (query, key, value))
    key, value = (tensor.repeat_interleave(HEADS // KV_HEADS, dim=1) for tensor in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=is_seen, scale=SCALING).transpose(1, 2)


def relative_errors(run, layout, device="cpu", dtype=torch.float32) -> list[float]:
    """Of the output and of the three gradients."""
    torch.manual_seed(0)
    num_tokens = layout.num_tokens
    shapes = [(1, heads, num_tokens, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    tensors = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]
    weights = torch.randn(1, num_tokens, HEADS, DIM, dtype=torch.float64)
    results = []
    for attend in (run, run_masked):
        output = attend(*tensors, layout)
        gradients = torch.autograd.grad((output * weights.to(output)).sum(), tensors)
        results.append([output.detach(), *gradients])
    return [
        ((found.double().cpu() - expected.double().cpu()).norm() / expected.double().cpu().norm()).item()
        for found, expected in zip(*results, strict=True)
    ]


@pytest.mark.parametrize("run", [run_module, run_merged_passes])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_shared_prompt_attention_equals_masked_attention(layout, run):
    assert max(relative_errors(run, layout)) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_shared_prompt_attention_on_a_gpu_equals_masked_attention(layout, dtype, bound):
    assert max(relative_errors(run_module, layout.to("cuda"), "cuda", dtype)) < bound


@pytest.fixture(params=[FlashAttention2, FlashAttention4])
def flash(request):
    """The kernels of both packages; skips what this machine cannot run."""
    if request.param is FlashAttention4 and not has_flash4(torch.device("cuda")):
        pytest.skip("flash-attn-4 is not installed, or this is no Hopper GPU")
    return request.param


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_merged_flash_passes_equal_masked_attention(flash, layout, dtype):
    errors = relative_errors(partial(run_merged_passes, kernels=flash), layout.to("cuda"), "cuda", dtype)
    assert max(errors) < 2e-2


@pytest.mark.gpu
def test_flash_kernels_share_heads_and_return_the_lse(flash):
    layout = LAYOUTS["unequal"]
    bounds = (layout.segment_bounds,) * 2
    longest = (layout.longest_segment,) * 2
    torch.manual_seed(0)
    tensors = [torch.randn(layout.num_tokens, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    tensors = [tensor.bfloat16().float() for tensor in tensors]
    arguments = {"is_causal": True, "scaling": SCALING}
    expected = PlainKernels.forward(*tensors, bounds, longest, **arguments)
    on_gpu = [tensor.cuda().bfloat16() for tensor in tensors]
    found = flash.forward(*on_gpu, tuple(b.cuda() for b in bounds), longest, **arguments)
    torch.testing.assert_close(found[0].float().cpu(), expected[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(found[1].float().cpu(), expected[1], rtol=1e-3, atol=1e-3)


def frames_attended(tensors, lengths, device):
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    arguments = {"cu_seq_lens_q": bounds, "max_length_q": max(lengths)}
    return shared_prompt_attention(None, *tensors, None, scaling=SCALING, **arguments)[0]


@pytest.mark.parametrize(
    ("device", "dtype", "bound"),
    [("cpu", torch.float32, 1e-5), pytest.param("cuda", torch.bfloat16, 2e-2, marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize("lengths", [[16], [24, 24, 6, 16, 16]])
def test_frames_attend_to_themselves_only(lengths, device, dtype, bound):
    torch.manual_seed(0)
    tensors = [torch.randn(1, HEADS, sum(lengths), DIM, device=device, dtype=dtype) for _ in range(3)]
    pieces = zip(*(tensor.double().split(lengths, dim=2) for tensor in tensors), strict=True)
    expected = torch.cat([F.scaled_dot_product_attention(*piece, scale=SCALING) for piece in pieces], dim=2)
    error = frames_attended(tensors, lengths, device).double() - expected.transpose(1, 2)
    assert (error.norm() / expected.norm()).item() < bound
