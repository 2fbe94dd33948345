"""One HTML file in which a reader sees what each head keeps, and where it looks.

    python experiments/explore.py --image tiny/receipt.png --prompt "What is the Rope?" \\
        --out explore.html

A slider moves the budget, a list picks the method. A map shows how many entries each KV head keeps;
of the head under the cursor the page shows which, and where it looks for each token of the answer.
The page of the sample, tiny/explore.html, is made by this command with that --out; its picture,
tiny/explore.png, is what a browser shows of it, scaled to a width of 800 pixels:

    chromium --headless --window-size=1000,960 --virtual-time-budget=8000 \\
        --screenshot=tiny/explore.png "file://$PWD/tiny/explore.html#method=sparsemm&budget=64"

    prompt --> one prefill --> every method and budget: the real cache (cache.KVCache)
                                   |                        |
                               kept positions     its answer, and the weights with which
                                   |              each step of decoding it attended
                                   '--> bits          '--> the strongest patches, one byte each

All of it is computed here; the page (explore_page.html) only draws. It needs no network, and opens
from a disk. Where it would get larger than 3 MB, weights go first, then budgets, and the page says
so.

Letters: L layers, H query heads, G KV heads, R = H/G, T prompt tokens, D head size, n tokens of the
answer, N patches of the page.
"""

import base64
import io
import json
import math
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cache import METHODS, NEEDS_HEAD_SCORES, OneLineParser, decode_attention, kv_head_scores
from experiments.arguments import as_typed
from experiments.compress import Setting, prefill
from model_llava import GRID, load, open_image, prepare
from score_heads import attention_logits
from sparsemm import (add_model_arguments, check_output, find_head_scores, greedy_token,
                      write_file)

BUDGETS = (48, 64, 96, 128, 256, 512)
TEXT = 3                                    # beside the kinds of image tokens: text of the prompt
LIMIT = 3_000_000                           # bytes of the file
FAINT = 8                                   # of 255: weights of less than 0.1 % are not drawn
DETAIL = ((48, 64), (48, 24), (24, 16), (12, 12), (6, 8), (3, 8), (0, 0))   # tokens with weights,
                                            # and on how many patches: the first that fits is taken
ABOUT = {"full": "evicts nothing",
         "sparsemm": "budgets by visual head score",
         "snapkv": "the same budget for every head",
         "pyramidkv": "budgets fall from layer to layer",
         "adakv": "budgets by this prompt's attention",
         "random": "budgets by random head scores",
         "shuffled": "visual head scores, in wrong places",
         "window": "the last positions",
         "streaming": "the first four and the last positions"}


# ---- what the model does -------------------------------------------------------------------------

@dataclass
class Looks:
    """Where all heads look, for some tokens of an answer: one item for each, weights largest
    first."""
    image: list = field(default_factory=list)           # (L, H) per cent on the image
    page: list = field(default_factory=list)            # (L, H) per cent on the page's patches
    patches: list = field(default_factory=list)         # (L, H, DETAIL[0][1]) which patches
    weights: list = field(default_factory=list)         # the same shape: 255 * sqrt(weight)

    def note(self, p, kinds):
        """One token's weights p (L, H, T); kinds: (T,)."""
        on_page = p[..., kinds == GRID]
        top = on_page.topk(min(DETAIL[0][1], on_page.shape[-1]))
        self.image.append(percent(p[..., kinds != TEXT].sum(-1)))
        self.page.append(percent(on_page.sum(-1)))
        self.patches.append(top.indices.numpy().astype("<u2"))
        self.weights.append((255 * top.values.sqrt()).round().byte().numpy())


def percent(share):
    return (100 * share.clamp(max=1)).round().byte().numpy()


def weights(q, k):
    """Of a single query: softmax(q k^T / sqrt(D)). q: (H, 1, D), k: (G, T, D). Returns (H, T)."""
    return (attention_logits(q, k) / math.sqrt(q.shape[-1])).softmax(-1)[:, 0].cpu()


