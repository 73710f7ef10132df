"""One adapter for the encoder classifiers: BERT and what is built like it.

A sentence goes through alone and whole, never padded, so blocks need no mask and no padding has to be kept out of
anything. For what is before and after the blocks, transformers' own modules are taken: a family's way to count
positions or to pool is its own affair.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from workflows.models.blocks import Blocks, Head
from workflows.models.families import family_of
from workflows.models.whole import fill
from workflows.scoring.kl import divergence_of_logits


class Encoder(Blocks):
    """A sequence classifier as blocks; sentences may be of any lengths."""

    def embed(self, windows: Sequence[Tensor] | Tensor) -> list[Tensor]:
        """See `Blocks.embed`; words, positions and the type of a first sentence, normed."""
        rows = torch.unique(torch.cat(list(windows)))
        path = f"{self._body}.embeddings"
        embeddings = copy.deepcopy(self._model.get_submodule(path))
        embeddings.word_embeddings = nn.Identity()
        names = [name for name, _ in embeddings.named_parameters()]
        fill(embeddings, [(name, self.checkpoint.read(f"{path}.{name}")) for name in names], self.dtype)
        weight = self.checkpoint.read_rows(f"{path}.word_embeddings.weight", rows).to(self.dtype)
        embeddings.word_embeddings = SomeWords(rows, weight)
        return [embeddings(input_ids=one[None]).to(self.device) for one in windows]

    def head(self) -> Head:
        """The pooler, where there is one, and the classifier."""
        model = copy.deepcopy(self._model)
        body = model.get_submodule(self._body)
        body.embeddings, body.encoder.layer = AsTheyAre(), nn.ModuleList()
        names = [name for name, _ in model.named_parameters()]
        return Classes(fill(model, [(name, self.checkpoint.read(name)) for name in names], self.dtype, self.device))

    def positions(self, stride: int) -> range:
        """The first token alone: it is the one that the classifier reads, however many others there are."""
        return range(1)

    def _arguments(self, index: int) -> dict[str, Any]:
        """Nothing: all tokens of a sentence see each other."""
        return {}

    @property
    def _body(self) -> str:
        """Where the encoder is in the classifier, such as "bert"."""
        return family_of(self.checkpoint.state.config).layers.split(".")[0]


class SomeWords(nn.Module):
    """Some rows of an embedding, looked up by their numbers in the whole.

    Args:
        rows: sorted, unique row numbers.
        weight: [rows, width].
    """

    def __init__(self, rows: Tensor, weight: Tensor) -> None:
        super().__init__()
        self._rows, self._weight = rows, weight

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., length] → [..., length, width]; every token must be among the rows."""
        return functional.embedding(torch.searchsorted(self._rows, tokens), self._weight)


class AsTheyAre(nn.Module):
    """Stands in for an embedding where hidden states are given in its place."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        """The hidden states."""
        return inputs_embeds


class Classes:
    """The head of a classifier; see `Head`. A sentence is one prediction.

    Args:
        model: the classifier without embeddings and blocks, frozen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @torch.enable_grad()
    def loss(self, hidden: Tensor, wanted: Tensor) -> tuple[float, Tensor]:
        """See `Head.loss`; `wanted` is the number of the sentence's class, a scalar."""
        inputs = hidden.detach().requires_grad_()
        loss = functional.cross_entropy(self._logits(inputs), wanted[None])
        (gradient,) = torch.autograd.grad(loss, inputs)
        return loss.item(), gradient

    @torch.no_grad()
    def divergence(self, dense: Tensor, candidates: Sequence[Tensor]) -> Tensor:
        """See `Head.divergence`; over the classes. One place, the first token's."""
        return divergence_of_logits(self._logits(dense[None]), [self._logits(one[None]) for one in candidates])

    def _logits(self, hidden: Tensor) -> Tensor:
        """[1, length, width] → [1, classes] fp32."""
        return self._model(inputs_embeds=hidden).logits.float()
