"""What a model may be, and what is refused before a byte of it is used."""

import io
import json
import pickle
import shutil
import struct
import zipfile

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import FAMILIES, MIXTURES, write_tiny_model

from cluster.errors import InputError, KarikomiError
from workflows.models.safetensors_header import read_header
from workflows.models.source import load_tokenizer, resolve_source


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("good") / "model", layers=1)


@pytest.fixture
def model(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


def edit(model, **changes):
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(config))


def refused(model, message):
    with pytest.raises(InputError, match=message):
        resolve_source(str(model), model.parent / "cache")


@pytest.mark.parametrize("family", FAMILIES + MIXTURES)
def test_every_family_is_covered(tmp_path, family):
    source = resolve_source(str(write_tiny_model(tmp_path / "m", family)), tmp_path)
    assert source.config["num_hidden_layers"] == 2
    assert load_tokenizer(source).decode(load_tokenizer(source)("héllo")["input_ids"]) == "héllo"


def test_digest_follows_content_and_not_place(model, good, tmp_path):
    assert resolve_source(str(model), tmp_path).digest == resolve_source(str(good), tmp_path).digest
    edit(model, rms_norm_eps=1e-4)
    assert resolve_source(str(model), tmp_path).digest != resolve_source(str(good), tmp_path).digest


def test_a_model_on_s3(store, good, tmp_path):
    for file in good.iterdir():
        store.put(f"in/{file.name}", file)
    source = resolve_source(f"{store.uri}/in", tmp_path)
    assert source.digest == resolve_source(str(good), tmp_path).digest
    assert load_tokenizer(source)("a")["input_ids"]


def test_sharded_models(tmp_path):
    sharded = write_tiny_model(tmp_path / "m", layers=3, max_shard_size="100KB")
    source = resolve_source(str(sharded), tmp_path)
    assert len(source.weights) > 1
    source.weights[0].key  # noqa: B018
    (sharded / source.weights[0].key).unlink()
    refused(sharded, "which is missing")


def test_missing_model(tmp_path):
    with pytest.raises(InputError, match="is not there"):
        resolve_source(str(tmp_path / "nothing"), tmp_path)
    with pytest.raises(InputError, match="is not there"):
        resolve_source(str(tmp_path / "nothing.gguf"), tmp_path)


def test_no_network_for_a_hub_id(tmp_path):
    with pytest.raises(KarikomiError, match="hub is out of reach"):
        resolve_source("some-org/some-model", tmp_path)


def test_remote_code_is_refused(model):
    edit(model, auto_map={"AutoModelForCausalLM": "evil.Model"})
    refused(model, r"config\.json: auto_map")


def test_unknown_architecture(model):
    edit(model, architectures=["EvilForCausalLM"])
    refused(model, r"architectures: .*EvilForCausalLM.*covered: BertForSequenceClassification, Gemma2ForCausalLM")


def test_quantised_model(model):
    edit(model, quantization_config={"quant_method": "x"})
    refused(model, "quantization_config")


@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1, "2", 2.5, None, True])
def test_impossible_sizes(model, field, value):
    edit(model, **{field: value})
    refused(model, field)


@pytest.mark.parametrize("text", ["", "[]", '{"a": NaN}', "{" * 5000, "\x00"])
def test_broken_config(model, text):
    (model / "config.json").write_text(text)
    refused(model, r"config\.json")


def test_huge_config(model):
    (model / "config.json").write_text(" " * ((1 << 20) + 1) + "{}")
    refused(model, "too large")


def test_only_pickles(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused(model, r"only pickles \(pytorch_model\.bin\), which can run code")


class Bomb:
    def __reduce__(self):
        return (open, ("/tmp/karikomi-was-here", "w"))


@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_that_calls_itself_safetensors(model, zipped):
    bomb = pickle.dumps(Bomb())
    if zipped:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("archive/data.pkl", bomb)
        bomb = buffer.getvalue()
    (model / "model.safetensors").write_bytes(bomb)
    refused(model, r"model\.safetensors: is a pickle")


def test_missing_tokenizer(model):
    (model / "tokenizer.json").unlink()
    refused(model, "tokenizer.json is missing")


@pytest.mark.parametrize("shard", ["../evil.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin"])
def test_an_index_that_points_elsewhere(model, shard):
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    refused(model, "a shard is a .safetensors file beside it")


def header_file(entries, data=b"", length=None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234",
        header_file({}, length=1 << 62),
        header_file(b"not json"),
        header_file(b"[" * 100_000),
        header_file([]),
        header_file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
        header_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12"),
        header_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"123456"),
        header_file({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}, b""),
        header_file({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"1234"),
        header_file({"a": {"dtype": "OBJ", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        header_file({"a": 5}),
        header_file({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        header_file(
            {
                "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
                "b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]},
            },
            b"123456",
        ),
        header_file(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', b"1"),
    ],
)
def test_lying_headers_are_refused(model, content):
    (model / "model.safetensors").write_bytes(content)
    refused(model, r"model\.safetensors")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_header_is_refused_or_read_but_never_crashes(data):
    content = bytearray(safetensors.torch.save({"a": torch.ones(3, 2), "b": torch.ones(5, dtype=torch.bfloat16)}))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    try:
        header = read_header(lambda start, length: bytes(content[start : start + length]), len(content))
    except InputError:
        return
    assert all(8 <= one.start <= one.end <= len(content) for one in header.tensors.values())
