"""Trains the small document readers in tiny/ from nothing: pages are rendered as they are needed.

    python experiments/train_tiny.py [--work DIR] [--out DIR] [--device DEVICE] [--threads N] ...
    python experiments/train_tiny.py --layout llava-next --teacher tiny/qwen2-vl ...
    python experiments/train_tiny.py --start-from DIR --stage NAME --average DIR [DIR ...] ...

Two kinds of step, both with transformers' own classes (the forward pass of this project,
model_llava.py, is then tested against them):

    vision      the vision tower alone: a linear layer on each image token names the characters
                whose centre lies in the 16 x 16 pixels that the token shows
    language    next-token loss on what pages.tasks asks of a page; the vision loss stays on at half
                its weight, and so do hints

Hints are linear layers on the output of decoder layer HINTED_LAYER. Where an image token shows text
they name its line, in a table also its column and its row's item, where it shows a coloured shape
that shape and which of the page's it is; and before each character of an answer the line that is
being written, the shape that is being named, or the column and the item that were asked for.
They were added when the models found a table's row but took any of its columns, and named lines
were read badly. They were not enough: the hinted layer told columns apart, and the heads that look
answers up, in the last layers, did not ask for them, until pages of the kind "fields", where the
column alone says which value is meant, were mixed in. Of two trainings the one with hints named
more shapes on large pages than the one without (tiny/README.md, "Larger tiles").

STAGES says in which order, on pages that grow from one short line to 512 x 512 pixels. A model that
cannot tell characters apart does not learn to find them either, so vision comes first.

With --teacher the LLaVA-NeXT layout starts from a trained Qwen2-VL one, which saves most of the
time: in vision steps its image tokens, which show the same 16 x 16 pixels, are also drawn towards
the teacher's, and its decoder begins as a copy, with each KV head repeated for the query heads that
shared it. Positions are counted otherwise there, and nothing keeps the copy as it was.

With --start-from and --average the stages from --stage on begin with trained weights, and what is
written is the mean of what became of them and of other weights, as a rule those that they began
with. On a CPU the later stages by themselves made many pages read worse; the mean read them about
as well as before or better on qwen2-vl, and better on llava-next. The stage "many", on a GPU,
needed no mean. What went before "tiles" ran with smaller ones (figures, and the order of it all:
tiny/README.md).

With --fonts a share of the pages, Stage.in_fonts, is drawn in other fonts than Pillow's built-in
one.

Pages for a step of stage "many", 64 of them, take one core half a second to render (AMD EPYC). An
H100 that trained both layouts at a time, llava-next with tiles of 128 x 128, took 0.18 seconds a
step, each with --workers 7.

In language steps several conversations share a page, which is computed once for all of them.

One token per character, so that nothing can be guessed from a vocabulary. Every batch is drawn from
a random generator seeded by (seed, layout, stage, step): a run that was killed and resumed sees the
same pages as one that was not. The state is saved to --work at most every 45 seconds, and a run
continues from it.

Weight matrices are trained with Muon, the rest with AdamW. In one run each of the first stage, cut
to 400 steps, Muon at 5e-3 named 37 % of the cells at the end, AdamW at 2e-3 9 %.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import (AttentionInterface, AttentionMaskInterface, CLIPVisionConfig,
                          GenerationConfig, LlamaConfig, LlavaNextConfig,
                          LlavaNextForConditionalGeneration, PreTrainedTokenizerFast, Qwen2VLConfig,
                          Qwen2VLForConditionalGeneration)
from transformers.vision_utils import get_vision_position_ids

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cache import OneLineParser
from experiments.arguments import device_name, font_files, output_folder, whole_number
from experiments.pages import COLORS, COLUMNS, ITEMS, SHAPES, prompt, render_page, tasks
from model_llava import load

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>"]
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
VOCABULARY = {token: i for i, token in enumerate(SPECIAL + ["<|unknown|>"] + list(CHARACTERS))}
END, IM_START, IM_END, VISION_START, VISION_END, IMAGE, VIDEO = range(len(SPECIAL))
IGNORE = -100                     # label of positions that carry no loss
ROUND = 32                        # conversations are padded to a multiple: few shapes are faster

BLOCK = 256                       # queries that attend at a time, on a CPU
CELL = 16                         # an image token shows CELL x CELL pixels of the page
CHARS_PER_CELL = 3
HINTS = COLUMNS + [f"{color} {shape}" for color in COLORS for shape in SHAPES]
LINES = [str(i) for i in range(1, 29)] + [f"shape {i}" for i in range(1, 5)]
HINTED_LAYER, NO_HINTS = 3, (IGNORE, IGNORE, IGNORE)
LONGEST = 96                      # tokens in a conversation of several turns
FAR_LINE = 12                     # lines beyond it are miscounted, so they are asked for more often
ADAMW_RATE = 0.25                 # share of Muon's learning rate that AdamW gets ...
HINT_RATE = 0.1                   # ... and the layers for hints; at 1 their loss jumped to 12


@dataclass(frozen=True)
class Stage:
    name: str
    step: str             # "vision" or "language"
    sizes: tuple          # page sizes in pixels, one drawn for each batch
    batch: int
    steps: int
    rate: float           # learning rate at the stage's start ...
    end_rate: float       # ... and at its end, linear between
    kinds: tuple = ("lines",)
    max_rows: int = 0     # lines of text at most; 0 for as many as fit
    wear: float = 0.0     # see pages.render_page
    rewording: float = 0.0      # share of prompts that are not the first wording
    transcripts: float = 0.4    # share of batches whose pages are transcribed
    vision_every: int = 1       # in language steps the vision tower learns in one of so many ...
    vision_rate: float = 0.4    # ... at this share of the learning rate
    hinted: float = 1.0         # weight of the decoder's hints in the loss
    in_fonts: float = 0.5       # share of pages that are drawn in --fonts, if there are any
    conversations: int = 5      # about a page, at most
    batch_pixels: float = math.inf      # at most: a batch has fewer large pages
    shapes_alone: float = 0.0   # share of batches of nothing but pages with shapes, not of `kinds`


SMALL_KINDS = ("lines", "lines", "form")
PLAIN_KINDS = ("lines", "form", "form", "receipt", "receipt")
ALL_KINDS = (*["form"] * 5, *["receipt"] * 5, *["label"] * 2, *["table"] * 2, "lines", "letter",
             "sign", "shapes")
ANSWER_KINDS = (*["form"] * 5, *["receipt"] * 3, *["label"] * 2, *["table"] * 3, "shapes", "lines",
                "letter")
EVERY_KIND = (*["form"] * 3, *["receipt"] * 2, *["label"] * 2, *["table"] * 5, *["shapes"] * 2,
              *["sign"] * 2, *["lines"] * 2, *["letter"] * 2)
MOSTLY_TABLES = (*["table"] * 10, *["shapes"] * 4, *["form"] * 3, "receipt", "label", "lines",
                 "letter")
LAST_KINDS = (*["form"] * 7, *["table"] * 6, *["label"] * 3, *["shapes"] * 3, *["lines"] * 3,
              *["letter"] * 3, *["receipt"] * 2, *["sign"] * 2)
FIELDS_AND_TABLES = (*["fields"] * 9, *["table"] * 8, *["form"] * 2, *["shapes"] * 2, "receipt",
                     "label", "lines", "letter")
WEAK_KINDS = (*["shapes"] * 6, *["form"] * 5, *["sign"] * 5, *["table"] * 4, *["lines"] * 4,
              *["letter"] * 4, *["label"] * 3, *["receipt"] * 2)
DENSE_KINDS = (*["lines"] * 6, *["letter"] * 5, *["sign"] * 5, *["shapes"] * 6, *["form"] * 5,
               *["table"] * 4, *["label"] * 3, *["receipt"] * 2)
FAR_KINDS = (*["lines"] * 7, *["letter"] * 5, *["sign"] * 9, *["shapes"] * 6, *["form"] * 5,
             *["table"] * 6, "fields", *["label"] * 3, *["receipt"] * 2)
MOSTLY_SHAPES = (*["shapes"] * 14, *["lines"] * 3, *["letter"] * 2, *["sign"] * 2, *["form"] * 2,
                 *["table"] * 2, "label")
GLYPH_KINDS = (*["lines"] * 9, *["letter"] * 5, *["form"] * 5, *["table"] * 4, *["sign"] * 4,
               *["label"] * 3, *["shapes"] * 3, *["receipt"] * 2)
LAST_OF_QWEN = (*["shapes"] * 10, *["lines"] * 8, *["letter"] * 7, *["sign"] * 5,
                *["form"] * 5, *["table"] * 4, *["label"] * 3, *["receipt"] * 2, "fields")
LAST_OF_LLAVA = (*["shapes"] * 9, *["lines"] * 7, *["form"] * 6, *["letter"] * 5,
                 *["sign"] * 5, *["table"] * 5, *["label"] * 4, *["receipt"] * 2)
SHARPER_KINDS = (*["lines"] * 14, *GLYPH_KINDS)
FINAL_OF_QWEN = (*["lines"] * 12, *["letter"] * 9, *["form"] * 6, *["sign"] * 5, *["shapes"] * 5,
                 *["label"] * 4, *["table"] * 4, *["receipt"] * 2)
BALANCED_KINDS = (*["shapes"] * 14, *["lines"] * 10, *["table"] * 7, *["letter"] * 6,
                  *["form"] * 5, *["label"] * 3, *["sign"] * 3, *["receipt"] * 2)
FINER_OF_QWEN = (*["lines"] * 16, *["shapes"] * 10, *["letter"] * 9, *["sign"] * 5, *["form"] * 5,
                 *["label"] * 4, *["table"] * 4, *["receipt"] * 2)
KINDS_IN_FONTS = (*["lines"] * 16, *["letter"] * 9, *["shapes"] * 8, *["form"] * 6, *["sign"] * 5,
                  *["label"] * 5, *["table"] * 5, *["receipt"] * 3)
FINAL_OF_LLAVA = (*["lines"] * 8, *["shapes"] * 8, *["form"] * 6, *["letter"] * 6, *["sign"] * 5,
                  *["table"] * 5, *["label"] * 4, *["receipt"] * 2)
FINER_OF_LLAVA = (*["shapes"] * 10, *["lines"] * 10, *["form"] * 8, *["letter"] * 7, *["table"] * 6,
                  *["label"] * 6, *["sign"] * 3, *["receipt"] * 2)
LINES_OF_QWEN = (*["lines"] * 4, *FINER_OF_QWEN)
LINES_OF_LLAVA = (*["lines"] * 4, *FINER_OF_LLAVA)
MORE_LINES_OF_LLAVA = (*["lines"] * 2, *["letter"] * 3, *LINES_OF_LLAVA)
SIZES_OF_QWEN = ((256, 128), (256, 192), *[(256, 256)] * 2, *[(256, 384)] * 2)
SIZES_OF_LLAVA = ((256, 128), *[(256, 256)] * 2, (256, 384))
LARGE_OF_QWEN = (*SIZES_OF_QWEN, (384, 384), (512, 256), (384, 512), *[(512, 512)] * 3)
LARGE_OF_LLAVA = (*[(256, 256)] * 2, (256, 384), (384, 384), (512, 256), (384, 512),
                  *[(512, 512)] * 2)
LARGEST_OF_LLAVA = ((256, 128), *[(256, 256)] * 3, (256, 384), (384, 384), (512, 256), (384, 512),
                    *[(512, 512)] * 5)
HALF_OF_THEM_LARGE = ((256, 256), (256, 256), (256, 384), (384, 384), (384, 512), (512, 256),
                      (512, 256), *[(512, 512)] * 7)
ALL_SIZES = (*SIZES_OF_LLAVA, (384, 256), (384, 384), (512, 256), (256, 512), (384, 512),
             *[(512, 512)] * 4)
EVEN_KINDS = (*["lines"] * 14, *["shapes"] * 10, *["letter"] * 9, *["table"] * 8, *["form"] * 7,
              *["label"] * 6, *["sign"] * 4, *["receipt"] * 4)
KINDS_OF_TEXT = (*["lines"] * 14, *["letter"] * 9, *["form"] * 8, *["table"] * 7, *["label"] * 6,
                 *["sign"] * 5, *["receipt"] * 3)
STAGES = {
    "qwen2-vl": (
        Stage("vision", "vision", ((128, 48), (96, 64), (192, 32)), 32, 2500, 1e-2, 3e-3,
              SMALL_KINDS),
        Stage("glyphs", "vision", ((256, 64), (192, 96), (128, 128)), 16, 1400, 6e-3, 5e-4,
              ALL_KINDS, wear=0.15),
        Stage("words", "language", ((64, 32), (80, 32)), 32, 300, 6e-3, 6e-3, ("lines", "form"),
              transcripts=0.6),
        Stage("strips", "language", ((128, 32), (128, 48), (160, 32)), 24, 300, 6e-3, 6e-3,
              ("lines", "form"), transcripts=0.5),
        Stage("blocks", "language", ((192, 64), (256, 64), (128, 128)), 16, 300, 6e-3, 5e-3,
              PLAIN_KINDS),
        Stage("cards", "language", ((256, 128), (192, 192), (320, 96)), 10, 300, 5e-3, 4e-3,
              ALL_KINDS, wear=0.05),
        Stage("pages", "language", ((256, 256), (256, 256), (256, 128), (256, 192)), 6, 1050, 2e-3,
              2e-4, ALL_KINDS, wear=0.1, rewording=0.2, transcripts=0.15),
        Stage("answers", "language", ((256, 128), (256, 128), (256, 192), (256, 256)), 8, 2600,
              2.5e-3, 3e-5, ANSWER_KINDS, wear=0.05, rewording=0.1, transcripts=0.12),
        Stage("everything", "language",
              ((256, 128), (256, 192), (256, 256), (256, 256), (256, 320)), 8, 1050, 3e-3, 2e-5,
              EVERY_KIND, wear=0.05, rewording=0.1, transcripts=0.25),
        Stage("columns", "language", ((256, 64), (256, 96), (256, 128)), 8, 500, 2e-3, 2e-3,
              MOSTLY_TABLES, wear=0.05, rewording=0.1, transcripts=0.1),
        Stage("lines", "language", ((256, 128), (256, 192), *[(256, 256)] * 3, (256, 384)), 8, 2100,
              2e-3, 2e-5, LAST_KINDS, wear=0.05, rewording=0.1, transcripts=0.35, vision_every=3),
        Stage("tables", "language", ((256, 96), (256, 128), (256, 128), (256, 192)), 8, 1000,
              1.5e-3, 3.75e-4, FIELDS_AND_TABLES, wear=0.05, rewording=0.1, transcripts=0.1,
              vision_every=3),
        Stage("finish", "language", ((256, 128), (256, 192), *[(256, 256)] * 3, (256, 384)), 8,
              1400, 1.2e-3, 2e-5, LAST_KINDS, wear=0.05, rewording=0.1, transcripts=0.35,
              vision_every=3),
        Stage("polish", "language", ((256, 128), (256, 192), *[(256, 256)] * 2, (256, 384)), 8,
              520, 7e-4, 1e-5, WEAK_KINDS, wear=0.05, rewording=0.1, transcripts=0.4,
              vision_every=3),
        Stage("dense", "language", ((256, 192), *[(256, 256)] * 2, *[(256, 384)] * 2), 8, 490,
              1.5e-3, 1.2e-3, DENSE_KINDS, wear=0.05, rewording=0.1, transcripts=0.5,
              vision_every=3),
        Stage("far", "language", ((256, 192), *[(256, 256)] * 2, *[(256, 384)] * 2), 8, 1560,
              1.3e-3, 1e-5, FAR_KINDS, wear=0.05, rewording=0.1, transcripts=0.5, vision_every=3),
        Stage("shapes", "language", ((256, 128), (256, 192), (256, 256)), 8, 700, 1.2e-3, 1e-3,
              MOSTLY_SHAPES, wear=0.05, rewording=0.1, transcripts=0.2, vision_every=3),
        Stage("last", "language", SIZES_OF_QWEN, 8, 1500, 1e-3, 1e-5, LAST_OF_QWEN, wear=0.05,
              rewording=0.1, transcripts=0.4, vision_every=2, vision_rate=0.6),
        Stage("sharper", "vision", ((256, 128), (256, 96), (192, 192)), 12, 5000, 1e-3, 2e-5,
              SHARPER_KINDS, wear=0.05),
        Stage("final", "language", ((256, 192), *[(256, 256)] * 3, *[(256, 384)] * 2), 8, 900,
              1e-3, 1e-5, FINAL_OF_QWEN, wear=0.05, rewording=0.1, transcripts=0.35,
              vision_every=2, vision_rate=0.6),
        Stage("balanced", "language", SIZES_OF_QWEN, 8, 360, 8e-4, 1e-5, BALANCED_KINDS, wear=0.05,
              rewording=0.1, transcripts=0.3, vision_every=2, vision_rate=0.6),
        Stage("finer", "language", SIZES_OF_QWEN, 8, 1750, 1e-3, 1e-5, FINER_OF_QWEN, wear=0.05,
              rewording=0.1, transcripts=0.35, vision_every=2, vision_rate=0.8),
        Stage("next", "language", SIZES_OF_QWEN, 8, 1000, 1e-3, 1e-5, FINER_OF_QWEN, wear=0.05,
              rewording=0.1, transcripts=0.35, vision_every=2, vision_rate=0.8),
        Stage("again", "language", SIZES_OF_QWEN, 8, 1200, 1e-3, 1e-5, LINES_OF_QWEN, wear=0.05,
              rewording=0.1, transcripts=0.35, vision_every=2, vision_rate=0.8),
        Stage("fonts", "language", SIZES_OF_QWEN, 8, 1500, 1.2e-3, 1e-5, KINDS_IN_FONTS, wear=0.05,
              rewording=0.1, transcripts=0.35, vision_rate=1.0),
        Stage("families", "language", SIZES_OF_QWEN, 8, 1200, 1.2e-3, 1e-5, (*["lines"] * 8,
              *FINER_OF_QWEN), wear=0.05, rewording=0.1, transcripts=0.35, vision_rate=1.0,
              in_fonts=0.25),
        Stage("large", "language", LARGE_OF_QWEN, 8, 340, 1e-3, 1e-5, LINES_OF_QWEN, wear=0.05,
              rewording=0.1, transcripts=0.25, vision_every=3, vision_rate=0.8, hinted=0,
              in_fonts=0.25, batch_pixels=8 * 256 * 256),
        Stage("settle", "language", LARGE_OF_QWEN, 8, 230, 8e-4, 1e-5, LINES_OF_QWEN, wear=0.05,
              rewording=0.1, transcripts=0.25, vision_every=3, vision_rate=0.8, hinted=0,
              in_fonts=0.25, batch_pixels=8 * 256 * 256),
        Stage("many", "language", ALL_SIZES, 64, 2466, 2e-3, 1e-5, EVEN_KINDS, wear=0.05,
              rewording=0.1, transcripts=0.35, vision_rate=1.0, hinted=0, in_fonts=0.15,
              conversations=8, batch_pixels=64 * 256 * 256),
    ),
    "llava-next": (
        Stage("vision", "vision", ((128, 128),), 24, 2500, 1e-2, 3e-3, SMALL_KINDS),
        Stage("glyphs", "vision", ((256, 128), (128, 256)), 10, 1500, 6e-3, 3e-4, ALL_KINDS,
              wear=0.15),
        Stage("words", "language", ((128, 128),), 16, 200, 5e-3, 4e-3, SMALL_KINDS,
              transcripts=0.3),
        Stage("pages", "language", ((256, 128), (256, 128), (256, 256), (128, 256)), 8, 1800, 4e-3,
              3e-5, ANSWER_KINDS, wear=0.05, rewording=0.1, transcripts=0.12),
        Stage("everything", "language",
              ((256, 128), (256, 128), (256, 256), (256, 256), (256, 384)), 8, 1150, 3e-3, 2e-5,
              EVERY_KIND, wear=0.05, rewording=0.1, transcripts=0.25),
        Stage("wide", "vision", ((256, 128), (128, 256)), 12, 5500, 1.5e-3, 5e-5, EVERY_KIND,
              wear=0.1),
        Stage("columns", "language", ((256, 128),), 8, 350, 2e-3, 2e-3, MOSTLY_TABLES, wear=0.05,
              rewording=0.1, transcripts=0.1),
        Stage("lines", "language", (*[(256, 128)] * 2, *[(256, 256)] * 2, (256, 384)), 8, 1250,
              2e-3, 2e-5, LAST_KINDS, wear=0.05, rewording=0.1, transcripts=0.35),
        Stage("tables", "language", ((256, 128),), 8, 1000, 1.5e-3, 3.75e-4, FIELDS_AND_TABLES,
              wear=0.05, rewording=0.1, transcripts=0.1, vision_every=2),
        Stage("finish", "language", (*[(256, 128)] * 2, *[(256, 256)] * 2, (256, 384)), 8, 1400,
              1.2e-3, 2e-5, LAST_KINDS, wear=0.05, rewording=0.1, transcripts=0.35,
              vision_every=2),
        Stage("polish", "language", SIZES_OF_LLAVA, 8, 700, 7e-4, 1e-5, WEAK_KINDS, wear=0.05,
              rewording=0.1, transcripts=0.4, vision_every=2),
        Stage("dense", "language", SIZES_OF_LLAVA, 8, 2100, 1.5e-3, 1e-5, DENSE_KINDS, wear=0.05,
              rewording=0.1, transcripts=0.4, vision_rate=1.0),
        Stage("wider", "vision", ((256, 128), (128, 256)), 12, 6500, 2e-3, 5e-5, GLYPH_KINDS,
              wear=0.05),
        Stage("last", "language", SIZES_OF_LLAVA, 8, 1300, 1.2e-3, 1e-5, LAST_OF_LLAVA, wear=0.05,
              rewording=0.1, transcripts=0.35, vision_every=2),
        Stage("sharper", "vision", ((256, 128), (128, 256)), 12, 12000, 2e-3, 3e-5, GLYPH_KINDS,
              wear=0.05),
        Stage("final", "language", SIZES_OF_LLAVA, 8, 750, 1.2e-3, 1e-5, FINAL_OF_LLAVA, wear=0.05,
              rewording=0.1, transcripts=0.35, vision_every=2, hinted=0),
        Stage("finer", "language", SIZES_OF_LLAVA, 8, 950, 1.2e-3, 1e-5, FINER_OF_LLAVA, wear=0.05,
              rewording=0.1, transcripts=0.35, vision_every=2, vision_rate=0.6, hinted=0),
        Stage("again", "language", SIZES_OF_LLAVA, 8, 1500, 1.2e-3, 1e-5, LINES_OF_LLAVA, wear=0.05,
              rewording=0.1, transcripts=0.35, vision_every=2, vision_rate=1.0, hinted=0),
        Stage("more", "language", SIZES_OF_LLAVA, 8, 1300, 1.2e-3, 1e-5, LINES_OF_LLAVA, wear=0.05,
              rewording=0.1, transcripts=0.35, vision_every=2, vision_rate=1.0, hinted=0),
        Stage("still", "language", SIZES_OF_LLAVA, 8, 880, 9.5e-4, 1e-5, MORE_LINES_OF_LLAVA,
              wear=0.05, rewording=0.1, transcripts=0.35, vision_rate=1.0, hinted=0),
        Stage("large", "language", LARGE_OF_LLAVA, 8, 600, 1e-3, 1e-5, MORE_LINES_OF_LLAVA,
              wear=0.05, rewording=0.1, transcripts=0.25, vision_rate=1.0, hinted=0,
              batch_pixels=8 * 256 * 256),
        Stage("many", "language", ALL_SIZES, 64, 2386, 2e-3, 1e-5, EVEN_KINDS, wear=0.05,
              rewording=0.1, transcripts=0.35, vision_rate=1.0, hinted=0, in_fonts=0.15,
              conversations=8, batch_pixels=64 * 256 * 256),
        Stage("tiles", "vision", ((256, 128), (128, 256)), 12, 2500, 2e-3, 5e-5, GLYPH_KINDS,
              wear=0.05),
        Stage("enlarged", "language", (*SIZES_OF_LLAVA, (256, 256)), 8, 1300, 1.2e-3, 1e-5,
              EVEN_KINDS, wear=0.05, rewording=0.1, transcripts=0.35, vision_rate=1.0,
              hinted=0, conversations=8, batch_pixels=8 * 256 * 256),
        Stage("larger", "language", LARGEST_OF_LLAVA, 12, 1293, 1.2e-3, 1e-5, EVEN_KINDS,
              wear=0.05, rewording=0.1, transcripts=0.35, vision_rate=1.0, hinted=0,
              in_fonts=0.12, conversations=8, batch_pixels=10 * 256 * 256),
        Stage("counting", "language", LARGEST_OF_LLAVA, 12, 1200, 1.2e-3, 1e-5, EVEN_KINDS,
              wear=0.05, rewording=0.1, transcripts=0.2, vision_rate=1.0, hinted=0,
              in_fonts=0.12, conversations=10, batch_pixels=10 * 256 * 256),
        Stage("objects", "language", HALF_OF_THEM_LARGE, 12, 770, 1e-3, 1e-5, KINDS_OF_TEXT,
              wear=0.05, rewording=0.1, transcripts=0.12, vision_every=2, vision_rate=1.0,
              hinted=0.2, in_fonts=0.1, conversations=12, batch_pixels=10 * 256 * 256,
              shapes_alone=0.27),
    ),
}


# ---- the two layouts -----------------------------------------------------------------------------

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
        """8 layers x 8 query heads x 32, 4 KV heads: 64 query heads in all, two to a KV head; 5.9 M
        parameters.

        M-RoPE gives the columns of an image the lowest frequencies. Some of them have to turn
        visibly over the few columns between two cells of a table, others hardly at all over an
        answer, so that a head can still match content alone. So columns have 10 of the 16
        frequencies, from 0.045 down to 0.0004. With 6 of them and a rope_theta of 100 (0.056 to
        0.013) transcripts were right up to the 150th character; from the 200th half was wrong. With
        10 and a rope_theta of 1000 (0.075 to 0.0015) 0.98 of the characters of the first nine lines
        were right, given those before, 0.86 of lines 13 to 15 and 0.71 of lines 16 to 18; of the
        same lines, asked for by their number, 0.93.
        """
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

    def token_labels(self, cells):
        """(rows, columns, n) of a page -> one row for each of the decoder's image tokens."""
        return self.cell_labels(cells)


