"""How much an image tells of combinations of the model's coefficients."""

from __future__ import annotations

from typing import Any

from gpudia.model.plan import ReferencePlan
from gpudia.model.stack import DifferenceStack

__all__ = ["information"]

#: Model planes that are held at the same time.
_AT_ONCE = 8


def information(plan: ReferencePlan, stack: DifferenceStack, image: int, directions: Any) -> Any:
    """Information that one image holds on combinations of the coefficients, d^T N d with N = U^T W U.

    N is the exact normal matrix of the fit's last pass, of which `DifferenceStack.covariance` may be an estimate of the
    inverse. It is not formed: d^T N d is the sum of the squares of the model U d times the weights.

    Parameters
    ----------
    plan : ReferencePlan
    stack : DifferenceStack
        Of that plan.
    image : int
    directions : array (D, n)
        In the order and units of the covariance, on the plan's backend.

    Returns
    -------
    array (D,), float64
    """
    weights, _ = plan.equations_of(stack, image)
    xp, a = plan.backend.xp, plan.given.in_fit_units(directions)
    parts = [(weights * plan.design.model(a[start:start + _AT_ONCE]) ** 2).sum(axis=(1, 2, 3))
             for start in range(0, len(a), _AT_ONCE)]
    return xp.concatenate(parts)
