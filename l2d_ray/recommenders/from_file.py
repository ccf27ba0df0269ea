"""Recommendations of another system, read from a file: its lists are measured on the same samples as everything else.

The file, folder or URI `file:PATH` is Parquet, CSV, TSV or JSON Lines, with one row for each item of a list:

    sample_id, or user_id and position    the sample, as jobs/export_samples.py writes it
    item_id                               the recommended item, as in the catalogue
    rank, or score                        the order of the list: small ranks first, or large scores first

Every node of a cluster must be able to read it.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from l2d_ray.config import Config
from l2d_ray.core.arrays import Float64, IntArray
from l2d_ray.core.decoding import NO_ITEMS, ScoredItems
from l2d_ray.core.query import Query
from l2d_ray.core.samples import sample_ids
from l2d_ray.data import columns
from l2d_ray.data.files import children
from l2d_ray.data.interactions import user_hashes
from l2d_ray.data.table import column_names, read_chunks
from l2d_ray.errors import InputError
from l2d_ray.recommenders.contract import Declaration, Options, Recommender

if TYPE_CHECKING:
    from l2d_ray.data.dataset import Dataset
    from l2d_ray.data.samples import Sample

SETTING = "evaluate.recommenders"
_REMEDY = "write sample_id (or user_id and position), item_id, and rank or score"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FixedLists(Recommender):
    """A list for each of N samples. Scores are those of the file, or the ranks with a minus sign.

    A query without a sample, or with a sample that the file does not have, gets an empty list.
    """

    sample_ids_N: IntArray
    """The samples, ascending."""
    offsets: IntArray
    """[N + 1]: list n is that from offsets[n] to offsets[n + 1] - 1, best first."""
    ranked: ScoredItems
    """All lists, one after the other."""

    @classmethod
    def read(cls, location: str, item_ids: Sequence[str]) -> "FixedLists":
        """Read a file or all files of a folder. `item_ids[item_index]` is an item's id.

        Raises InputError for a missing column or value, an unknown item, and an item that a list has twice.
        """
        catalogue, paths = pa.array(item_ids, pa.string()), children(SETTING, location)
        if not paths:
            raise InputError(f"{SETTING}='file:{location}': the folder holds no file; give one with recommendations")
        parts = [_checked(*chunk, catalogue) for path in paths for chunk in _chunks(path)]
        samples, items, scores = (np.concatenate(column) for column in zip(*parts, strict=True))
        _refuse_twice(location, samples, items, item_ids)
        order = np.lexsort((items, -scores, samples))
        distinct_N, starts_N = np.unique(samples[order], return_index=True)
        return cls(distinct_N, np.append(starts_N, samples.size), ScoredItems(items[order], scores[order]))

    def recommend(self, queries: Sequence[Query]) -> list[ScoredItems]:
        """Return the permitted items of each sample's list."""
        return [self._list(query.sample_id).permitted(query.exclude, query.allow).first(query.k) for query in queries]

    def missing(self, sample_ids: IntArray) -> int:
        """Count the samples without a list."""
        return int(np.count_nonzero(~np.isin(sample_ids, self.sample_ids_N)))

    def _list(self, sample_id: int | None) -> ScoredItems:
        if sample_id is None:
            return NO_ITEMS
        n = int(np.searchsorted(self.sample_ids_N, sample_id))
        if n == self.sample_ids_N.size or self.sample_ids_N[n] != sample_id:
            return NO_ITEMS
        part = slice(self.offsets[n], self.offsets[n + 1])
        return ScoredItems(self.ranked.items_I[part], self.ranked.scores_I[part])


@dataclass(frozen=True)
class FileOptions(Options):
    """Options of recommendations from a file."""

    location: str
    """Absolute path, or URI."""

    @classmethod
    def read(cls, config: Config, groups: Mapping[str, str]) -> Self:
        """Return the location in the name. Raises InputError if nothing is there."""
        path = groups["path"]
        location = path if "://" in path else str(Path(path).expanduser().absolute())
        children(SETTING, location)
        return cls(location)

    def check(self, dataset: "Dataset", test: "Sequence[Sample]") -> None:
        """Raise InputError for a file that cannot be used. Log how many test samples have no list."""
        lists = FixedLists.read(self.location, dataset.items()["item_id"].to_pylist())
        if missing := lists.missing(np.array([sample.sample_id for sample in test], np.int64)):
            logger.warning(
                "%s: no list for %s of the %s test samples; they count as misses",
                *(self.location, f"{missing:,}", f"{len(test):,}"),
            )


def _chunks(path: str) -> list[tuple[str, int, Any]]:
    """Read the columns of a file that are needed: path, number of the first row and columns of each chunk."""
    names = column_names(path)
    sample = ["user_id", "position"] if "sample_id" not in names and "user_id" in names else ["sample_id"]
    order = "score" if "rank" not in names and "score" in names else "rank"
    return [(path, row, chunk) for row, chunk in read_chunks(path, [*sample, "item_id", order], _REMEDY)]


def _checked(path: str, row: int, chunk: Any, catalogue: pa.Array) -> tuple[IntArray, IntArray, Float64]:
    """Return the sample ids, item indices and scores of some rows."""
    names = chunk.column_names if isinstance(chunk, pa.Table) else chunk
    if "sample_id" in names:
        samples = columns.whole_numbers(chunk["sample_id"], path, "sample_id", row, parse=True).to_numpy()
    else:
        users = columns.ids(chunk["user_id"], path, "user_id", row)
        positions = columns.whole_numbers(chunk["position"], path, "position", row, parse=True)
        samples = sample_ids(user_hashes(users), positions.to_numpy())
    given = columns.ids(chunk["item_id"], path, "item_id", row)
    found = pc.index_in(given, catalogue)
    if found.null_count:
        first = int(np.argmax(found.is_null().to_numpy(zero_copy_only=False)))
        raise InputError(
            f"{path}: row {row + first}: item_id={given[first].as_py()!r} is not in the dataset's catalogue; remove the"
            " row, or write the ids of dataset/items.parquet"
        )
    order = "rank" if "rank" in names else "score"
    numbers = columns.finite_numbers(chunk[order], path, order, row)
    return samples, found.to_numpy().astype(np.int64), -numbers if order == "rank" else numbers


def _refuse_twice(location: str, samples: IntArray, items: IntArray, item_ids: Sequence[str]) -> None:
    order = np.lexsort((items, samples))
    twice = (np.diff(samples[order]) == 0) & (np.diff(items[order]) == 0)
    if twice.any():
        first, second = order[np.argmax(twice) :][:2].tolist()
        raise InputError(
            f"{location}: rows {first + 1} and {second + 1}: item_id={item_ids[items[first]]!r} is in the list of a"
            f" sample twice, and {np.count_nonzero(twice):,} rows repeat another; keep one of them"
        )


DECLARATION = Declaration(
    pattern=r"file:(?P<path>.+)",
    form="file:<path of a table of recommendations>",
    examples=("file:recommendations.parquet",),
    options=FileOptions,
    make=lambda options, resources: FixedLists.read(options.location, resources.item_ids),
    needs=frozenset(),
    samples_only=True,
)
