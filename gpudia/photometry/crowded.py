"""Photometry of a frame itself, all stars at once: those that overlap do not count each other's light."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, cg
from scipy.spatial import cKDTree

from gpudia.errors import InputError
from gpudia.flags import PIXEL_FLAGS
from gpudia.photometry.apertures import aperture_weights
from gpudia.photometry.companions import find_companions
from gpudia.photometry.forced import measure_apertures, psf_photometry
from gpudia.photometry.inputs import as_positions, check_fraction, check_plane, pixel_bits
from gpudia.photometry.psf import check_psf, shifted_psf
from gpudia.photometry.psf_model import Psf
from gpudia.photometry.stamps import FloatArray, ForcedFluxes, Stamps

__all__ = ["CrowdedFluxes", "Scene", "crowded_photometry", "first_of_place"]

#: Share of a star's weight, sum of phi^2, on good pixels below which it takes no part in the fit.
_SEEN = 0.05
#: Neighbours whose overlap phi_s W phi_j, in terms of the two stars' own, is above this share their noise with a star.
_OVERLAP = 0.01
#: Most members of such a group, and the least share of a flux's variance that two stars at one place leave it.
_MOST, _SINGULAR = 40, 1e-9
#: Searches for stars that the list lacks, each on what those before left.
_SEARCHES = 2
#: Of the solution: most steps, and the residual over the right side.
_STEPS, _ACCURACY = 500, 1e-9


class CrowdedFluxes(NamedTuple):
    """Fluxes of S stars on one frame, each without its neighbours' light.

    Attributes
    ----------
    psf : ForcedFluxes
        Of the simultaneous fit.
    aperture : ForcedFluxes
        Sums in apertures after the neighbours' models are taken away, as total fluxes.
    model : (H, W) float64
        All stars, ADU.
    """

    psf: ForcedFluxes
    aperture: ForcedFluxes
    model: FloatArray


@dataclass(frozen=True)
class Scene:
    """Stars on a frame, as one linear model of its pixels.

    Parameters
    ----------
    stamps : Stamps
        Where the stars lie.
    phi : (S, m, m)
        PSF of each star at its place within the pixel.
    shape : (H, W)
    """

    stamps: Stamps
    phi: FloatArray
    shape: tuple[int, int]

    @classmethod
    def of(cls, positions: FloatArray, psf: FloatArray, shape: tuple[int, ...]) -> Scene:
        """Place centred PSFs (m, m) or (S, m, m) at positions (S, 2)."""
        stamps = Stamps(positions, psf.shape[-1])
        return cls(stamps, shifted_psf(psf, stamps.offsets), (shape[0], shape[1]))

    @cached_property
    def matrix(self) -> sparse.csr_array:
        """PSFs as rows over the frame's pixels, (S, H W)."""
        return rows_on_frame(self.phi, self.stamps, self.shape)

    def paint(self, fluxes: FloatArray) -> FloatArray:
        """Frame of all stars, (H, W)."""
        return np.asarray(self.matrix.T @ fluxes).reshape(self.shape)

    def solve(self, image: FloatArray, weights: FloatArray, start: FloatArray | None = None) -> FloatArray:
        r"""Least-squares fluxes of all stars: :math:`A W A^T f = A W d`, by conjugate gradients.

        A star of which less than 5 % is on pixels with a weight above 0 gets the flux 0.
        """
        information = self.information(weights)
        known = information > 0
        if not known.any():
            return np.zeros(len(known))
        rows, w = self.seen, weights.ravel()[self.pixels]
        right = rows @ (w * np.where(w > 0, image.ravel()[self.pixels], 0.0))
        n, diagonal, columns = len(known), np.where(known, information, 1.0), rows.T.tocsr()

        def normal(f: FloatArray) -> FloatArray:
            return np.where(known, rows @ (w * (columns @ np.where(known, f, 0.0))), f)

        found, _ = cg(LinearOperator((n, n), matvec=normal, dtype=float), np.where(known, right, 0.0),
                      x0=None if start is None else np.where(known, start, 0.0), rtol=_ACCURACY, maxiter=_STEPS,
                      M=LinearOperator((n, n), matvec=lambda f: f / diagonal, dtype=float))
        return np.asarray(found)

    @cached_property
    def pixels(self) -> NDArray[np.intp]:
        """Pixels of the frame that some star reaches, as indices of the flattened frame."""
        reached = np.zeros(self.shape[0] * self.shape[1], bool)
        reached[self.matrix.indices] = True
        return np.flatnonzero(reached)

    @cached_property
    def seen(self) -> sparse.csr_array:
        """The rows of `matrix` over `pixels` only."""
        number = np.zeros(self.shape[0] * self.shape[1], np.int64)
        number[self.pixels] = np.arange(len(self.pixels))
        return sparse.csr_array((self.matrix.data, number[self.matrix.indices], self.matrix.indptr),
                                shape=(self.matrix.shape[0], len(self.pixels)))

    def information(self, weights: FloatArray) -> FloatArray:
        """Sum of w phi^2, (S,); 0 for a star that is hardly seen."""
        w, squares = weights.ravel()[self.pixels], self.seen.power(2)
        enough = squares @ (w > 0).astype(float) >= _SEEN * (self.phi**2).sum(axis=(1, 2))
        return np.where(enough, squares @ w, 0.0)


