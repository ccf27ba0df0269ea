"""ID head: classification over item ids on the language model's last hidden state, an ablation of L2D.

L2D ranks items by distances between states. Here a linear map gives item i the score

    w_i . h + b_i

for the last hidden state h of the history's prompt, and softmax cross-entropy over the catalogue fits w and b.

Source: L2D (arXiv 2509.11524), its comparison with an ID head. As far as we know, the paper trains that head together
with the language model. Differences:

- The model is fixed: it is the one that made the memory, fine-tuned or not. The rows of the memory are its states of
  all training samples, so an epoch of the head runs no model. This asks how much of the next item a linear map finds in
  the states that L2D searches. A head that is trained together with the model could also change the states.
- The scores start at the items' log-frequencies, so that training starts at popularity.
- The head learns on states that are centred and scaled to unit variance. Both fold into w and b afterwards, so the
  result is a linear map of h. Without them, the few dimensions of large variance decide the learning rate.
- Dropout of the states and weight decay counter overfitting, and validation chooses the epoch.

Shapes: B rows of the memory in a batch, U queries, I items, D dimension.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from l2d_ray.config import Config
from l2d_ray.core.arrays import FloatArray
from l2d_ray.core.decoding import ScoredItems, best_of_all
from l2d_ray.core.query import History, Query
from l2d_ray.data.dataset import Dataset
from l2d_ray.encoding import Encoded, HistoryEncoder
from l2d_ray.recommenders.contract import DENSE_BATCH, Need, Recommender
from l2d_ray.recommenders.gradient_learner import GradientLearner
from l2d_ray.recommenders.memory_rows import MemoryRows, identify_states
from l2d_ray.recommenders.training import ModelOptions, TrainedOptions, Trainer, TrainingData, declare_trained
from l2d_ray.workspace import Workspace

if TYPE_CHECKING:
    from l2d_ray.recommenders.resources import Resources

Encode = Callable[[Sequence[History]], Encoded]


class Head(nn.Module):
    """A linear map from states, which are centred and scaled first, to the scores of all items.

    It is added to the items' log-frequencies, so that weight decay leads to popularity and not to equal scores.
    """

    prior: Tensor
    centre: Tensor
    scale: Tensor

    def __init__(self, num_items: int, dimension: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(dimension, num_items)
        self.register_buffer("prior", torch.zeros(num_items))
        self.register_buffer("centre", torch.zeros(dimension))
        self.register_buffer("scale", torch.ones(dimension))

    @torch.no_grad()
    def start(self, rows: MemoryRows) -> None:
        """Score every state by the items' frequencies in the memory."""
        mean_D, deviation_D = rows.moments()
        counts_I = np.bincount(rows.items_N, minlength=len(self.prior))
        self.prior.copy_(torch.from_numpy(np.log((counts_I + 1) / (counts_I.sum() + counts_I.size))))
        self.centre.copy_(torch.from_numpy(mean_D))
        self.scale.copy_(torch.from_numpy(1 / np.where(deviation_D > 0, deviation_D, 1)))
        self.linear.weight.zero_()
        self.linear.bias.zero_()

    def forward(self, states_BD: Tensor) -> Tensor:
        """Return the scores [B, I]."""
        scores_BI: Tensor = self.linear(self.dropout((states_BD - self.centre) * self.scale)) + self.prior
        return scores_BI

    @torch.no_grad()
    def folded(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return w [I, D] and b [I] for states as they are."""
        weight_ID = self.linear.weight * self.scale
        bias_I = self.linear.bias + self.prior - weight_ID @ self.centre
        return weight_ID.cpu().numpy(), bias_I.cpu().numpy()


@dataclass(frozen=True)
class IdHead(Recommender):
    """Scores are logits. A history whose state is not finite gets an empty list."""

    encode: Encode
    """Returns the hidden states of histories, from the model that made the memory."""
    weight_ID: NDArray[np.float32]
    bias_I: NDArray[np.float32]

    def recommend(self, queries: Sequence[Query]) -> list[ScoredItems]:
        """Return the permitted items of the highest logits."""
        return self.recommend_counted(queries)[0]

    def recommend_counted(self, queries: Sequence[Query]) -> tuple[list[ScoredItems], int]:
        """Recommend, and count tokens. All histories are encoded together, because they may share tokens."""
        encoded = self.encode([query.history for query in queries])
        lists: list[ScoredItems] = []
        for start in range(0, len(queries), DENSE_BATCH):
            batch = slice(start, start + DENSE_BATCH)
            scores_UI = encoded.states_UD[batch] @ self.weight_ID.T + self.bias_I
            lists += [
                best_of_all(scores_I, query.k, query.exclude, query.allow)
                for scores_I, query in zip(scores_UI, queries[batch], strict=True)
            ]
        return lists, encoded.tokens


@dataclass(frozen=True)
class RememberedStates:
    """An encoder that runs each history once. Validation asks for the same ones after every epoch."""

    encode: Encode
    states: dict[bytes, FloatArray] = field(default_factory=dict)

    def __call__(self, histories: Sequence[History]) -> Encoded:
        """Return the states of histories without unknown titles."""
        keys = [np.asarray(history, np.int64).tobytes() for history in histories]
        new = {key: history for key, history in zip(keys, histories, strict=True) if key not in self.states}
        encoded = self.encode(list(new.values()))
        self.states.update(zip(new, encoded.states_UD, strict=True))
        return Encoded(np.stack([self.states[key] for key in keys]), encoded.tokens)


class HeadLearner(GradientLearner):
    """A head during its training."""

    _model: Head

    def __init__(self, config: Config, data: TrainingData) -> None:
        settings = config.train
        super().__init__(settings, data, config.device)
        titles = Dataset.open(Workspace.open(config.workspace)).items()["title"].to_pylist()
        self._encode = RememberedStates(HistoryEncoder(config, titles).encode)
        self._rows = MemoryRows.read(config)
        self._model = Head(data.num_items, self._rows.states_ND.shape[1], settings.dropout)
        self._model.start(self._rows)
        self._model.to(self._device)
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )

    def _losses(self, epoch: int) -> Iterator[Tensor]:
        order = np.random.default_rng([self._settings.seed, epoch]).permutation(self._rows.items_N.size)
        for start in range(0, order.size, self._settings.batch_size):
            rows = order[start : start + self._settings.batch_size]
            states_BD = torch.from_numpy(self._rows.states_ND[rows]).to(self._device).float()
            items_B = torch.from_numpy(self._rows.items_N[rows]).to(self._device)
            yield functional.cross_entropy(self._model(states_BD), items_B, reduction="none")

    def recommender(self) -> IdHead:
        """Return the recommender with the present weights."""
        return IdHead(self._encode, *self._model.folded())


@dataclass(frozen=True)
class HeadOptions(ModelOptions):
    """The name of a trained head, which belongs to the model of its memory."""

    @staticmethod
    def identity(config: Config) -> dict[str, Any]:
        """Return what decides the state of a query."""
        return identify_states(config)


def _make(options: TrainedOptions, resources: "Resources") -> IdHead:
    trained = resources.trained(options.name)
    trained.check_model(identify_states(resources.config))
    head = Head(trained.record.items, resources.encoder.backbone.dimension)
    try:
        head.load_state_dict(trained.weights)
    except RuntimeError:
        raise trained.unsuitable() from None
    return IdHead(resources.encoder.encode, *head.folded())


DECLARATION = declare_trained(
    "id-head",
    _make,
    Trainer(
        HeadLearner,
        defaults={"batch_size": 1024, "dropout": 0.2, "epochs": 50, "patience": 5},
        unused=frozenset({"dimension", "blocks", "heads", "length", "loss", "negatives", "temperature", "on_valid"}),
        grid={
            "learning_rate": [1e-2, 3e-3, 1e-3, 3e-4],
            "dropout": [0.0, 0.2, 0.5],
            "weight_decay": [0.0, 0.01, 0.1],
            "batch_size": [256, 1024],
        },
        reads_memory=True,
    ),
    options=HeadOptions,
    needs=[Need.ENCODER],
)
