"""One prefill of a page, compressed in many ways, and the right answer forced through all of them.

    page, question --> one prefill --> all queries, keys and values
                                          |        |        |
                                       sparsemm  snapkv   ...        x  budgets: which positions
                                          |        |        |           each head keeps, as masks
                                          `--------+--------'
                                       the answer's tokens, once for each different mask

This gives the same logits as prefill, compression and decoding for each setting, token by token
(tests hold the two equal), in a fraction of the time. Letters: L layers, H query heads, G KV heads,
R = H/G, T prompt tokens, D head size, w window, n tokens of the answer, S settings.
"""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cache import (KVCache, Method, attention_rows, kv_head_scores, make_plan, observed_attention,
                   select_entries)
from model_llava import Prompt, no_cache, prefill_attention, prepare

BY = {"best head": lambda A: A.mean(1).amax(0),             # A (R, w, T-w) -> (T-w,)
      "last query": lambda A: (A[:, -1] + A.mean(1)).mean(0) / 2}       # after arXiv 2606.14782


# ---- one prefill for all settings ----------------------------------------------------------------

@dataclass(frozen=True)
class Setting:
    """A cache.Method that can be the key of a dict: it names its head scores."""
    method: str = "sparsemm"
    budget: int = 256
    window: int = 32
    rho: float = 0.1
    redistribute: bool = True
    scores: str = "aligned"         # which of the tables of head scores
    by: str = "mean"                # how a head ranks positions: as the method does, or one of BY


@dataclass
class Prefill:
    """The queries, keys and values of every layer: what any setting needs to compress them.
    `tables`, below, are {name: head scores (L, H), or a function that draws them with a seed}."""
    model: object
    inputs: Prompt
    q: list                         # (H, T, D) of each layer
    k: list                         # (G, T, D)
    v: list                         # (G, T, D)
    first: torch.Tensor             # logits (vocabulary,) of the first token
    shared: dict                    # position scores that settings have in common

    def plan(self, setting, tables, seed=0):
        """The setting's Plan for this prompt."""
        c, s, scores = self.model.config, setting, tables.get(setting.scores)
        method = Method(s.method, s.budget, s.window, s.rho, s.redistribute,
                        scores(seed) if callable(scores) else scores, seed)
        return make_plan(method, c.layers, c.kv_heads, len(self.inputs.ids))

    def position_scores(self, layer, plan, by):
        """(G, T-w)."""
        q, k, w = self.q[layer], self.k[layer], plan.window
        if plan.position_scores is not observed_attention:               # by position, and cheap
            return plan.position_scores(q, k, w)
        if (layer, w, by) not in self.shared:
            self.shared[layer, w, by] = (observed_attention(q, k, w) if by == "mean"
                                         else observed_by(BY[by], q, k, w))
        return self.shared[layer, w, by]

    def keep(self, setting, tables, seed=0):
        """The positions of the prompt that each head keeps: (L, G, T) bool."""
        plan, T = self.plan(setting, tables, seed), len(self.inputs.ids)
        scores = [self.position_scores(l, plan, setting.by) for l in range(len(self.k))]
        return torch.stack([select_entries(a, plan.budgets(l, a), T)
                            for l, a in enumerate(scores)]).cpu()

    def cache(self, setting, tables, seed=0):
        """The real cache, compressed under a setting."""
        cache = KVCache(self.plan(setting, tables, seed))
        for l in range(len(self.k)):
            cache.compress(l, self.q[l], self.k[l], self.v[l])
        return cache


