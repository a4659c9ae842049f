"""Models and training state on disk. Files of this package are safetensors and JSON; nothing is pickled.

``model`` is one model file, ``run`` the checkpoints of a training run, ``folders`` where those are, ``optimizer`` the
state of an optimiser in them, ``foreign`` the files of other code bases, and ``pretrained`` a model from any path that
holds one.
"""

from dcdit.checkpoint.card import model_card
from dcdit.checkpoint.folders import (
    CHECKPOINTS,
    EMA_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    TRAINER_FILE,
    checkpoint_path,
    find_checkpoint,
    is_checkpoint,
    list_checkpoints,
    model_file,
    run_folder,
)
from dcdit.checkpoint.foreign import read_state_dict
from dcdit.checkpoint.model import (
    FORMAT,
    Model,
    architecture_of,
    class_names_in,
    load_weights,
    model_notes,
    save_model,
    set_notes,
)
from dcdit.checkpoint.optimizer import load_optimizer, optimizer_tensors
from dcdit.checkpoint.pretrained import load_model, load_static_dit, read_metadata, read_objective
from dcdit.checkpoint.run import (
    Checkpoint,
    keep_newest,
    load_checkpoint,
    read_class_names,
    read_trainer,
    save_checkpoint,
)

__all__ = [
    "CHECKPOINTS",
    "EMA_FILE",
    "FORMAT",
    "MODEL_FILE",
    "OPTIMIZER_FILE",
    "TRAINER_FILE",
    "Checkpoint",
    "Model",
    "architecture_of",
    "checkpoint_path",
    "class_names_in",
    "find_checkpoint",
    "is_checkpoint",
    "keep_newest",
    "list_checkpoints",
    "load_checkpoint",
    "load_model",
    "load_optimizer",
    "load_static_dit",
    "load_weights",
    "model_card",
    "model_file",
    "model_notes",
    "optimizer_tensors",
    "read_class_names",
    "read_metadata",
    "read_objective",
    "read_state_dict",
    "read_trainer",
    "run_folder",
    "save_checkpoint",
    "save_model",
    "set_notes",
]
