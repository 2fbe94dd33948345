"""One HTML file in which a reader sees what each head keeps, and where it looks.

    python experiments/explore.py --image tiny/receipt.png --prompt "What is the Rope?" \\
        --out tiny/explore.html

A slider moves the budget, a list picks the method. A map shows how many entries each KV head keeps;
of the head under the cursor the page shows which, and where it looks for each token of the answer.
tiny/explore.png is what a browser shows of that file, scaled to a width of 800 pixels:

    chromium --headless --window-size=1000,960 --virtual-time-budget=8000 \\
        --screenshot=tiny/explore.png "file://$PWD/tiny/explore.html#method=sparsemm&budget=64"

The page (explore_page.html) computes nothing and loads nothing. To stay below 3 MB it leaves out
weights first, then budgets, and says so.

Letters: L layers, H query heads, G KV heads, R = H/G, T prompt tokens, N patches of the page.
"""

import base64
import io
import json
import sys
import zlib
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cache import METHODS, NEEDS_HEAD_SCORES, attention_rows, decode_attention, kv_head_scores
from experiments.compress import Setting, prefill
from model_llava import GRID, load, open_image, prepare
from sparsemm import (DEFAULT_MODEL, OneLineParser, add_model_arguments, check_output,
                      find_head_scores, greedy_decode, write_file)

BUDGETS = (48, 64, 96, 128, 256, 512)
TEXT = 3                                    # beside the kinds of image tokens: text of the prompt
LIMIT = 3_000_000                           # bytes of the file
FAINT = 8                                   # of 255: weights of less than 0.1 % are not drawn
DETAIL = ((48, 64), (48, 24), (24, 16), (12, 12), (6, 8), (3, 8), (0, 0))   # tokens with weights,
                                            # and on how many patches: the first that fits is taken
ABOUT = {"full": "evicts nothing", "sparsemm": "budgets by visual head score",
         "snapkv": "the same budget for every head", "window": "the last positions",
         "pyramidkv": "budgets fall from layer to layer",
         "adakv": "budgets by this prompt's attention", "random": "budgets by random head scores",
         "shuffled": "visual head scores, in wrong places",
         "streaming": "the first four and the last positions"}


# ---- what the model does -------------------------------------------------------------------------

@torch.inference_mode()
def watched_answer(prefilled, cache, keep, limit, watch):
    """The tokens of an answer, decoded from a compressed cache. After each step watch(p) gets the
    weights p (L, H, T) with which it attended to the prompt, 0 where an entry is evicted.

    prefilled: a compress.Prefill; keep: (L, G, T) bool, what the cache holds of it."""
    model, p = prefilled.model, torch.zeros(len(keep), len(prefilled.q[0]), keep.shape[-1])

    def attend(layer, q, k, v):                            # (H, 1, D), (G, 1, D), (G, 1, D)
        cache.append(layer, k, v)
        groups = zip(q.chunk(len(k)), cache[layer], p[layer].chunk(len(k)), keep[layer])
        for g, (q_g, (K, _), p_g, kept) in enumerate(groups):
            p_g[:, kept] = attention_rows(q_g, K)[:, 0, :cache.kept[layer][g]].cpu()
        return decode_attention(q, cache[layer])

    def step(token, position):
        cache.reserve()
        logits = model.decode(token, position, attend)
        watch(p)
        return logits

    return greedy_decode(step, prefilled.first, prefilled.inputs.next_position,
                         model.processor.end_tokens, limit)


def look(p, kinds):
    """Where all heads look for one token: per cent on the image and on the page's patches, (L, H)
    each, and the patches with the largest weights, each with 255 * sqrt(weight), (L, H, <= 64, 2).
    p: (L, H, T); kinds: (T,)."""
    on_page = p[..., kinds == GRID]
    top = on_page.topk(min(DETAIL[0][1], on_page.shape[-1]))
    image, page = ((100 * weights.sum(-1).clamp(max=1)).round().int()
                   for weights in (p[..., kinds != TEXT], on_page))
    return image, page, torch.stack([top.indices, (255 * top.values.sqrt()).round()], -1).short()


def run_all(prefilled, kinds, head_scores, budgets, seed, limit):
    """{"method budget": (what the page says about it, keep (L, G, T), a look for each token)}"""
    processor, results, tables = prefilled.model.processor, {}, {"": head_scores}
    for name in METHODS:
        for budget in budgets if name != "full" else budgets[-1:]:
            if name in NEEDS_HEAD_SCORES and head_scores is None:
                continue
            looks, setting = [], Setting(name, budget, scores="")
            keep, cache = (f(setting, tables, seed) for f in (prefilled.keep, prefilled.cache))
            about = dict(entries=sum(map(sum, cache.held())), bytes=cache.held_bytes())
            tokens = watched_answer(
                prefilled, cache, keep, limit,
                lambda p: looks.append(look(p, kinds)) if len(looks) < DETAIL[0][0] - 1 else None)
            texts = [processor.tokenizer.decode(tokens[:i], skip_special_tokens=True)
                     for i in range(len(tokens) + 1)]
            n = len(tokens) - (tokens[-1] in processor.end_tokens)
            pieces = [after[len(before):] for before, after in zip(texts[:n], texts[1:])]
            about |= dict(text=texts[-1], pieces=pieces, ended=n < len(tokens))
            results[f"{name} {budget}" if name != "full" else name] = about, keep, looks[:n - 1]
    return results


