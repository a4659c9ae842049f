"""Drawing with models of dynamic width: which blocks run, what is recorded, and what is refused."""

import json

import pytest
import torch
from support.small import batch, small_dy_dit, small_dynamic_dc_dit

from dcdit.checkpoint import save_model
from dcdit.cli.main import main
from dcdit.diffusion import sample
from dcdit.models import KeptShare, SlicedModel, count_flops
from dcdit.sample import Guidance, measure_costs
from dcdit.sample.model_calls import ModelCalls, call_times

MODELS = {"dydit": small_dy_dit, "dc-dit": small_dynamic_dc_dit}


@pytest.mark.parametrize("kind", MODELS)
def test_the_command_slices_and_says_what_was_computed(kind, tmp_path, capsys):
    model = MODELS[kind](in_channels=3)
    save_model(tmp_path / "m.safetensors", model)
    flags = ["--steps", "4", "--labels", "1", "2", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["sample", "--checkpoint", str(tmp_path / "m.safetensors"), *flags]) == 0
    facts = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert facts["sliced_bytes"] == SlicedModel(model, call_times("ddpm", 4)).nbytes > 0
    assert "MiB beside the model's own" in capsys.readouterr().out
    (run,) = facts["runs"]
    assert 0.25 < run["heads"] < 1 and 0.25 < run["groups"] < 1
    assert ("tokens" in run) == (kind == "dydit")
    complete = count_flops(model.config)["total"] * 4 / 1e12
    assert 0 < run["tflops_per_image"] < complete


@torch.no_grad()
def test_records_hold_the_flops_of_the_open_gates():
    model = small_dy_dit()
    sliced = SlicedModel(model, [999, 3])
    x, y = torch.randn(4, 4, 8, 12), torch.arange(4)
    calls = ModelCalls(sliced, 2)
    expected = []
    for time in (999, 3):
        t = torch.full((4,), time)
        calls(x, t, y)
        counts = model(x, t, y, return_gates=True)[1].counts()
        expected.append(count_flops(model.config, batch=4, gates=counts)["total"] / 2 / 1e9)
    records = calls.records()
    assert [record["gflops"] for record in records] == pytest.approx(expected)
    assert all(0 < record["gflops_null"] < record["gflops"] for record in records)
    assert records[0]["heads"] != records[1]["heads"]


def test_a_pilot_calls_the_slices():
    model = small_dynamic_dc_dit()
    tflops, seconds = measure_costs(model, torch.arange(2), 3, "ddpm", Guidance(), progress=False)
    complete = count_flops(model.config)["total"] * 3 / 1e12
    assert 0 < tflops.costs[-1] < tflops.costs[0] < complete
    assert all(cost > 0 for cost in seconds.costs)


def test_what_is_refused(tmp_path, capsys):
    save_model(tmp_path / "m.safetensors", small_dy_dit(in_channels=3))
    for flags, message in {
        ("--drop-fraction", "0.3"): "holds a DyDiT, which drops no tokens; leave --drop-fraction out",
        ("--graph",): "has another width at each step, which no graph has",
    }.items():
        assert main(["sample", "--checkpoint", str(tmp_path / "m.safetensors"), *flags, "--device", "cpu"]) != 0
        assert message in capsys.readouterr().err


def test_a_planned_capacity_reaches_the_slices():
    model = small_dynamic_dc_dit()
    model.kept_share = KeptShare(0.6, 0.05, 0.8, 100)
    sliced, labels = SlicedModel(model, call_times("euler", 2)), torch.tensor([1, 2])
    options = {"num_steps": 2, "method": "euler", "capacity": "auto", "progress": False}
    for caller in (sliced, ModelCalls(sliced, 2)):
        torch.testing.assert_close(sample(caller, labels, **options), sample(model, labels, **options))
    with pytest.raises(ValueError, match="capacity is auto but DyDiT takes none"):
        sample(ModelCalls(small_dy_dit(), 2), labels, **options)


@pytest.mark.parametrize("option", ["complete", "gate_noise"])
@pytest.mark.parametrize("kind", MODELS)
def test_slices_have_the_width_of_their_timestep(kind, option):
    model = MODELS[kind]()
    x, t, y = batch(model.config)
    value = torch.zeros(len(x), *model.config.gate_shape) if option == "gate_noise" else True
    with pytest.raises(ValueError, match=r"leave .*gate_noise.* out"):
        SlicedModel(model, [500])(x, torch.full_like(t, 500), y, **{option: value})
