"""The saliency table of a tiny model, made as the lines of it say: statistics, a pass back, scores, a file to query."""

import io

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from test_importance import LENGTH, WINDOWS, make_pass, walked

from cluster.storage import open_store
from workflows.models.checkpoint import Checkpoint
from workflows.score_table import LinearScore, rows_of_head, score_linear, table, write_table
from workflows.scoring.gram import add_inputs, mirror
from workflows.scoring.saliency import composite, inverse_diagonal

LAYERS = 2
DAMPING = 0.01


def grams_of(work) -> list[dict[str, torch.Tensor]]:
    """Gram of every linear of every block, by its group."""
    decoder, found = work._decoder, []
    windows = decoder.embed(work._tokens)
    for block in range(work.block_count):
        module = decoder.block(block)
        grams = {one.group: torch.zeros(one.columns, one.columns) for one in decoder.linears(block)}
        for name, gram in grams.items():
            module.get_submodule(name).register_forward_pre_hook(lambda _, a, gram=gram: add_inputs(gram, a[0]))
        with torch.no_grad():
            windows = [decoder.run(block, module, hidden) for hidden in windows]
        found.append({one.name: mirror(grams[one.group]) for one in decoder.linears(block)})
    return found


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    work = make_pass(tmp_path_factory.mktemp("scores"), "gemma3", layers=LAYERS)
    importance, grams = walked(work), grams_of(work)
    scores: dict[tuple[int, str], LinearScore] = {}
    for block in range(LAYERS):
        weights = dict(Checkpoint(work.before).read_block(block))
        for name, gram in grams[block].items():
            scores[block, name] = score_linear(
                block,
                name,
                weights[f"{name}.weight"],
                importance.gammas[block][name],
                inverse_diagonal(gram, DAMPING),
                gram.trace().item(),
                rows_of_head(name, work.before.config),
            )
    return work, importance, grams, scores


def test_the_table_of_a_stage(scored):
    work, importance, grams, scores = scored
    made = table(
        [row for one in scores.values() for row in one.rows], importance.tokens, WINDOWS * (LENGTH - 1), importance.loss
    )
    store = open_store(work.before.store)
    stored = write_table(store, "runs/one", 1, made)
    assert stored.key == "runs/one/scores/1.parquet"
    assert write_table(store, "runs/one", 1, made) == stored, "the same table gave other bytes"
    read = pq.read_table(io.BytesIO(store.get(stored.key)))
    assert read.schema.metadata[b"tokens"] == b"288"
    assert float(read.schema.metadata[b"loss"]) == importance.loss

    linears = read.filter(pc.is_null(read["part"])).to_pylist()
    assert [(row["block"], row["linear"]) for row in linears] == list(scores)
    for row in linears:
        block, name = row["block"], row["linear"]
        weight = Checkpoint(work.before).read(f"model.layers.{block}.{name}.weight")
        gamma, gram = importance.gammas[block][name], grams[block][name]
        values = composite(weight, gamma, inverse_diagonal(gram, DAMPING)).double().flatten()
        assert (row["row_stop"], row["columns"]) == weight.shape
        assert row["weights"] == weight.numel()
        assert row["gram_trace"] == pytest.approx(gram.trace().item())
        assert row["gamma_mean"] == pytest.approx(gamma.mean().item())
        assert row["gamma_q100"] == row["gamma_max"] == gamma.max().item()
        assert row["gamma_q50"] == pytest.approx(gamma.double().quantile(0.5).item())
        assert row["saliency_total"] == pytest.approx(values.sum().item())
        assert row["saliency_q00"] == values.min().item()
        assert row["saliency_q100"] == values.max().item()
        assert row["saliency_q50"] == pytest.approx(values.quantile(0.5).item(), rel=0.01)
        assert row["lowest_50"] == pytest.approx(values.sort().values[: len(values) // 2].sum().item(), rel=0.01)

    parts = read.filter(pc.is_valid(read["part"])).to_pylist()
    heads = [row for row in parts if (row["block"], row["linear"]) == (0, "self_attn.q_proj")]
    assert [(row["row_start"], row["row_stop"]) for row in heads] == [(0, 16), (16, 32), (32, 48), (48, 64)]
    for row in linears:
        own = [one for one in parts if (one["block"], one["linear"]) == (row["block"], row["linear"])]
        assert sum(one["saliency_total"] for one in own) == pytest.approx(row["saliency_total"])
        assert sum(one["weights"] for one in own) == row["weights"]
        assert [one["part"] for one in own] == list(range(len(own)))


def test_rows_that_no_64_divides_are_all_scored():
    weight = torch.randn(130, 8, generator=torch.Generator().manual_seed(0))
    gamma, inverse = torch.ones(130), torch.ones(8)
    found = score_linear(0, "mlp.up_proj", weight, gamma, inverse, 1.0)
    parts = found.rows[1:]
    assert [row["row_start"] for row in parts] == list(range(0, 130, 3))
    assert parts[-1]["row_stop"] == 130
    assert found.spread.count == weight.numel()
    assert found.rows[0]["saliency_total"] == pytest.approx((weight.double().square() / 2).sum().item(), rel=1e-6)


def test_one_threshold_over_all_linears_meets_a_share(scored):
    """What a global allocation does with the spreads: the same threshold everywhere, the shares as they come."""
    *_, scores = scored
    low, high = 0.0, max(one.spread.largest for one in scores.values())
    total = sum(one.spread.count for one in scores.values())
    for _ in range(60):
        middle = (low + high) / 2
        gone = sum(one.spread.share_below(middle) * one.spread.count for one in scores.values())
        low, high = (middle, high) if gone < total / 2 else (low, middle)
    assert gone / total == pytest.approx(0.5, abs=0.01)
    shares = [one.spread.share_below(middle) for one in scores.values()]
    assert np.ptp(shares) > 0.1, "linears of this model differ"


def test_heads_are_known_from_the_config():
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
    assert rows_of_head("self_attn.k_proj", config) == 16
    assert rows_of_head("self_attn.q_proj", config | {"head_dim": 32}) == 32
    assert rows_of_head("mlp.up_proj", config) is None
    assert rows_of_head("attention.self.value", config | {"model_type": "bert"}) == 16
