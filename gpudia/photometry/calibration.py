"""The zero point: from instrumental magnitudes, -2.5 log10 of the flux, to those of a catalog."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpudia.errors import InputError

__all__ = ["INSTRUMENTAL", "MAG_PER_SHARE", "ZeroPoint", "fit_zero_point"]

#: Magnitudes per relative change of flux.
MAG_PER_SHARE = 2.5 / math.log(10)
#: Stars beyond this many sigma of the others take no part; with fewer than so many there is no zero point.
_CLIP, _FEWEST = 4.0, 3


@dataclass(frozen=True)
class ZeroPoint:
    """Magnitude of one ADU of the reference; without a source magnitudes are instrumental.

    Attributes
    ----------
    value, error : float
        Magnitudes; the error is common to all stars and epochs and in no ``mag_err``. NaN: not known.
    n : int
        Stars that it is from, 0 where it was given.
    scatter : float
        Of those stars, magnitudes, standard deviation; NaN where it was given.
    source : str
        What it is from: ``given``, or the catalog.
    """

    value: float = 0.0
    error: float = math.nan
    n: int = 0
    scatter: float = math.nan
    source: str = ""

    @property
    def calibrated(self) -> bool:
        """Whether magnitudes with this zero point are those of a catalog."""
        return bool(self.source)

    def __str__(self) -> str:
        if not self.calibrated:
            return "instrumental: -2.5 log10(flux)"
        error = f" +- {self.error:.4f}" if math.isfinite(self.error) else ""
        stars = f" from {self.n} stars with a scatter of {self.scatter:.3f}" if self.n else ""
        return f"calibrated: zero point {self.value:.4f}{error} ({self.source}){stars}"

    def cards(self) -> dict[str, tuple[Any, str]]:
        """Return header cards for `from_cards`; none of what is not known; letters that FITS lacks become escapes."""
        source = self.source.encode("ascii", "backslashreplace").decode()[-40:]
        cards: dict[str, tuple[Any, str]] = {
            "ZEROPNT": (self.value, "[mag] of 1 ADU"), "ZPERR": (self.error, "[mag] common to all stars and epochs"),
            "ZPSTARS": (self.n, "stars that it is from"), "ZPSCAT": (self.scatter, "[mag] scatter of these stars"),
            "ZPSOURCE": (source or "none", "none: instrumental")}
        return {key: (value, about) for key, (value, about) in cards.items() if value == value}

    @classmethod
    def from_cards(cls, header: Mapping[str, Any]) -> ZeroPoint:
        """Read what `cards` made; a header without them is that of instrumental magnitudes."""
        source = str(header.get("ZPSOURCE", "none"))
        if source == "none":
            return cls()
        return cls(float(header.get("ZEROPNT", 0.0)), float(header.get("ZPERR", math.nan)),
                   int(header.get("ZPSTARS", 0)), float(header.get("ZPSCAT", math.nan)), source)


#: Magnitudes as they are: -2.5 log10(flux).
INSTRUMENTAL = ZeroPoint()


def fit_zero_point(flux: Any, flux_err: Any, mag: Any, mag_err: Any = 0.0, source: str = "catalog") -> ZeroPoint:
    """Compare fluxes with catalog magnitudes.

    Each star gives z = mag + 2.5 log10(flux), with the variance of both and what else the stars scatter by (colours,
    flat field, neighbours): their variance about the mean less the median of the stated ones. Stars more than 4 robust
    sigma from the median are left out. The zero point is the weighted median, for neighbours make stars brighter, not
    fainter; its error is that of the weighted mean times sqrt(pi / 2), as of a median.

    Parameters
    ----------
    flux, flux_err : (n,)
        On the reference, ADU. Stars without a positive flux or with any number missing are left out.
    mag, mag_err : (n,)
        From the catalog; an error that is not known (NaN) counts as 0.
    source : str
        What the catalog is called.

    Raises
    ------
    InputError
        Fewer than 3 stars are left.
    """
    flux, flux_err, mag, mag_err = (np.asarray(a, float) for a in np.broadcast_arrays(flux, flux_err, mag, mag_err))
    with np.errstate(invalid="ignore", divide="ignore"):
        z = mag + 2.5 * np.log10(np.where(flux > 0, flux, np.nan))
        variance = (MAG_PER_SHARE * flux_err / flux) ** 2 + np.nan_to_num(mag_err) ** 2
    known = np.isfinite(z) & np.isfinite(variance)
    z, variance = z[known], np.maximum(variance[known], 1e-8)  # no magnitude is better than 0.0001
    for _ in range(20):
        if len(z) < _FEWEST:
            break
        off = z - np.median(z)
        width = 1.4826 * float(np.median(np.abs(off)))
        keep = np.abs(off) <= _CLIP * np.sqrt(width**2 + variance)
        if keep.all():
            break
        z, variance = z[keep], variance[keep]
    if len(z) < _FEWEST:
        raise InputError(f"a zero point needs at least {_FEWEST} stars with a flux and a magnitude, got {len(z)}")
    scatter = float(np.std(z, ddof=1))
    weight = 1 / (variance + max(scatter**2 - float(np.median(variance)), 0.0))
    order = np.argsort(z)
    middle = np.cumsum(weight[order]) - weight[order] / 2
    value = float(np.interp(weight.sum() / 2, middle, z[order]))
    return ZeroPoint(value, math.sqrt(math.pi / 2 / float(weight.sum())), len(z), scatter, source)
