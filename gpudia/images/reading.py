"""From a FITS file to a `Frame`: plain images, LCO/BANZAI files (also fpacked), and the layered files of the seed."""

from __future__ import annotations

import gzip
import io
import math
import os
import re
import stat
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from astropy.io import fits
from astropy.io.fits.verify import VerifyError, VerifyWarning
from astropy.table import Table
from astropy.utils.exceptions import AstropyWarning
from astropy.wcs import WCS, FITSFixedWarning, Wcsprm

from gpudia.errors import FrameError
from gpudia.images.cutouts import Region, cut, shifted_wcs, whole_frame
from gpudia.images.frames import Frame, make_frame
from gpudia.images.headers import FrameLayout

__all__ = ["read_frame"]

_GZIP = b"\x1f\x8b"
_MOST = 999  # axes of an image and columns of a table, FITS 4.0
_BLOCK, _CARD = 2880, 80
#: The end of a header as astropy takes it, which bears rubbish behind it.
_END = re.compile(rb"END *(?:$|[^ A-Z0-9_-])")
#: A card as the standard wants it: nothing that astropy would mend or stumble on.
_STANDARD = re.compile(
    r"(?=.{8}= )(?!CONTINUE|HIERARCH)[A-Z0-9_-]+ *= +('[ -&(-~]*'|[+-]?\d+\.?\d*(E[+-]?\d+)?|[TF]) *(/.*)?"
    "|(COMMENT|HISTORY| {8}).*|END *| *")
#: Keywords of distortions and of further axes, with which astropy helps wcslib.
_DISTORTED = re.compile(r"[AB]P?_|[CD][PQ]|D2IM|AXISCORR|P[SV]\d|NAXIS3")
_SIZES = re.compile(rb"(BITPIX|Z?NAXIS\d*|PCOUNT|GCOUNT|TFIELDS) *= +([+-]?\d+)")


@dataclass
class _Parts:
    """What was found in one file."""

    data: Any
    header: fits.Header
    region: Region
    error: Any = None
    bits: Any = None
    wcs: WCS | None = None
    catalog: Table | None = None


def read_frame(path: str | Path, layout: FrameLayout | None = None, region: Region | None = None, *,
               catalog_with: Iterable[str] = ()) -> Frame:
    """Read one FITS file or a region of it, in any of the layouts that this library knows.

    The image is the HDU named as `layout` says (``SCI``), else the first 2-D image; error, mask and catalog are found
    by name. An HDU without an image whose header holds a celestial WCS overrides the image's own WCS (the layered
    files of the LCO photometry module). Compressed (``.fz``, ``.gz``) and scaled integer images are unpacked. The file
    is closed before this returns and never modified.

    With a region only its pixels are read: of tile-compressed images the tiles that it touches (the whole rows of it as
    fpack tiles them), of others its rows; of a ``.gz`` all that comes before it has to be unpacked too. Data, mask and
    errors of an error plane are those of `cut` on the whole frame. What the file does not say is measured in the region
    and not in the whole frame: sky, noise (so the variance where there is no error plane), gain, saturation level,
    unexposed borders.

    Parameters
    ----------
    path : str or path-like
        The file.
    layout : FrameLayout, optional
        Names of HDUs and keywords, and values that override the header.
    region : Region, optional
        In full-frame coordinates; it may reach beyond the frame, as in `cut`. Default: the whole frame.
    catalog_with : iterable of str
        Read the catalog only if it has one of these columns, in upper or lower case. Default: read it anyway.

    Returns
    -------
    Frame

    Raises
    ------
    FrameError
        The file is missing, truncated, not FITS or has no 2-D image; error or mask has another shape; the region does
        not overlap the frame; no pixel (of the region) is good; the image is constant.
    """
    layout, path = layout or FrameLayout(), Path(path)
    _refuse_no_file(path)
    parts = _read_parts(path, layout, region, {name.lower() for name in catalog_with})
    there = parts.region
    frame = make_frame(
        parts.data, error=parts.error, bits=parts.bits, header=parts.header,
        wcs=parts.wcs if region is None else shifted_wcs(parts.wcs, there),
        catalog=parts.catalog, layout=layout, path=path,
    )  # fmt: skip
    if there.origin != frame.origin:
        frame = replace(frame, origin=there.origin)
    return frame if region in (None, there) else cut(frame, region.shifted(-there.x0, -there.y0))


