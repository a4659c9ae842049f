"""The benchmark code itself: wrong results are errors, pages say what was left out, old results still read."""

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from benchmarks import bench_scaling
from benchmarks.baselines import apex, mamba, official
from benchmarks.harness import report, sets, suite
from benchmarks.harness.equality import NotEqualError, check_accurate, check_equal, check_kept
from benchmarks.harness.summary import summarise
from benchmarks.harness.traffic import least_bytes, least_flops
from dcdit.models import DCDiT, DCDiTConfig
from dcdit.profiling.calibrate import calibrate_router, varied_latents
from dcdit.profiling.workloads import CASES, Shape, create_workload, run_forward

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SHAPE = Shape(3, (5, 7), 32, 0.4, torch.float32, CPU)


def test_a_batch_of_one_keeps_the_fraction() -> None:
    workload = create_workload("gather_tokens", SHAPE._replace(batch=1, grid=(40, 40), keep=0.25))
    assert float(workload.arguments["sel"].mask.float().mean()) == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize(
    "wrong",
    [
        [torch.ones(3)],
        [torch.ones(3), torch.ones(2, dtype=torch.int64)],
        [torch.ones(3) * 1.01, torch.ones(2, dtype=torch.bool)],
        [torch.tensor([1.0, float("nan"), 1.0]), torch.ones(2, dtype=torch.bool)],
        [torch.ones(3), torch.tensor([True, False])],
    ],
)
def test_unequal_results_are_an_error(wrong: list[torch.Tensor]) -> None:
    right = [torch.ones(3), torch.ones(2, dtype=torch.bool)]
    check_equal("same", right, right, 1e-4)
    if wrong[-1].dtype == torch.int64:
        wrong[-1] += 1
    with pytest.raises(NotEqualError, match="variant"):
        check_equal("variant", wrong, right, 1e-4)


def test_a_result_may_be_off_by_twice_what_plain_pytorch_is() -> None:
    exact, plain = [torch.ones(4, dtype=torch.float64)], [torch.full((4,), 1.1)]
    check_accurate("same", [torch.full((4,), 1.19)], plain, exact, 1e-4)
    check_accurate("same", [torch.full((4,), 1.00009)], exact, exact, 1e-4)
    with pytest.raises(NotEqualError, match="variant, result 0"):
        check_accurate("variant", [torch.full((4,), 1.21)], plain, exact, 1e-4)
    with pytest.raises(NotEqualError, match="variant"):
        check_accurate("variant", [torch.full((4,), 1.001)], exact, exact, 1e-4)
    with pytest.raises(NotEqualError, match="2 results, expected 1"):
        check_accurate("variant", [torch.ones(4), torch.ones(4)], exact, exact, 1e-4)


def test_only_tokens_at_the_cut_may_be_kept_by_one_side_alone() -> None:
    right = torch.tensor([[0.9, 0.5001, 0.1], [0.9, 0.8, 0.1]])
    prob = right - torch.tensor([[0.0, 0.0002, 0.0], [0.0, 0.0, 0.0]])
    same = check_kept("masks", prob, prob > 0.5, right, right > 0.5, 1e-3)
    assert same.tolist() == [False, True]
    with pytest.raises(NotEqualError, match=r"off by 2.0e-04, allowed 1e-04"):
        check_kept("masks", prob, prob > 0.5, right, right > 0.5, 1e-4)
    away = right > 0.5
    away[1, 0] = False
    with pytest.raises(NotEqualError, match="1 tokens away from the cut"):
        check_kept("masks", prob, away, right, right > 0.5, 1e-3)
    with pytest.raises(NotEqualError, match="no image keeps the same tokens, of 1"):
        check_kept("masks", prob[:1], prob[:1] > 0.5, right[:1], right[:1] > 0.5, 1e-3)


def test_least_bytes_of_a_gather_are_the_kept_rows() -> None:
    workload = create_workload("gather_tokens", SHAPE)
    x, sel, bias = workload.arguments.values()
    kept = sel.indices.shape[0] * 32 * 4
    indices = sel.indices.shape[0] * 8 + 4 * 4
    table = min(sel.indices.shape[0], 35) * 32 * 4
    outputs = workload.forward()
    assert least_bytes(workload, outputs, backward=False) == 2 * kept + table + indices
    assert least_bytes(workload, outputs, backward=True) == 3 * kept + table + 2 * indices + x.numel() * 4
    assert bias.shape == (35, 32)


