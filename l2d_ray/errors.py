"""The one error that is the user's to mend."""

import re


class InputError(ValueError):
    """Bad input or configuration: the message is one line that names the file or key, the value and the remedy.

    Jobs print it on stderr and exit with 2; every other exception is our fault or the machine's, and exits with 1.
    """


def one_line(error: object) -> str:
    """What a library says over several lines."""
    return " ".join(str(error).split())


def input_error_in(traceback: str) -> InputError | None:
    """The first InputError of a traceback, where Ray keeps no more than that of what a worker raised."""
    found = re.search(r"^l2d_ray\.errors\.InputError: (.+)$", traceback, re.MULTILINE)
    return InputError(found[1]) if found else None
