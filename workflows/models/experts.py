"""The experts of a mixture as linears of their own, so that whatever works on linears works on them.

transformers runs a block's experts from two fused tensors, inside of one module: there is nothing to observe, to take
gradients of or to put weights into expert by expert. Here each expert is three linears under the names that files have
for them. Place by place all experts are used one after the other: what they read is there before the first is used,
so experts can be looked at, and replaced, together.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from workflows.models.expert_names import MIXTURES, ExpertNames, is_router


class Entrance(nn.Module):
    """What an expert's linears read comes by here."""

    def forward(self, inputs: Tensor, tokens: Tensor) -> Tensor:
        """The inputs [tokens, in], unchanged; `tokens` are their places among all tokens that entered the block."""
        return inputs


class Expert(nn.Module):
    """One gated MLP: down(act(gate(x)) · up(x))."""

    def __init__(self, width: int, inner: int, act: nn.Module, names: ExpertNames, dtype: torch.dtype) -> None:
        super().__init__()
        self._names = names
        self.act_fn = act
        self.outer, self.within = Entrance(), Entrance()
        for name, columns, rows in ((names.gate, width, inner), (names.up, width, inner), (names.down, inner, width)):
            self.add_module(name, nn.Linear(columns, rows, bias=False, device="meta", dtype=dtype))

    def entrance(self, linear: str) -> Entrance:
        """Where the input of a linear comes by."""
        return self.within if linear == self._names.down else self.outer

    def inner(self, x: Tensor) -> Tensor:
        """[tokens, width] → [tokens, inner], what `down` reads."""
        return self.act_fn(self.get_submodule(self._names.gate)(x)) * self.get_submodule(self._names.up)(x)

    def down(self, x: Tensor) -> Tensor:
        """[tokens, inner] → [tokens, width]."""
        return self.get_submodule(self._names.down)(x)


class Experts(nn.ModuleList):
    """The experts of one block, in place of transformers' fused module `stock`, with its interface and its result."""

    def __init__(self, stock: Any, names: ExpertNames) -> None:
        count, width, inner = stock.down_proj.shape
        dtype = stock.down_proj.dtype
        super().__init__(Expert(width, inner, stock.act_fn, names, dtype) for _ in range(count))
        self._names = names
        self._stock = [stock]  # in a list, so that it is no submodule

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """What the chosen experts make of each token, weighted.

        Every expert runs, be it on no token at all: so each of its linears is seen in every pass, and has a gradient.

        Args:
            hidden: [tokens, width].
            chosen: [tokens, choices], numbers of experts.
            weights: [tokens, choices].
        """
        experts = cast(Iterable[Expert], self)
        places = self._places(chosen)
        tokens = [own // chosen.shape[1] for own in places]
        inner = [expert.outer(hidden[own], own) for expert, own in zip(experts, tokens, strict=True)]
        inner = [expert.inner(one) for expert, one in zip(experts, inner, strict=True)]
        inner = [expert.within(one, own) for expert, one, own in zip(experts, inner, tokens, strict=True)]
        output = torch.zeros_like(hidden)
        for number, expert in enumerate(experts):
            own = expert.down(inner[number]) * weights.flatten()[places[number], None]
            output.index_add_(0, tokens[number], own.to(output.dtype))
        return output

    def _places(self, chosen: Tensor) -> list[Tensor]:
        """For each expert where in `chosen`, flattened, it stands, rising."""
        flat = chosen.flatten()
        if flat.is_meta:  # nothing is known of an empty tensor: everything may be anybody's
            return [torch.empty_like(flat) for _ in self]
        return list(flat.argsort(stable=True).split(flat.bincount(minlength=len(self)).tolist()))

    def fused(self) -> Any:
        """The stock module with these weights; they are copied."""

        def weights(name: str) -> list[Tensor]:
            return [one.get_parameter(f"{name}.weight") for one in self]

        (stock,) = self._stock
        pairs = zip(weights(self._names.gate), weights(self._names.up), strict=True)
        stock.gate_up_proj = nn.Parameter(torch.stack([torch.cat(pair) for pair in pairs]), requires_grad=False)
        stock.down_proj = nn.Parameter(torch.stack(weights(self._names.down)), requires_grad=False)
        return stock


def separate(model: Any, config: dict[str, Any]) -> None:
    """Gives an empty model's mixtures experts one by one, and their parameters the names that files have for them."""
    names = MIXTURES.get(config["model_type"])
    if names is None:
        return
    for layer in model.model.layers:
        mixture = layer.mlp
        mixture.experts = Experts(mixture.experts, names)
        if names.mixture != "mlp":
            del layer.mlp
            layer.add_module(names.mixture, mixture)
            object.__setattr__(layer, "mlp", mixture)  # what the layer's code calls; no second name of parameters


def fuse(model: Any) -> Any:
    """Turns a model's experts back into transformers' own modules, block by block: what is served, and so is timed."""
    if model.config.model_type in MIXTURES:
        for layer in model.model.layers:
            if isinstance(getattr(layer.mlp, "experts", None), Experts):
                layer.mlp.experts = layer.mlp.experts.fused()
    return model


def prunable(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a block by name, those of its experts among them, but none that routes."""
    return {name: one for name, one in block.named_modules() if isinstance(one, nn.Linear) and not is_router(name)}
