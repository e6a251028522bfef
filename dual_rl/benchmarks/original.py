"""The original's algorithm for the update, rebuilt on stock transformers.

Every response is a sequence of its own with its own copy of the prompt. A pass runs the vision tower, the text layers
and vocabulary logits at every position. Old and reference log-probs are a pass each; the update is one pass with
backward for the policy loss, and then, for each (A_i, B_i), a pass each over A_i and B_i for Bradley-Terry, whose
logits nobody reads. Text layers are recomputed in the backward pass.

Rebuilt generously: no padding, flash attention in text (SDPA) and vision, pixels already on the device, no FSDP, and
gradients that agree with ours (the original attached rewards to other rollouts).
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from harness import DEVICE, clock
from pairs import Work
from verl.config import Config
from verl.data.scored_sequence import SequenceBuilder
from verl.model.building import build_policy
from verl.model.policy import PolicyModel
from verl.model.reward_files import PolicyCheckpoint
from verl.types import Response, ResponseKey, VideoKey

CLIP_LOW, CLIP_HIGH = 0.2, 0.3
ADAPTER_STD = 0.01


class OriginalUpdate:
    """`model`: an unsharded policy on the device; its LoRA weights and head receive gradients."""

    def __init__(self, model: PolicyModel, builder: SequenceBuilder, *, bt_weight: float, kl_coef: float) -> None:
        self.model, self.builder, self.bt_weight, self.kl_coef = model, builder, bt_weight, kl_coef
        self.device = next(model.parameters()).device
        self.dtype = model.embedding_weight.dtype
        self.model.backbone.config.text_config._attn_implementation = "sdpa"
        self._pixels: dict[VideoKey, torch.Tensor] = {}

    def load_pixels(self, work: Work) -> None:
        """Preprocess the videos onto the device; not part of what is timed."""
        for rollout in work.rollouts:
            for side in "AB":
                key = VideoKey(rollout.pair.pair_id, side)
                pixels = self.builder.pixel_values(work.prompts[key], self.device)
                self._pixels[key] = pixels.to(self.dtype)

    def run(self, work: Work) -> dict[str, float]:
        """One step; seconds by phase, and the loss."""
        seconds: dict[str, float] = {}
        self.model.zero_grad(set_to_none=True)
        with clock(seconds, "old"):
            old = self.log_probs(work)
        with clock(seconds, "reference"), self.model.adapter_disabled():
            reference = self.log_probs(work)
        with clock(seconds, "update"):
            loss = self.update(work, old, reference)
        return {**seconds, "loss": loss}

    @torch.no_grad()
    def log_probs(self, work: Work) -> dict[ResponseKey, torch.Tensor]:
        """Of every response's tokens: old ones, and with the adapter off the reference's."""
        self.model.eval()
        result = {
            response.key: self._log_probs(response, work)
            for rollout in work.rollouts
            for response in rollout.responses
        }
        self.model.train()
        return result

    def update(
        self,
        work: Work,
        old: Mapping[ResponseKey, torch.Tensor],
        reference: Mapping[ResponseKey, torch.Tensor],
    ) -> float:
        """Accumulate the gradient of the whole loss, pair by pair; returns the loss."""
        num_tokens = sum(response.num_labels for rollout in work.rollouts for response in rollout.responses)
        num_pairs = sum(len(rollout.responses_a) for rollout in work.rollouts)
        total = torch.zeros((), device=self.device)
        for rollout in work.rollouts:
            for response in rollout.responses:
                key = response.key
                log_probs = self._log_probs(response, work)
                loss = self._policy_loss(log_probs, old[key], reference[key], work.advantages[key]) / num_tokens
                loss.backward()
                total += loss.detach()
            for chosen, rejected in zip(rollout.responses_a, rollout.responses_b, strict=True):
                margin = (self._reward(chosen, work) - self._reward(rejected, work)) * rollout.pair.preference
                loss = -self.bt_weight * F.logsigmoid(margin) / num_pairs
                loss.backward()
                total += loss.detach()
        return total.item()

    def _policy_loss(self, log_probs, old, reference, advantage: float) -> torch.Tensor:
        ratio = (log_probs - old).exp()
        clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
        policy = -torch.minimum(ratio * advantage, clipped * advantage).sum()
        difference = reference - log_probs
        kl = (difference.exp() - difference - 1).sum()
        return policy + self.kl_coef * kl

    def _log_probs(self, response: Response, work: Work) -> torch.Tensor:
        ids = [*response.cot_ids, self.builder.tokenizer.eos_token_id]
        output, prompt_length = self._forward(ids, response.key.video, work)
        labels = torch.tensor(ids, device=self.device)
        logits = output.logits[0].float()  # of every position, in fp32
        logits[:, self.model.forbidden_ids] = -1e30
        return -F.cross_entropy(logits[prompt_length - 1 : -1], labels, reduction="none")

    def _reward(self, response: Response, work: Work) -> torch.Tensor:
        ids = [*response.cot_ids, self.builder.reward_token_id, self.builder.tokenizer.eos_token_id]
        output, _ = self._forward(ids, response.key.video, work, output_hidden_states=True)
        return (output.hidden_states[-1][0, -2].float() @ self.model.rm_head.weight[0].float()).squeeze()

    def _forward(self, tail: list[int], key: VideoKey, work: Work, **arguments):
        """Output over `prompt, tail`, and the prompt's length."""
        prompt, backbone = work.prompts[key], self.model.backbone
        input_ids = torch.tensor([[*prompt.input_ids.tolist(), *tail]])
        grid_thw = torch.tensor([prompt.grid_thw])
        is_video = input_ids == backbone.config.video_token_id
        positions, _ = backbone.model.get_rope_index(
            input_ids, mm_token_type_ids=is_video * 2, video_grid_thw=grid_thw
        )
        input_ids = input_ids.to(self.device)
        embeddings = backbone.get_input_embeddings()(input_ids)
        is_reward = (input_ids == self.builder.reward_token_id).unsqueeze(-1)
        output = backbone(
            inputs_embeds=torch.where(is_reward, self.model.reward_embedding.to(embeddings.dtype), embeddings),
            position_ids=positions.to(self.device),
            pixel_values_videos=self._pixels[key],
            video_grid_thw=grid_thw.to(self.device),
            use_cache=False,
            **arguments,
        )
        return output, prompt.input_ids.numel()


