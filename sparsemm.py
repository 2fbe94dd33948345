"""Ask a question about an image, with a KV cache that is small where the model does not look.

    python sparsemm.py --image tiny/receipt.png --prompt "What is the Total?"

Prefill runs over the whole prompt. As soon as a layer's attention is done, each of its heads keeps
only the entries that its budget allows (cache.py). Decoding then reads and extends what is left:

    images, prompt --> prefill --> token --> token --> ... --> end
                       layer by    each appends one entry to every head,
                       layer:      and attends to what that head holds
                       attend,
                       compress

The answer goes to stdout as it is written, and what happened to stderr. `generate` does the same
from Python. The method: Wang et al., "Head Sparsity Emerges from Visual Concept Responses in
MLLMs", ICCV 2025, arXiv 2506.05344.
"""

import json
import sys
import time
import warnings
from functools import partial

import torch

from cache import (METHODS, NEEDS_SCORES, KVCache, fastv_length, fastv_survivors, make_method,
                   read_head_scores)
from experiments.arguments import (OneLineParser, add_model_arguments, open_image, output_file,
                                   share, whole_number)
from model_llava import load, prepare

SCORES_FILE = "visual_head_scores.json"


# ---- generation ----------------------------------------------------------------------------------

def generate(model, images, prompt, method="sparsemm", budget=256, stream=None, **settings):
    """Answers one question about images: Conversation.ask for the first of them."""
    return Conversation(model, images, method, budget, **settings).ask(prompt, stream)


class Conversation:
    """Questions about the same images, answered by greedy decoding with a compressed cache.

    The first question's prompt is prefilled and compressed. Each later question is appended to what
    was kept, so that nothing is computed twice; but what to keep was chosen by where the first
    question's window looked. With fresh=True all that was said so far is prefilled and compressed
    anew for each question.

    model: from model_llava.load; images: PIL images in RGB; method: one of cache.METHODS; budget:
    entries per KV head on average; window, rho, redistribute: see cache.allocate_budgets; scores:
    visual scores (L, H), for sparsemm and shuffled; max_new_tokens: of each answer; seed: for
    random and shuffled; fastv: (K, share): only that share of the image tokens goes on after the
    first K layers, see cache.fastv_survivors. Raises ValueError for bad arguments.
    """

    def __init__(self, model, images, method="sparsemm", budget=256, window=32, rho=0.1,
                 redistribute=True, scores=None, max_new_tokens=256, seed=0, fresh=False,
                 fastv=None):
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        if fastv and not (0 < fastv[0] < model.config.layers and 0 <= fastv[1] <= 1):
            raise ValueError(f"fastv {fastv}: from 1 to {model.config.layers - 1} layers, and a "
                             "share between 0 and 1, are right")
        self.model, self.images, self.method, self.budget = model, images, method, budget
        self.window, self.fresh, self.fastv = window, fresh, fastv
        self.method_settings = budget, window, rho, redistribute, scores, seed
        self.max_new_tokens = max_new_tokens
        self.turns = []                       # the first question, its answer, the second, ...
        self.inputs = self.cache = None       # all that was read or written so far, as a Prompt
        self.unread = []                      # tokens written, but not yet in inputs and cache

    @torch.inference_mode()
    def ask(self, question, stream=None):
        """question: text; stream: called with each piece of the answer as it is decoded. Returns a
        dict:

            text, token_ids, new_tokens     the answer; token_ids with the end token, if it came
            prompt_tokens, image_tokens     T, and how many of them are of images
            method, budget, kept            kept: L lists of G numbers, entries held after prefill
            cache_bytes, full_cache_bytes   2 * D * itemsize for each of them, and for L * G * T
            prefill_seconds                 vision, prefill and compression, up to the first token
            decode_seconds                  all further tokens
        """
        model, c = self.model, self.model.config
        new = self.read(question)
        T = len(self.inputs.ids)
        model.check_length(T, self.max_new_tokens)
        start = clock(model)
        logits = self.prefill() if self.cache is None or self.fresh else self.append(new)
        tokens = [logits.argmax().item()]
        prefilled, kept, cache_bytes = clock(model), self.cache.kept, self.cache.num_bytes()
        text = Streamer(model.processor.tokenizer, stream)
        text.show(tokens)
        step = DecodingStep(model, self.cache, tokens[0], self.inputs.next_position)
        while tokens[-1] not in model.processor.end_tokens and len(tokens) < self.max_new_tokens:
            tokens.append(step.next_token())
            text.show(tokens)
        end = clock(model)

        answer = text.show(tokens, last=True)
        self.turns.append(answer.strip())
        self.inputs = self.inputs.extended(tokens[:-1])
        self.unread = [t for t in tokens[-1:] if t not in model.processor.end_tokens]
        entry_bytes = 2 * c.head_dim * model.decoder.embed_tokens.weight.element_size()
        return dict(
            text=answer, token_ids=tokens, prompt_tokens=T,
            image_tokens=self.inputs.image_tokens, method=self.method, budget=self.budget,
            kept=kept, cache_bytes=cache_bytes,
            full_cache_bytes=entry_bytes * c.layers * c.kv_heads * T,
            prefill_seconds=prefilled - start, decode_seconds=end - prefilled,
            new_tokens=len(tokens))

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

    def prefill(self):
        """All of inputs, into a new cache. Returns the logits (vocabulary,) of the first token."""
        c, T, drop = self.model.config, len(self.inputs.ids), None
        lengths = torch.full((c.layers,), T)
        if self.fastv:
            layers, share = self.fastv
            image = self.inputs.ids == c.image_token
            lengths[layers:] = fastv_length(image, share)
            drop = layers - 1, partial(fastv_survivors, image=image, keep=share)
        plan = make_method(self.method, c.layers, c.kv_heads, lengths, *self.method_settings)
        self.cache = KVCache(plan, self.window, reserve=self.max_new_tokens - 1)
        return self.model.logits(self.model.hidden_states(self.inputs, self.cache, drop)[-1])

    def append(self, new):
        """New tokens, one by one, onto what the cache holds. Returns the logits of the next."""
        self.cache.make_room(len(new) + self.max_new_tokens - 1)
        for position, token in enumerate(new, self.inputs.next_position - len(new)):
            logits = self.model.decode(token, position, self.cache)
        return logits


