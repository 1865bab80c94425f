"""Tests, grouped by the file they test, fast ones first; the whole chain comes last.

    python -m pytest -q test_all.py                     # everything, about 10 minutes on 2 cores
    python -m pytest -q test_all.py -k "not chain"      # without the subprocess runs: seconds

Expected values are worked by hand or by brute force; `# fails if` names a slip that a test is
there to catch. KIT_SHARED_DATA points at MMRole's reviews and the release's pre-training examples;
tests that need them are skipped where they are absent.
"""

import argparse
import base64
import contextlib
import copy
import csv
import functools
import gzip
import hashlib
import html
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import eval as tasks
import model as kit
import train_bc
import train_idm
import train_projector as stage1
import train_rl
from model import (Agent, CausalStack, Encoder, GaussianMap, Projector, Stream, UserError,
                   WorldModel, choose, replay, rollout, token_logprobs)
from train_idm import keyed_gumbel
from train_rl import action_statistics

torch.set_num_threads(1)
HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("KIT_SHARED_DATA", HERE.parent / "shared" / "data"))
needs_shared = pytest.mark.skipif(not (SHARED / "mmrole").exists(), reason="shared data absent")
DOCUMENTS = ["You are a helpful assistant.", "What do you see? I see a red circle and a star.",
             "The bus in the image is white and red.\n\n\nOr green.\n\n\nYes."] * 4


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
        shake(agent.policy, 0.02)                   # no longer the backbone's own layers
        return agent.requires_grad_(False)
    base, tokenizer, processor = stage1.tiny_base(DOCUMENTS, seed=0, width=64, layers=2, vocab=400)
    agent = Agent(shake(base, 0.1), Encoder(tokenizer, processor, base),
                  {"codes": 16, "idm_layers": 1, "policy_layers": 1, "without": []})
    agent.make("projector", "idm", "codebook", "world", "policy")
    for seed, name in enumerate(("projector", "idm", "world", "policy")):
        shake(getattr(agent, name), 0.15, seed)
    return agent.eval().requires_grad_(False)


def with_modules(agent, **modules) -> Agent:
    agent = copy.copy(agent)
    agent._modules = {**agent._modules, **modules}
    return agent


def picture(width=56, height=56, seed=0) -> Image.Image:
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def row(user, answer=None, images=(), row_id="r") -> dict:
    messages = [{"role": "system", "content": "Be helpful."}, {"role": "user", "content": user}]
    messages += [{"role": "assistant", "content": answer}] if answer else []
    return {"id": row_id, "messages": messages, "images": list(images)}


ROWS = [row("<image>What do you see?", "A red star.", [picture()], "front"),
        row("Tell me a story about a red bus, please.", "No.", (), "text"),
        row("Look: <image> and <image>. Which is white?", "The second.",
            [picture(112, 28, 1), picture(28, 56, 2)], "two")]


def examples(rows=ROWS, prompt=False):
    return [tiny_agent().encoder.encode(r, prompt) for r in rows]


def collated(rows=ROWS):
    return tiny_agent().encoder.collate(examples(rows))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tolerance,
                               atol=tolerance, check_dtype=False)


def gradients(loss, params):
    return torch.autograd.grad(loss, params, retain_graph=True)


def parsed(module, *argv):
    """Arguments as a script's main() has them after its first lines."""
    args = module.arguments().parse_args(list(argv))
    if module is tasks:
        return args
    kind = {stage1: lambda: "projector", train_idm: lambda: "idm",
            train_bc: lambda: "bc" if args.stage == "bc" else
            "token" if args.action_space == "token" else args.sft,
            train_rl: lambda: args.action_space}[module]()
    return kit.fill(args, module.DEFAULTS[kind])


# ---- model.py: runtime -----------------------------------------------------------------------


def test_schedule_and_seeds():
    close([kit.cosine(s, 100, 0.1, 0.1) for s in (0, 9, 55, 100)], [0.1, 1, 0.55, 0.1])
    seeds = [kit.key_seed(*k) for k in ((1, "a"), (1, "b"), (2, "a"), ("1", "a"), (1,), (1, "a"))]
    assert len(set(seeds)) == 5 and seeds[0] == seeds[-1] and 0 <= min(seeds) < max(seeds) < 2 ** 63


def test_where_nothing_can_be_written_is_one_line(tmp_path):
    """For root too: the folder is a file. Fails if the clean-up trips over what was not written."""
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="runs/summary.json: cannot be written .*Not a directory"):
        kit.atomic(tmp_path / "runs" / "summary.json", lambda path: path.write_text("x"))


@pytest.mark.parametrize("write_", [torch.save, save_file, lambda t, p: p.write_text("x" * 9999)])
def test_atomic_leaves_the_old_file_when_the_disk_is_full(tmp_path, write_):
    kit.atomic(tmp_path / "x", lambda p: p.write_text("old"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))     # fails if only OSError is caught
    try:
        with pytest.raises(UserError, match="cannot be written.*earlier files are intact"):
            kit.atomic(tmp_path / "x", lambda p: write_({"w": torch.zeros(9999)}, p))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_no_file_is_trusted_and_no_code_is_fetched(tmp_path):
    """A checkpoint that is a pickle with an action is refused, and the action not taken."""
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)
    run = fresh_run(tmp_path)
    for saved in ({"step": Trap()}, {"step": 1}, [3]):
        torch.save(saved, run.folder / "state/last.pt")
        with pytest.raises(UserError, match="last.pt: is not a checkpoint of this run.*--fresh"):
            run.resume({"m": nn.Linear(2, 1)})
    assert not (tmp_path / "sprung").exists()       # fails without weights_only
    for file in HERE.glob("*.py"):
        code = file.read_text()
        assert "trust_remote" + "_code" not in code and "import pick" + "le" not in code
        loads = re.findall(r"torch\.load\(.*", code)
        assert all("weights_only=True" in line for line in loads if file.name[:5] != "test_")


@pytest.mark.parametrize("error,status,line", [
    (UserError("a.jsonl:3: no"), 2, ": error: a.jsonl:3: no\n"),
    (OSError(28, "No space left on device", "runs/x"), 2, ": error: .*No space.*'runs/x'; check.*"),
    (UserError("x" * 9999), 2, ": error: x{800} ... x{300}\n"),
    (KeyboardInterrupt(), 130, "interrupted: the same command goes on from the last.*")])
def test_a_mistake_outside_the_code_ends_with_one_line(capsys, error, status, line):
    def main(argv):
        raise error
    with pytest.raises(SystemExit) as end:
        kit.launch(main)
    assert end.value.code == status
    assert re.fullmatch(rf"[^\n]*{line}\n?", capsys.readouterr().err)
    error = ZeroDivisionError()                     # a mistake of the code keeps its traceback
    with pytest.raises(ZeroDivisionError):
        kit.launch(main)
    error = UserError("no step")
    error.status = 3
    with pytest.raises(SystemExit, match="3"):
        kit.launch(main)


def test_flags_are_checked_and_defaults_follow_the_model_and_stage(capsys):
    for argv in (["--nonsense"], ["--ste", "3"], ["--steps", "-1"], ["--steps", "1.5"],
                 ["--lr", "0"], ["--lr", "x"], ["--lr", "nan"], ["--lr", "inf"],
                 ["--device", "tpu"], ["--batch-tokens", "0"], ["--paired-steps", "-4"]):
        with pytest.raises(SystemExit) as end:
            parsed(stage1, *argv)
        assert end.value.code == 2
    for argv, kind in ((["--stage", "bc"], "bc"), (["--action-space", "token"], "token")):
        for more, scale in (([], "tiny"), (["--model", "a/b"], "full")):
            filled = vars(parsed(train_bc, *argv, *more))
            wanted = kit.STRUCTURE[scale] | train_bc.DEFAULTS[kind][scale]
            assert wanted == {name: filled[name] for name in wanted}
    args = parsed(train_bc, "--lr", "0.5", "--codes", "3", "--batch-tokens", "99")
    assert (args.lr, args.codes, args.batch_tokens, args.image_tokens) == (0.5, 3, 99, "4")
    assert parsed(train_bc, "--model", "a/b").image_tokens == "256"
    for value in ("9", "280x420"):
        assert parsed(stage1, "--image-tokens", value).image_tokens == value
    for value in ("0", "-3", "1.5", "x", "9x", "x9", "9x0", "280X420", "1x2x3", "9 "):
        with pytest.raises(SystemExit):
            parsed(stage1, "--image-tokens", value)
        assert f"{value} is neither a number nor HEIGHTxWIDTH" in capsys.readouterr().err


def test_one_model_folder_has_one_run_folder_and_a_missing_one_is_said(tmp_path, monkeypatch):
    for name in ("here/m", "there/m", "here/tiny"):
        (tmp_path / name).mkdir(parents=True)
    def of(path):
        args = parsed(stage1, "--model", path)
        return args.model, kit.model_root(args)
    monkeypatch.chdir(tmp_path / "here")
    whole = str(tmp_path / "here/m")
    same = {of(path) for path in ("m", "./m", "m/", "../here/m", "../there/../here/m", whole)}
    assert {model for model, _ in same} == {whole} and len(same) == 1   # fails if kept relative
    assert of("../there/m")[1] not in {root for _, root in same}
    assert of("tiny") == ("tiny", Path("runs/tiny")) and of("org/x")[0] == "org/x"
    monkeypatch.chdir(tmp_path / "there")           # the same word, another folder
    assert of("m")[0] == str(tmp_path / "there/m")
    for path in ("./n", "../n", str(tmp_path / "n")):
        with pytest.raises(UserError, match="--model .*n: no such folder"):
            of(path)


def float_or_text(cell):
    try:
        return float(cell)
    except ValueError:
        return cell


@pytest.mark.parametrize("module", [stage1, train_idm, train_bc, train_rl, tasks],
                         ids=lambda m: m.__name__)
def test_help_shows_every_flag_and_every_kinds_defaults(module):
    text = module.arguments().format_help()         # fails if a "%" in a help is not doubled
    flags = re.findall(r"^  (?:-h, )?(--[\w-]+)", text, re.M)
    assert {"--" + name.replace("_", "-") for name in vars(module.arguments().parse_args([]))} \
        == {*flags} - {"--help"} | ({"--runs"} if module is tasks else set())
    assert module is not train_rl or len({*flags} - {"--help"}) <= 40
    if module is not tasks:
        title = "defaults (full: any --model but tiny)"
        names = text[text.index(title) + len(title):].split("\n")[0].split()
        rows = [(f"{kind} {scale}", values) for kind, scales in module.DEFAULTS.items()
                for scale, values in scales.items()]
        for label, values in rows:
            (line,) = re.findall(rf"^{label}  .*", text, re.M)
            shown = re.split(r"\s{2,}", line[len(label):].strip())
            values = kit.STRUCTURE[label.split()[1]] | values
            assert dict(zip(names, map(float_or_text, shown), strict=True)) == {
                name: float_or_text(str(value)) for name, value in values.items()}
    for kinds in getattr(module, "DEFAULTS", {}).values():      # every default is of a flag
        assert {"--" + name.replace("_", "-") for scale in kinds.values() for name in scale} < {
            *flags}


def script(module, calls):
    """`module` as `predecessor` uses it; its main() is only recorded."""
    return SimpleNamespace(arguments=module.arguments, main=calls.append, __file__=module.__file__)


def own_identity(args):
    return tasks.identity(args, "paired", "text", *(["task"] if "task" in args else []))


def fresh_run(root, *flags, module=stage1, stage="run", agent=None, parent=None):
    """A run of 9 steps on a stub of an agent in `root`/tiny/run."""
    args = parsed(module, "--run-root", str(root), "--steps", "9", *flags)
    agent = agent or SimpleNamespace(base_hash="b", space="latent", dtype=torch.float32,
                                     device=torch.device("cpu"))
    return kit.Run(args, kit.folder_of(args, stage, args.name), agent, own_identity(args), parent)


@pytest.mark.parametrize("model", ["tiny", "some/model"])
@pytest.mark.parametrize("fixed", [["--stage", "bc"],
                                   ["--action-space", "token", "--sft", "clone"]], ids=str)
def test_a_predecessor_runs_as_the_user_would_run_it_alone(tmp_path, fixed, model):
    """One list of arguments is run (tiny) or printed, and read by the predecessor's own parser."""
    common, calls = ["--model", model, "--seed", "3", "--run-root", str(tmp_path / "a b"),
                     "--paired", "x y.jsonl", "z.jsonl", "--without", "cycle", "text",
                     "--policy-layers", "5"], []
    args = parsed(train_rl, *common, "--lr", "0.5", "--steps", "7", "--name", "mine", "--fresh",
                  "--judge-model", "j")
    def start():
        kit.predecessor(args, {}, "none", script(train_bc, calls), *fixed)
    if model == "tiny":
        start()
    else:
        with pytest.raises(UserError, match="missing or unfinished; run first: python") as error:
            start()
        printed = shlex.split(str(error.value).split("run first: ")[1])
        assert printed[:2] == ["python", "train_bc.py"]
        calls.append(printed[2:])
    (argv,) = calls                                 # fails if --lr, --steps or --name are handed on
    assert vars(parsed(train_bc, *argv)) == vars(parsed(train_bc, *common, *fixed))


def test_an_unfinished_predecessor_goes_on_as_it_was_started(tmp_path, monkeypatch):
    monkeypatch.setattr(kit, "SAVE_SECONDS", 0)
    args, calls = parsed(train_idm, "--run-root", str(tmp_path), "--seed", "3"), []
    def seed_given():
        kit.predecessor(args, own_identity(args), "run", script(stage1, calls))
        return parsed(stage1, *calls.pop()).seed
    assert seed_given() == 3
    for seed in (7, 0):                             # 0 is the default: no flag says it
        run = fresh_run(tmp_path, "--seed", str(seed), "--fresh")
        assert seed_given() == 3                    # without a checkpoint nothing is kept
        run.resume({})
        run.save(1, {})
        assert seed_given() == seed
    fresh_run(tmp_path, "--lr", "0.5", "--steps", "7", "--fresh").resume({})
    kit.predecessor(args, own_identity(args), "run", script(stage1, calls))
    assert "--lr" not in calls.pop()                # nothing to lose: nothing is kept
    run = fresh_run(tmp_path, "--lr", "0.5", "--steps", "7")
    run.resume({})
    run.save(7, {})
    kit.predecessor(args, own_identity(args), "run", script(stage1, calls))
    given = parsed(stage1, *calls.pop())
    assert (given.lr, given.steps) == (0.5, 7)


def test_an_unfinished_warm_start_keeps_its_judge_and_its_parent(tmp_path, monkeypatch):
    monkeypatch.setattr(kit, "SAVE_SECONDS", 0)
    own = ["--judge-url", "http://old/v1", "--judge-model", "j", "--parent",
           str(finished(tmp_path / "else", module=train_bc)), "--batch-tokens", "99"]
    run, calls = fresh_run(tmp_path, *own, "--seed", "7", module=train_bc), []
    run.resume({})
    run.save(1, {})
    args = parsed(train_rl, "--run-root", str(tmp_path), "--judge-url", "http://new/v1")
    kit.predecessor(args, own_identity(args), "run", script(train_bc, calls))
    given = parsed(train_bc, *calls.pop())          # fails if --parent or the judge is dropped
    assert ["--judge-url", given.judge_url, "--judge-model", given.judge_model, "--parent",
            given.parent, "--batch-tokens", str(given.batch_tokens)] == own
    assert (given.seed, given.steps) == (7, 9)


def finish(run, **modules) -> Path:
    """As after an optimiser step."""
    run.taken = 1
    run.finish(**modules)
    return run.folder


def finished(root, *flags, **more) -> Path:
    return finish(fresh_run(root, *flags, "--fresh", **more), m=nn.Linear(1, 1))


def test_a_finished_predecessor_must_be_of_the_same_data_and_structure(tmp_path, capsys):
    rows, other, demo = (write(tmp_path / f"{name}.jsonl", text_rows(n)) for n, name in
                         enumerate(("rows", "other", "demo"), 2))
    def start(*flags):
        args = parsed(train_rl, "--run-root", str(tmp_path), *flags)
        return kit.predecessor(args, own_identity(args), "run", script(train_bc, []))
    data, different = (["--paired", file, "--without", "text"] for file in (rows, other))
    folder = finished(tmp_path, *data, "--seed", "5", "--lr", "0.5", module=train_bc)
    assert start(*data, "--seed", "3") == folder    # steps, learning rate and seed are its own
    parent = ["--parent", str(folder)]
    assert start(*data, *parent) == folder and "another task" not in capsys.readouterr().out
    assert start(*data, *parent, "--task", demo) == folder      # by --parent only, and it is said
    assert re.search("run-without-text is of another task .mini.* -> demo",
                     capsys.readouterr().out)
    for flags, pattern in (
            (different, "paired: .'rows.* -> .'other"),
            (["--without", "text"], "paired: .* -> mini"),
            ([*data, "--task", demo], "task: mini .* -> demo"),
            ([*different, *parent], "paired"), ([*data, *parent, "--codes", "5"], "codes: 3 -> 5"),
            ([*data, *parent, "--without", "cycle"], "without: ..text.. -> ..cycle., .text"),
            ([*data, *parent, "--without", "cycle", "--task", demo], "without: ..text.. -> ..cy")):
        with pytest.raises(UserError, match=rf"trained otherwise \({pattern}.*-root.*--parent"):
            start(*flags)
    with pytest.raises(UserError, match="--parent .*absent: no finished run there"):
        start(*data, "--parent", str(tmp_path / "absent"))
    plain = finished(tmp_path / "plain", *data)     # of no task, like bc: it fits every task
    assert start(*data, "--task", demo, "--parent", str(plain)) == plain


def test_folders_of_variants_never_collide():
    names = {kit.folder_of(parsed(train_idm, *flags), "idm") for flags in (
        [], ["--codes", "32"], ["--idm-layers", "1"], ["--policy-layers", "1"],
        ["--without", "text"], ["--without", "projector"], ["--without", "cycle"],
        ["--without", "cycle", "text"],
        ["--without", "text", "--without", "cycle", "text"], ["--model", "org/x"])}
    assert len(names) == 9 and {Path("runs/tiny/idm"), Path("runs/org--x/idm")} < names


def small_loop(root, *flags, start=0, stop=None):
    """A loop as the scripts have it, from weights of seed `start`; `stop` ends it in that step
    between log and checkpoint. Returns the run, its module and its log without times."""
    run, rows = fresh_run(root, *flags), stream(text_rows(21))
    torch.manual_seed(start)
    layer, usage = nn.Linear(3, 2), nn.Module()
    layer.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
    usage.register_buffer("window", torch.zeros(1, dtype=torch.double))
    params = [layer.weight, layer.bias]
    state = {"m": layer, "usage": usage, "rows": rows, "optimizer": torch.optim.AdamW(params)}
    for step in range(run.resume(state), run.steps):
        part = rows.next()
        usage.window.mul_(0.5).add_(len(part))
        layer(torch.full((1, 3), len(part[0]) / 9)).square().sum().backward()
        if step == 1:
            layer.weight.grad.fill_(math.nan)
        norm = kit.optimizer_step(run, [state["optimizer"]], [0.1], [e.id for e in part])
        run.log(step, {"third": 1 / 3, "norm": norm, "rows": [e.id for e in part],
                       "window": usage.window.item()}, "third", "norm")
        run.append("samples.jsonl", [{"step": step}])
        if step == stop:
            break
        run.save(step + 1, state)
    log = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    return run, layer, [{k: v for k, v in row.items() if k not in ("seconds", "peak_memory")}
                        for row in log]


def test_a_run_that_was_cut_goes_on_exactly(tmp_path, monkeypatch):
    _, whole, log = small_loop(tmp_path / "whole")
    assert [row["step"] for row in log] == list(range(9)) and log[0]["third"] == 0.3333333
    assert [row["skipped"] for row in log] == [0] + [1] * 8 and log[1]["norm"] is None
    assert (tmp_path / "whole/tiny/run/state/last.pt").exists()     # after the last step, always
    small_loop(tmp_path / "rare", stop=4)           # saved once a minute: not yet
    assert not (tmp_path / "rare/tiny/run/state/last.pt").exists()
    monkeypatch.setattr(kit, "SAVE_SECONDS", 0)
    small_loop(tmp_path / "cut", stop=4)
    saved = torch.load(tmp_path / "cut/tiny/run/state/last.pt", weights_only=True)
    assert set(saved["state"]["m"]) == {"weight", "bias"}       # what is frozen is not kept
    # Neither what it starts from nor where it runs matters, and rows after the checkpoint go.
    flags = ["--device", "cpu", "--tokens-at-once", "9"]
    run, again, continued = small_loop(tmp_path / "cut", *flags, start=1)
    assert continued == log and run.skipped_all == 1
    assert torch.equal(again.weight, whole.weight)  # fails if the optimiser's state is not loaded
    samples = (run.folder / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in samples] == list(range(9))
    assert run.taken == 8                           # of both halves, the skipped step not counted
    small_loop(tmp_path / "rare", "--lr", "0.5")    # without a checkpoint nothing is lost
    assert len((tmp_path / "rare/tiny/run/log.jsonl").read_text().splitlines()) == 9


def test_logs_are_on_disk_before_the_checkpoint_and_never_lengthened(tmp_path, monkeypatch):
    monkeypatch.setattr(kit, "SAVE_SECONDS", 0)
    synced, fsync = [], os.fsync
    def counting(fd):
        synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        fsync(fd)
    monkeypatch.setattr(os, "fsync", counting)
    small_loop(tmp_path, stop=4)
    order = [name for name in synced if name in (*kit.LOGS, ".last.pt.tmp")]
    assert order == [*kit.LOGS, ".last.pt.tmp"] * 4     # fails if what it counts may be lost
    log = tmp_path / "tiny/run/log.jsonl"
    rows = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(rows[:2]))             # as after a power cut
    small_loop(tmp_path)
    steps = [json.loads(line)["step"] for line in log.read_bytes().splitlines()]
    assert steps == [0, 1, *range(4, 9)] and b"\0" not in log.read_bytes()


def flipped(data: bytes, rng) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]


def test_a_flipped_bit_or_a_missing_tensor_of_a_checkpoint_is_noticed(tmp_path):
    run, layer = fresh_run(tmp_path), nn.Linear(64, 64)
    path, rng, noticed = run.folder / "state/last.pt", random.Random(0), 0
    run.resume({})
    run.save(9, {"m": layer})
    good, want = path.read_bytes(), copy.deepcopy(layer.state_dict())
    for _ in range(60):
        path.write_bytes(flipped(good, rng))
        try:
            step = run.resume({"m": layer})
        except UserError as error:
            assert re.search("last.pt: is not a checkpoint of this run.*--fresh", str(error))
            noticed += 1
            continue
        assert step == 9                            # padding between the records, a date
        for name, value in layer.state_dict().items():
            assert torch.equal(value, want[name])   # fails without the archive's checksums
    assert noticed >= 50
    path.write_bytes(good)
    saved = torch.load(path, weights_only=True)
    for state in ({}, {"m": {"weight": want["weight"]}}, {"m": [3]}, {"m": want | {"more": 1}}):
        torch.save({**saved, "state": state}, path)
        with pytest.raises(UserError, match="last.pt: is not a checkpoint of this run.*--fresh"):
            run.resume({"m": layer})


def test_a_run_without_an_optimiser_step_is_no_finished_run(tmp_path):
    run = fresh_run(tmp_path)
    with pytest.raises(UserError, match="run: no optimiser step was taken") as error:
        run.finish(m=nn.Linear(1, 1))
    assert error.value.status == 3 and not (run.folder / "model.safetensors").exists()
    layer = nn.Linear(1, 1)
    for value in (math.nan, 1.0):                   # a step that was skipped is none
        assert run.taken == 0
        (layer(torch.ones(1, 1)) * value).sum().backward()
        kit.optimizer_step(run, [torch.optim.SGD(layer.parameters())], [0.1], [])
    run.finish(m=layer)
    assert (run.folder / "model.safetensors").exists()
    start = fresh_run(tmp_path, "--steps", "0", stage="start")          # asked for: the base's row
    assert list(range(start.resume({"m": layer}), start.steps)) == []
    start.finish(m=layer)
    assert (start.folder / "model.safetensors").exists()


def test_an_interrupted_start_goes_on_with_the_same_command(tmp_path):
    """Ended between the lock and config.json, or within it; without a checkpoint nothing is lost,
    so other arguments are taken too."""
    folder = tmp_path / "tiny/run"
    for left in ((), (".config.json.tmp",), ("config.json",)):
        (folder / "state").mkdir(parents=True)
        for name in ("state/lock", *left):
            (folder / name).write_text("")
        run = fresh_run(tmp_path, "--lr", "0.5")
        assert not run.finished and run.resume({}) == 0
        assert kit.read_config(folder)["args"]["lr"] == 0.5
        fresh_run(tmp_path, "--lr", "0.25")
        assert kit.read_config(folder)["args"]["lr"] == 0.25
        shutil.rmtree(folder)
    for name in ("file", "tiny/file"):              # a file where a folder should be
        (tmp_path / "tiny").mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    for start in (lambda: fresh_run(tmp_path / "file"),
                  lambda: fresh_run(tmp_path, stage="file"),
                  lambda: kit.Agent.from_run(tmp_path / "file")):
        with pytest.raises((UserError, OSError)):
            start()


@pytest.mark.parametrize("wrong", [{"args": {}}, {"parent": 7}], ids=str)
def test_a_config_of_valid_form_and_wrong_content_is_refused(tmp_path, wrong):
    qwen_folder(tmp_path / "tiny/base", shard="9GB")
    folder = finished(tmp_path)
    config = kit.read_config(folder)
    (folder / "config.json").write_text(json.dumps({**config, **wrong}))
    with pytest.raises(UserError, match="config.json"):
        Agent.from_run(folder, "cpu")


def test_run_folder_finishes_and_refuses_other_arguments(tmp_path, capsys):
    rows = write(tmp_path / "rows.jsonl", text_rows(9))
    data = ["--paired", rows, "--text", rows]
    run, layer, _ = small_loop(tmp_path, *data)
    config = run.folder / "config.json"
    def refused(pattern, *flags, **more):
        with pytest.raises(UserError, match=rf"other arguments \({pattern}\); --name.*--fresh"):
            fresh_run(tmp_path, *flags, **more)
    def refuses():
        refused("lr: 0.002 -> 0.5, steps: 9 -> 8", *data, "--lr", "0.5", "--steps", "8")
        refused("paired: .*rows.* -> mini.*, text: .*rows.* -> mini.*")
        write(tmp_path / "rows.jsonl", text_rows(8))            # the same name, other rows
        refused("paired: .*rows.jsonl.* -> .*rows.jsonl.*", *data)
        write(tmp_path / "rows.jsonl", text_rows(9))
        other = SimpleNamespace(base_hash="c", space="latent", dtype=torch.half,
                                device=torch.device("cpu"))
        refused("base: b -> c, dtype: float32 -> float16", *data, agent=other)
        refused("parent_sha256: None -> .*", *data, parent=finished(tmp_path, stage="other"))
    refuses()
    config.write_text(re.sub(r'"git": (null|"[^"]*")', '"git": "0ld"', config.read_text()))
    (tmp_path / "moved").mkdir()                    # where the same rows lie changes no weight
    fresh_run(tmp_path, "--text", rows, "--paired", shutil.copy(rows, tmp_path / "moved"))
    assert "was started at commit 0ld, now it is" in capsys.readouterr().out
    run.report("one", {"a": {"x": 1.0}})
    run.report("two", {"b": {"y": 0.123456}})
    assert "0.1235" in capsys.readouterr().out      # tables are shown to 4 digits, kept in full
    run.finish(m=layer)
    report = json.loads((run.folder / "report.json").read_text())
    assert report == {"one": {"a": {"x": 1.0}}, "two": {"b": {"y": 0.123456}}}
    assert fresh_run(tmp_path, *data).finished and not (run.folder / "state").exists()
    assert "is finished" in capsys.readouterr().out
    weights = run.folder / "model.safetensors"
    assert set(load_file(weights)) == {"m.weight", "m.bias"}
    assert kit.read_config(run.folder)["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    refuses()
    assert not fresh_run(tmp_path, "--lr", "0.5", "--fresh").finished
    assert sorted(f.name for f in run.folder.iterdir()) == ["config.json", "state"]
    small_loop(tmp_path, "--lr", "0.5")
    for damaged in ("", "{}", "[]", "7"):
        config.write_text(damaged)
        with pytest.raises(UserError, match="config.json cannot be used .*--fresh"):
            fresh_run(tmp_path, "--lr", "0.5")
    config.unlink()
    with pytest.raises(UserError, match="config.json cannot be used .*--fresh"):
        fresh_run(tmp_path, "--lr", "0.5")


def test_a_folder_that_another_process_works_on_is_refused(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv[1])\n"
                               f"import {__name__} as tests, pathlib, time\n"
                               "run = tests.fresh_run(pathlib.Path(sys.argv[2]))\n"
                               "print('held', flush=True); time.sleep(60)", HERE, tmp_path],
                              stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    for flags in ([], ["--fresh"]):                 # --fresh deletes nothing of the other's
        with pytest.raises(UserError, match="another process is working on this run"):
            fresh_run(tmp_path, *flags)
    calls = []
    for seed in "01":                               # fails with "started with other arguments"
        args = parsed(train_idm, "--run-root", str(tmp_path), "--seed", seed)
        with pytest.raises(UserError, match="another process is working on this run"):
            kit.predecessor(args, own_identity(args), "run", script(stage1, calls))
    assert (tmp_path / "tiny/run/config.json").exists() and not calls
    holder.kill()
    holder.wait()
    fresh_run(tmp_path)                             # the lock dies with its process


def test_only_another_process_is_called_another_process(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(kit.fcntl, "lockf", full)
    with pytest.raises(OSError, match="No space left"):         # fails if any error is taken for it
        fresh_run(tmp_path)


def test_non_finite_steps_are_skipped_and_ten_stop(tmp_path):
    run, layer = fresh_run(tmp_path), nn.Linear(2, 1)
    optimizer, before = torch.optim.SGD(layer.parameters(), lr=9.0), layer.weight.clone()
    with pytest.raises(UserError, match="ten non-finite.*row-7"):      # fails at twelve
        for _ in range(10):
            (layer(torch.ones(1, 2)) * math.nan).sum().backward()
            kit.optimizer_step(run, [optimizer], [1.0], ["row-7"])
    assert torch.equal(layer.weight, before) and run.skipped == run.skipped_all == 10
    layer.weight.grad, layer.bias.grad = torch.tensor([[3.0, 4.0]]), torch.zeros(1)
    close(kit.optimizer_step(run, [optimizer], [1.0], []), 5.0)
    close(before - layer.weight, torch.tensor([[0.6, 0.8]]))    # fails if the clip is dropped
    assert run.skipped == 0 and run.skipped_all == 10 and layer.weight.grad is None
    assert run.taken == 1
    other = nn.Linear(1, 1)                         # of two, both wait if one is not finite
    for p, value in ((layer.weight, 1.0), (layer.bias, 1.0), (other.weight, math.inf)):
        p.grad = torch.full_like(p, value)
    before, second = layer.weight.clone(), torch.optim.SGD(other.parameters(), lr=9.0)
    kit.optimizer_step(run, [optimizer, second], [1.0, 1.0], [])
    assert torch.equal(layer.weight, before) and other.weight.isfinite().all()


def test_a_finished_runs_weights_are_checked_when_they_are_loaded(tmp_path):
    agent = copy.deepcopy(tiny_agent())
    shake(agent.projector, 0.1, 1)
    one = fresh_run(tmp_path, stage="one", agent=agent)
    finish(one, projector=agent.projector.requires_grad_(True), idm=agent.idm)  # frozen
    two = fresh_run(tmp_path, stage="two", agent=agent, parent=one.folder)
    finish(two, world=shake(agent.world, 0.1, 2).requires_grad_(True))
    def load(folder=two.folder, **more):
        return with_modules(copy.deepcopy(tiny_agent()), **more).load_run(folder)
    got = load()
    for name in ("projector", "world", "idm"):      # the parent's, the run's own, nobody's
        for a, b in zip(getattr(got, name).parameters(), getattr(agent, name).parameters()):
            assert torch.equal(a, b) and not a.requires_grad
    assert set(load_file(one.folder / "model.safetensors")) == {
        f"projector.{name}" for name in agent.projector.state_dict()}
    with pytest.raises(UserError, match="(?s)two.model.safetensors: world does not fit.*--fresh"):
        load(world=WorldModel(64, 8))
    for folder in (one.folder, two.folder):
        weights, rng = folder / "model.safetensors", random.Random(0)
        good = weights.read_bytes()
        for _ in range(5):
            weights.write_bytes(flipped(good, rng))
            with pytest.raises(UserError, match=f"{folder.name}/model.saf.*: is not what its run"):
                load()
        weights.write_bytes(good)
    other = copy.deepcopy(tiny_agent())
    other.base_hash, other.structure["base"] = "other", "x"
    with pytest.raises(UserError, match="one: was trained on another base .*--model x; redo.*"):
        other.load_run(two.folder)
    one = fresh_run(tmp_path, "--fresh", stage="one", agent=agent)
    finish(one, projector=shake(agent.projector, 0.1, 3))
    with pytest.raises(UserError, match="two: was trained on an earlier one.*--fresh"):
        load()
    for value in (math.nan, math.inf):
        agent.projector.P.mlp[0].weight.data[1, 2] = value
        one = fresh_run(tmp_path, "--fresh", stage="one", agent=agent)
        finish(one, projector=agent.projector)
        with pytest.raises(UserError, match="one/model.safetensors: holds weights .* not finite"):
            load(one.folder)


def test_one_flipped_bit_of_the_embedded_base_is_noticed(tmp_path):
    base, _ = qwen_folder(tmp_path / "tiny/base", shard="9GB")
    args = parsed(stage1, "--run-root", str(tmp_path), "--device", "cpu")
    folder = finished(tmp_path, agent=Agent.from_base(args))
    (folder / "model.safetensors").write_bytes(b"")             # looked at last
    with pytest.raises(UserError, match="is not what its run finished with"):
        Agent.from_base(args).load_run(folder)
    weights = tmp_path / "tiny/base/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-7] ^= 1                                   # fails if only first values are looked at
    weights.write_bytes(data)
    with pytest.raises(UserError, match="was trained on another base model"):
        Agent.from_base(args).load_run(folder)


def one_of_two_ranks(rank, folder):
    """A process of a group: gradients are summed, figures in float64."""
    r, shares = roll()[1], ([0], [1, 2])            # of unequal length
    rewards = torch.tensor([[0.1, 0.9, 0.4], [0.5, 0.2, 0.7], [0.2, 0.6, 0.1]])
    rewards = 0.01 * rewards                        # so that no gradient is clipped

    def policy_gradient(aggregate, places):
        (gradient,), *_ = update(r, rewards, "bnpo_released", "--scale", "none", "--beta", "0",
                                 "--aggregate", aggregate, parts=[(r.select(places), places)])
        return gradient
    one, other = (policy_gradient("local", places) for places in shares)
    mean = {name: (g + other[name]) / 2 for name, g in one.items()}
    pooled = policy_gradient("tokens", [0, 1, 2])
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                                         world_size=2)
    for aggregate, want in (("local", mean), ("tokens", pooled)):
        for name, g in policy_gradient(aggregate, shares[rank]).items():
            close(g, want[name], 1e-6)
    assert max((g - pooled[name]).abs().max() for name, g in mean.items()) > 1e-5
    params = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (), (7,), (2, 3))]
    for p in params[:-1]:                           # the last has a gradient on rank 0 alone
        p.grad = (rank + 1) * torch.arange(float(p.numel())).view(p.shape)
    if rank == 0:
        params[-1].grad = torch.ones(2, 3)
    kit.reduce_gradients(params)
    for p in params[:-1]:
        assert torch.equal(p.grad, 3 * torch.arange(float(p.numel())).view(p.shape))
    assert torch.equal(params[-1].grad, torch.ones(2, 3))
    big = 2 ** 24 + 1                               # fails in fp32
    got = kit.all_sum({"n": big * rank, "x": torch.tensor(0.5), "t": torch.tensor([[rank, 2.0]])})
    assert (got["n"], got["x"], got["t"].tolist()) == (big, 1.0, [[1.0, 4.0]])
    assert kit.gather({rank: "x"}) == {0: "x", 1: "x"}
    asked = []                                      # ranks share the judge's calls, each once

    def judge(rows, answers):
        asked.extend(answers)
        return [f"{row['id']} {answer}" for row, answer in zip(rows, answers)]
    task, rows = SimpleNamespace(judge=judge), [{"id": name} for name in "abcd"]
    assert tasks.judged(task, rows[:3], [["v", "w"], ["x", "y"], ["z"]]) == [
        ["a v", "a w"], ["b x", "b y"], ["c z"]]
    assert asked == [["v", "w", "z"], ["x", "y"]][rank]     # whole prompts
    assert tasks.judged(task, rows[3:], [["u"]]) == [["d u"]] and len(asked) == [4, 2][rank]
    torch.distributed.destroy_process_group()


def test_gradients_figures_and_the_judges_calls_are_shared_over_ranks(tmp_path):
    torch.multiprocessing.start_processes(one_of_two_ranks, (tmp_path,), 2, start_method="fork")


