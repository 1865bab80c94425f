"""Stage 3: reinforcement learning of the policy over latent actions (or tokens, the baseline).

Paper, section 4. A rollout takes a_t ~ pi(. | s_1..s_t) and x_{t+1} = argmax f_world(s_t, a_t)
until the end of turn; the judge's reward of the finished text trains the policy's layers, norm
and head, and nothing else. GRPO, Dr.GRPO, DAPO and BNPO are rows of one table, ALGORITHMS; every
entry is a flag, so an ablation is a flag and a new algorithm is a row.

Where we differ from the algorithms' papers or from the release:
 1. The names mean what their own papers define. What the release ran under these names (loss
    types of TRL: always std-scaled, clip 0.2/0.2, KL 0.01, no filtering) is `--algo *_released`.
 2. DAPO averages over all tokens of the global batch, as its reference code does; its paper sums
    per group. At the refill limit it trains on the groups it has and says so.
 3. Advantages use the full group; answers whose judging failed are masked out of statistics,
    loss and denominators alike, never scored as 0.
 4. States do not depend on the policy, so updates run the policy module alone on the rollout's
    cached states; the reference model is a copy of that module. The token baseline caches the
    input of its first trained layer likewise.

    torchrun train_rl.py --algo dapo                      # CPU or one GPU, embedded default
    torchrun train_rl.py --algo grpo --action-space token # the token-level baseline
    torchrun --nproc-per-node 8 train_rl.py --model Qwen/Qwen2.5-VL-3B-Instruct --task my.jsonl
"""

import copy
import math
import random
import time
from dataclasses import dataclass

import eval as tasks
import train_bc
from model import (Agent, Parser, Rollout, Run, UserError, action_statistics, all_sum, folder_of,
                   gather, key_seed, launch, optimizer_step, rank, read_config, replay, rollout,
                   say, set_lr, task_tag, world_size)

import torch
from torch import Tensor


@dataclass
class Algorithm:
    """One row: how advantages are scaled, ratios clipped and token losses aggregated."""
    scale: str                      # group, none or beta (`advantages`)
    clip_low: float                 # ratio floor 1 - clip_low
    clip_high: float                # ratio ceiling 1 + clip_high
    aggregate: str                  # sequence, length, tokens, sum or local (`token_weights`)
    beta: float = 0.0               # weight of the KL to the starting policy
    dynamic_sampling: bool = False  # refill groups without variance
    overlong: bool = False          # soft punishment of overlong answers


ALGORITHMS = {
    "grpo": Algorithm("group", 0.2, 0.2, "sequence", beta=0.01),            # 2402.03300
    "dr_grpo": Algorithm("none", 0.2, 0.2, "length"),                       # 2503.20783
    "dapo": Algorithm("group", 0.2, 0.28, "tokens", dynamic_sampling=True, overlong=True),
    "bnpo": Algorithm("beta", 0.2, 0.28, "sum"),                            # 2506.02864
    "grpo_released": Algorithm("group", 0.2, 0.2, "sequence", beta=0.01),
    "dr_grpo_released": Algorithm("group", 0.2, 0.2, "length", beta=0.01),
    "dapo_released": Algorithm("group", 0.2, 0.2, "tokens", beta=0.01),
    "bnpo_released": Algorithm("group", 0.2, 0.2, "local", beta=0.01),
}
REFILLS = 3                         # rounds of dynamic sampling beyond the first
STD_EPS = 1e-4                      # added to the group's standard deviation
# Of log ratios before any update; in bfloat16 a logit of 16 to 32 is rounded to an eighth.
RATIO_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.5}


