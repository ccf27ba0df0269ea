"""Every recommender passes the contract, in a small world with a tiny model. Then the tests that concern one each."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from support import recommender_contract, toy_aggregation
from support.recommender_contract import HISTORIES, RecommenderContract
from support.small_memory import build
from support.small_posterior import fit
from support.small_workspace import ITEM_COUNT, build_units, config_of, write_dataset

from l2d_ray.config import Config
from l2d_ray.core.packing import Prompts
from l2d_ray.core.query import Query
from l2d_ray.encoding import HistoryEncoder, identify_memory
from l2d_ray.errors import InputError
from l2d_ray.index.aggregations import AGGREGATIONS
from l2d_ray.memory.store import MemoryStore
from l2d_ray.recommenders.co_occurrence import CoOccurrence
from l2d_ray.recommenders.constrained_beam import ConstrainedBeam, TitleTrie
from l2d_ray.recommenders.contract import IndexKey, Need, Recommender
from l2d_ray.recommenders.grounded_beam import GroundedBeam
from l2d_ray.recommenders.l2d import L2DRecommender
from l2d_ray.recommenders.most_popular import MostPopular
from l2d_ray.recommenders.registry import MODULES, NamedRecommender, declaration, find
from l2d_ray.recommenders.resources import Resources
from l2d_ray.records import check_query
from l2d_ray.schema import Split
from l2d_ray.stages.fusion import fit_fusions
from l2d_ray.stages.training import plan_training, train
from l2d_ray.workspace import Workspace

NAMES = [name for module in MODULES.values() for name in declaration(module).examples]
EXHAUSTIVE = f"constrained-beam-{ITEM_COUNT}"


class World:
    """A dataset of 40 users, a memory and an index of it, and the recommenders of all names."""

    def __init__(self, folder: Path) -> None:
        self.dataset = write_dataset(folder, users=40)
        settings = {"memory.units": 2, "recommend.top_m": 30, "evaluate.generation_batch_size": 2}
        self.config: Config = config_of(folder, **settings)
        workspace = Workspace.open(str(folder))
        names = [record.unit for record in build_units(self.config)]
        MemoryStore(workspace).take_snapshot(names, self.dataset.digest, 1.0)
        plan, self.manifest = build(workspace)
        fit(self.config)
        self.indexes = {IndexKey(plan.config.space): plan.manifest}
        self.resources = Resources(self.config, set(Need), self.indexes)
        self.language_model, self.encoder = self.resources.language_model, self.resources.encoder
        self.index = self.resources.index(*self.indexes)
        self._made: dict[str, Recommender] = {}
        rows = [(sample, f"i{item}", (item * 7 + sample) % ITEM_COUNT) for sample in range(9) for item in range(30)]
        names = ["sample_id", "item_id", "rank"]
        pq.write_table(pa.table(list(zip(*rows, strict=True)), names), folder / "recommendations.parquet")
        self.folder = folder

    def named(self, name: str) -> NamedRecommender:
        return find(name.replace("file:", f"file:{self.folder}/"), self.config, "name")

    def recommender(self, name: str) -> Recommender:
        """Make it from what its module says that it needs, and nothing else."""
        if name not in self._made:
            named = self.named(name)
            for part in named.options.parts:
                self.recommender(part.name)
            if named.options.parts:
                fit_fusions(self.config, [named], self.indexes)
            if named.declaration.trainer:
                train(plan_training(self.config.replace({"recommender": name, "train.epochs": 2})))
            self._made[name] = named.make(Resources(self.config, named.needs, self.indexes))
        return self._made[name]

    def training_samples(self, count: int) -> list[tuple[NDArray[np.int32], int]]:
        samples = []
        for user in self.dataset.iter_users().__next__().to_pylist()[:count]:
            position = user["splits"].index(Split.TRAIN) + 5
            samples.append((np.array(user["item_indices"][:position], np.int32), user["item_indices"][position]))
        return samples


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


class InTheWorld(RecommenderContract):
    @pytest.fixture
    def named(self, world: World, name: str) -> NamedRecommender:
        return world.named(name)

    @pytest.fixture
    def recommender(self, world: World, name: str) -> Recommender:
        return world.recommender(name)


@pytest.mark.parametrize("name", [*NAMES, EXHAUSTIVE])
class TestEveryRecommender(InTheWorld):
    pass


@pytest.mark.parametrize("name", ["toy", "toy-1"])
class TestANewRecommender(InTheWorld):
    """One module and one line in the list are all that it takes."""

    @pytest.fixture(autouse=True)
    def listed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(MODULES, "toy", "support.toy_recommender")


@pytest.fixture
def new_aggregation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add an aggregation. L2D reads their list when it is imported, so it is imported anew."""
    monkeypatch.setitem(AGGREGATIONS, toy_aggregation.NAME, toy_aggregation)
    monkeypatch.delitem(sys.modules, MODULES["l2d"])


