"""The trained models of the study of composition on a CPU: losses again, slices, times, TeaCache over the DC-DiT."""

import json
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.harness.machine import cpu_name
from benchmarks.studies import caching, cifar10, composition
from benchmarks.studies.composition import DYNAMIC, MODELS, Passes, configs, held_out
from benchmarks.studies.conversion import difference, measure_sides
from dcdit.checkpoint import load_model
from dcdit.config import TrainConfig
from dcdit.integrations.diffusers import DCDiTPipeline
from dcdit.models import DCDiT, DyDiT, SlicedModel
from dcdit.sample.model_calls import ModelCalls, call_times

CPU_IMAGES = 8
CACHED_IMAGES, CACHED_STEPS, SCALE = 2, 24, 2.0
SLICED_STEPS = 250
MEASURED = "cpu.json"


def measure_on_cpu(data: Path, trained: Path, rounds: int) -> dict[str, Any]:
    """All measurements of the models in the folder ``trained``. They are kept there, and not repeated."""
    file = trained / MEASURED
    if not file.is_file():
        planned = configs(data, trained, 1.0, [0], "cpu")  # only the data and the objective are read
        mine = {name: planned[f"{name}-0"] for name in MODELS}
        sides = _passes(mine, trained, rounds)
        found = {
            "machine": f"{cpu_name()}, torch {torch.__version__}, float32, one thread",
            "rounds": rounds,
            **sides,
            "teacache": _cache(trained / f"{DYNAMIC}.safetensors", max(1, rounds // 5)),
            "slices": _slices(mine, trained),
            "losses": {name: _losses(config, trained / f"{name}.safetensors") for name, config in mine.items()},
        }
        file.write_text(json.dumps(found))
    found = json.loads(file.read_text())
    assert isinstance(found, dict)
    return found


@torch.inference_mode()
def _passes(planned: dict[str, TrainConfig], trained: Path, rounds: int) -> dict[str, Any]:
    """Times. The first of the sides is the static DiT, which eta compares with."""
    sides = {
        name: Passes(load_model(trained / f"{name}.safetensors"), config, *held_out(config, CPU_IMAGES)).side()
        for name, config in planned.items()
    }
    found = measure_sides(sides, rounds)
    return {"conditions": found.conditions, "sides": {name: side._asdict() for name, side in found.sides.items()}}


def _cache(weights: Path, rounds: int) -> list[dict[str, Any]]:
    """A row for each setting of TeaCache."""
    pipe = DCDiTPipeline.from_dcdit(weights)
    pipe.set_progress_bar_config(disable=True)
    rows = caching.study(pipe, CACHED_IMAGES, CACHED_STEPS, rounds, SCALE, caches=["TeaCache"])
    return [asdict(row) for row in rows]


@torch.inference_mode()
def _slices(planned: dict[str, TrainConfig], trained: Path) -> dict[str, Any]:
    """Of the models of dynamic width: how far sliced outputs are from masked ones, what is open, and bytes."""
    found = {}
    for name, config in planned.items():
        model = load_model(trained / f"{name}.safetensors")
        if not isinstance(model, DCDiT | DyDiT) or model.config.gate_shape is None:
            continue
        passes = Passes(model, config, *held_out(config, CPU_IMAGES))
        calls = ModelCalls(passes.model, CPU_IMAGES)
        for noisy in passes.noisy:
            calls(noisy.x, noisy.time, passes.y)
        records = calls.records()
        inputs = [(noisy.x, float(noisy.time[0])) for noisy in passes.noisy]
        found[name] = {
            "open": {
                part: fmean(r[part] for r in records) for part in ("heads", "groups", "tokens") if part in records[0]
            },
            "difference": max(difference(passes.model, model, x, t, passes.y) for x, t in inputs),
            "bytes": SlicedModel(model, call_times("euler", SLICED_STEPS)).nbytes,
            "weights": sum(weight.nbytes for weight in model.parameters()),
        }
    return found


@torch.inference_mode()
def _losses(config: TrainConfig, weights: Path) -> list[float]:
    """Held-out loss at each noise level."""
    model = load_model(weights)
    batches = zip(*(part.split(composition.BATCH) for part in held_out(config, cifar10.HELD_OUT)), strict=True)
    return torch.cat([Passes(model, config, *batch).losses()[0] for batch in batches], 1).mean(1).tolist()
