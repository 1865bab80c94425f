"""Stages 0 and 1a: the embedded base model, and the cross-modal projectors P and P'.

Paper, section 3 (cross-modal projector) and its cycle consistency. Text-only rows have no image,
so their embeddings e^T live in another space than e^{V,T}. P maps e^T to a Gaussian over e^{V,T}
and P' back:

    step 1  paired rows        L_t2vt + L_vt2t = -log p(e^{V,T} | P(e^T)) - log p(e^T | P'(e^{V,T}))
    step 2  paired + text      step 1 + L_cycle = -log p(e^T | P'(mu_P(e^T))) on text-only rows

Stage 0 exists for `--model tiny` alone: a 1.0M Qwen2.5-VL taught the mini world from nothing, so
that the whole method runs without a download. Deviations: README, rows 2, 7, 8, 12
and 20.

    python train_projector.py                                            # CPU, embedded default
    python train_projector.py --model Qwen/Qwen2.5-VL-3B-Instruct --paired mm.jsonl --text t.jsonl
    torchrun --nproc-per-node 8 train_projector.py --model ... --paired ... --text ...
"""

import argparse
import random
import shutil

import eval as tasks
from model import (VISION_TOKENS, Agent, Batch, Encoder, Example, Projector,
                   Qwen2VLImageProcessorPil, Run, Stream, UserError, agreed, all_sum, barrier,
                   corpora, cosine, device_of, fill, folder_of, key_seed, launch, make_parser,
                   micro_batches, model_root, next_batches, optimizer_step, rank, read_config, say,
                   token_counts, token_logprobs, within)

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (PreTrainedTokenizerFast, Qwen2_5_VLConfig,
                          Qwen2_5_VLForConditionalGeneration)

DEFAULTS = {"projector": {"tiny": {"steps": 150, "lr": 2e-3, "batch_tokens": 2048},
                          "full": {"steps": 160, "lr": 1e-3, "batch_tokens": 8192}}}

# Stage 0, found on validation prompts: (phase, steps, Muon's lr, AdamW's lr). The last phase is
# gentle, or dialogue undoes the grounding that alignment and captions have taught.
BASE_PHASES = (("align", 250, 0.02, 3e-3), ("caption", 120, 0.02, 2e-3),
               ("dialogue", 500, 0.01, 2e-3))
BASE_ROWS = {"align": {"caption": 2048}, "caption": {"caption": 4096},
             "dialogue": {"base": 8192, "text": 4096, "caption": 512}}
BASE_TOKENS = 2048


def arguments() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, DEFAULTS)
    add = parser.add_argument_group("this stage").add_argument
    add("--paired-steps", type=within(int, 0), help="of step 1, before text-only rows join "
        "(default: half)")
    return parser


# ---- Stage 1a: the projectors ---------------------------------------------------------------


def gaussian_nll(mu: Tensor, log_var: Tensor, target: Tensor) -> Tensor:
    """-log N(target; mu, exp(log_var)) up to constants, mean over d: (K, d) x 3 -> (K,).

    (mu - target)^2 exp(-log var) + log var; the target carries no gradient.
    """
    return ((mu - target.detach()) ** 2 * torch.exp(-log_var) + log_var).mean(-1)


def paired_loss(projector: Projector, e_vt: Tensor, e_t: Tensor) -> Tensor:
    """L_t2vt + L_vt2t of the same tokens' two embeddings, (K, d) each -> sum over K."""
    P, P_inv = projector.P, projector.P_inv
    return (gaussian_nll(*P(e_t), e_vt) + gaussian_nll(*P_inv(e_vt), e_t)).sum()


def cycle_loss(projector: Projector, e_t: Tensor) -> Tensor:
    """L_cycle = -log p(e^T | P'(mu_P(e^T))) of text-only tokens, (K, d) -> sum over K."""
    return gaussian_nll(*projector.P_inv(projector.P.mu(e_t)), e_t).sum()


def projector_losses(agent: Agent, batch: Batch, e: Tensor, cycle: bool) -> dict[str, Tensor]:
    """{"loss_paired": L_t2vt + L_vt2t, "loss_cycle": L_cycle} of one batch, summed over the tokens
    that `projector_masks` marks.

    e (B, M, d) from `agent.embeddings`: e^{V,T} of rows with an image, e^T of the others.
    """
    seen, alone = batch.seen_image, batch.text_only & cycle                   # (B, M) each
    with agent.autocast():
        with torch.no_grad():
            e_t = agent.text_embeddings(batch) if seen.any() else e
        return {"loss_paired": paired_loss(agent.projector, e[seen].float(), e_t[seen].float()),
                "loss_cycle": cycle_loss(agent.projector, e[alone].float())}


