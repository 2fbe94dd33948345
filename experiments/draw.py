"""Pictures, drawn with Pillow: the scores' heat map, what heads look at, and curves.

    score_heads.py --heatmap heads.png        heat_map
    sparsemm.py --show-heads look.gif         show_heads
    experiments/reproduce.py main             line_charts
"""

import io
import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from model_llava import GRID, prefill_attention, prepare
from score_heads import attention_logits
from sparsemm import write_file

RAMP = ((255, 255, 255), (254, 217, 118), (253, 141, 60), (227, 26, 28), (103, 0, 31))  # low, high


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


def heat_map(scores, path, title="visual scores of the heads", cell=16):
    """A layer x head map of scores (L, H) as a PNG, with axes, numbers and a legend."""
    (L, H), top, left = scores.shape, 40, 52
    share = scores / scores.sum()
    image = Image.new("RGB", (left + H * cell + 110, top + L * cell + 44), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    draw.text((left, 10), title, font=ImageFont.load_default(15), fill="black")
    for l in range(L):
        for h in range(H):
            x, y = left + h * cell, top + l * cell
            draw.rectangle((x, y, x + cell - 2, y + cell - 2),
                           fill=color(share[l, h] / share.max()), outline=(225, 225, 225))
    every = 1 if max(L, H) <= 12 else 4
    for l in range(0, L, every):
        draw.text((left - 6, top + l * cell + cell / 2), str(l), font=font, fill="black",
                  anchor="rm")
    for h in range(0, H, every):
        draw.text((left + h * cell + cell / 2, top + L * cell + 4), str(h), font=font, fill="black",
                  anchor="mt")
    draw.text((left + H * cell / 2, top + L * cell + 24), "query head", font=font, fill="black",
              anchor="mt")
    draw.text((4, top - 16), "layer", font=font, fill="black")
    x, height = left + H * cell + 18, min(L * cell, 160)
    for y in range(height):
        draw.line((x, top + y, x + 14, top + y), fill=color(1 - y / height))
    for part in (0, 0.5, 1):
        draw.text((x + 20, top + (1 - part) * height), f"{part * share.max():.1%}", font=font,
                  fill="black", anchor="lm")
    save_whole(image, path)


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


def overlay(picture, image, weights, scale):
    """The picture, enlarged, with each grid token's box coloured by its weight.

    image: ImageTokens; weights: (tokens of the image,) in [0, 1]."""
    picture = picture.resize((picture.width * scale, picture.height * scale)).convert("RGB")
    layer, mask = picture.copy(), Image.new("L", picture.size, 0)
    draw, shade = ImageDraw.Draw(layer), ImageDraw.Draw(mask)
    for kind, box, weight in zip(image.kinds.tolist(), image.boxes.tolist(), weights.tolist()):
        if kind == GRID and box[2] > box[0] and box[3] > box[1] and weight > 0.02:
            corners = [edge * scale for edge in box]
            draw.rectangle(corners, fill=color(0.35 + 0.65 * weight))
            shade.rectangle(corners, fill=round(60 + 120 * weight))
    return Image.composite(layer, picture, mask)


@torch.inference_mode()
def show_heads(model, picture, prompt, scores, path, token=0, *, token_ids, count=3, scale=1):
    """Where the best and the worst heads look while an answer, token_ids, is written.

    scores: (L, H); path: a PNG shows the answer's token number `token`, a GIF all of them in turn;
    count: how many heads of either end."""
    ids = token_ids
    order = scores.flatten().argsort(descending=True, stable=True).tolist()
    heads = [divmod(i, scores.shape[1]) for i in order[:count] + order[-count:]]
    inputs = prepare(model, [picture], prompt)
    maps = attention_rows(model, inputs.extended(ids[:-1]), heads, len(ids))   # row i emits token i
    image, start = inputs.images[0], inputs.starts[0]
    decode = model.processor.tokenizer.decode
    written = [i for i in range(len(ids)) if ids[i] not in model.processor.end_tokens]
    frames = []
    for i in written if str(path).lower().endswith(".gif") else [min(token, len(ids) - 1)]:
        panels = []
        for l, h in heads:
            weights = maps[l, h][i, start:start + len(image)]
            label = f"layer {l} head {h}: {scores[l, h] / scores.sum():.1%}"
            panels.append((label, overlay(picture, image, weights / weights.max(), scale)))
        frames.append(arrange(panels, count, decode(ids[:i]), decode([ids[i]])))
    animated = dict(save_all=True, append_images=frames[1:], duration=700, loop=0)
    save_whole(frames[0], path, **(animated if len(frames) > 1 else {}))


def arrange(panels, count, before, now):
    """A picture of labelled panels: the visual heads, then the others, above them the answer."""
    width, height = panels[0][1].size
    width = max(width, 190)
    image = Image.new("RGB", (len(panels) * (width + 10) + 20, height + 64), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    x = 10
    draw.text((x, 6), f"answer so far: {before}", font=font, fill="black")
    x += font.getlength(f"answer so far: {before}")
    draw.text((x, 6), now, font=font, fill=(200, 0, 0))
    for i, (label, panel) in enumerate(panels):
        x = 10 + i * (width + 10) + (10 if i >= count else 0)
        draw.text((x, 26), "visual head" if i < count else "other head", font=font,
                  fill=(150, 0, 0) if i < count else (90, 90, 90))
        draw.text((x, 42), label, font=font, fill="black")
        image.paste(panel, (x, 60))
    return image


# ---- curves --------------------------------------------------------------------------------------

LINES = ((0, 0, 0), (205, 30, 30), (30, 100, 200), (20, 150, 80), (235, 145, 0), (130, 70, 180),
         (0, 165, 185), (150, 90, 40), (130, 130, 130))                # colours, one for each curve
MARKS = 4                                                               # circle, square, ...


def mark(draw, x, y, i, radius=5):
    """The mark of curve number i."""
    fill, r = LINES[i % len(LINES)], radius
    if i % MARKS == 0:
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif i % MARKS == 1:
        draw.rectangle((x - r + 1, y - r + 1, x + r - 1, y + r - 1), fill=fill)
    elif i % MARKS == 2:
        draw.polygon(((x, y - r - 1), (x - r, y + r), (x + r, y + r)), fill=fill)
    else:
        draw.polygon(((x, y - r - 1), (x + r + 1, y), (x, y + r + 1), (x - r - 1, y)), fill=fill)


def line_charts(panels, path, title, x_label, x_ticks):
    """A PNG of panels side by side, with a common legend. x is logarithmic, y shown as per cent.

    panels: {title of a panel: {name of a curve: [(x, y in [0, 1]), ...]}}; a curve of one point is
    drawn as a dashed line across the panel, the mark to reach.
    """
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    width, height, top, left = 470, 320, 64, 62
    image = Image.new("RGB", (left + len(panels) * (width + 60) + 90, top + height + 60), "white")
    draw, small = ImageDraw.Draw(image), ImageFont.load_default(12)
    draw.text((left, 10), title, font=ImageFont.load_default(17), fill="black")
    for i, (panel, curves) in enumerate(panels.items()):
        box = (left + i * (width + 60), top, left + i * (width + 60) + width, top + height)
        draw.text((box[0], top - 22), panel, font=ImageFont.load_default(13), fill="black")
        draw_panel(draw, box, curves, names, x_ticks, small)
        draw.text(((box[0] + box[2]) / 2, box[3] + 26), x_label, font=small, fill="black",
                  anchor="mt")
    x = left + len(panels) * (width + 60) - 36
    for i, name in enumerate(names):
        y = top + 10 + 22 * i
        draw.line((x, y, x + 26, y), fill=LINES[i % len(LINES)], width=2)
        mark(draw, x + 13, y, i)
        draw.text((x + 34, y), name, font=small, fill="black", anchor="lm")
    save_whole(image, path)


def draw_panel(draw, box, curves, names, x_ticks, font):
    """Axes and curves of one panel in a box (x0, y0, x1, y1) of the picture."""
    x0, y0, x1, y1 = box
    points = [point for curve in curves.values() for point in curve]
    low_x, high_x = (math.log(f(x for x, _ in points)) for f in (min, max))
    low_y = math.floor(10 * min(y for _, y in points)) / 10
    high_y = max(low_y + 0.1, math.ceil(10 * max(y for _, y in points)) / 10)

    def place(x, y):
        return (x0 + 12 + (math.log(x) - low_x) / max(high_x - low_x, 1e-9) * (x1 - x0 - 24),
                y1 - (y - low_y) / (high_y - low_y) * (y1 - y0))

    draw.rectangle(box, outline=(90, 90, 90))
    for tick in range(round(10 * low_y), round(10 * high_y) + 1):
        y = place(x_ticks[0], tick / 10)[1]
        draw.line((x0, y, x1, y), fill=(225, 225, 225))
        draw.text((x0 - 6, y), str(10 * tick), font=font, fill="black", anchor="rm")
    for tick in x_ticks:
        x = place(tick, low_y)[0]
        if not x0 < x < x1:
            continue
        draw.line((x, y0, x, y1), fill=(235, 235, 235))
        draw.text((x, y1 + 6), str(tick), font=font, fill="black", anchor="mt")
    for name, curve in reversed(curves.items()):                          # the first one on top
        i, places = names.index(name), [place(x, y) for x, y in sorted(curve)]
        if len(places) == 1:
            for x in range(round(x0), round(x1), 10):
                draw.line((x, places[0][1], x + 5, places[0][1]), fill=LINES[i % len(LINES)])
        else:
            draw.line(places, fill=LINES[i % len(LINES)], width=2)
        for x, y in places:
            mark(draw, x, y, i, radius=4)
