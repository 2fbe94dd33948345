"""Pictures, drawn with Pillow at twice their size and then scaled down.

    python experiments/draw.py kept --out tiny/kept.png              what heads keep of a page
    python experiments/draw.py look --out FILE.gif                   where they look, token by token
    python experiments/draw.py hit --out tiny/hit.png                which heads score a hit
    python experiments/draw.py heads FILE ... --out tiny/heads.png   head scores of each file
"""

import io
import json
import math
import random
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cache import METHODS, Method, attention_rows, kv_head_scores, read_head_scores
from experiments.compress import Setting, prefill
from experiments.pages import render_page
from model_llava import GRID, load, open_image, prefill_attention, prepare
from score_heads import OCR_PROMPT, tokens_in_box
from sparsemm import (DEFAULT_MODEL, SCORES_FILE, OneLineParser, add_model_arguments, check_output,
                      find_head_scores, generate, write_file)

RAMP = ((255, 255, 255), (254, 217, 118), (253, 141, 60), (227, 26, 28), (103, 0, 31))  # low, high
PANEL = 256                     # pixels: the width of a page in a picture, whatever its own
GRAY, RED, BLUE = (95, 95, 95), (180, 0, 0), (0, 70, 220)


def sample_page():
    """The page of tiny/receipt.png, with its words and their boxes."""
    return render_page(random.Random(9), "receipt", 256, 384)


class Canvas:
    """A white picture, drawn at twice its size; all coordinates are of the picture itself."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (2 * round(width), 2 * round(height)), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(self, place, text, size, fill="black", anchor="la"):
        """Draws text and returns its width."""
        font = ImageFont.load_default(2 * size)
        self.draw.text([2 * x for x in place], text, fill, font, anchor)
        return font.getlength(text) / 2

    def shape(self, kind, places, fill=None, outline=None, width=0.5):
        """kind: line, rectangle, ellipse or polygon; places: (x0, y0, x1, y1, ...)."""
        options = dict(width=round(2 * width)) | (dict(outline=outline) if kind != "line" else {})
        getattr(self.draw, kind)([2 * x for x in places], fill, **options)

    def paste(self, picture, place):
        """A picture that is as large as it should be drawn, times two."""
        self.image.paste(picture, [2 * round(x) for x in place])

    def legend(self, x, y, height, marks):
        """The colours as a column; marks: {place from 0 to 1: text}."""
        for i in range(2 * height):
            self.shape("line", (x, y + i / 2, x + 14, y + i / 2), color(1 - i / (2 * height)))
        for place, text in marks.items():
            self.text((x + 20, y + (1 - place) * height), text, 12, anchor="lm")

    def picture(self):
        return self.image.resize([side // 2 for side in self.image.size], Image.Resampling.LANCZOS)


def save(path, first, *more):
    """Writes a PNG or a GIF, as the path's ending says; of several pictures a moving one."""
    content = io.BytesIO()
    moving = dict(save_all=True, append_images=more, duration=700, loop=0) if more else {}
    first.save(content, Path(path).suffix[1:], **moving)
    write_file(path, content.getvalue())


def color(share):
    """A colour for a number between 0 and 1."""
    place = min(max(float(share), 0.0), 1.0) * (len(RAMP) - 1)
    i = min(int(place), len(RAMP) - 2)
    return tuple(round(a + (b - a) * (place - i)) for a, b in zip(RAMP[i], RAMP[i + 1]))


# ---- head scores ---------------------------------------------------------------------------------

def draw_map(canvas, x, y, scores, cell):
    """Layer x head cells of scores (L, H), coloured by their share of the largest."""
    (L, H), every = scores.shape, 1 if max(scores.shape) <= 12 else 4
    for i, score in enumerate(scores.flatten()):
        left, top = x + i % H * cell, y + i // H * cell
        canvas.shape("rectangle", (left, top, left + cell - 1, top + cell - 1),
                     color(score / scores.max()), outline=(225, 225, 225))
    for l in range(0, L, every):
        canvas.text((x - 6, y + (l + 0.5) * cell), str(l), 12, anchor="rm")
    for h in range(0, H, every):
        canvas.text((x + (h + 0.5) * cell, y + L * cell + 4), str(h), 12, anchor="mt")
    canvas.text((x + H * cell / 2, y + L * cell + 22), "query head", 12, anchor="mt")
    canvas.text((x - 6, y - 8), "layer", 12, anchor="rb")


