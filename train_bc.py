"""Stage 2: behaviour cloning of the policy, then the task warm start (SFT) that RL begins from.

Paper, section 3 (policy) and section 4 (training recipe). Five kinds, the rows of KINDS:

    bc        --stage bc: the policy pi(a_t | s_1..s_t) clones the inverse dynamics model's
              noise-free argmax code, which has seen x_{t+1}, on paired and text-only corpora:
                  L_BC = CE(argmax_a IDM(s_1..s_{t+1}); pi(. | s_1..s_t))
    clone     latent SFT, ours and the default: L_BC on the task's demonstrations; backbone and
              world model stay frozen, so states and codes keep what text-only rows taught
    release   --sft release: policy, codebook and merge frozen, the policy's argmax code drives the
              world model while vision tower, last layers, norm and embeddings of the backbone train
    token     --action-space token, the baseline: the backbone's last layers, norm and untied head
    lm        --action-space token --stage bc: these as a language model on the corpora that the
              latent stages see, so that the baseline can be given the same data (--parent)

Losses on task rows count the responses only; on corpora all text. Deviations: README, 10-13, 20.

    python train_bc.py                                                   # CPU, embedded default
    python train_bc.py --stage bc --model Qwen/Qwen2.5-VL-3B-Instruct --paired mm.jsonl --text ...
    torchrun --nproc-per-node 8 train_bc.py --task my_task.jsonl --model ... --paired ... --text ...
"""

import argparse
import sys

import eval as tasks
import train_idm
from model import (Agent, Batch, Run, Stream, UserError, all_sum, corpora, cosine, fill,
                   folder_of, key_seed, launch, make_parser, micro_batches, next_batches,
                   optimizer_step, predecessor, read_config, say, text_positions, token_counts,
                   token_logprobs)
from train_projector import ensure_base

import torch
import torch.nn.functional as F
from torch import Tensor

LATENT_SFT = {"tiny": {"steps": 40, "lr": 2e-4, "batch_tokens": 2048},
              "full": {"steps": 300, "lr": 5e-5, "batch_tokens": 8192}}
DEFAULTS = {   # the full-scale learning rates are the release's
    "bc": {"tiny": {"steps": 300, "lr": 1e-3, "batch_tokens": 1024},
           "full": {"steps": 160, "lr": 1e-4, "batch_tokens": 8192}},
    "lm": {"tiny": {"steps": 700, "lr": 2e-4, "batch_tokens": 1024},    # as many as idm and bc
           "full": {"steps": 320, "lr": 5e-5, "batch_tokens": 8192}},
    "clone": LATENT_SFT, "release": LATENT_SFT,
    "token": {"tiny": {"steps": 40, "lr": 1e-4, "batch_tokens": 2048},
              "full": {"steps": 300, "lr": 5e-5, "batch_tokens": 8192}}}
REPORTED = 2 ** 15     # pairs of a token and a code that the report asks the world model for


def arguments() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, DEFAULTS)
    tasks.task_flags(parser)
    add = parser.add_argument_group("this stage").add_argument
    add("--stage", default="sft", choices=("bc", "sft"),
        help="bc: corpora only; sft: then the task's demonstrations (default: sft)")
    add("--action-space", default="latent", choices=("latent", "token"), help="(default: latent)")
    add("--sft", default="clone", choices=("clone", "release"),
        help="latent SFT: clone codes (ours) or the release's way (default: clone)")
    return parser


# ---- Losses, per labelled position: (loss, hit), (K,) each -----------------------------------


def cloning_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """L_BC: cross-entropy of the policy to the IDM's codes, (K, |C|) and (K,) -> (K,)."""
    return F.cross_entropy(logits.float(), codes, reduction="none")


def code_losses(agent: Agent, batch: Batch) -> tuple[Tensor, Tensor]:
    """Kinds bc and clone, B rows -> (K,) each. A hit is the IDM's noise-free argmax code as the
    policy's argmax."""
    where, _ = batch.labelled()
    states = agent.states(batch)
    with torch.no_grad():
        codes = agent.idm_logits(states)[where].argmax(-1)                    # (K,)
    logits = agent.policy(states, text_positions(states))[:, :-1][where]
    return cloning_loss(logits, codes), logits.argmax(-1) == codes


