"""Labelled sentences become windows of their own; whatever is wrong with a row is told by file, row and column."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from classifiers_for_tests import LABELS, sentences, word_tokenizer, write_sentences, write_tiny_classifier
from pydantic import ValidationError

from cluster.errors import InputError
from jobs.admitting import with_gates
from jobs.job import Job, dump_job, parse_job
from jobs.tenants import Tenant
from workflows.data.labelled import build_labelled, labelled_windows
from workflows.data.sources import read_documents
from workflows.data.windows import from_parquet, to_parquet
from workflows.models.source import load_tokenizer, resolve_source
from workflows.models.state import ModelState
from workflows.recipe import Data, DataSource
from workflows.stages import check_task
from workflows.steps import digest

TOKENIZER, NAMES = word_tokenizer(), list(LABELS.values())


def source(path, **changes) -> DataSource:
    return DataSource.model_validate(
        {"source": str(path), "text": "sentence", "label": "label", "length": 16} | changes
    )


def made(path, **changes):
    return labelled_windows("tuning", source(path, **changes), TOKENIZER, NAMES, 0)


def written(tmp_path, name: str, rows: list[dict]):
    path = tmp_path / name
    columns = list(rows[0])
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        between = "," if name.endswith(".csv") else "\t"
        lines = [between.join(columns), *(between.join(str(row[one]) for one in columns) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl", "a.parquet"])
def test_every_kind_of_table_gives_the_same_windows(tmp_path, name):
    rows = [{"sentence": text, "label": label, "kind": kind} for text, label, kind in sentences(20, 0)]
    windows = made(written(tmp_path, name, rows), slice="kind")
    wanted = sorted(rows, key=lambda row: row["kind"])
    assert windows.labels == [row["label"] for row in wanted]
    assert windows.slices == [row["kind"] for row in wanted]
    for tokens, row in zip(windows.tokens, wanted, strict=True):
        assert tokens.tolist() == TOKENIZER(row["sentence"])["input_ids"]


def test_names_and_numbers_of_classes_mean_the_same(tmp_path):
    rows = [{"sentence": "bright1", "label": label} for label in ("sunny", "1", "gloomy", "0")]
    assert made(written(tmp_path, "a.tsv", rows)).labels == [1, 1, 0, 0]


def test_names_that_look_like_numbers_are_names(tmp_path):
    path = written(tmp_path, "a.tsv", [{"sentence": "bright1", "label": "1"}])
    windows = labelled_windows("tuning", source(path), TOKENIZER, ["1", "0"], 0)
    assert windows.labels == [0]


def test_long_sentences_are_cut_off_and_keep_their_last_token(tmp_path):
    path = written(tmp_path, "a.tsv", [{"sentence": " ".join(["plain0"] * 40), "label": 1}])
    (tokens,) = made(path, length=8).tokens
    assert tokens.tolist() == TOKENIZER(" ".join(["plain0"] * 6))["input_ids"]


def test_windows_come_back_from_the_store_as_they_were(tmp_path):
    windows = made(write_sentences(tmp_path / "a.tsv", 30), slice="kind", windows=9)
    content = to_parquet({"tuning": windows, "evaluation": windows})
    found = from_parquet(content)["evaluation"]
    assert to_parquet({"tuning": windows, "evaluation": found}) == content
    assert (found.labels, found.slices) == (windows.labels, windows.slices)
    assert all(np.array_equal(a, b) for a, b in zip(found.tokens, windows.tokens, strict=True))
    part = found.part(2, 5)
    assert part.labels == found.labels[2:5]
    assert int(part.wanted(0)) == found.labels[2]


def test_a_sentence_of_one_role_is_in_no_other(tmp_path):
    rows = [{"sentence": text, "label": label} for text, label, _ in sentences(30, 0)]
    path = written(tmp_path, "a.tsv", rows + rows[:10] + rows[25:])
    roles = {
        "calibration": {"part": [0, 0.4], "windows": 8},
        "tuning": {"part": [0.4, 0.7]},
        "evaluation": {"part": [0.7, 1]},
    }
    fields = source(path).model_dump()
    data = Data.model_validate({role: fields | own for role, own in roles.items()} | {"shards": 2})
    windows = build_labelled(data, TOKENIZER, NAMES, 0)
    held = {role: {row.tobytes() for row in one.tokens} for role, one in windows.items()}
    assert not held["evaluation"] & (held["calibration"] | held["tuning"])
    assert not held["calibration"] & held["tuning"]
    assert len(windows["calibration"].tokens) == 8


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize("label", ["happy", "2", "-1", "1.0"])
def test_a_label_that_the_model_does_not_know(tmp_path, name, label):
    path = written(tmp_path, name, [{"sentence": "bright1", "label": "1"}, {"sentence": "dark1", "label": label}])
    place = "line 2" if name.endswith("jsonl") else "row 2"
    with pytest.raises(InputError) as refused:
        made(path)
    told = refused.value.message
    assert told.startswith(f"data.tuning: {path}: {place}: 'label': '{label}' is none of the model's classes:")
    assert told.endswith("0 (gloomy), 1 (sunny)")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "sentence\tlabel\n\t1\n", "row 1: 'label': '1' is given to an empty text"),
        ("a.tsv", "text\tlabel\nx\t1\n", "no column 'sentence'; there are: text, label"),
        ("a.tsv", "sentence\tclass\nx\t1\n", "no column 'label'; there are: sentence, class"),
        ("a.tsv", "sentence\tlabel\nx\n", "no readable TSV"),
        ("a.tsv", b"sentence\tlabel\n\xff\t1\n", "no readable TSV"),
        ("a.tsv", "", "no readable TSV"),
        ("a.csv", 'sentence,label\n"x,1\n', "a.csv"),
        ("a.tsv", "sentence\tlabel\n", "holds no text"),
        ("a.jsonl", '{"sentence": "x", "label": true}\n', "line 1: 'label' holds a bool"),
        ("a.jsonl", '{"sentence": "x", "label": 0.5}\n', "line 1: 'label' holds a float"),
        ("a.jsonl", '{"sentence": "x", "label": null}\n', "line 1: 'label' holds a NoneType"),
        ("a.jsonl", '{"sentence": "x"}\n', "line 1: no field 'label'; there are: sentence"),
        ("a.jsonl", '{"sentence": "x", "label": 7}\n', "line 1: 'label': 7 is none of the model's classes"),
        ("a.txt", "x\n", "a text file has no column for labels"),
    ],
)
def test_bad_tables_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as refused:
        made(path)
    assert refused.value.message.startswith("data.tuning: ")
    assert name in refused.value.message
    assert message in refused.value.message


def test_numbers_that_are_no_labels_and_too_few_sentences(tmp_path):
    path = written(tmp_path, "a.parquet", [{"sentence": "x", "label": 0.5}])
    with pytest.raises(InputError, match="'label' holds double, not text"):
        made(path)
    with pytest.raises(InputError, match=r"data\.tuning: .* gives 5 sentences that no other role holds, not 6"):
        made(write_sentences(tmp_path / "a.tsv", 5), windows=6)
    with pytest.raises(InputError, match="has no labels"):
        made("builtin:python-docs")


def test_a_table_can_serve_a_language_model_too(tmp_path):
    path = write_sentences(tmp_path / "a.tsv", 5)
    documents = read_documents(DataSource(source=str(path), text="sentence", slice="kind"), "tuning")
    assert [one.text for one in documents] == [text for text, *_ in sentences(5, 2)]


def job(**changes) -> dict:
    part = {"source": "a.tsv", "text": "sentence", "label": "label", "length": 16}
    data = {
        "calibration": part | {"part": [0, 0.3]},
        "tuning": part | {"part": [0.3, 0.6]},
        "evaluation": part | {"part": [0.6, 1]},
    }
    base = {"name": "a", "model": "m", "target": {"pattern": "2:4", "sparsity": 0.5}, "publish": {"to": "/out"}}
    return base | {"data": data} | changes


def test_a_job_is_read_again_as_it_was_written():
    for fields in (job(), job(gates={"accuracy_drop": 0.03}), job(data={})):
        one = Job.model_validate(fields)
        again = parse_job(dump_job(one).decode(), "job.yaml")
        assert again == one
        assert again.run == one.run
    assert "perplexity" not in dump_job(Job.model_validate(job())).decode()


def test_data_of_language_models_keep_their_step_keys():
    one = Job.model_validate(job(data={}))
    assert digest({"data": one.data})[:12] == "e3604f8746c8"
    assert not {"accuracy_drop", "label"} & set(str(one.model_dump()).split("'"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (job(gates={"perplexity_increase": 0.3}), "are for language models"),
        (job(data={}) | {"gates": {"accuracy_drop": 0.1}}, "are for classifiers"),
        (job(gates={"accuracy_drop": 1.5}), "less than or equal to 1"),
        (job(data={"evaluation": job()["data"]["evaluation"]}), "data.calibration names no label"),
    ],
)
def test_gates_and_roles_must_fit(fields, message):
    with pytest.raises(ValidationError, match=message):
        Job.model_validate(fields)


def test_the_data_must_be_what_the_model_needs(tmp_path):
    config = {"architectures": ["BertForSequenceClassification"], "model_type": "bert", "max_position_embeddings": 64}
    bert = ModelState(source="m", source_digest="", config=config, store=str(tmp_path))
    llama = bert.model_copy(update={"config": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}})
    labelled, text = (Job.model_validate(fields).recipe for fields in (job(), job(data={})))
    check_task(bert, labelled)
    check_task(llama, text)
    with pytest.raises(InputError, match=r"data\.evaluation\.label: LlamaForCausalLM is a language model"):
        check_task(llama, labelled)
    with pytest.raises(InputError, match=r"data\.evaluation\.label: BertForSequenceClassification is a classifier"):
        check_task(bert, text)
    short = bert.model_copy(update={"config": config | {"max_position_embeddings": 12}})
    with pytest.raises(InputError, match=r"data\.calibration\.length: 16 tokens, but the model has positions for 12"):
        check_task(short, labelled)


def test_a_tenants_gates_for_classifiers():
    tenant = Tenant(members=("*",), prefixes=("/out",), gates={"accuracy_drop": 0.02, "perplexity_increase": 0.05})
    one = with_gates(Job.model_validate(job()), tenant)
    assert (one.gates.accuracy_drop, one.gates.perplexity_increase) == (0.02, 0.1)
    with pytest.raises(InputError, match=r"gates\.accuracy_drop: 0\.03 is looser than tenant default allows \(0\.02\)"):
        with_gates(Job.model_validate(job(gates={"accuracy_drop": 0.03})), tenant)
    text = with_gates(Job.model_validate(job(data={})), tenant)
    assert (text.gates.accuracy_drop, text.gates.perplexity_increase) == (None, 0.05)


def test_a_vocabulary_without_a_tokenizer_file_is_enough(tmp_path):
    model = write_tiny_classifier(tmp_path / "model")
    (model / "tokenizer.json").unlink()
    words = sorted(TOKENIZER.get_vocab().items(), key=lambda one: one[1])
    (model / "vocab.txt").write_text("".join(f"{word}\n" for word, _ in words))
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    found = load_tokenizer(resolve_source(str(model), tmp_path / "cache"))
    assert found("bright1 dark2")["input_ids"] == TOKENIZER("bright1 dark2")["input_ids"]
