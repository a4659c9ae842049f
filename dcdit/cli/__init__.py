"""The ``dcdit`` command: ``main`` and one file for each subcommand."""
