"""The page's scripts in a headless Chromium: tables, light curve, links, also of a long series and of two runs."""

import json
import re
import shutil
import subprocess

import pytest
from astropy.io import fits
from astropy.table import Table
from test_report import HOSTILE, Page, make_run

from gpudia.cli import main
from gpudia.flags import FRAME_FLAGS
from gpudia.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: the page's scripts are not run")


def ask(page, question, tmp_path, width=500):
    """Run JavaScript in the opened page; what its `result` holds at the end comes back."""
    probe = f"""<script>
window.onerror = (message) => {{ document.body.dataset.error = message; }};
addEventListener("load", () => setTimeout(() => {{
  const result = {{}}, table = (name) => document.querySelector(`[data-table=${{name}}]`);
  {question}
  result.wide = document.documentElement.scrollWidth > innerWidth;
  document.body.dataset.result = JSON.stringify(result);
}}, 100));
</script>"""
    # The page's own policy forbids foreign scripts, as it should: it is lifted for the probe.
    source = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8"))
    copy = tmp_path / "probe.html"
    copy.write_text(source.replace("</footer>", "</footer>" + probe), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", f"--window-size={width},900",
               "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    copy.write_text(done.stdout, encoding="utf-8")
    body = Page(copy).all("body")[0]
    assert "data-error" not in body, body["data-error"]
    result = json.loads(body["data-result"])
    assert not result.pop("wide")
    return result


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("run") / "out")
    write_report(folder)
    return folder


def test_tables_sort_search_and_link(output, tmp_path):
    result = ask(output / "report.html", """
  const epochs = table("epochs"), heads = [...epochs.querySelectorAll("th")];
  const fwhm = heads.findIndex((h) => h.textContent.startsWith("FWHM"));
  const column = (k) => [...epochs.querySelectorAll("tbody tr")].map((row) => row.cells[k].textContent);
  result.names = column(0);
  heads[fwhm].querySelector("button").click();
  result.up = column(fwhm).map(Number);
  heads[fwhm].querySelector("button").click();
  result.down = column(fwhm).map(Number);
  result.sorted = heads.map((h) => h.getAttribute("aria-sort")).filter(Boolean);
  const search = epochs.querySelector("input");
  search.value = "DECONV"; search.dispatchEvent(new Event("input"));
  result.flagged = column(0);
  search.value = "frame_00"; search.dispatchEvent(new Event("input"));
  const only = epochs.querySelector("select");
  only.value = "failed"; only.dispatchEvent(new Event("change"));
  result.failed = column(0);
  result.tip = epochs.querySelector("td.name").title;
  location.hash = "epoch-3"; dispatchEvent(new Event("hashchange"));
  result.found = epochs.querySelector("tr.found").cells[0].textContent;
  const links = [...epochs.querySelectorAll("td.name a")].map((a) => a.getAttribute("href"));
  result.links = links.map((href) => document.querySelector(href).tagName);
  result.flag = epochs.querySelector("a.flag").title;
  result.elements = document.querySelectorAll("#epochs script[type='application/json'], #epochs td script").length;
""", tmp_path)
    assert result["names"] == ["frame_000", "frame_001", "frame_002", "frame_003", HOSTILE]
    assert result["up"] == sorted(result["up"])
    assert result["down"] == result["up"][::-1]
    assert result["sorted"] == ["descending"]
    assert result["flagged"] == [HOSTILE]
    assert result["failed"] == ["frame_001"]
    assert result["tip"] == "/data/frame_001.fits.fz"
    assert result["found"] == "frame_003"
    assert result["links"] == ["FIGURE"] * 4
    assert "What to do" in result["flag"]
    assert result["elements"] == 1


def test_rows_of_skipped_images_are_grey(tmp_path):
    folder = make_run(tmp_path / "out")
    table = Table.read(folder / "epochs.ecsv", format="ascii.ecsv")
    table["status"] = ["skipped" if k == 2 else status for k, status in enumerate(table["status"])]
    table.write(folder / "epochs.ecsv", format="ascii.ecsv", overwrite=True)
    result = ask(write_report(folder), """
  const rows = [...table("epochs").querySelectorAll("tbody tr")];
  result.grey = rows.filter((row) => row.className === "left-out").map((row) => row.cells[0].textContent);
  result.colours = rows.slice(1, 4).map((row) => getComputedStyle(row.cells[3]).color);
""", tmp_path)
    assert result["grey"] == ["frame_002"]
    failed, skipped, ok = result["colours"]
    assert failed == ok != skipped


def test_light_curve_draws_zooms_and_reads_out_a_point(output, tmp_path):
    result = ask(output / "report.html", """
  const svg = document.querySelector(".chart svg");
  const press = (key) => svg.dispatchEvent(new KeyboardEvent("keydown", { key }));
  result.points = svg.dataset.points;
  press("ArrowRight");
  result.read = document.querySelector(".readout").textContent;
  result.links = [...document.querySelectorAll(".readout a")].map((a) => a.getAttribute("href"));
  document.querySelector("[data-quantity=mag]").click();
  result.limits = (svg.querySelector(".limit").getAttribute("d").match(/M/g) ?? []).length;
  for (let i = 0; i < 12; i++) press("+");
  result.zoomed = svg.dataset.points;
  press("Escape");
  result.reset = svg.dataset.points;
  const star = document.getElementById("star");
  star.value = "1"; star.dispatchEvent(new Event("change"));
  result.star = svg.dataset.points;
  result.magnitudes = document.querySelector("[data-quantity=mag]").disabled;
""", tmp_path)
    assert result["points"] == "4"
    assert "frame_000" in result["read"]
    assert result["links"] == ["#stamp-0", "#epoch-0"]
    assert result["limits"] == 1
    assert int(result["zoomed"]) < 4
    assert result["reset"] == "4"
    assert result["star"] == "4"
    assert result["magnitudes"]


