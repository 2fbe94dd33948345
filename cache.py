"""The method: how many KV-cache entries each head may keep, which ones, and the cache for them.

SparseMM (Wang et al., "Head Sparsity Emerges from Visual Concept Responses in MLLMs", ICCV 2025,
arXiv 2506.05344) gives every KV head a budget of three parts. The entries to keep are then chosen
as in SnapKV (arXiv 2404.14469).

    the budget of one head          ### window w    === uniform r    +++ by visual score

        looks at the image          ###===++++++++++++++++++++++++++++++++++++++++
        does not                    ###===+

    the cache of one layer          one tensor of keys and one of values, head after head, each
                                    head's entries in order of position, with room behind them

        [ head 0: selected, window, generated | room ][ head 1: selected, window, generated | room ]

Letters: L layers, H query heads, G KV heads, R = H/G query heads of a group, T prompt length, D
head size, w window, N = L*G, b budget per KV head, B = N*b in all. Two kinds of scores: head scores
(L, H) say how much a head looks at the image, position scores (G, T-w) how much a prompt's position
is looked at. A method is data: budgets (L, G), and position scores to select by. Run this file to
see the three parts drawn for some heads:

    python cache.py [--scores FILE] [--kv-heads G] [--budget 256] [--length 600]
"""

import argparse
import io
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F

METHODS = ("full", "sparsemm", "snapkv", "pyramidkv", "adakv", "random", "shuffled", "window",
           "streaming")
NEEDS_HEAD_SCORES = ("sparsemm", "shuffled")
ROOM = 64                          # entries, behind those of each head, for tokens to come


# ---- the budget: window, uniform, score ----------------------------------------------------------

def allocate_budgets(head_scores, budget, length, window=32, rho=0.1, redistribute=True):
    """The three-part budget of every KV head ("Three-Component KV-Cache Allocation"):

        r = rho * (B - N*w) / N
        b[l,g] = w + r + (B - N*w - N*r) * s[l,g] / sum(s)

    head_scores: s (L, G), finite, >= 0, not all zero; budget: b, entries per KV head on average;
    length: prompt length T, an int or one per layer (L,). No head can hold more than T entries:
    what it cannot hold goes to the others in proportion to their scores, so that the sum is exactly
    min(B, sum of T). With redistribute=False it is lost. Returns (L, G) int64. Raises ValueError
    for bad arguments.

    NOTE(official): the authors' code always clips at T and loses the rest: with their LLaVA scores
    and 2,900 tokens, 58 % of the budget at b = 2048. It also rounds each head by itself, so that
    the total drifts.
    """
    s, caps = check_allocation(head_scores, budget, length, window, rho)
    N = s.numel()
    B = N * budget
    r = rho * (B - N * window) / N
    b = window + r + (B - N * window - N * r) * s / s.sum()
    if not redistribute:
        return torch.minimum(round_to_total(b, B), caps)
    if B >= caps.sum():
        return caps
    return round_to_total(pour_surplus(b, caps, s), B)


def check_allocation(head_scores, budget, length, window, rho):
    """The arguments of allocate_budgets, checked: s (L, G) float64 and T (L, G) int64."""
    check_settings(budget, window, rho)
    s = torch.as_tensor(head_scores, dtype=torch.float64)
    require(s.dim() == 2 and torch.isfinite(s).all() and (s >= 0).all() and s.sum() > 0,
            "head scores must be (layers, KV heads), finite, >= 0 and not all zero")
    T = torch.as_tensor(length, dtype=torch.int64).reshape(-1, 1)
    require(T.numel() in (1, len(s)) and (T >= 1).all(),
            f"length must be one integer >= 1 or {len(s)} of them, not {length}")
    return s / s.max(), T.expand_as(s).clone()                  # so that no sum of them overflows


def check_settings(budget, window, rho):
    """Raises ValueError unless 1 <= window <= budget and 0 <= rho <= 1."""
    require(window >= 1, f"window must be at least 1, not {window}")
    require(budget >= window, f"budget must be at least the window of {window}, not {budget}")
    require(0 <= rho <= 1, f"rho must be between 0 and 1, not {rho}")


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
        weight = weight / weight.max() if weight.any() else (~full).double()
        b += surplus * weight / weight.sum()
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


