"""Facts about the method, the models and the commands, each of which can fail. Everything is
offline, on small random models and the ones in tiny/.

    pytest test_sparsemm.py

Letters as in the scripts: L layers, H query heads, G KV heads, R = H/G, T prompt tokens, D head
size, w window.
"""

import ast
import io
import json
import math
import os
import random
import resource
import shutil
import socket
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaNextConfig,
                          LlavaNextForConditionalGeneration, LlavaNextImageProcessorPil,
                          MistralConfig, PreTrainedTokenizerFast, Qwen2VLConfig,
                          Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil)
from transformers.utils import logging

import cache
import model_llava
import score_heads
import sparsemm
from cache import (METHODS, KVCache, PackedAttention, allocate_budgets, decode_attention,
                   make_method, observed_attention, select_entries)
from model_llava import open_image, prefill_attention

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)                   # enough for small models; processes run beside the tests
HERE = Path(__file__).parent
TINY = sorted(path.parent.name for path in (HERE / "tiny").glob("*/config.json"))
SAMPLES = json.loads((HERE / "tiny" / "samples.json").read_text())


# ---- small random checkpoints, saved by transformers ---------------------------------------------


SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>", "<|vision_start|>",
           "<|vision_end|>", "<|image_pad|>", "<unk>"]
VOCABULARY = {token: i
              for i, token in enumerate(SPECIAL + ["\n"] + [chr(c) for c in range(32, 127)])}
LLAVA_PINS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]


def write_tokenizer(folder, bos):
    """A tokenizer of characters; bos: whether it puts <s> in front, as Llama's does."""
    from tokenizers.processors import TemplateProcessing
    tokenizer = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                  for token in SPECIAL])
    tokenizer.decoder = decoders.Fuse()
    if bos:
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", VOCABULARY["<s>"])])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>",
                            eos_token="</s>", pad_token="<pad>").save_pretrained(folder)


def llava_config(text_class, L, H, G, D, tied, vision_layers=3):
    """LLaVA-NeXT of tiles of 28 px, 16 tokens each. G is ignored by a Llama decoder, which is MHA
    here."""
    text = text_class(vocab_size=len(VOCABULARY), hidden_size=H * D, intermediate_size=2 * H * D,
                      num_hidden_layers=L, num_attention_heads=H,
                      num_key_value_heads=H if text_class is LlamaConfig else G,
                      tie_word_embeddings=tied, rope_theta=500.0)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=vision_layers,
                              num_attention_heads=2, image_size=28, patch_size=7, projection_dim=32)
    return LlavaNextConfig(vision_config=vision, text_config=text,
                           image_token_index=VOCABULARY["<image>"],
                           image_grid_pinpoints=LLAVA_PINS, tie_word_embeddings=tied)


def qwen_config(L, H, G, D, tied, sections):
    return Qwen2VLConfig(
        text_config=dict(vocab_size=len(VOCABULARY), hidden_size=H * D, intermediate_size=2 * H * D,
                         num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=G,
                         rope_theta=300.0,
                         rope_scaling={"type": "mrope", "mrope_section": sections,
                                       "rope_theta": 300.0}),
        vision_config=dict(depth=2, embed_dim=32, hidden_size=H * D, num_heads=2, patch_size=4,
                           mlp_ratio=3),
        image_token_id=VOCABULARY["<|image_pad|>"], video_token_id=VOCABULARY["<pad>"],
        vision_start_token_id=VOCABULARY["<|vision_start|>"],
        vision_end_token_id=VOCABULARY["<|vision_end|>"], tie_word_embeddings=tied)


CHECKPOINTS = {  # heads, KV heads, layers and sizes vary, so that no mix-up of two numbers can hide
    "vicuna": lambda: llava_config(LlamaConfig, L=3, H=4, G=4, D=16, tied=False),
    "vicuna-tied": lambda: llava_config(LlamaConfig, L=2, H=3, G=3, D=8, tied=True,
                                        vision_layers=4),
    "mistral": lambda: llava_config(MistralConfig, L=2, H=6, G=2, D=8, tied=False),
    "qwen": lambda: qwen_config(L=3, H=6, G=2, D=16, tied=False, sections=[2, 3, 3]),
    "qwen-tied": lambda: qwen_config(L=2, H=4, G=2, D=24, tied=True, sections=[2, 4, 6]),
}


def random_model(name, seed=0):
    """transformers' model with weights scaled so that different inputs give different tokens."""
    config = CHECKPOINTS[name]()
    torch.manual_seed(seed)
    made = (LlavaNextForConditionalGeneration if config.model_type == "llava_next"
            else Qwen2VLForConditionalGeneration)
    model = made(config).eval()
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if p.dim() >= 2:
                p.normal_(0, 1.5 / p[0].numel() ** 0.5)
            elif ("norm" in parameter_name and "weight" in parameter_name
                  or "ln_q.weight" in parameter_name):
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(0, 0.3)
    model.set_attn_implementation("eager")
    return model


def write_checkpoint(folder, name, **save):
    """Saves random_model(name) with tokenizer, image processor and end tokens. Returns it."""
    model = random_model(name)
    model.save_pretrained(folder, **save)
    write_tokenizer(folder, bos=not name.startswith("qwen"))
    if name.startswith("qwen"):
        Qwen2VLImageProcessorPil(patch_size=4, size={
            "shortest_edge": 64, "longest_edge": 64 * 200}).save_pretrained(folder)
    else:
        LlavaNextImageProcessorPil(size={"shortest_edge": 28},
                                   crop_size={"height": 28, "width": 28},
                                   image_grid_pinpoints=LLAVA_PINS).save_pretrained(folder)
    GenerationConfig(
        eos_token_id=[VOCABULARY["</s>"], VOCABULARY["<|im_end|>"]]).save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """name -> (folder, transformers' model, ours)"""
    made = {}
    for name in CHECKPOINTS:
        folder = tmp_path_factory.mktemp(name)
        reference = write_checkpoint(folder, name)
        made[name] = folder, reference, model_llava.load(folder, "cpu", "float32")
    return made


@pytest.fixture(scope="session")
def tiny():
    """name -> the small models that are shipped"""
    return {name: model_llava.load(HERE / "tiny" / name, "cpu", "float32") for name in TINY}


def beside(command, **environment):
    """Marks a test of what needs a process of its own, which starts with the session and runs
    beside the other tests. command(checkpoints, folder): Python's arguments, with a folder for what
    is written."""
    def mark(test):
        test.command, test.environment = command, environment
        return test
    return mark


def two_ranks(script, *arguments):
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--",
            HERE / script, *arguments]


