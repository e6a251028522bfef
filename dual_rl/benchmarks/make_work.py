"""Makes the work of a benchmark: a reward model of Qwen3-VL-8B's shape with random weights, clips, and a stage 2 CSV.

    PYTHONPATH=. python benchmarks/make_work.py --output /tmp/work --tokenizer ../cold_start/model/tiny_base

The configuration is Qwen3-VL-8B-Instruct's; the tokenizer is whatever `--tokenizer` holds, so that no file of the real
model is needed. Speed and memory depend on shapes, not on what the weights know.
"""

import argparse
import csv
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import av
import numpy as np
import torch
from transformers import Qwen3VLForConditionalGeneration

from harness import DEVICE
from shapes import TEXT, WEIGHT_STD, build_config, build_processor
from verl.data.scored_sequence import judge_problem
from verl.model.reward_files import save_head


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for model/, clips/ and train.csv")
    parser.add_argument("--tokenizer", required=True, help="folder of a Qwen3-VL model whose processor is used")
    parser.add_argument("--pairs", type=int, default=16, help="rows of the CSV")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each clip")
    parser.add_argument("--side", type=int, default=448, help="height and width of the clips in pixels")
    parser.add_argument("--layers", type=int, default=TEXT["num_hidden_layers"], help="text layers")
    return parser.parse_args()


def write_model(folder: Path, *, tokenizer: str, layers: int) -> None:
    """A merged reward model in bf16, made on the GPU where there is one."""
    processor, config = build_processor(tokenizer), build_config(tokenizer, layers=layers)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen3VLForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=WEIGHT_STD)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    save_head(folder / "rm_head.pth", torch.randn(1, TEXT["hidden_size"]) / TEXT["hidden_size"] ** 0.5)
    video = {"fps": 2.0, "min_frames": 4, "max_frames": 768, "min_pixels": 4096, "max_pixels": 448 * 448}
    values = {"base_model": None, "reward_token": "special", "video": video, "format_prompt": "{{ content | trim }}"}
    (folder / "reward_config.json").write_text(json.dumps(values, indent=2) + "\n")


def write_clip(path: Path, *, seconds: float, side: int, seed: int) -> None:
    """A drifting gradient with noise, 24 frames a second."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:side, 0:side] / side
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for index in range(round(24 * seconds)):
            wave = 127 * (1 + np.sin(6 * (rows + rng.uniform(0.9, 1.1) * columns) + index / 9 + seed))
            frame = np.repeat(wave[:, :, None], 3, axis=2) + rng.normal(0, 4, (side, side, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.clip(0, 255).astype(np.uint8), "rgb24")))
        container.mux(stream.encode())


def write_clips(folder: Path, *, count: int, seconds: float, side: int) -> None:
    """The clips of `count` pairs, on all cores."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{pair}_{name}.mp4" for pair in range(count) for name in "ab"]
    with ProcessPoolExecutor() as pool:
        jobs = [pool.submit(write_clip, path, seconds=seconds, side=side, seed=n) for n, path in enumerate(paths)]
        for job in jobs:
            job.result()


def write_csv(folder: Path, *, count: int) -> None:
    """`train.csv`, a row for each pair of clips."""
    with (folder / "train.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["videos", "problem", "answer"])
        for pair in range(count):
            videos = [f"clips/{pair}_{name}.mp4" for name in "ab"]
            scores = {"subject": 2, "dynamics": 1, "camera": 0, "environment": 2, "style": 1}
            answer = {"video_1_scores": scores, "video_2_scores": scores, "gsb_result": "AB"[pair % 2]}
            text = f"clip number {pair} drifts over a plain background. " * 70
            writer.writerow([repr(videos), judge_problem(text), f"<answer>{json.dumps(answer)}</answer>"])


def main() -> None:
    arguments = parse_arguments()
    write_clips(arguments.output / "clips", count=arguments.pairs, seconds=arguments.seconds, side=arguments.side)
    write_model(arguments.output / "model", tokenizer=arguments.tokenizer, layers=arguments.layers)
    write_csv(arguments.output, count=arguments.pairs)  # last: its presence says that all is there


if __name__ == "__main__":
    main()