def rows_on_frame(values: FloatArray, stamps: Stamps, shape: tuple[int, int]) -> sparse.csr_array:
    """Stamps (S, m, m) as rows over the pixels of a frame, (S, H W); what lies outside of it is left out."""
    x, y = (np.broadcast_to(c, values.shape) for c in (
        stamps.coordinates()[0][:, None, :], stamps.coordinates()[1][:, :, None]))
    inside = (x >= 0) & (x < shape[1]) & (y >= 0) & (y < shape[0]) & (values != 0)
    star = np.broadcast_to(np.arange(len(values))[:, None, None], values.shape)[inside]
    return sparse.csr_array((values[inside], (star, y[inside] * shape[1] + x[inside])),
                            shape=(len(values), shape[0] * shape[1]))


def crowded_photometry(image: NDArray[Any], variance: NDArray[Any], mask: NDArray[Any] | None, positions: Any,
                       psf: Psf | Any, radius: float, *, one_place: float = 0.5,
                       search: bool = False, max_masked_fraction: float = 0.2) -> CrowdedFluxes:
    r"""Measure all stars of a frame at the same time, at fixed positions.

    .. math:: (\Phi W \Phi^T) f = \Phi W D, \qquad W = 1 / variance

    with the rows of Phi the PSFs at the stars' places. A star that is alone gets what `psf_photometry` gives it. An
    aperture holds f + (sum of the residual in it) / (share of the star's light in it) without the neighbours.

    Errors are those of the joint fit, for a star and up to 40 neighbours that overlap with it most; farther ones count
    as known. For an aperture with weights a: :math:`a V a - 2 t G b + t G t`, G the inverse of the group's normal
    matrix, b the light of its members in the aperture, t the same without the star's own. Errors of the PSF and stars
    that are not in the list are not in it.

    Parameters
    ----------
    image, variance : (H, W)
        Without its background, ADU, and ADU^2.
    mask : (H, W) bool or bits of `gpudia.flags.PIXEL_FLAGS`, optional
        As in `psf_photometry`. The unmasked rest of a saturated star tells what it adds to its neighbours.
    positions : (S, 2)
        All stars (x, y) that are known. One that is not finite gets NaN.
    psf : Psf, (m, m) or (S, m, m)
    radius : float
        Of the apertures, pixels.
    one_place : float
        An entry that is nearer than this to an earlier one, pixels, is the same star and gets its fluxes: the fit
        cannot tell them apart.
    search : bool
        Whether to look for stars that the list lacks beside those in it, above 5 sigma on what these leave, and to fit
        them as well.
    max_masked_fraction : float
        As in `psf_photometry` and `measure_apertures`.

    Returns
    -------
    CrowdedFluxes

    Raises
    ------
    InputError
        Shapes do not agree, or `radius`, `one_place` or `max_masked_fraction` is out of range.
    """
    image = check_plane("image", image)
    variance = check_plane("variance", variance, image.shape)
    mask = None if mask is None else pixel_bits(check_plane("mask", mask, image.shape))
    check_fraction(max_masked_fraction)
    if not 0 <= one_place < np.inf:
        raise InputError(f"one_place must be finite and at least 0, got {one_place}")
    where = as_positions(positions)
    each = psf.at(where) if isinstance(psf, Psf) else check_psf(psf)
    if each.ndim == 3 and len(each) != len(where):
        raise InputError(f"psf must be one for all stars or one for each of {len(where)}, got {len(each)}")
    first, weights = first_of_place(where, one_place), _weights(image, variance, mask)
    own = np.flatnonzero(first == np.arange(len(where)))
    each = each[own] if each.ndim == 3 else each
    scene = Scene.of(where[own], each, image.shape)
    flux = scene.solve(image, weights)
    if search and len(own):
        scene, flux = _with_companions(scene, each, flux, image, weights)
    model = scene.paint(flux)
    groups = _Groups(scene, weights)
    alone = psf_photometry(image, variance, mask, where[own], each, max_masked_fraction=max_masked_fraction)
    flux = flux[:len(own)]
    fitted = _joined(alone, np.where(np.isfinite(alone.flux), flux, np.nan), groups.psf_errors()[:len(own)])
    left = measure_apertures(image - model, variance, mask, where[own], radius, psf=each,
                             max_masked_fraction=max_masked_fraction)
    summed = _joined(left, flux + left.flux, groups.aperture_errors(radius, left.error))
    back = np.searchsorted(own, first)
    return CrowdedFluxes(_taken(fitted, back), _taken(summed, back), model)


