"""Scripts that run in this process, one after the other: Python, its libraries and Ray start once."""

import contextlib
import io
import json
import runpy
import sys


def run_script(arguments: list[str]) -> tuple[object, str, str]:
    """Run a script with its arguments, and return its exit status, stdout and stderr; None if it does not exit."""
    status: object = None
    sys.argv, out, err = arguments, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


if __name__ == "__main__":  # each line of JSON on stdin is a script with its arguments
    for line in sys.stdin:
        print(json.dumps(run_script(json.loads(line))), flush=True)
