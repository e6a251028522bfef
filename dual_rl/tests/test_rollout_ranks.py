"""vLLM in several ranks at once, next to a process group that was there before: one engine each, or one together.

The model is one with tied embeddings, unlike that of the other tests.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rollout_support import GREEDY, ids_of, make_engine, make_prompts, tied_weights, write_engine_folder

DUAL_RL = Path(__file__).resolve().parents[1]
RANK_PROGRAM = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist

rank, tensor_parallel_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/store_{tensor_parallel_size}")
cores = os.sched_getaffinity(0)

from rollout_support import GREEDY, ids_of, make_engine, make_prompts, tied_weights

engine = make_engine(folder / "model", "vllm", tensor_parallel_size=tensor_parallel_size)
changed = {name for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LD_PRELOAD") if name in os.environ}
assert not changed, changed
assert os.sched_getaffinity(0) == cores, "threads were bound"
assert torch.get_num_threads() == 1
engine.load_weights(tied_weights().items())
prompts = make_prompts(folder / "model")
mine = prompts if tensor_parallel_size == 2 else prompts[2 * rank : 2 * rank + 2]
torch.save(ids_of(engine.generate(mine, GREEDY)), folder / f"ids_{rank}.pt")
total = torch.ones(1)
dist.all_reduce(total)  # the trainer's group still works
assert total.item() == 2
engine.close()
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_two_ranks_write_what_the_other_engine_writes_alone(tmp_path, tensor_parallel_size):
    """With tensor parallelism both ranks are asked the same and give the same answer."""
    model = write_engine_folder(tmp_path / "model", tied=True)
    (tmp_path / "program.py").write_text(RANK_PROGRAM)
    environment = {**os.environ, "PYTHONPATH": f"{DUAL_RL}:{DUAL_RL / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, tmp_path / "program.py"]
    processes = [
        subprocess.Popen([*command, str(rank), str(tensor_parallel_size), str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    try:
        assert [process.wait(300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    engine = make_engine(model, "hf")
    engine.load_weights(tied_weights().items())
    expected = ids_of(engine.generate(make_prompts(model), GREEDY))
    first, second = (torch.load(tmp_path / f"ids_{rank}.pt") for rank in range(2))
    assert (first + second if tensor_parallel_size == 1 else first) == expected
    assert tensor_parallel_size == 1 or second == expected
