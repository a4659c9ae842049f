"""The distillation loss: zero if the student equals the teacher, and equal to its definition otherwise."""

import pytest
import torch
from support.small import batch, small_dc_dit, small_dit
from torch import Tensor, nn

from dcdit.models import DCDiT, DCDiTConfig, count_flops
from dcdit.models.dc_dit import BlockStates
from dcdit.models.upcycle import freeze_embedders, upcycle, upcycled_fields
from dcdit.ops import select_tokens
from dcdit.train.distill import Teacher, block_outputs, patch_of_cell


class Fixed(nn.Module):
    """A module with the same output for every input."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *args: Tensor) -> Tensor:
        return self.answer


def student_of(source, **overrides) -> DCDiT:
    torch.manual_seed(1)
    model = DCDiT(DCDiTConfig.from_dict({**upcycled_fields(source.config), **overrides}))
    upcycle(model, source)
    freeze_embedders(model)
    return model


def fed_with_teacher_tokens(source, x, keep):
    """A student whose encoder gives each grid cell the token of its patch, and whose router keeps ``keep``."""
    model = student_of(source)
    cells = patch_of_cell(source.config.grid, source.config.patch_size)
    tokens = source.x_embedder(x).flatten(2).transpose(1, 2) + source.pos_embed
    model.encoder = Fixed((tokens[:, cells] - model.pos_embed).detach())
    model.router = Fixed(torch.where(keep, 0.9, 0.1).expand(x.shape[0], -1))
    return model


def one_cell_per_patch(grid, patch_size, seed=0):
    """(H*W,) bool: a random grid cell of every patch."""
    cells = patch_of_cell(grid, patch_size)
    order = torch.rand(cells.shape, generator=torch.Generator().manual_seed(seed))
    best = torch.full((int(cells.max()) + 1,), -1.0).scatter_reduce(0, cells, order, "amax")
    return order == best[cells]


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_zero_where_the_token_sets_are_the_same(patch_size, dropout):
    """One token per patch and equal inputs: attention does not depend on the order. Both drop the same labels."""
    source = small_dit(patch_size=patch_size, class_dropout_prob=dropout or 0.1)
    x, t, y = batch(source.config, size=4)
    model = fed_with_teacher_tokens(source, x, one_cell_per_patch(source.config.grid, patch_size))
    model.train(dropout > 0)
    torch.manual_seed(3)
    _, routing, states = model(x, t, y, return_states=True)
    teacher = Teacher(source)
    assert teacher.loss(x, states, routing.selection) < 1e-10
    with torch.no_grad():
        states.outputs[0][0] += 0.1
    assert teacher.loss(x, states, routing.selection) > 1e-7


def test_zero_needs_the_right_positions():
    """Other positions than those that the blocks of the source were trained on give a loss."""
    source = small_dit(patch_size=2)
    x, t, y = batch(source.config)
    model = fed_with_teacher_tokens(source, x, one_cell_per_patch(source.config.grid, 2))
    model.pos_embed += 0.1
    _, routing, states = model(x, t, y, return_states=True)
    assert Teacher(source).loss(x, states, routing.selection) > 1e-4


def test_definition():
    """Each token against the patch that covers it; error over mean square per image; mean over images and blocks."""
    source, rng = small_dit(), torch.Generator().manual_seed(0)
    x, t, y = batch(source.config)
    cond = nn.functional.silu(source.t_embedder(t) + source.y_embedder(y))
    sel = select_tokens(torch.rand(3, 96, generator=rng))
    outputs = [torch.randn(len(sel.indices), 128, generator=rng) for _ in range(2)]
    theirs = block_outputs(source, x, cond)
    wanted = []
    for ours, target in zip(outputs, theirs, strict=True):
        errors = [[], [], []]
        for token, index in zip(ours, sel.indices.tolist(), strict=True):
            image, cell = divmod(index, 8 * 12)
            row, col = divmod(cell, 12)
            errors[image].append((token - target[image, (row // 2) * 6 + col // 2]).square().mean())
        wanted += [sum(e) / len(e) / target[image].square().mean() for image, e in enumerate(errors)]
    found = Teacher(source).loss(x, BlockStates(cond, outputs), sel)
    torch.testing.assert_close(found, sum(wanted) / 6, rtol=1e-5, atol=0)


def test_the_loss_of_a_batch_does_not_depend_on_how_it_is_split():
    source = small_dit()
    model, teacher = student_of(source), Teacher(source)
    inputs = batch(source.config, size=4)

    def loss(rows: slice) -> Tensor:
        x, t, y = (tensor[rows] for tensor in inputs)
        _, routing, states = model(x, t, y, return_states=True)
        return teacher.loss(x, states, routing.selection)

    parts = [loss(slice(0, 2)), loss(slice(2, 4))]
    assert abs(parts[0] - parts[1]) > 1e-3
    torch.testing.assert_close(loss(slice(4)), sum(parts) / 2)


def test_silent_student_has_loss_one():
    source = small_dit()
    x, t, y = batch(source.config)
    cond = nn.functional.silu(source.t_embedder(t) + source.y_embedder(y))
    sel = select_tokens(torch.ones(3, 96))
    silent = [torch.zeros(len(sel.indices), 128)] * 2
    torch.testing.assert_close(Teacher(source).loss(x, BlockStates(cond, silent), sel), torch.tensor(1.0))


def test_teacher_states_are_those_of_its_forward_pass():
    source = small_dit()
    x, t, y = batch(source.config)
    seen = []
    hooks = [block.register_forward_hook(lambda module, args, out: seen.append(out)) for block in source.blocks]
    source(x, t, y)
    for hook in hooks:
        hook.remove()
    cond = nn.functional.silu(source.t_embedder(t) + source.y_embedder(y))
    for found, wanted in zip(block_outputs(source, x, cond), seen, strict=True):
        assert torch.equal(found, wanted) and not found.requires_grad


def test_gradient_teaches_encoder_and_blocks_only():
    source = small_dit()
    model = student_of(source)
    teacher = Teacher(source)
    x, t, y = batch(source.config)
    _, routing, states = model(x, t, y, return_states=True)
    teacher.loss(x, states, routing.selection).backward()
    learning = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {"x_embedder", "cond_adaptor", "encoder", "blocks", "modulation"}
    assert all(p.grad is None and not p.requires_grad for p in source.parameters())


def test_states_leave_the_output_alone():
    model = small_dc_dit()
    inputs = batch(model.config)
    plain = model(*inputs, drop_fraction=0.2)
    out, routing, states = model(*inputs, drop_fraction=0.2, return_states=True)
    assert torch.equal(out, plain)
    assert [tuple(tokens.shape) for tokens in states.outputs] == [(len(routing.selection.indices), 128)] * 2
    seen = []
    model.norm.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    model(*inputs, drop_fraction=0.2)
    assert torch.equal(states.outputs[-1], seen[0])


def test_states_under_compile():
    model = small_dc_dit(depth=1)
    inputs = batch(model.config)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    wanted = model(*inputs, budget=24, return_states=True)[2]
    found = compiled(*inputs, budget=24, return_states=True)[2]
    for a, b in zip(found.outputs, wanted.outputs, strict=True):
        torch.testing.assert_close(a, b)


def test_flops_are_one_forward_pass():
    source = small_dit()
    assert Teacher(source).flops == count_flops(source.config)["total"]


def test_patches_of_cells():
    assert patch_of_cell((4, 6), 2).view(4, 6).tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2
    assert patch_of_cell((2, 3), 1).tolist() == list(range(6))
