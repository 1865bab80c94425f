"""Stages 0 and 1a: the embedded base model, and the cross-modal projectors P and P'.

Paper, section 3 (cross-modal projector) and its cycle consistency. Text-only rows have no image,
so their embeddings e^T live in another space than e^{V,T}. P maps e^T to a Gaussian over e^{V,T}
and P' back:

    step 1  paired rows        L_t2vt + L_vt2t: NLL of the same token's other embedding
    step 2  paired + text      step 1 + L_cycle = -log p(e^T | P'(mu_P(e^T))) on text-only rows

Deviations: mu is residual (the plain form was worse than the identity); squared errors are
averaged over d and tokens instead of summed and scaled by 1e-5; only text *after* the first image
counts, since before it both passes are equal. Stage 0 exists for `--model tiny` alone: a 0.8M
Qwen2.5-VL taught the mini world from nothing, so that the whole method runs without a download.

    python train_projector.py                                            # CPU, embedded default
    python train_projector.py --model Qwen/Qwen2.5-VL-3B-Instruct --paired mm.jsonl --text t.jsonl
    torchrun --nproc-per-node 8 train_projector.py --model ... --paired ... --text ...
"""

import argparse
import os
import shutil
from pathlib import Path

import eval as tasks
from model import (Agent, Batch, Encoder, Parser, Projector, Run, Stream, UserError, all_sum,
                   barrier, cosine, folder_of, key_seed, launch, micro_batches, model_root,
                   optimizer_step, rank, require, say, set_lr, tiny_base, token_logprobs)

import torch
import torch.nn.functional as F
from torch import Tensor

# Stage 0, found on validation prompts: (phase, steps, Muon's lr, AdamW's lr). The last phase is
# gentle, or dialogue undoes the grounding that alignment and captions have taught.
BASE_PHASES = (("align", 300, 0.02, 3e-3), ("caption", 180, 0.02, 2e-3),
               ("dialogue", 600, 0.006, 1e-3))
BASE_ROWS = {"align": {"caption": 2048}, "caption": {"caption": 4096},
             "dialogue": {"base": 8192, "text": 1536, "caption": 512}}
BASE_TOKENS = 3072


def arguments() -> Parser:
    parser = Parser(__doc__)
    parser.common_flags(steps=(150, 160), lr=(2e-3, 1e-3), batch_tokens=(2048, 8192))
    parser.flag("--paired-steps", None, "steps of step 1, before text-only rows join "
                "(default: half)", type=int)
    parser.flag("--save-every", 100, "steps between checkpoints")
    return parser


# ---- Stage 0: the base of `tiny` ------------------------------------------------------------


def align_loss(agent: Agent, batch: Batch, words: dict[str, Tensor]) -> Tensor:
    """Each visual token names its cell through the tied embedding: grounding's kick-start.

    words: row id -> (4 cells, 4) token ids of colour, shape and cell. Returns the sum over rows.
    Without this a model this small needs thousands of captions before it looks at the picture.
    """
    features = agent.backbone.model.get_image_features(pixel_values=batch.pixels,
                                                       image_grid_thw=batch.grids)
    features = torch.stack(list(getattr(features, "pooler_output", features)))     # (n, 4, d)
    logps = F.log_softmax(features @ agent.backbone.lm_head.weight.T, -1)
    words = torch.stack([words[i] for i in batch.row_ids])
    return -logps.gather(-1, words).mean((1, 2)).sum()


def cell_words(rows: list[dict], tokenizer) -> Tensor:
    """(rows, 4, 4) ids of " colour", " shape" (" in" twice for an empty cell), both of " cell"."""
    def one(word):
        return tokenizer.encode(" " + word, add_special_tokens=False)[0]
    return torch.tensor([[[one(w) for w in (*(thing or "in in").split(), *cell.split())]
                          for thing, cell in zip(row["scene"], tasks.CELLS)] for row in rows])


def language_loss(agent: Agent, batch: Batch) -> Tensor:
    """Summed cross-entropy of every text token after a text token."""
    (at, targets), e = batch.labelled(), agent.embeddings(batch)
    return -token_logprobs(agent.backbone.lm_head, e[:, :-1][at], targets).sum()


