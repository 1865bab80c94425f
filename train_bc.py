"""Stage 2: behaviour cloning of the policy, then the task warm start (SFT) that RL begins from.

Paper, section 3 (policy) and section 4 (training recipe).

    --stage bc    the policy pi(a_t | s_1..s_t) clones the IDM's noise-free argmax code, which has
                  seen x_{t+1}, on paired and text-only corpora: cross-entropy over |C| codes
    --stage sft   (default; runs bc first where it is missing) the demonstrations of the task
      --action-space latent   policy clones the IDM's codes of the demonstrations, and the merge
                              fits their tokens given those codes; the backbone stays frozen, so
                              the states stay what every module was trained on
      --sft release           the release's way: policy, codebook and merge frozen, the policy's
                              argmax code drives the world model while vision tower, last layers,
                              norm and embeddings of the backbone train (states move under it)
      --action-space token    the baseline: last layers, norm and an untied head of the backbone

Deviation: the first form of latent SFT is ours and the default. Losses on task rows count the
responses only; on corpora all text.

    python train_bc.py                                                   # CPU, embedded default
    python train_bc.py --stage bc --model Qwen/Qwen2.5-VL-3B-Instruct --paired mm.jsonl --text ...
    torchrun --nproc-per-node 8 train_bc.py --task my_task.jsonl --model ... --paired ... --text ...
"""

import argparse
import math
from pathlib import Path

import eval as tasks
import train_idm
from model import (Agent, Batch, Parser, Run, Stream, UserError, all_sum, cosine, folder_of,
                   key_seed, launch, optimizer_step, require, set_lr, task_tag,
                   text_positions, token_logprobs)
from train_projector import corpora, ensure_base, held_batches, next_batches

import torch
import torch.nn.functional as F
from torch import Tensor

# (tiny, full scale) of each kind of cloning; the full-scale ones are the release's.
SIZED = {kind: {"steps": steps, "lr": lr, "batch_tokens": (2048, 8192)} for kind, steps, lr in (
    ("bc", (200, 160), (1e-3, 1e-4)), ("clone", (40, 300), (2e-4, 5e-5)),
    ("release", (40, 300), (2e-4, 5e-5)), ("token", (40, 300), (1e-4, 5e-5)))}
TRAINED = {"bc": ["policy"], "clone": ["policy", "world"], "release": ["backbone"],
           "token": ["policy"]}


def kind_of(args) -> str:
    """Which row of SIZED and TRAINED the flags ask for."""
    return "bc" if args.stage == "bc" else "token" if args.action_space == "token" else args.sft


def arguments() -> Parser:
    parser = Parser(__doc__)
    parser.common_flags(**SIZED["clone"])
    parser.by_stage = lambda args: SIZED[kind_of(args)]
    tasks.task_flags(parser)
    parser.flag("--stage", "sft", "bc: corpora only; sft: then the task's demonstrations",
                choices=("bc", "sft"))
    parser.flag("--action-space", "latent", "what an action is", choices=("latent", "token"))
    parser.flag("--sft", "clone", "latent SFT: clone codes (ours) or the release's way",
                choices=("clone", "release"))
    parser.flag("--save-every", 100, "steps between checkpoints")
    return parser


@torch.no_grad()
def idm_codes(agent: Agent, states: Tensor, at: Tensor) -> Tensor:
    """The IDM's noise-free argmax codes at the labelled positions: (K,)."""
    with agent.autocast():
        return agent.idm_logits(states)[at].argmax(-1)


def cloning_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Cross-entropy of the policy to the IDM's codes, (K, |C|) and (K,) -> (K,)."""
    return F.cross_entropy(logits.float(), codes, reduction="none")