def arguments() -> Parser:
    parser = Parser(__doc__)
    parser.common_flags(steps=(80, 100), lr=(2e-4, 1e-6), min_p=(0.1, 0.0))
    parser.by_stage = lambda args: {"lr": (2.5e-4, 1e-6), "min_p": (0.0, 0.0)} \
        if args.action_space == "token" else {}
    tasks.task_flags(parser)
    parser.flag("--algo", "grpo", "row of the table of algorithms", choices=tuple(ALGORITHMS))
    parser.flag("--action-space", "latent", "what an action is", choices=("latent", "token"))
    parser.flag("--sft", "clone", "latent SFT to start from", choices=("clone", "release"))
    parser.flag("--scale", None, "advantage (default: the algorithm's)",
                choices=("group", "none", "beta"))
    parser.flag("--clip-low", None, "ratio floor 1 - x (default: the algorithm's); clipping acts "
                "only with several updates a rollout, --minibatches or --inner-epochs", type=float)
    parser.flag("--clip-high", None, "ratio ceiling 1 + x (default: the algorithm's)", type=float)
    parser.flag("--aggregate", None, "token weights (default: the algorithm's)",
                choices=("sequence", "length", "tokens", "sum", "local"))
    parser.flag("--beta", None, "weight of the KL (default: the algorithm's)", type=float)
    parser.flag("--kl", "k3", "k3: sampled; exact: summed over all actions",
                choices=("k3", "exact"))
    parser.flag("--dynamic-sampling", None, "on or off (default: the algorithm's)",
                choices=("on", "off"))
    parser.flag("--overlong", None, "on or off (default: the algorithm's)", choices=("on", "off"))
    parser.flag("--group-size", 8, "answers a prompt, G")
    parser.flag("--prompts", 8, "prompts a step over all ranks")
    parser.flag("--max-new-tokens", 0, "longest answer (0: the task's)")
    parser.flag("--temperature", 1.0, "of the action distribution, in sampling and scoring")
    parser.flag("--min-p", None, "outside the paper: codes cannot choose tokens less likely "
                "under the backbone than this share of its best; 0 is off"
                + parser.shown("min_p"), type=float)
    parser.flag("--inner-epochs", 1, "passes over each rollout batch")
    parser.flag("--minibatches", 1, "optimiser steps a pass")
    parser.flag("--splits", None, "evaluated before and after; none named: no evaluation "
                "(default: valid, tiny id ood); tune on valid", nargs="*", choices=tasks.SPLITS)
    parser.flag("--save-every", 20, "steps between checkpoints and samples")
    return parser


