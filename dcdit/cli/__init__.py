"""The ``dcdit`` command: :func:`main`, and one file for each subcommand."""

from dcdit.cli.main import main

__all__ = ["main"]
