"""What the fit of the model takes of the light and noise of stars, and their fluxes and errors without that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gpudia.flags import SOURCE_FLAGS
from gpudia.photometry.linear import EpochNoise, LinearVariance
from gpudia.photometry.stamps import ForcedFluxes, inner

__all__ = ["HIGH", "Strong", "Under", "Verdict", "Weighted", "each", "fluxes_of", "picked", "put_right", "stated",
           "sums_of"]

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


class Sums(NamedTuple):
    """Sums over the pixels of a measure, (S,) float64 each.

    Flux; variance by white noise; share of that on pixels which took part in the fit (None: not known); by how much
    chi^2 of the PSF's fit exceeds what noise alone gives (None: not looked at).
    """

    flux: Any
    white: Any
    share: Any
    excess: Any


class Strong(NamedTuple):
    """Stars of high leverage on one image, and what their fluxes follow from, by measure; "psf" is the first.

    "quiet" are the weights of PSF fluxes where these are not the PSF's own, which say what the fit takes.
    """

    verdicts: dict[str, Verdict]
    sums: dict[str, Sums]
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


def sums_of(xp: Any, one: Weighted, judged: bool) -> Sums:
    """Sums over the pixels of a measure; with `judged` by how well the PSF fits, too."""
    squares, pixels = one.weights * one.weights, one.pixels
    flux, white, share = inner(one.weights, pixels.values), inner(squares, pixels.variance), None
    if pixels.fitted is not None:
        share = inner(squares, pixels.variance * pixels.fitted) / xp.where(white > 0, white, 1.0)
    return Sums(flux, white, share, _misfit(xp, one, flux) if judged else None)


def fluxes_of(xp: Any, sums: dict[str, Sums], parts: dict[str, LinearVariance]) -> tuple[dict[str, _Flux], Any]:
    """Fluxes of some stars without their pull on their own model, their variance, and the stars' leverage, (S,).

    Right for those stars only of which the measure can be had.
    """
    psf, found = sums.get("psf"), {}
    if psf is None or psf.share is None or parts["psf"].directions is None:
        for name, one in sums.items():
            found[name] = one.flux, parts[name].noise.astype(xp.float64) + parts[name].fit, one.excess
        return found, xp.zeros(len(next(iter(sums.values())).flux))
    pull = psf.share / xp.where(psf.white > 0, psf.white, xp.inf)  # white is 1 / phi^T W phi
    leverage = pull * parts["psf"].fit
    for name in sums:
        if name != "quiet":
            origin = "quiet" if name == "psf" and "quiet" in sums else name
            lever = leverage if origin == "psf" else pull * inner(parts[origin].coordinates, parts["psf"].directions)
            found[name] = _put_right(xp, sums[origin], parts[origin], lever)
    return found, leverage


def _put_right(xp: Any, one: Sums, part: LinearVariance, lever: Any) -> _Flux:
    """Flux, variance and misfit of a measure of which the fit took this share."""
    noise = part.noise.astype(xp.float64)
    excess = noise / xp.where(one.white > 0, one.white, 1.0)
    left = xp.where(1.0 - lever > _LEFT, 1.0 - lever, xp.nan)
    return one.flux / left, (noise + excess * (1.0 - 2.0 * one.share) * part.fit) / left**2, one.excess


def put_right(xp: Any, some: Sequence[Strong], noise: EpochNoise) -> dict[str, ForcedFluxes]:
    """Fluxes of all stars of high leverage on an image, (S,), with their leverage as it is on this image."""
    verdicts, sums, parts = each(lambda *arrays: xp.concatenate(arrays), *some)
    if noise.correction is not None:
        parts = _corrected(xp, parts, noise.correction)
    fluxes, _ = fluxes_of(xp, sums, parts)
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
    fits = [inner(psf, found), *(more[k * len(psf):(k + 1) * len(psf)] for k in range(len(others)))]
    return {name: part._replace(fit=fit, coordinates=rows, directions=found if name == "psf" else None)
            for (name, part), rows, fit in zip(parts.items(), (psf, *others), fits, strict=True)}
