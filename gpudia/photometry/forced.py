"""Forced photometry: PSF fluxes and aperture sums at given positions on stacks of difference images.

Stars are worked on in blocks; what the stars of a block have in common for all epochs (their places, the PSF moved to
them, the reference under them) is made once. All of it runs on the backend of the planes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpudia.backend import Backend, backend_of, to_device, to_host
from gpudia.errors import InputError
from gpudia.flags import PIXEL_FLAGS, SOURCE_FLAGS
from gpudia.photometry.apertures import stamp_side
from gpudia.photometry.blocks import Block, Epoch, Stars
from gpudia.photometry.inputs import as_positions, check_fraction, check_plane, check_radius, pixel_bits
from gpudia.photometry.leverage import Strong, put_right
from gpudia.photometry.linear import EpochNoise
from gpudia.photometry.stamps import ForcedFluxes, Stamps, StampsOn

__all__ = ["forced_photometry", "measure_apertures", "psf_photometry"]

#: Stars of which so much is kept at a time: positions, PSFs and the reference under them, some 25 kB a star,
#: more with large kernels, and that for each size of stamps: the fewer, the more sizes there are.
_STARS_AT_ONCE = 8192
#: Stars on stamps of a size of which what is ready is kept for the next stack, some 60 kB each.
_KEPT = 2048


def forced_photometry(difference: Any, variance: Any, flags: Any, positions: Any, psf: Any,
                      noises: Sequence[EpochNoise], *, radius: float | None,
                      stamp_size: int | Sequence[int] | None = None,
                      max_masked_fraction: float = 0.2,
                      ready: dict[Any, Block] | None = None) -> dict[str, ForcedFluxes]:
    r"""Measure PSF fluxes and aperture sums of all stars on all images of a stack.

    PSF fluxes and sums are f = a^T D with

    .. math:: a_{psf} = W q / q^T W \phi, \qquad a_{ap} = c / c^T \phi

    with the inverse variance W, the epoch's PSF :math:`\phi` at the star (the reference's, convolved with the kernel
    there, of sum 1), a smooth profile q of its shape (see `gpudia.photometry.psf.smooth_profile`; :math:`\phi` itself
    where that would cost 3 % of the information: the kernel's noise, in :math:`\phi` and in D, is then taken for light,
    0.1 % of the star's or less) and the share c of each pixel that lies in the circle; W and c are 0 where pixels are
    masked, so that both are total fluxes. Their variance is V_0 + g^T C g (see `LinearVariance`).

    Where `EpochNoise.fitted` says which pixels took part in the fit, the star's pull on its own model is put right. The
    fit takes a share :math:`h = u \, g^T C \, U^T W \phi` of a change of the star's flux for one of the kernel, with
    the share u of the star's weight that is on fitted pixels; and its noise follows that of these pixels. So

    .. math:: f = a^T D / (1 - h), \qquad Var(f) = (V_0 + \rho (1 - 2 u) \, g^T C g) / (1 - h)^2

    with :math:`\rho = V_0 / a^T W^{-1} a`: as far as sums are noisier than `variance` says, the coefficients are, too.

    Where chi^2 of the PSF's fit over the n pixels of 1 % of its peak or more exceeds n - 1 + 5 sqrt(2 (n - 1)), the
    variance of the PSF flux is raised by that ratio: noise alone does not explain what is left there. From twice that
    on the flux is flagged ``poor_fit``.

    Parameters
    ----------
    difference, variance : (B, H, W)
        Difference images, ADU, and their variance, ADU^2 (image and reference together); arrays of one backend. float32
        planes are worked on in float32 (fluxes to 1e-6, errors to 3e-3), others in float64.
    flags : (B, H, W) uint8
        Bits of `gpudia.flags.PIXEL_FLAGS`; any but "clipped" = ignore. So are pixels without a finite difference and a
        positive variance.
    positions : (S, 2)
        Stars (x, y), 0-based pixel centres; host side.
    psf : (m, m) or (S, m, m)
        PSF of the reference, for all stars or at each of them: odd-sized, centred, of sum 1; host side.
    noises : sequence of B EpochNoise
        With kernels, on the backend of the planes. Reference, its variance, support and polynomials are to be the same
        in all of them.
    radius : float or None
        Of the apertures, pixels; None: no apertures.
    stamp_size : int or sequence of B int, optional
        Odd side of the stamps on which all is done, pixels, of all images or each, at least what the aperture needs.
        Two FWHM on each side of the star hold all but 1e-3 of the information. By default as much as PSF and kernel
        together.
    max_masked_fraction : float
        Share of the star's weight (sum of phi^2; light in the aperture) that may be masked; above it the flux is NaN.
    ready : dict, optional
        Empty at first. What is made of the stars and the reference, a fifth of the work on 32 images, is kept there for
        the next stack with the same stars in the same order, PSF, radius, reference and covariance, unless that is more
        than some 200 MB.

    Returns
    -------
    dict
        ``{"psf": ForcedFluxes, "ap": ForcedFluxes}`` (or "psf" alone) of (B, S), on the host. NaN, with the flag
        ``outside``, where an edge cuts the star (with this flag alone, all pixels of the stamp counted as masked, where
        it cuts off the star's central pixel); with ``sets_kernel`` where h exceeds 0.98: the fit leaves nothing of what
        the star does; NaN too where the photometric scale is not positive at the star.

    Raises
    ------
    InputError
        Shapes, backends or numbers of stars and epochs do not agree; `radius` or `stamp_size` do not fit.
    """
    backend = backend_of(difference, variance, flags)
    if difference.ndim != 3 or tuple(variance.shape) != tuple(difference.shape) or flags.shape != difference.shape:
        raise InputError(f"difference, variance and flags must have one shape (B, H, W), got "
                         f"{tuple(difference.shape)}, {tuple(variance.shape)} and {tuple(flags.shape)}")
    if flags.dtype != backend.xp.uint8:
        raise InputError(f"flags must be uint8, bits of PIXEL_FLAGS, got {flags.dtype}")
    if len(noises) != len(difference) or any(noise.kernel is None for noise in noises):
        raise InputError(f"noises must be one for each of {len(difference)} images, each with a kernel, "
                         f"got {len(noises)}")
    shape = (int(difference.shape[1]), int(difference.shape[2]))
    stars = Stars(as_positions(positions), shape, backend, "f4" if difference.dtype == backend.xp.float32 else "f8",
                  psf=psf, convolved=True, radius=0.0 if radius is None else check_radius(radius, shape))
    limits = dict.fromkeys(("psf",) if radius is None else ("psf", "ap"), max_masked_fraction)
    if len(noises) == 0:
        empty = ForcedFluxes(*(np.empty((0, len(stars.positions)), kind) for kind in ("f8", "f8", "i4", "i4")))
        return dict.fromkeys(limits, empty)
    noises = backend.run_all(partial(_in_dtype, dtype=stars.dtype), noises)
    planes = [Epoch(difference[i], variance[i], flags[i], noise) for i, noise in enumerate(noises)]
    sizes = [stars.whole_size(noises[0])] if stamp_size is None else np.atleast_1d(stamp_size).tolist()
    if len(sizes) not in (1, len(planes)):
        raise InputError(f"stamp_size must be one number or one for each of {len(planes)} images, got {len(sizes)}")
    for size in set(sizes):
        _check_size(size, stars.radius)
    return _measured(stars, planes, limits, sizes * (len(planes) // len(sizes)), ready)


def psf_photometry(difference: NDArray[Any], variance: NDArray[Any], mask: NDArray[Any] | None, positions: Any,
                   psf: Any, noise: EpochNoise | None = None, *, max_masked_fraction: float = 0.2) -> ForcedFluxes:
    r"""Measure PSF fluxes on one difference image at fixed positions (forced photometry).

    .. math:: f = \sum w \phi D / \sum w \phi^2, \qquad w = 1 / variance

    with phi the PSF at the star's place within the pixel. Masked pixels have w = 0, which leaves the flux unbiased.
    The error is that of `linear_flux_variance` with a = w phi / sum(w phi^2).

    Parameters
    ----------
    difference, variance : (H, W)
        Difference image, ADU, and its variance, ADU^2 (image and reference together): the weights. Take the variance
        of a model: one made from the noisy pixels themselves biases the flux.
    mask : (H, W) bool or bits of `gpudia.flags.PIXEL_FLAGS`, optional
        True or any bit but "clipped" = ignore. Pixels without a finite difference and a positive variance are
        ignored as well.
    positions : (S, 2)
        Stars (x, y), 0-based pixel centres.
    psf : (m, m) or (S, m, m)
        PSF of the epoch, for all stars or at each of them: odd-sized, centred, of sum 1 (see `epoch_psf`).
    noise : EpochNoise, optional
        What the error is made of. Without it the pixels count as uncorrelated, with `variance`.
    max_masked_fraction : float
        Share of the star's weight, sum of phi^2, that may be masked; above it the flux is NaN.

    Returns
    -------
    ForcedFluxes
        ``masked_pixels`` and the like are raised by pixels where the PSF has 1 % of its peak or more.

    Raises
    ------
    InputError
        Shapes do not agree, or `max_masked_fraction` is not in 0 to 1 (1 excluded).
    """
    epoch, shape = _host_epoch(difference, variance, mask, noise)
    stars = Stars(as_positions(positions), shape, _host(), "f8", psf=psf)
    return _first(_measured(stars, [epoch], {"psf": max_masked_fraction}, [int(stars.psf.shape[-1])])["psf"])


def measure_apertures(difference: NDArray[Any], variance: NDArray[Any], mask: NDArray[Any] | None, positions: Any,
                      radius: float, noise: EpochNoise | None = None, *, psf: Any | None = None,
                      max_masked_fraction: float = 0.0) -> ForcedFluxes:
    """Sum one difference image in a circular aperture at each position.

    The weights are the fractions of the pixels that lie in the circle (exact overlap, by photutils), the error is that
    of `linear_flux_variance`. Without `psf` nothing is corrected for: divide by `aperture_correction` for total fluxes.

    Parameters
    ----------
    difference, variance : (H, W)
        Difference image, ADU, and its variance, ADU^2 (image and reference together).
    mask : (H, W) bool or bits of `gpudia.flags.PIXEL_FLAGS`, optional
        True or any bit but "clipped" = ignore. Pixels without a finite difference and a positive variance are
        ignored as well.
    positions : (S, 2)
        Stars (x, y), 0-based pixel centres.
    radius : float
        Pixels.
    noise : EpochNoise, optional
        What the error is made of. Without it the pixels count as uncorrelated, with `variance`.
    psf : (m, m) or (S, m, m), optional
        PSF of the epoch (see `gpudia.photometry.epoch_psf`): the sums are divided by the share of the light that falls
        on the unmasked pixels of the aperture, which makes them total fluxes.
    max_masked_fraction : float
        Share of the aperture (of the light in it, with `psf`) that may be masked. Without `psf` that light is left out,
        not made up for. By default a flux with any masked pixel is NaN: a part of an aperture is no flux.

    Returns
    -------
    ForcedFluxes

    Raises
    ------
    InputError
        Shapes do not agree, the radius is not positive or larger than the frame, or `max_masked_fraction` is not in
        0 to 1 (1 excluded).

    Examples
    --------
    >>> import numpy as np
    >>> frame = np.ones((40, 50))
    >>> result = measure_apertures(frame, frame, None, [(20.0, 15.3)], 5.0)
    >>> round(float(result.flux[0]), 6), int(result.flags[0])
    (78.539816, 0)
    """
    epoch, shape = _host_epoch(difference, variance, mask, noise)
    radius = check_radius(radius, shape)
    stars = Stars(as_positions(positions), shape, _host(), "f8", psf=psf, radius=radius)
    return _first(_measured(stars, [epoch], {"ap": max_masked_fraction}, [stamp_side(radius)])["ap"])


def _in_dtype(noise: EpochNoise, dtype: str) -> EpochNoise:
    """With the covariance, which all blocks of stars need, in the dtype of the work, if it is an array."""
    if not hasattr(noise.covariance, "astype"):
        return noise
    return replace(noise, covariance=noise.covariance.astype(dtype, copy=False))


def _host() -> Backend:
    """Return the backend of host arrays."""
    return backend_of(np.empty(0))


def _host_epoch(difference: Any, variance: Any, mask: Any, noise: EpochNoise | None) -> tuple[Epoch, tuple[int, int]]:
    """One image of host arrays, checked."""
    difference = check_plane("difference", difference)
    variance = check_plane("variance", variance, difference.shape)
    if noise is not None:
        check_plane("noise.image_variance", noise.image_variance, difference.shape)
    bits = None
    if mask is not None:
        mask = check_plane("mask", mask, difference.shape)
        bits = pixel_bits(mask)
    epoch = Epoch(difference.astype(float), variance.astype(float), bits, noise or EpochNoise(variance))
    return epoch, (int(difference.shape[0]), int(difference.shape[1]))


def _check_size(size: int, radius: float) -> None:
    if size % 2 == 0 or size < stamp_side(radius):
        raise InputError(f"stamp_size must be odd and at least {stamp_side(radius)} for a radius of {radius:g} px, "
                         f"got {size}")


def _first(fluxes: ForcedFluxes) -> ForcedFluxes:
    return ForcedFluxes(*(column[0] for column in fluxes))


def _measured(stars: Stars, epochs: Sequence[Epoch], limits: dict[str, float], sizes: Sequence[int],
              ready: dict[Any, Block] | None = None) -> dict[str, ForcedFluxes]:
    """Measure all stars on all images; `limits` names the measures, with the share that may be masked."""
    for limit in limits.values():
        check_fraction(limit)
    inside = _inside(stars, epochs)
    result = {name: _not_measured(inside.shape, sizes) for name in limits}
    some = np.flatnonzero(inside.any(axis=0))
    if some.size:
        ready = {} if ready is None or some.size * len(set(sizes)) > _KEPT else ready
        for name, fluxes in _found(stars[some], epochs, limits, sizes, ready).items():
            for column, values in zip(result[name], fluxes, strict=True):
                column[:, some] = np.where(inside[:, some], values, column[:, some])
    return result


def _inside(stars: Stars, epochs: Sequence[Epoch]) -> NDArray[np.bool_]:
    """Where there is a difference at the star's central pixel at all, (B, S); elsewhere an edge is too near."""
    backend = stars.backend
    centre = StampsOn(Stamps(stars.positions, 1), stars.shape, backend)
    no_bits = backend.xp.zeros(stars.shape, dtype=backend.xp.uint8)
    bits = [centre.gather(no_bits if epoch.flags is None else epoch.flags, outside=PIXEL_FLAGS.border)
            for epoch in epochs]
    return to_host(backend.xp.stack(bits))[:, :, 0, 0] & PIXEL_FLAGS.border == 0


def _not_measured(shape: tuple[int, int], sizes: Sequence[int]) -> ForcedFluxes:
    """Fluxes of stars beyond the edge."""
    masked = np.broadcast_to(np.array(sizes, np.int32)[:, None] ** 2, shape).copy()
    return ForcedFluxes(np.full(shape, np.nan), np.full(shape, np.nan),
                        np.full(shape, SOURCE_FLAGS.outside, np.int32), masked)


def _found(stars: Stars, epochs: Sequence[Epoch], limits: dict[str, float], sizes: Sequence[int],
           ready: dict[Any, Block]) -> dict[str, ForcedFluxes]:
    """Fluxes of all stars on stamps of the sizes of the images, (B, S)."""
    xp, backend, n = stars.backend.xp, stars.backend, len(stars.positions)
    found = {name: ForcedFluxes(*(xp.zeros((len(epochs), n), dtype=kind)
                                  for kind in (xp.float64, xp.float64, xp.int32, xp.int32))) for name in limits}
    strong: list[dict[int, tuple[NDArray[np.int64], Strong]]] = [{} for _ in epochs]

    def put(fluxes: dict[str, ForcedFluxes], i: int, which: Any) -> None:
        for name, part in fluxes.items():
            for column, values in zip(found[name], part, strict=True):
                column[i, which] = values

    def measure(task: tuple[slice, Block, int]) -> None:
        which, block, i = task
        fluxes, high, more = block.measure(epochs[i], limits)
        put(fluxes, i, which)
        if more is not None:
            strong[i][which.start] = which.start + high, more

    def again(i: int) -> None:
        """All of an image at once: their directions are corrected together."""
        numbers, some = zip(*(strong[i][start] for start in sorted(strong[i])), strict=True)
        put(put_right(xp, some, epochs[i].noise), i, to_device(np.concatenate(numbers), backend))

    wanted = sorted(set(sizes))
    at_once = max(1, _STARS_AT_ONCE // len(wanted))
    for start in range(0, n, at_once):
        stop = min(start + at_once, n)
        parts = [(size, which) for size in wanted for which in _parts(stars, start, stop, size, epochs[0])]
        blocks = _blocks([(size, stars[which]) for size, which in parts], epochs[0].noise, ready)
        backend.run_all(measure, [(which, block, i) for (size, which), block in zip(parts, blocks, strict=True)
                                  for i in range(len(epochs)) if sizes[i] == size])
    backend.run_all(again, [i for i in range(len(epochs)) if strong[i]])
    return {name: ForcedFluxes(*map(to_host, columns)) for name, columns in found.items()}


def _blocks(parts: Sequence[tuple[int, Stars]], noise: EpochNoise, ready: dict[Any, Block]) -> list[Block]:
    """Blocks of stars on stamps of some sizes; those that are not ready are made."""
    keys = [(size, stars.positions.tobytes()) for size, stars in parts]
    backend = parts[0][1].backend
    if any(key not in ready for key in keys) and sum(len(block.stars.positions) for block in ready.values()) > _KEPT:
        ready.clear()
    todo = {key: part for key, part in zip(keys, parts, strict=True) if key not in ready}
    made = backend.run_all(lambda part: Block(part[1], part[0], noise), todo.values())
    ready.update(zip(todo, made, strict=True))
    return [ready[key] for key in keys]


def _parts(stars: Stars, start: int, stop: int, size: int, epoch: Epoch) -> list[slice]:
    """Slices of the stars that are worked on together, on stamps of this size."""
    area = stars.transform_side(size, epoch.noise) ** 2
    step = max(1, stars.backend.least_pixels // area, stars.backend.at_once(200 * area))
    return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]
