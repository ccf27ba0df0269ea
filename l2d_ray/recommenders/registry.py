"""The list of all recommenders, and the way from a name to a recommender."""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

from l2d_ray.config import Config
from l2d_ray.errors import InputError
from l2d_ray.recommenders.contract import Declaration, Need, Options, Recommender

if TYPE_CHECKING:
    from l2d_ray.data.dataset import Dataset
    from l2d_ray.recommenders.resources import Resources

MODULES = {
    "most-popular": "l2d_ray.recommenders.most_popular",
    "popularity-window": "l2d_ray.recommenders.popularity_window",
    "co-occurrence": "l2d_ray.recommenders.co_occurrence",
    "transitions": "l2d_ray.recommenders.transitions",
    "ease": "l2d_ray.recommenders.ease",
    "title-knn": "l2d_ray.recommenders.title_knn",
    "tgh": "l2d_ray.recommenders.tgh",
    "l2d": "l2d_ray.recommenders.l2d",
    "file": "l2d_ray.recommenders.from_file",
    "constrained-beam": "l2d_ray.recommenders.constrained_beam",
    "d3": "l2d_ray.recommenders.d3",
    "grounded-beam": "l2d_ray.recommenders.grounded_beam",
    "bigrec": "l2d_ray.recommenders.bigrec",
    "gpt4rec": "l2d_ray.recommenders.gpt4rec",
    "sasrec": "l2d_ray.recommenders.sasrec",
    "esasrec": "l2d_ray.recommenders.esasrec",
    "gru4rec": "l2d_ray.recommenders.gru4rec",
    "alpharec": "l2d_ray.recommenders.alpharec",
    "id-head": "l2d_ray.recommenders.id_head",
    "lite-llm4rec": "l2d_ray.recommenders.lite_llm4rec",
    "fused": "l2d_ray.recommenders.fused",
}
"""The module of each recommender, by the first part of its names. Only the modules of requested names are imported."""


@dataclass(frozen=True)
class NamedRecommender:
    """A recommender that is not made yet: its name and options. Pickles, so that a worker can make it."""

    name: str
    module: str
    options: Options

    @property
    def declaration(self) -> Declaration[Any]:
        """The declaration in the recommender's module."""
        return declaration(self.module)

    @property
    def needs(self) -> frozenset[Need]:
        """Resources that it is made from: those of its declaration, and of the recommenders that it combines."""
        return self.declaration.needs.union(*(part.needs for part in self.options.parts))

    def checksum(self, dataset: "Dataset") -> str:
        """Return the checksum of its weights; empty if it is one that jobs/train.py does not train.

        Raises InputError if it was not trained yet, or on another dataset.
        """
        if Need.TRAINED not in self.declaration.needs:
            return ""
        from l2d_ray.recommenders.trained import read_record  # not above: it imports PyTorch

        return read_record(dataset, self.name).sha256

    def trained_on_valid(self, dataset: "Dataset") -> bool:
        """Return whether its weights know the validation samples. Raises InputError as `checksum` does."""
        if Need.TRAINED not in self.declaration.needs:
            return False
        from l2d_ray.recommenders.trained import read_record

        return read_record(dataset, self.name).train.on_valid

    def make(self, resources: "Resources") -> Recommender:
        """Make the recommender."""
        return self.declaration.make(self.options, resources)


def declaration(module: str) -> Declaration[Any]:
    """Return the declaration in a module."""
    found: Declaration[Any] = import_module(module).DECLARATION
    return found


def find(name: str, config: Config, setting: str) -> NamedRecommender:
    """Return the recommender of a name. Raises InputError, with the nearest known name, if there is none.

    `setting` is the configuration's key that holds the name.
    """
    prefixes = [prefix for prefix in MODULES if re.match(rf"{re.escape(prefix)}(?!\w)", name)]
    if not prefixes:
        similar = get_close_matches(name, MODULES, n=1)
        remedy = f"did you mean {similar[0]}?" if similar else f"known are {', '.join(MODULES)}"
        raise InputError(f"{setting}={name!r}: unknown recommender; {remedy}")
    module = MODULES[max(prefixes, key=len)]
    declared = declaration(module)
    match = re.fullmatch(declared.pattern, name)
    if match is None:
        (nearest,) = get_close_matches(name, declared.examples, n=1, cutoff=0)
        raise InputError(f"{setting}={name!r}: unknown recommender; write {declared.form}, for example {nearest}")
    groups = {group: value for group, value in match.groupdict().items() if value is not None}
    return NamedRecommender(name, module, declared.options.read(config, groups))
