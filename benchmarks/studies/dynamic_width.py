"""Does dynamic width become time? DyDiT, and DC-DiT with dynamic width, against the same models of fixed width.

``python -m benchmarks.studies.dynamic_width --out FILE`` checks that sliced and masked outputs are equal, times forward
passes of all sides in turns (:mod:`benchmarks.studies.conversion`), and writes a page. The weights are random. The
gates are set to leave chosen shares of heads, MLP groups and tokens; which ones changes with timestep and token.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.studies.conversion import Side, conditions, difference, fill_zero_weights, time_sides
from dcdit.models import DCDiT, SlicedModel, create_model
from dcdit.nn.memory_format import channels_last
from dcdit.profiling.calibrate import calibrate_gates, calibrate_router, varied_latents
from dcdit.sample.model_calls import call_times
from dcdit.utils.files import write_text

TIMES = (750, 250)
"""Timesteps of the passes that are timed."""
SHARES = (0.8, 0.6)
"""Open heads, open MLP groups and, of a DyDiT, tokens in the MLP."""
FIXED = "fixed width"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="S", help="size of the models (default S)")
    parser.add_argument("--batch", type=int, default=8, help="images (default 8)")
    parser.add_argument("--rounds", type=int, default=15, help="passes of each side (default 15)")
    parser.add_argument("--steps", type=int, default=250, help="steps of the sampler that is sliced for (default 250)")
    parser.add_argument("--out", required=True, metavar="FILE", help="page to write")
    args = parser.parse_args()
    flags = " ".join(f"--{name} {getattr(args, name)}" for name in ("scale", "batch", "rounds", "steps", "out"))
    sections = [
        study(f"DyDiT-{args.scale}/2", f"DiT-{args.scale}/2", args.batch, args.rounds, args.steps),
        study(f"DC-DiT-{args.scale}", f"DC-DiT-{args.scale}", args.batch, args.rounds, args.steps),
    ]
    write_text(Path(args.out), page(f"python -m benchmarks.studies.dynamic_width {flags}", sections))


@torch.inference_mode()
def study(name: str, baseline: str, batch: int, rounds: int, steps: int) -> str:
    """A section of the page: a model of dynamic width at several shares, against one of fixed width."""
    torch.manual_seed(0)
    fixed: Any = create_model(baseline).eval()
    fill_zero_weights(fixed)
    x, y = varied_latents(batch, 4, fixed.config.grid), torch.arange(batch)
    routes = isinstance(fixed, DCDiT)
    if routes:
        channels_last(fixed)
        calibrate_router(fixed, x, torch.full((batch,), TIMES[0]), y, 0.25)
    sides = {FIXED: Side(fixed, y, [(x, TIMES[0])])}
    notes = []
    for share in SHARES:
        model: Any = create_model(name, **({"dynamic_width": True} if routes else {})).eval()
        model.load_state_dict({**model.state_dict(), **fixed.state_dict()})
        if routes:
            channels_last(model)
        steps_of_sampler = call_times("ddpm", steps)
        calibrate_gates(model, x, y, share, steps_of_sampler)
        sliced = SlicedModel(model, [*steps_of_sampler, *TIMES])
        worst = max(difference(sliced, model, x, t, y) for t in TIMES)
        own = sum(weight.nbytes for weight in model.parameters())
        notes.append(
            f"- {share:.0%} open: sliced and masked outputs differ by at most {worst:.1e} of the largest number. The "
            f"slices for {steps} steps take {sliced.nbytes / 2**20:.0f} MiB beside {own / 2**20:.0f} MiB of weights."
        )
        # A masked pass takes as long at every timestep.
        sides[f"{share:.0%} open, masked"] = Side(model, y, [(x, TIMES[0])])
        sides |= {f"{share:.0%} open, sliced, t = {t}": Side(sliced, y, [(x, t)]) for t in TIMES}
    title = f"## {name} against {baseline} of fixed width, batch {batch}"
    return "\n\n".join([title, time_sides(sides, rounds), "\n".join(notes)])


def page(command: str, sections: list[str]) -> str:
    counted = "FLOPs are counted by the open gates, also where a model masks."
    head = f"{conditions(command, 'at fixed width')} {counted}"
    return "\n\n".join(["# Dynamic width on a CPU", head, *sections]) + "\n"


if __name__ == "__main__":
    main()
