"""What users give to the four scripts: checkpoints, score files, pages and pictures of all kinds.
Bad ones are refused in one line that names what is wrong, unusual ones are read as they are meant.

    python -m pytest experiments/test_input.py
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cache
import model_llava
import score_heads
import sparsemm
from cache import allocate_budgets
from model_llava import open_image
from test_sparsemm import (EXPECTED_PROMPTS, checkpoints, copied, picture, rejected, run,   # with
                           score)                                                     # fixtures

GOOD_SCORES = {f"{l}-{h}": [0.5, 1] for l in range(3) for h in range(6)}


@pytest.mark.parametrize("content, expected", [
    ("{", "not JSON"), ("[" * 10**5, "not JSON"), ("[1]", "not an object"),
    (json.dumps(GOOD_SCORES)[:-1] + ', "0-0": [1]}', "twice"),
    *((json.dumps({**GOOD_SCORES, **change}), expected) for change, expected in (
        ({"2-6": [1]}, "2-6"), ({"head": [1]}, "not an object"), ({"1-1": []}, "1-1"),
        ({"1-1": 3}, "1-1"), ({"1-1": [-1]}, "1-1"), ({"1-1": [math.nan]}, "1-1"),
        ({"1-1": ["x"]}, "1-1"), (dict.fromkeys(GOOD_SCORES, [0]), "all zero"))),
    (json.dumps({k: v for k, v in GOOD_SCORES.items() if k != "2-5"}), "2-5")])
def test_bad_score_files(checkpoints, capfd, tmp_path, content, expected):
    path = tmp_path / "scores.json"
    path.write_text(content)
    line = rejected(capfd, "--prompt", "Hi", "--model", checkpoints["qwen"][0], "--scores", path)
    assert "scores" in line and str(path) in line and expected in line


def spoil(folder, name, change):
    """change: a text to write; (old, new) to replace; a name to take; or None: the file is gone."""
    path = folder / name
    if isinstance(change, tuple):
        assert change[0] in path.read_text()
        change = path.read_text().replace(*change)
    if isinstance(change, Path):
        path.rename(folder / change)
    elif change is None:
        path.unlink()
    else:
        path.write_text(change)


@pytest.mark.parametrize("name, change, expected", [
    ("config.json", Path("adapter_config.json"), ["adapter_config.json", "no adapter alone"]),
    ("config.json", '{"model_type": "gpt2"}', ["gpt2", "qwen2_vl"]),
    ("config.json", "[1, 2", ["config.json", "not JSON"]),
    ("config.json", ('num_hidden_layers": 3', 'num_hidden_layers": "x"'), ["num_hidden_layers"]),
    ("config.json", ('"mrope_section"', '"mrope_sections"'), ["mrope_section"]),
    ("config.json", ('{\n  "arch', '{"quantization_config": {"bits": 4}, "arch'), ["quantized"]),
    ("config.json", ('"image_token_id": 8', '"image_token_id": 3'),
     ["<|image_pad|> is token 8", "3 in config.json"]),
    ("model.safetensors", Path("pytorch_model.bin"), ["pytorch_model.bin"]),
    ("model.safetensors", "junk" * 9, ["model.safetensors cannot be read"]),
    ("model.safetensors.index.json", '{"weight_map": {"a": "../a.safetensors"}}', ["leads out"]),
    ("model.safetensors.index.json", '{"weight_map": {"a": "/dev/zero"}}', ["leads out"]),
    ("tokenizer.json", None, ["tokenizer"]),
    ("LICENSE", "", ["score_heads.py", "snapkv"]),            # nothing but that there are no scores
])
def test_bad_checkpoints(copied, capfd, name, change, expected):
    folder = copied("qwen")
    spoil(folder, name, change)
    line = rejected(capfd, "--prompt", "Hi", "--model", folder)
    assert all(word in line for word in expected), line


@pytest.mark.parametrize("name, tensor, expected", [
    ("model.norm.weight", None, ["model.norm.weight", "missing"]),
    ("extra.weight", torch.ones(2), ["extra.weight", "surplus"]),
    ("model.norm.weight", torch.ones(5), ["model.norm.weight", "[5]", "[96]"])])
def test_tensors_that_are_missing_surplus_or_misshapen(copied, capfd, name, tensor, expected):
    file = copied("qwen") / "model.safetensors"
    weights = load_file(file) | {name: tensor}
    save_file({name: x for name, x in weights.items() if x is not None}, file)
    line = rejected(capfd, "--prompt", "Hi", "--model", file.parent)
    assert all(word in line for word in expected), line


@pytest.mark.parametrize("template", [
    "{% for message in messages %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endfor %}",
    "{% for message in messages %}<|im_start|>{{ message['content'] }}{% endfor %}", "{% x",
    "{{ raise_exception('no') }}"])
def test_templates_of_text_models_give_way_to_the_familys(checkpoints, copied, capfd, template):
    """The first as in the published tokenizer_config.json of Mistral-7B-Instruct-v0.2."""
    folder = copied("mistral")
    about = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(about, chat_template=template)))
    processor = model_llava.Processor(folder, checkpoints["mistral"][2].config)
    assert processor.tokenizer.decode(processor.token_ids(2, "Hi")) == EXPECTED_PROMPTS["mistral"]
    assert "chat template" in capfd.readouterr().err


def test_bad_pages_are_named_and_left_out(checkpoints, capfd, tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    for path, size in (("inner/thin", (5000, 1)), ("inner/a", (64, 48)), ("out", (64, 48))):
        picture(*size).save(tmp_path / f"{path}.png")
    (inner / "link.png").symlink_to("../out.png")
    entries = [{"image_name": name, "2_coord": [{"chunk": "ab", "coord": [[0, 0], [corner, 47]]}]}
               for name, corner in (("thin.png", 9), ("n" * 300, 9), ("a.png", 10**400), ("a\0", 9),
                                    ("a.png", math.nan), ("../out.png", 9), ("link.png", 9),
                                    (str(tmp_path / "out.png"), 9), (3, 9), ("a.png", 63))]
    entries += [{"id": "odd", "image_name": "a.png", "2_coord": [{"chunk": "x"}]}, "nothing"]
    (inner / "data.json").write_text(json.dumps(entries))
    arguments = checkpoints["qwen"][0], tmp_path / "s.json", "--data", inner / "data.json"
    score(*arguments)
    out = capfd.readouterr().out
    assert "1 pages, 11 skipped" in out and "page 0: image of 5000 x 1" in out
    assert out.count("leads out of the folder") == 3 and "entry odd" in out
    assert {len(v) for v in json.loads((tmp_path / "s.json").read_text()).values()} == {1}
    (inner / "data.json").write_text(json.dumps(entries[:1]))
    with pytest.raises(SystemExit):
        score(*arguments)
    assert "none of the 1 pages can be used; page 0: image of 5000" in capfd.readouterr().err


def test_what_may_not_be_meant_is_said(copied, capfd, tmp_path):
    cache.note.cache_clear()                                           # each is said once only
    folder = copied("qwen")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 50
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "s.json").write_text(json.dumps(GOOD_SCORES, indent=4), encoding="utf-8-sig")
    (tmp_path / "s.about.json").write_text(json.dumps({"model": "someone/other"}))
    _, err = run(capfd, "--model", folder, "--prompt", "d\u00e9j\u00e0 <|im_end|>", "--scores",
                 tmp_path / "s.json", "--max-new-tokens", 1)
    for words in ("someone/other", "not know '\u00e9' '\u00e0'; this model knows printable ASCII",
                  "<|im_end|> is no text", "the 50 tokens", "without a picture"):
        assert err.count(words) == 1, (words, err)


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


def test_damaged_and_oversized_images(capfd, tmp_path, monkeypatch):
    picture(300, 300).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    assert "exceeds limit" in rejected(capfd, "--prompt", "Hi", "--image", tmp_path / "a.png")
    monkeypatch.undo()
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:5000])
    assert "cut.png" in rejected(capfd, "--prompt", "Hi", "--image", tmp_path / "cut.png")


def test_pictures_of_every_mode(tmp_path, capfd):
    """Half of each is transparent, or black, and half is middle grey."""
    half, deep = Image.fromarray(np.uint8([[0, 128]])), np.array([[0, 32896]])
    pale = Image.merge("LA", [half, Image.fromarray(np.uint8([[0, 255]]))])
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
    Image.fromarray(deep.astype("float32")).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match="0 to 1 is right"):
        open_image(tmp_path / "a.tiff")
    picture(9, 9).save(tmp_path / "a.gif", save_all=True, append_images=[picture(9, 9, seed=1)])
    open_image(tmp_path / "a.gif")
    assert "2 frames; the first" in capfd.readouterr().err


@pytest.mark.parametrize("change", [
    dict(budget=31), dict(window=0), dict(rho=1.5), dict(rho=math.nan),
    dict(head_scores=torch.zeros(2, 2)), dict(head_scores=-torch.ones(2, 2)), dict(length=0),
    dict(head_scores=torch.tensor([[math.nan, 1]])), dict(length=[5, 5, 5])])
def test_allocate_budgets_rejects(change):
    with pytest.raises(ValueError):
        allocate_budgets(**{**dict(head_scores=torch.ones(2, 2), budget=64, length=100), **change})


def test_a_transcript_must_fit_the_sliding_window(checkpoints, monkeypatch):
    ours, image = checkpoints["mistral"][2], picture(70, 50)
    T = len(model_llava.prepare(ours, [image], score_heads.OCR_PROMPT).ids)
    monkeypatch.setattr(ours, "config", replace(ours.config, max_tokens=T + 3))
    score_heads.score_transcript(ours, [image], [[]], [1, 2, 3])
    with pytest.raises(ValueError, match="sliding window"):
        score_heads.score_transcript(ours, [image], [[]], [1, 2, 3, 4])
