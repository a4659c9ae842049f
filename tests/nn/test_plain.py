"""A fused path is taken for a module as PyTorch made it, and for no module whose call does more than that."""

import pytest
import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
    register_module_full_backward_pre_hook,
)
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from dcdit.nn import GroupNormSiLU
from dcdit.nn.plain import is_plain, is_plain_conv3x3

HOOKS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook", "backward_hook")
GLOBAL_HOOKS = (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
    register_module_full_backward_pre_hook,
)


class MyConv(nn.Conv2d):
    pass


def conv(**settings) -> nn.Conv2d:
    return nn.Conv2d(4, 4, **{"kernel_size": 3, "padding": 1, **settings})


def with_attribute(name):
    module = conv()
    setattr(module, name, lambda *args: args[0])
    return module


def compiled():
    module = conv()
    module.compile()
    return module


@pytest.mark.parametrize(
    ("module", "cls"),
    [
        (conv(), nn.Conv2d),
        (nn.Linear(4, 4, bias=False), nn.Linear),
        (nn.GroupNorm(2, 4), nn.GroupNorm),
        (GroupNormSiLU(2, 4), GroupNormSiLU),
        (conv().eval().requires_grad_(False).to(torch.bfloat16), nn.Conv2d),
    ],
)
def test_modules_as_they_were_made_are_plain(module, cls):
    assert is_plain(module, cls)


@pytest.mark.parametrize(
    "module",
    [
        MyConv(4, 4, 3, padding=1),
        nn.Sequential(conv()),
        weight_norm(conv()),
        spectral_norm(conv()),
        parametrizations.weight_norm(conv()),
        parametrizations.spectral_norm(conv()),
        prune.l1_unstructured(conv(), "weight", amount=1),
        with_attribute("forward"),
        with_attribute("_conv_forward"),
        compiled(),
    ],
)
def test_modules_that_do_more_are_not(module):
    assert not is_plain(module, nn.Conv2d)


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks(hook):
    module = conv()
    handle = getattr(module, f"register_{hook}")(lambda *_: None)
    assert not is_plain(module, nn.Conv2d)
    handle.remove()
    assert is_plain(module, nn.Conv2d)


@pytest.mark.parametrize("register", GLOBAL_HOOKS)
def test_global_hooks(register):
    handle = register(lambda *_: None)
    try:
        assert not is_plain(conv(), nn.Conv2d)
    finally:
        handle.remove()
    assert is_plain(conv(), nn.Conv2d)


def test_a_class_whose_forward_was_replaced(monkeypatch):
    module, original = conv(), nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: 2 * original(self, x))
    assert not is_plain(module, nn.Conv2d)
    assert is_plain(nn.Linear(4, 4), nn.Linear)


def test_a_parametrisation_that_was_removed():
    module = parametrizations.weight_norm(conv())
    nn.utils.parametrize.remove_parametrizations(module, "weight")
    assert is_plain(module, nn.Conv2d)


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 1, "padding": 0},
        {"kernel_size": (3, 1)},
        {"padding": 0},
        {"padding": "same"},
        {"padding_mode": "circular"},
        {"stride": 2},
        {"dilation": 2},
        {"groups": 2},
        {"bias": False},
    ],
)
def test_other_convolutions(settings):
    assert is_plain_conv3x3(conv())
    assert is_plain(conv(**settings), nn.Conv2d)
    assert not is_plain_conv3x3(conv(**settings))
