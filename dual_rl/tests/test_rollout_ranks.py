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

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
DUAL_RL = Path(__file__).resolve().parents[1]
RANK_PROGRAM = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist

rank, tensor_parallel_size, work = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{work}/store_{tensor_parallel_size}")
cores = os.sched_getaffinity(0)

from rollout_support import GREEDY, ids_of, make_engine, make_prompts, tied_weights

engine = make_engine(work / "model", "vllm", tensor_parallel_size=tensor_parallel_size)
changed = {name for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LD_PRELOAD") if name in os.environ}
assert not changed, changed
assert os.sched_getaffinity(0) == cores, "threads were bound"
assert torch.get_num_threads() == 1
assert dist.get_world_size() == 2
engine.load_weights(tied_weights().items())
prompts = make_prompts(work / "model")
mine = prompts if tensor_parallel_size == 2 else prompts[2 * rank : 2 * rank + 2]
torch.save(ids_of(engine.generate(mine, GREEDY)), work / f"ids_{rank}.pt")
total = torch.ones(1)
dist.all_reduce(total)  # the trainer's group still works
assert total.item() == 2
engine.close()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_engine_folder(tmp_path_factory.mktemp("ranks") / "model", tied=True)


@pytest.fixture(scope="module")
def expected(model) -> list[list[tuple[int, ...]]]:
    """What the other engine writes, alone in its process."""
    engine = make_engine(model, "hf")
    engine.load_weights(tied_weights().items())
    return ids_of(engine.generate(make_prompts(model), GREEDY))


def run_ranks(work: Path, *, tensor_parallel_size: int) -> list[list[list[tuple[int, ...]]]]:
    """Token ids that each of two processes wrote."""
    (work / "program.py").write_text(RANK_PROGRAM)
    paths = os.pathsep.join([str(DUAL_RL), str(DUAL_RL / "tests")])
    processes = [
        subprocess.Popen(
            [sys.executable, work / "program.py", str(rank), str(tensor_parallel_size), str(work)],
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return [torch.load(work / f"ids_{rank}.pt") for rank in range(2)]


@pytest.mark.slow
def test_two_ranks_have_an_engine_each(model, expected):
    first, second = run_ranks(model.parent, tensor_parallel_size=1)
    assert first + second == expected


@pytest.mark.slow
def test_two_ranks_share_one_engine(model, expected):
    """Tensor parallelism: both ranks are asked the same and give the same answer."""
    first, second = run_ranks(model.parent, tensor_parallel_size=2)
    assert first == second == expected
