"""Lite-LLM4Rec: a language model reads a sequence of vectors, one for each item, and a head scores the catalogue.

Two language models stand one on the other. The item LLM compresses the title of an item into one vector, its last
hidden state. A linear projection maps the vector into the input space of the recommendation LLM, which reads one vector
in place of each item of the history. The last state times the head's vector of an item is the item's score. So one pass
over as many positions as the history has items replaces beam search, and the item LLM never runs when a query comes.

Source: Lite-LLM4Rec (arXiv 2402.09543), its hierarchical structure and its item projection head. Differences:

- The item LLM is frozen: it is the language model of the workspace, as in `title-knn`, and runs once before training.
  The paper trains both models. Here each step would run the item LLM on the title of every item of the batch, which
  costs more than the recommendation LLM itself.
- The recommendation LLM has the weights of the same model, of its first `train.blocks` layers. It is trained as
  `finetune.method` says: by LoRA with the settings of `finetune`, or in full.
- Only the title is read, because the catalogue has no other text. Histories are vectors alone, without a prompt in
  words. Titles that the catalogue does not know are skipped.
- The vectors of titles are centred and scaled to unit variance, and a LayerNorm precedes the head, which has no bias.
  Hidden states have a few dimensions of large variance.
- Each place of a window is a training sample with cross-entropy over the catalogue (`sequential_training.py`).

Shapes: B sequences of at most L items, I items, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from l2d_ray.config import Config, FinetuneConfig, TrainConfig
from l2d_ray.core.arrays import FloatArray
from l2d_ray.core.decoding import ScoredItems
from l2d_ray.core.query import Query, known_items
from l2d_ray.data.dataset import Dataset
from l2d_ray.models.trainable import load_trainable_body
from l2d_ray.recommenders.alpharec import standardised
from l2d_ray.recommenders.contract import Need
from l2d_ray.recommenders.gradient_learner import load_state
from l2d_ray.recommenders.sequential import SequenceModel, SequenceRecommender
from l2d_ray.recommenders.sequential_training import SequenceLearner
from l2d_ray.recommenders.title_states import identify_titles, title_states
from l2d_ray.recommenders.training import ModelOptions, TrainedOptions, Trainer, TrainingData, declare_trained
from l2d_ray.workspace import Workspace

if TYPE_CHECKING:
    from l2d_ray.recommenders.resources import Resources

FINETUNE = ("method", "rank", "alpha", "dropout", "target_modules")
"""Settings of `finetune` that decide the weights."""


class LiteLLM4Rec(SequenceModel):
    """The recommendation LLM between the projection and the head. `items` holds the vectors of the head."""

    titles: Tensor

    def __init__(self, llm: Any, settings: TrainConfig, num_items: int) -> None:
        dimension = llm.config.hidden_size
        super().__init__(settings.model_copy(update={"dimension": dimension}), num_items)
        self.register_buffer("titles", torch.zeros(num_items + 1, dimension))
        self.projection = nn.Linear(dimension, dimension)
        self.llm = llm
        self.norm = nn.LayerNorm(dimension)
        self.dropout = nn.Dropout(settings.dropout)

    def initialise(self) -> None:
        """Draw the projection and the head. Projected titles are as large as the embeddings of tokens."""
        tokens_VD = self.llm.get_input_embeddings().weight.float()
        size, dimension = tokens_VD.square().mean().sqrt().item(), tokens_VD.shape[1]
        nn.init.normal_(self.projection.weight, std=size / dimension**0.5)
        nn.init.zeros_(self.projection.bias)
        nn.init.xavier_normal_(self.items.weight)
        with torch.no_grad():
            self.items.weight[self.num_items] = 0

    def compress(self, states_ID: FloatArray) -> None:
        """Take over the hidden states of the titles."""
        self.titles[: self.num_items] = torch.from_numpy(standardised(states_ID))

    def forward(self, items_BL: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the states [B, L, D]."""
        vectors_BLD = self.dropout(self.projection(self.titles[items_BL]))
        places_BL = torch.arange(items_BL.shape[1], device=items_BL.device).expand(items_BL.shape)
        states_BLD = self.llm(
            inputs_embeds=vectors_BLD.to(self.llm.dtype), position_ids=places_BL, use_cache=False
        ).last_hidden_state
        found: Tensor = self.dropout(self.norm(states_BLD.float()))
        return found


@dataclass(frozen=True)
class LiteRecommender(SequenceRecommender):
    """The recommender that a trained Lite-LLM4Rec makes."""

    def recommend_counted(self, queries: Sequence[Query]) -> tuple[list[ScoredItems], int]:
        """Recommend, and count the positions that went through the recommendation LLM."""
        sizes = [known_items(query.history, self.model.num_items).size for query in queries]
        return self.recommend(queries), sum(min(size, self.model.length) for size in sizes)


def _learner(config: Config, data: TrainingData) -> SequenceLearner:
    states_ID = title_states(config, Dataset.open(Workspace.open(config.workspace)))
    return SequenceLearner(partial(_build, config, states_ID), config.train, data, config.device)


def _build(config: Config, states_ID: FloatArray, settings: TrainConfig, num_items: int) -> LiteLLM4Rec:
    finetune = config.finetune.model_copy(update={"seed": settings.seed})
    llm = load_trainable_body(config.model, finetune, config.device, settings.blocks)
    model = LiteLLM4Rec(llm, settings, num_items)
    model.compress(states_ID)
    return model


@dataclass(frozen=True)
class LiteOptions(ModelOptions):
    """The name of a trained Lite-LLM4Rec, which belongs to the language model that it adapts."""

    @staticmethod
    def identity(config: Config) -> dict[str, Any]:
        """Return what decides the states of titles, which includes the weights that it adapts."""
        return identify_titles(config)


def _make(options: TrainedOptions, resources: "Resources") -> LiteRecommender:
    trained = resources.trained(options.name)
    trained.check_model(identify_titles(resources.config))
    record = trained.record
    finetune = FinetuneConfig(**{name: record.settings[f"finetune.{name}"] for name in FINETUNE})
    llm = resources.trainable_model(finetune, record.train.blocks)
    model = LiteLLM4Rec(llm, record.train, record.items)
    try:
        load_state(model, trained.weights)
    except RuntimeError:
        raise trained.unsuitable() from None
    return LiteRecommender(model.to(resources.config.device).eval())


DECLARATION = declare_trained(
    "lite-llm4rec",
    _make,
    Trainer(
        _learner,
        defaults={"blocks": 8, "dropout": 0.2, "batch_size": 32, "epochs": 20, "patience": 3},
        unused=frozenset({"dimension", "heads", "temperature"}),
        grid={
            "blocks": [4, 8],
            "dropout": [0.2, 0.5],
            "learning_rate": [1e-3, 3e-4],
            "weight_decay": [0.0, 0.01],
            "loss": ["softmax", "sampled-softmax"],
        },
        reads_titles=True,
        settings=tuple(f"finetune.{name}" for name in FINETUNE),
    ),
    options=LiteOptions,
    needs=[Need.TRAINABLE_MODEL],
)
