"""Encoders' blocks run alone give what the whole classifier gives, bit for bit; foreign files are looked at first."""

import json

import pytest
import safetensors.torch
import torch
from classifiers_for_tests import ENCODERS, LABELS, sentences, word_tokenizer, write_tiny_classifier
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from cluster.errors import InputError
from workflows.models.families import most_tokens
from workflows.models.labels import labels_of
from workflows.models.opening import open_blocks
from workflows.models.source import load_tokenizer, resolve_source
from workflows.models.state import ModelState
from workflows.models.whole import load_model

LONGEST = 16


def state_of(directory) -> ModelState:
    config = json.loads((directory / "config.json").read_text())
    return ModelState(source=str(directory), source_digest="0" * 64, config=config, store=str(directory))


def windows(count: int = 6) -> list[torch.Tensor]:
    return [torch.tensor(one) for one in word_tokenizer()([text for text, *_ in sentences(count, 5)])["input_ids"]]


def through_blocks(blocks, count: int, tokens: list[torch.Tensor]) -> list[torch.Tensor]:
    hidden = blocks.embed(tokens)
    for index in range(count):
        block = blocks.block(index)
        hidden = [blocks.run(index, block, one) for one in hidden]
    return hidden


@pytest.mark.parametrize("family", ENCODERS)
@torch.no_grad()
def test_blocks_alone_equal_the_whole_model_bit_for_bit(tmp_path, family):
    directory = write_tiny_classifier(tmp_path / "model", family, layers=3)
    state, tokens = state_of(directory), windows()
    whole = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    blocks = open_blocks(state, torch.float32, LONGEST, "cpu")
    hidden = through_blocks(blocks, state.block_count, tokens)
    loaded = load_model(state, torch.float32)
    for one, states in zip(tokens, hidden, strict=True):
        seen = whole(one[None], attention_mask=torch.ones_like(one)[None], output_hidden_states=True)
        assert torch.equal(states, seen.hidden_states[-1])
        # On some processors a head's few numbers depend on where its matrices lie in memory: not bit for bit.
        for logits in (blocks.head()._logits(states), loaded(one[None]).logits):
            torch.testing.assert_close(logits, seen.logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ENCODERS)
def test_the_loss_and_its_gradient_are_those_of_the_whole_model(tmp_path, family):
    directory = write_tiny_classifier(tmp_path / "model", family, layers=2)
    state, tokens = state_of(directory), windows(1)
    blocks = open_blocks(state, torch.float32, LONGEST, "cpu")
    (hidden,) = through_blocks(blocks, state.block_count, tokens)
    loss, gradient = blocks.head().loss(hidden, torch.tensor(1))
    whole = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    seen = whole(tokens[0][None], output_hidden_states=True)
    wanted = functional.cross_entropy(seen.logits, torch.tensor([1]))
    (expected,) = torch.autograd.grad(wanted, seen.hidden_states[-1])
    assert loss == pytest.approx(wanted.item(), rel=1e-6)
    assert torch.allclose(gradient, expected, atol=1e-7)
    assert not gradient[0, 1:].any(), "only the first token is read"


def test_the_divergence_is_that_over_the_classes(tmp_path):
    state, tokens = state_of(write_tiny_classifier(tmp_path / "model")), windows(2)
    blocks = open_blocks(state, torch.float32, LONGEST, "cpu")
    assert list(blocks.positions(8)) == [0]
    one, other = (hidden[0, :1] for hidden in through_blocks(blocks, 1, tokens))
    found = blocks.head().divergence(one, [one, other])
    logits = [blocks.head()._logits(states[None]).double().log_softmax(1) for states in (one, other)]
    assert found[0] == 0
    assert found[1].item() == pytest.approx(
        functional.kl_div(logits[1], logits[0], log_target=True, reduction="sum").item(), rel=1e-4
    )


@pytest.mark.parametrize("family", ENCODERS)
def test_linears_that_read_the_same_input_are_found(tmp_path, family):
    state = state_of(write_tiny_classifier(tmp_path / "model", family))
    assert {one.name: one.group for one in open_blocks(state, torch.float32, LONGEST, "cpu").linears(0)} == {
        "attention.self.query": "attention.self.query",
        "attention.self.key": "attention.self.query",
        "attention.self.value": "attention.self.query",
        "attention.output.dense": "attention.output.dense",
        "intermediate.dense": "intermediate.dense",
        "output.dense": "output.dense",
    }


@pytest.mark.parametrize("family", ENCODERS)
def test_a_classifier_is_let_in(tmp_path, family):
    source = resolve_source(str(write_tiny_classifier(tmp_path / "model", family)), tmp_path / "cache")
    assert labels_of(source.config) == list(LABELS.values())
    assert most_tokens(source.config) == (64 if family == "bert" else 63)
    assert len(load_tokenizer(source)) == source.config["vocab_size"]


def test_position_numbers_in_an_older_file_are_passed_over(tmp_path):
    directory = write_tiny_classifier(tmp_path / "model")
    file = directory / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["bert.embeddings.position_ids"] = torch.arange(64)[None]
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    resolve_source(str(directory), tmp_path / "cache")
    load_model(state_of(directory), torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": {"0": "a"}, "label2id": None}, "id2label: 1 classes"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label: it must name"),
        ({"id2label": {"0": "a", "1": "a"}}, "id2label: two classes have one name"),
        ({"id2label": {"0": "a", "1": 5}}, "id2label: a class's name is a text"),
        ({"id2label": ["a", "b"]}, "id2label: it must name"),
        ({"label2id": {"gloomy": 1, "sunny": 0}}, "label2id: it is not id2label"),
        ({"num_labels": 3}, "num_labels: 3, but id2label names 2"),
        ({"num_labels": True}, "num_labels: True is no whole number"),
        ({"problem_type": "regression"}, "problem_type: 'regression' is not covered"),
        ({"is_decoder": True}, "is_decoder: a classifier that is no plain encoder"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type: 'relative_key'"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings: 'many'"),
        ({"max_position_embeddings": 4}, "max_position_embeddings: 4 leaves no room"),
        ({"type_vocab_size": 0}, "type_vocab_size: 0"),
        ({"pad_token_id": 10_000}, "pad_token_id: 10000"),
        ({"num_hidden_layers": 3}, "num_hidden_layers: 3, but the weights have 2 blocks"),
        ({"intermediate_size": 96}, "intermediate.dense"),
        ({"hidden_act": "evil"}, "no model can be built"),
        ({"model_type": "llama"}, "model_type: 'llama'"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_a_wrong_config_is_refused_by_its_field(tmp_path, changes, message):
    directory = write_tiny_classifier(tmp_path / "model")
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as refused:
        resolve_source(str(directory), tmp_path / "cache")
    assert message in refused.value.message