def torchrun_worker(port, attempt, rank, folder):
    """A worker as torchrun starts it: in attempts 0 and 1 it dies, in attempt 2 it works."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                      TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT=attempt)
    kit.prefetch = ThreadPoolExecutor(1)            # a forked process has no threads
    kit.init_distributed(SimpleNamespace(device="cpu"))
    kit.barrier()
    if attempt != "2":
        os._exit(9)
    assert kit.agreed(["zero", "one"][rank]) == "zero"
    s = stream(text_rows(21))
    (folder / f"{rank}.json").write_text(json.dumps(take(s, 12)))
    kit.barrier()
    if rank == 0:                                   # the other's prefetching never ends alone
        def main(argv):
            raise UserError("a mistake of one rank")
    else:
        def main(argv):
            kit.prefetch.submit(time.sleep, 99)
            raise UserError("seen by the other")
    kit.launch(main)


def test_ranks_meet_again_after_a_restart_share_batches_and_end_at_once(tmp_path):
    """torchrun --max-restarts: its store is the same for all attempts. Two ranks train on one
    rank's batches, and a rank that fails does not wait for the other's thread."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context, deadline = torch.multiprocessing.get_context("fork"), time.time() + 30
    for attempt in "012":
        workers = [context.Process(target=torchrun_worker, args=(str(store.port), attempt, rank,
                                                                 tmp_path)) for rank in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(max(0, deadline - time.time()))
        codes = [worker.exitcode for worker in workers]
        for worker in workers:
            worker.kill()
        assert attempt < "2" or codes == [2, 2]     # None: it hangs
    parts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    whole = take(stream(text_rows(21)), 12)
    assert [sorted(a + b) for a, b in zip(*parts)] == [sorted(batch) for batch in whole]
    assert all(sum(parts[r], []) for r in range(2))


def test_a_worker_ends_when_its_parent_is_gone(tmp_path):
    worker = (f"import sys, os, time; sys.path.insert(0, {str(HERE)!r}); import model\n"
              "from types import SimpleNamespace as args\n"
              "os.environ.update(RANK='0', WORLD_SIZE='1', MASTER_ADDR='localhost',"
              " MASTER_PORT='0')\nmodel.init_distributed(args(device='cpu'))\n"
              "print('up', flush=True); time.sleep(99)")
    parent = subprocess.Popen(["bash", "-c", '"$0" -c "$1"; true', sys.executable, worker],
                              stdout=subprocess.PIPE)
    assert parent.stdout.readline() == b"up\n"
    parent.kill()
    parent.wait()
    began = time.time()
    assert parent.stdout.read() == b"" and time.time() - began < 30     # its end of the pipe closed


# ---- model.py: data --------------------------------------------------------------------------


def parse(raw, image_root=None):
    return kit.normalise_row(raw, "f.jsonl:3", Path("/data"), image_root, "0/f.jsonl:3")


def test_all_row_forms_parse_to_the_same_row():
    yo, blocks = {"role": "assistant", "content": "Yo"}, [{"type": "image"},
                                                          {"type": "text", "text": "\nHi"}]
    def user(content):
        return {"role": "user", "content": content}
    for raw in ({"messages": [user("<image>\nHi"), yo], "images": ["a.png"]},
                {"messages": [user("Hi"), yo], "images": ["a.png"]},     # leading if absent
                {"messages": [user(blocks), yo], "images": "a.png"},
                {"messages": [user(blocks), yo], "image": "a.png"},
                {"conversations": [{"from": "human", "value": "<image>\nHi"},
                                   {"from": "gpt", "value": "Yo"}], "image": "a.png"}):
        given = copy.deepcopy(raw)
        assert parse(raw) | {"id": 0} == {"id": 0, "where": "f.jsonl:3", "images": ["/data/a.png"],
                                          "messages": [user("<image>\nHi"), yo]}
        assert raw == given and parse(raw)["id"] == "0/f.jsonl:3"
        assert parse(raw, "/elsewhere")["images"] == ["/elsewhere/a.png"]
    for images in ([], None, ["None"], "None"):
        assert parse({"messages": [yo], "images": images})["images"] == []
    assert parse({"text": "Yo"})["messages"] == [yo]
    system = parse({"id": 7, "system": "S", "conversations": [{"from": "human", "value": "x"}]})
    assert system["messages"][0] == {"role": "system", "content": "S"} and system["id"] == "7"


def asks(content="x", **more):
    return {"messages": [{"role": "user", "content": content}], **more}


@pytest.mark.parametrize("raw", [
    [], 3, None, "messages", {}, {"messages": []}, {"messages": "x"}, {"messages": ["x"]},
    {"text": 4}, {"messages": [{"role": "tool", "content": "x"}]}, {"messages": [{"role": "user"}]},
    {"messages": [{"role": "assistant", "content": "x"}], "images": ["a"]}, asks(["x"]),
    asks([{"type": None}]), asks([{"type": "text", "text": None}]), asks(5), asks(None), asks({}),
    asks(images=5), asks(images=[{"path": "a"}]), asks(images=[None]), {"conversations": "x"},
    {"conversations": ["x"]}, {"conversations": []}, {"conversations": {"from": "human"}},
    {"conversations": [{"from": ["x"], "value": "y"}]}, {"conversations": [{"from": "gpt",
                                                                            "value": 3}]}], ids=str)
def test_a_bad_row_is_a_user_error_naming_file_and_line(raw):
    with pytest.raises(UserError, match="f.jsonl:3"):
        parse(raw)


UNUSABLE = [(asks("<image>"), "1 `<image>` placeholders but 0 images"),
            (asks("<image><image>", images=["a"]), "2 `<image>` placeholders but 1 images"),
            (asks("what is <|im_end|>?"), r"contains a literal <\|im_end"),
            (asks("what is <|image_pad|>?"), r"contains a literal <\|image_pad"),
            (asks("a\ud800b"), "half a character"), (asks("ok \U0001f600 and \udc00"), "half a ch")]


@pytest.mark.parametrize("raw,pattern", UNUSABLE, ids=range(len(UNUSABLE)))
def test_a_row_that_a_corpus_can_do_without_is_told_from_a_broken_one(raw, pattern):
    parsed_row = parse(raw)                         # well formed: reading a corpus goes on
    for prompt in (False, True):
        with pytest.raises(kit.UnusableRow, match=f"^f.jsonl:3: .*{pattern}"):
            tiny_agent().encoder.encode(parsed_row, prompt)
    assert issubclass(kit.UnusableRow, UserError)
    assert len(examples([row("all of \U0001f600, \xe9 and \0")])) == 1


def write(path, rows):
    """JSONL, or a JSON array where the name says so; `.gz` compressed."""
    data = (json.dumps(rows, indent=1) if ".json" in path.suffixes
            else "".join(json.dumps(r) + "\n" for r in rows)).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def text_rows(n):
    return [{"id": f"t{i}", "images": [], "messages": [
        {"role": "user", "content": f"number {i} "},
        {"role": "assistant", "content": "yes " * (i % 9 + 1)}]} for i in range(n)]


FORMS = ("a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz")


@pytest.mark.parametrize("name", FORMS)
def test_read_rows_from_every_position(tmp_path, name):
    file = write(tmp_path / name, text_rows(5))
    every = list(kit.read_rows(file))
    assert [r["id"] for r, _ in every] == [r["id"] for r in text_rows(5)]
    for k, (_, position) in enumerate(every):       # fails if off by one row
        assert list(kit.read_rows(file, None, position)) == every[k + 1:]
    if "jsonl" in name:                             # empty lines count as lines, and are no rows
        lines = [json.dumps(r) for r in text_rows(3)]
        (tmp_path / "b.jsonl").write_text("\n".join([lines[0], "", *lines[1:]]))
        every = list(kit.read_rows(str(tmp_path / "b.jsonl")))
        assert [position[1] for _, position in every] == [1, 3, 4]
        assert every[2][0]["where"].endswith("b.jsonl:4")
        assert list(kit.read_rows(str(tmp_path / "b.jsonl"), None, every[0][1])) == every[1:]


@pytest.mark.parametrize("name", FORMS)
def test_a_row_without_an_id_is_named_by_list_place_and_line_not_by_its_path(tmp_path, name):
    """Seeds and noise are keyed by it, so they depend on where no file lies."""
    def ids(*folders):
        for folder in folders:
            (tmp_path / folder).mkdir(exist_ok=True)
        files = [write(tmp_path / f / name, [{"text": f"yes {i}"} for i in range(3)])
                 for f in folders]
        s, found = stream(files), []
        while len(found) < 3 * len(files):
            found += sum(take(s, 1), [])
        return sorted(found)
    assert ids("one", "two") == [f"{place}/{name}:{n}" for place in (0, 1) for n in (1, 2, 3)]
    assert ids("three", "four") == ids("one", "two")
    assert ids("one") == [f"0/{name}:{n}" for n in (1, 2, 3)]
    file = write(tmp_path / name, [asks(id=None), asks(id=0), asks(id=["x"])])
    assert [r["id"] for r, _ in kit.read_rows(file)] == [f"0/{name}:1", "0", "['x']"]


GZIPPED = gzip.compress(b'{"text": "a"}\n' * 99)


@pytest.mark.parametrize("name,data,pattern", [
    ("f.jsonl", b'{"text": "a"}\n\n{"text": \n', "f.jsonl:3"),
    ("f.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "f.jsonl:2"),
    ("f.jsonl", b'{"text": "\xff"}\n', "f.jsonl:1"),
    ("f.jsonl", b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}\n", "f.jsonl:1"),
    ("f.jsonl", b'{"text": "a", "id": ' + b"9" * 5000 + b"}\n", "f.jsonl:1"),
    ("f.json", b"[" * 5000, "f.json: cannot be read as JSON"),
    ("f.json", b'\xef\xbb\xbf [{"text": "a"}, {"no": 1}]', "f.json: row 2"),
    ("f.json", b'[{"text": "a"}', "f.json: cannot be read as JSON"),
    ("f.jsonl.gz", GZIPPED[:-12], "f.jsonl.gz"), ("f.jsonl.gz", GZIPPED[:5], "f.jsonl.gz"),
    ("f.jsonl.gz", GZIPPED[:-8] + b"12345678", "f.jsonl.gz"), ("f.jsonl.gz", b"x", "f.jsonl.gz"),
    ("f.jsonl.gz", GZIPPED[:10] + b"\x07" + GZIPPED[11:], "f.jsonl.gz"),
    ("f.jsonl", None, "f.jsonl")], ids=range(14))
def test_unreadable_files_are_named_with_their_line(tmp_path, name, data, pattern):
    file = str(tmp_path / name)
    if data:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=pattern) as error:
        list(kit.read_rows(file))
    assert len(str(error.value)) < 200 + len(file)
    with pytest.raises((UserError, OSError)):       # launch() makes one line of both
        for _ in range(2):
            stream([file]).next()


def test_bad_images_are_named_and_refused(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    picture().save(tmp_path / "cut.png")
    os.truncate(tmp_path / "cut.png", 3000)
    Image.new("1", (16000, 16000)).save(tmp_path / "bomb.png")
    Image.new("RGB", (2000, 2)).save(tmp_path / "thin.png")
    for name in ("missing.png", "text.png", "cut.png", "bomb.png", "thin.png", "nul\0.png",
                 "half\ud800.png", "", "x" * 100_000):
        with pytest.raises(UserError, match="row r7") as error:
            collated([row("<image>?", None, [str(tmp_path / name)], "r7")])
        assert len(str(error.value)) < 400 and (name == "thin.png" or repr(name)[1:40].strip("'")
                                                in str(error.value))


def test_an_error_never_repeats_a_value_whole():
    long = "x" * 100_000
    for raw in ({"messages": [{"role": long, "content": "x"}]}, {"messages": [{long: 1}]},
                {"conversations": [{"from": long, "value": "x"}]}, asks(images=[{long: long}]),
                asks([{"type": "text", long: 1}]), {long: 1}, asks("<image>", id=long)):
        with pytest.raises(UserError) as error:
            tiny_agent().encoder.encode(parse(raw))
        assert len(str(error.value)) <= 200


# Pictures.


def encoder_of(image_tokens=None):
    """An encoder with the published limits of a picture."""
    agent = tiny_agent()
    processor = type(agent.encoder.processor)(
        size={"shortest_edge": 3136, "longest_edge": 12845056})
    return Encoder(agent.encoder.tokenizer, processor, agent.backbone, image_tokens)


@pytest.mark.parametrize("tokens", [16, 64, 256])
def test_pictures_keep_their_shape_within_the_budget(tokens):
    encoder = encoder_of(str(tokens))
    for width, height in ((4000, 3000), (3000, 4000), (640, 480), (100, 75), (1600, 400),
                          (300, 1000), (28, 28), (9, 7), (420, 280)):
        _, h, w = encoder.grid(Image.new("L", (width, height)), "x")
        assert h * w // 4 <= tokens and h % 2 == w % 2 == 0
        scale = min(max(1, math.sqrt(4 * 784 / width / height)),
                    math.sqrt(tokens * 784 / width / height))
        assert abs(14 * h - height * scale) <= 28 and abs(14 * w - width * scale) <= 28
        assert h * w * 196 > scale ** 2 * width * height / 2            # nor is it wasted
        for value, grid in (("280x420", (1, 20, 30)), ("420x280", (1, 30, 20))):
            assert encoder_of(value).grid(Image.new("L", (width, height)), "x") == grid
    e = encoder_of("280x420").encode(row("<image>", None, [picture(90, 50)]))
    assert (e.ids == tiny_agent().encoder.image_token).sum() == 150     # the release's


@pytest.mark.parametrize("size", [(200, 100), (30, 50), (56, 56), (333, 77)])
def test_pixels_equal_the_processors_own(size):
    encoder, image = encoder_of("64"), picture(*size)
    (e,) = [encoder.encode(row("<image>", None, [image]))]
    want = encoder.processor(images=[image], return_tensors="pt",
                             size={"shortest_edge": 3136, "longest_edge": 64 * 784})
    assert torch.equal(e.grids, want["image_grid_thw"])
    close(encoder.pixels(e), want["pixel_values"])


def seen(image):
    """Grid and pixels of one picture."""
    encoder = encoder_of("64")
    e = encoder.encode(row("<image>", None, [str(image) if isinstance(image, Path) else image]))
    return e.grids.tolist(), encoder.pixels(e)


TURNED = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
          6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_pictures_stand_upright(tmp_path, kind):
    """As cameras store them, lying on their side with a note in EXIF."""
    upright, file = Image.new("RGB", (112, 56)), tmp_path / "photo"
    for n, colour in enumerate(("red", "green", "blue", "white")):
        upright.paste(colour, (n % 2 * 56, n // 2 * 28, n % 2 * 56 + 56, n // 2 * 28 + 28))
    grid, pixels = seen(upright)
    for orientation in range(10):                   # 0 and 9 mean nothing
        lying, exif = upright, Image.Exif()
        if orientation in TURNED:
            lying = upright.transpose(Image.Transpose[TURNED[orientation]])
        exif[274] = orientation
        lying.save(file, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else
                                             {"quality": 100, "subsampling": 0} if kind == "JPEG"
                                             else {}))
        assert seen(file)[0] == grid                # fails if only the pixels are turned
        close(seen(file)[1], pixels, 0.05)


def test_sixteen_bit_pictures_keep_their_greys(tmp_path):
    greys = (np.arange(56 * 56).reshape(56, 56) * 20).astype(np.uint16)
    want = seen(Image.fromarray((greys / 257).astype(np.uint8)))[1]
    for kind, values in (("PNG", greys), ("TIFF", greys), ("TIFF", greys.astype(np.int32))):
        Image.fromarray(values).save(tmp_path / "scan", kind)
        got = seen(tmp_path / "scan")[1]
        close(got, want, 0.02)                      # fails if all above 255 is white
        assert got.std() > 0.3
    for mode in ("1", "L", "P", "LA", "RGBA", "CMYK"):          # all others are made RGB too
        assert seen(picture().convert(mode))[1].shape == want.shape


def test_a_huge_jpeg_is_decoded_small_and_headers_are_read_alone(tmp_path, monkeypatch):
    Image.new("RGB", (8000, 8000), "red").save(tmp_path / "huge.jpg")
    picture(300, 200).save(tmp_path / "plain.png")
    sizes, loads, resize, load = [], [], Image.Image.resize, PngImagePlugin.PngImageFile.load
    monkeypatch.setattr(Image.Image, "resize", lambda self, *a, **k: sizes.append(self.size)
                        or resize(self, *a, **k))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: loads.append(1)
                        or load(self))
    grid, pixels = seen(tmp_path / "huge.jpg")
    assert grid == [[1, 16, 16]] and pixels.std(0).max() < 1e-3
    assert sizes == [(1000, 1000)]                  # 64 megapixels are never held
    encoder = encoder_of("64")
    e = encoder.encode(row("<image>", None, [str(tmp_path / "plain.png")]))
    assert not loads                                # fails if a row's pictures are decoded twice
    encoder.pixels(e)
    assert loads


@pytest.mark.filterwarnings("ignore")
def test_mutated_pictures_are_used_or_refused(tmp_path):
    rng, exif, seeds, refused = random.Random(0), Image.Exif(), [], 0
    exif[274], exif[305] = 6, "kit"
    for kind in ("PNG", "JPEG"):
        for more in ({}, {"exif": exif}):
            data = io.BytesIO()
            picture(40, 30).save(data, kind, **more)
            seeds.append(data.getvalue())
    encoder = tiny_agent().encoder
    for n in range(100):
        data = bytearray(seeds[n % 4])
        for _ in range(rng.choice((1, 1, 3, 9))):
            at = rng.randrange(min(len(data), rng.choice((90, 90, len(data)))))
            data[at] = rng.choice((data[at] ^ 1 << rng.randrange(8), rng.randrange(256)))
        if n % 5 == 0:
            del data[rng.randrange(len(data)):]
        (tmp_path / "x").write_bytes(data)
        try:
            encoder.collate([encoder.encode(row("<image>?", "Yes.", [str(tmp_path / "x")]))])
        except UserError as error:
            refused += 1
            assert len(str(error)) < 400
    assert 20 < refused < 80


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entries", [               # tag, type, count and value: 274 is orientation
    [(274, 2, 4, b"abc\0")], [(274, 3, 2, b"\6\0\6\0")], [(274, 4, 1, b"\xff" * 4)],
    [(274, 7, 4, b"\6\0\0\0")], [(274, 12, 1, b"\xff" * 4)],
    *([(274, 3, 1, b"\6\0\0\0"), other] for other in (
        (305, 5, 1, b"\0" * 4), (305, 11, 1, b"kit\0"), (282, 1, 1, b"kit\0"),
        (282, 6, 1, b"\xff" * 4), (531, 4, 1, b"kit\0")))], ids=str)
def test_a_damaged_note_in_exif_is_passed_over_or_named(tmp_path, entries):
    tiff = b"II*\0\x08\0\0\0" + len(entries).to_bytes(2, "little") + b"".join(
        tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + n.to_bytes(4, "little") + value
        for tag, kind, n, value in entries) + b"\0" * 4
    notes = (tiff, tiff[:9], b"XX" + tiff[2:], b"MO\0*" + tiff[4:], tiff[:4] + b"\xff" * 4)
    for note, kind in itertools.product(notes, ("JPEG", "WEBP", "PNG")):
        picture(40, 30).save(tmp_path / "x.jpg", kind, exif=b"Exif\0\0" + note)
        try:
            seen(tmp_path / "x.jpg")
        except UserError as error:                  # fails if what PIL raises is anything else
            assert "x.jpg" in str(error)


JUNK = [None, True, 0, -1, 1e308, "", "x", "\0", "\ud800", "<image>", "<|im_end|>", "None", [], {},
        [[]], [None], {"type": "image"}, {"role": "user", "content": "x"}, "x" * 5000, 10 ** 40]


def mutated(value, rng):
    """A copy of a JSON value with one of its parts replaced, dropped, doubled or wrapped."""
    inner = isinstance(value, (list, dict)) and value and rng.random() < 0.8
    if not inner:
        return rng.choice((rng.choice(JUNK), rng.choice(JUNK), [value], {"text": value}))
    value = copy.copy(value)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    what = rng.random()
    if what < 0.75:
        value[key] = mutated(value[key], rng)
    elif what < 0.9:
        del value[key]
    elif isinstance(value, list):
        value.append(value[key])
    else:
        value[rng.choice(("text", "images", "content", "x"))] = value.pop(key)
    return value


def test_mutated_rows_are_used_or_refused(tmp_path):
    """300 rows from a seed, changed as JSON and as bytes: a UserError or nothing."""
    picture().save(tmp_path / "a.png")
    blocks = [{"type": "image"}, {"type": "text", "text": "Hi"}]
    seeds = [asks("<image>What?", images=["a.png"], id="q"), asks(blocks, image="a.png"),
             {"text": "A red star."}, text_rows(1)[0], {"system": "S", "images": ["None"],
             "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}]
    rng, file, encoder = random.Random(0), tmp_path / "f.jsonl", tiny_agent().encoder
    outcomes = Counter()
    for n in range(300):
        raw = seeds[n % len(seeds)]
        for _ in range(rng.choice((1, 1, 2, 4))):
            raw = mutated(raw, rng)
        data = bytearray(json.dumps(raw, ensure_ascii=n % 4 != 0).encode("utf-8", "surrogatepass"))
        for _ in range(rng.choice((1, 3)) if n % 3 == 0 else 0):
            at = rng.randrange(len(data))
            data[at:at + rng.choice((0, 1, 1, 9))] = rng.choice((
                b"", b"\0", b"\xff", b'"', b"{", b"[", b"\\ud800", bytes([rng.randrange(256)])))
        file.write_bytes(data + b"\n")
        try:
            for r, _ in kit.read_rows(str(file)):
                asked, last = r["messages"][:-1], r["messages"][-1]         # tasks want a prompt
                prompts = [True] * (bool(asked) and "<image>" not in last["content"])
                for prompt in (False, *prompts):
                    encoder.collate([encoder.encode(r, prompt)])
            outcomes["used"] += 1
        except UserError as error:
            assert len(str(error)) < 400 and str(file) in str(error)
            outcomes["refused"] += 1
    assert outcomes["used"] > 30 and outcomes["refused"] > 100


# Positions and targets.


def test_golden_positions_worked_by_hand():
    # a b [2 x 3 image tokens] c d, then a 1 x 2 image; the image starts at 2, text after it at
    # 2 + max(2, 3) = 5. Fails if the next text position is the number of tokens so far.
    I, grids = 9, torch.tensor([[1, 4, 6], [1, 2, 4]])
    ids = torch.tensor([1, 1, *[I] * 6, 1, 1, I, I, 1])
    close(positions_by_brute_force(ids, grids, I), torch.tensor([
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7, 7, 9],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7, 7, 9],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 9]]))


