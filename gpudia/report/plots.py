"""The figures of a run, drawn with matplotlib's object interface (no pyplot, no global state)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gpudia.flags import FRAME_FLAGS
from gpudia.report.data import Curve, Epoch, FloatArray
from gpudia.report.scatter import Scatter, running_median
from gpudia.report.stamps import CLIP_SIGMA, Picture, Stamp, kernel_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "DARK", "LIGHT", "Theme", "comparison_figure", "conditions_figure", "kernels_figure", "new_figure", "render",
    "scatter_figure", "target_figure", "time_axis", "variables_figure",
]  # fmt: skip


@dataclass(frozen=True)
class Theme:
    """Colours of a figure; the three for data are from the colour-blind safe set of Okabe and Ito."""

    face: str
    ink: str
    faint: str
    first: str
    second: str
    third: str


#: Images that failed get a line each, up to so many.
_MOST_LINES = 100

LIGHT = Theme(face="#ffffff", ink="#1c2530", faint="#c9d0d9", first="#0072b2", second="#d55e00", third="#009e73")
DARK = Theme(face="#171c24", ink="#e6eaf0", faint="#3b4553", first="#56b4e9", second="#e69f00", third="#2fc79a")


def new_figure(**settings: Any) -> Figure:
    """Return an empty `matplotlib.figure.Figure`; its module loads for a third of a second, where figures are drawn."""
    from matplotlib.figure import Figure

    return Figure(**settings)


def render(figure: Figure, dpi: int = 150) -> bytes:
    """Return the figure as PNG, with a palette of 96 colours: a third of the size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    small = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(96, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return buffer.getvalue()


def time_axis(mjd: FloatArray) -> tuple[FloatArray, str]:
    """Return times from a round start and the axis label: days, or hours when all lie within one day."""
    finite = mjd[np.isfinite(mjd)]
    if not len(finite):
        return mjd, "time"
    start = np.floor(finite.min())
    if np.ptp(finite) < 1:
        return (mjd - start) * 24, f"hours since MJD {start:.0f} (UTC)"
    return mjd - start, f"MJD \N{MINUS SIGN} {start:.0f} (days, UTC)"


def plain(text: str, width: int = 28) -> str:
    """Make text safe for any font: printable ASCII, cut to `width` characters; names of frames differ in their ends."""
    safe = "".join(c if " " <= c <= "~" else "?" for c in text)
    head = (width - 3) // 3
    return safe if len(safe) <= width else f"{safe[:head]}...{safe[len(safe) - width + 3 + head :]}"


def _figure(width: float, height: float, theme: Theme) -> Figure:
    return new_figure(figsize=(width, height), facecolor=theme.face, layout="constrained")


def _points(axes: Axes, x: FloatArray, y: FloatArray, error: FloatArray, colour: str, size: float,
            face: str | None = None) -> None:
    """Draw points with error bars; all bars are one line: a line each takes seconds for thousands."""
    gap = np.full(len(x), np.nan)
    bars = np.column_stack([x, x, gap]).ravel(), np.column_stack([y - error, y + error, gap]).ravel()
    axes.plot(*bars, "-", lw=0.25 * size, color=colour)
    axes.plot(x, y, "o", ms=size, color=colour, mfc=face or colour)


def _style(axes: Axes, theme: Theme, xlabel: str, ylabel: str) -> None:
    axes.set_facecolor(theme.face)
    axes.set_xlabel(xlabel, color=theme.ink)
    axes.set_ylabel(ylabel, color=theme.ink)
    axes.tick_params(which="both", colors=theme.ink, labelcolor=theme.ink)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.ink)
    axes.grid(visible=True, which="major", color=theme.faint, linewidth=0.6, alpha=0.6)
    axes.set_axisbelow(True)


def _empty(message: str, theme: Theme = LIGHT) -> Figure:
    figure = _figure(5.4, 1.6, theme)
    figure.text(0.5, 0.5, message, ha="center", va="center", color=theme.ink)
    return figure


def target_figure(curve: Curve, theme: Theme = LIGHT) -> Figure:
    """Draw flux and magnitude against time."""
    figure = _figure(7.2, 6.0, theme)
    top, bottom = figure.subplots(2, 1, sharex=True)
    x, label = time_axis(curve.mjd)
    _style(top, theme, "", "flux (ADU of the reference)")
    _points(top, x, curve.flux, curve.flux_err, theme.first, 4)
    _style(bottom, theme, label, "magnitude")
    real = ~curve.is_limit
    _points(bottom, x[real], curve.mag[real], curve.mag_err[real], theme.first, 4)
    if curve.is_limit.any():
        limits = curve.mag[curve.is_limit]
        bottom.plot(x[curve.is_limit], limits, "v", mfc="none", color=theme.second, label="limit (flux below 3 sigma)")
        _legend(bottom, theme)
    bottom.invert_yaxis()
    return figure


