"""A training step as ``dcdit train`` runs it: float32 weights, autocast, losses, clipping, AdamW, averaged weights."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dcdit.config import RECIPES, TrainConfig, load_config
from dcdit.diffusion import NoisyBatch, create_objective
from dcdit.models import DCDiTConfig, DiTConfig
from dcdit.nn.embedding import drop_labels
from dcdit.train.draws import draw_step
from dcdit.train.ema import EMA
from dcdit.train.graphed import GraphedStep
from dcdit.train.losses import training_losses
from dcdit.train.optimizer import clipped_step, create_optimizer

RECIPE = "dc-dit-xl-256.yaml"


class RecipeStep:
    """One step after the other on the same batch, at a fixed drop fraction.

    Args:
        model: with float32 weights, on its device. Its weights do not change: the learning rate is 0.
        x, y: (B, C, H, W) latents and (B,) labels.
        precision: of the recipe, ``bf16`` or ``fp32``.
        net: what is called in place of the model, such as a compiled form of it.
        model_config: of a model of another package, which has none.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        precision: str = "bf16",
        net: Callable[..., Any] | None = None,
        model_config: DCDiTConfig | DiTConfig | None = None,
    ) -> None:
        self.model, self.x, self.y = model, x, y
        self.model_config: Any = model.config if model_config is None else model_config
        self.net = model if net is None else net
        self.config: TrainConfig = load_config(RECIPES / RECIPE, {"optim.precision": precision, "optim.lr": 0.0})
        self.config.router.drop_warmup_steps = 0
        self.config.router.group_size = None if len(x) % 16 else 16
        for part in model.modules():
            if hasattr(part, "dropout_prob"):  # the step itself decides which labels are dropped
                part.dropout_prob = 0.0
        model.train()
        self.objective = create_objective("dit", self.model_config.learn_sigma)
        optim = self.config.optim
        self.optimizer = create_optimizer(model, optim.lr, optim.weight_decay, x.device)
        self.ema = EMA(model, optim.ema_decay)

    def inputs(self, drop: float) -> tuple[NoisyBatch, Tensor]:
        """Noisy images and labels, with the random numbers of step 0."""
        self.config.router.drop_fractions = [drop]
        draws = draw_step(self.objective, self.x.shape, self.model_config.class_dropout_prob, 0, 0, self.x.device)
        y = drop_labels(self.y, draws.dropped, self.model_config.num_classes)
        return self.objective.noise(self.x, draws.t, draws.noise), y

    def losses(self, drop: float) -> tuple[dict[str, Tensor], Tensor | None]:
        """What :func:`dcdit.train.losses.training_losses` returns."""
        noisy, y = self.inputs(drop)
        return training_losses(self.config, 0, self.net, self.objective, noisy, y, None)

    def backward(self, drop: float) -> dict[str, Tensor]:
        """The forward and the backward pass."""
        metrics, _ = self.losses(drop)
        metrics["loss"].backward()
        return metrics

    def update(self) -> None:
        """What follows the backward pass: clipping, the optimiser, the averages."""
        clipped_step(self.optimizer, self.config.optim.grad_clip)
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()

    def __call__(self, drop: float) -> None:
        """The whole step."""
        self.backward(drop)
        self.update()

    def graphed(self) -> Callable[[float], dict[str, Tensor]]:
        """The whole step in CUDA graphs, after the first plain ones."""
        graphed = GraphedStep(self.config, self.net, self.objective, self.optimizer, self.ema)
        while not graphed.takes(0):
            self(0.0)

        def step(drop: float) -> dict[str, Tensor]:
            taken = graphed.run(0, *self.inputs(drop))
            assert taken is not None, "a capture failed"
            return {**taken[0], "grad_norm": graphed.update()}

        return step
