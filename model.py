"""The model of the kit: a frozen Qwen2.5-VL and the five modules of latent-action control.

Paper: "Controlling Multimodal Conversational Agents with Coverage-Enhanced Latent Actions"
(arXiv 2601.07516), section 3. A reader meets, top to bottom:

    runtime      errors for people, ranks, run folders, logs, atomic and exact checkpoints
    data         dialogue rows -> token tensors with explicit 3-D positions; resumable streams
    modules      CausalStack (inverse dynamics, policy), WorldModel, Projector; their losses' parts
    Agent        the backbone and those modules: `states()`, `next_token_logits()`, loading
    rollouts     one prompt pass for G answers, and the replay of answers from cached inputs

Deviations from the paper or its released code, each because it is simpler, exact or faster:
 1. The modules see the states of *text* tokens only (the paper indexes e by text tokens), at
    plain positions 0, 1, 2, ...; the image reaches them through the backbone's attention.
 2. The text-only pass of a paired row drops the image's tokens (the release leaves unfilled
    placeholders in), so that the two passes align token by token.
 3. One merge of state and code in every stage, zero-initialised: an untrained world model is
    exactly the base model. The release has two merges, whose logits disagree.
 4. States do not depend on the policy, so a rollout keeps them and the update runs the policy
    module alone: no backbone, no vision tower, no vocabulary logits.

    from model import Agent
    agent = Agent.from_run("runs/tiny/rl-mini-dapo-latent-s0")
    print(agent.chat("What do you see?", image="picture.png", system="You are ..."))
"""

import argparse
import copy
import datetime
import fcntl
import gzip
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

# Read when torch loads (so the other files import this one before torch): OpenMP threads that wait
# spin only briefly. By default any other load on the machine makes a step many times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoConfig, AutoTokenizer, DynamicCache, PreTrainedTokenizerFast,
                          Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLDecoderLayer, Qwen2_5_VLRotaryEmbedding)
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar

try:  # without torchvision the PIL processor is the only one; its home has moved between versions
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil, smart_resize)
except ImportError:
    from transformers import Qwen2VLImageProcessor as Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

disable_progress_bar()                                  # of transformers' own loading
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
                 "<|video_pad|>")
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"   # what `<image>` in a row stands for
IMAGE_SIZE = (280, 420)      # height, width of every image at full scale (release's pre-training)
Image.MAX_IMAGE_PIXELS = 64_000_000                     # PIL refuses twice this: no bombs


# ---- Runtime ---------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake outside the code: one line naming file, row and remedy; exit status 2."""


class UnusableRow(UserError):
    """A row that a corpus can do without: left out and counted there, an error elsewhere."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are a `UserError`, so that every bad flag is one line as well."""

    def __init__(self, doc: str):
        self.sized = {}                             # defaults as (tiny, full scale)
        self.by_stage = lambda args: {}             # the same, depending on other flags
        super().__init__(usage="%(prog)s [flags]", description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.section = self                         # where flags go: a part of --help

    def error(self, message):
        raise UserError(f"{message} (see --help)")

    def flag(self, name: str, default, help: str, **kw):
        """`add_argument` with the type read off the default and the default shown in --help."""
        if default is False:
            kw["action"] = "store_true"
        elif default is not None and "nargs" not in kw:
            kw.setdefault("type", type(default))
        silent = default is None or default is False or default == ""
        shown = "" if silent else f" (default: {default})"
        self.section.add_argument(name, default=default, help=help + shown, **kw)

    def common_flags(self, **sized):
        """The flags that every training script shares; the rest stand in the script itself.

        `sized` gives the defaults that depend on the model, each as (tiny, full scale).
        """
        self.sized = {"codes": (64, 128), "idm_layers": (2, 4), "policy_layers": (2, 8), **sized}
        self.section = self.add_argument_group("model, data and run")
        self.flag("--model", "tiny", "`tiny` (embedded), a Qwen2.5-VL folder or a hub id")
        self.flag("--paired", None, "corpora of dialogues with images (JSON, JSONL, .gz)",
                  nargs="+", metavar="FILE")
        self.flag("--text", None, "corpora of dialogues without images", nargs="+", metavar="FILE")
        self.flag("--image-root", None, "folder that relative image paths start from "
                                        "(default: the row's file)")
        self.flag("--run-root", "runs", "where run folders are kept")
        self.flag("--name", "", "suffix of this run's folder, for variants")
        self.flag("--parent", None, "run folder to start from instead of the usual predecessor")
        self.flag("--seed", 0, "seed of data order, noise and initial weights")
        self.flag("--steps", None, "optimiser steps" + self.shown("steps"), type=int)
        self.flag("--lr", None, "peak learning rate" + self.shown("lr"), type=float)
        if "batch_tokens" in sized:
            self.flag("--batch-tokens", None, "tokens per optimiser step over all ranks, of each "
                      "kind of corpus" + self.shown("batch_tokens"), type=int)
        self.flag("--dtype", "auto", "dtype of the frozen backbone (auto: bfloat16 on CUDA)",
                  choices=("auto", "float32", "bfloat16"))
        self.flag("--device", "auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"))
        self.flag("--fresh", False, "delete this run's folder and start it again")
        self.section = self.add_argument_group("structure and ablations, with folders of their own")
        self.flag("--codes", None, "|C|, size of the codebook" + self.shown("codes"), type=int)
        self.flag("--idm-layers", None, "layers of the inverse dynamics model"
                  + self.shown("idm_layers"), type=int)
        self.flag("--policy-layers", None, "layers of the policy" + self.shown("policy_layers"),
                  type=int)
        self.flag("--no-text", False, "ablation: no text-only rows")
        self.flag("--no-projector", False, "ablation: states of text-only rows are e^T itself")
        self.flag("--no-cycle", False, "ablation: no cycle loss on text-only rows")
        self.section = self.add_argument_group("this stage")

    def shown(self, name: str) -> str:
        return " (default: {}, tiny {})".format(*reversed(self.sized[name]))

    def resolve(self, argv=None) -> argparse.Namespace:
        """Parse, refuse unknown flags and impossible values, fill what depends on the model."""
        args = self.fill(self.parse_args(argv))
        for name in self.sized:
            value = getattr(args, name)
            if value < 0 or (value == 0 and name != "min_p") or (name == "lr" and value > 10):
                raise UserError(f"--{name.replace('_', '-')} {value} is out of range")
        for name in ("task", "task_root", "paired", "text", "image_root"):   # whatever the cwd
            value = getattr(args, name, None)
            if isinstance(value, list):
                setattr(args, name, [os.path.abspath(v) for v in value])
            elif value and os.path.exists(value) and value not in ("mini", "mmrole", "pcogalign"):
                setattr(args, name, os.path.abspath(value))
        if getattr(args, "save_every", 1) < 1:
            raise UserError("--save-every must be at least 1")
        return args

    def fill(self, args) -> argparse.Namespace:
        """`args` with the defaults that depend on the model and on other flags."""
        for name, (tiny, full) in {**self.sized, **self.by_stage(args)}.items():
            if getattr(args, name) is None:
                setattr(args, name, tiny if args.model == "tiny" else full)
        return args


# What a stage hands to a predecessor that it has to run first, as far as that one takes it.
PROPAGATED = ("model", "task", "task_root", "paired", "text", "image_root", "run_root", "seed",
              "dtype", "device", "codes", "idm_layers", "policy_layers", "no_text", "no_projector",
              "no_cycle", "judge_url", "judge_model", "judge_prompt", "judge_key",
              "judge_threads", "judge_extra", "judge_images")


def launch(main, parser: Parser):
    """Parse, join the process group, run `main(args)`; a `UserError` ends with status 2."""
    try:
        args = parser.resolve()
        init_distributed(args.device)
        main(args)
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def init_distributed(device: str = "auto"):
    """Join torchrun's process group if there is one: nccl on CUDA, gloo on CPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible; use --device cpu")
    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ and not dist.is_initialized():
        cuda = device != "cpu" and torch.cuda.is_available()
        # Small counts and the judge's results travel on CPU; a slow judge must not look hung.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                timeout=datetime.timedelta(hours=6))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def say(*words):
    """Print once, from rank 0."""
    if rank() == 0:
        print(*words, flush=True)


def all_sum(values: Tensor) -> Tensor:
    """Sum of a small tensor over all ranks, in float64 so that no count is rounded."""
    values = values.detach().double()
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather(part: dict) -> dict:
    """The union of every rank's dict, on all ranks."""
    if not dist.is_initialized():
        return part
    parts = [None] * world_size()
    dist.all_gather_object(parts, part)
    return {k: v for p in parts for k, v in p.items()}


def barrier():
    if dist.is_initialized():
        dist.barrier()