def positions_by_brute_force(ids, grids, image_token):
    """Text at (p, p, p), image tokens at their place in a grid of half the patches: (3, T)."""
    positions, p, grids = [], 0, iter(grids.tolist())
    while len(positions) < len(ids):
        if ids[len(positions)] == image_token:
            _, height, width = next(grids)
            positions += [(p, p + y, p + x) for y in range(height // 2) for x in range(width // 2)]
            p += max(height, width) // 2
        else:
            positions.append((p, p, p))
            p += 1
    return torch.tensor(positions).T


@pytest.mark.parametrize("sizes", [[], [(56, 56)], [(112, 28)], [(28, 112), (56, 56), (56, 28)]])
def test_positions_are_the_golden_ones_in_every_supported_transformers(sizes):
    for before, after in itertools.product(("", "Look here: "), ("", " and tell me more.")):
        text = before + " then ".join(["<image>"] * len(sizes)) + after
        (e,) = examples([row(text or "x", "Yes.", [picture(*s) for s in sizes])])
        assert torch.equal(e.positions.T, positions_by_brute_force(
            e.ids, e.grids, tiny_agent().encoder.image_token))


def said(r):
    """The text of the tokens that are learned of a row of which only the responses are."""
    e = tiny_agent().encoder.encode(r, responses_only=True)
    return tiny_agent().encoder.tokenizer.decode(e.tokens[1:][e.predicts[:-1]])


def test_encode_and_collate_mark_texts_responses_and_targets():
    encoder = tiny_agent().encoder
    decode, batch = encoder.tokenizer.decode, collated()
    turns = ["S", "<image>a", "one.", "b", "two."]
    roles = ["system", "user", "assistant", "user", "assistant"]
    r = {"id": "m", "images": [picture()], "messages": [
        {"role": role, "content": c} for role, c in zip(roles, turns)]}
    e, p = encoder.encode(r), encoder.encode(r, prompt=True)
    assert said(r) == "one.<|im_end|>two.<|im_end|>"
    assert (e.ids == encoder.image_token).sum() == 4 and len(e) - len(e.tokens) == 6
    assert decode(p.ids).endswith("b<|im_end|>\n<|im_start|>assistant\n")
    assert torch.equal(p.ids, e.ids[:len(p)])       # the prompt is a prefix of the full row
    for b, e in enumerate(examples()):
        m = int(batch.text_lengths[b])
        text = ~torch.isin(e.ids, encoder.vision_ids)
        index, vision = batch.text_index[b, :m], (~text).nonzero()[:, 0].tolist()
        assert m == text.sum() == batch.real[b].sum()
        assert torch.equal(batch.tokens[b, :m], e.ids[text])
        assert torch.equal(batch.ids[b, :len(e)], e.ids) and batch.lengths[b] == len(e)
        assert torch.equal(batch.positions[:, b, :len(e)], e.positions.T)
        assert torch.equal(batch.ids[b][index], batch.tokens[b, :m])
        # one by one: predict every text token right after a text token; seen: after an image
        wanted = [t + 1 < m and bool(index[t + 1] == index[t] + 1) for t in range(m)]
        assert batch.predicts[b, :m].tolist() == wanted and not batch.predicts[b, m:].any()
        assert batch.seen_image[b, :m].tolist() == [
            bool(vision) and t > vision[1] for t in index.tolist()]
    answers = [encoder.encode(r, responses_only=True) for r in ROWS]
    _, targets = encoder.collate(answers).labelled()
    assert decode(targets) == "".join(f"{a}<|im_end|>" for a in ("A red star.", "No.",
                                                                 "The second."))


@pytest.mark.parametrize("start", ["\n", "\n\n", " ", "\t\n x"])
def test_responses_that_start_with_white_space_are_found(start):
    answer = row("a", start + "one.")               # "\n" of the template merges with the answer's
    assert said(answer).endswith("one.<|im_end|>")


def stream(source, encoder=None, **kw):
    return Stream(source, encoder or tiny_agent().encoder, **{
        "batch_tokens": 150, "seed": 1, "block": 8, "max_tokens": 60, **kw})


def take(s, n):
    return [[e.id for e in s.next()] for _ in range(n)]


def rows_taken(s, n):
    """The ids of the next n rows, which must end with a batch."""
    ids = []
    while len(ids) < n:
        ids += sum(take(s, 1), [])
    assert len(ids) == n
    return ids


def settle():
    """Wait until the prefetching thread has nothing to do."""
    kit.prefetch.submit(lambda: None).result()


class CountingTokenizer:
    """A tokenizer that keeps the texts it is given, and takes its time."""

    def __init__(self, seconds=0.0):
        self.inner, self.texts, self.seconds = tiny_agent().encoder.tokenizer, [], seconds

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def encode(self, text, **more):
        if "\n" in text:                            # a row's, not what the encoder looks up
            self.texts.append(text)
            time.sleep(self.seconds)
        return self.inner.encode(text, **more)

    def encoder(self):
        return Encoder(self, tiny_agent().encoder.processor, tiny_agent().backbone)


@pytest.mark.parametrize("name", [*FORMS, None])
def test_stream_covers_an_epoch_and_resumes_at_the_exact_row(tmp_path, name):
    source = [write(tmp_path / name, text_rows(21))] if name else text_rows(21)
    first = rows_taken(stream(source), 21)          # blocks end with the pass
    assert sorted(first) == sorted(r["id"] for r in text_rows(21))          # each row once
    one, cursors, batches = stream(source), [], []
    for _ in range(12):
        cursors.append(copy.deepcopy(one.state_dict()))
        batches += take(one, 1)
        settle()                                    # the next batch is ready: not in the cursor
        assert one.state_dict() != cursors[-1]
    for k in (0, 1, 4, 9):                          # fails if the cursor misses block or epoch
        again = stream(source)
        take(again, 2)                              # fails if what it had read is kept
        again.load_state_dict(cursors[k])
        assert take(again, 12 - k) == batches[k:]
    assert len({str(take(stream(source, seed=s), 1)) for s in range(4)}) > 1
    assert all(sum(map(len, stream(source).next())) <= 150 for _ in range(3))


@pytest.mark.parametrize("name", ["a.jsonl", None])
def test_each_row_is_tokenised_once_a_pass_and_ahead_of_its_step(tmp_path, name):
    source, tokenizer = text_rows(21), CountingTokenizer()
    s = stream([write(tmp_path / name, source)] if name else source, tokenizer.encoder())
    for passes in (1, 2, 3):
        rows_taken(s, 21)
        settle()                                    # a block of 7 rows is ready beyond the pass
        counts = Counter(tokenizer.texts)
        assert len(counts) == 21 and sum(counts.values()) == (21 * passes + 7 if name else 21)
        assert set(counts.values()) == ({passes, passes + 1} if name else {1})
    n = len(tokenizer.texts)
    s.next()                                        # fails if collating tokenises anew
    assert len(tokenizer.texts) == n


def test_pictures_are_decoded_ahead_and_order_does_not_depend_on_the_thread(tmp_path):
    source = [row("<image>?", "No. " * (i % 5), [picture(56, 28, i)], f"p{i}") for i in range(12)]
    got = stream(source).next()
    for e in got:
        assert torch.equal(e.pixels, tiny_agent().encoder.pixels(e))
    assert all(e.pixels is None for e in stream(text_rows(3)).next())
    assert tiny_agent().encoder.collate(got).pixels.shape[0] == sum(len(e.pixels) for e in got)
    alone = [take(stream(text_rows(21), seed=k), 9) for k in (1, 2)]
    two = [stream(text_rows(21), CountingTokenizer(0.002).encoder(), seed=k) for k in (1, 2)]
    turns = [take(s, 1)[0] for _ in range(9) for s in two]      # one thread for both
    assert turns[::2] == alone[0] and turns[1::2] == alone[1]


def test_a_cursor_is_taken_while_the_next_batch_is_in_the_making(tmp_path):
    """Fails if loading a cursor does not wait for the thread that is reading on."""
    file = write(tmp_path / "a.jsonl", text_rows(21))
    whole = take(stream([file]), 12)
    for k in range(1, 6):
        s = stream([file], CountingTokenizer(0.003).encoder())
        start = s.state_dict()
        take(s, k)
        middle = s.state_dict()                     # the thread may be anywhere by now
        s.load_state_dict(start)
        assert take(s, 3) == whole[:3]
        s.load_state_dict(middle)
        assert take(s, 3) == whole[k:k + 3]


def test_a_mistake_met_ahead_is_told_at_its_own_step(tmp_path):
    """A picture that is gone stops the step that needs it, and the steps before it are saved."""
    rows = [row("<image>?", "Yes. " * (i % 4 + 1), [str(tmp_path / f"{i}.png")], f"p{i}")
            for i in range(12)]
    for i in range(12):
        picture(56, 28, i).save(tmp_path / f"{i}.png")
    order = take(stream(rows), 4)
    os.truncate(tmp_path / f"{order[2][0][1:]}.png", 60)
    s = stream(rows)
    assert take(s, 2) == order[:2]
    cursor = s.state_dict()
    for _ in range(2):
        with pytest.raises(UserError, match=f"row {order[2][0]}"):
            s.next()
    assert s.state_dict() == cursor
    picture(56, 28, int(order[2][0][1:])).save(tmp_path / f"{order[2][0][1:]}.png")
    again = stream(rows)
    again.load_state_dict(cursor)
    assert take(again, 2) == order[2:]


# Several files.


def files_of(folder, sizes, name="{}.jsonl"):
    """A file for each letter and its number of rows, whose ids start with the letter."""
    return [write(folder / name.format(k), [{**r, "id": f"{k}{i}"} for i, r in
                                            enumerate(text_rows(n))]) for k, n in sizes.items()]


def counted(ids):
    return Counter(i[0] for i in ids)


@pytest.mark.parametrize("name", ["{}.jsonl", "{}.json.gz"])
def test_files_are_interleaved_in_proportion_and_held_out_from_each(tmp_path, name):
    sizes = {"a": 10, "b": 20, "c": 30, "d": 60}
    files = files_of(tmp_path, sizes, name)
    first = rows_taken(stream(files, block=30), 120)
    assert sorted(first) == sorted(f"{k}{i}" for k, n in sizes.items() for i in range(n))
    for quarter in range(4):                        # fails if one file is read after the other
        part = counted(first[30 * quarter:30 * quarter + 30])
        assert all(abs(part[k] - n / 4) <= 1 for k, n in sizes.items())
    held = stream(files, block=30, hold_out=16)
    assert counted(e.id for e in held.held_out) == {"a": 1, "b": 2, "c": 3, "d": 4}
    kept = {e.id for e in held.held_out}
    assert not kept & set(sum(take(held, 60), []))  # in no pass


def test_files_are_interleaved_by_weight_if_asked(tmp_path):
    a, b = files_of(tmp_path, {"a": 10, "b": 50})
    ids = sum(take(stream([f"{a}=3", f"{b}=1"], block=12), 40), [])[:60]
    assert counted(ids) == {"a": 45, "b": 15}       # the smaller file is read several times
    odd = write(tmp_path / "x=2", text_rows(4))     # a file's own name comes first
    assert {i[0] for i in sum(take(stream([odd]), 3), [])} == {"t"}
    for weight in ("abc", "", "nan", "-1", "inf"):
        with pytest.raises(UserError, match="a.jsonl"):
            stream([f"{a}={weight}", b]).next()
    with pytest.raises((UserError, OSError), match="missing"):
        stream([f"{tmp_path}/missing.jsonl=2"])


@pytest.mark.parametrize("weights", [("", "", "", ""), ("=1", "=2", "=1", "=5")], ids=str)
def test_an_interleaved_stream_resumes_at_the_exact_row(tmp_path, weights):
    sizes = {"a": 3, "b": 11, "c": 17, "d": 40}
    files = [f + w for f, w in zip(files_of(tmp_path, sizes), weights)]
    one, cursors, batches = stream(files, hold_out=4), [], []
    for _ in range(24):
        torch.save(one.state_dict(), tmp_path / "cursor")       # as a checkpoint keeps it
        cursors.append(torch.load(tmp_path / "cursor", weights_only=True))
        batches += take(one, 1)
    assert len({str(c["positions"]) for c in cursors}) > 3
    for k in range(0, 24, 5):
        again = stream(files, hold_out=4)
        again.load_state_dict(cursors[k])
        assert take(again, 24 - k) == batches[k:]
    with pytest.raises(ValueError):                 # of other files: Run.resume says it
        stream(files[:2]).load_state_dict(cursors[3])


@pytest.mark.parametrize("name", FORMS)
def test_a_large_files_rows_are_estimated_and_a_small_ones_counted(tmp_path, name):
    file = write(tmp_path / name, [{"text": f"{i} " + "yes " * 150} for i in range(4000)])
    assert kit.count_rows(file) == pytest.approx(4000, rel=0.2)     # 2.5 MB
    assert kit.count_rows(write(tmp_path / name, text_rows(7))) == 7


@pytest.mark.parametrize("name", FORMS)
def test_no_file_is_read_anew_for_every_block(tmp_path, monkeypatch, name):
    file, calls = write(tmp_path / name, text_rows(40)), Counter()
    for module, function in ((json, "load"), (gzip, "open")):
        def counting(*a, _of=getattr(module, function), _name=function, **k):
            calls[_name] += 1
            return _of(*a, **k)
        monkeypatch.setattr(module, function, counting)
    s = stream([file])
    for passes in (1, 2, 3):                        # of five blocks each
        rows_taken(s, 40)
        settle()
        assert calls["load"] <= ("json" in name.split(".")) * (passes + 2)
        assert calls["open"] <= (name.endswith("gz")) * (passes + 3)


# Rows left out.


def test_stream_cuts_over_long_rows_at_a_message_boundary_and_holds_out(capsys):
    roles = ("user", "assistant", "user", "assistant")
    turns = [{"role": role, "content": c} for role, c in
             zip(roles, ("hi", "yo", "<image>more", "never " * 50))]
    huge = {"id": "gone", "images": [], "messages": [{"role": "user", "content": "x " * 99}]}
    (got,) = stream([{"id": "cut", "images": [picture()], "messages": turns}, huge]).next()
    (want,) = examples([{"id": "cut", "images": [], "messages": turns[:2]}])
    assert torch.equal(got.ids, want.ids) and got.images == []
    assert "1 rows left out: row gone: over 60 tokens" in capsys.readouterr().out
    same = stream([{**r, "id": "same"} for r in text_rows(3)]).next()   # fails if cached by id
    assert len({tuple(e.ids.tolist()) for e in same}) == 3
    s = stream(text_rows(21), hold_out=3)           # at most a tenth of the corpus
    assert [e.id for e in s.held_out] == ["t0", "t1"]
    assert set(sum(take(s, 30), [])) == {f"t{i}" for i in range(2, 21)}


def test_rows_left_out_of_a_corpus_are_named_once_with_their_cause(tmp_path, capsys):
    picture().save(tmp_path / "p.png")
    bad = [raw for raw, _ in UNUSABLE] + [asks("x " * 99), asks("<image>hi", images=["p.png"])]
    file = write(tmp_path / "f.jsonl", text_rows(6) + bad + [{"text": "<image> x", "id": "web"}])
    got = set(sum(take(stream([file], block=99, pictures=False), 20), []))
    assert got == {f"t{i}" for i in range(6)} | {"web"}         # the tag of a web page is text
    out = capsys.readouterr().out
    assert out.count("note:") == 1 and out.count("f.jsonl:") == 3 and len(out) < 600
    assert f"note: {len(bad)} rows left out: {tmp_path}/f.jsonl:7: 1 `<image>` place" in out
    for n, ((raw, pattern), again) in enumerate(itertools.product(
            [*UNUSABLE, (bad[-2], "over 60 tokens"), (bad[-1], "has 1 images, but --paired")],
            (1, 4))):                               # every cause; over several passes said once
        file = write(tmp_path / f"g{n}.jsonl", [raw, *text_rows(2)])
        s = stream([file], pictures=False if "--paired" in pattern else None)
        assert set(sum(take(s, 3 * again), [])) == {"t0", "t1"}
        out = capsys.readouterr().out
        assert re.search(rf"note: 1 rows left out: .*g{n}.jsonl:1: .*{pattern}", out)
        assert out.count("left out") == 1
    for raw, _ in UNUSABLE:                         # a task's demonstrations are not left out
        with pytest.raises(kit.UnusableRow, match="f.jsonl:3"):
            stream([parse(raw)], responses_only=True).next()
    file = write(tmp_path / "h.jsonl", [asks("hi"), asks("<image>hi", images=["p.png"], id="p")])
    assert set(sum(take(stream([file], pictures=True), 4), [])) == {"p"}
    assert "h.jsonl:1: has 0 images, but --paired takes rows with" in capsys.readouterr().out


def test_a_broken_row_of_a_corpus_is_not_left_out(tmp_path):
    file = write(tmp_path / "f.jsonl", [*text_rows(4), {"txt": "typo"}])
    with pytest.raises(UserError, match="f.jsonl:5: no `messages`"):
        take(stream([file]), 9)


@pytest.mark.parametrize("raw,more,pattern", [
    (asks("x " * 99), {}, "over 60 tokens"), (asks("<|im_end|>"), {}, "literal"),
    (asks("hi"), {"pictures": True}, "--paired takes rows with")], ids=range(3))
def test_a_corpus_of_which_nothing_is_left_is_refused(tmp_path, raw, more, pattern):
    """Fails if it trains on nothing: an endless loop, or empty batches."""
    file, other = (write(tmp_path / f"{name}.jsonl", [raw] * 20) for name in "fg")
    for source in ([file], [file, other], [{"id": "x", "images": [], **raw}] * 20):
        for hold_out in (0, 4):
            with pytest.raises(UserError, match=f"not one row can be trained on.*{pattern}"
                               ) as error:
                stream(source, hold_out=hold_out, **more).next()
            assert len(str(error.value)) < 500
    long_run = write(tmp_path / "h.jsonl", [raw] * 40 + [
        asks("<image>hi", images=["p.png"], id="ok") if more else asks("hi", id="ok")])
    picture().save(tmp_path / "p.png")
    assert take(stream([long_run], **more), 3) == [["ok"]] * 3  # blocks without rows are passed
    with pytest.raises(UserError, match="no rows"):
        stream(["/dev/null"]).next()
    with pytest.raises(UserError, match="no rows"):
        stream([]).next()


@needs_shared
@pytest.mark.parametrize("name", ["MM_pretrain.json", "TextOnly_pretrain.json"])
def test_released_pretraining_rows_parse(name):
    file = SHARED / "pretrain_example" / name
    rows = [r for r, _ in kit.read_rows(str(file))]
    assert len(rows) == len(json.loads(file.read_text())) > 10
    assert all(bool(r["images"]) == name.startswith("MM") for r in rows)
    for r in [] if name.startswith("MM") else rows:             # the images are not here
        answers = " ".join(m["content"] for m in r["messages"] if m["role"] == "assistant")
        assert said(r).replace("<|im_end|>", " ").split() == answers.split()


# ---- model.py: modules -----------------------------------------------------------------------


def test_parameter_counts_at_the_3b_shape_are_the_papers():
    c = Qwen2_5_VLConfig(text_config=dict(
        vocab_size=151_936, hidden_size=2048, intermediate_size=11_008, num_hidden_layers=36,
        num_attention_heads=16, num_key_value_heads=2, rms_norm_eps=1e-6, rope_parameters={
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]})).text_config
    for make, millions in ((lambda: CausalStack(c, 4, 128), 308.6),
                           (lambda: CausalStack(c, 8, 128), 616.9),
                           (lambda: WorldModel(2048, c.intermediate_size), 225.4),
                           (lambda: Projector(2048), 16.8), (lambda: nn.Embedding(128, 2048), .26)):
        with torch.device("meta"):
            n = sum(p.numel() for p in make().parameters())
        assert n / 1e6 == pytest.approx(millions, abs=0.05)


def test_world_model_and_gaussian_map_by_hand():
    world, x, c = WorldModel(1, 1), 0.7, 0.4        # x + down * silu(gate.[x, c]) * (up.[x, c])
    for block, (gate, up, down) in zip(world.blocks, ((1.0, 2.0, 3.0), (-1.0, 0.5, 2.0))):
        block["gate"].weight.data[:] = torch.tensor([[gate, 1.0]])
        block["up"].weight.data[:] = torch.tensor([[up, -1.0]])
        block["down"].weight.data[:] = down
        z = gate * x + c
        x = x + down * z / (1 + math.exp(-z)) * (up * x - c)
    close(world(torch.tensor([0.7]), torch.tensor([0.4])), [x])
    e, m = torch.randn(5, 6), GaussianMap(6)
    assert torch.equal(m.mu(e), e) and torch.equal(m(e)[1], torch.zeros(5, 6))    # untrained
    shake(m, 1.0)
    mu, log_var = (torch.tanh(e @ net[0].weight.T + net[0].bias) @ net[2].weight.T + net[2].bias
                   for net in (m.mlp, m.mlp_log_var))
    close(m.mu(e), e + mu)                          # fails if mu is not residual
    close(m(e)[1], torch.tanh(log_var))


@pytest.mark.parametrize("masked", [False, True])
def test_token_logprobs_equal_brute_force_in_any_chunk(masked):
    torch.manual_seed(0)
    head, x, targets = nn.Linear(8, 11), torch.randn(7, 8, requires_grad=True), torch.arange(7)
    bias, seen = torch.zeros(11), []
    bias[9:] = -math.inf if masked else 0.0
    want, params = torch.log_softmax(head(x) + bias, -1)[range(7), targets], [x, *head.parameters()]
    head.register_forward_hook(lambda module, inputs, out: seen.append(len(out)))
    for chunk in (1, 22, 33, 2 ** 24):
        seen.clear()
        got = token_logprobs(head, x, targets, bias if masked else None, chunk)
        assert max(seen) == max(1, min(7, chunk // 11))     # never more logits than `chunk`
        close(got, want)
        for a, b in zip(gradients((got * targets).sum(), params),
                        gradients((want * targets).sum(), params)):
            close(a, b)
    empty = token_logprobs(head, x[:0], targets[:0])        # a rank without labelled tokens
    assert empty.shape == (0,) and empty.sum().requires_grad


def test_choose_draws_each_action_with_its_probability():
    logits, n = torch.tensor([0.3, -math.inf, 1.0, -2.0, 0.0, -math.inf]), 20_000
    p = F.softmax(logits / 0.5, -1)
    actions, logps = choose(logits.expand(n, -1), (torch.arange(n) + 0.5) / n, 0.5)
    close(torch.bincount(actions, minlength=6) / n, p, 1e-4)    # fails without the temperature
    close(logps, p.log()[actions])
    edges, _ = choose(torch.tensor([-math.inf, 0.0, 0.0, -math.inf]).expand(2, -1),
                      torch.tensor([0.0, 1 - 2 ** -24]), 1.0)
    assert edges.tolist() == [1, 2]                 # never outside the support
    best, logp = choose(logits[None], torch.tensor([0.99]), 0.0)
    assert best.item() == 2 and logp.item() == pytest.approx(logits.log_softmax(-1)[2].item())


# ---- model.py: agent and rollouts ------------------------------------------------------------


TEMPLATES = ("tokenizer_config.json", "chat_template.json", "chat_template.jinja")


def qwen_folder(folder, template="chat_template.json", shard="200KB"):
    """A Qwen2.5-VL as the hub has it: shards, untied head, the published image settings."""
    _, tokenizer, processor = stage1.tiny_base(DOCUMENTS, seed=0, width=64, layers=2, vocab=400)
    config = Qwen2_5_VLConfig.from_dict({**tiny_agent().backbone.config.to_dict(),
                                         "tie_word_embeddings": False})
    torch.manual_seed(1)
    base = shake(Qwen2_5_VLForConditionalGeneration(config), 0.1)
    base.save_pretrained(folder, max_shard_size=shard)
    chat, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    for key in ("size", "shortest_edge", "longest_edge"):
        settings.pop(key, None)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {
        "min_pixels": 3136, "max_pixels": 12845056, "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor"}))
    if template.endswith("jinja"):
        (folder / template).write_text(chat)
    else:
        old = json.loads((folder / template).read_text()) if (folder / template).exists() else {}
        (folder / template).write_text(json.dumps(old | {"chat_template": chat}))
    return base.eval(), chat


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_qwen_folder_loads_in_every_published_form(tmp_path, template):
    base, chat = qwen_folder(tmp_path, template)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    model, tokenizer, processor = kit.load_base(tmp_path, torch.float32)
    assert tokenizer.chat_template == chat
    assert model.lm_head.weight is not model.model.language_model.embed_tokens.weight
    for (name, a), b in zip(base.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name
    big = row("<image>?", None, [picture(1120, 840)])
    for image_tokens, (h, w) in ((None, (60, 80)), ("256", (26, 36)), ("280x420", (20, 30))):
        encoder = Encoder(tokenizer, processor, model, image_tokens)
        p = encoder.encode(big, prompt=True)
        assert p.grids.tolist() == [[1, h, w]] and encoder.pixels(p).shape == (h * w, 1176)
        assert (p.ids == encoder.image_token).sum() == h * w // 4


def test_what_is_not_a_qwen_folder_is_refused(tmp_path):
    cases = {"empty": {}, "other": {"model_type": "llama"}, "bare": {"model_type": "qwen2_5_vl"}}
    for name, config in cases.items():
        (tmp_path / name).mkdir()
        if config:
            (tmp_path / name / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=f"{name}.*(cannot be loaded|not Qwen2.5-VL)"):
            kit.load_base(tmp_path / name, torch.float32)
    base, _ = qwen_folder(tmp_path / "part")
    save_file({"lm_head.weight": base.lm_head.weight.data}, tmp_path / "part" / "model.safetensors")
    with pytest.raises(UserError, match="part.*weights are missing"):
        kit.load_base(tmp_path / "part", torch.float32)
    qwen_folder(tmp_path / "torn", shard="9GB")
    os.truncate(tmp_path / "torn" / "model.safetensors", 5000)
    with pytest.raises(UserError, match="torn.*cannot be loaded"):
        kit.load_base(tmp_path / "torn", torch.float32)


def full_pass(example, ids=None):
    """transformers' own forward pass over one row: hidden states of every layer, positions."""
    agent, ids = tiny_agent(), example.ids if ids is None else ids
    positions = positions_by_brute_force(ids, example.grids, agent.encoder.image_token)[:, None]
    pixels = agent.encoder.pixels(example)
    out = agent.backbone.model(
        input_ids=ids[None], position_ids=positions, pixel_values=pixels, output_hidden_states=True,
        image_grid_thw=None if pixels is None else example.grids)
    return out.hidden_states, positions


def test_states_are_the_backbones_and_text_only_rows_are_projected():
    agent, batch = tiny_agent(), collated()
    e, e_t, states = agent.embeddings(batch), agent.text_embeddings(batch), agent.states(batch)
    off = copy.copy(agent)
    off.structure = {**agent.structure, "without": ["projector"]}
    assert torch.equal(off.states(batch), e) and not states.requires_grad
    for b, ex in enumerate(examples()):             # padding and batch mates change nothing
        want = full_pass(ex)[0][-1][0, ex.text_index]
        n = len(want)
        close(e[b, :n], want)
        close(states[b, :n], want if len(ex.grids) else agent.projector.P.mu(want))
        # the text-only pass aligns token by token: the row without image, at plain positions
        plain = agent.backbone.model(input_ids=ex.tokens[None], position_ids=torch.arange(
            n).expand(3, 1, -1)).last_hidden_state[0]
        close(e_t[b, :n], plain)
        seen = batch.seen_image[b, :n]              # equal up to the first image, then not
        close(want[~seen], plain[~seen])
        assert not seen.any() or (want - plain)[seen].abs().amax(-1).min() > 1e-3
    assert (states[1] - e[1]).abs().max() > 0.1     # mu_P does something


def test_an_untrained_world_model_is_the_base_model():
    agent, encoder = with_modules(tiny_agent(), world=WorldModel(64, 160)), tiny_agent().encoder
    for ex in examples([ROWS[0], ROWS[2]], prompt=True):
        s = agent.states(encoder.collate([ex]))[0]
        got, allowed = agent.next_token_logits(s, torch.arange(len(s)) % 16), agent.token_bias == 0
        hidden = full_pass(ex)[0][-1][0, ex.text_index]
        close(got[:, allowed], agent.backbone.lm_head(hidden)[:, allowed])
        names = encoder.tokenizer.convert_ids_to_tokens((~allowed).nonzero()[:, 0].tolist())
        assert set(names) == set(kit.VISION_TOKENS) and (got[:, ~allowed] == -math.inf).all()
        out = rollout(agent, [ex], 1, 12, 0.0)      # whatever the codes: the base model's own text
        theirs = agent.backbone.generate(
            input_ids=ex.ids[None], attention_mask=torch.ones_like(ex.ids)[None], do_sample=False,
            pixel_values=encoder.pixels(ex), image_grid_thw=ex.grids, max_new_tokens=12,
            mm_token_type_ids=(ex.ids == encoder.image_token).int()[None],
            suppress_tokens=encoder.vision_ids.tolist())[0, len(ex):]
        n = int(out.mask.sum())
        assert theirs[:n].tolist() == out.tokens[0, :n].tolist()
    assert isinstance(agent.chat("Hi", picture(), max_new_tokens=3), str)
    for message, more in (("<image>", {}), ("x", {"history": [{"role": "user",
                                                              "content": "<image>"}]})):
        with pytest.raises(UserError, match="row chat: 1 `<image>` placeholders but 0 images"):
            agent.chat(message, **more)
    with pytest.raises(UserError, match="chat: this run has no policy"):
        with_modules(agent, policy=None).chat("Hi")


def brute_force(agent, r, temperature):
    """Log-prob of every action and the token it leads to, one full pass for each answer."""
    logps, best = torch.zeros_like(r.logps), torch.zeros_like(r.tokens)
    for n, (k, said) in enumerate(zip(r.mask.sum(1).tolist(), r.tokens)):
        prompt = examples([ROWS[n // r.group]], prompt=True)[0]
        hidden, positions = full_pass(prompt, torch.cat([prompt.ids, said[:k]]))
        if agent.space == "token":                  # the trunk's layers, then the policy's
            x = hidden[-len(agent.policy.layers) - 1]
            logits = agent.policy(x, positions) + agent.token_bias
            logits, best[n, :k] = logits[0, len(prompt) - 1:-1], said[:k]
        else:
            s = hidden[-1][:, torch.cat([prompt.text_index, len(prompt) + torch.arange(k)])]
            s = s if len(prompt.grids) else agent.projector.P.mu(s)
            own = slice(len(prompt.tokens) - 1, -1)
            logits = agent.policy(s, kit.text_positions(s))[0, own]
            x = agent.world(s[0, own], agent.codebook(r.actions[n, :k]))
            best[n, :k] = (agent.backbone.lm_head(x) + agent.token_bias).argmax(-1)
            close(r.inputs[n, :k], s[0, own])       # training's states, mu_P included
        logps[n, :k] = F.log_softmax(logits / temperature, -1)[range(k), r.actions[n, :k]]
    return logps, best


def roll(space="latent", stop=40):
    """A rollout of ROWS, 3 answers each; `stop` makes that many tokens end the turn."""
    agent = copy.copy(tiny_agent(space))
    agent.encoder = copy.copy(agent.encoder)
    agent.encoder.stop_ids = torch.arange(1, 400, 400 // stop) if stop else torch.tensor([-1])
    return agent, rollout(agent, examples(prompt=True), 3, 10, 0.7, [5, 6, 7])


@pytest.mark.filterwarnings("error::FutureWarning")          # a renamed argument of transformers
@pytest.mark.parametrize("space", ["latent", "token"])
@pytest.mark.parametrize("stop", [0, 60])
def test_rollout_equals_a_full_pass_its_replay_and_separate_ones(space, stop):
    """Prompts of different lengths, with one, two and no images, in one batch."""
    agent, r = roll(space, stop)
    bias = agent.token_bias if space == "token" else None
    want, best = brute_force(agent, r, 0.7)
    close(r.logps[r.mask], want[r.mask], 1e-4)      # fails if a position or a mask is off by one
    assert torch.equal(r.tokens[r.mask], best[r.mask]) and len(set(r.texts)) > 5
    for part, index in ((r, list(range(9))), (r.select([2, 0]), [6, 7, 8, 0, 1, 2])):
        replayed = action_statistics(agent.policy, replay(agent.policy, part)[part.mask],
                                     part.actions[part.mask], 0.7, bias)[0]
        close(replayed, r.logps[index][r.mask[index]], 1e-4)
        assert part.texts == [r.texts[i] for i in index]
    ends, T = torch.isin(r.tokens, agent.encoder.stop_ids), r.tokens.shape[1]
    for n in range(9):                              # up to and including the first end of turn
        first = ends[n].nonzero()[0, 0].item() if ends[n].any() else T - 1
        assert r.mask[n].tolist() == [t <= first for t in range(T)]
        assert r.finished[n] == ends[n].any()
    assert bool(stop) == bool(r.finished.any()) == (not r.mask.all())
    for i, prompt in enumerate(examples(prompt=True)):      # sharing prefix and batch: no change
        rows, one = slice(3 * i, 3 * i + 3), rollout(agent, [prompt], 3, 10, 0.7, [5 + i],
                                                     check_every=1)
        assert one.texts == r.texts[rows] and one.mask.sum() == r.mask[rows].sum()
        close(one.logps[one.mask], r.logps[rows][r.mask[rows]], 1e-4)
        assert rollout(agent, [prompt], 3, 10, 0.7, [50 + i]).texts != one.texts


def test_recomputed_layers_keep_their_inputs_alone_and_have_the_same_gradient():
    """Over rows and over a rollout; fails if `recompute` does not reach both."""
    agent, r = copy.deepcopy(tiny_agent()), roll()[1]
    agent.structure["policy_layers"] = 4
    agent.make("policy", seed=1)
    states, kept = torch.randn(2, 64, agent.width), []

    def keep(x):
        kept[-1] += 0 if isinstance(x, nn.Parameter) else x.nbytes
        return x
    for function in (lambda: agent.policy(states, kit.text_positions(states)),
                     lambda: replay(agent.policy, r)):
        gradients = []
        for agent.recompute in (False, True):
            agent.train_only("policy")
            kept.append(0)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                out = function()
            out.square().mean().backward()
            gradients.append([p.grad for p in agent.policy.layers.parameters()])
            agent.policy.zero_grad(set_to_none=True)
        assert kept[-1] < 0.2 * kept[-2]
        for one, other in zip(*gradients, strict=True):
            close(one, other, 1e-6)


def test_rows_are_packed_by_hand():
    # Two answers of at most 3 tokens a prompt: 2 prompts of up to 7 tokens are 2 * 2 * 10 = 40.
    # 30 tokens exceed the budget alone, and its length does not count for the prompts after it.
    prompts = [range(n) for n in (5, 7, 5, 30, 2, 2)]
    assert kit.pack(prompts, 2, 3, 40) == [[0, 1], [2], [3], [4, 5]]
    assert kit.pack(prompts, 2, 3, 39) == [[0], [1], [2], [3], [4, 5]]
    assert kit.pack(prompts, 2, 3, 10 ** 6) == [[0, 1, 2, 3, 4, 5]]
    assert kit.pack([], 2, 3, 40) == []


def test_the_acting_agent_copies_what_trains_and_shares_what_is_frozen():
    agent = copy.deepcopy(tiny_agent())
    assert agent.acting().policy is agent.policy    # in fp32 nothing is copied
    agent.backbone.to(torch.bfloat16)
    frozen = ("backbone", "projector", "codebook", "world")
    assert set(agent.train_only("policy")) == {"policy"}
    actor = agent.acting()
    for name in frozen:                             # fails if cast anew for every rollout
        assert getattr(actor, name) is getattr(agent, name)
        assert {p.dtype for p in getattr(agent, name).parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad for p in getattr(agent, name).parameters())
    assert {p.dtype for p in actor.policy.parameters()} == {torch.bfloat16}
    assert all(p.dtype == torch.float32 and p.requires_grad for p in agent.policy.parameters())
    assert actor.policy.rotary.inv_freq.dtype == torch.float32
    agent.policy.head.bias.data += 1                # an optimiser step: the next rollout sees it
    assert torch.equal(agent.acting().policy.head.bias, agent.policy.head.bias.bfloat16())
    assert not torch.equal(actor.policy.head.bias, agent.policy.head.bias.bfloat16())
    assert agent.encoder is actor.encoder and actor.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:Mismatch dtype")         # rms_norm of bf16 with fp32 weights
@pytest.mark.parametrize("space", ["latent", "token"])
def test_in_bfloat16_a_long_rollout_and_its_replay_agree(space):
    """As on a GPU: backbone and rollout in bf16, fp32 weights under autocast in the update. Fails
    if the rollout's copies have their rotary frequencies in bf16 too."""
    agent = copy.deepcopy(tiny_agent(space))
    agent.backbone.to(torch.bfloat16)
    agent.train_only("policy")
    for layer in agent.policy.layers:               # attention that depends on the position
        layer.self_attn.q_proj.weight.data *= 4
        layer.self_attn.k_proj.weight.data *= 4
    prompt = agent.encoder.encode(row("<image>" + "tell me more " * 150, None, [picture()]), True)
    r = rollout(agent, [prompt], 2, 8, 1.0, [0])
    with agent.autocast():
        h = replay(agent.policy, r)[r.mask]
        logps = action_statistics(agent.policy, h, r.actions[r.mask], 1.0,
                                  agent.token_bias if space == "token" else None)[0]
    distance = (logps - r.logps[r.mask]).abs()      # .10 and .33 with frequencies in bf16
    assert len(prompt) > 400 and distance.max() < 0.15
    assert distance.mean() < train_rl.ROLLOUT_TOLERANCE[torch.bfloat16]


# ---- eval.py ---------------------------------------------------------------------------------


FLUENCY, TONE = "Fluency: fine. [Scores]: (8, 9)", "Tone: ok [Scores]: (7.5, 10)"
GOOD = f"{FLUENCY}\n{TONE}"


def two_dimensions():
    return tasks.Task("t", ("Fluency", "Tone"), (0, 1), {}, None, 9)


def test_a_reply_is_read_and_its_reward_is_the_ratio_of_sums():
    task = two_dimensions()
    assert task.scores(GOOD) == {"Fluency": (8, 9), "Tone": (7.5, 10)}
    assert task.reward(GOOD) == 15.5 / 19
    assert list(task.scores(f"{TONE}\n{FLUENCY}")) == ["Fluency", "Tone"]
    empty = GOOD.replace("(8, 9)", "(0, 9)").replace("(7.5, 10)", "(0, 10)")
    assert task.scores(empty) == {"Fluency": (0, 9), "Tone": (0, 10)} and task.reward(empty) == 0
    assert task.scores(None) is None and math.isnan(task.reward(None))


@pytest.mark.parametrize("reply", [
    f"Here you are.\n{GOOD}\nThank you.", f"{FLUENCY}\n\n- **Tone**: ok [Scores]: (7.5, 10).",
    f"1. {FLUENCY}\n  2) {TONE}", f"* {FLUENCY.upper()}\n\u2022 {TONE.lower()}",
    "### Fluency\nfine.\n[Scores]: (8, 9)\n\n### Tone:\n\nok\n\n[Scores]:\n(7.5, 10)",
    "**Fluency:** fine\n**[Scores]**: (8, 9)\n**_Tone:_** ok **[Scores]: (7.5, 10)**",
    GOOD.replace("(8, 9)", "8, 9").replace("(7.5, 10)", "7.5,10"),      # no parentheses
    GOOD.replace("[Scores]: (8, 9)", "[score] ( 8.0 , 9 )"),
    "Fluency\uff1afine\uff3bScores\uff3d\uff1a\uff08\uff18\uff0c\uff19\uff09\n" + TONE,     # full
    "\uff26luency\uff1afine [Scores]\uff1a\uff08\uff18\uff0c\uff19\uff09\u3002\n" + TONE,  # width
    "Fluency\uff1afine [Scores]\uff1a8\uff0c9\u3002\n" + TONE,
    GOOD.replace("fine.", "fine, (9, 2) of 10; unlike Tone: 3/10, Scores: (1, 1)."),
    f"<think>Fluency: [Scores]: (1, 1)\n{GOOD}</think>\n{GOOD}",
    f"\n<think>{TONE}</think> <think>\n</think>{GOOD}", GOOD.replace("\n", "\r\n")],
    ids=itertools.count())
def test_a_reply_in_any_of_these_forms_is_read(reply):
    assert two_dimensions().scores(reply) == {"Fluency": (8, 9), "Tone": (7.5, 10)}


@pytest.mark.parametrize("reply", [
    "", FLUENCY, f"{GOOD}\n{TONE}", f"{GOOD}\nTone: again", f"Tone: hm.\n{GOOD}",
    f"{FLUENCY}\n{FLUENCY}",
    GOOD.replace("\n", " "), GOOD.replace("Tone", "Style"), GOOD.replace("Tone", "My Tone"),
    f"{GOOD}\nOverall: [Scores]: (9, 9)",                # a mark too many
    # an answer that is quoted, at the end of a line too
    GOOD.replace("fine.", 'it says "[Scores]: (10, 1)".'),
    "Fluency: absurd. [Scores]: (2, 9). It claims [Scores]: (10, 1)\n" + TONE,
    "Fluency: absurd. [Scores]: (2, 9). It claims [Score]: (10, 1)\n" + TONE,
    f"Fluency: absurd. [Scores]: (2, 9)\nIt says\nFluency: great. [Scores]: (10, 1)\n{TONE}",
    f"Fluency: it says\nTone: great. [Scores]: (10, 1)\n[Scores]: (2, 9)\n{TONE}",
    f"It says [Scores]: (10, 1)\n{GOOD}",
    *[GOOD.replace("(8, 9)", pair) for pair in (
        "(8)", "8", "(8, 9, 7)", "8, 9, 7", "(8; 9)", "8/10", "(8/10, 9/10)", "8/10, 9/10",
        "(7-8, 9)", "(8, 9-10)", "7 to 8, 9", "(8 9)", "(11, 9)", "(8, 11)", "(8, 10.01)", "(8, 0)",
        "(8, 0.0)", "(-8, 9)", "(8, -9)", "(ten, 9)", "(8, nan)", "(8, 9) or (9, 9)", "",
        "(8, 9) for the first")],
    f"<think>{GOOD}", f"<think>Hm.\n{GOOD}\nNo <think>more</think>", f"{GOOD}\n<think>Hm.",
    f"<think>Hm.</think><think>\n{GOOD}", f"{FLUENCY}\n<think>{TONE}</think>"],
    ids=itertools.count())
def test_a_reply_in_any_other_form_is_refused(reply):
    assert two_dimensions().scores(reply) is None and math.isnan(two_dimensions().reward(reply))


def test_metrics_by_hand():
    s = [{"a": (8, 10), "b": (5, 5)}, None, {"a": (4, 8), "b": (6, 10)}]
    replies = [s and "\n".join(f"{d}: [Scores]: {pair}" for d, pair in s.items()) for s in s]
    figures = tasks.summarise(tasks.Task("t", ("a", "b"), (0, 1), {}, None, 9),
                              [{"answers": ["x"], "replies": [reply]} for reply in replies])
    assert figures == pytest.approx({"a": 0.65, "b": 0.8, "overall": 0.725, "failed": 1,
                                     "reward": (13 / 15 + 10 / 18) / 2})
    task, group = two_dimensions(), {"answers": ["x", "x", "y", "x"], "replies": [None] * 4}
    close(tasks.summarise(task, [group])["duplicates"], 0.5)
    usage = tasks.code_usage(torch.tensor([2.0, 2.0, 4.0, 0.0]))    # exp(1/2 ln 4 + 1/2 ln 2)
    assert usage == {"codes_used": 3, "code_perplexity": pytest.approx(math.sqrt(8))}
    assert tasks.paired_bootstrap([1, 2, None, 4], [2, 4, 9, math.nan], 2000) == (1.5, 1, 2)
    a, b = tuple("the cat sat on the mat"), tuple("a cat on mats the")
    lcs = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]           # the textbook table
    for i, j in itertools.product(range(len(a)), range(len(b))):
        lcs[i + 1][j + 1] = lcs[i][j] + 1 if a[i] == b[j] else max(lcs[i][j + 1], lcs[i + 1][j])
    assert tasks.common_length(a, b) == lcs[-1][-1]


def scored_run(root, name, seed, reward):
    """A run folder of that seed, and its summary."""
    (root / name).mkdir(parents=True)
    (root / name / "config.json").write_text(json.dumps({
        "args": {"seed": seed}, "identity": {}, "base": "", "parent": None, "sha256": None}))
    return {root / name: {"id": {"reward": reward, "diversity": 1 + reward}}}


def test_a_comparison_takes_runs_that_differ_in_seed_alone_as_one(tmp_path):
    """Fails if any -s<digits> is a seed: my-s3-task and my-s4-task are two tasks."""
    run = functools.partial(scored_run, tmp_path)
    runs = {}
    for n, (stage, seed) in enumerate((
            ("rl-x-dapo-latent-s0", 0), ("rl-x-dapo-latent-s1", 1), ("rl-x-dapo-latent-s1-b", 1),
            ("rl-my-s3-task-dapo-token-s0", 0), ("rl-my-s4-task-dapo-token-s0", 0),
            ("rl-my-s4-task-dapo-token-s12-codes8", 12), ("sft-x-s2-latent", 2))):
        runs |= run(f"a/tiny/{stage}", seed, n / 10)
    runs |= run("b/tiny/rl-x-dapo-latent-s0", 0, 0.7) | run("b/other/rl-x-dapo-latent-s0", 0, 0.9)
    (tmp_path / "a/tiny/sft-x-s2-latent/log.jsonl").write_text('{"seconds": 2.5}\n{"seconds": 4}\n')
    (config,) = (tmp_path / "b/other").glob("*/config.json")
    config.write_text(config.read_text().replace(
        '"parent": null', '"parent": "../../../a/tiny/sft-x-s2-latent"'))
    alone = {"seeds": 1, "min_p": None, "seconds": "0", "stages before": "0"}
    diversity = tasks.compare({**runs, tmp_path / "a/tiny/sft-x-s2-latent": {"id": {}}},
                              "diversity")                  # greedy answers have none
    assert diversity["tiny/rl-x-dapo-latent"] == {"seeds": 3, "min_p": None, "id": "1.267 (0.379)"}
    assert diversity["tiny/sft-x-s2-latent"] == {"seeds": 1, "min_p": None}
    assert tasks.compare(runs, "reward") == {       # of 0, .1 and .7: the same run elsewhere, too
        "tiny/rl-x-dapo-latent": {**alone, "seeds": 3, "id": "0.267 (0.379)"},
        "tiny/rl-x-dapo-latent-b": {**alone, "id": "0.200"},
        "tiny/rl-my-s3-task-dapo-token": {**alone, "id": "0.300"},
        "tiny/rl-my-s4-task-dapo-token": {**alone, "id": "0.400"},
        "tiny/rl-my-s4-task-dapo-token-codes8": {**alone, "id": "0.500"},
        "tiny/sft-x-s2-latent": {**alone, "id": "0.600", "seconds": "6"},
        "other/rl-x-dapo-latent": {**alone, "id": "0.900", "stages before": "6"}}


def test_differences_are_paired_by_seed_with_a_t_interval(tmp_path):
    run = functools.partial(scored_run, tmp_path)
    runs = {}
    for seed, (start, end, other) in enumerate(((0.1, 0.4, 0.2), (0.5, 0.6, 0.7), (0.3, 0.5, 0.3))):
        runs |= run(f"{seed}/tiny/sft-mini-latent", seed, start)
        runs |= run(f"{seed}/tiny/rl-mini-dapo-latent-s{seed}", seed, end)
        runs |= run(f"{seed}/tiny/rl-mini-dapo-token-s{seed}", seed, other)
    # .3 .1 .2: mean .2, deviation .1; .1 .2 0: mean .1, deviation .1; t(2) = 4.3027
    half = 4.302653 * 0.1 / math.sqrt(3)
    close(tasks.t_interval([0.3, 0.1, 0.2]), (0.2, half))
    table = tasks.gains_over_first(dict(sorted(
        runs.items(), key=lambda pair: pair[0].name < "s")), "reward")
    assert table == {f"tiny/rl-mini-dapo-{space} - tiny/sft-mini-latent":
                     {"pairs": 3, "id": f"{mean:+.3f} ± {half:.3f}"}
                     for space, mean in (("latent", 0.2), ("token", 0.1))}
    del runs[tmp_path / "0/tiny/sft-mini-latent"]           # fails if pairs are made by place
    (row_,) = {name: r for name, r in tasks.gains_over_first(dict(sorted(
        runs.items(), key=lambda pair: pair[0].name < "s")), "reward").items()
        if "latent -" in name}.values()
    assert row_["pairs"] == 2 and row_["id"].startswith("+0.150")
    for folder in runs:                                     # a figure that one side alone has
        if "token" not in folder.name:
            runs[folder]["id"]["codes_used"] = 3
    rows = tasks.gains_over_first(runs, "codes_used")
    assert set(rows) == {"tiny/sft-mini-latent - tiny/rl-mini-dapo-latent"}
    for space, reward in (("latent", 0.6), ("token", 0.8)):     # a second seed in one run root
        runs |= run(f"0/tiny/rl-mini-dapo-{space}-s7", 7, reward)
    (row_,) = tasks.gains_over_first({folder: table for folder, table in runs.items()
                                      if folder.name.startswith("rl-")}, "reward").values()
    assert row_["pairs"] == 4 and row_["id"].startswith("-0.025")   # -.2 .1 -.2 .2; each seed's own


def test_rewards_by_group_are_means_over_its_prompts():
    """Fails if splits or modes are mixed, or a failed judgement counts as 0."""
    task = tasks.Task("t", ("d",), (0, 1), {}, None, 9)
    predictions = [{"id": row_id, "split": split, "mode": "greedy", "replies": [
        None if score is None else f"d: [Scores]: ({score}, 10)" for score in scores]}
        for split, row_id, scores in (
            ("id", "1", (6, 4)), ("id", "2", (2.5, None)), ("id", "3", (10, 10)),
            ("id", "4", (0, 0)), ("ood", "1", (None, None)), ("ood", "3", (8, 7)))]
    rewards = tasks.rewards_by_prompt(task, predictions)
    assert rewards == {"id greedy": {"1": 0.5, "2": 0.25, "3": 1.0, "4": 0.0},
                       "ood greedy": {"1": pytest.approx(math.nan, nan_ok=True), "3": 0.75}}
    rows = {"1": {"persona": "Zed", "question": ("count", None)}, "2": {"persona": "Zed"},
            "3": {"persona": "Orla", "question": ["count", None], "group": 7},
            "4": {"question": "of the user's own"}}
    assert tasks.rewards_by_group(rewards, rows) == {
        name: {"reward": reward} for name, reward in (
            ("id greedy, 7", 1.0), ("id greedy, Orla", 1.0), ("id greedy, Zed", 0.375),
            ("id greedy, count", 0.75), ("ood greedy, 7", 0.75), ("ood greedy, Orla", 0.75),
            ("ood greedy, Zed", pytest.approx(math.nan, nan_ok=True)),
            ("ood greedy, count", 0.75))}


def test_a_comparison_by_group_has_a_line_for_each_group(tmp_path):
    """Two seeds of a warm start and of RL from it, two personas; no table without differences."""
    summaries, rewards = {}, {}
    for seed in range(2):
        for stage, gain in (("sft-mini-latent", 0.0), (f"rl-mini-dapo-latent-s{seed}", 0.25)):
            (folder,) = scored_run(tmp_path, f"{seed}/tiny/{stage}", seed, 0)
            summaries[folder] = {"id greedy": {"reward": 0.5, "word": gain, "min_p": 0.0}}
            rewards[folder] = {"id greedy": {"1": 0.5 + gain, "2": 0.25 + 2 * gain + seed / 4}}
    rows = {"1": {"persona": "Zed"}, "2": {"persona": "Orla"}}
    tables = tasks.comparison(summaries, rewards, rows, ["reward", "word"], True)
    (word,) = (table for title, table in tables.items() if title.startswith("word, difference"))
    assert word == {"tiny/rl-mini-dapo-latent - tiny/sft-mini-latent": {
        "pairs": 2, "id greedy": "+0.250 ± 0.000"}}
    means, differences = (table for title, table in tables.items() if "by group" in title)
    assert means["id greedy, Orla"] == {"tiny/sft-mini-latent": "0.375 (0.177)",
                                        "tiny/rl-mini-dapo-latent": "0.875 (0.177)"}
    assert differences == {"id greedy, Orla": {
        "tiny/rl-mini-dapo-latent - tiny/sft-mini-latent": "+0.500 ± 0.000"}, "id greedy, Zed": {
        "tiny/rl-mini-dapo-latent - tiny/sft-mini-latent": "+0.250 ± 0.000"}}
    assert not any("by group" in title for title in tasks.comparison(summaries, rewards, rows,
                                                                     ["reward"], False))
    one = dict([next(iter(summaries.items()))])
    assert tasks.comparison(one, rewards, rows, ["reward"], True) == {}


def test_held_out_reports_over_seeds(tmp_path):
    """Fails if reports of other stages, or of variants of one, are counted together."""
    for root, stage, seed, ce in (("a", "idm", 0, 0.1), ("b", "idm", 1, 0.3), ("a", "bc", 0, 0.7),
                                  ("a", "idm-without-cycle", 0, 0.9)):
        scored_run(tmp_path, f"{root}/tiny/{stage}", seed, 0)
        (tmp_path / root / "tiny" / stage / "report.json").write_text(json.dumps({
            "cross-entropy": {"ood": {"IDM": ce, "codes_used": 3}},
            "share of codes": {"ood": [1]}}))
    folders = sorted(tmp_path.glob("*/tiny/*"))
    assert tasks.reported(folders) == {
        "tiny/idm, cross-entropy, 2 seeds":
            {"ood": {"IDM": "0.200 (0.141)", "codes_used": "3.000 (0.000)"}},
        "tiny/bc, cross-entropy, 1 seeds": {"ood": {"IDM": "0.700", "codes_used": "3.000"}},
        "tiny/idm-without-cycle, cross-entropy, 1 seeds":
            {"ood": {"IDM": "0.900", "codes_used": "3.000"}}}
    (tmp_path / "b/tiny/idm/report.json").write_text('{"cross-entropy": {"ood": {"IDM": 0.3}}}')
    with pytest.raises(UserError, match="tiny/idm some did not report 'codes_used'"):
        tasks.reported(folders)
    (folders[0] / "report.json").unlink()
    with pytest.raises(UserError, match="report.json: cannot be read"):
        tasks.reported(folders)


def test_p_values_and_their_correction_by_hand():
    for t, freedom, p in ((12.706, 1, 0.05), (4.303, 2, 0.05), (2.262, 9, 0.05), (3.250, 9, 0.01),
                          (1.0, 1, 0.5), (0.0, 4, 1.0)):                # the printed tables
        close(tasks.student_p(t, freedom), p, 2e-4)
        close(tasks.student_p(-t, freedom), p, 2e-4)
    adjusted = tasks.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert tasks.holm({"a": 0.7, "b": 0.6}) == {"b": 1.0, "a": 1.0}


def test_the_bootstrap_over_personas_is_wide_where_personas_differ():
    """Two personas, gains of one all 0, of the other all 1: one, both or none may be drawn."""
    personas = ["a"] * 50 + ["b"] * 50
    assert tasks.persona_bootstrap([0.0] * 50 + [1.0] * 50, personas) == (0.0, 1.0)
    low, high = tasks.persona_bootstrap([0.0, 1.0] * 50, personas)      # within personas alone
    assert 0.35 < low < 0.45 and 0.55 < high < 0.65
    low, high = tasks.persona_bootstrap([math.nan, 1.0] * 50, personas)
    assert low == high == 1.0


def test_latent_is_held_against_the_token_run_of_its_seed(tmp_path):
    run, rewards = functools.partial(scored_run, tmp_path), {}
    noise = {algo: [0.01, -0.02, 0.0] for algo in ("grpo", "dapo")}
    for seed in range(3):
        for algo, gain in (("grpo", 0.3), ("dapo", 0.0)):
            for space in ("latent", "token"):
                (folder,) = run(f"{seed}/tiny/rl-mini-{algo}-{space}-s{seed}", seed, 0)
                level = seed / 9 + (gain + noise[algo][seed]) * (space == "latent")
                rewards[folder] = {f"{split} {mode}": {"1": level, "2": level + 0.1}
                                   for split in ("id", "ood") for mode in ("greedy", "sampled")}
    table = tasks.contrasts(rewards, {"1": "x", "2": "y"})
    assert list(table) == [f"tiny/rl-mini-{algo}-latent - token, {split} sampled"
                           for algo in ("grpo", "dapo") for split in ("id", "ood")]
    sd = math.sqrt((0.01 + 1 / 300) ** 2 + (1 / 300 - 0.02) ** 2 + (1 / 300) ** 2) / math.sqrt(2)
    grpo, dapo = (table[f"tiny/rl-mini-{algo}-latent - token, id sampled"]
                  for algo in ("grpo", "dapo"))
    assert grpo["pairs"] == 3 and grpo["mean"] == f"+0.297 ± {4.303 * sd / math.sqrt(3):.3f}"
    p = tasks.student_p((0.3 - 1 / 300) / sd * math.sqrt(3), 2)
    assert grpo["p (Holm)"] == f"{4 * p:.2g}" and dapo["p (Holm)"] == "1"
    assert grpo["personas, prompts"] == "[+0.297, +0.297]"
    for seed in range(2):                           # other token runs: descriptive, no part of Holm
        (folder,) = run(f"{seed}/tiny/rl-mini-grpo-token-s{seed}-corpora", seed, 0)
        rewards[folder] = {"id sampled": {"1": seed / 9, "2": seed / 9 + 0.1 + seed}}
    more = tasks.contrasts(rewards, {"1": "x", "2": "y"})
    name = "tiny/rl-mini-grpo-latent - token-corpora, id sampled"
    assert {key: row_ for key, row_ in more.items() if key != name} == table
    assert more[name]["pairs"] == 2 and "p (Holm)" not in more[name]
    rewards[folder] = {"id sampled": {"1": 0.0, "other": 0.0}}          # of other prompts
    assert tasks.contrasts(rewards, {"1": "x", "2": "y"}) == table


def test_summaries_leave_out_failures_and_count_zeros():
    task = tasks.Task("t", ("d",), (0, 1), {}, None, 9)
    def predictions(*groups):
        return [{"id": n, "split": "id", "mode": "m", "answers": ["x"] * len(g), "replies": [
            None if s is None else f"d: x [Scores]: ({s}, 10)" for s in g]}
            for n, g in enumerate(groups)]
    figures = tasks.summarise(task, predictions((None, 5), (0, 0)))
    assert figures["failed"] == 1
    close([figures["reward"], figures["best_of_2"]], [0.25, 0.25])
    for order in ((5, None), (None, 5), (0, 5), (5, 0)):    # fails if 0 or None is taken for NaN
        close(tasks.summarise(task, predictions(order))["best_of_2"], 0.5)
    gain = tasks.gain_table(task, predictions((0, 5)), predictions((5, 5)))["id m"]
    close([gain[k] for k in ("before", "after", "gain")], [0.25, 0.5, 0.25])


@functools.cache
def mini():
    return tasks.mini_task(0, 0)


def test_mini_world_is_one_fixed_draw_and_its_splits_are_disjoint():
    again, parts = tasks.mini_task(0, 0), {part: {p.name for p in personas}
                                           for part, personas in tasks.casting().items()}
    assert {part: len(names) for part, names in parts.items()} == {
        "familiar": 12, "valid": 4, "ood": 4} and len(set.union(*parts.values())) == 20
    scenes, personas = ({s: {repr(r[key]) for r in rows} for s, rows in mini().splits.items()}
                        for key in ("scene", "persona"))
    for split, rows in mini().splits.items():
        assert len(rows) == tasks.SIZES[split]
        for a, b in zip(rows[:20], again.splits[split]):
            assert a["images"][0].tobytes() == b["images"][0].tobytes()
            assert {**a, "images": 0} == {**b, "images": 0}
        asks = {"valid": parts["familiar"] | parts["valid"], "ood": parts["ood"]}
        assert personas[split] == set(map(repr, asks.get(split, parts["familiar"])))
    tests = scenes["valid"] | scenes["id"] | scenes["ood"]
    assert len(tests) == sum(len(scenes[s]) for s in ("valid", "id", "ood"))
    for kind, n in (("paired", 12), ("text", 20), ("base", 20)):
        rows = tasks.mini_corpus(kind, 240, 1)
        assert len({r["persona"] for r in rows}) == n
        assert kind != "paired" or {r["persona"] for r in rows} == parts["familiar"]
        assert not {repr(r.get("scene")) for r in rows} & tests
        assert all(bool(r["images"]) == (kind != "text") for r in rows)
    assert not (scenes["sft"] | scenes["rl"]) & tests
    unseen = tasks.embedded("ood", 1)
    assert len(unseen) == 96 and {r["persona"] for r in unseen} == parts["valid"]


def test_another_world_is_another_casting(monkeypatch):
    first = tasks.casting()
    monkeypatch.setattr(tasks, "WORLD", 2)
    assert {p.name for p in tasks.casting()["ood"]} != {p.name for p in first["ood"]}


def test_rows_are_right_about_the_picture_and_in_role_as_often_as_their_table_says():
    """Headroom lies in words: fails if a fact is wrong, or an answer's slots fall independently."""
    rows, own = [r for r in tasks.mini_corpus("paired", 3000, 5)], []
    for r in rows:
        answer, grammar = tasks.parse_answer(r["messages"][-1]["content"])
        assert grammar == 1 and tasks.hold_against_picture(
            answer, r["question"], r["scene"]) == (True, 1, 1)
        own.append([tasks.OWNERS[slot][getattr(answer, slot)] == r["persona"]
                    for slot in tasks.SLOTS])
    own = torch.tensor(own).double()
    close(own.mean(), tasks.QUALITY["paired"], 0.03)
    assert torch.corrcoef(own.T)[0, 2] > 0.1        # opening and adjective: both slots of one kind


def asked(kind):
    return next(r for r in mini().splits["id"] if r["question"][0] == kind
                and r["persona"] == "Inspector Grey")


def perfect(r, persona="Inspector Grey", scene=None, question=None):
    """A perfect answer, but for the wrong persona, scene or question."""
    who = next(p for p in [*tasks.PERSONAS, tasks.NEUTRAL] if p.name == persona)
    return tasks.voiced(tasks.facts(question or r["question"], scene or r["scene"]), who).text()


def marks(r, answer):
    reply = mini().judge([r], [answer])[0]
    return [s[0] for s in mini().scores(reply).values()], mini().reward(reply)


def test_rule_judge_floors_what_is_no_answer_and_knows_a_perfect_one():
    r = asked("all")
    ref = r["reference"]
    for answer in ("", " \n ", " ".join([ref] * 3), " ".join(sorted(ref.split())), ref.lower(),
                   ref + " " + " ".join(tasks.OBJECTS), "Aha! Case closed. " * 9,
                   " ".join([w for p in tasks.PERSONAS for w in p[2:]] + tasks.OBJECTS
                            + list(tasks.CELLS) + list(tasks.NUMBERS)),     # stuffing
                   "\n".join(f"{d}: [Scores]: (10, 10)" for d in tasks.DIMENSIONS),
                   tasks.caption(r["scene"])):
        assert marks(r, answer)[1] <= 0.15, answer
    assert marks(r, " ".join(ref.split()[:len(ref.split()) // 2]))[1] < 0.6
    for r in mini().splits["ood"][:40]:
        assert marks(r, r["reference"]) == ([10.0] * 8, 1.0)
        assert r["reference"] == perfect(r, r["persona"])


@pytest.mark.parametrize("name,wrong,low,full", [
    ("persona", {"persona": "Zed"}, (5, 6, 7), (1, 2, 3, 4)),
    ("nobody's words", {"persona": ""}, (5, 6, 7), (1, 2, 3, 4)),
    ("scene", {"scene": [None, "yellow star", "purple cross", None]}, (3, 4, 6), (1, 2)),
    ("question", {"question": "cell"}, (0, 4, 6), (1, 3))])
def test_rule_judge_fails_what_is_wrong_in_its_own_dimensions(name, wrong, low, full):
    """0 instruction, 1 fluency, 2 coherency, 3 image, 4 accuracy, 5 person, 6 knowledge, 7 tone."""
    r = asked("all")
    if name == "question":                          # true, but not what was asked
        at = next(i for i, thing in enumerate(r["scene"]) if thing)
        wrong = {"question": ("cell", tasks.CELLS[at])}
    got, reward = marks(r, perfect(r, **wrong))
    assert max(got[d] for d in low) <= 3.5 and {got[d] for d in full} == {10.0} and reward < 0.65


def file_task(name, *flags):
    return tasks.load_task(parsed(train_rl, "--task", str(name), *flags))


def test_file_task_splits_and_overlap(tmp_path, capsys):
    rows = text_rows(40)
    rows[0]["split"] = "ood"
    task = file_task(write(tmp_path / "mine.jsonl", rows))
    assert [len(task.splits[s]) for s in tasks.SPLITS] == [17, 2, 16, 4, 1]
    ids = [r["id"] for rows in task.splits.values() for r in rows]
    assert sorted(ids) == sorted(r["id"] for r in rows)
    for answer, f1 in (("the CAT sat", 1), ("", 0), ("sat cat", 0.4), ("the cat sat the", 6 / 7)):
        close(task.reward(task.judge([{"reference": "The cat sat."}], [answer])[0]), f1, 1e-4)
    for n in range(2):
        rows[n]["dimensions"] = ["Wit", "Rhyme"]
    assert tasks.file_task(write(tmp_path / "two.jsonl", rows[:2])).dimensions == ("Wit", "Rhyme")
    assert tasks.file_task(write(tmp_path / "own.jsonl", rows[2:4])).dimensions == tasks.DIMENSIONS
    rows[1]["dimensions"] = ["Wit"]
    with pytest.raises(UserError, match="jsonl:2: `dimensions` must be the same"):
        tasks.file_task(write(tmp_path / "two.jsonl", rows[:2]))
    with pytest.raises(SystemExit):
        file_task("nothing")
    assert "nothing is neither mini, mmrole, pcogalign nor a file" in capsys.readouterr().err


@pytest.mark.parametrize("more,match", [
    ({"split": "test"}, "split 'test' is not one of"), ({"split": ["rl"]}, "split ..rl.. is not"),
    ({"split": {}}, "split {} is not"), ({"split": 5}, "split 5 is not"),
    ({"split": "x" * 9999}, "split 'x{,50} is not one of"),
    ({"dimensions": 5}, "`dimensions` must"), ({"dimensions": []}, "`dimensions` must"),
    ({"dimensions": "Wit"}, "`dimensions` must"), ({"dimensions": [["Wit"]]}, "`dimensions` must"),
    (asks(), "last message must"), ({"messages": []}, "`messages` is empty"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "after a user's"),
    ({"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "x"}]},
     "after a user's"),
    ({"messages": [*asks()["messages"], {"role": "assistant", "content": "Here: <image>"}],
      "images": ["a.png"]}, "without an image"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": ["x"], "content": "x"}]},
     "is not a row of dialogue"),
    ({"conversations": [{"from": ["x"], "value": "x"}]}, "is not a row of dialogue")],
    ids=itertools.count())
def test_task_rows_that_cannot_be_used_are_named(tmp_path, more, match):
    good = text_rows(2)
    file = write(tmp_path / "bad.jsonl", [good[0], {**good[1], **more}])
    with pytest.raises(UserError, match=f"jsonl:2.*{match}") as error:
        file_task(file)
    assert len(str(error.value)) - len(file) < 250


def test_only_the_overlap_judge_brings_a_dimension_of_its_own(tmp_path, monkeypatch):
    """Fails if the file's name or its rows decide: a file called mini had the overlap judge and
    eight dimensions, one with dimensions of its own lost them to an LLM judge."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    rows = [{**r, "dimensions": ["Wit", "Rhyme"], "split": "id"} for r in text_rows(3)]
    for name in ("mini", "mmrole", "mine"):
        file = write(tmp_path / f"{name}.jsonl", rows)
        task = file_task(file)
        assert (task.name, task.dimensions, task.bounds) == (name, ("Reference Overlap",), (0, 1))
        r = task.splits["id"][0]
        assert task.reward(task.judge([r], [r["reference"]])[0]) == 1
        judge = ["--judge-url", "http://h/v1", "--judge-model", "m", "--run-root", str(tmp_path)]
        task = file_task(file, *judge)
        assert task.dimensions == ("Wit", "Rhyme") and task.bounds == tasks.BOUNDS
    assert file_task("mini").dimensions == file_task("mini", *judge).dimensions == tasks.DIMENSIONS
    assert file_task("mini").bounds == (0.1, 1.0) and file_task("mini", *judge).bounds == (0, 2)
    for flags in (judge[:2], judge[2:4]):           # the other one is missing
        with pytest.raises(UserError, match="--judge-url and --judge-model go together"):
            file_task("mini", *flags, "--run-root", str(tmp_path))


def reviews_of(name):
    """The replies' text of published reviews, dimension by dimension; no stored score."""
    stem = SHARED / "mmrole" / f"in-test_{name}.gpt-4-turbo"
    rows = json.loads(Path(f"{stem}.reviews.json").read_text())
    return [{d: v["review"] for d, v in r["rm_review"].items()} for r in rows], next(
        csv.DictReader(open(f"{stem}.results.csv")))


def rescored(folder, reviews):
    """The table that --rescore prints for reviews, dimension -> text each."""
    file = write(folder / "predictions.jsonl", [{
        "id": str(i), "split": "id", "mode": "greedy", "prompt": [], "answers": ["x"],
        "reference": "y", "replies": ["\n".join(f"{d}: {text}" for d, text in r.items())],
        "dimensions": tasks.DIMENSIONS, "lowest": 1.0, "scores": [None]}
        for i, r in enumerate(reviews)])
    return tasks.main(["--rescore", file])["id greedy"]


def broken_up(text):
    """A review with its sentences, its mark and its scores on lines of their own."""
    return text.replace(". ", ".\n").replace(" [Scores]: ", "\n\n[Scores]:\n")


@needs_shared
@pytest.mark.parametrize("form", [lambda text: text, lambda text: " ".join(text.split()),
                                  broken_up], ids=["as it is", "one line", "broken up"])
@pytest.mark.parametrize("name", ["comment", "human-role", "inter-role"])
def test_rescore_gives_the_published_tables_from_the_replies_text_alone(tmp_path, name, form):
    reviews, want = reviews_of(name)
    table = rescored(tmp_path, [{d: form(text) for d, text in r.items()} for r in reviews])
    for d in tasks.DIMENSIONS:
        assert table[d] == pytest.approx(float(want[d]), abs=1e-9)
    assert table["failed"] == 0 and len(reviews) == int(want["count"])


@needs_shared
def test_rescore_counts_a_zero_and_scores_without_parentheses(tmp_path):
    """As in 24 and 4 replies of the published files that are not here."""
    reviews, want = reviews_of("comment")
    pairs = {n: {d: [float(x) for x in re.search(r"\((\S+), (\S+)\)", text).groups()]
                 for d, text in reviews[n].items()} for n in (3, 7)}
    for d, text in reviews[3].items():              # an empty answer
        reviews[3][d] = re.sub(r"\(.*\)$", "(0, 10)", text)
    for d, text in reviews[7].items():
        reviews[7][d] = re.sub(r"\((.*)\)$", r"\1", text)
    table = rescored(tmp_path, reviews)
    for d in tasks.DIMENSIONS:                      # fails by up to .014 if the answer is left out
        a, b = pairs[3][d]
        assert table[d] == pytest.approx(float(want[d]) - a / b / len(reviews), abs=1e-9)
    assert table["failed"] == 0
    assert pairs[7] == {d: list(pair) for d, pair in tasks.parse_reply(
        "\n".join(f"{d}: {text}" for d, text in reviews[7].items()), tasks.DIMENSIONS).items()}


def mmrole_folder(root):
    """MMRole-Data's layout in miniature: 20 dialogues, three of them broken in one way each."""
    for part, names in (("in-distribution", ("Hulk", "Thor Odinson")),
                        ("out-of-distribution", ("Plato",))):
        profiles = root / "profiles" / part / "detailed_profiles"
        profiles.mkdir(parents=True)
        for name in names:                          # as published: a file a character
            (profiles / f"{name}.json".replace(" ", "_")).write_text(json.dumps(
                {"introduction": f"I am {name}.", "personality": f"{name} is {name}-like."}))
    comment = root / "dialogues/in-distribution/comment"
    comment.mkdir(parents=True)
    (root / "dialogues/out-of-distribution").mkdir()
    (root / "images/COCO").mkdir(parents=True)
    picture().save(root / "images/COCO/1.jpg")
    def dialogue(name, n, answers=1, image="COCO/1.jpg", **info):
        said = [t for k in range(answers) for t in (
            {"from" if k == 0 else "role": "human", "value": f"question {k}"},
            {"role": name, "value": f"{name} answers {n}.{k}"})]
        return {"id": f"{name}_{n}", "image": image, **info,
                "conversations": said or [{"from": "human", "value": "question"}]}
    (comment / "Hulk_COCO.json").write_text(json.dumps([dialogue("Hulk", n) for n in range(10)] + [
        dialogue("Hulk", 90, answers=0), dialogue("Hulk", 91, image="COCO/gone.jpg")]))
    (comment / "Thor_script.json").write_text(json.dumps([
        dialogue("Thor Odinson", n, 2, place_info="Asgard", scene_info="") for n in range(10)]
        + [dialogue("Odin", 1)]))
    (root / "dialogues/out-of-distribution/comment.json").write_text(json.dumps(
        [dialogue("Plato", n) for n in range(3)]))
    return root


def test_mmrole_is_read_from_its_published_layout(tmp_path, capsys):
    task = file_task("mmrole", "--task-root", str(mmrole_folder(tmp_path)))
    said = capsys.readouterr().out
    for left in (f"1 of 23 dialogues left out, no picture: {tmp_path}.*COCO/gone.jpg",
                 f"left out, no profile: {tmp_path}.*Odin.json", "left out, no answer: Hulk_90"):
        assert re.search(left, said)
    rows = [r for split in tasks.SPLITS[:-1] for r in task.splits[split]]
    whole = {split: {r["id"].split("#")[0] for r in task.splits[split]} for split in tasks.SPLITS}
    assert [len(whole[s]) for s in tasks.SPLITS] == [9, 2, 7, 2, 3]     # of 20 dialogues, and 3
    assert len(set().union(*whole.values())) == 23                      # no dialogue in two splits
    for r in rows + task.splits["ood"]:
        system, first, *_ = r["messages"]
        name, thor = r["persona"], r["persona"].startswith("Thor")
        assert system["content"].startswith(f"Play the character {name} ")
        profile = f"\n\nintroduction: I am {name}.\npersonality: {name} is {name}-like."
        assert system["content"].endswith(profile + "\n\nAbout the picture: Asgard" * thor)
        assert first == {"role": "user", "content": "<image>question 0"}
        assert r["messages"][-1] == {"role": "assistant", "content": r["reference"]}
    two = [r for r in rows if r["persona"] == "Thor Odinson" and r["id"].endswith("#4")]
    assert two and all([m["role"] for m in r["messages"]][1:] == ["user", "assistant"] * 2
                       for r in two)                # the second answer, with the first as history
    assert all("#" not in r["id"] for r in task.splits["sft"])          # demonstrations stay whole
    for bad, match in ((["--task-root", "nowhere"], "is not a folder"), ([], "not a folder")):
        with pytest.raises(UserError, match=match):
            file_task("mmrole", *bad)
    other = tmp_path / "dialogues/out-of-distribution/comment.json"
    whole, _ = other.read_text(), other.write_text('[{"id": "x"}]')
    with pytest.raises(UserError, match="comment.json: is not in the published form.*KeyError"):
        file_task("mmrole", "--task-root", str(tmp_path))
    other.write_text(whole)
    profile = tmp_path / "profiles/out-of-distribution/detailed_profiles/Plato.json"
    for text, match in (("[1]", "not in the published form of mmrole"),
                        ("{", "Plato.json: cannot be")):
        profile.write_text(text)
        with pytest.raises(UserError, match=match):
            file_task("mmrole", "--task-root", str(tmp_path))
    profile.unlink()
    with pytest.raises(UserError, match="every dialogue lacks its picture, profile or answer"):
        file_task("mmrole", "--task-root", str(tmp_path))
    profile.write_text("{}")
    (tmp_path / "images/COCO/1.jpg").unlink()
    with pytest.raises(UserError, match="every dialogue lacks"):
        file_task("mmrole", "--task-root", str(tmp_path))


def fake_score(prompt):
    """The imitated judge's score of the answer in a prompt, from 1 to 10."""
    answer = re.search(r"<answer>\n(.*)\n</answer>", prompt, re.S)[1]
    return 1 + 9 * (sum(map(ord, answer)) % 100) / 99


def fake_reference(prompt):
    """What the same server answers where nothing is to be judged."""
    return f"Stay calm. {hashlib.sha256(prompt.encode()).hexdigest()}"


class FakeJudge(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint with faults: `fault(prompt, attempt)` names the fault.
    `calls` are the prompts, `requests` whole conversations, in the order in which they came."""
    daemon_threads = True
    request_queue_size = 256            # 5 by default: 32 callers at once would be turned away

    def __init__(self, dimensions, fault=lambda prompt, attempt: None):
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.dimensions, self.fault, self.keys = dimensions, fault, set()
        self.calls, self.requests = [], []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class FakeHandler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        server, size = self.server, int(self.headers["Content-Length"])
        said = json.loads(self.rfile.read(size))["messages"]
        prompt = said[0]["content"]
        fault = server.fault(prompt, server.calls.count(prompt))
        server.calls.append(prompt)
        server.requests.append(said)
        server.keys.add(self.headers["Authorization"])
        judging = "<answer>" in prompt
        lines = [f"{d}: so so. [Scores]:( {fake_score(prompt):.3f},10 )" for d in server.dimensions
                 if judging] or [fake_reference(prompt)]
        if fault == "untold" and len(said) > 1:     # deterministic, and told what was wrong
            fault = None
        text = {"refusal": "I cannot judge this.", "untold": f"{server.dimensions[0]}: 8/10",
                "pairs": "\n".join(lines[:-1]), "twice": "\n".join([*lines, lines[0]]),
                "empty": " \n"}.get(fault, "\n".join(lines))
        body = json.dumps({"id": "1", "created": 0, "model": "m", "system_fingerprint": "",
                           "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
                           "choices": [{"index": 0, "finish_reason": "stop", "message": {
                               "role": "assistant", "content": text}}]}).encode()
        if fault == "slow":
            time.sleep(3.5)
        if fault == "drop":
            return self.close_connection and None
        self.send_response({"429": 429, "500": 500, "401": 401}.get(fault, 200))
        if fault == "429":
            self.send_header("Retry-After", "0")
        body = body[:len(body) // 2] if fault == "cut" else body
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:
            pass                                    # the client has given up


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    """A judge of the tests' own server: endpoint(fault) -> (server, judge)."""
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setitem(tasks.JUDGE, "pause", 0.01)
    monkeypatch.setitem(tasks.JUDGE, "timeout", 3.0)
    servers = []

    def make(fault=lambda prompt, attempt: None):
        servers.append(FakeJudge(("Fluency", "Tone"), fault))
        args = parsed(train_rl, "--judge-url", servers[-1].url, "--judge-model", "m",
                      "--run-root", str(tmp_path))
        return servers[-1], tasks.endpoint_judge(args, ("Fluency", "Tone"))
    yield make
    for server in servers:
        server.shutdown()


FAULTS = ("slow", "429", "500", "drop", "cut", "refusal", "pairs", "twice")
QUESTION = {**row("What is it?", "A bus."), "reference": "A bus."}


def test_endpoint_loses_nothing_under_faults_and_asks_nothing_twice(endpoint, monkeypatch,
                                                                    tmp_path):
    """200 calls, 30 % of the attempts with one of eight faults: the scores are the true ones."""
    answers = [f"It is bus {n}. " + "[Scores]: (10, 1)\nFluency: great. [Scores]: (10, 1)" * (n % 2)
               for n in range(200)]

    def fault(prompt, attempt):
        draw = random.Random(f"{attempt} {prompt}")
        return draw.choice(FAULTS) if draw.random() < 0.3 and attempt < 3 else None
    monkeypatch.setitem(tasks.JUDGE, "threads", 32)
    server, judge = endpoint(fault)
    replies = judge([QUESTION] * 200, answers)
    for answer, reply in zip(answers, replies):
        want = pytest.approx(fake_score(f"<answer>\n{answer}\n</answer>"), abs=1e-3)
        assert two_dimensions().scores(reply) == {"Fluency": (want, 10), "Tone": (want, 10)}
    made = len(server.calls)
    assert made > 250                               # the faults did happen
    with open(tmp_path / "judge-cache/rank0.jsonl", "a") as cache:
        cache.write('["torn')                       # a killed run's last line
    again, second = endpoint(lambda prompt, attempt: "500")
    assert second([QUESTION] * 200, answers) == replies and not again.calls


def test_endpoint_masks_what_fails_for_good_and_stops_when_nothing_works(endpoint, monkeypatch):
    _, judge = endpoint(lambda prompt, attempt: "refusal")      # one that was never of any use
    with pytest.raises(UserError, match="no usable reply in 4 calls .malformed, one begins 'I "
                       "cannot judge this.'.; see that the server.*same command"):
        judge([QUESTION] * 4, ["bad", "worse", "worst", "hopeless"])
    assert judge([QUESTION], ["bad"]) == ["I cannot judge this."]   # it may be the answer's fault
    server, judge = endpoint(lambda prompt, attempt: "refusal" if "bad" in prompt else
                             "500" if "down" in prompt else None)
    good, bad, down = judge([QUESTION] * 3, ["fine", "bad", "down"])
    assert two_dimensions().scores(good) and bad == "I cannot judge this."
    assert two_dimensions().scores(bad) is None and down is None
    assert len(server.calls) == 1 + 6 + 6
    assert judge([QUESTION] * 2, ["fine", "fine"]) == [good] * 2 and len(server.calls) == 13
    assert judge([QUESTION] * 2, ["fine", "bad"]) == [good, bad] and len(server.calls) == 19
    assert judge([QUESTION] * 3, ["down 2", "down 3", "down 4"]) == [None] * 3
    with pytest.raises(UserError, match="no usable reply in 4 calls .HTTP 500"):
        judge([QUESTION] * 4, [f"down {n}" for n in range(2, 6)])   # good ones excuse no more
    _, judge = endpoint(lambda prompt, attempt: "401")
    with pytest.raises(UserError, match=r"HTTP 401; is the key in \$JUDGE_API_KEY right"):
        judge([QUESTION], ["x"])
    monkeypatch.setitem(tasks.JUDGE, "threads", 2)
    server, judge = endpoint(lambda prompt, attempt: "500")
    with pytest.raises(UserError, match="no usable reply in 2 calls .HTTP 500"):
        judge([QUESTION] * 50, [f"never {n}" for n in range(50)])
    assert 12 <= len(server.calls) < 40             # fails if a dead judge is asked 50 x 6 times
    server, judge = endpoint()
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="no usable reply.*see that the server runs"):
        judge([QUESTION], ["unheard"])


def test_a_malformed_reply_is_sent_back_with_what_is_wrong_with_it(endpoint):
    """To a judge that says the same to the same question, as at temperature 0."""
    server, judge = endpoint(lambda prompt, attempt: "untold")
    replies = judge([QUESTION] * 3, ["one", "two", "three"])    # fails if just asked again
    assert all(map(two_dimensions().scores, replies)) and len(server.calls) == 6
    for prompt in set(server.calls):
        (first,), (again, reply, complaint) = (said for said in server.requests
                                               if said[0]["content"] == prompt)
        assert first == again == {"role": "user", "content": prompt}
        assert reply == {"role": "assistant", "content": "Fluency: 8/10"}
        assert complaint["role"] == "user" and "Fluency, Tone" in complaint["content"]
        assert complaint["content"].endswith("\nFluency: ... [Scores]: (a, b)")
    server, judge = endpoint(lambda prompt, attempt: "twice" if attempt < 3 else "500"
                             if attempt == 3 else "empty" if attempt == 4 else None)
    assert two_dimensions().scores(judge([QUESTION], ["four"])[0])
    assert [len(said) for said in server.requests] == [1, 3, 3, 3, 3, 3]    # the last one alone
    assert server.requests[-1][1]["content"] == " \n"
    server, judge = endpoint(lambda prompt, attempt: "refusal" if "x" * 999 in prompt else None)
    long = {**QUESTION, "reference": "x" * 999}
    judge([QUESTION], ["a judge that lives"])
    assert judge([long], ["five"]) == ["I cannot judge this."] and len(server.calls) == 7


def test_endpoint_asks_all_when_the_first_replies_are_malformed(endpoint, monkeypatch):
    monkeypatch.setitem(tasks.JUDGE, "threads", 2)
    server, judge = endpoint(lambda prompt, attempt: "refusal" if "bad" in prompt else None)
    judge([QUESTION], ["fine"])
    answers = [*(f"bad {n}" for n in range(6)), "fine too"]
    replies = judge([QUESTION] * 7, answers)        # fails if it stops asking after two
    assert replies[:6] == ["I cannot judge this."] * 6
    assert two_dimensions().scores(replies[6]) and len(server.calls) == 1 + 6 * 6 + 1


def test_a_server_that_never_answers_is_left_when_patience_ends(endpoint, monkeypatch):
    for name, value in (("timeout", 0.2), ("patience", 0.5)):
        monkeypatch.setitem(tasks.JUDGE, name, value)
    server, judge = endpoint(lambda prompt, attempt: "slow")
    with pytest.raises(UserError, match="no usable reply in 1 calls"):
        judge([QUESTION], ["x"])
    assert 1 < len(server.calls) < tasks.JUDGE["attempts"]      # fails if every try is waited for
    monkeypatch.setitem(tasks.JUDGE, "patience", 0.0)           # none to repeat a call: one is made
    server, judge = endpoint()
    assert judge([QUESTION], ["x"])[0] is not None and len(server.calls) == 1


def test_endpoint_sends_its_key_and_keeps_it_nowhere(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "the-users-hub-token")
    server, judge = endpoint()                      # fails if no explicit key is passed
    judge([QUESTION], ["one"])
    monkeypatch.setenv("JUDGE_API_KEY", "s3cret")
    other, judge = endpoint(lambda p, n: "500" if "lost" in p else None)
    judge([QUESTION] * 2, ["lost", "found"])
    assert server.keys == {"Bearer none"} and other.keys == {"Bearer s3cret"}
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and b"s3cret" in f.read_bytes()]
    for url in ("http://me:s3cret@host/v1", "http://host/v1?key=s3cret", "ftp://host"):
        with pytest.raises(UserError, match="environment variable JUDGE_API_KEY") as error:
            tasks.Endpoint(parsed(train_rl, "--judge-url", url, "--judge-model", "m"))
        assert "s3cret" not in str(error.value)


def test_judge_prompt_is_filled_once():
    r = {**QUESTION, "judge_notes": "The place: a {reference}"}
    whole = tasks.judge_prompt("The form", ("Fluency", "Tone"), r, "{form} a\\1")
    for part in ("<instructions>\nBe helpful.\n</instructions>\n\nThe place: a {reference}\n",
                 "<conversation>\nuser: What is it?\n</conversation>",
                 "<answer>\n{form} a\\1\n</answer>", "<reference>\nA bus.\n</reference>",
                 "- Fluency: correct, natural language\n- Tone: as the name says\n",
                 "each line:\nThe form\n"):
        assert part in whole, part
    assert "<image>" not in tasks.judge_prompt("", ("Tone",), {**ROWS[0], "reference": ""}, "")


def pcogalign_folder(root):
    """PCogAlignBench as published, in miniature: pictures, two files, no reference answers."""
    (root / "images").mkdir(parents=True)
    picture().save(root / "images/1.jpg")
    for name, n in (("HCMAS", 50), ("HCSHR", 13)):
        (root / f"{name}-test.json").write_text(json.dumps([{
            "query": f"Why {k} {{x}}?",
            "individual_RoleSet": {"Home": "Child", "School": "Student"},
            "image": {"file_path": f"images/{1 if name == 'HCMAS' or k else 'gone'}.jpg"},
            "eval_info": {"ImageDesc": f"a fire {name}", "location": "Home",
                          "EvalHelp": "stay calm"}} for k in range(n)]))
    return root


def test_pcogalign_is_made_usable_by_one_command_and_read(endpoint, tmp_path, monkeypatch, capsys):
    """From the published files: the error names the command, its references survive 30 % faults,
    and it goes on where it was killed."""
    root = pcogalign_folder(tmp_path / "version v4")
    with pytest.raises(UserError, match="HCMAS-golden-train.json is missing: .*no ref") as error:
        file_task("pcogalign", "--task-root", str(root))
    monkeypatch.setitem(tasks.JUDGE, "threads", 32)
    faults = ("slow", "429", "500", "drop", "cut", "empty")

    def fault(prompt, attempt):
        draw = random.Random(f"{attempt} {prompt}")
        return draw.choice(faults) if draw.random() < 0.3 and attempt < 5 else None

    def make(fault):
        server, _ = endpoint(fault)
        said = {"URL": server.url, "NAME": "m"}     # as printed, with these filled in
        command = str(error.value).split("make them once with python eval.py ")[1]
        before, folder, after = command.partition(str(root))
        argv = [*before.split(), folder, *(said.get(word, word) for word in after.split())]
        tasks.main([*argv, "--run-root", str(tmp_path)])
        return server
    assert len(make(fault).calls) > 63              # the faults did happen
    said = capsys.readouterr().out
    assert "50 references made for HCMAS" in said and "13 references made" in said
    golden = sorted(root.glob("*-golden-*.json"))
    assert [f.name for f in golden] == [f"{name}-golden-{part}.json" for name in (
        "HCMAS", "HCSHR") for part in ("test", "train")]
    made = {f.name.removesuffix(".json"): json.loads(f.read_text()) for f in golden}
    server, _ = endpoint()
    for name, n, cut in (("HCMAS", 50, 40), ("HCSHR", 13, 10)):
        rows = json.loads((root / f"{name}-test.json").read_text())
        random.Random(42).shuffle(rows)             # as the release: 80 % of them for training
        parts = made[f"{name}-golden-train"] + made[f"{name}-golden-test"]
        assert [{**r, "golden_response": None} for r in parts] == [
            {**r, "golden_response": None} for r in rows]
        assert len(made[f"{name}-golden-train"]) == cut and len(rows) == n
        assert len({r["golden_response"] for r in parts}) == n          # nobody else's
    texts = {f: f.read_text() for f in golden}
    cache = tmp_path / "judge-cache/rank0.jsonl"
    assert not make(lambda prompt, attempt: "500").calls                # all is paid for
    assert {f: f.read_text() for f in golden} == texts
    replies = dict(map(json.loads, cache.read_text().split("\n\n")))
    assert {r["golden_response"] for part in made.values() for r in part} == {*replies.values()}
    lines = cache.read_text().split("\n\n")
    cache.write_text("\n".join(lines[:20]) + "\n" + lines[20][:30])      # killed there
    for f in golden:
        f.unlink()
    server = make(fault)
    assert len({*server.calls}) == 43               # fails if it starts again
    assert {f: f.read_text() for f in golden} == texts
    for prompt in server.calls:
        assert re.search(r"at School\nThe picture: a fire HC\w+\nWhat would help this person: stay "
                         r"calm\nThe question: Why \d+ {x}\?\n", prompt), prompt
        assert fake_reference(prompt) in replies.values()
    capsys.readouterr()
    task = file_task("pcogalign", "--task-root", str(root))
    # Of 40 dialogues 20 and 8, a tenth of each (2 and 1) held out; 10 and 3 are the tests.
    gone = sum(r["image"]["file_path"] == "images/gone.jpg" for r in made["HCSHR-golden-test"])
    assert [len(task.splits[s]) for s in tasks.SPLITS] == [18, 3, 7, 10, 3 - gone]
    assert ("of 3 dialogues left out, no picture" in capsys.readouterr().out) == gone
    for split, part, row_of in (("sft", "HCMAS-golden-train", 0), ("id", "HCMAS-golden-test", 0),
                                ("rl", "HCMAS-golden-train", 20)):
        r, raw = task.splits[split][0], made[part][row_of]
        assert "Child at Home; Student at School" in r["messages"][0]["content"]
        assert r["messages"][1]["content"] == f"<image>{raw['query']}"
        assert r["reference"] == r["messages"][2]["content"] == raw["golden_response"]
        assert r["judge_notes"] == ("The picture: a fire HCMAS\nThe place: Home\n"
                                    "What would help this person: stay calm")


def test_what_pcogaligns_files_lack_is_named(tmp_path):
    root = pcogalign_folder(tmp_path / "v4")
    with pytest.raises(UserError, match="--judge-url and --judge-model go together"):
        tasks.main(["--make-references", str(root), "--run-root", str(tmp_path)])
    for part in ("HCMAS-golden-train", "HCMAS-golden-test", "HCSHR-golden-test"):
        with pytest.raises(UserError, match=f"{part}.json is missing"):
            file_task("pcogalign", "--task-root", str(root))
        rows = json.loads((root / f"{part[:5]}-test.json").read_text())
        (root / f"{part}.json").write_text(json.dumps([{**rows[1], "golden_response": "x"}]))
    assert len(file_task("pcogalign", "--task-root", str(root)).splits["ood"]) == 1
    (root / f"{part}.json").write_text(json.dumps(rows[1:2]))
    with pytest.raises(UserError, match="form of pcogalign .*KeyError.'golden_response'"):
        file_task("pcogalign", "--task-root", str(root))


def test_diversity_by_hand_and_mean_states_without_padding():
    e = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    close(tasks.diversity(e), 3 / (2 * math.sqrt(0.5)))     # cosines .707, 0, .707
    close(tasks.diversity(e[:1].expand(4, -1)), 1.0)        # all alike
    agent = tiny_agent()
    texts = ["a red star", "a bus and a story about it"]
    means = tasks.backbone_embeddings(agent, 16, texts)
    for text, mean in zip(texts, means, strict=True):            # padding changes nothing
        ids = torch.tensor([agent.encoder.tokenizer.encode(text)])
        x = agent.backbone.model(input_ids=ids, position_ids=torch.arange(
            ids.shape[1]).expand(3, 1, -1)).last_hidden_state[0]
        close(mean, x.mean(0))
    close(tasks.backbone_embeddings(agent, 1, texts), means)            # one at a time
    assert tasks.backbone_embeddings(agent, 9, ["", "a"]).isfinite().all()


def test_evaluated_prompts_are_spread_over_their_split():
    task = SimpleNamespace(splits={"id": list(range(10)), "ood": [], "valid": [7, 8]})
    assert tasks.chosen_splits(task, ["id", "ood"], None) == {"id": list(range(10))}
    chosen = tasks.chosen_splits(task, ["ood", "valid", "id"], 4)
    assert chosen == {"valid": [7, 8], "id": [0, 2, 5, 7]}
    assert tasks.n_answers(chosen, {"greedy": (0.0, 1), "sampled": (1.0, 4)}) == 30


def test_evaluation_draws_are_keyed_by_the_row():
    """Whatever other rows stand beside it, in whatever order and batches."""
    agent, rows = roll()[0], [*ROWS, row("What do you see?", row_id="a"),
                              row("What do you see?", row_id="b")]
    def answers(rows, seed=1, tokens_at_once=2 ** 20):
        groups = tasks.generate(agent, rows, 1.0, 4, 10, seed, tokens_at_once)
        return {r["id"]: group for r, group in zip(rows, groups, strict=True)}
    every, decode = answers(rows), agent.encoder.tokenizer.decode
    ends = agent.encoder.stop_ids.tolist()
    for group in every.values():
        assert len(group) == 4
        for answer in group:
            assert len(answer["tokens"]) == len(answer["actions"])
            said = answer["tokens"][:-1] if answer["tokens"][-1] in ends else answer["tokens"]
            assert decode(said) == answer["text"]
    for again in (answers(rows[::-1]), answers(rows, tokens_at_once=1)):
        assert again == every                       # fails if keyed by place
    for some in (rows[:1], rows[1:4], [rows[4], rows[2]]):
        assert answers(some) == {r["id"]: every[r["id"]] for r in some}
    assert every["a"] != every["b"]                 # the same text: fails if the id is no key
    assert all(group != every[name] for name, group in answers(rows, 2).items())
    greedy = tasks.generate(agent, rows[3:], 0.0, 2, 10, 1, 2 ** 20)
    assert len({answer["text"] for group in greedy for answer in group}) == 1


def finished_run(root, *flags, max_new_tokens=5) -> Path:
    """A finished RL run of a tiny agent on root/task.jsonl, its base beside it."""
    for part in stage1.tiny_base(DOCUMENTS, seed=0, width=64, layers=2, vocab=400):
        part.save_pretrained(root / "tiny/base")
    shake(Qwen2_5_VLForConditionalGeneration.from_pretrained(root / "tiny/base"), 0.1
          ).save_pretrained(root / "tiny/base")
    rows = [{**r, "split": split} for r, split in zip(
        text_rows(8), ("sft", "rl", "rl", "rl", "valid", "id", "id", "id"))]
    task = write(root / "task.jsonl", rows)
    args = parsed(train_rl, "--run-root", str(root), "--task", task, "--device", "cpu",
                  "--codes", "16", "--idm-layers", "1", "--policy-layers", "1", *flags)
    names, stage = ("projector", "codebook", "world", "policy"), f"rl-task-latent-s{args.seed}"
    args.max_new_tokens = max_new_tokens
    agent = Agent.from_base(args).make(*names)
    run = kit.Run(args, kit.folder_of(args, stage, args.name), agent,
                  tasks.identity(args, "paired", "text", "task"))
    run.taken = 1
    run.finish(**{name: shake(getattr(agent, name), 0.15, seed).requires_grad_(True)
                  for seed, name in enumerate(names)})
    return run.folder


def expected(folder, temperature, n, max_new_tokens, split="id", seed=0, **more):
    """The answers of a run to its task's prompts, row -> n answers, and whether one is cut."""
    agent = Agent.from_run(folder, "cpu")
    agent.min_p = more.get("min_p", agent.min_p)
    rows = file_task(folder.parent.parent / "task.jsonl").splits[split]
    groups = tasks.generate(agent, rows, temperature, n, max_new_tokens, seed, 2 ** 14)
    return {r["id"]: [answer["text"] for answer in group] for r, group in zip(rows, groups)}


def test_an_evaluation_is_under_the_runs_own_limits_and_temperature(tmp_path, capsys):
    folder = finished_run(tmp_path, "--temperature", "0.6", "--min-p", "0.02")
    def evaluated(*flags, samples=3, file=folder):
        tasks.main([str(folder), "--device", "cpu", "--samples", str(samples), "--splits", "id",
                    *flags])
        rows = map(json.loads, (file / "predictions.jsonl").read_text().splitlines())
        parts = tasks.by_split_and_mode(rows)
        return [{r["id"]: r["answers"] for r in parts[f"id {mode}"]} for mode in ("greedy",
                                                                                 "sampled")]
    assert evaluated() == [expected(folder, 0.0, 1, 5), expected(folder, 0.6, 3, 5)]
    assert expected(folder, 0.6, 3, 5) != expected(folder, 1.0, 3, 5)
    assert evaluated("--temperature", "1.5", "--max-new-tokens", "9", samples=2) == [
        expected(folder, 0.0, 1, 9), expected(folder, 1.5, 2, 9)]
    assert expected(folder, 0.0, 1, 9) != expected(folder, 0.0, 1, 5)
    assert evaluated("--seed", "7", "--min-p", "0.9")[1] == expected(folder, 0.6, 3, 5, seed=7,
                                                                     min_p=0.9)
    before = (folder / "summary.json").read_text()
    other = tmp_path / "elsewhere"                  # and another task, under the same limits
    task = write(tmp_path / "other.jsonl", [{**r, "split": "id"} for r in text_rows(2)])
    got = evaluated("--out", str(other), "--task", task, file=other / folder.name)
    assert {k: len(v) for k, v in got[1].items()} == {"t0": 3, "t1": 3}
    second = tmp_path.with_name(f"{tmp_path.name}-second")          # runs of one name in two roots
    shutil.copytree(tmp_path, second)
    tasks.main([str(folder), f"{tmp_path}/../{second.name}/tiny/{folder.name}", "--splits", "id",
                "--out", str(tmp_path / "both"), "--device", "cpu"])
    for root in (tmp_path, second):
        assert (tmp_path / "both" / root.name / "tiny" / folder.name / "summary.json").exists()
    assert (folder / "summary.json").read_text() == before
    summary = json.loads((other / folder.name / "summary.json").read_text())
    said = capsys.readouterr().out
    assert set(summary) == {"id greedy", "id sampled"} and "Reference Overlap" not in said
    assert {"reward", "best_of_3", "Reference Overlap", "overall"} < set(summary["id sampled"])
    assert {r["min_p"] for r in summary.values()} == {0.02}


def test_an_evaluation_of_nothing_is_an_error(tmp_path, capsys):
    folder = finished_run(tmp_path)
    for splits in (["ood"], ["id", "ood"]):         # fails if an empty table is printed, exit 0
        with pytest.raises(UserError, match="--splits: task task has no prompts in ood"):
            tasks.main([str(folder), "--device", "cpu", "--splits", *splits])
    assert not (folder / "summary.json").exists()
    tasks.main([str(folder), "--device", "cpu", "--max-new-tokens", "2", "--samples", "1", "--out",
                str(tmp_path)])                     # one answer has no diversity: no error
    summary = json.loads((tmp_path / folder.name / "summary.json").read_text())
    assert set(summary) == {"id greedy", "id sampled"}                  # none named: what there is
    for flags in (["--samples", "0"], ["--samples", "-1"], ["--eval-prompts", "0"],
                  ["--max-new-tokens", "-1"], ["--max-new-tokens", "0"], ["--temperature", "-1"],
                  ["--temperature", "nan"], ["--temperature", "inf"], ["--min-p", "1.1"],
                  ["--min-p", "-0.1"], ["--min-p", "nan"], ["--tokens-at-once", "0"]):
        with pytest.raises(SystemExit) as end:
            tasks.main([str(folder), *flags])
        assert end.value.code == 2
        assert f"argument {flags[0]}: {flags[1]} does not lie in" in capsys.readouterr().err
    for argv in ([], [str(folder), "--rescore", "x"], ["--rescore", "x", "--make-references", "y"]):
        with pytest.raises(UserError, match="name run folders, .* or --rescore FILE, or --make-r"):
            tasks.main(argv)


def test_rl_evaluates_before_and_after_under_its_own_limits_and_temperature(tmp_path, endpoint):
    """The judge hears every answer. Fails if the evaluation has the task's limit and 1.0."""
    folder = finished_run(tmp_path)
    server, _ = endpoint()
    server.dimensions = tasks.DIMENSIONS
    flags = ["--run-root", str(tmp_path), "--task", str(tmp_path / "task.jsonl"), "--codes", "16",
             "--idm-layers", "1", "--policy-layers", "1", "--device", "cpu", "--parent",
             str(folder), "--judge-url", server.url, "--judge-model", "m", "--steps", "1"]
    train_rl.main([*flags, "--prompts", "2", "--group-size", "2", "--temperature", "0.6",
                   "--max-new-tokens", "7", "--lr", "1e-9"])
    run = tmp_path / "tiny/rl-task-grpo-latent-s0-codes16-idm1-policy1"
    heard = [re.search(r"<answer>\n(.*)\n</answer>", prompt, re.S)[1] for prompt in server.calls]
    want = [*expected(folder, 0.0, 1, 7).values(), *expected(folder, 0.6, 4, 7).values()]
    want = {answer for group in want for answer in group}
    rolled = len(heard) - len(want)                 # the rest is the step's, each heard once
    assert want <= {*heard} and 0 < rolled <= 4, (want, heard)
    config = json.loads((run / "config.json").read_text())
    resolved = {"max_new_tokens": 7, "min_p": 0, "clip": [0.2, 0.2], "splits": ["id", "ood"],
                "dtype": "float32", "device": "cpu"}
    assert resolved == {name: config["args"][name] for name in resolved}
    report = json.loads((run / "report.json").read_text())["reward"]
    scores = [fake_score(f"<answer>\n{answer}\n</answer>") / 10
              for group in expected(folder, 0.6, 4, 7).values() for answer in group]
    close(report["id sampled"]["before"], sum(scores) / len(scores), 1e-3)
    page = (run / "report.html").read_text()        # before and after, from the answers it has
    assert "gain over before" in page and "reward_mean</text>" in page and "Codes" in page
    for answer, in expected(folder, 0.0, 1, 7).values():
        assert page.count(html.escape(answer)) >= 2


# What a person looks at.


@pytest.mark.parametrize("space", ["latent", "token"])
def test_a_trace_tells_what_each_action_and_its_runner_ups_would_have_given(space):
    """Held against the policy with that action forbidden, at the first token and a later one."""
    agent = shake(copy.deepcopy(tiny_agent(space)), 0.1)
    text, steps = tasks.trace(agent, ROWS[0], 8, temperature=1.0, seed=3)
    again = tasks.generate(agent, [ROWS[0]], 0.0, 1, 8, 0, 2 ** 14)[0][0]
    assert "".join(s["token"] for s in steps).startswith(text) and len(steps) <= 8
    greedy, steps = tasks.trace(agent, ROWS[0], 8)
    assert greedy == again["text"] and [s["action"] for s in steps] == again["actions"]
    head, first = agent.policy.head, steps[0]
    assert all(s["p"] >= s["others"][0][1] >= s["others"][1][1] > 0 for s in steps)
    if space == "latent":
        n = len(head.weight)
        close(sum(p for _, p, _ in tasks.trace(agent, ROWS[0], 8, top=n)[1][0]["others"])
              + first["p"], 1, 1e-5)
        head.bias.data[first["action"]] = -math.inf
        other = tasks.trace(agent, ROWS[0], 8)[1][0]
        assert (other["action"], other["token"]) == (first["others"][0][0], first["others"][0][2])


def test_information_by_hand():
    close(tasks.information([(0, "x"), (0, "x"), (1, "y"), (1, "y")]), 1)
    close(tasks.information([(0, "x"), (0, "y"), (1, "x"), (1, "y")]), 0)
    # H(a) = ln 2, H(a, b) = H(b) + the undecided half: 1/2 ln 2 given x, nothing given y, z
    close(tasks.information([(0, "x"), (1, "x"), (0, "y"), (1, "z")]), 0.5)
    close(tasks.information([(0, "x"), (0, "y")]), 0)       # one code has nothing to explain


def test_the_atlas_by_hand():
    rows = {"r": {"id": "r", "persona": "Zed"}, "s": {"id": "s", "persona": "Orla"}}
    found = tasks.atlas([
        {"id": "r", "split": "id", "tokens": ["Beep", " boop", ".", " I", " see", "!"],
         "codes": [1, 1, 0, 0, 2, 0]},
        {"id": "s", "split": "ood", "tokens": ["Hello", "."], "codes": [2, 0]},
        {"id": "s", "split": "valid", "tokens": []}], rows)
    assert list(found["codes"]) == [0, 1, 2]                # by use
    zero, one, two = found["codes"].values()
    assert [code["share"] for code in (zero, one, two)] == [
        {"id": 3 / 6, "ood": 1 / 2, "valid": 0}, {"id": 2 / 6, "ood": 0, "valid": 0},
        {"id": 1 / 6, "ood": 1 / 2, "valid": 0}]
    assert zero["tokens"] == [(".", 2 / 4), (" I", 1 / 4), ("!", 1 / 4)]
    assert zero["persona"] == [("Zed", 3 / 4)] and one["place"] == [("begin", 1.0)]
    assert one["contexts"] == [("[Beep]", 1 / 2), ("Beep[ boop]", 1 / 2)]
    assert two["contexts"][0] == ("Beep boop. I[ see]", 1 / 2)
    assert one["role"] == [("own", 1.0)] and two["role"] == [("neutral", 1.0)]
    assert zero["role"] == [("plain", 1.0)]                 # marks belong to nobody
    close([found["word"], found["role"]], [1, 1])           # own words are code 1, neutral ones 2
    assert tasks.atlas([{"id": "s", "split": "id", "tokens": []}], rows)["codes"] == {}


def test_a_chart_by_hand():
    svg = tasks.svg_lines("<title>", {"a&b": [(0, 1.0), (10, 3.0), (5, math.nan)], "nothing": []})
    assert 'points="45.0,140.0 305.0,26.0"' in svg and "nothing" not in svg
    assert "&lt;title&gt;" in svg and "a&amp;b" in svg and svg.count("<circle") == 2
    assert tasks.svg_lines("t", {"a": [(math.nan, 1)]}) == "" == tasks.svg_lines("t", {})
    assert tasks.svg_lines("t", {"a": [(1, 1)]}).count("45.0,140.0") == 1       # a single point


class Tags(HTMLParser):
    """Open tags are closed in turn; every address is inside the page."""
    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.words = [], Counter(), []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.seen[tag] += 1
        assert not any(name.startswith("on") for name, _ in attributes)
        assert all(value.startswith("data:image/jpeg;base64,") for name, value in attributes
                   if name in ("src", "href", "action", "xlink:href"))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen[tag] += 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


NASTY = '<script>alert("x")</script> & \u0634\u0643\u0631\u0627 </table><img src=x onerror=y>'


@pytest.mark.parametrize("prompts", [0, 1, 30])
@pytest.mark.parametrize("runs", [1, 2, 6])
def test_the_page_is_whole_escaped_and_self_contained(prompts, runs):
    rows = [row(f"<image>{NASTY}" if n % 2 else NASTY, NASTY, [picture()] * (n % 2), f"{n}{NASTY}")
            | {"reference": NASTY, "persona": NASTY, "group": NASTY} for n in range(prompts)]
    task = tasks.Task("t", (NASTY,), (0, 1), {"id": rows}, None, 9)
    reply = f"{NASTY}: [Scores]: (5, 10)"
    assert task.reward(reply) == 0.5
    def entry(n):
        return {"predictions": [{
            "id": r["id"], "split": "id", "mode": mode, "prompt": r["messages"][:-1],
            "answers": [NASTY] * k, "reference": NASTY, "replies": [reply, None, "broken"][-k:],
            "scores": [task.scores(text) for text in [reply, None, "broken"][-k:]],
            "tokens": [NASTY, "x"], "codes": [3, n], "diversity": 1.5}
            for mode, k in (("greedy", 1), ("sampled", 3)) for r in rows],
            "log": [{"step": s, "reward_mean": None if s == 1 else s / 9} for s in range(5)],
            "idm": {"text": {0: 0.25, 3: 0.75}}, "trace": [
                {"token": NASTY, "action": 3, "p": 0.5, "others": [(1, 0.25, NASTY)]}]}
    page = tasks.page(task, NASTY, {f"{n}{NASTY}": entry(n) for n in range(runs)})
    tags = Tags(page)
    assert tags.seen["script"] == 0 and tags.seen["svg"] == 1 + bool(prompts)
    shown = random.Random(0).sample(rows, min(12, prompts))
    assert tags.seen["img"] == sum(len(r["images"]) for r in shown) and len(page) < 4 * 2 ** 20
    assert any(NASTY in data for data in tags.words)
    assert bool(prompts) == ("the token explains" in page)
    groups = {data for data in tags.words if data.endswith(f", {NASTY}")}      # greedy ones alone
    assert groups == ({f"id greedy, {NASTY}"} if prompts and runs > 1 else set())


def test_a_picture_in_the_page_is_small():
    big = Image.effect_noise((3000, 2000), 100).convert("RGB")
    data = tasks.picture(big, "x").split("base64,")[1].split('"')[0]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (224, 149)


def test_one_talks_to_a_run_and_bans_or_forces_its_codes(tmp_path, capsys, monkeypatch):
    folder = finished_run(tmp_path)
    picture().save(tmp_path / "p.png")
    def talked(*flags, said=("Hello?", "And now?")):
        lines = iter(said)
        monkeypatch.setattr("builtins.input", lambda prompt: next(lines, ""))
        tasks.main([str(folder), "--chat", "--device", "cpu", "--max-new-tokens", "6", *flags])
        return capsys.readouterr().out
    out = talked("--show-codes", "--image", str(tmp_path / "p.png"), "--system", "Be brief.")
    answers = re.findall(r"^agent: (.*)", out, re.M)
    assert len(answers) == 2
    agent = Agent.from_run(folder, "cpu")
    history, image = [], Image.open(tmp_path / "p.png")
    for turn, (said, answer) in enumerate(zip(("<image>Hello?", "And now?"), answers)):
        want = agent.chat(said, image, "Be brief.", history, max_new_tokens=6)
        assert want.splitlines()[:1] == answer.splitlines()[:1]
        history += [{"role": "user", "content": said}, {"role": "assistant", "content": want}]
    def codes(out):
        return set(map(int, re.findall(r"^ +(\d+) \d\.\d\d  '", out, re.M)))
    taken = codes(out)
    assert taken and taken <= set(range(16))
    banned = map(str, taken)
    assert not codes(talked("--show-codes", "--ban", *banned)) & taken
    assert codes(talked("--show-codes", "--force", "3", "7")) <= {3, 7}
    assert codes(talked("--show-codes")) == codes(talked("--show-codes")) and not codes(talked())
    for flags in (["--ban", "16"], ["--force", "-1"], ["--ban", *map(str, range(16))]):
        with pytest.raises(UserError, match="has 16 codes, counted from 0, of which one must be"):
            talked(*flags)
    with pytest.raises(UserError, match="one with --chat"):
        tasks.main([str(folder), str(folder), "--chat"])


def test_an_unusable_row_of_a_task_is_named_before_anything_is_rolled_out(tmp_path):
    """Fails if rows are looked at when they are reached: the test's come after all of RL."""
    folder, file = finished_run(tmp_path), tmp_path / "task.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[-1]["messages"][0]["content"] += "<|im_end|>"
    write(file, rows)
    with pytest.raises(UserError, match=f"task.jsonl:{len(rows)}: .*literal <.im_end.>; remove"):
        train_rl.main(["--run-root", str(tmp_path), "--task", str(file), "--codes", "16",
                       "--idm-layers", "1", "--policy-layers", "1", "--device", "cpu", "--parent",
                       str(folder), "--steps", "1"])
    assert not list(tmp_path.glob("tiny/rl-task-grpo*"))


@pytest.mark.parametrize("min_p", [0.02, 0.1, 0.5, 0.9])
def test_the_floor_of_min_p_is_that_share_of_the_best_probability(min_p):
    """Values just above and below it: fails with its root or its square for a floor."""
    p = torch.tensor([[1.0, min_p * 1.001, min_p * 0.999, 0.0],
                      [min_p * 0.999, min_p * 1.001, 0.0, 1.0]]) / 3
    want = torch.tensor([[0, 0, -math.inf, -math.inf], [-math.inf, 0, -math.inf, 0]])
    for shift in (0.0, 5.0):                        # logits are log-probabilities up to a constant
        assert torch.equal(kit.min_p_bias(p.log() + shift, min_p), want)


def test_a_latent_agents_codes_choose_tokens_above_the_backbones_floor_alone():
    agent = copy.copy(tiny_agent())
    states, actions = agent.states(collated())[0, :6], torch.arange(6)
    free = agent.next_token_logits(states, actions)
    p = (agent.backbone.lm_head(states) + agent.token_bias).softmax(-1)
    share = p / p.max(-1, keepdim=True).values      # of the backbone's best
    for n, k in itertools.product(range(6), (1, 3, 20, 100)):
        edge = share[n].sort(descending=True).values[k].item()
        for agent.min_p, keeps in ((edge * 0.9999, True), (edge * 1.0001, False)):
            logits = agent.next_token_logits(states, actions)
            kept = share >= agent.min_p
            assert kept[n].sum() >= 0.9 * k and bool(kept[n][share[n] == edge].all()) == keeps
            assert torch.equal(logits, free.masked_fill(~kept, -math.inf))
    agent.min_p = 1.0                               # the backbone's best alone
    assert torch.equal(agent.next_token_logits(states, actions).argmax(-1), p.argmax(-1))


def test_identity_is_that_of_the_files_bytes_wherever_they_lie(tmp_path, monkeypatch):
    def made(place, byte=b"x"):
        """Identity with data of 3 MiB, which differ in one byte of one file at the most."""
        (tmp_path / place / "root/deep").mkdir(parents=True, exist_ok=True)
        for name in ("p.jsonl", "t.jsonl", "task.jsonl", "root/deep/a.json", "root/b.json"):
            data = bytearray(3 * 2 ** 20)
            data[-1 if name == changed else 0] = (byte if name == changed else b"x")[0]
            (tmp_path / place / name).write_bytes(data)
        monkeypatch.chdir(tmp_path / place)
        flags = ["--paired", "p.jsonl", "--text", "t.jsonl", "--task", "task.jsonl"]
        args = parsed(train_rl, *flags)
        found = tasks.identity(args, "paired", "text", "task")
        args = parsed(train_rl, "--task", "mmrole", "--task-root", "root")
        return {**found, "mmrole": tasks.identity(args, "task")["task"]}
    for changed, key in (("p.jsonl", "paired"), ("t.jsonl", "text"), ("task.jsonl", "task"),
                         ("root/deep/a.json", "mmrole"), ("root/b.json", "mmrole")):
        here, there, other = made("here"), made("far/there"), made("here", b"y")
        assert here == there
        assert {k for k in here if here[k] != other[k]} == {key}
    args = parsed(train_rl)
    mini_ = tasks.identity(args, "paired", "text", "task")
    assert mini_ == {"codes": 3, "idm_layers": 2, "policy_layers": 2, "without": [],
                     "image_tokens": "4",
                     **dict.fromkeys(("paired", "text", "task"), f"mini {tasks.MINI_VERSION}")}
    assert "task" not in tasks.identity(args, "paired", "text")
    monkeypatch.setattr(tasks, "MINI_VERSION", 0)
    assert {k for k, v in tasks.identity(args, "paired", "text", "task").items()
            if v != mini_[k]} == {"paired", "text", "task"}
    for flags in (["--paired", "p.jsonl"], ["--model", "other"]):       # none, so not mini's
        assert tasks.identity(parsed(train_rl, *flags), "text")["text"] is None


# ---- README.md -------------------------------------------------------------------------------


def test_readme_names_functions_and_flags_that_exist():
    text, scripts = (HERE / "README.md").read_text(encoding="utf-8"), {
        "model.py": kit, "train_projector.py": stage1, "train_idm.py": train_idm,
        "train_bc.py": train_bc, "train_rl.py": train_rl, "eval.py": tasks}
    table = text.split("## Which function")[1].split("Imports go one way")[0]
    cells = [line.split(" | ")[1] for line in table.splitlines() if line.startswith("| ")][1:]
    for cell in cells:
        module = None
        for name in re.findall(r"`([^`]+)`", cell):
            if name in scripts:
                module = scripts[name]
            else:
                functools.reduce(getattr, name.split("."), module)
    commands = re.findall(r"(?:python|torchrun).*? (\w+\.py)(.*)", text.replace("\\\n", " "))
    assert len(cells) > 20 and len(commands) > 40
    for script, rest in commands:
        if script in scripts:
            known = scripts[script].arguments()._option_string_actions
            assert set(re.findall(r"(?<!\S)--[a-z-]+", rest.split("`")[0])) <= set(known), rest


def test_readmes_lines_turn_the_papers_sources_into_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("cc12m/00/1.jpg", "n24news/images/n1.jpg", "llava/images/coco/l1.jpg"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        picture().save(file)
    Path("cc12m/00/1.txt").write_text("a bus\n")
    Path("cc12m/00/2.txt").write_text("its picture could not be downloaded")
    write(Path("n24news/nytimes_dataset.json"), [
        {"image_id": i, "article": f"news {i}", "caption": "c"} for i in ("n1", "gone")])
    write(Path("llava/llava_next_raw_format_processed.json"), [
        {"id": "l", "image": "coco/l1.jpg", "conversations": [
            {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A bus."}]},
        {"id": "text", "conversations": [{"from": "human", "value": "Hi"}]}])
    write(Path("helpsteer3.jsonl.gz"), [
        {"context": [{"role": "user", "content": "Hi"}], "response1": "one", "response2": "two",
         "overall_preference": p} for p in (-2, 3)])
    write(Path("slimpajama.jsonl"), [{"text": "some text", "meta": {"redpajama_set_name": "C4"}}])
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", (HERE / "README.md"
                ).read_text(), re.S) if "cc12m.jsonl" in block]
    exec(compile(block, "README.md", "exec"), {})
    def said(name):
        return [r["messages"][-1]["content"] for r, _ in kit.read_rows(name)]
    assert said("cc12m.jsonl") == ["a bus"] and said("n24news.jsonl") == ["news n1"]
    assert said("llava.jsonl") == ["A bus."] and said("helpsteer3.jsonl") == ["one", "two"]
    assert said("slimpajama.jsonl") == ["some text"]
    for r, _ in itertools.chain(*(kit.read_rows(f"{name}.jsonl")
                                  for name in ("cc12m", "n24news", "llava"))):
        assert len(r["images"]) == 1 and collated([r]).pixels is not None


# ---- train_projector.py ----------------------------------------------------------------------


def test_gaussian_nll_by_hand():
    mu, log_var = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, -1.0]], requires_grad=True)
    target = torch.tensor([[3.0, 2.0]], requires_grad=True)
    nll = stage1.gaussian_nll(mu, log_var, target)
    close(nll, [(4 * math.exp(-0.5) + 0.5 + 0 * math.exp(1) - 1.0) / 2])
    nll.sum().backward()
    assert target.grad is None                      # fails if the target is not detached


def test_projector_losses_by_brute_force():
    agent, batch = tiny_agent(), collated()
    P, Q = agent.projector.P, agent.projector.P_inv
    e, e_t, paired, cycle = agent.embeddings(batch), agent.text_embeddings(batch), 0.0, 0.0
    def nll(m, a, target):
        return ((m.mu(a) - target) ** 2 / m(a)[1].exp() + m(a)[1]).mean()
    for b, t in batch.real.nonzero().tolist():
        if batch.seen_image[b, t]:
            paired += nll(P, e_t[b, t], e[b, t]) + nll(Q, e[b, t], e_t[b, t])
        elif not batch.has_image[b]:
            cycle += nll(Q, P.mu(e[b, t]), e[b, t])
    for with_cycle in (True, False):                # False: --without cycle, and step 1
        losses = stage1.projector_losses(agent, batch, e, with_cycle)
        assert list(losses) == ["loss_paired", "loss_cycle"]
        close(losses["loss_paired"], paired, 1e-4)
        close(losses["loss_cycle"], cycle if with_cycle else 0.0, 1e-4)
    counts = kit.token_counts(stage1.projector_masks([batch, batch]))
    assert counts == {"loss_paired": 2 * batch.seen_image.sum(),
                      "loss_cycle": 2 * batch.real[1].sum()}
    counts = kit.token_counts(stage1.projector_masks([]))
    assert counts == {"loss_paired": 1, "loss_cycle": 1}                # no rows: no division by 0


def trainable(*names):
    agent = copy.deepcopy(tiny_agent())
    agent.train_only(*names)
    return agent


def test_idm_report_tells_what_noise_on_the_embeddings_changes(monkeypatch):
    held, agent = {"id": examples()[:1], "text": examples()[1:2]}, tiny_agent()
    for noise, same in ((0.0, True), (9.0, False)):
        monkeypatch.setattr(train_idm, "NOISE", noise)
        report, shares = train_idm.idm_report(agent, held, 999)
        assert set(report) == {"id", "text", "text, no P"} == set(shares)
        for row_ in report.values():
            assert (row_["kept"] == 1 and row_["IDM"] == row_["IDM, noise"]) == same
            assert same or row_["kept"] < 0.9


def test_held_out_reports_by_brute_force():
    """Of an image row and a text row: what the README's figures of the stages rest on."""
    agent, held = tiny_agent(), {"id": examples()[:1], "text": examples()[1:2]}
    squared, inferred = stage1.projector_report(agent, held, 999), train_idm.idm_report(
        agent, held, 999)[0]
    cloned = train_bc.bc_report(agent, held, 999)
    P, Q = agent.projector.P, agent.projector.P_inv
    for name, batch in (("id", collated(ROWS[:1])), ("text", collated(ROWS[1:2]))):
        e, e_t = agent.embeddings(batch)[0], agent.text_embeddings(batch)[0]
        states, where = agent.states(batch)[0], batch.predicts[0].nonzero()[:, 0].tolist()
        seen = batch.seen_image[0] if name == "id" else batch.real[0]
        wanted = {"cycle": Q.mu(P.mu(e_t[seen])) - e_t[seen]}
        if name == "id":
            wanted |= {"P": P.mu(e_t[seen]) - e[seen], "P'": Q.mu(e[seen]) - e_t[seen],
                       "identity": e_t[seen] - e[seen]}
        assert squared[name].keys() == wanted.keys()
        close([squared[name][key] for key in wanted], [d.square().mean() for d in wanted.values()])
        codes, hits, ce = [], [], {"IDM": [], "backbone": [], "mixture": []}
        for t in where:
            positions, x = torch.arange(t + 2)[None], batch.tokens[0, t + 1]
            codes.append(int(agent.idm(states[None, :t + 2], positions)[0, -1].argmax()))
            pi = agent.policy(states[None, :t + 1], positions[:, :-1])[0, -1].double().softmax(-1)
            hits.append(float(pi.argmax() == codes[-1]))
            p = agent.next_token_logits(states[t].expand(16, -1), torch.arange(16))
            p = p.double().softmax(-1)
            base = (agent.backbone.lm_head(e[t]) + agent.token_bias).double().softmax(-1)
            for key, chance in (("IDM", p[codes[-1], x]), ("mixture", pi @ p[:, x]),
                                ("backbone", base[x])):
                ce[key].append(-chance.log())
        wanted = {key: torch.stack(values).mean() for key, values in ce.items()}
        generator = torch.Generator().manual_seed(0)
        permuted = torch.tensor(codes)[torch.randperm(len(codes), generator=generator)]
        drawn = torch.randint(16, (len(codes),), generator=generator)
        for key, others in (("shuffled", permuted), ("random", drawn)):
            wanted[key] = torch.stack([-agent.next_token_logits(states[t][None], code[None])[0]
                                       .double().log_softmax(-1)[batch.tokens[0, t + 1]]
                                       for t, code in zip(where, others)]).mean()
        close([inferred[name][key] for key in ("IDM", "backbone", "shuffled", "random")],
              [wanted[key] for key in ("IDM", "backbone", "shuffled", "random")], 1e-4)
        close([cloned[name][key] for key in ("policy x world", "base", "accuracy")],
              [wanted["mixture"], wanted["backbone"], np.mean(hits)], 1e-4)
        assert inferred[name]["codes_used"] == len(set(codes))


def test_reach_by_brute_force():
    """Fails if unreached tokens count as passed over, or if prompts' tokens count."""
    agent, tokens, misses = tiny_agent(), 0, Counter()
    said = rollout(agent, examples(ROWS[:2], prompt=True), 4, 6, 2.0, [0, 1]).texts
    rows = [{**row_, "messages": [*row_["messages"][:-1], {"role": "assistant", "content": text}]}
            for row_, text in zip((*ROWS[:1] * 4, *ROWS[1:2] * 4), said)]   # codes give most of it
    for row_ in rows:
        batch = agent.encoder.collate([agent.encoder.encode(row_)])
        states, start = agent.states(batch)[0], int(agent.encoder.collate(
            [agent.encoder.encode(row_, prompt=True)]).text_lengths)
        for t in range(start - 1, int(batch.text_lengths) - 1):
            pi = agent.policy(states[None, :t + 1], torch.arange(t + 1)[None])[0, -1]
            given = agent.next_token_logits(states[t].expand(16, -1), torch.arange(16)).argmax(-1)
            given, tokens = (given == batch.tokens[0, t + 1]).tolist(), tokens + 1
            misses["unreached"] += not any(given)
            misses["passed_over"] += any(given) and not given[int(pi.argmax())]
    assert min(misses.values()) > 3 and sum(misses.values()) < tokens - 3
    for budget in (1, 999):
        assert tasks.reach(agent, rows, budget) == pytest.approx(
            {name: n / tokens for name, n in misses.items()})


def test_a_batch_without_any_term_has_a_loss_of_zero_that_can_be_differentiated():
    """Text-only rows among the paired ones in step 1; rows without a response in SFT."""
    agent, batch = trainable("projector", "policy", "world"), collated(ROWS[1:2])
    losses = stage1.projector_losses(agent, batch, agent.embeddings(batch).detach(), False)
    sum(losses.values()).backward()
    assert losses == {"loss_paired": 0, "loss_cycle": 0}
    batch = agent.encoder.collate([agent.encoder.encode(ROWS[1], prompt=True, responses_only=True)])
    for kind, (_, trains, losses) in train_bc.KINDS.items():
        agent = agent.make_token_policy() if kind in ("token", "lm") else trainable(*trains)
        loss, hits = losses(agent, batch)
        loss.sum().backward()
        assert len(loss) == len(hits) == 0


# ---- train_idm.py ----------------------------------------------------------------------------


def test_keyed_gumbel_is_the_same_in_every_batch_split():
    ids, lengths = ["a", "b", "c"], [5, 9, 7]
    noise = keyed_gumbel(ids, lengths, 4, 0, "idm", 3)
    for b in range(3):
        alone = keyed_gumbel(ids[b:b + 1], lengths[b:b + 1], 4, 0, "idm", 3)
        assert torch.equal(noise[b, :lengths[b]], alone[0])
    for other in ((1, "idm", 3), (0, "idm", 4)):    # fails if step or seed is left out of the key
        assert not torch.equal(keyed_gumbel(ids, lengths, 4, *other), noise)
    assert not torch.equal(noise[0, :5], noise[1, :5])
    many = keyed_gumbel(["x"], [20_000], 4, 0)      # mean: Euler's constant; variance: pi^2 / 6
    close([many.mean(), many.var()], [0.5772, math.pi ** 2 / 6], 0.02)


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
    close(train_idm.negative_entropy(torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])),
          [-math.log(2), 0.75 * math.log(0.75) + 0.25 * math.log(0.25)])


def inverse_losses(agent, rows=ROWS):
    batch = collated(rows)
    noise = keyed_gumbel(batch.row_ids, batch.text_lengths.tolist(), 16, 0, "idm", 0)
    return batch, noise, train_idm.inverse_losses(agent, batch, agent.states(batch), noise)


def test_inverse_losses_by_brute_force_and_in_any_batch_split():
    agent = tiny_agent()
    batch, noise, (ce, entropy, codes) = inverse_losses(agent)
    states, where = agent.states(batch), batch.predicts.nonzero().tolist()
    for k, (b, t) in enumerate(where):              # the code has seen states up to t + 1 only
        logits = agent.idm(states[b:b + 1, :t + 2], torch.arange(t + 2)[None])[0, -1]
        code = (logits + noise[b, t]).argmax()
        x = agent.backbone.lm_head(agent.world(states[b, t], agent.codebook.weight[code]))
        x = x + agent.token_bias                    # fails if vision tokens are not masked
        close(ce[k], F.cross_entropy(x, batch.tokens[b, t + 1]), 1e-4)
        close(entropy[k], (logits.softmax(-1) * logits.log_softmax(-1)).sum(), 1e-4)
        assert codes[k] == code
    assert len(where) == len(ce)
    close(torch.cat([inverse_losses(agent, [r])[2][0] for r in ROWS]), ce, 1e-4)
    assert kit.token_counts(train_idm.inverse_masks([batch])) == {
        "ce_paired": batch.predicts[[0, 2]].sum(), "ce_text": batch.predicts[1].sum()}


def test_inverse_loss_by_hand():
    """Two paired tokens and three of text-only rows, of 4 and 10 on all ranks."""
    ce = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], requires_grad=True)
    neg_entropy = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0], requires_grad=True)
    paired = torch.tensor([True, False, False, True, False])
    counts = {"ce_paired": 4.0, "ce_text": 10.0}
    loss = train_idm.inverse_loss(ce, neg_entropy, paired, counts)
    close(loss, 5 / 4 + 10 / 10 - 1e-3 * (5 / 4 + 10 / 10), 1e-6)       # fails if pooled: 15 / 14
    on_ce, on_entropy = gradients(loss, [ce, neg_entropy])
    close(on_ce, [1 / 4, 1 / 10, 1 / 10, 1 / 4, 1 / 10], 1e-6)
    close(on_entropy, 1e-3 * on_ce, 1e-9)           # entropy is to grow
    for some in (paired, ~paired):                  # any split adds up, a kind that is absent too
        loss = loss - train_idm.inverse_loss(ce[some], neg_entropy[some], paired[some], counts)
    close(loss, 0.0, 1e-6)


