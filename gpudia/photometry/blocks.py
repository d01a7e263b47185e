"""Some stars on one image: pixel weights, fluxes, and what the stars' own part in the fit of the model does to them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpudia.backend import Backend, to_device, to_host
from gpudia.errors import InputError
from gpudia.flags import PIXEL_FLAGS, SOURCE_FLAGS
from gpudia.photometry.apertures import aperture_weights, stamp_side
from gpudia.photometry.leverage import HIGH, Strong, Under, Verdict, Weighted, each, fluxes_of, picked, stated, sums_of
from gpudia.photometry.linear import EpochNoise, NoiseUnder, WeightsSeen, finite, transform_side
from gpudia.photometry.psf import check_psf, shift_spectra, shifted_psf, smooth_profile, to_size
from gpudia.photometry.stamps import FloatArray, ForcedFluxes, Stamps, StampsOn, inner, rows_of, source_flags

__all__ = ["Block", "Epoch", "Stars"]

#: A masked pixel raises a flag where the PSF has this share of its peak or more (squared, as it counts in the flux).
_FAINT = 0.01**2
#: Share of the information that a smooth profile has to keep of the PSF's.
_ALIKE = 0.97

#: No numbers of stars of high leverage, nor anything about these.
_NO_STRONG: tuple[NDArray[np.int64], None] = np.empty(0, np.int64), None


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
    """

    positions: FloatArray
    shape: tuple[int, int]
    backend: Backend
    dtype: str
    psf: Any = None
    convolved: bool = False
    radius: float = 0.0

    def __post_init__(self) -> None:
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
        some.positions = self.positions[which]
        if self.psf is not None and self.psf.ndim == 3:
            some.psf = self.psf[which]
        return some


