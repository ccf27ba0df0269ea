"""MovieLens, in the files of GroupLens or in RecBole's atomic files.

The file names tell the layout: `u.data` and `u.item` (100k), `ratings.dat` and `movies.dat` (1m, 10m), `ratings.csv`
and `movies.csv` (latest, 20m, 25m, 32m), `*.inter` and `*.item` (RecBole). A rating of any value is an interaction.
Titles carry the year, as in GroupLens's files: "Toy Story (1995)".
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from l2d_ray.config import Config
from l2d_ray.data import columns
from l2d_ray.data.delimited import read_delimited
from l2d_ray.data.files import children, file_name, folder_of, numbered_lines
from l2d_ray.errors import InputError

NEEDS = ("interactions",)
_REMEDY = "give the files of MovieLens as published, or use data.source=table"


def read_items(config: Config) -> Iterator[pa.Table]:
    """Yield all movies."""
    ratings = _ratings_file(config)
    folder = folder_of(ratings)
    key, value = ("data.items", config.data.items) if config.data.items else ("data.interactions", folder)
    movies = _layout(ratings).movies
    for path in children(key, value):
        if _is_named(path, movies):
            return _layout(ratings).read_movies(path)
    raise InputError(f"{key}={value!r}: no file *{movies}, which belongs to {file_name(ratings)}; {_REMEDY}")


def interaction_files(config: Config) -> list[str]:
    """Return the one file of ratings."""
    return [_ratings_file(config)]


def read_interactions(path: str, _config: Config) -> Iterator[pa.Table]:
    """Yield the ratings, with times in Unix seconds."""
    layout = _layout(path)
    user, item, time = layout.wanted
    for row, chunk in read_delimited(path, layout.wanted, remedy=_REMEDY, **layout.options):
        yield columns.interactions(
            columns.ids(chunk[user], path, user, row),
            columns.ids(chunk[item], path, item, row),
            columns.whole_numbers(chunk[time], path, time, row, parse=True),
            row,
        )


def _movies_by_line(delimiter: str) -> Callable[[str], Iterator[pa.Table]]:
    """Return a reader of `u.item` or `movies.dat`: Latin-1 up to 1m and UTF-8 in 10m, quotes and colons in titles."""

    def read(path: str) -> Iterator[pa.Table]:
        rows = []
        for number, line in numbered_lines(path, fallback="latin-1"):
            item_id, found, rest = line.partition(delimiter)
            if not found:
                raise InputError(f"{path}: line {number}: {line[:40]!r} holds no {delimiter!r}; {_REMEDY}")
            rows.append((item_id, rest.partition(delimiter)[0]))
        item_ids, titles = zip(*rows, strict=True)
        yield columns.items(pa.array(item_ids), pa.array(titles))

    return read


def _movies_csv(path: str) -> Iterator[pa.Table]:
    for row, chunk in read_delimited(path, ("movieId", "title"), remedy=_REMEDY):
        item_ids = columns.ids(chunk["movieId"], path, "movieId", row)
        yield columns.items(item_ids, columns.titles(chunk["title"], path, "title", row))


def _movies_recbole(path: str) -> Iterator[pa.Table]:
    item, title, year = "item_id:token", "movie_title:token_seq", "release_year:token"
    for row, chunk in read_delimited(path, (item, title, year), delimiter="\t", quoted=False, remedy=_REMEDY):
        yield columns.items(columns.ids(chunk[item], path, item, row), _with_year(chunk[title], chunk[year]))


def _with_year(titles: pa.ChunkedArray, years: pa.ChunkedArray) -> pa.Array:
    dated = pc.binary_join_element_wise(titles, " (", years, ")", "")
    unknown = pc.or_(pc.equal(years, ""), pc.equal(titles, ""))
    return pc.if_else(unknown, titles, dated).combine_chunks()


@dataclass(frozen=True)
class _Layout:
    ratings: str
    """End of the name of the file of ratings; `.gz` may follow."""
    movies: str
    """End of the name of the file of movies."""
    read_movies: Callable[[str], Iterator[pa.Table]]
    wanted: tuple[str, str, str] = ("user", "item", "timestamp")
    """Columns of the user, the item and the time in the file of ratings."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of `read_delimited` for the file of ratings."""


_LAYOUTS = (
    _Layout(
        "u.data",
        "u.item",
        _movies_by_line("|"),
        options={"delimiter": "\t", "names": ("user", "item", "rating", "timestamp"), "quoted": False},
    ),
    _Layout(
        "ratings.dat",
        "movies.dat",
        _movies_by_line("::"),
        # The delimiter is two colons. Read with one colon as delimiter, every other column is empty.
        options={"delimiter": ":", "names": ("user", "", "item", "", "rating", "", "timestamp"), "quoted": False},
    ),
    _Layout("ratings.csv", "movies.csv", _movies_csv, ("userId", "movieId", "timestamp")),
    _Layout(
        ".inter",
        ".item",
        _movies_recbole,
        ("user_id:token", "item_id:token", "timestamp:float"),
        {"delimiter": "\t", "quoted": False},
    ),
)


def _is_named(path: str, ending: str) -> bool:
    name = file_name(path).removesuffix(".gz")
    return name.endswith(ending) if ending.startswith(".") else name == ending


def _layout(ratings: str) -> _Layout:
    return next(layout for layout in _LAYOUTS if _is_named(ratings, layout.ratings))


def _ratings_file(config: Config) -> str:
    value = str(config.data.interactions)
    found = [
        path
        for path in children("data.interactions", value)
        if any(_is_named(path, layout.ratings) for layout in _LAYOUTS)
    ]
    if len(found) == 1:
        return found[0]
    names = ", ".join(file_name(path) for path in found)
    problem = f"several layouts ({names}); give one of the files" if found else f"no ratings found; {_REMEDY}"
    raise InputError(f"data.interactions={value!r}: {problem}")
