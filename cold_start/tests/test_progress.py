"""Progress in a log file, which is not a terminal: a line now and then."""

import subprocess
import sys

from stage1_support import STAGE_DIR

PROGRAM = """
import time
from descore import progress

progress.SECONDS_BETWEEN_LINES = 0.2
for _ in progress.progress(range(1000), total=1000, description="videos"):
    time.sleep(0.001)
"""


def test_a_log_file_gets_few_lines_that_tell_what_is_left():
    command = [sys.executable, "-c", PROGRAM]
    lines = subprocess.run(command, cwd=STAGE_DIR, capture_output=True, text=True, check=True).stderr.splitlines()
    assert 2 <= len(lines) <= 20
    assert all(line.startswith("videos: ") and "/1000 [" in line and "\r" not in line for line in lines)
