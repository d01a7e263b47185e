"""The direct solver against the explicit U matrix: a batch of 20 images, 250 px, K = 17.

    python bench/direct_solver.py

Both sides run in this one process tree, each in a process of its own so that its peak memory is its own. The explicit
side builds U by index arrays (as the first interface offers them), masks rows, weights them and calls
numpy.linalg.lstsq: one pass, image by image. Our side does three passes of model weights and clipping with exact
covariance, and returns differences, models and variances. A second comparison without weights, masks and clipping shows
that both find the same kernel.
"""

from __future__ import annotations

import multiprocessing
import sys

import numpy as np
from common import best_of, extra_memory, save

from gpudia import ReferencePlan, build_the_U_matrix
from gpudia.simulate import SimulationSettings, simulate_field

SIDE, K, BATCH = 250, 17, 20


def series(equal: bool):
    """Reference, images, errors, masks of a crowded field with constant kernels."""
    made = simulate_field(SimulationSettings(shape=(SIDE, SIDE), n_epochs=BATCH + 1, seed=3, rotation=0.0, dither=0.0))
    ours = [f for i, f in enumerate(made.frames) if i != made.reference_index]
    reference = made.frames[made.reference_index]
    masks = np.zeros((BATCH, SIDE, SIDE), bool) if equal else np.stack([f.mask != 0 for f in ours])
    errors = np.stack([np.ones_like(f.error) if equal else f.error for f in ours])
    return reference.data.astype(float), np.stack([f.data for f in ours]), errors, masks


def explicit(reference, images, errors, masks):
    """One unweighted pass per image, U stored whole, as a plain script would do it."""
    h = K // 2
    kernels = []
    for image, error, mask in zip(images, errors, masks, strict=True):
        U, _, _ = build_the_U_matrix(reference, K)
        y, x = (v[h:-h, h:-h].ravel() for v in np.mgrid[-1:1:SIDE * 1j, -1:1:SIDE * 1j])
        U = np.column_stack([U, np.ones(len(U)), x, y])
        keep = ~mask[h:-h, h:-h].ravel()
        sigma = error[h:-h, h:-h].ravel()[keep]
        solution, *_ = np.linalg.lstsq(U[keep] / sigma[:, None], image[h:-h, h:-h].ravel()[keep] / sigma, rcond=None)
        kernels.append(solution[:K * K].reshape(K, K))
    return np.array(kernels)


def ours(reference, images, errors, masks, solver="direct", covariance="exact", **settings):
    """Plan included."""
    settings = {"passes": 3} | settings
    plan = ReferencePlan(reference, K, solver=solver, covariance=covariance, **settings)
    return plan.subtract(images, errors, masks)


def measure(side: str, queue) -> None:
    """Run one side in this process; put seconds per image and extra memory."""
    reference, images, errors, masks = series(equal=False)
    run = {"explicit": explicit, "direct": ours,
           "iterative": lambda *a: ours(*a, solver="iterative", covariance="shared")}[side]
    count = 4 if side == "explicit" else BATCH


    def once():
        run(reference, images[:count], errors[:count], masks[:count])

    memory = extra_memory(once)  # before anything is warm: what a user's process would need
    seconds, _ = best_of(once, 3)
    queue.put((seconds / count, memory))


def main() -> int:
    """Print and keep the figures."""
    context = multiprocessing.get_context("spawn")
    figures = {}
    for side in ("explicit", "direct", "iterative"):
        queue = context.Queue()
        process = context.Process(target=measure, args=(side, queue))
        process.start()
        seconds, memory = queue.get()
        process.join()
        figures[side] = {"seconds_per_image": round(seconds, 4), "peak_memory_mb": round(memory / 1e6, 1)}
    reference, images, errors, masks = series(equal=True)
    oracle = explicit(reference, images[:3], errors[:3], masks[:3])
    same = ours(reference, images[:3], errors[:3], masks[:3], passes=1, clip=np.inf).kernel
    figures["largest_kernel_difference"] = float(np.abs(same - oracle).max() / oracle.max())
    for side in ("direct", "iterative"):
        figures[f"speedup_{side}"] = round(figures["explicit"]["seconds_per_image"]
                                           / figures[side]["seconds_per_image"], 2)
        figures[f"memory_ratio_{side}"] = round(figures[side]["peak_memory_mb"]
                                                / figures["explicit"]["peak_memory_mb"], 4)
    save("direct_solver", figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
