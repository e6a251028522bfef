"""Which experiments make the evidence: every one a command that users run, with what it needs and what it leaves.

Nothing is run here. All models start from the tiny base, see the same training pairs and are scored by
dual_rl/inference.sh on the same file of held-out pairs.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from evidence.sizes import BATCH_PAIRS, Size

BASE = "cold_start/model/tiny_base"
PREFERENCE = "dual_rl/baselines/preference_reward.py:compute_score"
MISATTACHED = "dual_rl/baselines/misattached_reward.py:compute_score"
WARMUP_STEPS_SHARE = 0.05
"""Of the short training of stage 1; the long one warms up for as many steps, so that its beginning is the same run."""
OWN, MASKED = "own", "masked"
"""How a model is scored: after the chain of thought that it writes, or without one."""

STAGE1 = (
    "--per_device_train_batch_size", str(BATCH_PAIRS), "--gradient_accumulation_steps", "1",
    "--learning_rate", "5e-5", "--merger_lr", "5e-6", "--vision_lr", "5e-6",
    "--special_token_lr", "1e-2", "--rm_head_lr", "1e-2", "--gradient_checkpointing", "False",
    "--dataloader_num_workers", "1", "--report_to", "none", "--resume_from_checkpoint", "latest",
)  # fmt: skip
NO_LEARNING = tuple(
    part for name in ("learning_rate", "merger_lr", "vision_lr", "special_token_lr", "rm_head_lr")
    for part in (f"--{name}", "0")
)  # fmt: skip
STAGE2 = (
    "data.max_prompt_length=512",
    f"data.rollout_batch_size={BATCH_PAIRS}",
    f"worker.actor.global_batch_size={BATCH_PAIRS // 2}",
    "worker.actor.micro_batch_size_per_device_for_update=1",
    "worker.actor.micro_batch_size_per_device_for_experience=2",
    "worker.actor.optim.lr=5e-5",
    "worker.actor.optim.head_lr=1e-3",
    "worker.actor.optim.lr_scheduler_type=cosine",
    "algorithm.kl_coef=1e-3",
    "trainer.save_freq=-1",
    "trainer.save_model_only=true",
    "trainer.logger=[file]",
)
STAGE1_ON_GPU = ("--torch_compile", "False")
STAGE2_ON_GPU = (
    "worker.actor.model.enable_compile=false",
    "worker.actor.model.enable_gradient_checkpointing=false",
    "worker.actor.offload.offload_params=false",
    "worker.actor.offload.offload_optimizer=false",
    "worker.ref.fsdp.enable_cpu_offload=false",
    "worker.rollout.enforce_eager=true",
)
"""What pays for large models only: compiling would take most of a tiny one's time. On CPUs train.sh leaves it out."""
CACHE_GIB = 1
"""Of vLLM, told: by itself it would measure how much memory is free, which changes as other jobs come and go."""
SCORING_BATCH = 256
"""Videos in an engine at a time: a tiny model's time is that of launching its kernels."""
STAGE1_SECONDS, STAGE2_SECONDS = (36.0, 0.29), (60.0, 4.0)
SCORING_SECONDS = {OWN: 110.0, MASKED: 55.0}
"""Of a start and each step, and of a scoring (with 64 videos at a time), as eight jobs on an H100 and 12 cores took.

They only decide which job starts first, and which no more.
"""
MASKING = {"mask_0": 0.0, "mask_25": 0.25, "mask_75": 0.75}
DATA_PERCENTS = (10, 25, 50)
REINFORCED = {  # ablations of stage 2
    "bt_off": ("worker.actor.bt_weight=0",),
    "misattached": (f"worker.reward.reward_function={MISATTACHED}",),
}
COUPLED = {  # the generative model; DeScore's learning rate need not be the best for it
    "coupled": (),
    "coupled_fast": ("worker.actor.optim.lr=2e-4",),
}
MAIN_ARMS = ("discriminative", *COUPLED, "stage1", "descore", "stage1_short")
"""The four models, and stage 1 where stage 2 takes over: an earlier checkpoint of the same run."""


@dataclass(frozen=True)
class Device:
    """Where experiments run: `num_gpus` 0 for a CPU, else 1; `memory_share` of the GPU for each engine."""

    num_gpus: int = 0
    memory_share: float = 0.3
    scoring_threads: int = 1


@dataclass(frozen=True)
class Job:
    """One command. `needs`: names of jobs before it. `output`: a path that is there when it has succeeded.

    `seconds`: a guess of how long it takes, to choose between jobs.
    """

    name: str
    command: tuple[str, ...]
    output: str
    environment: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    seconds: float = 1.0

    @property
    def text(self) -> str:
        """The command as it can be typed in the repository root."""
        return " ".join([*(f"{name}={value}" for name, value in self.environment.items()), *self.command])


