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
        at_once: numbers of one model's logits that are held at once; four times as many are in memory.

    Returns:
        [candidates] fp64.
    """
    vocabulary = sum(len(piece) for piece in head)
    tokens = max(1, at_once // vocabulary)
    sums = torch.zeros(len(candidates), dtype=torch.float64, device=dense.device)
    # made once, for new pages would take as long as the products
    room = torch.empty(4, min(tokens, len(dense)), vocabulary, device=dense.device)
    for start in range(0, len(dense), tokens):
        own = slice(start, start + tokens)
        logits, log_p, p, log_q = room[:, : len(dense[own])]
        _log_softmax(dense[own], head, cap, logits, log_p)
        torch.exp(log_p, out=p)
        for number, states in enumerate(candidates):
            _log_softmax(states[own], head, cap, logits, log_q)
            sums[number] += _summed(log_p, p, log_q, logits)
    return sums


@torch.no_grad()
def divergence_of_logits(dense: Tensor, candidates: Sequence[Tensor]) -> Tensor:
    """The same for logits [places, classes] that are held all at once, in double precision; [candidates] fp64."""
    log_p = dense.double().log_softmax(1)
    p = log_p.exp()
    sums = [_summed(log_p, p, one.double().log_softmax(1), torch.empty_like(p)) for one in candidates]
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64)


def _summed(log_p: Tensor, p: Tensor, log_q: Tensor, terms: Tensor) -> Tensor:
    """Σ (p · log(p/q) − p + q), a scalar fp64; overwrites log_q and `terms`. But for rounding no term is negative."""
    return torch.sub(log_p, log_q, out=terms).mul_(p).add_(log_q.exp_()).sub_(p).sum(1).double().sum()


def _log_softmax(states: Tensor, head: Sequence[Tensor], cap: float | None, logits: Tensor, found: Tensor) -> None:
    """Log-probabilities [tokens, vocabulary] fp32 go to `found`; overwrites `logits`."""
    for place, piece in zip(logits.split([len(piece) for piece in head], dim=1), head, strict=True):
        place.copy_(states @ piece.to(states.dtype).mT)
    if cap is not None:
        logits.div_(cap).tanh_().mul_(cap)
    torch.log_softmax(logits, 1, out=found)
