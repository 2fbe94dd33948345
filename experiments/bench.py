"""How fast, and how much memory? Measured on this machine, beside what others do.

    python experiments/bench.py decode [--geometry vicuna-7b ...] [--lengths 8192 ...] [--prefill]
    python experiments/bench.py cpu --layers 4      a 2B model on a CPU: loading, prefill, decoding
    python experiments/bench.py memory              the peak of a prompt, counted without a GPU
    python experiments/bench.py attention           decode_attention alone, one thread
    python experiments/bench.py scoring             score_heads.py on the small models
    python experiments/bench.py command             `python sparsemm.py`, cold

BENCHMARKS.md explains the columns. Whatever is compared runs in turn, round by round; times are
medians. `full` is our own cache with nothing evicted; `transformers` has a DynamicCache and
scaled_dot_product_attention. A transcript is the page's text (truth) or the model's own (model).
"""

import itertools
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from weakref import WeakSet, finalize

import torch
import transformers as hf
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cache import (KVCache, Method, Plan, allocate_budgets, decode_attention, make_plan, recency,
                   select_entries)
from experiments.pages import KINDS, Rendered
from experiments.report import machine_name, rows_of
from model_llava import (DTYPES, MODELS, Prompt, convert_config, load, prepare, read_config,
                         rotary_frequencies)
from score_heads import OCR_PROMPT, align_tokens, score_transcript, tokens_in_box, transcribe
from sparsemm import (DEFAULT_MODEL, OneLineParser, clock, decode, decoding_step, greedy_token,
                      prefill, write_file, write_json)

VLM = hf.AutoModelForImageTextToText
GEOMETRIES = {          # name -> layers, heads, KV heads, width, MLP width, vocabulary
    "vicuna-7b": (hf.LlamaConfig, 32, 32, 32, 4096, 11008, 32064),
    "mistral-7b": (hf.MistralConfig, 32, 32, 8, 4096, 14336, 32064),
    "qwen2-vl-7b": (hf.Qwen2Config, 28, 28, 4, 3584, 18944, 152064),
    "qwen2-vl-2b": (hf.Qwen2Config, 28, 12, 2, 1536, 8960, 151936),
    "small-mha": (hf.LlamaConfig, 8, 16, 16, 1024, 2048, 1024)}
SHAPES, LAYERS = ((32, 32, 128, 256), (32, 8, 128, 256), (28, 4, 128, 256), (8, 4, 32, 96)), 32


def geometry(name, layers=None):
    """transformers' configs of a whole model and of its language model, cut to so many layers."""
    kind, L, H, G, E, mlp, vocabulary = GEOMETRIES[name]
    text = dict(num_hidden_layers=layers or L, num_attention_heads=H, num_key_value_heads=G,
                hidden_size=E, intermediate_size=mlp, vocab_size=vocabulary, sliding_window=None)
    if kind is not hf.Qwen2Config:
        return hf.LlavaNextConfig(text_config=kind(**text), image_token_index=1), kind(**text)
    rope = dict(type="mrope", mrope_section=[16, 24, 24], rope_theta=1e6)
    return hf.Qwen2VLConfig(
        text_config=dict(text, rope_scaling=rope), tie_word_embeddings=name == "qwen2-vl-2b",
        vision_config=dict(hidden_size=E, depth=layers or 32)), kind(**text)


@torch.inference_mode(False)                # as from_pretrained: frozen weights take slower paths
def random_pair(name, args, dtype):
    """Our model of a geometry and transformers' language model, both with random weights."""
    config, text = geometry(name, args.layers)
    with torch.device("meta"):
        ours = MODELS[config.model_type](convert_config(config, config.model_type))
        theirs = hf.AutoModelForCausalLM.from_config(text, attn_implementation="sdpa")
    for model in (ours, theirs):
        model.eval().to(DTYPES[dtype]).to_empty(device=args.device)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.normal_(0, 0.02)
    return ours, theirs


def concentrated_scores(L, H, seed, part=0.05, held=0.55):
    """Head scores (L, H) that fall off as a power of the rank, in random places; the top `part` of
    the heads hold `held` of the sum, as in the published scores of LLaVA."""
    ranks, powers = torch.arange(1.0, L * H + 1).double(), torch.linspace(0, 10, 4001)[:, None]
    scores = ranks ** -powers                                                       # (4001, L*H)
    shares = scores[:, :max(1, round(part * L * H))].sum(1) / scores.sum(1)
    order = torch.randperm(L * H, generator=torch.Generator().manual_seed(seed))
    return scores[(shares - held).abs().argmin(), order].view(L, H)


