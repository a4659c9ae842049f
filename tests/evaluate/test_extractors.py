"""How pixels reach Inception, and what a file must be."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dcdit.evaluate.extractors import SIDE, TorchScriptInception, load_extractor, resize_adm, resize_clean


@pytest.mark.parametrize("size", [(32, 32), (40, 24), (400, 310), (299, 299)], ids=str)
def test_resize_adm_is_the_bilinear_of_tensorflow_1(size):
    """Output i reads at i * size / 299: the two pixels around it, weighted by distance."""
    x = torch.rand(1, 3, *size) * 255
    out = resize_adm(x).double()
    assert out.shape == (1, 3, SIDE, SIDE)
    for i, j in [(0, 0), (1, 7), (100, 200), (298, 298), (298, 3)]:
        v, u = i * size[0] / SIDE, j * size[1] / SIDE
        rows, columns = ([int(w), min(int(w) + 1, n - 1)] for w, n in zip((v, u), size, strict=True))
        (a, b), (c, d) = x[0, 0].double()[rows][:, columns].tolist()
        dv, du = v - int(v), u - int(u)
        expected = (1 - dv) * ((1 - du) * a + du * b) + dv * ((1 - du) * c + du * d)
        assert float(out[0, 0, i, j]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("size", [(32, 32), (400, 310), (299, 299)], ids=str)
def test_resize_clean_is_the_bicubic_of_pillow_without_rounding(size):
    x = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    ours = resize_clean(torch.tensor(x).permute(2, 0, 1)[None].float())[0]
    for channel in range(3):
        pillow = Image.fromarray(x[:, :, channel].astype(np.float32), mode="F")
        theirs = np.asarray(pillow.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(ours[channel], theirs, rtol=0, atol=1e-2)


class Plain(nn.Module):
    """Returns the corner pixels of its input."""

    def forward(self, x):
        return x[:, :, ::298, ::298].flatten(1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 9, 1)

    def forward(self, x):
        return torch.cat([x, self.conv(x)], 1)


def named(last):
    layers = nn.Sequential()
    layers.add_module("pool", nn.AvgPool2d(100, 99))
    layers.add_module("mixed_6", Block())
    layers.add_module("pool2", last)
    return layers


class Walked(nn.Module):
    """A script with the layer names of the TensorFlow graph."""

    def __init__(self, again):
        super().__init__()
        self.layers = named(nn.AdaptiveAvgPool2d(1))
        self.again = again

    def forward(self, x):
        y = self.layers(x).flatten(1)
        return y + 1 if self.again else y


def save(module, path):
    torch.jit.script(module).save(str(path))
    return path


def test_torchscript_gets_299_pixels_from_minus_one_to_one(tmp_path):
    extractor = load_extractor(save(Plain(), tmp_path / "plain.pt"), trust=True)
    x = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    x[1] = 255
    (pooled,) = extractor(x).values()
    assert torch.equal(pooled, torch.tensor([[-1.0], [127 / 128]]).expand(2, 12))


def test_torchscript_with_names_of_tensorflow_gives_spatial_features(tmp_path):
    torch.manual_seed(0)
    module = Walked(again=False)
    extractor = TorchScriptInception(save(module, tmp_path / "a.pt"), "clean", trust=True)
    x = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8)
    out = extractor(x)
    scaled = (x.float() - 128) / 128
    torch.testing.assert_close(out["pooled"], module(scaled))
    torch.testing.assert_close(out["spatial"], module.layers.mixed_6.conv(module.layers.pool(scaled)))


def test_a_script_that_does_more_than_its_layers_gives_pooled_features_only(tmp_path):
    torch.manual_seed(0)
    module = Walked(again=True)
    extractor = TorchScriptInception(save(module, tmp_path / "a.pt"), trust=True)
    out = extractor(torch.zeros(1, 3, 299, 299, dtype=torch.uint8))
    assert list(out) == ["pooled"]
    torch.testing.assert_close(out["pooled"], module(-torch.ones(1, 3, 299, 299)))


def test_each_file_and_resize_has_its_own_identity(tmp_path):
    torch.manual_seed(0)
    a, b = (save(Walked(again=False), tmp_path / f"{name}.pt") for name in "ab")
    identities = [
        TorchScriptInception(path, resize, trust=True).identity for path in (a, b) for resize in ("adm", "clean")
    ]
    assert len(set(identities)) == 4
    assert TorchScriptInception(a, trust=True).identity == identities[0]


class Broken(nn.Module):
    def forward(self, x):
        if x.shape[0] > 0:
            raise RuntimeError("no\nway")
        return x


class TakesTwo(nn.Module):
    def forward(self, x, y):
        return x + y


@pytest.mark.parametrize(("module", "message"), [(Broken(), "way$"), (TakesTwo(), "missing value for argument 'y'")])
def test_a_script_that_fails_is_named_in_one_line(module, message, tmp_path):
    extractor = load_extractor(save(module, tmp_path / "a.pt"), trust=True)
    with pytest.raises(ValueError, match=rf"a\.pt fails on images \(N, 3, 299, 299\): .*{message}") as error:
        extractor(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert "\n" not in str(error.value)


def test_the_identity_is_of_the_network_that_was_loaded(tmp_path, monkeypatch):
    """The file may be replaced while it is read."""
    path = save(Plain(), tmp_path / "a.pt")
    identity = load_extractor(path, trust=True).identity
    original = torch.jit.load

    def replaces_then(*args, **options):
        path.write_bytes(b"another")
        return original(*args, **options)

    monkeypatch.setattr(torch.jit, "load", replaces_then)
    assert load_extractor(path, trust=True).identity == identity


def test_files_that_are_no_extractor(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no feature extractor .* nothing is ever downloaded"):
        load_extractor(tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes(b"no script")
    with pytest.raises(ValueError, match=r"a\.pt is no TorchScript file"):
        load_extractor(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="resize is 'tf'; accepted: adm, clean"):
        load_extractor(tmp_path / "a.pt", "tf")
    (tmp_path / "a.pth").write_bytes(b"weights")
    with pytest.raises(ValueError, match="torch-fidelity resizes as ADM does"):
        load_extractor(tmp_path / "a.pth", "clean")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ModuleNotFoundError, match=r"torch-fidelity, which does not import here .* TorchScript"):
        load_extractor(tmp_path / "a.pth")
