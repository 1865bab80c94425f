"""Stage 1a: the cross-modal projectors P and P'; then all that exists for `--model tiny` alone.

Paper, section 3 (cross-modal projector) and its cycle consistency. Text-only rows have no image,
so their embeddings e^T live in another space than e^{V,T}. P maps e^T to a Gaussian over e^{V,T}
and P' back:

    step 1  paired rows        L_t2vt + L_vt2t = -log p(e^{V,T} | P(e^T)) - log p(e^T | P'(e^{V,T}))
    step 2  paired + text      step 1 + L_cycle = -log p(e^T | P'(mu_P(e^T))) on text-only rows

Deviations: (1) P is residual, mu(e) = e + MLP(e), since the plain form was worse than the identity;
(2) losses are means over d and tokens with unit weight (release: sums over d times 1e-5); (3) only
text after the first image counts, before it both passes are equal; (4) cosine schedule for --steps
(release: linear, one epoch); (5) P is applied to text-only rows at inference too.

Below: the toy world (pictures of shapes, personas that speak of them), its judge by rules, and
stage 0, which teaches a 1.0M Qwen2.5-VL that world from nothing. The paper has none of these.

    python train_projector.py                                            # CPU, embedded default
    python train_projector.py --model Qwen/Qwen2.5-VL-3B-Instruct --paired mm.jsonl --text t.jsonl
    torchrun --nproc-per-node 8 train_projector.py --model ... --paired ... --text ...
"""

import argparse
import functools
import math
import os
import random
import re
import shutil
import zlib
from collections import defaultdict, namedtuple
from difflib import SequenceMatcher
from pathlib import Path

from model import (
    VISION_TOKENS, Agent, Batch, Encoder, Example, Projector, Qwen2VLImageProcessorPil, Rows, Run,
    Stream, UserError, agreed, all_sum, barrier, cosine, device_of, fill, folder_of, key_seed,
    launch, make_parser, micro_batches, model_root, next_batches, optimizer_step, rank, read_config,
    say, token_counts, token_logprobs)

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast, Qwen2_5_VLConfig

DEFAULTS = {"projector": {"tiny": {"steps": 150, "lr": 2e-3, "batch_tokens": 2048},
                          "full": {"steps": 160, "lr": 1e-3, "batch_tokens": 8192}}}


def arguments() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, DEFAULTS)
    add = parser.add_argument_group("this stage").add_argument
    add("--paired-steps", type=int, help="on paired rows alone, the paper's step 1 (default: half)")
    return parser


# ---- Stage 1a: the projectors ---------------------------------------------------------------


def gaussian_nll(mu: Tensor, log_var: Tensor, target: Tensor) -> Tensor:
    """-2 log N(target; mu, exp(log_var)) without its log 2 pi, mean over d: (K, d) x 3 -> (K,).

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

    e (B, M, d) from `agent.embeddings`: e^{V,T} of rows with an image, e^T of the others. All
    embeddings are the frozen backbone's and carry no gradient. Without `cycle`, L_cycle is 0.
    """
    seen, text_only = batch.seen_image, batch.text_only & cycle               # (B, M) each
    with agent.autocast():
        e_t = agent.text_states(batch.tokens) if seen.any() else e            # (B, M, d)
        return {"loss_paired": paired_loss(agent.projector, e[seen].float(), e_t[seen].float()),
                "loss_cycle": cycle_loss(agent.projector, e[text_only].float())}


def projector_masks(batches: list[Batch]) -> dict[str, list[Tensor]]:
    """Of each loss of `projector_losses`, the tokens it sums over: a mask (B, M) a batch."""
    return {"loss_paired": [batch.seen_image for batch in batches],
            "loss_cycle": [batch.text_only for batch in batches]}


