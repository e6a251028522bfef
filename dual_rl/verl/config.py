"""Every setting of stage 2 with its default and its bounds; `config_loading.py` reads and checks them.

Every key is read by some code, and an unknown key is an error. This module imports nothing of ours.
"""

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

AdvantageEstimator = Literal["grpo", "rloo"]
KlPenalty = Literal["kl", "abs", "mse", "low_var_kl", "full"]
PolicyLossType = Literal["default", "gspo", "gspo_token", "cispo"]
LossAverage = Literal["token", "seq"]
Precision = Literal["auto", "bf16", "fp32"]
Logger = Literal["console", "file", "tensorboard", "wandb"]


def _require_minus_one_or_positive(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError("must be -1 or at least 1")
    return value


Count = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
MinusOneOrCount = Annotated[int, AfterValidator(_require_minus_one_or_positive)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]

QUANTIZED_CAP = 2.0
"""Of the importance weights of quantized rollouts, where none is set."""

settings = dataclass(config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))


@settings
class DataConfig:
    train_files: str = ""
    """CSV with videos, problem and answer."""
    val_files: str | None = None
    """Held-out CSV of the same form; without it there is no validation."""
    prompt_key: str = "problem"
    answer_key: str = "answer"
    video_key: str = "videos"
    image_dir: str | None = None
    """Folder of relative video paths; by default that of the CSV."""
    video_fps: Positive | None = None
    """Frames per second. By default this and the pixel limits are those that the model was trained with."""
    min_pixels: Count | None = None
    max_pixels: Count | None = None
    max_prompt_length: Count = 8192
    """Tokens of the user turn, including the video's."""
    max_response_length: Count = 2048
    rollout_batch_size: Count = 128
    """Pairs per step."""
    val_batch_size: Count = 64
    """Pairs validated at a time; the last batch may be smaller."""
    format_prompt: str | None = None
    """Jinja file around the problem (variable `content`); by default the checkpoint's own."""
    shuffle: bool = True
    seed: NonNegativeInt = 1
    filter_overlong_prompts: bool = True
    """Leave out and count pairs whose prompt is too long; otherwise they are an error."""
    max_dropped_share: ShareBelowOne = 0.01
    """Share of a CSV's pairs that may be dropped because a video no longer decodes. With more, the run ends."""


@settings
class AlgorithmConfig:
    adv_estimator: AdvantageEstimator = "grpo"
    disable_kl: bool = False
    use_kl_loss: bool = True
    """KL to the reference as a loss; otherwise it is subtracted from the reward."""
    kl_penalty: KlPenalty = "low_var_kl"
    kl_coef: NonNegative = 1e-5
    online_filtering: bool = False
    """Keep only pairs with a group whose mean `filter_key` is between the limits; draw until a batch is full."""
    filter_key: str = "overall"
    filter_low: float = 0.01
    filter_high: float = 0.99

    @property
    def has_kl_loss(self) -> bool:
        return self.use_kl_loss and not self.disable_kl

    @property
    def has_kl_reward(self) -> bool:
        return not self.use_kl_loss and not self.disable_kl


@settings
class LoraConfig:
    rank: NonNegativeInt = 0
    """0: full fine-tuning."""
    alpha: Count = 128


@settings
class ModelConfig:
    model_path: str = ""
    """Stage 1 `checkpoint-N`, a stage 2 `huggingface/` folder, or a Qwen3-VL model."""
    head_path: str | None = None
    """`rm_head.pth` or a folder that holds it; by default that of model_path."""
    trainable_head: bool = True
    """Train the head and the `<Reward>` row with Bradley-Terry."""
    freeze_vision_tower: bool = True
    enable_gradient_checkpointing: bool = True
    """Recompute activations in the backward pass where they do not fit into the device's memory (CPUs: always)."""
    max_kept_layers: NonNegativeInt | None = None
    """Upper limit of layers that keep their activations on a GPU. By default as many as fit; 0 needs least memory."""
    enable_compile: bool = True
    """Fuse the text layers with torch.compile, on GPUs; the first step takes a minute longer."""
    lora: LoraConfig = field(default_factory=LoraConfig)


@settings
class OptimConfig:
    lr: NonNegative = 1e-6
    head_lr: NonNegative | None = None
    """Of the head and the `<Reward>` row; by default that of the model."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.999)
    weight_decay: NonNegative = 0.01
    lr_warmup_ratio: Share = 0.0
    """Share of all steps over which the learning rate rises from zero."""
    lr_scheduler_type: Literal["constant", "cosine"] = "constant"
    min_lr_ratio: Share = 0.0
    """Final learning rate of cosine, as a share of lr."""


@settings
class FsdpConfig:
    fsdp_size: MinusOneOrCount = -1
    """Ranks that share one copy of the weights; fewer than there are: hybrid sharding (HSDP)."""
    enable_cpu_offload: bool = False
    """Keep sharded weights, gradients and optimizer state in host memory and compute on the device."""
    precision: Precision = "auto"
    """Of matrix products; the master weights are fp32. auto: bf16 on GPUs, fp32 on CPUs."""


@settings
class RefOffloadConfig:
    offload_params: bool = False
    """Move the sharded weights to host memory while responses are generated."""


@settings
class OffloadConfig(RefOffloadConfig):
    offload_optimizer: bool = False
    """Keep the optimizer state in host memory outside the optimizer step."""


@settings
class ActorConfig:
    global_batch_size: Count = 128
    """Pairs per optimizer step; it divides the rollout batch."""
    micro_batch_size_per_device_for_update: Count = 1
    """Pairs in one forward and backward pass; does not change the result."""
    micro_batch_size_per_device_for_experience: Count = 2
    """Pairs in one forward pass without gradient."""
    max_grad_norm: Positive = 1.0
    clip_ratio_low: PositiveShare = 0.2
    clip_ratio_high: Positive = 0.3
    clip_ratio_dual: Annotated[float, Field(gt=1)] = 3.0
    loss_type: PolicyLossType = "default"
    loss_avg_mode: LossAverage = "token"
    ppo_epochs: Count = 1
    bt_weight: NonNegative = 5e-3
    importance_sampling_cap: Positive | None = None
    """Weigh each token by trainer over rollout probability, at most this much (truncated importance sampling).

    null: no weights, except that quantized rollouts are weighed with a cap of 2."""
    ulysses_size: Count = 1
    """Ranks that share each sequence (DeepSpeed-Ulysses)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)


