"""Trained recommenders in the workspace: `recommenders/<name>/` with the weights, and `training.json`, written last.

The name of the weights' file has a digest of its content. So a training that is repeated never overwrites weights that
a record names, and damaged weights are noticed.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

from numpy.typing import NDArray
from safetensors import SafetensorError

from l2d_ray.config import TrainConfig
from l2d_ray.data.dataset import Dataset
from l2d_ray.errors import InputError
from l2d_ray.records import Record
from l2d_ray.workspace import Workspace

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "recommenders"
T = TypeVar("T")


class Epoch(Record):
    """One pass over the training sequences, and the quality after it."""

    epoch: int
    """Number, from 1."""
    loss: float
    """Mean loss of a training sample."""
    ndcg: float
    """NDCG@20 on the validation samples."""
    seconds: float


class TrainingRecord(Record):
    """The content of `training.json`."""

    run: str
    """Digest of everything that decides the weights."""
    recommender: str
    """Name of the recommender."""
    settings: dict[str, Any]
    """Settings that decide the weights, by dotted key."""
    train: TrainConfig
    """The settings of the training."""
    dataset: str
    """Digest of the dataset."""
    items: int
    """Number of items in the catalogue."""
    samples: int
    """Training samples of an epoch."""
    valid_samples: int
    best_epoch: int
    """Number, from 1, of the epoch after which these weights were kept."""
    history: list[Epoch]
    seconds: float
    """Seconds spent training and validating, over all attempts."""
    weights: str
    """Name of the weights' file in the folder."""
    sha256: str
    """Checksum of the weights' file."""

    def changes(self, settings: Mapping[str, Any]) -> list[str]:
        """Return `key (recorded, now value)` for each of these settings that is not the recorded one."""
        return [
            f"{key} ({self.settings.get(key)!r}, now {value!r})"
            for key, value in settings.items()
            if self.settings.get(key) != value
        ]

    def check_model(self, identity: Mapping[str, Any], location: str) -> None:
        """Raise InputError, with a location, if the settings that identify the language model have changed."""
        if changes := self.changes(identity):
            raise InputError(
                f"{location}: trained with another language model: {', '.join(changes)}; give model.*, prompt.* and"
                f" history.* as they were, or {_again(self.recommender)}"
            )


def folder_of(name: str) -> str:
    """Return the folder of a trained recommender in the workspace."""
    return f"{FOLDER}/{name}"


def record_of(name: str) -> str:
    """Return the path of the record of a trained recommender in the workspace."""
    return f"{folder_of(name)}/training.json"


def read_record(dataset: Dataset, name: str) -> TrainingRecord:
    """Return the record of a recommender. Raises InputError if there is none, or if its dataset is another one."""
    workspace, path = dataset.workspace, record_of(name)
    if not workspace.exists(path):
        raise InputError(f"{workspace.path(path)}: not found; run jobs/train.py recommender={name} first")
    record = TrainingRecord.read(workspace, path)
    if record.dataset != dataset.digest:
        raise InputError(
            f"{workspace.path(path)}: trained on another dataset ({record.dataset[:12]}, now {dataset.digest[:12]});"
            f" delete its folder and run jobs/train.py recommender={name} again"
        )
    return record


def write_weights(workspace: Workspace, name: str, weights: "dict[str, Tensor]") -> tuple[str, str]:
    """Write the weights of a recommender. Return the name of their file, and its checksum."""
    from safetensors.torch import save  # it imports PyTorch, which takes seconds, and most callers read records only

    content = save({key: weight.contiguous() for key, weight in weights.items()})
    checksum = hashlib.sha256(content).hexdigest()
    file = f"weights-{checksum[:12]}.safetensors"
    with workspace.create(f"{folder_of(name)}/{file}") as stream:
        stream.write(content)
    return file, checksum


@dataclass(frozen=True)
class Trained:
    """The result of a training."""

    record: TrainingRecord
    weights: "dict[str, Tensor]"
    """Tensors on the CPU, by name."""
    location: str
    """Path of the weights' file, for messages."""

    @classmethod
    def load(cls, dataset: Dataset, name: str) -> Self:
        """Load a recommender that was trained on this dataset.

        Raises InputError as `read_record` does, and if the weights are missing or damaged.
        """
        record, workspace = read_record(dataset, name), dataset.workspace
        path = f"{folder_of(name)}/{record.weights}"
        try:
            content = workspace.storage.read(workspace.path(path))
        except FileNotFoundError:
            raise InputError(f"{workspace.path(path)}: not found, but training.json names it; {_again(name)}") from None
        if hashlib.sha256(content).hexdigest() != record.sha256:
            raise InputError(f"{workspace.path(path)}: its checksum is not that of training.json; {_again(name)}")
        return cls(record, load_tensors(content, workspace.path(path), _again(name)), workspace.path(path))

    def check_model(self, identity: Mapping[str, Any]) -> None:
        """Raise InputError, naming what differs, if it was trained with another language model."""
        self.record.check_model(identity, self.location)

    def unsuitable(self) -> InputError:
        """Return the error for weights that are not those of this recommender with the recorded settings."""
        return InputError(
            f"{self.location}: holds other weights than training.json says; delete its folder and run jobs/train.py"
            f" recommender={self.record.recommender} again"
        )


def load_tensors(content: bytes, location: str, remedy: str) -> "dict[str, Tensor]":
    """Return the tensors of a safetensors file. Raises InputError, with its location and this remedy, if it is none."""
    from safetensors.torch import load  # here, because importing PyTorch takes seconds

    return _loaded(load, content, location, remedy)


def load_arrays(content: bytes, location: str, remedy: str) -> dict[str, NDArray[Any]]:
    """Return the tensors of a safetensors file as NumPy's, which has no bfloat16. Raises as `load_tensors` does."""
    from safetensors.numpy import load

    return _loaded(load, content, location, remedy)


def _loaded(load: Callable[[bytes], dict[str, T]], content: bytes, location: str, remedy: str) -> dict[str, T]:
    try:
        return load(content)
    except SafetensorError as error:
        raise InputError(f"{location}: damaged ({error}); {remedy}") from None


def _again(name: str) -> str:
    return f"delete {folder_of(name)} and run jobs/train.py recommender={name} again"
