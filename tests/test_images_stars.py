"""Detection and centroids, catalogs, registration: known positions and transformations come back."""

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from scipy import ndimage

from gpudia.errors import DataWarning, InputError, RegistrationError
from gpudia.flags import PIXEL_FLAGS, SOURCE_FLAGS
from gpudia.images import (
    FrameLayout,
    Region,
    catalog_of,
    detect_stars,
    frame_quality,
    identity_registration,
    make_frame,
    match_stars,
    read_frame,
    register,
)

GAIN, READ_NOISE, SKY = 2.0, 6.0, 200.0
LAYOUT = FrameLayout(gain=GAIN, read_noise=READ_NOISE, saturation=60000.0)


def tan_wcs(scale=0.5, crval=(150.0, 2.0), crpix=(150.5, 130.5), angle=0.0):
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval, wcs.wcs.crpix = ["RA---TAN", "DEC--TAN"], crval, crpix
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    wcs.wcs.cd = np.array([[-c, s], [s, c]]) * scale / 3600
    return wcs


def field(positions, flux, shape=(260, 300), fwhm=4.0, axis_ratio=1.0, seed=0, noise=True):
    """Gaussian stars on a sky with photon and read noise."""
    sigma = fwhm / 2.3548
    y, x = np.mgrid[: shape[0], : shape[1]]
    model = np.full(shape, SKY)
    for (px, py), f in zip(positions, np.broadcast_to(flux, len(positions)), strict=True):
        u, v = (x - px) / sigma * np.sqrt(axis_ratio), (y - py) / sigma / np.sqrt(axis_ratio)
        model += f / (2 * np.pi * sigma**2) * np.exp(-(u**2 + v**2) / 2)
    if not noise:
        return model
    rng = np.random.default_rng(seed)
    return rng.poisson(model * GAIN) / GAIN + rng.normal(0, READ_NOISE / GAIN, shape)


def grid(step=26, shape=(260, 300), seed=1):
    """Well separated stars at random fractions of pixels."""
    y, x = np.mgrid[step : shape[0] - step + 1 : step, step : shape[1] - step + 1 : step]
    rng = np.random.default_rng(seed)
    return np.column_stack([x.ravel(), y.ravel()]) + rng.uniform(-3, 3, (x.size, 2))


def star_list(xy, flux=None, **columns):
    flux = np.linspace(1e5, 1e3, len(xy)) if flux is None else flux
    return Table({"id": np.arange(1, len(xy) + 1), "x": xy[:, 0], "y": xy[:, 1], "flux": flux, **columns},
                 meta={"ids": "running"})  # fmt: skip


def nearest(stars, truth):
    xy = np.column_stack([stars["x"], stars["y"]])
    distance = np.hypot(*(xy[:, None] - truth[None]).T)  # (truth, stars)
    return xy[distance.argmin(axis=1)] - truth, distance.argmin(axis=1)


