"""Which frames are shifted, which resampled, which refused; and which of a series can be its reference."""

import numpy as np
import pytest
from astropy.wcs import WCS

from gpudia.config import RunConfig
from gpudia.errors import FrameError
from gpudia.flags import FRAME_FLAGS
from gpudia.images import FrameLayout, FrameQuality, Registration, make_frame, whole_frame
from gpudia.pipeline.looks import Look, Seen
from gpudia.pipeline.prepare import prepare
from gpudia.pipeline.registering import _of_one_grid

SHAPE = (201, 201)  # corners are 141 px from the centre


@pytest.fixture(scope="module")
def frame():
    data = np.random.default_rng(1).normal(500, 20, SHAPE)
    return make_frame(data, layout=FrameLayout(gain=1.25, read_noise=1.0, saturation=1e5))


def turned(degrees, scale=1.0):
    """A turn about the middle of the frame."""
    c, s = scale * np.cos(np.radians(degrees)), scale * np.sin(np.radians(degrees))
    turn, middle = np.array([[c, -s], [s, c]]), np.array([100.0, 100.0])
    return Registration(np.column_stack([turn, middle - turn @ middle]))


@pytest.mark.parametrize(("how", "degrees", "flag"), [
    ("auto", 0.2, 0), ("auto", 0.3, "resampled"), ("never", 0.2, 0), ("never", 0.3, "poor_registration"),
    ("always", 0.0, "resampled"), ("auto", 90.0, 0), ("auto", 7.0, "resampled")])
def test_what_a_shift_leaves_decides(frame, how, degrees, flag):
    """0.2 degrees move a corner by 0.49 px, 0.3 degrees by 0.74: a kernel of degree 1 absorbs 0.6."""
    config = RunConfig("-", "-", resample=how, spatial_degree=1, background_degree=1)
    found = prepare(frame, turned(degrees), whole_frame(SHAPE), config)
    known = FRAME_FLAGS.resampled | FRAME_FLAGS.poor_registration
    assert found.flags & known == (getattr(FRAME_FLAGS, flag) if flag else 0)
    assert found.interpolated == (flag == "resampled")


def test_a_frame_that_no_kernel_can_match_is_refused_unless_it_may_be_resampled(frame):
    config = RunConfig("-", "-", resample="never", spatial_degree=1, background_degree=1)
    with pytest.raises(FrameError, match=r"at most 3 px with resample 'never', got 17.3 px over the region"):
        prepare(frame, turned(7.0), whole_frame(SHAPE), config)


def test_binned_frames_cover_what_they_cover(frame):
    """A frame of 2 x 2 times larger pixels has a quarter of them in the region: all of it, and not 25 %."""
    config = RunConfig("-", "-", spatial_degree=1, background_degree=1)
    small = make_frame(frame.data[:60, :60], layout=FrameLayout(gain=1.25, read_noise=1.0, saturation=1e5))
    half = Registration(np.array([[0.5, 0, 0], [0, 0.5, 0]]))
    assert prepare(small, half, whole_frame((120, 120)), config).interpolated
    with pytest.raises(FrameError, match="at least 10 % of the region"):
        prepare(small, half, whole_frame((500, 500)), config)


def look(name, scale, fwhm):
    wcs = None
    if scale:
        wcs = WCS(naxis=2)
        wcs.wcs.ctype, wcs.wcs.cdelt = ["RA---TAN", "DEC--TAN"], [-scale / 3600, scale / 3600]
    return Look(path=name, name=name, seen=Seen(wcs=wcs), pixel_scale=scale or np.nan,
                quality=FrameQuality(fwhm, 0.0, 100, 500.0, 20.0, 0.0))


def test_a_binned_frame_is_no_reference_for_the_others():
    looks = [look("a", 0.4, 4.0), look("b", 0.4, 4.4), look("binned", 0.8, 2.1), look("c", 0.401, 4.2),
             look("blind", None, 3.0)]
    assert [one.name for one in _of_one_grid(looks)] == ["a", "b", "c"]
    assert len(_of_one_grid([look("blind", None, 3.0)])) == 1


def test_widths_are_those_on_the_reference():
    binned = look("binned", 0.8, 2.1)
    binned.registration = turned(30.0, 0.5)
    assert binned.fwhm == pytest.approx(4.2)
