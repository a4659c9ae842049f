"""Options and checks that several commands share."""

import argparse
from collections.abc import Callable
from typing import Any


def add_device_option(add: Callable[..., Any]) -> None:
    """Add ``--device``, which :func:`dcdit.utils.environment.resolve_device` reads."""
    add(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto (a GPU if there is one), cpu, cuda, or cuda:N for one GPU of several (default auto)",
    )


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Raise ValueError if an option of these names is given and below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; accepted: at least 1")
