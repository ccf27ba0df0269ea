from pathlib import Path

import pytest

from l2d_ray.command_line import load_config
from l2d_ray.config import Config, DataConfig
from l2d_ray.errors import InputError

CONFIGS = Path(__file__).parents[1] / "jobs/configs"


def yaml_file(tmp_path: Path, content: str | bytes) -> str:
    path = tmp_path / "job.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def message(*argv: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_arguments_all_is_default() -> None:
    assert load_config([]) == Config()


@pytest.mark.parametrize(
    "argv",
    [
        ["data.num_blocks=3", "workspace=/w", "data.split=leave-one-out"],
        ["--data.num_blocks=3", "--workspace=/w", "--data.split=leave-one-out"],
        ["--data.num_blocks", "3", "--workspace", "/w", "--data.split", "leave-one-out"],
    ],
)
def test_overrides_come_in_three_forms(argv: list[str]) -> None:
    config = load_config(argv)
    assert (config.data.num_blocks, config.workspace, config.data.split) == (3, "/w", "leave-one-out")


def test_a_value_may_look_like_a_key() -> None:
    assert load_config(["--data.interactions", "year=2024/part", "workspace=/w"]).data.interactions == "year=2024/part"


@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path, form: str) -> None:
    path = yaml_file(tmp_path, "workspace: from-file\ndata: {min_interactions: 3, max_title_words: 7}\n")
    config = load_config([*form.format(path).split(), "data.max_title_words=9"])
    assert config.workspace == "from-file"
    assert config.data == DataConfig(min_interactions=3, max_title_words=9)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_file_of_ours_is_a_configuration(file: Path) -> None:
    assert load_config(["--config", str(file)]) != Config()


@pytest.mark.parametrize("name", ["..", ".", "memory", "checkpoints", "a/b"])
def test_a_result_does_not_go_into_the_folder_of_another_stage(name: str) -> None:
    assert message(f"finetune.name={name}").startswith(f"the command line: finetune.name={name!r}: ")


def test_null_unsets(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "data: {num_blocks: 8}\n")
    assert load_config(["--config", path]).data.num_blocks == 8
    assert load_config(["--config", path, "data.num_blocks=null"]).data.num_blocks is None


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_config(["--config", yaml_file(tmp_path, "")]) == Config()


def test_the_environment_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKSPACE", "from-environment")
    assert load_config([]).workspace == "workspace"


def test_help_lists_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(["--help"])
    assert caught.value.code == 0
    assert "data.min_interactions" in capsys.readouterr().out


def test_an_unknown_key_on_the_command_line() -> None:
    assert message("data.num_block=3") == (
        "the command line: unknown key data.num_block; did you mean data.num_blocks?"
    )
    assert message("zzz=3") == "the command line: unknown key zzz; --help lists the keys"


def test_an_unknown_key_in_the_file(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "data: {num_block: 3}\n")
    assert message("--config", path) == f"{path}: unknown key data.num_block; did you mean data.num_blocks?"


def test_a_wrong_type_in_the_file(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "data: {num_blocks: many}\n")
    assert message("--config", path) == (
        f"{path}: data.num_blocks='many': Input should be a valid integer, unable to parse string as an integer"
    )


def test_two_mistakes_are_both_named(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "data: {num_blocks: 0, split: random}\n")
    assert message("--config", path) == (
        f"{path}: data.split='random': Input should be 'time' or 'leave-one-out';"
        f" {path}: data.num_blocks=0: Input should be greater than or equal to 1"
    )


def test_a_boolean_is_no_number(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "memory: {units: true}\n")
    assert message("--config", path) == f"{path}: memory.units=True: a boolean is not accepted here"


def test_a_wrong_value_on_the_command_line() -> None:
    text = message("data.min_interactions=0")
    assert text == "the command line: data.min_interactions='0': Input should be greater than or equal to 1"


def test_a_wrong_date() -> None:
    assert message("data.since=yesterday").startswith(
        "the command line: data.since='yesterday': Input should be a valid"
    )


@pytest.mark.parametrize("source", ["movielens", "amazon", "d3", "table"])
def test_the_files_of_a_source_must_be_named(source: str) -> None:
    assert message(f"data.source={source}") == (
        f"the command line: data.interactions is needed when data.source is {source!r}"
    )


@pytest.mark.parametrize("source", ["amazon", "table"])
def test_the_items_of_a_source_must_be_named(source: str) -> None:
    assert message(f"data.source={source}", "data.interactions=x") == (
        f"the command line: data.items is needed when data.source is {source!r}"
    )


def test_published_splits_have_no_period() -> None:
    assert message("data.source=d3", "data.interactions=x", "data.since=2020-01-01") == (
        "the command line: data.since and data.until must be absent when data.source is 'd3': it is kept as published"
    )


def test_a_period_begins_before_it_ends() -> None:
    assert message("data.since=2020-01-02", "data.until=2020-01-02") == (
        "the command line: data.since=2020-01-02 must be before data.until=2020-01-02"
    )


def test_the_item_form_holds_one_title() -> None:
    assert message("prompt.item=nothing") == (
        "the command line: prompt.item='nothing': the item form must contain {title} exactly once"
    )


def test_max_workers_are_not_below_min() -> None:
    assert message("workers.min=3", "workers.max=2") == "the command line: workers.max=2 is below workers.min=3"


def test_files_of_this_machine_are_found_from_every_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "keys.today").touch()
    (tmp_path / "keys").symlink_to("keys.today")
    monkeypatch.chdir(tmp_path)
    config = load_config(["workspace=w", "model.name=model", "model.adapter=a/hub-id", "serve.keys_file=keys"])
    absolute = config.absolute()
    assert (absolute.workspace, absolute.model.name) == (str(tmp_path / "w"), str(tmp_path / "model"))
    assert absolute.model.adapter == "a/hub-id"
    assert absolute.serve.keys_file == str(tmp_path / "keys")  # not where the link points to today


def test_a_batch_may_wait() -> None:
    assert "serve.max_waiting=9 is below serve.max_batch=10" in message("serve.max_waiting=9", "serve.max_batch=10")


@pytest.mark.parametrize("argv", [["--config"], ["workspace=x", "--config"]])
def test_config_needs_a_file(argv: list[str]) -> None:
    assert message(*argv) == "--config needs a file"


def test_a_file_that_is_not_there() -> None:
    assert message("--config", "/none.yaml") == (
        "--config /none.yaml: No such file or directory; name a readable YAML file"
    )


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\xe9"])
def test_a_file_that_is_not_yaml(tmp_path: Path, content: bytes) -> None:
    path = yaml_file(tmp_path, content)
    assert message("--config", path).startswith(f"--config {path}: not YAML: ")


def test_a_file_without_keys(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "- a\n")
    assert message("--config", path) == f"--config {path}: expected keys and values, found a list"


def test_a_section_that_is_a_value(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "data: 3\n")
    text = message("--config", path)
    assert text.startswith(f"{path}: data=3: Input should be a valid dictionary")