@torch.inference_mode()
def write_answer(prefilled, cache, keep, kinds, limit):
    """What the model writes from a compressed cache, as sparsemm.write does, and where it looks.
    keep: (L, G, T) bool, the positions that the cache holds. Returns tokens, Looks (from the second
    token on)."""
    model, inputs, looks = prefilled.model, prefilled.inputs, Looks()
    R = model.config.heads // model.config.kv_heads

    def attend(layer, q, k, v):                            # (H, 1, D), (G, 1, D), (G, 1, D)
        cache.append(layer, k, v)
        heads = cache[layer]
        for g, (K, _) in enumerate(heads if noted else ()):
            held = weights(q[g * R:(g + 1) * R], K[None])                   # (R, kept + appended)
            p[layer, g * R:(g + 1) * R][:, keep[layer, g]] = held[:, :cache.kept[layer][g]]
        return decode_attention(q, heads)

    tokens = [greedy_token(model, prefilled.first, 0)]
    while tokens[-1] not in model.processor.end_tokens and len(tokens) < limit:
        noted = len(tokens) < DETAIL[0][0]
        p = torch.zeros(model.config.layers, model.config.heads, len(kinds))
        cache.extend()
        logits = model.decode(tokens[-1], inputs.next_position + len(tokens) - 1, attend)
        tokens.append(greedy_token(model, logits, len(tokens)))
        if noted and tokens[-1] not in model.processor.end_tokens:
            looks.note(p, kinds)
    return tokens, looks


def kinds_of(inputs):
    """What each position of a prompt with one image is: (T,)."""
    kinds, image, start = torch.full((len(inputs.ids),), TEXT), inputs.images[0], inputs.starts[0]
    kinds[start:start + len(image)] = image.kinds
    return kinds


def pieces_of(tokenizer, tokens):
    """The text that each token adds to the answer."""
    texts = [tokenizer.decode(tokens[:i], skip_special_tokens=True)
             for i in range(len(tokens) + 1)]
    return [after[len(before):] for before, after in zip(texts, texts[1:])]


@dataclass
class Result:
    """One method at one budget."""
    about: dict                 # for the page
    keep: np.ndarray            # (L, G, T) bool
    looks: Looks


def run_all(prefilled, kinds, head_scores, budgets, seed, limit):
    """{"method budget": Result}, and Looks of the first token, which are the same for all."""
    first, results, tables = Looks(), {}, {"": head_scores}
    first.note(torch.stack([weights(q[:, -1:], k) for q, k in zip(prefilled.q, prefilled.k)]),
               kinds)
    for name in METHODS:
        if name in NEEDS_HEAD_SCORES and head_scores is None:
            continue
        for budget in budgets if name != "full" else budgets[-1:]:
            setting = Setting(name, budget, scores="")
            keep, cache = (f(setting, tables, seed) for f in (prefilled.keep, prefilled.cache))
            about = dict(entries=sum(map(sum, cache.held())), bytes=cache.held_bytes())
            tokens, looks = write_answer(prefilled, cache, keep, kinds, limit)
            processor = prefilled.model.processor
            written = [t for t in tokens if t not in processor.end_tokens]
            about |= dict(text=processor.tokenizer.decode(tokens, skip_special_tokens=True),
                          pieces=pieces_of(processor.tokenizer, written),
                          ended=len(written) < len(tokens))
            results[f"{name} {budget}" if name != "full" else name] = Result(about, keep.numpy(),
                                                                             looks)
    return results, first


# ---- the page ------------------------------------------------------------------------------------

class Parts(bytearray):
    """Arrays one after the other; `add` returns where they start."""

    def add(self, *arrays):
        start = len(self)
        for array in arrays:
            self.extend(np.ascontiguousarray(array).tobytes())
        return start

    def add_looks(self, looks, tokens, patches):
        """Of each token and head: per cent on image and page, a count, and as many patches and
        weights as are not too faint to be drawn."""
        tokens = min(tokens, len(looks.image))
        if not tokens:
            return dict(tokens=0)
        found, strength = (np.stack(x[:tokens])[..., :patches]
                           for x in (looks.patches, looks.weights))
        drawn = strength >= FAINT
        at = self.add(np.stack(looks.image[:tokens]), np.stack(looks.page[:tokens]),
                      drawn.sum(-1).astype("u1"), found[drawn], strength[drawn])
        return dict(tokens=tokens, at=at)