def test_inverse_loss_reaches_idm_codebook_and_merge_only():
    agent = trainable("idm", "codebook", "world", "projector")
    inverse_losses(agent)[2][0].sum().backward()
    for name, p in agent.named_parameters():        # fails if states are not detached
        trained = name.split(".")[0] in ("idm", "codebook", "world")
        assert (p.grad is not None and bool(p.grad.any())) == trained, name


# ---- train_bc.py -----------------------------------------------------------------------------


def test_cloning_loss_and_sft_losses_by_brute_force():
    close(train_bc.cloning_loss(torch.tensor([[math.log(3), 0.0]] * 2), torch.tensor([0, 1])),
          [-math.log(0.75), -math.log(0.25)])
    agent, batch = tiny_agent(), collated()
    states, (at, targets) = agent.states(batch), batch.labelled()
    codes = agent.idm_logits(states)[at].argmax(-1)                     # noise-free
    loss, hits = train_bc.KINDS["clone"][2](agent, batch)
    logits = agent.policy(states, kit.text_positions(states))[:, :-1][at]     # at t, not t + 1
    close(loss, F.cross_entropy(logits, codes, reduction="none"))
    assert torch.equal(hits, logits.argmax(-1) == codes)
    loss, hits = train_bc.KINDS["release"][2](agent, batch)
    assert (logits.argmax(-1) != codes).any()       # the policy's codes, not the IDM's
    x = agent.world(states[:, :-1][at], agent.codebook(logits.argmax(-1)))
    close(loss, F.cross_entropy(agent.backbone.lm_head(x) + agent.token_bias, targets,
                                reduction="none"), 1e-4)
    assert torch.equal(hits, loss < math.log(2))


