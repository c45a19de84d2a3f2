"""Renders the corpus in trainer/data/tests/templates with transformers, and prints the expected texts as JSON.

Each template is rendered by tokenizer.apply_chat_template for each conversation; an error is null.
"""
import datetime
import json
import random
import re
import pathlib
import sys

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

CORPUS = pathlib.Path(__file__).parents[2] / "trainer/data/tests/templates"
NOW = datetime.datetime(2026, 3, 7, 21, 5, 9)


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


def cases():
    lines = (CORPUS / "expressions.txt").read_text().splitlines()
    found = [f"{{{{ {line} }}}}" for line in lines]
    found += (CORPUS / "blocks.txt").read_text().removesuffix("\n").split("\n====\n")
    # Also with Windows line ends.
    found += [template.replace("\n", "\r\n") for template in found if "\n" in template]
    found += [path.read_text() for path in sorted((CORPUS / "families").glob("*.jinja"))]
    return found


def main():
    chat_template_utils.datetime = Clock
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>", extra_special_tokens={"image_token": "<img>"}
    )
    conversations = json.loads((CORPUS / "conversations.json").read_text())
    expected = {}
    for template in cases():
        expected[template] = []
        for conversation in conversations:
            for prompt in (True, False):
                # `lipsum` uses the global generator.
                random.seed(0)
                try:
                    text = tokenizer.apply_chat_template(
                        conversation, chat_template=template, tokenize=False, add_generation_prompt=prompt
                    )
                    # Addresses of objects differ between processes.
                    text = re.sub(r" at 0x[0-9a-f]+>", " at 0x0>", text)
                except Exception:
                    text = None
                expected[template].append(text)
    json.dump(expected, sys.stdout, ensure_ascii=False, indent=0)
    print()


main()
