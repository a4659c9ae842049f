"""The training configuration: a YAML file, ``section.key=value`` overrides, and the dataclasses they fill."""

from dcdit.config.train import (
    RECIPES,
    DataSection,
    DiffusionSection,
    ModelSection,
    OptimSection,
    RouterSection,
    RunSection,
    TrainConfig,
    UpcycleSection,
    describe,
    dump_yaml,
    from_dict,
    given_keys,
    load_config,
    override,
    to_dict,
)

__all__ = [
    "RECIPES",
    "DataSection",
    "DiffusionSection",
    "ModelSection",
    "OptimSection",
    "RouterSection",
    "RunSection",
    "TrainConfig",
    "UpcycleSection",
    "describe",
    "dump_yaml",
    "from_dict",
    "given_keys",
    "load_config",
    "override",
    "to_dict",
]
