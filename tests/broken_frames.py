"""Kinds of broken frames: each makes one out of a good frame in the LCO layout. For tests and bench/fuzz.py.

`KINDS` maps a name to (maker, outcome, words). A maker gets the path of a copy of a good frame and changes it; it may
put another file in its place and return that path. Outcome: ``failed`` (a row with a reason that matches `words`),
``ok`` (usable, with a flag that `words` names where it is not empty), or ``any`` (either, with a reason where it
failed).
"""

import gzip
import os
import socket
import zlib

import numpy as np
from astropy.io import fits
from astropy.table import Table

HOSTILE = "<script>alert(1)</script>\"'&../../x"
CARD, BLOCK = 80, 2880


# ---------- bytes ----------


def cut(share):
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size) + 7])


def content(data):
    return lambda path: path.write_bytes(data) and None


def flip(seed, count, first, last):
    """Flip `count` random bits between two shares of the file."""

    def make(path):
        data, rng = bytearray(path.read_bytes()), np.random.default_rng(seed)
        for at in rng.integers(int(first * len(data)), int(last * len(data)), count):
            data[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)

    return make


def raw_card(keyword, card, extension=b""):
    """Replace the card of a keyword by 80 bytes as they are, in the first HDU or that of this name."""

    def make(path):
        data = bytearray(path.read_bytes())
        start = data.rindex(b"XTENSION", 0, data.index(b"EXTNAME = '" + extension)) if extension else 0
        end = data.index(b"END" + b" " * 77, start)
        at = next((k for k in range(start, end, CARD) if data[k : k + 8] == keyword.ljust(8)), end - CARD)
        data[at : at + CARD] = card.ljust(CARD)[:CARD]
        path.write_bytes(data)

    return make


def zipped(spoil):
    def make(path):
        packed = bytearray(gzip.compress(path.read_bytes(), 1))
        new = path.with_name(path.name + ".gz")
        new.write_bytes(spoil(packed))
        path.unlink()
        return new

    return make


def wrong_crc(packed):
    packed[-8] ^= 255
    return packed


# ---------- what is no file ----------


def instead(make):
    def put(path):
        path.unlink()
        make(path)

    return put


def listen(path):
    here = os.getcwd()
    os.chdir(path.parent)  # the address of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


# ---------- headers, pixels, planes, catalogs ----------


def edit(change, **writing):
    """Change the HDU list in memory and write it."""

    def make(path):
        with fits.open(path, memmap=False, do_not_scale_image_data=True) as hdus:
            hdus = fits.HDUList([hdu.copy() for hdu in hdus])
        hdus = change(hdus) or hdus
        hdus.writeto(path, overwrite=True, output_verify="ignore", **writing)

    return make


def cards(**values):
    return edit(lambda hdus: hdus["SCI"].header.update({k.replace("_", "-"): v for k, v in values.items()}))


def pixels(change, hdu="SCI"):
    def put(hdus):
        hdus[hdu].data = change(hdus[hdu].data.copy())

    return edit(put)


def block(value):
    def change(data):
        data[20:50, 30:70] = value
        return data

    return pixels(change)


def catalog(table):
    def put(hdus):
        hdus["CAT"] = fits.BinTableHDU(table(Table(hdus["CAT"].data)), name="CAT")

    return edit(put)


def column(name, value):
    def change(table):
        table[name] = [value] * len(table)
        return table

    return catalog(change)


def no_ids(change):
    """Take the ids away, too: positions have to serve."""

    def put(table):
        table = change(table)
        table.remove_columns([c for c in table.colnames if "id" in c.lower()])
        return table

    return catalog(put)


def only(hdus):
    return edit(lambda _: fits.HDUList([fits.PrimaryHDU(), *hdus()]))


def second_sci(hdus):
    hdus.append(fits.ImageHDU(np.zeros((4, 5), np.float32), name="SCI"))


def unscaled(hdus, **values):
    """Integers whose scaling cards are these."""
    hdus["SCI"].data = np.rint(hdus["SCI"].data).clip(-32000, 32000).astype(np.int16)
    hdus["SCI"].header.update(values)


def noise(shape):
    return np.random.default_rng(1).normal(1000, 10, shape).astype(np.float32)


def turned(hdus):
    """The same sky upside down, with catalog and WCS as they were: both are wrong now."""
    for hdu in hdus:
        if hdu.is_image and hdu.data is not None:
            hdu.data = hdu.data[::-1, ::-1].copy()


# ---------- names ----------


def named(name):
    def make(path):
        new = path.parent / name if isinstance(name, str) else os.path.join(os.fsencode(path.parent), name)
        os.rename(path, new)
        return type(path)(os.fsdecode(new))

    return make