class TestDetection:
    @pytest.mark.parametrize("fwhm", [2.5, 4.0, 7.0])
    def test_positions_have_the_error_they_state(self, fwhm):
        truth = grid()
        stars = detect_stars(make_frame(field(truth, 6000.0, fwhm=fwhm), layout=LAYOUT))
        assert len(stars) == len(truth)
        assert {stars[name].dtype for name in stars.colnames if name not in ("id", "flags")} == {np.dtype(float)}
        offset, index = nearest(stars, truth)
        pull = offset / np.column_stack([stars["x_err"][index], stars["y_err"][index]])
        n = pull.size
        assert abs(pull.mean()) < 4 / np.sqrt(n)
        assert pull.std() == pytest.approx(1, abs=4 / np.sqrt(2 * n))
        assert np.all(stars["x_err"] < 0.1)

    def test_without_noise_positions_are_exact(self):
        truth = grid()
        data = field(truth, 20000.0, noise=False) + np.random.default_rng(0).normal(0, 1e-3, (260, 300))
        with pytest.warns(DataWarning, match="noise of the sky must be what gain and read noise say"):
            frame = make_frame(data, layout=LAYOUT)
        offset, _ = nearest(detect_stars(frame), truth)
        assert np.abs(offset).max() < 2e-3  # the sky under a star is known to 1e-4 of its peak, no better

    @pytest.mark.parametrize(("fwhm", "axis_ratio"), [(3.0, 1.0), (5.0, 0.8)])
    def test_flux_and_shape(self, fwhm, axis_ratio):
        truth = grid()
        frame = make_frame(field(truth, 30000.0, fwhm=fwhm, axis_ratio=axis_ratio), layout=LAYOUT)
        stars = detect_stars(frame)
        quality = frame_quality(frame, stars)
        widened = np.hypot(fwhm, 2.3548 / np.sqrt(12))  # pixels sample the profile; at most they widen it by this much
        assert fwhm * 0.99 < quality.fwhm < widened * 1.01
        assert quality.ellipticity == pytest.approx(1 - axis_ratio, abs=0.02)
        assert quality.n_stars == len(stars)
        assert np.median(stars["flux"]) == pytest.approx(30000, rel=0.02)
        assert np.std(stars["flux"]) == pytest.approx(np.median(stars["flux_err"]), rel=4 / np.sqrt(2 * len(stars)))

    def test_masks_saturation_and_edges(self):
        truth = np.array([[60.0, 60.0], [150.0, 60.0], [240.0, 60.0], [150.0, 150.0], [60.0, 150.0], [1.5, 200.0]])
        data = field(truth, [4e4, 4e4, 2e5, 4e4, 4e4, 4e4])
        top = 2 * data[150, 150]  # all but the third stay below
        data = np.minimum(data, top)
        bits = np.zeros(data.shape, np.uint8)
        bits[56:65, 56:65] = PIXEL_FLAGS.bad  # the first star is gone
        bits[60, 152] = PIXEL_FLAGS.cosmic_ray
        data[60, 152] = 50000.0
        data[120, 120] = 900.0  # a hot pixel that nobody masked
        frame = make_frame(data, bits=bits, layout=FrameLayout(gain=GAIN, read_noise=READ_NOISE, saturation=float(top)))
        stars = detect_stars(frame)
        offset, index = nearest(stars, truth[1:])
        assert len(stars) == 5
        assert np.abs(offset[:2]).max() < 0.2
        flags = np.asarray(stars["flags"])[index]
        assert flags[0] & SOURCE_FLAGS.masked_pixels
        assert flags[1] & SOURCE_FLAGS.saturated
        assert not flags[3]
        assert flags[4] & SOURCE_FLAGS.outside

    def test_limits_and_sky_positions(self):
        truth = grid()
        flux = np.linspace(3000, 40000, len(truth))
        wcs = tan_wcs()
        stars = detect_stars(make_frame(field(truth, flux), wcs=wcs, layout=LAYOUT), max_stars=20)
        assert len(stars) == 20
        assert np.all(np.diff(stars["flux"]) <= 0)
        back = np.column_stack(wcs.world_to_pixel_values(stars["ra"], stars["dec"]))
        np.testing.assert_allclose(back, np.column_stack([stars["x"], stars["y"]]), atol=1e-6)
        empty = detect_stars(make_frame(field(truth[:0], 1.0), layout=LAYOUT), threshold=8)
        assert len(empty) == 0
        assert np.isnan(frame_quality(make_frame(field(truth[:0], 1.0), layout=LAYOUT), empty).fwhm)
        with pytest.raises(InputError, match="max_stars and threshold must be positive, got 0"):
            detect_stars(make_frame(field(truth[:1], 1.0), layout=LAYOUT), max_stars=0)


class TestCatalog:
    def test_first_pixel(self):
        banzai = catalog_of(Table({"x": [11.0], "y": [21.0], "flux": [1.0]}))
        aperture = catalog_of(Table({"id": [5], "xcenter": [10.0], "ycenter": [20.0], "aperture_sum": [1.0]}))
        for made in (banzai, aperture):
            assert (made["x"][0], made["y"][0], made["flux"][0]) == (10.0, 20.0, 1.0)
        windowed = catalog_of(Table({"X": [1.0], "Y": [1.0], "XWIN": [3.0], "YWIN": [4.0]}))
        assert (windowed["x"][0], windowed["y"][0]) == (2.0, 3.0)
        assert catalog_of(Table({"x": [11.0], "y": [21.0]}), first_pixel=0)["x"][0] == 11.0

    def test_ids(self):
        with pytest.warns(DataWarning, match="ids must be unique, got 1 repeated"):
            table = catalog_of(Table({"source_id": [7, 9, 7], "xcenter": [1.0, 2.0, 3.0], "ycenter": [1.0, 2.0, 3.0]}))
        assert table["id"].tolist() == [7, 9]
        assert table["x"].tolist() == [1.0, 2.0]
        assert table.meta["ids"] == "catalog"
        assert catalog_of(Table({"id": [1, 2], "xcenter": [1.0, 2.0], "ycenter": [1.0, 2.0]})).meta["ids"] == "running"
        assert catalog_of(Table({"x": [1.0], "y": [2.0]})).meta["ids"] == "running"

    def test_sky_and_missing(self):
        wcs = tan_wcs()
        ra, dec = wcs.pixel_to_world_values([10.0, 20.0], [30.0, 40.0])
        table = catalog_of(Table({"RA": ra, "DEC": dec}), wcs=wcs)
        np.testing.assert_allclose(table["x"], [10.0, 20.0], atol=1e-6)
        assert catalog_of(Table({"ra": ra, "dec": dec})) is None
        assert catalog_of(make_frame(field([[50.0, 50.0]], 1e4), layout=LAYOUT)) is None
        gaps = Table({"x": np.ma.array([1.0, 2.0], mask=[False, True]), "y": [1.0, 2.0]})
        assert len(catalog_of(gaps)) == 1


