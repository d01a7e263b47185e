"""One reference, one image: `gpudia subtract`."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gpudia.backend import active_backend
from gpudia.config import RunConfig
from gpudia.errors import ConfigError, FrameError
from gpudia.flags import FRAME_FLAGS, PIXEL_FLAGS
from gpudia.images import Frame
from gpudia.pipeline.looks import FrameStore, Look, take_look
from gpudia.pipeline.outputs import provenance, write_stack_image
from gpudia.pipeline.prepare import place_batch, prepare, subtracted
from gpudia.pipeline.reference import make_reference, provisional, settle_model
from gpudia.pipeline.registering import check_all, register_looks

__all__ = ["SubtractResult", "subtract_files"]


@dataclass(frozen=True)
class SubtractResult:
    """Numbers of one subtraction; `flags` are bits of `gpudia.flags.FRAME_FLAGS`."""

    output: Path
    kernel_size: int
    scale: float
    scale_error: float
    chi2: float
    n_pixels: int
    flags: int

    def summary(self) -> str:
        """Return a line for people."""
        names = ", ".join(FRAME_FLAGS.decode(self.flags)) or "none"
        return (f"{self.output}: scale {self.scale:.5f} +- {self.scale_error:.5f}, chi^2 per pixel {self.chi2:.3f} "
                f"over {self.n_pixels} pixels, kernel {self.kernel_size} px, flags: {names}")


class _Overrides(FrameStore):
    """Frames with an error and a mask from other files put in."""

    def __init__(self, config: RunConfig, image: Path, mask: Path | None, error: Path | None) -> None:
        super().__init__(config)
        self._image, self._mask, self._error = image, mask, error
        self._made: Frame | None = None

    def read(self, path: Path) -> Frame:
        if path != self._image or not (self._mask or self._error):
            return super().read(path)
        if self._made is None:
            self._made = _with_planes(super().read(path), self._mask, self._error)
        return self._made


def _plane(path: Path, shape: tuple[int, int], what: str) -> np.ndarray:
    from astropy.io import fits

    try:
        with fits.open(path, memmap=False) as hdus:
            data = next((np.array(h.data) for h in hdus if h.is_image and np.ndim(h.data) == 2), None)
    except (OSError, ValueError, TypeError) as error:  # astropy raises all of them for damaged files
        raise FrameError(f"{what} must be a FITS file that can be read ({error})", path) from error
    if data is None or data.shape != shape:
        raise FrameError(f"{what} must be an image of shape {shape}, got {None if data is None else data.shape}", path)
    return data


def _with_planes(frame: Frame, mask: Path | None, error: Path | None) -> Frame:
    bits, variance = frame.mask.copy(), frame.variance
    if mask is not None:
        bits[_plane(mask, frame.shape, "mask") != 0] |= PIXEL_FLAGS.bad
    if error is not None:
        sigma = _plane(error, frame.shape, "error").astype(frame.variance.dtype)
        good = np.isfinite(sigma) & (sigma > 0)
        bits[~good] |= PIXEL_FLAGS.no_data
        variance = np.where(good, sigma, 1.0).astype(frame.variance.dtype) ** 2
    return replace(frame, mask=bits, variance=variance)


def subtract_files(reference: str | Path, image: str | Path, output: str | Path, *, kernel_size: int | str = "auto",
                   spatial_degree: int | str = "auto", background_degree: int | str = "auto", align: bool = True,
                   correct_bias: bool = True, mask: str | Path | None = None, error: str | Path | None = None,
                   gain: float | None = None, saturation: float | None = None,
                   overwrite: bool = False) -> SubtractResult:
    """Subtract a reference file from an image file and write the difference.

    Parameters
    ----------
    reference, image : path
        FITS files of any layout that `gpudia.images.read_frame` reads.
    output : path
        File to write: DIFF, MODEL, ERR, MASK, KERNEL, BKG on the reference's grid.
    kernel_size : int or "auto"
        Odd, pixels; "auto" from the seeing of both.
    spatial_degree : int or "auto"
        "auto": 1 where the reference has stars enough for it, else 0.
    background_degree : int or "auto"
    align : bool
        Register the image with the reference by their stars; False where both are on one grid.
    correct_bias : bool
        Put right what the noise of the reference does to the kernel; see `gpudia.ReferencePlan`.
    mask, error : path, optional
        The image's mask (not 0 = ignore) and error (1 sigma, ADU), added to or instead of its own.
    gain, saturation : float, optional
        e-/ADU and ADU, instead of the headers'.
    overwrite : bool
        Replace an existing file.

    Returns
    -------
    SubtractResult

    Raises
    ------
    ConfigError
        If the output exists or a setting breaks its rule.
    FrameError
        If a file cannot be used or the image cannot be aligned or solved.
    """
    reference, image, output = (Path(os.path.expanduser(p)) for p in (reference, image, output))
    mask, error = (None if p is None else Path(os.path.expanduser(p)) for p in (mask, error))
    for path in (reference, image, mask, error):
        if path is not None and os.path.realpath(output) == os.path.realpath(path):
            raise ConfigError(f"output must be another file than the inputs, got {output}")
    if output.exists() and not overwrite:
        raise ConfigError(f"output must be a new file (or say overwrite), got {output}")
    config = RunConfig(frames=(str(image),), output=str(output), kernel_size=kernel_size, align=align, gain=gain,
                       correct_bias=correct_bias, spatial_degree=spatial_degree, background_degree=background_degree,
                       saturation=saturation)
    store = _Overrides(config, image, mask, error)
    looks = [_look(path, store, config) for path in (reference, image)]
    first = provisional(config)
    check_all(looks[1:], looks[0], first)
    register_looks(looks[1:], looks[0], first)
    if looks[1].reason:
        raise FrameError(looks[1].reason, image)
    backend = active_backend()
    made = make_reference(looks[0], store.whole(looks[0]), looks, first)
    prepared = prepare(store.whole(looks[1]), looks[1].registration, made.region, first)
    placed = place_batch([prepared], made.region.shape, backend)
    made = settle_model(made, config, placed)
    stack = subtracted(made.plan, placed).to_host()
    flags = int(stack.status[0]) | prepared.flags | looks[1].flags
    stack.require_solution(0)
    cards = provenance(backend.name, reference.name, {
        "IMAGE": (image.name, "the frame"), "KSIZE": (made.kernel_size, "[pix] side of the kernel"),
        "SCALE": (float(stack.scale[0]), "image flux over reference flux, at the centre"),
        "SCALEERR": (float(stack.scale_error[0]), "1 sigma of SCALE by noise"),
        "CHI2": (float(stack.chi2[0]), "chi^2 per degree of freedom of the fit"),
        "FLAGS": (flags, "bits of gpudia.flags.FRAME_FLAGS")})
    write_stack_image(output, stack, 0, placed.bits[0] | stack.flags[0], cards, made.cutout.wcs)
    return SubtractResult(output, made.kernel_size, float(stack.scale[0]), float(stack.scale_error[0]),
                          float(stack.chi2[0]), int(stack.n_pixels[0]), flags)


def _look(path: Path, store: FrameStore, config: RunConfig) -> Look:
    look = take_look(path, path.name, store, config)
    if look.reason:
        raise FrameError(look.reason, path)
    return look
