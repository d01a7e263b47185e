"""Simulated crowded fields with truth: for the demo, for tests, for measurements.

`simulate_field` makes a series of frames that is as hard as the sky; `SimulationSettings` has a number for every
effect, and each can be switched off; `write_series` writes it as files of the LCO layout.
"""

from gpudia.simulate.disk import write_series
from gpudia.simulate.field import SimulatedFrame, SimulatedSeries, simulate_field
from gpudia.simulate.psf import MoffatField, add_stars
from gpudia.simulate.settings import VARIABLE_KINDS, SimulationSettings
from gpudia.simulate.sky import magnification

__all__ = [
    "VARIABLE_KINDS",
    "MoffatField",
    "SimulatedFrame",
    "SimulatedSeries",
    "SimulationSettings",
    "add_stars",
    "magnification",
    "simulate_field",
    "write_series",
]