def show_scores(files, path):
    """A PNG of score files side by side, with one legend; of one file it has per cents."""
    named = {file.parent.name if file.name == SCORES_FILE else file.stem: read_head_scores(file)
             for file in files}
    side, marks = 224, {0: "0", 0.5: "half", 1: "best head"}
    if len(files) == 1:
        [(name, s)], pages = named.items(), json.loads(files[0].read_text())["0-0"]
        named = {f"{name}: visual scores, {len(pages)} pages": s}
        side, marks = max(side, 16 * max(s.shape)), {x: f"{x * s.max():.1%}" for x in marks}
    canvas = Canvas(52 + len(named) * (side + 60) + 90, side + 96)
    for i, (title, scores) in enumerate(named.items()):
        x = 52 + i * (side + 60)
        canvas.text((x, 10), title, 14)
        draw_map(canvas, x, 48, scores, side / max(scores.shape))
    canvas.legend(22 + len(named) * (side + 60), 48, 160, marks)
    save(path, canvas.picture())


# ---- where heads look, and what they keep --------------------------------------------------------

def painted(picture, image, shades):
    """A page at twice PANEL's width, with the rectangles of its grid tokens laid over it. image:
    ImageTokens; shades: for each token a colour and how much it covers, from 0 to 255."""
    scale = 2 * PANEL / picture.width
    panel = picture.resize((2 * PANEL, round(scale * picture.height)))
    draw = ImageDraw.Draw(panel, "RGBA")
    for kind, box, (fill, covered) in zip(image.kinds.tolist(), image.boxes.tolist(), shades):
        x0, y0, x1, y1 = (edge * scale for edge in box)
        if kind == GRID and x1 > x0 and y1 > y0:
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), (*fill, covered))
    return panel


def painted_weights(picture, image, weights, largest):
    """A page with the attention weights of its tokens; `largest` has the darkest colour."""
    return painted(picture, image, [(color(0.3 + 0.7 * w), round(210 * min(1, 8 * w)))
                                    for w in (weights / largest).tolist()])


