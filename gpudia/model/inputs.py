"""What a caller may hand over as image, error and mask, made uniform at the door of the model."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpudia.backend import backend_of, native
from gpudia.errors import InputError

__all__ = ["planes_of", "uniform_stack"]


def _is_nddata(value: Any) -> bool:
    return hasattr(value, "uncertainty") and hasattr(value, "mask") and hasattr(value, "data")


def _host_array(value: Any) -> Any:
    """Lists, masked and big-endian arrays to plain native arrays; arrays of a device pass."""
    if isinstance(value, np.ndarray | list | tuple | np.generic):
        value = native(value)
        if value.dtype.kind not in "fiub":
            raise InputError(f"arrays must be real numbers, got dtype {value.dtype}")
    return value


def _sigma(uncertainty: Any) -> Any:
    from astropy.nddata import StdDevUncertainty

    return uncertainty.represent_as(StdDevUncertainty).array


def _merge(one: Any, other: Any) -> Any:
    if one is None or other is None:
        return one if other is None else other
    return np.asarray(one, bool) | np.asarray(other, bool)


def planes_of(image: Any, error: Any = None, mask: Any = None, name: str = "image") -> tuple[Any, Any, Any]:
    """Split an image into arrays (data, error or None, mask or None).

    Parameters
    ----------
    image : array, masked array, NDData, CCDData or list
        Of any real dtype and byte order. Mask and uncertainty that it carries are used, an explicit `error` wins,
        masks are joined.
    error, mask : array or None
        One sigma in the image's units; True = ignore.
    name : str
        What messages call it.

    Raises
    ------
    InputError
        If shapes or backends differ, or the dtype is not a real number.
    """
    if _is_nddata(image):
        if error is None and image.uncertainty is not None:
            error = _sigma(image.uncertainty)
        mask = _merge(mask, image.mask)
        image = image.data
    elif isinstance(image, np.ma.MaskedArray):
        mask = _merge(mask, np.ma.getmaskarray(image))
    image, error, mask = (None if v is None else _host_array(v) for v in (image, error, mask))
    if image is None or not hasattr(image, "shape"):
        raise InputError(f"{name} must be an array, got {type(image).__name__}")
    for value, what in ((error, f"error of {name}"), (mask, f"mask of {name}")):
        if value is not None and not hasattr(value, "shape"):
            raise InputError(f"{what} must be an array, got {value!r}")
    backend_of(image, error, mask)
    for value, what in ((error, f"error of {name}"), (mask, f"mask of {name}")):
        if value is not None and tuple(value.shape) != tuple(image.shape):
            raise InputError(f"{what} must have the shape of {name} {tuple(image.shape)}, got {tuple(value.shape)}")
    return image, error, mask


def uniform_stack(images: Any, errors: Any, masks: Any, shape: tuple[int, int]) -> tuple[Any, Any, Any]:
    """Return images, errors, masks as (B, H, W), checked against the reference's `shape` (H, W)."""
    if isinstance(images, list | tuple) and images and not np.isscalar(images[0]):
        images, errors, masks = _stack_list(images, errors, masks)
    images, errors, masks = planes_of(images, errors, masks, "images")
    if images.ndim not in (2, 3) or tuple(images.shape[-2:]) != shape:
        raise InputError(f"images must have shape {shape} or (B, {shape[0]}, {shape[1]}) like the reference, "
                         f"got {tuple(images.shape)}")
    if images.ndim == 2:
        images, errors, masks = (None if v is None else v[None] for v in (images, errors, masks))
    return images, errors, masks


def _stack_list(images: Any, errors: Any, masks: Any) -> tuple[Any, Any, Any]:
    for name, values in (("errors", errors), ("masks", masks)):
        if values is not None and len(values) != len(images):
            raise InputError(f"{name} must be one for each of {len(images)} images, got {len(values)}")
    given = [planes_of(image, None if errors is None else errors[i], None if masks is None else masks[i],
                       f"images[{i}]") for i, image in enumerate(images)]
    shapes = {tuple(data.shape) for data, _, _ in given}
    if len(shapes) > 1:
        raise InputError(f"images must be of one shape, got {sorted(shapes)}")
    data, error, mask = zip(*given, strict=True)
    xp = backend_of(*data).xp
    if any(e is None for e in error) and not all(e is None for e in error):
        raise InputError("errors must be given for all images or for none, got some of them")
    return (xp.stack(data), None if error[0] is None else xp.stack(error),
            None if all(m is None for m in mask) else
            xp.stack([xp.zeros(d.shape, dtype=bool) if m is None else m != 0 for d, m in zip(data, mask, strict=True)]))
