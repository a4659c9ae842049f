"""What a report found on one device: what the page and its pictures are made of."""

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.lines import DONE, Line
from benchmarks.gpu.plan import Group, case_name

PREDICTIONS = Path(__file__).resolve().parents[2] / "docs" / "performance-log-predictions.json"


class Found:
    """What was found on one device.

    Args:
        device: its name.
        lines: the last line of each case there.
    """

    def __init__(self, device: str, lines: dict[str, Line]) -> None:
        self.device, self.lines = device, lines
        known = json.loads(PREDICTIONS.read_text()) if PREDICTIONS.is_file() else {}
        self.predicted: dict[str, Any] = next((known[name] for name in known if name in device), {})

    def done(self, group: str, case: str) -> Line | None:
        line = self.lines.get(case_name(group, case))
        return line if line is not None and line["state"] == DONE else None

    def of_group(self, group: Group) -> dict[str, Line]:
        """The cases of a group that are done, in the order of the plan."""
        found = {case: self.done(group.name, case) for case in group.cases}
        return {case: line for case, line in found.items() if line is not None}

    @property
    def gbps(self) -> float | None:
        line = self.done("ceilings", "copy")
        return line["gbps"]["median"] if line else None

    @property
    def tflops(self) -> float | None:
        line = self.done("ceilings", "product")
        return line["tflops"]["median"] if line else None

    def prediction(self, group: str, case: str) -> dict[str, float]:
        return self.predicted.get(group, {}).get(case, {})