def test_the_untrained_token_policy_is_the_base_model():
    agent, batch = copy.deepcopy(tiny_agent()).make_token_policy(), collated(ROWS[:1])
    logits = agent.backbone.lm_head(full_pass(examples()[0])[0][-1][0]) + agent.token_bias
    at, targets = batch.labelled()
    want = logits.log_softmax(-1)[batch.text_index[0, :-1][at[0]]][range(len(targets)), targets]
    loss, hits = train_bc.KINDS["token"][2](agent, batch)
    close(loss, -want)
    assert torch.equal(hits, loss < math.log(2))
    agent.policy.head.weight.data += 1              # an untied copy: the backbone keeps its own
    assert not torch.equal(agent.policy.head.weight, agent.backbone.lm_head.weight)


# ---- train_rl.py -----------------------------------------------------------------------------

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
    for G, value in itertools.product(range(2, 17), (0.1, 0.55, 0.7, 0.9375, 1 / 3, 0.606)):
        equal = torch.full((1, G), value)           # dynamic sampling drops these: std <= 1e-8,
        assert train_rl.group_moments(equal)[1].item() <= 1e-8      # whatever the mean's rounding


def test_beta_weights_by_hand_and_their_guards():
    r = torch.tensor([[0.1, 0.3], [0.4, 0.6], [0.8, 1.0]])
    p = r.mean(1)
    m, v = p.mean().item(), p.var().item()          # method of moments, then 1 + a/3, 1 + b/3
    c = m * (1 - m) / v - 1                         # fails with alpha = 1 + a, without the third
    fit = torch.distributions.Beta(max(1, 1 + c * m / 3), max(1, 1 + c * (1 - m) / 3))
    want = (r - p[:, None]) / fit.log_prob(p).exp()[:, None]
    close(train_rl.advantages(r, "beta"), want, 1e-4)
    close(train_rl.advantages(r * 2 + 1, "beta", (1.0, 3.0)), want, 1e-4)   # mapped to [0, 1]
    for flat in ([0.0, 0.0], [1.0, 1.0], [0.3, 0.3], [0.4]):                # no Beta fits: weight 1
        close(train_rl.beta_weights(torch.tensor(flat)[:, None], torch.tensor(flat)),
              torch.ones(len(flat), 1))
    edge = torch.tensor([0.0, 0.5, 1.0, 0.4])
    w = train_rl.beta_weights(edge[:, None], edge)
    assert w.isfinite().all() and w.max() <= 1e6    # fails without the bound on 1 / pdf
    assert train_rl.advantages(edge[:, None].expand(4, 3), "beta")[0].abs().max() == 0


