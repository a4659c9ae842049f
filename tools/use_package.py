"""Use an installed dcdit as its users would: `python -I tools/use_package.py`, outside of any checkout.

No extra is needed: everything here must run with the dependencies that the package itself names. `make package` runs it
on the wheel.
"""

import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import distribution
from pathlib import Path

import torch

import dcdit
from dcdit import checkpoint, ops
from dcdit.diffusion import sample
from dcdit.kernels import launch
from dcdit.models import DCDiT, create_model


def use() -> None:
    """Operations, a model on disk and back, a sample, the command line."""
    assert sysconfig.get_paths()["purelib"] in dcdit.__file__, dcdit.__file__
    assert distribution("dcdit").version == dcdit.__version__
    assert "gather" in launch.shipped_configs()

    x, p = torch.randn(2, 256, 64), torch.rand(2, 256)
    sel = ops.select_tokens(p, budget=128)
    y = ops.dechunk_spatial(ops.gather_tokens(x, sel), p, sel, grid=(16, 16), residual=x)
    assert y.shape == x.shape
    assert sel.lengths.tolist() == [128, 128]

    small = {"hidden_size": 128, "depth": 1, "num_heads": 2, "grid": (8, 8), "num_classes": 10}
    model = create_model("DC-DiT-S", **small).eval()
    assert isinstance(model, DCDiT)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save_model(Path(folder) / "model.safetensors", model)
        loaded = checkpoint.load_model(folder)
    images = sample(loaded, torch.tensor([3]), num_steps=2, method="ddim", drop_fraction=0.3)
    assert images.shape == (1, 4, 8, 8)
    assert bool(images.isfinite().all())

    command = Path(sysconfig.get_paths()["scripts"]) / "dcdit"
    for arguments in (["--version"], ["info"], ["train", "--list-configs"]):
        subprocess.run([command, *arguments], check=True, capture_output=True)


if __name__ == "__main__":
    use()
    print(f"dcdit {dcdit.__version__} works on Python {sys.version.split()[0]}: {Path(dcdit.__file__).parent}")
