"""What a report measures, the most important first. Nothing here imports torch, so that a page can be written without.

A group is a list of cases that one process runs one after the other, because they share models or inputs.
"""

from typing import NamedTuple

DROPS = (0.0, 0.6, 0.2, 0.4)
"""The two ends first: a line between them says most about the others."""
MODES = ("exact", "graph, capacity", "graph, budget", "graph, exact")
EAGER_MODES = ("eager, capacity", "eager, budget")
"""The same shapes without a graph: what the graph is worth."""
OPERATIONS = (
    "gated_add_modulated_layer_norm",
    "gather_tokens",
    "dechunk_spatial",
    "boundary_prob_predictability",
    "group_norm_silu",
    "select_tokens",
)
DIRECTIONS = ("forward", "forward+backward")
FORWARD_ONLY = ("select_tokens",)


class Group(NamedTuple):
    """Cases of one process."""

    name: str
    title: str
    cases: tuple[str, ...]
    """Without the name of the group."""
    share: float
    """The largest part of the time of a call that it may take before the others had their turn."""
    patience: float
    """Seconds after which a case that brings no result is killed, the making of models and compiling included."""


ALL = "all"
"""The one case of the group of tests, whose process finds them itself and writes a line for each."""


def forward_cases() -> tuple[str, ...]:
    first = [f"drop {rho:g}, {mode}" for rho in DROPS for mode in MODES]
    later = [f"drop {rho:g}, {mode}" for rho in DROPS for mode in EAGER_MODES]
    official = [f"drop {rho:g}, official" for rho in (0.0, 0.6)]
    return ("equal", "static", *first, *official, *later, "kernels of drop 0, exact", "kernels of static")


def training_cases() -> tuple[str, ...]:
    """Graphs come last: autograd of a plain step would meet the streams of their captures."""
    return ("equal", *(f"drop {rho:g}" for rho in DROPS), "equal, graphs", *(f"drop {rho:g}, graphs" for rho in DROPS))


GROUPS = (
    Group("tests", "Correctness", (ALL,), 0.35, 150),
    Group("ceilings", "What this device can do", ("copy", "product"), 1.0, 90),
    Group("forward, large batch", "One forward", forward_cases(), 0.6, 180),
    Group("forward, small batch", "One forward of one image", forward_cases(), 0.6, 180),
    Group(
        "operations",
        "Operations",
        tuple(
            f"{op}, {direction}"
            for direction in DIRECTIONS
            for op in OPERATIONS
            if direction == "forward" or op not in FORWARD_ONLY
        ),
        0.6,
        120,
    ),
    Group("training", "A training step", training_cases(), 1.0, 180),
)


def case_name(group: str, case: str) -> str:
    """How a line names a case."""
    return f"{group}: {case}"
