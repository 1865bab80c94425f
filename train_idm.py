"""Stage 1b: the inverse dynamics model, the codebook and the language world model.

Paper, section 3 (latent action space). From consecutive states the inverse dynamics model infers
which of |C| codes led from token to token; the world model must predict the next token from the
current state and that code, so the code has to carry what the state leaves open:

    a_t ~ GumbelSoftmax(IDM(s_1..s_{t+1})),  c_t = C[a_t]            (straight-through, tau = 2)
    L_inverse = CE(x_{t+1}; f_world(s_t, c_t)), paired + text-only, + 1e-3 sum_k p_k log p_k

L_inverse trains IDM, codebook and merge. P and P' go on training beside it with their own
optimiser and losses (train_projector.py); states enter L_inverse detached, so it never reaches P.

Deviations: unit weights for the projector's losses (the release multiplies by 1e-5 what it sums
over d); noise keyed by step, row and position, so no split changes it; the merge is evaluated on
labelled positions only.

    python train_idm.py                                                  # CPU, embedded default
    python train_idm.py --model Qwen/Qwen2.5-VL-3B-Instruct --paired mm.jsonl --text t.jsonl
    torchrun --nproc-per-node 8 train_idm.py --model ... --paired ... --text ...
"""

from pathlib import Path

import eval as tasks
import train_projector
from model import (Agent, Batch, Parser, Run, all_sum, cosine, folder_of, keyed_gumbel, launch,
                   optimizer_step, require, say, set_lr, token_logprobs)
from train_projector import (corpora, ensure_base, held_batches, next_batches, projector_counts,
                             projector_losses, projector_report)

import torch
import torch.nn.functional as F
from torch import Tensor

TAU = 2.0              # temperature of the Gumbel-softmax
ENTROPY = 1e-3         # weight of the per-token entropy bonus
WINDOW = 0.95          # decay of the running histogram of codes that usage is read from


def arguments() -> Parser:
    parser = Parser(__doc__)
    parser.common_flags(steps=(250, 160), lr=(1e-3, 1e-4), batch_tokens=(2048, 8192))
    parser.flag("--paired-steps", 0, "steps on paired rows alone before text-only rows join")
    parser.flag("--save-every", 100, "steps between checkpoints")
    return parser


def straight_through(logits: Tensor, noise: Tensor, tau: float = TAU) -> Tensor:
    """Hard one-hot of argmax(logits + noise) with the gradient of softmax((logits + noise)/tau).

    logits, noise (K, |C|) -> (K, |C|) (Gumbel-softmax, Jang et al. 2017)."""
    soft = F.softmax((logits + noise) / tau, -1)
    hard = F.one_hot(soft.argmax(-1), logits.shape[-1]).to(soft.dtype)
    return hard + soft - soft.detach()


def negative_entropy(logits: Tensor) -> Tensor:
    """sum_k p_k log p_k of the noise-free code distribution per token: (K, |C|) -> (K,)."""
    logps = F.log_softmax(logits.float(), -1)
    return (logps.exp() * logps).sum(-1)


def inverse_losses(agent: Agent, batch: Batch, states: Tensor, noise: Tensor) -> tuple:
    """Per labelled position: cross-entropy of x_{t+1}, sum_k p log p, and the code, (K,) each.

    states (B, M, d) detached; noise (B, M, |C|) Gumbel.
    """
    at, targets = batch.labelled()
    with agent.autocast():
        logits = agent.idm_logits(states)[at].float()                       # (K, |C|)
        choice = straight_through(logits, noise[:, :-1][at])
        x = agent.world(states[:, :-1][at], choice @ agent.codebook.weight)  # (K, d)
        logps = token_logprobs(agent.backbone.lm_head, x.to(states.dtype), targets)
    return -logps, negative_entropy(logits), choice.argmax(-1).detach()


@torch.no_grad()
def idm_report(agent: Agent, held: dict[str, list]) -> dict[str, dict]:
    """Held-out cross-entropy of x_{t+1} given the IDM's noise-free code, beside the backbone's
    own, shuffled codes' and random codes'; codes in use, marginal perplexity, and code use of
    text-only rows without the projector ("text, no P": coverage)."""
    report, n, head = {}, agent.structure["codes"], agent.backbone.lm_head
    labels = {name: name for name in held}
    if "text" in held and agent.projector is not None:
        labels["text, no P"] = "text"
    for label, name in labels.items():
        parts = []
        for batch in held_batches(agent, held[name]):
            at, targets = batch.labelled()
            e = agent.embeddings(batch)
            states = e if label != name else agent.project(e, batch.has_image)
            with agent.autocast():
                codes = agent.idm_logits(states)[at].argmax(-1)
            parts.append((e[:, :-1][at], states[:, :-1][at], codes, targets))
        e, s, codes, targets = map(torch.cat, zip(*parts))                    # (K, ...) each
        generator = torch.Generator().manual_seed(0)
        shuffle, guess = torch.randperm(len(codes), generator=generator), \
            torch.randint(n, codes.shape, generator=generator)

        def ce(given):
            with agent.autocast():
                x = agent.world(s, agent.codebook(given.to(s.device))).to(s.dtype)
                return -token_logprobs(head, x, targets).mean().item()
        report[label] = {
            "IDM": ce(codes), "shuffled": ce(codes[shuffle.to(s.device)]), "random": ce(guess),
            "backbone": -token_logprobs(head, e, targets).mean().item(),
            **tasks.code_usage(torch.bincount(codes, minlength=n))}
    return report