def ensure_base(args):
    """Pre-train the tiny Qwen2.5-VL if it is missing: align, captions, dialogues.

    Saved as an ordinary Qwen2.5-VL folder, which everything else treats like the hub's; how it
    was trained stands in its subfolder pretraining/.
    """
    folder = model_root(args) / "base"
    if args.model != "tiny" or (folder / "model.safetensors").exists():
        return
    say(f"{folder} is missing or unfinished: pre-training the embedded base")
    run = Run(argparse.Namespace(seed=args.seed, save_every=200, fresh=False),
              folder / "pretraining", "train_projector.py", None, mini=tasks.mini_hash())
    texts = [m["content"] for kind in ("caption", "base", "text")
             for row in tasks.mini_corpus(kind, 1500, args.seed) for m in row["messages"]]
    model, tokenizer, processor = tiny_base(texts, args.seed)
    encoder = Encoder(tokenizer, processor, model.config)
    agent = Agent(model, encoder, {})
    model.train().requires_grad_(True)
    # Muon for the matrices of the layers needs 2.5 times fewer steps than AdamW alone here.
    matrices = {id(p) for name, p in model.named_parameters()
                if p.dim() == 2 and "embed" not in name}
    optimizers = [torch.optim.Muon([p for p in model.parameters() if id(p) in matrices],
                                   weight_decay=0.0),
                  torch.optim.AdamW([p for p in model.parameters() if id(p) not in matrices],
                                    betas=(0.9, 0.95), weight_decay=0.0)]
    rows = {phase: [row for kind, n in BASE_ROWS[phase].items()
                    for row in tasks.mini_corpus(kind, n, key_seed(args.seed, phase))]
            for phase in BASE_ROWS}
    streams = {phase: Stream(rows[phase], encoder, BASE_TOKENS, key_seed(args.seed, phase))
               for phase in rows}
    words = dict(zip((row["id"] for row in rows["align"]), cell_words(rows["align"], tokenizer)))
    plan = [(phase, step, *rest) for phase, *rest in BASE_PHASES for step in range(rest[0])]
    for at in run.steps(len(plan), {"backbone": model}, optimizers, streams):
        phase, step, steps, *lrs = plan[at]
        batches, row_ids = next_batches(agent, streams, (phase,))
        count = all_sum(torch.tensor(sum(len(b.row_ids) if phase == "align" else
                                         int(b.targets.sum()) for b in batches))).item()
        total = torch.zeros(())
        for batch in batches:
            loss = align_loss(agent, batch, words) if phase == "align" \
                else language_loss(agent, batch)
            (loss / count).backward()
            total += loss.detach()
        for optimizer, lr in zip(optimizers, lrs):
            set_lr(optimizer, lr * cosine(step, steps, warmup=0.05, floor=0.05))
        norm = optimizer_step(run, optimizers, row_ids)
        loss = (all_sum(total) / count).item()
        run.log({"step": at, "phase": phase, "loss": loss, "grad_norm": norm},
                f"{phase} loss {loss:.3f}")
    if rank() == 0:
        half_made = folder / "pretraining" / "finished"
        for part in (model.eval(), tokenizer, processor):
            part.save_pretrained(half_made)
        for file in sorted(half_made.iterdir(), key=lambda f: f.name == "model.safetensors"):
            os.replace(file, folder / file.name)    # the weights last: with them it is finished
        half_made.rmdir()
        shutil.rmtree(folder / "pretraining" / "state")
    barrier()


# ---- Stage 1a: the projectors ---------------------------------------------------------------


def gaussian_nll(mu: Tensor, log_var: Tensor, target: Tensor) -> Tensor:
    """-log N(target; mu, exp(log_var)) up to constants, mean over d: (K, d) x 3 -> (K,).

    (mu - target)^2 exp(-log var) + log var; the target carries no gradient.
    """
    return ((mu - target.detach()) ** 2 * torch.exp(-log_var) + log_var).mean(-1)


def paired_loss(projector: Projector, e_vt: Tensor, e_t: Tensor) -> Tensor:
    """L_t2vt + L_vt2t of the same tokens' two embeddings, (K, d) each -> sum over K."""
    P, P_inv = projector.P, projector.P_inv
    return (gaussian_nll(P.mu(e_t), P.log_var(e_t), e_vt)
            + gaussian_nll(P_inv.mu(e_vt), P_inv.log_var(e_vt), e_t)).sum()


def cycle_loss(projector: Projector, e_t: Tensor) -> Tensor:
    """L_cycle = -log p(e^T | P'(mu_P(e^T))) of text-only tokens, (K, d) -> sum over K."""
    there = projector.P.mu(e_t)
    return gaussian_nll(projector.P_inv.mu(there), projector.P_inv.log_var(there), e_t).sum()


def projector_losses(agent: Agent, batch: Batch, e: Tensor, cycle: bool) -> Tensor:
    """[L_t2vt + L_vt2t, L_cycle] of one batch, summed over tokens: (2,).

    e (B, M, d) from `agent.embeddings`: e^{V,T} of rows with an image, e^T of the others.
    """
    alone = batch.real & ~batch.has_image[:, None]
    losses = [0 * agent.projector.P.mu(e[:1, 0].float()).sum()] * 2
    with agent.autocast():
        if batch.seen_image.any():
            with torch.no_grad():
                e_t = agent.text_embeddings(batch)
            seen = batch.seen_image
            losses[0] = paired_loss(agent.projector, e[seen].float(), e_t[seen].float())
        if cycle and alone.any():
            losses[1] = cycle_loss(agent.projector, e[alone].float())
    return torch.stack(losses)


def projector_counts(batches: list[Batch]) -> Tensor:
    """Global denominators of `projector_losses`, at least 1: (2,)."""
    counts = torch.zeros(2)
    for b in batches:
        counts += torch.tensor([b.seen_image.sum(), (b.real & ~b.has_image[:, None]).sum()])
    return all_sum(counts).clamp(min=1).float().to(batches[0].ids.device if batches else None)


