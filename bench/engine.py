"""The engine: time, error and memory of plan and subtraction, beside other programs on the same data in one run.

    python bench/engine.py                  # everything, about a quarter of an hour; needs `pip install ois sfft`
    python bench/engine.py acceptance       # one group: acceptance, growth or memory
    python bench/engine.py --small          # small frames, seconds: does the bench itself still run?

Our times are those of `ReferencePlan.subtract` with three passes, each image with its own weights and mask, from arrays
in memory to differences, and with the time of the plan spread over the batch of 20 (or of 200).
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import peers
from common import RESULTS, run_groups, traced_memory
from fields import Field, crowded_field

from gpudia import ReferencePlan

#: The least of so many times counts, for every program that is quick enough; of the slow ones, of two.
REPEATS = 5
#: The series of cases of the group "growth": the name of what grows, its values, and what else is the same.
GROWTH = {
    "pixels": [{"side": side, "kernel": 17, "degree": 1, "images": 2} for side in (100, 250, 512, 1024, 2048, 4096)],
    "kernel": [{"side": 512, "kernel": kernel, "degree": 0, "images": 4} for kernel in (9, 13, 17, 21, 25, 31)],
    "degree": [{"side": 512, "kernel": 17, "degree": degree, "images": 4} for degree in (0, 1, 2, 3)],
    "images": [{"side": 250, "kernel": 17, "degree": 0, "images": images} for images in (1, 4, 20, 100, 500)],
}
SMALL = {
    "pixels": [{"side": side, "kernel": 9, "degree": 0, "images": 2} for side in (60, 120)],
    "images": [{"side": 80, "kernel": 9, "degree": 1, "images": images} for images in (1, 4)],
}


def ours(side: int, kernel: int, degree: int, images: int, depth: float = 1.0, different: int = 8,
         **settings: Any) -> dict[str, Any]:
    """Times of the plan and of one image, iterations, and errors against the truth."""
    field = crowded_field(side, min(images, different), depth=depth).take(images)
    ReferencePlan(field.reference[:64, :64], 5, error=field.reference_error[:64, :64])  # imports what is imported late
    repeats, planned, times = REPEATS if images * side**2 < 1 << 24 else 1, [], []
    for _ in range(repeats):
        start = time.perf_counter()
        plan = ReferencePlan(field.reference, kernel, error=field.reference_error, mask=field.reference_mask,
                             spatial_degree=degree, passes=3, **settings)
        planned.append(time.perf_counter() - start)
    plan.subtract(field.images[:2], field.errors[:2], field.masks[:2])
    for _ in range(repeats):
        start = time.perf_counter()
        stack = plan.subtract(field.images, field.errors, field.masks)
        times.append((time.perf_counter() - start) / images)
    return {"plan_s": round(min(planned), 4), "image_s": round(min(times), 5),
            "scale": [float(s) for s in stack.scale[:2]], **scale_error(field, stack),
            "iterations": float(stack.iterations.mean()), "chi2": round(float(np.median(stack.chi2)), 4),
            "near_stars_sigma": near_stars(field, stack), "failed": int((stack.status & 3 != 0).sum())}


def scale_error(field: Field, stack: Any) -> dict[str, float]:
    """Weighted mean of scale / truth - 1 over the images, its error, and the rms of the pulls about the mean.

    The reference's noise is common to all images: their mean does not lessen it.
    """
    different = slice(0, len(np.unique(field.scales)))
    off = (stack.scale / field.scales - 1)[different]
    own, common = ((e / field.scales)[different] for e in (stack.scale_error_image, stack.scale_error_reference))
    weight = 1 / own**2
    mean = (off * weight).sum() / weight.sum()
    return {"scale_off_percent": round(100 * float(mean), 3),
            "scale_off_error_percent": round(100 * float(np.sqrt(1 / weight.sum() + np.median(common) ** 2)), 3),
            "scale_pull_rms": round(float(np.sqrt((((off - mean) / own) ** 2).mean())), 2)}


def near_stars(field: Any, stack: Any, radius: int = 5, count: int = 20) -> float:
    """Rms of (difference / sigma) in boxes around the brightest stars that nothing masks: the median over all boxes.

    Clipped pixels count, they may be errors of the model; cosmic rays strike few boxes, and the median passes them by.
    """
    pull, rms = stack.difference / np.sqrt(stack.variance), []
    bad = stack.mask | ~np.isfinite(pull)
    for x, y, _ in field.stars[np.argsort(-field.stars[:, 2])]:
        column, row = round(x), round(y)
        box = (slice(None), slice(row - radius, row + radius + 1), slice(column - radius, column + radius + 1))
        if min(row, column) < radius or pull[box].shape[1:] != (2 * radius + 1,) * 2:
            continue
        clear = ~bad[box].any(axis=(1, 2))
        rms.extend(np.sqrt((pull[box][clear] ** 2).mean(axis=(1, 2))))
        if len(rms) >= count * len(pull):
            break
    return round(float(np.median(rms)), 3) if rms else float("nan")


def acceptance(small: bool) -> dict[str, Any]:
    """The cases side by side with the other programs."""
    side, kernel, big, cutout, cutout_kernel = (96, 9, 160, 64, 7) if small else (512, 21, 2048, 250, 17)
    field = crowded_field(side, 8)
    figures: dict[str, Any] = {"side": side, "kernel": kernel, "images": 20}
    for degree in (0, 1, 2):
        figures[f"degree_{degree}"] = peers.alone(ours, side, kernel, degree, 20)
    figures["degree_1_direct"] = peers.alone(ours, side, kernel, 1, 1, solver="direct")
    figures["ois_s"] = peers.alone(peers.ois_bramich, field, kernel, repeats=2)
    figures["explicit_s"] = peers.alone(peers.explicit, field, kernel, repeats=2)
    figures["hotpants_s"] = peers.alone(peers.hotpants, field, kernel)
    figures["hotpants_derived_s"] = figures["ois_s"] and figures["ois_s"] * peers.HOTPANTS_OF_OIS
    figures["cutouts"] = peers.alone(ours, cutout, cutout_kernel, 0, 200)
    small_field = crowded_field(cutout, 8)
    figures["cutouts_explicit_s"] = peers.alone(peers.explicit, small_field, cutout_kernel, repeats=REPEATS)
    whole = crowded_field(big, 2)
    figures["whole"] = {"side": big, "sfft_s": peers.alone(peers.sfft, whole, kernel, 1)}
    for pixels in ("all", "informative"):
        figures["whole"][pixels] = peers.alone(ours, big, kernel, 1, 2, pixels=pixels)
    # with a deep reference errors of the model stand out from the noise
    figures["deep"] = peers.alone(ours, side, kernel, 1, 16, depth=100.0, different=16)
    return {**figures, "ratios": ratios(figures)}


def total(case: dict[str, Any], images: int = 20) -> float:
    """Seconds an image with the plan spread over a batch."""
    return float(case["image_s"] + case["plan_s"] / images)


def ratios(f: dict[str, Any]) -> dict[str, float | None]:
    """The ratios that matter; None where a program is missing."""
    def over(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else round(a / b, 3)

    hot = f["hotpants_s"] or f["hotpants_derived_s"]
    d0, d1, d2 = (total(f[f"degree_{degree}"]) for degree in (0, 1, 2))
    whole = f["whole"]
    scale = [np.array(whole[pixels]["scale"]) for pixels in ("all", "informative")]
    return {
        "degree 0 / HOTPANTS": over(d0, hot), "degree 1 / HOTPANTS": over(d1, hot), "degree 2 / degree 1": over(d2, d1),
        "ois / degree 0": over(f["ois_s"], d0), "explicit / degree 0": over(f["explicit_s"], d0),
        "direct / degree 1": over(total(f["degree_1_direct"]), d1),
        "explicit / cutouts": over(f["cutouts_explicit_s"], total(f["cutouts"], 200)),
        "sfft / whole, all": over(whole["sfft_s"], total(whole["all"])),
        "whole, informative / (sfft / 10)": over(total(whole["informative"]),
                                                 whole["sfft_s"] and whole["sfft_s"] * peers.HOTPANTS_OF_SFFT),
        "informative: largest change of the scale": float(np.abs(scale[1] / scale[0] - 1).max()),
    }


def growth(small: bool) -> dict[str, Any]:
    """Series of cases with the exponent of a power law fitted to the time of one image."""
    figures: dict[str, Any] = {}
    for name, cases in (SMALL if small else GROWTH).items():
        rows = [{**case, **peers.alone(ours, *case.values())} for case in cases]
        grows = {"pixels": [c["side"]**2 for c in rows], "kernel": [c["kernel"]**2 for c in rows],
                 "degree": [(c["degree"] + 1) * (c["degree"] + 2) // 2 for c in rows],
                 "images": [c["images"] for c in rows]}[name]
        seconds = [c["image_s"] * (c["images"] if name == "images" else 1) for c in rows]
        exponent = float(np.polyfit(np.log(grows), np.log(seconds), 1)[0])
        figures[name] = {"exponent": round(exponent, 2), "x": grows, "seconds": seconds, "cases": rows}
    return figures


def memory(small: bool) -> dict[str, Any]:
    """Peak memory of the plan and of subtracting one image, results included, beside what the plan predicts."""
    cases = [(64, 7, 0), (96, 7, 1)] if small else [
        (250, 17, 0), (512, 17, 0), (512, 21, 1), (512, 21, 2), (1024, 17, 1), (2048, 21, 1), (4096, 21, 2)]
    figures = {f"{side} px, K = {kernel}, degree {degree}": peers.alone(_memory, side, kernel, degree)
               for side, kernel, degree in cases}
    if not small:
        figures["1024 px, K = 17, degree 1, double"] = peers.alone(_memory, 1024, 17, 1, precision="double")
    return figures


def _memory(side: int, kernel: int, degree: int, **settings: Any) -> dict[str, float]:
    field, made = crowded_field(side, 2), []
    used = traced_memory(lambda: made.append(ReferencePlan(
        field.reference, kernel, error=field.reference_error, mask=field.reference_mask, spatial_degree=degree,
        passes=3, **settings)))
    plan = made[0]
    image = field.images[:1], field.errors[:1], field.masks[:1]
    plan.subtract(*image)  # makes the matrix of the errors, once for a plan
    measured, predicted = traced_memory(lambda: plan.subtract(*image)), plan.bytes_per_image()
    return {"plan_gb": round(used / 1e9, 3), "image_mb": round(measured / 1e6, 1),
            "predicted_mb": round(predicted / 1e6, 1), "measured/predicted": round(measured / predicted, 3),
            "planes": round(measured / 8 / side**2, 1)}


def draw(figures: dict[str, Any]) -> None:
    """One panel for each series: time against what grows, both logarithmic, with the fitted power."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = {"pixels": "pixels of the frame", "kernel": "kernel pixels", "degree": "polynomial terms of the kernel",
              "images": "images"}
    pages, axes = pyplot.subplots(1, len(figures), figsize=(3.4 * len(figures), 3.2), layout="constrained")
    for axis, (name, series) in zip(np.atleast_1d(axes), figures.items(), strict=True):
        axis.loglog(series["x"], series["seconds"], "o-", color="#1f5f99")
        axis.set(xlabel=labels[name], ylabel="s" if name == "images" else "s per image",
                 title=f"time ~ {name}^{series['exponent']:.2f}")
        axis.grid(alpha=0.3)
    pages.savefig(RESULTS / "growth.png", dpi=110)


def main() -> int:
    """Run the groups asked for; print and keep the figures."""
    known = {"acceptance": acceptance, "growth": growth, "memory": memory}
    return run_groups(__doc__, "engine", known, {"growth": draw})


if __name__ == "__main__":
    sys.exit(main())
