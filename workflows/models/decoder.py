"""One adapter for all decoder families: blocks run alone, fed exactly as the whole model would feed them.

transformers' own forward is asked, with every layer replaced by a recorder, what it hands to each layer (masks,
rotary embeddings, sliding or full attention). So no family needs code of its own here.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from workflows.models.checkpoint import Checkpoint
from workflows.models.experts import prunable, separate
from workflows.models.state import ModelState

# Gemma 2 caps attention logits, which only the eager implementation does.
EAGER_ATTENTION = {"gemma2"}
HEAD_PIECE = 1 << 24  # numbers in a piece of the head; 64 MiB in fp32


def empty_model(config: dict[str, Any], dtype: torch.dtype) -> Any:
    """The model with parameters on the meta device (no memory) and real buffers (rotary tables, scales).

    Its parameters have the names that files have for them, those of experts too.
    """
    hf_config = AutoConfig.for_model(**config)
    attention = "eager" if config["model_type"] in EAGER_ATTENTION else "sdpa"
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, attn_implementation=attention)
    separate(model, config)
    return model.eval().requires_grad_(False)


def load_model(state: ModelState, dtype: torch.dtype) -> Any:
    """The whole model in memory, for judging and tuning; every tensor must be there, none may be left over.

    Args:
        state: which model.
        dtype: type of its parameters.

    Raises:
        InputError: a tensor is missing in the checkpoint.
        RuntimeError: names or shapes do not fit the config.
    """
    checkpoint = Checkpoint(state)
    model = empty_model(state.config, dtype)
    for block, layer in enumerate(model.model.layers):
        fill(layer, checkpoint.read_block(block), dtype)
    outer = {name: tensor.to(dtype) for name, tensor in checkpoint.read_outer().items()}
    _, unexpected = model.load_state_dict(outer, strict=False, assign=True)
    assert not unexpected, unexpected
    model.tie_weights()
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise RuntimeError(f"{state.source}: no weights for {', '.join(empty[:5])}")
    return model.requires_grad_(False)


def fill(
    module: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, device: str = "cpu"
) -> nn.Module:
    """Gives an empty module its weights, cast one by one; no copy where type and device already fit."""
    weights = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors}
    module.load_state_dict(weights, strict=True, assign=True)
    return module.requires_grad_(False)


@dataclass(frozen=True)
class Linear:
    """One prunable matrix [rows, columns]; `group` is the first linear that reads the same input (q, k, v: q)."""

    name: str
    rows: int
    columns: int
    group: str


class Decoder:
    """Runs the blocks of one model alone, one after the other.

    Args:
        checkpoint: where tensors come from.
        dtype: type of weights and activations.
        length: tokens in every window; masks and rotary tables are made once for it.
        device: where blocks run.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, length: int, device: str = "cpu") -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = device
        self.length = length
        self._model = empty_model(checkpoint.state.config, dtype)
        self._arguments = self._record_arguments(length)

    def block(self, index: int, tensors: Iterable[tuple[str, torch.Tensor]] | None = None) -> nn.Module:
        """Block `index` with the given tensors, else its own. Only the caller's reference keeps them in memory."""
        template = copy.deepcopy(self._model.model.layers[index])
        return fill(template, tensors or self.checkpoint.read_block(index), self.dtype, self.device)

    def linears(self, index: int) -> list[Linear]:
        """The prunable matrices of a block, in the order in which the block uses them.

        Which of them read the same input is found by running the empty block on empty tensors.
        """
        block = copy.deepcopy(self._model.model.layers[index]).to("meta")
        found: list[tuple[str, nn.Linear, torch.Tensor]] = []
        for name, module in prunable(block).items():
            module.register_forward_pre_hook(lambda own, args, name=name: found.append((name, own, args[0])))
        hidden = torch.empty(
            1, self.length, self.checkpoint.state.config["hidden_size"], dtype=self.dtype, device="meta"
        )
        block(hidden, **{name: to_device(value, "meta") for name, value in self._arguments[index].items()})
        first_reader: dict[int, str] = {}
        return [
            Linear(name, module.out_features, module.in_features, first_reader.setdefault(id(inputs), name))
            for name, module, inputs in found
        ]

    def run(self, index: int, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [windows, length, width] through a block, as the whole model would run it."""
        out = block(hidden, **self._arguments[index])
        return out[0] if isinstance(out, tuple) else out

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token numbers [windows, length] → hidden states; only the rows of the tokens at hand are read."""
        rows, compact = torch.unique(tokens, return_inverse=True)
        embedding = copy.deepcopy(self._model.model.embed_tokens)
        embedding.padding_idx = None
        weight = self.checkpoint.read_rows("model.embed_tokens.weight", rows).to(self.dtype)
        embedding.weight = nn.Parameter(weight, requires_grad=False)
        return embedding(compact)

    def final_norm(self) -> nn.Module:
        """The norm between the last block and the head, with its weights."""
        weight = self.checkpoint.read("model.norm.weight")
        return fill(copy.deepcopy(self._model.model.norm), [("weight", weight)], self.dtype, self.device)

    def head(self) -> list[torch.Tensor]:
        """The head's weight [vocabulary, width] in pieces of some rows, in the type in which it is stored.

        In that type it is mostly half as large as in fp32; who multiplies with a piece casts it first.
        """
        config = self.checkpoint.state.config
        name = "model.embed_tokens.weight" if self._model.config.tie_word_embeddings else "lm_head.weight"
        rows = max(1, HEAD_PIECE // int(config["hidden_size"]))
        pieces = torch.arange(int(config["vocab_size"])).split(rows)
        return [self.checkpoint.read_rows(name, piece).to(self.device) for piece in pieces]

    def _record_arguments(self, length: int) -> list[dict[str, Any]]:
        """What the model hands to each layer for one unpadded window; it is the same for all windows."""
        recorded: list[dict[str, Any]] = []

        class Recorder(nn.Module):
            def forward(self, hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
                recorded.append(arguments)
                return hidden

        body = self._model.model
        layers, norm = body.layers, body.norm
        body.layers, body.norm = nn.ModuleList(Recorder() for _ in layers), nn.Identity()
        try:
            width = self.checkpoint.state.config["hidden_size"]
            body(inputs_embeds=torch.zeros(1, length, width, dtype=self.dtype), use_cache=False)
        finally:
            body.layers, body.norm = layers, norm
        return [{name: to_device(value, self.device) for name, value in one.items()} for one in recorded]


def to_device(value: Any, device: str) -> Any:
    """Moves a tensor, or a tuple of them, to a device; leaves anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return tuple(to_device(item, device) for item in value) if isinstance(value, tuple) else value
