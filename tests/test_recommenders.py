"""One contract for every recommender, in a small world with a tiny model; then what each promises of its own."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.small_memory import build
from support.small_workspace import ITEM_COUNT, config_of, write_dataset

from l2d_ray.config import Config
from l2d_ray.core.packing import Prompts
from l2d_ray.encoding import HistoryEncoder, identify_memory
from l2d_ray.errors import InputError
from l2d_ray.index.sharding import ShardedIndex
from l2d_ray.memory.store import MemoryStore
from l2d_ray.models.backbone import LanguageModel, load_language_model
from l2d_ray.recommenders.co_occurrence import CoOccurrence
from l2d_ray.recommenders.constrained_beam import ConstrainedBeam, TitleTrie
from l2d_ray.recommenders.contract import NO_ITEM, Filters, Recommender
from l2d_ray.recommenders.grounded_beam import GroundedBeam
from l2d_ray.recommenders.l2d import L2DRecommender
from l2d_ray.recommenders.most_popular import MostPopular
from l2d_ray.records import check_query
from l2d_ray.schema import Split
from l2d_ray.stages.evaluation import training_pairs
from l2d_ray.stages.extraction import UnitExtractor, plan_units
from l2d_ray.workspace import Workspace

NAMES = ["most-popular", "co-occurrence", "l2d-global", "l2d-local", "constrained-beam", "grounded-beam"]


class World:
    """A dataset of 40 users, a memory and an index of it, and everything that recommends from them."""

    def __init__(self, folder: Path) -> None:
        self.dataset = write_dataset(folder, users=40)
        self.config: Config = config_of(folder, **{"memory.units": 2})
        self.workspace = Workspace.open(str(folder))
        extractor = UnitExtractor(self.config, identify_memory(self.config))
        units = plan_units(self.config, self.dataset)
        for unit in units:
            extractor.build(unit)
        MemoryStore(self.workspace).take_snapshot([unit.name for unit in units], self.dataset.digest, 1.0)
        self.language_model: LanguageModel = load_language_model(self.config.model)
        titles = self.dataset.items()["title"].to_pylist()
        self.encoder = HistoryEncoder(self.config, titles, self.language_model.backbone)
        made, self.manifest = build(self.workspace)
        self.index = ShardedIndex.open(self.workspace, made.manifest)
        lasts, targets = training_pairs(self.dataset)
        everything = self.language_model, self.encoder, ITEM_COUNT
        self.recommenders: dict[str, Recommender] = {
            "most-popular": MostPopular.fit(targets),
            "co-occurrence": CoOccurrence.fit(lasts, targets),
            "l2d-global": L2DRecommender(self.encode, self.index, "global"),
            "l2d-local": L2DRecommender(self.encode, self.index, "local", top_m=30),
            "constrained-beam": ConstrainedBeam.over(*everything, beams=ITEM_COUNT, batch_size=2),
            "grounded-beam": GroundedBeam.over(*everything, batch_size=2),
        }

    def encode(self, histories: list[NDArray[np.int32]]) -> NDArray[np.float32]:
        return self.encoder.encode(histories).states_UD

    def training_samples(self, count: int) -> list[tuple[NDArray[np.int32], int]]:
        samples = []
        for user in self.dataset.iter_users().__next__().to_pylist()[:count]:
            position = user["splits"].index(Split.TRAIN) + 5
            samples.append((np.array(user["item_indices"][:position], np.int32), user["item_indices"][position]))
        return samples


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


HISTORIES = [np.array(history, np.int32) for history in ([3], [4, 4, 4], [*range(12), 5], [3], [29, 0])]


@pytest.mark.parametrize("name", NAMES)
class TestContract:
    def test_lists_are_k_long_sorted_and_without_repetition(self, world: World, name: str) -> None:
        for k in (1, 7, ITEM_COUNT + 5):
            items, scores = world.recommenders[name].recommend(HISTORIES, k)
            assert items.shape == scores.shape == (len(HISTORIES), k)
            assert np.issubdtype(items.dtype, np.integer)
            assert not np.isnan(scores).any()
            for own_items, own_scores in zip(items, scores, strict=True):
                found = own_items[own_items != NO_ITEM]
                assert np.unique(found).size == found.size > 0
                assert ((found >= 0) & (found < ITEM_COUNT)).all()
                assert (own_items[found.size :] == NO_ITEM).all()
                assert (own_scores[found.size :] == -np.inf).all()
                assert (own_scores[:-1] >= own_scores[1:]).all()

    def test_what_was_seen_does_not_come_back_unless_asked_for(self, world: World, name: str) -> None:
        items, _ = world.recommenders[name].recommend(HISTORIES, ITEM_COUNT)
        for own, history in zip(items, HISTORIES, strict=True):
            assert not set(own.tolist()) & set(history.tolist())
        items, _ = world.recommenders[name].recommend(HISTORIES, ITEM_COUNT, Filters(exclude_seen=False))
        if name != "grounded-beam":
            assert any(set(own.tolist()) & set(history.tolist()) for own, history in zip(items, HISTORIES, strict=True))

    def test_deny_and_allow_take_items_out_of_the_list_and_nothing_else(self, world: World, name: str) -> None:
        recommender = world.recommenders[name]
        whole = recommender.recommend(HISTORIES, ITEM_COUNT)
        deny, allow = whole[0][:, 0], np.unique(whole[0][:, 1:4])
        for filters, passes in (
            (Filters(deny=deny), lambda item: item not in deny),
            (Filters(allow=allow), lambda item: item in allow),
        ):
            items, scores = recommender.recommend(HISTORIES, ITEM_COUNT, filters)
            for row in range(len(HISTORIES)):
                kept = [n for n, item in enumerate(whole[0][row].tolist()) if item != NO_ITEM and passes(item)]
                assert items[row][: len(kept)].tolist() == whole[0][row][kept].tolist()
                np.testing.assert_allclose(scores[row][: len(kept)], whole[1][row][kept], rtol=1e-4)

    def test_a_list_does_not_depend_on_its_neighbours_in_the_batch(self, world: World, name: str) -> None:
        items, scores = world.recommenders[name].recommend(HISTORIES, 5)
        for row, history in enumerate(HISTORIES):
            alone_items, alone_scores = world.recommenders[name].recommend([history], 5)
            assert alone_items[0].tolist() == items[row].tolist()
            np.testing.assert_allclose(alone_scores[0], scores[row], rtol=2e-3)

    def test_no_histories_give_no_lists(self, world: World, name: str) -> None:
        items, scores = world.recommenders[name].recommend([], 5)
        assert items.shape == scores.shape == (0, 5)


def test_a_training_history_finds_its_own_next_item(world: World) -> None:
    """A known answer that needs no trained model: the nearest row of a remembered history is its own."""
    samples = world.training_samples(20)
    nearest = L2DRecommender(world.encode, world.index, "local", top_m=1)
    histories = [history for history, _ in samples]
    items, _ = nearest.recommend(histories, 1, Filters(exclude_seen=False))
    assert items[:, 0].tolist() == [target for _, target in samples]


def test_popularity_and_succession_are_counted() -> None:
    lasts, targets = np.array([1, 1, 1, 2, 2]), np.array([5, 5, 6, 7, 5])
    histories = [np.array([2], np.int32), np.array([9], np.int32)]
    items, scores = MostPopular.fit(targets).recommend(histories, 4)
    assert items.tolist() == [[5, 6, 7, NO_ITEM]] * 2
    assert scores[0].tolist() == [3, 1, 1, -np.inf]
    items, scores = CoOccurrence.fit(lasts, targets).recommend(histories, 4)
    assert items.tolist() == [[5, 7, 6, NO_ITEM], [5, 6, 7, NO_ITEM]]
    np.testing.assert_allclose(scores, [[0.5, 0.5, 0.2, -np.inf], [0.6, 0.2, 0.2, -np.inf]])


def log_probability(world: World, prompt: NDArray[np.int32], title: NDArray[np.int32]) -> float:
    """Of a title after a prompt, by one plain forward pass."""
    model = world.language_model.model
    model.set_attn_implementation("sdpa")
    tokens = torch.from_numpy(np.concatenate([prompt, title]).astype(np.int64))[None]
    with torch.inference_mode():
        steps = torch.log_softmax(model(tokens).logits[0, prompt.size - 1 : -1].double(), dim=-1)
    return float(steps[torch.arange(title.size), torch.from_numpy(title.astype(np.int64))].sum())


def test_beams_as_many_as_items_rank_the_catalogue_by_the_probability_of_titles(world: World) -> None:
    recommender = world.recommenders["constrained-beam"]
    items, scores = recommender.recommend(HISTORIES, ITEM_COUNT, Filters(exclude_seen=False))
    for row, history in enumerate(HISTORIES):
        prompt = world.encoder.phrase(history)
        expected = [log_probability(world, prompt, world.encoder.prompts.item_tokens(i)) for i in range(ITEM_COUNT)]
        assert sorted(items[row].tolist()) == list(range(ITEM_COUNT))
        np.testing.assert_allclose(scores[row], np.array(expected)[items[row]], rtol=1e-4)
        assert items[row].tolist() == np.argsort(-np.array(expected), kind="stable").tolist()


def test_few_beams_find_the_most_probable_title_or_nearly(world: World) -> None:
    few = ConstrainedBeam.over(world.language_model, world.encoder, ITEM_COUNT, beams=3, batch_size=8)
    items, scores = few.recommend(HISTORIES, 5)
    assert (items[:, :3] != NO_ITEM).all()
    assert (items[:, 3:] == NO_ITEM).all()
    all_items, all_scores = world.recommenders["constrained-beam"].recommend(HISTORIES, ITEM_COUNT)
    for row in range(len(HISTORIES)):
        known = dict(zip(all_items[row].tolist(), all_scores[row].tolist(), strict=True))
        np.testing.assert_allclose(scores[row, :3], [known[item] for item in items[row, :3].tolist()], rtol=1e-4)


def test_a_history_without_a_finite_state_gets_an_empty_list_and_spoils_no_other(world: World) -> None:
    good = world.encode(HISTORIES[:1])[0]
    states = np.stack([good, np.full_like(good, np.nan), good * np.inf])
    for name in ("l2d-global", "l2d-local"):
        recommender = world.recommenders[name]
        assert isinstance(recommender, L2DRecommender)
        for filters in (Filters(), Filters(allow=np.arange(9))):
            items, scores = recommender.decode(states, HISTORIES[:3], 5, filters)
            assert (items[1:] == NO_ITEM).all()
            assert items[0].tolist() == recommender.decode(states[:1], HISTORIES[:1], 5, filters)[0][0].tolist()
            assert not np.isnan(scores).any()


def test_filters_may_name_items_that_do_not_exist(world: World) -> None:
    for recommender in world.recommenders.values():
        items, _ = recommender.recommend(HISTORIES, 5, Filters(deny=np.array([-1, 10**6])))
        assert items.tolist() == recommender.recommend(HISTORIES, 5)[0].tolist()


def test_a_models_own_generation_settings_do_not_change_a_score(world: World) -> None:
    model = world.language_model.model
    expected = world.recommenders["constrained-beam"].recommend(HISTORIES, 5)
    model.generation_config.repetition_penalty = 1.5
    items, scores = world.recommenders["constrained-beam"].recommend(HISTORIES, 5)
    assert items.tolist() == expected[0].tolist()
    np.testing.assert_allclose(scores, expected[1])


def test_titles_that_are_the_same_share_a_beam() -> None:
    trie = TitleTrie.of([np.array(title, np.int32) for title in ([1, 2], [1, 2], [1, 3, 4], [1, 2, 9])])
    node = trie.node([1, 2])
    assert node is not None
    assert trie.items[node] == [0, 1]
    assert (trie.below[0], trie.below[node]) == (4, 3)
    assert trie.node([1, 9]) is None


def test_grounding_ranks_by_the_distance_to_what_was_written(world: World) -> None:
    grounded = world.recommenders["grounded-beam"]
    assert isinstance(grounded, GroundedBeam)
    model, history = world.language_model.model, HISTORIES[2]
    prompt = torch.from_numpy(world.encoder.phrase(history).astype(np.int64))[None]
    model.set_attn_implementation("sdpa")
    search = grounded.search
    written = model.generate(  # as anyone would call it, without the shared prompt's cache
        prompt,
        attention_mask=torch.ones_like(prompt),
        num_beams=4,
        max_new_tokens=search.max_tokens,
        length_penalty=0.0,
        eos_token_id=search.end_tokens,
        pad_token_id=1,
        do_sample=False,
    )[0, prompt.shape[1] :].numpy()
    ends = np.flatnonzero(np.isin(written, search.end_tokens))
    ((tokens, _), *_) = search.continuations([world.encoder.phrase(history)])[0]
    assert tokens.tolist() == written[: ends[0] if ends.size else None].tolist()
    items, _ = grounded.recommend([history], 5, Filters(exclude_seen=False))
    state = world.encoder.extract(Prompts.join([np.append(tokens, world.encoder.prompts.item_end)])).states[0].numpy()
    distances = np.linalg.norm(grounded.title_states_ID - state, axis=1)
    assert items[0].tolist() == np.argsort(distances, kind="stable")[:5].tolist()


@pytest.mark.parametrize(
    ("change", "named"),
    [({"stride": 1}, r"stride \(10, now 1\)"), ({"adapter": "a" * 64}, r"adapter \(None, now aaaaaaaaaaaa\)")],
)
def test_an_index_of_another_model_is_refused(world: World, change: dict[str, object], named: str) -> None:
    ours = identify_memory(world.config)
    check_query(world.manifest.identity, ours.model_copy(update={"num_shards": 7}))
    with pytest.raises(InputError, match=rf"the memory was made with another {named}; give model\.\*"):
        check_query(world.manifest.identity, ours.model_copy(update=change))


def test_a_prompt_too_long_for_the_model_loses_its_oldest_items(world: World) -> None:

    short = HistoryEncoder(
        world.config, ["word " * 60] * 30, replace(world.language_model.backbone, context_length=150)
    )
    longer = HistoryEncoder(world.config, ["word " * 60] * 30, world.language_model.backbone)
    history = np.arange(9, dtype=np.int32)
    fitting = [n for n in range(1, 10) if longer.phrase(history[-n:]).size <= 150]
    assert 1 < fitting[-1] < 9
    assert short.phrase(history).tolist() == longer.phrase(history[-fitting[-1] :]).tolist()
