"""Tests of train_tiny.py and tiny_layouts.py: pytest experiments/test_train_tiny.py"""

import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaNextImageProcessorPil, Qwen2VLImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments import tiny_layouts, train_tiny
from experiments.pages import prompt, render_page, tasks
from experiments.tiny_layouts import CELL, IGNORE, IMAGE, LAYOUTS, VOCABULARY, looking
from experiments.train_tiny import STAGES, Stage, Trainer, make_batch
from experiments.wild_pages import render_mixed_page

torch.set_num_threads(1)
PROCESSORS = {"qwen2-vl": Qwen2VLImageProcessorPil, "llava-next": LlavaNextImageProcessorPil}
LETTERS = {i: c for c, i in VOCABULARY.items()}


def arguments(folder, **others):
    """What a Trainer needs of the command's arguments."""
    return SimpleNamespace(**dict(seed=0, device="cpu", layout="qwen2-vl", workers=0, report=2,
                                  work=folder, out=folder / "out", dtype="float32") | others)


def one_stage(*sizes, steps=2, batch=2, rate=1e-3, name="test", **others):
    """A Stage, which has as many steps for either layout."""
    return Stage(name, sizes, batch, dict.fromkeys(LAYOUTS, steps), rate, **others)


def image_processor(name):
    settings = {key: value for key, value in LAYOUTS[name].preprocessor.items()
                if key not in ("image_processor_type", "processor_class")}
    return PROCESSORS[name](**settings)


# ---- stages --------------------------------------------------------------------------------------