def _refuse_no_file(path: Path) -> None:
    """Refuse what is not a regular file: opening a FIFO would wait for ever."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as exc:
        if path.is_symlink():
            raise FrameError("file must exist, got a link that leads to none", path) from exc
        if isinstance(exc, FileNotFoundError | NotADirectoryError):
            raise FrameError("file must exist, got none", path) from exc
        raise FrameError(f"file must be readable, got {getattr(exc, 'strerror', None) or exc}", path) from exc
    if not stat.S_ISREG(mode):
        raise FrameError(f"must be a file, got {'a folder' if stat.S_ISDIR(mode) else 'a device or a pipe'}", path)


def _read_parts(path: Path, layout: FrameLayout, region: Region | None, columns: set[str]) -> _Parts:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AstropyWarning)  # headers of observatories break small rules all the time
        warnings.simplefilter("ignore", RuntimeWarning)  # scaling beyond the range of floats; such pixels are masked
        warnings.filterwarnings("error", message=".*truncated.*")
        try:
            # A handle of our own: astropy leaves its own open when it gives up on a damaged file.
            with path.open("rb") as raw, _unzipped(raw) as file:
                _refuse_absurd_sizes(file, path)
                with fits.open(file, memmap=False) as hdus:
                    parts = _collect(hdus, file, layout, region, columns, path)
                    _refuse_cut_extension(hdus, file, path)
                    return parts
        except AstropyWarning as exc:
            raise FrameError(f"file must be complete, got a truncated one ({exc})", path) from exc
        except FrameError:
            raise
        except Exception as exc:  # whatever astropy stumbles on: bench/fuzz.py met fifteen kinds, some of them private
            what = str(exc).split(" If this is really a FITS file")[0]  # advice to programmers
            raise FrameError(f"file must be readable as FITS, got {type(exc).__name__}: {what}", path) from exc


def _unzipped(file: BinaryIO) -> BinaryIO:
    """The file, or what it holds if it is gzipped: only who reads to the end learns that an extension is cut off."""
    start = file.read(2)
    file.seek(0)
    if start != _GZIP:
        return file
    with gzip.open(file) as packed:
        return io.BytesIO(packed.read())


def _refuse_absurd_sizes(file: BinaryIO, path: Path) -> None:
    """Refuse headers with negative sizes, or absurd numbers of axes or columns: astropy loops over them."""
    while cards := _sizes_of_header(file):
        for name, value in cards:
            most = _MOST if name in ("NAXIS", "ZNAXIS", "TFIELDS") else math.inf
            if name != "BITPIX" and not 0 <= value <= most:
                raise FrameError(f"{name} must be from 0{f' to {most}' if most == _MOST else ''}, got {value}", path)
        sizes = dict(reversed(cards))  # of a keyword that stands twice the first counts
        axes = [sizes.get(f"NAXIS{k + 1}", 0) for k in range(sizes.get("NAXIS", 0))]
        values = sizes.get("GCOUNT", 1) * (sizes.get("PCOUNT", 0) + math.prod(axes)) if axes else 0
        blocks = -(-(abs(sizes.get("BITPIX", 8)) // 8 * values) // _BLOCK)
        if blocks > 1 << 48:
            break
        file.seek(blocks * _BLOCK, os.SEEK_CUR)
    file.seek(0)


def _sizes_of_header(file: BinaryIO) -> list[tuple[str, int]]:
    """Cards about sizes in the header that begins here; leaves the file behind it. Empty where there is none."""
    cards = []
    while len(block := file.read(_BLOCK)) == _BLOCK:
        for at in range(0, _BLOCK, _CARD):
            if found := _SIZES.match(block, at, at + _CARD):
                cards.append((found[1].decode(), int(found[2])))
            elif _END.match(block[at : at + _CARD]):
                return cards
    return []


def _collect(
    hdus: fits.HDUList, file: BinaryIO, layout: FrameLayout, region: Region | None, columns: set[str], path: Path
) -> _Parts:
    image = _image_hdu(hdus, layout, path)
    shape = _plane_shape(image)
    texts = {id(hdu): _standard_text(hdu, file) for hdu in (hdus[0], image)}
    there = whole_frame(shape) if region is None else region.inside(shape, path)
    parts = _Parts(_pixels(image, there), _merged_header(hdus[0], image, all(texts.values())), there,
                   wcs=_wcs_of(image.header, hdus, texts[id(image)]))
    for hdu in hdus:
        if hdu is image:
            continue
        if _named(hdu, layout.error_hdu) and parts.error is None:
            _refuse_shape(hdu, shape, "error plane", path)
            parts.error = _pixels(hdu, there)
        elif _named(hdu, layout.mask_hdu) and parts.bits is None:
            _refuse_shape(hdu, shape, "mask", path)
            parts.bits = _pixels(hdu, there)
        elif _named(hdu, layout.catalog_hdu) and isinstance(hdu, fits.BinTableHDU | fits.TableHDU):
            if not columns or columns & _columns_of(hdu.header):
                parts.catalog = Table.read(hdu)
        elif hdu is not hdus[0] and not _is_image(hdu):
            parts.wcs = _wcs_of(hdu.header, hdus) or parts.wcs
    return parts


def _standard_text(hdu: Any, file: BinaryIO) -> str:
    """Header of a plain image as it stands in the file, if all of its cards are standard; else nothing."""
    info = hdu.fileinfo() if type(hdu) in (fits.PrimaryHDU, fits.ImageHDU) else None
    if info is None or file.closed:
        return ""
    file.seek(info["hdrLoc"])
    text = file.read(info["datLoc"] - info["hdrLoc"]).decode("latin-1")
    return text if text.isascii() and _is_standard(text) else ""


def _is_standard(text: str) -> bool:
    return all(_STANDARD.fullmatch(text, at, at + _CARD) for at in range(0, len(text), _CARD))


def _refuse_cut_extension(hdus: fits.HDUList, file: BinaryIO, path: Path) -> None:
    """Refuse a file that ends within an extension: astropy leaves that out without a word, be it the error plane."""
    info = hdus[-1].fileinfo()
    if info and not file.closed:
        file.seek(info["datLoc"] + info["datSpan"])
        rest = file.read(8)
        if rest and b"XTENSION".startswith(rest):
            raise FrameError("file must be complete, got one that ends within an extension", path)


def _named(hdu: Any, names: Iterable[str]) -> bool:
    return hdu.name.upper() in {n.upper() for n in names}


def _columns_of(header: fits.Header) -> set[str]:
    """Names of a table's columns, in lower case; without the rest of astropy's columns, which takes its time."""
    return {str(header.get(f"TTYPE{k + 1}", "")).strip().lower() for k in range(int(header.get("TFIELDS", 0)))}


def _is_image(hdu: Any) -> bool:
    """True for 2-D images (axes of length 1 do not count), compressed ones too; does not read the pixels."""
    return bool(hdu.is_image) and len(_plane_shape(hdu)) == 2


def _plane_shape(hdu: Any) -> tuple[int, ...]:
    shape = tuple(hdu.shape)
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    return shape if 0 not in shape else ()


def _pixels(hdu: Any, region: Region) -> np.ndarray:
    """Pixels of a region that lies on the image; reads (and unpacks) what they need and no more."""
    if region == whole_frame(_plane_shape(hdu)):
        return hdu.data.reshape(region.shape)
    return hdu.section[(0,) * (len(hdu.shape) - 2) + region.slices]


def _refuse_shape(hdu: Any, shape: tuple[int, ...], what: str, path: Path) -> None:
    """Refuse a plane of another shape than the image, or none: a mask that is lost without a word would cost more."""
    found = _plane_shape(hdu) if hdu.is_image else "a table"
    if found != shape:
        raise FrameError(f"{what} must have the image's shape {shape}, got {found}", path)


def _image_hdu(hdus: fits.HDUList, layout: FrameLayout, path: Path) -> Any:
    images = [hdu for hdu in hdus if _is_image(hdu)]
    other = (*layout.error_hdu, *layout.mask_hdu)
    found = [h for h in images if _named(h, layout.image_hdu)]
    if not found and layout.image_hdu == FrameLayout.image_hdu:  # a name that the user gave has to be there
        found = [h for h in images if not _named(h, other)]
    if not found:
        got = ", ".join(f"{h.name or 'unnamed'} {tuple(h.shape) if h.is_image else 'table'}" for h in hdus)
        named = "" if layout.image_hdu == FrameLayout.image_hdu else f" named {' or '.join(layout.image_hdu)}"
        raise FrameError(f"file must hold a two-dimensional image{named}, got {got}", path)
    return found[0]


def _merged_header(primary: Any, image: Any, standard: bool) -> fits.Header:
    """Cards of the primary header, updated by those of the image; without what describes the file's structure.

    Where not all are standard those go that cannot be parsed: they would raise at every look.
    """
    header = primary.header.copy(strip=True)
    if image is not primary:
        header.extend(image.header.copy(strip=True), update=True)
    for at, card in reversed([*enumerate(() if standard else header.cards)]):
        try:
            _ = card.value
        except VerifyError:
            del header[at]
    for key in ("BSCALE", "BZERO", "BLANK", "CHECKSUM", "DATASUM", "EXTNAME", "EXTVER"):
        header.remove(key, ignore_missing=True, remove_all=True)
    return header


def _wcs_of(header: fits.Header, hdus: fits.HDUList, text: str = "") -> WCS | None:
    """World coordinates of a header, with its text if that is standard; None for none and where wcslib refuses them."""
    if "CTYPE1" not in header or "CTYPE2" not in header:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FITSFixedWarning)
        warnings.simplefilter("ignore", VerifyWarning)
        try:
            standard, text = bool(text), text or header.tostring()
            plain = (standard or _is_standard(text)) and _is_plain(header)
            wcs = _plain_wcs(header, text) if plain else WCS(header, fobj=hdus, naxis=2)
        except Exception:  # texts for numbers and numbers for texts, inconsistent distortions: astropy raises anything
            return None
    return wcs if wcs.has_celestial else None


def _is_plain(header: fits.Header) -> bool:
    """True for the standard header of a 2-D image whose coordinates wcslib knows without help."""
    return (header.get("NAXIS") == 2 and not any(map(_DISTORTED.match, header))
            and all(isinstance(name, str) and "TAB" not in name for name in (header["CTYPE1"], header["CTYPE2"])))


def _plain_wcs(header: fits.Header, text: str) -> WCS:
    """What `WCS` makes of such a header, in a fifth of the time: that one parses it three times."""
    wcs = WCS(naxis=2)
    wcs.wcs = Wcsprm(header=text.encode("ascii"), relax=True).sub(2)
    wcs.fix()
    wcs.wcs.set()
    wcs.pixel_shape = header["NAXIS1"], header["NAXIS2"]
    return wcs
