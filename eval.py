"""Tasks, rewards and evaluation: what the policy talks about and how its answers are scored.

A task is five splits of dialogue rows and a judge. The judge replies in text, one line a dimension
(`Fluency: reason. [Scores]: (answer, reference)`), whether it is an LLM or the rules below; the
reward is the answer's summed scores over the reference's, as in the paper's RL stage.

  mini    a small world of pictures and role play, drawn from a seed, judged by a sentence parser.
          Nothing to download; it stands in for MMRole, whose eight dimensions it borrows.
  FILE    a user's own dialogues, judged by their word overlap with the reference.

    python eval.py runs/tiny/rl-mini-dapo-latent-s0           # ID and OOD; greedy, sampled, best-of-N
    python eval.py runs/tiny/rl-mini-*-s?                     # comparison, seeds aggregated
    torchrun --nproc-per-node 8 eval.py RUN                   # prompts are shared out to the ranks
    python eval.py --rescore runs/.../predictions.jsonl       # all figures again from the replies
"""

import functools
import hashlib
import html
import json
import math
import random
import re
import zlib
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from model import (Agent, Parser, UserError, all_sum, atomic, format_table, gather, key_seed,
                   launch, rank, read_config, read_rows, rollout, say, world)

import torch
from torch import Tensor


# ---- Tasks, judge replies and the reward ----

SPLITS = ("sft", "valid", "rl", "id", "ood")


@dataclass
class Task:
    """Rows end with an assistant message: the demonstration in "sft", the reference elsewhere.
    Every row also carries the reference as row["reference"], and messages[:-1] is its prompt."""
    name: str
    dimensions: tuple[str, ...]
    bounds: tuple[float, float]            # the reward's range, which BNPO maps to [0, 1]
    splits: dict[str, list[dict]]          # SPLITS -> rows
    judge: Callable[[list[dict], list[str]], list[str | None]]  # rows, answers -> replies
    max_new_tokens: int
    lowest: float = 1.0                    # the judge's scale is lowest..10

    def scores(self, reply: str | None) -> dict[str, tuple[float, float]] | None:
        """One raw reply -> dimension -> (answer's score, reference's); None if judging failed."""
        return None if reply is None else parse_reply(reply, self.dimensions, self.lowest)

    def reward(self, reply: str | None) -> float | None:
        """Sum of the answer's scores / sum of the reference's; None if judging failed."""
        scores = self.scores(reply)
        if scores is None:
            return None
        answer, reference = map(sum, zip(*scores.values()))
        return answer / reference


def parse_reply(reply: str, dimensions, lowest: float = 1.0):
    """Dimension -> (answer's score, reference's), or None for a malformed reply: it is never
    guessed at. Each dimension needs exactly one line that starts with its name (a list marker or
    bold type may surround it) and ends with `[Scores]: (a, b)`, both in lowest..10. Lines without
    scores are ignored, and any other line with scores makes the reply malformed; so what a line
    quotes from the answer never counts."""
    names, number = "|".join(map(re.escape, dimensions)), r"\s*([0-9]+(?:\.[0-9]+)?)\s*"
    line_format = re.compile(rf"[\s*#\-.)0-9]*({names})[\s*]*:.*\[Scores\][\s*:]*"
                             rf"\({number},{number}\)[\s.*]*")
    scores = {}
    for line in reply.splitlines():
        if "[Scores]" not in line:
            continue
        match = line_format.fullmatch(line)
        if match is None or match[1] in scores:
            return None
        answer, reference = float(match[2]), float(match[3])
        if not (lowest <= answer <= 10 and lowest <= reference <= 10 and reference > 0):
            return None
        scores[match[1]] = answer, reference
    return scores if len(scores) == len(dimensions) else None


def load_task(name: str, image_root=None) -> Task:
    """`mini` (one fixed draw: all runs share its prompts), or a file of dialogue rows."""
    if name == "mini":
        return mini_task(seed=1)
    if Path(name).is_file():
        return file_task(name, image_root)
    raise UserError(f"--task {name}: neither a known task (mini) nor an existing file of rows")


# ---- The mini world ----
#
# A picture is 2 x 2 cells of 28 pixels, one visual token each, with two to four objects. A persona
# is asked about it in one of four ways; a good answer says what is asked, right, in the persona's
# own words. Objects are always named in the order of CELLS: a fixed order is what lets a tiny
# model learn from scratch to look.

CELLS = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("one", "two", "three", "four")
COLOURS = {"red": (214, 40, 40), "blue": (38, 90, 214), "green": (36, 150, 62),
           "yellow": (240, 192, 20), "purple": (146, 52, 178), "black": (34, 34, 34)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
OBJECTS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]

QUESTIONS = {      # kind -> wordings; {} is the cell or the object that is asked about
    "all": ("What do you see?", "Tell me what is in the picture.", "Name all the shapes in order."),
    "cell": ("What is in the {}?", "Which shape is in the {}?", "Tell me what is in the {}."),
    "where": ("Where is the {}?", "In which corner is the {}?", "Find the {}."),
    "count": ("How many shapes are there?", "How many shapes do you see?", "Count the shapes."),
}

