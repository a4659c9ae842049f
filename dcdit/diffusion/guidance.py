"""Classifier-free guidance (arXiv 2207.12598) with both branches in one forward pass."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from dcdit.diffusion.schedule import TRAIN_STEPS
from dcdit.utils.modules import accepts_keyword, name_of, unwrap_model

Fraction = float | Tensor | Callable[[float], float]
"""rho: a number, a tensor (B,) with one for each image, or a function of the time in [0, 1] (1 is noise)."""
Seen = dict[str, Tensor]
"""What a model says about one of its calls. With a capacity also how many tokens it lost to that: ``overflow``."""


@runtime_checkable
class Observed(Protocol):
    """A model that says what it does in each call. Samplers hand it back to :meth:`record`, also from a graph.

    Two of one class that observe something else of the same ``model`` differ in their attribute ``observes``.
    """

    def observe(self, x: Tensor, t: Tensor, y: Tensor, **options: Any) -> tuple[Tensor, Seen]:
        """The output of a call, and tensors about it."""

    def record(self, seen: Seen) -> None:
        """Take note of a call."""


def guided(
    model: Callable[..., Tensor],
    y: Tensor,
    scale: float = 1.0,
    null_class: int | None = None,
    channels: int | str = 3,
    interval: tuple[float, float] | None = None,
    drop_fraction: Fraction | tuple[Fraction, Fraction] | None = None,
    budget: int | None = None,
    capacity: int | Literal["auto"] | None = None,
) -> "Guided":
    """The model with fixed labels, guidance and budget: a function ``(x, t) -> output``.

    The first ``channels`` channels become ``null + scale * (conditional - null)``. The others (the rest of the
    prediction, and the variance) are those of the conditional branch. At scale 1 the null branch is not computed.

    Args:
        model: called as ``model(x, t, y)``, plus ``drop_fraction``, ``budget`` and ``capacity`` if they are given here.
        y: (B,) labels.
        scale: guidance scale; 1 is none.
        null_class: label of the unconditional branch (``num_classes`` in DiT); needed unless scale is 1.
        channels: how many channels are guided (at most C); ``"all"`` is C. DiT and SiT guide three of the four latent
            channels, and so do the published numbers.
        interval: guide only at times in [low, high] of [0, 1], where 1 is noise (arXiv 2404.07724).
        drop_fraction: rho of a dynamic model: a number, a (B,) tensor with one for each image, or a function of the
            time in [0, 1]. A pair gives (conditional, null) their own, which is Lite-CFG (arXiv 2603.06351: up to 0.9
            for the null branch).
        budget: kept tokens per image of a dynamic model.
        capacity: packed tokens of a call of a dynamic model, both branches together. "auto" plans them with
            ``model.plan_capacity``, for calls with one branch and with both, at the times that drop least.

    Raises:
        ValueError: an option out of range, a missing null class, or a budget option that this model does not take.

    Example:
        >>> import torch
        >>> from dcdit.diffusion import guided
        >>> def model(x, t, y):  # says its label
        ...     return y[:, None, None, None].expand_as(x).float()
        >>> denoise = guided(model, torch.tensor([3]), scale=2.0, null_class=1, channels="all")
        >>> denoise(torch.zeros(1, 2, 1, 1), 500.0).flatten().tolist()  # 1 + 2 * (3 - 1)
        [5.0, 5.0]
    """
    if not 0 <= scale < math.inf:
        raise ValueError(f"cfg_scale is {scale}; accepted: a finite number, at least 0")
    if scale != 1 and null_class is None:
        raise ValueError(
            f"cfg_scale is {scale} but there is no null class; give null_class, or train with label dropout"
        )
    if channels != "all" and (not isinstance(channels, int) or channels < 1):
        raise ValueError(f"cfg channels are {channels!r}; accepted: a positive integer, or 'all'")
    check_interval(interval)
    options = {"drop_fraction": drop_fraction, "budget": budget, "capacity": capacity}
    for name, value in options.items():
        if value is not None and not accepts_keyword(model, name):
            raise ValueError(
                f"{name} is {value} but {name_of(model)} takes none; accepted: a dynamic model such as DCDiT"
            )
    # Of its own, because a captured run writes the labels of the next one here.
    labels = y.clone() if null_class is None else torch.cat([y, torch.full_like(y, null_class)])
    if capacity == "auto" and not hasattr(unwrap_model(model), "plan_capacity"):
        raise ValueError(f"capacity is 'auto' but {name_of(model)} plans none; accepted: a number, or a DCDiT")
    span = check_interval(interval)
    observed = isinstance(model, Observed)
    return Guided(model, labels, y.shape[0], scale, channels, span, drop_fraction, budget, capacity, observed)


@dataclass(frozen=True, eq=False)
class Guided:
    """What :func:`guided` returns; its arguments are described there.

    Args:
        labels: (B,), or (2B,) with the null class for the second half.
        observed: whether the model is :class:`Observed`.
    """

    model: Callable[..., Any]
    labels: Tensor
    images: int
    scale: float
    channels: int | str
    interval: tuple[float, float]
    drop_fraction: Fraction | tuple[Fraction, Fraction] | None
    budget: int | None
    capacity: int | Literal["auto"] | None
    observed: bool

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """The guided output for x (B, C, H, W) at a time from 1000 (noise) to 0."""
        return self.at(x, t)[0]

    def at(self, x: Tensor, t: float) -> tuple[Tensor, Seen | None]:
        """The same, and what the model says about the call; see :meth:`call`."""
        both = self.both(t)
        time = torch.full((), t, device=x.device)
        return self.call(x, time, both, self.fractions(t, both), self.sizes(both, [t]))

    def both(self, t: float) -> bool:
        """Whether a call at this time computes both branches."""
        low, high = self.interval
        return self.scale != 1 and low <= t / TRAIN_STEPS <= high

    def fractions(self, t: float, both: bool) -> float | Tensor | None:
        """The drop fraction of a call: None if there is none, a number where all rows share a constant one, else
        (B,), or (2B,) for both branches, float32.

        A number that varies over time must not reach the model, because torch.compile compiles anew for every number.
        """
        given = self.drop_fraction
        if given is None:
            return None
        pair = given if isinstance(given, tuple) else (given, given)
        time, images, device = t / TRAIN_STEPS, self.images, self.labels.device
        branches = [rho(time) if callable(rho) else rho for rho in (pair if both else pair[:1])]
        for rho in branches:
            if isinstance(rho, Tensor):
                if rho.shape != (images,):
                    raise ValueError(
                        f"drop_fraction has shape {tuple(rho.shape)}; accepted: ({images},), one per image"
                    )
            elif not 0 <= rho < 1:
                raise ValueError(f"drop_fraction is {rho} at time {time:g}; accepted: a number in [0, 1)")
        if all(isinstance(rho, float | int) for rho in pair) and len(set(branches)) == 1:
            return float(branches[0])
        return torch.cat(
            [
                rho.to(device, torch.float32) if isinstance(rho, Tensor) else torch.full((images,), rho, device=device)
                for rho in branches
            ]
        )

    def sizes(self, both: bool, times: Iterable[float]) -> dict[str, int]:
        """The options of the model that make the shapes of its calls static, for calls at any of these times."""
        if self.capacity != "auto":
            given = {"budget": self.budget, "capacity": self.capacity}
            return {name: value for name, value in given.items() if value is not None}
        rows = 2 * self.images if both else self.images
        fractions = [self.fractions(t, both) for t in times]
        dropped = [[rho or 0.0] * rows if not isinstance(rho, Tensor) else rho.tolist() for rho in fractions]
        plan = unwrap_model(self.model).plan_capacity(rows, [min(of_row) for of_row in zip(*dropped, strict=True)])
        return {"capacity": plan.capacity, "max_seqlen": plan.max_seqlen}

    def call(
        self, x: Tensor, t: Tensor, both: bool, rho: float | Tensor | None, sizes: dict[str, int]
    ) -> tuple[Tensor, Seen | None]:
        """The guided output, and what the model says about the call: all it can (:class:`Observed`), else how many
        tokens it lost to a capacity.

        Args:
            t: () time. both, rho, sizes: of this call, see :meth:`both`, :meth:`fractions` and :meth:`sizes`.
        """
        rows = 2 * self.images if both else self.images
        options: dict[str, Any] = sizes if rho is None else {**sizes, "drop_fraction": rho}
        inputs = torch.cat([x, x]) if both else x, t.expand(rows), self.labels[:rows]
        seen: Seen | None = None
        if self.observed:
            out, seen = self.model.observe(*inputs, **options)  # type: ignore[attr-defined]
        elif self.capacity is not None and accepts_keyword(self.model, "return_routing"):
            out, routing = self.model(*inputs, **options, return_routing=True)
            seen = {"overflow": routing.selection.overflow}
        else:
            out = self.model(*inputs, **options)
        if not both:
            return out, seen
        conditional, null = out[: self.images], out[self.images :]
        count = x.shape[1] if self.channels == "all" else min(int(self.channels), x.shape[1])
        mixed = null[:, :count] + self.scale * (conditional[:, :count] - null[:, :count])
        return torch.cat([mixed, conditional[:, count:]], dim=1), seen


def check_interval(interval: tuple[float, float] | None) -> tuple[float, float]:
    """The times (low, high) of a guidance interval; None means all times, (0, 1).

    Raises:
        ValueError: not 0 <= low <= high <= 1.
    """
    low, high = interval or (0.0, 1.0)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"cfg interval is {interval}; accepted: (low, high) with 0 <= low <= high <= 1")
    return low, high