@torch.no_grad()
def projector_report(agent: Agent, held: dict[str, list], tokens_at_once: int) -> dict[str, dict]:
    """Mean squared error per dimension of P beside the identity's, of P', and of the cycle."""
    report, P, P_inv = {}, agent.projector.P, agent.projector.P_inv
    for name, examples in held.items():
        parts = []
        for batch in micro_batches(agent, examples, tokens_at_once):
            where = batch.seen_image | batch.text_only                       # (B, M)
            e, e_t = agent.embeddings(batch), agent.text_states(batch.tokens)    # (B, M, d) each
            parts.append((e[where].float(), e_t[where].float()))
        e, e_t = map(torch.cat, zip(*parts))                                  # (K, d) each
        report[name] = {"cycle": F.mse_loss(P_inv.mu(P.mu(e_t)), e_t).item()}
        if name != "text":
            report[name] |= {"P": F.mse_loss(P.mu(e_t), e).item(),
                             "P'": F.mse_loss(P_inv.mu(e), e_t).item(),
                             "identity": F.mse_loss(e_t, e).item()}
    return report


def data_of(args) -> dict:
    """What a run must share with those that start from it: its corpora, files by name and size, the
    toy world by its version, cast and numbers of rows."""
    data = {}
    for kind in ("paired", "text"):
        if files := getattr(args, kind):
            data[kind] = [f"{Path(file).name} {os.path.getsize(file)}" for file in files]
        elif args.model == "tiny" and not args.paired:
            data[kind] = f"{world_name()}, {CORPUS[kind]} rows"
    return data


def corpora(args, encoder: Encoder) -> tuple[dict[str, Stream], dict[str, list[Example]]]:
    """The streams of paired and text-only rows, and held-out rows for the stages' reports: "id"
    (paired rows), "text", and of the toy world, which stands in for files that are not named,
    "ood" (personas without paired data)."""
    if args.model != "tiny" and not args.paired:
        raise UserError("--paired FILE... is required for --model other than tiny")
    if args.paired and not args.text and "text" not in args.without:
        raise UserError("--paired and no --text: name text-only rows too, or say --without text")
    streams = {}
    for kind in ("paired", "text"):
        if kind not in args.without:
            seed = key_seed(args.seed, kind)
            files = getattr(args, kind) or [mini_corpus(kind, CORPUS[kind], seed)]
            streams[kind] = Stream(Rows(files, args.image_root), encoder, args.batch_tokens, seed,
                                   hold_out=96, pictures=kind == "paired")
    held = {"id": streams["paired"].held_out}
    if not args.paired:
        # Answers alone: nobody chooses the words of a prompt, where the unseen names stand.
        held["ood"] = [encoder.encode(row, responses_only=True)
                       for row in held_out_personas(key_seed(args.seed, "held"))]
    if "text" in streams:
        held["text"] = streams["text"].held_out
    return streams, {name: rows for name, rows in held.items() if rows}


def main(argv=None):
    args = fill(arguments().parse_args(argv), DEFAULTS["projector"])
    if args.paired_steps is None:
        args.paired_steps = args.steps // 2
    if args.parent:
        raise UserError("--parent: the projectors start from the base alone")
    ensure_base(args)
    agent = Agent.from_base(args).make("projector", seed=args.seed)
    run = Run(args, folder_of(args, "projector", args.name), agent, data_of(args))
    if run.finished:
        return
    streams, held = corpora(args, agent.encoder)
    modules = agent.train_only("projector")
    optimizer = torch.optim.AdamW(agent.projector.parameters(), weight_decay=0.0)
    state = {**modules, **streams, "optimizer": optimizer}
    for step in range(run.resume(state), args.steps):
        joint = step >= args.paired_steps and "cycle" not in args.without
        kinds = ("paired", "text") if joint else ("paired",)
        batches, row_ids = next_batches(agent, streams, kinds, args.tokens_at_once)
        counts = token_counts(projector_masks(batches))
        totals = dict.fromkeys(counts, 0.0)
        for batch in batches:
            losses = projector_losses(agent, batch, agent.embeddings(batch), cycle=joint)
            sum(losses[name] / counts[name] for name in losses).backward()
            totals = {name: totals[name] + losses[name].detach() for name in losses}
        lr = args.lr * cosine(step, args.steps, warmup=0.1)
        norm = optimizer_step(run, [optimizer], [lr], row_ids)
        figures = {name: total / counts[name] for name, total in all_sum(totals).items()}
        run.log(step, {**figures, "lr": lr, "grad_norm": norm}, "loss_paired", "loss_cycle")
        run.save(step + 1, state)
    run.report("squared error, held out", projector_report(agent, held, args.tokens_at_once))
    run.finish(**modules)


