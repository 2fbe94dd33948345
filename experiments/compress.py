"""One prefill of a page, compressed in many ways, and the right answer forced through all of them.

    page, question --> one prefill --> all keys and values, the last queries
                                          |        |        |
                                       sparsemm  snapkv   ...        x  budgets: which positions
                                          |        |        |           each head keeps, as masks
                                          `--------+--------'
                                       the answer's tokens, a row of the batch for each of the masks

That gives the same logits as prefill, compression and decoding anew for each setting, token by
token (tests hold the two equal), at a fraction of the time. Also here: other ways to rank
positions, which reproduce.py tries, and heads that are switched off.

Letters: L layers, H query heads, G KV heads, R = H/G, T prompt tokens, D head size, w window, n
tokens of the answer, S settings.
"""

import contextlib
import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cache import KVCache, kv_head_scores, make_method, observation_scores
from model_llava import prepare, rotary_angles, rotate

SHARES = (1 / 64, 2 / 64, 3 / 64, 6 / 64)                   # of the heads that are masked


# ---- one prefill for all settings ----------------------------------------------------------------

@dataclass(frozen=True)
class Setting:
    """One way to compress a cache."""
    method: str = "sparsemm"
    budget: int = 256
    window: int = 32
    rho: float = 0.1
    redistribute: bool = True
    scores: str = "aligned"         # which of the tables of visual scores (L, H), by name
    rank: str = "mean"              # what a head's positions are ranked by: the method's, or RANKS


class Prefill:
    """Stands where a cache would, and keeps of every layer all keys and values and the last
    queries: what any setting needs to compress it."""

    by_head = False

    def __init__(self, model, image, text, rows=64):
        """rows: how many queries are kept, the largest observation window."""
        self.model, self.rows, self.q, self.k, self.v = model, rows, [], [], []
        self.rankings = {}                                  # those that settings have in common
        self.inputs = prepare(model, [image], text)
        self.first = model.logits(model.hidden_states(self.inputs, self)[-1])      # (vocabulary,)
        self.length = len(self.inputs.ids)

    def __len__(self):
        return len(self.k)

    def compress(self, layer, q, k, v):
        """q: (H, T, D), k, v: (G, T, D)."""
        self.q.append(q[:, -self.rows:].clone())
        self.k.append(k)
        self.v.append(v)

    def method(self, setting, tables, seed=0):
        """The setting's Method for this prompt."""
        c = self.model.config
        return make_method(setting.method, c.layers, c.kv_heads, self.length, setting.budget,
                           setting.window, setting.rho, setting.redistribute,
                           tables.get(setting.scores), seed)

    def ranked(self, layer, method, setting, tables):
        """Scores (G, T-w) of the positions, and the place of each in their order, 0 the best."""
        q, k = self.q[layer], self.k[layer]
        if method.rank is not observation_scores:                       # by position, and soon done
            a = method.rank(q, k, setting.window)
            return a, a.argsort(descending=True, stable=True).argsort()
        shared = layer, setting.window, setting.rank, setting.rank != "mean" and setting.scores
        if shared not in self.rankings:
            a = (observation_scores(q, k, setting.window) if setting.rank == "mean" else
                 RANKS[setting.rank](attention_rows(q, k, setting.window), k,
                                     tables[setting.scores][layer]))
            self.rankings[shared] = a, a.argsort(descending=True, stable=True).argsort()
        return self.rankings[shared]

    def keep(self, setting, tables, seed=0):
        """The positions of the prompt that each head keeps: (L, G, T) bool."""
        method, T = self.method(setting, tables, seed), self.length
        keep = torch.ones(len(self), len(self.k[0]), T, dtype=torch.bool)
        for l in range(len(self)):
            a, places = self.ranked(l, method, setting, tables)
            w = T - a.shape[1]
            keep[l, :, :T - w] = places.cpu() < (method.budgets(l, a).cpu() - w)[:, None]
        return keep

    def cache(self, setting, tables, seed=0, reserve=0):
        """The real cache, compressed under a setting."""
        cache = KVCache(self.method(setting, tables, seed), setting.window, reserve)
        for l in range(len(self)):
            cache.compress(l, self.q[l], self.k[l], self.v[l])
        return cache


