"""The settings of a run: rules, messages, TOML round trip, expansion of frames."""

import dataclasses
import tomllib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpudia.config import LayoutNames, RunConfig
from gpudia.errors import ConfigError
from gpudia.images import FrameLayout
from gpudia.pipeline.listing import expand_frames


def make(**changes):
    return RunConfig.from_mapping({"frames": "night/*.fits", "output": "out", "backend": "auto"} | changes)


# ---------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(("key", "value", "rule"), [
    ("frames", [], "one or several texts"),
    ("frames", [3], "one or several texts"),
    ("frames", (f for f in ["a.fits"]), "one or several texts"),
    ("output", "", "a text that is not empty"),
    ("output", 3, "a text that is not empty"),
    ("size", 15, "an integer of at least 16"),
    ("size", 250.0, "an integer"),
    ("size", True, "an integer"),
    ("kernel_size", 16, "'auto' or an odd integer of at least 3"),
    ("kernel_size", 1, "'auto' or an odd integer of at least 3"),
    ("kernel_size", "17", "'auto' or an odd integer of at least 3"),
    ("kernel_support", "disc", "one of circle, square"),
    ("spatial_degree", 4, "an integer from 0 to 3"),
    ("spatial_degree", -1, "an integer from 0 to 3"),
    ("background_degree", 6, "an integer from 0 to 5"),
    ("passes", 0, "an integer from 1 to 20"),
    ("clip", 0, "a number of sigma, above 0"),
    ("clip", float("nan"), "a number of sigma, above 0"),
    ("max_rms", float("inf"), "a number of pixels, above 0"),
    ("min_matches", 2, "an integer of at least 3"),
    ("solver", "cg", "one of auto, direct, iterative"),
    ("resample", True, "one of auto, never, always"),
    ("aperture_radius", -3.0, "'auto' or a number of pixels, above 0"),
    ("noise", "both", "one of auto, header, data"),
    ("gain", 0.0, "a number of e-/ADU, above 0"),
    ("gain", "2.4", "a number of e-/ADU, above 0"),
    ("read_noise", -1, "a number of e-, not negative"),
    ("saturation", 10**400, "a number of ADU"),
    ("backend", "cuda", "one of auto, numpy, cupy"),
    ("batch_size", 0, "'auto' or an integer of at least 1"),
    ("align", "yes", "true or false"),
    ("products", 1, "true or false"),
    ("layout_names", "SCI", "a table of names"),
    ("select", [3], "texts that are not empty, or none"),
    ("select", [""], "texts that are not empty, or none"),
    ("select", "fwhm", "comparisons"),
    ("select", ["fwhm < 6", "seeing < 2"], "made of known columns, and seeing is none"),
    ("mixed", ["filter", "shape"], "some of filter, instrument"),
    ("mixed", 3, "some of filter, instrument"),
    ("site", [-70.8, -30.2], "longitude .degrees east., latitude .degrees. and height .m."),
    ("site", [-70.8, -91.0, 0], "longitude"),
    ("site", ["x", 0, 0], "longitude"),
    ("site", [0, 0, float("nan")], "longitude"),
])
def test_a_broken_rule_names_key_rule_and_value(key, value, rule):
    with pytest.raises(ConfigError, match=rf"^{key} must be .*{rule.replace('(', '.')}.*, got "):
        make(**{key: value})


def test_the_message_shows_the_value():
    with pytest.raises(ConfigError, match=r"^kernel_size must be 'auto' or an odd integer of at least 3, got 18$"):
        make(kernel_size=18)


def test_numpy_scalars_and_quantities_become_plain_numbers():
    from astropy.coordinates import Angle

    config = make(size=np.int16(99), clip=np.float32(4), ra=Angle("17h"), dec=np.float64(-29))
    assert [type(v) for v in (config.size, config.clip, config.ra, config.dec)] == [int, float, float, float]
    assert (config.size, config.clip, config.ra, config.dec) == (99, 4.0, pytest.approx(255.0, abs=1e-12), -29.0)


