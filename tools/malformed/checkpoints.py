"""Files with weights: of this package, of the reference implementation, of facebookresearch/DiT and of diffusers."""

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from dcdit.models import load_dit, to_dit
from tools.malformed import parts
from tools.malformed.base import Base
from tools.malformed.case import malformed
from tools.malformed.running import MARK

OURS, PICKLED, STATIC, FOLDER, VAE = (
    "model file",
    "pickled state dict",
    "static DiT",
    "folder of diffusers",
    "autoencoder",
)
INDEX = "diffusion_pytorch_model.safetensors.index.json"

# --- safetensors files of this package ------------------------------------------------------------------------------


def raw(base: Base, out: Path, data: bytes) -> list[str]:
    return base.sample(parts.write(out / "a.safetensors", data), out)


def changed(base: Base, out: Path, **config: object) -> list[str]:
    return base.sample(base.changed_model(out / "a.safetensors", **config), out)


@malformed(OURS, "a.safetensors", "damaged or no safetensors file: it is empty")
def model_empty(base: Base, out: Path) -> list[str]:
    return raw(base, out, b"")


@malformed(OURS, "a.safetensors", "damaged or no safetensors file")
def model_cut_short(base: Base, out: Path) -> list[str]:
    return raw(base, out, base.model.read_bytes()[:-100])


@malformed(OURS, "a.safetensors", "header too large")
def model_header_of_2_to_the_60(base: Base, out: Path) -> list[str]:
    return raw(base, out, parts.safetensors(b"{}", length=1 << 60))


@malformed(OURS, "a.safetensors", "no dcdit configuration")
def model_header_of_10_megabytes(base: Base, out: Path) -> list[str]:
    return raw(base, out, parts.safetensors({"__metadata__": {"x": "a" * 10_000_000}}))


@malformed(OURS, "a.safetensors", "offset")
def model_tensors_overlap(base: Base, out: Path) -> list[str]:
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    return raw(base, out, parts.safetensors({"a": one, "b": one}, b"1234"))


@malformed(OURS, "a.safetensors", "damaged or no safetensors file")
def model_shape_of_2_to_the_62(base: Base, out: Path) -> list[str]:
    claim = {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 4]}
    return raw(base, out, parts.safetensors({"a": claim}, b"1234"))


@malformed(OURS, "a.safetensors", "Git LFS pointer")
def model_is_a_pointer(base: Base, out: Path) -> list[str]:
    return raw(base, out, parts.POINTER)


@malformed(OURS, "a.safetensors", "a web page")
def model_is_a_web_page(base: Base, out: Path) -> list[str]:
    return raw(base, out, parts.PAGE)


@malformed(OURS, "a.safetensors", "named pipe")
def model_is_a_pipe(base: Base, out: Path) -> list[str]:
    os.mkfifo(out / "a.safetensors")
    return base.sample(out / "a.safetensors", out)


@malformed(OURS, "/dev/zero", "a device")
def model_is_a_device(base: Base, out: Path) -> list[str]:
    return base.sample(Path("/dev/zero"), out)


@malformed(OURS, "nowhere", "nothing at")
def model_is_a_link_to_nothing(base: Base, out: Path) -> list[str]:
    (out / "nowhere.safetensors").symlink_to(out / "gone")
    return base.sample(out / "nowhere.safetensors", out)


@malformed(OURS, "a.safetensors", "depth is 1000000000; accepted: a positive integer up to")
def model_depth_of_a_billion(base: Base, out: Path) -> list[str]:
    return changed(base, out, depth=10**9)


@malformed(OURS, "a.safetensors", "depth is True")
def model_depth_is_true(base: Base, out: Path) -> list[str]:
    return changed(base, out, depth=True)


@malformed(OURS, "a.safetensors", "hidden_size is '128'")
def model_width_is_text(base: Base, out: Path) -> list[str]:
    return changed(base, out, hidden_size="128")


@malformed(OURS, "a.safetensors", "grid is .*; accepted: .H, W., two positive integers")
def model_grid_of_a_million(base: Base, out: Path) -> list[str]:
    return changed(base, out, grid=[10**6, 10**6])


