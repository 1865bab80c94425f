"""Stage 2: behaviour cloning of the policy, then the task warm start (SFT) that RL begins from.

Paper, section 3 (policy) and section 4 (training recipe):

    --stage bc     the policy pi(a_t | s_1..s_t) clones the inverse dynamics model's noise-free
                   argmax code, which has seen x_{t+1}, on paired and text-only corpora:
                       L_BC = CE(argmax_a IDM(s_1..s_{t+1}); pi(. | s_1..s_t))
    (SFT)          L_BC on the task's demonstrations; backbone and world model stay frozen
    --sft release  the release's SFT: policy, codebook and merge frozen, the policy's argmax code
                   drives the world model while vision tower, last layers, norm and embeddings of
                   the backbone train
    --action-space token   the baseline's SFT: the backbone's last layers, norm and untied head

Deviations: (1) latent SFT clones codes, so that states and codes keep what text-only rows taught;
(2) demonstrations are whole dialogues (release: a row a turn); (3) SFT counts the responses only,
but for --sft release; (4) cloning weighs paired and text-only rows by their tokens; (5) the
token baseline leaves vision tower and embeddings frozen.

    python train_bc.py                                                   # CPU, embedded default
    python train_bc.py --stage bc --model Qwen/Qwen2.5-VL-3B-Instruct --paired mm.jsonl --text ...
    torchrun --nproc-per-node 8 train_bc.py --task my_task.jsonl --model ... --paired ... --text ...
"""

import argparse
import sys

import train_idm
import train_projector
from eval import choose_splits, evaluate, load_task, task_data, task_flags, without_dimensions
from model import (Agent, Batch, Rows, Run, Stream, UserError, all_sum, code_usage, cosine, fill,
                   folder_of, key_seed, launch, make_parser, micro_batches, next_batches,
                   optimizer_step, predecessor, text_positions, token_counts, token_logprobs)
from train_projector import corpora, data_of, ensure_base

import torch
import torch.nn.functional as F
from torch import Tensor

SFT = {"tiny": {"steps": 40, "lr": 2e-4, "batch_tokens": 2048},
       "full": {"steps": 300, "lr": 5e-5, "batch_tokens": 8192}}
DEFAULTS = {   # the full-scale learning rates are the release's
    "bc": {"tiny": {"steps": 300, "lr": 1e-3, "batch_tokens": 1024},
           "full": {"steps": 160, "lr": 1e-4, "batch_tokens": 8192}},
    "latent": SFT, "token": {**SFT, "tiny": {**SFT["tiny"], "lr": 1e-4}}}
REPORTED = 2 ** 15     # pairs of a token and a code that the report asks the world model for


def arguments() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, DEFAULTS)
    task_flags(parser)
    add = parser.add_argument_group("this stage").add_argument
    add("--stage", default="sft", choices=("bc", "sft"), help="corpora or task (default: sft)")
    add("--action-space", default="latent", choices=("latent", "token"), help="(default: latent)")
    add("--sft", default="clone", choices=("clone", "release"), help="latent (default: clone)")
    return parser


# ---- Losses over the K positions whose next token counts: (loss, hit), (K,) each --------------


def cloning_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """L_BC: cross-entropy of the policy to the IDM's codes, (K, |C|) and (K,) -> (K,)."""
    return F.cross_entropy(logits.float(), codes, reduction="none")


@torch.no_grad()
def codes_to_clone(agent: Agent, batch: Batch, states: Tensor) -> Tensor:
    """What the policy clones from states (B, M, d): the IDM's noise-free argmax codes, (K,), or
    --without codebook the next token's rank among the |C| likeliest."""
    if "codebook" in agent.structure["without"]:
        return next_among_likeliest(agent, batch, states).int().argmax(-1)
    return agent.idm_logits(states)[batch.labelled()[0]].argmax(-1)


def code_losses(agent: Agent, batch: Batch) -> tuple[Tensor, Tensor]:
    """L_BC. A hit: the policy's likeliest code is the one to clone."""
    where, _ = batch.labelled()
    states = agent.states(batch)                                              # (B, M, d)
    codes = codes_to_clone(agent, batch, states)                              # (K,)
    logits = agent.policy(states, text_positions(states))[:, :-1][where]      # (K, |C|)
    return cloning_loss(logits, codes), logits.argmax(-1) == codes


