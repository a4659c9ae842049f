"""``dcdit demo``, made small: its report says how the timings were measured, and marks them where they are noise."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dcdit.cli import demo
from dcdit.config import load_config
from dcdit.profiling import profile as profile_module

DOUBT = "threads waited for a processor 70% of the time: other work runs on this machine"


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a demo on a busy machine."""
    out = tmp_path_factory.mktemp("demo")
    measure = profile_module.profile

    def config(data: str, folder: Path, minutes: float, seed: int = 0):
        small = {"model.overrides.depth": 1, "router.group_size": None}
        run = {"run.out": str(folder), "run.log_every": 1, "run.eval_every": 0, "optim.steps": 2, "optim.batch_size": 2}
        return load_config(f"{data}-cpu", {**small, **run})

    def busy(*args, **options):
        return replace(measure(*args, **options, seconds=0.01), reliable=False, waited=0.7, warnings=[DOUBT])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "demo_config", config)
        patch.setattr(demo, "SAMPLING_STEPS", 1)
        patch.setattr(demo, "SAMPLES_PER_CLASS", 1)
        patch.setattr(demo, "STUDY_IMAGES", 3)
        patch.setattr(demo, "TIMED_IMAGES", 2)
        patch.setattr(profile_module, "profile", busy)
        page = demo.demo("digits", out, minutes=1.0)
    return page.parent


@pytest.fixture(scope="module")
def report(small_demo: Path) -> tuple[str, dict]:
    """Its report and demo.json."""
    return (small_demo / "report.md").read_text(), json.loads((small_demo / "demo.json").read_text())


def test_noise_is_said_before_the_tables(report) -> None:
    page, _ = report
    timing = page[page.index("## Time against the static DiT") :]
    assert timing.index("UNRELIABLE") < timing.index(DOUBT) < timing.index("| model")
    assert "Threads waited for a processor 70% of the time" in timing
    assert timing.count("unreliable (") == 2 * len(demo.DROP_FRACTIONS)


def test_the_whole_has_its_flops(report) -> None:
    page, facts = report
    (row,) = (line for line in page.splitlines() if line.startswith("| whole"))
    dynamic = [v for v in facts["profile"]["variants"] if v["stage_ms"]]
    cells = [cell.strip() for cell in row.strip("|").split("|")][1:]
    assert cells[2::3] == [f"{v['gflops']:.2f}" for v in dynamic]
    assert facts["profile"]["reliable"] is False


def test_too_few_steps_are_said_first(report) -> None:
    page, facts = report
    needed = demo.DATA["digits"].readable
    assert facts["steps"] == 2 < needed
    assert page.index("TOO SHORT: 2 training steps") < page.index("A DC-DiT with")
    assert f"`dcdit demo --minutes {needed // 2}`" in page  # two steps took the one minute
    assert demo.DATA["digits"].too_few(needed - 1, 4.0).endswith("--minutes 5`.")
    assert not demo.DATA["digits"].too_few(needed, 4.0)
    assert not demo.DATA["photographs"].too_few(1, 4.0)


def test_every_picture_is_there(report) -> None:
    page, _ = report
    assert page.count("![") == 4 + len(demo.DROP_FRACTIONS)


def test_samples_are_labelled_columns_of_a_class(report, small_demo) -> None:
    _, facts = report
    with Image.open(small_demo / facts["samples"]["0.3"]["file"]) as sheet:
        classes = len(facts["class_names"])
        assert sheet.width == classes * 128 + (classes - 1) * 4
        assert sheet.height > 128 and sheet.height < 160  # one image and its name
    with Image.open(small_demo / "steps.webp") as animation:
        assert animation.width > classes * 128
