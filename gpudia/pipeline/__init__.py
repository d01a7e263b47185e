"""The job: from frames to difference images, light curves and a report."""

from importlib import import_module

# Public name -> module that defines it. Loaded on first use: processes that read and solve start without matplotlib.
_HOME = {
    "Injection": "gpudia.pipeline.injection",
    "Recovery": "gpudia.pipeline.recovery",
    "RunResult": "gpudia.pipeline.outputs",
    "SubtractResult": "gpudia.pipeline.single",
    "inject": "gpudia.pipeline.injection",
    "run": "gpudia.pipeline.job",
    "run_demo": "gpudia.pipeline.demo",
    "subtract_files": "gpudia.pipeline.single",
}

__all__ = [*_HOME]


def __getattr__(name):
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'gpudia.pipeline' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
