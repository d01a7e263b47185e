"""Small pictures of the epochs: reference, image and difference around the target, and the kernels."""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray
from PIL import Image

from gpudia.flags import PIXEL_FLAGS
from gpudia.report.data import UNREADABLE, Curve, Epoch, FloatArray, RunData

__all__ = ["CLIP_SIGMA", "Stamp", "choose_epochs", "encode_png", "gray_picture", "kernel_picture", "make_stamps",
           "side_by_side", "sigma_picture"]

log = logging.getLogger(__name__)

CLIP_SIGMA = 5.0
MAX_EPOCHS = 48
_SIDE = 61
_GAP = 2
_LEVELS = 62
_MASKED = np.array([112, 124, 146, 255], dtype=np.uint8)

Picture = NDArray[np.uint8]
Window = tuple[slice, slice]


@dataclass(frozen=True)
class Stamp:
    """Pictures of one epoch, y upwards.

    `strip` is RGBA (h, 3 w + 2 gap, 4): reference, image, difference in sigma; `marks` the target's place on each of
    the three as fractions (from the left, from the top), empty when the target's position is not known; `kernel` is
    (K, K) or None.
    """

    epoch: Epoch
    strip: Picture
    marks: list[tuple[float, float]]
    kernel: FloatArray | None


def choose_epochs(epochs: list[Epoch], target: Curve | None = None, limit: int = MAX_EPOCHS) -> list[Epoch]:
    """Choose at most `limit` epochs that have a difference image, in their order.

    When there are more: the first and the last, a quarter of those in which the target differs most from the reference
    (in sigma), a quarter of those whose chi^2 is farthest from 1, and the others spread over the series.
    """
    shown = [e for e in epochs if e.difference is not None]
    if len(shown) <= limit:
        return shown
    peak = _significance(target)
    kept = {shown[0].index, shown[-1].index}
    for worth in (lambda e: peak.get(e.name, 0.0), _badness):
        kept |= {e.index for e in sorted(shown, key=worth, reverse=True)[: limit // 4] if worth(e) > 0}
    rest = [e for e in shown if e.index not in kept]
    spread = np.linspace(0, len(rest) - 1, limit - len(kept)).round().astype(int)
    kept |= {rest[k].index for k in spread}
    return [e for e in shown if e.index in kept]


def _badness(epoch: Epoch) -> float:
    chi2 = epoch["chi2"]
    return abs(np.log(chi2)) if np.isfinite(chi2) and chi2 > 0 else np.inf


def _significance(target: Curve | None) -> dict[str, float]:
    """How far the target's difference is from 0, in sigma, by the names of the images."""
    if target is None:
        return {}
    with np.errstate(divide="ignore", invalid="ignore"):
        sigma = np.nan_to_num(np.abs(target.flux_diff / target.flux_diff_err), posinf=0.0)
    return dict(zip(target.names, sigma.tolist(), strict=True))


def make_stamps(run: RunData, epochs: list[Epoch]) -> list[Stamp]:
    """Cut and draw the stamps of `epochs`; an unreadable difference file is logged and left out."""
    stamps = []
    for epoch in epochs:
        try:
            stamps.append(_make_stamp(run, epoch))
        except UNREADABLE as error:
            log.warning("report: stamps of %s left out: %s", epoch.name, error)
    return stamps


def _make_stamp(run: RunData, epoch: Epoch) -> Stamp:
    with fits.open(epoch.difference, memmap=False) as hdus:
        shape = hdus["DIFF"].shape
        rows, columns = window = _window(shape, run.position)
        difference, model, error = (
            np.asarray(hdus[name].section[rows, columns], dtype=float) for name in ("DIFF", "MODEL", "ERR")
        )
        bits = np.asarray(hdus["MASK"].section[rows, columns]).astype(np.int64)
        kernel = _kernel(hdus["KERNEL"].data) if "KERNEL" in hdus else None
    # A clipped pixel was left out of the kernel fit but is measured: a variable star is made of them.
    masked = bits & ~PIXEL_FLAGS.clipped != 0
    with np.errstate(divide="ignore", invalid="ignore"):
        sigma = np.where(masked | ~(error > 0), np.nan, difference / error)
    panels = [
        gray_picture(_reference_panel(run, shape, window)),
        gray_picture(np.where(masked, np.nan, model + difference)),
        sigma_picture(sigma, CLIP_SIGMA),
    ]
    return Stamp(epoch, side_by_side(panels), _marks(run.position, shape, window), kernel)


def _kernel(data: NDArray[np.floating]) -> FloatArray:
    kernel = np.asarray(data, dtype=float)
    return kernel if kernel.ndim == 2 else kernel.reshape(-1, *kernel.shape[-2:])[0]


def _reference_panel(run: RunData, shape: tuple[int, ...], window: Window) -> FloatArray:
    if run.reference is not None and run.reference.shape == shape:
        return run.reference[window]
    return np.full([s.stop - s.start for s in window], np.nan)


def _inside(position: tuple[float, float] | None, shape: tuple[int, ...]) -> bool:
    return position is not None and -0.5 <= position[0] < shape[1] - 0.5 and -0.5 <= position[1] < shape[0] - 0.5


def _window(shape: tuple[int, ...], position: tuple[float, float] | None) -> Window:
    """A square around the position (else the centre), moved inwards at an edge."""
    x, y = position if position is not None and _inside(position, shape) else ((shape[1] - 1) / 2, (shape[0] - 1) / 2)
    slices = []
    for centre, length in ((y, shape[0]), (x, shape[1])):
        side = min(_SIDE, length)
        start = int(np.clip(round(centre) - side // 2, 0, length - side))
        slices.append(slice(start, start + side))
    return slices[0], slices[1]


def _marks(position: tuple[float, float] | None, shape: tuple[int, ...], window: Window) -> list[tuple[float, float]]:
    if position is None or not _inside(position, shape):
        return []
    rows, columns = window
    width, height = columns.stop - columns.start, rows.stop - rows.start
    total = 3 * width + 2 * _GAP
    top = 1 - (position[1] + 0.5 - rows.start) / height
    return [((i * (width + _GAP) + position[0] + 0.5 - columns.start) / total, top) for i in range(3)]


def side_by_side(panels: list[Picture]) -> Picture:
    """Join pictures of one height, y upwards."""
    gap = np.zeros((panels[0].shape[0], _GAP, 4), dtype=np.uint8)  # transparent: the page is light or dark
    return np.concatenate([part for panel in panels for part in (panel, gap)][:-1], axis=1)[::-1]


def gray_picture(values: FloatArray) -> Picture:
    """Inverse-free asinh stretch from just below the sky to the 99.7th percentile."""
    good = np.isfinite(values)
    if not good.any():
        return np.broadcast_to(_MASKED, (*values.shape, 4)).copy()
    low, sky, high = np.percentile(values[good], [2, 50, 99.7])
    soft = max(sky - low, (high - low) / 100, np.finfo(float).tiny)
    stretched = np.arcsinh((values - low) / soft) / np.arcsinh(max((high - low) / soft, 1e-6))
    return _paint(np.nan_to_num(np.clip(stretched, 0, 1)), good, "gray")


def sigma_picture(values: FloatArray, limit: float) -> Picture:
    """Blue to red from -limit to limit."""
    good = np.isfinite(values)
    return _paint(np.nan_to_num(np.clip(values / limit, -1, 1)) / 2 + 0.5, good, "RdBu_r")


def _paint(unit: FloatArray, good: NDArray[np.bool_], colormap: str) -> Picture:
    """Colours of numbers from 0 to 1, in so few levels that two colormaps fit into the palette of a PNG."""
    from matplotlib import colormaps

    picture = np.asarray(colormaps[colormap](np.rint(unit * _LEVELS) / _LEVELS, bytes=True)).copy()
    picture[~good] = _MASKED
    return picture


def kernel_picture(kernel: FloatArray) -> Picture:
    """Draw a kernel with its own largest absolute value as the end of the colour scale, y upwards."""
    finite = np.isfinite(kernel)
    peak = np.max(np.abs(kernel[finite]), initial=0.0)
    return sigma_picture(kernel, peak if peak > 0 else 1.0)[::-1]


def encode_png(picture: Picture) -> bytes:
    """Encode an RGBA picture (H, W, 4) as PNG, pixel by pixel; with a palette, where 256 colours are enough."""
    packed = np.ascontiguousarray(picture).view("<u4")[..., 0]
    colours, index = np.unique(packed, return_inverse=True)
    if len(colours) > 256:
        image = Image.fromarray(picture)
        transparency = None
    else:
        image = Image.fromarray(index.reshape(packed.shape).astype(np.uint8))
        rgba = colours.astype("<u4").view(np.uint8).reshape(-1, 4)
        image.putpalette(rgba[:, :3].tobytes())
        transparency = rgba[:, 3].tobytes()
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True, **({} if transparency is None else {"transparency": transparency}))
    return buffer.getvalue()
