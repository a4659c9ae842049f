"""Launches and bytes of a whole forward and of a whole training step of DC-DiT-XL, counted without a GPU.

    python -m benchmarks.xl_work             # the table
    python -m benchmarks.xl_work --write     # and xl_work.json again, after a change that was meant to change the work

Nothing is computed: tensors are fake (they have a shape, a dtype and no memory), and launches are recorded. A launch is
a start of one of our kernels, or a PyTorch operator that touches memory (which may start several kernels). Bytes are
those of every tensor that a launch takes and returns. The static DiT is counted as it is written, without the fusions
of torch.compile.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from torch.nn.utils import clip_grad

from benchmarks.harness.counting import CountedWork, count_work
from benchmarks.harness.recipe_step import RecipeStep
from dcdit import ops
from dcdit.diffusion import objectives
from dcdit.kernels import launch
from dcdit.models import create_model
from dcdit.nn import linear_gelu
from dcdit.nn.stages import collect_stages
from dcdit.ops import attention_kernels, checks
from dcdit.ops._triton import kernel_op
from dcdit.utils.tables import markdown_table

PATH = Path(__file__).with_suffix(".json")
BATCH, KEPT, CAPACITY, LONGEST = 32, 8192, 8448, 512
"""A quarter of 32 x 1024 positions; a capacity of 66 row tiles; the longest image in exact mode."""
DEPTH, COUNTED_DEPTH = 28, 4
"""Blocks of XL, and those of the counts in the file: a pass over the tokens shows in four blocks, too."""
MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "budget": {"budget": KEPT // BATCH},
    "capacity": {"capacity": CAPACITY, "max_seqlen": LONGEST},
    "static": {},
}
ATTENTION = "torch_varlen"
Part = dict[str, Any]
"""``launches``, ``megabytes``, and ``what``: how often each kernel and operator."""


def count_forward(mode: str, depth: int = DEPTH) -> dict[str, Part]:
    """The work of each stage of a forward in bfloat16, and of the ``whole``."""
    with _without_memory(torch.bfloat16) as work:
        model = _create(mode, depth).eval()
        x, t, y = _batch()
        with torch.no_grad(), work.counting():
            model(x, t, y, **MODES[mode])
    return work.parts()


def count_training_step(mode: str, depth: int = DEPTH) -> dict[str, Part]:
    """The work of each part of a training step of the recipe, and of the ``whole``."""
    with _without_memory(torch.float32) as work:
        model = _create(mode, depth)
        x, _, y = _batch()
        net = model if mode == "static" else _InMode(model, MODES[mode])
        step = RecipeStep(model, x, y, "bf16", net)
        step.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        step(0.0)  # makes the moments
        with work.counting():
            metrics, _ = step.losses(0.0)
            with work.part("backward"):
                metrics["loss"].backward()
            with work.part("update"):
                step.update()
    return work.parts()


def count_all(depth: int = DEPTH) -> dict[str, dict[str, Part]]:
    """Every count by its name."""
    return {name: count(depth) for name, count in CASES.items()}


CASES: dict[str, Callable[[int], dict[str, Part]]] = {
    **{f"forward, {mode}": lambda depth, mode=mode: count_forward(mode, depth) for mode in MODES},
    **{f"training step, {mode}": lambda depth, mode=mode: count_training_step(mode, depth) for mode in MODES},
}


def differences(now: dict[str, Part], before: dict[str, Part]) -> list[str]:
    """What changed between two counts of one case, a line for each part, so that a reader sees what came or went."""
    lines = []
    for name in dict.fromkeys([*before, *now]):
        a, b = (parts.get(name, {"launches": 0, "megabytes": 0.0, "what": {}}) for parts in (before, now))
        if a == b:
            continue
        kinds = dict.fromkeys([*a["what"], *b["what"]])
        changed = [(kind, b["what"].get(kind, 0) - a["what"].get(kind, 0)) for kind in kinds]
        what = ", ".join(f"{number:+d} {kind}" for kind, number in changed if number)
        lines.append(
            f"{name}: launches {a['launches']} -> {b['launches']}, MB {a['megabytes']} -> {b['megabytes']}"
            + (f" ({what})" if what else "")
        )
    return lines


def table(counts: dict[str, dict[str, Part]]) -> str:
    """Launches and gigabytes of every part of the counts of one kind, and of the whole."""
    names = list(dict.fromkeys(name for parts in counts.values() for name in parts))
    names.append(names.pop(names.index("whole")))
    rows = []
    for name in names:
        row = [name]
        for parts in counts.values():
            part = parts.get(name)
            row += [str(part["launches"]), f"{part['megabytes'] / 1e3:.3f}"] if part else ["", ""]
        rows.append(row)
    head = [f"{mode.partition(', ')[2]}, {unit}" for mode in counts for unit in ("launches", "GB")]
    return markdown_table(["part", *head], rows)


# --- the machine that is not there -----------------------------------------------------------------------------------


class _PartedWork:
    """Counts the work of the parts of a block."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[Counter[str], int]] = {}
        self._name, self._work = "rest", CountedWork()
        self._before: tuple[Counter[str], int] = (Counter(), 0)

    @contextmanager
    def counting(self) -> Iterator[None]:
        with count_work() as self._work, collect_stages(self.part):
            self._before = self._now()
            yield
            self._close()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside counts as this part."""
        self._close()
        outer, self._name = self._name, name
        try:
            yield
        finally:
            self._close()
            self._name = outer

    def sizes(self, tensor: Tensor) -> list[int]:
        """The one question that a forward in exact mode asks: how many tokens are kept, in all and of one image."""
        assert tensor.shape == (2,), f"a tensor of shape {tuple(tensor.shape)} is read on the host"
        self._work.reads += 1
        return [KEPT, LONGEST]

    def parts(self) -> dict[str, Part]:
        found = {name: (what, size) for name, (what, size) in self.found.items() if what}
        whole = sum((what for what, _ in found.values()), Counter[str]())
        found["whole"] = (whole, sum(size for _, size in found.values()))
        return {
            name: {"launches": what.total(), "megabytes": round(size / 1e6, 2), "what": dict(sorted(what.items()))}
            for name, (what, size) in found.items()
        }

    def _now(self) -> tuple[Counter[str], int]:
        return self._work.operators + self._work.launches + Counter(
            {"read on the host": self._work.reads}
        ), self._work.bytes

    def _close(self) -> None:
        """Give what was counted since the last call to the part that is open."""
        now = self._now()
        what, size = self.found.get(self._name, (Counter(), 0))
        self.found[self._name] = (what + (now[0] - self._before[0]), size + now[1] - self._before[1])
        self._before = now


class _InMode:
    """A DC-DiT that sizes its packed buffer in a given mode, called as a training step calls the model."""

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        self.module, self.options = model, options

    def __call__(self, *batch: Tensor, drop_fraction: Tensor, **options: Any) -> Any:
        given = {} if "budget" in self.options else {"drop_fraction": drop_fraction}
        return self.module(*batch, **given, **self.options, **options)


@contextmanager
def _without_memory(dtype: torch.dtype) -> Iterator[_PartedWork]:
    """Fake tensors on the code path of a GPU: our kernels, recorded, and the attention that PyTorch has there."""
    outer = torch.get_default_dtype()
    known = frozenset(signature(varlen_attn).parameters)
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(launch.record_launches())
        stack.enter_context(ops.use_backend("triton"))
        # Launchers take fake tensors as if they were real ones: their launches are what is wanted.
        stack.enter_context(patch.object(kernel_op, "_PLAIN", frozenset([*kernel_op._PLAIN, FakeTensor])))
        stack.enter_context(patch.object(checks, "value_checks_enabled", lambda tensor: False))
        stack.enter_context(patch.object(attention_kernels, "choose_attention_backend", lambda *_: ATTENTION))
        stack.enter_context(patch.dict(attention_kernels._LOADED, {ATTENTION: (varlen_attn, known)}))
        stack.enter_context(patch.object(linear_gelu, "_may_fuse", _would_fuse))
        stack.enter_context(patch.object(clip_grad, "_has_foreach_support", lambda tensors, device: True))
        work = _PartedWork()
        stack.enter_context(patch.object(FakeTensor, "tolist", lambda tensor: work.sizes(tensor)))
        stack.callback(objectives._schedule_on.cache_clear)  # it may have been made here, without memory
        torch.set_default_dtype(dtype)
        stack.callback(torch.set_default_dtype, outer)
        yield work


def _would_fuse(linear: nn.Linear, x: Tensor) -> bool:
    """What a GPU would answer; the parameters here are none that the real question accepts."""
    return x.dtype in linear_gelu.DTYPES and not torch.is_grad_enabled()


def _create(mode: str, depth: int) -> Any:
    name = "DiT-XL/2" if mode == "static" else "DC-DiT-XL"
    model = create_model(name, 256, depth=depth)
    model.pos_embed = model.pos_embed.to(torch.get_default_dtype())
    for part in model.modules():
        if isinstance(part, nn.Conv2d):  # as dcdit.nn.memory_format.channels_last, which cannot convert fake tensors
            part.weight = nn.Parameter(part.weight.detach().contiguous(memory_format=torch.channels_last))
    return model


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty(BATCH, 4, 32, 32), torch.empty(BATCH), torch.empty(BATCH, dtype=torch.int64)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=DEPTH, help="blocks (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help=f"write {PATH.name} again and say what changed")
    args = parser.parse_args(argv)
    counts = count_all(args.depth)
    print(f"DC-DiT-XL with {args.depth} blocks, 256 px, batch {BATCH}, {KEPT} tokens kept, capacity {CAPACITY}")
    for kind in ("forward", "training step"):
        print(f"\n{kind}\n\n{table({name: parts for name, parts in counts.items() if name.startswith(kind)})}")
    if args.write:
        before = json.loads(PATH.read_text()) if PATH.is_file() else {}
        now = count_all(COUNTED_DEPTH)
        for name, parts in now.items():
            for line in differences(parts, before.get(name, {})):
                print(f"{name}: {line}")
        PATH.write_text(json.dumps(now, indent=1) + "\n")
        print(f"wrote {PATH}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
