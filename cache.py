"""The method: how many KV-cache entries each head may keep, which ones, and the cache for them.

SparseMM (Wang et al., "Head Sparsity Emerges from Visual Concept Responses in MLLMs", ICCV 2025,
arXiv 2506.05344) gives every KV head a budget of three parts. SnapKV's rule (arXiv 2404.14469) then
chooses which entries a head keeps.

    the budget of one head          ### window w    === uniform r    +++ by visual score

        looks at the image          ###===++++++++++++++++++++++++++++++++++++++++
        does not                    ###===+

    the cache of one layer          one tensor of keys and one of values, head after head; each
                                    head's entries in order of position, with free room behind them

        [ head 0: selected, window, generated | room ][ head 1: selected, window, generated | room ]

Letters: L layers, H query heads, G KV heads, R = H/G query heads of one KV head, T prompt length,
D head size, w window, N = L*G KV heads in all, b budget per KV head, B = N*b total budget. Head
scores (L, H) say how much a head looks at the image; position scores (G, T-w) say how much the end
of the prompt looks at an earlier position. `python cache.py` draws the three parts for some heads.
"""

import argparse
import json
import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F

METHODS = ("full", "sparsemm", "snapkv", "pyramidkv", "adakv", "random", "shuffled", "window",
           "streaming")
NEEDS_HEAD_SCORES = ("sparsemm", "shuffled")
ROOM = 64                          # free entries behind each head, for tokens to come


# ---- the budget: window, uniform, score ----------------------------------------------------------

def allocate_budgets(head_scores, budget, length, window=32, rho=0.1, redistribute=True):
    """The three-part budget of every KV head ("Three-Component KV-Cache Allocation"):

        r = rho * (B - N*w) / N
        b[l,g] = w + r + (B - N*w - N*r) * s[l,g] / sum(s)

    head_scores: s (L, G), finite, >= 0, not all zero; budget: b, entries per KV head on average;
    length: prompt length T, an int or one per layer (L,). Returns (L, G) int64. No head can hold
    more than T entries: the surplus goes to the other heads in proportion to their scores, so that
    the sum is exactly min(B, N*T). With redistribute=False the surplus is lost.

    NOTE(official): the authors' code always loses it: with their LLaVA scores and 2,900 tokens,
    58 % of the budget at b = 2048. It also rounds each head separately, so that the total drifts.
    """
    check_settings(budget, window, rho)
    s = torch.as_tensor(head_scores, dtype=torch.float64)
    if s.dim() != 2 or not (s.isfinite() & (s >= 0)).all() or s.sum() == 0:
        raise ValueError("head scores must be (layers, KV heads), finite, >= 0 and not all zero")
    caps = torch.as_tensor(length, dtype=torch.int64).reshape(-1, 1).expand_as(s)
    N = s.numel()
    B = N * budget
    r = rho * (B - N * window) / N
    b = window + r + (B - N * window - N * r) * s / s.sum()
    if not redistribute:
        return torch.minimum(round_to_total(b, B), caps)
    if B >= caps.sum():
        return caps.clone()
    return round_to_total(pour_surplus(b, caps, s), B)


def check_settings(budget, window, rho):
    """Raises ValueError unless 1 <= window <= budget and 0 <= rho <= 1."""
    if window < 1:
        raise ValueError(f"--window {window}: must be at least 1")
    if budget < window:
        raise ValueError(f"--budget {budget}: must be at least the window ({window})")
    if not 0 <= rho <= 1:
        raise ValueError(f"--rho {rho}: must be between 0 and 1")


def pour_surplus(b, caps, s):
    """Water-filling: b (L, G) float64 is cut at caps; the surplus goes to the heads below their cap
    in proportion to their scores s, until nothing is left. Heads of score zero share equally."""
    b, full = b.clone(), torch.zeros_like(b, dtype=torch.bool)
    while (over := (b > caps) & ~full).any():
        surplus = (b - caps)[over].sum()
        full |= over
        b = torch.where(full, caps.double(), b)
        weight = torch.where(full, 0.0, s)
        weight = weight if weight.any() else (~full).double()
        b += surplus * weight / weight.sum()
    return b


