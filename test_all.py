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
import train_rl
from model import (Agent, CausalStack, Encoder, GaussianMap, Projector, Stream, UserError,
                   WorldModel, action_statistics, choose, key_seed, keyed_gumbel, replay, rollout,
                   token_logprobs)

torch.set_num_threads(1)
HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("KIT_SHARED_DATA", HERE.parent / "shared" / "data"))
DOCUMENTS = ["You are a helpful assistant.", "What do you see? I see a red circle and a star.",
             "The bus in the image is white and red.\n\n\nOr green.\n\n\nYes."] * 4


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
    assert merged == want and any(parts[1])


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
        Stream(["/dev/null"], encoder, 100, 0).next()


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


# ==== model.py: modules =======================================================================


def config_3b():
    """The text shape of Qwen2.5-VL-3B."""
    return Qwen2_5_VLConfig(text_config=dict(
        vocab_size=151_936, hidden_size=2048, intermediate_size=11_008, num_hidden_layers=36,
        num_attention_heads=16, num_key_value_heads=2, rms_norm_eps=1e-6, rope_parameters={
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]})).text_config


def test_parameter_counts_at_the_3b_shape_are_the_papers():
    def millions(make):
        with torch.device("meta"):
            return round(sum(p.numel() for p in make().parameters()) / 1e6, 2)
    c = config_3b()
    assert millions(lambda: CausalStack(c, 4, 128)) == pytest.approx(308.6, abs=0.05)
    assert millions(lambda: CausalStack(c, 8, 128)) == pytest.approx(616.9, abs=0.05)
    assert millions(lambda: WorldModel(2048, c.intermediate_size)) == pytest.approx(225.4, abs=0.05)
    assert millions(lambda: Projector(2048)) == pytest.approx(16.8, abs=0.05)
    assert millions(lambda: nn.Embedding(128, 2048)) == 0.26


def test_world_model_by_hand():
    """Width 1: x + down * silu(gate . [x, c]) * (up . [x, c]), twice."""
    world = WorldModel(1, 1)
    for block, values in zip(world.blocks, ((1.0, 2.0, 3.0), (-1.0, 0.5, 2.0))):
        gate, up, down = values
        block["gate"].weight.data[:] = torch.tensor([[gate, 1.0]])
        block["up"].weight.data[:] = torch.tensor([[up, -1.0]])
        block["down"].weight.data[:] = down
    silu = lambda v: v / (1 + math.exp(-v))
    x, c = 0.7, 0.4
    x = x + 3 * silu(x + c) * (2 * x - c)
    x = x + 2 * silu(-x + c) * (0.5 * x - c)
    close(world(torch.tensor([0.7]), torch.tensor([0.4])), torch.tensor([x]))


def test_gaussian_map_by_hand_and_untrained_projector_is_the_identity():
    e = torch.randn(5, 6)
    m = GaussianMap(6)
    assert torch.equal(m.mu(e), e) and torch.equal(m.log_var(e), torch.zeros(5, 6))
    shake(m, 1.0)
    def mlp(net):
        return torch.tanh(e @ net[0].weight.T + net[0].bias) @ net[2].weight.T + net[2].bias
    close(m.mu(e), e + mlp(m.mlp))                  # fails if mu is not residual
    close(m.log_var(e), torch.tanh(mlp(m.mlp_log_var)))


def test_stack_is_causal_and_a_batch_row_does_not_see_padding():
    agent = tiny_agent()
    x = torch.randn(2, 7, 64)
    full = agent.policy(x, kit.text_positions(x))
    changed = x.clone()
    changed[:, 4:] = 0
    close(agent.policy(changed, kit.text_positions(x))[:, :4], full[:, :4])
    close(agent.policy(x[:1, :5], kit.text_positions(x[:1, :5])), full[:1, :5])
    assert not torch.allclose(full[:, :-1], agent.policy(x.flip(1), kit.text_positions(x))[:, :-1])


def test_idm_logits_see_the_next_state_and_no_further():
    agent, x = tiny_agent(), torch.randn(1, 6, 64)
    base = agent.idm_logits(x)
    assert base.shape == (1, 5, 16)
    changed = x.clone()
    changed[:, 3] = 0                               # code at t has seen states up to t + 1
    moved = (agent.idm_logits(changed) - base).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [False, False, True, True, True]   # fails without the shift


def chunks_seen(head):
    """Row counts of every call of a linear head."""
    seen = []
    head.register_forward_hook(lambda m, i, o: seen.append(len(i[0])))
    return seen


