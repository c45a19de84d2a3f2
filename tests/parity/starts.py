"""Adapters and model folders from which a run starts, with the numbers of transformers and PEFT.

    starts.py make --dir DIR      writes the folders, pairs.jsonl and starts.json: the expected result of each start
    starts.py check --dir DIR     loads the model that Dyad has written for each start at learning rate 0, and compares it

starts.json: {name: {"run": keys of run.toml, "refused": words of the error or null, "warns": words or null,
"chosen": mean summed log-probability of the preferred outputs, "rejected": the same of the others}}

A start with `refused` null must give the numbers of transformers and PEFT.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cases import save_model, save_tokenizer, write_pairs
from make_case import CASES, LLAMA3, pair, random_model, train_tokenizer

Tensors = dict[str, torch.Tensor]
SEED = 11
N_PAIRS = 4


@dataclass(frozen=True)
class Start:
    """One folder and its expected result."""

    make: Callable[[Path], None]
    refused: str | None = None
    warns: str | None = None
    run: dict[str, Any] = field(default_factory=dict)


# --- Adapters -----------------------------------------------------------------------------------------------------


def adapter(edit: Callable[[dict[str, Any], Tensors], None] | None = None, base: str = "llama", **config: Any):
    """Writes an adapter with random weights over a base; `edit` changes its configuration and tensors as files."""

    def make(folder: Path) -> None:
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_pretrained(folder.parent / base)
        keys = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | config
        peft = get_peft_model(model, LoraConfig(**keys))
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.15)
                elif "modules_to_save" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.02)
        peft.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        if edit:
            file = folder / "adapter_model.safetensors"
            written, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(file)
            edit(written, tensors)
            (folder / "adapter_config.json").write_text(json.dumps(written))
            save_file(tensors, file, metadata={"format": "pt"})

    return make


def fields(**changes: Any) -> Callable[[dict[str, Any], Tensors], None]:
    """Changes fields of adapter_config.json."""
    return lambda config, _: config.update(changes)


def without(*names: str) -> Callable[[dict[str, Any], Tensors], None]:
    """Removes fields of adapter_config.json."""
    return lambda config, _: [config.pop(name) for name in names] and None


def half(_: dict[str, Any], tensors: Tensors) -> None:
    """Stores the adapter in bfloat16."""
    tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})


def spare(_: dict[str, Any], tensors: Tensors) -> None:
    """Adds an unexpected tensor."""
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.ones(4, 64)


def renamed(change: Callable[[str], str]) -> Callable[[dict[str, Any], Tensors], None]:
    """Renames every tensor."""

    def edit(_: dict[str, Any], tensors: Tensors) -> None:
        found = {change(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(found)

    return edit


def lacking(_: dict[str, Any], tensors: Tensors) -> None:
    """Removes a tensor."""
    del tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"]


UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|ffn).*?(?:q_proj|k_proj|v_proj|o_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|ffn)\.(?:(?:q_proj|down_proj)))"
)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

ADAPTERS: dict[str, Start] = {
    "plain": Start(adapter()),
    "qwen2": Start(adapter(base="qwen2"), run={"model": "qwen2"}),
    "own_keys_that_agree": Start(
        adapter(), run={"lora_r": 4, "lora_alpha": 8.0, "lora_trainable_modules": "self_attn.v_proj,q_proj"}
    ),
    "own_rank": Start(adapter(), refused="`lora_r` is 8, but the adapter", run={"lora_r": 8}),
    "own_alpha": Start(adapter(), refused="`lora_alpha` is 16, but the adapter", run={"lora_alpha": 16.0}),
    "own_modules": Start(
        adapter(), refused="`lora_trainable_modules` is", run={"lora_trainable_modules": "all-linear"}
    ),
    "alpha_by_end": Start(adapter(alpha_pattern={"q_proj": 32})),
    "alpha_by_name": Start(adapter(alpha_pattern={"model.layers.1.self_attn.q_proj": 1, "layers.2.self_attn.v_proj": 2})),
    "rank_by_end": Start(adapter(rank_pattern={"q_proj": 2})),
    "rank_by_regex": Start(adapter(rank_pattern={r"^model\.layers\.[01]\..*q_proj": 6, ".*v_proj": 3})),
    "rank_first_match": Start(adapter(rank_pattern={"layers.1.self_attn.q_proj": 8, "q_proj": 2, "self_attn.q_proj": 5})),
    "rank_of_a_part": Start(adapter(rank_pattern={"proj": 2, "q_pro": 3, "layers.1": 7})),
    "rank_alternatives": Start(adapter(rank_pattern={"q_proj|v_proj": 2})),
    "both_patterns": Start(adapter(rank_pattern={"1.self_attn.q_proj": 8}, alpha_pattern={r"\d\.self_attn\.q_proj": 32})),
    "rslora": Start(adapter(use_rslora=True)),
    "rslora_patterns": Start(adapter(use_rslora=True, rank_pattern={"q_proj": 9}, alpha_pattern={"v_proj": 3})),
    "whole_names": Start(
        adapter(target_modules=["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"])
    ),
    "ends_of_names": Start(adapter(target_modules=["self_attn.q_proj", "1.mlp.gate_proj", "mlp.down_proj"])),
    "all_linear": Start(adapter(target_modules="all-linear")),
    "regex": Start(adapter(target_modules=r".*self_attn\.(q_proj|v_proj)")),
    "regex_of_layers": Start(adapter(target_modules=r"model\.layers\.[02]\.(mlp\.up_proj|self_attn\.o_proj)")),
    "regex_of_unsloth": Start(adapter(target_modules=UNSLOTH)),
    "regex_lookahead": Start(
        adapter(target_modules=r"(?!.*vision).*q_proj"), refused='target_modules: the regular expression "(?!.*vision)'
    ),
    "regex_of_the_model": Start(
        adapter(fields(target_modules=".*")), refused="the whole model is not supported"
    ),
    "layers": Start(adapter(layers_to_transform=[0, 2])),
    "one_layer": Start(adapter(layers_to_transform=1, layers_pattern="layers")),
    "layers_of_several_lists": Start(adapter(layers_to_transform=[1], layers_pattern=["h", "layers"])),
    "excluded": Start(adapter(target_modules=ATTENTION, exclude_modules=["k_proj", "layers.1.self_attn.o_proj"])),
    "excluded_regex": Start(adapter(target_modules=ATTENTION, exclude_modules=r".*\.1\..*")),
    "excluded_from_all": Start(adapter(target_modules="all-linear", exclude_modules=["down_proj"])),
    "nothing_said_of_targets": Start(adapter(without("target_modules"))),
    "few_fields": Start(
        adapter(lambda config, _: [config.pop(name) for name in list(config) if name not in {"peft_type", "target_modules"}] and None, r=8)
    ),
    "nulls": Start(adapter(fields(task_type=None, exclude_modules=None, layers_pattern=None, revision=None))),
    "transposed": Start(adapter(fields(fan_in_fan_out=True)), warns="fan_in_fan_out is ignored"),
    "gaussian": Start(adapter(init_lora_weights="gaussian")),
    "bfloat16": Start(adapter(half)),
    "trained_with_dropout": Start(adapter(lora_dropout=0.5), warns="the adapter was trained with lora_dropout = 0.5"),
    "another_base": Start(
        adapter(fields(base_model_name_or_path="org/another")), warns="trained over org/another, but goes on top of"
    ),
    "another_revision": Start(adapter(fields(base_model_name_or_path="org/llama", revision="v2")), warns="revision v2"),
    "dora": Start(adapter(use_dora=True)),
    "dora_patterns": Start(
        adapter(base="qwen2", use_dora=True, target_modules="all-linear", use_rslora=True, rank_pattern={"q_proj": 9}),
        run={"model": "qwen2"},
    ),
    "dora_as_module": Start(adapter(renamed(lambda name: name.replace("_vector", "_vector.weight")), use_dora=True)),
    "dora_says_otherwise": Start(
        adapter(use_dora=True), refused="`use_dora` is false, but the adapter", run={"use_dora": False}
    ),
    "biases": Start(adapter(bias="lora_only"), refused='bias = "lora_only"'),
    "lora_bias": Start(adapter(base="qwen2", lora_bias=True), run={"model": "qwen2"}),
    "lora_bias_cannot_be_merged": Start(adapter(lora_bias=True), refused="has no bias that could take the adapter's"),
    "lora_bias_with_dora": Start(
        adapter(fields(lora_bias=True, use_dora=True)), refused="lora_bias cannot be used with use_dora"
    ),
    "saved_head": Start(adapter(modules_to_save=["lm_head"])),
    "saved_head_and_embedding": Start(adapter(modules_to_save=["lm_head", "embed_tokens"], use_dora=True)),
    "saved_head_of_tied": Start(
        adapter(base="tied", modules_to_save=["lm_head"]),
        run={"model": "tied"},
        warns="modules_to_save trains only the head",
    ),
    "saved_embedding_of_tied": Start(
        adapter(base="qwen2", modules_to_save=["embed_tokens"]),
        run={"model": "qwen2"},
        warns="modules_to_save trains only the embedding",
    ),
    "saved_norms_and_a_layer": Start(
        adapter(base="qwen2", target_modules="all-linear", modules_to_save=["norm", "1.self_attn.v_proj"]),
        run={"model": "qwen2"},
    ),
    "saved_beside_its_own_name": Start(adapter(modules_to_save=["q_proj", "score"])),
    "saved_block": Start(
        adapter(fields(modules_to_save=["mlp"])), refused="training model.layers.0.mlp is not supported"
    ),
    "saved_but_missing": Start(
        adapter(fields(modules_to_save=["lm_head"])), refused="missing tensor base_model.model.lm_head.weight"
    ),
    "adapted_head": Start(adapter(target_modules=["q_proj", "lm_head"]), refused="adapter on lm_head"),
    "adapted_embedding": Start(
        adapter(target_modules=["q_proj", "embed_tokens"]), refused="adapter on model.embed_tokens"
    ),
    "tokens": Start(adapter(trainable_token_indices=[3, 4]), refused="trainable_token_indices = [3,4]"),
    "replicated_layers": Start(adapter(fields(layer_replication=[[0, 2], [1, 3]])), refused="layer_replication = "),
    "pissa": Start(adapter(init_lora_weights="pissa"), refused='init_lora_weights = "pissa"'),
    "unknown_field": Start(adapter(fields(use_magic=True)), refused="use_magic = true"),
    "another_method": Start(adapter(fields(peft_type="IA3")), refused='peft_type = "IA3"'),
    "another_task": Start(adapter(fields(task_type="SEQ_CLS")), refused='task_type = "SEQ_CLS"'),
    "spare_tensor": Start(adapter(spare), refused="tensors that are not used: base_model.model.lm_head"),
    "missing_tensor": Start(adapter(lacking), refused="missing tensor base_model.model.model.layers.1"),
    "another_rank": Start(adapter(fields(r=8)), refused="r or rank_pattern of adapter_config.json"),
    "whole_name_beside_layers": Start(
        adapter(target_modules=["model.layers.0.self_attn.q_proj", "v_proj"], layers_to_transform=[1])
    ),
    "adapters_own_name": Start(adapter(renamed(lambda name: name.replace(".weight", ".default.weight")))),
    "compiled_adapter": Start(
        adapter(renamed(lambda name: name.replace(".model.model.", ".model._orig_mod.model."))),
        refused="there is base_model.model._orig_mod.model.layers.0",
    ),
    "one_prefix_less": Start(
        adapter(renamed(lambda name: name.replace("base_model.model.", "base_model."))),
        refused="there is base_model.model.layers.0",
    ),
}


# --- Models -------------------------------------------------------------------------------------------------------


def model(
    base: str = "llama",
    drop: tuple[str, ...] = (),
    edit: Callable[[Tensors], Tensors | None] | None = None,
    after: Callable[[Path], None] | None = None,
    **config: Any,
):
    """Writes a copy of a base with another configuration and other tensors."""

    def make(folder: Path) -> None:
        torch.manual_seed(SEED)
        shutil.copytree(folder.parent / base, folder)
        written = json.loads((folder / "config.json").read_text())
        written = {name: value for name, value in written.items() if name not in drop} | config
        (folder / "config.json").write_text(json.dumps(written))
        if edit:
            file = folder / "model.safetensors"
            tensors = load_file(file)
            tensors = edit(tensors) or tensors
            save_file({name: t.contiguous() for name, t in tensors.items()}, file, metadata={"format": "pt"})
        if after:
            after(folder)

    return make


def named(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    """Renames every tensor."""
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def projections(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    """Changes the weights of linear layers."""
    return lambda tensors: {n: change(t) if n.endswith("proj.weight") else t for n, t in tensors.items()}


def mixed(tensors: Tensors) -> Tensors:
    """Rounds all tensors to bfloat16, and stores linear layers in bfloat16 and the others in float32."""
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    return {name: t if name.endswith("proj.weight") else t.float() for name, t in rounded.items()}


def head(scale: float) -> Callable[[Tensors], None]:
    """Adds a head to a tied model that differs from the embedding by noise of this scale."""

    def edit(tensors: Tensors) -> None:
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding + scale * torch.randn_like(embedding)

    return edit


def only_head(tensors: Tensors) -> None:
    """Renames the tied embedding to the head."""
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def old_buffer(tensors: Tensors) -> None:
    """Adds a buffer that old releases saved."""
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.randn(8)


def extra(tensors: Tensors) -> None:
    """Adds a bias that the configuration does not have."""
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.randn(64)


def shards(lie: Callable[[dict[str, str]], None] | None = None, both: bool = False) -> Callable[[Path], None]:
    """Splits the model into two files. `lie` changes the index; with `both`, a tensor is in both files with different values."""

    def after(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names, weight_map = sorted(tensors), {}
        for number, part in enumerate([names[:12], names[12:]], 1):
            file = f"model-0000{number}-of-00002.safetensors"
            held = {name: tensors[name] for name in part}
            if both and number == 2:
                held[names[0]] = tensors[names[0]] + 1
            save_file(held, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        if lie:
            lie(weight_map)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return after


def pointer(name: str) -> Callable[[Path], None]:
    """Replaces a file by a Git LFS pointer."""
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 15394\n"
    return lambda folder: (folder / name).write_text(text) and None


def as_bin(folder: Path) -> None:
    """Stores the weights as a pickle."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def adapter_inside(folder: Path) -> None:
    """Adds an adapter's configuration to the model folder."""
    config = {"peft_type": "LORA", "base_model_name_or_path": str(folder.parent / "llama"), "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))


QUANTISED = {"quantization_config": {"quant_method": "gptq", "bits": 8}}
LINEAR = {"type": "linear", "factor": 2.0}
LLAMA_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

MODELS: dict[str, Start] = {
    "untouched": Start(model()),
    "adapter_inside": Start(model(after=adapter_inside), refused="holds a whole model (config.json) and an adapter"),
    "other_file": Start(model(transformers_weights="other.safetensors"), refused='transformers_weights = "other.safetensors"'),
    "llama_window": Start(model(sliding_window=4), warns="llama does not know are ignored: sliding_window"),
    "tied_other_head": Start(model("tied", edit=head(0.2)), warns="they are not tied"),
    "tied_equal_head": Start(model("tied", edit=head(0.0))),
    "tied_only_head": Start(model("tied", edit=only_head)),
    "untied_no_head": Start(model("tied", tie_word_embeddings=False), refused="missing tensor lm_head.weight"),
    "fewer_layers": Start(model(num_hidden_layers=2), warns="UNEXPECTED tensors"),
    "more_layers": Start(model(num_hidden_layers=4), refused="missing tensors model.layers.3."),
    "unknown_biases": Start(model(edit=extra), warns="UNEXPECTED tensors"),
    "old_buffers": Start(model(edit=old_buffer)),
    "no_prefix": Start(model(edit=named(lambda name: name.removeprefix("model.")))),
    "prefixed_head": Start(model(edit=named(lambda name: f"model.{name}" if name == "lm_head.weight" else name))),
    "compiled": Start(model(edit=named(lambda name: f"_orig_mod.{name}")), refused="missing tensors model.embed_tokens"),
    "no_eps": Start(model(drop=("rms_norm_eps",))),
    "no_length": Start(model(drop=("max_position_embeddings",))),
    "no_kv_heads": Start(model(num_key_value_heads=None), refused="has shape [32, 64], expected [64, 64]"),
    "rope_old": Start(model(drop=("rope_parameters",), rope_scaling=LINEAR, rope_theta=5e5)),
    "rope_both": Start(model(rope_scaling=LINEAR, rope_theta=2e4), warns="rope_scaling counts"),
    "rope_two_thetas": Start(model(rope_parameters={"rope_type": "default", "rope_theta": 3e4}, rope_theta=7.0), warns="rope_theta is 7"),
    "rope_null": Start(model(rope_parameters=None, rope_scaling=None, rope_theta=5e5)),
    "rope_llama3_length": Start(model(drop=("rope_parameters",), rope_scaling=LLAMA_ROPE, rope_theta=5e3, max_position_embeddings=1024)),
    "rope_llama3_beside": Start(model(drop=("rope_parameters",), rope_scaling=LLAMA_ROPE, rope_theta=5e3, original_max_position_embeddings=16)),
    "rope_spare_fields": Start(model(drop=("rope_parameters",), rope_scaling=LINEAR | {"beta_fast": 3}), warns="does not read beta_fast"),
    "rope_yarn": Start(model(drop=("rope_parameters",), rope_scaling={"rope_type": "yarn", "factor": 4.0}), refused='rope scaling "yarn"'),
    "half": Start(model(edit=lambda tensors: {name: t.half() for name, t in tensors.items()}, dtype="float16")),
    "mixed": Start(model(edit=mixed, dtype="bfloat16")),
    "double": Start(model(edit=projections(torch.Tensor.double))),
    "dtype_auto": Start(model(dtype="auto"), refused='dtype "auto"'),
    "dtype_null": Start(model(dtype=None)),
    "quantised_field": Start(model(**QUANTISED), refused='quantised by "gptq"'),
    "quantised_int8": Start(model(edit=projections(lambda t: t.mul(50).clamp(-127, 127).to(torch.int8))), refused="unsupported dtype I8"),
    "quantised_uint8": Start(model(edit=projections(lambda t: t.mul(50).add(128).clamp(0, 255).to(torch.uint8))), refused="unsupported dtype U8"),
    "zero3": Start(model(edit=projections(lambda t: torch.empty(0))), refused="has shape [0]"),
    "sliding": Start(
        model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1, layer_types=None),
        warns="attention windows (sliding_window = 8)",
    ),
    "sliding_default": Start(
        model("qwen2", drop=("sliding_window",), use_sliding_window=True, max_window_layers=0, layer_types=None),
        warns="attention windows (sliding_window = 4096)",
    ),
    "sliding_without_sharing": Start(
        model("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=0, layer_types=None),
        warns="attention windows (sliding_window = 5)",
        run={"prefix_sharing": False},
    ),
    "window_never_begins": Start(model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=28, layer_types=None)),
    "sliding_layer": Start(
        model(
            "qwen2",
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            use_sliding_window=True,
            sliding_window=8,
        ),
        warns="attention windows (sliding_window = 8)",
    ),
    "sliding_layer_without_window": Start(
        model("qwen2", layer_types=["full_attention", "sliding_attention", "full_attention"], sliding_window=8),
        refused='layer_types "sliding_attention"',
    ),
    **{f"activation_{name}": Start(model(hidden_act=name)) for name in ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "swish")},
    "activation_qwen2": Start(model("qwen2", hidden_act="gelu")),
    "activation_mish": Start(model(hidden_act="mish"), refused='hidden_act = "mish"'),
    "attention_dropout": Start(model(attention_dropout=0.1), refused="attention_dropout = 0.1"),
    "softcap": Start(model(final_logit_softcapping=30.0), refused="final_logit_softcapping = 30.0"),
    "strange_field": Start(model(my_own_note="a"), warns="fields that llama does not know are ignored: my_own_note"),
    "no_layers": Start(model(num_hidden_layers=0), refused="num_hidden_layers = 0"),
    "pickle": Start(model(after=as_bin), refused="no weights in"),
    "shards": Start(model(after=shards())),
    "shard_missing": Start(model(after=lambda f: shards()(f) or (f / "model-00002-of-00002.safetensors").unlink()), refused="cannot read"),
    "shards_without_index": Start(model(after=lambda f: shards()(f) or (f / "model.safetensors.index.json").unlink()), refused="no weights in"),
    "shard_outside": Start(
        model(after=shards(lambda names: names.update({next(iter(names)): "../llama/model.safetensors"}))),
        refused="not the name of a file in this folder",
    ),
    "shard_lies": Start(
        model(after=shards(lambda names: names.update({next(iter(names)): "model-00002-of-00002.safetensors"}))),
        refused="should be in model-00002-of-00002.safetensors, and is not",
    ),
    "shards_disagree": Start(model(after=shards(both=True)), refused="with different values"),
    "pointer_weights": Start(model(after=pointer("model.safetensors")), refused="is a Git LFS pointer"),
    "pointer_tokenizer": Start(model(after=pointer("tokenizer.json")), refused="is a Git LFS pointer"),
    "pointer_config": Start(model(after=pointer("config.json")), refused="is a Git LFS pointer"),
}


