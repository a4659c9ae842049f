"""Options and checks that several commands share."""

import argparse
import math
from collections.abc import Callable
from typing import Any

from dcdit.utils.text import short

MOST = 10_000_000
"""Images or steps that a command line may ask for: more would take all memory before anything is drawn."""
SEEDS = 1 << 63


def add_device_option(add: Callable[..., Any]) -> None:
    """Add ``--device``, which :func:`dcdit.utils.environment.resolve_device` reads."""
    add(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto (a GPU if there is one), cpu, cuda, or cuda:N for one GPU of several (default auto)",
    )


def seed(text: str) -> int:
    """The value of a ``--seed``, as argparse's ``type``."""
    number = int(text)
    if not 0 <= number < SEEDS:
        raise argparse.ArgumentTypeError(f"{short(number)}; accepted: 0 to {SEEDS - 1}")
    return number


def check_counts(args: argparse.Namespace, *names: str, most: int = MOST) -> None:
    """Raise ValueError if an option of these names is given and below 1 or above ``most``."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not 1 <= value <= most:
            accepted = "at least 1" if value < 1 else f"at most {most}"
            raise ValueError(f"--{name.replace('_', '-')} is {short(value)}; accepted: {accepted}")


def check_number(flag: str, value: float, at_most: float = math.inf) -> None:
    """Raise ValueError if the value of a flag is not finite, not above 0, or above ``at_most``."""
    if not 0 < value <= at_most or math.isinf(value):
        limit = "" if math.isinf(at_most) else f" and at most {at_most:g}"
        raise ValueError(f"{flag} is {value}; accepted: a finite number above 0{limit}")
