"""Weights and optimizer moments in page-locked host memory while their device memory is needed for something else.

Page-locked, because copies from and to ordinary host memory are several times slower.
"""

from collections.abc import Iterable, Iterator

import torch
from torch.distributed.tensor import DTensor


class WeightOffload:
    """Frees and restores the device memory of parameters.

    `release` keeps the parameter objects that FSDP and the optimizer know, with empty storages: nothing may use them
    before `restore`.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._host: dict[int, torch.Tensor] = {}  # bytes, by index of the parameter
        self._released: list[tuple[torch.UntypedStorage, torch.Tensor]] = []

    @torch.no_grad()
    def release(self) -> None:
        """Copy weights to the host, frozen ones only once, and free the device memory of all."""
        if self._released:
            return
        seen = set()
        for index, parameter in enumerate(self._parameters):
            storage = local_part(parameter.detach()).untyped_storage()
            if not storage.nbytes() or storage.data_ptr() in seen:
                continue
            seen.add(storage.data_ptr())
            is_known = index in self._host
            if not is_known:
                self._host[index] = torch.empty(storage.nbytes(), dtype=torch.uint8)
                if storage.device.type == "cuda":
                    lock_pages(self._host[index])
            if parameter.requires_grad or not is_known:
                self._host[index].copy_(as_bytes(storage), non_blocking=True)
            self._released.append((storage, self._host[index]))
        synchronize()
        for storage, _ in self._released:
            storage.resize_(0)

    @torch.no_grad()
    def restore(self) -> None:
        """Bring everything back."""
        for storage, host in self._released:
            storage.resize_(host.numel())
            as_bytes(storage).copy_(host, non_blocking=True)
        synchronize()
        self._released = []


class MomentOffload:
    """Moves an optimizer's moments between the device and the host; step counters stay where they are."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._host: dict[tuple[int, str], torch.Tensor] = {}

    @torch.no_grad()
    def release(self) -> None:
        """To the host."""
        for key, state, name in self._moments():
            tensor = state[name]
            if local_part(tensor).device.type == "cpu":
                continue
            if key not in self._host:
                self._host[key] = tensor.to("cpu")
                lock_pages(local_part(self._host[key]))
            else:
                self._host[key].copy_(tensor, non_blocking=True)
            state[name] = self._host[key]
        synchronize()

    @torch.no_grad()
    def restore(self, device: torch.device) -> None:
        """To the device."""
        for _, state, name in self._moments():
            state[name] = state[name].to(device, non_blocking=True)
        synchronize()

    def _moments(self) -> Iterator[tuple[tuple[int, str], dict, str]]:
        for parameter, state in self._optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if isinstance(state.get(name), torch.Tensor):
                    yield (id(parameter), name), state, name


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """A storage as uint8 tensor, [bytes]."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def lock_pages(tensor: torch.Tensor) -> None:
    """Page-lock a host tensor's memory in place: torch's own allocator would round its size up to a power of two.

    Raises RuntimeError when the system has no more memory to lock.
    """
    if not tensor.numel() or tensor.is_pinned():
        return
    storage = tensor.untyped_storage()
    code = torch.cuda.cudart().cudaHostRegister(storage.data_ptr(), storage.nbytes(), 0)
    if int(code) != 0:
        raise RuntimeError(
            f"{storage.nbytes()} bytes of host memory could not be page-locked (CUDA error {int(code)}). Raise the "
            "limit (`ulimit -l`) or set worker.actor.offload.* to false."
        )


def synchronize() -> None:
    """Wait for copies under way."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
