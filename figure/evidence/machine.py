"""What a machine lends to jobs: a slot for each that runs at a time, with one of the GPUs and a share of the cores."""

import os
import subprocess
from dataclasses import dataclass

from evidence.plan import Device

MOST_JOBS_PER_GPU = 8
CORES_PER_JOB = 2
"""On a GPU: one for the training process, one for what decodes videos and for Ray."""
SHARE_OF_ALL = 0.6
MOST_SHARE = 0.05
"""Of a GPU's memory, for all engines on it and for one of them: 4 GiB of 80, and the tiny model has 2M weights."""
SCORING_THREADS = 4
OBJECT_STORE_BYTES = 10**9


@dataclass(frozen=True)
class Machine:
    """`num_jobs` at a time; `gpus` as CUDA_VISIBLE_DEVICES names them, none on a CPU."""

    num_jobs: int
    num_cores: int
    gpus: tuple[str, ...] = ()

    @classmethod
    def find(cls, device: str, num_jobs: int | None) -> "Machine":
        """This machine; `device`: cpu or gpu."""
        num_cores, gpus = len(os.sched_getaffinity(0)), find_gpus() if device == "gpu" else ()
        most = min(num_cores // CORES_PER_JOB, MOST_JOBS_PER_GPU * len(gpus)) if gpus else num_cores
        return cls(num_jobs or max(1, most), num_cores, gpus)

    @property
    def device(self) -> Device:
        """Where each job runs, for the commands; the same for up to twelve jobs a GPU."""
        if not self.gpus:
            return Device()
        jobs_per_gpu = -(-self.num_jobs // len(self.gpus))
        return Device(1, round(min(SHARE_OF_ALL / jobs_per_gpu, MOST_SHARE), 3), SCORING_THREADS)

    def environment(self, slot: int) -> dict[str, str]:
        """Of the process that runs in a slot, from 0. The user's own values win, but for the choice of the GPU."""
        shares = {
            "OMP_NUM_THREADS": str(max(1, self.num_cores // self.num_jobs)),  # MKL and OpenBLAS follow it
            # Ray would start an idle worker for every core, and reserve a third of the memory, in each job.
            "RAY_prestart_worker_first_driver": "0",
            "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(OBJECT_STORE_BYTES),
        }
        gpu = {"CUDA_VISIBLE_DEVICES": self.gpus[slot % len(self.gpus)]} if self.gpus else {}
        return {**shares, **os.environ, **gpu}


def find_gpus() -> tuple[str, ...]:
    """The GPUs of the machine, of which CUDA_VISIBLE_DEVICES may name some (-1: none)."""
    try:
        result = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ()
    lines = [line for line in result.stdout.splitlines() if line.startswith("GPU ")]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not lines or visible is None:
        return tuple(str(number) for number in range(len(lines)))
    return tuple(name for name in visible.split(",") if name and not name.startswith("-"))
