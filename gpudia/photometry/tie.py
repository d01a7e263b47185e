"""Light curves of one field against two references in the same flux unit."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from gpudia.errors import InputError
from gpudia.photometry.lightcurves import LightCurves

__all__ = ["Tie", "tie_references"]


class Tie(NamedTuple):
    """`ratio` with its `error` turns fluxes of `curves` before the tie into those of the other run; from `n` frames."""

    curves: LightCurves
    ratio: float
    error: float
    n: int


def tie_references(curves: LightCurves, to: LightCurves) -> Tie:
    """Bring light curves to the flux unit of a run of the same frames against another reference.

    Fluxes are ADU of a run's reference. A frame's photometric scales against both, which all stars of the region make
    together, give the ratio of the two units: ``scale / scale_to``. (Fluxes of single stars on the two references are
    less good for it: in a crowded field the wider PSF has more of the neighbours in its aperture, 2.7 % in a simulated
    one.) Differences then agree up to what each star has in the references themselves.

    Parameters
    ----------
    curves : LightCurves
        To be converted.
    to : LightCurves
        Whose unit it is to be.

    Returns
    -------
    Tie
        With all fluxes and errors multiplied by the ratio, the mean over the frames weighted by the scales' errors.

    Raises
    ------
    InputError
        No frame is in both, or their scales are not positive.
    """
    first, second = ({str(row["name"]): row for row in c.epochs} for c in (curves, to))
    names = sorted(set(first) & set(second))
    if not names:
        raise InputError("curves must have a frame in common with those that they are tied to, got none")
    s, e, s_to, e_to = (np.array([float(rows[n][key]) for n in names]) for rows, key in
                        ((first, "scale"), (first, "scale_err"), (second, "scale"), (second, "scale_err")))
    known = np.isfinite(s) & np.isfinite(s_to) & (s > 0) & (s_to > 0)
    if not known.any():
        raise InputError("scales of the common frames must be positive, got none that is in both")
    ratios, relative = (s / s_to)[known], np.hypot(e / s, e_to / s_to)[known]
    weight = 1 / np.maximum(relative, 1e-6) ** 2
    ratio = float(np.average(ratios, weights=weight))
    planes = {name: plane if name.startswith("FLAGS") else plane * np.float32(ratio)
              for name, plane in curves.planes.items()}
    sources = curves.sources.copy()
    for name in ("flux_ref", "flux_ref_err"):
        sources[name] = np.asarray(sources[name], float) * ratio
    error = ratio / float(np.sqrt(weight.sum()))
    return Tie(replace(curves, sources=sources, planes=planes), ratio, error, len(ratios))