def resolve_algorithm(args) -> Algorithm:
    """The table's row with the flags' overrides; impossible combinations are refused here."""
    algorithm = copy.copy(ALGORITHMS[args.algo])
    for name in ("scale", "clip_low", "clip_high", "aggregate", "beta"):
        if getattr(args, name) is not None:
            setattr(algorithm, name, getattr(args, name))
    for name in ("dynamic_sampling", "overlong"):
        if getattr(args, name) is not None:
            setattr(algorithm, name, getattr(args, name) == "on")
    for name in ("group_size", "prompts", "inner_epochs", "minibatches", "temperature"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive")
    if args.group_size == 1:
        raise UserError("--group-size 1: an answer's advantage is over the others of its group; "
                        "take at least 2")
    if not 0 <= args.min_p < 1:
        raise UserError("--min-p must lie in [0, 1)")
    if args.min_p and args.action_space == "token":
        raise UserError("--min-p with --action-space token would sample from another support than "
                        "is scored; train without it and give it to eval.py")
    if args.prompts < world_size():
        raise UserError(f"--prompts {args.prompts} is less than the {world_size()} ranks; raise "
                        "it")
    return algorithm


# ---- Rewards and advantages: pure functions -------------------------------------------------


def overlong_punishment(lengths: Tensor, limit: int, cache_share: float = 0.2) -> Tensor:
    """Soft overlong punishment (DAPO, eq. 13), lengths (N,) in tokens -> (N,) in [-1, 0].

    0 up to limit - cache, then linear down to -1 at the limit; cache = cache_share * limit.
    """
    cache = cache_share * limit
    return ((limit - cache - lengths) / cache).clamp(-1.0, 0.0)


def group_moments(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased deviation of each group over its judged answers: (P, G) -> 2 x (P, 1).

    NaN marks a failed judgement. Fewer than two judged answers have deviation 0."""
    rewards = rewards.double()                      # in fp32 equal rewards have a deviation
    judged = ~rewards.isnan()
    n = judged.sum(1, keepdim=True)
    mean = rewards.nansum(1, keepdim=True) / n.clamp(min=1)
    square = torch.where(judged, (rewards - mean) ** 2, 0.0).sum(1, keepdim=True)
    return mean, (square / (n - 1).clamp(min=1)).sqrt()


def beta_weights(p: Tensor, all_p: Tensor) -> Tensor:
    """BNPO's normaliser 1 / BetaPdf(p; alpha, beta) (2506.02864, reference code).

    p (P, 1) group means in [0, 1]; all_p (Q,) the means of all prompts of the global batch, whose
    moments give a, b by the method of moments, alpha = max(1, 1 + a/3), beta = max(1, 1 + b/3).
    Where no Beta fits (one prompt, no variance) the weight is 1; at most 1e6.
    """
    m, v = all_p.mean(), all_p.var(correction=min(1, len(all_p) - 1))
    if len(all_p) < 2 or v < 1e-8 or m * (1 - m) <= 0:
        return torch.ones_like(p)
    c = m * (1 - m) / v - 1
    alpha, beta = (1 + c * m / 3).clamp(min=1), (1 + c * (1 - m) / 3).clamp(min=1)
    log_pdf = (torch.special.xlogy(alpha - 1, p) + torch.special.xlogy(beta - 1, 1 - p)
               - torch.lgamma(alpha) - torch.lgamma(beta) + torch.lgamma(alpha + beta))
    return torch.exp(-log_pdf).clamp(max=1e6)


def advantages(rewards: Tensor, scale: str, bounds: tuple[float, float] = (0.0, 1.0),
               all_p: Tensor | None = None) -> Tensor:
    """Advantage of each answer, (P, G) -> (P, G); failed judgements (NaN) get 0.

    group: (r - mean) / (std + eps) (GRPO); none: r - mean (Dr.GRPO); beta: (r - p) /
    BetaPdf(p; alpha, beta) (BNPO) on rewards mapped from `bounds` to [0, 1], with `all_p` the
    group means, so mapped, of all prompts of the global batch.
    """
    if scale == "beta":
        rewards = to_unit(rewards, bounds)
    mean, std = group_moments(rewards)
    centred = rewards - mean
    if scale == "group":
        centred = centred / (std + STD_EPS)
    if scale == "beta":
        centred = centred * beta_weights(mean, mean[:, 0] if all_p is None else all_p)
    return centred.nan_to_num(0.0).float()


def to_unit(rewards: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Rewards mapped affinely from the task's declared bounds to [0, 1]."""
    low, high = bounds
    return ((rewards - low) / (high - low)).clamp(0.0, 1.0)


# ---- The loss: pure functions ---------------------------------------------------------------


def surrogate(logps: Tensor, old_logps: Tensor, advantage: Tensor, clip_low: float,
              clip_high: float) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A) per token, all (K,). At ratio 1 its
    gradient is the policy gradient -A grad log pi."""
    ratio = torch.exp(logps - old_logps)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Sampled estimate of KL(pi || ref) per token: exp(d) - d - 1, d = ref_logp - logp, (K,).

    Its value agrees with the exact KL on average over on-policy samples. Its pathwise gradient
    does not: it is that of the reverse direction KL(ref || pi); `--kl exact` has the true one.
    """
    d = ref_logps - logps
    return torch.exp(d) - d - 1


def token_weights(aggregate: str, lengths: Tensor, n_sequences: float, n_tokens: float,
                  max_new_tokens: int) -> Tensor:
    """Weight of every token of each answer, (N,), so that loss = sum_i w_i sum_t l_it.

    lengths (N,) counts an answer's own loss tokens; n_sequences and n_tokens are global.
    sequence: mean over sequences of token means; length: / (sequences x max_new_tokens); tokens:
    / all tokens; sum: mean over sequences of token sums; local: / this rank's tokens, averaged
    over ranks (n_tokens then is that).
    """
    one = torch.ones_like(lengths, dtype=torch.float)
    return {"sequence": lambda: one / (n_sequences * lengths.clamp(min=1)),
            "length": lambda: one / (n_sequences * max_new_tokens),
            "tokens": lambda: one / n_tokens,
            "sum": lambda: one / n_sequences,
            "local": lambda: one / n_tokens}[aggregate]()


# ---- One step: rollouts, then the update ----------------------------------------------------


@dataclass
class Judged:
    """One round's rollout on this rank, its rewards and which of its prompts train."""
    rollout: Rollout
    rewards: Tensor                 # (P, G) the task's reward, NaN where judging failed
    shaped: Tensor                  # (P, G) with the overlong term
    order: list[int]                # global place of each of its prompts in the step
    rows: list[dict]
    keep: list[int] = None          # prompts (indices into this rollout) that train


class Prompts:
    """The task's RL prompts in an endless order that depends on the seed alone."""

    def __init__(self, rows: list[dict], seed: int):
        self.rows, self.seed, self.cursor = rows, seed, 0

    def next(self, n: int) -> list[dict]:
        taken = []
        for _ in range(n):
            epoch, place = divmod(self.cursor, len(self.rows))
            order = list(range(len(self.rows)))
            random.Random(key_seed(self.seed, "prompts", epoch)).shuffle(order)
            taken.append(self.rows[order[place]])
            self.cursor += 1
        return taken


def play(agent: Agent, task, rows: list[dict], places: list[int], args, algorithm: Algorithm,
         key: tuple) -> tuple[Judged | None, float, float]:
    """Roll out and judge this rank's share of a round; (result, rollout seconds, judge seconds)."""
    if not rows:
        return None, 0.0, 0.0
    began = time.time()
    prompts = [agent.encoder.encode(row, prompt=True) for row in rows]
    out = rollout(agent, prompts, args.group_size, args.max_new_tokens or task.max_new_tokens,
                  args.temperature, [key_seed(*key, place, row["id"])
                                     for place, row in zip(places, rows)])
    rolled = time.time()
    each = [row for row in rows for _ in range(args.group_size)]
    rewards = [task.reward(reply) for reply in task.judge(each, out.texts)]
    rewards = torch.tensor([math.nan if r is None else r for r in rewards])
    shaped = rewards
    if algorithm.overlong:
        shaped = rewards + overlong_punishment(out.mask.sum(1).cpu(), args.max_new_tokens or
                                               task.max_new_tokens)
    shape = (len(rows), args.group_size)
    return (Judged(out, rewards.view(shape), shaped.view(shape), places, rows),
            rolled - began, time.time() - rolled)


def collect(agent: Agent, task, prompts: Prompts, args, algorithm: Algorithm, step: int):
    """The step's judged rollouts on this rank, with dynamic sampling, and its figures.

    Dynamic sampling keeps groups whose task reward (before the overlong term) varies and refills
    up to REFILLS more rounds; the same decision on every rank, surplus groups are cut.
    """
    rounds, kept, played, seconds = [], [], 0, [0.0, 0.0]
    for attempt in range(1 + REFILLS * algorithm.dynamic_sampling):
        rows = prompts.next(args.prompts)
        mine = list(range(rank(), len(rows), world_size()))
        judged, *spent = play(agent, task, [rows[i] for i in mine], [played + i for i in mine],
                              args, algorithm, (args.seed, "rl", step, attempt))
        seconds = [a + b for a, b in zip(seconds, spent)]
        played += len(rows)
        varies = {}
        if judged:
            rounds.append(judged)
            std = group_moments(judged.rewards)[1][:, 0]
            varies = {p: bool(s > 1e-8) for p, s in zip(judged.order, std)}
        varies = gather(varies)
        kept += [p for p in sorted(varies) if varies[p] or not algorithm.dynamic_sampling]
        if len(kept) >= args.prompts:
            break
    if algorithm.dynamic_sampling and len(kept) < args.prompts:
        say(f"note: step {step}: {played} groups played, {len(kept)} of {args.prompts} wanted vary")
    kept = kept[:args.prompts]
    for judged in rounds:
        judged.keep = [i for i, p in enumerate(judged.order) if p in kept]
    return rounds, kept, played, seconds


def update(agent: Agent, reference, optimizer, run: Run, rounds: list[Judged], kept: list[int],
           args, algorithm: Algorithm, task, tokens_at_once: int = 32768) -> dict[str, float]:
    """Inner epochs x minibatches of optimiser steps on the kept groups; global figures.

    Denominators are counted over all ranks once per optimiser step, before any backward. Micro-
    batches are whole groups, so a prompt is one pass of the policy for its G answers.
    """
    bias = agent.token_bias if agent.space == "token" else None
    max_new = args.max_new_tokens or task.max_new_tokens
    means = gather({p: to_unit(r, task.bounds).nanmean().item() for j in rounds
                    for p, r in zip(j.order, j.shaped) if p in kept})
    all_p = torch.tensor([means[p] for p in sorted(means) if not math.isnan(means[p])])
    figures, first_error, norms = torch.zeros(5, dtype=torch.double), None, []
    device = agent.device
    for epoch in range(args.inner_epochs):
        for minibatch in range(args.minibatches):
            at = [len(kept) * k // args.minibatches for k in (minibatch, minibatch + 1)]
            chosen = set(kept[slice(*at)])               # consecutive: spread over the ranks
            parts = []                                   # (rollout, advantages, loss mask)
            for j in rounds:
                index = [i for i in j.keep if j.order[i] in chosen]
                per = max(1, tokens_at_once // max(1, j.rollout.tokens.shape[1] * args.group_size))
                for piece in (index[i:i + per] for i in range(0, len(index), per)):
                    sub = j.rollout.select(piece)
                    judged = ~j.shaped[piece].isnan().view(-1).to(device)
                    A = advantages(j.shaped[piece], algorithm.scale, task.bounds, all_p)
                    parts.append((sub, A.view(-1).to(device), sub.mask & judged[:, None]))
            counts = all_sum(torch.tensor([sum(int(m.any(1).sum()) for *_, m in parts),
                                           sum(int(m.sum()) for *_, m in parts)]))
            if not counts[1]:    # no step: AdamW's momentum alone would move the policy
                continue
            n_sequences, n_tokens = counts.tolist()
            if algorithm.aggregate == "local":
                n_tokens = max(1, sum(int(m.sum()) for *_, m in parts)) * world_size()
            for sub, A, mask in parts:
                if not mask.any():
                    continue
                with agent.autocast():
                    h = replay(agent.policy, sub)[mask]
                    ref_h = None
                    if reference is not None:
                        with torch.no_grad():
                            ref_h = replay(reference, sub)[mask]
                    logps, entropy, ref_logps, exact = action_statistics(
                        agent.policy, h, sub.actions[mask], args.temperature, bias, reference,
                        ref_h)
                which = mask.nonzero()[:, 0]
                loss = surrogate(logps, sub.logps[mask], A[which], algorithm.clip_low,
                                 algorithm.clip_high)
                kl = torch.zeros_like(logps)
                if reference is not None:
                    kl = exact if args.kl == "exact" else k3(logps, ref_logps)
                    loss = loss + algorithm.beta * kl
                weights = token_weights(algorithm.aggregate, mask.sum(1), n_sequences, n_tokens,
                                        max_new)
                loss = (loss * weights[which]).sum()
                loss.backward()
                log_ratio = (logps - sub.logps[mask]).detach()
                clipped = (log_ratio.exp() < 1 - algorithm.clip_low) \
                    | (log_ratio.exp() > 1 + algorithm.clip_high)
                figures += torch.stack([entropy.sum(), kl.sum(), clipped.sum(), mask.sum(),
                                        loss]).detach().cpu()
                if not norms:                            # nothing has been updated yet
                    first_error = max(first_error or 0.0, log_ratio.abs().max().item())
            ids = [row["id"] for j in rounds for row in j.rows]
            norms.append(optimizer_step(run, [optimizer], ids))
    figures = all_sum(figures)
    entropy, kl, clipped = (figures[:3] / figures[3].clamp(min=1)).tolist()
    loss_sum = figures[4].item()
    errors = gather({rank(): first_error or 0.0})
    if max(errors.values()) > RATIO_TOLERANCE[agent.dtype]:
        raise AssertionError(f"ratio is not 1 before the first update: {errors}; the rollout and "
                             "the update disagree")
    return {"loss": loss_sum / max(1, len(norms)), "kl": kl, "entropy": entropy,
            "clip_fraction": clipped, "grad_norm": norms[-1] if norms else 0.0,
            "ratio_error": max(errors.values())}


def step_figures(agent: Agent, rounds: list[Judged], kept: list[int], played: int) -> dict:
    """Reward, variance, length, code and text diversity of everything rolled out this step."""
    n = agent.policy.head.out_features
    sums = torch.zeros(8, dtype=torch.double)
    codes = torch.zeros(n if agent.space == "latent" else 1, dtype=torch.double)
    for j in rounds:
        judged = j.rewards[~j.rewards.isnan()]
        groups = [j.rollout.texts[i:i + j.rollout.group]
                  for i in range(0, len(j.rollout.texts), j.rollout.group)]
        sums += torch.tensor([
            judged.sum(), (judged ** 2).sum(), len(judged), j.rewards.isnan().sum(),
            (group_moments(j.rewards)[1] <= 1e-8).sum(), j.rollout.mask.sum(),
            sum(len(set(g)) / len(g) for g in groups), (~j.rollout.finished).sum()])
        if agent.space == "latent":
            codes += torch.bincount(j.rollout.actions[j.rollout.mask], minlength=n).cpu()
    total, squares, n_judged, failed, flat, length, distinct, cut = all_sum(sums).tolist()
    n_judged = max(1.0, n_judged)
    mean, answers = total / n_judged, n_judged + failed
    figures = {"reward_mean": mean,
               "reward_std": math.sqrt(max(0.0, squares / n_judged - mean ** 2)),
               "zero_variance": flat / played, "groups": len(kept), "groups_played": played,
               "judge_failed": int(failed), "length": length / answers, "unfinished": cut / answers,
               "distinct_answers": distinct / played, "tokens": int(length)}
    return figures | (tasks.code_usage(all_sum(codes)) if agent.space == "latent" else {})


def main(args):
    algorithm = resolve_algorithm(args)
    parent = train_bc.ensure(args, stage="sft", action_space=args.action_space, sft=args.sft)
    if args.model == "tiny":
        torch.set_num_threads(1)              # single tokens of this size only lose time to threads
    agent = Agent.from_base(args).load_run(parent, skip=("idm",))
    if agent.policy is None or agent.space != args.action_space:
        raise UserError(f"{parent} has no policy in {args.action_space} space; RL starts from an "
                        "sft-* run")
    if read_config(parent)["derived"].get("task_hash") != tasks.task_hash(args):
        raise UserError(f"--task {args.task} has changed since {parent} was trained on it; redo "
                        "that run (--fresh)")
    agent.min_p = args.min_p
    task = tasks.load_task(args)
    if not task.splits["rl"]:
        raise UserError(f"--task {args.task}: no prompts to train on (split rl)")
    folder = folder_of(args, f"rl-{task_tag(args.task)}-{args.algo}-{args.action_space}"
                             f"-s{args.seed}", args.name)
    run = Run(args, folder, "train_rl.py", parent, space=args.action_space,
              algorithm=vars(algorithm), base=agent.base_hash, mini=tasks.mini_hash(),
              task_hash=tasks.task_hash(args))
    if run.finished:
        return
    initial = copy.deepcopy(agent.policy)                     # the start, and the KL's reference
    reference = initial if algorithm.beta > 0 else None
    modules = agent.train_only("policy")
    betas = (0.9, 0.95 if args.model == "tiny" else 0.999)
    optimizer = torch.optim.AdamW(agent.policy.parameters(), betas=betas, weight_decay=0.0)
    prompts = Prompts(task.splits["rl"], args.seed)
    for step in run.steps(args.steps, modules, [optimizer], {"prompts": prompts}):
        rounds, kept, played, (t_rollout, t_judge) = collect(agent, task, prompts, args, algorithm,
                                                             step)
        rolled = time.time()
        lr = args.lr * min(1.0, (step + 1) / 5)
        set_lr(optimizer, lr)
        figures = step_figures(agent, rounds, kept, played)
        tokens = figures.pop("tokens")
        if kept:      # else AdamW's momentum alone would move the policy
            figures |= update(agent, reference, optimizer, run, rounds, kept, args, algorithm, task)
        t_update = time.time() - rolled
        run.log({"step": step, **figures, "lr": lr, "seconds_rollout": t_rollout,
                 "seconds_judge": t_judge, "seconds_update": t_update,
                 "tokens_per_second": tokens / (t_rollout + t_judge + t_update)},
                f"reward {figures['reward_mean']:.3f} distinct {figures['distinct_answers']:.2f}")
        if rounds and (step + 1) % args.save_every == 0:
            shown = rounds[0]
            run.sample([{"step": step, "prompt": shown.rows[0]["messages"][:-1], "answer": text,
                         "reward": None if math.isnan(reward) else reward} for text, reward in
                        zip(shown.rollout.texts, shown.rewards[0].tolist())])
    wanted = args.splits if args.splits is not None else \
        ["id", "ood"] if args.model == "tiny" else ["valid"]
    splits = {name: task.splits[name] for name in wanted if task.splits[name]}
    if splits:
        say(f"evaluating the start and the trained policy on {sum(map(len, splits.values()))} "
            "fixed prompts")
        trained, agent.policy = agent.policy, initial
        _, before = tasks.evaluate(agent.eval(), task, splits, args.seed)
        agent.policy = trained
        _, after = tasks.evaluate(agent.eval(), task, splits, args.seed)
        run.report("reward", tasks.gain_table(task, before, after))
    run.finish(modules)


if __name__ == "__main__":
    launch(main, arguments())
