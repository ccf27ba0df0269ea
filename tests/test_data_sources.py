"""The list of data sources, and what it takes to add one."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from support.raw_data import interactions_of

from l2d_ray.config import Config, DataConfig
from l2d_ray.data import columns
from l2d_ray.data.catalogue import Rejection, read_catalogue
from l2d_ray.data.histories import group
from l2d_ray.data.interactions import read, take_tallies
from l2d_ray.data.sources import SOURCES, PublishedSource, check_source, source_of
from l2d_ray.errors import InputError
from l2d_ray.stages import checks

NEEDS_FILES = sorted(name for name, source in SOURCES.items() if source.NEEDS)


def config_of(source: str, **data: object) -> Config:
    return Config(data=DataConfig.model_validate({"source": source} | {key: str(value) for key, value in data.items()}))


def refusal(source: str, **data: object) -> str:
    with pytest.raises(InputError) as caught:
        source_of(config_of(source, **data))
    return str(caught.value)


def toy_items(_config: Config) -> Iterator[pa.Table]:
    """Read the lines `item title` of no file at all."""
    for line in ("a Alpha", "b Beta", "c Gamma"):
        item_id, title = line.split()
        yield columns.items(pa.array([item_id]), pa.array([title]))


def toy_files(config: Config) -> list[str]:
    return sorted(str(path) for path in Path(str(config.data.interactions)).glob("*.toy"))


def toy_interactions(path: str, _config: Config) -> Iterator[pa.Table]:
    """Read lines such as `ann a 5`."""
    rows = [line.split() for line in Path(path).read_text().splitlines()]
    users, items, times = zip(*rows, strict=True)
    yield columns.interactions(
        columns.ids(list(users), path, "user", 1),
        columns.ids(list(items), path, "item", 1),
        columns.whole_numbers(pa.array(times), path, "time", 1, parse=True),
        1,
    )


TOY = SimpleNamespace(
    NEEDS=("interactions",), read_items=toy_items, interaction_files=toy_files, read_interactions=toy_interactions
)


def test_a_new_source_is_its_own_functions_and_one_entry_of_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOURCES, "toy", TOY)
    (tmp_path / "1.toy").write_text("ann b 7\nbob a 6\n")
    (tmp_path / "2.toy").write_text("ann a 5\nann z 8\n")
    config = config_of("toy", interactions=tmp_path)
    checks.prepare(config)
    catalogue = read_catalogue(config)
    assert catalogue.titles.to_pylist() == ["Alpha", "Beta", "Gamma"]
    files = source_of(config).interaction_files(config)
    chunks = [chunk for number, path in enumerate(files) for chunk in read(path, number, config, catalogue)]
    interactions, dropped = take_tallies(pa.concat_tables(chunks))
    assert dropped == {Rejection.UNKNOWN_ITEM: 1}
    histories = {row["user_id"]: row["item_indices"] for row in group(interactions).to_pylist()}
    assert histories == {"ann": [0, 1], "bob": [0]}
    assert refusal("toy").startswith("data.interactions is missing, which data.source='toy' needs")
    (tmp_path / "1.toy").write_text("ann b soon\n")
    with pytest.raises(InputError, match=r"1\.toy: row 1: time='soon' is not a whole number"):
        checks.prepare(config)


def test_an_unknown_source_is_refused_with_the_known_ones() -> None:
    assert refusal("movies") == ("data.source='movies': unknown; give one of amazon, d3, demo, movielens, table")


@pytest.mark.parametrize("name", NEEDS_FILES)
def test_a_source_needs_its_files(name: str) -> None:
    assert refusal(name) == (
        f"data.interactions is missing, which data.source={name!r} needs; give a file, a folder or a URI"
    )


@pytest.mark.parametrize("name", [name for name in NEEDS_FILES if "items" in SOURCES[name].NEEDS])
def test_a_source_may_need_an_items_file(name: str) -> None:
    assert refusal(name, interactions="x") == (
        f"data.items is missing, which data.source={name!r} needs; give a file, a folder or a URI"
    )


@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if isinstance(source, PublishedSource)])
@pytest.mark.parametrize("key", ["since", "until"])
def test_a_published_split_has_no_period(name: str, key: str) -> None:
    assert refusal(name, interactions="x", **{key: "2020-01-01"}) == (
        f"data.since and data.until do not apply to data.source={name!r}, whose split is published; leave them out"
    )


def test_only_d3_has_a_published_split() -> None:
    assert [name for name, source in SOURCES.items() if isinstance(source, PublishedSource)] == ["d3"]


@pytest.mark.parametrize(
    ("log", "items", "problem"),
    [
        ("user_id,item_id,when\nu,a,1\n", "item_id,title\na,Alpha\n", "log.csv: no column 'timestamp' among"),
        (
            "user_id,item_id,timestamp\nu,a,soon\n",
            "item_id,title\na,Alpha\n",
            "log.csv: row 1: timestamp='soon' is not",
        ),
        ("user_id,item_id,timestamp\nu,a,1\n", "item_id,name\na,Alpha\n", "items.csv: no column 'title' among"),
        ("user_id,item_id,timestamp\nu,a,1\n", None, "items.csv': not found"),
    ],
)
def test_the_first_rows_show_a_wrong_file(tmp_path: Path, log: str, items: str | None, problem: str) -> None:
    (tmp_path / "log.csv").write_text(log)
    if items is not None:
        (tmp_path / "items.csv").write_text(items)
    config = config_of("table", interactions=tmp_path / "log.csv", items=tmp_path / "items.csv")
    with pytest.raises(InputError) as caught:
        check_source(config)
    assert problem in str(caught.value)


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    config = config_of("table", interactions=tmp_path, items=tmp_path)
    with pytest.raises(InputError) as caught:
        check_source(config)
    assert str(caught.value) == (f"data.interactions={str(tmp_path)!r}: no files there; give the folder of the files")


@pytest.mark.embedded
def test_the_demo_is_movielens_100k() -> None:
    config = Config()
    check_source(config)
    assert len(interactions_of(config)) == 100_000
    catalogue = read_catalogue(config)
    assert len(catalogue) == 1_682
    assert catalogue.titles[0].as_py() == "Toy Story (1995)"
