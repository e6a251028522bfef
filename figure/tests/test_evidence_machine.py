"""Slots of a machine: which GPU, which share of its memory and of the cores a job has."""

import os

import pytest

from evidence.machine import Machine, find_gpus
from evidence.plan import Device
from run_evidence import parse_arguments


def test_gpus_are_those_of_the_machine_or_those_that_the_user_names(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert find_gpus() == ()  # without nvidia-smi
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-a)'\necho 'GPU 1: NVIDIA H100 (UUID: GPU-b)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    for named, found in ((None, ("0", "1")), ("3,GPU-b", ("3", "GPU-b")), ("-1", ()), ("", ())):
        if named is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        assert find_gpus() == found
        assert parse_arguments([]).device == ("gpu" if found else "cpu")
    with pytest.raises(SystemExit):
        parse_arguments(["--device", "gpu"])


def test_slots_take_the_gpus_in_turn_and_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    machine = Machine(num_jobs=3, num_cores=32, gpus=("5", "7"))
    environments = [machine.environment(slot) for slot in range(3)]
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in environments] == ["5", "7", "5"]
    assert {environment["OMP_NUM_THREADS"] for environment in environments} == {"10"}
    assert Machine(num_jobs=4, num_cores=2).environment(0)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's wins
    assert Machine(num_jobs=4, num_cores=2).environment(0)["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(("num_jobs", "share"), [(1, 0.05), (24, 0.05), (30, 0.04), (31, 0.037)])
def test_engines_of_a_gpu_share_its_memory_and_none_takes_much(num_jobs, share):
    """On two GPUs; a share that does not change with few jobs leaves the commands as they are."""
    assert Machine(num_jobs, num_cores=32, gpus=("0", "1")).device == Device(1, share, scoring_threads=4)
    assert Machine(num_jobs, num_cores=32).device == Device()