def key_seed(*keys) -> int:
    """A seed that depends on the keys alone: the same for any split over ranks and batches."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def cosine(step: int, steps: int, warmup: float = 0.0, floor: float = 0.0) -> float:
    """Learning-rate factor at `step`: linear warm-up over a share of the steps, cosine decay."""
    rise = max(1, int(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    share = (step - rise) / max(1, steps - rise)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))


def reduce_gradients(params: list[nn.Parameter]):
    """Sum gradients over ranks. Every loss is already divided by its global denominator, so any
    split over ranks and micro-batches gives the same sum; a rank without rows adds zeros."""
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if dist.is_initialized():
        flat = torch.cat([p.grad.flatten() for p in params])
        dist.all_reduce(flat)
        for p, g in zip(params, flat.split([p.numel() for p in params])):
            p.grad.copy_(g.view_as(p))


def optimizer_step(run: "Run", optimizers: list[torch.optim.Optimizer], row_ids: list[str],
                   clip: float = 1.0) -> float:
    """Reduce gradients, clip each optimiser's to norm `clip`, step; returns the largest norm.

    A non-finite norm skips the step on all ranks; ten in a row raise `UserError` naming rows.
    """
    norms = []
    for optimizer in optimizers:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        reduce_gradients(params)
        norms.append(nn.utils.clip_grad_norm_(params, clip))
    norm = torch.stack(norms).max().item()
    run.skipped = 0 if math.isfinite(norm) else run.skipped + 1
    run.skipped_all += run.skipped > 0
    if run.skipped:
        say(f"warning: non-finite gradient, step skipped ({run.skipped} in a row)")
    if run.skipped == 10:
        raise UserError(f"{run.folder}: ten non-finite steps in a row, the last on rows "
                        f"{row_ids[:8]}; lower --lr or look at these rows")
    for optimizer in optimizers:
        if not run.skipped:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


def set_lr(optimizer: torch.optim.Optimizer, lr: float):
    for group in optimizer.param_groups:
        group["lr"] = lr


# Run folders.


def variant(args) -> str:
    """Folder suffix of what changes a stage's result, so that ablations never collide."""
    usual = ((64, 2, 2) if args.model == "tiny" else (128, 4, 8))
    tags = [f"{name.split('_')[0]}{getattr(args, name)}" for name, value in
            zip(("codes", "idm_layers", "policy_layers"), usual) if getattr(args, name) != value]
    tags += [t for t in ("no_text", "no_projector", "no_cycle") if getattr(args, t)]
    return "".join(f"-{tag.replace('_', '')}" for tag in tags)


def model_root(args) -> Path:
    """runs/<model>: a hub id or path becomes one folder name."""
    return Path(args.run_root) / args.model.strip("/.").replace("/", "--")


def folder_of(args, stage: str, name: str = "") -> Path:
    """A stage's folder; `name` is this run's own suffix, which predecessors do not carry."""
    return model_root(args) / (stage + variant(args) + (f"-{name}" if name else ""))


def task_tag(task: str) -> str:
    return Path(task).name.split(".")[0]


def propagate(args, parser: Parser, **fixed) -> argparse.Namespace:
    """The predecessor's own defaults (never --lr or --steps of `args`) with what propagates and
    what is `fixed`."""
    own = vars(parser.parse_args([]))
    known = {key: getattr(args, key) for key in PROPAGATED if key in own and hasattr(args, key)}
    return parser.fill(argparse.Namespace(**{**own, **known, **fixed}))


def require(args, folder: Path, script: str, main, parser: Parser, **fixed) -> Path:
    """The finished predecessor's folder: as it stands, run first (`tiny`), or a clear error."""
    if args.parent:
        if not (Path(args.parent) / "model.safetensors").exists():
            raise UserError(f"--parent {args.parent}: no finished run there (model.safetensors)")
        return Path(args.parent)
    other = propagate(args, parser, **fixed)
    if (folder / "model.safetensors").exists():
        had = read_config(folder)["args"]
        differing = [f"--{k.replace('_', '-')} {had.get(k)}, now {getattr(other, k)}"
                     for k in ("task", "task_root", "paired", "text", "image_root")
                     if getattr(other, k, None) is not None and had.get(k) != getattr(other, k)
                     and not (k.startswith("task") and had.get(k) is None)]   # of no task
        if differing:
            raise UserError(f"{folder} was trained with other data ({'; '.join(differing)}); use "
                            "another --run-root, or --parent with a run of your own")
        return folder
    if args.model != "tiny":
        usual = parser.fill(parser.parse_args(["--model", args.model]))
        words = ["--model", args.model]
        for key in (*PROPAGATED[1:], *fixed):
            value = getattr(other, key, None)
            if key in fixed or value != getattr(usual, key, None):
                words.append("--" + key.replace("_", "-"))
                words += [] if value is True else map(str, value if isinstance(value, list)
                                                      else [value])
        raise UserError(f"{folder} is missing or unfinished; run first: "
                        + shlex.join(["python", script, *words]))
    say(f"{folder} is missing or unfinished: running {script} first")
    main(other)
    return folder


def read_config(folder) -> dict:
    """A run folder's config.json; `UserError` if it is no run folder or a damaged one."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
        if {"args", "derived", "parent", "parent_hash", "script_hash"} <= set(config):
            return config
        reason = "it is no config of a run"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise UserError(f"{folder}: config.json cannot be used ({reason}); name a run folder, or "
                    "start this one again with --fresh")


def file_hash(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


def atomic(path: Path, write):
    """`write(temporary)`, flush to disk, rename: the file is whole or it is not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:   # torch's and safetensors' own
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({' '.join(str(error).split())[:90]}); earlier "
                        "files are intact: free the space or permission and run the same command"
                        ) from None


LOGS = ("log.jsonl", "samples.jsonl")


class Run:
    """One run's folder: config.json, log.jsonl, samples.jsonl, state/, model.safetensors.

    The folder is finished when model.safetensors stands in it. All randomness of the training
    loops is keyed by seed, step and row, so the state to resume from is weights, optimisers,
    the step and the data cursors: no generator state.
    """

    NOT_COMPARED = ("fresh", "run_root", "device", "save_every", "splits", "judge_url", "judge_key",
                    "judge_threads")                            # these change no weight

    def __init__(self, args, folder: Path, script: str, parent: Path | None, **derived):
        self.folder, self.started = Path(folder), time.time()
        self.skipped = self.skipped_all = 0         # non-finite steps: in a row, and all
        self.save_every = args.save_every
        if args.fresh and rank() == 0:
            if (self.folder / "state").exists():
                self._lock()                        # never under another process's feet
            shutil.rmtree(self.folder, ignore_errors=True)
        barrier()
        self.finished = (self.folder / "model.safetensors").exists()
        self.config = {
            "args": dict(vars(args)), "derived": derived,
            "parent": os.path.relpath(parent, self.folder) if parent else None,
            "parent_hash": file_hash(parent / "model.safetensors") if parent else None,
            "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers")},
            "git": _git_commit(), "script": script,
            "script_hash": "-".join(file_hash(Path(__file__).with_name(f))
                                    for f in ("model.py", "eval.py", script)), "argv": sys.argv}
        config_file = self.folder / "config.json"
        if config_file.exists():
            self._check_same(read_config(self.folder))
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder} holds files but no config.json (half deleted?); "
                            "--fresh starts it again")
        barrier()                               # every rank has looked before rank 0 writes
        if rank() == 0 and not self.finished:
            self._lock()
            atomic(config_file, lambda p: p.write_text(json.dumps(self.config, indent=1)))
        barrier()
        if self.finished:
            say(f"{self.folder} is finished, its tables are in report.json (--fresh redoes it)")

    def _lock(self):
        """Make state/ and hold its lock until the process ends, however it ends."""
        try:
            (self.folder / "state").mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / "state" / "lock", "w")
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be made ({error.strerror}); "
                            "choose another --run-root") from None
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.folder}: another process is working on this run; wait for it, "
                            "or take --name") from None

    def _check_same(self, old: dict):
        hashes = ("base", "mini", "task_hash")
        was, now = ({**c["args"], **{k: c["derived"].get(k) for k in hashes},
                     "parent_hash": c["parent_hash"]} for c in (old, self.config))
        differing = [k for k in sorted({*was, *now} - set(self.NOT_COMPARED))
                     if was.get(k) != now.get(k)]
        if differing:
            shown = ", ".join(f"{k}: {was.get(k)} -> {now.get(k)}" for k in differing)
            raise UserError(f"{self.folder} was started with other arguments ({shown}); "
                            "use --name for a variant or --fresh to redo it")
        if old["script_hash"] != self.config["script_hash"]:
            say(f"warning: {self.config['script']}, model.py or eval.py has changed since "
                f"{self.folder} was started")

    def steps(self, total: int, modules: dict[str, nn.Module], optimizers: list,
              streams: dict[str, "Stream"] = {}, extra: dict = {}):
        """Yield the steps that are left, the body of every training loop.

        First weights, optimisers, cursors and `extra` are restored from the last checkpoint, if
        there is one; a new one is made every `save_every` steps and after the last.
        """
        start = self._resume(modules, optimizers, streams, extra)
        with tqdm(total=total, initial=start, desc=self.folder.name, disable=rank() != 0,
                  smoothing=0.1, mininterval=1.0) as self.bar:
            for step in range(start, total):
                self.began = time.time()
                yield step
                if (step + 1) % self.save_every == 0 or step + 1 == total:
                    self._save(step + 1, modules, optimizers, streams, extra)

    def log(self, row: dict, shown: str):
        """Append one step's row to log.jsonl (rank 0), numbers rounded to 7 digits, with the
        step's seconds and the peak memory; `shown` goes to the progress bar."""
        row = {**row, "skipped": self.skipped_all, "seconds": time.time() - self.began,
               "peak_memory": peak_memory()}
        self._append("log.jsonl", [{
            k: v if not isinstance(v, float) else float(f"{v:.7g}") if math.isfinite(v) else None
            for k, v in row.items()}])
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update()

    def _append(self, name: str, rows: list[dict]):
        if rank() == 0:
            try:
                with open(self.folder / name, "a") as f:
                    f.writelines(json.dumps(row) + "\n" for row in rows)
            except OSError as error:
                raise UserError(f"{self.folder / name}: cannot be written ({error.strerror}); the "
                                "same command continues from the last checkpoint") from None

    def report(self, title: str, table: dict[str, dict[str, float]]):
        """Print a table (rows x columns) and keep it in report.json: the stage's own findings."""
        if rank() == 0:
            print(format_table(title, table), flush=True)
            file = self.folder / "report.json"
            old = json.loads(file.read_text()) if file.exists() else {}
            atomic(file, lambda p: p.write_text(json.dumps({**old, title: table}, indent=1)))

    def sample(self, rows: list[dict]):
        """Append rollouts to samples.jsonl: the thing to look at."""
        self._append("samples.jsonl", rows)

    def _save(self, step: int, modules: dict, optimizers: list, streams: dict, extra: dict):
        """Atomic checkpoint after `step` steps: what trains, its optimisers, the data cursors."""
        if rank() == 0:
            logs = {name: (self.folder / name).stat().st_size for name in LOGS
                    if (self.folder / name).exists()}
            state = {"step": step, "cursors": {k: s.cursor for k, s in streams.items()},
                     "extra": extra, "logs": logs, "skipped": [self.skipped, self.skipped_all],
                     "modules": {k: trained_state(m) for k, m in modules.items()},
                     "optimizers": [o.state_dict() for o in optimizers]}
            atomic(self.folder / "state" / "last.pt", lambda p: torch.save(state, p))

    def _resume(self, modules: dict, optimizers: list, streams: dict, extra: dict) -> int:
        """Restore the last checkpoint and cut the logs back to it; the step to go on with."""
        path, state = self.folder / "state" / "last.pt", {"step": 0, "logs": {}}
        if path.exists():
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                raise UserError(f"{path}: is not a checkpoint of this kit ({type(error).__name__});"
                                " --fresh starts the run again") from None
            for name, module in modules.items():
                module.load_state_dict(state["modules"][name], strict=False)
            for optimizer, saved in zip(optimizers, state["optimizers"]):
                optimizer.load_state_dict(saved)
            for name, stream in streams.items():
                stream.cursor = state["cursors"][name]
            extra.update(state["extra"])
            self.skipped, self.skipped_all = state["skipped"]
            say(f"continuing {self.folder} at step {state['step']}")
        for name in LOGS:
            if rank() == 0 and (self.folder / name).exists():
                os.truncate(self.folder / name, state["logs"].get(name, 0))
        barrier()
        return state["step"]

    def finish(self, modules: dict[str, nn.Module]):
        """Write model.safetensors (only what this stage trained), drop state/."""
        if rank() == 0:
            tensors = {f"{name}.{key}": value.detach().cpu().contiguous()
                       for name, module in modules.items()
                       for key, value in trained_state(module).items()}
            atomic(self.folder / "model.safetensors", lambda p: save_file(tensors, p))
            shutil.rmtree(self.folder / "state", ignore_errors=True)
        barrier()
        minutes = (time.time() - self.started) / 60
        say(f"{self.folder} finished in {minutes:.1f} min")


