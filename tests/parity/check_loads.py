"""Checks that transformers (and PEFT) load a folder that Dyad wrote, and that the model runs.

    check_loads.py --dir FINAL                          a full model
    check_loads.py --dir FINAL --base MODEL             a LoRA adapter on MODEL
    check_loads.py --dir FINAL --base MODEL --merged    a merged model: equals PEFT's merge of the adapter in the folder above

Exits with status 1 and one line at the first problem.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

MESSAGES = [{"role": "user", "content": "How do I boil an egg?"}]


def check(holds: bool, problem: str) -> None:
    """Ends the program with the problem if the condition does not hold."""
    if not holds:
        print(f"DOES NOT LOAD: {problem}")
        sys.exit(1)


def load_model(folder: Path) -> PreTrainedModel:
    """Loads a full model. Fails if a tensor is missing, unexpected or has another shape."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    for kind, names in report.items():
        check(not names, f"{folder}: {kind}: {sorted(map(str, names))}")
    return model


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Loads an adapter. Fails unless its tensors and values are exactly those of its file."""
    model = PeftModel.from_pretrained(base, folder)
    check(isinstance(model.peft_config["default"], LoraConfig), f"{folder}: not a LoRA adapter")
    file, loaded = load_file(folder / "adapter_model.safetensors"), get_peft_model_state_dict(model)
    check(file.keys() == loaded.keys(), f"{folder}: keys apart: {sorted(file.keys() ^ loaded.keys())}")
    for name, tensor in loaded.items():
        check(torch.equal(tensor, file[name].to(tensor.dtype)), f"{folder}: {name} was not taken from the file")
    return model


def check_merged(merged: PreTrainedModel, base: PreTrainedModel, adapter: Path) -> None:
    """Fails unless every tensor is that of PEFT's merged model; float32 sums differ in their order."""
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected, after = load_adapter(base, adapter).merge_and_unload().state_dict(), merged.state_dict()
    check(expected.keys() == after.keys(), f"keys apart: {sorted(expected.keys() ^ after.keys())}")
    changed = 0
    for name, tensor in after.items():
        off = (tensor.double() - expected[name].double()).abs().max().item()
        check(off <= 1e-5 * expected[name].abs().max().item(), f"{name} is off by {off} from PEFT's merged model")
        changed += not torch.equal(tensor, before[name].to(tensor.dtype))
    check(changed > 0, "the merged model equals its base")
    print(f"merged: {changed} tensors changed, all as in PEFT")


def load(folder: Path, base: Path | None, merged: bool) -> PreTrainedModel | PeftModel:
    """Loads the model or adapter of the folder."""
    if (folder / "adapter_config.json").exists():
        check(not merged, f"{folder} is an adapter, not a merged model")
        check(base is not None, f"{folder} is an adapter: give its model with --base")
        return load_adapter(load_model(base), folder)
    model = load_model(folder)
    if merged:
        check(base is not None, "--merged needs --base")
        check_merged(model, load_model(base), folder.parent)
    return model


def check_runs(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Runs one prompt through tokenizer, chat template and model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check(bool(tokenizer.chat_template), f"{folder}: the tokenizer has no chat template")
    check(tokenizer.eos_token is not None and tokenizer.pad_token is not None, f"{folder}: no eos or pad token")
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    check(MESSAGES[0]["content"] in text, f"{folder}: the chat template drops the content: {text!r}")
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
    check(bool(logits.isfinite().all()), "the logits are not finite")
    rows = model.get_input_embeddings().weight.shape[0]
    check(int(ids.max()) < rows == logits.shape[-1], f"token ids and logits do not fit {rows} embeddings")
    print(f"loads: {type(model).__name__}, {sum(p.numel() for p in model.parameters())} parameters, dtype {model.dtype}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="the model under an adapter, or before merging")
    parser.add_argument("--merged", action="store_true", help="the folder is an adapter merged into --base")
    args = parser.parse_args()
    check_runs(load(args.dir, args.base, args.merged), args.dir)


if __name__ == "__main__":
    main()
