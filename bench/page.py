"""The page of long runs: time to write, size, time to open in Chromium, screenshots.

    python bench/page.py [--epochs 1000 10000] [--keep FOLDER]

Output folders are made up (epochs.ecsv, target.ecsv, lightcurves.fits of 300 stars, reference.fits, variables.ecsv and
48 difference images; a twentieth of the images failed), then `write_report` reads them. Opening: from the start of
navigation to the page's load event and until it is laid out, as the page's own clock has them, and the wall time of a
headless Chromium that opens the page and prints its document. Sorting, going to the last row and zooming are timed in
the page. Writes bench/results/page.json; with --keep the pages and pictures at 1280 and 390 px width.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
import time
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.table import Table
from astropy.time import Time
from astropy.timeseries import TimeSeries
from astropy.wcs import WCS
from common import save

from gpudia.flags import FRAME_FLAGS
from gpudia.report import write_report
from gpudia.simulate import SimulationSettings, simulate_field

STARS, SHAPE = 300, (250, 250)
PROBE = """<script>
addEventListener("load", () => {
  const times = { load: performance.now() };
  document.body.offsetHeight;
  times.drawn = performance.now();
  const heads = document.querySelectorAll("table.sortable th button"), start = performance.now();
  heads[5].click(); document.body.offsetHeight;
  times.sort = performance.now() - start;
  const n = JSON.parse(document.querySelector("#table-epochs").textContent).rows - 1, then = performance.now();
  location.hash = `epoch-${n}`;
  dispatchEvent(new Event("hashchange")); document.body.offsetHeight;
  times.find = performance.now() - then;
  const zoomed = performance.now();
  document.querySelector("[data-action=in]").click(); document.body.offsetHeight;
  times.zoom = performance.now() - zoomed;
  times.rows = document.querySelectorAll("#epochs tbody tr").length;
  times.elements = document.querySelectorAll("*").length;
  document.body.dataset.times = JSON.stringify(times);
});
</script>"""


def make_output(folder: Path, n: int) -> None:
    """Write the output folder of a run of n images, as `gpudia run` would have."""
    rng = np.random.default_rng(n)
    folder.mkdir(parents=True)
    names = [f"lsc1m009-fa04-{20260401 + k // 60}-{k % 1000:04d}-e91" for k in range(n)]
    names = [f"{name}-{k}" for k, name in enumerate(names)]
    ok = rng.random(n) > 0.05
    mjd = 61000 + np.sort(rng.uniform(0, 300, n))
    event = 3000 / np.hypot(0.15, (mjd - 61160) / 25)
    epochs = _epochs(rng, names, mjd, ok)
    epochs.write(folder / "epochs.ecsv", format="ascii.ecsv")
    good = np.flatnonzero(ok)
    sources, planes = _stars(rng, len(good))
    sources.write(folder / "variables.ecsv", format="ascii.ecsv")
    tables = [fits.BinTableHDU(sources, name="SOURCES"), fits.BinTableHDU(Table(epochs[good], meta={}), name="EPOCHS")]
    images = [fits.ImageHDU(plane, name=name) for name, plane in planes.items()]
    fits.HDUList([fits.PrimaryHDU(), *tables, *images]).writeto(folder / "lightcurves.fits")
    _target(rng, [names[k] for k in good], mjd[good], event[good]).write(folder / "target.ecsv", format="ascii.ecsv")
    (folder / "run.toml").write_text("frames = ['night']\nra = 268.0\ndec = -29.0\nkernel_size = 17\n")
    _images(folder, [names[k] for k in good[np.linspace(0, len(good) - 1, 48).astype(int)]])


def _epochs(rng: np.random.Generator, names: list[str], mjd: np.ndarray, ok: np.ndarray) -> Table:
    n = len(names)
    files = [f"/data/season/2026/{name}.fits.fz" for name in names]
    columns: dict[str, Any] = {"file": files, "name": names, "mjd": mjd,
                               "bjd_tdb": mjd + 2400000.5, "exptime": np.full(n, 300.0), "filter": ["ip"] * n,
                               "instrument": ["fa04"] * n}
    flags = np.where(rng.random(n) < 0.3, FRAME_FLAGS.resampled, 0) | np.where(rng.random(n) < 0.1, 32, 0)
    reasons = rng.choice(["stars of the image must be at least 3, got 0", "file must be complete, got a truncated one",
                          "no trustworthy match with the reference"], n)
    columns |= {"status": np.where(ok, "ok", "failed"), "reason": np.where(ok, "", reasons), "flags": flags}
    for name, low, high in (("airmass", 1, 2), ("fwhm", 3, 7), ("ellipticity", 0, 0.2), ("sky", 200, 3000),
                            ("sky_noise", 10, 60), ("saturated_fraction", 0, 1e-3)):
        columns[name] = rng.uniform(low, high, n)
    columns["n_stars"] = rng.integers(200, 2000, n)
    for name, centre, width in (("shift_x", 0, 20), ("shift_y", 0, 20), ("registration_rms", 0.05, 0.01),
                                ("registration_max", 0.2, 0.03), ("registration_error", 0.02, 0.003),
                                ("scale", 0.85, 0.1), ("scale_err", 0.002, 1e-4), ("epsilon", 0, 1e-3),
                                ("epsilon_err", 1e-3, 1e-4), ("chi2", 1, 0.02), ("noise_gain", 0.3, 0.05)):
        columns[name] = np.where(ok, rng.normal(centre, width, n), np.nan)
    for name in ("n_matched", "n_masked", "n_clipped", "n_pixels", "iterations"):
        columns[name] = np.where(ok, rng.integers(5, 3000, n), -1)
    columns["seconds"] = rng.uniform(0.03, 0.06, n).round(3)
    stages = {"read": 0.012, "look": 0.006, "register": 0.002, "solve": 0.015, "photometry": 0.006, "write": 0.004}
    meta = {"BACKEND": "numpy", "OBJECT": "OB260123", "REFERENC": names[0], "GPUDIA": "0.1.0",
            "stages": {name: seconds * n for name, seconds in stages.items()}, "wall": 0.05 * n}
    return Table(columns, meta=meta)


def _stars(rng: np.random.Generator, n: int) -> tuple[Table, dict[str, np.ndarray]]:
    flux = 300 * 10 ** rng.uniform(0, 2.5, STARS)
    error = np.sqrt(flux / 2 + 400)
    difference = (rng.normal(size=(n, STARS)) * error).astype(np.float32)
    difference[:, :5] += (30 * error[:5] * np.sin(np.arange(n) / 7)[:, None]).astype(np.float32)
    errors = np.broadcast_to(error, difference.shape).astype(np.float32)
    planes = {"FLUX_DIFF": difference, "FLUX_DIFF_ERR": errors, "FLUX": (difference + flux).astype(np.float32),
              "FLUX_ERR": errors, "FLAGS": np.zeros(difference.shape, np.int32)}
    chi2 = (difference**2 / errors**2).mean(axis=0)
    one = np.arange(1, STARS + 1)
    table = Table({"rank": one, "source_id": one,
                   "ra": 268 + rng.normal(0, 0.01, STARS), "dec": -29 + rng.normal(0, 0.01, STARS),
                   "x": rng.uniform(5, 245, STARS), "y": rng.uniform(5, 245, STARS), "flux_ref": flux,
                   "flux_ref_err": error, "n_good": np.full(STARS, n), "chi2": chi2,
                   "score": (chi2 - 1) * np.sqrt(n / 2),
                   "flags": np.zeros(STARS, np.int32)})
    return table, planes


def _target(rng: np.random.Generator, names: list[str], mjd: np.ndarray, event: np.ndarray) -> TimeSeries:
    error = np.full(len(names), 120.0)
    difference = event - 1000 + rng.normal(0, 120, len(names))
    flux = difference + 1200
    mag = np.where(flux > 360, 25 - 2.5 * np.log10(np.maximum(flux, 1)), np.nan)
    return TimeSeries(time=Time(mjd, format="mjd"), data={
        "image": names, "flux_diff": difference, "flux_diff_err": error, "flux_ref": error + 1080, "flux": flux,
        "flux_err": error, "mag": mag, "mag_err": 1.0857 * error / flux,
        "limit": np.where(np.isfinite(mag), np.nan, 18.6), "flags": np.zeros(len(names), np.int32)})


def _images(folder: Path, names: list[str]) -> None:
    series = simulate_field(SimulationSettings(shape=SHAPE, n_epochs=1, seed=2))
    image, error = series.frames[0].data, np.sqrt(np.maximum(series.frames[0].data, 1))
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval = ["RA---TAN", "DEC--TAN"], [268.0, -29.0]
    wcs.wcs.crpix, wcs.wcs.cdelt = [125, 125], [-1e-4, 1e-4]
    mask = np.zeros(SHAPE, np.uint8)
    header = wcs.to_header()
    planes = [fits.ImageHDU(image, header, name="IMAGE"), fits.ImageHDU(error, name="ERR"),
              fits.ImageHDU(mask, name="MASK")]
    fits.HDUList([fits.PrimaryHDU(), *planes]).writeto(folder / "reference.fits")
    (folder / "difference").mkdir()
    rng, offset = np.random.default_rng(0), np.arange(17) - 8
    for name in names:
        noise = (rng.normal(size=SHAPE) * error).astype(np.float32)
        kernel = np.exp(-(offset[:, None] ** 2 + (offset - rng.normal()) ** 2) / 6)
        hdus = {"DIFF": noise, "MODEL": image, "ERR": error, "MASK": mask, "KERNEL": kernel / kernel.sum(),
                "BKG": np.zeros(3)}
        parts = [fits.ImageHDU(data, name=key) for key, data in hdus.items()]
        fits.HDUList([fits.PrimaryHDU(), *parts]).writeto(folder / "difference" / f"{name}.fits")


def chromium(page: Path, *options: str) -> str:
    """Open a page in a headless browser of its own and return what it prints."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("no chromium: the page cannot be opened")
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                   f"--user-data-dir={profile}", *options, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


