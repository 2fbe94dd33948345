"""Facts about the training of the small models and the pages that are drawn for it.

    pytest experiments/test_training.py
"""

import random
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model_llava
from test_sparsemm import HERE, TINY, tiny                                              # a fixture


@pytest.mark.parametrize("name", ["qwen2-vl", "llava-next"])
def test_training_sees_what_the_command_sees(tmp_path, name):
    """An untrained model of each layout, saved as training saves it: pixels, the number of image
    tokens and which cell of the page each of them shows are those of our own loader, and the logits
    of every conversation about the page, with training's own attention and patch embedding, are
    those that ours gives for that conversation alone."""
    from experiments import train_tiny
    layout = train_tiny.LAYOUTS[name]
    torch.manual_seed(0)
    reference = layout.model_class(layout.config()).eval()
    train_tiny.save_checkpoint_folder(layout, reference, tmp_path)
    ours = model_llava.load(tmp_path, "cpu", "float32")
    reference.load_state_dict({key: p.bfloat16().float()
                               for key, p in reference.state_dict().items()})
    stage = train_tiny.Stage("test", "language", ((256, 128),), 1, 1, 0, 0, ("form",))
    batch, labels = train_tiny.make_batch(layout, stage, random.Random(1))
    page = train_tiny.render_page(_replayed(random.Random(1), stage), "form", 256, 128)
    prompt = model_llava.prepare(ours, [page.image], "What?")
    processed = ours.processor.image_processor(page.image, return_tensors="pt")
    values = layout.pixel_values(**batch["images"])
    assert (processed["pixel_values"] - values).abs().max() < 1e-5
    image = prompt.images[0]
    assert len(image) == (batch["input_ids"][0] == train_tiny.IMAGE).sum()
    shown = labels[labels[:, 0] != train_tiny.IGNORE, :-1]
    boxes = image.boxes[image.kinds == model_llava.GRID]
    cells = train_tiny.cell_characters(train_tiny.enlarged(page, layout.zoom))
    labels_of_boxes = [cells[tuple(round(layout.zoom * x / 16) for x in (y0, x0))].tolist()
                       for x0, y0, *_ in boxes.tolist()]
    assert sorted(labels_of_boxes) == sorted(shown.tolist()) and shown.any()
    if name == "qwen2-vl":                       # LLaVA's labels come tile by tile, not row by row
        assert labels_of_boxes == shown.tolist()
    reference.set_attn_implementation("products")
    train_tiny.as_matrix_product(layout.patch_embedding(reference))
    with torch.inference_mode():
        expected = reference(inputs_embeds=train_tiny.embed(layout, reference, batch), **{
            key: batch[key] for key in ("position_ids", "prefix", "conversations")}).logits[0]
    assert batch["conversations"] > 1
    prefix, *_ = ids = list(batch["input_ids"][0].tensor_split([batch["prefix"]]))
    expected = expected.tensor_split([batch["prefix"]])
    for said, logits in zip(*(x[1].chunk(batch["conversations"]) for x in (ids, expected))):
        alone = prompt.extended([])
        alone.ids = torch.cat([prefix, said])
        alone.starts = [int((alone.ids == train_tiny.IMAGE).nonzero()[0])]
        alone.positions = ours.positions(len(alone.ids), alone.images, alone.starts)
        with torch.inference_mode():
            got = ours.logits(ours.hidden_states(alone))
        assert (got - torch.cat([expected[0], logits])).abs().max() < 1e-4


def test_pages_of_fields_have_their_values_below_or_behind_the_keys():
    from experiments.pages import render_page
    below = 0
    for seed in range(20):
        page = render_page(random.Random(seed), "fields", 256, 128)
        words = {word.text.rstrip(":"): (i, word.box) for i, line in enumerate(page.lines)
                 for word in line}
        assert page.questions
        for key, value in page.questions:
            (row, box), (row_of_value, box_of_value) = words[key], words[value]
            assert row_of_value in (row, row + 1)
            below += row_of_value > row
            # the ink of a letter begins up to two pixels behind where it is drawn
            assert (abs(box[0] - box_of_value[0]) <= 3) == (row_of_value > row)
    assert below > 40


