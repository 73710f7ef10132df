"""Perplexity by solver and pattern, ours beside the peer's: `python benchmarks/quality.py MODEL TEXT [METHOD ...]`.

MODEL is a Hugging Face directory (the demo's converted Gemma-3-270M lies under ~/.cache/karikomi/gguf), TEXT a text
file. The first 32 windows of 512 tokens, each begun by BOS, calibrate; 24 later ones judge. `--others 1` and `2` take
other 32 windows instead, for the second table: how much of a difference is chance. Every result is a line of
build/quality/shown.jsonl and is not measured again; the tables go into benchmarks/quality.md. Methods with an
allocation or with token weights look at the dense model first, on an embedded Ray with two workers, through the steps
that a run takes; the seconds are those of pruning alone. The peer's rows are measured when --peer names the interpreter
of its environment (peer/requirements.txt says how to make it).
"""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from kept import by_cell, keep, median_seconds
from pages import put
from peer.calling import pruned_by_peer

from cluster.alone import blocks_alone
from cluster.session import session
from cluster.spec import ClusterSpec
from cluster.storage import Stored, open_store
from workflows.allocating import Allocating, Shares
from workflows.blockwork import PruneStage, RowChunk
from workflows.data.windows import Windows, to_parquet
from workflows.evaluation.quality import measure_quality
from workflows.models.source import load_tokenizer, resolve_source
from workflows.models.state import ModelState
from workflows.models.whole import load_model
from workflows.recipe import Recipe, Recovery, Solver
from workflows.steps import Journal

SHOWN = ROOT / "build" / "quality" / "shown.jsonl"
PAGE = ROOT / "benchmarks" / "quality.md"
LENGTH, CALIBRATION, EVALUATION, LATER, SHARDS = 512, 32, 24, 200, 4
CHOICES = 3  # of calibration windows; no window of one is in another, or judges
COLUMNS = {
    "50 %": ("unstructured", 0.5),
    "60 %": ("unstructured", 0.6),
    "70 %": ("unstructured", 0.7),
    "2:4": ("2:4", 0.5),
    "4:8": ("4:8", 0.5),
}


class BlockAtOnce(PruneStage):
    """A stage whose linears see what they read before anything of their block is pruned, as in the peer."""

    def turns(self) -> list[list[RowChunk]]:
        """All units in one turn."""
        return [self.units()]

    @property
    def flows_on(self) -> bool:
        """No: windows that halted within a block have been through linears as they were."""
        return False


@dataclass(frozen=True)
class Method:
    """One row of the table: how every linear of every block is solved, by us or by a method of the peer."""

    title: str
    solver: dict = field(default_factory=dict)
    recovery: dict | None = None
    allocation: dict | None = None
    token_weights: str = "equal"
    stage: type[PruneStage] = PruneStage
    peer: str = ""

    @property
    def looks_first(self) -> bool:
        """Whether the dense model is looked at before anything is pruned."""
        return bool(self.allocation) or self.token_weights != "equal"


SEARCH = {"policy": "evolve", "windows": 4, "generations": 4}
MEASURED = {"policy": "measured", "windows": 4}
METHODS = {
    "magnitude": Method("magnitude", {"name": "magnitude"}),
    "wanda": Method("wanda", {"name": "wanda"}),
    "wanda-at-once": Method("wanda, blocks at once", {"name": "wanda"}, stage=BlockAtOnce),
    "sparsegpt": Method("sparsegpt", {"name": "sparsegpt"}),
    "sparsegpt-at-once": Method("sparsegpt, blocks at once", {"name": "sparsegpt"}, stage=BlockAtOnce),
    "sparsegpt-refit": Method("sparsegpt, refit", {"name": "sparsegpt", "refit": 20}),
    "sparsegpt-swaps": Method("sparsegpt, refit, swaps", {"name": "sparsegpt", "refit": 20, "swaps": 4}),
    "sparsegpt-ratios": Method("sparsegpt, four ratios, refit", {"name": "sparsegpt", "refit": 20, "ratios": 4}),
    "admm": Method("admm", {"name": "admm"}),
    "admm-recovery": Method("admm, block recovery", {"name": "admm"}, {"steps": 16}),
    "sparsegpt-tokens": Method("sparsegpt, token weights", {"name": "sparsegpt"}, token_weights="gradient"),
    "admm-tokens": Method("admm, token weights", {"name": "admm"}, token_weights="gradient"),
    "sparsegpt-owl": Method("sparsegpt, owl", {"name": "sparsegpt"}, allocation={"policy": "owl"}),
    "sparsegpt-composite": Method("sparsegpt, composite", {"name": "sparsegpt"}, allocation={"policy": "composite"}),
    "sparsegpt-measured": Method("sparsegpt, measured", {"name": "sparsegpt"}, allocation=MEASURED),
    "sparsegpt-evolve": Method("sparsegpt, evolve", {"name": "sparsegpt"}, allocation=SEARCH),
    "best": Method("admm, measured, block recovery", {"name": "admm"}, {"steps": 16}, MEASURED),
    "peer-wanda": Method("peer wanda", peer="wanda"),
    "peer-sparsegpt": Method("peer sparsegpt", peer="sparsegpt"),
}


