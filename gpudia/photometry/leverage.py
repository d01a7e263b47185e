"""What the fit of the model takes of the light and noise of stars, and their fluxes and errors without that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gpudia.flags import SOURCE_FLAGS
from gpudia.photometry.linear import EpochNoise, LinearVariance
from gpudia.photometry.stamps import ForcedFluxes, inner

__all__ = ["HIGH", "Strong", "Under", "Verdict", "Weighted", "each", "fluxes_of", "picked", "put_right",
           "stated"]

#: Leverage from which on a star's is worked out by itself, see `EpochNoise.correction`: estimates are off by a fifth.
HIGH = 0.05
#: What the kernel must leave of a change of the star's flux: with less, the star decides on the kernel alone.
_LEFT = 0.02
#: chi^2 of the PSF's fit counts as that of noise up to so many sigma: pixels are correlated, fewer independent.
_CHI2_SIGMA = 5.0
#: Excess of chi^2 from which on the fit is called poor: errors are then 1.4 times what noise makes them, or more.
_POOR_FIT = 2.0


class Under(NamedTuple):
    """Pixels under some stars on one image, (S, m, m).

    Values of the difference, its inverse variance and variance (all 0 where ignored), good ones, bits, the image's own
    variance, and which took part in the fit of the model (None: not known).
    """

    values: Any
    inverse: Any
    variance: Any
    good: Any
    bits: Any
    own: Any
    fitted: Any


class Weighted(NamedTuple):
    """A linear measure of some stars, (S, m, m): pixels, their weights, what each counts, which flag, the PSF."""

    pixels: Under
    weights: Any
    counts: Any
    matters: Any
    light: Any


class Verdict(NamedTuple):
    """Which stars a measure can be had of, (S,), their flags and numbers of ignored pixels."""

    ok: Any
    flags: Any
    n_masked: Any


class Strong(NamedTuple):
    """Stars of high leverage on one image, and what their fluxes follow from, by measure; "psf" is the first.

    "quiet" are the weights of PSF fluxes where these are not the PSF's own, which say what the fit takes.
    """

    verdicts: dict[str, Verdict]
    measures: dict[str, Weighted]
    parts: dict[str, LinearVariance]


#: Flux, variance and chi^2 excess (None: not looked at) of a measure, (S,).
_Flux = tuple[Any, Any, Any]


def each(function: Callable[..., Any], *nested: Any) -> Any:
    """Apply a function to the arrays of named tuples and dicts, or of several alike; what is None stays so."""
    first = nested[0]
    if first is None:
        return None
    if isinstance(first, dict):
        return {name: each(function, *(one[name] for one in nested)) for name in first}
    if isinstance(first, tuple):
        return type(first)(*(each(function, *some) for some in zip(*nested, strict=True)))
    return function(*nested)


def picked(nested: Any, which: Any) -> Any:
    """Return these rows of all arrays, see `each`."""
    return each(lambda array: array[which], nested)


def fluxes_of(xp: Any, noise: EpochNoise, measures: dict[str, Weighted], parts: dict[str, LinearVariance],
              judged: bool) -> tuple[dict[str, _Flux], Any]:
    """Fluxes of some stars and their leverage, (S,); with `judged` by how well the PSF fits, too.

    Right for those stars only of which the measure can be had.
    """
    lever = _Leverage(xp, noise, measures, parts)
    found = {}
    for name in measures:
        if name == "quiet":
            continue
        origin = "quiet" if name == "psf" and "quiet" in measures else name
        one = measures[origin]
        flux = inner(one.weights, one.pixels.values)
        excess = _misfit(xp, one, flux) if name == "psf" and judged else None
        found[name] = (*lever.put_right(origin, flux), excess)
    return found, lever.of_psf


def put_right(xp: Any, some: Sequence[Strong], noise: EpochNoise, judged: bool) -> dict[str, ForcedFluxes]:
    """Fluxes of all stars of high leverage on an image, (S,), with their leverage as it is on this image."""
    verdicts, measures, parts = each(lambda *arrays: xp.concatenate(arrays), *some)
    if noise.correction is not None:
        parts = _corrected(xp, parts, noise.correction)
    fluxes, _ = fluxes_of(xp, noise, measures, parts, judged)
    return {name: stated(xp, verdict, *fluxes[name]) for name, verdict in verdicts.items()}


def stated(xp: Any, verdict: Verdict, flux: Any, variance: Any, excess: Any) -> ForcedFluxes:
    """Fluxes and errors of the first stars, as far as they are to be stated; the others have none.

    Nor have they flags of the fit, whatever stars stand beside them.
    """
    n, flags = len(flux), verdict.flags.copy()
    could = verdict.ok[:n]
    flags[:n] |= xp.where(could & ~xp.isfinite(flux), SOURCE_FLAGS.sets_kernel, 0).astype(xp.int32)
    if excess is not None:
        variance = variance * excess
        flags[:n] |= xp.where(could & (excess > _POOR_FIT), SOURCE_FLAGS.poor_fit, 0).astype(xp.int32)
    ok = could & (variance > 0)
    found = xp.full((2, len(flags)), xp.nan)
    found[0, :n] = xp.where(ok, flux, xp.nan)
    found[1, :n] = xp.sqrt(xp.where(ok, variance, xp.nan))
    return ForcedFluxes(found[0], found[1], flags, verdict.n_masked)


def _misfit(xp: Any, psf: Weighted, flux: Any) -> Any:
    """By how much chi^2 of the PSF's fit exceeds what noise alone gives in all but few cases; at least 1."""
    pixels = psf.pixels
    used = psf.matters & pixels.good
    n = used.sum(axis=(1, 2)).astype(xp.float64)
    rest = pixels.values - flux[:, None, None].astype(pixels.values.dtype) * psf.light
    chi2 = inner(rest * rest, pixels.inverse * used)
    n = xp.maximum(n - 1.0, 1.0)
    return xp.maximum(chi2 / (n + _CHI2_SIGMA * xp.sqrt(2.0 * n)), 1.0)


