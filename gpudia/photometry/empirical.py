"""The PSF of a frame from its own stars, for crowded fields too."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from astropy.stats import sigma_clipped_stats
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from gpudia.errors import InputError
from gpudia.photometry.companions import find_companions
from gpudia.photometry.crowded import Scene, first_of_place
from gpudia.photometry.inputs import as_positions, check_plane
from gpudia.photometry.psf import shifted_psf
from gpudia.photometry.psf_model import (
    Psf,
    constant_under_change,
    cut_circle,
    field_terms,
    fit_moffat,
    moffat_psf,
    radius2,
)
from gpudia.photometry.psf_stack import alike, stack_terms, varies
from gpudia.photometry.stamps import FloatArray, Stamps

__all__ = ["empirical_psf"]

#: PSF stars from which on their backgrounds make a plane.
_PLANE = 10
#: Rounds of fitting all stars, looking for unknown ones and stacking; so many more once the PSF varies.
_ROUNDS, _MORE_ROUNDS = 5, 4
#: Fewer stars than this make no trustworthy stack: a profile is fitted to it.
_MIN_STACK = 4
#: Nor do stars whose signal to noise ratios add up (in quadrature) to less than this: the stack is too noisy.
_MIN_DEPTH = 200.0
#: Signal to noise from which a star can serve as a PSF star, and from which a star's place is refined.
_MIN_SNR, _SHARP_SNR = 30.0, 20.0
#: Share of the light (of phi^2) of a PSF star that may be masked.
_MASKED = 0.01
#: The rim of a stamp begins at this share of its half width.
_RIM = 0.8
#: A PSF is within this share of its profile, to judge what of its stack is noise, and changes by so much at most.
_PRIOR, _PRIOR_CHANGE = 0.1, 0.3


def empirical_psf(image: NDArray[Any], variance: NDArray[Any], mask: NDArray[Any] | None, positions: Any, fwhm: float,
                  stamp_size: int | None = None, max_stars: int = 150) -> Psf:
    """Build the PSF of a frame from its bright, unmasked, least disturbed stars.

    In rounds: the fluxes of all stars are fitted together, places and backgrounds of the bright ones one by one; what
    the model leaves around the PSF stars is searched for stars that are not in the list; then the residuals, moved to
    a common centre, correct the PSF, as their clipped average or, where the stars show that it varies, as a linear
    function of the place (they do when the fit gains more by it than at 199 random permutations of their places).
    A constant under the PSF, which the backgrounds of the stars hide, is set by a Moffat profile.

    Measured (``bench/psf_accuracy.py`` does such fields) on simulated crowded fields, a star for 80 px, 400 x 400 px,
    FWHM 3.5 px that changes by 6 % over 512 px: PSF fluxes all over the field are off by 0.02 to 0.4 % (rms) with the
    PSF of a mean of 20 exposures, by 0.3 to 0.6 % with that of one (FWHM 5 px: up to 1.3 %); by 1.3 % where the stars
    are too few to show that it varies. Wings of beta 2.5 change nothing in that, but the 2 % of the light beyond
    3 FWHM are in no flux. Where pixels are too coarse (FWHM 1.5 px) the shift to a star's place within them leaves
    0.7 % and more, whatever the PSF.

    Parameters
    ----------
    image, variance : (H, W)
        ADU and ADU^2.
    mask : (H, W) bool or bits of `gpudia.flags.PIXEL_FLAGS`, optional
        A star with an ignored pixel near its centre (saturated ones have) is not used.
    positions : (S, 2)
        All stars (x, y) that are known, faint ones too. Those that are not finite are left out.
    fwhm : float
        Rough FWHM, pixels.
    stamp_size : int, optional
        Odd side of the stamp; by default 3 FWHM on each side of the centre.
    max_stars : int
        PSF stars at most.

    Returns
    -------
    Psf

    Raises
    ------
    InputError
        `fwhm` is not positive and finite, `stamp_size` is even or too small, shapes do not agree.
    """
    image = check_plane("image", image)
    variance = check_plane("variance", variance, image.shape)
    if not np.isfinite(fwhm) or fwhm <= 0:
        raise InputError(f"fwhm must be finite and positive, got {fwhm}")
    size = 2 * int(np.ceil(3 * fwhm)) + 1 if stamp_size is None else stamp_size
    if size % 2 == 0 or size < 5:
        raise InputError(f"stamp_size must be odd and at least 5, got {size}")
    stars = as_positions(positions)
    stars = stars[np.isfinite(stars).all(axis=1)]
    stars = stars[first_of_place(stars, max(fwhm / 4, 0.5)) == np.arange(len(stars))]
    shape = (image.shape[0], image.shape[1])
    assumed = Psf(moffat_psf(fwhm, size)[None], "assumed", 0, shape)
    good = np.isfinite(image) & np.isfinite(variance) & (variance > 0)
    if mask is not None:
        good &= check_plane("mask", mask, image.shape) == 0
    if not good.any() or not len(stars):
        return assumed
    field = _Field(np.where(good, image - sigma_clipped_stats(image[good])[1], 0.0),
                   np.where(good, 1 / np.where(good, variance, 1.0), 0.0))
    state = _choose(field, stars, assumed.stamp, fwhm, max_stars)
    terms, profile = _rounds(field, state, assumed, fwhm)
    if not state.chosen.any():
        return assumed
    n, depth = int(state.chosen.sum()), np.linalg.norm(state.snr[state.chosen])
    if n < _MIN_STACK or depth < _MIN_DEPTH:
        return Psf(profile[None], "moffat", n, shape)
    return Psf(terms, "stack", n, shape)


@dataclass(frozen=True)
class _Field:
    """A background-subtracted frame and the weights of its pixels, 1 / variance, 0 on those to ignore."""

    data: FloatArray
    weights: FloatArray

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.data.shape[1]


@dataclass
class _State:
    """Stars that matter: places, fluxes, signal to noise, which make the PSF, and the backgrounds under these."""

    stars: FloatArray
    fluxes: FloatArray
    snr: FloatArray
    chosen: NDArray[np.bool_]
    background: FloatArray

    def select(self, keep: NDArray[np.bool_]) -> None:
        """Drop the other stars."""
        self.background = self.background[keep[self.chosen]]
        self.stars, self.fluxes, self.snr = self.stars[keep], self.fluxes[keep], self.snr[keep]
        self.chosen = self.chosen[keep]

    def drop(self, stays: NDArray[np.bool_]) -> None:
        """Make those of the PSF stars that do not stay mere neighbours."""
        self.background = self.background[stays]
        self.chosen[np.flatnonzero(self.chosen)[~stays]] = False

    def forget(self, n_listed: int) -> None:
        """Drop what was added to the first so many stars."""
        self.stars, self.fluxes, self.snr, self.chosen = (
            values[:n_listed] for values in (self.stars, self.fluxes, self.snr, self.chosen))

    def add(self, places: FloatArray, fluxes: FloatArray, snr: FloatArray) -> None:
        """Add neighbours that were found."""
        self.stars = np.concatenate([self.stars, places])
        self.fluxes, self.snr = np.concatenate([self.fluxes, fluxes]), np.concatenate([self.snr, snr])
        self.chosen = np.concatenate([self.chosen, np.zeros(len(places), bool)])


def _choose(field: _Field, stars: FloatArray, psf: FloatArray, fwhm: float, max_stars: int) -> _State:
    """Choose PSF stars, of those that are disturbed little the brightest, and keep what lies around them."""
    scene = Scene.of(stars, psf, field.shape)
    flux, information = scene.solve(field.data, field.weights), scene.information(field.weights)
    snr = flux * np.sqrt(information)
    seen = snr > 3
    stars, flux, snr, phi = stars[seen], flux[seen], snr[seen], scene.phi[seen]
    hidden = np.where(Stamps(stars, psf.shape[0]).gather(field.weights) > 0, 0.0, phi**2).sum(axis=(1, 2))
    candidates = np.flatnonzero((hidden <= _MASKED * (phi**2).sum(axis=(1, 2))) & (snr >= _MIN_SNR))
    chosen = np.zeros(len(stars), bool)
    if candidates.size:
        near = cKDTree(stars).query_ball_point(stars[candidates], 1.5 * fwhm)
        disturbed = np.array([flux[group].sum() for group in near]) / flux[candidates] - 1
        # In a crowded field nothing is undisturbed: those disturbed little come first, and of these the brightest.
        order = np.lexsort((-flux[candidates], disturbed > 0.1, disturbed > 0.5))
        enough = (disturbed[order] <= 0.5) | (np.arange(len(order)) < _MIN_STACK)
        chosen[candidates[order[enough][:max_stars]]] = True
    state = _State(stars, flux, snr, chosen, np.zeros(int(chosen.sum())))
    if candidates.size:
        state.select(cKDTree(stars[chosen]).query(stars)[0] < 1.5 * psf.shape[0])
    return state


def _rounds(field: _Field, state: _State, psf: Psf, fwhm: float) -> tuple[FloatArray, FloatArray]:
    """Alternate between the stars and the PSF: its terms, and the profile that fits it best."""
    free, number, profile, n_listed = False, 0, psf.stamp, len(state.stars)
    while state.chosen.any() and number < _ROUNDS + (_MORE_ROUNDS if free else 0):
        field = _fit_stars(field, state, psf, fwhm, number in (1, 2, _ROUNDS + 1))
        seen = _left_of_stars(field, state, psf)
        if not len(seen.values):
            break
        if 0 < number <= _ROUNDS:
            stays = alike(seen.values, seen.weights, psf.stamp, fwhm, _MIN_STACK)
            seen = seen.select(stays)
            state.drop(stays)
        if number == _ROUNDS - 1:
            free = varies(seen.values, seen.weights, seen.basis, psf.stamp, fwhm)
            if free:  # some of what was found beside the stars is what the PSF varies by
                state.forget(n_listed)
        basis = seen.basis if free else seen.basis[:, :1]
        change, noise = stack_terms(seen.values, seen.weights, basis, psf.stamp)
        change[: len(psf.terms)] += psf.terms
        terms, profile = _normalised(change, noise, fwhm)
        psf = replace(psf, terms=terms)
        number += 1
    return psf.terms, profile


def _fit_stars(field: _Field, state: _State, psf: Psf, fwhm: float, search: bool) -> _Field:
    """Fluxes, places and backgrounds of the stars, and stars that are found; the frame at the stars' level."""
    scene = Scene.of(state.stars, psf.at(state.stars), field.shape)
    state.fluxes = scene.solve(field.data, field.weights, state.fluxes)
    residual = field.data - scene.paint(state.fluxes)
    _refine(field, state, scene, residual)
    if search:
        chosen = state.chosen
        state.add(*find_companions(residual, field.weights, psf.stamp, state.stars[chosen], state.fluxes[chosen],
                                   state.stars, fwhm, state.background))
    return _level(field, state, psf.shape)


