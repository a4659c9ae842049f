"""Our models as models of diffusers."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from diffusers import CacheMixin, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, MagCacheConfig, TaylorSeerCacheConfig
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from dcdit.checkpoint import Model, model_notes, set_notes
from dcdit.integrations.diffusers.blocks import OutputLayer, Step, chain
from dcdit.integrations.diffusers.tea_cache import TeaCacheConfig, apply_tea_cache, remove_tea_cache
from dcdit.models import DCDiT, DCDiTConfig, DiT, DiTConfig

CACHES = (FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig, TeaCacheConfig)
OFFLOADING = "group_offloading"
"""Name that diffusers gives to its hooks of group offloading."""


class Transformer2DModel(ModelMixin, ConfigMixin, AttentionMixin, CacheMixin):
    """What both models share. ``model`` is the model of this package, and holds all weights.

    ``blocks`` and ``proj_out`` are the same model as a chain from grid to grid, without weights of their own, for
    caches (:mod:`dcdit.integrations.diffusers.blocks`). Without one, ``model`` itself is called.
    """

    model: Any
    _cache_config: Any
    _model_class: type[Model]
    _config_class: type[DCDiTConfig] | type[DiTConfig]
    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _group_offload_block_modules: ClassVar[list[str]] = ["model"]  # by its blocks, not as a whole
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["x_embedder", "norm", "router", "final_layer"]

    def _build(self) -> None:
        """Make the model that the registered configuration describes."""
        names = [field.name for field in dataclasses.fields(self._config_class)]
        config = self._config_class.from_dict({name: self.config[name] for name in names})
        model = self._model_class(config)  # type: ignore[arg-type]
        set_notes(model, self.notes, f"the configuration of the {type(self).__name__}")
        self._hold(model)

    def _hold(self, model: Model) -> None:
        self.model, self.blocks, self.proj_out = model, chain(model), OutputLayer(model)
        self._own_blocks = (self.blocks,)  # a tuple: it is not a second place of the blocks

    @property
    def _runs_as_chain(self) -> bool:
        """With a cache, or where a tool such as cache-dit has put blocks of its own in the place of ours."""
        return self.is_cache_enabled or self.blocks is not self._own_blocks[0]

    @classmethod
    def from_dcdit(cls, model: Model, notes: Mapping[str, str] | None = None) -> Self:
        """A model of this package as a model of diffusers. Both share their weights.

        Args:
            notes: what the model's file says about it beside its architecture, such as the names of the classes
                (:func:`dcdit.checkpoint.read_metadata`). They become a part of the configuration. What the model itself
                knows, such as its objective, is taken from it.

        Raises:
            ValueError: a model of the other class.
        """
        if not isinstance(model, cls._model_class):
            raise ValueError(f"the model is a {type(model).__name__}; accepted: {cls._model_class.__name__}")
        facts = {name: text for name, text in (notes or {}).items() if name not in ("format", "architecture", "config")}
        with torch.device("meta"):
            transformer = cls(**model.config.to_dict(), notes={**facts, **model_notes(model)})
        transformer._hold(model)
        return transformer.train(model.training)

    def to_dcdit(self) -> Model:
        """The model of this package. It shares its weights with this one.

        ``dcdit.checkpoint.save_model(path, transformer.to_dcdit(), notes=transformer.notes)`` writes a checkpoint.
        """
        return self.model

    @property
    def notes(self) -> dict[str, str]:
        """What a checkpoint of this package says about its model, in the same words (``objective``, ``class_names``,
        ``latent_range``, ``kept_share``)."""
        return dict(self.config.notes or {})

    def enable_cache(self, config: Any) -> None:
        """Leave out blocks in steps that change little (``diffusers.CacheMixin``).

        Args:
            config: a ``FirstBlockCacheConfig``, ``MagCacheConfig`` or ``TaylorSeerCacheConfig`` of diffusers, or a
                :class:`~dcdit.integrations.diffusers.TeaCacheConfig`. One of TaylorSeer that names no modules, and so
                means the attention, extrapolates the block from grid to grid that holds it (all blocks of a static
                model): the attention of a DC-DiT has a new shape in every step.

        Raises:
            ValueError: another cache, or there is one, or group offloading is on.
        """
        if not isinstance(config, CACHES):
            accepted = ", ".join(cache.__name__ for cache in CACHES)
            raise ValueError(f"the cache is a {type(config).__name__}; accepted: {accepted}")
        self._refuse_both(self._is_offloaded())
        if isinstance(config, TeaCacheConfig):
            if self.is_cache_enabled:
                raise ValueError(f"there is a {type(self._cache_config).__name__} already; disable_cache first")
            apply_tea_cache(self.blocks, config)
            self._cache_config = config
        else:
            if isinstance(config, TaylorSeerCacheConfig):
                named = config.cache_identifiers or config.skip_predict_identifiers or config.use_lite_mode
                if not named:
                    config = dataclasses.replace(config, cache_identifiers=[self._cached_by_default])
            super().enable_cache(config)
        self._forget_hooked_modules()

    def disable_cache(self) -> None:
        """Compute all blocks in all steps again."""
        if isinstance(self._cache_config, TeaCacheConfig):
            remove_tea_cache(self.blocks)
            self._cache_config = None
        else:
            super().disable_cache()
        self._forget_hooked_modules()

    def _forget_hooked_modules(self) -> None:
        """diffusers remembers where it found hooks, to tell them the context of a call."""
        HookRegistry.check_if_exists_or_initialize(self)._child_registries_cache = None

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """Keep the weights elsewhere and fetch them by block or by layer (``diffusers.ModelMixin``).

        Raises:
            ValueError: a cache is on, or diffusers refuses.
        """
        self._refuse_both(self.is_cache_enabled)
        super().enable_group_offload(*args, **kwargs)

    def set_attn_processor(self, processor: Any) -> None:
        """Raise ValueError: attention on packed tokens has no processors in diffusers, so there are none to set.

        ``attn_processors`` is empty for the same reason. Queries, keys and values are one projection already, so
        ``fuse_qkv_projections`` has nothing to do.
        """
        raise ValueError(
            f"a {type(self).__name__} takes no attention of diffusers ({processor!r}); dcdit.ops.varlen_attention says "
            "how its kernel is chosen"
        )

    def set_attention_backend(self, backend: str) -> None:
        """Raise ValueError, for the reason of :meth:`set_attn_processor`."""
        self.set_attn_processor(backend)

    def _is_offloaded(self) -> bool:
        registries = (getattr(module, "_diffusers_hook", None) for module in self.modules())
        return any(registry is not None and registry.get_hook(OFFLOADING) is not None for registry in registries)

    def _refuse_both(self, other: bool) -> None:
        if other:
            raise ValueError(
                f"a cache and group offloading do not go together in a {type(self).__name__}; accepted: one of them"
            )


class DCDiTTransformer2DModel(Transformer2DModel):
    """A :class:`dcdit.models.DCDiT` as a model of diffusers.

    Args: those of :class:`dcdit.models.DCDiTConfig`, and

        notes: what a checkpoint of this package says about the model beside its architecture; see :attr:`notes`.

    Raises:
        ValueError: a value that is not accepted.

    Example:
        >>> import torch
        >>> from dcdit.integrations.diffusers import DCDiTTransformer2DModel
        >>> sizes = {"hidden_size": 128, "depth": 2, "num_heads": 4, "grid": (8, 8), "num_classes": 10}
        >>> transformer = DCDiTTransformer2DModel(**sizes).eval()
        >>> _ = torch.nn.init.normal_(transformer.model.final_layer.linear.weight)  # a new model says zero
        >>> latents, timestep, labels = torch.randn(2, 4, 8, 8), torch.tensor(500), torch.tensor([3, 10])
        >>> with torch.no_grad():
        ...     sample = transformer(latents, timestep, class_labels=labels, drop_fraction=0.3).sample
        ...     same = transformer.to_dcdit()(latents, timestep.expand(2), labels, drop_fraction=0.3)
        >>> torch.equal(sample, same), sample.std().item() > 0.1
        (True, True)
    """

    _model_class, _config_class = DCDiT, DCDiTConfig
    # Not split: its parts hand tensors to each other that no module receives as an argument.
    _no_split_modules: ClassVar[list[str]] = ["DCDiT"]
    _repeated_blocks: ClassVar[list[str]] = ["PackedDiTBlock"]
    _cached_by_default = r"blocks\.2"  # the inner block

    @register_to_config
    def __init__(
        self,
        grid: tuple[int, int] = (32, 32),
        in_channels: int = 4,
        hidden_size: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        frequency_shift: int = 0,
        mlp_norm_eps: float = 1e-6,
        separate_embedders: bool = False,
        router: str = "predictability",
        dechunk: str = "spatial",
        dechunk_sigma: float = 1.0,
        cell_context: bool = False,
        start: str = "paper",
        adapt_conditioning: bool = False,
        dynamic_width: bool = False,
        notes: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self._build()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        drop_fraction: float | Tensor = 0.0,
        budget: int | None = None,
        capacity: int | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the noise (and, with ``learn_sigma``, the variance) or the velocity of a batch.

        Args:
            hidden_states: (B, C, H, W).
            timestep: (B,) or (), from 1000 (noise) to 0.
            class_labels: (B,) integers; ``num_classes`` is the null class.
            drop_fraction, budget, capacity: see :meth:`dcdit.models.DCDiT.forward`.
            return_dict: return a ``Transformer2DModelOutput``, not a tuple.

        Returns:
            ``sample``: (B, 2C, H, W), or (B, C, H, W) without ``learn_sigma``.

        Raises:
            ValueError: a shape, a label or an option that is not accepted.
        """
        inputs = (hidden_states, timestep.expand(len(hidden_states)), class_labels)
        if self._runs_as_chain:
            cond, conv_cond, tokens, time = self.model.embed(*inputs)
            step = Step(cond, conv_cond, time, drop_fraction, budget, capacity)
            for block in self.blocks:
                tokens = block(tokens, step)
            sample = self.proj_out(tokens, cond)
        else:
            sample = self.model(*inputs, drop_fraction=drop_fraction, budget=budget, capacity=capacity)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


