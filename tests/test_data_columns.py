from datetime import date, datetime
from typing import Any

import pyarrow as pa
import pytest

from l2d_ray.data.columns import ids, require, titles, whole_numbers
from l2d_ray.errors import InputError

WHOLE = "give whole numbers, such as Unix seconds, or an Arrow timestamp column"
ROUNDED = f"is too large for a floating-point number to be exact; {WHOLE}"


def test_text_and_whole_numbers_are_ids() -> None:
    for column in (
        ["7", "8"],
        [7, 8],
        ["7", 8],
        pa.array(["7", "8"]).dictionary_encode(),
        pa.chunked_array([[7], [8]]),
    ):
        assert ids(column, "f", "user_id", 1).to_pylist() == ["7", "8"]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (["a", None], "f: row 12: user_id is empty; fill it in or remove the row"),
        (["a", ""], "f: row 12: user_id is empty; fill it in or remove the row"),
        ([1.5, 2.5], "f: column 'user_id' is of type double; give text or whole numbers as ids"),
        ([True, False], "f: column 'user_id' is of type bool; give text or whole numbers as ids"),
        (["a", 1.5], "f: row 12: user_id=1.5: expected str or int; correct the row"),
        (["a", True], "f: row 12: user_id=True: expected str or int; correct the row"),
    ],
)
def test_other_values_are_refused_as_ids(column: list[Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        ids(column, "f", "user_id", 11)
    assert str(caught.value) == message


def test_text_that_is_not_utf8_is_refused() -> None:
    broken = pa.array([b"good", b"\xff\xe9"]).view(pa.string())
    for check in (ids, titles):
        with pytest.raises(InputError, match=r"^f: title: not UTF-8 \(.*\); write the file again from decoded text$"):
            check(broken, "f", "title", 1)


def test_a_missing_title_is_empty_and_other_types_are_refused() -> None:
    assert titles(["a", None], "f", "title", 1).to_pylist() == ["a", ""]
    assert titles([None], "f", "title", 1).to_pylist() == [""]
    with pytest.raises(InputError, match=r"^f: column 'title' is of type int64; give text as titles$"):
        titles([1], "f", "title", 1)
    with pytest.raises(InputError, match=r"^f: row 2: title=\['b'\]: expected str; correct the row$"):
        titles(["a", ["b"]], "f", "title", 1)


def test_whole_numbers_are_read_from_every_type() -> None:
    for column in ([1, 2], [1.0, 2.0], pa.array([1, 2], pa.uint8()), pa.array([1.0, 2.0], pa.float32())):
        assert whole_numbers(column, "f", "timestamp", 1) == pa.array([1, 2], pa.int64())
    assert whole_numbers(pa.array(["1", "-2"]), "f", "timestamp", 1, parse=True) == pa.array([1, -2], pa.int64())
    assert whole_numbers(pa.array(["1.0", "2e3"]), "f", "timestamp", 1, parse=True) == pa.array([1, 2000], pa.int64())


def test_dates_and_times_become_microseconds() -> None:
    expected = pa.array([datetime(2020, 1, 1)], pa.timestamp("us"))
    assert whole_numbers(pa.array([date(2020, 1, 1)]), "f", "t", 1) == expected
    assert whole_numbers(pa.array([datetime(2020, 1, 1)], pa.timestamp("s", "UTC")), "f", "t", 1) == expected


@pytest.mark.parametrize(
    ("column", "parse", "message"),
    [
        ([1.0, None], False, "f: row 12: timestamp is null; fill it in or remove the row"),
        ([1.0, float("nan")], False, f"f: row 12: timestamp=nan is not a whole number; {WHOLE}"),
        ([1.0, float("inf")], False, f"f: row 12: timestamp=inf is not a whole number; {WHOLE}"),
        ([1.0, 1.5], False, f"f: row 12: timestamp=1.5 is not a whole number; {WHOLE}"),
        ([1.0, 1e19], False, f"f: row 12: timestamp=1e+19 {ROUNDED}"),
        ([1.0, 2.0**53 + 2], False, f"f: row 12: timestamp=9007199254740994.0 {ROUNDED}"),
        (pa.array(["1", "2"]), False, f"f: row 11: timestamp='1' is of type string; {WHOLE}"),
        (pa.array(["1", "x"]), True, f"f: row 12: timestamp='x' is not a whole number; {WHOLE}"),
        (pa.array(["1", ""]), True, f"f: row 12: timestamp='' is not a whole number; {WHOLE}"),
        (pa.array(["1", "nan"]), True, f"f: row 12: timestamp=nan is not a whole number; {WHOLE}"),
        ([True], False, f"f: row 11: timestamp=True is of type bool; {WHOLE}"),
        ([1, "x"], False, "f: row 12: timestamp='x': expected int or float; correct the row"),
        (pa.array([2**63], pa.uint64()), False, f"f: timestamp has values beyond 64 bits; {WHOLE}"),
    ],
)
def test_other_values_are_refused_as_whole_numbers(column: Any, parse: bool, message: str) -> None:
    with pytest.raises(InputError) as caught:
        whole_numbers(column, "f", "timestamp", 11, parse=parse)
    assert str(caught.value) == message


def test_a_missing_column_is_named_with_the_columns_of_the_file() -> None:
    with pytest.raises(InputError) as caught:
        require("f", ["a", "b"], ["a", "c"], "name it")
    assert str(caught.value) == "f: no column 'b' among 'a', 'c'; name it"
