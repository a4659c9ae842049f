"""Pictures: what they say can be read, and labels do not cover one another."""

import math
from itertools import pairwise

import pytest
from PIL import Image

from benchmarks.harness import pictures
from dcdit.profiling.plots import new_figure, plain_ticks, plot_quality, plot_times_faster, plot_training


def overlapping(axis) -> list[tuple[str, str]]:
    """Pairs of annotations whose boxes overlap."""
    renderer = axis.figure.canvas.get_renderer()
    axis.figure.draw(renderer)
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in axis.texts if text.get_text()]
    return [(a, b) for n, (a, first) in enumerate(boxes) for b, second in boxes[:n] if first.overlaps(second)]


def test_bars_say_their_numbers_without_overlap() -> None:
    figure, axis = new_figure(1, 1, figsize=(5.5, 4))
    names = [f"drop {n / 10:g}" for n in range(6)]
    faster = {"than patch 1": [4.0 + n for n in range(6)], "than patch 2": [0.7, 0.9, 1.0, 1.2, 1.3, math.nan]}
    cheaper = {"than patch 1": [4.1 + n for n in range(6)], "than patch 2": [0.8] * 6}
    plot_times_faster(axis, names, faster, cheaper)
    texts = [text.get_text() for text in axis.texts]
    assert len(texts) == 11 and "4 (FLOPs 4.1)" in texts and "0.7 (FLOPs 0.8)" in texts
    assert overlapping(axis) == []
    renderer = figure.canvas.get_renderer()
    inside = axis.get_window_extent(renderer)
    assert all(text.get_window_extent(renderer).x1 < inside.x1 for text in axis.texts)
    assert [label.get_text() for label in axis.get_yticklabels()] == names


def test_a_slower_side_is_left_of_the_line() -> None:
    _, axis = new_figure(1, 1, figsize=(4, 2))
    plot_times_faster(axis, ["a", "b"], {"than plain": [0.5, 2.0]})
    slow, fast = axis.patches
    assert sorted((slow.get_x(), slow.get_x() + slow.get_width())) == [0.5, 1]
    assert (fast.get_x(), fast.get_x() + fast.get_width()) == (1, 2)


@pytest.mark.parametrize("losses", [(0.14, 0.45), (0.23, 1.1), (0.05, 80.0)])
def test_a_loss_has_plain_ticks_that_do_not_touch(losses) -> None:
    figure, axis = new_figure(1, 1, figsize=(5, 4))
    axis.plot(losses)
    axis.set(yscale="log")
    plain_ticks(axis)
    figure.draw_without_rendering()
    lowest, highest = axis.get_ylim()
    labels = {label.get_text(): label.get_window_extent() for label in axis.get_yticklabels(which="both")}
    values = sorted(float(text) for text in labels if text)
    shown = [labels[f"{value:g}"] for value in values if lowest <= value <= highest]
    assert len(shown) >= 3
    assert all(below.y1 < above.y0 for below, above in pairwise(shown))


def test_compression_is_on_a_log_axis(tmp_path, monkeypatch) -> None:
    axes = []
    monkeypatch.setattr("dcdit.profiling.plots.new_figure", lambda *args, **options: kept(axes, *args, **options))
    natural = [0.0, 0.002, *[0.25] * 18]  # a cosine router may keep nothing at first
    log = [{"step": n, "loss": 1 / (n + 1), "natural": kept} for n, kept in enumerate(natural)]
    plot_training(log, 4.0, tmp_path / "training.png")
    assert axes[0][1].get_yscale() == "log" and axes[0][1].get_ylim()[0] == 1


def kept(axes, *args, **options):
    figure, made = new_figure(*args, **options)
    axes.append(made)
    return figure, made


@pytest.mark.parametrize(("timed", "panels"), [(True, 2), (False, 1)])
def test_quality_against_what_was_measured(timed, panels, tmp_path) -> None:
    times = {"ms": 3.0, "ms_error": 0.5} if timed else {}
    points = [
        {"quality": 0.2 + n, "quality_error": 0.1, "gflops": 2.0 - n, "label": f"drop {n}", **times} for n in (0, 1)
    ]
    plot_quality({"dc-dit": points, "static": points[:1]}, "loss", tmp_path / "quality.png")
    with Image.open(tmp_path / "quality.png") as picture:
        assert picture.width == panels * 715


def test_pictures_of_a_benchmark_page(tmp_path) -> None:
    ops = [
        {"op": op, "variant": variant, "ms": ms, "copy_share": 0.5, "label": "S"}
        for op in ("gather_tokens", "ratio_loss")
        for variant, ms in (("dcdit", 1.0), ("plain", 60.0), ("compiled", 0.5))
        if (op, variant) != ("ratio_loss", "compiled")
    ]
    pictures.plot_operations(ops, 40.0, tmp_path / "ops.png")
    times = {"16": 10.0, "64": 11.0}
    scaling = [{"op": f"op{n}", "direction": "forward", "ns_per_position": times} for n in range(6)]
    pictures.plot_scaling(scaling, tmp_path / "scaling.png")
    static = [{"variant": "static patch 1", "kept_fraction": None, "gflops": 4.0, "ms": 8.0}]
    dynamic = [{"variant": "drop 0", "kept_fraction": 0.25, "gflops": 1.0, "ms": 2.5}]
    pictures.plot_models({"S": static + dynamic}, tmp_path / "models.png")
    for name in ("ops", "scaling", "models"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            picture.verify()
