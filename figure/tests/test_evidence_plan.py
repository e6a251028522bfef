"""The plan: every command exists, every flag and setting of it is one, and what is compared is comparable."""

from pathlib import Path

import pytest
from transformers import HfArgumentParser

import arguments
import inference
import make_toy_world
from evidence.plan import MASKED, Device, Job, Plan
from evidence.sizes import SIZES
from verl.config_loading import load_config

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = Plan(SIZES["small"], "w", device=Device())


@pytest.fixture(params=[("small", Device()), ("full", Device(1, 0.1, 4))], ids=["small on CPUs", "full on GPUs"])
def plan(request) -> Plan:
    size, device = request.param
    return Plan(SIZES[size], "figure/output/any", device=device)


def jobs_of(plan: Plan, name: str) -> list[Job]:
    """Of the first two seeds: those of further ones are alike."""
    jobs = [job for job in plan.jobs.values() if job.command[1] == name]
    assert jobs
    return [job for job in jobs if not {"3", "4", "5"} & set(job.name.split("_"))]


def test_jobs_run_files_of_the_repository_after_what_they_need_into_outputs_of_their_own(plan):
    seen = set()
    for name, job in plan.jobs.items():
        assert job.command[0] in ("bash", "python")
        assert (REPOSITORY / job.command[1]).is_file(), name
        assert set(job.needs) <= seen, name
        seen.add(name)
    assert len({job.output for job in plan.jobs.values()}) == len(seen)


def test_flags_of_stage_1_are_flags(plan):
    kinds = (arguments.ModelArguments, arguments.DataArguments, arguments.TrainingArguments)
    for job in jobs_of(plan, "cold_start/train.sh"):
        model, data, training = HfArgumentParser(kinds).parse_args_into_dataclasses(list(job.command[2:]))
        for group in (model, data, training):
            group.validate()
        assert training.seed == int(job.name.rpartition("_")[2])
        assert job.output.endswith(f"/checkpoint-{training.max_steps}")


def test_settings_of_stage_2_are_settings(plan, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    given = {
        "config": "dual_rl/examples/config.yaml",
        "data.train_files": __file__,
        "worker.actor.model.model_path": tmp_path,
        "worker.reward.reward_function": f"{__file__}:fixture",
        "trainer.n_gpus_per_node": 1,
    }
    for job in jobs_of(plan, "dual_rl/examples/train.sh"):
        config = load_config([*(f"{key}={value}" for key, value in given.items()), *job.command[2:]])
        assert config.worker.rollout.seed == config.data.seed == int(job.name.rpartition("_")[2])
        assert job.output.endswith(f"/global_step_{config.trainer.max_steps}")


def test_flags_of_inference_and_of_the_world_are_flags(plan):
    for job in jobs_of(plan, "dual_rl/inference.sh"):
        variables = job.environment
        required = ["--model_ckpt", variables["MODEL_CKPT"], "--data_path", "d", "--bench_type", "tabench"]
        options = inference.parse_arguments([*required, "--output", variables["OUTPUT"], *job.command[2:]])
        assert options.mask_cot == (plan.scorings[job.name].read == MASKED)
        assert Path(variables["OUTPUT"]).with_suffix(".json") == Path(job.output)
    (job,) = jobs_of(plan, "cold_start/datasets/make_toy_world.py")
    options = make_toy_world.parse_arguments(job.command[2:])
    assert options.eval_pairs == options.in_domain_pairs == options.new_rendering_pairs == plan.size.held_out_pairs


def test_baselines_differ_from_descore_in_nothing_but_what_they_are():
    names = [job.name for job in SMALL.select(["descore"], seeds=[2])]
    assert names == ["world", "stage1_2", "descore_2", "score_descore_2_own"]
    descore, coupled, off = (set(SMALL.jobs[f"{arm}_1"].command) for arm in ("descore", "coupled", "bt_off"))
    assert off - descore == {"worker.actor.bt_weight=0"}
    assert {text.partition("=")[0] for text in coupled - descore} == {
        "worker.actor.bt_weight", "worker.actor.model.trainable_head", "worker.reward.reward_function",
        "trainer.max_steps",
    }  # fmt: skip
    assert "base_0" in SMALL.jobs["coupled_1"].needs
    assert set(SMALL.jobs["coupled_fast_1"].command) - coupled == {"worker.actor.optim.lr=2e-4"}
    stage1, discriminative = (SMALL.jobs[f"{arm}_1"].command for arm in ("stage1", "discriminative"))
    assert set(discriminative) - set(stage1) == {"--drop_prob", "1.0"}