class DecodingStep:
    """Greedy decoding, one token a call. On CUDA, where a step is hundreds of short kernels and
    their launches would take longer than their work, the first call captures it as a CUDA graph,
    and the others replay that."""

    def __init__(self, model, cache, token, position):
        """token: the last one so far; position: where it stands."""
        self.model, self.cache, self.graph = model, cache, None
        device = model.decoder.embed_tokens.weight.device
        self.token, self.position = (torch.tensor([n], device=device) for n in (token, position))
        even = len({layer.tail_length for layer in cache.layers}) == 1
        self.captures = device.type == "cuda" and not cache.by_head and even

    def run(self):
        logits = self.model.decode(self.token, self.position, self.cache)
        self.token.copy_(logits.argmax(-1, keepdim=True))
        self.position += 1
        if self.cache.column is not None:
            self.cache.column += 1

    def capture(self):
        """Runs one step outside the graph, since first calls allocate memory, and undoes it."""
        self.cache.fix_shapes()
        state = self.token, self.position, self.cache.column
        before, length = [x.clone() for x in state], self.cache.tail_length
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.run()
        torch.cuda.current_stream().wait_stream(side)
        self.cache.tail_length = length
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.run()
        self.cache.tail_length = length
        for now, then in zip(state, before):
            now.copy_(then)

    def next_token(self):
        if self.captures and self.graph is None:
            self.capture()
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()
            self.cache.tail_length += 1
        return self.token.item()


def clock(model):
    """Seconds, once the device has done all that was asked of it."""
    if model.decoder.embed_tokens.weight.is_cuda:
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


# ---- reading what the user gave ------------------------------------------------------------------

def find_scores(model, path):
    """The visual scores (L, H): from the file at path, or if None from the model's folder. None if
    that has no such file."""
    if path is None and not (model.folder / SCORES_FILE).exists():
        return None
    return read_head_scores(path or model.folder / SCORES_FILE, model.config.layers,
                            model.config.heads)