ANGLES = [0.0, 0.05, 7.0, 90.0, 180.0, -133.0]


class TestRegistration:
    def pair(self, matrix, n=60, error=0.03, seed=0, extra=20, shape=(1000, 1000)):
        """Two lists of the same sky with centroid errors and stars of their own."""
        rng = np.random.default_rng(seed)
        height, width = shape
        sky = rng.uniform((0, 0), (width, height), (n + 2 * extra, 2))
        flux = 10 ** rng.uniform(3, 5, len(sky))
        first = np.r_[:n, n : n + extra]
        second = np.r_[:n, n + extra : n + 2 * extra]
        lists = []
        for rows, m in ((first, np.eye(2, 3)), (second, matrix)):
            xy = sky[rows] @ m[:, :2].T + m[:, 2] + rng.normal(0, error, (len(rows), 2))
            order = rng.permutation(len(rows))
            columns = {"x_err": np.full(len(rows), error), "y_err": np.full(len(rows), error)}
            measured = flux[rows] * rng.uniform(0.9, 1.1, len(rows))
            lists.append((star_list(xy[order], measured[order], **columns), rows[order]))
        return lists

    def check(self, found, matrix, error, n):
        corners = np.array([[0, 0], [1000, 0], [0, 1000], [1000, 1000.0]])
        # An affine fit to n stars: the error at the corners is at most sqrt(7/n) of a pair's, twice for the tails.
        allowed = 4 * np.hypot(error, error) * np.sqrt(7 / n)
        np.testing.assert_allclose(found.apply(corners), corners @ matrix[:, :2].T + matrix[:, 2], atol=allowed)
        assert found.rms < 2 * 1.6 * error

    @pytest.mark.parametrize("mirrored", [False, True])
    @pytest.mark.parametrize("angle", ANGLES)
    def test_without_any_wcs(self, angle, mirrored):
        c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        turn = 1.001 * np.array([[c, -s], [s, c]]) @ np.diag([-1 if mirrored else 1, 1])
        matrix = np.column_stack([turn, [31.4, -17.2]])
        (a, _), (b, _) = self.pair(matrix)
        found = register(a, b)
        assert found.route in ("offset", "pattern")
        assert found.n_matched >= 57  # of 60; clipping at 4 times the typical distance takes hardly any
        self.check(found, matrix, 0.03, 60)
        assert np.array_equal(register(a, b).matrix, found.matrix)  # the same from call to call
        there_and_back = found.to_reference(found.apply([[3.0, 4.0]]))
        np.testing.assert_allclose(there_and_back, [[3.0, 4.0]], atol=1e-9)
        if abs(angle) != 133.0:
            np.testing.assert_array_equal(found.orientation(), np.rint(turn))

    @pytest.mark.parametrize("count", [20, 40])
    def test_pattern_route_by_itself(self, count):
        c, s = np.cos(1.0), np.sin(1.0)
        matrix = np.array([[1.1 * c, -1.1 * s, 5.0], [1.1 * s, 1.1 * c, -9.0]])
        (a, _), (b, _) = self.pair(matrix, n=count, extra=count // 3)
        found = register(a, b, routes=("pattern",))
        assert found.route == "pattern"
        self.check(found, matrix, 0.03, count)

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_a_list_without_stars_has_no_common_offset(self, order):
        (a, _), _ = self.pair(np.array([[1.0, 0.0, 5.0], [0.0, 1.0, -9.0]]), n=20)
        lists = [a, a[:0]]
        with pytest.raises(RegistrationError, match="stars must be at least 1 in both lists, got"):
            match_stars(*(lists[k] for k in order), "offset")

    @pytest.mark.parametrize("offset", [(0.0, 0.0), (40.0, -25.0)])
    def test_by_the_sky_with_a_wrong_pointing(self, offset):
        angle = 30.0
        first = tan_wcs(0.6, crpix=(500, 500))
        second = tan_wcs(0.6, crval=(150.01, 2.004), crpix=(480, 515), angle=angle)
        (a, _), _ = self.pair(np.eye(2, 3))
        ra, dec = first.pixel_to_world_values(a["x"], a["y"])
        xy = np.column_stack(second.world_to_pixel_values(ra, dec))
        b = star_list(xy, a["flux"])
        wrong = second.deepcopy()
        wrong.wcs.crval = wrong.wcs.crval + np.array(offset) / 3600  # tens of arcsec off
        found = register(a, b, first, wrong)
        assert found.route == "sky"
        assert found.n_matched == len(a)
        # Two tangent planes 40 arcsec apart over 600 arcsec differ by less than 1e-3 px from an affine map.
        np.testing.assert_allclose(found.apply(np.column_stack([a["x"], a["y"]])), xy, atol=0.01)

    def test_by_ids_with_wrong_ones(self):
        matrix = np.array([[0.9, -0.3, 200.0], [0.3, 0.9, -100.0]])
        (a, rows_a), (b, rows_b) = self.pair(matrix)
        for table, rows in ((a, rows_a), (b, rows_b)):
            table["id"] = rows + 1000
            table.meta["ids"] = "catalog"
        found = register(a, b)
        assert found.route == "id"
        self.check(found, matrix, 0.03, 60)
        swapped = b.copy()
        swapped["id"][:12] = np.roll(swapped["id"][:12], 1)  # 15 % of the ids are wrong
        self.check(register(a, swapped), matrix, 0.03, 60)

    def test_few_stars(self):
        matrix = np.array([[1.0, 0.0, 12.3], [0.0, 1.0, -4.5]])
        (a, _), (b, _) = self.pair(matrix, n=3, extra=0)
        assert register(a, b).n_matched == 3
        with pytest.raises(RegistrationError, match="stars of the image must be at least 3, got 2"):
            register(a, b[:2])
        with pytest.raises(RegistrationError, match="stars of the reference must be at least 5, got 3"):
            register(a, b, min_matches=5)

    @pytest.mark.parametrize("n", [3, 8, 40, 400])
    def test_chance_is_refused(self, n):
        for seed in range(3):
            rng = np.random.default_rng(seed)
            a, b = (star_list(rng.uniform(0, 1000, (n, 2))) for _ in range(2))
            with pytest.raises(RegistrationError, match="no trustworthy match with the reference"):
                register(a, b, routes=("offset", "pattern") if n <= 40 else ("offset",))

    def test_rms_above_the_limit(self):
        (a, _), (b, _) = self.pair(np.eye(2, 3), error=0.3)
        with pytest.raises(RegistrationError, match=r"rms must be at most 0\.1 px, got"):
            register(a, b, max_rms=0.1, routes=("offset",))

    def test_saturated_stars_stay_out(self):
        (a, _), (b, _) = self.pair(np.eye(2, 3), extra=0)
        b["flags"] = 0
        b["flags"][:10] = SOURCE_FLAGS.saturated
        b["x"][:10] += 1.0
        found = register(a, b)
        assert found.n_matched == 50
        self.check(found, np.eye(2, 3), 0.03, 50)

    def test_unknown_route_and_missing_columns(self):
        (a, _), (b, _) = self.pair(np.eye(2, 3))
        with pytest.raises(InputError, match="route must be one of"):
            match_stars(a, b, "magic")
        with pytest.raises(RegistrationError, match="no ids from a catalog"):
            match_stars(a, b, "id")
        with pytest.raises(RegistrationError, match="no sky positions"):
            match_stars(a, b, "sky")

    def test_shift_and_displacement(self):
        angle = 0.002
        c, s = np.cos(angle), np.sin(angle)
        matrix = np.column_stack([[[c, -s], [s, c]], [10.4, -3.6]])
        found = type(identity_registration())(matrix)
        region = Region(100, 200, (301, 301))
        assert found.displacement(region) == pytest.approx(2 * np.sin(angle / 2) * np.hypot(150, 150), rel=1e-9)
        assert found.shift_at(0, 0) == (10, -4)
        identity = identity_registration()
        assert identity.displacement(region) == 0
        assert identity.shift_at(5, 6) == (0, 0)
        np.testing.assert_array_equal(identity.apply([1.0, 2.0]), [1.0, 2.0])


@pytest.fixture(scope="module")
def rise(real_data):
    frames = [read_frame(real_data / "rise" / f"q_e_20200830_1_{k}_1_1.fits") for k in (1, 11, 21)]
    return frames, [detect_stars(f) for f in frames]


@pytest.mark.realdata
class TestRealFrames:
    def test_seeing_agrees_with_the_header(self, rise):
        for frame, stars in zip(*rise, strict=True):
            assert frame_quality(frame, stars).fwhm == pytest.approx(frame.fwhm, rel=0.15)  # other definition

    def test_dither_with_and_without_wcs(self, rise):
        _, lists = rise
        bare = [s["id", "x", "y", "flux", "x_err", "y_err", "flags"] for s in lists]
        still, moved = register(lists[0], lists[1]), register(lists[0], lists[2])
        assert (still.route, moved.route) == ("sky", "sky")
        assert still.rms < 0.1
        assert moved.rms < 0.2  # the camera's distortion does not move with the sky
        assert np.hypot(*moved.shift_at(500, 500)) == pytest.approx(98, abs=2)
        for routes in (("offset",), ("pattern",)):
            again = register(bare[0], bare[2], routes=routes)
            corners = [[0, 0], [1000, 1000]]
            np.testing.assert_allclose(again.apply(corners), moved.apply(corners), atol=0.02)

    @pytest.mark.parametrize("turn", ["rot90", "flip", "transpose", "rotate7"])
    def test_turned_and_mirrored(self, rise, turn):
        frames, lists = rise
        turned = {
            "rot90": np.rot90, "flip": lambda d: d[:, ::-1], "transpose": np.transpose,
            "rotate7": lambda d: ndimage.rotate(d, 7, reshape=False, order=3),
        }[turn](frames[2].data)  # fmt: skip
        stars = detect_stars(make_frame(np.ascontiguousarray(turned), layout=FrameLayout(gain=2.4, read_noise=12.0)))
        found = register(lists[0], stars)
        straight = register(lists[0], lists[2])
        assert found.n_matched > 0.9 * straight.n_matched
        assert found.rms < 1.2 * straight.rms
        assert abs(np.linalg.det(found.matrix[:, :2])) == pytest.approx(np.linalg.det(straight.matrix[:, :2]), abs=2e-4)

    def test_eso085_without_wcs(self, real_data):
        with pytest.warns(DataWarning, match="gain must be positive"):
            frames = [read_frame(p) for p in sorted((real_data / "eso085").glob("*.fit"))]
        found = register(*(detect_stars(f) for f in frames))
        assert found.n_matched > 400
        assert found.rms < 0.15
        assert np.abs(found.matrix - np.eye(2, 3)).max() < 0.2  # registered before

    def test_decam_is_sparse(self, real_data):
        paths = sorted((real_data / "decam").glob("*.fits"))
        assert all(fits.getheader(p)["GAIN"] == 4.1505 for p in paths)
        lists = [detect_stars(read_frame(p)) for p in paths]
        for stars in lists[1:]:
            found = register(lists[0], stars)
            assert found.n_matched >= 10
            assert found.rms < 0.15


@pytest.mark.parametrize("reach", [1, 4])
def test_peaks_are_those_of_a_maximum_filter(reach):
    from gpudia.images.catalogs import _highest, _tops

    image = np.random.default_rng(0).integers(0, 50, (30, 41)).astype(np.float32)  # with ties, and at the edge
    found = np.argwhere(_tops(image))
    expected = np.argwhere(image == ndimage.maximum_filter(image, size=2 * reach + 1))
    np.testing.assert_array_equal(found[_highest(image, found, reach)], expected)
    assert _highest(image, found[:0], reach).shape == (0,)


def test_pixels_around_the_edge_are_those_of_a_maximum_filter():
    from gpudia.images.catalogs import _around

    bits = np.random.default_rng(0).choice([0, 0, 0, 0, 1, 2, 8], (9, 14)).astype(np.uint8)
    rows, columns = np.indices(bits.shape).reshape(2, -1)
    expected = ndimage.maximum_filter(bits, size=5).ravel()
    np.testing.assert_array_equal(_around(bits, rows, columns, 2).max(axis=1), expected)