# --- Expected numbers ---------------------------------------------------------------------------------------------


def write_bases(out: Path) -> None:
    """Writes three small models, from which all starts are derived."""
    for name, case in {"llama": "llama", "tied": "llama-tied", "qwen2": "qwen2"}.items():
        rng = random.Random(SEED)
        torch.manual_seed(SEED)
        tokenizer = train_tokenizer(rng, CASES[case].family)
        save_model(random_model(CASES[case]), tokenizer, out / name)
        save_tokenizer(tokenizer, out / name, LLAMA3)
    write_pairs(out / "pairs.jsonl", [pair(rng, index) for index in range(N_PAIRS)])


def ids(tokenizer: Any, messages: list[dict[str, str]], prompt: bool) -> list[int]:
    """Token ids of a conversation."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)["input_ids"]


def common(a: list[int], b: list[int]) -> int:
    """Length of the common prefix."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


@torch.no_grad()
def scores(network: PreTrainedModel | PeftModel, tokenizer: Any, pairs: list[dict[str, Any]]) -> tuple[float, float]:
    """Mean summed log-probability of both sides' completions; prompt and completion are split as in TRL."""
    sums = [0.0, 0.0]
    for one in pairs:
        messages = one["input"]["messages"]
        prompt = ids(tokenizer, messages, True)
        whole = [ids(tokenizer, messages + one[side], False) for side in ("preferred_output", "non_preferred_output")]
        start = min(common(prompt, side) for side in whole)
        for side, tokens in enumerate(whole):
            row = torch.tensor(tokens)
            logits = network(input_ids=row.unsqueeze(0)).logits[0, start - 1 : -1].log_softmax(-1)
            sums[side] += logits.gather(1, row[start:].unsqueeze(1)).double().sum().item()
    return sums[0] / len(pairs), sums[1] / len(pairs)


