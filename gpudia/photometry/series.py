"""From fluxes on differences to total fluxes, magnitudes and the target's time series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from astropy.table import Table
from astropy.time import Time
from astropy.timeseries import TimeSeries
from numpy.typing import NDArray

from gpudia.errors import InputError
from gpudia.flags import SOURCE_FLAGS
from gpudia.photometry.calibration import INSTRUMENTAL, MAG_PER_SHARE, ZeroPoint
from gpudia.photometry.stamps import FloatArray

__all__ = ["CombinedFluxes", "Magnitudes", "combine", "describe_magnitudes", "magnitudes", "target_table", "utc_times"]

#: A magnitude is quoted from this many sigma of total flux on; below it there is a limit.
_LIMIT_SIGMA = 3.0


class CombinedFluxes(NamedTuple):
    """Fluxes in ADU of the reference, one sigma each, in the broadcast shape of the inputs."""

    flux_diff: FloatArray
    flux_diff_err: FloatArray
    flux: FloatArray
    flux_err: FloatArray


class Magnitudes(NamedTuple):
    """Magnitudes; `mag` and `mag_err` are NaN where there is a `limit`, and `limit` is NaN elsewhere."""

    mag: FloatArray
    mag_err: FloatArray
    limit: FloatArray


def combine(flux: Any, flux_err: Any, flux_ref: Any, scale: Any, scale_err: Any = 0.0,
            fraction: Any = 1.0) -> CombinedFluxes:
    r"""Turn what was measured on a difference image into the star's flux.

    .. math:: \Delta = f / (P \, c), \qquad F = F_{ref} + \Delta, \qquad
              Var(F) = Var(\Delta) + \max(F^2 - F_{ref}^2, 0) \, (\sigma_P / P)^2

    with the photometric scale P and the fraction c of the light inside the aperture. An error of the scale falsifies
    the whole flux: (F sigma_P / P)^2. But the part that the constant flux F_ref has in that is the error which the
    kernel leaves at the star's place on the difference, and it is in Var(f) already (the term g^T C g of
    `linear_flux_variance`); so only the rest is added. F_ref's own error is common to all epochs and not included.

    Parameters
    ----------
    flux, flux_err : array
        f and its sigma in ADU of the difference image, as `measure_apertures` and `psf_photometry` return them.
    flux_ref : array
        F_ref, total flux on the reference, ADU.
    scale, scale_err : array
        P and its sigma. For fluxes (n_epochs, n_sources) give (n_epochs, 1), or the scale at each star.
    fraction : array
        c, from `aperture_correction`; 1 for PSF fluxes.

    Returns
    -------
    CombinedFluxes
        NaN where the flux is NaN, and where the scale or the fraction is not positive.
    """
    flux, flux_err, flux_ref, scale, scale_err, fraction = (
        np.asarray(a, float) for a in (flux, flux_err, flux_ref, scale, scale_err, fraction))
    divisor = np.where((scale > 0) & (fraction > 0), scale * fraction, np.nan)
    difference, error = flux / divisor, flux_err / divisor
    total = flux_ref + difference
    relative = scale_err / np.where(scale > 0, scale, np.nan)
    rest = np.maximum(total**2 - flux_ref**2, 0.0) * relative**2
    return CombinedFluxes(difference, error, total, np.sqrt(error**2 + rest))


def magnitudes(flux: Any, flux_err: Any, zero_point: float = 0.0) -> Magnitudes:
    """Return zero_point - 2.5 log10(F), or the limit of 3 sigma where F < 3 sigma.

    Parameters
    ----------
    flux, flux_err : array
        Total flux and its sigma.
    zero_point : float
        Magnitude of one ADU.
    """
    flux, flux_err = np.broadcast_arrays(np.asarray(flux, float), np.asarray(flux_err, float))
    known = np.isfinite(flux) & np.isfinite(flux_err) & (flux_err > 0)
    seen = known & (flux >= _LIMIT_SIGMA * flux_err)
    faint = known & ~seen
    mag = zero_point - 2.5 * np.log10(np.where(seen, flux, np.nan))
    mag_err = MAG_PER_SHARE * np.where(seen, flux_err, np.nan) / np.where(seen, flux, 1.0)
    return Magnitudes(mag, mag_err, zero_point - 2.5 * np.log10(np.where(faint, _LIMIT_SIGMA * flux_err, np.nan)))


def utc_times(mjd: Any) -> Time:
    """Times, UTC, from MJD; masked where an epoch's time is not known (NaN)."""
    mjd = np.asarray(mjd, float)
    return Time(mjd if np.isfinite(mjd).all() else np.ma.masked_invalid(mjd), format="mjd", scale="utc")


