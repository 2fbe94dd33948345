"""Where a result was measured."""

import os
import platform
import re
from pathlib import Path

import torch


def machine_name(device="cpu"):
    """What a result was measured on: the GPU, or the processor and the number of its cores."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        processors = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:                                                                 # not on Linux
        processors = ""
    name = re.search(r"^model name\s*: *(.+)", processors, re.MULTILINE)
    name = name[1].strip() if name else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