@malformed(OURS, "a.safetensors", "grid is 8")
def model_grid_is_a_number(base: Base, out: Path) -> list[str]:
    return changed(base, out, grid=8)


@malformed(OURS, "a.safetensors", "mlp_ratio is nan")
def model_ratio_is_nan(base: Base, out: Path) -> list[str]:
    return changed(base, out, mlp_ratio=float("nan"))


@malformed(OURS, "a.safetensors", "router is .*; accepted: text")
def model_router_is_a_list(base: Base, out: Path) -> list[str]:
    return changed(base, out, router=["predictability"])


@malformed(OURS, "a.safetensors", "unknown key 'hiden_size'.*did you mean 'hidden_size'")
def model_unknown_key(base: Base, out: Path) -> list[str]:
    return changed(base, out, hiden_size=128)


@malformed(OURS, "a.safetensors", "is 5; accepted: a mapping")
def model_configuration_is_a_number(base: Base, out: Path) -> list[str]:
    return base.sample(base.noted_model(out / "a.safetensors", base.model, config="5"), out)


@malformed(OURS, "a.safetensors", "nested too deep")
def model_configuration_is_deep(base: Base, out: Path) -> list[str]:
    return base.sample(base.noted_model(out / "a.safetensors", base.model, config="[" * 100_000), out)


@malformed(OURS, "a.safetensors", "holds a 'Other'; accepted: DCDiT, DiT")
def model_of_another_architecture(base: Base, out: Path) -> list[str]:
    return base.sample(base.noted_model(out / "a.safetensors", base.model, architecture="Other"), out)


@malformed(OURS, "a.safetensors", "trained with the objective 'xyz'")
def model_of_another_objective(base: Base, out: Path) -> list[str]:
    return base.sample(base.noted_model(out / "a.safetensors", base.model, objective="xyz"), out)


@malformed(OURS, "a.safetensors", "objective")
def model_notes_with_escape_codes(base: Base, out: Path) -> list[str]:
    return base.sample(base.noted_model(out / "a.safetensors", base.model, objective=parts.FORGED), out)


@malformed(OURS, "a.safetensors", "latent_range")
def model_notes_a_range_of_text(base: Base, out: Path) -> list[str]:
    file = base.noted_model(out / "a.safetensors", base.latent_model, latent_range='["a", "b"]')
    return base.sample(file, out, "--vae", str(base.vae))


@malformed(OURS, "a.safetensors", "mean is True")
def model_notes_a_share_of_another_type(base: Base, out: Path) -> list[str]:
    share = '{"mean": true, "std": 0.1, "largest": 1, "images": 2}'
    return base.sample(base.noted_model(out / "a.safetensors", base.model, kept_share=share), out)


@malformed(OURS, "a.safetensors", "kept_share is .*nested too deep")
def model_notes_a_deep_share(base: Base, out: Path) -> list[str]:
    return base.sample(base.noted_model(out / "a.safetensors", base.model, kept_share="[" * 100_000), out)


@malformed(OURS, "a.safetensors", "int64; accepted: floating-point")
def model_weights_are_integers(base: Base, out: Path) -> list[str]:
    return base.sample(base.changed_model(out / "a.safetensors", {"pos_embed": torch.zeros(64, 128).long()}), out)


@malformed(OURS, "a.safetensors", "not finite")
def model_weights_are_nan(base: Base, out: Path) -> list[str]:
    return base.sample(base.changed_model(out / "a.safetensors", {"pos_embed": torch.full((64, 128), torch.nan)}), out)


@malformed(OURS, "a.safetensors", "unknown weight")
def model_weight_with_escape_codes(base: Base, out: Path) -> list[str]:
    return base.sample(base.changed_model(out / "a.safetensors", {parts.FORGED: torch.zeros(1)}), out)


# --- pickled files --------------------------------------------------------------------------------------------------


def pickled(base: Base, out: Path, content: object, old: bool = False) -> list[str]:
    torch.save(content, out / "a.pt", _use_new_zipfile_serialization=not old)
    return base.sample(out / "a.pt", out)


@malformed(PICKLED, "a.pt", r"would call posix\.mkdir; accepted: tensors and plain values")
def pickle_runs_code(base: Base, out: Path) -> list[str]:
    return pickled(base, out, {"pos_embed": parts.Runs(out / MARK)})