Persona = namedtuple("Persona", "name role opening verb adjective closing")
SLOTS = Persona._fields[2:]                # the persona's own words in an answer
NEUTRAL = Persona("", "", "Hello.", "see", "nice", "Thank you.")
PERSONAS = [
    Persona("Captain Vane", "pirate", "Ahoy, matey!", "spy", "mighty", "Fair winds!"),
    Persona("Sir Rowan", "knight", "Hark!", "behold", "noble", "By my sword!"),
    Persona("Doctor Quill", "scientist", "Fascinating.", "observe", "typical",
            "More tests are needed."),
    Persona("Chef Basil", "cook", "Mamma mia!", "savour", "tasty", "Dinner is served!"),
    Persona("Zed", "robot", "Beep boop.", "detect", "standard", "End of report."),
    Persona("Coach Dunn", "trainer", "Listen up, team!", "spot", "winning", "Keep running!"),
    Persona("Granny Mabel", "grandmother", "Oh dear.", "notice", "lovely", "Have some cake."),
    Persona("Wanda", "witch", "Hee hee!", "conjure", "spooky", "Stir the cauldron!"),
    # The last four are held out of the paired data, the demonstrations and RL.
    Persona("Inspector Grey", "detective", "Aha!", "discover", "suspicious", "Case closed."),
    Persona("Orla", "poet", "Sweet muse,", "admire", "gentle", "So sings my heart."),
    Persona("Dusty Rex", "cowboy", "Howdy, partner!", "reckon", "dandy", "Ride on!"),
    Persona("Major Nova", "pilot", "Houston, hello.", "track", "cosmic", "Over and out."),
]
HELD_OUT = 4

# How often a slot of an answer is right, and how often its facts are. A persona's slots alternate
# between SPREAD above and below: where it is below, the neutral word is the likeliest, so that
# not only samples but also greedy answers of a model fitted to these data can be improved by RL.
QUALITY = {"base": 0.35, "paired": 0.5, "text": 0.5, "sft": 0.55}
FACTS = {"base": 0.75, "paired": 0.8, "text": 0.8, "sft": 0.85}
SPREAD = 0.2
NEUTRAL_SHARE = 0.7                        # of the wrong slots; the rest are another persona's

SIZES = {"sft": 1500, "valid": 240, "rl": 2000, "id": 200, "ood": 200}
MINI_TOKENS = 40                           # the longest perfect answer has 30 words and marks


@dataclass
class Answer:
    """The parts of an answer. `text` is the whole grammar of the world: it writes the rows, and
    the judge compares an answer with what this makes of the parts found in it."""
    opening: str = ""
    verb: str = ""
    number: str = ""
    article: str = "a"
    adjective: str = ""
    objects: tuple[str, ...] = ()
    place: str = ""
    closing: str = ""

    def text(self) -> str:
        things = [f"{self.article} {thing}" for thing in self.objects]
        if self.number:
            said = f"{self.number} {self.adjective} shapes"
            said += f": {in_series(things)}" if things else " in all"
        else:
            things[:1] = [f"{self.article} {self.adjective} {self.objects[0]}"]
            said = in_series(things) + (f" in the {self.place}" if self.place else "")
        words = f"{self.opening} I {self.verb} {said}. {self.closing}".split()
        return " ".join(words)             # an absent part leaves no double space


def in_series(items) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def caption(scene) -> str:
    """The neutral description of a scene, every object with its cell."""
    return "There is " + in_series([f"a {thing} in the {cell}"
                                    for cell, thing in zip(CELLS, scene) if thing]) + "."


def facts(question, scene) -> Answer:
    """What a right answer claims, without the persona's words."""
    kind, target = question
    things = tuple(filter(None, scene))
    if kind == "all":
        return Answer(number=NUMBERS[len(things) - 1], objects=things)
    if kind == "cell":
        return Answer(objects=(scene[CELLS.index(target)],), place=target)
    if kind == "where":
        return Answer(article="the", objects=(target,), place=CELLS[scene.index(target)])
    return Answer(number=NUMBERS[len(things) - 1])


def mistaken(answer: Answer, kind: str, rng) -> Answer:
    """The same answer with one fact wrong: a number, a place, or a colour or shape."""
    if kind == "count":
        answer.number = rng.choice([n for n in NUMBERS[1:] if n != answer.number])
    elif kind == "where":
        answer.place = rng.choice([cell for cell in CELLS if cell != answer.place])
    else:
        things, at = list(answer.objects), rng.randrange(len(answer.objects))
        things[at] = rng.choice([o for o in OBJECTS if likeness(o, things[at]) == 0.5])
        answer.objects = tuple(things)
    return answer


def likeness(thing, other) -> float:
    """Share of colour and shape that two objects, or empty cells (None), have in common."""
    if thing is None or other is None:
        return 0.0
    return sum(a == b for a, b in zip(thing.split(), other.split())) / 2


