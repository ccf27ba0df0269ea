from pathlib import Path

import numpy as np
import pytest
from support.small_endpoint import write_endpoint
from support.small_workspace import write_dataset
from support.tiny_models import tiny_config, tiny_model, tiny_tokenizer

from l2d_ray.bench.search import bench_search
from l2d_ray.config import Config
from l2d_ray.core.metrics import NOT_RANKED
from l2d_ray.errors import InputError
from l2d_ray.schema import Split
from l2d_ray.stages.evaluation import (
    Choice,
    Contender,
    Stand,
    contender,
    groups_of,
    samples_of,
    spaces_of,
    summarise,
    training_pairs,
)
from l2d_ray.stages.index_plan import plan_index
from l2d_ray.stages.reports import plot, png, table


def test_training_pairs_are_those_of_training_samples_only(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, users=7)
    lasts, targets = training_pairs(dataset)
    expected = [
        (user["item_indices"][position - 1], user["item_indices"][position])
        for users in dataset.iter_users()
        for user in users.to_pylist()
        for position, split in enumerate(user["splits"])
        if split == Split.TRAIN
    ]
    assert list(zip(lasts.tolist(), targets.tolist(), strict=True)) == expected


def test_l2d_needs_no_head(tmp_path: Path) -> None:
    model = tiny_model(tiny_config("llama", tie_word_embeddings=False))
    model.model.save_pretrained(tmp_path / "headless")
    tiny_tokenizer().save_pretrained(tmp_path / "headless")
    config = write_endpoint(tmp_path, **{"model.name": tmp_path / "headless"})
    l2d = Contender("l2d-global", "l2d-global", index=plan_index(config).manifest)
    histories, targets = [np.array([3, 4], np.int32)], np.array([5], np.int32)
    (outcome,) = Stand(config, writes=False).run([l2d], histories, targets)
    assert 0 <= outcome.ranks_U[0] < 28
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        Stand(config, writes=True).run([l2d], histories, targets)


def test_samples_are_chosen_by_id_so_that_fewer_are_a_part_of_more(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, users=300)
    few, more = samples_of(dataset, Split.TEST, 40), samples_of(dataset, Split.TEST, 200)
    assert (len(few), len(more)) == (40, 200)
    assert more[:40] == few
    assert len(samples_of(dataset, Split.TEST, 10_000)) == 300
    users = {user["user_hash"]: user for users in dataset.iter_users() for user in users.to_pylist()}
    for sample in more:
        items = users[sample["user_hash"]]["item_indices"]
        assert (sample["history"], sample["target"]) == (items[:-1], items[-1])


def test_targets_are_parted_by_their_training_samples() -> None:
    training = np.repeat([0, 1, 2], [1, 5, 50])
    assert groups_of(np.array([0, 1, 2, 3]), training).tolist() == ["sparse", "sparse", "dense", "cold"]
    assert groups_of(np.array([4]), training[:0]).tolist() == ["cold"]


def test_a_name_says_which_recommender_in_which_space() -> None:
    config = Config()
    names = ["l2d-global", "l2d-local-none", "l2d-global-whiten-total+prior", "most-popular"]
    assert spaces_of(["most-popular", "constrained-beam-7"], config) == []
    spaces = spaces_of(names, config)
    assert spaces == ["whiten-within", "none", "whiten-total"]
    choices = {space: Choice(f"index/{space}", top_m=len(space), prior=0.5) for space in spaces}
    made = [contender(name, config, choices) for name in names]
    assert [one.kind for one in made] == ["l2d-global", "l2d-local", "l2d-global", "most-popular"]
    assert [one.index for one in made] == ["index/whiten-within", "index/none", "index/whiten-total", ""]
    assert [one.prior for one in made] == [2, 0, 0.5, 0]  # as it is served; the paper's; the best; none
    assert made[1].top_m == 4
    assert contender("constrained-beam-7", config, choices).beams == 7


def test_the_table_and_the_plots_show_every_recommender() -> None:
    ranks, users = np.array([0, 30, NOT_RANKED, 99]), np.arange(4)
    groups = np.array(["dense", "sparse", "cold", "dense"])
    rows = [summarise(name, ranks, users, groups, 0.25, 12.0) for name in ("first", "second")]
    assert (rows[0]["recall@20"], rows[0]["recall@50"], rows[0]["recall@100"]) == (0.25, 0.5, 0.75)
    cold, dense = (rows[0]["groups"][group] for group in ("cold", "dense"))
    assert (cold["users"], cold["recall@100"], cold["ndcg@100"]) == (1, 0, 0)
    assert (dense["recall@20"], dense["ndcg@20"], dense["intervals"]["recall@20"]) == (0.5, 0.5, [0, 1])
    assert summarise("none", ranks, users, np.repeat("dense", 4), 0.25, 12.0)["groups"]["cold"]["users"] == 0
    lines = table(rows).splitlines()
    assert lines[1].startswith("first ")
    assert " 25.00 " in lines[1]
    assert len({len(line) for line in lines}) == 1
    tried = [{"recommender": "l2d-local", "top_m": top_m, "recall@20": top_m / 100} for top_m in (0, 10, 20)]
    shares = [{"recommender": "first", "fraction": share, "recall@20": share / 2} for share in (0.1, 1.0)]
    figure = plot({"results": rows, "validation": {"results": tried}, "fractions": shares})
    cost, neighbours, share = figure.axes
    assert [text.get_text() for text in cost.get_legend().get_texts()] == ["first (4 users)", "second (4 users)"]
    assert [bars[0].get_xydata().tolist() for bars in cost.containers] == [[[0.25, 0.25]], [[0.25, 0.25]]]
    assert neighbours.lines[0].get_xydata().tolist() == [[10, 0.1], [20, 0.2]]  # L2D-G has no M
    assert share.lines[0].get_xydata().tolist() == [[0.1, 0.05], [1, 0.5]]
    assert png(figure).startswith(b"\x89PNG")
    plot({"results": rows, "validation": {"results": []}, "fractions": []})


def test_the_search_benchmark_measures_every_index() -> None:
    bench = {"rows": [1000, 2000], "dimension": 16, "factories": ["Flat", "IVF,SQfp16"]}
    result = bench_search(Config.model_validate({"bench": bench}))
    measured = [(row["rows"], row["factory"], row["shards"]) for row in result.results]
    assert measured == [(r, f, s) for r in (1000, 2000) for f in ("Flat", "IVF,SQfp16") for s in (1, 4)]
    for row in result.results:
        assert row["recall_top_k"] >= 0.995
        assert row["local_ms"] > 0
    assert result.results[0]["bytes_per_row"] == pytest.approx(4 * 16 + 2 * 16 + 12, rel=0.02)
    assert [row["rows"] for row in result.extrapolated] == [10**9] * 2
    (flat, lists), (own_flat, _, own_lists, _) = result.extrapolated, result.results[4:]
    assert flat["local_ms"] == pytest.approx(own_flat["local_ms"] * 1e9 / 2000, rel=0.01)
    assert lists["local_ms"] == pytest.approx(own_lists["local_ms"] * (1e9 / 2000) ** 0.5, rel=0.01)
