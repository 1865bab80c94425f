"""Tests, grouped by the file they test, fast ones first; the whole chain comes last.

    python -m pytest -q test_all.py                     # everything, a few minutes on 2 cores
    python -m pytest -q test_all.py -k "not chain"      # without the subprocess runs

Expected values are worked by hand or by brute force, and `# fails if` names the slip in the code
that a test is there to catch. KIT_SHARED_DATA points at MMRole's reviews and the pre-training
examples; tests that need them are skipped where they are absent.
"""

import copy
import csv
import functools
import gzip
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import Qwen2_5_VLConfig

import eval as tasks
import model as kit
import train_bc
import train_idm
import train_projector as stage1
from model import (Agent, CausalStack, Encoder, GaussianMap, Projector, Stream, UserError,
                   WorldModel, action_statistics, choose, key_seed, keyed_gumbel, replay, rollout,
                   token_logprobs)

torch.set_num_threads(1)
HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("KIT_SHARED_DATA", HERE.parent / "shared" / "data"))
DOCUMENTS = ["You are a helpful assistant.", "What do you see? I see a red circle and a star.",
             "The bus in the image is white and red."] * 4


# ---- Helpers ---------------------------------------------------------------------------------


def shake(module, std, seed=0):
    """Noise on every parameter, so that zero-initialised layers do something."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data += std * torch.randn(p.shape, generator=generator)
    return module


@functools.cache
def tiny_agent(space="latent") -> Agent:
    """A random Qwen2.5-VL of width 64 and 2 layers with all modules, none at its initial value.
    Cached: a test that trains takes a copy."""
    if space == "token":
        agent = copy.deepcopy(tiny_agent()).make_token_policy()
        shake(agent.policy, 0.02)               # no longer the backbone's own layers
        return agent.requires_grad_(False)
    base, tokenizer, processor = kit.tiny_base(DOCUMENTS, seed=0, width=64, layers=2, vocab=400)
    shake(base, 0.1)
    agent = Agent(base, Encoder(tokenizer, processor, base.config),
                  {"codes": 16, "idm_layers": 1, "policy_layers": 1, "no_projector": False})
    agent.make("projector", "idm", "codebook", "world", "policy")
    for seed, name in enumerate(("projector", "idm", "world", "policy")):
        shake(getattr(agent, name), 0.15, seed)
    return agent.eval().requires_grad_(False)


def picture(width=56, height=56, seed=0) -> Image.Image:
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def row(user, answer=None, images=(), row_id="r", system="You are helpful.") -> dict:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    messages += [{"role": "assistant", "content": answer}] if answer else []
    return {"id": row_id, "messages": messages, "images": list(images)}


ROWS = [row("<image>What do you see?", "A red star.", [picture()], "front"),
        row("Tell me a story about a red bus, please.", "No.", (), "text"),
        row("Look: <image> and <image>. Which is white?", "The second.",
            [picture(112, 28, 1), picture(28, 56, 2)], "two")]


def prompts(rows=ROWS):
    return [tiny_agent().encoder.encode(r, prompt=True) for r in rows]


def examples(rows=ROWS):
    return [tiny_agent().encoder.encode(r) for r in rows]


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tolerance,
                               atol=tolerance, check_dtype=False)


def gradients(loss, params):
    return torch.autograd.grad(loss, params, retain_graph=True)


# ==== model.py: runtime =======================================================================


def test_cosine_schedule():
    close(kit.cosine(0, 100, 0.1), 0.1)         # fails if warm-up starts at 0: a step is lost
    close(kit.cosine(9, 100, 0.1), 1.0)
    close(kit.cosine(55, 100, 0.1, 0.1), 0.55)  # half way down: the mean of 1 and the floor
    close(kit.cosine(100, 100, 0.1, 0.1), 0.1)


def test_key_seed_depends_on_every_key_and_nothing_else():
    assert key_seed(1, "a") == key_seed(1, "a") < 2 ** 63
    assert len({key_seed(*k) for k in [(1, "a"), (1, "b"), (2, "a"), ("1", "a"), (1,)]}) == 5


def test_atomic_leaves_the_old_file_when_writing_fails(tmp_path):
    file = tmp_path / "x"
    kit.atomic(file, lambda p: p.write_text("old"))

    def full_disk(p):
        p.write_text("half")
        raise OSError(28, "No space left on device")
    with pytest.raises(UserError, match="No space left"):
        kit.atomic(file, full_disk)
    assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x"]


def parsed(module, *argv):
    return module.arguments().resolve(list(argv))


def test_flags_unknown_abbreviated_and_out_of_range_are_refused():
    for argv in (["--nonsense"], ["--ste", "3"], ["--steps", "0"], ["--lr", "11"],
                 ["--steps", "x"], ["--codes", "-1"]):
        with pytest.raises(UserError):
            parsed(stage1, *argv)
    assert parsed(stage1).lr == 2e-3 and parsed(stage1, "--model", "a/b").lr == 1e-3
    assert parsed(train_bc, "--stage", "bc").lr == 1e-3
    assert parsed(train_bc, "--action-space", "token").lr == 3e-4


def test_predecessor_runs_with_its_own_defaults(tmp_path):
    """What `require` starts must be what the user gets by running that stage alone."""
    args = parsed(train_idm, "--seed", "3", "--lr", "0.5", "--steps", "7", "--run-root",
                  str(tmp_path), "--no-cycle", "--name", "mine")
    seen = {}
    for fixed in ({"stage": "bc"}, {"action_space": "token", "sft": "clone"}):
        flags = [x for k, v in fixed.items() for x in (f"--{k.replace('_', '-')}", v)]
        kit.require(args, tmp_path / "none", "train_bc.py", lambda a: seen.update(vars(a)),
                    train_bc.arguments(), **fixed)
        alone = parsed(train_bc, "--seed", "3", "--run-root", str(tmp_path), "--no-cycle", *flags)
        assert seen == vars(alone)  # fails if defaults are filled before `fixed` is known


def test_variant_folders_never_collide():
    names = {kit.folder_of(parsed(train_idm, *flags), "idm") for flags in (
        [], ["--codes", "16"], ["--idm-layers", "1"], ["--policy-layers", "1"], ["--no-text"],
        ["--no-projector"], ["--no-cycle"], ["--name", "x"], ["--model", "org/x"])}
    assert len(names) == 9 and Path("runs/tiny/idm") in names
    assert Path("runs/org--x/idm") in names


def fresh_run(folder, *flags, **derived):
    args = parsed(stage1, "--run-root", str(folder), *flags)
    return kit.Run(args, folder / "run", "train_projector.py", None, **derived)


def train_linear(run, start, stop, layer, optimizer, extra):
    for step in range(start, stop):
        layer(torch.full((1, 3), step + 1.0)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        run.log({"step": step, "x": 1 / 3})
        run.save(step + 1, {"layer": layer}, [optimizer], {}, extra)


def test_run_resumes_bit_for_bit_and_cuts_the_log(tmp_path):
    def new():
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer, optimizer = new()
    run = fresh_run(tmp_path)
    assert run.resume({"layer": layer}, [optimizer]) == (0, {})
    train_linear(run, 0, 2, layer, optimizer, {"window": [1.0]})
    run.log({"step": 2})                         # a row after the checkpoint: the run was killed
    again, optimizer2 = new()
    run = fresh_run(tmp_path)
    assert run.resume({"layer": again}, [optimizer2]) == (2, {"window": [1.0]})
    train_linear(run, 2, 4, again, optimizer2, {})
    train_linear(fresh_run(tmp_path / "b"), 2, 4, layer, optimizer, {})
    assert torch.equal(layer.weight, again.weight)     # fails if optimiser state is not loaded
    log = [json.loads(x) for x in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in log] == [0, 1, 2, 3] and log[0]["x"] == 0.3333333
    run.finish({"layer": again})
    assert not (tmp_path / "run/state").exists() and fresh_run(tmp_path).finished
    assert set(load_file(tmp_path / "run/model.safetensors")) == {"layer.weight", "layer.bias"}


def test_run_refuses_other_arguments_naming_them(tmp_path):
    fresh_run(tmp_path)
    fresh_run(tmp_path, "--device", "cpu", "--save-every", "5")       # no change of the result
    with pytest.raises(UserError, match=r"lr: 0.002 -> 0.5.*--name.*--fresh"):
        fresh_run(tmp_path, "--lr", "0.5")
    assert fresh_run(tmp_path, "--lr", "0.5", "--fresh").config["args"]["lr"] == 0.5
    (tmp_path / "run/config.json").unlink()
    with pytest.raises(UserError, match="no config.json"):
        fresh_run(tmp_path)


def test_non_finite_steps_are_skipped_and_ten_stop(tmp_path):
    run, layer = fresh_run(tmp_path), nn.Linear(2, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    before = layer.weight.clone()
    with pytest.raises(UserError, match="ten non-finite.*row-7"):
        for _ in range(10):
            (layer(torch.ones(1, 2)) * math.nan).sum().backward()
            kit.optimizer_step(run, [optimizer], ["row-7"])
    assert torch.equal(layer.weight, before) and run.skipped == 10
    layer.weight.grad, layer.bias.grad = torch.tensor([[3.0, 4.0]]), torch.zeros(1)
    close(kit.optimizer_step(run, [optimizer], []), 5.0)
    close(before - layer.weight, torch.tensor([[0.6, 0.8]]))    # fails if the clip is dropped
    assert run.skipped == 0 and layer.weight.grad is None


# ==== model.py: data ==========================================================================


def parse(raw, **kw):
    return kit.normalise_row(raw, "f.jsonl:3", Path("/data"), kw.get("image_root"))


def test_all_row_forms_parse_to_the_same_row():
    ask, said = {"role": "user", "content": "<image>\nHi"}, {"role": "assistant", "content": "Yo"}
    want = [ask, said]
    forms = [
        {"messages": [ask, said], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": "Hi"}, said], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": [{"type": "image"}, {
            "type": "text", "text": "\nHi"}]}, said], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": [{"type": "image"}, {
            "type": "text", "text": "\nHi"}]}, said], "image": "a.png"},
        {"conversations": [{"from": "human", "value": "<image>\nHi"},
                           {"from": "gpt", "value": "Yo"}], "image": "a.png"}]
    for raw in forms:
        got = parse(raw)
        assert got["messages"] == want and got["images"] == ["/data/a.png"]
        assert got["id"] == "f.jsonl:3"
        assert parse(raw, image_root="/elsewhere")["images"] == ["/elsewhere/a.png"]
    assert raw == forms[-1]                                     # the caller's row is left alone
    for images in ([], None, ["None"], "None"):
        assert parse({"messages": [said], "images": images})["images"] == []
    assert parse({"text": "abc"})["messages"] == [{"role": "assistant", "content": "abc"}]
    system = parse({"system": "S", "conversations": [{"from": "human", "value": "x"}]})
    assert system["messages"][0] == {"role": "system", "content": "S"}
    two = parse({"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "u"}],
                 "images": ["a", "b"], "id": 7})
    assert two["messages"][1]["content"] == "<image><image>\nu" and two["id"] == "7"


@pytest.mark.parametrize("raw", [
    [], 3, {}, {"messages": []}, {"messages": "x"}, {"messages": ["x"]}, {"text": 4},
    {"messages": [{"role": "tool", "content": "x"}]}, {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": "<image>"}]},
    {"messages": [{"role": "user", "content": "<image><image>"}], "images": ["a"]},
    {"messages": [{"role": "assistant", "content": "x"}], "images": ["a"]},
    {"messages": [{"role": "user", "content": ["x"]}]},
    {"messages": [{"role": "user", "content": [{"type": None}]}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
    {"conversations": "x"}, {"conversations": ["x"]}, {"conversations": []},
    {"messages": [{"role": "user", "content": "x"}], "images": 5},
    {"messages": [{"role": "user", "content": "x"}], "images": [{"path": "a"}]},
    {"messages": [{"role": "user", "content": "x"}], "images": [None]}],
    ids=lambda raw: json.dumps(raw)[:60])
def test_a_bad_row_is_a_user_error_naming_file_and_line(raw):
    with pytest.raises(UserError, match="f.jsonl:3"):
        parse(raw)


def write(path, rows, form="jsonl"):
    text = json.dumps(rows, indent=1) if form == "json" else "".join(
        json.dumps(r) + "\n" for r in rows)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def text_rows(n, words=1):
    return [{"id": f"t{i}", "messages": [{"role": "user", "content": f"number {i} " * words},
                                         {"role": "assistant", "content": "yes " * (i % 9 + 1)}]}
            for i in range(n)]


def test_read_rows_of_every_file_form_from_every_position(tmp_path):
    rows = text_rows(5)
    for name, form in (("a.jsonl", "jsonl"), ("a.jsonl.gz", "jsonl"), ("a.json", "json"),
                       ("a.json.gz", "json")):
        files = [write(tmp_path / name, rows, form), write(tmp_path / f"b{name}", rows[:2], form)]
        every = list(kit.read_rows(files))
        assert [r["id"] for r, _ in every] == [r["id"] for r in rows + rows[:2]]
        for k, (_, position) in enumerate(every):
            rest = [r["id"] for r, _ in kit.read_rows(files, None, position)]
            assert rest == [r["id"] for r, _ in every[k + 1:]]  # fails if off by one row


def test_unreadable_files_are_named_with_their_line(tmp_path):
    def fails(data, pattern, name="f.jsonl"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=pattern):
            list(kit.read_rows([tmp_path / name]))
    fails(b'{"text": "a"}\n\n{"text": \n', r"f.jsonl:3")
    fails(b'{"text": "a"}\n{"txt": "b"}\n', r"f.jsonl:2")
    fails(b'{"text": "\xff"}\n', r"f.jsonl:1")
    fails(b'[{"text": "a"}, {"no": 1}]', r"f.json: row 2", "f.json")
    fails(b'[{"text": "a"}', r"f.json: not valid", "f.json")
    fails(gzip.compress(b'{"text": "a"}\n' * 99)[:-12], "f.jsonl.gz", "f.jsonl.gz")
    with pytest.raises(UserError, match="absent.jsonl"):
        list(kit.read_rows([tmp_path / "absent.jsonl"]))


def test_bad_images_are_named_and_refused(tmp_path):
    encoder = tiny_agent().encoder
    (tmp_path / "text.png").write_text("hello")
    picture(56, 56).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:3000])
    Image.new("1", (16000, 16000)).save(tmp_path / "bomb.png")
    Image.new("1", (9000, 9000)).save(tmp_path / "large.png")  # PIL warns, does not refuse
    Image.new("RGB", (2000, 2)).save(tmp_path / "thin.png")
    for name in ("missing.png", "text.png", "cut.png", "bomb.png", "thin.png"):
        with pytest.raises(UserError, match=r"row r7.*" + ("" if name == "thin.png" else name)):
            encoder.collate([encoder.encode(row("<image>?", None, [str(tmp_path / name)], "r7"))])
    with pytest.raises(UserError, match="literal image token"):
        encoder.encode(row("what is <|image_pad|>?"))


def test_golden_positions_worked_by_hand():
    # a b [2 x 3 image tokens] c d, then a 1 x 2 image; the image starts at 2, text after it at
    # 2 + max(2, 3) = 5. Fails if the next text position is the number of tokens so far.
    I, grids = 9, torch.tensor([[1, 4, 6], [1, 2, 4]])
    ids = torch.tensor([1, 1, *[I] * 6, 1, 1, I, I, 1])
    close(kit.mrope_positions(ids, grids, I, 2), torch.tensor([
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7, 7, 9],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7, 7, 9],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 9]]))


@pytest.mark.parametrize("sizes", [[], [(56, 56)], [(112, 28)], [(28, 112), (56, 56), (56, 28)]])
def test_positions_equal_transformers(sizes):
    agent = tiny_agent()
    for before, after in itertools.product(("", "Look here: "), ("", " and tell me more.")):
        text = before + " then ".join(["<image>"] * len(sizes)) + after
        e = agent.encoder.encode(row(text or "x", "Yes.", [picture(*s) for s in sizes]))
        theirs, _ = agent.backbone.model.get_rope_index(
            e.ids[None], mm_token_type_ids=(e.ids == agent.encoder.image_token).int()[None],
            image_grid_thw=e.grids if sizes else None)
        assert torch.equal(e.positions, theirs[:, 0])


def test_encode_marks_responses_and_expands_images():
    agent = tiny_agent()
    messages = [("system", "S"), ("user", "<image>a"), ("assistant", "one."), ("user", "b"),
                ("assistant", "two.")]
    r = {"id": "m", "images": [picture()],
         "messages": [{"role": a, "content": b} for a, b in messages]}
    e, decode = agent.encoder.encode(r), agent.encoder.tokenizer.decode
    assert decode(e.ids[e.response]) == "one.<|im_end|>two.<|im_end|>"
    assert (e.ids == agent.encoder.image_token).sum() == 4 and (~e.text).sum() == 6
    p = agent.encoder.encode(r, prompt=True)
    assert decode(p.ids).endswith("b<|im_end|>\n<|im_start|>assistant\n")
    assert torch.equal(p.ids, e.ids[:len(p)])       # the prompt is a prefix of the full row


@pytest.mark.parametrize("start", ["\n", "\n\n", " ", "\t\n x"])
def test_responses_that_start_with_white_space_are_found(start):
    agent = tiny_agent()
    e = agent.encoder.encode(row("a", start + "one."))
    said = agent.encoder.tokenizer.decode(e.ids[e.response])
    assert said.endswith("one.<|im_end|>")


def test_collate_views_and_targets():
    encoder = tiny_agent().encoder
    batch = encoder.collate(examples())
    for b, e in enumerate(examples()):
        m = int(batch.text_lengths[b])
        index = batch.text_index[b, :m]
        assert m == e.text.sum() and torch.equal(batch.tokens[b, :m], e.ids[e.text])
        assert torch.equal(batch.ids[b].gather(0, index), batch.tokens[b, :m])
        # the row's tokens one by one: predict every text token right after a text token
        want = [i for t, i in enumerate(index.tolist()) if t + 1 < m and index[t + 1] == i + 1]
        assert index[batch.targets[b, :m]].tolist() == want and not batch.targets[b, m - 1:].any()
        vision = (e.ids == encoder.image_token).nonzero()[:, 0].tolist()
        assert batch.seen_image[b].sum() == sum(
            i > vision[0] for i in index.tolist()) if vision else not batch.seen_image[b].any()
        assert batch.real[b].sum() == m
    at, targets = encoder.collate(examples()[:1], responses_only=True).labelled()
    assert encoder.tokenizer.decode(targets) == "A red star.<|im_end|>"
    assert batch.pixels.shape == (int(batch.grids.prod(-1).sum()), 1176)


def test_micro_batches_keep_every_row_within_the_size():
    rows = [e for n in (3, 40, 7, 22, 9, 60) for e in examples([row("x " * n, row_id=str(n))])]
    for size in (1, 100, 300, 10 ** 6):
        parts = kit.micro_batches(rows, size)
        assert sorted(e.id for p in parts for e in p) == sorted(e.id for e in rows)
        assert all(len(p) * max(map(len, p)) <= size or len(p) == 1 for p in parts)
    assert kit.micro_batches([]) == []


def stream(source, **kw):
    return Stream(source, tiny_agent().encoder, **{"batch_tokens": 150, "seed": 1, "block": 8,
                                                   "max_tokens": 60, **kw})


@pytest.mark.parametrize("name,form", [("a.jsonl", "jsonl"), ("a.jsonl.gz", "jsonl"),
                                       ("a.json", "json"), (None, None)])
def test_stream_covers_an_epoch_and_resumes_at_the_exact_row(tmp_path, name, form):
    source = [write(tmp_path / name, text_rows(21), form)] if name else [
        {**r, "images": []} for r in text_rows(21)]
    one, seen = stream(source), []
    while one.cursor["epoch"] == 0 or len(seen) < 21:
        seen += [e.id for e in one.next()]
    assert sorted(seen[:21]) == sorted(r["id"] for r in text_rows(21))     # each row once
    one, cursors, batches = stream(source), [], []
    for _ in range(12):
        cursors.append(copy.deepcopy(one.cursor))
        batches.append([e.id for e in one.next()])
    for k in (0, 1, 4, 9):                          # fails if the cursor misses block or epoch
        again = stream(source)
        again.cursor = cursors[k]
        assert [[e.id for e in again.next()] for _ in range(12 - k)] == batches[k:]
    orders = {tuple(e.id for e in stream(source, seed=s).next()) for s in range(4)}
    assert len(orders) > 1                          # fails if the seed does not shuffle


def test_stream_gives_the_same_global_batches_on_two_ranks(monkeypatch):
    source, sums = [{**r, "images": []} for r in text_rows(21)], []
    monkeypatch.setattr(kit, "all_sum", lambda v: sums.append(v.clone()) or v)
    alone = stream(source)
    want = [[e.id for e in alone.next()] for _ in range(9)]
    parts, shares = [], []
    for r in (0, 1):
        share = iter(sums)

        def all_sum(v):
            shares.append((v.clone(), total := next(share)))
            return total
        monkeypatch.setattr(kit, "rank", lambda: r)
        monkeypatch.setattr(kit, "world", lambda: 2)
        monkeypatch.setattr(kit, "all_sum", all_sum)
        mine = stream(source)
        parts.append([[e.id for e in mine.next()] for _ in range(9)])
    half = len(shares) // 2                         # both ranks' lengths add up to the whole
    assert all(torch.equal(a + b, total) for (a, total), (b, _) in zip(shares, shares[half:]))
    merged = [[x for pair in itertools.zip_longest(a, b) for x in pair if x]
              for a, b in zip(*parts)]
    assert merged == want and all(len(b) for b in parts[1])


def test_stream_cuts_over_long_rows_at_a_message_boundary(capsys):
    turns = [{"role": r, "content": c} for r, c in (
        ("user", "hi"), ("assistant", "yo"), ("user", "<image>" + "long " * 50),
        ("assistant", "never"))]
    encoder = tiny_agent().encoder
    long = {"id": "cut", "images": [picture()], "messages": turns}
    huge = {"id": "gone", "images": [], "messages": [{"role": "user", "content": "x " * 99}]}
    s = stream([long, huge])
    (got,) = s.next()
    want = encoder.encode({"id": "cut", "images": [], "messages": turns[:2]})
    assert torch.equal(got.ids, want.ids) and got.images == []
    assert "1 of 2 rows exceed" in capsys.readouterr().out
    batch_lengths = [sum(len(e) for e in b) for b in [stream([
        {**r, "images": []} for r in text_rows(30)]).next() for _ in range(3)]]
    assert max(batch_lengths) <= 150
    with pytest.raises(UserError, match="no rows"):
        stream([], ).next() if False else Stream(["/dev/null"], encoder, 100, 0).next()


def test_stream_holds_out_rows_that_it_never_trains_on():
    source = [{**r, "images": []} for r in text_rows(21)]
    s = stream(source, hold_out=3)
    assert [r["id"] for r in s.held_out] == ["t0", "t1"]        # at most a tenth of the corpus
    seen = {e.id for _ in range(30) for e in s.next()}
    assert seen == {f"t{i}" for i in range(2, 21)}


@pytest.mark.skipif(not (SHARED / "pretrain_example").exists(), reason="shared data absent")
def test_released_pretraining_rows_parse():
    encoder = tiny_agent().encoder
    for name, images in (("MM_pretrain.json", True), ("TextOnly_pretrain.json", False)):
        rows = [r for r, _ in kit.read_rows([SHARED / "pretrain_example" / name])]
        raw = json.loads((SHARED / "pretrain_example" / name).read_text())
        assert len(rows) == len(raw) > 10
        assert all(bool(r["images"]) == images for r in rows)
        if not images:
            for r in rows:
                e = encoder.encode(r)
                said = "".join(m["content"] for m in r["messages"] if m["role"] == "assistant")
                got = encoder.tokenizer.decode(e.ids[e.response]).replace("<|im_end|>", "")
                assert got.split() == said.split()
