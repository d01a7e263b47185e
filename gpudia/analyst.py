"""The first interface: one image against one reference, step by step; `gpudia.run` does whole series."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from astropy.table import Table

from gpudia.backend import active_backend, to_device, to_host
from gpudia.config import RunConfig
from gpudia.difference import (
    BACKGROUND_DEGREE,
    DifferenceImage,
    build_the_U_indexes,
    build_the_U_matrix,
    measure_stars,
    reference_radius,
    run_dia_photometry,
    run_difference_image,
)
from gpudia.errors import ConfigError, FrameError, InputError
from gpudia.flags import FRAME_FLAGS
from gpudia.images import Frame, catalog_of, cut, detect_stars, read_frame, region_around, register
from gpudia.images.headers import name_of
from gpudia.layers import layer_names, result_layers, wcs_of_image, write_layers
from gpudia.model import DifferenceStack, ReferencePlan, check_kernel_size
from gpudia.pipeline.looks import target_position
from gpudia.pipeline.outputs import provenance
from gpudia.pipeline.prepare import place_batch, prepare, subtracted

__all__ = [
    "DIAPhotometryAnalyst",
    "DifferenceImage",
    "build_the_U_indexes",
    "build_the_U_matrix",
    "run_dia_photometry",
    "run_difference_image",
]


class DIAPhotometryAnalyst:
    """Difference photometry of one image against a reference: cut, align, subtract, measure, save.

    Parameters
    ----------
    reference_name, image_name : str
        What to call them; ``<image_name>.log`` in `log_path` is the log of this image.
    reference_path, image_path : path
        The files, or folders that hold files of these names. They are read here, closed, and never modified.
    reference_catalog, image_catalog : Table or None
        Star catalogs, in any form that `gpudia.images.catalog_of` reads (columns ``x, y`` count from 1 and ``xcenter,
        ycenter`` from 0, except in tables of this library). None: the file's own catalog, else the stars detected.
    cutout_region : [ra, dec, size]
        Degrees (or sexagesimal, hours in ra), and the side of the region in whole pixels.
    kernel_size : int
        Odd, pixels; at most half the region.
    log_path : path
        Folder of the log files; made when it is not there.

    Attributes
    ----------
    status, reason, flags : str, str, int
        "pending", "ok" or "failed", and why it failed (a file that cannot be read raises nothing here); bits of
        `gpudia.flags.FRAME_FLAGS`.
    reference_image, reference_wcs, image, image_wcs
        ADU and WCS: of the whole frames, then of the cutouts, at last of the image on the reference's grid.
    reference_layers, image_layers : list of str
        Names of the HDUs in the files.
    ref_catalog, image_catalog : Table
        ``id, x, y`` (whole frame, 0-based), ``ra, dec``; None before the file was read.
    ra, dec, size, kernel_size, log
        As given; `log` is a `logging.Logger`.
    region, registration, aligned
        The cutout on the reference; its transformation to the image; the image on the region's pixels.
    difference : DifferenceStack
        Of this one image (constant kernel, background of degree 1), host arrays. A variable that outshines all other
        stars of the region sets the scale by itself: take a region large enough.
    aperture_radius : float or None
        Pixels. None: the FWHM on the reference, hence one radius for all images of a series; set it to choose another.
    phot_table : Table
        Stars of the reference catalog in the cutout: ``id, xcenter, ycenter`` (cutout), ``aperture_sum,
        aperture_sum_err`` (ADU of the image: divide by ``meta["SCALE"]`` for those of the reference), ``flags``
        (`gpudia.flags.SOURCE_FLAGS`), ``ra, dec``.

    Raises
    ------
    InputError, ConfigError
        An argument breaks its rule.
    """

    def __init__(self, reference_name: str, reference_path: Any, image_name: str, image_path: Any,
                 reference_catalog: Table | None, image_catalog: Table | None, cutout_region: Sequence[Any],
                 kernel_size: int, log_path: Any = "./logs") -> None:
        self.reference_name, self.image_name = str(reference_name), str(image_name)
        self.reference_path = _file(reference_path, self.reference_name)
        self.image_path = _file(image_path, self.image_name)
        self._config = _config(self.image_path, cutout_region, kernel_size)
        self.ra, self.dec, self.size = self._config.ra, self._config.dec, self._config.size
        self.kernel_size = int(kernel_size)
        self.log = logging.getLogger(f"gpudia.analyst.{self.image_name.replace('.', '_')}")
        self._log_file = _log_file(log_path, self.image_name)
        self._log_open = False
        self.reference_image: Any = None
        self.image: Any = None
        self.reference_wcs = self.image_wcs = None
        self.reference_layers, self.image_layers = list[str](), list[str]()
        self.ref_catalog: Any = None
        self.image_catalog: Any = None
        self.aperture_radius: float | None = None
        self._frames: tuple[Frame, Frame] | None = None
        self._restart()
        try:
            with self._logging():
                self._read(reference_catalog, image_catalog)
        except FrameError as error:
            self._unreadable = error
            self._fail(error)

    def _restart(self) -> None:
        self.status, self.reason, self.flags = "pending", "", 0
        self.region: Any = None
        self._cutout: Any = None
        self.registration: Any = None
        self._placed: Any = None
        self.aligned: Any = None
        self.difference: Any = None
        self.phot_table: Any = None

    def _fail(self, error: FrameError) -> None:
        if self.status != "failed":  # a file that cannot be read fails again at every attempt
            with self._logging():
                self.log.error("%s failed: %s", self.image_name, error)
        self.status, self.reason = "failed", error.reason

    @contextlib.contextmanager
    def _logging(self) -> Iterator[None]:
        """Have the log file open; doubts about the data (warnings) go there. Nested uses share one handler."""
        if self._log_open:
            yield
            return
        handler = logging.FileHandler(self._log_file, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.log.addHandler(handler)
        self.log.setLevel(logging.INFO)
        self._log_open = True
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield
        finally:
            for text in dict.fromkeys(str(w.message) for w in caught):
                self.log.warning("%s", text)
            self._log_open = False
            self.log.removeHandler(handler)
            handler.close()

    def _read(self, reference_catalog: Table | None, image_catalog: Table | None) -> None:
        reference = read_frame(self.reference_path)
        self.reference_image, self.reference_wcs = reference.data, reference.wcs
        self.reference_layers = layer_names(self.reference_path)
        self.ref_catalog = _stars(reference, reference_catalog, "reference_catalog")
        image = read_frame(self.image_path)
        self.image, self.image_wcs, self.image_layers = image.data, image.wcs, layer_names(self.image_path)
        self.image_catalog = _stars(image, image_catalog, "image_catalog")
        self._frames = reference, image
        self.log.info("%s: %d stars; reference %s: %d stars", self.image_path, len(self.image_catalog),
                      self.reference_path, len(self.ref_catalog))

    def process_image(self, save: bool = True, overwrite: bool = False) -> str:
        """Do all steps and save the results; a frame that cannot be used raises nothing.

        Parameters
        ----------
        save, overwrite : bool
            Write the new file (`update_image_with_new_layers`); replace an older one.

        Returns
        -------
        status : {"ok", "failed"}
            A failed one has its reason in `reason` and in the log.

        Raises
        ------
        ConfigError
            The new file exists already (said before anything is done) or cannot be written.
        """
        if save:
            self._output(None, overwrite)
        with self._logging():
            try:
                self.cut_image_and_ref()
                self.align_image_to_ref()
                self.run_dia_photometry()
            except FrameError as error:
                self._fail(error)
            else:
                if save:
                    self.update_image_with_new_layers(overwrite=overwrite)
        return self.status

    def cut_image_and_ref(self) -> None:
        """Cut both frames about the coordinates; what lies outside a frame is masked.

        The image is cut by its own WCS, for a look at it, or left whole: the alignment starts from the whole frame.

        Raises
        ------
        FrameError
            The file could not be read, the reference has no WCS, or the coordinates are not on it.
        """
        reference, image = self._loaded()
        self._restart()
        with self._logging():
            x, y = target_position(self._config, reference.wcs, self.reference_path)  # type: ignore[misc]
            self.region = region_around(x, y, self.size, reference.shape)
            self.log.info("region %s, target at (%.2f, %.2f) of the reference", self.region, x, y)
            self._cutout = cut(reference, self.region)
            self.reference_image, self.reference_wcs = self._cutout.data, self._cutout.wcs
            self.image, self.image_wcs = image.data, image.wcs
            with contextlib.suppress(FrameError):
                x, y = target_position(self._config, image.wcs, self.image_path)  # type: ignore[misc]
                part = cut(image, region_around(x, y, self.size, image.shape))
                self.image, self.image_wcs = part.data, part.wcs

    def _loaded(self) -> tuple[Frame, Frame]:
        if self._frames is None:
            raise self._unreadable
        return self._frames

    def align_image_to_ref(self) -> None:
        """Register the image by the catalogs (ids, sky, pattern) and bring it onto the reference's grid.

        A shift by whole pixels where the kernel absorbs the rest; resampling, with its noise carried along, elsewhere.

        Raises
        ------
        FrameError
            No trustworthy match of the stars, or too few good pixels of the image in the region.
        """
        if self.region is None:
            self.cut_image_and_ref()
        reference, image = self._loaded()
        with self._logging():
            found = register(self.ref_catalog, self.image_catalog, reference.wcs, image.wcs,
                             max_rms=self._config.max_rms, min_matches=self._config.min_matches)
            prepared = prepare(image, found, self.region, self._config)
            self._placed = place_batch([prepared], self.region.shape, active_backend())
            self.registration, self.flags = found, image.flags | prepared.flags
            self.flags |= FRAME_FLAGS.is_reference if image.path == reference.path else 0
            self.aligned = self.image = to_host(self._placed.data[0])
            self.image_wcs = self.reference_wcs
            self.log.info("aligned by %s: %d stars, rms %.3f px%s", found.route, found.n_matched, found.rms,
                          ", resampled" if prepared.interpolated else "")

    def run_dia_photometry(self) -> None:
        """Subtract the reference and measure the stars of its catalog on the difference, with exact errors.

        Raises
        ------
        FrameError
            No solution for the kernel, or a photometric scale that is not positive.
        """
        if self._placed is None:
            self.align_image_to_ref()
        with self._logging():
            self.difference = stack = self._subtract()
            self.flags |= int(stack.status[0])
            self._bits = self._placed.bits[0] | stack.flags[0]
            self.phot_table = self._measure(stack)
            self.status, self.reason = "ok", ""
            self.log.info("scale %.5f +- %.5f, chi^2 per pixel %.3f, %d stars", stack.scale[0], stack.scale_error[0],
                          stack.chi2[0], len(self.phot_table))

    def _subtract(self) -> DifferenceStack:
        backend, base, placed = active_backend(), self._cutout, self._placed
        data, error, mask = (to_device(a, backend) for a in (base.data, np.sqrt(base.variance), base.mask != 0))
        plan = ReferencePlan(data, self.kernel_size, error=error, mask=mask, background_degree=BACKGROUND_DEGREE,
                             solver="direct")
        stack = subtracted(plan, placed, ("covariance", "image_variance")).to_host()
        stack.require_solution(0)
        if not stack.scale[0] > 0:
            raise FrameError(f"photometric scale must be positive, got {stack.scale[0]:.3g}")
        return stack

    def _measure(self, stack: DifferenceStack) -> Table:
        xy = np.column_stack([self.ref_catalog["x"], self.ref_catalog["y"]])
        stars = self.ref_catalog[self.region.contains(xy)]
        where = self.region.to_cutout(xy[self.region.contains(xy)])
        if self.aperture_radius is None:
            self.aperture_radius = reference_radius(self._cutout)
        ratio = self._placed.noise_ratio
        found = measure_stars(stack, self._bits, self._cutout, where, self.aperture_radius,
                              None if ratio is None else to_host(ratio)[0])
        return Table(
            {"id": stars["id"], "xcenter": where[:, 0], "ycenter": where[:, 1], "aperture_sum": found.flux,
             "aperture_sum_err": found.error, "flags": found.flags, "ra": stars["ra"], "dec": stars["dec"]},
            meta={"RADIUS": self.aperture_radius, "SCALE": float(stack.scale[0]),
                  "SCALEERR": float(stack.scale_error[0])})

    def update_image_with_new_layers(self, path: Any = None, overwrite: bool = False) -> Path:
        """Write a new file with the image's layers, as they are in its file, and those made here.

        ``WCS`` (no image): the reference's world coordinates for the pixels of the *original* image, by the
        registration; ``DIA_PHOT``: `phot_table`; ``DIFF``, ``DIFF_ERR``, ``DIFF_MASK`` (bits of
        `gpudia.flags.PIXEL_FLAGS`) on the region's pixels, with its WCS; ``KERNEL``.

        Parameters
        ----------
        path, overwrite : path, bool
            Default: a new ``<image>_dia.fits`` beside the image. Inputs are never replaced.

        Returns
        -------
        Path
            The file; it appears whole or not at all.

        Raises
        ------
        FrameError, ConfigError
            There are no results; or the file exists, is one of the inputs, or cannot be written.
        """
        if self.status != "ok":
            raise FrameError(f"image must be processed before it is saved, got status {self.status!r} "
                             f"({self.reason or 'not processed'})", self.image_path)
        output = self._output(path, overwrite)
        with self._logging():
            write_layers(self.image_path, self._new_layers(), output)
            self.log.info("wrote %s", output)
        return output

    def _output(self, path: Any, overwrite: bool) -> Path:
        output = Path(os.path.expanduser(path or self.image_path.with_name(f"{name_of(self.image_path)}_dia.fits")))
        if os.path.realpath(output) in map(os.path.realpath, (self.image_path, self.reference_path)):
            raise ConfigError(f"path must not be that of an input file, got {output}")
        if output.exists() and not overwrite:
            raise ConfigError(f"path must be a new file (or say overwrite), got {output}")
        return output

    def _new_layers(self) -> list[Any]:
        stack, (reference, image) = self.difference, self._loaded()
        cards = provenance(active_backend().name, self.reference_name, {
            "KSIZE": (self.kernel_size, "[pix] side of the kernel"),
            "SCALE": (float(stack.scale[0]), "image flux over reference flux"),
            "SCALEERR": (float(stack.scale_error[0]), "1 sigma of SCALE by noise"),
            "CHI2": (float(stack.chi2[0]), "chi^2 per degree of freedom of the fit"),
            "FLAGS": (self.flags, "bits of gpudia.flags.FRAME_FLAGS")})
        moved = wcs_of_image(reference.wcs, self.registration, image.shape)
        return result_layers(stack, self._bits, self.phot_table, cards, self._cutout.wcs, moved)


def _file(path: Any, name: str) -> Path:
    path = Path(os.path.expanduser(path))
    return path / name if path.is_dir() else path


def _config(path: Path, cutout_region: Sequence[Any], kernel_size: int) -> RunConfig:
    """Check region and kernel with the rules of a run, and keep them in the form that its parts take."""
    if isinstance(cutout_region, str) or len(cutout_region) != 3:
        raise InputError(f"cutout_region must be [ra, dec, size], got {cutout_region!r}")
    ra, dec, size = cutout_region
    if isinstance(size, float) and size.is_integer():  # of an array [268.0, -29.0, 250.0]
        size = int(size)
    config = RunConfig(frames=(str(path),), output=str(path.parent), ra=ra, dec=dec, size=size, spatial_degree=0,
                       background_degree=BACKGROUND_DEGREE)
    return config.replace(kernel_size=check_kernel_size(kernel_size, (config.size, config.size)))


def _log_file(folder: Any, name: str) -> Path:
    folder = Path(os.path.expanduser(folder))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"log_path must be a folder that can be made, got {folder}: {error.strerror}") from error
    return folder / f"{Path(name).name}.log"


def _stars(frame: Frame, given: Table | None, name: str) -> Table:
    """A catalog in the common form: the one given, else the file's own, else the stars detected."""
    if given is None:
        own = catalog_of(frame)
        return detect_stars(frame) if own is None else own
    if not isinstance(given, Table):
        raise InputError(f"{name} must be an astropy Table or None, got {type(given).__name__}")
    if not len(given):
        raise FrameError(f"{name} must have stars, got none", frame.path)
    if "ids" in given.meta:  # made by catalog_of or detect_stars: in this form already
        return given
    stars = catalog_of(given, frame.wcs)
    if stars is None:
        raise InputError(f"{name} must have positions (x, y or ra, dec), got columns {', '.join(given.colnames)}")
    return stars
