"""Ask a question about an image. Heads that do not look at it keep little of their KV cache.

    python sparsemm.py --image tiny/receipt.png --prompt "What is the Total?"

Prefill runs over the whole prompt. As soon as a layer's attention is done, each of its heads keeps
only the entries that its budget allows (cache.py). Decoding then reads and extends what is left:

    images, prompt --> prefill --> token --> token --> ... --> end
                       layer by    each appends one entry to every head,
                       layer:      and attends to what that head holds
                       attend,
                       compress

So the first token of the first answer always comes from the full cache: compression cannot change
a first answer of one token. The answer goes to stdout as it is written, and a report to stderr.
`generate` does the same from Python. (SparseMM: arXiv 2506.05344, ICCV 2025)

Letters: L layers, H query heads, G KV heads, R = H/G, T prompt tokens, D head size.
"""

import argparse
import io
import json
import math
import os
import re
import sys
import time
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from cache import (METHODS, NEEDS_HEAD_SCORES, KVCache, Method, check_settings, decode_attention,
                   make_plan, read_head_scores, reading)
from model_llava import DTYPES, load, note, open_image, prefill_attention, prepare

SCORES_FILE = "visual_head_scores.json"
DEFAULT_MODEL = Path(__file__).resolve().parent / "tiny" / "qwen2-vl"


# ---- generation ----------------------------------------------------------------------------------

def generate(model, images, prompt, method=Method("full"), max_new_tokens=256, stream=None):
    """The answer to a question about images, decoded greedily from a compressed cache.

    model: from model_llava.load; images: PIL images in RGB; prompt: the question; method: a
    cache.Method; stream: called with each piece of the answer as it is decoded. Raises ValueError
    for bad arguments. Returns a dict:

        text, token_ids, new_tokens     the answer; token_ids with the end token, if it came
        prompt_tokens, image_tokens     T, and how many of them are of images
        method, budget, kept            kept: L lists of G numbers, entries held after prefill
        cache_bytes, full_cache_bytes   2 * D * itemsize per entry: those kept, all L * G * T
        allocated_bytes                 of the tensors that hold the entries when the answer ends
        prefill_seconds                 vision, prefill and compression, up to the first token
        decode_seconds                  all further tokens
    """
    return Conversation(model, images, method, max_new_tokens).ask(prompt, stream)


def greedy_decode(step, logits, position, end_tokens, max_new_tokens, show=lambda tokens: None):
    """The tokens of an answer: each is the one with the largest logit.

    logits: (vocabulary,) that choose the first token, at `position`; step(token, position) -> the
    logits after a token; show: called with all tokens so far."""
    tokens = []
    while True:
        tokens.append(greedy_token(logits))
        show(tokens)
        if tokens[-1] in end_tokens or len(tokens) == max_new_tokens:
            return tokens
        logits = step(tokens[-1], position + len(tokens) - 1)


def greedy_token(logits):
    """The token with the largest logit, of (vocabulary,). Raises ValueError if it is not finite."""
    largest, token = logits.max(-1)
    if not math.isfinite(largest):
        raise ValueError(f"logits are not finite in {logits.dtype}; use another --dtype or model")
    return token.item()


def new_cache(model, T, method, max_new_tokens):
    """An empty cache for a prompt of T tokens, of which it will keep what `method` selects."""
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens}: must be at least 1")
    model.check_length(T, max_new_tokens)
    return KVCache(make_plan(method, model.config.layers, model.config.kv_heads, T))


def prefill(model, inputs, cache):
    """Runs the whole prompt. Each layer attends, then compresses. Returns the logits (vocabulary,)
    of the first token."""
    with tqdm(total=model.config.layers, desc="prefill", delay=2, leave=False, disable=None) as bar:
        def attend(layer, q, k, v):                        # (H, T, D), (G, T, D), (G, T, D)
            out = prefill_attention(q, k, v)
            cache.compress(layer, q, k, v)
            bar.update()
            return out
        return model.logits(model.hidden_states(inputs, attend)[-1])


