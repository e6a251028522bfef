"""Grouping the requests of a decode step by the cache blocks that they share, and merging what attention makes of it.

A step of B requests with one query each becomes one attention call over a virtual batch. Its first rows are groups:
the queries of all members against the blocks that they share. The other B rows are the requests' own parts: one query
each, against the rest of its keys. A query in a group thus has two results, which are merged by their log-sum-exps.

All of it is computed on the device, from the block table and the lengths, in buffers that are not reallocated: the
layers can be in a CUDA graph, and the host does not wait. There is room for B // 2 groups; unused ones have neither
queries nor keys.

Example, blocks of 16 tokens: requests 0 and 2 begin with blocks 7, 8, 9, and request 1 shares none. Row 0 holds the
queries of 0 and 2 and 48 keys, row 1 the query of request 0 and its other keys, row 2 that of request 1 and all its
keys, row 3 that of request 2. The queries' order is 0, 2 (the group), 0, 1, 2 (own parts).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

NEVER = tl.constexpr(2**30)


@triton.jit
def _full_blocks(lengths, requests, num_requests, block_size: tl.constexpr):
    """Blocks before the present token's, which is still written to and never shared."""
    return tl.maximum(tl.load(lengths + requests, mask=requests < num_requests, other=0) - 1, 0) // block_size


