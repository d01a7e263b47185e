"""How far the stars scatter, against the errors that the run states."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtri

from gpudia.flags import FRAME_FLAGS, SOURCE_FLAGS
from gpudia.report.data import Curve, FloatArray, RunData, frame_name, numbers, words

__all__ = ["Scatter", "most_variable", "running_median", "star_scatter"]

_BAD = SOURCE_FLAGS.masked_pixels | SOURCE_FLAGS.saturated | SOURCE_FLAGS.outside | SOURCE_FLAGS.reference_masked
_MIN_EPOCHS = 3


@dataclass(frozen=True)
class Scatter:
    """Scatter of the stars that were measured often enough; arrays of shape (n_stars,), fluxes in ADU.

    `measured` is the standard deviation of FLUX over the epochs, `expected` the root mean square of FLUX_ERR over
    the same epochs; for independent errors the expectation of their squares is equal. `ideal` is the median ratio
    that perfect errors give: sqrt(median(chi^2_nu) / nu), nu = epochs - 1, below 1 for few epochs. `stars` are the rows
    of SOURCES.
    """

    flux_ref: FloatArray
    measured: FloatArray
    expected: FloatArray
    variable: NDArray[np.bool_]
    n_epochs: NDArray[np.int64]
    ideal: float
    stars: NDArray[np.intp]

    @property
    def ratio(self) -> FloatArray:
        """Measured over expected scatter."""
        return self.measured / self.expected

    def __len__(self) -> int:
        return len(self.measured)


def star_scatter(run: RunData) -> Scatter:
    """Measure the scatter of every star with at least three good epochs and a positive reference flux.

    Epochs flagged ``is_reference`` are left out (their differences are not independent), and single measurements
    that are flagged as masked, saturated or outside.
    """
    flux, error = _good_fluxes(run)
    n = np.isfinite(flux).sum(axis=0)
    flux_ref = numbers(run.sources, "flux_ref")
    used = (n >= _MIN_EPOCHS) & (flux_ref > 0)
    flux, error, n = flux[:, used], error[:, used], n[used]
    measured, expected = np.zeros(len(n)), np.zeros(len(n))
    if len(n):
        measured = np.nanstd(flux, axis=0, ddof=1)
        expected = np.sqrt(np.nanmean(error**2, axis=0))
    variable = numbers(run.sources, "flags", 0).astype(np.int64)[used] & SOURCE_FLAGS.variable > 0
    keep = (expected > 0) & (measured > 0)
    nu = float(np.median(n[keep]) - 1) if keep.any() else np.nan
    ideal = float(np.sqrt(chdtri(nu, 0.5) / nu)) if keep.any() else np.nan
    return Scatter(flux_ref[used][keep], measured[keep], expected[keep], variable[keep], n[keep], ideal,
                   np.flatnonzero(used)[keep])


def _good_fluxes(run: RunData) -> tuple[FloatArray, FloatArray]:
    """FLUX and FLUX_ERR (n_epochs, n_sources), NaN where a measurement should not enter statistics."""
    if not {"FLUX", "FLUX_ERR"} <= set(run.planes):
        return np.empty((0, len(run.sources))), np.empty((0, len(run.sources)))
    flux, error = (run.planes[name].astype(float) for name in ("FLUX", "FLUX_ERR"))
    bad = ~np.isfinite(flux) | ~np.isfinite(error)
    bad |= (numbers(run.curve_epochs, "flags", 0).astype(np.int64) & FRAME_FLAGS.is_reference > 0)[:, None]
    if "FLAGS" in run.planes:
        bad |= run.planes["FLAGS"].astype(np.int64) & _BAD > 0
    return np.where(bad, np.nan, flux), np.where(bad, np.nan, error)


def running_median(x: FloatArray, y: FloatArray, n_bins: int = 12) -> tuple[FloatArray, FloatArray]:
    """Medians of x and y in groups of equal number along x; fewer groups when there are few stars."""
    order = np.argsort(x)
    groups = [g for g in np.array_split(order, min(n_bins, len(x) // 8)) if len(g)] if len(x) >= 16 else []
    return np.array([np.median(x[g]) for g in groups]), np.array([np.median(y[g]) for g in groups])


def most_variable(run: RunData, limit: int = 8) -> list[Curve]:
    """Return the light curves of the stars with the largest score (chi^2, where a run has none), in order."""
    if "FLUX" not in run.planes:
        return []
    score = numbers(run.sources, "score" if "score" in run.sources.colnames else "chi2")
    score[np.isfinite(_good_fluxes(run)[0]).sum(axis=0) < _MIN_EPOCHS] = np.nan
    score[numbers(run.sources, "flags", 0).astype(np.int64) & SOURCE_FLAGS.duplicate > 0] = np.nan  # shown already
    order = np.argsort(np.where(np.isfinite(score), -score, np.inf), kind="stable")[:limit]
    given, files = words(run.curve_epochs, "name"), words(run.curve_epochs, "file")
    names = [name or frame_name(file) for name, file in zip(given, files, strict=True)]
    return [_star_curve(run, int(i), names) for i in order if np.isfinite(score[i])]


def _star_curve(run: RunData, star: int, names: list[str]) -> Curve:
    n = len(run.curve_epochs)
    none = np.full(n, np.nan)

    def plane(name: str) -> FloatArray:
        return run.planes[name][:, star].astype(float) if name in run.planes else none

    identity = words(run.sources, "source_id")[star] or str(star)
    indices = [f"{what} {numbers(run.sources, name)[star]:.3g}" for what, name in (("score", "score"), ("chi²", "chi2"))
               if name in run.sources.colnames]
    return Curve(
        label=f"star {identity} ({', '.join(indices)})",
        names=names,
        mjd=numbers(run.curve_epochs, "mjd"),
        flux=plane("FLUX"),
        flux_err=plane("FLUX_ERR"),
        flux_diff=plane("FLUX_DIFF"),
        flux_diff_err=plane("FLUX_DIFF_ERR"),
        mag=none,
        mag_err=none,
        is_limit=np.zeros(n, dtype=bool),
        flags=np.nan_to_num(plane("FLAGS")).astype(np.int64),
    )
