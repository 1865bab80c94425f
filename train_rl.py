"""Stage 3: reinforcement learning of the policy over latent actions (or tokens, the baseline).

Paper, section 4. A rollout takes a_t ~ pi(. | s_1..s_t) and x_{t+1} = argmax f_world(s_t, a_t)
until the end of turn; the judge's reward r of the finished text trains the policy's layers, norm
and head, and nothing else. Per token, with ratio rho = pi(a_t) / pi_old(a_t) and advantage A:

    loss = -min(rho A, clip(rho, 1 - low, 1 + high) A) + beta KL(pi || pi_start)

GRPO, Dr.GRPO, DAPO and BNPO are rows of one table, ALGORITHMS, by their own papers' definitions;
`*_released` are what the release ran under these names. Every entry is a flag, so an ablation is a
flag and a new algorithm is a row. Advantages use the full group; answers whose judging failed are
masked out of statistics, loss and denominators alike, never scored as 0. Deviations: README, rows
4 and 14 to 20.

    torchrun train_rl.py --algo dapo                      # CPU or one GPU, embedded default
    torchrun train_rl.py --algo grpo --action-space token # the token-level baseline
    torchrun --nproc-per-node 8 train_rl.py --model Qwen/Qwen2.5-VL-3B-Instruct --task my.jsonl
"""

import argparse
import copy
import random
import time
from dataclasses import dataclass

import train_bc
from eval import (SPLITS, choose_splits, evaluate, gain_table, load_task, task_data, task_flags,
                  write_page)
from model import (LOGITS_AT_ONCE, Agent, CausalStack, Rollout, Run, UserError, all_sum, code_usage,
                   count, fill, folder_of, format_table, gather, in_chunks, key_seed, launch,
                   make_parser, optimizer_step, pack, positive, predecessor, rank, replay, rollout,
                   say, world_size)
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
    extras: tuple[str, ...] = ()    # dynamic-sampling: refill groups without variance;
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
TINY = {"steps": 30, "lr": 2e-4, "inner_epochs": 2, "splits": ["id", "ood"]}
FULL = {"steps": 100, "lr": 1e-6, "inner_epochs": 1, "splits": ["valid"]}
DEFAULTS = {"latent": {"tiny": TINY, "full": FULL},
            "token": {"tiny": {**TINY, "lr": 1.25e-4}, "full": FULL}}
REFILLS = 3                         # rounds of dynamic sampling beyond the first
STD_EPS = 1e-4                      # added to the group's standard deviation
WARMUP = 5                          # steps
SAMPLE_EVERY = 20                   # steps between rows of samples.jsonl


def arguments() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, DEFAULTS)
    parser.epilog += "\n\n" + format_table("--algo", {name: vars(row) for name, row in
                                                     ALGORITHMS.items()})
    task_flags(parser)
    add = parser.add_argument_group("algorithm: a row of ALGORITHMS, and what replaces its entries"
                                    ).add_argument
    add("--algo", default="grpo", choices=tuple(ALGORITHMS), help="(default: grpo)")
    add("--scale", choices=("group", "none", "beta"), help="of the advantage")
    add("--clip", nargs=2, type=float, metavar=("LOW", "HIGH"),
        help="of the ratio; acts only where a rollout has several updates")
    add("--aggregate", choices=("sequence", "length", "tokens", "sum", "local"),
        help="of token losses: mean over sequences of token means, of sums / longest allowed "
        "length, or of sums; mean over all tokens, or over each rank's")
    add("--beta", type=float, help="weight of the KL to the starting policy")
    add("--extras", nargs="*", choices=("dynamic-sampling", "overlong"), help="none named: neither")
    add = parser.add_argument_group("this stage").add_argument
    add("--action-space", default="latent", choices=("latent", "token"), help="(default: latent)")
    add("--prompts", type=count, default=8, help="a step over all ranks (default: 8)")
    add("--group-size", type=count, default=8, help="answers a prompt, G (default: 8)")
    add("--max-new-tokens", type=count, help="longest answer (default: the task's)")
    add("--temperature", type=positive, default=1.0, help="of sampling and scoring (default: 1)")
    add("--inner-epochs", type=count, help="passes over each rollout; from two on the clip acts")
    add("--splits", nargs="*", choices=SPLITS, help="evaluated before and after; none named: "
        "no evaluation; tune on valid")
    return parser


