"""What ``dcdit.patch`` changes in the real checkouts of other people's models.

``python -m benchmarks.studies.patching --official DIR --hnet DIR`` prints, for each checkout that is given, the
difference of the results and what a forward pass and a training step take before and after. None of their code is
copied: it is imported from the checkout. H-Net's moving average runs in a kernel of mamba_ssm, which needs a GPU; where
that is missing, a scan in PyTorch takes its place, with the same inputs rounded to bfloat16.
"""

import argparse
import contextlib
import copy
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any
from unittest.mock import patch as replaced

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dcdit
from benchmarks.baselines import official
from benchmarks.harness.counting import count_work
from dcdit.models import create_model
from dcdit.ops import checks, ratio_loss, reference, use_backend
from dcdit.profiling.rounds import spread
from dcdit.profiling.timing import time_rounds
from dcdit.utils.tables import markdown_table

STEPS = 20
Call = Callable[[], object]
NAMES = ("as published", "patched")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", metavar="DIR", help="checkout of AMD-AGI/DynamicChunkingDiT")
    parser.add_argument("--hnet", metavar="DIR", help="checkout of goombalab/hnet")
    parser.add_argument("--model", default="DC-DiT-S", help="size of the DC-DiT (default DC-DiT-S)")
    parser.add_argument("--batch", type=int, default=4, help="images (default 4)")
    parser.add_argument("--seconds", type=float, default=30, help="for each comparison of times (default 30)")
    args = parser.parse_args()
    if args.official is None and args.hnet is None:
        parser.error("give --official, --hnet or both")
    if args.official is not None:
        print(study_official(args.official, args.model, args.batch, args.seconds))
    if args.hnet is not None:
        print(study_hnet(args.hnet, args.seconds))


def times_of(title: str, calls: dict[str, Call], seconds: float) -> str:
    """A table of times, taken in turns."""
    rounds = time_rounds(calls, torch.device("cpu"), seconds)
    rows = [[name, f"{median(rounds.times(name)):.1f}", f"±{spread(rounds.times(name)):.0%}"] for name in calls]
    return f"\n{title}\n\n{markdown_table(('', 'ms', 'spread'), rows)}\n"


def work_of(title: str, calls: dict[str, Call]) -> str:
    """A table of what each call does on a GPU: our operations count as their Triton kernels, run by the interpreter."""
    rows = []
    for name, call in calls.items():
        without_checks = replaced.object(checks, "value_checks_enabled", lambda tensor: False)  # as on a GPU
        with count_work() as work, use_backend("triton"), without_checks:
            call()
        started = sum(work.operators.values()) + sum(work.launches.values())
        rows.append([name, f"{started}", f"{work.reads}", f"{work.bytes / 1e6:.1f}"])
    return f"\n{title}\n\n{markdown_table(('', 'operators and kernels', 'reads on the host', 'MB touched'), rows)}\n"


# --- DC-DiT ---------------------------------------------------------------------------------------------------------


def study_official(checkout: str, name: str, batch: int, seconds: float) -> str:
    os.environ[official.VARIABLE] = checkout
    theirs, fast = pair(name, 256)
    x, t, y = inputs(32, batch)
    report = [f"## AMD-AGI/DynamicChunkingDiT, {name}, 256 px, batch {batch}, float32 (attention in bfloat16)\n"]
    for drop in (0.0, 0.3):
        with torch.no_grad():
            (a, seen), (b, fast_seen) = (
                model(x, t, y, return_chunking_info=True, tail_dropping_fraction=drop) for model in (theirs, fast)
            )
        same = torch.equal(seen[0].boundary_mask, fast_seen[0].boundary_mask)
        kept = seen[0].boundary_mask.float().mean()
        report.append(
            f"Drop {drop:g}: {kept:.1%} kept, masks {'equal' if same else 'DIFFER'}, relative difference of the output "
            f"{float((a - b).norm() / a.norm()):.1e}."
        )
    losses = [train(model, x, y) for model in pair(name, 256)]
    off = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))
    first, last = losses[0][0], losses[0][-1]
    report.append(f"{STEPS} AdamW steps: losses {first:.4f} to {last:.4f}, relative difference at most {off:.1e}.")
    small = dict(zip(NAMES, pair(name, 64), strict=True))
    for title, backward in (("A forward pass", False), ("Forward and backward", True)):
        timed = {name: call(model, (x, t, y), backward) for name, model in zip(NAMES, (theirs, fast), strict=True)}
        report.append(times_of(f"{title}, CPU:", timed, seconds))
        counted = {name: call(model, inputs(8, 2), backward) for name, model in small.items()}
        report.append(work_of(f"{title} of 2 images of 64 px, counted:", counted))
    return "\n".join(report)


def pair(name: str, image_size: int) -> tuple[nn.Module, nn.Module]:
    """The same model twice: as published, and patched."""
    torch.manual_seed(0)
    ours = create_model(name, image_size)
    official.randomize_zeros(ours)
    nn.init.normal_(ours.router.out.weight)  # so that the router keeps some tokens and drops others
    theirs = official.build(ours)
    return theirs, dcdit.patch(copy.deepcopy(theirs))


def inputs(side: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, side, side, generator=rng)
    return x, torch.randint(0, 1000, (batch,), generator=rng), torch.randint(0, 1000, (batch,), generator=rng)


def call(model: nn.Module, batch: tuple[Tensor, ...], backward: bool) -> Call:
    if backward:
        return lambda: model(*batch)[0].square().mean().backward()
    return torch.no_grad()(lambda: model(*batch))


