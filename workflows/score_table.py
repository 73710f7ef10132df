"""The saliency table of a stage, runs/<run>/scores/<stage>.parquet: what each linear is worth, for a person to query.

One row for every linear of every block (`part` is null), and one for every part of its rows (`part` 0, 1, …): for q,
k and v a part is an attention head, else a 64th of the rows. Both kinds have the same columns:

    block, linear, part     which; linear as in "mlp.down_proj"
    row_start, row_stop     rows (outputs) of the linear that are meant
    columns                 inputs of the linear
    weights                 weights meant: rows x columns
    gram_trace              sum over calibration tokens of the input's squared norm, times the token's weight where
                            tokens are weighed (the linear's, also for parts)
    gamma_mean              of Γ over the rows; Γ is a mean over tokens, see `workflows.importance`
    gamma_max, gamma_qNN    largest, and quantiles over the rows
    saliency_total          sum of s_oi over the weights, `workflows.scoring.saliency`
    saliency_qNN            quantiles of s_oi: NN percent of the weights lie below; within 0.4 %, 0 and 100 exact
    lowest_NN               sum of s_oi of the lowest NN percent: about what removing them costs

Saliencies are in nats, summed over the calibration tokens. The file's metadata say how many there were (`tokens`,
`predicted`) and what the loss was over them (`loss`). For example, with DuckDB, the linears that give most cheaply:

    SELECT block, linear, lowest_50 / weights AS cost FROM 'scores/1.parquet' WHERE part IS NULL ORDER BY cost
"""

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from cluster.storage import Store, Stored
from workflows.models.families import family_of
from workflows.scoring.saliency import composite
from workflows.scoring.spread import Spread

QUANTILES = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100)  # percent
LOWEST = (10, 20, 30, 40, 50, 60, 70, 80, 90)
PARTS = 64

SCHEMA = pa.schema(
    [
        pa.field("block", pa.int32(), nullable=False),
        pa.field("linear", pa.string(), nullable=False),
        pa.field("part", pa.int32()),
        pa.field("row_start", pa.int32(), nullable=False),
        pa.field("row_stop", pa.int32(), nullable=False),
        pa.field("columns", pa.int32(), nullable=False),
        pa.field("weights", pa.int64(), nullable=False),
        *(
            pa.field(name, pa.float64(), nullable=False)
            for name in (
                "gram_trace",
                "gamma_mean",
                "gamma_max",
                *(f"gamma_q{one:02d}" for one in QUANTILES),
                "saliency_total",
                *(f"saliency_q{one:02d}" for one in QUANTILES),
                *(f"lowest_{one}" for one in LOWEST),
            )
        ),
    ]
)


@dataclass(frozen=True)
class LinearScore:
    """One linear's lines of the table, and the spread of its saliencies, from which an allocation takes thresholds."""

    rows: list[dict[str, Any]]
    spread: Spread


def score_linear(
    block: int,
    linear: str,
    weight: Tensor,
    gamma: Tensor,
    inverse: Tensor,
    gram_trace: float,
    head_rows: int | None = None,
) -> LinearScore:
    """Scores one linear; saliencies are held for one part of its rows at a time.

    Args:
        block: number of the block.
        linear: as in "mlp.down_proj".
        weight: [out, in] as it is before pruning.
        gamma: [out], from `workflows.importance`.
        inverse: [in], diagonal of H⁻¹, from `workflows.scoring.saliency.inverse_diagonal`.
        gram_trace: trace of the undamped Gram.
        head_rows: rows of an attention head; None when this linear has no heads among its rows, see `rows_of_head`.

    Raises:
        ValueError: a saliency is not finite.
    """
    height = head_rows or -(-len(weight) // PARTS)
    spreads, rows = [], []
    for part, start in enumerate(range(0, len(weight), height)):
        stop = min(start + height, len(weight))
        spreads.append(Spread.of(composite(weight[start:stop], gamma[start:stop], inverse)))
        rows.append({"part": part, "row_start": start, "row_stop": stop} | _numbers(gamma[start:stop], spreads[-1]))
    whole = Spread.joined(spreads)
    rows.insert(0, {"part": None, "row_start": 0, "row_stop": len(weight)} | _numbers(gamma, whole))
    shared = {"block": block, "linear": linear, "columns": weight.shape[1], "gram_trace": float(gram_trace)}
    return LinearScore([shared | row for row in rows], whole)


def rows_of_head(linear: str, config: Mapping[str, Any]) -> int | None:
    """Rows of one attention head in q, k and v; None for other linears.

    Args:
        linear: as in "self_attn.q_proj".
        config: the model's config.json.
    """
    if not linear.endswith(family_of(config).by_head):
        return None
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def table(rows: Iterable[Mapping[str, Any]], tokens: int, predicted: int, loss: float) -> pa.Table:
    """All lines, in the order given, with what they rest on as metadata.

    Args:
        rows: of every linear.
        tokens: calibration tokens.
        predicted: how many of them had a loss.
        loss: summed over them, in nats.
    """
    about = {"tokens": str(tokens), "predicted": str(predicted), "loss": repr(loss), "unit": "nats over all tokens"}
    return pa.Table.from_pylist(list(rows), SCHEMA.with_metadata(about))


def write_table(store: Store, root: str, stage: int, scores: pa.Table) -> Stored:
    """Writes a stage's table to <root>/scores/<stage>.parquet; the same table always gives the same bytes.

    Args:
        store: the run's store.
        root: of the run in it, runs/<run>.
        stage: its number, as steps count them.
        scores: from `table`.
    """
    buffer = io.BytesIO()
    pq.write_table(scores, buffer, compression="zstd")
    return store.put(f"{root}/scores/{stage}.parquet", buffer.getvalue())


def _numbers(gamma: Tensor, saliencies: Spread) -> dict[str, Any]:
    """The columns that are counted."""
    shares = [one / 100 for one in QUANTILES]
    by_row = gamma.double().quantile(gamma.new_tensor(shares).double())
    return {
        "weights": saliencies.count,
        "gamma_mean": gamma.double().mean().item(),
        "gamma_max": gamma.max().item(),
        **{f"gamma_q{one:02d}": value.item() for one, value in zip(QUANTILES, by_row, strict=True)},
        "saliency_total": saliencies.total,
        **{f"saliency_q{n:02d}": v for n, v in zip(QUANTILES, saliencies.quantiles(shares).tolist(), strict=True)},
        **{
            f"lowest_{n}": v
            for n, v in zip(LOWEST, saliencies.lowest([one / 100 for one in LOWEST]).tolist(), strict=True)
        },
    }
