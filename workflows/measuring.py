"""Dense and compressed model, timed and weighed on the cluster's own hardware."""

import multiprocessing
import os
import platform
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from cluster.freed import ALLOCATOR
from cluster.hardware.profiles import HardwareProfile
from cluster.remote import call_each, largest_node_cpus
from workflows.evaluation.cost import Traffic
from workflows.evaluation.latency import Footprint, PairedTiming, Shape, measure_footprint, measure_latency
from workflows.models.experts import fuse
from workflows.models.families import family_of, most_tokens
from workflows.models.state import ModelState
from workflows.models.whole import load_model
from workflows.recipe import Recipe
from workflows.reports.report import Measured
from workflows.stages import serving_dtype

ROUNDS = 11
NEW_TOKENS = 8
LONGEST_PROMPT = 2048


def measure(
    dense: ModelState,
    compressed: ModelState,
    recipe: Recipe,
    profile: HardwareProfile,
    traffic: Traffic,
    stuck_after: float,
    stop: Callable[[], bool],
) -> Measured:
    """Runs both models side by side in one task that has the machine's cores to itself.

    Args:
        dense: what is compressed.
        compressed: what came of it.
        recipe: gives the device.
        profile: how many cores a model is served with.
        traffic: the prompt's length is what is timed first; then a batch of short prompts.
        stuck_after: seconds; a measurement that takes longer hangs.
        stop: asked while waiting.
    """
    threads = min(profile.cores, largest_node_cpus())
    shapes = shapes_for(dense.config, max(round(traffic.prompt_tokens), 1))
    gpus = 1 if recipe.device == "cuda" else 0
    arguments = (dense, compressed, shapes, threads, recipe.device, recipe.seed)
    return call_each(measure_here, [arguments], threads, gpus, stop, stuck_after=stuck_after)[0]


def shapes_for(config: dict[str, Any], prompt: int) -> tuple[Shape, ...]:
    """What is timed: the traffic's own prompt or text alone, then a batch of short ones."""
    if family_of(config).classifies:
        most = most_tokens(config)
        return (
            Shape(batch=1, prompt=min(prompt, most), new_tokens=0),
            Shape(batch=16, prompt=min(128, most), new_tokens=0),
        )
    return (
        Shape(batch=1, prompt=min(prompt, LONGEST_PROMPT), new_tokens=NEW_TOKENS),
        Shape(batch=4, prompt=128, new_tokens=NEW_TOKENS),
    )


def measure_here(
    dense: ModelState, compressed: ModelState, shapes: tuple[Shape, ...], threads: int, device: str, seed: int
) -> Measured:
    """The measurement itself; runs in a task. Memory first, each model in a fresh process of its own."""
    footprints = [fresh_process(footprint, state, shapes[0], threads, device) for state in (dense, compressed)]
    timings = fresh_process(latency, dense, compressed, shapes, threads, device, seed)
    return Measured(
        timings=timings,
        dense_footprint=footprints[0],
        compressed_footprint=footprints[1],
        machine=machine(),
        threads=threads,
    )


def footprint(state: ModelState, shape: Shape, threads: int, device: str) -> Footprint:
    """Peak memory and load time of one model."""
    torch.set_num_threads(threads)
    return measure_footprint(partial(load, state, device), shape)


def latency(
    dense: ModelState, compressed: ModelState, shapes: tuple[Shape, ...], threads: int, device: str, seed: int
) -> tuple[PairedTiming, ...]:
    """Both models in one process, taking turns."""
    torch.set_num_threads(threads)
    return measure_latency(load(dense, device), load(compressed, device), shapes, ROUNDS, seed)


def load(state: ModelState, device: str) -> Any:
    """The model as plain `from_pretrained` gives it to whoever serves it.

    That includes parameters that ask for gradients: without them torch copies the whole head for every call
    (`matmul` folds a batch into rows only when the weight needs a gradient), and both models look ten times slower.
    """
    return fuse(load_model(state, getattr(torch, serving_dtype(state)))).to(device).requires_grad_(True)


def fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a new Python process and brings its result back.

    The allocator is its own again there: that of a pruning worker keeps what was freed, and a server's peak would look
    larger than it is.
    """
    for name in ALLOCATOR:
        os.environ.pop(name, None)  # read when a process starts: it means nothing any more to this one
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    facts = {"processor": model, "Python": platform.python_version()}
    if torch.cuda.is_available():
        facts["GPU"] = torch.cuda.get_device_name()
    return facts | {"torch": torch.__version__, "transformers": transformers.__version__}
