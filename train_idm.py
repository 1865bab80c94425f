"""Stage 1b: the inverse dynamics model, the codebook and the language world model.

Paper, section 3 (latent action space). From consecutive states the inverse dynamics model infers
which of |C| codes led from token to token; the world model must predict the next token from the
current state and that code, so the code has to carry what the state leaves open:

    a_t ~ GumbelSoftmax(IDM(s_1..s_{t+1})),  c_t = C[a_t]            (straight-through, tau = 2)
    L_inverse = CE(x_{t+1}; f_world(s_t, a_t)) + 1e-3 sum_k p_k log p_k,     p = softmax(IDM)

averaged over the paired tokens, plus the same over the text-only ones. L_inverse trains IDM,
codebook and merge. P and P' go on training beside it with their own optimiser and losses
(train_projector.py); states enter L_inverse detached, so it never reaches P.

Deviations: (1) no paired-only phase unless --paired-steps (release: an epoch); (2) the noise is
keyed by row and step, so no split over ranks or batches changes a gradient; (3) vision tokens are
masked in every softmax over the vocabulary.

    python train_idm.py                                                  # CPU, embedded default
    python train_idm.py --model Qwen/Qwen2.5-VL-3B-Instruct --paired mm.jsonl --text t.jsonl
    torchrun --nproc-per-node 8 train_idm.py --model ... --paired ... --text ...
"""

import argparse

import train_projector
from model import (Agent, Batch, Run, UserError, all_sum, code_usage, cosine, fill, folder_of,
                   key_seed, launch, make_parser, micro_batches, next_batches, optimizer_step,
                   predecessor, token_counts, token_logprobs)
from train_projector import (corpora, data_of, ensure_base, projector_losses, projector_masks,
                             projector_report)

import torch
import torch.nn.functional as F
from torch import Tensor

INVERSE = ("idm", "codebook", "world")      # what L_inverse trains
TAU = 2.0              # temperature of the Gumbel-softmax
ENTROPY = 1e-3         # weight of the per-token entropy bonus
DEFAULTS = {"idm": {"tiny": {"steps": 400, "lr": 1e-3, "batch_tokens": 1024},
                    "full": {"steps": 160, "lr": 1e-4, "batch_tokens": 8192}}}


def arguments() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, DEFAULTS)
    add = parser.add_argument_group("this stage").add_argument
    add("--paired-steps", type=int, default=0, help="before text-only rows join (default: 0)")
    return parser


def straight_through(logits: Tensor, noise: Tensor, tau: float = TAU) -> Tensor:
    """Hard one-hot of argmax(logits + noise) with the gradient of softmax((logits + noise)/tau).

    logits, noise (K, |C|) -> (K, |C|) (Gumbel-softmax, Jang et al. 2017)."""
    soft = F.softmax((logits + noise) / tau, -1)
    hard = F.one_hot(soft.argmax(-1), logits.shape[-1]).to(soft.dtype)
    return hard + soft - soft.detach()


def keyed_gumbel(row_ids: list[str], lengths, n: int, *keys) -> Tensor:
    """Gumbel noise for every valid position of a batch, keyed by (keys, row, position).

    lengths: positions per row -> (B, max length, n) on CPU; the same row gets the same noise
    whatever batch, micro-batch or rank it falls into.
    """
    uniform = torch.zeros(len(row_ids), max(lengths), n)
    for b, (row_id, length) in enumerate(zip(row_ids, lengths)):
        generator = torch.Generator().manual_seed(key_seed(*keys, row_id))
        uniform[b, :length] = torch.rand(length, n, generator=generator)
    return -torch.log(-torch.log(uniform.clamp(1e-9, 1 - 1e-7)))       # finite


