"""Stage 1b: the inverse dynamics model, the codebook and the language world model.

Paper, section 3 (latent action space). From consecutive states the inverse dynamics model infers
which of |C| codes led from token to token; the world model must predict the next token from the
current state and that code, so the code has to carry what the state leaves open:

    a_t ~ GumbelSoftmax(IDM(s_1..s_{t+1})),  c_t = C[a_t]            (straight-through, tau = 2)
    L_inverse = CE(x_{t+1}; f_world(s_t, c_t)), paired + text-only, + 1e-3 sum_k p_k log p_k

L_inverse trains IDM, codebook and merge. P and P' go on training beside it with their own
optimiser and losses (train_projector.py); states enter L_inverse detached, so it never reaches P.
Deviations: README, rows 3, 10 to 12 and 20.

    python train_idm.py                                                  # CPU, embedded default
    python train_idm.py --model Qwen/Qwen2.5-VL-3B-Instruct --paired mm.jsonl --text t.jsonl
    torchrun --nproc-per-node 8 train_idm.py --model ... --paired ... --text ...
"""

import argparse

import eval as tasks
import train_projector
from model import (Agent, Batch, Run, UserError, all_sum, corpora, cosine, fill, folder_of,
                   key_seed, launch, make_parser, micro_batches, next_batches, optimizer_step,
                   predecessor, say, token_counts, token_logprobs, within)
from train_projector import ensure_base, projector_losses, projector_masks, projector_report

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TAU = 2.0              # temperature of the Gumbel-softmax
ENTROPY = 1e-3         # weight of the per-token entropy bonus
NOISE = 0.1            # of the report's noise, as a share of an embedding's root mean square
WINDOW = 0.95          # decay of the running histogram of codes that usage is read from
DEFAULTS = {"idm": {"tiny": {"steps": 400, "lr": 1e-3, "batch_tokens": 1024},
                    "full": {"steps": 160, "lr": 1e-4, "batch_tokens": 8192}}}


def arguments() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, DEFAULTS)
    add = parser.add_argument_group("this stage").add_argument
    add("--paired-steps", type=within(int, 0), default=0,
        help="on paired rows alone before text-only rows join (default: 0)")
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
    noise = torch.zeros(len(row_ids), max(lengths), n)
    for b, (row_id, length) in enumerate(zip(row_ids, lengths)):
        generator = torch.Generator().manual_seed(key_seed(*keys, row_id))
        noise[b, :length] = torch.rand(length, n, generator=generator)
    return -torch.log(-torch.log(noise.clamp(1e-9, 1 - 1e-7)))


def negative_entropy(logits: Tensor) -> Tensor:
    """sum_k p_k log p_k of the noise-free code distribution per token: (K, |C|) -> (K,)."""
    logps = F.log_softmax(logits.float(), -1)
    return (logps.exp() * logps).sum(-1)


def inverse_losses(agent: Agent, batch: Batch, states: Tensor, noise: Tensor) -> tuple:
    """Per labelled position: cross-entropy of x_{t+1}, sum_k p log p, and the code, (K,) each.

    states (B, M, d) detached; noise (B, M, |C|) Gumbel.
    """
    where, targets = batch.labelled()
    with agent.autocast():
        logits = agent.idm_logits(states)[where].float()                    # (K, |C|)
        choice = straight_through(logits, noise[:, :-1][where])
        c = choice @ agent.codebook.weight                                  # (K, d)
        logps = agent.world_logprobs(states[:, :-1][where], c, targets)
    return -logps, negative_entropy(logits), choice.argmax(-1).detach()


def inverse_loss(ce: Tensor, neg_entropy: Tensor, paired: Tensor,
                 counts: dict[str, float]) -> Tensor:
    """L_inverse: CE on paired rows + CE on text-only rows, each a mean over its own tokens, with
    the entropy term. ce, neg_entropy (K,), paired (K,) bool, counts of `inverse_masks`."""
    n = torch.where(paired, counts["ce_paired"], counts["ce_text"])
    return ((ce + ENTROPY * neg_entropy) / n).sum()


def inverse_masks(batches: list[Batch]) -> dict[str, list[Tensor]]:
    """Labelled positions of rows with and without image, (rows, M) bool a batch."""
    return {"ce_paired": [batch.predicts[batch.has_image] for batch in batches],
            "ce_text": [batch.predicts[~batch.has_image] for batch in batches]}


