"""How fast? Measured on this machine, next to what others do and to what the machine allows.

    python experiments/bench.py decode [--geometry vicuna-7b ...] [--lengths 8192 ...]
    python experiments/bench.py profile [--geometry vicuna-7b ...] [--lengths 16384]
    python experiments/bench.py attention [--num 10]
    python experiments/bench.py scoring [--model DIR ... | --geometry vicuna-7b ...] [--num 10]
    python experiments/bench.py command [--num 5]                         `python sparsemm.py`, cold

`decode` has the published geometries with random weights, which is honest for time and memory: what
a step costs does not depend on the numbers in it. A cache of T entries is filled with random keys
and values, compressed, and extended by one token a step. Beside it:

    full            our own cache with nothing evicted, decoded by the same code
    transformers    its own model of the same geometry, DynamicCache, scaled_dot_product_attention
    floor           the bytes that a step must read, weights and cache, over this machine's measured
                    bandwidth
    byte ratio      full's bytes over the method's; a measured speed-up can exceed it where full's
                    step is further from its floor

Head scores are as concentrated as the published ones of LLaVA: the top 5 % of heads hold 55 %.
Methods are measured in turn, round by round, in one process; times are medians over all rounds.
`--prefill` measures prefill, too, what compression adds to it, and the peak of memory.

`profile` says where a decoding step with sparsemm spends its time: the ten kernels that take most.

`attention` measures decode_attention alone, the views of the cache included, on one thread: layers
in which few heads hold most of the entries, 32 of them in turn, so that they come from memory.
Beside it a plain product that reads as many bytes once: one query with all keys, one row of weights
with all values.

`scoring` compares score_heads.py with the procedure of the authors' code, in transformers: eager
attention that returns its maps, one forward pass for every token of the transcript. Both count the
same hits, which is checked in float32; in bfloat16, where many keys of a row tie, the table says by
how much of all scores they differ. The transcript is the page's text (truth) or the model's own
(model).

Results go to --out as JSON, and as Markdown beside it; the tables in results/ are made so.
"""

import argparse
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import (CLIPVisionConfig, DynamicCache, LlamaConfig, LlamaForCausalLM,
                          LlavaNextConfig, LlavaNextForConditionalGeneration,
                          LlavaNextImageProcessorPil, LogitsProcessor, LogitsProcessorList,
                          MistralConfig, MistralForCausalLM, Qwen2ForCausalLM, Qwen2VLConfig)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from cache import (KVCache, Method, OneLineParser, allocate_budgets, decode_attention, make_method,
                   recency)
from experiments.arguments import device_name, whole_number
from experiments.pages import KINDS
from experiments.progress import machine_name
from experiments.sources import Rendered
from model_llava import (DTYPES, MODELS, Processor, Prompt, convert_config, copy_weights, load,
                         prepare, read_config)
from score_heads import (LIMIT, OCR_PROMPT, align_tokens, score_transcript, tokens_in_box,
                         top_share, transcribe)
from sparsemm import (DEFAULT_MODEL, check_output, clock, decoding_step, greedy_token, prefill,
                      write_file, write_json)

WINDOW = 32


# ---- decoding ------------------------------------------------------------------------------------

def llava(text):
    """A LLaVA-NeXT of the published vision tower, CLIP ViT-L/14 at 336 pixels, and a decoder."""
    return LlavaNextConfig(text_config=text, vision_config=CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14, projection_dim=768))


WIDE = dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, vocab_size=32064)
GEOMETRIES = {      # name -> transformers' config, and its class of language model
    "vicuna-7b": (lambda: llava(LlamaConfig(**WIDE, intermediate_size=11008)), LlamaForCausalLM),
    "mistral-7b": (lambda: llava(MistralConfig(**WIDE, intermediate_size=14336,
                                               num_key_value_heads=8, sliding_window=None)),
                   MistralForCausalLM),
    "qwen2-vl-7b": (lambda: Qwen2VLConfig(
        text_config=dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                         num_attention_heads=28, num_key_value_heads=4, vocab_size=152064,
                         rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24],
                                       "rope_theta": 1e6}),
        vision_config=dict(hidden_size=3584), tie_word_embeddings=False), Qwen2ForCausalLM),
    "small-mha": (lambda: llava(LlamaConfig(hidden_size=1024, intermediate_size=2048,
                                            num_hidden_layers=8, num_attention_heads=16,
                                            vocab_size=1024)), LlamaForCausalLM),
}
BASELINE = "transformers"


