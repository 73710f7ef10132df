"""Accuracy of a pruned classifier by solver and pattern: `python benchmarks/classifier.py MODEL TABLE [METHOD ...]`.

MODEL is the directory of a BERT encoder as safetensors, TABLE a table of labelled sentences (--text and --label name
its columns). The encoder is first tuned here into a classifier, by plain AdamW on rows of the first eight tenths of
the table; the ninth tenth calibrates, the last one judges, without sentences that were seen before. The classifier and
every result are kept under build/classifier and not made again; the table goes into benchmarks/classifier.md.
"""

import argparse
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import quality
import torch
from kept import by_cell, keep, median_seconds
from pages import put
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cluster.storage import open_store
from workflows.data.labelled import labelled_windows
from workflows.data.windows import Windows, to_parquet
from workflows.evaluation.measures import ACCURACY, macro_f1
from workflows.evaluation.quality import Quality, measure_quality
from workflows.models.labels import labels_of
from workflows.models.source import load_tokenizer, resolve_source
from workflows.models.state import ModelState
from workflows.models.whole import load_model
from workflows.recipe import DataSource
from workflows.tuning.tune import batch_of

KEPT = ROOT / "build" / "classifier"
SHOWN = KEPT / "shown.jsonl"
PAGE = ROOT / "benchmarks" / "classifier.md"
LENGTH, TEXTS, CALIBRATION, EVALUATION, SHARDS = 64, 12_800, 256, 1000, 16
BATCH, RATE = 32, 1e-4
COLUMNS = {name: quality.COLUMNS[name] for name in ("50 %", "60 %", "70 %", "2:4")}
METHODS = {name: quality.METHODS[name] for name in ("magnitude", "wanda", "sparsegpt", "admm", "admm-recovery")}
METHODS["admm-recovery"] = replace(METHODS["admm-recovery"], recovery={"steps": 32})


def tuned(encoder: str, rows: Windows, labels: int, directory: Path) -> None:
    """Makes a classifier of an encoder: one pass over the rows, embeddings and all, in batches of like lengths."""
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=labels, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    order = np.argsort([len(one) for one in rows.tokens], kind="stable")
    batches = random.permutation(len(order) // BATCH)
    for step, number in enumerate(batches):
        rate = RATE * min((step + 1) / (0.1 * len(batches)), 1.1 - step / len(batches))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = order[number * BATCH : (number + 1) * BATCH]
        texts, mask, wanted = batch_of(rows, chosen, model.config.to_dict())
        loss = model(texts, attention_mask=mask, labels=wanted).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step} of {len(batches)}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(directory)


def note(method: str, column: str, scores: Quality, dense: Quality | None, seconds: float) -> None:
    """Keeps one result; with the accuracy lost against the dense model, resampled in pairs."""
    found = {"method": method, "column": column, "seconds": round(seconds, 1)}
    found |= {"accuracy": ACCURACY.value(scores), "macro_f1": macro_f1(scores)}
    found |= {"lost": ACCURACY.paired(dense, scores, 0) if dense else None}
    keep(SHOWN, found)


def table() -> str:
    """Accuracy in percent, and in brackets the 95 % interval of the points lost; the last column: median seconds."""
    shown = by_cell(SHOWN)
    dense = shown["dense", ""]
    lines = [f"Dense: {100 * dense['accuracy']:.1f} % (macro-F1 {100 * dense['macro_f1']:.1f} %).", ""]
    lines += [f"| | {' | '.join(COLUMNS)} | s |", f"|---|{'---|' * (len(COLUMNS) + 1)}"]
    for name, method in METHODS.items():
        found = [shown.get((name, column)) for column in COLUMNS]
        cells = [
            f"{100 * one['accuracy']:.1f} ({100 * one['lost'][0]:.1f} to {100 * one['lost'][1]:.1f})" if one else "–"
            for one in found
        ]
        timed = median_seconds([one for one in found if one])
        lines.append(f"| {method.title} | {' | '.join(cells)} | {timed} |")
    return "\n".join(lines)


def main() -> None:
    """Measures what is missing, then writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("table")
    parser.add_argument("methods", nargs="*", default=list(METHODS), metavar="METHOD")
    parser.add_argument("--columns", nargs="*", default=list(COLUMNS), choices=list(COLUMNS))
    parser.add_argument("--text", default="sentence")
    parser.add_argument("--label", default="label")
    asked = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)

    def rows(role: str, low: float, high: float, count: int, besides: frozenset[bytes] = frozenset()) -> Windows:
        source = DataSource(
            source=asked.table, text=asked.text, label=asked.label, part=(low, high), windows=count, length=LENGTH
        )
        return labelled_windows(role, source, tokenizer, labels, 0, besides)

    labels, directory = ["0", "1"], KEPT / "model"
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    training = rows("tuning", 0, 0.8, TEXTS)
    if not (directory / "model.safetensors").exists():
        tuned(asked.model, training, len(labels), directory)
    source = resolve_source(str(directory), KEPT / "cache")
    tokenizer, labels = load_tokenizer(source), labels_of(source.config)
    seen = {one.tobytes() for one in training.tokens}
    calibration = rows("calibration", 0.8, 0.9, CALIBRATION, frozenset(seen))
    seen |= {one.tobytes() for one in calibration.tokens}
    evaluation = rows("evaluation", 0.9, 1, EVALUATION, frozenset(seen))
    store = open_store(str(KEPT / "store"))
    stored = store.put("windows", to_parquet({"calibration": calibration}))
    dense = ModelState(source=source.uri, source_digest=source.digest, config=source.config, store=store.uri)
    before = measure_quality(load_model(dense, torch.float32), evaluation)
    if ("dense", "") not in by_cell(SHOWN):
        note("dense", "", before, None, 0.0)
    for column in asked.columns:
        for name in asked.methods:
            method, (pattern, sparsity) = METHODS[name], COLUMNS[column]
            if (name, column) not in by_cell(SHOWN):
                stage = quality.stage_of(dense, stored, method.solver, pattern, sparsity, method.recovery)
                after, seconds = quality.worked_through(replace(stage, shard_count=SHARDS))
                note(name, column, measure_quality(load_model(after, torch.float32), evaluation), before, seconds)
    put(PAGE, f"{table()}\n\nAs of {date.today()}.")


if __name__ == "__main__":
    main()
