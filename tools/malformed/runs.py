"""The folder of a run, as ``--resume`` reads it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.malformed import parts
from tools.malformed.base import Base
from tools.malformed.case import malformed

TRAINER, LOG, CHECKPOINT = "trainer.json", "log.jsonl", "checkpoint"


def trainer(base: Base, out: Path, change: Callable[[dict[str, Any]], Any]) -> list[str]:
    """The run with another content of every ``trainer.json``."""
    run = base.copy_of_run(out)
    for file in run.glob("checkpoints/*/trainer.json"):
        value = change(json.loads(file.read_text()))
        parts.write(file, value if isinstance(value, str | bytes) else json.dumps(value))
    return ["train", "--resume", str(run), "--set", "optim.steps=4"]


def log(base: Base, out: Path, change: Callable[[bytes], bytes]) -> list[str]:
    run = base.copy_of_run(out)
    parts.write(run / "log.jsonl", change((run / "log.jsonl").read_bytes()))
    return ["train", "--resume", str(run), "--set", "optim.steps=4"]


@malformed(TRAINER, "trainer.json", "has the step -5; accepted: a whole number from 0")
def trainer_step_is_negative(base: Base, out: Path) -> list[str]:
    return trainer(base, out, lambda value: {**value, "step": -5})


@malformed(TRAINER, "trainer.json", "has the step '2'")
def trainer_step_is_text(base: Base, out: Path) -> list[str]:
    return trainer(base, out, lambda value: {**value, "step": "2"})


@malformed(TRAINER, "trainer.json", "has the step True")
def trainer_step_is_true(base: Base, out: Path) -> list[str]:
    return trainer(base, out, lambda value: {**value, "step": True})


@malformed(TRAINER, "trainer.json", "has the flops -1")
def trainer_flops_are_negative(base: Base, out: Path) -> list[str]:
    return trainer(base, out, lambda value: {**value, "flops": -1})


@malformed(TRAINER, "trainer.json", "no JSON")
def trainer_cut_short(base: Base, out: Path) -> list[str]:
    return trainer(base, out, lambda value: json.dumps(value)[:50])


@malformed(TRAINER, "trainer.json", "nothing but zeros")
def trainer_of_zeros(base: Base, out: Path) -> list[str]:
    return trainer(base, out, lambda value: bytes(500))


@malformed(TRAINER, "trainer.json", "holds a list; accepted: an object")
def trainer_is_a_list(base: Base, out: Path) -> list[str]:
    return trainer(base, out, lambda value: [value])


@malformed(TRAINER, "trainer.json", "config 5; accepted: an object")
def trainer_configuration_is_a_number(base: Base, out: Path) -> list[str]:
    return trainer(base, out, lambda value: {**value, "config": 5})


@malformed(TRAINER, "trainer.json", r"optim\.lr is 'abc'; accepted: float")
def trainer_configuration_of_other_types(base: Base, out: Path) -> list[str]:
    def change(value: dict[str, Any]) -> Any:
        value["config"]["optim"]["lr"] = "abc"
        return value

    return trainer(base, out, change)


@malformed(TRAINER, "trainer.json", "depth is 1000000000; accepted")
def trainer_depth_of_a_billion(base: Base, out: Path) -> list[str]:
    def change(value: dict[str, Any]) -> Any:
        value["config"]["model"]["overrides"]["depth"] = 10**9
        return value

    return trainer(base, out, change)


@malformed(TRAINER, "trainer.json", "named pipe")
def trainer_is_a_pipe(base: Base, out: Path) -> list[str]:
    run = base.copy_of_run(out)
    for file in run.glob("checkpoints/*/trainer.json"):
        file.unlink()
        os.mkfifo(file)
    return ["train", "--resume", str(run)]


@malformed(LOG, "log.jsonl", "line 1: .*is no record of a run")
def log_line_is_a_list(base: Base, out: Path) -> list[str]:
    return log(base, out, lambda data: b"[1]\n" + data)


@malformed(LOG, "log.jsonl", r"line 1: .*\\x1b.*is no record of a run")
def log_line_with_escape_codes(base: Base, out: Path) -> list[str]:
    return log(base, out, lambda data: b"\x1b[31mhello\n" + data)


@malformed(LOG, "log.jsonl", "line 1: .*is no record of a run")
def log_is_not_utf8(base: Base, out: Path) -> list[str]:
    return log(base, out, lambda data: b"\xff\xfe\n" + data)


@malformed(LOG, "log.jsonl", "line 2: .*is no record of a run")
def log_goes_on_behind_zeros(base: Base, out: Path) -> list[str]:
    return log(base, out, lambda data: data.split(b"\n")[0] + b"\n" + bytes(100) + data)


@malformed(LOG, "log.jsonl", "is no record of a run")
def log_line_is_deep(base: Base, out: Path) -> list[str]:
    return log(base, out, lambda data: b'{"step":' + b"[" * 100_000 + b"\n")


@malformed(LOG, "log.jsonl", "named pipe")
def log_is_a_pipe(base: Base, out: Path) -> list[str]:
    run = base.copy_of_run(out)
    (run / "log.jsonl").unlink()
    os.mkfifo(run / "log.jsonl")
    return ["train", "--resume", str(run), "--set", "optim.steps=4"]


@malformed(CHECKPOINT, "optimizer.safetensors", "unknown parameter")
def optimizer_of_another_model(base: Base, out: Path) -> list[str]:
    import torch
    from safetensors.torch import save_file

    run = base.copy_of_run(out)
    for file in run.glob("checkpoints/*/optimizer.safetensors"):
        save_file({f"{parts.FORGED}/exp_avg": torch.zeros(1)}, file, {"format": "dcdit"})
    return ["train", "--resume", str(run), "--set", "optim.steps=4"]


@malformed(CHECKPOINT, "optimizer.safetensors", "has shape")
def optimizer_of_other_shapes(base: Base, out: Path) -> list[str]:
    import torch
    from safetensors.torch import load_file, save_file

    run = base.copy_of_run(out)
    for file in run.glob("checkpoints/*/optimizer.safetensors"):
        save_file({name: torch.zeros(3) for name in load_file(file)}, file, {"format": "dcdit"})
    return ["train", "--resume", str(run), "--set", "optim.steps=4"]


@malformed(CHECKPOINT, "ema.safetensors", "damaged or no safetensors file")
def averages_cut_short(base: Base, out: Path) -> list[str]:
    run = base.copy_of_run(out)
    for file in run.glob("checkpoints/*/ema.safetensors"):
        parts.write(file, file.read_bytes()[:-1000])
    return ["train", "--resume", str(run), "--set", "optim.steps=4"]


@malformed("config.yaml of a run", "config.yaml", "not YAML")
def run_configuration_is_damaged(base: Base, out: Path) -> list[str]:
    run = base.copy_of_run(out)
    parts.write(run / "config.yaml", "data: [")
    return ["train", "--resume", str(run), "--set", "optim.steps=4"]
