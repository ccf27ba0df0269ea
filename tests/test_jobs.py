import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

JOBS = sorted((Path(__file__).parents[1] / "jobs").glob("*.py"))


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_each_job_names_a_stage_that_exists(job: Path) -> None:
    (stage,) = re.findall(r'run\("(.*?)"', job.read_text())
    assert callable(pkgutil.resolve_name(stage))


def test_help_and_typing_errors_do_not_wait_for_the_libraries_of_the_stage() -> None:
    program = (
        "import runpy, sys; job, *sys.argv[1:] = sys.argv[1:]\n"
        "try: runpy.run_path(job, run_name='__main__')\n"
        "finally: print({'torch', 'transformers', 'faiss', 'ray.data'} & {*sys.modules}, file=sys.stderr)"
    )
    for argument, status, said in (("--help", 0, ""), ("memory.unit=1", 2, "did you mean memory.units?\n")):
        command = [sys.executable, "-c", program, str(JOBS[0].with_stem("build_memory")), argument]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        assert process.returncode == status
        assert process.stderr.endswith(f"{said}set()\n")
