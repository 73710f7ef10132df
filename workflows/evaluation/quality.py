"""How well a model predicts: the scores of every window, from which perplexity, accuracy and all else is made."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from workflows.data.windows import Windows

HEAD_CHUNK = 128  # tokens whose logits are held at once: 262k words x 128 x 4 bytes is 128 MiB
RESAMPLES = 1000
BOUNDS = [0.025, 0.975]  # of a 95 % interval
LARGEST_MEAN = 700.0  # nats a token; e to the power of more overflows fp64


class WindowScore(BaseModel):
    """One window's sums: over `tokens` predicted tokens, the loss in nats and how many were predicted right.

    A classifier predicts one thing for each text, its class: then `label` is the right one, `chosen` the model's.
    """

    model_config = ConfigDict(frozen=True)

    slice: str
    tokens: int
    loss: float | None  # None: not finite, the model is broken
    right: int
    label: int | None = Field(None, exclude_if=lambda value: value is None)
    chosen: int | None = Field(None, exclude_if=lambda value: value is None)


class Quality(BaseModel):
    """Scores of every window, from which all numbers are made. Windows keep their order, so models can be paired."""

    model_config = ConfigDict(frozen=True)

    windows: tuple[WindowScore, ...]

    @property
    def finite(self) -> bool:
        """Whether the model is sound: every loss is a number, and their mean is not beyond all numbers."""
        return self.perplexity is not None

    @property
    def classifies(self) -> bool:
        """Whether these are a classifier's scores."""
        return any(one.label is not None for one in self.windows)

    @property
    def slices(self) -> list[str]:
        """Names of the slices, sorted."""
        return sorted({one.slice for one in self.windows})

    @property
    def token_accuracy(self) -> float:
        """Share of tokens that the model would have chosen itself; of a classifier, of texts that it got right."""
        return sum(one.right for one in self.windows) / sum(one.tokens for one in self.windows)

    def of_slice(self, name: str) -> "Quality":
        """The quality on one slice alone."""
        return Quality(windows=tuple(one for one in self.windows if one.slice == name))

    @property
    def perplexity(self) -> float | None:
        """Exp of the mean loss per token; None when a loss is not finite, the mean overflows or there is no window."""
        if not self.windows:
            return None
        loss, tokens = self.sums()
        mean = loss.sum() / tokens.sum()
        return float(np.exp(mean)) if mean < LARGEST_MEAN else None

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Loss and tokens of every window, fp64."""
        loss = np.array([math.inf if one.loss is None else one.loss for one in self.windows])
        return loss, np.array([one.tokens for one in self.windows], dtype=np.float64)

    def interval(self, seed: int = 0) -> tuple[float, float] | None:
        """95 % bootstrap interval of the perplexity, resampling windows."""
        if not self.finite:
            return None
        loss, tokens = self.sums()
        picks = resamples(len(loss), seed)
        values = np.exp(np.minimum(loss[picks].sum(1) / tokens[picks].sum(1), LARGEST_MEAN))
        low, high = np.quantile(values, BOUNDS)
        return float(low), float(high)


def resamples(count: int, seed: int) -> np.ndarray:
    """Window numbers [RESAMPLES, count], drawn with replacement."""
    return np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))


def measure_quality(model: Any, windows: Windows) -> Quality:
    """Scores a model. Windows go through it one at a time, so a score does not depend on which others are there.

    Args:
        model: a Hugging Face causal language model; a sequence classifier where windows have labels.
        windows: what it is judged on.
    """
    return score_tokens(model, windows) if windows.labels is None else score_classes(model, windows)


@torch.inference_mode()
def score_classes(model: Any, windows: Windows) -> Quality:
    """Scores a classifier's choice for every text."""
    device = next(model.parameters()).device
    scores = []
    for number, (row, name) in enumerate(zip(windows.tokens, windows.slices, strict=True)):
        logits = model(torch.from_numpy(row.astype(np.int64)).to(device)[None]).logits.float()
        label = windows.wanted(number)
        loss = nn.functional.cross_entropy(logits, torch.from_numpy(label).to(device)[None]).item()
        wanted, chosen = int(label), int(logits.argmax())
        finite = loss if math.isfinite(loss) else None
        scores.append(
            WindowScore(slice=name, tokens=1, loss=finite, right=int(chosen == wanted), label=wanted, chosen=chosen)
        )
    return Quality(windows=tuple(scores))


@torch.inference_mode()
def score_tokens(model: Any, windows: Windows) -> Quality:
    """Scores every token of every window but the first, which is context."""
    device = next(model.parameters()).device
    scores = []
    for row, label in zip(windows.tokens, windows.slices, strict=True):
        tokens = torch.from_numpy(row.astype(np.int64)).to(device)[None]
        hidden = model.model(tokens, use_cache=False).last_hidden_state[0, :-1]
        loss, right = 0.0, 0
        for states, targets in zip(hidden.split(HEAD_CHUNK), tokens[0, 1:].split(HEAD_CHUNK), strict=True):
            logits = next_token_logits(model, states)
            loss += nn.functional.cross_entropy(logits, targets, reduction="sum").double().item()
            right += int((logits.argmax(-1) == targets).sum())
        finite = loss if math.isfinite(loss) else None
        scores.append(WindowScore(slice=label, tokens=hidden.shape[0], loss=finite, right=right))
    return Quality(windows=tuple(scores))


def next_token_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """fp32 logits [tokens, vocabulary] from hidden states [tokens, width], capped as Gemma 2 does."""
    logits = model.lm_head(hidden).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def merge(parts: Sequence[Quality]) -> Quality:
    """The quality over all windows of the parts, in their order."""
    return Quality(windows=tuple(window for part in parts for window in part.windows))
