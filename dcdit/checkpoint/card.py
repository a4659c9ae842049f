"""The model card of a checkpoint: a README.md, as the Hugging Face Hub shows it, with all that the checkpoint knows.

What only people know (licence, where the data comes from, what the model is for) is left to be filled in.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dcdit import __version__
from dcdit.checkpoint.model import Model, architecture_of, model_notes
from dcdit.models import DCDiT, count_flops
from dcdit.utils.reading import open_regular, parse_json
from dcdit.utils.text import printable

CARD_FILE = "README.md"
HEAD = "---\nlibrary_name: dcdit\n"
"""How every card begins, by which one is known as ours."""
TRAINING = "training"
"""Note of a checkpoint with what is known of its training: JSON with ``model``, ``data``, ``steps``, ``flops``,
``recipe`` and ``measured``."""
MEASURED = {
    "val_loss_ema": "validation loss, averaged weights",
    "val_loss": "validation loss, last weights",
    "loss": "training loss",
    "kept": "share of the positions kept in training",
}
"""Metrics of log.jsonl in a card, in words."""
LOAD = """import dcdit

model = dcdit.load("PATH")  # this folder, or its id on the Hub
images = model.generate([0], num_steps=50, seed=0)"""
"""How a checkpoint is used."""
UNKNOWN = "*to be filled in*"
CARD = """{head}tags:
- dcdit
- diffusion
- image-generation
---

# {title}

Written by dcdit {version} from what the checkpoint knows. Where it says {unknown}, please say it.

## Use

```python
{use}
```

## Model

{model}

## Data and training

{training}
{recipe}
## Quality

{quality}

FID, Inception Score, precision and recall: {unknown} (`dcdit evaluate`; say the number of images).

## Use, limits, licence

{unknown}: what the model is for and what it must not be used for, the licence of the data and of the weights.

## Citation

DC-DiT: Haridas et al., *DC-DiT: Adaptive Compute and Elastic Inference for Visual Generation via Dynamic Chunking*,
[arXiv 2603.06351](https://arxiv.org/abs/2603.06351), 2026.
"""


def model_card(model: Model, notes: Mapping[str, str] | None = None, use: str = LOAD) -> str:
    """The text of the card of a model.

    Args:
        notes: of its checkpoint (:func:`dcdit.checkpoint.read_metadata`). They may be of a stranger, or damaged: what
            cannot be read is left out.
        use: Python that loads the model and draws an image.

    Example:
        >>> from dcdit.checkpoint.card import model_card
        >>> from dcdit.models import create_model
        >>> card = model_card(create_model("DiT-S/2", num_classes=2), {"class_names": '["cat", "dog"]'})
        >>> [line for line in card.splitlines() if line.startswith("- ")][4:6]
        ['- input: 4 channels of 32 x 32', '- classes: 2 (cat, dog)']
    """
    notes = {**model_notes(model), **(notes or {})}
    facts = _mapping(_parsed(notes.get(TRAINING)))
    measured = _mapping(facts.get("measured"))
    quality = {
        words: f"{number:.4g}" for key, words in MEASURED.items() if (number := _number(measured.get(key))) is not None
    }
    recipe = facts.get("recipe")
    block = f"\nThe configuration, where it is not the default:\n\n```json\n{_block(recipe)}\n```\n" if recipe else ""
    return CARD.format(
        head=HEAD,
        title=_text(facts.get("model") or architecture_of(model)),
        version=__version__,
        unknown=UNKNOWN,
        use=use,
        model=_list(_model_facts(model, notes, _number(measured.get("kept")))),
        training=_list(_training_facts(facts)),
        recipe=block,
        quality=_list(quality) if quality else "Nothing was measured in training.",
    )


def is_card(path: Path) -> bool:
    """Whether a file begins as a card of this package does."""
    with open_regular(path) as file:
        return file.read(len(HEAD)) == HEAD.encode()


def _model_facts(model: Model, notes: Mapping[str, str], kept: float | None) -> dict[str, str]:
    config = model.config
    height, width = config.grid
    size = sum(parameter.numel() for parameter in model.parameters())
    flops = f"{count_flops(config)['total'] / 1e9:,.4g} GFLOPs"
    if isinstance(model, DCDiT):
        kept = kept if model.kept_share is None else model.kept_share.mean
        flops += " with every position kept"
        if kept is not None and 0 < kept <= 1:
            length = max(1, round(kept * height * width))
            flops += f", {count_flops(model.config, length)['total'] / 1e9:,.4g} with {kept:.1%} of them"
    names = _parsed(notes.get("class_names"))
    named = f" ({_text(', '.join(map(str, names)))})" if isinstance(names, list) and names else ""
    return {
        "architecture": f"{architecture_of(model)}, {size:,} parameters",
        "input": f"{config.in_channels} channels of {height} x {width}",
        "classes": f"{config.num_classes:,}{named}",
        "objective": _text(notes.get("objective", UNKNOWN)),
        "a forward pass, per image": f"{flops} (2 per multiply-add)",
    }


def _training_facts(facts: Mapping[str, Any]) -> dict[str, str]:
    data, steps, flops = facts.get("data"), _number(facts.get("steps")), _number(facts.get("flops"))
    return {
        "data": f"{_text(data)}; its origin and licence: {UNKNOWN}" if data else UNKNOWN,
        "steps": UNKNOWN if steps is None else f"{steps:,}",
        "training compute": UNKNOWN if flops is None else f"{flops:.4g} FLOPs (2 per multiply-add)",
    }


def _list(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {fact}" for name, fact in facts.items())


def _text(value: object) -> str:
    return printable(value, 300)


def _block(value: object) -> str:
    """JSON that cannot end the code block it stands in."""
    return json.dumps(value, indent=2).replace("`", "'")


def _parsed(text: str | None) -> Any:
    try:
        return None if text is None else parse_json(text, "a note")
    except ValueError:
        return None


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