@pytest.mark.parametrize("name", CASES)
def test_nothing_moves_less_than_the_least(name: str) -> None:
    """The outputs alone are fewer bytes, and a backward adds bytes."""
    workload = create_workload(name, SHAPE)
    outputs = run_forward(workload.call)
    forward = least_bytes(workload, outputs, backward=False)
    assert forward > sum(t.numel() * t.element_size() for t in outputs)
    if workload.differentiable:
        assert least_bytes(workload, outputs, backward=True) > forward


def test_flops_of_smoothing_count_pairs_in_reach() -> None:
    workload = create_workload("dechunk_spatial", SHAPE)
    lengths = workload.arguments["sel"].lengths.long()
    assert least_flops(workload) == 2 * 32 * int((lengths**2).sum())  # 6 sigma covers the grid
    assert least_flops(create_workload("gather_tokens", SHAPE)) is None


def test_an_absent_baseline_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(official.VARIABLE, raising=False)
    assert official.VARIABLE in str(official.reason_unavailable())
    assert "mamba_ssm" in str(mamba.reason_unavailable(CPU))
    assert "apex" in str(apex.reason_unavailable(CPU))


def test_a_wrong_checkout_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(official.VARIABLE, str(tmp_path))
    with pytest.raises(ValueError, match="accepted: a checkout of AMD-AGI/DynamicChunkingDiT"):
        official.reason_unavailable()


@pytest.mark.skipif(official.VARIABLE not in os.environ, reason=f"{official.VARIABLE} names no checkout")
def test_the_reference_implementation_agrees_and_a_difference_shows() -> None:
    torch.manual_seed(0)
    model = DCDiT(DCDiTConfig(grid=(8, 8), hidden_size=128, depth=2, num_heads=4, num_classes=10)).eval()
    official.randomize_zeros(model)
    batch = varied_latents(2, 4, (8, 8)), torch.tensor([3, 700]), torch.tensor([1, 2])
    calibrate_router(model, *batch, 0.3)
    other = official.build_verified(model, *batch, 0.2)
    assert {"config", "models", "hnet"}.isdisjoint(
        name
        for name, module in sys.modules.items()
        if (getattr(module, "__file__", "") or "").startswith(os.environ[official.VARIABLE])
    )
    with torch.no_grad():
        model.final_layer.linear.weight.mul_(1.1)
    with pytest.raises(NotEqualError, match="output of the reference implementation"), torch.no_grad():
        check_equal("output of the reference implementation", [other(*batch)[0]], [model(*batch)], official.AGREEMENT)


def test_an_unknown_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCDIT_BENCH", "everything")
    with pytest.raises(ValueError, match="DCDIT_BENCH is 'everything'; accepted: tiny, reduced, gpu, full"):
        sets.chosen_set()


def test_the_full_set_holds_every_shape() -> None:
    shapes = {(size.shape.width, size.shape.grid, size.shape.keep) for size in sets.op_sizes("full")}
    assert len(shapes) == 3 * 3 * 3
    assert {size.shape.grid for size in sets.op_sizes("reduced")} == {(32, 32), (64, 64), (128, 128)}


def run_benchmarks(tmp_path: Path, *arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess, Path]:
    out = tmp_path / "raw.json"
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # of xdist too
    command = [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"--benchmark-json={out}", *arguments],
        cwd=ROOT, capture_output=True, text=True,
        env={**outside, "DCDIT_BENCH": "tiny", "OMP_NUM_THREADS": "1", official.VARIABLE: "", **environment},
    )  # fmt: skip
    return done, out


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess, Path]:
    """A run that also saved its results as ``before``, beside raw.json."""
    folder = tmp_path_factory.mktemp("saved")
    chosen = ("-k", "dechunk_ema-forward-tiny or (inference and (patch or drop))")
    return run_benchmarks(folder, *chosen, f"--benchmark-storage={folder}", "--benchmark-save=before")


