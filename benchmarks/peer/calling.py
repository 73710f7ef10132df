"""Calls the peer in its own environment, and reads what it wrote as our own models are read."""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workflows.data.windows import Windows
from workflows.models.source import resolve_source
from workflows.models.state import ModelState

PRUNE = Path(__file__).with_name("prune.py")


def pruned_by_peer(
    python: str, dense: ModelState, windows: Windows, method: str, pattern: str, sparsity: float, out: Path
) -> tuple[ModelState, dict[str, Any]]:
    """Prunes a model with the peer, with as many threads as this process has.

    Args:
        python: interpreter of the peer's environment (see requirements.txt).
        dense: the model; its source is a directory.
        windows: calibration windows.
        method: sparsegpt or wanda.
        pattern: as in a recipe: unstructured or N:M, N of every M weights kept.
        sparsity: share of zeros.
        out: directory that gets the pruned model.

    Returns:
        The pruned model, and what `prune.py` told: seconds of the pruning alone, CPU seconds, peak memory, sparsity
        reached, versions.

    Raises:
        SystemExit: it failed, or it did not reach the sparsity; with the end of what it said.
    """
    kept, _, group = pattern.partition(":")
    mask = f"{int(group) - int(kept)}:{group}" if group else "0:0"
    with tempfile.TemporaryDirectory() as temporary:
        tokens = Path(temporary) / "windows.npy"
        np.save(tokens, windows.tokens)
        words = [python, PRUNE, dense.source, tokens, method, sparsity, mask, out, "--threads", torch.get_num_threads()]
        done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the peer ended with {done.returncode}: {done.stderr[-3000:]}")
    told = json.loads(done.stdout.splitlines()[-1])
    warned = [line for line in done.stderr.splitlines() if "Failed to invert hessian" in line]
    if abs(told["sparsity"] - sparsity) > 0.001 or warned:
        raise SystemExit(f"the peer did not do what was asked: {told}; {len(warned)} matrices could not be inverted")
    source = resolve_source(str(out), out.parent)
    return dense.model_copy(update={"source": source.uri, "source_digest": source.digest}), told
