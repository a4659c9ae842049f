"""``dcdit info``: what is installed, which kernels run here, and which attention "auto" takes, with the reasons."""

import argparse
import json
import platform
from importlib import util
from typing import Any

import torch

import dcdit
from dcdit.kernels.launch import table_for
from dcdit.ops.attention_kernels import attention_backends, choose_attention_backend
from dcdit.ops.backend import backend_name
from dcdit.utils.environment import cpu_name, device_name, package_versions, resolve_device

PACKAGES = (
    "torch",
    "triton",
    "flash-attn",
    "einops",
    "safetensors",
    "numpy",
    "accelerate",
    "diffusers",
    "scikit-image",
    "scikit-learn",
)
HEAD_DIM = 64


def collect() -> dict[str, Any]:
    """Everything the command prints, as JSON values."""
    devices = dict.fromkeys([torch.device("cpu"), resolve_device("auto")])
    return {
        "dcdit": dcdit.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        # Unlike the package's metadata, torch.__version__ always names the build ("+cu130").
        "packages": {**package_versions(PACKAGES), "torch": torch.__version__},
        "devices": [_describe(device) for device in devices],
    }


def _describe(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"device": device.type, "name": cpu_name()}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        memory = torch.cuda.get_device_properties(device).total_memory
        found |= {
            "name": device_name(device),
            "count": torch.cuda.device_count(),
            "capability": f"{major}.{minor}",
            "memory_gib": round(memory / 2**30, 1),
        }
    kernels = backend_name(torch.empty(0, device=device))
    if kernels == "triton" and util.find_spec("triton") is None:
        kernels = "triton, which is not installed: pip install triton"
    attention = attention_backends(device)
    dtypes = (torch.bfloat16, torch.float32)
    return {
        **found,
        "ops_backend": kernels,
        "launch_configs": table_for(device),
        "attention": [{"name": n, "available": available, "reason": reason} for n, available, reason in attention],
        "auto": {
            str(d).removeprefix("torch."): choose_attention_backend("auto", device, d, HEAD_DIM, False) for d in dtypes
        },
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    found = collect()
    print(json.dumps(found, indent=2) if args.json else render(found))


def render(found: dict[str, Any]) -> str:
    """The findings as text."""
    lines = [f"dcdit {found['dcdit']}, Python {found['python']}, {found['platform']}"]
    lines += [f"  {name:<14} {version or 'not installed'}" for name, version in found["packages"].items()]
    if len(found["devices"]) == 1:
        lines.append("no GPU that torch can see")
    for device in found["devices"]:
        extra = (
            f", compute capability {device['capability']}, {device['memory_gib']} GiB" if "capability" in device else ""
        )
        lines.append(f"{device['device']}: {device['name']}{extra}")
        lines.append(f"  operations run on: {device['ops_backend']}")
        lines.append(
            f"  launch configurations: {device['launch_configs'] or 'defaults; dcdit tune measures better ones'}"
        )
        lines.append("  attention, in order of preference:")
        lines += [
            f"    {'+' if kernel['available'] else '-'} {kernel['name']:<13} {kernel['reason']}"
            for kernel in device["attention"]
        ]
        lines += [
            f"    auto takes {name} for {dtype}: {_why(name, device['attention'], dtype)}"
            for dtype, name in device["auto"].items()
        ]
    return "\n".join(lines)


def _why(name: str, attention: list[dict[str, Any]], dtype: str) -> str:
    available = [kernel["name"] for kernel in attention if kernel["available"]]
    if name == available[0]:
        return "the first one available"
    skipped = ", ".join(available[: available.index(name)])
    return f"{skipped} {'does' if ',' not in skipped else 'do'} not take {dtype}"