@pytest.mark.parametrize(("ra", "dec"), [
    (267.9175, -29.890555555555554), ("267.9175", "-29.890555555555554"), ("17:51:40.2", "-29:53:26"),
    ("17 51 40.2", "-29 53 26"), ("17h51m40.2s", "-29d53m26s"), ("267.9175d", "-29d53m26s"),
])
def test_every_way_to_write_a_position_means_the_same(ra, dec):
    config = make(ra=ra, dec=dec)
    assert config.ra == pytest.approx(267.9175, abs=1e-9)  # 4 microarcsec: rounding of sexagesimal arithmetic
    assert config.dec == pytest.approx(-(29 + 53 / 60 + 26 / 3600), abs=1e-9)


@pytest.mark.parametrize(("position", "message"), [
    ({"ra": 361, "dec": 0}, r"^ra must be 0 to 360 degrees.*got 361"),
    ({"ra": -1, "dec": 0}, r"^ra must be 0 to 360 degrees.*got -1"),
    ({"ra": 0, "dec": -90.1}, r"^dec must be -90 to 90 degrees.*got -90.1"),
    ({"ra": "17:61:00", "dec": 0}, r"^ra must be .* hours:minutes:seconds, got '17:61:00'"),
    ({"ra": "nan", "dec": 0}, r"^ra must be .*got 'nan'"),
    ({"ra": "M31", "dec": 0}, r"^ra must be .*got 'M31'"),
    ({"ra": True, "dec": 0}, r"^ra must be .*got True"),
    ({"ra": 10.0}, r"^dec must be given together with ra"),
    ({"dec": 10.0}, r"^ra must be given together with dec"),
])
def test_a_bad_position_is_refused(position, message):
    with pytest.raises(ConfigError, match=message):
        make(**position)


def test_a_region_must_hold_the_kernel_twice_where_there_is_a_region():
    with pytest.raises(ConfigError, match=r"^size must be at least twice kernel_size \(31\), got 61"):
        make(ra=1, dec=2, size=61, kernel_size=31)
    assert make(size=61, kernel_size=31).size == 61
    assert make(ra=1, dec=2, size=62, kernel_size=31).size == 62


def test_a_stack_has_two_frames_or_more():
    assert make(reference="stack").stack_size == "auto"
    with pytest.raises(ConfigError, match="stack_size must be 'auto' or an integer of at least 2, got 1"):
        make(stack_size=1)


def test_one_text_is_a_list_of_one_and_none_is_none():
    config = make(select="fwhm < 6", mixed="instrument", site=[-70, np.float32(-30), 2198])
    assert (config.select, config.mixed, config.site) == (("fwhm < 6",), ("instrument",), (-70.0, -30.0, 2198.0))
    assert make(mixed=["instrument", "filter"]) == make(mixed=["filter", "instrument", "filter"])
    assert (make(select=[]).select, make().mixed, make().site) == ((), (), None)


def test_resume_and_overwrite_exclude_each_other():
    with pytest.raises(ConfigError, match=r"^overwrite must be false when resume is true"):
        make(resume=True, overwrite=True)


@pytest.mark.parametrize(("value", "backend"), [("numpy", "numpy"), ("", "auto"), (None, "auto")])
def test_the_environment_gives_the_default_backend(monkeypatch, value, backend):
    monkeypatch.delenv("GPUDIA_BACKEND", raising=False)
    if value is not None:
        monkeypatch.setenv("GPUDIA_BACKEND", value)
    assert RunConfig("a.fits", "out").backend == backend
    assert RunConfig("a.fits", "out", backend="cupy").backend == "cupy"


@pytest.mark.parametrize(("given", "message"), [
    ({"kernelsize": 17}, r"^kernelsize must be the name of a setting.*did you mean kernel_size\?"),
    ({"spatial_degre": 1}, r"did you mean spatial_degree\?"),
    ({"qqq": 1}, r"^qqq must be the name of a setting.*known are frames, output"),
    ({"layout_names": {"gain_key": "GAIN"}}, r"^layout.gain_key .*did you mean layout.gain_keys\?"),
    ({"layout_names": {"image_hdu": ""}}, r"^layout.image_hdu must be one or several texts.*got ''"),
    ({"layout_names": {"mask_bits": ["saturate"]}}, r"^mask_bits must be names \(bad, saturated, .*got \['saturate'\]"),
    ({"frames": None}, r"^frames must be given"),
    ({"output": None}, r"^output must be given"),
])
def test_unknown_and_missing_names(given, message):
    with pytest.raises(ConfigError, match=message):
        make(**given)
    if "frames" not in given and "output" not in given:
        with pytest.raises(ConfigError, match=message):
            make().replace(**given)


