"""The attention backend of shared-prompt decoding: vLLM's FlashAttention 3 backend, with grouped decode steps.

A step in which every request has one query runs as one FlashAttention call over a virtual batch (see `kernels`), in
CUDA graphs as well; every other step takes vLLM's own way. Imported by vLLM, by its name.
"""

from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends import flash_attn
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from verl.rollout.shared_prompt.kernels import Grouping, VirtualBatch, gather_queries, merge_parts

LEAST_TOKENS = 512
"""Shared beginnings shorter than this are read by each request: unrelated prompts begin alike, too."""
QUERY_TILE = 64
"""Queries by heads that FlashAttention 3 works on at once; a group fills at most one tile."""
MANY_REQUESTS = 96
"""From here on rows alone keep the card busy; below, each row's keys are split over up to MOST_SPLITS blocks."""
MOST_SPLITS = 16
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class GroupedStep:
    """What the layers need of a step. `schedule`: FlashAttention's plan for the rows."""

    batch: VirtualBatch
    schedule: torch.Tensor
    num_splits: int
    max_queries: int
    max_keys: int


class SharedPromptMetadataBuilder(flash_attn.FlashAttentionMetadataBuilder):
    """Adds `grouped`, a `GroupedStep` or None, to vLLM's metadata of a step."""

    supports_update_block_table = False

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        self.max_requests = max(vllm_config.scheduler_config.max_num_seqs, captured)
        self.most_members = max(2, QUERY_TILE // (self.num_heads_q // self.num_heads_kv))
        self.grouping: Grouping | None = None

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False):
        """See vLLM's `AttentionMetadataBuilder`."""
        step = common_attn_metadata
        is_decode = step.max_query_len == 1 and step.num_actual_tokens == step.num_reqs <= self.max_requests
        metadata = super().build(common_prefix_len, step, fast_build or is_decode)  # fast: without a plan of its own
        metadata.grouped = self._group(step) if is_decode else None
        return metadata

    def use_cascade_attention(self, *_, **__) -> bool:
        """Never: vLLM's own sharing, by all requests or none, would keep steps out of CUDA graphs."""
        return False

    def _group(self, step: CommonAttentionMetadata) -> GroupedStep:
        if self.grouping is None:  # outside of the memory that vLLM's sleep gives back
            self._make_buffers(width=step.block_table_tensor.shape[1])
        batch = self.grouping.group(step.block_table_tensor[: step.num_reqs], step.seq_lens[: step.num_reqs])
        num_splits = 1 if step.num_reqs >= MANY_REQUESTS else MOST_SPLITS
        max_keys = max(step.max_seq_len, self.most_members)
        schedule = flash_attn.get_scheduler_metadata(
            batch_size=len(batch.num_keys),
            max_seqlen_q=self.most_members,
            max_seqlen_k=max_keys,
            num_heads_q=self.num_heads_q,
            num_heads_kv=self.num_heads_kv,
            headdim=self.headdim,
            cache_seqlens=batch.num_keys,
            qkv_dtype=FP8 if is_quantized_kv_cache(self.cache_config.cache_dtype) else self.kv_cache_dtype,
            cu_seqlens_q=batch.starts,
            page_size=self.block_size,
            causal=False,
            num_splits=num_splits,
        )
        kept = self.schedule[: len(schedule)]
        kept.copy_(schedule)  # where a CUDA graph reads it
        return GroupedStep(batch, kept, num_splits, self.most_members, max_keys)

    def _make_buffers(self, *, width: int) -> None:
        self.grouping = Grouping(
            self.max_requests,
            width=width,
            block_size=self.block_size,
            least_tokens=LEAST_TOKENS,
            most_members=self.most_members,
            device=self.device,
        )
        num_rows = len(self.grouping.num_keys)
        self.schedule = torch.zeros(4 * (num_rows + 3) + 1, dtype=torch.int32, device=self.device)


class SharedPromptImpl(flash_attn.FlashAttentionImpl):
    """A layer's attention: grouped where the step is."""

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, **scales):
        """See vLLM's `FlashAttentionImpl`; keys and values of the present tokens are in the cache already."""
        step: GroupedStep | None = getattr(attn_metadata, "grouped", None)
        if step is None or self.attn_type != AttentionType.DECODER:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, **scales)
        key_cache, value_cache = kv_cache.unbind(1)
        descales = {}
        if is_quantized_kv_cache(self.kv_cache_dtype):  # vLLM has quantized the queries, too
            key_cache, value_cache = key_cache.view(FP8), value_cache.view(FP8)
            by_row = len(step.batch.num_keys), self.num_kv_heads
            descales = {f"{name}_descale": getattr(layer, f"_{name}_scale").expand(by_row) for name in "qkv"}
        parts, lse = flash_attn.flash_attn_varlen_func(
            q=gather_queries(query, step.batch),
            k=key_cache,
            v=value_cache,
            cu_seqlens_q=step.batch.starts,
            max_seqlen_q=step.max_queries,
            seqused_k=step.batch.num_keys,
            max_seqlen_k=step.max_keys,
            softmax_scale=self.scale,
            causal=False,
            block_table=step.batch.block_table,
            return_softmax_lse=True,
            scheduler_metadata=step.schedule,
            num_splits=step.num_splits,
            fa_version=3,
            **descales,
        )
        merge_parts(parts, lse, step.batch, output)
        return output


class SharedPromptBackend(flash_attn.FlashAttentionBackend):
    """What vLLM registers."""

    @staticmethod
    def get_name() -> str:
        """The name under which vLLM looks backends up."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[SharedPromptImpl]:
        """See vLLM's `AttentionBackend`."""
        return SharedPromptImpl

    @staticmethod
    def get_builder_cls() -> type[SharedPromptMetadataBuilder]:
        """See vLLM's `AttentionBackend`."""
        return SharedPromptMetadataBuilder
