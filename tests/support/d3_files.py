"""A small dataset in the files of D3 (arXiv 2406.14900)."""

import csv
from pathlib import Path
from typing import Any

from l2d_ray.config import Config, DataConfig

NUMBERS = {"B1": 1, "B2": 0, "B3": 2, "B4": 3}


def sample(user: str, history: list[tuple[str, int]], asin: str, time: int) -> dict[str, Any]:
    asins = [asin for asin, _ in history]
    return {
        "user_id": user,
        "item_asins": asins,
        "item_asin": asin,
        "history_item_id": [NUMBERS[asin] for asin in asins],
        "item_id": NUMBERS[asin],
        "history_item_title": [f"Title, of {asin}'s" for asin in asins],
        "item_title": f"Title, of {asin}'s",
        "history_rating": [5.0] * len(asins),
        "rating": 5.0,
        "history_timestamp": [time for _, time in history],
        "timestamp": time,
    }


PUBLISHED = {
    "train": [
        sample("u", [("B1", 10)], "B2", 20),
        sample("v", [("B3", 12), ("B2", 14)], "B1", 25),
        sample("u", [("B1", 10), ("B2", 20)], "B4", 30),
    ],
    "valid": [sample("u", [("B2", 20), ("B4", 30)], "B1", 40)],
    "test": [sample("u", [("B4", 30), ("B1", 40)], "B4", 40), sample("w", [("B1", 41)], "B1", 50)],
}


def publish(folder: Path, splits: dict[str, list[dict[str, Any]]], flat: bool = False) -> Config:
    for split, rows in splits.items():
        path = folder / f"{split}.csv" if flat else folder / split / "CDs_2015.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(PUBLISHED["train"][0]))
            writer.writeheader()
            writer.writerows(rows)
    return Config(data=DataConfig(source="d3", interactions=str(folder)))
