"""The models, from scratch: LLaVA-NeXT (Vicuna, Mistral) and Qwen2-VL, from pixels to logits.

    image  --> vision tower --> projector --> image tokens --.
                                                             v
    prompt --> tokenizer --> ids ----------> [ text | image tokens | text ] --> decoder --> logits
                                                                                  ^
                                                      attend(layer, q, k, v), given by the caller

Both families share one decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU. The
decoder knows nothing of caches: each layer calls `attend`, a function that its caller provides. The
simplest is no_cache; sparsemm.py's own compresses, and decodes from what it kept. The families
differ in the vision tower, and in how an image becomes a row of tokens:

    LLaVA-NeXT  CLIP sees square tiles. First comes a thumbnail of the whole image, then the token
                rows across all tiles, without padding, a learned newline token behind each row.
                (Liu et al. 2024, "LLaVA-NeXT: Improved reasoning, OCR, and world knowledge")
    Qwen2-VL    A ViT with 2-D rotary positions sees the image at its own size. 2 x 2 patches become
                one token, and the decoder's positions have three axes, M-RoPE.
                (Wang et al. 2024, arXiv 2409.12191)

For every image token we know the rectangle of the original image that it shows (ImageTokens.boxes).
transformers supplies tokenizer, image processor and config classes, and no part of the models.

Letters: L layers, H query heads, G KV heads, R = H/G, T tokens, D head size, E width of the
decoder, V width of the vision tower, P its patches (CLIP: of one tile), S side of a tile in pixels.
"""

import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import safe_open
from torch import nn
from tqdm import tqdm

from cache import reading

THUMBNAIL, GRID, NEWLINE = 0, 1, 2          # the kinds of image tokens; Qwen2-VL has only GRID
MLP_SLICE = 4096                            # so many tokens of a prompt go through an MLP at once
PARTS = 32                                  # of a product of one row, see Linear


# ---- configuration -------------------------------------------------------------------------------

@dataclass
class Config:
    """What the forward pass needs to know of a checkpoint's config.json."""
    family: str                     # "llava_next" or "qwen2_vl"
    layers: int                     # L
    heads: int                      # H
    kv_heads: int                   # G
    head_dim: int                   # D
    width: int                      # E
    mlp_width: int
    vocabulary: int
    rms_eps: float
    rope_theta: float
    mrope_section: tuple            # how many of the D/2 frequencies turn with time, row, column
    qkv_bias: bool
    tied: bool                      # the output embedding is the input embedding
    max_tokens: int                 # longer prompts would need sliding attention, not built here
    trained_tokens: int             # the model was trained on prompts up to here
    image_token: int                # the id that marks the place of an image
    dtype: torch.dtype              # of the checkpoint
    vision: object                  # transformers' config of the vision tower
    full: object                    # transformers' config, all of it


def read_config(folder):
    """config.json of a checkpoint -> Config. transformers' config classes know the defaults that a
    file leaves out. Raises ValueError for a model that is not built here."""
    from transformers import CONFIG_MAPPING
    with reading("config.json"):
        raw = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        family = raw.get("model_type")
        if family not in MODELS or raw.get("quantization_config"):
            family = f"quantized {family}" if raw.get("quantization_config") else family
            raise ValueError(f"is of a {family}: must be {' or '.join(MODELS)}, not quantized")
        return convert_config(CONFIG_MAPPING[family].from_dict(raw), family)