def projector_masks(batches: list[Batch]) -> dict[str, list[Tensor]]:
    """Of each loss of `projector_losses`, the tokens it sums over: a mask (B, M) a batch."""
    return {"loss_paired": [batch.seen_image for batch in batches],
            "loss_cycle": [batch.text_only for batch in batches]}


@torch.no_grad()
def projector_report(agent: Agent, held: dict[str, list[Example]],
                     tokens_at_once: int) -> dict[str, dict]:
    """Mean squared error per dimension of P beside the identity's, of P', and of the cycle."""
    report, P, P_inv = {}, agent.projector.P, agent.projector.P_inv
    for name, examples in held.items():
        parts = []
        for batch in micro_batches(agent, examples, tokens_at_once):
            where = batch.real if name == "text" else batch.seen_image
            parts.append([x[where].float() for x in (agent.embeddings(batch),
                                                     agent.text_embeddings(batch))])
        e, e_t = map(torch.cat, zip(*parts))                                  # (K, d) each
        report[name] = {"cycle": F.mse_loss(P_inv.mu(P.mu(e_t)), e_t).item()}
        if name != "text":
            report[name] |= {"P": F.mse_loss(P.mu(e_t), e).item(),
                             "P'": F.mse_loss(P_inv.mu(e), e_t).item(),
                             "identity": F.mse_loss(e_t, e).item()}
    return report


def main(argv=None):
    args = fill(arguments().parse_args(argv), DEFAULTS["projector"])
    if args.paired_steps is None:
        args.paired_steps = args.steps // 2
    if args.parent:
        raise UserError("--parent: the projectors start from the base alone")
    ensure_base(args)
    agent = Agent.from_base(args).make("projector", seed=args.seed)
    run = Run(args, folder_of(args, "projector", args.name), agent,
              tasks.identity(args, "paired", "text"))
    if run.finished:
        return
    streams, held = corpora(args, agent.encoder, tasks.embedded)
    modules = agent.train_only("projector")
    optimizer = torch.optim.AdamW(agent.projector.parameters(), weight_decay=0.0)
    state = {**modules, **streams, "optimizer": optimizer}
    for step in range(run.resume(state), args.steps):
        joint = step >= args.paired_steps and "cycle" not in args.without
        batches, row_ids = next_batches(agent, streams, ("paired", "text") if joint else
                                        ("paired",), args.tokens_at_once)
        counts = token_counts(projector_masks(batches))
        totals = dict.fromkeys(counts, 0.0)
        for batch in batches:
            with torch.no_grad():
                e = agent.embeddings(batch)
            losses = projector_losses(agent, batch, e, cycle=joint)
            sum(losses[name] / counts[name] for name in losses).backward()
            totals = {name: totals[name] + losses[name].detach() for name in losses}
        lr = args.lr * cosine(step, args.steps, warmup=0.1)
        norm = optimizer_step(run, [optimizer], [lr], row_ids)
        run.log(step, {**{name: total / counts[name] for name, total in all_sum(totals).items()},
                       "lr": lr, "grad_norm": norm}, "loss_paired", "loss_cycle")
        run.save(step + 1, state)
    run.report("squared error, held out", projector_report(agent, held, args.tokens_at_once))
    run.finish(**modules)


# ---- Stage 0: the base of `tiny` ------------------------------------------------------------