@settings
class RefConfig:
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    """Sharding of the reference model; with LoRA it is the actor with its adapter off and needs none."""
    offload: RefOffloadConfig = field(default_factory=RefOffloadConfig)


@settings
class ValSamplingConfig:
    n: Count | None = 1
    temperature: NonNegative | None = 0.0
    top_p: PositiveShare | None = None
    top_k: MinusOneOrCount | None = None


@settings
class RolloutConfig:
    name: Literal["vllm", "hf"] = "vllm"
    n: Annotated[int, Field(ge=2)] = 8
    """Responses per video; a group of one has no advantage."""
    temperature: Positive = 1.0
    top_p: PositiveShare = 1.0
    top_k: MinusOneOrCount = -1
    seed: NonNegativeInt = 1
    precision: Precision = "auto"
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.5
    tensor_parallel_size: Count = 1
    max_num_batched_tokens: Count = 16384
    max_num_seqs: Count = 256
    enforce_eager: bool = False
    shared_prompt_decoding: bool = True
    """Read a prompt's cache once for all its responses, where supported: vllm on Hopper GPUs."""
    quantization: Literal["fp8"] | None = None
    """fp8: the engine's language model multiplies in FP8, scaled per output channel and token. vllm on GPUs."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """fp8: half the cache, without scales. vllm on Hopper GPUs."""
    kv_cache_gib: Count | None = None
    """Memory of vLLM's KV cache; None: what gpu_memory_utilization leaves, 1 on a CPU."""
    log_prob_bound: Positive = 0.1
    """Tokens whose log-prob differs by more than this between rollout and trainer are counted and logged."""
    max_log_prob_difference: Positive = 0.2
    """The run stops when log-probs of rollout and trainer differ by more than this on average over a mini-batch."""
    val_override_config: ValSamplingConfig = field(default_factory=ValSamplingConfig)
    """Sampling of validation; null values are as in training."""

    @property
    def is_quantized(self) -> bool:
        return self.quantization is not None or self.kv_cache_dtype != "auto"


@settings
class RewardConfig:
    reward_function: str = ""
    """path.py:function"""
    reward_function_kwargs: dict[str, Any] = field(default_factory=dict)


@settings
class WorkerConfig:
    actor: ActorConfig = field(default_factory=ActorConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    ref: RefConfig = field(default_factory=RefConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)

    @property
    def importance_sampling_cap(self) -> float | None:
        """Of truncated importance sampling; None: no weights."""
        is_implied = self.actor.importance_sampling_cap is None and self.rollout.is_quantized
        return QUANTIZED_CAP if is_implied else self.actor.importance_sampling_cap


@settings
class TrainerConfig:
    total_epochs: Count = 1
    max_steps: Count | None = None
    project_name: str = "descore"
    experiment_name: str = "dual_rl"
    logger: list[Logger] = field(default_factory=lambda: ["console", "file"])
    nnodes: Count = 1
    n_gpus_per_node: NonNegativeInt = 1
    """0: train on CPUs."""
    n_cpu_ranks_per_node: Count = 1
    """Training processes per node where n_gpus_per_node is 0."""
    val_freq: MinusOneOrCount = -1
    """Steps between validations; -1: only after the last."""
    val_before_train: bool = True
    val_only: bool = False
    val_generations_to_log: NonNegativeInt = 4
    save_freq: MinusOneOrCount = -1
    """Steps between checkpoints; -1: only after the last."""
    save_limit: MinusOneOrCount = -1
    """Newest checkpoints kept, besides the best; -1: all."""
    save_model_only: bool = False
    """Save no state for resuming."""
    save_checkpoint_path: str | None = None
    """By default results/EXPERIMENT_NAME."""
    load_checkpoint_path: str | None = None
    """A global_step_N to continue from."""
    find_last_checkpoint: bool = True
    """Continue from the last checkpoint under save_checkpoint_path if there is one."""

    @property
    def ranks_per_node(self) -> int:
        """Training processes on each node: one per GPU, or the CPU ranks where there is none."""
        return self.n_gpus_per_node or self.n_cpu_ranks_per_node

    @property
    def num_ranks(self) -> int:
        return self.nnodes * self.ranks_per_node

    @property
    def output_folder(self) -> Path:
        """Where checkpoints and logs of the run go."""
        return Path(self.save_checkpoint_path or Path("results") / self.experiment_name).absolute()


@settings
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