def _time(text):
    """A start that is none, and none beside it."""

    def put(hdus):
        for hdu in hdus[:2]:
            for key in ("MJD-OBS", "MJD", "DATE-OBS", "MJD-MID", "DATE-AVG"):
                hdu.header.remove(key, ignore_missing=True)
        hdus["SCI"].header["MJD-OBS"] = text

    return edit(put)


FILES = {
    "cut in the first header": (cut(0.0), "failed", "readable|complete"),
    "cut in the image": (cut(0.3), "failed", "complete|readable"),
    "cut in the last extension": (cut(0.97), "failed", "complete|readable"),
    "cut after one block": (lambda p: p.write_bytes(p.read_bytes()[:BLOCK]), "failed", "readable"),
    "zero length": (content(b""), "failed", "readable"),
    "HTML": (content(b"<!doctype html><title>403 Forbidden</title>" * 80), "failed", "readable"),
    "text": (content(b"hello\n"), "failed", "readable"),
    "random bytes": (lambda p: p.write_bytes(np.random.default_rng(2).bytes(30000)), "failed", "readable"),
    "NUL bytes": (content(bytes(20000)), "failed", "readable"),
    "SIMPLE and nothing else": (content(b"SIMPLE  =                    T"), "failed", "readable|complete"),
    "header without END": (content(b"SIMPLE  =                    T".ljust(CARD) * 72), "failed", "readable"),
    "bits flipped in the header": (flip(3, 40, 0.0, 0.02), "any", ""),
    "bits flipped in the table": (flip(4, 40, 0.44, 0.5), "any", ""),
    "bits flipped in the data": (flip(5, 200, 0.1, 0.4), "any", ""),
    "bits flipped anywhere": (flip(6, 400, 0.0, 1.0), "any", ""),
    "gzip": (zipped(bytes), "ok", ""),
    "gzip, wrong CRC": (zipped(wrong_crc), "failed", "readable"),
    "gzip, cut": (zipped(lambda z: z[: len(z) // 2]), "failed", "readable|complete"),
    "gzip, noise inside": (zipped(lambda z: z[:2000] + bytes(500) + z[2500:]), "failed", "readable|complete"),
    "zlib without a header": (lambda p: p.write_bytes(zlib.compress(p.read_bytes(), 1)), "failed", "readable"),
    "missing": (lambda p: p.unlink(), "failed", "must exist"),
    "folder": (instead(lambda p: p.mkdir()), "failed", "folder"),
    "dangling link": (instead(lambda p: p.symlink_to(p.parent / "nowhere")), "failed", "must exist"),
    "link loop": (instead(lambda p: p.symlink_to(p)), "failed", "exist|link"),
    "FIFO": (instead(os.mkfifo), "failed", "a file, got a device"),
    "endless device": (instead(lambda p: p.symlink_to("/dev/zero")), "failed", "a file, got a device"),
    "socket": (instead(listen), "failed", "a file, got a device"),
}

HEADERS = {
    "NAXIS1 absurd": (raw_card(b"NAXIS1", b"NAXIS1  =        2000000000000"), "failed", "complete|readable"),
    "NAXIS1 large": (raw_card(b"NAXIS1", b"NAXIS1  =                70000"), "failed", "complete|readable"),
    "NAXIS1 small": (raw_card(b"NAXIS1", b"NAXIS1  =                   40"), "failed", ""),
    "NAXIS1 negative": (raw_card(b"NAXIS1", b"NAXIS1  =                 -120"), "failed", "NAXIS1 must be from 0"),
    "NAXIS1 text": (raw_card(b"NAXIS1", b"NAXIS1  = 'wide    '"), "failed", ""),
    "NAXIS 999": (raw_card(b"NAXIS", b"NAXIS   =                  999"), "failed", ""),
    "NAXIS 900000000": (raw_card(b"NAXIS", b"NAXIS   =            900000000"), "failed", "NAXIS must be from 0 to 999"),
    "NAXIS 5": (raw_card(b"NAXIS", b"NAXIS   =                    5"), "failed", ""),
    "BITPIX 7": (raw_card(b"BITPIX", b"BITPIX  =                    7"), "failed", ""),
    "PCOUNT absurd": (raw_card(b"PCOUNT", b"PCOUNT  =       90000000000000", b"CAT"), "failed", ""),
    "NAXIS2 of the errors large": (raw_card(b"NAXIS2", b"NAXIS2  =                70000", b"ERR"), "failed", ""),
    "NAXIS1 of the mask small": (raw_card(b"NAXIS1", b"NAXIS1  =                  119", b"BPM"), "failed", ""),
    "TFIELDS absurd": (raw_card(b"TFIELDS", b"TFIELDS =            900000000", b"CAT"), "failed", "from 0 to 999"),
    "TFORM unknown": (raw_card(b"TFORM1", b"TFORM1  = '9Q      '", b"CAT"), "any", ""),
    "letters beyond ASCII": (raw_card(b"EXPTIME", b"OBJECT  = '\xff\xfe\xc3\xa9 \x80'"), "ok", ""),
    "control characters": (raw_card(b"EXPTIME", b"OBJECT  = 'a\x00b\x1b[31m\x07\r\n'"), "ok", ""),
    "CONTINUE without a text": (raw_card(b"EXPTIME", b"CONTINUE  'left over &'"), "any", ""),
    "card without a value": (raw_card(b"EXPTIME", b"GAIN    = "), "ok", ""),
    "card that is noise": (raw_card(b"EXPTIME", b"\x93= '''' / '= \xe2"), "any", ""),
    "gain negative": (cards(GAIN=-2.0), "ok", "gain_guessed"),
    "gain absurd": (cards(GAIN=1e30), "ok", "gain_guessed"),
    "read noise negative": (cards(RDNOISE=-5.0, READNOIS=-5.0), "ok", ""),
    "exposure time text": (cards(EXPTIME="sixty"), "ok", ""),
    "exposure time absurd": (cards(EXPTIME=1e300), "ok", ""),
    "time text": (_time("tomorrow"), "ok", ""),
    "time absurd": (_time(1e200), "ok", ""),
    "time date none": (_time("0000-00-00T99:99:99"), "ok", ""),
    "time 1e15": (_time(1e15), "ok", ""),
    "saturation below the sky": (cards(SATURATE=1.0), "failed", "good pixel"),
    "seeing absurd": (cards(L1FWHM=1e9), "ok", ""),
    "airmass text": (cards(AIRMASS="<b>"), "ok", ""),
    "observatory nowhere": (cards(OBSGEO_X=1e300, OBSGEO_Y=-1e300, OBSGEO_Z=0.0), "ok", ""),
    "hostile object": (cards(OBJECT=HOSTILE), "ok", ""),
    "hostile filter": (cards(FILTER=HOSTILE), "failed", "filter must be that of the series"),
    "WCS 30 degrees off": (cards(CRVAL1=10.0, CRVAL2=45.0), "ok", ""),
    "WCS singular": (cards(CD1_1=0.0, CD1_2=0.0, CD2_1=0.0, CD2_2=0.0), "ok", ""),
    "WCS not a number": (cards(CRVAL1="north"), "ok", ""),
    "WCS of no sky": (cards(CTYPE1="VELO", CTYPE2="FREQ"), "ok", ""),
    "WCS projection unknown": (cards(CTYPE1="RA---XYZ", CTYPE2="DEC--XYZ"), "ok", ""),
    "WCS distortion lost": (cards(CTYPE1="RA---TAN-SIP", CTYPE2="DEC--TAN-SIP", A_ORDER=9), "ok", ""),
    "scaling 0": (edit(lambda h: unscaled(h, BSCALE=0.0)), "failed", "constant"),
    "scaling huge": (edit(lambda h: unscaled(h, BSCALE=1e38, BZERO=0.0)), "any", ""),
    "zero point text": (edit(lambda h: unscaled(h, BZERO="none")), "any", ""),
    "zero point infinite": (raw_card(b"EXPTIME", b"BZERO   =              1.0E+999"), "failed", ""),
    "5000 cards": (edit(lambda h: h["SCI"].header.extend([(f"K{i}", i) for i in range(5000)])), "ok", ""),
}

PIXELS = {
    "all NaN": (pixels(lambda d: np.full_like(d, np.nan)), "failed", "good pixel"),
    "all infinite": (pixels(lambda d: np.full_like(d, np.inf)), "failed", "good pixel"),
    "all zero": (pixels(np.zeros_like), "failed", "constant"),
    "constant": (pixels(lambda d: np.full_like(d, 7)), "failed", "constant"),
    "block of NaN": (block(np.nan), "ok", ""),
    "block of infinity": (block(np.inf), "ok", ""),
    "block of 1e38": (block(1e38), "any", ""),
    "block of -1e38": (block(-1e38), "any", ""),
    "no stars": (pixels(lambda d: noise(d.shape)), "failed", "stars|ids"),
    "other stars": (pixels(lambda d: noise(d.shape) + 4 * np.roll(d, (37, 51), (0, 1))[::-1]), "any", ""),
    "one good pixel": (pixels(lambda d: np.where(np.arange(d.size).reshape(d.shape) == 77, 5, np.nan)), "failed", ""),
    "1e300": (pixels(lambda d: d.astype(float) * 1e300), "failed", ""),
    "1e-300": (pixels(lambda d: d.astype(float) * 1e-300), "failed", ""),
    "negative": (pixels(lambda d: -d), "failed", ""),
    "upside down": (edit(turned), "any", ""),
    "cube": (pixels(lambda d: np.stack([d, d])), "failed", "two-dimensional|shape"),
    "row": (pixels(lambda d: d[5]), "failed", "two-dimensional|shape"),
    "3 x 3": (only(lambda: [fits.ImageHDU(np.arange(9.0).reshape(3, 3), name="SCI")]), "failed", ""),
    "1 x 1": (only(lambda: [fits.ImageHDU(np.ones((1, 1)), name="SCI")]), "failed", ""),
    "empty": (only(lambda: [fits.ImageHDU(np.ones((0, 4)), name="SCI")]), "failed", ""),
    "one row": (only(lambda: [fits.ImageHDU(noise((1, 4000)), name="SCI")]), "failed", ""),
    "table only": (only(lambda: [fits.BinTableHDU(Table({"a": [1.0]}), name="SCI")]), "failed", "two-dimensional"),
    "primary only": (only(list), "failed", "two-dimensional"),
    "second SCI": (edit(second_sci), "ok", ""),
    "mask of another shape": (pixels(lambda d: d[:50], "BPM"), "failed", "mask must have the image's shape"),
    "mask full": (pixels(lambda d: np.ones_like(d), "BPM"), "failed", "good pixel"),
    "mask all bits": (pixels(lambda d: np.where(d > 0, 255, d), "BPM"), "ok", ""),
    "mask NaN": (pixels(lambda d: np.full(d.shape, np.nan), "BPM"), "failed", "good pixel"),
    "mask one row": (pixels(lambda d: d[0], "BPM"), "failed", "mask must have the image's shape"),
    "mask without a byte": (edit(lambda h: h.__setitem__("BPM", fits.ImageHDU(name="BPM"))), "failed", "mask must"),
    "mask a table": (edit(lambda h: h.__setitem__("BPM", fits.BinTableHDU(Table({"a": [1]}), name="BPM"))), "failed",
                     "mask must have the image's shape .*, got a table"),
    "errors of another shape": (pixels(lambda d: d[:50], "ERR"), "failed", "error plane must have the image's shape"),
    "errors 0": (pixels(np.zeros_like, "ERR"), "failed", "good pixel"),
    "errors NaN": (pixels(lambda d: np.full_like(d, np.nan), "ERR"), "failed", "good pixel"),
    "errors negative": (pixels(lambda d: -d, "ERR"), "failed", "good pixel"),
    "errors 1e30": (pixels(lambda d: np.full_like(d, 1e30), "ERR"), "any", ""),
    "errors 1e-30": (pixels(lambda d: np.full_like(d, 1e-30), "ERR"), "any", ""),
    "errors partly lost": (pixels(lambda d: np.where(np.arange(d.shape[1]) < 20, np.nan, d), "ERR"), "ok", ""),
}

CATALOGS = {
    "positions NaN": (no_ids(lambda t: Table({c: t[c] * (np.nan if c in ("x", "y") else 1) for c in t.colnames})),
                      "ok", ""),
    "positions absurd": (column("x", 1e300), "ok", ""),
    "positions text": (column("x", "left"), "ok", ""),
    "one place": (no_ids(lambda t: Table({**{c: t[c] for c in t.colnames}, "x": np.full(len(t), 5.0),
                                          "y": np.full(len(t), 5.0)})), "ok", ""),
    "no rows": (catalog(lambda t: t[:0]), "ok", ""),
    "two rows": (catalog(lambda t: t[:2]), "ok", ""),
    "other columns": (catalog(lambda t: Table({"colour": t[t.colnames[0]]})), "ok", ""),
    "positions in pairs": (column("x", [1.0, 2.0]), "ok", ""),
    "catalog an image": (edit(lambda h: h.__setitem__("CAT", fits.ImageHDU(np.ones((3, 3)), name="CAT"))), "ok", ""),
}

NAMES = {
    "name with a line break": (named("a\nb.fits"), "ok", ""),
    "name with quotes": (named("it's \"x\".fits"), "ok", ""),
    "name with a script": (named("<script>alert(1)<script>.fits"), "ok", ""),
    "name with an escape": (named("\x1b[31mred\x07.fits"), "ok", ""),
    "name that is not UTF-8": (named(b"caf\xe9.fits"), "ok", ""),
    "name with dots": (named("..%2f..%2fetc.fits"), "ok", ""),
    "name of dots": (named("...fits"), "ok", ""),
    "name of nothing": (named(".fits"), "ok", ""),
    "name that is an option": (named("--output.fits"), "ok", ""),
    "name of spaces": (named("   .fits"), "ok", ""),
    "name turned round": (named("\u202estif.fits"), "ok", ""),
    "name of 250 letters": (named("n" * 245 + ".fits"), "ok", ""),
    "name of an output": (named("epochs.ecsv"), "ok", ""),
    "name of a pattern": (named("[a-z]*?.fits"), "ok", ""),
}

KINDS = {**FILES, **HEADERS, **PIXELS, **CATALOGS, **NAMES}