def rows_of_heads(model, inputs, heads, n):
    """{(layer, head): the last n rows (n, T) of its attention over a Prompt}."""
    rows = {}

    def attend(layer, q, k, v):                            # (H, T, D), (G, T, D), (G, T, D)
        for l, h in heads:
            if l == layer:
                rows[l, h] = attention_rows(q[h:h + 1, -n:], k[h * len(k) // len(q)])[0].cpu()
        return prefill_attention(q, k, v)

    model.hidden_states(inputs, attend)
    return {head: rows[head] for head in heads}


def heads_to_show(scores, visual=3):
    """(layer, head) of the best head of each of the layers with the best heads, and of the worst
    head of all."""
    best, H = scores.amax(1), scores.shape[1]
    layers = best.argsort(descending=True, stable=True)[:visual].tolist()
    worst = scores.flatten().argsort(descending=True, stable=True)[-1].item()
    return [(l, int(scores[l].argmax())) for l in layers if best[l] > 0] + [divmod(worst, H)]


@torch.inference_mode()
def show_heads(model, picture, prompt, scores, path, token_ids, token=0):
    """Where the best heads of three layers and the worst head look while an answer, token_ids, is
    written: a PNG of the answer's token number `token`, or a GIF of all. scores: (L, H). One scale
    of colours serves all panels: the largest weight on a patch of them all."""
    heads, n, decode = heads_to_show(scores), len(token_ids), model.processor.tokenizer.decode
    inputs, height = prepare(model, [picture], prompt), PANEL * picture.height // picture.width
    image, start, frames = inputs.images[0], inputs.starts[0], []
    rows = rows_of_heads(model, inputs.extended(token_ids[:-1]), heads, n)     # row i emits token i
    looks = [(l, h, row[:, start:start + len(image)]) for (l, h), row in rows.items()]
    largest = max(look.max().item() for _, _, look in looks) or 1.0
    written = [i for i in range(n) if token_ids[i] not in model.processor.end_tokens]
    for i in written if Path(path).suffix.lower() == ".gif" and written else [min(token, n - 1)]:
        before, after = f"answer: {decode(token_ids[:i])}", decode(token_ids[:i + 1])
        canvas = Canvas(len(heads) * (PANEL + 12) + 100, height + 112)
        x = 12 + canvas.text((12, 8), before, 26)
        canvas.text((x, 8), f"answer: {after}"[len(before):], 26, (200, 0, 0))
        for p, (l, h, look) in enumerate(looks):
            x = 12 + p * (PANEL + 12)
            canvas.text((x, 48), f"layer {l} head {h}, score {scores[l, h] / scores.sum():.1%}", 17)
            canvas.text((x, 72), f"{look[i].sum():.0%} on the image", 20, RED)
            canvas.paste(painted_weights(picture, image, look[i], largest), (x, 100))
        canvas.legend(16 + len(heads) * (PANEL + 12), 100, min(160, height),
                      {0: "0 %", 1: f"{largest:.0%}"})
        frames.append(canvas.picture())
    save(path, *frames)


@torch.inference_mode()
def show_hit(model, page, path, word="5.25", heads=((7, 0), (5, 6), (6, 1))):
    """What a small model's heads score (score_heads.py) while they emit the first character, which
    is a token, of a word of a page's transcript. For each head: its row, its arg-max, its gain."""
    before, tokenizer = page.text[:page.text.index(word)], model.processor.tokenizer
    inputs = prepare(model, [page.image], OCR_PROMPT).extended(tokenizer(before).input_ids)
    image, start, line = inputs.images[0], inputs.starts[0], before.split("\n")[-1]
    box = next(w.box for line in page.lines for w in line if w.text == word)
    I, top, x = (tokens_in_box(image, box) + start).tolist(), round(box[1]) - 62, 12
    rows = rows_of_heads(model, inputs, heads, 1)                   # the last row emits the token
    largest = max(row.max().item() for row in rows.values())
    letters = range(len(inputs.ids) - len(line), len(inputs.ids))
    spots = {t: (280 + 18 * n, 46, 298 + 18 * n, 64) for n, t in enumerate(letters)}
    for t, (x0, y0, x1, y1) in enumerate(image.boxes.tolist(), start):
        spots[t] = 12 + x0, y0 - top, 12 + x1, y1 - top
    canvas = Canvas(2 * PANEL + 40, 56 + 134 * len(heads))
    for text, fill in ((f"The model writes: {line}", "black"), (word[0], RED), (word[1:], GRAY)):
        x += canvas.text((x, 6), text, 15, fill)
    canvas.text((12, 28), f"Black: the box of {word}. Blue: I, the {len(I)} image tokens that show "
                f"it. Circle: the arg-max of the head's row\nthat emits the {word[0]}, over all "
                "keys: the page, the prompt and the text so far.", 9.5, GRAY)
    for n, ((l, h), [row]) in enumerate(rows.items()):
        part, peak = Canvas(2 * PANEL + 40, 134), row.argmax().item()
        panel = painted_weights(page.image, image, row[start:start + len(image)], largest)
        part.paste(panel.crop((0, 2 * top, 2 * PANEL, 2 * top + 240)), (12, 0))
        for t in I:
            part.shape("rectangle", spots[t], outline=BLUE, width=1)
        part.shape("rectangle", [a + b for a, b in zip(box, (12, -top) * 2)], outline="black")
        for t, letter in zip(letters, line):
            share = row[t] / largest
            part.shape("rectangle", spots[t], color(share), outline=GRAY)
            part.text((spots[t][0] + 9, 55), letter, 12, "white" if share > 0.6 else "black", "mm")
        ring = [a + b for a, b in zip(spots.get(peak, (0, 0, 0, 0)), (-5, -5, 5, 5))]
        part.shape("ellipse", ring, outline="black", width=2)
        where, gain = ("in", f"1/|I| = 1/{len(I)}") if peak in I else ("not in", "nothing")
        part.text((280, 0), f"layer {l} head {h}", 14)
        part.text((280, 20), f"arg-max: {row[peak]:.0%}, {where} I", 11, GRAY)
        part.text((286 + 18 * len(line), 55), "the text so far", 9.5, GRAY, "lm")
        part.text((280, 88), f"its score gains {gain}", 14, RED)
        canvas.paste(part.image, (0, 60 + 134 * n))
    canvas.legend(2 * PANEL - 8, 64, 60, {0: "0 %", 1: f"{largest:.0%}"})
    save(path, canvas.image)                                     # as it is: a close-up of the page


@torch.inference_mode()
def show_kept(model, picture, prompt, scores, budget, path, methods=("snapkv", "sparsemm")):
    """What the KV heads with the highest and the lowest score keep of a page, a row for each
    method: kept patches as they are, evicted ones dark, and the answer that the method gives."""
    inputs, s = prepare(model, [picture], prompt), kv_head_scores(scores, model.config.kv_heads)
    heads = [divmod(int(i), s.shape[1]) for i in (s.argmax(), s.argmin())]
    image, start, read = inputs.images[0], inputs.starts[0], prefill(model, inputs)
    height, left = PANEL * picture.height // picture.width, 250
    canvas = Canvas(left + len(heads) * (PANEL + 16), len(methods) * (height + 46) + 6)
    for row, name in enumerate(methods):
        keep, y = read.keep(Setting(name, budget), {"aligned": scores}), 8 + row * (height + 46)
        method = Method(name, budget, head_scores=scores)
        canvas.text((12, y + 34), name, 26)
        canvas.text((12, y + 68), f"budget {budget} x {s.numel()} heads", 16, GRAY)
        canvas.text((12, y + 102), prompt, 16, GRAY)
        canvas.text((12, y + 136), generate(model, [picture], prompt, method)["text"], 26, RED)
        for i, (l, g) in enumerate(heads):
            x, held = left + i * (PANEL + 16), keep[l, g]                               # (T,) bool
            shades = [((40, 40, 40), 0 if kept else 195) for kept in held[start:start + len(image)]]
            canvas.text((x, y), f"layer {l} head {g}: {held.sum()} of {len(held)} kept", 16)
            canvas.paste(painted(picture, image, shades), (x, y + 26))
    save(path, canvas.picture())


# ---- curves --------------------------------------------------------------------------------------

LINES = ((0, 0, 0), (205, 30, 30), (30, 100, 200), (20, 150, 80), (235, 145, 0), (130, 70, 180),
         (0, 165, 185), (150, 90, 40), (130, 130, 130))                # colours, one for each curve


def draw_curve(canvas, places, i, r=4):
    """Curve number i through places, (x, y) each, with its marks."""
    canvas.shape("line", sum(places, ()), LINES[i % len(LINES)], width=2)
    for x, y in places:
        canvas.shape(*(("ellipse", (x - r, y - r, x + r, y + r)),
                       ("rectangle", (x - r + 1, y - r + 1, x + r - 1, y + r - 1)),
                       ("polygon", (x, y - r - 1, x - r, y + r, x + r, y + r)),
                       ("polygon", (x, y - r - 1, x + r + 1, y, x, y + r + 1, x - r - 1, y)))
                     [i % 4], LINES[i % len(LINES)])


def line_charts(panels, path, title, x_label, x_ticks):
    """A PNG of panels side by side, with a common legend. x is logarithmic, y shown as per cent.
    panels: {title of a panel: {name of a curve: [(x, y in [0, 1]), ...]}}; a curve of one point is
    drawn as a dashed line across the panel, the mark to reach."""
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    width, height, top, x = 470, 320, 64, 62
    canvas = Canvas(152 + len(panels) * (width + 60), top + height + 60)
    canvas.text((x, 10), title, 17)
    for panel, curves in panels.items():
        canvas.text((x, top - 22), panel, 13)
        draw_panel(canvas, x, top, x + width, top + height, curves, names, x_ticks)
        canvas.text((x + width / 2, top + height + 26), x_label, 12, anchor="mt")
        x += width + 60
    for i, name in enumerate(names):
        y = top + 10 + 22 * i
        canvas.shape("line", (x - 36, y, x - 10, y), LINES[i % len(LINES)], width=2)
        draw_curve(canvas, [(x - 23, y)], i)
        canvas.text((x - 2, y), name, 12, anchor="lm")
    save(path, canvas.picture())


def draw_panel(canvas, x0, y0, x1, y1, curves, names, x_ticks):
    """Axes and curves of one panel in a box (x0, y0, x1, y1) of the picture."""
    xs, ys = zip(*(point for curve in curves.values() for point in curve))
    low, high = math.floor(10 * min(ys)), math.ceil(10 * max(ys))                       # in tenths
    across, up = max(math.log(max(xs) / min(xs)), 1e-9), max(1, high - low)

    def place(x, y):
        return (x0 + 12 + math.log(x / min(xs)) / across * (x1 - x0 - 24),
                y1 - (10 * y - low) / up * (y1 - y0))

    canvas.shape("rectangle", (x0, y0, x1, y1), outline=(90, 90, 90))
    for tick in range(low, low + up + 1):
        y = place(xs[0], tick / 10)[1]
        canvas.shape("line", (x0, y, x1, y), (225, 225, 225))
        canvas.text((x0 - 6, y), str(10 * tick), 12, anchor="rm")
    for tick in x_ticks:
        x = place(tick, ys[0])[0]
        if x0 < x < x1:
            canvas.shape("line", (x, y0, x, y1), (235, 235, 235))
            canvas.text((x, y1 + 6), str(tick), 12, anchor="mt")
    for name, curve in reversed(curves.items()):                          # the first one on top
        i, places = names.index(name), [place(x, y) for x, y in sorted(curve)]
        for x in range(round(x0), round(x1), 10) if len(places) == 1 else ():
            canvas.shape("line", (x, places[0][1], x + 5, places[0][1]), LINES[i % len(LINES)])
        draw_curve(canvas, places, i)


# ---- the command ---------------------------------------------------------------------------------

def draw(args):
    check_output(args.out, "--out", ".png", *[".gif"] * (args.what == "look"))
    if args.what == "heads":
        return show_scores(args.files, args.out)
    if args.what == "hit":
        return show_hit(load(DEFAULT_MODEL), sample_page(), args.out)
    picture, model = open_image(args.image), load(args.model, args.device, args.dtype)
    scores = find_head_scores(model, args.scores)
    if scores is None:
        raise ValueError(f"--scores: must be given, since {model.folder} has no {SCORES_FILE}")
    if args.what == "kept":
        return show_kept(model, picture, args.prompt, scores, args.budget, args.out)
    method = Method(args.method, args.budget, head_scores=scores, seed=args.seed)
    ids = generate(model, [picture], args.prompt, method)["token_ids"]
    show_heads(model, picture, args.prompt, scores, args.out, ids, args.token)


def main(argv=None):
    parser = OneLineParser(prog="draw.py", description="Draw where heads look and what they keep.")
    commands = parser.add_subparsers(dest="what", required=True)
    for name, text, budget in (
            ("kept", "what heads keep of a page", 64), ("hit", "which heads score a hit", 0),
            ("look", "where heads look, token by token", 256), ("heads", "scores of each file", 0)):
        command = commands.add_parser(name, help=text)
        command.add_argument("--out", required=True, metavar="FILE")
        if budget:
            command.add_argument("--image", default=DEFAULT_MODEL.parent / "receipt.png")
            command.add_argument("--prompt", default="What is the Rope?")
            command.add_argument("--budget", type=int, default=budget)
            command.add_argument("--scores", metavar="FILE")
            add_model_arguments(command)
        if name == "look":
            command.add_argument("--method", choices=METHODS, default="sparsemm")
            command.add_argument("--token", type=int, default=0, help="of the answer, for a PNG")
        if name == "heads":
            command.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.run(draw, argv)


if __name__ == "__main__":
    main()
