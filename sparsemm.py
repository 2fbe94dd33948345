"""Ask a question about an image, with a KV cache that is small where the model does not look.

    python sparsemm.py --image tiny/receipt.png --prompt "What is the Total?"

Prefill runs over the whole prompt. As soon as a layer's attention is done, each of its heads keeps
only the entries that its budget allows (cache.py). Decoding then reads and extends what is left:

    images, prompt --> prefill --> token --> token --> ... --> end
                       layer by    each appends one entry to every head,
                       layer:      and attends to what that head holds
                       attend,
                       compress

So the first token always comes from the full cache, whatever the method: an answer of one token
cannot change. The answer goes to stdout as it is written, and what happened to stderr. `generate`
does the same from Python. The method: Wang et al., "Head Sparsity Emerges from Visual Concept
Responses in MLLMs", ICCV 2025, arXiv 2506.05344.

Letters: L layers, H query heads, G KV heads, T prompt tokens, D head size.
"""

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

from cache import (METHODS, NEEDS_HEAD_SCORES, KVCache, OneLineParser, PackedAttention,
                   decode_attention, make_method, note, read_head_scores, read_json, require)
from model_llava import DTYPES, load, open_image, prefill_attention, prepare

SCORES_FILE = "visual_head_scores.json"
DEFAULT_MODEL = Path(__file__).resolve().parent / "tiny" / "qwen2-vl"


# ---- generation ----------------------------------------------------------------------------------

@torch.inference_mode()
def generate(model, images, prompt, method="sparsemm", budget=256, window=32, rho=0.1,
             redistribute=True, head_scores=None, seed=0, max_new_tokens=256, stream=None):
    """Answers a question about images by greedy decoding with a compressed cache.

    model: from model_llava.load; images: PIL images in RGB; prompt: the question; method: one of
    cache.METHODS; budget: entries per KV head on average; window, rho, redistribute: see
    cache.allocate_budgets; head_scores: (L, H), for sparsemm and shuffled; seed: for random and
    shuffled; stream: called with each piece of the answer as it is decoded. Raises ValueError for
    bad arguments. Returns a dict:

        text, token_ids, new_tokens     the answer; token_ids with the end token, if it came
        prompt_tokens, image_tokens     T, and how many of them are of images
        method, budget, kept            kept: L lists of G numbers, entries held after prefill
        cache_bytes, full_cache_bytes   2 * D * itemsize for each of them, and for L * G * T
        allocated_bytes                 of the tensors that hold the entries when the answer ends
        prefill_seconds                 vision, prefill and compression, up to the first token
        decode_seconds                  all further tokens
    """
    inputs = prepare(model, images, prompt)
    cache = new_cache(model, len(inputs.ids), max_new_tokens, method, budget, window, rho,
                      redistribute, head_scores, seed)
    start = clock(model)
    logits = prefill(model, inputs, cache)
    return dict(write(model, inputs, cache, logits, start, max_new_tokens, stream),
                method=method, budget=budget)


def new_cache(model, T, max_new_tokens, method, budget, window, *settings):
    """An empty cache for a prompt of T tokens; the other arguments are generate's."""
    require(max_new_tokens >= 1, f"max_new_tokens must be at least 1, not {max_new_tokens}")
    model.check_length(T, max_new_tokens)
    c = model.config
    return KVCache(make_method(method, c.layers, c.kv_heads, T, budget, window, *settings), window)


def prefill(model, inputs, cache):
    """The whole prompt, layer by layer: attend, compress. Returns the logits (vocabulary,) of the
    first token."""
    def attend(layer, q, k, v):                            # (H, T, D), (G, T, D), (G, T, D)
        out = prefill_attention(q, k, v)
        cache.compress(layer, q, k, v)
        return out
    return model.logits(model.hidden_states(inputs, attend)[-1])


def decode(model, cache, token, position):
    """One decoding step: appends the entries of `token`, which stands at `position`, to every head,
    and attends to what each holds. Returns the logits (vocabulary,) of the next token."""
    def attend(layer, q, k, v):                            # (H, 1, D), (G, 1, D), (G, 1, D)
        cache.append(layer, k, v)
        return decode_attention(q, cache[layer])
    cache.extend()
    return model.decode(token, position, attend)


