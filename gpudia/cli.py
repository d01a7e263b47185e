"""The command line: ``gpudia demo | run | inject | subtract | lightcurve | compare | info``.

Results go to stdout, messages to stderr. Exit codes: 0 ok, 1 nothing could be done, 2 wrong usage, 3 finished but some
images failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from gpudia import __version__
from gpudia.config import RunConfig
from gpudia.errors import ConfigError, GpudiaError, InputError
from gpudia.messages import OneLine, printable
from gpudia.selection import SERIES_COLUMNS

__all__ = ["main"]

OK, NOTHING_DONE, WRONG_USAGE, SOME_FAILED, INTERRUPTED = 0, 1, 2, 3, 130

log = logging.getLogger("gpudia.cli")

_FORMATS = ("ecsv", "csv", "parquet", "pylima", "mulensmodel", "lightkurve")
# Settings of `gpudia run` that are a plain value: name of the setting, placeholder, help.
_RUN_VALUES = (
    ("size", "PX", "side of the region around the target"),
    ("reference", "auto|stack|FILE", "the reference; auto: the frame with the smallest expected noise, stack: the mean "
     "of the best"),
    ("stack_size", "auto|N", "frames in a stack; auto: those at most 1.15 times as blunt as the sharpest, up to 20"),
    ("kernel_size", "auto|PX", "side of the matching kernel, odd"),
    ("kernel_support", "circle|square|aic", "pixels of the kernel's square that are used"),
    ("spatial_degree", "auto|N", "degree by which the kernel varies over the region, 0 to 3"),
    ("background_degree", "auto|N", "degree of the differential background, 0 to 5"),
    ("scale_degree", "auto|N", "degree by which the photometric scale varies; auto: the kernel's"),
    ("smoothness", "X", "regularisation of the kernel"),
    ("passes", "N", "passes of weighting and clipping"),
    ("clip", "SIGMA", "leave pixels out of the kernel fit beyond this"),
    ("solver", "auto|direct|iterative", "how the normal equations are solved"),
    ("resample", "auto|never|always", "interpolate frames onto the reference's grid"),
    ("max_rms", "PX", "largest residual of a registration"),
    ("min_matches", "N", "fewest matched stars of a registration"),
    ("detection_threshold", "SIGMA", "faintest peak taken for a star"),
    ("max_stars", "N", "most stars detected per frame"),
    ("aperture_radius", "auto|PX", "radius of the aperture"),
    ("photometric_catalog", "auto|none|FILE", "table with ra, dec and magnitudes that gives the zero point; auto: the "
     "reference frame's own catalog, where it has magnitudes"),
    ("magnitude_column", "NAME", "its column of magnitudes"),
    ("zero_point", "MAG", "magnitude of 1 ADU on the reference, instead of a catalog's"),
    ("zero_point_err", "MAG", "its error"),
    ("positions", "FILE", "table with further positions to be measured: columns x, y (0-based pixels of the reference "
     "frame) or ra, dec"),
    ("gain", "E/ADU", "instead of the headers' gain"),
    ("read_noise", "E", "instead of the headers' read noise"),
    ("saturation", "ADU", "instead of the headers' saturation level"),
    ("noise", "auto|header|data", "what variances are made of where there is no error plane"),
    ("max_chi2", "X", "flag a frame with chi^2 per pixel above this or below its inverse"),
    ("max_epsilon", "X", "flag a frame whose constant stars are off its scale by more than this share, and by 3 sigma"),
    ("max_correlation", "X", "flag a frame whose difference is correlated between neighbouring pixels beyond this"),
    ("max_registration_error", "PX", "flag a frame with a predicted error of the registration above this"),
    ("backend", "auto|numpy|cupy", "where the numbers are computed"),
    ("batch_size", "auto|N", "frames solved at once"),
    ("workers", "N", "processes on this machine that work on batches, one per GPU where there are several; needs dask"),
    ("dask", "ADDRESS", "scheduler of a Dask cluster, such as tcp://host:8786, whose workers do the work"),
    ("readers", "auto|N", "processes that read frames for the one that solves; auto: one per core from 50 frames on"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments without the program's name; default ``sys.argv[1:]``.

    Returns
    -------
    int
        0 ok, 1 nothing could be done, 2 wrong usage, 3 finished but some images failed, 130 interrupted.
    """
    try:
        args = _parser().parse_args(_join_signed_values(sys.argv[1:] if argv is None else argv))
    except SystemExit as stop:  # argparse: --help, --version (0) or wrong usage (2)
        return int(stop.code or 0)
    with _messages(args.verbosity):
        try:
            code = int(args.command(args))
            sys.stdout.flush()  # here, where a reader that has gone away is handled
            return code
        except KeyboardInterrupt:
            return _complain("interrupted; what is finished is kept: a run goes on with --resume", INTERRUPTED)
        except BrokenPipeError:  # the reader of stdout (head, less) has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return OK
        except (GpudiaError, OSError) as error:
            log.debug("where it happened:", exc_info=True)
            return _complain(error, WRONG_USAGE if isinstance(error, ConfigError | InputError) else NOTHING_DONE)


