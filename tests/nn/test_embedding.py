import math

import pytest
import torch
from support.golden import Golden

from dcdit.nn import LabelEmbedder, TimestepEmbedder, sincos_position
from dcdit.nn.embedding import drop_labels


def test_position_table_is_the_reference_implementations() -> None:
    torch.testing.assert_close(sincos_position(128, (16, 16)), Golden().state["pos_embed"][0], rtol=0, atol=1e-6)


def test_position_table_of_a_rectangle_is_a_corner_of_the_square() -> None:
    square = sincos_position(32, (6, 6)).unflatten(0, (6, 6))
    assert torch.equal(sincos_position(32, (3, 6)).unflatten(0, (3, 6)), square[:3])
    assert torch.equal(sincos_position(32, (6, 2)).unflatten(0, (6, 2)), square[:, :2])


def test_first_half_of_the_position_is_the_column() -> None:
    table = sincos_position(8, (3, 5)).unflatten(0, (3, 5))
    row, col = 2, 4
    slow = 10000**-0.5
    expected = [f(x * w) for x in (col, row) for f in (math.sin, math.cos) for w in (1, slow)]
    torch.testing.assert_close(table[row, col], torch.tensor(expected))


@pytest.mark.parametrize("shift", [0, 1])
def test_timestep_features(shift: int) -> None:
    embedder = TimestepEmbedder(16, frequency_shift=shift)
    seen = []
    embedder.fc1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    t = torch.tensor([0, 7, 999])
    out = embedder(t)
    frequencies = 10000.0 ** -(torch.arange(128, dtype=torch.float64) / (128 - shift))
    angles = t.double()[:, None] * frequencies
    torch.testing.assert_close(seen[0].double(), torch.cat([angles.cos(), angles.sin()], 1), rtol=0, atol=1e-4)
    assert torch.equal(out, embedder(t.float()))


def test_timestep_features_stay_exact_in_bfloat16() -> None:
    """999 and 998 are one bfloat16 number: the features must be computed before rounding."""
    embedder = TimestepEmbedder(16).bfloat16()
    first, second = embedder(torch.tensor([999, 998]))
    assert not torch.equal(first, second)


def test_labels_are_dropped_in_training_only() -> None:
    torch.manual_seed(0)
    embedder = LabelEmbedder(num_classes=7, dim=4, dropout_prob=0.5)
    y = torch.arange(7).repeat(40)
    null = embedder.table.weight[7]
    dropped = (embedder(y) == null).all(1).float().mean()
    assert 0.35 < dropped < 0.65
    assert torch.equal(embedder.eval()(y), embedder.table(y))
    assert torch.equal(embedder(torch.tensor([7]))[0], null)


def test_a_training_loop_can_drop_labels_itself() -> None:
    """With the embedder's own dropping off, it embeds what it gets and draws no random number."""
    embedder = LabelEmbedder(num_classes=7, dim=4, dropout_prob=0.5)
    embedder.dropout_prob = 0.0
    dropped = torch.tensor([True, False, True, False])
    y = drop_labels(torch.arange(4), dropped, null_class=7)
    assert y.tolist() == [7, 1, 7, 3]
    state = torch.get_rng_state()
    assert torch.equal(embedder(y), embedder.table(y))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_embedder_drops_as_the_function_does() -> None:
    embedder = LabelEmbedder(num_classes=7, dim=4, dropout_prob=0.5)
    y = torch.arange(7)
    torch.manual_seed(0)
    found = embedder(y)
    torch.manual_seed(0)
    assert torch.equal(found, embedder.table(drop_labels(y, torch.rand(7) < 0.5, 7)))


def test_without_dropout_there_is_no_null_class() -> None:
    embedder = LabelEmbedder(num_classes=7, dim=4, dropout_prob=0.0)
    assert embedder.table.num_embeddings == 7
    assert torch.equal(embedder(torch.tensor([3])), embedder.table.weight[3:4])
