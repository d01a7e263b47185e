"""One epoch of a solved batch: its numbers, flags and fluxes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpudia.config import RunConfig
from gpudia.errors import FrameError
from gpudia.flags import FRAME_FLAGS, PIXEL_FLAGS
from gpudia.images import sharp_residuals
from gpudia.model import DifferenceStack, missing_wings
from gpudia.model.planes import grow
from gpudia.pipeline.candidates import Detections, detect_epoch
from gpudia.pipeline.looks import Look, frame_errors
from gpudia.pipeline.measure import EpochFluxes, Measures
from gpudia.pipeline.reference import RunReference
from gpudia.pipeline.stages import stage

__all__ = ["EpochOutcome", "Product", "finish", "flagged", "kept"]


def kept(config: RunConfig) -> tuple[str, ...]:
    """What is kept of every image until it is measured; covariances are estimated where they are not exact anyway."""
    return ("covariance", "image_variance") if config.solver == "direct" else ("image_variance",)


@dataclass(frozen=True)
class EpochOutcome:
    """What came of a frame in the solve; `fluxes` is None where it failed, with the reason."""

    name: str
    reason: str
    flags: int
    seconds: float
    numbers: dict[str, Any] = field(default_factory=dict)
    fluxes: EpochFluxes | None = None
    detections: Detections | None = None

    @classmethod
    def of(cls, look: Look, fluxes: EpochFluxes | None = None, detections: Detections | None = None) -> EpochOutcome:
        """Outcome of a look as it stands."""
        return cls(look.name, look.reason, look.flags, look.seconds, look.numbers, fluxes, detections)

    def give(self, look: Look) -> None:
        """Put it into the frame's look."""
        look.reason, look.flags, look.numbers = self.reason, self.flags, dict(self.numbers)
        look.seconds = self.seconds


@dataclass(frozen=True)
class Product:
    """What a difference file is made of."""

    look: Look
    stack: DifferenceStack
    index: int
    bits: np.ndarray
    more: dict[str, np.ndarray]


def flagged(look: Look, stack: DifferenceStack, i: int, bits: np.ndarray, reference: RunReference) -> np.ndarray:
    """Pixel flags (H, W) of one image of a solved batch (host side), with the cosmic rays that its difference shows.

    Raises
    ------
    FrameError
        If the image has no solution, or no significant light of the reference in it.
    """
    with frame_errors(look.path):
        stack.require_solution(i)
        bits = bits | stack.flags[i]
        if reference.config.find_defects and not reference.is_made_of(look):
            bits = bits | _cosmic_rays(stack, i, bits, look.fwhm)
        return bits


def finish(look: Look, stack: DifferenceStack, i: int, bits: np.ndarray, fluxes: EpochFluxes | None, ratio: Any,
           reference: RunReference, measures: Measures) -> tuple[EpochOutcome, Product | None]:
    """Note the numbers of one epoch of a solved batch (host side), and search it; without fluxes it fails alone."""
    try:
        with frame_errors(look.path), stage("photometry"):
            if fluxes is None:
                raise FrameError(f"photometric scale must be positive at every star, got {stack.scale[i]:.3g} at the "
                                 "centre")
            _note_flags(look, int(stack.status[i]), reference)
            _note_numbers(look, stack, i, bits, reference)
            found, more = None, {}
            if reference.config.detect is not None:
                found, more = detect_epoch(look, stack, i, bits, measures, ratio, reference, reference.config.detect)
            return EpochOutcome.of(look, fluxes, found), Product(look, stack, i, bits, more)
    except FrameError as error:
        return EpochOutcome.of(look.failed(error)), None


def _note_flags(look: Look, status: int, reference: RunReference) -> None:
    look.flags |= status
    if look.name in reference.weights:
        look.flags |= FRAME_FLAGS.in_reference
    if reference.is_made_of(look):  # its kernel is a single pixel: nothing is deconvolved
        look.flags = (look.flags | FRAME_FLAGS.is_reference) & ~FRAME_FLAGS.deconvolving


def _cosmic_rays(stack: DifferenceStack, i: int, bits: Any, fwhm: float) -> Any:
    """Bits of cosmic rays that only the difference shows; the fit has clipped them, the photometry is not to sum them.

    What the fit clipped right beside one is the fainter part of its track.
    """
    ignore = (bits & (255 - PIXEL_FLAGS.clipped)) != 0
    with np.errstate(invalid="ignore"):
        found = sharp_residuals(stack.difference[i], np.sqrt(stack.variance[i]), ignore, fwhm)
    found |= grow(found) & ((bits & PIXEL_FLAGS.clipped) != 0)
    return np.where(found, PIXEL_FLAGS.cosmic_ray, 0).astype(np.uint8)