def round_to_total(b, total):
    """Largest-remainder rounding: float64 budgets -> int64 budgets whose sum is exactly `total`. Of
    equal remainders (to 1e-9: no float noise) the earlier head gets the extra entry."""
    b = b.round(decimals=9)
    whole = b.floor()
    remainders = (b - whole).round(decimals=9).flatten()
    first = remainders.argsort(descending=True, stable=True)
    rounded = whole.long().flatten()
    rounded[first[:total - int(rounded.sum())]] += 1
    return rounded.view(b.shape)


def kv_head_scores(head_scores, G):
    """Scores of KV heads (L, G) float64: the sum over the R query heads of each, (L, H), since one
    cache serves all of them."""
    L, H = head_scores.shape
    return torch.as_tensor(head_scores, dtype=torch.float64).view(L, G, H // G).sum(-1)


# ---- which entries: SnapKV's observation window --------------------------------------------------

def attention_logits(q, k):
    """Q K^T / sqrt(D) of the last n of T positions, for the R query heads of one KV head; -inf for
    keys in the future. q: (R, n, D); k: (T, D), both after RoPE. Returns (R, n, T) float32."""
    (_, n, D), T = q.shape, len(k)
    logits = q.float() / math.sqrt(D) @ k.float().T                                      # (R, n, T)
    future = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)       # of the last n keys
    logits[:, :, T - n:].masked_fill_(future, -math.inf)
    return logits


def attention_rows(q, k):
    """softmax(Q K^T / sqrt(D)): the attention rows, (R, n, T), of attention_logits."""
    return attention_logits(q, k).softmax(-1)


def observed_attention(q, k, window=32, kernel=5):
    """Position scores: how much the last w queries of the prompt look at each earlier position
    (SnapKV, section 4):

        A = softmax(Q[-w:] K^T / sqrt(D))      causal, over all T keys
        a[g] = mean of A over the w queries and the R query heads of KV head g, then averaged over
               `kernel` neighbouring positions (beyond the ends counts as 0)

    q: (H, T, D), or only its last w rows; k: (G, T, D), both after RoPE. Returns (G, T-w) float32,
    in O(T*w). NOTE(official): half precision there, in which many scores tie and chance decides.
    """
    (G, T, _), R = k.shape, len(q) // len(k)
    w = min(window, T)
    a = torch.empty(G, T - w, dtype=torch.float32, device=q.device)
    for g in range(G):
        A = attention_rows(q[g * R:(g + 1) * R, -w:], k[g])                              # (R, w, T)
        a[g] = A[:, :, :T - w].mean((0, 1))
    if T == w:
        return a
    return F.avg_pool1d(a[:, None], kernel, stride=1, padding=kernel // 2)[:, 0]  # (G,1,n)->(G,n)


def select_entries(position_scores, budgets, T):
    """Which positions each head keeps, (G, T) bool: the last w, and its best of the first T-w by
    position_scores (G, T-w). budgets: (G,), window included. Of equal scores
    the lower position wins."""
    G, n = position_scores.shape
    order = position_scores.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)                             # of each position in that order, from 0
    best = rank < (budgets.to(rank.device) - (T - n))[:, None]
    return F.pad(best, (0, T - n), value=True)


# ---- the cache -----------------------------------------------------------------------------------

