"""Photometry of difference images: apertures, PSF fluxes, exact errors, light curves."""

from gpudia.photometry.apertures import aperture_correction, aperture_weights, choose_aperture_radius
from gpudia.photometry.calibration import ZeroPoint, fit_zero_point
from gpudia.photometry.crowded import CrowdedFluxes, crowded_photometry
from gpudia.photometry.detection import DETECTION_COLUMNS, KnownStars, associate, detect_peaks
from gpudia.photometry.empirical import empirical_psf
from gpudia.photometry.excess import excess_scatter
from gpudia.photometry.exports import export_all, export_star
from gpudia.photometry.forced import forced_photometry, measure_apertures, psf_photometry
from gpudia.photometry.joint import JointPosition, StarStamp, fit_position, fluxes_at
from gpudia.photometry.lightcurves import LightCurves, read_lightcurves, table_hdu
from gpudia.photometry.linear import EpochNoise, linear_flux_variance
from gpudia.photometry.model_error import model_error
from gpudia.photometry.neighbours import close_pairs, overlaps, separate
from gpudia.photometry.plain_variables import plainly_varying
from gpudia.photometry.psf import epoch_psf
from gpudia.photometry.psf_model import Psf, moffat_psf
from gpudia.photometry.scale import ConstantStarScale, constant_star_epsilon
from gpudia.photometry.series import (
    CombinedFluxes,
    Magnitudes,
    combine,
    describe_magnitudes,
    magnitudes,
    target_table,
)
from gpudia.photometry.stamps import ForcedFluxes, Stamps
from gpudia.photometry.table import aperture_photometry_table
from gpudia.photometry.tie import Tie, tie_references
from gpudia.photometry.variability import UNUSABLE, Variability, usable, variability, variability_score

__all__ = [
    "DETECTION_COLUMNS",
    "UNUSABLE",
    "CombinedFluxes",
    "ConstantStarScale",
    "CrowdedFluxes",
    "EpochNoise",
    "ForcedFluxes",
    "JointPosition",
    "KnownStars",
    "LightCurves",
    "Magnitudes",
    "Psf",
    "Stamps",
    "StarStamp",
    "Tie",
    "Variability",
    "ZeroPoint",
    "aperture_correction",
    "aperture_photometry_table",
    "aperture_weights",
    "associate",
    "choose_aperture_radius",
    "close_pairs",
    "combine",
    "constant_star_epsilon",
    "crowded_photometry",
    "describe_magnitudes",
    "detect_peaks",
    "empirical_psf",
    "epoch_psf",
    "excess_scatter",
    "export_all",
    "export_star",
    "fit_position",
    "fit_zero_point",
    "fluxes_at",
    "forced_photometry",
    "linear_flux_variance",
    "magnitudes",
    "measure_apertures",
    "model_error",
    "moffat_psf",
    "overlaps",
    "plainly_varying",
    "psf_photometry",
    "read_lightcurves",
    "separate",
    "table_hdu",
    "target_table",
    "tie_references",
    "usable",
    "variability",
    "variability_score",
]
