"""From a frame and its registration to planes on the reference's grid, and onto the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpudia.backend import Backend, to_device, to_host
from gpudia.config import RunConfig
from gpudia.errors import FrameError
from gpudia.flags import FRAME_FLAGS, PIXEL_FLAGS
from gpudia.images import Frame, Region, Registration, cut
from gpudia.model import DifferenceStack, ReferencePlan, resample
from gpudia.pipeline.stages import stage

__all__ = [
    "Prepared",
    "PreparedBatch",
    "bytes_of_batch",
    "images_at_once",
    "in_batches",
    "place_batch",
    "prepare",
    "resampled",
    "subtracted",
]

#: Largest displacement over the region, pixels, that a kernel of this spatial degree absorbs. Beyond it the frame is
#: resampled. With degree 1 differences of shifted frames were as good as those of resampled ones up to 0.7 px, with
#: degree 2 up to 1.75 px, the largest tried (bench/geometry.py rotation; chi^2 and rms near bright stars).
_ABSORBED = {0: 0.1, 1: 0.6}
_ABSORBED_BY_HIGHER = 1.5
#: What no kernel absorbs: frames turned by 7 degrees came out with scales of 0.14 to 0.41 of the truth.
_HOPELESS = 3.0
#: An affine map does for a region where it is nearer than this to the registration, pixels.
_STRAIGHT = 0.05
#: Planes of float64 that an image takes on the device beside the fit: as uploaded and mapped, with a margin.
_INPUT_PLANES = 8
_MOST_IMAGES = 32
#: What a plan holds, as planes and matrices of float64, with a margin.
_PLAN_PLANES, _PLAN_MATRICES = 40, 6
#: Bytes of what the photometry keeps from batch to batch, at most.
_STARS_READY = 200 << 20
#: Pixels around the mapped region that the interpolation needs.
_MARGIN = 5


@dataclass(frozen=True)
class Prepared:
    """One frame cut for the solve, host side.

    `matrix` maps region pixels to those of `cutout`, as `gpudia.model.resample` takes it; None: they agree.
    """

    cutout: Frame
    matrix: np.ndarray | None
    interpolated: bool
    flags: int


@dataclass(frozen=True)
class PreparedBatch:
    """Planes (B, H, W) of some frames on the reference's grid, on the device.

    `noise_ratio` is None, or the variance of sums over the variance of single pixels (resampling correlates pixels).
    `bits` (B, H, W) are the pixel flags, host side.
    """

    data: Any
    error: Any
    mask: Any
    bits: np.ndarray
    noise_ratio: Any


def resampled(registration: Registration, region: Region, config: RunConfig) -> bool:
    """Whether a frame is to be interpolated: by the settings, or since no kernel absorbs what a shift leaves."""
    return _interpolated(registration.displacement(region, registration.orientation()), config)


def _interpolated(left: float, config: RunConfig) -> bool:
    """Whether a frame of which a shift leaves so many pixels is to be interpolated."""
    return left > _absorbed(config) if config.resample == "auto" else config.resample == "always"


def _absorbed(config: RunConfig) -> float:
    return _ABSORBED.get(config.spatial_degree, _ABSORBED_BY_HIGHER)


def prepare(frame: Frame | Callable[[Region], Frame], registration: Registration, region: Region,
            config: RunConfig) -> Prepared:
    """Cut a frame to the reference's region, by a whole-pixel shift (turned or mirrored if need be) where that does.

    The frame may be a function of the region (full-frame coordinates) that is needed of it.

    Raises
    ------
    FrameError
        If less than a tenth of the region lies on good pixels of the frame, or the settings forbid to resample one that
        no kernel can match without.
    """
    centre = np.array(region.centre)
    turn = registration.orientation()
    left = registration.displacement(region, turn)
    interpolate = _interpolated(left, config)
    flags = FRAME_FLAGS.resampled if interpolate else 0
    if not interpolate and left > _absorbed(config):
        if left > _HOPELESS:
            raise FrameError(f"displacement that a shift leaves must be at most {_HOPELESS:g} px with resample "
                             f"'never', got {left:.1f} px over the region")
        flags = FRAME_FLAGS.poor_registration
    if not interpolate and (turn == np.eye(2)).all():
        cutout = _cut(frame, region.shifted(*registration.shift_at(*region.centre)))
        return _checked(Prepared(cutout, None, False, cutout.flags | flags), region)
    matrix, deviation = registration.local(region) if interpolate else (_whole_pixels(registration, turn, centre), 0.0)
    part = _bounding_region(matrix, region, _MARGIN + math.ceil(deviation))
    cutout = _cut(frame, part)
    if deviation > _STRAIGHT:
        inner = registration.coefficients(region)
        inner[:, 2] -= part.origin
    else:
        inner = np.column_stack([matrix[:, :2], matrix[:, :2] @ region.origin + matrix[:, 2] - part.origin])
    return _checked(Prepared(cutout, inner, interpolate, cutout.flags | flags), region)


def _cut(frame: Frame | Callable[[Region], Frame], region: Region) -> Frame:
    found = frame if isinstance(frame, Frame) else frame(region)
    return cut(found, region.shifted(-found.origin[0], -found.origin[1]))


def _whole_pixels(registration: Registration, turn: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Quarter turn or mirror, and the whole-pixel shift that is nearest at the centre."""
    shift = registration.apply(centre) - turn @ centre
    return np.column_stack([turn, np.floor(shift + 0.5)]).astype(float)


