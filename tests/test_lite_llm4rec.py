"""Lite-LLM4Rec: what it computes and learns, what it saves, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from support.sequences import cycles, loaded, trained, write_sequences
from support.small_workspace import config_of
from support.tiny_models import save_adapter, save_tiny

from l2d_ray.config import Config
from l2d_ray.core.query import Query
from l2d_ray.errors import InputError
from l2d_ray.recommenders.lite_llm4rec import DECLARATION, LiteLLM4Rec, LiteRecommender
from l2d_ray.recommenders.training import TrainingData
from l2d_ray.stages.evaluation import plan_evaluation
from l2d_ray.stages.training import plan_training
from l2d_ray.stages.tuning import plan_trials, results_of, write_report

ITEMS = 12
QUICK = {"recommender": "lite-llm4rec", "train.epochs": 3, "train.learning_rate": 1e-2, "train.length": 8}
RECORD = "WS/recommenders/lite-llm4rec/training.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a workspace of cycles."""
    write_sequences(tmp_path, cycles(40, 11, ITEMS), ITEMS)
    return tmp_path


@pytest.fixture
def config(folder: Path) -> Config:
    return config_of(folder, **QUICK)


def refused(function: Any, config: Config) -> str:
    with pytest.raises(InputError) as caught:
        function(config)
    return str(caught.value).replace(config.workspace, "WS")


def untrained(config: Config) -> LiteLLM4Rec:
    """Return the model before its first epoch, in evaluation mode."""
    plan = plan_training(config)
    learner: Any = plan.trainer.learner(plan.config, TrainingData.read(plan.dataset))
    model = learner.recommender().model
    assert isinstance(model, LiteLLM4Rec)
    return model


@pytest.mark.parametrize("layers", [1, 2, 8])
def test_the_first_layers_of_the_model_read_projected_titles(config: Config, layers: int) -> None:
    model = untrained(config.replace({"train.blocks": layers}))
    whole = transformers.AutoModelForCausalLM.from_pretrained(config.model.name, num_hidden_layers=min(layers, 2))
    items = torch.tensor([[3, 0, 7, 7]])
    with torch.inference_mode():
        vectors = model.projection(model.titles[items])
        expected = model.norm(whole.eval().model(inputs_embeds=vectors).last_hidden_state)
        states = model(items, torch.tensor([4]))
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)


def test_titles_are_compressed_once_and_are_as_large_as_tokens(config: Config) -> None:
    model = untrained(config)
    titles = model.titles[:ITEMS]
    torch.testing.assert_close(titles.mean(dim=0), torch.zeros(32), rtol=0, atol=1e-5)
    torch.testing.assert_close(titles.square().mean(dim=0), torch.ones(32), rtol=1e-3, atol=0)
    assert not model.titles[ITEMS].any()
    tokens = model.llm.get_input_embeddings().weight.square().mean()
    with torch.inference_mode():
        assert 0.5 < model.projection(titles).square().mean() / tokens < 2


@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_learns_cycles(config: Config, method: str) -> None:
    settings = {"finetune.method": method, "train.epochs": 12, "train.patience": 12, "train.learning_rate": 3e-3}
    record = trained(config := config.replace(settings))
    assert record.history[-1].loss < 0.5 * record.history[0].loss
    recommender = loaded(config)
    assert isinstance(recommender, LiteRecommender)
    histories = [[(first + place) % ITEMS for place in range(9)] for first in (3, 9, 0)]
    queries = [Query.after([*history, "A title that nobody knows"], 1) for history in histories]
    lists, positions = recommender.recommend_counted(queries)
    assert [found.items_I.tolist() for found in lists] == [[0], [6], [9]]
    assert positions == 3 * 8


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_trained_and_the_titles_are_saved(config: Config, folder: Path, method: str) -> None:
    record = trained(config := config.replace({"finetune.method": method}))
    weights = load_file(folder / "recommenders/lite-llm4rec" / record.weights)
    ours = {"items.weight", "titles", "projection.weight", "projection.bias", "norm.weight", "norm.bias", "popularity"}
    of_model = {name for name in weights if name.startswith("llm.")}
    assert weights.keys() == ours | of_model
    assert "llm.embed_tokens.weight" not in weights
    if method == "lora":
        assert len(of_model) == 2 * 2 * 2
        assert all("lora_" in name for name in of_model)
        assert all(weights[name].any() for name in of_model)
    assert record.settings["finetune.method"] == method