def test_both_layouts_take_every_stage():
    for stage in STAGES:
        assert set(stage.steps) == set(LAYOUTS)
        for width, height in stage.sizes:
            assert width % 128 == height % 128 == 0 and width * height <= train_tiny.BATCH_PIXELS
            assert [height // 128 * 160, width // 128 * 160] in LAYOUTS["llava-next"].pinpoints
    for name, layout in LAYOUTS.items():
        assert layout.config().text_config.num_hidden_layers == len(train_tiny.LAYER_WEIGHTS[name])
        assert 0 < train_tiny.PENALTY[name] < 1


def test_large_pages_make_smaller_batches():
    stage = one_stage((512, 512), batch=4)
    assert len(train_tiny.draw_pages(stage, random.Random(0))) == 2
    assert len(train_tiny.draw_pages(replace(stage, sizes=((64, 32),)), random.Random(0))) == 4


def test_rates_fall_after_a_warm_up():
    trainer = SimpleNamespace(args=SimpleNamespace(layout="qwen2-vl"), optimizers=[
        torch.optim.SGD([dict(params=[torch.zeros(1)]), dict(params=[torch.ones(1)])])
        for _ in range(2)])
    stage, rates = one_stage(steps=400, rate=0.5), []
    for trainer.step in range(401):
        share = Trainer.set_rate(trainer, stage)
        rates.append(trainer.optimizers[0].param_groups[1]["lr"])
        assert trainer.optimizers[1].param_groups[1]["lr"] == train_tiny.ADAMW_RATE * rates[-1]
        assert trainer.optimizers[0].param_groups[0]["lr"] == train_tiny.VISION_RATE * rates[-1]
        assert rates[-1] == 0.5 * share
    assert rates[0] < rates[15] < rates[29] and rates[29:] == sorted(rates[29:], reverse=True)
    assert rates[29] > 0.49 and rates[-1] == pytest.approx(0.5 * train_tiny.LAST_SHARE)


# ---- the penalty ---------------------------------------------------------------------------------

def test_looking_is_what_the_attention_weights_say():
    """Of each row behind the prefix, over the prefix and its own conversation."""
    torch.manual_seed(0)
    (B, H, prefix, n, D), image = (2, 3, 6, 4, 8), (1, 5)
    query, key = torch.randn(2, B, H, prefix + 2 * n, D, dtype=torch.float64)
    found = looking(query, key, prefix, 2, image)
    assert found.shape == (B, H, 2 * n)
    for row in range(2 * n):
        first = prefix + row // n * n
        seen = [*range(prefix), *range(first, prefix + row + 1)]
        weights = (key[:, :, seen] @ query[:, :, prefix + row, :, None]).squeeze(-1).softmax(-1)
        expected = -torch.log(1 - weights[..., slice(*image)].sum(-1))
        assert torch.allclose(found[:, :, row], expected)


def test_the_gradient_does_not_vanish_on_a_saturated_head():
    """Where a head looks at nothing but the image, that of the attention itself is zero."""
    key = torch.tensor([[0.0], [1.0], [0.0]]).view(1, 1, 3, 1)       # <|im_start|>, image, a letter
    for size, vanished in ((1.0, False), (60.0, True)):
        query = torch.full((1, 1, 3, 1), size, requires_grad=True)
        of_penalty, = torch.autograd.grad(looking(query, key, 2, 1, (1, 2)).sum().add(0.01).sqrt(),
                                          query)
        share = (query[..., 2, :] * key[..., 0]).softmax(-1)[..., 1].sum()
        of_share, = torch.autograd.grad(share, query)
        assert (of_share[..., 2, 0] < 1e-6) == vanished
        assert of_penalty[..., 2, 0] > 0.05


def test_heads_look_on_the_rows_that_write_answers():
    prefix, kv_heads = 3, 2
    labels = torch.tensor([[IGNORE] * 5 + [7, 8, IGNORE], [IGNORE] * 7 + [9]])      # 5 behind it
    looks = [torch.rand(2, 4, 5) for _ in range(3)]
    found = tiny_layouts.looking_of_heads(looks, labels, prefix, kv_heads)
    for layer, x in enumerate(looks):
        rows = torch.stack([x[0, :, 1], x[0, :, 2], x[1, :, 3]], -1)         # (H, 3)
        assert torch.allclose(found[layer], rows.mean(-1).view(2, 2).mean(-1))


def test_a_stage_says_what_looking_costs(tmp_path, monkeypatch):
    """With none of the penalty a step is that of the loss alone."""
    def after_a_step(penalty, own):
        monkeypatch.setitem(train_tiny.PENALTY, "qwen2-vl", penalty)
        trainer, stage = Trainer(arguments(tmp_path)), one_stage((64, 32), penalty=own)
        trainer.take_step(*make_batch(trainer.layout, stage, random.Random(0)), stage)
        return torch.cat([weight.flatten() for weight in trainer.model.parameters()])

    none, without, half, of_half = (after_a_step(*x) for x in ((0.0, 1.0), (1.0, 0.0),
                                                               (1.0, 0.5), (0.5, 1.0)))
    assert torch.equal(none, without) and torch.equal(half, of_half)
    assert not torch.equal(none, half)


def test_the_penalty_keeps_heads_from_looking(tmp_path):
    """Steps under nothing else lower it."""
    trainer = Trainer(arguments(tmp_path))
    batch, contents = make_batch(trainer.layout, one_stage((64, 32)), random.Random(0))
    optimizer, sums = torch.optim.Adam(trainer.model.parameters(), 1e-3), []
    for _ in range(6):
        roots = train_tiny.sum_of_roots(trainer.loss(batch, contents)[2], 8 * [1])
        roots.backward()
        optimizer.step()
        optimizer.zero_grad()
        sums.append(roots.item())
    assert sums == sorted(sums, reverse=True) and sums[-1] < 0.8 * sums[0]


# ---- the batches ---------------------------------------------------------------------------------

def replayed(rng, stage):
    """The generator as make_batch hands it to the renderer of its first page."""
    rng.choice(stage.sizes), rng.choice(stage.kinds)
    return rng


@pytest.mark.parametrize("name", LAYOUTS)
def test_conversations_of_a_batch_equal_single_pages(name):
    """Logits, with training's own attention and patch embedding, are those that transformers gives
    for each conversation alone, from pixels of its own image processor."""
    layout = LAYOUTS[name]
    torch.manual_seed(0)
    model = layout.model_class(layout.config()).eval()
    stage = one_stage((256, 128), kinds=("form",), transcripts=0.0)
    batch, _ = make_batch(layout, stage, random.Random(1))
    page = render_page(replayed(random.Random(1), stage), "form", 256, 128)
    seen = image_processor(name)(page.image, return_tensors="pt")
    values = layout.pixel_values(**batch["images"])
    values = values[:1] if name == "llava-next" else values[:len(seen["pixel_values"])]
    assert (seen["pixel_values"] - values).abs().max() < 1e-5
    start, end = batch["image"]
    prefix, *_ = ids = batch["input_ids"][0].tensor_split([batch["prefix"]])
    assert batch["conversations"] > 1 and (prefix[start:end] == IMAGE).all()
    expected = []
    with torch.inference_mode():
        for said in ids[1].chunk(batch["conversations"]):
            alone = torch.cat([prefix, said])[None]
            kinds = dict(mm_token_type_ids=(alone == IMAGE).int()) if name == "qwen2-vl" else {}
            expected.append(model(input_ids=alone, **seen, **kinds).logits[0])
        model.set_attn_implementation("products")
        tiny_layouts.as_matrix_product(layout.patch_embedding(model))
        got = model(inputs_embeds=train_tiny.embed(layout, model, batch), **{
            key: batch[key] for key in train_tiny.SEEN_BY_ATTENTION}).logits[0]
    got, later = got.tensor_split([batch["prefix"]])
    for logits, one in zip(later.chunk(batch["conversations"]), expected):
        assert (torch.cat([got, logits]) - one).abs().max() < 1e-4


@pytest.mark.parametrize("name", LAYOUTS)
def test_cells_say_what_image_tokens_show(name):
    """Painted black, a cell changes its own token's pixels and, of a page, no other's."""
    layout = LAYOUTS[name]
    stage = one_stage((256, 128), batch=1, kinds=("shapes",))
    page, = train_tiny.draw_pages(stage, random.Random(3))
    large = train_tiny.enlarged(page, layout.zoom)
    contents = train_tiny.cell_contents(large)
    rows, columns, _ = contents.shape
    assert (rows * CELL, columns * CELL) == large.image.size[::-1]
    shown = layout.cell_labels(contents)
    named = {thing.text for thing in page.objects}
    numbers = {train_tiny.OBJECTS[i] for i in shown[:, -1] if i != IGNORE}
    assert numbers == named and named
    text = sorted(c for line in page.lines for word in line for c in word.text)
    found = sorted(LETTERS[i] for i in shown[:, :-1].flatten() if i > 0)
    assert found == text                                  # each character is in one token
    before = layout.pixel_values(**layout.images([large], [page]))
    before = before if name == "qwen2-vl" else before[0, 1:]         # tiles
    numbered = layout.cell_labels(torch.arange(rows * columns).view(rows, columns, 1).numpy())
    numbered = numbered[numbered[:, 0] != IGNORE][:, 0].tolist()
    for row, column in ((0, 0), (3, 5), (rows - 1, columns - 1)):
        x, y = column * CELL, row * CELL
        painted = replace(large, image=large.image.copy())
        painted.image.paste((0, 0, 0), (x, y, x + CELL, y + CELL))
        after = layout.pixel_values(**layout.images([painted], [page]))
        changed = before != (after if name == "qwen2-vl" else after[0, 1:])
        if name == "qwen2-vl":                            # four patches to a token
            changed = changed.flatten(1).any(1).view(-1, 4).any(1)
        else:
            changed = changed.any(1).unfold(1, CELL, CELL).unfold(2, CELL, CELL).flatten(3).any(3)
        token, = changed.flatten().nonzero().flatten().tolist()
        assert numbered[token] == row * columns + column


@pytest.mark.parametrize("wild", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["form", "fields", "table", "letter", "shapes"])
def test_conversations_ask_what_the_page_answers(kind, wild):
    """Every turn is a question about the page and its right answer, none comes twice, and the loss
    is on the answers and their ends alone."""
    stage = one_stage((256, 256), rewording=0.0)
    for seed in range(3):
        page = render_mixed_page(random.Random(seed), kind, 256, 256, wild)
        possible = {prompt(None, *task[:2]): task[2] for task in tasks(page)}
        (ids, _), = train_tiny.conversations(stage, random.Random(seed), page, transcribe=True)
        assert page.text in "".join(map(LETTERS.get, ids))
        said, asked = train_tiny.conversations(stage, random.Random(seed), page, False), []
        assert 0 < len(said) <= train_tiny.CONVERSATIONS
        for ids, labels in said:
            text = "".join(map(LETTERS.get, ids))
            turns = [turn.removeprefix("<|im_start|>") for turn in text.split("<|im_end|>")]
            assert turns.pop() == "" and text.count("<|im_start|>") == len(turns) / 2 - 1
            assert len(ids) <= train_tiny.LONGEST or len(turns) == 2
            asked += turns[::2]
            assert all(possible[a] == b for a, b in zip(turns[::2], turns[1::2]))
            learnt = "".join(LETTERS[i] for i in labels if i != IGNORE)
            assert learnt == "".join(answer + "<|im_end|>" for answer in turns[1::2])
            assert all(label in (i, IGNORE) for i, label in zip(ids, labels))
        assert len(set(asked)) == len(asked)


def test_far_lines_are_asked_for_more_often(monkeypatch):
    """As often as in successive draws in which each line that is left counts once, each far one
    three times."""
    monkeypatch.setattr(train_tiny, "CONVERSATIONS", 30)
    stage = one_stage((512, 512), rewording=0.0)
    page = render_page(random.Random(0), "letter", 512, 512)
    weights = {int(about): 3 if int(about) > train_tiny.FAR_LINE else 1
               for task, about, _ in tasks(page) if task == "line"}
    ours = theirs = count = 0
    for seed in range(300):
        said = train_tiny.conversations(stage, random.Random(seed), page, transcribe=False)
        text = "".join(LETTERS[i] for ids, *_ in said for i in ids)
        asked = {int(n) for n in re.findall(r"What does line (\d+) say", text)}
        ours, count = ours + sum(weights[number] == 3 for number in asked), count + len(asked)
        left, rng = dict(weights), random.Random(seed)
        for _ in asked:
            theirs += left.pop(rng.choices([*left], left.values())[0]) == 3
    alike = sum(weight == 3 for weight in weights.values()) / len(weights)
    assert abs(ours - theirs) / count < 0.03 and ours / count > alike + 0.05


# ---- attention and training ----------------------------------------------------------------------

@pytest.mark.parametrize("block", [3, 4, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_has_the_gradients_of_its_definition(causal, block, monkeypatch):
    monkeypatch.setattr(tiny_layouts, "BLOCK", block)
    (B, H, N, T, D), made = (3, 2, 4, 7, 5), []
    for attend in (tiny_layouts.BlockByBlock.apply, tiny_layouts.fused_attention, None):
        torch.manual_seed(1)
        q, k, v = (torch.randn(B, H, n, D, dtype=torch.float64, requires_grad=True)
                   for n in (N, T, T))
        future = torch.ones(N, T, dtype=torch.bool).triu(T - N + 1) & causal
        out = (attend(q, k, v, causal) if attend else
               (q @ k.mT).masked_fill(future, -torch.inf).softmax(-1) @ v)
        out.pow(3).sum().backward()
        made.append((out, q.grad, k.grad, v.grad))
    assert all(torch.allclose(x, expected, atol=1e-12) for one in made[:-1]
               for x, expected in zip(one, made[-1]))


def test_training_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    """Same weights, bit by bit, in both stages; and its log has every line."""
    monkeypatch.setattr(train_tiny, "STAGES", tuple(
        one_stage((64, 32), rate=1e-2, wild=0.5, name=name) for name in ("one", "other")))
    monkeypatch.setattr(Trainer, "held_out", lambda trainer, stage: 0.5)

    def trained(args, killed_at=None):
        """Saves after every step, and is killed instead of saving at (stage, step)."""
        save = Trainer.save
        def spy(trainer, every=0):
            if (trainer.stage, trainer.step) == killed_at:
                raise KeyboardInterrupt
            save(trainer, 0)
        args.work.mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "save", spy)
            Trainer(args).run()

    whole, again = (arguments(tmp_path, work=tmp_path / name, out=tmp_path / name / "out",
                              dtype="bfloat16") for name in ("whole", "again"))
    trained(whole)
    for killed_at in ((0, 2), (1, 1)):
        with pytest.raises(KeyboardInterrupt):
            trained(again, killed_at)
    trained(again)
    one, other = (load_file(args.out / "model.safetensors") for args in (whole, again))
    assert one.keys() == other.keys() and all(torch.equal(x, other[name])
                                              for name, x in one.items())
    log = (whole.work / "qwen2-vl.log.jsonl").read_text().splitlines()
    assert [line.split('"')[3] for line in log] == ["one", "other"]
    assert all('"held_out_wild": 0.5' in line and '"few": [' in line for line in log)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with three random models of qwen2-vl's layout in it: one, other, third."""
    folder, layout = tmp_path_factory.mktemp("checkpoints"), LAYOUTS["qwen2-vl"]
    for name in ("one", "other", "third"):
        tiny_layouts.save_checkpoint_folder(layout, layout.model_class(layout.config()),
                                            folder / name)
    return folder


def test_training_that_starts_from_weights(checkpoints, tmp_path, monkeypatch):
    """The layers that name what image tokens show learn before the model does; and once a state is
    saved, it goes on from that, as the same command given again must."""
    stage = one_stage((64, 32))
    monkeypatch.setattr(train_tiny, "STAGES", (stage,))
    trainer = Trainer(arguments(tmp_path))
    one = tiny_layouts.read_checkpoint(trainer.layout, "", checkpoints / "one")
    batch = make_batch(trainer.layout, stage, random.Random(0))
    trainer.model.load_state_dict(one.state_dict())
    before = trainer.see(*batch)
    trainer.start_from(checkpoints / "one", "test")
    assert trainer.see(*batch) < before - 1
    assert all(map(torch.equal, one.parameters(), trainer.model.parameters()))
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    trainer.step = 1
    trainer.save(every=0)
    again = Trainer(arguments(tmp_path))
    again.start_from(checkpoints / "other", "test")
    assert again.step == 1
    assert all(map(torch.equal, one.parameters(), again.model.parameters()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_computes_in_the_dtype_that_was_asked_for(tmp_path, dtype):
    """Matrix products; the weights and what is said about heads stay float32."""
    trainer = Trainer(arguments(tmp_path, dtype=dtype))
    *_, looks = trainer.loss(*make_batch(trainer.layout, one_stage((64, 32)), random.Random(0)))
    assert trainer.image_tokens.dtype == getattr(torch, dtype) and looks.dtype == torch.float32
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_what_is_no_checkpoint_of_the_layout_takes_one_line(checkpoints, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "none", tmp_path / "empty", checkpoints / "one"):
        with pytest.raises(SystemExit) as end:
            train_tiny.main(["--layout", "llava-next", "--start-from", str(folder),
                             "--work", str(tmp_path), "--out", str(tmp_path / "out")])
        error = capsys.readouterr().err
        assert end.value.code == 2
        assert error.count("\n") == 1 and "--start-from" in error and str(folder) in error
