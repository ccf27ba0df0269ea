"""eSASRec: SASRec with LiGR blocks and a sampled softmax. Source: arXiv 2508.06450; LiGR is arXiv 2502.03417.

A block applies self-attention and a SwiGLU network, each as x + sigmoid(W x + b) * Dropout(g(LayerNorm(x))). The gate
reads the same input that it is added to. The rest is SASRec: each place of a sequence predicts the next item.

Differences from the authors' implementation in RecTools:

- The negatives are drawn once for a sequence instead of once for a place, which needs a product of matrices instead of
  a copy of `train.negatives` vectors for each place. A negative that is the target does not count.
- The last states pass a LayerNorm, as SASRec's do. RecTools' layers of LiGR have none at the end.
- Heads and dropout are RecTools' defaults. The dimension is that of sasrec, so that the two differ in what eSASRec
  adds; RecTools' default is 256.

Shapes: B sequences of at most L items, D dimension.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from l2d_ray.config import TrainConfig
from l2d_ray.recommenders.sasrec import CausalAttention, SASRec
from l2d_ray.recommenders.sequential_training import declare

WIDENING = 4
"""Width of the network's inner layers, as a multiple of the dimension. RecTools' default."""


class SwiGLU(nn.Module):
    """A network with the gated activation SwiGLU, without biases. Source: arXiv 2002.05202."""

    def __init__(self, dimension: int, dropout: float) -> None:
        super().__init__()
        self.inputs = nn.Linear(dimension, 2 * WIDENING * dimension, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(WIDENING * dimension, dimension, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the values [B, L, D]."""
        gate, value = self.inputs(x_BLD).chunk(2, dim=-1)
        found: Tensor = self.output(self.dropout(functional.silu(gate) * value))
        return found


class LiGRBlock(nn.Module):
    """A block of LiGR."""

    def __init__(self, settings: TrainConfig) -> None:
        super().__init__()
        dimension = settings.dimension
        self.attention_norm, self.network_norm = (nn.LayerNorm(dimension) for _ in range(2))
        self.attention_gate, self.network_gate = (nn.Linear(dimension, dimension) for _ in range(2))
        self.attention = CausalAttention(settings)
        self.network = SwiGLU(dimension, settings.dropout)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the new states [B, L, D]."""
        attended = self.dropout(self.attention(self.attention_norm(x_BLD)))
        x_BLD = x_BLD + torch.sigmoid(self.attention_gate(x_BLD)) * attended
        found: Tensor = x_BLD + torch.sigmoid(self.network_gate(x_BLD)) * self.dropout(
            self.network(self.network_norm(x_BLD))
        )
        return found


class ESASRec(SASRec):
    """SASRec with the blocks of LiGR."""

    block = LiGRBlock


DECLARATION = declare(
    "esasrec",
    ESASRec,
    defaults={"heads": 4, "dropout": 0.2, "loss": "sampled-softmax", "negatives": 256},
    grid={
        "dimension": [64, 128],
        "dropout": [0.2, 0.5],
        "learning_rate": [1e-3, 3e-4],
        "weight_decay": [0.0, 0.01],
        "negatives": [256, 1024],
    },
)
