"""Forced photometry of the epochs of a run: apertures and PSF fluxes of the reference's stars and of the target."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from gpudia.backend import backend_of, to_device, to_host
from gpudia.flags import PIXEL_FLAGS, SOURCE_FLAGS
from gpudia.images import sky_and_noise
from gpudia.model import DifferenceStack, ReferencePlan, evaluate_terms
from gpudia.photometry import (
    CombinedFluxes,
    EpochNoise,
    ForcedFluxes,
    Psf,
    Stamps,
    StarStamp,
    choose_aperture_radius,
    close_pairs,
    combine,
    crowded_photometry,
    empirical_psf,
    epoch_psf,
    forced_photometry,
    overlaps,
    separate,
    variability,
)
from gpudia.photometry.apertures import aperture_weights, stamp_side
from gpudia.photometry.crowded import first_of_place
from gpudia.photometry.psf import to_size
from gpudia.photometry.stamps import StampsOn
from gpudia.pipeline.blank import blank_places
from gpudia.pipeline.reference import RunReference, widest_seeing

__all__ = ["EpochFluxes", "Measures", "measure_batch", "prepare_measures", "recommended", "separated",
           "side_of_stamps"]

log = logging.getLogger("gpudia.pipeline")

Float = NDArray[np.float64]
Bits = NDArray[np.uint8]
#: Share of a star's light in the aperture that masked pixels may hide; the PSF makes up for it.
_MASKED = 0.2
#: Stars that say whether the PSF describes the differences.
_BRIGHTEST = 10
#: Difference of PSF flux and aperture sum, over both errors, that noise does not explain in most of them.
_DISAGREE = 0.8


@dataclass(frozen=True)
class Measures:
    """What the photometry of all epochs shares.

    Positions (S, 2) are those of the reference's stars in the cutout, with the target (if any) as the last row. Fluxes
    of the reference are total fluxes without the neighbours' light, ADU, by method. `stamp_size` is the side of the
    stars' stamps in the worst seeing, `pairs` (P, 2) are rows of stars whose images overlap; `first` (S,) is the first
    row at each one's place; `varying` (S,) are the rows that say nothing about the model: what is kept out of the fit,
    as it varies or may vary. `blank` (N, 2) are places without a star. `order` (S + N,) are stars and then these by how
    often they are lost; empty: as they are.
    """

    positions: Float
    has_target: bool
    radius: float
    stamp_size: int
    psf: Psf
    flux: dict[str, Float]
    flux_error: dict[str, Float]
    flags: dict[str, NDArray[np.int32]]
    reference: Float
    reference_variance: Float
    shape: tuple[int, int]
    background_degree: int
    pairs: NDArray[np.int64]
    first: NDArray[np.int64]
    varying: NDArray[np.bool_]
    blank: Float = field(default_factory=lambda: np.empty((0, 2)))
    order: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    @cached_property
    def ready(self) -> dict[Any, Any]:
        """What the photometry of one batch keeps for the next."""
        return {}


@dataclass(frozen=True)
class EpochFluxes:
    """Fluxes of all positions in one epoch, ADU of the reference, and flags, by method; scale at each position.

    The error of the scale is the image's own: the reference's part is the same in all epochs. `target` is what the
    difference shows around the target, where there is one; `overlaps` (P, 2) those of `Measures.pairs`; `blank` fluxes
    and errors (2, N) at the places without a star, by method.
    """

    fluxes: dict[str, CombinedFluxes]
    flags: dict[str, NDArray[np.int32]]
    scale: Float
    scale_error: float
    target: StarStamp | None = None
    overlaps: Float = field(default_factory=lambda: np.empty((0, 2)))
    blank: dict[str, Float] = field(default_factory=dict)


def prepare_measures(reference: RunReference, fwhms: list[float], aperture_radius: float | str,
                     background_degree: int, seen: Bits | None = None) -> Measures:
    """Choose the aperture, build the PSF of the reference and measure all stars on it.

    `seen` (F, H, W) are pixel flags of some frames, which tell the stars that most will lose.
    """
    cutout, stars = reference.cutout, reference.stars
    positions = np.column_stack([stars["x_cutout"], stars["y_cutout"]]).astype(float)
    if reference.target is not None:
        positions = np.vstack([positions, reference.target])
    own = reference.look.quality.fwhm if reference.look.quality is not None else math.nan
    known = [f for f in fwhms if math.isfinite(f)] or [own if math.isfinite(own) else 4.0]
    radius = choose_aperture_radius(known) if aperture_radius == "auto" else float(aperture_radius)
    sky, _ = sky_and_noise(cutout.data, cutout.mask != 0)
    image = cutout.data - sky
    fwhm = own if math.isfinite(own) else 4.0
    psf = empirical_psf(image, cutout.variance, cutout.mask, positions, fwhm)
    log.info("aperture radius %.2f px; PSF of the reference: %s of %d stars%s", radius, psf.method, psf.n_stars,
             ", varying over the region" if psf.varies else "")
    # Stars that share light are measured together, with those that the list lacks; what lies within half a FWHM of
    # another is no star of its own.
    place = max(fwhm / 2, 0.5)
    found = crowded_photometry(image, cutout.variance, cutout.mask, positions, psf, radius, one_place=place,
                               search=True, max_masked_fraction=_MASKED)
    first = first_of_place(positions, place)
    pairs = close_pairs(positions, place, float(np.median(known)))
    pairs = pairs[(first[pairs] == pairs).all(axis=1)]
    inside, fitted = found.aperture, found.psf
    varying = _at_places(positions, first, reference.varying, place)
    blank = blank_places(cutout.mask, positions, fitted.flux, fitted.error, varying, widest_seeing(known), len(fwhms))
    return Measures(
        positions, reference.target is not None, radius, side_of_stamps(widest_seeing(known), radius), psf,
        {"ap": inside.flux, "psf": fitted.flux}, {"ap": inside.error, "psf": fitted.error},
        {"ap": inside.flags, "psf": fitted.flags},
        np.where(cutout.mask != 0, np.nan, cutout.data).astype(float), cutout.variance.astype(float), cutout.shape,
        background_degree, pairs, first, varying, blank,
        np.empty(0, np.int64) if seen is None else _safest_first(np.vstack([positions, blank]), radius, seen))


def _safest_first(places: Float, radius: float, seen: Bits) -> NDArray[np.int64]:
    """Order of places by the share of their apertures that is ignored on some frames; all of it where an edge is in it.

    Those that are lost then come last in their block, and none of the work on the noise is done for them
    (`gpudia.photometry.blocks.Block`): a tenth of it all.
    """
    stamps = Stamps(places, stamp_side(radius))
    circles = aperture_weights(places, radius, stamps.size)[0]
    lost = np.zeros(len(places))
    for bits in seen:
        under = stamps.gather(bits, outside=PIXEL_FLAGS.border)
        share = (circles * (under & (255 - PIXEL_FLAGS.clipped) != 0)).sum(axis=(1, 2)) / circles.sum(axis=(1, 2))
        lost += np.where(((under & PIXEL_FLAGS.border != 0) & (circles > 0)).any(axis=(1, 2)), 1.0, share)
    return np.argsort(lost, kind="stable")


def _at_places(positions: Float, first: NDArray[np.int64], places: Float, reach: float) -> NDArray[np.bool_]:
    """Rows within reach of some places, with all rows that are the same star as one of these."""
    if not len(positions) or not len(places):
        return np.zeros(len(positions), bool)
    near = np.concatenate(cKDTree(positions).query_ball_point(places, reach)).astype(int)
    return np.isin(first, first[near])


def recommended(measures: Measures, epochs: Sequence[EpochFluxes]) -> str:
    """Choose the measure that fills the columns without a suffix, "psf" or "ap".

    PSF fluxes scatter by the Cramer-Rao bound, aperture sums by a fifth more (bench/photometry.py). But sums feel less
    of it where kernel and PSF do not describe what the bright stars leave on the differences: in the two RISE frames
    that are dithered by 100 px the ones are off by 1.5 % (median of five bright stars), the others by 4 %. The two then
    disagree. So it is the sums where for most of the ten brightest stars they do so by more than 0.8 of their errors
    (two sigma: they share most of their noise, and differ by 0.4 of them) in more than a quarter of the epochs; and
    where the PSF was not made of stars.
    """
    if measures.psf.method == "assumed":
        return "ap"
    flux = measures.flux["psf"]
    good = np.isfinite(flux) & (measures.flags["psf"] & (SOURCE_FLAGS.saturated | SOURCE_FLAGS.outside) == 0)
    bright = np.argsort(-np.where(good, flux, -np.inf), kind="stable")[:min(_BRIGHTEST, int(good.sum()))]
    disagree = []
    for one in epochs:
        psf, sums = (one.fluxes[name] for name in ("psf", "ap"))
        with np.errstate(invalid="ignore", divide="ignore"):
            off = np.abs(psf.flux_diff - sums.flux_diff) / np.hypot(psf.flux_diff_err, sums.flux_diff_err)
        off = off[bright][np.isfinite(off[bright])]
        disagree.append(bool(len(off)) and float(np.median(off)) > _DISAGREE)
    return "ap" if 4 * sum(disagree) > len(disagree) else "psf"


def side_of_stamps(fwhm: float, radius: float, most: int | None = None) -> int:
    """Side of the stamps: two FWHM on each side of a star, and the aperture; in steps of 4 px, `most` at most."""
    if not math.isfinite(fwhm) and most is not None:
        return most
    size = 4 * math.ceil(max(2 * fwhm, radius) / 2) + 1
    return size if most is None else min(size, most)


def measure_batch(measures: Measures, plan: ReferencePlan, stack: DifferenceStack, bits: Mapping[int, Bits],
                  noise_ratio: Any, shares: Mapping[int, float],
                  fwhms: Mapping[int, float]) -> dict[int, EpochFluxes]:
    """Measure all positions on the images of a stack, on its backend.

    Parameters
    ----------
    measures : Measures
    plan : ReferencePlan
        That made the stack.
    stack : DifferenceStack
        With what `gpudia.pipeline.epochs.kept` names.
    bits : dict of (H, W) uint8
        Pixel flags of the images to be measured, host side, by their number in the stack.
    noise_ratio : (B, H, W) or None
        Variance of sums over that of single pixels, for resampled frames.
    shares : dict of float
        What an image adds to a stacked reference, as a factor of its pixels; 0 where there is none.
    fwhms : dict of float
        Seeing of these images, pixels, which their stars' stamps follow; where NaN the largest stamps are taken.

    Returns
    -------
    dict of EpochFluxes
        By the number in the stack; those whose photometric scale is not positive everywhere are left out.
    """
    scales = {i: stack.scale_at(i, *measures.positions.T) for i in bits}
    scales = {i: scale for i, scale in scales.items() if (scale > 0).all()}
    if not scales:
        return {}
    reference = tuple(to_device(plane, plan.backend) for plane in (measures.reference_variance, measures.reference))
    noises = {i: _noise(measures, reference, plan, stack, i, noise_ratio, shares.get(i, 0.0)) for i in scales}
    sizes = {i: side_of_stamps(fwhms[i], measures.radius, measures.stamp_size) for i in scales}
    n = len(measures.positions)
    forced = _forced(measures, stack, bits, noises, sizes)
    # what a frame adds to the reference is in a total flux twice, as F_ref and as -F_ref: not less noise
    members = {i: replace(noise, shared=0.0) for i, noise in noises.items() if noise.shared}
    alone = _forced(measures, stack, bits, members, sizes)

    def of_stars(found: dict[str, ForcedFluxes]) -> dict[str, ForcedFluxes]:
        return {name: ForcedFluxes(*(column[:n] for column in one)) for name, one in found.items()}

    def epoch(i: int) -> EpochFluxes:
        scale = stack.scale_at(i, *measures.blank.T)
        blank = {name: np.array([one.flux[n:], one.error[n:]]) / scale for name, one in forced[i].items()}
        return _epoch(measures, of_stars(forced[i]), of_stars(alone[i]) if i in alone else None, scales[i],
                      float(to_host(stack.scale_error_image[i])),
                      _target_stamp(measures, stack, i, bits[i]) if measures.has_target else None,
                      _overlaps(measures, stack, i, bits[i], sizes[i]), blank)

    return dict(zip(scales, plan.backend.run_all(epoch, scales), strict=True))


def _overlaps(measures: Measures, stack: DifferenceStack, i: int, bits: Bits, size: int) -> Float:
    """How much the stars of the close pairs see of each other on image `i`, by the pixels of their fluxes, (P, 2)."""
    pairs, places = measures.pairs, measures.positions
    if not len(pairs):
        return np.empty((0, 2))
    middle = places[pairs].mean(axis=1)
    psf = epoch_psf(measures.psf.at(middle), stack.kernel_at(i, *middle.T))
    variance = []
    for stamps in (Stamps(places[pairs[:, k]], size) for k in (0, 1)):
        plane = to_host(StampsOn(stamps, measures.shape, backend_of(stack.variance)).gather(stack.variance[i]))
        ignored = stamps.gather(bits, outside=PIXEL_FLAGS.border) & (255 - PIXEL_FLAGS.clipped) != 0
        variance.append(np.where(ignored, np.nan, plane))
    return overlaps(psf, places, pairs, np.stack(variance, axis=1).astype(float), size)


def separated(measures: Measures, epochs: Sequence[EpochFluxes]) -> list[EpochFluxes]:
    """Give close pairs of stars that both vary the PSF fluxes of a simultaneous fit, in all epochs.

    Where one of a group was not measured the others are NaN, flagged ``neighbour``. A target in such a pair loses its
    stamps: the light that varies there is not its own, and no place is to be fitted to it.
    """
    if not len(measures.pairs) or not epochs:
        return list(epochs)
    flux, error = (np.array([getattr(one.fluxes["psf"], name) for one in epochs]) for name in (
        "flux_diff", "flux_diff_err"))
    found = variability(flux, error)
    with np.errstate(invalid="ignore", divide="ignore"):
        varies = found.chi2 > 1 + 5 * np.sqrt(2 / (found.n_good - 1))
    which = np.flatnonzero(varies[measures.pairs].all(axis=1))
    if not which.size:
        return list(epochs)
    pairs = measures.pairs[which]
    log.info("%d pairs of stars within a FWHM of each other both vary: fitted together", len(pairs))
    new, new_error = separate(flux, error, pairs, np.array([one.overlaps[which] for one in epochs]))
    new, new_error = new[:, measures.first], new_error[:, measures.first]  # the target may be a star of the list
    rows = np.flatnonzero(np.isin(measures.first, pairs))
    not_alone = measures.has_target and len(measures.first) - 1 in rows
    result = []
    for one, now, now_error in zip(epochs, new, new_error, strict=True):
        old = one.fluxes["psf"]
        planes = [plane.copy() for plane in old]
        planes[0][rows], planes[1][rows] = now[rows], now_error[rows]
        planes[2][rows] = old.flux[rows] + now[rows] - old.flux_diff[rows]
        planes[3][rows] = old.flux_err[rows] * now_error[rows] / old.flux_diff_err[rows]
        flags = one.flags["psf"].copy()
        flags[rows[np.isnan(now[rows]) & np.isfinite(old.flux_diff[rows])]] |= SOURCE_FLAGS.neighbour
        result.append(replace(one, fluxes=one.fluxes | {"psf": CombinedFluxes(*planes)},
                              flags=one.flags | {"psf": flags}, target=None if not_alone else one.target))
    return result


def _target_stamp(measures: Measures, stack: DifferenceStack, i: int, bits: Bits) -> StarStamp:
    """What image `i` shows around the target, on the host."""
    where = Stamps(measures.positions[-1:], measures.stamp_size)
    placed = StampsOn(where, measures.shape, backend_of(stack.difference))
    kernel = stack.kernel_at(i, *measures.positions[-1])
    psf = to_size(epoch_psf(measures.psf.at(where.positions)[0], kernel), where.size)
    values, variance = (to_host(placed.gather(plane[i]))[0].astype(np.float32)
                        for plane in (stack.difference, stack.variance))
    return StarStamp(values, variance, where.gather(bits, outside=PIXEL_FLAGS.border)[0], psf.astype(np.float32))


def _noise(measures: Measures, reference: tuple[Any, Any], plan: ReferencePlan, stack: DifferenceStack, i: int,
           noise_ratio: Any, share: float) -> EpochNoise:
    """What the noise of one image is made of, on its backend; `reference` is its variance and itself, there once."""
    own = stack.image_variance[i] if noise_ratio is None else stack.image_variance[i] * noise_ratio[i]
    constant = stack.coefficients.shape[1] == 1
    exact = stack.covariance_kind == "exact"
    covariance = stack.covariance[i] if exact else plan.given.estimate(stack.covariance_terms[i])
    correction = None if exact else partial(plan.correction, stack, i)
    return EpochNoise(
        own, stack.coefficients[i, 0] if constant else stack.coefficients[i],
        *reference, covariance, stack.support, None if constant else stack.terms_at,
        partial(evaluate_terms, measures.background_degree, shape=measures.shape), share, plan.fit_pixels, correction)


def _forced(measures: Measures, stack: DifferenceStack, bits: Mapping[int, Bits], noises: Mapping[int, EpochNoise],
            sizes: Mapping[int, int]) -> dict[int, dict[str, ForcedFluxes]]:
    """Fluxes of stars and at blank places on some images of a stack, by number and measure."""
    if not noises:
        return {}
    places = np.vstack([measures.positions, measures.blank])
    order = measures.order if len(measures.order) else np.arange(len(places))
    places, back = places[order], np.argsort(order)
    which = list(noises)
    some = slice(None) if which == list(range(len(stack))) else which  # no copies where it is all of them
    flags = to_device(np.stack([bits[i] for i in which]), backend_of(stack.difference))
    psf = measures.psf.at(places) if measures.psf.varies else measures.psf.stamp
    found = forced_photometry(stack.difference[some], stack.variance[some], flags, places, psf,
                              list(noises.values()), radius=measures.radius, stamp_size=[sizes[i] for i in which],
                              max_masked_fraction=_MASKED, ready=measures.ready)
    return {i: {name: ForcedFluxes(*(column[row][back] for column in fluxes)) for name, fluxes in found.items()}
            for row, i in enumerate(which)}


def _epoch(measures: Measures, forced: dict[str, ForcedFluxes], alone: dict[str, ForcedFluxes] | None, scale: Float,
           error: float, target: StarStamp | None, seen: Float, blank: dict[str, Float]) -> EpochFluxes:
    fluxes = {name: combine(one.flux, one.error, measures.flux[name], scale, error) for name, one in forced.items()}
    if alone is not None:
        fluxes = {name: both._replace(flux_err=combine(alone[name].flux, alone[name].error, measures.flux[name], scale,
                                                       error).flux_err) for name, both in fluxes.items()}
    found = {name: one.flags | measures.flags[name] for name, one in forced.items()}
    return EpochFluxes(fluxes, found, scale, error, target, seen, blank)
