"""AlphaRec: collaborative filtering on frozen title embeddings. Source: arXiv 2407.05441, and its authors' code.

With z_i the embedding of an item's title, and z_u the mean of those of the items N_u of user u,

    e(0) = W2 LeakyReLU(W1 z + b1) + b2                                 for users and items alike
    e_u(k + 1) = sum over i in N_u of e_i(k) / sqrt(|N_u| |N_i|)        and for items over their users
    e = e(0) + ... + e(layers)
    loss of an interaction = -log(exp(s_ui / t) / (exp(s_ui / t) + sum over negatives j of exp(s_uj / t)))

where the score s_ui is the cosine of e_u and e_i. These are the paper's nonlinear projection, graph convolution
(LightGCN's, arXiv 2002.02126) and contrastive objective. The paper takes the mean over layers, which has the same
cosines as the sum.

A user at query time is a new node of the graph: N_u is the history of the query, and the formulas are those of a
training user. The new node changes no item's vector and no |N_i|. So a training user with its training history as the
query gets exactly its vector of the training, and an item of no training user counts with |N_i| = 1.

Differences from the paper:

- Embeddings are states of the workspace's model (`title_states.py`), standardised in each dimension: states of a
  language model share a large mean, which would leave almost equal cosines. W1 and b1 could learn this, only slower.
- W1 keeps the dimension of the embedding. The authors choose the width for 4.7 million weights, which a small machine
  does not train for small embeddings: they widen 768 dimensions 8 times, and halve 3,072.
- The negatives are drawn once for a user of a batch, not once for an interaction, and a batch has all interactions of
  its users. As in the paper, a user's items are no negatives.
- A user's first item is in the graph but is no target, because it is no training sample of any recommender here.
- `train.length` may limit a query's history to its last items. The paper has no order; by default all items count.

Shapes: U users, I items, E dimension of embeddings, D dimension, B users of a batch, N samples, K negatives.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional

from l2d_ray.config import Config, TrainConfig
from l2d_ray.core.arrays import FloatArray, IntArray
from l2d_ray.core.query import History, known_items
from l2d_ray.data.dataset import Dataset
from l2d_ray.recommenders.contract import DenseRecommender
from l2d_ray.recommenders.gradient_learner import GradientLearner, on_cpu
from l2d_ray.recommenders.title_states import title_states
from l2d_ray.recommenders.training import TrainedOptions, Trainer, TrainingData, declare_trained
from l2d_ray.workspace import Workspace

if TYPE_CHECKING:  # imports transformers, which takes seconds
    from l2d_ray.recommenders.resources import Resources

WHOLE_HISTORY = 100_000
"""A `train.length` that no history reaches."""


@dataclass(frozen=True)
class Graph:
    """The items of the training users, each item of a user once."""

    edges_UI: sparse.csr_array
    """1 for each item of a user."""
    mean_UI: Tensor
    """Sparse; from values of items to the mean over a user's items."""
    propagate_UI: Tensor
    """Sparse; 1 / sqrt(|N_u| |N_i|) for each item of a user."""
    propagate_IU: Tensor
    """Its transpose."""
    degrees_I: Tensor
    """|N_i|, and 1 for an item of no training user."""

    @classmethod
    def of(cls, data: TrainingData, device: torch.device) -> Self:
        """Build the graph of the training sequences."""
        rows = (np.ones(data.items.size, np.float32), data.items, data.offsets)
        edges_UI = sparse.csr_array(rows, shape=(data.offsets.size - 1, data.num_items), copy=True)
        edges_UI.sum_duplicates()  # in place
        edges_UI.data[:] = 1
        degrees_U, degrees_I = (np.maximum(edges_UI.sum(axis=axis), 1) for axis in (1, 0))
        mean = sparse.diags_array(1 / degrees_U) @ edges_UI
        propagate = sparse.diags_array(degrees_U**-0.5) @ edges_UI @ sparse.diags_array(degrees_I**-0.5)
        mean_UI, propagate_UI, propagate_IU = (to_torch(one, device) for one in (mean, propagate, propagate.T))
        return cls(edges_UI, mean_UI, propagate_UI, propagate_IU, torch.from_numpy(degrees_I).to(device))


def to_torch(matrix: sparse.sparray, device: torch.device) -> Tensor:
    """Return a sparse matrix as a coalesced tensor, float32."""
    entries = matrix.tocoo()
    indices = torch.from_numpy(np.stack(entries.coords).astype(np.int64))
    values = torch.from_numpy(entries.data.astype(np.float32))
    return torch.sparse_coo_tensor(indices, values, entries.shape, check_invariants=True).coalesce().to(device)


