"""Resampling: exact on pixel centres, right between them, masks and variances carried."""

import sys

import numpy as np
import pytest
from scipy import ndimage

from gpudia.backend import to_device, to_host
from gpudia.errors import InputError
from gpudia.model import resample
from gpudia.model.planes import smooth

QUARTER_TURNS = {  # output (x, y) -> input (x, y) for a 40 x 50 output
    "identity": ([[1, 0, 0], [0, 1, 0]], lambda a: a),
    "shift": ([[1, 0, 3], [0, 1, -2]], lambda a: np.roll(a, (2, -3), (0, 1))),
    "turn": ([[0, 1, 0], [-1, 0, 39]], lambda a: np.rot90(a, -1)),
    "mirror": ([[-1, 0, 49], [0, 1, 0]], lambda a: a[:, ::-1]),
}


def on_device(backend, image, matrix, shape, variance=None, mask=None, kind=float):
    image = np.asarray(image, kind)
    variance = np.ones(image.shape) if variance is None else variance
    mask = np.zeros(image.shape, bool) if mask is None else mask
    placed = (to_device(plane[None], backend) for plane in (image, variance, mask))
    result = resample(*placed, np.array([matrix], float), shape)
    return [to_host(v)[0] for v in (result.data, result.variance, result.mask, result.source_variance)]


@pytest.mark.parametrize("name", QUARTER_TURNS)
def test_maps_onto_pixel_centres_are_exact(backend, name):
    matrix, oracle = QUARTER_TURNS[name]
    shape = (50, 40) if name == "turn" else (40, 50)
    image = np.random.default_rng(1).normal(size=(40, 50))
    data, variance, mask, source = on_device(backend, image, matrix, shape)
    good = ~mask
    np.testing.assert_array_equal(data[good], oracle(image)[good])
    np.testing.assert_array_equal(variance[good], 1.0)
    np.testing.assert_array_equal(source[good], 1.0)
    assert mask.sum() == {"shift": 40 * 3 + 50 * 2 - 6}.get(name, 0)


def test_a_rotated_field_has_its_stars_and_flux(backend):
    """Against the same stars drawn at the rotated positions; Lanczos-3 passes such stars (FWHM 4 px) to 1 %."""
    angle, shape = np.deg2rad(7.0), (90, 90)
    c, s = np.cos(angle), np.sin(angle)
    centre = np.array([44.5, 44.5])
    turn = np.array([[c, -s], [s, c]])
    rng = np.random.default_rng(2)
    stars = centre + rng.uniform(-25, 25, (12, 2))
    yy, xx = np.mgrid[:90, :90]

    def draw(positions):
        return sum(np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / 2 / 1.7**2) for x, y in positions)

    matrix = np.column_stack([turn, centre - turn @ centre])
    data, *_ = on_device(backend, draw((stars - centre) @ turn.T + centre), matrix, shape)
    np.testing.assert_allclose(data[10:-10, 10:-10], draw(stars)[10:-10, 10:-10], atol=1e-2)


@pytest.mark.parametrize("count", [6, 10])
def test_a_bent_field_has_its_stars_where_the_polynomial_puts_them(backend, count):
    """Stars drawn on the input where the map takes their output positions: found there, with the area's flux."""
    matrix = np.zeros((2, count))
    matrix[:, :3] = [[0.99, 0.02, 3.0], [-0.02, 1.01, 2.0]]
    matrix[:, 3:6] = [[4e-4, -3e-4, 2e-4], [-2e-4, 5e-4, 3e-4]]
    matrix[:, 6:] = 2e-6

    def mapped(x, y):
        values = [x, y, 1 + 0 * x, x**2, x * y, y**2, x**3, x**2 * y, x * y**2, y**3][:count]
        return np.tensordot(matrix, np.stack(values), axes=1)

    stars = mapped(*np.random.default_rng(3).uniform(15, 75, (2, 8))).T

    def draw(x, y):
        return sum(np.exp(-((x - a) ** 2 + (y - b) ** 2) / 2 / 1.7**2) for a, b in stars)

    yy, xx = np.mgrid[:110, :110]
    data, _, mask, _ = on_device(backend, draw(xx, yy), matrix, (90, 90))
    # oracle: the input's formula at mapped positions, times the area by finite differences
    y, x = np.mgrid[:90, :90].astype(float)
    (a, c), (b, d) = mapped(x + 0.5, y) - mapped(x - 0.5, y), mapped(x, y + 0.5) - mapped(x, y - 0.5)
    good = ~mask
    assert good.mean() > 0.9
    # Lanczos-3 passes such stars to 1 %
    np.testing.assert_allclose(data[good], ((a * d - b * c) * draw(*mapped(x, y)))[good], atol=1e-2)