@torch.no_grad()
def idm_report(agent: Agent, held: dict[str, list], tokens_at_once: int) -> tuple[dict, dict]:
    """Held-out cross-entropy of x_{t+1} given the IDM's noise-free code, beside the backbone's
    own, shuffled codes' and random codes', and that of codes inferred with noise on the embeddings,
    with the share of them that stay; codes in use, marginal perplexity, and code use of text-only
    rows without the projector ("text, no P": coverage); and every code's share."""
    report, shares, n, head = {}, {}, agent.structure["codes"], agent.backbone.lm_head
    if "text" in held and agent.projector is not None:
        held = {**held, "text, no P": held["text"]}
    for name, examples in held.items():
        parts = []
        for batch in micro_batches(agent, examples, tokens_at_once):
            where, targets = batch.labelled()
            e, inferred = agent.embeddings(batch), []
            noise = nn.utils.rnn.pad_sequence([     # of a row: the same in any batch
                torch.randn(int(n), e.shape[-1], generator=torch.Generator().manual_seed(
                    key_seed("noise", row_id)))
                for row_id, n in zip(batch.row_ids, batch.text_lengths)], batch_first=True).to(e)
            size = e.square().mean(-1, keepdim=True).sqrt()
            for given in (e + NOISE * size * noise, e):
                states = given if name == "text, no P" else agent.project(given, batch.has_image)
                with agent.autocast():
                    inferred.append(agent.idm_logits(states)[where].argmax(-1))
            parts.append((e[:, :-1][where], states[:, :-1][where], targets, *inferred))
        e, s, targets, noisy, codes = map(torch.cat, zip(*parts))             # (K, ...) each
        generator = torch.Generator().manual_seed(0)
        shuffled = codes[torch.randperm(len(codes), generator=generator).to(s.device)]
        random = torch.randint(n, codes.shape, generator=generator).to(s.device)

        def ce(given):
            return -agent.world_logprobs(s, agent.codebook(given), targets).mean().item()
        backbone = -token_logprobs(head, e, targets, agent.token_bias).mean().item()
        counts = torch.bincount(codes, minlength=n)
        shares[name] = (counts / len(codes)).tolist()
        report[name] = {"IDM": ce(codes), "shuffled": ce(shuffled), "random": ce(random),
                        "backbone": backbone, "IDM, noise": ce(noisy),
                        "kept": (codes == noisy).float().mean().item(),
                        **tasks.code_usage(counts)}
    return report, shares


def main(argv=None):
    args = fill(arguments().parse_args(argv), DEFAULTS["idm"])
    identity = tasks.identity(args, "paired", "text")
    ensure_base(args)
    if "projector" in args.without and args.parent:
        raise UserError("--parent: without a projector this stage starts from the base alone")
    parent = None if "projector" in args.without else predecessor(
        args, identity, "projector", train_projector)
    agent = Agent.from_base(args).make("idm", "codebook", "world", seed=args.seed)
    if parent:
        agent.load_run(parent)
    run = Run(args, folder_of(args, "idm", args.name), agent, identity, parent)
    if run.finished:
        return
    streams, held = corpora(args, agent.encoder, tasks.embedded)
    modules = agent.train_only("idm", "codebook", "world", *(["projector"] if parent else []))
    latent = [p for name in ("idm", "codebook", "world") for p in modules[name].parameters()]
    optimizers = [torch.optim.AdamW(latent, weight_decay=0.0)]
    if parent:
        optimizers.append(torch.optim.AdamW(agent.projector.parameters(), weight_decay=0.0))
    usage = nn.Module()
    usage.register_buffer("window", torch.zeros(args.codes, dtype=torch.double))
    state = {**modules, **streams, "usage": usage,
             **{f"optimizer {i}": optimizer for i, optimizer in enumerate(optimizers)}}
    for step in range(run.resume(state), args.steps):
        kinds = ("paired", "text") if step >= args.paired_steps else ("paired",)
        batches, row_ids = next_batches(agent, streams, kinds, args.tokens_at_once)
        counts = token_counts({**inverse_masks(batches), **projector_masks(batches)})
        totals = {**dict.fromkeys((*counts, "entropy"), 0.0),
                  "codes": torch.zeros(args.codes, device=agent.device)}
        for batch in batches:
            with torch.no_grad():
                e = agent.embeddings(batch)
                states = agent.project(e, batch.has_image)
            noise = keyed_gumbel(batch.row_ids, batch.text_lengths.tolist(), args.codes,
                                 args.seed, "idm", step).to(agent.device)
            ce, neg_entropy, codes = inverse_losses(agent, batch, states, noise)
            paired = ~batch.text_only[:, :-1][batch.labelled()[0]]
            loss = inverse_loss(ce, neg_entropy, paired, counts)
            figures = {"ce_paired": ce[paired].sum(), "ce_text": ce[~paired].sum(),
                       "entropy": -neg_entropy.sum(),
                       "codes": torch.bincount(codes, minlength=args.codes)}
            if parent:
                projected = projector_losses(agent, batch, e, cycle="cycle" not in args.without)
                loss = loss + sum(projected[name] / counts[name] for name in projected)
                figures |= projected
            loss.backward()
            totals |= {name: totals[name] + value.detach() for name, value in figures.items()}
        lr = args.lr * cosine(step, args.steps, warmup=0.1, floor=0.1)
        norm = optimizer_step(run, optimizers, [lr] * len(optimizers), row_ids)
        totals = all_sum(totals)
        usage.window.mul_(WINDOW).add_(totals["codes"])
        run.log(step, {**{name: totals[name] / n for name, n in counts.items()},
                       "entropy": totals["entropy"] / max(1.0, totals["codes"].sum().item()),
                       **tasks.code_usage(usage.window), "lr": lr, "grad_norm": norm},
                "ce_paired", "ce_text", "code_perplexity")
        run.save(step + 1, state)
    if args.steps and tasks.code_usage(usage.window)["code_perplexity"] < min(4, args.codes / 2):
        say("warning: the codebook has collapsed: a code or two serve all; see README, "
            "Troubleshooting")
    if parent:
        run.report("squared error, held out", projector_report(agent, held, args.tokens_at_once))
    report, shares = idm_report(agent, held, args.tokens_at_once)
    run.report("cross-entropy, held out", report)
    run.report("share of codes", shares, shown=False)
    run.finish(**modules)


if __name__ == "__main__":
    launch(main)