def write(model, inputs, cache, logits, start, max_new_tokens, stream=None):
    """Decodes the answer to `inputs`, whose logits are those of its first token; start: when the
    prefill began. Returns generate's dict, but for method and budget."""
    c, T, tokens = model.config, len(inputs.ids), [greedy_token(model, logits, 0)]
    prefilled = clock(model)
    kept, cache_bytes = cache.held(), cache.held_bytes()
    text = Streamer(model.processor.tokenizer, stream)
    step = decoding_step(model, cache)
    text.show(tokens)
    with one_thread_if_small(model):
        while tokens[-1] not in model.processor.end_tokens and len(tokens) < max_new_tokens:
            logits = step(tokens[-1], inputs.next_position + len(tokens) - 1)
            tokens.append(greedy_token(model, logits, len(tokens)))
            text.show(tokens)
    end = clock(model)
    entry_bytes = 2 * c.head_dim * model.dtype.itemsize
    return dict(text=text.show(tokens, last=True), token_ids=tokens, new_tokens=len(tokens),
                prompt_tokens=T, image_tokens=inputs.image_tokens, kept=kept,
                cache_bytes=cache_bytes, full_cache_bytes=entry_bytes * c.layers * c.kv_heads * T,
                allocated_bytes=cache.allocated_bytes(), prefill_seconds=prefilled - start,
                decode_seconds=end - prefilled)


@contextmanager
def one_thread_if_small(model):
    """On a CPU, decoding with weights that its caches hold (64 MB) is no faster on several threads,
    and where another program keeps a core busy they wait for each other in every product."""
    threads, weights = torch.get_num_threads(), model.decoder.parameters()
    small = model.device.type == "cpu" and sum(w.nbytes for w in weights) < 2**26
    torch.set_num_threads(1 if small else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def greedy_token(model, logits, number):
    """The token with the largest of the logits (vocabulary,). Raises ValueError if they are not
    finite; number: of the answer's token, for the message."""
    largest, token = logits.max(-1)
    require(math.isfinite(largest),
            f"the logits of the answer's token {number} are not finite in {model.dtype}; another "
            "--dtype, or weights that are finite, are right")
    return token.item()


def clock(model):
    """Seconds, once the device has done all that was asked of it."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Streamer:
    """Passes on the text of a growing list of tokens, piece by piece. A character whose bytes are
    not all there yet waits."""

    def __init__(self, tokenizer, write):
        self.tokenizer, self.write, self.shown = tokenizer, write, 0

    def show(self, tokens, last=False):
        """The text of all tokens so far; nothing if nobody reads it yet."""
        if not (self.write or last):
            return ""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        if self.write and (last or not text.endswith("\ufffd")):
            self.write(text[self.shown:])
            self.shown = len(text)
        return text


# ---- several questions ---------------------------------------------------------------------------

class Conversation:
    """Questions about the same images. The first one's prompt is prefilled and compressed. Each
    later question is appended to what was kept, so that nothing is computed twice; but what to keep
    was chosen by where the first question's window looked. With fresh=True all that was said so far
    is prefilled and compressed anew for each question. The other arguments are generate's."""

    def __init__(self, model, images, method="sparsemm", budget=256, window=32, rho=0.1,
                 redistribute=True, head_scores=None, seed=0, max_new_tokens=256, fresh=False):
        self.model, self.images, self.fresh = model, images, fresh
        self.settings = method, budget, window, rho, redistribute, head_scores, seed
        self.max_new_tokens = max_new_tokens
        self.turns = []                       # the first question, its answer, the second, ...
        self.inputs = self.cache = None       # all that was read or written so far, as a Prompt
        self.unread = []                      # tokens written, but not yet in inputs and cache

    @torch.inference_mode()
    def ask(self, question, stream=None):
        """generate for the next question."""
        model, new = self.model, self.read(question)
        T, start = len(self.inputs.ids), clock(self.model)
        if self.cache is None or self.fresh:
            self.cache = new_cache(model, T, self.max_new_tokens, *self.settings)
            logits = prefill(model, self.inputs, self.cache)
        else:
            model.check_length(T, self.max_new_tokens)
            step = decoding_step(model, self.cache)
            for position, token in enumerate(new, self.inputs.next_position - len(new)):
                logits = step(token, position)
        result = write(model, self.inputs, self.cache, logits, start, self.max_new_tokens, stream)
        tokens = result["token_ids"]
        self.turns.append(result["text"].strip())
        self.inputs = self.inputs.extended(tokens[:-1])
        self.unread = [t for t in tokens[-1:] if t not in model.processor.end_tokens]
        return dict(result, method=self.settings[0], budget=self.settings[1])

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


# ---- for CUDA: the same steps from a graph, which nobody needs to understand the method ----------

def decoding_step(model, cache):
    """step(token, position) -> logits (vocabulary,): `decode`, or on CUDA its fast twin."""
    if model.device.type == "cuda":
        return GraphDecode(model, cache)
    return partial(decode, model, cache)


class GraphDecode:
    """A decoding step is hundreds of short kernels, whose launches would take longer than their
    work. So they are captured as a CUDA graph, which is replayed until the cache moves."""

    def __init__(self, model, cache):
        self.model, self.cache, self.graph = model, cache, None
        self.token, self.position = (torch.zeros(1, dtype=torch.long, device=model.device)
                                     for _ in "tp")

    def __call__(self, token, position):
        self.token.fill_(token), self.position.fill_(position)
        if self.cache.extend() or self.graph is None:
            self.capture()
        else:
            self.packed.extend()
        self.graph.replay()
        return self.logits

    def capture(self):
        """Runs one step outside the graph first, since first calls allocate memory; it writes the
        same entries as the replay."""
        self.packed, self.graph = PackedAttention(self.cache), torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.model.decode(self.token, self.position, self.packed.attend)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph):
            self.logits = self.model.decode(self.token, self.position, self.packed.attend)


