"""FastV (Chen et al. 2024, arXiv 2403.06764): image tokens at which the last query hardly looks
leave the prefill after a few layers.

    python experiments/fastv.py --image tiny/receipt.png --prompt "What is the Total?"

    image, prompt --> K layers --> the share of the image tokens that is --> the other --> answer
                      on all T     looked at most, and all text: T'          layers

FastV shortens the prompt, so it works with every method of cache.py. Tokens that stay keep their
positions. Letters: L layers, H query heads, G KV heads, R = H/G, T prompt tokens, D head size.
"""

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cache import KVCache, Method, allocate_budgets, attention_rows, head_shares, make_plan
from model_llava import load, open_image, prefill_attention, prepare, rotary_angles
from sparsemm import (OneLineParser, add_model_arguments, clock, decoding_step, find_head_scores,
                      greedy_decode)


def survivors(q, k, image, left):
    """The `left` positions (T',), ascending, that go on: all text, and the image tokens at which
    the last query looks most, on average over the heads. q: (H, T, D); k: (G, T, D), after RoPE;
    image: (T,) bool."""
    rows = [attention_rows(q_g[:, -1:], k_g) for q_g, k_g in zip(q.chunk(len(k)), k)]   # (R, 1, T)
    looked_at = torch.cat(rows).mean((0, 1)).masked_fill(~image, math.inf)                  # (T,)
    return looked_at.argsort(descending=True, stable=True)[:left].sort().values


def prefill(model, inputs, cache, layers, left):
    """The logits (vocabulary,) of the first token, as sparsemm.prefill computes them, except that
    only `left` survivors go on after so many layers."""
    x, stay = model.embed(inputs), None                                                # (T, width)
    cos, sin = (angle.to(x.dtype) for angle in rotary_angles(inputs.positions, model.config))

    def attend(l, q, k, v):                                # (H, T, D), (G, T, D), (G, T, D)
        nonlocal stay
        if l == layers - 1:
            stay = survivors(q, k, inputs.ids == model.config.image_token, left)
        cache.compress(l, q, k, v)
        return prefill_attention(q, k, v)

    for l, layer in enumerate(model.decoder.layers):
        if l == layers:
            x, cos, sin = x[stay], cos[stay], sin[stay]                      # (T, ...) -> (T', ...)
        x = layer(x, cos, sin, l, attend)
    return model.logits(model.decoder.norm(x[-1]))


@torch.inference_mode()
def generate(model, images, prompt, layers, keep, method=Method("full"), max_new_tokens=256):
    """What sparsemm.generate returns (text, token_ids, kept and prefill_seconds of it), with FastV:
    after `layers` layers only the share `keep` of the image tokens goes on."""
    c, inputs = model.config, prepare(model, images, prompt)
    if not (0 < layers < c.layers and 0 <= keep <= 1):
        raise ValueError(f"--layer {layers} --keep {keep}: must be 1 to {c.layers - 1}, and 0 to 1")
    T, n = len(inputs.ids), inputs.image_tokens
    left = T - n + round(keep * n)                                                             # T'
    model.check_length(T, max_new_tokens)
    plan = make_plan(method, c.layers, c.kv_heads, T)
    if method.name in ("sparsemm", "shuffled", "random") and T > method.budget:
        lengths = torch.tensor([T] * layers + [left] * (c.layers - layers))     # a head's, at most
        table = allocate_budgets(head_shares(method, c.layers, c.kv_heads), method.budget, lengths,
                                 method.window, method.rho, method.redistribute)
        plan.budgets = lambda layer, a: table[layer]
    cache, start = KVCache(plan), clock(model)
    logits = prefill(model, inputs, cache, layers, left)
    kept, seconds = cache.held(), clock(model) - start
    tokens = greedy_decode(decoding_step(model, cache), logits, inputs.next_position,
                           model.processor.end_tokens, max_new_tokens)
    return dict(text=model.processor.tokenizer.decode(tokens, skip_special_tokens=True),
                token_ids=tokens, kept=kept, prefill_seconds=seconds)


def answer(args):
    """What the command does."""
    model = load(args.model, args.device, args.dtype)
    method = Method(budget=args.budget, head_scores=find_head_scores(model))
    images = [open_image(args.image)]
    print(generate(model, images, args.prompt, args.layer, args.keep, method)["text"])


def main(argv=None):
    parser = OneLineParser(prog="fastv.py", description="SparseMM after FastV.")
    for name in ("--image", "--prompt"):
        parser.add_argument(name, required=True)
    parser.add_argument("--layer", type=int, default=2, help="layers that see all (default 2)")
    parser.add_argument("--keep", type=float, default=0.5, help="share that goes on (default 0.5)")
    parser.add_argument("--budget", type=int, default=256)
    add_model_arguments(parser)
    parser.run(answer, argv)


if __name__ == "__main__":
    main()
