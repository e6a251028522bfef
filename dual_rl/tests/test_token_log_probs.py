"""Log-probs, entropy and full KL against torch.distributions over whole logits."""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from verl.core import token_log_probs
from verl.core.token_log_probs import Distributions, compute_token_log_probs

NUM_LABELS, HIDDEN, VOCAB = 11, 16, 50
FORBIDDEN = torch.tensor([3, 4, 48, 49])


def make_inputs(dtype=torch.float32, device="cpu", num_labels=NUM_LABELS):
    generator = torch.Generator().manual_seed(0)
    states, weight, ref_states, ref_weight = (
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in ((num_labels, HIDDEN), (VOCAB, HIDDEN), (num_labels, HIDDEN), (VOCAB, HIDDEN))
    )
    labels = torch.randint(5, 48, (num_labels,), generator=generator).to(device)
    return states.requires_grad_(), weight.requires_grad_(), labels, Distributions(ref_states, ref_weight)


def plain_distribution(states, weight, temperature) -> Categorical:
    """The policy's distribution in float64, from whole logits."""
    logits = states.double() @ weight.double().t() / temperature
    return Categorical(logits=logits.index_fill(1, FORBIDDEN.to(logits.device), float("-inf")))


def compute(inputs, temperature, *, with_reference=True):
    states, weight, labels, reference = inputs
    return compute_token_log_probs(
        states,
        weight,
        labels,
        temperature=temperature,
        forbidden_ids=FORBIDDEN.to(states.device),
        reference=reference if with_reference else None,
    )


def compare_with_plain(inputs, temperature) -> list[float]:
    """Relative errors of log-probs, entropy, KL, and the gradients of states and head weight."""
    states, weight, labels, reference = inputs
    factors = torch.linspace(-1, 2, len(labels), device=labels.device)
    found = compute(inputs, temperature)
    policy = plain_distribution(states, weight, temperature)
    allowed = torch.tensor([i for i in range(VOCAB) if i not in FORBIDDEN], device=labels.device)
    ours, theirs = (
        Categorical(logits=plain_distribution(*factors_of, temperature).logits[:, allowed])
        for factors_of in ((states, weight), (reference.states, reference.head_weight))
    )
    expected = (policy.log_prob(labels), ours.entropy(), kl_divergence(ours, theirs))
    gradients = [
        torch.autograd.grad((log_probs * factors + kl).sum(), (states, weight))
        for log_probs, _, kl in (found, expected)
    ]
    pairs = [*zip(found, expected, strict=True), *zip(*gradients, strict=True)]
    return [((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in pairs]


@pytest.mark.parametrize(("temperature", "rows"), [(1.0, 4), (0.6, 1), (0.6, NUM_LABELS)])
def test_values_and_gradients_equal_those_of_whole_logits(monkeypatch, temperature, rows):
    monkeypatch.setattr(token_log_probs, "CHUNK_ELEMENTS", rows * VOCAB)
    assert max(compare_with_plain(make_inputs(), temperature)) < 1e-5


@pytest.mark.gpu
def test_bf16_operands_give_fp32_logits_on_a_gpu(monkeypatch):
    monkeypatch.setattr(token_log_probs, "CHUNK_ELEMENTS", 4 * VOCAB)
    errors = compare_with_plain(make_inputs(torch.bfloat16, "cuda"), 0.6)
    assert max(errors[:3]) < 1e-4
    assert max(errors[3:]) < 1e-2


def test_logits_of_all_rows_never_exist_together(monkeypatch):
    monkeypatch.setattr(token_log_probs, "CHUNK_ELEMENTS", 2 * VOCAB)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        output = compute(make_inputs(), 1.0, with_reference=False)
    assert output.kl is None
    assert max(sizes) == VOCAB * HIDDEN  # the head itself is the largest thing that is kept
    output.log_probs.sum().backward()


def test_without_labels_the_empty_result_is_attached_to_the_graph():
    inputs = make_inputs(num_labels=0)
    output = compute(inputs, 1.0)
    assert output.log_probs.shape == output.entropy.shape == output.kl.shape == (0,)
    output.log_probs.sum().backward()
    assert inputs[0].grad.shape == (0, HIDDEN)


def test_forbidden_tokens_and_entropy_get_no_gradient():
    inputs = make_inputs()
    output = compute(inputs, 0.0, with_reference=False)
    assert not output.entropy.requires_grad
    output.log_probs.sum().backward()
    assert inputs[1].grad[FORBIDDEN].abs().max() == 0
    assert inputs[1].grad.abs().sum() > 0
    assert torch.equal(output.log_probs, compute(inputs, 1.0).log_probs)  # greedy counts as temperature 1
