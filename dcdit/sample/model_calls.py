"""What each model call of a sampling run kept and cost."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dcdit.checkpoint import Model
from dcdit.diffusion import sample
from dcdit.graphs import ExactGraphedDenoiser
from dcdit.models import Capacity, DyDiTConfig, SlicedModel, SparseDiTConfig, count_flops
from dcdit.nn import Gates
from dcdit.nn.gates import GateCounts
from dcdit.utils.modules import accepts_keyword, signature_of

if TYPE_CHECKING:
    from PIL.Image import Image

CallRecord = dict[str, float]
"""What one model call kept and cost; its names are those of :meth:`ModelCalls.records`."""


class BoundaryMap(NamedTuple):
    """How the router saw one image at one model call.

    Example:
        >>> import torch
        >>> from PIL import Image
        >>> from dcdit.sample import BoundaryMap
        >>> mask = torch.tensor([[True, False]])
        >>> picture = BoundaryMap(t=500.0, prob=mask.float(), mask=mask).over(Image.new("RGB", (2, 1), (200, 100, 40)))
        >>> picture.getpixel((0, 0)), picture.getpixel((1, 0))
        ((200, 100, 40), (50, 25, 10))
    """

    t: float
    """The time that the model was given, from 1000 (noise) to 0."""
    prob: Tensor
    """(H, W) float32."""
    mask: Tensor
    """(H, W) bool: the kept tokens."""

    def over(self, image: "Image") -> "Image":
        """The picture of the image with the positions that were not kept darkened to a quarter."""
        from dcdit.utils.pillow import Image

        mask = Image.fromarray(self.mask.numpy()).resize(image.size, Image.Resampling.NEAREST)
        return Image.composite(image, image.point(lambda level: level // 4), mask)


class ModelCalls:
    """A model that records what each of its calls keeps and costs. A sampler takes it as the model.

    A call never waits for the device; reading the records does.

    Args:
        model: one that routes is called with ``return_routing=True``, a DyDiT with ``return_gates=True``.
        images: rows of a batch that are conditional; further rows are the unconditional branch of guidance.
        maps: also record how the router sees so many of the first images.

    Example:
        >>> import torch
        >>> from dcdit.diffusion import sample
        >>> from dcdit.models import create_model
        >>> from dcdit.sample import ModelCalls
        >>> model = create_model("DC-DiT-S", grid=(4, 4), hidden_size=128, depth=1, num_heads=2, num_classes=10).eval()
        >>> calls = ModelCalls(model, images=2)
        >>> _ = sample(calls, torch.tensor([3, 7]), num_steps=3, method="euler", budget=4, progress=False)
        >>> [record["kept"] for record in calls.records()]  # 4 of 16 positions, in each call
        [0.25, 0.25, 0.25]
    """

    def __init__(self, model: Model | ExactGraphedDenoiser | SlicedModel, images: int, maps: int = 0) -> None:
        self.config, self.objective, self.__signature__ = model.config, model.objective, signature_of(model)
        self.model, self.images = model, images
        self.observes = maps
        self._dynamic = accepts_keyword(model, "return_routing")
        self._gated = not self._dynamic and accepts_keyword(model, "return_gates")
        self._calls: list[dict[str, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, **options: Any) -> Tensor:
        out, seen = self.observe(x, t, y, **options)
        self.record(seen)
        return out

    def observe(self, x: Tensor, t: Tensor, y: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The output of a call, and what there is to record of it."""
        model: Any = self.model
        if self._gated:
            out, gates = model(x, t, y, **options, return_gates=True)
            return out, {"t": t, **_open(gates)}
        if not self._dynamic:
            return model(x, t, y, **options), {"t": t}
        out, routing = model(x, t, y, **options, return_routing=True)
        seen = {"t": t, "lengths": routing.selection.lengths, "natural": routing.natural_mask.sum(1)}
        seen |= {} if routing.gates is None else _open(routing.gates)
        if options.get("capacity") is not None:
            seen["overflow"] = routing.selection.overflow
        if self.observes:
            seen |= {"prob": routing.prob[: self.observes], "mask": routing.mask[: self.observes]}
        return out, seen

    def record(self, seen: dict[str, Tensor]) -> None:
        """Record a call that :meth:`observe` ran, or that repeated one in a graph."""
        self._calls.append(seen)

    def records(self) -> list[CallRecord]:
        """One entry per call, means over the images.

        ``t``, and ``gflops`` per image (see :func:`dcdit.models.count_flops`), both branches together. With guidance
        ``gflops_null``, the part of the unconditional branch. Of a dynamic model also the fractions of the positions
        that were ``kept``, and ``natural``: before dropping. With guidance also ``kept_null`` and ``natural_null``.
        With a capacity also ``overflow``: tokens per image that were lost to it, both branches together. Of a model of
        dynamic width the fractions of the ``heads`` and MLP ``groups`` that were computed, and of the ``tokens`` that
        an MLP ran on, over both branches. Of a SparseDiT the fraction of the tokens that were ``sparse`` ones.
        """
        return [self._record(call) for call in self._calls]

    def plan_capacity(self, batch: int, drop_fraction: Sequence[float]) -> Capacity:
        """As :meth:`dcdit.models.DCDiT.plan_capacity`."""
        plan: Capacity = self.model.plan_capacity(batch, drop_fraction)  # type: ignore[union-attr, operator]
        return plan

    def natural_shares(self) -> list[list[float]]:
        """The share of its positions that the router kept of each row before dropping, one entry per call."""
        positions = math.prod(self.config.grid)
        return [(call["natural"] / positions).tolist() for call in self._calls if "natural" in call]

    def maps(self, image: int = 0) -> list[BoundaryMap]:
        """How the router saw one of the images, one entry per call."""
        return [
            BoundaryMap(
                float(call["t"][0]), *(call[name][image].view(self.config.grid).cpu() for name in ("prob", "mask"))
            )
            for call in self._calls
            if "prob" in call
        ]

    def _record(self, call: dict[str, Tensor]) -> CallRecord:
        rows = len(call["t"])
        record = {"t": float(call["t"][0]), "gflops": 0.0}
        if "overflow" in call:
            record["overflow"] = int(call["overflow"]) / self.images
        for suffix, part in (("", slice(None, self.images)), ("_null", slice(self.images, None))):
            lengths = call["lengths"][part].tolist() if "lengths" in call else None
            branch = range(rows)[part]
            if not branch:
                continue
            counts, tokens = _counts(call, part), lengths
            if isinstance(self.config, SparseDiTConfig):
                tokens = [self.config.sparse_tokens_at(time) for time in call["t"][part].tolist()]
                record["sparse"] = tokens[0] / self.config.tokens
            flops = count_flops(self.config, tokens, len(branch), counts)["total"] / self.images / 1e9
            record["gflops"] += flops
            if suffix:
                record["gflops_null"] = flops
            if lengths is not None:
                positions = len(branch) * self.config.grid[0] * self.config.grid[1]
                record[f"kept{suffix}"] = sum(lengths) / positions
                record[f"natural{suffix}"] = int(call["natural"][part].sum()) / positions
        counts = _counts(call, slice(None))
        if counts is not None:
            heads = self.config.num_heads
            record |= {"heads": _mean(counts.heads) / heads, "groups": _mean(counts.groups) / heads}
            if counts.tokens is not None and isinstance(self.config, DyDiTConfig):
                record["tokens"] = _mean(counts.tokens) / self.config.tokens
        return record