def batch_losses(agent: Agent, batch: Batch, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Per labelled position of one batch: code loss, token loss, and a hit (K,) each.

    kind: "bc" and "clone" clone codes ("clone" also fits the merge), "release" and "token" fit
    tokens. A hit is the IDM's code as argmax, or in the latter two a token of probability > 1/2.
    """
    at, targets = batch.labelled()
    with agent.autocast():
        if kind == "token":
            with torch.no_grad():
                x = agent.trunk(agent.embed(batch), batch.positions)
            h = agent.policy.hidden(x, batch.positions)
            h = h.gather(1, batch.text_index[..., None].expand(-1, -1, h.shape[-1]))[:, :-1][at]
            logps = token_logprobs(agent.policy.head, h, targets, agent.token_bias)
            return torch.zeros_like(logps), -logps, logps.detach() > math.log(0.5)
        if kind == "release":
            states = agent.project(agent.embeddings(batch), batch.has_image)
            with torch.no_grad():
                codes = agent.policy(states, text_positions(states))[:, :-1][at].argmax(-1)
            x = agent.world(states[:, :-1][at], agent.codebook(codes))
            logps = token_logprobs(agent.backbone.lm_head, x.to(states.dtype), targets)
            return torch.zeros_like(logps), -logps, logps.detach() > math.log(0.5)
        states = agent.states(batch)
        codes = idm_codes(agent, states, at)
        logits = agent.policy(states, text_positions(states))[:, :-1][at]
        code_loss = cloning_loss(logits, codes)
        token_loss = torch.zeros_like(code_loss)
        if kind == "clone":
            x = agent.world(states[:, :-1][at], agent.codebook(codes))
            token_loss = -token_logprobs(agent.backbone.lm_head, x.to(states.dtype), targets)
        return code_loss, token_loss, logits.argmax(-1) == codes


@torch.no_grad()
def bc_report(agent: Agent, held: dict[str, list], positions: int = 256) -> dict[str, dict]:
    """Held-out accuracy of the policy against the IDM's codes, and policy x world as a language
    model, -log sum_a pi(a|s) f_world(x|s, a), beside the base model, on up to `positions` tokens.
    """
    report, n = {}, agent.structure["codes"]
    for name, examples in held.items():
        parts = []
        for batch in held_batches(agent, examples):
            at, targets = batch.labelled()
            e = agent.embeddings(batch)
            states = agent.project(e, batch.has_image)
            with agent.autocast():
                logits = agent.policy(states, text_positions(states))[:, :-1][at].float()
            parts.append((e[:, :-1][at], states[:, :-1][at], logits,
                          idm_codes(agent, states, at), targets))
        e, s, logits, codes, x = map(torch.cat, zip(*parts))                  # (K, ...) each
        taken = logits.argmax(-1)
        some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        some = some[:positions].to(agent.device)
        e, s, x = e[some], s[some], x[some]
        with agent.autocast():
            given = torch.stack([token_logprobs(
                agent.backbone.lm_head,
                agent.world(s, agent.codebook.weight[a].expand_as(s)).to(s.dtype), x)
                for a in range(n)], -1)                                       # (positions, |C|)
        mixture = torch.logsumexp(F.log_softmax(logits[some], -1) + given, -1)
        base = token_logprobs(agent.backbone.lm_head, e, x)
        report[name] = {"accuracy": (taken == codes).float().mean().item(),
                        "policy x world": -mixture.mean().item(), "base": -base.mean().item(),
                        **tasks.code_usage(torch.bincount(taken, minlength=n))}
    return report


def folder(args, name: str = "") -> Path:
    """Where this kind of cloning is kept: bc/, sft-<task>-<space>/, sft-<task>-latent-release/."""
    kind = kind_of(args)
    space = {"bc": "", "clone": "latent", "release": "latent-release", "token": "token"}[kind]
    return folder_of(args, "bc" if kind == "bc" else f"sft-{task_tag(args.task)}-{space}", name)


def ensure(args, **wanted) -> Path:
    """The finished run that `wanted` (stage, action_space, sft) calls for."""
    other = argparse.Namespace(**{**vars(args), **wanted})
    return require(args, folder(other), "train_bc.py", main, arguments(), **wanted)


def main(args):
    kind = kind_of(args)
    if kind == "bc":
        parent = train_idm.ensure(args)
        args.task = args.task_root = None          # shared by all tasks
    elif kind == "token":
        if args.parent:
            raise UserError("--parent: the token baseline starts from the base alone")
        parent = None
        ensure_base(args)
    else:
        parent = ensure(args, stage="bc")
    if kind == "release":
        args.dtype = "float32"                     # the backbone itself trains
    agent = Agent.from_base(args)
    if parent:
        agent.load_run(parent)
    if kind == "token":
        agent.make_token_policy()
    elif kind == "bc":
        agent.make("policy", seed=args.seed)
    run = Run(args, folder(args, args.name), "train_bc.py", parent, space=agent.space,
              base=agent.base_hash, mini=tasks.mini_hash(),
              task_hash=None if kind == "bc" else tasks.task_hash(args))
    if run.finished:
        return
    if kind == "bc":
        streams, held = corpora(args, agent.encoder)
    else:
        task = tasks.load_task(args)
        if not task.splits["sft"]:
            raise UserError(f"--task {args.task}: no demonstrations (split sft) to warm start on")
        streams = {"sft": Stream(task.splits["sft"], agent.encoder, args.batch_tokens,
                                 key_seed(args.seed, "sft"), max_tokens=4096,
                                 responses_only=True)}
    modules = agent.train_only(*TRAINED[kind])
    if kind == "release":
        freeze_lower(agent, args.policy_layers)
    params = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, weight_decay=0.0)
    for step in run.steps(args.steps, modules, [optimizer], streams):
        batches, row_ids = next_batches(agent, streams, ("paired", "text", "sft"))
        count = all_sum(torch.tensor(sum(int(b.targets.sum()) for b in batches)))
        count = count.clamp(min=1).item()
        total = torch.zeros(3, dtype=torch.double)
        for batch in batches:
            code_loss, token_loss, hits = batch_losses(agent, batch, kind)
            ((code_loss + token_loss).sum() / count).backward()
            total += torch.stack([code_loss.sum(), token_loss.sum(), hits.sum()]).detach().cpu()
        lr = args.lr * cosine(step, args.steps, warmup=0.03)
        set_lr(optimizer, lr)
        norm = optimizer_step(run, [optimizer], row_ids)
        code_ce, token_ce, accuracy = (all_sum(total) / count).tolist()
        run.log({"step": step, "code_ce": code_ce, "token_ce": token_ce, "accuracy": accuracy,
                 "lr": lr, "grad_norm": norm},
                f"code {code_ce:.3f} token {token_ce:.3f} hits {accuracy:.2f}")
    if kind == "bc":
        run.report("policy, held out", bc_report(agent, held))
    elif task.splits["valid"]:
        table, samples = tasks.evaluate(agent.eval(), task, {"valid": task.splits["valid"]},
                                        seed=args.seed)
        run.report("reward, validation prompts", table)
        run.sample(samples[:20])
    run.finish(modules)


def freeze_lower(agent: Agent, n_layers: int):
    """The release's SFT: vision tower, last layers, norm and embeddings train, nothing else."""
    model = agent.backbone.model
    agent.backbone.requires_grad_(False)
    for part in (model.visual, model.language_model.layers[-n_layers:], model.language_model.norm,
                 model.language_model.embed_tokens):
        part.requires_grad_(True)


if __name__ == "__main__":
    launch(main, arguments())
