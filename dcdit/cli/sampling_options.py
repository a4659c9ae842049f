"""The options of sampling, which ``dcdit sample`` and ``dcdit evaluate`` share."""

from collections.abc import Callable
from typing import Any

from dcdit.diffusion import METHODS
from dcdit.diffusion.drop_schedules import FORMS


def add_sampling_options(add: Callable[..., Any], budgets: int | str) -> None:
    """Add them to a parser or a group through its ``add_argument``.

    Args:
        budgets: how many drop fractions or schedules a command takes, as argparse's ``nargs``.
    """
    several = "; one picture each" if budgets == "+" else " (default 0)"
    add("--no-ema", action="store_true", help="take the last weights instead of the averaged ones")
    add(
        "--drop-fraction",
        type=float,
        nargs=budgets,
        metavar="RHO",
        help=f"share of kept tokens to drop, in [0, 1){several}",
    )
    add("--drop-schedule", nargs=budgets, metavar="SHAPE", help=f"one that changes on the way, from noise on: {FORMS}")
    add("--null-drop-fraction", type=float, metavar="RHO", help="another one for the unconditional branch (Lite-CFG)")
    add("--budget", type=int, metavar="K", help="keep exactly K tokens per image instead")
    add("--steps", type=int, default=250, help="sampling steps (default 250)")
    add("--method", choices=METHODS, help="default: ddpm, or heun for a model trained with the flow objective")
    add("--cfg-scale", type=float, default=1.0, metavar="S", help="classifier-free guidance; 1 is none (default 1)")
    add(
        "--cfg-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide at these times only; 1 is noise, 0 data (default 0 1)",
    )
    add("--batch-size", type=int, default=16, metavar="N", help="images per forward pass (default 16)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="dtype of the weights (default fp32)")
    add("--vae", metavar="DIR", help="local diffusers AutoencoderKL that turns latents into pixels")