def test_a_training_that_was_killed_ends_with_the_same_weights(config: Config) -> None:
    def kill(history: Any) -> None:
        if len(history) == 2:
            raise KeyboardInterrupt

    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        trained(config, kill)
    torch.manual_seed(2)
    epochs: list[int] = []
    resumed = trained(config, lambda history: epochs.append(len(history)))
    assert epochs == [2, 3]
    whole = trained(config.replace({"recommender": "lite-llm4rec-2"}))
    assert resumed.sha256 == whole.sha256


def test_training_starts_from_the_model_with_its_adapter(config: Config, folder: Path) -> None:
    adapted = config.replace({"model.adapter": save_adapter(folder / "lora", config.model.name), "train.blocks": 1})
    plain, merged = untrained(config.replace({"train.blocks": 1})), untrained(adapted)
    name = "layers.0.self_attn.q_proj.base_layer.weight"
    assert not torch.equal(plain.llm.state_dict()[name], merged.llm.state_dict()[name])


def test_other_settings_of_lora_or_another_model_are_refused(config: Config, folder: Path) -> None:
    trained(config)
    loaded(config.replace({"finetune.rank": 4}))  # a trained one has its own settings
    assert refused(trained, config.replace({"finetune.rank": 4})) == (
        f"{RECORD}: belongs to another training: finetune.rank (8, now 4); set recommender=lite-llm4rec-2 to keep both,"
        " or delete its folder"
    )
    other = config.replace({"model.name": save_tiny(folder / "other", seed=1)})
    assert ".safetensors: trained with another language model: titles.base_model (" in refused(loaded, other)
    evaluated = other.replace({"evaluate.recommenders": ["lite-llm4rec"]})
    assert refused(plan_evaluation, evaluated).startswith(f"{RECORD}: trained with another language model: titles.")
    assert "belongs to another training: titles.base_model (" in refused(trained, other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"finetune.target_modules": ["q_prj"]}, "finetune.target_modules: the model has no linear layer 'q_prj'"),
        ({"train.learning_rate": 1e30}, "train.learning_rate=1e+30: the loss is not finite in epoch 1; lower it"),
        ({"train.heads": 2}, "train.heads=2: lite-llm4rec has no use for it; leave it out"),
    ],
)
def test_settings_that_cannot_work_are_refused(config: Config, settings: dict[str, Any], message: str) -> None:
    assert refused(trained, config.replace(settings)).startswith(message)


def test_a_search_keeps_the_given_settings_of_lora(config: Config, folder: Path) -> None:
    config = config.replace({"finetune.rank": 4, "tune.trials": 2, "train.epochs": 1})
    first, _ = plan_trials(config)
    trained(first.config)
    _, settings = write_report(config, results_of([first], {}))
    assert yaml.safe_load((folder / settings).read_text())["finetune"] == {"rank": 4}


def test_a_catalogue_of_one_item_is_refused(tmp_path: Path) -> None:
    write_sequences(tmp_path, [[0, 0, 0, 0]], 1)
    message = refused(trained, config_of(tmp_path, **QUICK))
    assert message == "WS/dataset: has 1 item, so that there is nothing to rank; prepare more data"


def test_the_grid_has_enough_choices_for_a_search() -> None:
    assert DECLARATION.trainer is not None
    assert np.prod([len(values) for values in DECLARATION.trainer.grid.values()]) >= 24
