"""The four functions of the first interface, arrays in and arrays out, and the photometry of one difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from astropy.table import Table

from gpudia.backend import active_backend, backend_of, to_device
from gpudia.errors import InputError
from gpudia.images import Frame, detect_stars, frame_quality
from gpudia.model import DifferenceStack, check_kernel_size, evaluate_terms, subtract
from gpudia.model.inputs import planes_of
from gpudia.photometry import (
    EpochNoise,
    ForcedFluxes,
    aperture_photometry_table,
    choose_aperture_radius,
    measure_apertures,
)

__all__ = [
    "BACKGROUND_DEGREE",
    "DifferenceImage",
    "build_the_U_indexes",
    "build_the_U_matrix",
    "measure_stars",
    "reference_radius",
    "run_dia_photometry",
    "run_difference_image",
]

#: Degree of the differential background's polynomial.
BACKGROUND_DEGREE = 1


def build_the_U_indexes(reference_image: Any, kernel: Any) -> tuple[Any, Any]:
    """Index arrays that turn an image into the design matrix U of a convolution.

    Parameters
    ----------
    reference_image : array (H, W)
        Only its shape and backend count.
    kernel : int or array (K, K)
        Side K of the kernel, or the kernel itself; odd, at most the shorter side of the image.

    Returns
    -------
    indi, indj : integer arrays (n, K*K)
        Row and column of the pixel that each kernel pixel multiplies, on the image's backend; n = (H-K+1)(W-K+1) output
        pixels in row-major order, kernel pixels in row-major order. With ``U = image[indi, indj]``,
        ``U @ kernel.ravel()`` is the true convolution ``scipy.signal.convolve2d(image, kernel, "valid").ravel()``.

    Raises
    ------
    InputError
        The image is not two-dimensional, or the kernel not square, even or larger than the image.
    """
    image = planes_of(reference_image, name="reference_image")[0]
    if len(image.shape) != 2:
        raise InputError(f"reference_image must have two axes (y, x), got shape {tuple(image.shape)}")
    size = _side_of(kernel, min(image.shape))
    height, width = (n - size + 1 for n in image.shape)
    # a convolution runs backwards over the image: the first kernel pixel meets the last image pixel
    a, b = (v.ravel() for v in np.mgrid[size - 1:-1:-1, size - 1:-1:-1])
    y, x = (v.ravel() for v in np.mgrid[:height, :width])
    home = backend_of(image)
    return to_device(y[:, None] + a, home), to_device(x[:, None] + b, home)


def _side_of(kernel: Any, largest: int) -> int:
    shape = np.shape(kernel)
    if len(shape) not in (0, 2) or len(set(shape)) > 1:
        raise InputError(f"kernel must be an integer or square (K, K), got shape {shape}")
    size = shape[0] if shape else kernel
    if isinstance(size, bool) or int(size) != size or size % 2 == 0 or not 1 <= size <= largest:
        raise InputError(f"kernel must be odd and at most the image's shorter side ({largest} px), got {size}")
    return int(size)


def build_the_U_matrix(X: Any, K: Any) -> tuple[Any, Any, Any]:
    """Build the design matrix U of a convolution of the image X with a kernel of side K.

    It takes 8 (H-K+1)(W-K+1) K^2 bytes, and each index array as much: nothing else in this library needs it.

    Parameters
    ----------
    X : array (H, W)
    K : int or array (K, K)

    Returns
    -------
    U, indi, indj : arrays (n, K*K)
        ``U = X[indi, indj]``; see `build_the_U_indexes`.

    Raises
    ------
    InputError
        As in `build_the_U_indexes`.
    """
    indi, indj = build_the_U_indexes(X, K)
    return planes_of(X, name="X")[0][indi, indj], indi, indj


class DifferenceImage(NamedTuple):
    """What `run_difference_image` returns: arrays of the kind that went in.

    Attributes
    ----------
    dia_image, image_model : (H, W)
        I - M and M, ADU; NaN where the model is not defined (a border of K//2) or the image not finite. What masked
        reference pixels reach through the kernel is not to be relied on.
    kernel : (K, K)
        ``kernel[K//2, K//2]`` multiplies the reference pixel itself; its sum is the photometric scale.
    bkg_coeffs : (3,)
        Background, ADU: coefficients of 1, x, y with x and y running from -1 to 1 over the frame's columns and rows.
    kernel_errors : (K, K)
        One sigma of `kernel`. Its pixels are correlated: the error of their sum is not the root of summed squares.
    """

    dia_image: Any
    image_model: Any
    kernel: Any
    bkg_coeffs: Any
    kernel_errors: Any


def run_difference_image(reference_image: Any, aligned_image: Any, kernel_size: int, mask: Any = None,
                         error: Any = None, indi: Any = None, indj: Any = None) -> DifferenceImage:
    """Subtract a reference from an image on the same pixels: constant kernel, background of degree 1.

    Parameters
    ----------
    reference_image, aligned_image : arrays (H, W), masked arrays, NDData or CCDData
        ADU; of any real dtype and byte order. Masks and uncertainties that they carry are used.
    kernel_size : int
        K, odd, pixels.
    mask : array (H, W), optional
        Pixels of `aligned_image` to ignore, True = ignore. Nothing is fitted to them; they are subtracted all the same.
    error : array (H, W), optional
        One sigma of `aligned_image`, ADU. Without it all pixels weigh the same.
    indi, indj : integer arrays, optional
        As `build_the_U_indexes` gives them: accepted for compatibility, only their shape is checked.

    Returns
    -------
    DifferenceImage
        Weighted and clipped in several passes (see `gpudia.ReferencePlan`). NumPy arrays when NumPy arrays came in,
        wherever they were computed (`gpudia.use_backend`); arrays of a device when those came in.

    Raises
    ------
    InputError
        Shapes, backends or the kernel size do not fit.
    FrameError
        There is no solution: no good pixels, fewer than unknowns, or not finite.
    """
    base, base_error, base_mask = planes_of(reference_image, name="reference_image")
    image, error, mask = planes_of(aligned_image, error, mask, "aligned_image")
    if tuple(image.shape) != tuple(base.shape):
        raise InputError(f"aligned_image must have the shape of reference_image {tuple(base.shape)}, "
                         f"got {tuple(image.shape)}")
    kernel_size = check_kernel_size(kernel_size, (base.shape[0], base.shape[1]))
    _check_indexes(base.shape, kernel_size, indi, indj)
    given = (base, base_error, base_mask, image, error, mask)
    home = backend_of(*given)
    work = active_backend() if home.array_type is np.ndarray else home
    base, base_error, base_mask, image, error, mask = (None if a is None else to_device(a, work) for a in given)
    stack = subtract(base, image, error, mask, kernel_size=kernel_size, error=base_error, mask=base_mask,
                     background_degree=BACKGROUND_DEGREE, support="square", solver="direct")
    stack.require_solution(0)
    if home.array_type is np.ndarray:
        stack = stack.to_host()
    return DifferenceImage(stack.difference[0], stack.model[0], stack.kernel[0], stack.background[0],
                           stack.kernel_error[0])


def _check_indexes(shape: Sequence[int], kernel_size: int, *indexes: Any) -> None:
    expected = (math.prod(n - kernel_size + 1 for n in shape), kernel_size**2)
    for name, index in zip(("indi", "indj"), indexes, strict=True):
        if index is not None and tuple(np.shape(index)) != expected:
            raise InputError(f"{name} must have shape {expected}, got {tuple(np.shape(index))}")


def run_dia_photometry(image: Any, error: Any, positions: Any, radius: float) -> Table:
    """Sum a difference image in circular apertures: `gpudia.photometry.aperture_photometry_table`.

    Parameters
    ----------
    image : array (H, W)
        ADU.
    error : array (H, W), number or None
        One sigma, ADU; pixels count as uncorrelated. `DIAPhotometryAnalyst` states exact errors.
    positions : array (N, 2)
        (x, y), 0-based pixel centres.
    radius : float
        Pixels.

    Returns
    -------
    Table
        ``id, xcenter, ycenter, aperture_sum, aperture_sum_err, flags``.
    """
    return aperture_photometry_table(image, error, positions, radius)


def reference_radius(cutout: Frame) -> float:
    """Aperture radius, pixels: the FWHM measured on a frame, else its header's (arcsec, by the pixel scale), else 4."""
    measured = frame_quality(cutout, detect_stars(cutout)).fwhm
    return choose_aperture_radius(next(f for f in (measured, cutout.fwhm, 4.0) if math.isfinite(f) and f > 0))


def measure_stars(stack: DifferenceStack, bits: np.ndarray, reference: Frame, positions: np.ndarray, radius: float,
                  noise_ratio: np.ndarray | None) -> ForcedFluxes:
    """Sum the difference of one image (constant kernel) in apertures, with exact errors.

    Parameters
    ----------
    stack : DifferenceStack
        Of one image, host side, with covariance and image variance.
    bits : (H, W) uint8
        Pixel flags.
    reference : Frame
        On the same pixels.
    positions : (S, 2)
        (x, y), 0-based pixel centres.
    radius : float
        Pixels.
    noise_ratio : (H, W) or None
        Variance of sums over that of single pixels, for a resampled image: its pixels are correlated.
    """
    image_variance = stack.image_variance[0].astype(float)
    if noise_ratio is not None:
        image_variance = image_variance * noise_ratio
    shape = reference.shape
    noise = EpochNoise(
        image_variance, stack.kernel[0], reference.variance.astype(float),
        np.where(reference.mask != 0, np.nan, reference.data).astype(float), stack.covariance[0], stack.support,
        background_terms=lambda x, y: evaluate_terms(BACKGROUND_DEGREE, x, y, shape))
    return measure_apertures(stack.difference[0], stack.variance[0], bits, positions, radius, noise)