@triton.jit(do_not_specialize=["num_requests"])
def _find_leaders(
    table, stride, lengths, num_requests, leaders, shared,
    block_size: tl.constexpr, least: tl.constexpr, most: tl.constexpr, span: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """For each request the leader of its group and how many blocks it shares with it.

    Requests belong together when block least - 1 is the same; most of them, in order, make a group, led by its first.
    Blocks are compared by their address; prefix caching gives the same content the same address.
    """
    request = tl.program_id(0)
    others = tl.arange(0, span)
    num_full = _full_blocks(lengths, request, num_requests, block_size)
    is_long = num_full >= least
    others_long = _full_blocks(lengths, others, num_requests, block_size) >= least
    own_block = tl.load(table + request.to(tl.int64) * stride + least - 1, mask=is_long, other=-1)
    other_blocks = tl.load(table + others.to(tl.int64) * stride + least - 1, mask=others_long, other=-1)
    matches = ((other_blocks == own_block) & others_long & is_long).to(tl.int32)
    position = tl.sum(tl.where(others < request, matches, 0), 0)
    positions = tl.cumsum(matches, 0) - 1
    is_leader = (matches == 1) & (positions == position // most * most)
    leader = tl.where(is_long, tl.min(tl.where(is_leader, others, span), 0), request)
    limit = tl.minimum(num_full, _full_blocks(lengths, leader, num_requests, block_size))
    num_shared = limit
    for start in range(0, limit, chunk):
        index = start + tl.arange(0, chunk)
        own = tl.load(table + request.to(tl.int64) * stride + index, mask=index < limit, other=0)
        led = tl.load(table + leader.to(tl.int64) * stride + index, mask=index < limit, other=0)
        num_shared = tl.minimum(num_shared, tl.min(tl.where(own != led, index, NEVER), 0))
    tl.store(leaders + request, leader)
    tl.store(shared + request, tl.where(is_long, num_shared, 0))


@triton.jit(do_not_specialize=["num_requests"])
def _size_groups(
    leaders, shared, num_requests, sizes, blocks, least: tl.constexpr, span: tl.constexpr
):  # fmt: skip
    """For each leader the members of its group and the blocks that all of them share; 0 for everyone else."""
    request = tl.program_id(0)
    others = tl.arange(0, span)
    is_member = tl.load(leaders + others, mask=others < num_requests, other=-1) == request
    size = tl.sum(is_member.to(tl.int32), 0)
    num_blocks = tl.min(tl.where(is_member, tl.load(shared + others, mask=is_member, other=0), NEVER), 0)
    is_group = (size >= 2) & (num_blocks >= least)
    tl.store(sizes + request, tl.where(is_group, size, 0))
    tl.store(blocks + request, tl.where(is_group, num_blocks, 0))


@triton.jit(do_not_specialize=["num_requests", "width"])
def _write_groups(
    table, stride, num_requests, sizes, blocks, starts, num_keys, rows, row_stride, width,
    block_size: tl.constexpr, span: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """Row g of the virtual batch: where its queries start, its number of keys, its block table."""
    group = tl.program_id(0)
    requests = tl.arange(0, span)
    size = tl.load(sizes + requests, mask=requests < num_requests, other=0)
    num_blocks = tl.load(blocks + requests, mask=requests < num_requests, other=0)
    is_ours = (size > 0) & (tl.cumsum((size > 0).to(tl.int32), 0) - 1 == group)
    leader = tl.sum(tl.where(is_ours, requests, 0), 0)
    own_blocks = tl.sum(tl.where(is_ours, num_blocks, 0), 0)
    before = tl.sum(tl.where(is_ours, tl.cumsum(size, 0) - size, 0), 0)
    exists = tl.sum(is_ours.to(tl.int32), 0) > 0
    tl.store(starts + group, tl.where(exists, before, tl.sum(size, 0)))
    tl.store(num_keys + group, own_blocks * block_size)
    for start in range(0, width, chunk):
        index = start + tl.arange(0, chunk)
        own = tl.load(table + leader.to(tl.int64) * stride + index, mask=index < own_blocks, other=0)
        tl.store(rows + group.to(tl.int64) * row_stride + index, own, mask=index < width)


@triton.jit(do_not_specialize=["num_requests", "num_groups", "width"])
def _write_own_parts(
    table, stride, lengths, num_requests, num_groups, leaders, sizes, blocks,
    starts, num_keys, rows, row_stride, width, queries, grouped,
    block_size: tl.constexpr, span: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """Row num_groups + i of the virtual batch, and the positions of request i's query: in its group, and by itself."""
    request = tl.program_id(0)
    row = num_groups + request
    others = tl.arange(0, span)
    size = tl.load(sizes + others, mask=others < num_requests, other=0)
    num_grouped = tl.sum(size, 0)
    leader = tl.load(leaders + request)
    is_grouped = tl.load(sizes + leader) > 0
    num_blocks = tl.load(blocks + leader)
    before = tl.sum(tl.where(others < leader, size, 0), 0)
    followers = tl.load(leaders + others, mask=others < request, other=-1) == leader
    position = before + tl.sum(followers.to(tl.int32), 0)
    tl.store(starts + row, num_grouped + request)
    tl.store(starts + row + 1, num_grouped + num_requests, mask=request == num_requests - 1)
    tl.store(num_keys + row, tl.load(lengths + request) - num_blocks * block_size)
    tl.store(queries + num_grouped + request, request)
    tl.store(queries + position, request, mask=is_grouped)
    tl.store(grouped + request, tl.where(is_grouped, position, -1))
    for start in range(0, width, chunk):
        index = start + tl.arange(0, chunk)
        source = table + request.to(tl.int64) * stride + num_blocks + index
        own = tl.load(source, mask=num_blocks + index < width, other=0)
        tl.store(rows + row.to(tl.int64) * row_stride + index, own, mask=index < width)


@triton.jit
def _gather_kernel(source, stride, queries, end, target, size, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(end):
        index = tl.program_id(1) * block + tl.arange(0, block)
        values = tl.load(source + tl.load(queries + row).to(tl.int64) * stride + index, mask=index < size)
        tl.store(target + row * size + index, values, mask=index < size)


@triton.jit
def _merge_kernel(
    parts, lse, lse_stride, grouped, num_grouped, output, stride, num_heads: tl.constexpr, size: tl.constexpr
):  # fmt: skip
    request = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, num_heads)
    elements = heads[:, None] * size + tl.arange(0, size)[None, :]
    own_row = tl.load(num_grouped).to(tl.int64) + request
    group_row = tl.load(grouped + request).to(tl.int64)
    own = tl.load(parts + own_row * num_heads * size + elements).to(tl.float32)
    if group_row >= 0:
        group = tl.load(parts + group_row * num_heads * size + elements).to(tl.float32)
        difference = tl.load(lse + heads * lse_stride + group_row) - tl.load(lse + heads * lse_stride + own_row)
        weight = (1.0 / (1.0 + tl.exp(-difference)))[:, None]
        own = weight * group + (1.0 - weight) * own
    tl.store(output + request * stride + elements, own.to(output.dtype.element_ty))


@dataclass(frozen=True)
class VirtualBatch:
    """One step's rows, for G = B // 2 groups (at least 1) and B requests. All int32, on the device.

    `starts` [G + B + 1]: where each row's queries start. `num_keys` [G + B]. `block_table` [G + B, width].
    `queries` [2B]: the request at each position. `grouped` [B]: the position of a query in its group, or -1.
    """

    starts: torch.Tensor
    num_keys: torch.Tensor
    block_table: torch.Tensor
    queries: torch.Tensor
    grouped: torch.Tensor

    @property
    def num_requests(self) -> int:
        return len(self.grouped)

    @property
    def num_groups(self) -> int:
        return len(self.num_keys) - self.num_requests


class Grouping:
    """Makes virtual batches of up to `max_requests` requests, always in the same memory.

    `least_tokens`: requests that share fewer are not grouped. `most_members`: larger groups are split, so that a
    group's queries fill one tile of the attention kernel. `width`: columns of the block table.
    """

    def __init__(
        self,
        max_requests: int,
        *,
        width: int,
        block_size: int,
        least_tokens: int,
        most_members: int,
        device: torch.device,
    ) -> None:
        max_groups = max(1, max_requests // 2)
        self.block_size, self.most_members = block_size, most_members
        self.least_blocks = max(1, least_tokens // block_size)

        def integers(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        self.found = integers(4, max_requests)  # leaders, shared blocks, group sizes, group blocks
        self.starts, self.num_keys = integers(max_groups + max_requests + 1), integers(max_groups + max_requests)
        self.block_table = integers(max_groups + max_requests, width)
        self.queries, self.grouped = integers(2 * max_requests), integers(max_requests)

    def group(self, block_table: torch.Tensor, lengths: torch.Tensor) -> VirtualBatch:
        """`block_table`: int32 [B, width]. `lengths`: int32 [B], tokens of each request with the present one; 0 for a
        row that only fills up a CUDA graph."""
        num_requests, width = block_table.shape
        num_groups = max(1, num_requests // 2)
        leaders, shared, sizes, blocks = self.found
        table = (block_table, block_table.stride(0))
        tiles = {
            "span": max(16, triton.next_power_of_2(num_requests)),
            "chunk": min(512, max(16, triton.next_power_of_2(width))),
        }
        least = {"least": self.least_blocks, "span": tiles["span"]}
        _find_leaders[(num_requests,)](
            *table, lengths, num_requests, leaders, shared,
            block_size=self.block_size, most=self.most_members, **least, chunk=tiles["chunk"],
        )  # fmt: skip
        _size_groups[(num_requests,)](leaders, shared, num_requests, sizes, blocks, **least)
        rows = (self.starts, self.num_keys, self.block_table, self.block_table.stride(0), width)
        _write_groups[(num_groups,)](*table, num_requests, sizes, blocks, *rows, block_size=self.block_size, **tiles)
        _write_own_parts[(num_requests,)](
            *table, lengths, num_requests, num_groups, leaders, sizes, blocks, *rows, self.queries, self.grouped,
            block_size=self.block_size, **tiles,
        )  # fmt: skip
        num_rows = num_groups + num_requests
        return VirtualBatch(
            self.starts[: num_rows + 1],
            self.num_keys[:num_rows],
            self.block_table[:num_rows, :width],
            self.queries[: 2 * num_requests],
            self.grouped[:num_requests],
        )


def gather_queries(queries: torch.Tensor, batch: VirtualBatch) -> torch.Tensor:
    """Queries in the virtual batch's order, [2B, heads, size], of [>= B, heads, size]; unused rows are undefined."""
    _, num_heads, size = queries.shape
    assert queries.stride()[1:] == (size, 1), f"heads are not side by side: strides {queries.stride()}"
    gathered = torch.empty((2 * batch.num_requests, num_heads, size), dtype=queries.dtype, device=queries.device)
    length = num_heads * size
    block = min(4096, triton.next_power_of_2(length))
    grid = (2 * batch.num_requests, triton.cdiv(length, block))
    end = batch.starts[-1:]
    _gather_kernel[grid](queries, queries.stride(0), batch.queries, end, gathered, length, block=block)
    return gathered


def merge_parts(parts: torch.Tensor, lse: torch.Tensor, batch: VirtualBatch, output: torch.Tensor) -> None:
    """Write each request's attention to `output` [>= B, heads, size], heads a power of 2.

    `parts`: [2B, heads, size] in the virtual batch's order. `lse`: float32 [heads, 2B], natural logarithms.
    """
    _, num_heads, size = parts.shape
    assert parts.is_contiguous(), "results of attention are not contiguous"
    assert output.stride()[1:] == (size, 1), f"heads are not side by side: strides {output.stride()}"
    num_grouped = batch.starts[batch.num_groups :]
    arguments = (parts, lse, lse.stride(0), batch.grouped, num_grouped, output, output.stride(0))
    _merge_kernel[(batch.num_requests,)](*arguments, num_heads=num_heads, size=size)