def release_losses(agent: Agent, batch: Batch) -> tuple[Tensor, Tensor]:
    """Kind release, B rows -> (K,) each: the gradient passes through frozen merge and projector
    into the states. A hit is a token of probability above 1/2, here and in `token_losses`."""
    where, targets = batch.labelled()
    states = agent.project(agent.embeddings(batch), batch.has_image)
    with torch.no_grad():
        codes = agent.policy(states, text_positions(states))[:, :-1][where].argmax(-1)
    logps = agent.world_logprobs(states[:, :-1][where], agent.codebook(codes), targets)
    return -logps, logps.detach().exp() > 0.5


def token_losses(agent: Agent, batch: Batch) -> tuple[Tensor, Tensor]:
    """Kinds token and lm, B rows -> (K,) each: the language model's own cross-entropy under the
    masked vocabulary."""
    where, targets = batch.labelled()
    with torch.no_grad():
        x = agent.trunk(agent.embed(batch), batch.positions)
    h = agent.policy.hidden(x, batch.positions)
    h = h.gather(1, batch.text_index[..., None].expand(-1, -1, h.shape[-1]))[:, :-1][where]
    logps = token_logprobs(agent.policy.head, h, targets, agent.token_bias)
    return -logps, logps.detach().exp() > 0.5


KINDS = {   # folder, what trains, loss
    "bc": ("bc", ("policy",), code_losses),
    "clone": ("sft-{task.name}-latent", ("policy",), code_losses),
    "release": ("sft-{task.name}-latent-release", ("backbone",), release_losses),
    "token": ("sft-{task.name}-token", ("policy",), token_losses),
    "lm": ("bc-token", ("policy",), token_losses)}


def train_last_layers(agent: Agent, n_layers: int):
    """The release's SFT: vision tower, last layers, norm and embeddings train, nothing else."""
    model = agent.backbone.model
    agent.backbone.requires_grad_(False)
    for part in (model.visual, model.language_model.layers[-n_layers:], model.language_model.norm,
                 model.language_model.embed_tokens):
        part.requires_grad_(True)


