"""What files call the experts of a mixture, and what of a block is its router.

transformers holds a block's experts as two fused 3-D tensors, yet writes and reads them one by one, as matrices under
the names that their family has always had. So here a mixture is matrices by name everywhere: in files, as units of
pruning, and in memory (`workflows.models.experts`). A checkpoint that does hold fused tensors
(`save_pretrained(..., save_original_format=False)`) is read as if it held the matrices: their bytes lie one after the
other.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cluster.errors import InputError
from workflows.models.safetensors_header import TensorInfo


class ExpertNames(NamedTuple):
    """A family's names: of the mixture within a block, and of the matrices within one of its experts."""

    mixture: str
    gate: str
    up: str
    down: str


QWEN = ExpertNames("mlp", "gate_proj", "up_proj", "down_proj")
MIXTRAL = ExpertNames("block_sparse_moe", "w1", "w3", "w2")
MIXTURES = {"qwen2_moe": QWEN, "qwen3_moe": QWEN, "olmoe": QWEN, "mixtral": MIXTRAL}  # by model_type
COUNTS = ("num_experts", "num_local_experts")  # in config.json, whichever version of transformers wrote it

# They choose among experts, or weigh the shared one; small, and one zero moves whole tokens. Never pruned.
ROUTERS = (".gate", ".shared_expert_gate")
FUSED = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.mlp\.experts\.(gate_up_proj|down_proj)")
EXPERT_INPUT = re.compile(r"(.+\.experts\.)[0-9]+(\..+)")


def is_router(linear: str) -> bool:
    """Whether a linear of a block, as in "mlp.shared_expert_gate", is one that routes."""
    return linear.endswith(ROUTERS)


def expert_count(config: Mapping[str, Any]) -> int:
    """Experts of each block; 0 for a dense model."""
    if config["model_type"] not in MIXTURES:
        return 0
    return int(next(config[field] for field in COUNTS if field in config))


def share_of_tokens(name: str, config: Mapping[str, Any]) -> float:
    """Which share of all tokens goes through something of a block, by its name, if experts are chosen evenly."""
    return config["num_experts_per_tok"] / expert_count(config) if ".experts." in name else 1.0


def place_of(linear: str) -> str:
    """The place of a linear in its block: its name, and for an expert's that of all experts' alike."""
    return EXPERT_INPUT.sub(r"\1*\2", linear)


def same_kind(inputs: Iterable[str]) -> list[list[str]]:
    """Those of a block's inputs that enter experts, one list for each place within an expert, else as they come."""
    kinds: dict[str, list[str]] = {}
    for name in inputs:
        if place_of(name) != name:
            kinds.setdefault(place_of(name), []).append(name)
    return list(kinds.values())


def one_by_one(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """A file's tensors by full name, with fused experts as matrices; all others, and odd shapes, as they are.

    Raises:
        InputError: a matrix is there twice, fused and alone.
    """
    names = MIXTURES.get(config["model_type"])
    if names is None:
        return dict(tensors)
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        stored = name.replace(".mlp.", f".{names.mixture}.", 1)  # a fused checkpoint has the modules' names throughout
        fused = FUSED.fullmatch(name)
        parts = (names.down,) if fused and fused[2] == "down_proj" else (names.gate, names.up)
        if fused and int(fused[1]) < config["num_hidden_layers"] and _fits(info, expert_count(config), len(parts)):
            matrices = _matrices(stored.removesuffix(fused[2]), info, parts)
        else:
            matrices = {stored: info}
        for twice in matrices.keys() & found.keys():
            raise InputError(f"tensor {twice} is there twice, under other names")
        found |= matrices
    return found


def _fits(info: TensorInfo, experts: int, parts: int) -> bool:
    return len(info.shape) == 3 and info.shape[0] == experts and info.shape[1] % parts == 0


def _matrices(prefix: str, info: TensorInfo, parts: tuple[str, ...]) -> dict[str, TensorInfo]:
    """The matrices [rows, columns] within a fused tensor [experts, parts · rows, columns]."""
    experts, rows, columns = info.shape
    size = (info.end - info.start) // (experts * len(parts))
    names = [f"{prefix}{expert}.{part}.weight" for expert in range(experts) for part in parts]
    shape = (rows // len(parts), columns)
    return {
        name: TensorInfo(info.dtype, shape, info.start + place * size, info.start + (place + 1) * size)
        for place, name in enumerate(names)
    }
