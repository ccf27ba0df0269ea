"""Recommendations of RecTools' models, for `file:PATH` in evaluate.recommenders.

RecTools runs in a separate virtual environment, because it pins other versions:

    python -m venv /tmp/rectools
    /tmp/rectools/bin/pip install torch==2.13.0 'rectools[torch]==0.19.0' pyarrow==20.0.0
    python jobs/export_samples.py workspace=WORKSPACE
    /tmp/rectools/bin/python jobs/peers/rectools_lists.py WORKSPACE/export sasrec rectools-sasrec.parquet
    python jobs/evaluate.py workspace=WORKSPACE 'evaluate.recommenders=[sasrec,file:rectools-sasrec.parquet]'

Models of sequences train until the validation NDCG@20 has not risen for PATIENCE rounds of EPOCHS epochs; the lists are
those of the best round. EASE is fitted once for each regularisation, and validation chooses. Needs one validation and
one test sample of each user at most, which the leave-one-out split has.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pytorch_lightning import seed_everything
from rectools import Columns
from rectools.dataset import Dataset, IdMap, Interactions
from rectools.models import EASEModel, SASRecModel
from rectools.models.nn.transformers.ligr import LiGRLayers

EPOCHS, PATIENCE, MOST = 5, 4, 200
K, LENGTH, DIMENSION = 100, 50, 64
REGULARISATIONS = (10.0, 50.0, 100.0, 200.0, 500.0, 1000.0)


def main() -> None:
    """Train, choose and write the lists of the test samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="folder that jobs/export_samples.py left")
    parser.add_argument("model", choices=["sasrec", "esasrec", "ease"])
    parser.add_argument("output", type=Path, help="the file to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    data = _Data(arguments.export)
    started, best = time.monotonic(), (-1.0, "", pd.DataFrame())
    worse = 0
    for name, model in _candidates(arguments.model, data, arguments.seed):
        ndcg = data.ndcg(model)
        print(f"{name}: validation NDCG@20 {ndcg:.4f}, {time.monotonic() - started:.0f} s", flush=True)
        worse = 0 if ndcg > best[0] else worse + 1
        if ndcg > best[0]:
            best = (ndcg, name, data.lists(model, "test"))
        if worse >= PATIENCE:
            break
    best[2].to_parquet(arguments.output)
    print(json.dumps({"chosen": best[1], "valid_ndcg20": best[0], "seconds": round(time.monotonic() - started, 1)}))


class _Data:
    """The exported interactions, with the same numbers for users and items in every part."""

    def __init__(self, folder: Path) -> None:
        interactions = pd.read_parquet(folder / "interactions.parquet")
        # Ties of the time stay in the order of the file: each next interaction of a user is a microsecond later.
        interactions["datetime"] += pd.to_timedelta(interactions.groupby("user_id").cumcount(), unit="us")
        self._interactions = interactions
        self._samples = pd.read_parquet(folder / "samples.parquet", columns=["user_id", "position", "split", "target"])
        self._users = IdMap.from_values(interactions["user_id"].unique())
        self._items = IdMap.from_values(pd.read_parquet(folder / "items.parquet")["item_id"])

    def known(self, *splits: str) -> Dataset:
        """Return the interactions of these splits, and each user's first one."""
        rows = self._interactions[self._interactions["split"].isin(["none", *splits])]
        rows = rows[[Columns.User, Columns.Item, Columns.Weight, Columns.Datetime]]
        return Dataset(self._users, self._items, Interactions.from_raw(rows, self._users, self._items))

    def lists(self, model: Any, split: str) -> pd.DataFrame:
        """Return the lists of the samples of a split, without items that the user has seen."""
        samples = self._samples[self._samples["split"] == split]
        known = self.known("train") if split == "valid" else self.known("train", "valid")
        found = model.recommend(samples["user_id"].to_numpy(), known, k=K, filter_viewed=True)
        return found.merge(samples, on="user_id")[["user_id", "position", "item_id", "rank", "target"]]

    def ndcg(self, model: Any) -> float:
        """Return NDCG@20 on the validation samples."""
        lists = self.lists(model, "valid")
        hits = lists[(lists["item_id"] == lists["target"]) & (lists["rank"] <= 20)]
        return float((1 / np.log2(hits["rank"] + 1)).sum() / (self._samples["split"] == "valid").sum())


def _candidates(name: str, data: _Data, seed: int) -> Iterator[tuple[str, Any]]:
    """Yield fitted models to choose among, with their names; of one model, its state after every round."""
    train = data.known("train")
    if name == "ease":
        for regularisation in REGULARISATIONS:
            yield f"regularisation {regularisation:g}", EASEModel(regularization=regularisation).fit(train)
        return
    model = _sequential(name, seed)
    for epochs in range(EPOCHS, MOST + 1, EPOCHS):
        model.fit_partial(train, min_epochs=EPOCHS, max_epochs=EPOCHS)
        yield f"epoch {epochs}", model


def _sequential(name: str, seed: int) -> Any:
    """Return an untrained model of the same size as ours."""
    seed_everything(seed)
    common = {
        "n_blocks": 2,
        "n_factors": DIMENSION,
        "session_max_len": LENGTH,
        "batch_size": 32,
        "lr": 0.001,
        "deterministic": True,
    }
    if name == "sasrec":
        return SASRecModel(n_heads=1, dropout_rate=0.5, loss="softmax", **common)
    return SASRecModel(
        n_heads=2,
        dropout_rate=0.2,
        loss="sampled_softmax",
        n_negatives=256,
        transformer_layers_type=LiGRLayers,
        **common,
    )


if __name__ == "__main__":
    main()