@dataclass(frozen=True)
class Scoring:
    """Results to collect: of `arm` with `seed`, read `OWN` or `MASKED`, from what the job `name` wrote."""

    arm: str
    seed: int
    read: str

    @property
    def name(self) -> str:
        return f"score_{self.arm}_{self.seed}_{self.read}"


class Plan:
    """All jobs of a size, each behind what it needs, and what will be scored; paths below `work`."""

    def __init__(self, size: Size, work: str, *, device: Device) -> None:
        self.size, self.work, self.device = size, work, device
        self.jobs: dict[str, Job] = {}
        self.scorings: dict[str, Scoring] = {}
        self._add_world()
        for seed in size.seeds:
            self._add_main_arms(seed)
        for seed in size.ablation_seeds:
            self._add_ablations(seed)

    def _add(
        self,
        name: str,
        *command: str,
        output: str,
        needs: tuple[str, ...] = (),
        seconds: float = 1.0,
        **environment: str,
    ) -> None:
        self.jobs[name] = Job(name, command, f"{self.work}/{output}", environment, needs, seconds)

    def _add_world(self) -> None:
        size, world = self.size, f"{self.work}/world"
        counts = {"train": size.train_pairs} | dict.fromkeys(
            ("eval", "in_domain", "new_rendering"), size.held_out_pairs
        )
        flags = [part for split, count in counts.items() for part in (f"--{split}_pairs", str(count))]
        make = ("python", "cold_start/datasets/make_toy_world.py", "--output", world)
        self._add("world", *make, *flags, output="world/bench_held_out.csv")
        for percent in DATA_PERCENTS:
            name = f"train_{percent}.csv"
            take = ("python", "figure/evidence/take_rows.py", f"{world}/train.csv", f"{world}/{name}")
            count = str(max(1, size.train_pairs * percent // 100))
            self._add(f"data_{percent}", *take, count, output=f"world/{name}", needs=("world",))
        self._add_stage1("base", 0, *NO_LEARNING, steps=1)
        self._score("base", 0, steps=1)

    def _add_main_arms(self, seed: int) -> None:
        size = self.size
        for arm, flags in (("stage1", ()), ("discriminative", ("--drop_prob", "1.0"))):
            self._add_stage1(arm, seed, *flags, steps=size.long_steps)
        preference = (f"worker.reward.reward_function={PREFERENCE}",)
        settings = ("worker.actor.bt_weight=0", "worker.actor.model.trainable_head=false", *preference)
        for arm, further in COUPLED.items():
            self._add_stage2(arm, seed, *settings, *further, start=("base_0", 1), steps=size.coupled_steps)
        self._add_stage2("descore", seed, start=(f"stage1_{seed}", size.short_steps), steps=size.rl_steps)
        self._score("stage1_short", seed, run="stage1", steps=size.short_steps)
        self._score("stage1", seed, steps=size.long_steps)
        self._score("discriminative", seed, steps=size.long_steps, read=MASKED)
        self._score("descore", seed, steps=size.rl_steps)
        for arm in COUPLED:
            self._score(arm, seed, steps=size.coupled_steps)

    def _add_ablations(self, seed: int) -> None:
        short = self.size.short_steps
        for arm, settings in REINFORCED.items():
            self._add_stage2(arm, seed, *settings, start=(f"stage1_{seed}", short), steps=self.size.rl_steps)
            self._score(arm, seed, steps=self.size.rl_steps)
        variants = {arm: ("--drop_prob", str(share)) for arm, share in MASKING.items()}
        variants["frozen_vision"] = ("--freeze_vision_tower", "True", "--tune_merger", "False")
        for arm, flags in variants.items():
            self._add_stage1(arm, seed, *flags, steps=short)
            self._score(arm, seed, steps=short)
        for arm in MASKING:
            self._score(arm, seed, steps=short, read=MASKED)
        self._score("stage1_short", seed, run="stage1", steps=short, read=MASKED)
        self._score("discriminative_short", seed, run="discriminative", steps=short, read=MASKED)
        for percent in DATA_PERCENTS:
            for arm, flags, read in (("stage1", (), OWN), ("discriminative", ("--drop_prob", "1.0"), MASKED)):
                name = f"{arm}_data_{percent}"
                self._add_stage1(name, seed, *flags, steps=short, percent=percent)
                self._score(name, seed, steps=short, read=read)

    def _add_stage1(self, arm: str, seed: int, *flags: str, steps: int, percent: int = 100) -> None:
        """A training of stage 1 that saves after `short_steps` and at its end; equal steps, however few the pairs."""
        size, run = self.size, f"{arm}_{seed}"
        pairs = size.train_pairs if percent == 100 else max(1, size.train_pairs * percent // 100)
        steps_per_epoch = -(-pairs // BATCH_PAIRS)
        warmup = WARMUP_STEPS_SHARE * min(1.0, size.short_steps / steps)
        schedule = ("--max_steps", str(steps), "--num_train_epochs", str(-(-steps // steps_per_epoch)),
                    "--save_epochs", f"{size.short_steps / steps_per_epoch:.6g}",
                    "--warmup_ratio", f"{warmup:.6g}", "--seed", str(seed))  # fmt: skip
        on_gpu = STAGE1_ON_GPU if self.device.num_gpus else ()
        self._add(
            run, "bash", "cold_start/train.sh", *STAGE1, *on_gpu, *schedule, *flags,
            output=f"{run}/checkpoint-{steps}",
            needs=("world",) if percent == 100 else (f"data_{percent}",),
            seconds=STAGE1_SECONDS[0] + STAGE1_SECONDS[1] * steps,
            MODEL_PATH=BASE,
            DATA=f"{self.work}/world/train{'' if percent == 100 else f'_{percent}'}.csv",
            OUTPUT_DIR=f"{self.work}/{run}",
            **self._where(),
        )  # fmt: skip

    def _add_stage2(self, arm: str, seed: int, *settings: str, start: tuple[str, int], steps: int) -> None:
        run, (start_run, start_step) = f"{arm}_{seed}", start
        sampling = (f"worker.rollout.n={self.size.responses}", f"data.max_response_length={self.size.max_tokens}")
        seeding = (f"data.seed={seed}", f"worker.rollout.seed={seed}", f"trainer.max_steps={steps}")
        memory = (f"worker.rollout.gpu_memory_utilization={self.device.memory_share}",
                  f"worker.rollout.kv_cache_gib={CACHE_GIB}")  # fmt: skip
        on_gpu = (*memory, *STAGE2_ON_GPU) if self.device.num_gpus else ()
        self._add(
            run, "bash", "dual_rl/examples/train.sh", *STAGE2, *sampling, *seeding, *on_gpu, *settings,
            output=f"{run}/global_step_{steps}",
            needs=(start_run,),
            seconds=STAGE2_SECONDS[0] + STAGE2_SECONDS[1] * steps,
            MODEL_PATH=f"{self.work}/{start_run}/checkpoint-{start_step}",
            TRAIN_FILES=f"{self.work}/world/train_rl.csv",
            OUTPUT_DIR=f"{self.work}/{run}",
            EXP_NAME=run,
            **self._where(),
        )  # fmt: skip

    def _score(self, arm: str, seed: int, *, steps: int, run: str | None = None, read: str = OWN) -> None:
        """Score the arm's model, which is a checkpoint of the training `run` (by default its own)."""
        scoring, trained = Scoring(arm, seed, read), f"{run or arm}_{seed}"
        self.scorings[scoring.name] = scoring
        is_stage2 = "dual_rl/examples/train.sh" in self.jobs[trained].command
        flags = ["--max_new_tokens", str(self.size.max_tokens), "--num_threads", str(self.device.scoring_threads)]
        if self.device.num_gpus:
            flags += ["--gpu_memory_utilization", str(self.device.memory_share), "--kv_cache_gib", str(CACHE_GIB)]
            flags += ["--enforce_eager", "--batch_size", str(SCORING_BATCH)]
        self._add(
            scoring.name, "bash", "dual_rl/inference.sh", *flags, *(["--mask_cot"] if read == MASKED else []),
            output=f"scores/{arm}_{seed}_{read}.json",
            needs=(trained,),
            seconds=SCORING_SECONDS[read],
            MODEL_CKPT=f"{self.work}/{trained}/{'global_step_' if is_stage2 else 'checkpoint-'}{steps}",
            DATA_PATH=f"{self.work}/world/bench_held_out.csv",
            BENCH_TYPE="tabench",
            OUTPUT=f"{self.work}/scores/{arm}_{seed}_{read}.csv",
        )  # fmt: skip

    def _where(self) -> dict[str, str]:
        return {"NUM_GPUS": str(self.device.num_gpus), "NUM_PROCESSES": "1"}

    def select(self, patterns: Sequence[str] = (), *, seeds: Collection[int] | None = None) -> list[Job]:
        """The jobs whose arm or name fits a shell pattern (all without one), with all that they need, in order.

        `seeds`: of these scorings only, and what they need.
        """

        def fits(name: str) -> bool:
            scoring = self.scorings.get(name)
            if seeds is not None and (scoring is None or scoring.seed not in seeds):
                return False
            names = (name, scoring.arm) if scoring else (name,)
            return not patterns or any(fnmatchcase(text, pattern) for text in names for pattern in patterns)

        wanted = {name for name in self.jobs if fits(name)}
        for name in reversed(self.jobs):  # needs come before what needs them
            if name in wanted:
                wanted.update(self.jobs[name].needs)
        return [job for name, job in self.jobs.items() if name in wanted]