def _within(stamps: Any, size: int) -> Any:
    """The middle of stamps."""
    first = (int(stamps.shape[-1]) - size) // 2
    return stamps[:, first:first + size, first:first + size]


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
        other._seen = picked(self._seen, which)
        return other

    def measure(self, epoch: Epoch, limits: dict[str, float]) -> tuple[dict[str, ForcedFluxes], Any, Strong | None]:
        """Fluxes (S,) of each measure on one image; numbers of the stars of high leverage, and more about these."""
        xp, noise, pixels, light = self.xp, epoch.noise, self._pixels(epoch), self._fixed
        spectra: dict[str, Any] = dict.fromkeys(limits)
        usable = xp.ones(len(self.placed), dtype=bool)
        if noise.kernel is not None:
            kernels = {name: self.under[name].kernel_spectra(noise) for name in limits}
            spectra, scale = {name: one[0] for name, one in kernels.items()}, next(iter(kernels.values()))[1]
            usable = usable & (scale > 0)
            if self._spectra is not None:
                light = self._convolved(spectra["psf"], xp.where(scale > 0, scale, 1.0))
        measures = {name: self._psf(light, pixels) if name == "psf" else self._aperture(light, pixels)
                    for name in limits}
        verdicts = {name: _verdict(xp, one, usable, limits[name]) for name, one in measures.items()}
        n = self._worth_it(verdicts)
        if not n:
            none = xp.zeros(0)
            return {name: stated(xp, verdict, none, none, None) for name, verdict in verdicts.items()}, *_NO_STRONG
        part = self if n == len(self.placed) else self.only(slice(n))
        found, *strong = part._fluxes(noise, picked(verdicts, slice(n)), picked(measures, slice(n)),
                                      {name: _spectra_of(one, slice(n)) for name, one in spectra.items()})
        return {name: stated(xp, verdict, *found[name]) for name, verdict in verdicts.items()}, *strong

    def _worth_it(self, verdicts: dict[str, Verdict]) -> int:
        """How many stars are worth the work on the noise: all up to the last one of which a measure can be had."""
        if self.backend.array_type is not np.ndarray:  # it would be waited for
            return len(self.placed)
        some = np.flatnonzero(np.any([one.ok for one in verdicts.values()], axis=0))
        return int(some[-1]) + 1 if some.size else 0

    def _fluxes(self, noise: EpochNoise, verdicts: dict[str, Verdict], measures: dict[str, Weighted],
                spectra: dict[str, Any]) -> tuple[dict[str, Any], NDArray[np.int64], Strong | None]:
        """What `fluxes_of` finds, the numbers of the stars of high leverage, and these."""
        used = measures | {"psf": self._quiet(measures["psf"])} if self.stars.convolved else measures
        parts = {}
        for name, one in used.items():
            seen = self._weights_seen(name, one, noise, verdicts[name].ok)
            part = self.under[name].variance(one.weights, one.pixels.own, noise, spectra[name], seen)
            parts[name] = part.with_covariance(noise.covariance)
        sums = {name: sums_of(self.xp, one, self.stars.convolved and name == "psf") for name, one in used.items()}
        found, leverage = fluxes_of(self.xp, sums, parts)
        could = sum(verdict.ok for verdict in verdicts.values())
        high = np.flatnonzero(to_host((leverage > HIGH) & (could > 0)))
        if not high.size:
            return found, *_NO_STRONG
        which = rows_of(high, self.backend)
        if noise.correction is not None:  # that says what the covariance makes of the rows
            parts = {name: part._replace(coordinates=None, directions=None) for name, part in parts.items()}
        strong = Strong(*(picked(some, which) for some in (verdicts, sums, parts)))
        return found, high, self._with_own(strong, high, measures, noise, spectra) if self.stars.convolved else strong

    def _with_own(self, strong: Strong, high: NDArray[np.int64], measures: dict[str, Weighted], noise: EpochNoise,
                  spectra: dict[str, Any]) -> Strong:
        """Add what the PSF's own weights tell: its pull on the model is that of the PSF itself."""
        which = rows_of(high, self.backend)
        psf, under = picked(measures["psf"], which), self.under["psf"].only(high)
        part = under.variance(psf.weights, psf.pixels.own, noise, _spectra_of(spectra["psf"], which),
                              under.see(psf.weights, noise))
        part = part if noise.correction is not None else part.with_covariance(noise.covariance)
        return strong._replace(sums=strong.sums | {"psf": sums_of(self.xp, psf, False), "quiet": strong.sums["psf"]},
                               parts=strong.parts | {"psf": part, "quiet": strong.parts["psf"]})

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
        norm = inner(weighted, light).astype(self.dtype)
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
        shared, own, norm = inner(weighted, light), inner(weighted, profile), inner(psf.pixels.inverse, psf.counts)
        alike = (shared > 0) & (shared * shared >= _ALIKE * own * norm)
        weights = weighted / xp.where(alike, shared, 1.0).astype(self.dtype)[:, None, None]
        return psf._replace(weights=xp.where(alike[:, None, None], weights, psf.weights))

    def _aperture(self, light: Any, pixels: Under) -> Weighted:
        """Weights c, or c / c^T phi with a PSF."""
        xp, circle = self.xp, self.circle
        size = int(circle.shape[-1])
        pixels, inside = each(lambda plane: _within(plane, size), pixels), circle > 0
        weights = xp.where(pixels.good, circle, 0.0)
        if light is None:
            return Weighted(pixels, weights, circle, inside, light)
        light = _within(light, size)
        lit = inner(weights, light).astype(self.dtype)
        return Weighted(pixels, weights / xp.where(lit > 0, lit, xp.inf)[:, None, None],
                        xp.where(inside, xp.maximum(circle * light, 1e-12), 0.0), inside, light)

    def _weights_seen(self, name: str, one: Weighted, noise: EpochNoise, ok: Any) -> WeightsSeen:
        """What the variance needs of the weights: those of an aperture are the circle's, but for masked stars."""
        under = self.under[name]
        if name == "psf" or self._seen is None:
            return under.see(one.weights, noise)
        centre = int(self.circle.shape[-1]) // 2
        factor = one.weights[:, centre, centre] / self.circle[:, centre, centre]
        seen = each(lambda part: part * factor.reshape(-1, *(1,) * (part.ndim - 1)), self._seen)
        masked = np.flatnonzero((one.matters & ~one.pixels.good).any(axis=(1, 2)) & ok)
        if masked.size:
            few = under.only(masked).see(one.weights[masked], noise, often=True)
            for all_of_it, part in zip(seen, few, strict=True):
                if part is not None:
                    all_of_it[masked] = part
        return seen


def _spectra_of(spectra: Any, which: Any) -> Any:
    """Spectra of the kernel at some of the stars; one that is for all stars, or none, as it is."""
    return spectra if spectra is None or len(spectra) == 1 else spectra[which]


def _verdict(xp: Any, one: Weighted, usable: Any, limit: float) -> Verdict:
    """Of which stars no more than `limit` of the measure is masked, and no edge cuts them."""
    pixels = one.pixels
    lost = xp.where(pixels.good, 0.0, one.counts).sum(axis=(1, 2)) / one.counts.sum(axis=(1, 2))
    flags = source_flags(xp, xp.where(one.matters, pixels.bits, 0))
    n_masked = ((one.counts > 0) & ~pixels.good).sum(axis=(1, 2)).astype(xp.int32)
    return Verdict(usable & (lost <= limit) & ((flags & SOURCE_FLAGS.outside) == 0), flags, n_masked)
