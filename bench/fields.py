"""Simulated crowded fields for the engine's benches: reference, images, errors, masks, truth; kept in a folder."""

from __future__ import annotations

import pickle
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io.fits import Header

from gpudia.images import flag_defects, make_frame
from gpudia.simulate import SimulationSettings, simulate_field

__all__ = ["Field", "crowded_field"]


@dataclass(frozen=True)
class Field:
    """Arrays of a series: reference (H, W) with error and mask, images (B, H, W) with theirs, and truth."""

    reference: Any
    reference_error: Any
    reference_mask: Any
    images: Any
    errors: Any
    masks: Any
    scales: Any
    stars: Any  # (S, 3): x, y, flux

    def take(self, count: int) -> Field:
        """The first images; repeated where more are wanted than there are (each is solved afresh)."""
        index = np.arange(count) % len(self.images)
        return Field(self.reference, self.reference_error, self.reference_mask, self.images[index], self.errors[index],
                     self.masks[index], self.scales[index], self.stars)


#: Seeing of the epochs, FWHM in pixels: what a kernel of 21 px matches. At 6 px the wings beyond its edge, 1 % of the
#: light, are missing from the scale of this and of every other program.
_SEEING = (3.0, 4.2)


def crowded_field(side: int, epochs: int, folder: str | Path | None = None, depth: float = 1.0, seed: int = 3) -> Field:
    """PSF that varies over the field, seeing and transparency of every epoch its own, cosmic rays, masks, weights."""
    name = f"gpudia-bench-2-{side}-{epochs}-{depth}-{seed}-{_SEEING[1]}.pickle"
    path = Path(folder or tempfile.gettempdir()) / name
    if path.is_file():
        return pickle.loads(path.read_bytes())
    made = simulate_field(SimulationSettings(shape=(side, side), n_epochs=epochs + 1, seed=seed, rotation=0.0,
                                             dither=0.0, n_variables=0, microlensing=False, reference_depth=depth,
                                             fwhm_range=_SEEING))
    images = [f for f in made.frames if f is not made.reference]
    reference, truth = made.reference, made.truth
    # A cosmic ray that the reference's mask does not know is in every difference; the job flags it before the plan.
    frame = make_frame(reference.data, error=reference.error, bits=reference.mask,
                       header=Header({"GAIN": reference.gain * depth}))
    fluxes = np.asarray(truth["flux"], float)[:, made.reference_index]
    stars = np.column_stack([np.asarray(truth["x"], float), np.asarray(truth["y"], float), fluxes])
    field = Field(reference.data.astype(float), reference.error.astype(float),
                  flag_defects(frame, reference.fwhm).mask != 0,
                  np.stack([f.data for f in images]).astype(float), np.stack([f.error for f in images]).astype(float),
                  np.stack([f.mask != 0 for f in images]), np.array([f.scale for f in images]), stars)
    path.write_bytes(pickle.dumps(field))
    return field