def draw_scene(rng, pool: str, most: int = 4):
    """Four cells, each an object or None. The pools "train", "valid", "id" and "ood" share no
    scene whatever the seed: a hash of the scene decides where it belongs."""
    while True:
        cells = rng.sample(range(4), rng.randint(2, most))
        scene = [None] * 4
        for cell, thing in zip(cells, rng.sample(OBJECTS, len(cells))):
            scene[cell] = thing
        bucket = zlib.crc32(repr(scene).encode()) % 10
        if ("valid", "id", "ood")[bucket] == pool if bucket < 3 else pool == "train":
            return scene


def draw_question(rng, kind: str, scene):
    """((kind, cell or object asked about), wording), always answerable from the scene."""
    target = None
    if kind in ("cell", "where"):
        at = rng.choice([i for i, thing in enumerate(scene) if thing])
        target = CELLS[at] if kind == "cell" else scene[at]
    return (kind, target), rng.choice(QUESTIONS[kind]).format(target)


@functools.cache
def shape_mask(shape: str, radius: int, dx: int, dy: int) -> Image.Image:
    """A 28 x 28 mask of one shape, drawn four times larger and averaged down."""
    mask = Image.new("L", (112, 112))
    draw, x, y, r = ImageDraw.Draw(mask), 56 + 4 * dx, 56 + 4 * dy, 4 * radius
    if shape in ("circle", "ring"):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if shape == "ring":
            draw.ellipse((x - r * 0.55, y - r * 0.55, x + r * 0.55, y + r * 0.55), fill=0)
    elif shape == "square":
        draw.rectangle((x - r * 0.85, y - r * 0.85, x + r * 0.85, y + r * 0.85), fill=255)
    elif shape == "cross":
        draw.rectangle((x - r, y - r * 0.32, x + r, y + r * 0.32), fill=255)
        draw.rectangle((x - r * 0.32, y - r, x + r * 0.32, y + r), fill=255)
    else:
        corners, inner = (10, 0.42) if shape == "star" else (3, 1.0)
        spokes = [(r * (1.1 if i % 2 == 0 or corners == 3 else inner), 2 * math.pi * i / corners)
                  for i in range(corners)]
        draw.polygon([(x + s * math.sin(a), y - s * math.cos(a)) for s, a in spokes], fill=255)
    return mask.resize((28, 28), Image.Resampling.BOX)


