"""Every setting of stage 2: dataclasses that a YAML file and `key=value` arguments fill in.

A key that no code reads does not exist, and an unknown one is an error. Where a choice is between fixed words, its
type lists them. `settings.py` reads them, looks at what must agree across fields, and says how to mend it.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

AdvantageEstimator = Literal["grpo", "rloo"]
KlPenalty = Literal["kl", "abs", "mse", "low_var_kl", "full"]
PolicyLossType = Literal["default", "gspo", "gspo_token", "cispo"]
LossAverage = Literal["token", "seq"]
Precision = Literal["auto", "bf16", "fp32"]


@dataclass
class DataConfig:
    train_files: str = MISSING
    """CSV with videos, problem and answer."""
    val_files: str | None = None
    """Held-out CSV of the same form; without it there is no validation."""
    prompt_key: str = "problem"
    answer_key: str = "answer"
    video_key: str = "videos"
    image_dir: str | None = None
    """Folder that relative video paths start from; by default the CSV's own."""
    video_fps: float | None = None
    """Frames per second; by default, like the pixel limits, what the model was trained with."""
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_prompt_length: int = 8192
    """Tokens of the user turn, the video's included."""
    max_response_length: int = 2048
    rollout_batch_size: int = 128
    """Pairs drawn in each step."""
    val_batch_size: int = 64
    """Pairs validated at a time; the last batch may be smaller, nothing is dropped."""
    format_prompt: str | None = None
    """Jinja file around the problem (variable `content`); by default the checkpoint's own."""
    shuffle: bool = True
    seed: int = 1
    filter_overlong_prompts: bool = True
    """Leave out pairs with a longer prompt and say how many; otherwise they are an error."""


@dataclass
class AlgorithmConfig:
    adv_estimator: AdvantageEstimator = "grpo"
    disable_kl: bool = False
    use_kl_loss: bool = True
    """KL to the reference as a loss; otherwise it is taken off the reward."""
    kl_penalty: KlPenalty = "low_var_kl"
    kl_coef: float = 1e-5
    online_filtering: bool = False
    """Keep only pairs with a group whose mean `filter_key` lies between the limits; draw until there are enough."""
    filter_key: str = "overall"
    filter_low: float = 0.01
    filter_high: float = 0.99
    max_filter_rounds: int = 20
    """Give up when so many batches did not fill one step."""


@dataclass
class LoraConfig:
    rank: int = 0
    """0: full fine-tuning."""
    alpha: int = 128


@dataclass
class ModelConfig:
    model_path: str = MISSING
    """Stage 1 `checkpoint-N`, a stage 2 `huggingface/` folder, or a Qwen3-VL model."""
    head_path: str | None = None
    """`rm_head.pth` or a folder that holds it; by default that of model_path."""
    trainable_head: bool = True
    """Train the head and the `<Reward>` row with Bradley-Terry."""
    freeze_vision_tower: bool = True
    enable_gradient_checkpointing: bool = True
    """Compute activations again in the backward pass where they do not fit into the device's memory (CPUs: always)."""
    max_kept_layers: int | None = None
    """Most layers that keep their activations on a GPU, by default as many as fit; 0 takes the least memory."""
    enable_compile: bool = True
    """Fuse the text layers with torch.compile, on GPUs; the first step takes a minute longer."""
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class OptimConfig:
    lr: float = 1e-6
    head_lr: float | None = None
    """Of the head and the `<Reward>` row; by default that of the model."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    lr_warmup_ratio: float = 0.0
    """Share of all steps over which the learning rate rises from zero."""
    lr_scheduler_type: Literal["constant", "cosine"] = "constant"
    min_lr_ratio: float = 0.0
    """Where cosine ends, as a share of lr."""


@dataclass
class FsdpConfig:
    fsdp_size: int = -1
    """Ranks that share one copy of the weights; fewer than there are: hybrid sharding (HSDP)."""
    enable_cpu_offload: bool = False
    """Keep sharded weights, gradients and optimizer state in host memory and compute on the device."""
    precision: Precision = "auto"
    """Of matrix products; the master weights are fp32. auto: bf16 on GPUs, fp32 on CPUs."""


@dataclass
class OffloadConfig:
    offload_params: bool = False
    """Move the sharded weights to host memory while responses are generated."""
    offload_optimizer: bool = False
    """Keep the optimizer state in host memory outside of the optimizer's step."""