def variables_figure(curves: list[Curve], theme: Theme = LIGHT) -> Figure:
    """Draw the flux of some stars against time, two panels in a row; hollow where a measurement is flagged."""
    if not curves:
        return _empty("no star was measured in three independent epochs", theme)
    rows = -(-len(curves) // 2)
    figure = _figure(9.0, 1.9 * rows + 0.6, theme)
    grid = figure.subplots(rows, 2, squeeze=False, sharex=True).ravel()
    for axes in grid[len(curves):]:
        axes.set_axis_off()
    for i, (axes, curve) in enumerate(zip(grid, curves, strict=False)):
        x, label = time_axis(curve.mjd)
        _style(axes, theme, label if i >= len(curves) - 2 else "", "flux (ADU)" if i % 2 == 0 else "")
        for some, face in ((curve.flags == 0, theme.first), (curve.flags != 0, "none")):
            _points(axes, x[some], curve.flux[some], curve.flux_err[some], theme.first, 3.5, face)
        axes.axhline(np.nanmedian(curve.flux), color=theme.third, lw=0.8)
        axes.set_title(plain(f"{i + 1}: {curve.label.replace('²', '2')}", 60), fontsize=9, color=theme.ink,
                       parse_math=False)
    return figure


def _legend(axes: Axes, theme: Theme) -> None:
    axes.legend(frameon=False, labelcolor=theme.ink, fontsize=9)


def scatter_figure(scatter: Scatter, theme: Theme = LIGHT) -> Figure:
    """Draw measured against expected scatter of every star, and their ratio against flux."""
    if not len(scatter):
        return _empty("no star was measured in three independent epochs", theme)
    figure = _figure(5.4, 6.6, theme)
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 2])
    both = np.concatenate([scatter.expected, scatter.measured])
    ends = np.array([both.min(), both.max()])
    top.plot(ends, ends, "--", color=theme.ink, lw=1, label="measured = expected")
    bottom.axhline(1, ls="--", color=theme.ink, lw=1)
    for axes, x, y in ((top, scatter.expected, scatter.measured), (bottom, scatter.flux_ref, scatter.ratio)):
        steady = ~scatter.variable
        axes.plot(x[steady], y[steady], "o", ms=3.5, mew=0, alpha=0.55, color=theme.first, label="star")
        if scatter.variable.any():
            axes.plot(x[~steady], y[~steady], "^", ms=5, mfc="none", color=theme.second, label="flagged variable")
        middle = running_median(x, y)
        if len(middle[0]):
            axes.plot(*middle, "-", lw=2, color=theme.third, label="running median")
        axes.set(xscale="log", yscale="log")
    _style(top, theme, "expected scatter: stated error (ADU)", "measured rms of the flux (ADU)")
    _style(bottom, theme, "flux on the reference (ADU)", "measured / expected")
    _legend(top, theme)
    return figure


def comparison_figure(
    scatter: Sequence[Scatter], matched: tuple[NDArray[np.intp], NDArray[np.intp]], ratio: float,
    labels: Sequence[str], theme: Theme = LIGHT,
) -> Figure:  # fmt: skip
    """Draw the scatter of the stars of two runs against flux, and the ratio of those that both have."""
    figure = _figure(5.4, 6.6, theme)
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 2], sharex=True)
    for one, factor, label, colour in zip(scatter, (1.0, ratio), labels, (theme.first, theme.second), strict=True):
        x, y = one.flux_ref * factor, one.measured * factor
        top.plot(x, y, "o", ms=3, mew=0, alpha=0.45, color=colour)
        top.plot(*running_median(x, y), "-", lw=2, color=colour, label=plain(label, 34))
    first, second = matched
    x, y = scatter[0].flux_ref[first], scatter[1].measured[second] * ratio / scatter[0].measured[first]
    bottom.plot(x, y, "o", ms=3, mew=0, alpha=0.45, color=theme.first)
    bottom.plot(*running_median(x, y), "-", lw=2, color=theme.third)
    bottom.axhline(1, ls="--", color=theme.ink, lw=1)
    top.set(xscale="log", yscale="log")
    bottom.set(xscale="log", yscale="log")
    _style(top, theme, "", "rms of the flux (ADU)")
    _style(bottom, theme, "flux on the reference (ADU)", "rms, second / first")
    _legend(top, theme)
    return figure


