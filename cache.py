"""The method: how many KV-cache entries each head may keep, which ones, and the cache for them.

SparseMM (Wang et al., "Head Sparsity Emerges from Visual Concept Responses in MLLMs", ICCV 2025,
arXiv 2506.05344) gives every KV head a budget of three parts. The entries to keep are then chosen
as in SnapKV (arXiv 2404.14469).

    the budget of one head          ### window w    === uniform r    +++ by visual score

        looks at the image          ###===++++++++++++++++++++++++++++++++++++++++
        does not                    ###===+

    the cache of one layer          what was selected from the prompt is packed once and never
                                    moves again; a tail takes one entry per head and step

        head 0  [ selected n_0      ]     [ window w | generated ... | reserved ]
        head 1  [ n_1 ]                   [ window w | generated ... | reserved ]
        head 2  [ selected n_2          ] [ window w | generated ... | reserved ]
                 packed (sum n_g, D)       tail (G, w + reserve, D)

Letters: L layers, H query heads, G KV heads, T prompt length, D head size, w window, N = L*G, b
budget per KV head, B = N*b in all. A method is data: budgets (L, G) and a score to rank the
positions of a head by. Run this file to see the three parts drawn for some heads:

    python cache.py [--scores FILE] [--kv-heads G] [--budget 256] [--length 600]
"""

import json
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F

METHODS = ("full", "sparsemm", "snapkv", "pyramidkv", "adakv", "random", "shuffled", "window",
           "streaming")
NEEDS_SCORES = ("sparsemm", "shuffled")


# ---- the budget: window, uniform, score ----------------------------------------------------------

def allocate_budgets(scores, budget, length, window=32, rho=0.1, redistribute=True):
    """The three-part budget of every KV head ("Three-Component KV-Cache Allocation"):

        r = rho * (B - N*w) / N
        b[l,g] = w + r + (B - N*w - N*r) * s[l,g] / sum(s)

    scores: (L, G), finite, >= 0, not all zero; budget: b, entries per KV head on average; length:
    prompt length T, an int or one per layer (L,). No head can hold more than T entries: what it
    cannot hold goes to the others in proportion to their scores, so that the sum is exactly
    min(B, sum of T). With redistribute=False it is lost. Returns (L, G) int64. Raises ValueError
    for bad arguments.

    NOTE(official): the authors' code always clips at T and loses the rest: with their LLaVA scores
    and 2,900 tokens, 58 % of the budget at b = 2048. It also rounds each head by itself, so that
    the total drifts.
    """
    s, caps = check_allocation(scores, budget, length, window, rho)
    N = s.numel()
    B = N * budget
    r = rho * (B - N * window) / N
    b = window + r + (B - N * window - N * r) * s / s.sum()
    if not redistribute:
        return torch.minimum(round_to_total(b, B), caps)
    if B >= caps.sum():
        return caps
    return round_to_total(pour_surplus(b, caps, s), B)


def check_allocation(scores, budget, length, window, rho):
    """Checks the arguments of allocate_budgets. Returns s (L, G) float64, and T (L, G) int64."""
    check_settings(budget, window, rho)
    s = torch.as_tensor(scores, dtype=torch.float64)
    if s.dim() != 2 or not torch.isfinite(s).all() or (s < 0).any() or s.sum() <= 0:
        raise ValueError("scores must be (layers, KV heads), finite, >= 0 and not all zero")
    T = torch.as_tensor(length, dtype=torch.int64).reshape(-1, 1)
    if T.numel() not in (1, s.shape[0]) or (T < 1).any():
        raise ValueError(f"length must be one integer >= 1 or {s.shape[0]} of them, not {length}")
    return s, T.expand_as(s).clone()


def check_settings(budget, window, rho):
    """Raises ValueError unless 1 <= window <= budget and 0 <= rho <= 1."""
    if window < 1:
        raise ValueError(f"window must be at least 1, not {window}")
    if budget < window:
        raise ValueError(f"budget must be at least the window of {window} entries, not {budget}")
    if not 0 <= rho <= 1:
        raise ValueError(f"rho must be between 0 and 1, not {rho}")


def pour_surplus(b, caps, s):
    """Water-filling: b (L, G) float64 is cut at caps, and the surplus goes to the heads below their
    cap in proportion to their scores s, until nothing is left over. Where only heads of score zero
    are below, they share it equally."""
    b, full = b.clone(), torch.zeros_like(b, dtype=torch.bool)
    while (over := (b > caps) & ~full).any():
        surplus = (b - caps)[over].sum()
        full |= over
        b = torch.where(full, caps.double(), b)
        weight = torch.where(full, 0.0, s)
        if weight.sum() == 0:
            weight = (~full).double()
        b += surplus * weight / weight.sum().clamp(min=1e-300)
    return b


