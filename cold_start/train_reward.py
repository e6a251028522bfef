"""Stage 1, discriminative cold start: trains a reward model on preference pairs. `bash train.sh` launches it."""

import sys

import torch
import torch.distributed as dist
from transformers import AutoProcessor, HfArgumentParser, set_seed

from arguments import DataArguments, ModelArguments, TrainingArguments, validate_all
from checkpoint import LoadedReward, build_reward_model, require_trainable_base
from data import PairDataset
from engine import NonFiniteError, accelerate, build_engine, init_distributed, read_deepspeed_config
from model_qwen3 import add_reward_token, prepare_for_training
from preflight import build_config, find_resume, load_checked_pairs, take_over
from scored_sequence import SequenceBuilder
from trainer_qwen3 import RewardTrainer
from training_log import Schedule
from utils import end_with_launcher, report_error, setup_logging


def train(model_arguments: ModelArguments, data_arguments: DataArguments, arguments: TrainingArguments) -> None:
    """Check everything that costs nothing, then load, wrap and train."""
    set_seed(arguments.seed)
    read_deepspeed_config(arguments.deepspeed, arguments)
    take_over(arguments.output_dir)
    resume_from = find_resume(arguments)
    require_trainable_base(model_arguments.model_name_or_path)
    processor = AutoProcessor.from_pretrained(model_arguments.model_name_or_path)
    add_reward_token(processor)
    config = build_config(model_arguments, data_arguments)
    builder = SequenceBuilder(processor, format_prompt=config.format_prompt)
    datasets = {}
    for name, path in (("train", data_arguments.meta_data), ("eval", data_arguments.meta_data_test)):
        if path:
            pairs = load_checked_pairs(path, builder, config.video, data=data_arguments, training=arguments)
            datasets[name] = PairDataset(pairs, builder, config.video)

    compute_dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    model = build_reward_model(
        model_arguments.model_name_or_path, processor, reward_token=config.reward_token, dtype=compute_dtype
    )
    prepare_for_training(model, model_arguments, autocast_dtype=torch.bfloat16 if arguments.bf16 else None)
    schedule = Schedule.build(len(datasets["train"]), arguments.pairs_per_step(dist.get_world_size()), arguments)
    engine = build_engine(model, arguments, num_steps=schedule.num_steps)
    trainer = RewardTrainer(
        engine,
        LoadedReward(model, builder, config),
        train_data=datasets["train"],
        eval_data=datasets.get("eval"),
        arguments=arguments,
        data_arguments=data_arguments,
        schedule=schedule,
        activations=accelerate(engine, model_arguments),
    )
    if resume_from is not None:
        trainer.resume(resume_from)
    trainer.train()


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments), allow_abbrev=False)
    try:
        model_arguments, data_arguments, arguments = parser.parse_args_into_dataclasses()
        validate_all(model_arguments, data_arguments, arguments)
        end_with_launcher()
        init_distributed()
        setup_logging()
        train(model_arguments, data_arguments, arguments)
    except (ValueError, NonFiniteError) as error:
        report_error(error)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