def decode(model, cache, token, position):
    """The logits (vocabulary,) after one more token, which stands at `position`: every head appends
    its entry, and attends to what it holds."""
    def attend(layer, q, k, v):                            # (H, 1, D), (G, 1, D), (G, 1, D)
        cache.append(layer, k, v)
        return decode_attention(q, cache[layer])
    cache.reserve()
    return model.decode(token, position, attend)


def decoding_step(model, cache):
    """step(token, position) -> logits (vocabulary,): `decode`, or on CUDA its fast twin."""
    on_cuda = model.device.type == "cuda"
    return GraphDecode(model, cache) if on_cuda else partial(decode, model, cache)


class Conversation:
    """Questions about the same images. The first question's prompt is prefilled and compressed. A
    later question is appended to what was kept: nothing is computed twice, the cache grows beyond
    the budget, and entries that only the later question needs may be gone. With fresh=True all that
    was said is prefilled and compressed anew for each question. Other arguments: see generate."""

    def __init__(self, model, images, method=Method("full"), max_new_tokens=256, fresh=False):
        self.model, self.images, self.method, self.fresh = model, images, method, fresh
        self.max_new_tokens = max_new_tokens
        self.turns = []                       # the first question, its answer, the second, ...
        self.inputs = self.cache = None       # all that was read or written so far, as a Prompt
        self.unread = []                      # tokens written, but not yet in inputs and cache

    @torch.inference_mode()
    def ask(self, question, stream=None):
        """The answer to the next question, as generate returns it."""
        model, c = self.model, self.model.config
        new = self.read(question)
        T, start = len(self.inputs.ids), clock(model)
        if self.cache is None or self.fresh:
            self.cache = new_cache(model, T, self.method, self.max_new_tokens)
            logits = prefill(model, self.inputs, self.cache)
            step = decoding_step(model, self.cache)
        else:
            model.check_length(T, self.max_new_tokens)
            step = decoding_step(model, self.cache)
            with one_thread_if_small(model):
                for position, token in enumerate(new, self.inputs.next_position - len(new)):
                    logits = step(token, position)
        kept, cache_bytes, prefilled = self.cache.held(), self.cache.held_bytes(), clock(model)
        text_of = partial(model.processor.tokenizer.decode, skip_special_tokens=True)
        show = streamed(text_of, stream) if stream else lambda tokens, last=False: None
        with one_thread_if_small(model):
            tokens = greedy_decode(step, logits, self.inputs.next_position,
                                   model.processor.end_tokens, self.max_new_tokens, show)
        end, text = clock(model), text_of(tokens)
        show(tokens, last=True)
        self.turns.append(text.strip())
        result = dict(
            text=text, token_ids=tokens, new_tokens=len(tokens), prompt_tokens=T,
            image_tokens=self.inputs.image_tokens, method=self.method.name,
            budget=self.method.budget, kept=kept, cache_bytes=cache_bytes,
            full_cache_bytes=2 * c.head_dim * model.dtype.itemsize * c.layers * c.kv_heads * T,
            allocated_bytes=self.cache.allocated_bytes(), prefill_seconds=prefilled - start,
            decode_seconds=end - prefilled)
        self.inputs = self.inputs.extended(tokens[:-1])
        self.unread = [t for t in tokens[-1:] if t not in model.processor.end_tokens]
        return result

    def read(self, question):
        """Takes a question into inputs. Returns the tokens that are new to the cache."""
        self.model.processor.token_ids(len(self.images), question)           # may be refused
        self.turns.append(question)
        if self.inputs is None:
            self.inputs = prepare(self.model, self.images, question)
            return self.inputs.ids.tolist()
        new = self.unread + self.model.processor.next_turn_ids(len(self.images), self.turns)
        self.inputs = self.inputs.extended(new)
        return new


def streamed(text_of, stream):
    """show(tokens), which passes on the new text of a growing list of tokens. It holds back a
    character until all of its bytes are there."""
    shown = 0

    def show(tokens, last=False):
        nonlocal shown
        text = text_of(tokens)
        if last or not text.endswith("\ufffd"):
            stream(text[shown:])
            shown = len(text)
    return show


