"""Sources and windows: deterministic, never overlapping, with errors that name field, file and line."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import byte_tokenizer

from cluster.errors import InputError
from cluster.storage import open_store
from workflows.data.sources import fingerprint, read_documents
from workflows.data.windows import (
    Windows,
    build_all,
    build_windows,
    check_disjoint,
    check_known,
    choose,
    from_parquet,
    to_parquet,
)
from workflows.recipe import Data, DataSource

DOCS = "builtin:python-docs"
TOKENIZER = byte_tokenizer()


def write(tmp_path, name, rows):
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
def test_columns_and_slices(tmp_path, name):
    rows = [{"body": f"text {i}", "channel": "web" if i % 2 else "phone"} for i in range(4)]
    source = DataSource(source=write(tmp_path, name, rows), text="body", slice="channel")
    documents = read_documents(source, "evaluation")
    assert [one.text for one in documents] == [f"text {i}" for i in range(4)]
    assert [one.slice for one in documents] == ["phone", "web", "phone", "web"]
    assert {one.slice for one in read_documents(source.model_copy(update={"slice": None}), "x")} == {"all"}


def test_a_source_on_s3_reads_like_a_file(store):
    store.put("in/data.jsonl", b'{"text": "hello"}\n')
    source = DataSource(source=f"{store.uri}/in/data.jsonl")
    assert read_documents(source, "tuning")[0].text == "hello"


def test_text_files_are_read_by_paragraph(tmp_path):
    (tmp_path / "a.txt").write_text("one\nstill one\n\ntwo\n\n\n\nthree")
    documents = read_documents(DataSource(source=str(tmp_path / "a.txt")), "x")
    assert [one.text.strip() for one in documents] == ["one\nstill one", "two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl: line 2 is no JSON"),
        ("a.jsonl", b'{"other": "x"}\n', r"line 1: no field 'text'; there are: other"),
        ("a.jsonl", b'{"text": 5}\n', r"line 1: 'text' holds a int"),
        ("a.jsonl", b"[1]\n", r"line 1 is no JSON object"),
        ("a.txt", b"\xff\xfe", r"no UTF-8"),
        ("a.txt", b"\n\n  \n", r"holds no text"),
        ("a.parquet", b"PAR1nonsense", r"no readable Parquet"),
        ("a.docx", b"x", r"Known: \.txt, \.jsonl, \.parquet"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"data\.tuning: .*{message}"):
        read_documents(DataSource(source=str(tmp_path / name)), "tuning")


def test_missing_file_and_column(tmp_path):
    with pytest.raises(InputError, match="is not there"):
        read_documents(DataSource(source=str(tmp_path / "no.jsonl")), "x")
    path = write(tmp_path, "a.parquet", [{"body": "x"}])
    with pytest.raises(InputError, match="no column 'text'; there are: body"):
        read_documents(DataSource(source=path), "x")


def test_parts_of_the_built_in_documentation_share_no_paragraph_and_hold_every_slice():
    parts = [(0.0, 0.2), (0.2, 0.8), (0.8, 1.0)]
    read = [read_documents(DataSource(source=DOCS, part=part, slice="kind"), "x") for part in parts]
    texts = [{one.text for one in documents} for documents in read]
    assert not (texts[0] & texts[1])
    assert not (texts[0] & texts[2])
    assert not (texts[1] & texts[2])
    assert all({one.slice for one in documents} == {"statements", "types", "language"} for documents in read)


def test_windows_have_exact_length_begin_with_bos_and_hold_the_text():
    source = DataSource(source=DOCS, part=(0.0, 0.1), length=64, windows=10, slice="kind")
    windows = build_windows("calibration", source, TOKENIZER, seed=0)
    assert windows.tokens.shape == (10, 64)
    assert windows.tokens.dtype == np.int32
    assert set(windows.tokens[:, 0]) == {TOKENIZER.bos_token_id}
    text = "".join(one.text + "\n\n" for one in read_documents(source, "x") if one.slice == windows.slices[0])
    assert TOKENIZER.decode(windows.tokens[0][1:]) in text
    assert len(set(windows.slices)) == 3


def test_the_same_recipe_always_gives_the_same_bytes():
    data = Data.model_validate(
        {
            "calibration": {"source": DOCS, "part": [0, 0.2], "windows": 8, "length": 32},
            "tuning": {"source": DOCS, "part": [0.2, 0.5], "length": 128},
            "evaluation": {"source": DOCS, "part": [0.8, 1], "windows": 8, "length": 32, "slice": "kind"},
        }
    )
    first, second = (to_parquet(build_all(data, TOKENIZER, seed=3)) for _ in range(2))
    assert first == second
    assert to_parquet(build_all(data, TOKENIZER, seed=4)) != first
    back = from_parquet(first)
    assert set(back) == {"calibration", "tuning", "evaluation"}
    assert back["evaluation"].tokens.shape == (8, 32)


def test_too_little_text_says_how_much_there_is(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(InputError, match="gives 0 windows of 64 tokens"):
        build_windows("tuning", DataSource(source=str(tmp_path / "a.txt"), length=64), TOKENIZER, 0)


def test_the_same_content_under_two_names_is_refused(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("some text that repeats. " * 50)
    sources = {"calibration": "a.txt", "tuning": "b.txt"}
    roles = {role: {"source": str(tmp_path / name), "length": 32} for role, name in sources.items()}
    data = Data.model_validate({**roles, "evaluation": {"source": DOCS, "length": 32, "windows": 4}})
    with pytest.raises(InputError, match=r"data\.calibration .* and data\.tuning .* same content"):
        build_all(data, TOKENIZER, 0)


def test_windows_that_two_roles_share_are_refused():
    one = build_windows("x", DataSource(source=DOCS, length=32, windows=3), TOKENIZER, 0)
    with pytest.raises(InputError, match="share 3 windows"):
        check_disjoint({"calibration": one, "evaluation": one})


def test_a_word_that_the_model_does_not_know_is_refused_where_a_text_uses_it():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["the"])  # the models' embedding stays as it is
    source = DataSource(source=DOCS, length=32, windows=50)
    windows = {"calibration": build_windows("calibration", source, tokenizer, 0)}
    with pytest.raises(InputError, match=rf"data\.calibration: holds token {len(TOKENIZER)} \('the'\)"):
        check_known(windows, len(TOKENIZER), tokenizer)
    check_known(windows, len(tokenizer), tokenizer)
    check_known({"calibration": build_windows("calibration", source, TOKENIZER, 0)}, len(TOKENIZER), tokenizer)


def test_a_changed_file_is_other_data(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    source = DataSource(source=str(tmp_path / "a.txt"))
    before = fingerprint(source)
    (tmp_path / "a.txt").write_text("two")
    assert fingerprint(source) != before


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=2), st.integers(0, 20), min_size=1),
    st.data(),
    st.integers(0, 9),
)
def test_choice_is_exact_fair_and_without_repeats(available, data, seed):
    wanted = data.draw(st.integers(0, sum(available.values())))
    chosen = choose(available, wanted, seed)
    assert sum(map(len, chosen.values())) == wanted
    for label, rows in chosen.items():
        assert len(set(rows)) == len(rows)
        assert all(0 <= row < available[label] for row in rows)
        others = [len(chosen[other]) for other in available]
        assert len(rows) >= min(available[label], min(others))


@given(slices=st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
def test_the_first_few_windows_in_turn_are_of_as_many_slices_as_can_be(slices):
    numbers = Windows(tokens=np.zeros((len(slices), 2), dtype=np.int32), slices=slices).in_turn()
    assert sorted(numbers) == list(range(len(slices)))
    for few in range(len(slices) + 1):
        assert len({slices[one] for one in numbers[:few]}) == min(few, len(set(slices)))
    assert len(set(slices)) > 1 or numbers == list(range(len(slices)))


def test_store_layout_is_readable_elsewhere(tmp_path):
    one = build_windows("x", DataSource(source=DOCS, length=32, windows=3), TOKENIZER, 0)
    stored = open_store(str(tmp_path)).put("w.parquet", to_parquet({"tuning": one}))
    assert pq.read_table(tmp_path / stored.key).column_names == ["role", "slice", "tokens"]