@pytest.mark.parametrize("masked", [False, True])
def test_token_logprobs_equal_brute_force_in_any_chunk(masked):
    torch.manual_seed(0)
    head, x, targets = nn.Linear(8, 11), torch.randn(7, 8, requires_grad=True), torch.arange(7)
    bias = torch.zeros(11)
    bias[9:] = -math.inf if masked else 0.0
    want = torch.log_softmax(head(x) + bias, -1)[range(7), targets]
    params = [x, *head.parameters()]
    for chunk in (1, 22, 33, 2 ** 24):
        seen = chunks_seen(head)
        got = token_logprobs(head, x, targets, bias if masked else None, chunk)
        assert max(seen) == max(1, min(7, chunk // 11))    # never more logits than `chunk`
        close(got, want)
        for a, b in zip(gradients((got * targets).sum(), params),
                        gradients((want * targets).sum(), params)):
            close(a, b)
    empty = token_logprobs(head, x[:0], targets[:0])
    assert empty.shape == (0,) and empty.sum().requires_grad    # a rank without labelled tokens


@pytest.mark.parametrize("masked", [False, True])
def test_action_statistics_equal_brute_force_in_any_chunk(masked):
    torch.manual_seed(0)
    new, ref = (type("P", (), {"head": nn.Linear(8, 11)}) for _ in range(2))
    x, ref_x = torch.randn(7, 8, requires_grad=True), torch.randn(7, 8)
    actions, bias, T = torch.arange(7), torch.zeros(11), 0.7
    if masked:
        bias[9:] = -math.inf
    support = slice(0, 9 if masked else 11)
    p = F.softmax(new.head(x)[:, support] / T, -1)
    q = F.softmax(ref.head(ref_x)[:, support] / T, -1).detach()
    want = [p[range(7), actions].log(), -(p * p.log()).sum(-1), q[range(7), actions].log(),
            (p * (p.log() - q.log())).sum(-1)]
    params = [x, *new.head.parameters()]
    for chunk in (1, 33, 2 ** 24):
        got = action_statistics(new, x, actions, T, bias if masked else None, ref, ref_x, chunk)
        for a, b in zip(got, want, strict=True):
            close(a, b)
        for k in (0, 1, 3):                         # the reference carries no gradient
            for a, b in zip(gradients(got[k].sum(), params), gradients(want[k].sum(), params)):
                close(a, b)
        assert not got[2].requires_grad
    alone = action_statistics(new, x, actions, T, bias if masked else None)
    close(alone[0], want[0])
    assert alone[2:] == (None, None)


def test_keyed_gumbel_is_the_same_in_every_batch_split():
    ids, lengths = ["a", "b", "c"], [5, 9, 7]
    noise = keyed_gumbel(ids, lengths, 4, 0, "idm", 3)
    for b in range(3):
        alone = keyed_gumbel(ids[b:b + 1], lengths[b:b + 1], 4, 0, "idm", 3)
        assert torch.equal(noise[b, :lengths[b]], alone[0])
    for other in ((1, "idm", 3), (0, "idm", 4)):    # fails if step or seed is left out of the key
        assert not torch.equal(keyed_gumbel(ids, lengths, 4, *other), noise)
    assert not torch.equal(noise[0, :5], noise[1, :5])
    many = keyed_gumbel(["x"], [20_000], 4, 0)
    assert many.mean() == pytest.approx(0.5772, abs=0.02)       # Euler's constant, pi^2 / 6
    assert many.var() == pytest.approx(math.pi ** 2 / 6, abs=0.04)


def test_choose_draws_each_action_with_its_probability():
    logits, T = torch.tensor([0.3, -math.inf, 1.0, -2.0, 0.0, -math.inf]), 0.5
    p, n = F.softmax(logits / T, -1), 20_000
    actions, logps = choose(logits.expand(n, -1), (torch.arange(n) + 0.5) / n, T)
    close(torch.bincount(actions, minlength=6) / n, p, 1e-4)    # fails without the temperature
    close(logps, p.log()[actions])
    edges, _ = choose(torch.tensor([-math.inf, 0.0, 0.0, -math.inf]).expand(2, -1),
                      torch.tensor([0.0, 1 - 2 ** -24]), 1.0)
    assert edges.tolist() == [1, 2]                 # never outside the support
    best, logp = choose(logits[None], torch.tensor([0.99]), 0.0)
    assert best.item() == 2
    close(logp, F.log_softmax(logits, -1)[2:3])


def test_kv_cache_equals_concatenation():
    cache, parts = kit.KVCache(5), [torch.randn(2, 3, n, 4) for n in (3, 1, 1)]
    for i, part in enumerate(parts):
        keys, values = cache.update(part, -part, layer=1)
        assert torch.equal(keys, torch.cat(parts[:i + 1], 2)) and torch.equal(values, -keys)
    wide = cache.expand(2, 1)
    wide.keep(torch.tensor([1, 2]))                 # rows are a a b b: answers 2 of a, 1 of b
    keys, _ = wide.update(parts[1], parts[1], layer=1)
    assert torch.equal(keys, torch.cat([*parts, parts[1]], 2))


# ==== model.py: agent and rollouts ============================================================


def reference_states(agent, r):
    """States of one row's text tokens, by transformers' own forward pass and positions."""
    e = agent.encoder.encode(r)
    model = agent.backbone.model
    positions, _ = model.get_rope_index(
        e.ids[None], mm_token_type_ids=(e.ids == agent.encoder.image_token).int()[None],
        image_grid_thw=e.grids if len(e.grids) else None)
    pixels = agent.encoder.pixels(e)
    out = model(input_ids=e.ids[None], position_ids=positions, pixel_values=pixels,
                image_grid_thw=None if pixels is None else e.grids).last_hidden_state[0]
    return out[e.text], e


def test_states_equal_transformers_and_project_text_only_rows():
    agent = tiny_agent()
    batch = agent.encoder.collate(examples())
    states = agent.states(batch)
    for b, r in enumerate(ROWS):
        want, _ = reference_states(agent, r)
        n = len(want)
        close(agent.embeddings(batch)[b, :n], want)
        close(states[b, :n], want if r["images"] else agent.projector.P.mu(want))
    assert (states[1] - agent.embeddings(batch)[1]).abs().max() > 0.1   # mu_P does something
    assert not states.requires_grad
    off = copy.copy(agent)
    off.structure = {**agent.structure, "no_projector": True}
    assert torch.equal(off.states(batch), agent.embeddings(batch))


def test_text_only_pass_aligns_token_by_token():
    """Dropping the image from a paired row leaves its text tokens, at plain positions."""
    agent = tiny_agent()
    batch = agent.encoder.collate(examples())
    e_t, e = agent.text_embeddings(batch), agent.embeddings(batch)
    for b, ex in enumerate(examples()):
        ids = ex.ids[ex.text]
        want = agent.backbone.model(input_ids=ids[None], position_ids=torch.arange(
            len(ids)).expand(3, 1, -1)).last_hidden_state[0]
        close(e_t[b, :len(ids)], want)
        before = ~batch.seen_image[b] & batch.real[b]
        close(e[b][before], e_t[b][before])         # equal up to the first image, then not
        if len(ex.grids):
            after = batch.seen_image[b]
            assert after.any() and (e[b] - e_t[b])[after].abs().amax(-1).min() > 1e-3


def test_padding_and_batch_mates_do_not_change_a_row():
    agent = tiny_agent()
    together = agent.states(agent.encoder.collate(examples()))
    for b, ex in enumerate(examples()):
        alone = agent.states(agent.encoder.collate([ex]))[0]
        close(together[b, :len(alone)], alone)


def test_an_untrained_world_model_is_the_base_model():
    agent = copy.copy(tiny_agent())
    agent._modules = {**agent._modules, "world": WorldModel(64, 160)}   # tiny's MLP width
    batch = agent.encoder.collate(examples()[:1])
    s = agent.states(batch)[0]
    base = agent.backbone(input_ids=batch.ids, position_ids=batch.positions,
                          pixel_values=batch.pixels, image_grid_thw=batch.grids).logits[0]
    got = agent.next_token_logits(s, torch.arange(len(s)) % 16)
    allowed = agent.token_bias == 0
    assert torch.equal(got[:, allowed], base[batch.text_index[0]][:, allowed]) or \
        (got[:, allowed] - base[batch.text_index[0]][:, allowed]).abs().max() < 1e-5
    assert (got[:, ~allowed] == -math.inf).all()
    names = agent.encoder.tokenizer.convert_ids_to_tokens((~allowed).nonzero()[:, 0].tolist())
    assert set(names) == set(kit.VISION_TOKENS)     # never sampled, never scored


def brute_force_logps(agent, r, temperature):
    """Log-prob of every action and the inputs read, from one full pass per answer, (N, T) each."""
    logps, best = torch.zeros_like(r.logps), torch.zeros_like(r.tokens)
    for n in range(len(r.tokens)):
        length, source = int(r.mask[n].sum()), ROWS[n // r.group]
        full = agent.encoder.encode(source, prompt=True)
        L, said = len(full), r.tokens[n, :length]
        ids = torch.cat([full.ids, said])
        positions, _ = agent.backbone.model.get_rope_index(
            ids[None], mm_token_type_ids=(ids == agent.encoder.image_token).int()[None],
            image_grid_thw=full.grids if len(full.grids) else None)
        pixels = agent.encoder.pixels(full)
        kw = dict(input_ids=ids[None], position_ids=positions, pixel_values=pixels,
                  image_grid_thw=None if pixels is None else full.grids)
        if agent.space == "token":                  # the trunk's layers, then the policy's
            hidden = agent.backbone.model(**kw, output_hidden_states=True).hidden_states
            x = hidden[len(agent.layers)]
            h = agent.policy.hidden(x, positions)[0, L - 1:L - 1 + length]
            logits = (agent.policy.head(h) + agent.token_bias) / temperature
            best[n, :length] = said
        else:
            e = agent.backbone.model(**kw).last_hidden_state
            e = e[:, torch.cat([full.text, torch.ones(length, dtype=torch.bool)])]
            s = e if source["images"] else agent.projector.P.mu(e)
            M = int(full.text.sum())
            logits = agent.policy(s, kit.text_positions(s))[0, M - 1:M - 1 + length] / temperature
            world = agent.world(s[0, M - 1:M - 1 + length], agent.codebook(r.actions[n, :length]))
            best[n, :length] = (agent.backbone.lm_head(world) + agent.token_bias).argmax(-1)
            close(r.inputs[n, :length], s[0, M - 1:M - 1 + length])     # training's own states
        logps[n, :length] = F.log_softmax(logits, -1)[range(length), r.actions[n, :length]]
    return logps, best


def roll(space, temperature=0.7, stop=0, **kw):
    """A rollout of ROWS, 3 answers each; `stop` makes that many tokens end the turn."""
    agent = copy.copy(tiny_agent(space))
    if stop:
        agent.encoder = copy.copy(agent.encoder)
        agent.encoder.stop_ids = torch.arange(1, 400, 400 // stop)
    return agent, rollout(agent, prompts(), 3, 10, temperature, [5, 6, 7], **kw)


@pytest.mark.parametrize("space", ["latent", "token"])
@pytest.mark.parametrize("stop", [0, 60])
def test_rollout_equals_a_full_pass_and_its_replay(space, stop):
    """Prompts of different lengths, with one, two and no images, in one batch."""
    agent, r = roll(space, stop=stop)
    want, best = brute_force_logps(agent, r, 0.7)
    close(r.logps[r.mask], want[r.mask], 1e-4)      # fails if a position or a mask is off by one
    assert torch.equal(r.tokens[r.mask], best[r.mask])
    bias = agent.token_bias if space == "token" else None
    h = replay(agent.policy, r)
    logps = action_statistics(agent.policy, h[r.mask], r.actions[r.mask], 0.7, bias)[0]
    close(logps, r.logps[r.mask], 1e-4)
    assert len(set(r.texts)) > 5                    # the draws differ between answers
    ends = torch.isin(r.tokens, agent.encoder.stop_ids)
    for n in range(9):                              # up to and including the first end of turn
        first = ends[n].nonzero()[0, 0].item() if ends[n].any() else r.tokens.shape[1] - 1
        assert r.mask[n].tolist() == [t <= first for t in range(r.tokens.shape[1])]
    assert r.finished.any() == (stop > 0) and not (stop and r.mask.all())
    part, index = r.select([2, 0]), [6, 7, 8, 0, 1, 2]
    again = action_statistics(agent.policy, replay(agent.policy, part)[part.mask],
                              part.actions[part.mask], 0.7, bias)[0]
    close(again, r.logps[index][r.mask[index]], 1e-4)
    assert part.texts == [r.texts[i] for i in index]


@pytest.mark.parametrize("space", ["latent", "token"])
def test_shared_prefix_rollouts_equal_separate_ones(space):
    agent, r = roll(space, stop=40)
    for i, (prompt, seed) in enumerate(zip(prompts(), (5, 6, 7))):
        one = rollout(agent, [prompt], 3, 10, 0.7, [seed], check_every=1)
        rows, T = slice(3 * i, 3 * i + 3), one.tokens.shape[1]
        assert one.texts == r.texts[rows] and torch.equal(one.mask, r.mask[rows, :T])
        close(one.logps[one.mask], r.logps[rows][r.mask[rows]], 1e-4)


def test_greedy_rollout_of_an_untrained_agent_is_the_base_models_generate():
    agent = copy.copy(tiny_agent())
    agent._modules = {**agent._modules, "world": WorldModel(64, 160)}
    for r in (ROWS[0], ROWS[2]):
        e = agent.encoder.encode(r, prompt=True)
        out = rollout(agent, [e], 1, 12, 0.0)
        theirs = agent.backbone.generate(
            input_ids=e.ids[None], attention_mask=torch.ones(1, len(e), dtype=torch.long),
            pixel_values=agent.encoder.pixels(e), image_grid_thw=e.grids,
            mm_token_type_ids=(e.ids == agent.encoder.image_token).int()[None],
            max_new_tokens=12, do_sample=False, suppress_tokens=agent.encoder.vision_ids.tolist())
        n = int(out.mask.sum())
        assert theirs[0, len(e):len(e) + n].tolist() == out.tokens[0, :n].tolist()
    assert isinstance(agent.chat("Hi", picture(), max_new_tokens=3), str)


def test_replay_gradients_equal_separate_full_passes():
    agent, r = roll("latent", stop=40)
    policy = copy.deepcopy(agent.policy).requires_grad_(True)
    params = [p for name, p in policy.named_parameters() if "rotary" not in name]
    weights = torch.randn(r.logps.shape) * r.mask
    h = replay(policy, r)
    logps = torch.zeros_like(r.logps).masked_scatter(
        r.mask, action_statistics(policy, h[r.mask], r.actions[r.mask])[0])
    want = 0
    for n in range(9):
        p, k = n // 3, int(r.mask[n].sum())
        x = torch.cat([r.prompt[p][r.prompt_mask[p]], r.inputs[n, :k]])[None]
        logits = policy(x, kit.text_positions(x))[0, -k:]
        picked = F.log_softmax(logits, -1)[range(k), r.actions[n, :k]]
        want = want + (picked * weights[n, :k]).sum()
    for a, b in zip(gradients((logps * weights).sum(), params), gradients(want, params)):
        close(a, b, 2e-4)


# ==== eval.py =================================================================================


def test_parse_reply():
    dims = ("Fluency", "Tone")
    good = "Fluency: fine. [Scores]: (8, 9)\n\n- **Tone**: ok [Scores]: (7.5, 10)."
    assert tasks.parse_reply(good, dims) == {"Fluency": (8, 9), "Tone": (7.5, 10)}
    quoted = 'Fluency: it says "[Scores]: (10, 1)". [Scores]: (2, 9)\nTone: x [Scores]: (3, 9)'
    assert tasks.parse_reply(quoted, dims)["Fluency"] == (2, 9)     # the last pair of its line
    chatter = "Here are my scores.\n" + good + "\nThank you."
    assert tasks.parse_reply(chatter, dims) == tasks.parse_reply(good, dims)
    for bad in ("", "Fluency: [Scores]: (8, 9)", good + "\nTone: again [Scores]: (10, 10)",
                good.replace("8", "11"), good.replace("8", "0"), good.replace("8", "-8"),
                good.replace("(8, 9)", "(8; 9)"), good.replace("(8, 9)", "8, 9"),
                good.replace("8", "ten"), good.replace("Tone", "Style"),
                good + "\nOverall: [Scores]: (9, 9)", good.replace("\n\n", " "),
                good.replace("(8, 9)", "(8, 9) or (9, 9)")):
        assert tasks.parse_reply(bad, dims) is None, bad


def scored(*pairs):
    return {f"d{i}": pair for i, pair in enumerate(pairs)}


def test_metrics_by_hand():
    scores = [scored((8, 10), (5, 5)), None, scored((4, 8), (6, 10))]
    table = tasks.score_table(scores, ("d0", "d1"))
    close([table["d0"], table["d1"], table["overall"]], [0.65, 0.8, 0.725])
    assert (table["judged"], table["failed"]) == (2, 1)
    close(tasks.win_rate([scored((8, 9)), scored((9, 8)), scored((5, 5)), None]), 0.5)
    close(tasks.distinct_n(["a b a b", "a b"], 2), 2 / 4)           # ab ba ab | ab
    close(tasks.duplicates(["x", "x", "y", "x"]), 0.5)
    usage = tasks.code_usage(torch.tensor([2.0, 2.0, 4.0, 0.0]))
    assert usage["codes_used"] == 3
    close(usage["code_perplexity"], math.exp(0.5 * math.log(4) + 0.5 * math.log(2)))
    gain, low, high = tasks.paired_bootstrap([1, 2, None, 4], [2, 4, 9, math.nan], 0, 2000)
    assert gain == 1.5 and low == 1.0 and high == 2.0
    a, b = tuple("the cat sat on the mat"), tuple("a cat on mats the")
    lcs = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]           # the textbook table
    for i, j in itertools.product(range(len(a)), range(len(b))):
        lcs[i + 1][j + 1] = lcs[i][j] + 1 if a[i] == b[j] else max(lcs[i][j + 1], lcs[i + 1][j])
    assert tasks.common_length(a, b) == lcs[-1][-1]


def test_reward_is_the_ratio_of_sums_and_none_when_judging_failed():
    task = tasks.Task("t", ("d0", "d1"), (0, 1), {}, None, 9)
    close(task.reward("d0: x [Scores]: (3, 10)\nd1: x [Scores]: (6, 8)"), 0.5)
    assert task.reward("nonsense") is None and task.reward(None) is None


def predicted(*replies, answers=None):
    return {"id": "p", "split": "id", "mode": "sampled", "answers": answers or ["x"] * len(replies),
            "replies": list(replies)}


def test_summaries_leave_out_failures_and_count_zeros():
    task = tasks.Task("t", ("d",), (0, 1), {}, None, 9, lowest=0.0)
    half, zero = "d: x [Scores]: (5, 10)", "d: x [Scores]: (0, 10)"
    figures = tasks.summarise(task, [predicted(None, half), predicted(zero, zero)])
    close(figures["reward"], 0.25)
    close(figures["best_of_2"], 0.25)               # fails if 0 or a failure is taken for NaN
    assert figures["failed"] == 1
    for order in ((half, None), (None, half), (zero, half), (half, zero)):
        close(tasks.summarise(task, [predicted(*order)])["best_of_2"], 0.5)
    gain = tasks.gain_table(task, [predicted(zero, half)], [predicted(half, half)])["id sampled"]
    close([gain[k] for k in ("before", "after", "gain")], [0.25, 0.5, 0.25])


def test_comparison_aggregates_seeds():
    table = tasks.compare({f"runs/tiny/rl-x-s{s}": {"id greedy": {"reward": r}}
                           for s, r in ((0, 0.5), (1, 0.7))} | {
        "runs/tiny/rl-x-s0-b": {"id greedy": {"reward": 0.1}}})
    assert table == {"rl-x": {"seeds": 2, "id greedy": "0.600 (0.141)"},
                     "rl-x-b": {"seeds": 1, "id greedy": "0.100"}}


@functools.cache
def mini():
    return tasks.mini_task(0)


def test_mini_world_is_one_fixed_draw_and_its_splits_are_disjoint():
    again = tasks.mini_task(0)
    for split, rows in mini().splits.items():
        assert len(rows) == tasks.SIZES[split]
        for a, b in zip(rows[:20], again.splits[split]):
            assert a["images"][0].tobytes() == b["images"][0].tobytes()
            assert {**a, "images": 0} == {**b, "images": 0}
    scenes = {s: {repr(r["scene"]) for r in rows} for s, rows in mini().splits.items()}
    for a, b in itertools.combinations(("valid", "id", "ood"), 2):
        assert not scenes[a] & scenes[b]
    held = {p.name for p in tasks.PERSONAS[-tasks.HELD_OUT:]}
    for split in ("sft", "rl", "id"):               # "valid" asks all personas
        assert not held & {r["persona"] for r in mini().splits[split]}
        assert split == "id" or not scenes[split] & (scenes["valid"] | scenes["id"] | scenes["ood"])
    assert {r["persona"] for r in mini().splits["ood"]} == held
    for kind, personas in (("paired", 8), ("text", 12), ("base", 12)):
        rows = tasks.mini_corpus(kind, 240, 1)
        assert len({r["persona"] for r in rows}) == personas
        assert not {repr(r.get("scene")) for r in rows} & (scenes["id"] | scenes["ood"])
        assert all(bool(r["images"]) == (kind != "text") for r in rows)


def asked(kind, persona="Sir Rowan"):
    return next(r for r in mini().splits["id"] if r["question"][0] == kind
                and r["persona"] == persona)


def said(r, persona=None, scene=None, question=None):
    """A perfect answer, but for the wrong persona, scene or question."""
    who = next(p for p in [*tasks.PERSONAS, tasks.NEUTRAL] if p.name == (persona or r["persona"]))
    if persona == "":
        who = tasks.NEUTRAL
    return tasks.voiced(tasks.facts(question or r["question"], scene or r["scene"]), who).text()


def marks(r, answer):
    task = mini()
    reply = task.judge([r], [answer])[0]
    return {d: s[0] for d, s in task.scores(reply).items()}, task.reward(reply)


@pytest.mark.parametrize("kind", list(tasks.QUESTIONS))
def test_rule_judge_gives_references_full_marks(kind):
    for r in [r for r in mini().splits["ood"] if r["question"][0] == kind][:5]:
        assert marks(r, r["reference"]) == ({d: 10.0 for d in tasks.DIMENSIONS}, 1.0)
        assert r["reference"] == said(r)


ADVERSARIAL = {
    "empty": lambda r, ref: "", "spaces": lambda r, ref: " \n ",
    "repeated": lambda r, ref: " ".join([ref] * 3),
    "shuffled": lambda r, ref: " ".join(sorted(ref.split())),
    "stuffed": lambda r, ref: " ".join([w for p in tasks.PERSONAS for w in p[2:]] + tasks.OBJECTS
                                       + list(tasks.CELLS) + list(tasks.NUMBERS)),
    "appended": lambda r, ref: ref + " " + " ".join(tasks.OBJECTS),
    "greetings": lambda r, ref: "Hark! By my sword! " * 9,
    "scores": lambda r, ref: "\n".join(f"{d}: [Scores]: (10, 10)" for d in tasks.DIMENSIONS),
    "caption": lambda r, ref: tasks.caption(r["scene"])}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_rule_judge_floors_answers_that_are_none(name):
    r = asked("all")
    assert marks(r, ADVERSARIAL[name](r, r["reference"]))[1] <= 0.15


def test_rule_judge_fails_the_wrong_persona_scene_and_question():
    r, (instruct, fluent, coherent, picture_, right, person, know, tone) = \
        asked("all"), tasks.DIMENSIONS
    got, reward = marks(r, said(r, "Zed"))
    assert max(got[person], got[know], got[tone]) <= 2 and got[fluent] == 10 and reward < 0.65
    got, reward = marks(r, said(r, ""))                         # nobody's words
    assert max(got[person], got[know], got[tone]) <= 2 and reward < 0.65
    got, reward = marks(r, said(r, scene=[None, "yellow star", "purple cross", None]))
    assert max(got[picture_], got[right], got[know]) <= 3 and reward < 0.65
    things = [t for t in r["scene"] if t]
    place = tasks.CELLS[r["scene"].index(things[0])]
    got, reward = marks(r, said(r, question=("cell", place)))   # true, but not what was asked
    assert max(got[instruct], got[right], got[know]) <= 2 and got[picture_] == 10
    half = r["reference"].split()
    assert marks(r, " ".join(half[:len(half) // 2]))[1] < 0.6


def test_rule_judge_ranks_partial_answers():
    r = asked("all")
    who = next(p for p in tasks.PERSONAS if p.name == r["persona"])
    answers = []
    for wrong in range(3):                          # more and more neutral slots
        answer = tasks.voiced(tasks.facts(r["question"], r["scene"]), who)
        for slot in tasks.SLOTS[:wrong]:
            setattr(answer, slot, getattr(tasks.NEUTRAL, slot))
        answers.append(marks(r, answer.text())[1])
    assert answers[0] == 1.0 and answers[0] > answers[1] > answers[2] > 0.5


def test_file_task_splits_and_overlap(tmp_path):
    rows = text_rows(40)
    rows[0]["split"] = "ood"
    task = tasks.load_task(write(tmp_path / "mine.jsonl", rows))
    assert {s: len(r) for s, r in task.splits.items()} == {
        "sft": 19, "rl": 14, "valid": 2, "id": 4, "ood": 1}
    ids = [r["id"] for rows in task.splits.values() for r in rows]
    assert sorted(ids) == sorted(r["id"] for r in rows)
    r = {"reference": "The cat sat."}
    for answer, f1 in (("the CAT sat", 1.0), ("", 0.0), ("sat cat", 0.4), ("the cat sat the", 6 / 7)):
        close(task.reward(task.judge([r], [answer])[0]), f1, 1e-4)
    with pytest.raises(UserError, match="neither a known task"):
        tasks.load_task("nothing")
    for bad, match in (({**rows[1], "split": "test"}, "split 'test'"),
                       ({"messages": [{"role": "user", "content": "x"}]}, "last message")):
        with pytest.raises(UserError, match=f"row 2.*{match}"):
            tasks.load_task(write(tmp_path / "bad.jsonl", [rows[2], bad]))


@pytest.mark.skipif(not (SHARED / "mmrole").exists(), reason="shared data absent")
@pytest.mark.parametrize("name", ["comment", "human-role", "inter-role"])
def test_score_table_reproduces_mmroles_published_results(name):
    stem = SHARED / "mmrole" / f"in-test_{name}.gpt-4-turbo"
    want = next(csv.DictReader(open(f"{stem}.results.csv")))
    reviews = json.loads(Path(f"{stem}.reviews.json").read_text())
    scores = [{d: tuple(v["score"]) for d, v in r["rm_review"].items()} for r in reviews]
    table = tasks.score_table(scores, tasks.DIMENSIONS)
    assert table["judged"] == int(want["count"])
    for d in tasks.DIMENSIONS:                      # fails for a ratio of means
        assert table[d] == pytest.approx(float(want[d]), abs=1e-9)
    for r in reviews[:20]:                          # GPT-4's own replies parse to their scores
        reply = "\n".join(f"{d}: {' '.join(v['review'].split())}"
                          for d, v in r["rm_review"].items())
        got = tasks.parse_reply(reply, tasks.DIMENSIONS)
        assert got is None or got == {d: tuple(v["score"]) for d, v in r["rm_review"].items()}


# ==== train_projector.py ======================================================================


def test_gaussian_nll_by_hand():
    """((1 - 3)^2 e^-0.5 + 0.5 + (2 - 2)^2 e^1 - 1) / 2."""
    mu, log_var = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, -1.0]], requires_grad=True)
    target = torch.tensor([[3.0, 2.0]], requires_grad=True)
    nll = stage1.gaussian_nll(mu, log_var, target)
    close(nll, torch.tensor([(4 * math.exp(-0.5) + 0.5 - 1.0) / 2]))
    nll.sum().backward()
    assert target.grad is None                      # fails if the target is not detached


def test_projector_losses_by_brute_force():
    agent, batch = tiny_agent(), tiny_agent().encoder.collate(examples())
    P, Q = agent.projector.P, agent.projector.P_inv
    e, e_t = agent.embeddings(batch), agent.text_embeddings(batch)
    paired = cycle = 0.0
    for b, t in itertools.product(range(3), range(batch.tokens.shape[1])):
        x, y = e_t[b, t], e[b, t]
        if batch.seen_image[b, t]:
            for m, a, z in ((P, x, y), (Q, y, x)):
                paired += ((m.mu(a) - z) ** 2 / m.log_var(a).exp() + m.log_var(a)).mean()
        elif t < batch.text_lengths[b] and not batch.has_image[b]:
            a = P.mu(x)
            cycle += ((Q.mu(a) - x) ** 2 / Q.log_var(a).exp() + Q.log_var(a)).mean()
    close(stage1.projector_losses(agent, batch, e, True), torch.stack([paired, cycle]), 1e-4)
    close(stage1.projector_losses(agent, batch, e, False)[1], 0.0)      # --no-cycle
    counts = stage1.projector_counts([batch])
    assert counts.tolist() == [batch.seen_image.sum(), batch.text_lengths[1]]
    assert stage1.projector_counts([]).tolist() == [1, 1]               # a rank without rows


def trainable(*names):
    agent = copy.deepcopy(tiny_agent())
    agent.train_only(*names)
    return agent


def test_a_batch_without_any_term_has_a_loss_of_zero_with_a_backward():
    """Text-only rows among the paired ones in step 1; rows without responses in SFT."""
    agent = trainable("projector", "policy", "world")
    batch = agent.encoder.collate(examples()[1:2])
    losses = stage1.projector_losses(agent, batch, agent.embeddings(batch).detach(), False)
    losses.sum().backward()                         # fails if it has no graph
    assert losses.tolist() == [0, 0]
    batch = agent.encoder.collate(prompts()[1:2], responses_only=True)
    for kind in ("latent", "token"):
        code_loss, token_loss, hits = train_bc.batch_losses(
            agent if kind == "latent" else copy.deepcopy(agent).make_token_policy(), batch, kind)
        (code_loss + token_loss).sum().backward()
        assert len(code_loss) == len(token_loss) == len(hits) == 0


# ==== train_idm.py ============================================================================


def test_straight_through_is_one_hot_with_softmaxs_gradient():
    torch.manual_seed(0)
    logits, noise, w = torch.randn(3, 3, 5, dtype=torch.double)
    hot = train_idm.straight_through(logits.requires_grad_(), noise, 2.0)
    close(hot, F.one_hot((logits + noise).argmax(-1), 5), 1e-9)
    got = gradients((hot * w).sum(), [logits])[0]
    for k, j in itertools.product(range(3), range(5)):      # fails if tau is left out
        step = torch.zeros(3, 5)
        step[k, j] = 1e-5
        up, down = (F.softmax((logits.detach() + s + noise) / 2.0, -1) for s in (step, -step))
        close(got[k, j], ((up - down) * w).sum() / 2e-5, 1e-6)


def test_negative_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    close(train_idm.negative_entropy(logits), [-math.log(2), 0.75 * math.log(0.75)
                                               + 0.25 * math.log(0.25)])


def idm_loss(agent, rows=ROWS, step=0):
    batch = agent.encoder.collate(examples(rows))
    noise = keyed_gumbel(batch.row_ids, batch.text_lengths.tolist(), 16, 0, "idm", step)
    return batch, noise, train_idm.inverse_losses(agent, batch, agent.states(batch), noise)


def test_inverse_losses_by_brute_force_and_any_batch_split():
    agent = tiny_agent()
    batch, noise, (ce, entropy, codes) = idm_loss(agent)
    states, k = agent.states(batch), 0
    for b, t in batch.targets.nonzero().tolist():
        logits = agent.idm(states[b:b + 1, :t + 2], torch.arange(t + 2)[None])[0, -1]
        code = (logits + noise[b, t]).argmax()      # has seen states up to t + 1, no further
        x = agent.backbone.lm_head(agent.world(states[b, t], agent.codebook.weight[code]))
        close(ce[k], F.cross_entropy(x, batch.tokens[b, t + 1]), 1e-4)
        close(entropy[k], (logits.softmax(-1) * logits.log_softmax(-1)).sum(), 1e-4)
        assert codes[k] == code
        k += 1
    assert k == len(ce)
    parts = [idm_loss(agent, [r])[2] for r in ROWS]
    close(torch.cat([p[0] for p in parts]), ce, 1e-4)
    close(train_idm.inverse_counts([batch]), [batch.targets[[0, 2]].sum(), batch.targets[1].sum()])


def test_inverse_loss_reaches_idm_codebook_and_merge_only():
    agent = trainable("idm", "codebook", "world", "projector")
    idm_loss(agent)[2][0].sum().backward()
    for name, p in agent.named_parameters():
        trained = name.split(".")[0] in ("idm", "codebook", "world")
        assert (p.grad is not None and bool(p.grad.any())) == trained, name


# ==== train_bc.py =============================================================================


def test_cloning_loss_by_hand_and_codes_are_noise_free():
    close(train_bc.cloning_loss(torch.tensor([[math.log(3), 0.0]] * 2), torch.tensor([0, 1])),
          [-math.log(0.75), -math.log(0.25)])
    agent = tiny_agent()
    batch = agent.encoder.collate(examples())
    states, (at, targets) = agent.states(batch), batch.labelled()
    codes = agent.idm_logits(states)[at].argmax(-1)
    code_loss, token_loss, hits = train_bc.batch_losses(agent, batch, "latent")
    logits = agent.policy(states, batch.text_positions)[:, :-1][at]     # at t, not t + 1
    close(code_loss, F.cross_entropy(logits, codes, reduction="none"))
    assert torch.equal(hits, logits.argmax(-1) == codes)
    x = agent.world(states[:, :-1][at], agent.codebook(codes))
    close(token_loss, F.cross_entropy(agent.backbone.lm_head(x), targets, reduction="none"), 1e-4)
    assert not train_bc.batch_losses(agent, batch, "bc")[1].any()


def test_the_untrained_token_policy_is_the_base_model():
    agent = copy.deepcopy(tiny_agent()).make_token_policy()
    batch = agent.encoder.collate(examples()[:1])
    logits = agent.backbone(input_ids=batch.ids, position_ids=batch.positions,
                            pixel_values=batch.pixels, image_grid_thw=batch.grids).logits[0]
    at, targets = batch.labelled()
    want = F.log_softmax(logits + agent.token_bias, -1)[batch.text_index[0, :-1][at[0]]]
    close(train_bc.batch_losses(agent, batch, "token")[1], -want[range(len(targets)), targets])
    agent.policy.head.weight.data += 1              # an untied copy: the backbone keeps its own
    assert not torch.equal(agent.policy.head.weight, agent.backbone.lm_head.weight)


# ==== train_rl.py =============================================================================

NAN = math.nan


def test_advantages_by_hand():
    r = torch.tensor([[0.0, 1.0, 0.5, NAN], [0.3, 0.3, 0.3, 0.3], [NAN, NAN, NAN, 0.7]])
    mean, std = train_rl.group_moments(r)           # unbiased: sqrt((.25 + .25 + 0) / 2)
    close(mean[:, 0], [0.5, 0.3, 0.7])
    close(std[:, 0], [0.5, 0.0, 0.0])               # fails with the population deviation
    close(train_rl.advantages(r, "none")[0], [-0.5, 0.5, 0.0, 0.0])
    close(train_rl.advantages(r, "group")[0], torch.tensor([-0.5, 0.5, 0, 0]) / 0.5001)
    for scale in ("none", "group", "beta"):
        A = train_rl.advantages(r, scale)
        assert A.isfinite().all() and A[1:].abs().max() < 1e-3 and A[0, 3] == 0


@pytest.mark.parametrize("G", [2, 3, 5, 6, 7, 8])
def test_equal_rewards_have_no_variance(G):
    """Dynamic sampling keeps groups with std > 1e-8: rounding of the mean must not count."""
    for value in (0.1, 0.55, 0.7, 0.9375, 1 / 3, 0.606):
        assert train_rl.group_moments(torch.full((1, G), value))[1].item() <= 1e-8


def test_beta_weights_by_hand_and_their_guards():
    p = torch.tensor([0.2, 0.5, 0.9])
    m, v = p.mean().item(), p.var().item()          # method of moments, then 1 + a/3, 1 + b/3
    c = m * (1 - m) / v - 1
    a, b = max(1, 1 + c * m / 3), max(1, 1 + c * (1 - m) / 3)
    pdf = torch.distributions.Beta(a, b).log_prob(p).exp()
    close(train_rl.beta_weights(p[:, None], p)[:, 0], 1 / pdf, 1e-4)
    r = torch.tensor([[0.1, 0.3], [0.4, 0.6], [0.8, 1.0]])          # group means 0.2, 0.5, 0.9
    close(train_rl.advantages(r, "beta"), (r - p[:, None]) / pdf[:, None], 1e-4)
    close(train_rl.advantages(r * 2 + 1, "beta", (1.0, 3.0)), (r - p[:, None]) / pdf[:, None], 1e-4)
    for flat in ([0.0, 0.0], [1.0, 1.0], [0.3, 0.3], [0.4]):        # no Beta fits: weight 1
        w = train_rl.beta_weights(torch.tensor(flat)[:, None], torch.tensor(flat))
        assert torch.equal(w, torch.ones_like(w))
    edge = torch.tensor([0.0, 0.5, 1.0, 0.4])
    w = train_rl.beta_weights(edge[:, None], edge)[:, 0]
    assert w.isfinite().all() and w.max() <= 1e6
    assert train_rl.advantages(torch.zeros(2, 3), "beta", all_p=edge).abs().max() == 0


def test_overlong_punishment_by_hand():
    got = train_rl.overlong_punishment(torch.tensor([0, 80, 85, 90, 100, 120]), 100)
    close(got, [0, 0, -0.25, -0.5, -1, -1])


def test_surrogate_clips_only_where_it_lowers_the_objective():
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])
    A = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    new = ratio.log().requires_grad_()
    loss = train_rl.surrogate(new, torch.zeros(5), A, 0.2, 0.28)
    close(loss, [-1.28, 1.5, -0.5, 0.8, -2.2])
    close(gradients(loss.sum(), [new])[0], [0, 1.5, -0.5, 0, -2.2])     # clipped: no gradient


def test_k3_by_hand_and_agrees_with_the_exact_kl_on_average():
    close(train_rl.k3(torch.tensor([0.0, 0.3]), torch.tensor([0.5, 0.3])),
          [math.exp(0.5) - 1.5, 0.0])
    p, q = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    close((p.exp() * train_rl.k3(p, q)).sum(), (p.exp() * (p - q)).sum())


def test_token_weights_by_hand():
    """Two answers of 2 and 3 loss tokens of 2 sequences and 5 tokens, at most 10 each."""
    weights = lambda name: train_rl.token_weights(name, torch.tensor([2, 3]), 2, 5, 10).tolist()
    close(weights("sequence"), [1 / 4, 1 / 6])
    close(weights("length"), [1 / 20, 1 / 20])
    close(weights("tokens"), [1 / 5, 1 / 5])
    close(weights("sum"), [1 / 2, 1 / 2])
    assert math.isfinite(train_rl.token_weights("sequence", torch.tensor([0]), 1, 1, 1).item())


def test_the_table_of_algorithms_and_its_overrides():
    def row_of(*flags):
        return tuple(vars(train_rl.resolve_algorithm(parsed(train_rl, *flags))).values())
    assert row_of("--algo", "grpo") == ("group", 0.2, 0.2, "sequence", 0.01, False, False)
    assert row_of("--algo", "dr_grpo") == ("none", 0.2, 0.2, "length", 0.0, False, False)
    assert row_of("--algo", "dapo") == ("group", 0.2, 0.28, "tokens", 0.0, True, True)
    assert row_of("--algo", "bnpo") == ("beta", 0.2, 0.28, "sum", 0.0, False, False)
    assert row_of("--algo", "dapo", "--dynamic-sampling", "off", "--beta", "0.1",
                  "--scale", "none") == ("none", 0.2, 0.28, "tokens", 0.1, False, True)
    for bad in (["--group-size", "1"], ["--temperature", "0"], ["--prompts", "0"]):
        with pytest.raises(UserError):
            row_of(*bad)


def test_prompts_run_through_every_row_once_an_epoch():
    rows = [{"id": i} for i in range(5)]
    p = train_rl.Prompts(rows, 3)
    ids = [r["id"] for n in (2, 3, 4, 1) for r in p.next(n)]
    assert sorted(ids[:5]) == sorted(ids[5:]) == list(range(5)) and ids[:5] != ids[5:]
    again = train_rl.Prompts(rows, 3)
    again.used = 4                                  # the cursor of a checkpoint
    assert [r["id"] for r in again.next(6)] == ids[4:]


def update_gradient(monkeypatch, r, rewards, algo, tokens_at_once=32768, drop=()):
    """Policy gradients that `update` would step on, and its figures; kept prompts 0, 1, 2."""
    agent = copy.copy(tiny_agent())
    agent._modules = {**agent._modules, "policy": copy.deepcopy(agent.policy)}
    agent.train_only("policy")
    reference = shake(copy.deepcopy(tiny_agent().policy), 0.05, 9)
    got = {}

    def grab(run, optimizers, ids, **kw):
        got.update({n: p.grad.clone() for n, p in agent.policy.named_parameters()})
        return 0.0
    monkeypatch.setattr(train_rl, "optimizer_step", grab)
    args = parsed(train_rl, "--algo", algo, "--group-size", "3", "--temperature", "0.7",
                  "--max-new-tokens", "10")
    algorithm = train_rl.resolve_algorithm(args)
    kept = [p for p in range(3) if p not in drop]
    judged = train_rl.Judged(r, rewards, rewards, [0, 1, 2], ROWS, kept)
    task = tasks.Task("t", ("d",), (0.0, 1.0), {}, None, 10)
    figures = train_rl.update(agent, reference if algorithm.beta else None, None, None, [judged],
                              kept, args, algorithm, task, tokens_at_once)
    return got, figures, reference, algorithm


@pytest.mark.parametrize("algo", ["grpo", "dr_grpo", "dapo", "bnpo"])
def test_update_gradient_equals_the_papers_formula(monkeypatch, algo):
    """One failed judgement, one dropped prompt in DAPO; each formula written out in full."""
    _, r = roll("latent", stop=40)
    rewards = torch.tensor([[0.1, 0.9, 0.4], [0.5, NAN, 0.7], [0.2, 0.2, 0.2]])
    drop = (2,) if algo == "dapo" else ()
    got, figures, reference, algorithm = update_gradient(monkeypatch, r, rewards, algo, drop=drop)
    for n, g in update_gradient(monkeypatch, r, rewards, algo, 1, drop)[0].items():
        close(g, got[n], 1e-4)                      # any split into micro-batches: same gradient
    policy = copy.deepcopy(tiny_agent().policy).requires_grad_(True)
    total, used, tokens = 0.0, 0, 0
    p = torch.stack([g[~g.isnan()].mean() for g in rewards])
    for n in range(9):
        i, j, k = n // 3, n % 3, int(r.mask[n].sum())
        if rewards[i].isnan()[j] or i in drop:
            continue
        group = rewards[i][~rewards[i].isnan()]
        A = rewards[i, j] - group.mean()
        if algo in ("grpo", "dapo"):
            A = A / (group.std() + 1e-4)
        if algo == "bnpo":
            A = A * train_rl.beta_weights(p[i].view(1, 1), p)[0, 0]
        x = torch.cat([r.prompt[i][r.prompt_mask[i]], r.inputs[n, :k]])[None]
        pi, ref = (F.log_softmax(net(x, kit.text_positions(x))[0, -k:] / 0.7, -1)
                   [range(k), r.actions[n, :k]] for net in (policy, reference))
        loss = -A * (pi - pi.detach()).exp()        # the ratio is 1: no clipping
        if algo == "grpo":
            loss = loss + 0.01 * ((ref.detach() - pi).exp() - (ref.detach() - pi) - 1)
        total = total + {"grpo": loss.mean(), "dr_grpo": loss.sum() / 10,
                         "dapo": loss.sum(), "bnpo": loss.sum()}[algo]
        used, tokens = used + 1, tokens + k
    total = total / (tokens if algo == "dapo" else used)
    params = dict(policy.named_parameters())
    for (n, _), g in zip(params.items(), gradients(total, list(params.values()))):
        close(got[n], g, 2e-4)
    assert figures["ratio_error"] < 1e-4 and (figures["kl"] > 0) == (algo == "grpo")


def test_update_with_nothing_to_learn_from_is_quiet(monkeypatch):
    _, r = roll("latent", stop=40)
    for rewards, drop in ((torch.full((3, 3), NAN), ()), (torch.zeros(3, 3), (0, 1, 2))):
        monkeypatch.setattr(train_rl, "optimizer_step", lambda run, o, ids: 0.0)
        agent = copy.copy(tiny_agent())
        args = parsed(train_rl, "--algo", "dapo", "--group-size", "3", "--max-new-tokens", "10")
        kept = [p for p in range(3) if p not in drop]
        judged = train_rl.Judged(r, rewards, rewards, [0, 1, 2], ROWS, kept)
        figures = train_rl.update(
            agent, None, None, None, [judged], kept, args, train_rl.resolve_algorithm(args),
            tasks.Task("t", ("d",), (0.0, 1.0), {}, None, 10))
        assert all(math.isfinite(v) for v in figures.values())


def test_update_refuses_actions_of_another_policy(monkeypatch):
    _, r = roll("latent")
    r = copy.copy(r)
    r.logps = r.logps + 0.01                        # the rollout disagrees with the update
    with pytest.raises(AssertionError, match="ratio is not 1"):
        update_gradient(monkeypatch, r, torch.rand(3, 3), "grpo")


@pytest.mark.parametrize("dynamic", ["on", "off"])
def test_collect_keeps_varied_groups_and_refills(monkeypatch, dynamic):
    """Two prompts a round; prompt 3 of every 4 has variance."""
    args = parsed(train_rl, "--algo", "dapo", "--dynamic-sampling", dynamic, "--prompts", "2")
    calls = []

    def play(agent, task, rows, places, args, algorithm, key):
        calls.append((places, key))
        rewards = torch.tensor([[0.0, 1.0 if p % 4 == 3 else 0.0] for p in places])
        return train_rl.Judged(None, rewards, rewards, places, rows), 0.0, 0.0
    monkeypatch.setattr(train_rl, "play", play)
    prompts_ = train_rl.Prompts([{"id": i} for i in range(20)], 0)
    rounds, kept, played, _ = train_rl.collect(None, None, prompts_, args,
                                               train_rl.resolve_algorithm(args), 5)
    if dynamic == "off":
        assert (kept, played) == ([0, 1], 2)
    else:
        assert (kept, played) == ([3, 7], 8) and [j.keep for j in rounds] == [[], [1], [], [1]]
        assert [places for places, _ in calls] == [[0, 1], [2, 3], [4, 5], [6, 7]]
        assert len({key for _, key in calls}) == 4


# ==== The whole chain, as a user would run it =================================================

# Predecessors that a command has to run first get two large steps; the mini world is cut down.
QUICK = """
import runpy, sys
import eval, model
def fill(self, args, usual=model.Parser.fill):
    args.steps, args.lr = args.steps or 2, args.lr or 1e-2
    return usual(self, args)
model.Parser.fill = fill
eval.SIZES.update(valid=4, id=4, ood=4)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
RL = ["--prompts", "2", "--group-size", "4", "--max-new-tokens", "12", "--lr", "1e-2"]
TIMES = re.compile(r"seconds|memory|per_second")


class Chain:
    """A run root with an untrained base, a task of few rows, and commands to run there."""

    def __init__(self, folder):
        self.folder, self.root = folder, folder / "runs"
        texts = [m["content"] for kind in ("caption", "base", "text")
                 for r in tasks.mini_corpus(kind, 200, 0) for m in r["messages"]]
        base, *rest = kit.tiny_base(texts, 0, width=64, layers=2, vocab=400)
        for part in (shake(base, 0.1), *rest):      # noise: else all greedy tokens are one
            part.save_pretrained(self.root / "tiny" / "base")
        picture().save(folder / "a.png")
        self.task = write(folder / "task.jsonl", [
            {"messages": [{"role": "user", "content": f"<image>Say {i}"},
                          {"role": "assistant", "content": LETTERS}], "images": ["a.png"],
             "split": (["valid", "id", "ood"] + ["sft", "rl"] * 6)[i]} for i in range(15)])
        (folder / "quick.py").write_text(QUICK)

    def command(self, script, *flags, quick=False, ranks=0):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        return [sys.executable, *(launcher if ranks else []),
                *([str(self.folder / "quick.py")] if quick else []), str(HERE / script), *flags,
                *(["--run-root", str(self.root), "--device", "cpu"] if "train" in script else [])]

    def run(self, script, *flags, status=0, **kw):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
        done = subprocess.run(self.command(script, *flags, **kw), env=env, cwd=self.folder,
                              capture_output=True, text=True, timeout=120)
        assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout + done.stderr

    def rl(self, *flags, **kw):
        return self.run("train_rl.py", "--task", self.task, *RL, *flags, **kw)

    def log(self, name):
        rows = (self.root / "tiny" / name / "log.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(r).items() if not TIMES.search(k)} for r in rows]

    def weights(self, name):
        return load_file(self.root / "tiny" / name / "model.safetensors")


LETTERS = " ".join("the a s e o t i n r the a s e o t i n r")
MAIN = "rl-task-grpo-latent-s0"


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    chain = Chain(tmp_path_factory.mktemp("chain"))
    chain.said = chain.rl("--steps", "4", quick=True, ranks=1)
    return chain


def test_chain_runs_every_stage_and_says_so(chain):
    for stage in ("projector", "idm", "bc", "sft-task-latent"):
        assert re.search(rf"{stage} is missing or unfinished: running train_\w+.py first", chain.said)
    log = chain.log(MAIN)
    assert [r["step"] for r in log] == [0, 1, 2, 3]
    assert max(r["ratio_error"] for r in log) < 1e-4
    assert any(r["reward_std"] > 0 for r in log)    # otherwise the tests below show nothing
    wanted = {"step", "reward_mean", "reward_std", "zero_variance", "kl", "entropy", "ratio_error",
              "length", "codes_used", "code_perplexity", "distinct_answers"}
    assert wanted <= set(log[0])
    for stage in ("projector", "idm", "bc", "sft-task-latent", MAIN):
        folder = chain.root / "tiny" / stage
        config = json.loads((folder / "config.json").read_text())
        assert not (folder / "state").exists() and {"args", "parent", "versions"} <= set(config)


def test_chain_stages_save_and_change_what_they_train_and_nothing_else(chain):
    trained = {"projector": {"projector"}, "idm": {"idm", "codebook", "world", "projector"},
               "bc": {"policy"}, "sft-task-latent": {"policy", "world"}, MAIN: {"policy"}}
    agent = Agent.from_run(chain.root / "tiny" / "idm", "cpu", skip=())
    old = {k: v.clone() for k, v in agent.make(
        "projector", "idm", "codebook", "world", "policy").state_dict().items()}
    for stage, modules in trained.items():
        new = chain.weights(stage)
        assert {k.split(".")[0] for k in new} == modules, stage
        same = [k for k, v in new.items() if torch.equal(v, old[k])]
        assert not same, (stage, same)
        old.update(new)
    final = Agent.from_run(chain.root / "tiny" / MAIN, "cpu")
    assert all(torch.equal(v, old[k]) for k, v in final.state_dict().items()
               if not k.startswith("backbone"))
    base = kit.load_base(chain.root / "tiny" / "base", torch.float32)[0].state_dict()
    assert all(torch.equal(v, base[k]) for k, v in final.backbone.state_dict().items())
    assert isinstance(final.chat("What do you see?", chain.folder / "a.png"), str)


def test_chain_repeated_is_finished_and_other_arguments_are_refused(chain):
    before = (chain.root / "tiny" / MAIN / "model.safetensors").stat().st_mtime_ns
    assert "is finished" in chain.rl("--steps", "4")
    said = chain.rl("--steps", "5", status=2)
    assert re.search(r"error: .*steps: 4 -> 5.*--name.*--fresh", said) and "Traceback" not in said
    assert (chain.root / "tiny" / MAIN / "model.safetensors").stat().st_mtime_ns == before


def test_chain_killed_run_continues_to_the_same_bits(chain):
    flags = ["--steps", "12", "--save-every", "2", "--inner-epochs", "2"]
    chain.rl(*flags, "--name", "whole")
    command = chain.command("train_rl.py", "--task", chain.task, *RL, *flags, "--name", "cut")
    process = subprocess.Popen(command, cwd=chain.folder, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = chain.root / "tiny" / f"{MAIN}-cut" / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") < 5:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (log.parent / "model.safetensors").exists()
    assert "continuing" in chain.rl(*flags, "--name", "cut")
    whole, cut = chain.weights(f"{MAIN}-whole"), chain.weights(f"{MAIN}-cut")
    assert all(torch.equal(v, cut[k]) for k, v in whole.items())
    assert chain.log(f"{MAIN}-whole") == chain.log(f"{MAIN}-cut")


def test_chain_on_two_ranks_takes_the_same_steps(chain):
    chain.rl("--steps", "4", "--name", "two", ranks=2)
    for one, two in zip(chain.log(MAIN), chain.log(f"{MAIN}-two"), strict=True):
        for key in ("reward_mean", "kl", "entropy", "grad_norm", "length", "distinct_answers"):
            assert one[key] == pytest.approx(two[key], rel=1e-3, abs=1e-5), key


def test_chain_token_space_and_its_evaluation(chain):
    chain.rl("--steps", "2", "--action-space", "token", "--algo", "dapo", quick=True)
    token = chain.root / "tiny" / "rl-task-dapo-token-s0"
    assert {k.split(".")[0] for k in chain.weights(token.name)} == {"policy"}
    said = chain.run("eval.py", str(chain.root / "tiny" / MAIN), str(token), "--prompts", "1",
                     "--samples", "3", "--device", "cpu", "--report", "page.html")
    assert "best_of_3" in said and "reward, mean over seeds" in said
    page = (chain.folder / "page.html").read_text()
    assert "<table>" in page and "http" not in page                 # self-contained
    summary = json.loads((token / "summary.json").read_text())
    rows = [json.loads(r) for r in (token / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 and {len(r["answers"]) for r in rows} == {1, 3}
    task = tasks.load_task(chain.task)
    for key, figures in summary.items():
        part = [r for r in rows if f"{r['split']} {r['mode']}" == key]
        again = tasks.summarise(task, part)
        assert all(figures[k] == pytest.approx(v, nan_ok=True) for k, v in again.items())
    said = chain.run("eval.py", "--rescore", str(token / "predictions.jsonl"), "--task", chain.task)
    assert f"{summary['id sampled']['reward']:.4g}" in said


def test_chain_on_the_mini_world(chain):
    """An untrained base scores at the floor everywhere: no variance, and nothing breaks."""
    chain.run("train_rl.py", *RL, "--algo", "bnpo", "--steps", "2", quick=True)
    log = chain.log("rl-mini-bnpo-latent-s0")
    assert len(log) == 2 and all(math.isfinite(v) for r in log for v in r.values())