def _open(gates: Gates) -> dict[str, Tensor]:
    """What there is to record of gates."""
    return {f"open_{name}": count for name, count in gates.counts()._asdict().items() if count is not None}


def _counts(call: dict[str, Tensor], rows: slice) -> GateCounts | None:
    """Of some rows of a recorded call."""
    if "open_heads" not in call:
        return None
    tokens = call["open_tokens"][rows] if "open_tokens" in call else None
    return GateCounts(call["open_heads"][rows], call["open_groups"][rows], tokens)


def _mean(counts: Tensor) -> float:
    return float(counts.double().mean())


def mean_records(batches: list[tuple[int, list[CallRecord]]]) -> list[CallRecord]:
    """The records of a run that was drawn in batches: (images, records) of each, averaged over all images."""
    images = sum(count for count, _ in batches)
    weights = [count / images for count, _ in batches]
    return [
        {name: sum(w * call[name] for w, call in zip(weights, calls, strict=True)) for name in calls[0]}
        for calls in zip(*(records for _, records in batches), strict=True)
    ]


def tflops_per_image(records: list[CallRecord]) -> float:
    """TFLOPs per image of the whole run, counted as the papers count "TFLOPs/img": 2 FLOPs per multiply-add.

    Example:
        >>> from dcdit.sample import tflops_per_image
        >>> tflops_per_image([{"gflops": 1500.0}, {"gflops": 500.0}])  # two calls
        2.0
    """
    return sum(call["gflops"] for call in records) / 1e3


def lost_tokens(records: list[CallRecord], images: int) -> int | None:
    """Tokens that a capacity dropped in all calls of so many images; None where there was no capacity."""
    if not any("overflow" in call for call in records):
        return None
    return round(sum(call["overflow"] for call in records) * images)


@torch.no_grad()
def call_times(method: str, num_steps: int | str) -> list[float]:
    """The time of every model call of a sampling run, from 1000 (noise) to 0, without a model."""
    times = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        times.append(float(t[0]))
        return torch.zeros_like(x)

    sample(model, torch.zeros(1, dtype=torch.int64, device="cpu"), num_steps, method, shape=(1, 1, 1), progress=False)
    return times