@pytest.mark.parametrize("masked", [False, True])
def test_action_statistics_equal_brute_force_in_any_chunk(masked):
    torch.manual_seed(0)
    new, ref = (type("Policy", (), {"head": nn.Linear(8, 11)}) for _ in range(2))
    x, ref_x = torch.randn(7, 8, requires_grad=True), torch.randn(7, 8)
    actions, bias, n = torch.arange(7), torch.zeros(11), 9 if masked else 11
    bias[n:] = -math.inf
    p, q = (F.softmax(net.head(h)[:, :n] / 0.7, -1) for net, h in ((new, x), (ref, ref_x)))
    want = [p[range(7), actions].log(), -(p * p.log()).sum(-1), q[range(7), actions].log(),
            (p * (p.log() - q.detach().log())).sum(-1)]
    params = [x, *new.head.parameters()]
    for chunk in (1, 33, 2 ** 24):
        got = action_statistics(new, x, actions, 0.7, bias, ref, ref_x, chunk)
        for a, b in zip(got, want, strict=True):
            close(a, b)
        for k in (0, 1, 3):
            for a, b in zip(gradients(got[k].sum(), params), gradients(want[k].sum(), params)):
                close(a, b)
        assert not got[2].requires_grad             # the reference is not trained
    assert action_statistics(new, x, actions, 0.7, bias)[2:] == (None, None)
    assert action_statistics(new, x[:0], actions[:0])[0].shape == (0,)


def test_surrogate_kl_weights_and_overlong_by_hand():
    close(train_rl.overlong_punishment(torch.tensor([0, 80, 85, 90, 100, 120]), 100),
          [0, 0, -0.25, -0.5, -1, -1])
    ratio, A = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1]), torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    new = ratio.log().requires_grad_()
    loss, clipped = train_rl.surrogate(new, torch.zeros(5), A, 0.2, 0.28)
    close(loss, [-1.28, 1.5, -0.5, 0.8, -2.2])      # fails with one clip for both sides, or max
    close(gradients(loss.sum(), [new])[0], [0, 1.5, -0.5, 0, -2.2])     # clipped: no gradient
    close(train_rl.k3(torch.tensor([0.0, 0.3]), torch.tensor([0.5, 0.3])), [math.exp(.5) - 1.5, 0])
    p, q = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    close((p.exp() * train_rl.k3(p, q)).sum(), (p.exp() * (p - q)).sum())   # exact on average
    # Fails if the advantage's sign is ignored: these are the tokens without a gradient above.
    assert clipped.tolist() == [True, False, False, True, False]
    zero = torch.zeros(3)
    assert not train_rl.surrogate(zero, zero, torch.tensor([1.0, -1, 0]), 0.0, 0.0)[1].any()
    for name, want in (("sequence", [1 / 4, 1 / 6]), ("length", [1 / 20] * 2), ("sum", [1 / 2] * 2),
                       ("tokens", [1 / 5] * 2)):    # answers of 2 and 3 tokens, at most 10 each
        close(train_rl.token_weights(name, torch.tensor([2, 3]), 2, 5, 10), want)
    assert math.isfinite(train_rl.token_weights("sequence", torch.tensor([0]), 1, 1, 1))


def test_clipped_tokens_are_those_without_a_gradient():
    new, A = torch.meshgrid(torch.linspace(-1, 1, 21), torch.tensor([-2.0, 0.5]), indexing="ij")
    new = new.flatten().requires_grad_()
    loss, clipped = train_rl.surrogate(new, torch.zeros(42), A.flatten(), 0.2, 0.28)
    gradient = gradients(loss.sum(), [new])[0]
    assert torch.equal(clipped, gradient == 0)
    assert 0 < (gradient == 0).sum() < 42


def entries(algo, *flags, ranks=1) -> dict:
    """The algorithm's entries as `main` has them in its arguments."""
    args = parsed(train_rl, "--algo", algo, *flags)
    train_rl.fill_algorithm(args, ranks)
    return {name: tuple(value) if isinstance(value, list) else value
            for name in vars(train_rl.ALGORITHMS[algo]) for value in [getattr(args, name)]}


def test_flags_override_the_algorithms_row():
    for algo, usual in train_rl.ALGORITHMS.items():
        assert entries(algo) == vars(usual)
    got = entries("dapo", "--extras", "overlong", "--beta", "0.1", "--scale", "none")
    assert got == vars(train_rl.Algorithm("none", (0.2, 0.28), "tokens", 0.1, ("overlong",)))
    got = entries("dapo", "--extras", "--clip", "0.1", "0.3", "--aggregate", "sum")
    assert got == vars(train_rl.Algorithm("group", (0.1, 0.3), "sum", 0.0, ()))
    assert entries("grpo", "--beta", "0")["beta"] == 0      # fails if what is false is not given
    with pytest.raises(UserError, match="another support than is scored"):
        entries("grpo", "--action-space", "token", "--min-p", "0.1")
    args = parsed(train_rl, "--algo", "dapo")
    train_rl.fill_algorithm(args)                   # config.json holds what was resolved
    assert json.loads(json.dumps(vars(args)))["clip"] == args.clip == [0.2, 0.28]


def test_more_ranks_than_prompts_are_refused():
    with pytest.raises(UserError, match="--prompts 8 is less than the 9 ranks; raise it"):
        entries("grpo", ranks=9)
    entries("grpo", ranks=8)


def test_rewards_near_the_references_use_the_whole_of_bnpos_range(tmp_path, monkeypatch):
    """A ratio against a reference: 1 where it is as good. Fails with the bounds (0.1, 10), which
    make .09 of it and a tenth of every advantage."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    judge = ["--judge-url", "http://h/v1", "--judge-model", "m", "--run-root", str(tmp_path)]
    file = write(tmp_path / "mine.jsonl", text_rows(9))
    r = torch.tensor([[0.9, 1.1], [0.6, 1.0], [1.2, 1.4], [0.0, 3.0]])
    for task in (file_task("mini", *judge), file_task(file, *judge),
                 file_task("mmrole", "--task-root", str(mmrole_folder(tmp_path / "m")), *judge)):
        assert task.bounds == tasks.BOUNDS == (0.0, 2.0)
        close(train_rl.to_unit(r, task.bounds), [[0.45, 0.55], [0.3, 0.5], [0.6, 0.7], [0, 1]])
    equal = torch.tensor([[0.9, 1.1]] * 3)          # no Beta fits: the plain difference, halved
    close(train_rl.advantages(equal, "beta", task.bounds), torch.tensor([[-0.05, 0.05]] * 3))


def test_prompts_run_through_every_row_once_an_epoch():
    p, again = (train_rl.Prompts([{"id": i} for i in range(5)], 3) for _ in range(2))
    ids = [r["id"] for n in (2, 3, 4, 1) for r in p.next(n)]
    assert sorted(ids[:5]) == sorted(ids[5:]) == list(range(5)) and ids[:5] != ids[5:]
    again.load_state_dict({"cursor": 4})            # of a checkpoint
    assert [r["id"] for r in again.next(6)] == ids[4:] and again.state_dict() == p.state_dict()
    p.load_state_dict({"cursor": 2})                # back into an epoch that is over
    assert [r["id"] for r in p.next(8)] == ids[2:]


def test_drawing_prompts_costs_next_to_nothing():
    """Fails if all 20,000 are shuffled for each one: 90 ms a step."""
    prompts, times = train_rl.Prompts([{"id": i} for i in range(20_000)], 0), []
    ids = {r["id"] for r in prompts.next(1)}        # the epoch's one shuffle
    for _ in range(50):
        began = time.perf_counter()
        ids |= {r["id"] for r in prompts.next(8)}
        times.append(time.perf_counter() - began)
    assert sorted(times)[25] < 0.003 and len(ids) == 401


class Recorder(torch.optim.SGD):
    """Keeps the gradients of every step; at a learning rate of 0 it changes nothing."""

    def __init__(self, policy):
        self.named, self.steps = dict(policy.named_parameters()), []
        super().__init__(policy.parameters(), 0.0)

    def step(self, closure=None):
        self.steps.append({name: p.grad.clone() for name, p in self.named.items()})
        super().step(closure)


def update(r, rewards, algo, *flags, drop=(), lr=0.0, steps=None, agent=None, parts=None,
           skipped=0):
    """Policy gradients of each of update's steps (into `steps`, too), figures, the reference."""
    agent = agent or tiny_agent()
    agent = with_modules(agent, policy=copy.deepcopy(agent.policy))
    agent.train_only("policy")
    reference = shake(copy.deepcopy(agent.policy), 0.05, 9)
    args = parsed(train_rl, "--algo", algo, "--group-size", "3", "--temperature", "0.7",
                  "--inner-epochs", "1", *flags)
    train_rl.fill_algorithm(args)
    optimizer = Recorder(agent.policy)
    optimizer.steps = optimizer.steps if steps is None else steps
    groups = {place: {"id": ROWS[place]["id"], "rewards": 0 * rewards[place],
                      "shaped": rewards[place]}     # these count
              for place in range(3) if place not in drop}
    run = SimpleNamespace(skipped=skipped, skipped_all=0, taken=0, folder="run")
    figures = train_rl.update(
        agent, reference if args.beta else None, optimizer, lr, run,
        parts or [(r, [0, 1, 2])], groups, args, tasks.Task("t", ("d",), (0.0, 1.0), {}, None, 10))
    assert run.taken == len(optimizer.steps)
    return optimizer.steps, figures, reference


def test_the_tenth_gradient_that_is_not_finite_names_the_prompts():
    agent = with_modules(tiny_agent(), policy=copy.deepcopy(tiny_agent().policy))
    agent.policy.norm.weight.data[0] = NAN
    rewards = torch.tensor([[0.1, 0.9, 0.4]] * 3)
    with pytest.raises(UserError, match="ten non-finite steps.*'front', 'text', 'two'"):
        update(roll()[1], rewards, "dr_grpo", agent=agent, skipped=9)


@pytest.mark.parametrize("algo", list(train_rl.ALGORITHMS))
def test_update_gradient_equals_the_papers_formula_written_out(algo):
    """One failed judgement, one prompt dropped by DAPO; one full pass of the policy an answer.
    Fails if the failed answer stays in the mask, or if another term is aggregated otherwise."""
    r, drop = roll()[1], (2,) if algo == "dapo" else ()
    rewards = torch.tensor([[0.1, 0.9, 0.4], [0.5, NAN, 0.7], [0.2, 0.2, 0.2]])
    (got,), figures, reference = update(r, rewards, algo, drop=drop)
    beta = 0.01 if algo == "grpo" or "released" in algo else 0.0
    assert figures["ratio_error"] < 1e-4 and (figures.get("kl", 0) > 0) == ("kl" in figures) \
        == (beta > 0)
    (small,), *_ = update(r, rewards, algo, drop=drop,
                          parts=[(r.select([i]), [i]) for i in range(3)])
    for n, g in small.items():
        close(g, got[n], 1e-4)                      # any split into micro-batches: same gradient
    policy = copy.deepcopy(tiny_agent().policy).requires_grad_(True)
    total, used, tokens, p = 0.0, 0, 0, rewards.nanmean(1)
    for n in range(9):
        i, k = n // 3, int(r.mask[n].sum())
        if rewards.view(-1)[n].isnan() or i in drop:
            continue
        A = rewards.view(-1)[n] - p[i]
        if algo not in ("dr_grpo", "bnpo"):         # fails if the release's rows are not scaled
            A = A / (rewards[i][~rewards[i].isnan()].std() + 1e-4)
        if algo == "bnpo":
            A = A * train_rl.beta_weights(p[i].view(1, 1), p)[0, 0]
        x = torch.cat([r.prompt[i][r.prompt_mask[i]], r.inputs[n, :k]])[None]
        pi, ref = (F.log_softmax(net(x, kit.text_positions(x))[0, -k:] / 0.7, -1)
                   [range(k), r.actions[n, :k]] for net in (policy, reference))
        d = ref.detach() - pi
        # At ratio 1 the surrogate's gradient is the policy gradient -A grad log pi.
        loss = -A * pi + beta * (d.exp() - d - 1)
        name = algo.removesuffix("_released")
        total += {"grpo": loss.mean(), "dr_grpo": loss.sum() / 10}.get(name, loss.sum())
        used, tokens = used + 1, tokens + k
    total = total / (tokens if algo.startswith("dapo") or algo == "bnpo_released" else used)
    names, params = zip(*policy.named_parameters())
    want = gradients(total, params)
    norm = math.sqrt(sum(float(g.square().sum()) for g in want))
    close(figures["grad_norm"], norm, 2e-4)
    for n, g in zip(names, want):
        close(got[n], g / max(1.0, norm), 2e-4)     # clipped to norm 1


def test_update_steps_once_for_each_inner_epoch():
    """At a learning rate of 0 each pass has the first one's gradient."""
    r, rewards = roll()[1], torch.tensor([[0.1, 0.9, 0.4], [0.5, NAN, 0.7], [0.2, 0.3, 0.2]])
    (want,), *_ = update(r, rewards, "grpo")
    steps, *_ = update(r, rewards, "grpo", "--inner-epochs", "3")
    assert len(steps) == 3
    for step in steps:
        for n, g in step.items():
            close(g, want[n], 1e-4)


@pytest.mark.parametrize("space,dtype", [
    ("latent", torch.float32), ("token", torch.float32), ("latent", torch.bfloat16)], ids=str)
def test_the_first_ratio_of_every_token_is_exactly_one(space, dtype):
    """A clip range of no width counts each token whose ratio is not 1, be it by rounding. Fails if
    the rollout's own log-probs are the old ones."""
    agent = copy.deepcopy(tiny_agent(space))
    agent.backbone.to(dtype)
    agent.train_only()
    shake(agent.policy.float(), 0.1)
    r, rewards = rollout(agent, examples(prompt=True), 3, 10, 0.7, [5, 6, 7]), torch.tensor(
        [[0.1, 0.9, 0.4], [0.5, 0.2, 0.7], [0.2, 0.3, 0.2]])
    def figures(*flags, **more):
        return update(r, rewards, "dr_grpo", "--clip", "0", "0", "--action-space", space, *flags,
                      agent=agent, **more)[1]
    assert figures()["clip_fraction"] == 0
    assert figures("--inner-epochs", "3")["clip_fraction"] == 0         # nothing moves the policy
    assert figures()["ratio_error"] > 0             # the rollout's are not the same to the bit
    moved = figures("--inner-epochs", "2", lr=0.3)["clip_fraction"]     # some in the second pass
    assert 0.1 < moved < 0.6, moved


@pytest.mark.parametrize("dtype,low,high", [(torch.float32, 0.8e-4, 1.2e-4),
                                            (torch.bfloat16, 0.01, 0.03)], ids=str)
def test_a_rollout_of_another_policy_is_refused_before_any_step(dtype, low, high):
    agent = copy.deepcopy(tiny_agent())
    agent.backbone.to(dtype)
    agent.train_only()
    agent.policy.float()
    r, rewards = rollout(agent, examples(prompt=True), 3, 10, 0.7, [5, 6, 7]), torch.rand(3, 3)
    logps, one = r.logps, torch.zeros_like(r.logps)
    one[0, 0] = r.mask.sum()                        # far off, but a single token
    for r.logps in (logps + low, logps - low, logps + low * one):
        _, figures, _ = update(r, rewards, "grpo", agent=agent)
        assert figures["ratio_error"] > 0.5 * (r.logps - logps).max()   # the largest is logged
    for r.logps in (logps + high, logps - high, logps + high * one):
        for flags in ([], ["--inner-epochs", "2"]):
            steps = []
            with pytest.raises(AssertionError, match="log-probs of rollout and update differ"):
                update(r, rewards, "grpo", *flags, agent=agent, steps=steps)
            assert not steps                        # fails if it is looked at afterwards


def test_the_mean_distance_of_a_rollout_decides():
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 0.02)):
        train_rl.check_rollout(dtype, {"d": limit * 99, "n": 100})
        train_rl.check_rollout(dtype, {"d": 0.0, "n": 0.0})
        with pytest.raises(AssertionError, match="the two disagree"):
            train_rl.check_rollout(dtype, {"d": limit * 101, "n": 100})


def test_kl_gradients_are_those_the_docstring_says():
    """k3's pathwise gradient is that of KL(ref || pi), the exact one's that of KL(pi || ref)."""
    torch.manual_seed(0)
    policy = type("Policy", (), {"head": nn.Linear(4, 5)})
    ref, x = copy.deepcopy(policy.head), torch.randn(5, 4)
    shake(ref, 0.5)
    (h,), actions, params = x[:1], torch.arange(5), list(policy.head.parameters())
    log_pi, log_ref = policy.head(h).log_softmax(-1), ref(h).log_softmax(-1).detach()
    # one state five times, each action once, weighted by its probability: the mean over policy
    logp, _, ref_logp, exact = action_statistics(policy, h.expand(5, -1), actions, 1.0, None,
                                                 type("Policy", (), {"head": ref}), h.expand(5, -1))
    weights = log_pi.exp().detach()
    reverse, forward = (log_ref.exp() * (log_ref - log_pi)).sum(), \
        (log_pi.exp() * (log_pi - log_ref)).sum()
    estimate = (weights * train_rl.k3(logp, ref_logp)).sum()
    close(estimate, forward)                        # their values agree
    for got, want in ((estimate, reverse), (exact[0], forward)):
        for a, b in zip(gradients(got, params), gradients(want, params)):
            close(a, b)                             # fails if d is taken the other way round
    assert (gradients(forward, params)[0] - gradients(reverse, params)[0]).abs().max() > 1e-3


def test_update_without_signal_is_quiet():
    r = roll()[1]
    for algo in ("dapo", "bnpo", "grpo"):
        steps, figures, _ = update(r, torch.full((3, 3), NAN), algo)
        assert not figures                          # as in a step that keeps no group
        assert not steps                            # fails if AdamW's momentum moves the policy


def test_play_judges_masks_failures_and_adds_the_overlong_term_apart():
    agent, task = roll()[0], tasks.Task("t", ("d",), (0, 1), {}, None, 10)
    asked_ = []

    def judge(rows, answers):
        asked_.extend((r["id"], answer) for r, answer in zip(rows, answers, strict=True))
        return [None if n == 4 else f"d: x [Scores]: ({n}, 10)" for n in range(len(answers))]
    task.judge = judge
    want = torch.tensor([n / 10 for n in range(9)])
    want[4] = NAN
    for algo, flags in (("dapo", []), ("grpo", []), ("dapo", ["--tokens-at-once", "1"])):
        asked_.clear()
        args = parsed(train_rl, "--algo", algo, "--group-size", "3", *flags)
        train_rl.fill_algorithm(args)
        parts, groups = train_rl.play(agent, task, ROWS[::-1], [4, 1, 7], args, (0,))
        assert [place for _, places in parts for place in places] == [4, 1, 7] == list(groups)
        assert len(parts) == (3 if flags else 1)
        assert asked_ == [(group["id"], text) for group in groups.values()
                          for text in group["texts"]]
        assert [group["id"] for group in groups.values()] == [r["id"] for r in ROWS[::-1]]
        rewards, shaped, lengths = (torch.cat([group[name] for group in groups.values()])
                                    for name in ("rewards", "shaped", "lengths"))
        close(rewards.nan_to_num(-9), want.nan_to_num(-9))
        assert torch.equal(lengths, torch.cat([r.mask.sum(1) for r, _ in parts]))
        extra = train_rl.overlong_punishment(lengths, 10) * (algo == "dapo")
        assert (extra.min() < 0) == (algo == "dapo")    # fails if it enters the task's reward
        close((shaped - rewards)[~want.isnan()], extra[~want.isnan()])
        codes = sum(group["actions"] for group in groups.values())
        assert torch.equal(codes, sum(torch.bincount(r.actions[r.mask], minlength=16)
                                      for r, _ in parts))


@pytest.mark.parametrize("dynamic,varied,want,rounds", [
    ("off", (), [0, 1, 2], 1), ("on", (3, 6, 7, 8), [3, 6, 7], 3), ("on", (1, 11, 12), [1, 11], 4),
    ("on", (), [], 4)])
def test_collect_keeps_varied_groups_and_refills(capsys, dynamic, varied, want, rounds):
    """Three prompts a round, at most four rounds; the surplus is cut, a shortage trains on less."""
    extras = ["overlong"] + ["dynamic-sampling"] * (dynamic == "on")
    args = parsed(train_rl, "--algo", "dapo", "--prompts", "3", "--group-size", "2", "--extras",
                  *extras)
    train_rl.fill_algorithm(args)
    agent = roll()[0]
    rows = [row("What do you see?", row_id=f"{i}") for i in range(20)]
    order = [r["id"] for r in train_rl.Prompts(rows, 0).next(13)]

    def judge(rows, answers):                       # the second answer is better if it varies
        return [f"d: x [Scores]: ({10 * (n % 2 and order.index(r['id']) in varied)}, 10)"
                for n, r in enumerate(rows)]
    task = tasks.Task("t", ("d",), (0, 1), {}, judge, 10)
    prompts = train_rl.Prompts(rows, 0)
    parts, groups, kept = train_rl.collect(agent, task, prompts, args, 5)
    assert list(kept) == want and prompts.cursor == len(groups) == 3 * rounds == 3 * len(parts)
    assert [place for _, places in parts for place in places] == list(groups) == list(range(
        3 * rounds)) and [group["id"] for group in groups.values()] == order[:3 * rounds]
    assert ("of 12 groups" in capsys.readouterr().out) == (dynamic == "on" and len(want) < 3)
    for place, group in groups.items():
        assert train_rl.varies(group["rewards"]) == (place in varied)
    assert any(train_rl.varies(group["shaped"]) for place, group in groups.items()
               if place not in varied)              # fails if the filter looks at these
    assert len({tuple(group["texts"]) for group in groups.values()}) == len(groups)
    again = train_rl.collect(agent, task, train_rl.Prompts(rows, 0), args, 6)[1]
    assert all(again[p]["texts"] != group["texts"] for p, group in groups.items())  # step by step
    batches = train_rl.training_batches(parts, kept, args, task.bounds) if kept else []
    assert torch.equal(torch.cat([A for _, _, A, _ in batches] or [torch.zeros(0)]), torch.cat(
        [train_rl.advantages(groups[p]["shaped"][None], "group")[0] for p in want]
        or [torch.zeros(0)]))
    for r, some, A, mask in batches:
        assert torch.equal(mask, r.select(some).mask) and len(mask) == len(A)


def test_step_figures_by_hand():
    def group(rewards, lengths, finished, texts, actions):
        return {"rewards": torch.tensor(rewards), "lengths": torch.tensor(lengths),
                "finished": torch.tensor(finished), "texts": texts,
                "actions": torch.tensor(actions)}
    groups = {0: group([0.2, 0.6], [3, 5], [True, False], ["a", "b"], [4, 4, 0]),
              3: group([NAN, 0.7], [4, 8], [True, True], ["c", "c"], [0, 12, 0])}
    want = {"reward_mean": 0.5, "reward_std": math.sqrt((0.09 + 0.01 + 0.04) / 3),
            "zero_variance": 0.5, "groups_played": 2, "judge_failed": 1, "length": 5.0,
            "unfinished": 0.25, "distinct_answers": 0.75}
    codes = {"codes_used": 2, "code_perplexity": 5 ** 0.2 * 1.25 ** 0.8}    # of 4 and 16 actions
    assert train_rl.step_figures(groups, "token") == pytest.approx(want)
    assert train_rl.step_figures(groups, "latent") == pytest.approx({**want, **codes})
    groups = {0: {**groups[0], "rewards": torch.tensor([NAN, NAN])}}
    nothing = train_rl.step_figures(groups, "token")    # never a reward of 0
    assert math.isnan(nothing["reward_mean"]) and nothing["judge_failed"] == 2
    assert nothing["zero_variance"] == 1


def test_a_step_of_which_nothing_was_judged_has_no_reward_in_the_log(tmp_path):
    """Fails if it is logged as 0, or as NaN, which is no JSON."""
    group = {"rewards": torch.full((2,), NAN), "lengths": torch.tensor([3, 5]), "texts": ["a", "b"],
             "finished": torch.tensor([True, False]), "actions": torch.tensor([4, 4])}
    run = fresh_run(tmp_path)
    run.resume({})
    run.log(0, train_rl.step_figures({0: group, 1: group}, "latent"), "reward_mean")
    (line,) = (run.folder / "log.jsonl").read_text().splitlines()
    logged = json.loads(line, parse_constant=pytest.fail)
    assert logged["reward_mean"] is None and logged["reward_std"] is None
    assert logged["judge_failed"] == 4 and logged["zero_variance"] == 1


def test_a_step_that_could_mostly_not_be_judged_stops():
    def groups(*rewards):
        return {n: {"rewards": torch.tensor(r)} for n, r in enumerate(rewards)}
    for fine in (groups([0.0, 0.0]), groups([NAN, 0.1], [0.2, NAN]), groups([NAN, NAN], [1.0, 2.0]),
                 groups([NAN] * 4, [1.0] * 4)):     # half of them is not most
        train_rl.refuse_unjudged(3, fine)
    for bad, count in ((groups([NAN, NAN]), "2 of 2"), (groups([NAN, NAN], [1.0, NAN]), "3 of 4"),
                       (groups([0.0] * 3, [NAN] * 3, [NAN, NAN, 1.0]), "5 of 9")):
        with pytest.raises(UserError, match=f"step 3: {count} answers could not be judged; see to "
                                            "the judge, then run the same command again") as error:
            train_rl.refuse_unjudged(3, bad)
        assert not hasattr(error.value, "status")   # status 2


# Tests that fail at the moment, one a bug; each belongs beside its neighbours of b.py once mended.


@pytest.mark.parametrize("messages", [
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}],
    [{"role": "user", "content": None}, {"role": "assistant", "content": "x"}],
    [{"role": "user", "content": 3}, {"role": "assistant", "content": "x"}]])
def test_bug_content_that_is_no_text_is_a_user_error(tmp_path, messages):
    with pytest.raises(UserError, match="f.jsonl:1"):
        for r, _ in kit.read_rows(write(tmp_path / "f.jsonl", [{"messages": messages}])):
            tiny_agent().encoder.encode(r)
    with pytest.raises(UserError, match="f.jsonl:1"):
        file_task(tmp_path / "f.jsonl")


@pytest.mark.parametrize("name", ["W\u0130t", "W\u0131t"])     # KeyError, and the run ends with it
def test_bug_a_turkish_i_is_refused_not_raised(name):
    assert tasks.parse_reply(f"{name}: x [Scores]: (8, 9)", ("Wit",)) in (None, {"Wit": (8, 9)})


@pytest.mark.parametrize("reply", ["d: [Scores]" + "\n" * 30_000,
                                   "d: [Scores]: (8, 9" + " " * 30_000 + "x"], ids=range(2))
def test_bug_a_reply_that_loops_on_white_space_is_refused_at_once(reply):
    began = time.perf_counter()
    assert tasks.parse_reply(reply, ("d",)) is None and time.perf_counter() - began < 0.5


@pytest.mark.parametrize("line", ["[1]", "1", '{"dimensions": 5}', '{"dimensions": ["a"], "split": '
                                  '"a", "mode": "b", "answers": ["x"], "replies": [5]}'])
def test_bug_rescore_of_another_json_file_is_a_user_error(tmp_path, line):
    (tmp_path / "x.jsonl").write_text(line)
    with pytest.raises(UserError, match="cannot be read"):
        tasks.rescore(str(tmp_path / "x.jsonl"))


def test_bug_a_thinking_models_thoughts_are_no_reference(endpoint, tmp_path, monkeypatch):
    root = pcogalign_folder(tmp_path / "v4")
    server, _ = endpoint()
    monkeypatch.setitem(globals(), "fake_reference", lambda prompt: "<think>Hm.</think>\n\nCalm!")
    tasks.main(["--make-references", str(root), "--judge-url", server.url, "--judge-model", "m",
                "--run-root", str(tmp_path)])
    rows = json.loads((root / "HCMAS-golden-test.json").read_text())
    assert {r["golden_response"] for r in rows} == {"Calm!"}


def test_bug_references_of_files_in_another_form_are_a_user_error(endpoint, tmp_path):
    root = pcogalign_folder(tmp_path / "v4")
    (root / "HCMAS-test.json").write_text('[{"query": "x"}]')
    server, _ = endpoint()
    with pytest.raises(UserError):
        tasks.main(["--make-references", str(root), "--judge-url", server.url, "--judge-model", "m",
                    "--run-root", str(tmp_path)])


def test_bug_what_follows_a_torn_line_of_the_cache_is_kept(endpoint, tmp_path):
    server, judge = endpoint()
    judge([QUESTION], ["one"])
    with open(tmp_path / "judge-cache/rank0.jsonl", "a") as cache:
        cache.write('["torn')
    endpoint()[1]([QUESTION], ["two"])
    third, judge = endpoint()
    judge([QUESTION], ["two"])
    assert not third.calls


def test_bug_names_in_underscore_bold_and_of_full_width():
    task = tasks.Task("t", ("Fluency", "Tone"), (0, 1), {}, None, 9)
    assert task.scores(GOOD.replace("Tone:", "__Tone__:"))
    wide = "\u6d41\uff08\u7545\uff09"
    assert tasks.parse_reply(f"{wide}\uff1a x [Scores]: (8, 9)", (wide,))


@pytest.mark.parametrize("bad", ["a literal <|im_end|>.", "half \ud800"])
def test_bug_a_demonstration_that_cannot_be_used_is_refused(tmp_path, bad):
    """A20, D7: in task files refuse; the stream of SFT leaves it out."""
    rows = [{**r, "split": "sft"} for r in text_rows(3)]
    rows[1]["messages"][1]["content"] = bad
    with pytest.raises(UserError, match="jsonl:2"):
        demonstrations = file_task(write(tmp_path / "t.jsonl", rows)).splits["sft"]
        Stream(demonstrations, tiny_agent().encoder, 99, 0, responses_only=True).next()


@pytest.mark.parametrize("more", [{"judge_notes": 5}, {"dimensions": ["Wit", "wit"]},
                                  {"dimensions": [" "]}, {"dimensions": ["a\nb"]}])
def test_bug_rows_with_which_no_judgement_can_succeed_are_refused(tmp_path, more):
    with pytest.raises(UserError):
        r = file_task(write(tmp_path / "t.jsonl", [{**text_rows(1)[0], **more}])).splits["id"][0]
        tasks.judge_prompt("", ("d",), r, "x")


def test_bug_rows_with_an_id_of_null_have_ids_of_their_own(tmp_path):
    rows = [{**r, "id": None} for r in text_rows(2)]
    assert len({r["id"] for r, _ in kit.read_rows(write(tmp_path / "t.jsonl", rows))}) == 2


# ---- A second device: nothing mixes with the host's tensors -----------------------------------


class Elsewhere(torch.Tensor):
    """A tensor on a simulated accelerator, named "meta" for want of one: it computes on the CPU, in
    `inner`, but refuses to be mixed with the host's tensors as CUDA does, and counts what makes the
    host wait for it."""

    waits = Counter()
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device="meta")

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return on_either_device(op, args, kwargs or {})

    def tolist(self):
        self.waits["tolist"] += 1
        return self.inner.tolist()

    def __getitem__(self, index):           # torch makes the tensor of a list on the device, empty
        def there(i):
            return Elsewhere(ORIGINAL["tensor"](i)) if isinstance(i, list) else i
        index = tuple(map(there, index)) if isinstance(index, tuple) else there(index)
        return super().__getitem__(index)


ORIGINAL = {"tensor": torch.tensor, "as_tensor": torch.as_tensor}


def on_either_device(op, args, kwargs):
    """An operation of torch where its tensors lie, or where `device` says."""
    name, leaves = op._schema.name.removeprefix("aten::"), tree_leaves((args, kwargs))
    there = [x for x in leaves if isinstance(x, Elsewhere)]
    here = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, Elsewhere)]
    device = kwargs.get("device")
    moves = name in ("copy_", "_to_copy")
    # CUDA takes the host's scalars, and its indices into a tensor of its own.
    indices = name in ("index", "index_put", "index_put_") and isinstance(args[0], Elsewhere)
    if there and not moves and not indices and any(x.dim() for x in here):
        raise RuntimeError(f"{op}: {len(there)} tensors there, {[x.shape for x in here]} here")
    masks = any(x.dtype == torch.bool for x in there if name == "index" and x is not args[0])
    if name in ("nonzero", "masked_select", "_local_scalar_dense") or masks or (
            there and device is not None and torch.device(device).type == "cpu"):
        Elsewhere.waits[name] += bool(there)
    to_there = isinstance(args[0], Elsewhere) if name == "copy_" else bool(there)
    if device is not None:
        to_there, kwargs = torch.device(device).type == "meta", {**kwargs, "device": "cpu"}
    known = {id(x.inner): x for x in there}         # what an operation in place gives back
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Elsewhere) else x, (args, kwargs))

    def placed(x):
        return known[id(x)] if id(x) in known else Elsewhere(x)
    return tree_map(lambda x: placed(x) if to_there and isinstance(x, torch.Tensor) else x,
                    op(*args, **kwargs))