def _complain(message: object, code: int) -> int:
    print(f"gpudia: error: {printable(message)}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _messages(level: int) -> Iterator[None]:
    """Show log records and warnings on stderr, one line each, for the time of a command."""
    logger, handler = logging.getLogger("gpudia"), logging.StreamHandler()
    handler.setFormatter(OneLine("gpudia: %(message)s"))
    handler.setLevel(level)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(level, logging.INFO))  # the log file of a run has all that is worth knowing
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: log.warning("warning: %s", message)
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _join_signed_values(argv: Sequence[str]) -> list[str]:
    """Make ``--dec -29:53:26`` into ``--dec=-29:53:26``: argparse would take the value for an option."""
    joined: list[str] = []
    for arg in argv:
        if joined and joined[-1] in ("--ra", "--dec") and re.match(r"-[\d.]", arg):
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    return joined


# ------------------------------------------------------------------------------------------------- commands


def _demo(args: argparse.Namespace) -> int:
    result = import_module("gpudia.pipeline").run_demo(args.output, progress=args.verbosity < logging.ERROR)
    return _report(result)


def _run(args: argparse.Namespace) -> int:
    return _report(import_module("gpudia.pipeline").run(_config_of(args), progress=args.verbosity < logging.ERROR))


def _inject(args: argparse.Namespace) -> int:
    pipeline = import_module("gpudia.pipeline")
    flux = args.flux if args.mag is None else [10 ** (-0.4 * mag) for mag in sorted(args.mag, reverse=True)]
    injection = pipeline.Injection(n=args.n, flux=None if flux is None else tuple(flux), shape=args.shape,
                                   seed=args.seed, anywhere=args.anywhere)
    found = pipeline.inject(_config_of(args), injection, progress=args.verbosity < logging.ERROR)
    print(found.summary())
    return SOME_FAILED if found.run.n_failed else OK


def _config_of(args: argparse.Namespace) -> RunConfig:
    names = [name for name, *_ in _RUN_VALUES]
    settings = {name: getattr(args, name) for name in (*names, "ra", "dec", "output", "detect", *_SEVERAL, *_SWITCHES)}
    settings = {k: v for k, v in settings.items() if v is not None}
    if args.frames:
        settings["frames"] = args.frames
    return RunConfig.from_toml(args.config, **settings) if args.config else RunConfig.from_mapping(settings)


def _report(result: Any) -> int:
    print(result.summary())
    if not result.n_ok:
        return NOTHING_DONE
    return SOME_FAILED if result.n_failed else OK


def _subtract(args: argparse.Namespace) -> int:
    result = import_module("gpudia.pipeline").subtract_files(
        args.reference, args.image, args.output,
        kernel_size=args.kernel_size, spatial_degree=args.spatial_degree, background_degree=args.background_degree,
        align=args.align, correct_bias=args.correct_bias, mask=args.mask, error=args.error, gain=args.gain,
        saturation=args.saturation, overwrite=args.overwrite)
    print(result.summary())
    return OK