@dataclass(frozen=True)
class _Seen:
    """What a PSF leaves of its stars, over their fluxes (n, m, m), weights of that, and functions of the places."""

    values: FloatArray
    weights: FloatArray
    basis: FloatArray

    def select(self, stars: NDArray[np.bool_]) -> _Seen:
        """Return the same for some stars."""
        return _Seen(self.values[stars], self.weights[stars], self.basis[stars])


def _left_of_stars(field: _Field, state: _State, psf: Psf) -> _Seen:
    scene = Scene.of(state.stars, psf.at(state.stars), field.shape)
    state.fluxes = scene.solve(field.data, field.weights, state.fluxes)
    state.drop(state.fluxes[state.chosen] > 0)
    own, fluxes = Stamps(state.stars[state.chosen], psf.terms.shape[-1]), state.fluxes[state.chosen, None, None]
    weights = own.gather(field.weights)
    residual = own.gather(field.data - scene.paint(state.fluxes)) - state.background[:, None, None]
    values = shifted_psf(np.where(weights > 0, residual, 0.0), -own.offsets) / fluxes
    return _Seen(values, weights * fluxes**2, field_terms(own.positions, psf.shape))


def _normalised(terms: FloatArray, noise: FloatArray, fwhm: float) -> tuple[FloatArray, FloatArray]:
    """The terms without a constant, which the backgrounds hide, and quiet; and the profile that fits best.

    Sums are 1, 0, 0. Where the stack is noisy the mean is drawn to the profile and the other terms to 0, as if they
    were known to be within 10 and 30 % of the profile.
    """
    half2 = (noise.shape[0] / 2) ** 2
    inside = radius2(noise.shape[0]) <= half2
    rim = inside & (radius2(noise.shape[0]) > _RIM**2 * half2)
    # From 0 at the rim on, in every round: else what a round gets wrong in the wings would be passed on and grow.
    terms = terms - terms[:, rim].mean(axis=1)[:, None, None]
    profile, constant = fit_moffat(terms[0], fwhm, noise)
    known = (_PRIOR * profile) ** 2
    share = np.where(inside, known / (known + noise**2), 0.0)
    total = np.where(inside, terms[0] - constant, 0.0).sum()
    mean = cut_circle(profile + share * ((terms[0] - constant) / total - profile))
    known = (_PRIOR_CHANGE * profile) ** 2
    share = np.where(inside, known / (known + noise**2), 0.0)
    rest = [share * (term - constant_under_change(term, profile, noise)) for term in terms[1:]]
    return np.stack([mean, *(term - term.sum() * mean for term in rest)]), profile


