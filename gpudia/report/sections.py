"""The sections of a run's page, each a function of what was read that returns HTML, empty where there is nothing."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from typing import Any
from urllib.parse import quote

import numpy as np

import gpudia
from gpudia.flags import CANDIDATE_FLAGS, FRAME_FLAGS, SOURCE_FLAGS
from gpudia.messages import printable
from gpudia.report.data import Curve, FloatArray, RunData, numbers, words
from gpudia.report.epoch_table import common_facts, epoch_table, failures, flag_badges, flag_legend
from gpudia.report.light_curve import controls, curves_json
from gpudia.report.scatter import Scatter
from gpudia.report.stamps import CLIP_SIGMA, Picture, Stamp, encode_png, kernel_picture
from gpudia.report.tables import flags_column, numbers_column, table_place, texts_column

__all__ = ["SECTIONS", "Content", "Section", "definitions", "fact", "picture_pair", "png_uri"]

_NO_TARGET = "No target was given (<code>--ra</code>, <code>--dec</code>), so there is no light curve of a target."
_SCATTER_NOTE = (
    "Measured: standard deviation of the flux over the epochs. Expected: root mean square of the stated errors of the "
    "same epochs. Points above the dashed line vary by more than their errors say. Epochs made from the reference "
    "itself and masked or saturated measurements are left out. The noise of the reference is partly common to all "
    "epochs, which makes the scatter smaller than stated."
)
_TARGET_LOST = "The target was measured in no image."
_LIBRARIES = ("Python", "numpy", "scipy", "astropy", "photutils")  # whose versions a run may state
_MOST_ROWS = 5000  # of the tables of variables and candidates
_MOST_CANDIDATES = 24  # with a thumbnail on the page
_STAGES_NOTE = (
    "Seconds of work, added up over the processes that worked at the same time. The longest bar is where a faster "
    "machine, disk or setting would help most."
)


@dataclass(frozen=True)
class Content:
    """What a page shows.

    `scatter_png` and `conditions_png` are figures on (light, dark) ground, `stars` the light curves to offer beside the
    target's, `thumbnails` those of the candidates by id, the ones without a doubt first.
    """

    run: RunData
    stamps: list[Stamp]
    scatter: Scatter
    stars: list[Curve]
    scatter_png: tuple[bytes, bytes]
    conditions_png: tuple[bytes, bytes]
    target_png: bytes | None = None
    thumbnails: dict[int, Picture] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """One section: its anchor, its head, its name in the navigation, and what makes its HTML."""

    anchor: str
    head: str
    short: str
    make: Callable[[Content], str]


def png_uri(png: bytes) -> str:
    """Return a PNG as an address that loads nothing."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def fact(run: RunData, keys: tuple[str, ...], default: str = "") -> str:
    """Return what the run says under the first of these keys that has a text."""
    facts = {k.upper(): v for k, v in run.facts.items()}
    return next((facts[k] for k in keys if facts.get(k)), default)


def _light_curve(content: Content) -> str:
    run, curves = content.run, ([content.run.target] if content.run.target else []) + content.stars
    asked = run.settings.get("ra") is not None
    note = "" if run.target else f'<p class="note">{_TARGET_LOST if asked else _NO_TARGET}</p>'
    if not curves:
        return note + "<p>No star has a light curve: too few images were subtracted.</p>"
    offer = '<p class="note">The selector offers the stars that vary most.</p>' if content.stars else ""
    image = ""
    if content.target_png:
        image = f'<img alt="Light curve of the target" src="{png_uri(content.target_png)}" width="100%">'
    still = f"<noscript>{image}<p>The chart needs JavaScript.</p></noscript>"
    data = f'<script id="lightcurve-data" type="application/json">{curves_json(curves, run.epochs)}</script>'
    return f"{note}{offer}{controls([c.label for c in curves])}{still}{data}{_target_place(run)}"


def _target_place(run: RunData) -> str:
    """Where the target is, whose place that is, and how well it is known, as far as the run says so."""
    place, rows = run.place, {}
    if {"ra", "dec"} <= place.keys():
        rows["target"] = f"RA {place['ra']:.7f}, Dec {place['dec']:.7f} deg".replace("-", "\N{MINUS SIGN}")
    if {"x", "y"} <= place.keys():
        rows["on the reference"] = f"x {place['x']:.3f}, y {place['y']:.3f} px".replace("-", "\N{MINUS SIGN}")
    if "position" in place:
        rows["taken from"] = str(place["position"])
    errors = [f"{place[k]:.2g} px in {axis}" for k, axis in (("x_err", "x"), ("y_err", "y")) if k in place]
    if "position_err_arcsec" in place:
        errors.append(f"{place['position_err_arcsec']:.2g} arcsec per axis")
    if errors:
        rows["error"] = ", ".join(errors)
    if "variation_sigma" in place:
        rows["variation"] = f"{place['variation_sigma']:.3g} σ, all epochs together"
    return definitions(rows) if rows else ""


