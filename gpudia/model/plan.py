"""`ReferencePlan`: what all images against one reference share, made once and used for every batch."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from gpudia.backend import backend_of, or_in_halves, scalar
from gpudia.errors import InputError
from gpudia.model.assemble import StackBuilder
from gpudia.model.convolver import TileConvolver
from gpudia.model.correction import CovarianceCorrection
from gpudia.model.design import Design
from gpudia.model.fit import Fitter
from gpudia.model.given import GivenUnits
from gpudia.model.inputs import planes_of, uniform_stack
from gpudia.model.iterative import SharedPreconditioner
from gpudia.model.noise import ImageNoise
from gpudia.model.planes import SAMPLE, median_of, robust_sigma
from gpudia.model.polynomials import count_terms
from gpudia.model.reference import prepare_reference
from gpudia.model.reference_noise import ReferenceNoise
from gpudia.model.selection import PixelSelection
from gpudia.model.settings import check_settings, number
from gpudia.model.stack import DifferenceStack
from gpudia.model.support import check_kernel_size, kernel_support
from gpudia.model.tiles import choose_tiling

__all__ = ["ReferencePlan"]

#: Planes of float64 that the fit of one image holds at the same time, results aside (python bench/engine.py memory).
_WORK_PLANES = {"mixed": 10.0, "double": 15.0}
#: Preferred side of the tiles of which the most informative are chosen. Smaller ones hold as much information on fewer
#: pixels, but their margins and the last pass over all of them take longer: 160 px 1.2 s at 2048 px, 200 px 0.9 s.
_INFORMATIVE_SIDE = 200
#: Errors outside this range of the reference's scatter say "do not use"; their squares would not fit single precision.
_ERRORS = (1e-15, 1e15)
#: Bias of the photometric scale from which on only informative pixels are fitted.
_BIAS = 0.003


def _unit_of(reference: Any) -> float:
    """Power of two that brings the reference's scatter near 1.

    Single precision holds numbers of 1e-38 to 1e38, and squares of squares are formed: images in W/m^2 would not fit. A
    power of two changes no digit.
    """
    backend = backend_of(reference)
    data = reference.astype(backend.xp.float64)[None]
    sigma = scalar(robust_sigma(data, backend.xp.isfinite(data), SAMPLE)[0])
    return 2.0 ** -round(math.log2(sigma)) if math.isfinite(sigma) and sigma > 0 else 1.0


class ReferencePlan:
    """A reference made ready: its transform, polynomials, noise and shared normal matrix.

    The model of an image I is

        I(x) = sum_p p_p(x) (R (x) k_p)(x) + sum_q b_q p_q(x) + noise

    with a pixel-grid kernel [1]_, polynomials in coordinates scaled to -1 .. 1 [2]_, solved by weighted least squares.

    Parameters
    ----------
    reference : array (H, W), masked array, NDData or CCDData
        ADU. The plan lives on the backend of this array.
    kernel_size : int
        Side K of the kernel, odd, pixels.
    error : array (H, W), optional
        One sigma of the reference, ADU: its noise enters the variance through the kernel squared. Without it the
        reference counts as free of noise.
    mask : array (H, W), optional
        True (or non-zero) = ignore. Grown by the kernel.
    fit_mask : array (H, W), optional
        True = not to be used in the fit, but subtracted like the rest: known variable stars.
    spatial_degree : int
        Degree of the kernel's variation over the frame, 0 (constant) and up.
    background_degree : int or "auto"
        Degree of the background polynomial, 0 and up; "auto": 1, or the kernel's where that is higher. With a lower
        one than the kernel's the sky of the reference, times a photometric scale that varies, is part of the model:
        what the sky is then decides on the scale, and the equations are hundreds of times worse conditioned.
    scale_degree : int, optional
        Degree of the photometric scale's variation over the frame, `spatial_degree` or less: 0 where flat fields can be
        trusted and only the PSF varies. Default: `spatial_degree`.
    smoothness : float
        Regularisation: lambda of (U^T W U + lambda H) a = U^T W d, H the squared second differences of the kernel, in
        units of tr(U^T W U) / tr(H). A smooth kernel amplifies less noise where the reference holds little information,
        but does not follow sharp ones. The photometric scale is not drawn to any value: constant kernels cost nothing.
    support : {"square", "circle"} or bool array (K, K)
        Free pixels of the kernel: all, those within K/2 of its centre, or those of an array (see `choose_support`).
    gain, read_noise : float, optional
        e-/ADU and e- of the images; used for images that come without errors.
    pixels : {"auto", "all", "informative"}
        Which pixels enter the fit. "all": all good ones. "informative": the passes that make the weights are done on
        tiles of about 200 px that together carry half of the information on the kernel (the attribute `information` has
        the share), on the pixels in them that significant light of the reference can reach through the kernel; the last
        pass is done on all pixels, to a thousandth of the noise. On large frames that takes two thirds of the time.
        "auto": all, but where the reference's noise would bias the photometric scale by more than 0.3 % that way (see
        `scale_bias`) those that its light can reach, provided that there are two for each unknown: empty sky only adds
        noise to the equations. All pixels are subtracted in any case.
    passes : int
        Passes of weights and clipping: the first with weights from the smoothed image, the others from the model.
        Fewer are done when nothing changes any more.
    clip : float
        Pixels further than this many sigma from the model are left out of the fit, grown by one pixel; they are still
        subtracted. ``math.inf`` clips nothing.
    solver : {"auto", "direct", "iterative"}
        How the last pass is solved: "direct" sums the exact normal matrix and factorises it, "iterative" uses
        preconditioned conjugate gradients with FFTs. They agree to 1e-6 of the kernel's peak. "auto" is iterative,
        but direct where the exact covariance is asked for: that needs the matrix anyway. An iterative solve that does
        not converge is flagged and done directly.
    covariance : {"shared", "exact"}
        "exact" inverts each image's own normal matrix (always so with the direct solver); "shared" takes the shared
        matrix of the reference scaled by the weights, with the image's exact sum over the central kernel put in: many
        times faster; the errors of single kernel pixels are then estimates.
    precision : {"auto", "double", "mixed"}
        "mixed" does the products inside the conjugate gradients in float32 and corrects from outside in float64 until
        the float64 residual is as small as in "double". Kernels are the same to 1e-6 of their peak; with
        `correct_bias`, which builds on an earlier pass, to a few thousandths of their error (scales to 1e-7). "auto" is
        mixed where the reference's normal matrix is well enough conditioned (1e5). The attribute `precision` says which
        it is.
    correct_bias : bool
        Put right, from the second pass on, that the reference's noise makes the kernel too smooth and the scale too
        small (`gpudia.model.reference_noise`); not for images that share noise with the reference (chi^2 per pixel
        below 0.9 after the first pass). Fluxes need it: with single frames as reference it took up to 10 % off
        the scale. False minimises the scatter of the difference's pixels, which a kernel that is too smooth lowers by
        some per cent; that of fluxes it does not lower. Needs `error`, and two passes at least.
    rtol : float
        Accuracy of the iterative solution in units of the signal-to-noise ratio of all the data. With 5e-9 kernels were
        within 1e-7 of their peak of those solved directly, with 2e-8 within 2e-6 in an ill-conditioned case.
    max_iterations : int
        For one pass.

    Attributes
    ----------
    information : float
        Share of the information on the kernel, tr(U^T W U), that the tiles of the first passes carry.
    scale_bias : array ()
        Relative bias of the scale that the reference's noise would cause, to first order, for a kernel of one pixel and
        typical weights, were it not put right (from the second pass on; `gpudia.model.reference_noise`).

    Raises
    ------
    InputError
        If an argument breaks its rule.

    Notes
    -----
    Plans hold no state of the images: batches in any order give the same results.

    References
    ----------
    .. [1] Bramich 2008, MNRAS 386, L77
    .. [2] Bramich et al. 2013, MNRAS 428, 2275

    Examples
    --------
    >>> import numpy as np
    >>> from gpudia import ReferencePlan
    >>> reference = np.random.default_rng(1).normal(size=(60, 60))
    >>> stack = ReferencePlan(reference, 5, background_degree=0).subtract(2 * reference + 7)
    >>> print(round(float(stack.scale[0]), 6), round(float(stack.background[0, 0]), 6))
    2.0 7.0
    """

    def __init__(self, reference: Any, kernel_size: int, *, error: Any = None, mask: Any = None,
                 fit_mask: Any = None, spatial_degree: int = 0, background_degree: int | str = "auto",
                 scale_degree: int | None = None, smoothness: float = 0.0,
                 support: str | np.ndarray = "square", pixels: str = "auto", gain: float | None = None,
                 read_noise: float = 0.0, passes: int = 4, clip: float = 5.0, solver: str = "auto",
                 covariance: str = "shared", precision: str = "auto", correct_bias: bool = True, rtol: float = 5e-9,
                 max_iterations: int = 200) -> None:
        reference, error, mask = planes_of(reference, error, mask, "reference")
        if reference.ndim != 2:
            raise InputError(f"reference must have two axes (y, x), got shape {tuple(reference.shape)}")
        self.backend = backend_of(reference)
        self.shape = (int(reference.shape[0]), int(reference.shape[1]))
        self.kernel_size = check_kernel_size(kernel_size, self.shape)
        spatial_degree = number("spatial_degree", spatial_degree, 0, "an integer of 0 or more", integer=True)
        if isinstance(background_degree, str) and background_degree == "auto":
            background_degree = max(1, spatial_degree)
        sky_degree = number("background_degree", background_degree, 0, "an integer of 0 or more", integer=True)
        if scale_degree is None:
            scale_degree = spatial_degree
        scale_degree = number("scale_degree", scale_degree, 0, "an integer of 0 or more, or None", integer=True)
        if scale_degree > spatial_degree:
            raise InputError(f"scale_degree must be spatial_degree {spatial_degree} at most, got {scale_degree}")
        self._smoothness = number("smoothness", smoothness, 0, "0 or more")
        self.settings = check_settings(passes, clip, solver, covariance, correct_bias, rtol, max_iterations, gain,
                                       read_noise)
        if precision not in ("auto", "double", "mixed"):
            raise InputError(f"precision must be 'auto', 'double' or 'mixed', got {precision!r}")
        self.precision = precision
        self.support = kernel_support(self.kernel_size, support)
        unknowns = int(self.support.sum()) * count_terms(spatial_degree) + count_terms(sky_degree)
        if unknowns > self.shape[0] * self.shape[1]:
            raise InputError(f"spatial_degree must leave more pixels than unknowns, got {spatial_degree}: {unknowns} "
                             f"unknowns for {self.shape[0] * self.shape[1]} pixels")
        if pixels not in ("auto", "all", "informative"):
            raise InputError(f"pixels must be 'auto', 'all' or 'informative', got {pixels!r}")
        if pixels == "informative" and error is None:
            raise InputError("error must be given with pixels='informative', got None")
        self.pixels = pixels
        if fit_mask is not None and np.shape(fit_mask) != self.shape:
            raise InputError(f"fit_mask must have the shape of reference {self.shape}, got {np.shape(fit_mask)}")
        self._fit_mask = planes_of(reference, None, fit_mask)[2]
        self._unit = _unit_of(reference)
        self.reference = prepare_reference(reference, error, mask, self._unit)
        self._build(spatial_degree, sky_degree, scale_degree)

    def _build(self, spatial_degree: int, background_degree: int, scale_degree: int) -> None:
        prepared = self.reference
        model = (spatial_degree, background_degree, scale_degree, self._smoothness)
        side = _INFORMATIVE_SIDE if self.pixels == "informative" else self.backend.tile_side
        tiling = choose_tiling(self.shape, self.kernel_size, side)
        # Without its sky the reference is no multiple of the constant background: the equations stay well conditioned.
        # The background must have the kernel's terms for that; it is put right again in `GivenUnits`.
        sky = None
        if background_degree >= spatial_degree:
            sky = median_of(prepared.data[None], prepared.good[None], SAMPLE)[0]
            sky = self.backend.xp.where(sky == sky, sky, 0.0)
        self._data = prepared.data if sky is None else prepared.data - sky
        self._selection = PixelSelection(prepared, self._fit_mask, tiling, self.support)
        self.design = Design(self._data, tiling, self.support, *model)
        self.information, self._solver = 1.0, None
        informative = self._selection.informative() if self.pixels == "informative" else None
        if informative is not None and self.settings.passes > 1 and self._enough(informative):
            numbers, self.information = self._selection.best_tiles(self._data, informative)
            part = tiling.only(numbers)
            design = Design(self._data, part, self.support, *model)
            self._solver = self._fitter(design, part.chosen(informative))
            everywhere = self._selection.weights(self._selection.usable)
            shared = self._solver.preconditioner.on(self._base(self.design), everywhere)
            self.fitter = self._fitter(self.design, None, shared)
        else:
            self.fitter = self._unbiased()
        solver = self._solver or self.fitter
        self.precision = "mixed" if solver.settings.mixed else "double"
        self.given = GivenUnits(self.design, self._unit, sky, solver.preconditioner.matrix)
        self.scale_bias = self._scale_bias(solver)

    def _unbiased(self) -> Fitter:
        """Fitter of all pixels, or with pixels="auto" of the informative where all bias the scale."""
        fitter = self._fitter(self.design, self._selection.usable)
        if self.pixels == "auto" and abs(scalar(self._scale_bias(fitter))) > _BIAS:
            informative = self._selection.informative()
            if self._enough(informative):
                fitter = self._fitter(self.design, informative)
        return fitter

    def _enough(self, pixels: Any) -> bool:
        return bool(scalar(pixels.sum()) >= 2 * self.design.n_parameters)

    def _base(self, design: Design) -> Design:
        """Return the design with a constant kernel; where it varies with a constant background, too."""
        if not design.spatial_degree:
            return design
        return Design(self._data, design.tiling, self.support, 0, 0, smoothness=self._smoothness)

    def _shared(self, design: Design, pixels: Any, noise: ReferenceNoise | None) -> SharedPreconditioner:
        weights = design.tiling.split(self.reference.weights)
        weights = self.backend.xp.where(pixels, weights, 0.0)
        return SharedPreconditioner(design, self._base(design), weights, noise if self.settings.correct_bias else None)

    def _fitter(self, design: Design, pixels: Any, preconditioner: SharedPreconditioner | None = None) -> Fitter:
        xp, reference, noise, holes = self.backend.xp, self.reference, None, None
        if reference.variance is not None:
            noise = ReferenceNoise(reference.variance, design)
        if preconditioner is None:
            preconditioner = self._shared(design, pixels, noise)
        mixed = self.precision == "mixed" or (self.precision == "auto" and preconditioner.suits_single)
        dtype = xp.float32 if mixed else xp.float64
        if not scalar(reference.good.all()):
            holes = TileConvolver((~reference.good).astype(dtype), design.tiling)
        return Fitter(design, preconditioner, noise, holes, pixels, replace(self.settings, mixed=mixed))

    def _scale_bias(self, fitter: Fitter) -> Any:
        """Relative bias of the scale that the reference's noise causes, for a kernel of one pixel.

        To first order -L 1^T M e with the inverse M of the shared normal matrix, L = sum w sigma_R^2, which the noise
        adds to its diagonal, and the central pixel e. 0 where the reference's noise is not known.
        """
        m, shared = self.design.n_kernel, fitter.preconditioner
        if self.reference.variance is None:
            return self.backend.xp.zeros(())
        centre = int(self.support.ravel()[:self.kernel_size**2 // 2].sum())
        noise = (shared.weights * fitter.design.tiling.split(self.reference.variance)).sum()
        return -noise * shared.constant[:m, centre].sum()

    def subtract(self, images: Any, errors: Any = None, masks: Any = None, *,
                 keep: tuple[str, ...] = ()) -> DifferenceStack:
        """Solve kernel and background of every image and subtract.

        Parameters
        ----------
        images : array (B, H, W) or (H, W), or a list of images
            ADU, on the plan's backend. Integers, any byte order, masked arrays, NDData and CCDData are accepted.
        errors : array of the same shape, optional
            One sigma, ADU; pixels whose error is not finite, or not positive, are ignored. Without them the noise comes
            from the plan's gain and read noise, else from the residuals.
        masks : array of the same shape, optional
            True (or non-zero) = ignore.
        keep : tuple of str
            What to keep beside the usual: "covariance", "image_variance".

        Returns
        -------
        DifferenceStack

        Raises
        ------
        InputError
            If shapes or backends do not fit. An image that cannot be solved raises nothing: it has a `status`.
        """
        unknown = set(keep) - {"covariance", "image_variance"}
        if unknown:
            raise InputError(f"keep must hold 'covariance' and 'image_variance' only, got {sorted(unknown)}")
        images, errors, masks = uniform_stack(images, errors, masks, self.shape)
        if backend_of(images).name != self.backend.name:
            raise InputError(f"images must be on the plan's backend {self.backend.name}, got {backend_of(images).name}")
        if not self.given.fits_single:
            images = images.astype(self.backend.xp.float64)
        step = max(self.backend.at_once(self.bytes_per_image(keep)), self.backend.least_pixels // math.prod(self.shape))
        step = min(step, -(-len(images) // self.backend.workers)) or 1
        out = StackBuilder(self.design, images, keep)

        def subtract_group(group: slice) -> None:
            self._subtract_group(group, images[group], None if errors is None else errors[group],
                                 None if masks is None else masks[group], out)

        groups = [slice(start, min(start + step, len(images))) for start in range(0, len(images), step)]
        self.backend.run_all(lambda group: or_in_halves(subtract_group, group, self.backend), groups)
        return out.stack("exact" if self.settings.exact_covariance else "shared")

    def _subtract_group(self, group: slice, images: Any, errors: Any, masks: Any, out: StackBuilder) -> None:
        xp, tiling = self.backend.xp, self.design.tiling
        data = images.astype(xp.float64) * self._unit
        finite = xp.isfinite(data)
        good = finite if masks is None else finite & (masks == 0)
        if errors is not None:
            errors = errors.astype(xp.float64) * self._unit
            good = good & (errors > _ERRORS[0]) & (errors < _ERRORS[1])
            errors = xp.where(good, errors, 0.0)
        data = xp.where(good, data, 0.0)
        gain = None if self.settings.gain is None else self.settings.gain / self._unit
        noise = ImageNoise(data, good, errors, gain, self.settings.read_noise, tiling, self.fitter.inner.dtype)
        data, good_tiles = tiling.split(data), tiling.split(good)
        if self._solver is None:
            fit = self.fitter.fit(data, good_tiles & self._selection.usable, noise)
        else:
            part = self._solver.design.tiling
            near = self._solver.approach(part.chosen(data), part.chosen(good_tiles), noise.on(part))
            fit = self.fitter.complete(near, data, good_tiles & self._selection.usable, noise)
        fit = self.given.fit(fit)
        out.put(group, images, finite, good, fit)
        out.put_covariance(group, fit, self.given)

    def bytes_per_image(self, keep: tuple[str, ...] = ()) -> int:
        """Device memory that `subtract` needs for each image it works on at the same time, results in float64 included.

        Parameters
        ----------
        keep : tuple of str
            As `subtract` takes it.

        Returns
        -------
        int
            Bytes; within 20 % of what is measured (python bench/engine.py memory). The FFTs' work space, of a few
            tiles, comes from what is left.
        """
        planes = _WORK_PLANES[self.precision] + 3 + ("image_variance" in keep)
        matrices = 4 * self.settings.exact_covariance + ("covariance" in keep)
        return int((8 * planes + 1) * math.prod(self.shape)) + 8 * matrices * self.design.n_parameters**2

    @cached_property
    def fit_pixels(self) -> Any:
        """Pixels that may take part in the last pass of a fit, bool (H, W), on the plan's backend."""
        pixels = self._selection.usable if self.fitter.informative is None else self.fitter.informative
        return self.design.tiling.join(pixels, False)

    def weights_of(self, stack: DifferenceStack, image: int) -> Any:
        """Weights (H, W) float64, in the units of the fit, of an image in the last pass; 0 where it took no part."""
        xp = self.backend.xp
        variance = stack.variance[image].astype(xp.float64)
        used = self.fit_pixels & (stack.flags[image] == 0) & (variance > 0)
        return xp.where(used, 1.0 / (xp.where(used, variance, 1.0) * self.given.unit**2), 0.0)

    @cached_property
    def correction(self) -> CovarianceCorrection:
        """Corrects shared covariances for bright stars."""
        return CovarianceCorrection(self)
