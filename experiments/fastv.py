"""FastV: image tokens at which the last query hardly looks leave the prefill after a few layers
(Chen et al. 2024, arXiv 2403.06764).

    python experiments/fastv.py --image tiny/receipt.png --prompt "What is the Total?"
                                [--fastv-layer 2] [--fastv-keep 0.5] [--method sparsemm] ...

    image, prompt --> K layers --> the share of the image tokens that is --> the other --> answer
                      on all T     looked at most, and all text: T'          layers

It prunes the prompt, not the heads' caches, so that it goes together with every method: the layers
behind share out T' entries a head instead of T. What stays keeps its position.

Letters: L layers, H query heads, G KV heads, T prompt tokens, D head size, K layers that see all.
"""

import math
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cache import METHODS, NEEDS_HEAD_SCORES, KVCache, OneLineParser, make_method
from experiments.arguments import share, whole_number
from model_llava import load, open_image, prefill_attention, prepare
from sparsemm import SCORES_FILE, add_model_arguments, clock, find_head_scores, report, write


def fastv_survivors(q, k, image, keep):
    """Of the image tokens the share `keep` at which the last query looks most, on average over the
    heads, and everything else.

    q: (H, T, D), k: (G, T, D), after RoPE; image: (T,) bool. Returns positions (T',), ascending."""
    last = q[:, -1].unflatten(0, (len(k), -1)).float() / math.sqrt(q.shape[-1])       # (G, R, D)
    looked_at = (last @ k.float().transpose(1, 2)).softmax(-1).mean((0, 1))                # (T,)
    looked_at[~image] = math.inf
    order = looked_at.argsort(descending=True, stable=True)
    return order[:fastv_length(image, keep)].sort().values


def fastv_length(image, keep):
    """T' of fastv_survivors."""
    return int((~image).sum()) + round(keep * int(image.sum()))


def fastv_prefill(model, inputs, cache, layers, keep):
    """sparsemm.prefill, but that only the survivors go on after so many layers. Returns the logits
    (vocabulary,) of the first token."""
    decoder, image, survivors = model.decoder, inputs.ids == model.config.image_token, []

    def attend(layer, q, k, v):                            # (H, T, D), (G, T, D), (G, T, D)
        if layer == layers - 1:
            survivors.append(fastv_survivors(q, k, image, keep))
        out = prefill_attention(q, k, v)
        cache.compress(layer, q, k, v)
        return out

    x = decoder.run_layers(model.embed(inputs), inputs.positions, attend, last=layers)     # (T, E)
    left = survivors[0]
    x = decoder.run_layers(x[left], inputs.positions[:, left], attend, first=layers)      # (T', E)
    return model.logits(decoder.norm(x[-1]))


@torch.inference_mode()
def generate(model, images, prompt, layers, keep, method="sparsemm", budget=256, window=32,
             rho=0.1, redistribute=True, head_scores=None, seed=0, max_new_tokens=256, stream=None):
    """sparsemm.generate with FastV: after `layers` layers the share `keep` of the image tokens goes
    on. Raises ValueError for bad arguments."""
    c = model.config
    if not (0 < layers < c.layers and 0 <= keep <= 1):
        raise ValueError(f"--fastv-layer {layers}, --fastv-keep {keep}: from 1 to {c.layers - 1} "
                         "layers, and a share between 0 and 1, are right")
    inputs = prepare(model, images, prompt)
    model.check_length(len(inputs.ids), max_new_tokens)
    lengths = torch.full((c.layers,), len(inputs.ids))
    lengths[layers:] = fastv_length(inputs.ids == c.image_token, keep)
    cache = KVCache(make_method(method, c.layers, c.kv_heads, lengths, budget, window, rho,
                                redistribute, head_scores, seed), window)
    start = clock(model)
    logits = fastv_prefill(model, inputs, cache, layers, keep)
    return dict(write(model, inputs, cache, logits, start, max_new_tokens, stream),
                method=method, budget=budget)


# ---- the command ---------------------------------------------------------------------------------

def argument_parser():
    parser = OneLineParser(
        prog="fastv.py", description="Ask about an image, much of which leaves the prefill early.")
    parser.add_argument("--image", nargs="+", required=True, metavar="PATH",
                        help="images, in order")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the question")
    parser.add_argument("--fastv-layer", type=whole_number(1), default=2, metavar="K",
                        help="how many layers see all image tokens (default 2)")
    parser.add_argument("--fastv-keep", type=share, default=0.5, metavar="SHARE",
                        help="which share of them goes on (default 0.5)")
    parser.add_argument("--method", choices=METHODS, default="sparsemm", metavar="NAME",
                        help="which entries of what is left to keep: %(choices)s")
    parser.add_argument("--budget", type=int, default=256, metavar="N",
                        help="cache entries per KV head, on average (default 256)")
    parser.add_argument("--window", type=int, default=32, metavar="N")
    parser.add_argument("--rho", type=float, default=0.1)
    parser.add_argument("--scores", metavar="FILE",
                        help=f"visual head scores (default: {SCORES_FILE} in the model's folder)")
    parser.add_argument("--max-new-tokens", type=whole_number(1), default=256, metavar="N")
    add_model_arguments(parser)
    return parser


def answer(args):
    """What the command does."""
    warnings.filterwarnings("ignore")                      # the user's input is not at fault there
    images = [open_image(path) for path in args.image]
    model = load(args.model, args.device, args.dtype)
    scores = find_head_scores(model, args.scores) if args.method in NEEDS_HEAD_SCORES else None
    result = generate(model, images, args.prompt, args.fastv_layer, args.fastv_keep, args.method,
                      args.budget, args.window, args.rho, head_scores=scores, seed=args.seed,
                      max_new_tokens=args.max_new_tokens)
    print(result["text"])
    print(report(result, model), file=sys.stderr)


def main(argv=None):
    argument_parser().run(answer, argv)


if __name__ == "__main__":
    main()
