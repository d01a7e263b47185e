"""Random pairs of star lists with a known transformation, for bench/registration.py and the tests of registration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from astropy.table import Table
from astropy.wcs import WCS

from gpudia.errors import RegistrationError
from gpudia.images import Region, Registration, register

#: A registration is good when its predicted error over the reference's stars' area is below this, pixels.
GOOD = 0.1
#: A good registration is wrong when it is off by more than this anywhere over that area, pixels.
WRONG = 0.3


@dataclass(frozen=True)
class Case:
    """Two lists of one sky. `matrix` takes reference positions to those of the image; `common` stars are in both."""

    reference: Table
    image: Table
    reference_wcs: WCS | None
    wcs: WCS | None
    matrix: np.ndarray
    common: int
    noise: float


def random_case(seed: int) -> Case:
    """Any rotation, mirrored or not, scale 0.5 to 2, shift to 200 px; 3 to 500 stars, some missing or spurious."""
    rng = np.random.default_rng(seed)
    side, n = rng.uniform(200, 2000), round(10 ** rng.uniform(np.log10(3), np.log10(500)))
    matrix = _random_map(rng, side)
    sky = rng.uniform(-side, 2 * side, (9 * n, 2))  # the image sees more than the reference does
    flux = 10 ** (rng.exponential(1 / 0.3, len(sky)) / -2.5 + 5)
    noise, missing, spurious = 10 ** rng.uniform(-2.5, -0.5), *rng.uniform(0, 0.5, 2)
    known_errors, scale = rng.uniform() < 0.8, np.sqrt(abs(np.linalg.det(matrix[:, :2])))
    tables, rows = [], []
    for m, size in ((np.eye(2, 3), side), (matrix, side * scale)):
        xy = sky @ m[:, :2].T + m[:, 2]
        seen = np.flatnonzero(((xy > 0) & (xy < size)).all(axis=1) & (rng.uniform(size=len(xy)) > missing))
        table = _list(rng, xy[seen], flux[seen], noise, round(spurious * len(seen)), size)
        table["star"] = np.r_[seen, np.full(len(table) - len(seen), -1)]
        if not known_errors:
            table.remove_columns(["x_err", "y_err"])
        tables.append(table[rng.permutation(len(table))])
        rows.append(seen)
    if rng.uniform() < 0.3:
        _give_ids(rng, tables)
    for table in tables:
        table.remove_column("star")
    return Case(*tables, *_random_wcs(rng, matrix), matrix, len(np.intersect1d(*rows)), noise)


def _random_map(rng: np.random.Generator, side: float) -> np.ndarray:
    angle = np.radians(rng.choice([0, rng.normal(0, 0.5), 90 * rng.integers(4), rng.uniform(0, 360)]))
    scale = rng.choice([1, 1, rng.choice([0.5, 2]), 2 ** rng.uniform(-1, 1)])
    mirror = np.diag([rng.choice([1, 1, -1]), 1])
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ mirror
    centre = np.full(2, side / 2)
    return np.column_stack([turn, scale * centre - turn @ centre + rng.uniform(-200, 200, 2)])


def _list(rng: np.random.Generator, xy: np.ndarray, flux: np.ndarray, noise: float, spurious: int,
          size: float) -> Table:
    xy = np.concatenate([xy, rng.uniform(0, size, (spurious, 2))])
    flux = np.concatenate([flux, rng.choice(flux, spurious) if len(flux) else flux])
    error = noise * np.clip((np.median(flux) / flux) ** 0.5, 0.1, 2) if len(flux) else flux
    xy = xy + rng.normal(size=xy.shape) * error[:, None]
    return Table({"x": xy[:, 0], "y": xy[:, 1], "flux": flux * rng.uniform(0.9, 1.1, len(flux)), "x_err": error,
                  "y_err": error}, meta={"ids": "running"})  # fmt: skip


def _give_ids(rng: np.random.Generator, tables: list[Table]) -> None:
    """Ids of a catalog: up to half of them another star's, some twice; spurious entries have any."""
    for table in tables:
        ids = np.where(table["star"] < 0, rng.integers(0, 10**6, len(table)), table["star"])
        wrong = rng.uniform(size=len(ids)) < rng.uniform(0, 0.5)
        ids[wrong] = rng.permutation(ids[wrong])
        twice = rng.uniform(size=len(ids)) < 0.05
        ids[twice] = np.roll(ids, 1)[twice]
        table["id"], table.meta["ids"] = ids, "catalog"


def tan_wcs(matrix: np.ndarray, scale: float = 0.4) -> WCS:
    """Plane of `scale` arcsec per reference pixel, seen by an image that `matrix` takes the reference to."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval = ["RA---TAN", "DEC--TAN"], (150.0, 2.0)
    wcs.wcs.crpix = matrix[:, :2] @ (100, 100) + matrix[:, 2] + 1
    wcs.wcs.cd = np.diag([-scale, scale]) / 3600 @ np.linalg.inv(matrix[:, :2])
    return wcs


def _random_wcs(rng: np.random.Generator, matrix: np.ndarray) -> tuple[WCS | None, WCS | None]:
    """None at all, or both; the image's right, off by 30 arcsec, missing or turned by half a turn."""
    if rng.uniform() < 0.5:
        return None, None
    wcs, state = tan_wcs(matrix), rng.uniform()
    if state < 0.4:
        angle = rng.uniform(0, 2 * np.pi)
        wcs.wcs.crval = wcs.wcs.crval + 30 / 3600 * np.array([np.cos(angle), np.sin(angle)])
    elif state < 0.5:
        wcs.wcs.cd = -wcs.wcs.cd
    return tan_wcs(np.eye(2, 3)), None if state > 0.8 else wcs


@dataclass(frozen=True)
class Outcome:
    """What became of a case: ``good``, ``uncertain`` (registered, and says so), ``refused`` or ``wrong``."""

    verdict: str
    reason: str = ""
    error: float = np.nan
    uncertainty: float = np.nan
    found: Registration | None = None


def area_of(stars: Table) -> Region:
    """Whole pixels around all stars of a list."""
    low = np.floor([np.min(stars["x"]), np.min(stars["y"])]).astype(int)
    high = np.ceil([np.max(stars["x"]), np.max(stars["y"])]).astype(int)
    return Region(int(low[0]), int(low[1]), (int(high[1] - low[1] + 1), int(high[0] - low[0] + 1)))


def largest_error(found: Registration, matrix: np.ndarray, area: Region) -> float:
    """Largest distance between a registration and the truth over an area, pixels."""
    (x0, y0), _, (x1, y1), _ = area.corners
    points = np.stack(np.meshgrid(np.linspace(x0, x1, 9), np.linspace(y0, y1, 9)), axis=-1).reshape(-1, 2)
    return float(np.hypot(*(found.apply(points) - points @ matrix[:, :2].T - matrix[:, 2]).T).max())


def judge(case: Case) -> Outcome:
    """Register a case and hold the result against the truth; only a `RegistrationError` may come of it."""
    try:
        found = register(case.reference, case.image, case.reference_wcs, case.wcs)
    except RegistrationError as exc:
        return Outcome("refused", exc.reason)
    area = area_of(case.reference)
    error, uncertainty = largest_error(found, case.matrix, area), found.uncertainty(area)
    good = uncertainty <= GOOD
    # who says that it is uncertain must still be right within five times what it says
    wrong = error > (WRONG if good else max(WRONG, 5 * uncertainty))
    return Outcome("wrong" if wrong else "good" if good else "uncertain", "", error, uncertainty, found)