@pytest.fixture(scope="session", autouse=True)
def processes(request, tmp_path_factory):
    """name of a test marked so -> (its folder, its process)"""
    started = {}
    for item in request.session.items:
        if hasattr(item.function, "command"):
            folder = tmp_path_factory.mktemp("beside")
            command = item.function.command(request.getfixturevalue("checkpoints"), folder)
            started[item.name] = folder, subprocess.Popen(
                [sys.executable, *command], cwd=HERE, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", **item.function.environment})
    yield started
    for _, process in started.values():
        process.kill()


@pytest.fixture
def done(request, processes):
    """What a test's process left: folder, returncode, stdout, stderr."""
    folder, process = processes[request.node.name]
    stdout, stderr = process.communicate()
    return SimpleNamespace(folder=folder, returncode=process.returncode, stdout=stdout,
                           stderr=stderr)


def picture(width, height, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def reference_logits(reference, ours, prompt, images):
    """transformers' logits (T, vocabulary) of the same ids; its own image processing of all images
    in one call."""
    inputs = dict(ours.processor.image_processor(images, return_tensors="pt")) if images else {}
    if ours.config.family == "qwen2_vl" and images:
        inputs["mm_token_type_ids"] = (prompt.ids == ours.config.image_token).int()[None]
    with torch.no_grad():
        return reference(input_ids=prompt.ids[None], **inputs).logits[0]


# ---- budgets -------------------------------------------------------------------------------------


def test_budgets_by_hand():
    """2 layers x 2 heads, b = 64, w = 32, rho = 0.1: r = 3.2, to share by score 4 * 32 * 0.9 =
    115.2."""
    s = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    #  32 + 3.2 + 28.8 = 64    35.2    35.2    32 + 3.2 + 86.4 = 121.6: the last takes the odd one
    assert allocate_budgets(s, 64, 500).tolist() == [[64, 35], [35, 122]]
    assert allocate_budgets(s, 64, 100, redistribute=False).tolist() == [[64, 35], [35, 100]]
    #  21.6 do not fit the last head; the first, the only other one with a score, takes them: 85.6
    assert allocate_budgets(s, 64, 100).tolist() == [[86, 35], [35, 100]]
    #  b = 90, T = 100: both visual heads are full, 160 are left for the two others
    assert allocate_budgets(s, 90, 100).tolist() == [[100, 80], [80, 100]]
    #  rho = 0: heads without a score keep their window only; rho = 1: all alike
    assert allocate_budgets(s, 64, 500, rho=0.0).tolist() == [[64, 32], [32, 128]]
    assert allocate_budgets(s, 64, 500, rho=1.0).tolist() == [[64, 64], [64, 64]]
    #  equal remainders: 32 + 1/3 each of three heads, and one entry goes to the first
    assert allocate_budgets(torch.ones(1, 3), 33, 99, window=32, rho=0.0).tolist() == [[33, 33, 33]]
    assert cache.round_to_total(torch.tensor([[1.5, 2.5], [3.5, 0.5]]), 8 + 0).tolist() == \
        [[2, 3], [3, 0]]


def test_budgets_sum_to_B():
    generator = torch.Generator().manual_seed(0)
    for trial in range(100):
        L, G, T = 1 + trial % 5, 1 + trial % 7, 20 + 13 * trial
        s = torch.rand(L, G, generator=generator) ** 8
        b = 32 + trial * 5
        budgets = allocate_budgets(s, b, T, rho=trial % 11 / 10)
        assert budgets.sum() == min(b * L * G, L * G * T)
        assert budgets.min() >= min(32, T) and budgets.max() <= T


def test_uniform_scores_give_snapkv_budgets():
    for b, T, rho in ((64, 500, 0.1), (33, 90, 0.0), (100, 101, 0.7)):
        assert (allocate_budgets(torch.full((3, 5), 0.2), b, T, rho=rho) == b).all()


def test_everything_is_kept_when_it_fits():
    s = torch.tensor([[5.0, 1.0, 0.0]])
    assert allocate_budgets(s, 200, 120).tolist() == [[120] * 3]
    assert allocate_budgets(s, 64, 20).tolist() == [[20] * 3]              # T <= w


def test_layers_may_differ_in_length():
    budgets = allocate_budgets(torch.ones(3, 2), 100, torch.tensor([20, 60, 1000]))
    assert budgets.sum() == 600 and budgets[0].tolist() == [20, 20] \
        and budgets[1].tolist() == [60, 60]


def slow_budgets(s, b, T, w, rho, redistribute):
    """The budgets in exact fractions, head by head, the surplus handed out over and over."""
    heads, N = [Fraction(x) for x in s.flatten().tolist()], s.numel()
    B = b * N
    free = B - N * w
    ideal = [w + Fraction(rho) * free / N + (free - Fraction(rho) * free) * x / sum(heads)
             for x in heads]
    total = B
    if redistribute:
        total = min(B, N * T)
        while (surplus := sum(max(Fraction(0), x - T) for x in ideal)) > 0:
            ideal = [min(x, Fraction(T)) for x in ideal]
            open_heads = [i for i in range(N) if ideal[i] < T]
            if not open_heads:
                break
            shares = {i: heads[i] for i in open_heads}
            if sum(shares.values()) == 0:
                shares = {i: Fraction(1) for i in open_heads}
            for i in open_heads:
                ideal[i] += surplus * shares[i] / sum(shares.values())
    whole = [x.numerator // x.denominator for x in ideal]
    ranked = sorted(range(N), key=lambda i: (-(ideal[i] - whole[i]), i))
    for i in ranked[:total - sum(whole)]:
        whole[i] += 1
    return torch.tensor([min(x, T) for x in whole]).view(s.shape)


def test_budgets_equal_a_slow_twin():
    rng = random.Random(0)
    for trial in range(1000):
        L, G = rng.randint(1, 4), rng.randint(1, 5)
        s = torch.tensor([[rng.choice([0, 0, 1, 2, 5, 50, 1000]) / rng.choice([1, 2, 4, 8])
                           for _ in range(G)] for _ in range(L)], dtype=torch.float64)
        s[rng.randrange(L), rng.randrange(G)] += 1
        w = rng.randint(1, 40)
        arguments = (s, w + rng.randint(0, 200), rng.randint(1, 300), w,
                     rng.choice([0.0, 0.125, 0.5, 1.0]))
        for redistribute in (True, False):
            got = allocate_budgets(*arguments, redistribute=redistribute)
            assert torch.equal(got, slow_budgets(*arguments, redistribute)), arguments


def test_scores_of_any_size_share_out_the_whole_budget():
    """However far apart, and where their sum is no number."""
    budgets = allocate_budgets([[1, 1e-310, 1e-310, 1e-310]], 100, 150)
    assert budgets.tolist() == [[150, 84, 83, 83]]
    assert allocate_budgets([[1e300, 1e308, 1e308]], 100, 1000).tolist() == [[39, 131, 130]]


@pytest.mark.parametrize("change", [
    dict(budget=31), dict(window=0), dict(rho=1.5), dict(rho=math.nan),
    dict(head_scores=torch.zeros(2, 2)), dict(head_scores=-torch.ones(2, 2)), dict(length=0),
    dict(head_scores=torch.tensor([[math.nan, 1]])), dict(length=[5, 5, 5])])
def test_allocate_budgets_rejects(change):
    with pytest.raises(ValueError):
        allocate_budgets(**{**dict(head_scores=torch.ones(2, 2), budget=64, length=100), **change})


def test_pyramid_budgets():
    # n = 32 a head beyond the window: n_min = 32 // 20 = 1, n_max = 63; 63, 42.33, 21.67, 1
    assert cache.pyramid_budgets(4, 64, 1000, 32).tolist() == [95, 74, 54, 33]
    # no more than 50 - 32 = 18 fit; n = 12, n_min is raised to 6: 18, 14, 10, 6
    assert cache.pyramid_budgets(4, 44, 50, 32).tolist() == [50, 46, 42, 38]
    for b, T in ((33, 100), (90, 99), (256, 3000)):
        budgets = cache.pyramid_budgets(7, b, T, 32)
        assert budgets.sum() == 7 * b and budgets.max() <= T and budgets.min() >= 32
    assert cache.pyramid_budgets(1, 64, 1000, 32).tolist() == [64]


def test_adakv_budgets():
    # n = 2 a head. Head 0 holds 9 of 10 in its best two, head 1 only 2 of 8: weights 0.9 and 0.25
    a = torch.tensor([[5.0, 4, 0.5, 0.5, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    # ranked: 4.5, 3.6, 0.45, 0.45 | 0.25 ...: all four best are head 0's; 0.8 * 4 + 0.2 * 2 = 3.6,
    # and 0.4
    assert cache.adakv_budgets(a, 6, 4).tolist() == [8, 4]
    generator = torch.Generator().manual_seed(1)
    for n in (1, 7, 60):
        budgets = cache.adakv_budgets(torch.rand(5, 68, generator=generator), 32 + n, 32)
        assert budgets.sum() == 5 * (32 + n) and budgets.min() >= 32 and budgets.max() <= 100


def test_every_method_spends_the_same_total():
    q, k = torch.randn(6, 90, 8), torch.randn(3, 90, 8)
    for name in METHODS[1:]:
        method = make_method(name, 4, 3, 90, budget=50, head_scores=torch.rand(4, 6))
        total = sum(int(method.budgets(l, method.position_scores(q, k, 32)).sum())
                    for l in range(4))
        assert total == 4 * 3 * 50, name


def test_random_and_shuffled_are_drawn_once_from_the_seed():
    scores = torch.rand(4, 6, dtype=torch.float64) ** 4
    for name in ("random", "shuffled"):
        first, again, other = (cache.shared_out_by(name, 4, 3, scores, seed) for seed in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)
    visual = cache.kv_head_scores(scores, 3)
    assert torch.allclose(visual[:, 0],
                          scores[:, 0] + scores[:, 1])             # heads 0 and 1 share KV head 0
    assert torch.equal(cache.shared_out_by("shuffled", 4, 3, scores, 0).flatten().sort().values,
                       visual.flatten().sort().values)


# ---- which entries -------------------------------------------------------------------------------


def brute_force_observation(q, k, window, kernel):
    (H, T, D), G = q.shape, k.shape[0]
    pooled = torch.zeros(G, T - window)
    for g in range(G):
        mean = np.zeros(T - window)
        for h in range(g * (H // G), (g + 1) * (H // G)):
            for t in range(T - window, T):
                row = np.array([float(q[h, t] @ k[g, j]) / math.sqrt(D) for j in range(t + 1)])
                row = np.exp(row - row.max())
                mean += (row / row.sum())[:T - window] / window / (H // G)
        for j in range(T - window):
            around = [mean[i] if 0 <= i < T - window else 0.0
                      for i in range(j - kernel // 2, j + kernel // 2 + 1)]
            pooled[g, j] = sum(around) / kernel
    return pooled


@pytest.mark.parametrize("H, G, T, D, w, kernel", [(4, 4, 20, 8, 5, 5), (6, 2, 17, 4, 3, 3),
                                                   (2, 1, 9, 16, 8, 5), (3, 3, 12, 8, 1, 1)])
def test_observed_attention_equals_brute_force(H, G, T, D, w, kernel):
    torch.manual_seed(T)
    q, k = torch.randn(H, T, D), torch.randn(G, T, D)
    assert torch.allclose(observed_attention(q, k, w, kernel),
                          brute_force_observation(q, k, w, kernel), atol=1e-6)


def test_a_prompt_within_the_window_has_no_positions_to_choose_from():
    q, k = torch.randn(4, 10, 8), torch.randn(2, 10, 8)
    assert observed_attention(q, k, window=32).shape == (2, 0)
    assert select_entries(torch.empty(2, 0), torch.tensor([10, 10]), 10).all()


def test_selected_are_the_best_and_the_window():
    a = torch.tensor([[0.1, 0.9, 0.3, 0.9, 0.3], [0.0, 0, 0, 0, 0]])             # T - w = 5
    keep = select_entries(a, torch.tensor([5, 4]), 7)
    assert keep.nonzero().tolist() == [[0, 1], [0, 2], [0, 3], [0, 5], [0, 6],        # tie: lower
                                       [1, 0], [1, 1], [1, 5], [1, 6]]
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        a = torch.randint(0, 6, (3, 30), generator=generator).float()
        budgets = torch.randint(4, 35, (3,), generator=generator)
        for scores, n, kept in zip(a, budgets.tolist(), select_entries(a, budgets, 34)):
            best = sorted(range(30), key=lambda i: (-scores[i].item(), i))[:n - 4]
            assert kept.nonzero()[:, 0].tolist() == sorted(best) + [30, 31, 32, 33]


def test_window_keeps_the_last_and_streaming_the_first_four_too():
    q, k = torch.randn(2, 60, 8), torch.randn(2, 60, 8)
    kept = {}
    for name in ("window", "streaming"):
        method = make_method(name, 1, 2, 60, budget=40, window=8)
        a = method.position_scores(q, k, 8)
        kept[name] = select_entries(a, method.budgets(0, a), 60)[0].nonzero()[:, 0].tolist()
    assert kept["window"] == list(range(20, 60))
    assert kept["streaming"] == [0, 1, 2, 3] + list(range(24, 60))


# ---- the cache, and decoding from it -------------------------------------------------------------


def filled_cache(G, lengths, D=8, w=4, R=2, T=60, dtype=torch.float32):
    """A cache of one layer whose heads keep lengths[g] entries, window included, of T random ones;
    and these keys and values (G, T, D)."""
    k, v = torch.randn(G, T, D).to(dtype), torch.randn(G, T, D).to(dtype)
    plan = cache.Method(lambda layer, a: torch.tensor(lengths), observed_attention)
    held = KVCache(plan, w)
    held.compress(0, torch.randn(G * R, T, D).to(dtype), k, v)
    return held, k, v


def test_heads_hold_what_was_selected_and_appending_moves_nothing():
    torch.manual_seed(0)
    G, T, D, w, q = 2, 30, 4, 5, torch.randn(4, 30, 4)
    k, v = torch.randn(G, T, D), torch.randn(G, T, D)
    held = KVCache(make_method("snapkv", 1, G, T, budget=12, window=w), w)
    held.compress(0, q, k, v)
    keep = select_entries(observed_attention(q, k, w), torch.tensor([12, 12]), T)
    expected = [(k[g, keep[g]], v[g, keep[g]]) for g in range(G)]
    for step in range(cache.ROOM):
        pointers = [[x.data_ptr() for x in head] for head in held[0]]
        for (K, V), (expected_k, expected_v) in zip(held[0], expected):
            assert torch.equal(K, expected_k) and torch.equal(V, expected_v)
        assert held.held() == [[12 + step] * G]
        assert held.held_bytes() == 2 * D * 4 * G * (12 + step)
        new_k, new_v = torch.randn(G, 1, D), torch.randn(G, 1, D)
        assert not held.extend()
        held.append(0, new_k, new_v)
        expected = [(torch.cat([a, new_k[g]]), torch.cat([b, new_v[g]]))
                    for g, (a, b) in enumerate(expected)]
        assert [[x.data_ptr() for x in head] for head in held[0]] == pointers


@pytest.mark.parametrize("lengths", [[9, 9], [4, 21]])
def test_room_grows_in_steps_and_what_is_held_stays(lengths):
    """What is allocated does not depend on how many tokens may come, but on how many came."""
    torch.manual_seed(0)
    held, k, _ = filled_cache(2, lengths)
    first = held.allocated_bytes()
    assert first == (sum(lengths) + 2 * cache.ROOM) * 2 * 8 * 4
    expected, moves = [K.clone() for K, _ in held[0]], []
    for step in range(5 * cache.ROOM):
        new = torch.randn(2, 1, 8)
        moves.append(held.extend())
        held.append(0, new, new)
        expected = [torch.cat([K, row]) for K, row in zip(expected, new)]
    assert [i for i, moved in enumerate(moves) if moved] == [cache.ROOM, 2 * cache.ROOM,
                                                             4 * cache.ROOM]
    for (K, V), old in zip(held[0], expected):
        assert torch.equal(K, old) and torch.equal(V[-5 * cache.ROOM:], old[-5 * cache.ROOM:])
    assert held.allocated_bytes() == (sum(lengths) + 2 * 8 * cache.ROOM) * 2 * 8 * 4


@pytest.mark.parametrize("H, G", [(4, 4), (6, 2), (5, 1)])
def test_decode_attention_and_its_packed_twin_equal_softmax_by_hand(H, G):
    """For heads that hold equally many entries, unequally many, and nothing but the window; while
    the cache grows, and after its tensors were moved."""
    torch.manual_seed(0)
    for lengths in ([4] * G, [11] * G, [4 + (13 * g) % 40 for g in range(1, G + 1)]):
        held, _, _ = filled_cache(G, lengths, R=H // G)
        packed = None
        for _ in range(cache.ROOM + 3):
            q, new = torch.randn(H, 1, 8), torch.randn(2, G, 1, 8)
            if held.extend() or packed is None:
                packed = PackedAttention(held)
            else:
                packed.extend()
            out = packed.attend(0, q, *new)                                    # appends, too
            for h in range(H):
                K, V = held[0][h * G // H]
                assert torch.equal(K[-1], new[0, h * G // H, 0])
                p = (K @ q[h, 0] / math.sqrt(8)).softmax(0)
                assert (out[h, 0] - p @ V).abs().max() < 1e-5
            assert (decode_attention(q, held[0]) - out).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [100, 1000, 5000])
@pytest.mark.parametrize("lengths", [[30, 30], [5, 51]])
def test_large_logits_are_exact_in_half_precision(dtype, size, lengths):
    """A constant in one channel, such as key biases make in Qwen2-VL, lifts the logits to `size`: a
    head's output, of the loop, of the packed twin and in prefill, is that of float64 on the same
    numbers, and position scores are those of float64, too."""
    torch.manual_seed(0)
    G, R, D, T = 2, 3, 32, 60
    root = math.sqrt(size * math.sqrt(D))
    q, k, v = torch.randn(G * R, T, D), torch.randn(G, T, D), torch.randn(G, T, D)
    q[:, :, 0], k[:, :, 0] = root, root * (1 + torch.rand(G, T) / 500)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    plan = cache.Method(lambda layer, a: torch.tensor(lengths), observed_attention)
    held = KVCache(plan, 4)
    held.compress(0, q, k, v)
    held.extend()
    packed = PackedAttention(held)
    outputs = {"packed": packed.attend(0, q[:, -1:], k[:, -1:], v[:, -1:])}
    outputs["loop"] = decode_attention(q[:, -1:], held[0])
    for name, out in outputs.items():
        for h in range(G * R):
            K, V = (x.double() for x in held[0][h // R])
            p = (K @ q[h, -1].double() / math.sqrt(D)).softmax(0)
            assert (out[h, 0] - p @ V).norm() < 0.01 * (p @ V).norm(), (name, h)
    exact = prefill_attention(q.double(), k.double(), v.double())
    assert (prefill_attention(q, k, v) - exact).norm() < 0.01 * exact.norm()
    a, exact = observed_attention(q, k, 4), observed_attention_in_float64(q, k, 4)
    assert a.dtype == torch.float32 and (a - exact).abs().max() < 0.01 * exact.max()


def observed_attention_in_float64(q, k, w):
    """As brute_force_observation, in one product."""
    (H, T, D), G = q.shape, len(k)
    logits = q[:, -w:].double() @ k.double().repeat_interleave(H // G, 0).transpose(1, 2)
    logits = logits.masked_fill(torch.ones(w, T).triu(T - w + 1).bool(), -math.inf) / math.sqrt(D)
    a = logits.softmax(-1)[:, :, :T - w].mean(1).view(G, H // G, -1).mean(1)
    return F.avg_pool1d(a[:, None], 5, stride=1, padding=2)[:, 0]


def biased_qwen(size):
    """A random Qwen2-VL whose query and key biases lift all logits to about `size`: a constant in
    the channel that hardly turns with the position, and which nothing else writes to."""
    torch.manual_seed(1)
    config = model_llava.convert_config(qwen_config(2, 4, 2, 32, False, (6, 5, 5)), "qwen2_vl")
    config = replace(config, rope_theta=1e12)
    model = model_llava.Qwen2VL(config).requires_grad_(False)
    for name, parameter in model.named_parameters():
        wide = parameter.dim() > 1 and "embed" not in name
        parameter.normal_(0, 1 / math.sqrt(parameter.shape[-1]) if wide else 1)
        parameter.fill_(1) if "norm" in name else None
    D = config.head_dim
    for layer in model.model.layers:
        qkv = layer.self_attn.qkv_proj
        of_q_and_k = slice(config.heads + config.kv_heads)
        for channel, bias in ((D // 2 - 1, math.sqrt(size * math.sqrt(D))), (D - 1, 0)):
            qkv.weight.view(-1, D, config.width)[of_q_and_k, channel] = 0
            qkv.bias.view(-1, D)[of_q_and_k, channel] = bias
    return model.eval()


@pytest.mark.parametrize("size", [100, 1000, 5000])
def test_decoding_with_large_biases_in_bfloat16_agrees_with_a_fused_kernel(size):
    """Forced tokens, bfloat16: how often the likeliest next token is that of float32, for decoding
    from the cache and for one pass of scaled_dot_product_attention over everything. (Of logits that
    are rounded to bfloat16 it is 90, 66 and 67 % of the tokens, of these here 97 and 98 %.)"""
    model = biased_qwen(size)
    c, ids = model.config, torch.randint(0, model.config.vocabulary, (160,))
    prompt, n = model_llava.Prompt(ids, torch.arange(160).expand(3, -1), [], [], []), 100
    with torch.inference_mode():
        exact = model.logits(model.hidden_states(prompt)[-n - 1:-1]).argmax(-1)
        model = model.bfloat16()
        fused = model.logits(model.hidden_states(prompt)[-n - 1:-1]).argmax(-1)
        short = model_llava.Prompt(ids[:160 - n - 1], prompt.positions[:, :160 - n - 1], [], [], [])
        held = KVCache(make_method("full", c.layers, c.kv_heads, len(short.ids)))
        sparsemm.prefill(model, short, held)
        decoded = torch.stack([sparsemm.decode(model, held, int(ids[i]), i)
                               for i in range(160 - n - 1, 159)]).argmax(-1)
    by_fused, by_decoding = ((x == exact).double().mean().item() for x in (fused, decoded))
    assert by_decoding > by_fused - 0.05, (by_decoding, by_fused)


def forced_logits(model, prompt, tokens, held, packed=False):
    """Logits (len(tokens), vocabulary) while `tokens` are forced after a prefill into the cache
    `held`; packed: by the twin of decode_attention for CUDA."""
    logits, twin = [], None
    with torch.inference_mode():
        sparsemm.prefill(model, prompt, held)
        for position, token in enumerate(tokens, prompt.next_position):
            if not packed:
                logits.append(sparsemm.decode(model, held, token, position))
                continue
            moved = held.extend()
            twin = PackedAttention(held) if moved or twin is None else twin
            if len(logits):
                twin.extend()
            logits.append(model.decode(token, position, twin.attend))
    return torch.stack(logits)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vicuna", "qwen"])
@pytest.mark.parametrize("packed", [False, True], ids=["loop", "packed"])
def test_evicted_decode_equals_masked_attention(checkpoints, monkeypatch, name, method, packed):
    """transformers' full attention, with a mask that hides from the new tokens what each head has
    dropped."""
    _, reference, ours = checkpoints[name]
    c, images, tokens, w = ours.config, [picture(64, 50)], [40, 41, 60, 33, 70], 6
    prompt = model_llava.prepare(ours, images, "What is it?")
    T, n, kept = len(prompt.ids), len(tokens), []                                # (G, T) per layer
    monkeypatch.setattr(cache, "select_entries",
                        lambda *arguments: kept.append(select_entries(*arguments)) or kept[-1])
    plan = make_method(method, c.layers, c.kv_heads, T, budget=20, window=w,
                       head_scores=torch.rand(c.layers, c.heads))
    logits = forced_logits(ours, prompt, tokens, KVCache(plan, w), packed)
    if method != "full":
        assert torch.stack(kept).sum() == 20 * c.layers * c.kv_heads

    def mask(layer):
        seen = torch.ones(T + n, T + n).tril().bool().repeat(c.heads, 1, 1)
        seen[:, T:, :T] &= kept[layer].repeat_interleave(c.heads // c.kv_heads, 0)[:, None]
        return torch.zeros(1, c.heads, T + n, T + n).masked_fill(~seen, -torch.inf)

    layers = reference.model.language_model.layers
    hooks = [layer.self_attn.register_forward_pre_hook(
        lambda module, args, kwargs, m=mask(l): (args, {**kwargs, "attention_mask": m}),
        with_kwargs=True) for l, layer in enumerate(layers)]
    try:
        expected = reference_logits(reference, ours, prompt.extended(tokens), images)[T:]
    finally:
        for hook in hooks:
            hook.remove()
    assert (logits - expected).abs().max() < 1e-4


def test_full_method_equals_no_cache_at_all(checkpoints):
    for name, (_, _, ours) in checkpoints.items():
        images = [picture(70, 40)]
        result = sparsemm.generate(ours, images, "Read this.", "full", max_new_tokens=8)
        prompt, tokens = model_llava.prepare(ours, images, "Read this."), []
        with torch.inference_mode():
            for _ in result["token_ids"]:
                hidden = ours.hidden_states(prompt.extended(tokens))
                tokens.append(int(ours.logits(hidden[-1]).argmax()))
        assert tokens == result["token_ids"], name
        assert result["kept"] == [[len(prompt.ids)] * ours.config.kv_heads] * ours.config.layers


@pytest.mark.parametrize("method", METHODS)
def test_budget_beyond_the_prompt_equals_full(checkpoints, method):
    ours = checkpoints["mistral"][2]
    scores = torch.rand(ours.config.layers, ours.config.heads)
    arguments = dict(images=[picture(60, 60)], prompt="What?", max_new_tokens=6,
                     head_scores=scores)
    full = sparsemm.generate(ours, method="full", **arguments)
    T = full["prompt_tokens"]
    for budget in (T, T + 100):
        result = sparsemm.generate(ours, method=method, budget=budget, **arguments)
        assert (result["token_ids"], result["kept"]) == (full["token_ids"], full["kept"])
        assert result["cache_bytes"] == full["cache_bytes"] == full["full_cache_bytes"]


@pytest.mark.parametrize("method", METHODS)
def test_the_first_token_is_that_of_the_full_cache(checkpoints, method):
    """A layer is compressed behind its prefill attention: whatever is kept, prefill saw it all."""
    ours, images = checkpoints["qwen"][2], [picture(90, 120)]
    first = {sparsemm.generate(ours, images, "What is it?", name, 33, head_scores=torch.rand(3, 6),
                               max_new_tokens=1)["token_ids"][0] for name in ("full", method)}
    assert len(first) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("method", METHODS)
def test_cuda_equals_cpu(checkpoints, method):
    for name in ("vicuna", "mistral", "qwen"):
        folder, _, ours = checkpoints[name]
        there = model_llava.load(folder, "cuda", "float32")
        arguments = dict(images=[picture(64, 50)], prompt="What is it?", method=method, budget=40,
                         head_scores=torch.ones(ours.config.layers, ours.config.heads).cumsum(1),
                         max_new_tokens=cache.ROOM + 6)
        results = [sparsemm.generate(model, **arguments) for model in (ours, there)]
        assert results[0]["token_ids"] == results[1]["token_ids"]
        assert results[0]["kept"] == results[1]["kept"]


TURNS = {"vicuna": "</s>USER: So? ASSISTANT:", "mistral": "</s>[INST] So? [/INST]",
         "qwen": "<|im_end|>\n<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n"}


@pytest.mark.parametrize("name", TURNS)
def test_second_question_equals_one_long_prompt_in_transformers(checkpoints, name):
    """Nothing evicted: what was appended is what a single long conversation would have been."""
    _, reference, ours = checkpoints[name]
    images = [picture(45, 60), picture(30, 31, seed=1)]
    processor = ours.processor
    assert processor.tokenizer.decode(processor.next_turn_ids(2, ["Hi", "Yes", "So?"])) == \
        TURNS[name]
    talk = sparsemm.Conversation(ours, images, "full", max_new_tokens=5)
    first, second = talk.ask("What is it?"), talk.ask("So?")
    long, answer = talk.inputs.ids[:second["prompt_tokens"]], second["token_ids"]
    said = [t for t in first["token_ids"] if t not in processor.end_tokens]
    assert long[first["prompt_tokens"]:].tolist() == \
        said + processor.next_turn_ids(2, ["Hi", "Yes", "So?"])
    prompt = model_llava.prepare(ours, images, "Hi")
    prompt.ids = torch.cat([long, torch.tensor(answer[:-1])])
    logits = reference_logits(reference, ours, prompt, images)[len(long) - 1:]
    assert logits.argmax(-1).tolist() == answer
    assert second["kept"] == [[len(long)] * ours.config.kv_heads] * ours.config.layers


def test_second_question_goes_on_from_what_was_kept(checkpoints):
    """Its tokens are appended to every head; --fresh compresses the whole conversation instead, and
    answers as a new prompt of the same tokens would."""
    ours, images = checkpoints["qwen"][2], [picture(90, 120)]
    settings = dict(method="snapkv", budget=40, max_new_tokens=4)
    talk = sparsemm.Conversation(ours, images, **settings)
    first = talk.ask("What is it?")
    pointers = [keys.data_ptr() for keys in talk.cache.keys]
    second = talk.ask("So?")
    assert [keys.data_ptr() for keys in talk.cache.keys] == pointers
    appended = second["prompt_tokens"] - first["prompt_tokens"]
    assert second["kept"] == [[n + appended for n in layer] for layer in first["kept"]]
    fresh = sparsemm.Conversation(ours, images, **settings, fresh=True)
    again = fresh.ask("What is it?"), fresh.ask("So?")
    assert again[0]["token_ids"] == first["token_ids"]
    assert again[1]["prompt_tokens"] == second["prompt_tokens"]
    assert again[1]["kept"] == [[40] * 2] * 3
    T = second["prompt_tokens"]
    prompt = replace(fresh.inputs, ids=fresh.inputs.ids[:T],
                     positions=fresh.inputs.positions[:, :T])
    with torch.inference_mode():
        anew = sparsemm.prefill(ours, prompt, sparsemm.new_cache(ours, T, 4, "snapkv", 40, 32))
    assert anew.argmax() == again[1]["token_ids"][0]


class Operations(TorchDispatchMode):
    """Counts what is dispatched, views aside, and notes the largest tensor that comes out."""
    VIEWS = ("view", "t", "numpy_T", "transpose", "split", "split_with_sizes", "chunk", "slice",
             "select", "unbind", "expand", "flatten", "unsqueeze", "permute", "to", "detach",
             "_reshape_alias", "lift_fresh", "item", "_unsafe_view")

    def __init__(self):
        super().__init__()
        self.count, self.elements = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.count += function.__name__.split(".")[0] not in self.VIEWS
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("H, G", [(4, 4), (6, 2), (8, 1)])
def test_a_decoding_step_dispatches_few_operations(H, G):
    """Per layer: by the loop at most 14, and 4 for each KV head; by the packed twin at most 17, and
    with half precision's rounding of the weights 18. float32 has no such rounding."""
    counts = {}
    for L in (1, 3):
        config = llava_config(MistralConfig, L, H, G, 8, False)
        config = model_llava.convert_config(config, "llava_next")
        model = model_llava.LlavaNext(config).requires_grad_(False)
        prompt = model_llava.Prompt(torch.arange(60), torch.arange(60).expand(3, -1), [], [], [])
        with torch.inference_mode():
            held = KVCache(make_method("sparsemm", L, G, 60, 40, head_scores=torch.rand(L, H)))
            sparsemm.prefill(model, prompt, held)
            sparsemm.decode(model, held, 3, 60)
            with Operations() as loop:
                sparsemm.decode(model, held, 3, 61)
            held.extend()
            twin = PackedAttention(held)
            with Operations() as packed:
                model.decode(3, 62, twin.attend)
        counts[L] = loop.count, packed.count
    loop, packed = ((b - a) / 2 for a, b in zip(counts[1], counts[3]))
    assert loop <= 14 + 4 * G and packed <= 17, (loop, packed)


def test_prefill_memory_does_not_grow_with_the_square_of_the_prompt(checkpoints):
    ours = checkpoints["qwen"][2]
    c, largest = ours.config, []
    for T in (1000, 2000):
        prompt = model_llava.Prompt(torch.randint(0, 90, (T,)), torch.arange(T).expand(3, -1),
                                    [], [], [])
        with Operations() as seen, torch.no_grad():
            sparsemm.prefill(ours, prompt, KVCache(make_method("snapkv", c.layers, c.kv_heads, T)))
        largest.append(seen.elements)
    assert largest[1] <= 2.05 * largest[0] and largest[1] < 2000 * 2000 / 4
    # and what the fused kernel uses inside: one head over 12,000 tokens, whose square would take
    # 576 MB in float32
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prefill_attention(*(torch.randn(1, 12000, 8) for _ in range(3)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000         # kilobytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("H, G", [(4, 4), (6, 2), (5, 1)])
def test_prefill_attention_equals_softmax_and_copies_no_keys(monkeypatch, H, G, dtype):
    torch.manual_seed(0)
    T, D = 300, 16
    q, k, v = (torch.randn(T, n, D).to(dtype).transpose(0, 1) for n in (H, G, G))   # as projected
    storages, attention = set(), F.scaled_dot_product_attention

    def recorded(*heads, **options):
        storages.update(x.untyped_storage().data_ptr() for x in heads)
        return attention(*heads, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    out = prefill_attention(q, k, v)
    assert storages == {x.untyped_storage().data_ptr() for x in (q, k, v)}
    k, v = (x.double().repeat_interleave(H // G, 0) for x in (k, v))
    logits = q.double() @ k.transpose(1, 2) / math.sqrt(D)
    expected = logits.masked_fill(~torch.ones(T, T).tril().bool(), -math.inf).softmax(-1) @ v
    assert torch.allclose(out.double(), expected, atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_a_layer_is_compressed_before_the_next_one_has_keys(checkpoints, monkeypatch):
    """So that no more than one layer's full keys and values exist at a time."""
    ours, order = checkpoints["mistral"][2], []
    project, compress = model_llava.Attention.project, KVCache.compress
    monkeypatch.setattr(model_llava.Attention, "project",
                        lambda self, *rest: order.append("project") or project(self, *rest))
    monkeypatch.setattr(KVCache, "compress",
                        lambda self, l, *rest: order.append(l) or compress(self, l, *rest))
    sparsemm.generate(ours, [picture(40, 40)], "Hi", "snapkv", 40, max_new_tokens=1)
    assert order == ["project", 0, "project", 1]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_numbers_that_are_not_finite_are_an_error_and_no_answer(checkpoints, dtype):
    """A weight that is no number, and one too large for half precision."""
    model = model_llava.load(checkpoints["qwen"][0], "cpu", dtype)
    model.model.layers[1].mlp.down_proj.weight[3, 3] = math.nan
    with pytest.raises(ValueError, match=f"token 0 are not finite in {dtype}"):
        sparsemm.generate(model, [picture(40, 40)], "Hi", "snapkv")
    model.model.layers[0].self_attn.qkv_proj.weight[3, 3] = math.nan
    with pytest.raises(ValueError, match=f"layer 0.*not finite in {dtype}"):
        score_heads.score_transcript(model, [picture(40, 40)], [[("a", (0, 0, 9, 9))]], [40, 41])


# ---- scoring -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vicuna", "mistral", "qwen"])
def test_scores_equal_counting_with_attention_maps(checkpoints, name):
    """One pass over peaks = transformers' full attention maps, counted token by token: a transcript
    of one image, and one of two."""
    _, reference, ours = checkpoints[name]
    shown = [picture(60, 45), picture(40, 70)]
    boxes = [[("ab", (2, 2, 30, 20)), ("cd", (31, 2, 58, 20))], [("e", (5, 25, 30, 44))]]
    both = [("ab", 0, boxes[0][0][1]), ("cd", 0, boxes[0][1][1]), ("e", 1, boxes[1][0][1])]
    for images, words in ((shown[:1], both[:2]), (shown, both)):
        tokens = [VOCABULARY[c] for c in " ".join(text for text, *_ in words)]
        scores, counted, hits = score_heads.score_transcript(ours, images, boxes[:len(images)],
                                                             tokens)
        prompt, hit = model_llava.prepare(ours, images, score_heads.OCR_PROMPT), 0
        inputs = dict(ours.processor.image_processor(images, return_tensors="pt"))
        longer = prompt.extended(tokens)
        if name == "qwen":
            inputs["mm_token_type_ids"] = (longer.ids == ours.config.image_token).int()[None]
        with torch.no_grad():
            maps = reference(input_ids=longer.ids[None], output_attentions=True,
                             **inputs).attentions
        expected = torch.zeros_like(scores)
        of_token = [0, 0, None, 1, 1, None, 2][:len(tokens)]
        for i, word in enumerate(of_token):
            if word is None:
                continue
            _, image, (x0, y0, x1, y1) = words[word]
            tokens_of = prompt.images[image]
            region = {prompt.starts[image] + j
                      for j, (a, b, c, d) in enumerate(tokens_of.boxes.tolist())
                      if tokens_of.kinds[j] == model_llava.GRID
                      and min(c, x1) > max(a, x0) and min(d, y1) > max(b, y0)}
            for l, attention in enumerate(maps):
                for h in range(ours.config.heads):
                    if int(attention[0, h, len(prompt.ids) - 1 + i].argmax()) in region:
                        expected[l, h] += 1 / len(region)
                        hit += 1
        assert (counted, hits) == (len(of_token) - of_token.count(None), hit) and hit > 0
        assert torch.allclose(scores, expected)


def test_alignment_survives_repeated_words_and_faults():
    assert score_heads.align_tokens(list("to be"), ["to", "be"]) == [0, 0, None, 1, 1]
    assert score_heads.align_tokens(["the", " ca", "t the"], ["the", "cat", "the"]) == [0, 1, 2]
    assert score_heads.align_tokens(list("tXtal 5"), ["total", "5"]) == [0, None, 0, 0, 0, None, 1]


def test_unique_match_counts_what_one_word_alone_contains():
    pieces = ["the", " ", "cat", "c", "hat", "5"]
    assert score_heads.unique_tokens(pieces, ["the", "cat", "the", "hats", "c5"]) == \
        [None, None, 1, None, 3, 4]


def plant(monkeypatch, model, planted, targets, elsewhere):
    """Makes the model's planted (layer, head) look at targets[i] while token i is emitted, and all
    other heads at `elsewhere`."""
    c = model.config

    def hidden_states(prompt, attend):
        T = len(prompt.ids)
        k = torch.eye(T).expand(c.kv_heads, T, T)
        for layer in range(c.layers):
            q = torch.zeros(c.heads, T, T)
            q[:, :, elsewhere] = 1
            for row, target in enumerate(targets, T - len(targets)):
                if planted[0] == layer:
                    q[planted[1], row] = F.one_hot(torch.tensor(target), T)
            attend(layer, q, k, k)

    monkeypatch.setattr(model, "hidden_states", hidden_states)


@pytest.mark.parametrize("name", ["vicuna", "mistral", "qwen"])
def test_a_planted_head_scores_and_no_other(checkpoints, monkeypatch, name):
    """Words at all four edges of a wide image, so that LLaVA's unpadding and newlines matter."""
    ours = checkpoints[name][2]
    image = picture(150, 60)
    words = [("a", (0, 0, 20, 14)), ("b", (130, 0, 150, 14)), ("a", (0, 46, 20, 60)),
             ("c", (130, 46, 150, 60))]
    prompt = model_llava.prepare(ours, [image], score_heads.OCR_PROMPT)
    shown, start = prompt.images[0], prompt.starts[0]
    targets = []
    for _, (x0, y0, x1, y1) in words:            # the grid token that shows the middle of the word
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        targets.append(start + next(
            j for j, (a, b, c, d) in enumerate(shown.boxes.tolist())
            if shown.kinds[j] == model_llava.GRID and a <= x < c and b <= y < d))
    newlines = (shown.kinds == model_llava.NEWLINE).nonzero()[:, 0]
    elsewhere = start + int(newlines[0]) if len(newlines) else start - 1
    plant(monkeypatch, ours, (1, 2), targets, elsewhere)
    scores, counted, hits = score_heads.score_transcript(ours, [image], [words],
                                                         [VOCABULARY[c] for c in "abac"])
    expected = sum(1 / len(score_heads.tokens_in_box(shown, box)) for _, box in words)
    assert (counted, hits) == (4, 4)
    assert scores[1, 2] == pytest.approx(expected) and scores.sum() == scores[1, 2]
    # the same look with the words' boxes exchanged is no hit, except for the repeated "a"
    moved = [("a", words[3][1]), ("b", words[2][1]), ("a", words[1][1]), ("c", words[0][1])]
    assert score_heads.score_transcript(ours, [image], [moved],
                                        [VOCABULARY[c] for c in "abac"])[2] == 0


def test_thumbnail_and_newline_tokens_never_count(checkpoints):
    shown = model_llava.prepare(checkpoints["vicuna"][2], [picture(150, 60)], "Hi").images[0]
    inside = score_heads.tokens_in_box(shown, (0, 0, 150, 60))
    assert (shown.kinds[inside] == model_llava.GRID).all()
    assert len(inside) == shown.grid[0] * shown.grid[1]


def test_boxes_outside_the_image_or_without_area_cover_nothing(checkpoints):
    shown = model_llava.prepare(checkpoints["qwen"][2], [picture(80, 64)], "Hi").images[0]
    for box in [(90, 0, 120, 10), (-20, -20, -1, -1), (5, 5, 5, 30), (5, 5, 30, 5), (9, 9, 4, 4)]:
        assert len(score_heads.tokens_in_box(shown, box)) == 0
    assert len(score_heads.tokens_in_box(shown, (-50, -50, 500, 500))) == len(shown)
    assert len(score_heads.tokens_in_box(shown, (8, 8, 16, 16))) == 1       # one cell, edges touch


@pytest.mark.parametrize("name", ["vicuna", "qwen"])
def test_tokens_in_box_equal_pixel_counting(checkpoints, name):
    """200 images of random size: a token is in the box if some point of a fine lattice lies in both
    of them."""
    ours, rng = checkpoints[name][2], random.Random(5)
    for _ in range(200):
        width, height = rng.randint(20, 150), rng.randint(20, 150)
        processed = {"image_grid_thw": torch.tensor([[1, 2 * rng.randint(1, 9),
                                                      2 * rng.randint(1, 9)]])}
        shown = ours.lay_out((height, width), processed)
        x0, y0 = rng.randint(0, width - 2), rng.randint(0, height - 2)
        box = x0, y0, rng.randint(x0 + 1, width), rng.randint(y0 + 1, height)
        step = 1 / 16
        xs, ys = (torch.arange(low + step / 2, high, step, dtype=torch.float64)
                  for low, high in ((box[0], box[2]), (box[1], box[3])))
        seen = {i for i, (a, b, c, d) in enumerate(shown.boxes.tolist())
                if shown.kinds[i] == model_llava.GRID
                and ((xs >= a) & (xs < c)).any() and ((ys >= b) & (ys < d)).any()}
        found = set(score_heads.tokens_in_box(shown, box).tolist())
        sliver = {i for i in found - seen for a, b, c, d in [shown.boxes[i].tolist()]
                  if min(min(c, box[2]) - max(a, box[0]), min(d, box[3]) - max(b, box[1])) < step}
        assert seen <= found and found - seen == sliver


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_logits_have_the_precision_of_float32(dtype):
    """The arg-max is not that of numbers rounded to bfloat16."""
    torch.manual_seed(0)
    q, k = torch.randn(4, 40, 64).to(dtype), torch.randn(2, 300, 64).to(dtype)
    expected = q.double() @ k.double().repeat_interleave(2, 0).transpose(1, 2)
    seen = torch.ones(40, 300, dtype=torch.bool).tril(300 - 40)
    logits = score_heads.attention_logits(q, k)
    assert logits.dtype == torch.float32 and (logits[:, ~seen] == -torch.inf).all()
    assert (logits - expected)[:, seen].abs().max() < 1e-4


def test_one_pass_equals_step_by_step(checkpoints):
    """The peaks of one pass over a transcript are those seen while it is decoded token by token."""
    ours, images = checkpoints["mistral"][2], [picture(70, 50)]
    prompt = model_llava.prepare(ours, images, score_heads.OCR_PROMPT)
    ids = [40, 60, 40, 33, 80, 41]
    with torch.inference_mode():
        peaks = score_heads.attention_peaks(ours, prompt, ids)
        assert peaks.shape == (ours.config.layers, ours.config.heads, len(ids))
        for i in range(len(ids)):
            step = score_heads.attention_peaks(ours, prompt.extended(ids[:i]), ids[i:i + 1])
            assert torch.equal(step[:, :, 0], peaks[:, :, i])


def test_the_models_own_transcript_is_what_it_writes(checkpoints):
    ours, images = checkpoints["vicuna"][2], [picture(70, 50)]
    ids = score_heads.transcribe(ours, images, limit=7)
    written = sparsemm.generate(ours, images, score_heads.OCR_PROMPT, "full", max_new_tokens=7)
    assert 0 < len(ids) <= 7 and not set(ids) & ours.processor.end_tokens
    assert written["token_ids"][:len(ids)] == ids


def test_a_transcript_must_fit_the_sliding_window(checkpoints, monkeypatch):
    ours, image = checkpoints["mistral"][2], picture(70, 50)
    T = len(model_llava.prepare(ours, [image], score_heads.OCR_PROMPT).ids)
    monkeypatch.setattr(ours, "config", replace(ours.config, max_tokens=T + 3))
    score_heads.score_transcript(ours, [image], [[]], [1, 2, 3])
    with pytest.raises(ValueError, match="sliding window"):
        score_heads.score_transcript(ours, [image], [[]], [1, 2, 3, 4])


@pytest.fixture(scope="session")
def pages(tmp_path_factory):
    """A file of 25 annotated pages of two words each."""
    folder = tmp_path_factory.mktemp("pages")
    for i in range(25):
        picture(64, 48, seed=i).save(folder / f"{i}.png")
    (folder / "data.json").write_text(json.dumps([
        {"id": i, "image_name": f"{i}.png", "2_coord": [
            {"chunk": "ab", "coord": [[2, 3], [30, 20]]},
            {"chunk": f"c{i}", "coord": [[34, 5], [60, 5], [60, 40], [34, 40]]}]}
        for i in range(25)]))
    return folder / "data.json"


def score(folder, out, *more):
    score_heads.main(["--model", str(folder), "--out", str(out), "--transcript", "truth",
                      *map(str, more)])
    return out.read_text()


def test_a_resumed_run_equals_an_uninterrupted_one(checkpoints, pages, monkeypatch,
                                                   tmp_path, capsys):
    folder = checkpoints["qwen"][0]
    whole = score(folder, tmp_path / "whole.json", "--data", pages)
    real, calls = score_heads.score_transcript, []

    def dies(*arguments, **more):
        calls.append(1)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    monkeypatch.setattr(score_heads, "score_transcript", dies)
    with pytest.raises(SystemExit) as end:
        score(folder, tmp_path / "cut.json", "--data", pages)
    assert end.value.code == 130 and "13 pages are saved, --resume" in capsys.readouterr().err
    assert not (tmp_path / "cut.json").exists()
    with pytest.raises(SystemExit):                                  # other settings: not mixed up
        score(folder, tmp_path / "cut.json", "--data", pages, "--resume", "--seed", 1)
    assert score(folder, tmp_path / "cut.json", "--data", pages, "--resume") == whole
    assert len(calls) == 14 + 12
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "cut.about.json", "cut.json", "whole.about.json", "whole.json"]
    about = json.loads((tmp_path / "whole.about.json").read_text())
    assert about["pages"] == 25 and about["tokens"] > 25 and about["hits"] > 0


def test_a_run_that_is_killed_twice_loses_nothing(checkpoints, pages, monkeypatch, tmp_path):
    """The part file of the second run goes on from the first one's."""
    real, calls = score_heads.score_transcript, []

    def dies(*arguments, **more):
        calls.append(1)
        if len(calls) in (12, 23):
            raise KeyboardInterrupt
        return real(*arguments, **more)

    monkeypatch.setattr(score_heads, "score_transcript", dies)
    for more in ((), ("--resume",)):
        with pytest.raises(SystemExit):
            score(checkpoints["qwen"][0], tmp_path / "s.json", "--data", pages, *more)
    score(checkpoints["qwen"][0], tmp_path / "s.json", "--data", pages, "--resume")
    assert len(calls) == 12 + 11 + 4                                # 25 pages, and two that died


def test_several_pages_in_one_prompt(pages):
    single = score_heads.Annotated(pages, 5)
    sets = score_heads.Sets(single, 2)
    assert len(sets) == 3 and len(sets[2][0]) == 1
    images, words, text = sets[1]
    assert list(words) == [single[2][1], single[3][1]]
    assert [image.size for image in images] == [(64, 48)] * 2
    assert text == single[2][2] + "\n" + single[3][2]


@beside(lambda checkpoints, folder: two_ranks(
    "score_heads.py", "--model", checkpoints["qwen"][0], "--data", annotated(folder),
    "--transcript", "truth", "--out", folder / "two.json"))
def test_two_processes_equal_one(checkpoints, done, tmp_path):
    one = score(checkpoints["qwen"][0], tmp_path / "one.json", "--data", done.folder / "data.json")
    assert done.returncode == 0, done.stderr
    assert (done.folder / "two.json").read_text() == one


def test_gathering_leaves_no_process_group(monkeypatch):
    """One that is left can abort Python's end: so did 4 of 12 pairs of processes."""
    assert score_heads.gather("own") == ["own"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in dict(TORCHELASTIC_RUN_ID="a", MASTER_ADDR="localhost", MASTER_PORT=port,
                            RANK=0, WORLD_SIZE=1, LOCAL_RANK=0).items():
        monkeypatch.setenv(name, str(value))
    assert score_heads.process_and_processes(SimpleNamespace(device="cpu")) == (0, 1)
    assert score_heads.gather("own") == ["own"]
    assert not torch.distributed.is_initialized()


def test_annotated_pages_and_unreadable_ones(checkpoints, tmp_path, capsys):
    picture(64, 48).save(tmp_path / "a.png")
    word = {"chunk": "ab", "coord": [[2, 3], [30, 20]]}
    dog = {"chunk": "dog", "coord": [[40, 5], [60, 5], [60, 40], [40, 40]]}
    entries = [{"id": "one", "image_name": "a.png", "2_coord": [word]},
               {"id": "gone", "image_name": "b.png", "2_coord": [word]},
               {"id": "odd", "image_name": "a.png", "2_coord": [{"chunk": "x"}]}, "nothing",
               {"id": "four", "image_name": "a.png", "2_coord": [word, dog]}]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    score(checkpoints["qwen"][0], tmp_path / "s.json", "--data", tmp_path / "data.json")
    printed = capsys.readouterr().out
    assert "2 pages, 3 skipped" in printed and "gone" in printed and "odd" in printed
    assert {len(v) for v in json.loads((tmp_path / "s.json").read_text()).values()} == {2}
    score(checkpoints["qwen"][0], tmp_path / "s.json", "--data", tmp_path / "data.json",
          "--images", 2)                                  # one and gone, odd and nothing, four
    assert "1 prompts of 2 pages, 2 skipped" in capsys.readouterr().out
    pages = score_heads.Annotated(tmp_path / "data.json", 100)
    assert pages[4][1][1] == ("dog", (40, 5, 60, 40))
    (tmp_path / "data.json").write_text(json.dumps(entries[1:4]))
    with pytest.raises(SystemExit) as end:
        score(checkpoints["qwen"][0], tmp_path / "t.json", "--data", tmp_path / "data.json")
    assert end.value.code == 2 and not (tmp_path / "t.json").exists()


def test_summary_by_hand():
    s = torch.tensor([[0.7, 0.1], [0.2, 0.0]], dtype=torch.float64)
    assert score_heads.top_share(s, 0.05) == (1, pytest.approx(0.7))
    assert score_heads.top_share(s, 0.5) == (2, pytest.approx(0.9))
    # sorted 0, .1, .2, .7: 2 * (0*1 + .1*2 + .2*3 + .7*4) / 4 - 5/4
    assert score_heads.gini(s) == pytest.approx(2 * 3.6 / 4 - 1.25)
    assert score_heads.gini(torch.ones(3, 3)) == pytest.approx(0, abs=1e-6)
    text = score_heads.summary(s)
    assert "0     0  70.00%" in text and "|@.|" in text and "|: |" in text


def test_score_files(tmp_path):
    per_page = [torch.rand(3, 4, dtype=torch.float64) for _ in range(5)]
    score_heads.write_scores(per_page, tmp_path / "s.json")
    expected = sum(per_page) / sum(per_page).sum()
    assert torch.allclose(cache.read_head_scores(tmp_path / "s.json", 3, 4), expected, atol=1e-8)
    table = json.loads((tmp_path / "s.json").read_text())
    (tmp_path / "s.json").write_text(
        json.dumps(dict(sorted(table.items(), reverse=True))))         # order is no matter
    assert torch.allclose(cache.read_head_scores(tmp_path / "s.json", 3, 4), expected, atol=1e-8)


# ---- the models ----------------------------------------------------------------------------------


SIZES = {"square": [(50, 50)], "wide": [(200, 30)], "tall": [(20, 90)], "small": [(9, 9)],
         "odd": [(37, 53)], "two": [(60, 33), (31, 77)], "text": []}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_equal_transformers(checkpoints, name, sizes):
    _, reference, ours = checkpoints[name]
    images = [picture(*size, seed=i) for i, size in enumerate(sizes)]
    prompt = model_llava.prepare(ours, images, "What is it?")
    with torch.inference_mode():
        logits = ours.logits(ours.hidden_states(prompt))
    expected = reference_logits(reference, ours, prompt, images)
    assert expected.std() > 0.5                                            # not all the same
    assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_tokens_equal_transformers(checkpoints, name):
    _, reference, ours = checkpoints[name]
    images = [picture(45, 60)]
    prompt = model_llava.prepare(ours, images, "What is the Total?")
    inputs = dict(ours.processor.image_processor(images, return_tensors="pt"))
    if ours.config.family == "qwen2_vl":
        inputs["mm_token_type_ids"] = (prompt.ids == ours.config.image_token).int()[None]
    with torch.no_grad():
        expected = reference.generate(
            input_ids=prompt.ids[None], **inputs, max_new_tokens=16, do_sample=False,
            eos_token_id=sorted(ours.processor.end_tokens), pad_token_id=0)
    result = sparsemm.generate(ours, images, "What is the Total?", "full", max_new_tokens=16)
    assert result["token_ids"] == expected[0, len(prompt.ids):].tolist()
    assert len(set(result["token_ids"])) > 1


VICUNA_7B = dict(
    model_type="llava_next", image_token_index=32000, vision_feature_layer=-2,
    projector_hidden_act="gelu",
    image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    torch_dtype="float16",
    text_config=dict(model_type="llama", max_position_embeddings=4096, rms_norm_eps=1e-5,
                     vocab_size=32064),
    vision_config=dict(model_type="clip_vision_model", hidden_size=1024, image_size=336,
                       intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24,
                       patch_size=14, projection_dim=768, vocab_size=32000))


MISTRAL_7B = dict(VICUNA_7B, tie_word_embeddings=False, text_config=dict(
    model_type="mistral", intermediate_size=14336, max_position_embeddings=32768,
    num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None,
    vocab_size=32064))


QWEN_7B = dict(
    model_type="qwen2_vl", image_token_id=151655, video_token_id=151656,
    vision_start_token_id=151652, vision_end_token_id=151653, hidden_act="silu", hidden_size=3584,
    intermediate_size=18944, max_position_embeddings=32768, max_window_layers=28,
    num_attention_heads=28, num_hidden_layers=28, num_key_value_heads=4, rms_norm_eps=1e-6,
    rope_theta=1e6, sliding_window=32768, use_sliding_window=False, tie_word_embeddings=False,
    torch_dtype="bfloat16", vocab_size=152064,
    rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
    vision_config=dict(depth=32, embed_dim=1280, mlp_ratio=4, num_heads=16, in_chans=3,
                       hidden_size=3584, patch_size=14, spatial_merge_size=2,
                       spatial_patch_size=14, temporal_patch_size=2))


QWEN_2B = dict(QWEN_7B, hidden_size=1536, intermediate_size=8960, num_attention_heads=12,
               num_key_value_heads=2, tie_word_embeddings=True, vocab_size=151936,
               vision_config=dict(QWEN_7B["vision_config"], hidden_size=1536))


GEOMETRIES = {"vicuna": (VICUNA_7B, (32, 32, 32, 128, 1e4)),
              "mistral": (MISTRAL_7B, (32, 32, 8, 128, 1e6)),
              "qwen": (QWEN_7B, (28, 28, 4, 128, 1e6)),
              "qwen-2b": (QWEN_2B, (28, 12, 2, 128, 1e6))}


@pytest.mark.parametrize("config, expected", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_published_checkpoints_have_exactly_our_tensors(tmp_path, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = model_llava.read_config(tmp_path)
    assert (ours.layers, ours.heads, ours.kv_heads, ours.head_dim, ours.rope_theta) == expected
    made = (LlavaNextForConditionalGeneration if ours.family == "llava_next"
            else Qwen2VLForConditionalGeneration)
    with torch.device("meta"):
        reference = made(made.config_class.from_pretrained(tmp_path))
        model = model_llava.MODELS[ours.family](ours)
    theirs = {model_llava.hub_name(key, ours.family): tuple(p.shape)
              for key, p in reference.named_parameters()}
    published = model_llava.published_tensors(model)
    assert {key: tuple(p.shape) for key, p in published.items()} == theirs


def test_published_tensor_names():
    """The hub's spelling, in which the two projects' tables could agree with each other and both be
    wrong."""
    with torch.device("meta"):
        llava, qwen = (model_llava.published_tensors(model_llava.MODELS[family](
            model_llava.convert_config(CHECKPOINTS[name](), family)))
            for name, family in (("vicuna", "llava_next"), ("qwen", "qwen2_vl")))
    assert {"image_newline", "language_model.lm_head.weight",
            "language_model.model.embed_tokens.weight",
            "language_model.model.layers.0.self_attn.q_proj.weight",
            "multi_modal_projector.linear_1.bias",
            "vision_tower.vision_model.embeddings.class_embedding",
            "vision_tower.vision_model.pre_layrnorm.weight"} <= set(llava)
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias",
            "model.norm.weight", "visual.blocks.0.attn.qkv.weight", "visual.merger.ln_q.weight",
            "visual.merger.mlp.2.bias", "visual.patch_embed.proj.weight"} <= set(qwen)


@pytest.mark.parametrize("name", ["mistral", "qwen"])
def test_all_spellings_of_a_checkpoint_load_alike(checkpoints, tmp_path, name):
    folder, reference, ours = checkpoints[name]
    spellings = {"hub": {key: t.clone() for key, t in model_llava.published_tensors(ours).items()},
                 "memory": {key: t.clone() for key, t in reference.state_dict().items()}}
    old = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq" if name == "mistral" else \
        "model.layers.0.self_attn.rotary_emb.inv_freq"
    spellings["hub"][old] = torch.zeros(4)                            # some old files carry buffers
    for spelling, tensors in spellings.items():
        copy = tmp_path / spelling
        shutil.copytree(folder, copy)
        save_file(tensors, copy / "model.safetensors")
        for key, tensor in model_llava.load(copy, "cpu", "float32").state_dict().items():
            assert torch.equal(tensor, ours.state_dict()[key]), (spelling, key)


def test_sharded_weights_load_alike(checkpoints, tmp_path):
    write_checkpoint(tmp_path, "mistral", max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    expected = checkpoints["mistral"][2].state_dict()
    for key, tensor in model_llava.load(tmp_path, "cpu", "float32").state_dict().items():
        assert torch.equal(tensor, expected[key])


def test_dtypes(checkpoints):
    folder = checkpoints["qwen"][0]
    for name in ("bfloat16", "float16"):
        model = model_llava.load(folder, "cpu", name)
        assert {p.dtype for p in model.parameters()} == {getattr(torch, name)}
        result = sparsemm.generate(model, [picture(40, 40)], "Hi", "snapkv", budget=40,
                                   max_new_tokens=3)
        assert result["cache_bytes"] == 2 * 16 * 2 * sum(map(sum, result["kept"]))


@pytest.mark.parametrize("name", ["vicuna", "qwen"])
def test_joined_products_are_the_published_ones(checkpoints, name):
    """q, k, v and gate, up: rows of the joined weights, in this order."""
    folder, reference, ours = checkpoints[name]
    theirs = reference.model.language_model.layers[1]
    layer = ours.decoder.layers[1]
    for joined, parts in ((layer.self_attn.qkv_proj, [theirs.self_attn.q_proj,
                                                      theirs.self_attn.k_proj,
                                                      theirs.self_attn.v_proj]),
                          (layer.mlp.gate_up_proj, [theirs.mlp.gate_proj, theirs.mlp.up_proj])):
        assert torch.equal(joined.weight, torch.cat([part.weight for part in parts]))
        if joined.bias is not None:
            assert torch.equal(joined.bias, torch.cat([part.bias for part in parts]))


EXPECTED_PROMPTS = {"vicuna": "<s>USER: <image>\n<image>\nHi ASSISTANT:",
                    "mistral": "<s>[INST] <image>\n<image>\nHi [/INST]",
                    "qwen": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
                            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
                            "<|vision_start|><|image_pad|><|vision_end|>Hi<|im_end|>\n"
                            "<|im_start|>assistant\n"}


@pytest.mark.parametrize("name", EXPECTED_PROMPTS)
def test_family_templates(checkpoints, name):
    processor = checkpoints[name][2].processor
    assert processor.tokenizer.decode(processor.token_ids(2, "Hi")) == EXPECTED_PROMPTS[name]


def test_template_files_come_first_and_there_is_one_bos(checkpoints, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoints["vicuna"][0], folder)
    template = "{{ bos_token }}MARK{% for part in messages[0].content %}" \
               "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}" \
               "{% endfor %}"
    config = model_llava.read_config(folder)
    text = lambda: (p := model_llava.Processor(folder, config)).tokenizer.decode(
        p.token_ids(1, "Hi"))
    (folder / "chat_template.json").write_text(
        json.dumps({"chat_template": template.replace("MARK", "J")}))
    assert text() == "<s>J<image>Hi"
    (folder / "chat_template.jinja").write_text(template.replace("MARK", "X"))
    assert text() == "<s>X<image>Hi"


def test_end_tokens(checkpoints, tmp_path):
    folder, _, ours = checkpoints["vicuna"]
    assert ours.processor.end_tokens == {VOCABULARY["</s>"], VOCABULARY["<|im_end|>"]}
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert model_llava.Processor(copy, ours.config).end_tokens == {7}
    (copy / "generation_config.json").unlink()
    assert model_llava.Processor(copy, ours.config).end_tokens == {VOCABULARY["</s>"]}


def test_generation_stops_at_any_end_token(checkpoints):
    ours = checkpoints["vicuna"][2]
    tokens = sparsemm.generate(ours, [picture(40, 40)], "Go", "full", max_new_tokens=9)["token_ids"]
    before, ours.processor.end_tokens = ours.processor.end_tokens, {tokens[3], 0}
    try:
        result = sparsemm.generate(ours, [picture(40, 40)], "Go", "full", max_new_tokens=9)
    finally:
        ours.processor.end_tokens = before
    assert result["token_ids"] == tokens[:tokens.index(tokens[3]) + 1]


def seen_pixels(model, image, token, trials):
    """Which of the `trials` (x, y) pixels of a black image change this token's pixels when painted
    white, found by painting them one by one and running the image processor."""
    def values(picture):
        processed = model.processor.image_processor(picture, return_tensors="pt")["pixel_values"]
        return processed[0] if processed.dim() == 5 else processed
    black = Image.new("RGB", (image.size[1], image.size[0]))
    base, seen = values(black), []
    for x, y in trials:
        painted = black.copy()
        painted.putpixel((x, y), (255, 255, 255))
        difference = (values(painted) - base).abs()
        seen.append(peak_token(model, image, difference) == token)
    return seen


def peak_token(model, image, difference):
    """The grid token whose own pixels changed most."""
    if model.config.family == "qwen2_vl":
        merge = model.config.vision.spatial_merge_size ** 2
        return int(difference.view(-1, merge * difference.shape[1]).sum(1).argmax())
    s, patch = model.side, model.config.vision.patch_size
    best = model_llava.best_resolution(image.size, model.config.pinpoints)
    rows, columns = best[0] // (s * patch), best[1] // (s * patch)
    tiles = (difference[1:].sum(1).view(rows, columns, s, patch, s, patch)
             .sum((3, 5)))                                             # (rows, columns, s, s)
    plane = tiles.transpose(1, 2).reshape(rows * s, columns * s)
    r, c = divmod(int(plane.argmax()), columns * s)
    down, across = model_llava.unpadded(rows * s, columns * s, image.size)
    if not (down.start <= r < down.stop and across.start <= c < across.stop):
        return None                                                      # cut away with the padding
    return s * s + (r - down.start) * (image.grid[1] + 1) + c - across.start


@pytest.mark.parametrize("size", [(50, 40), (130, 30), (25, 99), (61, 61)])
@pytest.mark.parametrize("name", ["vicuna", "qwen"])
def test_boxes_say_which_pixels_a_token_shows(checkpoints, name, size):
    """A pixel painted white is brightest in the token whose box it lies in."""
    ours = checkpoints[name][2]
    image = model_llava.prepare(ours, [Image.new("RGB", size)], "Hi").images[0]
    rng = random.Random(3)
    for _ in range(25):
        x, y = rng.randrange(size[0]), rng.randrange(size[1])
        centre = torch.tensor([x + 0.5, y + 0.5], dtype=torch.float64)
        inside = ((image.boxes[:, :2] <= centre).all(1) & (centre < image.boxes[:, 2:]).all(1)
                  & (image.kinds == 1))
        edge = (image.boxes[inside].view(-1, 2, 2) - centre).abs().min() if inside.any() else 0
        if edge < 1.0:
            continue                                         # on a border, either neighbour will do
        assert seen_pixels(ours, image, int(inside.nonzero()[0, 0]), [(x, y)]) == [True]


@pytest.mark.parametrize("name", ["vicuna", "qwen"])
def test_boxes_tile_the_image(checkpoints, name):
    """Grid boxes do not overlap, lie in the image and, where no padding was cut with an edge of it,
    cover it."""
    ours = checkpoints[name][2]
    for size in [(56, 56), (84, 28), (40, 50), (130, 33)]:
        image = model_llava.prepare(ours, [Image.new("RGB", size)], "Hi").images[0]
        x0, y0, x1, y1 = image.boxes[image.kinds == 1].unbind(1)
        assert (x0 >= 0).all() and (x1 <= size[0]).all() \
            and (y0 >= 0).all() and (y1 <= size[1]).all()
        area = ((x1 - x0) * (y1 - y0)).sum().item()
        assert area == pytest.approx(size[0] * size[1], rel=0.12 if name == "vicuna" else 1e-9)
        assert area <= size[0] * size[1] * (1 + 1e-9)
        thumbnail = image.boxes[image.kinds == 0]
        assert ((thumbnail[:, 2] - thumbnail[:, 0])
                * (thumbnail[:, 3] - thumbnail[:, 1])).sum().item() == \
            pytest.approx(size[0] * size[1] * (name == "vicuna"))
        assert (image.boxes[image.kinds == 2] == 0).all()
        assert (image.kinds == 2).sum() == (image.grid[0] if name == "vicuna" else 0)


def test_published_llava_lays_out_as_many_tokens_as_transformers(tmp_path):
    from transformers import LlavaNextProcessor
    from transformers.image_processing_utils import select_best_resolution
    (tmp_path / "config.json").write_text(json.dumps(VICUNA_7B))
    with torch.device("meta"):
        model = model_llava.LlavaNext(model_llava.read_config(tmp_path))
    rng, pins = random.Random(0), VICUNA_7B["image_grid_pinpoints"]
    for size in [(336, 672), (1, 700), (700, 1), *((rng.randint(20, 3000), rng.randint(20, 3000))
                                                   for _ in range(200))]:
        down, across = (edge // 336 for edge in select_best_resolution(size, pins))
        grid, newlines = LlavaNextProcessor._get_unpadded_features(
            None, *size, 24, 24, down, across)
        image = model.lay_out(size, None)
        assert (len(image), image.grid[0]) == (24 * 24 + grid + newlines, newlines), size


# ---- the shipped models --------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_the_packed_twin_writes_what_the_loop_writes_in_bfloat16(monkeypatch, name):
    model = model_llava.load(HERE / "tiny" / name, "cpu", "bfloat16")

    def packed_step(model, held):
        def step(token, position):
            held.extend()
            return model.decode(token, position, PackedAttention(held).attend)
        return step

    for sample in SAMPLES[::3]:
        arguments = (model, [open_image(HERE / "tiny" / sample["image"])], sample["prompt"])
        settings = dict(budget=128, head_scores=sparsemm.find_head_scores(model, None))
        loop = sparsemm.generate(*arguments, **settings)["token_ids"]
        with monkeypatch.context() as patch:
            patch.setattr(sparsemm, "decoding_step", packed_step)
            assert sparsemm.generate(*arguments, **settings)["token_ids"] == loop


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s["prompt"])
@pytest.mark.parametrize("name", TINY)
def test_sample_questions_are_answered_from_a_cache_that_evicts(tiny, name, sample):
    model = tiny[name]
    image = open_image(HERE / "tiny" / sample["image"])
    result = sparsemm.generate(model, [image], sample["prompt"],
                               head_scores=sparsemm.find_head_scores(model, None))
    c = model.config
    assert result["text"] == sample["answer"]
    assert (sum(map(sum, result["kept"])) == 256 * c.layers * c.kv_heads
            < result["prompt_tokens"] * c.layers * c.kv_heads)


@pytest.mark.parametrize("name", TINY)
def test_scores_from_two_halves_of_the_pages_agree(tiny, name):
    """Spearman's rank correlation of the shipped scores, even pages against odd ones, over the
    heads that ever hit; and the best 5 % of the heads are much the same."""
    table = json.loads((HERE / "tiny" / name / sparsemm.SCORES_FILE).read_text())
    pages = torch.tensor(list(table.values()))                                  # (heads, pages)
    even, odd = pages[:, ::2].mean(1), pages[:, 1::2].mean(1)
    some = (even + odd) > 0
    ranks = torch.stack([x[some].argsort().argsort().double() for x in (even, odd)])
    assert torch.corrcoef(ranks)[0, 1] > 0.9
    best = [set(x.topk(round(0.05 * len(x))).indices.tolist()) for x in (even, odd)]
    assert len(best[0] & best[1]) >= len(best[0]) - 1


@pytest.mark.parametrize("name", TINY)
def test_shipped_model_writes_what_transformers_writes(tiny, name):
    ours, folder = tiny[name], HERE / "tiny" / name
    made = (LlavaNextForConditionalGeneration if ours.config.family == "llava_next"
            else Qwen2VLForConditionalGeneration)
    reference = made.from_pretrained(folder, dtype=torch.float32)
    for sample in SAMPLES[:2]:
        image = open_image(HERE / "tiny" / sample["image"])
        prompt = model_llava.prepare(ours, [image], sample["prompt"])
        with torch.inference_mode():
            logits = ours.logits(ours.hidden_states(prompt))
        assert (logits - reference_logits(reference, ours, prompt, [image])).abs().max() < 1e-3
        inputs = dict(ours.processor.image_processor(image, return_tensors="pt"))
        if ours.config.family == "qwen2_vl":
            inputs["mm_token_type_ids"] = (prompt.ids == ours.config.image_token).int()[None]
        written = reference.generate(input_ids=prompt.ids[None], **inputs, max_new_tokens=24)
        result = sparsemm.generate(ours, [image], sample["prompt"], "full", max_new_tokens=24)
        assert result["token_ids"] == written[0, len(prompt.ids):].tolist()


# ---- the command ---------------------------------------------------------------------------------


def run(capfd, *argv):
    """(stdout, stderr) of the command."""
    capfd.readouterr()
    sparsemm.main([str(a) for a in argv])
    return capfd.readouterr()


def test_command_answers(capfd):
    sample = SAMPLES[0]
    out, err = run(capfd, "--image", HERE / "tiny" / sample["image"], "--prompt", sample["prompt"])
    assert out == sample["answer"] + "\n"
    assert "evicted" in err and "ms per token" in err


def test_the_whole_answer_is_out_before_the_report(capfd, monkeypatch):
    """Also where both go into one file, for which stdout is buffered."""
    out, sample = io.BytesIO(), SAMPLES[0]
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out))
    monkeypatch.setattr(sparsemm, "report", lambda result, model: out.getvalue().decode())
    _, err = run(capfd, "--image", HERE / "tiny" / sample["image"], "--prompt", sample["prompt"])
    assert err == sample["answer"] + "\n\n"


RESULT_KEYS = {"text", "token_ids", "prompt_tokens", "image_tokens", "method", "budget", "kept",
               "cache_bytes", "full_cache_bytes", "allocated_bytes", "prefill_seconds",
               "decode_seconds", "new_tokens"}


def test_command_json(checkpoints, capfd, tmp_path):
    folder, _, ours = checkpoints["mistral"]
    picture(50, 70).save(tmp_path / "a.png")
    picture(30, 30).save(tmp_path / "b.png")
    out, _ = run(capfd, "--model", folder, "--image", tmp_path / "a.png", tmp_path / "b.png",
                 "--prompt", "Hi", "--method", "snapkv", "--budget", 40, "--max-new-tokens", 5,
                 "--json")
    result = json.loads(out)
    assert set(result) == RESULT_KEYS
    assert result["kept"] == [[40] * 2] * 2
    assert result["cache_bytes"] == 2 * 8 * 4 * 160
    assert result["full_cache_bytes"] == 2 * 8 * 4 * 2 * 2 * result["prompt_tokens"]
    prompt = model_llava.prepare(ours, [picture(50, 70), picture(30, 30)], "Hi")
    assert (result["prompt_tokens"], result["image_tokens"]) == \
        (len(prompt.ids), prompt.image_tokens)
    assert result["image_tokens"] == int((prompt.ids == VOCABULARY["<image>"]).sum())
    assert result["new_tokens"] == len(result["token_ids"]) <= 5
    assert result["text"] == ours.processor.tokenizer.decode(result["token_ids"],
                                                             skip_special_tokens=True)


def test_command_takes_several_questions(checkpoints, capfd, tmp_path):
    picture(50, 70).save(tmp_path / "a.png")
    arguments = ("--model", checkpoints["qwen"][0], "--image", tmp_path / "a.png", "--method",
                 "snapkv", "--budget", 40, "--max-new-tokens", 3, "--prompt", "Hi",
                 "--prompt", "So")
    out, err = run(capfd, *arguments)
    assert out.count("\n") == 2 and err.count("ms per token") == 2
    first, second = json.loads(run(capfd, *arguments, "--json")[0])["runs"]
    assert set(first) == set(second) == RESULT_KEYS
    assert second["prompt_tokens"] > first["prompt_tokens"] + first["new_tokens"]
    assert second["kept"][0][0] > 40
    fresh = json.loads(run(capfd, *arguments, "--json", "--fresh")[0])["runs"]
    assert fresh[0]["token_ids"] == first["token_ids"] and fresh[1]["kept"] == [[40] * 2] * 3


def test_command_compares_every_method(checkpoints, capfd, tmp_path):
    folder = checkpoints["vicuna"][0]
    picture(50, 70).save(tmp_path / "a.png")
    arguments = ("--model", folder, "--image", tmp_path / "a.png", "--prompt", "Hi",
                 "--budget", 40, "--max-new-tokens", 3, "--compare")
    out, _ = run(capfd, *arguments)
    lines = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert set(METHODS) <= set(lines)
    assert "skipped" in lines["sparsemm"] and "skipped" in lines["shuffled"] \
        and "skipped" not in lines["snapkv"]
    score_heads.write_scores([torch.rand(3, 4, dtype=torch.float64)], tmp_path / "scores.json")
    out, _ = run(capfd, *arguments, "--json", "--scores", tmp_path / "scores.json")
    runs = json.loads(out)["runs"]
    assert [r["method"] for r in runs] == list(METHODS)
    assert all(set(r) == RESULT_KEYS for r in runs)
    assert {sum(map(sum, r["kept"])) for r in runs[1:]} == {40 * 3 * 4}


def without_model_code(checkpoints, folder):
    picture(50, 70).save(folder / "a.png")
    code = """if True:
        import importlib.abc, re, sys
        class Block(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if re.match(r"transformers\\.models\\..*\\bmodeling_", name):
                    raise ImportError(name)
        sys.meta_path.insert(0, Block())
        import sparsemm
        for folder in sys.argv[2:]:
            sparsemm.main(["--model", folder, "--image", sys.argv[1], "--prompt", "Hi",
                           "--method", "snapkv", "--max-new-tokens", "2"])
        assert not [m for m in sys.modules
                    if re.match(r"transformers\\.models\\..*\\bmodeling_", m)]"""
    return ["-c", code, folder / "a.png",
            *(checkpoints[name][0] for name in ("vicuna", "mistral", "qwen"))]


@beside(without_model_code)
def test_command_needs_no_model_code_of_transformers(done):
    assert done.returncode == 0, done.stderr


SCRIPTS = ("cache", "model_llava", "sparsemm", "score_heads")


def alone(checkpoints, folder):
    """The four scripts and tiny/ in a folder without experiments/: imports and every command."""
    for name in SCRIPTS:
        shutil.copy(HERE / f"{name}.py", folder)
    (folder / "tiny").symlink_to(HERE / "tiny")
    annotated(folder)
    return ["-c", f"""if True:
        import os, subprocess, sys
        os.chdir({str(folder)!r})
        run = lambda *command: subprocess.run([sys.executable, *command], check=True)
        run("-c", "import {', '.join(SCRIPTS)}")
        run("sparsemm.py", "--image", "tiny/receipt.png", "--prompt", "What is the Total?")
        run("cache.py")
        run("score_heads.py", "--data", "data.json", "--num", "2", "--transcript", "truth",
            "--out", "s.json")
        """]


def annotated(folder):
    """A file of seven annotated pages in the folder."""
    for i in range(7):
        picture(64, 48, seed=i).save(folder / f"{i}.png")
    (folder / "data.json").write_text(json.dumps([
        {"image_name": f"{i}.png", "2_coord": [{"chunk": "ab", "coord": [[0, 0], [63, 47]]}]}
        for i in range(7)]))
    return folder / "data.json"


@beside(alone)
def test_the_four_scripts_stand_alone(done):
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("74.18\n") and (done.folder / "s.json").exists()


def test_scripts_import_no_experiments_and_there_is_no_circle():
    """At module level. experiments/ imports the scripts, never the other way round; pages that are
    rendered and pictures are imported where they are asked for."""
    files = {path.relative_to(HERE).with_suffix("").as_posix().replace("/", "."): path
             for path in (*HERE.glob("*.py"), *HERE.glob("experiments/*.py"))}
    imports = {}
    for name, path in files.items():
        found = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        imports[name] = found & files.keys()
    assert not [name for name in SCRIPTS for other in imports[name] if other not in SCRIPTS]
    left = dict(imports)
    while free := [name for name in left if not left[name] & left.keys()]:
        for name in free:
            del left[name]
    assert not left                                                 # who imports one another


# ---- bad input -----------------------------------------------------------------------------------


def rejected(capfd, *argv, main=sparsemm.main):
    """The one line on stderr of a command that ends with status 2 and says nothing on stdout."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in argv])
    out, err = capfd.readouterr()
    assert end.value.code == 2
    assert out == ""
    assert err.endswith("\n") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("arguments, expected", [
    (["--prompt", "  "], ["--prompt", "empty"]),
    (["--budget", 31], ["budget", "31", "32"]),
    (["--budget", 0], ["budget", "0"]),
    (["--budget", -5], ["budget", "-5"]),
    (["--budget", "many"], ["--budget", "many"]),
    (["--window", 0], ["window", "0", "1"]),
    (["--rho", 1.5], ["rho", "1.5", "between 0 and 1"]),
    (["--rho", "nan"], ["rho", "nan"]),
    (["--max-new-tokens", 0], ["max_new_tokens", "0"]),
    (["--method", "best"], ["--method", "best", "snapkv"]),
    (["--dtype", "int8"], ["--dtype", "int8", "bfloat16"]),
    (["--device", "gpu"], ["device", "gpu", "cuda"]),
    (["--image", "none.png"], ["--image", "none.png", "no such file"]),
    (["--image", "."], ["--image", ".", "not a file"]),
    (["--image", __file__], ["--image", __file__, "not a picture"]),
    (["--show-heads", "a.txt"], ["--show-heads", "a.txt", ".png"]),
    (["--show-heads", "a.png"], ["--show-heads", "one --image"]),
    (["--seed", "x"], ["--seed", "x"]),
    (["--show-heads", "none/a.png"], ["--show-heads", "none/a.png", "exists"]),
    (["--model", "no/such/folder"], ["no/such/folder", "no such folder"]),
    (["--prompt", "a <|image_pad|> b"], ["prompt", "<|image_pad|>"]),
    (["--prompt", "a \udcff"], ["udcff"]),
    (["--prompt", " \t"], ["' \\t' is empty"]),
    (["--scores", ""], ["scores"]),
    (["--scores", "a", "--method", "snapkv"], ["--scores", "no effect"]),
    (["--fresh"], ["--fresh", "no effect"]),
    (["--show-token", 1], ["--show-token", "no effect"]),
    (["--show-heads", "none/a.png", "--image", "a"], ["--show-heads", "cannot be written"]),
    (["--show-heads", "tiny/a.png", "--image", "tiny/../tiny/a.png"], ["named twice"]),
    (["--seed", -1, "--method", "snapkv"], ["seed", "-1"]),
    (["--seed", "1e30"], ["--seed", "1e30"]),
])
def test_bad_arguments(capfd, arguments, expected):
    line = rejected(capfd, "--prompt", "Hi", *arguments)
    assert all(word in line for word in expected), line


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there(capfd):
    assert "device" in rejected(capfd, "--prompt", "Hi", "--device", "cuda")


def test_damaged_images(capfd, tmp_path):
    data = io.BytesIO()
    picture(300, 300).save(data, "PNG")
    (tmp_path / "cut.png").write_bytes(data.getvalue()[:5000])
    assert "cut.png" in rejected(capfd, "--prompt", "Hi", "--image", tmp_path / "cut.png")
    # the header of a PNG of 60,000 x 60,000 pixels
    bomb = bytearray(data.getvalue())
    bomb[16:24] = struct.pack(">II", 60000, 60000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    (tmp_path / "bomb.png").write_bytes(bytes(bomb))
    assert "too large" in rejected(capfd, "--prompt", "Hi", "--image", tmp_path / "bomb.png")


def test_bad_checkpoints(checkpoints, capfd, tmp_path):
    folder = checkpoints["qwen"][0]

    def broken(name, change):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        change(copy)
        return rejected(capfd, "--prompt", "Hi", "--method", "snapkv", "--model", copy)

    def tensors(change):
        def rewrite(copy):
            weights = load_file(copy / "model.safetensors")
            change(weights)
            save_file(weights, copy / "model.safetensors")
        return rewrite

    assert "config.json" in broken("a", lambda copy: (copy / "config.json").unlink())
    line = broken("b", lambda copy: (copy / "config.json").write_text('{"model_type": "gpt2"}'))
    assert "gpt2" in line and "qwen2_vl" in line
    assert "config.json" in broken("c", lambda copy: (copy / "config.json").write_text("[1, 2"))
    assert "model.norm.weight" in broken("d", tensors(lambda w: w.pop("model.norm.weight")))
    assert "extra.weight" in broken(
        "e", tensors(lambda w: w.update({"extra.weight": torch.ones(2)})))
    line = broken("f", tensors(lambda w: w.update({"model.norm.weight": torch.ones(5)})))
    assert "model.norm.weight" in line and "[5]" in line and "[96]" in line
    assert "model.safetensors" in broken("g", lambda copy: (copy / "model.safetensors").unlink())
    assert "model.safetensors" in broken(
        "h", lambda copy: (copy / "model.safetensors").write_bytes(b"junk" * 9))
    assert "tokenizer" in broken("i", lambda copy: [p.unlink() for p in copy.glob("tokenizer*")])

    def config(old, new):
        def rewrite(copy):
            text = (copy / "config.json").read_text()
            assert old in text
            (copy / "config.json").write_text(text.replace(old, new))
        return rewrite

    line = broken("j", config('"num_hidden_layers": 3', '"num_hidden_layers": "x"'))
    assert "config.json" in line and "num_hidden_layers" in line
    assert "mrope_section" in broken("l", config('"mrope_section"', '"mrope_sections"'))
    write = lambda name, text: lambda copy: (copy / name).write_text(text)
    assert "quantized" in broken("m", config(
        '"model_type": "qwen2_vl",', '"model_type": "qwen2_vl", "quantization_config": {"b": 4},'))
    line = broken("n", config(f'"image_token_id": {VOCABULARY["<|image_pad|>"]}',
                              '"image_token_id": 3'))
    assert "<|image_pad|> is token 8" in line and "3 in config.json" in line
    line = broken("o", lambda copy: (copy / "model.safetensors").rename(copy / "pytorch_model.bin"))
    assert "pytorch_model.bin" in line and "safetensors is right" in line
    line = broken("p", lambda copy: (copy / "config.json").rename(copy / "adapter_config.json"))
    assert "adapter_config.json" in line and "no adapter alone" in line
    for name in ("../weights.safetensors", "/dev/zero"):
        assert "leads out" in broken("q" + name[-4:], write(
            "model.safetensors.index.json", json.dumps({"weight_map": {"a": name}})))
    line = rejected(capfd, "--prompt", "Hi", "--model", folder)
    assert "score_heads.py" in line and "snapkv" in line


GOOD_SCORES = {f"{l}-{h}": [0.5, 1] for l in range(3) for h in range(6)}


@pytest.mark.parametrize("content, expected", [
    (None, "cannot be read"),
    ("{", "not JSON"),
    ("[1]", "not an object"),
    (json.dumps({k: v for k, v in GOOD_SCORES.items() if k != "2-5"}), "2-5"),
    (json.dumps({**GOOD_SCORES, "2-6": [1]}), "2-6"),
    (json.dumps({**GOOD_SCORES, "head": [1]}), "head"),
    (json.dumps({**GOOD_SCORES, "1-1": []}), "1-1"),
    (json.dumps({**GOOD_SCORES, "1-1": 3}), "1-1"),
    (json.dumps({**GOOD_SCORES, "1-1": [-1]}), "1-1"),
    (json.dumps({**GOOD_SCORES, "1-1": [math.nan]}), "1-1"),
    (json.dumps({**GOOD_SCORES, "1-1": ["x"]}), "1-1"),
    (json.dumps({key: [0] for key in GOOD_SCORES}), "all zero"),
    (json.dumps(GOOD_SCORES)[:-1] + ', "0-0": [1]}', "twice"),
])
def test_bad_score_files(checkpoints, capfd, tmp_path, content, expected):
    path = tmp_path / "scores.json"
    if content is not None:
        path.write_text(content)
    line = rejected(capfd, "--prompt", "Hi", "--model", checkpoints["qwen"][0], "--scores", path)
    assert "scores" in line and str(path) in line and expected in line


@beside(lambda checkpoints, folder: [HERE / "sparsemm.py", "--model", "someone/some-model",
                                     "--prompt", "Hi"],
        HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_CACHE="/nonexistent")
def test_hub_without_network(done):
    """In a process of its own: nothing, not even a library's warning, comes beside two lines."""
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 2 and done.stderr.count("someone/some-model") == 2


def test_a_window_larger_than_the_prompt_is_fine(checkpoints, capfd):
    out, _ = run(capfd, "--model", checkpoints["vicuna"][0], "--prompt", "Hi",
                 "--method", "snapkv", "--window", 500, "--budget", 500, "--max-new-tokens", 2,
                 "--json")
    result = json.loads(out)
    assert result["kept"] == [[result["prompt_tokens"]] * 4] * 3


@pytest.mark.parametrize("script, argument, value", [
    ("score_heads", "--heatmap", "heads.bmp"), ("score_heads", "--out", "none/scores.json"),
    ("score_heads", "--num", 0), ("score_heads", "--width", 31), ("score_heads", "--data", "none"),
    ("score_heads", "--num", 10**30), ("score_heads", "--height", 10**6),
    ("score_heads", "--data", ""), ("score_heads", "--data", "/dev/zero"),
    ("score_heads", "--data", "broken/font.ttf"),
    ("cache", "--scores", "none"), ("cache", "--scores", "broken/font.ttf"),
    ("cache", "--kv-heads", 3), ("cache", "--budget", "few"), ("cache", "--window", 257)])
def test_scripts_refuse_in_one_line(capfd, monkeypatch, tmp_path, script, argument, value):
    """And before they do any work."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("broken").mkdir()
    Path("broken", "font.ttf").write_text("no font")
    main = {"score_heads": score_heads, "cache": cache}[script].main
    line = rejected(capfd, argument, value, main=main)
    assert argument.strip("-") in line and str(value) in line
    assert {path.name for path in Path().iterdir()} == {"file", "broken"}


def test_what_is_written_is_written_whole_to_what_was_meant(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    sparsemm.write_file(tmp_path / "link", "new")
    assert (tmp_path / "real").read_text() == "new" and (tmp_path / "link").is_symlink()
    (tmp_path / "circle").symlink_to("circle")
    for path in (tmp_path, "/dev/null", tmp_path / "circle", tmp_path / "none" / "a", "",
                 tmp_path / ("n" * 300)):
        with pytest.raises(ValueError, match="cannot be written"):
            sparsemm.check_output(path, "--out")
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link", "circle"}


@pytest.mark.parametrize("content, expected", [
    (b"\xef\xbb\xbf[1]", None), (b"[" * 10**5, "not JSON"), (b"\xff", "not JSON"),
    (b"1" * 5000, "not JSON"), (b" " * 2000, "at most 1,000 bytes")])
def test_json_files_of_every_kind(tmp_path, content, expected):
    (tmp_path / "a.json").write_bytes(content)
    if expected is None:
        assert cache.read_json(tmp_path / "a.json", "file", 1000) == [1]
    else:
        with pytest.raises(ValueError, match=f"file .*{expected}"):
            cache.read_json(tmp_path / "a.json", "file", 10**6 if len(content) > 2000 else 1000)
    with pytest.raises(ValueError, match="regular"):
        cache.read_json("/dev/zero", "file")


def test_pictures_of_every_mode(tmp_path, capfd):
    """Half of each is transparent, or black, and half is middle grey."""
    half, deep = Image.new("L", (2, 1), 128), np.array([[0, 32896]])
    half.putpixel((0, 0), 0)
    clear = Image.new("L", (2, 1), 255)
    clear.putpixel((0, 0), 0)
    pale = Image.merge("LA", [half, clear])
    palette = half.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    for expected, image in ((255, pale), (255, pale.convert("RGBA")), (255, palette), (0, half),
                            (0, half.convert("CMYK")), (0, Image.fromarray(deep.astype("uint16"))),
                            (0, Image.fromarray(deep.astype("int32"))),
                            (0, Image.fromarray((deep / 65535).astype("float32")))):
        path = tmp_path / ("a.tiff" if image.mode in ("CMYK", "I", "F") else "a.png")
        image.save(path)
        seen = open_image(path)
        assert seen.mode == "RGB"
        assert [seen.getpixel((x, 0)) for x in (0, 1)] == [(expected,) * 3, (128,) * 3], image.mode
    with pytest.raises(ValueError, match="0 to 1 is right"):
        Image.fromarray(deep.astype("float32")).save(tmp_path / "a.tiff")
        open_image(tmp_path / "a.tiff")
    picture(9, 9).save(tmp_path / "a.gif", save_all=True, append_images=[picture(9, 9, seed=1)])
    open_image(tmp_path / "a.gif")
    assert "2 frames; the first" in capfd.readouterr().err


def test_what_may_not_be_meant_is_said(checkpoints, capfd, tmp_path):
    cache.note.cache_clear()                                           # each is said once only
    folder = tmp_path / "copy"
    shutil.copytree(checkpoints["qwen"][0], folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 50
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "s.json").write_text(json.dumps(GOOD_SCORES, indent=4))     # as the authors' files
    (tmp_path / "s.about.json").write_text(json.dumps({"model": "someone/other"}))
    _, err = run(capfd, "--model", folder, "--prompt", "d\u00e9j\u00e0 <|im_end|>", "--scores",
                 tmp_path / "s.json", "--max-new-tokens", 1)
    for words in ("someone/other", "not know '\u00e9' '\u00e0'; this model knows printable ASCII",
                  "<|im_end|> is no text", "the 50 tokens", "without a picture"):
        assert err.count(words) == 1, (words, err)


@pytest.mark.parametrize("template", [
    "{% for message in messages %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endfor %}",
    "{% for message in messages %}<|im_start|>{{ message['content'] }}{% endfor %}", "{% x",
    "{{ raise_exception('no') }}"])
def test_templates_of_text_models_give_way_to_the_familys(checkpoints, capfd, tmp_path, template):
    """The first as in the published tokenizer_config.json of Mistral-7B-Instruct-v0.2."""
    folder = tmp_path / "copy"
    shutil.copytree(checkpoints["mistral"][0], folder)
    about = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(about, chat_template=template)))
    for path in folder.glob("chat_template*"):
        path.unlink()
    processor = model_llava.Processor(folder, checkpoints["mistral"][2].config)
    assert processor.tokenizer.decode(processor.token_ids(2, "Hi")) == EXPECTED_PROMPTS["mistral"]
    assert "chat template" in capfd.readouterr().err


def test_saved_pages_are_not_lost(checkpoints, capfd, monkeypatch, tmp_path):
    folder, real, calls = tmp_path / "qwen", score_heads.score_transcript, []
    shutil.copytree(checkpoints["qwen"][0], folder)
    data, out = annotated(tmp_path), tmp_path / "s[1].json"
    foreign = [tmp_path / name for name in ("s1.json.part0", "s[1].json.part-of-thesis-2")]
    for path in foreign:
        path.write_text("mine")
    arguments = ("--model", folder, "--data", data, "--out", out, "--transcript", "truth")

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(score_heads, "score_transcript", dies)
    with pytest.raises(SystemExit):
        score_heads.main(list(map(str, arguments)))
    refused = lambda *more: rejected(capfd, *arguments, *more, main=score_heads.main)
    assert "3 pages are saved" in refused() and "--resume" in refused()
    part = Path(f"{out}.part0")
    with open(part, "ab") as file:                                  # as another run has it, killed
        score_heads.fcntl.flock(file, score_heads.fcntl.LOCK_EX)    # while it was writing
        assert "another run" in refused("--resume")
        file.write(b'{"3": {"sc')
    before, weights = data.read_text(), load_file(folder / "model.safetensors")
    data.write_text(before.replace("ab", "ba"))
    assert "other settings, weights or data" in refused("--resume")
    data.write_text(before)
    save_file({name: w + 1 for name, w in weights.items()}, folder / "model.safetensors")
    assert "other settings, weights or data" in refused("--resume")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "s[1].json.part7").write_text("mine")
    assert "not a file of ours" in refused("--resume")
    (tmp_path / "s[1].json.part7").unlink()
    score_heads.main([*map(str, arguments), "--resume"])
    assert len(calls) == 4 + 4 and not part.exists()
    assert all(path.read_text() == "mine" for path in foreign)


def test_bad_pages_are_left_out(checkpoints, capfd, tmp_path):
    picture(5000, 1).save(tmp_path / "thin.png")
    (tmp_path / "inner").mkdir()
    picture(64, 48).save(tmp_path / "out.png")
    picture(64, 48).save(tmp_path / "inner" / "a.png")
    (tmp_path / "inner" / "link.png").symlink_to("../out.png")
    shutil.move(tmp_path / "thin.png", tmp_path / "inner")
    entries = [{"image_name": name, "2_coord": [{"chunk": "ab", "coord": [[0, 0], [corner, 47]]}]}
               for name, corner in (("thin.png", 9), ("n" * 300, 9), ("a.png", 10**400), ("a\0", 9),
                                    ("a.png", math.nan), ("../out.png", 9), ("link.png", 9),
                                    (str(tmp_path / "out.png"), 9), (3, 9), ("a.png", 63))]
    data = tmp_path / "inner" / "data.json"
    arguments = ("--model", checkpoints["qwen"][0], "--data", data, "--transcript", "truth",
                 "--out", tmp_path / "s.json")
    data.write_text(json.dumps(entries))
    score_heads.main(list(map(str, arguments)))
    out = capfd.readouterr().out
    assert "1 pages, 9 skipped" in out and "page 0: image of 5000 x 1" in out
    assert out.count("leads out of the folder") == 3
    data.write_text(json.dumps(entries[:1]))
    with pytest.raises(SystemExit):
        score_heads.main(list(map(str, arguments)))
    assert "none of the 1 pages can be used; page 0: image of 5000" in capfd.readouterr().err
    assert "named twice" in rejected(capfd, *arguments, "--out", data, main=score_heads.main)


def ends(checkpoints, folder):
    """What the shell does to a command: closed pipes, a full disk, Ctrl-C, a terminal of ASCII."""
    (folder / "typed.py").write_text(
        "import sys, sparsemm\n"
        "def work(*_): raise KeyboardInterrupt\n"
        "if sys.argv[1] == 'stop': sparsemm.check_arguments = work\n"
        "else: sparsemm.per_token = lambda result: '\\u20ac'\n"
        "sparsemm.main(['--prompt', 'Hi', '--max-new-tokens', '1', '--method', 'snapkv'])\n")
    typed = f"PYTHONPATH={HERE} {sys.executable} {folder / 'typed.py'}"
    return ["-c", f"""if True:
        import subprocess
        for command in ({sys.executable + ' cache.py --help | true'!r},
                        {sys.executable + ' cache.py | true'!r},
                        {sys.executable + ' cache.py > /dev/full'!r}, {typed + ' stop'!r},
                        {'PYTHONIOENCODING=ascii ' + typed + ' go'!r}):
            done = subprocess.run(["bash", "-c", command + "; echo ${{PIPESTATUS[0]}}"],
                                  capture_output=True, text=True)
            print(done.stdout.splitlines()[-1], " ".join(done.stderr.split()))"""]


@beside(ends)
def test_shells_see_one_line_and_no_traceback(done):
    help_, pipe, full, stop, escaped = done.stdout.splitlines()
    assert help_.strip() in ("0", "141") and pipe.strip() in ("0", "141"), done
    assert full == "2 cache.py: error: [Errno 28] No space left on device"
    assert stop == "130 sparsemm.py: stopped"
    assert escaped.startswith("0 ") and "\\u20ac ms per token" in escaped
