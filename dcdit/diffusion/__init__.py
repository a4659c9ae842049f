"""Training objectives and samplers for any model that is called as ``model(x, t, y)``."""

from dcdit.diffusion.drop_schedules import DropSchedule, parse_drop_schedule
from dcdit.diffusion.graphed import SamplerGraphs
from dcdit.diffusion.guidance import guided
from dcdit.diffusion.objectives import (
    DiTObjective,
    FlowMatchingObjective,
    NoisyBatch,
    Objective,
    create_objective,
)
from dcdit.diffusion.samplers import Step
from dcdit.diffusion.sampling import METHODS, sample
from dcdit.diffusion.schedule import NoiseSchedule, linear_schedule, space_timesteps

__all__ = [
    "METHODS",
    "DiTObjective",
    "DropSchedule",
    "FlowMatchingObjective",
    "NoiseSchedule",
    "NoisyBatch",
    "Objective",
    "SamplerGraphs",
    "Step",
    "create_objective",
    "guided",
    "linear_schedule",
    "parse_drop_schedule",
    "sample",
    "space_timesteps",
]
