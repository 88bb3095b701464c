"""A pipeline that is killed anywhere is continued by the same command; more in killing.py."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_a_pipeline_survives_kills_before_its_file_operations(arch: str) -> None:
    script = Path(__file__).parent / "support" / "killing.py"
    command = [sys.executable, str(script), "--aimed", "4", "--random", "1", "--arch", arch]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "0 refused, 0 leaked, 0 different" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0, done.stderr
