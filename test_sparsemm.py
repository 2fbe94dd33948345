"""Facts about the method, the models and the commands, each of which can fail. Everything is
offline, on small random models and the ones in tiny/.

    pytest test_sparsemm.py

Letters: L layers, H query heads, G KV heads, R = H/G, T prompt tokens, D head size, w window.
"""

import ast
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
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
from tokenizers import AddedToken, Tokenizer, decoders, models, processors
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
from model_llava import GRID, NEWLINE, Prompt, open_image, prefill_attention, prepare

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)                   # enough for small models; processes run beside the tests
HERE = Path(__file__).parent
TINY = sorted(path.parent.name for path in (HERE / "tiny").glob("*/config.json"))
SAMPLES = json.loads((HERE / "tiny" / "samples.json").read_text())


# ---- small random checkpoints, saved by transformers ---------------------------------------------

SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>", "<|vision_start|>",
           "<|vision_end|>", "<|image_pad|>", "<unk>"]
VOCABULARY = {token: i for i, token in enumerate([*SPECIAL, "\n", *map(chr, range(32, 127))])}
LLAVA_PINS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
REFERENCES = {"llava_next": LlavaNextForConditionalGeneration,
              "qwen2_vl": Qwen2VLForConditionalGeneration}


def write_tokenizer(folder, bos):
    """A tokenizer of characters; bos: whether it puts <s> in front, as Llama's does."""
    tokenizer = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                  for token in SPECIAL])
    tokenizer.decoder = decoders.Fuse()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", VOCABULARY["<s>"])])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>",
                            eos_token="</s>", pad_token="<pad>").save_pretrained(folder)


def llava_config(text_class, L, H, G, D, tied, vision_layers=3):
    """LLaVA-NeXT of tiles of 28 px, 16 tokens each."""
    text = text_class(vocab_size=len(VOCABULARY), hidden_size=H * D, intermediate_size=2 * H * D,
                      num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=G,
                      tie_word_embeddings=tied, rope_theta=500.0)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=vision_layers,
                              num_attention_heads=2, image_size=28, patch_size=7, projection_dim=32)
    return LlavaNextConfig(vision_config=vision, text_config=text,
                           image_token_index=VOCABULARY["<image>"],
                           image_grid_pinpoints=LLAVA_PINS, tie_word_embeddings=tied)