@pytest.mark.parametrize("kind", ["form", "fields", "table", "letter", "shapes"])
def test_conversations_in_training_ask_what_the_page_answers(kind):
    """Every turn is a question about the page and its right answer, none comes twice, and the loss
    is on the answers and their ends alone."""
    from experiments import train_tiny
    from experiments.pages import prompt as wording, tasks
    stage = train_tiny.Stage("test", "language", ((256, 256),), 1, 1, 0, 0)
    letters = {i: c for c, i in train_tiny.VOCABULARY.items()}
    for seed in range(5):
        page = train_tiny.render_page(random.Random(seed), kind, 256, 256)
        possible = {wording(None, *task[:2]): task[2] for task in tasks(page)}
        (ids, *_), = train_tiny.conversations(stage, random.Random(seed), page, transcribe=True)
        assert page.text in "".join(map(letters.get, ids))
        said, asked = train_tiny.conversations(stage, random.Random(seed), page, False), []
        assert 0 < len(said) <= stage.conversations
        for ids, labels, _ in said:
            text = "".join(map(letters.get, ids))
            turns = [turn.removeprefix("<|im_start|>") for turn in text.split("<|im_end|>")]
            assert turns.pop() == "" and text.count("<|im_start|>") == len(turns) / 2 - 1
            assert len(ids) <= train_tiny.LONGEST or len(turns) == 2
            asked += turns[::2]
            for question, answer in zip(turns[::2], turns[1::2]):
                assert possible[question] == answer
            learnt = "".join(letters[i] for i in labels if i != train_tiny.IGNORE)
            assert learnt == "".join(answer + "<|im_end|>" for answer in turns[1::2])
            assert all(label in (i, train_tiny.IGNORE) for i, label in zip(ids, labels))
        assert len(set(asked)) == len(asked)


def test_training_asks_for_far_lines_more_often():
    """As often as successive draws in which each line that is left counts once, each far one three
    times."""
    from experiments import train_tiny
    from experiments.pages import tasks
    stage = train_tiny.Stage("test", "language", ((512, 512),), 1, 1, 0, 0, conversations=30)
    page = train_tiny.render_page(random.Random(0), "letter", 512, 512)
    weights = {int(about): 3 if int(about) > 12 else 1 for task, about, _ in tasks(page)
               if task == "line"}
    letters = {i: c for c, i in train_tiny.VOCABULARY.items()}
    ours = theirs = 0
    for seed in range(400):
        said = train_tiny.conversations(stage, random.Random(seed), page, transcribe=False)
        text = "".join(letters[i] for ids, *_ in said for i in ids)
        asked = {int(n) for n in re.findall(r"What does line (\d+) say", text)}
        assert len(asked) == 14 < len(weights)
        ours += sum(weights[number] == 3 for number in asked)
        left, rng = dict(weights), random.Random(seed)
        for _ in range(14):
            theirs += left.pop(rng.choices([*left], left.values())[0]) == 3
    assert abs(ours - theirs) / 400 < 0.2
    all_alike = 14 * 10 / 22                               # ten of the page's 22 lines are far
    assert ours / 400 > all_alike + 1


@pytest.mark.parametrize("transcribe", [True, False])
@pytest.mark.parametrize("kind", ["form", "table", "letter", "shapes"])
def test_hints_in_training_name_what_the_next_character_belongs_to(kind, transcribe):
    """Its line or shape, or what the question says; where no character of an answer is to be
    written, nothing."""
    from experiments import train_tiny
    stage = train_tiny.Stage("test", "language", ((256, 256),), 1, 1, 0, 0)
    letters, found = {i: c for c, i in train_tiny.VOCABULARY.items()}, set()
    for seed in range(5):
        page = train_tiny.render_page(random.Random(seed), kind, 256, 256)
        for ids, labels, hints in train_tiny.conversations(stage, random.Random(seed), page,
                                                           transcribe):
            turns, said = "".join(map(letters.get, ids)).split("<|im_end|>"), ""
            expected = []
            for question, answer in zip(turns[::2], turns[1::2]):
                question = question.removeprefix("<|im_start|>")
                column = item = line = train_tiny.IGNORE
                if question.startswith("What is the ") and kind == "table":
                    column, item = question[len("What is the "):-1].split(" of ")
                    column, item = train_tiny.HINTS.index(column), train_tiny.ITEMS.index(item)
                asked = len(question) + (said != "")                  # with its <|im_start|>
                expected += [train_tiny.NO_HINTS] * asked
                for written in range(len(answer) + 1):
                    if question.startswith("What does line "):
                        line = int(question[len("What does line "):-len(" say?")]) - 1
                    elif transcribe:
                        line = answer[:written].count("\n")
                    elif kind == "shapes":
                        line = train_tiny.LINES.index("shape 1") + answer[:written].count(",")
                    expected.append((column, item, line))
                expected.append(train_tiny.NO_HINTS)
                said += answer
            assert hints == expected
            found |= set(hints)
    assert len(found) > 3


