"""Passes through a block that halt where its linears are about to read, and go on when asked.

So a block's linears can be replaced while windows are on their way: what lies behind them reads what the new ones
give, and no window goes through a block twice. Any block will do as it is written: each pass has a stack of its own,
a greenlet, on which the block's own code waits.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from workflows.models.experts import Expert


class Reading(NamedTuple):
    """A linear is about to read.

    Attributes:
        linear: its name.
        inputs: what it reads, [..., in].
        tokens: which tokens of the window these are; None: all, in order.
    """

    linear: str
    inputs: Tensor
    tokens: Tensor | None


class Pass(Iterator[Reading]):
    """One window's way through a block, readings one after the other; each step may be taken much later.

    All steps are taken by one thread, without gradients.

    Args:
        run: takes the window through a block of `halting`.
    """

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self._greenlet = greenlet(run)
        self._output: Tensor | None = None

    def __next__(self) -> Reading:
        if not self._greenlet.dead:
            found = self._greenlet.switch()
            if not self._greenlet.dead:
                return found
            self._output = found
        raise StopIteration

    def finish(self) -> Tensor:
        """What the block gives."""
        for _ in self:
            pass
        assert self._output is not None, "the block did not come to its end"
        return self._output


def halting(block: nn.Module, linears: Iterable[str]) -> nn.Module:
    """The block, in which every `Pass` halts where one of some linears is about to read."""
    for name in linears:
        _entrance(block, name).register_forward_pre_hook(lambda _, args, name=name: _halt(name, *args))
    return block


def replace(block: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Gives some of a block's parameters new values, in the type and on the device that they had."""
    olds = {name: block.get_parameter(name) for name in weights}
    own = {name: new.to(device=olds[name].device, dtype=olds[name].dtype) for name, new in weights.items()}
    block.load_state_dict(own, strict=False, assign=True)


def _halt(name: str, inputs: Tensor, tokens: Tensor | None = None) -> None:
    who_goes_on = getcurrent().parent
    assert who_goes_on is not None, "the block is run without a Pass"
    who_goes_on.switch(Reading(name, inputs, tokens))


def _entrance(block: nn.Module, linear: str) -> nn.Module:
    """What a linear's input goes through before any linear of its kind is used: itself, but for experts."""
    where, _, own = linear.rpartition(".")
    reader = block.get_submodule(where)
    return reader.entrance(own) if isinstance(reader, Expert) else block.get_submodule(linear)
