"""The report of a run: plots, and one HTML page to look at. Works from the output folder alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from gpudia.images.writing import write_atomically
from gpudia.report.candidates import write_thumbnails
from gpudia.report.data import read_run
from gpudia.report.page import Pictures, build_page
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
from gpudia.report.stamps import choose_epochs, make_stamps

__all__ = ["write_report"]


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
    stamps = make_stamps(run, choose_epochs(run.epochs))
    scatter = star_scatter(run)
    pictures = Pictures(
        scatter=_themes(lambda theme: scatter_figure(scatter, theme)),
        conditions=_themes(lambda theme: conditions_figure(run.epochs, theme)),
        target=render(target_figure(run.target)) if run.target else None,
    )
    plots = {
        "target_lightcurve": pictures.target,
        "stamps": render(stamps_figure(stamps)),
        "kernels": render(kernels_figure(stamps)),
        "constant_stars": pictures.scatter[0],
        "conditions": pictures.conditions[0],
        "variables": render(variables_figure(most_variable(run, 10))),
    }
    (output / "plots").mkdir(exist_ok=True)
    for name, png in plots.items():
        if png is not None:
            _write(output / "plots" / f"{name}.png", png)
    write_thumbnails(output, run)
    page = build_page(run, stamps, scatter, most_variable(run), pictures)
    return _write(output / "report.html", page.encode("utf-8"))


def _themes(draw: Callable[[Theme], Figure]) -> tuple[bytes, bytes]:
    return render(draw(LIGHT)), render(draw(DARK))


def _write(path: Path, content: bytes) -> Path:
    return write_atomically(path, lambda p: p.write_bytes(content))
