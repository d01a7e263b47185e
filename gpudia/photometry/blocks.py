"""Some stars on one image: pixel weights, fluxes, and what the stars' own part in the fit of the model does to them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpudia.backend import Backend, to_device
from gpudia.errors import InputError
from gpudia.flags import PIXEL_FLAGS, SOURCE_FLAGS
from gpudia.photometry.apertures import aperture_weights, stamp_side
from gpudia.photometry.linear import EpochNoise, LinearVariance, NoiseUnder, WeightsSeen, finite, inner, transform_side
from gpudia.photometry.psf import check_psf, shift_spectra, shifted_psf, smooth_profile, to_size
from gpudia.photometry.stamps import FloatArray, ForcedFluxes, Stamps, StampsOn, rows_of, source_flags

__all__ = ["Block", "Epoch", "Stars"]

#: A masked pixel raises a flag where the PSF has this share of its peak or more (squared, as it counts in the flux).
_FAINT = 0.01**2
#: What the kernel must leave of a change of the star's flux: with less, the star decides on the kernel alone.
_LEFT = 0.02
#: chi^2 of the PSF's fit counts as that of noise up to so many sigma: pixels are correlated, fewer independent.
_CHI2_SIGMA = 5.0
#: Excess of chi^2 from which on the fit is called poor: errors are then 1.4 times what noise makes them, or more.
_POOR_FIT = 2.0
#: Share of the information that a smooth profile has to keep of the PSF's.
_ALIKE = 0.97


class Epoch(NamedTuple):
    """Planes (H, W) of one image, its flags (None: no pixel has any), and what its noise is made of."""

    difference: Any
    variance: Any
    flags: Any
    noise: EpochNoise


@dataclass
class Stars:
    """Where the stars are and what their light looks like; host side.

    `psf` is the epoch's or, if `convolved`, the reference's, which each epoch's kernel is to be convolved with.
    `numbers` are those of the stars among all.
    """

    positions: FloatArray
    shape: tuple[int, int]
    backend: Backend
    dtype: str
    psf: Any = None
    convolved: bool = False
    radius: float = 0.0
    numbers: Any = None

    def __post_init__(self) -> None:
        if self.numbers is None:
            self.numbers = np.arange(len(self.positions))
        if self.psf is not None:
            self.psf = check_psf(self.psf)
            if self.psf.ndim == 3 and len(self.psf) != len(self.positions):
                raise InputError(f"psf must be one for all stars or one for each of {len(self.positions)}, "
                                 f"got {len(self.psf)}")

    def whole_size(self, noise: EpochNoise) -> int:
        """Side of a stamp that holds PSF and kernel, and the aperture."""
        return max(int(self.psf.shape[-1]) + noise.kernel_size - 1, stamp_side(self.radius))

    def transform_side(self, size: int, noise: EpochNoise) -> int:
        """Side of the transforms for stamps of this size."""
        return transform_side(size, noise.kernel_size, int(self.psf.shape[-1]) if self.convolved else 0)

    def __getitem__(self, which: Any) -> Stars:
        some = copy.copy(self)  # checked already
        some.positions, some.numbers = self.positions[which], self.numbers[which]
        if self.psf is not None and self.psf.ndim == 3:
            some.psf = self.psf[which]
        return some


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

    def within(self, size: int) -> Under:
        """Return the same on smaller stamps."""
        return Under(*(None if plane is None else _within(plane, size) for plane in self))

    def first(self, n: int) -> Under:
        """Return the same for the first stars."""
        return Under(*(None if plane is None else plane[:n] for plane in self))


def _within(stamps: Any, size: int) -> Any:
    """The middle of stamps."""
    first = (int(stamps.shape[-1]) - size) // 2
    return stamps[:, first:first + size, first:first + size]


class Weighted(NamedTuple):
    """A linear measure of some stars, (S, m, m): pixels, their weights, what each counts, which flag, the PSF."""

    pixels: Under
    weights: Any
    counts: Any
    matters: Any
    light: Any

    def first(self, n: int) -> Weighted:
        """Return the same for the first stars."""
        return Weighted(self.pixels.first(n), *(None if plane is None else plane[:n] for plane in self[1:]))


class Verdict(NamedTuple):
    """Which stars a measure can be had of, (S,), their flags and numbers of ignored pixels."""

    ok: Any
    flags: Any
    n_masked: Any


class Block:
    """Some stars, made ready for any number of images.

    `under` has the stamps of each measure with what the noise needs of the reference there; those of apertures are as
    small as they can be.
    """

    def __init__(self, stars: Stars, size: int, noise: EpochNoise) -> None:
        self.stars, self.size, self.backend = stars, size, stars.backend
        self.side = side = stars.transform_side(size, noise)
        self.xp, self.dtype = stars.backend.xp, np.dtype(stars.dtype)
        self.placed = self._placed(size)
        offsets = self.placed.stamps.offsets
        self.under = {}
        self.circle = self._spectra = self._fixed = self._seen = None
        if stars.psf is not None:
            self.under["psf"] = NoiseUnder(self.placed, noise, side, self.dtype)
        if stars.radius:
            small = stamp_side(stars.radius)
            self.circle = to_device(aperture_weights(stars.positions, stars.radius, small)[0], self.backend, self.dtype)
            self.under["ap"] = NoiseUnder(self._placed(small), noise, transform_side(small, noise.kernel_size),
                                          self.dtype)
            if self.backend.array_type is np.ndarray:  # elsewhere which star is masked would be waited for
                self._seen = self.under["ap"].see(self.circle, noise, often=True)
        if stars.convolved:
            self._spectra = to_device(shift_spectra(stars.psf, offsets, size, side, self.dtype), self.backend)
        elif stars.psf is not None:
            self._fixed = to_device(to_size(shifted_psf(stars.psf, offsets), size), self.backend, self.dtype)

    def _placed(self, size: int) -> StampsOn:
        return StampsOn(Stamps(self.stars.positions, size), self.stars.shape, self.backend)

    def only(self, numbers: NDArray[np.int64] | slice) -> Block:
        """Return the same for some of the stars."""
        other, which = copy.copy(self), rows_of(numbers, self.backend)
        other.stars, other.placed = self.stars[numbers], self.placed.only(numbers)
        other.under = {name: under.only(numbers) for name, under in self.under.items()}
        for name in ("circle", "_spectra", "_fixed"):
            whole = getattr(self, name)
            setattr(other, name, None if whole is None else whole[which])
        other._seen = None if self._seen is None else self._seen.map(lambda part: part[which])
        return other

    def measure(self, epoch: Epoch, limits: dict[str, float],
                exact: bool = False) -> tuple[dict[str, ForcedFluxes], Any]:
        """Fluxes (S,) of each measure on one image, and the leverage of its stars (0 of those that have no flux)."""
        xp, noise, pixels, light = self.xp, epoch.noise, self._pixels(epoch), self._fixed
        spectra: dict[str, Any] = dict.fromkeys(limits)
        usable = xp.ones(len(self.placed), dtype=bool)
        if noise.kernel is not None:
            kernels = {name: self.under[name].kernel_spectra(noise.kernel) for name in limits}
            spectra, scale = {name: one[0] for name, one in kernels.items()}, next(iter(kernels.values()))[1]
            usable = usable & (scale > 0)
            if self._spectra is not None:
                light = self._convolved(spectra["psf"], xp.where(scale > 0, scale, 1.0))
        measures = {name: self._psf(light, pixels) if name == "psf" else self._aperture(light, pixels)
                    for name in limits}
        verdicts = {name: _verdict(xp, one, usable, limits[name]) for name, one in measures.items()}
        n = self._worth_it(verdicts)
        part, first = self, measures
        if n < len(self.placed):
            part, first = self.only(slice(n)), {name: one.first(n) for name, one in measures.items()}
            spectra = {name: one if one is None or len(one) == 1 else one[:n] for name, one in spectra.items()}
        ok = {name: one.ok[:n] for name, one in verdicts.items()}
        fluxes, levers = part._fluxes(first, noise, spectra, ok, exact)
        found = {name: _stated(xp, one, *fluxes[name]) for name, one in verdicts.items()}
        leverage = xp.zeros(len(self.placed))
        leverage[:n] = xp.where(sum(ok.values()) > 0, levers, 0.0)
        return found, leverage

    def _worth_it(self, verdicts: dict[str, Verdict]) -> int:
        """How many stars are worth the work on the noise: all up to the last one of which a measure can be had."""
        if self.backend.array_type is not np.ndarray:  # it would be waited for
            return len(self.placed)
        some = np.flatnonzero(np.any([one.ok for one in verdicts.values()], axis=0))
        return int(some[-1]) + 1 if some.size else 0

    def _fluxes(self, measures: dict[str, Weighted], noise: EpochNoise, spectra: dict[str, Any], ok: dict[str, Any],
                exact: bool) -> tuple[dict[str, tuple[Any, Any, Any]], Any]:
        """Flux, variance and chi^2 excess (None: not looked at) of each measure, (S,), and the stars' leverage.

        Right for those stars only of which the measure can be had.
        """
        source = {name: name for name in measures}
        if "psf" in measures and self.stars.convolved:
            # the pull on the model is that of the PSF itself: where it is high its own weights are needed, too
            source["psf"] = "quiet" if exact else "psf"
            measures = measures | {source["psf"]: self._quiet(measures["psf"])}
        parts = {}
        for name, one in measures.items():
            where = "psf" if name == "quiet" else name
            parts[name] = self.under[where].variance(one.weights, one.pixels.own, noise, spectra[where],
                                                     self._weights_seen(where, one, noise, ok[where]))
        if exact and noise.correction is not None and noise.covariance is not None:
            parts = _corrected(self.xp, parts, noise.correction)
        else:
            parts = {name: part.with_covariance(noise.covariance) for name, part in parts.items()}
        lever = _Leverage(self.xp, noise, measures, parts)
        found = {}
        for name, origin in source.items():
            one = measures[origin]
            flux = (one.weights * one.pixels.values).sum(axis=(1, 2)).astype(self.xp.float64)
            excess = self._misfit(one, flux) if name == "psf" and self.stars.convolved else None
            found[name] = (*lever.put_right(origin, flux), excess)
        return found, lever.of_psf

    def _convolved(self, kernel_spectra: Any, scale: Any) -> Any:
        """The epoch's PSF at each star on its stamp."""
        product = self._spectra * (kernel_spectra / scale[:, None, None].astype(self.dtype))
        return self.backend.irfft2(product, (self.side, self.side), self.size)[:, :, :self.size]

    def _pixels(self, epoch: Epoch) -> Under:
        xp, gather, fitted = self.xp, self.placed.gather, epoch.noise.fitted
        values, variance = gather(epoch.difference).astype(self.dtype), gather(epoch.variance).astype(self.dtype)
        frame = xp.zeros(epoch.difference.shape, dtype=xp.uint8) if epoch.flags is None else epoch.flags
        bits = gather(frame, outside=PIXEL_FLAGS.border)
        measured = xp.isfinite(values) & xp.isfinite(variance) & (variance > 0)
        ignored = (bits & (255 - PIXEL_FLAGS.clipped)) != 0
        bits = xp.where(ignored | measured, bits, bits | PIXEL_FLAGS.no_data).astype(xp.uint8)
        good = measured & ~ignored
        return Under(xp.where(good, values, 0.0), xp.where(good, 1.0 / xp.where(good, variance, 1.0), 0.0),
                     xp.where(good, variance, 0.0), good, bits,
                     finite(gather(epoch.noise.image_variance).astype(self.dtype)),
                     None if fitted is None else gather(fitted) & (bits == 0))

    def _psf(self, light: Any, pixels: Under) -> Weighted:
        """Weights W phi / phi^T W phi; 0 for a star that is masked altogether."""
        xp = self.xp
        weighted = pixels.inverse * light
        norm = (weighted * light).sum(axis=(1, 2))
        counts = light * light
        return Weighted(pixels, weighted / xp.where(norm > 0, norm, 1.0)[:, None, None], counts,
                        (counts > 0) & (counts >= _FAINT * counts.max(axis=(1, 2), keepdims=True)), light)

    def _quiet(self, psf: Weighted) -> Weighted:
        """Weights W q / q^T W phi with a smooth profile q.

        A PSF made with the kernel has the kernel's noise, and so has the difference: with q = phi their product holds
        the variance of the model's light, and all fluxes are too small by a constant share (0.1 % with one frame as
        reference). A profile of seven numbers has little of it; it is taken where it keeps 97 % of the information.
        """
        xp, light = self.xp, psf.light
        profile = smooth_profile(light)
        weighted = psf.pixels.inverse * profile
        shared, own = (weighted * light).sum(axis=(1, 2)), (weighted * profile).sum(axis=(1, 2))
        norm = (psf.pixels.inverse * psf.counts).sum(axis=(1, 2))
        alike = (shared > 0) & (shared * shared >= _ALIKE * own * norm)
        weights = weighted / xp.where(alike, shared, 1.0)[:, None, None]
        return psf._replace(weights=xp.where(alike[:, None, None], weights, psf.weights))

    def _aperture(self, light: Any, pixels: Under) -> Weighted:
        """Weights c, or c / c^T phi with a PSF."""
        xp, circle = self.xp, self.circle
        size = int(circle.shape[-1])
        pixels, inside = pixels.within(size), circle > 0
        weights = xp.where(pixels.good, circle, 0.0)
        if light is None:
            return Weighted(pixels, weights, circle, inside, light)
        light = _within(light, size)
        lit = (weights * light).sum(axis=(1, 2))
        return Weighted(pixels, weights / xp.where(lit > 0, lit, xp.inf)[:, None, None],
                        xp.where(inside, xp.maximum(circle * light, 1e-12), 0.0), inside, light)

    def _weights_seen(self, name: str, one: Weighted, noise: EpochNoise, ok: Any) -> WeightsSeen:
        """What the variance needs of the weights: those of an aperture are the circle's, but for masked stars."""
        under = self.under[name]
        if name == "psf" or self._seen is None:
            return under.see(one.weights, noise)
        centre = int(self.circle.shape[-1]) // 2
        factor = one.weights[:, centre, centre] / self.circle[:, centre, centre]
        seen = self._seen.map(lambda part: part * factor.reshape(-1, *(1,) * (part.ndim - 1)))
        masked = np.flatnonzero((one.matters & ~one.pixels.good).any(axis=(1, 2)) & ok)
        if masked.size:
            few = under.only(masked).see(one.weights[masked], noise, often=True)
            for all_of_it, part in zip(seen, few, strict=True):
                if part is not None:
                    all_of_it[masked] = part
        return seen

    def _misfit(self, psf: Weighted, flux: Any) -> Any:
        """By how much chi^2 of the PSF's fit exceeds what noise alone gives in all but few cases; at least 1."""
        xp, pixels = self.xp, psf.pixels
        used = psf.matters & pixels.good
        n = used.sum(axis=(1, 2)).astype(xp.float64)
        rest = pixels.values - flux[:, None, None].astype(self.dtype) * psf.light
        chi2 = xp.where(used, rest * rest * pixels.inverse, 0.0).sum(axis=(1, 2)).astype(xp.float64)
        n = xp.maximum(n - 1.0, 1.0)
        return xp.maximum(chi2 / (n + _CHI2_SIGMA * xp.sqrt(2.0 * n)), 1.0)


