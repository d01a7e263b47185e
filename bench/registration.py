"""Registration held against known transformations: random lists, simulated series, RISE frames turned and spoiled.

    GPUDIA_TEST_DATA=/path/to/data python bench/registration.py [--small]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from astropy.table import Table
from common import save
from numpy.typing import NDArray
from scipy import ndimage
from star_lists import area_of, judge, largest_error, random_case

from gpudia.errors import RegistrationError
from gpudia.images import Frame, FrameLayout, detect_stars, make_frame, read_frame, register
from gpudia.images.matching import mutual_neighbours, positions
from gpudia.simulate import SimulationSettings, simulate_field

DATA = Path(os.environ.get("GPUDIA_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
#: Registered frames must be this near to the truth that was put in, pixels.
CLOSE = 0.05
VERDICTS = ("good", "uncertain", "refused", "wrong")
#: Cases by the number of stars that both lists hold: name and most.
GROUPS = {"0-2": 2, "3-5": 5, "6-9": 9, "10-29": 29, "30 and more": 10**6}


def random_lists(count: int) -> dict:
    """Verdicts of random cases, by the number of stars that both lists hold."""
    verdicts = {name: Counter() for name in (*GROUPS, "all")}
    reasons, wrong, pulls, start = Counter(), [], [], time.perf_counter()
    for seed in range(count):
        case = random_case(seed)
        outcome = judge(case)
        for group in (next(name for name, most in GROUPS.items() if case.common <= most), "all"):
            verdicts[group][outcome.verdict] += 1
        if outcome.verdict == "refused":
            reasons["rms above the limit" if "rms must be" in outcome.reason else "no match beyond chance"] += 1
        else:
            pulls.append(outcome.error / outcome.uncertainty)
        if outcome.verdict == "wrong":
            wrong.append(seed)
    print(f"{'common stars':>14}" + "".join(f" {verdict:>9}" for verdict in VERDICTS))
    for name, row in verdicts.items():
        print(f"{name:>14}" + "".join(f" {row[verdict]:9d}" for verdict in VERDICTS))
    ratio = {"median": _short(np.median(pulls)), "99_percent": _short(np.percentile(pulls, 99))}
    return {"cases": count, "verdicts_by_common_stars": {name: dict(row) for name, row in verdicts.items()},
            "refused_because": dict(reasons), "seeds_of_wrong_ones": wrong, "largest_error_over_stated": ratio,
            "seconds_per_case": _short((time.perf_counter() - start) / count)}


def simulated(small: bool) -> dict:
    """Error of the map over the frame, against its own statement and the centroid noise of the matched stars."""
    figures = {}
    print(f"{'simulated':>14} {'frames':>7} {'rms error':>9} {'stated':>9} {'centroids':>9}")
    for name, density in (("sparse", 1 / 800), ("crowded", 1 / 80)):
        errors, stated, centroids = [], [], []
        series = simulate_field(SimulationSettings(
            shape=(300, 300) if small else (600, 600), n_epochs=3 if small else 10, star_density=density, rotation=1.0,
            dither=20.0, psf_variation=0.03))
        lists = [detect_stars(_frame(f)) for f in series.frames]
        first = lists[series.reference_index]
        for frame, stars in zip(series.frames, lists, strict=True):
            if frame is series.reference:
                continue
            found = register(first, stars)
            there = found.apply(positions(first))
            errors.append(np.hypot(*(there - _moved(np.asarray(frame.transform), positions(first))).T))
            stated.append(found.uncertainty(area_of(first)))
            pairs = zip((first, stars), mutual_neighbours(there, positions(stars), 1.5), strict=True)
            noise = [np.hypot(*(np.asarray(s[c])[k] for c in ("x_err", "y_err"))) for s, k in pairs]
            centroids.append(np.median(np.hypot(*noise)))
        figures[name] = {"frames": len(errors), "rms_error_px": _short(np.sqrt(np.mean(np.concatenate(errors) ** 2))),
                         "largest_error_px": _short(np.max(np.concatenate(errors))),
                         "stated_at_the_worst_corner_px": _short(np.median(stated)),
                         "median_centroid_noise_of_a_pair_px": _short(np.median(centroids))}
        row = figures[name]
        print(f"{name:>14} {row['frames']:7d} {row['rms_error_px']:9.4f} {row['stated_at_the_worst_corner_px']:9.4f} "
              f"{row['median_centroid_noise_of_a_pair_px']:9.4f}")
    return figures


def _frame(f) -> Frame:
    return make_frame(f.data, bits=f.mask, wcs=None,
                      layout=FrameLayout(gain=f.gain, read_noise=f.read_noise, saturation=f.header["SATURATE"]))


def rise(small: bool) -> dict:
    """One frame and the same frame turned, mirrored, cropped, binned, without its WCS or with a wrong one."""
    frame = read_frame(DATA / "rise" / "q_e_20200830_1_1_1_1.fits")
    reference, figures = detect_stars(frame), {}
    bare = reference[[c for c in reference.colnames if c not in ("ra", "dec")]]
    print(f"{'RISE':>24} {'verdict':>10} {'error':>8} {'stated':>8} {'stars':>6} {'kind':>11} {'route':>8}")
    cases = [(name, bare, detect_stars(_again(data)), matrix) for name, (data, matrix) in _views(frame.data).items()]
    cases += [(name, *lists) for name, lists in _spoiled(frame, reference).items()]
    for name, first, stars, matrix in cases[:3] if small else cases:
        try:
            found = register(first, stars)
        except RegistrationError as exc:
            figures[name] = {"verdict": "refused", "reason": exc.reason}
            print(f"{name:>24} {'refused':>10} {exc.reason}")
            continue
        error, stated = largest_error(found, matrix, area_of(first)), found.uncertainty(area_of(first))
        verdict = "registered" if error < CLOSE else "WRONG"
        figures[name] = {"verdict": verdict, "error_px": _short(error), "stated_px": _short(stated),
                         "n_matched": found.n_matched, "kind": found.kind, "route": found.route}
        print(f"{name:>24} {verdict:>10} {error:8.4f} {stated:8.4f} {found.n_matched:6d} {found.kind:>11} "
              f"{found.route:>8}")
    return figures


def _views(data: NDArray) -> dict[str, tuple[NDArray, NDArray]]:
    """Arrays made of a frame, and the map from its pixels to theirs."""
    height, width = data.shape
    angle = np.radians(7)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    back = turn.T[::-1, ::-1]  # scipy wants the map from output to input, in the order y, x
    turned = ndimage.affine_transform(data.astype(float), back, (centre - turn.T @ centre)[::-1], order=3)
    even = data[:height // 2 * 2, :width // 2 * 2].astype(float)
    return {
        "rotated by 90": (np.rot90(data), np.array([[0, 1, 0], [-1, 0, width - 1.0]])),
        "rotated by 180": (data[::-1, ::-1], np.array([[-1, 0, width - 1.0], [0, -1, height - 1.0]])),
        "mirrored": (data[:, ::-1], np.array([[-1, 0, width - 1.0], [0, 1, 0]])),
        "rotated by 7": (turned, np.column_stack([turn, centre - turn @ centre])),
        "cropped": (data[200:, 150:], np.array([[1, 0, -150.0], [0, 1, -200]])),
        "binned 2 x 2": (even.reshape(height // 2, 2, width // 2, 2).sum(axis=(1, 3)),
                         np.array([[0.5, 0, -0.25], [0, 0.5, -0.25]])),
    }  # fmt: skip


def _again(data: NDArray, wcs=None) -> Frame:
    return make_frame(np.ascontiguousarray(data), wcs=wcs, layout=FrameLayout(gain=2.4, read_noise=12.0))


def _spoiled(frame: Frame, reference: Table) -> dict[str, tuple[Table, Table, NDArray]]:
    """The cropped frame with a bad WCS, or with a catalog of which half is wrong."""
    data, matrix = _views(frame.data)["cropped"]
    cropped = frame.wcs.deepcopy()
    cropped.wcs.crpix = cropped.wcs.crpix + matrix[:, 2]
    off = cropped.deepcopy()
    off.wcs.crval = off.wcs.crval + np.array([0, 30 / 3600])
    cases = {name: (reference, detect_stars(_again(data, wcs)), matrix)
             for name, wcs in (("WCS right", cropped), ("WCS removed", None), ("WCS off by 30 arcsec", off))}
    stars = cases["WCS removed"][1]
    i, j = mutual_neighbours(_moved(matrix, positions(reference)), positions(stars), 0.5)
    first, second, rng = reference[i], stars[j], np.random.default_rng(1)
    first["id"] = second["id"] = np.arange(len(i)) + 5000
    first.meta["ids"] = second.meta["ids"] = "catalog"
    half = rng.permutation(len(i))[:len(i) // 2]
    ids, moved, spurious = second.copy(), second.copy(), second.copy()
    ids["id"][half] = np.roll(ids["id"][half], 1)
    moved["x"][half], moved["y"][half] = rng.uniform(0, 800, (2, len(half)))
    spurious["id"][half] += 10**6
    spurious["x"][half], spurious["y"][half] = rng.uniform(0, 800, (2, len(half)))
    return cases | {name: (first, table, matrix) for name, table in
                    (("half of the ids wrong", ids), ("half of positions wrong", moved), ("half spurious", spurious))}


def _moved(matrix: NDArray, xy: NDArray) -> NDArray:
    return xy @ matrix[:, :2].T + matrix[:, 2]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def main() -> int:
    """Print and keep the figures; 1 when a registration was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="few cases, to see that it runs; nothing is kept")
    small = parser.parse_args().small
    figures = {"random": random_lists(30 if small else 1000), "simulated": simulated(small)}
    if (DATA / "rise").is_dir():
        figures["rise"] = rise(small)
    else:
        print(f"skipped: no real frames in {DATA}; set GPUDIA_TEST_DATA")
    if not small:
        save("registration", figures)
    wrong = figures["random"]["seeds_of_wrong_ones"]
    return int(bool(wrong) or any(row["verdict"] == "WRONG" for row in figures.get("rise", {}).values()))


if __name__ == "__main__":
    sys.exit(main())