def _epochs(content: Content) -> str:
    run = content.run
    if not run.epochs:
        return "<p>The run has no image.</p>"
    common = common_facts(run.epochs)
    note = (
        f"{f'All images: {escape(common)}. ' if common else ''}A click on a column's head sorts; a name leads to its "
        f"stamps; a flag to its meaning.{' Rows in grey were not selected.' if run.count('skipped') else ''}"
    )
    return f'<p class="note">{note}</p>{epoch_table(run)}'


def _stamps(content: Content) -> str:
    run, stamps = content.run, content.stamps
    if not stamps:
        return "<p>There is no difference image to show.</p>"
    n_ok = run.count("ok")
    chosen = "" if len(stamps) == n_ok else f" {len(stamps)} of {n_ok} epochs are shown: {_choice(run, stamps)}."
    centre = "the target (ring)" if stamps[0].marks else "the centre of the region"
    note = (
        f'<p class="note">Around {centre}, left to right: reference, image, difference in units of its error.{chosen} '
        f'<span class="key">\N{MINUS SIGN}{CLIP_SIGMA:.0f} σ <i></i> +{CLIP_SIGMA:.0f} σ</span> '
        '<span class="key"><i class="masked"></i> masked</span>; x to the right, y upwards.</p>'
    )
    return f'{note}<div class="gallery">{"".join(_stamp(s) for s in stamps)}</div>'


def _choice(run: RunData, stamps: list[Stamp]) -> str:
    if sum(e.difference is not None for e in run.epochs) <= len(stamps):
        return "those with a difference file"
    peak = "those in which the target differs most, " if run.target else ""
    return f"the first and the last, {peak}those with chi² farthest from 1, and some spread over the others"


def _stamp(stamp: Stamp) -> str:
    epoch, (height, width) = stamp.epoch, stamp.strip.shape[:2]
    alt = escape(f"Reference, image and difference of {epoch.name}")
    marks = "".join(f'<i class="mark" style="left:{100 * x:.2f}%;top:{100 * y:.2f}%"></i>' for x, y in stamp.marks)
    file = f' · <a href="difference/{quote(epoch.difference.name)}">FITS</a>' if epoch.difference else ""
    known = np.isfinite(epoch["chi2"]) and not epoch.flags & FRAME_FLAGS.is_reference  # itself minus itself
    chi2 = f" · chi²\N{NO-BREAK SPACE}{epoch['chi2']:.3g}" if known else ""
    return (
        f'<figure id="stamp-{epoch.index}"><div class="strip"><img loading="lazy" decoding="async" width="{width}" '
        f'height="{height}" alt="{alt}" src="{png_uri(encode_png(stamp.strip))}">{marks}</div><figcaption>'
        f'<a href="#epoch-{epoch.index}">{escape(epoch.name)}</a>{chi2}{file} {flag_badges(epoch.flags)}'
        "</figcaption></figure>"
    )


def picture_pair(light_dark: tuple[bytes, bytes], alt: str) -> str:
    """Return a figure that is light or dark as the page is."""
    light, dark = map(png_uri, light_dark)
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img loading="lazy" alt="{escape(alt)}" src="{light}"></picture>'
    )


def _scatter(content: Content) -> str:
    scatter = content.scatter
    if not len(scatter):
        return "<p>No star was measured in three independent epochs, so its scatter is not known.</p>"
    low, middle, high = np.percentile(scatter.ratio, [16, 50, 84])
    picture = picture_pair(content.scatter_png, "Measured scatter of every star against its stated error")
    text = (
        f"<p>Median ratio of measured to expected scatter: <b>{middle:.3f}</b> ({low:.3f} to {high:.3f} holds the "
        f"middle 68 % of {len(scatter)} stars). Perfect errors would give {scatter.ideal:.3f} with "
        f"{int(np.median(scatter.n_epochs))} epochs: the median of a few measurements lies a little below 1.</p>"
    )
    return f'<div class="plot">{picture}<div>{text}<p class="note">{_SCATTER_NOTE}</p></div></div>'


def _conditions(content: Content) -> str:
    epochs = content.run.epochs
    items = []
    for column, label in (("fwhm", "FWHM (px)"), ("sky", "sky (ADU)"), ("scale", "photometric scale")):
        values = np.array([e[column] for e in epochs])
        if np.isfinite(values).any():
            low, middle, high = np.nanmin(values), np.nanmedian(values), np.nanmax(values)
            span = f"{middle:.4g} ({low:.4g} to {high:.4g})".replace("-", "\N{MINUS SIGN}")
            items.append(f"<dt>{label}</dt><dd>median {span}</dd>")
    note = '<p class="note">Crosses and dotted lines: images that failed or were skipped.</p>'
    picture = picture_pair(content.conditions_png, "Seeing, sky, photometric scale and chi² against time")
    return f'<div class="plot">{picture}<div><dl>{"".join(items)}</dl>{note}</div></div>'


