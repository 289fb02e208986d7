"""The machine that figures are of."""

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def machine_info(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The machine and the versions that figures depend on."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    versions = {package: metadata.version(package) for package in ("diffusers", "transformers", "accelerate", "peft")}
    return {
        "device": name,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """The CPU's model name; Linux tells it in one file only."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
