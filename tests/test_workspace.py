import json
from pathlib import Path

import pytest

from l2d_ray.errors import InputError
from l2d_ray.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(str(tmp_path / "ws"))


def test_opening_creates_nothing(tmp_path: Path) -> None:
    workspace = Workspace.open(str(tmp_path / "ws"))
    assert not (tmp_path / "ws").exists()
    assert not workspace.exists("")
    assert workspace.files("dataset") == []


def test_a_folder_and_its_uri_are_the_same_workspace(tmp_path: Path) -> None:
    Workspace.open(str(tmp_path)).write_json("a/b.json", {"x": 1})
    assert Workspace.open(tmp_path.as_uri()).read_json("a/b.json") == {"x": 1}


def test_a_relative_folder_is_resolved_when_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    workspace = Workspace.open("ws")
    monkeypatch.chdir("/")
    workspace.write_json("a.json", {})
    assert (tmp_path / "ws" / "a.json").exists()


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(InputError, match=r"^'nope://x': nope:// is not known; give a folder, s3://bucket/… or gs://"):
        Workspace.open("nope://x")


def test_files_are_listed_below_a_folder_by_suffix(workspace: Workspace) -> None:
    for name in ("data/b.txt", "data/a/c.json", "data/a/b.json", "other.json"):
        workspace.write_json(name, {})
    assert workspace.files("data") == ["data/a/b.json", "data/a/c.json", "data/b.txt"]
    assert workspace.files("data", ".json") == ["data/a/b.json", "data/a/c.json"]
    assert workspace.files("", ".txt") == ["data/b.txt"]


def test_folders_of_the_workspace_are_listed(workspace: Workspace) -> None:
    assert workspace.folders() == []
    for name in ("b/x/y.json", "a/z.json", "c.json"):
        workspace.write_json(name, {})
    assert workspace.folders() == ["a", "b"]


def test_files_and_folders_are_deleted_if_they_exist(workspace: Workspace) -> None:
    workspace.write_json("data/a.json", {})
    workspace.write_json("data/b.json", {})
    workspace.delete("data/a.json")
    assert workspace.files("data") == ["data/b.json"]
    workspace.delete("data")
    workspace.delete("data")
    assert not workspace.exists("data")


def test_a_file_appears_when_it_is_complete(workspace: Workspace) -> None:
    with workspace.create("a/b") as stream:
        stream.write(b"half")
        assert not workspace.exists("a/b")
        stream.write(b"whole")
    assert Path(workspace.path("a/b")).read_bytes() == b"halfwhole"
    assert workspace.files("") == ["a/b"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(workspace: Workspace) -> None:
    workspace.write_json("a.json", {"old": True})
    with pytest.raises(KeyError, match="stop"), workspace.create("a.json") as stream:  # noqa: PT012
        stream.write(b"new")
        raise KeyError("stop")
    assert workspace.read_json("a.json") == {"old": True}
    assert workspace.files("") == ["a.json"]


def test_a_write_error_names_the_path(workspace: Workspace) -> None:
    workspace.write_json("a", {})
    with pytest.raises(OSError, match=r"/ws/a/b"), workspace.create("a/b"):
        pass


@pytest.mark.parametrize(
    ("file", "job"),
    [
        ("dataset/dataset.json", "prepare_data"),
        ("memory/snapshots/3.json", "build_memory"),
        ("index/1-0a/index.json", "build_index"),
        ("adapter/training.json", "finetune"),
    ],
)
def test_missing_json_names_the_job_that_writes_it(workspace: Workspace, file: str, job: str) -> None:
    with pytest.raises(InputError) as caught:
        workspace.read_json(file)
    assert str(caught.value) == f"{workspace.path(file)}: not found; run jobs/{job}.py first"


@pytest.mark.parametrize(("content", "problem"), [("{", r"not JSON \(.*\)"), ("[1]", "no JSON object")])
def test_damaged_json_is_refused(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "a.json").write_text(content)
    remedy = r"the file is damaged; delete it and run jobs/finetune\.py again"
    with pytest.raises(InputError, match=rf"a\.json: {problem}, {remedy}$"):
        Workspace.open(str(tmp_path)).read_json("a.json")


def test_json_is_indented_and_ends_with_a_newline(workspace: Workspace) -> None:
    workspace.write_json("a.json", {"x": [1]})
    text = Path(workspace.path("a.json")).read_text()
    assert json.loads(text) == {"x": [1]}
    assert text.endswith("}\n")


def test_a_folder_is_copied_with_its_subfolders_only(workspace: Workspace, tmp_path: Path) -> None:
    workspace.write_json("a/x.json", {"x": 1})
    workspace.write_json("a/b/y.json", {"y": 2})
    workspace.write_json("ab/z.json", {})
    other = Workspace.open(str(tmp_path / "other"))
    workspace.copy("a", other, "c")
    assert other.files("") == ["c/b/y.json", "c/x.json"]
    assert other.read_json("c/b/y.json") == {"y": 2}
    other.copy("", workspace, "d")
    assert workspace.files("d") == ["d/c/b/y.json", "d/c/x.json"]
