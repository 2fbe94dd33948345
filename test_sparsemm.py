"""Facts about the method, each of which can fail. Everything is offline, on small random models and
the ones in tiny/.

    pytest test_sparsemm.py

Letters as in the scripts: L layers, H query heads, G KV heads, T prompt tokens, D head size, w
window.
"""

import hashlib
import importlib
import io
import json
import math
import os
import platform
import random
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
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
from cache import (METHODS, KVCache, allocate_budgets, fastv_length, fastv_survivors, make_method,
                   observation_scores, select_entries)
from experiments import draw, evaluate, metrics, miniatures, progress, sources
from experiments.arguments import DEFAULT_MODEL, as_typed, open_image
from experiments.drafts import continuation, write
from experiments.report import show

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)                   # enough for small models; processes run beside the tests
HERE = Path(__file__).parent
TINY = sorted(path.parent.name for path in (HERE / "tiny").glob("*/config.json"))
FLOORS = [(name, *floor) for name in TINY for floor in (
    ("form", (256, 128), 9), ("form", (256, 256), 8), ("receipt", (256, 256), 9),
    ("table", (256, 256), 9), ("form", (512, 512), 8))]           # page, pixels, right of ten
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


# ---- the forward pass ----------------------------------------------------------------------------

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
    assert {key: tuple(p.shape) for key, p in model.named_parameters()} == theirs


def test_published_tensor_names():
    """The hub's spelling, in which the two projects' tables could agree with each other and both be
    wrong."""
    with torch.device("meta"):
        llava = model_llava.LlavaNext(
            model_llava.convert_config(CHECKPOINTS["vicuna"](), "llava_next"))
        qwen = model_llava.Qwen2VL(model_llava.convert_config(CHECKPOINTS["qwen"](), "qwen2_vl"))
    assert {"image_newline", "language_model.lm_head.weight",
            "language_model.model.embed_tokens.weight",
            "language_model.model.layers.0.self_attn.q_proj.weight",
            "multi_modal_projector.linear_1.bias",
            "vision_tower.vision_model.embeddings.class_embedding",
            "vision_tower.vision_model.pre_layrnorm.weight"} <= set(llava.state_dict())
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias",
            "model.norm.weight", "visual.blocks.0.attn.qkv.weight", "visual.merger.ln_q.weight",
            "visual.merger.mlp.2.bias", "visual.patch_embed.proj.weight"} <= set(qwen.state_dict())