def ensure(args) -> Path:
    """The finished IDM run that `args` calls for."""
    return require(args, folder_of(args, "idm"), "train_idm.py", main, arguments())


def main(args):
    if args.no_projector:
        ensure_base(args)
    parent = None if args.no_projector else train_projector.ensure(args)
    agent = Agent.from_base(args).make("idm", "codebook", "world", seed=args.seed)
    if parent:
        agent.load_run(parent)
    run = Run(args, folder_of(args, "idm", args.name), "train_idm.py", parent, base=agent.base_hash,
              mini=tasks.mini_hash())
    if run.finished:
        return
    streams, held = corpora(args, agent.encoder)
    modules = agent.train_only("idm", "codebook", "world", *(["projector"] if parent else []))
    latent = [p for name in ("idm", "codebook", "world") for p in modules[name].parameters()]
    optimizers = [torch.optim.AdamW(latent, weight_decay=0.0)]
    if parent:
        optimizers.append(torch.optim.AdamW(agent.projector.parameters(), weight_decay=0.0))
    extra = {"window": torch.zeros(args.codes, dtype=torch.double)}
    for step in run.steps(args.steps, modules, optimizers, streams, extra):
        kinds = ("paired", "text") if step >= args.paired_steps else ("paired",)
        batches, row_ids = next_batches(agent, streams, kinds)
        counts, latent_counts = projector_counts(batches), inverse_counts(batches)
        total = torch.zeros(5 + args.codes, dtype=torch.double)
        for batch in batches:
            with torch.no_grad():
                e = agent.embeddings(batch)
                states = agent.project(e, batch.has_image)
            noise = keyed_gumbel(batch.row_ids, batch.text_lengths.tolist(), args.codes,
                                 args.seed, "idm", step).to(agent.device)
            ce, neg_entropy, codes = inverse_losses(agent, batch, states, noise)
            paired = batch.has_image[:, None].expand_as(batch.targets[:, :-1])[batch.labelled()[0]]
            loss = ((ce + ENTROPY * neg_entropy)
                    / torch.where(paired, latent_counts[0], latent_counts[1])).sum()
            if parent:
                projected = projector_losses(agent, batch, e, cycle=not args.no_cycle)
                loss = loss + (projected / counts).sum()
                total[3:5] += projected.detach().cpu()
            loss.backward()
            total[:3] += torch.stack([ce[paired].sum(), ce[~paired].sum(),
                                      -neg_entropy.sum()]).detach().cpu()
            total[5:] += torch.bincount(codes, minlength=args.codes).cpu()
        lr = args.lr * cosine(step, args.steps, warmup=0.1, floor=0.1)
        for optimizer in optimizers:
            set_lr(optimizer, lr)
        norm = optimizer_step(run, optimizers, row_ids)
        total, n_latent, n_projector = all_sum(total), latent_counts.cpu(), counts.cpu()
        extra["window"] = WINDOW * extra["window"] + total[5:]
        usage = tasks.code_usage(extra["window"])
        ce_paired, ce_text = (total[:2] / n_latent).tolist()
        run.log({"step": step, "ce_paired": ce_paired, "ce_text": ce_text,
                 "entropy": (total[2] / total[5:].sum()).item(),
                 "loss_paired": (total[3] / n_projector[0]).item(),
                 "loss_cycle": (total[4] / n_projector[1]).item(), **usage, "lr": lr,
                 "grad_norm": norm}, f"ce {ce_paired:.3f}/{ce_text:.3f} codes "
                f"{usage['codes_used']} perplexity {usage['code_perplexity']:.1f}")
    if tasks.code_usage(extra["window"])["code_perplexity"] < 4:
        say("warning: the codebook has collapsed (perplexity below 4); see README, Troubleshooting")
    if parent:
        run.report("squared error, held out", projector_report(agent, held))
    run.report("cross-entropy, held out", idm_report(agent, held))
    run.finish(modules)


def inverse_counts(batches: list[Batch]) -> Tensor:
    """Global numbers of labelled positions on rows with and without image, at least 1: (2,)."""
    counts = torch.zeros(2)
    for b in batches:
        n = b.targets.sum(1)
        counts += torch.stack([n[b.has_image].sum(), n[~b.has_image].sum()]).cpu()
    return all_sum(counts).clamp(min=1).float().to(batches[0].ids.device if batches else None)


if __name__ == "__main__":
    launch(main, arguments())