@malformed(PICKLED, "a.pt", r"would call posix\.mkdir; accepted")
def pickle_of_the_old_format_runs_code(base: Base, out: Path) -> list[str]:
    return pickled(base, out, {"pos_embed": parts.Runs(out / MARK)}, old=True)


@malformed(PICKLED, "a.pt", "would call .*PosixPath")
def pickle_holds_a_path(base: Base, out: Path) -> list[str]:
    return pickled(base, out, {"ema": {"pos_embed": torch.zeros(1)}, "where": Path("x")})


@malformed(PICKLED, "a.pt", "is TorchScript, which is code")
def pickle_is_torchscript(base: Base, out: Path) -> list[str]:
    return base.sample(Path(shutil.copy(base.extractor, out / "a.pt")), out)


@malformed(PICKLED, "a.pt", "it is empty")
def pickle_is_empty(base: Base, out: Path) -> list[str]:
    return base.sample(parts.write(out / "a.pt", b""), out)


@malformed(PICKLED, "a.pt", "nothing but zeros")
def pickle_of_zeros(base: Base, out: Path) -> list[str]:
    return base.sample(parts.write(out / "a.pt", bytes(10_000)), out)


@malformed(PICKLED, "a.pt", "Git LFS pointer")
def pickle_is_a_pointer(base: Base, out: Path) -> list[str]:
    return base.sample(parts.write(out / "a.pt", parts.POINTER), out)


@malformed(PICKLED, "a.pt", "a web page")
def pickle_is_a_web_page(base: Base, out: Path) -> list[str]:
    return base.sample(parts.write(out / "a.pt", parts.PAGE), out)


@malformed(PICKLED, "a.pt", "damaged zip archive, perhaps cut short")
def pickle_is_cut_short(base: Base, out: Path) -> list[str]:
    torch.save(base.official_state, out / "whole.pt")
    return base.sample(parts.write(out / "a.pt", (out / "whole.pt").read_bytes()[:5000]), out)


@malformed(PICKLED, "a.pt", "said to have .* bytes, and it has")
def pickle_claims_a_large_part(base: Base, out: Path) -> list[str]:
    torch.save({"pos_embed": torch.zeros(1, 256, 384)}, out / "a.pt")
    return base.sample(parts.claim_size(out / "a.pt", "a/data/0", 3_000_000_000), out)


@malformed(PICKLED, "a.pt", "compresses 'a/data.pkl'")
def pickle_is_packed(base: Base, out: Path) -> list[str]:
    return base.sample(parts.zeros(out / "a.pt", "a/data.pkl", 64 << 20), out)


@malformed(PICKLED, "a.pt", "'pos_embed' is said to have the shape .* and has 4 bytes")
def pickle_repeats_one_number(base: Base, out: Path) -> list[str]:
    return pickled(base, out, {"pos_embed": torch.zeros(1).expand(1, 1 << 30, 384)})


@malformed(PICKLED, "a.pt", "'pos_embed' is sparse_coo; accepted: dense")
def pickle_holds_sparse_tensors(base: Base, out: Path) -> list[str]:
    return pickled(base, out, {"pos_embed": torch.eye(4).to_sparse()})


@malformed(PICKLED, "a.pt", "'pos_embed' is on the device meta")
def pickle_holds_no_numbers(base: Base, out: Path) -> list[str]:
    return pickled(base, out, {"pos_embed": torch.zeros(1, 256, 384, device="meta")})


@malformed(PICKLED, "a.pt", r"pos_embed has shape \(5,\)")
def pickle_of_one_dimension(base: Base, out: Path) -> list[str]:
    return pickled(base, out, {"pos_embed": torch.zeros(5)})


@malformed(PICKLED, "a.pt", "holds no state dict")
def pickle_5000_deep(base: Base, out: Path) -> list[str]:
    import sys

    nested: object = torch.zeros(1)
    for _ in range(5000):
        nested = {"a": nested}
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)
    try:
        return pickled(base, out, nested)
    finally:
        sys.setrecursionlimit(limit)


@malformed(PICKLED, "a.pt", "holds no state dict; accepted")
def pickle_is_a_list(base: Base, out: Path) -> list[str]:
    return pickled(base, out, [torch.zeros(1)])