def test_a_config_is_a_value():
    config = make()
    assert config == make()
    assert hash(config) == hash(make())
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign"):
        config.size = 3
    with pytest.raises(ConfigError, match=r"^size must be"):
        config.replace(size=3)
    assert config.replace(size=300) == make(size=300)


# --------------------------------------------------------------------------------------------------- layout


def test_layout_gives_the_reader_only_what_was_set():
    assert make().layout() == {}
    assert make(noise="header").layout() == {"noise": "header"}
    layout = make(gain=2.4, layout_names={"image_hdu": "DATA", "gain_keys": ["EGAIN", "GAIN"]}).layout()
    assert layout == {"image_hdu": ("DATA",), "gain_keys": ("EGAIN", "GAIN"), "gain": 2.4}
    assert FrameLayout(**layout) == FrameLayout(image_hdu=("DATA",), gain_keys=("EGAIN", "GAIN"), gain=2.4)


def test_every_name_that_can_be_set_is_one_that_the_reader_has():
    names = {f.name for f in dataclasses.fields(LayoutNames)} | {"gain", "read_noise", "saturation", "noise"}
    assert names == {f.name for f in dataclasses.fields(FrameLayout)}


# ----------------------------------------------------------------------------------------------------- TOML

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
numbers = st.floats(1e-6, 1e9)
auto = st.just("auto")
SETTINGS = {
    "size": st.integers(400, 9000),
    "reference": texts,
    "stack_size": st.one_of(st.just("auto"), st.integers(2, 50)),
    "resample": st.sampled_from(["auto", "never", "always"]),
    "kernel_size": auto | st.integers(1, 60).map(lambda n: 2 * n + 1),
    "spatial_degree": st.integers(0, 3),
    "background_degree": st.integers(0, 5),
    "clip": numbers | st.integers(1, 10),
    "aperture_radius": auto | numbers,
    "gain": st.none() | numbers,
    "select": st.lists(st.sampled_from(["fwhm < 6", "filter == 'rp'", 'name != "é"']), max_size=3),
    "mixed": st.sampled_from([[], ["filter"], "instrument", ["filter", "instrument"]]),
    "site": st.none() | st.tuples(st.floats(-180, 360), st.floats(-90, 90), st.floats(-100, 6000)),
    "read_noise": st.none() | st.just(0.0) | numbers,
    "batch_size": auto | st.integers(1, 500),
    "noise": st.sampled_from(["auto", "header", "data"]),
    "backend": st.sampled_from(["auto", "numpy", "cupy"]),
    "align": st.booleans(),
    "products": st.booleans(),
    "overwrite": st.booleans(),
    "layout_names": st.fixed_dictionaries({}, optional={
        "image_hdu": texts, "error_hdu": st.none(), "gain_keys": st.lists(texts, min_size=1, max_size=3),
        "mask_bits": st.lists(st.sampled_from(["bad", "saturated"]) | st.integers(1, 2**40), max_size=3)
        | st.dictionaries(st.sampled_from(["bad", "no_data"]), st.integers(1, 2**40))}),
}
positions = st.just({}) | st.fixed_dictionaries({"ra": st.floats(0, 360), "dec": st.floats(-90, 90)})


@given(st.lists(texts, min_size=1, max_size=3), texts, st.fixed_dictionaries({}, optional=SETTINGS), positions)
def test_toml_there_and_back_is_the_same(tmp_path_factory, frames, output, settings, position):
    config = RunConfig(frames, output, **settings, **position)
    path = tmp_path_factory.getbasetemp() / "there_and_back.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert RunConfig.from_toml(path) == config