def observed_by(rank, q, k, window, kernel=5):
    """cache.observed_attention, (G, T-w), with another mean over queries and heads, rank."""
    T, groups = k.shape[1], q[:, -window:].unflatten(0, (len(k), -1))                # (G, R, w, D)
    a = torch.stack([rank(attention_rows(q_g, k_g)[:, :, :T - window])
                     for q_g, k_g in zip(groups, k)])
    return F.avg_pool1d(a[:, None], kernel, stride=1, padding=kernel // 2)[:, 0]


@torch.inference_mode()
def prefill(model, inputs):
    """A Prompt's Prefill."""
    found = [], [], []

    def attend(layer, q, k, v):                            # (H, T, D), (G, T, D), (G, T, D)
        for kept, x in zip(found, (q, k, v)):
            kept.append(x)
        return prefill_attention(q, k, v)

    first = model.logits(model.hidden_states(inputs, attend)[-1])
    return Prefill(model, inputs, *found, first, {})


@torch.inference_mode()
def forced_logits(prefilled, keep, ids):
    """The logits (S, n, vocabulary) that follow each token of a forced answer, ids (n,), for S
    caches at a time. keep: (S, L, G, T) bool. To the decoder the S answers are one row of S * n
    tokens; each sees what its cache keeps, and its own tokens."""
    model, inputs, S, n = prefilled.model, prefilled.inputs, len(keep), len(ids)

    def attend(layer, q, k, v):                            # (H, S*n, D), (G, S*n, D), (G, S*n, D)
        out, G = [], len(k)
        for g in range(G):
            for s in range(S):
                kept, own = keep[s, layer, g], slice(s * n, (s + 1) * n)
                K, V = (torch.cat([prompt[layer][g, kept], x[g, own]])             # (kept+n, D)
                        for prompt, x in ((prefilled.k, k), (prefilled.v, v)))
                p = attention_rows(q.unflatten(0, (G, -1))[g, :, own], K)        # (R, n, kept+n)
                out.append(p.to(V.dtype) @ V)                                            # (R, n, D)
        out = torch.stack(out).unflatten(0, (G, S)).transpose(1, 2)                # (G, R, S, n, D)
        return out.flatten(0, 1).flatten(1, 2)

    x = model.decoder.embed_tokens(inputs.ids.new_tensor(ids)).repeat(S, 1)              # (S*n, E)
    positions = (inputs.next_position + torch.arange(n)).to(inputs.positions).repeat(3, S)
    return model.logits(model.decoder(x, positions, attend)).unflatten(0, (S, n))


def forced_accuracy(prefilled, keep, ids, rows=2048):
    """The share of right tokens among the second to the last of an answer, for each of S caches:
    (S,). Caches that are the same are computed once, and about `rows` tokens at a time."""
    different, which = torch.unique(keep.flatten(1), dim=0, return_inverse=True)
    different, right = different.view(-1, *keep.shape[1:]), torch.tensor(ids[1:])
    parts = [forced_logits(prefilled, part, ids[:-1]).argmax(-1).cpu() == right
             for part in different.split(max(1, rows // len(ids)))]
    return torch.cat(parts).double().mean(1)[which]


# ---- head scores that tell what layers and what heads contribute ---------------------------------

def dealt_out(kv, H):
    """Head scores (L, H) that have the sums kv (L, G), which are all that counts."""
    R = H // kv.shape[1]
    return (kv / R).repeat_interleave(R, dim=1)


def score_tables(s, G):
    """{name: head scores (L, H), or a function that draws them with a seed}, from visual scores s.

    layers: every head has its layer's mean; within: a layer's scores, dealt anew to its KV heads;
    rising pyramid: PyramidKV's budgets upside down, if rho is 0; squared: every KV head's score."""
    kv, H = kv_head_scores(s, G), s.shape[1]

    def within(seed):
        places = torch.rand(kv.shape, generator=torch.Generator().manual_seed(seed)).argsort(1)
        return dealt_out(kv.gather(1, places), H)

    rising = torch.linspace(0.05, 1.95, len(s), dtype=torch.float64)[:, None]        # of the mean
    return {"aligned": s, "layers": s.mean(1, keepdim=True).expand_as(s), "within": within,
            "rising pyramid": rising.expand_as(s), "squared": dealt_out(kv ** 2, H)}


# ---- masked heads --------------------------------------------------------------------------------

def masked_heads(heads):
    """An `attend` in which the output of these heads, [(layer, head), ...], is zero before o_proj.
    NOTE(official): there the query is zero, so that the head averages all values."""
    def attend(layer, q, k, v):
        mine = torch.tensor([h for l, h in heads if l == layer], dtype=torch.long, device=q.device)
        return no_cache(layer, q, k, v).index_fill(0, mine, 0)
    return attend


def best_heads(s):
    """[(layer, head), ...] by score (L, H), the best first."""
    order = s.flatten().argsort(descending=True, stable=True).tolist()
    return [divmod(i, s.shape[1]) for i in order]


def head_sets(s, seeds):
    """{(count, "visual" or seed): heads}: the best heads by s (L, H), and for each seed random sets
    of the same counts, drawn from the heads that are in none of the visual sets."""
    best, sets = best_heads(s), {}
    counts = sorted({max(1, round(n * len(best) / 64)) for n in (1, 2, 3, 6)})    # up to 10 %
    for n in counts:
        sets[n, "visual"] = best[:n]
        for seed in range(seeds):
            others = random.Random(f"masked heads {seed} {n}")
            sets[n, seed] = others.sample(sorted(best[counts[-1]:]), n)
    return sets


@torch.inference_mode()
def masked_accuracy(model, image, text, ids, sets):
    """The share of right tokens of a forced answer, all of them, for each set of masked heads."""
    forced, right = prepare(model, [image], text).extended(ids[:-1]), torch.tensor(ids)
    x, shares = model.embed(forced), []
    for heads in sets:
        hidden = model.decoder(x, forced.positions, masked_heads(heads))[-len(ids):]
        shares.append((model.logits(hidden).argmax(-1).cpu() == right).double().mean().item())
    return shares
