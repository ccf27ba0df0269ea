"""Settings of the recommenders that jobs/train.py trains on a dataset."""

from typing import Literal

from pydantic import Field

from l2d_ray.config.section import Section


class TrainConfig(Section):
    """Training of one recommender, jobs/train.py. Defaults are sasrec's; another recommender may have its own.

    Its module in l2d_ray/recommenders/ states them. A given setting always counts.
    """

    dimension: int = Field(64, ge=1)
    """Dimension of the vectors of items and of states."""
    blocks: int = Field(2, ge=1)
    """Layers: blocks of self-attention, recurrent layers, graph convolutions, or first layers of a language model."""
    heads: int = Field(1, ge=1)
    """Attention heads of a block. They divide the dimension."""
    dropout: float = Field(0.5, ge=0, lt=1)
    """Share of the inputs that dropout removes. SASRec's paper has 0.5, and 0.2 for MovieLens-1M."""
    length: int = Field(50, ge=1)
    """Items of a history that the model reads: the last ones. Longer training sequences are cut into windows."""
    loss: Literal["softmax", "sampled-softmax", "binary"] = "softmax"
    """Loss of a position. `softmax` is cross-entropy over the catalogue. The others compare the next item with
    train.negatives random items: `sampled-softmax` by cross-entropy, `binary` by a yes or no for each item."""
    negatives: int = Field(256, ge=1)
    """Random items that a sequence is compared with, for the losses that sample."""
    temperature: float = Field(0.15, gt=0)
    """Divisor of the scores in the loss of alpharec. The paper has 0.15 and 0.2."""
    learning_rate: float = Field(1e-3, gt=0)
    """Learning rate of AdamW, constant."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW."""
    batch_size: int = Field(128, ge=1)
    """Sequences of one optimizer step; for id-head, rows of the memory."""
    epochs: int = Field(100, ge=1)
    """Maximum number of passes over the training sequences."""
    patience: int = Field(10, ge=1)
    """Stop after this many epochs without a better NDCG@20 on validation samples. The best epoch's weights are kept."""
    on_valid: bool = False
    """Train on the validation samples, too, for exactly train.epochs epochs. Give the number that a training without
    them chose (`best_epoch`), and compare the result on test samples only."""
    valid_samples: int = Field(10_000, ge=1)
    """Maximum number of validation samples; chosen by sample id."""
    seed: int = Field(0, ge=0)
    """Seed of the first weights, the order of the sequences, the dropout and the random items."""


class TuneConfig(Section):
    """Search for the best settings of a recommender, jobs/tune.py."""

    trials: int = Field(24, ge=1)
    """Maximum number of choices to compare. If the grid in the recommender's module has more, a random part of it."""
