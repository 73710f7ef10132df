"""Latency of the dense and the compressed model, side by side in one process, taking turns."""

import gc
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from pydantic import BaseModel, ConfigDict

ROUNDS_BEFORE = 1  # warm-up: first calls compile, page in and allocate


class Shape(BaseModel):
    """What is timed: a prompt of so many tokens, then so many new ones; of a classifier none, only texts."""

    model_config = ConfigDict(frozen=True)

    batch: int
    prompt: int
    new_tokens: int


class Timing(BaseModel):
    """Seconds of one phase of one model: every round's, in order."""

    model_config = ConfigDict(frozen=True)

    seconds: tuple[float, ...]
    tokens: int  # processed per round

    def percentile(self, percent: float) -> float:
        """Seconds that so many percent of the rounds took at most."""
        return float(np.percentile(self.seconds, percent))

    @property
    def tokens_per_second(self) -> float:
        """At the median."""
        return self.tokens / self.percentile(50)


class PairedTiming(BaseModel):
    """One phase at one shape, both models, round by round."""

    model_config = ConfigDict(frozen=True)

    phase: str  # prefill or decode; of a classifier, classify
    shape: Shape
    dense: Timing
    compressed: Timing

    def speedup(self, seed: int = 0) -> tuple[float, float, float]:
        """How many times faster the compressed model is: median over rounds, and its 95 % bootstrap interval."""
        ratios = np.array(self.dense.seconds) / np.array(self.compressed.seconds)
        picks = np.random.default_rng(seed).integers(0, len(ratios), (2000, len(ratios)))
        low, high = np.quantile(np.median(ratios[picks], axis=1), [0.025, 0.975])
        return float(np.median(ratios)), float(low), float(high)


class Footprint(BaseModel):
    """Memory that a model takes, measured in a process of its own; bytes above the interpreter with torch."""

    model_config = ConfigDict(frozen=True)

    load_seconds: float
    peak_bytes: int


@torch.inference_mode()
def measure_latency(
    dense: Any, compressed: Any, shapes: tuple[Shape, ...], rounds: int, seed: int = 0
) -> tuple[PairedTiming, ...]:
    """Times all phases of both models at every shape.

    In each round the two models take turns in random order, so that a drift of the machine meets both alike.

    Args:
        dense: a Hugging Face causal language model, or a classifier.
        compressed: another one of the same kind and vocabulary, on the same device.
        shapes: batch, prompt and new tokens.
        rounds: counted rounds per shape.
        seed: of tokens and order.
    """
    random = np.random.default_rng(seed)
    results = []
    for shape in shapes:
        tokens = torch.from_numpy(random.integers(10, dense.config.vocab_size, (shape.batch, shape.prompt)))
        tokens = tokens.to(next(dense.parameters()).device)
        models = {"dense": dense, "compressed": compressed}
        phases = (
            {"prefill": shape.prompt, "decode": shape.new_tokens} if shape.new_tokens else {"classify": shape.prompt}
        )
        seconds: dict[tuple[str, str], list[float]] = {(n, p): [] for n in models for p in phases}
        for number in range(ROUNDS_BEFORE + rounds):
            for name in random.permutation(list(models)):
                taken = _one(models[name], tokens, shape.new_tokens)
                if number >= ROUNDS_BEFORE:
                    for phase, one in zip(phases, taken, strict=True):
                        seconds[name, phase].append(one)
        for phase, count in phases.items():
            timings = {n: Timing(seconds=tuple(seconds[n, phase]), tokens=shape.batch * count) for n in models}
            results.append(
                PairedTiming(phase=phase, shape=shape, dense=timings["dense"], compressed=timings["compressed"])
            )
    return tuple(results)


def _one(model: Any, tokens: torch.Tensor, new_tokens: int) -> tuple[float, ...]:
    """Seconds of the prompt, and of `new_tokens` greedy steps after it; if there are none, of the texts alone."""
    synchronize = torch.cuda.synchronize if tokens.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    if not new_tokens:
        model(tokens)
        synchronize()
        return (time.perf_counter() - start,)
    out = model(tokens, use_cache=True, logits_to_keep=1)
    synchronize()
    middle = time.perf_counter()
    for _ in range(new_tokens):
        following = out.logits[:, -1:].argmax(-1)
        out = model(following, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
    synchronize()
    return middle - start, time.perf_counter() - middle


@torch.inference_mode()
def measure_footprint(load: Callable[[], Any], shape: Shape) -> Footprint:
    """Loads a model, runs it once and notes the peak. To be called in a fresh process, which holds nothing else.

    Args:
        load: gives the model on its device.
        shape: what is run.
    """
    gc.collect()
    forget_high_water()
    before = psutil.Process().memory_info().rss
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model = load()
    seconds = time.perf_counter() - start
    tokens = torch.full((shape.batch, shape.prompt), 10, device=next(model.parameters()).device)
    _one(model, tokens, min(shape.new_tokens, 4))
    peak = torch.cuda.max_memory_allocated() if tokens.is_cuda else high_water() - before
    return Footprint(load_seconds=seconds, peak_bytes=peak)


def forget_high_water() -> None:
    """Lets the high water fall to what is resident now: importing torch can rise above what it keeps (proc(5))."""
    with suppress(OSError):  # a kernel without it: the peak then counts from the imports' own
        Path("/proc/self/clear_refs").write_text("5")


def high_water() -> int:
    """Most resident bytes since `forget_high_water`. Not getrusage's: that one is inherited from the parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
