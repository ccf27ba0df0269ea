"""The Python interface on a real workspace."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support.small_endpoint import LocalEngine, train_recommender

import l2d_ray
from l2d_ray.core.query import Query
from l2d_ray.errors import InputError
from l2d_ray.schema import hidden_states

HISTORY = ["i3", "i7", "i11"]
HISTORIES = {"ann": HISTORY, "ben": ["i1"], "cas": ["i3", "i7", {"title": "A film of tomorrow"}]}


@pytest.fixture(scope="module")
def workspace(engine: LocalEngine) -> str:
    return engine.config.workspace


@pytest.fixture(scope="module")
def recommender(workspace: str) -> l2d_ray.WorkspaceRecommender:
    return l2d_ray.load(workspace)


def expected(engine: LocalEngine, history: list[int | str], **options: Any) -> tuple[list[str], list[float]]:
    """Return the endpoint's answer."""
    answer = engine.answer(Query.after(history, **options))
    return [f"i{item}" for item in answer.items_I], answer.scores_I.tolist()


def test_importing_is_quick_and_imports_nothing_else() -> None:
    program = (
        "import sys, time; before = time.perf_counter(); import l2d_ray; seconds = time.perf_counter() - before\n"
        "print(seconds < 0.3, [name for name in sys.modules if name.startswith('l2d_ray.')], dir(l2d_ray)[-2:])\n"
        "l2d_ray.load; print('ray' in sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert process.stdout == "True [] ['load', 'read_memory']\nFalse\n"


@pytest.mark.parametrize("aggregation", ["global", "local", "posterior"])
def test_one_history_is_answered_as_by_the_endpoint(
    recommender: l2d_ray.WorkspaceRecommender, engine: LocalEngine, aggregation: str
) -> None:
    found = recommender.recommend(HISTORY, k=5, aggregation=aggregation, top_m=20)
    items, scores = expected(engine, [3, 7, 11], k=5, aggregation=aggregation, top_m=20)
    assert [one.item_id for one in found] == items
    np.testing.assert_allclose([one.score for one in found], scores, rtol=1e-5)
    assert {type(one) for one in found} == {l2d_ray.Recommendation}
    assert found[0].title == f"Title {items[0][1:]} of the year"


def test_many_histories_are_answered_as_each_alone(recommender: l2d_ray.WorkspaceRecommender) -> None:
    frame = recommender.recommend_many(HISTORIES, k=4, aggregation="local", top_m=20)
    assert list(frame) == ["user", "rank", "item_id", "title", "score"]
    assert frame["user"].tolist() == ["ann"] * 4 + ["ben"] * 4 + ["cas"] * 4
    assert frame["rank"].tolist() == [1, 2, 3, 4] * 3
    for user, history in HISTORIES.items():
        alone = recommender.recommend(history, k=4, aggregation="local", top_m=20)
        of_user = frame[frame["user"] == user]
        assert of_user["item_id"].tolist() == [one.item_id for one in alone]
        np.testing.assert_allclose(of_user["score"], [one.score for one in alone], rtol=1e-3)


def test_histories_come_as_a_sequence_a_series_or_nothing_at_all(recommender: l2d_ray.WorkspaceRecommender) -> None:
    mapped = recommender.recommend_many(HISTORIES, k=2)
    listed = recommender.recommend_many(iter(HISTORIES.values()), k=2)
    assert listed["user"].tolist() == [0, 0, 1, 1, 2, 2]
    assert listed["item_id"].tolist() == mapped["item_id"].tolist()
    frame = pd.DataFrame({"history": HISTORIES.values()}, index=list(HISTORIES))
    pd.testing.assert_frame_equal(recommender.recommend_many(frame["history"], k=2), mapped)
    arrays = [np.array(HISTORY)]
    assert recommender.recommend_many(arrays, k=2)["item_id"].tolist() == mapped["item_id"].tolist()[:2]
    empty = recommender.recommend_many([])
    assert (len(empty), list(empty)) == (0, list(mapped))
    assert (empty["rank"].dtype, empty["score"].dtype) == (np.int64, np.float64)


def test_more_histories_than_a_batch_keep_their_users(
    recommender: l2d_ray.WorkspaceRecommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recommender.recommend_many(HISTORIES, k=2)
    monkeypatch.setattr("l2d_ray.api.BATCH", 2)
    pd.testing.assert_frame_equal(recommender.recommend_many(HISTORIES, k=2), whole)


def test_filters_are_those_of_the_endpoint(recommender: l2d_ray.WorkspaceRecommender, engine: LocalEngine) -> None:
    everything = recommender.recommend(HISTORY, k=1000, exclude_seen=False)
    assert len(everything) == 30
    assert [one.item_id for one in everything] == expected(engine, [3, 7, 11], k=1000, exclude_seen=False)[0]
    new = {one.item_id for one in recommender.recommend(HISTORY, k=1000, deny=["i5", "unknown"])}
    assert new == {f"i{n}" for n in range(30)} - {*HISTORY, "i5"}
    assert {one.item_id for one in recommender.recommend(HISTORY, allow=["i3", "i5", "i6", "unknown"])} == {"i5", "i6"}
    assert recommender.recommend(HISTORY, allow=[]) == []


def test_the_catalogue_can_be_listed(recommender: l2d_ray.WorkspaceRecommender) -> None:
    assert recommender.items.iloc[5].tolist() == ["i5", "Title 5 of the year"]


def test_settings_choose_what_is_loaded(workspace: str) -> None:
    plain = l2d_ray.load(Path(workspace), {"index.prior": 0.0, "recommend.exclude_seen": False})
    assert plain.config.index.prior == 0
    assert len(plain.recommend(HISTORY, k=1000)) == 30


def test_another_recommender_than_l2d_is_loaded_by_name(workspace: str, engine: LocalEngine) -> None:
    train_recommender(engine.config)
    engine.offer("sasrec", "title-knn")
    for name, recommender in engine.others.items():
        found = l2d_ray.load(workspace, recommender=name).recommend_many(HISTORIES, k=5)
        queries = [Query.after(history, 5) for history in ([3, 7, 11], [1], [3, 7, "A film of tomorrow"])]
        expected = [f"i{item}" for one in recommender.recommend(queries) for item in one.items_I]
        assert found["item_id"].tolist() == expected
    with pytest.raises(InputError, match=r"^recommender=.sasrek.: unknown recommender; did you mean sasrec\?"):
        l2d_ray.load(workspace, recommender="sasrek")
    with pytest.raises(InputError, match=r"recommenders/gru4rec/training\.json: not found; run jobs/train\.py"):
        l2d_ray.load(workspace, recommender="gru4rec")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"index.spaces": "none"}, "settings: unknown key index.spaces; did you mean index.space?"),
        ({"index.space": "round"}, "settings: index.space='round' is not accepted; give 'none', 'centre', "),
        ({"history.stride": 3}, "history.stride=3: {}/memory/settings.json records 10; leave history.stride out, or "),
        ({"index.snapshot": 7}, "{}/memory/snapshots/7.json: not found; run jobs/build_memory.py first"),
        ({"index.space": "none"}, "{}/index/1-"),
    ],
)
def test_what_cannot_be_loaded_is_refused(workspace: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        l2d_ray.load(workspace, settings)
    assert str(caught.value).startswith(message.format(workspace))
    assert "\n" not in str(caught.value)


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(l2d_ray.InputError) as caught:
        l2d_ray.load(tmp_path)
    assert str(caught.value) == f"{tmp_path}/memory/snapshots: no snapshot; run jobs/build_memory.py first"


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([], "history: empty; give at least one item"),
        ("i3", "history='i3': not a list of items; give item ids, such as ['50', '181']"),
        (float("nan"), "history=nan: not a list of items; give item ids, such as ['50', '181']"),
        ({"i3"}, "history={'i3'}: not a list of items; give item ids, such as ['50', '181']"),
        ([np.int64(3)], "history[0]=3: item ids are strings; give '3'"),
        (["i3", float("nan")], "history[1]=nan: no item; give an item id (a string) or {'title': …}"),
        ([{"title": ""}], "history[0]={'title': ''}: no item; give an item id (a string) or {'title': …}"),
        (
            ["i3", "nope", "9", "nope"],
            "history: unknown items: nope, 9; give ids of this workspace's items, or {'title': …} for an item that it"
            " does not know",
        ),
    ],
)
def test_a_history_that_is_none_is_refused(
    recommender: l2d_ray.WorkspaceRecommender, history: Any, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        recommender.recommend(history)
    assert str(caught.value) == message
    with pytest.raises(InputError) as caught:
        recommender.recommend_many({"ann": ["i3"], "ben": history})
    assert str(caught.value) == message.replace("history", "histories['ben']", 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0: not a positive whole number; give 1 or more"),
        ({"k": 2.5}, "k=2.5: not a positive whole number; give 1 or more"),
        ({"k": True}, "k=True: not a positive whole number; give 1 or more"),
        ({"top_m": -1}, "top_m=-1: not a positive whole number; give 1 or more"),
        ({"aggregation": "mean"}, "aggregation='mean': unknown; use global or local or posterior"),
        ({"deny": "i3"}, "deny='i3': a string, not a list of item ids; give ['i3']"),
    ],
)
def test_an_option_out_of_range_is_refused(
    recommender: l2d_ray.WorkspaceRecommender, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        recommender.recommend(HISTORY, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize("histories", ["i3", 3, pd.DataFrame({"a": [["i3"]]})])
def test_what_holds_no_histories_is_refused(recommender: l2d_ray.WorkspaceRecommender, histories: Any) -> None:
    with pytest.raises(InputError, match=r"^histories: a \w+, not a list of histories; give a list of lists of item"):
        recommender.recommend_many(histories)


def test_numpy_numbers_are_numbers(recommender: l2d_ray.WorkspaceRecommender) -> None:
    assert len(recommender.recommend(HISTORY, k=np.int64(3))) == 3


def test_the_memory_is_read_as_a_dataset(workspace: str, tmp_path: Path) -> None:
    rows = l2d_ray.read_memory(workspace)
    assert rows.schema.names == ["sample_id", "user_hash", "item_index", "timestamp", "hidden_state"]
    assert rows.count_rows() == 40 * 9
    batch = next(rows.to_batches())
    assert np.isfinite(hidden_states(batch)).all()
    assert l2d_ray.read_memory(workspace, snapshot=1).count_rows() == 40 * 9
    with pytest.raises(InputError, match=r"snapshots/2.json: not found; run jobs/build_memory.py first$"):
        l2d_ray.read_memory(workspace, snapshot=2)
    with pytest.raises(InputError, match=r"no snapshot; run jobs/build_memory.py first$"):
        l2d_ray.read_memory(tmp_path)