@malformed(PICKLED, "a.pt", "int64; accepted: floating-point")
def pickle_of_integers(base: Base, out: Path) -> list[str]:
    return pickled(base, out, {name: tensor.long() for name, tensor in base.official_state.items()})


@malformed(PICKLED, "a.pt", "none of them 0")
def pickle_with_an_empty_tensor(base: Base, out: Path) -> list[str]:
    name = "hnet.main_network.main_network.layers.0.mlp.fc1.weight"
    return pickled(base, out, {**base.official_state, name: torch.zeros(0, 384)})


@malformed(PICKLED, "a.pt", "named pipe")
def pickle_is_a_pipe(base: Base, out: Path) -> list[str]:
    os.mkfifo(out / "a.pt")
    return base.sample(out / "a.pt", out)


# --- static DiTs, as upcycling reads them ---------------------------------------------------------------------------


@malformed(STATIC, "a.pt", "'x_embedder.proj.weight' is sparse_coo")
def static_of_sparse_tensors(base: Base, out: Path) -> list[str]:
    torch.save({name: tensor.to_sparse() for name, tensor in base.static_state.items()}, out / "a.pt")
    return base.upcycle(out / "a.pt", out)


@malformed(STATIC, "a.pt", "4 dimensions")
def static_embedder_of_two_dimensions(base: Base, out: Path) -> list[str]:
    torch.save({**base.static_state, "x_embedder.proj.weight": torch.zeros(128, 4)}, out / "a.pt")
    return base.upcycle(out / "a.pt", out)


@malformed(STATIC, "a.safetensors", "missing")
def static_of_something_else(base: Base, out: Path) -> list[str]:
    save_file({parts.FORGED: torch.zeros(1)}, out / "a.safetensors")
    return base.upcycle(out / "a.safetensors", out)


def diffusers(base: Base, out: Path, config: object, index: object = None) -> list[str]:
    text = config if isinstance(config, str) else {"_class_name": "DiTTransformer2DModel", **dict(config)}  # type: ignore[call-overload]
    (parts.write if isinstance(text, str) else parts.write_json)(out / "dit" / "config.json", text)  # type: ignore[operator]
    if index is not None:
        parts.write_json(out / "dit" / INDEX, index)
    return base.upcycle(out / "dit", out)


SIZES = {"sample_size": 8, "num_attention_heads": 2}


@malformed(FOLDER, "config.json", "no JSON")
def diffusers_configuration_cut_short(base: Base, out: Path) -> list[str]:
    return diffusers(base, out, '{"_class_name": "DiTTrans')


@malformed(FOLDER, "config.json", "is there twice")
def diffusers_key_twice(base: Base, out: Path) -> list[str]:
    return diffusers(base, out, '{"_class_name": "DiTTransformer2DModel", "sample_size": 8, "sample_size": 16}')


@malformed(FOLDER, "config.json", "sample_size '8'; accepted: a positive integer")
def diffusers_size_is_text(base: Base, out: Path) -> list[str]:
    return diffusers(base, out, {**SIZES, "sample_size": "8"})


@malformed(FOLDER, "dit", "grid is .1000000000, 1000000000.; accepted")
def diffusers_size_of_a_billion(base: Base, out: Path) -> list[str]:
    argv = diffusers(base, out, {**SIZES, "sample_size": 10**9})
    state = to_dit(load_dit(base.static_state, 2), "diffusers")
    save_file(state, out / "dit" / "diffusion_pytorch_model.safetensors")
    return argv


@malformed(FOLDER, "config.json", "num_attention_heads 0")
def diffusers_no_heads(base: Base, out: Path) -> list[str]:
    return diffusers(base, out, {**SIZES, "num_attention_heads": 0})


@malformed(FOLDER, INDEX, "accepted: files inside the folder")
def diffusers_index_leaves_the_folder(base: Base, out: Path) -> list[str]:
    return diffusers(base, out, SIZES, {"weight_map": {"a": "../../base/model.safetensors"}})


@malformed(FOLDER, INDEX, "accepted: files inside the folder")
def diffusers_index_is_absolute(base: Base, out: Path) -> list[str]:
    return diffusers(base, out, SIZES, {"weight_map": {"a": str(base.model)}})