# ---- what the user gives, here and in the other scripts ------------------------------------------

def add_model_arguments(parser):
    """--model, --device, --dtype and --seed, the same for every script."""
    parser.add_argument("--model", default=str(DEFAULT_MODEL), metavar="DIR_OR_HUB_ID",
                        help="a checkpoint's folder or hub id (default: the small model in tiny/)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto",
                        help="auto: float32 on a CPU, the checkpoint's own on CUDA")
    parser.add_argument("--seed", type=int, default=0)


def write_file(path, content, option=""):
    """All of it or nothing: to a file beside it, which is then renamed. Links are followed.
    content: text or bytes; None: only tries. Raises ValueError where no file can be written."""
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        if os.path.lexists(target) and not (target.is_file() and os.access(target, os.W_OK)):
            raise OSError(0, "not a file that may be written")
        try:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content or b"")
            if content is not None:
                os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{option} {path}: cannot be written ({error.strerror}); a file in a "
                         "folder that exists is right".strip()) from None


def write_json(content, path):
    """write_file of one line."""
    write_file(path, json.dumps(content) + "\n")


def check_output(path, option, *endings, inputs=()):
    """Raises ValueError unless a file can be written at path, so that no long run ends in vain, and
    if it is one of `inputs`, paths of what is read or written otherwise."""
    require(not endings or Path(path).suffix.lower() in endings,
            f"{option} {path}: must end in {' or '.join(endings)}")
    require(os.path.realpath(path) not in [os.path.realpath(other) for other in inputs if other],
            f"{option} {path}: is named twice; a file of its own is right")
    write_file(path, None, option)


def find_head_scores(model, path):
    """The visual scores (L, H): from the file at path, or if None from the model's folder. None if
    that has no such file. The file beside them says which model's they are."""
    file = model.folder / SCORES_FILE if path is None else Path(path)
    if path is None and not file.exists():
        return None
    scores = read_head_scores(file, model.config.layers, model.config.heads)
    about = file.with_suffix(".about.json")
    match read_json(about, "scores") if about.exists() else None:
        case {"model": str(other)} if Path(other).name != Path(model.name).name:
            note(f"--scores {file}: was made for {other}, not for {model.name}")
    return scores


# ---- the command ---------------------------------------------------------------------------------

def argument_parser():
    parser = OneLineParser(
        prog="sparsemm.py", description="Ask a question about an image, with SparseMM's KV cache.")
    add = parser.add_argument
    add("--image", nargs="+", default=[], metavar="PATH", help="images, in order")
    add("--prompt", required=True, action="append", metavar="TEXT",
        help="the question; given again, further ones about the same images")
    add("--fresh", action="store_true", help="prefill and compress anew for every question")
    add("--method", choices=METHODS, default="sparsemm", metavar="NAME",
        help="which entries to keep: %(choices)s")
    add("--budget", type=int, default=256, metavar="N",
        help="cache entries per KV head, on average (default 256)")
    add("--window", type=int, default=32, metavar="N",
        help="last positions of the prompt that every head keeps (default 32)")
    add("--rho", type=float, default=0.1, help="share of the rest that all heads get (default 0.1)")
    add("--no-redistribute", action="store_true",
        help="lose what exceeds the prompt's length, as the authors' code does")
    add("--scores", metavar="FILE",
        help=f"visual head scores (default: {SCORES_FILE} in the model's folder)")
    add("--max-new-tokens", type=int, default=256, metavar="N")
    add("--compare", action="store_true", help="run every method; print a table")
    add("--json", action="store_true", help="print one JSON object, nothing else")
    add("--show-heads", metavar="FILE", help="draw where the best and the worst heads look: a PNG "
        "of one token of the answer, or a GIF of all")
    add("--show-token", type=int, metavar="N",
        help="which token of the answer the PNG shows (default 0)")
    add_model_arguments(parser)
    return parser


