"""Gradients of the next-token loss, one piece of the model at a time: the head, then block after block backwards.

The loss L is the sum over all predicted tokens of the cross-entropy in nats; a window of n tokens predicts n − 1. It
is a sum and never a mean: windows add up, and so do shards.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from workflows.scoring.gram import full_precision

LOGITS_AT_ONCE = 1 << 26  # numbers; 256 MiB in fp32


@torch.no_grad()
@full_precision()
def head_backward(
    hidden: Tensor, targets: Tensor, head: Sequence[Tensor], cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Loss of some tokens, and its gradient with respect to what enters the head.

    Logits of a bounded number of tokens are held at once, and the head is cast to the type of `hidden` piece by
    piece. The gradient of a softmax is written down rather than left to autograd, which would keep several copies of
    all logits: ∂L/∂z = softmax(z) − onehot, times 1 − (z/cap)² where z = cap · tanh(logit / cap).

    Args:
        hidden: [tokens, width], what the final norm gives; float32 or bfloat16.
        targets: [tokens] int64, the token that each one should predict.
        head: weight [vocabulary, width] in pieces of consecutive rows, any floating type.
        cap: the model's `final_logit_softcapping`, if it has one.

    Returns:
        The summed loss (fp64, a scalar), and ∂L/∂hidden [tokens, width] in the type of `hidden`.
    """
    vocabulary = sum(len(piece) for piece in head)
    at_once = max(1, LOGITS_AT_ONCE // vocabulary)
    loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
    gradients = []
    # made once, for new pages take long
    room = torch.empty(min(at_once, len(hidden)), vocabulary, device=hidden.device)
    slopes = torch.empty_like(room) if cap is not None else torch.empty(0)
    for states, wanted in zip(hidden.split(at_once), targets.split(at_once), strict=True):
        logits = room[: len(states)]
        places = logits.split([len(piece) for piece in head], dim=1)
        for place, piece in zip(places, head, strict=True):
            place.copy_(states @ piece.to(states.dtype).mT)
        if cap is not None:
            logits.div_(cap).tanh_()
            slope = torch.square(logits, out=slopes[: len(states)]).neg_().add_(1)
            logits.mul_(cap)
        largest = logits.amax(1, keepdim=True)
        right = logits.gather(1, wanted[:, None])
        total = logits.sub_(largest).exp_().sum(1, keepdim=True)
        loss += (total.log() + largest - right).double().sum()
        logits.div_(total)
        logits.scatter_add_(1, wanted[:, None], torch.full_like(right, -1))
        if cap is not None:
            logits.mul_(slope)
        gradient = torch.zeros(states.shape, device=hidden.device)
        for place, piece in zip(places, head, strict=True):
            gradient += place.to(states.dtype) @ piece.to(states.dtype)
        gradients.append(gradient.to(hidden.dtype))
    return loss, torch.cat(gradients)


@torch.enable_grad()
def block_backward(
    run: Callable[[Tensor], Tensor], linears: Mapping[str, nn.Linear], hidden: Tensor, gradient: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """One window backwards through a block whose parameters are frozen; its forward is done again for that.

    Not under `torch.inference_mode`, and nothing that `run` uses may come from there.

    Args:
        run: the block, [1, length, width] → the same shape.
        linears: parts of the block that are observed, by name.
        hidden: what enters the block; has no gradient itself.
        gradient: ∂L/∂output of the block, same shape.

    Returns:
        ∂L/∂hidden, and for every linear the sum over the window's tokens of (∂L/∂y_o)², [out] fp32; zeros for one
        that no token went through.
    """
    squares = {name: torch.zeros(linear.out_features, device=hidden.device) for name, linear in linears.items()}

    def add(name: str, own: Tensor) -> None:  # gives nothing back: what a hook returns replaces the gradient
        squares[name] += own.flatten(0, -2).float().square().sum(0)

    def watch(name: str, output: Tensor) -> None:
        output.register_hook(lambda own: add(name, own))

    hooks = [
        linear.register_forward_hook(lambda _, inputs, output, name=name: watch(name, output))
        for name, linear in linears.items()
    ]
    try:
        inputs = hidden.detach().requires_grad_()
        (entering,) = torch.autograd.grad(run(inputs), inputs, gradient)
    finally:
        for hook in hooks:
            hook.remove()
    return entering, squares


@torch.enable_grad()
def norm_backward(norm: nn.Module, hidden: Tensor, backward: Callable[[Tensor], Tensor]) -> Tensor:
    """∂L/∂hidden of the last boundary: through the final norm and whatever comes after it.

    Args:
        norm: the final norm, frozen.
        hidden: [tokens, width], what the last block gave.
        backward: gives ∂L/∂(norm's output) from the norm's output.
    """
    inputs = hidden.detach().requires_grad_()
    output = norm(inputs)
    (entering,) = torch.autograd.grad(output, inputs, backward(output.detach()))
    return entering
