"""Print the requirements of a pyproject.toml with some of its extras: `requirements.py FILE EXTRA…`, one a line.

The image installs them in a layer below the code.
"""

import sys
import tomllib
from pathlib import Path

file, *extras = sys.argv[1:]
project = tomllib.loads(Path(file).read_text())["project"]
print(*project["dependencies"], *(line for name in extras for line in project["optional-dependencies"][name]), sep="\n")
