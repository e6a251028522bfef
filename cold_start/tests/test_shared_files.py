"""The stages stand alone: what both need lies in each, identical to the byte."""

import pytest

from stage1_support import STAGE_DIR

SHARED = [*(path.name for path in (STAGE_DIR / "descore").glob("[!_]*.py")), "vision_process.py", "flash_kernels.py"]


@pytest.mark.parametrize("name", SHARED)
def test_files_of_both_stages_are_identical(name):
    (mine,) = STAGE_DIR.rglob(name)
    (other,) = (STAGE_DIR.parent / "dual_rl").rglob(name)
    assert mine.read_bytes() == other.read_bytes()