def loaded(folder: Path) -> PreTrainedModel:
    """Loads a model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def make(out: Path) -> None:
    """Writes all folders, pairs.jsonl and starts.json."""
    out.mkdir(parents=True, exist_ok=True)
    write_bases(out)
    pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text(encoding="utf-8").split("\n") if line]
    starts: dict[str, Any] = {}
    for kind, group in {"adapter": ADAPTERS, "model": MODELS}.items():
        for name, start in group.items():
            folder = out / f"{kind}-{name}"
            start.make(folder)
            if kind == "adapter":
                run = {"model": "llama", "from_checkpoint": folder.name, "lora": True, "merge_adapter": True} | start.run
            else:
                run = {"model": folder.name} | start.run
            entry = {"run": run, "refused": start.refused, "warns": start.warns}
            if start.refused is None:
                network = loaded(out / run["model"])
                if kind == "adapter":
                    network = PeftModel.from_pretrained(network, folder).eval()
                tokenizer = AutoTokenizer.from_pretrained(out / run["model"])
                entry["chosen"], entry["rejected"] = scores(network, tokenizer, pairs)
            starts[folder.name] = entry
    (out / "starts.json").write_text(json.dumps(starts, indent=1) + "\n")


def check(folder: Path) -> None:
    """Compares every `final` (and `final/merged`) of a run at learning rate 0 with its start."""
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").split("\n") if line]
    wrong = []
    for name, start in json.loads((folder / "starts.json").read_text()).items():
        final = folder / f"out-{name}" / "final"
        if not final.is_dir():
            continue
        tokenizer = AutoTokenizer.from_pretrained(final)
        if (final / "adapter_config.json").is_file():
            networks = {"final": PeftModel.from_pretrained(loaded(folder / start["run"]["model"]), final).eval()}
            networks["merged"] = loaded(final / "merged")
        else:
            networks = {"final": loaded(final)}
        for what, network in networks.items():
            found, right = scores(network, tokenizer, pairs), (start["chosen"], start["rejected"])
            if max(abs(a - b) / abs(b) for a, b in zip(found, right)) > 1e-5:
                wrong.append(f"{name} {what}: {found}, right is {right}")
    if wrong:
        sys.exit("\n".join(wrong))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "check"])
    parser.add_argument("--dir", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    make(args.dir) if args.what == "make" else check(args.dir)


if __name__ == "__main__":
    main()
