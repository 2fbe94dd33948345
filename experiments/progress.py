"""Results that are not lost: files written whole, the progress of a long run, the shares of several
processes, and where it ran."""

import json
import os
import platform
import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def write_json(content, path):
    """All of it or nothing: to a file beside it, which is then renamed."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(temporary, path)


@dataclass
class Progress:
    """What is done so far, in a file beside the result, one for each process."""
    path: Path
    settings: dict
    pages: dict                 # page number (as text) -> {"scores": [L*H], "tokens", "hits"}

    def save(self):
        write_json({"settings": self.settings, "pages": self.pages}, self.path)

    @classmethod
    def resume(cls, out, rank, settings, wanted):
        """A Progress of this process, and the pages that any process has done before."""
        done = {}
        for path in sorted(out.parent.glob(f"{out.name}.part*[0-9]")) if wanted else []:
            try:
                part = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                raise ValueError(f"--resume: {path} is not a file of ours") from None
            if part["settings"] != settings:
                raise ValueError(f"--resume: {path} was made with other settings; without --resume "
                                 "it is begun anew")
            done |= part["pages"]
        return cls(Path(f"{out}.part{rank}"), settings, {}), done


def rank_and_ranks(args):
    """This process's number and that of all processes: 0 and 1 unless torchrun started it. On GPUs
    args.device becomes its own."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    if args.device in ("auto", "cuda") and torch.cuda.is_available():
        args.device = f"cuda:{dist.get_node_local_rank()}"
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def gather(own):
    """What every process has, in the order of their ranks. They may come hours apart.

    The process group lives no longer than that: where one is left when Python ends, its threads can
    abort the process ("terminate called without an active exception").
    """
    if not dist.is_torchelastic_launched():
        return [own]
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    dist.destroy_process_group()
    return gathered


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
