"""What parity and benchmark cases share: tokenizer, chat template, files, and TRL's view of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [PAD, START, END]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

Pair = dict[str, Any]
"""One preference pair, as a line of Dyad's training file."""


def make_pair(messages: list[dict[str, str]], preferred: str, non_preferred: str) -> Pair:
    """A pair in Dyad's format."""
    return {
        "input": {"messages": messages},
        "preferred_output": [{"role": "assistant", "content": preferred}],
        "non_preferred_output": [{"role": "assistant", "content": non_preferred}],
    }


def write_pairs(path: Path, pairs: list[Pair]) -> None:
    """Writes JSON Lines."""
    path.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")


def read_pairs(path: Path) -> list[Pair]:
    """Reads JSON Lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def as_dpo_row(pair: Pair) -> dict[str, Any]:
    """The pair in the conversational columns of TRL's `DPOTrainer`."""
    return {
        "prompt": pair["input"]["messages"],
        "chosen": pair["preferred_output"],
        "rejected": pair["non_preferred_output"],
    }


def as_sft_row(pair: Pair) -> dict[str, Any]:
    """The preferred side in the conversational columns of TRL's `SFTTrainer`."""
    return {"prompt": pair["input"]["messages"], "completion": pair["preferred_output"]}


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Saves a Hugging Face tokenizer folder with the ChatML template, and checks that it reads back as the same.

    transformers rebuilds parts of a tokenizer for some model types. If it did so here, TRL would train on other tokens
    than a reader of tokenizer.json.
    """
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)
    wrapped.chat_template = CHATML
    wrapped.save_pretrained(folder)
    sample = "<|im_start|>user\nThe  quick, brown fox\n\n jumps!<|im_end|>\n"
    if AutoTokenizer.from_pretrained(folder)(sample)["input_ids"] != tokenizer.encode(sample).ids:
        raise SystemExit(f"{folder}: transformers does not read the tokenizer back as written")


def save_model(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, max_shard_size: str) -> None:
    """Saves weights, config and tokenizer as one Hugging Face model folder."""
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.token_to_id(END)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.token_to_id(PAD)
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    save_tokenizer(tokenizer, folder)
