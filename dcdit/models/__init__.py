"""DC-DiT, the static DiT baseline, DyDiT, SparseDiT, their presets and checkpoint conversion."""

from dcdit.models.capacity import Capacity, KeptShare, plan_capacity
from dcdit.models.config import DCDiTConfig, DiTConfig, DyDiTConfig, ModelConfig, SparseDiTConfig
from dcdit.models.convert import load_dit, load_official, to_dit, to_official
from dcdit.models.dc_dit import DCDiT, Routing
from dcdit.models.dit import DiT
from dcdit.models.dy_dit import DyDiT
from dcdit.models.flops import count_flops
from dcdit.models.presets import PRESETS, create_config, create_model
from dcdit.models.sliced import SlicedModel
from dcdit.models.sparse_dit import SparseDiT

__all__ = [
    "PRESETS",
    "Capacity",
    "DCDiT",
    "DCDiTConfig",
    "DiT",
    "DiTConfig",
    "DyDiT",
    "DyDiTConfig",
    "KeptShare",
    "ModelConfig",
    "Routing",
    "SlicedModel",
    "SparseDiT",
    "SparseDiTConfig",
    "count_flops",
    "create_config",
    "create_model",
    "load_dit",
    "load_official",
    "plan_capacity",
    "to_dit",
    "to_official",
]
