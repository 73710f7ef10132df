"""What a solver is, and which there are. A new one is a new file and one line below."""

from typing import Literal, Protocol

from torch import Tensor

from workflows.pruning.admm import Admm
from workflows.pruning.magnitude import Magnitude
from workflows.pruning.sparsegpt import SparseGPT
from workflows.pruning.wanda import Wanda


class Solver(Protocol):
    """Chooses weights of some rows of a linear, removes them and repairs the rest.

    Rows are independent given the Gram, so a matrix is solved in row chunks of a size that the recipe fixes:
    results never depend on the number of workers.
    """

    @property
    def statistic(self) -> Literal["none", "diagonal", "gram"]:
        """What it needs of the linear's inputs: nothing, the Gram's diagonal [in], or the Gram [in, in]."""
        ...

    def prepare(self, statistic: Tensor, damping: float) -> tuple[Tensor, ...]:
        """What all row chunks share, made once per Gram.

        Args:
            statistic: what `statistic` names; a whole Gram also does where the diagonal is enough.
            damping: λ as a share of the Gram's mean diagonal.

        Raises:
            ValueError: the statistic cannot be used, for example because it holds NaN.
        """
        ...

    def solve(self, weight: Tensor, prepared: tuple[Tensor, ...], pattern: str, sparsity: float) -> Tensor:
        """Pruned and repaired rows, as a new tensor.

        Weights that are zero already go first, so a second stage adds zeros to those of the first.

        Args:
            weight: [rows, in] fp32, left as it is.
            prepared: what `prepare` returned; empty when no statistic is needed.
            pattern: as in the recipe.
            sparsity: share of zeros in the result.

        Raises:
            ValueError: pattern, sparsity and shape do not fit, or something is NaN.
        """
        ...


SOLVERS: dict[str, Solver] = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "sparsegpt": SparseGPT(),
    "admm": Admm(),
}


def statistic_for(name: str, goes_on: bool) -> Literal["none", "diagonal", "gram"]:
    """What a solver needs of the inputs, and what follows it (a refit, swaps): that needs the whole Gram."""
    return "gram" if goes_on else SOLVERS[name].statistic