def parse_arguments(argv):
    parser = OneLineParser(
        prog="sparsemm.py", description="Ask a question about an image, with SparseMM's KV cache.")
    parser.add_argument("--image", nargs="+", default=[], metavar="PATH", help="images, in order")
    parser.add_argument("--prompt", required=True, action="append", metavar="TEXT",
                        help="the question; given again, further ones about the same images")
    parser.add_argument("--fresh", action="store_true",
                        help="prefill and compress anew for every question")
    parser.add_argument("--method", choices=METHODS, default="sparsemm", metavar="NAME",
                        help="which entries to keep: %(choices)s")
    parser.add_argument("--budget", type=whole_number(1), default=256, metavar="N",
                        help="cache entries per KV head, on average (default 256)")
    parser.add_argument("--window", type=whole_number(1), default=32, metavar="N",
                        help="last positions of the prompt that every head keeps (default 32)")
    parser.add_argument("--rho", type=share, default=0.1,
                        help="share of the rest that all heads get alike (default 0.1)")
    parser.add_argument("--no-redistribute", action="store_true",
                        help="lose what exceeds the prompt's length, as the authors' code does")
    parser.add_argument("--scores", metavar="FILE",
                        help=f"visual head scores (default: {SCORES_FILE} in the model's folder)")
    parser.add_argument("--fastv-layer", type=whole_number(1), metavar="K",
                        help="drop image tokens from prefill after K layers, as FastV does")
    parser.add_argument("--fastv-keep", type=share, default=0.5, metavar="SHARE",
                        help="how many of them stay then (default 0.5)")
    parser.add_argument("--max-new-tokens", type=whole_number(1), default=256, metavar="N")
    parser.add_argument("--compare", action="store_true", help="run every method; print a table")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    parser.add_argument("--show-heads", type=output_file, metavar="FILE",
                        help="draw where the best and the worst heads look: a PNG of one token of "
                             "the answer, or a GIF of all")
    parser.add_argument("--show-token", type=whole_number(0), default=0, metavar="N",
                        help="which token of the answer the PNG shows (default 0)")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    if args.show_heads and args.show_heads.suffix.lower() not in (".png", ".gif"):
        parser.error(f"argument --show-heads: {args.show_heads} must end in .png or .gif")
    if args.show_heads and len(args.image) != 1:
        parser.error(f"argument --show-heads: needs one --image, not {len(args.image)}")
    if args.budget < args.window:
        parser.error(f"argument --budget: {args.budget} is below the window; at least "
                     f"{args.window} (--window) is right")
    if not all(text.strip() for text in args.prompt):
        parser.error(f"argument --prompt: {''!r} is empty; a question is right")
    if len(args.prompt) > 1 and (args.compare or args.show_heads):
        parser.error(f"argument --prompt: {len(args.prompt)} questions; --compare and --show-heads "
                     "take one")
    return parser, args


# ---- the command ---------------------------------------------------------------------------------

def report(result, model):
    """What happened, in a few lines."""
    kept, T = sum(map(sum, result["kept"])), result["prompt_tokens"]
    heads = len(result["kept"]) * len(result["kept"][0])
    evicted = f"{1 - kept / (heads * T):.0%} evicted" if kept < heads * T else "nothing evicted"
    weight = model.decoder.embed_tokens.weight
    return (f"prompt  {T} tokens, {result['image_tokens']} of them image\n"
            f"cache   {result['method']}, budget {result['budget']} x {heads} KV heads = "
            f"{result['budget'] * heads:,}: kept {kept:,} of {heads * T:,} entries, {evicted}\n"
            f"memory  {result['cache_bytes'] / 1e6:,.2f} MB of cache instead of "
            f"{result['full_cache_bytes'] / 1e6:,.2f} MB\n"
            f"time    prefill {result['prefill_seconds']:.2f} s, {per_token(result)} ms per token, "
            f"{result['new_tokens']} tokens ({weight.device}, {weight.dtype})")


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


def main(argv=None):
    parser, args = parse_arguments(argv)
    warnings.filterwarnings("ignore")                      # the user's input is not at fault there
    try:
        images = [open_image(path) for path in args.image]
        model = load(args.model, args.device, args.dtype)
        needs_scores = args.compare or args.method in NEEDS_SCORES or args.show_heads
        scores = find_scores(model, args.scores) if needs_scores else None
        if needs_scores and scores is None and (args.show_heads or not args.compare):
            raise ValueError(f"--scores: no {model.folder / SCORES_FILE}; python score_heads.py "
                             f"--model {args.model} makes it, and --method snapkv needs none")
        begin = partial(Conversation, model, images, budget=args.budget, window=args.window,
                        rho=args.rho, redistribute=not args.no_redistribute, scores=scores,
                        max_new_tokens=args.max_new_tokens, seed=args.seed, fresh=args.fresh,
                        fastv=args.fastv_layer and (args.fastv_layer, args.fastv_keep))
        if args.compare:
            skipped = NEEDS_SCORES if scores is None else ()
            results = [begin(method=name).ask(args.prompt[0]) for name in METHODS
                       if name not in skipped]
            print(json.dumps({"runs": results}) if args.json
                  else comparison_table(results, skipped))
        else:
            for question in args.prompt[1:]:            # to refuse it before the first is answered
                model.processor.token_ids(len(images), question)
            conversation, results = begin(method=args.method), []
            show = None if args.json else partial(print, end="", flush=True)
            for question in args.prompt:
                results.append(conversation.ask(question, show))
                if not args.json:
                    print(flush=True)
                print(report(results[-1], model), file=sys.stderr)
            if args.json:
                print(json.dumps(results[0] if len(results) == 1 else {"runs": results}))
        if args.show_heads:
            from experiments.draw import show_heads
            show_heads(model, images[0], args.prompt[0], scores, args.show_heads, args.show_token)
    except ValueError as error:
        parser.error(error)


if __name__ == "__main__":
    main()