def release_losses(agent: Agent, batch: Batch) -> tuple[Tensor, Tensor]:
    """The release's SFT: cross-entropy of f_world under the policy's argmax codes, whose gradient
    passes through the frozen merge and projector into the states. A hit: the next token has a
    probability above 1/2, without a second pass over the vocabulary."""
    where, targets = batch.labelled()
    # Not agent.states: those are detached.
    states = agent.project(agent.embeddings(batch), batch.has_image)
    with torch.no_grad():
        codes = agent.policy(states, text_positions(states))[:, :-1][where].argmax(-1)
    logps = agent.world_logprobs(states[:, :-1][where], agent.codebook(codes), targets)
    return -logps, logps.detach().exp() > 0.5


def token_losses(agent: Agent, batch: Batch) -> tuple[Tensor, Tensor]:
    """The token baseline's SFT: the language model's cross-entropy, vision tokens masked. A hit as
    in `release_losses`."""
    where, targets = batch.labelled()
    with torch.no_grad():
        x = agent.trunk(agent.embed(batch), batch.positions)
    h = agent.at_text(agent.policy.hidden(x, batch.positions), batch)[:, :-1][where]
    logps = token_logprobs(agent.policy.head, h, targets, agent.token_bias)
    return -logps, logps.detach().exp() > 0.5


# ---- The control without a codebook: an action is one of the |C| likeliest next tokens ---------


def next_among_likeliest(agent: Agent, batch: Batch, states: Tensor) -> Tensor:
    """Which of the |C| likeliest tokens is the next one: (K, |C|) bool, a row without any where the
    next token is not among them."""
    where, targets = batch.labelled()
    return agent.likeliest(states[:, :-1][where]) == targets[:, None]


def keep_reachable(agent: Agent, batch: Batch):
    """Clone only where the next token is among the |C| likeliest: no action says another. Changes
    `batch.predicts` in place."""
    reachable = next_among_likeliest(agent, batch, agent.states(batch)).any(-1)     # (K,)
    where, _ = batch.labelled()                     # a view of `predicts`
    where[where.clone()] = reachable


# ---- The stage --------------------------------------------------------------------------------


def train_last_layers(agent: Agent):
    """The release's SFT: vision tower, last layers, norm and embeddings train, nothing else."""
    model = agent.backbone.model
    last = model.language_model.layers[-agent.structure["policy_layers"]:]
    agent.backbone.requires_grad_(False)
    for part in (model.visual, last, model.language_model.norm, model.language_model.embed_tokens):
        part.requires_grad_(True)


