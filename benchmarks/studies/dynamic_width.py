"""Does dynamic width become time? DyDiT, and DC-DiT with dynamic width, against the same models of fixed width.

``python -m benchmarks.studies.dynamic_width --out FILE`` checks that sliced and masked outputs are equal, times forward
passes of all sides in turns, and writes a page. Beside the time on the clock stands the processor time of the thread,
which does not grow when other work takes its turn. The weights are random. The gates are set to leave
chosen shares of heads, MLP groups and tokens; which ones changes with the timestep and the token.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from dcdit.models import DCDiT, SlicedModel, create_model
from dcdit.nn.memory_format import channels_last
from dcdit.profiling.calibrate import calibrate_router, varied_latents
from dcdit.profiling.rounds import Rounds, spread
from dcdit.profiling.timing import time_rounds
from dcdit.sample.model_calls import ModelCalls, call_times
from dcdit.utils.environment import cpu_name
from dcdit.utils.files import write_text
from dcdit.utils.tables import markdown_table

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
    for weight in fixed.parameters():
        if not weight.any():  # zeros would hide whole branches
            nn.init.normal_(weight, std=0.02)
    x, y = varied_latents(batch, 4, fixed.config.grid), torch.arange(batch)
    routes = isinstance(fixed, DCDiT)
    if routes:
        channels_last(fixed)
        calibrate_router(fixed, x, torch.full((batch,), TIMES[0]), y, 0.25)
    sides = {FIXED: Side(fixed, x, y, TIMES[0])}
    notes = []
    for share in SHARES:
        model: Any = create_model(name, **({"dynamic_width": True} if routes else {})).eval()
        model.load_state_dict({**model.state_dict(), **fixed.state_dict()})
        if routes:
            channels_last(model)
        steps_of_sampler = call_times("ddpm", steps)
        open_gates(model, share, x, y, steps_of_sampler)
        sliced = SlicedModel(model, [*steps_of_sampler, *TIMES])
        worst = max(difference(model, sliced, x, t, y) for t in TIMES)
        own = sum(weight.nbytes for weight in model.parameters())
        notes.append(
            f"- {share:.0%} open: sliced and masked outputs differ by at most {worst:.1e} of the largest number. The "
            f"slices for {steps} steps take {sliced.nbytes / 2**20:.0f} MiB beside {own / 2**20:.0f} MiB of weights."
        )
        # A masked pass takes as long at every timestep.
        sides[f"{share:.0%} open, masked"] = Side(model, x, y, TIMES[0])
        sides |= {f"{share:.0%} open, sliced, t = {t}": Side(sliced, x, y, t) for t in TIMES}
    measured = time_rounds(sides, x.device, 0, warmup=1, least=rounds)
    head = ["", "GFLOPs/image", "least ms", "processor ms", "spread", "eta, processor time", "eta, clock (95 %)"]
    table = markdown_table(head, [row(label, sides, measured) for label in sides])
    waited = "an unknown part" if measured.waited is None else f"{measured.waited:.0%}"
    rest = f"{len(measured)} rounds in turns. Threads waited for a processor {waited} of the time."
    return "\n\n".join([f"## {name} against {baseline} of fixed width, batch {batch}", table, "\n".join(notes), rest])


class Side:
    """Forward passes of a model at one timestep. ``seconds`` holds the processor time of each."""

    def __init__(self, model: Any, x: Tensor, y: Tensor, t: float) -> None:
        self.seconds: list[float] = []
        self._model, self._inputs = model, (x, torch.full(y.shape, t), y)
        calls = ModelCalls(model, len(y))
        calls(*self._inputs)
        self.gflops = calls.records()[0]["gflops"]
        """Per image. What a gate closes is left out, also where the model masks it."""

    def __call__(self) -> None:
        began = time.process_time()
        self._model(*self._inputs)
        self.seconds.append(time.process_time() - began)


def open_gates(model: Any, share: float, x: Tensor, y: Tensor, times: Sequence[float]) -> None:
    """Set biases so that each gate of a head or group is open at this share of the times, and that share of the tokens.

    Args:
        times: of the sampler.
    """
    routers = model.width_gates.linear
    nn.init.normal_(routers.weight)
    logits = model.t_embedder(torch.tensor(times)) @ routers.weight.T
    # The first head and the first group are always open.
    heads = model.config.num_heads
    routers.bias.copy_(-logits.quantile(1 - (share * heads - 1) / (heads - 1), dim=0))
    for gate in getattr(model, "token_gates", ()):
        nn.init.normal_(gate.fc2.weight)
        nn.init.zeros_(gate.fc2.bias)
        seen: list[Tensor] = []
        hook = gate.register_forward_hook(lambda _module, _inputs, p, seen=seen: seen.append(p))
        model(x, torch.full(y.shape, TIMES[0]), y)
        hook.remove()
        gate.fc2.bias.fill_(-float(seen[0].logit(eps=1e-7).quantile(1 - share)))


def difference(model: Any, sliced: SlicedModel, x: Tensor, t: float, y: Tensor) -> float:
    """The largest of the outputs' differences, over the largest output."""
    masked = model(x, torch.full(y.shape, t), y)
    return float((sliced(x, torch.full(y.shape, t), y) - masked).abs().max() / masked.abs().max())


def row(label: str, sides: dict[str, Side], measured: Rounds) -> list[str]:
    side, fixed = sides[label], sides[FIXED]
    # The first call of each is a warm-up.
    own, theirs = side.seconds[1:], fixed.seconds[1:]
    cells = [label, f"{side.gflops:.2f}", f"{min(measured.times(label)):.0f}", f"{1e3 * median(own):.0f}"]
    cells.append(f"±{spread(own):.1%}")
    if label == FIXED:
        return [*cells, "", ""]
    saved = side.gflops / fixed.gflops
    clock = measured.ratio(FIXED, label).scaled(saved)
    processor = median(a / b for a, b in zip(theirs, own, strict=True)) * saved
    return [*cells, f"{processor:.2f}", f"{clock.value:.2f} ({clock.low:.2f} to {clock.high:.2f})"]


def page(command: str, sections: list[str]) -> str:
    conditions = (
        f"`{command}` on {cpu_name()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, float32, random "
        "weights. FLOPs are counted by the open gates, also where a model masks. eta = (time at fixed width / time) / "
        "(FLOPs at fixed width / FLOPs), the median of the rounds: 1 means that every saved FLOP became time. "
        "Processor time does not count the turns of other work; its spread is half the interquartile range over the "
        "median."
    )
    return "\n\n".join(["# Dynamic width on a CPU", conditions, *sections]) + "\n"


if __name__ == "__main__":
    main()