def _kernels(content: Content) -> str:
    figures = "".join(_kernel(s.epoch.name, s.kernel) for s in content.stamps if s.kernel is not None)
    if not figures:
        return "<p>There is no kernel to show.</p>"
    note = (
        '<p class="note">The kernel that turns the reference into each image, at the centre of the region; every '
        "kernel on its own colour scale (blue negative, red positive).</p>"
    )
    return f'{note}<div class="gallery small">{figures}</div>'


def _kernel(name: str, kernel: FloatArray) -> str:
    picture = png_uri(encode_png(kernel_picture(kernel)))
    return (
        f'<figure><img loading="lazy" alt="{escape(f"Kernel of {name}")}" width="{kernel.shape[1]}" '
        f'height="{kernel.shape[0]}" src="{picture}">'
        f"<figcaption>{escape(name)}<br>sum {np.nansum(kernel):.3f}</figcaption></figure>"
    )


def _variables(content: Content) -> str:
    table = content.run.variables[:_MOST_ROWS]
    if not len(table):
        return ""
    columns = [numbers_column("rank", "1: the most significant", numbers(table, "rank")),
               texts_column("star", "source_id", words(table, "source_id"))]
    columns += _number_columns(table, _VARIABLE_COLUMNS)
    columns.append(flags_column("flags", "of the star over all epochs", numbers(table, "flags", 0).astype(int).tolist(),
                                SOURCE_FLAGS))
    more = len(content.run.variables) - len(table)
    note = (
        "All stars in order of how significantly they vary: the score says by how many sigma a star's chi² is beyond "
        f"that of stars of like brightness.{f' {more} more are in variables.ecsv.' if more else ''}"
    )
    place = table_place("variables", columns, "Table of stars", "variables.ecsv")
    return f'<p class="note">{note}</p>{place}'


_VARIABLE_COLUMNS = (
    ("score", "score", 4, None), ("chi2", "chi²", 4, None), ("von_neumann", "von Neumann", 3, None),
    ("stetson_j", "Stetson J", 3, None), ("amplitude", "amplitude (ADU)", 4, None), ("excess", "excess (ADU)", 4, None),
    ("n_good", "epochs", 6, None), ("flux_ref", "flux (ADU)", 5, None), ("mag", "mag", 5, 3), ("x", "x", 6, 1),
    ("y", "y", 6, 1), ("ra", "RA (deg)", 9, 5), ("dec", "Dec (deg)", 9, 5), ("beside", "beside", 12, None),
)  # fmt: skip


def _number_columns(table: Any, wanted: tuple[tuple[str, str, int, int | None], ...]) -> list[dict[str, Any]]:
    return [
        numbers_column(head, table[name].description or name, numbers(table, name), digits=digits, decimals=decimals)
        for name, head, digits, decimals in wanted
        if name in table.colnames and np.isfinite(numbers(table, name)).any()
    ]


def _candidates(content: Content) -> str:
    run, table = content.run, content.run.candidates[:_MOST_ROWS]
    if not table.colnames:  # no search was asked for
        return ""
    if not len(table):
        return "<p>The search of the differences found nothing.</p>"
    flags = dict(zip(words(table, "id"), numbers(table, "flags", 0).astype(int).tolist(), strict=True))
    shown = list(content.thumbnails.items())[:_MOST_CANDIDATES]
    pictures = "".join(_candidate(number, strip, flags.get(str(number), 0)) for number, strip in shown)
    columns = [texts_column("candidate", "id", words(table, "id"), "name", link="candidate-picture", by_text=True)]
    columns += _number_columns(table, _CANDIDATE_COLUMNS)
    columns += [texts_column("image", "of the most significant detection", words(table, "image")),
                flags_column("flags", "of half of its detections", list(flags.values()), CANDIDATE_FLAGS)]
    note = (
        f"{len(run.candidates)} places where a difference holds what varies or is new; one row each, the most "
        "significant first. Pictures: reference, image, difference and score of the most significant detection, "
        "those without a doubtful flag first."
    )
    place = table_place("candidates", columns, "Table of candidates", "candidates.ecsv")
    return f'<p class="note">{note}</p><div class="gallery">{pictures}</div>{place}'


