"""Every error message that a user can reach by a wrong setting or file: listed, of one form, and reached.

`tests/support/error_messages.txt` lists them all, as the source code has them. `CASES` reaches those that need neither
Ray nor a model of real size, with what causes them.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.error_messages import in_source, listed

from l2d_ray.command_line import load_config
from l2d_ray.config import Config
from l2d_ray.data.catalogue import read_catalogue
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.sources import source_of
from l2d_ray.errors import InputError
from l2d_ray.models.checkpoint import find_adapter, find_model
from l2d_ray.serve.releases import Release
from l2d_ray.stages import checks
from l2d_ray.stages.index_plan import plan_index
from l2d_ray.workspace import Workspace

VERBS = (
    "add|build|check|choose|complete|convert|correct|delete|did you mean|download|fill|get|give|install|keep|leave|look"
    "|lower|make|name|pip install|prepare|put|raise|remove|rename|run|save|see|set|start|take|this is a section|use|write|--help"
)
REMEDY = re.compile(rf"; ([^;]*\b)?({VERBS})\b|; {{|{{\w*REMEDY}}|{{problem}}", re.IGNORECASE)
"""The remedy stands behind a semicolon, or is a text that several messages share."""
QUOTED = {"no file there"}
"""Messages that stand in another one."""
PLACE = re.compile(r"[={/.]|^--")
"""A key, a file, or a value in the place of an expression."""


def check_form(message: str) -> None:
    """Check that a message is one line that names a place and a remedy."""
    assert PLACE.search(message), f"names no file, key or value: {message}"
    assert REMEDY.search(message), f"says nothing to do: {message}"
    assert "\n" not in message, message
    assert not message.endswith("."), message


def test_the_list_is_complete() -> None:
    """If this fails, run `PYTHONPATH=tests python tests/support/error_messages.py` and read the difference."""
    assert in_source() == listed()


def test_every_message_says_where_what_and_what_to_do() -> None:
    for line in listed():
        file, _, message = line.partition(": ")
        if message not in QUOTED:
            check_form(f"key={message}" if "/config/" in file else message)  # the command line adds it


def load(*argv: str) -> Callable[[Path], object]:
    return lambda folder: load_config([argument.replace("WS", str(folder)) for argument in argv])


def reading(file: str, content: str | bytes, **data: Any) -> Callable[[Path], object]:
    """Read a raw file of interactions and items."""

    def read(folder: Path) -> object:
        path = folder / file
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        columns = {"user": "u", "item": "i", "timestamp": "t", "title": "n"}
        settings = {"source": "table", "interactions": path, "items": path, "columns": columns} | data
        config = Config(data={key: str(value) if key != "columns" else value for key, value in settings.items()})  # type: ignore[arg-type]
        read_catalogue(config)
        return [
            list(source_of(config).read_interactions(one, config))
            for one in source_of(config).interaction_files(config)
        ]

    return read


def of_model(prepare: Callable[[Path], object], **model: Any) -> Callable[[Path], object]:
    """Look for a model that was prepared in a folder."""

    def find(folder: Path) -> object:
        (folder / "model").mkdir()
        prepare(folder / "model")
        found = load_config(
            [f"model.{key}={str(value).replace('WS', str(folder))}" for key, value in model.items()]
        ).model
        return find_model(found), find_adapter(found)

    return find


def damaged(file: str, content: str, function: Callable[[Workspace], object]) -> Callable[[Path], object]:
    """Read a file of the workspace."""

    def read(folder: Path) -> object:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(content)
        return function(Workspace.open(str(folder)))

    return read


def configured(function: Callable[[Config], object], *argv: str, dataset: bool = False) -> Callable[[Path], object]:
    def call(folder: Path) -> object:
        if dataset:
            manifest = {"format_version": 1, "digest": "d" * 64, "files": []}
            Workspace.open(str(folder)).write_json("dataset/dataset.json", manifest)
        return function(load_config([f"workspace={folder}", *argv]))

    return call


# fmt: off
CASES: list[tuple[str, Callable[[Path], object], str]] = [
    ("an unknown key", load("data.num_block=3"),
        "the command line: unknown key data.num_block; did you mean data.num_blocks?"),
    ("no key at all", load("num_blocks"),
        "the command line: 'num_blocks' is no setting; write key=value"),
    ("a key without a value", load("--workspace"),
        "the command line: workspace has no value; write workspace=value"),
    ("a section with a value", load("data=3"),
        "the command line: data=3 is not accepted; this is a section: give its keys"),
    ("no number", load("data.max_users=many"),
        "the command line: data.max_users='many' is not accepted; give a valid integer"),
    ("a number out of range", load("workers.cpus=0"),
        "the command line: workers.cpus='0' is not accepted; give a value greater than or equal to 1"),
    ("none of the choices", load("data.split=random"),
        "the command line: data.split='random' is not accepted; give 'time', 'leave-one-out' or 'none'"),
    ("an empty list", load("evaluate.recommenders=[]"),
        "the command line: evaluate.recommenders=[] is not accepted; give at least 1 item"),
    ("no name", load("evaluate.name=a/b"),
        "the command line: evaluate.name='a/b' is not accepted; give a name of letters, digits, dots, hyphens and underscores"),
    ("the name of another folder", load("finetune.name=memory"),
        "the command line: finetune.name='memory': another stage keeps its files in that folder; give another name"),
    ("an item form without a title", load("prompt.item=x"),
        "the command line: prompt.item='x': must contain {title} exactly once; write it where the title belongs"),
    ("an unknown source", configured(checks.prepare, "data.source=csv"),
        "data.source='csv': unknown; give one of amazon, d3, demo, movielens, table"),
    ("no interactions", configured(checks.prepare, "data.source=table"),
        "data.interactions is missing, which data.source='table' needs; give a file, a folder or a URI"),
    ("no items", configured(checks.prepare, "data.source=table", "data.interactions=x"),
        "data.items is missing, which data.source='table' needs; give a file, a folder or a URI"),
    ("a period of d3", configured(checks.prepare, "data.source=d3", "data.interactions=x", "data.since=2020-01-01"),
        "data.since and data.until do not apply to data.source='d3', whose split is published; leave them out"),
    ("a period that ends before it begins", load("data.since=2020-01-02", "data.until=2020-01-01"),
        "the command line: data.since=2020-01-02 is not before data.until=2020-01-01; give an earlier day"),
    ("fewer workers at most than at least", load("workers.min=2", "workers.max=1"),
        "the command line: workers.max=1 is below workers.min=2; raise it or lower workers.min"),
    ("a batch that may never wait", load("serve.max_waiting=9"),
        "the command line: serve.max_waiting=9 is below serve.max_batch=64, so that a full batch would always be refused; raise it or lower serve.max_batch"),
    ("no file behind --config", load("--config"),
        "--config: no file is named; give the path of a YAML file"),
    ("a missing configuration", load("--config=WS/none.yaml"),
        "--config WS/none.yaml: No such file or directory; name a readable YAML file"),
    ("a workspace of no filesystem", lambda _: Workspace.open("nope://x"),
        "'nope://x': nope:// is not known; give a folder, s3://bucket/… or gs://bucket/…"),
    ("a missing dataset", configured(checks.build_memory),
        "WS/dataset/dataset.json: not found; run jobs/prepare_data.py first"),
    ("a damaged dataset", damaged("dataset/dataset.json", "{", Dataset.open),
        "WS/dataset/dataset.json: not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)), the file is damaged; delete it and run jobs/prepare_data.py again"),
    ("a dataset of another version", damaged("dataset/dataset.json", '{"format_version": 7}', Dataset.open),
        "WS/dataset/dataset.json: format_version=7, not 1; run jobs/prepare_data.py again"),
    ("a missing memory", configured(plan_index),
        "WS/memory/snapshots: no snapshot; run jobs/build_memory.py first"),
    ("a missing snapshot", configured(plan_index, "index.snapshot=3"),
        "WS/memory/snapshots/3.json: not found; run jobs/build_memory.py first"),
    ("a snapshot of another version", damaged("memory/snapshots/1.json", "{}", lambda ws: plan_index(Config(workspace=ws.uri))),
        "WS/memory/snapshots/1.json: number: Field required; the file is damaged or of another version of l2d_ray: delete it and run jobs/build_memory.py again"),
    ("a damaged record of settings", damaged("index/settings.json", "[]", lambda ws: Release.plan(Config(workspace=ws.uri))),
        "WS/index/settings.json: no JSON object, the file is damaged; delete it and run jobs/build_index.py again"),
    ("an adapter to fine-tune", configured(checks.finetune, "model.adapter=a/b", dataset=True),
        "model.adapter='a/b': fine-tuning starts from a base model; leave the adapter out"),
    ("a part of a GPU to train on", configured(checks.finetune, "workers.gpus=0.5", dataset=True),
        "workers.gpus=0.5: a training worker has one GPU; set 1, and workers.max to their number"),
    ("half a number format", configured(checks.finetune, "model.dtype=float16", dataset=True),
        "model.dtype='float16': a CPU cannot train in it; use float32"),
    ("a model folder without weights", of_model(lambda folder: None, name="WS/model"),
        "model.name='WS/model': no *.safetensors and no *.gguf file, and pickled weights are not read; save the model with save_pretrained first"),
    ("an adapter folder without one", of_model(lambda folder: (folder / "model.safetensors").touch(), name="WS/model", adapter="WS/model"),
        "model.adapter='WS/model': no adapter_config.json there; give a folder that PEFT saved"),
    ("a missing raw file", configured(checks.prepare, "data.source=movielens", "data.interactions=/none"),
        "data.interactions='/none': not found; give a file, a folder or a URI that exists"),
    ("a file of no known format", reading("log.xml", "<x/>"),
        "WS/log.xml: unknown suffix '.xml'; rename or convert the file to one of .parquet, .csv, .tsv, .jsonl, .json, .ndjson"),
    ("an empty file", reading("log.csv", ""),
        "WS/log.csv: the file is empty; give the complete file, or remove it from the folder"),
    ("a header without rows", reading("log.csv", "u,i,t,n\n"),
        "WS/log.csv: no rows below the header; give the complete file, or remove it from the folder"),
    ("a missing column of the items", reading("log.csv", "u,i,t\na,b,1\n"),
        "WS/log.csv: no column 'n' among 'u', 'i', 't'; name the columns of the items with data.columns.id_in_items and data.columns.title"),
    ("a missing column of the interactions", reading("log.csv", "u,i,n\na,b,c\n"),
        "WS/log.csv: no column 't' among 'u', 'i', 'n'; name the columns with data.columns.user, data.columns.item and data.columns.timestamp"),
    ("an empty id", reading("log.csv", "u,i,t,n\n,b,1,c\n"),
        "WS/log.csv: row 1: u is empty; fill it in or remove the row"),
    ("a time in words", reading("log.csv", "u,i,t,n\na,b,noon,c\n"),
        "WS/log.csv: row 1: t='noon' is not a whole number; give whole numbers, such as Unix seconds, or an Arrow timestamp column"),
    ("an item twice", reading("log.csv", "u,i,t,n\na,b,1,c\na,b,2,c\n"),
        "data.items='WS/log.csv': item 'b' is in rows 1 and 2, and 1 ids are repeated; keep one row for each item"),
    ("JSON lines that are none", reading("log.jsonl", "u"),
        "WS/log.jsonl: line 1: not JSON (Expecting value: line 1 column 1 (char 0)); give one JSON object a line"),
    ("latin-1 text", reading("log.jsonl", '{"u": "é"}'.encode("latin-1")),
        "WS/log.jsonl: line 1: byte b'\\xe9' is not UTF-8; convert the file (iconv -f latin1 -t utf-8)"),
    ("Parquet that is none", reading("log.parquet", "PAR1"),
        "WS/log.parquet: damaged Parquet file (Parquet file size is 4 bytes, smaller than the minimum file footer (8 bytes)); write it again"),
]
# fmt: on


@pytest.mark.parametrize(("cause", "trigger", "message"), CASES, ids=[cause for cause, _, _ in CASES])
def test_what_causes_a_message(cause: str, trigger: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        trigger(tmp_path)
    assert str(caught.value).replace(str(tmp_path), "WS") == message
    check_form(message)
