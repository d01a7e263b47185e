"""The report of a run: what the page says, that it loads nothing, that hostile names stay text."""

import base64
import json
import re
import shutil
import subprocess
import sys
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
from gpudia.flags import FRAME_FLAGS, PIXEL_FLAGS, SOURCE_FLAGS
from gpudia.report import write_report
from gpudia.report.data import frame_name, read_run
from gpudia.report.scatter import most_variable, running_median, star_scatter
from gpudia.report.stamps import choose_epochs, make_stamps

HOSTILE = "<script>alert(1)<'script>\"&$x^$"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHECK = Path(__file__).resolve().parents[2] / "shared" / "contract" / "check_output.py"
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


# ---------- a run's folder with made-up but plausible numbers ----------


def make_run(folder, n_epochs=5, n_stars=60, target=True, all_failed=False, shape=(90, 110), seed=3):
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
    _write_images(folder, rng, [n for n, good in zip(names, ok, strict=True) if good], sources, shape, target)
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

    def curves(self):
        return json.loads(self.scripts[0])["curves"]


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
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    inner = [a["href"][1:] for a in page.all("a") if a.get("href", "").startswith("#")]
    assert set(inner) <= set(ids)


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
    assert [a["id"] for a in page.all("tr") if a.get("class") == "left-out"] == ["epoch-4", "epoch-5"]
    start = page.words.index("All images: instrument fa15, exposure 60 s.")
    rows = page.words[start : page.words.index("left to right")]
    assert "Rows in grey were not selected." in rows
    assert "not selected: fwhm < 6, got 7.1" in rows
    heads = [a["title"] for a in page.all("button") if "title" in a]
    assert heads.count("from the header") == 1  # the filter: of one camera and no airmass there is no column
    assert "exposure time" not in heads
    assert HOSTILE in rows
    assert "2460000.123456" in rows
    cells = [a["data-sort"] for a in page.all("td") if "data-sort" in a]
    assert "301" in cells
    assert "-1" not in cells  # not counted is not a number
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
    assert len(scripts) == 2
    assert not any(k.startswith("on") for _, a in page.tags for k in a)
    assert "alert(1)" in page.words
    assert HOSTILE in [p["name"] for p in page.curves()[0]["points"]]
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


def test_table_has_every_epoch_with_decoded_flags_and_sortable_heads(page):
    table = next(i for i, (t, a) in enumerate(page.tags) if t == "table" and a.get("class") == "sortable")
    heads = [a for t, a in page.tags[table : table + 80] if t == "th"]
    assert all(a["scope"] == "col" for a in heads)
    rows = [a["id"] for t, a in page.tags if t == "tr" and a.get("id", "").startswith("epoch-")]
    assert rows == [f"epoch-{i}" for i in range(5)]
    tips = {a["href"]: a["title"] for a in page.all("a") if a.get("class") == "flag"}
    assert "noise is amplified" in tips["#flag-deconvolving"]
    assert "aria-sort" in page.scripts[1]


def test_failures_are_told_with_their_reason(page):
    start = page.words.index("What failed, and why")
    told = page.words[start : page.words.index("Settings and versions")]
    assert "star matches must be at least 3, got 0" in told
    assert "frame_001.fits.fz" in told
    assert "deconvolving 1 of 4" in told


def test_light_curve_data_are_those_of_the_target(page, output):
    target = TimeSeries.read(output / "target.ecsv", format="ascii.ecsv", time_column="time")
    points = page.curves()[0]["points"]
    assert [p["epoch"] for p in points] == [0, 2, 3, 4]
    np.testing.assert_allclose([p["flux"] for p in points], target["flux"], rtol=1e-6)
    np.testing.assert_allclose([float(p["mjd"]) for p in points], target.time.mjd, atol=1e-6)
    limits = [p["limit"] for p in points]
    assert limits == [bool(v) for v in np.asarray(target["flags"]) & SOURCE_FLAGS.limit]
    assert points[0]["limit"]
    assert points[0]["mag"] == pytest.approx(25 - 2.5 * np.log10(120), rel=1e-6)  # written with 7 digits


def test_folder_holds_the_contract(output):
    if not CHECK.is_file():
        pytest.skip(f"no {CHECK}")
    done = subprocess.run([sys.executable, CHECK, output], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "contract held"


# ---------- runs that went badly ----------


def test_report_of_a_run_without_target_shows_the_most_variable_star(tmp_path):
    page = Page(write_report(make_run(tmp_path, target=False)))
    assert "No target was given" in page.words
    assert page.curves()[0]["label"].startswith("star 1 ")
    assert not any(a.get("class") == "mark" for a in page.all("i"))


def test_report_of_a_run_in_which_everything_failed(tmp_path):
    page = Page(write_report(make_run(tmp_path, all_failed=True)))
    assert "0 of 5 images" in page.words
    assert page.curves() == []
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


def test_choice_of_epochs_is_bounded_and_holds_the_first_and_the_worst(tmp_path):
    run = read_run(make_run(tmp_path, n_epochs=30, n_stars=3, shape=(12, 12)))
    run.epochs[25].values["chi2"] = 9.0
    chosen = choose_epochs(run.epochs, limit=6)
    assert [e.index for e in chosen[:3]] == [0, 2, 3]
    assert len(chosen) == 6
    assert 25 in [e.index for e in chosen]


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


# ---------- in a browser ----------


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: the page's script is not run")
def test_script_sorts_draws_and_reads_out_a_point(output, tmp_path):
    source = (output / "report.html").read_text(encoding="utf-8")
    probe = """<script>
window.onerror = (message) => { document.body.dataset.error = message; };
addEventListener("load", () => setTimeout(() => {
  const table = document.querySelector("table.sortable"), heads = [...table.tHead.rows[0].cells];
  const fwhm = heads.findIndex((h) => h.textContent.startsWith("FWHM"));
  heads[fwhm].querySelector("button").click();
  const column = () => [...table.tBodies[0].rows].map((r) => Number(r.cells[fwhm].dataset.sort));
  const up = column();
  heads[fwhm].querySelector("button").click();
  const svg = document.querySelector(".chart svg");
  const dots = svg.querySelectorAll(".dot").length;
  svg.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
  const read = document.querySelector(".readout").textContent;
  document.querySelector("[data-quantity=mag]").click();
  const limits = svg.querySelectorAll(".limit").length;
  const result = { up, down: column(), dots, read, limits, wide: document.documentElement.scrollWidth > innerWidth };
  document.body.dataset.result = JSON.stringify(result);
}, 200));
</script>"""
    # The page's own policy forbids foreign scripts, as it should: it is lifted for the probe.
    loosened = re.sub(r"<meta http-equiv[^>]*>", "", source).replace("</footer>", "</footer>" + probe)
    copy = tmp_path / "probe.html"
    copy.write_text(loosened, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--window-size=500,900"]
    command += ["--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    copy.write_text(done.stdout, encoding="utf-8")
    body = Page(copy).all("body")[0]
    assert "data-error" not in body
    result = json.loads(body["data-result"])
    assert result["up"] == sorted(result["up"])
    assert result["down"] == result["up"][::-1]
    assert result["dots"] == 4
    assert "frame_000" in result["read"]
    assert result["limits"] == 1
    assert not result["wide"]
