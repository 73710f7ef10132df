"""What tuning minimises: the task's own loss, and the divergence from the dense model's predictions."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from workflows.evaluation.quality import HEAD_CHUNK, next_token_logits


class Objective(nn.Module):
    """Loss of a student against text and teacher.

    Final norm and head are the dense model's own in both, since only blocks are tuned; so the student borrows the
    teacher's head. Logits are made in chunks of tokens: those of a whole window of a 262k-word vocabulary would be
    the largest thing in memory.

    Args:
        student: the model that is tuned.
        teacher: the dense model; gives the head, and with `distill_weight` > 0 the targets.
        distill_weight: α in (1 - α) · cross entropy + α · KL(teacher ‖ student), both per token.
    """

    def __init__(self, student: Any, teacher: Any, distill_weight: float) -> None:
        super().__init__()
        self.student = student
        self._teacher = [teacher]  # in a list, so that it is no submodule: nobody shards or tunes it
        self.distill_weight = distill_weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean losses [3] over tokens [windows, length]: total, cross entropy, KL; gradients flow from the first."""
        teacher = self._teacher[0]
        hidden = self.student.model(tokens, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        targets = tokens[:, 1:].flatten()
        wanted = None
        if self.distill_weight:
            with torch.no_grad():
                wanted = teacher.model(tokens, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        total, lm, kl = HeadLoss.apply(hidden, teacher, targets, wanted, self.distill_weight)
        return torch.stack([total, lm, kl])


class ClassObjective(nn.Module):
    """Loss of a classifier against labels and teacher; pooler and classifier are the dense model's own in both.

    Args:
        student: the model that is tuned.
        teacher: the dense model; gives, with `distill_weight` > 0, the targets.
        distill_weight: α in (1 - α) · cross entropy + α · KL(teacher ‖ student), both per text.
    """

    def __init__(self, student: Any, teacher: Any, distill_weight: float) -> None:
        super().__init__()
        self.student = student
        self._teacher = [teacher]  # as in `Objective`
        self.distill_weight = distill_weight

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean losses [3]: total, cross entropy, KL; gradients flow from the first.

        Args:
            tokens: [texts, length], padded at their ends.
            mask: [texts, length], 0 where there is padding, which no other token then sees.
            labels: [texts], numbers of classes.
        """
        logits = functional.log_softmax(self.student(tokens, attention_mask=mask).logits.float(), dim=-1)
        task = functional.nll_loss(logits, labels)
        kl = torch.zeros_like(task)
        if self.distill_weight:
            with torch.no_grad():
                wanted = self._teacher[0](tokens, attention_mask=mask).logits.float().log_softmax(-1)
            kl = functional.kl_div(logits, wanted, reduction="batchmean", log_target=True)
        return torch.stack([(1 - self.distill_weight) * task + self.distill_weight * kl, task, kl])


class HeadLoss(torch.autograd.Function):
    """Losses of hidden states under a frozen head, chunk by chunk.

    The head is frozen, so the gradient with respect to the hidden states is all that a backward pass needs of it: it
    is taken right where the logits are, which are then dropped and never made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: Any,
        targets: torch.Tensor,
        wanted: torch.Tensor | None,
        distill_weight: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean losses per token (total, cross entropy, KL); see `Objective` and `token_losses`."""
        count = len(targets)
        sums = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        gradients = []
        for start in range(0, count, HEAD_CHUNK):
            part = slice(start, start + HEAD_CHUNK)
            states = hidden[part].detach().requires_grad_()
            with torch.enable_grad():
                losses = token_losses(head, states, targets[part], None if wanted is None else wanted[part])
                mean = ((1 - distill_weight) * losses[0] + distill_weight * losses[1]) / count
            gradients.append(torch.autograd.grad(mean, states)[0])
            sums += losses.detach()
        ctx.save_for_backward(torch.cat(gradients))
        lm, kl = sums / count
        return (1 - distill_weight) * lm + distill_weight * kl, lm, kl

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Only the total has a gradient."""
        (saved,) = ctx.saved_tensors
        return gradient * saved, None, None, None, None


def token_losses(head: Any, hidden: torch.Tensor, targets: torch.Tensor, wanted: torch.Tensor | None) -> torch.Tensor:
    """Summed cross entropy and KL(teacher ‖ student) of some tokens, [2] fp32.

    Args:
        head: model whose head turns hidden states into logits.
        hidden: the student's [tokens, width].
        targets: next tokens [tokens].
        wanted: the teacher's hidden states [tokens, width]; without them the KL is 0.
    """
    log_student = functional.log_softmax(next_token_logits(head, hidden), dim=-1)
    lm = functional.nll_loss(log_student, targets, reduction="sum")
    if wanted is None:
        return torch.stack([lm, torch.zeros_like(lm)])
    with torch.no_grad():
        log_teacher = functional.log_softmax(next_token_logits(head, wanted), dim=-1)
    kl = functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return torch.stack([lm, kl])
