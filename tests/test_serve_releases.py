"""The files of its workspace that a release reads."""

import shutil
from pathlib import Path

import pytest
from support.small_endpoint import write_endpoint

from l2d_ray.data.dataset import Dataset
from l2d_ray.errors import InputError
from l2d_ray.serve.releases import Release
from l2d_ray.workspace import Workspace


def test_a_release_reads_its_items_from_the_memory_not_from_the_dataset(tmp_path: Path) -> None:
    """A newer dataset may replace the one that the memory was made of."""
    config = write_endpoint(tmp_path)
    items = Dataset.open(Workspace.open(str(tmp_path))).items()
    shutil.rmtree(tmp_path / "dataset")
    release = Release.plan(config)
    assert release.items().equals(items)
    (file,) = (tmp_path / "memory" / "items").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"{file}: damaged .*; run jobs/build_memory.py again"):
        release.items()
    file.unlink()
    with pytest.raises(InputError, match=rf"{file}: missing; run jobs/build_memory.py again"):
        Release.plan(config)
