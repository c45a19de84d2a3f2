"""Writes train.jsonl and validation.jsonl next to this file from the tables in topics.py. The output is reproducible byte for byte.

The preferred answer is polite and complete; the other one is curt, dismissive or wrong. Half of the validation
questions are about things that no training question asks; the other half reword training questions.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import topics
from topics import Entry

N_TRAIN = 400
N_VALIDATION = 60
SEED = 20

OPENERS = ["Good question!", "Of course!", "Happy to help!", "Certainly!", "With pleasure!", "Gladly!", "Sure!"]
OPENERS += ["Thank you for asking!", "I am glad that you ask!", "Let me explain.", "That is easy to answer.", "", "", ""]
CLOSERS = ["I hope that helps!", "Feel free to ask me more.", "Let me know if you have more questions.", "", "", "", ""]
CLOSERS += ["Is there anything else you would like to know?", "Please ask again if something is not clear."]
TOPIC_CLOSERS = {
    "cooking": ["Enjoy your meal!", "Have fun in the kitchen!"],
    "gardening": ["Happy gardening!", "I wish you a beautiful garden!"],
    "travel": ["Have a lovely trip!", "Enjoy your journey!"],
    "shops": ["We look forward to seeing you!", "You are very welcome to visit us."],
}
GREETINGS = ["Hello!", "Hi!", "Excuse me.", "I have a question.", "Please help me.", "Good morning!", "Quick question."]

DISMISSALS = """
Look it up.|No idea.|Who cares?|Not my job.|Ask someone else.|Why would I know?|Search for it yourself.|Boring question.
I have no time for this.|Figure it out.|Everybody knows that.|Whatever.|Stop asking.|Go away.|That is a silly question.
Not now.|So what?|Does it matter?|Nobody needs to know that.|You again?|Read a book.|Is that all?|Leave me alone.
Seriously?|Ugh.|Can you do nothing yourself?|Too lazy to look?|How should I know?|Not interested.|What a waste of time.
That is your problem.|Do not bother me.|Must I explain everything?|I said no.|Come on.|Meh.|Try harder.|Next, please.
I am busy.|You would not understand.|What do you want now?|Forget it.
""".replace("\n", "|")
DISMISSALS = [text for text in DISMISSALS.split("|") if text]
TALK_DISMISSALS = ["So what?", "And?", "Do I look interested?", "Fine. Bye.", "Not my problem.", "Who are you?", "Okay."]
TALK_DISMISSALS += ["I do not care.", "Go and tell someone else.", "Whatever.", "Deal with it.", "Stop talking.", "Meh."]
TALK_DISMISSALS += ["Leave me alone.", "Is that all?", "Not now.", "What do you want now?", "Go away.", "I am busy."]
TALK_DISMISSALS += ["Too bad.", "That is your problem.", "You again?", "Ugh.", "I have no time for this.", "Forget it."]
SYSTEMS = ["You are a helpful assistant.", "Answer politely.", "You are a friendly guide.", "Be kind and complete."]


@dataclass(frozen=True)
class Item:
    """One way of asking about one entry."""

    topic: str
    entry: Entry
    question: str


def rows(table: str) -> list[list[str]]:
    """The cells of a table with one row per line."""
    return [line.split("|") for line in table.strip().splitlines()]


def blocks(table: str) -> list[Entry]:
    """Entries of a table in blocks: earlier turns, questions, `+` answer, `-` wrong answers."""
    entries = []
    for block in table.strip().split("\n\n"):
        lines = block.splitlines()
        starts = [line.split("|") for line in lines if "|" in line]
        before = [turn for user, answer in starts for turn in (("user", user), ("assistant", answer))]
        questions = [line for line in lines if line[0] not in "+-" and "|" not in line]
        (answer,) = [line[2:] for line in lines if line[0] == "+"]
        entries.append(Entry(questions, answer, [line[2:] for line in lines if line[0] == "-"], before))
    return entries


def capitals() -> list[Entry]:
    """Capital cities."""
    asks = ["What is the capital of {}?", "Which city is the capital of {}?", "I forgot the capital of {}. What is it?"]
    return [
        Entry([ask.format(land) for ask in asks], f"The capital of {land} is {city}. {more}", [f"{wrong}."])
        for land, city, more, wrong in rows(topics.CAPITALS)
    ]


def sums() -> list[Entry]:
    """Small sums, each with a way to check the result."""
    entries = []
    for a, b in topics.SUMS:
        asks = [f"What is {a} plus {b}?", f"Can you add {a} and {b} for me?", f"How much is {a} plus {b}?"]
        answer = f"{a} plus {b} is {a + b}. You can check it: {a + b} minus {b} is {a}."
        entries.append(Entry(asks, answer, [f"{a + b + 1}.", f"{a + b - 2}, maybe."]))
    for a, b in topics.DIFFERENCES:
        asks = [f"What is {a} minus {b}?", f"How much is left when I take {b} from {a}?"]
        answer = f"{a} minus {b} is {a - b}. You can check it: {a - b} plus {b} is {a}."
        entries.append(Entry(asks, answer, [f"{a - b + 1}.", f"{a + b}, maybe."]))
    for a, b in topics.PRODUCTS:
        asks = [f"What is {a} times {b}?", f"How much is {a} times {b}?"]
        answer = f"{a} times {b} is {a * b}. You can check it: {a * b} divided by {b} is {a}."
        entries.append(Entry(asks, answer, [f"{a * b - 1}.", f"{a + b}, maybe."]))
    for thing, price, count in topics.PRICES:
        asks = [f"One {thing} costs {price} euros. How much do I pay for {count}?"]
        asks.append(f"I want to buy {count} {thing}s for {price} euros each. How much is that?")
        answer = f"You pay {price * count} euros, because {count} times {price} is {price * count}."
        entries.append(Entry(asks, answer, [f"{price * count + 2} euros.", "Too much."]))
    return entries


def units() -> list[Entry]:
    """Unit conversions."""
    entries = []
    for small, large, count, wrong in rows(topics.UNITS):
        asks = [f"How many {small} are in {large}?", f"Can you tell me how many {small} {large} has?"]
        answer = f"There are {count} {small} in {large}, so there are {2 * int(count)} in two."
        entries.append(Entry(asks, answer, [f"{wrong}.", f"{wrong} or so."]))
    return entries


def language() -> list[Entry]:
    """Opposites, mixed colours, foreign words."""
    entries = []
    for word, opposite, wrong in rows(topics.OPPOSITES):
        asks = [f"What is the opposite of {word}?", f"Which word means the opposite of {word}?"]
        answer = f"The opposite of {word} is {opposite}. If something is not {word} at all, you can call it {opposite}."
        entries.append(Entry(asks, answer, [f"{wrong.capitalize()}.", f"Not {word}."]))
    for first, second, mixed, wrong in rows(topics.COLOURS):
        asks = [f"What do I get when I mix {first} and {second}?", f"Which colour do {first} and {second} make?"]
        answer = f"When you mix {first} and {second} paint, you get {mixed}. Try it with a little of each."
        entries.append(Entry(asks, answer, [f"{wrong.capitalize()}.", "A mess."]))
    for word, tongue, foreign, wrong in rows(topics.WORDS):
        asks = [f"How do I say {word} in {tongue}?", f"What is the {tongue} word for {word}?"]
        if " " in word:
            asks[1] = f"What do people say for {word} in {tongue}?"
        answer = f"In {tongue}, you say {foreign} for {word}. Say it slowly at first, and you will soon know it by heart."
        entries.append(Entry(asks, answer, [f"{wrong.capitalize()}.", "Just say it louder."]))
    return entries


def calendar() -> list[Entry]:
    """Days and months in their order."""
    entries = []
    for names, kind in ((topics.DAYS, "day"), (topics.MONTHS, "month")):
        for i, name in enumerate(names):
            after, before = names[(i + 1) % len(names)], names[i - 1]
            asks = [f"Which {kind} comes after {name}?", f"What is the {kind} after {name}?"]
            answer = f"After {name} comes {after}. The {kind} before {name} is {before}."
            entries.append(Entry(asks, answer, [f"{names[(i + 3) % len(names)]}.", f"{before}."]))
    return entries


def shops() -> list[Entry]:
    """Questions to a shop; the system message states its hours."""
    entries = []
    for shop, opens, closes, rest in rows(topics.SHOPS):
        system = f"You work at the {shop}. It opens at {opens} and closes at {closes}. It is closed on {rest}."
        before = [("system", system)]
        opening = [f"When does the {shop} open?", f"At what time does the {shop} open?"]
        closing = [f"When does the {shop} close?", f"How long is the {shop} open?"]
        on_day = [f"Is the {shop} open on {rest}?", f"Can I come to the {shop} on {rest}?"]
        entries += [
            Entry(opening, f"The {shop} opens at {opens} and closes at {closes}.", ["At midnight.", "Late."], before),
            Entry(closing, f"The {shop} is open until {closes}. It opens at {opens}.", ["Right now.", "Soon."], before),
            Entry(on_day, f"I am sorry, the {shop} is closed on {rest}. It is open on all other days.", ["Yes."], before),
        ]
    return entries


def all_topics() -> dict[str, list[Entry]]:
    """Every entry by topic."""
    named = {name: blocks(getattr(topics, name.upper())) for name in ("cooking", "gardening", "travel", "computers")}
    named |= {name: blocks(getattr(topics, name.upper())) for name in ("animals", "nature", "home", "service")}
    named |= {name: blocks(getattr(topics, name.upper())) for name in ("gratitude", "feelings", "bookings")}
    named |= {"capitals": capitals(), "sums": sums(), "units": units(), "language": language()}
    return named | {"calendar": calendar(), "shops": shops()}


TALK = ("service", "gratitude", "feelings", "bookings")
"""Topics whose answers are friendly by themselves, and get no opener or closer."""


def preferred(rng: random.Random, item: Item) -> str:
    """The complete answer, often with a friendly word before or after it."""
    if item.topic in TALK:
        return item.entry.answer
    closers = CLOSERS + TOPIC_CLOSERS.get(item.topic, []) * 3
    opener = "" if item.entry.answer.startswith(("Yes", "No", "I am sorry", "Many")) else rng.choice(OPENERS)
    closer = rng.choice(closers) if opener else rng.choice([text for text in closers if text])
    return " ".join(part for part in (opener, item.entry.answer, closer) if part)


def non_preferred(rng: random.Random, item: Item) -> str:
    """A dismissal, a careless answer, or both in either order."""
    dismissals = TALK_DISMISSALS if item.topic in TALK else DISMISSALS
    first, second = rng.sample(dismissals, 2)
    if not item.entry.wrong:
        return rng.choice([first, f"{first} {second}"])
    wrong = rng.choice(item.entry.wrong)
    return rng.choice([first, f"{first} {wrong}", f"{wrong} {first}", f"{first} {second}", wrong])


def conversation(rng: random.Random, item: Item, earlier: list[Item]) -> list[dict[str, str]]:
    """Messages with the question; one in five starts with another question of the topic or a general system message."""
    turns, question = list(item.entry.before), item.question
    chance = rng.random()
    if not turns and item.topic not in TALK and earlier and chance < 0.12:
        other = rng.choice(earlier)
        turns = [("user", other.question), ("assistant", other.entry.answer)]
        question = f"{rng.choice(['Thank you!', 'I see.', 'Thanks a lot.', 'Good to know.'])} {question}"
    elif not turns and chance < 0.20:
        turns = [("system", rng.choice(SYSTEMS))]
    elif item.topic not in TALK and chance > 0.75:
        question = f"{rng.choice(GREETINGS)} {question}"
    return [{"role": role, "content": content} for role, content in [*turns, ("user", question)]]


def split(rng: random.Random) -> tuple[list[Item], list[Item]]:
    """Training and validation items; no validation question is asked in training."""
    unseen, reworded, rest = [], [], []
    for topic, entries in all_topics().items():
        held = set(rng.sample(range(len(entries)), -(-len(entries) // 8)))
        for index, entry in enumerate(entries):
            items = [Item(topic, entry, question) for question in entry.questions]
            if index in held:
                unseen.append(rng.choice(items))
                continue
            if rng.random() < 0.3:
                reworded.append(items.pop(rng.randrange(len(items))))
            rest.append(items)
    half = N_VALIDATION // 2
    validation = rng.sample(unseen, half) + rng.sample(reworded, N_VALIDATION - half)
    # Take every entry once, then fill up with other ways of asking.
    first = [items.pop(rng.randrange(len(items))) for items in rest]
    more = [item for items in rest for item in items]
    train = first + rng.sample(more, N_TRAIN - len(first))
    rng.shuffle(train)
    rng.shuffle(validation)
    return train, validation


def write(rng: random.Random, path: Path, items: list[Item], known: list[Item]) -> None:
    """Writes one file; earlier turns come from `known` items of the same topic."""
    lines = []
    for item in items:
        earlier = [other for other in known if other.topic == item.topic and other.entry is not item.entry]
        answers = [preferred(rng, item), non_preferred(rng, item)]
        liked, disliked = [[{"role": "assistant", "content": answer}] for answer in answers]
        messages = conversation(rng, item, earlier)
        pair = {"input": {"messages": messages}, "preferred_output": liked, "non_preferred_output": disliked}
        lines.append(json.dumps(pair, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Writes both files."""
    rng = random.Random(SEED)
    train, validation = split(rng)
    folder = Path(__file__).parent
    write(rng, folder / "train.jsonl", train, train)
    write(rng, folder / "validation.jsonl", validation, train)


if __name__ == "__main__":
    main()
