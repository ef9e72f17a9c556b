"""Commands of the package in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def launch(processes: int) -> list[str]:
    """Python, and in front of the program what starts it ``processes`` times."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]


def environment(**extra: str) -> dict[str, str]:
    """This process's, with all that it can import, and one thread."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"} | extra


def run(arguments: list[str]) -> str:
    """What a command prints."""
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment(), cwd=HERE, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
