"""The models, from scratch: LLaVA-NeXT (Vicuna, Mistral) and Qwen2-VL, from pixels to logits.

    image  --> vision tower --> projector --> image tokens --.
                                                             v
    prompt --> tokenizer --> ids ----------> [ text | image tokens | text ] --> decoder --> logits
                                                                                  ^
                                                      attend(layer, q, k, v), given by the caller

Both families share one decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU. It
knows nothing of caches: each layer calls `attend`, a function of whoever runs it, for which
prefill_attention alone is the simplest choice (no cache); sparsemm.py compresses behind it, and
decodes from what was kept. What differs is the vision tower, and how an image becomes a row of
tokens:

    LLaVA-NeXT  CLIP sees square tiles. First comes a thumbnail of the whole image, then the tiles
                row by row, without the padding, a learned newline token behind each row.
                (Liu et al. 2024, "LLaVA-NeXT: Improved reasoning, OCR, and world knowledge")
    Qwen2-VL    a ViT with 2-D rotary positions sees the image at its own size; 2 x 2 patches become
                one token, and the decoder's positions have three axes, M-RoPE.
                (Wang et al. 2024, arXiv 2409.12191)

Every image token knows which rectangle of the original image it shows (ImageTokens.boxes). Tensors
have the names that the checkpoints give them, but for the products that are joined into one
(JOINED). transformers supplies the tokenizer, the image processor and the config classes; no part
of its models is used.

Letters: L layers, H query heads, G KV heads, T tokens, D head size, E width of the decoder, V width
of the vision tower, P its patches (CLIP: of one tile), S side of a tile in pixels.
"""

import math
import re
import sys
import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from torch import nn

from cache import inside, note, read_json, require

THUMBNAIL, GRID, NEWLINE = 0, 1, 2          # the kinds of image tokens; Qwen2-VL has only GRID
MLP_SLICE = 4096                            # how many tokens of a prompt go through an MLP at once
PARTS = 32                                  # of a product of one row, see linear


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
    max_tokens: int                 # beyond so many, attention would slide, which is not built here
    trained_tokens: int             # beyond so many, the model was not trained
    image_token: int                # the id that marks the place of an image
    dtype: torch.dtype              # of the checkpoint
    template: str                   # the family's chat template, for checkpoints without one
    vision: object                  # transformers' config of the vision tower
    vision_layer: int = -1          # LLaVA-NeXT only, from here on: which hidden state of CLIP
    keep_class_token: bool = False
    projector_bias: bool = True
    pinpoints: tuple = ()           # the (height, width) that an image may be fitted to


# Images come before the text (Processor.render).
LLAVA_PARTS = """{% for part in message.content %}\
{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }} {% endif %}{% endfor %}"""
VICUNA_TEMPLATE = "{% for message in messages %}{% if message.role == 'user' %}USER: " + \
    LLAVA_PARTS + """{% else %}ASSISTANT: {{ message.content[0].text }}</s>{% endif %}{% endfor %}\
{% if add_generation_prompt %}ASSISTANT:{% endif %}"""
MISTRAL_TEMPLATE = "{% for message in messages %}{% if message.role == 'user' %}[INST] " + \
    LLAVA_PARTS + "[/INST]{% else %} {{ message.content[0].text }}</s>{% endif %}{% endfor %}"
QWEN_TEMPLATE = """<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n\
{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}\
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"""


def read_config(folder):
    """config.json of a checkpoint -> Config. Raises ValueError for a model that is not built here.

    transformers' config classes know the defaults that a file leaves out."""
    from transformers import CONFIG_MAPPING
    path = Path(folder) / "config.json"
    require(path.exists(), f"model {folder}: no config.json in it; {contents(folder)}")
    raw = read_json(path, "model")
    family = str(raw.get("model_type")) if isinstance(raw, dict) else "of no object"
    require(family in MODELS, f"model {folder}: model_type {family} in config.json is not one of "
                              f"{', '.join(MODELS)}")
    require(not raw.get("quantization_config"), f"model {folder}: quantized checkpoints are not "
                                                "built here (quantization_config in config.json)")
    try:
        return convert_config(CONFIG_MAPPING[family].from_dict(raw), family)
    except Exception as error:                    # the config classes raise types of their own
        reason = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"model {folder}: config.json: {reason}") from None


def contents(folder):
    """What there is instead of what is needed, in words."""
    names = sorted(path.name for path in Path(folder).iterdir())
    return (f"it holds {', '.join(names[:8]) or 'nothing'}{', ...' * (len(names) > 8)}; a whole "
            "checkpoint with config.json and safetensors is right, no adapter alone and no pickle")