def clock(model):
    """Seconds, once the device has done all that was asked of it."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def one_thread_if_small(model):
    """Uses one CPU thread for decoders under 64 MB, which fit into the CPU's caches: there, further
    threads gain nothing, and wait for each other if another program keeps a core busy."""
    threads, weights = torch.get_num_threads(), model.decoder.parameters()
    small = model.device.type == "cpu" and sum(w.nbytes for w in weights) < 2**26
    torch.set_num_threads(1 if small else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---- the command, and what other scripts share with it ------------------------------------------

class OneLineParser(argparse.ArgumentParser):
    """Prints whatever ends a command early as one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(str(message).split())[:500]}\n")

    def run(self, work, argv=None):
        """work(the parsed arguments). Bad input, files that cannot be read or written and too
        little memory end with exit status 2, Ctrl-C with 130, a closed pipe with 141."""
        warnings.filterwarnings("ignore")                  # of libraries, about what they do inside
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):       # escape what the terminal cannot print
                stream.reconfigure(errors="backslashreplace")
        try:
            try:
                work(self.parse_args(argv))
            finally:
                print(end="", flush=True)
        except KeyboardInterrupt as stop:
            self.exit(130, f"{self.prog}: {stop.args[0] if stop.args else 'stopped'}\n")
        except OSError as error:
            sys.stdout = None           # closed, or the disk is full: print nothing more to it
            self.exit(141) if isinstance(error, BrokenPipeError) else self.error(error)
        except Exception as error:
            short = "too little memory for this model, picture and --dtype"
            self.error(short if out_of_memory(error) else str(error) or type(error).__name__)


def out_of_memory(error):
    """Whether an error says that memory is short, on a CPU or on CUDA."""
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or "DefaultCPUAllocator" in str(error))


def add_model_arguments(parser):
    """--model, --device, --dtype and --seed, the same for every script."""
    add = parser.add_argument
    add("--model", default=str(DEFAULT_MODEL), help="folder or hub id (default: tiny/qwen2-vl)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: float32 on a CPU")
    add("--seed", type=int, default=0)


def write_file(path, content):
    """Writes text or bytes: all of it or nothing, to a file beside it that is then renamed."""
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(content, path):
    write_file(path, json.dumps(content) + "\n")


def check_output(path, option, *endings, inputs=()):
    """Raises ValueError unless a file with one of these endings can be written at path, and path is
    none of the input files. To be called before a long run."""
    path = Path(os.path.realpath(path))
    if (endings and path.suffix.lower() not in endings or path.exists() and not path.is_file()
            or path in [Path(other).resolve() for other in inputs if other]
            or not os.access(path if path.exists() else path.parent, os.W_OK)):
        raise ValueError(f"{option} {path}: must be a {'/'.join(endings)} file in a folder that "
                         "can be written, and not an input")


def about_file(path):
    """The sidecar of a score file, s.json -> s.about.json: how the scores were made."""
    return Path(path).with_name(Path(path).name.removesuffix(".json") + ".about.json")


def find_head_scores(model, path=None):
    """The visual scores (L, H): from the file at path, or if None from the model's folder. None if
    the folder has no such file. Notes if they were made for another model."""
    file = model.folder / SCORES_FILE if path is None else Path(path)
    if path is None and not file.exists():
        return None
    scores = read_head_scores(file, model.config.layers, model.config.heads)
    if (about := about_file(file)).exists():
        with reading(about):
            made_for = json.loads(about.read_text(encoding="utf-8"))["model"]
            if Path(made_for).name != Path(model.name).name:
                note(f"--scores {file}: was made for {made_for}, not for {model.name}")
    return scores