def train(model: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    """The loss of each of some steps, with the ratio loss as ``train.py`` reads it."""
    model.train()
    model.y_embedder.dropout_prob = 0.0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    losses = []
    for number in range(STEPS):
        rng = torch.Generator().manual_seed(number)
        noise, t = torch.randn(x.shape, generator=rng), torch.randint(0, 1000, y.shape, generator=rng)
        out, _ = model(x + noise, t, y, tail_dropping_fraction=0.1 * (number % 4))
        seen = model._last_boundary_predictions[0]
        ratio = ratio_loss(seen.boundary_prob[..., 1], seen.boundary_mask_natural.bool(), 4.0)
        loss = (out[:, : x.shape[1]] - noise).square().mean() + 0.03 * ratio
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# --- H-Net ----------------------------------------------------------------------------------------------------------


def study_hnet(checkout: str, seconds: float, dim: int = 1024, lengths: tuple[int, ...] = (900, 1500, 1696)) -> str:
    """Its three modules in a row, packed, bfloat16 as it trains them."""
    with hnet_modules(Path(checkout)) as dc:
        torch.manual_seed(0)
        modules = nn.ModuleDict(
            {"route": dc.RoutingModule(dim), "chunk": dc.ChunkLayer(), "spread": dc.DeChunkLayer(dim)}
        )
        for weight in modules.parameters():
            nn.init.normal_(weight, std=dim**-0.5)
        modules = modules.bfloat16()
        fast = dcdit.patch(copy.deepcopy(modules))
        x = torch.randn(sum(lengths), dim, dtype=torch.bfloat16)
        starts = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))

        def route(net: Any, x: Tensor, starts: Tensor) -> tuple[Any, Tensor, Tensor]:
            seen = net["route"](x, cu_seqlens=starts)
            return seen, *net["chunk"](x, seen.boundary_mask, starts)[:2]

        def run(net: Any, x: Tensor, starts: Tensor) -> tuple[Any, Tensor, Tensor]:
            seen, chunks, inner = route(net, x, starts)
            return seen, net["spread"](chunks, seen.boundary_mask, seen.boundary_prob, inner), chunks

        with torch.no_grad():
            report = ["## goombalab/hnet, its three modules, bfloat16, packed\n"]
            for name, net in (("as published", modules), ("patched", fast)):
                seen, out, chunks = run(net, x, starts)
                p = seen.boundary_prob[..., 1].double()
                sel = reference.select_tokens(seen.boundary_mask.double(), starts.int())
                exact = reference.dechunk_ema(chunks.double(), p, sel)
                error = float((out.double() - exact).norm() / exact.norm())
                rounded = float((exact.bfloat16().double() - exact).norm() / exact.norm())
                report.append(
                    f"{name}: {seen.boundary_mask.float().mean():.1%} of the tokens open a chunk; relative error of "
                    f"the moving average against float64 {error:.1e} (rounding the exact result once: {rounded:.1e})."
                )
        nets = {"as published": modules, "patched": fast}
        routes = {name: torch.no_grad()(lambda net=net: route(net, x, starts)) for name, net in nets.items()}
        report.append(times_of("Routing and chunking, forward, CPU:", routes, seconds))
        few = x[:60], torch.tensor([0, 20, 60])
        calls = {name: torch.no_grad()(lambda net=net: run(net, *few)) for name, net in nets.items()}
        report.append(work_of("All three modules on 60 tokens, forward, counted:", calls))
    return "\n".join(report)


@contextlib.contextmanager
def hnet_modules(checkout: Path) -> Iterator[ModuleType]:
    """Its ``hnet/modules/dc.py``, imported by path."""
    file = checkout / "hnet" / "modules" / "dc.py"
    if not file.is_file():
        raise FileNotFoundError(f"no {str(file)!r}; accepted: a checkout of goombalab/hnet")
    names = ["hnet", "hnet.modules", "hnet.modules.utils"]
    scan = "mamba_ssm.ops.triton.ssd_combined"
    missing = importlib.util.find_spec("mamba_ssm") is None
    stand_in = ModuleType(scan)
    stand_in.mamba_chunk_scan_combined = _scan  # type: ignore[attr-defined]
    parents = {name: ModuleType(name) for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton")}
    with replaced.dict(sys.modules, {**parents, scan: stand_in} if missing else {}):
        for name in names[:2]:
            sys.modules[name] = ModuleType(name)
        _import(names[2], file.with_name("utils.py"))
        yield _import("hnet.modules.dc", file)


def _import(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@torch.library.custom_op("dcdit_benchmarks::scan", mutates_args=())
def _scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk_size: int, seq_idx: Tensor | None) -> Tensor:
    """Mamba-2's scan ``s_m = exp(a dt_m) s_{m-1} + dt_m b_m x_m``, ``y_m = c_m s_m``, in float32, one step at a time.

    An operator, so that it counts as one, as the kernel would.
    """
    decay = torch.exp(a * dt.float())[..., None]
    if seq_idx is not None:
        same = F.pad(seq_idx[:, 1:] == seq_idx[:, :-1], (1, 0))
        decay = decay * same[..., None, None]
    added = dt.float()[..., None] * b.float() * x.float()
    out = torch.empty_like(added)
    state = torch.zeros_like(added[:, 0])
    for m in range(x.shape[1]):
        state = decay[:, m] * state + added[:, m]
        out[:, m] = state
    return (out * c.float()).to(x.dtype)


if __name__ == "__main__":
    main()
