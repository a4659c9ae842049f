"""Label dropout, for classifier-free guidance: the loop drops labels, the model does not.

The loop draws which labels a step drops for the whole batch, together with the noise (:mod:`dcdit.train.draws`). So the
result does not depend on how the batch is split. If the model drew as well, labels would be dropped twice.
"""

from torch import Tensor

from dcdit.checkpoint import Model


def drop_labels(y: Tensor, dropped: Tensor, null_class: int) -> Tensor:
    """Labels y (B,) with the null class where ``dropped`` (B,) bool is set."""
    return y.masked_fill(dropped, null_class)


def set_training_mode(model: Model) -> None:
    """Training mode for everything but the model's own label dropout."""
    model.train()
    model.y_embedder.eval()