def filled_cache(model, method, length):
    """A KVCache as prefill leaves it, after a prompt of random keys and values."""
    c, like = model.config, dict(dtype=model.dtype, device=model.device)
    cache = KVCache(make_plan(method, c.layers, c.kv_heads, length))
    for l in range(c.layers):
        cache.compress(l, torch.randn(c.heads, length, c.head_dim, **like),
                       *torch.randn(2, c.kv_heads, length, c.head_dim, **like))
    return cache


def in_turn(works, rounds, now=time.perf_counter, warm_up=1):
    """The median seconds of each of some functions, called in turn, round by round."""
    taken = [[] for _ in works]
    for _ in tqdm(range(rounds + warm_up), disable=None):
        for work, seconds in zip(works, taken):
            start = now()
            work()
            seconds.append(now() - start)
    return [statistics.median(seconds[warm_up:]) for seconds in taken]


def our_tokens(model, cache, length):
    """Yields token after token, greedily, after a prompt of `length` tokens."""
    step, token = decoding_step(model, cache), 1
    for position in itertools.count(length):
        token = greedy_token(step(token, position))
        yield token


def their_tokens(model, c, length):
    """The same with transformers' model, after a prompt of random entries."""
    cache, like = hf.DynamicCache(), dict(dtype=model.dtype, device=model.device)
    for l in range(c.layers):
        cache.update(*torch.randn(2, 1, c.kv_heads, length, c.head_dim, **like), l)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    while True:
        token = model(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
        yield token.item()


def bandwidth(model, size=2 ** 30):
    """Bytes a second that the model's device reads: the best of some sums and products."""
    x = torch.ones(size // 4, device=model.device)
    matrix, vector = x.view(-1, 4096), torch.ones(4096, device=model.device)
    return size / min(in_turn([x.sum, lambda: matrix @ vector] * 5, 1, partial(clock, model)))


@torch.inference_mode()
def decode_rows(name, length, args, dtype):
    """A row per method and budget."""
    ours, theirs = random_pair(name, args, dtype)
    c, scores = ours.config, concentrated_scores(ours.config.layers, ours.config.heads, args.seed)
    methods = [Method("full", length)] + [
        Method(method, budget, head_scores=scores) for budget in args.budgets if budget < length
        for method in ("snapkv", "pyramidkv", "adakv", "sparsemm")]
    caches = [filled_cache(ours, method, length) for method in methods]
    held = [cache.held_bytes() for cache in caches]
    tokens = [*(our_tokens(ours, x, length) for x in caches), their_tokens(theirs, c, length)]
    seconds = in_turn([partial(next, one) for one in tokens], args.num, partial(clock, ours), 2)
    if args.profile:
        with profile() as profiled:
            next(tokens[-2])                                                            # sparsemm
        print(profiled.key_averages().table(sort_by=f"self_{args.device}_time_total", row_limit=10))
    del caches, tokens                                                  # before memory is measured
    prefills = prefill_cells(ours, theirs, length, methods) if args.prefill else [{}] * len(seconds)
    weights = sum(w.nbytes for w in (*ours.decoder.layers.parameters(), ours.lm_head.weight))
    names, speed = [(m.name, m.budget) for m in methods], bandwidth(ours)
    for (method, budget), kept, s, cells in zip([*names, ("transformers", length)],
                                                [*held, held[0]], seconds, prefills):
        read = weights + kept
        yield {"geometry": name, "prompt": length, "method": method, "budget": budget,
               "ms/token": 1000 * s, "tokens/s": 1 / s, "GB/s": read / s / 1e9,
               "floor, ms": 1000 * read / speed, "speed-up": seconds[0] / s,
               "byte ratio": (weights + held[0]) / read} | cells


def prefill_cells(ours, theirs, length, methods):
    """For each method and transformers: seconds of a prefill, and on CUDA the most memory."""
    c, ids = ours.config, torch.zeros(1, length, dtype=torch.long, device=ours.device)
    prompt = Prompt(ids[0], torch.arange(length, device=ids.device).expand(3, -1), [], [], [])
    works = [partial(lambda method: prefill(ours, prompt, KVCache(make_plan(
        method, c.layers, c.kv_heads, length))), method) for method in methods]
    works.append(partial(theirs, input_ids=ids, logits_to_keep=1))
    for work, s in zip(works, in_turn(works, 1, partial(clock, ours))):
        peak, model = "-", theirs if work is works[-1] else ours
        if ours.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            others = torch.cuda.memory_allocated() - sum(w.nbytes for w in model.parameters())
            work()
            peak = (torch.cuda.max_memory_allocated() - others) / 1e9
        yield {"prefill, s": s, "peak, GB": peak}


def save_random(config, folder):
    """Writes a Qwen2-VL of random bfloat16 weights, which takes the small model's pictures."""
    small = read_config(DEFAULT_MODEL)
    config.image_token_id = small.image_token
    config.vision_config.patch_size = small.vision.patch_size
    VLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    shutil.copytree(DEFAULT_MODEL, folder, ignore=shutil.ignore_patterns("config.json", "model*"),
                    dirs_exist_ok=True)


def load_memory(read, folder, **options):
    """GB that a loaded model holds once its weights were read, of its own or mapped from a file."""
    def resident():
        status = Path("/proc/self/status").read_text().split()
        return sum(int(status[status.index(f"Rss{of}:") + 1]) for of in ("Anon", "File")) * 1.024e-6
    read(DEFAULT_MODEL)                                                 # imports what is needed
    before, model = resident(), read(folder, **options)
    sum(weight.sum() for weight in model.parameters())
    return resident() - before


def bench_cpu(args, name="qwen2-vl-2b", length=1000):
    """A row per numbers, threads and library, both with the full cache."""
    args.device, args.budgets, args.prefill, loads = "cpu", [], True, {}
    with tempfile.TemporaryDirectory() as folder:
        save_random(geometry(name, args.layers)[0], folder)
        for dtype, read in itertools.product(args.dtype, (load, VLM.from_pretrained)):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                gb = process.submit(load_memory, read, folder, dtype=dtype).result()
            loads.setdefault(dtype, []).append(gb)
    for dtype, threads in itertools.product(loads, (1, 2)):
        torch.set_num_threads(threads)
        for gb, row in zip(loads[dtype], decode_rows(name, length, args, dtype)):
            yield {"layers": args.layers or 28, "numbers": dtype, "threads": threads,
                   "method": row["method"], "load, GB": gb, "prompt": length,
                   "prefill, s": row["prefill, s"], "ms/token": row["ms/token"]}


# ---- memory, counted -----------------------------------------------------------------------------

class Storages(TorchDispatchMode):
    """Counts the bytes of the storages that operations make: now, and at most."""

    def __init__(self):
        super().__init__()
        self.seen, self.now, self.peak = WeakSet(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            if x not in self.seen:
                self.seen.add(x)
                self.add(x.nbytes())
                finalize(x, self.add, -x.nbytes())
        return out

    def add(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)


class ExpectedCache(KVCache):
    """A KVCache that knows how many entries its heads keep, for tensors without contents."""

    def compress(self, layer, q, k, v):
        a, kept = self.plan.position_scores(q, k, self.plan.window), self.expected[layer]
        select_entries(a, torch.tensor(kept), k.shape[1])
        self.kept.append(kept)
        rows = torch.zeros(sum(kept) + len(k) * self.room, dtype=torch.long)
        self.keys.append(k[rows.clamp(max=len(k) - 1), rows])
        self.values.append(v[rows.clamp(max=len(k) - 1), rows])


def peaks(config, length, method, dtype):
    """GB that a prompt of `length` text tokens takes: the weights, the most in prefill and in a
    decoding step, the entries kept. Not counted: what libraries take, and fragmentation."""
    c = convert_config(config, config.model_type)
    cache = ExpectedCache(make_plan(method, c.layers, c.kv_heads, length))
    cache.expected = [cache.plan.budgets(l, None).tolist() for l in range(c.layers)]
    rotary_frequencies.cache_clear()                                    # of tensors with contents
    torch.set_default_dtype(dtype)
    with FakeTensorMode(), torch.inference_mode(), Storages() as storages:
        model = MODELS[c.family](c)
        prompt = Prompt(torch.zeros(length, dtype=torch.long),
                        torch.arange(length).expand(3, -1), [], [], [])
        weights = storages.peak = storages.now
        prefill(model, prompt, cache)
        most, storages.peak = storages.peak, storages.now
        decode(model, cache, 0, length)
    torch.set_default_dtype(torch.float32)
    rotary_frequencies.cache_clear()
    return dict(weights=weights / 1e9, prefill=most / 1e9, decoding=storages.peak / 1e9,
                kept=cache.held_bytes() / 1e9)


def bench_memory(args):
    for name, length in itertools.product(args.geometry, args.lengths):
        config, text = geometry(name, args.layers)
        scores = concentrated_scores(text.num_hidden_layers, text.num_attention_heads, args.seed)
        for method in ("full", "sparsemm"):
            sizes = peaks(config, length, Method(method, args.budgets[0], head_scores=scores),
                          DTYPES[args.dtype[0]])
            yield dict(geometry=name, prompt=length, method=method) | sizes


# ---- attention alone, scoring, the command -------------------------------------------------------

@torch.inference_mode()
def bench_attention(args):
    """A row per shape. Few heads hold most entries. Layers take turns: they come from memory."""
    torch.set_num_threads(1)
    for H, G, D, mean in SHAPES:
        T = G * mean
        table = torch.cat([allocate_budgets(concentrated_scores(1, G, args.seed + l), mean, T)
                           for l in range(LAYERS)])
        cache, q = KVCache(Plan(lambda layer, a: table[layer], recency, 32)), torch.randn(H, 1, D)
        plain, weights = torch.randn(LAYERS, 2, T, D), torch.randn(1, T)
        for l in range(LAYERS):
            k, v = torch.randn(2, G, T, D)
            cache.compress(l, k, k, v)
        ours, product = (1000 * s / LAYERS for s in in_turn([
            lambda: [decode_attention(q, cache[l]) for l in range(LAYERS)],
            lambda: [(q[0] @ k.T, weights @ v) for k, v in plain]], args.num))
        yield {"heads": H, "KV heads": G, "D": D, "mean entries": mean,
               "largest head": max(map(max, cache.held())), "decode_attention, ms": ours,
               "plain product, ms": product, "ratio": ours / product}


def our_scores(model, pages, whose, transcripts):
    """Yields the visual scores (L, H) of page after page; the transcripts' ids are appended."""
    for image, words, text in pages:
        transcripts.append(transcribe(model, image) if whose == "model" else
                           model.processor.tokenizer(text, add_special_tokens=False).input_ids)
        yield score_transcript(model, image, words, transcripts[-1])[0]


@torch.no_grad()
def their_scores(theirs, model, pages, transcripts):
    """The same by the authors' procedure, from the attention maps of every token."""
    c, tokenizer = model.config, model.processor.tokenizer
    for (image, words, _), ids in zip(pages, transcripts):
        prompt = prepare(model, [image], OCR_PROMPT)
        inputs = model.processor.image_processor(image, return_tensors="pt").to(theirs.device)
        if c.family == "qwen2_vl":
            inputs["mm_token_type_ids"] = (prompt.ids == c.image_token).int()[None]
        maps = theirs.generate(
            input_ids=prompt.ids[None], **inputs, do_sample=False, max_new_tokens=len(ids),
            prefix_allowed_tokens_fn=lambda batch, read: [ids[len(read) - len(prompt.ids)]],
            pad_token_id=0, output_attentions=True, return_dict_in_generate=True).attentions
        pieces = [tokenizer.decode([i], skip_special_tokens=True) for i in ids]
        scores = torch.zeros(c.layers, c.heads, dtype=torch.float64)
        for word, of_token in zip(align_tokens(pieces, [text for text, _ in words]), maps):
            box = (0, 0, 0, 0) if word is None else words[word][1]
            region = tokens_in_box(prompt.images[0], box) + prompt.starts[0]
            looked = torch.stack([rows[0, :, -1].argmax(-1) for rows in of_token]).cpu()  # (L, H)
            scores += torch.isin(looked, region) / max(1, len(region))
        yield scores


def bench_scoring(args):
    """A row per model, numbers, kind of pages and transcript."""
    for folder, dtype in itertools.product(sorted(DEFAULT_MODEL.parent.glob("*/")), args.dtype):
        model = load(folder, args.device, dtype)
        theirs = VLM.from_pretrained(
            folder, dtype=DTYPES[dtype], attn_implementation="eager").to(args.device)
        for (what, kinds), whose in itertools.product(
                (("all kinds", KINDS), ("letters", ("letter",))), ("truth", "model")):
            pages, ids = Rendered(kinds, args.seed, (256, 384), args.num + 1), []
            scores = our_scores(model, pages, whose, ids), their_scores(theirs, model, pages, ids)
            found = [], []
            fast, slow = in_turn([partial(lambda i: found[i].append(next(scores[i])), i)
                                  for i in (0, 1)], args.num)
            ours, expected = map(torch.stack, found)
            yield {"model": folder.name, "numbers": dtype, "pages": what, "transcript": whose,
                   "tokens a page": sum(map(len, ids)) // len(ids),
                   "score_heads.py, images/s": 1 / fast, "step by step, images/s": 1 / slow,
                   "ratio": slow / fast,
                   "scores differ by": f"{(ours - expected).abs().sum() / expected.sum():.1%}"}


def bench_command(args):
    """The README's first command, and the imports of torch and transformers that it needs."""
    command = ["sparsemm.py", "--image", "tiny/receipt.png", "--prompt", "What is the Total?"]
    imports = ("import torch\nfrom transformers import AutoTokenizer, LlavaNextImageProcessorPil, "
               "Qwen2VLImageProcessorPil")
    whole, alone = in_turn([partial(subprocess.run, [sys.executable, *arguments], check=True,
                                    cwd=DEFAULT_MODEL.parents[1], capture_output=True)
                            for arguments in (command, ["-c", imports])], args.num)
    yield {"command": " ".join(command), "wall time, s": whole,
           "its imports of torch and transformers alone, s": alone}


def main(argv=None):
    parts = dict(cpu=bench_cpu, memory=bench_memory, attention=bench_attention,
                 scoring=bench_scoring, command=bench_command,
                 decode=lambda args: (row for name in args.geometry for length in args.lengths
                                      for row in decode_rows(name, length, args, args.dtype[0])))
    parser = OneLineParser("bench.py", usage=__doc__)
    add = parser.add_argument
    add("part", choices=parts)
    add("--geometry", nargs="+", choices=GEOMETRIES, default=["small-mha"])
    add("--layers", type=int, help="cut the geometry to so many layers")
    add("--lengths", nargs="+", type=int, default=[8192, 16384, 32768], help="tokens of prompts")
    add("--budgets", nargs="+", type=int, default=[256])
    add("--prefill", action="store_true", help="decode: also prefill, and its peak memory on CUDA")
    add("--profile", action="store_true", help="decode: also what takes most of a step of sparsemm")
    add("--device", default="cpu", choices=["cpu", "cuda"][:1 + torch.cuda.is_available()])
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="cpu, scoring: one or more")
    add("--num", type=int, default=10, help="rounds, or pages")
    add("--seed", type=int, default=0)
    add("--out", type=Path, metavar="FILE.json")

    def work(args):
        isa = os.environ.get("ONEDNN_MAX_CPU_ISA")
        if isa == "AVX2":
            torch.cpu.get_capabilities = dict           # what oneDNN may not use, we may not see
        torch.manual_seed(args.seed)
        rows = list(parts[args.part](args))
        text = "\n".join(rows_of(rows[0], [[
            x if isinstance(x, (str, int)) else f"{x:.{3 if x < 1 else 2 if x < 100 else 1}f}"
            for x in row.values()] for row in rows]))
        print(text)
        if args.out:
            command = ["python", "experiments/bench.py", *(argv or sys.argv[1:])]
            write_json(dict(
                command=f"ONEDNN_MAX_CPU_ISA={isa} " * bool(isa) + " ".join(command), results=rows,
                machine=machine_name(args.device), torch=torch.__version__, dtype=args.dtype,
                transformers=hf.__version__, seed=args.seed), args.out)
            write_file(args.out.with_suffix(".md"), text + "\n")
    parser.run(work, argv)


if __name__ == "__main__":
    main()