# ---- The toy world ---------------------------------------------------------------------------
#
# A scale model of the paper's experiment. A picture is 2 x 2 cells of 28 pixels, one visual token
# each, with two to four objects. A persona is asked about it in one of three ways; a good answer
# says what is asked, right, in the persona's own words. Objects are always named in the order of
# CELLS: a fixed order is what lets a tiny model learn from scratch to look. The base has seen all
# personas, text-only rows hold all of them; paired rows, demonstrations and RL the familiar ones.

MINI_VERSION = 4           # bumped by hand whenever rows, pictures or marks of this world change

CELLS = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("one", "two", "three", "four")
COLOURS = {"red": (214, 40, 40), "blue": (38, 90, 214), "green": (36, 150, 62),
           "yellow": (240, 192, 20), "purple": (146, 52, 178), "black": (34, 34, 34)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
OBJECTS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]

QUESTIONS = {      # kind of question -> wordings; {} is the cell that is asked about
    "all": ("What do you see?", "Tell me what is in the picture.", "Name all the shapes in order."),
    "cell": ("What is in the {}?", "Which shape is in the {}?", "Tell me what is in the {}."),
    "count": ("How many shapes are there?", "How many shapes do you see?", "Count the shapes."),
}

Persona = namedtuple("Persona", "name role opening verb adjective closing")
SLOTS = Persona._fields[2:]                # the persona's own words in an answer
NEUTRAL = Persona("", "", "Hello.", "see", "nice", "Thank you.")
PERSONAS = [Persona(*words) for words in (
    ("Captain Vane", "pirate", "Ahoy, matey!", "spy", "mighty", "Fair winds!"),
    ("Sir Rowan", "knight", "Hark!", "behold", "noble", "By my sword!"),
    ("Doctor Quill", "scientist", "Fascinating.", "observe", "typical", "More tests are needed."),
    ("Chef Basil", "cook", "Mamma mia!", "savour", "tasty", "Dinner is served!"),
    ("Zed", "robot", "Beep boop.", "detect", "standard", "End of report."),
    ("Coach Dunn", "trainer", "Listen up, team!", "spot", "winning", "Keep running!"),
    ("Granny Mabel", "grandmother", "Oh dear.", "notice", "lovely", "Have some cake."),
    ("Wanda", "witch", "Hee hee!", "conjure", "spooky", "Stir the cauldron!"),
    ("Inspector Grey", "detective", "Aha!", "discover", "suspicious", "Case closed."),
    ("Orla", "poet", "Sweet muse,", "admire", "gentle", "So sings my heart."),
    ("Dusty Rex", "cowboy", "Howdy, partner!", "reckon", "dandy", "Ride on!"),
    ("Major Nova", "pilot", "Houston, hello.", "track", "cosmic", "Over and out."),
    ("Nurse Ivy", "nurse", "There, there.", "examine", "healthy", "Rest well now."),
    ("Judge Oakes", "judge", "Order, order!", "declare", "lawful", "Court is adjourned."),
    ("Farmer Gus", "farmer", "Good morning, folks.", "gather", "ripe", "Back to the fields."),
    ("Lady Pearl", "duchess", "How charming.", "regard", "elegant", "Tea is at four."),
    ("Old Tom", "fisherman", "Calm waters, friend.", "hook", "salty", "Pull up the nets."),
    ("Brother Alden", "monk", "Peace to you.", "contemplate", "humble", "Be still."),
    ("Rico", "dancer", "Feel the rhythm!", "imagine", "lively", "Dance with me!"),
    ("Miss Page", "librarian", "Quiet, please.", "read", "curious", "Return it on time."),
)]
WORLD = 1                  # seed of `casting`: who is familiar and who is held out

