"""A model as one module: empty, to be asked and filled block by block, or whole, to be judged, tuned and timed."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from workflows.models.checkpoint import Checkpoint
from workflows.models.experts import separate
from workflows.models.families import family_of
from workflows.models.state import ModelState

# Gemma 2 caps attention logits, which only the eager implementation does.
EAGER_ATTENTION = {"gemma2"}


def empty_model(config: dict[str, Any], dtype: torch.dtype) -> Any:
    """The model with parameters on the meta device (no memory) and real buffers (rotary tables, scales).

    Its parameters have the names that files have for them, those of experts too.
    """
    # Tasks that solve and write blocks import this file and open no model: transformers would double their start.
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    hf_config = AutoConfig.for_model(**config)
    attention = "eager" if config["model_type"] in EAGER_ATTENTION else "sdpa"
    auto = AutoModelForSequenceClassification if family_of(config).classifies else AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        model = auto.from_config(hf_config, dtype=dtype, attn_implementation=attention)
    separate(model, config)
    return model.eval().requires_grad_(False)


def layers_of(model: Any, config: dict[str, Any]) -> nn.ModuleList:
    """The blocks of a model."""
    return cast(nn.ModuleList, model.get_submodule(family_of(config).layers))


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
    for block, layer in enumerate(layers_of(model, state.config)):
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
    """Gives an empty module its weights, cast one by one; no copy where type and device already fit.

    They travel to a device as they are stored, which is often half of what they are cast to there, and nobody waits.
    """
    weights = {name: tensor.to(device, non_blocking=True).to(dtype) for name, tensor in tensors}
    module.load_state_dict(weights, strict=True, assign=True)
    return module.requires_grad_(False)