def _verdict(xp: Any, one: Weighted, usable: Any, limit: float) -> Verdict:
    """Of which stars no more than `limit` of the measure is masked, and no edge cuts them."""
    pixels = one.pixels
    lost = xp.where(pixels.good, 0.0, one.counts).sum(axis=(1, 2)) / one.counts.sum(axis=(1, 2))
    flags = source_flags(xp, xp.where(one.matters, pixels.bits, 0))
    n_masked = ((one.counts > 0) & ~pixels.good).sum(axis=(1, 2)).astype(xp.int32)
    return Verdict(usable & (lost <= limit) & ((flags & SOURCE_FLAGS.outside) == 0), flags, n_masked)


def _stated(xp: Any, verdict: Verdict, flux: Any, variance: Any, excess: Any) -> ForcedFluxes:
    """Fluxes and errors of the first stars, as far as they are to be stated; the others have none.

    Nor have they flags of the fit, whatever stars stand beside them.
    """
    n, flags = len(flux), verdict.flags
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


def _corrected(xp: Any, parts: dict[str, LinearVariance], correction: Any) -> dict[str, LinearVariance]:
    """Parts of the variance with a better covariance, along the directions of the PSF fluxes."""
    psf, *others = (part.rows.astype(xp.float64) for part in parts.values())  # "psf" is the first
    found, more = correction(psf, xp.concatenate(others) if others else psf[:0])
    directions = [found, *more.reshape(len(others), *psf.shape)]
    return {name: part.along(one) for (name, part), one in zip(parts.items(), directions, strict=True)}


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
            squares = one.weights * one.weights * one.pixels.variance
            self._white[name] = squares.sum(axis=(1, 2)).astype(xp.float64)
            part = xp.where(one.pixels.fitted, squares, 0.0).sum(axis=(1, 2))
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