def random_weights(module, device, dtype):
    """Gives a module that was built on the meta device memory, and random numbers in it."""
    module.to(dtype).to_empty(device=device)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data.normal_(0, 0.02)
    return module.eval()


def concentrated_scores(L, H, seed, part=0.05, held=0.55):
    """Head scores (L, H) that fall off as a power of the rank, in random places; the top `part` of
    the heads hold `held` of the sum, as in the published scores."""
    ranks = torch.arange(1, L * H + 1, dtype=torch.float64)
    low, high = 0.0, 10.0
    for _ in range(50):
        power = (low + high) / 2
        low, high = ((power, high) if top_share(ranks ** -power, part)[1] < held else (low, power))
    order = torch.randperm(L * H, generator=torch.Generator().manual_seed(seed))
    return (ranks ** -power)[order].view(L, H)


def filled_cache(c, method, budget, scores, length, args):
    """A KVCache as prefill leaves it, after a prompt of random keys and values."""
    cache = KVCache(make_method(method, c.layers, c.kv_heads, length, budget, head_scores=scores))
    for l in range(c.layers):
        generator = torch.Generator(args.device).manual_seed(l)
        cache.compress(l, *(torch.randn(heads, length, c.head_dim, generator=generator,
                                        dtype=DTYPES[args.dtype], device=args.device)
                            for heads in (c.heads, c.kv_heads, c.kv_heads)))
    return cache


class OurStep:
    """One greedy decoding step of ours, after a prompt of `length` tokens."""

    def __init__(self, model, cache, length):
        self.model, self.step = model, decoding_step(model, cache)
        self.token, self.position = 1, length

    def next_token(self):
        self.token = greedy_token(self.model, self.step(self.token, self.position), self.position)
        self.position += 1


class TransformersStep:
    """One greedy decoding step of transformers' own model, after a prompt of random entries."""

    def __init__(self, model, c, length, args):
        self.model, self.cache = model, DynamicCache()
        for l in range(c.layers):
            k, v = (torch.randn(1, c.kv_heads, length, c.head_dim, dtype=DTYPES[args.dtype],
                                device=args.device) for _ in "kv")
            self.cache.update(k, v, l)
        self.token = torch.zeros(1, 1, dtype=torch.long, device=args.device)

    def next_token(self):
        out = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True)
        self.token = out.logits[:, -1:].argmax(-1)
        self.token.item()


