"""Stage 3: reinforcement learning of the policy over latent actions (or tokens, the baseline).

Paper, section 4. A rollout takes a_t ~ pi(. | s_1..s_t) and x_{t+1} = argmax f_world(s_t, a_t)
until the end of turn; the judge's reward r of the finished text trains the policy's layers, norm
and head, and nothing else. Per token, with ratio rho = pi(a_t) / pi_old(a_t) and advantage A:

    loss = -min(rho A, clip(rho, 1 - low, 1 + high) A) + beta KL(pi || pi_start)     (KL: `k3`)

GRPO, Dr.GRPO, DAPO and BNPO are rows of one table, ALGORITHMS. Every entry is a flag, so an
ablation is a flag and a new algorithm is a row. DAPO in full: A = (r' - mean) / std of a group,
r' = r + overlong term; low .2, high .28; the loss is averaged over all tokens of the step; groups
whose r are equal are replaced by new ones.

Deviations: (1) the rows are the algorithms' own papers; `*_released` are what the release ran under
these names; (2) actions are sampled and scored on the same support and temperature (release: top-32
sampled, all 128 scored); (3) updates and reference run on the states that the rollout kept; (4)
failed judgements are masked out of statistics, loss and denominators (release: averaged in as 0);
(5) DAPO averages over the global batch, as its reference code does, and trains on what it has at
the refill limit; BNPO is without dual clip; GRPO's KL weighs .01, as in the release (its paper:
.04); (6) 5 steps of warm-up, and beta2 = .95 for `tiny`.

    torchrun train_rl.py --algo dapo                      # CPU or one GPU, embedded default
    torchrun train_rl.py --algo grpo --action-space token # the token-level baseline
    torchrun --nproc-per-node 8 train_rl.py --model Qwen/Qwen2.5-VL-3B-Instruct --task my.jsonl
"""

import argparse
import copy
import math
import random
import time
from dataclasses import dataclass

import train_bc
from eval import (SPLITS, choose_splits, evaluate, gain_table, load_task, task_data, task_flags,
                  write_page)
from model import (LOGITS_AT_ONCE, Agent, CausalStack, Group, Run, UserError, all_sum, code_usage,
                   count, fill, folder_of, format_table, gather, in_chunks, key_seed, launch,
                   make_parser, optimizer_step, pack, positive, predecessor, rank, replay, rollout,
                   say, set_threads, world_size)
from train_projector import data_of

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Algorithm:
    """One row: how advantages are scaled, ratios clipped and token losses aggregated."""
    scale: str                      # group, none or beta (`advantages`)
    clip: tuple[float, float]       # low, high: the ratio stays in [1 - low, 1 + high]
    aggregate: str                  # sequence, length, tokens, sum or local (`token_weights`)
    beta: float = 0.0               # weight of the KL to the starting policy
    extras: tuple[str, ...] = ()    # dynamic-sampling: replace groups of equal rewards;
                                    # overlong: soft punishment of overlong answers


ALGORITHMS = {
    "grpo": Algorithm("group", (0.2, 0.2), "sequence", beta=0.01),                  # 2402.03300
    "dr_grpo": Algorithm("none", (0.2, 0.2), "length"),                             # 2503.20783
    "dapo": Algorithm("group", (0.2, 0.28), "tokens",      # GRPO's advantage       # 2503.14476
                      extras=("dynamic-sampling", "overlong")),
    "bnpo": Algorithm("beta", (0.2, 0.28), "sum"),                                  # 2506.02864
    "grpo_released": Algorithm("group", (0.2, 0.2), "sequence", beta=0.01),
    "dr_grpo_released": Algorithm("group", (0.2, 0.2), "length", beta=0.01),
    "dapo_released": Algorithm("group", (0.2, 0.2), "tokens", beta=0.01),
    "bnpo_released": Algorithm("group", (0.2, 0.2), "local", beta=0.01),
}
SCALES = ("group", "none", "beta")
AGGREGATES = ("sequence", "length", "tokens", "sum", "local")
EXTRAS = ("dynamic-sampling", "overlong")
TINY = {"steps": 30, "lr": 4e-4, "inner_epochs": 2, "splits": ["id", "ood"]}
FULL = {"steps": 100, "lr": 1e-6, "inner_epochs": 1, "splits": ["valid"]}
DEFAULTS = {"latent": {"tiny": TINY, "full": FULL},
            "token": {"tiny": {**TINY, "lr": 2.5e-4}, "full": FULL}}
