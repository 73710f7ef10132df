"""How far models' predictions are from those of a dense model: the KL divergence over the whole vocabulary, in nats."""

from collections.abc import Sequence

import torch
from torch import Tensor

from workflows.scoring.gram import full_precision

LOGITS_AT_ONCE = 1 << 25  # numbers; 128 MiB in fp32


@torch.no_grad()
@full_precision()
def divergence(
    dense: Tensor,
    candidates: Sequence[Tensor],
    head: Sequence[Tensor],
    cap: float | None = None,
    at_once: int = LOGITS_AT_ONCE,
) -> Tensor:
    """Sum over tokens of KL(dense ‖ candidate), for each candidate.

    It is computed as Σ_v (p · log(p/q) − p + q), the same where p and q sum to 1, as they do but for rounding. An
    error in the normaliser of a log-softmax, about 1e-6 in fp32, would otherwise go whole into a token's divergence;
    so it does only to second order, and no small divergence becomes a negative one.

    A candidate's result does not depend on which others are there. One whose states equal the dense ones gets exactly
    0; one whose states are not finite gets something that is not finite either.

    Args:
        dense: [tokens, width], what the final norm gives in the dense model; float32 or bfloat16.
        candidates: the same of each candidate.
        head: weight [vocabulary, width] in pieces of consecutive rows, any floating type; it is all models' head, and
            cast to the type of the states piece by piece.
        cap: the models' `final_logit_softcapping`, if they have one.
        at_once: numbers of one model's logits that are held at once; some five times as many are in memory.

    Returns:
        [candidates] fp64.
    """
    tokens = max(1, at_once // sum(len(piece) for piece in head))
    sums = torch.zeros(len(candidates), dtype=torch.float64, device=dense.device)
    for start in range(0, len(dense), tokens):
        log_p = _log_softmax(dense[start : start + tokens], head, cap)
        p = log_p.exp()
        for number, states in enumerate(candidates):
            log_q = _log_softmax(states[start : start + tokens], head, cap)
            sums[number] += _summed(log_p, p, log_q)
    return sums


@torch.no_grad()
def divergence_of_logits(dense: Tensor, candidates: Sequence[Tensor]) -> Tensor:
    """The same for logits [places, classes] that are held all at once, in double precision; [candidates] fp64."""
    log_p = dense.double().log_softmax(1)
    p = log_p.exp()
    sums = [_summed(log_p, p, one.double().log_softmax(1)) for one in candidates]
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64)


def _summed(log_p: Tensor, p: Tensor, log_q: Tensor) -> Tensor:
    """Σ (p · log(p/q) − p + q), a scalar fp64; overwrites log_q."""
    return (log_p - log_q).mul_(p).add_(log_q.exp_()).sub_(p).sum(dtype=torch.float64)


def _log_softmax(states: Tensor, head: Sequence[Tensor], cap: float | None) -> Tensor:
    """Log-probabilities [tokens, vocabulary] fp32."""
    logits = torch.empty(len(states), sum(len(piece) for piece in head), device=states.device)
    for place, piece in zip(logits.split([len(piece) for piece in head], dim=1), head, strict=True):
        place.copy_(states @ piece.to(states.dtype).mT)
    if cap is not None:
        logits.div_(cap).tanh_().mul_(cap)
    return logits.log_softmax(1)
