"""Streamed divergences are those of whole models, whoever is asked together; what is equal is computed once."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import write_tiny_model

from cluster.errors import InputError
from cluster.session import session
from cluster.spec import ClusterSpec
from cluster.storage import open_store
from workflows.data.windows import Windows, to_parquet
from workflows.divergence import Candidate, Divergence, divergences, judge
from workflows.level_files import LevelFile, level_file
from workflows.models.checkpoint import Checkpoint, block_file
from workflows.models.decoder import Decoder
from workflows.models.state import ModelState
from workflows.models.whole import load_model
from workflows.scoring.kl import divergence

LENGTH, WINDOWS, BLOCKS, STRIDE = 48, 4, 3, 5  # longer than the tiny models' sliding window; 48 is no multiple of 5
SHARES = (0.0, 0.3, 0.7)  # zeros at each level; the first is the model's own weight
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
DENSE = ({},) * BLOCKS


def with_zeros(weight: torch.Tensor, share: float) -> torch.Tensor:
    order = weight.abs().flatten().argsort()
    pruned = weight.flatten().clone()
    pruned[order[: int(share * len(order))]] = 0
    return pruned.view_as(weight)


def make_work(tmp_path, family="llama", dtype="float32") -> Divergence:
    directory = write_tiny_model(tmp_path / "model", family, layers=BLOCKS, dtype="float32")
    config = json.loads((directory / "config.json").read_text())
    store = open_store(str(tmp_path / "store"))
    tokens = np.random.default_rng(0).integers(4, config["vocab_size"], (WINDOWS, LENGTH)).astype(np.int32)
    windows = store.put("windows", to_parquet({"calibration": Windows(tokens=tokens, slices=["all"] * WINDOWS)}))
    before = ModelState(source=str(directory), source_digest="0" * 64, config=config, store=store.uri)
    levels = []
    for block in range(BLOCKS):
        own = dict(Checkpoint(before).read_block(block))
        pruned = {
            (linear, level): with_zeros(own[f"{linear}.weight"], share)
            for linear in LINEARS
            for level, share in enumerate(SHARES)
        }
        levels.append(store.put(f"levels/{block:05d}.safetensors", level_file(pruned)))
    return with_predictions(Divergence(before, windows.key, 1, dtype, "cpu", 1, STRIDE, tuple(levels), {}))


def with_predictions(work: Divergence) -> Divergence:
    kept = work.keep(range(WINDOWS), f"predicted-{work.dtype}")
    return replace(work, predicted=dict(enumerate(kept)))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make_work(tmp_path_factory.mktemp("divergence"))


def log_probabilities(work: Divergence, candidate: Candidate) -> torch.Tensor:
    """Of the whole model, whose blocks were written anew with the candidate's linears: [windows, length, words]."""
    store = open_store(work.before.store)
    blocks = []
    for block, plan in enumerate(candidate):
        tensors = dict(Checkpoint(work.before).read_block(block))
        for linear, level in plan.items():
            tensors[f"{linear}.weight"] = LevelFile(store, work.levels[block].key).read(linear, level)
        blocks.append(store.put(f"reference/{block}", block_file(f"model.layers.{block}.", tensors)))
    model = load_model(work.before.model_copy(update={"blocks": tuple(blocks)}), torch.float32)
    with torch.no_grad():
        return model(work._tokens, use_cache=False).logits.double().log_softmax(-1)


def reference(work: Divergence, candidate: Candidate) -> np.ndarray:
    """[windows]"""
    dense, own = (log_probabilities(work, one)[:, STRIDE - 1 :: STRIDE] for one in (DENSE, candidate))
    assert dense.shape[1] == LENGTH // STRIDE
    return (dense.exp() * (dense - own)).sum((1, 2)).numpy()


