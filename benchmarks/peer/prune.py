"""Prunes a model with the peer, llmcompressor, in the peer's own environment; prints one line of JSON.

    PEER/bin/python benchmarks/peer/prune.py MODEL_DIR WINDOWS.npy sparsegpt|wanda SPARSITY 0:0|2:4|4:8 OUT_DIR

Nothing of this repository is imported. MODEL_DIR is a stock Hugging Face directory, WINDOWS.npy int32 token numbers
[windows, length], each begun by BOS. The peer's own entry point and sequential pipeline do all of the work; what is
set is what makes the task the same as ours: the windows in their order, all linears of the decoder, fp32 while
pruning, damping 0.01. OUT_DIR gets a plain dense directory in the type that the source is stored in.
"""

import argparse
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from datasets import Dataset
from llmcompressor.entrypoints.oneshot import Oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from loguru import logger
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

DAMPING, BLOCK_COLUMNS = 0.01, 128  # both the peer's defaults; written down because they matter
PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")


def recipe(method: str, sparsity: float, mask: str) -> Any:
    """The peer's modifier for all linears but the head."""
    what: dict[str, Any] = {
        "sparsity": sparsity, "mask_structure": mask, "targets": ["Linear"], "ignore": ["re:.*lm_head"],
    }  # fmt: skip
    if method == "wanda":
        return WandaPruningModifier(**what)
    return SparseGPTModifier(**what, dampening_frac=DAMPING, block_size=BLOCK_COLUMNS)


def zeros(model: nn.Module) -> dict[str, float]:
    """The share of zeros over the decoder's linears, and the least of any of them."""
    named = [(name, one.weight) for name, one in model.named_modules() if isinstance(one, nn.Linear)]
    each = [(int((weight == 0).sum()), weight.numel()) for name, weight in named if "lm_head" not in name]
    return {
        "sparsity": sum(zero for zero, _ in each) / sum(size for _, size in each),
        "least_sparsity": min(zero / size for zero, size in each),
        "linears": len(each),
    }


def peak_bytes() -> int:
    """The most memory that this process itself ever held (`ru_maxrss` would be inherited from the caller)."""
    (line,) = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def main() -> None:
    """Load, prune (timed), save, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("windows", type=Path)
    parser.add_argument("method", choices=["sparsegpt", "wanda"])
    parser.add_argument("sparsity", type=float)
    parser.add_argument("mask", help="N:M of zeros in M, 0:0 for unstructured")
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1, help="windows per forward pass; 1 is the peer's default")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    logger.remove()
    logger.add(sys.stderr, level="WARNING")  # for example that a Cholesky failed and an identity took its place

    windows = np.load(asked.windows)
    stored = AutoModelForCausalLM.from_pretrained(asked.model, dtype="auto")
    dtype = stored.dtype
    model = stored.to(torch.float32).eval()
    one_shot = Oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(asked.model),
        recipe=recipe(asked.method, asked.sparsity, asked.mask),
        dataset=Dataset.from_dict({"input_ids": windows.tolist()}),
        batch_size=asked.batch,
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
        max_seq_length=windows.shape[1],
        pipeline="sequential",
    )
    began, began_cpu = time.monotonic(), time.process_time()
    one_shot()
    seconds, cpu_seconds = time.monotonic() - began, time.process_time() - began_cpu
    peak = peak_bytes()

    model.to(dtype).save_pretrained(asked.out, save_compressed=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"):
        if (asked.model / name).exists():
            (asked.out / name).write_bytes((asked.model / name).read_bytes())
    told = {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "peak_bytes": peak,
        "threads": asked.threads,
        "batch": asked.batch,
        "windows": len(windows),
        "dtype": str(dtype).removeprefix("torch."),
        **zeros(model),
        "versions": {name: version(name) for name in PACKAGES},
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
