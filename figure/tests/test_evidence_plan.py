"""The plan: every command exists, every flag and setting of it is one, and what is compared is comparable."""

from pathlib import Path

import pytest

from evidence.plan import DATA_PERCENTS, MASKED, OWN, Device, Job, Plan
from evidence.sizes import SIZES
from evidence.take_rows import take_rows

REPOSITORY = Path(__file__).resolve().parents[2]
DEVICES = {"cpu": Device(), "gpu": Device(1, 0.1, 4)}


@pytest.fixture(params=[(size, device) for size in SIZES for device in DEVICES], ids="-".join)
def plan(request) -> Plan:
    size, device = request.param
    return Plan(SIZES[size], "figure/output/any", device=DEVICES[device])


def script(job: Job) -> str:
    return job.command[1]


def jobs_of(plan: Plan, name: str) -> list[Job]:
    jobs = [job for job in plan.jobs.values() if script(job) == name]
    assert jobs
    return jobs


def test_every_command_runs_a_file_of_the_repository(plan):
    for job in plan.jobs.values():
        assert job.command[0] in ("bash", "python")
        assert (REPOSITORY / script(job)).is_file(), job.name


def test_what_a_job_needs_stands_before_it(plan):
    seen = set()
    for name, job in plan.jobs.items():
        assert set(job.needs) <= seen, name
        seen.add(name)


def test_outputs_are_all_different(plan):
    outputs = [job.output for job in plan.jobs.values()]
    assert len(set(outputs)) == len(outputs)


def test_flags_of_stage_1_are_flags(plan):
    from transformers import HfArgumentParser

    import arguments

    parser = HfArgumentParser((arguments.ModelArguments, arguments.DataArguments, arguments.TrainingArguments))
    for job in jobs_of(plan, "cold_start/train.sh"):
        model, data, training = parser.parse_args_into_dataclasses(list(job.command[2:]))
        arguments.validate_all(model, data, training)
        assert training.seed == int(job.name.rpartition("_")[2])
        steps = training.max_steps
        assert job.output.endswith(f"/checkpoint-{steps}")


def test_settings_of_stage_2_are_settings(plan, tmp_path, monkeypatch):
    from verl.config_loading import load_config

    monkeypatch.chdir(REPOSITORY)
    given = {
        "config": "dual_rl/examples/config.yaml",
        "data.train_files": __file__,
        "worker.actor.model.model_path": tmp_path,
        "worker.reward.reward_function": f"{__file__}:fixture",
        "trainer.n_gpus_per_node": 1,
    }
    jobs = [job for job in jobs_of(plan, "dual_rl/examples/train.sh") if job.name.endswith(("_1", "_2"))]
    for job in jobs:  # those of further seeds are alike, and reading settings takes a while
        config = load_config([*(f"{key}={value}" for key, value in given.items()), *job.command[2:]])
        assert config.worker.rollout.seed == config.data.seed == int(job.name.rpartition("_")[2])
        assert job.output.endswith(f"/global_step_{config.trainer.max_steps}")


def test_on_gpus_nothing_is_compiled_and_on_cpus_nothing_is_said_of_it(plan):
    """That the flags are flags is tested above."""
    wanted = {
        "cold_start/train.sh": ("--torch_compile False",),
        "dual_rl/examples/train.sh": (
            "worker.actor.model.enable_compile=false",
            "worker.rollout.enforce_eager=true",
            f"worker.rollout.gpu_memory_utilization={plan.device.memory_share}",
            "worker.rollout.kv_cache_gib=1",
        ),
        "dual_rl/inference.sh": (
            "--enforce_eager",
            "--kv_cache_gib 1",
            f"--gpu_memory_utilization {plan.device.memory_share}",
        ),
    }
    for name, parts in wanted.items():
        for job in jobs_of(plan, name):
            assert [part in job.text for part in parts] == [bool(plan.device.num_gpus)] * len(parts), job.name


