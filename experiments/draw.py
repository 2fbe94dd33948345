"""Pictures, drawn with Pillow at twice their size, and scaled down.

    python experiments/draw.py kept --out tiny/kept.png                what heads keep of a page
    python experiments/draw.py heads FILE ... --out tiny/heads.png     score files side by side
    python sparsemm.py --show-heads tiny/look.gif ...                  where heads look
    python score_heads.py --heatmap heads.png ...                      the scores of one model
    python experiments/reproduce.py main                               line_charts
"""

import io
import math
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cache import OneLineParser, kv_head_scores, read_head_scores
from experiments.compress import Setting, prefill
from model_llava import GRID, load, open_image, prefill_attention, prepare
from score_heads import attention_logits
from sparsemm import add_model_arguments, check_output, find_head_scores, generate, write_file

RAMP = ((255, 255, 255), (254, 217, 118), (253, 141, 60), (227, 26, 28), (103, 0, 31))  # low, high
PANEL = 256                     # pixels: the width of a page in a picture, whatever its own
GRAY, RED = (95, 95, 95), (180, 0, 0)


class Canvas:
    """A white picture, drawn at twice its size; all coordinates are of the picture itself."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (2 * round(width), 2 * round(height)), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(self, place, text, size, fill="black", anchor="la"):
        self.draw.text([2 * x for x in place], text, fill, ImageFont.load_default(2 * size), anchor)

    def shape(self, kind, places, fill=None, **options):
        """kind: line, rectangle, ellipse or polygon; places: (x0, y0, x1, y1, ...)."""
        if "width" in options:
            options["width"] *= 2
        getattr(self.draw, kind)([2 * x for x in places], fill, **options)

    def paste(self, picture, place):
        """A picture that is as large as it should be drawn, times two."""
        self.image.paste(picture, [2 * round(x) for x in place])

    def picture(self):
        half = self.image.width // 2, self.image.height // 2
        return self.image.resize(half, Image.Resampling.LANCZOS)


def save_whole(image, path, **options):
    """A picture file, all of it or nothing; its name's ending says which kind."""
    content = io.BytesIO()
    image.save(content, Path(path).suffix[1:], **options)
    write_file(path, content.getvalue())


def color(share):
    """A colour for a number between 0 and 1."""
    place = min(max(float(share), 0.0), 1.0) * (len(RAMP) - 1)
    i = min(int(place), len(RAMP) - 2)
    return tuple(round(a + (b - a) * (place - i)) for a, b in zip(RAMP[i], RAMP[i + 1]))


def text_width(text, size):
    return ImageFont.load_default(size).getlength(text)


def legend(canvas, x, y, height, marks):
    """The colours as a column; marks: {place from 0 to 1: text}."""
    for i in range(2 * height):
        canvas.shape("line", (x, y + i / 2, x + 14, y + i / 2), color(1 - i / (2 * height)))
    for place, text in marks.items():
        canvas.text((x + 20, y + (1 - place) * height), text, 12, anchor="lm")


# ---- head scores ---------------------------------------------------------------------------------

def draw_map(canvas, x, y, scores, cell):
    """Layer x head cells of scores (L, H), coloured by their share of the largest."""
    (L, H), every = scores.shape, 1 if max(scores.shape) <= 12 else 4
    for l in range(L):
        for h in range(H):
            canvas.shape("rectangle", (x + h * cell, y + l * cell, x + (h + 1) * cell - 1,
                                       y + (l + 1) * cell - 1), color(scores[l, h] / scores.max()),
                         outline=(225, 225, 225))
    for l in range(0, L, every):
        canvas.text((x - 6, y + (l + 0.5) * cell), str(l), 12, anchor="rm")
    for h in range(0, H, every):
        canvas.text((x + (h + 0.5) * cell, y + L * cell + 4), str(h), 12, anchor="mt")
    canvas.text((x + H * cell / 2, y + L * cell + 22), "query head", 12, anchor="mt")
    canvas.text((x - 6, y - 8), "layer", 12, anchor="rb")


def heat_map(scores, path, title="visual scores of the heads", cell=16):
    """A layer x head map of scores (L, H) as a PNG, with axes, numbers and a legend."""
    (L, H), share = scores.shape, scores / scores.sum()
    canvas = Canvas(52 + H * cell + 110, 40 + L * cell + 44)
    canvas.text((52, 10), title, 15)
    draw_map(canvas, 52, 40, share, cell)
    legend(canvas, 52 + H * cell + 18, 40, min(L * cell, 160),
           {part: f"{part * share.max():.1%}" for part in (0, 0.5, 1)})
    save_whole(canvas.picture(), path)