class KVCache:
    """cache[l][g] = keys, values, (n, D) each: what KV head g of layer l holds, by position.

    A layer is compressed as soon as its prefill attention is done, so that no more than one layer's
    full keys and values exist at a time. Decoding appends one entry to every head and evicts
    nothing.

    NOTE(paper): keys are cached after RoPE, and positions are never renumbered (the paper does not
    say): query-key distances stay those of the full prompt.
    """

    def __init__(self, plan):
        """plan: a Plan, which says how many entries each head keeps, and which."""
        self.plan = plan
        self.keys, self.values = [], []     # per layer (rows, D): head after head, room behind each
        self.kept = []                      # per layer G ints: entries of the prompt in each head
        self.appended, self.room = 0, ROOM  # entries after the prompt, and room for them, per head
        self.newest = None                  # (L, G): the row of every head's newest entry

    def compress(self, layer, q, k, v):
        """Keeps what the plan selects of one layer's prompt. q: (H, T, D), k: (G, T, D), after
        RoPE; v: (G, T, D). Layers come in order."""
        T = k.shape[1]
        a = self.plan.position_scores(q, k, self.plan.window)                            # (G, T-w)
        keep = select_entries(a, self.plan.budgets(layer, a), T)                           # (G, T)
        self.kept.append(keep.sum(1).tolist())
        heads, rows = F.pad(keep, (0, self.room), value=True).nonzero(as_tuple=True)
        rows = rows.clamp(max=T - 1)                 # free rows hold a copy, which nothing reads
        self.keys.append(k[heads, rows])
        self.values.append(v[heads, rows])

    def __getitem__(self, layer):
        """What the G heads of a layer hold: pairs of views, keys and values, (n, D) each."""
        n, free = self.appended, self.room - self.appended
        sizes = [size for kept in self.kept[layer] for size in (kept + n, free)]
        return list(zip(self.keys[layer].split(sizes)[::2], self.values[layer].split(sizes)[::2]))

    def starts(self, layer):
        """The rows of a layer's tensors at which its G heads start."""
        sizes = [kept + self.room for kept in self.kept[layer]]
        return [sum(sizes[:g]) for g in range(len(sizes))]

    def reserve(self):
        """Makes room for one more entry in every head, before each decoding step; `append` writes
        the entries. Returns whether the tensors had to move."""
        moved = self.appended == self.room
        if moved:
            self.grow(self.room)
        self.appended += 1
        if self.newest is None:
            ends = [[start + n for start, n in zip(self.starts(l), kept)]
                    for l, kept in enumerate(self.kept)]
            self.newest = torch.tensor(ends, device=self.keys[0].device) + self.appended - 1
        else:
            self.newest += 1
        return moved

    def append(self, layer, k, v):
        """Writes the newest entry of every head of a layer. k, v: (G, 1, D). NOTE(official): there
        a CUDA kernel copies the layer's whole cache for every token."""
        self.keys[layer].index_copy_(0, self.newest[layer], k[:, 0])
        self.values[layer].index_copy_(0, self.newest[layer], v[:, 0])

    def grow(self, more):
        """Moves all tensors to new ones in which each head has room for `more` further entries."""
        for l, kept in enumerate(self.kept):
            rows = torch.cat([F.pad(torch.arange(start, start + n + self.room), (0, more), value=0)
                              for start, n in zip(self.starts(l), kept)]).to(self.keys[l].device)
            self.keys[l], self.values[l] = self.keys[l][rows], self.values[l][rows]
        self.room, self.newest = self.room + more, None

    def held(self):
        """How many entries every head holds now: L lists of G ints."""
        return [[n + self.appended for n in kept] for kept in self.kept]

    def held_bytes(self):
        """Bytes of the entries held now, 2 * D * itemsize each."""
        return sum(sum(held) * 2 * k.shape[1] * k.element_size()
                   for held, k in zip(self.held(), self.keys))

    def allocated_bytes(self):
        """Bytes of the tensors, room included."""
        return sum(x.nbytes for x in (*self.keys, *self.values))


def decode_attention(q, heads):
    """The attention of one new token: each query head attends to what its KV head holds. q: (H, 1,
    D); heads: for each KV head its keys and values, (n, D) each. Returns (H, 1, D). Logits are
    float32 in every dtype: Qwen2-VL's key biases make logits near 1,000, where numbers in bfloat16
    are 4 apart."""
    (_, _, D), out = q.shape, []
    for q_g, (K, V) in zip(q.view(len(heads), -1, D).float() / math.sqrt(D), heads):        # (R, D)
        p = (q_g @ K.float().T).softmax(-1)                                                 # (R, n)
        out.append(p.to(V.dtype) @ V)                                                       # (R, D)
    return torch.cat(out)[:, None]


# ---- the methods: sparsemm, and what it is compared with -----------------------------------------

@dataclass(frozen=True)
class Method:
    """A method and its settings. Raises ValueError for bad ones."""
    name: str = "sparsemm"              # one of METHODS
    budget: int = 256                   # b, entries per KV head on average
    window: int = 32                    # w, the last positions of the prompt, which all heads keep
    rho: float = 0.1                    # share of the rest that all heads get alike
    redistribute: bool = True           # see allocate_budgets
    head_scores: torch.Tensor = None    # (L, H) of the query heads, for NEEDS_HEAD_SCORES
    seed: int = 0                       # for random and shuffled

    def __post_init__(self):
        if self.name not in METHODS:
            raise ValueError(f"--method {self.name}: must be one of {', '.join(METHODS)}")
        if self.name != "full":
            check_settings(self.budget, self.window, self.rho)
        if self.name in NEEDS_HEAD_SCORES and self.head_scores is None:
            raise ValueError(f"--method {self.name}: needs head scores; score_heads.py makes them")


