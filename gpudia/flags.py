"""The tables of flag bits: for pixels, for frames (epochs) and for sources (stars, per epoch).

Every bit has a value, a name, a meaning and what a user can do about it. Values are part of the output files:
they are never reused or renumbered.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gpudia.errors import ConfigError

__all__ = ["CANDIDATE_FLAGS", "FILE_FLAGS", "FRAME_FLAGS", "PIXEL_FLAGS", "SOURCE_FLAGS", "Flag", "FlagTable",
           "mask_bits_of"]


@dataclass(frozen=True)
class Flag:
    """One bit: its value (a power of two), name, meaning and remedy."""

    value: int
    name: str
    meaning: str
    remedy: str


class FlagTable:
    """An ordered set of flag bits with an attribute for each value.

    Examples
    --------
    >>> FRAME_FLAGS.deconvolving
    4
    >>> FRAME_FLAGS.decode(5)
    ('no_convergence', 'deconvolving')
    """

    def __init__(self, *flags: Flag) -> None:
        values = [f.value for f in flags]
        if len(set(values)) != len(values) or any(v <= 0 or v & (v - 1) for v in values):
            raise ValueError(f"flag values must be distinct powers of two, got {values}")
        self.flags = flags

    def __getattr__(self, name: str) -> int:
        for flag in self.__dict__.get("flags", ()):
            if flag.name == name:
                return flag.value
        raise AttributeError(f"no flag named {name!r}")

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.flags)

    def decode(self, value: int) -> tuple[str, ...]:
        """Names of the bits that are set in `value`; unknown bits as ``bit_N``."""
        left, names = int(value), []
        for flag in self.flags:
            if left & flag.value:
                names.append(flag.name)
                left &= ~flag.value
        names += [f"bit_{b}" for b in range(left.bit_length()) if left >> b & 1]
        return tuple(names)

    def to_markdown(self) -> str:
        """Return the table as Markdown, for documentation."""
        rows = ["| value | name | meaning | what to do |", "| --- | --- | --- | --- |"]
        rows += [f"| {f.value} | `{f.name}` | {f.meaning} | {f.remedy} |" for f in self.flags]
        return "\n".join(rows)


#: Bits of a pixel mask. The first four are those of the LCO/BANZAI bad-pixel mask.
PIXEL_FLAGS = FlagTable(
    Flag(1, "bad", "bad pixel of the detector", "none needed"),
    Flag(2, "saturated", "at or above the saturation level", "use shorter exposures for this star"),
    Flag(4, "low_qe", "low quantum efficiency", "none needed"),
    Flag(8, "cosmic_ray", "hit by a cosmic ray", "none needed"),
    Flag(16, "no_data", "outside the frame, or not a finite number", "take a smaller region"),
    Flag(32, "reference", "masked reference pixels carry a good part of the kernel",
         "use another or a stacked reference"),
    Flag(64, "border", "too near the border of the region for the kernel", "take a larger region"),
    Flag(128, "clipped", "rejected in the kernel fit: far from the model (still measured)", "look at the difference"),
)

#: Those of them that the mask in a file can bring along; the others are made here.
FILE_FLAGS = FlagTable(*PIXEL_FLAGS.flags[:5])


def mask_bits_of(chosen: Any) -> tuple[tuple[str, int], ...] | None:
    """Bring a choice of the bits of a file's mask into one form.

    Parameters
    ----------
    chosen : None, str, int, sequence or mapping
        Names of `FILE_FLAGS`, or values: these bits mean "do not use", all others nothing. Or a mapping (or pairs) of
        names to the values that a file has for them, one or several, where they are not those of `FILE_FLAGS`.
        A value may be a sum of bits. None: every bit means "do not use".

    Returns
    -------
    tuple of (str, int) or None
        Name of the flag and the bits of the file that set it, in the order of the table. Bits without a name are put
        to ``bad``.

    Raises
    ------
    ConfigError
        A name is unknown, or a value is not a positive integer.

    Examples
    --------
    >>> mask_bits_of(["saturated", 8])
    (('saturated', 2), ('cosmic_ray', 8))
    >>> mask_bits_of({"saturated": 4, "bad": [1, 16]})
    (('bad', 17), ('saturated', 4))
    """
    if chosen is None:
        return None
    found = dict.fromkeys((f.name for f in FILE_FLAGS), 0)
    try:
        for name, value in _named_bits(chosen):
            found[name] |= value
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        names = ", ".join(found)
        raise ConfigError(f"mask_bits must be names ({names}) or positive integers, or a table of such names and "
                          f"integers, got {chosen!r}") from error
    return tuple((name, value) for name, value in found.items() if value)


def _named_bits(chosen: Any) -> Iterable[tuple[str, int]]:
    if isinstance(chosen, Mapping):
        chosen = chosen.items()
    for one in [chosen] if isinstance(chosen, str | int) else chosen:
        if isinstance(one, str):
            yield one, getattr(FILE_FLAGS, one)
        elif isinstance(one, tuple | list):
            name, values = one
            for value in values if isinstance(values, tuple | list) else [values]:
                yield name, _positive(value)
        else:
            value = _positive(one)
            for flag in FILE_FLAGS:
                yield flag.name, value & flag.value
            yield "bad", value & ~sum(f.value for f in FILE_FLAGS)


def _positive(value: Any) -> int:
    if isinstance(value, bool) or not 0 < operator.index(value) < 1 << 63:
        raise ValueError
    return operator.index(value)


#: Bits of a frame (epoch); also the status bits of a `DifferenceStack`.
FRAME_FLAGS = FlagTable(
    Flag(1, "no_convergence", "the iterative solve did not converge; the direct one was used", "look at the reference"),
    Flag(2, "singular", "normal matrix singular: kernel from its well-determined part only",
         "smaller kernel, larger region or lower degree"),
    Flag(4, "deconvolving", "the reference is less sharp than the image: noise is amplified",
         "use a sharper reference"),
    Flag(8, "no_pixels", "fewer good pixels than unknowns: no solution", "check the mask; take a larger region"),
    Flag(16, "resampled", "the image was resampled onto the reference's grid", "none needed"),
    Flag(32, "bad_chi2", "chi^2 per pixel of the fit above 2 or below 0.5 (max_chi2)",
         "check gain and read noise, degree and kernel size"),
    Flag(64, "gain_guessed", "gain missing or implausible: noise taken from the data", "give the gain"),
    Flag(128, "saturation_guessed", "saturation level taken from the dtype or from the data", "give the saturation"),
    Flag(256, "bad_scale", "photometric scale not positive or with an error above 10 %",
         "check for clouds and for the reference"),
    Flag(512, "poor_registration", "predicted error of the registration over the region above 0.1 px "
         "(max_registration_error)", "check the star matches"),
    Flag(1024, "partly_outside", "part of the region lies outside this frame", "take a smaller region"),
    Flag(2048, "is_reference", "this frame is the reference: its differences are not independent",
         "leave it out of statistics"),
    Flag(4096, "not_finite", "no finite pixel in the image, or the solution is not finite", "check the file"),
    Flag(8192, "scale_mismatch", "constant stars disagree with the kernel's photometric scale by more than 3 sigma",
         "check flat field and background"),
    Flag(16384, "in_reference", "part of the stacked reference; errors of flux_diff count the noise that they share",
         "none needed"),
    Flag(32768, "noise_mismatch", "the sky's noise differs by more than a factor 1.5 from what gain and read noise (or "
         "the error plane) say", "check them, then settle it with noise = 'header' or 'data'"),
    Flag(65536, "not_white", "neighbouring pixels of the difference are correlated above 0.5 (max_correlation)",
         "look at the difference: registration, kernel size, a sky that varies"),
    Flag(131072, "no_time", "no header keyword says when the frame was taken: its fluxes have no time",
         "name the keyword (mjd_keys)"),
)

#: Bits of one star in one epoch (or of a star over all epochs in SOURCES).
SOURCE_FLAGS = FlagTable(
    Flag(1, "masked_pixels", "masked pixels in the aperture: flux not measured, or from part of it", "use with care"),
    Flag(2, "saturated", "saturated pixel in the aperture, in the image or in the reference", "do not use"),
    Flag(4, "outside", "aperture not fully inside the region: not measured", "take a larger region"),
    Flag(8, "reference_masked", "masked reference pixel under the aperture and the kernel", "use another reference"),
    Flag(16, "no_reference_flux", "flux on the reference not measurable or not positive", "use flux_diff"),
    Flag(32, "clipped_pixels", "pixels in the aperture were rejected in the kernel fit (variable, or cosmic ray)",
         "look at the difference"),
    Flag(64, "neighbour", "another star within the aperture: shares its flux, or was not measured in that epoch where "
         "the two are fitted together", "use PSF fluxes"),
    Flag(128, "variable", "varies by more than its errors say (SOURCES only)", "have a look: it may be interesting"),
    Flag(256, "limit", "total flux below 3 sigma: magnitude is an upper limit", "use the flux"),
    Flag(512, "duplicate", "within half a pixel of another entry of the catalog: one light curve under two ids "
         "(SOURCES only)", "use the other entry"),
    Flag(1024, "poor_fit", "the PSF does not describe the star on the difference: its error is raised accordingly",
         "look at the difference; compare with the aperture sum"),
    Flag(2048, "sets_kernel", "the kernel follows this star alone: what it does not show cannot be told",
         "take a larger region, or a smaller kernel"),
)

#: Bits of a detection on a difference image, and of a candidate: what speaks against a variable star.
CANDIDATE_FLAGS = FlagTable(
    Flag(1, "cosmic_ray", "sharper than the PSF", "look at the thumbnail"),
    Flag(2, "dipole", "a lobe of the other sign and of comparable flux within 1.5 FWHM: misregistration, or motion",
         "look at the thumbnail"),
    Flag(4, "masked_pixels", "masked pixels hide more than 5 % of it", "look at the thumbnail"),
    Flag(8, "bright_star", "less than 2 % of a star within 1.5 FWHM: its subtraction may leave that",
         "trust it when the star varies in many epochs"),
    Flag(16, "saturated", "saturated pixels within 2 FWHM", "use shorter exposures for this star"),
    Flag(32, "one_epoch", "seen in one epoch only (candidates)", "none needed"),
)