def convert_config(c, family):
    """transformers' config object -> Config. Raises ValueError for what is not built here."""
    text, vision, rope = c.text_config, c.vision_config, c.text_config.rope_parameters
    for what, value, *right in (
            ("text model_type", text.model_type, "llama", "mistral", "qwen2_vl_text"),
            ("text hidden_act", text.hidden_act, "silu"),
            ("rope_type", rope["rope_type"], "default"),
            ("attention_bias", getattr(text, "attention_bias", False), False),
            ("vision hidden_act", vision.hidden_act, "quick_gelu"),
            ("projector_hidden_act", getattr(c, "projector_hidden_act", "gelu"), "gelu"),
            ("vision_feature_layer", type(getattr(c, "vision_feature_layer", 0)).__name__, "int")):
        require(value in right, f"{what} {value} is not built here, only {right}")
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    shared = dict(
        family=family, layers=text.num_hidden_layers, heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads, head_dim=head_dim, width=text.hidden_size,
        mlp_width=text.intermediate_size, vocabulary=text.vocab_size, rms_eps=text.rms_norm_eps,
        rope_theta=rope["rope_theta"], tied=c.tie_word_embeddings, vision=vision,
        max_tokens=getattr(text, "sliding_window", None) or sys.maxsize,
        trained_tokens=text.max_position_embeddings,
        dtype=c.dtype or text.dtype or torch.float32)
    if family == "qwen2_vl":
        return Config(**shared, mrope_section=tuple(rope["mrope_section"]), qkv_bias=True,
                      image_token=c.image_token_id, template=QWEN_TEMPLATE)
    template = MISTRAL_TEMPLATE if text.model_type == "mistral" else VICUNA_TEMPLATE
    return Config(**shared, mrope_section=(head_dim // 2, 0, 0), qkv_bias=False, template=template,
                  image_token=c.image_token_index, vision_layer=c.vision_feature_layer,
                  keep_class_token=c.vision_feature_select_strategy == "full",
                  projector_bias=c.multimodal_projector_bias,
                  pinpoints=tuple(tuple(size) for size in c.image_grid_pinpoints))


# ---- the decoder ---------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):                                                       # (T, E) -> (T, E)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_angles(positions, c):
    """positions (3, T): time, row and column of every token -> cos, sin (T, D), float32, for
    `rotate`.

    M-RoPE (Qwen2-VL, section 2.1): each frequency turns with one of the three axes. Text has the
    same number on all three, which makes it ordinary RoPE (arXiv 2104.09864). LLaVA-NeXT's
    sections leave everything to the first axis.
    """
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
    """angles (T, D/2) -> cos, sin (T, D) for `rotate`; its minus sign is in the sine."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, cos, sin):
    """Rotary positions: x (heads, T, D) turned by cos, sin (T, D). The first half of D is paired
    with the second: (a, b) -> (a cos - b sin, b cos + a sin)."""
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin)


def prefill_attention(q, k, v):
    """Causal attention over a whole prompt, one KV head at a time with the R query heads of its
    group. q: (H, T, D); k, v: (G, T, D). Returns (H, T, D). The fused kernel never holds a T x T
    matrix, and has float32 logits in every dtype."""
    R, out = len(q) // len(k), []
    for g in range(len(k)):
        k_g, v_g = (x[None, g, None].expand(1, R, -1, -1) for x in (k, v))           # (1, R, T, D)
        out.append(F.scaled_dot_product_attention(q[None, g * R:(g + 1) * R], k_g, v_g,
                                                  is_causal=True)[0])
    return torch.cat(out)


def no_cache(layer, q, k, v):
    """The simplest `attend`."""
    return prefill_attention(q, k, v)


def linear(x, weight, add=None):
    """x @ weight.T + add: x (T, n), weight (m, n), add (m,) or (T, m) -> (T, m).

    In decoding x is one row. On a CPU such a float32 product may be left to one thread, however
    large the weights (by MKL on an AMD EPYC), so it is given as PARTS smaller products."""
    m, n = weight.shape
    if len(x) == 1 and m % PARTS == 0 and not weight.is_cuda and weight.dtype == torch.float32 \
            and torch.get_num_threads() > 1:
        factors = x.expand(PARTS, 1, n), weight.view(PARTS, -1, n).mT
        out = torch.bmm(*factors) if add is None else \
            torch.baddbmm(add.view(PARTS, 1, -1), *factors)
        return out.view(1, m)
    return x @ weight.T if add is None else torch.addmm(add, x, weight.T)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.H, self.G, self.D = c.heads, c.kv_heads, c.head_dim
        self.qkv_proj = nn.Linear(c.width, (self.H + 2 * self.G) * self.D, bias=c.qkv_bias)
        self.o_proj = nn.Linear(self.H * self.D, c.width, bias=False)

    def project(self, x, cos, sin):
        """x: (T, E) -> q (H, T, D), k, v (G, T, D); q and k turned by cos, sin (T, D)."""
        qkv = linear(x, self.qkv_proj.weight, self.qkv_proj.bias)             # (T, (H + 2*G) * D)
        qkv = qkv.view(len(x), -1, self.D).transpose(0, 1)                        # (H + 2*G, T, D)
        qk, v = qkv.split([self.H + self.G, self.G])
        q, k = rotate(qk, cos, sin).split([self.H, self.G])
        return q, k, v


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_up_proj = nn.Linear(c.width, 2 * c.mlp_width, bias=False)
        self.down_proj = nn.Linear(c.mlp_width, c.width, bias=False)


class DecoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.width, c.rms_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.width, c.rms_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, layer, attend):
        """x: (T, E); cos, sin: (T, D); attend: see Decoder. Returns (T, E)."""
        x = self.add_attention(x, cos, sin, layer, attend)
        if len(x) <= MLP_SLICE:
            return self.add_mlp(x)
        return torch.cat([self.add_mlp(part) for part in x.split(MLP_SLICE)])  # to bound its memory

    def add_attention(self, x, cos, sin, layer, attend):                        # (T, E) -> (T, E)
        q, k, v = self.self_attn.project(self.input_layernorm(x), cos, sin)
        mixed = attend(layer, q, k, v).transpose(0, 1).flatten(1)            # (H, T, D) -> (T, H*D)
        return linear(mixed, self.self_attn.o_proj.weight, add=x)

    def add_mlp(self, x):                                                       # (T, E) -> (T, E)
        both = linear(self.post_attention_layernorm(x), self.mlp.gate_up_proj.weight)
        gate, up = both.chunk(2, dim=-1)
        return linear(F.silu(gate) * up, self.mlp.down_proj.weight, add=x)


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocabulary, c.width)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.width, c.rms_eps)

    def forward(self, x, positions, attend):
        """x: (T, E) embeddings of tokens and images; positions: (3, T). Returns (T, E).

        attend(layer, q, k, v) -> out, with q, out (H, T, D) and k, v (G, T, D) after RoPE, is all
        that the decoder knows of attention over anything but these T tokens."""
        return self.norm(self.run_layers(x, positions, attend))

    def run_layers(self, x, positions, attend, first=0, last=None):
        """The layers `first` to `last`, not included, alone. x: (T, E). Returns (T, E)."""
        cos, sin = (angle.to(x.dtype) for angle in rotary_angles(positions, self.config))
        for l, layer in list(enumerate(self.layers))[first:last]:
            x = layer(x, cos, sin, l, attend)
        return x


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
    pixels: list                # for each image what the vision tower takes
    images: list                # for each image its ImageTokens ...
    starts: list                # ... and where in ids they start

    @property
    def image_tokens(self):
        return sum(map(len, self.images))

    @property
    def next_position(self):
        """Where the text after the prompt goes on."""
        return int(self.positions.max()) + 1

    def extended(self, ids):
        """The prompt with further text after it, token ids (n,)."""
        new, first = self.ids.new_tensor(ids), self.next_position
        positions = torch.arange(first, first + len(ids)).to(self.positions).expand(3, -1)
        return replace(self, ids=torch.cat([self.ids, new]),
                       positions=torch.cat([self.positions, positions], dim=1))


class VisionLanguageModel(nn.Module):
    """What LlavaNext and Qwen2VL share. Each adds `decoder`, `lm_head`, and of an image: `lay_out`
    (which token shows what), `see` (pixels to embeddings) and `span` (positions)."""

    @property
    def device(self):
        return self.decoder.embed_tokens.weight.device

    @property
    def dtype(self):
        return self.decoder.embed_tokens.weight.dtype

    def embed(self, prompt):
        """Embeddings (T, E) of a prompt, with its images in their places."""
        x = self.decoder.embed_tokens(prompt.ids)
        for pixels, image, start in zip(prompt.pixels, prompt.images, prompt.starts):
            x[start:start + len(image)] = self.see(pixels, image)
        return x

    def hidden_states(self, prompt, attend=no_cache):
        """Of a whole prompt: the decoder's output (T, E)."""
        return self.decoder(self.embed(prompt), prompt.positions, attend)

    def logits(self, hidden):
        """(..., E) -> (..., vocabulary)."""
        output = self.decoder.embed_tokens if self.config.tied else self.lm_head
        return linear(hidden, output.weight)

    def decode(self, token, position, attend):
        """Of one more token: the logits (vocabulary,) that follow `token`, a text token, which
        stands at `position` on all three axes. Both are numbers, or tensors (1,)."""
        x = self.decoder.embed_tokens(torch.as_tensor(token, device=self.device).view(1))   # (1, E)
        positions = torch.as_tensor(position, device=self.device).expand(3, 1)
        return self.logits(self.decoder(x, positions, attend))[0]

    def check_length(self, T, new):
        """Raises ValueError if a prompt's T tokens and `new` ones are more than attention spans,
        and notes if they are more than the model was trained on."""
        require(T + new <= self.config.max_tokens,
                f"prompt of {T} tokens and {new} new ones exceed the sliding window of "
                f"{self.config.max_tokens}, which is not built here")
        if T + new > self.config.trained_tokens:
            note("a prompt with its answer may be longer than the "
                 f"{self.config.trained_tokens:,} tokens that the model was trained on; what "
                 "follows them is not to be relied on (max_position_embeddings)")

    def positions(self, T, images, starts):
        """Positions (3, T): text counts up by one on all axes; an image takes its `span`, and the
        text after it goes on from there."""
        parts, position, done = [], 0, 0
        for image, start in zip(images, starts):
            within, taken = self.span(image)
            text = torch.arange(position, position + start - done)
            parts += [text.expand(3, -1), within + position + start - done]
            position, done = position + start - done + taken, start + len(image)
        rest = torch.arange(position, position + T - done)
        return torch.cat([*parts, rest.expand(3, -1)], dim=1)


def group(**modules):
    """Modules under one name, as the checkpoints have them."""
    return nn.ModuleDict(modules)


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

class CLIPLayer(nn.Module):
    """A pre-norm transformer layer with full attention within each tile."""

    def __init__(self, v):
        super().__init__()
        V, wide = v.hidden_size, v.intermediate_size
        self.num_heads = v.num_attention_heads
        self.layer_norm1 = nn.LayerNorm(V, v.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(V, v.layer_norm_eps)
        self.self_attn = group(q_proj=nn.Linear(V, V), k_proj=nn.Linear(V, V),
                               v_proj=nn.Linear(V, V), out_proj=nn.Linear(V, V))
        self.mlp = group(fc1=nn.Linear(V, wide), fc2=nn.Linear(wide, V))

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
        self.embeddings = group(
            patch_embedding=nn.Conv2d(3, V, v.patch_size, v.patch_size, bias=False),
            position_embedding=nn.Embedding(1 + side * side, V))
        self.embeddings.class_embedding = nn.Parameter(torch.zeros(V))
        self.pre_layrnorm = nn.LayerNorm(V, v.layer_norm_eps)          # so spelled in checkpoints
        self.encoder = group(layers=nn.ModuleList(CLIPLayer(v) for _ in range(v.num_hidden_layers)))
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


def best_resolution(size, pinpoints):
    """Anyres: the (height, width) among pinpoints that keeps most of the pixels of an image of the
    given size, and of those the one that wastes least."""
    def kept_and_wasted(best):
        scale = min(best[0] / size[0], best[1] / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, kept - best[0] * best[1]
    return max(pinpoints, key=kept_and_wasted)


def fitted_size(size, best):
    """The (height, width) to which an image is resized to fit into `best` in its own shape."""
    down, across = best[0] / size[0], best[1] / size[1]
    if across < down:
        return min(math.ceil(size[0] * across), best[0]), best[1]
    return best[0], min(math.ceil(size[1] * down), best[1])


def unpadded(rows, columns, size):
    """The rows and the columns (two slices) of a grid of features that show an image of the given
    size, and not the padding around it."""
    height, width = size
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(padding, rows - padding), slice(0, columns)
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(0, rows), slice(padding, columns - padding)


class LlavaNext(VisionLanguageModel):
    def __init__(self, c):
        super().__init__()
        self.config, self.S = c, c.vision.image_size
        self.side = c.vision.image_size // c.vision.patch_size          # tokens along a tile's side
        self.image_newline = nn.Parameter(torch.zeros(c.width))
        self.vision_tower = group(vision_model=CLIP(c.vision))
        self.multi_modal_projector = group(
            linear_1=nn.Linear(c.vision.hidden_size, c.width, bias=c.projector_bias),
            linear_2=nn.Linear(c.width, c.width, bias=c.projector_bias))
        self.language_model = group(model=Decoder(c))
        if not c.tied:
            self.language_model["lm_head"] = nn.Linear(c.width, c.vocabulary, bias=False)

    @property
    def decoder(self):
        return self.language_model["model"]

    @property
    def lm_head(self):
        return self.language_model["lm_head"]

    def tile_grid(self, size):
        """For an image of the given size: the (height, width) it is fitted to, and how many tiles
        that has down and across."""
        best = best_resolution(size, self.config.pinpoints)
        return best, best[0] // self.S, best[1] // self.S

    def lay_out(self, size, processed):
        """The image is resized in its own shape, put in the middle of its best resolution and cut
        into tiles; what a cell of the grid shows follows by undoing that."""
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

    def see(self, tiles, image):
        """tiles: (1 + n, 3, S, S), the thumbnail first -> embeddings (len(image), E)."""
        s, projector = self.side, self.multi_modal_projector
        x = self.vision_tower.vision_model(tiles, self.config.vision_layer)          # (1+n, 1+P, V)
        x = x if self.config.keep_class_token else x[:, 1:]
        x = projector.linear_2(F.gelu(projector.linear_1(x)))                          # (1+n, P, E)
        _, down, across = self.tile_grid(image.size)
        grid = x[1:].view(down, across, s, s, -1).transpose(1, 2)         # (down, s, across, s, E)
        grid = grid.reshape(down * s, across * s, -1)[unpadded(down * s, across * s, image.size)]
        newline = self.image_newline.expand(len(grid), 1, -1)
        return torch.cat([x[0], torch.cat([grid, newline], dim=1).flatten(0, 1)])

    def span(self, image):
        """Positions (3, n) of an image's tokens, from 0, and how many positions they take."""
        return torch.arange(len(image)).expand(3, -1), len(image)


# ---- Qwen2-VL ------------------------------------------------------------------------------------

class QwenVisionBlock(nn.Module):
    """A pre-norm transformer layer with full attention over the patches of one image."""

    def __init__(self, v):
        super().__init__()
        V, wide = v.embed_dim, int(v.embed_dim * v.mlp_ratio)
        self.num_heads = v.num_heads
        self.norm1, self.norm2 = nn.LayerNorm(V, 1e-6), nn.LayerNorm(V, 1e-6)
        self.attn = group(qkv=nn.Linear(V, 3 * V), proj=nn.Linear(V, V))
        self.mlp = group(fc1=nn.Linear(V, wide), fc2=nn.Linear(wide, V))

    def forward(self, x, cos, sin):                                             # (P, V) -> (P, V)
        qkv = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(1, 2, 0, 3)                                           # (heads, P, D)
        q, k = (rotate(y.float(), cos, sin).to(x.dtype) for y in (q, k))
        mixed = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        x = x + self.attn.proj(mixed.transpose(0, 1).flatten(1))
        return x + self.mlp.fc2(quick_gelu(self.mlp.fc1(self.norm2(x))))


class QwenVision(nn.Module):
    """Qwen2-VL's ViT and the merger behind it. Patches come in the merger's order: the four that
    become one token are neighbours."""

    def __init__(self, v):
        super().__init__()
        V, merged = v.embed_dim, v.embed_dim * v.spatial_merge_size ** 2
        kernel = (v.temporal_patch_size, v.patch_size, v.patch_size)
        self.config = v
        self.patch_embed = group(proj=nn.Conv3d(3, V, kernel, kernel, bias=False))
        self.blocks = nn.ModuleList(QwenVisionBlock(v) for _ in range(v.depth))
        self.merger = group(ln_q=nn.LayerNorm(V, 1e-6), mlp=nn.Sequential(
            nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, v.hidden_size)))

    def forward(self, patches, rows, columns):
        """patches: (P, 3 * 2 * p * p), each image repeated for the two frames that a patch spans,
        of an image of rows x columns tokens -> (rows * columns, E)."""
        x = patches @ self.patch_embed.proj.weight.flatten(1).T   # (P, V): where its stride is its
                                                                  # size, a convolution is a product
        cos, sin = self.rotary_angles(rows, columns, x.device)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.merger.mlp(self.merger.ln_q(x).view(rows * columns, -1))  # (P, V) -> (P/4, 4*V)

    def rotary_angles(self, rows, columns, device):
        """2-D rotary positions: cos, sin (P, D) for `rotate`, half of the frequencies turning with
        the patch's row and half with its column."""
        m, D = self.config.spatial_merge_size, self.config.embed_dim // self.config.num_heads
        y, x = torch.meshgrid(torch.arange(rows * m), torch.arange(columns * m), indexing="ij")
        yx = torch.stack([y, x], dim=-1).view(rows, m, columns, m, 2)
        yx = yx.transpose(1, 2).reshape(-1, 2, 1).to(device)                            # (P, 2, 1)
        frequency = 1.0 / 10000.0 ** (torch.arange(0, D // 2, 2, device=device).float() / (D // 2))
        return both_halves((yx * frequency).flatten(1))                                   # (P, D/2)


class Qwen2VL(VisionLanguageModel):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.visual = QwenVision(c.vision)
        self.model = Decoder(c)
        if not c.tied:
            self.lm_head = nn.Linear(c.width, c.vocabulary, bias=False)

    @property
    def decoder(self):
        return self.model

    def lay_out(self, size, processed):
        """The image is resized to a whole number of tokens on either axis, so that what a token
        shows need not be square."""
        merge = self.config.vision.spatial_merge_size
        rows, columns = (processed["image_grid_thw"][0, 1:] // merge).tolist()
        boxes = cell_boxes(rows, columns, [size[0] / rows, size[1] / columns], size).flatten(0, 1)
        return ImageTokens(size, (rows, columns), torch.full((rows * columns,), GRID), boxes)

    def see(self, patches, image):
        """patches: (P, 3 * 2 * p * p) -> embeddings (len(image), E)."""
        return self.visual(patches, *image.grid)

    def span(self, image):
        """Positions (3, n) of an image's tokens, from 0: time stands still, rows and columns count.
        They take as many positions as the longer side has tokens, so that none of the text's is
        also one of theirs."""
        rows, columns = image.grid
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        return torch.stack([torch.zeros_like(y), y, x]).flatten(1), max(rows, columns)


# ---- loading -------------------------------------------------------------------------------------

MODELS = {"llava_next": LlavaNext, "qwen2_vl": Qwen2VL}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Tensors are spelled as on the hub (our names), as transformers 5 saves them, or as it holds them.
SPELLINGS = {
    "llava_next": ((r"^model\.(vision_tower|multi_modal_projector|image_newline)", r"\1"),
                   (r"^model\.language_model\.", "language_model.model."),
                   (r"^lm_head\.", "language_model.lm_head."),
                   (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.")),
    "qwen2_vl": ((r"^model\.visual\.", "visual."),
                 (r"^model\.language_model\.", "model."))}
# Products of the same input are one product here: name -> what it is joined from, in this order.
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
OLD_BUFFERS = re.compile(r"(position_ids|rotary_emb\.inv_freq)$")      # constants in some old files


def find_device(name):
    """"auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N" -> torch.device. Raises ValueError
    if there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    require(re.fullmatch(r"cpu|cuda(:\d+)?", name),
            f"device {name!r}: auto, cpu, cuda or cuda:N is right")
    device = torch.device(name)
    require(device.type == "cpu" or (device.index or 0) < torch.cuda.device_count(),
            f"device {name!r} is none of the {torch.cuda.device_count()} CUDA devices that PyTorch "
            "finds; cpu or auto is right")
    return device


def load(name, device="auto", dtype="auto"):
    """A model, ready to use, with its `folder`, its `name` and its `processor`.

    name: a checkpoint's folder, or its id on the Hugging Face hub; device: "auto" takes CUDA if
    there is one; dtype: "auto" is float32 on a CPU and the checkpoint's own on CUDA. Raises
    ValueError, in one line, for whatever is wrong with the checkpoint.
    """
    from transformers.utils import logging
    logging.set_verbosity_error()
    device, folder = find_device(device), find_folder(name)
    config = read_config(folder)
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else config.dtype
    with torch.device("meta"):                                    # only shapes, no memory, no time
        model = MODELS[config.family](config).requires_grad_(False)
    model = model.to(DTYPES.get(dtype, dtype)).to_empty(device=device)
    copy_weights(model, read_tensors(folder), folder)
    model.folder, model.processor = folder, Processor(folder, config)
    model.name = Path(name).resolve().name if Path(name).is_dir() else str(name)
    return model.eval()


def find_folder(name):
    """A checkpoint's folder: a local one, or the hub's, downloaded, where config.json is refused
    before the weights come. Raises ValueError after 15 seconds in which the hub says nothing."""
    if Path(name).is_dir():
        return Path(name)
    require(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)),
            f"model {name}: no such folder; a checkpoint's folder or a hub id such as "
            "llava-hf/llava-v1.6-mistral-7b-hf is right")
    from huggingface_hub import HfApi, snapshot_download
    note(f"model {name}: no such folder; asking the hub for it")
    try:
        source, reason = dict(revision=HfApi().model_info(name, timeout=15).sha), None
    except Exception as error:          # no network, no such repository, no access: many types
        source, reason = dict(local_files_only=True), type(error).__name__       # but maybe cached

    def download(*patterns):
        try:
            return Path(snapshot_download(name, allow_patterns=patterns, **source))
        except Exception as error:
            raise ValueError(f"model {name}: neither a local folder nor to be had from the hub "
                             f"({reason or type(error).__name__})") from None

    small = "*.json", "*.jinja", "*.model", "*.txt"
    read_config(download(*small))
    return download(*small, "*.safetensors")


def hub_name(key, family):
    """A tensor's name in the file -> its name here."""
    for spelling, ours in SPELLINGS[family]:
        key = re.sub(spelling, ours, key)
    return key


def published_tensors(model):
    """name of a tensor in published checkpoints -> the part of the model that it fills."""
    c, parts = model.config, {}
    heads, kv_heads = c.heads * c.head_dim, c.kv_heads * c.head_dim
    rows = {"qkv_proj": (heads, kv_heads, kv_heads), "gate_up_proj": (c.mlp_width, c.mlp_width)}
    for name, tensor in model.state_dict().items():
        module = name.split(".")[-2] if "." in name else ""
        for part, piece in zip(JOINED.get(module, (module,)),
                               tensor.split(rows.get(module, len(tensor)))):
            parts[name.replace(f".{module}.", f".{part}.")] = piece
    return parts


def copy_weights(model, tensors, folder):
    """Fills the model. tensors: pairs of (name, tensor), one at a time; folder: for messages.
    Raises ValueError that names the first missing, surplus or misshapen tensor."""
    c, parts, filled = model.config, published_tensors(model), set()
    embedding, output = model.decoder.embed_tokens.weight, {}
    if c.tied:                                           # a file may hold the same tensor twice
        output = {"language_model." * (c.family == "llava_next") + "lm_head.weight":
                  torch.zeros_like(embedding)}
    for key, tensor in tensors:
        if OLD_BUFFERS.search(key):
            continue
        name = hub_name(key, c.family)
        part = parts.get(name, output.get(name))
        require(part is not None and name not in filled, f"model {folder}: surplus tensor {key}")
        require(tensor.shape == part.shape, f"model {folder}: tensor {key} has shape "
                f"{list(tensor.shape)}, not {list(part.shape)}")
        part.copy_(tensor)
        filled.add(name)
    missing = sorted(parts.keys() - filled)
    require(not missing, f"model {folder}: {len(missing)} tensors missing: {' '.join(missing[:1])}")
    for name in output.keys() & filled:
        require(torch.equal(output[name], embedding),
                f"model {folder}: {name} is not the input embedding it is tied to")


def read_tensors(folder):
    """Pairs of (name, tensor) of a checkpoint's files, one at a time, on the CPU."""
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    yield key, file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"model {folder}: {path.name} cannot be read: {error}") from None


def weight_files(folder):
    """The safetensors files of a checkpoint: those that its index names, or the only one."""
    index, only = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.exists():
        require(only.exists(), f"model {folder}: no model.safetensors in it, nor an index of "
                               f"several; {contents(folder)}")
        return [only]
    match read_json(index, "model"):
        case {"weight_map": dict(names)} if all(isinstance(x, str) for x in names.values()):
            return [inside(folder, name) for name in sorted(set(names.values()))]
    raise ValueError(f"model {folder}: {index.name} is not an index of weights")


# ---- prompts -------------------------------------------------------------------------------------

class Processor:
    """A checkpoint's tokenizer, image processor, chat template and end tokens."""

    def __init__(self, folder, config):
        # By name, since the processors made with torchvision give other pixels.
        from transformers import (AutoTokenizer, LlavaNextImageProcessorPil,
                                  Qwen2VLImageProcessorPil)
        image_processor = {"llava_next": LlavaNextImageProcessorPil,
                           "qwen2_vl": Qwen2VLImageProcessorPil}[config.family]
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.image_processor = image_processor.from_pretrained(folder, local_files_only=True)
            self.end_tokens, self.image_token = self.read_end_tokens(folder), config.image_token
            own = self.read_template(folder), self.tokenizer.chat_template
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"model {folder}: tokenizer, template or image processor: "
                             f"{error}") from None
        self.template = next(filter(self.shows_image, (*own, config.template)), None)
        if self.template is None:
            mark = re.search(r"<image>|<\|image_pad\|>", config.template)[0]
            raise ValueError(f"model {folder}: the image token is {config.image_token} in "
                             f"config.json, but {mark} is token "
                             f"{self.tokenizer.convert_tokens_to_ids(mark)} of the tokenizer")
        if any(own) and self.template not in own:
            note(f"model {folder}: its chat template has no place for an image; that of "
                 f"{config.family} is used")

    @staticmethod
    def read_template(folder):
        """The chat template in a file of its own; AutoTokenizer does not know the JSON one."""
        if (path := folder / "chat_template.jinja").exists():
            return path.read_text(encoding="utf-8")
        if (path := folder / "chat_template.json").exists():
            return read_json(path, "model")["chat_template"]

    def read_end_tokens(self, folder):
        """The ids that end an answer; generation_config.json may name several."""
        path = folder / "generation_config.json"
        end = read_json(path, "model").get("eos_token_id") if path.exists() else None
        if end is None:
            end = self.tokenizer.eos_token_id
        return set(end) if isinstance(end, list) else {end}

    def shows_image(self, template):
        """Whether a chat template puts one placeholder for one image. Those of text models do not,
        or fail."""
        try:
            ids = self.tokenizer(self.render(1, ["Hi"], template)).input_ids
            return bool(template) and ids.count(self.image_token) == 1
        except Exception:                       # whatever a template does with what it doesn't know
            return False

    def render(self, num_images, turns, template=None):
        """The chat template's text of a question, answer, question, ..., up to where the next
        answer begins; the images come first in the first turn."""
        messages = [{"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": t}]}
                    for i, t in enumerate(turns)]
        messages[0]["content"] = [{"type": "image"}] * num_images + messages[0]["content"]
        return self.tokenizer.apply_chat_template(messages, tokenize=False,
                                                  chat_template=template or self.template,
                                                  add_generation_prompt=True)

    def token_ids(self, num_images, text):
        """One user turn, up to where the answer begins: a list of token ids, with one placeholder
        for each image. Raises ValueError if the text itself holds a placeholder; notes what else of
        it does not reach the model as it stands there."""
        text.encode()                                      # an error for bytes that are not UTF-8
        ids = self.tokenizer(self.render(num_images, [text])).input_ids
        require(ids.count(self.image_token) == num_images,
                f"prompt {text!r} contains {self.tokenizer.decode([self.image_token])}, which "
                "stands for an image; a question without it is right")
        self.note_unreadable(text)
        if len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:
            return ids[1:]                              # one from the template, one from tokenizing
        return ids

    def note_unreadable(self, text):
        """Notes what of a text does not reach the model as it stands there."""
        tokenizer = self.tokenizer
        special = [str(token) for token in tokenizer.added_tokens_decoder.values()
                   if token.special and str(token) in text]
        if special:
            note(f"prompt: {' '.join(special)} is no text to this model, but a special token")
        unk = tokenizer.unk_token_id
        unknown = [c for c in dict.fromkeys(text)
                   if unk in (tokenizer(c, add_special_tokens=False).input_ids or [unk])]
        if unknown:
            ascii_only = all(map(str.isascii, tokenizer.get_vocab()))
            note(f"prompt: the tokenizer does not know {' '.join(map(repr, unknown))}"
                 + "; this model knows printable ASCII" * ascii_only)

    def next_turn_ids(self, num_images, turns):
        """What the template puts between the last answer in turns, [question, answer, ...,
        question], and the next: token ids."""
        rendered, asked = self.render(num_images, turns), self.render(num_images, turns[:-2])
        answer = rendered.find(turns[-2], len(asked))
        require(answer >= 0 and rendered.startswith(asked),
                "the model's chat template cannot go on after an answer; one --prompt is right")
        before = self.tokenizer(rendered[:answer + len(turns[-2])]).input_ids
        return self.tokenizer(rendered).input_ids[len(before):]


def open_image(path):
    """An image file -> PIL image in RGB, turned as its EXIF data says. Raises ValueError."""
    require(Path(path).is_file(), f"--image {path}: no such file; a picture (PNG, ...) is right")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)      # says what is right
            with Image.open(path) as image:
                if getattr(image, "n_frames", 1) > 1:
                    note(f"--image {path}: {image.n_frames} frames; the first one is taken")
                return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise ValueError(f"--image {path}: not a picture that Pillow can read") from None
    except Exception as error:           # Pillow's decoders raise what they please at damaged files
        raise ValueError(f"--image {path}: cannot be read ({error})") from None


def to_rgb(image):
    """A PIL image of any mode -> RGB. Transparency is laid on white; greys of more than 8 bits are
    scaled by their type's range, integers from 0 to 65,535 and floats from 0 to 1."""
    if image.mode == "F" or image.mode.startswith("I"):
        top, image = 1 if image.mode == "F" else 65535, image.convert("F")
        low, high = image.getextrema()
        require(low >= 0 and high <= top, f"greys from {low} to {high}; 0 to {top} is right")
        return Image.merge("RGB", [image.point(lambda x: x * (255 / top) + 0.5).convert("L")] * 3)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def prepare(model, images, text):
    """A question about images -> Prompt. images: PIL images in RGB; text: the question.

    The chat template marks each image with one placeholder token, which is repeated here as often
    as the image has tokens. Raises ValueError if the text itself holds a placeholder or an image
    cannot be processed.
    """
    processor, mark = model.processor, model.config.image_token
    pixels, laid_out, ids, starts = [], [], [], []
    for image in images:
        try:
            processed = processor.image_processor(image, return_tensors="pt")
        except ValueError as error:
            raise ValueError(f"image of {image.width} x {image.height} pixels: {error}") from None
        values = processed["pixel_values"]
        values = values[0] if values.dim() == 5 else values         # LLaVA-NeXT: a batch of one
        pixels.append(values.to(model.device, model.dtype))
        laid_out.append(model.lay_out((image.height, image.width), processed))
    template = processor.token_ids(len(images), text)
    for token in template:
        if token == mark:
            starts.append(len(ids))
            ids += [mark] * len(laid_out[len(starts) - 1])
        else:
            ids.append(token)
    positions = model.positions(len(ids), laid_out, starts).to(model.device)
    return Prompt(torch.tensor(ids, device=model.device), positions, pixels, laid_out, starts)