@torch.no_grad()
def bc_report(agent: Agent, held: dict[str, list], tokens_at_once: int) -> dict[str, dict]:
    """On held-out rows: the policy's accuracy against the codes to clone; and on REPORTED / |C| of
    their tokens the mean -log sum_a pi(a|s) f_world(x|s, a), policy x world as a language model,
    beside the base model's -log p(x)."""
    report, n_codes = {}, agent.structure["codes"]
    no_codebook = "codebook" in agent.structure["without"]
    for name, examples in held.items():
        parts = []
        for batch in micro_batches(agent, examples, tokens_at_once):
            if no_codebook:
                keep_reachable(agent, batch)
            where, targets = batch.labelled()
            e = agent.embeddings(batch)
            states = agent.project(e, batch.has_image)
            with agent.autocast():
                logits = agent.policy(states, text_positions(states))[:, :-1][where].float()
                codes = codes_to_clone(agent, batch, states)
            parts.append((e[:, :-1][where], states[:, :-1][where], logits, codes, targets))
        e, s, logits, codes, x = map(torch.cat, zip(*parts))  # (K, d) twice, (K, |C|), (K,) twice
        best = logits.argmax(-1)
        report[name] = {"accuracy": (best == codes).float().mean().item()}
        if no_codebook:                             # there is no world model either
            continue
        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        chosen = chosen[:max(1, REPORTED // n_codes)].to(agent.device)
        mixture = F.log_softmax(logits[chosen], -1)                           # (tokens, |C|)
        for code, c in enumerate(agent.codebook.weight):
            mixture[:, code] += agent.world_logprobs(s[chosen], c.expand_as(s[chosen]), x[chosen])
        base = token_logprobs(agent.backbone.lm_head, e[chosen], x[chosen], agent.token_bias)
        report[name] |= {"policy x world": -torch.logsumexp(mixture, -1).mean().item(),
                         "base": -base.mean().item(),
                         **code_usage(torch.bincount(best, minlength=n_codes))}
    return report


def main(argv=None):
    args = arguments().parse_args(argv)
    token, bc = args.action_space == "token", args.stage == "bc"
    release, no_codebook = args.sft == "release", "codebook" in args.without and not token
    fill(args, DEFAULTS["bc" if bc else args.action_space])
    if token and bc:
        raise UserError("--stage bc clones codes; the token baseline starts with its SFT")
    if release and (token or bc or no_codebook):
        raise UserError("--sft release is a latent warm start on a task, with a codebook")
    if no_codebook and "projector" in args.without:
        raise UserError("--without codebook starts from the projector: not --without projector too")
    data, parent, task = data_of(args), None, None
    if not bc:                                      # what is wrong with the task comes first
        task, data = load_task(args), data | task_data(args)
        if not task.splits["sft"]:
            raise UserError(f"--task {args.task}: no demonstrations (split sft) to warm start on")
    ensure_base(args)
    if token:
        if args.parent:
            raise UserError("--parent: the token baseline starts from the base alone")
        agent = Agent.from_base(args).make_token_policy()
        losses, stage = token_losses, f"sft-{task.name}-token"
    elif bc:
        before = ("projector", train_projector) if no_codebook else ("idm", train_idm)
        parent = predecessor(args, data, *before)
        agent = Agent.from_base(args).load_run(parent).make("policy", seed=args.seed)
        if agent.idm is None and not no_codebook:
            raise UserError(f"{parent} has no inverse dynamics; name an idm run")
        losses, stage = code_losses, "bc"
    else:
        parent = predecessor(args, data, "bc", sys.modules[__name__], "--stage", "bc")
        losses, stage, dtype = code_losses, f"sft-{task.name}-latent", None
        if release:                                 # the backbone itself trains: fp32
            losses, stage, dtype = release_losses, f"{stage}-release", torch.float32
        agent = Agent.from_base(args, dtype).load_run(parent)
        if agent.policy is None or agent.space != "latent":
            raise UserError(f"{parent} has no policy in latent space; name a bc or sft-* run")
    if task:
        task.check(agent.encoder)
    run = Run(args, folder_of(args, stage, args.name), agent, data, parent)
    if run.finished:
        return
    if bc:
        streams, held = corpora(args, agent.encoder)
    else:
        # The release's way fits all text of a dialogue, the others the answers alone.
        streams = {"sft": Stream(Rows([task.splits["sft"]]), agent.encoder, args.batch_tokens,
                                 key_seed(args.seed, "sft"), max_tokens=4096,
                                 responses_only=not release, strict=True)}
    modules = agent.train_only("backbone" if release else "policy")
    if release:
        train_last_layers(agent)
    trainable = [p for p in agent.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, weight_decay=0.0)
    state = {**modules, **streams, "optimizer": optimizer}
    for step in range(run.resume(state), args.steps):
        batches, row_ids = next_batches(agent, streams, streams.keys(), args.tokens_at_once)
        if no_codebook:
            for batch in batches:
                keep_reachable(agent, batch)
        # K of the global batch, over all ranks and micro-batches, before any backward.
        n = token_counts({"n": [batch.predicts for batch in batches]})["n"]
        totals = {"ce": 0.0, "accuracy": 0.0}
        for batch in batches:
            with agent.autocast():
                loss, hits = losses(agent, batch)
            (loss.sum() / n).backward()
            totals["ce"] += loss.detach().sum()
            totals["accuracy"] += hits.sum()
        lr = args.lr * cosine(step, args.steps, warmup=0.03)
        norm = optimizer_step(run, [optimizer], [lr], row_ids)
        figures = {name: total / n for name, total in all_sum(totals).items()}
        run.log(step, {**figures, "lr": lr, "grad_norm": norm}, "ce", "accuracy")
        run.save(step + 1, state)
    if bc:
        run.report("policy, held out", bc_report(agent, held, args.tokens_at_once))
    elif splits := choose_splits(task, ["valid"], args.eval_prompts):
        table, samples = evaluate(agent.eval(), task, splits, args.seed, args.tokens_at_once)
        run.report("reward, validation prompts", without_dimensions(task, table))
        run.append("samples.jsonl", samples[:20])
    run.finish(**modules)


if __name__ == "__main__":
    launch(main)
