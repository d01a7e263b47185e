"""The report of a run: plots, and one HTML page to look at. Works from the output folder alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpudia.images.writing import write_atomically
from gpudia.report.candidates import write_thumbnails
from gpudia.report.comparison import Comparison, compare_runs
from gpudia.report.data import read_run
from gpudia.report.page import build_page
from gpudia.report.plots import (
    DARK,
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


#: Does a task for all items, with what they share, and yields numbers of items with results: in other processes.
_DoAll = Callable[[Callable[[Any, bytes], bytes], Sequence[Any], bytes], Iterable[tuple[int, Any]]]


def write_report(output: Path, do_all: _DoAll | None = None) -> Path:
    """Write ``report.html`` and ``plots/*.png`` of a run from the files in its output folder.

    Parameters
    ----------
    output : Path
        Output folder of `gpudia.run`. Only ``epochs.ecsv`` must be there; whatever else is absent (no target was
        given, every image failed) is said on the page.
    do_all : callable, optional
        `gpudia.pipeline.executors.Executor.map`, to draw the figures; default: they are drawn by this process.

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
    stamps = make_stamps(run, choose_epochs(run.epochs, run.target))
    scatter, varying = star_scatter(run), most_variable(run, 10)
    plots = _drawn({  # what takes longest first
        "variables": (variables_figure, varying),
        "target_lightcurve": (target_figure, run.target),
        "stamps": (stamps_figure, stamps),
        "kernels": (kernels_figure, stamps),
        "constant_stars": (scatter_figure, scatter),
        "constant_stars, dark": (scatter_figure, scatter, DARK),
        "conditions": (conditions_figure, run.epochs),
        "conditions, dark": (conditions_figure, run.epochs, DARK),
    }, do_all)
    content = Content(
        run=run,
        stamps=stamps,
        scatter=scatter,
        stars=varying[: max(2, min(8, _MOST_POINTS // max(1, len(run.curve_epochs))))],
        scatter_png=(plots["constant_stars"], plots.pop("constant_stars, dark")),
        conditions_png=(plots["conditions"], plots.pop("conditions, dark")),
        target_png=plots.get("target_lightcurve"),
        thumbnails=write_thumbnails(output, run),
    )
    for name, png in plots.items():
        _write(output / "plots" / f"{name}.png", png)
    return _write(output / "report.html", build_page(content).encode("utf-8"))


def _drawn(figures: Mapping[str, tuple[Any, ...]], do_all: _DoAll | None) -> dict[str, bytes]:
    """Draw figures, each a function and its arguments; none where the first of these is None."""
    items = {name: item for name, item in figures.items() if item[1] is not None}
    done = dict(do_all(draw, list(items.values()), b"")) if do_all else {}
    # what a process died of is drawn here, or an error tells why not
    return {name: png if isinstance(png := done.get(k), bytes) else draw(item, b"")
            for k, (name, item) in enumerate(items.items())}


def draw(item: tuple[Any, ...], _: bytes) -> bytes:
    """Draw a figure as PNG: a task."""
    figure, *arguments = item
    return render(figure(*arguments))


def _write(path: Path, content: bytes) -> Path:
    return write_atomically(path, lambda p: p.write_bytes(content))