def test_light_curve_under_a_pointer(output, tmp_path):
    """Hover, tap, wheel, drag, double click; on a phone's width."""
    result = ask(output / "report.html", r"""
  const svg = document.querySelector(".chart svg"), tip = document.querySelector(".tip");
  const box = svg.getBoundingClientRect();
  svg.setPointerCapture = () => {};                        // made-up pointers cannot be captured
  const dot = () => svg.querySelector(".dot").getAttribute("d");
  const place = () => dot().match(/M([-\d.]+) ([-\d.]+)/).slice(1).map(Number), [x, y] = place();
  const at = (dx = 0, dy = 0) => ({ clientX: box.left + x + dx, clientY: box.top + y + dy, pointerId: 1 });
  const send = (kind, where) => svg.dispatchEvent(new PointerEvent(kind, where));
  result.before = tip.hidden;
  send("pointermove", at(3, 3));
  result.hover = [tip.hidden, tip.querySelector("b").textContent, tip.textContent.includes("ADU")];
  result.inside = tip.offsetLeft >= 0 && tip.offsetLeft + tip.offsetWidth <= svg.clientWidth;
  send("pointerleave", at());
  result.left = tip.hidden;
  send("pointerdown", at()); send("pointerup", at());
  result.tapped = document.querySelector(".readout b").textContent;
  const first = dot();
  svg.dispatchEvent(new WheelEvent("wheel", { deltaY: -1, ctrlKey: true, ...at() }));
  result.wheel = [dot() !== first, ...place().map((v, k) => Math.abs(v - [x, y][k]) < 1)];   // it stays where it was
  svg.dispatchEvent(new MouseEvent("dblclick"));
  result.reset = dot() === first;
  send("pointerdown", at()); send("pointermove", at(30, 0)); send("pointerup", at(30, 0));
  result.moved = Math.round(place()[0] - x);
""", tmp_path, width=390)
    assert result["before"] is True
    assert result["hover"] == [False, "frame_000", True]
    assert result["inside"] is True
    assert result["left"] is True
    assert result["tapped"] == "frame_000"
    assert result["wheel"] == [True] * 3
    assert result["reset"] is True
    assert result["moved"] == 30


def test_a_long_series_has_a_hundred_rows_in_the_document_at_a_time(tmp_path):
    folder = make_run(tmp_path / "out", n_epochs=2000, n_stars=4, shape=(24, 24), images=3)
    result = ask(write_report(folder), """
  const epochs = table("epochs"), next = epochs.querySelector("[aria-label='Rows after']");
  result.rows = epochs.querySelectorAll("tbody tr").length;
  next.click();
  result.first = epochs.querySelector("tbody tr").cells[0].textContent;
  result.count = epochs.querySelector(".count").textContent;
  location.hash = "epoch-1999"; dispatchEvent(new Event("hashchange"));
  result.last = epochs.querySelector("tr.found").cells[0].textContent;
  result.points = document.querySelector(".chart svg").dataset.points;
  result.elements = document.querySelectorAll("*").length;
""", tmp_path)
    assert result["rows"] == 100
    assert result["first"] == "frame_100"
    assert result["count"] == "101\N{EN DASH}200 of 2000"
    assert result["last"] == HOSTILE
    assert result["points"] == "1999"
    assert result["elements"] < 6000
    assert (folder / "report.html").stat().st_size < 2.5e6


def test_two_runs_in_one_chart(output, tmp_path, capsys):
    other = shutil.copytree(output, tmp_path / "other")
    table = Table.read(other / "epochs.ecsv", format="ascii.ecsv")
    table["flags"][2] |= FRAME_FLAGS.bad_chi2
    table.write(other / "epochs.ecsv", format="ascii.ecsv", overwrite=True)
    with fits.open(other / "lightcurves.fits", mode="update") as hdus:  # a reference of twice the flux
        hdus["EPOCHS"].data["scale"] /= 2
        for name in ("FLUX", "FLUX_ERR", "FLUX_DIFF", "FLUX_DIFF_ERR"):
            hdus[name].data *= 2
        hdus["SOURCES"].data["flux_ref"] *= 2
    (other / "run.toml").write_text((other / "run.toml").read_text().replace("17", "21"))
    assert main(["compare", str(output), str(other), "--output", str(tmp_path / "two.html")]) == 0
    said = capsys.readouterr().out
    assert "flux unit of the second over that of the first: 0.50000" in said
    assert "in the second over the first: median 1.000" in said
    page = tmp_path / "two.html"
    result = ask(page, """
  const svg = document.querySelector(".chart svg");
  result.points = svg.dataset.points;
  result.series = ["s0", "s1"].map((s) => svg.querySelector(`.dot.${s}`).getAttribute("d").match(/M/g).length);
  svg.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
  result.read = document.querySelector(".readout").textContent;
  result.verdicts = [...table("verdicts").querySelectorAll("tbody tr")].map((row) => row.cells[0].textContent);
  result.settings = document.querySelector("#settings").textContent;
""", tmp_path)
    assert result["points"] == "8"
    assert result["series"] == [4, 4]
    assert "frame_000" in result["read"]
    assert result["verdicts"] == ["frame_002"]
    assert "fit.kernel_size1721" in result["settings"]
    # what is there stays, unless told otherwise
    assert main(["compare", str(output), str(other), "--output", str(page)]) == 2
    assert "output must be a new file" in capsys.readouterr().err
    assert main(["compare", str(output), str(output)]) == 2
