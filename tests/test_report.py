"""The report of a run: what the page says, that it loads nothing, that hostile names stay text."""

import base64
import json
import re
import shutil
import subprocess
import sys
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from astropy.time import Time
from astropy.timeseries import TimeSeries
from astropy.wcs import WCS

from gpudia.errors import InputError
from gpudia.flags import CANDIDATE_FLAGS, FRAME_FLAGS, PIXEL_FLAGS, SOURCE_FLAGS
from gpudia.pipeline.executors import Readers, WorkerDied
from gpudia.report import write_report
from gpudia.report.data import frame_name, read_run
from gpudia.report.scatter import most_variable, running_median, star_scatter
from gpudia.report.stamps import choose_epochs, make_stamps

HOSTILE = "<script>alert(1)<'script>\"&$x^$"
CHECK = Path(__file__).resolve().parents[2] / "shared" / "contract" / "check_output.py"
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


# ---------- a run's folder with made-up but plausible numbers ----------


def make_run(folder, n_epochs=5, n_stars=60, target=True, all_failed=False, shape=(90, 110), seed=3,
             images=None):
    """Write the output folder of a run; the second epoch fails, the first is the reference, names are hostile."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"frame_{i:03d}" for i in range(n_epochs)]
    names[-1] = HOSTILE
    status = ["failed" if all_failed or i == 1 else "ok" for i in range(n_epochs)]
    epochs = _epochs(rng, names, status)
    ok = np.array(status) == "ok"
    sources = _sources(rng, n_stars, shape)
    planes = _planes(rng, sources, int(ok.sum()))
    sources["chi2"] = planes["FLUX"].var(axis=0, ddof=1) / (planes["FLUX_ERR"] ** 2).mean(axis=0) if ok.any() else 0.0
    epochs.write(folder / "epochs.ecsv", format="ascii.ecsv", overwrite=True)
    _write_lightcurves(folder / "lightcurves.fits", sources, epochs[ok], planes)
    _write_images(folder, rng, [n for n, good in zip(names, ok, strict=True) if good][:images], sources, shape, target)
    if target and ok.any():
        _target(rng, epochs[ok]).write(folder / "target.ecsv", format="ascii.ecsv", overwrite=True)
    where = "ra = 253.4659\ndec = 62.9002\n" if target else ""
    (folder / "run.toml").write_text(f"frames = {json.dumps(names)}\n{where}[fit]\nkernel_size = 17\n")
    (folder / "journal.jsonl").write_text("{}\n")
    (folder / "gpudia.log").write_text("")
    return folder


def _epochs(rng, names, status):
    n = len(names)
    ok = np.array(status) == "ok"
    flags = np.zeros(n, dtype=int)
    flags[0] = FRAME_FLAGS.is_reference
    flags[-1] = FRAME_FLAGS.deconvolving | FRAME_FLAGS.gain_guessed

    def good(values):
        return np.where(ok, values, np.nan)

    reasons = ["" if good else f"star matches must be at least 3, got 0 in {HOSTILE}" for good in ok]
    columns = {
        "file": [f"/data/{name}.fits.fz" for name in names],
        "name": names,
        "mjd": 58000.1 + np.arange(n) * 3.03,
        "status": status,
        "reason": reasons,
        "flags": flags,
        "fwhm": rng.uniform(3, 5, n),
        "sky": rng.uniform(100, 900, n),
        "shift_x": good(rng.normal(0, 20, n)),
        "n_matched": rng.integers(20, 80, n),
        "scale": good(rng.uniform(0.7, 1, n)),
        "scale_err": good(np.full(n, 0.002)),
        "epsilon": good(rng.normal(0, 1e-3, n)),
        "chi2": good(rng.normal(1, 0.02, n)),
        "noise_gain": good(rng.uniform(0.3, 1.1, n)),
        "n_masked": rng.integers(0, 300, n),
        "seconds": rng.uniform(0.1, 0.3, n),
    }
    return Table(columns, meta={"BACKEND": "numpy"})


def _sources(rng, n, shape):
    flux = 300 * 10 ** rng.uniform(0, 2.5, n)
    flags = np.zeros(n, dtype=np.int32)
    flags[0] = SOURCE_FLAGS.variable
    return Table(
        {
            "source_id": np.arange(1, n + 1),
            "ra": 253.4659 + rng.normal(0, 0.01, n),
            "dec": 62.9002 + rng.normal(0, 0.01, n),
            "x": rng.uniform(5, shape[1] - 5, n),
            "y": rng.uniform(5, shape[0] - 5, n),
            "flux_ref": flux,
            "flux_ref_err": np.sqrt(flux),
            "n_good": np.full(n, 4),
            "flags": flags,
        }
    )


def _planes(rng, sources, n_epochs):
    """Constant stars whose errors are true, and one variable (the first)."""
    flux_ref = np.asarray(sources["flux_ref"])
    error = np.broadcast_to(np.sqrt(flux_ref + 400), (n_epochs, len(flux_ref)))
    difference = rng.normal(size=error.shape) * error
    difference[:, 0] += 40 * error[:, 0] * np.sin(np.arange(n_epochs))
    planes = {
        "FLUX_DIFF": difference,
        "FLUX_DIFF_ERR": error,
        "FLUX": flux_ref + difference,
        "FLUX_ERR": error,
    }
    return {k: v.astype(np.float32) for k, v in planes.items()} | {"FLAGS": np.zeros(error.shape, dtype=np.int32)}


def _write_lightcurves(path, sources, epochs, planes):
    tables = [fits.BinTableHDU(t, name=n) for t, n in ((sources, "SOURCES"), (epochs, "EPOCHS"))]
    images = [fits.ImageHDU(v if v.size else None, name=k) for k, v in planes.items()]
    fits.HDUList([fits.PrimaryHDU(), *tables, *images]).writeto(path, overwrite=True)


def _write_images(folder, rng, names, sources, shape, target):
    y, x = np.indices(shape)
    image = rng.normal(200, 5, shape)
    for star in sources:
        image += star["flux_ref"] / 28 * np.exp(-((x - star["x"]) ** 2 + (y - star["y"]) ** 2) / 9)
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval = ["RA---TAN", "DEC--TAN"], [253.4659, 62.9002]
    wcs.wcs.crpix, wcs.wcs.cdelt = [shape[1] * 0.6, shape[0] * 0.5], [-1e-4, 1e-4]
    primary = fits.PrimaryHDU()
    primary.header["OBJECT"] = "LHS <b>3250</b>"
    primary.header["REFERENC"] = "frame_000"
    mask = (rng.random(shape) < 0.01).astype(np.uint8)
    planes = [("IMAGE", image), ("ERR", np.sqrt(image)), ("MASK", mask)]
    hdus = [primary, *(fits.ImageHDU(d, name=n, header=wcs.to_header() if n == "IMAGE" else None) for n, d in planes)]
    fits.HDUList([*hdus, fits.BinTableHDU(sources, name="CATALOG")]).writeto(folder / "reference.fits", overwrite=True)
    (folder / "difference").mkdir(exist_ok=True)
    for name in names:
        _write_difference(folder / "difference" / f"{name}.fits", rng, image, mask, wcs)


def _write_difference(path, rng, image, mask, wcs):
    error = np.sqrt(np.maximum(image, 1))
    column, row = int(wcs.wcs.crpix[0]) - 1, int(wcs.wcs.crpix[1]) - 1
    difference = rng.normal(size=image.shape) * error
    y, x = np.indices(image.shape)
    difference += 300 * np.exp(-((x - column) ** 2 + (y - row) ** 2) / 9)
    difference[mask != 0] = np.nan
    offset = np.arange(11) - 5
    kernel = np.exp(-(offset[:, None] ** 2 + (offset - rng.normal()) ** 2) / 4) + rng.normal(0, 0.02, (11, 11))
    planes = [("DIFF", difference), ("MODEL", image), ("ERR", error), ("MASK", mask)]
    planes += [("KERNEL", kernel / kernel.sum()), ("BKG", np.zeros_like(image))]
    fits.HDUList([fits.PrimaryHDU(), *(fits.ImageHDU(d, name=n) for n, d in planes)]).writeto(path, overwrite=True)


def _target(rng, epochs):
    n = len(epochs)
    flux_diff = np.linspace(-150, 3000, n)
    flux = flux_diff + 100.0
    error = np.full(n, 40.0)
    detected = flux > 3 * error
    magnitude = np.full(n, np.nan)
    magnitude[detected] = 25 - 2.5 * np.log10(flux[detected])
    columns = {
        "image": [str(f) for f in epochs["file"]],
        "flux_diff": flux_diff,
        "flux_diff_err": error,
        "flux_ref": np.full(n, 100.0),
        "flux": flux,
        "flux_err": error,
        "method": ["ap"] * n,
        "scale": np.asarray(epochs["scale"]),
        "scale_err": np.asarray(epochs["scale_err"]),
        "mag": magnitude,
        "mag_err": 1.0857 * error / np.abs(flux),
        "limit": np.where(detected, np.nan, 25 - 2.5 * np.log10(3 * error)),
        "flags": np.where(detected, 0, SOURCE_FLAGS.limit),
    }
    return TimeSeries(time=Time(epochs["mjd"], format="mjd", scale="utc"), data=columns)


# ---------- reading the page ----------


class Page(HTMLParser):
    """Tags with their attributes, visible text, and the nesting of elements checked."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.text, self.scripts, self._open, self.unbalanced = [], [], [], [], []
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        if self._open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self._open[-1:] != ["style"]:
            self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())

    def data(self, name):
        """The JSON of a script element; None where there is none of this id."""
        ids = [a.get("id") for a in self.all("script")]
        return json.loads(self.scripts[ids.index(name)]) if name in ids else None

    def points(self, curve=0, series=0):
        """The points of a light curve, as the script makes them."""
        data = self.data("lightcurve-data")
        one = data["curves"][curve]["series"][series]
        run = data["runs"][one["run"]]
        frames = {"name": "names", "epoch": "epochs", "mjd": "mjd"}
        columns = {k: [run[v][at] for at in one["at"]] for k, v in frames.items()} | {
            k: one[k] for k in one if k not in ("run", "at")}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def rows(self, name="epochs"):
        """The rows of a table: texts and numbers by the heads of the columns; of flags their names after the text."""
        data = self.data(f"table-{name}")
        return [{c["head"]: self._cell(c, i) for c in data["columns"]} for i in range(data["rows"])]

    @staticmethod
    def _cell(column, i):
        if column["kind"] == "number":
            return column["values"][i]
        if column["kind"] == "flags":
            names = [name for bit, name, _ in column["bits"] if column["values"][i] & bit]
            return " ".join([column["texts"][column["texts_of"][i]], *names]).strip()
        return column["texts"][column["values"][i]]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("run") / "out")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(output):
    return Page(output / "report.html")


