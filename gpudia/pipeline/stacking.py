"""A stack of the best frames as the reference of a run."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from gpudia.backend import Backend, to_device, to_host
from gpudia.config import RunConfig
from gpudia.errors import ConfigError, FrameError
from gpudia.flags import FRAME_FLAGS, PIXEL_FLAGS
from gpudia.images import Frame, detect_stars, flux_noise, frame_quality
from gpudia.model import Coadd
from gpudia.pipeline.looks import FrameStore, Look, Seen, frame_errors
from gpudia.pipeline.prepare import Prepared, images_at_once, in_batches, place_batch, prepare, resampled, subtracted
from gpudia.pipeline.reference import RunReference, also_varying, carried_model, provisional, reference_of
from gpudia.pipeline.registering import rank_looks

__all__ = ["stack_reference"]

log = logging.getLogger("gpudia.pipeline")

#: Most frames in a stack whose size is not given: each further one lowers the noise of a difference by under 2.5 %.
_MOST = 20
_ROUNDS = 5
_SAME_SCALE = 0.05
#: Most the kernel of a member varies while the stack is made: it finds outliers and fills holes.
_DEGREE = 1


@dataclass(frozen=True)
class _Member:
    look: Look
    prepared: Prepared


def stack_reference(best: RunReference, looks: Sequence[Look], config: RunConfig, store: FrameStore,
                    backend: Backend) -> RunReference:
    """Make the mean of the best frames the reference, on the best one's grid, flux scale and sky.

    Parameters
    ----------
    best : RunReference
        Of the best frame, with which all others are registered.
    looks : sequence of Look
        All frames; those that are registered and sharp enough can be members.
    config, store, backend
        Of the run; what is "auto" in the kernel's model is settled after this.

    Returns
    -------
    RunReference
        With the stack as its cutout, stars detected on it (or the best frame's catalog with ids), and the members'
        weights.

    Raises
    ------
    ConfigError
        If fewer than two frames can be stacked.

    Notes
    -----
    In rounds: the first subtracts the members against the best frame, each other against the stack of the one before,
    which is deeper and has no holes where the best frame had some. See `gpudia.model.Coadd` for how they are put
    together. What is filled in settles by a half in each round; they end when no pixel changes by a sigma.
    What the scales of all members have in common of errors is in the mean's unit of flux: in each round that is put
    right by the best frame's own scale against it. So the scale of a frame in that unit is the ratio of two scales, its
    own and the best frame's: the stack's noise, nearly the same relative error in both, is not in it, the best frame's
    own noise is.
    A member weighs by the inverse square of the noise of a faint star's flux, sky noise times FWHM over the scale.
    Frames that would have to be resampled, which correlates the noise of their pixels, stay out where there are others
    beside the best one.
    """
    model = carried_model(best, config, _DEGREE)
    members = _choose(best, looks, model, store)
    log.info("stack of %d frames: %s", len(members), ", ".join(m.look.name for m in members))
    current = replace(best, config=model)
    for number in range(_ROUNDS):
        found = _round(current, members, model, backend, best.look)
        mean = _frame_of(found, best.cutout, members, complete=False)
        change = _largest_change(current.cutout, mean)
        log.debug("round %d of the stack: changed by up to %.2f sigma", number + 1, change)
        if number and change < 1:
            break
        current = _reference_of(mean, best, looks, model)
    mean = _frame_of(found, best.cutout, members, complete=True)
    final = _reference_of(mean, best, looks, provisional(config))
    total = sum(found.weights.values())
    weights = {name: weight / total for name, weight in found.weights.items() if weight > 0}
    return replace(final, weights=weights, unit_error=found.unit_error)


def _largest_change(before: Frame, after: Frame) -> float:
    """Largest difference of pixels that are good in both, in sigma of the later one."""
    both = (before.mask == 0) & (after.mask == 0)
    return float(np.max(np.abs(after.data - before.data)[both] / np.sqrt(after.variance[both]), initial=0.0))


def _choose(best: RunReference, looks: Sequence[Look], config: RunConfig, store: FrameStore) -> list[_Member]:
    wanted = _MOST if config.stack_size == "auto" else int(config.stack_size)
    members: list[_Member] = []
    later: list[Look] = []  # would have to be resampled
    for look in _candidates(best, looks, config):
        if len(members) < wanted:
            if resampled(look.registration, best.region, config):
                later.append(look)
            else:
                members += _prepared(look, best, config, store)
    least = wanted if config.stack_size != "auto" or len(members) < 2 else 2
    for look in later:
        if len(members) < least:
            members += _prepared(look, best, config, store)
    if len(members) < 2:
        raise ConfigError(f"reference must be 'auto' or a file where fewer than 2 frames can be stacked, got 'stack' "
                          f"with {len(members)} of {len(looks)} frames sharp and registered")
    if config.stack_size != "auto" and len(members) < wanted:
        log.warning("the stack has %d frames, not %d: no more can be registered and cover the region", len(members),
                    wanted)
    return members


def _candidates(best: RunReference, looks: Sequence[Look], config: RunConfig) -> list[Look]:
    """Frames of the best one's filter, instrument and pixel scale, best first; blunt ones for a number only."""
    usable = [look for look in looks if not look.reason and look.registration is not None and look.quality is not None
              and abs(look.fwhm / look.quality.fwhm - 1) < _SAME_SCALE
              and all(getattr(look, kind) in ("", getattr(best.look, kind)) for kind in ("filter", "instrument"))]
    ranked = rank_looks(usable, config) if usable else []
    sharp = [best.look, *(look for look in ranked if look is not best.look)]
    if config.stack_size == "auto":
        return sharp
    names = {look.name for look in sharp}
    others = [look for look in usable if look.name not in names and math.isfinite(look.fwhm)]
    return sharp + sorted(others, key=lambda look: look.fwhm)


def _prepared(look: Look, best: RunReference, config: RunConfig, store: FrameStore) -> list[_Member]:
    """The frame on the reference's grid; none where it does not cover the region."""
    try:
        with frame_errors(look.path):
            return [_Member(look, prepare(partial(store.part, look), look.registration, best.region, config))]
    except FrameError as error:
        log.info("%s is left out of the stack: %s", look.path.name, error.reason)
        return []


@dataclass(frozen=True)
class _Round:
    """Sums over the members, their weights (0: no solution) and the bits that any of them has, (H, W).

    `unit` is the best frame's scale against what all were subtracted from: that of its flux in the unit of the sums;
    `unit_error` its relative error by that frame's own noise.
    """

    sums: Coadd
    weights: dict[str, float]
    bits: np.ndarray
    unit: float = 1.0
    unit_error: float = 0.0


def _round(current: RunReference, members: Sequence[_Member], config: RunConfig, backend: Backend,
           best: Look) -> _Round:
    """Subtract the members against the current reference and sum them."""
    plan, shape, unit, error = current.plan, current.region.shape, 1.0, 0.0
    found = _Round(Coadd(plan.reference.data), {}, np.zeros(shape, np.uint8))
    for batch in in_batches(members, images_at_once(plan, config, backend)):
        placed = place_batch([m.prepared for m in batch], shape, backend)
        stack = subtracted(plan, placed)
        failed, scale = to_host(stack.failed), to_host(stack.scale)
        each = np.array([0.0 if bad or not s > 0 or m.look.quality is None else flux_noise(m.look.quality, s) ** -2
                         for m, s, bad in zip(batch, scale, failed, strict=True)])
        variance = placed.error**2 if placed.noise_ratio is None else placed.error**2 * placed.noise_ratio
        own = np.array([m.look is current.look for m in batch])
        found.sums.add(stack, placed.data, variance, placed.mask, to_device(each, backend), to_device(own, backend))
        found.bits[...] |= np.bitwise_or.reduce(placed.bits, axis=0)
        found.weights.update({m.look.name: float(w) for m, w in zip(batch, each, strict=True)})
        for m, s, e, w in zip(batch, scale, to_host(stack.scale_error_image), each, strict=True):
            if m.look is best and w > 0:
                unit, error = float(s), float(e / s)
    return replace(found, unit=unit, unit_error=error)


def _reference_of(cutout: Frame, best: RunReference, looks: Sequence[Look], config: RunConfig) -> RunReference:
    """Reference of the members' mean: its stars and quality."""
    fwhm = best.look.quality.fwhm if best.look.quality is not None else None
    stars = detect_stars(cutout, config.max_stars, config.detection_threshold, fwhm)
    quality = frame_quality(cutout, stars)
    stars["x"], stars["y"] = best.region.to_frame(np.column_stack([stars["x"], stars["y"]])).T
    look = replace(best.look, name="stack", seen=Seen(stars, best.look.catalog, best.look.wcs), quality=quality,
                   mjd=cutout.mjd, flags=cutout.flags,
                   numbers={})
    return also_varying(reference_of(look, cutout, best.region, looks, config), best.varying)


def _frame_of(found: _Round, first: Frame, members: Sequence[_Member], complete: bool) -> Frame:
    """The stack as a frame like the first of its members, in the flux unit of the best."""
    mean, bits = found.sums.result(complete), found.bits
    data, variance, mask = (to_host(plane) for plane in (mean.data, mean.variance, mean.mask))
    good = ~mask & np.isfinite(data) & (variance > 0)
    if not good.any():
        raise FrameError("stack must have good pixels, got none", first.path)
    data, variance = data + (found.unit - 1) * (data - np.median(data[good])), variance * found.unit**2
    bits = np.where(good, 0, np.where(bits != 0, bits, PIXEL_FLAGS.no_data)).astype(np.uint8)
    sky, noise = float(np.median(data[good])), float(np.median(np.sqrt(variance[good])))
    known = [(m.look.mjd, found.weights[m.look.name]) for m in members if math.isfinite(m.look.mjd)]
    total = sum(weight for _, weight in known)
    seen = np.where(np.isfinite(data), data, first.data)  # saturated everywhere: still a star to whoever looks at it
    return replace(first, name="stack", data=seen.astype(first.data.dtype),
                   variance=np.where(good, variance, noise**2).astype(first.variance.dtype), mask=bits, sky=sky,
                   sky_noise=noise, gain=math.nan,
                   mjd=sum(mjd * weight for mjd, weight in known) / total if total > 0 else math.nan,
                   read_noise=math.nan, fwhm=math.nan, flags=first.flags & ~FRAME_FLAGS.partly_outside)