def fill_algorithm(args, ranks: int = 1):
    """Fill what the flags leave open from the table's row; refuse impossible combinations."""
    for name, value in vars(ALGORITHMS[args.algo]).items():
        if getattr(args, name) is None:
            setattr(args, name, list(value) if isinstance(value, tuple) else value)
    if args.prompts < ranks:
        raise UserError(f"--prompts {args.prompts} is less than the {ranks} ranks; raise it")


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
    n = (~rewards.isnan()).sum(1, keepdim=True)
    mean = rewards.nansum(1, keepdim=True) / n.clamp(min=1)
    square = ((rewards - mean) ** 2).nansum(1, keepdim=True)
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


def to_unit(rewards: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Rewards, any shape, mapped affinely from the task's declared bounds to [0, 1]."""
    low, high = bounds
    return ((rewards - low) / (high - low)).clamp(0.0, 1.0)


def advantages(rewards: Tensor, scale: str, bounds: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """Advantage of each answer of the global batch, (P, G) -> (P, G); 0 where judging failed (NaN).

    group: (r - mean) / (std + eps) (GRPO); none: r - mean (Dr.GRPO); beta: (r - p) /
    BetaPdf(p; alpha, beta) (BNPO) on rewards mapped from `bounds` to [0, 1].
    """
    if scale == "beta":
        rewards = to_unit(rewards, bounds)
    mean, std = group_moments(rewards)
    A = rewards - mean
    if scale == "group":
        A = A / (std + STD_EPS)
    if scale == "beta":
        all_p = rewards.nanmean(1)
        A = A * beta_weights(mean, all_p[~all_p.isnan()])
    return A.nan_to_num(0.0).float()


# ---- The loss: pure functions ---------------------------------------------------------------


def action_logprobs(policy: CausalStack, h: Tensor, actions: Tensor, temperature: float = 1.0,
                    bias: Tensor | None = None,
                    chunk: int = LOGITS_AT_ONCE) -> tuple[Tensor, Tensor]:
    """Log-prob of each action and entropy of its distribution, in chunks of logits.

    h (K, d) normed hidden states, actions (K,); support (`bias`, (n,)) and temperature are those
    the actions were sampled with -> (K,) fp32 each.
    """
    def piece(h, actions):
        logits = policy.head(h).float() / temperature                   # (K, n)
        if bias is not None:
            logits = logits + bias
        logps = F.log_softmax(logits, -1)
        entropy = torch.special.entr(logps.exp()).sum(-1)
        return logps.gather(1, actions[:, None])[:, 0], entropy
    return tuple(in_chunks(piece, chunk // policy.head.out_features, h, actions))


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

    def state_dict(self) -> dict:
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict):
        self.cursor = state["cursor"]

    def next(self, n: int) -> list[dict]:
        taken = []
        for _ in range(n):
            epoch, place = divmod(self.cursor, len(self.rows))
            if epoch != self.epoch:
                self.epoch, self.order = epoch, list(range(len(self.rows)))
                random.Random(key_seed(self.seed, "prompts", epoch)).shuffle(self.order)
            taken.append(self.rows[self.order[place]])
            self.cursor += 1
        return taken


def play(agent: Agent, task, rows: list[dict], places: list[int], args,
         key: tuple) -> tuple[list[tuple[Rollout, list[int]]], dict[int, dict]]:
    """Roll out and judge this rank's share of a round, in parts of --tokens-at-once.

    A place numbers a prompt within the step, over ranks and refills. Returns the rollouts with
    their prompts' places, and place -> what is known of that group: `rewards` (G,) of the task, NaN
    where judging failed, `shaped` (G,) with the overlong term, G texts, `lengths` and `finished`
    (G,), `actions` (n,) how often each was taken, seconds.
    """
    prompts = [agent.encoder.encode(row, prompt=True) for row in rows]
    seeds = [key_seed(*key, place, row["id"]) for place, row in zip(places, rows)]
    parts, groups, G, began = [], {}, args.group_size, time.time()
    for part in pack(prompts, G, task.max_new_tokens, args.tokens_at_once):
        out = rollout(agent, [prompts[i] for i in part], G, task.max_new_tokens, args.temperature,
                      [seeds[i] for i in part])
        parts.append((out, [places[i] for i in part]))
        for k, i in enumerate(part):
            answers = slice(k * G, (k + 1) * G)
            taken = out.actions[answers][out.mask[answers]]
            groups[places[i]] = {
                "id": rows[i]["id"], "prompt": rows[i]["messages"][:-1],
                "texts": out.texts[answers], "lengths": out.mask[answers].sum(1).cpu(),
                "finished": out.finished[answers].cpu(),
                "actions": torch.bincount(taken, minlength=agent.policy.head.out_features).cpu()}
    rolled = time.time()
    replies = task.judge([row for row in rows for _ in range(G)],
                         [text for group in groups.values() for text in group["texts"]])
    judged = torch.tensor([task.reward(reply) for reply in replies]).view(-1, G)
    for group, rewards in zip(groups.values(), judged):
        overlong = overlong_punishment(group["lengths"], task.max_new_tokens)
        group |= {"rewards": rewards,
                  "shaped": rewards + overlong if "overlong" in args.extras else rewards,
                  "seconds_rollout": (rolled - began) / len(rows),
                  "seconds_judge": (time.time() - rolled) / len(rows)}
    return parts, groups


def collect(agent: Agent, task, prompts: Prompts, args, step: int):
    """The step's rollouts on this rank, all groups of all ranks, and those of them that train.

    Dynamic sampling keeps groups whose task reward (before the overlong term) varies and refills
    up to REFILLS more rounds; the same decision on every rank, surplus groups are cut.
    """
    dynamic = "dynamic-sampling" in args.extras
    parts, groups = [], {}
    for attempt in range(1 + REFILLS * dynamic):
        rows, played = prompts.next(args.prompts), len(groups)
        mine = range(rank(), len(rows), world_size())
        new_parts, new_groups = play(agent, task, [rows[i] for i in mine],
                                     [played + i for i in mine], args,
                                     (args.seed, "rl", step, attempt))
        parts += new_parts
        groups |= dict(sorted(gather(new_groups).items()))
        kept = {p: group for p, group in groups.items() if not dynamic or varies(group["rewards"])}
        if len(kept) >= args.prompts:
            break
    if dynamic and len(kept) < args.prompts:
        say(f"note: step {step}: of {len(groups)} groups {len(kept)} vary, {args.prompts} wanted")
    return parts, groups, dict(list(kept.items())[:args.prompts])


def varies(rewards: Tensor) -> bool:
    """Whether a group's rewards (G,) differ, so that its advantages say anything."""
    return group_moments(rewards[None])[1].item() > 1e-8


def training_batches(parts: list[tuple[Rollout, list[int]]], groups: dict[int, dict],
                     args, bounds) -> list[tuple]:
    """(rollout, which of its prompts, advantages (N,), loss mask (N, T)) of those of `groups` that
    lie on this rank, whole: a prompt is one pass of the policy for all its answers."""
    rewards = torch.stack([group["shaped"] for group in groups.values()])            # (P, G)
    A, batches = advantages(rewards, args.scale, bounds), []
    for r, places in parts:
        some = [i for i, place in enumerate(places) if place in groups]
        own = [list(groups).index(places[i]) for i in some]
        judged = ~rewards[own].isnan().to(r.mask.device)                             # (P, G)
        mask = r.mask.view(len(places), args.group_size, -1)[some] & judged[..., None]
        batches.append((r, some, A[own].view(-1).to(r.mask.device), mask.flatten(0, 1)))
    return [batch for batch in batches if batch[-1].any()]


def update(agent: Agent, reference, optimizer, lr: float, run: Run, parts, groups: dict[int, dict],
           args, task) -> dict[str, float]:
    """An optimiser step on the kept groups for each inner epoch; global figures. Without a token
    no step and no figures: AdamW's momentum alone would move the policy.

    `parts` and `groups` are those of `play`; K below are a part's loss tokens. Denominators are
    counted over all ranks before any backward.
    """
    bias = agent.token_bias if agent.space == "token" else None
    totals = dict.fromkeys(("entropy", "kl", "clipped", "tokens", "loss", "distance"), 0.0)
    batches = training_batches(parts, groups, args, task.bounds) if groups else []
    own_tokens = sum(int(mask.sum()) for *_, mask in batches)
    n = all_sum({"sequences": sum(int(mask.any(1).sum()) for *_, mask in batches),
                 "tokens": own_tokens})
    if not n["tokens"]:
        return {}
    if args.aggregate == "local":
        n["tokens"] = own_tokens * world_size()         # of a rank without a token it is not read
    old = {}
    for epoch in range(args.inner_epochs):
        for i, (r, some, A, mask) in enumerate(batches):
            r = r.select(some)                          # a copy of its states, for this pass alone
            with agent.autocast():
                h = replay(agent.policy, r)[mask]                                   # (K, d)
                logps, entropy = action_logprobs(agent.policy, h, r.actions[mask],      # (K,) each
                                                 args.temperature, bias)
            # pi_old is the policy of the first pass, before any step here, so ratios start at 1.
            old_logps, answer = old.setdefault(i, logps.detach()), mask.nonzero()[:, 0]
            loss, clipped = surrogate(logps, old_logps, A[answer], *args.clip)
            kl = torch.zeros_like(logps)
            if reference is not None:
                with torch.no_grad(), agent.autocast():
                    ref_logps, _ = action_logprobs(reference, replay(reference, r)[mask],
                                                   r.actions[mask], args.temperature, bias)
                kl = k3(logps, ref_logps)
                loss = loss + args.beta * kl
            weights = token_weights(args.aggregate, mask.sum(1), n["sequences"], n["tokens"],
                                    task.max_new_tokens)
            loss = (loss * weights[answer]).sum()
            loss.backward()
            distance = (old_logps - r.logps[mask]).abs()
            figures = {"entropy": entropy, "kl": kl, "tokens": mask, "loss": loss,
                       "clipped": clipped, "distance": distance}
            totals |= {name: totals[name] + part.detach().sum() for name, part in figures.items()}
        norm = optimizer_step(run, [optimizer], [lr], [group["id"] for group in groups.values()])
    totals = all_sum(totals)
    mean = {name: total / totals["tokens"] for name, total in totals.items()}
    kl = {} if reference is None else {"kl": mean["kl"]}
    return {"loss": totals["loss"] / args.inner_epochs, **kl, "entropy": mean["entropy"],
            "clip_fraction": mean["clipped"], "grad_norm": norm, "ratio_error": mean["distance"]}


def refuse_unjudged(step: int, groups: dict[int, dict]):
    """A judge that fails on most answers says nothing: stop before anything is learnt or logged,
    so that the same command, once it answers again, gives what an undisturbed run would."""
    rewards = torch.cat([group["rewards"] for group in groups.values()])
    failed = int(rewards.isnan().sum())
    if failed > len(rewards) / 2:
        raise UserError(f"step {step}: {failed} of {len(rewards)} answers could not be judged; see "
                        "to the judge, then run the same command again")


def step_figures(groups: dict[int, dict], space: str) -> dict[str, float]:
    """Reward, variance, length, code and text diversity of all that was rolled out in a step."""
    def every(name):                                                          # (P, ...)
        return torch.stack([group[name] for group in groups.values()]).double()
    rewards, texts = every("rewards"), [group["texts"] for group in groups.values()]
    judged = rewards[~rewards.isnan()]              # never empty, see `refuse_unjudged`
    return {"reward_mean": judged.mean().item(), "reward_std": judged.std(correction=0).item(),
            "zero_variance": sum(not varies(row) for row in rewards) / len(rewards),
            "groups_played": len(groups), "judge_failed": rewards.numel() - len(judged),
            "length": every("lengths").mean().item(),
            "unfinished": 1 - every("finished").mean().item(),
            "distinct_answers": sum(len(set(t)) / len(t) for t in texts) / len(texts),
            **(code_usage(every("actions").sum(0)) if space == "latent" else {})}


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
    agent = Agent.from_base(args).load_run(parent, skip=("idm",))
    if agent.policy is None or agent.space != args.action_space:
        raise UserError(f"{parent} has no policy in {args.action_space} space; RL starts from an "
                        "sft-* run")
    for row in sum(task.splits.values(), []):       # a bad one is named now, not when it is reached
        agent.encoder.check(row)
    stage = f"rl-{task.name}-{args.algo}-{args.action_space}-s{args.seed}"
    run = Run(args, folder_of(args, stage, args.name), agent, data, parent)
    if run.finished:
        return
    modules = agent.train_only("policy")
    splits = choose_splits(task, args.splits, args.eval_prompts)
    n_prompts, modes = sum(map(len, splits.values())), {"greedy": (0.0, 1),
                                                        "sampled": (args.temperature, 4)}
    answers = args.steps * args.prompts * args.group_size
    more = f" to {1 + REFILLS} times as many" if "dynamic-sampling" in args.extras else ""
    say(f"answers to be judged in all: {answers}{more} in training, "
        f"{2 * n_prompts * 5} in the evaluation before and after")
    # The start, and the KL's reference.
    initial = copy.deepcopy(agent.policy).requires_grad_(False) if args.beta or splits else None
    reference = initial if args.beta else None
    betas = (0.9, 0.95 if args.model == "tiny" else 0.999)
    optimizer = torch.optim.AdamW(agent.policy.parameters(), betas=betas, weight_decay=0.0)
    prompts = Prompts(task.splits["rl"], args.seed)
    state = {**modules, "optimizer": optimizer, "prompts": prompts}
    for step in range(run.resume(state), args.steps):
        parts, groups, kept = collect(agent, task, prompts, args, step)
        refuse_unjudged(step, groups)
        began, lr = time.time(), args.lr * min(1.0, (step + 1) / WARMUP)
        figures = {**step_figures(groups, agent.space), "groups": len(kept)}
        figures |= update(agent, reference, optimizer, lr, run, parts, kept, args, task)
        seconds = {name: sum(group[name] for group in groups.values()) / world_size()
                   for name in ("seconds_rollout", "seconds_judge")}
        seconds["seconds_update"] = time.time() - began
        tokens = sum(int(group["lengths"].sum()) for group in groups.values())
        run.log(step, {**figures, "lr": lr, **seconds, "tokens_per_second":
                       tokens / sum(seconds.values())}, "reward_mean", "distinct_answers")
        if (step + 1) % SAMPLE_EVERY == 0:
            run.append("samples.jsonl", [
                {"step": step, "prompt": groups[0]["prompt"], "answer": text,
                 "reward": None if reward.isnan() else reward.item()}
                for text, reward in zip(groups[0]["texts"], groups[0]["rewards"])])
        run.save(step + 1, state)
    if splits:
        say(f"evaluating the start and the trained policy on {n_prompts} fixed prompts")
        answers = {}
        for name, policy in (("before", initial), ("after", agent.policy)):
            agent.policy = policy
            _, answers[name] = evaluate(agent.eval(), task, splits, args.seed, args.tokens_at_once,
                                        modes)
        before, after = answers["before"], answers["after"]
        gains = gain_table(task, before, after)
        run.report("reward", gains)
        say(f"one prompt ({before[0]['id']}): {before[0]['prompt'][-1]['content']}",
            f"before: {before[0]['answers'][0]}", f"after: {after[0]['answers'][0]}",
            f"reference: {before[0]['reference']}", sep="\n  ")
        if rank() == 0:
            write_page(run.folder / "report.html", task, run.folder.name, {"reward": gains}, answers,
                       run.folder / "log.jsonl")
    run.finish(**modules)
    say(f"next: python eval.py {run.folder} --chat, or with other runs and --report page.html to "
        "compare them")


if __name__ == "__main__":
    launch(main)
