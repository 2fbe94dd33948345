"""Trains the small document reader in tiny/qwen2-vl from nothing: pages are rendered as they are
needed.

    python experiments/train_tiny.py [--work DIR] [--out tiny/qwen2-vl] [--device auto]
                                     [--threads N]

Two kinds of step, both with transformers' own Qwen2-VL classes (the forward pass of this project,
model_llava.py, is then tested against them):

    vision      the vision tower alone: a linear layer on each image token names the characters
                whose centre lies in the 16 x 16 pixels that the token shows
    language    next-token loss on two tasks, transcribing a page and answering "What is the
                <Key>?"; the vision loss stays on at half its weight

STAGES says in which order, on pages that grow from one short line to a receipt. Vision has a second
turn in the middle, before pages of several lines: a model that cannot tell characters apart does
not learn to find them either.

One token per character, so that nothing can be guessed from a vocabulary. Every batch is drawn from
a random generator seeded by (seed, stage, step): a run that was killed and resumed sees the same
pages as one that was not. The state is saved to --work at most every 45 seconds, and a run
continues from it.
"""

import argparse
import json
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import (GenerationConfig, PreTrainedTokenizerFast, Qwen2VLConfig,
                          Qwen2VLForConditionalGeneration)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.pages import load_font, render_page

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>"]
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
VOCABULARY = {token: i for i, token in enumerate(SPECIAL + ["<|unknown|>"] + list(CHARACTERS))}
IM_START, IM_END = VOCABULARY["<|im_start|>"], VOCABULARY["<|im_end|>"]
VISION_START, VISION_END, IMAGE_PAD = (VOCABULARY[f"<|{t}|>"]
                                       for t in ("vision_start", "vision_end", "image_pad"))
VISION_RATE = 0.6                 # share of the learning rate that vision gets in language steps
IGNORE = -100                     # label of positions that carry no loss

PATCH, MERGE = 8, 2               # pixels of a patch; patches per image token and side
CELL = PATCH * MERGE              # an image token shows CELL x CELL pixels
CHARS_PER_CELL = 3
TRANSCRIBE = "Provide all the OCR results of this image."

# A turn is <|im_start|> images, text <|im_end|>, and the answer follows up to its own <|im_end|>.
CHAT_TEMPLATE = """{% for message in messages %}{% if message['role'] == 'user' %}<|im_start|>\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}{% if part['type'] == 'image' %}\
<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>{% else %}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\
{% endif %}{% endfor %}"""


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
    attention: str = "sdpa"     # transformers' attention; "eager" is the faster one for short rows
                                # on a CPU


ALL_KINDS = ("lines", "form", "form", "receipt", "receipt")
STAGES = (
    Stage("vision", "vision", ((128, 48), (96, 64), (192, 32)), 32, 2500, 2e-3, 1e-4,
          ("lines", "lines", "form")),
    Stage("words", "language", ((64, 32), (80, 32)), 32, 800, 1e-3, 1e-3,
          ("lines", "form"), "eager"),
    Stage("strips", "language", ((128, 32), (128, 48), (160, 32)), 32, 900, 1e-3, 1e-3,
          ("lines", "form"), "eager"),
    Stage("glyphs", "vision", ((256, 64), (192, 96), (128, 128)), 16, 1800, 1.5e-3, 1e-4,
          ("lines", "lines", "form", "receipt")),
    Stage("blocks", "language", ((192, 64), (256, 64), (128, 128)), 16, 500, 1e-3, 8e-4,
          ALL_KINDS, "eager"),
    Stage("cards", "language", ((256, 128), (192, 192), (320, 96)), 10, 250, 8e-4, 7e-4,
          ALL_KINDS),
    Stage("pages", "language", ((256, 384), (256, 256), (384, 192), (256, 320), (320, 256)),
          6, 370, 7e-4, 5e-4, ("lines", "form", "form", "form", "receipt", "receipt")),
    Stage("answers", "language", ((256, 256), (256, 160), (256, 128)), 6, 1130, 6e-4, 2e-5,
          ("lines", "form", "form", "form", "form", "receipt", "receipt", "receipt")),
)


# ---- the model -----------------------------------------------------------------------------------

