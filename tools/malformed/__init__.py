"""Malformed inputs of every reader, as a stranger or a broken disk may hand them over, and how commands take them.

Each is one function that makes the input in a folder and returns the command line that reads it; ``case.CASES`` lists
them all. ``tests/test_malformed.py`` runs them in its own process, ``tools/soak/malformed.py`` each in one of its own.
"""

from tools.malformed import checkpoints, configurations, evaluations, images, latents, options, runs, streams
from tools.malformed.base import Base
from tools.malformed.case import CASES, Case
from tools.malformed.damage import VICTIMS, damage
from tools.malformed.running import Outcome, problem, problem_of, run, run_command

MODULES = (checkpoints, configurations, evaluations, images, latents, options, runs, streams)
"""They fill ``CASES``."""

__all__ = [
    "CASES",
    "MODULES",
    "VICTIMS",
    "Base",
    "Case",
    "Outcome",
    "damage",
    "problem",
    "problem_of",
    "run",
    "run_command",
]
