"""Which bits of a mask mean "do not use", and what those of another pipeline mean."""

import numpy as np
import pytest
from astropy.io import fits
from hypothesis import given
from hypothesis import strategies as st

from gpudia import RunConfig
from gpudia.errors import ConfigError
from gpudia.flags import FILE_FLAGS, PIXEL_FLAGS, mask_bits_of
from gpudia.images import FrameLayout, make_frame, read_frame

SHAPE = (40, 50)
NAMES = [f.name for f in FILE_FLAGS]
OWN = sum(f.value for f in FILE_FLAGS)


def mask_of(bits, chosen=None):
    """Mask of a frame whose pixels have these bits in the file, in their order; all others are good."""
    plane = np.zeros(SHAPE, np.asarray(bits).dtype)
    plane.flat[:len(bits)] = bits
    data = np.random.default_rng(2).normal(0, 5, SHAPE)
    frame = make_frame(data, bits=plane, header=fits.Header({"GAIN": 1.0}), layout=FrameLayout(mask_bits=chosen))
    assert not frame.mask.flat[len(bits):].any()
    return frame.mask.flat[:len(bits)].tolist()


class TestChoice:
    def test_every_bit_counts_unless_one_chooses(self):
        bits = np.array([0, 1, 2, 4, 8, 16, 3, 32, 64, 128, 256, 1 << 20, 1 + 64])
        # The upper bits mean what is found here (a clipped pixel is still measured): in a file they are just bad.
        assert mask_of(bits) == [0, 1, 2, 4, 8, 16, 3, 1, 1, 1, 1, 1, 1]

    @pytest.mark.parametrize("dtype", [np.uint8, ">i2", np.int32, np.uint64, np.float32])
    def test_by_name_and_by_value(self, dtype):
        bits = np.array([0, 1, 2, 3, 4, 8, 10, 64], dtype)
        for chosen in (["saturated", "bad"], ["saturated", 1], [3], 3, (("bad", 1), ("saturated", 2)),
                       {"bad": 1, "saturated": [2]}):
            assert mask_of(bits, chosen) == [0, 1, 2, 3, 0, 0, 2, 0]
        assert mask_of(bits, "saturated") == [0, 0, 2, 2, 0, 0, 2, 0]
        assert mask_of(bits, [64]) == [0, 0, 0, 0, 0, 0, 0, PIXEL_FLAGS.bad]
        assert mask_of(bits, []) == [0] * 8

    def test_the_bits_of_another_pipeline(self):
        bits = np.array([1, 2, 4, 16, 20, 1024], np.int16)
        chosen = {"saturated": 4, "bad": [1, 16], "cosmic_ray": 1024}
        assert mask_of(bits, chosen) == [1, 0, 2, 1, 3, 8]

    def test_a_mask_without_bits(self):
        for chosen in (None, ["saturated"], []):
            assert mask_of(np.array([True, False]), chosen) == [1, 0]
            assert mask_of(np.array([np.nan, 0.0, np.inf]), chosen) == [1, 0, 1]

    @given(st.integers(0, 2**62), st.dictionaries(st.sampled_from(NAMES), st.integers(1, 2**62), min_size=1))
    def test_a_flag_is_set_where_one_of_its_bits_is(self, value, chosen):
        (found,) = mask_of(np.array([value]), chosen)
        assert found == sum(getattr(FILE_FLAGS, name) for name, bits in chosen.items() if value & bits)

    @given(st.lists(st.sampled_from(NAMES) | st.integers(1, 2**62)) | st.integers(1, 2**62))
    def test_the_form_it_is_kept_in_means_the_same(self, chosen):
        kept = mask_bits_of(chosen)
        assert mask_bits_of(kept) == mask_bits_of(dict(kept)) == kept
        given_bits = [getattr(FILE_FLAGS, c) if isinstance(c, str) else c
                      for c in ([chosen] if isinstance(chosen, int) else chosen)]
        assert sum(value for _, value in kept) == np.bitwise_or.reduce([0, *given_bits])
        assert all(value & OWN & ~getattr(FILE_FLAGS, name) == 0 for name, value in kept)


@pytest.mark.parametrize("wrong", ["saturate", ["bad", "clipped"], 0, -1, [1.5], True, {"bad": "x"}, {"dead": 1},
                                   {"bad": [0]}, 1 << 63, 2.0, [["bad"]], {1: 1}])  # fmt: skip
def test_what_is_unknown_is_refused(wrong):
    rule = r"^mask_bits must be names \(bad, saturated, low_qe, cosmic_ray, no_data\) or positive integers, .*, got "
    with pytest.raises(ConfigError, match=rule):
        FrameLayout(mask_bits=wrong)
    with pytest.raises(ConfigError, match=rule):
        RunConfig("a.fits", "out", layout_names={"mask_bits": wrong})


@pytest.mark.parametrize(("lines", "expected"), [
    ('mask_bits = ["saturated", 16]', [0, 0, 2, 0, 16]),
    ("mask_bits = {saturated = 4, bad = [1, 16]}", [0, 1, 0, 2, 1]),
    ("[layout.mask_bits]\ncosmic_ray = 3", [0, 8, 8, 0, 0]),
])
def test_from_a_file_of_settings_to_a_frame(tmp_path, lines, expected):
    settings = tmp_path / "run.toml"
    settings.write_text(f'frames = "a.fits"\noutput = "out"\n[layout]\n{lines}\n')
    config = RunConfig.from_toml(settings)
    again = tmp_path / "again.toml"
    again.write_text(config.to_toml())
    assert RunConfig.from_toml(again) == config
    bits = np.zeros(SHAPE, np.uint8)
    bits[0, :5] = 0, 1, 2, 4, 16
    data = np.random.default_rng(2).normal(0, 5, SHAPE)
    fits.HDUList([fits.PrimaryHDU(data, fits.Header({"GAIN": 1.0})), fits.ImageHDU(bits, name="BPM")]).writeto(
        tmp_path / "a.fits")  # fmt: skip
    frame = read_frame(tmp_path / "a.fits", FrameLayout(**config.layout()))
    assert frame.mask[0, :5].tolist() == expected


def test_values_that_are_no_bits_count_as_bad():
    """Masks of floats: not finite, or beyond any integer."""
    data = np.random.default_rng(1).normal(100, 5, (20, 30)).astype(np.float32)
    mask = np.zeros(data.shape)
    mask[3, 4:8] = np.nan, np.inf, 1e30, -1e300
    found = make_frame(data, bits=mask, header=fits.Header({"GAIN": 2.0, "RDNOISE": 5.0})).mask
    assert (found[3, 4:8] == PIXEL_FLAGS.bad).all()
    assert (found != 0).sum() == 4
