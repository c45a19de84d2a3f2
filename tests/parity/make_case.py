"""Writes the input of one parity test: a tiny random model, preference pairs, and how to train on them.

    make_case.py --case NAME --out DIR        (--list names the cases)

DIR/model      Hugging Face folder, float32
DIR/adapter    PEFT folder, LoRA cases only
DIR/pairs.jsonl  training file of Dyad
DIR/case.json  {"name", "run": keys of a run.toml}; paths are relative to DIR
DIR/run.toml   the same keys for `launcher --config`, to be started in DIR

Weights are larger than in a new model, norms are not 1, biases are not 0, and some outputs begin with blank lines that
merge with the prompt's last token. So an omitted part of the computation changes the numbers.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from cases import (
    CHATML,
    LLAMA3,
    SPECIAL_TOKENS,
    Pair,
    as_dpo_row,
    as_plain_text,
    make_pair,
    save_model,
    save_tokenizer,
    write_pairs,
)

VOCAB_SIZE = 448
INITIALIZER_RANGE = 0.12
N_PAIRS = 72
SYLLABLES = ["ba", "ko", "ri", "tu", "men", "sal", "ve", "dor", "ny", "pli", "gé", "straß", "über", "qua", "🙂"]

# With a trained length of 64 and a head size of 16, some wavelengths are kept, some blended, some stretched.
ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPE_DEFAULT = {"rope_type": "default", "rope_theta": 10_000.0}

RUN: dict[str, Any] = {
    "model": "model",
    "training_file": "pairs.jsonl",
    "output_dir": "dyad",
    "training_method": "dpo",
    "n_epochs": 1,
    "max_steps": 9,
    "batch_size": 8,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "linear",
    "min_lr_ratio": 0.0,
    "warmup_ratio": 0.0,
    "weight_decay": 0.01,
    "max_grad_norm": 6.0,  # near the middle of the norms: some steps are clipped, some are not
    "random_seed": 7,
    "shuffle": False,
    "dtype": "float32",
    "loss_type": "sigmoid",
    "dpo_beta": 0.1,
    "n_checkpoints": 1,
    "n_evals": 0,
}
LORA = {"from_checkpoint": "adapter", "lora": True, "lora_r": 8, "lora_alpha": 16.0, "lora_dropout": 0.0}
LORA |= {"lora_trainable_modules": "all-linear", "learning_rate": 5e-3, "max_grad_norm": 2.0}
# Keys of a run with the name and the meaning that they have in PEFT.
PEFT_NAMES = ["use_rslora", "use_dora", "lora_bias", "exclude_modules", "layers_to_transform"]
PEFT_NAMES += ["rank_pattern", "alpha_pattern", "modules_to_save"]


@dataclass(frozen=True)
class Case:
    """Model, files and run of one case."""

    family: str
    tied: bool
    rope: dict[str, Any]
    template: str
    template_file: bool = True
    max_shard_size: str = "5GB"
    old_config: bool = False
    form: Callable[[Pair], dict[str, Any]] = lambda pair: pair
    """Format of a pair in the training file."""
    run: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    """Arguments of PEFT's `LoraConfig` that are no keys of the run."""


LLAMA = {"family": "llama", "tied": False, "rope": ROPE_LLAMA3, "template": CHATML, "template_file": False}
LLAMA |= {"max_shard_size": "200KB", "old_config": True}
LLAMA_TIED = {"family": "llama", "tied": True, "rope": ROPE_DEFAULT, "template": LLAMA3}
QWEN2 = {"family": "qwen2", "tied": True, "rope": ROPE_DEFAULT, "template": CHATML}

CASES = {
    "llama": Case(**LLAMA),
    "llama-tied": Case(**LLAMA_TIED, run={"warmup_ratio": 0.2}),
    "qwen2": Case(**QWEN2, run={"lr_scheduler_type": "cosine", "max_grad_norm": 5.0}),
    "llama-lora": Case(**LLAMA, run=LORA),
    "qwen2-lora": Case(**QWEN2, run=LORA),
    # IPO averages log-probabilities over tokens, so gradient norms are small.
    "llama-ipo": Case(**LLAMA, form=as_dpo_row, run={"loss_type": "ipo", "max_grad_norm": 3.0}),
    "qwen2-lora-simpo": Case(
        **QWEN2,
        form=as_plain_text,
        run=LORA | {"loss_type": "simpo", "dpo_beta": 2.0, "simpo_gamma": 0.8, "max_grad_norm": 1.0},
    ),
    "llama-lora-patterns": Case(
        **LLAMA,
        run=LORA
        | {
            "use_rslora": True,
            "lora_trainable_modules": "q_proj,v_proj,down_proj,up_proj",
            "exclude_modules": ["layers.1.mlp.up_proj"],
            "layers_to_transform": [0, 1],
            "rank_pattern": {"layers.1.self_attn.q_proj": 3, "q_proj": 5},
            "alpha_pattern": {"v_proj": 40.0},
        },
        adapter={"init_lora_weights": "gaussian"},
    ),
    # B is not zero, so the reference is not the base.
    "llama-lora-dora": Case(**LLAMA, run=LORA | {"use_dora": True}, adapter={"init_lora_weights": False}),
    "qwen2-lora-dora": Case(**QWEN2, run=LORA | {"use_dora": True, "lora_alpha": 4.0}),
    "qwen2-lora-bias": Case(
        **QWEN2,
        run=LORA | {"lora_bias": True, "lora_trainable_modules": "q_proj,v_proj"},
        adapter={"init_lora_weights": False},
    ),
    "llama-lora-saved": Case(**LLAMA, run=LORA | {"modules_to_save": ["embed_tokens", "lm_head"]}),
    # The head stays the embedding of the base, and every norm and one layer are trained whole.
    "qwen2-lora-saved": Case(
        **QWEN2, run=LORA | {"modules_to_save": ["embed_tokens", "norm", "1.self_attn.q_proj", "2.mlp.down_proj"]}
    ),
    "llama-sft": Case(**LLAMA, run={"training_method": "sft", "max_grad_norm": 3.2}),
}