def bandwidth(model, size=2 ** 30):
    """Bytes a second at which the model's device reads memory: the best of ten sums over a large
    tensor and of ten products of a large matrix with a vector."""
    x = torch.ones(size // 4, device=model.device)
    matrix, vector, best = x.view(-1, 4096), torch.ones(4096, device=model.device), math.inf
    for work in (x.sum, lambda: matrix @ vector):
        for _ in range(11):
            start = clock(model)
            work()
            best = min(best, clock(model) - start)
    return size / best


def random_model(config, args):
    """Our model of transformers' config, with random weights, and the bytes of the weights that a
    decoding step reads."""
    c = convert_config(config, config.model_type)
    with torch.device("meta"):
        model = MODELS[c.family](c)
    random_weights(model, args.device, DTYPES[args.dtype])
    read = [*model.decoder.layers.parameters(), model.lm_head.weight]
    return model, sum(w.numel() * w.element_size() for w in read)


def bench_decode(name, length, args):
    """Milliseconds per token of one geometry and prompt length, all methods and budgets."""
    make_config, reference_class = GEOMETRIES[name]
    config = make_config()
    model, weight_bytes = random_model(config, args)
    c, rounds, warm_up = model.config, args.num, 2
    scores = concentrated_scores(c.layers, c.heads, args.seed)
    settings = [("full", length)] + [(method, budget) for budget in args.budgets
                                     for method in ("snapkv", "pyramidkv", "adakv", "sparsemm")
                                     if budget < length]
    rows, steps = [], []
    with torch.inference_mode():
        for method, budget in settings:
            cache = filled_cache(c, method, budget, scores, length, args)
            steps.append(OurStep(model, cache, length))
            rows.append(dict(method=method, budget=budget, cache_bytes=cache.held_bytes()))
        text = reference_class.config_class
        text = text(**config.text_config.to_dict() | dict(model_type=text.model_type),
                    attn_implementation="sdpa")
        with torch.device("meta"):
            reference = reference_class(text)
        random_weights(reference, args.device, DTYPES[args.dtype])
        steps.append(TransformersStep(reference, c, length, args))
        rows.append(dict(method=BASELINE, budget=length, cache_bytes=rows[0]["cache_bytes"]))
        taken = [[] for _ in steps]
        for _ in tqdm(range(rounds + warm_up), desc=f"{name}, {length} tokens"):
            for step, milliseconds in zip(steps, taken):
                start = clock(model)
                step.next_token()
                milliseconds.append(1000 * (clock(model) - start))
    speed = bandwidth(model)
    medians = [statistics.median(milliseconds[warm_up:]) for milliseconds in taken]
    for row, ms in zip(rows, medians):
        read = weight_bytes + row["cache_bytes"]
        row |= dict(ms_per_token=ms, tokens_per_second=1000 / ms,
                    gigabytes_per_second=read / ms / 1e6, floor_ms=1000 * read / speed,
                    speedup=medians[0] / ms,
                    byte_ratio=(weight_bytes + rows[0]["cache_bytes"]) / read)
    result = dict(geometry=name, length=length, weight_bytes=weight_bytes, bandwidth=speed,
                  rows=rows)
    del steps, reference
    if args.prefill:
        result["prefill"] = bench_prefill(model, length, scores, args)
    return result


def bench_prefill(model, length, scores, args):
    """Seconds and the peak of memory of a whole prefill, with nothing evicted and with sparsemm."""
    c, ids = model.config, torch.randint(0, 1000, (length,), device=args.device)
    prompt = Prompt(ids, torch.arange(length, device=args.device).expand(3, -1), [], [], [])
    results = {}
    for method in ("full", "sparsemm"):
        seconds = []
        for _ in range(3):
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            cache = KVCache(make_method(method, c.layers, c.kv_heads, length, 256,
                                        head_scores=scores))
            start = clock(model)
            with torch.inference_mode():
                prefill(model, prompt, cache)
            seconds.append(clock(model) - start)
        results[method] = dict(seconds=statistics.median(seconds), peak_bytes=(
            torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None))
    return results


def decode_table(results):
    """Markdown: a row for each method and budget."""
    lines = ["| geometry | prompt | method | budget | ms/token | tokens/s | GB/s | floor, ms "
             "| speed-up | byte ratio |", "|---" * 10 + "|"]
    for result in results:
        for row in result["rows"]:
            lines.append(f"| {result['geometry']} | {result['length']} | {row['method']} "
                         f"| {row['budget']} | {row['ms_per_token']:.2f} "
                         f"| {row['tokens_per_second']:.1f} | {row['gigabytes_per_second']:.1f} "
                         f"| {row['floor_ms']:.2f} | {row['speedup']:.2f} "
                         f"| {row['byte_ratio']:.2f} |")
    lines.append("\nbyte ratio: full's bytes over the method's; a measured speed-up can exceed it "
                 "where full's step is further from its floor.")
    for result in results:
        for method, what in result.get("prefill", {}).items():
            peak = f", peak {what['peak_bytes'] / 2 ** 30:.2f} GiB" if what["peak_bytes"] else ""
            lines.append(f"\n{result['geometry']}, {result['length']} tokens, {method}: prefill "
                         f"{what['seconds']:.2f} s{peak}")
    return "\n".join(lines)


# ---- where the time of a step goes ---------------------------------------------------------------

def bench_profile(name, length, args, steps=5, rows=10):
    """The kernels that take most of a decoding step with sparsemm at the first of the budgets."""
    model, _ = random_model(GEOMETRIES[name][0](), args)
    c, on_cpu = model.config, args.device.type == "cpu"
    with torch.inference_mode():
        cache = filled_cache(c, "sparsemm", args.budgets[0],
                             concentrated_scores(c.layers, c.heads, args.seed), length, args)
        step = OurStep(model, cache, length)
        for _ in range(3):
            step.next_token()
        activity = ProfilerActivity.CPU if on_cpu else ProfilerActivity.CUDA
        with profile(activities=[activity]) as profiled:
            for _ in range(steps):
                step.next_token()
    spent = {event.key: (event.self_cpu_time_total if on_cpu else event.self_device_time_total)
             for event in profiled.key_averages()}
    calls = {event.key: event.count for event in profiled.key_averages()}
    most = sorted(spent, key=spent.get, reverse=True)[:rows]
    return dict(geometry=name, length=length, ms=sum(spent.values()) / steps / 1000, rows=[
        dict(kernel=key, ms=spent[key] / steps / 1000, calls=calls[key] / steps) for key in most])


def profile_table(results):
    lines = ["| geometry | prompt | kernel | calls a step | ms a step | share |",
             "|---" * 6 + "|"]
    lines += [f"| {r['geometry']} | {r['length']} | {row['kernel'][:60]} | {row['calls']:.0f} "
              f"| {row['ms']:.3f} | {row['ms'] / r['ms']:.0%} |" for r in results
              for row in r["rows"]]
    return "\n".join(lines)


# ---- attention alone -----------------------------------------------------------------------------

SHAPES = ((32, 32, 128, 256), (32, 8, 128, 256), (28, 4, 128, 256), (8, 4, 32, 96))
LAYERS = 32


def unequal_cache(G, D, mean, seed):
    """A KVCache of random entries, `mean` a head on average in every layer, most of them in few."""
    T = G * mean                                            # so that no head is cut
    table = torch.cat([allocate_budgets(concentrated_scores(1, G, seed + l), mean, T)
                       for l in range(LAYERS)])
    cache = KVCache(Method(lambda layer, a: table[layer], recency))
    k, v = torch.randn(2, G, T, D)
    for l in range(LAYERS):
        cache.compress(l, k, k, v)
    return cache


def bench_attention(H, G, D, mean, rounds, seed):
    """Milliseconds of decode_attention of a layer, and of a plain product of as many bytes."""
    cache, q, rows = unequal_cache(G, D, mean, seed), torch.randn(H, 1, D), G * mean
    plain = [(torch.randn(rows, D), torch.randn(rows, D)) for _ in range(LAYERS)]
    query, weights = torch.randn(1, D), torch.randn(1, rows)
    work = (lambda l: decode_attention(q, cache[l]),
            lambda l: (query @ plain[l][0].T, weights @ plain[l][1]))
    taken = [[], []]
    for _ in range(rounds + 1):                             # the first warms up
        for one, milliseconds in zip(work, taken):
            for l in range(LAYERS):
                start = time.perf_counter()
                one(l)
                milliseconds.append(1000 * (time.perf_counter() - start))
    ms, plain_ms = (statistics.median(milliseconds[LAYERS:]) for milliseconds in taken)
    largest = max(max(held) for held in cache.held())
    return dict(heads=H, kv_heads=G, head_dim=D, mean=mean, largest=largest, ms=ms,
                plain_ms=plain_ms, ratio=ms / plain_ms)


def attention_table(results):
    lines = ["| heads | KV heads | D | mean entries | largest head | decode_attention, ms "
             "| plain product, ms | ratio |", "|---" * 8 + "|"]
    lines += [f"| {r['heads']} | {r['kv_heads']} | {r['head_dim']} | {r['mean']} | {r['largest']} "
              f"| {r['ms']:.3f} | {r['plain_ms']:.3f} | {r['ratio']:.2f} |" for r in results]
    return "\n".join(lines)


# ---- scoring -------------------------------------------------------------------------------------

class Force(LogitsProcessor):
    """Makes generate write given tokens, one a step."""

    def __init__(self, ids, start):
        self.ids, self.start = ids, start

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.ids[input_ids.shape[1] - self.start]] = 0
        return forced