def _with_companions(scene: Scene, psf: FloatArray, flux: FloatArray, image: FloatArray,
                     weights: FloatArray) -> tuple[Scene, FloatArray]:
    """Add the stars that the list lacks, with the PSF of the nearest one that it has."""
    stars, good = scene.stamps.positions, np.flatnonzero(scene.information(weights) > 0)
    for _ in range(_SEARCHES):
        residual = np.where(weights > 0, image - scene.paint(flux), 0.0)
        mean = psf if psf.ndim == 2 else psf[:len(stars)].mean(axis=0)
        places, light, _ = find_companions(residual, weights, mean, stars[good], flux[good], scene.stamps.positions[
            np.isfinite(scene.stamps.positions).all(axis=1)], _width(mean))
        if not len(places):
            break
        if psf.ndim == 3:
            psf = np.concatenate([psf, psf[good[cKDTree(stars[good]).query(places)[1]]]])
        scene = Scene.of(np.concatenate([scene.stamps.positions, places]), psf, scene.shape)
        flux = scene.solve(image, weights, np.concatenate([flux, light]))
    return scene, flux


def _width(psf: FloatArray) -> float:
    """FWHM of a PSF, from the number of pixels above half its peak."""
    return float(np.sqrt(4 / np.pi * (psf > psf.max() / 2).sum()))


def _joined(before: ForcedFluxes, flux: FloatArray, error: FloatArray) -> ForcedFluxes:
    return before._replace(flux=flux, error=np.where(np.isfinite(flux), error, np.nan))


def _taken(fluxes: ForcedFluxes, rows: NDArray[np.intp]) -> ForcedFluxes:
    return ForcedFluxes(*(column[rows] for column in fluxes))


def first_of_place(where: FloatArray, distance: float) -> NDArray[np.intp]:
    """Row of the entry that stands for each one: itself, or an earlier one that is at its place."""
    first = np.arange(len(where))
    known = np.flatnonzero(np.isfinite(where).all(axis=1))
    for i, j in sorted(cKDTree(where[known]).query_pairs(distance)) if len(known) else ():
        a, b = known[i], known[j]
        if first[a] == a and first[b] == b:
            first[b] = a
    return first


def _weights(image: NDArray[Any], variance: NDArray[Any], mask: NDArray[np.uint8] | None) -> FloatArray:
    """1 / variance, 0 on pixels that are ignored."""
    good = np.isfinite(image) & np.isfinite(variance) & (variance > 0)
    if mask is not None:
        good &= mask & (255 - PIXEL_FLAGS.clipped) == 0
    return np.where(good, 1 / np.where(good, variance, 1.0), 0.0).astype(float)


class _Groups:
    """Each star with those that overlap with it, for the errors."""

    def __init__(self, scene: Scene, weights: FloatArray) -> None:
        self._scene, self._weights = scene, weights
        self._information = scene.information(weights)
        seen = self._information > 0
        scaled = scene.seen.multiply((np.sqrt(weights.ravel()[scene.pixels]))[None, :]).tocsr()
        self._normal = (scaled @ scaled.T).tocsr()
        self._members = [self._of(star) if seen[star] else np.empty(0, int) for star in range(len(seen))]

    def _of(self, star: int) -> NDArray[np.int64]:
        """Members of a star's group, itself first."""
        start, end = self._normal.indptr[star:star + 2]
        others, overlap = self._normal.indices[start:end], self._normal.data[start:end]
        there = (self._information[others] > 0) & (others != star)
        others, overlap = others[there], np.abs(overlap[there])
        overlap = overlap / np.sqrt(self._information[others] * self._information[star])
        order = np.argsort(-overlap)[:_MOST - 1]
        return np.concatenate([[star], others[order][overlap[order] > _OVERLAP]]).astype(np.int64)

    def _inverse(self, members: NDArray[np.int64]) -> FloatArray:
        """Covariance of the members' fluxes; near-singular groups get huge, never negative variances."""
        scale = 1 / np.sqrt(self._information[members])
        block = self._normal[members][:, members].toarray() * scale * scale[:, None]
        return np.linalg.inv(block + _SINGULAR * np.eye(len(block))) * scale * scale[:, None]

    def psf_errors(self) -> FloatArray:
        """Errors of the joint fit, (S,); NaN for stars that are not seen."""
        found = np.full(len(self._members), np.nan)
        for star, members in enumerate(self._members):
            if len(members):
                found[star] = np.sqrt(self._inverse(members)[0, 0])
        return found

    def aperture_errors(self, radius: float, alone: FloatArray) -> FloatArray:
        """Errors of aperture sums without the neighbours, from those of the sums themselves, (S,)."""
        scene, good = self._scene, (self._weights > 0).ravel().astype(float)
        inside, stamps = aperture_weights(scene.stamps.positions[:len(alone)], radius)
        rows = rows_on_frame(inside, stamps, scene.shape).multiply(good[None, :]).tocsr()
        light = (rows @ scene.matrix.T).tocsr()
        found = alone.copy()
        for star, members in enumerate(self._members[:len(alone)]):
            if len(members) > 1 and np.isfinite(alone[star]):
                b = light[[star]][:, members].toarray()[0]
                b, t = b / b[0], b / b[0]
                t[0] = 0.0
                change = t @ self._inverse(members) @ (t - 2 * b)
                found[star] = np.sqrt(max(alone[star] ** 2 + change, 0.0))
        return found
