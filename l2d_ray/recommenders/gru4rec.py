"""GRU4Rec: a recurrent network that reads a history of item ids. Source: arXiv 1511.06939.

A gated recurrent unit h' = (1 - z) h + z tanh(W x + U (r h)) reads one item after the other (equations 1 to 4). The
state after an item predicts the next one. The paper's best network has one layer of 100 units.

Differences from the paper:

- The loss is cross-entropy over the catalogue, as the authors' later work recommends (arXiv 1706.03847). The paper's
  rank losses compare with the other items of a batch.
- Items enter as vectors that also score them, not as one-hot codes with an output layer. This is the paper's embedding
  layer with tied weights, which its authors' later code offers ("constrained embedding").
- Whole sequences are run, in windows; the paper trains sessions in parallel and truncates the gradient to one step.
- The optimizer is AdamW, as for the other recommenders here. The paper's is AdaGrad.

Shapes: B sequences of at most L items, D dimension.
"""

from torch import Tensor, nn

from l2d_ray.config import TrainConfig
from l2d_ray.recommenders.sequential import SequenceModel
from l2d_ray.recommenders.sequential_training import declare


class GRU4Rec(SequenceModel):
    """A gated recurrent network over the items, with dropout before and behind it."""

    def __init__(self, settings: TrainConfig, num_items: int) -> None:
        super().__init__(settings, num_items)
        dropout_between = settings.dropout if settings.blocks > 1 else 0.0
        self.recurrent = nn.GRU(
            settings.dimension, settings.dimension, settings.blocks, batch_first=True, dropout=dropout_between
        )
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, items_BL: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the states [B, L, D]."""
        states_BLD, _ = self.recurrent(self.dropout(self.items(items_BL)))
        found: Tensor = self.dropout(states_BLD)
        return found


DECLARATION = declare(
    "gru4rec",
    GRU4Rec,
    defaults={"dimension": 100, "blocks": 1, "dropout": 0.2},
    unused=("heads",),
    grid={
        "dimension": [64, 100, 200],
        "dropout": [0.0, 0.2, 0.5],
        "learning_rate": [1e-3, 3e-3],
        "weight_decay": [0.0, 0.01],
    },
)
