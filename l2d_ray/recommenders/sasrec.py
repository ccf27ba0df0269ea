"""SASRec: a small transformer that reads a history of item ids. Source: arXiv 1808.09781.

The input of a place is its item's vector plus a learned vector of the place (equation 1). A block applies
self-attention and a point-wise network, each as x + Dropout(g(LayerNorm(x))) (section 3.3). A place attends to itself
and to earlier ones only. The score of an item is the product of its vector and the last state (equation 6).

Differences from the paper:

- The loss is cross-entropy over the catalogue, which makes SASRec much better (arXiv 2309.07602). The paper's is
  `train.loss=binary train.negatives=1`.
- Keys and values are normalised like the queries. The authors' code normalises the queries alone, and adds the result
  to the normalised input; the paper's equation is followed here.
- Item vectors are multiplied by the square root of the dimension, and a last LayerNorm precedes the product. Both are
  in the authors' code, not in the paper.
- Long sequences are cut into windows (`sequential_training.py`).

Shapes: B sequences of at most L items, D dimension.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from l2d_ray.config import TrainConfig
from l2d_ray.errors import InputError
from l2d_ray.recommenders.sequential import SequenceModel
from l2d_ray.recommenders.sequential_training import declare

EPSILON = 1e-8
"""Added to the variance by LayerNorm, as in the authors' code."""


class CausalAttention(nn.Module):
    """Self-attention in which a place attends to itself and to earlier places."""

    def __init__(self, settings: TrainConfig) -> None:
        super().__init__()
        if settings.dimension % settings.heads:
            raise InputError(
                f"train.heads={settings.heads} does not divide train.dimension={settings.dimension}; set train.heads=1"
                " or another divisor"
            )
        self._heads, self._dropout = settings.heads, settings.dropout
        self.inputs = nn.Linear(settings.dimension, 3 * settings.dimension)
        self.output = nn.Linear(settings.dimension, settings.dimension)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the attended values [B, L, D]."""
        shape = (*x_BLD.shape[:2], self._heads, -1)
        queries, keys, values = (part.reshape(shape).transpose(1, 2) for part in self.inputs(x_BLD).chunk(3, dim=-1))
        dropout = self._dropout if self.training else 0.0
        attended = functional.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, is_causal=True)
        found: Tensor = self.output(attended.transpose(1, 2).reshape(x_BLD.shape))
        return found


class Block(nn.Module):
    """A block of SASRec."""

    def __init__(self, settings: TrainConfig) -> None:
        super().__init__()
        dimension = settings.dimension
        self.attention_norm, self.network_norm = (nn.LayerNorm(dimension, eps=EPSILON) for _ in range(2))
        self.attention = CausalAttention(settings)
        self.network = nn.Sequential(
            nn.Linear(dimension, dimension),
            nn.ReLU(),
            nn.Dropout(settings.dropout),
            nn.Linear(dimension, dimension),
        )
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the new states [B, L, D]."""
        x_BLD = x_BLD + self.dropout(self.attention(self.attention_norm(x_BLD)))
        found: Tensor = x_BLD + self.dropout(self.network(self.network_norm(x_BLD)))
        return found


class SASRec(SequenceModel):
    """SASRec, and any transformer that differs in its `block` only."""

    block: type[nn.Module] = Block
    """Class of the blocks, made from the settings; from [B, L, D] to [B, L, D]."""

    def __init__(self, settings: TrainConfig, num_items: int) -> None:
        super().__init__(settings, num_items)
        self.places = nn.Embedding(settings.length, settings.dimension)
        self.blocks = nn.ModuleList(self.block(settings) for _ in range(settings.blocks))
        self.norm = nn.LayerNorm(settings.dimension, eps=EPSILON)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, items_BL: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the states [B, L, D]. Places are counted from the last item, as with the paper's padding."""
        places_BL = torch.arange(items_BL.shape[1], device=items_BL.device) + (self.length - lengths_B)[:, None]
        scale = math.sqrt(self.items.embedding_dim)
        x_BLD = self.items(items_BL) * scale + self.places(places_BL.clamp(max=self.length - 1))
        x_BLD = self.dropout(x_BLD)
        for block in self.blocks:
            x_BLD = block(x_BLD)
        found: Tensor = self.norm(x_BLD)
        return found


DECLARATION = declare(
    "sasrec",
    SASRec,
    grid={
        "dimension": [64, 128],
        "dropout": [0.2, 0.5],
        "length": [50, 100],
        "learning_rate": [1e-3, 3e-4],
        "weight_decay": [0.0, 0.01],
        "loss": ["softmax", "sampled-softmax"],
    },
)
