"""The ``dcdit`` command.

Each subcommand is a module with ``add_arguments(parser)`` and ``run(args)``, which returns the exit code or None for 0.
It is imported when it is called.
"""

import argparse
import contextlib
import importlib
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from dcdit import __version__
from dcdit.cli.extras import missing
from dcdit.cli.output import lenient_output
from dcdit.utils.processes import is_first_process, is_first_to_say
from dcdit.utils.signals import Signals, Stopped
from dcdit.utils.text import one_line, printable

COMMANDS = {
    "train": ("dcdit.cli.train", "train a DC-DiT or a static DiT"),
    "upcycle": ("dcdit.cli.upcycle", "train a DC-DiT that starts from a pretrained static DiT"),
    "extract": ("dcdit.cli.extract", "turn a folder of images into latents, with a local autoencoder"),
    "sample": ("dcdit.cli.sample", "draw images from a checkpoint, at any drop fraction"),
    "evaluate": ("dcdit.cli.evaluate", "FID, IS, KID, precision and recall of a checkpoint's samples or of any images"),
    "profile": ("dcdit.cli.profile", "where the time goes, dynamic against static"),
    "demo": ("dcdit.cli.demo", "train, sample, look into and time a small DC-DiT on digits or photographs"),
    "tune": ("dcdit.cli.tune", "find launch configurations for this GPU"),
    "info": ("dcdit.cli.info", "versions, devices, and the kernels that run here"),
}
"""Name of a subcommand to its module and its line of help."""
USER_ERRORS = (ValueError, OSError, FloatingPointError, ModuleNotFoundError, MemoryError)
"""Errors that a user can cause: these are printed in one line. Others are faults of the program, with a traceback."""
NO_MEMORY = ("can't allocate memory", "out of memory")
"""Parts of PyTorch's messages about it, which are of RuntimeErrors."""
LOG_LEVELS = ("debug", "info", "warning", "error")
"""Accepted in DCDIT_LOG."""
LOADER_ERROR = re.compile(r"Caught \w+ in DataLoader worker process .*\n {4}.*?\n(\S.*)", re.DOTALL)
"""An error in a process that loads data: it carries the traceback of that process, and then its message."""


class _Parser(argparse.ArgumentParser):
    """Raises its errors, so that ``main`` prints them in one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _say(line: str) -> None:
    """Print a line on stderr, above a progress bar where there is one."""
    bars = sys.modules.get("tqdm")
    if bars is None:
        print(line, file=sys.stderr)
    else:
        bars.tqdm.write(line, file=sys.stderr)


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Print the warnings of this package without a place in its code."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if category.__module__.partition(".")[0] == "dcdit":
                _say(f"dcdit: warning: {printable(' '.join(str(message).split()))}")
            else:
                usual(message, category, *place, **more)

        warnings.showwarning = show
        # Pillow warns of sizes that dcdit.data.decode judges by the size of the file.
        warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\)", module=r"PIL\.")
        yield


class _Messages(logging.Handler):
    """Messages of this package's loggers, a line each. Processes other than the first say nothing."""

    def emit(self, record: logging.LogRecord) -> None:
        if is_first_process():
            _say(f"dcdit: {record.levelname.lower()}: {printable(record.getMessage())}")


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Show the log messages that DCDIT_LOG asks for.

    Raises:
        ValueError: DCDIT_LOG is no level.
    """
    level = os.environ.get("DCDIT_LOG", "warning")
    if level not in LOG_LEVELS:
        raise ValueError(f"DCDIT_LOG is {level!r}; accepted: {', '.join(LOG_LEVELS)}")
    logger, messages = logging.getLogger("dcdit"), _Messages()
    before = logger.level
    logger.setLevel(level.upper())
    logger.addHandler(messages)
    try:
        yield
    finally:
        logger.removeHandler(messages)
        logger.setLevel(before)


@_warnings_in_one_line()
def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    0, or 2 after one line on stderr (a traceback with DCDIT_TRACEBACK=1). 128 plus the number of the signal that ended
    it: 130 after Ctrl-C, 143 after SIGTERM and 129 after SIGHUP. Training has saved a checkpoint by then.
    DCDIT_LOG=info shows log messages, too.

    Example:
        >>> from dcdit.cli import main
        >>> main(["sample", "--checkpoint", "nowhere"])  # one line on stderr
        2
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with lenient_output(), Signals(raising=True) as signals:
        try:
            return _run(arguments, signals)
        except KeyboardInterrupt as interrupt:
            number = interrupt.number if isinstance(interrupt, Stopped) else signal.SIGINT
            if is_first_process():
                print(f"dcdit: interrupted by {signal.Signals(number).name}", file=sys.stderr)
            return 128 + number


def _run(arguments: Sequence[str], signals: Signals) -> int:
    """The exit code of a command that nobody interrupts."""
    called = _called(arguments)
    try:
        with signals.waiting():
            args, unknown = create_parser(arguments).parse_known_args(arguments)
        if unknown:
            raise ValueError(f"unrecognized arguments: {' '.join(unknown)} (see dcdit {args.command} --help)")
        with _logging():
            code = importlib.import_module(COMMANDS[args.command][0]).run(args) or 0
        sys.stdout.flush()  # an error here is one of the command: its result is not whole
        return code
    except (*USER_ERRORS, RuntimeError) as error:
        if os.environ.get("DCDIT_TRACEBACK") == "1" or not (isinstance(error, USER_ERRORS) or _lacks_memory(error)):
            raise
        message = _one_line(error, called)
        if is_first_to_say(message):
            print(f"dcdit: error: {message}", file=sys.stderr)
        return 2


def create_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for these arguments. Only the subcommand that they call is imported and adds its own."""
    parser = _Parser(prog="dcdit", description="Dynamic-token diffusion transformers.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dcdit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    called = _called(arguments)
    for name, (module, help_text) in COMMANDS.items():
        command = commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        if name == called:
            importlib.import_module(module).add_arguments(command)
    return parser


def _called(arguments: Sequence[str]) -> str | None:
    """The subcommand that these arguments call."""
    return next((argument for argument in arguments if not argument.startswith("-")), None)


def _one_line(error: Exception, command: str | None) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name and (hint := missing(error.name, command)):
        return hint
    if isinstance(error, MemoryError) or _lacks_memory(error):
        first = printable(str(error).strip().partition("\n")[0]) or type(error).__name__
        return f"there is not enough memory ({first}); accepted: a smaller batch, image or model"
    traceback = LOADER_ERROR.match(str(error))
    return one_line(error) if traceback is None else printable(traceback[1].strip())


def _lacks_memory(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and any(part in str(error) for part in NO_MEMORY)
