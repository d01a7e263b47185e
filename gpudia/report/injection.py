"""The picture of an injection: pulls, bias and completeness."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from astropy.table import Table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from gpudia.images.writing import write_atomically
from gpudia.report.plots import LIGHT, render

__all__ = ["write_injection_plot"]

_METHODS = (("ap", "aperture", LIGHT.first), ("psf", "PSF", LIGHT.second))


def write_injection_plot(epochs: Table, bins: Table, path: Path) -> Path:
    """Draw ``injection_epochs.ecsv`` and ``injection.ecsv``."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    _pulls(axes[0, 0], epochs)
    _histogram(axes[0, 1], epochs)
    _bias(axes[1, 0], bins)
    _completeness(axes[1, 1], bins, float(epochs.meta["threshold"]))
    figure.suptitle(f"{len(set(epochs['id']))} injected stars ({epochs.meta['shape']}), {len(set(epochs['image']))} "
                    "frames", fontsize=11)
    png = render(figure)
    return write_atomically(path, lambda p: p.write_bytes(png))


def _usable(epochs: Table, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Expected signal to noise, and pulls."""
    good = np.asarray(epochs["usable"], bool)
    expected, flux, error = (np.asarray(epochs[name], float)[good] for name in ("expected", method, f"{method}_err"))
    return np.abs(expected) / error, (flux - expected) / error


def _pulls(axes: Axes, epochs: Table) -> None:
    for method, name, colour in _METHODS:
        snr, pull = _usable(epochs, method)
        axes.plot(np.maximum(snr, 0.5), pull, ".", ms=3, alpha=0.6, color=colour, label=name)
    axes.set(xscale="log", ylim=(-6, 6), xlabel="expected signal to noise", ylabel="(recovered - injected) / error")
    for level in (-1, 0, 1):
        axes.axhline(level, color=LIGHT.faint, lw=1, zorder=0)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="upper left", fontsize=8)


def _histogram(axes: Axes, epochs: Table) -> None:
    grid, edges = np.linspace(-6, 6, 200), np.linspace(-6, 6, 37)
    n = 0
    for method, name, colour in _METHODS:
        pull = _usable(epochs, method)[1]
        n = len(pull)
        low, middle, high = np.percentile(pull, (15.865, 50, 84.135)) if n else (np.nan,) * 3
        axes.hist(np.clip(pull, -6, 6), edges, histtype="step", color=colour,
                  label=f"{name}: median {middle:+.2f}, width {(high - low) / 2:.2f}")
    axes.plot(grid, n * (edges[1] - edges[0]) * np.exp(-grid**2 / 2) / np.sqrt(2 * np.pi), color=LIGHT.ink, lw=1)
    axes.set(xlabel="pull", ylabel="fluxes")
    axes.legend(fontsize=8)


def _bias(axes: Axes, bins: Table) -> None:
    for shift, (method, name, colour) in zip((-0.03, 0.03), _METHODS, strict=True):
        mag = np.asarray(bins["mag"], float) + shift
        axes.errorbar(mag, 100 * bins[f"{method}_bias"], 100 * bins[f"{method}_bias_err"], fmt="o", ms=4, color=colour,
                      label=name)
        axes.plot(mag, 100 * bins[f"{method}_psf_part"], "_", ms=12, color=colour, label=f"{name}: from the PSF alone")
    axes.axhline(0, color=LIGHT.faint, lw=1, zorder=0)
    axes.set(xlabel="-2.5 log10 of the change of flux (ADU of the reference)", ylabel="bias, %")
    axes.set_yscale("symlog", linthresh=5)
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.legend(fontsize=8)


def _completeness(axes: Axes, bins: Table, threshold: float) -> None:
    axes.errorbar(bins["mag"], bins["detected"], bins["detected_err"],
                  [bins["mag"] - bins["mag_low"], bins["mag_high"] - bins["mag"]], "o-", ms=4, color=LIGHT.third)
    for row in bins:
        axes.annotate(f"{row['snr']:.0f}", (row["mag"], row["detected"]), textcoords="offset points", xytext=(4, 5),
                      fontsize=7)
    axes.set(ylim=(-0.03, 1.08), xlabel="-2.5 log10 of the change of flux (ADU of the reference)",
             ylabel=f"detected above {threshold:g} sigma (numbers: signal to noise)")
    for level in (0.5, 1.0):
        axes.axhline(level, color=LIGHT.faint, lw=1, zorder=0)