class LlavaNextLayout:
    """MHA, rotary positions in one dimension; tiles of 160 x 160 pixels, a patch of 16 x 16 is an
    image token; the thumbnail comes first, every row of the page ends with a newline token.

    Pages whose sides are multiples of 128 pixels are enlarged to as many tiles. Their type, drawn
    at 13 to 16 pixels, is so 16 to 20 pixels high; as it was drawn, patches as coarse as these told
    similar characters apart less well (tiny/README.md)."""

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
        """8 layers x 8 heads x 32: 64 heads, 5.9 M parameters. The vision tower is as wide as a
        patch has gray values, 256, since most lines of text lie across two patches, and what one
        shows of a character must get to the other. With a width of 128 similar characters were
        confused, with 192 fewer, and with 256 and more training fewer still; MLPs of 640 neurons
        instead of 384 changed nothing. Unlike in the published models all of its layers are used
        (vision_feature_layer is -1), which leaves the decoder more of the 12 MB."""
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

    def token_labels(self, cells):
        """(rows, columns, n) of a page -> one row for each of the decoder's image tokens: the
        thumbnail's, then row by row, each with its newline's."""
        n = cells.shape[-1]
        lines = np.pad(cells, ((0, 0), (0, 1), (0, 0)), constant_values=IGNORE)
        return np.concatenate([np.full((self.side ** 2, n), IGNORE), lines.reshape(-1, n)])


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
    """transformers' model in float32 of a folder that an option names; None without one. Raises
    ValueError."""
    if not folder:
        return None
    try:
        family = load(folder, "cpu", "float32").config.family
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None
    with torch.device("meta"):
        wanted = LAYOUTS[layout].model_class(LAYOUTS[layout].config())
    if family == wanted.config.model_type:
        model = LAYOUTS[layout].model_class.from_pretrained(folder, dtype=torch.float32)
        here, there = ({name: x.shape for name, x in m.state_dict().items()}
                       for m in (model, wanted))
        if here == there:
            return model
    raise ValueError(f"{option} {folder}: not a model of the layout {layout} and its sizes, as "
                     f"tiny/{layout} is")


