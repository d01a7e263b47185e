"""A series of frames: which may be compared, and which serves best as the reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpudia.errors import ConfigError, FrameError, InputError
from gpudia.images.catalogs import FrameQuality

__all__ = ["check_series", "flux_noise", "rank_references"]


def flux_noise(quality: FrameQuality, transparency: float = 1.0) -> float:
    r"""Expected noise of a faint star's PSF flux, in units common to a series.

    ``sky_noise * fwhm / transparency``: the PSF's effective area is :math:`4\pi\sigma^2 = 2.27\,\mathrm{fwhm}^2`, and
    the noise of an optimally weighted flux is the sky noise times its root [Naylor 1998].

    Parameters
    ----------
    quality : FrameQuality
        What the frame is like.
    transparency : float
        Flux of a star on this frame over its flux on a standard frame.

    Returns
    -------
    float
        Infinite for a frame without a measured FWHM, noise or transparency.
    """
    noise = quality.sky_noise * quality.fwhm / transparency if transparency > 0 else np.inf
    return float(noise) if np.isfinite(noise) and noise > 0 else float("inf")


def rank_references(
    qualities: Sequence[FrameQuality], transparencies: ArrayLike | None = None
) -> NDArray[np.intp]:
    """Order frames by their worth as a reference.

    Parameters
    ----------
    qualities : sequence of FrameQuality
        One per frame.
    transparencies : array_like, shape (N,), optional
        Per frame, from matched fluxes; 1 where unknown or NaN.

    Returns
    -------
    ndarray of int, shape (N,)
        Indices, best first (smallest `flux_noise`; equal ones in their order).

    Raises
    ------
    InputError
        The two have different lengths.
    """
    factors = np.ones(len(qualities)) if transparencies is None else np.asarray(transparencies, float)
    if factors.shape != (len(qualities),):
        raise InputError(f"transparencies must have shape {(len(qualities),)}, got {factors.shape}")
    factors = np.where(np.isfinite(factors), factors, 1.0)
    return np.argsort([flux_noise(q, t) for q, t in zip(qualities, factors, strict=True)], kind="stable")


def check_series(
    frames: Sequence[Any], reference: Any | None = None, *, shapes: bool = True
) -> dict[int, FrameError]:
    """Find the frames that cannot be compared with the others: another shape or another filter.

    Parameters
    ----------
    frames : sequence of Frame
        The series, or anything with their ``shape``, ``filter`` and ``path``.
    reference : Frame, optional
        What the others must agree with; default: what most of them have in common.
    shapes : bool
        Refuse other shapes too. Frames that are registered may differ in shape.

    Returns
    -------
    dict of int to FrameError
        Index of a frame and why it cannot be used, naming both values. Empty where all agree. Unknown filters agree
        with any.

    Raises
    ------
    ConfigError
        There is no frame at all.
    """
    if not frames:
        raise ConfigError("frames must name at least one image, got none")
    shape = reference.shape if reference else _commonest([f.shape for f in frames])
    band = reference.filter if reference else _commonest([f.filter for f in frames if f.filter])
    errors = {}
    for index, frame in enumerate(frames):
        if shapes and frame.shape != shape:
            errors[index] = FrameError(f"shape must be that of the series, {shape}, got {frame.shape}", frame.path)
        elif band and frame.filter and frame.filter != band:
            errors[index] = FrameError(f"filter must be that of the series, {band}, got {frame.filter}", frame.path)
    return errors


def _commonest(values: Sequence[Any]) -> Any:
    return Counter(values).most_common(1)[0][0] if values else None