def _note_numbers(look: Look, stack: DifferenceStack, i: int, bits: Any, reference: RunReference) -> None:
    chi2 = float(stack.chi2[i])
    config, own = reference.config, reference.is_made_of(look)
    # far from 1 the noise is not what the header says, or the model not what the sky does
    least = 0.0 if look.name in reference.weights else 1 / config.max_chi2  # a frame of a stack shares its noise
    if not own and not least < chi2 < config.max_chi2:
        look.flags |= FRAME_FLAGS.bad_chi2
    correlation = math.nan if own else _correlation(stack.difference[i], stack.variance[i], bits)
    if correlation > config.max_correlation:
        look.flags |= FRAME_FLAGS.not_white
    registration = look.registration
    if registration.uncertainty(reference.region) > config.max_registration_error:
        look.flags |= FRAME_FLAGS.poor_registration
    dx, dy = registration.apply(reference.region.centre) - np.array(reference.region.centre)
    look.numbers = {
        "shift_x": float(dx), "shift_y": float(dy), "registration_rms": registration.rms,
        "registration_max": registration.max_residual, "registration_kind": registration.kind,
        "registration_error": registration.uncertainty(reference.region),
        "n_matched": registration.n_matched, "route": registration.route, "scale": float(stack.scale[i]),
        "scale_err": _scale_error(look, stack, i, reference), "chi2": chi2,
        "correlation": correlation, **_kernel_shape(stack.kernel[i]), "noise_gain": float(stack.noise_gain[i]),
        "n_masked": int(((bits & (255 - PIXEL_FLAGS.clipped)) != 0).sum()), "n_clipped": int(stack.n_clipped[i]),
        "n_pixels": int(stack.n_pixels[i]), "iterations": int(stack.iterations[i]),
        "epsilon": math.nan, "epsilon_err": math.nan,
    }


def _scale_error(look: Look, stack: DifferenceStack, i: int, reference: RunReference) -> float:
    """One sigma of the scale in the unit of the one frame that is the reference, or of the stack's best frame.

    The image's own noise, the wings that the kernel cannot reach, and the reference's noise. A stack's, which is about
    the same relative error in all scales, was taken out of them with its best frame's: instead they have that frame's.
    """
    scale = float(stack.scale[i])
    common = reference.unit_error * scale if reference.weights else float(stack.scale_error_reference[i])
    wings = missing_wings(look.fwhm, reference.look.fwhm, reference.kernel_size)
    return math.hypot(float(stack.scale_error_image[i]), common, wings * scale)


def _correlation(difference: np.ndarray, variance: np.ndarray, bits: np.ndarray) -> float:
    """Correlation of neighbouring pixels of a difference in units of its error, good pixels alone; NaN without any.

    White noise has 0. The reference's noise, which the kernel smooths, and resampling have some, up to 0.3 or so. Pulls
    count as 3 at most: a star that varies is no fault of the difference.
    """
    good = (bits == 0) & (variance > 0)
    pulls = np.clip(np.where(good, difference, 0) / np.sqrt(np.where(good, variance, 1)), -3, 3)
    rows, columns = good[:, 1:] & good[:, :-1], good[1:] & good[:-1]
    pairs, total = int(rows.sum() + columns.sum()), float(np.vdot(pulls, pulls))
    if not (pairs and total > 0):
        return math.nan
    together = float(np.vdot(pulls[:, 1:], pulls[:, :-1]) + np.vdot(pulls[1:], pulls[:-1]))
    return together / pairs / (total / int(good.sum()))


def _kernel_shape(kernel: np.ndarray) -> dict[str, float]:
    """Centroid of a kernel from its central pixel, and FWHM of the Gaussian with its second moments, pixels.

    The FWHM is NaN where the moments are negative: the kernel sharpens.
    """
    offset = np.arange(len(kernel)) - len(kernel) // 2
    share = kernel / kernel.sum()
    x, y = float(share.sum(axis=0) @ offset), float(share.sum(axis=1) @ offset)
    spread = float(share.sum(axis=0) @ offset**2 + share.sum(axis=1) @ offset**2 - x**2 - y**2) / 2
    return {"kernel_x": x, "kernel_y": y, "kernel_fwhm": 2.3548 * math.sqrt(spread) if spread >= 0 else math.nan}
