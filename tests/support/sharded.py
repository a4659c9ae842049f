"""A model of which fully_shard splits every layer, run by processes that the test starts."""

import torch
import torch.distributed as dist
from support.small import batch, small_dc_dit
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

IDENTITY = ("router.query.weight", "router.key.weight")


def check_sharded_model(rank: int, store: str, processes: int) -> None:
    """Each layer is sharded on its own: the result stays that of the whole model, and a reset fills the shards."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, processes), rank=rank, world_size=processes)
    mesh = init_device_mesh("cpu", (processes,))
    for router, start, context in (
        ("predictability", "share", False),
        ("dithered", "share", True),
        ("cosine2d", "identity", False),
    ):
        # FSDP takes contiguous parameters only.
        model = small_dc_dit(depth=1, router=router, start=start, cell_context=context).to(
            memory_format=torch.contiguous_format
        )
        inputs = batch(model.config)
        expected = model(*inputs)
        expected.square().mean().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        for module in reversed(list(model.modules())):
            if list(module.parameters(recurse=False)):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        out = model(*inputs)
        torch.testing.assert_close(out, expected)
        out.square().mean().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name], rtol=1e-4, atol=1e-5)
        for parameter in model.parameters():
            nn.init.constant_(parameter, float("nan"))
        model.reset_parameters()
        whole = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
        assert all(tensor.isfinite().all() for tensor in whole.values())
        if router == "cosine2d":
            assert all(torch.equal(whole[name], torch.eye(128)) for name in (*IDENTITY, "residual_proj.weight"))
    dist.destroy_process_group()