@malformed(FOLDER, INDEX, "lists 5; accepted")
def diffusers_index_lists_a_number(base: Base, out: Path) -> list[str]:
    return diffusers(base, out, SIZES, {"weight_map": {"a": 5}})


@malformed(FOLDER, INDEX, "no weight_map")
def diffusers_index_is_a_list(base: Base, out: Path) -> list[str]:
    return diffusers(base, out, SIZES, ["weight_map"])


# --- autoencoders ---------------------------------------------------------------------------------------------------


def decode(base: Base, out: Path, vae: Path) -> list[str]:
    return base.sample(base.latent_model, out, "--vae", str(vae))


@malformed(VAE, "config.json", "block_out_channels 'abc'")
def vae_widths_are_text(base: Base, out: Path) -> list[str]:
    return decode(base, out, base.copy_of_vae(out, block_out_channels="abc"))


@malformed(VAE, "config.json", "block_out_channels .1000000.; accepted")
def vae_of_a_million_channels(base: Base, out: Path) -> list[str]:
    return decode(base, out, base.copy_of_vae(out, block_out_channels=[10**6]))


@malformed(VAE, "config.json", "which the weights do not have")
def vae_wider_than_its_weights(base: Base, out: Path) -> list[str]:
    return decode(base, out, base.copy_of_vae(out, block_out_channels=[8192, 8192]))


@malformed(VAE, "config.json", "layers_per_block 1000000000")
def vae_of_a_billion_layers(base: Base, out: Path) -> list[str]:
    return decode(base, out, base.copy_of_vae(out, layers_per_block=10**9))


@malformed(VAE, "config.json", "scaling_factor nan")
def vae_scale_is_nan(base: Base, out: Path) -> list[str]:
    return decode(base, out, base.copy_of_vae(out, scaling_factor=float("nan")))


@malformed(VAE, "vae", "no readable AutoencoderKL")
def vae_of_unknown_blocks(base: Base, out: Path) -> list[str]:
    return decode(base, out, base.copy_of_vae(out, down_block_types=["os.system", "os.system"]))


@malformed(VAE, "pipeline", "whole pipeline; accepted: its autoencoder, .*/pipeline/vae")
def vae_is_a_pipeline(base: Base, out: Path) -> list[str]:
    parts.write_json(out / "pipeline" / "model_index.json", {"_class_name": "DiTPipeline"})
    return decode(base, out, out / "pipeline")


@malformed(VAE, "config.json", "'DiTTransformer2DModel'; accepted: the folder of an AutoencoderKL, such as .*/vae")
def vae_is_a_transformer(base: Base, out: Path) -> list[str]:
    base.copy_of_vae(out)
    parts.write_json(out / "transformer" / "config.json", {"_class_name": "DiTTransformer2DModel"})
    return decode(base, out, out / "transformer")


@malformed(VAE, "vae", "accepted: safetensors, not diffusion_pytorch_model.bin, which may run code")
def vae_runs_code(base: Base, out: Path) -> list[str]:
    vae = base.copy_of_vae(out)
    (vae / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"a": parts.Runs(out / MARK)}, vae / "diffusion_pytorch_model.bin")
    return decode(base, out, vae)


@malformed(VAE, "diffusion_pytorch_model.safetensors", "Git LFS pointer")
def vae_weights_are_a_pointer(base: Base, out: Path) -> list[str]:
    vae = base.copy_of_vae(out)
    parts.write(vae / "diffusion_pytorch_model.safetensors", parts.POINTER)
    return decode(base, out, vae)


@malformed(VAE, "config.json", "named pipe")
def vae_configuration_is_a_pipe(base: Base, out: Path) -> list[str]:
    vae = base.copy_of_vae(out)
    (vae / "config.json").unlink()
    os.mkfifo(vae / "config.json")
    return decode(base, out, vae)


@malformed(VAE, INDEX, "accepted: files inside the folder")
def vae_index_leaves_the_folder(base: Base, out: Path) -> list[str]:
    vae = base.copy_of_vae(out)
    parts.write_json(vae / INDEX, {"weight_map": {"a": "../../etc/passwd"}})
    return decode(base, out, vae)
