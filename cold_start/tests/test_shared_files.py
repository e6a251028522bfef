"""The stages stand alone: what both need lies in each, the same to the byte."""

from stage1_support import STAGE_DIR

OTHER_STAGE = STAGE_DIR.parent / "dual_rl"


def test_files_of_both_stages_are_the_same():
    shared = {path.name: path.read_bytes() for path in (STAGE_DIR / "descore").glob("*.py")}
    assert shared == {path.name: path.read_bytes() for path in (OTHER_STAGE / "descore").glob("*.py")}
    vision_process = OTHER_STAGE / "verl" / "data" / "vision_process.py"
    assert (STAGE_DIR / "vision_process.py").read_bytes() == vision_process.read_bytes()
