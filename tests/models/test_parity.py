"""DCDiT against the reference implementation, through its own checkpoint names."""

import pytest
import torch
from support.golden import CASES, NUM_HEADS, RATIO_WEIGHT, TARGET, Golden
from torch import Tensor

from dcdit import ops
from dcdit.models import load_official, to_official
from dcdit.models.convert.official import key_table

# Some gradients are zero in exact arithmetic (a per-channel shift before a one-channel group norm): there the reference
# stores the float32 rounding noise of its own summation order.
NOISE = 1e-7


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden()


@pytest.fixture(params=["torch", "reference"])
def backend(request):
    with ops.use_backend(request.param):
        yield


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(golden: Golden, case: int, backend) -> None:
    model = load_official(golden.state, NUM_HEADS).eval()
    expected = golden.group(f"case{case}/")
    out, routing = model(*golden.inputs, drop_fraction=golden.drop(case), return_routing=True)

    assert torch.equal(routing.mask, expected["mask"].bool())
    assert torch.equal(routing.natural_mask, expected["mask_natural"].bool())
    assert routing.selection.lengths.tolist() == expected["mask"].sum(1).tolist()
    torch.testing.assert_close(routing.prob, expected["prob"], rtol=0, atol=1e-5)
    assert relative(out, expected["out"]) < 1e-4

    ratio = ops.ratio_loss(routing.prob, routing.natural_mask, TARGET)
    torch.testing.assert_close(ratio, expected["ratio_loss"], rtol=1e-5, atol=0)
    ((out * expected["loss_weights"]).mean() + RATIO_WEIGHT * ratio).backward()

    grads = gradients(model)
    norms = golden.group(f"case{case}/gradnorm/")
    assert norms.keys() == grads.keys() - {"pos_embed"}
    for key, norm in norms.items():
        assert grads[key].norm().item() == pytest.approx(norm.item(), rel=1e-3, abs=NOISE), key
    for key, grad in golden.group(f"case{case}/grad/").items():
        assert relative(grads[key], grad) < 1e-3, key


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Under the reference implementation's names and shapes: its export, applied to the gradients."""
    twin = load_official(to_official(model), NUM_HEADS)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(grads[name])
    return to_official(twin)


def test_the_noise_floor_hides_no_real_gradient(golden: Golden) -> None:
    """Every gradient norm is either far above the floor or one of the exact zeros."""
    for case in CASES:
        for key, norm in golden.group(f"case{case}/gradnorm/").items():
            exact_zero = key.endswith(("conv1.bias", "cond_proj.1.weight", "cond_proj.1.bias"))
            assert norm < NOISE if exact_zero else norm > 1e4 * NOISE, key


def test_round_trip_is_bitwise(golden: Golden) -> None:
    back = to_official(load_official(golden.state, NUM_HEADS))
    assert back.keys() == golden.state.keys()
    for key, value in golden.state.items():
        assert back[key].dtype == value.dtype
        assert torch.equal(back[key], value), key
    assert set(key_table(depth=2)) == golden.state.keys()


def test_round_trip_keeps_each_dtype(golden: Golden) -> None:
    state = {k: v if k.startswith("hnet.residual_proj") else v.bfloat16() for k, v in golden.state.items()}
    back = to_official(load_official(state, NUM_HEADS))
    assert all(back[key].dtype == value.dtype and torch.equal(back[key], value) for key, value in state.items())


def test_loaded_weights_are_copies(golden: Golden) -> None:
    state = {key: value.clone() for key, value in golden.state.items()}
    model = load_official(state, NUM_HEADS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(state[key], golden.state[key]) for key in state)
