from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from l2d_ray.command_line import _fields, _first_sentence, load_config
from l2d_ray.config import Config, DataConfig, HistoryConfig
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
    config = load_config(["--data.interactions", "year=2024/part", "workspace=/w"])
    assert config.data.interactions == str(Path("year=2024/part").absolute())


@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path, form: str) -> None:
    path = yaml_file(tmp_path, "workspace: from-file\ndata: {min_interactions: 3, max_title_words: 7}\n")
    config = load_config([*form.format(path).split(), "data.max_title_words=9"])
    assert config.workspace == str(Path("from-file").absolute())
    assert config.data == DataConfig(min_interactions=3, max_title_words=9)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_file_of_ours_is_a_configuration(file: Path) -> None:
    assert load_config(["--config", str(file)]) != Config()


@pytest.mark.parametrize("name", ["..", ".", "memory", "checkpoints", "a/b"])
def test_a_result_does_not_go_into_the_folder_of_another_stage(name: str) -> None:
    text = message(f"finetune.name={name}")
    assert text.startswith(f"the command line: finetune.name={name!r}")
    assert text.endswith(("; give another name", "; give a name of letters, digits, dots, hyphens and underscores"))


def test_null_unsets(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "data: {num_blocks: 8}\n")
    assert load_config(["--config", path]).data.num_blocks == 8
    assert load_config(["--config", path, "data.num_blocks=null"]).data.num_blocks is None


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_config(["--config", yaml_file(tmp_path, "")]) == Config()


def test_the_environment_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKSPACE", "from-environment")
    assert load_config([]).workspace == str(Path("workspace").absolute())


def help_text(capsys: pytest.CaptureFixture[str], *argv: str, **arguments: Any) -> str:
    with pytest.MonkeyPatch.context() as terminal:
        terminal.setenv("COLUMNS", "120")
        with pytest.raises(SystemExit) as ended:
            load_config(argv, **arguments)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_lists_what_the_job_reads_with_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(capsys, "data.split=time", "--help", reads=["data", "finetune.name"], about="Prepare things.\n")
    assert text.startswith("usage: ")
    assert "\nPrepare things.\n\ndata: Raw interactions and items, and how they become samples.\n" in text
    assert "\n  data.min_interactions=5         k of the k-core: drop users" in text
    assert "\n  data.split=time                 Rule that splits the samples. One of time, leave-one-out, none." in text
    assert "finetune.name=adapter" in text
    for other in ("finetune.rank", "workspace=", "8:1:1"):
        assert other not in text


def test_help_all_describes_every_key_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(capsys, "--help-all", reads=["data"])
    for key in ("workspace", "data.columns.user", "bench.factories"):
        assert f"\n  {key}=" in text
    assert "8:1:1" in text


def test_every_key_has_a_short_first_sentence() -> None:
    for key, field in _fields():
        first = _first_sentence(str(field.description))
        assert first.endswith("."), key
        assert len(first) <= 110, key


def test_an_unknown_key_on_the_command_line() -> None:
    assert message("data.num_block=3") == (
        "the command line: unknown key data.num_block; did you mean data.num_blocks?"
    )
    assert message("zzz=3") == "the command line: unknown key zzz; --help-all lists the keys"


def test_an_argument_that_is_no_setting() -> None:
    assert message("zzz") == "the command line: 'zzz' is no setting; write key=value"
    assert message("--workspace") == "the command line: workspace has no value; write workspace=value"


def test_an_unknown_key_in_the_file(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "data: {num_block: 3}\n")
    assert message("--config", path) == f"{path}: unknown key data.num_block; did you mean data.num_blocks?"


def test_a_wrong_type_in_the_file(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "data: {num_blocks: many}\n")
    assert message("--config", path) == (f"{path}: data.num_blocks='many' is not accepted; give a valid integer")


def test_two_mistakes_are_both_named(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "data: {num_blocks: 0, split: random}\n")
    assert message("--config", path) == (
        f"{path}: data.split='random' is not accepted; give 'time', 'leave-one-out' or 'none';"
        f" {path}: data.num_blocks=0 is not accepted; give a value greater than or equal to 1"
    )


