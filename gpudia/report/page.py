"""The page of a run: one HTML file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib import resources
from string import Template
from typing import Any
from urllib.parse import quote

import numpy as np

import gpudia
from gpudia.flags import FRAME_FLAGS
from gpudia.report.data import Curve, Epoch, FloatArray, RunData
from gpudia.report.epoch_table import common_facts, epoch_table, failures, flag_badges, flag_legend
from gpudia.report.light_curve import controls, curves_json
from gpudia.report.scatter import Scatter
from gpudia.report.stamps import CLIP_SIGMA, Stamp, encode_png, kernel_picture

__all__ = ["Pictures", "build_page"]

_NO_TARGET = "No target was given (<code>--ra</code>, <code>--dec</code>), so there is no light curve of a target."
_SCATTER_NOTE = (
    "Measured: standard deviation of the flux over the epochs. Expected: root mean square of the stated errors of the "
    "same epochs. Points above the dashed line vary by more than their errors say. Epochs made from the reference "
    "itself and masked or saturated measurements are left out. The noise of the reference is partly common to all "
    "epochs, which makes the scatter smaller than stated."
)
_TARGET_LOST = "The target was measured in no image."
# Where a run may have left these facts: cards of reference.fits, or the metadata of epochs.ecsv.
_REFERENCE_KEYS = ("REFERENC", "REFNAME", "REFID", "REFERENCE")
_BACKEND_KEYS = ("BACKEND",)
_VERSION_KEYS = ("GPUDIA", "GPUDIAV", "GPUDIA_VERSION", "VERSION")


@dataclass(frozen=True)
class Pictures:
    """PNG of the figures that the page carries, each as (on light, on dark) ground."""

    scatter: tuple[bytes, bytes]
    conditions: tuple[bytes, bytes]
    target: bytes | None


def build_page(run: RunData, stamps: list[Stamp], scatter: Scatter, stars: list[Curve], pictures: Pictures) -> str:
    """Return the HTML of the report.

    Parameters
    ----------
    run : RunData
        The folder's content.
    stamps : list of Stamp
        Stamps of the epochs to show (see `choose_epochs`).
    scatter : Scatter
        Scatter of the stars.
    stars : list of Curve
        Light curves to offer beside the target's.
    pictures : Pictures
        Figures as PNG.
    """
    curves = ([run.target] if run.target else []) + stars
    script = _package_text("page.js")
    return Template(_package_text("page.html")).substitute(
        title=escape(_title(run)),
        style=_package_text("page.css"),
        script=script,
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        summary=_summary(run),
        tiles=_tiles(run, scatter),
        lightcurve=_light_curve(run, curves, pictures.target),
        epochs=_epochs(run, {s.epoch.index for s in stamps}),
        stamps=_stamps(run, stamps),
        scatter=_scatter(scatter, pictures.scatter),
        conditions=_conditions(run.epochs, pictures.conditions),
        kernels=_kernels(stamps),
        failures=failures(run.epochs),
        settings=_settings(run),
        flags=flag_legend(),
        footer=f"Made by gpudia {escape(gpudia.__version__)}. The page loads nothing from the network.",
        curves=curves_json(curves, run.epochs),
    )


def _package_text(name: str) -> str:
    return resources.files("gpudia.report").joinpath(name).read_text(encoding="utf-8")


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _fact(run: RunData, keys: tuple[str, ...], default: str = "") -> str:
    facts = {k.upper(): v for k, v in run.facts.items()}
    return next((facts[k] for k in keys if facts.get(k)), default)


def _field(run: RunData) -> str:
    name = _fact(run, ("OBJECT",))
    ra, dec = run.settings.get("ra"), run.settings.get("dec")
    place = f"RA {ra}, Dec {dec}" if ra is not None and dec is not None else ""
    return ", ".join(part for part in (name, place) if part) or "the whole frame"


def _title(run: RunData) -> str:
    return f"Difference photometry of {_fact(run, ('OBJECT',)) or _field(run)}"


def _reference(run: RunData) -> str:
    flagged = [e.name for e in run.epochs if e.flags & FRAME_FLAGS.is_reference]
    return _fact(run, _REFERENCE_KEYS) or ", ".join(flagged[:3])


def _summary(run: RunData) -> str:
    n_ok, n_failed, n_skipped = (run.count(s) for s in ("ok", "failed", "skipped"))
    reference = f" from the reference <b>{escape(_reference(run))}</b>" if _reference(run) else ""
    backend = _fact(run, _BACKEND_KEYS) or str(run.settings.get("backend", ""))
    seconds = np.nansum([e["seconds"] for e in run.epochs])
    return (
        f"{n_ok} of {len(run.epochs)} images of {escape(_field(run))} were subtracted{reference}; "
        f"{n_failed} failed and {n_skipped} {'was' if n_skipped == 1 else 'were'} skipped. Computed by gpudia "
        f"{escape(_fact(run, _VERSION_KEYS, gpudia.__version__))}"
        f"{f' on the backend {escape(backend)}' if backend else ''} in {seconds:.3g} s of work on the images; "
        f"page written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
    )


def _tiles(run: RunData, scatter: Scatter) -> str:
    tiles = [(s, str(run.count(s)), s) for s in ("ok", "failed", "skipped")]
    chi2 = np.array([e["chi2"] for e in run.epochs if e.status == "ok"])
    if np.isfinite(chi2).any():
        tiles.append(("", f"{np.nanmedian(chi2):.3f}", "median chi² per pixel"))
    if len(scatter):
        tiles.append(("", f"{np.median(scatter.ratio):.3f}", f"scatter / stated error (ideal {scatter.ideal:.3f})"))
    tiles.append(("", str(len(run.sources)), "stars"))
    return "".join(f'<li class="{c}"><b>{value}</b><span>{label}</span></li>' for c, value, label in tiles)


def _light_curve(run: RunData, curves: list[Curve], png: bytes | None) -> str:
    asked = run.settings.get("ra") is not None
    note = "" if run.target else f'<p class="note">{_TARGET_LOST if asked else _NO_TARGET}</p>'
    if not curves:
        return note + "<p>No star has a light curve: too few images were subtracted.</p>"
    more = len(curves) > (run.target is not None)
    offer = '<p class="note">The selector offers the stars that vary most.</p>' if more else ""
    image = f'<img alt="Light curve of the target" src="{_data_uri(png)}" width="100%">' if png else ""
    still = f"<noscript>{image}<p>The chart needs JavaScript.</p></noscript>"
    return f'{note}{offer}{controls(curves)}{still}'


def _epochs(run: RunData, with_stamp: set[int]) -> str:
    if not run.epochs:
        return "<p>The run has no image.</p>"
    common = common_facts(run.epochs)
    note = (
        f"{f'All images: {escape(common)}. ' if common else ''}A click on a column's head sorts; a name leads to its "
        f"stamps; a flag to its meaning.{' Rows in grey were not selected.' if run.count('skipped') else ''}"
    )
    return f'<p class="note">{note}</p>{epoch_table(run, with_stamp)}'


def _stamps(run: RunData, stamps: list[Stamp]) -> str:
    if not stamps:
        return "<p>There is no difference image to show.</p>"
    n_ok = run.count("ok")
    chosen = "" if len(stamps) == n_ok else f" {len(stamps)} of {n_ok} epochs are shown: {_choice(run, stamps)}."
    centre = "the target (ring)" if stamps[0].marks else "the centre of the region"
    note = (
        f'<p class="note">Around {centre}, left to right: reference, image, difference in units of its error.{chosen} '
        f'<span class="key">\N{MINUS SIGN}{CLIP_SIGMA:.0f} σ <i></i> +{CLIP_SIGMA:.0f} σ</span> '
        '<span class="key"><i class="masked"></i> masked</span> x to the right, y upwards.</p>'
    )
    return f'{note}<div class="gallery">{"".join(_stamp(s) for s in stamps)}</div>'


def _choice(run: RunData, stamps: list[Stamp]) -> str:
    n_files = sum(e.difference is not None for e in run.epochs)
    return "the first, and those with chi² farthest from 1" if n_files > len(stamps) else "those with a difference file"


def _stamp(stamp: Stamp) -> str:
    epoch, (height, width) = stamp.epoch, stamp.strip.shape[:2]
    alt = escape(f"Reference, image and difference of {epoch.name}")
    marks = "".join(f'<i class="mark" style="left:{100 * x:.2f}%;top:{100 * y:.2f}%"></i>' for x, y in stamp.marks)
    file = f' · <a href="difference/{quote(epoch.difference.name)}">FITS</a>' if epoch.difference else ""
    chi2 = f" · chi² {epoch['chi2']:.3g}" if np.isfinite(epoch["chi2"]) else ""
    return (
        f'<figure id="stamp-{epoch.index}"><div class="strip"><img loading="lazy" decoding="async" width="{width}" '
        f'height="{height}" alt="{alt}" src="{_data_uri(encode_png(stamp.strip))}">{marks}</div><figcaption>'
        f'<a href="#epoch-{epoch.index}">{escape(epoch.name)}</a>{chi2}{file} {flag_badges(epoch.flags)}'
        "</figcaption></figure>"
    )


def _themed(light_dark: tuple[bytes, bytes], alt: str) -> str:
    light, dark = map(_data_uri, light_dark)
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img loading="lazy" alt="{escape(alt)}" src="{light}"></picture>'
    )


def _scatter(scatter: Scatter, png: tuple[bytes, bytes]) -> str:
    if not len(scatter):
        return "<p>No star was measured in three independent epochs, so its scatter is not known.</p>"
    low, middle, high = np.percentile(scatter.ratio, [16, 50, 84])
    picture = _themed(png, "Measured scatter of every star against its stated error")
    text = (
        f"<p>Median ratio of measured to expected scatter: <b>{middle:.3f}</b> ({low:.3f} to {high:.3f} holds the "
        f"middle 68 % of {len(scatter)} stars). Perfect errors would give {scatter.ideal:.3f} with "
        f"{int(np.median(scatter.n_epochs))} epochs: the median of a few measurements lies a little below 1.</p>"
    )
    return f'<div class="plot">{picture}<div>{text}<p class="note">{_SCATTER_NOTE}</p></div></div>'


def _conditions(epochs: list[Epoch], png: tuple[bytes, bytes]) -> str:
    items = []
    for column, label in (("fwhm", "FWHM (px)"), ("sky", "sky (ADU)"), ("scale", "photometric scale")):
        values = np.array([e[column] for e in epochs])
        if np.isfinite(values).any():
            low, middle, high = np.nanmin(values), np.nanmedian(values), np.nanmax(values)
            span = f"{middle:.4g} ({low:.4g} to {high:.4g})".replace("-", "\N{MINUS SIGN}")
            items.append(f"<dt>{label}</dt><dd>median {span}</dd>")
    note = '<p class="note">Crosses and dotted lines: images that failed or were skipped.</p>'
    picture = _themed(png, "Seeing, sky, photometric scale and chi² against time")
    return f'<div class="plot">{picture}<div><dl>{"".join(items)}</dl>{note}</div></div>'


def _kernels(stamps: list[Stamp]) -> str:
    figures = "".join(_kernel(s.epoch.name, s.kernel) for s in stamps if s.kernel is not None)
    if not figures:
        return "<p>There is no kernel to show.</p>"
    note = (
        '<p class="note">The kernel that turns the reference into each image, at the centre of the region; every '
        "kernel on its own colour scale (blue negative, red positive).</p>"
    )
    return f'{note}<div class="gallery small">{figures}</div>'


def _kernel(name: str, kernel: FloatArray) -> str:
    picture = _data_uri(encode_png(kernel_picture(kernel)))
    return (
        f'<figure><img loading="lazy" alt="{escape(f"Kernel of {name}")}" width="{kernel.shape[1]}" '
        f'height="{kernel.shape[0]}" src="{picture}">'
        f"<figcaption>{escape(name)}<br>sum {np.nansum(kernel):.3f}</figcaption></figure>"
    )


def _settings(run: RunData) -> str:
    settings = _definitions(_flat(run.settings)) if run.settings else "<p>run.toml could not be read.</p>"
    summary = "<summary>What the files say of the run (header of the reference)</summary>"
    facts = f"<details>{summary}{_definitions(run.facts)}</details>" if run.facts else ""
    version = _fact(run, _VERSION_KEYS, gpudia.__version__)
    versions = _definitions({"gpudia": version, "backend": _fact(run, _BACKEND_KEYS), "reference": _reference(run)})
    return f"{versions}<h3>run.toml</h3>{settings}{facts}"


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = _setting(value)
    return flat


def _setting(value: Any) -> str:
    if isinstance(value, list) and len(value) > 6:
        return f"{value[0]} … {value[-1]} ({len(value)} entries)"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _definitions(pairs: dict[str, str]) -> str:
    items = (f"<dt>{escape(k)}</dt><dd>{escape(v) or 'not stated'}</dd>" for k, v in pairs.items())
    return f"<dl>{''.join(items)}</dl>"
