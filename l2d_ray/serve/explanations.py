"""Explanations in words: those of the index, with titles in place of items and of samples."""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property

from l2d_ray.core.explanation import ItemExplanation
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.sequences import TrainingSequences
from l2d_ray.errors import InputError
from l2d_ray.serve.schemas import Explanation, PastItem
from l2d_ray.workspace import Workspace

logger = logging.getLogger(__name__)


class Explainer:
    """The titles of a catalogue and of the training sequences. The sequences are read at the first explanation."""

    def __init__(self, workspace: Workspace, dataset: str, ids: Sequence[str], titles: Sequence[str]) -> None:
        """Read nothing yet. `dataset` is the digest of the dataset from which the memory was built."""
        self._workspace, self._dataset, self._ids, self._titles = workspace, dataset, ids, titles

    def explain(self, items: Sequence[int], found: Mapping[int, ItemExplanation]) -> list[Explanation | None]:
        """Return the explanation of each item; None where the index gave none."""
        return [self._describe(found[item]) if item in found else None for item in items]

    def _describe(self, explanation: ItemExplanation) -> Explanation:
        after = [
            PastItem(item_id=self._ids[item], title=self._titles[item], share=round(share, 4))
            for item, share in explanation.after.items()
        ]
        sequences = [self._sequences.of(sample_id) for sample_id in explanation.sample_ids] if self._sequences else []
        return Explanation(
            terms={name: round(nats, 4) for name, nats in explanation.terms.items()},
            after=after,
            sequences=[[self._titles[item] for item in sequence] for sequence in sequences if sequence],
        )

    @cached_property
    def _sequences(self) -> TrainingSequences | None:
        """The training sequences; None if the workspace does not have that dataset any more."""
        try:
            return TrainingSequences.read(Dataset.open(self._workspace, self._dataset))
        except InputError as error:
            logger.warning("%s. Explanations name no training sequences", error)
            return None
