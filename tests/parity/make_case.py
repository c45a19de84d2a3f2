"""Writes a tiny random model, preference pairs and (with --lora) an adapter: the input of one parity test.

    make_case.py --out DIR --family llama|qwen2 [--tied] [--rope-llama3] [--sharded] [--lora [fresh|trained]]
                 --seed S --pairs 72

DIR/model is a Hugging Face folder, DIR/pairs.jsonl a training file of Dyad, DIR/adapter a PEFT folder.
Weights are larger than a fresh model's, norms and biases are not 1 and 0, and some outputs begin with blank lines that
merge with the prompt's last token, so that leaving out any part of the computation shows in the numbers.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cases import SPECIAL_TOKENS, Pair, make_pair, save_model, write_pairs

VOCAB_SIZE = 512
INITIALIZER_RANGE = 0.15
SYLLABLES = ["ba", "ko", "ri", "tu", "men", "sal", "ve", "dor", "ny", "pli", "gé", "straß", "über", "qua", "🙂"]


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


def train_tokenizer(rng: random.Random) -> Tokenizer:
    """A byte-level BPE that fills the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    roles = "system\nuser\nassistant\n\n\n"
    tokenizer.train_from_iterator([roles + words(rng, 40) for _ in range(200)], trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"tokenizer has {tokenizer.get_vocab_size()} tokens instead of {VOCAB_SIZE}")
    return tokenizer


def random_model(family: str, tied: bool, rope_llama3: bool) -> PreTrainedModel:
    """A 3-layer model with grouped-query attention, every parameter random."""
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": 10_000.0}
    if rope_llama3:
        # Trained length 64: at head size 16 some wavelengths are kept, some blended, some stretched.
        rope |= {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope["original_max_position_embeddings"] = 64
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters=rope,
        tie_word_embeddings=tied,
        initializer_range=INITIALIZER_RANGE,
        dtype="float32",
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", ".bias")):
                parameter.add_(INITIALIZER_RANGE * torch.randn_like(parameter))
    return model


def random_adapter(model: PreTrainedModel, trained: bool) -> PeftModel:
    """A LoRA adapter on all linear layers of the blocks; B is zero unless `trained`."""
    adapter = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")
    )
    if trained:
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn_like(parameter))
    return adapter


def main() -> None:
    """Writes the case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--family", choices=["llama", "qwen2"], required=True)
    parser.add_argument("--tied", action="store_true", help="share the embedding with the output head")
    parser.add_argument("--rope-llama3", action="store_true", help="Llama 3's rope scaling")
    parser.add_argument("--sharded", action="store_true", help="spread the weights over several files")
    parser.add_argument("--lora", choices=["fresh", "trained"], nargs="?", const="fresh", help="B = 0, or B random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=72)
    args = parser.parse_args()

    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    model = random_model(args.family, args.tied, args.rope_llama3)
    save_model(model, train_tokenizer(rng), args.out / "model", "200KB" if args.sharded else "5GB")
    write_pairs(args.out / "pairs.jsonl", [pair(rng, index) for index in range(args.pairs)])
    if args.lora:
        base = AutoModelForCausalLM.from_pretrained(args.out / "model")
        random_adapter(base, args.lora == "trained").save_pretrained(args.out / "adapter")


if __name__ == "__main__":
    main()