def qwen_config(L, H, G, D, tied, sections):
    rope = {"type": "mrope", "mrope_section": sections, "rope_theta": 300.0}
    return Qwen2VLConfig(
        text_config=dict(vocab_size=len(VOCABULARY), hidden_size=H * D, intermediate_size=2 * H * D,
                         num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=G,
                         rope_theta=300.0, rope_scaling=rope),
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


def random_model(name):
    """transformers' model with weights scaled so that different inputs give different tokens."""
    config = CHECKPOINTS[name]()
    torch.manual_seed(0)
    model = REFERENCES[config.model_type](config).requires_grad_(False).eval()
    for parameter, p in model.named_parameters():
        if p.dim() >= 2:
            p.normal_(0, 1.5 / p[0].numel() ** 0.5)
        elif re.search(r"(norm.*|ln_q\.)weight", parameter):
            p.uniform_(0.5, 1.5)
        else:
            p.normal_(0, 0.3)
    model.set_attn_implementation("eager")
    return model


def write_checkpoint(folder, name, **save):
    """Saves random_model(name) with tokenizer, image processor and end tokens. Returns it."""
    model, qwen = random_model(name), name.startswith("qwen")
    model.save_pretrained(folder, **save)
    write_tokenizer(folder, bos=not qwen)
    images = Qwen2VLImageProcessorPil(
        patch_size=4, size={"shortest_edge": 64, "longest_edge": 64 * 200}) if qwen else \
        LlavaNextImageProcessorPil(size={"shortest_edge": 28}, image_grid_pinpoints=LLAVA_PINS,
                                   crop_size={"height": 28, "width": 28})
    images.save_pretrained(folder)
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


@pytest.fixture
def copied(checkpoints, tmp_path):
    """copied(name): a copy of a checkpoint's folder, to be changed."""
    return lambda name: Path(shutil.copytree(checkpoints[name][0], tmp_path / "copy"))


@pytest.fixture(scope="session")
def tiny():
    """name -> the small models that are shipped"""
    return {name: model_llava.load(HERE / "tiny" / name, "cpu", "float32") for name in TINY}


def beside(command, **environment):
    """Marks a test of a process of its own, which runs beside the other tests from the start.
    command(checkpoints, folder): Python's arguments, with a folder for what is written."""
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


def text_prompt(ids):
    return Prompt(ids, torch.arange(len(ids)).expand(3, -1), [], [], [])


def reference_inputs(ours, prompt, images):
    """What transformers' model takes for the same ids; its own processing of all images at once."""
    inputs = dict(ours.processor.image_processor(images, return_tensors="pt")) if images else {}
    if ours.config.family == "qwen2_vl" and images:
        inputs["mm_token_type_ids"] = (prompt.ids == ours.config.image_token).int()[None]
    return dict(inputs, input_ids=prompt.ids[None])


def reference_logits(reference, ours, prompt, images):
    """transformers' logits (T, vocabulary) of the same ids."""
    with torch.no_grad():
        return reference(**reference_inputs(ours, prompt, images)).logits[0]


# ---- budgets -------------------------------------------------------------------------------------

def test_budgets_by_hand():
    """2 layers x 2 heads, b = 64, w = 32, rho = 0.1: r = 3.2, by score 4 * 32 * 0.9 = 115.2."""
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
    assert cache.round_to_total(torch.tensor([[97 / 3] * 3]), 97).tolist() == [[33, 32, 32]]


def test_budgets_at_the_edges():
    uneven = torch.tensor([[5.0, 1.0, 0.0]])
    assert (allocate_budgets(torch.full((3, 5), 0.2), 64, 500) == 64).all()    # even: as in SnapKV
    assert allocate_budgets(uneven, 200, 120).tolist() == [[120] * 3]          # everything fits
    assert allocate_budgets(uneven, 64, 20).tolist() == [[20] * 3]             # T <= w
    by_layer = allocate_budgets(torch.ones(3, 2), 100, torch.tensor([20, 60, 1000]))
    assert by_layer.sum() == 600 and by_layer[:2].tolist() == [[20, 20], [60, 60]]
    # scores of any size share out the whole budget, also where their sum is no number
    assert allocate_budgets([[1, 1e-310, 1e-310, 1e-310]], 100, 150).tolist() == [[150, 84, 83, 83]]
    assert allocate_budgets([[1e300, 1e308, 1e308]], 100, 1000).tolist() == [[39, 131, 130]]


def slow_budgets(s, b, T, w, rho, redistribute):
    """The budgets in exact fractions, head by head, the surplus handed out over and over."""
    heads, N, rho = [Fraction(x) for x in s.flatten().tolist()], s.numel(), Fraction(rho)
    total, free = b * N, b * N - N * w
    ideal = [w + rho * free / N + (free - rho * free) * x / sum(heads) for x in heads]
    if redistribute:
        total = min(total, N * T)
        while (surplus := sum(max(Fraction(0), x - T) for x in ideal)) > 0:
            ideal = [min(x, Fraction(T)) for x in ideal]
            shares = {i: heads[i] for i in range(N) if ideal[i] < T}
            if sum(shares.values()) == 0:
                shares = dict.fromkeys(shares, Fraction(1))
            for i in shares:
                ideal[i] += surplus * shares[i] / sum(shares.values())
    whole = [x.numerator // x.denominator for x in ideal]
    ranked = sorted(range(N), key=lambda i: (whole[i] - ideal[i], i))
    for i in ranked[:total - sum(whole)]:
        whole[i] += 1
    return torch.tensor([min(x, T) for x in whole]).view(s.shape)


def test_budgets_sum_to_B_and_equal_a_slow_twin():
    rng = random.Random(0)
    for _ in range(400):
        L, G, w, T = rng.randint(1, 4), rng.randint(1, 5), rng.randint(1, 40), rng.randint(1, 300)
        s = torch.tensor([[rng.choice([0, 0, 1, 2, 5, 50, 1000]) / rng.choice([1, 2, 4, 8])
                           for _ in range(G)] for _ in range(L)], dtype=torch.float64)
        s[rng.randrange(L), rng.randrange(G)] += 1
        b, rho = w + rng.randint(0, 200), rng.choice([0.0, 0.125, 0.5, 1.0])
        for redistribute in (True, False):
            budgets = allocate_budgets(s, b, T, w, rho, redistribute)
            assert torch.equal(budgets, slow_budgets(s, b, T, w, rho, redistribute))
            assert budgets.sum() == min(b, T) * L * G or not redistribute


def test_pyramid_budgets():
    # n = 32 a head beyond the window: n_min = 32 // 20 = 1, n_max = 63; 63, 42.33, 21.67, 1
    assert cache.pyramid_budgets(4, 64, 1000, 32).tolist() == [95, 74, 54, 33]
    # no more than 50 - 32 = 18 fit; n = 12, n_min is raised to 6: 18, 14, 10, 6
    assert cache.pyramid_budgets(4, 44, 50, 32).tolist() == [50, 46, 42, 38]
    assert cache.pyramid_budgets(1, 64, 1000, 32).tolist() == [64]


def test_adakv_budgets():
    # n = 2 a head. Head 0 holds 9 of 10 in its best two, head 1 only 2 of 8: weights 0.9 and 0.25
    a = torch.tensor([[5.0, 4, 0.5, 0.5, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    # ranked: 4.5, 3.6, 0.45, 0.45 | 0.25 ...: the best four are head 0's; 0.8 * 4 + 0.4 = 3.6, 0.4
    assert cache.adakv_budgets(a, 6, 4).tolist() == [8, 4]


def test_every_method_spends_the_same_total():
    q, k = torch.randn(6, 90, 8), torch.randn(3, 90, 8)
    for name in METHODS[1:]:
        method = make_method(name, 4, 3, 90, budget=50, head_scores=torch.rand(4, 6))
        budgets = [method.budgets(l, method.position_scores(q, k, 32)) for l in range(4)]
        assert sum(budgets).sum() == 4 * 3 * 50, name
        assert all(((b >= 32) & (b <= 90)).all() for b in budgets), name


def test_random_and_shuffled_are_drawn_once_from_the_seed():
    scores = torch.rand(4, 6, dtype=torch.float64) ** 4
    for name in ("random", "shuffled"):
        first, again, other = (cache.shared_out_by(name, 4, 3, scores, seed) for seed in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)
    visual = cache.kv_head_scores(scores, 3)
    assert torch.allclose(visual[:, 0], scores[:, 0] + scores[:, 1])     # both share KV head 0
    assert torch.equal(cache.shared_out_by("shuffled", 4, 3, scores, 0).flatten().sort().values,
                       visual.flatten().sort().values)


# ---- which entries -------------------------------------------------------------------------------

def brute_force_observation(q, k, window, kernel=5):
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
            pooled[g, j] = sum(mean[max(0, j - kernel // 2):j + kernel // 2 + 1]) / kernel
    return pooled


@pytest.mark.parametrize("H, G, T, D, w, kernel", [(4, 4, 20, 8, 5, 5), (6, 2, 17, 4, 3, 3),
                                                   (2, 1, 9, 16, 8, 5), (3, 3, 12, 8, 1, 1)])
def test_observed_attention_equals_brute_force(H, G, T, D, w, kernel):
    torch.manual_seed(T)
    q, k = torch.randn(H, T, D), torch.randn(G, T, D)
    assert torch.allclose(observed_attention(q, k, w, kernel),
                          brute_force_observation(q, k, w, kernel), atol=1e-6)


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
    # a prompt within the window has no positions to choose from
    a = observed_attention(torch.randn(4, 10, 8), torch.randn(2, 10, 8), window=32)
    assert a.shape == (2, 0) and select_entries(a, torch.tensor([10, 10]), 10).all()


@pytest.mark.parametrize("name, first", [("window", 0), ("streaming", 4)])
def test_window_keeps_the_last_and_streaming_the_first_four_too(name, first):
    method = make_method(name, 1, 2, 60, budget=40, window=8)
    a = method.position_scores(torch.randn(2, 60, 8), torch.randn(2, 60, 8), 8)
    kept = select_entries(a, method.budgets(0, a), 60)[0].nonzero()[:, 0].tolist()
    assert kept == [*range(first), *range(20 + first, 60)]


# ---- the cache, and decoding from it -------------------------------------------------------------

def filled_cache(q, k, v, lengths, w=4):
    """A cache of one layer whose heads keep lengths[g] entries, window included."""
    held = KVCache(cache.Method(lambda layer, a: torch.tensor(lengths), observed_attention), w)
    held.compress(0, q, k, v)
    return held


@pytest.mark.parametrize("lengths", [[9, 9], [4, 21]])
def test_heads_hold_what_was_selected_and_room_grows_in_steps(lengths):
    """Appending moves nothing while there is room, and what is allocated depends on how many tokens
    came, not on how many may come."""
    torch.manual_seed(0)
    q, k, v = torch.randn(4, 30, 8), torch.randn(2, 30, 8), torch.randn(2, 30, 8)
    held, entry_bytes, moves = filled_cache(q, k, v, lengths), 2 * 8 * 4, []
    keep = select_entries(observed_attention(q, k, 4), torch.tensor(lengths), 30)
    expected = [torch.stack([k[g, keep[g]], v[g, keep[g]]]) for g in range(2)]
    assert held.allocated_bytes() == (sum(lengths) + 2 * cache.ROOM) * entry_bytes
    for step in range(5 * cache.ROOM):
        assert held.held_bytes() == (sum(lengths) + 2 * step) * entry_bytes
        pointers, new = [x.data_ptr() for head in held[0] for x in head], torch.randn(2, 2, 1, 8)
        if held.extend():
            moves.append(step)
        else:
            assert [x.data_ptr() for head in held[0] for x in head] == pointers
        held.append(0, *new)
        expected = [torch.cat([old, new[:, g]], 1) for g, old in enumerate(expected)]
        assert all(torch.equal(torch.stack(x), y) for x, y in zip(held[0], expected))
    assert moves == [cache.ROOM, 2 * cache.ROOM, 4 * cache.ROOM]
    assert held.allocated_bytes() == (sum(lengths) + 2 * 8 * cache.ROOM) * entry_bytes


@pytest.mark.parametrize("H, G", [(4, 4), (6, 2), (5, 1)])
def test_decode_attention_and_its_packed_twin_equal_softmax_by_hand(H, G):
    """For heads that hold equally many entries, unequally many, and nothing but the window; while
    the cache grows, and after its tensors were moved."""
    torch.manual_seed(0)
    for lengths in ([4] * G, [11] * G, [4 + (13 * g) % 40 for g in range(1, G + 1)]):
        held = filled_cache(*(torch.randn(n, 60, 8) for n in (H, G, G)), lengths)
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
    G, R, D, T, root = 2, 3, 32, 60, math.sqrt(size * math.sqrt(32))
    q, k, v = torch.randn(G * R, T, D), torch.randn(G, T, D), torch.randn(G, T, D)
    q[:, :, 0], k[:, :, 0] = root, root * (1 + torch.rand(G, T) / 500)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    held = filled_cache(q, k, v, lengths)
    held.extend()
    packed = PackedAttention(held).attend(0, q[:, -1:], k[:, -1:], v[:, -1:])
    for out in (packed, decode_attention(q[:, -1:], held[0])):
        for h in range(G * R):
            K, V = (x.double() for x in held[0][h // R])
            p = (K @ q[h, -1].double() / math.sqrt(D)).softmax(0)
            assert (out[h, 0] - p @ V).norm() < 0.01 * (p @ V).norm()
    exact = prefill_attention(q.double(), k.double(), v.double())
    assert (prefill_attention(q, k, v) - exact).norm() < 0.01 * exact.norm()
    a, exact = observed_attention(q, k, 4), brute_force_observation(q.double(), k.double(), 4)
    assert a.dtype == torch.float32 and (a - exact).abs().max() < 0.01 * exact.max()


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
            if held.extend() or twin is None:
                twin = PackedAttention(held)
            else:
                twin.extend()
            logits.append(model.decode(token, position, twin.attend))
    return torch.stack(logits)


@pytest.mark.parametrize("size", [100, 1000, 5000])
def test_decoding_with_large_biases_in_bfloat16_agrees_with_a_fused_kernel(size):
    """Forced tokens, bfloat16: how often the likeliest next token is that of float32, for decoding
    from the cache and for one pass of scaled_dot_product_attention over everything. (Of logits that
    are rounded to bfloat16 it is 90, 66 and 67 % of the tokens, of these here 97 and 98 %.)"""
    model, n = biased_qwen(size), 100
    c, ids = model.config, torch.randint(0, model.config.vocabulary, (160,))
    with torch.inference_mode():
        exact = model.logits(model.hidden_states(text_prompt(ids))[-n - 1:-1]).argmax(-1)
        model = model.bfloat16()
        fused = model.logits(model.hidden_states(text_prompt(ids))[-n - 1:-1]).argmax(-1)
    held = KVCache(make_method("full", c.layers, c.kv_heads, 160 - n - 1))
    decoded = forced_logits(model, text_prompt(ids[:-n - 1]), ids[-n - 1:-1].tolist(), held)
    by_fused, by_decoding = ((x == exact).double().mean() for x in (fused, decoded.argmax(-1)))
    assert by_decoding > by_fused - 0.05


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vicuna", "qwen"])
@pytest.mark.parametrize("packed", [False, True], ids=["loop", "packed"])
def test_evicted_decode_equals_masked_attention(checkpoints, monkeypatch, name, method, packed):
    """transformers' full attention under a mask that hides from new tokens what heads dropped."""
    _, reference, ours = checkpoints[name]
    c, images, tokens, w = ours.config, [picture(64, 50)], [40, 41, 60, 33, 70], 6
    prompt = prepare(ours, images, "What is it?")
    T, n, kept = len(prompt.ids), len(tokens), []                                # (G, T) per layer
    monkeypatch.setattr(cache, "select_entries",
                        lambda *arguments: kept.append(select_entries(*arguments)) or kept[-1])
    plan = make_method(method, c.layers, c.kv_heads, T, budget=20, window=w,
                       head_scores=torch.rand(c.layers, c.heads))
    logits = forced_logits(ours, prompt, tokens, KVCache(plan, w), packed)
    assert torch.stack(kept).sum() == (T if method == "full" else 20) * c.layers * c.kv_heads

    for kept_here, layer in zip(kept, reference.model.language_model.layers):
        seen = torch.ones(T + n, T + n).tril().bool().repeat(c.heads, 1, 1)
        seen[:, T:, :T] &= kept_here.repeat_interleave(c.heads // c.kv_heads, 0)[:, None]
        mask = torch.zeros(1, c.heads, T + n, T + n).masked_fill(~seen, -torch.inf)
        forward = layer.self_attn.forward
        monkeypatch.setattr(layer.self_attn, "forward", lambda *rest, forward=forward, mask=mask,
                            **named: forward(*rest, **{**named, "attention_mask": mask}))
    expected = reference_logits(reference, ours, prompt.extended(tokens), images)[T:]
    assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_budget_beyond_the_prompt_equals_full(checkpoints, method):
    ours = checkpoints["mistral"][2]
    arguments = dict(images=[picture(60, 60)], prompt="What?", max_new_tokens=6,
                     head_scores=torch.rand(ours.config.layers, ours.config.heads))
    full = sparsemm.generate(ours, method="full", **arguments)
    T = full["prompt_tokens"]
    for settings in (dict(budget=T), dict(budget=T + 100, window=T + 50)):
        result = sparsemm.generate(ours, method=method, **settings, **arguments)
        assert (result["token_ids"], result["kept"]) == (full["token_ids"], [[T] * 2] * 2)
        assert result["cache_bytes"] == full["cache_bytes"] == full["full_cache_bytes"]


@pytest.mark.parametrize("method", METHODS)
def test_the_first_token_is_that_of_the_full_cache(checkpoints, method):
    """A layer is compressed behind its prefill attention: whatever is kept, prefill saw it all."""
    ours, images = checkpoints["qwen"][2], [picture(90, 120)]
    first = {sparsemm.generate(ours, images, "What is it?", name, 33, head_scores=torch.rand(3, 6),
                               max_new_tokens=1)["token_ids"][0] for name in ("full", method)}
    assert len(first) == 1


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


@pytest.mark.parametrize("name", ["vicuna", "mistral", "qwen"])
def test_second_question_equals_one_long_prompt_in_transformers(checkpoints, name):
    """Nothing evicted: what was appended is what a single long conversation would have been."""
    _, reference, ours = checkpoints[name]
    images, processor = [picture(45, 60), picture(30, 31, seed=1)], ours.processor
    talk = sparsemm.Conversation(ours, images, "full", max_new_tokens=5)
    first, second = talk.ask("What is it?"), talk.ask("So?")
    long, answer = talk.inputs.ids[:second["prompt_tokens"]], second["token_ids"]
    said = [t for t in first["token_ids"] if t not in processor.end_tokens]
    assert long[first["prompt_tokens"]:].tolist() == \
        said + processor.next_turn_ids(2, ["Hi", "Yes", "So?"])
    prompt = prepare(ours, images, "Hi")
    prompt.ids = torch.cat([long, torch.tensor(answer[:-1])])
    logits = reference_logits(reference, ours, prompt, images)[len(long) - 1:]
    assert logits.argmax(-1).tolist() == answer
    assert second["kept"] == [[len(long)] * ours.config.kv_heads] * ours.config.layers


def test_second_question_goes_on_from_what_was_kept(checkpoints):
    """Its tokens are appended to every head; --fresh compresses the whole conversation instead, and
    answers as a new prompt of the same tokens would."""
    ours, images = checkpoints["qwen"][2], [picture(90, 120)]
    talk, fresh = (sparsemm.Conversation(ours, images, "snapkv", 40, max_new_tokens=4, fresh=fresh)
                   for fresh in (False, True))
    first = talk.ask("What is it?")
    pointers = [keys.data_ptr() for keys in talk.cache.keys]
    second = talk.ask("So?")
    assert [keys.data_ptr() for keys in talk.cache.keys] == pointers
    T = second["prompt_tokens"]
    assert second["kept"] == [[n + T - first["prompt_tokens"] for n in layer]
                              for layer in first["kept"]]
    again = fresh.ask("What is it?"), fresh.ask("So?")
    assert again[0]["token_ids"] == first["token_ids"]
    assert again[1]["prompt_tokens"] == T and again[1]["kept"] == [[40] * 2] * 3
    prompt = replace(fresh.inputs, ids=fresh.inputs.ids[:T],
                     positions=fresh.inputs.positions[:, :T])
    with torch.inference_mode():
        anew = sparsemm.prefill(ours, prompt, sparsemm.new_cache(ours, T, 4, "snapkv", 40, 32))
    assert anew.argmax() == again[1]["token_ids"][0]


class Operations(TorchDispatchMode):
    """Counts what is dispatched, views aside, and notes the last and the largest that comes out."""
    VIEWS = """view t numpy_T transpose split split_with_sizes chunk slice select unbind expand
        flatten unsqueeze permute to detach lift_fresh item""".split()
    count = elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if (name := function.__name__.split(".")[0]) not in self.VIEWS:
            self.count, self.last = self.count + 1, name
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("add", [None, torch.rand(96), torch.rand(1, 96)], ids=["no", "m", "1 m"])
def test_a_product_of_one_row_is_that_of_its_parts(monkeypatch, add):
    x, weight = torch.rand(1, 50), torch.rand(96, 50)
    expected = F.linear(x.double(), weight.double()) + (0 if add is None else add)
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        with Operations() as seen:
            product = model_llava.linear(x, weight, add)
        assert (product - expected).abs().max() < 1e-5 and seen.count == 1
        assert ("bmm" in seen.last) == (threads == 2)


@pytest.mark.parametrize("H, G", [(4, 4), (6, 2), (8, 1)])
def test_a_decoding_step_dispatches_few_operations(H, G):
    """Per layer: by the loop at most 14, and 4 for each KV head; by the packed twin at most 17, and
    with half precision's rounding of the weights 18. float32 has no such rounding."""
    counts = {}
    for L in (1, 3):
        config = llava_config(MistralConfig, L, H, G, 8, False)
        config = model_llava.convert_config(config, "llava_next")
        model = model_llava.LlavaNext(config).requires_grad_(False)
        held = KVCache(make_method("sparsemm", L, G, 60, 40, head_scores=torch.rand(L, H)))
        forced_logits(model, text_prompt(torch.arange(60)), [3], held)
        with torch.inference_mode():
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
    ours, largest = checkpoints["qwen"][2], []
    for T in (1000, 2000):
        held = KVCache(make_method("snapkv", ours.config.layers, ours.config.kv_heads, T))
        with Operations() as seen, torch.no_grad():
            sparsemm.prefill(ours, text_prompt(torch.randint(0, 90, (T,))), held)
        largest.append(seen.elements)
    assert largest[1] <= 2.05 * largest[0] and largest[1] < 2000 * 2000 / 4


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_numbers_that_are_not_finite_are_an_error_and_no_answer(checkpoints, dtype):
    model = model_llava.load(checkpoints["qwen"][0], "cpu", dtype)
    model.model.layers[1].mlp.down_proj.weight[3, 3] = math.nan
    with pytest.raises(ValueError, match=f"token 0 are not finite in torch.{dtype}"):
        sparsemm.generate(model, [picture(40, 40)], "Hi", "snapkv")
    model.model.layers[0].self_attn.qkv_proj.weight[3, 3] = math.nan
    with pytest.raises(ValueError, match=f"layer 0.*not finite in torch.{dtype}"):
        score_heads.score_transcript(model, [picture(40, 40)], [[("a", (0, 0, 9, 9))]], [40, 41])


# ---- scoring -------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["vicuna", "mistral", "qwen"])
def test_scores_equal_counting_with_attention_maps(checkpoints, name):
    """One pass over peaks = transformers' full attention maps, counted token by token: a transcript
    of one image, and one of two."""
    _, reference, ours = checkpoints[name]
    pages = [(picture(60, 45), [("ab", (2, 2, 30, 20)), ("cd", (31, 2, 58, 20))]),
             (picture(40, 70), [("e", (5, 25, 30, 44))])]
    for shown in (pages[:1], pages):
        images, boxes = map(list, zip(*shown))
        words = [(page, *word) for page, found in enumerate(boxes) for word in found]
        tokens = [VOCABULARY[c] for c in " ".join(text for _, text, _ in words)]
        prompt = prepare(ours, images, score_heads.OCR_PROMPT)
        with torch.no_grad():
            maps = reference(**reference_inputs(ours, prompt.extended(tokens), images),
                             output_attentions=True).attentions
        expected, hit = torch.zeros(len(maps), ours.config.heads, dtype=torch.float64), 0
        for i, word in enumerate([0, 0, None, 1, 1, None, 2][:len(tokens)]):
            if word is None:
                continue
            page, _, (x0, y0, x1, y1) = words[word]
            image, start = prompt.images[page], prompt.starts[page]
            region = {start + j for j, (a, b, c, d) in enumerate(image.boxes.tolist())
                      if image.kinds[j] == GRID
                      and min(c, x1) > max(a, x0) and min(d, y1) > max(b, y0)}
            for l, attention in enumerate(maps):
                for h, row in enumerate(attention[0, :, len(prompt.ids) - 1 + i]):
                    expected[l, h] += (int(row.argmax()) in region) / len(region)
                    hit += int(row.argmax()) in region
        scores, counted, hits = score_heads.score_transcript(ours, images, boxes, tokens)
        assert (counted, hits) == (len(tokens) - len(words) + 1, hit) and hit > 0
        assert torch.allclose(scores, expected)


def test_which_word_a_token_of_the_transcript_belongs_to():
    """Aligned: repeated words and faults are survived; unique: what one word alone contains."""
    assert score_heads.align_tokens(list("to be"), ["to", "be"]) == [0, 0, None, 1, 1]
    assert score_heads.align_tokens(["the", " ca", "t the"], ["the", "cat", "the"]) == [0, 1, 2]
    assert score_heads.align_tokens(list("tXtal 5"), ["total", "5"]) == [0, None, 0, 0, 0, None, 1]
    pieces, words = ["the", " ", "cat", "c", "hat", "5"], ["the", "cat", "the", "hats", "c5"]
    assert score_heads.unique_tokens(pieces, words) == [None, None, 1, None, 3, 4]


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
            if planted[0] == layer:
                q[planted[1], T - len(targets):] = F.one_hot(torch.tensor(targets), T).float()
            attend(layer, q, k, k)

    monkeypatch.setattr(model, "hidden_states", hidden_states)


@pytest.mark.parametrize("name", ["vicuna", "mistral", "qwen"])
def test_a_planted_head_scores_and_no_other(checkpoints, monkeypatch, name):
    """Words at all four edges of a wide image, so that LLaVA's unpadding and newlines matter."""
    ours, image = checkpoints[name][2], picture(150, 60)
    words = [("a", (0, 0, 20, 14)), ("b", (130, 0, 150, 14)), ("a", (0, 46, 20, 60)),
             ("c", (130, 46, 150, 60))]
    prompt = prepare(ours, [image], score_heads.OCR_PROMPT)
    shown, start, targets = prompt.images[0], prompt.starts[0], []
    for _, (x0, y0, x1, y1) in words:            # the grid token that shows the middle of the word
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        targets.append(start + next(
            j for j, (a, b, c, d) in enumerate(shown.boxes.tolist())
            if shown.kinds[j] == GRID and a <= x < c and b <= y < d))
    newlines = (shown.kinds == NEWLINE).nonzero()[:, 0]
    elsewhere = start + int(newlines[0]) if len(newlines) else start - 1
    plant(monkeypatch, ours, (1, 2), targets, elsewhere)
    ids = [VOCABULARY[c] for c in "abac"]
    scores, counted, hits = score_heads.score_transcript(ours, [image], [words], ids)
    expected = sum(1 / len(score_heads.tokens_in_box(shown, box)) for _, box in words)
    assert (counted, hits) == (4, 4)
    assert scores[1, 2] == pytest.approx(expected) and scores.sum() == scores[1, 2]
    # the same look with the words' boxes exchanged is no hit
    moved = [(text, box) for (text, _), (_, box) in zip(words, reversed(words))]
    assert score_heads.score_transcript(ours, [image], [moved], ids)[2] == 0


def test_a_box_is_shown_by_the_grid_tokens_that_it_overlaps(checkpoints):
    """With positive area: none outside the image or without area; and no thumbnail or newline."""
    shown = prepare(checkpoints["qwen"][2], [picture(80, 64)], "Hi").images[0]
    for box in [(90, 0, 120, 10), (-20, -20, -1, -1), (5, 5, 5, 30), (5, 5, 30, 5), (9, 9, 4, 4)]:
        assert len(score_heads.tokens_in_box(shown, box)) == 0
    assert len(score_heads.tokens_in_box(shown, (-50, -50, 500, 500))) == len(shown)
    assert len(score_heads.tokens_in_box(shown, (8, 8, 16, 16))) == 1       # one cell, edges touch
    shown = prepare(checkpoints["vicuna"][2], [picture(150, 60)], "Hi").images[0]
    inside = score_heads.tokens_in_box(shown, (0, 0, 150, 60))
    assert torch.equal(inside, (shown.kinds == GRID).nonzero()[:, 0])


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


def annotated(folder, num=7):
    """A file of annotated pages of two words each, in the folder."""
    for i in range(num):
        picture(64, 48, seed=i).save(folder / f"{i}.png")
    words = [{"chunk": "ab", "coord": [[2, 3], [30, 20]]},
             {"chunk": "cd", "coord": [[34, 5], [60, 5], [60, 40], [34, 40]]}]
    (folder / "data.json").write_text(json.dumps(
        [{"id": i, "image_name": f"{i}.png", "2_coord": words} for i in range(num)]))
    return folder / "data.json"


def score(folder, out, *more):
    score_heads.main(["--model", str(folder), "--out", str(out), "--transcript", "truth",
                      *map(str, more)])
    return out.read_text()


def interrupt(monkeypatch, *numbers):
    """Ctrl-C at these calls of score_transcript. Returns the list of calls."""
    real, calls = score_heads.score_transcript, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) in numbers:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(score_heads, "score_transcript", dies)
    return calls


def test_a_run_that_is_killed_twice_equals_an_uninterrupted_one(checkpoints, monkeypatch, tmp_path,
                                                                capsys):
    folder, data = checkpoints["qwen"][0], annotated(tmp_path, 12)
    whole = score(folder, tmp_path / "whole.json", "--data", data)
    calls = interrupt(monkeypatch, 5, 10)
    for more, saved in (((), 4), (("--resume",), 8)):
        with pytest.raises(SystemExit) as end:
            score(folder, tmp_path / "cut.json", "--data", data, *more)
        assert end.value.code == 130 and not (tmp_path / "cut.json").exists()
        assert f"{saved} pages are saved, --resume" in capsys.readouterr().err
        with open(tmp_path / "cut.json.part0", "ab") as file:
            file.write(b'\n{"9": {"sc')                           # killed while it was writing
    assert score(folder, tmp_path / "cut.json", "--data", data, "--resume") == whole
    assert len(calls) == 5 + 5 + 4
    assert sorted(p.name for p in tmp_path.glob("cut*")) == ["cut.about.json", "cut.json"]
    about = json.loads((tmp_path / "whole.about.json").read_text())
    assert about["pages"] == 12 and about["tokens"] > 12 and about["hits"] > 0


def test_saved_pages_are_not_lost(copied, capfd, monkeypatch, tmp_path):
    folder, data, out = copied("qwen"), annotated(tmp_path), tmp_path / "s[1].json"
    foreign = [tmp_path / name for name in ("s1.json.part0", "s[1].json.part-of-thesis-2")]
    for path in foreign:
        path.write_text("mine")
    arguments = ("--model", folder, "--data", data, "--out", out, "--transcript", "truth")
    interrupt(monkeypatch, 4)
    with pytest.raises(SystemExit):
        score_heads.main(list(map(str, arguments)))
    refused = lambda *more: rejected(capfd, *arguments, *more, main=score_heads.main)
    assert "3 pages are saved" in refused() and "--resume" in refused()
    with open(f"{out}.part0", "ab") as file:                             # as another run has it
        score_heads.fcntl.flock(file, score_heads.fcntl.LOCK_EX)
        assert "another run" in refused("--resume")
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
    assert not Path(f"{out}.part0").exists()
    assert all(path.read_text() == "mine" for path in foreign)


@beside(lambda checkpoints, folder: two_ranks(
    "score_heads.py", "--model", checkpoints["qwen"][0], "--data", annotated(folder),
    "--transcript", "truth", "--images", "2", "--out", folder / "two.json"))
def test_two_processes_equal_one(checkpoints, done, tmp_path):
    """Also for several pages in one prompt."""
    one = score(checkpoints["qwen"][0], tmp_path / "one.json", "--data", done.folder / "data.json",
                "--images", 2)
    assert len(json.loads(one)["0-0"]) == 4                                   # 7 pages
    assert done.returncode == 0, done.stderr
    assert (done.folder / "two.json").read_text() == one


def test_summary_by_hand():
    s = torch.tensor([[0.7, 0.1], [0.2, 0.0]], dtype=torch.float64)
    assert score_heads.top_share(s, 0.05) == (1, pytest.approx(0.7))
    assert score_heads.top_share(s, 0.5) == (2, pytest.approx(0.9))
    # sorted 0, .1, .2, .7: 2 * (0*1 + .1*2 + .2*3 + .7*4) / 4 - 5/4
    assert score_heads.gini(s) == pytest.approx(2 * 3.6 / 4 - 1.25)
    text = score_heads.summary(s)
    assert "0     0  70.00%" in text and "|@.|" in text and "|: |" in text


def test_score_files_hold_the_mean_over_pages_with_sum_one(tmp_path):
    per_page = [torch.rand(3, 4, dtype=torch.float64) for _ in range(5)]
    score_heads.write_scores(per_page, tmp_path / "s.json")
    table = json.loads((tmp_path / "s.json").read_text())
    (tmp_path / "s.json").write_text(json.dumps(dict(reversed(table.items()))))    # in any order
    assert torch.allclose(cache.read_head_scores(tmp_path / "s.json", 3, 4),
                          sum(per_page) / sum(per_page).sum(), atol=1e-8)


# ---- the models ----------------------------------------------------------------------------------

SIZES = {"square": [(50, 50)], "wide": [(200, 30)], "tall": [(20, 90)], "small": [(9, 9)],
         "odd": [(37, 53)], "two": [(60, 33), (31, 77)], "text": []}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_equal_transformers(checkpoints, name, sizes):
    _, reference, ours = checkpoints[name]
    images = [picture(*size, seed=i) for i, size in enumerate(sizes)]
    prompt = prepare(ours, images, "What is it?")
    with torch.inference_mode():
        logits = ours.logits(ours.hidden_states(prompt))
    expected = reference_logits(reference, ours, prompt, images)
    assert expected.std() > 0.5                                            # not all the same
    assert (logits - expected).abs().max() < 1e-4


def reference_tokens(reference, ours, prompt, images, n):
    written = reference.generate(
        **reference_inputs(ours, prompt, images), max_new_tokens=n, do_sample=False,
        eos_token_id=sorted(ours.processor.end_tokens), pad_token_id=0)
    return written[0, len(prompt.ids):].tolist()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_tokens_equal_transformers(checkpoints, name):
    _, reference, ours = checkpoints[name]
    images, question = [picture(45, 60)], "What is the Total?"
    ids = sparsemm.generate(ours, images, question, "full", max_new_tokens=16)["token_ids"]
    assert ids == reference_tokens(reference, ours, prepare(ours, images, question), images, 16)
    assert len(set(ids)) > 1


VICUNA_7B = dict(
    model_type="llava_next", image_token_index=32000, vision_feature_layer=-2,
    projector_hidden_act="gelu", torch_dtype="float16",
    image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
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
    made = REFERENCES[ours.family]
    with torch.device("meta"):
        reference = made(made.config_class.from_pretrained(tmp_path))
        model = model_llava.MODELS[ours.family](ours)
    theirs = {model_llava.hub_name(key, ours.family): p.shape
              for key, p in reference.named_parameters()}
    assert {key: p.shape for key, p in model_llava.published_tensors(model).items()} == theirs


@pytest.mark.parametrize("name, some", [
    ("vicuna", {"image_newline", "language_model.model.layers.0.self_attn.q_proj.weight",
                "multi_modal_projector.linear_1.bias", "language_model.lm_head.weight",
                "vision_tower.vision_model.pre_layrnorm.weight"}),
    ("qwen", {"lm_head.weight", "model.layers.0.self_attn.q_proj.bias", "visual.merger.mlp.2.bias",
              "visual.blocks.0.attn.qkv.weight", "visual.patch_embed.proj.weight"})])
def test_published_tensor_names(checkpoints, name, some):
    """The hub's spelling, in which the two projects' tables could agree and both be wrong."""
    assert some <= set(model_llava.published_tensors(checkpoints[name][2]))


@pytest.mark.parametrize("spelling", ["hub", "memory", "shards"])
@pytest.mark.parametrize("name", ["mistral", "qwen"])
def test_all_spellings_of_a_checkpoint_load_alike(checkpoints, copied, name, spelling):
    folder, (_, reference, ours) = copied(name), checkpoints[name]
    if spelling == "shards":
        (folder / "model.safetensors").unlink()
        reference.save_pretrained(folder, max_shard_size="40KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
    else:
        tensors = reference.state_dict()
        if spelling == "hub":
            old = "language_model." * (name == "mistral") + "model.layers.0.self_attn.rotary_emb."
            tensors = {**model_llava.published_tensors(ours), old + "inv_freq": torch.zeros(4)}
        save_file({key: t.clone() for key, t in tensors.items()}, folder / "model.safetensors")
    for key, tensor in model_llava.load(folder, "cpu", "float32").state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[key]), key


EXPECTED_PROMPTS = {"vicuna": "<s>USER: <image>\n<image>\nHi ASSISTANT:",
                    "mistral": "<s>[INST] <image>\n<image>\nHi [/INST]",
                    "qwen": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
                            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
                            "<|vision_start|><|image_pad|><|vision_end|>Hi<|im_end|>\n"
                            "<|im_start|>assistant\n"}
EXPECTED_TURNS = {"vicuna": "</s>USER: So? ASSISTANT:", "mistral": "</s>[INST] So? [/INST]",
                  "qwen": "<|im_end|>\n<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n"}


@pytest.mark.parametrize("name", EXPECTED_PROMPTS)
def test_family_templates(checkpoints, name):
    processor = checkpoints[name][2].processor
    decode = processor.tokenizer.decode
    assert decode(processor.token_ids(2, "Hi")) == EXPECTED_PROMPTS[name]
    assert decode(processor.next_turn_ids(2, ["Hi", "Yes", "So?"])) == EXPECTED_TURNS[name]


def test_template_files_come_first_and_there_is_one_bos(copied):
    folder = copied("vicuna")
    template = ("{{ bos_token }}MARK{% for part in messages[0].content %}{% if part.type == 'image'"
                " %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}")
    for name, content in (
            ("json", json.dumps({"chat_template": template.replace("MARK", "json")})),
            ("jinja", template.replace("MARK", "jinja"))):
        (folder / f"chat_template.{name}").write_text(content)
        processor = model_llava.Processor(folder, model_llava.read_config(folder))
        assert processor.tokenizer.decode(processor.token_ids(1, "Hi")) == f"<s>{name}<image>Hi"


def test_an_answer_ends_at_any_end_token_of_the_generation_config(checkpoints, copied, monkeypatch):
    folder, ours = copied("vicuna"), checkpoints["vicuna"][2]
    assert ours.processor.end_tokens == {VOCABULARY["</s>"], VOCABULARY["<|im_end|>"]}
    (folder / "generation_config.json").unlink()
    assert model_llava.Processor(folder, ours.config).end_tokens == {VOCABULARY["</s>"]}
    arguments = ours, [picture(40, 40)], "Go", "full"
    tokens = sparsemm.generate(*arguments, max_new_tokens=9)["token_ids"]
    monkeypatch.setattr(ours.processor, "end_tokens", {tokens[3], 0})
    result = sparsemm.generate(*arguments, max_new_tokens=9)
    assert result["token_ids"] == tokens[:tokens.index(tokens[3]) + 1]


def brightest_token(model, image, x, y):
    """The grid token whose pixels change most if this one of a black image is painted white, found
    by running the image processor."""
    def values(picture):
        processed = model.processor.image_processor(picture, return_tensors="pt")["pixel_values"]
        return processed[0] if processed.dim() == 5 else processed
    black = Image.new("RGB", (image.size[1], image.size[0]))
    painted = black.copy()
    painted.putpixel((x, y), (255, 255, 255))
    difference = (values(painted) - values(black)).abs()
    if model.config.family == "qwen2_vl":
        return int(difference.view(-1, 4 * difference.shape[1]).sum(1).argmax())
    s, patch = model.side, model.config.vision.patch_size
    _, rows, columns = model.tile_grid(image.size)
    tiles = difference[1:].sum(1).view(rows, columns, s, patch, s, patch).sum((3, 5))
    plane = tiles.transpose(1, 2).reshape(rows * s, columns * s)
    r, c = divmod(int(plane.argmax()), columns * s)
    down, across = model_llava.unpadded(rows * s, columns * s, image.size)
    if down.start <= r < down.stop and across.start <= c < across.stop:     # else: cut away
        return s * s + (r - down.start) * (image.grid[1] + 1) + c - across.start


@pytest.mark.parametrize("size", [(50, 40), (130, 30), (25, 99), (61, 61)])
@pytest.mark.parametrize("name", ["vicuna", "qwen"])
def test_boxes_say_which_pixels_a_token_shows(checkpoints, name, size):
    """A pixel painted white is brightest in the token whose box it lies in, but for borders, where
    either neighbour will do."""
    ours, rng = checkpoints[name][2], random.Random(3)
    image = prepare(ours, [Image.new("RGB", size)], "Hi").images[0]
    for _ in range(25):
        x, y = rng.randrange(size[0]), rng.randrange(size[1])
        centre = torch.tensor([x + 0.5, y + 0.5], dtype=torch.float64)
        inside = ((image.boxes[:, :2] <= centre).all(1) & (centre < image.boxes[:, 2:]).all(1)
                  & (image.kinds == GRID))
        if inside.any() and (image.boxes[inside].view(-1, 2, 2) - centre).abs().min() >= 1.0:
            assert brightest_token(ours, image, x, y) == int(inside.nonzero()[0, 0])


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
def test_shipped_weights_are_those_of_the_model_card(name):
    card = (HERE / "tiny" / "README.md").read_text()
    card = dict(re.findall(r"\| `([\w-]+)` \| `(\w{64})` \|", card))
    weights = (HERE / "tiny" / name / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == card[name]
    files = [path for path in (HERE / "tiny" / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s["prompt"])
@pytest.mark.parametrize("name", TINY)
def test_sample_questions_are_answered_from_a_cache_that_evicts(tiny, name, sample):
    c, image = tiny[name].config, open_image(HERE / "tiny" / sample["image"])
    result = sparsemm.generate(tiny[name], [image], sample["prompt"],
                               head_scores=sparsemm.find_head_scores(tiny[name], None))
    assert result["text"] == sample["answer"]
    assert (sum(map(sum, result["kept"])) == 256 * c.layers * c.kv_heads
            < result["prompt_tokens"] * c.layers * c.kv_heads)


@pytest.mark.parametrize("name", TINY)
def test_shipped_model_writes_what_transformers_writes(tiny, name):
    ours, sample = tiny[name], SAMPLES[0]
    reference = REFERENCES[ours.config.family].from_pretrained(ours.folder, dtype=torch.float32)
    images = [open_image(HERE / "tiny" / sample["image"])]
    prompt = prepare(ours, images, sample["prompt"])
    with torch.inference_mode():
        logits = ours.logits(ours.hidden_states(prompt))
    assert (logits - reference_logits(reference, ours, prompt, images)).abs().max() < 1e-3
    result = sparsemm.generate(ours, images, sample["prompt"], "full", max_new_tokens=24)
    assert result["token_ids"] == reference_tokens(reference, ours, prompt, images, 24)


# ---- the command ---------------------------------------------------------------------------------

def test_a_small_model_says_what_it_was_not_taught(capfd):
    for prompt, noted in (("Rope?", False), ("Describe the picture.", True)):
        _, err = run(capfd, "--image", HERE / "tiny" / "receipt.png", "--prompt", prompt)
        assert ("this small model knows" in err) == noted


RESULT_KEYS = {"text", "token_ids", "prompt_tokens", "image_tokens", "method", "budget", "kept",
               "cache_bytes", "full_cache_bytes", "allocated_bytes", "prefill_seconds",
               "decode_seconds", "new_tokens"}


def run(capfd, *argv):
    """(stdout, stderr) of the command."""
    capfd.readouterr()
    sparsemm.main([str(a) for a in argv])
    return capfd.readouterr()


def test_command_answers(capfd, monkeypatch):
    """And the whole answer is out before the report, also where stdout is buffered."""
    sample, out = SAMPLES[0], io.BytesIO()
    arguments = "--image", HERE / "tiny" / sample["image"], "--prompt", sample["prompt"]
    answer, err = run(capfd, *arguments)
    assert answer == sample["answer"] + "\n" and "evicted" in err and "ms per token" in err
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out))
    monkeypatch.setattr(sparsemm, "report", lambda result, model: out.getvalue().decode())
    assert run(capfd, *arguments)[1] == sample["answer"] + "\n\n"


def test_command_json(checkpoints, capfd, tmp_path):
    folder, _, ours = checkpoints["mistral"]
    images = [picture(50, 70), picture(30, 30)]
    for name, image in zip("ab", images):
        image.save(tmp_path / f"{name}.png")
    result = json.loads(run(
        capfd, "--model", folder, "--image", tmp_path / "a.png", tmp_path / "b.png", "--prompt",
        "Hi", "--method", "snapkv", "--budget", 40, "--max-new-tokens", 5, "--json")[0])
    ids, entry_bytes = prepare(ours, images, "Hi").ids, 2 * 8 * 4
    assert set(result) == RESULT_KEYS and result["kept"] == [[40] * 2] * 2
    assert result["cache_bytes"] == 160 * entry_bytes
    assert result["full_cache_bytes"] == 2 * 2 * len(ids) * entry_bytes
    assert result["prompt_tokens"] == len(ids)
    assert result["image_tokens"] == int((ids == VOCABULARY["<image>"]).sum())
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
    assert set(first) == set(second) == RESULT_KEYS and second["kept"][0][0] > 40
    fresh = json.loads(run(capfd, *arguments, "--json", "--fresh")[0])["runs"]
    assert fresh[0]["token_ids"] == first["token_ids"] and fresh[1]["kept"] == [[40] * 2] * 3


def test_command_compares_every_method(checkpoints, capfd, tmp_path):
    picture(50, 70).save(tmp_path / "a.png")
    arguments = ("--model", checkpoints["vicuna"][0], "--image", tmp_path / "a.png", "--prompt",
                 "Hi", "--budget", 40, "--max-new-tokens", 3, "--compare")
    lines = {line.split()[0]: line for line in run(capfd, *arguments)[0].splitlines()[1:]}
    assert [name for name in METHODS if "skipped" in lines[name]] == ["sparsemm", "shuffled"]
    score_heads.write_scores([torch.rand(3, 4, dtype=torch.float64)], tmp_path / "scores.json")
    out, _ = run(capfd, *arguments, "--json", "--scores", tmp_path / "scores.json")
    runs = json.loads(out)["runs"]
    assert [r["method"] for r in runs] == list(METHODS)
    assert {sum(map(sum, r["kept"])) for r in runs[1:]} == {40 * 3 * 4}


SCRIPTS = ("cache", "model_llava", "sparsemm", "score_heads")


def alone(checkpoints, folder):
    """The four scripts and tiny/ in a folder without experiments/: imports and every command, which
    takes nothing of transformers' models."""
    for name in SCRIPTS:
        shutil.copy(HERE / f"{name}.py", folder)
    (folder / "tiny").symlink_to(HERE / "tiny")
    (folder / "blocked.py").write_text(
        "import re, sys\n"
        "class Block:\n"
        "    def find_spec(name, *_):\n"
        "        if re.match('transformers.models.*modeling_', name): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block)\n")
    annotated(folder)
    return ["-c", f"""if True:
        import os, subprocess, sys
        os.chdir({str(folder)!r})
        run = lambda *command: subprocess.run([sys.executable, *command], check=True)
        run("-c", "import {', '.join(SCRIPTS)}")
        run("-c", "import blocked, sparsemm, sys; sparsemm.main(sys.argv[1:])",
            "--image", "tiny/receipt.png", "--prompt", "What is the Total?")
        run("cache.py")
        run("score_heads.py", "--data", "data.json", "--num", "2", "--transcript", "truth",
            "--out", "s.json")
        """]


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
    while free := [name for name in imports if not imports[name] & imports.keys()]:
        for name in free:
            del imports[name]
    assert not imports                                              # who imports one another


def test_links_of_the_readme_point_at_what_they_name():
    links = re.findall(r"\[`([^`]+)`\]\(([\w./]+\.py)#L(\d+)[-L\d]*\)",
                       (HERE / "README.md").read_text())
    if not links:
        pytest.skip("README.md has no links to lines")
    for name, file, number in links:
        line = (HERE / file).read_text().splitlines()[int(number) - 1]
        last = re.escape(name.removesuffix("()").split(".")[-1])
        assert re.match(rf"\s*((def|class) {last}\b|(self\.)?{last}\b.*[=:])", line), (name, line)


# ---- bad input -----------------------------------------------------------------------------------

def rejected(capfd, *argv, main=sparsemm.main):
    """The one line on stderr of a command that ends with status 2 and says nothing on stdout."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in argv])
    out, err = capfd.readouterr()
    assert (end.value.code, out, err.count("\n"), err[-1:]) == (2, "", 1, "\n"), err
    return err


@pytest.mark.parametrize("arguments, expected", [
    (["--prompt", " \t"], ["--prompt", "' \\t' is empty"]),
    (["--prompt", "a <|image_pad|> b"], ["prompt", "<|image_pad|>"]),
    (["--prompt", "a \udcff"], ["udcff"]),
    (["--budget", 31], ["budget", "31", "32"]), (["--budget", "many"], ["--budget", "many"]),
    (["--rho", "nan"], ["rho", "nan", "0 and 1"]), (["--max-new-tokens", 0], ["new_tokens", "0"]),
    (["--device", "gpu"], ["device", "gpu", "cuda"]), (["--device", "cuda:99"], ["device", "99"]),
    (["--image", "none.png"], ["--image", "none.png", "no such file"]),
    (["--image", __file__], ["--image", __file__, "not a picture"]),
    (["--show-heads", "a.txt"], ["a.txt", ".png"]), (["--show-heads", "a.png"], ["one --image"]),
    (["--show-heads", "none/a.png"], ["--show-heads", "none/a.png", "cannot be written"]),
    (["--show-heads", "tiny/a.png", "--image", "tiny/../tiny/a.png"], ["named twice"]),
    (["--seed", -1, "--method", "snapkv"], ["seed", "-1"]), (["--seed", "1e30"], ["seed", "1e30"]),
    (["--model", "no/such/folder"], ["no/such/folder", "no such folder"]),
    (["--scores", "a", "--method", "snapkv"], ["--scores", "no effect"]),
    (["--fresh"], ["--fresh", "no effect"]), (["--show-token", 1], ["--show-token", "no effect"]),
])
def test_bad_arguments(capfd, arguments, expected):
    line = rejected(capfd, "--prompt", "Hi", *arguments)
    assert all(word in line for word in expected), line


@pytest.mark.parametrize("script, argument, value", [
    ("score_heads", "--heatmap", "heads.bmp"), ("score_heads", "--out", "none/scores.json"),
    ("score_heads", "--num", 10**30), ("score_heads", "--width", 31),
    ("score_heads", "--data", ""), ("score_heads", "--data", "/dev/zero"),
    ("score_heads", "--data", "file"), ("cache", "--scores", "none"), ("cache", "--scores", "file"),
    ("cache", "--kv-heads", 3), ("cache", "--budget", "few"), ("cache", "--window", 257)])
def test_scripts_refuse_in_one_line_before_any_work(capfd, monkeypatch, tmp_path, script, argument,
                                                    value):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("no JSON")
    main = {"score_heads": score_heads, "cache": cache}[script].main
    line = rejected(capfd, argument, value, main=main)
    assert argument.strip("-") in line and str(value) in line
    assert [path.name for path in Path().iterdir()] == ["file"]


@beside(lambda checkpoints, folder: [HERE / "sparsemm.py", "--model", "someone/some-model",
                                     "--prompt", "Hi"],
        HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_CACHE="/nonexistent")
def test_hub_without_network(done):
    """In a process of its own: nothing, not even a library's warning, comes beside two lines."""
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 2 and done.stderr.count("someone/some-model") == 2


def ends(checkpoints, folder):
    """What the shell does to a command: closed pipes, a full disk, Ctrl-C, a terminal of ASCII."""
    (folder / "typed.py").write_text(
        "import sys, sparsemm\n"
        "def work(*_): raise KeyboardInterrupt\n"
        "if sys.argv[1] == 'stop': sparsemm.check_arguments = work\n"
        "else: sparsemm.per_token = lambda result: '\\u20ac'\n"
        "sparsemm.main(['--prompt', 'Hi', '--max-new-tokens', '1', '--method', 'snapkv'])\n")
    typed = f"PYTHONPATH={HERE} python {folder / 'typed.py'}"
    commands = ("python cache.py --help | true", "python cache.py | true", f"{typed} stop",
                "python cache.py >/dev/full", f"PYTHONIOENCODING=ascii {typed} go")
    return ["-c", f"""if True:
        import subprocess
        for command in {commands!r}:
            command = command.replace("python", {sys.executable!r}) + "; echo ${{PIPESTATUS[0]}}"
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
            print(done.stdout.splitlines()[-1], " ".join(done.stderr.split()))"""]


@beside(ends)
def test_shells_see_one_line_and_no_traceback(done):
    help_, pipe, stop, full, escaped = done.stdout.splitlines()
    assert help_.strip() in ("0", "141") and pipe.strip() in ("0", "141"), done
    assert full == "2 cache.py: error: [Errno 28] No space left on device"
    assert stop == "130 sparsemm.py: stopped"
    assert escaped.startswith("0 ") and "\\u20ac ms per token" in escaped