def windows_of(text: str, tokenizer, first: int, count: int) -> Windows:
    """Windows `first` to `first + count` of a text: BOS and 511 tokens each."""
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    own, bos = LENGTH - 1, tokenizer.bos_token_id
    rows = [[bos, *tokens[number * own : (number + 1) * own]] for number in range(first, first + count)]
    if len(rows[-1]) < LENGTH:
        raise SystemExit(f"the text has {len(tokens) // own} windows, {first + count} are asked")
    return Windows(tokens=np.array(rows, dtype=np.int32), slices=["all"] * count)


def stage_of(
    dense: ModelState,
    windows: Stored,
    solver: dict,
    pattern: str,
    sparsity: float,
    recovery: dict | None = None,
    shares: Shares = (),
    norms: Stored | None = None,
    kind: type[PruneStage] = PruneStage,
) -> PruneStage:
    """One stage with the threads of this process."""
    return kind(
        before=dense,
        dense=dense,
        config=dense.config,
        windows_key=windows.key,
        shard_count=SHARDS,
        pattern=pattern,
        sparsity=sparsity,
        solver=Solver(**solver),
        recovery=Recovery(**recovery) if recovery else None,
        shares=shares,
        norms=norms,
        dtype="float32",
        device="cuda" if torch.cuda.is_available() else "cpu",
        threads=torch.get_num_threads(),
        key_prefix=f"blocks-{os.getpid()}",  # several processes may measure beside each other
    )


def worked_through(stage: PruneStage) -> tuple[ModelState, float]:
    """The model after a stage, worked through in this process as a worker does it, and the seconds it took."""
    began = time.monotonic()
    blocks = tuple(blocks_alone(stage))
    return stage.before.model_copy(update={"blocks": blocks}), time.monotonic() - began


def looked_at(
    dense: ModelState, windows: Stored, method: Method, pattern: str, sparsity: float, journal: Journal
) -> tuple[Shares, Stored | None]:
    """What each linear gives, and what tokens are weighed by, by the steps of a run; nothing is done twice."""
    calibration = {"source": "builtin:python-docs", "windows": CALIBRATION, "length": LENGTH, "part": (0, 0.2)}
    recipe = Recipe.model_validate(
        {
            "model": dense.source,
            "data": {"calibration": calibration, "shards": SHARDS},  # what is read is `windows`
            "target": {"pattern": pattern, "sparsity": sparsity},
            "solver": method.solver,
            "allocation": method.allocation or "uniform",
            "token_weights": method.token_weights,
        }
    )
    how = {"windows": windows.sha256}
    steps = Allocating(
        recipe, ClusterSpec(), journal, lambda: None, lambda: False, 1, dense, windows, sparsity, how
    )  # fmt: skip
    with session(ClusterSpec(), cpus=2):
        return steps.shares(), steps.norms()


def perplexity(state: ModelState, windows: Windows) -> float:
    """On the later windows, in fp32: the stored weights are what is compared, not how a processor rounds on the way."""
    value = measure_quality(load_model(state, torch.float32), windows).perplexity
    return float("inf") if value is None else value


def table() -> str:
    """Perplexity of every method, and in brackets the share of SparseGPT's excess over dense that is left.

    That is the peer's SparseGPT where it was measured, else ours.
    """
    shown = by_cell(SHOWN)
    dense = shown["dense", ""]["perplexity"]
    lines = [f"Dense: {dense:.2f}.", "", f"| | {' | '.join(COLUMNS)} | s |", f"|---|{'---|' * (len(COLUMNS) + 1)}"]
    for name, method in METHODS.items():
        cells, found = [], []
        for column in COLUMNS:
            one = shown.get((name, column))
            base = shown.get(("peer-sparsegpt", column), shown.get(("sparsegpt", column)))
            share = f" ({(one['perplexity'] - dense) / (base['perplexity'] - dense):.2f})" if one and base else ""
            cells.append(f"{one['perplexity']:.2f}{share}" if one else "–")
            found += [one] if one else []
        lines.append(f"| {method.title} | {' | '.join(cells)} | {median_seconds(found)} |")
    versions = [one["versions"] for one in shown.values() if "versions" in one]
    told = ", ".join(f"{name} {version}" for name, version in versions[-1].items()) if versions else "not measured yet"
    return "\n".join([*lines, "", f"The peer: {told}.", *repeated()])