@torch.no_grad()
def bc_report(agent: Agent, held: dict[str, list], tokens_at_once: int) -> dict[str, dict]:
    """Held-out accuracy of the policy against the IDM's codes, and policy x world as a language
    model, -log sum_a pi(a|s) f_world(x|s, a), beside the base model, on REPORTED / |C| tokens."""
    report, n, head = {}, agent.structure["codes"], agent.backbone.lm_head
    for name, examples in held.items():
        parts = []
        for batch in micro_batches(agent, examples, tokens_at_once):
            where, targets = batch.labelled()
            e = agent.embeddings(batch)
            states = agent.project(e, batch.has_image)
            with agent.autocast():
                logits = agent.policy(states, text_positions(states))[:, :-1][where].float()
                codes = agent.idm_logits(states)[where].argmax(-1)
            parts.append((e[:, :-1][where], states[:, :-1][where], logits, codes, targets))
        e, s, logits, codes, x = map(torch.cat, zip(*parts))                  # (K, ...) each
        taken = logits.argmax(-1)
        some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        some = some[:max(1, REPORTED // n)]
        e, s, x, logits = (part[some.to(agent.device)] for part in (e, s, x, logits))
        given_code = torch.stack([agent.world_logprobs(s, c.expand_as(s), x)
                                  for c in agent.codebook.weight], -1)        # (tokens, |C|)
        mixture = torch.logsumexp(F.log_softmax(logits, -1) + given_code, -1)
        report[name] = {"accuracy": (taken == codes).float().mean().item(),
                        "policy x world": -mixture.mean().item(),
                        "base": -token_logprobs(head, e, x, agent.token_bias).mean().item(),
                        **tasks.code_usage(torch.bincount(taken, minlength=n))}
    return report


@torch.no_grad()
def lm_report(agent: Agent, held: dict[str, list], tokens_at_once: int) -> dict[str, dict]:
    """Held-out cross-entropy of the token policy as a language model, beside the base's."""
    report, base = {}, agent.with_policy(None).make_token_policy()
    for name, examples in held.items():
        batches = list(micro_batches(agent, examples, tokens_at_once))
        with agent.autocast():
            report[name] = {label: torch.cat([token_losses(one, batch)[0] for batch in batches])
                            .mean().item() for label, one in (("policy", agent), ("base", base))}
    return report


def main(argv=None):
    args = arguments().parse_args(argv)
    token, on_corpora = args.action_space == "token", args.stage == "bc"
    kind = {("latent", "bc"): "bc", ("latent", "sft"): args.sft,
            ("token", "bc"): "lm", ("token", "sft"): "token"}[args.action_space, args.stage]
    fill(args, DEFAULTS[kind])
    stage, trains, losses = KINDS[kind]
    task = None if on_corpora else tasks.load_task(args)        # what is wrong with it comes first
    identity = tasks.identity(args, "paired", "text", *([] if on_corpora else ["task"]))
    if task and not task.splits["sft"]:
        raise UserError(f"--task {args.task}: no demonstrations (split sft) to warm start on")
    ensure_base(args)
    parent = None
    if not token:
        parent = predecessor(args, identity, "idm", train_idm) if on_corpora else predecessor(
            args, identity, "bc", sys.modules[__name__], "--stage", "bc")
    elif args.parent:
        parent = predecessor(args, identity, "bc-token", sys.modules[__name__])
        config = read_config(parent)
        if kind == "lm" or config["space"] != "token" or "task" in config["identity"]:
            raise UserError("--parent: the token baseline starts from the base alone, or its warm "
                            "start from a bc-token run (--stage bc --action-space token)")
    # In the release's way the backbone itself trains: fp32.
    agent = Agent.from_base(args, torch.float32 if kind == "release" else None)
    if parent:
        agent.load_run(parent)
    if kind == "bc":
        agent.make("policy", seed=args.seed)
    if token and not parent:
        agent.make_token_policy()
    run = Run(args, folder_of(args, stage.format(task=task), args.name), agent, identity, parent)
    if run.finished:
        return
    if on_corpora:
        streams, held = corpora(args, agent.encoder, tasks.embedded)
    else:
        streams = {"sft": Stream(task.splits["sft"], agent.encoder, args.batch_tokens,
                                 key_seed(args.seed, "sft"), max_tokens=4096,
                                 responses_only=True)}
    modules = agent.train_only(*trains)
    if kind == "release":
        train_last_layers(agent, args.policy_layers)
    params = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, weight_decay=0.0)
    state = {**modules, **streams, "optimizer": optimizer}
    for step in range(run.resume(state), args.steps):
        batches, row_ids = next_batches(agent, streams, streams, args.tokens_at_once)
        n = token_counts({"n": [batch.predicts for batch in batches]})["n"]
        totals = {"ce": 0.0, "accuracy": 0.0}
        for batch in batches:
            with agent.autocast():
                loss, hits = losses(agent, batch)
            (loss.sum() / n).backward()
            totals = {"ce": totals["ce"] + loss.detach().sum(),
                      "accuracy": totals["accuracy"] + hits.sum()}
        lr = args.lr * cosine(step, args.steps, warmup=0.03)
        norm = optimizer_step(run, [optimizer], [lr], row_ids)
        run.log(step, {**{name: total / n for name, total in all_sum(totals).items()}, "lr": lr,
                       "grad_norm": norm}, "ce", "accuracy")
        run.save(step + 1, state)
    if on_corpora:
        report = lm_report if token else bc_report
        run.report("policy, held out", report(agent, held, args.tokens_at_once))
    elif splits := tasks.chosen_splits(task, ["valid"], args.eval_prompts):
        say(f"answers to be judged: {tasks.n_answers(splits, tasks.MODES)}")
        table, samples = tasks.evaluate(agent.eval(), task, splits, args.seed, args.tokens_at_once)
        run.report("reward, validation prompts", tasks.without_dimensions(task, table))
        run.append("samples.jsonl", samples[:20])
    run.finish(**modules)


if __name__ == "__main__":
    launch(main)
