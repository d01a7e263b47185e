"""Registration under bad lists, bent fields and chance: right, or refused, or says how uncertain it is."""

from pathlib import Path

import numpy as np
import pytest
from astropy.table import Table
from hypothesis import given, settings
from hypothesis import strategies as st

from gpudia.backend import to_host
from gpudia.config import RunConfig
from gpudia.errors import InputError, RegistrationError
from gpudia.images import FrameLayout, Region, Registration, make_frame, register
from gpudia.images.mapfits import consensus
from gpudia.layers import wcs_of_image
from gpudia.pipeline.prepare import place_batch, prepare

BENCH = Path(__file__).resolve().parents[1] / "bench"
AREA = Region(0, 0, (1000, 1000))
CORNERS = AREA.corners


@pytest.fixture
def lists(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import star_lists

    return star_lists


def turned(angle, shift=(31.4, -17.2), scale=1.0, mirror=1):
    c, s = scale * np.cos(np.radians(angle)), scale * np.sin(np.radians(angle))
    return np.column_stack([np.array([[c, -s], [s, c]]) @ np.diag([mirror, 1]), shift])


def star_table(xy, flux, error):
    columns = {"x": xy[:, 0], "y": xy[:, 1], "flux": flux, "x_err": np.full(len(xy), error)}
    return Table({**columns, "y_err": columns["x_err"]}, meta={"ids": "running"})


def two_lists(function, n=120, error=0.03, seed=0):
    """The same stars as the reference and the image (through `function`) see them."""
    rng = np.random.default_rng(seed)
    sky, flux = rng.uniform(0, 1000, (n, 2)), 10 ** rng.uniform(3, 5, n)
    measured = (xy + rng.normal(0, error, (n, 2)) for xy in (sky, function(sky)))
    return [star_table(xy, flux, error) for xy in measured]


def straight(matrix):
    return lambda xy: xy @ matrix[:, :2].T + matrix[:, 2]


def bent(size, degree=2):
    """A rotation, and a displacement that grows to `size` px at the corners as the power `degree`."""
    def there(xy):
        u = (np.asarray(xy, float) - 500) / 500
        swing = np.stack([u[..., 0] ** degree, u[..., 0] * u[..., 1] ** (degree - 1)], axis=-1)
        return straight(turned(3.0))(np.asarray(xy, float)) + size / np.sqrt(2) * swing

    return there


def off(found, function, area=AREA):
    """Largest distance from the truth over an area."""
    x, y = (np.linspace(area.corners[0][k], area.corners[2][k], 11) for k in (0, 1))
    points = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    return np.hypot(*(found.apply(points) - function(points)).T).max()


class TestRandomCases:
    def test_never_silently_wrong(self, lists):
        """The bench runs 1000 of them. Two thirds share enough stars with little enough noise to be registered."""
        outcomes = [lists.judge(lists.random_case(seed)) for seed in range(200)]
        wrong = [seed for seed, outcome in enumerate(outcomes) if outcome.verdict == "wrong"]
        assert wrong == []
        assert sum(o.verdict == "good" for o in outcomes) > 100
        assert all(o.reason for o in outcomes if o.verdict == "refused")

    def test_a_cluster_is_not_chance_agreement(self):
        """Half of the stars within 30 px: laid on each other they pair many."""
        rng = np.random.default_rng(3)
        a, b = (star_table(np.concatenate([rng.normal(500, 30, (80, 2)), rng.uniform(0, 1000, (80, 2))]),
                           10 ** rng.uniform(3, 5, 160), 0.05) for _ in range(2))
        with pytest.raises(RegistrationError, match="no trustworthy match"):
            register(a, b)

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(angle=st.floats(-180, 180), mirror=st.sampled_from([-1, 1]), scale=st.floats(0.5, 2),
           dx=st.floats(-200, 200), dy=st.floats(-200, 200), wcs=st.booleans())
    def test_any_similarity_comes_back(self, angle, mirror, scale, dx, dy, wcs):
        matrix = turned(angle, (dx, dy), scale, mirror)
        a, b = two_lists(straight(matrix), n=60)
        found = register(a, b)
        # Corners are sqrt(3) spreads away along each axis: (1 + 3) / n of a pair's variance, per axis.
        error = 0.03 * np.hypot(1, scale) * np.sqrt(4 / 60)
        assert off(found, straight(matrix)) < 5 * np.sqrt(2) * error
        assert found.n_matched >= 55

    def test_the_stated_uncertainty_is_the_scatter(self):
        """Over many noise drawings, (error at the worst corner / stated)^2 is exponential: two equal normal axes."""
        ratio = []
        for seed in range(60):
            a, b = two_lists(straight(turned(7.0)), n=25, seed=seed)
            found = register(a, b)
            far = Region(2000, 500, (1, 1))  # outside the stars, where the rotation's error counts most
            ratio.append(off(found, straight(turned(7.0)), far) / found.uncertainty(far))
        mean = np.mean(np.square(ratio))  # 1, or 0.82 by the 0.02 px that are added to the errors
        assert 0.82 - 4 / np.sqrt(60) < mean < 1 + 4 / np.sqrt(60)


    def test_lists_without_errors_are_judged_by_their_residuals(self):
        a, b = two_lists(straight(turned(7.0)), n=100, error=0.01)
        known = register(a, b).uncertainty(AREA)
        for table in (a, b):
            table.remove_columns(["x_err", "y_err"])
        # the errors stated are sqrt(2 * 0.01^2 + 0.02^2) = 0.024 px, the residuals are 0.014 px
        assert register(a, b).uncertainty(AREA) == pytest.approx(known * 0.0141 / 0.0245, rel=4 / np.sqrt(2 * 200))


class TestBadCatalogs:
    def ids(self, wrong, seed=1):
        a, b = two_lists(straight(turned(40.0)), n=100)
        rng = np.random.default_rng(seed)
        ids = np.arange(100) + 7000
        a["id"], b["id"] = ids, ids.copy()
        a.meta["ids"] = b.meta["ids"] = "catalog"
        bad = rng.permutation(100)[: round(100 * wrong)]
        b["id"][bad] = np.roll(b["id"][bad], 1)
        return a, b[rng.permutation(100)]

    @pytest.mark.parametrize("wrong", [0.0, 0.5, 0.7])
    def test_wrong_ids(self, wrong):
        found = register(*self.ids(wrong))
        assert found.route == "id"
        assert found.n_matched >= 95  # the nearest star is found whatever its id says
        assert off(found, straight(turned(40.0))) < 0.06

    def test_all_ids_wrong_goes_on_with_the_pattern(self):
        found = register(*self.ids(1.0))
        assert found.route == "pattern"
        assert off(found, straight(turned(40.0))) < 0.06

    def test_repeated_ids_are_not_used(self):
        a, b = self.ids(0.0)
        a["id"][:30] = a["id"][0]
        b["id"][:50] = b["id"][3]
        found = register(a, b)
        assert found.route == "id"
        assert off(found, straight(turned(40.0))) < 0.06
        a["id"][:] = 5
        assert register(a, b).route == "pattern"

    @pytest.mark.parametrize("which", ["positions", "entries"])
    def test_half_of_a_list_is_wrong(self, which):
        a, b = self.ids(0.0)
        rng = np.random.default_rng(5)
        spoiled = rng.permutation(100)[:50]
        if which == "positions":
            b["x"][spoiled], b["y"][spoiled] = rng.uniform(-500, 1000, (2, 50))
            b["x"][spoiled[:3]] = 1e6, -1e6, np.nan
        else:
            b["id"][spoiled] += 10**6
            for name in ("x", "y"):
                b[name][spoiled] = rng.uniform(b[name].min(), b[name].max(), 50)
        for meta in ("catalog", "running"):  # by ids, and without any
            b.meta["ids"] = meta
            found = register(a, b)
            assert found.n_matched >= 45
            assert off(found, straight(turned(40.0))) < 0.08

    @pytest.mark.parametrize("state", ["right", "off by 30 arcsec", "missing", "upside down"])
    def test_whatever_the_wcs_of_the_image_says(self, lists, state):
        matrix = turned(30.0, scale=0.5)
        a, b = two_lists(straight(matrix))
        wcs = None if state == "missing" else lists.tan_wcs(matrix)
        if state == "off by 30 arcsec":
            wcs.wcs.crval = wcs.wcs.crval + np.array([21, -21]) / 3600
        if state == "upside down":
            wcs.wcs.cd = -wcs.wcs.cd
        found = register(a, b, lists.tan_wcs(np.eye(2, 3)), wcs)
        assert found.route == ("sky" if state in ("right", "off by 30 arcsec") else "pattern")
        assert off(found, straight(matrix)) < 0.04

    def test_sky_positions_that_are_missing_or_impossible(self, lists):
        a, b = two_lists(straight(turned(30.0)))
        for table, m in ((a, np.eye(2, 3)), (b, turned(30.0))):
            table["ra"], table["dec"] = lists.tan_wcs(m).pixel_to_world_values(table["x"], table["y"])
        b["ra"][:20], b["dec"][20:40] = np.nan, 400.0
        found = register(a, b)
        assert (found.route, found.n_matched) == ("sky", pytest.approx(120, abs=3))
        b["ra"] = np.nan
        assert register(a, b).route == "pattern"

    def test_positions_in_one_place(self):
        one = star_table(np.full((5, 2), 7.0), np.ones(5), 0.1)
        with pytest.raises(RegistrationError):
            register(one, one)


class TestConsensus:
    def test_a_fifth_of_the_pairs(self):
        rng = np.random.default_rng(2)
        a, b = rng.uniform(0, 1000, (2, 400, 2))
        b[:80] = straight(turned(100.0, mirror=-1))(a[:80])
        agree = consensus(a, b)
        assert agree[:80].all()
        assert agree.sum() < 85

    def test_too_few_agree(self):
        rng = np.random.default_rng(2)
        with pytest.raises(RegistrationError, match="matched stars must be at least 3, got 2 that agree"):
            consensus(*rng.uniform(0, 1000, (2, 4, 2)))


class TestDeterminism:
    @pytest.mark.parametrize("route", ["id", "sky", "offset", "pattern"])
    def test_the_same_bits_from_call_to_call(self, lists, route):
        matrix = turned(0.02)
        a, b = two_lists(bent(1.0) if route == "pattern" else straight(matrix))
        for table in (a, b):
            table["id"], table.meta["ids"] = np.arange(120), "catalog"
        state = np.random.get_state()[1].copy()  # noqa: NPY002 - the caller's own
        made = [register(a, b, lists.tan_wcs(np.eye(2, 3)), lists.tan_wcs(matrix), routes=(route,)) for _ in range(20)]
        assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002
        for name in ("matrix", "terms", "covariance"):
            assert len({getattr(found, name).tobytes() for found in made}) == 1
        assert len({(found.rms, found.n_matched) for found in made}) == 1

    def test_it_does_not_matter_where_the_rounds_began(self):
        """Every route ends at the same pairs, hence at the same fit to the last bit."""
        a, b = two_lists(straight(turned(0.02)))
        one, other = (register(a, b, routes=(route,)) for route in ("offset", "pattern"))
        np.testing.assert_array_equal(one.matrix, other.matrix)
        assert one.rms == other.rms


class TestPolynomials:
    @pytest.mark.parametrize(("size", "degree"), [(1.0, 2), (3.0, 2), (1.5, 3)])
    def test_a_bent_field(self, size, degree):
        there = bent(size, degree)
        a, b = two_lists(there, n=200)
        found = register(a, b)
        assert (found.kind, found.degree) == ("polynomial", degree)
        assert found.n_matched >= 190
        # k terms per axis: the mean variance of a fit is k / n of a pair's, at a corner of a cubic ten times that.
        error = np.hypot(0.03, 0.03) * np.sqrt(2 * {2: 6, 3: 10}[degree] / 200 * 10)
        assert off(found, there) < 3 * error
        assert found.rms < 1.3 * np.hypot(0.03, 0.03) * np.sqrt(2)
        back = found.to_reference(found.apply(CORNERS))
        np.testing.assert_allclose(back, CORNERS, atol=1e-8)

    def test_a_straight_field_stays_straight(self):
        kinds = {register(*two_lists(straight(turned(3.0)), n=200, seed=seed)).kind for seed in range(30)}
        assert kinds <= {"similarity", "affine"}

    def test_a_bend_below_the_noise_or_few_stars_do_not_ask_for_one(self):
        assert register(*two_lists(bent(0.01))).kind != "polynomial"
        assert register(*two_lists(bent(0.6), n=25)).kind != "polynomial"

    def test_shape_rule(self):
        with pytest.raises(InputError, match=r"terms \(2, 0\), \(2, 3\) or \(2, 7\), got \(2, 3\) and \(2, 4\)"):
            Registration(np.eye(2, 3), terms=np.zeros((2, 4)))

    def test_local_map_and_coefficients(self):
        terms = np.array([[2e-6, 0, 0], [0, 0, -1e-6]])
        found = Registration(turned(2.0), terms=terms, origin=np.array([500.0, 500.0]))
        region = Region(700, 100, (201, 201))
        matrix, deviation = found.local(region)
        # x^2 over +-100 px departs from its best straight line by half its span on either side
        span = 2e-6 * 100**2 * np.hypot(1, 0.5)
        assert 0.5 * span < deviation < 0.8 * span
        assert off(found, straight(matrix), region) <= deviation * (1 + 1e-9)
        xy = np.array([[0.0, 0.0], [200.0, 13.0]])
        x, y = xy.T
        values = np.stack([x, y, 1 + 0 * x, x**2, x * y, y**2])
        np.testing.assert_allclose((found.coefficients(region) @ values).T, found.apply(region.to_frame(xy)), atol=1e-8)
        plain = Registration(turned(2.0))
        assert plain.local(region)[1] == 0
        np.testing.assert_allclose(plain.coefficients(region) @ [0, 0, 1], plain.apply(region.origin), atol=1e-9)

    def test_the_wcs_of_a_bent_image_is_the_nearest_straight_one(self, lists):
        terms = np.array([[2e-6, 0, 0], [0, 0, -1e-6]])
        found = Registration(turned(2.0), terms=terms, origin=np.array([500.0, 500.0]))
        wcs = lists.tan_wcs(np.eye(2, 3))
        xy = np.random.default_rng(0).uniform(100, 900, (50, 2))
        there = np.column_stack(wcs_of_image(wcs, found, (1000, 1000)).world_to_pixel_values(
            *wcs.pixel_to_world_values(*xy.T)))
        apart = np.hypot(*(there - found.apply(xy)).T)
        assert apart.max() < found.local(Region(-60, -60, (1100, 1100)))[1]

    @pytest.mark.parametrize(("size", "terms"), [(0.02, 3), (2.0, 6)])
    def test_the_pipeline_takes_the_affine_map_where_it_does(self, size, terms, backend):
        """Stars of a bent frame come to lie where the reference has them."""
        there = bent(size)
        curve = size / np.sqrt(2) / 500**2
        registration = Registration(turned(3.0), terms=curve * np.array([[1.0, 0, 0], [0, 1, 0]]),
                                    origin=np.array([500.0, 500.0]))
        np.testing.assert_allclose(registration.apply(CORNERS), there(CORNERS), atol=1e-9)
        region = Region(600, 600, (301, 301))
        stars = np.random.default_rng(4).uniform(620, 880, (15, 2))
        yy, xx = np.mgrid[:1000, :1000]
        data = 100 + sum(5000 * np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / 8) for x, y in there(stars))
        data += np.random.default_rng(5).normal(0, 0.1, data.shape)  # what the gain says of the sky
        frame = make_frame(data, layout=FrameLayout(gain=1e4, read_noise=1.0, saturation=1e6))
        prepared = prepare(frame, registration, region, RunConfig(frames=("x",), output="y"))
        assert prepared.matrix.shape == (2, terms)
        placed = place_batch([prepared], region.shape, backend)
        made = to_host(placed.data)[0]
        yy, xx = np.mgrid[600:901, 600:901]
        want = 100 + sum(5000 * np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / 8) for x, y in stars)
        good = np.asarray(placed.bits[0]) == 0
        # 1 % of Lanczos-3, and as much of the areas, 3 * curve * 400 px; where the affine map is taken also 0.05 px of
        # the steepest slope, exp(-1/2) / 2 of the peak per px.
        allowed = 5000 * (0.02 + (0.05 * 0.3 if terms == 3 else 0))
        assert np.abs(made - want)[good].max() < allowed
