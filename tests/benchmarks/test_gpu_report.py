"""The report of a rented GPU: its cases on a CPU, its page from lines, and how it is started."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import capturable_attention, fake_device
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks import gpu_report
from benchmarks.gpu import forward, found, operations, page, plan, training, worker
from benchmarks.gpu.lines import BEGAN, DONE, FAILED, LEFT_OUT, LeftOut, Lines
from benchmarks.gpu.setting import create_setting
from benchmarks.harness.equality import NotEqualError
from benchmarks.harness.recipe_step import RecipeStep
from benchmarks.harness.static import CompiledDiT
from dcdit.models import DCDiT, create_model
from dcdit.ops.backend import backend_name
from dcdit.train.losses import training_losses

ROOT = Path(__file__).resolve().parents[2]
SETTING = replace(create_setting(rehearse=True), seconds=0.01)
DEVICE = "NVIDIA H100 80GB HBM3"


# --- processes ----------------------------------------------------------------------------------------------------


class FakeCases:
    def run(self, case: str) -> dict[str, Any]:
        if case == "absent":
            raise LeftOut("no such thing")
        if case == "wrong":
            raise NotEqualError("result 0 is off")
        return {"ms": 1.0}


def run_cases(cases: list[str], tmp_path: Path, create: Any = FakeCases, until: float = 1e12) -> tuple[int, dict]:
    lines = Lines(tmp_path, device="x")
    code = worker.run_cases(create, cases, "g", lines, until)
    return code, lines.last()


def test_an_error_is_a_line_and_the_next_case_runs(tmp_path: Path) -> None:
    code, lines = run_cases(["good", "wrong", "absent", "good too"], tmp_path)
    assert code == 0
    assert [line["state"] for line in lines.values()] == [DONE, DONE, FAILED, LEFT_OUT, DONE]
    assert lines["g: wrong"]["error"].startswith("NotEqualError: result 0 is off (worker.py")
    assert lines["g: absent"]["reason"] == "no such thing"


def test_a_gpu_that_is_no_longer_usable_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "device_is_usable", lambda: False)
    code, lines = run_cases(["good", "wrong", "good too"], tmp_path)
    assert code == 3
    assert list(lines) == ["g: preparation", "g: good", "g: wrong"]


def test_a_preparation_that_fails_is_one_line(tmp_path: Path) -> None:
    def create() -> FakeCases:
        raise RuntimeError("out of memory")

    code, lines = run_cases(["good", "good too"], tmp_path, create)
    assert code == 3
    assert [(name, line["state"]) for name, line in lines.items()] == [("g: preparation", FAILED)]


def test_a_worker_watches_its_parent_before_it_imports_torch() -> None:
    code = "import sys; from benchmarks.gpu import worker, driver; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_no_case_begins_after_the_end(tmp_path: Path) -> None:
    code, lines = run_cases(["good"], tmp_path, until=time.time() - 1)
    assert (code, list(lines)) == (0, ["g: preparation"])


@pytest.mark.parametrize("importing", [False, True], ids=["while it runs", "while it imports torch"])
def test_a_process_ends_with_its_parent(importing: bool, tmp_path: Path) -> None:
    """It is a session of its own, as in a report, so nothing else would end it."""
    command = [sys.executable, "-m", "benchmarks.gpu.worker", "--folder", str(tmp_path), "--group", "operations"]
    command += ["--rehearse", "--until", "1e12", "--cases", *operations_of_a_while(), "--parent"]
    parent = (
        "import os, subprocess\n"
        f"child = subprocess.Popen([*{command!r}, str(os.getpid())], start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "child.wait()"
    )
    started = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    pid = int(started.stdout.readline())
    while not importing and not Lines(tmp_path).read():
        assert started.poll() is None
        time.sleep(0.05)
    started.send_signal(signal.SIGKILL)
    started.wait()
    end = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end, "the child outlived its parent"
        time.sleep(0.05)


def operations_of_a_while() -> list[str]:
    """More cases than are done before the parent is killed."""
    return [f"{op}, {direction}" for op in plan.OPERATIONS for direction in plan.DIRECTIONS]


def test_tests_get_their_lines_and_what_passed_is_not_run_again(tmp_path: Path) -> None:
    """The plugin, on several processes: a failing test is a line with its message."""
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_bad(): assert 1 + 1 == 3, 'a message'\n"
        "def test_good(): pass\n"
        "@pytest.mark.skip(reason='why')\n"
        "def test_skipped(): pass\n"
        "def test_new(): pass\n"
    )
    marks = tmp_path / "marks.txt"
    marks.write_text("passed test_it.py::test_good\nlast test_it.py::test_bad")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "DCDIT_REPORT_FOLDER": str(tmp_path),
        "DCDIT_REPORT_DEVICE": "x",
        "DCDIT_REPORT_TESTS": str(marks),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.pytest_lines", "-n", "2", "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = Lines(tmp_path).last()
    assert {name: line["state"] for name, line in lines.items()} == {
        "tests: test_it.py::test_bad": FAILED,
        "tests: test_it.py::test_skipped": LEFT_OUT,
        "tests: test_it.py::test_new": DONE,
    }
    assert "a message" in lines["tests: test_it.py::test_bad"]["error"]


# --- cases --------------------------------------------------------------------------------------------------------


def test_every_group_has_a_module() -> None:
    assert set(worker.MODULES) == {group.name for group in plan.GROUPS}
    for group in plan.GROUPS:
        assert len(set(group.cases)) == len(group.cases)


@pytest.fixture(scope="module")
def cases() -> forward.ForwardCases:
    return forward.ForwardCases(SETTING, 2, None)


@pytest.mark.parametrize("mode", ["exact", "graph, exact", "graph, capacity", "eager, budget"])
def test_a_forward_is_timed_against_both_static_sides(cases: forward.ForwardCases, mode: str) -> None:
    found = cases.run(f"drop 0.4, {mode}")
    assert set(found["ms"]) == {"static", "static graph", mode}
    assert set(found["eta"]) == {"static", "static graph"}
    assert found["flops"] > 0 and 0 < found["kept"] < 0.3
    assert ("stage_ms" in found) == ("stage_spread" in found) == (mode == "exact")


@pytest.mark.parametrize("mode", ["graph, exact", "graph, budget"])
def test_graphs_are_captured_and_replayed(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of a GPU, on a driver that plays one: every side that is called a graph is one."""
    capturable_attention.install(monkeypatch, longest=64)
    driver = fake_device.install(monkeypatch)
    monkeypatch.setattr(forward, "CompiledDiT", lambda model, backend: model)  # nothing compiles on such a driver
    cases = forward.ForwardCases(SETTING, 2, None)
    before = len(driver.graphs)
    assert before == 2  # the static model, plain and compiled
    assert set(cases.run(f"drop 0.4, {mode}")["ms"]) == {"static", "static graph", mode}
    assert len(driver.graphs) > before
    assert sum(call.startswith("replay") for call in driver.calls) >= 2 * 5