def test_a_boolean_is_no_number(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "memory: {units: true}\n")
    assert message("--config", path) == (
        f"{path}: memory.units=True: a boolean is not accepted here; give a value of the setting's type"
    )


def test_a_wrong_value_on_the_command_line() -> None:
    text = message("data.min_interactions=0")
    assert (
        text == "the command line: data.min_interactions='0' is not accepted; give a value greater than or equal to 1"
    )


def test_a_wrong_date() -> None:
    assert message("data.since=yesterday").startswith(
        "the command line: data.since='yesterday' is not accepted; give a valid"
    )


def test_a_period_begins_before_it_ends() -> None:
    assert message("data.since=2020-01-02", "data.until=2020-01-02") == (
        "the command line: data.since=2020-01-02 is not before data.until=2020-01-02; give an earlier day"
    )


def test_the_item_form_holds_one_title() -> None:
    assert message("prompt.item=nothing") == (
        "the command line: prompt.item='nothing': must contain {title} exactly once; write it where the title belongs"
    )


def test_max_workers_are_not_below_min() -> None:
    assert message("workers.min=3", "workers.max=2") == (
        "the command line: workers.max=2 is below workers.min=3; raise it or lower workers.min"
    )


def test_paths_are_absolute_and_names_stay_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "demo").mkdir()
    (tmp_path / "keys.today").touch()
    (tmp_path / "keys").symlink_to("keys.today")
    monkeypatch.chdir(tmp_path)
    config = load_config(["workspace=w", "model.name=model", "model.adapter=a/hub-id", "serve.keys_file=keys"])
    assert (config.workspace, config.model.name) == (str(tmp_path / "w"), str(tmp_path / "model"))
    assert config.model.adapter == "a/hub-id"
    assert config.serve.keys_file == str(tmp_path / "keys")  # not where the link points to today
    assert load_config(["workspace=s3://b/w", "model.name=demo"]).model.name == "demo"
    assert load_config(["workspace=s3://b/w"]).workspace == "s3://b/w"
    assert Config(workspace="w").workspace == str(tmp_path / "w")  # also of a Serve YAML


def test_a_relative_workspace_is_refused_where_the_folder_is_temporary() -> None:
    for argv, named in (([], "workspace"), (["workspace=results"], "results")):
        with pytest.raises(InputError, match=f"^workspace='{named}': a submitted job runs in a temporary copy"):
            load_config(argv, temporary_folder=True)
    for location in ("/results", "~/results", "s3://bucket/results"):
        load_config([f"workspace={location}"], temporary_folder=True)


def test_what_was_given_is_known_also_after_a_change(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "index: {space: whiten-within}\ndata: {since: 2020-01-02}\n")
    config = load_config(["--config", path, "model.adapter=null"])
    given = {"index.space": "whiten-within", "data.since": "2020-01-02", "model.adapter": None}
    assert config.given() == given
    changed = config.replace({"index.snapshot": 3, "history.stride": 1})
    assert changed.given() == given | {"index.snapshot": 3, "history.stride": 1}
    assert (changed.index.space, changed.history) == ("whiten-within", HistoryConfig(stride=1))
    with pytest.raises(ValidationError):
        config.replace({"index.spaces": "none"})


def test_a_batch_may_wait() -> None:
    assert "serve.max_waiting=9 is below serve.max_batch=10" in message("serve.max_waiting=9", "serve.max_batch=10")


@pytest.mark.parametrize("argv", [["--config"], ["workspace=x", "--config"]])
def test_config_needs_a_file(argv: list[str]) -> None:
    assert message(*argv) == "--config: no file is named; give the path of a YAML file"


def test_a_file_that_is_not_there() -> None:
    assert message("--config", "/none.yaml") == (
        "--config /none.yaml: No such file or directory; name a readable YAML file"
    )


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\xe9"])
def test_a_file_that_is_not_yaml(tmp_path: Path, content: bytes) -> None:
    path = yaml_file(tmp_path, content)
    assert message("--config", path).startswith(f"--config {path}: not YAML (")


def test_a_file_without_keys(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "- a\n")
    assert message("--config", path) == f"--config {path}: holds a list, not settings; write `key: value` lines"


def test_a_section_that_is_a_value(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "data: 3\n")
    assert message("--config", path) == f"{path}: data=3 is not accepted; this is a section: give its keys"
