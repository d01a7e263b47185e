"""The report of a run: plots, and one HTML page to look at. Works from the output folder alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from gpudia.images.writing import write_atomically
from gpudia.report.candidates import write_thumbnails
from gpudia.report.comparison import Comparison, compare_runs
from gpudia.report.data import read_run
from gpudia.report.page import build_page
from gpudia.report.plots import (
    DARK,
    LIGHT,
    Theme,
    conditions_figure,
    kernels_figure,
    render,
    scatter_figure,
    stamps_figure,
    target_figure,
    variables_figure,
)
from gpudia.report.scatter import most_variable, star_scatter
from gpudia.report.sections import Content
from gpudia.report.stamps import choose_epochs, make_stamps

__all__ = ["Comparison", "compare_runs", "write_report"]

#: Points of light curves on the page, about: of long series fewer stars are offered beside the target.
_MOST_POINTS = 24000


def write_report(output: Path) -> Path:
    """Write ``report.html`` and ``plots/*.png`` of a run from the files in its output folder.

    Parameters
    ----------
    output : Path
        Output folder of `gpudia.run`. Only ``epochs.ecsv`` must be there; whatever else is absent (no target was
        given, every image failed) is said on the page.

    Returns
    -------
    Path
        The page. It is one file that loads nothing, neither from the network nor from the folder.

    Raises
    ------
    InputError
        `output` holds no readable ``epochs.ecsv``.
    """
    output = Path(output)
    run = read_run(output)
    (output / "plots").mkdir(exist_ok=True)
    varying = most_variable(run, 10)
    content = Content(
        run=run,
        stamps=make_stamps(run, choose_epochs(run.epochs, run.target)),
        scatter=(scatter := star_scatter(run)),
        stars=varying[: max(2, min(8, _MOST_POINTS // max(1, len(run.curve_epochs))))],
        scatter_png=_themes(lambda theme: scatter_figure(scatter, theme)),
        conditions_png=_themes(lambda theme: conditions_figure(run.epochs, theme)),
        target_png=render(target_figure(run.target)) if run.target else None,
        thumbnails=write_thumbnails(output, run),
    )
    plots = {
        "target_lightcurve": content.target_png,
        "stamps": render(stamps_figure(content.stamps)),
        "kernels": render(kernels_figure(content.stamps)),
        "constant_stars": content.scatter_png[0],
        "conditions": content.conditions_png[0],
        "variables": render(variables_figure(varying)),
    }
    for name, png in plots.items():
        if png is not None:
            _write(output / "plots" / f"{name}.png", png)
    return _write(output / "report.html", build_page(content).encode("utf-8"))


def _themes(draw: Callable[[Theme], Figure]) -> tuple[bytes, bytes]:
    return render(draw(LIGHT)), render(draw(DARK))


def _write(path: Path, content: bytes) -> Path:
    return write_atomically(path, lambda p: p.write_bytes(content))