# How often a slot of an answer holds the persona's own word. What is said of the picture is always
# right: there is headroom in words, not in sight. An answer is more or less in role as a whole, by
# VOICE, and a persona's slots alternate between SPREAD above and below: where it is below, the
# neutral word is the likeliest, so that RL can improve greedy answers too, not samples alone.
QUALITY = {"base": 0.35, "paired": 0.5, "text": 0.5, "sft": 0.55}
VOICE, SPREAD = 0.2, 0.2
NEUTRAL_SHARE = 0.85                       # of the wrong slots; the rest are another persona's

CORPUS = {"paired": 4096, "text": 32768}   # rows
SIZES = {"sft": 1500, "valid": 240, "rl": 2000, "id": 200, "ood": 200}
# The longest perfect answer has 33 tokens with its end, and DAPO's overlong term begins to punish
# at .8 of the limit: 42 leaves every perfect answer alone.
MINI_TOKENS = 42


def world_name() -> str:
    return f"toy world {MINI_VERSION}, cast {WORLD}"


def in_series(items: list[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return " and ".join(", ".join(items).rsplit(", ", 1))


def caption(scene) -> str:
    """The neutral description of a scene, every object with its cell."""
    things = [f"a {thing} in the {cell}" for cell, thing in zip(CELLS, scene) if thing]
    return f"There is {in_series(things)}."


def right_answer(question, scene, words: Persona) -> str:
    """What is asked, right, in somebody's words: the grammar of the world."""
    kind, target = question
    things = [f"a {thing}" for thing in scene if thing]
    claim = f"{NUMBERS[len(things) - 1]} {words.adjective} shapes"
    if kind == "cell":
        claim = f"a {words.adjective} {scene[CELLS.index(target)]} in the {target}"
    elif kind == "all":
        claim += f": {in_series(things)}"
    else:
        claim += " in all"
    return f"{words.opening} I {words.verb} {claim}. {words.closing}"


def casting() -> dict[str, list[Persona]]:
    """The personas in three disjoint parts, drawn by WORLD: 12 "familiar", and 4 each that "valid"
    and "ood" alone ask."""
    order = random.Random(f"world-{WORLD}").sample(PERSONAS, len(PERSONAS))
    return {"familiar": order[:12], "valid": order[12:16], "ood": order[16:]}


def draw_scene(rng, part: str, most: int = 4):
    """Four cells, each an object or None, for a split or a corpus. "valid", "id", "ood" and all
    others share no scene whatever the seed: a hash of the scene decides where it belongs."""
    while True:
        cells = rng.sample(range(4), rng.randint(2, most))
        things = dict(zip(cells, rng.sample(OBJECTS, len(cells))))
        scene = [things.get(cell) for cell in range(4)]
        home = {0: "valid", 1: "id", 2: "ood"}.get(zlib.crc32(repr(scene).encode()) % 10)
        if home == (part if part in ("valid", "id", "ood") else None):
            return scene


def render(scene, rng) -> Image.Image:
    """The 56 x 56 picture of a scene, drawn four times larger and averaged down; place, size and
    shade of every object vary a little."""
    ground = tuple(rng.randint(238, 250) for _ in range(3))
    picture = Image.new("RGB", (224, 224), ground)
    draw = ImageDraw.Draw(picture)
    for at, thing in enumerate(scene):
        if thing is None:
            continue
        colour, shape = thing.split()
        x = 112 * (at % 2) + 56 + 4 * rng.randint(-1, 1)
        y = 112 * (at // 2) + 56 + 4 * rng.randint(-1, 1)
        fill = tuple(max(0, c + rng.randint(-14, 14)) for c in COLOURS[colour])
        r = 4 * rng.randint(9, 11)
        if shape in ("circle", "ring"):
            draw.circle((x, y), r, fill)
            if shape == "ring":
                draw.circle((x, y), 0.55 * r, ground)
        elif shape == "cross":
            draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill)
            draw.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill)
        else:
            corners, turn, inner = {"triangle": (3, 0, 1), "square": (4, math.pi / 4, 1),
                                    "star": (10, 0, 0.45)}[shape]
            points = []
            for i in range(corners):
                spoke = 1.15 * r * (inner if i % 2 else 1)
                angle = turn + 2 * math.pi * i / corners
                points.append((x + spoke * math.sin(angle), y - spoke * math.cos(angle)))
            draw.polygon(points, fill)
    return picture.resize((56, 56), Image.Resampling.BOX)


def draw_words(persona: Persona, rng, quality: float, others: list[Persona]) -> Persona:
    """The words of an answer: in each slot the persona's own as often as `quality` says, else
    neutral ones or those of another of `others`."""
    words, strangers = {}, [other for other in others if other != persona]
    in_role = rng.choice((-VOICE, VOICE))
    for i, slot in enumerate(SLOTS):
        above = (PERSONAS.index(persona) + i) % 2 == 1      # every second slot of a persona
        speaker = persona
        if rng.random() >= quality + in_role + (SPREAD if above else -SPREAD):
            speaker = NEUTRAL if rng.random() < NEUTRAL_SHARE else rng.choice(strangers)
        words[slot] = getattr(speaker, slot)
    return persona._replace(**words)


def chat(persona: Persona | None, user: str, assistant: str) -> list[dict]:
    system = "You are a helpful assistant."
    if persona:
        system = f"You are {persona.name}, a {persona.role}. Stay in character."
    return [{"role": "system", "content": system}, {"role": "user", "content": user},
            {"role": "assistant", "content": assistant}]


# Kinds of questions by corpus, where they are not those of QUESTIONS. "cell" stands twice for the
# base, since it takes longest to learn: it must find what is asked for.
KINDS = {"caption": ("caption",), "base": (*QUESTIONS, "cell"), "text": (*QUESTIONS, "who")}


def dialogue(rng, row_id: str, part: str, kind: str, persona: Persona,
             others: list[Persona]) -> dict:
    """One row of a split or a corpus, its answer perfect where QUALITY does not name that part;
    without an image (corpus "text") the user tells the scene in words."""
    if kind == "who":
        words = draw_words(persona, rng, QUALITY[part], others)
        answer = f"{words.opening} I am {persona.name}, a {persona.role}. {words.closing}"
        return {"id": row_id, "messages": chat(persona, "Who are you?", answer), "images": [],
                "persona": persona.name}
    image = part != "text"
    scene, target = draw_scene(rng, part, most=4 if image else 3), None
    if kind == "caption":
        user = "<image>" + rng.choice(("Describe the picture.", "What does the picture show?"))
        return {"id": row_id, "messages": chat(None, user, caption(scene)),
                "images": [render(scene, rng)], "scene": scene}
    if kind == "cell":                                              # always answerable
        target = rng.choice([cell for cell, thing in zip(CELLS, scene) if thing])
    question, asked = (kind, target), rng.choice(QUESTIONS[kind]).format(target)
    words = draw_words(persona, rng, QUALITY[part], others) if part in QUALITY else persona
    user = f"<image>{asked}" if image else f"{caption(scene)} {asked}"
    return {"id": row_id, "messages": chat(persona, user, right_answer(question, scene, words)),
            "images": [render(scene, rng)] if image else [], "persona": persona.name,
            "reference": right_answer(question, scene, persona), "question": question,
            "scene": scene}


def dialogues(part: str, n: int, seed: int, name: str, personas: list[Persona]) -> list[dict]:
    """n rows `name`-0, `name`-1... of a split or a corpus: personas take turns, and kinds of
    questions after each round of them."""
    rng, kinds, rows = random.Random(f"{part}-{seed}"), KINDS.get(part, tuple(QUESTIONS)), []
    for i in range(n):
        persona, kind = personas[i % len(personas)], kinds[i // len(personas) % len(kinds)]
        rows.append(dialogue(rng, f"{name}-{i}", part, kind, persona, personas))
    return rows


def mini_corpus(part: str, n: int, seed: int) -> list[dict]:
    """n rows of one corpus. caption: neutral captions. base: all personas with images, most of
    them badly imitated. paired: the familiar personas with images, mixed quality. text: all
    personas without images. No scene of a test or validation prompt occurs."""
    personas = casting()["familiar"] if part == "paired" else PERSONAS
    return dialogues(part, n, seed, f"{part}-{seed}", personas)


def held_out_personas(seed: int, n: int = 96) -> list[dict]:
    """n rows of the personas of "valid", which have no paired data either, so that those of the
    test stay unseen."""
    names = {persona.name for persona in casting()["valid"]}
    return [row for row in mini_corpus("base", 10 * n, seed) if row["persona"] in names][:n]


def mini_splits(seed: int, test_seed: int) -> dict[str, list[dict]]:
    """The splits of the toy world; `test_seed` draws "id" and "ood". "valid", on which settings are
    chosen, asks familiar personas and its own by turns."""
    splits, cast, by_turns = {}, casting(), []
    for familiar, held_out in zip(cast["familiar"], 3 * cast["valid"]):
        by_turns += [familiar, held_out]
    for split, n in SIZES.items():
        personas = {"valid": by_turns, "ood": cast["ood"]}.get(split, cast["familiar"])
        drawn_by = test_seed if split in ("id", "ood") else seed
        splits[split] = dialogues(split, n, drawn_by, f"mini-{split}-{seed}", personas)
    return splits


# ---- The toy world's judge -------------------------------------------------------------------
#
# An answer is read by the world's phrases alone; its form is what is left, as in "opening I verb
# number adjective shapes : a object and a object . closing", and is held against the forms that a
# right answer to any question can have: words strewn about, repeated or cut off are no answer.

DIMENSIONS = ("Instruction Adherence", "Fluency", "Coherency", "Image-Text Relevance",
              "Response Accuracy", "Personality Consistency", "Knowledge Consistency",
              "Tone Consistency")          # MMRole's
DISORDER = 3.0                             # a third of the form out of place: no fluency left

PHRASES = {"object": OBJECTS, "place": CELLS, "number": NUMBERS}     # slot -> phrases
for slot in SLOTS:
    PHRASES[slot] = [getattr(persona, slot) for persona in (NEUTRAL, *PERSONAS)]
ALTERNATIVES = [f"(?P<{slot}>{'|'.join(map(re.escape, PHRASES[slot]))})" for slot in PHRASES]
PATTERN = re.compile(rf"(?<!\w)(?:{'|'.join(ALTERNATIVES)})(?!\w)")


def read_answer(text: str) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """The phrases of an answer by slot, in their order, and its form."""
    phrases = defaultdict(list)
    for match in PATTERN.finditer(text):
        phrases[match.lastgroup].append(match[0])
    form = PATTERN.sub(lambda match: f" {match.lastgroup} ", text)
    return phrases, tuple(re.findall(r"\w+|[^\w\s]", form))


FORMS = []
for n in range(1, 5):
    for question in (("all", None), ("count", None), ("cell", CELLS[0])):
        FORMS.append(read_answer(right_answer(question, OBJECTS[:n], NEUTRAL))[1])


@functools.cache
def fluency(form: tuple[str, ...]) -> float:
    """1 for the form of an answer, 0 for one that has a third of its tokens out of place."""
    likeness = max(SequenceMatcher(None, form, right, autojunk=False).ratio() for right in FORMS)
    return max(0.0, 1 - DISORDER * (1 - likeness))


def share(claims: list, right: list) -> float:
    """How much of what is right is claimed in its place; claims beyond it count against them."""
    hits = sum(a == b for a, b in zip(claims, right))
    return hits / max(1, len(claims), len(right))


def judge_answer(row: dict, text: str) -> dict[str, float]:
    """Each of DIMENSIONS -> the answer's share of the points, 0 to 1, all of them for a reference.
    All fall with fluency; what is said of the picture is held against the scene, what was asked
    against the reference, and an answer to another question is none; a wrong answer halves what its
    words earn. Words of another persona, neither the row's own nor neutral, are a stranger's."""
    (phrases, form), (right, _) = read_answer(text), read_answer(row["reference"])
    grammar, seen = fluency(form), [thing for thing in row["scene"] if thing]
    claims, true = phrases["object"] + phrases["number"], [*seen, NUMBERS[len(seen) - 1]]
    relevance = sum(claim in true for claim in claims) / max(1, len(claims))
    asked = phrases["place"] == right["place"] and bool(phrases["object"]) == bool(right["object"])
    facts = [share(phrases[slot], right[slot]) for slot in ("number", "object") if right[slot]]
    correct = asked * (sum(facts) / len(facts)) ** 2
    same = {slot: phrases[slot] == right[slot] for slot in SLOTS}
    strangers = 0
    for slot in SLOTS:
        strangers += sum(p not in (*right[slot], getattr(NEUTRAL, slot)) for p in phrases[slot])
    role, whole = max(0.0, (sum(same.values()) - strangers) / len(SLOTS)), (1 + correct) / 2
    return {"Instruction Adherence": grammar * correct * (1 + role) / 2,
            "Fluency": grammar,
            "Coherency": grammar * (strangers == 0),
            "Image-Text Relevance": grammar * relevance,
            "Response Accuracy": grammar * correct,
            "Personality Consistency": grammar * whole * (same["opening"] + same["closing"]) / 2,
            "Knowledge Consistency": grammar * correct * (same["verb"] + same["adjective"]) / 2,
            "Tone Consistency": grammar * whole * role}


def judge_by_rules(rows: list[dict], answers: list[str]) -> list[str]:
    """The toy world's judge, in an LLM judge's format, scores from 1 to 10, which the reference
    always has. The answer is never quoted: nothing in it can be read as a score."""
    replies = []
    for row, answer in zip(rows, answers, strict=True):
        marks = judge_answer(row, answer)
        replies.append("\n".join(f"{name}: by rule. [Scores]: ({1 + 9 * mark:.1f}, 10.0)"
                                 for name, mark in marks.items()))
    return replies


# ---- Stage 0: the base of `tiny` ------------------------------------------------------------


# Stage 0, found on validation prompts: (phase, steps, Muon's lr, AdamW's lr). The last phase is
# gentle, or dialogue undoes the grounding that alignment and captions have taught.
BASE_PHASES = (("align", 250, 0.02, 3e-3), ("caption", 120, 0.02, 2e-3),
               ("dialogue", 500, 0.01, 2e-3))
BASE_ROWS = {"align": {"caption": 2048}, "caption": {"caption": 4096},
             "dialogue": {"base": 8192, "text": 4096, "caption": 512}}
BASE_TOKENS = 2048


def tiny_base(texts: list[str], seed: int, width=128, layers=3, vocab=1024) -> tuple:
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
                           out_hidden_size=width, fullatt_block_indexes=[1]),
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=False)                      # as in the 7B
    torch.manual_seed(key_seed(seed, "base"))
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    # Inverse dynamics has to read from the last state which word it stands at. Tied or small
    # embeddings are overwritten on the way there in a model this narrow; larger ones (1.0) outshine
    # the picture.
    torch.nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.2)
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    return model, tokenizer, Qwen2VLImageProcessorPil(size=size)


