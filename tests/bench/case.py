"""The benchmark's model and pairs: about 60 M parameters, vocabulary 32,000, prompts of about 150 tokens, outputs of 65."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent / "parity"))
from cases import Pair, make_pair, write_pairs

VOCAB_SIZE = 32_000
SPECIAL = ["<pad>", "<end>", "<turn>", "user", "assistant"]
TEMPLATE = (
    "{% for message in messages %}{{ '<turn> ' + message['role'] + ' ' + message['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn> assistant ' }}{% endif %}"
)


def write_model(folder: Path, vocab_size: int = VOCAB_SIZE, layers: int = 8) -> None:
    """Writes a Llama with random weights, and a tokenizer that makes every word one token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="float32",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    write_tokenizer(folder, vocab_size)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Writes a tokenizer that makes every word one token."""
    words = SPECIAL + [f"w{index}" for index in range(vocab_size - len(SPECIAL))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)


def words(rng: random.Random, mean: int) -> str:
    """Random words; their number is log-normal, as in real texts."""
    count = max(4, min(4 * mean, round(mean * rng.lognormvariate(-0.08, 0.4))))
    return " ".join(f"w{rng.randrange(VOCAB_SIZE - len(SPECIAL))}" for _ in range(count))


def pair(rng: random.Random, times: int) -> Pair:
    """One question and two answers, `times` as long as usual."""
    question, answers = words(rng, times * 146), [words(rng, times * 64) for _ in range(2)]
    return make_pair([{"role": "user", "content": question}], *answers)


def write_case(folder: Path, pairs: int, times: int = 1, vocab_size: int = VOCAB_SIZE, layers: int = 8) -> None:
    """Writes `model/` and `pairs.jsonl`; sizes default to the usual case."""
    rng = random.Random(0)
    write_model(folder / "model", vocab_size, layers)
    write_pairs(folder / "pairs.jsonl", [pair(rng, times) for _ in range(pairs)])