def render(scene, rng) -> Image.Image:
    """The 56 x 56 picture of a scene; place, size and shade of every object vary a little."""
    picture = Image.new("RGB", (56, 56), tuple(rng.randint(238, 250) for _ in range(3)))
    for at, thing in enumerate(scene):
        if thing:
            colour, shape = thing.split()
            mask = shape_mask(shape, rng.randint(9, 11), rng.randint(-1, 1), rng.randint(-1, 1))
            shade = tuple(max(0, min(255, c + rng.randint(-14, 14))) for c in COLOURS[colour])
            picture.paste(shade, (at % 2 * 28, at // 2 * 28), mask)
    return picture


def voiced(answer: Answer, persona: Persona, rng=None, quality=1.0, others=()) -> Answer:
    """Gives the answer the persona's words. Below quality 1, wrong slots get neutral words or
    those of another of `others`."""
    for i, slot in enumerate(SLOTS):
        speaker = persona
        if quality < 1:
            level = quality + (SPREAD if (PERSONAS.index(persona) + i) % 2 else -SPREAD)
            if rng.random() >= level:
                neutral = rng.random() < NEUTRAL_SHARE
                speaker = NEUTRAL if neutral else rng.choice([p for p in others if p != persona])
        setattr(answer, slot, getattr(speaker, slot))
    return answer


def chat(persona: Persona | None, user: str, assistant: str) -> list[dict]:
    system = (f"You are {persona.name}, a {persona.role}. Stay in character." if persona
              else "You are a helpful assistant.")
    return [{"role": role, "content": content} for role, content in
            (("system", system), ("user", user), ("assistant", assistant))]


def dialogue(rng, row_id, persona, kind, pool, data=None, others=(), image=True) -> dict:
    """One row. `data` names the quality of its answer (None: perfect); without an image the user
    tells the scene in words."""
    scene = draw_scene(rng, pool, most=4 if image else 3)
    question, asked = draw_question(rng, kind, scene)
    reference = voiced(facts(question, scene), persona).text()
    answer = reference
    if data:
        said = facts(question, scene)
        if rng.random() >= FACTS[data]:
            said = mistaken(said, kind, rng)
        answer = voiced(said, persona, rng, QUALITY[data], others).text()
    user = f"<image>{asked}" if image else f"{caption(scene)} {asked}"
    return {"id": row_id, "messages": chat(persona, user, answer),
            "images": [render(scene, rng)] if image else [], "reference": reference,
            "persona": persona.name, "question": question, "scene": scene}


def mini_corpus(kind: str, n: int, seed: int) -> list[dict]:
    """n rows of one corpus. caption: neutral captions. base: all personas with images, most of
    them badly imitated. paired: the in-distribution personas with images, mixed quality.
    text: all personas without images. No scene of a test or validation prompt occurs."""
    rng, rows = random.Random(f"{kind}-{seed}"), []
    personas = PERSONAS[:-HELD_OUT] if kind == "paired" else PERSONAS
    for i in range(n):
        row_id, persona = f"{kind}-{seed}-{i}", personas[i % len(personas)]
        asks = [*QUESTIONS, "who"] if kind == "text" else [*QUESTIONS]
        ask = asks[i // len(personas) % len(asks)]
        if kind == "caption":
            scene = draw_scene(rng, "train")
            user = "<image>" + rng.choice(("Describe the picture.", "What does the picture show?"))
            rows.append({"id": row_id, "images": [render(scene, rng)], "scene": scene,
                         "messages": chat(None, user, caption(scene))})
        elif ask == "who":
            me = voiced(Answer(), persona, rng, QUALITY["text"], personas)
            answer = f"{me.opening} I am {persona.name}, a {persona.role}. {me.closing}"
            rows.append({"id": row_id, "images": [], "persona": persona.name,
                         "messages": chat(persona, "Who are you?", answer)})
        else:
            rows.append(dialogue(rng, row_id, persona, ask, "train", kind, personas,
                                 image=kind != "text"))
    return rows


def mini_task(seed: int) -> Task:
    """The splits of the mini world. "ood" asks the held-out personas, "valid", on which settings
    are chosen, all of them, and the others the rest."""
    splits = {}
    for split in SPLITS:
        rng = random.Random(f"{split}-{seed}")
        personas = {"valid": PERSONAS, "ood": PERSONAS[-HELD_OUT:]}.get(split,
                                                                        PERSONAS[:-HELD_OUT])
        pool = "train" if split in ("sft", "rl") else split
        data, kinds = "sft" if split == "sft" else None, list(QUESTIONS)
        splits[split] = [dialogue(rng, f"mini-{split}-{seed}-{i}", personas[i % len(personas)],
                                  kinds[i // len(personas) % len(kinds)], pool, data, personas)
                         for i in range(SIZES[split])]
    return Task("mini", DIMENSIONS, (0.1, 1.0), splits, judge_by_rules, MINI_TOKENS)


# ---- The rule judge of the mini world ----
#
# It reads an answer's parts, writes the sentence that has these parts, and counts the tokens in
# which the two differ: words strewn about, repeated or cut off cannot pass for an answer. The
# parts are then held against the picture, the question and the persona.

DIMENSIONS = ("Instruction Adherence", "Fluency", "Coherency", "Image-Text Relevance",
              "Response Accuracy", "Personality Consistency", "Knowledge Consistency",
              "Tone Consistency")
OWNERS = {slot: {getattr(p, slot): p.name for p in [NEUTRAL, *PERSONAS]} for slot in SLOTS}
DISORDER = 3.0                             # a third of the tokens out of place: no fluency left


def tokens(text: str) -> tuple[str, ...]:
    """Words and punctuation marks, case kept."""
    return tuple(re.findall(r"\w+|[^\w\s]", text))


PHRASES = {slot: {phrase: tokens(phrase) for phrase in OWNERS[slot]} for slot in SLOTS}


def parse_answer(text: str) -> tuple[Answer | None, float]:
    """The parts of an answer (None if it has no clause that claims anything) and its grammar
    from 0 to 1."""
    said = tokens(text)
    opening, first = next((p for p in PHRASES["opening"].items() if said[:len(p[1])] == p[1]),
                          ("", ()))
    closing, last = next((p for p in PHRASES["closing"].items() if said[-len(p[1]):] == p[1]),
                         ("", ()))
    middle = said[len(first):len(said) - len(last)]
    clause = next((i for i, word in enumerate(middle[:-1])
                   if word == "I" and middle[i + 1] in PHRASES["verb"]), None)
    if clause is None:
        return None, 0.0
    verb, claim = middle[clause + 1], middle[clause + 2:] + ("", "")
    pairs = [f"{a} {b}" for a, b in zip(claim, claim[1:])]
    places = [pair for pair in pairs if pair in CELLS]
    answer = Answer(
        opening=opening, verb=verb, closing=closing,
        number=claim[0] if claim[0] in NUMBERS else "",
        article=claim[0] if claim[0] in ("a", "the") else "a",
        adjective=claim[1] if claim[1] in PHRASES["adjective"] else "",
        objects=tuple(pair for pair in pairs if pair in OBJECTS),
        place=places[-1] if places else "")
    if not (answer.number or answer.objects):
        return None, 0.0
    written = tokens(answer.text())
    differ = len(said) + len(written) - 2 * common_length(said, written)
    return answer, max(0.0, 1 - DISORDER * differ / len(said))


def common_length(a, b) -> int:
    """Length of the longest common subsequence, bit-parallel (Hyyro, 2004)."""
    at = {}
    for i, word in enumerate(a):
        at[word] = at.get(word, 0) | 1 << i
    full = row = (1 << len(a)) - 1
    for word in b:
        match = row & at.get(word, 0)
        row = (row + match | row - match) & full
    return len(a) - row.bit_count()


def hold_against_picture(answer: Answer, question, scene) -> tuple[bool, float, float]:
    """Whether it answers what was asked; how true its claims are of the picture; and how much of
    the right answer it gives. The last two are squared, so that a wrong object costs more than a
    missing phrase and a chance hit little."""
    kind, target = question
    right, things = facts(question, scene), tuple(filter(None, scene))
    if answer.place and not answer.number:
        there = scene[CELLS.index(answer.place)]
        claims = [likeness(thing, there) for thing in answer.objects]
    else:
        missing = (None,) * len(answer.objects)
        claims = [likeness(*pair) for pair in zip(answer.objects, things + missing)]
    if answer.number:
        claims.append(float(answer.number == NUMBERS[len(things) - 1]))
    true = sum(claims) / len(claims)

    if kind == "all":
        asked = bool(answer.objects) and not answer.place
        hits = sum(a == b for a, b in zip(answer.objects, things)) + (answer.number == right.number)
        given = hits / (max(len(answer.objects), len(things)) + 1)
    elif kind == "cell":
        asked = answer.place == target and len(answer.objects) == 1 and not answer.number
        given = likeness(answer.objects[0], right.objects[0]) if asked else 0.0
    elif kind == "where":
        asked = answer.objects == (target,) and bool(answer.place) and not answer.number
        given = float(answer.place == right.place)
    else:
        asked = bool(answer.number) and not answer.objects
        given = float(answer.number == right.number)
    return asked, true ** 2, asked * given ** 2


def judge_answer(row: dict, text: str) -> list[tuple[float, str]]:
    """(score from 1 to 10, reason) for each of DIMENSIONS."""
    answer, grammar = parse_answer(text)
    if answer is None:
        return [(1.0, "no sentence that answers")] * len(DIMENSIONS)
    asked, true, right = hold_against_picture(answer, row["question"], row["scene"])
    speakers = {slot: OWNERS[slot].get(getattr(answer, slot)) for slot in SLOTS}  # None: absent
    own = {slot: float(speaker == row["persona"]) for slot, speaker in speakers.items()}
    foreign = sum(speaker not in (row["persona"], NEUTRAL.name, None)
                  for speaker in speakers.values()) / len(SLOTS)
    role = sum(own.values()) / len(SLOTS)
    voices = len(set(speakers.values()) - {NEUTRAL.name, None})
    named = len(set(answer.objects))
    consistent = named == len(answer.objects) and (
        not (answer.number and named) or NUMBERS.index(answer.number) + 1 == named)

    # Bad grammar weighs fully on the two dimensions of form and by its root on all others. A role
    # that misreports what it sees is worth half, its knowledge nothing.
    sound = math.sqrt(grammar)
    coherent = (0.5 + 0.25 * bool(answer.opening) + 0.25 * bool(answer.closing)) \
        * (1.0 if consistent else 0.5) * (1.0 if asked else 0.5) * (1.0 if voices < 2 else 0.75)
    truthful = 0.5 + 0.5 * right
    shares = (
        (sound * asked * max(0.0, 0.5 + 0.5 * role - 0.5 * foreign) * (0.3 + 0.7 * right),
         f"{'answers' if asked else 'does not answer'} the question asked"),
        (grammar, f"grammar {grammar:.2f}"),
        (grammar * coherent, f"parts {'agree' if consistent else 'contradict each other'}, "
                             f"{voices} voices"),
        (sound * true, f"claims true of the picture {true:.2f}"),
        (sound * right, f"right answer given {right:.2f}"),
        (sound * truthful * (own["opening"] + own["closing"]) / 2,
         f"own opening {own['opening']:.0f}, own closing {own['closing']:.0f}"),
        (sound * right * (own["verb"] + own["adjective"]) / 2,
         f"own verb {own['verb']:.0f}, own adjective {own['adjective']:.0f}"),
        (sound * truthful * max(0.0, role - foreign),
         f"in role {role:.2f}, in another {foreign:.2f}"),
    )
    return [(1 + 9 * share, reason) for share, reason in shares]


def judge_by_rules(rows: list[dict], answers: list[str]) -> list[str]:
    """The mini world's judge, in an LLM judge's format. The reference is judged by the same
    rules. The answer is never quoted, so nothing in it can be read as a score."""
    replies = []
    for row, answer in zip(rows, answers, strict=True):
        both = zip(DIMENSIONS, judge_answer(row, answer), judge_answer(row, row["reference"]))
        replies.append("\n".join(f"{name}: {reason}. [Scores]: ({score:.1f}, {reference:.1f})"
                                 for name, (score, reason), (reference, _) in both))
    return replies


def mini_hash() -> str:
    """Hash of this file's source of the mini world and its judge: results with another hash are
    results of another task."""
    source = Path(__file__).read_text(encoding="utf-8")
    start, end = (source.index(f"\n# ---- {title} ----") for title in
                  ("The mini world", "A user's own file"))
    return hashlib.sha256(source[start:end].encode()).hexdigest()[:16]


# ---- A user's own file ----


def file_task(file: str, image_root=None) -> Task:
    """Dialogue rows whose last message, the assistant's, is demonstration and reference. A row may
    name its `split`; those that do not are shuffled with seed 42 and cut as the release cuts
    MMRole: sft 0-50 %, rl 50-85 %, valid 85-90 %, id 90-100 %."""
    splits, unassigned = {split: [] for split in SPLITS}, []
    for number, (row, _) in enumerate(read_rows([file], image_root), start=1):
        if row["messages"][-1]["role"] != "assistant":
            raise UserError(f"{file}: row {number}: the last message must be the assistant's, "
                            "which serves as demonstration and reference")
        row["reference"] = row["messages"][-1]["content"]
        if row.get("split") is None:
            unassigned.append(row)
        elif row["split"] in splits:
            splits[row["split"]].append(row)
        else:
            raise UserError(f"{file}: row {number}: split {row['split']!r} is not one of "
                            + ", ".join(SPLITS))
    random.Random(42).shuffle(unassigned)
    for split, start, end in (("sft", 0, 50), ("rl", 50, 85), ("valid", 85, 90), ("id", 90, 100)):
        n = len(unassigned)
        splits[split] += unassigned[start * n // 100:end * n // 100]
    return Task(Path(file).stem, ("Reference Overlap",), (0.0, 1.0), splits, judge_by_overlap,
                max_new_tokens=256, lowest=0.0)


def judge_by_overlap(rows: list[dict], answers: list[str]) -> list[str]:
    """ROUGE-L F1 (Lin, 2004) of the answer's lower-case words against the reference's, times 10.

    It rewards saying the reference's words in the reference's order, and nothing else: a right
    answer in other words scores low, a wrong one in nearly the same words high, and it knows
    neither the picture nor the persona. Good for trying the chain on new data and for short,
    closed answers; for open ones use an LLM judge. Words are runs of letters and digits, so
    languages without spaces are compared by whole phrases."""
    replies = []
    for row, answer in zip(rows, answers, strict=True):
        said, wanted = (re.findall(r"\w+", t.lower()) for t in (answer, row["reference"]))
        f1 = 2 * common_length(said, wanted) / max(1, len(said) + len(wanted))
        replies.append(f"Reference Overlap: words in order. [Scores]: ({10 * f1:.4f}, 10)")
    return replies


# ---- Metrics ----


def score_table(scores, dimensions) -> dict[str, float]:
    """Per dimension the mean over rows of answer's score / reference's score, MMRole's definition
    (it reproduces the published results.csv), and "overall", the mean over dimensions.

    scores: what Task.scores returns, one a row; failed ones (None) are left out and counted."""
    judged = [s for s in scores if s is not None]
    table = {d: float(np.mean([s[d][0] / s[d][1] for s in judged])) if judged else math.nan
             for d in dimensions}
    return {**table, "overall": float(np.mean(list(table.values()))),
            "judged": len(judged), "failed": len(scores) - len(judged)}


def win_rate(scores) -> float:
    """Share of judged rows whose answer has the higher sum of scores than the reference; a tie
    counts one half, so 0.5 is level with the references. scores as in score_table."""
    sums = [tuple(map(sum, zip(*s.values()))) for s in scores if s is not None]
    return float(np.mean([(a > b) + (a == b) / 2 for a, b in sums])) if sums else math.nan


def distinct_n(texts: list[str], n: int) -> float:
    """Distinct n-grams / all n-grams of space-separated words over all texts (Li et al., 2016)."""
    grams = [gram for text in texts for gram in zip(*(text.split()[i:] for i in range(n)))]
    return len(set(grams)) / max(1, len(grams))


def duplicates(texts: list[str]) -> float:
    """Share of a group's answers that repeat another of it word for word: 1 - distinct / all."""
    return 1 - len(set(texts)) / len(texts)


def code_usage(counts: Tensor) -> dict[str, float]:
    """Codes in use and perplexity of their marginal, from counts (|C|,). Perplexity exp(H) is
    |C| when all are used alike and 1 when the codebook has collapsed."""
    p = counts.double() / counts.sum().clamp(min=1e-12)
    return {"codes_used": int((counts > 1e-9).sum()),
            "code_perplexity": torch.exp(-torch.special.xlogy(p, p).sum()).item()}


def paired_bootstrap(before, after, seed: int, n: int = 10_000) -> tuple[float, float, float]:
    """(mean gain, low, high): after - before on the same rows with its 95 % percentile interval
    over n resamples of the rows (Efron, 1979). Rows where either is None or NaN are left out."""
    gain = np.array(after, dtype=float) - np.array(before, dtype=float)
    gain = gain[np.isfinite(gain)]
    rng = np.random.default_rng(seed)
    means = [gain[rng.integers(0, len(gain), len(gain))].mean() for _ in range(n)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(gain.mean()), float(low), float(high)


# ---- The evaluation command ----


MODES = {"greedy": (0.0, 1), "sampled": (1.0, 4)}      # temperature, answers a prompt


def generate(agent: Agent, rows: list[dict], temperature: float, n: int, max_new_tokens: int,
             seed: int, at_once: int = 256) -> tuple[list[list[str]], torch.Tensor]:
    """n answers to every row's prompt, this rank's share gathered on all ranks, and the counts of
    the actions taken, (number of actions,). Seeds are keyed by row: no batch split matters."""
    mine = list(range(rank(), len(rows), world()))
    counts = torch.zeros(agent.policy.head.out_features, dtype=torch.double)
    answers, per_batch = {}, max(1, at_once // n)
    for i in range(0, len(mine), per_batch):
        part = mine[i:i + per_batch]
        prompts = [agent.encoder.encode(rows[r], prompt=True) for r in part]
        out = rollout(agent, prompts, n, max_new_tokens, temperature,
                      [key_seed(seed, "eval", rows[r]["id"]) for r in part])
        counts += torch.bincount(out.actions[out.mask], minlength=len(counts)).cpu()
        for j, r in enumerate(part):
            answers[r] = out.texts[j * n:(j + 1) * n]
    answers = gather(answers)
    return [answers[r] for r in range(len(rows))], all_sum(counts)


def evaluate(agent: Agent, task: Task, splits: dict[str, list[dict]], seed: int,
             modes: dict[str, tuple[float, int]] = MODES) -> tuple[dict, list[dict]]:
    """Generate and judge: a table "split mode" -> figures, and one prediction per prompt and mode.

    reward is the mean over prompts and answers; best-of-n the mean over prompts of the best;
    distinct-2 and duplicates are taken within a prompt's answers. Failed judgements are left out
    and counted.
    """
    table, predictions = {}, []
    for split, rows in splits.items():
        for mode, (temperature, n) in modes.items():
            answers, counts = generate(agent, rows, temperature, n, task.max_new_tokens, seed)
            flat_rows = [row for row, group in zip(rows, answers) for _ in group]
            replies = task.judge(flat_rows, [a for group in answers for a in group])
            for i, (row, group) in enumerate(zip(rows, answers)):
                predictions.append({
                    "id": row["id"], "split": split, "mode": mode,
                    "prompt": row["messages"][:-1], "answers": group,
                    "reference": row["reference"], "replies": replies[i * n:(i + 1) * n]})
            figures = summarise(task, predictions[-len(rows):])
            if agent.space == "latent":
                figures |= code_usage(counts)
            table[f"{split} {mode}"] = figures
    return table, predictions


def prompt_rewards(task: Task, predictions: list[dict]) -> list[float]:
    """Mean reward of each prompt's judged answers, NaN where all judging failed."""
    means = []
    for p in predictions:
        judged = [r for reply in p["replies"] if (r := task.reward(reply)) is not None]
        means.append(float(np.mean(judged)) if judged else math.nan)
    return means


def summarise(task: Task, predictions: list[dict]) -> dict[str, float]:
    """Figures of one split and mode from the replies' text alone (what --rescore recomputes)."""
    scores = [task.scores(reply) for p in predictions for reply in p["replies"]]
    table = score_table(scores, task.dimensions)
    groups = [p["answers"] for p in predictions]
    best = [max((r for reply in p["replies"] if (r := task.reward(reply)) is not None),
                default=math.nan) for p in predictions]
    figures = {"reward": float(np.nanmean(prompt_rewards(task, predictions))),
               "win_rate": win_rate(scores), "words": float(np.mean(
                   [len(a.split()) for group in groups for a in group]))}
    if len(groups[0]) > 1:
        figures |= {f"best_of_{len(groups[0])}": float(np.nanmean(best)),
                    "distinct_2": float(np.mean([distinct_n(g, 2) for g in groups])),
                    "duplicates": float(np.mean([duplicates(g) for g in groups]))}
    return {**figures, "failed": table["failed"],
            **{d: table[d] for d in task.dimensions}}


def gain_table(task: Task, before: list[dict], after: list[dict], seed: int = 0) -> dict:
    """Reward before and after on the same prompts, the gain and its paired 95 % interval."""
    table = {}
    for key in dict.fromkeys((p["split"], p["mode"]) for p in before):
        pair = [prompt_rewards(task, [p for p in side if (p["split"], p["mode"]) == key])
                for side in (before, after)]
        gain, low, high = paired_bootstrap(*pair, seed)
        table[" ".join(key)] = {"before": float(np.nanmean(pair[0])),
                                "after": float(np.nanmean(pair[1])), "gain": gain,
                                "low": low, "high": high, "prompts": len(pair[0])}
    return table


REPORTED = ("reward", "best_of_4", "win_rate", "distinct_2", "duplicates", "words", "codes_used",
            "code_perplexity", "failed")


def arguments() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders (sft-*, rl-*)")
    parser.flag("--task", None, "task to evaluate on (default: each run's own)")
    parser.flag("--image-root", None, "folder that relative image paths start from")
    parser.flag("--splits", ["id", "ood"], "which prompts; tune on `valid`, touch tests once",
                nargs="+", choices=SPLITS)
    parser.flag("--min-p", None, "latent: codes cannot choose tokens below this share of the "
                "backbone's best (default: as in training); token: sample none below this share "
                "of the policy's best (default: 0)", type=float)
    parser.flag("--prompts", 0, "evaluate on the first N prompts of each split (0: all)")
    parser.flag("--samples", 4, "sampled answers a prompt; best-of-N is over these")
    parser.flag("--temperature", 1.0, "action temperature of the sampled answers (paper: 0.1)")
    parser.flag("--seed", 0, "seed of the sampled answers")
    parser.flag("--dtype", "auto", "dtype of the backbone")
    parser.flag("--device", "auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"))
    parser.flag("--rescore", None, "recompute every figure of a predictions.jsonl from the saved "
                                   "replies' text; --task names its task", metavar="FILE")
    parser.flag("--report", None, "also write one self-contained HTML page", metavar="FILE")
    return parser


def main(args):
    if args.rescore:
        return rescore(args)
    if not args.runs:
        raise UserError("name at least one run folder, for example runs/tiny/rl-mini-dapo-latent-s0")
    summaries, pages = {}, {}
    for folder in map(Path, args.runs):
        if not (folder / "model.safetensors").exists():
            raise UserError(f"{folder}: no finished run there (no model.safetensors)")
        agent = Agent.from_run(folder, args.device, args.dtype)
        if agent.policy is None:
            raise UserError(f"{folder}: has no policy; evaluate an sft-* or rl-* run")
        if args.min_p is not None:
            agent.min_p = args.min_p
        config = read_config(folder)
        task_name = args.task or config["args"]["task"]
        task = load_task(task_name, args.image_root or config["args"]["image_root"])
        splits = {s: task.splits[s][:args.prompts or None] for s in args.splits if task.splits[s]}
        say(f"{folder}: {sum(map(len, splits.values()))} prompts, judge of task {task.name}")
        table, predictions = evaluate(
            agent, task, splits, args.seed,
            {"greedy": (0.0, 1), "sampled": (args.temperature, args.samples)})
        say(format_table(str(folder.name), {k: {c: v[c] for c in v if c in REPORTED or
                                                c.startswith("best_of")}
                                            for k, v in table.items()}))
        summaries[str(folder)], pages[str(folder)] = table, predictions
        if rank() == 0:
            atomic(folder / "predictions.jsonl", lambda p: p.write_text(
                "".join(json.dumps({**row, "task": task_name}) + "\n" for row in predictions)))
            atomic(folder / "summary.json", lambda p: p.write_text(json.dumps(table, indent=1)))
    if len(summaries) > 1:
        say("\n" + format_table("reward, mean over seeds (deviation)", compare(summaries)))
    if args.report and rank() == 0:
        atomic(Path(args.report), lambda p: p.write_text(report_page(summaries, pages)))
        say(f"wrote {args.report}")


def compare(summaries: dict[str, dict]) -> dict[str, dict]:
    """Runs that differ in their seed alone (`-s<seed>` in the folder) as one row: mean (std)."""
    groups = {}
    for folder, table in summaries.items():
        groups.setdefault(re.sub(r"-s\d+", "", Path(folder).name), []).append(table)
    rows = {}
    for name, tables in groups.items():
        row = {"seeds": len(tables)}
        for key in tables[0]:
            values = [t[key]["reward"] for t in tables if key in t]
            spread = f" ({np.std(values, ddof=1):.3f})" if len(values) > 1 else ""
            row[key] = f"{np.mean(values):.3f}{spread}"
        rows[name] = row
    return rows


def rescore(args):
    """Every figure again from predictions.jsonl: answers and the text of the judge's replies."""
    try:
        rows = [json.loads(line) for line in Path(args.rescore).read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"--rescore {args.rescore}: cannot be read ({error})") from None
    task = load_task(args.task or rows[0]["task"], args.image_root)
    table = {f"{split} {mode}": summarise(task, [p for p in rows if (p["split"], p["mode"])
                                                 == (split, mode)])
             for split, mode in dict.fromkeys((p["split"], p["mode"]) for p in rows)}
    say(format_table(args.rescore, table))


def report_page(summaries: dict, pages: dict) -> str:
    """One self-contained HTML page: the tables and the first answers of every run."""
    parts = ["<!doctype html><meta charset=utf-8><title>Evaluation</title><style>body{font:15px "
             "sans-serif;max-width:70em;margin:2em auto}td,th{padding:.2em .6em;text-align:right}"
             "td:first-child{text-align:left}p{white-space:pre-wrap}</style><h1>Evaluation</h1>"]
    for folder, table in summaries.items():
        columns = list(dict.fromkeys(c for row in table.values() for c in row))
        parts.append(f"<h2>{html.escape(folder)}</h2><table><tr><th>"
                     + "".join(f"<th>{html.escape(c)}" for c in columns))
        for name, row in table.items():
            cells = (f"{row[c]:.3f}" if c in row else "" for c in columns)
            parts.append(f"<tr><td>{name}" + "".join(f"<td>{cell}" for cell in cells))
        parts.append("</table>")
        for p in pages[folder][:8]:
            said = "\n".join(f"{m['role']}: {m['content']}" for m in p["prompt"])
            parts.append(f"<p><b>{html.escape(said)}</b>\n{html.escape(p['answers'][0])}\n"
                         f"<i>reference: {html.escape(p['reference'])}</i></p>")
    return "\n".join(parts)


if __name__ == "__main__":
    launch(main, arguments())