def check_arguments(args):
    """What no function called later would refuse, or only after work was done."""
    show, many = args.show_heads, len(args.prompt) > 1
    if show is not None:
        check_output(show, "--show-heads", ".png", ".gif", inputs=args.image)
        require(len(args.image) == 1, f"--show-heads: needs one --image, not {len(args.image)}")
    for text in args.prompt:
        require(text.strip(), f"--prompt: {text!r} is empty; a question is right")
    require(not many or not (args.compare or show), f"--prompt: {len(args.prompt)} questions; "
            "--compare and --show-heads take one")
    for option, given, works, needs in (
            ("--show-token", args.show_token is not None, show and show.lower().endswith(".png"),
             "--show-heads with a PNG"),
            ("--fresh", args.fresh, many, "several --prompt"),
            ("--scores", args.scores is not None, needs_scores(args) or args.compare,
             f"--method {' or '.join(NEEDS_HEAD_SCORES)}")):
        require(works or not given, f"{option}: has no effect without {needs}")


def needs_scores(args):
    """Whether there is no answer, or no picture, without head scores."""
    return args.show_heads is not None or (args.method in NEEDS_HEAD_SCORES and not args.compare)


def report(result, model):
    """What happened, in a few lines."""
    kept, T = sum(map(sum, result["kept"])), result["prompt_tokens"]
    heads = len(result["kept"]) * len(result["kept"][0])
    evicted = f"{1 - kept / (heads * T):.0%} evicted" if kept < heads * T else "nothing evicted"
    return (f"prompt  {T} tokens, {result['image_tokens']} of them image\n"
            f"cache   {result['method']}, budget {result['budget']} x {heads} KV heads = "
            f"{result['budget'] * heads:,}: kept {kept:,} of {heads * T:,} entries, {evicted}\n"
            f"memory  {result['cache_bytes'] / 1e6:,.2f} MB of cache instead of "
            f"{result['full_cache_bytes'] / 1e6:,.2f} MB, "
            f"{result['allocated_bytes'] / 1e6:,.2f} MB allocated\n"
            f"time    prefill {result['prefill_seconds']:.2f} s, {per_token(result)} ms per token, "
            f"{result['new_tokens']} tokens ({model.device}, {model.dtype})")


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


def compare(args, begin, head_scores):
    """Every method's answer to the same question. Returns that of --method."""
    skipped = NEEDS_HEAD_SCORES if head_scores is None else ()
    results = [begin(method=name).ask(args.prompt[0]) for name in METHODS if name not in skipped]
    print(json.dumps({"runs": results}) if args.json else comparison_table(results, skipped))
    return next((result for result in results if result["method"] == args.method), None)


def converse(args, conversation):
    """The questions' answers, each with its report. Returns the last."""
    model, results = conversation.model, []
    for question in args.prompt[1:]:                    # to refuse it before the first is answered
        model.processor.token_ids(len(conversation.images), question)
    show = None if args.json else partial(print, end="", flush=True)
    for question in args.prompt:
        results.append(conversation.ask(question, show))
        if not args.json:
            print(flush=True)
        print(report(results[-1], model), file=sys.stderr)
    if args.json:
        print(json.dumps(results[0] if len(results) == 1 else {"runs": results}))
    return results[-1]


def note_unknown_tasks(model, prompts):
    """Small models say in prompts.json what they were taught: anything else is noted."""
    path = model.folder / "prompts.json"
    taught = read_json(path, "model") if path.exists() else {"known": [".*"]}
    for text in prompts:
        if not any(re.fullmatch(pattern, text.strip(), re.DOTALL) for pattern in taught["known"]):
            note(f"prompt {text!r}: this small model knows {taught['said']}, and nothing else")


def answer(args):
    """What the command does."""
    warnings.filterwarnings("ignore")                      # the user's input is not at fault there
    check_arguments(args)
    images = [open_image(path) for path in args.image]
    model = load(args.model, args.device, args.dtype)
    needed = needs_scores(args)
    scores = find_head_scores(model, args.scores) if needed or args.compare else None
    require(scores is not None or not needed,
            f"--scores: no {model.folder / SCORES_FILE}; python score_heads.py --model {args.model}"
            " makes it, and --method snapkv needs none")
    begin = partial(Conversation, model, images, budget=args.budget, window=args.window,
                    rho=args.rho, redistribute=not args.no_redistribute, head_scores=scores,
                    max_new_tokens=args.max_new_tokens, seed=args.seed, fresh=args.fresh)
    if args.compare:
        result = compare(args, begin, scores)
    else:
        result = converse(args, begin(method=args.method))
    if not images:
        note("--image: none was given; the answer is made without a picture")
    note_unknown_tasks(model, args.prompt)
    if args.show_heads:
        from experiments.draw import show_heads
        show_heads(model, images[0], args.prompt[0], scores, args.show_heads, args.show_token or 0,
                   token_ids=result["token_ids"])


def main(argv=None):
    argument_parser().run(answer, argv)


if __name__ == "__main__":
    main()