@torch.no_grad()
def score_step_by_step(reference, ours, image, words, ids=None):
    """Visual scores (L, H) of one page from attention maps: transformers' generate returns those of
    the prompt (T x T) and of every token after it. ids: the transcript, None for the model's own.
    Returns scores and the transcript's tokens."""
    prompt = prepare(ours, [image], OCR_PROMPT)
    T, ends = len(prompt.ids), ours.processor.end_tokens
    inputs = ours.processor.image_processor(image, return_tensors="pt").to(reference.device)
    if ours.config.family == "qwen2_vl":
        inputs["mm_token_type_ids"] = (prompt.ids == ours.config.image_token).int()[None]
    steps = LIMIT if ids is None else len(ids)
    out = reference.generate(
        input_ids=prompt.ids[None], **inputs, do_sample=False, max_new_tokens=steps,
        eos_token_id=sorted(ends), pad_token_id=0, output_attentions=True,
        return_dict_in_generate=True,
        logits_processor=LogitsProcessorList([] if ids is None else [Force(ids, T)]))
    written = [i for i in out.sequences[0, T:].tolist() if i not in ends]
    pieces = [ours.processor.tokenizer.decode([i], skip_special_tokens=True) for i in written]
    scores = torch.zeros(ours.config.layers, ours.config.heads, dtype=torch.float64)
    regions = [tokens_in_box(prompt.images[0], box) + prompt.starts[0] for _, box in words]
    for i, word in enumerate(align_tokens(pieces, [text for text, _ in words])):
        if word is None or len(regions[word]) == 0:
            continue
        for l, maps in enumerate(out.attentions[i]):                            # (1, H, rows, keys)
            hit = torch.isin(maps[0, :, -1].argmax(-1).cpu(), regions[word])
            scores[l] += hit / len(regions[word])
    return scores, written