@pytest.mark.parametrize("name", ["l2d-twice"])
@pytest.mark.usefixtures("new_aggregation")
class TestANewAggregation(InTheWorld):
    """One module and one line in the list of aggregations are all that it takes."""

    def test_it_is_l2d_l_with_twice_the_m_at_every_m(self, recommender: Recommender) -> None:
        several = [replace(recommender, top_m=top_m) for top_m in (5, 20)]
        outcomes = type(recommender).run_all(several, recommender_contract.queries(9))
        for outcome, top_m in zip(outcomes, (10, 40), strict=True):
            local = replace(recommender, aggregation="local", top_m=top_m)
            for found, expected in zip(outcome.lists, local.recommend(recommender_contract.queries(9)), strict=True):
                recommender_contract.assert_alike(found, expected)

    def test_its_m_is_chosen_on_validation_samples(self, named: NamedRecommender) -> None:
        config = Config()
        studies = {study.label: study for study in named.options.studies(config)}
        assert studies.keys() == {"top_m", "top_m of twice", "prior"}
        assert [trial.top_m for trial in studies["top_m of twice"].trials] == sorted(config.evaluate.top_m)[::-1]
        choices = {"whiten-within": {"top_m": 1, "top_m of twice": 2, "prior": 3}}
        assert named.options.chosen(choices).top_m == 2

    def test_it_takes_a_space_but_no_prior(self, named: NamedRecommender, world: World) -> None:
        assert world.named("l2d-twice-none").options.indexes == [IndexKey("none")]
        with pytest.raises(InputError, match=r"write l2d, or l2d-<global or local or posterior or twice>"):
            world.named("l2d-twice+prior")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("most-populr", "unknown recommender; did you mean most-popular?"),
        ("whiten-within", f"unknown recommender; known are {', '.join(MODULES)}"),
        ("most-popular-20", "unknown recommender; write most-popular, for example most-popular"),
        ("constrained-beam-1", "write constrained-beam-<beams, at least 2>, for example constrained-beam-20"),
        ("l2d-gobal", "[+prior], +prior not with local or posterior, for example l2d-global"),
        ("l2d-local+prior", "[+prior], +prior not with local or posterior, for example l2d-local"),
        ("l2d-global-whiten", "for example l2d-global"),
        ("", "known are"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_known_one(name: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        find(name, Config(), "evaluate.recommenders")
    assert str(refused.value).startswith(f"evaluate.recommenders={name!r}: unknown recommender; ")
    assert str(refused.value).endswith(message) or not name


def test_a_resource_that_is_not_declared_is_refused(world: World) -> None:
    with pytest.raises(LookupError, match=r"Need.TRAINING_INTERACTIONS is used by a recommender whose declaration"):
        world.named("most-popular").make(Resources(world.config, {Need.INDEX}, world.indexes))


def test_a_training_history_finds_its_own_next_item(world: World) -> None:
    """The nearest row to the history of a training sample is the row of this sample."""
    samples = world.training_samples(20)
    nearest = L2DRecommender(world.encoder.encode, world.index, "local", top_m=1)
    lists = nearest.recommend([Query.after(history, 1, exclude_seen=False) for history, _ in samples])
    assert [int(found.items_I[0]) for found in lists] == [target for _, target in samples]


def test_one_search_with_the_largest_m_serves_every_m(world: World) -> None:
    """Also where the same recommender takes part twice."""
    several = [L2DRecommender(world.encoder.encode, world.index, "local", top_m) for top_m in (5, 60, 20, 5)]
    several.insert(1, L2DRecommender(world.encoder.encode, world.index, "global"))
    queries = recommender_contract.queries(12)
    outcomes = L2DRecommender.run_all(several, queries)
    for recommender, outcome in zip(several, outcomes, strict=True):
        for found, alone in zip(outcome.lists, recommender.recommend(queries), strict=True):
            recommender_contract.assert_alike(found, alone)
    assert len({outcome.tokens for outcome in outcomes}) == 1
    assert outcomes[0].seconds == outcomes[4].seconds


def test_popularity_and_succession_are_counted() -> None:
    lasts, targets = np.array([1, 1, 1, 2, 2]), np.array([5, 5, 6, 7, 5])
    queries = [Query.after([2], 4), Query.after([9], 4)]
    for found in MostPopular.fit(targets).recommend(queries):
        assert (found.items_I.tolist(), found.scores_I.tolist()) == ([5, 6, 7], [3, 1, 1])
    known, unknown = CoOccurrence.fit(lasts, targets).recommend(queries)
    assert (known.items_I.tolist(), unknown.items_I.tolist()) == ([5, 7, 6], [5, 6, 7])
    np.testing.assert_allclose([known.scores_I, unknown.scores_I], [[0.5, 0.5, 0.2], [0.6, 0.2, 0.2]])


def log_probability(world: World, prompt: NDArray[np.int32], title: NDArray[np.int32]) -> float:
    """Return the log-probability of a title after a prompt, by one plain forward pass."""
    model = world.language_model.model
    model.set_attn_implementation("sdpa")
    tokens = torch.from_numpy(np.concatenate([prompt, title]).astype(np.int64))[None]
    with torch.inference_mode():
        steps = torch.log_softmax(model(tokens).logits[0, prompt.size - 1 : -1].double(), dim=-1)
    return float(steps[torch.arange(title.size), torch.from_numpy(title.astype(np.int64))].sum())


def test_as_many_beams_as_items_rank_the_catalogue_by_the_probability_of_titles(world: World) -> None:
    lists = world.recommender(EXHAUSTIVE).recommend(recommender_contract.queries(ITEM_COUNT, exclude_seen=False))
    for history, found in zip(HISTORIES, lists, strict=True):
        prompt = world.encoder.phrase(history)
        expected = [log_probability(world, prompt, world.encoder.prompts.item_tokens(i)) for i in range(ITEM_COUNT)]
        assert sorted(found.items_I.tolist()) == list(range(ITEM_COUNT))
        np.testing.assert_allclose(found.scores_I, np.array(expected)[found.items_I], rtol=1e-4)
        assert found.items_I.tolist() == np.argsort(-np.array(expected), kind="stable").tolist()


def test_a_filter_takes_no_other_item_out_of_an_exhaustive_search(world: World) -> None:
    queries, deny = recommender_contract.queries(ITEM_COUNT), [8, 9]
    whole = world.recommender(EXHAUSTIVE).recommend(queries)
    filtered = world.recommender(EXHAUSTIVE).recommend(recommender_contract.queries(ITEM_COUNT, deny=deny))
    for found, before in zip(filtered, whole, strict=True):
        recommender_contract.assert_alike(found, before.permitted(np.array(deny)))


def test_few_beams_find_as_many_titles_with_their_probabilities(world: World) -> None:
    few = world.recommender("constrained-beam-3").recommend(recommender_contract.queries(5))
    every = world.recommender(EXHAUSTIVE).recommend(recommender_contract.queries(ITEM_COUNT))
    for found, all_found in zip(few, every, strict=True):
        assert len(found) == 3
        known = dict(zip(all_found.items_I.tolist(), all_found.scores_I.tolist(), strict=True))
        np.testing.assert_allclose(found.scores_I, [known[item] for item in found.items_I.tolist()], rtol=1e-4)


@pytest.mark.parametrize("aggregation", ["global", "local", "posterior"])
def test_a_history_without_a_finite_state_gets_an_empty_list_and_changes_no_other(
    world: World, aggregation: str
) -> None:
    good = world.encoder.encode(HISTORIES[:1]).states_UD[0]
    states = np.stack([good, np.full_like(good, np.nan), good * np.inf])
    for allow in (None, np.arange(9)):
        queries = [Query.after(history, 5, allow=allow, aggregation=aggregation) for history in HISTORIES[:3]]
        lists = world.index.recommend(states, queries)
        assert [len(found) for found in lists[1:]] == [0, 0]
        recommender_contract.assert_alike(lists[0], world.index.recommend(states[:1], queries[:1])[0])


def test_the_generation_settings_of_a_model_do_not_change_a_score(world: World) -> None:
    recommender, queries = world.recommender(EXHAUSTIVE), recommender_contract.queries(5)
    assert isinstance(recommender, ConstrainedBeam)
    expected = recommender.recommend(queries)
    recommender.search.language_model.model.generation_config.repetition_penalty = 1.5
    for found, before in zip(recommender.recommend(queries), expected, strict=True):
        recommender_contract.assert_alike(found, before, rtol=1e-7)


def test_titles_that_are_the_same_share_a_beam() -> None:
    trie = TitleTrie.of([np.array(title, np.int32) for title in ([1, 2], [1, 2], [1, 3, 4], [1, 2, 9])])
    node = trie.node([1, 2])
    assert node is not None
    assert trie.items[node] == [0, 1]
    assert (trie.below[0], trie.below[node]) == (4, 3)
    assert trie.node([1, 9]) is None


def test_grounding_ranks_by_the_distance_to_the_written_title(world: World) -> None:
    grounded = world.recommender("grounded-beam")
    assert isinstance(grounded, GroundedBeam)
    search = grounded.writer.search
    model, history = search.language_model.model, HISTORIES[2]
    prompt = torch.from_numpy(world.encoder.phrase(history).astype(np.int64))[None]
    model.set_attn_implementation("sdpa")
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
    ((tokens, _), *_) = search.continuations([world.encoder.phrase(history)]).beams[0]
    assert tokens.tolist() == written[: ends[0] if ends.size else None].tolist()
    (found,) = grounded.recommend([Query.after(history, 5, exclude_seen=False)])
    state = world.encoder.extract(Prompts.join([np.append(tokens, world.encoder.prompts.item_end)])).states[0].numpy()
    distances = np.linalg.norm(grounded.writer.title_states_ID - state, axis=1)
    assert found.items_I.tolist() == np.argsort(distances, kind="stable")[:5].tolist()


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
