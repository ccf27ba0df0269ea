import gzip
from pathlib import Path

import pytest
from support.raw_data import interactions_of, items_of

from l2d_ray.config import Config, DataConfig
from l2d_ray.data import movielens
from l2d_ray.errors import InputError

RATINGS = [("1", "10", 881250949, 1), ("2", "20", 881250950, 2)]
TITLES = ["Amélie (2001)", "Star Wars: Episode IV (1977)"]

LAYOUTS = {
    "100k": {
        "u.data": b"1\t10\t5\t881250949\n2\t20\t3\t881250950\n",
        "u.item": "10|Amélie (2001)|01-Jan-2001||http://x|0|1\n20|Star Wars: Episode IV (1977)|01||x|0|0\n".encode(
            "latin-1"
        ),
        "u.user": b"1|24|M|technician|85711\n",
    },
    "1m": {
        "ratings.dat": b"1::10::5::881250949\n2::20::3::881250950\n",
        "movies.dat": "10::Amélie (2001)::Comedy\n20::Star Wars: Episode IV (1977)::Sci-Fi\n".encode("latin-1"),
    },
    "10m": {
        "ratings.dat": b"1::10::5::881250949\n2::20::3.5::881250950\n",
        "movies.dat": "10::Amélie (2001)::Comedy\n20::Star Wars: Episode IV (1977)::Sci-Fi\n".encode(),
    },
    "32m": {
        "ratings.csv.gz": gzip.compress(b"userId,movieId,rating,timestamp\n1,10,5.0,881250949\n2,20,3.5,881250950\n"),
        "movies.csv": 'movieId,title,genres\n10,"Amélie (2001)",Comedy\n'
        "20,Star Wars: Episode IV (1977),Sci-Fi\n".encode(),
        "tags.csv": b"userId,movieId,tag,timestamp\n",
    },
    "recbole": {
        "ml-x.inter": b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        b"1\t10\t5\t881250949\n2\t20\t3\t881250950.0\n",
        "ml-x.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "10\tAmélie\t2001\tComedy\n20\tStar Wars: Episode IV\t1977\tSci-Fi\n".encode(),
    },
}


def folder_of(layout: str, tmp_path: Path) -> Path:
    for name, content in LAYOUTS[layout].items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def config_of(interactions: Path, items: Path | None = None) -> Config:
    data = DataConfig(source="movielens", interactions=str(interactions), items=str(items) if items else None)
    return Config(data=data)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("by_file", [False, True])
def test_every_layout_gives_the_same_movies_and_ratings(layout: str, by_file: bool, tmp_path: Path) -> None:
    folder = folder_of(layout, tmp_path)
    config = config_of(folder / next(iter(LAYOUTS[layout])) if by_file else folder)
    assert items_of(config).to_pylist() == [
        {"item_id": "10", "title": TITLES[0]},
        {"item_id": "20", "title": TITLES[1]},
    ]
    assert [tuple(row.values()) for row in interactions_of(config).to_pylist()] == RATINGS


def test_movies_may_be_in_another_folder(tmp_path: Path) -> None:
    folder = folder_of("1m", tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / "movies.dat").rename(elsewhere / "movies.dat")
    assert len(items_of(config_of(folder, elsewhere / "movies.dat"))) == 2
    with pytest.raises(InputError, match=r"no file \*movies\.dat, which belongs to ratings\.dat; give the files of"):
        items_of(config_of(folder))


def test_a_missing_year_or_title_leaves_no_brackets(tmp_path: Path) -> None:
    folder = folder_of("recbole", tmp_path)
    header = "item_id:token\tmovie_title:token_seq\trelease_year:token\n"
    (folder / "ml-x.item").write_text(header + "10\tunknown\t\n20\t\t1977\n")
    assert items_of(config_of(folder))["title"].to_pylist() == ["unknown", ""]


def test_a_folder_without_ratings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        movielens.interaction_files(config_of(tmp_path))
    assert str(caught.value) == (
        f"data.interactions={str(tmp_path)!r}: no ratings found;"
        " give the files of MovieLens as published, or use data.source=table"
    )


def test_two_layouts_in_a_folder_are_refused(tmp_path: Path) -> None:
    folder_of("1m", tmp_path)
    folder_of("100k", tmp_path)
    with pytest.raises(InputError, match=r"several layouts \(ratings\.dat, u\.data\); give one of the files$"):
        movielens.interaction_files(config_of(tmp_path))


def test_a_line_of_movies_without_delimiter_is_refused(tmp_path: Path) -> None:
    folder = folder_of("1m", tmp_path)
    (folder / "movies.dat").write_text("10::A (2001)::Comedy\nnothing here\n")
    with pytest.raises(InputError, match=r"movies\.dat: line 2: 'nothing here' holds no '::'; give the files"):
        items_of(config_of(folder))


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    folder = folder_of("32m", tmp_path)
    (folder / "movies.csv").write_text("movieId,name\n1,x\n")
    with pytest.raises(InputError, match=r"movies\.csv: no column 'title' among 'movieId', 'name'; give the files of"):
        items_of(config_of(folder))
