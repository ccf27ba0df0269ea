"""The files in which private names of Ray may stand."""

import re
from pathlib import Path

import pytest

from l2d_ray.distributed import serving

(FOLDER,) = map(Path, serving.__path__)
PRIVATE = re.compile(r"^\s*(?:from|import) ray\b.*\b_\w+|\b_(?:by_reference|lookup_ranked_replicas)\b", re.MULTILINE)
VARIABLE = re.compile(r"\bRAY_SERVE_\w+")


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.name)
def test_private_names_of_ray_stand_in_two_files_only(file: Path) -> None:
    source = file.read_text()
    assert bool(PRIVATE.search(source)) == (file.name == "ray_private.py")
    assert bool(VARIABLE.search(source)) == (file.name == "ray_variables.py")
