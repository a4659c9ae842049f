"""DC-DiT in diffusers: a model, a pipeline, and what makes diffusers find them. See ``docs/diffusers.md``.

Importing this package is what ``DiffusionPipeline.from_pretrained`` needs to load a saved pipeline: diffusers looks for
the class of a pipeline among its own names only, and on the Hub accepts components of libraries that it knows.
"""

try:
    import diffusers
    import diffusers.hooks.mag_cache  # the youngest of what is used here
except ImportError:
    raise ModuleNotFoundError("this needs diffusers, 0.37 or newer: pip install 'dcdit[diffusers]'") from None

from diffusers import ModelMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from dcdit.integrations.diffusers.pipeline import DCDiTPipeline
from dcdit.integrations.diffusers.tea_cache import TeaCacheConfig, fit_tea_cache
from dcdit.integrations.diffusers.transformer import DCDiTTransformer2DModel, StaticDiTTransformer2DModel

__all__ = [
    "DCDiTPipeline",
    "DCDiTTransformer2DModel",
    "ModelMixin",
    "StaticDiTTransformer2DModel",
    "TeaCacheConfig",
    "fit_tea_cache",
]
# diffusers loads a component from a module that has a base class of its own by name. Hence ModelMixin.

for _class in (DCDiTPipeline, DCDiTTransformer2DModel, StaticDiTTransformer2DModel):
    # Saved pipelines name the module of each class. It is this one, wherever the code lies.
    _class.__module__ = __name__
    setattr(diffusers, _class.__name__, _class)
LOADABLE_CLASSES[__name__] = {"ModelMixin": ["save_pretrained", "from_pretrained"]}