def round_to_total(b, total):
    """Largest-remainder rounding: float64 budgets -> int64 ones whose sum is exactly `total`. Of
    equal remainders the first in reading order wins; what differs by 1e-9 is equal, so that float
    noise decides nothing."""
    b = b.round(decimals=9)
    whole = b.floor()
    remainders = (b - whole).round(decimals=9).flatten()
    first = remainders.argsort(descending=True, stable=True)
    rounded = whole.long().flatten()
    rounded[first[:total - int(rounded.sum())]] += 1
    return rounded.view(b.shape)


def pyramid_budgets(L, budget, length, window):
    """PyramidKV (arXiv 2406.02069): beyond the window, linear in the layer from n_max down to
    n_min = n // 20 with mean n = budget - window; n_max is clipped at the prompt and n_min raised
    as much. Returns (L,) int64 with sum L*budget.

    NOTE(official): there the capacities of the first prompt serve all later ones, and integer
    steps overspend by up to 11 %.
    """
    n = budget - window
    n_max = min(2 * n - n // 20, length - window)
    slope = torch.linspace(1, -1, L, dtype=torch.float64) if L > 1 else torch.zeros(1)
    return window + round_to_total(n + (n_max - n) * slope.double(), n * L)


def adakv_budgets(observation, budget, window, uniform=0.2):
    """AdaKV (arXiv 2407.11550) within one layer: all heads' entries are ranked together, and a head
    gets as many as it has among the best G*n, n = budget - window, mixed with a uniform share.

    observation: (G, T - w) scores of the positions. Before ranking, those of a head are weighted
    by the share of their mass that its best n hold. Returns (G,) int64 with sum G*budget.
    """
    G, positions = observation.shape
    n = min(budget - window, positions)
    held = observation.topk(n, dim=1).values.sum(1) / observation.sum(1).clamp(min=1e-30)
    ranked = (observation * held[:, None]).flatten().argsort(descending=True, stable=True)
    count = torch.bincount(ranked[:G * n] // positions, minlength=G).double().cpu()
    return window + round_to_total((1 - uniform) * count + uniform * n, G * n)


# ---- which entries: SnapKV's observation window --------------------------------------------------

def observation_scores(q, k, window=32, kernel=5):
    """How much the last w queries of the prompt look at each earlier position (SnapKV, section 4):

        A = softmax(Q[-w:] K^T / sqrt(D))      causal, float32, over all T keys
        a[g] = mean of A over the w queries and the R = H/G query heads of KV head g, then
               averaged over `kernel` neighbouring positions (zeros beyond both ends count)

    q: (H, T, D), or only its last w rows; k: (G, T, D), both after RoPE. Returns (G, T - w)
    float32. O(T*w), not O(T^2).

    NOTE(official): there the scores are half precision, in which chance decides among many ties.
    """
    (G, T, D), H = k.shape, q.shape[0]
    w = min(window, T)
    future = torch.ones(w, T, dtype=torch.bool, device=q.device).triu(T - w + 1)
    a = torch.zeros(G, T - w, dtype=torch.float32, device=q.device)
    for g in range(G):
        keys = k[g].float()
        for h in range(g * H // G, (g + 1) * H // G):
            logits = q[h, -w:].float() @ keys.T / math.sqrt(D)                           # (w, T)
            A = logits.masked_fill(future, -math.inf).softmax(-1)
            a[g] += A[:, :T - w].mean(0) / (H // G)
    if T == w:
        return a
    return F.avg_pool1d(a[:, None], kernel, stride=1, padding=kernel // 2)[:, 0]  # (G,1,n)->(G,n)


def recency_scores(q, k, window=32, first=0):
    """Scores by position alone, (G, T - w): the later the better; the `first` ones best of all
    (attention sinks, StreamingLLM, arXiv 2309.17453)."""
    G, T, _ = k.shape
    scores = torch.arange(max(0, T - window), dtype=torch.float32, device=k.device)
    scores[:first] = math.inf
    return scores.expand(G, -1)


def fastv_survivors(q, k, image, keep):
    """FastV (Chen et al. 2024, arXiv 2403.06764): of the image tokens only the share `keep` goes on
    to the next layer, those at which the last query looks most, on average over the heads.

    q: (H, T, D), k: (G, T, D), after RoPE; image: (T,) bool. Returns positions (T',), ascending."""
    last = q[:, -1].unflatten(0, (len(k), -1)).float() / math.sqrt(q.shape[-1])     # (G, H/G, D)
    looked_at = (last @ k.float().transpose(1, 2)).softmax(-1).mean((0, 1))                # (T,)
    looked_at[~image] = math.inf
    return select_entries(looked_at, fastv_length(image, keep))


def fastv_length(image, keep):
    """T' of fastv_survivors."""
    return int((~image).sum()) + round(keep * int(image.sum()))


def select_entries(scores, n):
    """The positions one head keeps of the first T - w: the n best by scores (T - w,), ascending,
    int64. Of equal scores the lower position wins."""
    return scores.argsort(descending=True, stable=True)[:n].sort().values


# ---- the methods ---------------------------------------------------------------------------------

@dataclass
class Method:
    """A method is two functions, not a forward pass."""
    budgets: Callable       # (layer, scores (G, T-w)) -> (G,) entries to keep, the window included
    rank: Callable          # (q (H, T, D), k (G, T, D), window) -> scores (G, T-w) to select by


def make_method(name, L, G, length, budget=256, window=32, rho=0.1, redistribute=True, scores=None,
                seed=0):
    """The Method `name` for one prompt of `length` tokens.

    length: an int, or one per layer (L,); scores: visual scores of the query heads (L, H); only
    sparsemm and shuffled need them. All methods spend the same total, and a prompt that fits the
    budget is kept whole by every one. Raises ValueError for bad arguments.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {name!r}")
    check_settings(budget, window, rho)
    if name in NEEDS_SCORES and scores is None:
        raise ValueError(f"method {name} needs visual head scores")
    T = torch.as_tensor(length).expand(L)
    if name == "full" or T.max() <= max(budget, window):
        return Method(lambda layer, a: T[layer].expand(G), recency_scores)
    if name == "adakv":
        return Method(lambda layer, a: adakv_budgets(a, budget, window), observation_scores)
    if name in ("sparsemm", "shuffled", "random"):
        weights = head_weights(name, L, G, scores, seed)
        table = allocate_budgets(weights, budget, length, window, rho, redistribute)
    elif name == "pyramidkv":
        table = pyramid_budgets(L, budget, T.max().item(), window)[:, None].expand(L, G)
    else:                                                               # snapkv, window, streaming
        table = torch.full((L, G), budget)
    by_position = {"window": recency_scores, "streaming": partial(recency_scores, first=4)}
    return Method(lambda layer, a: table[layer], by_position.get(name, observation_scores))


def head_weights(name, L, G, scores, seed):
    """The weights (L, G) float64 that share out the budget: the visual scores (sparsemm), or a
    control drawn once with the seed.

    NOTE(official): its random control draws anew in every layer. NOTE(paper): `shuffled` is ours;
    it is as concentrated as the visual scores and differs from them only in place.
    """
    generator = torch.Generator().manual_seed(seed)
    if name == "random":
        return torch.rand(L, G, generator=generator, dtype=torch.float64)
    visual = kv_head_scores(scores, G)
    if name == "shuffled":
        return visual.flatten()[torch.randperm(L * G, generator=generator)].view(L, G)
    return visual


def kv_head_scores(scores, G):
    """Query-head scores (L, H) -> (L, G) float64: a KV head has the sum over its query heads."""
    L, H = scores.shape
    return torch.as_tensor(scores, dtype=torch.float64).view(L, G, H // G).sum(-1)


def read_head_scores(path, L, H):
    """Reads visual scores in the authors' format, {"layer-head": [numbers]}, one list for each
    query head: the mean of each list, then the sum set to 1. Returns (L, H) float64.

    Raises ValueError, in one line that names the file, unless every head is there once, with a
    non-empty list of finite numbers >= 0, not all of them zero.
    """
    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"scores {path}: a key occurs twice")
        return dict(pairs)

    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except OSError as error:
        raise ValueError(f"scores {path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError(f"scores {path}: not JSON") from None
    if not isinstance(table, dict):
        raise ValueError(f'scores {path}: not an object {{"layer-head": [numbers]}}')
    expected = [f"{l}-{h}" for l in range(L) for h in range(H)]
    if wrong := sorted(table.keys() - set(expected)):
        raise ValueError(f"scores {path}: {wrong[0]!r} is none of the {L} layers x {H} heads")
    if missing := [key for key in expected if key not in table]:
        raise ValueError(f"scores {path}: {missing[0]!r} is missing; there are {L} layers x {H} "
                         "heads")
    for key in expected:
        if not (isinstance(table[key], list) and table[key] and all(map(is_score, table[key]))):
            raise ValueError(f"scores {path}: {key!r} must be a non-empty list of numbers >= 0")
    s = torch.tensor([sum(table[key]) / len(table[key]) for key in expected], dtype=torch.float64)
    if not 0 < s.sum() < math.inf:
        raise ValueError(f"scores {path}: the scores are all zero, or too large to add up")
    return (s / s.sum()).view(L, H)


def is_score(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool) and 0 <= x < math.inf


# ---- the cache -----------------------------------------------------------------------------------

class LayerCache:
    """One layer: per KV head the selected prompt entries, packed, and a tail of the others."""

    def __init__(self, k, v, selected, w, reserve):
        """k, v: (G, T, D) of the whole prompt; selected: per head the kept positions of the first
        T - w; w: how many of the last every head keeps; reserve: columns for tokens to come."""
        G, T, D = k.shape
        self.lengths = [len(p) for p in selected]
        rows = torch.cat([p.to(k.device) + g * T for g, p in enumerate(selected)])
        self.packed_k = k.reshape(G * T, D)[rows]                                    # (sum n_g, D)
        self.packed_v = v.reshape(G * T, D)[rows]
        self.foreign = None                    # (G, 1, sum n_g): is the entry another head's?
        if len(set(self.lengths)) > 1:
            owner = torch.arange(G).repeat_interleave(torch.tensor(self.lengths)).to(k.device)
            self.foreign = (owner != torch.arange(G, device=k.device)[:, None])[:, None]
        self.tail_k, self.tail_v = (x.new_zeros(G, w + reserve, D) for x in (k, v))
        self.tail_length = 0
        self.append(k[:, T - w:], v[:, T - w:])

    def append(self, k, v, column=None):
        """Adds n entries to every head, from the first free column of the tail on. k, v: (G, n, D).
        Moves nothing that is there. column (1,): the device's own copy of that column's number.

        NOTE(official): there a CUDA kernel copies the layer's whole cache for every token."""
        start, end = self.tail_length, self.tail_length + k.shape[1]
        if end > self.tail_k.shape[1]:
            raise ValueError(f"the cache has no room for {end} recent entries; raise reserve")
        if column is None:
            self.tail_k[:, start:end], self.tail_v[:, start:end] = k, v
        else:
            self.tail_k.index_copy_(1, column, k), self.tail_v.index_copy_(1, column, v)
        self.tail_length = end

    def heads(self):
        """Per KV head four views: [selected keys, recent keys, selected values, recent values],
        (n, D) each."""
        t, packed_k, packed_v = self.tail_length, self.packed_k, self.packed_v
        return [[head_k, self.tail_k[g, :t], head_v, self.tail_v[g, :t]] for g, (head_k, head_v)
                in enumerate(zip(packed_k.split(self.lengths), packed_v.split(self.lengths)))]

    def attend(self, q, column=None):
        """What model_llava.decode_attention computes head by head, in a handful of products; equal
        up to rounding. q: (H, 1, D). Returns (H, 1, D).

        The tail is a rectangle, so one batched product serves all heads. So is the packed part if
        all heads hold equally many. If not, every query meets every packed key, and what is foreign
        to its head is masked: G times the multiplications, but each key and value is read once,
        nothing is padded and no long head keeps the others waiting.

        With `column`, where the newest entry stands, shapes stay the same from step to step, as a
        CUDA graph needs it: the whole tail is read, and its free columns are masked.
        """
        (H, _, D), G = q.shape, len(self.lengths)
        q = q.view(G, H // G, D) / math.sqrt(D)
        used = slice(self.tail_length if column is None else None)
        recent = q @ self.tail_k[:, used].transpose(1, 2)                          # (G, H/G, tail)
        if column is not None:
            columns = torch.arange(recent.shape[-1], device=q.device)
            recent = recent.masked_fill(columns > column, -torch.inf)
        if self.foreign is None:
            selected = q @ self.packed_k.view(G, -1, D).transpose(1, 2)             # (G, H/G, n_g)
        else:
            selected = (q.reshape(H, D) @ self.packed_k.T).view(G, H // G, -1)  # (G, H/G, sum n_g)
            selected = selected.masked_fill(self.foreign, -torch.inf)
        p = torch.cat([selected, recent], dim=-1).float().softmax(-1).to(q.dtype)
        selected, recent = p.split([selected.shape[-1], recent.shape[-1]], dim=-1)
        if self.foreign is None:
            out = selected @ self.packed_v.view(G, -1, D)
        else:
            out = (selected.reshape(H, -1) @ self.packed_v).view(G, H // G, D)
        return (out + recent @ self.tail_v[:, used]).view(H, 1, D)


class KVCache:
    """cache[l][g]: the tensors that head g of layer l holds, as LayerCache.heads gives them.

    A layer is compressed as soon as its prefill attention is done, so that no more than one layer's
    full keys and values exist at a time.

    NOTE(paper): keys are kept as RoPE turned them and positions are never renumbered; decoding
    appends one entry to every head and evicts nothing.
    """

    def __init__(self, method, window=32, reserve=0, by_head=False):
        """method: a Method; reserve: how many tokens will be appended at most; by_head: prefill
        and decode with the explicit loops over heads, the definition, not with their fast twins."""
        self.method, self.window, self.reserve, self.by_head = method, window, reserve, by_head
        self.column = None                    # see fix_shapes
        self.layers = []

    def __getitem__(self, layer):
        return self.layers[layer].heads()

    def __len__(self):
        return len(self.layers)

    def compress(self, layer, q, k, v):
        """Keeps what the method selects of a layer's prompt. q: (H, T, D), k: (G, T, D), after
        RoPE; v: (G, T, D). Layers come in order."""
        assert layer == len(self)
        scores = self.method.rank(q, k, self.window)                                     # (G, T-w)
        w = k.shape[1] - scores.shape[1]
        budgets = self.method.budgets(layer, scores).tolist()
        selected = [select_entries(s, n - w) for s, n in zip(scores, budgets)]
        self.layers.append(LayerCache(k, v, selected, w, self.reserve))

    def append(self, layer, k, v):
        """Adds the entry of one new token to every head of a layer. k, v: (G, 1, D)."""
        self.layers[layer].append(k, v, self.column)

    def attend(self, layer, q):
        """Attention of one new token over what a layer holds. q: (H, 1, D). Returns (H, 1, D)."""
        return self.layers[layer].attend(q, self.column)

    def make_room(self, n):
        """Reserves columns for n further tokens, which copies the tail."""
        self.column = None
        for layer in self.layers:
            layer.tail_k, layer.tail_v = (F.pad(tail[:, :layer.tail_length], (0, 0, 0, n))
                                          for tail in (layer.tail_k, layer.tail_v))

    @property
    def kept(self):
        """How many entries every head holds now: L lists of G ints."""
        return [[n + layer.tail_length for n in layer.lengths] for layer in self.layers]

    def fix_shapes(self):
        """From now on each decoding step runs the same kernels over the same memory, so that a CUDA
        graph can replay it. The column that it writes to is kept on the device, as `column`, which
        the caller raises by one after each step."""
        self.column = torch.tensor([self.tail_length], device=self.layers[0].tail_k.device)

    @property
    def tail_length(self):
        """Entries in every head's tail: the window and the tokens appended since."""
        return self.layers[0].tail_length

    @tail_length.setter
    def tail_length(self, length):
        for layer in self.layers:
            layer.tail_length = length

    def num_bytes(self):
        """Bytes of the entries held now, 2 * D * itemsize each; reserved columns do not count."""
        return sum(t.numel() * t.element_size() for l in range(len(self)) for head in self[l]
                   for t in head)


# ---- the command ---------------------------------------------------------------------------------

def main(argv=None):
    from experiments.arguments import OneLineParser, share, whole_number
    from experiments.draw import draw_budgets
    tiny = Path(__file__).parent / "tiny" / "qwen2-vl" / "visual_head_scores.json"
    parser = OneLineParser(prog="cache.py",
                           description="Draw the three parts of some heads' budgets.")
    parser.add_argument("--scores", default=tiny, help="visual scores (default: tiny/qwen2-vl)")
    parser.add_argument("--kv-heads", type=whole_number(1),
                        help="default: 4 for tiny/, else all query heads")
    parser.add_argument("--budget", type=whole_number(1), default=256)
    parser.add_argument("--length", type=whole_number(1), default=600, help="prompt tokens")
    parser.add_argument("--window", type=whole_number(1), default=32)
    parser.add_argument("--rho", type=share, default=0.1)
    args = parser.parse_args(argv)
    try:
        text = Path(args.scores).read_bytes() if Path(args.scores).is_file() else b""
        keys = re.findall(rb'"(\d+)-(\d+)"', text) or [(0, 0)]
        L, H = (1 + max(map(int, numbers)) for numbers in zip(*keys))
        G = args.kv_heads or (4 if args.scores == tiny else H)
        if H % G:
            raise ValueError(f"--kv-heads must divide the {H} query heads, not {G}")
        s = kv_head_scores(read_head_scores(args.scores, L, H), G)
        print(draw_budgets(s, args.budget, args.length, args.window, args.rho))
    except (OSError, ValueError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()
