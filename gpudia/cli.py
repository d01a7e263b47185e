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
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module, metadata
from typing import Any

from gpudia import __version__
from gpudia.arguments import config_of, parse
from gpudia.config import RunConfig
from gpudia.errors import ConfigError, GpudiaError, InputError
from gpudia.messages import OneLine, printable

__all__ = ["main"]

OK, NOTHING_DONE, WRONG_USAGE, SOME_FAILED, INTERRUPTED = 0, 1, 2, 3, 130

log = logging.getLogger("gpudia.cli")


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
        args = parse(sys.argv[1:] if argv is None else argv)
    except SystemExit as stop:  # argparse: --help, --version (0) or wrong usage (2)
        return int(stop.code or 0)
    with _messages(args.verbosity):
        try:
            code = int(_COMMANDS[args.command](args))
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


def _demo(args: argparse.Namespace) -> int:
    result = import_module("gpudia.pipeline").run_demo(args.output, progress=args.verbosity < logging.ERROR)
    return _report(result)


def _run(args: argparse.Namespace) -> int:
    return _report(import_module("gpudia.pipeline").run(config_of(args), progress=args.verbosity < logging.ERROR))


def _inject(args: argparse.Namespace) -> int:
    pipeline = import_module("gpudia.pipeline")
    flux = args.flux if args.mag is None else [10 ** (-0.4 * mag) for mag in sorted(args.mag, reverse=True)]
    injection = pipeline.Injection(n=args.n, flux=None if flux is None else tuple(flux), shape=args.shape,
                                   seed=args.seed, anywhere=args.anywhere)
    found = pipeline.inject(config_of(args), injection, progress=args.verbosity < logging.ERROR)
    print(found.summary())
    return SOME_FAILED if found.run.n_failed else OK


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


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": _demo, "run": _run, "inject": _inject, "subtract": _subtract, "lightcurve": _lightcurve,
    "compare": _compare, "info": _info}