def trained_pair(folder, device, dtype):
    """A checkpoint, as our model and as transformers'."""
    ours = load(folder, str(device), dtype)
    kind = (transformers.Qwen2VLForConditionalGeneration if ours.config.family == "qwen2_vl"
            else LlavaNextForConditionalGeneration)
    return ours, kind.from_pretrained(folder, dtype=DTYPES[dtype],
                                      attn_implementation="eager").to(device)


def random_pair(geometry, device, dtype):
    """A LLaVA-NeXT of a published geometry, as our model and as transformers', with the same random
    weights. Pages become as many image tokens as with the published checkpoints; the tokenizer is
    that of the small model, a token per character."""
    small = DEFAULT_MODEL.parent / "llava-next"
    config = GEOMETRIES[geometry][0]()
    config.image_token_index = read_config(small).image_token
    with torch.device(device):
        reference = LlavaNextForConditionalGeneration._from_config(
            config, dtype=DTYPES[dtype], attn_implementation="eager").eval()
    c = convert_config(config, config.model_type)
    with torch.device("meta"):
        ours = MODELS[c.family](c)
    ours = ours.to(DTYPES[dtype]).to_empty(device=device).requires_grad_(False)
    copy_weights(ours, reference.state_dict().items(), geometry)
    ours.processor = Processor(small, c)
    side = config.vision_config.image_size
    ours.processor.image_processor = LlavaNextImageProcessorPil(
        size=dict(shortest_edge=side), crop_size=dict(height=side, width=side),
        image_grid_pinpoints=config.image_grid_pinpoints)
    return ours.eval(), reference