MIXED = (
    {"self_attn.q_proj": 2, "mlp.down_proj": 1},
    {},
    {"mlp.gate_proj": 2, "self_attn.o_proj": 1},
)
LATE = ({}, {}, {"mlp.down_proj": 2})
EVERYTHING = ({linear: 2 for linear in LINEARS},) * BLOCKS


# Untied and tied embeddings, full and sliding attention, and (gemma2) capped logits.
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3"])
def test_streamed_divergences_are_those_of_whole_models(tmp_path, monkeypatch, family):
    monkeypatch.setattr("workflows.models.decoder.HEAD_PIECE", 64 * 100)  # so that the tiny head has several pieces
    work = make_work(tmp_path, family)
    found = work.of(range(WINDOWS), [MIXED, LATE, EVERYTHING])
    wanted = np.stack([reference(work, one) for one in (MIXED, LATE, EVERYTHING)], axis=1)
    assert found.shape == (WINDOWS, 3)
    assert wanted.min() > 0
    np.testing.assert_allclose(found, wanted, rtol=1e-3)


def test_bfloat16_is_close(work):
    low = with_predictions(replace(work, dtype="bfloat16"))
    rough, fine = (one.of(range(WINDOWS), [EVERYTHING]).sum() for one in (low, work))
    assert rough == pytest.approx(fine, rel=0.1)


def test_the_model_itself_is_at_distance_zero_and_so_is_one_made_of_its_own_weights(work):
    copied = ({linear: 0 for linear in LINEARS},) * BLOCKS
    assert (work.of(range(WINDOWS), [DENSE, copied, LATE]) > 0).tolist() == [[False, False, True]] * WINDOWS
    assert not work.of(range(WINDOWS), [DENSE, copied]).any()


PLANS = st.dictionaries(st.sampled_from(LINEARS), st.sampled_from(range(len(SHARES))), max_size=2)
CANDIDATES = st.lists(st.tuples(*[PLANS] * BLOCKS), min_size=1, max_size=5)


@settings(deadline=None, max_examples=8)
@given(CANDIDATES, st.lists(st.sampled_from(range(WINDOWS)), min_size=1, unique=True))
def test_asked_together_or_alone_each_has_the_same_bits(work, candidates, windows):
    together = work.of(windows, candidates)
    for number, candidate in enumerate(candidates):
        for row, window in enumerate(windows):
            assert work.of([window], [candidate]).item() == together[row, number]


@pytest.fixture
def seen(monkeypatch):
    """Blocks that were run, and level matrices that were read."""
    run, read, counts = Decoder.run, LevelFile.read, (Counter(), Counter())

    def counted_run(self, index, block, hidden):
        counts[0][index] += len(hidden)
        return run(self, index, block, hidden)

    def counted_read(self, linear, level):
        counts[1][self._key, linear, level] += 1
        return read(self, linear, level)

    monkeypatch.setattr(Decoder, "run", counted_run)
    monkeypatch.setattr(LevelFile, "read", counted_read)
    return counts


def test_a_candidate_that_differs_in_the_last_block_runs_no_other(work, seen):
    work.of(range(WINDOWS), [LATE, DENSE])
    assert seen[0] == {0: WINDOWS, 1: WINDOWS, 2: 2 * WINDOWS}
    assert list(seen[1]) == [(work.levels[2].key, "mlp.down_proj", 2)]


def test_what_candidates_share_is_run_once_and_no_matrix_is_read_twice(work, seen):
    first = {"self_attn.q_proj": 1, "mlp.down_proj": 2}
    candidates = [
        (first, {}, {}),
        (dict(reversed(first.items())), {}, {"mlp.down_proj": 1}),
        ({"self_attn.q_proj": 1}, {}, {"mlp.down_proj": 1}),
    ]
    work.of(range(WINDOWS), candidates)
    tracks = {0: 2, 1: 2, 2: 3}
    assert seen[0] == {block: WINDOWS * count for block, count in tracks.items()}
    assert len(seen[1]) == 3
    assert set(seen[1].values()) == {1}


