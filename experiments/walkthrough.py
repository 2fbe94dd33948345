"""One question, from the picture to the answer: what each step of the method has in hand.

    python experiments/walkthrough.py [--model DIR_OR_HUB_ID] [--image FILE --prompt TEXT]

To the right of each step stand the functions that its numbers come from. Letters as in cache.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cache import allocate_budgets, kv_head_scores, observed_attention
from experiments.compress import Setting, prefill
from experiments.draw import sample_page
from experiments.explore import watched_answer
from model_llava import load, open_image, prepare
from score_heads import tokens_in_box
from sparsemm import DEFAULT_MODEL, OneLineParser, add_model_arguments, find_head_scores


def step(title, functions):
    print(f"\n{title}{functions:>{99 - len(title)}}")


def shown_at(t, inputs, words, tokenizer):
    """What position t of the prompt shows: a token of text, or pixels and the words on them."""
    image, i = inputs.images[0], t - inputs.starts[0]
    if not 0 <= i < len(image):
        return f"position {t:3}: text {tokenizer.decode([inputs.ids[t].item()])!r}"
    x0, y0, x1, y1 = (round(edge) for edge in image.boxes[i].tolist())
    there = "".join(f", {word.text}" for word in words if i in tokens_in_box(image, word.box))
    return f"position {t:3}: pixels {x0}-{x1} x {y0}-{y1}{there}"


def walk(args):
    image, model = open_image(args.image), load(args.model, args.device, args.dtype)
    scores, inputs = find_head_scores(model), prepare(model, [image], args.prompt)
    if scores is None:
        raise ValueError(f"--model {args.model}: must have head scores (python score_heads.py)")
    words = sum(sample_page().lines, []) if image == sample_page().image else []
    c, tokenizer, T, rows = model.config, model.processor.tokenizer, len(inputs.ids), []
    L, H, G, D, s = c.layers, c.heads, c.kv_heads, c.head_dim, kv_head_scores(scores, c.kv_heads)
    setting, N, R, entry = Setting(budget=args.budget), L * G, H // G, 2 * D * model.dtype.itemsize
    b, w, rho, read = setting.budget, setting.window, setting.rho, prefill(model, inputs)
    order = s.flatten().argsort(descending=True, stable=True).tolist()
    heads = [divmod(i, G) for i in (*order[:3], order[-1])]
    l, h = divmod(scores.flatten().argsort(descending=True)[1].item(), H)    # the second best head
    print(f"{args.prompt} ({Path(args.image).name}, {model.name}, b = {b} entries per KV head)")
    step("1. Prompt and prefill", "prepare, Decoder (model_llava.py)")
    print(f"   T = {T} tokens, {inputs.image_tokens} of them image; L = {L} layers, N = L G = {N}\n"
          f"   in layer {l}: q {(*read.q[l].shape,)}, k and v {(*read.k[l].shape,)}: "
          f"H = {H} query heads, G = {G} KV heads, D = {D}")
    step("2. Scores of KV heads: sums over their query heads", "kv_head_scores (cache.py)")
    for i, j in heads:
        parts = " + ".join(f"{x:6.2%}" for x in scores[i, j * R:(j + 1) * R])
        print(f"   layer {i} KV head {j}   {parts} = {s[i, j]:6.2%}")
    step("3. Budgets: window + uniform + by score", "allocate_budgets (cache.py)")
    B, r, rest = N * b, rho * (b - w), N * (b - w) * (1 - rho)
    print(f"   B = {N} x {b} = {B:,}, w = {w}, r = {rho} x ({B:,} - {N} x {w}) / {N} = {r:.1f}, "
          f"by score {rest:,.1f} in all;\n   what exceeds T = {T} goes to the others by score")
    for i, j in heads:
        print(f"   layer {i} KV head {j}   {w} + {r:.1f} + {s[i, j]:6.2%} of {rest:,.1f} = "
              f"{w + r + rest * s[i, j]:6.1f}, holds {allocate_budgets(s, b, T, w, rho)[i, j]}")
    step(f"4. Entries: layer {l} KV head {h // R}", "observed_attention, select_entries (cache.py)")
    a = observed_attention(read.q[l], read.k[l], w)[h // R]                                 # (T-w,)
    ranked = a.argsort(descending=True, stable=True).tolist()
    for t in ranked[:5]:
        print(f"   {a[t]:.4f}   {shown_at(t, inputs, words, tokenizer)}")
    print(f"   if every head held b (snapkv), it would keep the first {min(b, T) - w} of {T - w}")
    step("5. Cache", "KVCache (cache.py)")
    keep, cache = (f(setting, {"aligned": scores}) for f in (read.keep, read.cache))
    print(f"   {int(keep.sum()):,} of L G T = {N * T:,} entries of 2 D itemsize = {entry} bytes: "
          f"{cache.held_bytes():,} bytes instead of {entry * N * T:,}")
    step("6. Decoding", "greedy_decode (sparsemm.py), decode_attention (cache.py)")
    tokens = watched_answer(read, cache, keep, 256, lambda p: rows.append(p[l, h].clone()))
    texts = [repr(tokenizer.decode([token])) for token in tokens]
    for row in rows[:1]:
        print(f"   {texts[0]} comes from prefill; for {texts[1]} layer {l} query head {h} looks at")
        for t in row.topk(3).indices.tolist():
            place = f"rank {ranked.index(t) + 1} in step 4" if t in ranked else "in the window"
            print(f"   {row[t]:6.1%}   {shown_at(t, inputs, words, tokenizer)} ({place})")
    print(f"   answer: {' '.join(texts)}")


def main(argv=None):
    parser = OneLineParser(prog="walkthrough.py", description="Follow one question step by step.")
    parser.add_argument("--image", default=DEFAULT_MODEL.parent / "receipt.png", metavar="PATH")
    parser.add_argument("--prompt", default="What is the Rope?", metavar="TEXT")
    parser.add_argument("--budget", type=int, default=64, metavar="N")
    add_model_arguments(parser)
    parser.run(walk, argv)


if __name__ == "__main__":
    main()
