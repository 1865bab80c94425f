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

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_hard_exit(monkeypatch):
    """`launch` ends a process that failed at once; here the test goes on."""
    monkeypatch.setattr(os, "_exit", sys.exit)


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






def finish(run, **modules) -> Path:
    """As after an optimiser step."""
    run.taken = 1
    run.finish(**modules)
    return run.folder


def finished(root, *flags, **more) -> Path:
    return finish(fresh_run(root, *flags, "--fresh", **more), m=nn.Linear(1, 1))




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






def flipped(data: bytes, rng) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]






















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






# ---- model.py: data --------------------------------------------------------------------------


def parse(raw, image_root=None):
    return kit.normalise_row(raw, "f.jsonl:3", Path("/data"), image_root, "0/f.jsonl:3")




def asks(content="x", **more):
    return {"messages": [{"role": "user", "content": content}], **more}




UNUSABLE = [(asks("<image>"), "1 `<image>` placeholders but 0 images"),
            (asks("<image><image>", images=["a"]), "2 `<image>` placeholders but 1 images"),
            (asks("what is <|im_end|>?"), r"contains a literal <\|im_end"),
            (asks("what is <|image_pad|>?"), r"contains a literal <\|image_pad"),
            (asks("a\ud800b"), "half a character"), (asks("ok \U0001f600 and \udc00"), "half a ch")]




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






GZIPPED = gzip.compress(b'{"text": "a"}\n' * 99)




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




# Pictures.


def encoder_of(image_tokens=None):
    """An encoder with the published limits of a picture."""
    agent = tiny_agent()
    processor = type(agent.encoder.processor)(
        size={"shortest_edge": 3136, "longest_edge": 12845056})
    return Encoder(agent.encoder.tokenizer, processor, agent.backbone, image_tokens)






def seen(image):
    """Grid and pixels of one picture."""
    encoder = encoder_of("64")
    e = encoder.encode(row("<image>", None, [str(image) if isinstance(image, Path) else image]))
    return e.grids.tolist(), encoder.pixels(e)


TURNED = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
          6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}












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












# Several files.


def files_of(folder, sizes, name="{}.jsonl"):
    """A file for each letter and its number of rows, whose ids start with the letter."""
    return [write(folder / name.format(k), [{**r, "id": f"{k}{i}"} for i, r in
                                            enumerate(text_rows(n))]) for k, n in sizes.items()]


def counted(ids):
    return Counter(i[0] for i in ids)












# Rows left out.












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






def full_pass(example, ids=None):
    """transformers' own forward pass over one row: hidden states of every layer, positions."""
    agent, ids = tiny_agent(), example.ids if ids is None else ids
    positions = positions_by_brute_force(ids, example.grids, agent.encoder.image_token)[:, None]
    pixels = agent.encoder.pixels(example)
    out = agent.backbone.model(
        input_ids=ids[None], position_ids=positions, pixel_values=pixels, output_hidden_states=True,
        image_grid_thw=None if pixels is None else example.grids)
    return out.hidden_states, positions






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








def scored_run(root, name, seed, reward):
    """A run folder of that seed, and its summary."""
    (root / name).mkdir(parents=True)
    (root / name / "config.json").write_text(json.dumps({
        "args": {"seed": seed}, "identity": {}, "base": "", "parent": None, "sha256": None}))
    return {root / name: {"id": {"reward": reward, "diversity": 1 + reward}}}




















@functools.cache
def mini():
    return tasks.mini_task(0, 0)








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








# What a person looks at.










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




def test_a_picture_in_the_page_is_small():
    big = Image.effect_noise((3000, 2000), 100).convert("RGB")
    data = tasks.picture(big, "x").split("base64,")[1].split('"')[0]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (224, 149)












# ---- README.md -------------------------------------------------------------------------------






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








# ---- train_bc.py -----------------------------------------------------------------------------






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






# Tests that fail at the moment, one a bug; each belongs beside its neighbours of b.py once mended.




@pytest.mark.parametrize("name", ["W\u0130t", "W\u0131t"])     # KeyError, and the run ends with it
def test_bug_a_turkish_i_is_refused_not_raised(name):
    assert tasks.parse_reply(f"{name}: x [Scores]: (8, 9)", ("Wit",)) in (None, {"Wit": (8, 9)})


@pytest.mark.parametrize("reply", ["d: [Scores]" + "\n" * 30_000,
                                   "d: [Scores]: (8, 9" + " " * 30_000 + "x"], ids=range(2))
def test_bug_a_reply_that_loops_on_white_space_is_refused_at_once(reply):
    began = time.perf_counter()
    assert tasks.parse_reply(reply, ("d",)) is None and time.perf_counter() - began < 0.5










def test_bug_names_in_underscore_bold_and_of_full_width():
    task = tasks.Task("t", ("Fluency", "Tone"), (0, 1), {}, None, 9)
    assert task.scores(GOOD.replace("Tone:", "__Tone__:"))
    wide = "\u6d41\uff08\u7545\uff09"
    assert tasks.parse_reply(f"{wide}\uff1a x [Scores]: (8, 9)", (wide,))




@pytest.mark.parametrize("more", [{"judge_notes": 5}, {"dimensions": ["Wit", "wit"]},
                                  {"dimensions": [" "]}, {"dimensions": ["a\nb"]}])
def test_bug_rows_with_which_no_judgement_can_succeed_are_refused(tmp_path, more):
    with pytest.raises(UserError):
        r = file_task(write(tmp_path / "t.jsonl", [{**text_rows(1)[0], **more}])).splits["id"][0]
        tasks.judge_prompt("", ("d",), r, "x")




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






@pytest.fixture
def quick(monkeypatch):
    """Two large steps for every stage that is run in this process."""
    for script in (stage1, train_idm, train_bc):
        for scales in script.DEFAULTS.values():
            monkeypatch.setitem(scales["tiny"], "steps", 2)






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






























# The memory plan, held against what is counted.




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






def test_every_stage_runs_and_its_evaluation_is_rescored(tmp_path, monkeypatch):
    monkeypatch.setattr(stage1, "BASE_PHASES", tuple((p[0], 2, *p[2:]) for p in stage1.BASE_PHASES))
    root = ["--run-root", str(tmp_path), "--eval-prompts", "2"]
    for module, flags in ((stage1, []), (train_idm, []), (train_bc, ["--stage", "bc"]), (train_bc, []),
                          (train_bc, ["--action-space", "token"])):
        corpora = module in (stage1, train_idm)
        module.main([*flags, *(root[:2] if corpora else root), "--steps", "1"])
    for space in ("latent", "token"):
        train_rl.main(["--algo", "grpo", "--action-space", space, "--steps", "0", "--splits", "id", *root])
        run = tmp_path / "tiny" / f"rl-mini-grpo-{space}-s0"
        tasks.main([str(run), "--splits", "id", "--eval-prompts", "2"])
        table = json.loads((run / "summary.json").read_text())
        again = tasks.rescore(str(run / "predictions.jsonl"))
        assert again["id greedy"]["reward"] == pytest.approx(table["id greedy"]["reward"])
        assert (run / "report.html").exists()