REFILLS = 3                         # rounds of dynamic sampling beyond the first
STD_EPS = 1e-4                      # added to the group's standard deviation
WARMUP = 5                          # steps
SAMPLE_EVERY = 20                   # steps between rows of samples.jsonl


def arguments() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, DEFAULTS)
    rows = {name: vars(row) for name, row in ALGORITHMS.items()}
    parser.epilog += "\n\n" + format_table("--algo", rows)
    task_flags(parser)
    add = parser.add_argument_group("algorithm, and what replaces its entries").add_argument
    add("--algo", default="grpo", choices=tuple(ALGORITHMS), help="(default: grpo)")
    add("--scale", choices=SCALES, help="of the advantage")
    add("--clip", nargs=2, type=float, metavar=("LOW", "HIGH"), help="of the ratio")
    add("--aggregate", choices=AGGREGATES,
        help="of token losses: mean over sequences of token means, of sums / longest allowed "
        "length, or of sums; mean over all tokens, or over each rank's")
    add("--beta", type=float, help="weight of the KL to the starting policy")
    add("--extras", nargs="*", choices=EXTRAS, help="(none: neither)")
    add = parser.add_argument_group("this stage").add_argument
    add("--action-space", default="latent", choices=("latent", "token"), help="(default: latent)")
    add("--prompts", type=count, default=8, help="a step over all ranks (default: 8)")
    add("--group-size", type=count, default=8, help="answers a prompt, G (default: 8)")
    add("--max-new-tokens", type=count, help="longest answer (default: the task's)")
    add("--temperature", type=positive, default=1.0, help="of sampling and scoring (default: 1)")
    add("--inner-epochs", type=count, help="passes over each rollout; from two on the clip acts")
    add("--splits", nargs="*", choices=SPLITS, help="evaluated before and after; tune on valid")
    return parser


