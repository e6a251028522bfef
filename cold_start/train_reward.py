"""Stage 1, discriminative cold start: trains a reward model on preference pairs. `bash train.sh` launches it."""

import os
import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from transformers import HfArgumentParser, set_seed

from arguments import DataArguments, ModelArguments, TrainingArguments
from checkpoint import LoadedReward, RewardConfig, build_reward_model, load_builder, require_trainable_base
from data import load_checked_data
from engine import (
    NonFiniteError,
    build_engine,
    compile_and_plan_activations,
    init_distributed,
    read_deepspeed_config,
)
from model_qwen3 import prepare_for_training
from run_folder import RunCheckpoints, find_resume, take_over
from trainer_qwen3 import RewardTrainer
from training_log import Schedule, setup_logging
from utils import end_with_launcher, report_error


def build_trainer(
    model_arguments: ModelArguments, data_arguments: DataArguments, arguments: TrainingArguments
) -> RewardTrainer:
    """Check everything that needs no model, then load the model and wrap it; resumes where that was asked for."""
    set_seed(arguments.seed)
    read_deepspeed_config(arguments.deepspeed, arguments)
    take_over(arguments.output_dir)
    resume_from = find_resume(arguments)
    base = model_arguments.model_name_or_path
    require_trainable_base(base)
    config = RewardConfig.resolve(base, format_prompt=data_arguments.format_prompt, **data_arguments.video_budget)
    config = replace(
        config,
        base_model=os.path.abspath(base) if os.path.isdir(base) else base,
        reward_token=model_arguments.reward_token,
        dimensions=data_arguments.dimensions,
    )
    builder = load_builder(base, config)
    train_data, eval_data = (
        load_checked_data(path, builder, config.video, data=data_arguments, training=arguments) if path else None
        for path in (data_arguments.meta_data, data_arguments.meta_data_test)
    )

    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    model = build_reward_model(base, builder.processor, config, dtype=dtype)
    prepare_for_training(model, model_arguments, autocast_dtype=torch.bfloat16 if arguments.bf16 else None)
    schedule = Schedule.build(len(train_data), arguments.pairs_per_step(dist.get_world_size()), arguments)
    engine = build_engine(model, arguments, num_steps=schedule.num_steps)
    reward = LoadedReward(model, builder, config)
    trainer = RewardTrainer(
        engine,
        train_data=train_data,
        eval_data=eval_data,
        arguments=arguments,
        data_arguments=data_arguments,
        schedule=schedule,
        checkpoints=RunCheckpoints(
            engine, reward, arguments=arguments, data_arguments=data_arguments, train_data=train_data
        ),
        activations=compile_and_plan_activations(engine, model_arguments),
    )
    if resume_from is not None:
        trainer.resume(resume_from)
    return trainer


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments), allow_abbrev=False)
    try:
        arguments = parser.parse_args_into_dataclasses()
        for group in arguments:
            group.validate()
        end_with_launcher()
        init_distributed()
        setup_logging()
        build_trainer(*arguments).train()
    except (ValueError, NonFiniteError) as error:
        report_error(error)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