@dataclass
class Plan:
    """A method's budgets and selection for one prompt."""
    budgets: Callable           # (layer, position scores (G, T-w)) -> (G,) entries, window included
    position_scores: Callable   # (q (H, T, D), k (G, T, D), window) -> (G, T-w) to select by
    window: int


def make_plan(method, L, G, T):
    """The Plan of a Method for a prompt of T tokens, L layers and G KV heads. All methods but full
    spend the same total, L*G*budget. If the prompt fits the budget, all keep it whole. A method of
    your own is one more branch here, and a name in METHODS."""
    m, w = method, method.window
    if m.name == "full" or T <= m.budget:
        return Plan(lambda layer, a: torch.full((G,), T), recency, w)
    if m.name == "adakv":
        return Plan(lambda layer, a: adakv_budgets(a, m.budget, w), observed_attention, w)
    if m.name == "pyramidkv":
        table = pyramid_budgets(L, m.budget, T, w)[:, None].expand(L, G)
    elif m.name in ("snapkv", "window", "streaming"):
        table = torch.full((L, G), m.budget)
    else:                                                             # sparsemm, shuffled, random
        shares = head_shares(m, L, G)
        table = allocate_budgets(shares, m.budget, T, w, m.rho, m.redistribute)
    by_position = {"window": recency, "streaming": partial(recency, first=4)}
    return Plan(lambda layer, a: table[layer], by_position.get(m.name, observed_attention), w)


def head_shares(method, L, G):
    """The scores (L, G) float64 that divide the budget: the visual scores
    (sparsemm), or a control's, drawn once with the seed. `random` draws other numbers. `shuffled`
    permutes the visual scores over the heads, which keeps their distribution. NOTE(paper):
    `shuffled` is ours. NOTE(official): `random` is drawn anew in every layer there."""
    generator = torch.Generator().manual_seed(method.seed)
    if method.name == "random":
        return torch.rand(L, G, generator=generator, dtype=torch.float64)
    visual = kv_head_scores(method.head_scores, G)
    if method.name == "shuffled":
        return visual.flatten()[torch.randperm(L * G, generator=generator)].view(L, G)
    return visual


