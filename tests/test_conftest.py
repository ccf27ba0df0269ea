"""The summary of a test run."""

import os
import subprocess
import sys
from pathlib import Path


def test_a_run_without_chromium_says_so_in_its_last_lines(tmp_path: Path) -> None:
    test = tmp_path / "test_some_page.py"
    test.write_text("from support.chromium import needs_chromium\npytestmark = needs_chromium\ndef test_page(): pass\n")
    command = [sys.executable, "-m", "pytest", "-ra", "-p", "conftest", "-c", os.devnull, f"--rootdir={tmp_path}", test]
    no_programs = os.environ | {"PATH": "", "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    run = subprocess.run(command, env=no_programs, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-2].startswith("Chromium is not installed: skipped 1 tests of the page; run apt-get")
