"""The choice of the reference among many frames."""

import math
from pathlib import Path

import numpy as np
from astropy.table import Table

from gpudia.config import RunConfig
from gpudia.images import FrameQuality
from gpudia.pipeline import registering
from gpudia.pipeline.looks import Look, Seen


def test_of_a_long_series_only_the_most_promising_frames_are_matched_to_find_the_clearest(monkeypatch):
    """Eighty frames of the same stars, seeing and noise: the one with the clearest sky is the reference."""
    rng = np.random.default_rng(4)
    n, clear = 80, rng.uniform(0.4, 1.0, 80)
    x, y = rng.uniform(20, 480, (2, 60))
    flux = np.geomspace(1e5, 1e3, 60)

    def look(i):
        stars = Table({"x": x, "y": y, "flux": flux * clear[i] * rng.normal(1, 0.01, 60), "flags": np.zeros(60, int)})
        stars["x_err"] = stars["y_err"] = np.full(60, 0.02)
        stars["flux"][rng.integers(60)] *= 5  # a variable star
        return Look(Path(f"{i}.fits"), str(i), shape=(500, 500), usable_share=1.0, pixel_scale=math.nan,
                    quality=FrameQuality(3.0, 0.0, 60, 100.0, 5.0, 0.0), seen=Seen(stars, None, None))

    looks, matched = [look(i) for i in range(n)], []
    true = registering._flux_ratio
    monkeypatch.setattr(registering, "_flux_ratio", lambda *args: matched.append(args) or true(*args))
    ranked = registering.rank_looks(looks, RunConfig("-", "out"))
    assert len(matched) == 64
    assert ranked[0].name == str(clear.argmax())
    assert sorted(int(look.name) for look in ranked) == list(range(n))
