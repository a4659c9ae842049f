import json

import pytest
import torch

from dcdit.models import PRESETS, DCDiTConfig, DiTConfig, DyDiTConfig, SparseDiTConfig, create_config, create_model

SIZES = {"grid": (8, 8), "hidden_size": 128, "depth": 2, "num_heads": 4}


@pytest.mark.parametrize(
    ("scale", "parameters"), [("S", 34_760_457), ("B", 137_129_481), ("L", 469_612_553), ("XL", 689_589_513)]
)
def test_parameter_counts(scale: str, parameters: int) -> None:
    """The paper's sizes, which include the fixed position table."""
    with torch.device("meta"):
        model = create_model(f"DC-DiT-{scale}")
    learned = sum(parameter.numel() for parameter in model.parameters())
    assert learned + model.pos_embed.numel() == parameters
    assert learned == parameters - 1024 * model.config.hidden_size
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("config", [DCDiTConfig(**SIZES, router="cosine2d"), DiTConfig(**SIZES, patch_size=4)])
def test_dict_round_trip_through_json(config) -> None:
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (DCDiTConfig, {"grid": (8,)}, r"grid is \(8,\); accepted: \(H, W\)"),
        (DCDiTConfig, {"grid": (8, 0)}, r"grid is \(8, 0\)"),
        (DCDiTConfig, {"grid": (8.0, 8)}, "two positive integers"),
        (DCDiTConfig, {"depth": 0}, "depth is 0; accepted: a positive integer"),
        (DCDiTConfig, {"in_channels": "4"}, "in_channels is '4'"),
        (DCDiTConfig, {"num_heads": 3}, "num_heads is 3; accepted: a divisor of hidden_size = 128"),
        (DCDiTConfig, {"hidden_size": 192}, "hidden_size is 192; accepted: a multiple of 128"),
        (DCDiTConfig, {"mlp_ratio": 0}, "mlp_ratio is 0"),
        (DCDiTConfig, {"class_dropout_prob": 1.0}, r"class_dropout_prob is 1.0; accepted: a number in \[0, 1\)"),
        (
            DCDiTConfig,
            {"router": "random"},
            "router is 'random'; accepted: predictability, dithered, cosine2d, cosine1d, uniform",
        ),
        (DCDiTConfig, {"cell_context": 4}, "cell_context is 4; accepted: bool"),
        (DCDiTConfig, {"dechunk": "nearest"}, "dechunk is 'nearest'; accepted: spatial, ema"),
        (DCDiTConfig, {"dechunk_sigma": 0.0}, r"dechunk_sigma is 0.0; accepted: a number in \(0, 16\]"),
        (DiTConfig, {"patch_size": 3}, r"patch_size is 3; accepted: a positive divisor of both sides of \(8, 8\)"),
        (DiTConfig, {"hidden_size": 126, "num_heads": 2}, "hidden_size is 126; accepted: a multiple of 4"),
        (DiTConfig, {"frequency_shift": 2}, "frequency_shift is 2"),
        (DiTConfig, {"mlp_norm_eps": 0.0}, "mlp_norm_eps is 0.0"),
    ],
)
def test_bad_values(kind, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        kind(**{**SIZES, **change})
    assert "\n" not in str(error.value)


def test_unknown_and_missing_keys() -> None:
    with pytest.raises(ValueError, match="unknown key 'patch_size' in DCDiTConfig; accepted: grid, in_channels"):
        DCDiTConfig.from_dict({**SIZES, "patch_size": 2})
    with pytest.raises(ValueError, match="DiTConfig lacks the key 'depth'"):
        DiTConfig.from_dict({key: value for key, value in SIZES.items() if key != "depth"})


def test_configs_are_frozen() -> None:
    with pytest.raises(AttributeError):
        DCDiTConfig(**SIZES).depth = 3


def test_presets() -> None:
    assert len(PRESETS) == 4 + 3 * 16
    for name in PRESETS:
        config = create_config(name)
        assert config.grid == (32, 32)
        assert config.num_classes == 1000
        kinds = {"DC": DCDiTConfig, "DiT": DiTConfig, "DyDiT": DyDiTConfig, "SparseDiT": SparseDiTConfig}
        assert type(config) is kinds[name.split("-")[0]]
    assert create_config("DC-DiT-XL").dechunk_sigma == 1.0
    assert create_config("DC-DiT-XL", image_size=512).dechunk_sigma == 2.0
    assert create_config("DC-DiT-XL", image_size=512, dechunk_sigma=1.5).dechunk_sigma == 1.5
    assert create_config("DC-DiT-B", image_size=(256, 384)).grid == (32, 48)
    assert create_config("DiT-L/4", num_classes=7, in_channels=3).in_channels == 3
    assert create_config("DiT-L/4").patch_size == 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("DiT-M/2",), "unknown preset 'DiT-M/2'; accepted: DC-DiT-SCALE, .* of S, B, L, XL and .* 8"),
        (("DC-DiT-S", 100), "image_size is 100; accepted: a multiple of 8"),
        (("DC-DiT-S", (256,)), "image_size is"),
        (("DC-DiT-S", 0), "image_size is 0"),
    ],
)
def test_bad_presets(args: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(*args)


def test_unknown_override() -> None:
    with pytest.raises(ValueError, match="unknown key 'patch_size' in DCDiTConfig"):
        create_model("DC-DiT-S", patch_size=2)
