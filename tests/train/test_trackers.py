"""TensorBoard and other trackers: records, samples, and the errors of what is missing."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
from support.runs import assert_same_weights, records

from dcdit import checkpoint as ckpt
from dcdit.config import override
from dcdit.train import train
from dcdit.train.trackers import Trackers


def test_tensorboard_shows_the_records_of_a_resumed_run(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = config("run.trackers=[tensorboard]", "run.checkpoint_every=1", "run.eval_every=2")
    result = train(settings)
    again = train(settings, resume=ckpt.checkpoint_path(settings.run.out, 1))
    shown = EventAccumulator(str(result.log.parent / "dcdit"))
    shown.Reload()
    for key in ("loss", "kept", "grad_norm", "val_loss", "flops"):
        found = [(event.step, event.value) for event in shown.Scalars(key)]
        assert found == [(r["step"], pytest.approx(r[key])) for r in records(again) if key in r], key


@pytest.mark.parametrize("objective", ["flow", "dit"])
def test_tensorboard_shows_samples_and_they_change_nothing(config, objective, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    common = (f"diffusion.objective={objective}", "run.eval_every=0", "optim.steps=4", "run.trackers=[tensorboard]")
    plain = train(override(config(*common), {"run.out": str(tmp_path / "plain")}))
    drawn = train(override(config(*common, "run.sample_every=2"), {"run.out": str(tmp_path / "drawn")}))
    assert_same_weights(plain.checkpoint, drawn.checkpoint)
    shown = EventAccumulator(str(drawn.log.parent / "dcdit"))
    shown.Reload()
    for name in ("samples", "kept_tokens"):
        pictures = shown.Images(name)
        assert [picture.step for picture in pictures] == [2, 4]
        assert pictures[0].width == 4 * 128 + 3 * 4 and pictures[0].height > 2 * 128
        assert pictures[0].encoded_image_string != pictures[1].encoded_image_string


def test_each_tracker_gets_images_as_it_takes_them():
    """TensorBoard wants to know the order of the axes; Weights & Biases makes an image of each entry."""
    sent = {}

    class Tracker(SimpleNamespace):
        def log_images(self, values, step, **options):
            sent[self.name] = ({name: pictures.shape for name, pictures in values.items()}, step, options)

    trackers = Trackers.__new__(Trackers)
    trackers.accelerator = SimpleNamespace(trackers=[Tracker(name="tensorboard"), Tracker(name="wandb")])
    trackers.write_images({"samples": np.zeros((5, 6, 3), dtype=np.uint8)}, 7)
    shapes = {"samples": (1, 5, 6, 3)}
    assert sent == {"tensorboard": (shapes, 7, {"dataformats": "NHWC"}), "wandb": (shapes, 7, {})}


def test_samples_need_a_tracker(config):
    with pytest.raises(ValueError, match=r"^run.sample_every is 2 and run.trackers names none; accepted: 0, or a tra"):
        train(config("run.sample_every=2"))


def test_trackers_that_are_missing(config, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"^run\.trackers names wandb, which is not installed: pip install "):
        train(config("run.trackers=[wandb]"))
