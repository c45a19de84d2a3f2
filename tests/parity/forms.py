"""Token ids and masks that TRL's own trainers make of the records in tests/forms.

    forms.py DIR      writes a tokenizer folder per chat template, and DIR/forms.json: {template: {file: [record]}}; a record is
                      {"prompt", "chosen", "rejected"} for pairs, {"prompt", "completion"} for labelled answers,
                      {"ids", "trained"} for supervised fine-tuning, or null where TRL or the template fails

Rows go through `_prepare_dataset` of DPOTrainer, KTOTrainer and SFTTrainer, one at a time: a table would fill absent fields with null.
A hosted file is first written in TRL's columns, with the arguments of tool calls as objects and text parts joined.
"""

from __future__ import annotations

import datetime
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils
from trl import DPOTrainer, KTOTrainer, SFTTrainer
from trl.chat_template_utils import has_generation_markers
from trl.data_utils import maybe_extract_prompt

from cases import CHATML, read_rows

Row = dict[str, Any]
FORMS = Path(__file__).parents[1] / "forms"
TEMPLATES = [
    "qwen2_5",
    "qwen2_5_training",
    "qwen3",
    "qwen3_training",
    "qwen3_5_think",
    "llama3",
    "llama3_training",
    "llama3_1",
    "gptoss",
    "gptoss_training",
    "deepseekv3",
    "glm4moe",
    "phi3",
    "phi3_training",
    "gemma3",
]
SPECIAL = "<|endoftext|> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|start|> <|end|> <|message|> "
SPECIAL += "<|channel|> <|return|> <|call|> <|user|> <|assistant|> <|system|> <think> </think> <tool_call> </tool_call> <start_of_turn> "
SPECIAL += "<end_of_turn> <|begin|>"


