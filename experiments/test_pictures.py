"""Pictures, page and walk-through show what the four scripts compute."""

import base64
import json
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments import compress, draw, explore, walkthrough
from model_llava import load, prepare
from score_heads import OCR_PROMPT, attention_peaks, tokens_in_box
from sparsemm import DEFAULT_MODEL, Method, find_head_scores, generate

TINY, QUESTION, PAGE = DEFAULT_MODEL.parent, "What is the Rope?", draw.sample_page()
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --virtual-time-budget=8000 --dump-dom".split()
MOVES = """<script>
const find = text => document.querySelector(text), bubbles = true, pointerType = "mouse";
new MutationObserver((_, observer) => {
  observer.disconnect(), find("#budget").value = 2;
  find("#budget").dispatchEvent(new Event("input", { bubbles }));
  find("[value=snapkv]").click(), find('[value="7-1"]').click();
  find('[value="7-1"]').dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowUp", bubbles }));
  find('[value="0-2"]').dispatchEvent(new PointerEvent("pointerover", { pointerType, bubbles }));
}).observe(find("#answer"), { childList: true })</script>"""


@pytest.fixture(scope="module", params=["qwen2-vl", "llava-next"])
def model(request):
    return load(TINY / request.param, "cpu")


def shown(page, state):
    """{id: text} of what a browser shows of the page at this address, and {head: label}."""
    command = [BROWSER, *FLAGS, f"--user-data-dir={page.parent}", f"{page.as_uri()}#{state}"]
    for _ in range(5):                         # a busy machine may not unpack the page in time
        dom = subprocess.run(command, capture_output=True, text=True).stdout
        texts = dict(re.findall(r'<[^>]*id="([\w-]+)"[^>]*>([^<]*)<', dom))
        if texts["answer"]:
            return texts, dict(re.findall(r'value="(\d+-\d+)"[^>]*aria-label="([^"]*)"', dom))


@pytest.mark.skipif(BROWSER is None, reason="no browser")
def test_the_page_shows_the_numbers_of_generate_and_moves(model, tmp_path):
    page, scores = tmp_path / "page.html", find_head_scores(model)
    command = f"--image {TINY}/receipt.png --out {page} --model {model.folder} --prompt"
    explore.main([*command.split(), QUESTION, "--device", "cpu"])
    for name, budget in (("sparsemm", 64), ("full", 128), ("snapkv", 96)):
        result = generate(model, [PAGE.image], QUESTION, Method(name, budget, head_scores=scores))
        see, heads = shown(page, f"method={name}&budget={budget}&head=7-1")
        T, kept, size = (result[key] for key in ("prompt_tokens", "kept", "cache_bytes"))
        assert (see["answer"], see["bytes"]) == (result["text"], f"{size:,}")
        assert heads == {f"{l}-{g}": f"layer {l} head {g}: {n} of {T} entries kept"
                         for l, row in enumerate(kept) for g, n in enumerate(row)}
    page.write_text(page.read_text(encoding="utf-8") + MOVES, encoding="utf-8")
    see, moved = shown(page, "method=full&budget=48&head=0-0")       # by slider, click, key, mouse
    assert moved == heads and see["head-name"] == f"Layer 0 head 2: 96 of {T} kept"


def test_what_does_not_fit_into_the_page_is_left_out_weights_first(model, monkeypatch):
    given, sizes, smallest_loss = [], [], explore.smallest_loss
    monkeypatch.setattr(explore, "smallest_loss", lambda *parts: given.extend(parts))
    explore.explore(model, PAGE.image, QUESTION, None, limit=4)
    assert "snapkv 64" in given[1] and "sparsemm 64" not in given[1]        # which needs scores
    for _ in range(3):
        html = smallest_loss(*given)
        assert not re.search(r"https?:|<link|\ssrc=|@import|@DATA@", html)    # it loads nothing
        monkeypatch.setattr(explore, "LIMIT", len(html) - 1)
        data = zlib.decompress(base64.b64decode(re.search('id="data">([^<]*)', html)[1]))
        sizes.append((*json.loads(data)["detail"], len(json.loads(data)["budgets"])))
    assert sizes[0] == (*explore.DETAIL[0], len(given[3])) and sizes[0] > sizes[1] > sizes[2]


