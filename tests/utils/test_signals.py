"""The signals that ask a program to end: noted or raised, once, and given back to whoever handled them before."""

import signal
import time

import pytest

from dcdit.utils.signals import SIGNALS, Signals, Stopped

pytestmark = pytest.mark.usefixtures("hang_up_ends_programs")


def test_signals_are_noted_and_a_late_second_ctrl_c_interrupts(monkeypatch):
    """A launcher repeats what its whole group already got, so a repeated signal within two seconds is the same one."""
    outer = [signal.getsignal(number) for number in SIGNALS]
    with Signals() as signals:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
        assert signals.caught == signal.SIGTERM
        later = time.monotonic() + 60
        monkeypatch.setattr(time, "monotonic", lambda: later)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in SIGNALS] == outer


def test_a_run_outlives_its_terminal_under_nohup():
    outer = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert not signals.caught
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, outer)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_raised_and_its_repetitions_are_not(number):
    with Signals(raising=True):
        with pytest.raises(Stopped, match=f"interrupted by {number.name}") as stopped:
            signal.raise_signal(number)
        assert stopped.value.number == number
        for repeated in SIGNALS:
            signal.raise_signal(repeated)


def test_an_outer_block_knows_what_an_inner_block_has_noted():
    """Training notes a signal, saves, and returns to the command, where a launcher's repetition must not strike."""
    with Signals(raising=True) as outer:
        with Signals() as inner:
            signal.raise_signal(signal.SIGTERM)
            assert (inner.caught, outer.caught) == (signal.SIGTERM, 0)
        signal.raise_signal(signal.SIGTERM)
        assert outer.caught == signal.SIGTERM