def test_collected_without_other_flags_and_reported(
    saved: tuple[subprocess.CompletedProcess, Path], tmp_path: Path
) -> None:
    done, out = saved
    assert done.returncode == 0, done.stdout
    assert "left out: mamba_ssm" in done.stdout
    assert re.search(r"^\| dechunk_ema forward tiny +\|", done.stdout, re.MULTILINE)
    head = next(line for line in done.stdout.splitlines() if line.startswith("Name (time in"))
    assert head.split()[-2:] == ["Median", "IQR"]
    assert "UNSERIALIZABLE" not in out.read_text()
    raw = json.loads(out.read_text())
    assert not any(" " in benchmark["fullname"] for benchmark in raw["benchmarks"])
    assert set(raw["dcdit"]["left_out"]) == {"mamba_ssm", "official"}
    rows = [benchmark["extra_info"] for benchmark in raw["benchmarks"]]
    ours = next(row for row in rows if row["kind"] == "op" and row["variant"] == "dcdit")
    assert ours["copy_share"] == pytest.approx(ours["gbps"] / raw["dcdit"]["copy_gbps"])
    assert ours["bytes"] > 0
    assert ours["peak_bytes"] > 0
    assert ours["host_us"] > 0
    if not torch.cuda.is_available():
        assert ours["launches"] is ours["host_syncs"] is ours["graph_ms"] is ours["graph_spread"] is None
    page = report.write(report.read([out]), tmp_path / "page")
    text = page.read_text()
    assert "Left out: mamba_ssm (" in text
    assert "eta vs static patch 1" in text
    assert "stages / whole" in text
    for picture in page.parent.glob("*.png"):
        assert picture.name in text
    assert len(list(page.parent.glob("*.png"))) == 2


def test_two_runs_compare_by_name(saved: tuple[subprocess.CompletedProcess, Path], tmp_path: Path) -> None:
    """Also where the set comes from the option, and with the columns that were asked for."""
    compare = ("--benchmark-compare", "--benchmark-compare-fail=min:100000%", f"--benchmark-storage={saved[1].parent}")
    options = ("-k", "dechunk_ema-forward-tiny", "--benchmark-columns=min,rounds", "--bench-set", "tiny")
    done, _ = run_benchmarks(tmp_path, *options, *compare, DCDIT_BENCH="full")
    assert done.returncode == 0, done.stdout
    for name in ("plain", "dcdit"):
        for run in ("NOW", "0001_before"):
            assert re.search(rf"\[dechunk_ema-forward-tiny-{name}\] \({run}\)", done.stdout), done.stdout
    assert "Median" not in done.stdout


