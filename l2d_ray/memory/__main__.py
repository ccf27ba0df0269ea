"""The command `python -m l2d_ray.memory verify WORKSPACE`: check every checksum and count of a memory.

The last line on stdout is one JSON object (`VerifyResult`). The exit status is 0 if the memory is intact and 1 if it is
not, with one line on stderr for each problem. It is 2 if there is no memory or the command line is wrong.
"""

import json
import sys
from dataclasses import asdict

from l2d_ray.errors import InputError
from l2d_ray.memory.verify import verify
from l2d_ray.workspace import Workspace


def main(argv: list[str]) -> int:
    """Run the command line and return the exit status."""
    if len(argv) != 2 or argv[0] != "verify":
        print("usage: python -m l2d_ray.memory verify WORKSPACE", file=sys.stderr)
        return 2
    try:
        result = verify(Workspace.open(argv[1]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for problem in result.problems:
        print(f"error: {problem}", file=sys.stderr)
    print(json.dumps(asdict(result)))
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
