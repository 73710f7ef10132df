"""One adapter for all decoder families: blocks run alone, fed exactly as the whole model would feed them.

transformers' own forward is asked, with every layer replaced by a recorder, what it hands to each layer (masks,
rotary embeddings, sliding or full attention). So no family needs code of its own here.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cluster.errors import InputError
from workflows.models.blocks import Blocks, Head, to_device
from workflows.models.checkpoint import Checkpoint
from workflows.models.whole import fill
from workflows.scoring.gradients import head_backward, norm_backward
from workflows.scoring.kl import divergence

HEAD_PIECE = 1 << 24  # numbers of the head that are read at once; a GPU multiplies with as many
# A CPU casts and multiplies with fewer, for they stay in its cache; and its fp32 copies come from the heap, see
# `cluster.freed`, where new pages would take as long as the product.
HEAD_PIECE_CPU = 1 << 20


class Decoder(Blocks):
    """A causal language model as blocks; masks and rotary tables are made once, for windows of `length` tokens."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, length: int, device: str = "cpu") -> None:
        super().__init__(checkpoint, dtype, length, device)
        self._recorded = self._record_arguments(length)

    def embed(self, windows: Sequence[Tensor] | Tensor) -> list[Tensor]:
        """See `Blocks.embed`; windows are all of one length."""
        rows, compact = torch.unique(torch.stack(list(windows)), return_inverse=True)
        embedding = copy.deepcopy(self._model.model.embed_tokens)
        embedding.padding_idx = None
        weight = self.checkpoint.read_rows("model.embed_tokens.weight", rows).to(self.dtype)
        embedding.weight = nn.Parameter(weight, requires_grad=False)
        return [one.clone() for one in embedding(compact).to(self.device).split(1)]

    def head(self) -> Head:
        """The final norm and the projection to the vocabulary."""
        return NextToken(
            self.final_norm(), self.vocabulary(), self.checkpoint.state.config.get("final_logit_softcapping")
        )

    def final_norm(self) -> nn.Module:
        """The norm between the last block and the head, with its weights."""
        weight = self.checkpoint.read("model.norm.weight")
        return fill(copy.deepcopy(self._model.model.norm), [("weight", weight)], self.dtype, self.device)

    def vocabulary(self) -> list[Tensor]:
        """The head's weight [vocabulary, width] in pieces of some rows, in the type in which it is stored.

        In that type it is mostly half as large as in fp32; who multiplies with a piece casts it first.
        """
        config = self.checkpoint.state.config
        name = "model.embed_tokens.weight" if self._model.config.tie_word_embeddings else "lm_head.weight"
        width = int(config["hidden_size"])
        rows = torch.arange(int(config["vocab_size"])).split(max(1, HEAD_PIECE // width))
        pieces = [self.checkpoint.read_rows(name, own).to(self.device) for own in rows]
        if self.device != "cpu":
            return pieces
        return [small for piece in pieces for small in piece.split(max(1, HEAD_PIECE_CPU // width))]

    def positions(self, stride: int) -> range:
        """Tokens stride − 1, 2 · stride − 1 and so on; the last one may be, for nothing needs to follow it."""
        if not 1 <= stride <= self.length:
            raise InputError(f"stride {stride} judges no token of a window; take one from 1 to {self.length}")
        return range(stride - 1, self.length, stride)

    def _arguments(self, index: int) -> dict[str, Any]:
        return self._recorded[index]

    def _record_arguments(self, length: int) -> list[dict[str, Any]]:
        """What the model hands to each layer for one unpadded window; it is the same for all windows."""
        recorded: list[dict[str, Any]] = []

        class Recorder(nn.Module):
            def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
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


class NextToken:
    """The head of a language model; see `Head`. A window of n tokens predicts n − 1.

    Args:
        norm: the final norm, frozen.
        vocabulary: weight [vocabulary, width] in pieces of consecutive rows.
        cap: the model's `final_logit_softcapping`, if it has one.
    """

    def __init__(self, norm: nn.Module, vocabulary: Sequence[Tensor], cap: float | None) -> None:
        self._norm, self._vocabulary, self._cap = norm, vocabulary, cap

    def loss(self, hidden: Tensor, wanted: Tensor) -> tuple[float, Tensor]:
        """See `Head.loss`; `wanted` are the window's own tokens [length]."""
        seen = []

        def backward(states: Tensor) -> Tensor:
            loss, gradient = head_backward(states[:-1], wanted[1:], self._vocabulary, self._cap)
            seen.append(loss.item())
            return nn.functional.pad(gradient, (0, 0, 0, 1))  # the last token predicts nothing

        gradient = norm_backward(self._norm, hidden[0], backward)[None]
        return seen[0], gradient

    def divergence(self, dense: Tensor, candidates: Sequence[Tensor]) -> Tensor:
        """See `Head.divergence`; over the whole vocabulary."""
        normed = [self._norm(one) for one in candidates]
        return divergence(self._norm(dense), normed, self._vocabulary, self._cap)