def test_names_of_cases_are_unique_and_hold_no_space() -> None:
    outside = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "benchmarks/", "--collect-only", "-q", "--bench-set", "full"]
    done = subprocess.run([*command, "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True, env=outside)
    cases = [line for line in done.stdout.splitlines() if line.startswith("benchmarks/")]
    assert len(cases) > 100
    assert len(set(cases)) == len(cases)
    assert not any(" " in case for case in cases)


def test_the_summary_says_how_many_times_faster() -> None:
    op = {"kind": "op", "op": "gather_tokens", "direction": "forward", "label": "S 256px"}
    model = {"kind": "model", "scale": "S", "size": 256, "batch": 2, "direction": "inference"}
    rows = [
        {**op, "variant": "dcdit", "ms": 2.0, "spread": 0.01},
        {**op, "variant": "plain", "ms": 3.0, "spread": 0.04},
        {**op, "variant": "compiled", "ms": 1.0, "spread": 0.02},
        {**op, "op": "scatter_tokens", "variant": "dcdit", "ms": 4.0, "spread": 0.03},
        {**op, "op": "scatter_tokens", "variant": "plain", "ms": 4.0, "spread": 0.0},
        {**op, "op": "ratio_loss", "variant": "plain", "ms": 1.0, "spread": 0.0},
        {**model, "variant": "static patch 2", "kept_fraction": None, "ms": 30.0, "spread": 0.2},
        {**model, "variant": "drop 0.2", "kept_fraction": 0.2, "ms": 20.0, "spread": 0.1},
    ]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in summarise(rows).splitlines()]
    assert ["S 256px batch 2 inference drop 0.2", "20.0", "1.50", "±20%"] in cells
    assert ["operation", "ms", "plain", "compiled", "spread"] in cells
    assert ["gather_tokens forward S 256px", "2.000", "1.50", "0.50", "±4%"] in cells
    assert ["scatter_tokens forward S 256px", "4.000", "1.00", "", "±3%"] in cells
    assert not any("ratio_loss" in line[0] for line in cells)  # nothing of ours to compare with
    assert summarise(rows[:1]) == ""


def test_what_starts_past_the_deadline_is_skipped(tmp_path: Path) -> None:
    done, out = run_benchmarks(tmp_path, "-k", "ratio_loss", DCDIT_BENCH_SECONDS="0.000001")
    assert done.returncode == 0, done.stdout
    assert "4 skipped" in done.stdout
    assert "left out: cases past the time limit (DCDIT_BENCH_SECONDS is 0.000001)" in done.stdout
    assert not out.exists() or not out.read_text()


def test_a_wrong_variant_is_an_error_and_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import bench_ops

    size = next(sets.op_sizes("tiny"))
    made = bench_ops.comparison_of("scatter_tokens", size.shape, "forward")
    made.timed["dcdit"] = lambda: (torch.zeros_like(made.timed["plain"]()[0]),)
    with pytest.raises(NotEqualError, match="scatter_tokens on dcdit: result 0 is off"):
        bench_ops.check_variant("scatter_tokens", "dcdit", made, torch.float32)
    bench_ops.comparison_of.cache_clear()


def test_a_16_bit_variant_may_be_off_by_twice_what_plain_pytorch_is() -> None:
    from benchmarks import bench_ops

    shape = sets.tiny_shape()._replace(dtype=torch.bfloat16)
    made = bench_ops.comparison_of("gated_add_modulated_layer_norm", shape, "forward+backward")
    exact = made.exact
    assert exact is not None and {result.dtype for result in exact} == {torch.float64}
    assert [result.dtype for result in made.expected] == [torch.bfloat16] * len(exact)
    for variant in ("dcdit", "plain"):
        bench_ops.check_variant("gated_add_modulated_layer_norm", variant, made, shape.dtype)

    coarse = made._replace(expected=tuple(1.1 * result for result in exact))  # plain PyTorch is off by a tenth
    for error, accepted in ((0.19, True), (0.21, False)):
        made.timed["dcdit"] = lambda error=error: tuple((1 + error) * result for result in exact)
        with nullcontext() if accepted else pytest.raises(NotEqualError, match=r"is off by 2\.1e-01, allowed 2e-01"):
            bench_ops.check_variant("gated_add_modulated_layer_norm", "dcdit", coarse, shape.dtype)
    bench_ops.comparison_of.cache_clear()


def test_eta_of_a_report_is_the_definition() -> None:
    rows = [
        {"variant": "static patch 1", "kept_fraction": None, "ms": 100.0, "gflops": 10.0},
        {"variant": "drop 0", "kept_fraction": 0.25, "ms": 50.0, "gflops": 4.0},
    ]
    assert report.etas(rows) == {"drop 0": {"static patch 1": pytest.approx((100 / 50) / (10 / 4))}}


@pytest.mark.parametrize(("spread", "marked"), [(0.03, False), (0.4, True)])
def test_a_page_marks_eta_where_the_times_scatter(spread: float, marked: bool, tmp_path: Path) -> None:
    common = {"kind": "model", "scale": "S", "size": 64, "batch": 1, "direction": "inference", "images_per_s": 1.0}
    common |= {"stage_ms": None, "stage_gflops": {}, "peak_bytes": None, "optimizer_ms": 7.0, "optimizer_spread": 0.12}
    rows = [
        {"variant": "static patch 1", "kept_fraction": None, "ms": 100.0, "gflops": 10.0, "spread": spread},
        {"variant": "drop 0", "kept_fraction": 0.25, "ms": 50.0, "gflops": 4.0, "spread": 0.01},
    ]
    rows[1] |= {"stage_ms": {"encoder": 30.0, "whole": 50.0}, "stage_spread": {"encoder": 0.23, "whole": 0.34}}
    found = {"conditions": conditions(), "left_out": {}, "day": "d", "model": [], "op": [], "scaling": []}
    page = report.write({**found, "model": [common | row for row in rows]}, tmp_path).read_text()
    assert all(text in page for text in (f"{spread:.1%}", "7.0 ±12%", "30.00 ±23%", "50.00 ±34%"))
    assert ("UNRELIABLE: the times of static patch 1 scatter" in page) == marked
    assert (" unreliable |" in page) == marked
    assert ("eta 0.80 against static patch 1" in page) != marked


def conditions(**changes: object) -> dict:
    known = {"device": "X (R) 1", "threads": 1, "torch": "2", "dtype": "float32", "set": "tiny", "copy_gbps": 9.0}
    return {**known, "left_out": {}, **changes}


def test_scaling_reaches_the_page(tmp_path: Path) -> None:
    out = tmp_path / "bench_scaling.json"
    arguments = ["--op", "ratio_loss", "select_tokens", "--side", "4", "8", "--width", "32", "--seconds", "0.01"]
    assert bench_scaling.main([*arguments, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["scaling"]
    assert [(row["op"], row["direction"]) for row in rows] == [
        ("ratio_loss", "forward"), ("ratio_loss", "forward+backward"), ("select_tokens", "forward"),
    ]  # fmt: skip
    found = report.read([out])
    assert all(row["spread"].keys() == row["ns_per_position"].keys() == {"4", "8"} for row in rows)
    for row, spread in zip(found["scaling"], (0.02, 0.3, 0.1), strict=True):
        row["spread"] = {"4": spread, "8": 0.01}
    page = report.write(found, tmp_path)
    lines = page.read_text().splitlines()
    assert "UNRELIABLE: the times of ratio_loss forward+backward scatter by more than ±10%." in lines
    assert [line.split("|")[-2].strip() for line in lines if line.startswith("| ratio_loss")] == ["2%", "30%"]
    assert f"GB/s (±{found['conditions']['copy_spread']:.0%})." in page.read_text()
    assert page.with_name(f"{page.stem}-scaling.png").is_file()


def test_scaling_refuses_an_empty_grid() -> None:
    with pytest.raises(ValueError, match=r"sides is \[0, 4\]; accepted"):
        bench_scaling.measure("ratio_loss", [0, 4], 32, 0.5, 0.01)


def test_results_of_earlier_versions_still_read(tmp_path: Path) -> None:
    path = tmp_path / "raw.json"
    row = {"kind": "model", "side": "drop 0.2", "kept_share": 0.25}
    growth = [{"op": "ratio_loss", "direction": "forward"}]
    raw = {"dcdit": conditions(), "benchmarks": [{"extra_info": row}], "growth": growth}
    path.write_text(json.dumps(raw))
    found = report.read([path])
    assert found["model"] == [{"kind": "model", "variant": "drop 0.2", "kept_fraction": 0.25}]
    assert found["scaling"] == growth


@pytest.mark.parametrize("content", ["", "not json", "[]", "{}", '{"benchmarks": []}'])
def test_a_foreign_file_is_one_line(content: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "raw.json"
    path.write_text(content)
    assert report.main([str(path), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"report: error: {path} holds no results")
    assert error.count("\n") == 1


def test_a_missing_file_is_one_line(tmp_path: Path, capsys) -> None:
    assert report.main([str(tmp_path / "absent.json")]) == 2
    assert "absent.json" in capsys.readouterr().err


def test_two_machines_do_not_mix(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, device in zip(paths, ("X", "Y"), strict=True):
        path.write_text(json.dumps({"dcdit": conditions(device=device)}))
    with pytest.raises(ValueError, match="has device Y; accepted: X"):
        report.read(paths)


def test_the_page_is_named_after_device_and_day(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"dcdit": conditions(), "datetime": "2026-01-02T03:04:05"}))
    assert report.write(report.read([path]), tmp_path).name == "X-R-1-2026-01-02.md"


def test_suite_writes_what_it_has_when_a_part_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = json.dumps({"dcdit": conditions()})
    good = f"import sys; open(sys.argv[1].split('=')[1], 'w').write({raw!r})"
    parts = {
        "good": (0.5, ["-c", good]),
        "bad": (0.3, ["-c", "raise SystemExit(3)"]),
        "slow": (0.2, ["-c", "while 1: 0"]),
    }
    monkeypatch.setattr(suite, "PARTS", parts)
    assert suite.run_parts(0.05, tmp_path / "raw", tmp_path / "page") == 2
    assert [path.suffix for path in (tmp_path / "page").iterdir()] == [".md"]
