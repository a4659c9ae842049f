"""The programs in examples/, made small: what they show is asserted, and each is under 80 lines."""

import importlib.util
import json
import os
import re
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.small import randomize_zero_weights, small_dc_dit

import dcdit
from benchmarks.baselines import official
from benchmarks.studies import patching
from dcdit.checkpoint import save_model
from dcdit.models import DCDiT

FOLDER = Path(__file__).parents[2] / "examples"
HNET = "DCDIT_HNET"
"""Names a checkout of goombalab/hnet."""


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_short_and_listed() -> None:
    readme = (FOLDER / "README.md").read_text()
    files = {path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".ipynb")}
    assert files == set(re.findall(r"^\| \[([^\]]+)\]", readme, re.MULTILINE))
    for path in FOLDER.glob("*.py"):
        assert len(path.read_text().splitlines()) < 80, path


def test_a_vit_that_keeps_all_tokens_is_the_whole_vit() -> None:
    vit = example("vit_token_dropping")
    torch.manual_seed(0)
    model = vit.ViT(image=64, patch=8, dim=32, depth=3, heads=2).eval()
    x = torch.randn(2, 3, 64, 64)
    lengths = []
    model.blocks[2].register_forward_hook(lambda module, args, out: lengths.append(len(out)))
    with torch.no_grad():
        whole, all_kept, half = model(x), model(x, keep=65, drop_after=1), model(x, keep=33, drop_after=1)
        alone = model(x[1:], keep=33, drop_after=1)
    torch.testing.assert_close(all_kept, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(half[1:], alone, rtol=1e-4, atol=1e-5)
    assert (half - whole).abs().max() > 1e-3
    assert lengths == [130, 130, 66, 33]
    assert set(vit.main(images=1, image=32, patch=8, dim=32, depth=5, heads=2)) == {None, 8, 4}


def test_requests_get_their_own_images_whatever_the_batch(tmp_path, capsys) -> None:
    server = example("graph_server")
    save_model(tmp_path / "m.safetensors", small_dc_dit(in_channels=3))
    source = str(tmp_path / "m.safetensors")
    together = server.main(source, requests=5, batch=3, steps=2)
    one_by_one = server.main(source, requests=5, batch=1, steps=2)
    for image, alone in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(image, alone, rtol=1e-3, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-2
    out = capsys.readouterr().out
    assert "served 5 requests" in out
    if not torch.cuda.is_available():
        assert "cpu, which has no CUDA graphs: the loop runs without them" in out


def test_a_request_that_fails_does_not_stop_the_server() -> None:
    graph_server = example("graph_server")
    server = graph_server.Server(small_dc_dit(), batch=1, budget=8, steps=1)
    bad, good = server.submit(999), server.submit(1)
    server.close()
    with pytest.raises((IndexError, ValueError)):
        bad.result()
    assert good.result().isfinite().all()


@pytest.fixture
def slider(tmp_path):
    module = example("budget_slider")
    save_model(tmp_path / "m.safetensors", small_dc_dit(in_channels=3))
    server = module.serve(dcdit.load(tmp_path / "m.safetensors", device="cpu"), port=0, steps=2)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://localhost:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_slider_draws_at_any_budget(slider) -> None:
    with urllib.request.urlopen(slider) as page:
        assert b'type="range"' in page.read()
    found = {}
    for drop in (0, 0.5):
        with urllib.request.urlopen(f"{slider}draw?drop={drop}") as answer:
            found[drop] = json.load(answer)
        assert all(found[drop][name].startswith("data:image/png;base64,") for name in ("image", "tokens"))
    kept = [float(one["text"].partition("%")[0]) for one in found.values()]
    assert kept[1] == pytest.approx(kept[0] / 2, abs=2)
    for wrong in ("draw?drop=1.5", "draw?drop=much", "draw"):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(slider + wrong)


def test_upcycling_a_dit_of_diffusers(tmp_path, capfd) -> None:
    upcycle = example("upcycle_diffusers")
    source = upcycle.small_dit(tmp_path / "dit")
    model = upcycle.main(source, tmp_path / "run", steps=2)
    assert isinstance(model, DCDiT) and model.config.hidden_size == 128 and model.config.adapt_conditioning
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert "distill_loss" in log[0] and "distill_loss" not in log[-1]
    theirs = dcdit.checkpoint.load_static_dit(source)
    torch.testing.assert_close(model.y_embedder.table.weight, theirs.y_embedder.table.weight)


# --- the two that patch a checkout ------------------------------------------------------------------------------------


@pytest.mark.skipif(official.VARIABLE not in os.environ, reason=f"{official.VARIABLE} names no checkout")
def test_the_patched_reference_implementation_agrees() -> None:
    official.provide_stand_ins()
    before = set(sys.modules)
    path = list(sys.path)
    patch_official = example("patch_official")
    try:
        model = patch_official.build(os.environ[official.VARIABLE], size=8, width=128, depth=2, heads=4)
        randomize_zero_weights(model)
        same, difference, seconds = patch_official.compare(model, torch.randn(2, 4, 8, 8))
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in official.TOP_LEVEL:
                del sys.modules[name]
    assert same and difference < 1e-3 and set(seconds) == {"as published", "patched"}


@pytest.mark.skipif(HNET not in os.environ, reason=f"{HNET} names no checkout of goombalab/hnet")
def test_a_patched_hnet_agrees() -> None:
    with patching.hnet_modules(Path(os.environ[HNET])):
        assert example("patch_hnet").main(dim=32, lengths=(20, 1, 13)) < 1e-2
