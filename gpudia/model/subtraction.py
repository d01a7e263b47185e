"""A plan for one use."""

from __future__ import annotations

from typing import Any

from gpudia.model.plan import ReferencePlan
from gpudia.model.stack import DifferenceStack

__all__ = ["subtract"]


def subtract(reference: Any, images: Any, errors: Any = None, masks: Any = None, *, kernel_size: int,
             error: Any = None, mask: Any = None, keep: tuple[str, ...] = (), **settings: Any) -> DifferenceStack:
    """Subtract a reference from one or many images: builds a `ReferencePlan`, uses it once and drops it.

    Parameters
    ----------
    reference : array (H, W)
    images : array (B, H, W) or (H, W)
    errors, masks : arrays like `images`, optional
        One sigma, ADU; True = ignore.
    kernel_size : int
        Odd, pixels.
    error, mask : arrays like `reference`, optional
    keep, **settings
        As `ReferencePlan` and its `subtract` take them.

    Returns
    -------
    DifferenceStack
    """
    plan = ReferencePlan(reference, kernel_size, error=error, mask=mask, **settings)
    return plan.subtract(images, errors, masks, keep=keep)