def _lightcurve(args: argparse.Namespace) -> int:
    from gpudia.photometry.exports import export_all, export_star, read_target

    if (args.ra is None) != (args.dec is None):
        raise ConfigError("--ra and --dec must be given together, got only one of them")
    if args.format in ("parquet", "lightkurve") and not args.output:
        raise ConfigError(f"--output must be given with --format {args.format}, got nothing")
    if args.output and args.output.exists() and not args.overwrite:
        raise ConfigError(f"--output must be a new file (or say --overwrite), got {args.output}")
    if args.target:
        series = read_target(args.folder)
    else:
        curves = import_module("gpudia.photometry").read_lightcurves(args.folder)
        source = args.source
        if args.ra is not None:
            source = _nearest_source(curves.sources, args.ra, args.dec, args.radius)
        if source is None:
            export_all(curves, args.output or sys.stdout, args.format)
            return OK
        series = curves.timeseries(source)
    export_star(series, args.output or sys.stdout, args.format, args.quantity)
    return OK


def _nearest_source(sources: Any, ra: str, dec: str, radius: float) -> Any:
    import numpy as np
    from astropy import units as u
    from astropy.coordinates import SkyCoord

    target = RunConfig(("-",), "-", backend="auto").replace(ra=ra, dec=dec)  # knows how to read a position
    stars = SkyCoord(np.asarray(sources["ra"], float), np.asarray(sources["dec"], float), unit="deg")
    distance = stars.separation(SkyCoord(target.ra, target.dec, unit="deg")).to_value(u.arcsec)
    if not np.any(distance <= radius):
        nearest = f"the nearest at {np.nanmin(distance):.1f}" if np.isfinite(distance).any() else "none with a position"
        raise InputError(f"--ra, --dec must be within --radius {radius:g} arcsec of a star, got {nearest}")
    best = int(np.nanargmin(distance))
    log.info("source %s, %.2f arcsec away", sources["source_id"][best], distance[best])
    return sources["source_id"][best]


def _compare(args: argparse.Namespace) -> int:
    compare_runs = import_module("gpudia.report").compare_runs
    print(compare_runs(args.run, args.other, args.output, args.overwrite).summary())
    return OK


def _info(args: argparse.Namespace) -> int:
    facts = {"gpudia": __version__, **import_module("gpudia.backend").backend_info()}
    for package in ("astropy", "photutils"):
        facts.setdefault(package, metadata.version(package))
    if args.json:
        print(json.dumps(facts, indent=2, default=str))
        return OK
    width = max(map(len, facts))
    print("\n".join(f"{key:<{width}}  {value}" for key, value in facts.items()))
    return OK


# ----------------------------------------------------------------------------------------------- the parser