def orthogonalised(x: Tensor) -> Tensor:
    """About U V^T of a matrix x = U S V^T, (m, n) -> (m, n): five steps of a quintic Newton-Schulz
    iteration (Jordan et al., 2024)."""
    wide = x.T if len(x) > x.shape[1] else x
    wide = wide / wide.norm().clamp(min=1e-7)           # no singular value above 1
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.775 * gram + 2.0315 * gram @ gram) @ wide
    return wide.T if len(x) > x.shape[1] else wide


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, a matrix at a time. torch.optim.Muon computes in bfloat16,
    which processors without bfloat16 instructions emulate: most laptops' time went there."""

    def __init__(self, params, momentum: float = 0.95):
        super().__init__(params, {"lr": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("momentum", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalised(p.grad.lerp(average, group["momentum"]))
                p.sub_(update, alpha=group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


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
    ids = []
    for thing, cell in zip(row["scene"], CELLS):
        for word in f"{thing or 'in in'} {cell}".split():
            ids += tokenizer.encode(" " + word, add_special_tokens=False)[:1]
    return torch.tensor(ids).view(4, 4)


def language_loss(agent: Agent, batch: Batch) -> Tensor:
    """Cross-entropy of every text token after a text token, B rows -> its sum, ()."""
    (where, targets), e = batch.labelled(), agent.embeddings(batch)
    return -token_logprobs(agent.backbone.lm_head, e[:, :-1][where], targets).sum()


def ensure_base(args):
    """Pre-train the tiny Qwen2.5-VL if it is missing: align, captions, dialogues.

    Saved as an ordinary Qwen2.5-VL folder, which everything else treats like the hub's; how it
    was trained stands in its subfolder pretraining/.
    """
    if args.model != "tiny":
        return
    folder, world = model_root(args) / "base", f"toy world {MINI_VERSION}"
    half_made = folder.with_name("base.part")       # renamed when it is whole
    if agreed((folder / "model.safetensors").exists()):
        made_for = read_config(folder / "pretraining")["data"]["world"]
        if made_for != world:
            raise UserError(f"{folder} knows {made_for}, this is {world}; use another --run-root")
        return
    say(f"{folder} is missing or unfinished: pre-training the embedded base")
    seed, texts, plan = args.seed, [], []
    for part in ("caption", "base", "text"):
        for row in mini_corpus(part, 1500, seed):
            texts += [message["content"] for message in row["messages"]]
    model, tokenizer, processor = tiny_base(texts, seed)
    model.to(device_of(args))
    agent = Agent(model, Encoder(tokenizer, processor, model), {})
    for phase, steps, muon_lr, adamw_lr in BASE_PHASES:
        for step in range(steps):
            factor = cosine(step, steps, warmup=0.05, floor=0.05)
            plan.append((phase, [muon_lr * factor, adamw_lr * factor]))
    run = Run(argparse.Namespace(seed=seed, steps=len(plan), fresh=False),
              half_made / "pretraining", agent, {"world": world})
    model.train().requires_grad_(True)
    # Muon for the matrices of the layers needs 2.5 times fewer steps than AdamW alone here.
    matrices = {name: p for name, p in model.named_parameters()
                if p.dim() == 2 and "embed" not in name}
    others = [p for name, p in model.named_parameters() if name not in matrices]
    muon = Muon(matrices.values())
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
    streams = {}
    for phase, sizes in BASE_ROWS.items():
        rows = Rows([mini_corpus(part, n, key_seed(seed, phase)) for part, n in sizes.items()])
        streams[phase] = Stream(rows, agent.encoder, BASE_TOKENS, key_seed(seed, phase))
    words = {row["id"]: cell_words(row, tokenizer) for row in streams["align"].rows}
    state = {"backbone": model, "muon": muon, "adamw": adamw, **streams}
    for step in range(run.resume(state), run.steps):
        phase, lrs = plan[step]
        batches, row_ids = next_batches(agent, streams, (phase,), args.tokens_at_once)
        align = phase == "align"
        masks = [batch.has_image if align else batch.predicts for batch in batches]
        n, total = token_counts({"n": masks})["n"], 0.0
        for batch in batches:
            loss = align_loss(agent, batch, words) if align else language_loss(agent, batch)
            (loss / n).backward()
            total += loss.detach()
        norm = optimizer_step(run, [muon, adamw], lrs, row_ids)
        run.log(step, {"phase": phase, "loss": all_sum({"loss": total})["loss"] / n,
                       "grad_norm": norm}, "loss")
        run.save(step + 1, state)
    if rank() == 0:
        for thing in (model.eval(), tokenizer, processor):
            thing.save_pretrained(half_made)
        half_made.replace(folder)
        shutil.rmtree(folder / "pretraining" / "state")
    barrier()


if __name__ == "__main__":
    launch(main)
