"""Difference image analysis photometry, on a GPU or without one."""

from importlib import import_module

__version__ = "0.1.0"

# Public name -> module that defines it. Loaded on first use, so that `import gpudia` stays light.
_HOME = {
    "DIAPhotometryAnalyst": "gpudia.analyst",
    "build_the_U_indexes": "gpudia.analyst",
    "build_the_U_matrix": "gpudia.analyst",
    "run_dia_photometry": "gpudia.analyst",
    "run_difference_image": "gpudia.analyst",
    "DifferenceStack": "gpudia.model",
    "ReferencePlan": "gpudia.model",
    "decorrelate": "gpudia.model",
    "score_image": "gpudia.model",
    "subtract": "gpudia.model",
    "backend_info": "gpudia.backend",
    "use_backend": "gpudia.backend",
    "LightCurves": "gpudia.photometry",
    "read_lightcurves": "gpudia.photometry",
    "tie_references": "gpudia.photometry",
    "RunConfig": "gpudia.config",
    "Injection": "gpudia.pipeline",
    "RunResult": "gpudia.pipeline",
    "inject": "gpudia.pipeline",
    "run": "gpudia.pipeline",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name):
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'gpudia' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
