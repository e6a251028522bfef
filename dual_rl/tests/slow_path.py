"""The plain slow path, which the packed forward must equal.

Every response is a full sequence of its own through stock transformers: its own vision pass, stock positions, stock
attention, logits at every position over the whole vocabulary, and a second forward for the reward. It shares the
parameters of a PolicyModel, but no code with its forward.
"""

from collections.abc import Sequence

import torch
from torch import nn

from verl.config import ModelConfig
from verl.core.objective import PolicyOutput
from verl.data.scored_sequence import SequenceBuilder
from verl.model.building import build_policy, initial_state
from verl.model.policy import PolicyModel
from verl.model.reward_files import PolicyCheckpoint
from verl.types import Response, VideoPrompt


def load_policy(
    checkpoint: PolicyCheckpoint, settings: ModelConfig, *, frozen_dtype: torch.dtype = torch.float32
) -> PolicyModel:
    """A whole, unsharded PolicyModel on the CPU; `checkpoint` must hold its weights."""
    model = build_policy(checkpoint, settings, frozen_dtype=frozen_dtype)
    state = initial_state(model, checkpoint)
    fresh = {}
    for name, parameter in model.named_parameters():
        value = state[name].to(parameter.dtype, copy=True) if name in state else torch.empty(parameter.shape)
        owner, _, leaf = name.rpartition(".")
        fresh[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        setattr(model.get_submodule(owner), leaf, fresh[name])
    model.backbone.tie_weights()
    model.initialize_adapters({name: fresh[name] for name in fresh if name not in state})
    return model


def compute_separately(
    model: PolicyModel,
    groups: Sequence[tuple[VideoPrompt, Sequence[Response]]],
    builder: SequenceBuilder,
    *,
    temperature: float,
    reference: PolicyModel | None = None,
) -> tuple[PolicyOutput, torch.Tensor]:
    """Output in the order of `pack_groups`, fp32, all with gradient; and log-probs of the reference, [L] or empty."""
    rewards, log_probs, entropy, full_kl, ref_log_probs = [], [], [], [torch.empty(0)], [torch.empty(0)]
    for prompt, responses in groups:
        for response in responses:
            rewards.append(compute_reward(model, prompt, response, builder))
            ours = compute_log_distributions(model, prompt, response, builder, temperature=temperature)
            labels = torch.tensor([*response.cot_ids, builder.tokenizer.eos_token_id])[: response.num_labels].long()
            log_probs.append(ours.gather(1, labels.unsqueeze(1)).squeeze(1))
            entropy.append(-torch.special.xlogy(ours.exp(), ours.exp()).sum(dim=1))
            if reference is not None:
                with torch.no_grad():
                    theirs = compute_log_distributions(reference, prompt, response, builder, temperature=temperature)
                ref_log_probs.append(theirs.gather(1, labels.unsqueeze(1)).squeeze(1))
                full_kl.append((ours.exp() * torch.where(ours.isinf(), 0.0, ours - theirs)).sum(dim=1))
    parts = (torch.cat(values) for values in (log_probs, entropy, full_kl))
    return PolicyOutput(torch.stack(rewards), *parts), torch.cat(ref_log_probs)


def compute_reward(
    model: PolicyModel, prompt: VideoPrompt, response: Response, builder: SequenceBuilder
) -> torch.Tensor:
    """The head on the state at `<Reward>` of `prompt, CoT, <Reward>, EOS`: a scalar."""
    ids = [*prompt.input_ids.tolist(), *response.cot_ids, builder.reward_token_id, builder.tokenizer.eos_token_id]
    hidden = _stock_forward(model, ids, prompt, builder)["hidden"]
    return model.rm_head(hidden[len(ids) - 2].float()).squeeze()


def compute_log_distributions(
    model: PolicyModel, prompt: VideoPrompt, response: Response, builder: SequenceBuilder, *, temperature: float
) -> torch.Tensor:
    """Log of the policy's distribution at every label, fp32 [num_labels, vocab]; minus infinity where forbidden."""
    ids = [*prompt.input_ids.tolist(), *response.cot_ids, builder.tokenizer.eos_token_id]
    logits = _stock_forward(model, ids, prompt, builder)["logits"].float() / temperature
    first = prompt.input_ids.numel() - 1
    logits = logits[first : first + response.num_labels].index_fill(1, model.forbidden_ids, float("-inf"))
    return logits.log_softmax(dim=-1)


def _stock_forward(
    model: PolicyModel, ids: list[int], prompt: VideoPrompt, builder: SequenceBuilder
) -> dict[str, torch.Tensor]:
    """`logits` [length, vocab] and `hidden` [length, hidden] of one sequence; the model attends so from then on."""
    backbone, input_ids = model.backbone, torch.tensor([ids])
    grid_thw = torch.tensor([prompt.grid_thw])
    is_video = input_ids == backbone.config.video_token_id
    positions, _ = backbone.model.get_rope_index(input_ids, mm_token_type_ids=is_video * 2, video_grid_thw=grid_thw)
    embeddings = backbone.get_input_embeddings()(input_ids)
    is_reward = (input_ids == builder.reward_token_id).unsqueeze(-1)
    for part in (backbone.config, backbone.config.text_config, backbone.config.vision_config):
        part._attn_implementation = "sdpa"
    output = backbone(
        inputs_embeds=torch.where(is_reward, model.reward_embedding, embeddings),
        position_ids=positions,
        pixel_values_videos=builder.pixel_values(prompt),
        video_grid_thw=grid_thw,
        output_hidden_states=True,
        use_cache=False,
    )
    return {"logits": output.logits[0], "hidden": output.hidden_states[-1][0]}