def bench_scoring(name, num, seed, device, dtypes):
    """Pages a second of both procedures with both transcripts, on the pages that score_heads.py
    renders by itself, and on letters, which are full of text: a result for each dtype. A page is
    scored in every dtype before the next one, so that a machine whose speed changes over minutes
    favours none. name: a checkpoint's folder, or one of GEOMETRIES; a random model never ends its
    transcript, so that it is only given the page's."""
    random = name in GEOMETRIES
    pairs = {dtype: (random_pair if random else trained_pair)(name, device, dtype)
             for dtype in dtypes}
    rows = {dtype: [] for dtype in dtypes}
    for what, kinds in (("all kinds", KINDS), ("letters", ("letter",)))[:1 if random else 2]:
        pages = Rendered(kinds, seed, (256, 384), num + 1)
        for whose in ("truth",) if random else ("truth", "model"):
            taken = [[compare_scoring(*pair, pages[i], whose) for pair in pairs.values()]
                     for i in tqdm(range(num + 1), desc=f"{Path(name).name}, {what}, {whose}")]
            for dtype, of_dtype in zip(dtypes, zip(*taken[1:])):
                tokens, fast, slow, differ = (sum(column) for column in zip(*of_dtype))
                assert dtype != "float32" or differ / num < 0.001, differ    # two keys may tie
                rows[dtype].append(dict(
                    pages=what, transcript=whose, tokens=tokens / num, images_per_second=num / fast,
                    times_faster=slow / fast, step_by_step_images_per_second=num / slow,
                    differ=differ / num))
    return [dict(model=Path(name).name, dtype=dtype, num=num, rows=rows[dtype]) for dtype in dtypes]


def compare_scoring(ours, reference, page, whose, repeats=3):
    """How many tokens the transcript of a page has; the seconds that both procedures take, of ours,
    which is over soon, the median of some runs; and how much of all scores differs."""
    image, words, text = page
    given = ours.processor.tokenizer(text, add_special_tokens=False).input_ids
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        ids = transcribe(ours, [image]) if whose == "model" else given
        scores, *_ = score_transcript(ours, [image], [words], ids)
        taken.append(time.perf_counter() - start)
    start = time.perf_counter()
    expected, written = score_step_by_step(reference, ours, image, words,
                                           given if whose == "truth" else None)
    step_by_step = time.perf_counter() - start
    differ = (scores - expected).abs().sum().item() / max(expected.sum().item(), 1e-9)
    return len(written), statistics.median(taken), step_by_step, differ


def scoring_table(results):
    lines = ["| model | numbers | pages | transcript | tokens a page | score_heads.py, images/s "
             "| step by step, images/s | ratio | scores differ by |", "|---" * 9 + "|"]
    for result in results:
        for row in result["rows"]:
            lines.append(f"| {result['model']} | {result['dtype']} | {row['pages']} "
                         f"| {row['transcript']} | {row['tokens']:.0f} "
                         f"| {row['images_per_second']:.2f} "
                         f"| {row['step_by_step_images_per_second']:.2f} "
                         f"| {row['times_faster']:.1f} | {row['differ']:.1%} |")
    if len({result["dtype"] for result in results}) > 1:
        lines.append("\nEach procedure in the numbers that suit it best:\n")
        lines += at_their_best(results)
    return "\n".join(lines)


def at_their_best(results):
    """A line for each model and kind of pages: the ratio of both speeds, each in its best dtype."""
    lines = []
    for model in dict.fromkeys(result["model"] for result in results):
        of_model = [result["rows"] for result in results if result["model"] == model]
        for rows in zip(*of_model):
            fast, slow = (max(row[speed] for row in rows) for speed in
                          ("images_per_second", "step_by_step_images_per_second"))
            lines.append(f"* {model}, {rows[0]['pages']}, {rows[0]['transcript']}: "
                         f"{fast:.2f} / {slow:.2f} = {fast / slow:.1f}")
    return lines


# ---- the command, cold ---------------------------------------------------------------------------

def bench_command(num):
    """Seconds of wall time of the README's first command, and of the imports of torch and
    transformers that it cannot do without, in a new process each time: medians."""
    command = ["sparsemm.py", "--image", "tiny/receipt.png", "--prompt", "What is the Total?"]
    imports = ("import torch\n"
               "from transformers import AutoTokenizer, LlavaNextImageProcessorPil, "
               "Qwen2VLImageProcessorPil")
    runs = dict(seconds=[], imports_alone=[])
    for _ in tqdm(range(num)):
        for arguments, taken in zip((command, ["-c", imports]), runs.values()):
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
            taken.append(time.perf_counter() - start)
    return dict(command=" ".join(command), runs=runs,
                **{name: statistics.median(taken) for name, taken in runs.items()})