def pyramid_budgets(L, budget, length, window):
    """PyramidKV's budgets (arXiv 2406.02069): beyond the window, linear in the layer from n_max
    down to n_min = n // 20 with mean n = budget - window. If T - window caps n_max, n_min rises
    as much. Returns (L,) int64 with sum L*budget. NOTE(official): there the first
    prompt's capacities serve all later prompts, and integer steps overspend by up to 11 %."""
    n = budget - window
    n_max = min(2 * n - n // 20, length - window)
    slope = torch.linspace(1, -1, L, dtype=torch.float64) if L > 1 else torch.zeros(1)
    return window + round_to_total(n + (n_max - n) * slope.double(), n * L)


def adakv_budgets(position_scores, budget, window, uniform=0.2):
    """AdaKV's budgets (arXiv 2407.11550) within one layer, (G,) int64 with sum G*budget: all heads'
    entries are ranked together. First, each head's position_scores (G, T-w) are multiplied by the
    share of their sum that its best n = budget - window hold. A head gets its count among the best
    G*n, mixed with a uniform share."""
    a, (G, positions) = position_scores, position_scores.shape
    n = min(budget - window, positions)
    held = a.topk(n, dim=1).values.sum(1) / a.sum(1).clamp(min=1e-30)
    ranked = (a * held[:, None]).flatten().argsort(descending=True, stable=True)
    count = torch.bincount(ranked[:G * n] // positions, minlength=G).double().cpu()
    return window + round_to_total((1 - uniform) * count + uniform * n, G * n)


def recency(q, k, window=32, first=0):
    """Position scores (G, T-w) by position alone: the later the better. The `first` positions are
    best of all (attention sinks, StreamingLLM, arXiv 2309.17453)."""
    G, T, _ = k.shape
    a = torch.arange(max(0, T - window), dtype=torch.float32, device=k.device)
    a[:first] = math.inf
    return a.expand(G, -1)


# ---- score files, and the command that draws budgets ---------------------------------------------

@contextmanager
def reading(what):
    """Raises any error inside again as ValueError("{what}: {reason}"), except out of memory."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:                 # readers of damaged files raise what they please
        reason = getattr(error, "strerror", None) or str(error)
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__} "
        raise ValueError(f"{what}: {kind}{reason}") from error


def read_head_scores(path, L=None, H=None):
    """Visual scores (L, H) float64 from a file in the authors' format, {"layer-head": [numbers]}:
    the mean of each query head's list, divided by the sum over all heads. L, H: the model's layers
    and heads; None: as many as the file names. Raises ValueError that names the file."""
    with reading(f'--scores {path}: must be {{"layer-head": [numbers]}}'):
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        lists = {tuple(map(int, key.split("-"))): numbers for key, numbers in table.items()}
        if L is None:
            L, H = (1 + max(numbers) for numbers in zip(*lists))
        heads = [(l, h) for l in range(L) for h in range(H)]
        if sorted(lists) != heads:
            raise ValueError(f"must have {L} layers x {H} heads")
        means = [sum(lists[head]) / len(lists[head]) for head in heads]
        s = torch.tensor(means, dtype=torch.float64)
        if not s.isfinite().all() or min(map(min, lists.values())) < 0 or s.sum() == 0:
            raise ValueError("numbers must be finite, >= 0 and not all zero")
    return (s / s.sum()).view(L, H)


def draw_budgets(s, budget, length, window, rho, rows=5, columns=60):
    """Text: the three parts of the budget of the best, some middle and the worst heads of s (L, G),
    drawn to scale. A non-empty part gets at least one mark."""
    kept = allocate_budgets(s, budget, length, window, rho)
    (L, G), N = kept.shape, kept.numel()
    lines = [f"{L} layers x {G} KV heads, a prompt of {length} tokens, budget {budget} per head: "
             f"{kept.sum():,} of {N * length:,} entries kept",
             "  # window (last positions)    = uniform    + by visual score"]
    order = s.flatten().argsort(descending=True, stable=True).tolist()
    groups = [order[:rows], order[N // 2:N // 2 + rows], order[-rows:]] if N > 4 * rows else [order]
    for group in groups:
        for i in group:
            n = kept.flatten()[i].item()
            w = min(window, n)
            r = min(round(rho * (budget - window)), n - w)
            bar = "".join(mark * max(part > 0, round(part * columns / kept.max().item()))
                          for mark, part in (("#", w), ("=", r), ("+", n - w - r)))
            lines.append(f"  layer {i // G:2d} head {i % G:2d}  score {s.flatten()[i]:6.2%}  "
                         f"{n:5d}  {bar}")
        lines.append("  ...")
    return "\n".join(lines[:-1])


def main(argv=None):
    parser = argparse.ArgumentParser("cache.py", description="Draw the parts of heads' budgets.")
    parser.error = lambda message: parser.exit(2, f"cache.py: error: {message}\n")       # one line
    tiny, add = Path(__file__).parent / "tiny/qwen2-vl/visual_head_scores.json", parser.add_argument
    add("--scores", default=tiny, help="visual head scores (default: those of tiny/qwen2-vl)")
    add("--kv-heads", type=int, help="default: by the config.json beside the scores, if any")
    add("--budget", type=int, default=256)
    add("--length", type=int, default=600, help="prompt tokens")
    add("--window", type=int, default=32)
    add("--rho", type=float, default=0.1)
    args = parser.parse_args(argv)
    try:
        head_scores = read_head_scores(args.scores)
        H = head_scores.shape[1]
        config = Path(args.scores).with_name("config.json")
        with reading(config):
            config = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
        G = args.kv_heads or config.get("text_config", config).get("num_key_value_heads", H)
        if G < 1 or H % G or args.length < 1:
            raise ValueError(f"--kv-heads {G}: must divide {H}; --length: must be at least 1")
        s = kv_head_scores(head_scores, G)
        print(draw_budgets(s, args.budget, args.length, args.window, args.rho), flush=True)
    except Exception as error:                                            # no traceback for a user
        parser.error(error)


if __name__ == "__main__":
    main()
