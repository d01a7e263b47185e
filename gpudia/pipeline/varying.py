"""Bright stars that plainly vary, found on some frames before the others are solved: they would pull every kernel."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
from astropy.table import Table
from scipy.spatial import cKDTree

from gpudia.backend import Backend
from gpudia.config import RunConfig
from gpudia.errors import FrameError
from gpudia.flags import SOURCE_FLAGS
from gpudia.images import sky_and_noise
from gpudia.photometry import choose_aperture_radius, empirical_psf, plainly_varying
from gpudia.pipeline.epochs import flagged, kept
from gpudia.pipeline.looks import FrameStore, Look, frame_errors
from gpudia.pipeline.measure import EpochFluxes, Measures, measure_batch, side_of_stamps
from gpudia.pipeline.prepare import images_at_once, in_batches, place_batch, prepare, subtracted
from gpudia.pipeline.reference import RunReference, carried_model, widest_seeing
from gpudia.pipeline.warned import warnings_logged

__all__ = ["find_varying"]

log = logging.getLogger("gpudia.pipeline")

#: Frames that are looked at: a third of all, so many at most; fewer than the least tell nothing.
_MOST_FRAMES, _LEAST_FRAMES = 12, 4
#: Stars that are measured, the brightest, and their least signal to noise; a few tell nothing of one another.
_MOST_STARS, _LEAST_STARS, _SNR = 100, 5, 50.0
#: Most the kernel varies for this.
_DEGREE = 1


def find_varying(reference: RunReference, looks: Sequence[Look], config: RunConfig, store: FrameStore,
                 backend: Backend) -> tuple[np.ndarray, np.ndarray]:
    """Find the bright stars that plainly vary, from forced photometry on some frames.

    A star that varies by a fifth and holds a hundredth of the light pulled the photometric scale by 1 %, four times
    its share: the fit makes up for it in the kernel's wings. The fluxes themselves are right as each star's pull on its
    own model is put right (`gpudia.photometry.forced_photometry`), and so they tell which ones vary.

    Parameters
    ----------
    reference : RunReference
        A single frame; what it keeps out of the fit is known already.
    looks : sequence of Look
    config : RunConfig
        As the user gave it.
    store, backend
        Of the run.

    Returns
    -------
    places : (N, 2)
        In the cutout; none where there are fewer than a dozen frames or than five bright stars.
    seen : (F, H, W) uint8
        Pixel flags of the frames that were looked at.
    """
    stars, frames = _bright(reference), _some(looks, reference)
    none = np.empty((0, 2)), np.empty((0, *reference.cutout.shape), np.uint8)
    if len(stars) < _LEAST_STARS or len(frames) < _LEAST_FRAMES:
        return none
    current = replace(reference, config=carried_model(reference, config, _DEGREE))
    with ThreadPoolExecutor(1) as beside:  # a core for each
        measuring = beside.submit(_measures, current, stars, [x.fwhm for x in frames if math.isfinite(x.fwhm)])
        _ = current.plan
    measures = measuring.result()
    epochs, seen = _measured(current, measures, frames, store, backend)
    if len(epochs) < _LEAST_FRAMES:
        return none
    delta, error, total = (np.array([getattr(one.fluxes["psf"], name) for one in epochs])
                           for name in ("flux_diff", "flux_diff_err", "flux"))
    flags = np.array([one.flags["psf"] for one in epochs])
    varies = plainly_varying(delta, error, total, flags & (SOURCE_FLAGS.saturated | SOURCE_FLAGS.outside) == 0)
    places = measures.positions[varies]
    if len(places):
        where = ", ".join("({:.1f}, {:.1f})".format(*reference.region.to_frame(place)) for place in places)
        log.info("%d of the %d brightest stars plainly vary and are kept out of the fit: at %s", len(places),
                 len(varies), where)
    return places, np.stack(seen)


def _bright(reference: RunReference) -> Table:
    """The brightest stars of the region that are not saturated, nor kept out of the fit anyway."""
    found = reference.look.stars
    if found is None:
        return Table()
    xy = reference.region.to_cutout(np.column_stack([found["x"], found["y"]]).astype(float))
    flux, error, flags = (np.asarray(found[name]) for name in ("flux", "flux_err", "flags"))
    good = reference.region.contains(np.column_stack([found["x"], found["y"]])) & (flux > _SNR * error)
    good &= (flags & SOURCE_FLAGS.saturated == 0)
    if len(reference.varying) and good.any():
        good &= cKDTree(reference.varying).query(xy)[0] > reference.look.fwhm
    which = np.flatnonzero(good)[np.argsort(-flux[good], kind="stable")][:_MOST_STARS]
    return Table({"x_cutout": xy[which, 0], "y_cutout": xy[which, 1], "flux": flux[which], "flux_err": error[which]})


def _some(looks: Sequence[Look], reference: RunReference) -> list[Look]:
    """Frames spread evenly over the series, the reference not among them."""
    usable = [look for look in looks if not look.reason and look is not reference.look]
    usable.sort(key=lambda look: (not math.isfinite(look.mjd), look.mjd if math.isfinite(look.mjd) else 0.0))
    count = min(len(usable) // 3, _MOST_FRAMES)
    return [usable[i] for i in np.linspace(0, len(usable) - 1, count).round().astype(int)] if count else []


def _measures(reference: RunReference, stars: Table, fwhms: Sequence[float]) -> Measures:
    """What the photometry of these stars shares; their fluxes on the reference as the detection has them."""
    cutout, n = reference.cutout, len(stars)
    positions = np.column_stack([stars["x_cutout"], stars["y_cutout"]]).astype(float)
    known = [*fwhms, reference.look.fwhm] if math.isfinite(reference.look.fwhm) else [*fwhms, 4.0]
    radius = choose_aperture_radius(known)
    image = cutout.data - sky_and_noise(cutout.data, cutout.mask != 0)[0]
    psf = empirical_psf(image, cutout.variance, cutout.mask, positions, known[-1])
    flux, error = ({name: np.asarray(stars[column], float) for name in ("ap", "psf")}
                   for column in ("flux", "flux_err"))
    flags = {name: np.zeros(n, np.int32) for name in ("ap", "psf")}
    return Measures(positions, False, radius, side_of_stamps(widest_seeing(known), radius), psf, flux, error, flags,
                    np.where(cutout.mask != 0, np.nan, cutout.data).astype(float), cutout.variance.astype(float),
                    cutout.shape, int(reference.config.background_degree), np.empty((0, 2), np.int64), np.arange(n),
                    np.zeros(n, bool))


def _measured(reference: RunReference, measures: Measures, frames: Sequence[Look], store: FrameStore,
              backend: Backend) -> tuple[list[EpochFluxes], list[np.ndarray]]:
    """Fluxes and pixel flags of those frames that can be subtracted; the others are reported later."""
    ready = []
    for look in frames:
        with contextlib.suppress(FrameError), frame_errors(look.path), warnings_logged(look.path):
            ready.append((look, prepare(partial(store.part, look), look.registration, reference.region,
                                        reference.config)))
    found: list[EpochFluxes] = []
    seen: list[np.ndarray] = []
    keep = kept(reference.config)
    for batch in in_batches(ready, images_at_once(reference.plan, reference.config, backend, keep)):
        with contextlib.suppress(FrameError), frame_errors(reference.look.path):
            placed = place_batch([prepared for _, prepared in batch], reference.region.shape, backend)
            stack = subtracted(reference.plan, placed, keep)
            host = replace(stack, covariance=None, image_variance=None).to_host()
            bits = {}
            for i, (look, _) in enumerate(batch):
                with contextlib.suppress(FrameError):
                    bits[i] = flagged(look, host, i, placed.bits[i], reference)
            fluxes = measure_batch(measures, reference.plan, stack, bits, placed.noise_ratio, {},
                                   {i: batch[i][0].fwhm for i in bits})
            found += fluxes.values()
            seen += bits.values()
    return found, seen
