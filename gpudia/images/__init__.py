"""Host side: frames, catalogs, registration, cutouts, series and files. No array here is on a device."""

from gpudia.images.altering import copy_with_light
from gpudia.images.catalogs import FrameQuality, catalog_of, detect_stars, frame_quality
from gpudia.images.cutouts import Region, cut, region_around, whole_frame
from gpudia.images.defects import flag_defects, flag_lacosmic, sharp_pixels, sharp_residuals
from gpudia.images.frames import Frame, frame_from_nddata, make_frame
from gpudia.images.headers import FrameLayout
from gpudia.images.image_files import write_images
from gpudia.images.matching import match_stars
from gpudia.images.noise import estimate_variance, sky_and_noise
from gpudia.images.reading import read_frame
from gpudia.images.registration import register
from gpudia.images.series import check_mixture, check_series, flux_noise, rank_references
from gpudia.images.transforms import Registration, identity_registration
from gpudia.images.writing import remove_unfinished, write_atomically, write_hdus, write_table
from gpudia.times import barycentric_times, site_of

__all__ = [
    "Frame",
    "FrameLayout",
    "FrameQuality",
    "Region",
    "Registration",
    "barycentric_times",
    "catalog_of",
    "check_mixture",
    "check_series",
    "copy_with_light",
    "cut",
    "detect_stars",
    "estimate_variance",
    "flag_defects",
    "flag_lacosmic",
    "flux_noise",
    "frame_from_nddata",
    "frame_quality",
    "identity_registration",
    "make_frame",
    "match_stars",
    "rank_references",
    "read_frame",
    "region_around",
    "register",
    "remove_unfinished",
    "sharp_pixels",
    "sharp_residuals",
    "site_of",
    "sky_and_noise",
    "whole_frame",
    "write_atomically",
    "write_hdus",
    "write_images",
    "write_table",
]