def cell_of(column: str, others: int) -> str:
    """The name under which a column's results are kept, with the first windows or with others."""
    return f"{column}, windows {others}" if others else column


def repeated() -> list[str]:
    """Perplexity with every choice of calibration windows, where a method was measured with all of them.

    The last column is the share of our SparseGPT's excess over dense that is left, each time on the same windows.
    """
    shown = by_cell(SHOWN)
    dense = shown["dense", ""]["perplexity"]

    def excess(name: str, column: str) -> np.ndarray | None:
        found = [shown.get((name, cell_of(column, others))) for others in range(CHOICES)]
        return np.array([one["perplexity"] - dense for one in found if one]) if all(found) else None

    lines = []
    for column in COLUMNS:
        base = excess("sparsegpt", column)
        for name, method in METHODS.items():
            own = excess(name, column)
            if own is not None:
                each = " | ".join(f"{dense + value:.2f}" for value in own)
                share = own / base if base is not None else None
                told = f"{share.mean():.2f} ({share.min():.2f} to {share.max():.2f})" if share is not None else "–"
                means = f"{dense + own.mean():.2f} | {np.ptp(own):.2f}"
                lines.append(f"| {method.title}, {column} | {each} | {means} | {told} |")
    if not lines:
        return []
    choices = " | ".join(f"windows {CALIBRATION * one}–{CALIBRATION * (one + 1) - 1}" for one in range(CHOICES))
    head = f"| calibrated on | {choices} | mean | spread | left of sparsegpt's excess |"
    return ["", head, f"|---|{'---|' * (CHOICES + 3)}", *lines]


def main() -> None:
    """Measures what is missing, then writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("methods", nargs="*", default=list(METHODS), metavar="METHOD")
    parser.add_argument("--columns", nargs="*", default=list(COLUMNS), choices=list(COLUMNS))
    parser.add_argument("--others", type=int, default=0, choices=range(CHOICES), help="calibrate on other windows")
    parser.add_argument("--peer", metavar="PYTHON", help="interpreter of the peer's environment")
    asked = parser.parse_args()
    if not asked.peer:
        asked.methods = [name for name in asked.methods if not METHODS[name].peer]
    with tempfile.TemporaryDirectory() as temporary:
        source = resolve_source(asked.model, Path(temporary))
        tokenizer, text = load_tokenizer(source), asked.text.read_text()
        calibration = windows_of(text, tokenizer, asked.others * CALIBRATION, CALIBRATION)
        evaluation = windows_of(text, tokenizer, LATER, EVALUATION)
        store = open_store(str(SHOWN.parent / "store"))
        stored = store.put(f"windows-{asked.others}", to_parquet({"calibration": calibration}))
        dense = ModelState(source=source.uri, source_digest=source.digest, config=source.config, store=store.uri)
        journal = Journal(store, "quality", lambda event: print(event, flush=True))
        if ("dense", "") not in by_cell(SHOWN):
            keep(SHOWN, {"method": "dense", "column": "", "perplexity": perplexity(dense, evaluation), "seconds": 0.0})
        for column in asked.columns:
            for name in asked.methods:
                method, (pattern, sparsity), cell = METHODS[name], COLUMNS[column], cell_of(column, asked.others)
                if (name, cell) in by_cell(SHOWN) or (method.allocation and pattern != "unstructured"):
                    continue
                if method.peer:
                    out = Path(temporary) / "peer"
                    after, told = pruned_by_peer(asked.peer, dense, calibration, method.peer, pattern, sparsity, out)
                else:
                    shares, norms = (), None
                    if method.looks_first:
                        shares, norms = looked_at(dense, stored, method, pattern, sparsity, journal)
                    what = method.solver, pattern, sparsity, method.recovery, shares, norms, method.stage
                    stage = stage_of(dense, stored, *what)
                    after, seconds = worked_through(stage)
                    told = {"seconds": round(seconds, 1)}
                keep(SHOWN, {"method": name, "column": cell, "perplexity": perplexity(after, evaluation), **told})
    put(PAGE, f"{table()}\n\nAs of {date.today()}.")


if __name__ == "__main__":
    main()
