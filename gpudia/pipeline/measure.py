"""Forced photometry of one epoch: apertures and PSF fluxes of the reference's stars and of the target, host side."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from gpudia.errors import FrameError
from gpudia.images import sky_and_noise
from gpudia.model import DifferenceStack, evaluate_terms
from gpudia.photometry import (
    CombinedFluxes,
    EpochNoise,
    ForcedFluxes,
    Psf,
    choose_aperture_radius,
    combine,
    crowded_photometry,
    empirical_psf,
    epoch_psf,
    measure_apertures,
    psf_photometry,
)
from gpudia.pipeline.reference import RunReference

__all__ = ["RECOMMENDED", "EpochFluxes", "Measures", "measure_epoch", "prepare_measures"]

log = logging.getLogger("gpudia.pipeline")

Float = NDArray[np.float64]
#: The measure that fills the columns without a suffix. Aperture sums scatter as their errors say (see README); PSF
#: fluxes, which stand beside them, are up to a fifth less noisy but feel every error of the PSF model at bright stars.
RECOMMENDED = "ap"
#: Share of a star's light in the aperture that masked pixels may hide; the PSF makes up for it.
_MASKED = 0.2


@dataclass(frozen=True)
class Measures:
    """What the photometry of all epochs shares.

    Positions (S, 2) are those of the reference's stars in the cutout, with the target (if any) as the last row. Fluxes
    of the reference are total fluxes without the neighbours' light, ADU, by method.
    """

    positions: Float
    radius: float
    psf: Psf
    flux: dict[str, Float]
    flux_error: dict[str, Float]
    flags: dict[str, NDArray[np.int32]]
    reference: Float
    reference_variance: Float
    shape: tuple[int, int]
    background_degree: int


@dataclass(frozen=True)
class EpochFluxes:
    """Fluxes of all positions in one epoch, ADU of the reference, and flags, by method; scale at each position.

    The error of the scale is the image's own: the reference's part is the same in all epochs.
    """

    fluxes: dict[str, CombinedFluxes]
    flags: dict[str, NDArray[np.int32]]
    scale: Float
    scale_error: float


def prepare_measures(reference: RunReference, fwhms: list[float], aperture_radius: float | str,
                     background_degree: int) -> Measures:
    """Choose the aperture, build the PSF of the reference and measure all stars on it."""
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
    # Stars that share light are measured together; what lies within half a FWHM of another is no star of its own.
    found = crowded_photometry(image, cutout.variance, cutout.mask, positions, psf, radius,
                               one_place=max(fwhm / 2, 0.5), max_masked_fraction=_MASKED)
    inside, fitted = found.aperture, found.psf
    return Measures(
        positions, radius, psf, {"ap": inside.flux, "psf": fitted.flux},
        {"ap": inside.error, "psf": fitted.error}, {"ap": inside.flags, "psf": fitted.flags},
        np.where(cutout.mask != 0, np.nan, cutout.data).astype(float), cutout.variance.astype(float), cutout.shape,
        background_degree)


def measure_epoch(measures: Measures, stack: DifferenceStack, i: int, bits: NDArray[np.uint8],
                  noise_ratio: Float | None, share: float = 0.0) -> EpochFluxes:
    """Measure all positions on image `i` of a stack (host side).

    Parameters
    ----------
    measures : Measures
    stack : DifferenceStack
        With covariance and image variance kept.
    bits : (H, W) uint8
        Pixel flags of the frame, joined with those of the stack.
    noise_ratio : (H, W) or None
        Variance of sums over that of single pixels, for a resampled frame.
    share : float
        What the frame adds to a stacked reference, as a factor of its pixels.

    Raises
    ------
    FrameError
        If the photometric scale is not positive everywhere.
    """
    positions = measures.positions
    kernels = stack.kernel_at(i, *positions.T)
    scale = kernels.sum(axis=(1, 2))
    if not (scale > 0).all():
        raise FrameError(f"photometric scale must be positive at every star, got {scale.min():.3g}")
    image_variance = stack.image_variance[i].astype(float)
    if noise_ratio is not None:
        image_variance = image_variance * noise_ratio
    one = stack.coefficients.shape[1] == 1
    noise = EpochNoise(
        image_variance, kernels[0] if one else kernels, measures.reference_variance, measures.reference,
        stack.covariance[i], stack.support,
        stack.terms_at, partial(evaluate_terms, measures.background_degree, shape=measures.shape), share)
    difference, variance, flags = stack.difference[i], stack.variance[i], bits | stack.flags[i]
    psf = epoch_psf(measures.psf.stamp, kernels[0] if one else kernels)
    error = float(stack.scale_error_image[i])

    def measured(with_noise: EpochNoise) -> dict[str, ForcedFluxes]:
        return {"ap": measure_apertures(difference, variance, flags, positions, measures.radius, with_noise, psf=psf,
                                        max_masked_fraction=_MASKED),
                "psf": psf_photometry(difference, variance, flags, positions, psf, with_noise)}

    forced = measured(noise)
    fluxes = {name: combine(one.flux, one.error, measures.flux[name], scale, error) for name, one in forced.items()}
    if share:  # what the frame adds to the reference is in a total flux twice, as F_ref and as -F_ref: not less noise
        alone = measured(replace(noise, shared=0.0))
        fluxes = {name: both._replace(flux_err=combine(alone[name].flux, alone[name].error, measures.flux[name], scale,
                                                       error).flux_err) for name, both in fluxes.items()}
    found = {name: one.flags | measures.flags[name] for name, one in forced.items()}
    return EpochFluxes(fluxes, found, scale, error)