def test_toml_has_no_line_for_what_is_not_set():
    table = tomllib.loads(make().to_toml())
    assert "ra" not in table
    assert "layout" not in table
    assert table["kernel_size"] == "auto"


def write(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_overrides_take_precedence_and_none_does_not(tmp_path):
    path = write(tmp_path, 'frames = ["a.fits"]\noutput = "out"\nsize = 300\nclip = 4\n[layout]\nimage_hdu = "DATA"\n')
    config = RunConfig.from_toml(path, size=400, clip=None)
    assert (config.frames, config.size, config.clip) == (("a.fits",), 400, 4.0)
    assert config.layout() == {"image_hdu": ("DATA",)}
    assert RunConfig.from_toml(path, frames=["b.fits"]).frames == ("b.fits",)


@pytest.mark.parametrize(("text", "message"), [
    ("size = ", r"^config must be valid TOML, got .*run.toml"),
    ('frames = "a"\noutput = "o"\nkernal_size = 3\n', r"did you mean kernel_size\?"),
    ('frames = "a"\noutput = "o"\n[layot]\nimage_hdu = "SCI"\n', r"^layot must .* did you mean layout\?"),
    ('frames = "a"\noutput = "o"\n[layout]\nimage = "SCI"\n', r"did you mean layout.image_hdu\?"),
    ('frames = "a"\noutput = "o"\nlayout = 3\n', r"^layout_names must be a table of names, got 3"),
    ('frames = "a"\n', r"^output must be given"),
    ('frames = "a"\noutput = "o"\nra = "x"\ndec = 1\n', r"^ra must be"),
])
def test_a_bad_file_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_toml(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"^config must be a readable file, got .*no.toml: No such file"):
        RunConfig.from_toml(tmp_path / "no.toml")
    with pytest.raises(ConfigError, match=r"^config must be a readable file"):
        RunConfig.from_toml(tmp_path)


# --------------------------------------------------------------------------------------------------- frames


@pytest.fixture
def night(tmp_path):
    names = ["b.fits", "a.FIT", "c.fits.fz", "d.fits.gz", "e.fts", "truth.ecsv", ".hidden.fits", "deep/f.fits"]
    (tmp_path / "deep").mkdir()
    (tmp_path / "folder.fits").mkdir()
    for name in names:
        (tmp_path / name).touch()
    return tmp_path


def names(paths, folder):
    return [p.relative_to(folder).as_posix() for p in paths]


def test_a_folder_stands_for_its_frames(night):
    assert names(expand_frames(night), night) == ["a.FIT", "b.fits", "c.fits.fz", "d.fits.gz", "e.fts"]


def test_patterns_stand_for_what_they_match(night):
    assert names(expand_frames(f"{night}/*.fits*"), night) == ["b.fits", "c.fits.fz", "d.fits.gz"]
    assert names(expand_frames([f"{night}/**/[bf].fits"]), night) == ["b.fits", "deep/f.fits"]


def test_sorted_and_each_once(night, monkeypatch):
    monkeypatch.chdir(night)
    assert names(map(night.joinpath, expand_frames(["e.fts", "./b.fits", "b.fits", str(night / "b.fits"), "*.fts"])),
                 night) == ["b.fits", "e.fts"]


def test_a_missing_file_stays_a_missing_pattern_is_reported(night, caplog):
    found = expand_frames([night / "b.fits", night / "lost.fits", f"{night}/x*.fits"])
    assert names(found, night) == ["b.fits", "lost.fits"]
    assert [r.getMessage() for r in caplog.records] == [f"frames: nothing matches '{night}/x*.fits'"]


def test_a_name_that_looks_like_a_pattern_is_a_name_where_there_is_such_a_file(tmp_path):
    (tmp_path / "m[1].fits").touch()
    assert expand_frames(tmp_path / "m[1].fits") == [tmp_path / "m[1].fits"]


def test_nothing_at_all_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"^frames must match at least one file, got '.*empty', '.*\*.fits'$"):
        expand_frames([tmp_path / "empty", f"{tmp_path}/*.fits"])