def test_page_is_well_formed_with_sections_in_the_promised_order(page):
    assert page.unbalanced == []
    sections = [a["id"] for a in page.all("section")]
    assert sections == "lightcurve epochs stamps scatter conditions kernels failures settings flags".split()
    assert [a["href"] for a in page.all("a")][: len(sections)] == [f"#{name}" for name in sections]
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    inner = {a["href"][1:] for a in page.all("a") if a.get("href", "").startswith("#")}
    rows = {f"epoch-{i}" for i in range(5)}  # made by the script
    assert inner <= set(ids) | rows


def test_summary_counts_and_names_field_reference_backend_version(page):
    assert "4 of 5 images" in page.words
    assert "1 failed and 0 were skipped" in page.words
    for part in ("LHS <b>3250</b>", "frame_000", "numpy", "gpudia 0."):
        assert part in page.words


def test_the_series_table_is_shown_and_skipped_rows_are_grey_with_their_reasons(tmp_path):
    folder = make_run(tmp_path / "out", n_epochs=6)
    table = Table.read(folder / "epochs.ecsv", format="ascii.ecsv")
    table["filter"], table["instrument"] = ["rp"] * 5 + [HOSTILE], ["fa15"] * 5 + [""]
    table["exptime"], table["bjd_tdb"], table["n_stars"] = 60.0, 2460000.123456, [300, -1, 301, 302, 303, 304]
    table["airmass"] = np.nan
    table["status"] = ["ok", "failed", "ok", "ok", "skipped", "skipped"]
    table["reason"][4:] = ["not selected: fwhm < 6, got 7.1", "not selected: fwhm < 6, got 8.2"]
    table.write(folder / "epochs.ecsv", format="ascii.ecsv", overwrite=True)
    write_report(folder)
    page = Page(folder / "report.html")
    assert page.unbalanced == []
    note = page.words[page.words.index("All images: instrument fa15, exposure 60 s.") :]
    assert "Rows in grey were not selected." in note
    rows = page.rows()
    assert [r["status"] for r in rows] == ["ok", "failed", "ok", "ok", "skipped", "skipped"]
    assert rows[4]["why"] == "not selected: fwhm < 6, got 7.1"
    assert "airmass" not in rows[0]  # known of no frame
    assert "exposure (s)" not in rows[0]  # the same in all: said above
    assert "instrument" not in rows[0]
    assert [r["filter"] for r in rows] == ["rp"] * 5 + [HOSTILE]
    assert rows[0]["BJD (TDB)"] == 2460000.12346  # 12 digits are stored
    assert [r["stars"] for r in rows] == [300, None, 301, 302, 303, 304]  # not counted is not a number
    told = page.words[page.words.index("What failed, and why") : page.words.index("Settings and versions")]
    assert told.count("not selected: fwhm < 6") == 1  # one condition, two frames


