"""The exception for what the user can correct."""

import re


class InputError(ValueError):
    """Bad input or configuration: one line that names the file or key, the value and the remedy.

    Jobs print it on stderr and exit with 2. Every other exception is a fault of the program or the machine, and exits
    with 1.
    """


def one_line(error: object) -> str:
    """Return a message of several lines as one."""
    return " ".join(str(error).split())


def input_error_in(traceback: str) -> InputError | None:
    """Return the first InputError in the text of a traceback, which is all that Ray keeps of a worker's exception."""
    found = re.search(r"^l2d_ray\.errors\.InputError: (.+)$", traceback, re.MULTILINE)
    return InputError(found[1]) if found else None