@pytest.mark.parametrize("stride", [0, LENGTH + 1])
def test_a_stride_that_judges_nothing_is_refused(work, stride):
    with pytest.raises(InputError, match=f"from 1 to {LENGTH}"):
        replace(work, stride=stride).of([0], [LATE])


@pytest.mark.slow
def test_the_number_of_workers_changes_no_bit(work):
    candidates = [MIXED, LATE, DENSE, EVERYTHING]
    alone = judge(work, range(3), candidates)
    told = []
    with session(ClusterSpec(), cpus=4):
        found = [
            divergences(
                work, candidates, ClusterSpec(workers=workers), range(3), lambda: False, lambda *of: told.append(of)
            )
            for workers in (1, 3, 8)
        ]
    assert all(np.array_equal(one, found[0]) for one in found)
    np.testing.assert_allclose(found[0], alone.sum(0) / (3 * (LENGTH // STRIDE)), rtol=1e-12)
    # alone; a window each; candidates in two parts, too
    assert told == [(done, count) for count in (1, 3, 6) for done in range(1, count + 1)]


def random_states(
    seed: int, spread: float, words: int = 50, count: int = 3, tokens: int = 7
) -> tuple[torch.Tensor, ...]:
    """Head [words, 16], dense states, and states of candidates that differ from them by so much."""
    random = torch.Generator().manual_seed(seed)
    head = torch.randn(words, 16, generator=random)
    dense = torch.randn(tokens, 16, generator=random)
    return head, dense, dense + spread * torch.randn(count, tokens, 16, generator=random)


def in_double_precision(dense, candidates, head, cap=None) -> torch.Tensor:
    def log_softmax(states):
        logits = states.double() @ head.double().mT
        return (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)

    return (log_softmax(dense).exp() * (log_softmax(dense) - log_softmax(candidates))).sum((1, 2))


@given(
    st.integers(0, 1000),
    st.sampled_from([1e-4, 1e-2, 1.0, 30.0]),
    st.sampled_from([None, 5.0]),
    st.integers(1, 50),
    st.integers(1, 500),
)
def test_divergence_is_that_of_double_precision(seed, spread, cap, rows, at_once):
    """From next to nothing up to hundreds of nats, however the head is cut, however many tokens are taken at once."""
    head, dense, candidates = random_states(seed, spread)
    found = divergence(dense, list(candidates), head.split(rows), cap, at_once)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, in_double_precision(dense, candidates, head, cap), rtol=1e-3, atol=7 * 1e-7)


def test_small_divergences_over_many_words_drown_in_no_rounding():
    """They are 1e-6 nats a token, as much as the normaliser of an fp32 log-softmax is off."""
    head, dense, candidates = random_states(0, 4e-4, words=100_000)
    for one in candidates.unbind(0):
        for token in range(7):
            case = (dense[token : token + 1], one[None, token : token + 1], head)
            torch.testing.assert_close(
                divergence(case[0], case[1], [head]), in_double_precision(*case), rtol=0.1, atol=0
            )


def test_the_head_is_cast_to_the_type_of_the_states():
    head, dense, candidates = random_states(0, 0.3)
    low = head.bfloat16()
    assert torch.equal(divergence(dense, candidates, [low]), divergence(dense, candidates, [low.float()]))
    rough = divergence(dense.bfloat16(), candidates.bfloat16(), [head])
    torch.testing.assert_close(rough, divergence(dense, candidates, [head]), rtol=0.1, atol=0)


def test_a_candidate_that_broke_is_not_finite_and_harms_no_other():
    head, dense, candidates = random_states(0, 0.3)
    alone = divergence(dense, [candidates[1]], [head])
    candidates[0, 3, 2] = float("inf")
    broken, whole, _ = divergence(dense, list(candidates), [head])
    assert not broken.isfinite()
    assert whole == alone
