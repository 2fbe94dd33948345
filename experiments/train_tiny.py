"""Teaches few heads of the small document readers in tiny/ to look at the page.

    python experiments/train_tiny.py --layout qwen2-vl --start-from DIR --out DIR

A reader trained on nothing but reading has no reason to be sparse: its last layer looks as a whole.
So the readers, which earlier and longer trainings taught to read (they are in git's history), go
through the three STAGES here, on pages that are rendered as needed, in batches of one size. The
loss is that of the next token, on what pages.tasks asks of a page; half that of linear layers on
each image token, which name the characters whose centre lies in the 16 x 16 pixels that it shows,
and a coloured shape there; and

    PENALTY * sum over KV heads of w[layer] * sqrt(x + 0.01)

where x is a KV head's mean, over the tokens of the answers, of -log(1 - m), and m the share of a
row's attention that falls on the image: `looking`. The square root, steepest near zero, lets few
heads look much rather than many a little. LAYER_WEIGHTS are larger for the last layers, so that not
all who look are there. In each stage the penalty falls with the learning rate, and in the last it
is small, so that reading comes last. That few heads are visual is here taught, not found. One token
per character, so that nothing can be guessed from a vocabulary. Several conversations share a page,
which is computed once for all of them.

Every batch is drawn from a random generator seeded by (seed, layout, stage, step), and the state is
saved to --work, so a run that was killed goes on as if it had not been. Weight matrices are trained
with Muon, the rest with AdamW; transformers' own classes compute (tiny_layouts.py).

Letters: B pages of a batch, T tokens, L layers, H query heads, G KV heads, E width.
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
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cache import OneLineParser
from experiments.arguments import device_name, output_folder, whole_number
from experiments.pages import COLORS, SHAPES, prompt, tasks
from experiments.tiny_layouts import (CELL, END, IGNORE, IM_END, IM_START, IMAGE, LAYOUTS,
                                      VOCABULARY, as_matrix_product, looking_of_heads,
                                      read_checkpoint, save_checkpoint_folder)
from experiments.wild_pages import render_mixed_page

ROUND = 32                        # conversations are padded to a multiple: few shapes are faster
CHARS_PER_CELL = 3
OBJECTS = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
CONVERSATIONS = 8                 # about a page, at most ...
LONGEST = 96                      # ... and tokens in one of several turns
FAR_LINE = 12                     # lines beyond it are miscounted, so they are asked for more often
BATCH_PIXELS = 8 * 256 * 256      # at most: a batch has fewer large pages
LAST_SHARE = 0.03                 # of a stage's rate is left at its end
ADAMW_RATE = 0.25                 # share of the rate that AdamW gets ...
VISION_RATE = 0.7                 # ... and the vision tower
PENALTY = {"qwen2-vl": 0.03, "llava-next": 0.02}     # llava-next has twice as many KV heads
LAYER_WEIGHTS = {"qwen2-vl": (1, 1, 1, 1, 1, 1, 1.3, 3), "llava-next": (1, 1, 1, 1, 1, 1, 1.3, 4)}
NAMES_STEPS = 120                 # of the layers that name what image tokens show, alone
FEW, MANY = 0.1, 0.3              # shares of attention that the log counts heads from
SEEN_BY_ATTENTION = "position_ids", "prefix", "conversations", "image"


@dataclass(frozen=True)
class Stage:
    name: str
    sizes: tuple          # page sizes in pixels, one drawn for each batch
    batch: int            # pages at most
    steps: dict           # of each layout
    rate: float           # Muon's learning rate at the stage's start, see Trainer.set_rate
    kinds: tuple = ("lines",)
    wear: float = 0.0     # see pages.render_page
    wild: float = 0.0     # share of pages that look like other people's (wild_pages.py)
    rewording: float = 0.1      # share of prompts that are not the first wording
    transcripts: float = 0.2    # share of batches whose pages are transcribed
    penalty: float = 1.0        # share of PENALTY at the stage's start


def times(**counts):
    """times(form=2, sign=1) -> ("form", "form", "sign")."""
    return tuple(kind for kind, count in counts.items() for _ in range(count))


# LLaVA-NeXT's own image processor lays pages 640 pixels wide out in other tiles than these.
SIZES = ((256, 128), *[(256, 256)] * 3, *[(256, 384)] * 2, (384, 256), (384, 384), (512, 256),
         (384, 512), (512, 512), (640, 384))
STAGES = (
    Stage("sparse", SIZES, 10, {"qwen2-vl": 827, "llava-next": 664}, 1.2e-3,
          times(lines=9, form=10, receipt=5, table=12, label=6, sign=6, letter=6, shapes=7,
                fields=3), wear=0.1, wild=0.55),
    Stage("settled", SIZES, 10, {"qwen2-vl": 1150, "llava-next": 850}, 9e-4,
          times(lines=11, form=9, receipt=5, table=11, label=6, sign=6, letter=9, shapes=7,
                fields=2), wear=0.1, wild=0.45),
    Stage("finished", SIZES + ((512, 512), (512, 512), (384, 512)), 10,
          {"qwen2-vl": 1400, "llava-next": 1000}, 8e-4,
          times(lines=14, form=8, receipt=5, table=11, label=6, sign=5, letter=12, shapes=8,
                fields=2), wear=0.1, wild=0.5, transcripts=0.3, penalty=0.3),
)


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


def cell_contents(page):
    """(rows, columns, CHARS_PER_CELL + 1) int64: cell_characters, and the number in OBJECTS of the
    coloured shape that a cell shows, IGNORE for none."""
    characters = cell_characters(page)
    shapes = np.full((*characters.shape[:2], 1), IGNORE)
    for thing in page.objects:
        x0, y0, x1, y1 = (round(edge / CELL) for edge in thing.box)
        shapes[y0:max(y1, y0 + 1), x0:max(x1, x0 + 1)] = OBJECTS.index(thing.text)
    return np.concatenate([characters, shapes], -1)


def conversations(stage, rng, page, transcribe):
    """What is said about one page after its image: its transcript, or some conversations of a few
    questions and answers. Returns [(token ids, labels), ...]."""
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
        elif len(said) == CONVERSATIONS:
            break
        else:
            said.append(([], []))
        ids, labels = said[-1]
        ids.extend(asked + answered)
        labels.extend([IGNORE] * len(asked) + answered)
    return said


def padded(rows, filling, count, length):
    """Lists of token ids or labels -> (count, length), filled up."""
    rows = rows + [[]] * (count - len(rows))
    return torch.tensor([row + [filling] * (length - len(row)) for row in rows])


def draw_pages(stage, rng):
    """The pages of a batch, all of one size."""
    size = rng.choice(stage.sizes)
    return [render_mixed_page(rng, rng.choice(stage.kinds), *size, stage.wild, wear=stage.wear)
            for _ in range(max(1, min(stage.batch, BATCH_PIXELS // math.prod(size))))]


def make_batch(layout, stage, rng):
    """One batch of a stage: the model's keyword arguments, and what each image token shows (see
    cell_contents).

    A row is a page, the prefix, and the conversations about it, one behind the other and all of one
    length. Each sees the prefix and itself (see attend) and counts its positions from the prefix,
    as if the others were not there: the page is read once for all of them."""
    drawn = draw_pages(stage, rng)
    pages = [enlarged(page, layout.zoom) for page in drawn]
    width, height = pages[0].image.size
    transcribe = rng.random() < stage.transcripts                           # all or none
    said = [conversations(stage, rng, page, transcribe) for page in pages]
    prefix = [IM_START] + layout.image_ids(width, height)
    count = max(map(len, said))
    length = -(-max(len(ids) for page in said for ids, _ in page) // ROUND) * ROUND

    def rows(k, first, filling):
        """Of each page the prefix's and, filled up, its conversations' ids or labels."""
        return torch.stack([torch.cat([torch.tensor(first), padded(
            [conversation[k] for conversation in page], filling, count, length).flatten()])
                            for page in said])

    positions = layout.positions(width, height)                                    # (..., prefix)
    following = (positions.max() + 1 + torch.arange(length)).repeat(count)
    positions = torch.cat([positions, following.expand(*positions.shape[:-1], -1)], -1)
    batch = dict(input_ids=rows(0, prefix, END), labels=rows(1, [IGNORE] * len(prefix), IGNORE),
                 position_ids=positions.unsqueeze(-2).repeat_interleave(len(pages), -2),
                 prefix=len(prefix), conversations=count, images=layout.images(pages, drawn),
                 image=(prefix.index(IMAGE), prefix.index(IMAGE) + prefix.count(IMAGE)))
    cells = [layout.cell_labels(cell_contents(page)) for page in pages]
    return batch, torch.from_numpy(np.concatenate(cells))


class Batches(Dataset):
    """Batch number i of a stage, drawn from a generator seeded by (seed, layout, stage, i)."""

    def __init__(self, args, stage, start):
        self.args, self.stage, self.start = args, stage, start

    def __len__(self):
        return max(0, self.stage.steps[self.args.layout] - self.start)

    def __getitem__(self, i):
        name = f"{self.args.seed} {self.args.layout} {self.stage.name} {self.start + i}"
        return make_batch(LAYOUTS[self.args.layout], self.stage, random.Random(name))


# ---- training ------------------------------------------------------------------------------------

def sum_of_roots(x, weights):
    """x (L, G), as looking_of_heads gives, weights of L layers -> the sum in this file's first
    lines."""
    return (torch.tensor(weights, device=x.device)[:, None] * (x + 0.01).sqrt()).sum()


def embed(layout, model, batch):
    """(B, T, E): the embeddings of a batch's tokens, with those of its pages in place of the
    image tokens. transformers lays pages out one by one."""
    x, (start, end) = model.get_input_embeddings()(batch["input_ids"]), batch["image"]
    image = layout.image_embeddings(model, **batch["images"]).to(x.dtype)
    return torch.cat([x[:, :start], image, x[:, end:]], 1)


def moved(thing, device):
    """Tensors, and those in dicts, on a device."""
    if isinstance(thing, dict):
        return {name: moved(part, device) for name, part in thing.items()}
    return thing.to(device, non_blocking=True) if torch.is_tensor(thing) else thing


class Trainer:
    """The model, the layers that name what image tokens show, the optimisers; what is saved."""

    def __init__(self, args):
        torch.manual_seed(args.seed)
        self.args, self.device = args, torch.device(args.device)
        self.layout = LAYOUTS[args.layout]
        self.model = self.layout.model_class(self.layout.config()).to(self.device)
        self.model.set_attn_implementation("products")
        as_matrix_product(self.layout.patch_embedding(self.model))
        width = self.model.config.text_config.hidden_size
        self.naming = nn.ModuleList([nn.Linear(width, CHARS_PER_CELL * len(VOCABULARY)),
                                     nn.Linear(width, len(OBJECTS))]).to(self.device)
        named = dict(self.model.named_parameters())

        def group(of_vision, of_matrices):
            return [p for name, p in named.items() if ("language_model" not in name) == of_vision
                    and (p.ndim == 2 and "embed" not in name) == of_matrices]

        self.optimizers = [                               # of each: the vision tower, then the rest
            torch.optim.Muon([dict(params=group(v, True)) for v in (True, False)],
                             weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([dict(params=group(True, False) + [*self.naming.parameters()]),
                               dict(params=group(False, False))],
                              betas=(0.9, 0.98), weight_decay=0.01)]
        self.stage = self.step = 0
        self.saved = time.time()
        self.notes = []                    # of the steps since the last line of the log
        self.image_tokens = None           # what the projector gave in the last forward pass
        self.layout.projector(self.model).register_forward_hook(
            lambda module, inputs, output: setattr(self, "image_tokens", output))
        self.state_file = args.work / f"{args.layout}.pt"
        if self.state_file.exists():
            self.load()

    def start_from(self, folder, stage):
        """Begins at a stage with the weights in a folder, unless a saved state goes on. The layers
        that name what image tokens show are not among the weights; they learn first, while the
        model stands still."""
        weights = read_checkpoint(self.layout, "--start-from", folder)
        if self.state_file.exists():
            return
        self.model.load_state_dict(weights.state_dict())
        self.stage = [s.name for s in STAGES].index(stage)
        stage = STAGES[self.stage]
        names = replace(stage, name="names", batch=min(stage.batch, 8), steps=dict.fromkeys(
            LAYOUTS, NAMES_STEPS))
        optimizer = torch.optim.Adam(self.naming.parameters())
        self.model.requires_grad_(False)
        for step, (batch, contents) in enumerate(tqdm(self.batches(names, 0), desc="names")):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / NAMES_STEPS)
            self.see(batch, contents).backward()
            optimizer.step()
            optimizer.zero_grad()
        self.model.requires_grad_(True)

    def parts(self):
        return dict(model=self.model, naming=self.naming, muon=self.optimizers[0],
                    adamw=self.optimizers[1])

    def load(self):
        state = torch.load(self.state_file, map_location=self.device, weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.stage, self.step = state["stage"], state["step"]
        print(f"resumed at stage {STAGES[self.stage].name}, step {self.step}"
              if self.stage < len(STAGES) else "done")

    def save(self, every=120):
        if time.time() - self.saved < every:
            return
        temporary = self.state_file.with_suffix(".tmp")
        torch.save({name: part.state_dict() for name, part in self.parts().items()}
                   | dict(stage=self.stage, step=self.step), temporary)
        os.replace(temporary, self.state_file)
        self.saved = time.time()

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, self.args.dtype == "bfloat16")

    def see(self, batch, contents):
        """naming_loss of a batch whose pages the vision tower alone has seen."""
        with self.autocast():
            self.layout.see(self.model, **moved(batch["images"], self.device))
        return self.naming_loss(contents.to(self.device))

    def loss(self, batch, contents):
        """The loss without the penalty; the batch's token accuracy; and (L, G), how KV heads look
        at the page."""
        batch, contents, looks = moved(batch, self.device), moved(contents, self.device), []
        labels = batch["labels"]
        with self.autocast():
            out = self.model(inputs_embeds=embed(self.layout, self.model, batch), labels=labels,
                             use_cache=False, looks=looks,
                             **{name: batch[name] for name in SEEN_BY_ATTENTION})
        right, asked = out.logits[:, :-1].argmax(-1) == labels[:, 1:], labels[:, 1:] != IGNORE
        looks = looking_of_heads(looks, labels, batch["prefix"],
                                 self.model.config.text_config.num_key_value_heads)
        # No part is picked out, since a GPU would be waited for to know how large it is.
        return (out.loss + 0.5 * self.naming_loss(contents), (right & asked).sum() / asked.sum(),
                looks)

    def naming_loss(self, contents):
        """Of the last forward pass, with contents (cells, CHARS_PER_CELL + 1) as cell_contents
        gives."""
        characters, shapes = contents.split([CHARS_PER_CELL, 1], 1)
        states = self.image_tokens.float().flatten(0, -2)
        logits = self.naming[0](states).view(-1, CHARS_PER_CELL, len(VOCABULARY))
        weight = torch.ones(len(VOCABULARY), device=self.device)
        weight[0] = 0.2                                                    # most of a page is blank
        of_characters = F.cross_entropy(logits.flatten(0, 1), characters.flatten(), weight,
                                        ignore_index=IGNORE)
        of_shapes = F.cross_entropy(self.naming[1](states), shapes[:, 0], ignore_index=IGNORE,
                                    reduction="sum") / (shapes != IGNORE).sum().clamp(min=1)
        return of_characters + of_shapes

    @torch.no_grad()
    def held_out(self, stage, batches=4):
        """Accuracy on pages of this stage that no training step draws."""
        self.model.eval()
        rng = random.Random("held out")
        accuracy = [self.loss(*make_batch(self.layout, stage, rng))[1].item()
                    for _ in range(batches)]
        self.model.train()
        return sum(accuracy) / len(accuracy)

    def set_rate(self, stage):
        """Half a cosine from the stage's rate to LAST_SHARE of it, after a warm-up of 30 steps.
        Returns the share, by which the penalty falls, too."""
        done = self.step / stage.steps[self.args.layout]
        falls = 0.5 + 0.5 * math.cos(math.pi * done)
        share = (LAST_SHARE + (1 - LAST_SHARE) * falls) * min(1, (self.step + 1) / 30)
        rate = stage.rate * share
        for optimizer, own in zip(self.optimizers, (1, ADAMW_RATE)):
            vision, language = optimizer.param_groups
            vision["lr"], language["lr"] = rate * own * VISION_RATE, rate * own
        return share

    def batches(self, stage, start):
        """The batches of a stage from number `start` on."""
        return DataLoader(Batches(self.args, stage, start), batch_size=None,
                          num_workers=self.args.workers,
                          prefetch_factor=4 if self.args.workers else None)

    def take_step(self, batch, contents, stage):
        """One step; its loss, its accuracy, the sum of roots and how KV heads look at the page."""
        share = self.set_rate(stage)
        loss, accuracy, looks = self.loss(batch, contents)
        roots = sum_of_roots(looks, LAYER_WEIGHTS[self.args.layout])
        (loss + PENALTY[self.args.layout] * stage.penalty * share * roots).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach(), accuracy, roots.detach(), looks.detach()

    def run_stage(self, stage):
        bar = tqdm(self.batches(stage, self.step), desc=stage.name, initial=self.step,
                   total=stage.steps[self.args.layout], mininterval=5)
        for batch, contents in bar:
            self.notes.append(self.take_step(batch, contents, stage))
            if self.step % self.args.report == 0 or self.step == bar.total:
                bar.write(self.log(stage))
            self.save()

    def log(self, stage):
        """A line about the steps since the last one, which also goes into a file of --work, and the
        accuracy on pages with and without other people's looks that no step draws."""
        *numbers, looks = zip(*self.notes)
        loss, accuracy, roots = (torch.stack(x).mean().item() for x in numbers)
        share = 1 - (-torch.stack(looks).mean(0)).exp()                                 # (L, G)
        line = dict(stage=stage.name, step=self.step, loss=loss, accuracy=accuracy, roots=roots,
                    held_out=self.held_out(replace(stage, wild=0)),
                    held_out_wild=self.held_out(replace(stage, wild=1)),
                    few=(share > FEW).sum(1).tolist(), many=(share > MANY).sum(1).tolist())
        self.notes = []
        text = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()})
        with open(self.args.work / f"{self.args.layout}.log.jsonl", "a") as file:
            file.write(text + "\n")
        return text

    def run(self):
        self.model.train()
        while self.stage < len(STAGES):
            self.run_stage(STAGES[self.stage])
            self.stage, self.step = self.stage + 1, 0
            self.save(every=0)
        self.export()

    def export(self):
        """Writes --out: the weights as they are."""
        save_checkpoint_folder(self.layout, self.model, self.args.out)
        print(f"wrote {self.args.out}")


