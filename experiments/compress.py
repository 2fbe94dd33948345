"""One prefill of a page, compressed in many ways, and the right answer forced through all of them.

    page, question --> one prefill --> all keys and values, the last queries
                                          |        |        |
                                       sparsemm  snapkv   ...        x  budgets: which positions
                                          |        |        |           each head keeps, as masks
                                          `--------+--------'
                                       the answer's tokens, once for each of the masks

That gives the same logits as prefill, compression and decoding anew for each setting, token by
token (tests hold the two equal), at a fraction of the time. Also here: tables of head scores that
tell apart what layers and what heads contribute, other ways to score positions, and heads that are
switched off.

Letters: L layers, H query heads, G KV heads, R = H/G, T prompt tokens, D head size, w window, n
tokens of the answer, S settings.
"""

import math
import random
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from cache import KVCache, kv_head_scores, make_method, observed_attention, select_entries
from model_llava import Prompt, no_cache, prefill_attention, prepare
from score_heads import attention_logits
from sparsemm import decode, greedy_token

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
    scores: str = "aligned"         # which of the tables of head scores, by name
    by: str = "mean"                # what scores a head's positions: the method's, or one of BY


@dataclass
class Prefill:
    """Of every layer all keys and values and the last queries: what any setting needs to compress
    it. `tables`, below, are {name: head scores (L, H), or a function that draws them with a
    seed}."""
    model: object
    inputs: Prompt
    q: list = field(default_factory=list)           # (H, rows, D) of each layer
    k: list = field(default_factory=list)           # (G, T, D)
    v: list = field(default_factory=list)           # (G, T, D)
    first: torch.Tensor = None                      # logits (vocabulary,) of the first token
    shared: dict = field(default_factory=dict)      # position scores that settings have in common

    @property
    def length(self):
        return len(self.inputs.ids)

    def method(self, setting, tables, seed=0):
        """The setting's Method for this prompt."""
        c, head_scores = self.model.config, drawn(tables.get(setting.scores), seed)
        return make_method(setting.method, c.layers, c.kv_heads, self.length, setting.budget,
                           setting.window, setting.rho, setting.redistribute, head_scores, seed)

    def position_scores(self, layer, method, setting, tables):
        """(G, T-w)."""
        q, k, w = self.q[layer], self.k[layer], setting.window
        if method.position_scores is not observed_attention:            # by position, and soon done
            return method.position_scores(q, k, w)
        key = layer, w, setting.by, setting.by != "mean" and setting.scores
        if key not in self.shared:
            self.shared[key] = observed_attention(q, k, w) if setting.by == "mean" else (
                BY[setting.by](attention_rows(q, k, w), k, tables[setting.scores][layer]))
        return self.shared[key]

    def keep(self, setting, tables, seed=0):
        """The positions of the prompt that each head keeps: (L, G, T) bool."""
        method, keep = self.method(setting, tables, seed), []
        for l in range(len(self.k)):
            a = self.position_scores(l, method, setting, tables)
            keep.append(select_entries(a, method.budgets(l, a), self.length))
        return torch.stack(keep).cpu()

    def cache(self, setting, tables, seed=0):
        """The real cache, compressed under a setting."""
        cache = KVCache(self.method(setting, tables, seed), setting.window)
        for l in range(len(self.k)):
            cache.compress(l, self.q[l], self.k[l], self.v[l])
        return cache


def drawn(table, seed):
    """A table of head scores, drawn with the seed if it is a function of one."""
    return table(seed) if callable(table) else table


@torch.inference_mode()
def prefill(model, inputs, rows=64):
    """A Prompt's Prefill. rows: how many queries are kept, the largest observation window."""
    kept = Prefill(model, inputs)

    def attend(layer, q, k, v):                            # (H, T, D), (G, T, D), (G, T, D)
        kept.q.append(q[:, -rows:].clone())
        kept.k.append(k)
        kept.v.append(v)
        return prefill_attention(q, k, v)

    kept.first = model.logits(model.hidden_states(inputs, attend)[-1])
    return kept


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
def forced_logits(prefilled, keep, ids):
    """The logits (S, n, vocabulary) that follow each token of a forced answer, ids (n,), for S
    caches at a time: to the decoder one row of S * n tokens, of which each n see each other and
    what their cache keeps. keep: (S, L, G, T) bool."""
    model, inputs, S, n = prefilled.model, prefilled.inputs, len(keep), len(ids)
    keep = keep.to(inputs.ids.device)

    def attend(layer, q, k, v):                            # (H, S*n, D), (G, S*n, D), (G, S*n, D)
        q, k, v = (x.unflatten(1, (S, n)).transpose(0, 1) for x in (q, k, v))    # (S, heads, n, D)
        out = masked_attention(q, k, v, prefilled.k[layer], prefilled.v[layer], keep[:, layer])
        return out.transpose(0, 1).flatten(1, 2)           # (S, H, n, D) -> (H, S*n, D)

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


@torch.inference_mode()
def written(prefilled, cache, limit):
    """What the model writes from a prefill and its compressed cache, greedily, as text."""
    model, position = prefilled.model, prefilled.inputs.next_position
    tokens = [greedy_token(model, prefilled.first, 0)]
    while tokens[-1] not in model.processor.end_tokens and len(tokens) < limit:
        logits = decode(model, cache, tokens[-1], position + len(tokens) - 1)
        tokens.append(greedy_token(model, logits, len(tokens)))
    return model.processor.tokenizer.decode(tokens, skip_special_tokens=True)


