"""The stages stand alone: what both need lies in each, the same to the byte."""

from stage1_support import STAGE_DIR

VERL = STAGE_DIR.parent / "dual_rl" / "verl"
USED_UNDER_TWO_NAMES = {
    STAGE_DIR / "vision_process.py": VERL / "data" / "vision_process.py",
    STAGE_DIR / "flash_kernels.py": VERL / "model" / "flash_kernels.py",
}


def test_files_of_both_stages_are_the_same():
    shared, others = (
        {path.name: path.read_bytes() for path in (stage / "descore").glob("*.py")}
        for stage in (STAGE_DIR, VERL.parent)
    )
    assert shared == others
    for path, other in USED_UNDER_TWO_NAMES.items():
        assert path.read_bytes() == other.read_bytes(), path.name