def format_table(title: str, table: dict[str, dict[str, float]]) -> str:
    """Plain-text table; columns are the union of the rows' keys, numbers to 4 digits."""
    columns = list(dict.fromkeys(c for row in table.values() for c in row))
    def cell(value):
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    lines = [[title, *columns]] + [[name, *(cell(row.get(c)) for c in columns)]
                                   for name, row in table.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
    return "\n".join("  ".join(w.ljust(n) if i == 0 else w.rjust(n)
                               for i, (w, n) in enumerate(zip(line, widths))) for line in lines)


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict without frozen parameters: a stage saves only what it trained."""
    wanted = {name for name, p in module.named_parameters() if p.requires_grad}
    return {k: v for k, v in module.state_dict().items() if k in wanted}


def _git_commit() -> str | None:
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True,
                              text=True, cwd=Path(__file__).parent)
    except OSError:                                 # git is not installed
        return None
    return done.stdout.strip() or None


def peak_memory() -> int:
    """Peak bytes: of the CUDA allocator once it is used, else of the process's resident set."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- Data ------------------------------------------------------------------------------------


def normalise_row(raw, where: str, folder: Path | None, image_root: str | None) -> dict:
    """One row in the kit's form, or `UserError` naming `where` (file:line).

    Accepts `messages` (role/content, content a string with `<image>` or typed blocks), ShareGPT
    `conversations` (from/value) and plain `text`; `images` may be missing, [] or ["None"].
    """
    if not isinstance(raw, dict):
        raise UserError(f"{where}: a row must be a JSON object; fix or remove it")
    row = {k: v for k, v in raw.items() if k not in ("messages", "conversations", "image")}
    if "conversations" in raw:
        names = {"human": "user", "gpt": "assistant", "system": "system", "user": "user",
                 "assistant": "assistant"}
        turns = raw["conversations"] if isinstance(raw["conversations"], list) else []
        messages = [{"role": names.get(m.get("from")), "content": m.get("value")}
                    if isinstance(m, dict) else m for m in turns]
        if isinstance(raw.get("system"), str):
            messages.insert(0, {"role": "system", "content": raw["system"]})
    elif "messages" in raw:
        messages = raw["messages"]
    elif isinstance(raw.get("text"), str):
        # In web text `<image>` is a tag of its own and no place for a picture.
        messages = [{"role": "assistant", "content": raw["text"].replace("<image>", "<img>")}]
    else:
        raise UserError(f"{where}: no `messages`, `conversations` or `text`; see README, Data")
    images = raw.get("images", raw.get("image")) or []
    images = [i for i in (images if isinstance(images, list) else [images]) if i != "None"]
    if not all(isinstance(i, (str, Image.Image)) for i in images):
        raise UserError(f"{where}: `images` must be a list of paths")
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: `messages` is empty; fix or remove the row")
    row["messages"] = []
    for message in messages:
        role, content = (message.get("role"), message.get("content")) \
            if isinstance(message, dict) else (None, None)
        if role not in ("system", "user", "assistant"):
            raise UserError(f"{where}: role {role!r} is not system, user or assistant")
        if isinstance(content, list):  # typed blocks
            content = [b if isinstance(b, dict) else {} for b in content]
            parts = ["<image>" if str(b.get("type")).startswith("image") else b.get("text")
                     for b in content]
            content = "".join(parts) if all(isinstance(p, str) for p in parts) else None
        if not isinstance(content, str):
            raise UserError(f"{where}: the content of a {role} message is not text")
        row["messages"].append({"role": role, "content": content})
    placeholders = sum(m["content"].count("<image>") for m in row["messages"])
    if images and placeholders == 0:  # leading if absent: before the first user message
        first = next((m for m in row["messages"] if m["role"] == "user"), None)
        if first is None:
            raise UserError(f"{where}: has images but no user message to put them in")
        first["content"] = "<image>" * len(images) + "\n" + first["content"]
    elif placeholders != len(images):
        raise UserError(f"{where}: {placeholders} `<image>` placeholders but {len(images)} images")
    row["images"] = [i if isinstance(i, Image.Image) else
                     str(Path(image_root or folder or ".") / i) for i in images]
    row["id"], row["where"] = str(raw.get("id", where)), where
    return row


def read_rows(files, image_root: str | None = None, position: tuple = (0, 0, 0)):
    """Yield (row, next position) from JSON or JSONL files, `.gz` too, from `position` on.

    JSONL is streamed by byte offset; a file that is one JSON array is read whole. A position is
    (file index, byte offset or array index, line number). Errors: `UserError` with file:line.
    """
    for index in range(position[0], len(files)):
        path = Path(files[index])
        offset, line = position[1:] if index == position[0] else (0, 0)
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
                if f.peek(64)[:64].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                    try:
                        rows = json.load(f)
                    except ValueError as error:
                        raise UserError(f"{path}: not valid JSON ({error}); fix the file") from None
                    for n in range(line, len(rows)):
                        row = normalise_row(rows[n], f"{path}: row {n + 1}", path.parent,
                                            image_root)
                        yield row, (index, n + 1, n + 1)
                    continue
                f.seek(offset)
                for raw in iter(f.readline, b""):
                    line, offset = line + 1, offset + len(raw)
                    if raw.strip():
                        try:
                            data = json.loads(raw)
                        except ValueError as error:
                            reason = str(error).split(":")[0]
                            raise UserError(f"{path}:{line}: not valid JSON in UTF-8 ({reason}); "
                                            "fix or remove the row") from None
                        row = normalise_row(data, f"{path}:{line}", path.parent, image_root)
                        yield row, (index, offset, line)
        except (OSError, EOFError) as error:
            raise UserError(f"{path}: cannot be read ({error}); check the path") from None


def open_image(image, where: str) -> Image.Image:
    """A PIL image, header read, pixels not yet decoded; `UserError` naming row and file."""
    if isinstance(image, Image.Image):
        return image
    try:
        return Image.open(image)
    except FileNotFoundError:
        raise UserError(f"{where}: image {image} is missing; see --image-root") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: {image} is not a usable image ({error}); replace it or remove "
                        "the row") from None