@pytest.mark.parametrize("name", ["mistral", "qwen"])
def test_all_spellings_of_a_checkpoint_load_alike(checkpoints, tmp_path, name):
    folder, reference, ours = checkpoints[name]
    spellings = {"hub": {key: t.clone() for key, t in ours.state_dict().items()},
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


# ---- prompts -------------------------------------------------------------------------------------

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


# ---- what every image token shows ----------------------------------------------------------------

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


@pytest.mark.parametrize("change", [
    dict(budget=31), dict(window=0), dict(rho=1.5), dict(rho=math.nan),
    dict(scores=torch.zeros(2, 2)), dict(scores=-torch.ones(2, 2)), dict(length=0),
    dict(scores=torch.tensor([[math.nan, 1]])), dict(length=[5, 5, 5])])
def test_allocate_budgets_rejects(change):
    with pytest.raises(ValueError):
        allocate_budgets(**{**dict(scores=torch.ones(2, 2), budget=64, length=100), **change})


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
    scores = torch.rand(4, 6)
    for name in METHODS[1:]:
        method = make_method(name, 4, 3, 90, budget=50, scores=scores)
        total = sum(int(method.budgets(l, method.rank(q, k, 32)).sum()) for l in range(4))
        assert total == 4 * 3 * 50, name


def test_random_and_shuffled_are_drawn_once_from_the_seed():
    scores = torch.rand(4, 6, dtype=torch.float64) ** 4
    for name in ("random", "shuffled"):
        first, again, other = (cache.head_weights(name, 4, 3, scores, seed) for seed in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)
    visual = cache.kv_head_scores(scores, 3)
    assert torch.allclose(visual[:, 0],
                          scores[:, 0] + scores[:, 1])             # heads 0 and 1 share KV head 0
    assert torch.equal(cache.head_weights("shuffled", 4, 3, scores, 0).flatten().sort().values,
                       visual.flatten().sort().values)


# ---- selection -----------------------------------------------------------------------------------

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
def test_observation_scores_equal_brute_force(H, G, T, D, w, kernel):
    torch.manual_seed(T)
    q, k = torch.randn(H, T, D), torch.randn(G, T, D)
    assert torch.allclose(observation_scores(q, k, w, kernel),
                          brute_force_observation(q, k, w, kernel), atol=1e-6)


def test_observation_of_a_prompt_within_the_window_is_empty():
    assert observation_scores(torch.randn(4, 10, 8), torch.randn(2, 10, 8),
                              window=32).shape == (2, 0)


def test_observation_scores_are_float32_for_half_precision():
    assert observation_scores(torch.randn(2, 40, 8).bfloat16(),
                              torch.randn(2, 40, 8).bfloat16()).dtype == torch.float32


def test_select_entries():
    assert select_entries(torch.tensor([0.1, 0.9, 0.3, 0.9, 0.3]), 3).tolist() == \
        [1, 2, 3]                                                      # tie at 0.3: the lower
    assert select_entries(torch.zeros(6), 4).tolist() == [0, 1, 2, 3]
    assert select_entries(torch.rand(5), 0).tolist() == []
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        scores = torch.randint(0, 6, (30,), generator=generator).float()
        n = int(torch.randint(0, 31, (1,), generator=generator))
        expected = sorted(sorted(range(30), key=lambda i: (-scores[i].item(), i))[:n])
        assert select_entries(scores, n).tolist() == expected


def test_window_keeps_the_last_and_streaming_the_first_four_too():
    q, k = torch.randn(2, 60, 8), torch.randn(2, 60, 8)
    kept = {}
    for name in ("window", "streaming"):
        method = make_method(name, 1, 2, 60, budget=40, window=8)
        scores = method.rank(q, k, 8)
        kept[name] = select_entries(scores[0], 32).tolist() + list(range(52, 60))
    assert kept["window"] == list(range(20, 60))
    assert kept["streaming"] == [0, 1, 2, 3] + list(range(24, 60))


# ---- the cache -----------------------------------------------------------------------------------

def test_cache_holds_what_it_keeps_and_appending_moves_nothing():
    torch.manual_seed(0)
    G, T, D, w = 2, 30, 4, 5
    q, k, v = torch.randn(4, T, D), torch.randn(G, T, D), torch.randn(G, T, D)
    held = KVCache(make_method("snapkv", 1, G, T, budget=12, window=w), w, reserve=3)
    held.compress(0, q, k, v)
    scores = observation_scores(q, k, w)
    pointers = [[t.data_ptr() for t in head] for head in held[0]]
    new = []
    for step in range(3):
        for g in range(G):
            keep = select_entries(scores[g], 12 - w)
            selected_k, recent_k, selected_v, recent_v = held[0][g]
            assert torch.equal(selected_k, k[g, keep]) and torch.equal(selected_v, v[g, keep])
            assert torch.equal(recent_k, torch.cat([k[g, -w:], *(a[g] for a, _ in new)]))
            assert torch.equal(recent_v, torch.cat([v[g, -w:], *(b[g] for _, b in new)]))
        assert held.kept == [[12 + step] * G]
        assert held.num_bytes() == 2 * D * 4 * G * (12 + step)
        new.append((torch.randn(G, 1, D), torch.randn(G, 1, D)))
        held.append(0, *new[-1])
        assert [[t.data_ptr() for t in head] for head in held[0]] == pointers
    with pytest.raises(ValueError, match="reserve"):
        held.append(0, *new[0])


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
    pointers = [layer.packed_k.data_ptr() for layer in talk.cache.layers]
    second = talk.ask("So?")
    assert [layer.packed_k.data_ptr() for layer in talk.cache.layers] == pointers
    appended = second["prompt_tokens"] - first["prompt_tokens"]
    assert second["kept"] == [[n + appended for n in layer] for layer in first["kept"]]
    fresh = sparsemm.Conversation(ours, images, **settings, fresh=True)
    again = fresh.ask("What is it?"), fresh.ask("So?")
    assert again[0]["token_ids"] == first["token_ids"]
    assert again[1]["prompt_tokens"] == second["prompt_tokens"]
    assert again[1]["kept"] == [[40] * 2] * 3
    anew = sparsemm.Conversation(ours, images, **settings)
    anew.inputs = replace(fresh.inputs, ids=fresh.inputs.ids[:second["prompt_tokens"]],
                          positions=fresh.inputs.positions[:, :second["prompt_tokens"]])
    with torch.inference_mode():
        assert anew.prefill().argmax() == again[1]["token_ids"][0]


@pytest.mark.parametrize("name", ["vicuna", "mistral", "qwen"])
def test_fastv_hides_the_image_tokens_that_the_last_query_looks_at_least(checkpoints, monkeypatch,
                                                                         name):
    """Which ones: by transformers' attention maps. What then: full attention under a mask that
    hides them from layer K on."""
    _, reference, ours = checkpoints[name]
    K, share, images = 1, 0.4, [picture(60, 50)]
    prompt = model_llava.prepare(ours, images, "What is it?")
    image, T = prompt.ids == ours.config.image_token, len(prompt.ids)
    inputs = dict(ours.processor.image_processor(images, return_tensors="pt"))
    if name == "qwen":
        inputs["mm_token_type_ids"] = image.int()[None]
    with torch.no_grad():
        maps = reference(input_ids=prompt.ids[None], output_attentions=True, **inputs).attentions
    looked_at = maps[K - 1][0, :, -1].mean(0)
    stays = looked_at >= looked_at[image].sort(descending=True).values[
        round(share * int(image.sum())) - 1]
    left = (stays | ~image).nonzero()[:, 0]
    chosen = []

    def survivors(q, k):
        chosen.append(fastv_survivors(q, k, image, share))
        return chosen[0]

    with torch.inference_mode():
        hidden = ours.hidden_states(prompt, drop=(K - 1, survivors))
    assert chosen[0].tolist() == left.tolist()
    assert len(left) == fastv_length(image, share) == len(hidden) < T

    calls = []

    def hiding(q, k, v):
        calls.append(0)
        seen = torch.ones(T, T, dtype=torch.bool).tril()
        if len(calls) > K:
            seen[:, ~(stays | ~image)] = False
            seen |= torch.eye(T, dtype=torch.bool)                  # rows that nobody will read
        return torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=seen, enable_gqa=True)[0]

    monkeypatch.setattr(model_llava, "fast_prefill_attention", hiding)
    with torch.inference_mode():
        expected = ours.hidden_states(prompt)[left]
    assert (hidden - expected).abs().max() < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_fastv_leaves_its_layers_less_to_share(checkpoints, method):
    ours, images = checkpoints["qwen"][2], [picture(90, 120)]
    c, scores = ours.config, torch.rand(3, 6, dtype=torch.float64)
    prompt = model_llava.prepare(ours, images, "What is it?")
    T, left = len(prompt.ids), fastv_length(prompt.ids == c.image_token, 0.25)
    for budget in (40, 150, 10000):
        result = sparsemm.generate(ours, images, "What is it?", method, budget, scores=scores,
                                   max_new_tokens=3, fastv=(1, 0.25))
        kept = result["kept"]
        assert max(kept[0]) <= T and max(map(max, kept[1:])) <= left
        if method in ("full", "sparsemm", "shuffled", "random"):
            most = (T + 2 * left) * c.kv_heads
            assert sum(map(sum, kept)) == min(most, (10000 if method == "full" else budget) * 6)
    assert kept == [[T] * 2, [left] * 2, [left] * 2]
    with pytest.raises(ValueError, match="fastv"):
        sparsemm.Conversation(ours, images, fastv=(3, 0.25))


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
    arguments = dict(images=[picture(60, 60)], prompt="What?", max_new_tokens=6, scores=scores)
    full = sparsemm.generate(ours, method="full", **arguments)
    T = full["prompt_tokens"]
    for budget in (T, T + 100):
        result = sparsemm.generate(ours, method=method, budget=budget, **arguments)
        assert (result["token_ids"], result["kept"]) == (full["token_ids"], full["kept"])
        assert result["cache_bytes"] == full["cache_bytes"] == full["full_cache_bytes"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("method", METHODS)
def test_cuda_equals_cpu(checkpoints, method):
    for name in ("vicuna", "mistral", "qwen"):
        folder, _, ours = checkpoints[name]
        there = model_llava.load(folder, "cuda", "float32")
        arguments = dict(images=[picture(64, 50)], prompt="What is it?", method=method, budget=40,
                         scores=torch.ones(ours.config.layers, ours.config.heads).cumsum(1),
                         max_new_tokens=6)
        results = [sparsemm.generate(model, **arguments) for model in (ours, there)]
        assert results[0]["token_ids"] == results[1]["token_ids"]
        assert results[0]["kept"] == results[1]["kept"]


def decode_logits(model, prompt, tokens, held, fixed=False):
    """Logits (len(tokens), vocabulary) while `tokens` are forced after a prefill into the cache
    `held`; fixed: with the shapes of a CUDA graph."""
    logits, first = [], int(prompt.positions.max()) + 1
    with torch.inference_mode():
        model.hidden_states(prompt, held)
        if fixed:
            held.fix_shapes()
        for i, token in enumerate(tokens):
            logits.append(model.decode(token, first + i, held))
            if fixed:
                held.column += 1
    return torch.stack(logits)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vicuna", "qwen"])
@pytest.mark.parametrize("how", ["loop", "products", "fixed shapes"])
def test_evicted_decode_equals_masked_attention(checkpoints, monkeypatch, name, method, how):
    """transformers' full attention, with a mask that hides from the new tokens what each head has
    dropped; for the loop over heads, the fast products, and these over the whole tail."""
    _, reference, ours = checkpoints[name]
    c, images, tokens, w = ours.config, [picture(64, 50)], [40, 41, 60, 33, 70], 6
    prompt = model_llava.prepare(ours, images, "What is it?")
    T, n = len(prompt.ids), len(tokens)
    selections = []
    monkeypatch.setattr(
        cache, "select_entries",
        lambda scores, k: selections.append(select_entries(scores, k)) or selections[-1])
    plan = make_method(method, c.layers, c.kv_heads, T, budget=20, window=w,
                       scores=torch.rand(c.layers, c.heads))
    logits = decode_logits(ours, prompt, tokens, KVCache(plan, w, n, how == "loop"),
                           how == "fixed shapes")
    if method != "full":
        assert sum(map(len, selections)) == (20 - w) * c.layers * c.kv_heads

    def mask(layer):
        seen = torch.ones(T + n, T + n).tril().bool().repeat(c.heads, 1, 1)
        for h in range(c.heads):
            dropped = torch.ones(T, dtype=torch.bool)
            dropped[T - w:] = False
            dropped[selections[layer * c.kv_heads + h * c.kv_heads // c.heads]] = False
            seen[h, T:, :T] &= ~dropped
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


@pytest.mark.parametrize("H, G", [(4, 4), (6, 2), (5, 1)])
def test_fast_attention_equals_the_loop_for_ragged_and_empty_heads(H, G):
    """Also for heads that hold nothing but the window, and while the tail grows."""
    torch.manual_seed(0)
    T, D, w = 50, 8, 4
    k, v = torch.randn(G, T, D), torch.randn(G, T, D)
    for lengths in ([0] * G, [7] * G, [(13 * g) % 40 for g in range(1, G + 1)]):
        selected = [torch.randperm(T - w)[:n].sort().values for n in lengths]
        layer = cache.LayerCache(k, v, selected, w, reserve=3)
        for _ in range(3):
            layer.append(torch.randn(G, 1, D), torch.randn(G, 1, D))
            q = torch.randn(H, 1, D)
            expected = model_llava.decode_attention(q, layer.heads())
            assert (layer.attend(q) - expected).abs().max() < 1e-5


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""
    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_prefill_memory_does_not_grow_with_the_square_of_the_prompt(checkpoints):
    ours = checkpoints["qwen"][2]
    c = ours.config
    largest = []
    for T in (1000, 2000):
        prompt = model_llava.Prompt(torch.randint(0, 90, (T,)), torch.arange(T).expand(3, -1),
                                    [], [], [])
        with LargestTensor() as seen, torch.no_grad():
            ours.hidden_states(prompt, KVCache(make_method("snapkv", c.layers, c.kv_heads, T), 32))
        largest.append(seen.elements)
    assert largest[1] <= 2.05 * largest[0] and largest[1] < 2000 * 2000 / 4
    # and what the fused kernel uses inside: one head over 12,000 tokens, whose square would take
    # 576 MB in float32
    for attention in (model_llava.prefill_attention, model_llava.fast_prefill_attention):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        attention(*(torch.randn(1, 12000, 8) for _ in range(3)))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000     # kilobytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("H, G", [(4, 4), (6, 2), (5, 1)])
def test_fast_prefill_equals_the_loop_and_copies_no_keys(monkeypatch, H, G, dtype):
    torch.manual_seed(0)
    T, D = 300, 16
    q, k, v = (torch.randn(T, n, D).to(dtype).transpose(0, 1) for n in (H, G, G))   # as projected
    expected = model_llava.prefill_attention(q, k, v)
    calls, attention = [], torch.nn.functional.scaled_dot_product_attention

    def recorded(*heads, **options):
        calls.append([x.untyped_storage().data_ptr() for x in heads])
        return attention(*heads, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    out = model_llava.fast_prefill_attention(q, k, v)
    assert out.shape == (H, T, D)
    assert torch.allclose(out, expected, atol=1e-6 if dtype == torch.float32 else 1e-2)
    assert calls == [[x.untyped_storage().data_ptr() for x in (q, k, v)]]    # one, and no copies


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

    def read(model, prompt, reading):
        T = len(prompt.ids)
        k = torch.eye(T).expand(c.kv_heads, T, T)
        for layer in range(c.layers):
            q = torch.zeros(c.heads, T, T)
            q[:, :, elsewhere] = 1
            for i, target in enumerate(targets):
                if planted[0] == layer:
                    q[planted[1], reading.first + i] = 0
                    q[planted[1], reading.first + i, target] = 1
            reading.compress(layer, q, k, k)

    monkeypatch.setattr(score_heads, "read", read)


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


def full_transcript(ours, images, limit):
    """Prompt, and the tokens that decoding one by one with a full cache writes, end token left out;
    and whether it came."""
    ids = sparsemm.generate(ours, images, score_heads.OCR_PROMPT, "full",
                            max_new_tokens=limit)["token_ids"]
    plain = [token for token in ids if token not in ours.processor.end_tokens]
    return model_llava.prepare(ours, images, score_heads.OCR_PROMPT), plain, len(plain) < len(ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_logits_have_the_precision_of_float32(dtype):
    """Whatever units compute them, the arg-max is not that of numbers rounded to bfloat16."""
    torch.manual_seed(0)
    q, k = torch.randn(4, 40, 64).to(dtype), torch.randn(2, 300, 64).to(dtype)
    expected = q.double() @ k.double().repeat_interleave(2, 0).transpose(1, 2)
    seen = torch.ones(40, 300, dtype=torch.bool).tril(300 - 40)
    logits = score_heads.attention_logits(q, k)
    assert logits.dtype == torch.float32 and (logits[:, ~seen] == -torch.inf).all()
    assert (logits - expected)[:, seen].abs().max() < 1e-4


@pytest.mark.parametrize("rows", [8, 64])
def test_one_pass_equals_step_by_step(checkpoints, monkeypatch, rows):
    """The hits of one pass over a transcript are those seen while it is decoded token by token,
    however many rows are looked at at once."""
    monkeypatch.setattr(score_heads, "PEAK_ROWS", rows)
    ours = checkpoints["mistral"][2]
    prompt, ids, _ = full_transcript(ours, [picture(70, 50)], 20)
    first = len(prompt.ids) - 1
    reading = score_heads.Reading(first)
    with torch.inference_mode():
        ours.hidden_states(prompt.extended(ids), reading)
        for i in range(len(ids) + 1):
            step = score_heads.Reading(first + i)
            ours.hidden_states(prompt.extended(ids[:i]), step)
            assert torch.equal(step.peaks()[:, :, 0], reading.peaks()[:, :, i])


@pytest.mark.parametrize("name", ["vicuna", "mistral", "qwen"])
def test_a_draft_changes_nothing_but_the_number_of_passes(checkpoints, name, monkeypatch):
    """What the model writes by itself is what decoding token by token gives, whatever the draft
    says, and so is what it looks at; a draft that says the same is accepted whole."""
    ours, images, limit = checkpoints[name][2], [picture(70, 50), picture(40, 90)], 100
    prompt, plain, ended = full_transcript(ours, images, limit)
    first, rng = len(prompt.ids) - 1, random.Random(0)
    whole = score_heads.Reading(first)
    with torch.inference_mode():
        ours.hidden_states(prompt.extended(plain), whole)
    wrong = [token if rng.random() < 0.7 else rng.randrange(ours.config.vocabulary)
             for token in plain]
    missing = [token for token in plain if rng.random() < 0.7]
    passes, cut = [], score_heads.Reading.cut
    monkeypatch.setattr(score_heads.Reading, "cut", lambda *args: (passes.append(1), cut(*args)))
    end = min(ours.processor.end_tokens)
    for draft in ([], plain, wrong, missing, plain[20:], plain * 2, [5] * 100, [end, *plain, end]):
        passes.clear()
        reading = score_heads.Reading(first, limit)
        assert plain == write(ours, prompt, reading, draft, limit)
        n = len(plain)
        assert torch.equal(reading.peaks()[:, :, :n], whole.peaks()[:, :, :n])
        if draft == plain:                                  # guesses of 32, 64 and 4 tokens, say
            assert len(passes) == 1 + (n + ended > 33) + (n + ended > 33 + 65)


def test_a_transcript_must_fit_the_sliding_window(checkpoints, monkeypatch):
    ours, image = checkpoints["mistral"][2], picture(70, 50)
    T = len(model_llava.prepare(ours, [image], score_heads.OCR_PROMPT).ids)
    monkeypatch.setattr(ours, "config", replace(ours.config, max_tokens=T + 3))
    score_heads.score_transcript(ours, [image], [[]], [1, 2, 3])
    for ids, own in (([1, 2, 3, 4], False), ([], True)):
        with pytest.raises(ValueError, match="sliding window"):
            score_heads.score_transcript(ours, [image], [[]], ids, own=own)


def test_a_draft_goes_on_behind_what_was_written_last():
    assert continuation([1, 2, 3, 4, 5], []) == [1, 2, 3, 4, 5]
    assert continuation([1, 2, 3, 4, 5], [1, 2]) == [3, 4, 5]
    assert continuation([1, 2, 3, 4, 5], [1, 9]) == [3, 4, 5]         # a wrong token: its place
    assert continuation([1, 2, 3, 4, 5], [1, 2, 4]) == [5]            # one left out
    assert continuation([1, 2, 3, 1, 2, 4], [1, 2, 3, 1, 2]) == [4]   # the nearer of two places
    assert continuation([1, 2, 3], [1, 2, 3, 4, 5]) == []
    assert continuation([], [1]) == []


def score(folder, out, *more):
    score_heads.main(["--model", str(folder), "--width", "64", "--height", "48", "--out", str(out),
                      "--transcript", "truth", *map(str, more)])
    return out.read_text()


def test_a_resumed_run_equals_an_uninterrupted_one(checkpoints, monkeypatch, tmp_path, capsys):
    folder = checkpoints["qwen"][0]
    whole = score(folder, tmp_path / "whole.json", "--num", 25)
    real, calls = score_heads.score_transcript, []

    def dies(*arguments, **more):
        calls.append(1)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    monkeypatch.setattr(score_heads, "score_transcript", dies)
    with pytest.raises(KeyboardInterrupt):
        score(folder, tmp_path / "cut.json", "--num", 25)
    assert not (tmp_path / "cut.json").exists()
    with pytest.raises(SystemExit):                                  # other settings: not mixed up
        score(folder, tmp_path / "cut.json", "--num", 25, "--resume", "--seed", 1)
    assert score(folder, tmp_path / "cut.json", "--num", 25, "--resume") == whole
    assert len(calls) == 14 + 15                                     # ten pages had been saved
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "cut.about.json", "cut.json", "whole.about.json", "whole.json"]
    about = json.loads((tmp_path / "whole.about.json").read_text())
    assert about["pages"] == 25 and about["tokens"] > 25 and about["hits"] > 0


def test_several_pages_in_one_prompt(checkpoints):
    pages = sources.Rendered(("form", "sign"), 0, (64, 48), 5)
    sets = sources.Sets(pages, 2)
    assert len(sets) == 3 and len(sets[2][0]) == 1
    images, words, text = sets[1]
    assert list(words) == [pages[2][1], pages[3][1]] and [i.size for i in images] == [(64, 48)] * 2
    assert text == pages[2][2] + "\n" + pages[3][2]


@beside(lambda checkpoints, folder: two_ranks(
    "score_heads.py", "--model", checkpoints["qwen"][0], "--width", "64", "--height", "48",
    "--transcript", "truth", "--num", "7", "--out", folder / "two.json"))
def test_two_processes_equal_one(checkpoints, done, tmp_path):
    one = score(checkpoints["qwen"][0], tmp_path / "one.json", "--num", 7)
    assert done.returncode == 0, done.stderr
    assert (done.folder / "two.json").read_text() == one


def test_gathering_leaves_no_process_group(monkeypatch):
    """One that is left can abort Python's end: so did 4 of 12 pairs of processes."""
    assert progress.gather("own") == ["own"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in dict(TORCHELASTIC_RUN_ID="a", MASTER_ADDR="localhost", MASTER_PORT=port,
                            RANK=0, WORLD_SIZE=1, LOCAL_RANK=0).items():
        monkeypatch.setenv(name, str(value))
    assert progress.rank_and_ranks(SimpleNamespace(device="cpu")) == (0, 1)
    assert progress.gather("own") == ["own"]
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


def test_summary_by_hand(tmp_path):
    s = torch.tensor([[0.7, 0.1], [0.2, 0.0]], dtype=torch.float64)
    assert draw.top_share(s, 0.05) == (1, pytest.approx(0.7))
    assert draw.top_share(s, 0.5) == (2, pytest.approx(0.9))
    # sorted 0, .1, .2, .7: 2 * (0*1 + .1*2 + .2*3 + .7*4) / 4 - 5/4
    assert draw.gini(s) == pytest.approx(2 * 3.6 / 4 - 1.25)
    assert draw.gini(torch.ones(3, 3)) == pytest.approx(0, abs=1e-6)
    text = draw.summary(s)
    assert "0     0  70.00%" in text and "|@.|" in text and "|: |" in text


def test_pictures(checkpoints, tmp_path):
    from experiments import draw
    for L, H in ((32, 32), (28, 28), (8, 8)):
        draw.heat_map(torch.rand(L, H) ** 6, tmp_path / "map.png")
        assert Image.open(tmp_path / "map.png").width > 16 * H
    ours = checkpoints["vicuna"][2]
    scores = torch.rand(ours.config.layers, ours.config.heads)
    draw.show_heads(ours, picture(90, 60), "Hi", scores, tmp_path / "a.png", token=1)
    text = draw.show_heads(ours, picture(90, 60), "Hi", scores, tmp_path / "a.gif")
    assert Image.open(tmp_path / "a.gif").n_frames > 1 and isinstance(text, str)


def test_score_files(tmp_path):
    per_page = [torch.rand(3, 4, dtype=torch.float64) for _ in range(5)]
    score_heads.write_scores(per_page, tmp_path / "s.json")
    expected = sum(per_page) / sum(per_page).sum()
    assert torch.allclose(cache.read_head_scores(tmp_path / "s.json", 3, 4), expected, atol=1e-8)
    table = json.loads((tmp_path / "s.json").read_text())
    (tmp_path / "s.json").write_text(
        json.dumps(dict(sorted(table.items(), reverse=True))))         # order is no matter
    assert torch.allclose(cache.read_head_scores(tmp_path / "s.json", 3, 4), expected, atol=1e-8)


def test_the_scoring_benchmark_lets_each_procedure_take_the_numbers_that_suit_it():
    from experiments.bench import scoring_table
    row = dict(pages="letters", transcript="truth", tokens=9, times_faster=3, differ=0)
    results = [dict(model="tiny", dtype=dtype, num=1, rows=[dict(
        row, images_per_second=ours, step_by_step_images_per_second=theirs)])
        for dtype, ours, theirs in (("float32", 6, 2), ("bfloat16", 9, 1))]
    assert scoring_table(results).endswith("* tiny, letters, truth: 9.00 / 2.00 = 4.5")
    assert scoring_table(results[:1]).endswith("| letters | truth | 9 | 6.00 | 2.00 | 3.0 | 0.0% |")


# ---- the shipped model ---------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["qwen2-vl", "llava-next"])
def test_training_sees_what_the_command_sees(tmp_path, name):
    """An untrained model of each layout, saved as training saves it: pixels, the number of image
    tokens and which cell of the page each of them shows are those of our own loader, and the logits
    of every conversation about the page, with training's own attention and patch embedding, are
    those that ours gives for that conversation alone."""
    from experiments import train_tiny
    layout = train_tiny.LAYOUTS[name]
    torch.manual_seed(0)
    reference = layout.model_class(layout.config()).eval()
    train_tiny.save_checkpoint_folder(layout, reference, tmp_path)
    ours = model_llava.load(tmp_path, "cpu", "float32")
    reference.load_state_dict({key: p.bfloat16().float()
                               for key, p in reference.state_dict().items()})
    stage = train_tiny.Stage("test", "language", ((256, 128),), 1, 1, 0, 0, ("form",))
    batch, labels = train_tiny.make_batch(layout, stage, random.Random(1))
    page = train_tiny.render_page(_replayed(random.Random(1), stage), "form", 256, 128)
    prompt = model_llava.prepare(ours, [page.image], "What?")
    processed = ours.processor.image_processor(page.image, return_tensors="pt")
    values = layout.pixel_values(**batch["images"])
    assert (processed["pixel_values"] - values).abs().max() < 1e-5
    image = prompt.images[0]
    assert len(image) == (batch["input_ids"][0] == train_tiny.IMAGE).sum()
    shown = labels[labels[:, 0] != train_tiny.IGNORE, :-1]
    boxes = image.boxes[image.kinds == model_llava.GRID]
    cells = train_tiny.cell_characters(train_tiny.enlarged(page, layout.zoom))
    labels_of_boxes = [cells[tuple(round(layout.zoom * x / 16) for x in (y0, x0))].tolist()
                       for x0, y0, *_ in boxes.tolist()]
    assert sorted(labels_of_boxes) == sorted(shown.tolist()) and shown.any()
    if name == "qwen2-vl":                       # LLaVA's labels come tile by tile, not row by row
        assert labels_of_boxes == shown.tolist()
    reference.set_attn_implementation("products")
    train_tiny.as_matrix_product(layout.patch_embedding(reference))
    with torch.inference_mode():
        expected = reference(inputs_embeds=train_tiny.embed(layout, reference, batch), **{
            key: batch[key] for key in ("position_ids", "prefix", "conversations")}).logits[0]
    assert batch["conversations"] > 1
    prefix, *_ = ids = list(batch["input_ids"][0].tensor_split([batch["prefix"]]))
    expected = expected.tensor_split([batch["prefix"]])
    for said, logits in zip(*(x[1].chunk(batch["conversations"]) for x in (ids, expected))):
        alone = prompt.extended([])
        alone.ids = torch.cat([prefix, said])
        alone.starts = [int((alone.ids == train_tiny.IMAGE).nonzero()[0])]
        alone.positions = ours.positions(len(alone.ids), alone.images, alone.starts)
        with torch.inference_mode():
            got = ours.logits(ours.hidden_states(alone))
        assert (got - torch.cat([expected[0], logits])).abs().max() < 1e-4


def test_pages_of_fields_have_their_values_below_or_behind_the_keys():
    from experiments.pages import render_page
    below = 0
    for seed in range(20):
        page = render_page(random.Random(seed), "fields", 256, 128)
        words = {word.text.rstrip(":"): (i, word.box) for i, line in enumerate(page.lines)
                 for word in line}
        assert page.questions
        for key, value in page.questions:
            (row, box), (row_of_value, box_of_value) = words[key], words[value]
            assert row_of_value in (row, row + 1)
            below += row_of_value > row
            # the ink of a letter begins up to two pixels behind where it is drawn
            assert (abs(box[0] - box_of_value[0]) <= 3) == (row_of_value > row)
    assert below > 40


@pytest.mark.parametrize("kind", ["form", "fields", "table", "letter", "shapes"])
def test_conversations_in_training_ask_what_the_page_answers(kind):
    """Every turn is a question about the page and its right answer, none comes twice, and the loss
    is on the answers and their ends alone."""
    from experiments import train_tiny
    from experiments.pages import prompt as wording, tasks
    stage = train_tiny.Stage("test", "language", ((256, 256),), 1, 1, 0, 0)
    letters = {i: c for c, i in train_tiny.VOCABULARY.items()}
    for seed in range(5):
        page = train_tiny.render_page(random.Random(seed), kind, 256, 256)
        possible = {wording(None, *task[:2]): task[2] for task in tasks(page)}
        (ids, *_), = train_tiny.conversations(stage, random.Random(seed), page, transcribe=True)
        assert page.text in "".join(map(letters.get, ids))
        said, asked = train_tiny.conversations(stage, random.Random(seed), page, False), []
        assert 0 < len(said) <= stage.conversations
        for ids, labels, _ in said:
            text = "".join(map(letters.get, ids))
            turns = [turn.removeprefix("<|im_start|>") for turn in text.split("<|im_end|>")]
            assert turns.pop() == "" and text.count("<|im_start|>") == len(turns) / 2 - 1
            assert len(ids) <= train_tiny.LONGEST or len(turns) == 2
            asked += turns[::2]
            for question, answer in zip(turns[::2], turns[1::2]):
                assert possible[question] == answer
            learnt = "".join(letters[i] for i in labels if i != train_tiny.IGNORE)
            assert learnt == "".join(answer + "<|im_end|>" for answer in turns[1::2])
            assert all(label in (i, train_tiny.IGNORE) for i, label in zip(ids, labels))
        assert len(set(asked)) == len(asked)


def test_training_asks_for_far_lines_more_often():
    """As often as successive draws in which each line that is left counts once, each far one three
    times."""
    from experiments import train_tiny
    from experiments.pages import tasks
    stage = train_tiny.Stage("test", "language", ((512, 512),), 1, 1, 0, 0, conversations=30)
    page = train_tiny.render_page(random.Random(0), "letter", 512, 512)
    weights = {int(about): 3 if int(about) > 12 else 1 for task, about, _ in tasks(page)
               if task == "line"}
    letters = {i: c for c, i in train_tiny.VOCABULARY.items()}
    ours = theirs = 0
    for seed in range(400):
        said = train_tiny.conversations(stage, random.Random(seed), page, transcribe=False)
        text = "".join(letters[i] for ids, *_ in said for i in ids)
        asked = {int(n) for n in re.findall(r"What does line (\d+) say", text)}
        assert len(asked) == 14 < len(weights)
        ours += sum(weights[number] == 3 for number in asked)
        left, rng = dict(weights), random.Random(seed)
        for _ in range(14):
            theirs += left.pop(rng.choices([*left], left.values())[0]) == 3
    assert abs(ours - theirs) / 400 < 0.2
    all_alike = 14 * 10 / 22                               # ten of the page's 22 lines are far
    assert ours / 400 > all_alike + 1


@pytest.mark.parametrize("transcribe", [True, False])
@pytest.mark.parametrize("kind", ["form", "table", "letter", "shapes"])
def test_hints_in_training_name_what_the_next_character_belongs_to(kind, transcribe):
    """Its line or shape, or what the question says; where no character of an answer is to be
    written, nothing."""
    from experiments import train_tiny
    stage = train_tiny.Stage("test", "language", ((256, 256),), 1, 1, 0, 0)
    letters, found = {i: c for c, i in train_tiny.VOCABULARY.items()}, set()
    for seed in range(5):
        page = train_tiny.render_page(random.Random(seed), kind, 256, 256)
        for ids, labels, hints in train_tiny.conversations(stage, random.Random(seed), page,
                                                           transcribe):
            turns, said = "".join(map(letters.get, ids)).split("<|im_end|>"), ""
            expected = []
            for question, answer in zip(turns[::2], turns[1::2]):
                question = question.removeprefix("<|im_start|>")
                column = item = line = train_tiny.IGNORE
                if question.startswith("What is the ") and kind == "table":
                    column, item = question[len("What is the "):-1].split(" of ")
                    column, item = train_tiny.HINTS.index(column), train_tiny.ITEMS.index(item)
                asked = len(question) + (said != "")                  # with its <|im_start|>
                expected += [train_tiny.NO_HINTS] * asked
                for written in range(len(answer) + 1):
                    if question.startswith("What does line "):
                        line = int(question[len("What does line "):-len(" say?")]) - 1
                    elif transcribe:
                        line = answer[:written].count("\n")
                    elif kind == "shapes":
                        line = train_tiny.LINES.index("shape 1") + answer[:written].count(",")
                    expected.append((column, item, line))
                expected.append(train_tiny.NO_HINTS)
                said += answer
            assert hints == expected
            found |= set(hints)
    assert len(found) > 3


@pytest.mark.parametrize("kind", ["table", "shapes", "form"])
@pytest.mark.parametrize("name", TINY)
def test_hints_in_training_name_what_an_image_token_shows(tiny, name, kind):
    """An image token whose middle lies in a word is hinted with its line, in a table's cell also
    with column and item, in a coloured shape with the shape; one that touches nothing is not; where
    tokens are, our own loader says."""
    from experiments import train_tiny
    stage = train_tiny.Stage("test", "language", ((256, 256),), 1, 1, 0, 0, (kind,))
    batch, _ = train_tiny.make_batch(train_tiny.LAYOUTS[name], stage, random.Random(5))
    page = train_tiny.render_page(_replayed(random.Random(5), stage), kind, 256, 256)
    things = {thing.box: (train_tiny.HINTS.index(thing.text), train_tiny.IGNORE,
                          train_tiny.LINES.index(f"shape {i}"))
              for i, thing in enumerate(page.objects, 1)}
    for i, line in enumerate(page.lines):
        things |= {word.box: (train_tiny.IGNORE, train_tiny.IGNORE, i) for word in line}
        if kind == "table" and i:
            things |= {word.box: (train_tiny.HINTS.index(column.text),
                                  train_tiny.ITEMS.index(line[0].text), i)
                       for column, word in zip(page.lines[0][1:], line[1:])}
    image = model_llava.prepare(tiny[name], [page.image], "What?").images[0]
    hints = batch["hints"][0][batch["input_ids"][0] == train_tiny.IMAGE].tolist()
    found = set()
    for hint, box, of_grid in zip(hints, image.boxes, image.kinds == model_llava.GRID, strict=True):
        (x0, y0, x1, y1), hint = box.tolist(), tuple(hint)
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        inside = {of for (a, b, c, d), of in things.items() if a < x < c and b < y < d}
        touched = any(a < x1 and x0 < c and b < y1 and y0 < d for a, b, c, d in things)
        if of_grid and inside:
            assert {hint} == inside
            found.add(hint)
        elif not of_grid or not touched:
            assert hint == train_tiny.NO_HINTS
    assert len(found) >= {"table": 6, "shapes": 1, "form": 2}[kind]
    unhinted, _ = train_tiny.make_batch(train_tiny.LAYOUTS[name], replace(stage, hinted=0),
                                        random.Random(5))
    assert (unhinted.pop("hints") == train_tiny.IGNORE).all()
    assert all(torch.equal(batch[key], x) for key, x in unhinted.items() if torch.is_tensor(x))


def test_training_on_large_pages():
    """A batch has fewer of them, but one at least; of a page's many lines the first are hinted."""
    from experiments import pages, train_tiny
    layout = train_tiny.LAYOUTS["qwen2-vl"]
    for size, drawn in (((64, 32), 4), ((64, 64), 4), ((128, 64), 2), ((256, 256), 1)):
        stage = train_tiny.Stage("read", "language", (size,), 4, 1, 0, 0,
                                 batch_pixels=4 * 64 * 64)
        batch, _ = train_tiny.make_batch(layout, stage, random.Random(0))
        assert len(batch["input_ids"]) == len(batch["images"]["pages"]) == drawn
    page = pages.Page(Image.new("RGB", (32, 640)),
                      [[pages.Word("1", (0, 16 * i, 16, 16 * i + 16), ())] for i in range(40)])
    lines = train_tiny.cell_hints(page)[:, 0, 2].tolist()
    assert [train_tiny.LINES[i] for i in lines[:28]] == [str(i) for i in range(1, 29)]
    assert lines[28:] == [train_tiny.IGNORE] * 12


@pytest.mark.parametrize("share, found", [(0, {False}), (0.5, {False, True}), (1, {True})])
def test_training_on_batches_of_nothing_but_shapes(share, found):
    """They have twice as many pages, of which none is transcribed."""
    from experiments import train_tiny
    layout = train_tiny.LAYOUTS["qwen2-vl"]
    stage = train_tiny.Stage("read", "language", ((96, 96),), 2, 1, 0, 0, transcripts=1,
                             shapes_alone=share)
    drawn = set()
    for seed in range(12):
        pages, only_shapes = train_tiny.draw_pages(stage, random.Random(seed))
        drawn.add(only_shapes)
        assert len(pages) == (4 if only_shapes else 2)
        assert not only_shapes or all(page.objects for page in pages)
        batch, _ = train_tiny.make_batch(layout, stage, random.Random(seed))
        for page, labels in zip(pages, batch["labels"]):
            learnt = [i for i in labels.tolist() if i != train_tiny.IGNORE][:-1]
            shapes = ", ".join(thing.text for thing in page.objects)
            written = shapes if only_shapes else page.text
            assert learnt == [train_tiny.VOCABULARY[c] for c in written]
    assert drawn == found


@pytest.mark.parametrize("block", [3, 4, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_training_has_the_gradients_of_its_definition(causal, block, monkeypatch):
    from experiments import train_tiny
    monkeypatch.setattr(train_tiny, "BLOCK", block)
    (B, H, N, T, D), made = (3, 2, 4, 7, 5), []
    for attend in (train_tiny.BlockByBlock.apply, train_tiny.fused_attention, None):
        torch.manual_seed(1)
        q, k, v = (torch.randn(B, H, n, D, dtype=torch.float64, requires_grad=True)
                   for n in (N, T, T))
        future = torch.ones(N, T, dtype=torch.bool).triu(T - N + 1) & causal
        out = (attend(q, k, v, causal) if attend else
               (q @ k.mT).masked_fill(future, -torch.inf).softmax(-1) @ v)
        out.pow(3).sum().backward()
        made.append((out, q.grad, k.grad, v.grad))
    assert all(torch.allclose(x, expected, atol=1e-12) for one in made[:-1]
               for x, expected in zip(one, made[-1]))


def test_muon_in_training_is_torchs():
    """The same steps, up to the rounding of bfloat16; a matrix without a gradient stands still."""
    from experiments.train_tiny import Muon
    made, shapes = [], ((8, 24), (8, 24), (24, 8), (8, 8), (8, 24))
    for kind in (Muon, torch.optim.Muon):
        torch.manual_seed(0)
        matrices = [torch.randn(shape, requires_grad=True) for shape in shapes]
        target = [torch.randn(shape) for shape in shapes]
        optimizer = kind([dict(params=matrices[:2]), dict(params=matrices[2:], lr=0.02)], lr=0.01,
                         weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        begun = [x.detach().clone() for x in matrices]
        for _ in range(4):
            optimizer.zero_grad()
            sum(((x - t) ** 4).sum() for x, t in zip(matrices[:-1], target)).backward()
            optimizer.step()
        made.append([x.detach() for x in matrices])
    assert torch.equal(made[0][-1], begun[-1])
    for ours, theirs, before in zip(*made, begun[:-1]):
        assert (ours - theirs).norm() < 0.02 * (theirs - before).norm()


def test_training_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    """Same weights, bit by bit; and the vision tower stands still in steps that are not its own."""
    from experiments import train_tiny
    stage = partial(train_tiny.Stage, sizes=((64, 32),), batch=2, rate=1e-2, end_rate=1e-3)
    monkeypatch.setitem(train_tiny.STAGES, "qwen2-vl", (
        stage("see", "vision", steps=2), stage("read", "language", steps=3, vision_every=2)))
    args = SimpleNamespace(seed=0, device="cpu", layout="qwen2-vl", teacher=None, workers=0,
                           fonts=(), report=100, work=tmp_path, out=tmp_path / "whole",
                           average=[], dtype="bfloat16")

    def trained(args, killed_at=None):
        """Every state that training saves, which it does after every step here."""
        states, save = [], train_tiny.Trainer.save
        def spy(trainer, every=0):
            if (trainer.stage, trainer.step) == killed_at:
                raise KeyboardInterrupt
            save(trainer, 0)
            states.append({name: p.clone() for name, p in trainer.model.state_dict().items()})
        with monkeypatch.context() as patch:
            patch.setattr(train_tiny.Trainer, "save", spy)
            train_tiny.Trainer(args).run()
        return states

    whole = trained(args)
    moved = [any(not torch.equal(before[name], after[name]) for name in before if "visual" in name)
             for before, after in zip(whole, whole[1:])]
    assert moved == [True, False, True, False, True, False]      # False also where a stage ends
    again = SimpleNamespace(**vars(args) | dict(work=tmp_path / "again", out=tmp_path / "other"))
    again.work.mkdir()
    for killed_at in ((0, 2), (1, 1)):
        with pytest.raises(KeyboardInterrupt):
            trained(again, killed_at)
    last = trained(again)[-1]
    assert all(torch.equal(last[name], p) for name, p in whole[-1].items())
    assert ((tmp_path / "other" / "model.safetensors").read_bytes()
            == (tmp_path / "whole" / "model.safetensors").read_bytes())


@pytest.fixture
def three_checkpoints(tmp_path, monkeypatch):
    """Three random ones in tmp_path, for a training of one short stage: (layout, stage, args)."""
    from experiments import train_tiny
    layout = train_tiny.LAYOUTS["qwen2-vl"]
    stage = train_tiny.Stage("read", "language", ((64, 32),), 2, 1, 1e-3, 1e-3)
    monkeypatch.setitem(train_tiny.STAGES, "qwen2-vl", (stage,))
    for name in ("one", "other", "third"):
        train_tiny.save_checkpoint_folder(layout, layout.model_class(layout.config()),
                                          tmp_path / name)
    return layout, stage, SimpleNamespace(seed=0, device="cpu", layout="qwen2-vl", teacher=None,
                                          work=tmp_path, out=tmp_path / "mean", average=[],
                                          dtype="float32", workers=0, fonts=())


def test_training_exports_the_mean_of_models(three_checkpoints, tmp_path):
    from experiments import train_tiny
    layout, _, args = three_checkpoints
    args.average = [tmp_path / "other", tmp_path / "third"]
    trainer = train_tiny.Trainer(args)
    trainer.model = layout.model_class.from_pretrained(tmp_path / "one", dtype=torch.float32)
    trainer.export()
    *parts, mean = (load_file(tmp_path / name / "model.safetensors")
                    for name in ("one", "other", "third", "mean"))
    assert mean.keys() == parts[0].keys()
    for name, x in mean.items():
        exact = sum(part[name].double() for part in parts) / 3
        assert ((x - exact).abs() <= exact.abs() / 256 + 1e-8).all()                # bfloat16
        assert x.ndim < 2 or not torch.equal(x, parts[0][name])


def test_training_that_starts_from_weights(three_checkpoints, tmp_path):
    """The layers that name characters and hints learn before the model does; and once a state is
    saved, it goes on from that, as the same command given again must."""
    from experiments import train_tiny
    layout, stage, args = three_checkpoints
    trainer = train_tiny.Trainer(args)
    seeing = replace(stage, step="vision")
    naming = replace(stage, hinted=100)             # so that the loss is mostly that of the hints
    batches = [train_tiny.make_batch(layout, part, random.Random(0))
               for part in (seeing, naming)]

    def losses():
        return [trainer.loss(*batch, part)[0].item()
                for batch, part in zip(batches, (seeing, naming))]

    one = layout.model_class.from_pretrained(tmp_path / "one", dtype=torch.float32)
    trainer.model.load_state_dict(one.state_dict())
    before = losses()
    trainer.start_from(tmp_path / "one", "read")
    after = losses()
    assert after[0] < before[0] - 1 and after[1] < before[1] - 10
    assert all(map(torch.equal, one.parameters(), trainer.model.parameters()))
    trainer.step = 1
    trainer.save(every=0)
    again = train_tiny.Trainer(args)
    again.start_from(tmp_path / "other", "read")
    assert again.step == 1
    assert all(map(torch.equal, one.parameters(), again.model.parameters()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_computes_in_the_dtype_that_was_asked_for(three_checkpoints, dtype):
    """Matrix products; the weights stay float32."""
    from experiments import train_tiny
    layout, stage, args = three_checkpoints
    args.dtype = dtype
    trainer = train_tiny.Trainer(args)
    trainer.loss(*train_tiny.make_batch(layout, stage, random.Random(0)), stage)
    assert trainer.image_tokens.dtype == getattr(torch, dtype)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_pages_in_other_fonts(tiny, monkeypatch, tmp_path, capsys):
    """The built-in font's own file gives the same evaluation; --fonts reaches the training."""
    from experiments import evaluate_tiny, train_tiny
    fonts = tmp_path / "fonts" / "family"
    fonts.mkdir(parents=True)
    for name in ("a.ttf", "b.ttf"):
        (fonts / name).write_bytes(ImageFont.load_default(16).font_bytes)
    monkeypatch.setattr(evaluate_tiny, "load", lambda *arguments: tiny[TINY[0]])
    about = []
    for more in ((), ("--fonts", str(fonts.parent))):
        evaluate_tiny.main(["--num", "2", "--kinds", "form", "--sizes", "96x48", *more,
                            "--out", str(tmp_path / "evaluation.json")])
        about.append(json.loads((tmp_path / "evaluation.json").read_text()))
    assert about[0]["results"] == about[1]["results"]
    assert about[1]["fonts"] == ["a.ttf", "b.ttf"] != about[0]["fonts"]
    assert "--fonts" in about[1]["command"] and "--fonts" not in about[0]["command"]

    seen = []
    monkeypatch.setattr(train_tiny, "Trainer", lambda args: seen.extend(args.fonts) or
                        SimpleNamespace(run=lambda: None))
    train_tiny.main(["--fonts", str(fonts.parent), "--work", str(tmp_path), "--out", str(tmp_path),
                     "--threads", str(torch.get_num_threads())])
    assert [Path(font).name for font in seen] == ["a.ttf", "b.ttf"]


def test_training_draws_a_stages_share_of_pages_in_other_fonts(monkeypatch):
    from experiments import train_tiny
    drawn, render_page = [], train_tiny.render_page
    def page(rng, kind, width, height, fonts, **options):
        drawn.append(fonts)
        return render_page(rng, kind, width, height, **options)
    monkeypatch.setattr(train_tiny, "render_page", page)
    for share, fonts in ((0, ["a", "b"]), (0.25, ["a", "b"]), (1, ["a", "b"]), (1, ())):
        stage = train_tiny.Stage("see", "vision", ((96, 48),), 200, 1, 1, 1, in_fonts=share)
        drawn.clear()
        train_tiny.make_batch(train_tiny.LAYOUTS["qwen2-vl"], stage, random.Random(0), fonts)
        assert len(drawn) == drawn.count(fonts) + drawn.count((None,)) == 200
        assert abs(drawn.count(fonts) / 200 - share * bool(fonts)) < 0.08


@pytest.mark.parametrize("option", ["--start-from", "--average", "--teacher"])
def test_training_from_what_is_no_checkpoint_of_the_layout_takes_one_line(tmp_path, capsys, option):
    from experiments import train_tiny
    (tmp_path / "empty").mkdir()
    other = HERE / "tiny" / ("llava-next" if option == "--teacher" else "qwen2-vl")
    for folder in (tmp_path / "none", tmp_path / "empty", other):
        with pytest.raises(SystemExit) as end:
            train_tiny.main(["--layout", "llava-next", option, str(folder), "--work", str(tmp_path),
                             "--threads", str(torch.get_num_threads())])
        error = capsys.readouterr().err
        assert end.value.code == 2
        assert error.count("\n") == 1 and option in error and str(folder) in error


def test_the_second_small_model_learns_from_the_first(tmp_path, monkeypatch):
    """Which of the teacher's image tokens shows the same cell; whose heads and neurons the decoder
    starts with: query head h has the keys and values that it had in its group."""
    from experiments import train_tiny
    trainer = train_tiny.Trainer(SimpleNamespace(
        seed=0, device="cpu", work=tmp_path, layout="llava-next", average=[],
        dtype="bfloat16", teacher=HERE / "tiny" / "qwen2-vl"))
    stage = train_tiny.Stage("test", "vision", ((256, 128),), 2, 1, 0, 0, ("form",))
    first = train_tiny.LAYOUTS["qwen2-vl"]
    monkeypatch.setattr(first, "zoom", trainer.layout.zoom)
    batch, labels = train_tiny.make_batch(trainer.layout, stage, random.Random(1), teacher=first)
    _, theirs = train_tiny.make_batch(first, stage, random.Random(1))
    shown = batch["same_cell"] >= 0
    assert shown.sum() == 2 * 20 * 10 and labels.any()
    assert torch.equal(labels[shown], theirs[batch["same_cell"][shown]])
    with torch.no_grad():
        together = trainer.loss(batch, labels, stage)[0]
        own = trainer.image_tokens.flatten(0, 1)[shown]
        taught = trainer.teachers_tokens[batch["same_cell"][shown]].float()
        apart = trainer.loss({"images": batch["images"]}, labels, stage)[0]
        unlike = (own - taught).square().mean() / trainer.teachers_tokens.float().var(0).mean()
    assert together - apart == pytest.approx(unlike.item(), rel=1e-3)

    trainer.adopt_decoder()
    for to, source in zip(trainer.model.model.language_model.layers,
                          trainer.teacher.model.language_model.layers):
        assert torch.equal(to.self_attn.q_proj.weight, source.self_attn.q_proj.weight)
        for own, taught in ((to.self_attn.k_proj, source.self_attn.k_proj),
                            (to.self_attn.v_proj, source.self_attn.v_proj)):
            own, taught = (p.weight.view(-1, 32, 256) for p in (own, taught))
            assert all(torch.equal(own[h], taught[h // 2]) for h in range(8))
        neurons = {tuple(gate): (up, down) for gate, up, down in zip(
            source.mlp.gate_proj.weight.tolist(), source.mlp.up_proj.weight.tolist(),
            source.mlp.down_proj.weight.T.tolist())}
        for gate, up, down in zip(to.mlp.gate_proj.weight.tolist(), to.mlp.up_proj.weight.tolist(),
                                  to.mlp.down_proj.weight.T.tolist()):
            assert neurons[tuple(gate)] == (up, down)


def _replayed(rng, stage):
    """The generator as make_batch hands it to the renderer of its first page."""
    rng.choice(stage.sizes), rng.choice(stage.kinds)
    return rng


@pytest.mark.parametrize("name", TINY)
def test_fast_decode_writes_what_the_loop_over_heads_writes_in_bfloat16(monkeypatch, name):
    model = model_llava.load(HERE / "tiny" / name, "cpu", "bfloat16")
    for sample in SAMPLES[::3]:
        written = []
        for by_head in (False, True):
            monkeypatch.setattr(sparsemm, "KVCache", partial(KVCache, by_head=by_head))
            written.append(sparsemm.generate(
                model, [open_image(HERE / "tiny" / sample["image"])], sample["prompt"], budget=128,
                scores=sparsemm.find_scores(model, None))["token_ids"])
        assert written[0] == written[1]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s["prompt"])
@pytest.mark.parametrize("name", TINY)
def test_sample_questions_are_answered_from_a_cache_that_evicts(tiny, name, sample):
    model = tiny[name]
    image = open_image(HERE / "tiny" / sample["image"])
    result = sparsemm.generate(model, [image], sample["prompt"],
                               scores=sparsemm.find_scores(model, None))
    c = model.config
    assert result["text"] == sample["answer"]
    assert (sum(map(sum, result["kept"])) == 256 * c.layers * c.kv_heads
            < result["prompt_tokens"] * c.layers * c.kv_heads)


@pytest.mark.parametrize("name", TINY)
def test_a_page_that_is_read_once_is_answered_as_if_each_question_were_alone(tiny, name):
    from experiments.evaluate_tiny import answers
    samples, image = SAMPLES[:2], open_image(HERE / "tiny" / SAMPLES[0]["image"])
    assert {sample["image"] for sample in samples} == {SAMPLES[0]["image"]}
    texts, image_tokens = answers(tiny[name], image, [
        (sample["prompt"], right) for sample in samples for right in (sample["answer"], "wrong")])
    alone = [sparsemm.generate(tiny[name], [image], sample["prompt"], method="full")
             for sample in samples]
    assert texts == [result["text"] for result in alone for _ in (0, 1)]
    assert image_tokens == model_llava.prepare(tiny[name], [image], "What?").image_tokens


@pytest.mark.parametrize("name", TINY)
def test_shipped_weights_are_those_of_the_model_card(tiny, name):
    """Loading is strict, so that `tiny` holds exactly the tensors of the file."""
    weights = HERE / "tiny" / name / "model.safetensors"
    checksum = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert f"| `{name}` | `{checksum}` |" in (HERE / "tiny" / "README.md").read_text()
    assert tiny[name].config.layers * tiny[name].config.heads >= 64
    assert sum(f.stat().st_size for f in weights.parent.iterdir()) <= 12_000_000


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


@pytest.mark.parametrize("name, kind, size, floor", FLOORS)
def test_new_pages_are_read(tiny, name, kind, size, floor):
    """One question each about pages that no training batch has drawn. The floor lies under the
    share that tiny/README.md states."""
    from experiments.pages import render_page
    right = 0
    for i in range(10):
        rng = random.Random(f"new page {i}")
        page = render_page(rng, kind, *size)
        key, value = rng.choice(page.questions)
        answer = sparsemm.generate(tiny[name], [page.image], f"What is the {key}?", "full")["text"]
        right += answer == value
    assert right >= floor


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
               "cache_bytes", "full_cache_bytes", "prefill_seconds", "decode_seconds",
               "new_tokens"}


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


def test_command_shows_heads(checkpoints, capfd, tmp_path):
    picture(50, 70).save(tmp_path / "a.png")
    score_heads.write_scores([torch.rand(2, 6, dtype=torch.float64)], tmp_path / "scores.json")
    run(capfd, "--model", checkpoints["mistral"][0], "--image", tmp_path / "a.png",
        "--prompt", "Hi", "--scores", tmp_path / "scores.json", "--max-new-tokens", 4,
        "--show-heads", tmp_path / "look.png", "--show-token", 2)
    assert Image.open(tmp_path / "look.png").width > 6 * 50


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
    (["--budget", 31], ["--budget", "31", "32"]),
    (["--budget", 0], ["--budget", "0"]),
    (["--budget", -5], ["--budget", "-5"]),
    (["--budget", "many"], ["--budget", "many"]),
    (["--window", 0], ["--window", "0", "1"]),
    (["--rho", 1.5], ["--rho", "1.5", "between 0 and 1"]),
    (["--rho", "nan"], ["--rho", "nan"]),
    (["--max-new-tokens", 0], ["--max-new-tokens", "0"]),
    (["--method", "best"], ["--method", "best", "snapkv"]),
    (["--dtype", "int8"], ["--dtype", "int8", "bfloat16"]),
    (["--device", "gpu"], ["--device", "gpu", "cuda"]),
    (["--image", "none.png"], ["--image", "none.png", "no such file"]),
    (["--image", "."], ["--image", ".", "not a file"]),
    (["--image", __file__], ["--image", __file__, "not a picture"]),
    (["--show-heads", "a.txt"], ["--show-heads", "a.txt", ".png"]),
    (["--show-heads", "a.png"], ["--show-heads", "one --image"]),
    (["--show-heads", "none/a.png"], ["--show-heads", "none/a.png", "exists"]),
    (["--model", "no/such/folder"], ["no/such/folder", "no such folder"]),
    (["--prompt", "a <|image_pad|> b"], ["prompt", "<|image_pad|>"]),
])
def test_bad_arguments(capfd, arguments, expected):
    line = rejected(capfd, "--prompt", "Hi", *arguments)
    assert all(word in line for word in expected), line


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there(capfd):
    assert "--device" in rejected(capfd, "--prompt", "Hi", "--device", "cuda")


def test_damaged_images(capfd, tmp_path):
    data = io.BytesIO()
    picture(300, 300).save(data, "PNG")
    (tmp_path / "cut.png").write_bytes(data.getvalue()[:5000])
    assert "cut.png" in rejected(capfd, "--prompt", "Hi", "--image", tmp_path / "cut.png")
    # the header of a PNG of 60,000 x 60,000 pixels
    bomb = bytearray(data.getvalue())
    bomb[16:24] = struct.pack(">II", 60000, 60000)
    import zlib
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
    assert "template" in broken("k", lambda copy: (copy / "chat_template.jinja").write_text("{% x"))
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
    """In a process of its own: nothing, not even a library's warning, comes before the one line."""
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "someone/some-model" in done.stderr


def test_a_window_larger_than_the_prompt_is_fine(checkpoints, capfd):
    out, _ = run(capfd, "--model", checkpoints["vicuna"][0], "--prompt", "Hi",
                 "--method", "snapkv", "--window", 500, "--budget", 500, "--max-new-tokens", 2,
                 "--json")
    result = json.loads(out)
    assert result["kept"] == [[result["prompt_tokens"]] * 4] * 3


@pytest.mark.parametrize("script, argument, value", [
    ("score_heads", "--heatmap", "heads.bmp"), ("score_heads", "--out", "none/scores.json"),
    ("evaluate_tiny", "--model", "none"), ("evaluate_tiny", "--num", 0),
    ("evaluate_tiny", "--out", "none/evaluation.json"), ("evaluate_tiny", "--sizes", "9x9"),
    ("evaluate_tiny", "--fonts", "none"), ("train_tiny", "--fonts", "broken"),
    ("train_tiny", "--work", "file/work"), ("train_tiny", "--out", "file"),
    ("train_tiny", "--device", "gpu"), ("train_tiny", "--threads", 0),
    ("train_tiny", "--workers", -1), ("train_tiny", "--report", 0),
    ("reproduce", "--out", "file/results"),
    ("bench scoring", "--model", "none"), ("bench scoring", "--num", 0),
    ("bench decode", "--lengths", 31), ("bench decode", "--budgets", "few"),
    ("bench decode", "--out", "none/bench.json"),
    ("pages", "--out", "page.bmp"), ("pages", "--width", 31),
    ("cache", "--scores", "none"), ("cache", "--scores", "broken/font.ttf"),
    ("cache", "--kv-heads", 3), ("cache", "--budget", "few"), ("cache", "--window", 257)])
def test_scripts_refuse_in_one_line(capfd, monkeypatch, tmp_path, script, argument, value):
    """And before they do any work."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("broken").mkdir()
    Path("broken", "font.ttf").write_text("no font")
    name, *part = script.split()
    folder = "" if name in ("cache", "score_heads") else "experiments."
    main = importlib.import_module(folder + name).main
    required = ["--out", "page.png"] if (name, argument) == ("pages", "--width") else []
    line = rejected(capfd, *part, argument, value, *required, main=main)
    assert argument.strip("-") in line and str(value) in line
    assert {path.name for path in Path().iterdir()} == {"file", "broken"}


# ---- the seven benchmarks ------------------------------------------------------------------------

@pytest.mark.parametrize("prediction, answers, expected", [
    ("hello", ["hello"], 1),
    ("  HELLO \n World", ["hello world"], 1),
    ("abcd", ["abxx"], 0.5),                                           # exactly 0.5 still counts
    ("abc", ["axx"], 0),                                               # 1/3 does not
    ("abcdefg", ["abcdxxx"], 4 / 7),
    ("abcd", ["zzzz", "abcx", "abxx"], 0.75),                          # the best answer
    ("", ["abc"], 0),
    ("", [""], 1),
    ("total 5", ["5"], 0),                                             # 1 - 6/7
])
def test_anls_by_hand(prediction, answers, expected):
    assert metrics.anls(prediction, answers) == pytest.approx(expected)


def test_ocrbench_containment():
    assert metrics.contains("It says OPEN now.", ["closed", "open"]) == 1
    assert metrics.contains("open", ["Open now"]) == 0                 # not the other way round
    assert metrics.contains("first\nsecond", ["First second"]) == 1
    assert metrics.contains("x ^ { 2 }", ["x^{2}"]) == 0
    assert metrics.contains("so x ^ {2} + 1", ["x ^{ 2\n}"], ignore_spaces=True) == 1
    assert metrics.contains("firstsecond", ["first second"]) == 0


@pytest.mark.parametrize("text, expected", [
    ("The Two dogs.", "2 dogs"), ("an apple", "apple"), ("None", "0"), ("ten", "10"),
    ("1,000", "1000"), ("$3.50", "$3.50"), ("U.S.A.", "usa"), ("is it?", "is it"),
    ("red-green", "red green"), ("red - green", "red green"), ("re-do - it", "redo it"),
    ("(yes)", "yes"), ("dont", "don't"), ("couldnt've", "couldn't've"), ("oclock", "o'clock"),
    ("what's up", "what 's up"), (" two\nlines\there ", "2 lines here"), ("the", ""),
])
def test_vqa_answers_are_normalised_as_by_evalai(text, expected):
    assert metrics.normalise_answer(text) == expected


@pytest.mark.parametrize("matching, expected", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1),
                                                (10, 1)])
def test_vqa_accuracy_votes_among_nine_of_ten(matching, expected):
    """With 3 of 10: left-out answers that match see 2 others, 2/3; the seven others see 3, 1."""
    answers = ["The Red."] * matching + [f"blue {i}" for i in range(10 - matching)]
    assert metrics.vqa_accuracy("red", answers) == pytest.approx(expected)
    assert metrics.vqa_accuracy("RED!", answers) == pytest.approx(expected)


@pytest.mark.parametrize("prediction, answer, expected", [
    ("105", "100", 1), ("95", "100", 1), ("105.1", "100", 0), ("-95", "-100", 1), ("95", "-100", 0),
    ("5%", "0.05", 1), ("5%", "5", 0), ("5.2%", "5%", 1), ("0", "0", 1), ("0.0", "0", 0),
    ("0%", "0", 0), ("0.01", "0", 0), ("Yes", "yes", 1), ("yes ", "yes", 0), ("1,000", "1000", 0),
    ("1,000", "1,000", 1), ("ten", "10", 0), ("%", "%", 1), ("", "", 1),
])
def test_chartqa_relaxed_accuracy(prediction, answer, expected):
    assert metrics.relaxed_match(prediction, answer) == expected


@pytest.mark.parametrize("prediction, letter", [
    ("B", "B"), ("B.", "B"), ("(B)", "B"), ("B: dog", "B"), ("The answer is B.", "B"),
    ("b", None), ("E", None), ("", None), ("A or B", None), ("A. cat, B. dog", None),
    ("a dog", "B"), ("It is a DOG", "B"), ("cat and dog", None), ("A dog is in the picture", "B"),
    ("Ah, Bats", None),
])
def test_mmbench_choice_is_a_unique_letter_or_text(prediction, letter):
    assert metrics.choose(prediction, {"A": "cat", "B": "dog", "C": "cow"}) == letter


def test_mmbench_is_circular():
    indices = [7, 1_000_007, 2_000_007, 8, 1_000_008, 3_000_009]
    assert metrics.circular(indices, [1, 1, 1, 1, 0, 1]) == {7: 1, 8: 0, 9: 1}


def test_cider_by_hand():
    red, cat, cow = "a red dog runs fast", "the blue cat sleeps", "one cow eats"
    references = [[red], [cat], [cow]]
    # identical; the last has no 4-grams, which count 0
    assert metrics.cider([red.upper() + "!", cat, cow], references) == pytest.approx([10, 10, 7.5])
    assert metrics.cider([cat, cow, red], references) == [0, 0, 0]                     # disjoint
    assert metrics.cider([red], [[red]]) == [0]                      # one image: ln 1 - ln 1 = 0
    assert metrics.cider(["", cat], [[red], [cat]]) == pytest.approx([0, 10])
    # "a" is common to both images and weighs 0, "dog" weighs ln 2; bigrams: none against one
    two = [["a dog"], ["a cat"]]
    assert metrics.cider(["dog", "cat"], two) == pytest.approx([10 / 4 * math.exp(-1 / 72)] * 2)
    # 2 ln 2 is clipped to ln 2: ln 2 * ln 2 / (2 ln 2 * ln 2) = 1/2; no bigram in common
    assert metrics.cider(["dog dog", ""], two) == pytest.approx([10 / 4 / 2, 0])
    # the mean over references: the other one shares nothing
    assert metrics.cider(["dog", ""], [["a dog", "a cow"], ["a cat"]]) == \
        pytest.approx([10 / 4 / 2 * math.exp(-1 / 72), 0])
    assert metrics.tokenize("It's 3.50, a co-op.") == ["it", "'s", "3.50", "a", "co-op"]


ASKED = {"docvqa": (32, "\nAnswer the question using a single word or phrase."),
         "ocrbench": (128, ""),
         "textvqa": (32, "\nAnswer the question using a single word or phrase."),
         "chartqa": (16, "\nAnswer the question with a single word."),
         "textcaps": (64, "Provide a one-sentence caption for the provided image."),
         "mmbench": (1024, "\n\nAnswer with the option's letter from the given choices directly."),
         "vqav2": (16, "\nAnswer the question using a single word or phrase.")}
HIGHEST = {"textcaps": lambda score: 2 < score <= 10, "textvqa": lambda score: score >= 0.9,
           "vqav2": lambda score: score >= 0.9}


def evaluate_on(capfd, *argv):
    """What the command prints."""
    capfd.readouterr()
    evaluate.main([str(a) for a in argv])
    return capfd.readouterr().out


@pytest.mark.parametrize("task", evaluate.TASKS)
def test_right_answers_get_the_highest_score(tiny, monkeypatch, capfd, tmp_path, task):
    """From a miniature's file to the table, with a model that knows the answers."""
    data = miniatures.make_miniature(task, tmp_path, 4)
    assert "miniature" in data.name and "miniature" in data.parent.name
    rows, asked = evaluate.read_rows(data), []

    def knows(model, images, prompt, method, budget, **more):
        answers = evaluate.read_example(task, rows[len(asked)], len(asked), data.parent).answers
        assert images[0].tobytes() == \
            open_image(data.parent / rows[len(asked)]["image"]).tobytes()
        asked.append((prompt, more["max_new_tokens"]))
        return dict(text=max(answers, key=answers.count), kept=[[3, 4], [5, 6]], prompt_tokens=9)

    monkeypatch.setattr(evaluate, "load", lambda *arguments: tiny[TINY[-1]])
    monkeypatch.setattr(evaluate, "generate", knows)
    printed = evaluate_on(capfd, "--task", task, "--data", data, "--methods", "full",
                          "--out", tmp_path / "out")
    result = json.loads((tmp_path / "out" / "table.json").read_text())["results"][0]
    assert HIGHEST.get(task, lambda score: score == 1)(result["score"]), result
    assert (result["n"], result["kept_entries"], result["share_kept"]) == (4, 18, 0.5)
    assert printed.splitlines()[-1].split()[:2] == ["full", "-"]
    assert {(tokens, prompt.endswith(ASKED[task][1])) for prompt, tokens in asked} == \
        {(ASKED[task][0], True)}
    lines = (tmp_path / "out" / "scores.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == list(range(len(rows)))


def test_prompts_by_hand():
    def prompt(task, **row):
        row = {"image": "a.png", "question": "Which Shop is it?", "answer": "A", "index": 1, **row}
        return evaluate.TASKS[task].ask(row)
    assert prompt("textvqa") == "Which shop is it?"
    assert prompt("docvqa") == prompt("vqav2") == prompt("chartqa") == "Which Shop is it?"
    assert prompt("ocrbench", question=" Read it.\n") == "Read it."
    assert prompt("textcaps") == ""
    assert prompt("mmbench", hint="nan", A="Aldi", B=7, C=None, D=math.nan, E="") == \
        "Which Shop is it? There are several options:\nA. Aldi\nB. 7"
    assert prompt("mmbench", hint="Look.", A="x", B="y") == \
        "Look. Which Shop is it? There are several options:\nA. x\nB. y"


def test_chartqa_and_mmbench_report_their_parts():
    def example(number, answers, **row):
        return evaluate.Example(number, 0, Path("a"), "", answers, row)
    charts = [example(i, ["100"], type=kind)
              for i, kind in enumerate(["human_test", "human_test", "augmented_test"])]
    assert evaluate.judge_chartqa(charts, ["101", "no", "100"]) == \
        ([1, 0, 1], dict(score=pytest.approx(2 / 3), n=3, human=0.5, augmented=1))
    assert evaluate.judge_chartqa(charts[:1], ["1"])[1]["augmented"] is None
    rows = [example(i, [answer], index=index, A="cat", B="dog") for i, (index, answer) in
            enumerate([(5, "A"), (1_000_005, "B"), (6, "A"), (1_000_006, "B")])]
    assert evaluate.judge_mmbench(rows, ["A", "dog", "A", "what"]) == \
        ([1, 1, 1, 0], dict(score=0.5, n=2, unparsed=0.25))


def write_data(folder, num):
    """A file in VQAv2's fields, of `num` rows about random pictures."""
    for i in range(num):
        picture(40 + 8 * i, 50, seed=i).save(folder / f"{i}.png")
    rows = [dict(question_id=100 + i, question=f"What {i}?", image=f"{i}.png",
                 answers=[{"answer": "x"}, {"answer": "yz"}]) for i in range(num)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def contents(folder):
    return [(folder / name).read_text() for name in ("scores.jsonl", "table.json")]


def test_an_evaluation_is_resumed_after_a_kill(checkpoints, monkeypatch, capfd, tmp_path):
    folder, _, ours = checkpoints["qwen"]
    write_data(tmp_path, 3)
    monkeypatch.setattr(evaluate, "load", lambda *arguments: ours)
    real, calls = sparsemm.generate, []

    def dies(*arguments, **more):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    command = ("--task", "vqav2", "--data", tmp_path / "data.jsonl", "--model", folder,
               "--methods", "full,snapkv", "--budgets", "40, 50")
    evaluate_on(capfd, *command, "--out", tmp_path / "whole")
    monkeypatch.setattr(evaluate, "generate", dies)
    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        evaluate_on(capfd, *command, "--out", cut)
    kept = (cut / "predictions-0.jsonl").read_text()
    assert kept.count("\n") == 5 and not (cut / "scores.jsonl").exists()
    (cut / "predictions-0.jsonl").write_text(kept + '{"row": 1, "method": "snapkv", "pred')
    evaluate_on(capfd, *command, "--out", cut)
    assert len(calls) == 6 + 4                                        # 9 runs, 5 of which were done
    assert contents(cut) == contents(tmp_path / "whole")
    line = json.loads(contents(cut)[0].splitlines()[0])
    picture_0 = open_image(tmp_path / "0.png")
    expected = real(ours, [picture_0], f"What 0?{ASKED['vqav2'][1]}", "full", max_new_tokens=16)
    assert (line["prediction"], line["kept_entries"]) == \
        (expected["text"], sum(map(sum, expected["kept"])))
    # a further budget asks only for what is new; other settings are not mixed in
    evaluate_on(capfd, *command[:-1], "40,60", "--out", cut)
    assert len(calls) == 10 + 3
    assert [r["budget"] for r in json.loads(contents(cut)[1])["results"]] == [None, 40, 60]
    assert [r["kept_entries"] for r in json.loads(contents(cut)[1])["results"]][1:] == \
        [40 * 3 * 2, 60 * 3 * 2]
    line = rejected(capfd, *command, "--out", cut, "--window", 20, main=evaluate.main)
    assert "--out" in line and "another window" in line


def evaluation(checkpoints, folder):
    """Of three rows, written to the folder, too."""
    write_data(folder, 3)
    return ["--task", "vqav2", "--data", folder / "data.jsonl", "--methods", "full,snapkv",
            "--model", checkpoints["qwen"][0], "--budgets", "40"]


@beside(lambda checkpoints, folder: two_ranks(
    "experiments/evaluate.py", *evaluation(checkpoints, folder), "--out", folder / "two"))
def test_an_evaluation_in_two_processes_equals_one(checkpoints, capfd, done, tmp_path):
    evaluate_on(capfd, *evaluation(checkpoints, done.folder), "--out", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("kept entries") == 1
    assert contents(done.folder / "two") == contents(tmp_path / "one")
    assert [len((done.folder / "two" / f"predictions-{rank}.jsonl").read_text().splitlines())
            for rank in range(2)] == [4, 2]


def test_unreadable_rows_are_named_and_left_out(checkpoints, monkeypatch, capfd, tmp_path):
    rows = write_data(tmp_path, 3)
    (tmp_path / "bad.png").write_bytes(b"junk")
    unreadable = [dict(rows[0], image="none.png"), dict(rows[0], image="bad.png"),
                  dict(rows[0], question="<|image_pad|>"), dict(rows[0], answers=[]), [1],
                  dict(image="0.png", answers=["x"]), dict(rows[0], question=7)]
    lines = [json.dumps(row) for row in [*unreadable, *rows]]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines[:7] + ['{"cut'] + lines[7:]))
    monkeypatch.setattr(evaluate, "load", lambda *arguments: checkpoints["qwen"][2])
    command = ("--task", "vqav2", "--data", data, "--methods", "full", "--out", tmp_path / "out")
    printed = evaluate_on(capfd, *command)
    assert "3 rows, 8 skipped" in printed and "row 0 (question_id 100): " in printed
    skipped = json.loads(contents(tmp_path / "out")[1])["skipped"]
    for name, reason in {"row 0 (question_id 100)": "none.png: no such file",
                         "row 1 (question_id 100)": "bad.png: not a picture",
                         "row 2 (question_id 100)": "<|image_pad|>",
                         "row 3 (question_id 100)": "answers", "row 4": "not a JSON object",
                         "row 5": "'question'", "row 6 (question_id 100)": "'question'",
                         "row 7": "not a JSON object"}.items():
        assert reason in skipped[name]
    data.write_text("\n".join(lines[1:3]))                           # found out while running
    with pytest.raises(SystemExit) as end:
        evaluate_on(capfd, *command[:-1], tmp_path / "other")
    assert end.value.code == 2 and not (tmp_path / "other" / "scores.jsonl").exists()
    data.write_text("\n".join(lines[:1] + lines[3:7]))                                 # and before
    line = rejected(capfd, *command[:-1], tmp_path / "other", main=evaluate.main)
    assert "--data" in line and "none.png" in line


def test_mmbench_limit_counts_questions_and_a_broken_one_is_left_out(tiny, monkeypatch, capfd,
                                                                     tmp_path):
    data = miniatures.make_miniature("mmbench", tmp_path, 3)
    rows = evaluate.read_rows(data)
    assert [row["index"] for row in rows[:4]] == [0, 1, 2, 1_000_000]
    examples, errors = evaluate.read_examples("mmbench", rows, data.parent, limit=2)
    assert {e.row["index"] % 1_000_000 for e in examples} == {0, 1} and not errors
    assert len(examples) == len([row for row in rows if row["index"] % 1_000_000 < 2]) > 4
    rows[3]["image"] = "none.png"                                    # a rotation of question 0
    data.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(evaluate, "load", lambda *arguments: tiny[TINY[-1]])
    monkeypatch.setattr(evaluate, "generate",
                        lambda *a, **b: dict(text="A", kept=[[1]], prompt_tokens=1))
    evaluate_on(capfd, "--task", "mmbench", "--data", data, "--methods", "full", "--out", tmp_path)
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["results"][0]["n"] == 2 and list(table["skipped"]) == ["row 3 (index 1000000)"]


@pytest.mark.parametrize("arguments, expected", [
    (["--task", "gqa"], ["--task", "gqa", "docvqa"]),
    (["--methods", "full,best"], ["--methods", "best", "snapkv"]),
    (["--budgets", "64,x"], ["--budgets", "'x'", "32"]),
    (["--budgets", "64,"], ["--budgets", "''"]),
    (["--budgets", "31"], ["--budgets", "31", "32"]),
    (["--limit", 0], ["--limit", "0"]),
    (["--images", "no/such"], ["--images", "no/such"]),
    (["--data", "none.jsonl"], ["--data", "none.jsonl", "cannot be read"]),
    (["--data", HERE / "sparsemm.py"], ["--data", "sparsemm.py", "not JSON"]),
    (["--data", HERE / "tiny" / "qwen2-vl" / "config.json"], ["--data", "config.json", "list"]),
    (["--data", HERE / "tiny" / "samples.json"], ["--data", "samples.json", "vqav2", "answers"]),
    (["--model", "no/such/folder"], ["no/such/folder"]),
    (["--out", HERE / "README.md"], ["--out", "README.md"]),
    (["--make-miniature", HERE / "README.md"], ["--make-miniature", "README.md"]),
])
def test_bad_arguments_of_the_evaluation(capfd, tmp_path, arguments, expected):
    write_data(tmp_path, 1)
    line = rejected(capfd, "--task", "vqav2", "--data", tmp_path / "data.jsonl", "--out", tmp_path,
                    "--methods", "full", *arguments, main=evaluate.main)
    assert all(word in line for word in expected), line


def test_evaluation_needs_scores_and_a_file(checkpoints, monkeypatch, capfd, tmp_path):
    write_data(tmp_path, 1)
    command = ("--task", "vqav2", "--data", tmp_path / "data.jsonl", "--out", tmp_path / "out")
    line = rejected(capfd, *command, "--model", checkpoints["qwen"][0], main=evaluate.main)
    assert "--scores" in line and "score_heads.py" in line
    assert "--data" in rejected(capfd, "--task", "docvqa", main=evaluate.main)
    assert "--task" in rejected(capfd, "--data", tmp_path / "data.jsonl", main=evaluate.main)


# ---- the paper rerun -----------------------------------------------------------------------------

PAGE = picture(64, 50)


def real_selections(monkeypatch, ours, held, prompt):
    """The positions of the prompt that each head of each layer keeps in a prefill run for `held`,
    L lists of G lists."""
    selections = []
    monkeypatch.setattr(
        cache, "select_entries",
        lambda scores, k: selections.append(select_entries(scores, k)) or selections[-1])
    with torch.inference_mode():
        ours.hidden_states(prompt, held)
    T, G, w = len(prompt.ids), ours.config.kv_heads, held.window
    rows = [s.tolist() + list(range(max(0, T - w), T)) for s in selections]
    return [rows[i:i + G] for i in range(0, len(rows), G)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vicuna", "mistral", "qwen"])
def test_one_prefill_keeps_what_the_method_keeps(checkpoints, monkeypatch, name, method):
    """Budgets below and above the prompt's length, windows small, large, and beyond it."""
    from experiments.compress import Prefill, Setting
    ours = checkpoints[name][2]
    c, prompt = ours.config, model_llava.prepare(ours, [PAGE], "What is it?")
    tables = {"aligned": torch.rand(c.layers, c.heads, dtype=torch.float64) ** 4}
    with torch.inference_mode():
        prefill = Prefill(ours, PAGE, "What is it?")
    for budget, window, rho, pour in ((20, 6, 0.1, True), (50, 50, 0.1, True), (64, 8, 0.0, False),
                                      (500, 32, 0.1, True)):
        setting = Setting(method, budget, window, rho, pour)
        plan = make_method(method, c.layers, c.kv_heads, len(prompt.ids), budget, window, rho, pour,
                           tables["aligned"], seed=3)
        kept = real_selections(monkeypatch, ours, KVCache(plan, window), prompt)
        keep = prefill.keep(setting, tables, seed=3)
        assert [[head.nonzero()[:, 0].tolist() for head in layer] for layer in keep] == kept
        assert prefill.cache(setting, tables, seed=3).kept == keep.sum(-1).tolist()


@pytest.mark.parametrize("name", ["vicuna", "mistral", "qwen", "qwen-tied"])
def test_forced_answers_equal_decoding_token_by_token(checkpoints, name):
    """All methods in one batch of masks, against the real cache."""
    from experiments.compress import Prefill, Setting, forced_accuracy, forced_logits
    ours = checkpoints[name][2]
    c, tokens = ours.config, [40, 41, 60, 33, 70, 35]
    prompt = model_llava.prepare(ours, [PAGE], "What is it?")
    tables = {"aligned": torch.rand(c.layers, c.heads, dtype=torch.float64) ** 4}
    settings = [Setting(method, budget, window=6) for budget in (20, 300) for method in METHODS]
    with torch.inference_mode():
        prefill = Prefill(ours, PAGE, "What is it?")
    keep = torch.stack([prefill.keep(s, tables) for s in settings])
    logits, expected = forced_logits(prefill, keep, tokens), []
    for s in settings:
        plan = make_method(s.method, c.layers, c.kv_heads, len(prompt.ids), s.budget, 6,
                           scores=tables["aligned"])
        expected.append(decode_logits(ours, prompt, tokens, KVCache(plan, 6, len(tokens))))
    assert (logits - torch.stack(expected)).abs().max() < 1e-4
    changed = (logits[:len(METHODS)] - logits[0]).abs().amax((1, 2))       # logits[0]: full
    assert (changed[1:] > 0.1).all() and changed[0] == 0
    # the answer that a setting itself would give, but for the first token, is right to the end
    some = [0, 1, 4, 6, 10]
    for s in (0, 4):
        answer = [40, *logits[s, :1].argmax(-1).tolist(), 41]
        right = [(decode_logits(ours, prompt, answer[:-1],
                                KVCache(prefill.method(x, tables), 6, reserve=3)).argmax(-1)
                  == torch.tensor(answer[1:])).double().mean().item()
                 for x in (settings[i] for i in some)]
        got = forced_accuracy(prefill, keep, answer, rows=5)
        assert got[some].tolist() == pytest.approx(right)
        assert got[s] > 0 and len(set(got.tolist())) > 1


@pytest.mark.parametrize("name", ["vicuna", "qwen"])
def test_writing_from_one_prefill_equals_generate(checkpoints, name):
    from experiments.compress import Prefill, Setting, written
    ours = checkpoints[name][2]
    scores = torch.rand(ours.config.layers, ours.config.heads, dtype=torch.float64)
    with torch.inference_mode():
        prefill = Prefill(ours, PAGE, "What is it?")
    texts = []
    for method in METHODS:
        expected = sparsemm.generate(ours, [PAGE], "What is it?", method, 20, window=6,
                                     scores=scores, max_new_tokens=9, seed=2)["text"]
        held = prefill.cache(Setting(method, 20, window=6), {"aligned": scores}, 2, reserve=8)
        texts.append(written(prefill, held, 9))
        assert texts[-1] == expected, method
    assert len(set(texts)) > 2


def test_other_rankings():
    from experiments import compress
    torch.manual_seed(0)
    q, k, s = torch.randn(6, 60, 8), torch.randn(3, 60, 8), torch.rand(6)
    A, usual = compress.attention_rows(q, k, 10), observation_scores(q, k, 10)
    mean = compress.pool(A.mean(1).unflatten(0, (3, 2)).mean(1))
    assert torch.allclose(mean, usual, atol=1e-6)
    # all the weight on one head of a group: its own attention; no scores at all: the mean
    alone = compress.rank_by_scored_heads(A, k, torch.tensor([0, 1, 1, 1, 0, 0]).float())
    assert torch.allclose(alone[0], compress.pool(A.mean(1))[1], atol=1e-6)
    assert torch.allclose(alone[1:], usual[1:], atol=1e-6)
    # one query head a group: nothing to weigh
    A, usual = compress.attention_rows(q[:3], k, 10), observation_scores(q[:3], k, 10)
    for rank in ("heads by score", "best head"):
        assert torch.allclose(compress.RANKS[rank](A, k, s[:3]), usual, atol=1e-6)
    assert torch.allclose(compress.rank_by_last_query(A, k, s, share=0.0), usual, atol=1e-6)
    last = compress.rank_by_last_query(A, k, s, share=1.0)
    assert torch.allclose(last, observation_scores(q[:3], k, 1)[:, :50], rtol=0.3, atol=0.01)
    # of keys of which one stands apart, with attention alike, that one is the most diverse
    same = torch.ones(1, 60, 8) + 0.01 * torch.randn(1, 60, 8)
    same[0, 17] = -1
    diverse = compress.rank_by_diversity(torch.full((1, 10, 50), 1 / 60), same, s)
    assert diverse[0].argmax() == 17
    # sqrt of a KV head's score, 4 and 9 of two query heads each
    table = compress.power_of_scores(torch.tensor([[1.0, 3.0, 9.0, 0.0]]), 2, 0.5)
    assert cache.kv_head_scores(table, 2).tolist() == [[2.0, 3.0]]


def test_a_ranking_by_scores_follows_its_own_table(checkpoints):
    """Rankings are shared between settings, but not between tables of scores."""
    from experiments.compress import Prefill, Setting
    ours, text = checkpoints["qwen"][2], "What is it?"
    shape = ours.config.layers, ours.config.heads
    tables = {name: torch.rand(shape, generator=torch.Generator().manual_seed(seed)) ** 4
              for seed, name in enumerate("ab")}
    with torch.inference_mode():
        prefill, fresh = Prefill(ours, PAGE, text), Prefill(ours, PAGE, text)
    a, b = (Setting(budget=20, window=6, rho=1.0, scores=name, rank="heads by score")
            for name in "ab")
    kept = prefill.keep(a, tables)
    assert torch.equal(prefill.keep(b, tables), fresh.keep(b, tables))
    assert not torch.equal(prefill.keep(b, tables), kept)


@pytest.mark.parametrize("name", ["vicuna", "qwen"])
def test_masked_heads_contribute_nothing(checkpoints, name):
    """Masking equals o_proj without the head's columns; afterwards nothing is left of it."""
    from experiments.compress import masked_accuracy, masked_heads
    folder, _, ours = checkpoints[name]
    prompt, D = model_llava.prepare(ours, [PAGE], "Hi"), ours.config.head_dim
    other = model_llava.load(folder, "cpu", "float32")
    for l, h in ((0, 1), (1, 0), (1, 3)):
        other.decoder.layers[l].self_attn.o_proj.weight.data[:, h * D:(h + 1) * D] = 0
    with torch.inference_mode():
        before, expected = ours.hidden_states(prompt), other.hidden_states(prompt)
        with masked_heads(ours, [(0, 1), (1, 0), (1, 3)]):
            masked = ours.hidden_states(prompt)
        assert torch.equal(ours.hidden_states(prompt), before)
        right = ours.logits(before[-1]).argmax().item()
        shares = masked_accuracy(ours, PAGE, "Hi", [right], [[], [(0, 1), (1, 0), (1, 3)]])
        still_right = float(ours.logits(masked[-1]).argmax() == right)
    assert (masked - expected).abs().max() < 1e-4 < (masked - before).abs().max()
    assert shares == [1.0, still_right]


@pytest.mark.parametrize("name", ["vicuna", "qwen"])
def test_a_head_without_its_query_averages_all_values(checkpoints, name):
    """As in the authors' code: the same as q_proj without the head's rows, and unlike the mask of
    its output."""
    from experiments.compress import masked_heads
    folder, _, ours = checkpoints[name]
    prompt, D = model_llava.prepare(ours, [PAGE], "Hi"), ours.config.head_dim
    other = model_llava.load(folder, "cpu", "float32")
    for l, h in ((0, 1), (1, 3)):
        q_proj = other.decoder.layers[l].self_attn.q_proj
        for parameter in q_proj.parameters():                                # the weight, the bias
            parameter.data[h * D:(h + 1) * D] = 0
    with torch.inference_mode():
        with masked_heads(ours, [(0, 1), (1, 3)], query=True):
            masked = ours.hidden_states(prompt)
        with masked_heads(ours, [(0, 1), (1, 3)]):
            silent = ours.hidden_states(prompt)
        expected = other.hidden_states(prompt)
    assert (masked - expected).abs().max() < 1e-4 < (masked - silent).abs().max()


def test_random_masks_leave_the_visual_heads_out():
    from experiments.compress import head_sets
    s = torch.rand(8, 8)
    sets = head_sets(s, seeds=10)
    assert sorted({count for count, _ in sets}) == [1, 2, 3, 6] and len(sets) == 4 * 11
    best = [divmod(i, 8) for i in s.flatten().argsort(descending=True).tolist()]
    for (count, which), chosen in sets.items():
        assert len(set(chosen)) == count
        assert chosen == best[:count] if which == "visual" else not set(chosen) & set(best[:6])
    assert len({tuple(sets[6, seed]) for seed in range(10)}) == 10 and sets == head_sets(s, 10)


def test_figures_by_hand():
    from experiments import report, reproduce
    assert report.interval([0.5] * 7) == [0.5, 0.5, 0.5]
    mean, low, high = report.interval([0.0, 1.0] * 50)              # a standard error of 0.05
    assert mean == 0.5 and low == pytest.approx(0.402, abs=0.02) \
        and high == pytest.approx(0.598, abs=0.02)
    assert reproduce.characters("12.5", "12.50") == pytest.approx(0.8)
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert reproduce.rank_correlation(a, a.exp()) == pytest.approx(1)
    assert reproduce.rank_correlation(a, torch.tensor([1.0, 3.0, 2.0, 4.0])) == pytest.approx(0.8)
    assert reproduce.rank_correlation(a, torch.tensor([0.0, 0.0, 1.0, 1.0])) == pytest.approx(
        0.8944, abs=1e-4)
    ten = torch.arange(10)
    assert reproduce.overlap(ten, ten.flip(0), 0.6) == pytest.approx(2 / 6)
    # "to" twice on the page, "5" within "55" too; of "be" both characters count
    assert reproduce.unique_words(list("to be 5"), ["to", "be", "to", "55", "5"]) == \
        [None, None, None, 1, 1, None, None]
    assert reproduce.unique_words(["to", " be", "e x"], ["to", "bee", "x"]) == [0, 1, 1]
    settings = [reproduce.Setting(budget=b) for b in (1, 2)]
    measured = {s: dict(accuracy=np.array(x)) for s, x in zip(settings, ([0.9, 0.4], [0.7, 0.2]))}
    assert reproduce.figure(measured, tuple(settings)) == pytest.approx([0.2] * 3)      # paired
    assert report.show([0.912, 0.88, 0.94]) == "91.2 [88.0, 94.0]" and report.show(-1e-9) == "0.0"


REPRODUCE = ["--pages", "1", "--scoring-pages", "8", "--sizes", "128x64"]


def reproduced(folder, out, *arguments):
    """What a part writes, without the time it took."""
    from experiments import reproduce
    reproduce.main([arguments[0], "--model", str(folder), "--out", str(out), *REPRODUCE,
                    *arguments[1:]])
    return {path.name: json.loads(path.read_text()) | {"seconds": 0}
            for path in sorted(out.glob("*.json"))}


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux says so there")
def test_results_name_the_processor():
    name, cores = progress.machine_name().rsplit(", ", 1)
    assert cores == f"{os.cpu_count()} cores"
    assert name and (name in Path("/proc/cpuinfo").read_text() or name == platform.machine())


def test_every_claim_is_rerun_and_reaches_the_readme(checkpoints, tmp_path, capsys):
    from experiments import reproduce
    for name, part in (("qwen", "all"), ("vicuna", "masking")):
        shutil.copytree(checkpoints[name][0], tmp_path / name)
        stored = reproduced(tmp_path / name, tmp_path / "out", part)
    assert set(stored) == {f"{part}-qwen.json" for part in reproduce.PARTS} | {
        "masking-vicuna.json"}
    for results in stored.values():
        assert results["tables"] and results["versions"]["torch"] == torch.__version__
        assert "--seed 0" in results["command"] and results["machine"] == progress.machine_name()
        for _, *cells in (row for t in results["tables"] for row in t["rows"]):
            assert all(cell is None or isinstance(cell, (str, int)) or cell[1] <= cell[2]
                       for cell in cells)
    kept = next(t for t in stored["main-qwen.json"]["tables"] if "really kept" in t["title"])
    assert [row[1][0] for row in kept["rows"]][1:] == [48.0] * (len(METHODS) - 1)
    assert Image.open(tmp_path / "out" / "main-qwen.png").width > 800
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nprevious\n<!-- /results -->\nafter\n")
    for _ in range(2):                                                   # again changes nothing
        reproduce.main(["readme", "--readme", str(readme), "--out", str(tmp_path / "out")])
        text = readme.read_text()
        assert text.startswith("before\n<!-- results -->\n|") and "previous" not in text
        assert text.endswith("<!-- /results -->\nafter\n")
    assert "vicuna (MHA) | qwen (GQA)" in text and "(out/main-qwen.png)" in text
    assert all(f"* [{part}, qwen](out/{part}-qwen.md): `python" in text
               for part in reproduce.PARTS)
    assert "512 x 512 pixels" in stored["large-qwen.json"]["tables"][0]["title"]
    for part in ("heads", "main", "large", "beyond", "fastv"):
        table = next(t for t in stored[f"{part}-qwen.json"]["tables"] if t["readme"])
        label, *cells = table["rows"][0]
        assert f"#### {part}, qwen (GQA)" in text and table["title"] in text
        assert "| " + " | ".join([label, *(show(x, table["unit"]) for x in cells)]) + " |" in text


def test_stored_commands_name_the_model_as_it_is_typed():
    assert as_typed(DEFAULT_MODEL) == "tiny/qwen2-vl"
    assert as_typed("someone/some-model") == "someone/some-model"


def test_a_stopped_reproduction_goes_on(checkpoints, monkeypatch, tmp_path, capsys):
    from experiments import reproduce
    folder = checkpoints["mistral"][0]
    whole = reproduced(folder, tmp_path / "whole", "masking")
    real, calls = reproduce.masked_accuracy, []

    def dies(*arguments, **named):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(reproduce, "masked_accuracy", dies)
    with pytest.raises(KeyboardInterrupt):
        reproduced(folder, tmp_path / "cut", "masking")
    assert not list((tmp_path / "cut").glob("*.json"))
    assert reproduced(folder, tmp_path / "cut", "masking") == whole
    assert len(calls) == 5                # a page of each task and kind of mask, and the failure
    capsys.readouterr()
    for arguments, expected in (
            (["masking", "--seed", "1"], "other settings"), (["masks"], "masks"),
            (["readme", "--readme", "none"], "none"), (["masking", "--pages", "0"], "--pages"),
            (["main", "--sizes", "9x9"], "at least 32")):
        with pytest.raises(SystemExit) as end:
            reproduced(folder, tmp_path / "cut", *arguments)
        err = capsys.readouterr().err.split("\r")[-1]
        assert end.value.code == 2 and err.strip().count("\n") == 0 and expected in err, err