def standardised(states_IE: FloatArray) -> FloatArray:
    """Return states with mean 0 and deviation 1 in each dimension; a dimension without any deviation is 0."""
    centred_IE = states_IE - states_IE.mean(axis=0)
    deviations_E = centred_IE.std(axis=0)
    found: FloatArray = centred_IE / np.where(deviations_E > 0, deviations_E, 1)
    return found


class Network(nn.Module):
    """The two-layer network and the graph convolutions."""

    def __init__(self, settings: TrainConfig, embedding: int) -> None:
        super().__init__()
        self._layers = settings.blocks
        self.inner = nn.Linear(embedding, embedding)
        self.outer = nn.Linear(embedding, settings.dimension)

    def forward(self, titles_IE: Tensor, graph: Graph) -> tuple[Tensor, list[Tensor]]:
        """Return e of each user [U, D], and e(0), e(1), ... of each item [I, D]."""
        inner_IE = self.inner(titles_IE)  # W1 z + b1 of a mean is the mean of W1 z + b1
        inner_UE = torch.sparse.mm(graph.mean_UI, inner_IE)
        users_UD, items_ID = (self.outer(functional.leaky_relu(inner)) for inner in (inner_UE, inner_IE))
        sum_UD, layers = users_UD, [items_ID]
        for _ in range(self._layers):
            users_UD, items_ID = (
                torch.sparse.mm(graph.propagate_UI, items_ID),
                torch.sparse.mm(graph.propagate_IU, users_UD),
            )
            sum_UD = sum_UD + users_UD
            layers.append(items_ID)
        return sum_UD, layers


def sample_losses(
    positives_N: Tensor, rows_N: Tensor, negatives_BK: Tensor, own_BK: Tensor, temperature: float
) -> Tensor:
    """Return the loss [N] of each sample, given the scores of its target and of its user's negatives.

    `rows_N` is the user of a sample, as a row of the batch. Negatives in `own_BK` do not count.
    """
    lowest = torch.finfo(negatives_BK.dtype).min  # not -inf, whose gradient is NaN where all negatives are a user's own
    against_B = torch.logsumexp((negatives_BK / temperature).masked_fill(own_BK, lowest), dim=1)
    against_N = functional.embedding(rows_N, against_B[:, None])[:, 0]
    return functional.softplus(against_N - positives_N / temperature)


@dataclass(frozen=True)
class AlphaRec(DenseRecommender):
    """Scores are cosines; after a history without an item that the catalogue knows, shares of the training items.

    The tensors have what the network makes of the titles, so that no language model is needed.
    """

    inner_IE: Tensor
    """W1 z + b1 of each item."""
    outer_DE: Tensor
    """W2."""
    outer_D: Tensor
    """b2."""
    messages_ID: Tensor
    """The sum of e(0) to e(layers - 1) of each item, divided by sqrt(|N_i|)."""
    items_ID: Tensor
    """e of each item, scaled to length 1."""
    popularity_I: Tensor
    length: int = WHOLE_HISTORY
    """Last items of a history that count."""

    @torch.inference_mode()
    def scores(self, histories: Sequence[History]) -> NDArray[np.float32]:
        """Return the score [U, I] of every item after each history."""
        known = [np.unique(known_items(history, len(self.items_ID))[-self.length :]) for history in histories]
        sizes_U = torch.tensor([items.size for items in known], device=self.items_ID.device)
        scores_UI = self.users(torch.from_numpy(np.concatenate(known)).to(sizes_U.device), sizes_U) @ self.items_ID.T
        found: NDArray[np.float32] = torch.where(sizes_U[:, None] > 0, scores_UI, self.popularity_I).cpu().numpy()
        return found

    def users(self, items: Tensor, sizes_U: Tensor) -> Tensor:
        """Return e [U, D] of users, scaled to length 1. `items` has the items of one user after the other."""
        offsets_U = sizes_U.cumsum(0) - sizes_U
        means_UE = functional.embedding_bag(items, self.inner_IE, offsets_U, mode="mean")
        sums_UD = functional.embedding_bag(items, self.messages_ID, offsets_U, mode="sum")
        first_UD = functional.linear(functional.leaky_relu(means_UE), self.outer_DE, self.outer_D)
        return functional.normalize(first_UD + sums_UD / sizes_U.clamp(min=1).sqrt()[:, None])


