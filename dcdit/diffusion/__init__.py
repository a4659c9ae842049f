"""Objectives to train with and samplers to draw with, for any model of the form ``model(x, t, y)``."""

from dcdit.diffusion.drop_schedules import DropSchedule, parse_drop_schedule
from dcdit.diffusion.guidance import guided
from dcdit.diffusion.objectives import DiTObjective, FlowMatchingObjective
from dcdit.diffusion.samplers import Step
from dcdit.diffusion.sampling import METHODS, sample
from dcdit.diffusion.schedule import NoiseSchedule, linear_schedule, space_timesteps

__all__ = [
    "METHODS",
    "DiTObjective",
    "DropSchedule",
    "FlowMatchingObjective",
    "NoiseSchedule",
    "Step",
    "guided",
    "linear_schedule",
    "parse_drop_schedule",
    "sample",
    "space_timesteps",
]