def heat_maps(named, path, side=224):
    """Maps of several models' scores side by side, {title: (L, H)}, and one legend."""
    canvas = Canvas(52 + len(named) * (side + 60) + 90, side + 96)
    for i, (title, scores) in enumerate(named.items()):
        x, cell = 52 + i * (side + 60), side / max(scores.shape)
        canvas.text((x, 10), title, 14)
        draw_map(canvas, x, 48, scores, cell)
    legend(canvas, 52 + len(named) * (side + 60) - 30, 48, 160,
           {0: "0", 0.5: "half", 1: "best head"})
    save_whole(canvas.picture(), path)


# ---- what heads look at, and what they keep ------------------------------------------------------

def panel_of(picture):
    """A page as panels show it: (picture at twice PANEL's width or, of a very tall page, at eight
    times PANEL's height, its scale)."""
    scale = min(2 * PANEL / picture.width, 8 * PANEL / picture.height)
    return picture.resize([max(1, round(scale * side)) for side in picture.size]), scale


def painted(picture, image, shades):
    """A page's panel with the rectangles of its grid tokens laid over it. image: ImageTokens;
    shades: for each of its tokens a colour and how much it covers, from 0 to 255."""
    panel, scale = panel_of(picture)
    layer, mask = panel.copy(), Image.new("L", panel.size, 0)
    draw, cover = ImageDraw.Draw(layer), ImageDraw.Draw(mask)
    for kind, box, (fill, covered) in zip(image.kinds.tolist(), image.boxes.tolist(), shades):
        if kind == GRID and box[2] > box[0] and box[3] > box[1]:
            place = [edge * scale for edge in box[:2]] + [edge * scale - 1 for edge in box[2:]]
            draw.rectangle(place, fill=fill)
            cover.rectangle(place, fill=covered)
    return Image.composite(layer, panel, mask)


