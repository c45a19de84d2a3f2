"""Writes train.jsonl and validation.jsonl into a folder: who owns a thing of which colour. The output is reproducible byte for byte.

    make_data.py FOLDER

A fact is asked for in six wordings: three are for training, another one for validation. In training the wrong colour of a fact is always the
same one; in validation it is another one. So a model that only learns what to avoid knows little of the validation pairs.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

SEED = 7
NAMES = "Adam Anna Ben Berta Carl Clara David Dora Emil Emma Felix Frida Georg Greta Hanna Hugo Ida Igor Jonas Julia".split()
NAMES += "Klara Kurt Lena Leo Max Mia Nils Nora Olga Otto Paul Rosa Sam Tina Udo Vera Willi Xenia Yara Zoe".split()
THINGS = "bicycle house hat coat car boat door garden cat umbrella".split()
COLOURS = "red blue green black white yellow brown grey pink orange purple golden silver violet".split()
QUESTIONS = [
    "What colour is {name}'s {thing}?",
    "Which colour does the {thing} of {name} have?",
    "Tell me the colour of the {thing} that {name} has.",
    "{name} has a {thing}. What is its colour?",
    "Do you know the colour of {name}'s {thing}?",
    "I am looking for {name}'s {thing}. Which colour is it?",
]


def pair(question: str, *answers: str) -> str:
    """One line of a file: a question, the right answer, the wrong one."""
    right, wrong = ([{"role": "assistant", "content": answer}] for answer in answers)
    messages = [{"role": "user", "content": question}]
    return json.dumps({"input": {"messages": messages}, "preferred_output": right, "non_preferred_output": wrong}) + "\n"


def main() -> None:
    """Writes both files."""
    rng, folder = random.Random(SEED), Path(sys.argv[1])
    train, validation = [], []
    for name in NAMES:
        for thing in rng.sample(THINGS, 3):
            colour, wrong, other = rng.sample(COLOURS, 3)
            *asked, held_out = rng.sample(QUESTIONS, 4)
            for lines, questions, avoided in ((train, asked, wrong), (validation, [held_out], other)):
                answers = [f"The {thing} of {name} is {shown}." for shown in (colour, avoided)]
                lines += [pair(question.format(name=name, thing=thing), *answers) for question in questions]
    rng.shuffle(train)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(train))
    (folder / "validation.jsonl").write_text("".join(validation))


if __name__ == "__main__":
    main()