@dataclass
class Example:
    """One tokenised row: T tokens, image placeholders expanded."""
    id: str
    where: str                  # file:line for errors
    ids: Tensor                 # (T,) token ids
    positions: Tensor           # (3, T) temporal, height, width
    text: Tensor                # (T,) bool: not a vision token
    response: Tensor            # (T,) bool: inside an assistant turn, its end of turn included
    images: list                # PIL images or paths, decoded when the batch is made
    grids: Tensor               # (n, 3) patches in time, height, width

    def __len__(self):
        return len(self.ids)


def mrope_positions(ids: Tensor, grids: Tensor, image_token: int, merge: int) -> Tensor:
    """3-D rotary positions of one unpadded row: text (p, p, p), image tokens their grid place.

    ids (T,), grids (n, 3) -> (3, T). Equals transformers' `get_rope_index` for still images
    (tested), without its dependence on `mm_token_type_ids` and the cached deltas.
    """
    positions = torch.empty(3, len(ids), dtype=torch.long)
    t = p = 0                                       # the next token and its position
    for frames, height, width in grids.tolist():
        h, w = height // merge, width // merge
        start = t + int((ids[t:] == image_token).nonzero()[0])
        positions[:, t:start] = torch.arange(p, p + start - t)
        p += start - t
        place = torch.cartesian_prod(torch.arange(frames), torch.arange(h), torch.arange(w))
        t = start + len(place)
        positions[:, start:t] = place.view(-1, 3).T + p
        p += max(h, w)
    positions[:, t:] = torch.arange(p, p + len(ids) - t)
    return positions


@dataclass
class Batch:
    """B rows, right-padded: the backbone's view (length T) and the text tokens' view (length M).

    Right padding with a causal mask and explicit positions is exact for the real tokens.
    """
    row_ids: list[str]
    ids: Tensor                 # (B, T)
    positions: Tensor           # (3, B, T)
    lengths: Tensor             # (B,)
    pixels: Tensor | None       # (patches, 1176) of all images
    grids: Tensor               # (images, 3)
    text_index: Tensor          # (B, M) where each text token stands in the row
    tokens: Tensor              # (B, M) text token ids
    text_lengths: Tensor        # (B,)
    targets: Tensor             # (B, M) bool: predict tokens[:, t + 1] at t
    seen_image: Tensor          # (B, M) bool: after the row's first image
    has_image: Tensor           # (B,) bool

    @property
    def real(self) -> Tensor:
        """(B, M) bool: not padding."""
        return torch.arange(self.tokens.shape[1],
                            device=self.ids.device) < self.text_lengths[:, None]

    def labelled(self) -> tuple[Tensor, Tensor]:
        """Where a token is predicted, (B, M - 1) bool, and those K next tokens, (K,)."""
        at = self.targets[:, :-1]
        return at, self.tokens[:, 1:][at]

    def to(self, device) -> "Batch":
        return Batch(**{f.name: v.to(device) if isinstance(v := getattr(self, f.name), Tensor)
                        else v for f in fields(self)})


