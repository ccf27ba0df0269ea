"""The one error that is the user's to mend."""


class InputError(ValueError):
    """Bad input or configuration: the message is one line that names the file or key, the value and the remedy.

    Jobs print it on stderr and exit with 2; every other exception is our fault or the machine's, and exits with 1.
    """