def test_what_is_drawn_is_what_the_scorer_ranks_and_what_decoding_attends_to(model):
    inputs, full, rows = prepare(model, [PAGE.image], QUESTION), compress.Setting("full"), []
    read, heads = compress.prefill(model, inputs), [(5, 7), (7, 1), (0, 3)]
    tokens = explore.watched_answer(read, read.cache(full, {}), read.keep(full, {}), 4,
                                    lambda p: rows.append(p.clone()))
    drawn = draw.rows_of_heads(model, inputs.extended(tokens[:-1]), heads, len(tokens))
    for l, h in heads:
        assert torch.equal(drawn[l, h].argmax(-1), attention_peaks(model, inputs, tokens)[l, h])
        assert (torch.stack(rows)[:, l, h] - drawn[l, h][1:, :len(read.k[0][0])]).abs().max() < 1e-4


def test_pictures_show_hits_as_they_count_and_dark_what_is_evicted(tmp_path, monkeypatch):
    texts, write = [], draw.Canvas.text
    monkeypatch.setattr(draw.Canvas, "text", lambda canvas, place, text, *rest, **options:
                        texts.append(text) or write(canvas, place, text, *rest, **options))
    for name in ("hit.png", "kept.png", "look.gif"):
        draw.main([name[:4].strip("."), "--out", str(tmp_path / name)])
    model, i = load(DEFAULT_MODEL, "cpu"), PAGE.text.index("5.25")
    inputs = prepare(model, [PAGE.image], OCR_PROMPT)
    [box] = [word.box for word in sum(PAGE.lines, []) if word.text == "5.25"]
    I = tokens_in_box(inputs.images[0], box) + inputs.starts[0]
    peaks = attention_peaks(model, inputs, model.processor.tokenizer(PAGE.text).input_ids)[..., i]
    assert [t for t in texts if "gains" in t] == [
        "its score gains " + ("1/|I| = 1/4" if peaks[head] in I else "nothing")
        for head in ((7, 0), (5, 6), (6, 1))]
    assert [t.split()[4] for t in texts if " kept" in t] == ["64", "64", "405", "36"]
    assert [t for t in texts if "answer" in t] == [f"answer: {'5.25'[:n]}" for n in range(4)]
    shades = [((0, 0, 9), 255 * (t == 126)) for t in range(384)]       # pixels 224-240 x 112-128
    panel = draw.painted(PAGE.image, inputs.images[0], shades)                  # twice as large
    assert panel.getpixel((450, 226)) == (0, 0, 9) != panel.getpixel((446, 226))


def test_the_walk_through_fits_two_screens_and_says_what_generate_says(capsys):
    walkthrough.main([])
    out, model = capsys.readouterr().out, load(DEFAULT_MODEL, "cpu")
    assert out.count("\n") <= 50 and max(map(len, out.splitlines())) <= 100
    method = Method("sparsemm", 64, head_scores=find_head_scores(model))
    result = generate(model, [PAGE.image], QUESTION, method)
    assert f"{result['cache_bytes']:,} bytes instead of {result['full_cache_bytes']:,}" in out
    assert all(f" {result['kept'][l][g]}\n" in out for l, g in ((7, 0), (5, 3), (7, 2), (6, 3)))


def test_the_readme_quotes_what_the_walk_through_prints(capsys):
    walkthrough.main([])
    quotes = re.findall(r"```\n(\d\. .*?)\n```", (TINY.parent / "README.md").read_text(), re.DOTALL)
    out = capsys.readouterr().out
    assert quotes and all(quote in out for quote in quotes)