def _number(text: str) -> int | float | str:
    """Read a number where it is one; what else a setting may be, and what not, is for its rule to say."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


_SWITCHES = ("align", "find_defects", "lacosmic", "correct_bias", "products", "resume", "overwrite")
_SEVERAL = ("select", "mixed", "site")
_NO_CORRECTION = "leave the kernel as smooth as the reference's noise makes it: quieter pixels, biased fluxes"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpudia", description="Difference image analysis: from a folder of FITS frames to light curves.",
        epilog="Exit codes: 0 ok, 1 nothing could be done, 2 wrong usage, 3 finished but some images failed.")
    parser.add_argument("--version", action="version", version=f"gpudia {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (_add_demo, _add_run, _add_inject, _add_subtract, _add_lightcurve, _add_compare,
                _add_info):
        add(commands)
    return parser


def _add_command(commands: Any, name: str, function: Any, about: str, example: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=about, description=about[0].upper() + about[1:] + ".", epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(command=function, verbosity=logging.INFO)
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("--quiet", dest="verbosity", action="store_const", const=logging.ERROR,
                          help="errors only, no progress bar")
    loudness.add_argument("--verbose", dest="verbosity", action="store_const", const=logging.DEBUG,
                          help="details, and where an error came from")
    return parser


def _add_demo(commands: Any) -> None:
    parser = _add_command(commands, "demo", _demo, "simulate a small crowded field with a microlensing event and run "
                          "the whole job on it", "gpudia demo --output demo")
    parser.add_argument("--output", default="gpudia-demo", metavar="DIR",
                        help="folder to write to (default: %(default)s)")


def _add_run(commands: Any) -> None:
    parser = _add_command(commands, "run", _run, "make difference images and light curves from a series of frames",
                          "gpudia run 'night/*.fits.fz' --ra 17:51:40.2 --dec -29:53:26 --output event")
    _add_run_options(parser)


def _add_inject(commands: Any) -> None:
    parser = _add_command(commands, "inject", _inject, "put variables of known flux into the frames and see what comes "
                          "back: bias, pulls, completeness",
                          "gpudia inject 'night/*.fits.fz' --ra 17:51:40.2 --dec -29:53:26 --output proof --n 100")
    own = parser.add_argument_group("what is injected")
    own.add_argument("--n", type=int, default=50, help="stars (default: %(default)s)")
    own.add_argument("--shape", choices=("constant", "step", "sine", "paczynski"), default="constant",
                     help="their light curve; constant: half of them in all frames but the reference, half in that "
                          "alone (default: %(default)s)")
    brightness = own.add_mutually_exclusive_group()
    brightness.add_argument("--flux", nargs=2, type=float, metavar=("LOW", "HIGH"),
                            help="range of the change of flux, ADU of the reference (default: S/N 2 to 60)")
    brightness.add_argument("--mag", nargs=2, type=float, metavar=("BRIGHT", "FAINT"),
                            help="the same as -2.5 log10 of ADU of the reference")
    own.add_argument("--seed", type=int, default=1, help="of the random numbers (default: %(default)s)")
    own.add_argument("--anywhere", action="store_true", help="next to bright stars, too")
    _add_run_options(parser)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("frames", nargs="*", metavar="FRAMES", help="files, folders or quoted glob patterns")
    parser.add_argument("--output", metavar="DIR", help="folder to write to")
    parser.add_argument("--config", metavar="FILE.toml", help="settings; options given here take precedence")
    parser.add_argument("--ra", help="right ascension of the target, degrees or hours:minutes:seconds")
    parser.add_argument("--dec", help="declination, degrees or degrees:minutes:seconds; without both: the whole frame")
    parser.add_argument("--select", action="append", metavar="CONDITION",
                        help="keep the frames that satisfy this, such as \"fwhm < 6\" or \"filter == 'rp'\"; may be "
                             "given several times (columns: " + ", ".join(c.name for c in SERIES_COLUMNS) + ")")
    parser.add_argument("--mixed", action="append", metavar="filter|instrument",
                        help="frames may differ in this; may be given twice (default: a mixture stops the run)")
    parser.add_argument("--site", nargs=3, type=_number, metavar=("LON", "LAT", "HEIGHT"),
                        help="the observatory, for barycentric times: degrees east, degrees, m (default: the headers')")
    for name, metavar, about in _RUN_VALUES:
        parser.add_argument(_option(name), type=_number, metavar=metavar, help=about + _default_text(name))
    parser.add_argument("--detect", nargs="?", type=_number, const=5.0, metavar="SIGMA",
                        help="search the differences for what varies, known star or not (default: no search; SIGMA 5)")
    parser.add_argument("--no-align", dest="align", action="store_const", const=False,
                        help="the frames are on one pixel grid already")
    parser.add_argument("--no-defects", dest="find_defects", action="store_const", const=False,
                        help="do not look for cosmic rays and bad pixels that no mask flags")
    parser.add_argument("--lacosmic", action="store_const", const=True,
                        help="look for cosmic rays with L.A.Cosmic as well; needs astroscrappy")
    parser.add_argument("--no-correct-bias", dest="correct_bias", action="store_const", const=False,
                        help=_NO_CORRECTION)
    parser.add_argument("--no-products", dest="products", action="store_const", const=False,
                        help="do not write the difference images")
    parser.add_argument("--resume", action="store_const", const=True,
                        help="go on with a run that was cut off, or whose frames have changed")
    parser.add_argument("--overwrite", action="store_const", const=True, help="replace the results in the folder")


def _default_text(name: str) -> str:
    default = RunConfig.__dataclass_fields__[name].default
    if name == "backend":
        return " (default: $GPUDIA_BACKEND, else auto)"
    return "" if default is None else f" (default: {default})"


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_subtract(commands: Any) -> None:
    parser = _add_command(commands, "subtract", _subtract, "subtract a reference from one image",
                          "gpudia subtract reference.fits image.fits --output difference.fits")
    parser.add_argument("reference", type=Path, metavar="REFERENCE", help="FITS file; its grid is that of the result")
    parser.add_argument("image", type=Path, metavar="IMAGE", help="FITS file to subtract it from")
    parser.add_argument("--output", required=True, type=Path, metavar="DIFF.fits", help="file to write")
    parser.add_argument("--kernel-size", type=_number, default="auto", metavar="auto|PX",
                        help="side of the matching kernel, odd (default: %(default)s)")
    for name in ("spatial_degree", "background_degree"):
        parser.add_argument(_option(name), type=_number, default="auto", metavar="auto|N",
                            help=f"{dict((n, h) for n, _, h in _RUN_VALUES)[name]} (default: auto)")
    parser.add_argument("--no-align", dest="align", action="store_false", help="both are on one pixel grid already")
    parser.add_argument("--no-correct-bias", dest="correct_bias", action="store_false", help=_NO_CORRECTION)
    parser.add_argument("--mask", type=Path, metavar="FILE", help="mask of the image, not 0 = ignore")
    parser.add_argument("--error", type=Path, metavar="FILE", help="error of the image, 1 sigma, ADU")
    parser.add_argument("--gain", type=float, metavar="E/ADU", help="instead of the headers' gain")
    parser.add_argument("--saturation", type=float, metavar="ADU", help="instead of the headers' saturation level")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def _add_lightcurve(commands: Any) -> None:
    parser = _add_command(commands, "lightcurve", _lightcurve, "print light curves out of a run's folder",
                          "gpudia lightcurve event --ra 17:51:40.2 --dec -29:53:26 --format csv")
    parser.add_argument("folder", type=Path, metavar="OUT", help="output folder of gpudia run")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--source", metavar="ID", help="one star by its source_id (default: all stars)")
    which.add_argument("--target", action="store_true", help="or the target of the run")
    which.add_argument("--ra", help="or the star nearest to this position, degrees or hours:minutes:seconds")
    parser.add_argument("--dec", help="degrees or degrees:minutes:seconds")
    parser.add_argument("--radius", type=float, default=2.0, metavar="ARCSEC",
                        help="how far that star may be (default: %(default)s)")
    parser.add_argument("--format", choices=_FORMATS, default="ecsv",
                        help="(default: %(default)s); pylima, mulensmodel: three columns of text, lightkurve: FITS")
    parser.add_argument("--quantity", choices=("flux", "mag", "flux_diff"), default="flux",
                        help="what the three columns hold (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def _add_compare(commands: Any) -> None:
    parser = _add_command(commands, "compare", _compare, "compare two runs of the same frames, with other settings or "
                          "against other references", "gpudia compare event event-degree2")
    parser.add_argument("run", type=Path, metavar="RUN", help="output folder of gpudia run")
    parser.add_argument("other", type=Path, metavar="OTHER", help="another one")
    parser.add_argument("--output", type=Path, metavar="FILE.html", help="default: comparison.html in RUN")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def _add_info(commands: Any) -> None:
    parser = _add_command(commands, "info", _info, "show versions, the backend chosen and why, devices and memory",
                          "gpudia info --json")
    parser.add_argument("--json", action="store_true", help="as JSON")