def test_flags_of_inference_are_flags(plan):
    import inference

    for job in jobs_of(plan, "dual_rl/inference.sh"):
        variables = job.environment
        required = ["--model_ckpt", variables["MODEL_CKPT"], "--data_path", "d", "--bench_type", "tabench"]
        options = inference.parse_arguments([*required, "--output", variables["OUTPUT"], *job.command[2:]])
        assert options.mask_cot == (plan.scorings[job.name].read == MASKED)
        assert Path(variables["OUTPUT"]).with_suffix(".json") == Path(job.output)


def test_flags_of_the_world_are_flags(plan):
    import make_toy_world

    (job,) = jobs_of(plan, "cold_start/datasets/make_toy_world.py")
    options = make_toy_world.parse_arguments(job.command[2:])
    assert options.eval_pairs == options.in_domain_pairs == options.new_rendering_pairs == plan.size.held_out_pairs


def test_scored_models_are_checkpoints_that_a_run_leaves(plan):
    """At the end of the run, or after the short training within it."""
    for job in jobs_of(plan, "dual_rl/inference.sh"):
        (trained,) = (plan.jobs[name] for name in job.needs)
        model = job.environment["MODEL_CKPT"]
        steps = int(model.rpartition("-" if "checkpoint-" in model else "_")[2])
        assert model.startswith(trained.environment["OUTPUT_DIR"] + "/")
        assert model == trained.output or steps == plan.size.short_steps


def test_the_four_models_have_three_seeds_or_more_in_what_is_committed():
    for name in ("small", "full"):
        plan = Plan(SIZES[name], "w", device=Device())
        for arm, read in (("stage1", OWN), ("descore", OWN), ("coupled", OWN), ("discriminative", MASKED)):
            assert len({s.seed for s in plan.scorings.values() if (s.arm, s.read) == (arm, read)}) >= 3


def test_long_training_of_stage_1_begins_as_the_short_one():
    """Where stage 2 begins is what the ablations of stage 1 are compared with: as many steps of warm-up."""
    plan = Plan(SIZES["small"], "w", device=Device())
    warmup = {}
    for name in ("stage1_1", "mask_0_1"):
        flags = dict(zip(plan.jobs[name].command[2::2], plan.jobs[name].command[3::2], strict=True))
        warmup[name] = round(float(flags["--warmup_ratio"]) * int(flags["--max_steps"]))
    assert warmup["stage1_1"] == warmup["mask_0_1"] == 11


def test_baselines_differ_from_descore_in_nothing_but_what_they_are():
    plan = Plan(SIZES["small"], "w", device=Device())
    descore, coupled, off = (set(plan.jobs[f"{arm}_1"].command) for arm in ("descore", "coupled", "bt_off"))
    assert off - descore == {"worker.actor.bt_weight=0"}
    assert {text.partition("=")[0] for text in coupled - descore} == {
        "worker.actor.bt_weight", "worker.actor.model.trainable_head", "worker.reward.reward_function",
        "trainer.max_steps",
    }  # fmt: skip
    assert "base_0" in plan.jobs["coupled_1"].needs
    assert set(plan.jobs["coupled_fast_1"].command) - coupled == {"worker.actor.optim.lr=2e-4"}
    stage1, discriminative = (plan.jobs[f"{arm}_1"].command for arm in ("stage1", "discriminative"))
    assert set(discriminative) - set(stage1) == {"--drop_prob", "1.0"}


def test_selection_takes_what_is_needed_along():
    plan = Plan(SIZES["small"], "w", device=Device())
    names = [job.name for job in plan.select(["descore"], seeds=[2])]
    assert names == ["world", "stage1_2", "descore_2", "score_descore_2_own"]
    assert [job.name for job in plan.select()] == list(plan.jobs)
    assert f"score_stage1_data_{DATA_PERCENTS[0]}_1_own" in [job.name for job in plan.select(["*data*"])]


def test_rows_are_taken_whole(tmp_path):
    source, target = tmp_path / "all.csv", tmp_path / "some.csv"
    source.write_text('a,b\n1,"two\nlines"\n3,4\n')
    take_rows(str(source), str(target), 1)
    assert target.read_text() == 'a,b\n1,"two\nlines"\n'
    with pytest.raises(ValueError, match="has 2 rows, not 3"):
        take_rows(str(source), str(target), 3)