def build_original(checkpoint: PolicyCheckpoint, config: Config, *, dtype: torch.dtype) -> OriginalUpdate:
    """The original's update with the weights of `checkpoint`, all in `dtype`."""
    model = build_policy(checkpoint, config.worker.actor.model, frozen_dtype=dtype)
    adapters = {}
    for name, parameter in list(model.named_parameters()):
        if ".lora_" in name:
            value = torch.zeros(parameter.shape)
        elif parameter.is_meta:
            value = checkpoint.weights[model.hub_name(name)]
        else:
            value = parameter.data
        fresh = torch.nn.Parameter(value.to(DEVICE), requires_grad=parameter.requires_grad)
        _replace(model, name, fresh)
        if ".lora_" in name:
            adapters[name] = fresh
    model.initialize_adapters(adapters)
    fill_adapters(model)
    for parameter in adapters.values():
        parameter.data = parameter.data.to(dtype)  # as the original trains them
    for name, buffer in list(model.named_buffers()):
        _replace(model, name, buffer.to(DEVICE))
    builder = SequenceBuilder(checkpoint.processor, format_prompt=checkpoint.format_prompt)
    bt_weight, kl_coef = config.worker.actor.bt_weight, config.algorithm.kl_coef
    return OriginalUpdate(model.train(), builder, bt_weight=bt_weight, kl_coef=kl_coef)


def _replace(model: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, value)


@torch.no_grad()
def fill_adapters(model: PolicyModel) -> None:
    """Give LoRA's B values, so that policy and reference differ."""
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_B." in name:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.normal_(std=ADAPTER_STD, generator=torch.Generator(DEVICE).manual_seed(len(name)))
