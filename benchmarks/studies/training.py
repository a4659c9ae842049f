"""Several training runs side by side, each with one process and one thread. A stopped study continues where it was."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dcdit.checkpoint import list_checkpoints, read_trainer
from dcdit.config import TrainConfig, dump_yaml

TRAIN = ("-m", "dcdit", "train")


class RunFailedError(RuntimeError):
    """A training run of a study ended with an error. The message names the file with its output."""


def train_all(
    configs: Mapping[str, TrainConfig],
    jobs: int,
    programs: Mapping[str, Sequence[str]] | None = None,
    until: float = math.inf,
) -> None:
    """Train every run that is not finished, ``jobs`` at a time, in their order.

    Args:
        configs: name of a run -> its configuration, whose ``optim.flops`` or ``optim.steps`` ends it. The same folder
            may come again with a larger budget: it then waits for the smaller one.
        jobs: number of processes.
        programs: name of a run -> arguments of Python that stand in for ``-m dcdit train``.
        until: seconds since the epoch; no run starts later.

    Raises:
        RunFailedError: a run failed; raised after the others have ended.
    """
    waiting = [name for name in configs if not finished(configs[name])]
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: list[str] = []
    with tqdm(total=len(configs), initial=len(configs) - len(waiting), desc="training runs") as bar:
        while waiting or running:
            if time.time() > until:
                waiting.clear()
            busy = {configs[name].run.out for name in running}
            for name in list(waiting):
                if len(running) < jobs and configs[name].run.out not in busy:
                    waiting.remove(name)
                    busy.add(configs[name].run.out)
                    running[name] = _start(configs[name], (programs or {}).get(name, TRAIN))
            time.sleep(1)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                if running.pop(name).returncode:
                    failed.append(f"{name} (see {_output(configs[name])})")
                bar.update()
    if failed:
        raise RunFailedError(f"training failed: {', '.join(failed)}")


def finished(config: TrainConfig) -> bool:
    """Whether the newest checkpoint of a run reached its FLOPs or its steps."""
    if not list_checkpoints(config.run.out):
        return False
    trainer = read_trainer(config.run.out)
    return trainer["step"] >= config.optim.steps or (
        config.optim.flops is not None and trainer["flops"] >= config.optim.flops
    )


def read_log(config: TrainConfig) -> list[dict[str, Any]]:
    """The records of a run's log.jsonl; none if the run stopped before the first."""
    file = Path(config.run.out) / "log.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def losses_by_flops(records: Sequence[Mapping[str, Any]], key: str = "val_loss_ema") -> list[tuple[float, float]]:
    """Training FLOPs and held-out loss at each validation of a log whose step has a record of FLOPs too."""
    spent = {record["step"]: record["flops"] for record in records if "flops" in record}
    return [(spent[r["step"]], r[key]) for r in records if key in r and r["step"] in spent]


def run_arguments(config: TrainConfig) -> list[str]:
    """What ``dcdit train`` is called with to begin a run, or to go on with it."""
    folder = Path(config.run.out)
    if list_checkpoints(folder):
        # The run keeps its own configuration except for its length, so a larger budget continues a smaller one.
        length = [f"optim.flops={json.dumps(config.optim.flops)}", f"optim.steps={config.optim.steps}"]
        return ["--resume", str(folder), *(part for value in length for part in ("--set", value))]
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".yaml")
    file.write_text(dump_yaml(config), encoding="utf-8")
    return ["--config", str(file)]


def _start(config: TrainConfig, program: Sequence[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, *program, *run_arguments(config)]
    with _output(config).open("ab") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def _output(config: TrainConfig) -> Path:
    return Path(config.run.out).with_suffix(".out")