# ---- tables of head scores, which tell a layer's share from a head's -----------------------------
# All take head scores (L, H) and return such a table; what counts of it are the sums of the G KV
# heads, which are dealt out evenly among a group's query heads.

def dealt_out(kv, H):
    """Scores of KV heads (L, G) -> of query heads (L, H)."""
    R = H // kv.shape[1]
    return (kv / R).repeat_interleave(R, dim=1)


def power_of_scores(s, G, exponent):
    """Every KV head's score to a power."""
    return dealt_out(kv_head_scores(s, G) ** exponent, s.shape[1])


def only_layers(s):
    """Every head has its layer's mean score: layers differ, heads do not."""
    return s.mean(1, keepdim=True).expand_as(s).clone()


def within_layers(s, G, seed):
    """A layer's scores, permuted among its KV heads: layers keep theirs, heads get another's."""
    generator, kv = torch.Generator().manual_seed(seed), kv_head_scores(s, G)
    places = torch.rand(kv.shape, generator=generator).argsort(1)
    return dealt_out(kv.gather(1, places), s.shape[1])


def only_heads(s):
    """Each layer's scores divided by their sum: heads differ, layers do not. The heads of a layer
    without scores share alike."""
    total = s.sum(1, keepdim=True)
    return torch.where(total > 0, s / total.clamp(min=1e-300), 1 / s.shape[1])


def rising_pyramid(s):
    """PyramidKV's budgets upside down, if there is no uniform share (rho 0): linear in the layer
    from a 20th of the mean up to 39 20ths. Of s only the shape counts."""
    return torch.linspace(0.05, 1.95, len(s), dtype=torch.float64)[:, None].expand_as(s).clone()


# ---- other ways to score positions ---------------------------------------------------------------

def attention_rows(q, k, window):
    """A of cache.observed_attention, not yet averaged: (H, w, T-w) float32."""
    T, w = k.shape[1], min(window, k.shape[1])
    A = (attention_logits(q[:, -w:], k) / math.sqrt(q.shape[-1])).softmax(-1)            # (H, w, T)
    return A[:, :, :T - w]


def pool(a, kernel=5):
    """(G, T-w) -> the same, averaged over neighbours as in cache.observed_attention."""
    return F.avg_pool1d(a[:, None], kernel, stride=1, padding=kernel // 2)[:, 0]


def by_scored_heads(A, k, s):
    """The heads of a group count by their visual scores instead of alike. (MHA: no change.)"""
    weights = s.to(A).view(len(k), -1)                                                      # (G, R)
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, 1.0)
    weights = weights / weights.sum(1, keepdim=True)
    return pool((A.mean(1).unflatten(0, weights.shape) * weights[:, :, None]).sum(1))


def by_best_head(A, k, s):
    """Of the heads of a group the one that looks most counts. (MHA: no change.)"""
    return pool(A.mean(1).unflatten(0, (len(k), -1)).amax(1))


def by_last_query(A, k, s, share=0.5):
    """The last query has `share` of the weight (after BACON, arXiv 2606.14782)."""
    a = share * A[:, -1] + (1 - share) * A.mean(1)                                      # (H, T-w)
    return pool(a.unflatten(0, (len(k), -1)).mean(1))


def by_diversity(A, k, s):
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


BY = {"heads by score": by_scored_heads, "best head": by_best_head, "last query": by_last_query,
      "diversity": by_diversity}


# ---- masked heads --------------------------------------------------------------------------------

def masked_heads(heads, attend=no_cache, query=False):
    """An `attend` in which the output of these heads, [(layer, head), ...], is zero before o_proj.

    NOTE(official): there the query is set to zero, so that the head averages all values; so it is
    here with query=True."""
    def masked(layer, q, k, v):
        mine = torch.tensor([h for l, h in heads if l == layer], dtype=torch.long, device=q.device)
        if query:
            return attend(layer, q.index_fill(0, mine, 0), k, v)
        return attend(layer, q, k, v).index_fill(0, mine, 0)
    return masked


def head_sets(s, seeds):
    """{(count, "visual" or seed): heads}: the best heads by s (L, H), and for each seed random sets
    of the same counts, drawn once from the heads that are in none of the visual sets."""
    H, order = s.shape[1], s.flatten().argsort(descending=True, stable=True).tolist()
    counts = sorted({max(1, round(share * len(order))) for share in SHARES})
    others, sets = sorted(order[counts[-1]:]), {}
    for count in counts:
        sets[count, "visual"] = [divmod(i, H) for i in order[:count]]
        for seed in range(seeds):
            chosen = random.Random(f"masked heads {seed} {count}").sample(others, count)
            sets[count, seed] = [divmod(i, H) for i in chosen]
    return sets


@torch.inference_mode()
def masked_accuracy(model, image, text, ids, sets, query=False):
    """The share of right tokens of a forced answer, all of them, for each set of masked heads.
    query: see masked_heads."""
    forced, right = prepare(model, [image], text).extended(ids[:-1]), torch.tensor(ids)
    x, shares = model.embed(forced), []
    for heads in sets:
        hidden = model.decoder(x, forced.positions, masked_heads(heads, query=query))[-len(ids):]
        shares.append((model.logits(hidden).argmax(-1).cpu() == right).double().mean().item())
    return shares
