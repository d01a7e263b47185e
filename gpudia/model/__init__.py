"""The numbers: arrays in, arrays out, on whichever backend they live. No FITS, no WCS, no transfers."""

from gpudia.model.choose import DegreeChoice, automatic_kernel_size, choose_degree, choose_support, missing_wings
from gpudia.model.coadd import Coadd, Coadded
from gpudia.model.correction import CovarianceCorrection
from gpudia.model.plan import ReferencePlan
from gpudia.model.polynomials import count_terms, evaluate_terms, exponents
from gpudia.model.resample import Resampled, resample
from gpudia.model.score import Decorrelated, Score, decorrelate, score_image
from gpudia.model.shared_covariance import EstimatedCovariance, SharedCovariance
from gpudia.model.stack import DifferenceStack
from gpudia.model.subtraction import subtract
from gpudia.model.support import check_kernel_size, kernel_support

__all__ = [
    "Coadd",
    "Coadded",
    "CovarianceCorrection",
    "Decorrelated",
    "DegreeChoice",
    "DifferenceStack",
    "EstimatedCovariance",
    "ReferencePlan",
    "Resampled",
    "Score",
    "SharedCovariance",
    "automatic_kernel_size",
    "check_kernel_size",
    "choose_degree",
    "choose_support",
    "count_terms",
    "decorrelate",
    "evaluate_terms",
    "exponents",
    "kernel_support",
    "missing_wings",
    "resample",
    "score_image",
    "subtract",
]