def as_toml(value: Any) -> str:
    """A value in TOML: JSON, but with `=` in tables."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {as_toml(one)}" for key, one in value.items()) + " }"
    return json.dumps(value)


def words(rng: random.Random, mean: float) -> str:
    """A text of random words; its length is log-normal with about this mean."""
    count = max(1, min(80, round(rng.lognormvariate(0.0, 0.7) * mean)))
    text = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(count)]
    return "".join(word + rng.choice([" ", " ", " ", ", ", ".\n", "\n\n", "  "]) for word in text).strip()


def pair(rng: random.Random, index: int) -> Pair:
    """A pair with one question or a longer conversation; every fifth has an output that begins with blank lines."""
    messages = [{"role": "system", "content": words(rng, 6)}] if index % 4 == 1 else []
    for _ in range(index % 3):
        messages.append({"role": "user", "content": words(rng, 6)})
        messages.append({"role": "assistant", "content": words(rng, 6)})
    messages.append({"role": "user", "content": words(rng, 12)})
    blank = {0: ("\n\n", ""), 5: ("", "\n"), 9: ("\n", "\n\n")}.get(index % 15, ("", ""))
    return make_pair(messages, blank[0] + words(rng, 12), blank[1] + words(rng, 10))


def train_tokenizer(rng: random.Random, family: str) -> Tokenizer:
    """A byte-level BPE that fills the vocabulary, splitting text as the family's tokenizers do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if family == "qwen2":
        # transformers sets these two for every qwen2 folder and ignores its tokenizer.json.
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    roles = "system\nuser\nassistant\n\n\n"
    tokenizer.train_from_iterator([roles + words(rng, 40) for _ in range(200)], trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"tokenizer has {tokenizer.get_vocab_size()} tokens instead of {VOCAB_SIZE}")
    return tokenizer


def random_model(case: Case) -> PreTrainedModel:
    """A 3-layer model with grouped-query attention, every parameter random."""
    config = AutoConfig.for_model(
        case.family,
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters=case.rope,
        rms_norm_eps=1e-5,
        tie_word_embeddings=case.tied,
        initializer_range=INITIALIZER_RANGE,
        dtype="float32",
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", ".bias")):
                parameter.add_(INITIALIZER_RANGE * torch.randn_like(parameter))
    return model


def use_old_config(path: Path) -> None:
    """Rewrites rope as in most published models: `rope_theta` and `rope_scaling` instead of `rope_parameters`."""
    config = json.loads(path.read_text())
    config["rope_scaling"] = config.pop("rope_parameters")
    config["rope_theta"] = config["rope_scaling"].pop("rope_theta")
    path.write_text(json.dumps(config, indent=2) + "\n")


def write_adapter(base: Path, run: dict[str, Any], folder: Path, more: dict[str, Any]) -> None:
    """Writes a new LoRA adapter as PEFT makes it; the usual one has a random A and a zero B."""
    modules = run["lora_trainable_modules"]
    fields = {"r": run["lora_r"], "lora_alpha": run["lora_alpha"], "lora_dropout": run["lora_dropout"]}
    fields |= {"target_modules": modules if modules == "all-linear" else modules.split(",")}
    fields |= {name: run[name] for name in PEFT_NAMES if name in run}
    config = LoraConfig(task_type="CAUSAL_LM", **fields, **more)
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    adapter.save_pretrained(folder)


def write_case(name: str, out: Path) -> None:
    """Writes the folder of one case; the same name gives the same files."""
    case, run = CASES[name], RUN | CASES[name].run
    rng = random.Random(run["random_seed"])
    torch.manual_seed(run["random_seed"])
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(rng, case.family)
    save_model(random_model(case), tokenizer, out / "model", case.max_shard_size)
    if case.old_config:
        use_old_config(out / "model" / "config.json")
    save_tokenizer(tokenizer, out / "model", case.template, case.template_file)
    write_pairs(out / "pairs.jsonl", [case.form(pair(rng, index)) for index in range(N_PAIRS)])
    if run.get("lora"):
        write_adapter(out / "model", run, out / "adapter", case.adapter)
    (out / "case.json").write_text(json.dumps({"name": name, "run": run}, indent=2) + "\n")
    (out / "run.toml").write_text("".join(f"{key} = {as_toml(value)}\n" for key, value in run.items()))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--case", choices=CASES)
    what.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.list:
        print("\n".join(CASES))
    elif args.out is None:
        parser.error("--case needs --out")
    else:
        write_case(args.case, args.out)


if __name__ == "__main__":
    main()
