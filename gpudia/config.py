"""The settings of a run: one frozen dataclass, checked when it is made, TOML in and out."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import tomli_w

from gpudia.errors import ConfigError
from gpudia.flags import mask_bits_of
from gpudia.selection import parse_condition
from gpudia.setting_rules import (
    MAYBE_TEXTS,
    SITE,
    TEXT,
    TEXTS,
    YES_NO,
    Rule,
    any_number,
    auto_or,
    choice,
    integer,
    number,
    optional,
    several,
    sky_angle,
)

__all__ = ["LayoutNames", "RunConfig"]


@dataclass(frozen=True)
class LayoutNames:
    """Names of FITS extensions and header keywords, where the frames do not use the common ones.

    Each is a text or several, of which the first that a file has is used; None leaves the reader's default.

    Parameters
    ----------
    image_hdu, error_hdu, mask_hdu, catalog_hdu : tuple of str, optional
        EXTNAME of the image, its error (1 sigma, ADU), the mask (bits of `gpudia.flags.PIXEL_FLAGS`), the star catalog.
    gain_keys, read_noise_keys, saturation_keys, exptime_keys : tuple of str, optional
        Keywords of the gain (e-/ADU), the read noise (e-), the saturation level (ADU) and the exposure time (s).
    mid_keys, mjd_keys : tuple of str, optional
        Keywords of the middle and of the start of the exposure, UTC, MJD or ISO date.
    filter_keys, instrument_keys, airmass_keys, fwhm_keys, scale_keys : tuple of str, optional
        Keywords of the filter's and the instrument's name, the airmass, the seeing (arcsec) and the pixel scale
        (arcsec/pixel).
    mask_bits : optional
        Which bits of the mask mean "do not use": names of `gpudia.flags.FILE_FLAGS` or values; or a table of such names
        with the values that the mask has for them (``{saturated = 4, bad = [1, 16]}``). None: every bit.

    Raises
    ------
    ConfigError
        If a name is empty or not a text, or a bit unknown.
    """

    image_hdu: tuple[str, ...] | None = None
    error_hdu: tuple[str, ...] | None = None
    mask_hdu: tuple[str, ...] | None = None
    catalog_hdu: tuple[str, ...] | None = None
    gain_keys: tuple[str, ...] | None = None
    read_noise_keys: tuple[str, ...] | None = None
    saturation_keys: tuple[str, ...] | None = None
    exptime_keys: tuple[str, ...] | None = None
    mid_keys: tuple[str, ...] | None = None
    mjd_keys: tuple[str, ...] | None = None
    filter_keys: tuple[str, ...] | None = None
    instrument_keys: tuple[str, ...] | None = None
    airmass_keys: tuple[str, ...] | None = None
    fwhm_keys: tuple[str, ...] | None = None
    scale_keys: tuple[str, ...] | None = None
    mask_bits: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask_bits", mask_bits_of(self.mask_bits))
        for f in fields(self):
            if f.name != "mask_bits":
                names = optional(TEXTS).apply(f"layout.{f.name}", getattr(self, f.name))
                object.__setattr__(self, f.name, names)


def _refuse_unknown(settings: Iterable[str], owner: type, prefix: str = "", written: Mapping[str, str] = {}) -> None:
    """Name a setting that is none, with the nearest right one; `written` are names that a file has for others."""
    known = [written.get(f.name, f.name) for f in fields(owner)]
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"{prefix}{key} must be the name of a setting, got an unknown one; {hint}")


def _as_layout(value: Any) -> LayoutNames:
    if isinstance(value, Mapping):
        _refuse_unknown(value, LayoutNames, "layout.")
    return LayoutNames(**value) if isinstance(value, Mapping) else value


_LAYOUT = Rule("a table of names", lambda v: isinstance(v, LayoutNames | Mapping), _as_layout)

_SIGNIFICANCE = Rule("a number of sigma, at least 3", lambda v: not isinstance(v, bool | str) and 3 <= v < math.inf,
                     float)

_FACTOR = Rule("a number above 1", lambda v: not isinstance(v, bool | str) and 1 < v < math.inf, float)


def _setting(rule: Rule, default: Any = dataclasses.MISSING) -> Any:
    return field(default=default, metadata={"rule": rule})


@dataclass(frozen=True)
class RunConfig:
    """The settings of a run (`gpudia.run`, ``gpudia run``), checked when they are made.

    Parameters
    ----------
    frames : str or sequence of str or path
        Files, folders or glob patterns; see `expand_frames`. Relative to the working directory.
    output : str or path
        Folder to write to.
    ra, dec : float or str, optional
        The target, ICRS: degrees, or sexagesimal (hours in `ra`, degrees in `dec`); kept as degrees. Both or
        neither; without them the whole frame is used and there is no target.
    select : str or sequence of str
        Conditions on the columns of the series table (``"fwhm < 6"``, ``"filter == 'rp'"``); frames that do not
        satisfy all of them are skipped. See `gpudia.selection`.
    mixed : sequence of {"filter", "instrument"}
        What may differ from frame to frame. By default neither: a real mixture stops the run, and the odd frame among
        many (a tenth at most) fails.
    site : sequence of float, optional
        The observatory, for barycentric times: longitude (degrees east), latitude (degrees), height (m). Default: from
        the headers.
    size : int
        Side of the region around the target, pixels: at least 16 and twice `kernel_size`.
    reference : str or path
        ``auto`` (the frame with the smallest expected noise of a star's flux), ``stack`` (the mean of the best) or a
        file.
    stack_size : int or "auto"
        Frames in a stack, at least 2. ``auto``: those at most 15 % blunter than the sharpest, up to 20; a number
        takes blunter ones, too, where it needs them.
    align : bool
        Register every frame to the reference; False where they are on one pixel grid already.
    resample : {"auto", "never", "always"}
        Whether frames are interpolated onto the reference's grid. ``auto``: only where the kernel cannot absorb
        what a shift by whole pixels leaves.
    max_rms, min_matches : float, int
        Largest residual of a registration, pixels; fewest matched stars, at least 3.
    detection_threshold : float
        Faintest peak taken for a star, in sigma of the sky noise.
    max_stars : int
        Most stars detected per frame (the brightest), at least 3.
    find_defects : bool
        Mask pixels that are sharper than a star can be (cosmic rays, bad pixels and columns), on the frames and
        once more on the differences.
    lacosmic : bool
        Look for cosmic rays with L.A.Cosmic as well; needs astroscrappy, ``pip install 'gpudia[lacosmic]'``.
    kernel_size : int or "auto"
        Side of the matching kernel, pixels: odd, at least 3. ``auto``: from the frames' seeing.
    kernel_support : {"circle", "square", "aic"}
        Which pixels of the kernel's square are used; ``aic``: the circle with the least information criterion.
    spatial_degree, background_degree : int or "auto"
        Degrees by which kernel (0 to 3) and background (0 to 5) vary. ``auto``: for the kernel the one with the least
        AIC on three frames, at most 1 with fewer than 180 bright stars and 0 with fewer than 90; for the background
        the kernel's, at least 1.
    scale_degree : int or "auto"
        Degree by which the photometric scale varies, at most the kernel's. ``auto``: the kernel's.
    smoothness : float
        Regularisation of the kernel, 0: none; see `ReferencePlan`.
    passes : int
        Passes of weighting and clipping of the kernel fit, 1 to 20.
    clip : float
        Pixels farther from the model than this are left out of the fit, in sigma.
    solver : {"auto", "direct", "iterative"}
        How the normal equations are solved.
    correct_bias : bool
        Put right what the noise of the reference does to the kernel; see `ReferencePlan`.
    aperture_radius : float or "auto"
        Radius of the aperture, pixels, the same in all frames. ``auto``: from the reference's FWHM.
    photometric_catalog : str or path
        Where the zero point of magnitudes comes from: a table with ``ra``, ``dec`` (degrees) and magnitudes, in any
        format that astropy reads; ``auto``: magnitudes (``mag``) of the reference frame's own catalog, where it has
        some; ``none``: magnitudes stay instrumental.
    magnitude_column : str
        Its column of magnitudes; errors are taken from ``NAME_err``, ``NAMEerr`` or ``e_NAME``.
    zero_point, zero_point_err : float, optional
        Magnitude of 1 ADU on the reference and its error, instead of a catalog's.
    positions : str or path, optional
        Table with further positions to be measured as if they were stars of the reference, and kept out of the kernel
        fit as the target is: columns ``x, y`` (0-based pixels of the reference frame) or ``ra, dec`` (degrees), and
        ``id`` (else running numbers above the stars').
    detect : float, optional
        Search every difference for what varies, known star or not, down to this significance (sigma, at least 3; 5 is
        usual). Default: no search.
    gain, read_noise, saturation : float, optional
        Take this instead of the headers' values; e-/ADU, e-, ADU.
    noise : {"auto", "header", "data"}
        What variances are made of where a frame has no error plane. ``auto``: the sky's noise as measured, and the
        photon noise of stars by the gain; ``header``: gain and read noise alone; ``data``: nothing but the image.
    max_chi2, max_epsilon, max_correlation, max_registration_error : float
        From where on a frame is flagged ``bad_chi2`` (chi^2 per pixel above this or below its inverse),
        ``scale_mismatch`` (scale error that the constant stars show, relative, if it is 3 sigma, too), ``not_white``
        (correlation of neighbouring pixels of the difference) and ``poor_registration`` (predicted error, pixels).
    layout_names : LayoutNames or mapping
        Names of extensions and keywords; the table ``[layout]`` in TOML.
    backend : {"auto", "numpy", "cupy"}
        Where the numbers are computed. Default: the environment variable ``GPUDIA_BACKEND``, else ``auto``.
    batch_size : int or "auto"
        Frames solved at once. ``auto``: what the memory holds.
    workers : int
        Processes on this machine that work on whole batches, each on a GPU of its own where there are several; needs
        Dask, ``pip install 'gpudia[dask]'``. 0: this process does.
    dask : str, optional
        Address of a Dask scheduler (``tcp://host:8786``) whose workers do: frames and `output` must be on storage that
        they all see.
    readers : int or "auto"
        Processes beside this one that read and register frames and, on the CPU, do whole batches, where they are half
        of the cores or more and the memory holds a batch for each. ``auto``: one for every core from 50 frames on.
    products : bool
        Write the difference images (``difference/NAME.fits``).
    resume, overwrite : bool
        Go on with an earlier run in `output`, or replace it. Not both.

    Raises
    ------
    ConfigError
        If a value breaks its rule; the message names key, rule and value.

    Examples
    --------
    >>> config = RunConfig("night/*.fits", "out", ra="17:51:40.2", dec="-29:53:26", kernel_size=17)
    >>> config.ra, config.replace(size=300).size
    (267.9175, 300)
    """

    frames: tuple[str, ...] = _setting(TEXTS)
    output: str = _setting(TEXT)
    ra: float | None = _setting(optional(sky_angle(True, 0, 360)), None)
    dec: float | None = _setting(optional(sky_angle(False, -90, 90)), None)
    select: tuple[str, ...] = _setting(MAYBE_TEXTS, ())
    mixed: tuple[str, ...] = _setting(several("filter", "instrument"), ())
    site: tuple[float, float, float] | None = _setting(optional(SITE), None)
    size: int = _setting(integer(16), 250)
    reference: str = _setting(TEXT, "auto")
    stack_size: int | str = _setting(auto_or(integer(2)), "auto")
    align: bool = _setting(YES_NO, True)
    resample: str = _setting(choice("auto", "never", "always"), "auto")
    max_rms: float = _setting(number("pixels"), 0.5)
    min_matches: int = _setting(integer(3), 3)
    detection_threshold: float = _setting(number("sigma"), 5.0)
    max_stars: int = _setting(integer(3), 5000)
    find_defects: bool = _setting(YES_NO, True)
    lacosmic: bool = _setting(YES_NO, False)
    kernel_size: int | str = _setting(auto_or(integer(3, odd=True)), "auto")
    kernel_support: str = _setting(choice("circle", "square", "aic"), "circle")
    spatial_degree: int | str = _setting(auto_or(integer(0, 3)), "auto")
    background_degree: int | str = _setting(auto_or(integer(0, 5)), "auto")
    scale_degree: int | str = _setting(auto_or(integer(0, 3)), "auto")
    smoothness: float = _setting(number("a share", zero=True), 0.0)
    passes: int = _setting(integer(1, 20), 4)
    clip: float = _setting(number("sigma"), 5.0)
    solver: str = _setting(choice("auto", "direct", "iterative"), "auto")
    correct_bias: bool = _setting(YES_NO, True)
    aperture_radius: float | str = _setting(auto_or(number("pixels")), "auto")
    photometric_catalog: str = _setting(TEXT, "auto")
    magnitude_column: str = _setting(TEXT, "mag")
    zero_point: float | None = _setting(optional(any_number("magnitudes")), None)
    zero_point_err: float | None = _setting(optional(number("magnitudes", zero=True)), None)
    positions: str | None = _setting(optional(TEXT), None)
    detect: float | None = _setting(optional(_SIGNIFICANCE), None)
    gain: float | None = _setting(optional(number("e-/ADU")), None)
    read_noise: float | None = _setting(optional(number("e-", zero=True)), None)
    saturation: float | None = _setting(optional(number("ADU")), None)
    noise: str = _setting(choice("auto", "header", "data"), "auto")
    max_chi2: float = _setting(_FACTOR, 2.0)
    max_epsilon: float = _setting(number("a share", zero=True), 0.003)
    max_correlation: float = _setting(number("a correlation", zero=True), 0.5)
    max_registration_error: float = _setting(number("pixels"), 0.1)
    layout_names: LayoutNames = field(default=LayoutNames(), metadata={"rule": _LAYOUT})
    backend: str = field(default_factory=lambda: os.environ.get("GPUDIA_BACKEND") or "auto",
                         metadata={"rule": choice("auto", "numpy", "cupy")})
    batch_size: int | str = _setting(auto_or(integer(1)), "auto")
    workers: int = _setting(integer(0, 1024), 0)
    dask: str | None = _setting(optional(TEXT), None)
    readers: int | str = _setting(auto_or(integer(0, 1024)), "auto")
    products: bool = _setting(YES_NO, True)
    resume: bool = _setting(YES_NO, False)
    overwrite: bool = _setting(YES_NO, False)

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, f.metadata["rule"].apply(f.name, getattr(self, f.name)))
        for condition in self.select:
            parse_condition(condition)
        if (self.ra is None) != (self.dec is None):
            missing, given = ("ra", "dec") if self.ra is None else ("dec", "ra")
            raise ConfigError(f"{missing} must be given together with {given}, got only {given}")
        if self.ra is not None and self.kernel_size != "auto" and self.size < 2 * int(self.kernel_size):
            raise ConfigError(f"size must be at least twice kernel_size ({self.kernel_size}), got {self.size}")
        if self.zero_point is not None and self.photometric_catalog not in ("auto", "none"):
            raise ConfigError(f"photometric_catalog must not be given with zero_point, got {self.photometric_catalog}")
        if self.zero_point_err is not None and self.zero_point is None:
            raise ConfigError(f"zero_point must be given with zero_point_err, got only {self.zero_point_err}")
        if self.workers and self.dask is not None:
            raise ConfigError(f"workers must be 0 with dask, whose workers do the work, got {self.workers}")
        if self.resume and self.overwrite:
            raise ConfigError("overwrite must be false when resume is true, got both true")

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> RunConfig:
        """Make settings from a mapping of names to values.

        Raises
        ------
        ConfigError
            If a name is unknown (the nearest right one is named), `frames` or `output` is missing, or a rule broken.
        """
        _refuse_unknown(settings, cls)
        for key in ("frames", "output"):
            if settings.get(key) is None:
                raise ConfigError(f"{key} must be given, got nothing")
        return cls(**settings)

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str], **overrides: Any) -> RunConfig:
        """Read settings from a TOML file; relative paths in it start from the working directory.

        Parameters
        ----------
        path : str or path
            The file.
        **overrides
            Settings that take precedence over the file's; those that are None are passed over.

        Raises
        ------
        ConfigError
            If the file cannot be read or is not TOML, or as in `from_mapping`.
        """
        try:
            settings = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"config must be a readable file, got {path}: {error.strerror}") from error
        except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError both are
            raise ConfigError(f"config must be valid TOML, got {path}: {error}") from error
        _refuse_unknown(settings, cls, written={"layout_names": "layout"})
        if "layout" in settings:
            settings["layout_names"] = settings.pop("layout")
        return cls.from_mapping(settings | {k: v for k, v in overrides.items() if v is not None})

    def to_toml(self) -> str:
        """Return the settings as TOML, from which `from_toml` makes an equal object; what is None is left out.

        Bytes of a file's name that are not UTF-8 become ``?``, which as a pattern finds the file.
        """
        table = _given(dataclasses.asdict(self))
        names = _given(table.pop("layout_names"))
        if "mask_bits" in names:
            names["mask_bits"] = dict(names["mask_bits"])
        return tomli_w.dumps(table | ({"layout": names} if names else {})).encode(errors="replace").decode()

    def replace(self, **changes: Any) -> RunConfig:
        """Return a copy with some settings changed, checked like new ones.

        Raises
        ------
        ConfigError
            If a name is unknown or a rule is broken.
        """
        _refuse_unknown(changes, type(self))
        return dataclasses.replace(self, **changes)

    def layout(self) -> dict[str, Any]:
        """Return the keyword arguments of `gpudia.images.FrameLayout` that differ from its defaults."""
        overrides = {"gain": self.gain, "read_noise": self.read_noise, "saturation": self.saturation,
                     "noise": None if self.noise == "auto" else self.noise}
        return _given(dataclasses.asdict(self.layout_names) | overrides)


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}
