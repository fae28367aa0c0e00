"""--engine and --fast, in a process of its own: one that used OpenVINO can crash when it starts another program."""

import subprocess
import sys

from support import ROOT


def test_engines_of_a_cpu_in_a_process_of_their_own():
    command = [sys.executable, "-m", "pytest", "-q", "tests/evaluation/engine_choice_checks.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "17 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