def fill_algorithm(args, ranks: int = 1):
    """Fill what the flags leave open from the table's row; refuse impossible combinations."""
    for name, value in vars(ALGORITHMS[args.algo]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    unknown = {args.scale, args.aggregate, *args.extras} - {*SCALES, *AGGREGATES, *EXTRAS}
    if unknown:
        raise UserError(f"ALGORITHMS: {args.algo} has {', '.join(sorted(unknown))}, none of "
                        f"{', '.join(SCALES + AGGREGATES + EXTRAS)}")
    if args.prompts < ranks:
        raise UserError(f"--prompts {args.prompts} is less than the {ranks} ranks; raise it")


# ---- Rewards and advantages of P prompts with G answers each: pure functions ------------------


def overlong_punishment(lengths: Tensor, limit: int, cache_share: float = 0.2) -> Tensor:
    """Soft overlong punishment (DAPO, eq. 13), lengths (N,) in tokens -> (N,) in [-1, 0].

    0 up to limit - cache, then linear down to -1 at the limit; cache = cache_share * limit.
    """
    cache = cache_share * limit
    return ((limit - cache - lengths) / cache).clamp(-1.0, 0.0)


def group_moments(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased deviation of each group over its judged answers: (P, G) -> (P, 1) each.

    NaN marks a failed judgement. Fewer than two judged answers have deviation 0."""
    rewards = rewards.double()          # in fp32 rounding would give equal rewards a deviation
    n = (~rewards.isnan()).sum(1, keepdim=True)
    mean = rewards.nansum(1, keepdim=True) / n.clamp(min=1)
    square = ((rewards - mean) ** 2).nansum(1, keepdim=True)
    return mean, (square / (n - 1).clamp(min=1)).sqrt()


def varies(rewards: Tensor) -> bool:
    """Whether a group's rewards (G,) differ, so that not all its advantages are 0."""
    return group_moments(rewards[None])[1].item() > 1e-8


def beta_weights(p: Tensor, all_p: Tensor) -> Tensor:
    """BNPO's normaliser 1 / BetaPdf(p; alpha, beta) (2506.02864, reference code).

    p (P, 1) group means in [0, 1]; all_p (Q,) the means of all prompts of the global batch, whose
    mean m and variance v give a = c m and b = c (1 - m), c = m (1 - m) / v - 1 (the method of
    moments); alpha = max(1, 1 + a/3), beta = max(1, 1 + b/3).
    Where no Beta fits (one prompt, no variance) the weight is 1; at most 1e6.
    """
    m, v = all_p.mean(), all_p.var(correction=min(1, len(all_p) - 1))
    if len(all_p) < 2 or v < 1e-8 or m * (1 - m) <= 0:
        return torch.ones_like(p)
    c = m * (1 - m) / v - 1
    alpha, beta = (1 + c * m / 3).clamp(min=1), (1 + c * (1 - m) / 3).clamp(min=1)
    return torch.exp(-torch.distributions.Beta(alpha, beta).log_prob(p)).clamp(max=1e6)


def advantages(rewards: Tensor, scale: str, bounds: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """Advantage of each answer of the global batch, (P, G) -> (P, G); 0 where judging failed (NaN).

    group: (r - mean) / (std + eps) (GRPO); none: r - mean (Dr.GRPO); beta: (r - p) /
    BetaPdf(p; alpha, beta) (BNPO) on rewards mapped from `bounds` to [0, 1].
    """
    if scale == "beta":
        low, high = bounds
        rewards = ((rewards - low) / (high - low)).clamp(0.0, 1.0)
    mean, std = group_moments(rewards)
    A = rewards - mean
    if scale == "group":
        A = A / (std + STD_EPS)
    if scale == "beta":
        all_p = rewards.nanmean(1)
        A = A * beta_weights(mean, all_p[~all_p.isnan()])
    return A.nan_to_num(0.0).float()


# ---- The loss: pure functions ---------------------------------------------------------------


def action_logprobs(agent: Agent, policy: CausalStack, h: Tensor, actions: Tensor,
                    temperature=1.0, chunk=LOGITS_AT_ONCE) -> tuple[Tensor, Tensor]:
    """Log-prob of each action and entropy of its distribution, (K,) fp32 each, under the agent's
    own or the reference policy, whose normed hidden states are h (K, d); actions (K,) and the
    temperature that sampled them. At most `chunk` logits exist at a time."""
    def piece(h, actions):
        logits = agent.action_logits(h, policy) / temperature               # (K, actions)
        logps = F.log_softmax(logits, -1)
        # Detached: at an action of probability 0 its gradient is 0 x inf.
        entropy = torch.special.entr(logps.detach().exp()).sum(-1)
        return torch.stack([logps.gather(1, actions[:, None])[:, 0], entropy], -1)
    return in_chunks(piece, chunk // policy.head.out_features, h, actions).unbind(-1)


def answer_logprobs(agent: Agent, policy: CausalStack, group: Group, mask: Tensor,
                    temperature: float) -> tuple[Tensor, Tensor]:
    """`action_logprobs` at the K tokens of a group's answers that the mask (G, T) marks."""
    with agent.autocast():
        h = replay(policy, group)[mask]                                     # (K, d)
        return action_logprobs(agent, policy, h, group.actions[mask], temperature)


def surrogate(logps: Tensor, old_logps: Tensor, advantage: Tensor, clip_low: float,
              clip_high: float) -> tuple[Tensor, Tensor]:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A) per token, and where the clip removes its
    gradient (the ratio has left on the advantage's side), all (K,). At ratio 1 the gradient is the
    policy gradient -A grad log pi."""
    ratio = torch.exp(logps - old_logps)
    free, clipped = ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    return -torch.minimum(free, clipped), clipped < free


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Sampled estimate of KL(pi || ref) per token: exp(d) - d - 1, d = ref_logp - logp, (K,).

    Its value agrees with the exact KL on average over on-policy samples. Its pathwise gradient
    does not: it is that of the reverse direction KL(ref || pi).
    """
    d = ref_logps - logps
    return torch.exp(d) - d - 1


def token_weights(aggregate: str, lengths: Tensor, n_sequences: float, n_tokens: float,
                  max_new_tokens: int) -> Tensor:
    """Weight of every token of each answer, (N,), so that loss = sum_i w_i sum_t l_it.

    lengths (N,) counts an answer's own loss tokens; n_sequences and n_tokens are global.
    sequence: mean over sequences of token means; length: / (sequences x max_new_tokens); tokens:
    / all tokens; sum: mean over sequences of token sums; local: / this rank's own tokens, averaged
    over ranks (n_tokens is own tokens x ranks).
    """
    one = torch.ones_like(lengths, dtype=torch.float)
    return {"sequence": one / (n_sequences * lengths.clamp(min=1)),
            "length": one / (n_sequences * max_new_tokens),
            "tokens": one / n_tokens,
            "sum": one / n_sequences,
            "local": one / n_tokens}[aggregate]


# ---- One step: rollouts, then the update ----------------------------------------------------


class Prompts:
    """The task's RL prompts in an endless order that depends on the seed alone."""

    def __init__(self, rows: list[dict], seed: int):
        self.rows, self.seed, self.cursor, self.epoch = rows, seed, 0, None
        self.varied = False             # did any group's rewards differ? Here, to be checkpointed

    def state_dict(self) -> dict:
        return {"cursor": self.cursor, "varied": self.varied}

    def load_state_dict(self, state: dict):
        self.cursor, self.varied = state["cursor"], state["varied"]

    def next(self) -> dict:
        epoch, place = divmod(self.cursor, len(self.rows))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, list(range(len(self.rows)))
            random.Random(key_seed(self.seed, "prompts", epoch)).shuffle(self.order)
        self.cursor += 1
        return self.rows[self.order[place]]


def play(agent: Agent, task, rows: dict[int, dict], args, *key) -> dict[int, Group]:
    """Roll out and judge this rank's rows, place -> row, at most --tokens-at-once in a batch:
    place -> group. A place numbers a prompt within the step, over ranks and refills; what is
    sampled is keyed by `key` and the place, so it depends on neither ranks nor batches."""
    places, groups, G = list(rows), {}, args.group_size
    prompts = [agent.encoder.encode(row, prompt=True) for row in rows.values()]
    for part in pack(prompts, G, task.max_new_tokens, args.tokens_at_once):
        chosen = [places[i] for i in part]
        seeds = [key_seed(*key, place, rows[place]["id"]) for place in chosen]
        groups |= zip(chosen, rollout(agent, [prompts[i] for i in part], G, task.max_new_tokens,
                                      args.temperature, seeds))
    judged_rows, texts = [], []
    for place, group in groups.items():
        judged_rows += [rows[place]] * G
        texts += group.texts
    rewards = [task.reward(reply) for reply in task.judge(judged_rows, texts)]
    for group, row in zip(groups.values(), torch.tensor(rewards).view(-1, G)):
        group.rewards = row
    return groups


def collect(agent: Agent, task, prompts: Prompts, args,
            step: int) -> tuple[dict[int, Group], dict[int, dict], list[int]]:
    """Rollouts of a step: this rank's groups by place; `records` of all ranks' groups by place (id,
    prompt, texts; rewards, lengths, finished, (G,) each; counts of the actions); and the places
    whose groups train.

    Dynamic sampling trains on groups whose task reward (before the overlong term) varies and plays
    up to REFILLS more rounds until they are enough. Every rank decides the same from the records.
    """
    groups, records, dynamic = {}, {}, "dynamic-sampling" in args.extras
    for attempt in range(1 + REFILLS * dynamic):
        rows = {len(records) + i: prompts.next() for i in range(args.prompts)}
        local = {place: row for place, row in rows.items() if place % world_size() == rank()}
        played = play(agent, task, local, args, args.seed, "rl", step, attempt)
        local_records = {}
        for place, group in played.items():
            actions = torch.bincount(group.actions[group.mask],
                                     minlength=agent.policy.head.out_features)
            local_records[place] = {
                "id": rows[place]["id"], "prompt": rows[place]["messages"][:-1],
                "texts": group.texts, "rewards": group.rewards, "actions": actions.cpu(),
                "lengths": group.mask.sum(1).cpu(), "finished": group.finished.cpu()}
        groups |= played
        records |= gather(local_records)
        varied = [place for place in sorted(records) if varies(records[place]["rewards"])]
        kept = varied if dynamic else sorted(records)
        if len(kept) >= args.prompts:
            break
    prompts.varied |= len(varied) > 0
    return groups, records, kept[:args.prompts]


def update(agent: Agent, reference: CausalStack | None, optimizer, lr: float, run: Run,
           groups: dict[int, Group], records: dict[int, dict], kept: list[int], args, task) -> dict:
    """An optimiser step on the kept groups for each inner epoch -> figures over all ranks. No step
    and no figures if no token counts, or if all advantages are 0 and there is no KL term: AdamW's
    momentum alone would move the policy. K is the number of a group's loss tokens."""
    if not kept:
        return {}
    rewards = torch.stack([records[place]["rewards"] for place in kept])                  # (P, G)
    if "overlong" in args.extras:
        lengths = torch.stack([records[place]["lengths"] for place in kept])
        rewards = rewards + overlong_punishment(lengths, task.max_new_tokens)
    A = advantages(rewards, args.scale, task.bounds)                                    # (P, G)
    parts, tokens, sequences = [], 0, 0             # of this rank: (group, its A, its loss mask)
    for place, advantage in zip(kept, A):
        if place in groups:
            judged = ~groups[place].rewards.isnan()
            mask = groups[place].mask & judged[:, None].to(agent.device)                # (G, T)
            parts.append((groups[place], advantage.to(agent.device), mask))
            tokens += int(mask.sum())
            sequences += int(mask.any(1).sum())
    # Denominators over all ranks, before any backward.
    n = all_sum({"sequences": sequences, "tokens": tokens})
    if not n["tokens"] or (reference is None and not A.any()):
        return {}
    n_tokens = max(1, tokens) * world_size() if args.aggregate == "local" else n["tokens"]
    totals = dict.fromkeys(("loss", "kl", "entropy", "clip_fraction", "ratio_error"), 0.0)
    old = {}                                        # part -> log-probs of the first pass
    for _ in range(args.inner_epochs):
        for i, (group, advantage, mask) in enumerate(parts):
            logps, entropy = answer_logprobs(agent, agent.policy, group, mask, args.temperature)
            old_logps = old.setdefault(i, logps.detach())       # the first ratio is 1
            answer = mask.nonzero()[:, 0]           # which of the G answers a token is in: (K,)
            losses, clipped = surrogate(logps, old_logps, advantage[answer], *args.clip)  # (K,)
            kl = torch.zeros_like(logps)
            if reference is not None:
                with torch.no_grad():
                    ref_logps, _ = answer_logprobs(agent, reference, group, mask, args.temperature)
                kl = k3(logps, ref_logps)
            weights = token_weights(args.aggregate, mask.sum(1), n["sequences"], n_tokens,
                                    task.max_new_tokens)                                # (G,)
            loss = ((losses + args.beta * kl) * weights[answer]).sum()
            loss.backward()
            totals["loss"] += loss.detach()
            totals["kl"] += kl.detach().sum() / n["tokens"]
            totals["entropy"] += entropy.detach().sum() / n["tokens"]
            totals["clip_fraction"] += clipped.sum() / n["tokens"]
            totals["ratio_error"] += (old_logps - group.logps[mask]).abs().sum() / n["tokens"]
        norm = optimizer_step(run, [optimizer], [lr], [records[place]["id"] for place in kept])
    figures = {name: total / args.inner_epochs for name, total in all_sum(totals).items()}
    return {**figures, "grad_norm": norm}


def step_figures(records: dict[int, dict], space: str) -> dict[str, float]:
    """Reward, variance, length, code and text diversity of all groups of a step's rollouts."""
    def stacked(name):                                                          # (P, ...)
        return torch.stack([record[name] for record in records.values()]).double()
    rewards = stacked("rewards")
    judged = rewards[~rewards.isnan()]              # never empty, see `main`
    distinct = [len(set(record["texts"])) / len(record["texts"]) for record in records.values()]
    figures = {"reward_mean": judged.mean().item(), "reward_std": judged.std(correction=0).item(),
               "zero_variance": sum(not varies(row) for row in rewards) / len(rewards),
               "groups_played": len(records), "judge_failed": rewards.numel() - len(judged),
               "length": stacked("lengths").mean().item(),
               "unfinished": 1 - stacked("finished").mean().item(),
               "distinct_answers": sum(distinct) / len(records)}
    if space == "latent":
        figures |= code_usage(stacked("actions").sum(0))
    return figures


def main(argv=None):
    args = arguments().parse_args(argv)
    fill(args, DEFAULTS[args.action_space])
    fill_algorithm(args, world_size())
    task, data = load_task(args), data_of(args) | task_data(args)
    task.max_new_tokens = args.max_new_tokens = args.max_new_tokens or task.max_new_tokens
    if not task.splits["rl"]:                 # what is wrong with the task comes first
        raise UserError(f"--task {args.task}: no prompts to train on (split rl)")
    warm_start = f"sft-{task.name}-{args.action_space}"
    parent = predecessor(args, data, warm_start, train_bc, "--action-space", args.action_space)
    set_threads(args.model, most=1)     # behind other stages in one process two made it slower
    agent = Agent.from_base(args).load_run(parent, skip=("idm",))
    if agent.policy is None or agent.space != args.action_space:
        raise UserError(f"{parent} has no policy in {args.action_space} space; name an sft-* run")
    task.check(agent.encoder)
    stage = f"rl-{task.name}-{args.algo}-{args.action_space}-s{args.seed}"
    data["judge"] = task.judge.__name__         # another reward is another run
    run = Run(args, folder_of(args, stage, args.name), agent, data, parent)
    if run.finished:
        return
    modules = agent.train_only("policy")
    splits = choose_splits(task, args.splits, args.eval_prompts)
    modes = {"greedy": (0.0, 1), "sampled": (args.temperature, 4)}     # 5 answers to a prompt
    n_prompts = sum(map(len, splits.values()))
    rounds = 1 + REFILLS * ("dynamic-sampling" in args.extras)
    say(f"answers to be judged: at most {rounds * args.steps * args.prompts * args.group_size} in "
        f"training, {2 * n_prompts * 5} in the evaluation before and after")
    # The policy that RL starts from: the KL's reference, and "before" in the evaluation.
    initial = copy.deepcopy(agent.policy).requires_grad_(False) if args.beta or splits else None
    reference = initial if args.beta else None
    betas = (0.9, 0.95 if args.model == "tiny" else 0.999)
    optimizer = torch.optim.AdamW(agent.policy.parameters(), betas=betas, weight_decay=0.0)
    prompts = Prompts(task.splits["rl"], args.seed)
    state = {**modules, "optimizer": optimizer, "prompts": prompts}
    for step in range(run.resume(state), args.steps):
        began = time.time()
        lr = args.lr * min(1.0, (step + 1) / WARMUP)
        groups, records, kept = collect(agent, task, prompts, args, step)
        rewards = torch.cat([record["rewards"] for record in records.values()])
        failed = int(rewards.isnan().sum())
        if failed > len(rewards) / 2:           # before anything is learnt or logged of it
            raise UserError(f"step {step}: {failed} of {len(rewards)} answers could not be judged; "
                            "check the judge, then run the same command again")
        rolled = time.time()
        figures = step_figures(records, agent.space) | {"groups": len(kept)}
        figures |= update(agent, reference, optimizer, lr, run, groups, records, kept, args, task)
        ended = time.time()
        figures |= {"lr": lr, "seconds_rollout": rolled - began, "seconds_update": ended - rolled,
                    "tokens_per_second": figures["length"] * len(rewards) / (ended - began)}
        run.log(step, figures, "reward_mean", "distinct_answers")
        if (step + 1) % SAMPLE_EVERY == 0:
            answers = zip(records[0]["texts"], records[0]["rewards"].tolist())
            run.append("samples.jsonl", [
                {"step": step, "prompt": records[0]["prompt"], "answer": text,
                 "reward": None if math.isnan(reward) else reward} for text, reward in answers])
        run.save(step + 1, state)
    if args.steps and not prompts.varied:
        error = UserError(f"{run.folder}: nothing was learnt: in no group did the answers differ "
                          "in reward; the weights are those it started from")
        error.status = 3
        raise error
    if splits:
        say(f"evaluating the start and the trained policy on {n_prompts} fixed prompts")
        agent.policy = initial
        _, before = evaluate(agent.eval(), task, splits, args.seed, args.tokens_at_once, modes)
        agent.policy = modules["policy"]
        _, after = evaluate(agent.eval(), task, splits, args.seed, args.tokens_at_once, modes)
        gains = gain_table(task, before, after)
        run.report("reward", gains)
        say(f"one prompt ({before[0]['id']}): {before[0]['prompt'][-1]['content']}",
            f"before: {before[0]['answers'][0]}", f"after: {after[0]['answers'][0]}",
            f"reference: {before[0]['reference']}", sep="\n  ")
        if rank() == 0:
            write_page(run.folder / "report.html", task, run.folder.name, {"reward": gains},
                       {"before": before, "after": after}, run.folder / "log.jsonl")
    run.finish(**modules)
    say(f"next: python eval.py {run.folder} --chat, or with other runs --report page.html")


if __name__ == "__main__":
    launch(main)