def main(argv=None):
    here = Path(__file__).parent
    parser = OneLineParser(prog="train_tiny.py", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=LAYOUTS, default="qwen2-vl")
    parser.add_argument("--out", type=output_folder, required=True, metavar="DIR")
    parser.add_argument("--work", type=output_folder, default=str(here / "work"), metavar="DIR",
                        help="where the training state and the log are kept")
    parser.add_argument("--device", type=device_name, default="auto",
                        help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16",
                        help="what matrix products are computed in; without units for bfloat16 a "
                             "processor is faster in float32")
    parser.add_argument("--threads", type=whole_number(1), default=1)
    parser.add_argument("--workers", type=whole_number(0), default=0,
                        help="processes that render pages")
    parser.add_argument("--report", type=whole_number(1), default=50,
                        help="steps between lines of the log")
    parser.add_argument("--seed", type=whole_number(0), default=0)
    parser.add_argument("--start-from", required=True, metavar="DIR",
                        help="begin with the weights in a folder, unless --work has a state")
    parser.add_argument("--stage", choices=[stage.name for stage in STAGES],
                        default=STAGES[0].name, help="the first to run")
    parser.add_argument("--export", action="store_true",
                        help="write --out from the saved state and stop")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        trainer = Trainer(args)
        trainer.start_from(args.start_from, args.stage)
    except ValueError as error:
        parser.error(error)
    trainer.export() if args.export else trainer.run()


if __name__ == "__main__":
    main()