def inverse_losses(agent: Agent, batch: Batch, states: Tensor,
                   noise: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The terms of L_inverse, summed over the positions that `inverse_masks` marks:
    {"inverse_paired", "inverse_text"}; and what the log says of them: cross-entropies of x_{t+1},
    entropy of the codes, how often each was chosen (|C|,).

    states (B, M, d) detached; noise (B, M, |C|) Gumbel.
    """
    where, targets = batch.labelled()                                       # (B, M - 1), (K,)
    with agent.autocast():
        logits = agent.idm_logits(states)[where].float()                    # (K, |C|)
        choice = straight_through(logits, noise[:, :-1][where])
        c = choice @ agent.codebook.weight                                  # (K, d)
        ce = -agent.world_logprobs(states[:, :-1][where], c, targets)       # (K,)
    logps = F.log_softmax(logits, -1)                                       # noise-free
    neg_entropy = (logps.exp() * logps).sum(-1)                             # (K,)
    paired = batch.has_image[:, None].expand_as(where)[where]               # (K,) bool
    term = ce + ENTROPY * neg_entropy
    losses = {"inverse_paired": term[paired].sum(), "inverse_text": term[~paired].sum()}
    figures = {"ce_paired": ce[paired].sum(), "ce_text": ce[~paired].sum(),
               "entropy": -neg_entropy.sum(), "codes": choice.detach().sum(0)}
    return losses, figures


def inverse_masks(batches: list[Batch]) -> dict[str, list[Tensor]]:
    """Labelled positions of rows with and without image, (rows, M) bool a batch."""
    return {"inverse_paired": [batch.predicts[batch.has_image] for batch in batches],
            "inverse_text": [batch.predicts[~batch.has_image] for batch in batches]}


@torch.no_grad()
def idm_report(agent: Agent, held: dict[str, list], tokens_at_once: int) -> dict[str, dict]:
    """Held-out cross-entropy of x_{t+1} given the IDM's noise-free code, beside shuffled codes' and
    the backbone's own; codes in use and marginal perplexity. "text, no P" are text-only rows
    without the projector: what it does for coverage."""
    report, n = {}, agent.structure["codes"]
    if "text" in held and agent.projector is not None:
        held = {**held, "text, no P": held["text"]}
    for name, examples in held.items():
        parts = []
        for batch in micro_batches(agent, examples, tokens_at_once):
            where, targets = batch.labelled()
            e = agent.embeddings(batch)
            states = e if name == "text, no P" else agent.project(e, batch.has_image)
            with agent.autocast():
                codes = agent.idm_logits(states)[where].argmax(-1)
            parts.append((e[:, :-1][where], states[:, :-1][where], targets, codes))
        e, s, targets, codes = map(torch.cat, zip(*parts))                  # (K, ...) each
        order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))
        shuffled = codes[order.to(codes.device)]
        backbone = token_logprobs(agent.backbone.lm_head, e, targets, agent.token_bias)
        report[name] = {
            "IDM": -agent.world_logprobs(s, agent.codebook(codes), targets).mean().item(),
            "shuffled": -agent.world_logprobs(s, agent.codebook(shuffled), targets).mean().item(),
            "backbone": -backbone.mean().item(), **code_usage(torch.bincount(codes, minlength=n))}
    return report


def main(argv=None):
    args = fill(arguments().parse_args(argv), DEFAULTS["idm"])
    data, parent = data_of(args), None          # the projector's run, if there is one
    ensure_base(args)
    if "projector" not in args.without:
        parent = predecessor(args, data, "projector", train_projector)
    elif args.parent:
        raise UserError("--parent: without a projector this stage starts from the base alone")
    agent = Agent.from_base(args).make(*INVERSE, seed=args.seed)
    if parent:
        agent.load_run(parent)
    run = Run(args, folder_of(args, "idm", args.name), agent, data, parent)
    if run.finished:
        return
    streams, held = corpora(args, agent.encoder)
    modules = agent.train_only(*INVERSE, "projector") if parent else agent.train_only(*INVERSE)
    inverse = torch.nn.ModuleList([modules[name] for name in INVERSE])
    optimizers = {"AdamW": torch.optim.AdamW(inverse.parameters(), weight_decay=0.0)}
    if parent:
        optimizers["AdamW of P"] = torch.optim.AdamW(agent.projector.parameters(), weight_decay=0.0)
    state = {**modules, **streams, **optimizers}
    for step in range(run.resume(state), args.steps):
        kinds = ("paired", "text") if step >= args.paired_steps else ("paired",)
        batches, row_ids = next_batches(agent, streams, kinds, args.tokens_at_once)
        counts = token_counts({**inverse_masks(batches), **projector_masks(batches)})
        totals = dict.fromkeys(("ce_paired", "ce_text", "entropy", "codes", *counts), 0.0)
        for batch in batches:
            e = agent.embeddings(batch)                         # of the frozen backbone
            states = agent.project(e, batch.has_image).detach()     # L_inverse never reaches P
            noise = keyed_gumbel(batch.row_ids, batch.text_lengths.tolist(), args.codes,
                                 args.seed, "idm", step).to(agent.device)
            losses, figures = inverse_losses(agent, batch, states, noise)
            if parent:
                losses |= projector_losses(agent, batch, e, cycle="cycle" not in args.without)
            sum(losses[name] / counts[name] for name in losses).backward()
            for name, value in (losses | figures).items():
                totals[name] += value.detach()
        lr = args.lr * cosine(step, args.steps, warmup=0.1, floor=0.1)
        norm = optimizer_step(run, list(optimizers.values()), [lr] * len(optimizers), row_ids)
        totals = all_sum(totals)
        figures = {"ce_paired": totals["ce_paired"] / counts["inverse_paired"],
                   "ce_text": totals["ce_text"] / counts["inverse_text"],
                   "entropy": totals["entropy"] / max(1.0, totals["codes"].sum().item())}
        if parent:
            figures |= {name: totals[name] / counts[name] for name in ("loss_paired", "loss_cycle")}
        run.log(step, {**figures, **code_usage(totals["codes"]), "lr": lr, "grad_norm": norm},
                "ce_paired", "ce_text", "code_perplexity")
        run.save(step + 1, state)
    if parent:
        run.report("squared error, held out", projector_report(agent, held, args.tokens_at_once))
    run.report("cross-entropy, held out", idm_report(agent, held, args.tokens_at_once))
    run.finish(**modules)


if __name__ == "__main__":
    launch(main)
