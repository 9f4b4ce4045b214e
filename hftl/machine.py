"""What computes here, as far as that is known without torch."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def processor() -> list[str]:
    """Its name, and on Linux its family and model."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    known = [found[name] for name in ("model name", "cpu family", "model") if name in found]
    return known or [platform.processor() or platform.machine()]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def accelerators() -> list[str]:
    """What Linux knows of them: the files of the devices, and the lines that name the models of NVIDIA's."""
    files = [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("kfd"), *Path("/dev/dri").glob("render*")]
    about = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    names = [line for path in about for line in path.read_text().splitlines() if line.startswith("Model:")]
    return sorted(map(str, files)) + names