class Clock(datetime.datetime):
    """Templates that write the date write the one of the test."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime.datetime:
        return datetime.datetime(1970, 1, 1)


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL.split(),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((path.read_text() for path in sorted(FORMS.glob("*.jsonl"))), trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = template
    return made


def in_trl_columns(row: Row, objects: bool) -> Row:
    """The record without what TRL does not know; `objects`: arguments are objects, otherwise as in the file."""
    row = json.loads(json.dumps(row))
    if "input" in row:
        said = row.pop("input")
        row |= {"prompt": said["messages"], "chosen": row.pop("preferred_output"), "rejected": row.pop("non_preferred_output")}
        row |= {key: value for key, value in said.items() if key == "tools"}
    for column in ("prompt", "chosen", "rejected", "completion", "messages"):
        for message in row.get(column, []) if isinstance(row.get(column), list) else []:
            # As templates that take parts write them; the others would print a list of Python.
            if isinstance(message.get("content"), list):
                message["content"] = "".join(part["text"] for part in message["content"])
            for call in message.get("tool_calls") or []:
                if objects and isinstance(call["function"]["arguments"], str):
                    call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    if isinstance(row.get("tools"), str):
        row["tools"] = json.loads(row["tools"])
    # A table gives every tool the parameters of all. As JSON text they stay as they are.
    tools = row.pop("tools", None)
    if tools:
        row["tools"] = json.dumps(tools)
    if isinstance(row.get("prompt"), str) and isinstance(row.get("chosen"), list):
        row |= maybe_extract_prompt(row)
    known = ("prompt", "chosen", "rejected", "completion", "label", "messages", "text", "tools", "chat_template_kwargs")
    return {key: value for key, value in row.items() if key in known}


def prepared(trainer: type, row: Row, tokenizer: PreTrainedTokenizerFast, more: Row, args: Row) -> Row:
    args = {"dataset_num_proc": None, "max_length": None, "truncation_mode": "keep_start", "shuffle_dataset": False} | args
    itself = SimpleNamespace(_tokenizer=tokenizer, **more)
    positional = [Dataset.from_list([row]), tokenizer, SimpleNamespace(**args)]
    if trainer is SFTTrainer:
        positional += [False, None]
    return trainer._prepare_dataset(itself, *positional, "train")[0]


def of_pair(row: Row, tokenizer: PreTrainedTokenizerFast) -> Row:
    made = prepared(DPOTrainer, row, tokenizer, {}, {})
    return {"prompt": made["prompt_ids"], "chosen": made["chosen_ids"], "rejected": made["rejected_ids"]}


def of_labelled(row: Row, tokenizer: PreTrainedTokenizerFast) -> Row:
    more = {"calculate_KL": False, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    made = prepared(KTOTrainer, row, tokenizer, more, {"per_device_train_batch_size": 1})
    return {"prompt": made["prompt_ids"], "completion": made["completion_ids"]}


def of_answer(row: Row, tokenizer: PreTrainedTokenizerFast) -> Row:
    marks = has_generation_markers(tokenizer.chat_template) and "messages" in row
    more = {"chat_template": None, "completion_only_loss": "completion" in row}
    made = prepared(SFTTrainer, row, tokenizer, more, {"assistant_only_loss": marks, "dataset_text_field": "text"})
    trained = [label != -100 for label in made["labels"]]
    if marks:
        trained = without_weight_0(trained, [message for message in row["messages"] if message["role"] == "assistant"])
    elif "messages" in row:
        trained = by_prefixes(row, tokenizer)
    return {"ids": made["input_ids"], "trained": trained}


def without_weight_0(trained: list[bool], messages: list[Row]) -> list[bool]:
    """TRL knows no weights. The marked tokens of a message are a run; those of another message come between."""
    runs = [list(run) for _, run in itertools.groupby(range(len(trained)), key=lambda at: trained[at])]
    marked = [run for run in runs if trained[run[0]]]
    assert len(marked) == len(messages)
    kept = {at for run, message in zip(marked, messages) if message.get("weight") != 0 for at in run}
    return [at in kept for at in range(len(trained))]


def by_prefixes(row: Row, tokenizer: PreTrainedTokenizerFast) -> list[bool] | None:
    """The assistant's tokens of a template without generation blocks; null if its beginnings are no beginnings of the whole."""
    tools = json.loads(row["tools"]) if "tools" in row else None

    def ids(count: int, prompt: bool) -> list[int]:
        messages = row["messages"][:count]
        if not messages:
            return []
        return tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, return_dict=True)["input_ids"]

    whole = ids(len(row["messages"]), False)
    trained = [False] * len(whole)
    for at, message in enumerate(row["messages"]):
        if message["role"] == "assistant":
            if at == 0:
                return None
            before, after = ids(at, True), ids(at + 1, False)
            if whole[: len(before)] != before or whole[: len(after)] != after:
                return None
            for token in range(len(before), len(after)):
                trained[token] = message.get("weight", 1) != 0
    return trained


def record(row: Row, tokenizer: PreTrainedTokenizerFast) -> Row | None:
    # Some templates write the arguments of calls as they are: they need text.
    for objects in (True, False):
        made = in_trl_columns(row, objects)
        form = of_labelled if "label" in made else of_pair if "chosen" in made else of_answer
        try:
            return form(made, tokenizer)
        except Exception as error:  # noqa: BLE001
            print(f"{type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
    return None


def main() -> None:
    datasets.disable_progress_bars()
    datasets.disable_caching()
    chat_template_utils.datetime = Clock
    out = Path(sys.argv[1])
    sources = Path(trl.__file__).parent / "chat_templates"
    templates = {name: (sources / f"{name}.jinja").read_text() for name in TEMPLATES} | {"chatml": CHATML}
    found: dict[str, Row] = {}
    for name, template in templates.items():
        folder = out / name
        tokenizer_of(template).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found[name] = {}
        for path in sorted(FORMS.glob("*.jsonl")):
            found[name][path.stem] = [record(row, tokenizer) for row in read_rows(path)]
    (out / "forms.json").write_text(json.dumps(found))


main()
