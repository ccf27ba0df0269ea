"""Neural models of sequences: the interface of a model, and the recommender that a trained one makes.

A model reads the items of a history and returns a state for each place. The score of an item is the product of its
vector and the state of the last place. The items' vectors are the input embeddings, too, as in SASRec.

Rows of a batch are filled up behind their last item. No place reads a later one, so filling changes no state.

Shapes: B sequences of at most L items, I items, D dimension, U queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from l2d_ray.config import TrainConfig
from l2d_ray.core.query import History, known_items
from l2d_ray.recommenders.contract import DenseRecommender


class SequenceModel(nn.Module):
    """A model of sequences over a catalogue of items. Row `num_items` of the embedding fills up a batch."""

    popularity: Tensor

    def __init__(self, settings: TrainConfig, num_items: int) -> None:
        super().__init__()
        self.length, self.num_items = settings.length, num_items
        self.items = nn.Embedding(num_items + 1, settings.dimension, padding_idx=num_items)
        self.register_buffer("popularity", torch.zeros(num_items))

    def forward(self, items_BL: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the states [B, L, D]. Those behind the `lengths_B` first places of a row mean nothing."""
        raise NotImplementedError

    def initialise(self) -> None:
        """Draw all matrices with Xavier's normal distribution, as the implementations of SASRec do."""
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.xavier_normal_(weight)
        with torch.no_grad():
            self.items.weight[self.num_items] = 0

    def scores(self, items_BL: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the score [B, I] of every item as the next one; its popularity after an empty sequence."""
        states_BLD = self(items_BL, lengths_B)
        rows = torch.arange(len(lengths_B), device=items_BL.device)
        last_BD = states_BLD[rows, (lengths_B - 1).clamp(min=0)]
        scores_BI = last_BD @ self.items.weight[: self.num_items].T
        return torch.where(lengths_B[:, None] > 0, scores_BI, self.popularity)


@dataclass(frozen=True)
class SequenceRecommender(DenseRecommender):
    """The items of the best scores. A history without an item that the catalogue knows gets popular items.

    Scores are products of vectors; for popular items, shares of the training sequences' items.
    """

    model: SequenceModel
    """In evaluation mode."""

    @torch.inference_mode()
    def scores(self, histories: Sequence[History]) -> NDArray[np.float32]:
        """Return the score [U, I] of every item after the last window of each history."""
        windows = [known_items(history, self.model.num_items)[-self.model.length :] for history in histories]
        lengths = np.array([window.size for window in windows])
        items = np.full((len(windows), max(1, int(lengths.max()))), self.model.num_items)
        for row, window in zip(items, windows, strict=True):
            row[: window.size] = window
        device = self.model.popularity.device
        scores_UI = self.model.scores(torch.from_numpy(items).to(device), torch.from_numpy(lengths).to(device))
        found: NDArray[np.float32] = scores_UI.cpu().numpy()
        return found