class Encoder:
    """Tokenizer and image processor: conversation -> Example -> Batch."""

    def __init__(self, tokenizer, processor, config):
        self.tokenizer, self.processor = tokenizer, processor
        self.merge = config.vision_config.spatial_merge_size
        self.image_token = config.image_token_id
        self.pad = tokenizer.pad_token_id
        self.longest = config.text_config.max_position_embeddings
        self.vision_ids = torch.tensor(
            [i for t in VISION_TOKENS if (i := tokenizer.convert_tokens_to_ids(t)) is not None])
        self.stop_ids = torch.tensor(sorted(
            {tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")}))
        self.reserved = {*tokenizer.all_special_tokens, *VISION_TOKENS, "<|im_start|>",
                         "<|im_end|>"}
        self.turn = tokenizer.encode("<|im_start|>assistant", add_special_tokens=False)
        self.fixed_size = IMAGE_SIZE if self._budget() >= IMAGE_SIZE[0] * IMAGE_SIZE[1] else None

    def _budget(self) -> int:
        size = self.processor.size
        return size["longest_edge"] if isinstance(size, dict) else size.longest_edge

    def grid(self, image: Image.Image, where: str) -> tuple[int, int, int]:
        """Patches (time, height, width) of an image, from its size alone."""
        p = self.processor
        low = p.size["shortest_edge"] if isinstance(p.size, dict) else p.size.shortest_edge
        height, width = self.fixed_size or (image.height, image.width)
        try:
            height, width = smart_resize(height, width, factor=p.patch_size * self.merge,
                                         min_pixels=low, max_pixels=self._budget())
        except ValueError as error:
            raise UserError(f"{where}: an image cannot be resized ({error}); replace it") from None
        return 1, height // p.patch_size, width // p.patch_size

    def encode(self, row: dict, prompt: bool = False) -> Example:
        """Tokenise a row; with `prompt`, without its last assistant turn and ready to answer."""
        where = row.get("where", f"row {row['id']}")
        for token in self.reserved:
            if any(token in m["content"] for m in row["messages"]):
                raise UnusableRow(f"{where}: its text contains a literal {token}; remove it")
        messages = [{"role": m["role"], "content": m["content"].replace("<image>", IMAGE)}
                    for m in row["messages"]]
        if prompt and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False,
                                                  add_generation_prompt=prompt)
        ids = self.tokenizer.encode(text.rstrip("\n") if not prompt else text,
                                    add_special_tokens=False)
        images = [open_image(image, where) for image in row["images"]]
        grids = torch.tensor([self.grid(image, where) for image in images],
                             dtype=torch.long).view(-1, 3)
        counts = iter((grids.prod(-1) // self.merge ** 2).tolist())
        ids = [i for token in ids
               for i in [token] * (next(counts) if token == self.image_token else 1)]
        if prompt and len(ids) > self.longest:
            raise UserError(f"{where}: the prompt has {len(ids)} tokens but the model takes "
                            f"{self.longest}; shorten it (prompts are never cut)")
        end, response, k = set(self.stop_ids.tolist()), [False] * len(ids), len(self.turn)
        for t in range(len(ids)):
            if ids[t] == self.turn[0] and ids[t:t + k] == self.turn:
                t += k + 1                          # beyond the newline(s), one token
                while t < len(ids):
                    response[t], t = True, t + 1
                    if ids[t - 1] in end:
                        break
        ids = torch.tensor(ids)
        positions = mrope_positions(ids, grids, self.image_token, self.merge)
        return Example(row["id"], where, ids, positions, ~torch.isin(ids, self.vision_ids),
                       torch.tensor(response), row["images"], grids)

    def pixels(self, example: Example) -> Tensor | None:
        """(patches, 1176) of a row's images, decoded here and not before."""
        pictures = []
        for image in example.images:
            picture = open_image(image, example.where)
            try:
                picture = picture.convert("RGB")
            except (OSError, Image.DecompressionBombError, SyntaxError) as error:
                raise UserError(f"{example.where}: {image} is truncated or broken "
                                f"({error}); replace it or remove the row") from None
            if self.fixed_size:
                picture = picture.resize(self.fixed_size[::-1], Image.BICUBIC)
            pictures.append(picture)
        if not pictures:
            return None
        return self.processor(images=pictures, return_tensors="pt")["pixel_values"]

    def collate(self, examples: list[Example], responses_only: bool = False) -> Batch:
        """Right-padded batch; targets are all text tokens, or the responses only (task rows)."""
        lengths = torch.tensor([len(e) for e in examples])
        B, T = len(examples), int(lengths.max())
        ids = torch.full((B, T), self.pad)
        positions = torch.zeros(3, B, T, dtype=torch.long)
        text_lengths = torch.tensor([int(e.text.sum()) for e in examples])
        M = int(text_lengths.max())
        text_index = torch.zeros(B, M, dtype=torch.long)
        tokens = torch.full((B, M), self.pad)
        targets = torch.zeros(B, M, dtype=torch.bool)
        seen = torch.zeros(B, M, dtype=torch.bool)
        for b, e in enumerate(examples):
            n, m = int(lengths[b]), int(text_lengths[b])
            ids[b, :n], positions[:, b, :n] = e.ids, e.positions
            index = e.text.nonzero()[:, 0]
            text_index[b, :m], tokens[b, :m] = index, e.ids[index]
            wanted = e.text & e.response if responses_only else e.text
            adjacent = index[1:] == index[:-1] + 1      # not across an image
            targets[b, :m - 1] = adjacent & wanted[index[1:]]
            if len(e.grids):
                seen[b, :m] = index > (e.ids == self.image_token).nonzero()[0, 0]
        pixels = [p for e in examples if (p := self.pixels(e)) is not None]
        return Batch([e.id for e in examples], ids, positions, lengths,
                     torch.cat(pixels) if pixels else None,
                     torch.cat([e.grids for e in examples]), text_index, tokens, text_lengths,
                     targets, seen, torch.tensor([len(e.grids) > 0 for e in examples]))


class Stream:
    """Endless shuffled batches of one corpus, resumable at the exact row.

    Rows are read in blocks; a block is shuffled by a seed of its own, grouped into batches of
    `batch_tokens` real tokens with similar lengths together, and the batches shuffled. The
    cursor (epoch, where the block starts, batch in the block) rebuilds everything. The global
    batch is the same for any number of ranks: each tokenises its share of a block for the
    lengths, and rank r trains on rows r, r + world, ...
    """

    def __init__(self, source, encoder: Encoder, batch_tokens: int, seed: int,
                 image_root: str | None = None, max_tokens: int = 2048, block: int = 2048,
                 hold_out: int = 0, responses_only: bool = False):
        self.responses_only = responses_only
        self.source, self.encoder, self.seed = source, encoder, seed
        self.batch_tokens, self.max_tokens, self.block = batch_tokens, max_tokens, block
        self.image_root, self.begin, self.encoded = image_root, (0, 0, 0), {}
        self.batches, self.next_start = None, None
        # The first rows, at most a tenth of the corpus, are held out for the stage's report.
        head = list(itertools.islice(self._rows(self.begin), 10 * hold_out))
        head = head[:max(1, len(head) // 10)] if len(head) > 1 else []
        self.held_out = [example for row, _ in head if (example := self._fit(row))]
        if head:
            self.begin = head[-1][1]
        self.cursor = {"epoch": 0, "start": self.begin, "batch": 0}

    def _rows(self, start):
        if isinstance(self.source[0], dict):  # rows in memory (the mini world)
            for n in range(start[1], len(self.source)):
                yield self.source[n], (0, n + 1, n + 1)
        else:
            yield from read_rows(self.source, self.image_root, start)

    def _fit(self, row: dict) -> Example | None:
        """The row within `max_tokens`: cut at a message boundary, or None if it cannot be used."""
        if id(row) in self.encoded:
            return self.encoded[id(row)]
        messages = list(row["messages"])
        try:
            example = self.encoder.encode(row)
        except UnusableRow:
            return None
        while len(example) > self.max_tokens and len(messages) > 1:
            messages.pop()
            if messages[-1]["role"] == "assistant":
                shown = sum(m["content"].count("<image>") for m in messages)
                example = self.encoder.encode(
                    {**row, "messages": messages, "images": row["images"][:shown]})
        example = example if len(example) <= self.max_tokens else None
        if isinstance(self.source[0], dict):
            self.encoded[id(row)] = example
        return example

    def _load_block(self):
        rows, end = [], self.cursor["start"]
        for row, end in self._rows(self.cursor["start"]):
            rows.append(row)
            if len(rows) == self.block:
                break
        if not rows:
            if self.cursor["start"] == self.begin:
                raise UserError(f"{self.source}: holds no rows to train on")
            self.cursor = {"epoch": self.cursor["epoch"] + 1, "start": self.begin, "batch": 0}
            return self._load_block()
        self.next_start = end
        lengths = torch.zeros(len(rows), dtype=torch.long)
        for n in range(rank(), len(rows), world_size()):
            example = self._fit(rows[n])
            lengths[n] = 0 if example is None else len(example)
        lengths = all_sum(lengths).long().tolist()
        rng = random.Random(key_seed(self.seed, self.cursor["epoch"], self.cursor["start"]))
        kept = [n for n in range(len(rows)) if lengths[n]]
        if len(kept) < len(rows):
            say(f"note: {len(rows) - len(kept)} of {len(rows)} rows left out: they exceed "
                f"{self.max_tokens} tokens without a message boundary to cut at, or contain a "
                "literal special token")
        rng.shuffle(kept)
        kept.sort(key=lambda n: lengths[n] // 32)       # stable: similar lengths, random order
        self.batches, total = [[]], 0
        for n in kept:
            if total + lengths[n] > self.batch_tokens and self.batches[-1]:
                self.batches, total = self.batches + [[]], 0
            self.batches[-1].append(rows[n])
            total += lengths[n]
        rng.shuffle(self.batches)

    def next(self) -> list[Example]:
        """This rank's examples of the next global batch (may be none on a small batch)."""
        if self.batches is None:
            self._load_block()
        if self.cursor["batch"] == len(self.batches):
            self.cursor = {**self.cursor, "start": self.next_start, "batch": 0}
            self._load_block()
        rows = self.batches[self.cursor["batch"]]
        self.cursor = {**self.cursor, "batch": self.cursor["batch"] + 1}
        return [self._fit(row) for row in rows[rank()::world_size()]]


def micro_batches(examples: list[Example], tokens: int = 16384) -> list[list[Example]]:
    """Split by padded size, longest rows together; the split never changes the gradient."""
    batches, width = [], 0
    for example in sorted(examples, key=len, reverse=True):
        if not batches or (len(batches[-1]) + 1) * width > tokens:
            batches, width = batches + [[]], len(example)
        batches[-1].append(example)
    return batches


# ---- Modules ---------------------------------------------------------------------------------


class KVCache:
    """Keys and values of a stack in buffers of fixed length: a step writes one column and reads
    a view, nothing is copied. Decoder layers of transformers accept it as `past_key_values`."""

    def __init__(self, length: int):
        self.length, self.keys, self.values, self.used = length, {}, {}, {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_, **__):
        """keys, values (B, heads, q, head_dim) -> all of the layer's so far (B, heads, n, ..)."""
        B, H, q, D = keys.shape
        if layer not in self.keys:
            self.keys[layer] = keys.new_empty(B, H, self.length, D)
            self.values[layer] = keys.new_empty(B, H, self.length, D)
            self.used[layer] = 0
        start, end = self.used[layer], self.used[layer] + q
        self.keys[layer][:, :, start:end] = keys
        self.values[layer][:, :, start:end] = values
        self.used[layer] = end
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def expand(self, group: int, extra: int) -> "KVCache":
        """The cache of P prompts as one of P * group rows with room for `extra` more tokens."""
        out = KVCache(self.length + extra)
        for layer in self.keys:
            n = self.used[layer]
            out.update(self.keys[layer][:, :, :n].repeat_interleave(group, 0),
                       self.values[layer][:, :, :n].repeat_interleave(group, 0), layer)
        return out

    def keep(self, rows: Tensor):
        """Drop all rows but `rows` (finished answers stop costing)."""
        for layer in self.keys:
            self.keys[layer] = self.keys[layer][rows]
            self.values[layer] = self.values[layer][rows]


def run_layers(layers, x: Tensor, rotary, positions: Tensor, cache=None, mask=None) -> Tensor:
    """Decoder layers over x (B, T, d) at positions (3, B, T) or (B, T); no final norm.

    `mask` (B, 1, T, keys) bool, True = may attend; None is plain causal (or one new token).
    """
    positions = positions.expand(3, -1, -1) if positions.dim() == 2 else positions
    rope = rotary(x, positions)
    for layer in layers:
        x = layer(x, attention_mask=mask, position_embeddings=rope, position_ids=None,
                  past_key_values=cache)
    return x


class CausalStack(nn.Module):
    """Decoder layers of the backbone's kind + final norm + linear head.

    The inverse dynamics model (4 layers) and the policy (8 layers) with a |C|-way head, and the
    token-level baseline's policy: the backbone's own last layers, norm and an untied head.
    """

    def __init__(self, text_config, n_layers: int, n_out: int):
        super().__init__()
        config = copy.deepcopy(text_config)
        config.num_hidden_layers = n_layers
        config.layer_types = ["full_attention"] * n_layers
        config._attn_implementation = "sdpa"
        self.layers = nn.ModuleList(Qwen2_5_VLDecoderLayer(config, i) for i in range(n_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, n_out)
        self.rotary = Qwen2_5_VLRotaryEmbedding(config)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.initializer_range)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @classmethod
    def from_backbone(cls, backbone, n_layers: int) -> "CausalStack":
        """A copy of the backbone's last layers, norm and output head, fp32, untied."""
        text = backbone.model.language_model
        with torch.device("meta"):
            stack = cls(text.config, n_layers, backbone.lm_head.out_features)
        stack.head = nn.Linear(text.config.hidden_size, backbone.lm_head.out_features, bias=False,
                               device=backbone.device)
        stack.layers = copy.deepcopy(text.layers[-n_layers:])
        for index, layer in enumerate(stack.layers):
            layer.self_attn.layer_idx = index
        stack.norm, stack.rotary = copy.deepcopy(text.norm), copy.deepcopy(text.rotary_emb)
        stack.head.weight.data = backbone.lm_head.weight.detach().clone()
        return stack.float().requires_grad_(True)

    def hidden(self, x: Tensor, positions: Tensor, cache=None, mask=None) -> Tensor:
        """(B, T, d) -> (B, T, d), normed: what the head reads."""
        return self.norm(run_layers(self.layers, x, self.rotary, positions, cache, mask))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """(B, T, d) -> logits (B, T, n_out)."""
        return self.head(self.hidden(x, positions))


class WorldModel(nn.Module):
    """Language world model f_world(s_t, a_t) without its frozen head (section 3).

    x = s; twice: x = x + SwiGLU([x, c]). The last projections start at zero, so an untrained
    world model is the base model; the state already carries the final norm.
    """

    def __init__(self, width: int, mlp_width: int):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "gate": nn.Linear(2 * width, mlp_width, bias=False),
            "up": nn.Linear(2 * width, mlp_width, bias=False),
            "down": nn.Linear(mlp_width, width, bias=False)}) for _ in range(2))
        for block in self.blocks:
            nn.init.zeros_(block["down"].weight)

    def forward(self, s: Tensor, c: Tensor) -> Tensor:
        """s, c (..., d) -> x (..., d), the input of the frozen lm_head."""
        x = s
        for block in self.blocks:
            z = torch.cat([x, c], -1)
            x = x + block["down"](F.silu(block["gate"](z)) * block["up"](z))
        return x


class GaussianMap(nn.Module):
    """Diagonal Gaussian over one embedding space given the other (section 3, projectors).

    mu(e) = e + MLP(e), the last layer zero-initialised: the plain form of the paper was worse
    than the identity, since both embeddings of a token are close. log var in (-1, 1) by Tanh.
    """

    def __init__(self, width: int):
        super().__init__()
        def mlp():
            return nn.Sequential(nn.Linear(width, width // 2), nn.Tanh(),
                                 nn.Linear(width // 2, width))
        self.mlp, self.mlp_log_var = mlp(), mlp()
        for head in (self.mlp, self.mlp_log_var):
            nn.init.zeros_(head[-1].weight)
            nn.init.zeros_(head[-1].bias)

    def mu(self, e: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return e + self.mlp(e)

    def log_var(self, e: Tensor) -> Tensor:
        """(..., d) -> (..., d), in (-1, 1)."""
        return torch.tanh(self.mlp_log_var(e))


class Projector(nn.Module):
    """P: e^T -> e^{V,T} and P': e^{V,T} -> e^T."""

    def __init__(self, width: int):
        super().__init__()
        self.P, self.P_inv = GaussianMap(width), GaussianMap(width)


def token_logprobs(head: nn.Linear, x: Tensor, targets: Tensor, bias: Tensor | None = None,
                   chunk: int = 2 ** 24) -> Tensor:
    """log softmax(head(x) + bias) at targets, in chunks recomputed in the backward pass.

    x (K, d), targets (K,), bias (vocab,) or None -> (K,) fp32. At most `chunk` logits exist at
    a time, so memory never grows as tokens x vocabulary.
    """
    def piece(x, targets):
        logits = head(x).float()
        logits = logits if bias is None else logits + bias
        return -F.cross_entropy(logits, targets, reduction="none")
    rows = max(1, chunk // head.out_features)
    out = [checkpoint(piece, x[i:i + rows], targets[i:i + rows], use_reentrant=False)
           if torch.is_grad_enabled() else piece(x[i:i + rows], targets[i:i + rows])
           for i in range(0, max(1, len(x)), rows)]
    return torch.cat(out)


def action_statistics(policy: CausalStack, x: Tensor, actions: Tensor, temperature: float = 1.0,
                      bias: Tensor | None = None, reference: CausalStack | None = None,
                      reference_x: Tensor | None = None, chunk: int = 2 ** 24):
    """Log-prob of each action, entropy, and divergence from a reference, in chunks.

    x, reference_x (K, d) normed hidden states; actions (K,); the support (`bias`) and
    temperature are those the actions were sampled with. Returns (logp, entropy, reference logp
    or None, exact KL(policy || reference) summed over the actions or None), each (K,) fp32.
    """
    def piece(x, actions, reference_x):
        def log_softmax(stack, x):
            logits = stack.head(x).float() / temperature
            return F.log_softmax(logits if bias is None else logits + bias, -1)
        logps = log_softmax(policy, x)
        p, at = logps.exp(), actions[:, None]
        safe = logps.masked_fill(p == 0, 0)             # 0 log 0 = 0 on the masked support
        out = [logps.gather(1, at)[:, 0], -(p * safe).sum(-1)]
        if reference_x is not None:
            with torch.no_grad():
                ref = log_softmax(reference, reference_x)
            kl = (p * (safe - ref.masked_fill(p == 0, 0))).sum(-1)
            out += [ref.gather(1, at)[:, 0], kl]
        return tuple(out)
    rows = max(1, chunk // policy.head.out_features)
    pieces = [checkpoint(piece, x[i:i + rows], actions[i:i + rows],
                         None if reference_x is None else reference_x[i:i + rows],
                         use_reentrant=False) for i in range(0, max(1, len(x)), rows)]
    out = [torch.cat(parts) for parts in zip(*pieces)]
    return tuple(out) if reference_x is not None else (*out, None, None)


def keyed_gumbel(row_ids: list[str], lengths, n: int, *keys) -> Tensor:
    """Gumbel noise for every valid position of a batch, keyed by (keys, row, position).

    lengths: positions per row -> (B, max length, n) on CPU; the same row gets the same noise
    whatever batch, micro-batch or rank it falls into.
    """
    noise = torch.zeros(len(row_ids), max(lengths), n)
    for b, (row_id, length) in enumerate(zip(row_ids, lengths)):
        generator = torch.Generator().manual_seed(key_seed(*keys, row_id))
        noise[b, :length] = torch.rand(length, n, generator=generator)
    return -torch.log(-torch.log(noise.clamp(1e-9, 1 - 1e-7)))


# ---- Agent -----------------------------------------------------------------------------------


def tiny_base(texts: list[str], seed: int, width: int = 128, layers: int = 3,
              vocab: int = 1024) -> tuple:
    """The embedded `tiny` architecture, untrained: a real Qwen2.5-VL of about 0.8M parameters.

    Its byte-level BPE tokenizer (Qwen's special tokens, any text round-trips) is fitted to
    `texts`. Returns (model, tokenizer, image processor), to be saved as an ordinary folder.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION_TOKENS]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=special, clean_up_tokenization_spaces=False)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    ids = tokenizer.convert_tokens_to_ids
    heads = 4
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width * 5 // 2,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // 2,
            max_position_embeddings=4096, bos_token_id=ids("<|endoftext|>"),
            eos_token_id=ids("<|im_end|>"), pad_token_id=ids("<|endoftext|>"),
            rope_parameters={"rope_type": "default", "rope_theta": 1e4,
                             "mrope_section": [width // heads // 2 // 4,
                                               *[width // heads // 2 * 3 // 8] * 2]}),
        vision_config=dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=4,
                           out_hidden_size=width, patch_size=14, spatial_merge_size=2,
                           temporal_patch_size=2, window_size=112, fullatt_block_indexes=[1]),
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True)
    torch.manual_seed(key_seed(seed, "base"))
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56})
    return model, tokenizer, processor


def load_base(path: str | Path, dtype: torch.dtype) -> tuple:
    """(model, tokenizer, image processor) of a Qwen2.5-VL folder or hub id, without torchvision.

    Safetensors only, no remote code. Raises `UserError` for anything that is not Qwen2.5-VL.
    """
    try:
        config = AutoConfig.from_pretrained(path)
        if config.model_type != "qwen2_5_vl":
            raise UserError(f"{path}: is a {config.model_type} model, not Qwen2.5-VL; "
                            "--model takes tiny, a Qwen2.5-VL folder or a hub id")
        model, loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", use_safetensors=True,
            output_loading_info=True)
        if loaded["missing_keys"]:
            raise ValueError(f"weights are missing: {sorted(loaded['missing_keys'])[0]} and others")
        tokenizer = AutoTokenizer.from_pretrained(path)
        processor = Qwen2VLImageProcessorPil.from_pretrained(path)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--model {path}: cannot be loaded ({reason})") from None
    if tokenizer.chat_template is None:  # older snapshots keep it beside the processor
        file = cached_file(path, "chat_template.json", _raise_exceptions_for_missing_entries=False)
        if file is None:
            raise UserError(f"{path}: no chat template in the tokenizer or chat_template.json")
        tokenizer.chat_template = json.loads(Path(file).read_text())["chat_template"]
    return model, tokenizer, processor


def fingerprint(model: nn.Module) -> str:
    """A hash of every parameter's first values as bfloat16: the same in any dtype and place."""
    heads = [p.detach().flatten()[:16].to(torch.bfloat16).float().cpu() for p in model.parameters()]
    return hashlib.sha256(torch.cat(heads).numpy().tobytes()).hexdigest()[:16]


class Agent(nn.Module):
    """The frozen backbone and the modules of the method that a stage needs.

    Attributes (None until made or loaded): `projector`, `idm`, `codebook` (|C|, d), `world`,
    `policy`. `space` is "latent" (actions are codes) or "token" (the baseline, whose policy is
    the backbone's last layers; the trunk below stays frozen).
    """

    def __init__(self, backbone, encoder: Encoder, structure: dict):
        super().__init__()
        self.backbone = backbone.requires_grad_(False).eval()
        self.encoder, self.structure = encoder, dict(structure)
        self.space, self.min_p = "latent", 0.0
        self.projector = self.idm = self.codebook = self.world = self.policy = None
        text = backbone.model.language_model
        self.text_config, self.width = text.config, text.config.hidden_size
        self.base_hash = fingerprint(backbone)
        bias = torch.zeros(backbone.lm_head.out_features)
        bias[encoder.vision_ids] = float("-inf")        # never sampled, never scored
        bias[len(encoder.tokenizer):] = float("-inf")   # rows of the head that are no tokens
        self.register_buffer("token_bias", bias.to(backbone.device), persistent=False)

    @classmethod
    def from_base(cls, args) -> "Agent":
        """The backbone alone, on this rank's device, with the structure that `args` asks for."""
        cuda = args.device != "cpu" and torch.cuda.is_available()
        dtype = {"auto": torch.bfloat16 if cuda else torch.float32, "float32": torch.float32,
                 "bfloat16": torch.bfloat16}[args.dtype]
        path = model_root(args) / "base" if args.model == "tiny" else args.model
        model, tokenizer, processor = load_base(path, dtype)
        structure = {k: getattr(args, k) for k in ("codes", "idm_layers", "policy_layers",
                                                   "no_projector")}
        structure["base"] = str(path)
        model = model.to("cuda" if cuda else "cpu")
        return cls(model, Encoder(tokenizer, processor, model.config), structure)

    def make(self, *names: str, seed: int = 0) -> "Agent":
        """Create untrained modules by name, initialised from `seed`, fp32, trainable."""
        n, config = self.structure, self.text_config
        makers = {
            "projector": lambda: Projector(self.width),
            "idm": lambda: CausalStack(config, n["idm_layers"], n["codes"]),
            # Code vectors of unit scale: at the usual 0.02 the merge can hardly see them.
            "codebook": lambda: nn.Embedding(n["codes"], self.width),
            "world": lambda: WorldModel(self.width, config.intermediate_size),
            "policy": lambda: CausalStack(config, n["policy_layers"], n["codes"])}
        for name in names:
            torch.manual_seed(key_seed(seed, name))
            setattr(self, name, makers[name]().to(self.device))
        return self

    def make_token_policy(self) -> "Agent":
        """The token-level baseline: its policy is a copy of the backbone's last layers."""
        self.space = "token"
        self.policy = CausalStack.from_backbone(self.backbone, min(
            self.structure["policy_layers"], self.text_config.num_hidden_layers))
        return self

    def load_run(self, folder: Path, skip: tuple[str, ...] = ()) -> "Agent":
        """Load what `folder` and its parents trained, the nearest last; frozen until asked for."""
        config, path = read_config(folder), Path(folder) / "model.safetensors"
        if config["parent"]:
            parent = Path(folder) / config["parent"]
            self.load_run(parent, skip)
            if file_hash(parent / "model.safetensors") != config["parent_hash"]:
                raise UserError(f"{folder}: was trained on an earlier {parent.name}, which has "
                                "been redone since; redo this run as well (--fresh)")
        if not path.exists():
            raise UserError(f"{folder}: is not a finished run (no model.safetensors)")
        if config["derived"]["base"] != self.base_hash:
            raise UserError(f"{folder}: was trained on another base model than --model "
                            f"{self.structure['base']}; redo it with --fresh or name its own base")
        try:
            state = load_file(path, device=str(self.device))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None
        if config["derived"].get("space") == "token" and self.space != "token":
            self.make_token_policy()
        for name in sorted({key.split(".")[0] for key in state} - set(skip)):
            part = {k[len(name) + 1:]: v for k, v in state.items() if k.startswith(name + ".")}
            if name != "backbone" and getattr(self, name, None) is None:
                self.make(name)
            module = getattr(self, name)
            own = module.state_dict()
            if any(k not in own or own[k].shape != v.shape for k, v in part.items()):
                wrong = next(k for k, v in part.items() if k not in own or own[k].shape != v.shape)
                raise UserError(f"{path}: {name}.{wrong} does not fit this base model, codebook or "
                                "layer count; name the run's own --model, --codes, --*-layers")
            module.load_state_dict(part, strict=False)
            module.requires_grad_(False)
        return self

    @classmethod
    def from_run(cls, folder: str | Path, device: str = "auto", dtype: str = "auto",
                 skip: tuple[str, ...] = ("idm",)) -> "Agent":
        """A trained agent from its run folder alone."""
        args = argparse.Namespace(**read_config(folder)["args"])
        args.device, args.dtype = device, dtype
        if args.model == "tiny":  # the base stands beside the run, wherever runs/ was moved to
            args.run_root = str(Path(folder).resolve().parent.parent)
        agent = cls.from_base(args).load_run(folder, skip).eval()
        agent.min_p = getattr(args, "min_p", 0.0)
        return agent

    @property
    def device(self) -> torch.device:
        return self.token_bias.device

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.dtype

    def autocast(self):
        """fp32 master weights computed in the backbone's dtype; a no-op in fp32."""
        return torch.autocast(self.device.type, dtype=self.dtype,
                              enabled=self.dtype != torch.float32)

    def train_only(self, *names: str) -> dict[str, nn.Module]:
        """Freeze everything but the named modules; returns them by name."""
        self.requires_grad_(False)
        modules = {name: getattr(self, name) for name in names}
        for module in modules.values():
            module.requires_grad_(True)
        return modules

    @property
    def layers(self):
        """The frozen layers: all, or in token space those below the policy's."""
        layers = self.backbone.model.language_model.layers
        return layers[:-len(self.policy.layers)] if self.space == "token" else layers

    def embed(self, batch: Batch) -> Tensor:
        """(B, T, d): token embeddings with the image features in their places."""
        x = self.backbone.model.language_model.embed_tokens(batch.ids)
        if batch.pixels is not None:
            features = self.backbone.model.get_image_features(
                pixel_values=batch.pixels, image_grid_thw=batch.grids)
            features = torch.cat(list(getattr(features, "pooler_output", features)))
            x = x.masked_scatter((batch.ids == self.encoder.image_token)[..., None],
                                 features.to(x.dtype))
        return x

    def trunk(self, x: Tensor, positions: Tensor, cache=None, mask=None) -> Tensor:
        """Embeddings -> what modules downstream read: e (normed), or in token space the input
        of the policy's first layer. (B, T, d) -> (B, T, d)."""
        text = self.backbone.model.language_model
        x = run_layers(self.layers, x, text.rotary_emb, positions, cache, mask)
        return x if self.space == "token" else text.norm(x)

    def embeddings(self, batch: Batch, cache=None) -> Tensor:
        """e^{V,T} of rows with an image and e^T of rows without, at their text tokens.

        Right-padded causal pass. Returns (B, M, d).
        """
        e = self.trunk(self.embed(batch), batch.positions, cache)
        return e.gather(1, batch.text_index[..., None].expand(-1, -1, e.shape[-1]))

    def text_embeddings(self, batch: Batch) -> Tensor:
        """e^T of every row: its text tokens alone, at plain text positions. (B, M, d)."""
        x = self.backbone.model.language_model.embed_tokens(batch.tokens)
        return self.trunk(x, text_positions(batch.tokens))

    def project(self, e: Tensor, has_image: Tensor) -> Tensor:
        """States from embeddings: e^{V,T} as it is, mu_P(e^T) for rows without an image.

        e (B, ..., d), has_image (B,) -> same shape and dtype."""
        if self.projector is None or self.structure["no_projector"]:
            return e
        has_image = has_image.view(-1, *[1] * (e.dim() - 1))
        with self.autocast():
            return torch.where(has_image, e, self.projector.P.mu(e).to(e.dtype))

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """The one function behind every module: states of text tokens (B, M, d), detached."""
        return self.project(self.embeddings(batch), batch.has_image)

    def idm_logits(self, states: Tensor) -> Tensor:
        """Code logits of inverse dynamics (B, M - 1, |C|): at t they have seen x_{t+1}."""
        return self.idm(states, text_positions(states))[:, 1:]

    def next_token_logits(self, states: Tensor, actions: Tensor) -> Tensor:
        """f_world(s, a) -> logits over the vocabulary, vision tokens masked.

        states (N, d), actions (N,) -> (N, vocab). Only ever called on single positions. With
        `min_p`, outside the paper, a code cannot choose a token whose probability under
        the backbone alone is below that share of its best token's."""
        x = self.world(states, self.codebook(actions)).to(states.dtype)
        logits = self.backbone.lm_head(x).float() + self.token_bias
        if self.min_p:
            own = self.backbone.lm_head(states).float() + self.token_bias
            logits = logits + min_p_bias(own, self.min_p)
        return logits

    def acting(self) -> "Agent":
        """A view of this agent whose trained modules are copies in the backbone's dtype: what
        rollouts run. Itself in fp32."""
        if self.dtype == torch.float32:
            return self
        actor = copy.copy(self)
        actor._modules = {name: module if name == "backbone" or module is None
                          else copy.deepcopy(module) for name, module in self._modules.items()}
        for name, module in actor._modules.items():
            for p in module.parameters() if module is not None and name != "backbone" else ():
                p.data = p.data.to(self.dtype)      # not the rotary frequencies, which stay fp32
        return actor

    def chat(self, message: str, image=None, system: str = "", history: list | None = None,
             temperature: float = 0.0, max_new_tokens: int = 256, seed: int = 0) -> str:
        """One answer to one message; `image` is a path or PIL image, `history` earlier turns."""
        messages = [{"role": "system", "content": system}] if system else []
        content = ("<image>" if image is not None else "") + message
        row = {"id": "chat", "messages": messages + (history or []) +
               [{"role": "user", "content": content}],
               "images": [image] if image is not None else []}
        return rollout(self, [self.encoder.encode(row, prompt=True)], 1, max_new_tokens,
                       temperature, [seed]).texts[0]


def text_positions(x: Tensor) -> Tensor:
    """Plain positions 0..M-1 of text tokens, x (B, M, ...) -> (B, M)."""
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)


# ---- Rollouts --------------------------------------------------------------------------------


@dataclass
class Rollout:
    """N = P prompts x G answers of at most T tokens, with all that an update needs.

    `inputs[:, t]` is what the policy read when it took action t (a state, or in token space the
    input of its first layer); `prompt` holds the inputs before the first answer's, padded.
    """
    texts: list[str]            # N decoded answers
    tokens: Tensor              # (N, T) x_{t+1} given action t
    actions: Tensor             # (N, T)
    logps: Tensor               # (N, T) log pi(a_t) at the sampling temperature and support
    mask: Tensor                # (N, T) bool: up to and including the end of turn
    finished: Tensor            # (N,) bool: ended its turn within max_new_tokens
    inputs: Tensor              # (N, T, d)
    positions: Tensor           # (3, N, T) of the inputs
    prompt: Tensor              # (P, L, d)
    prompt_positions: Tensor    # (3, P, L)
    prompt_mask: Tensor         # (P, L) bool: real, and before the first answer input
    group: int

    def select(self, prompts: list[int]) -> "Rollout":
        """The rollout of some of its prompts with all their answers."""
        p = torch.tensor(prompts, device=self.mask.device)
        n = (p[:, None] * self.group + torch.arange(self.group, device=p.device)).view(-1)
        return Rollout([self.texts[i] for i in n.tolist()], self.tokens[n], self.actions[n],
                       self.logps[n], self.mask[n], self.finished[n], self.inputs[n],
                       self.positions[:, n], self.prompt[p], self.prompt_positions[:, p],
                       self.prompt_mask[p], self.group)


def min_p_bias(logits: Tensor, min_p: float) -> Tensor:
    """0 for entries at least `min_p` times as likely as the best, else -inf: (N, n) -> (N, n)."""
    floor = logits.max(-1, keepdim=True).values + math.log(min_p)
    return torch.zeros_like(logits).masked_fill(logits < floor, float("-inf"))


def choose(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sample one action a row by inverse CDF, or the best at temperature 0.

    logits (N, n), uniform (N,) in [0, 1) -> actions (N,), their log-probs (N,). One number a
    token makes the draw the same for any batch split.
    """
    logps = F.log_softmax(logits.float() / (temperature or 1.0), -1)
    if temperature == 0:
        actions = logps.argmax(-1)
    else:
        cdf = logps.double().exp().cumsum(-1)
        actions = torch.searchsorted(cdf, (uniform.double()[:, None] * cdf[:, -1:]), right=True)
        actions = actions[:, 0].clamp(max=logits.shape[-1] - 1)
    return actions, logps.gather(1, actions[:, None])[:, 0]


@torch.no_grad()
def rollout(agent: Agent, prompts: list[Example], group: int, max_new_tokens: int,
            temperature: float = 1.0, seeds: list[int] | None = None,
            check_every: int = 4) -> Rollout:
    """Sample `group` answers to every prompt (section 3, RL): a_t ~ pi(. | s_1..s_t),
    x_{t+1} = argmax f_world(s_t, a_t), until the end of turn.

    Prompt and image are encoded once and the caches expanded to the group; prompts of different
    lengths stay exact because padded keys are masked and every position is explicit. `seeds`
    (one a prompt) fix the draws. Finished answers leave the batch every `check_every` tokens,
    which is also the only host sync. `temperature` 0 takes the best action.
    """
    actor, device = agent.acting(), agent.device
    batch = actor.encoder.collate(prompts).to(device)
    P, T = batch.ids.shape
    N = P * group
    token_space = actor.space == "token"
    uniform = torch.stack([torch.rand(group, max_new_tokens, generator=torch.Generator()
                                      .manual_seed(seed)) for seed in seeds or [0] * P])
    uniform = uniform.view(N, max_new_tokens).to(device)
    stop_ids = actor.encoder.stop_ids.to(device)

    # Prefill: the frozen trunk and the policy over each prompt, once.
    cache = KVCache(T)
    if token_space:
        prompt = actor.trunk(actor.embed(batch), batch.positions, cache)
        positions, lengths = batch.positions, batch.lengths
    else:
        prompt = actor.project(actor.embeddings(batch, cache), batch.has_image)
        positions, lengths = text_positions(prompt).expand(3, -1, -1), batch.text_lengths
    policy_cache = KVCache(prompt.shape[1])
    hidden = actor.policy.hidden(prompt, positions, policy_cache)
    rows = torch.arange(P, device=device)
    last = lengths - 1

    def grow(x):                                    # a prompt's tensor for each of its answers
        return x.repeat_interleave(group, 0)

    def key_mask(lengths, width):                   # (N, 1, 1, width + T) or None if unpadded
        if bool((lengths == width).all()):
            return None
        real = torch.arange(width, device=device) < lengths[:, None]
        real = F.pad(real, (0, max_new_tokens), value=True)
        return grow(real)[:, None, None]

    cache, mask = cache.expand(group, max_new_tokens), key_mask(batch.lengths, T)
    policy_cache = policy_cache.expand(group, max_new_tokens)
    policy_mask = key_mask(lengths, prompt.shape[1])
    s, h = grow(prompt[rows, last]), grow(hidden[rows, last])          # (N, d)
    after = batch.positions[:, rows, batch.lengths - 1].max(0).values + 1
    next_position = grow(after)                                        # (N,)
    policy_position = grow(positions[0, rows, last])                   # of the current input
    has_image = grow(batch.has_image)

    tokens = torch.full((N, max_new_tokens), actor.encoder.pad, device=device)
    actions, logps = torch.zeros_like(tokens), torch.zeros(N, max_new_tokens, device=device)
    inputs = prompt.new_zeros(N, max_new_tokens, prompt.shape[-1])
    stopped = torch.zeros(N, dtype=torch.bool, device=device)
    alive = torch.arange(N, device=device)          # rows of the outputs still running
    for t in range(max_new_tokens):
        logits = actor.policy.head(h).float()
        if token_space:
            logits = logits + actor.token_bias
            if actor.min_p:                         # evaluation only: train_rl.py refuses it
                logits = logits + min_p_bias(logits, actor.min_p)
        a, logp = choose(logits, uniform[alive, t], temperature)
        x = a if token_space else actor.next_token_logits(s, a).argmax(-1)
        tokens[alive, t], actions[alive, t], logps[alive, t], inputs[alive, t] = x, a, logp, s
        stopped[alive] |= torch.isin(x, stop_ids)
        if t + 1 == max_new_tokens:
            break
        if (t + 1) % check_every == 0:
            keep = (~stopped[alive]).nonzero()[:, 0]
            if len(keep) == 0:
                break
            if len(keep) < len(alive):
                alive, x, has_image = alive[keep], x[keep], has_image[keep]
                next_position, policy_position = next_position[keep], policy_position[keep]
                cache.keep(keep)
                policy_cache.keep(keep)
                mask = None if mask is None else mask[keep]
                policy_mask = None if policy_mask is None else policy_mask[keep]
        # The next state needs the token alone; earlier keys and values are in the cache.
        width = T + t + 1
        e = actor.trunk(actor.backbone.model.language_model.embed_tokens(x)[:, None],
                        (next_position + t)[:, None], cache,
                        None if mask is None else mask[..., :width])
        s = e if token_space else actor.project(e, has_image)
        where = next_position + t if token_space else policy_position + t + 1
        h = actor.policy.hidden(
            s, where[:, None], policy_cache,
            None if policy_mask is None else policy_mask[..., :prompt.shape[1] + t + 1])[:, 0]
        s = s[:, 0]

    ends = torch.isin(tokens, stop_ids)
    finished = ends.any(1)
    length = torch.where(finished, ends.int().argmax(1) + 1, max_new_tokens)
    n = int(length.max())
    step = torch.arange(max_new_tokens, device=device)
    answer_mask = step < length[:, None]
    # Position of input t: the last prompt token's, then the answer's own.
    first = grow(positions[:, rows, last].T).T                          # (3, N)
    later = grow(after) if token_space else first[0] + 1
    answer_positions = torch.cat([first[..., None], (later[:, None] + step[:-1])
                                  .expand(3, -1, -1)], -1)
    prompt_mask = torch.arange(prompt.shape[1], device=device) < last[:, None]
    texts = [actor.encoder.tokenizer.decode(row[m & ~e], skip_special_tokens=False)
             for row, m, e in zip(tokens.cpu(), answer_mask.cpu(), ends.cpu())]
    return Rollout(texts, tokens[:, :n], actions[:, :n], logps[:, :n], answer_mask[:, :n],
                   finished, inputs[:, :n], answer_positions[:, :, :n], prompt, positions,
                   prompt_mask, group)


def replay(policy: CausalStack, r: Rollout) -> Tensor:
    """The policy's normed hidden states at every answer position, from cached inputs (N, T, d).

    One pass over each prompt, with gradient if enabled; its keys and values are expanded to the
    group's answers. Equals the rollout's own incremental pass (tested).
    """
    cache = DynamicCache()
    run_layers(policy.layers, r.prompt, policy.rotary, r.prompt_positions, cache)
    cache.batch_repeat_interleave(r.group)
    T = r.inputs.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=r.inputs.device).tril()
    before = r.prompt_mask.repeat_interleave(r.group, 0)[:, None].expand(-1, T, -1)
    mask = torch.cat([before, causal.expand(len(before), -1, -1)], -1)[:, None]
    return policy.hidden(r.inputs, r.positions, cache, mask)
