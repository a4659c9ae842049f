import copy
import inspect

import pytest
import torch
from support.small import batch, small_dit

from dcdit.models import DiT


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_shapes(patch_size: int) -> None:
    model = small_dit(patch_size=patch_size)
    assert model(*batch(model.config)).shape == (3, 8, 8, 12)
    assert model.pos_embed.shape == (96 // patch_size**2, 128)


def test_patches_return_to_their_place() -> None:
    """A patch embedding that copies pixels, no blocks at work, and a final layer that copies them out again."""
    model = small_dit(patch_size=2, in_channels=2, learn_sigma=False, depth=1, grid=(4, 6))
    numbers = torch.arange(48.0).view(1, 2, 4, 6)
    patches = numbers.unfold(2, 2, 2).unfold(3, 2, 2)  # (1, C, h, w, P, P)
    tokens = patches.permute(0, 2, 3, 4, 5, 1).reshape(1, 6, 8)
    assert torch.equal(model.unpatchify(tokens), numbers)


def test_dropping_tokens_is_not_accepted() -> None:
    model = small_dit()
    assert list(inspect.signature(DiT.forward).parameters) == ["self", "x", "t", "y"]
    with pytest.raises(TypeError):
        model(*batch(model.config), drop_fraction=0.1)


def test_bfloat16_weights_and_autocast_stay_close() -> None:
    model = small_dit()
    inputs = batch(model.config)
    exact = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(*inputs)
    converted = copy.deepcopy(model).bfloat16()(*inputs)
    assert autocast.dtype == converted.dtype == torch.bfloat16
    for out in (autocast, converted):
        assert ((out.float() - exact).norm() / exact.norm()).item() < 0.05


def test_images_do_not_see_each_other() -> None:
    model = small_dit().double()
    x, t, y = batch(model.config)
    together = model(x, t, y)
    for i in range(3):
        torch.testing.assert_close(model(x[i : i + 1], t[i : i + 1], y[i : i + 1])[0], together[i])


@torch.no_grad()
def test_one_graph() -> None:
    model = small_dit(depth=1)
    inputs = batch(model.config)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), model(*inputs))


def test_starts_at_zero() -> None:
    model = DiT(small_dit().config)
    assert not model(*batch(model.config)).any()


def test_bad_inputs() -> None:
    model = small_dit()
    x, t, y = batch(model.config)
    with pytest.raises(ValueError, match=r"accepted: \(B, 4, 8, 12\)"):
        model(x[:, :, :4], t, y)
    with pytest.raises(ValueError, match="accepted: 0 to 10"):
        model(x, t, y + 11)