def tiny_base(texts: list[str], seed: int, width: int = 128, layers: int = 3,
              vocab: int = 1024) -> tuple:
    """The embedded `tiny` architecture, untrained: a real Qwen2.5-VL of about 1.0M parameters.

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
    ids, heads = tokenizer.convert_tokens_to_ids, 4
    half = width // heads // 2
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width * 5 // 2,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // 2,
            max_position_embeddings=4096, bos_token_id=ids("<|endoftext|>"),
            eos_token_id=ids("<|im_end|>"), pad_token_id=ids("<|endoftext|>"),
            rope_parameters={"rope_type": "default", "rope_theta": 1e4,
                             "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8]}),
        vision_config=dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=4,
                           out_hidden_size=width, patch_size=14, spatial_merge_size=2,
                           temporal_patch_size=2, window_size=112, fullatt_block_indexes=[1]),
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=False)                      # as in the 7B
    torch.manual_seed(key_seed(seed, "base"))
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    # Inverse dynamics has to read from the last state which word it stands at. Tied or small
    # embeddings are overwritten on the way there in a model this narrow; larger ones (1.0) outshine
    # the picture.
    torch.nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.2)
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    return model, tokenizer, Qwen2VLImageProcessorPil(size=size)


def align_loss(agent: Agent, batch: Batch, words: dict[str, Tensor]) -> Tensor:
    """Each visual token names its cell through the output head: grounding's kick-start.

    words: row id -> (4 cells, 4) token ids of colour, shape and cell. Returns the sum over rows.
    Without this a model this small needs thousands of captions before it looks at the picture.
    """
    features = agent.image_features(batch).view(len(batch.row_ids), 4, -1)         # (n, 4, d)
    logps = F.log_softmax(features @ agent.backbone.lm_head.weight.T, -1)
    words = torch.stack([words[i] for i in batch.row_ids]).to(features.device)
    return -logps.gather(-1, words).mean((1, 2)).sum()


def cell_words(row: dict, tokenizer) -> Tensor:
    """(4, 4) ids of " colour", " shape" (" in" twice for an empty cell), both of " cell"."""
    return torch.tensor([[tokenizer.encode(" " + word, add_special_tokens=False)[0]
                          for word in (*(thing or "in in").split(), *cell.split())]
                         for thing, cell in zip(row["scene"], tasks.CELLS)])


def language_loss(agent: Agent, batch: Batch) -> Tensor:
    """Cross-entropy of every text token after a text token, B rows -> its sum, ()."""
    (where, targets), e = batch.labelled(), agent.embeddings(batch)
    return -token_logprobs(agent.backbone.lm_head, e[:, :-1][where], targets).sum()


def ensure_base(args):
    """Pre-train the tiny Qwen2.5-VL if it is missing: align, captions, dialogues.

    Saved as an ordinary Qwen2.5-VL folder, which everything else treats like the hub's; how it
    was trained stands in its subfolder pretraining/.
    """
    folder, identity = model_root(args) / "base", {"world": f"mini {tasks.MINI_VERSION}"}
    half_made = folder.with_name("base.part")       # renamed when it is whole
    if args.model != "tiny":
        return
    if agreed((folder / "model.safetensors").exists()):
        made_for = read_config(folder / "pretraining")["identity"]
        if made_for != identity:
            raise UserError(f"{folder} knows {made_for['world']}, this is {identity['world']}; use "
                            "another --run-root")
        return
    if folder.exists():
        raise UserError(f"{folder}: stands there without model.safetensors; remove it and run the "
                        "same command again")
    say(f"{folder} is missing or unfinished: pre-training the embedded base")
    seed = args.seed
    if (half_made / "pretraining" / "state" / "last.pt").exists():  # it goes on as it was started
        seed = read_config(half_made / "pretraining")["args"]["seed"]
    texts = [m["content"] for kind in ("caption", "base", "text")
             for row in tasks.mini_corpus(kind, 1500, seed) for m in row["messages"]]
    model, tokenizer, processor = tiny_base(texts, seed)
    model.to(device_of(args))
    agent = Agent(model, Encoder(tokenizer, processor, model), {})
    plan = [(phase, step, *rest) for phase, *rest in BASE_PHASES for step in range(rest[0])]
    run = Run(argparse.Namespace(seed=seed, steps=len(plan), fresh=False),
              half_made / "pretraining", agent, identity)
    model.train().requires_grad_(True)
    # Muon for the matrices of the layers needs 2.5 times fewer steps than AdamW alone here.
    matrices, others = [], []
    for name, p in model.named_parameters():
        (matrices if p.dim() == 2 and "embed" not in name else others).append(p)
    muon = torch.optim.Muon(matrices, weight_decay=0.0)
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
    rows = {phase: [row for kind, n in kinds.items()
                    for row in tasks.mini_corpus(kind, n, key_seed(seed, phase))]
            for phase, kinds in BASE_ROWS.items()}
    for phase in rows:                              # a stream reads in blocks: mix the kinds
        random.Random(key_seed(seed, phase)).shuffle(rows[phase])
    streams = {phase: Stream(rows[phase], agent.encoder, BASE_TOKENS, key_seed(seed, phase))
               for phase in rows}
    words = {row["id"]: cell_words(row, tokenizer) for row in rows["align"]}
    state = {"backbone": model, "muon": muon, "adamw": adamw, **streams}
    for step in range(run.resume(state), run.steps):
        phase, phase_step, phase_steps, *lrs = plan[step]
        batches, row_ids = next_batches(agent, streams, (phase,), args.tokens_at_once)
        align = phase == "align"
        n = token_counts({"n": [b.has_image if align else b.predicts for b in batches]})["n"]
        total = 0.0
        for batch in batches:
            loss = align_loss(agent, batch, words) if align else language_loss(agent, batch)
            (loss / n).backward()
            total += loss.detach()
        factor = cosine(phase_step, phase_steps, warmup=0.05, floor=0.05)
        norm = optimizer_step(run, [muon, adamw], [lr * factor for lr in lrs], row_ids)
        run.log(step, {"phase": phase, "loss": all_sum({"loss": total})["loss"] / n,
                       "grad_norm": norm}, "loss")
        run.save(step + 1, state)
    if rank() == 0:
        for part in (model.eval(), tokenizer, processor):
            part.save_pretrained(half_made)
        half_made.replace(folder)
        shutil.rmtree(folder / "pretraining" / "state")
    barrier()


if __name__ == "__main__":
    launch(main)