def _corrected(xp: Any, parts: dict[str, LinearVariance], correction: Any) -> dict[str, LinearVariance]:
    """Parts of the variance with a better covariance, along the directions of the PSF fluxes."""
    psf, *others = (part.rows.astype(xp.float64) for part in parts.values())
    found, more = correction(psf, xp.concatenate(others) if others else psf[:0])
    fits = [inner(psf, found), *more.reshape(len(others), len(psf))]
    return {name: part._replace(fit=fit, coordinates=rows, directions=found if name == "psf" else None)
            for (name, part), rows, fit in zip(parts.items(), (psf, *others), fits, strict=True)}


class _Leverage:
    """How much of a star's light and noise the fit of the model took up, and what that makes of its fluxes."""

    def __init__(self, xp: Any, noise: EpochNoise, measures: dict[str, Weighted],
                 parts: dict[str, LinearVariance]) -> None:
        self.xp, self.parts = xp, parts
        self.of_psf = xp.zeros(len(next(iter(measures.values())).weights))
        self._share = None
        if noise.fitted is None or noise.covariance is None or "psf" not in measures:
            return
        psf = parts["psf"]
        self._white, self._share = {}, {}
        for name, one in measures.items():
            squares = one.weights * one.weights
            self._white[name] = inner(squares, one.pixels.variance)
            part = inner(squares, one.pixels.variance * one.pixels.fitted)
            self._share[name] = part / xp.where(self._white[name] > 0, self._white[name], 1.0)
        inverse = 1.0 / xp.where(self._white["psf"] > 0, self._white["psf"], xp.inf)  # phi^T W phi
        self._levers = {name: self._share["psf"] * inverse * inner(part.coordinates, psf.directions)
                        for name, part in parts.items()}
        self.of_psf = self._levers["psf"]

    def put_right(self, name: str, flux: Any) -> tuple[Any, Any]:
        """Flux without the star's pull on its own model, and its variance."""
        part = self.parts[name]
        noise = part.noise.astype(self.xp.float64)
        if self._share is None:
            return flux, noise + part.fit
        excess = noise / self.xp.where(self._white[name] > 0, self._white[name], 1.0)
        left = 1.0 - self._levers[name]
        left = self.xp.where(left > _LEFT, left, self.xp.nan)
        fit = excess * (1.0 - 2.0 * self._share[name]) * part.fit
        return flux / left, (noise + fit) / left**2
