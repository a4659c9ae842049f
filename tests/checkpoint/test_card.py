"""Model cards: what a checkpoint knows stands in them, and what is damaged or unknown is left open."""

import json

import pytest
import torch
import yaml

from dcdit import checkpoint as ckpt
from dcdit.checkpoint.card import UNKNOWN
from dcdit.models import KeptShare, count_flops, create_model

TINY = {"hidden_size": 128, "depth": 1, "num_heads": 2, "grid": (8, 8), "num_classes": 3}
FACTS = {
    "model": "DC-DiT-S",
    "data": "folder of birds",
    "steps": 12_000,
    "flops": 3.5e15,
    "recipe": {"optim": {"lr": 0.003}},
    "measured": {"val_loss_ema": 0.2345, "kept": 0.25},
}


@pytest.fixture
def model():
    return create_model("DC-DiT-S", **TINY)


def line(card, name):
    (found,) = [text for text in card.splitlines() if text.startswith(f"- {name}: ")]
    return found.partition(": ")[2]


def test_a_card_says_what_is_known(model):
    model.objective = "flow"
    notes = {"training": json.dumps(FACTS), "class_names": '["bird", "cat", "dog"]'}
    card = ckpt.model_card(model, notes)
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "dcdit"
    assert body.lstrip().startswith("# DC-DiT-S\n")
    assert line(card, "classes") == "3 (bird, cat, dog)"
    assert line(card, "objective") == "flow"
    assert line(card, "data").startswith("folder of birds; ")
    assert line(card, "steps") == "12,000"
    assert line(card, "training compute").startswith("3.5e+15 FLOPs")
    assert line(card, "validation loss, averaged weights") == "0.2345"
    every, kept = (count_flops(model.config, length)["total"] / 1e9 for length in (64, 16))
    assert f"{every:.4g} GFLOPs with every position kept, {kept:.4g} with 25.0% of them" in card
    assert json.loads(card.split("```json")[1].split("```")[0]) == FACTS["recipe"]


def test_the_measured_share_goes_before_that_of_training(model):
    model.kept_share = KeptShare(0.5, 0.01, 0.6, 10)
    assert "with 50.0% of them" in ckpt.model_card(model, {"training": json.dumps(FACTS)})


def test_what_is_unknown_is_left_open():
    card = ckpt.model_card(create_model("DiT-S/2", **TINY))
    assert "# DiT\n" in card
    assert line(card, "data") == line(card, "steps") == line(card, "objective") == UNKNOWN
    assert "Nothing was measured in training." in card
    assert "kept" not in line(card, "a forward pass, per image")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "[" * 100_000, '{"measured": 3, "steps": "many", "flops": [], "data": {"a": 1}}'],
    ids=["empty", "cut", "list", "number", "deep", "types"],
)
def test_damaged_notes_are_left_out(model, text):
    card = ckpt.model_card(model, {"training": text, "class_names": text})
    assert line(card, "steps") == UNKNOWN
    assert line(card, "classes") == "3"


def test_notes_do_not_write_a_page_of_their_own(model):
    """Names and recipes may be of a stranger: they stay in their line, and in their block."""
    facts = {**FACTS, "data": "x\n# Licence: anything\x1b[31m", "recipe": {"a": "```\n# Licence: anything"}}
    card = ckpt.model_card(model, {"training": json.dumps(facts)})
    assert not any(text.startswith("# Licence") for text in card.splitlines())
    assert "\x1b" not in card
    assert card.count("```") == 4


def test_every_checkpoint_has_a_card(model, tmp_path):
    optimizer = torch.optim.AdamW(model.parameters())
    folder = ckpt.checkpoint_path(tmp_path, 1)
    ckpt.save_checkpoint(folder, model, model.state_dict(), optimizer, {"step": 1}, {"training": json.dumps(FACTS)})
    card = folder / "README.md"
    assert line(card.read_text(), "steps") == "12,000"
    assert ckpt.is_checkpoint(folder)
    card.unlink()  # an earlier version wrote none
    assert ckpt.is_checkpoint(folder)
    ckpt.load_checkpoint(folder)
    card.write_text("# My notes\n")  # somebody's own page is never deleted with the checkpoint
    assert not ckpt.is_checkpoint(folder)