def kv_head_scores(head_scores, G):
    """Query-head scores (L, H) -> (L, G) float64: a KV head has the sum over its query heads, since
    one cache serves them all, and a group in which two heads look needs no less than one head."""
    L, H = head_scores.shape
    return torch.as_tensor(head_scores, dtype=torch.float64).view(L, G, H // G).sum(-1)


# ---- which entries: SnapKV's observation window --------------------------------------------------

def observed_attention(q, k, window=32, kernel=5):
    """Position scores: how much the last w queries of the prompt look at each earlier position
    (SnapKV, section 4):

        A = softmax(Q[-w:] K^T / sqrt(D))      causal, float32, over all T keys
        a[g] = mean of A over the w queries and the R query heads of KV head g, then averaged over
               `kernel` neighbouring positions (zeros beyond both ends count)

    q: (H, T, D), or only its last w rows; k: (G, T, D), both after RoPE. Returns (G, T-w) float32.
    O(T*w), not O(T^2). Heads count by their sum in kv_head_scores, but by their mean here: only the
    order of a head's own positions matters, and all of a group are in one softmax scale.

    NOTE(official): there these scores are half precision, in which chance decides among many ties.
    """
    (G, T, D), R = k.shape, len(q) // len(k)
    w = min(window, T)
    future = torch.ones(w, T, dtype=torch.bool, device=q.device).triu(T - w + 1)
    a = torch.empty(G, T - w, dtype=torch.float32, device=q.device)
    for g in range(G):
        Q, K = q[g * R:(g + 1) * R, -w:].float(), k[g].float()                 # (R, w, D), (T, D)
        A = (Q @ K.T / math.sqrt(D)).masked_fill_(future, -math.inf).softmax(-1)       # (R, w, T)
        a[g] = A[:, :, :T - w].mean((0, 1))
    if T == w:
        return a
    return F.avg_pool1d(a[:, None], kernel, stride=1, padding=kernel // 2)[:, 0]  # (G,1,n)->(G,n)


def select_entries(position_scores, budgets, T):
    """Which positions each head keeps, (G, T) bool: of the first T - w its best ones by
    position_scores (G, T-w), and the last w, which every head keeps; budgets[g] in all, (G,).
    Of equal scores the lower position wins. A prompt within the window is kept whole."""
    G, n = position_scores.shape
    order = position_scores.argsort(dim=1, descending=True, stable=True)
    places = order.argsort(dim=1)                           # of each position in that order, from 0
    best = places < (budgets.to(places.device) - (T - n))[:, None]
    return F.pad(best, (0, T - n), value=True)


# ---- the cache -----------------------------------------------------------------------------------

class KVCache:
    """cache[l][g] = keys, values, (n, D) each: what KV head g of layer l holds, by position.

    A layer is compressed as soon as its prefill attention is done, so that no more than one layer's
    full keys and values exist at a time; to compress later would select the same entries.

    NOTE(paper): keys are kept as RoPE turned them and positions are never renumbered: a query still
    sees every entry at the distance at which the model was trained to see it. Decoding appends one
    entry to every head and evicts nothing.
    """

    def __init__(self, method, window=32):
        """method: a Method; window: w, which every head keeps."""
        self.method, self.window = method, window
        self.keys, self.values = [], []     # per layer (rows, D): head after head, room behind each
        self.kept = []                      # per layer G ints: entries of the prompt in each head
        self.appended, self.room = 0, ROOM  # of all heads: entries after the prompt, and room
        self.newest = None                  # (L, G): the row of every head's newest entry

    def compress(self, layer, q, k, v):
        """Keeps what the method selects of a layer's prompt. q: (H, T, D), k: (G, T, D), after
        RoPE; v: (G, T, D). Layers come in order."""
        T = k.shape[1]
        a = self.method.position_scores(q, k, self.window)                               # (G, T-w)
        keep = select_entries(a, self.method.budgets(layer, a), T)                         # (G, T)
        self.kept.append(keep.sum(1).tolist())
        heads, rows = F.pad(keep, (0, self.room), value=True).nonzero(as_tuple=True)
        rows = rows.clamp(max=T - 1)                         # any finite numbers fill the room
        self.keys.append(k[heads, rows])
        self.values.append(v[heads, rows])

    def __getitem__(self, layer):
        """G pairs of views: keys, values, (n, D) each."""
        n, free = self.appended, self.room - self.appended
        sizes = [size for kept in self.kept[layer] for size in (kept + n, free)]
        return list(zip(self.keys[layer].split(sizes)[::2], self.values[layer].split(sizes)[::2]))

    def starts(self, layer):
        """The rows of a layer's tensors at which its G heads start."""
        sizes = [kept + self.room for kept in self.kept[layer]]
        return [sum(sizes[:g]) for g in range(len(sizes))]

    def extend(self):
        """Before each decoding step: one entry more for every head, which `append` then fills layer
        by layer. Returns whether the tensors had to be moved to make room for it."""
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
        """Writes the newest entry of every head of a layer. k, v: (G, 1, D). Nothing else moves.

        NOTE(official): there a CUDA kernel copies the layer's whole cache for every token."""
        self.keys[layer].index_copy_(0, self.newest[layer], k[:, 0])
        self.values[layer].index_copy_(0, self.newest[layer], v[:, 0])

    def grow(self, more):
        """Moves all tensors to where each head has room for `more` further entries."""
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
    """One new token against what each head holds. q: (H, 1, D); heads: for each KV head (keys,
    values), (n, D) each. Returns (H, 1, D).

    Logits and softmax are float32 in every dtype: in bfloat16 a logit of 1,000, which key biases
    make usual in Qwen2-VL, would be off by up to 4.
    """
    H, _, D = q.shape
    out = []
    for q_g, (K, V) in zip(q.view(len(heads), -1, D).float() / math.sqrt(D), heads):
        p = (q_g @ K.float().T).softmax(-1)                                                # (R, n)
        out.append(p.to(V.dtype) @ V)                                                      # (R, D)
    return torch.cat(out)[:, None]


# ---- for CUDA: the same in five kernels a layer, which nobody needs to understand the method -----

class PackedAttention:
    """The fast twin of decode_attention, equal up to rounding: a layer's tensors are read whole,
    and what a query must not see, other heads' entries and free room, gets a logit of -inf, which
    the softmax turns into a weight of exactly 0. Shapes stay the same from step to step, as a CUDA
    graph needs it.

    Where all heads hold equally many entries, one batched product serves them. Where not, every
    query meets every entry of the layer: G times the multiplications, of which a GPU has plenty,
    but each key and value is read once, and no long head keeps the others waiting.
    """

    def __init__(self, cache):
        """cache: a KVCache after `extend`. The next `extend` that moves its tensors ends the use of
        this."""
        layers = [self.lay_out(cache, l) for l in range(len(cache.kept))]
        sizes, device = [mask.numel() for mask, _ in layers], cache.keys[0].device
        self.cache, self.mask = cache, torch.cat([mask.flatten() for mask, _ in layers]).to(device)
        self.masks = [part.view(mask.shape)
                      for part, (mask, _) in zip(self.mask.split(sizes), layers)]
        self.newest = torch.cat([newest + sum(sizes[:l]) for l, (_, newest) in enumerate(layers)])
        self.newest = self.newest.to(device)                  # in mask: every head's newest entry

    @staticmethod
    def lay_out(cache, layer):
        """mask (G, n) float32: 0 where a query of group g may look, else -inf; n: the rows of the
        layer, or of one of its heads if all are alike. newest (G,): where in it, flattened, the
        newest entries are."""
        kept, room, starts = cache.kept[layer], cache.room, torch.tensor(cache.starts(layer))
        n = len(cache.keys[layer])
        if len(set(kept)) == 1:
            n, starts = kept[0] + room, torch.zeros_like(starts)
        ends, column = starts + torch.tensor(kept) + cache.appended, torch.arange(n)
        mine = (column >= starts[:, None]) & (column < ends[:, None])
        return torch.where(mine, 0.0, -math.inf), torch.arange(len(kept)) * n + ends - 1

    def extend(self):
        """After the cache's: opens the newest entry of every head."""
        self.newest += 1
        self.mask.index_fill_(0, self.newest, 0.0)

    def attend(self, layer, q, k, v):
        """Appends k, v (G, 1, D), and attends. q: (H, 1, D). Returns (H, 1, D)."""
        (H, _, D), mask = q.shape, self.masks[layer][:, None]                           # (G, 1, n)
        G, _, n = mask.shape
        self.cache.append(layer, k, v)
        keys, values = (x[layer].view(-1, n, D) for x in (self.cache.keys, self.cache.values))
        batches = len(keys)                                      # G if all heads are alike, else 1
        logits = float32_product(q.view(batches, -1, D), keys.transpose(1, 2)).view(G, -1, n)
        p = torch.add(mask, logits, alpha=1 / math.sqrt(D)).softmax(-1).to(v.dtype)     # (G, R, n)
        return (p.view(batches, -1, n) @ values).view(H, 1, D)


def float32_product(a, b):
    """a @ b, added up and kept in float32: (B, m, D) x (B, D, n). A CPU has no such kernel."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


# ---- the methods: sparsemm, and what it is compared with -----------------------------------------

@dataclass
class Method:
    """A method is two functions, not a forward pass."""
    budgets: Callable           # (layer, position scores (G, T-w)) -> (G,) entries, window included
    position_scores: Callable   # (q (H, T, D), k (G, T, D), window) -> (G, T-w) to select by


def make_method(name, L, G, length, budget=256, window=32, rho=0.1, redistribute=True,
                head_scores=None, seed=0):
    """The Method `name` for one prompt of `length` tokens.

    length: an int, or one per layer (L,); head_scores: of the query heads (L, H); only sparsemm and
    shuffled need them. All methods spend the same total, and a prompt that fits the budget is kept
    whole by every one. Raises ValueError for bad arguments.
    """
    require(name in METHODS, f"method must be one of {', '.join(METHODS)}, not {name!r}")
    check_settings(budget, window, rho)
    require(0 <= seed < 2**63, f"seed must be between 0 and 2**63 - 1, not {seed}")
    require(name not in NEEDS_HEAD_SCORES or head_scores is not None,
            f"method {name} needs visual head scores")
    T = torch.as_tensor(length).expand(L)
    if name == "full" or T.max() <= max(budget, window):
        return Method(lambda layer, a: T[layer].expand(G), recency)
    if name == "adakv":
        return Method(lambda layer, a: adakv_budgets(a, budget, window), observed_attention)
    if name in ("sparsemm", "shuffled", "random"):
        s = shared_out_by(name, L, G, head_scores, seed)
        table = allocate_budgets(s, budget, length, window, rho, redistribute)
    elif name == "pyramidkv":
        table = pyramid_budgets(L, budget, T.max().item(), window)[:, None].expand(L, G)
    else:                                                               # snapkv, window, streaming
        table = torch.full((L, G), budget)
    by_position = {"window": recency, "streaming": partial(recency, first=4)}
    return Method(lambda layer, a: table[layer], by_position.get(name, observed_attention))


def shared_out_by(name, L, G, head_scores, seed):
    """The scores (L, G) float64 that share out the budget: the visual ones (sparsemm), or those of
    a control, drawn once with the seed. `random` has other numbers, `shuffled` the visual ones in
    other places, which is the fairer: it is as concentrated.

    NOTE(official): its random control draws anew in every layer. NOTE(paper): `shuffled` is ours.
    """
    generator = torch.Generator().manual_seed(seed)
    if name == "random":
        return torch.rand(L, G, generator=generator, dtype=torch.float64)
    visual = kv_head_scores(head_scores, G)
    if name == "shuffled":
        return visual.flatten()[torch.randperm(L * G, generator=generator)].view(L, G)
    return visual


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


def adakv_budgets(position_scores, budget, window, uniform=0.2):
    """AdaKV (arXiv 2407.11550) within one layer: all heads' entries are ranked together, and a head
    gets as many as it has among the best G*n, n = budget - window, mixed with a uniform share.

    position_scores: (G, T - w). Before ranking, those of a head are weighted by the share of their
    mass that its best n hold. Returns (G,) int64 with sum G*budget.
    """
    a, (G, positions) = position_scores, position_scores.shape
    n = min(budget - window, positions)
    held = a.topk(n, dim=1).values.sum(1) / a.sum(1).clamp(min=1e-30)
    ranked = (a * held[:, None]).flatten().argsort(descending=True, stable=True)
    count = torch.bincount(ranked[:G * n] // positions, minlength=G).double().cpu()
    return window + round_to_total((1 - uniform) * count + uniform * n, G * n)


def recency(q, k, window=32, first=0):
    """Position scores (G, T-w) by position alone: the later the better; the `first` ones best of
    all (attention sinks, StreamingLLM, arXiv 2309.17453)."""
    G, T, _ = k.shape
    a = torch.arange(max(0, T - window), dtype=torch.float32, device=k.device)
    a[:first] = math.inf
    return a.expand(G, -1)


# ---- score files ---------------------------------------------------------------------------------

def read_head_scores(path, L=None, H=None):
    """Reads visual scores in the authors' format, {"layer-head": [numbers]}, one list for each
    query head: the mean of each list, then the sum set to 1. L, H: the model's layers and heads;
    None: as many as the file names. Returns (L, H) float64.

    Raises ValueError, in one line that names the file, unless every head is there once, with a
    non-empty list of finite numbers >= 0, not all of them zero.
    """
    table = read_json(path, "scores")
    require(isinstance(table, dict) and all(re.fullmatch(r"\d{1,4}-\d{1,4}", k) for k in table),
            f'scores {path}: not an object {{"layer-head": [numbers]}}')
    if L is None:
        L, H = (1 + max(map(int, n)) for n in zip((0, 0), *(key.split("-") for key in table)))
    expected = [f"{l}-{h}" for l in range(L) for h in range(H)]
    wrong = sorted(table.keys() ^ set(expected))
    require(not wrong, f"scores {path}: {' '.join(wrong[:1])} is missing, or one too many, of "
                       f"{L} layers x {H} heads")
    for key, numbers in table.items():
        require(isinstance(numbers, list) and numbers and
                all(type(x) in (int, float) and 0 <= x < math.inf for x in numbers),
                f"scores {path}: {key!r} must be a non-empty list of numbers >= 0")
    s = torch.tensor([sum(table[key]) / len(table[key]) for key in expected], dtype=torch.float64)
    require(0 < s.sum() < math.inf, f"scores {path}: all zero, or too large to add up")
    return (s / s.sum()).view(L, H)


# ---- what all scripts read, say and refuse -------------------------------------------------------

def require(truth, message):
    """Raises ValueError unless it is true."""
    if not truth:
        raise ValueError(message)


def read_json(path, what, limit=2**30):
    """The content of a JSON file, with or without a byte order mark. Raises ValueError, in one line
    that begins with `what` it is, for anything but a regular file of at most `limit` bytes, for
    what is not JSON, and for an object with a key that occurs twice."""
    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    try:
        if os.path.getsize(path) > limit or not os.path.isfile(path):
            raise OSError(0, f"not a regular file of at most {limit:,} bytes")
        return json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except OSError as error:
        raise ValueError(f"{what} {path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} {path}: not JSON ({error})") from None


def inside(folder, name):
    """The file `name` of a folder, as another file calls it. Raises ValueError if it lies
    elsewhere. (The hub's snapshots are links to files beside them.)"""
    path, home = Path(folder) / name, Path(os.path.realpath(folder))
    home = home.parents[1] if home.parent.name == "snapshots" else home
    require(Path(os.path.realpath(path)).is_relative_to(home),
            f"{name} leads out of the folder {folder}")
    return path


@lru_cache
def note(text):
    """Says, once, on stderr what is no error, but may not be what was meant."""
    print(f"note: {' '.join(text.split())}", file=sys.stderr)


class OneLineParser(argparse.ArgumentParser):
    """Bad input gets exactly one line and exit status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(str(message).split())}\n")

    def run(self, work, argv=None):
        """work(the parsed arguments). What ends a command takes one line: bad input, files that
        cannot be read or written, too little memory, and Ctrl-C, with exit status 130. Characters
        that the terminal cannot print are escaped."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            try:
                work(self.parse_args(argv))
            finally:
                print(end="", flush=True)
        except KeyboardInterrupt as stop:
            self.exit(130, f"{self.prog}: {stop.args[0] if stop.args else 'stopped'}\n")
        except BrokenPipeError:                                             # nobody reads on
            sys.stdout = None
            self.exit(141)                                   # as of a command that SIGPIPE ends
        except (ValueError, OSError, OverflowError, MemoryError, torch.OutOfMemoryError) as error:
            if isinstance(error, OSError):
                sys.stdout = None                    # a full disk, maybe, which is not tried again
            self.error(str(error) or "too little memory")


# ---- the command ---------------------------------------------------------------------------------

def draw_budgets(s, budget, length, window, rho, rows=5, columns=60):
    """Text: the three parts of the budget of the best, some middle and the worst heads of s (L, G),
    drawn to scale, but no part that is there without a mark."""
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
    tiny = Path(__file__).parent / "tiny" / "qwen2-vl" / "visual_head_scores.json"
    parser = OneLineParser("cache.py", description="Draw the three parts of some heads' budgets.")
    parser.add_argument("--scores", default=tiny, help="visual scores (default: tiny/qwen2-vl)")
    parser.add_argument("--kv-heads", type=int, help="default: 4 for tiny/, else all query heads")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--length", type=int, default=600, help="prompt tokens")
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--rho", type=float, default=0.1)

    def draw(args):
        head_scores = read_head_scores(args.scores)
        H = head_scores.shape[1]
        G = (4 if args.scores == tiny else H) if args.kv_heads is None else args.kv_heads
        require(G >= 1 and H % G == 0, f"--kv-heads must divide the {H} query heads, not {G}")
        s = kv_head_scores(head_scores, G)
        print(draw_budgets(s, args.budget, args.length, args.window, args.rho))

    parser.run(draw, argv)


if __name__ == "__main__":
    main()