class StaticDiTTransformer2DModel(Transformer2DModel):
    """A :class:`dcdit.models.DiT`, the static baseline, as a model of diffusers: to compare with.

    Args: those of :class:`dcdit.models.DiTConfig`, and ``notes``, as in :class:`DCDiTTransformer2DModel`.

    Example:
        >>> import torch
        >>> from dcdit.integrations.diffusers import StaticDiTTransformer2DModel
        >>> from dcdit.models import create_model
        >>> model = create_model("DiT-S/2", grid=(4, 4), hidden_size=32, depth=1, num_heads=2, num_classes=10).eval()
        >>> transformer = StaticDiTTransformer2DModel.from_dcdit(model)
        >>> transformer.to_dcdit() is model, transformer.config.patch_size
        (True, 2)
    """

    _model_class, _config_class = DiT, DiTConfig
    _no_split_modules: ClassVar[list[str]] = ["DiT"]
    _repeated_blocks: ClassVar[list[str]] = ["DenseDiTBlock"]
    _cached_by_default = r"blocks\.\d+"

    @register_to_config
    def __init__(
        self,
        grid: tuple[int, int] = (32, 32),
        in_channels: int = 4,
        hidden_size: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        frequency_shift: int = 0,
        mlp_norm_eps: float = 1e-6,
        separate_embedders: bool = False,
        patch_size: int = 2,
        notes: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self._build()

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """As :meth:`DCDiTTransformer2DModel.forward`, without the options of a dynamic model."""
        inputs = (hidden_states, timestep.expand(len(hidden_states)), class_labels)
        if self._runs_as_chain:
            tokens, cond = self.model.embed(*inputs)
            modulation = self.model.modulation(cond)
            for block in self.blocks:
                tokens = block(tokens, modulation)
            sample = self.proj_out(tokens, cond)
        else:
            sample = self.model(*inputs)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