def command_table(result):
    return ("| command | wall time, s | its imports of torch and transformers alone, s |\n"
            "|---|---|---|\n"
            f"| {result['command']} | {result['seconds']:.1f} | {result['imports_alone']:.1f} |")


def measure(args, dtypes):
    """The results of a part, and their table."""
    on_cpu = args.device.type == "cpu"
    if args.part == "decode":
        names = args.geometry or (["small-mha"] if on_cpu else list(GEOMETRIES)[:3])
        results = [bench_decode(name, length, args) for name in names for length in args.lengths]
        return results, decode_table(results)
    if args.part == "profile":
        names = args.geometry or (["small-mha"] if on_cpu else list(GEOMETRIES)[:1])
        results = [bench_profile(name, length, args) for name in names for length in args.lengths]
        return results, profile_table(results)
    if args.part == "attention":
        torch.set_num_threads(1)
        with torch.inference_mode():
            results = [bench_attention(*shape, args.num, args.seed) for shape in SHAPES]
        return results, attention_table(results)
    if args.part == "scoring":
        models = args.geometry or args.model or sorted(map(str, DEFAULT_MODEL.parent.glob("*/")))
        results = [result for name in models for result in bench_scoring(
            name, args.num, args.seed, args.device, dtypes)]
        return results, scoring_table(results)
    results = bench_command(args.num)
    return results, command_table(results)


def parse_arguments(argv):
    parser = OneLineParser(prog="bench.py", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["decode", "profile", "attention", "scoring", "command"])
    parser.add_argument("--geometry", nargs="+", choices=GEOMETRIES,
                        help="decode: default the 7B ones on CUDA, small-mha on a CPU; scoring: "
                             "those of LLaVA-NeXT, with random weights, instead of --model")
    parser.add_argument("--lengths", nargs="+", type=whole_number(WINDOW),
                        default=[2048, 8192, 16384, 32768],
                        help="prompt lengths in tokens")
    parser.add_argument("--budgets", nargs="+", type=whole_number(WINDOW), default=[64, 256, 1024])
    parser.add_argument("--prefill", action="store_true", help="measure prefill and memory, too")
    parser.add_argument("--device", type=device_name, default="auto",
                        help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on CUDA, else float32; "
                                                        "scoring: both")
    parser.add_argument("--model", nargs="+", help="scoring: default the small models in tiny/")
    parser.add_argument("--num", type=whole_number(1), default=10,
                        help="pages, runs, or rounds of decoding")
    parser.add_argument("--seed", type=whole_number(0), default=0)
    parser.add_argument("--out", metavar="FILE",
                        help="default: work/bench-PART.json beside this file")
    args = parser.parse_args(argv)
    if args.part == "scoring" and "qwen2-vl-7b" in (args.geometry or ()):
        parser.error("argument --geometry: scoring has no qwen2-vl-7b; "
                     "vicuna-7b, mistral-7b or small-mha is right")
    return parser, args


def main(argv=None):
    parser, args = parse_arguments(argv)
    dtypes = [args.dtype] if args.dtype else ["float32", "bfloat16"]
    args.dtype = args.dtype or ("float32" if args.device.type == "cpu" else "bfloat16")
    torch.manual_seed(args.seed)
    try:
        if args.out:
            check_output(args.out, "--out")
        results, table = measure(args, dtypes)
    except ValueError as error:
        parser.error(error)
    print(table)
    out = Path(args.out or Path(__file__).parent / "work" / f"bench-{args.part}.json")
    out.parent.mkdir(exist_ok=True)
    write_json(dict(command="python experiments/bench.py " + " ".join(argv or sys.argv[1:]),
                    machine=machine_name(args.device), torch=torch.__version__,
                    dtype=dtypes if args.part == "scoring" else args.dtype,
                    transformers=transformers.__version__, seed=args.seed, results=results), out)
    write_file(out.with_suffix(".md"), table + "\n")


if __name__ == "__main__":
    main()