def next_batches(agent: Agent, streams: dict[str, Stream], kinds) -> tuple[list[Batch], list[str]]:
    """This rank's micro-batches of the next global batch of each kind, and their rows' ids."""
    rows = {kind: streams[kind].next() for kind in kinds if kind in streams}
    batches = [agent.encoder.collate(part, streams[kind].responses_only).to(agent.device)
               for kind, examples in rows.items() for part in micro_batches(examples)]
    return batches, [e.id for examples in rows.values() for e in examples]


def corpora(args, encoder: Encoder) -> tuple[dict[str, Stream], dict[str, list]]:
    """The streams of paired and text-only rows, and held-out rows for the stages' reports.

    Held-out sets: "id", "ood" (mini only: the personas without paired data) and "text".
    """
    if args.model != "tiny" and not args.paired:
        raise UserError("--paired FILE... is required for --model other than tiny")
    if args.paired and not args.text and not args.no_text:
        raise UserError("--paired without --text: name text-only rows as well, or say --no-text")
    streams = {}
    for kind in ("paired",) if args.no_text else ("paired", "text"):
        source = getattr(args, kind)
        if not source and not args.paired:
            source = tasks.mini_corpus(kind, 4096, key_seed(args.seed, kind))
        if source:
            streams[kind] = Stream(source, encoder, args.batch_tokens, key_seed(args.seed, kind),
                                   args.image_root, hold_out=96)
    held = {"id": streams["paired"].held_out}
    if not args.paired:
        unseen = [p.name for p in tasks.PERSONAS[-tasks.HELD_OUT:]]
        held["ood"] = [encoder.encode(row) for row in
                       tasks.mini_corpus("base", 384, key_seed(args.seed, "held"))
                       if row["persona"] in unseen][:96]
    if "text" in streams:
        held["text"] = streams["text"].held_out
    return streams, {name: rows for name, rows in held.items() if rows}


def held_batches(agent: Agent, examples: list):
    """Held-out rows in batches of the training's size."""
    for part in micro_batches(examples):
        yield agent.encoder.collate(part).to(agent.device)


@torch.no_grad()
def projector_report(agent: Agent, held: dict[str, list]) -> dict[str, dict]:
    """Mean squared error per dimension of P beside the identity's, of P', and of the cycle."""
    report, P, P_inv = {}, agent.projector.P, agent.projector.P_inv
    for name, examples in held.items():
        parts = []
        for batch in held_batches(agent, examples):
            at = batch.real if name == "text" else batch.seen_image
            parts.append([x[at].float() for x in (agent.embeddings(batch),
                                                  agent.text_embeddings(batch))])
        e, e_t = map(torch.cat, zip(*parts))                                  # (K, d) each
        report[name] = {"cycle": F.mse_loss(P_inv.mu(P.mu(e_t)), e_t).item()}
        if name != "text":
            report[name] |= {"P": F.mse_loss(P.mu(e_t), e).item(),
                             "P'": F.mse_loss(P_inv.mu(e), e_t).item(),
                             "identity": F.mse_loss(e_t, e).item()}
    return report


def ensure(args) -> Path:
    """The finished projector run that `args` calls for."""
    return require(args, folder_of(args, "projector"), "train_projector.py", main, arguments())


def main(args):
    ensure_base(args)
    agent = Agent.from_base(args).make("projector", seed=args.seed)
    if args.parent:
        raise UserError("--parent: the projectors start from the base alone")
    run = Run(args, folder_of(args, "projector", args.name), "train_projector.py", None,
              base=agent.base_hash, mini=tasks.mini_hash())
    if run.finished:
        return
    streams, held = corpora(args, agent.encoder)
    modules = agent.train_only("projector")
    optimizer = torch.optim.AdamW(agent.projector.parameters(), weight_decay=0.0)
    paired_steps = args.steps // 2 if args.paired_steps is None else args.paired_steps
    for step in run.steps(args.steps, modules, [optimizer], streams):
        joint = step >= paired_steps and not args.no_cycle
        kinds = ("paired", "text") if joint else ("paired",)
        batches, row_ids = next_batches(agent, streams, kinds)
        counts = projector_counts(batches)
        total = torch.zeros(2)
        for batch in batches:
            with torch.no_grad():
                e = agent.embeddings(batch)
            losses = projector_losses(agent, batch, e, cycle=joint)
            (losses / counts).sum().backward()
            total += losses.detach().cpu()
        lr = args.lr * cosine(step, args.steps, warmup=0.1)
        set_lr(optimizer, lr)
        norm = optimizer_step(run, [optimizer], row_ids)
        paired, cycled = (all_sum(total) / counts.cpu()).tolist()
        run.log({"step": step, "loss_paired": paired, "loss_cycle": cycled, "lr": lr,
                 "grad_norm": norm}, f"paired {paired:.3f} cycle {cycled:.3f}")
    run.report("squared error, held out", projector_report(agent, held))
    run.finish(modules)


if __name__ == "__main__":
    launch(main, arguments())
