"""Thumbnails of the candidates that a search of the differences found, and a sheet of the most significant ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from astropy.io import fits

from gpudia.flags import CANDIDATE_FLAGS, PIXEL_FLAGS
from gpudia.images.writing import write_atomically
from gpudia.report.data import UNREADABLE, FloatArray, RunData
from gpudia.report.plots import new_figure, plain, render
from gpudia.report.stamps import CLIP_SIGMA, Picture, encode_png, gray_picture, side_by_side, sigma_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_thumbnails"]

log = logging.getLogger(__name__)

#: Half side of a thumbnail, pixels, and how many times it is enlarged.
_HALF, _ZOOM = 20, 4
#: Candidates, the most significant ones, that get a thumbnail, and those on the sheet.
_MOST, _ON_SHEET = 200, 16


def write_thumbnails(output: Path, run: RunData) -> dict[int, Picture]:
    """Write ``candidates/ID.png`` (reference, image, difference, score; y upwards) and ``plots/candidates.png``.

    Nothing is written where no search was asked for, or no difference images. Returns the thumbnails by the candidates'
    ids, those without a doubt first, not enlarged.
    """
    if not len(run.candidates):
        return {}
    table = run.candidates[:_MOST]
    strips: dict[int, Picture] = {}
    for image in dict.fromkeys(table["image"].tolist()):
        rows = [row for row in table if row["image"] == image]
        try:
            strips |= _strips(output / "difference" / f"{image}.fits", rows, table.meta["origin"], run)
        except UNREADABLE as error:
            log.warning("report: thumbnails of %s left out: %s", image, error)
    (output / "candidates").mkdir(exist_ok=True)
    for number, strip in strips.items():
        content = encode_png(strip.repeat(_ZOOM, axis=0).repeat(_ZOOM, axis=1))
        write_atomically(output / "candidates" / f"{number}.png", lambda p, content=content: p.write_bytes(content))
    shown = sorted((row for row in table if row["id"] in strips), key=lambda row: _doubted(row["flags"]))
    if strips:
        sheet = render(_sheet(shown[:_ON_SHEET], strips))
        write_atomically(output / "plots" / "candidates.png", lambda p: p.write_bytes(sheet))
    return {int(row["id"]): strips[int(row["id"])] for row in shown}


def _doubted(flags: int) -> bool:
    return bool(flags & ~CANDIDATE_FLAGS.one_epoch)


def _strips(path: Path, rows: Sequence[Any], origin: Sequence[int], run: RunData) -> dict[int, Picture]:
    with fits.open(path, memmap=False) as hdus:
        difference, model, error, score = (np.asarray(hdus[name].data, float)
                                           for name in ("DIFF", "MODEL", "ERR", "SCORE"))
        masked = np.asarray(hdus["MASK"].data).astype(np.int64) & ~PIXEL_FLAGS.clipped != 0
    reference = run.reference if run.reference is not None else np.full(difference.shape, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        sigma = np.where(masked, np.nan, difference / error)
    image = np.where(masked, np.nan, model + difference)
    found = {}
    for row in rows:
        x, y = round(row["x"] - origin[0]), round(row["y"] - origin[1])
        cuts = [_window(plane, x, y) for plane in (reference, image, sigma, score)]
        found[int(row["id"])] = side_by_side([*map(gray_picture, cuts[:2]), sigma_picture(cuts[2], CLIP_SIGMA),
                                              sigma_picture(cuts[3], 2 * CLIP_SIGMA)])
    return found


def _window(plane: FloatArray, x: int, y: int) -> FloatArray:
    """Cut the pixels about (x, y); NaN beyond the edges."""
    padded = np.pad(plane, _HALF, constant_values=np.nan)
    return padded[y:y + 2 * _HALF + 1, x:x + 2 * _HALF + 1]


def _sheet(rows: Sequence[Any], strips: dict[int, Picture]) -> Figure:
    columns = 2 if len(rows) > 1 else 1
    lines = -(-len(rows) // columns)
    figure = new_figure(figsize=(5.6 * columns, 1.75 * lines + 0.3), layout="constrained")
    for k, row in enumerate(rows):
        axes = figure.add_subplot(lines, columns, k + 1)
        axes.imshow(strips[int(row["id"])], interpolation="nearest")
        axes.set_axis_off()
        flags = ", ".join(CANDIDATE_FLAGS.decode(row["flags"])) or "no flags"
        axes.set_title(f"{row['id']}: {row['score']:+.1f} sigma in {plain(row['image'], 20)}, {row['n_epochs']} "
                       f"epochs; {flags}", fontsize=7)
    figure.suptitle("reference, image, difference (-5 to 5 sigma), score (-10 to 10)", fontsize=8)
    return figure