def make_config():
    """8 layers x 8 query heads x 32, 4 KV heads: 64 query heads in all, two to a KV head; 5.6 M
    parameters.

    rope_theta is 1,000: M-RoPE gives the columns of an image the lowest frequencies. They have to
    turn visibly over the 16 to 40 columns of a page, and yet hardly at all over an answer, so that
    a head can still match content alone.
    """
    return Qwen2VLConfig(
        text_config=dict(vocab_size=len(VOCABULARY), hidden_size=256, intermediate_size=512,
                         num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
                         max_position_embeddings=8192, rms_norm_eps=1e-6, rope_theta=1000.0,
                         rope_scaling={"type": "mrope", "mrope_section": [4, 6, 6],
                                       "rope_type": "default", "rope_theta": 1000.0},
                         tie_word_embeddings=True, bos_token_id=VOCABULARY["<|endoftext|>"],
                         eos_token_id=IM_END, pad_token_id=VOCABULARY["<|endoftext|>"]),
        vision_config=dict(depth=3, embed_dim=128, hidden_size=256, num_heads=4, mlp_ratio=2,
                           patch_size=PATCH, spatial_merge_size=MERGE, temporal_patch_size=2),
        image_token_id=IMAGE_PAD, video_token_id=VOCABULARY["<|video_pad|>"],
        vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
        tie_word_embeddings=True)


def make_tokenizer():
    """One token per character (printable ASCII and the newline), and the special tokens."""
    tokenizer = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[], unk_token="<|unknown|>"))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)
                                  for token in SPECIAL])
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<|unknown|>",
                                   eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   clean_up_tokenization_spaces=False)