def test_flux_is_conserved_under_a_change_of_scale(backend):
    yy, xx = np.mgrid[:80, :80]
    image = np.exp(-((xx - 37.3) ** 2 + (yy - 42.1) ** 2) / 2 / 2.0**2)
    matrix = [[0.8, 0, 8.0], [0, 0.8, 8.0]]
    data, *_ = on_device(backend, image, matrix, (80, 80))
    assert data.sum() == pytest.approx(image.sum(), rel=1e-3)


def test_variance_is_that_of_the_pixels_and_of_sums(backend):
    rng = np.random.default_rng(4)
    matrix, shape = [[1, 0, 0.5], [0, 1, 0.37]], (60, 60)
    nine = np.full((70, 70), 9.0)
    draws = [on_device(backend, 3 * rng.normal(size=(70, 70)), matrix, shape, nine) for _ in range(30)]
    data = np.array([d[0][5:55, 5:55] for d in draws])
    _, variance, _, source = draws[0]
    # 75,000 pixels, correlated over about 2 px: the variance is known to about 1 %
    assert data.var() == pytest.approx(variance[5:55, 5:55].mean(), rel=0.03)
    sums = data.reshape(30, 5, 10, 5, 10).sum(axis=(2, 4))
    assert sums.var() == pytest.approx(100 * source[5:55, 5:55].mean(), rel=4 * np.sqrt(2 / sums.size))


def test_holes_spoil_their_neighbours_only(backend):
    image, mask = np.full((40, 40), 7.0), np.zeros((40, 40), bool)
    mask[20, 20] = True
    image[20, 20] = np.nan
    data, _, out, _ = on_device(backend, image, [[1, 0, 0.5], [0, 1, 0.5]], (40, 40), mask=mask)
    np.testing.assert_allclose(data[~out], 7.0, rtol=1e-12)
    assert np.isfinite(data[17:23, 17:23]).all()
    assert out[19, 19]
    assert out[17:23, 17:23].sum() < 30
    assert not out[10:15, 10:15].any()


def test_holes_take_the_binomial_mean_of_the_good_pixels_around_them(backend):
    rng = np.random.default_rng(6)
    planes, good = rng.normal(100, 5, (2, 20, 31)), rng.random((2, 20, 31)) < 0.6
    good[1, :9, :9] = False
    found = to_host(smooth(to_device(planes, backend), to_device(good, backend)))
    weights = np.array([1, 4, 6, 4, 1.0])[:, None] * [1, 4, 6, 4, 1.0]
    total, weight = (ndimage.correlate(p, weights[None], mode="constant")
                     for p in (np.where(good, planes, 0), good.astype(float)))
    np.testing.assert_allclose(found[weight > 0], (total / np.where(weight > 0, weight, 1))[weight > 0], rtol=1e-12)
    assert (weight == 0).sum() >= 49  # these stay as they are
    np.testing.assert_array_equal(found[weight == 0], planes[weight == 0])


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_whole_planes_and_single_pixels_give_the_same(backend, monkeypatch, kind):
    """A map that is nearly a shift, done either way; bits of either kind of bad pixel go where their pixels go."""
    rng = np.random.default_rng(5)
    image, variance = rng.normal(1000, 30, (64, 70)).astype(kind), rng.uniform(800, 900, (64, 70)).astype(kind)
    bits = np.where(rng.random((64, 70)) < 0.02, rng.integers(1, 8, (64, 70)), 0).astype(np.uint8)
    matrix = [[1.001, -0.003, 6.3], [0.003, 0.999, 4.8]]
    module = sys.modules["gpudia.model.resample"]
    planes = on_device(backend, image, matrix, (50, 55), variance, bits, kind)
    monkeypatch.setattr(module, "_MOST_SPREAD", -1.0)
    pixels = on_device(backend, image, matrix, (50, 55), variance, bits, kind)
    good = planes[2] == 0
    assert 0.3 < good.mean() < 1
    np.testing.assert_array_equal(planes[2], pixels[2])
    for one, other in zip(planes, pixels, strict=True):
        np.testing.assert_allclose(one[good], other[good], rtol=40 * np.finfo(kind).eps)
    for bit in (1, 2, 4):  # the bits are those that a mask of that bit alone has
        alone = on_device(backend, image, matrix, (50, 55), variance, (bits & bit) != 0, kind)[2]
        np.testing.assert_array_equal((planes[2] & bit) != 0, alone)


def test_a_wrong_shape_of_matrices_is_named():
    image = np.zeros((1, 9, 9))
    with pytest.raises(InputError, match=r"matrices must be finite and of shape \(1, 2, 3, 6 or 10\), got \(2, 3\)"):
        resample(image, image, image > 0, np.zeros((2, 3)), (9, 9))
