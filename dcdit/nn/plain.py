"""When a fused path may read the weights of a submodule instead of calling it.

Calling a module can do more than its class says: hooks run, a parametrisation computes the weight, an adapter (LoRA)
takes the module's place, ``fully_shard`` gathers the weight. A path that only reads weights would ignore all of these,
or fail. So it is taken only where the submodule is plain, and otherwise the submodule is called.

Under ``torch.compile`` the decision is made while tracing. A hook that is registered after that is not seen before
``torch._dynamo.reset()``, as on every compiled module.
"""

import sys
from typing import TypeGuard, TypeVar

from torch import nn
from torch.nn.modules import module as torch_module

Module = TypeVar("Module", bound=nn.Module)


def is_plain(module: nn.Module, cls: type[Module]) -> TypeGuard[Module]:
    """Whether calling the module runs ``cls.forward`` on the module's own weights and nothing else.

    False for: another class (subclasses, adapters, ``torch.nn.utils.parametrize`` and ``fully_shard``, which both
    change the class); any forward, forward-pre, backward or backward-pre hook, also a global one
    (``torch.nn.utils.weight_norm``, ``spectral_norm``, pruning and profilers use them); a ``forward`` that was replaced
    on the instance (offloading) or on the class; ``module.compile()``.

    Args:
        module: what the fused path would bypass. Its children are not looked at.
        cls: the class whose arithmetic the fused path does, e.g. ``nn.Linear``. It defines ``forward`` itself.
    """
    return (
        type(module) is cls
        and runs_only_forward(module)
        and "_conv_forward" not in module.__dict__
        and cls.forward.__globals__ is vars(sys.modules[cls.__module__])
    )


def runs_only_forward(module: nn.Module) -> bool:
    """Whether calling the module runs the ``forward`` of its class, whatever that is, and no hook."""
    own = module.__dict__
    return (
        not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not torch_module._has_any_global_hook()
        and not ("forward" in own or "_compiled_call_impl" in own)
    )


def is_plain_conv3x3(conv: nn.Module) -> bool:
    """Whether the module is plain and a 3x3 convolution with a bias, stride 1 and one row of zeros around the input."""
    return (
        is_plain(conv, nn.Conv2d)
        and conv.kernel_size == (3, 3)
        and conv.padding == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.stride == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.bias is not None
    )