def report(result, model):
    """What happened, in a few lines."""
    kept, T = sum(map(sum, result["kept"])), result["prompt_tokens"]
    heads = len(result["kept"]) * len(result["kept"][0])
    evicted = f"{1 - kept / (heads * T):.0%} evicted" if kept < heads * T else "nothing evicted"
    budget = f", budget {result['budget']} x {heads} KV heads = {result['budget'] * heads:,}"
    return (f"prompt  {T} tokens, {result['image_tokens']} of them image\n"
            f"cache   {result['method']}{budget * (result['method'] != 'full')}: kept {kept:,} of "
            f"{heads * T:,} entries, {evicted}\n"
            f"memory  {result['cache_bytes'] / 1e6:,.2f} MB of cache instead of "
            f"{result['full_cache_bytes'] / 1e6:,.2f} MB, "
            f"{result['allocated_bytes'] / 1e6:,.2f} MB allocated\n"
            f"time    load {model.load_seconds:.2f} s, prefill {result['prefill_seconds']:.2f} s, "
            f"{per_token(result)} ms per token, {result['new_tokens']} tokens "
            f"({model.device}, {model.dtype})")


def per_token(result):
    """Milliseconds per token after the first, as text; "-" if there was only one."""
    steps = result["new_tokens"] - 1
    return f"{1000 * result['decode_seconds'] / steps:.1f}" if steps else "-"


def comparison_table(results, skipped):
    """One line for each method."""
    lines = [f"{'method':<10} {'kept entries':>13} {'cache bytes':>14} {'ms/token':>9}  answer"]
    lines += [f"{r['method']:<10} {sum(map(sum, r['kept'])):>13,} {r['cache_bytes']:>14,} "
              f"{per_token(r):>9}  {' / '.join(r['text'].splitlines())}" for r in results]
    lines += [f"{name:<10} skipped: it needs visual head scores" for name in skipped]
    return "\n".join(lines)


def note_unknown_tasks(model, prompts):
    """Notes what a small model was not taught. Its prompts.json says what it was."""
    path = model.folder / "prompts.json"
    if path.exists():
        taught = json.loads(path.read_text(encoding="utf-8"))
        for text in prompts:
            if not any(re.fullmatch(p, text.strip(), re.DOTALL) for p in taught["known"]):
                note(f"--prompt {text!r}: this small model knows {taught['said']}, nothing else")


def answer(args):
    """What the command does."""
    names, results = METHODS if args.compare else [args.method], []
    if names != ["full"]:
        check_settings(args.budget, args.window, args.rho)                    # before long work
    images = [open_image(path) for path in args.image]
    model = load(args.model, args.device, args.dtype)
    for text in args.prompt:
        model.processor.token_ids(len(images), text)
    scores = find_head_scores(model, args.scores) if {*names} & {*NEEDS_HEAD_SCORES} else None
    skipped = [name for name in names if name in NEEDS_HEAD_SCORES and scores is None]
    if skipped and not args.compare:
        raise ValueError(f"--scores: must name a file, since {model.folder / SCORES_FILE} does not "
                         f"exist; python score_heads.py --model {args.model} makes it")
    show = None if args.json or args.compare else partial(print, end="", flush=True)
    for name in [name for name in names if name not in skipped]:
        method = Method(name, args.budget, args.window, args.rho, not args.no_redistribute, scores,
                        args.seed)
        talk = Conversation(model, images, method, args.max_new_tokens, args.fresh)
        for question in args.prompt:
            results.append(talk.ask(question, show))
            if show:
                print(flush=True)
            if not args.compare:
                print(report(results[-1], model), file=sys.stderr)
    if args.json:
        one = len(results) == 1 and not args.compare
        print(json.dumps(results[0] if one else {"runs": results}))
    elif args.compare:
        print(comparison_table(results, skipped))
    if not images:
        note("--image: none was given; the answer is made without a picture")
    note_unknown_tasks(model, args.prompt)


