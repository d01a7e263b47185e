"""Frames with damaged bytes, headers and scaling: `read_frame` gives a frame or a FrameError, at once and quietly.

    python bench/fuzz.py [--cases 12000] [--seed 0]

Each case is a small valid frame (plain, LCO layout, gzipped, fpacked) with a few bits flipped, bytes overwritten, cut
or repeated, cards replaced by others that are valid or not, or several of these. What must not happen: another
exception, a warning that is no DataWarning, a case of more than 5 s, more than 1 GB of memory, an open file left, a
frame that holds what its promise excludes. Writes bench/results/fuzz.json; exit code 1 where something happened.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from astropy.io import fits
from common import save

from gpudia.errors import DataWarning, FrameError
from gpudia.images import Region, read_frame
from gpudia.simulate import SimulationSettings, simulate_field, write_series

KEYS = ("SIMPLE BITPIX NAXIS NAXIS1 NAXIS2 NAXIS3 EXTEND PCOUNT GCOUNT TFIELDS TFORM1 TTYPE2 TDIM1 THEAP BSCALE BZERO "
        "BLANK EXTNAME EXTVER GAIN RDNOISE SATURATE EXPTIME MJD-OBS DATE-OBS TIMESYS FILTER INSTRUME AIRMASS L1FWHM "
        "OBJECT CTYPE1 CTYPE2 CRVAL1 CRPIX1 CD1_1 CD1_2 CD2_1 CD2_2 CUNIT1 A_ORDER A_2_0 PV1_1 EQUINOX RADESYS "
        "CPDIS1 DP1 WCSAXES LONPOLE ZNAXIS ZNAXIS1 ZTILE1 ZBITPIX ZCMPTYPE ZQUANTIZ ZSCALE ZZERO ZBLANK HIERARCH "
        "CONTINUE COMMENT END OBSGEO-X LATITUDE INHERIT CHECKSUM").split()
VALUES = ("0", "1", "-1", "2", "8", "16", "-32", "-64", "99", "999", "1000", "2147483648", "99999999999999", "1E308",
          "-1E38", "1.0E-320", "1E999", "NaN", "T", "F", "''", "'text    '", "'RA---TAN'", "'DEC--SIP'", "'XXXX-YYY'",
          "'<b>&\"'", "'1PE(9)'", "'2020-13-45T99:00:00'", "'tdb'", "(1.0, 2.0)", "", "/ nothing", "= =", "'open",
          "1 2 3", "'a&'", "\xe9\xff", "\x00\x01", "1D5", "+-3", "0x10")
LIMIT_SECONDS, LIMIT_BYTES = 5, 1 << 30


class TooSlow(BaseException):
    """A case took too long; no Exception, so that nothing catches it on its way."""


def originals(folder: Path) -> list[tuple[str, bytes]]:
    """Valid files: LCO, fpacked, plain, gzipped, scaled integers."""
    series = simulate_field(SimulationSettings(shape=(60, 70), n_epochs=1, seed=1, n_variables=0))
    found = []
    for layout, compress in (("lco", False), ("lco", True), ("plain", False)):
        path = write_series(series, folder / f"{layout}{compress}", layout, compress)[0]
        found.append((path.name, path.read_bytes()))
    data = np.rint(series.frames[0].data).astype(np.uint16)
    for name in ("whole.fits", "zipped.fits.gz"):
        fits.PrimaryHDU(data, fits.getheader(folder / "plainFalse" / "sim-0000.fits")).writeto(folder / name)
        found.append((name, (folder / name).read_bytes()))
    return found


def _flip(data: bytearray, rng: np.random.Generator) -> None:
    reach = len(data) if rng.random() < 0.5 else min(len(data), 5760)
    for at in rng.integers(0, reach, rng.integers(1, 30)):
        data[at] ^= 1 << int(rng.integers(8))


def _overwrite(data: bytearray, rng: np.random.Generator) -> None:
    at, length = int(rng.integers(len(data))), int(rng.integers(1, 400))
    data[at : at + length] = rng.bytes(length)


def _cut(data: bytearray, rng: np.random.Generator) -> None:
    at = int(rng.integers(len(data)))
    if rng.random() < 0.5:
        del data[at:]
    else:
        del data[at : at + int(rng.integers(1, 5000))]


def _repeat(data: bytearray, rng: np.random.Generator) -> None:
    at = int(rng.integers(len(data))) // 2880 * 2880
    data[at:at] = data[at : at + 2880 * int(rng.integers(1, 4))]


def _cards(data: bytearray, rng: np.random.Generator) -> None:
    """Replace some cards, of any header in the file."""
    places = [at for at in range(0, len(data) - 80, 80) if data[at + 8 : at + 10] == b"= "]
    for _ in range(int(rng.integers(1, 4))):
        if places:
            at = places[int(rng.integers(len(places)))]
            own = data[at : at + 8].decode("latin-1")
            key = own if rng.random() < 0.4 else KEYS[int(rng.integers(len(KEYS)))].ljust(8)
            card = f"{key}= {VALUES[int(rng.integers(len(VALUES)))].rjust(int(rng.integers(1, 25)))}"
            data[at : at + 80] = card.ljust(80)[:80].encode("latin-1")


SPOILERS = (_cards, _cards, _cards, _flip, _overwrite, _cut, _repeat)


def spoil(original: bytes, rng: np.random.Generator) -> bytes:
    """One to three kinds of damage."""
    data = bytearray(original)
    for k in rng.integers(0, len(SPOILERS), rng.integers(1, 4)):
        if len(data):
            SPOILERS[k](data, rng)
    return bytes(data)


def look(path: Path, region: Region | None) -> str:
    """Read once: what came of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DataWarning)
        try:
            frame = read_frame(path, region=region)
        except FrameError as error:
            return f"refused: {error.reason.split(',')[0][:60]}"
        except Warning as error:
            return f"WARNING {type(error).__name__}: {str(error)[:80]}"
        except TooSlow:
            return "SLOW"
        except Exception as error:
            return f"RAISED {type(error).__name__}: {str(error)[:80]}"
    kept = (np.isfinite(frame.data).all() and (frame.variance > 0).all() and np.isfinite(frame.variance).all()
            and frame.data.shape == frame.mask.shape == frame.variance.shape and (frame.mask == 0).any()
            and not 0 < abs(frame.mjd) > 2e5)
    return "frame" if kept else "BROKEN PROMISE"