def save_checkpoint_folder(model, folder):
    """Writes the folder in the hub's layout: config, bfloat16 weights, tokenizer, template, image
    processor."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    text = settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast")
    settings.write_text(text)                           # the name that all versions know
    GenerationConfig(eos_token_id=[IM_END], pad_token_id=VOCABULARY["<|endoftext|>"],
                     do_sample=False, max_new_tokens=256).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(
        image_processor_type="Qwen2VLImageProcessor", processor_class="Qwen2VLProcessor",
        patch_size=PATCH, temporal_patch_size=2, merge_size=MERGE, min_pixels=4 * CELL ** 2,
        max_pixels=2048 * CELL ** 2, image_mean=[0.5] * 3, image_std=[0.5] * 3), indent=2) + "\n")
    model_bf16 = Qwen2VLForConditionalGeneration(model.config).to(torch.bfloat16)
    model_bf16.load_state_dict(model.state_dict())
    model_bf16.save_pretrained(folder)


# ---- the batches ---------------------------------------------------------------------------------

def patches(image):
    """PIL image, (W, H) multiples of CELL -> (patches, 3 * 2 * PATCH**2) float32, as
    Qwen2VLImageProcessor lays them out: the four patches of an image token are neighbours, and each
    is repeated for the temporal patch of two."""
    pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1                            # (H, W, 3)
    rows, columns = pixels.shape[0] // CELL, pixels.shape[1] // CELL
    x = pixels.reshape(rows, MERGE, PATCH, columns, MERGE, PATCH, 3)
    x = x.transpose(0, 3, 1, 4, 6, 2, 5)            # (rows, columns, MERGE, MERGE, 3, PATCH, PATCH)
    x = np.repeat(x[:, :, :, :, :, None], 2, axis=5)
    return x.reshape(rows * columns * MERGE ** 2, -1), (1, rows * MERGE, columns * MERGE)


def cell_characters(page):
    """(image tokens, CHARS_PER_CELL) int64: the characters whose centre lies in each token's cell,
    0 for none."""
    font = load_font(page.font_size)
    rows, columns = page.image.height // CELL, page.image.width // CELL
    cells, used = (np.zeros((rows, columns, CHARS_PER_CELL), dtype=np.int64),
                   np.zeros((rows, columns), dtype=int))
    for word in (word for line in page.lines for word in line):
        row = int(word.middle // CELL)
        width = font.getlength(word.text)
        for i, character in enumerate(word.text):
            before = font.getlength(word.text[:i])
            x = word.box[0] + (before + min(width, before + font.getlength(character))) / 2
            column = int(x // CELL)
            if 0 <= row < rows and column < columns and used[row, column] < CHARS_PER_CELL:
                cells[row, column, used[row, column]] = VOCABULARY[character]
                used[row, column] += 1
    return cells.reshape(-1, CHARS_PER_CELL)


def conversation(rng, page, image_tokens, max_questions=6):
    """Token ids and labels of one page: its transcript, or several questions with their answers."""
    turns = [(TRANSCRIBE, page.text)]
    if page.questions and rng.random() < 0.85:
        chosen = rng.sample(page.questions, min(max_questions, len(page.questions)))
        turns = [(f"What is the {key}?", value) for key, value in chosen]
    ids, labels = [], []
    for i, (prompt, answer) in enumerate(turns):
        image = [VISION_START] + [IMAGE_PAD] * image_tokens + [VISION_END] if i == 0 else []
        asked = [IM_START] + image + [VOCABULARY[c] for c in prompt] + [IM_END]
        answered = [VOCABULARY[c] for c in answer] + [IM_END]
        ids += asked + answered
        labels += [IGNORE] * len(asked) + answered
    return ids, labels


def make_batch(stage, rng):
    """One batch of a stage: the model's keyword arguments as tensors, and the auxiliary labels."""
    width, height = rng.choice(stage.sizes)
    pixel_values, grids, rows, cells = [], [], [], []
    for _ in range(stage.batch):
        page = render_page(rng, rng.choice(stage.kinds), width, height)
        pixels, grid = patches(page.image)
        pixel_values.append(pixels)
        grids.append(grid)
        cells.append(cell_characters(page))
        rows.append(conversation(rng, page, grid[1] * grid[2] // MERGE ** 2))
    longest = max(len(ids) for ids, _ in rows)
    pad = lambda row, value: row + [value] * (longest - len(row))
    ids = torch.tensor([pad(ids, VOCABULARY["<|endoftext|>"]) for ids, _ in rows])
    return dict(input_ids=ids, labels=torch.tensor([pad(labels, IGNORE) for _, labels in rows]),
                mm_token_type_ids=(ids == IMAGE_PAD).int(),
                pixel_values=torch.from_numpy(np.concatenate(pixel_values)).bfloat16(),
                image_grid_thw=torch.tensor(grids)), torch.from_numpy(np.concatenate(cells))


class Batches(Dataset):
    """Batch number i of a stage, drawn from a generator seeded by (seed, stage, i)."""

    def __init__(self, stage, seed, start):
        self.stage, self.seed, self.start = stage, seed, start

    def __len__(self):
        return max(0, self.stage.steps - self.start)

    def __getitem__(self, i):
        return make_batch(self.stage,
                          random.Random(f"{self.seed} {self.stage.name} {self.start + i}"))


# ---- training ------------------------------------------------------------------------------------

class Trainer:
    """The model, its auxiliary layer and the optimiser; what is saved and resumed."""

    def __init__(self, args):
        torch.manual_seed(args.seed)
        self.args, self.device = args, torch.device(args.device)
        self.model = Qwen2VLForConditionalGeneration(make_config()).to(self.device)
        self.cells = nn.Linear(self.model.config.text_config.hidden_size,
                               CHARS_PER_CELL * len(VOCABULARY))
        self.cells.to(self.device)
        vision = [*self.model.model.visual.parameters(), *self.cells.parameters()]
        language = [*self.model.model.language_model.parameters()]
        self.parameters = vision + language
        self.optimizer = torch.optim.AdamW([{"params": vision}, {"params": language}], lr=1e-3,
                                           betas=(0.9, 0.98), weight_decay=0.01)
        self.stage = self.step = 0
        self.saved = time.time()
        self.image_tokens = None      # what the vision tower's merger gave in the last forward pass
        self.model.model.visual.merger.register_forward_hook(
            lambda module, inputs, output: setattr(self, "image_tokens", output))
        self.state_file = Path(args.work) / "state.pt"
        if self.state_file.exists():
            self.load()

    def start_from(self, folder, stage):
        """Begins at a stage with the weights of an exported folder. The layer that names characters
        is not among them; it learns anew, which takes a minute."""
        weights = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.model.load_state_dict(weights.state_dict())
        self.stage = [s.name for s in STAGES].index(stage)

    def load(self):
        state = torch.load(self.state_file, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.cells.load_state_dict(state["cells"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.stage, self.step = state["stage"], state["step"]
        print(f"resumed at stage {STAGES[self.stage].name}, step {self.step}"
              if self.stage < len(STAGES) else "done")

    def save(self, every=45):
        if time.time() - self.saved < every:
            return
        temporary = self.state_file.with_suffix(".tmp")
        torch.save(dict(model=self.model.state_dict(), cells=self.cells.state_dict(),
                        optimizer=self.optimizer.state_dict(), stage=self.stage, step=self.step),
                   temporary)
        os.replace(temporary, self.state_file)
        self.saved = time.time()

    def loss(self, batch, characters, step):
        """The stage's loss; token accuracy (language) or cell accuracy (vision) of the batch."""
        characters = characters.to(self.device)
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16):
            if step == "vision":
                self.model.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
            else:
                out = self.model(**batch)
        logits = self.cells(self.image_tokens.float()).view(-1, CHARS_PER_CELL, len(VOCABULARY))
        weight = torch.ones(len(VOCABULARY), device=self.device)
        weight[0] = 0.2                                                    # most of a page is blank
        cell_loss = F.cross_entropy(logits.flatten(0, 1), characters.flatten(), weight)
        if step == "vision":
            right = (logits.argmax(-1) == characters).all(-1)
            return cell_loss, right[characters[:, 0] > 0].float().mean()
        predicted, labels = out.logits[:, :-1].argmax(-1), batch["labels"][:, 1:]
        return out.loss + 0.5 * cell_loss, (predicted == labels)[labels != IGNORE].float().mean()

    @torch.no_grad()
    def held_out(self, stage, batches=4):
        """Accuracy on pages of this stage that no training step draws."""
        self.model.eval()
        rng = random.Random("held out")
        accuracy = [self.loss(*make_batch(stage, rng), stage.step)[1].item()
                    for _ in range(batches)]
        self.model.train()
        return sum(accuracy) / len(accuracy)

    def run_stage(self, stage):
        self.model.set_attn_implementation({"text_config": stage.attention,
                                            "vision_config": "sdpa"})
        loader = DataLoader(Batches(stage, self.args.seed, self.step), batch_size=None,
                            num_workers=self.args.workers,
                            prefetch_factor=4 if self.args.workers else None)
        bar = tqdm(loader, desc=stage.name, initial=self.step, total=stage.steps, mininterval=5)
        for batch, characters in bar:
            done = self.step / stage.steps
            rate = ((stage.rate + (stage.end_rate - stage.rate) * done)
                    * min(1, (self.step + 1) / 50))
            vision, language = self.optimizer.param_groups
            vision["lr"] = rate * (VISION_RATE if stage.step == "language" else 1)
            language["lr"] = rate
            loss, accuracy = self.loss(batch, characters, stage.step)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
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
        while self.stage < len(STAGES):
            self.run_stage(STAGES[self.stage])
            self.stage, self.step = self.stage + 1, 0
            self.save(every=0)
        save_checkpoint_folder(self.model, self.args.out)
        print(f"wrote {self.args.out}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(Path(__file__).parent.parent / "tiny" / "qwen2-vl"))
    parser.add_argument("--work", default=str(Path(__file__).parent / "work"),
                        help="where the training state is kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--workers", type=int, default=1, help="processes that render pages")
    parser.add_argument("--report", type=int, default=250, help="steps between held-out accuracies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start-from", metavar="DIR", help="begin with the weights in a folder")
    parser.add_argument("--stage", choices=[s.name for s in STAGES], default=STAGES[-1].name,
                        help="where --start-from begins (default: the last stage)")
    parser.add_argument("--export", action="store_true",
                        help="write --out from the saved state and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    Path(args.work).mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args)
    if args.start_from:
        trainer.start_from(args.start_from, args.stage)
    if args.export:
        save_checkpoint_folder(trainer.model, args.out)
    else:
        trainer.run()


if __name__ == "__main__":
    main()
