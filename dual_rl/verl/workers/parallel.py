"""Ranks, FSDP2 sharding and whole tensors.

Weights are sharded with FSDP2: each text layer and each vision block is a unit, the rest of the model the root.
Trained weights are fp32 masters that are cast to the compute dtype; frozen ones are stored in it. The reward head and
the `<Reward>` row are small: they stay whole in fp32 on every rank, and their gradients are averaged by hand.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from verl.config import FsdpConfig
from verl.model.policy import ADAPTER, PolicyModel

COLLECTIVE_TIMEOUT = timedelta(minutes=60)  # a rank may wait for another's long responses


@dataclass(frozen=True)
class Rank:
    """This process: `index` of `world_size`, computing on `device`."""

    index: int
    world_size: int
    device: torch.device


def join_process_group(*, index: int, world_size: int, address: str, port: int) -> Rank:
    """Join the other ranks at address:port and choose the device: the one visible GPU, or the CPU."""
    has_gpu = torch.cuda.is_available()
    # vLLM's external launcher reads these. Ray shows each rank one GPU, which is therefore local rank 0.
    os.environ.update(
        RANK=str(index), WORLD_SIZE=str(world_size), LOCAL_RANK="0", MASTER_ADDR=address, MASTER_PORT=str(port)
    )
    device = torch.device("cuda", 0) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if has_gpu else "gloo", rank=index, world_size=world_size, timeout=COLLECTIVE_TIMEOUT
    )
    return Rank(index, world_size, device)


def shard_model(model: PolicyModel, settings: FsdpConfig, *, rank: Rank, compute_dtype: torch.dtype) -> None:
    """Shard a model in place; the backbone's parameters may be on the meta device.

    Over one mesh dimension, or two for hybrid sharding: replicas x shards. Frozen parameters that one rank would hold
    alone are not managed: FSDP would only copy them for each pass.
    """
    shards = rank.world_size if settings.fsdp_size == -1 else settings.fsdp_size
    replicas, rest = divmod(rank.world_size, shards)
    assert rest == 0, f"fsdp_size={shards} does not divide the {rank.world_size} ranks"
    mesh_shape, names = ((shards,), ("shards",)) if replicas == 1 else ((replicas, shards), ("replicas", "shards"))
    mesh = init_device_mesh(rank.device.type, mesh_shape, mesh_dim_names=names)
    unmanaged = set(model.replicated_parameters())
    if shards == 1 and not settings.enable_cpu_offload:
        unmanaged |= {parameter for parameter in model.parameters() if not parameter.requires_grad}
    arguments = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32),
        "ignored_params": unmanaged,
    }
    if settings.enable_cpu_offload:
        arguments["offload_policy"] = CPUOffloadPolicy(pin_memory=rank.device.type == "cuda")
    for unit in model.sharding_units():
        fully_shard(unit, **arguments)
    fully_shard(model, **arguments)
    register_fsdp_forward_method(model, "encode_videos")


@torch.no_grad()
def materialize(
    model: PolicyModel, state: dict[str, torch.Tensor] | None, *, rank: Rank, is_offloaded: bool = False
) -> None:
    """Load the weights of a sharded model, one tensor at a time.

    `state`: whole tensors by parameter name on rank 0, None elsewhere. `is_offloaded`: shards stay in host memory.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device="cpu" if is_offloaded else rank.device)
    model.backbone.tie_weights()  # parameters that FSDP does not manage came apart
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.to(rank.device))
    for parameter in model.replicated_parameters():
        parameter.data = parameter.data.to(rank.device)
    parameters = dict(model.named_parameters())
    for name in [name for name in parameters if ".lora_" not in name]:
        parameter = parameters.pop(name)
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=rank.device)
        if state is not None:
            whole.copy_(state[name])
        if isinstance(parameter, DTensor):
            sharded = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            parameter.to_local().copy_(sharded.to_local())
        else:
            dist.broadcast(whole, src=0)
            parameter.copy_(whole)
    model.initialize_adapters(parameters)


@torch.no_grad()
def iterate_weights(model: PolicyModel, *, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole weights under Hugging Face names, adapters merged and the `<Reward>` row put into the embedding.

    A collective: every rank iterates over all of them, one in memory at a time. Adapters are merged in fp32.
    """
    parameters = dict(model.backbone.named_parameters())
    adapters = model.adapters
    for name, parameter in parameters.items():
        if ".lora_" in name:
            continue
        layer, is_adapted, _ = name.partition(".base_layer.")
        if is_adapted:
            down, up = (gather_tensor(parameters[f"{layer}.lora_{each}.{ADAPTER}.weight"]).float() for each in "AB")
            whole = (gather_tensor(parameter).float() + adapters[layer].scaling[ADAPTER] * (up @ down)).to(dtype)
        else:
            whole = gather_tensor(parameter.detach().to(dtype))  # half the bytes to gather
        if parameter is model.embedding_weight:
            whole = whole.clone()
            whole[model.reward_token_id] = model.reward_embedding.to(whole)
        yield model.hub_name(name), whole


def gather_tensor(parameter: torch.Tensor) -> torch.Tensor:
    """The whole tensor on every rank. A collective: every rank must pass the same one."""
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def sum_over_ranks(values: torch.Tensor) -> list[float]:
    """Element-wise sums of a vector, in place."""
    dist.all_reduce(values)
    return values.tolist()


def max_over_ranks(value: float, *, device: torch.device) -> float:
    """The largest value of any rank."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()


@torch.no_grad()
def average_replicated_gradients(parameters: Iterable[torch.nn.Parameter], *, world_size: int) -> None:
    """Average over ranks the gradients of the parameters that FSDP does not manage."""
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(world_size)


@torch.no_grad()
def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> tuple[float, float]:
    """Scale all gradients so that their joint norm is at most `max_norm`.

    Returns the norm before clipping, of everything and of the replicated parameters (head and `<Reward>` row) alone.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    replicated = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    head_square = sum(float(gradient.double().square().sum()) for gradient in replicated)
    body_norm = 0.0
    if sharded:
        norm = torch.nn.utils.get_total_norm(sharded)
        body_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = (body_norm**2 + head_square) ** 0.5
    if total > max_norm:
        torch._foreach_mul_(sharded, max_norm / total)
        torch._foreach_mul_(replicated, max_norm / total)
    return total, head_square**0.5
