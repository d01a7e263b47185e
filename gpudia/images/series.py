"""A series of frames: which may be compared, and which serves best as the reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpudia.errors import ConfigError, FrameError, InputError
from gpudia.images.catalogs import FrameQuality

__all__ = ["check_mixture", "check_series", "flux_noise", "rank_references"]

#: Share of the frames that may be odd ones out; with more the series is a mixture.
_MOST_ODD = 0.1


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


def check_mixture(frames: Sequence[Any], name: str, wanted: str = "") -> dict[int, FrameError]:
    """Find the odd frames out: those whose filter, or instrument, is not that of the others.

    Parameters
    ----------
    frames : sequence of Frame
        The series, or anything with ``path`` and the attribute `name`.
    name : {"filter", "instrument"}
        What to compare.
    wanted : str
        The value that frames must have (a reference's); default: the commonest one.

    Returns
    -------
    dict of int to FrameError
        Index of a frame and why it cannot be used; at most a tenth of the frames whose value is known. Unknown (empty)
        values agree with any.

    Raises
    ------
    ConfigError
        More than a tenth differ: the series is a mixture. Names the values with their counts and says what to do.
    """
    values = [getattr(frame, name) for frame in frames]
    counts = Counter(value for value in values if value)
    best = wanted or _commonest(values)
    odd = [index for index, value in enumerate(values) if best and value and value != best]
    if len(odd) > _MOST_ODD * counts.total():
        found = ", ".join(f"{value} ({count})" for value, count in counts.most_common())
        asked = f" (that of the reference, {wanted})" if wanted else ""
        way = f"keep one with --select \"{name} == {best!r}\"" if best in counts else "name a reference among them"
        raise ConfigError(f"{name} must be the same in all frames{asked}, got {found}: {way}, or let them differ with "
                          f"--mixed {name}")
    return {i: FrameError(f"{name} must be that of the series, {best}, got {values[i]}", frames[i].path) for i in odd}


def check_series(
    frames: Sequence[Any], reference: Any | None = None, *, shapes: bool = True, same: Sequence[str] = ("filter",)
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
    same : sequence of {"filter", "instrument"}
        What else must agree. Unknown (empty) values agree with any.

    Returns
    -------
    dict of int to FrameError
        Index of a frame and why it cannot be used, naming both values. Empty where all agree.

    Raises
    ------
    ConfigError
        There is no frame at all.
    """
    if not frames:
        raise ConfigError("frames must name at least one image, got none")
    shape = reference.shape if reference else _commonest([f.shape for f in frames])
    wanted = {name: getattr(reference, name) if reference else _commonest([getattr(f, name) for f in frames])
              for name in same}
    errors = {}
    for index, frame in enumerate(frames):
        if shapes and frame.shape != shape:
            errors[index] = FrameError(f"shape must be that of the series, {shape}, got {frame.shape}", frame.path)
            continue
        for name, value in wanted.items():
            found = getattr(frame, name)
            if value and found and found != value:
                errors[index] = FrameError(f"{name} must be that of the series, {value}, got {found}", frame.path)
    return errors


def _commonest(values: Sequence[Any]) -> Any:
    """The value that occurs most often, unknown (empty) ones aside; None where all are unknown."""
    return next(iter(dict(Counter(value for value in values if value).most_common(1))), None)
