"""Which extra of this package installs a module that is missing."""

import importlib

TRAIN = ("accelerate", "diffusers", "huggingface_hub", "tqdm", "PIL", "yaml")
EXTRAS = {
    "train": TRAIN,
    "stream": ("datasets", "pyarrow"),
    "eval": ("torchmetrics", "accelerate", "tqdm", "PIL"),
    "demo": (*TRAIN, "skimage", "sklearn", "matplotlib"),
}
"""Extra to the import names of what it installs."""
OF_COMMAND = {"evaluate": "eval", "demo": "demo"}
"""The extra that has what a command needs; for others it is the first one that has the module."""


def is_installed(module: str) -> bool:
    """Whether a module can be imported here."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        return False
    return True


def missing(module: str, command: str | None) -> str | None:
    """What to do about a module that a command did not find, in one line. None for a module of no extra."""
    package = module.partition(".")[0]
    found = [extra for extra, packages in EXTRAS.items() if package in packages]
    if not found:
        return None
    extra = OF_COMMAND.get(command or "", found[0])
    return f"{package} is not installed: pip install 'dcdit[{extra if extra in found else found[0]}]'"
