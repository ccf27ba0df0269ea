"""BIGRec: one title by beam search, then the items whose titles are near to it and that are popular.

D(i) is the L2 distance between the states of the written title and of item i's title. N(i) is the number of training
interactions with item i.

    d(i) = (D(i) - min D) / (max D - min D)
    p(i) = (N(i) - min N) / (max N - min N)
    score(i) = (1 + p(i))^gamma / d(i)

With gamma 0 this is `grounded-beam`. The item with the nearest title is always the first.

Source: BIGRec (arXiv 2308.08434), the second grounding step and its injection of popularity. The authors' code has the
same formulas (github.com/SAI990323/BIGRec, data/movie/adjust_pda.py). Differences:

- The authors try every whole gamma from 0 to 99 and choose one for each metric and cutoff. Here gamma is one of
  `VALUES`, and Recall@20 on validation samples chooses.
- Prompt and training are those of the workspace, for all recommenders alike.
- The paper can inject the scores of a collaborative model in place of popularity. This is left out.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from l2d_ray.core.arrays import Float64, IntArray
from l2d_ray.recommenders.contract import Declaration, Need
from l2d_ray.recommenders.grounded_beam import GroundedBeam, grounded_title
from l2d_ray.recommenders.tuned import TunedOptions

if TYPE_CHECKING:
    from l2d_ray.recommenders.resources import Resources


@dataclass(frozen=True)
class BigRecOptions(TunedOptions):
    """Options of BIGRec."""

    NAME, TUNED, VALUES, DEFAULT = "bigrec", "gamma", (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0), 0.0

    gamma: float
    """Exponent of the popularity."""


def popularity_weights(counts_I: IntArray, gamma: float) -> Float64:
    """Return (1 + p)^gamma for each item, given the numbers of interactions."""
    above_least_I = counts_I - counts_I.min()
    weights_I: Float64 = (1 + above_least_I / max(above_least_I.max(), 1)) ** gamma
    return weights_I


def _make(options: BigRecOptions, resources: "Resources") -> GroundedBeam:
    counts_I = np.bincount(resources.training_interactions.items, minlength=len(resources.titles))
    return GroundedBeam(resources.once(grounded_title), popularity_weights(counts_I, options.gamma))


DECLARATION = Declaration(
    pattern=r"bigrec(-(?P<gamma>\d+(\.\d+)?))?",
    form="bigrec[-<gamma>]",
    examples=("bigrec", "bigrec-0.5"),
    options=BigRecOptions,
    make=_make,
    needs=frozenset({Need.ENCODER, Need.LANGUAGE_MODEL, Need.TRAINING_INTERACTIONS}),
    writes_text=True,
)
