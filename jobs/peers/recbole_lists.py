r"""Recommendations of RecBole's models, for `file:PATH` in evaluate.recommenders.

RecBole runs in a separate virtual environment, because it pins other versions. Its package asks for an old Ray,
which only its search for settings uses, so its dependencies are named here:

    python -m venv /tmp/recbole
    /tmp/recbole/bin/pip install torch==2.13.0 'numpy<2' 'scipy<1.13' 'pandas<2.3' colorlog colorama==0.4.4 pyyaml \
        tqdm tabulate texttable tensorboard psutil thop plotly scikit-learn pyarrow==20.0.0
    /tmp/recbole/bin/pip install --no-deps recbole==1.2.1
    python jobs/export_samples.py workspace=WORKSPACE
    /tmp/recbole/bin/python jobs/peers/recbole_lists.py WORKSPACE/export SASRec recbole-sasrec.parquet
    python jobs/evaluate.py workspace=WORKSPACE 'evaluate.recommenders=[sasrec,file:recbole-sasrec.parquet]'

RecBole trains on every sample by itself, with cross-entropy over the catalogue, until the validation NDCG@20 has not
risen for PATIENCE epochs. Any of its models of sequences can be named.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

EPOCHS, PATIENCE = 100, 5
K = 100
SETTINGS = {
    "benchmark_filename": ["train", "valid", "test"],
    "alias_of_item_id": ["item_id_list"],
    "USER_ID_FIELD": "user_id",
    "ITEM_ID_FIELD": "item_id",
    "TIME_FIELD": "timestamp",
    "load_col": {"inter": ["user_id", "item_id_list", "item_id", "timestamp"]},
    "MAX_ITEM_LIST_LENGTH": 50,
    "loss_type": "CE",
    "train_neg_sample_args": None,
    "epochs": EPOCHS,
    "stopping_step": PATIENCE,
    "train_batch_size": 1024,
    "eval_batch_size": 1024,
    "learning_rate": 0.001,
    "topk": [20],
    "metrics": ["NDCG", "Recall"],
    "valid_metric": "NDCG@20",
    "show_progress": False,
    "reproducibility": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "SASRec": {
        "n_layers": 2,
        "n_heads": 1,
        "hidden_size": 64,
        "inner_size": 64,
        "hidden_dropout_prob": 0.5,
        "attn_dropout_prob": 0.5,
    },
    "GRU4Rec": {"embedding_size": 64, "hidden_size": 64, "num_layers": 1, "dropout_prob": 0.3},
}
"""Settings that make a model the same size as ours; other models run with RecBole's own."""


def main() -> None:
    """Train, choose the epoch by validation, and write the lists of the test samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="folder that jobs/export_samples.py left")
    parser.add_argument("model", help="SASRec, GRU4Rec or another of RecBole's models of sequences")
    parser.add_argument("output", type=Path, help="the file to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        settings = SETTINGS | MODELS.get(arguments.model, {})
        settings |= {"data_path": str(arguments.export), "checkpoint_dir": folder, "seed": arguments.seed}
        config = Config(model=arguments.model, dataset="recbole", config_dict=settings)
        init_seed(config["seed"], config["reproducibility"])
        dataset = create_dataset(config)
        train, valid, test = data_preparation(config, dataset)
        model = get_model(config["model"])(config, train.dataset).to(config["device"])
        trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
        best, _ = trainer.fit(train, valid, saved=True, show_progress=False)
        checkpoint = torch.load(trainer.saved_model_file, weights_only=False)
    model.load_state_dict(checkpoint["state_dict"])
    lists = _lists(model, test, dataset, pd.read_parquet(arguments.export / "samples.parquet"))
    lists.to_parquet(arguments.output)
    print(json.dumps({"valid_ndcg20": float(best), "seconds": round(time.monotonic() - started, 1)}))


def _lists(model: Any, test: Any, dataset: Any, samples: pd.DataFrame) -> pd.DataFrame:
    """Return the best items of each test sample, without those of its history."""
    samples = samples[samples["split"] == "test"].reset_index(drop=True)
    scores, users = [], []
    model.eval()
    with torch.no_grad():
        for interaction, *_ in test:
            scores.append(model.full_sort_predict(interaction.to(model.device)).reshape(len(interaction), -1).cpu())
            users.append(dataset.id2token("user_id", interaction["user_id"].numpy()))
    if not np.array_equal(np.concatenate(users), samples["user_id"]):
        raise ValueError("RecBole changed the order of the test samples")
    scores_NI = torch.cat(scores).numpy()
    scores_NI[:, 0] = -np.inf  # RecBole's padding
    numbers = dataset.field2token_id["item_id"]
    for row, history in enumerate(samples["history"]):
        scores_NI[row, [numbers[item] for item in history if item in numbers]] = -np.inf
    best_NK = np.argsort(-scores_NI, axis=1)[:, :K]
    return pd.DataFrame(
        {
            "user_id": samples["user_id"].repeat(K).to_numpy(),
            "position": samples["position"].repeat(K).to_numpy(),
            "item_id": dataset.id2token("item_id", best_NK).reshape(-1),
            "rank": np.tile(np.arange(1, K + 1), len(samples)),
        }
    )


if __name__ == "__main__":
    main()