def page_picture(image, side=1000):
    """The page as a data URL, no larger than it is looked at."""
    image, file = image.copy(), io.BytesIO()
    image.thumbnail((side, side))
    image.save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def build_page(about, results, first, boxes, kinds, budgets, detail):
    """The HTML: explore_page.html with everything in it, or None if that is far too much. boxes:
    (N, 4) in shares of the page."""
    parts, settings = Parts(), {}
    data = dict(about, budgets=budgets, detail=detail,
                kinds=parts.add(kinds.numpy().astype("u1")),
                boxes=parts.add((65535 * boxes).round().numpy().astype("<u2")),
                first=parts.add_looks(first, *detail))
    for key, result in results.items():
        if key == "full" or int(key.split()[1]) in budgets:
            bits = np.packbits(result.keep, axis=-1, bitorder="little")
            settings[key] = dict(result.about, looks=parts.add_looks(result.looks, *detail),
                                 kept=parts.add(result.keep.sum(-1).astype("<u2")),
                                 bits=parts.add(bits))
    if len(parts) > 8 * LIMIT:
        return None
    data = json.dumps(dict(data, settings=settings)).replace("<", "\\u003c")
    page = Path(__file__).with_name("explore_page.html").read_text(encoding="utf-8")
    packed = base64.b64encode(zlib.compress(bytes(parts))).decode()
    return page.replace("@DATA@", data).replace("@PARTS@", packed)


def smallest_loss(about, results, first, boxes, kinds, budgets):
    """The page with as much as fits into LIMIT bytes."""
    ways = [(budgets, detail) for detail in DETAIL]
    ways += [(budgets[:n], DETAIL[-1]) for n in range(len(budgets) - 1, 0, -1)]
    for kept_budgets, detail in ways:
        html = build_page(about, results, first, boxes, kinds, kept_budgets, detail)
        if html and len(html.encode()) <= LIMIT:
            return html
    raise ValueError(f"--image: the page would be larger than {LIMIT:,} bytes even with one budget "
                     "and without weights; a smaller picture is right")


def explore(model, image, prompt, head_scores, seed=0, limit=64, answer=None, name=""):
    """The page's HTML. head_scores: (L, H) or None, without which some methods are left out;
    limit: of the answer's tokens; answer: the right one, if it is not the full cache's; name: of
    the model."""
    c, inputs = model.config, prepare(model, [image], prompt)
    T, laid_out, kinds = len(inputs.ids), inputs.images[0], kinds_of(inputs)
    budgets = [budget for budget in BUDGETS if budget < T]
    if not budgets:
        raise ValueError(f"--image: its prompt of {T} tokens fits every budget; a larger picture "
                         "is right")
    model.check_length(T, limit)
    results, first = run_all(prefill(model, inputs), kinds, head_scores, budgets, seed, limit)
    height, width = laid_out.size
    boxes = laid_out.boxes[laid_out.kinds == GRID] / torch.tensor([width, height] * 2)
    share = None
    if head_scores is not None:
        s = kv_head_scores(head_scores, c.kv_heads)
        share = [[round(x, 5) for x in row] for row in (s / s.sum()).tolist()]
    about = dict(model=name, prompt=prompt, answer=answer, L=c.layers, H=c.heads, G=c.kv_heads, T=T,
                 image=page_picture(image), size=[width, height], tokens=len(laid_out),
                 methods={m: ABOUT.get(m, "") for m in METHODS
                          if m == "full" or f"{m} {budgets[0]}" in results},
                 headScores=share, allBudgets=budgets)
    return smallest_loss(about, results, first, boxes, kinds, budgets)


# ---- the command ---------------------------------------------------------------------------------

def write_page(args):
    check_output(args.out, "--out", ".html", inputs=(args.image, args.scores))
    if not args.prompt.strip():
        raise ValueError(f"--prompt: {args.prompt!r} is empty; a question is right")
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens: {args.max_new_tokens} is too small; at least 1 is "
                         "right")
    image, model = open_image(args.image), load(args.model, args.device, args.dtype)
    html = explore(model, image, args.prompt, find_head_scores(model, args.scores), args.seed,
                   args.max_new_tokens, args.answer, as_typed(args.model))
    write_file(args.out, html)
    print(f"wrote {args.out}, {len(html.encode()):,} bytes")


def main(argv=None):
    parser = OneLineParser(prog="explore.py",
                           description="Make a page that shows what each head keeps.")
    parser.add_argument("--image", required=True, metavar="PATH")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the question")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the page, .html")
    parser.add_argument("--answer", metavar="TEXT",
                        help="the right answer (default: what the full cache gives)")
    parser.add_argument("--scores", metavar="FILE", help="visual head scores (default: those in "
                                                         "the model's folder)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    add_model_arguments(parser)
    parser.run(write_page, argv)


if __name__ == "__main__":
    main()