def main(argv=None):
    parser = OneLineParser("sparsemm.py", description="Ask about an image, with SparseMM's cache.")
    add = parser.add_argument
    add("--image", nargs="+", action="extend", default=[], metavar="PATH", help="in order")
    add("--prompt", required=True, action="append", metavar="TEXT",
        help="the question; given again, further ones about the same images")
    add("--fresh", action="store_true", help="prefill and compress anew for every question")
    add("--method", choices=METHODS, default="sparsemm", metavar="NAME", help=", ".join(METHODS))
    add("--budget", type=int, default=256, metavar="N", help="entries per KV head on average (256)")
    add("--window", type=int, default=32, metavar="N", help="last positions, which all keep (32)")
    add("--rho", type=float, default=0.1, help="share of the rest that all heads get alike (0.1)")
    add("--no-redistribute", action="store_true", help="lose what exceeds the prompt's length")
    add("--scores", metavar="FILE", help=f"head scores (default: the model's {SCORES_FILE})")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="(256)")
    add("--compare", action="store_true", help="run every method; print a table")
    add("--json", action="store_true", help="print one JSON object, nothing else")
    add_model_arguments(parser)
    parser.run(answer, argv)


# ---- for CUDA: the same in few kernels, from a graph; not needed to understand the method --------

class PackedAttention:
    """The fast twin of KVCache.append and decode_attention, equal up to rounding, in shapes that
    stay the same from step to step. It reads a layer's tensors whole. What a query must not see,
    other heads' entries and free room, gets a logit of -inf, hence a weight of exactly 0. If all
    heads hold equally many entries, one batched product serves them. If not, every query meets
    every entry of the layer: G times the multiplications, of which a GPU has plenty, but each key
    and value is read once, and no long head keeps the others waiting."""

    def __init__(self, cache):
        """cache: a KVCache after `reserve`. Make a new PackedAttention when `reserve` has moved its
        tensors."""
        self.cache, self.masks, self.shifts = cache, [], []
        for layer, kept in enumerate(cache.kept):
            start, shift, n = torch.tensor(cache.starts(layer)), 0, len(cache.keys[layer])
            if len(set(kept)) == 1:                             # all alike: one head's rows, from 0
                start, shift, n = 0 * start, start, kept[0] + cache.room
            end, row = start + torch.tensor(kept) + cache.appended, torch.arange(n)
            mine = (row >= start[:, None]) & (row < end[:, None])
            self.masks.append(torch.where(mine, 0.0, -math.inf).to(cache.newest.device))  # (G, n)
            self.shifts.append(torch.as_tensor(shift, device=cache.newest.device))

    def append_and_attend(self, layer, q, k, v):        # (H, 1, D), (G, 1, D) twice -> (H, 1, D)
        (H, _, D), mask, (G, n) = q.shape, self.masks[layer], self.masks[layer].shape
        self.cache.append(layer, k, v)
        mask.scatter_(1, (self.cache.newest[layer] - self.shifts[layer])[:, None], 0.0)
        keys, values = (x[layer].view(-1, n, D) for x in (self.cache.keys, self.cache.values))
        q, keys = q.view(len(keys), -1, D), keys.mT                   # len: G if all alike, else 1
        logits = (torch.bmm(q, keys, out_dtype=torch.float32) if q.is_cuda      # CUDA's alone
                  else q.float() @ keys.float()).view(G, -1, n)
        p = torch.add(mask[:, None], logits, alpha=1 / math.sqrt(D)).softmax(-1)        # (G, R, n)
        return (p.to(v.dtype).view(len(values), -1, n) @ values).view(H, 1, D)


class GraphDecode:
    """A decoding step is hundreds of short kernels, whose launches would take longer than their
    work. So they are captured as a CUDA graph, which is replayed until the cache moves."""

    def __init__(self, model, cache):
        self.model, self.cache, self.graph = model, cache, None
        self.token, self.position = torch.zeros(2, 1, dtype=torch.long, device=model.device)

    def __call__(self, token, position):
        self.token.fill_(token), self.position.fill_(position)
        if self.cache.reserve() or self.graph is None:
            self.capture()
        self.graph.replay()
        return self.logits

    def capture(self):
        """Runs one step before the capture, since first calls allocate memory; the replay writes
        the same entries again."""
        self.graph, self.packed = torch.cuda.CUDAGraph(), PackedAttention(self.cache)
        attend = self.packed.append_and_attend
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.model.decode(self.token, self.position, attend)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph):
            self.logits = self.model.decode(self.token, self.position, attend)


if __name__ == "__main__":
    main()
