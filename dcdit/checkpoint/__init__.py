"""Checkpoints: safetensors files that carry the model's configuration, written atomically. Nothing is pickled."""

from dcdit.checkpoint.model import *  # noqa: F403