def target_table(mjd: Any, image: Sequence[str], measures: Mapping[str, CombinedFluxes], method: str, *,
                 flux_ref: Any, scale: Any, scale_err: Any, flags: Any, zero_point: ZeroPoint = INSTRUMENTAL,
                 bjd_tdb: Any = None) -> TimeSeries:
    """Make the light curve of the target, as in ``target.ecsv``.

    Parameters
    ----------
    mjd : (n,)
        Mid-exposure, UTC, days.
    image : (n,) str
        File names.
    measures : dict of str to CombinedFluxes of (n,)
        Every measure made, by short name: ``{"ap": ..., "psf": ...}``. Each stands in the columns ``flux_diff_<name>``
        and ``flux_diff_err_<name>``.
    method : str
        The recommended one of them: it fills ``flux_diff``, ``flux`` and the magnitudes.
    flux_ref, scale, scale_err, flags : (n,) or scalar
        Reference flux of the recommended measure, photometric scale and its sigma, bits of
        `gpudia.flags.SOURCE_FLAGS` (the bit ``limit`` is added here).
    zero_point : ZeroPoint
        Magnitude of one ADU of the reference; its error is in no `mag_err`.
    bjd_tdb : (n,), optional
        Barycentric times of the target, days, NaN if unknown; None leaves the column out.

    Returns
    -------
    `~astropy.timeseries.TimeSeries`
        Ordered by time. Where F < 3 sigma, `mag` is NaN and `limit` holds the magnitude of 3 sigma.

    Raises
    ------
    InputError
        `method` is not among the measures, or a length is another than that of `mjd`.
    """
    mjd = np.asarray(mjd, float)
    n = len(mjd)
    if method not in measures:
        raise InputError(f"method must be one of {sorted(measures)}, got {method!r}")
    best = measures[method]
    mags = magnitudes(best.flux, best.flux_err, zero_point.value)
    flags = np.where(np.isfinite(mags.limit), np.asarray(flags) | SOURCE_FLAGS.limit, flags).astype(np.int32)
    columns = {
        "image": np.asarray(image, dtype=str), "flux_diff": best.flux_diff, "flux_diff_err": best.flux_diff_err,
        "flux_ref": flux_ref, "flux": best.flux, "flux_err": best.flux_err, "method": method, "scale": scale,
        "scale_err": scale_err, "mag": mags.mag, "mag_err": mags.mag_err, "limit": mags.limit, "flags": flags,
    }
    for name, fluxes in measures.items():
        columns |= {f"flux_diff_{name}": fluxes.flux_diff, f"flux_diff_err_{name}": fluxes.flux_diff_err}
    if bjd_tdb is not None:
        columns["bjd_tdb"] = bjd_tdb
    order = np.argsort(mjd, kind="stable")
    series = TimeSeries(time=utc_times(mjd[order]),
                        data={name: _column(name, value, n)[order] for name, value in columns.items()})
    describe_magnitudes(series, zero_point)
    if bjd_tdb is not None:
        series["bjd_tdb"].info.unit, series["bjd_tdb"].info.description = "d", "mid-exposure, BJD_TDB, of the target"
    return series


def describe_magnitudes(table: Table, zero_point: ZeroPoint) -> None:
    """Say what the columns ``mag, mag_err, limit`` are, and in the table's meta where the zero point is from."""
    texts = {"mag": f"{zero_point}", "mag_err": "1 sigma of the flux's own error, without that of the zero point",
             "limit": f"3 sigma of flux, where the flux is below that; {zero_point}"}
    for name in set(texts) & set(table.colnames):
        table[name].info.unit, table[name].info.description = "mag", texts[name]
    table.meta["magnitudes"] = str(zero_point)
    if zero_point.calibrated:
        for name in ("value", "error", "n", "scatter", "source"):
            table.meta["zero_point" if name == "value" else f"zero_point_{name}"] = getattr(zero_point, name)


def _column(name: str, value: Any, n: int) -> NDArray[Any]:
    array = np.asarray(value)
    if array.ndim and array.shape != (n,):
        raise InputError(f"{name} must have one value for each of the {n} times, got shape {array.shape}")
    return np.broadcast_to(array, (n,)).copy()
