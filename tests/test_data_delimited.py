import gzip
from pathlib import Path

import pyarrow as pa
import pytest

from l2d_ray.data.delimited import read_delimited
from l2d_ray.errors import InputError


def read(path: Path, *wanted: str, **options: object) -> list[dict[str, str]]:
    chunks = [chunk for _, chunk in read_delimited(str(path), wanted, remedy="name another", **options)]  # type: ignore[arg-type]
    return pa.concat_tables(chunks).to_pylist()  # type: ignore[no-any-return]


def test_the_wanted_columns_are_read_as_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b'a,b,c\n007,x,"two\nlines, ""quoted"""\n'))
    assert read(path, "c", "a") == [{"c": 'two\nlines, "quoted"', "a": "007"}]


def test_a_file_may_have_no_header_and_no_quotes(tmp_path: Path) -> None:
    path = tmp_path / "u.data"
    path.write_text('1\t"2\n3\t4\n')
    rows = read(path, "item", delimiter="\t", names=("user", "item"), quoted=False)
    assert rows == [{"item": '"2'}, {"item": "4"}]


def test_the_first_row_of_a_chunk_has_its_number_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,b\n" + "".join(f"{row},{'x' * 1000}\n" for row in range(1, 40_001)))
    chunks = list(read_delimited(str(path), ("a",), remedy=""))
    assert len(chunks) > 1
    assert all(chunk["a"][0].as_py() == str(first) for first, chunk in chunks)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "the file is empty; give the complete file"),
        (b"a,b\n", "no rows below the header; give the complete file"),
        (b"a,c\n1,2\n", "no column 'b' among 'a', 'c'; name another"),
        (b"a,b\n1,2\n3\n", "row 1 or later: CSV parse error: (Row #3: )?Expected 2 columns, got 1: 3; correct the row"),
        (b"a,b\n1,Am\xe9lie\n", "row 1 or later: .*invalid UTF8 data; convert the file"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.csv: {problem}"):
        read(path, "a", "b")