def test_page_loads_nothing(page):
    loaded = [a.get(k, "") for t, a in page.tags if t != "a" for k in ("src", "srcset", "href") if k in a]
    assert loaded
    assert all(address.startswith("data:image/png;base64,") for address in loaded)
    assert not page.all("link")
    assert not page.all("iframe")
    assert not re.search(r"url\((?!#)|@import|https?://", page.source)
    policy = next(a["content"] for a in page.all("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_links_lead_to_files_of_the_folder(page, output):
    from urllib.parse import unquote

    files = [unquote(a["href"]) for a in page.all("a") if not a["href"].startswith("#")]
    assert len(files) == 4
    assert all((output / f).is_file() for f in files)


def test_hostile_text_stays_text(page):
    scripts = page.all("script")
    assert [a.get("type", "") for a in scripts].count("") == 2  # the others are data
    assert all(a["type"] == "application/json" for a in scripts if "type" in a)
    assert not any(k.startswith("on") for _, a in page.tags for k in a)
    assert "alert(1)" in page.words
    assert HOSTILE in [p["name"] for p in page.points()]
    assert HOSTILE in [row["image"] for row in page.rows()]
    assert "<b>3250" not in page.source
    assert any(HOSTILE in a.get("alt", "") for a in page.all("img"))


def test_every_image_has_a_text_and_is_a_png(page):
    for attrs in page.all("img"):
        assert attrs["alt"].strip()
        assert base64.b64decode(attrs["src"].split(",", 1)[1]).startswith(b"\x89PNG\r\n")


def test_plots_are_images_with_something_on_them(output):
    from matplotlib.image import imread

    names = {p.name for p in (output / "plots").iterdir()}
    assert names == {f"{n}.png" for n in "target_lightcurve stamps kernels constant_stars conditions variables".split()}
    for name in names:
        picture = imread(output / "plots" / name)
        assert min(picture.shape[:2]) > 100
        assert picture[..., :3].std() > 0.01


def test_table_has_every_epoch_with_decoded_flags(page):
    rows = page.rows()
    assert [r["image"] for r in rows] == ["frame_000", "frame_001", "frame_002", "frame_003", HOSTILE]
    assert "deconvolving gain_guessed" in rows[4]["why"]
    assert rows[1]["target flux (ADU)"] is None
    why = next(c for c in page.data("table-epochs")["columns"] if c["head"] == "why")
    assert any(name == "deconvolving" and "noise is amplified" in title for _, name, title in why["bits"])
    assert all(column["title"] for column in page.data("table-epochs")["columns"])


def test_failures_are_told_with_their_reason(page):
    start = page.words.index("What failed, and why")
    told = page.words[start : page.words.index("Settings and versions")]
    assert "star matches must be at least 3, got 0" in told
    assert "frame_001.fits.fz" in told
    assert "deconvolving 1 of 4" in told


def test_light_curve_data_are_those_of_the_target(page, output):
    target = TimeSeries.read(output / "target.ecsv", format="ascii.ecsv", time_column="time")
    points = page.points()
    assert [p["epoch"] for p in points] == [0, 2, 3, 4]
    np.testing.assert_allclose([p["flux"] for p in points], target["flux"], rtol=1e-6)
    np.testing.assert_allclose([float(p["mjd"]) for p in points], target.time.mjd, atol=1e-6)
    limits = [bool(p["limit"]) for p in points]
    assert limits == [bool(v) for v in np.asarray(target["flags"]) & SOURCE_FLAGS.limit]
    assert points[0]["limit"]
    assert points[0]["mag"] == pytest.approx(25 - 2.5 * np.log10(120), rel=1e-6)  # written with 7 digits


def test_folder_holds_the_contract(output):
    if not CHECK.is_file():
        pytest.skip(f"no {CHECK}")
    done = subprocess.run([sys.executable, CHECK, output], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "contract held"


# ---------- what not every run has ----------


def test_sections_of_what_a_run_has_more(tmp_path):
    folder = make_run(tmp_path / "out")
    epochs = Table.read(folder / "epochs.ecsv", format="ascii.ecsv")
    epochs.meta |= {"stages": {"read": 1.5, "solve": 6.0, HOSTILE: 0.5}, "wall": 9.0, "PYTHON": "3.11.7"}
    epochs.write(folder / "epochs.ecsv", format="ascii.ecsv", overwrite=True)
    variables = Table({"rank": [1, 2], "source_id": [7, 9], "score": [12.3456, np.nan], "chi2": [4.0, 1.0],
                       "flags": [SOURCE_FLAGS.variable, 0]})
    variables.write(folder / "variables.ecsv", format="ascii.ecsv")
    candidates = Table({"id": [1, 2], "x": [50.0, 20.0], "y": [40.0, 30.0], "score": [9.0, -7.0], "n_epochs": [3, 1],
                        "image": ["frame_002", HOSTILE], "flags": [0, CANDIDATE_FLAGS.dipole | 32]})
    candidates.meta["origin"] = [0, 0]
    candidates.write(folder / "candidates.ecsv", format="ascii.ecsv")
    with fits.open(folder / "difference" / "frame_002.fits", mode="append") as hdus:
        hdus.append(fits.ImageHDU(hdus["DIFF"].data, name="SCORE"))
    write_report(folder)
    page = Page(folder / "report.html")
    assert page.unbalanced == []
    sections = [a["id"] for a in page.all("section")]
    assert {"variables", "candidates", "time"} < set(sections)
    assert page.rows("variables") == [
        {"rank": 1, "star": "7", "score": 12.3456, "chi²": 4, "flags": "variable"},
        {"rank": 2, "star": "9", "score": None, "chi²": 1, "flags": ""}]
    rows = page.rows("candidates")
    assert [r["candidate"] for r in rows] == ["1", "2"]
    assert rows[1]["flags"] == "dipole one_epoch"
    assert rows[1]["image"] == HOSTILE
    assert "candidate-picture-1" in [a.get("id") for a in page.all("figure")]  # the other has no SCORE plane
    assert "Most of the time went to solve" in page.words
    assert "The run took 9 s, 1.8 s an image." in page.words
    assert "solve 6 s (75 %)" in page.words
    assert "Python 3.11.7" in page.words
    (folder / "candidates.ecsv").write_text("nonsense")  # what cannot be read is left out
    assert "candidates" not in [a["id"] for a in Page(write_report(folder)).all("section")]


# ---------- runs that went badly ----------


def test_doubts_and_the_place_of_the_target_are_shown_as_text(tmp_path):
    folder = make_run(tmp_path / "out")
    assert "doubts" not in {a.get("class") for a in Page(write_report(folder)).all("aside")}
    epochs = Table.read(folder / "epochs.ecsv", format="ascii.ecsv")
    epochs.meta["doubts"] = [f"magnitudes are instrumental: {HOSTILE}", "the target varies",
                             "take a sharper one with --reference FILE"]
    epochs.write(folder / "epochs.ecsv", format="ascii.ecsv", overwrite=True)
    target = Table.read(folder / "target.ecsv", format="ascii.ecsv")
    place = {"ra": 253.4659, "dec": -62.9002, "x": 65.25, "y": 44.5}
    target.meta |= place | {"position": f"star {HOSTILE}", "x_err": 0.0123, "y_err": 0.0234, "variation_sigma": 34.56,
                            "position_err_arcsec": 0.0678}
    target.write(folder / "target.ecsv", format="ascii.ecsv", overwrite=True)
    page = Page(write_report(folder))
    assert page.unbalanced == []
    assert [a.get("type", "") for a in page.all("script")].count("") == 2
    said = page.words
    doubts = said[said.index("Doubts about these numbers"):said.index("median chi²")]
    assert f"Magnitudes are instrumental: {HOSTILE}. The target varies. " in doubts
    assert "Take a sharper one with --reference FILE." in doubts
    text = said[said.index("RA 253.4659000"):said.index("A click on")]
    for part in ("Dec \N{MINUS SIGN}62.9002000 deg", "x 65.250, y 44.500 px", f"star {HOSTILE}",
                 "0.012 px in x, 0.023 px in y, 0.068 arcsec per axis", "34.6 σ, all epochs together"):
        assert part in text
    target.meta = place | {"x_err": np.nan, "y_err": "none"}  # of what is no number nothing is said
    target.write(folder / "target.ecsv", format="ascii.ecsv", overwrite=True)
    said = Page(write_report(folder)).words
    assert "x 65.250, y 44.500 px" in said
    assert " per axis" not in said
    assert " px in x" not in said


def test_report_of_a_run_without_target_shows_the_most_variable_star(tmp_path):
    page = Page(write_report(make_run(tmp_path, target=False)))
    assert "No target was given" in page.words
    assert page.data("lightcurve-data")["curves"][0]["label"].startswith("star 1 ")
    assert not any(a.get("class") == "mark" for a in page.all("i"))


def test_report_of_a_run_in_which_everything_failed(tmp_path):
    page = Page(write_report(make_run(tmp_path, all_failed=True)))
    assert "0 of 5 images" in page.words
    assert page.data("lightcurve-data") is None
    assert not page.all("svg")
    assert page.unbalanced == []


def test_report_needs_the_epochs_only(tmp_path):
    folder = make_run(tmp_path)
    for path in (*folder.glob("*.fits"), *folder.glob("difference/*"), folder / "target.ecsv", folder / "run.toml"):
        path.unlink()
    page = Page(write_report(folder))
    assert "4 of 5 images" in page.words
    assert "There is no difference image to show" in page.words


def test_a_broken_difference_file_leaves_the_others(tmp_path, caplog):
    folder = make_run(tmp_path)
    (folder / "difference" / "frame_002.fits").write_bytes(b"SIMPLE")
    page = Page(write_report(folder))
    assert "3 of 4 epochs are shown" in page.words
    assert "stamps of frame_002 left out" in caplog.text


def test_a_folder_without_epochs_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"output must be the folder of a run with a readable epochs\.ecsv, got "):
        write_report(tmp_path)


def lethal(draw, items, shared):
    """Does the first item; the process dies of the others."""
    yield 0, draw(items[0], shared)
    yield from ((number, WorkerDied("twice")) for number in range(1, len(items)))


def test_figures_are_the_same_whoever_draws_them(tmp_path):
    plots = make_run(tmp_path) / "plots"
    write_report(tmp_path)
    here = {path.name: path.read_bytes() for path in plots.iterdir()}
    assert len(here) == 6
    with closing(Readers(1)) as readers:
        for do_all in (readers.map, lethal):
            shutil.rmtree(plots)
            write_report(tmp_path, do_all)
            assert {path.name: path.read_bytes() for path in plots.iterdir()} == here


def test_writing_again_replaces_and_leaves_nothing_beside(tmp_path):
    folder = make_run(tmp_path)
    before = sorted(p.name for p in folder.iterdir())
    write_report(folder)
    write_report(folder)
    assert sorted(p.name for p in folder.iterdir()) == sorted([*before, "plots", "report.html"])


# ---------- the numbers ----------


def test_scatter_of_stars_with_true_errors_is_what_is_expected(tmp_path):
    run = read_run(make_run(tmp_path, n_epochs=40, n_stars=400, shape=(20, 20)))
    scatter = star_scatter(run)
    assert len(scatter) == 400
    assert (scatter.n_epochs == 38).all()  # 40 without the failed one and without the reference
    # chi_nu / sqrt(nu) has standard deviation 1/sqrt(2 nu); its median that times 1.2533 / sqrt(N).
    tolerance = 4 * 1.2533 / np.sqrt(2 * 37 * len(scatter))
    assert np.median(scatter.ratio) == pytest.approx(scatter.ideal, abs=tolerance)
    assert scatter.ratio.argmax() == 0
    assert scatter.variable.sum() == 1


def test_scatter_leaves_flagged_measurements_out(tmp_path):
    run = read_run(make_run(tmp_path, n_epochs=12))
    run.planes["FLUX"][3, 5] = 1e7
    run.planes["FLAGS"][3, 5] = SOURCE_FLAGS.saturated
    run.planes["FLAGS"][:, 6] = SOURCE_FLAGS.outside
    scatter = star_scatter(run)
    assert len(scatter) == 59
    assert scatter.n_epochs[5] == 9
    assert scatter.measured[5] < 1e5


def test_most_variable_star_comes_first(tmp_path):
    curves = most_variable(read_run(make_run(tmp_path, n_epochs=8)), limit=3)
    assert len(curves) == 3
    assert curves[0].label.startswith("star 1 ")


def test_running_median_of_a_line_lies_on_the_line():
    x = np.random.default_rng(0).permutation(np.arange(101.0))
    low, middle = running_median(x, 2 * x)
    np.testing.assert_allclose(middle, 2 * low)
    assert len(running_median(x[:5], x[:5])[0]) == 0


def test_choice_of_epochs_is_bounded_and_holds_the_ends_the_peak_and_the_worst(tmp_path):
    run = read_run(make_run(tmp_path, n_epochs=60, n_stars=3, shape=(12, 12)))
    run.epochs[25].values["chi2"] = 9.0
    run.target.flux_diff[:] = 0
    run.target.flux_diff[run.target.names.index("frame_041")] = 5000
    chosen = [e.index for e in choose_epochs(run.epochs, run.target, limit=12)]
    assert len(chosen) == 12
    assert chosen == sorted(chosen)
    assert {0, 25, 41, 59} <= set(chosen)
    assert max(np.diff(chosen)) < 20  # some are spread over the series
    assert len(choose_epochs(run.epochs, None, limit=100)) == 59  # all that have a difference image


def test_stamp_shows_the_target_under_its_mark(output):
    run = read_run(output)
    stamp = make_stamps(run, run.epochs[2:3])[0]
    height, width = stamp.strip.shape[:2]
    left, top = stamp.marks[2]
    x, y = int(left * width), int(top * height)
    red, _, blue, _ = stamp.strip[y, x].astype(int)
    assert red > blue + 40  # 300 ADU above noise of about 15: dark red in the difference
    assert run.position == pytest.approx((110 * 0.6 - 1, 90 * 0.5 - 1), abs=1e-3)


def test_clipped_pixels_are_shown_and_masked_ones_are_not(output, tmp_path):
    folder = shutil.copytree(output, tmp_path / "copy")
    bits = np.zeros((90, 110), dtype=np.uint8)
    bits[30:60, :] = PIXEL_FLAGS.clipped
    bits[60:, :] = PIXEL_FLAGS.saturated
    with fits.open(folder / "difference" / "frame_002.fits", mode="update") as hdus:
        hdus["MASK"].data = bits
    run = read_run(folder)
    strip = make_stamps(run, run.epochs[2:3])[0].strip[::-1]  # rows 14 to 74 of the image
    panel = strip[:, 2 * 63 :, :3].astype(int)
    is_gray = (panel == [112, 124, 146]).all(axis=2)
    assert is_gray[46:].all()
    assert is_gray[16:46].mean() < 0.03  # the one per cent of pixels without a number


def test_stars_know_their_epochs(output):
    curve = most_variable(read_run(output))[0]
    assert curve.names == ["frame_000", "frame_002", "frame_003", HOSTILE]


@pytest.mark.parametrize("file", ["/a/b/n1.fits", "n1.fits.fz", "n1.FIT", "n1.fits.gz", "n1"])
def test_frame_name_drops_folder_and_fits_suffixes(file):
    assert frame_name(file) == "n1"
