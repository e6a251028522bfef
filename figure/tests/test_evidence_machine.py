"""Slots of a machine: which GPU, which share of its memory and of the cores a job has."""

import os

import pytest

from evidence import machine
from evidence.machine import Machine, find_gpus
from evidence.plan import Device
from run_evidence import parse_arguments

TWO_GPUS = ("0", "1")


@pytest.fixture
def two_gpus(tmp_path, monkeypatch):
    """An `nvidia-smi` that lists two, before anything else on the path."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-a)'\necho 'GPU 1: NVIDIA H100 (UUID: GPU-b)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_gpus_are_those_of_the_machine_or_those_that_the_user_names(two_gpus, monkeypatch):
    assert find_gpus() == TWO_GPUS
    assert parse_arguments([]).device == "gpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-b")
    assert find_gpus() == ("3", "GPU-b")
    for none in ("-1", ""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert find_gpus() == ()
    assert parse_arguments([]).device == "cpu"
    with pytest.raises(SystemExit):
        parse_arguments(["--device", "gpu"])


def test_a_machine_without_gpus_has_none_whatever_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert find_gpus() == ()


def test_slots_take_the_gpus_in_turn_and_share_the_cores(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = Machine(num_jobs=3, num_cores=32, gpus=("5", "7"))
    environments = [found.environment(slot) for slot in range(3)]
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in environments] == ["5", "7", "5"]
    assert {environment["OMP_NUM_THREADS"] for environment in environments} == {"10"}
    assert environments[0]["PATH"] == os.environ["PATH"]


def test_on_cpus_no_gpu_is_chosen_and_the_users_threads_win(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    environment = Machine(num_jobs=4, num_cores=2).environment(0)
    assert "CUDA_VISIBLE_DEVICES" not in environment
    assert environment["OMP_NUM_THREADS"] == "3"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert Machine(num_jobs=4, num_cores=2).environment(0)["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("num_gpus", "num_cores", "asked", "num_jobs"),
    [(2, 32, None, 16), (1, 32, None, 8), (2, 8, None, 4), (1, 1, None, 1), (2, 32, 5, 5), (0, 6, None, 6)],
)
def test_number_of_jobs_follows_cores_and_gpus(monkeypatch, num_gpus, num_cores, asked, num_jobs):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(num_cores))
    monkeypatch.setattr(machine, "find_gpus", lambda: tuple(map(str, range(num_gpus))))
    assert Machine.find("gpu" if num_gpus else "cpu", asked).num_jobs == num_jobs


@pytest.mark.parametrize(("num_jobs", "share"), [(1, 0.05), (16, 0.05), (24, 0.05), (30, 0.04), (31, 0.037)])
def test_engines_of_a_gpu_share_its_memory_and_none_takes_much(num_jobs, share):
    """On two GPUs; a share that does not change with few jobs leaves the commands as they are."""
    assert Machine(num_jobs, num_cores=32, gpus=TWO_GPUS).device == Device(1, share, scoring_threads=4)
    assert Machine(num_jobs, num_cores=32).device == Device()