def _refine(field: _Field, state: _State, scene: Scene, residual: FloatArray) -> None:
    """Places of the bright stars and backgrounds of the PSF stars, each from a linear fit to what is left there."""
    bright = state.chosen | (state.snr > _SHARP_SNR)
    stamps, phi = Stamps(state.stars[bright], scene.stamps.size), scene.phi[bright]
    weights, left = stamps.gather(field.weights), stamps.gather(residual)
    dy, dx = np.gradient(phi, axis=(1, 2))
    flux = state.fluxes[bright, None, None]
    design = np.stack([phi, -flux * dx, -flux * dy, np.ones_like(phi)], axis=1)
    design[:, 3] = np.where(radius2(stamps.size) <= (stamps.size / 2) ** 2, 1.0, 0.0)
    weighted = design * weights[:, None]
    normal = np.einsum("sayx,sbyx->sab", weighted, design)
    scale = 1 / np.sqrt(np.maximum(np.einsum("saa->sa", normal), 1e-300))
    normal = normal * scale[:, :, None] * scale[:, None, :] + 1e-9 * np.eye(4)
    found = np.linalg.solve(normal, (np.einsum("sayx,syx->sa", weighted, left) * scale)[..., None])[..., 0] * scale
    step = np.clip(np.nan_to_num(found[:, 1:3]), -0.3, 0.3)
    state.stars[bright] += step
    state.background = found[state.chosen[bright], 3]


def _level(field: _Field, state: _State, shape: tuple[int, int]) -> _Field:
    """Take from the frame what the PSF stars' backgrounds have in common: a plane, with few stars a level."""
    basis = field_terms(state.stars[state.chosen], shape)[:, :1 if len(state.background) < _PLANE else 3]
    kept = np.ones(len(basis), bool)
    for _ in range(3):
        found = np.linalg.lstsq(basis[kept], state.background[kept], rcond=None)[0]
        off = np.abs(state.background - basis @ found)
        kept = off <= 3 * 1.4826 * np.median(off) + 1e-12
    state.background = state.background - basis @ found
    x, y = np.arange(shape[1]), np.arange(shape[0])
    along_x, along_y = (field_terms(np.column_stack(p), shape) for p in ((x, 0 * x), (0 * y, y)))
    plane = np.zeros(shape) + found[0]
    if len(found) > 1:
        plane += found[1] * along_x[:, 1] + found[2] * along_y[:, 2, None]
    return _Field(np.where(field.weights > 0, field.data - plane, 0.0), field.weights)
