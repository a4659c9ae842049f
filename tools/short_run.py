"""Run every kernel once, forward and backward, in small models on a GPU; compute-sanitizer checks this run.

    python -m tools.short_run

tools/gpu_suite.py starts it.
"""

import torch

from dcdit.models import DCDiT, DCDiTConfig
from dcdit.ops import ratio_loss


def main() -> None:
    torch.manual_seed(0)
    for options in ({"router": "predictability"}, {"router": "cosine2d"}, {"router": "cosine1d", "dechunk": "ema"}):
        config = DCDiTConfig(grid=(6, 7), hidden_size=128, depth=1, num_heads=2, num_classes=4, **options)
        model = DCDiT(config).to("cuda")
        x, t, y = torch.randn(3, 4, 6, 7, device="cuda"), torch.rand(3, device="cuda"), torch.arange(3, device="cuda")
        for mode in ({"drop_fraction": 0.3}, {"capacity": 90}, {"budget": 9}):
            out, routing = model(x, t, y, **mode, return_routing=True)
            (out.square().mean() + ratio_loss(routing.prob, routing.natural_mask, 4.0)).backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