def test_a_mode_that_computes_something_else_is_not_timed(
    cases: forward.ForwardCases, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: Any, size: int, device: torch.device, **fixed: int) -> Any:
        return lambda *batch, **options: 1.1 * model(*batch, **options, **fixed)

    monkeypatch.setattr(forward, "_graphed_denoiser", wrong)
    monkeypatch.setattr(cases, "_time", lambda *_: pytest.fail("timed"))
    with pytest.raises(NotEqualError, match="graph, capacity"):
        cases.run("drop 0, graph, capacity")


def test_an_absent_checkout_is_left_out(cases: forward.ForwardCases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DCDIT_OFFICIAL", raising=False)
    with pytest.raises(LeftOut, match="DCDIT_OFFICIAL"):
        cases.run("drop 0, official")


def test_static_forms_and_equality(cases: forward.ForwardCases) -> None:
    assert set(cases.run("static")["ms"]) == {"plain", "plain graph", "compiled", "compiled graph"}
    assert all(off < 1e-4 for off in cases.run("equal")["off"].values())


def test_kernels_of_a_forward(cases: forward.ForwardCases) -> None:
    found = cases.run("kernels of static")
    assert found["launches"] > 10
    assert found["kernels"][0]["us"] >= found["kernels"][-1]["us"] > 0


def test_training_steps() -> None:
    torch.manual_seed(0)  # which of so few positions are kept depends on the weights
    cases = training.TrainingCases(replace(SETTING, batches=(2, 1)))
    off = cases.run("equal")["off"]
    assert 0 < off["DC-DiT"]["dcdit"] <= 2 * off["DC-DiT"]["plain"] < 1e-5
    assert 0 < off["static DiT"]["compiled"] <= 2 * off["static DiT"]["plain"] < 1e-5
    for case in ("drop 0.2", "drop 0.2, graphs"):
        found = cases.run(case)
        assert found["eta"].keys() == {"static, compiled"} and found["ms"].keys() == {"static, compiled", "DC-DiT"}
        assert found["kept"] < 0.3


@pytest.mark.parametrize(("kind", "what"), [(DCDiT, "DC-DiT, dcdit"), (CompiledDiT, "static DiT, compiled")])
def test_gradients_that_are_less_accurate_than_plain_ones_are_named(
    monkeypatch: pytest.MonkeyPatch, kind: type, what: str
) -> None:
    """Off by a few times what float32 rounds, which a fixed tolerance would let pass."""

    def slightly_off(config: Any, step: int, net: Any, *inputs: Any) -> Any:
        metrics, lengths = training_losses(config, step, net, *inputs)
        if isinstance(net, kind) and backend_name(inputs[2]) == "torch":
            metrics["loss"] = metrics["loss"] + 5e-6 * (metrics["loss"] - metrics["loss"].detach())
        return metrics, lengths

    torch.manual_seed(0)
    cases = training.TrainingCases(replace(SETTING, batches=(2, 1)))
    monkeypatch.setattr(training, "training_losses", slightly_off)
    with pytest.raises(NotEqualError, match=f"^gradients of {what}"):
        cases.run("equal")


def test_the_step_of_the_recipe_clips_averages_and_keeps_the_weights() -> None:
    model = create_model("DC-DiT-S", 32, depth=1, hidden_size=128, num_heads=2)
    step = RecipeStep(model, torch.randn(2, 4, 4, 4), torch.tensor([1, 2]), "fp32")
    assert (step.config.optim.grad_clip, step.config.optim.ema_decay) == (1.0, 0.9999)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step.config.optim.grad_clip = 1e-3
    step(0.3)
    moments = [state["exp_avg"] for state in step.optimizer.state.values()]
    norm = float(torch.stack([moment.norm() for moment in moments]).norm())
    assert norm == pytest.approx(0.1 * 1e-3, rel=1e-3)  # of the clipped gradient, times 1 - beta1
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("case", ["gather_tokens, forward", "gated_add_modulated_layer_norm, forward+backward"])
def test_an_operation_is_compiled_once_for_all_copies(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(operations, "copies_needed", lambda *_: 4)
    found = operations.OperationCases(replace(SETTING, compiler=counter)).run(case)
    assert found["copies"] == 4 and found["ratio"]["value"] > 0
    first = counter.frame_count
    counter.frame_count = 0
    monkeypatch.setattr(operations, "copies_needed", lambda *_: 1)
    operations.OperationCases(replace(SETTING, compiler=counter)).run(case)
    assert counter.frame_count == first


def test_the_static_model_in_pieces_is_the_static_model() -> None:
    """The same bits, and each of its four pieces is compiled once, however many blocks there are."""
    counter = CompileCounterWithBackend("eager")
    model = create_model("DiT-S/2", 32, depth=5, hidden_size=64, num_heads=2).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([3, 500]), torch.tensor([1, 2])
    compiled = CompiledDiT(model, counter)
    with torch.inference_mode():
        assert torch.equal(compiled(x, t, y), model(x, t, y))
    assert counter.frame_count == 4


# --- the page -----------------------------------------------------------------------------------------------------


def figure(middle: float) -> dict[str, float]:
    return {"median": middle, "low": 0.98 * middle, "high": 1.02 * middle, "n": 40}


def ratio(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.02, "high": value + 0.02}


def write_lines(folder: Path, device: str = DEVICE, warnings: list[str] | None = None) -> None:
    """Lines of a report that got as far as an operation."""
    lines = Lines(folder, device=device)
    lines.write("tests: tests/kernels/test_a.py::test_b", FAILED, error="AssertionError: off\nby 2")
    lines.write("tests: tests/kernels/test_a.py::test_c", DONE)
    lines.write("ceilings: copy", DONE, gbps=figure(3000.0), machine={"torch": "2.11.0", "triton": "3.6.0"})
    lines.write("ceilings: product", DONE, tflops=figure(800.0))
    group = "forward, large batch"
    lines.write(f"{group}: static", DONE, ms={"compiled": figure(15.0), "compiled graph": figure(14.8)}, fastest={})
    for drop, ms in ((0.0, 18.0), (0.2, 15.0), (0.4, 12.5), (0.6, 10.0)):
        for mode in ("exact", "graph, exact", "graph, capacity"):
            flops = 8.5e12 * (1 - 0.8 * drop)
            eta = {
                side: {"value": v, "low": v - 0.02, "high": v + 0.02}
                for side, v in (("static", 0.93), ("static graph", 0.91))
            }
            sides = {"static": figure(15.0), "static graph": figure(14.8), mode: figure(ms)}
            values = {
                "ms": sides,
                "eta": eta,
                "flops": flops,
                "static_flops": 7.6e12,
                "images": 32,
                "kept": 0.25 * (1 - drop),
            }
            lines.write(f"{group}: drop {drop:g}, {mode}", DONE, **values, warnings=warnings or [])
    lines.write(f"{group}: drop 0, graph, budget", BEGAN)
    name = "operations: gather_tokens, forward"
    times = {"dcdit": figure(0.02), "torch.compile": figure(0.05)}
    lines.write(name, DONE, by="graph", bytes=40_200_000, ms=times, ratio=ratio(2.5), warnings=[])


def test_the_page_shows_measurements_floors_and_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictions = tmp_path / "predictions.json"
    expected = {"drop 0, exact": {"ms": 18.5, "eta": 0.935}}
    predictions.write_text(json.dumps({"H100": {"forward, large batch": expected}}))
    monkeypatch.setattr(found, "PREDICTIONS", predictions)
    write_lines(tmp_path)
    text = page.write(tmp_path).read_text()
    rows = {
        cells[0]: cells for line in text.splitlines() if (cells := [cell.strip() for cell in line.split("|")[1:-1]])
    }
    exact = rows["drop 0, exact"]
    assert exact[1:5] == ["25.0%", "265.6", "18.000 (17.640 to 18.360)", "40"]
    assert exact[6:] == ["0.93 (0.91 to 0.95)", "0.91 (0.89 to 0.93)", "10.625", "18.50", "0.94"]
    assert rows["drop 0, graph, capacity"][6].startswith("0.91")  # like with like: a graph against a graph
    assert rows["drop 0, graph, capacity"][9:] == ["", ""]
    gather = rows["gather_tokens, forward"]
    assert gather[1:5] == ["40.20", "13.40", "20.00 (19.60 to 20.40)", "67%"]
    assert gather[6] == "2.50 (2.48 to 2.52)"
    assert "**failed**: tests: tests/kernels/test_a.py::test_b: AssertionError: off by 2" in text
    assert "cut: forward, large batch: drop 0, graph, budget was running" in text
    assert "not run: training: equal; drop 0" in text
    assert "Not all tests ran" in text
    assert "No picture" not in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"forward-large-1.png", "operations-1.png"}


def test_an_eta_that_is_not_reliable_is_not_printed(tmp_path: Path) -> None:
    write_lines(tmp_path, warnings=["the times of exact scatter by ±40%"])
    text = page.write(tmp_path).read_text()
    assert "unreliable (0.91 to 0.95)" in text
    assert "- drop 0, exact: the times of exact scatter by ±40%" in text
    assert "0.93 (" not in text


def test_two_devices_are_two_parts_of_a_page_and_eight_files_at_most(tmp_path: Path) -> None:
    for device in (DEVICE, "NVIDIA H200"):
        write_lines(tmp_path, device)
    text = page.write(tmp_path).read_text()
    assert [line for line in text.splitlines() if line.startswith("# ")] == [
        f"# DC-DiT on {device}, {time.strftime('%F', time.gmtime())}" for device in (DEVICE, "NVIDIA H200")
    ]
    assert len(list(tmp_path.iterdir())) + len(["log.txt", ".dcdit-lock"]) <= 8


def test_a_page_needs_neither_torch_nor_a_gpu(tmp_path: Path) -> None:
    write_lines(tmp_path)
    code = (
        "import sys; from benchmarks.gpu import page; code = page.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)
    assert (tmp_path / "report.md").is_file()


def test_a_folder_without_lines_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert page.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"gpu-report: error: {tmp_path} holds no lines; accepted")


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_claimed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_report.main(["--out", str(tmp_path / "report")]) == 0
    assert "nothing was run and nothing is claimed" in capsys.readouterr().out
    assert not (tmp_path / "report").exists()


def test_the_command_runs_from_a_bare_checkout(tmp_path: Path) -> None:
    """As a script, by a Python that has no dcdit installed: -I hides PYTHONPATH and the current folder."""
    command = [sys.executable, "-I", "benchmarks/gpu_report.py", "--rehearse", "--minutes", "1", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--only", "ceilings"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    last = Lines(tmp_path).last()
    assert {name: last[name]["state"] for name in ("ceilings: copy", "ceilings: product")} == {
        "ceilings: copy": DONE, "ceilings: product": DONE,
    }  # fmt: skip
    assert "its numbers mean nothing" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("target", ["gpu-report", "gpu-test"])
def test_make_installs_nothing_for_a_gpu(target: str) -> None:
    """A rented machine has no network: no virtual environment, no pip, the plain Python."""
    commands = subprocess.run(
        ["make", "--no-print-directory", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert re.match(r"python3 ", commands)
    assert "pip" not in commands and "venv" not in commands
