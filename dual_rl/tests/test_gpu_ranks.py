"""Whole runs on two GPUs against the same on one: NCCL, sharding, Ulysses and tensor-parallel rollouts, in fp32."""

import pytest
import torch

from model_support import write_small_model
from test_training_runs import assert_same_training
from training_support import Run, Workplace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
ON_GPU = {
    "trainer.n_gpus_per_node": 1,
    "worker.actor.fsdp.precision": "fp32",
    "worker.ref.fsdp.precision": "fp32",
    "worker.rollout.precision": "fp32",
    "worker.rollout.name": "vllm",
    "worker.rollout.gpu_memory_utilization": 0.3,
    "worker.rollout.enforce_eager": True,
}


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "experts"])
def on_one_gpu(request, tmp_path_factory) -> tuple[Workplace, Run]:
    model = write_small_model(tmp_path_factory.mktemp("model"), has_experts=request.param)
    settings = {**ON_GPU, "worker.actor.model.model_path": model}
    workplace = Workplace.make(tmp_path_factory.mktemp("gpu") / "w", **settings)
    run = workplace.run()
    assert run.code == 0, run.output
    return workplace, run


@pytest.mark.parametrize(
    "settings",
    [{}, {"worker.actor.ulysses_size": 2}, {"worker.rollout.tensor_parallel_size": 2}],
    ids=["sharded", "Ulysses", "tensor-parallel rollouts"],
)
def test_two_gpus_train_as_one(on_one_gpu, workplace, settings):
    run = workplace.run(settings={**on_one_gpu[0].settings, "trainer.n_gpus_per_node": 2, **settings})
    assert run.code == 0, run.output
    assert_same_training(run, workplace, on_one_gpu)
