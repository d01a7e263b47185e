"""The arguments of the command line: the parser of every command, and the settings that they make."""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpudia import __version__
from gpudia.config import RunConfig
from gpudia.selection import SERIES_COLUMNS

__all__ = ["RUN_VALUES", "SEVERAL", "SWITCHES", "config_of", "parse"]

_FORMATS = ("ecsv", "csv", "parquet", "pylima", "mulensmodel", "lightkurve")
#: Settings of `gpudia run` that are a plain value: name of the setting, placeholder, help.
RUN_VALUES = (
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
    ("readers", "auto|N", "processes that read frames, and solve on the CPU; auto: one per core from 50 frames on"),
)
#: Settings of `gpudia run` that an option turns on or off, and those of which there may be several.
SWITCHES = ("align", "find_defects", "lacosmic", "correct_bias", "products", "resume", "overwrite")
SEVERAL = ("select", "mixed", "site")
_NO_CORRECTION = "leave the kernel as smooth as the reference's noise makes it: quieter pixels, biased fluxes"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of a command.

    Parameters
    ----------
    argv : sequence of str
        Without the program's name.

    Returns
    -------
    Namespace
        `command` is its name, `verbosity` a level of `logging`.

    Raises
    ------
    SystemExit
        After ``--help`` and ``--version`` (0) and what is no command of this program (2).
    """
    return _parser().parse_args(_join_signed_values(argv))


def _join_signed_values(argv: Sequence[str]) -> list[str]:
    """Make ``--dec -29:53:26`` into ``--dec=-29:53:26``: argparse would take the value for an option."""
    joined: list[str] = []
    for arg in argv:
        if joined and joined[-1] in ("--ra", "--dec") and re.match(r"-[\d.]", arg):
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    return joined


def config_of(args: argparse.Namespace) -> RunConfig:
    """Settings of a run: of the file that ``--config`` names, with those that the command line gives.

    Raises
    ------
    ConfigError
        If a setting is none, or breaks its rule.
    """
    names = [name for name, *_ in RUN_VALUES]
    settings = {name: getattr(args, name) for name in (*names, "ra", "dec", "output", "detect", *SEVERAL, *SWITCHES)}
    settings = {k: v for k, v in settings.items() if v is not None}
    if args.frames:
        settings["frames"] = args.frames
    return RunConfig.from_toml(args.config, **settings) if args.config else RunConfig.from_mapping(settings)


def _number(text: str) -> int | float | str:
    """Read a number where it is one; what else a setting may be, and what not, is for its rule to say."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpudia", description="Difference image analysis: from a folder of FITS frames to light curves.",
        epilog="Exit codes: 0 ok, 1 nothing could be done, 2 wrong usage, 3 finished but some images failed.")
    parser.add_argument("--version", action="version", version=f"gpudia {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for add in (_add_demo, _add_run, _add_inject, _add_subtract, _add_lightcurve, _add_compare, _add_info):
        add(commands)
    return parser


def _add_command(commands: Any, name: str, about: str, example: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=about, description=about[0].upper() + about[1:] + ".", epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(verbosity=logging.INFO)
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("--quiet", dest="verbosity", action="store_const", const=logging.ERROR,
                          help="errors only, no progress bar")
    loudness.add_argument("--verbose", dest="verbosity", action="store_const", const=logging.DEBUG,
                          help="details, and where an error came from")
    return parser


def _add_demo(commands: Any) -> None:
    parser = _add_command(commands, "demo", "simulate a small crowded field with a microlensing event and run "
                          "the whole job on it", "gpudia demo --output demo")
    parser.add_argument("--output", default="gpudia-demo", metavar="DIR",
                        help="folder to write to (default: %(default)s)")


def _add_run(commands: Any) -> None:
    parser = _add_command(commands, "run", "make difference images and light curves from a series of frames",
                          "gpudia run 'night/*.fits.fz' --ra 17:51:40.2 --dec -29:53:26 --output event")
    _add_run_options(parser)


def _add_inject(commands: Any) -> None:
    parser = _add_command(commands, "inject", "put variables of known flux into the frames and see what comes "
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
    for name, metavar, about in RUN_VALUES:
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
    parser = _add_command(commands, "subtract", "subtract a reference from one image",
                          "gpudia subtract reference.fits image.fits --output difference.fits")
    parser.add_argument("reference", type=Path, metavar="REFERENCE", help="FITS file; its grid is that of the result")
    parser.add_argument("image", type=Path, metavar="IMAGE", help="FITS file to subtract it from")
    parser.add_argument("--output", required=True, type=Path, metavar="DIFF.fits", help="file to write")
    parser.add_argument("--kernel-size", type=_number, default="auto", metavar="auto|PX",
                        help="side of the matching kernel, odd (default: %(default)s)")
    for name in ("spatial_degree", "background_degree"):
        parser.add_argument(_option(name), type=_number, default="auto", metavar="auto|N",
                            help=f"{dict((n, h) for n, _, h in RUN_VALUES)[name]} (default: auto)")
    parser.add_argument("--no-align", dest="align", action="store_false", help="both are on one pixel grid already")
    parser.add_argument("--no-correct-bias", dest="correct_bias", action="store_false", help=_NO_CORRECTION)
    parser.add_argument("--mask", type=Path, metavar="FILE", help="mask of the image, not 0 = ignore")
    parser.add_argument("--error", type=Path, metavar="FILE", help="error of the image, 1 sigma, ADU")
    parser.add_argument("--gain", type=float, metavar="E/ADU", help="instead of the headers' gain")
    parser.add_argument("--saturation", type=float, metavar="ADU", help="instead of the headers' saturation level")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def _add_lightcurve(commands: Any) -> None:
    parser = _add_command(commands, "lightcurve", "print light curves out of a run's folder",
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
    parser = _add_command(commands, "compare", "compare two runs of the same frames, with other settings or "
                          "against other references", "gpudia compare event event-degree2")
    parser.add_argument("run", type=Path, metavar="RUN", help="output folder of gpudia run")
    parser.add_argument("other", type=Path, metavar="OTHER", help="another one")
    parser.add_argument("--output", type=Path, metavar="FILE.html", help="default: comparison.html in RUN")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def _add_info(commands: Any) -> None:
    parser = _add_command(commands, "info", "show versions, the backend chosen and why, devices and memory",
                          "gpudia info --json")
    parser.add_argument("--json", action="store_true", help="as JSON")