def measure(folder: Path, n: int) -> dict[str, Any]:
    """Make a run of n images and its page, and open that."""
    make_output(folder, n)
    start = time.perf_counter()
    page = write_report(folder)
    written = time.perf_counter() - start
    source = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8"))
    probe = page.with_name("probe.html")
    probe.write_text(source.replace("</footer>", "</footer>" + PROBE), encoding="utf-8")
    start = time.perf_counter()
    document = chromium(probe, "--dump-dom")
    wall = time.perf_counter() - start
    probe.unlink()
    found = re.search(r'data-times="([^"]*)"', document)
    if found is None:
        raise SystemExit("the page did not come to its load event")
    times = json.loads(unescape(found[1]))
    return {"epochs": n, "bytes": page.stat().st_size, "write_report_s": round(written, 2),
            **{f"{key}_ms": round(times[key]) for key in ("load", "drawn", "sort", "find", "zoom")},
            "rows_in_document": times["rows"], "elements": times["elements"], "chromium_dump_dom_s": round(wall, 2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--keep", type=Path, help="folder for the pages and pictures")
    args = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        for n in args.epochs:
            folder = Path(temporary) / str(n)
            figures[str(n)] = measure(folder, n)
            if args.keep:
                args.keep.mkdir(exist_ok=True)
                page = Path(shutil.copy(folder / "report.html", args.keep / f"page_{n}.html")).resolve()
                for width in (1280, 390):
                    chromium(page, "--virtual-time-budget=5000", f"--window-size={width},2400",
                             f"--screenshot={page.with_name(f'page_{n}_{width}.png')}")
    save("page", figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
