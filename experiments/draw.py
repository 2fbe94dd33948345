"""Pictures, drawn with Pillow: the heat map of the heads' scores, and what heads look at.

    score_heads.py --heatmap heads.png        heat_map
    sparsemm.py --show-heads look.gif         show_heads
"""

import math

import torch
from PIL import Image, ImageDraw, ImageFont

from model_llava import GRID, prepare
from score_heads import force
from sparsemm import generate

RAMP = ((255, 255, 255), (254, 217, 118), (253, 141, 60), (227, 26, 28), (103, 0, 31))  # low, high


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
    image.save(path)


class RowReader:
    """Stands where a cache would, and keeps the last `rows` attention rows of some heads."""

    def __init__(self, heads, rows):
        self.heads, self.rows, self.layers, self.maps = heads, rows, 0, {}

    def __len__(self):
        return self.layers

    def compress(self, layer, q, k, v):
        """q: (H, T, D), k: (G, T, D), after RoPE. Fills maps[layer, head] = (rows, T)."""
        (H, T, D), G = q.shape, k.shape[0]
        future = torch.ones(self.rows, T, dtype=torch.bool, device=q.device).triu(T - self.rows + 1)
        for l, h in self.heads:
            if l == layer:
                logits = q[h, -self.rows:].float() @ k[h * G // H].float().T / math.sqrt(D)
                self.maps[l, h] = logits.masked_fill(future, -torch.inf).softmax(-1).cpu()
        self.layers += 1


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
def show_heads(model, picture, prompt, scores, path, token=0, count=3, scale=1):
    """Where the best and the worst heads look while the answer is written.

    scores: (L, H); path: a PNG shows the answer's token number `token`, a GIF all of them in turn;
    count: how many heads of either end. Returns the answer."""
    result = generate(model, [picture], prompt, "full")
    ids = result["token_ids"]
    order = scores.flatten().argsort(descending=True, stable=True).tolist()
    heads = [divmod(i, scores.shape[1]) for i in order[:count] + order[-count:]]
    inputs = prepare(model, [picture], prompt)
    reader = RowReader(heads, len(ids))
    model.hidden_states(force(inputs, ids[:-1]), reader)         # row i is of the query emitting i
    image, start = inputs.images[0], inputs.starts[0]
    decode = model.processor.tokenizer.decode
    written = [i for i in range(len(ids)) if ids[i] not in model.processor.end_tokens]
    frames = []
    for i in written if str(path).lower().endswith(".gif") else [min(token, len(ids) - 1)]:
        panels = []
        for l, h in heads:
            weights = reader.maps[l, h][i, start:start + len(image)]
            label = f"layer {l} head {h}: {scores[l, h] / scores.sum():.1%}"
            panels.append((label, overlay(picture, image, weights / weights.max(), scale)))
        frames.append(arrange(panels, count, decode(ids[:i]), decode([ids[i]])))
    if len(frames) > 1:
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=700, loop=0)
    else:
        frames[0].save(path)
    return result["text"]


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