@pytest.mark.parametrize("kind", ["table", "shapes", "form"])
@pytest.mark.parametrize("name", TINY)
def test_hints_in_training_name_what_an_image_token_shows(tiny, name, kind):
    """An image token whose middle lies in a word is hinted with its line, in a table's cell also
    with column and item, in a coloured shape with the shape; one that touches nothing is not; where
    tokens are, our own loader says."""
    from experiments import train_tiny
    stage = train_tiny.Stage("test", "language", ((256, 256),), 1, 1, 0, 0, (kind,))
    batch, _ = train_tiny.make_batch(train_tiny.LAYOUTS[name], stage, random.Random(5))
    page = train_tiny.render_page(_replayed(random.Random(5), stage), kind, 256, 256)
    things = {thing.box: (train_tiny.HINTS.index(thing.text), train_tiny.IGNORE,
                          train_tiny.LINES.index(f"shape {i}"))
              for i, thing in enumerate(page.objects, 1)}
    for i, line in enumerate(page.lines):
        things |= {word.box: (train_tiny.IGNORE, train_tiny.IGNORE, i) for word in line}
        if kind == "table" and i:
            things |= {word.box: (train_tiny.HINTS.index(column.text),
                                  train_tiny.ITEMS.index(line[0].text), i)
                       for column, word in zip(page.lines[0][1:], line[1:])}
    image = model_llava.prepare(tiny[name], [page.image], "What?").images[0]
    hints = batch["hints"][0][batch["input_ids"][0] == train_tiny.IMAGE].tolist()
    found = set()
    for hint, box, of_grid in zip(hints, image.boxes, image.kinds == model_llava.GRID, strict=True):
        (x0, y0, x1, y1), hint = box.tolist(), tuple(hint)
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        inside = {of for (a, b, c, d), of in things.items() if a < x < c and b < y < d}
        touched = any(a < x1 and x0 < c and b < y1 and y0 < d for a, b, c, d in things)
        if of_grid and inside:
            assert {hint} == inside
            found.add(hint)
        elif not of_grid or not touched:
            assert hint == train_tiny.NO_HINTS
    assert len(found) >= {"table": 6, "shapes": 1, "form": 2}[kind]
    unhinted, _ = train_tiny.make_batch(train_tiny.LAYOUTS[name], replace(stage, hinted=0),
                                        random.Random(5))
    assert (unhinted.pop("hints") == train_tiny.IGNORE).all()
    assert all(torch.equal(batch[key], x) for key, x in unhinted.items() if torch.is_tensor(x))


def test_training_on_large_pages():
    """A batch has fewer of them, but one at least; of a page's many lines the first are hinted."""
    from experiments import pages, train_tiny
    layout = train_tiny.LAYOUTS["qwen2-vl"]
    for size, drawn in (((64, 32), 4), ((64, 64), 4), ((128, 64), 2), ((256, 256), 1)):
        stage = train_tiny.Stage("read", "language", (size,), 4, 1, 0, 0,
                                 batch_pixels=4 * 64 * 64)
        batch, _ = train_tiny.make_batch(layout, stage, random.Random(0))
        assert len(batch["input_ids"]) == len(batch["images"]["pages"]) == drawn
    page = pages.Page(Image.new("RGB", (32, 640)),
                      [[pages.Word("1", (0, 16 * i, 16, 16 * i + 16), ())] for i in range(40)])
    lines = train_tiny.cell_hints(page)[:, 0, 2].tolist()
    assert [train_tiny.LINES[i] for i in lines[:28]] == [str(i) for i in range(1, 29)]
    assert lines[28:] == [train_tiny.IGNORE] * 12


