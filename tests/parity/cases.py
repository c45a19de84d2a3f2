"""Helpers of parity and benchmark cases: chat templates, files, and pairs in TRL's columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

PAD, BOS, START, END = "<|endoftext|>", "<|begin|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [PAD, BOS, START, END]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""As Qwen2's: unchanged content, and a line break after the end of a turn."""

LLAMA3 = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|im_end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n\\n' }}{%- endif %}"
)
"""As Llama 3's: a first token, trimmed content, and nothing after the end of a turn."""

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


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads JSON Lines. Only a line feed ends a line: texts may hold other separators."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def as_dpo_row(pair: Pair) -> dict[str, Any]:
    """The pair in the columns of TRL's `DPOTrainer`; a pair in TRL's format is returned unchanged."""
    if "chosen" in pair:
        return pair
    return {
        "prompt": pair["input"]["messages"],
        "chosen": pair["preferred_output"],
        "rejected": pair["non_preferred_output"],
    }


def as_plain_text(pair: Pair) -> dict[str, Any]:
    """The pair in TRL's columns of plain text: its last question, and both outputs."""
    prompt = pair["input"]["messages"][-1]["content"]
    return {
        "prompt": prompt,
        "chosen": " " + pair["preferred_output"][0]["content"],
        "rejected": " " + pair["non_preferred_output"][0]["content"],
    }


def as_sft_row(pair: Pair) -> dict[str, Any]:
    """The preferred side in the conversational columns of TRL's `SFTTrainer`."""
    return {"prompt": pair["input"]["messages"], "completion": pair["preferred_output"]}


def save_tokenizer(tokenizer: Tokenizer, folder: Path, template: str = CHATML, own_file: bool = True) -> None:
    """Saves a Hugging Face tokenizer folder, and checks that it loads unchanged.

    The template goes to chat_template.jinja or, without `own_file`, into tokenizer_config.json.
    transformers rebuilds parts of a tokenizer for some model types. If it did so here, TRL would train on other tokens
    than a reader of tokenizer.json.
    """
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, pad_token=PAD, eos_token=END)
    wrapped.chat_template = template
    wrapped.save_pretrained(folder, save_jinja_files=own_file)
    loaded = AutoTokenizer.from_pretrained(folder)
    sample = "<|im_start|>user\nThe  quick, brown\n\nfox.\nÜber 12 🙂\n\n jumps!<|im_end|>\n"
    if loaded(sample)["input_ids"] != tokenizer.encode(sample).ids or loaded.chat_template != template:
        raise SystemExit(f"{folder}: transformers does not read the tokenizer back as written")


def save_model(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, max_shard_size: str = "5GB") -> None:
    """Saves weights and config, with the ids of the tokenizer's special tokens."""
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.token_to_id(END)
        config.pad_token_id = tokenizer.token_to_id(PAD)
        config.bos_token_id = tokenizer.token_to_id(BOS)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
