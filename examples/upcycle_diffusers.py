"""A DC-DiT from a static DiT that is stored by diffusers: its transformer is copied, and trained further.

    python examples/upcycle_diffusers.py [FOLDER]      a pipeline of diffusers or its transformer, such as DiT-XL-2-256

Without a folder a small DiT with random weights is made and stored first. Training here is on crops of photographs;
``dcdit upcycle --from FOLDER --data latents --data-path ...`` is the same on latents, from the command line.
"""

import sys
import tempfile
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel

import dcdit
from dcdit.checkpoint import load_model, load_static_dit
from dcdit.config import load_config
from dcdit.models import DCDiT
from dcdit.models.upcycle import upcycled_fields
from dcdit.train import train


def small_dit(folder: Path) -> Path:
    """A DiT over 32 x 32 pixels with patches of 2, and a class for each of the six photographs."""
    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=3,
        out_channels=6,
        num_layers=2,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=6,
    )
    dit.save_pretrained(folder)
    return folder


def main(source: Path, out: Path, steps: int = 20) -> DCDiT:
    """The DC-DiT after so many steps, the first half of them with block distillation from the frozen DiT."""
    fields = upcycled_fields(load_static_dit(source).config)  # width, depth, heads, conventions: what must be equal
    overrides = {
        "model.num_classes": fields.pop("num_classes"),
        **{f"model.overrides.{name}": value for name, value in fields.items()},
        "diffusion.objective": "dit",  # what trained the source
        "upcycle.source": str(source),
        "upcycle.distill_steps": steps // 2,
        "optim.steps": steps,
        "optim.batch_size": 8,
        "router.group_size": None,
        "run.out": str(out),
        "run.eval_every": 0,
        "run.log_every": max(1, steps // 4),
    }
    result = train(load_config("photographs-cpu", overrides), callbacks=[print])
    return load_model(result.checkpoint)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        given = Path(sys.argv[1]) if len(sys.argv) > 1 else small_dit(Path(folder) / "dit")
        run = Path(folder) / "run"
        main(given, run)
        image = dcdit.load(run).generate(0, num_steps=10, drop_fraction=0.3)[0]
        image.resize((256, 256), resample=0).save("upcycled.png")
        print("wrote upcycled.png")