@pytest.mark.parametrize("share, found", [(0, {False}), (0.5, {False, True}), (1, {True})])
def test_training_on_batches_of_nothing_but_shapes(share, found):
    """They have twice as many pages, of which none is transcribed."""
    from experiments import train_tiny
    layout = train_tiny.LAYOUTS["qwen2-vl"]
    stage = train_tiny.Stage("read", "language", ((96, 96),), 2, 1, 0, 0, transcripts=1,
                             shapes_alone=share)
    drawn = set()
    for seed in range(12):
        pages, only_shapes = train_tiny.draw_pages(stage, random.Random(seed))
        drawn.add(only_shapes)
        assert len(pages) == (4 if only_shapes else 2)
        assert not only_shapes or all(page.objects for page in pages)
        batch, _ = train_tiny.make_batch(layout, stage, random.Random(seed))
        for page, labels in zip(pages, batch["labels"]):
            learnt = [i for i in labels.tolist() if i != train_tiny.IGNORE][:-1]
            shapes = ", ".join(thing.text for thing in page.objects)
            written = shapes if only_shapes else page.text
            assert learnt == [train_tiny.VOCABULARY[c] for c in written]
    assert drawn == found


@pytest.mark.parametrize("block", [3, 4, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_training_has_the_gradients_of_its_definition(causal, block, monkeypatch):
    from experiments import train_tiny
    monkeypatch.setattr(train_tiny, "BLOCK", block)
    (B, H, N, T, D), made = (3, 2, 4, 7, 5), []
    for attend in (train_tiny.BlockByBlock.apply, train_tiny.fused_attention, None):
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


def test_muon_in_training_is_torchs():
    """The same steps, up to the rounding of bfloat16; a matrix without a gradient stands still."""
    from experiments.train_tiny import Muon
    made, shapes = [], ((8, 24), (8, 24), (24, 8), (8, 8), (8, 24))
    for kind in (Muon, torch.optim.Muon):
        torch.manual_seed(0)
        matrices = [torch.randn(shape, requires_grad=True) for shape in shapes]
        target = [torch.randn(shape) for shape in shapes]
        optimizer = kind([dict(params=matrices[:2]), dict(params=matrices[2:], lr=0.02)], lr=0.01,
                         weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        begun = [x.detach().clone() for x in matrices]
        for _ in range(4):
            optimizer.zero_grad()
            sum(((x - t) ** 4).sum() for x, t in zip(matrices[:-1], target)).backward()
            optimizer.step()
        made.append([x.detach() for x in matrices])
    assert torch.equal(made[0][-1], begun[-1])
    for ours, theirs, before in zip(*made, begun[:-1]):
        assert (ours - theirs).norm() < 0.02 * (theirs - before).norm()


def test_training_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    """Same weights, bit by bit; and the vision tower stands still in steps that are not its own."""
    from experiments import train_tiny
    stage = partial(train_tiny.Stage, sizes=((64, 32),), batch=2, rate=1e-2, end_rate=1e-3)
    monkeypatch.setitem(train_tiny.STAGES, "qwen2-vl", (
        stage("see", "vision", steps=2), stage("read", "language", steps=3, vision_every=2)))
    args = SimpleNamespace(seed=0, device="cpu", layout="qwen2-vl", teacher=None, workers=0,
                           fonts=(), report=100, work=tmp_path, out=tmp_path / "whole",
                           average=[], dtype="bfloat16")

    def trained(args, killed_at=None):
        """Every state that training saves, which it does after every step here."""
        states, save = [], train_tiny.Trainer.save
        def spy(trainer, every=0):
            if (trainer.stage, trainer.step) == killed_at:
                raise KeyboardInterrupt
            save(trainer, 0)
            states.append({name: p.clone() for name, p in trainer.model.state_dict().items()})
        with monkeypatch.context() as patch:
            patch.setattr(train_tiny.Trainer, "save", spy)
            train_tiny.Trainer(args).run()
        return states

    whole = trained(args)
    moved = [any(not torch.equal(before[name], after[name]) for name in before if "visual" in name)
             for before, after in zip(whole, whole[1:])]
    assert moved == [True, False, True, False, True, False]      # False also where a stage ends
    again = SimpleNamespace(**vars(args) | dict(work=tmp_path / "again", out=tmp_path / "other"))
    again.work.mkdir()
    for killed_at in ((0, 2), (1, 1)):
        with pytest.raises(KeyboardInterrupt):
            trained(again, killed_at)
    last = trained(again)[-1]
    assert all(torch.equal(last[name], p) for name, p in whole[-1].items())
    assert ((tmp_path / "other" / "model.safetensors").read_bytes()
            == (tmp_path / "whole" / "model.safetensors").read_bytes())


@pytest.fixture
def three_checkpoints(tmp_path, monkeypatch):
    """Three random ones in tmp_path, for a training of one short stage: (layout, stage, args)."""
    from experiments import train_tiny
    layout = train_tiny.LAYOUTS["qwen2-vl"]
    stage = train_tiny.Stage("read", "language", ((64, 32),), 2, 1, 1e-3, 1e-3)
    monkeypatch.setitem(train_tiny.STAGES, "qwen2-vl", (stage,))
    for name in ("one", "other", "third"):
        train_tiny.save_checkpoint_folder(layout, layout.model_class(layout.config()),
                                          tmp_path / name)
    return layout, stage, SimpleNamespace(seed=0, device="cpu", layout="qwen2-vl", teacher=None,
                                          work=tmp_path, out=tmp_path / "mean", average=[],
                                          dtype="float32", workers=0, fonts=())


def test_training_exports_the_mean_of_models(three_checkpoints, tmp_path):
    from experiments import train_tiny
    layout, _, args = three_checkpoints
    args.average = [tmp_path / "other", tmp_path / "third"]
    trainer = train_tiny.Trainer(args)
    trainer.model = layout.model_class.from_pretrained(tmp_path / "one", dtype=torch.float32)
    trainer.export()
    *parts, mean = (load_file(tmp_path / name / "model.safetensors")
                    for name in ("one", "other", "third", "mean"))
    assert mean.keys() == parts[0].keys()
    for name, x in mean.items():
        exact = sum(part[name].double() for part in parts) / 3
        assert ((x - exact).abs() <= exact.abs() / 256 + 1e-8).all()                # bfloat16
        assert x.ndim < 2 or not torch.equal(x, parts[0][name])


def test_training_that_starts_from_weights(three_checkpoints, tmp_path):
    """The layers that name characters and hints learn before the model does; and once a state is
    saved, it goes on from that, as the same command given again must."""
    from experiments import train_tiny
    layout, stage, args = three_checkpoints
    trainer = train_tiny.Trainer(args)
    seeing = replace(stage, step="vision")
    naming = replace(stage, hinted=100)             # so that the loss is mostly that of the hints
    batches = [train_tiny.make_batch(layout, part, random.Random(0))
               for part in (seeing, naming)]

    def losses():
        return [trainer.loss(*batch, part)[0].item()
                for batch, part in zip(batches, (seeing, naming))]

    one = layout.model_class.from_pretrained(tmp_path / "one", dtype=torch.float32)
    trainer.model.load_state_dict(one.state_dict())
    before = losses()
    trainer.start_from(tmp_path / "one", "read")
    after = losses()
    assert after[0] < before[0] - 1 and after[1] < before[1] - 10
    assert all(map(torch.equal, one.parameters(), trainer.model.parameters()))
    trainer.step = 1
    trainer.save(every=0)
    again = train_tiny.Trainer(args)
    again.start_from(tmp_path / "other", "read")
    assert again.step == 1
    assert all(map(torch.equal, one.parameters(), again.model.parameters()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_computes_in_the_dtype_that_was_asked_for(three_checkpoints, dtype):
    """Matrix products; the weights stay float32."""
    from experiments import train_tiny
    layout, stage, args = three_checkpoints
    args.dtype = dtype
    trainer = train_tiny.Trainer(args)
    trainer.loss(*train_tiny.make_batch(layout, stage, random.Random(0)), stage)
    assert trainer.image_tokens.dtype == getattr(torch, dtype)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_training_draws_a_stages_share_of_pages_in_other_fonts(monkeypatch):
    from experiments import train_tiny
    drawn, render_page = [], train_tiny.render_page
    def page(rng, kind, width, height, fonts, **options):
        drawn.append(fonts)
        return render_page(rng, kind, width, height, **options)
    monkeypatch.setattr(train_tiny, "render_page", page)
    for share, fonts in ((0, ["a", "b"]), (0.25, ["a", "b"]), (1, ["a", "b"]), (1, ())):
        stage = train_tiny.Stage("see", "vision", ((96, 48),), 200, 1, 1, 1, in_fonts=share)
        drawn.clear()
        train_tiny.make_batch(train_tiny.LAYOUTS["qwen2-vl"], stage, random.Random(0), fonts)
        assert len(drawn) == drawn.count(fonts) + drawn.count((None,)) == 200
        assert abs(drawn.count(fonts) / 200 - share * bool(fonts)) < 0.08


@pytest.mark.parametrize("option", ["--start-from", "--average", "--teacher"])
def test_training_from_what_is_no_checkpoint_of_the_layout_takes_one_line(tmp_path, capsys, option):
    from experiments import train_tiny
    (tmp_path / "empty").mkdir()
    other = HERE / "tiny" / ("llava-next" if option == "--teacher" else "qwen2-vl")
    for folder in (tmp_path / "none", tmp_path / "empty", other):
        with pytest.raises(SystemExit) as end:
            train_tiny.main(["--layout", "llava-next", option, str(folder), "--work", str(tmp_path),
                             "--threads", str(torch.get_num_threads())])
        error = capsys.readouterr().err
        assert end.value.code == 2
        assert error.count("\n") == 1 and option in error and str(folder) in error


def test_the_second_small_model_learns_from_the_first(tmp_path, monkeypatch):
    """Which of the teacher's image tokens shows the same cell; whose heads and neurons the decoder
    starts with: query head h has the keys and values that it had in its group."""
    from experiments import train_tiny
    trainer = train_tiny.Trainer(SimpleNamespace(
        seed=0, device="cpu", work=tmp_path, layout="llava-next", average=[],
        dtype="bfloat16", teacher=HERE / "tiny" / "qwen2-vl"))
    stage = train_tiny.Stage("test", "vision", ((256, 128),), 2, 1, 0, 0, ("form",))
    first = train_tiny.LAYOUTS["qwen2-vl"]
    monkeypatch.setattr(first, "zoom", trainer.layout.zoom)
    batch, labels = train_tiny.make_batch(trainer.layout, stage, random.Random(1), teacher=first)
    _, theirs = train_tiny.make_batch(first, stage, random.Random(1))
    shown = batch["same_cell"] >= 0
    assert shown.sum() == 2 * 20 * 10 and labels.any()
    assert torch.equal(labels[shown], theirs[batch["same_cell"][shown]])
    with torch.no_grad():
        together = trainer.loss(batch, labels, stage)[0]
        own = trainer.image_tokens.flatten(0, 1)[shown]
        taught = trainer.teachers_tokens[batch["same_cell"][shown]].float()
        apart = trainer.loss({"images": batch["images"]}, labels, stage)[0]
        unlike = (own - taught).square().mean() / trainer.teachers_tokens.float().var(0).mean()
    assert together - apart == pytest.approx(unlike.item(), rel=1e-3)

    trainer.adopt_decoder()
    for to, source in zip(trainer.model.model.language_model.layers,
                          trainer.teacher.model.language_model.layers):
        assert torch.equal(to.self_attn.q_proj.weight, source.self_attn.q_proj.weight)
        for own, taught in ((to.self_attn.k_proj, source.self_attn.k_proj),
                            (to.self_attn.v_proj, source.self_attn.v_proj)):
            own, taught = (p.weight.view(-1, 32, 256) for p in (own, taught))
            assert all(torch.equal(own[h], taught[h // 2]) for h in range(8))
        neurons = {tuple(gate): (up, down) for gate, up, down in zip(
            source.mlp.gate_proj.weight.tolist(), source.mlp.up_proj.weight.tolist(),
            source.mlp.down_proj.weight.T.tolist())}
        for gate, up, down in zip(to.mlp.gate_proj.weight.tolist(), to.mlp.up_proj.weight.tolist(),
                                  to.mlp.down_proj.weight.T.tolist()):
            assert neurons[tuple(gate)] == (up, down)


def _replayed(rng, stage):
    """The generator as make_batch hands it to the renderer of its first page."""
    rng.choice(stage.sizes), rng.choice(stage.kinds)
    return rng
