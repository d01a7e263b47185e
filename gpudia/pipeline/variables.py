"""Which stars vary: indices for every star of a run, and all of them in order of significance."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from astropy.table import Table
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from gpudia.flags import FRAME_FLAGS, SOURCE_FLAGS
from gpudia.photometry import UNUSABLE, variability, variability_score

__all__ = ["add_variability", "variables_table"]

#: A star with a score from here on is flagged variable: among 10^6 constant ones less than one by chance.
_VARIABLE = 5.0
_ABOUT = {
    "n_good": "epochs that the indices are of: measured, none of the flags masked_pixels, saturated, outside, "
              "reference_masked, and not the reference itself",
    "chi2": "reduced chi^2 of the flux about its weighted mean",
    "von_neumann": "von Neumann's ratio, weighted by the errors: 2 for noise without memory, less for slow changes",
    "stetson_j": "Stetson's J of successive epochs: 0 for a constant star",
    "amplitude": "95th less 5th percentile of the flux, noise included",
    "excess": "rms of the flux beyond its errors",
    "score": "sigma by which chi2 is beyond that of stars of like brightness",
    "beside": "source_id of the nearest variable star with a higher score within two aperture radii, whose light this "
              "one may show; -1: none",
}


def add_variability(sources: Table, epochs: Table, planes: Mapping[str, NDArray], radius: float) -> None:
    """Add to `sources` the indices of every star, its flags of all epochs, and ``variable`` from a score of 5 on.

    `radius` is that of the aperture, pixels. A single frame that is the reference tells nothing (its differences are 0)
    and is left out. Frames of a stacked reference stay: their total fluxes have the noise of the frame alone, see
    `gpudia.pipeline.measure`.
    """
    mjd = np.asarray(epochs["mjd"], float)
    order = np.argsort(mjd, kind="stable")  # epochs without a time come last
    order = order[np.asarray(epochs["flags"])[order] & FRAME_FLAGS.is_reference == 0]
    found = variability(*(planes[name][order] for name in ("FLUX", "FLUX_ERR", "FLAGS")))
    flags = np.asarray(sources["flags"])
    if len(order):  # why a star was never measured
        flags = flags | np.bitwise_and.reduce(np.asarray(planes["FLAGS"])[order], axis=0)
    for name in ("n_good", "chi2", "von_neumann", "stetson_j", "amplitude", "excess"):
        sources[name] = getattr(found, name)
    sources["score"] = variability_score(found.chi2, found.n_good, sources["flux_ref"], flags & UNUSABLE == 0)
    variable = np.nan_to_num(sources["score"]) >= _VARIABLE
    sources["flags"] = np.where(variable, flags | SOURCE_FLAGS.variable, flags).astype(np.int32)
    sources["beside"] = _beside(sources, variable, 2 * radius)
    for name, about in _ABOUT.items():
        sources[name].description = about


def _beside(sources: Table, variable: NDArray[np.bool_], reach: float) -> NDArray[np.int64]:
    """The nearest variable star with a higher score within reach of each star, by its id; -1 where there is none."""
    xy, score = np.column_stack([sources["x"], sources["y"]]), np.nan_to_num(sources["score"], nan=-np.inf)
    ids, found = np.asarray(sources["source_id"]), np.full(len(sources), -1, np.int64)
    which = np.flatnonzero(variable)
    if which.size:
        for star, near in enumerate(cKDTree(xy[which]).query_ball_point(xy, reach)):
            better = [which[k] for k in near if score[which[k]] > score[star]]
            if better:
                found[star] = ids[min(better, key=lambda k: np.hypot(*(xy[k] - xy[star])))]
    return found


def variables_table(sources: Table) -> Table:
    """All stars, the one that varies most significantly first, those without a score last (their flags say why)."""
    score = np.asarray(sources["score"], float)
    order = np.argsort(np.where(np.isfinite(score), -score, np.inf), kind="stable")
    table = sources[order]
    table.remove_columns([name for name in ("x_cutout", "y_cutout") if name in table.colnames])
    table.add_column(np.arange(1, len(table) + 1), name="rank", index=0)
    table["rank"].description = "1: the most significant"
    return table