class BothDevices(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return on_either_device(op, args, kwargs or {})


def plain_attention(query, key, value, attn_mask=None, is_causal=False, enable_gqa=False, **_):
    """torch's chooses a kernel by the device's name."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    return scores.softmax(-1) @ value


@pytest.fixture
def both_devices(monkeypatch):
    for name, original in ORIGINAL.items():
        monkeypatch.setattr(torch, name, lambda data, *args, original=original, device="cpu", **kw:
                            original(data, *args, **kw).to(device))
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain_attention)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    with BothDevices():
        yield


def everything(device) -> dict:
    """What all stages make of a few rows on `device`: losses, gradients, reports, a step of RL in
    both spaces, evaluations; tensors on the host."""
    agent, token = (copy.deepcopy(tiny_agent(space)).to(device) for space in ("latent", "token"))
    assert agent.device.type == token.policy.head.weight.device.type == device
    batch, out = agent.encoder.collate(examples()).to(device), {}
    agent.train_only("projector", "idm", "codebook", "world", "policy")
    e, states = agent.embeddings(batch), agent.states(batch)
    noise = keyed_gumbel(batch.row_ids, batch.text_lengths.tolist(), 16, 0).to(device)
    out["losses"] = [*stage1.projector_losses(agent, batch, e, True).values(), *(
        x for losses in (train_idm.inverse_losses(agent, batch, states, noise)[:2],
                         train_bc.code_losses(agent, batch)[:1],
                         train_bc.release_losses(agent, batch)[:1],
                         train_bc.token_losses(token, batch)[:1]) for x in losses)]
    sum(x.sum() for x in out["losses"]).backward()
    out["gradients"] = {name: p.grad for name, p in agent.named_parameters() if p.requires_grad}
    held = {"id": examples()[:1], "text": examples()[1:2]}
    out["reports"] = [stage1.projector_report(agent, held, 99), train_idm.idm_report(
        agent, held, 99), train_bc.bc_report(agent, held, 99), train_bc.lm_report(token, held, 99)]

    def judge(rows, answers):
        return [f"d: x [Scores]: ({len(set(answer)) % 7}, 10)" for answer in answers]
    rows = [{**r, "reference": "A red star.", "persona": "p"} for r in ROWS]
    task = tasks.Task("t", ("d",), (0.0, 1.0), {}, judge, 6)
    for one in (agent, token):
        args = parsed(train_rl, "--algo", "dapo", "--action-space", one.space, "--prompts", "3",
                      "--group-size", "3", "--beta", "0.1", "--kl", "exact", "--recompute")
        train_rl.fill_algorithm(args)
        one.recompute = True
        start = copy.deepcopy(one.train_only("policy")["policy"])
        parts, groups, kept = train_rl.collect(one, task, train_rl.Prompts(rows, 0), args, 0)
        run = SimpleNamespace(skipped=0, skipped_all=0, taken=0, folder="run")
        figures = train_rl.update(
            one, start, torch.optim.AdamW(one.policy.parameters()), 1e-2, run, parts, kept, args,
            task)
        assert run.taken == 2 and figures["kl"] > 0
        out[one.space] = [figures, train_rl.step_figures(groups, one.space), *(
            tensor for part, _ in parts for tensor in (part.tokens, part.actions, part.logps)),
            dict(one.policy.named_parameters())]
        one.min_p = 0.01
        out[f"{one.space} evaluated"] = [
            tasks.evaluate(one, task, {"id": rows}, 0, 99,
                           {"greedy": (0.0, 1), "sampled": (1.0, 3)}, one),
            tasks.trace(one, rows[0], 6)]
    out["reach"] = tasks.reach(agent, rows, 99)
    return tree_map(lambda x: x.detach().cpu() if isinstance(x, torch.Tensor) else x, out)


def test_every_stage_runs_on_another_device_and_gives_what_the_host_gives(both_devices):
    there, here = everything("meta"), everything("cpu")
    for one, other in zip(tree_leaves(there), tree_leaves(here), strict=True):
        if isinstance(one, (float, torch.Tensor)):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
        else:
            assert one == other
    agent = copy.deepcopy(tiny_agent()).to("meta")  # fails if the simulation lets anything pass
    with pytest.raises(RuntimeError, match="there.*here"):
        agent.states(collated())


def test_decoding_lets_the_host_wait_every_few_tokens_alone(both_devices):
    """The stop test's `nonzero`, once in `check_every` tokens."""
    agent, waits = copy.deepcopy(tiny_agent()), []
    agent.token_bias[agent.encoder.stop_ids] = -math.inf
    agent.to("meta")
    for new in (8, 16, 32):
        Elsewhere.waits.clear()
        out = rollout(agent, examples(ROWS[:2], prompt=True), 2, new, 1.0, [3, 4], check_every=4)
        assert out.tokens.shape[1] == new
        waits.append(Elsewhere.waits.total())
    assert waits[1] - waits[0] == 2 and waits[2] - waits[1] == 4


# ---- The whole chain, as a user would run it -------------------------------------------------

# Predecessors that a command has to run first get two large steps; the mini world is cut down.
QUICK = """
import runpy, sys
import eval, train_projector, train_idm, train_bc
for script in (train_projector, train_idm, train_bc):
    for scales in script.DEFAULTS.values():
        for values in scales.values():
            values.update(steps=2, lr=1e-2)
eval.SIZES.update(valid=4, id=4, ood=4)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# Several stages in one process, which records each stage's gradients and which of the agent's
# tensors changed. `kill` ends the process with SIGKILL at that event: a checkpoint half written,
# written but not yet renamed, renamed, or an optimiser step done and not yet logged.
DRIVER = """
import functools, gc, json, os, signal, sys
import model as kit
import eval as tasks, train_projector, train_idm, train_bc, train_rl
import torch

torch.set_num_threads(1)
setup, record, stage, events, agent, before = json.loads(sys.argv[1]), {}, None, 0, None, {}
kit.SAVE_SECONDS, kit.STRUCTURE["tiny"]["codes"] = 0, 64
tasks.JUDGE.update(pause=0.01, timeout=3.0)
train_projector.BASE_PHASES = [(name, 2, *lrs) for name, _, *lrs in train_projector.BASE_PHASES]
train_projector.BASE_ROWS = {name: {kind: 24 for kind in kinds}
                             for name, kinds in train_projector.BASE_ROWS.items()}
train_projector.BASE_TOKENS = 600

def around(place, name, first=lambda *args: None):
    original = getattr(place, name)
    @functools.wraps(original)
    def wrapped(*args, **kw):
        first(*args)
        done = original(*args, **kw)
        event()
        return done
    setattr(place, name, wrapped)

def event(*half):
    global events
    events += 1
    if events == setup.get("kill") and kit.rank() == setup.get("rank", 0) \\
            and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        if half:
            open(half[1], "wb").write(b"half a checkpoint")
        os.kill(os.getpid(), signal.SIGKILL)

def watch(optimizer):
    global agent, before
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not record[stage]["gradients"]:
        ids = {id(p) for p in params}
        agent = next(a for a in gc.get_objects() if isinstance(a, kit.Agent)
                     and ids <= {id(p) for p in a.parameters()})
        before = {k: v.detach().clone() for k, v in agent.named_parameters()}
    record[stage]["gradients"].append([p.grad.clone() for p in params])

around(torch, "save", event)
around(os, "fsync")
around(os, "replace")
around(torch.optim.AdamW, "step", watch)

for stage, (script, flags) in setup["commands"].items():
    record[stage], before = {"gradients": [], "changed": []}, {}
    sys.modules[script].main(flags + setup["common"])
    if before:
        record[stage]["changed"] = [k for k, v in agent.named_parameters()
                                    if not torch.equal(before[k], v)]
if kit.rank() == 0:
    torch.save(record, setup["record"])
"""
RL = ["--prompts", "2", "--group-size", "4", "--max-new-tokens", "12", "--lr", "1e-2"]
MAIN = "rl-task-grpo-latent-s0"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}


def test_a_base_without_weights_is_named_before_three_minutes_are_spent(tmp_path):
    (tmp_path / "tiny/base").mkdir(parents=True)
    with pytest.raises(UserError, match="base: stands there without model.safetensors; remove it"):
        stage1.ensure_base(parsed(stage1, "--run-root", str(tmp_path)))


class Chain:
    """A run root with an untrained base, a task of few rows, and commands to run there."""

    def __init__(self, folder):
        self.folder, self.root = folder, folder / "runs"
        self.runs, self.task = self.root / "tiny", str(folder / "task.jsonl")
        texts = [m["content"] for kind in ("caption", "base", "text")
                 for r in tasks.mini_corpus(kind, 200, 0) for m in r["messages"]]
        base, *rest = stage1.tiny_base(texts, 0, width=64, layers=2, vocab=400)
        for part in (shake(base, 0.1), *rest):      # noise: else all greedy tokens are one
            part.save_pretrained(self.runs / "base")
        (self.runs / "base/pretraining").mkdir()
        (self.runs / "base/pretraining/config.json").write_text(json.dumps(
            {"args": {}, "identity": {"world": f"mini {tasks.MINI_VERSION}"}, "base": "",
             "parent": None, "sha256": None}))
        picture().save(folder / "a.png")
        answer = {"role": "assistant", "content": "the a s e o t i n r the a s e o t i n r"}
        write(folder / "task.jsonl", [
            {"messages": [{"role": "user", "content": f"<image>Say {i}"}, answer], "split": split,
             "images": ["a.png"]} for i, split in enumerate(["valid", "id", "ood", "sft", "rl"] * 3)
            if split in ("sft", "rl") or i < 5])
        paired = [asks("<image>What?", images=["a.png"], id=str(i)) for i in range(12)]
        for i, r in enumerate(paired):
            r["messages"].append({"role": "assistant", "content": "the a s e o " * (i % 5 + 1)})
        self.files = ["--paired", write(folder / "p.jsonl", paired[:6]),
                      write(folder / "q.json", paired[6:]),
                      "--text", write(folder / "t.jsonl.gz", text_rows(12))]
        qwen_folder(folder / "qwen", shard="9GB")
        (folder / "quick.py").write_text(QUICK)
        (folder / "driver.py").write_text(DRIVER)

    def command(self, script, *flags, quick=False, ranks=0):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        return [sys.executable, *(torchrun if ranks else []), *(["quick.py"] if quick else []),
                str(HERE / script), "--device", "cpu", *flags,
                *(["--run-root", str(self.root)]
                  if "train" in script and "--run-root" not in flags else [])]

    def run(self, script, *flags, status=0, **kw):
        done = subprocess.run(self.command(script, *flags, **kw), env=ENV, cwd=self.folder,
                              capture_output=True, text=True, timeout=120)
        assert done.returncode == status or status is None, done.stdout + done.stderr[-4000:]
        return done.stdout + done.stderr

    def drive(self, root, commands, ranks=1, base=True, status=0, common=(), restarts=0, **setup):
        """Run `commands` in one process (or on `ranks`): what DRIVER recorded, or None."""
        if base and not (self.folder / root).exists():
            shutil.copytree(self.runs / "base", self.folder / root / "tiny" / "base")
        common = [*self.files, "--run-root", root, "--steps", "2", "--device", "cpu",
                  "--idm-layers", "1", "--policy-layers", "1", *common]
        commands = {name: (script, ["--lr", "1e-2", *flags] + (
            [] if script in ("train_projector", "train_idm") else ["--task", self.task]))
                    for name, (script, flags) in commands.items()}
        setup |= {"commands": commands, "common": common, "record": f"{root}.pt"}
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
                    f"--max-restarts={restarts}"]
        done = subprocess.run([sys.executable, *(torchrun if ranks > 1 else []), "driver.py",
                               json.dumps(setup)], env=ENV, cwd=self.folder, capture_output=True,
                              text=True, timeout=300)
        assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
        return None if status else torch.load(self.folder / f"{root}.pt", weights_only=True)

    def rl(self, *flags, **kw):
        return self.run("train_rl.py", "--task", self.task, *RL, *flags, **kw)

    def log(self, name, runs=None):
        """The rows of a log without what may differ between equal runs: times and memory."""
        file = (runs or self.runs) / name / "log.jsonl"
        rows = map(json.loads, file.read_text().splitlines())
        return [{k: v for k, v in r.items() if not re.search("seconds|memory|per_second", k)}
                for r in rows]

    def weights(self, name):
        return load_file(self.runs / name / "model.safetensors")


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    chain = Chain(tmp_path_factory.mktemp("chain"))
    chain.said = chain.rl("--steps", "4", quick=True, ranks=1)
    return chain


def test_chain_runs_every_stage_and_says_so(chain):
    for stage in ("projector", "idm", "bc", "sft-task-latent"):
        assert re.search(rf"{stage} is missing or unfinished: running \w+.py first", chain.said)
    log = chain.log(MAIN)
    assert [r["step"] for r in log] == [0, 1, 2, 3] and max(r["ratio_error"] for r in log) < 1e-4
    assert any(r["reward_std"] > 0 for r in log)    # otherwise the tests below show nothing
    assert {"reward_mean", "reward_std", "zero_variance", "kl", "entropy", "ratio_error", "length",
            "codes_used", "code_perplexity", "distinct_answers"} <= set(log[0])


def test_chain_leaves_only_what_each_stage_trained_and_an_agent(chain):
    for stage, modules in {"projector": {"projector"}, "bc": {"policy"}, MAIN: {"policy"},
                           "idm": {"idm", "codebook", "world", "projector"},
                           "sft-task-latent": {"policy"}}.items():
        assert {k.split(".")[0] for k in chain.weights(stage)} == modules, stage
        assert not (chain.runs / stage / "state").exists()
    agent = Agent.from_run(chain.runs / MAIN, "cpu")        # each module from its nearest ancestor
    nearest = {**chain.weights("idm"), **chain.weights("sft-task-latent"), **chain.weights(MAIN)}
    assert all(torch.equal(v, nearest[k]) for k, v in agent.state_dict().items() if k in nearest)
    assert isinstance(agent.chat("What do you see?", chain.folder / "a.png"), str)


@pytest.fixture
def quick(monkeypatch):
    """Two large steps for every stage that is run in this process."""
    for script in (stage1, train_idm, train_bc):
        for scales in script.DEFAULTS.values():
            monkeypatch.setitem(scales["tiny"], "steps", 2)


@pytest.mark.parametrize("flags,absent", [
    (["--without", "text"], {"ce_text", "loss_cycle"}), (["--without", "cycle"], {"loss_cycle"}),
    (["--without", "projector"], {"loss_paired", "loss_cycle"})])
def test_chain_of_an_ablation_has_folders_of_its_own_and_lacks_the_term(chain, quick, flags,
                                                                        absent):
    train_rl.main([*RL, *flags, *chain.files, "--task", chain.task, "--steps", "1", "--device",
                   "cpu", "--run-root", str(chain.root)])
    tag = "-".join(flags).lstrip("-")
    for row in chain.log(f"idm-{tag}"):
        assert {k for k in ("ce_paired", "ce_text", "loss_paired", "loss_cycle")
                if not row[k]} == absent
    agent = Agent.from_run(chain.runs / f"{MAIN}-{tag}", "cpu")
    assert (agent.projector is None) == (tag == "without-projector")


def test_chain_repeated_is_finished_and_other_arguments_are_refused(chain):
    before = (chain.runs / MAIN / "model.safetensors").stat().st_mtime_ns
    assert "is finished" in chain.rl("--steps", "4")
    said = chain.rl("--steps", "5", status=2)
    assert re.search(r"error: .*steps: 4 -> 5.*--name.*--fresh", said) and "Traceback" not in said
    assert (chain.runs / MAIN / "model.safetensors").stat().st_mtime_ns == before


def damaged(folder):
    """Files that are wrong in one way each, made in `folder`."""
    picture().save(folder / "cut.png")
    os.truncate(folder / "cut.png", 3000)
    Image.new("1", (16000, 16000)).save(folder / "bomb.png")
    good = asks("<image>?", images=["a.png"])
    good["messages"].append({"role": "assistant", "content": "x"})
    for name, r in (("broken", '{"messages": ['), ("keys", {"msgs": []}), ("none", asks() | {
            "messages": []}), ("roles", {"messages": [{"role": "tool", "content": "x"}]}),
            ("missing", {**good, "images": ["no.png"]}), ("cut", {**good, "images": ["cut.png"]}),
            ("bomb", {**good, "images": ["bomb.png"]}), ("extra", {**good, "images": []}),
            ("text", {**good, "images": ["p.jsonl"]}), ("split", {**good, "split": "test"}),
            ("long", {**good, "split": "id", "messages": [
                {"role": "user", "content": "<image>" + "x " * 5000}, good["messages"][1]]})):
        lines = [json.dumps(good), r if isinstance(r, str) else json.dumps(r)] * 2
        (folder / f"bad-{name}.jsonl").write_text("\n".join([*lines, lines[0]]))
    (folder / "bad-empty.jsonl").write_text("")
    write(folder / "bad-none-usable.jsonl", [{**good, "images": ["a.png"] * 2}] * 3)
    write(folder / "bad-said.jsonl", [{"text": "a row of a corpus, of no use as a task"}])
    (folder / "bad-latin.jsonl").write_bytes('{"text": "\xe9"}\n'.encode("latin-1") * 3)
    (folder / "other").mkdir()
    (folder / "other" / "task.jsonl").write_text((folder / "task.jsonl").read_text() + "\n")
    shutil.copytree(folder / "runs/tiny" / MAIN, folder / "runs/tiny/stale")
    config = folder / "runs/tiny/stale/config.json"
    config.write_text(re.sub(r'"parent_sha256": "\w+"', '"parent_sha256": "0"', config.read_text()))
    shutil.copytree(folder / "runs/tiny" / MAIN, folder / "runs/tiny/flipped")
    weights = folder / "runs/tiny/flipped/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-9] ^= 1
    weights.write_bytes(data)
    (folder / "llama").mkdir()
    (folder / "llama" / "config.json").write_text('{"model_type": "llama"}')
    for name, text in (("half", "{"), ("list", "[]")):
        (folder / f"runs/tiny/projector-{name}/state").mkdir(parents=True)
        (folder / f"runs/tiny/projector-{name}/state/last.pt").write_text("")
        (folder / f"runs/tiny/projector-{name}/config.json").write_text(text)


PAIRED = "train_projector --name bad --fresh --steps 9 --without text --paired"
BAD = [
    ("train_rl --nonsense 3", "unrecognized arguments: --nonsense 3"),
    ("train_rl --algo ppo", "argument --algo: invalid choice: 'ppo'.*choose from"),
    ("train_rl --lr much", "argument --lr: invalid float value"),
    ("train_rl --lr nan", "argument --lr: nan does not lie in"),
    ("train_rl --beta -1", "argument --beta: -1 does not lie in"),
    ("train_rl --clip -3 0.2", "argument --clip: -3 does not lie in"),
    ("train_rl --temperature -1", "argument --temperature: -1 does not lie in"),
    ("train_projector --paired-steps -4", "argument --paired-steps: -4 does not lie in"),
    ("train_idm --codes 0", "argument --codes: 0 does not lie in"),
    ("train_rl --group-size 1", r"argument --group-size: 1 does not lie in \[2"),
    ("train_rl --prompts 0", "argument --prompts: 0 does not lie in"),
    ("eval --samples 0 runs/tiny/idm", "argument --samples: 0 does not lie in"),
    ("train_rl --action-space token --min-p 0.2", "--min-p.*give it to eval.py"),
    ("train_rl --judge-url http://h --judge-model m --task task.jsonl --name x", "HF_HUB_OFFLINE"),
    ("train_rl --judge-url http://h --task task.jsonl --name x",
     "--judge-url and --judge-model go together"),
    ("train_rl --device cuda", "no CUDA device is visible; use --device cpu"),
    ("train_projector --model qwen --name x", "--paired FILE... is required"),
    (f"{PAIRED} absent.jsonl", "No such file.*absent.jsonl.*check the path"),
    (f"{PAIRED} bad-empty.jsonl", "bad-empty.jsonl.*holds no rows"),
    (f"{PAIRED} bad-latin.jsonl", "bad-latin.jsonl:1: cannot be read as JSON in UTF-8.*remove"),
    (f"{PAIRED} bad-broken.jsonl", "bad-broken.jsonl:2: cannot be read as JSON.*fix or remove"),
    (f"{PAIRED} bad-keys.jsonl", "bad-keys.jsonl:2: no `messages`.*see README"),
    (f"{PAIRED} bad-none.jsonl", "bad-none.jsonl:2: `messages` is empty"),
    (f"{PAIRED} bad-roles.jsonl", "bad-roles.jsonl:2: role 'tool' is not system, user"),
    (f"{PAIRED} bad-missing.jsonl", "bad-missing.jsonl:2: image .*no.png.*No such.*--image-root"),
    (f"{PAIRED} bad-cut.jsonl", "bad-cut.jsonl:[24]: .*cut.png. cannot be used.*truncated.*remove"),
    (f"{PAIRED} bad-bomb.jsonl", "bad-bomb.jsonl:2: .*bomb.png. cannot be used.*remove the row"),
    (f"{PAIRED} bad-text.jsonl", "bad-text.jsonl:2: .*p.jsonl. cannot be used.*remove the row"),
    (f"{PAIRED} bad-none-usable.jsonl",
     "not one row can be trained on.*usable.jsonl:1: 1 `<image>"),
    (f"{PAIRED} t.jsonl.gz", "not one row can be trained on.*0 images, but --paired takes rows"),
    ("train_bc --task bad-extra.jsonl --name bad",
     "bad-extra.jsonl:[24]: 1 `<image>` place.*equal"),
    ("train_bc --task t.jsonl --name bad", "--task: t.jsonl is neither"),
    ("train_bc --task bad-said.jsonl --name bad", "bad-said.jsonl:1: the last message must be"),
    ("eval MAIN --task bad-long.jsonl --splits valid", "task bad-long has no prompts in valid"),
    ("train_projector --name bad --fresh --paired p.jsonl", "and no --text.*--without text"),
    ("train_bc --task bad-split.jsonl --name bad", "bad-split.jsonl:2: split 'test' is not one of"),
    ("train_bc --task nothing --name bad", "argument --task: nothing is neither mini"),
    ("eval MAIN --task bad-long.jsonl --splits id",
     "bad-long.jsonl:[24]: the prompt has .* shorten"),
    ("eval runs/tiny/nothing", "nothing: config.json cannot be used .*name a run folder"),
    ("eval runs/tiny/idm", "has no policy; evaluate an sft-"),
    ("eval --rescore absent.jsonl", "absent.jsonl: cannot be read"),
    ("eval --rescore a.jsonl b.jsonl", "run folders, .*or --rescore FILE"),
    ("eval", "run folders, .*or --rescore FILE"),
    ("train_bc --codes 8 --parent runs/tiny/idm --stage bc --name bad",
     "idm was trained otherwise .codes: 3 -> 8"),
    ("train_bc --parent runs/tiny/absent --stage bc --name bad", "absent: no finished run there"),
    ("train_bc --model qwen --codes 3 --idm-layers 2 --policy-layers 2 --image-tokens 4 --parent "
     "runs/tiny/idm --stage bc", "trained on another base.*--fresh"),
    ("train_bc --model qwen --name bad",
     r"run first: python train_bc.py --stage bc --model \S*/qwen"),
    ("train_projector --model llama --paired p.jsonl --without text", "a llama model, not Qwen2"),
    ("train_projector --model nowhere --paired p.jsonl --without text", "nowhere: cannot be load"),
    ("train_projector --model ./nowhere --paired p.jsonl --without text", "./nowhere: no such f"),
    ("train_projector --image-tokens many", "--image-tokens: many is neither a number nor HEIGHTx"),
    ("train_idm --without projector --parent runs/tiny/projector", "--parent: without a projector"),
    ("train_bc --action-space token --name x --task task.jsonl --parent MAIN",
     "the token baseline starts from the base alone, or its warm"),
    ("train_projector --run-root a.png/x --model qwen --paired p.jsonl --without text",
     "Not a directory.*a.png/x.*check the path"),
    ("train_projector --name half", "config.json cannot be used.*--fresh"),
    ("train_projector --name list", "config.json cannot be used.*--fresh"),
    ("train_rl --task other/task.jsonl", "trained otherwise .task: task.jsonl.*or --parent"),
    ("train_rl --parent runs/tiny/idm --task task.jsonl", "idm has no policy in latent space"),
    ("train_projector --parent runs/tiny/idm --name bad", "--parent: the projectors start from"),
    ("eval runs/tiny/stale", "stale: was trained on an earlier sft-task-latent.*redo this run"),
    ("eval runs/tiny/flipped", "flipped/model.safetensors: is not what its run finished with"),
    ("train_rl --steps 5 --task task.jsonl", "other arguments.*steps: 4 -> 5.*--name.*--fresh"),
]


@pytest.fixture
def refused(chain, monkeypatch, capfd):
    """The one line that a command ends with: refused("train_rl --nonsense")."""
    def run(command):
        monkeypatch.chdir(chain.folder)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        script, *flags = shlex.split(command)
        script = tasks if script == "eval" else sys.modules[script]
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags])
        with pytest.raises(SystemExit) as ended:
            kit.launch(script.main)
        said = capfd.readouterr().err
        (line,) = [line for line in said.splitlines() if "error:" in line]
        assert ended.value.code == 2 and "Traceback" not in said
        return line
    return run


@pytest.fixture(scope="session")
def damaged_chain(chain):
    damaged(chain.folder)
    return chain


@pytest.mark.parametrize("command,message", BAD, ids=[c for c, _ in BAD])
def test_chain_bad_input_is_one_clear_line(damaged_chain, refused, command, message):
    main = damaged_chain.runs / MAIN
    before = {f: f.stat().st_mtime_ns for f in main.iterdir()}
    line = refused(command.replace("MAIN", f"runs/tiny/{MAIN}"))
    assert re.search(message, line), line
    assert {f: f.stat().st_mtime_ns for f in main.iterdir()} == before      # nothing earlier lost


CORPUS = ["--batch-tokens", "170"]
SHORT = ["--prompts", "3", "--group-size", "4", "--max-new-tokens", "8", "--inner-epochs", "1"]
TOKEN = ["--action-space", "token"]
COMMANDS = {
    "projector": ("train_projector", [*CORPUS, "--paired-steps", "0"]),
    "idm": ("train_idm", CORPUS), "bc": ("train_bc", ["--stage", "bc", *CORPUS]),
    "clone": ("train_bc", CORPUS), "release": ("train_bc", ["--sft", "release", *CORPUS]),
    "token": ("train_bc", [*TOKEN, *CORPUS]),
    "lm": ("train_bc", [*TOKEN, "--stage", "bc", *CORPUS]),
    **{algo: ("train_rl", ["--algo", algo, *SHORT])
       for algo in ("grpo", "dr_grpo", "dapo", "bnpo", "dapo_released")},
    "exact": ("train_rl", [*SHORT, "--kl", "exact", "--inner-epochs", "2", "--name", "exact"]),
    "grpo-token": ("train_rl", [*TOKEN, *SHORT])}


@pytest.fixture(scope="session")
def commands():
    """COMMANDS, and one with a judge of which a third of the judgements fail for good."""
    server = FakeJudge(tasks.DIMENSIONS, lambda prompt, attempt:
                       "refusal" if int(1e6 * fake_score(prompt)) % 3 == 1 else None)
    judge = ["--judge-url", server.url, "--judge-model", "m"]
    yield {**COMMANDS, "grpo-some": ("train_rl", ["--name", "some", *SHORT, *judge])}
    server.shutdown()


@pytest.fixture(scope="session")
def recorded(chain, commands):
    return chain.drive("one", commands)


def test_chain_on_two_ranks_and_in_micro_batches_has_the_same_gradients(chain, commands, recorded):
    """Rows, prompts and images are shared out unevenly, in micro-batches of one row or group, and
    layers are computed again in the backward pass; fails if any denominator is local. Each stage
    starts from the same parents: the last first."""
    shutil.copytree(chain.folder / "one", chain.folder / "two")
    again = {k: (script, [*flags, "--fresh"]) for k, (script, flags) in commands.items()}
    other = chain.drive("two", dict(reversed(again.items())), ranks=2,
                        common=["--tokens-at-once", "1", "--recompute"])
    for stage in commands:
        for a, b in zip(recorded[stage]["gradients"][0], other[stage]["gradients"][0], strict=True):
            assert (a - b).norm() <= 1e-5 * a.norm() + 1e-8, stage
        assert any(a.any() for a in recorded[stage]["gradients"][0]), stage
    logs = sorted((chain.folder / "one/tiny").glob("*/log.jsonl"))
    assert len(logs) == len(commands)
    for log in logs:
        one, two = (chain.log(log.parent.name, chain.folder / root / "tiny")[0]
                    for root in ("one", "two"))
        assert one.keys() == two.keys()
        for key in one:
            assert one[key] == pytest.approx(two[key], rel=1e-5, abs=2e-6), (log.parent.name, key)


def test_chain_goes_on_with_another_number_of_ranks_on_the_same_data(chain, recorded):
    """Two ranks until one is killed, then four: rows, prompts, noise and draws do not depend on
    the number of ranks, so the logs are those of one rank up to rounding."""
    for root, runs in (("lone", [{}]), ("four", [{"ranks": 2, "kill": 7, "status": 1},
                                                 {"ranks": 4}])):
        shutil.copytree(chain.folder / "one", chain.folder / root)
        start = ["--name", "four", "--parent"]
        commands = {
            "idm": ("train_idm", [*CORPUS, *start, f"{root}/tiny/projector-idm1-policy1"]),
            "bnpo": ("train_rl", [*SHORT, "--algo", "bnpo", "--prompts", "5", "--eval-prompts", "1",
                                  "--lr", "1e-4", *start,
                                  f"{root}/tiny/sft-task-latent-idm1-policy1"])}
        for run in runs:
            chain.drive(root, commands, common=["--steps", "4"], **run)
    for stage in ("idm-idm1-policy1-four", "rl-task-bnpo-latent-s0-idm1-policy1-four"):
        lone, four = (chain.log(stage, chain.folder / root / "tiny") for root in ("lone", "four"))
        assert len(lone) == len(four) == 4
        for a, b in zip(lone, four):
            for key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), (stage, key)
    reports = [json.loads((chain.folder / root / "tiny" / stage / "report.json").read_text())
               for root in ("lone", "four")]
    assert reports[0]["reward"]["id greedy"]["prompts"] == 1
    assert reports[0]["reward"]["id sampled"] == pytest.approx(reports[1]["reward"]["id sampled"])


def test_chain_noise_of_the_inverse_dynamics_model_is_keyed_by_the_step(chain, recorded):
    """The same rows twice, in one batch, and weights that hardly move: only the noise differs.
    Fails if it is the same in every step."""
    shutil.copytree(chain.folder / "one/tiny/projector-idm1-policy1",
                    chain.folder / "noise/tiny/projector-idm1-policy1")
    shutil.copytree(chain.runs / "base", chain.folder / "noise/tiny/base")
    got = chain.drive("noise", {"idm": ("train_idm", ["--lr", "1e-12", "--batch-tokens", "9999"])})
    first, _, second, _ = got["idm"]["gradients"]      # two optimisers, two steps
    a, b = (torch.cat([g.flatten() for g in grads]) for grads in (first, second))
    assert (a - b).norm() > 0.05 * a.norm()


def test_chain_stages_train_these_parameters_and_nothing_else(recorded):
    last = r"layers\.1\."
    patterns = {"projector": r"projector\.", "idm": r"(projector|idm|codebook|world)\.",
                "bc": r"policy\.", "clone": r"policy\.", "token": r"policy\.",
                "release": rf"backbone\.model\.(visual\.|language_model\.({last}|norm|embed))"}
    for stage in recorded:
        changed = recorded[stage]["changed"]
        pattern = patterns.get(stage, r"policy\.(layers|norm|head)\.")
        assert all(re.match(pattern, name) for name in changed), stage     # fails if SFT trains C
        assert changed, stage


def test_chain_counts_failed_judgements_and_never_scores_them(chain, recorded):
    some = chain.log("rl-task-grpo-latent-s0-idm1-policy1-some", chain.folder / "one/tiny")
    assert 0 < sum(r["judge_failed"] for r in some) < 24    # fails if a failure counts as 0
    assert all(r["reward_mean"] > 0.1 for r in some)        # the judge's lowest is 1 of 10


def test_chain_killed_at_random_points_continues_to_the_same_bits(chain):
    """SIGKILL anywhere in any stage, the base's pre-training included, also inside a save. Fails
    without the optimisers' state, the data's cursors, the cut of the logs or the atomic rename."""
    commands = {k: COMMANDS[k] for k in ("projector", "idm", "bc", "clone", "token", "grpo",
                                         "exact", "grpo-token")}
    chain.drive("whole", commands, base=False)
    rng, kills = random.Random(3), 0
    while kills < 6:
        try:
            chain.drive("cut", commands, base=False, status=-9, kill=rng.randint(2, 55))
        except AssertionError:
            break
        kills += 1
    chain.drive("cut", commands, base=False)
    assert kills > 4
    for stage in sorted((chain.folder / "whole/tiny").iterdir()):
        a, b = (load_file(chain.folder / root / "tiny" / stage.name / "model.safetensors")
                for root in ("whole", "cut"))
        assert all(torch.equal(v, b[k]) for k, v in a.items()) and len(a) == len(b), stage.name
        name = "base/pretraining" if stage.name == "base" else stage.name
        assert chain.log(name, stage.parent) == chain.log(name, chain.folder / "cut/tiny")


def test_chain_token_space_and_its_evaluation(chain):
    chain.rl("--steps", "2", "--action-space", "token", "--algo", "dapo", quick=True)
    token = chain.runs / "rl-task-dapo-token-s0"
    assert {k.split(".")[0] for k in chain.weights(token.name)} == {"policy"}
    said = chain.run("eval.py", str(chain.runs / MAIN), str(token), "--eval-prompts", "1",
                     "--samples", "3", "--figures", "reward", "rewards", status=2)
    assert "best_of_3" in said and "reward, mean over seeds" in said    # and after all is said:
    assert said.splitlines()[-1].startswith("eval.py: error: --figures: no rewards; there are ")
    summary = json.loads((token / "summary.json").read_text())
    rows = [json.loads(r) for r in (token / "predictions.jsonl").read_text().splitlines()]
    assert [len(r["answers"]) for r in rows] == [1, 3, 1, 3]            # id, ood x greedy, sampled
    said = chain.run("eval.py", "--rescore", str(token / "predictions.jsonl"))
    for r in rows:                                  # every figure again from the replies' text
        figures = summary[f"{r['split']} {r['mode']}"]
        again = tasks.summarise(file_task(chain.task), [r])
        assert {k: figures[k] for k in again} == pytest.approx(again, nan_ok=True)
        assert f"{figures['reward']:.4g}" in said


def test_chain_token_baseline_on_the_corpora_first(chain, quick):
    """The language model, its warm start and RL on it: each starts from the one before."""
    common = [*chain.files, "--run-root", str(chain.root), "--device", "cpu"]
    token, runs = ["--action-space", "token", "--task", chain.task], chain.runs
    train_bc.main([*common, *token, "--stage", "bc"])
    report = json.loads((runs / "bc-token/report.json").read_text())["policy, held out"]
    assert set(report) == {"id", "text"} and all(row_["policy"] > 0 for row_ in report.values())
    corpora = ["--name", "corpora", "--parent", str(runs / "bc-token"), "--lr", "1e-12"]
    train_bc.main([*common, *token, *corpora])
    lm, sft = (chain.weights(name) for name in ("bc-token", "sft-task-token-corpora"))
    for name in lm:                                 # fails if it starts from the base
        close(sft[name], lm[name], 1e-6)
    warm = ["--name", "corpora", "--parent", str(runs / "sft-task-token-corpora"), "--steps", "1"]
    train_rl.main([*common, *token, *RL, *warm, "--splits"])
    config = json.loads((runs / "rl-task-grpo-token-s0-corpora/config.json").read_text())
    assert config["parent"] == "../sft-task-token-corpora"


def test_chain_trains_on_an_endpoint_that_fails_now_and_then(chain, monkeypatch):
    """15 % of the answers cannot be judged, 30 % of the other attempts fail once or more."""
    def fault(prompt, attempt):
        draw = random.Random(prompt)
        return "500" if draw.random() < 0.15 else draw.choice(FAULTS) if attempt < 2 and \
            draw.random() < 0.3 else None
    server = FakeJudge(tasks.DIMENSIONS, fault)
    for name, value in (("pause", 0.01), ("timeout", 3.0)):
        monkeypatch.setitem(tasks.JUDGE, name, value)
    monkeypatch.setenv("JUDGE_API_KEY", "s3cret")
    train_rl.main(["--task", chain.task, "--run-root", str(chain.root), "--name", "judge", *RL,
                   "--judge-url", server.url, "--judge-model", "m", "--steps", "3", "--device",
                   "cpu", "--temperature", "5"])                        # answers that differ
    server.shutdown()
    log, files = chain.log(f"{MAIN}-judge"), [f for f in chain.root.rglob("*") if f.is_file()]
    assert 0 < sum(r["judge_failed"] for r in log) < 24
    assert len(log) == 3 and all(math.isfinite(v) for r in log for v in r.values())
    assert server.keys == {"Bearer s3cret"}
    assert not [f for f in files if b"s3cret" in f.read_bytes()]


def test_chain_on_a_qwen_folder_with_the_users_own_files(chain, refused):
    """Every missing predecessor is an error that prints its command: follow them all."""
    todo = ["train_rl.py " + shlex.join([
        "--model", "qwen", *chain.files, "--task", chain.task, "--policy-layers", "1",
        "--idm-layers", "1", "--codes", "16", "--run-root", str(chain.root), "--seed", "1"])]
    while "projector" not in todo[-1]:
        line = refused(todo[-1].replace(".py", "", 1))
        todo.append(re.search(r"unfinished; run first: python (.*)", line)[1])
    assert [command.split()[0] for command in todo[::-1]] == [
        "train_projector.py", "train_idm.py", "train_bc.py", "train_bc.py", "train_rl.py"]
    for command in todo[::-1]:
        script, *flags = shlex.split(command)
        assert "finished in" in chain.run(script, *flags, "--steps", "2",
                                          *(RL if "rl" in script else []))
    (run,) = chain.root.glob("*--qwen/rl-task-grpo-latent-s1-codes16-idm1-policy1")
    config = json.loads((run / "config.json").read_text())
    assert config["args"]["paired"] == chain.files[1:3] and config["args"]["codes"] == 16


def test_chain_on_the_mini_world(chain):
    """An untrained base scores at the floor everywhere: no variance, and nothing breaks."""
    chain.run("train_rl.py", *RL, "--algo", "bnpo", "--steps", "2", quick=True)
    log = chain.log("rl-mini-bnpo-latent-s0")
    assert len(log) == 2 and all(math.isfinite(v) for r in log for v in r.values())
    said = chain.run("train_rl.py", *RL, "--algo", "dapo", "--steps", "2", quick=True, status=3)
    assert "rl-mini-dapo-latent-s0: no optimiser step was taken" in said and "Traceback" not in said
    assert not (chain.runs / "rl-mini-dapo-latent-s0/model.safetensors").exists()


def test_chain_a_judge_of_no_use_stops_before_anything_is_learnt_or_logged(chain, monkeypatch):
    server = FakeJudge(tasks.DIMENSIONS, lambda prompt, attempt: "refusal")
    for name, value in (("pause", 0.01), ("timeout", 3.0)):
        monkeypatch.setitem(tasks.JUDGE, name, value)
    monkeypatch.setattr(tasks, "SOME", 1)           # answers of the tiny model are often alike
    command = ["--task", chain.task, "--run-root", str(chain.root), "--name", "useless", *RL,
               "--judge-url", server.url, "--judge-model", "new", "--steps", "3", "--device", "cpu"]
    with pytest.raises(UserError, match="no usable reply in .*one begins 'I cannot judge this"):
        train_rl.main(command)
    server.shutdown()
    run = chain.runs / f"{MAIN}-useless"
    assert not (run / "log.jsonl").exists() and not (run / "state/last.pt").exists()
    well = FakeJudge(tasks.DIMENSIONS)              # the same command goes on, at another address
    command[command.index("--judge-url") + 1] = well.url
    train_rl.main(command)
    well.shutdown()
    assert len(chain.log(run.name)) == 3


def test_chain_goes_on_by_itself_after_a_lost_worker(chain, recorded):
    """torchrun --max-restarts: one of two ranks is killed after a few steps. Fails if the second
    attempt meets the addresses of the first one's dead workers."""
    commands = {"dapo": ("train_rl", ["--algo", "dapo", *SHORT])}
    for root in ("calm", "lost"):
        shutil.copytree(chain.folder / "one", chain.folder / root)
        shutil.rmtree(chain.folder / root / "tiny/rl-task-dapo-latent-s0-idm1-policy1")
    chain.drive("calm", commands, ranks=2, common=["--steps", "6"])
    chain.drive("lost", commands, ranks=2, common=["--steps", "6"], restarts=3, kill=4, rank=1)
    a, b = (chain.folder / root / "tiny/rl-task-dapo-latent-s0-idm1-policy1"
            for root in ("calm", "lost"))
    calm, lost = (load_file(run / "model.safetensors") for run in (a, b))
    assert all(torch.equal(v, lost[k]) for k, v in calm.items())
    assert chain.log(a.name, a.parent) == chain.log(b.name, b.parent)


def test_chain_workers_end_when_their_torchrun_is_gone(chain, recorded):
    shutil.copytree(chain.folder / "one", chain.folder / "gone")
    torchrun = subprocess.Popen(chain.command(
        "train_rl.py", "--task", chain.task, *RL, "--steps", "9999", "--name", "gone", "--run-root",
        "gone", "--idm-layers", "1", "--policy-layers", "1", "--codes", "64", "--parent",
        "gone/tiny/sft-task-latent-idm1-policy1", *chain.files, ranks=2), env=ENV,
        cwd=chain.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = chain.folder / f"gone/tiny/{MAIN}-codes64-idm1-policy1-gone/log.jsonl"
    def workers():
        found = subprocess.run(["pgrep", "-f", "train_rl.py .*--name gone"], capture_output=True)
        return set(map(int, found.stdout.split())) - {torchrun.pid}
    began = time.time()
    while not log.exists() and time.time() - began < 60:
        time.sleep(0.2)
    assert log.exists() and len(workers()) == 2
    torchrun.kill()
    torchrun.wait()
    began = time.time()
    while workers() and time.time() - began < 15:
        time.sleep(0.2)
    assert not workers()


# The memory plan, held against what is counted.


def test_the_plans_backbones_have_the_published_numbers_of_parameters():
    for shape, billions in (("3b", 3.754622976), ("7b", 8.292166656)):
        with torch.device("meta"):
            base = Qwen2_5_VLForConditionalGeneration._from_config(shape_config(shape))
        close(sum(p.numel() for p in base.parameters()) / 1e9, billions, 0.01 * billions)


def counted_bytes(stage, tokens_at_once, group, prompts, prompt_tokens, new, recompute):
    """Peak GB of all tensors of a real step of `medium` in fp32, from building the model on."""
    with AliveBytes() as alive:
        agent = benchmark_agent("medium", "cpu")
        agent.recompute = recompute
        if stage != "rl latent":
            names = {"idm": ("projector", "idm", "codebook", "world"), "sft release": ("backbone",),
                     "sft token": ("policy",)}[stage]
            rows = [{**benchmark_row(agent, 512, image=False), "id": str(n)}
                    for n in range(tokens_at_once // 512)]
            batch = agent.encoder.collate([agent.encoder.encode(r) for r in rows])
        if stage == "idm":
            agent.policy = None
        elif stage == "sft token":
            agent.projector = agent.idm = agent.codebook = agent.world = None
            agent.make_token_policy()
        elif stage == "rl latent":
            agent.idm, names = None, ("policy",)
            row_ = benchmark_row(agent, prompt_tokens, image=False)
            examples_ = [agent.encoder.encode(row_, prompt=True) for _ in range(prompts)]
            reference = copy.deepcopy(agent.policy)
        modules = agent.train_only(*names).values()
        if stage == "sft release":
            train_bc.train_last_layers(agent, 8)
            agent.backbone.model.visual.requires_grad_(False)           # no pictures here
        optimizer = torch.optim.AdamW([p for m in modules for p in m.parameters()
                                       if p.requires_grad])
        for _ in range(2):                          # in the second the moments exist
            if stage == "idm":
                with torch.no_grad():
                    e = agent.embeddings(batch)
                    states = agent.project(e, batch.has_image)
                noise = torch.zeros(*batch.tokens.shape, 128)
                losses = train_idm.inverse_losses(agent, batch, states, noise)[:2]
                loss = sum(map(torch.sum, losses)) + sum(stage1.projector_losses(
                    agent, batch, e, cycle=True).values())
            elif stage != "rl latent":
                kind = stage.split()[1]
                loss = train_bc.KINDS[kind][2](agent, batch)[0].sum()
            else:
                rolled = [rollout(agent, [examples_[i] for i in part], group, new, 1.0, part)
                          for part in kit.pack(examples_, group, new, tokens_at_once)]
                r = rolled[0]
                h = replay(agent.policy, r)[r.mask]
                loss = action_statistics(agent.policy, h, r.actions[r.mask])[0].sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return alive.peak / 1e9


MEDIUM = dict(tokens_at_once=2048, group=8, prompts=2, prompt_tokens=256, new=64)


@functools.lru_cache
def medium_plan(recompute):
    return memory_plan("medium", **MEDIUM, recompute=recompute, dtype=torch.float32, pictures=False)


@pytest.mark.parametrize("stage,recompute", [("idm", True), ("rl latent", False),
                                             ("sft token", True), ("sft release", False)])
def test_the_memory_plan_is_what_is_counted(stage, recompute):
    table = medium_plan(recompute)
    planned = max(row["total"] for name, row in table.items() if name.startswith(stage))
    assert planned == pytest.approx(counted_bytes(stage, **MEDIUM, recompute=recompute), rel=0.15)


# ---- python test_all.py --benchmark [SHAPE]: speed against what a user would otherwise run -----

SHAPES = {      # width, layers, heads, kv heads, MLP width, vocabulary, vision depth, vision width
    "tiny": (128, 3, 4, 2, 320, 1_024, 2, 64),
    "medium": (256, 16, 4, 2, 688, 32_000, 4, 128),
    "3b-deep": (128, 36, 4, 2, 688, 9_496, 4, 80),          # 3B's depth, widths / 16
    "3b": (2048, 36, 16, 2, 11_008, 151_936, 32, 1280),
    "7b": (3584, 28, 28, 4, 18_944, 152_064, 32, 1280)}
G, NEW, IMAGE_TOKENS, PROMPT = 8, 64, 150, 256


def shape_config(shape, ids=lambda token: 0, vocab=None) -> Qwen2_5_VLConfig:
    """A Qwen2.5-VL of that shape; 3b and 7b are the hub's."""
    width, layers, heads, kv_heads, mlp, own_vocab, depth, vision = SHAPES[shape]
    half = width // heads // 2
    return Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=vocab or own_vocab, bos_token_id=0, eos_token_id=2, hidden_size=width,
            intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv_heads, max_position_embeddings=32_768, rope_parameters={
                "rope_type": "default", "rope_theta": 1e6,
                "mrope_section": [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]}),
        vision_config=dict(depth=depth, hidden_size=vision, intermediate_size=3420 if vision == 1280
                           else vision * 8 // 3, num_heads=4 if vision < 1280 else 16,
                           out_hidden_size=width, fullatt_block_indexes=[depth - 1]),
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=shape != "7b")


def structure_of(shape) -> dict:
    """Codes and layers of the default runs at that shape."""
    return {**kit.STRUCTURE["tiny" if shape == "tiny" else "full"], "without": []}


def benchmark_agent(shape, device, codes=None, vocab=None) -> Agent:
    """A random Qwen2.5-VL of that shape with all modules; nothing ends a turn."""
    _, tokenizer, processor = stage1.tiny_base(DOCUMENTS, seed=0, width=64, layers=1, vocab=400)
    config = shape_config(shape, tokenizer.convert_tokens_to_ids, vocab)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        base = Qwen2_5_VLForConditionalGeneration._from_config(
            config, dtype=dtype, attn_implementation="sdpa").eval()
    processor.size = {"shortest_edge": 56 * 56, "longest_edge": 12_845_056}
    structure = structure_of(shape)
    agent = Agent(base, Encoder(tokenizer, processor, base), {
        **structure, "codes": codes or structure["codes"]})
    agent.encoder.stop_ids = torch.tensor([-1])
    return agent.make("projector", "idm", "codebook", "world", "policy").eval()


def benchmark_row(agent, length, image=True):
    """A row of about `length` tokens, 150 of them of a 280 x 420 picture."""
    words = "a b " * max(1, (length - IMAGE_TOKENS * image) // 2)
    n = len(agent.encoder.tokenizer.encode(words)) / (len(words) / 4)
    words = "a b " * max(1, int((length - IMAGE_TOKENS * image - 24) / n))
    return row("<image>" * image + words, "a b", [picture(420, 280)] if image else [])


def timed(functions, rounds, device):
    """Median seconds of each function, called in turn so that load falls on all alike."""
    seconds = {name: [] for name in functions}
    for k in range(rounds + 1):
        for name, f in functions.items():
            if device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            f()
            if device == "cuda":
                torch.cuda.synchronize()
            if k:                                   # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    return {name: sorted(s)[len(s) // 2] for name, s in seconds.items()}


def usual_inputs(agent, prompt, copies):
    ids = prompt.ids[None].expand(copies, -1).to(agent.device)
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids),
                  mm_token_type_ids=(ids == agent.encoder.image_token).int())
    if len(prompt.grids):
        pixels = agent.encoder.pixels(prompt).to(agent.device, agent.dtype)
        inputs |= {"pixel_values": pixels.repeat(copies, 1),
                   "image_grid_thw": prompt.grids.repeat(copies, 1).to(agent.device)}
    return inputs


def machine_limits(device, dtype):
    """(bytes/s, FLOP/s) that this machine reaches in a large copy and in a large product."""
    n = 2 ** 28 if device == "cuda" else 2 ** 25
    a, b = (torch.empty(n, device=device) for _ in range(2))
    m = 8192 if device == "cuda" else 1024
    x = torch.randn(m, m, device=device, dtype=dtype)
    seconds = timed({"copy": lambda: b.copy_(a), "product": lambda: x @ x}, 5, device)
    return 8 * n / seconds["copy"], 2 * m ** 3 / seconds["product"]


def utilisation(shape, device, seconds_rollout, seconds_idm, idm_tokens):
    """Decode against the bandwidth limit, IDM step against the peak of products: one table.

    A decode step reads every weight it uses once for all answers; a training token costs 2 FLOPs
    a weight in the frozen backbone, 6 where it trains and 8 in the head, which is recomputed.
    """
    agent = benchmark_agent(shape, device)
    def size(*modules):
        return sum(p.numel() for module in modules for p in module.parameters())
    text, head = agent.backbone.model.language_model, agent.backbone.lm_head
    layers = size(text.layers)
    step = (layers + size(head) + size(agent.policy, agent.world)) \
        * (2 if agent.dtype == torch.bfloat16 else 4)
    bandwidth, peak = machine_limits(device, agent.dtype)
    flops = idm_tokens * (2 * layers + 6 * size(agent.idm, agent.world) + 8 * size(head))
    return {"latent decode": {"tokens/s": G * NEW / seconds_rollout,
                              "GB/s of weights": step * NEW / seconds_rollout / 1e9,
                              "share of a copy's GB/s": step * NEW / seconds_rollout / bandwidth},
            "IDM step": {"TFLOP/s": flops / seconds_idm / 1e12,
                         "share of a product's": flops / seconds_idm / peak}}


def rl_functions(shape, device, group=G, prompt_tokens=PROMPT, new=NEW, codes=None,
                 vocab=None, usual=True):
    """What one RL step of one group costs: name -> function, for rollouts, updates, prefills."""
    latent = benchmark_agent(shape, device, codes, vocab)
    token = copy.copy(latent)
    token._modules = dict(latent._modules)
    token.make_token_policy()
    prompt = latent.encoder.encode(benchmark_row(latent, prompt_tokens), prompt=True)
    A = torch.randn(group, device=device)

    def update(agent, algorithm=train_rl.ALGORITHMS["grpo"]):
        with torch.no_grad():
            r = rollout(agent, [prompt], group, new, 1.0, [0])
        reference = copy.deepcopy(agent.policy)
        agent.train_only("policy")
        bias = agent.token_bias if agent.space == "token" else None

        def step():
            with agent.autocast():
                with torch.no_grad():
                    ref_h = replay(reference, r)[r.mask]
                h = replay(agent.policy, r)[r.mask]
                logps, _, ref_logps, _ = action_statistics(
                    agent.policy, h, r.actions[r.mask], 1.0, bias, reference, ref_h)
            which = r.mask.nonzero()[:, 0]
            loss = train_rl.surrogate(logps, r.logps[r.mask], A[which], 0.2, 0.2)[0] \
                + algorithm.beta * train_rl.k3(logps, ref_logps)
            (loss / r.mask.sum()).sum().backward()
            agent.policy.zero_grad(set_to_none=True)
        return step

    def usual_rollout():
        latent.backbone.generate(**usual_inputs(latent, prompt, group), do_sample=True, top_k=0,
                                 max_new_tokens=new, min_new_tokens=new)

    def usual_prefill():
        with torch.no_grad():
            latent.backbone(**usual_inputs(latent, prompt, group), logits_to_keep=1, use_cache=True)

    def prefill():
        with torch.no_grad():
            caches, *_ = kit.prefill(latent, latent.encoder.collate([prompt]).to(device))
            for cache in caches:
                cache.expand(group, new)

    full, reference = copy.deepcopy(latent.backbone), latent.backbone
    full.requires_grad_(True)
    inputs = usual_inputs(latent, prompt, group)
    said = torch.randint(9, 300, (group, new), device=device)
    longer = {**inputs, **{k: torch.cat([inputs[k], fill], 1) for k, fill in (
        ("input_ids", said), ("attention_mask", torch.ones_like(said)),
        ("mm_token_type_ids", torch.zeros_like(said, dtype=torch.int)))}}

    def usual_update():
        """The whole model, reference and policy, over prompt and answer of every row."""
        def logps(model):
            logits = model(**longer, logits_to_keep=new + 1, use_cache=False).logits[:, :-1].float()
            return logits.log_softmax(-1).gather(-1, said[..., None])[..., 0]
        with torch.no_grad():
            ref = logps(reference)
        new_logps = logps(full)
        loss = train_rl.surrogate(new_logps, new_logps.detach(), A[:, None], 0.2, 0.2)[0] \
            + 0.01 * train_rl.k3(new_logps, ref)
        loss.mean().backward()
        full.zero_grad(set_to_none=True)

    parts = {"rollout": {"latent": lambda: rollout(latent, [prompt], group, new, 1.0, [0]),
                         "token, ours": lambda: rollout(token, [prompt], group, new, 1.0, [0])},
             "update": {"latent": update(latent), "token, ours": update(token)},
             "prefill": {"latent": prefill}}
    if usual:
        parts["rollout"]["token, usual"] = usual_rollout
        parts["update"]["token, usual"] = usual_update
        parts["prefill"]["token, usual"] = usual_prefill
    return parts, len(prompt)


def idm_step(shape, device):
    """One joint step of the inverse dynamics model on 4 + 4 rows of ~300 tokens."""
    agent = benchmark_agent(shape, device)
    rows = [{**benchmark_row(agent, 300 - 7 * n, image=n < 4), "id": str(n)} for n in range(8)]
    batch = agent.encoder.collate([agent.encoder.encode(r) for r in rows]).to(device)
    agent.train_only("projector", "idm", "codebook", "world")
    noise = torch.zeros(*batch.tokens.shape, agent.structure["codes"], device=device)

    def step():
        with torch.no_grad():
            e = agent.embeddings(batch)
            states = agent.project(e, batch.has_image)
        ce, neg_entropy, _ = train_idm.inverse_losses(agent, batch, states, noise)
        projected = stage1.projector_losses(agent, batch, e, cycle=True)
        (ce.mean() + neg_entropy.mean() + 1e-3 * sum(projected.values())).backward()
        agent.zero_grad(set_to_none=True)
    return step, int(batch.lengths.sum())


def waiting_for_rows(batches=12):
    """Rows with 1-megapixel JPEGs, four a batch: seconds to prepare a batch, and the share of a
    step that is spent waiting for one when a step takes twice as long."""
    _, tokenizer, processor = stage1.tiny_base(DOCUMENTS, seed=0, width=64, layers=1, vocab=400)
    processor.size = {"shortest_edge": 56 * 56, "longest_edge": 12_845_056}
    encoder = Encoder(tokenizer, processor, tiny_agent().backbone, "256")
    with tempfile.TemporaryDirectory() as folder:
        for k in range(4):
            picture(125, 125, k).resize((1000, 1000)).save(f"{folder}/{k}.jpg")
        rows = [row("<image>What?", "A bus.", [f"{folder}/{k % 4}.jpg"], str(k))
                for k in range(400)]
        source = Stream(rows, encoder, batch_tokens=1200, seed=0)
        source.next()
        began = time.perf_counter()
        for _ in range(batches):
            source.next()
        prepare, waited = (time.perf_counter() - began) / batches, 0.0
        began = time.perf_counter()
        for _ in range(batches):
            time.sleep(2 * prepare)
            asked = time.perf_counter()
            source.next()
            waited += time.perf_counter() - asked
        return {"seconds to prepare a batch": prepare,
                "share of a step spent waiting": waited / (time.perf_counter() - began)}


def benchmark(shape="medium", device="cpu", part=None):
    """Print medians, ratios to what a user would otherwise run, and how cost grows."""
    torch.set_num_threads(1)
    if part:                                        # a measurement of memory, in its own process
        idm_step(shape, device)[0]()
        return print(kit.peak_memory())
    memory = int(subprocess.run(                    # first: a child's peak starts at its parent's
        [sys.executable, __file__, "--benchmark", shape, "--device", device, "--part"],
        env=ENV, capture_output=True, text=True, check=True).stdout) / 1e9
    rounds = 3 if device == "cpu" else 9
    parts, n = rl_functions(shape, device)
    structure = structure_of(shape)
    fields = ("width", "layers", "heads", "kv heads", "MLP", "vocabulary", "vision layers",
              "vision width")
    print(f"{shape} on {device}: {dict(zip(fields, SHAPES[shape]))}")
    print(f"one group: {G} answers of {NEW} tokens, prompt of {n} tokens, {IMAGE_TOKENS} of them "
          f"image; {structure['policy_layers']} policy layers, {structure['codes']} codes; "
          "medians, interleaved\n")
    medians = {name: timed(functions, rounds, device) for name, functions in parts.items()}
    medians["rollout + update"] = {k: medians["rollout"][k] + medians["update"][k]
                                   for k in medians["rollout"]}
    paper, table = {"rollout": 1.13, "update": 0.86, "rollout + update": 1.08}, {}
    for name, median in medians.items():
        ratios = {f"latent / {k}": median["latent"] / median[k] for k in median if k != "latent"}
        table[name] = {**{f"{k} (s)": v for k, v in median.items()}, **ratios,
                       "latent / token, paper": paper.get(name)}
    print(kit.format_table("RL", table), "\n")
    counted = {}
    for name, functions in parts.items():
        for k, function in functions.items():
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                function()
            counted.setdefault(name, {})[f"{k} (GFLOP)"] = counter.get_total_flops() / 1e9
    print(kit.format_table("products and attention", counted), "\n")
    if device == "cuda":
        peaks = {}
        for name, functions in parts.items():
            for space, f in functions.items():
                torch.cuda.reset_peak_memory_stats()
                f()
                peaks.setdefault(name, {})[space] = kit.peak_memory() / 1e9
        print(kit.format_table("peak memory (GB), all of the table's models loaded", peaks), "\n")
    del parts
    step, idm_tokens = idm_step(shape, device)
    seconds = timed({"step": step}, rounds, device)["step"]
    print(kit.format_table("IDM step, 8 rows", {"ours": {
        "tokens": idm_tokens, "seconds": seconds, "tokens/s": idm_tokens / seconds,
        "peak memory (GB)": memory}}), "\n")
    print(kit.format_table("rows with 1-megapixel JPEGs", {"prefetched": waiting_for_rows()}), "\n")
    print(kit.format_table("against this machine's limits", utilisation(
        shape, device, medians["rollout"]["latent"], seconds, idm_tokens)), "\n")
    grows = {}
    for change in ({}, {"group": 16}, {"prompt_tokens": 512}, {"new": 128}, {"codes": 512},
                   {"vocab": 4 * SHAPES[shape][5]}):
        functions, _ = rl_functions(shape, device, usual=False, **change)
        flat = {f"{space} {what}": f for what in ("rollout", "update")
                for space, f in functions[what].items()}
        seconds = timed(flat, rounds, device)
        name = ", ".join(f"{k} {v}" for k, v in change.items()) or "as above"
        grows[name] = seconds if not grows else {k: v / grows["as above"][k]
                                                 for k, v in seconds.items()}
    print(kit.format_table("cost (s), then factors", grows))
    return table


# ---- python test_all.py --memory SHAPE: will it fit? -------------------------------------------

CARDS = (24, 48, 80, 141)           # GB; a tenth stays free


class AliveBytes(TorchDispatchMode):
    """Bytes of the storages that operators have made and that are still alive, and their peak: of
    real tensors, or of fake ones, which have sizes and take no memory."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.known = 0, 0, weakref.WeakSet()

    def freed(self, size):
        self.alive -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):       # what was there before: weights
            if isinstance(x, torch.Tensor):
                self.known.add(x.untyped_storage())
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in self.known:
                storage = x.untyped_storage()
                self.known.add(storage)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.freed, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out


def peak_of(function, dtype, *modules) -> int:
    """Peak bytes that a forward pass makes, with the backward pass if it has one, less the
    gradients of `modules`, which the plan counts by formula."""
    with AliveBytes() as alive, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = function()
        if out.requires_grad:
            out.float().sum().backward()
    gradients = sum(p.grad.nbytes for m in modules for p in m.parameters() if p.grad is not None)
    for module in modules:
        module.zero_grad(set_to_none=True)
    return max(0, alive.peak - gradients)


def memory_plan(config, tokens_at_once=16384, group=8, prompts=8, prompt_tokens=1024, new=1024,
                recompute=False, dtype=torch.bfloat16, codes=128, idm_layers=4, policy_layers=8,
                pictures=True) -> dict[str, dict]:
    """Peak GB of every stage on one card, by what takes it: stage -> figures. `reduced` is what an
    optimiser step sums over several cards.

    Weights, gradients, AdamW's moments, copies, caches and kept states by formula; what the trained
    stacks keep for their backward pass from a run of the stages' own losses on fake tensors."""
    config = config if hasattr(config, "text_config") else shape_config(config)
    word = dtype.itemsize
    text, N = config.text_config, tokens_at_once
    width, vocab, layers = text.hidden_size, text.vocab_size, text.num_hidden_layers
    with FakeTensorMode():
        base = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
        base.requires_grad_(False)
        m = {"projector": Projector(width), "idm": CausalStack(text, idm_layers, codes),
             "codebook": nn.Embedding(codes, width),
             "world": WorldModel(width, text.intermediate_size),
             "policy": CausalStack(text, policy_layers, codes),
             "token policy": CausalStack(text, min(policy_layers, layers), vocab)}
        for module in m.values():
            module.recompute = recompute
        rows = max(1, N // 512)                     # a corpus micro-batch: rows of 512 tokens
        states = torch.zeros(rows, N // rows, width, dtype=dtype)
        flat, targets = states.view(1, -1, width), torch.zeros(N - 1, dtype=torch.long)
        agent = SimpleNamespace(**m, backbone=base, token_bias=torch.zeros(vocab), autocast=lambda:
                                torch.autocast("cpu", dtype, enabled=dtype != torch.float32))

        def as_rows(stack, layer_norm_input):       # attention over rows, the rest over tokens
            return stack(layer_norm_input, kit.text_positions(layer_norm_input))
        agent.world_logprobs = functools.partial(Agent.world_logprobs, agent)
        agent.idm_logits = lambda s: as_rows(m["idm"], states).view(1, -1, codes)[:, 1:]
        agent.policy = lambda s, positions: as_rows(m["policy"], states).view(1, -1, codes)
        agent.states = lambda batch: flat
        batch = SimpleNamespace(labelled=lambda: (0, targets))      # every token of one flat row

        def token_head():
            stack = m["token policy"]
            h = stack.hidden(states, kit.text_positions(states)).view(-1, width)
            return token_logprobs(stack.head, h[1:], targets, agent.token_bias)

        part = min(prompts, max(1, N // (group * (prompt_tokens + new))))   # prompts at a time

        def updated(stack, bias=None):
            n = part * group
            r = kit.Rollout([], *torch.zeros(2, n, new, dtype=torch.long), torch.zeros(n, new),
                            torch.ones(n, new, dtype=torch.bool), torch.ones(n),
                            torch.zeros(n, new, width, dtype=dtype),
                            torch.zeros(n, new, dtype=torch.long),
                            torch.zeros(part, prompt_tokens, width, dtype=dtype),
                            torch.zeros(3, part, prompt_tokens, dtype=torch.long),
                            torch.ones(part, prompt_tokens, dtype=torch.bool), group)
            h = replay(stack, r).flatten(0, 1)
            return action_statistics(stack, h, r.actions.flatten(), 1.0, bias)[0]

        layer = base.model.language_model.layers[-1:]
        with torch.no_grad():                       # one frozen layer at a time
            frozen = peak_of(lambda: kit.run_layers(
                layer, states, base.model.language_model.rotary_emb,
                kit.text_positions(states)), dtype)
        e = torch.zeros(N, width)
        held = {                                    # activations of the trained stacks
            "projector": peak_of(lambda: stage1.paired_loss(m["projector"], e, e), dtype,
                                 m["projector"]),
            "idm": peak_of(lambda: stage1.paired_loss(m["projector"], e, e) + sum(map(
                torch.sum, train_idm.inverse_losses(agent, batch, flat,
                                                    torch.zeros(1, N, codes))[:2])),
                           dtype, *m.values()),
            "bc": peak_of(lambda: train_bc.code_losses(agent, batch)[0], dtype, *m.values()),
            "sft token": peak_of(token_head, dtype, m["token policy"]),
            "rl": peak_of(lambda: updated(m["policy"]), dtype, m["policy"]),
            "rl token": peak_of(lambda: updated(m["token policy"], agent.token_bias), dtype,
                                m["token policy"])}
        fp32 = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.float32)
        fp32.requires_grad_(False)
        fp32.model.language_model.layers[-policy_layers:].requires_grad_(True)

        def released():
            x = torch.zeros(rows, N // rows, width, requires_grad=True)
            text = fp32.model.language_model
            s = text.norm(kit.run_layers(text.layers, x, text.rotary_emb, kit.text_positions(x),
                                         recompute=recompute)).view(-1, width)[1:]
            x = m["world"](s, m["codebook"](targets))
            return token_logprobs(fp32.lm_head, x, targets, agent.token_bias)
        held["sft release"] = peak_of(released, torch.float32, fp32, *m.values())
        release = [base.model.visual, base.model.language_model.layers[-policy_layers:],
                   base.model.language_model.norm, base.model.language_model.embed_tokens]
        size = {name: sum(p.numel() for p in module.parameters()) for name, module in m.items()}
        size["base"] = sum(p.numel() for p in base.parameters())
        size["release"] = sum(p.numel() for module in release for p in module.parameters())
        size["rest of base"] = size["base"] - size["release"]

    # Bytes a layer keeps of a token: keys and values.
    pair = 2 * text.num_key_value_heads * (width // text.num_attention_heads) * word
    cache = pair * part * (prompt_tokens + group * (prompt_tokens + new))
    kept = (prompt_tokens + group * new) * width * word                     # states of a prompt
    table = {}

    def stage(name, trained, others=("base",), gradients=True, frozen_word=word, work=0, **more):
        n = sum(size[one] for one in trained)
        # On a GPU AdamW makes one more tensor of each weight's size, when the pass is over.
        more["pass or step"] = max(work, 4 * n * gradients)
        parts = {"weights": 4 * n + frozen_word * sum(size[one] for one in others),
                 "gradients": 4 * n * gradients, "AdamW": 8 * n, **more}
        table[name] = {what: value / 1e9 for what, value in parts.items()}
        total = table[name]["total"] = sum(table[name].values())
        table[name]["reduced"] = 4 * n * gradients / 1e9
        table[name]["card"] = next((f"{card} GB" for card in CARDS if total <= 0.9 * card), "none")
    stage("projector", ("projector",), states=3 * N * width * word + 2 * N * width * 4,
          work=max(held["projector"], frozen))
    latent = ("idm", "codebook", "world")
    stage("idm", (*latent, "projector"), states=3 * N * width * word,
          work=max(held["idm"], frozen))
    for cloning in ("bc", "sft latent"):
        stage(cloning, ("policy",), ("base", *latent, "projector"), states=2 * N * width * word,
              work=max(held["bc"], frozen))
    stage("sft token", ("token policy",), states=2 * N * width * word,
          work=max(held["sft token"], frozen))
    # The release's way: all is fp32, vision tower and last layers train, so that every layer keeps
    # what its backward pass needs. A vision block keeps about eight widths and four MLP widths of
    # each patch, four patches a token of a picture, which is every other token.
    seen = config.vision_config
    blocks = seen.depth * 4 * (N // 2) * (8 * seen.hidden_size + 4 * seen.intermediate_size) * 4
    stage("sft release", ("release",), ("rest of base", "policy", *latent, "projector"),
          frozen_word=4, work=held["sft release"] + pictures * blocks)
    for space, policy, others in (("latent", "policy", ("base", "codebook", "world", "projector")),
                                  ("token", "token policy", ("base",))):
        n, own_layers = size[policy], policy_layers * (space == "latent")
        stage(f"rl {space}, rollout", (policy,), others, gradients=False, reference=4 * n,
              copies=word * n * (word < 4), caches=cache * (layers + own_layers),
              states=prompts * kept, work=frozen)
        stage(f"rl {space}, update", (policy,), others, reference=4 * n,
              states=(prompts + part) * kept,
              work=held["rl" if space == "latent" else "rl token"])
        # eval.py has a second backbone, the same yardstick of diversity for all runs.
        stage(f"evaluation {space}", (), (policy, *others, "base"), gradients=False,
              caches=cache * (layers + own_layers), states=part * kept, work=frozen)
    return table


def memory(shape, options):
    """Print the plan and what it rests on."""
    print(f"{shape}, one card, fp32 masters: {options}\n")
    plan = memory_plan(shape, **options)
    print(kit.format_table("peak GB", plan))
    print("\n`pass or step` is what a forward and backward pass keeps, or AdamW's own temporary: "
          "the first bends to --tokens-at-once and --recompute. Caches and states bend to "
          "--prompts a card, --group-size and --max-new-tokens as well; DAPO's refills keep up to "
          f"{1 + train_rl.REFILLS} times these states. A card keeps a tenth free. `reduced` is "
          "what an optimiser step sums over several cards. Each rank first loads the backbone into "
          f"the host's memory: {plan['projector']['weights']:.3g} GB.")


# ---- python test_all.py --check FOLDER_OR_ID: does the method hold on this checkpoint? ---------

# The largest logit by which a token of an untrained world model may trail the base's best, which
# another order of sums in that dtype explains.
SHORTFALL = {torch.float32: 1e-3, torch.bfloat16: 0.5}


@torch.no_grad()
def rollout_checks(agent: Agent, prompts, new) -> dict[str, dict]:
    """Of an agent whose modules are untrained: what must hold on any checkpoint -> figures."""
    model, worst = agent.backbone.model, {"positions": 0, "greedy": 0.0, "replay": 0.0}
    for prompt in prompts:
        r = rollout(agent, [prompt], 2, new, 1.0, [0])
        with agent.autocast():
            h = replay(agent.policy, r)[r.mask]
            logps = action_statistics(agent.policy, h, r.actions[r.mask])[0]
        worst["replay"] = max(worst["replay"], (logps - r.logps[r.mask]).abs().mean().item())
        own = r.tokens[0][r.mask[0]]                # both answers are the base's greedy one
        inputs = usual_inputs(agent, replace(prompt, ids=torch.cat([prompt.ids, own.cpu()])), 1)
        logits = agent.backbone(**inputs).logits[0, len(prompt) - 1:-1].float() + agent.token_bias
        short = logits.max(-1).values - logits.gather(1, own[:, None])[:, 0]
        worst["greedy"] = max(worst["greedy"], short.max().item())
        golden = positions_by_brute_force(prompt.ids, prompt.grids, agent.encoder.image_token)
        worst["positions"] = max(worst["positions"], int((prompt.positions.T - golden).abs().max()))
    limits = {"positions": ("positions, largest difference from golden ones", 0),
              "greedy": ("untrained world model, largest logit behind the base's best",
                         SHORTFALL[agent.dtype]),
              "replay": ("rollout against replay, mean difference of log-probs",
                         train_rl.ROLLOUT_TOLERANCE[agent.dtype])}
    return {label: {"holds": "yes" if worst[name] <= limit else "NO", "found": f"{worst[name]:.2g}",
                    "wanted": f"at most {limit:g}"} for name, (label, limit) in limits.items()}


def check(model, device, judge, options) -> bool:
    """Print what holds on a checkpoint: invariants of the rollout, two steps of every stage with
    its peak memory beside the plan's, one judge call; whether all does."""
    if os.path.isdir(model):
        model = os.path.abspath(model)
    with tempfile.TemporaryDirectory() as folder:
        root, flags = Path(folder), ["--model", model, "--device", device, "--run-root", folder]
        args, errors = train_rl.arguments().parse_args(flags + judge), []
        agent = Agent.from_base(kit.fill(args, train_rl.DEFAULTS["latent"]))
        agent.make("projector", "codebook", "world", "policy").train_only("policy")
        print(f"{model}: {agent.dtype} on {agent.device.type}, {options}", flush=True)
        picture(420, 280).save(root / "a.png")
        rows = [{**benchmark_row(agent, options["prompt_tokens"], image), "id": str(n)}
                for n in range(12 + options["tokens_at_once"] // options["prompt_tokens"])
                for image in (True, False)]
        for r in rows:
            r["images"] = [str(root / "a.png")] * len(r["images"])
        prompts = [agent.encoder.encode(r, prompt=True) for r in rows[:2]]
        found = rollout_checks(agent.eval(), prompts, options["new"])
        if judge:
            args.task = write(root / "one.jsonl", rows[:1])
            task = tasks.load_task(args)
            (reply,) = task.judge(task.splits["id"][:1], ["a b"])
            reward = task.reward(reply)
            found["one call of the judge"] = {
                "holds": "NO" if math.isnan(reward) else "yes",
                "found": "no scores" if math.isnan(reward) else f"reward {reward:.3g}",
                "wanted": "scores for every dimension"}
        dtype, config = agent.dtype, agent.backbone.config
        del agent
        torch.cuda.empty_cache()                    # the stages have the card to themselves
        files = {name: write(root / f"{name}.jsonl", part) for name, part in (
            ("paired", rows[::2]), ("text", rows[1::2]),
            ("task", [{**r, "split": split} for r in rows for split in ("sft", "rl")]))}
        flags += ["--paired", files["paired"], "--text", files["text"], "--steps", "2",
                  "--tokens-at-once", str(options["tokens_at_once"])]
        flags += ["--recompute"] * options["recompute"]
        corpus, task = ["--batch-tokens", str(options["tokens_at_once"])], ["--task", files["task"]]
        rl = ["--splits", "--prompts", str(options["prompts"]), "--group-size",
              str(options["group"]), "--max-new-tokens", str(options["new"]), *task]
        token = ["--action-space", "token"]
        plan = memory_plan(config, **options, dtype=dtype)
        for stage, command in {
                "projector": ["train_projector", *corpus], "idm": ["train_idm", *corpus],
                "bc": ["train_bc", "--stage", "bc", *corpus],
                "sft latent": ["train_bc", *task, *corpus],
                "sft token": ["train_bc", *token, *task, *corpus],
                "rl latent": ["train_rl", *rl], "rl token": ["train_rl", *token, *rl]}.items():
            print(f"two steps of {stage} ...", flush=True)
            done = subprocess.run([sys.executable, str(HERE / f"{command[0]}.py"), *command[1:],
                                   *flags], env=ENV, capture_output=True, text=True)
            planned = max(row["total"] for name, row in plan.items() if name.startswith(stage))
            figures = {"holds": "NO", "found": "see below", "wanted": f"planned {planned:.3g} GB"}
            if done.returncode:
                said = (done.stdout + done.stderr).strip().splitlines() or ["nothing said"]
                errors.append(f"{stage}: status {done.returncode}: {said[-1]}")
            else:                                   # on a CPU the peak is the process's: not held
                log = max(root.rglob("log.jsonl"), key=lambda log: log.stat().st_mtime)
                peak = json.loads(log.read_text().splitlines()[-1])["peak_memory"] / 1e9
                fits = device == "cpu" or peak <= 1.15 * planned
                figures |= {"holds": "yes" if fits else "NO", "found": f"{peak:.3g} GB"}
            found[f"two steps of {stage}"] = figures
    print("\n" + kit.format_table("check", found), *errors, sep="\n")
    return all(row["holds"] == "yes" for row in found.values())


@pytest.mark.parametrize("tied", [True, False])
def test_rollout_checks_hold_on_an_untrained_agent_and_tell_a_trained_one(tied):
    agent = copy.deepcopy(tiny_agent())
    agent.backbone.lm_head.weight = agent.backbone.model.language_model.embed_tokens.weight
    if not tied:
        agent.backbone.lm_head.weight = nn.Parameter(torch.randn_like(
            agent.backbone.lm_head.weight), requires_grad=False)
    agent.make("projector", "codebook", "world", "policy").eval()
    prompts = examples(prompt=True)[:2]
    assert [row["holds"] for row in rollout_checks(agent, prompts, 8).values()] == ["yes"] * 3
    shake(agent.world, 0.5)
    assert [row["holds"] for row in rollout_checks(agent, prompts, 8).values()] == [
        "yes", "NO", "yes"]


def test_chain_check_of_a_checkpoint(chain, capsys):
    """A judge that answers; a stage that fails, since a group of one is refused; no weights."""
    options = {"tokens_at_once": 600, "prompt_tokens": 250, "new": 8, "recompute": True,
               "prompts": 2, "group": 1}
    server = FakeJudge(tasks.DIMENSIONS)
    judge = ["--judge-url", server.url, "--judge-model", "m"]
    assert not check(str(chain.folder / "qwen"), "cpu", judge, options)
    said = capsys.readouterr().out
    server.shutdown()
    assert re.findall(r"(?m)^(.*?)  +(?:yes|NO)  ", said)[3:5] == [
        "one call of the judge", "two steps of projector"]
    assert len(re.findall("  yes  ", said)) == 9 and len(re.findall("  NO  ", said)) == 2, said
    assert re.search("^rl latent: status 2: .*--group-size", said, re.M), said
    broken = shutil.copytree(chain.folder / "qwen", chain.folder / "broken")
    (broken / "model.safetensors").unlink()
    with pytest.raises(UserError, match="broken: cannot be loaded"):
        check(str(broken), "cpu", [], options)


# The stages of a check are as short as this, unless flags say otherwise.
CHECK = {"tokens_at_once": 2048, "group": 4, "prompts": 2, "prompt_tokens": 512, "new": 32}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--benchmark", nargs="?", const="medium", choices=SHAPES)
    what.add_argument("--memory", choices=SHAPES)
    what.add_argument("--check", metavar="FOLDER_OR_ID", help="of a Qwen2.5-VL: positions, "
                      "rollouts, two steps of every stage, memory beside the plan")
    parser.add_argument("--judge-url", help="check: one call of this judge")
    parser.add_argument("--judge-model", help="check: its name there")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"),
                        help="benchmark and check (default: cpu)")
    parser.add_argument("--part", action="store_true", help="used by the benchmark itself")
    sizes = {"tokens_at_once": 16384, "group": 8, "prompts": 8, "prompt_tokens": 1024, "new": 1024}
    for name, flag in zip(sizes, ("--tokens-at-once", "--group-size", "--prompts",
                                  "--prompt-tokens", "--max-new-tokens")):
        parser.add_argument(flag, dest=name, type=kit.count,
                            help=f"memory, check (default: {sizes[name]}, {CHECK[name]})")
    parser.add_argument("--recompute", action="store_true", help="memory, check: with that flag")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"),
                        help="memory: of the backbone (default: bfloat16)")
    given = parser.parse_args()
    usual = CHECK if given.check else sizes
    options = {name: getattr(given, name) or usual[name] for name in sizes}
    options |= {"recompute": given.recompute}
    if bool(given.judge_url) != bool(given.judge_model):
        parser.error("--judge-url and --judge-model go together")
    if given.memory:
        memory(given.memory, options | {"dtype": getattr(torch, given.dtype)})
    elif given.check:
        judge = ["--judge-url", given.judge_url, "--judge-model", given.judge_model]
        kit.launch(lambda _: sys.exit(not check(
            given.check, given.device, judge * bool(given.judge_url), options)))
    else:
        benchmark(given.benchmark, given.device, given.part)