def convert_config(c, family):
    """transformers' config object -> Config. Raises ValueError for what is not built here."""
    text, vision, rope = c.text_config, c.vision_config, c.text_config.rope_parameters
    D = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    qwen, needed = family == "qwen2_vl", [            # what, its value, which values are built here
        ("text model_type", text.model_type, ("llama", "mistral", "qwen2_vl_text")),
        ("text hidden_act", text.hidden_act, ("silu",)),
        ("rope_type", rope["rope_type"], ("default",)),
        ("attention_bias", getattr(text, "attention_bias", False), (False,)),
        ("vision hidden_act", vision.hidden_act, ("quick_gelu",))]
    if qwen:
        sections, image_token = tuple(rope["mrope_section"]), c.image_token_id
        needed += [("mrope_section", (len(sections), sum(sections)), [(3, D // 2)])]
    else:
        sections, image_token, depth = (D // 2, 0, 0), c.image_token_index, vision.num_hidden_layers
        sides = {side for size in c.image_grid_pinpoints for side in size} or {1}
        needed += [
            ("projector_hidden_act", c.projector_hidden_act, ("gelu",)),
            ("vision_feature_select_strategy", c.vision_feature_select_strategy, ("default",)),
            ("vision_feature_layer", c.vision_feature_layer, range(-depth - 1, depth + 1)),
            ("remainder of image_grid_pinpoints by image_size",
             max(side % vision.image_size for side in sides), (0,))]
    for what, value, possible in needed:
        if value not in possible:
            raise ValueError(f"{what} is {value}: must be in {possible}, nothing else is built")
    return Config(
        family, text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads, D,
        text.hidden_size, text.intermediate_size, text.vocab_size, text.rms_norm_eps,
        rope["rope_theta"], sections, qkv_bias=qwen, tied=c.tie_word_embeddings,
        max_tokens=getattr(text, "sliding_window", None) or sys.maxsize,
        trained_tokens=text.max_position_embeddings, image_token=image_token,
        dtype=c.dtype or text.dtype or torch.float32, vision=vision, full=c)


# ---- the decoder ---------------------------------------------------------------------------------

class Linear(nn.Linear):
    """x W^T + b, with two detours on a CPU. Decoding multiplies one row, which in float32 MKL does
    on one core of an AMD CPU, so we split the product into PARTS. If the CPU has no units for half
    precision, we multiply many rows in float32, which is faster there."""

    def forward(self, x):                                                    # (..., n) -> (..., m)
        W, b, half = self.weight, self.bias, self.weight.dtype != torch.float32
        if half and not W.is_cuda and x.numel() > 16 * x.shape[-1] and not has_units(W.dtype):
            return F.linear(x.float(), W.float(), None if b is None else b.float()).to(x.dtype)
        if not half and torch.get_num_threads() > 1 and x.numel() == x.shape[-1] \
                and not W.is_cuda and len(W) % PARTS == 0:
            out = torch.bmm(x.expand(PARTS, 1, -1), W.view(PARTS, -1, W.shape[1]).mT)
            out = out.view(*x.shape[:-1], -1)
            return out if b is None else out + b
        return F.linear(x, W, b)


@lru_cache
def has_units(dtype):
    """Whether the CPU has matrix instructions for a half-precision dtype."""
    kind, found = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype], getattr(
        torch.cpu, "get_capabilities", dict)()
    return found.get(f"amx_{kind}", False) or found.get(f"avx512_{kind}", False)


def rotary_angles(positions, c):
    """cos, sin (T, D) float32, for `rotate`, of positions (3, T): time, row and column of every
    token.

    M-RoPE (Qwen2-VL, section 2.1): each frequency turns with one of the three axes. Text has the
    same position on all three, which makes it ordinary RoPE (arXiv 2104.09864). In LLaVA-NeXT all
    frequencies turn with the first axis."""
    frequency, axis = rotary_frequencies(c.rope_theta, c.head_dim, tuple(c.mrope_section),
                                         positions.device)
    return both_halves(positions.float()[axis].T * frequency)                             # (T, D/2)


@lru_cache
def rotary_frequencies(theta, D, sections, device):
    """The D/2 frequencies, and which of the three axes each turns with."""
    frequency = 1.0 / theta ** (torch.arange(0, D, 2, device=device).float() / D)
    axes = [axis for axis, share in enumerate(sections) for _ in range(share)]
    return frequency, torch.tensor(axes, device=device)


def both_halves(angles):
    """angles (T, D/2) -> cos, sin (T, D); sin already carries the minus sign of `rotate`."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, cos, sin):
    """Rotary positions: x (heads, T, D) turned by cos, sin (T, D). The first half of D is paired
    with the second half: (a, b) -> (a cos - b sin, b cos + a sin)."""
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin)


def prefill_attention(q, k, v):
    """Causal attention over a whole prompt, one KV head at a time with its R query heads. q: (H, T,
    D); k, v: (G, T, D). Returns (H, T, D). The fused kernel never holds a T x T matrix, and has
    float32 logits in every dtype."""
    R, out = len(q) // len(k), []
    for g in range(len(k)):
        k_g, v_g = (x[None, g, None].expand(1, R, -1, -1) for x in (k, v))           # (1, R, T, D)
        out.append(F.scaled_dot_product_attention(q[None, g * R:(g + 1) * R], k_g, v_g,
                                                  is_causal=True)[0])
    return torch.cat(out)


def no_cache(layer, q, k, v):
    """The simplest `attend`: a whole prompt, and nothing kept of it."""
    return prefill_attention(q, k, v)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.D, H, G = c.head_dim, c.heads, c.kv_heads
        self.q_proj = Linear(c.width, H * self.D, bias=c.qkv_bias)
        self.k_proj = Linear(c.width, G * self.D, bias=c.qkv_bias)
        self.v_proj = Linear(c.width, G * self.D, bias=c.qkv_bias)
        self.o_proj = Linear(H * self.D, c.width, bias=False)

    def forward(self, x, cos, sin, layer, attend):                              # (T, E) -> (T, E)
        q, k, v = (project(x).view(len(x), -1, self.D).transpose(0, 1)       # (H or G, T, D) each
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = attend(layer, q, k, v)                                                  # (H, T, D)
        return self.o_proj(mixed.transpose(0, 1).flatten(1))                 # (T, H*D) -> (T, E)


class MLP(nn.Module):                                                # SwiGLU (arXiv 2002.05202)
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.width, c.mlp_width, bias=False)
        self.up_proj = Linear(c.width, c.mlp_width, bias=False)
        self.down_proj = Linear(c.mlp_width, c.width, bias=False)

    def forward(self, x):                                                       # (T, E) -> (T, E)
        if len(x) > MLP_SLICE:                              # to bound the memory of a long prompt
            return torch.cat([self(part) for part in x.split(MLP_SLICE)])
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.width, c.rms_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.width, c.rms_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, layer, attend):                              # (T, E) -> (T, E)
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layer, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocabulary, c.width)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.width, c.rms_eps)

    def forward(self, x, positions, attend):
        """x: (T, E) embeddings of tokens and images; positions: (3, T). Returns (T, E). All that
        the decoder knows of attention is attend(layer, q, k, v) -> (H, T, D), with q (H, T, D), k
        and v (G, T, D), after RoPE."""
        cos, sin = (angle.to(x.dtype) for angle in rotary_angles(positions, self.config))
        for l, layer in enumerate(self.layers):
            x = layer(x, cos, sin, l, attend)
        return self.norm(x)


# ---- what both families share --------------------------------------------------------------------

@dataclass
class ImageTokens:
    """The tokens of one image, in the order in which the decoder sees them."""
    size: tuple                 # (height, width) of the original image, in pixels
    grid: tuple                 # (rows, columns) of the GRID tokens
    kinds: torch.Tensor         # (n,) THUMBNAIL, GRID or NEWLINE
    boxes: torch.Tensor         # (n, 4) float64: x0, y0, x1, y1 in pixels of the original image;
                                # a newline's are all 0

    def __len__(self):
        return len(self.kinds)


@dataclass
class Prompt:
    """A prompt as the decoder takes it, and where its images are."""
    ids: torch.Tensor           # (T,) token ids; those of images are all config.image_token
    positions: torch.Tensor     # (3, T)
    pixels: list                # for each image, what the vision tower takes
    images: list                # for each image, its ImageTokens ...
    starts: list                # ... and where in ids they start

    image_tokens = property(lambda self: sum(map(len, self.images)))
    next_position = property(lambda self: int(self.positions.max()) + 1)      # of text behind it

    def extended(self, ids):
        """The prompt with further text after it, token ids (n,)."""
        new, first = self.ids.new_tensor(ids), self.next_position
        positions = torch.arange(first, first + len(ids)).to(self.positions).expand(3, -1)
        return replace(self, ids=torch.cat([self.ids, new]),
                       positions=torch.cat([self.positions, positions], dim=1))


class VisionLanguageModel(nn.Module):
    """What LlavaNext and Qwen2VL share. Each adds three functions of an image: `image_layout`
    (which token shows what), `encode_image` (pixels to embeddings) and `image_positions`."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.decoder = Decoder(c)
        self.lm_head = Linear(c.width, c.vocabulary, bias=False)

    device = property(lambda self: self.lm_head.weight.device)
    dtype = property(lambda self: self.lm_head.weight.dtype)

    def embed(self, prompt):
        """Embeddings (T, E) of a prompt, with its images in their places."""
        x = self.decoder.embed_tokens(prompt.ids)
        for pixels, image, start in zip(prompt.pixels, prompt.images, prompt.starts):
            x[start:start + len(image)] = self.encode_image(pixels, image)
        return x

    def hidden_states(self, prompt, attend=no_cache):
        """The decoder's output (T, E) for a whole prompt."""
        return self.decoder(self.embed(prompt), prompt.positions, attend)

    def logits(self, hidden):                                        # (..., E) -> (..., vocabulary)
        return self.lm_head(hidden)

    def decode(self, token, position, attend):
        """The logits (vocabulary,) after one more text token, which stands at `position` on all
        three axes. token, position: numbers, or tensors (1,)."""
        x = self.decoder.embed_tokens(torch.as_tensor(token, device=self.device).view(1))   # (1, E)
        positions = torch.as_tensor(position, device=self.device).expand(3, 1)
        return self.logits(self.decoder(x, positions, attend))[0]

    def check_length(self, T, new):
        """Raises ValueError if T prompt tokens and `new` ones exceed the sliding window. Notes if
        they exceed what the model was trained on."""
        total, c = T + new, self.config
        if total > c.max_tokens:
            raise ValueError(f"{total} tokens: must fit the sliding window of {c.max_tokens}")
        if total > c.trained_tokens:
            note(f"prompt and answer may exceed the {c.trained_tokens:,} tokens of training")

    def positions(self, T, images, starts):
        """Positions (3, T): text counts up by one on all axes; an image takes its image_positions,
        and the text after it goes on behind them."""
        parts, position, done = [], 0, 0
        for image, start in [*zip(images, starts), (None, T)]:
            parts.append(torch.arange(position, position + start - done).expand(3, -1))
            position += start - done
            if image:
                within, taken = self.image_positions(image)
                parts.append(within + position)
                position, done = position + taken, start + len(image)
        return torch.cat(parts, dim=1)


@lru_cache
def note(text):
    """Prints a remark to stderr, once."""
    print(f"note: {' '.join(text.split())}", file=sys.stderr)


def quick_gelu(x):
    """x * sigmoid(1.702 * x), in a single new piece of memory."""
    return (1.702 * x).sigmoid_().mul_(x)


def cell_boxes(rows, columns, cell, size, corner=(0.0, 0.0)):
    """Boxes (rows, columns, 4) float64 of a grid of cells, x0, y0, x1, y1. cell: (height, width) of
    one; corner: (y, x) of the first; size: (height, width) of the image they are cut at."""
    y = (torch.arange(rows + 1, dtype=torch.float64) * cell[0] + corner[0]).clamp(0, size[0])
    x = (torch.arange(columns + 1, dtype=torch.float64) * cell[1] + corner[1]).clamp(0, size[1])
    y0, x0 = torch.meshgrid(y[:-1], x[:-1], indexing="ij")
    y1, x1 = torch.meshgrid(y[1:], x[1:], indexing="ij")
    return torch.stack([x0, y0, x1, y1], dim=-1)


# ---- LLaVA-NeXT ----------------------------------------------------------------------------------

class CLIPLayer(nn.Module):                          # pre-norm, full attention within each tile
    def __init__(self, v):
        super().__init__()
        V, wide = v.hidden_size, v.intermediate_size
        self.num_heads = v.num_attention_heads
        self.layer_norm1 = nn.LayerNorm(V, v.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(V, v.layer_norm_eps)
        self.self_attn = nn.ModuleDict({name: Linear(V, V) for name in
                                        ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.mlp = nn.ModuleDict(dict(fc1=Linear(V, wide), fc2=Linear(wide, V)))

    def forward(self, x):                                             # (tiles, P, V) -> the same
        y, attn = self.layer_norm1(x), self.self_attn
        q, k, v = (project(y).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                   for project in (attn.q_proj, attn.k_proj, attn.v_proj))  # (tiles, heads, P, D)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + attn.out_proj(mixed)
        return x + self.mlp.fc2(quick_gelu(self.mlp.fc1(self.layer_norm2(x))))


class CLIP(nn.Module):
    """CLIP's image encoder (arXiv 2103.00020), as far as LLaVA uses it."""

    def __init__(self, v):
        super().__init__()
        V, side = v.hidden_size, v.image_size // v.patch_size
        self.embeddings = nn.ModuleDict(dict(
            patch_embedding=nn.Conv2d(3, V, v.patch_size, v.patch_size, bias=False),
            position_embedding=nn.Embedding(1 + side * side, V)))
        self.embeddings.class_embedding = nn.Parameter(torch.zeros(V))
        self.pre_layrnorm = nn.LayerNorm(V, v.layer_norm_eps)          # so spelled in checkpoints
        layers = nn.ModuleList(CLIPLayer(v) for _ in range(v.num_hidden_layers))
        self.encoder = nn.ModuleDict(dict(layers=layers))
        self.post_layernorm = nn.LayerNorm(V, v.layer_norm_eps)        # there, but not in use

    def forward(self, tiles, hidden_state):
        """tiles: (n, 3, S, S) -> (n, 1 + P, V), the class token first. hidden_state: which of the
        1 + layers states, negative from the end; 0 is what enters the first layer."""
        x = self.embeddings.patch_embedding(tiles).flatten(2).transpose(1, 2)            # (n, P, V)
        x = torch.cat([self.embeddings.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = self.pre_layrnorm(x + self.embeddings.position_embedding.weight)
        layers = self.encoder.layers
        for layer in layers[:range(len(layers) + 1)[hidden_state]]:
            x = layer(x)
        return x


def fitted_size(size, best):
    """The (height, width) to which an image is resized to fit into `best`, in its aspect ratio."""
    down, across = best[0] / size[0], best[1] / size[1]
    if across < down:
        return min(math.ceil(size[0] * across), best[0]), best[1]
    return best[0], min(math.ceil(size[1] * down), best[1])


def unpadded(rows, columns, size):
    """Two slices, rows and columns: the part of a grid that shows the image, not the padding."""
    height, width = size
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(padding, rows - padding), slice(0, columns)
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(0, rows), slice(padding, columns - padding)


class LlavaNext(VisionLanguageModel):
    def __init__(self, c):
        super().__init__(c)
        self.S = c.vision.image_size
        self.side = c.vision.image_size // c.vision.patch_size          # tokens along a tile's side
        self.image_newline = nn.Parameter(torch.zeros(c.width))
        self.vision_tower = CLIP(c.vision)
        self.multi_modal_projector = nn.ModuleDict(dict(
            linear_1=Linear(c.vision.hidden_size, c.width, bias=c.full.multimodal_projector_bias),
            linear_2=Linear(c.width, c.width, bias=c.full.multimodal_projector_bias)))

    def tile_grid(self, size):
        """Anyres: the (height, width) that an image of the given size is fitted to (transformers'
        choice among the pinpoints), and how many tiles that has down and across."""
        from transformers.image_processing_utils import select_best_resolution
        best = select_best_resolution(size, self.config.full.image_grid_pinpoints)
        return best, best[0] // self.S, best[1] // self.S

    def image_layout(self, size, processed):
        """ImageTokens of an image of the given size. The image processor resizes the image, keeping
        its aspect ratio, centres it in its best resolution, and cuts that into tiles. We undo this
        to learn what a cell of the grid shows. Example: tiles of S = 336 pixels, cells of 14, an
        image of 1,344 x 896 pixels (width x height), whose best resolution is 672 x 672:

             0                   672     scale    1344 / 672 = 2 original pixels a pixel
           0 .-------------------.       resized  to 672 x 448
             |      padding      |       corner   (672 - 448) / 2 = 112 rows of padding: y = -224
         112 |-------------------|       cells    48 x 48, of which rows 8 to 39 show the image:
             | image: 672 x 448  |                32 x 48, and a newline behind each row
         560 |-------------------|       first    cell shows x 0 to 28, y 0 to 28
             |      padding      |       tokens   576 (thumbnail) + 32 * (48 + 1) = 2,144
         672 '-------------------'
        """
        s, patch = self.side, self.config.vision.patch_size
        best, down, across = self.tile_grid(size)
        inner = fitted_size(size, best)
        scale = size[0] / inner[0], size[1] / inner[1]                # original / resized, (y, x)
        corner = [-((best[i] - inner[i]) // 2) * scale[i] for i in (0, 1)]        # of the padding
        grid = cell_boxes(down * s, across * s, [patch * f for f in scale], size, corner)
        grid = grid[unpadded(down * s, across * s, size)]                              # (r, c, 4)
        r, c = grid.shape[:2]
        newline = torch.zeros(r, 1, 4, dtype=torch.float64)                # shows nothing: no area
        thumbnail = cell_boxes(s, s, [size[0] / s, size[1] / s], size).flatten(0, 1)
        boxes = torch.cat([thumbnail, torch.cat([grid, newline], dim=1).flatten(0, 1)])
        kinds = torch.tensor([THUMBNAIL] * (s * s) + ([GRID] * c + [NEWLINE]) * r)
        return ImageTokens(size, (r, c), kinds, boxes)

    def encode_image(self, tiles, image):
        """Embeddings (len(image), E) of tiles (1 + n, 3, S, S), the thumbnail first."""
        s, projector = self.side, self.multi_modal_projector
        x = self.vision_tower(tiles, self.config.full.vision_feature_layer)[:, 1:]  # (1+n, P, V)
        x = projector.linear_2(F.gelu(projector.linear_1(x)))                          # (1+n, P, E)
        _, down, across = self.tile_grid(image.size)
        grid = x[1:].view(down, across, s, s, -1).transpose(1, 2)         # (down, s, across, s, E)
        grid = grid.reshape(down * s, across * s, -1)[unpadded(down * s, across * s, image.size)]
        newline = self.image_newline.expand(len(grid), 1, -1)
        return torch.cat([x[0], torch.cat([grid, newline], dim=1).flatten(0, 1)])

    def image_positions(self, image):
        """Positions (3, n) of an image's tokens, from 0, and how many positions they take."""
        return torch.arange(len(image)).expand(3, -1), len(image)


# ---- Qwen2-VL ------------------------------------------------------------------------------------

class QwenVisionBlock(nn.Module):           # pre-norm, full attention over one image's patches
    def __init__(self, v):
        super().__init__()
        V, wide = v.embed_dim, int(v.embed_dim * v.mlp_ratio)
        self.num_heads = v.num_heads
        self.norm1, self.norm2 = nn.LayerNorm(V, 1e-6), nn.LayerNorm(V, 1e-6)
        self.attn = nn.ModuleDict(dict(qkv=Linear(V, 3 * V), proj=Linear(V, V)))
        self.mlp = nn.ModuleDict(dict(fc1=Linear(V, wide), fc2=Linear(wide, V)))

    def forward(self, x, cos, sin):                                             # (P, V) -> (P, V)
        qkv = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(1, 2, 0, 3)                                           # (heads, P, D)
        q, k = (rotate(y.float(), cos, sin).to(x.dtype) for y in (q, k))
        mixed = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        x = x + self.attn.proj(mixed.transpose(0, 1).flatten(1))
        return x + self.mlp.fc2(quick_gelu(self.mlp.fc1(self.norm2(x))))


class QwenVision(nn.Module):
    """Qwen2-VL's ViT and the merger behind it. Patches come in the merger's order: the four of
    one token are consecutive."""

    def __init__(self, v):
        super().__init__()
        V, merged = v.embed_dim, v.embed_dim * v.spatial_merge_size ** 2
        kernel = (v.temporal_patch_size, v.patch_size, v.patch_size)
        self.config = v
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv3d(3, V, kernel, kernel, bias=False)))
        self.blocks = nn.ModuleList(QwenVisionBlock(v) for _ in range(v.depth))
        self.merger = nn.ModuleDict(dict(ln_q=nn.LayerNorm(V, 1e-6), mlp=nn.Sequential(
            Linear(merged, merged), nn.GELU(), Linear(merged, v.hidden_size))))

    def forward(self, patches, rows, columns):
        """patches: (P, 3 * 2 * p * p) of an image of rows x columns tokens, repeated for the two
        frames that a patch spans -> (rows * columns, E)."""
        x = patches @ self.patch_embed.proj.weight.flatten(1).T   # (P, V): with kernel = stride a
                                                                  # convolution is one product
        cos, sin = self.rotary_angles(rows, columns, x.device)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.merger.mlp(self.merger.ln_q(x).view(rows * columns, -1))  # (P, V) -> (P/4, 4*V)

    def rotary_angles(self, rows, columns, device):
        """cos, sin (P, D) for `rotate`: half of the frequencies turn with the patch's row, half
        with its column."""
        m, D = self.config.spatial_merge_size, self.config.embed_dim // self.config.num_heads
        y, x = torch.meshgrid(torch.arange(rows * m), torch.arange(columns * m), indexing="ij")
        yx = torch.stack([y, x], dim=-1).view(rows, m, columns, m, 2)
        yx = yx.transpose(1, 2).reshape(-1, 2, 1).to(device)                            # (P, 2, 1)
        frequency = 1.0 / 10000.0 ** (torch.arange(0, D // 2, 2, device=device).float() / (D // 2))
        return both_halves((yx * frequency).flatten(1))                                   # (P, D/2)


class Qwen2VL(VisionLanguageModel):
    def __init__(self, c):
        super().__init__(c)
        self.visual = QwenVision(c.vision)

    def image_layout(self, size, processed):
        """ImageTokens of an image of the given size. The image processor resizes the image to a
        whole number of tokens on either axis, so that a token's box need not be square."""
        merge = self.config.vision.spatial_merge_size
        rows, columns = (processed["image_grid_thw"][0, 1:] // merge).tolist()
        boxes = cell_boxes(rows, columns, [size[0] / rows, size[1] / columns], size).flatten(0, 1)
        return ImageTokens(size, (rows, columns), torch.full((rows * columns,), GRID), boxes)

    def encode_image(self, patches, image):
        """Embeddings (len(image), E) of patches (P, 3 * 2 * p * p)."""
        return self.visual(patches, *image.grid)

    def image_positions(self, image):
        """Positions (3, n) of an image's tokens, from 0, and how many positions they take: the
        time axis is constant, the others are row and column. An image takes as many positions as
        its longer side has tokens, so that the text after it shares none of them."""
        rows, columns = image.grid
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        return torch.stack([torch.zeros_like(y), y, x]).flatten(1), max(rows, columns)


# ---- loading -------------------------------------------------------------------------------------

MODELS = {"llava_next": LlavaNext, "qwen2_vl": Qwen2VL}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Tensors have three spellings: on the hub, as transformers 5 saves them, and in its memory. These
# replacements, in this order, give our names.
NAMES = ((r"^(model\.|language_model\.)+", ""),
         (r"^(?=embed_tokens|layers|norm)", "decoder."),
         (r"^vision_tower\.vision_model\.", "vision_tower."))
OLD_BUFFERS = re.compile(r"(position_ids|rotary_emb\.inv_freq)$")      # constants in some old files


def hub_name(key):
    """A tensor's name in a checkpoint -> its name here."""
    for spelling, ours in NAMES:
        key = re.sub(spelling, ours, key)
    return key


def load(name, device="auto", dtype="auto"):
    """A model, ready to use, with its `folder`, `name`, `processor` and `load_seconds`. name: a
    checkpoint's folder, or its id on the Hugging Face hub; device: "auto" takes CUDA if there is
    one; dtype: "auto" is float32 on a CPU and the checkpoint's own on CUDA. Raises ValueError for
    whatever is wrong with the checkpoint."""
    from transformers.utils import logging
    logging.set_verbosity_error()
    start = time.perf_counter()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with reading(f"--device {device}"):
        device = torch.empty(0, device=device).device
    with reading(f"--model {name}"):
        folder = find_folder(name)
        config = read_config(folder)
        if dtype == "auto":
            dtype = "float32" if device.type == "cpu" else config.dtype
        with torch.device("meta"):                                # only shapes, no memory, no time
            model = MODELS[config.family](config).requires_grad_(False).eval()
        model.processor = Processor(folder, config)
        load_weights(model, folder, device, DTYPES.get(dtype, dtype))
    model.folder, model.load_seconds = folder, time.perf_counter() - start
    model.name = Path(name).resolve().name if Path(name).is_dir() else str(name)
    return model


def find_folder(name):
    """A checkpoint's folder: a local one, or one that is downloaded from the hub, config.json
    first, so that a model that is not built here is refused early."""
    if Path(name).is_dir():
        for path in filter(Path.is_file, Path(name).iterdir()):
            with open(path, "rb") as file:
                if file.read(8) == b"version ":
                    raise ValueError(f"{path.name} is a git-lfs pointer; git lfs pull fetches it")
        return Path(name)
    from huggingface_hub import snapshot_download
    note(f"--model {name}: no such folder; asking the Hugging Face hub for it")
    small = "*.json", "*.jinja", "*.model", "*.txt"
    with reading("no such folder, and not from the hub"):
        read_config(snapshot_download(name, allow_patterns=small))
        return Path(snapshot_download(name, allow_patterns=(*small, "*.safetensors")))


def weight_files(folder):
    """The safetensors files of a checkpoint: those that its index names, or the only one."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        with reading(index.name):
            index = json.loads(index.read_text(encoding="utf-8"))
            names = sorted(set(index["weight_map"].values()))
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing; must be a whole checkpoint in safetensors")
    if (folder / "adapter_config.json").exists():
        note(f"--model {folder}: the adapter beside the weights is not applied")
    return [folder / name for name in names]


def load_weights(model, folder, device, dtype):
    """Fills a model that has only shapes, tensor by tensor, so that the weights are in memory once.
    Raises ValueError for missing, surplus or misshapen tensors, or too little memory on a CPU."""
    head, embedding, tied = "lm_head.weight", "decoder.embed_tokens.weight", model.config.tied
    numbers = sum(w.numel() for w in model.parameters()) - tied * model.lm_head.weight.numel()
    gigabytes = numbers * dtype.itemsize / 1e9
    if device.type == "cpu" and gigabytes > machine_memory() / 1e9:
        raise ValueError(f"{gigabytes:.1f} GB of weights in {dtype} must fit into "
                         f"{machine_memory() / 1e9:.1f} GB of memory (in float32 they take "
                         f"{4 * gigabytes / dtype.itemsize:.1f} GB, in bfloat16 half of that)")
    files, state = weight_files(folder), {}
    with tqdm(desc="weights", unit=" tensors", delay=2, leave=False, disable=None) as bar:
        for path in files:
            with reading(path.name), safe_open(path, framework="pt") as file:
                for key in file.keys():
                    if not OLD_BUFFERS.search(key):
                        if file.get_slice(key).get_dtype()[0] in "IU":
                            raise ValueError(f"tensor {key} has integers, must have floats")
                        state[hub_name(key)] = file.get_tensor(key).to(device, dtype, copy=True)
                        bar.update()
    if tied and not torch.equal(state.setdefault(head, state[embedding]), state[embedding]):
        raise ValueError(f"{head} must equal the input embedding, to which it is tied")
    state |= {head: state[embedding]} if tied else {}
    model.load_state_dict(state, assign=True)


def machine_memory():
    """Bytes of memory; infinite where the system does not tell."""
    known = hasattr(os, "sysconf")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if known else math.inf


# ---- prompts -------------------------------------------------------------------------------------

class Processor:
    """A checkpoint's tokenizer, image processor, chat template and end tokens."""

    def __init__(self, folder, c):
        # By name, since the processors made with torchvision give other pixels.
        from transformers import (AutoTokenizer, LlavaNextImageProcessorPil,
                                  Qwen2VLImageProcessorPil)
        image_processor = {"llava_next": LlavaNextImageProcessorPil,
                           "qwen2_vl": Qwen2VLImageProcessorPil}[c.family]
        self.image_token = c.image_token
        with reading("preprocessor_config.json"):
            self.image_processor = image_processor.from_pretrained(folder, local_files_only=True)
            check_image_processor(self.image_processor, c)
        with reading("tokenizer"):
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.end_tokens = read_end_tokens(folder, self.tokenizer)
            ids = {*self.end_tokens, *self.tokenizer.get_vocab().values()}
            if min(ids) < 0 or max(ids) >= c.vocabulary:
                raise ValueError(f"token ids {min(ids)} to {max(ids)}: must be from 0 to "
                                 f"{c.vocabulary - 1} (vocab_size in config.json)")
        with reading("chat template"):
            template, path = self.tokenizer.chat_template, folder / "chat_template.json"
            if path.exists() and not (folder / "chat_template.jinja").exists():
                template = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
            if isinstance(template, list):
                template = {named["name"]: named["template"] for named in template}
            self.template = template["default"] if isinstance(template, dict) else template
            if not self.template:
                raise ValueError("is missing; must be in chat_template.jinja")

    def render(self, num_images, turns):
        """The chat template's text of [question, answer, question, ...], up to the next answer."""
        messages = [{"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": t}]}
                    for i, t in enumerate(turns)]
        messages[0]["content"] = [{"type": "image"}] * num_images + messages[0]["content"]
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, add_generation_prompt=True)

    def token_ids(self, num_images, text):
        """Token ids (a list) of one user turn, up to where the answer begins, with one placeholder
        for each image. Raises ValueError if the text is empty or holds a placeholder."""
        if not text.strip():
            raise ValueError(f"--prompt {text!r}: is empty, must be a question")
        tokenizer, text_only = self.tokenizer, partial(self.tokenizer, add_special_tokens=False)
        with reading(f"--prompt {text!r} in the model's chat template"):
            ids = tokenizer(self.render(num_images, [text])).input_ids
            if ids.count(self.image_token) != num_images:
                raise ValueError(f"{ids.count(self.image_token)} image tokens ("
                                 f"{self.image_token} in config.json), must be {num_images}")
        unk = tokenizer.unk_token_id
        unknown = [c for c in dict.fromkeys(text) if unk in (text_only(c).input_ids or [unk])]
        if unknown:
            note(f"--prompt: the tokenizer does not know {' '.join(map(repr, unknown))}")
        doubled = ids[:2] == [tokenizer.bos_token_id] * 2    # from the template and from tokenizing
        return ids[1:] if doubled else ids

    def next_turn_ids(self, num_images, turns):
        """Token ids (a list) that the template puts between the last answer in turns, [question,
        answer, ..., question], and the next answer."""
        rendered, asked = self.render(num_images, turns), self.render(num_images, turns[:-2])
        answer = rendered.find(turns[-2], len(asked))
        if answer < 0 or not rendered.startswith(asked):
            raise ValueError("--prompt: must be one question; the template ends after its answer")
        before = self.tokenizer(rendered[:answer + len(turns[-2])]).input_ids
        return self.tokenizer(rendered).input_ids[len(before):]


def check_image_processor(p, c):
    """Raises ValueError if preprocessor_config.json says another geometry than config.json."""
    v = c.vision
    said = {"patch_size": (p.patch_size, v.patch_size),
            "temporal_patch_size": (p.temporal_patch_size, v.temporal_patch_size),
            "merge_size": (p.merge_size, v.spatial_merge_size)} if c.family == "qwen2_vl" else {
            "size": ({p.size.shortest_edge or edge for edge in (p.size.height, p.size.width)},
                     {v.image_size}),
            "crop_size": ({p.crop_size.height, p.crop_size.width}, {v.image_size}),
            "image_grid_pinpoints": ({*map(tuple, p.image_grid_pinpoints)},
                                     {*map(tuple, c.full.image_grid_pinpoints)})}
    for what, (value, expected) in said.items():
        if value != expected:
            raise ValueError(f"{what} {value}: must be {expected}, as in config.json")


def read_end_tokens(folder, tokenizer):
    """The set of ids that end an answer, as transformers finds them: in generation_config.json,
    else in config.json, else of the tokenizer. Raises ValueError if there are none."""
    files = [folder / "generation_config.json", folder / "config.json"]
    files = [json.loads(path.read_text(encoding="utf-8")) for path in files if path.exists()]
    found = [part.get("eos_token_id") for file in files
             for part in (file, file.get("text_config") or {})] + [tokenizer.eos_token_id]
    end = next((end for end in found if end is not None), [])
    if not end and end != 0:
        raise ValueError("has no end token; must have eos_token_id in generation_config.json")
    return set(end) if isinstance(end, list) else {end}


def open_image(path):
    """An image file -> PIL image in RGB, turned as its EXIF data says. Raises ValueError."""
    with reading(f"--image {path}"):
        Image.MAX_IMAGE_PIXELS = None                           # large pictures get a note, below
        with Image.open(path) as image:
            if image.width * image.height > 50_000_000:
                note(f"--image {path}: {image.width} x {image.height} pixels take long to read")
            return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image):
    """A PIL image -> RGB. Transparency is laid on white. Greys of more than 8 bits, and floats, are
    scaled by the range that they use."""
    if image.mode[0] in "IF":
        image = image.convert("F")
        tops = [2**bits - 1 for bits in (1, 8, 10, 12, 14, 16)]
        top = next((top for top in tops if image.getextrema()[1] <= top), tops[-1])
        if top < tops[-1]:
            note(f"--image: greys end at {image.getextrema()[1]:g}; {top} is taken for white")
        return image.point(lambda x: x * (255 / top) + 0.5).convert("L").convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def prepare(model, images, text):
    """A question about images -> Prompt. images: PIL images in RGB; text: the question. The chat
    template marks each image with one placeholder token, which is repeated here as often as the
    image has tokens. Raises ValueError for bad ones."""
    processor, mark = model.processor, model.config.image_token
    pixels, laid_out, ids, starts = [], [], [], []
    for image in images:
        with reading(f"--image of {image.width} x {image.height} pixels"):
            processed = processor.image_processor(image, return_tensors="pt")
        values = processed["pixel_values"]
        values = values[0] if values.dim() == 5 else values         # LLaVA-NeXT: a batch of one
        pixels.append(values.to(model.device, model.dtype))
        laid_out.append(model.image_layout((image.height, image.width), processed))
    for token in processor.token_ids(len(images), text):
        if token == mark:
            starts.append(len(ids))
            ids += [mark] * len(laid_out[len(starts) - 1])
        else:
            ids.append(token)
    positions = model.positions(len(ids), laid_out, starts).to(model.device)
    return Prompt(torch.tensor(ids, device=model.device), positions, pixels, laid_out, starts)