# ---- the batches ---------------------------------------------------------------------------------

def enlarged(page, zoom):
    """A page as an image processor resizes it, with the places of its words and objects."""
    def times(numbers):
        return tuple(x * zoom for x in numbers)

    size = tuple(map(round, times(page.image.size)))
    return replace(page, image=page.image.resize(size, Image.Resampling.BICUBIC),
                   lines=[[replace(word, box=times(word.box), centers=[*map(times, word.centers)])
                           for word in line] for line in page.lines],
                   objects=[replace(thing, box=times(thing.box)) for thing in page.objects])


def cell_characters(page):
    """(rows, columns, CHARS_PER_CELL) int64: the characters whose centre lies in each cell of the
    page, 0 for none."""
    rows, columns = page.image.height // CELL, page.image.width // CELL
    cells = np.zeros((rows, columns, CHARS_PER_CELL), dtype=np.int64)
    used = np.zeros((rows, columns), dtype=int)
    for word in (word for line in page.lines for word in line):
        for character, (x, y) in zip(word.text, word.centers):
            row, column = int(y // CELL), int(x // CELL)
            if 0 <= row < rows and 0 <= column < columns and used[row, column] < CHARS_PER_CELL:
                cells[row, column, used[row, column]] = VOCABULARY[character]
                used[row, column] += 1
    return cells


def number(names, name):
    return names.index(name) if name in names else IGNORE


def cell_contents(page):
    """(rows, columns, CHARS_PER_CELL + 1) int64: cell_characters, and the number in HINTS of the
    coloured shape that a cell shows, IGNORE for none."""
    shapes = cell_hints(page)[..., :1]
    shapes[shapes < len(COLUMNS)] = IGNORE
    return np.concatenate([cell_characters(page), shapes], -1)


def cell_hints(page):
    """(rows, columns, 3) int64: what the cells of a page do not say themselves. The number in HINTS
    of the table's column or of the coloured shape that a cell is part of; the number in ITEMS of
    its table row's item; the number in LINES of its line or shape. IGNORE for none."""
    hints = np.full((page.image.height // CELL, page.image.width // CELL, 3), IGNORE)
    hinted = [(thing.box, (number(HINTS, thing.text), IGNORE, number(LINES, f"shape {i}")))
              for i, thing in enumerate(page.objects, 1)]
    header, *body = page.lines
    hinted += [(word.box, (IGNORE, IGNORE, number(LINES, str(i))))
               for i, line in enumerate(page.lines, 1) for word in line]
    if header[0].text == "Item":
        hinted += [(cell.box, (number(HINTS, column.text), number(ITEMS, item.text),
                               number(LINES, str(i))))
                   for i, (item, *cells) in enumerate(body, 2)
                   for column, cell in zip(header[1:], cells)]
    for box, numbers in hinted:
        x0, y0, x1, y1 = (round(edge / CELL) for edge in box)
        hints[y0:max(y1, y0 + 1), x0:max(x1, x0 + 1)] = numbers
    return hints


def answer_hints(task, about, answer):
    """The same for each character of an answer and its end: the column and the item in "Price of
    Apple", the line that is written or the shape that is named."""
    column, _, item = (about or "").partition(" of ")
    hints, order = (number(HINTS, column), number(ITEMS, item)) if item else (IGNORE, IGNORE), 1
    numbers = []
    for before in " " + answer:
        order += before == {"transcript": "\n", "shapes": ","}.get(task)
        line = {"transcript": str(order), "shapes": f"shape {order}", "line": about}.get(task)
        numbers.append((*hints, number(LINES, line)))
    return numbers


def conversations(stage, rng, page, transcribe):
    """What is said about one page after its image: its transcript, or some conversations of a few
    questions and answers. Returns [(token ids, labels, hints), ...]; the hints for a character are
    at the token before it, which writes it."""
    transcript, *questions = tasks(page)
    values = [question for question in questions if question[0] == "value"]
    others = [question for question in questions if question[0] != "value"]
    rng.shuffle(values)
    lots = [question for question in others
            for _ in range(3 if question[0] == "line" and int(question[1]) > FAR_LINE else 1)]
    rng.shuffle(lots)
    others = [*dict.fromkeys(lots)]                        # each once, far lines sooner
    chosen = others[:10 if values else 14] + values[:8]
    rng.shuffle(chosen)
    if transcribe or not chosen:
        chosen = [transcript]
    said = []
    for task, about, answer in chosen:
        text = prompt(rng if rng.random() < stage.rewording else None, task, about)
        asked = [VOCABULARY[c] for c in text] + [IM_END]
        answered = [VOCABULARY[c] for c in answer] + [IM_END]
        if said and len(said[-1][0] + asked + answered) < LONGEST:
            asked = [IM_START] + asked
        elif len(said) == stage.conversations:
            break
        else:
            said.append(([], [], []))
        ids, labels, hints = said[-1]
        ids.extend(asked + answered)
        labels.extend([IGNORE] * len(asked) + answered)
        hints.extend([NO_HINTS] * (len(asked) - 1) + answer_hints(task, about, answer) + [NO_HINTS])
    return said


def padded(rows, filling, count, length):
    """Lists of token ids, labels or hints -> (count, length) or (count, length, 3), filled up."""
    rows = rows + [[]] * (count - len(rows))
    return torch.tensor([row + [filling] * (length - len(row)) for row in rows])


def draw_pages(stage, rng, fonts=()):
    """The pages of a batch, all of one size, and whether only their shapes are asked for.

    That is one question a page: beside pages with many, its row would be mostly padding. A batch of
    nothing else has room for twice as many pages."""
    size = rng.choice(stage.sizes)
    only_shapes = stage.shapes_alone > 0 and rng.random() < stage.shapes_alone
    kinds, room = (("shapes",), 2) if only_shapes else (stage.kinds, 1)
    count = max(1, min(room * stage.batch, room * stage.batch_pixels // math.prod(size)))

    def draw():
        others = fonts and rng.random() < stage.in_fonts
        return render_page(rng, rng.choice(kinds), *size, max_rows=stage.max_rows,
                           wear=stage.wear, fonts=fonts if others else (None,))

    return [draw() for _ in range(count)], only_shapes


def make_batch(layout, stage, rng, fonts=(), teacher=None):
    """One batch of a stage: the model's keyword arguments with the hints for each position, and
    what each image token shows (see cell_contents).

    A row is a page, the prefix, and the conversations about it, one behind the other and all of one
    length. Each sees the prefix and itself (see attend) and counts its positions from the prefix,
    as if the others were not there: the page is read once for all of them.

    With a teacher's layout vision steps also have what the teacher's vision tower takes, and for
    each of the model's own image tokens the number of the teacher's that shows the same cell, below
    0 for none."""
    drawn, only_shapes = draw_pages(stage, rng, fonts)
    pages = [enlarged(page, layout.zoom) for page in drawn]
    width, height = pages[0].image.size
    transcribe = not only_shapes and rng.random() < stage.transcripts       # all or none
    said = [conversations(stage, rng, page, transcribe) for page in pages]
    prefix = [IM_START] + layout.image_ids(width, height)
    count = max(map(len, said))
    length = -(-max(len(ids) for page in said for ids, *_ in page) // ROUND) * ROUND

    def rows(k, first, filling):
        """Of each page the prefix's and, filled up, its conversations' ids, labels or hints."""
        return torch.stack([torch.cat([torch.tensor(first), padded(
            [conversation[k] for conversation in page], filling, count, length).flatten(0, 1)])
                            for page in said])

    ids = rows(0, prefix, END)
    labels = rows(1, [IGNORE] * len(prefix), IGNORE)
    hints = rows(2, [NO_HINTS] * len(prefix), NO_HINTS)
    hints[ids == IMAGE] = torch.from_numpy(np.concatenate(
        [layout.token_labels(cell_hints(page)) for page in pages]))
    if not stage.hinted:
        hints.fill_(IGNORE)
    positions = layout.positions(width, height)                                    # (..., prefix)
    following = (positions.max() + 1 + torch.arange(length)).repeat(count)
    positions = torch.cat([positions, following.expand(*positions.shape[:-1], -1)], -1)
    positions = positions.unsqueeze(-2).repeat_interleave(len(pages), -2)          # (..., B, T)
    cells = [layout.cell_labels(cell_contents(page)) for page in pages]
    batch = dict(input_ids=ids, labels=labels, hints=hints, prefix=len(prefix), conversations=count,
                 image_at=prefix.index(IMAGE), position_ids=positions,
                 images=layout.images(pages, drawn))
    if teacher and stage.step == "vision":
        rows, columns = height // CELL, width // CELL
        numbers = np.arange(len(pages) * rows * columns).reshape(len(pages), rows, columns, 1)
        batch["teacher"] = teacher.images(pages, drawn)
        batch["same_cell"] = torch.from_numpy(
            np.concatenate([layout.cell_labels(page)[:, 0] for page in numbers]))
    return batch, torch.from_numpy(np.concatenate(cells))


class Batches(Dataset):
    """Batch number i of a stage, drawn from a generator seeded by (seed, layout, stage, i)."""

    def __init__(self, args, stage, start):
        self.args, self.stage, self.start = args, stage, start

    def __len__(self):
        return max(0, self.stage.steps - self.start)

    def __getitem__(self, i):
        name = f"{self.args.seed} {self.args.layout} {self.stage.name} {self.start + i}"
        return make_batch(LAYOUTS[self.args.layout], self.stage, random.Random(name),
                          self.args.fonts, LAYOUTS["qwen2-vl"] if self.args.teacher else None)


# ---- training ------------------------------------------------------------------------------------

def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, prefix=0,
           conversations=0, pages=0, **kwargs):
    """The attention that make_batch's rows need, registered with transformers. In the decoder the
    prefix attends to itself, and each conversation to the prefix and to itself, causally; in vision
    towers all of a page, or of a tile, attend to all. pages: so many stand one behind the other, as
    if they were one."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    attention = fused_attention if query.is_cuda else BlockByBlock.apply
    with torch.autocast(query.device.type, enabled=False):
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


def as_one_kernel(norm):
    """Replaces the forward pass of transformers' RMSNorm, seven kernels, by torch's."""
    norm.forward = lambda x: F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


class Muon(torch.optim.Muon):
    """torch's, except that matrices of one shape are orthogonalised together. One by one they took
    most of a step's time on a GPU, in the launches of some two thousand short kernels."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}
            for p in (p for p in group["params"] if p.grad is not None):
                self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                alike.setdefault(p.shape, []).append(p)
            for shape, matrices in alike.items():
                grads = [p.grad for p in matrices]
                buffers = [self.state[p]["momentum_buffer"] for p in matrices]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                update = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))
                update = orthogonal(update, group["ns_coefficients"], group["ns_steps"])
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, update.float().unbind(),
                                    alpha=-0.2 * math.sqrt(max(shape)) * group["lr"])


def orthogonal(x, coefficients, steps):
    """Newton-Schulz: (n, A, B) -> n matrices in bfloat16 with the same singular vectors, and
    singular values of about 1 (Keller Jordan et al., "Muon", 2024)."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT, coefficients, steps).mT
    (a, b, c), x = coefficients, x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def naming_loss(layer, states, names):
    """Mean cross-entropy of what a linear layer makes of states (..., E), where names (...) is not
    IGNORE; 0 where it is nowhere."""
    total = F.cross_entropy(layer(states.float()).flatten(0, -2), names.flatten(),
                            ignore_index=IGNORE, reduction="sum")
    return total / (names != IGNORE).sum().clamp(min=1)


def share_of(right, among):
    """Both bool. No part is picked out, since a GPU would be waited for to know how large it is."""
    return (right & among).sum() / among.sum()


def embed(layout, model, batch):
    """(B, T, E): the embeddings of a batch's tokens, with those of its pages in the place of the
    image tokens. transformers lays pages out one by one."""
    x, start = model.get_input_embeddings()(batch["input_ids"]), batch["image_at"]
    image = layout.image_embeddings(model, **batch["images"]).to(x.dtype)
    return torch.cat([x[:, :start], image, x[:, start + image.shape[1]:]], 1)


def moved(thing, device):
    """Tensors, and those in dicts, on a device."""
    if isinstance(thing, dict):
        return {name: moved(part, device) for name, part in thing.items()}
    return thing.to(device, non_blocking=True) if torch.is_tensor(thing) else thing


class Trainer:
    """The model, its auxiliary layers and the optimisers; what is saved and resumed."""

    def __init__(self, args):
        torch.manual_seed(args.seed)
        self.args, self.device = args, torch.device(args.device)
        self.layout, self.stages = LAYOUTS[args.layout], STAGES[args.layout]
        self.model = self.layout.model_class(self.layout.config()).to(self.device)
        self.model.set_attn_implementation("products")
        as_matrix_product(self.layout.patch_embedding(self.model))
        for module in self.model.model.language_model.modules():
            if hasattr(module, "variance_epsilon"):
                as_one_kernel(module)
        torch.backends.cuda.enable_cudnn_sdp(False)            # it makes a plan for every new shape
        torch.backends.cuda.matmul.allow_tf32 = True
        self.cells = nn.Linear(self.model.config.text_config.hidden_size,
                               CHARS_PER_CELL * len(VOCABULARY)).to(self.device)
        self.hints = nn.ModuleList(nn.Linear(self.cells.in_features, len(names)) for names in
                                   (HINTS, HINTS, ITEMS, LINES)).to(self.device)  # first: vision's
        named = dict(self.model.named_parameters())
        vision = {name for name in named if "language_model" not in name}
        self.vision = [named[name] for name in vision]
        matrices = {name for name, p in named.items() if p.ndim == 2 and "embed" not in name}

        def group(of_vision, of_matrices):
            return [p for name, p in named.items()
                    if (name in vision) == of_vision and (name in matrices) == of_matrices]

        self.optimizers = [                               # of each: the vision tower, then the rest
            Muon([dict(params=group(v, True)) for v in (True, False)], weight_decay=0.01,
                 adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([dict(params=group(True, False) + [*self.cells.parameters()]),
                               dict(params=group(False, False))],
                              betas=(0.9, 0.98), weight_decay=0.01),
            torch.optim.AdamW([dict(params=[*self.hints[0].parameters()]),
                               dict(params=[*self.hints[1:].parameters()])],
                              betas=(0.9, 0.98), weight_decay=0.01)]
        self.stage = self.step = 0
        self.saved = time.time()
        self.image_tokens = None           # what the projector gave in the last forward pass
        self.layout.projector(self.model).register_forward_hook(
            lambda module, inputs, output: setattr(self, "image_tokens", output))
        self.hinted = None                 # the output of layer HINTED_LAYER in that pass
        self.model.model.language_model.layers[HINTED_LAYER].register_forward_hook(
            lambda module, inputs, output: setattr(self, "hinted", output))
        self.average = [read_checkpoint(args.layout, "--average", folder)
                        for folder in args.average]
        self.teacher = read_checkpoint("qwen2-vl", "--teacher", args.teacher)
        self.teachers_tokens = None
        if self.teacher:
            self.teacher.to(self.device).set_attn_implementation("products")
            LAYOUTS["qwen2-vl"].projector(self.teacher).register_forward_hook(
                lambda module, inputs, output: setattr(self, "teachers_tokens", output))
        self.state_file = args.work / f"{args.layout}.pt"
        if self.state_file.exists():
            self.load()

    def start_from(self, folder, stage):
        """Begins at a stage with the weights of an exported folder, unless a saved state goes on.
        The layers that name characters and hints are not among the weights; they learn first, while
        the model stands still."""
        weights = read_checkpoint(self.args.layout, "--start-from", folder)
        if self.state_file.exists():
            return
        self.model.load_state_dict(weights.state_dict())
        self.stage = [s.name for s in self.stages].index(stage)
        self.learn_names(self.stages[self.stage])

    def learn_names(self, stage):
        """Trains the layers that name what image tokens show, then those on the decoder's states if
        the stage has hints, and nothing else."""
        optimizer = torch.optim.Adam([*self.cells.parameters(), *self.hints.parameters()])
        parts = [(replace(stage, name="names", step="vision", batch=min(stage.batch, 8), steps=120),
                  1e-2)]
        if stage.hinted:
            parts.append((replace(stage, name="hints", transcripts=0, steps=40), 4e-3))
        self.model.requires_grad_(False)
        for part, rate in parts:
            for step, batch in enumerate(tqdm(self.batches(part, 0), desc=part.name)):
                optimizer.param_groups[0]["lr"] = rate * (1 - step / part.steps)
                self.loss(*batch, part)[0].backward()
                optimizer.step()
                optimizer.zero_grad()
        self.model.requires_grad_(True)

    def load(self):
        state = torch.load(self.state_file, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.cells.load_state_dict(state["cells"])
        self.hints.load_state_dict(state["hints"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.stage, self.step = state["stage"], state["step"]
        print(f"resumed at stage {self.stages[self.stage].name}, step {self.step}"
              if self.stage < len(self.stages) else "done")

    def save(self, every=45):
        if time.time() - self.saved < every:
            return
        temporary = self.state_file.with_suffix(".tmp")
        torch.save(dict(model=self.model.state_dict(), cells=self.cells.state_dict(),
                        hints=self.hints.state_dict(),
                        optimizers=[o.state_dict() for o in self.optimizers], stage=self.stage,
                        step=self.step), temporary)
        os.replace(temporary, self.state_file)
        self.saved = time.time()

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, self.args.dtype == "bfloat16")

    def loss(self, batch, contents, stage):
        """The stage's loss; token accuracy (language) or cell accuracy (vision) of the batch."""
        characters, shapes = moved(contents, self.device).split([CHARS_PER_CELL, 1], 1)
        batch = moved(batch, self.device)
        with self.autocast():
            if stage.step == "vision":
                self.layout.see(self.model, **batch["images"])
            else:
                labels = batch["labels"]
                out = self.model(inputs_embeds=embed(self.layout, self.model, batch),
                                 labels=labels, use_cache=False, **{name: batch[name] for name in (
                                     "position_ids", "prefix", "conversations")})
        logits = self.cells(self.image_tokens.float()).view(-1, CHARS_PER_CELL, len(VOCABULARY))
        weight = torch.ones(len(VOCABULARY), device=self.device)
        weight[0] = 0.2                                                    # most of a page is blank
        cell_loss = F.cross_entropy(logits.flatten(0, 1), characters.flatten(), weight,
                                    ignore_index=IGNORE)
        cell_loss = cell_loss + naming_loss(self.hints[0], self.image_tokens.flatten(0, -2),
                                            shapes[:, 0])
        if stage.step == "vision":
            right = (logits.argmax(-1) == characters).all(-1)
            if "teacher" in batch:
                cell_loss = cell_loss + self.unlike(batch["teacher"], batch["same_cell"])
            return cell_loss, share_of(right, characters[:, 0] > 0)
        for layer, wanted in zip(self.hints[1:], batch["hints"].unbind(-1)):
            cell_loss = cell_loss + stage.hinted * naming_loss(layer, self.hinted, wanted)
        predicted, labels = out.logits[:, :-1].argmax(-1), labels[:, 1:]
        return out.loss + 0.5 * cell_loss, share_of(predicted == labels, labels != IGNORE)

    def unlike(self, teacher, same_cell):
        """Mean squared difference of the image tokens from the teacher's of the same cells, over
        the teacher's variance."""
        with torch.no_grad(), self.autocast():
            LAYOUTS["qwen2-vl"].see(self.teacher, **teacher)
        taught, shown = self.teachers_tokens.float(), same_cell >= 0
        own = self.image_tokens.float().flatten(0, -2)
        return F.mse_loss(own[shown], taught[same_cell[shown]]) / taught.var(0).mean()

    @torch.no_grad()
    def adopt_decoder(self):
        """Copies the teacher's decoder: each KV head once for every query head of its group, of an
        MLP's neurons those of the largest weights, no biases."""
        own, taught = self.model.model.language_model, self.teacher.model.language_model
        own.embed_tokens.load_state_dict(taught.embed_tokens.state_dict())
        own.norm.load_state_dict(taught.norm.state_dict())
        groups = taught.config.num_attention_heads // taught.config.num_key_value_heads
        for to, source in zip(own.layers, taught.layers):
            mlp = source.mlp
            norms = [mlp.gate_proj.weight.norm(dim=1), mlp.up_proj.weight.norm(dim=1),
                     mlp.down_proj.weight.norm(dim=0)]
            widest = math.prod(norms).topk(to.mlp.gate_proj.out_features).indices
            theirs = dict(source.named_parameters())
            for name, parameter in to.named_parameters():
                weight = theirs[name]
                if "k_proj" in name or "v_proj" in name:
                    weight = weight.unflatten(0, (-1, to.self_attn.head_dim))
                    weight = weight.repeat_interleave(groups, 0).flatten(0, 1)
                elif "mlp" in name:
                    weight = weight[:, widest] if "down" in name else weight[widest]
                parameter.copy_(weight)

    @torch.no_grad()
    def held_out(self, stage, batches=4):
        """Accuracy on pages of this stage that no training step draws."""
        self.model.eval()
        rng = random.Random("held out")
        accuracy = [self.loss(*make_batch(self.layout, stage, rng), stage)[1].item()
                    for _ in range(batches)]
        self.model.train()
        return sum(accuracy) / len(accuracy)

    def set_rate(self, stage):
        """Linear from the stage's first to its last rate, after a warm-up of 50 steps."""
        rate = stage.rate + (stage.end_rate - stage.rate) * self.step / stage.steps
        rate *= min(1, (self.step + 1) / 50)
        slower = stage.vision_rate if stage.step == "language" else 1
        for optimizer, own, of_vision in zip(self.optimizers, (1, ADAMW_RATE, HINT_RATE),
                                             (slower, slower, 1)):
            vision, language = optimizer.param_groups
            vision["lr"], language["lr"] = rate * own * of_vision, rate * own

    def batches(self, stage, start):
        """The batches of a stage from number `start` on, rendered by other processes."""
        return DataLoader(Batches(self.args, stage, start), batch_size=None,
                          num_workers=self.args.workers, pin_memory=self.device.type == "cuda",
                          prefetch_factor=4 if self.args.workers else None)

    def run_stage(self, stage):
        language = [s for s in self.stages if s.step == "language"]
        if self.teacher and stage == language[0] and self.step == 0:
            self.adopt_decoder()
        bar = tqdm(self.batches(stage, self.step), desc=stage.name, initial=self.step,
                   total=stage.steps, mininterval=5)
        for batch, contents in bar:
            self.set_rate(stage)
            for parameter in self.vision:
                parameter.requires_grad_(self.step % stage.vision_every == 0)
            loss, accuracy = self.loss(batch, contents, stage)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.step += 1
            if self.step % 10 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy.item():.3f}",
                                refresh=False)
            if self.step % self.args.report == 0:
                bar.write(f"{stage.name} {self.step}: held-out accuracy "
                          f"{self.held_out(stage):.3f}, loss {loss:.3f}")
            self.save()

    def run(self):
        self.model.train()
        while self.stage < len(self.stages):
            self.run_stage(self.stages[self.stage])
            self.stage, self.step = self.stage + 1, 0
            self.save(every=0)
        self.export()

    @torch.no_grad()
    def export(self):
        """Writes --out: the weights as they are, or with --average their mean with those in other
        folders (arXiv 2203.05482)."""
        others = [dict(model.named_parameters()) for model in self.average]
        for name, parameter in self.model.named_parameters():
            for count, other in enumerate(others, 2):
                parameter.lerp_(other[name].to(self.device), 1 / count)
        save_checkpoint_folder(self.layout, self.model, self.args.out)
        print(f"wrote {self.args.out}")


