"""A GPU that exists on a clock only: work is queued by the host and done in order, events are reached in order."""

from typing import Any

import pytest
import torch

from dcdit.profiling import device_timing, timing

RATE = 1.755e9
"""Cycles per second: slower than a pause assumes, as every real GPU."""


class FakeTimeline:
    """Time of the host and of the device, in seconds.

    Args:
        latency: from the moment at which the host hands work over until an idle device begins with it.
    """

    def __init__(self, latency: float = 5e-6) -> None:
        self.host, self.device, self.latency = 0.0, 0.0, latency

    def spend(self, seconds: float) -> None:
        """The host computes."""
        self.host += seconds

    def queue(self, seconds: float) -> None:
        """The host hands work over to the device."""
        self.device = max(self.device, self.host + self.latency) + seconds

    def wait(self) -> None:
        """The host waits for the device."""
        self.host = max(self.host, self.device)

    def event(self, **_: Any) -> "FakeEvent":
        return FakeEvent(self)

    def install(self, monkeypatch: pytest.MonkeyPatch, copy_rate: float = 3e12) -> None:
        """Stand in for the functions of ``torch.cuda`` that time measurements use, and for their buffers."""
        for module in (timing, device_timing):
            monkeypatch.setattr(module.time, "perf_counter", lambda: self.host)
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: self.wait())
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.queue(cycles / RATE))
        monkeypatch.setattr(device_timing, "buffer", lambda size, _: FakeBuffer(self, size / copy_rate))


class FakeEvent:
    def __init__(self, timeline: FakeTimeline) -> None:
        self.timeline = timeline

    def record(self) -> None:
        self.time = max(self.timeline.device, self.timeline.host + self.timeline.latency)

    def synchronize(self) -> None:
        self.timeline.host = max(self.timeline.host, self.time)

    def elapsed_time(self, end: "FakeEvent") -> float:
        return 1e3 * (end.time - self.time)


class FakeBuffer:
    """Memory that takes time to pass over once."""

    def __init__(self, timeline: FakeTimeline, seconds: float) -> None:
        self.timeline, self.seconds = timeline, seconds

    def zero_(self) -> None:
        self.timeline.queue(self.seconds)

    def copy_(self, _: "FakeBuffer") -> None:
        self.timeline.spend(4e-6)
        self.timeline.queue(2 * self.seconds)
