"""The two layouts of the small models in tiny/, and what training them needs of transformers:
configurations, pixels, positions, tokenizer, the folder that is written, and attention for rows of
several conversations about one page.

    a row of a batch     <|im_start|> image tokens | conversation | conversation | ...
                         `------ the prefix -----'   each sees the prefix and itself

Letters: B pages of a batch, T tokens, N queries, H query heads, G KV heads, D head size, E width.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models
from torch.nn.attention.bias import causal_lower_right
from transformers import (AttentionInterface, AttentionMaskInterface, CLIPVisionConfig,
                          GenerationConfig, LlamaConfig, LlavaNextConfig,
                          LlavaNextForConditionalGeneration, PreTrainedTokenizerFast, Qwen2VLConfig,
                          Qwen2VLForConditionalGeneration)
from transformers.vision_utils import get_vision_position_ids

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>"]
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
VOCABULARY = {token: i for i, token in enumerate(SPECIAL + ["<|unknown|>"] + list(CHARACTERS))}
END, IM_START, IM_END, VISION_START, VISION_END, IMAGE, VIDEO = range(len(SPECIAL))
IGNORE = -100                     # label of positions that carry no loss
CELL = 16                         # an image token shows CELL x CELL pixels of the page
BLOCK = 256                       # queries that attend at a time, on a CPU

# A turn is <|im_start|> images, text <|im_end|>, and the answer follows up to its own <|im_end|>.
CHAT_TEMPLATE = """{%% for message in messages %%}{%% if message['role'] == 'user' %%}<|im_start|>\
{%% if message['content'] is string %%}{{ message['content'] }}{%% else %%}\
{%% for part in message['content'] %%}{%% if part['type'] == 'image' %%}\
%s{%% else %%}{{ part['text'] }}{%% endif %%}\
{%% endfor %%}{%% endif %%}<|im_end|>{%% else %%}\
{%% if message['content'] is string %%}{{ message['content'] }}{%% else %%}\
{%% for part in message['content'] %%}{{ part['text'] }}{%% endfor %%}{%% endif %%}<|im_end|>\
{%% endif %%}{%% endfor %%}"""


def as_bytes(images):
    """PIL images of one size -> (B, H, W, 3) uint8."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))


def scaled(pixels):
    """uint8 -> float32 from -1 to 1."""
    return pixels / 127.5 - 1