_CANDIDATE_COLUMNS = (
    ("score", "score (σ)", 4, None), ("n_epochs", "epochs", 5, None), ("n_positive", "positive", 5, None),
    ("n_negative", "negative", 5, None), ("flux_diff", "flux difference (ADU)", 5, None), ("x", "x", 6, 1),
    ("y", "y", 6, 1), ("ra", "RA (deg)", 9, 5), ("dec", "Dec (deg)", 9, 5), ("first_mjd", "first MJD", 9, 4),
    ("last_mjd", "last MJD", 9, 4), ("fwhm", "FWHM (px)", 3, None), ("source_id", "nearest star", 12, None),
    ("distance", "distance (px)", 3, None),
)  # fmt: skip


def _candidate(number: int, strip: Picture, flags: int) -> str:
    names = ", ".join(CANDIDATE_FLAGS.decode(flags))
    return (
        f'<figure id="candidate-picture-{number}"><img loading="lazy" width="{strip.shape[1]}" '
        f'height="{strip.shape[0]}" alt="Candidate {number}: reference, image, difference, score" '
        f'src="{png_uri(encode_png(strip))}"><figcaption><b>{number}</b> {escape(names)}</figcaption></figure>'
    )


def _time(content: Content) -> str:
    stages, wall = content.run.stages, content.run.wall
    total = sum(stages.values())
    if not total > 0:
        return ""
    most = max(stages, key=lambda name: stages[name])
    rows = "".join(
        f'<dt>{escape(name)}</dt><dd class="bar"><i style="width:{70 * seconds / stages[most]:.1f}%"></i> '
        f"{seconds:.3g} s ({100 * seconds / total:.0f} %)</dd>"
        for name, seconds in sorted(stages.items(), key=lambda stage: -stage[1])
    )
    n = len(content.run.epochs)
    whole = f" The run took {wall:.4g} s, {wall / n:.3g} s an image." if np.isfinite(wall) and n else ""
    return (
        f"<p>Most of the time went to <b>{escape(most)}</b>.{whole}</p><dl>{rows}</dl>"
        f'<p class="note">{_STAGES_NOTE}</p>'
    )


def _settings(content: Content) -> str:
    run = content.run
    settings = definitions(flat_settings(run.settings)) if run.settings else "<p>run.toml could not be read.</p>"
    summary = "<summary>What the files say of the run (header of the reference)</summary>"
    facts = f"<details>{summary}{definitions(run.facts)}</details>" if run.facts else ""
    libraries = {name: run.facts[name.upper()] for name in _LIBRARIES if name.upper() in run.facts}
    versions = definitions({"gpudia": version_of(run), "backend": backend_of(run), "reference": reference_of(run),
                            **libraries})
    return f"{versions}<h3>run.toml</h3>{settings}{facts}"


def version_of(run: RunData) -> str:
    """Version of gpudia that made the run."""
    return fact(run, ("GPUDIA", "GPUDIAV", "GPUDIA_VERSION", "VERSION"), gpudia.__version__)


def backend_of(run: RunData) -> str:
    """Where the numbers were computed, empty where it is not known."""
    return fact(run, ("BACKEND",)) or str(run.settings.get("backend", ""))


def reference_of(run: RunData) -> str:
    """Name of the reference, empty where it is not known."""
    flagged = [e.name for e in run.epochs if e.flags & FRAME_FLAGS.is_reference]
    return fact(run, ("REFERENC", "REFNAME", "REFID", "REFERENCE")) or ", ".join(flagged[:3])


def flat_settings(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings by name as texts, those of tables with the table's name before them."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update(flat_settings(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = _setting(value)
    return flat


def _setting(value: Any) -> str:
    if isinstance(value, list) and len(value) > 6:
        return f"{value[0]} … {value[-1]} ({len(value)} entries)"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def definitions(pairs: dict[str, str]) -> str:
    """Return names and texts as a list."""
    texts = ((escape(printable(k)), escape(printable(v)) or "not stated") for k, v in pairs.items())
    items = "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in texts)
    return f"<dl>{items}</dl>"


#: In the order of the page. What a run has no data for returns an empty text and is left out.
SECTIONS = (
    Section("lightcurve", "Light curve", "Light curve", _light_curve),
    Section("epochs", "Epochs", "Epochs", _epochs),
    Section("stamps", "Stamps", "Stamps", _stamps),
    Section("variables", "Stars that vary", "Variables", _variables),
    Section("candidates", "Found in the differences", "Candidates", _candidates),
    Section("scatter", "Scatter of the stars", "Scatter", _scatter),
    Section("conditions", "Seeing, sky, scale", "Conditions", _conditions),
    Section("kernels", "Kernels", "Kernels", _kernels),
    Section("failures", "What failed, and why", "Failures", lambda content: failures(content.run.epochs)),
    Section("time", "Where the time went", "Time", _time),
    Section("settings", "Settings and versions", "Settings", _settings),
    Section("flags", "Flags", "Flags", lambda _: flag_legend()),
)