def main(argv=None):
    here = Path(__file__).parent
    parser = OneLineParser(prog="train_tiny.py", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=LAYOUTS, default="qwen2-vl")
    parser.add_argument("--out", type=output_folder, metavar="DIR",
                        help="default: tiny/ and the layout's name")
    parser.add_argument("--work", type=output_folder, default=str(here / "work"), metavar="DIR",
                        help="where the training state is kept")
    parser.add_argument("--device", type=device_name, default="auto",
                        help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16",
                        help="what matrix products are computed in; without units for bfloat16 a "
                             "processor is faster in float32")
    parser.add_argument("--threads", type=whole_number(1), default=os.cpu_count())
    parser.add_argument("--workers", type=whole_number(0), default=1,
                        help="processes that render pages")
    parser.add_argument("--fonts", type=font_files, metavar="DIR", default=[],
                        help="TrueType files that a stage's share of the pages is drawn with, "
                             "instead of the built-in font")
    parser.add_argument("--report", type=whole_number(1), default=250,
                        help="steps between held-out accuracies")
    parser.add_argument("--seed", type=whole_number(0), default=0)
    parser.add_argument("--start-from", metavar="DIR",
                        help="begin with the weights in a folder, unless --work has a state")
    parser.add_argument("--teacher", metavar="DIR",
                        help="a trained qwen2-vl checkpoint: llava-next learns to see as it does, "
                             "and starts from its decoder")
    parser.add_argument("--stage", help="where --start-from begins (default: the last stage)")
    parser.add_argument("--export", action="store_true",
                        help="write --out from the saved state and stop")
    parser.add_argument("--average", nargs="+", metavar="DIR", default=[],
                        help="write the mean of the trained weights and those in some folders, as "
                             "a rule those that the training began with, and those of other seeds; "
                             "a folder given twice counts twice")
    args = parser.parse_args(argv)
    stages = [stage.name for stage in STAGES[args.layout]]
    if args.stage and args.stage not in stages:
        parser.error(f"--stage {args.stage}: this layout has {', '.join(stages)}")
    args.out = args.out or here.parent / "tiny" / args.layout
    torch.set_num_threads(args.threads)
    try:
        trainer = Trainer(args)
        if args.start_from:
            trainer.start_from(args.start_from, args.stage or stages[-1])
    except ValueError as error:
        parser.error(error)
    if args.export:
        trainer.export()
    else:
        trainer.run()


if __name__ == "__main__":
    main()