# ---- the page ------------------------------------------------------------------------------------

def build_page(about, results, first, budgets, tokens, patches):
    """The HTML: explore_page.html with everything in it. first: the look of the first token, the
    same for all methods; tokens, patches: one of DETAIL."""
    def drawn(looks):
        return [dict(image=image.tolist(), page=page.tolist(),
                     found=[[x[x[:, 1] >= FAINT].tolist() for x in heads[:, :patches]]
                            for heads in top]) for image, page, top in looks[:tokens]]

    data = dict(about, budgets=budgets, detail=[tokens, patches], first=drawn([first]), settings={})
    for key, (of_setting, keep, looks) in results.items():
        if key == "full" or int(key.split()[1]) in budgets:
            bits = [[np.packbits(head).tobytes().hex() for head in layer] for layer in keep.numpy()]
            data["settings"][key] = dict(of_setting, looks=drawn(looks), bits=bits,
                                         kept=keep.sum(-1).tolist())
    packed = base64.b64encode(zlib.compress(json.dumps(data, separators=(",", ":")).encode()))
    page = Path(__file__).with_name("explore_page.html").read_text(encoding="utf-8")
    return page.replace("@DATA@", packed.decode())


def smallest_loss(about, results, first, budgets):
    """The page with as much as fits into LIMIT bytes."""
    ways = [(budgets, *detail) for detail in DETAIL]
    for way in ways + [(budgets[:n], 0, 0) for n in range(len(budgets) - 1, 0, -1)]:
        html = build_page(about, results, first, *way)
        if len(html) <= LIMIT:
            return html
    raise ValueError("--image: must be smaller; even one budget without weights would make a page "
                     f"of more than {LIMIT:,} bytes")


@torch.inference_mode()
def explore(model, image, prompt, head_scores, seed=0, limit=64, name=""):
    """The page's HTML. head_scores: (L, H) or None, without which some methods are left out;
    limit: of the answer's tokens; name: of the model."""
    c, inputs, file = model.config, prepare(model, [image], prompt), io.BytesIO()
    T, laid_out, kinds = len(inputs.ids), inputs.images[0], torch.full((len(inputs.ids),), TEXT)
    kinds[inputs.starts[0]:inputs.starts[0] + len(laid_out)] = laid_out.kinds
    budgets = [budget for budget in BUDGETS if budget < T]
    if not budgets:
        raise ValueError(f"--image: must be larger; {T} tokens fit every budget")
    model.check_length(T, limit)
    read = prefill(model, inputs)
    results = run_all(read, kinds, head_scores, budgets, seed, limit)
    first = torch.cat([attention_rows(q_g, K)[:, 0].cpu() for q, k in zip(read.q, read.k)
                       for q_g, K in zip(q[:, -1:].chunk(len(k)), k)]).view(c.layers, c.heads, T)
    boxes = laid_out.boxes[laid_out.kinds == GRID].double() / torch.tensor(laid_out.size[::-1] * 2)
    s = None if head_scores is None else kv_head_scores(head_scores, c.kv_heads)
    small = image.copy()
    small.thumbnail((1000, 1000))
    small.save(file, "JPEG", quality=88)
    about = dict(model=name, prompt=prompt, L=c.layers, H=c.heads, G=c.kv_heads, T=T,
                 image="data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode(),
                 tokens=len(laid_out), kinds=kinds.tolist(), boxes=boxes.round(decimals=5).tolist(),
                 headScores=None if s is None else (s / s.sum()).round(decimals=5).tolist(),
                 methods={m: ABOUT[m] for m in METHODS
                          if m == "full" or f"{m} {budgets[0]}" in results}, allBudgets=budgets)
    return smallest_loss(about, results, look(first, kinds), budgets)


# ---- the command ---------------------------------------------------------------------------------

def write_page(args):
    check_output(args.out, "--out", ".html")
    image, model = open_image(args.image), load(args.model, args.device, args.dtype)
    root, folder = DEFAULT_MODEL.parents[1], model.folder.resolve()
    name = folder.relative_to(root).as_posix() if folder.is_relative_to(root) else args.model
    head_scores = find_head_scores(model, args.scores)
    html = explore(model, image, args.prompt, head_scores, args.seed, name=name)
    write_file(args.out, html)
    print(f"wrote {args.out}, {len(html.encode()):,} bytes")


def main(argv=None):
    parser = OneLineParser(prog="explore.py", description="Make a page of what each head keeps.")
    parser.add_argument("--image", required=True, metavar="PATH")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the question")
    parser.add_argument("--out", required=True, metavar="FILE", help="the page, .html")
    parser.add_argument("--scores", metavar="FILE", help="default: those in the model's folder")
    add_model_arguments(parser)
    parser.run(write_page, argv)


if __name__ == "__main__":
    main()