class AlphaRecLearner(GradientLearner):
    """The network during its training."""

    _model: Network

    def __init__(self, states_IE: FloatArray, settings: TrainConfig, data: TrainingData, device: str) -> None:
        super().__init__(settings, data, device)
        self._titles_IE = torch.from_numpy(standardised(states_IE)).to(self._device)
        self._graph = Graph.of(data, self._device)
        with self._seeded(0):
            self._model = Network(settings, states_IE.shape[1]).to(self._device)
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )

    def _losses(self, epoch: int) -> Iterator[Tensor]:
        random = np.random.default_rng([self._settings.seed, epoch])
        order, size = random.permutation(self._data.offsets.size - 1), self._settings.batch_size
        yield from (self._losses_of(order[start : start + size]) for start in range(0, order.size, size))

    def _losses_of(self, users: IntArray) -> Tensor:
        """Return the losses of all samples of some users.

        Rows are taken by `embedding`, which sums its gradient in the same order each time. Indexing does not.
        """
        rows_N, targets_N = (torch.from_numpy(array).to(self._device) for array in self._samples_of(users))
        own_BI = torch.from_numpy(self._graph.edges_UI[users].toarray() > 0).to(self._device)
        negatives_BK = torch.randint(self._data.num_items, (len(users), self._settings.negatives), device=self._device)
        users_UD, layers = self._model(self._titles_IE, self._graph)
        items_ID = functional.normalize(torch.stack(layers).sum(dim=0))
        users_BD = functional.normalize(functional.embedding(torch.from_numpy(users).to(self._device), users_UD))
        scores_N = (functional.embedding(rows_N, users_BD) * functional.embedding(targets_N, items_ID)).sum(dim=1)
        scores_BK = (functional.embedding(negatives_BK, items_ID) @ users_BD[:, :, None])[:, :, 0]
        own_BK = own_BI.gather(1, negatives_BK)
        return sample_losses(scores_N, rows_N, scores_BK, own_BK, self._settings.temperature)

    def _samples_of(self, users: IntArray) -> tuple[IntArray, IntArray]:
        """Return the samples of some users: the place of each one's user in `users`, and its target."""
        begins, ends = self._data.offsets[users] + 1, self._data.offsets[users + 1]
        counts = ends - begins
        places = np.arange(counts.sum()) + np.repeat(begins - (np.cumsum(counts) - counts), counts)
        return np.repeat(np.arange(users.size), counts), self._data.items[places].astype(np.int64)

    @torch.no_grad()
    def recommender(self) -> AlphaRec:
        """Return the recommender with the present weights."""
        _, layers = self._model.eval()(self._titles_IE, self._graph)
        return AlphaRec(
            inner_IE=self._model.inner(self._titles_IE),
            outer_DE=self._model.outer.weight.detach().clone(),
            outer_D=self._model.outer.bias.detach().clone(),
            messages_ID=torch.stack(layers[:-1]).sum(dim=0) / self._graph.degrees_I.sqrt()[:, None],
            items_ID=functional.normalize(torch.stack(layers).sum(dim=0)),
            popularity_I=torch.from_numpy(self._data.popularity_I).float().to(self._device),
            length=self._settings.length,
        )

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of the recommender's tensors."""
        return on_cpu(tensors_of(self.recommender()))


def tensors_of(recommender: AlphaRec) -> dict[str, Tensor]:
    """Return the tensors that a recommender is made from, by name."""
    return {field.name: getattr(recommender, field.name) for field in fields(recommender) if field.name != "length"}


def _learner(config: Config, data: TrainingData) -> AlphaRecLearner:
    states_IE = title_states(config, Dataset.open(Workspace.open(config.workspace)))
    return AlphaRecLearner(states_IE, config.train, data, config.device)


def _make(options: TrainedOptions, resources: "Resources") -> AlphaRec:
    trained = resources.trained(options.name)
    weights = {name: weight.to(resources.config.device) for name, weight in trained.weights.items()}
    try:
        return AlphaRec(**weights, length=trained.record.train.length)
    except TypeError:
        raise trained.unsuitable() from None


DECLARATION = declare_trained(
    "alpharec",
    _make,
    Trainer(
        _learner,
        defaults={"length": WHOLE_HISTORY, "learning_rate": 5e-4, "weight_decay": 1e-6},
        unused=frozenset({"heads", "dropout", "loss"}),
        grid={
            "dimension": [64, 128],
            "length": [10, 50, WHOLE_HISTORY],
            "temperature": [0.15, 0.2],
            "learning_rate": [5e-4, 2e-3],
        },
        reads_titles=True,
    ),
)