class Qwen2VLLayout:
    """GQA, M-RoPE; four patches of 8 x 8 pixels are merged into an image token."""

    model_class = Qwen2VLForConditionalGeneration
    image_token = "<|image_pad|>"
    image_mark = "<|vision_start|><|image_pad|><|vision_end|>"      # an image in the chat template
    zoom = 1                                # the image processor leaves pages at their own size
    merge, patch = 2, CELL // 2
    preprocessor = dict(image_processor_type="Qwen2VLImageProcessor",
                        processor_class="Qwen2VLProcessor", patch_size=patch, temporal_patch_size=2,
                        merge_size=merge, min_pixels=4 * CELL ** 2, max_pixels=2048 * CELL ** 2,
                        image_mean=[0.5] * 3, image_std=[0.5] * 3)

    def config(self):
        """8 layers x 8 query heads x 32, two to each of 4 KV heads; 5.9 M parameters.

        M-RoPE gives the columns of an image the lowest frequencies. Some have to turn visibly over
        the few columns between two cells of a table, others hardly at all over an answer, so that a
        head can still match content alone. So columns have 10 of the 16 frequencies, from 0.045
        down to 0.0004; with faster ones long transcripts fell apart."""
        return Qwen2VLConfig(
            text_config=dict(vocab_size=len(VOCABULARY), hidden_size=256, intermediate_size=512,
                             num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
                             max_position_embeddings=8192, rms_norm_eps=1e-6, rope_theta=4000.0,
                             rope_scaling={"type": "mrope", "mrope_section": [4, 2, 10],
                                           "rope_type": "default", "rope_theta": 4000.0},
                             tie_word_embeddings=True, bos_token_id=END, eos_token_id=IM_END,
                             pad_token_id=END),
            vision_config=dict(depth=4, embed_dim=128, hidden_size=256, num_heads=4, mlp_ratio=3,
                               patch_size=self.patch, spatial_merge_size=self.merge,
                               temporal_patch_size=2),
            image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START,
            vision_end_token_id=VISION_END, tie_word_embeddings=True)

    def patch_embedding(self, model):
        return model.model.visual.patch_embed.proj

    def projector(self, model):
        return model.model.visual.merger

    def image_ids(self, width, height):
        """The token ids that stand for a page."""
        return [VISION_START] + [IMAGE] * (width // CELL * (height // CELL)) + [VISION_END]

    def positions(self, width, height):
        """(3, prefix) int64: time, row and column of <|im_start|> and the tokens of a page."""
        rows, columns = height // CELL, width // CELL
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        page = torch.stack([torch.zeros_like(row), row, column]).flatten(1) + 2
        last = torch.full((3, 1), 2 + max(rows, columns))
        return torch.cat([torch.tensor([[0, 1]] * 3), page, last], 1)

    def images(self, pages, drawn):
        """What pixel_values takes, of the pages of a batch, which are of one size."""
        return dict(pages=as_bytes(page.image for page in pages))

    def pixel_values(self, pages):
        """(B, H, W, 3) uint8 -> (patches, 3 * 2 * 8**2); the four patches of an image token are
        neighbours, and each is repeated for the temporal patch of two."""
        (B, H, W, _), merge, patch = pages.shape, self.merge, self.patch
        x = scaled(pages).view(B, H // CELL, merge, patch, W // CELL, merge, patch, 3)
        x = x.permute(0, 1, 4, 2, 5, 7, 3, 6)   # (B, rows, columns, merge, merge, 3, patch, patch)
        return torch.stack([x, x], 6).view(-1, 3 * 2 * patch ** 2)

    def see(self, model, pages):
        """The vision tower and the merger: (B * tokens of a page, E). All pages go through the
        tower as one, and `attend` tells them apart."""
        B, H, W, _ = pages.shape
        grid = torch.tensor([[1, H // self.patch, W // self.patch]])
        patches = self.pixel_values(pages)
        positions = get_vision_position_ids(grid, self.merge).to(pages.device).repeat(B, 1)
        return model.model.visual(patches, grid_thw=grid, position_ids=positions, pages=B,
                                  cu_seqlens=torch.tensor([0, len(patches)])).pooler_output

    def image_embeddings(self, model, pages):
        """(B, tokens of a page, E), as the decoder takes them."""
        return self.see(model, pages).unflatten(0, (len(pages), -1))

    def cell_labels(self, cells):
        """(rows, columns, n) of a page -> one row for each output of the merger."""
        return cells.reshape(-1, cells.shape[-1])


class LlavaNextLayout:
    """MHA, rotary positions in one dimension; tiles of 160 x 160 pixels, a patch of 16 x 16 is an
    image token; the thumbnail comes first, every row of the page ends with a newline token.

    Pages whose sides are multiples of 128 pixels are enlarged to as many tiles: patches as coarse
    as these tell characters of 13 pixels, as they are drawn, less well apart."""

    model_class = LlavaNextForConditionalGeneration
    image_token = image_mark = "<image>"
    tile, zoom = 160, 160 / 128
    side = tile // CELL
    pinpoints = [[160 * rows, 160 * columns] for rows in range(1, 9) for columns in range(1, 9)
                 if rows * columns <= 24]                                          # (height, width)
    preprocessor = dict(image_processor_type="LlavaNextImageProcessor",
                        processor_class="LlavaNextProcessor", size={"shortest_edge": tile},
                        crop_size={"height": tile, "width": tile}, image_grid_pinpoints=pinpoints,
                        image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3)

    def config(self):
        """8 layers x 8 heads x 32; 5.9 M parameters. The vision tower is as wide as a patch has
        gray values, 256, since most lines of text lie across two patches, and what one shows of a
        character must get to the other; narrower ones confused similar characters. Unlike in the
        published models all of its layers are used (vision_feature_layer is -1)."""
        return LlavaNextConfig(
            text_config=LlamaConfig(vocab_size=len(VOCABULARY), hidden_size=256,
                                    intermediate_size=260, num_hidden_layers=8,
                                    num_attention_heads=8, num_key_value_heads=8,
                                    max_position_embeddings=8192, rope_theta=100000.0,
                                    tie_word_embeddings=True, bos_token_id=END,
                                    eos_token_id=IM_END, pad_token_id=END),
            vision_config=CLIPVisionConfig(hidden_size=256, intermediate_size=384,
                                           num_hidden_layers=4, num_attention_heads=8,
                                           image_size=self.tile, patch_size=CELL,
                                           projection_dim=128),
            image_grid_pinpoints=self.pinpoints, image_token_index=IMAGE, vision_feature_layer=-1,
            vision_feature_select_strategy="default", tie_word_embeddings=True)

    def patch_embedding(self, model):
        tower = model.model.vision_tower
        return getattr(tower, "vision_model", tower).embeddings.patch_embedding

    def projector(self, model):
        return model.model.multi_modal_projector

    def image_ids(self, width, height):
        rows, columns = height // CELL, width // CELL
        return [IMAGE] * (self.side ** 2 + rows * (columns + 1))

    def positions(self, width, height):
        """(prefix,) int64."""
        return torch.arange(1 + len(self.image_ids(width, height)))

    def images(self, pages, drawn):
        """What pixel_values takes, of the pages of a batch, which are of one size, a multiple of
        the tile's, and of the same pages as they were drawn: the image processor makes thumbnails
        of these."""
        small = [page.image.resize((self.tile, self.tile), Image.Resampling.BICUBIC)
                 for page in drawn]
        return dict(pages=as_bytes(page.image for page in pages), thumbnails=as_bytes(small))

    def pixel_values(self, pages, thumbnails):
        """(B, H, W, 3) and (B, tile, tile, 3) uint8 -> (B, 1 + tiles, 3, tile, tile), the thumbnail
        first, then the tiles row by row."""
        (B, H, W, _), tile = pages.shape, self.tile
        tiles = pages.view(B, H // tile, tile, W // tile, tile, 3).permute(0, 1, 3, 5, 2, 4)
        return scaled(torch.cat([thumbnails.permute(0, 3, 1, 2)[:, None], tiles.flatten(1, 2)], 1))

    def see(self, model, pages, thumbnails):
        """The vision tower and the projector: (B * (1 + tiles), side**2, E)."""
        states = model.model.vision_tower(self.pixel_values(pages, thumbnails).flatten(0, 1),
                                          output_hidden_states=True).hidden_states
        return model.model.multi_modal_projector(states[model.config.vision_feature_layer][:, 1:])

    def image_embeddings(self, model, pages, thumbnails):
        """(B, tokens of a page, E), as the decoder takes them: the tiles' rows put together, with a
        newline behind each."""
        (B, H, W, _), side = pages.shape, self.side
        thumbnail, *tiles = self.see(model, pages, thumbnails).unflatten(0, (B, -1)).unbind(1)
        x = torch.stack(tiles, 1).unflatten(2, (side, side)).unflatten(1, (H // self.tile, -1))
        rows = x.transpose(2, 3).flatten(1, 2).flatten(2, 3)              # (B, rows, columns, E)
        newline = model.model.image_newline.to(rows.dtype).expand(*rows.shape[:2], 1, -1)
        return torch.cat([thumbnail, torch.cat([rows, newline], 2).flatten(1, 2)], 1)

    def cell_labels(self, cells):
        """(rows, columns, n) of a page -> those of its tiles, one after the other. The thumbnail,
        which comes first, is too small to be read."""
        rows, columns, n = cells.shape
        tiles = cells.reshape(rows // self.side, self.side, columns // self.side, self.side, n)
        tiles = tiles.transpose(0, 2, 1, 3, 4).reshape(-1, n)
        return np.concatenate([np.full((self.side ** 2, n), IGNORE), tiles])


LAYOUTS = {"qwen2-vl": Qwen2VLLayout(), "llava-next": LlavaNextLayout()}


def make_tokenizer(layout):
    """One token per character (printable ASCII and the newline), and the special tokens."""
    special = [layout.image_token if i == IMAGE else token for i, token in enumerate(SPECIAL)]
    vocabulary = dict(zip(special + list(VOCABULARY)[len(special):], range(len(VOCABULARY))))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<|unknown|>"))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)
                                  for token in special])
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<|unknown|>",
                                   eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   clean_up_tokenization_spaces=False)


def save_checkpoint_folder(layout, model, folder):
    """Writes the folder in the hub's layout: config, bfloat16 weights, tokenizer, template, image
    processor."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(layout)
    tokenizer.chat_template = CHAT_TEMPLATE % layout.image_mark
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    text = settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast")
    settings.write_text(text)                           # the name that all versions know
    GenerationConfig(eos_token_id=[IM_END], pad_token_id=END, do_sample=False,
                     max_new_tokens=256).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(layout.preprocessor, indent=2)
                                                     + "\n")
    model_bf16 = layout.model_class(model.config).to(torch.bfloat16)
    model_bf16.load_state_dict(model.state_dict())
    model_bf16.save_pretrained(folder)


def read_checkpoint(layout, option, folder):
    """transformers' model in float32 of a folder that an option names. Raises ValueError."""
    model_class, config = layout.model_class, layout.config()
    try:
        settings = json.loads(Path(folder, "config.json").read_text())
        assert settings["model_type"] == config.model_type
        model = model_class.from_pretrained(folder, dtype=torch.float32)
        with torch.device("meta"):
            wanted = model_class(config)
        here, there = ({name: x.shape for name, x in m.state_dict().items()}
                       for m in (model, wanted))
        assert here == there
    except (OSError, ValueError, KeyError, AssertionError):
        raise ValueError(f"{option} {folder}: not a model of this layout and its sizes, as the one "
                         "in tiny/ is") from None
    return model


# ---- attention in training -----------------------------------------------------------------------

def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, prefix=0,
           conversations=0, pages=0, image=None, looks=None, **kwargs):
    """The attention that make_batch's rows need, registered with transformers. In the decoder the
    prefix attends to itself, and each conversation to the prefix and to itself, causally; in vision
    towers all of a page, or of a tile, attend to all. pages: so many stand one behind the other, as
    if they were one. The list `looks`, if there is one, gets what `looking` gives."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    attention = fused_attention if query.is_cuda else BlockByBlock.apply
    with torch.autocast(query.device.type, enabled=False):
        if looks is not None:
            looks.append(looking(query.float() * scaling, key.float(), prefix, conversations,
                                 image))
        query, key = (query * scaling).to(value.dtype), key.to(value.dtype)
        if pages:                                              # (1, H, B * N, D) -> (B, H, N, D)
            query, key, value = (x[0].unflatten(1, (pages, -1)).transpose(0, 1)
                                 for x in (query, key, value))
        if not module.is_causal:                                                # vision
            output = attention(query, key, value, False).transpose(1, 2)
            return (output.flatten(0, 1)[None] if pages else output).contiguous(), None
        own = [x[:, :, prefix:].unflatten(2, (conversations, -1)) for x in (query, key, value)]
        shared = [x[:, :, None, :prefix].expand(-1, -1, conversations, -1, -1)
                  for x in (key, value)]
        key_of_all, value_of_all = (torch.cat(pair, 3) for pair in zip(shared, own[1:]))
        output = torch.cat([
            attention(*(x[:, :, :prefix] for x in (query, key, value)), True),
            attention(own[0], key_of_all, value_of_all, True).flatten(2, 3)], 2)
    return output.transpose(1, 2).contiguous(), None


def looking(query, key, prefix, conversations, image):
    """-log(1 - m) for each row behind the prefix, m its attention on the tokens of the image, of
    (B, H, T, D) queries and keys: (B, H, T - prefix).

    That is log(1 + odds), from log-sum-exps. Of m itself the gradient would vanish where the
    softmax is saturated, that is, at the very heads that look most."""
    own = [x[:, :, prefix:].unflatten(2, (conversations, -1)) for x in (query, key)]
    scores = own[0] @ own[1].mT                                    # (B, H, conversations, n, n)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    of_own = scores.masked_fill(future, -torch.inf).logsumexp(-1).flatten(2)
    shared, (start, end) = query[:, :, prefix:] @ key[:, :, :prefix].mT, image
    elsewhere = torch.cat([shared[..., :start], shared[..., end:], of_own[..., None]], -1)
    return F.softplus(shared[..., start:end].logsumexp(-1) - elsewhere.logsumexp(-1))


def looking_of_heads(looks, labels, prefix, kv_heads):
    """(L, G): each KV head's mean of what `looking` gave, (B, H, T - prefix) for each layer, over
    the rows that write a token of an answer."""
    writes = F.pad(labels[:, prefix + 1:] != IGNORE, (0, 1)).unsqueeze(1)     # the token after it
    means = (torch.stack(looks) * writes).sum((1, 3)) / writes.sum()          # (L, H)
    return means.unflatten(1, (kv_heads, -1)).mean(-1)


def fused_attention(query, key, value, causal):
    """What BlockByBlock computes, in one kernel, which on a GPU never writes scores to memory."""
    mask = causal_lower_right(query.shape[-2], key.shape[-2]) if causal else None
    flat = (x.flatten(0, -4) for x in (query, key, value))             # the kernel takes four axes
    return F.scaled_dot_product_attention(*flat, attn_mask=mask, scale=1.0).view(query.shape)


class BlockByBlock(torch.autograd.Function):
    """Attention of (B, ..., N, D) queries over (B, ..., T, D) keys, forward and backward for one
    page of the batch and BLOCK of its queries at a time: on a CPU the scores of all of them leave
    the cache, and fetching them takes longer than the arithmetic. If causal, the last N of the T
    tokens are the queries', and the keys behind a block are left out.

    As two matrix products, whose backward pass on a CPU takes less time than that of
    scaled_dot_product_attention. The softmax stays in the products' type; autocast would take it to
    float32."""

    @staticmethod
    def forward(ctx, query, key, value, causal):
        N, T = query.shape[-2], key.shape[-2]
        ctx.blocks = [(slice(start, start + BLOCK),
                       slice(min(T, T - N + start + BLOCK) if causal else T))
                      for start in range(0, N, BLOCK)]            # queries and the keys they see
        hidden = torch.full((min(N, BLOCK),) * 2, -1e4, dtype=query.dtype,
                            device=query.device).triu(1)
        weights, output = [], torch.empty_like(query)
        for q, k, v, o in zip(query, key, value, output):
            for rows, seen in ctx.blocks:
                scores = torch.matmul(q[..., rows, :], k[..., seen, :].transpose(-1, -2))
                if causal:
                    n = scores.shape[-2]
                    scores[..., -n:] += hidden[:n, :n]
                weights.append(scores.softmax(-1))
                o[..., rows, :] = torch.matmul(weights[-1], v[..., seen, :])
        ctx.save_for_backward(query, key, value, *weights)
        return output

    @staticmethod
    def backward(ctx, of_output):
        query, key, value, *weights = ctx.saved_tensors
        summed = query.dtype                            # of one block; more are added in float32
        if len(ctx.blocks) > 1:
            summed = torch.promote_types(summed, torch.float32)
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros_like(x, dtype=summed) for x in (key, value))
        remaining = iter(weights)
        for q, k, v, of_o, of_q, of_k, of_v in zip(query, key, value, of_output, of_query, of_key,
                                                   of_value):
            for rows, seen in ctx.blocks:
                p, of_rows = next(remaining), of_o[..., rows, :]
                of_p = torch.matmul(of_rows, v[..., seen, :].transpose(-1, -2))
                of_scores = torch._softmax_backward_data(of_p, p, -1, p.dtype)
                of_q[..., rows, :] = torch.matmul(of_scores, k[..., seen, :])
                of_k[..., seen, :] += torch.matmul(of_scores.transpose(-1, -2), q[..., rows, :])
                of_v[..., seen, :] += torch.matmul(p.transpose(-1, -2), of_rows)
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None


AttentionInterface.register("products", attend)
AttentionMaskInterface.register("products", lambda **kwargs: None)


def as_matrix_product(convolution):
    """Replaces the forward pass of a convolution whose stride is its kernel's size, over two or
    three dimensions, by the matrix product that it is: in bfloat16 on a CPU the convolution takes
    half of a step."""
    kernel = convolution.kernel_size

    def forward(x):                                                     # (N, channels, *sizes)
        counts = [size // k for size, k in zip(x.shape[2:], kernel)]
        x = x.reshape(*x.shape[:2], *[n for pair in zip(counts, kernel) for n in pair])
        at, within = range(2, x.ndim, 2), range(3, x.ndim, 2)
        x = x.permute(0, *at, 1, *within).flatten(1 + len(counts))      # (N, *counts, inputs)
        return F.linear(x, convolution.weight.flatten(1)).movedim(-1, 1)

    convolution.forward = forward
