"""The page of a run: one HTML file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib import resources
from string import Template

import numpy as np

import gpudia
from gpudia.report.data import RunData
from gpudia.report.scatter import Scatter
from gpudia.report.sections import SECTIONS, Content, backend_of, fact, reference_of, version_of

__all__ = ["assemble", "build_page", "tile_list"]


def build_page(content: Content) -> str:
    """Return the HTML of a run's report, with the sections that it has data for."""
    made = [(s.anchor, s.head, s.short, s.make(content)) for s in SECTIONS]
    return assemble(_title(content.run), _summary(content.run), _tiles(content.run, content.scatter),
                    [section for section in made if section[3]], _doubts(content.run.doubts))


def assemble(title: str, summary: str, tiles: str, sections: Sequence[tuple[str, str, str, str]],
             doubts: str = "") -> str:
    """Return a page.

    Parameters
    ----------
    title : str
        Text.
    summary, tiles : str
        HTML of the head.
    sections : sequence of tuple of str
        Anchor, head, name in the navigation, HTML.
    doubts : str
        HTML after the summary.
    """
    scripts = [_package_text(name) for name in ("table.js", "chart.js")]
    return Template(_package_text("page.html")).substitute(
        title=escape(title),
        style=_package_text("page.css"),
        script_hashes=" ".join(map(_hash, scripts)),
        scripts="".join(f"<script>{script}</script>" for script in scripts),
        summary=summary,
        doubts=doubts,
        tiles=tiles,
        navigation=" ".join(f'<a href="#{anchor}">{escape(short)}</a>' for anchor, _, short, _ in sections),
        sections="\n".join(
            f'<section id="{anchor}"><h2>{escape(head)}</h2>{html}</section>' for anchor, head, _, html in sections
        ),
        footer=f"Made by gpudia {escape(gpudia.__version__)}. The page loads nothing from the network.",
    )


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _package_text(name: str) -> str:
    return resources.files("gpudia.report").joinpath(name).read_text(encoding="utf-8")


def _field(run: RunData) -> str:
    name = fact(run, ("OBJECT",))
    ra, dec = run.settings.get("ra"), run.settings.get("dec")
    place = f"RA {_degrees(ra)}, Dec {_degrees(dec)}" if ra is not None and dec is not None else ""
    return ", ".join(part for part in (name, place) if part) or "the whole frame"


def _degrees(value: object) -> str:
    return f"{value:.6f}" if isinstance(value, float) else str(value)


def _title(run: RunData) -> str:
    return f"Difference photometry of {fact(run, ('OBJECT',)) or _field(run)}"


def _summary(run: RunData) -> str:
    n_ok, n_failed, n_skipped = (run.count(s) for s in ("ok", "failed", "skipped"))
    name = reference_of(run)
    reference = f" from the reference <b>{escape(name)}</b>" if name else ""
    backend = backend_of(run)
    seconds = np.nansum([e["seconds"] for e in run.epochs])
    return (
        f"{n_ok} of {len(run.epochs)} images of {escape(_field(run))} were subtracted{reference}; "
        f"{n_failed} failed and {n_skipped} {'was' if n_skipped == 1 else 'were'} skipped. Computed by gpudia "
        f"{escape(version_of(run))}"
        f"{f' on the backend {escape(backend)}' if backend else ''} in {seconds:.3g} s of work on the images; "
        f"page written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
    )


def _doubts(texts: Sequence[str]) -> str:
    """What the run says against its numbers; each text begins as a sentence."""
    items = "".join(f"<li>{_unbroken(escape(text[:1].upper() + text[1:]))}.</li>" for text in texts)
    return f'<aside class="doubts"><h2>Doubts about these numbers</h2><ul>{items}</ul></aside>' if texts else ""


def _unbroken(html: str) -> str:
    """Keep the options in a text on one line: a browser breaks them after their hyphens."""
    return re.sub(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*", r"<code>\g<0></code>", html)


def _tiles(run: RunData, scatter: Scatter) -> str:
    tiles = [(s, str(run.count(s)), s) for s in ("ok", "failed", "skipped")]
    chi2 = np.array([e["chi2"] for e in run.epochs if e.status == "ok"])
    if np.isfinite(chi2).any():
        tiles.append(("", f"{np.nanmedian(chi2):.3f}", "median chi² per pixel"))
    if len(scatter):
        tiles.append(("", f"{np.median(scatter.ratio):.3f}", f"scatter / stated error (ideal {scatter.ideal:.3f})"))
    return tile_list([*tiles, ("", str(len(run.sources)), "stars")])


def tile_list(tiles: Sequence[tuple[str, str, str]]) -> str:
    """Return tiles of the head: class, value, label."""
    items = ((c, escape(value), escape(label)) for c, value, label in tiles)
    return "".join(f'<li class="{c}"><b>{value}</b><span>{label}</span></li>' for c, value, label in items)