def conditions_figure(epochs: list[Epoch], theme: Theme = LIGHT) -> Figure:
    """Draw seeing, sky, photometric scale and chi^2 of the fit against time."""
    mjd = np.array([e.mjd for e in epochs], dtype=float)
    if not np.isfinite(mjd).any():
        return _empty("no image has a time", theme)
    x, label = time_axis(mjd)
    ok = np.array([e.status == "ok" for e in epochs])
    itself = np.array([e.flags & FRAME_FLAGS.is_reference > 0 for e in epochs])
    panels = (("fwhm", "FWHM (px)"), ("sky", "sky (ADU)"), ("scale", "photometric scale"), ("chi2", "chi² per pixel"))
    size = 4 if len(epochs) < 200 else 2 if len(epochs) < 3000 else 1
    cross = 6 if size > 1 else 3
    figure = _figure(5.4, 7.2, theme)
    for axes, (column, ylabel) in zip(figure.subplots(4, 1, sharex=True), panels, strict=True):
        values = np.array([e[column] for e in epochs])
        if column == "chi2":  # 0 of the reference against itself would flatten the others
            values[itself] = np.nan
        errors = np.array([e["scale_err"] for e in epochs]) if column == "scale" else np.zeros(len(epochs))
        _style(axes, theme, label if column == "chi2" else "", ylabel)
        _points(axes, x[ok], values[ok], np.nan_to_num(errors[ok]), theme.first, size)
        axes.plot(x[~ok], values[~ok], "x", ms=cross, color=theme.second, zorder=3)
        lost = x[~ok & np.isfinite(x)]
        if len(lost) <= _MOST_LINES:
            axes.vlines(lost, 0, 1, transform=axes.get_xaxis_transform(), color=theme.second, lw=0.8, ls=":")
        if column in ("scale", "chi2"):
            axes.axhline(1, ls="--", color=theme.ink, lw=0.8)
    figure.align_ylabels()
    return figure


def stamps_figure(stamps: list[Stamp]) -> Figure:
    """Draw the strips (reference, image, difference) of the epochs as one mosaic."""
    if not stamps:
        return _empty("no difference image to show")
    title = f"reference | image | difference, \N{PLUS-MINUS SIGN}{CLIP_SIGMA:.0f} sigma"
    return _mosaic([s.strip for s in stamps], [s.epoch.name for s in stamps], 3, 3.4, title)


def kernels_figure(stamps: list[Stamp]) -> Figure:
    """Draw the matching kernels of the epochs, each on its own scale."""
    shown = [s for s in stamps if s.kernel is not None]
    if not shown:
        return _empty("no kernel to show")
    pictures = [kernel_picture(s.kernel) for s in shown if s.kernel is not None]
    title = "matching kernels, blue negative, red positive, each on its own scale"
    return _mosaic(pictures, [s.epoch.name for s in shown], 6, 1.6, title)


def _mosaic(pictures: list[Picture], labels: list[str], columns: int, width: float, title: str) -> Figure:
    """Pictures in columns of `width` inches, each under its label; they may differ in size.

    One panel in inches holds all of them: laying out one for each takes seconds.
    """
    columns = min(columns, len(pictures))
    head, gap = 0.3, 0.06
    height = (width - gap) * max(p.shape[0] / p.shape[1] for p in pictures) + head
    whole, tall = max(columns * width, 4.2), -(-len(pictures) // columns) * height + head + gap
    figure = new_figure(figsize=(whole, tall), facecolor=LIGHT.face)
    axes = figure.add_axes((0, 0, 1, 1))
    for k, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = k % columns * width, head + k // columns * height
        axes.text(x + width / 2, y + 0.65 * head, plain(label, int(width * 14)), ha="center", va="center", fontsize=8,
                  color=LIGHT.ink, parse_math=False)
        bottom = y + head + (width - gap) * picture.shape[0] / picture.shape[1]
        axes.imshow(picture, extent=(x + gap / 2, x + width - gap / 2, bottom, y + head), interpolation="nearest")
    axes.text(whole / 2, head / 2, title, fontsize=9, color=LIGHT.ink, ha="center", va="center")
    axes.set(xlim=(0, whole), ylim=(tall, 0))
    axes.set_axis_off()
    return figure