def masked_attention(q, k, v, prompt_k, prompt_v, keep):
    """n answer tokens in S settings attend to what each keeps of the prompt, and to each other.

    q: (S, H, n, D); k, v: (S, G, n, D); prompt_k, prompt_v: (G, T, D); keep: (S, G, T) bool.
    Returns (S, H, n, D)."""
    (S, H, n, _), (_, G, T) = q.shape, keep.shape
    keys = torch.cat([prompt_k.expand(S, -1, -1, -1), k], dim=2)                    # (S, G, T+n, D)
    values = torch.cat([prompt_v.expand(S, -1, -1, -1), v], dim=2)
    causal = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    seen = torch.cat([keep[:, :, None].expand(S, G, n, T), causal.expand(S, G, n, n)], dim=-1)
    return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True,
                                          attn_mask=seen.repeat_interleave(H // G, dim=1))


@torch.inference_mode()
def forced_logits(prefill, keep, ids):
    """The logits (S, n, vocabulary) that follow each token of a forced answer, ids (n,), for S
    caches at a time. keep: (S, L, G, T) bool."""
    model, c, S, n = prefill.model, prefill.model.config, len(keep), len(ids)
    positions = prefill.inputs.next_position + torch.arange(n).expand(3, -1)
    ids, keep = (t.to(prefill.inputs.ids.device) for t in (torch.as_tensor(ids), keep))
    x = model.decoder.embed_tokens(ids).expand(S, n, -1)                                # (S, n, E)
    cos, sin = (a.to(x) for a in rotary_angles(positions, c))
    for l, layer in enumerate(model.decoder.layers):
        y, attn = layer.input_layernorm(x), layer.self_attn
        q, k, v = (project(y).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
                   for project in (attn.q_proj, attn.k_proj, attn.v_proj))      # (S, heads, n, D)
        out = masked_attention(rotate(q, cos, sin), rotate(k, cos, sin), v,
                               prefill.k[l], prefill.v[l], keep[:, l])
        x = x + attn.o_proj(out.transpose(1, 2).flatten(2))             # (S, H, n, D) -> (S, n, E)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.logits(model.decoder.norm(x))


def forced_accuracy(prefill, keep, ids, rows=2048):
    """The share of right tokens among the second to the last of an answer, for each of S caches:
    (S,). Caches that are the same are computed once, and about `rows` tokens at a time."""
    different, which = torch.unique(keep.flatten(1), dim=0, return_inverse=True)
    different, right = different.view(-1, *keep.shape[1:]), torch.tensor(ids[1:])
    parts = [forced_logits(prefill, part, ids[:-1]).argmax(-1).cpu() == right
             for part in different.split(max(1, rows // len(ids)))]
    return torch.cat(parts).double().mean(1)[which]


@torch.inference_mode()
def written(prefill, cache, limit):
    """What the model writes from a prefill and its compressed cache, greedily, as text."""
    model, tokens = prefill.model, [prefill.first.argmax().item()]
    position = prefill.inputs.next_position
    while tokens[-1] not in model.processor.end_tokens and len(tokens) < limit:
        tokens.append(model.decode(tokens[-1], position, cache).argmax().item())
        position += 1
    return model.processor.tokenizer.decode(tokens, skip_special_tokens=True)


# ---- other ways to rank positions ----------------------------------------------------------------

def attention_rows(q, k, window):
    """A of cache.observation_scores, not yet averaged: (H, w, T-w) float32."""
    (G, T, D), H = k.shape, q.shape[0]
    w = min(window, T)
    keys = k.float().repeat_interleave(H // G, dim=0)                                   # (H, T, D)
    logits = q[:, -w:].float() @ keys.transpose(1, 2) / math.sqrt(D)                    # (H, w, T)
    future = torch.ones(w, T, dtype=torch.bool, device=q.device).triu(T - w + 1)
    return logits.masked_fill(future, -math.inf).softmax(-1)[:, :, :T - w]


def pool(a, kernel=5):
    """(G, T-w) -> the same, averaged over neighbours as in cache.observation_scores."""
    return F.avg_pool1d(a[:, None], kernel, stride=1, padding=kernel // 2)[:, 0]


def rank_by_scored_heads(A, k, s):
    """The heads of a group count by their visual scores instead of alike. (MHA: no change.)"""
    weights = s.to(A).view(len(k), -1)                                                      # (G, R)
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, 1.0)
    weights = weights / weights.sum(1, keepdim=True)
    return pool((A.mean(1).unflatten(0, weights.shape) * weights[:, :, None]).sum(1))


def rank_by_best_head(A, k, s):
    """Of the heads of a group the one that looks most counts. (MHA: no change.)"""
    return pool(A.mean(1).unflatten(0, (len(k), -1)).amax(1))


def rank_by_last_query(A, k, s, share=0.5):
    """The last query has `share` of the weight (after BACON, arXiv 2606.14782)."""
    a = share * A[:, -1] + (1 - share) * A.mean(1)                                      # (H, T-w)
    return pool(a.unflatten(0, (len(k), -1)).mean(1))


def rank_by_diversity(A, k, s):
    """Attention mixed with how much a key differs from the others (after MixKV, arXiv 2510.20707):
    (1 - r) * attention + r * diversity, both scaled to [0, 1] per head; r is the mean cosine
    similarity of a head's keys."""
    a = pool(A.mean(1).unflatten(0, (len(k), -1)).mean(1))
    unit = F.normalize(k[:, :a.shape[1]].float(), dim=-1)                             # (G, T-w, D)
    mean = unit.mean(1, keepdim=True)
    r = mean.square().sum(-1).clamp(0, 1)                                                   # (G, 1)
    diversity = -(unit * F.normalize(mean, dim=-1)).sum(-1)

    def scaled(x):
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        return (x - low) / (high - low).clamp(min=1e-30)
    return (1 - r) * scaled(a) + r * scaled(diversity)


RANKS = {"heads by score": rank_by_scored_heads, "best head": rank_by_best_head,
         "last query": rank_by_last_query, "diversity": rank_by_diversity}


def power_of_scores(s, G, exponent):
    """Visual scores (L, H) whose KV heads have s[l,g] ** exponent; it is dealt out evenly among a
    group's query heads, whose sum is all that counts."""
    kv = kv_head_scores(s, G) ** exponent
    return (kv * G / s.shape[1]).repeat_interleave(s.shape[1] // G, dim=1)


# ---- masked heads --------------------------------------------------------------------------------

@contextlib.contextmanager
def masked_heads(model, heads, query=False):
    """Within it the output of these heads, [(layer, head), ...], is zero before o_proj, in whatever
    the model computes, prefill and answer.

    NOTE(official): there the query is set to zero, so that the head averages all values; so it is
    here with query=True."""
    D, hooks = model.config.head_dim, []
    for layer in {l for l, _ in heads}:
        attention = model.decoder.layers[layer].self_attn
        columns = torch.tensor([h * D + d for l, h in heads if l == layer for d in range(D)],
                               device=attention.q_proj.weight.device)
        if query:
            hooks.append(attention.q_proj.register_forward_hook(
                lambda module, inputs, q, columns=columns: q.index_fill(-1, columns, 0)))
        else:
            hooks.append(attention.o_proj.register_forward_pre_hook(
                lambda module, inputs, columns=columns: inputs[0].index_fill(-1, columns, 0)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def head_sets(s, seeds):
    """{(count, "visual" or seed): heads}: the best heads by s (L, H), and for each seed random sets
    of the same counts, drawn once from the heads that are in none of the visual sets."""
    H, order = s.shape[1], s.flatten().argsort(descending=True, stable=True).tolist()
    counts = sorted({max(1, round(share * len(order))) for share in SHARES})
    others, sets = sorted(order[counts[-1]:]), {}
    for count in counts:
        sets[count, "visual"] = [divmod(i, H) for i in order[:count]]
        for seed in range(seeds):
            drawn = random.Random(f"masked heads {seed} {count}").sample(others, count)
            sets[count, seed] = [divmod(i, H) for i in drawn]
    return sets


@torch.inference_mode()
def masked_accuracy(model, image, text, ids, sets, query=False):
    """The share of right tokens of a forced answer, all of them, for each set of masked heads.
    query: see masked_heads."""
    forced, right = prepare(model, [image], text).extended(ids[:-1]), torch.tensor(ids)
    x, shares = model.embed(forced), []
    for heads in sets:
        with masked_heads(model, heads, query):
            hidden = model.decoder(x, forced.positions)[-len(ids):]
        shares.append((model.logits(hidden).argmax(-1).cpu() == right).double().mean().item())
    return shares