@dataclass
class ActorConfig:
    global_batch_size: int = 128
    """Pairs per optimizer step; it divides the rollout batch."""
    micro_batch_size_per_device_for_update: int = 1
    """Pairs in one forward and backward pass; does not change the result."""
    micro_batch_size_per_device_for_experience: int = 2
    """Pairs in one forward pass without gradient."""
    max_grad_norm: float = 1.0
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.3
    clip_ratio_dual: float = 3.0
    loss_type: PolicyLossType = "default"
    loss_avg_mode: LossAverage = "token"
    ppo_epochs: int = 1
    bt_weight: float = 5e-3
    importance_sampling_cap: float | None = None
    """Weigh each token by trainer over rollout probability, at most this much (truncated importance sampling)."""
    ulysses_size: int = 1
    """Ranks that share each sequence (DeepSpeed-Ulysses)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)


@dataclass
class RefConfig:
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    """Sharding of the reference model; with LoRA it is the actor with its adapter off and needs none."""
    offload: OffloadConfig = field(default_factory=OffloadConfig)


@dataclass
class RolloutConfig:
    name: Literal["vllm", "hf"] = "vllm"
    n: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    seed: int = 1
    precision: Precision = "auto"
    gpu_memory_utilization: float = 0.5
    tensor_parallel_size: int = 1
    max_num_batched_tokens: int = 16384
    max_num_seqs: int = 256
    enforce_eager: bool = False
    kv_cache_gib: int | None = None
    """Memory of vLLM's KV cache; None: what gpu_memory_utilization leaves, 1 on a CPU."""
    log_prob_bound: float = 0.1
    """Tokens whose log-prob differs by more between rollout and trainer are counted and logged."""
    val_override_config: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.0, "n": 1})
    """Sampling of validation, where it differs: n, temperature, top_p, top_k."""


@dataclass
class RewardConfig:
    reward_function: str = MISSING
    """path.py:function"""
    reward_function_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class WorkerConfig:
    actor: ActorConfig = field(default_factory=ActorConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    ref: RefConfig = field(default_factory=RefConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)


@dataclass
class TrainerConfig:
    total_epochs: int = 1
    max_steps: int | None = None
    project_name: str = "descore"
    experiment_name: str = "dual_rl"
    logger: list[str] = field(default_factory=lambda: ["console", "file"])
    """Of console, file, tensorboard and wandb."""
    nnodes: int = 1
    n_gpus_per_node: int = 1
    """0: train on CPUs."""
    n_cpu_ranks_per_node: int = 1
    """Training processes per node where n_gpus_per_node is 0."""
    master_port: int = 0
    """Port of the processes' meeting point; 0: a free one."""
    val_freq: int = -1
    """Steps between validations; -1: only after the last."""
    val_before_train: bool = True
    val_only: bool = False
    val_generations_to_log: int = 4
    save_freq: int = -1
    """Steps between checkpoints; -1: only after the last."""
    save_limit: int = -1
    """Checkpoints kept beside the best; -1: all."""
    save_model_only: bool = False
    """Leave out what resuming needs."""
    save_checkpoint_path: str | None = None
    """By default results/EXPERIMENT_NAME."""
    load_checkpoint_path: str | None = None
    """A global_step_N to continue from."""
    find_last_checkpoint: bool = True
    """Continue from the last checkpoint under save_checkpoint_path if there is one."""


@dataclass
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
