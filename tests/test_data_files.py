import gzip
from pathlib import Path

import pytest

from l2d_ray.data.files import children, file_name, folder_of, join, json_chunks, numbered_lines, size, suffix
from l2d_ray.errors import InputError


def test_children_of_a_folder_are_its_visible_files_sorted(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", ".hidden", "_SUCCESS"):
        (tmp_path / name).write_text("x")
    (tmp_path / "folder").mkdir()
    assert children("data.items", str(tmp_path)) == [str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]


def test_children_of_a_uri_are_uris(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("abc")
    uris = children("data.items", tmp_path.as_uri())
    assert uris == [(tmp_path / "a.csv").as_uri()]
    assert size(uris[0]) == 3
    assert [line for _, line in numbered_lines(uris[0])] == ["abc"]


def test_a_missing_file_is_named_with_its_key(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.csv")
    with pytest.raises(InputError) as caught:
        children("data.interactions", missing)
    assert str(caught.value) == (
        f"data.interactions={missing!r}: not found; give a file, a folder or a URI that exists"
    )


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(InputError, match=r"^'nope://a/b': nope:// is not known; give a folder, s3://bucket/… or gs://"):
        children("data.items", "nope://a/b")


def test_the_parts_of_paths_and_uris() -> None:
    assert join("s3://bucket/log/?region=eu", "a.csv") == "s3://bucket/log/a.csv?region=eu"
    assert file_name("s3://bucket/log/a.csv?region=eu") == "a.csv"
    assert folder_of("s3://bucket/log/a.csv?region=eu") == "s3://bucket/log?region=eu"
    assert folder_of("/a.csv") == "/"
    assert suffix("/a/Ratings.CSV.gz") == ".csv"


def test_blank_lines_are_skipped_but_counted_and_gzip_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress("é\r\n\n  \nb".encode()))
    assert list(numbered_lines(str(path))) == [(1, "é"), (4, "b")]


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.txt: the file is empty; give the complete file, or remove it from the"):
        list(numbered_lines(str(path)))


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\nAm\xe9lie\n")
    with pytest.raises(InputError) as caught:
        list(numbered_lines(str(path)))
    assert str(caught.value) == (
        f"{path}: line 2: byte b'\\xe9' is not UTF-8; convert the file (iconv -f latin1 -t utf-8)"
    )
    assert list(numbered_lines(str(path), fallback="latin-1")) == [(1, "good"), (2, "Amélie")]


@pytest.mark.parametrize("kept", [slice(40_000), slice(10, None)])
def test_damaged_gzip_is_refused(tmp_path: Path, kept: slice) -> None:
    path = tmp_path / "a.txt.gz"
    whole = gzip.compress(b"".join(b"%d\n" % i for i in range(50_000)))
    path.write_bytes(whole[kept])
    with pytest.raises(InputError, match=r"a\.txt\.gz: damaged gzip file \(.*\); get it again$"):
        list(numbered_lines(str(path)))


@pytest.mark.parametrize(("line", "problem"), [('{"a": ', "not JSON"), ("[1]", r"'\[1\]' is not a JSON object")])
def test_a_line_that_is_not_a_json_object_is_refused(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n')
    with pytest.raises(InputError, match=rf"a\.jsonl: line 2: {problem}.*; give one.* a line$"):
        list(json_chunks(str(path)))