def _stop(*_: object) -> None:
    raise TooSlow


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=12000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files of cases that went wrong")
    args = parser.parse_args()
    signal.signal(signal.SIGALRM, _stop)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + LIMIT_BYTES,) * 2)
    outcomes, wrong, slowest = Counter[str](), [], 0.0
    with tempfile.TemporaryDirectory() as temporary:
        sources = originals(Path(temporary))
        handles = len(os.listdir("/proc/self/fd"))
        for case in range(args.cases):
            rng = np.random.default_rng([args.seed, case])
            name, original = sources[case % len(sources)]
            path = Path(temporary) / name
            path.write_bytes(spoil(original, rng))
            region = Region(10, 12, (20, 24)) if rng.random() < 0.2 else None
            start = time.perf_counter()
            signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
            outcome = look(path, region)
            signal.setitimer(signal.ITIMER_REAL, 0)
            slowest = max(slowest, time.perf_counter() - start)
            outcomes[outcome.split(":")[0]] += 1
            if outcome[0].isupper():
                wrong.append({"case": case, "file": name, "what": outcome})
                print(wrong[-1], file=sys.stderr)
                if args.keep:
                    (args.keep / f"{case}-{name}").write_bytes(path.read_bytes())
        left = len(os.listdir("/proc/self/fd")) - handles
    save("fuzz", {"cases": args.cases, "seed": args.seed, "outcomes": dict(outcomes), "wrong": wrong[:50],
                  "slowest_s": round(slowest, 3), "file_handles_left": left})
    return int(bool(wrong) or left > 0)


def _address_space() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    raise SystemExit(main())