def _bounding_region(matrix: np.ndarray, region: Region, margin: int) -> Region:
    corners = region.corners @ matrix[:, :2].T + matrix[:, 2]
    low = np.floor(corners.min(axis=0)).astype(int) - margin
    high = np.ceil(corners.max(axis=0)).astype(int) + margin
    return Region(int(low[0]), int(low[1]), (int(high[1] - low[1] + 1), int(high[0] - low[0] + 1)))


def _checked(prepared: Prepared, region: Region) -> Prepared:
    good = float((prepared.cutout.mask == 0).sum())
    area = 1.0 if prepared.matrix is None else abs(float(np.linalg.det(prepared.matrix[:, :2])))  # of a pixel
    share = good / (region.shape[0] * region.shape[1] * area)
    if share < 0.1:
        raise FrameError(f"good pixels must cover at least 10 % of the region, got {100 * share:.1f} %")
    return prepared


def images_at_once(plan: ReferencePlan, config: RunConfig, backend: Backend, keep: tuple[str, ...] = ()) -> int:
    """Frames of a batch: as many as the device holds from upload to download, with what `subtract` is to keep."""
    if config.batch_size != "auto":
        return int(config.batch_size)
    return int(min(max(1, backend.free_bytes() // 2 // _bytes_per_image(plan, keep)), _MOST_IMAGES))


def bytes_of_batch(plan: ReferencePlan, images: int, keep: tuple[str, ...] = ()) -> int:
    """Memory of a process that works on a batch of so many frames, its plan included."""
    held = _PLAN_PLANES * math.prod(plan.shape) + _PLAN_MATRICES * plan.design.n_parameters**2
    return images * _bytes_per_image(plan, keep) + 8 * held + _STARS_READY


def _bytes_per_image(plan: ReferencePlan, keep: tuple[str, ...]) -> int:
    return plan.bytes_per_image(keep) + 8 * _INPUT_PLANES * math.prod(plan.shape)


def in_batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Split into parts of a size."""
    for start in range(0, len(items), size):
        yield list(items[start:start + size])


def place_batch(batch: Sequence[Prepared], shape: tuple[int, int], backend: Backend) -> PreparedBatch:
    """Upload some frames, and map those onto the reference's grid that need more than a shift.

    Frames that are only shifted go up in one copy per plane for the whole batch.
    """
    xp = backend.xp
    shifted = {i: p.cutout for i, p in enumerate(batch) if p.matrix is None}
    kind = np.result_type(np.float32, *(cutout.variance.dtype for cutout in shifted.values()))
    host = [np.zeros((len(batch), *shape), dtype=dtype) for dtype in (np.float32, kind, np.uint8)]
    for i, cutout in shifted.items():
        for plane, values in zip(host, (cutout.data, cutout.variance, cutout.mask), strict=True):
            plane[i] = values
    data, variance, bits = (to_device(plane, backend) for plane in host)
    error, ratio = xp.sqrt(variance, dtype=xp.float64), None
    with stage("prepare"):
        for i, prepared in enumerate(batch):
            if i in shifted:
                continue
            data[i], variance, bits[i], own = _mapped(prepared, shape, backend)
            error[i] = xp.sqrt(variance)
            host[2][i] = to_host(bits[i])
            if own is not None:
                ratio = xp.ones(error.shape) if ratio is None else ratio
                ratio[i] = own
    return PreparedBatch(data, error, bits != 0, host[2], ratio)


def subtracted(plan: ReferencePlan, placed: PreparedBatch, keep: tuple[str, ...] = ()) -> DifferenceStack:
    """Subtract a batch; the errors of the scales know of noise that resampled pixels share."""
    stack = plan.subtract(placed.data, placed.error, placed.mask, keep=keep)
    return stack if placed.noise_ratio is None else stack.with_noise_ratio(placed.noise_ratio)


def _mapped(prepared: Prepared, shape: tuple[int, int], backend: Backend) -> tuple[Any, ...]:
    xp, cutout = backend.xp, prepared.cutout
    data, variance, bits = (to_device(plane[None], backend) for plane in (cutout.data, cutout.variance, cutout.mask))
    matrix = np.asarray(prepared.matrix)[None]
    out = resample(data, variance, bits, matrix, shape)
    kept = out.mask[0] & (PIXEL_FLAGS.saturated | PIXEL_FLAGS.no_data)  # other bad pixels are just bad when spread
    mask = kept | (out.mask[0] != 0).astype(xp.uint8) * PIXEL_FLAGS.bad
    variance = xp.where(out.variance[0] > 0, out.variance[0], 1.0)
    return out.data[0], variance, mask, out.source_variance[0] / variance if prepared.interpolated else None


