"""What goes wrong ends in exit status 1 and one clear message, without a hang, and leaves the last checkpoint whole."""

import shutil
import socket

import pytest
import torch

from model_support import write_small_model

IN_A_STEP = {
    "kill_worker": r"error: rank 0 died in prepare_step\(\): ",
    "raise": r"error: reward function .*spying_reward.py:compute_score raised KeyError: 'no such dimension'",
    "short": r"error: reward function .* returned 15 items for 16 responses; return one dict per response",
    "nan": r"error: reward function .*, item 0: 'overall' is nan; return finite numbers only",
    "remove": r"error: videos could not be loaded; replace the files or remove the rows",
}


def assert_one_message(run, match: str) -> None:
    """Exit status 1 and, at the end of the console, the one message."""
    import re
    assert run.code == 1, run.output
    assert "Traceback" not in run.output, run.output
    assert len(re.findall("^error: ", run.output, re.M)) == 1, run.output
    assert re.search(match, run.output), run.output
    print(run.output)


@pytest.mark.parametrize("fault", IN_A_STEP)
def test_a_fault_in_a_step_leaves_the_last_checkpoint_whole(fault, uninterrupted, workplace):
    reference = uninterrupted[1].wait()
    folder = workplace.root / "run"
    folder.mkdir()
    shutil.copytree(reference.folder / "global_step_1", folder / "global_step_1")
    workplace.fault.write_text(f"{fault} 1")
    run = workplace.run(settings={"trainer.max_steps": 5})
    assert_one_message(run, IN_A_STEP[fault])
    print(list(folder.iterdir()))
    assert 0
