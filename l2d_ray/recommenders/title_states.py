"""The language model's states of all titles, kept in the workspace for the steps that read them.

    recommenders/titles/<digest>.safetensors    written once for some titles, a model and a form of the titles

They are the states that title-knn compares. All trainings of jobs/tune.py share them, and so do the indexes. Items that
are added later have a file for themselves.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors.numpy

from l2d_ray.config import Config
from l2d_ray.core.arrays import FloatArray
from l2d_ray.data.dataset import Dataset
from l2d_ray.encoding import identify_memory
from l2d_ray.errors import InputError
from l2d_ray.recommenders.trained import FOLDER, load_arrays
from l2d_ray.workspace import Workspace

DECISIVE = ("base_model", "num_layers", "adapter", "tokenizer", "template", "dtype")
"""Parts of a memory's identity that decide the state of a title."""
STATES = "states_ID"
"""Name of the tensor in the file."""


def identify_titles(config: Config) -> dict[str, Any]:
    """Return everything but the titles that decides the states, by dotted name; digests are cut to 12 characters.

    Raises InputError if the model or adapter is missing.
    """
    identity = identify_memory(config).model_dump()
    values = {name: identity[name] for name in DECISIVE}
    return {f"titles.{name}": value[:12] if isinstance(value, str) else value for name, value in values.items()}


def title_states(config: Config, dataset: Dataset) -> FloatArray:
    """Return the state of each title, [I, D] float32: read if they are in the workspace, else computed and written.

    Raises InputError if a file is damaged, or if a state is not finite.
    """
    identity = identify_titles(config)
    parts = [items["title"].to_pylist() for items in dataset.item_tables()]
    return np.concatenate([_states_of(titles, identity, config, dataset.workspace) for titles in parts])


def _states_of(titles: Sequence[str], identity: dict[str, Any], config: Config, workspace: Workspace) -> FloatArray:
    digest = hashlib.sha256(json.dumps([titles, identity]).encode()).hexdigest()
    path = f"{FOLDER}/titles/{digest[:16]}.safetensors"
    if not workspace.exists(path):
        states_ID = _computed(config, titles)
        with workspace.create(path) as stream:
            stream.write(safetensors.numpy.save({STATES: states_ID}))
    location = workspace.path(path)
    arrays = load_arrays(workspace.storage.read(location), location, "delete it and run the same command again")
    return arrays[STATES]


def _computed(config: Config, titles: Sequence[str]) -> FloatArray:
    from l2d_ray.encoding import HistoryEncoder

    states_ID = HistoryEncoder(config, titles).title_states(len(titles))
    broken = np.flatnonzero(~np.isfinite(states_ID).all(axis=1))
    if broken.size:
        raise InputError(
            f"model.name={config.model.name!r}: the state of the title {titles[broken[0]]!r} is not finite; give"
            " another model, or model.dtype=float32"
        )
    return states_ID
