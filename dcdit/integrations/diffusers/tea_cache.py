"""TeaCache (arXiv 2411.19108) as hooks of diffusers, beside the caches that it has.

What the first block sees, its input modulated by the time, is cheap and changes about as much as the output of the
whole model. While the changes since the last computed step add up to less than a threshold, the blocks are left out,
and what they added then is added again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import Tensor, nn

HEAD, BLOCK = "tea_cache_head", "tea_cache_block"
"""Names of the hooks."""


@dataclass
class TeaCacheConfig:
    """For ``enable_cache`` of the transformers of this package.

    Attributes:
        threshold: of the summed changes. 0 leaves nothing out.
        coefficients: of the polynomial that turns the change of what the first block sees (mean absolute difference
            over mean absolute value) into the expected change of the output, highest power first. The default takes the
            change as it is. They belong to a checkpoint and a sampler: :func:`fit_tea_cache` finds them.
        num_inference_steps: of the run. If it is given, the last step is always computed, as the first one is.
        record: a list to which every step appends (change of what the first block sees, change of the output). While
            there is one, nothing is left out.

    Raises:
        ValueError: a threshold below 0, or no coefficients.

    Example:
        >>> from dcdit.integrations.diffusers import TeaCacheConfig
        >>> TeaCacheConfig(threshold=0.15).coefficients  # takes the change as it is
        (1.0, 0.0)
        >>> TeaCacheConfig(threshold=-1.0)
        Traceback (most recent call last):
            ...
        ValueError: threshold is -1.0; accepted: a number from 0
    """

    threshold: float = 0.1
    coefficients: Sequence[float] = (1.0, 0.0)
    num_inference_steps: int | None = None
    record: list[tuple[float, float]] | None = None

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold is {self.threshold}; accepted: a number from 0")
        if not len(self.coefficients) or not np.isfinite(self.coefficients).all():
            raise ValueError(f"coefficients are {self.coefficients}; accepted: finite numbers, highest power first")


def fit_tea_cache(record: Sequence[tuple[float, float]], degree: int = 4) -> tuple[float, ...]:
    """The coefficients of a :class:`TeaCacheConfig`, from what runs without any skipping recorded.

    Example:
        >>> from dcdit.integrations.diffusers import fit_tea_cache
        >>> [round(number, 6) + 0.0 for number in fit_tea_cache([(0.1, 0.2), (0.2, 0.4), (0.3, 0.6)], degree=1)]
        [2.0, 0.0]

    Raises:
        ValueError: fewer than ``degree + 1`` steps.
    """
    if len(record) <= degree:
        raise ValueError(f"{len(record)} steps were recorded; accepted: more than the degree, {degree}")
    seen, output = np.asarray(record, dtype=np.float64).T
    return tuple(float(number) for number in np.polyfit(seen, output, degree))


class State(BaseState):
    """Of one branch of guidance."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.step = 0
        self.computes = True
        self.change, self.summed = 0.0, 0.0
        self.seen: Tensor | None = None
        self.entered: Tensor | None = None
        self.output: Tensor | None = None
        self.added: Tensor | None = None


class HeadHook(ModelHook):
    """On the first block: it decides for all of them."""

    _is_stateful = True

    def __init__(self, states: StateManager, config: TeaCacheConfig) -> None:
        super().__init__()
        self.states, self.config = states, config

    def new_forward(self, block: nn.Module, hidden_states: Tensor, *args: Any) -> Tensor:
        state: State = self.states.get_state()
        state.entered = hidden_states
        state.computes = self._decide(state, block.modulated_input(hidden_states, *args))  # type: ignore[operator]
        state.step += 1
        if state.computes:
            return self.fn_ref.original_forward(hidden_states, *args)
        assert state.added is not None
        return hidden_states + state.added

    def _decide(self, state: State, seen: Tensor) -> bool:
        before, state.seen = state.seen, seen
        if before is None:
            return True
        state.change = relative_change(seen, before)
        state.summed += max(float(np.polyval(self.config.coefficients, state.change)), 0.0)
        last = self.config.num_inference_steps is not None and state.step == self.config.num_inference_steps - 1
        if self.config.record is None and state.summed < self.config.threshold and not last:
            return False
        state.summed = 0.0
        return True

    def reset_state(self, block: nn.Module) -> nn.Module:
        self.states.reset()
        return block


class BlockHook(ModelHook):
    """On every block, the first one too: it does nothing where all are left out, and the last remembers."""

    def __init__(self, states: StateManager, config: TeaCacheConfig, is_last: bool) -> None:
        super().__init__()
        self.states, self.config, self.is_last = states, config, is_last

    def new_forward(self, block: nn.Module, hidden_states: Tensor, *args: Any) -> Tensor:
        state: State = self.states.get_state()
        if not state.computes:
            return hidden_states
        output = self.fn_ref.original_forward(hidden_states, *args)
        if self.is_last:
            assert state.entered is not None
            state.added = output - state.entered
            if self.config.record is not None:
                if state.output is not None:
                    self.config.record.append((state.change, relative_change(output, state.output)))
                state.output = output
        return output


def apply_tea_cache(blocks: nn.ModuleList, config: TeaCacheConfig) -> None:
    """Put the hooks on blocks whose first one has a method ``modulated_input``."""
    states = StateManager(State)
    for index, block in enumerate(blocks):
        registry = HookRegistry.check_if_exists_or_initialize(block)
        registry.register_hook(BlockHook(states, config, is_last=index == len(blocks) - 1), BLOCK)
    HookRegistry.check_if_exists_or_initialize(blocks[0]).register_hook(HeadHook(states, config), HEAD)


def remove_tea_cache(blocks: nn.ModuleList) -> None:
    """Take them off again."""
    for block in blocks:
        registry = HookRegistry.check_if_exists_or_initialize(block)
        for name in (HEAD, BLOCK):
            registry.remove_hook(name, recurse=False)


def relative_change(after: Tensor, before: Tensor) -> float:
    """Mean absolute difference over mean absolute value. It is read on the host, once a step."""
    return float((after - before).abs().mean() / before.abs().mean())
