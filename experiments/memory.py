"""How much memory does a prompt take at most? Told without the machine that it takes.

    python experiments/memory.py [--geometry vicuna-7b ...] [--lengths 8192 16384 32768]
                                 [--budget 256] [--dtype bfloat16] [--out FILE.json]

The real prefill and a decoding step run on fake tensors, which have shapes but no contents, and
every storage that an operation makes is counted until it is freed. So this is what the scripts
themselves ask for at once: weights, activations, one layer's full keys and values, what is kept. It
leaves out what libraries take for themselves (on CUDA some hundred MB of workspace) and what an
allocator loses by fragmentation; `bench.py decode --prefill` measures the peak on a GPU.

What is selected is contents, too: here every head keeps as many entries as its budget says, all of
them from the prompt's beginning. Results go to --out as JSON.
"""

import argparse
import contextlib
import sys
import weakref
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cache import KVCache, OneLineParser, allocate_budgets, kv_head_scores, make_method
from experiments.bench import GEOMETRIES, concentrated_scores
from model_llava import DTYPES, MODELS, Prompt, convert_config, rotary_frequencies
from sparsemm import check_output, decode, prefill, write_json


class Storages(TorchDispatchMode):
    """Bytes of the storages that operations have made since it was entered: now, and at most."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage):
        if storage not in self.seen:
            self.seen[storage] = size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, size)

    def free(self, size):
        self.now -= size


class ExpectedCache(KVCache):
    """A KVCache that knows without looking at them how many entries its heads keep."""

    def __init__(self, method, budgets):
        super().__init__(method)
        self.budgets = budgets                                                # L lists of G ints

    def compress(self, layer, q, k, v):
        a = self.method.position_scores(q, k, self.window)
        a.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        self.kept.append(self.budgets[layer])
        rows = torch.zeros(sum(self.budgets[layer]) + len(k) * self.room, dtype=torch.long)
        self.keys.append(k[rows.clamp(max=len(k) - 1), rows])
        self.values.append(v[rows.clamp(max=len(k) - 1), rows])


def peaks(config, length, method="sparsemm", budget=256, dtype=torch.bfloat16, fake=True, seed=0):
    """Peak bytes of a language model of transformers' config on a prompt of `length` text tokens:
    weights alone, in prefill, in a decoding step. fake=False: the same with real tensors."""
    c = convert_config(config, config.model_type)
    scores = concentrated_scores(c.layers, c.heads, seed)
    table = (allocate_budgets(kv_head_scores(scores, c.kv_heads), budget, length).tolist()
             if method != "full" else [[length] * c.kv_heads] * c.layers)
    plan = make_method("full" if method == "full" else "sparsemm", c.layers, c.kv_heads, length,
                       budget, head_scores=scores)
    with contextlib.ExitStack() as stack:
        stack.callback(rotary_frequencies.cache_clear)                            # of fake ones
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(dtype)
        if fake:
            stack.enter_context(FakeTensorMode())
        storages = stack.enter_context(Storages())
        stack.enter_context(torch.inference_mode())
        model = MODELS[c.family](c).requires_grad_(False)
        prompt = Prompt(torch.zeros(length, dtype=torch.long),
                        torch.arange(length).expand(3, -1), [], [], [])
        weights = storages.peak = storages.now
        cache = ExpectedCache(plan, table)
        prefill(model, prompt, cache)
        in_prefill, storages.peak = storages.peak, storages.now
        decode(model, cache, 0, length)
        return dict(weights=weights, prefill=in_prefill, decoding=storages.peak,
                    kept=cache.held_bytes(), allocated=cache.allocated_bytes())


def table(results):
    """Markdown: GB at most, full and sparsemm side by side."""
    lines = ["| geometry | prompt | weights | prefill, full | sparsemm | decoding, full | sparsemm "
             "| kept, full | sparsemm |", "|---" * 9 + "|"]
    for r in results:
        full, sparse = r["full"], r["sparsemm"]
        numbers = (full["weights"], *(x[what] for what in ("prefill", "decoding", "kept")
                                      for x in (full, sparse)))
        lines.append(f"| {r['geometry']} | {r['length']} | "
                     + " | ".join(f"{n / 1e9:.2f}" for n in numbers) + " |")
    return "\n".join(lines)


def main(argv=None):
    parser = OneLineParser(prog="memory.py", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", nargs="+", choices=GEOMETRIES, default=[*GEOMETRIES][:3])
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 16384, 32768])
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--out", metavar="FILE", help="also write the table's numbers as JSON")
    args = parser.parse_args(argv)
    try:
        if args.out:
            check_output(args.out, "--out")
        results = [dict(geometry=name, length=length, **{
            method: peaks(GEOMETRIES[name][0](), length, method, args.budget, DTYPES[args.dtype])
            for method in ("full", "sparsemm")})
            for name in args.geometry for length in args.lengths]
    except ValueError as error:
        parser.error(error)
    print(table(results))
    if args.out:
        write_json(dict(torch=torch.__version__, budget=args.budget, dtype=args.dtype,
                        results=results), args.out)


if __name__ == "__main__":
    main()
