"""One epoch of a solved batch: its numbers, flags and fluxes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpudia.errors import FrameError
from gpudia.flags import FRAME_FLAGS, PIXEL_FLAGS
from gpudia.images import sharp_residuals
from gpudia.model import DifferenceStack
from gpudia.model.planes import grow
from gpudia.pipeline.candidates import Detections, detect_epoch
from gpudia.pipeline.looks import Look, frame_errors
from gpudia.pipeline.measure import EpochFluxes, Measures
from gpudia.pipeline.reference import RunReference
from gpudia.pipeline.stages import stage

__all__ = ["KEEP", "EpochOutcome", "Product", "finish", "flagged"]

#: What is kept of every image until it is downloaded.
KEEP = ("covariance", "image_variance")
#: Predicted error of a registration over the region from which on it is called poor, pixels.
_POOR = 0.1


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
    with frame_errors(look.path), stage("photometry"):
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
    # far from 1 the noise is not what the header says, or the model not what the sky does
    least = 0.0 if look.name in reference.weights else 0.5  # a frame of a stack shares its noise with it
    if not reference.is_made_of(look) and not least < chi2 < 2.0:
        look.flags |= FRAME_FLAGS.bad_chi2
    registration = look.registration
    if registration.uncertainty(reference.region) > _POOR:
        look.flags |= FRAME_FLAGS.poor_registration
    dx, dy = registration.apply(reference.region.centre) - np.array(reference.region.centre)
    look.numbers = {
        "shift_x": float(dx), "shift_y": float(dy), "registration_rms": registration.rms,
        "registration_max": registration.max_residual, "registration_kind": registration.kind,
        "registration_error": registration.uncertainty(reference.region),
        "n_matched": registration.n_matched, "route": registration.route, "scale": float(stack.scale[i]),
        "scale_err": float(stack.scale_error[i]), "chi2": chi2, "noise_gain": float(stack.noise_gain[i]),
        "n_masked": int(((bits & (255 - PIXEL_FLAGS.clipped)) != 0).sum()), "n_clipped": int(stack.n_clipped[i]),
        "n_pixels": int(stack.n_pixels[i]), "iterations": int(stack.iterations[i]),
        "epsilon": math.nan, "epsilon_err": math.nan,
    }