def attention_rows(model, inputs, heads, n):
    """{(layer, head): the last n attention rows (n, T) of a Prompt} of some heads."""
    maps = {}

    def attend(layer, q, k, v):                            # (H, T, D), (G, T, D), (G, T, D)
        R = len(q) // len(k)
        for l, h in heads:
            if l == layer:
                logits = attention_logits(q[h:h + 1, -n:], k[h // R:h // R + 1])[0]
                maps[l, h] = (logits / math.sqrt(q.shape[-1])).softmax(-1).cpu()
        return prefill_attention(q, k, v)

    model.hidden_states(inputs, attend)
    return maps


def heads_to_show(scores, visual=3, others=1):
    """(layer, head) of the best head of each of the layers with the best heads, and of the worst
    heads of all."""
    best, order = scores.amax(1), scores.flatten().argsort(descending=True, stable=True).tolist()
    layers = best.argsort(descending=True, stable=True)[:visual].tolist()
    chosen = [(l, int(scores[l].argmax())) for l in layers if best[l] > 0]
    return chosen + [divmod(i, scores.shape[1]) for i in order[::-1][:others]]


@torch.inference_mode()
def show_heads(model, picture, prompt, scores, path, token=0, *, token_ids):
    """Where the best heads of three layers and one of the worst look while an answer, token_ids, is
    written. One scale of colours serves all panels: the largest weight on a patch of them all.

    scores: (L, H); path: a PNG shows the answer's token number `token`, a GIF all of them in turn.
    """
    heads, n = heads_to_show(scores), len(token_ids)
    inputs = prepare(model, [picture], prompt)
    maps = attention_rows(model, inputs.extended(token_ids[:-1]), heads, n)    # row i emits token i
    image, start = inputs.images[0], inputs.starts[0]
    looks = {head: maps[head][:, start:start + len(image)] for head in heads}
    largest = max(rows.max().item() for rows in looks.values()) or 1.0
    written = [i for i in range(n) if token_ids[i] not in model.processor.end_tokens]
    texts = [model.processor.tokenizer.decode(token_ids[:i]) for i in range(n + 1)]
    frames = []
    for i in written if str(path).lower().endswith(".gif") else [min(token, n - 1)]:
        panels = []
        for (l, h), rows in looks.items():
            shades = [(color(0.3 + 0.7 * w / largest), round(210 * min(1, 8 * w / largest)))
                      for w in rows[i].tolist()]
            panels.append((f"layer {l} head {h}, score {scores[l, h] / scores.sum():.1%}",
                           f"{rows[i].sum():.0%} on the image", painted(picture, image, shades)))
        frames.append(arrange(panels, texts[i], texts[i + 1][len(texts[i]):], largest))
    animated = dict(save_all=True, append_images=frames[1:], duration=700, loop=0)
    save_whole(frames[0], path, **(animated if len(frames) > 1 else {}))


def arrange(panels, before, now, largest):
    """A picture of labelled panels, (label, share, picture) each, above them the answer so far, its
    newest characters in red."""
    height = panels[0][2].height // 2
    canvas = Canvas(len(panels) * (PANEL + 12) + 100, height + 112)
    canvas.text((12, 8), f"answer: {before}", 26)
    canvas.text((12 + text_width(f"answer: {before}", 26), 8), now, 26, fill=(200, 0, 0))
    for i, (label, share, panel) in enumerate(panels):
        x = 12 + i * (PANEL + 12)
        canvas.text((x, 48), label, 17)
        canvas.text((x, 72), share, 20, fill=RED)
        canvas.paste(panel, (x, 100))
    legend(canvas, 16 + len(panels) * (PANEL + 12), 100, min(160, height),
           {0: "0 %", 1: f"{largest:.0%}"})
    return canvas.picture()


@torch.inference_mode()
def show_kept(model, picture, prompt, head_scores, budget, path, methods=("snapkv", "sparsemm")):
    """What the KV heads with the highest and the lowest score keep of a page, a row for each
    method: kept patches as they are, evicted ones dark, and the answer that the method gives."""
    inputs, G = prepare(model, [picture], prompt), model.config.kv_heads
    read, s = prefill(model, inputs), kv_head_scores(head_scores, G)
    heads = [divmod(int(i), G) for i in (s.argmax(), s.argmin())]
    image, start = inputs.images[0], inputs.starts[0]
    height, left = panel_of(picture)[0].height // 2, 250
    canvas = Canvas(left + len(heads) * (PANEL + 16), len(methods) * (height + 46) + 6)
    for row, method in enumerate(methods):
        keep = read.keep(Setting(method, budget), {"aligned": head_scores})             # (L, G, T)
        answer = generate(model, [picture], prompt, method, budget, head_scores=head_scores)["text"]
        y = 8 + row * (height + 46)
        for line, (text, size, fill) in enumerate((
                (method, 26, "black"), (f"budget {budget} x {s.numel()} heads", 16, GRAY),
                (prompt, 16, GRAY), (answer, 26, RED))):
            canvas.text((12, y + 34 + 34 * line), text, size, fill)
        for i, (l, g) in enumerate(heads):
            x, held = left + i * (PANEL + 16), keep[l, g]
            shades = [((40, 40, 40), 0 if kept else 195)
                      for kept in held[start:start + len(image)].tolist()]
            canvas.text((x, y), f"layer {l} head {g}: {held.sum()} of {len(held)} kept", 16)
            canvas.paste(painted(picture, image, shades), (x, y + 26))
    save_whole(canvas.picture(), path)


# ---- curves --------------------------------------------------------------------------------------

LINES = ((0, 0, 0), (205, 30, 30), (30, 100, 200), (20, 150, 80), (235, 145, 0), (130, 70, 180),
         (0, 165, 185), (150, 90, 40), (130, 130, 130))                # colours, one for each curve


def mark(canvas, x, y, i, r=4):
    """The mark of curve number i."""
    kind, places = (("ellipse", (x - r, y - r, x + r, y + r)),
                    ("rectangle", (x - r + 1, y - r + 1, x + r - 1, y + r - 1)),
                    ("polygon", (x, y - r - 1, x - r, y + r, x + r, y + r)),
                    ("polygon", (x, y - r - 1, x + r + 1, y, x, y + r + 1, x - r - 1, y)))[i % 4]
    canvas.shape(kind, places, LINES[i % len(LINES)])


def line_charts(panels, path, title, x_label, x_ticks):
    """A PNG of panels side by side, with a common legend. x is logarithmic, y shown as per cent.

    panels: {title of a panel: {name of a curve: [(x, y in [0, 1]), ...]}}; a curve of one point is
    drawn as a dashed line across the panel, the mark to reach.
    """
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    width, height, top, left = 470, 320, 64, 62
    canvas = Canvas(left + len(panels) * (width + 60) + 90, top + height + 60)
    canvas.text((left, 10), title, 17)
    for i, (panel, curves) in enumerate(panels.items()):
        box = (left + i * (width + 60), top, left + i * (width + 60) + width, top + height)
        canvas.text((box[0], top - 22), panel, 13)
        draw_panel(canvas, box, curves, names, x_ticks)
        canvas.text(((box[0] + box[2]) / 2, box[3] + 26), x_label, 12, anchor="mt")
    x = left + len(panels) * (width + 60) - 36
    for i, name in enumerate(names):
        y = top + 10 + 22 * i
        canvas.shape("line", (x, y, x + 26, y), LINES[i % len(LINES)], width=2)
        mark(canvas, x + 13, y, i)
        canvas.text((x + 34, y), name, 12, anchor="lm")
    save_whole(canvas.picture(), path)


def draw_panel(canvas, box, curves, names, x_ticks):
    """Axes and curves of one panel in a box (x0, y0, x1, y1) of the picture."""
    x0, y0, x1, y1 = box
    points = [point for curve in curves.values() for point in curve]
    low_x, high_x = (math.log(f(x for x, _ in points)) for f in (min, max))
    low_y = math.floor(10 * min(y for _, y in points)) / 10
    high_y = max(low_y + 0.1, math.ceil(10 * max(y for _, y in points)) / 10)

    def place(x, y):
        return (x0 + 12 + (math.log(x) - low_x) / max(high_x - low_x, 1e-9) * (x1 - x0 - 24),
                y1 - (y - low_y) / (high_y - low_y) * (y1 - y0))

    canvas.shape("rectangle", box, outline=(90, 90, 90))
    for tick in range(round(10 * low_y), round(10 * high_y) + 1):
        y = place(x_ticks[0], tick / 10)[1]
        canvas.shape("line", (x0, y, x1, y), (225, 225, 225))
        canvas.text((x0 - 6, y), str(10 * tick), 12, anchor="rm")
    for tick in x_ticks:
        x = place(tick, low_y)[0]
        if x0 < x < x1:
            canvas.shape("line", (x, y0, x, y1), (235, 235, 235))
            canvas.text((x, y1 + 6), str(tick), 12, anchor="mt")
    for name, curve in reversed(curves.items()):                          # the first one on top
        i, places = names.index(name), [place(x, y) for x, y in sorted(curve)]
        if len(places) == 1:
            for x in range(round(x0), round(x1), 10):
                canvas.shape("line", (x, places[0][1], x + 5, places[0][1]), LINES[i % len(LINES)])
        else:
            canvas.shape("line", [number for spot in places for number in spot],
                         LINES[i % len(LINES)], width=2)
        for x, y in places:
            mark(canvas, x, y, i)


# ---- the command ---------------------------------------------------------------------------------

def draw(args):
    check_output(args.out, "--out", ".png")
    if args.what == "heads":
        named = {}
        for file in map(Path, args.files):
            name = file.parent.name if file.name == "visual_head_scores.json" else file.stem
            named[name] = read_head_scores(file)
        return heat_maps(named, args.out)
    picture, model = open_image(args.image), load(args.model, args.device, args.dtype)
    scores = find_head_scores(model, args.scores)
    if scores is None:
        raise ValueError(f"--scores: {model.folder} has none; a file of head scores is right")
    show_kept(model, picture, args.prompt, scores, args.budget, args.out)


def main(argv=None):
    parser = OneLineParser(prog="draw.py", description="Draw head scores, or what heads keep.")
    commands = parser.add_subparsers(dest="what", required=True)
    heads = commands.add_parser("heads", help="score files side by side")
    heads.add_argument("files", nargs="+", metavar="FILE")
    kept = commands.add_parser("kept", help="what heads keep of a page")
    kept.add_argument("--image", default=str(Path(__file__).parents[1] / "tiny" / "receipt.png"))
    kept.add_argument("--prompt", default="What is the Rope?")
    kept.add_argument("--budget", type=int, default=64)
    kept.add_argument("--scores", metavar="FILE")
    add_model_arguments(kept)
    for command in (heads, kept):
        command.add_argument("--out", required=True, metavar="PNG")
    parser.run(draw, argv)


if __name__ == "__main__":
    main()
