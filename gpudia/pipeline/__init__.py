"""The job: from frames to difference images, light curves and a report."""

from gpudia.pipeline.demo import run_demo
from gpudia.pipeline.injection import Injection, inject
from gpudia.pipeline.job import run
from gpudia.pipeline.outputs import RunResult
from gpudia.pipeline.recovery import Recovery
from gpudia.pipeline.single import SubtractResult, subtract_files

__all__ = ["Injection", "Recovery", "RunResult", "SubtractResult", "inject", "run", "run_demo", "subtract_files"]
