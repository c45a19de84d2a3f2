"""Tokenizer folders of many kinds, and the ids that transformers' AutoTokenizer gives for texts with each.

    tokenizer_classes.py DIR      writes a folder per case, and DIR/tokenizers.json: {name: {"ids": [ids of each text], "special": text,
                                  "plain": [ids with the special tokens that are added]}}, or {"refused": words of the error} if
                                  Dyad refuses the case, or {"fails": error} if transformers cannot tokenise with it
    tokenizer_classes.py classes  prints the classes of transformers that rebuild a tokenizer or are not fast tokenizers
    tokenizer_classes.py families prints a line per model family: its name, its class, and whether the class replaces what files declare
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer
from transformers.models.auto import tokenization_auto
from transformers.tokenization_utils_tokenizers import TokenizersBackend

Json = dict[str, Any]

TEXTS = [
    "Hello world",
    " Hello  world ",
    "<s>[INST] Hi there [/INST] Well, hello.</s>",
    "<s> one</s><s>two</s>\n\n three",
    "<|endoftext|>In 1234 and 56789 ways, it's 7.5 % naïve: 東京, é 🙂\r\n\ttab",
    "<|im_start|>user\nWhat's new?<|im_end|>\n<|im_start|>assistant\n",
    "a<tool> b <tool>c  <pad><unk> end<mask> x",
    "▁already ▁marked",
    "x <own>y <img> <eoi> <a> <b> <c> z",
    "",
]
WORDS = "the a hello world what's new in ways it is one two three user assistant system naïve tokens end tab 12 34 567 [INST] [/INST]"
SPECIAL = "{{ [bos_token, eos_token, unk_token, pad_token, mask_token, boi, eoi, own_token, image_token] | map('string') | join('|') }}"


def corpus() -> list[str]:
    words = WORDS.split()
    return [" ".join(words[(i * j) % len(words)] for j in range(1, 12)) + "\n" for i in range(1, 60)]


def sentencepiece() -> Tokenizer:
    """A tokenizer like that of the first Llama models."""
    tokenizer = Tokenizer(models.BPE(fuse_unk=True, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    alphabet = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    trained = json.loads(tokenizer.to_str())
    trained["added_tokens"] = [token for token in trained["added_tokens"] if token["id"] < 3]
    return Tokenizer.from_str(json.dumps(trained))


def byte_level(*before: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    parts = [*before, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts) if before else parts[0]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def token(content: str, **flags: bool) -> Json:
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True, "special": False}
    return {"content": content} | plain | flags


def cases() -> dict[str, Json]:
    spm, bytes_, digits = sentencepiece(), byte_level(), byte_level(pre_tokenizers.Digits(individual_digits=True))
    metaspace = copy.deepcopy(spm)
    metaspace.normalizer = None
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", False)
    split = copy.deepcopy(bytes_)
    split.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\p{L}+|\s+|."), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    extra = copy.deepcopy(spm)
    extra.add_tokens([AddedToken("<tool>", special=False, lstrip=True)])
    extra.add_special_tokens([AddedToken("<pad>", rstrip=True)])
    decoder = {"0": token("<unk>", special=True, normalized=False), "1": token("<s>", special=True, normalized=False)}
    decoder |= {"2": token("</s>", special=True, normalized=False), "520": token("<tool>", lstrip=True)}
    dropout = byte_level()
    dropout.model.dropout = 0.1
    found: dict[str, Json] = {}

    def case(name: str, tokenizer: Tokenizer, family: str = "llama", refused: str | None = None, **config: Any) -> None:
        config.setdefault("chat_template", SPECIAL)
        special_map, files = config.pop("special_map", None), config.pop("files", {})
        found[name] = {"tokenizer": tokenizer, "family": family, "config": config, "refused": refused, "map": special_map, "files": files}

    for label, tokenizer in [("spm", spm), ("metaspace", metaspace), ("extra", extra)]:
        case(f"{label}-as-it-is", tokenizer)
        for legacy in (None, True, False):
            for prefix in (None, True, False):
                flags = {"legacy": legacy, "add_prefix_space": prefix}
                case(f"{label}-llama-{legacy}-{prefix}", tokenizer, tokenizer_class="LlamaTokenizer", **flags)
        case(f"{label}-llama-fast", tokenizer, tokenizer_class="LlamaTokenizerFast", pad_token="<pad>")
        case(f"{label}-llama-decoder", tokenizer, tokenizer_class="LlamaTokenizer", added_tokens_decoder=decoder)
        case(f"{label}-llama-null", tokenizer, tokenizer_class="LlamaTokenizer", bos_token=None, unk_token=None)
        more = {"additional_special_tokens": ["<mask>", "<tool>"], "mask_token": "<mask>"}
        case(f"{label}-llama-more", tokenizer, tokenizer_class="LlamaTokenizer", **more)
        case(f"{label}-backend", tokenizer, tokenizer_class="TokenizersBackend", bos_token="<s>")
        case(f"{label}-unknown-class", tokenizer, tokenizer_class="SomeTokenizer", eos_token="</s>")
        case(f"{label}-class-of-the-model", tokenizer, family="llama:LlamaTokenizer")
        case(f"{label}-gemma", tokenizer, tokenizer_class="GemmaTokenizer")
        case(f"{label}-gemma-other-unk", tokenizer, "gemma2", tokenizer_class="GemmaTokenizerFast", unk_token="Hello", mask_token=None)
        case(f"{label}-gemma-null", tokenizer, "gemma3_text", tokenizer_class="GemmaTokenizer", unk_token=None, pad_token=None)
        case(f"{label}-gemma-decoder", tokenizer, tokenizer_class="GemmaTokenizer", added_tokens_decoder=decoder, bos_token="<s>")
        case(f"{label}-t5", tokenizer, refused="tokenizer_class T5Tokenizer is not supported", tokenizer_class="T5Tokenizer")
        for family in ("gemma", "mistral", "phi3", "qwen2", "olmo2", "smollm3"):
            case(f"{label}-{family}-llama", tokenizer, family, tokenizer_class="LlamaTokenizerFast")
    for label, tokenizer in [("bytes", bytes_), ("digits", digits), ("split", split)]:
        case(f"{label}-as-it-is", tokenizer)
        case(f"{label}-llama-fast", tokenizer, tokenizer_class="LlamaTokenizerFast", bos_token="<|endoftext|>")
        for prefix in (None, True, False):
            flags = {} if prefix is None else {"add_prefix_space": prefix}
            case(f"{label}-gpt2-{prefix}", tokenizer, tokenizer_class="GPT2Tokenizer", **flags)
            case(f"{label}-qwen2-{prefix}", tokenizer, tokenizer_class="Qwen2TokenizerFast", **flags)
            case(f"{label}-family-qwen2-{prefix}", tokenizer, "qwen2", tokenizer_class="PreTrainedTokenizerFast", **flags)
            for class_name in ("Qwen3_5Tokenizer", "GPTNeoXTokenizer", "CohereTokenizer"):
                case(f"{label}-{class_name}-{prefix}", tokenizer, tokenizer_class=class_name, **flags)
        marked = {"eos_token": {"__type": "AddedToken"} | token("<|im_end|>", lstrip=True), "mask_token": "<mask>"}
        for class_name in ("Qwen2Tokenizer", "Qwen3_5Tokenizer", "GPTNeoXTokenizer", "CohereTokenizer"):
            case(f"{label}-{class_name}-marked", tokenizer, tokenizer_class=class_name, additional_special_tokens=["<tool>"], **marked)
        for family in (
            "cohere2", "deepseek_v3", "gemma2", "glm4", "gpt_neox", "gpt_oss", "granite", "mistral", "olmo", "olmo2", "olmo3", "phi", "phi3",
            "qwen3", "qwen3_5_text", "qwen3_5", "smollm3", "starcoder2",
        ):
            for class_name in ("PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", "SomeTokenizer", None):
                declared = {} if class_name is None else {"tokenizer_class": class_name}
                case(f"{label}-family-{family}-{class_name}", tokenizer, family, **declared)
        case(f"{label}-family-qwen2", tokenizer, "qwen2", eos_token="<|im_end|>", pad_token=None)
        lists = {"added_tokens_decoder": {"0": token("<|endoftext|>", special=True, normalized=False), "700": token("<tool>", rstrip=True)}}
        case(f"{label}-family-qwen2-llama", tokenizer, "qwen2", tokenizer_class="LlamaTokenizerFast", **lists)
        case(f"{label}-gpt2-decoder", tokenizer, tokenizer_class="GPT2Tokenizer", mask_token="<mask>", **lists)
    around = processors.TemplateProcessing(single="<s>:0 $A:0 </s>:0", pair="<s>:0 $A:0 $B:1", special_tokens=[("<s>", 1), ("</s>", 2)])
    bert = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    chain = processors.Sequence([processors.ByteLevel(trim_offsets=True), around])
    for label, processor in [("template", around), ("bert", bert), ("sequence", chain), ("bytes", processors.ByteLevel())]:
        adding = copy.deepcopy(spm)
        adding.post_processor = processor
        for class_name in ("LlamaTokenizer", "GPTNeoXTokenizer", "CohereTokenizer", "GemmaTokenizer", "TokenizersBackend"):
            for flags in ({}, {"add_bos_token": True}, {"add_eos_token": True}, {"add_bos_token": False}, {"add_bos_token": None, "add_eos_token": True}):
                flag = "-".join(f"{key[4:7]}{value}" for key, value in flags.items())
                keys = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": class_name}
                case(f"adds-{label}-{class_name[:4]}-{flag}", adding, **keys, **flags)
    case("adds-without-bos", spm, tokenizer_class="TokenizersBackend", add_bos_token=True)
    named = {"boi": "Hello", "own_token": "<own>"}
    listed = ["<mask>", "<tool>"]
    for label, keys, special_map in [
        ("specific", {"model_specific_special_tokens": named}, None),
        ("specific-over-bos", {"bos_token": "<s>", "model_specific_special_tokens": {"bos_token": "Hello"}}, None),
        ("specific-and-own", {"image_token": "<img>", "model_specific_special_tokens": named}, None),
        ("specific-and-dict", {"extra_special_tokens": {"eoi": "<eoi>"}, "model_specific_special_tokens": named}, None),
        ("dict-and-list", {"extra_special_tokens": named, "additional_special_tokens": listed}, None),
        ("dict-and-list-of-map", {"extra_special_tokens": named}, {"additional_special_tokens": listed}),
        ("list-and-dict-of-map", {"additional_special_tokens": listed}, {"extra_special_tokens": named}),
        ("list-and-list-of-map", {"extra_special_tokens": ["<a>"]}, {"extra_special_tokens": ["<b>", {"content": "<c>", "lstrip": True}]}),
        ("both-lists", {"extra_special_tokens": ["<a>"], "additional_special_tokens": listed}, None),
        ("own-of-map", {}, {"own_token": "<own>", "bos_token": {"content": "<s>", "rstrip": True}}),
        ("dict-of-map-and-specific", {"model_specific_special_tokens": {"eoi": "<eoi>"}}, {"extra_special_tokens": named}),
    ]:
        case(f"names-{label}", bytes_, special_map=special_map, **keys)
        case(f"names-{label}-llama", extra, special_map=special_map, tokenizer_class="LlamaTokenizer", **keys)
    one, two = "first {{ messages[0].content }}", "second {{ messages[0].content }}"
    jinja, tools = "chat_template.jinja", "additional_chat_templates/tool_use.jinja"
    none = "several chat templates and none is called default"
    pairs = [{"name": "tool_use", "template": one}, {"name": "default", "template": two}]
    for label, template, files, refused in [
        ("text", one, {}, None),
        ("file-over-text", one, {jinja: two}, None),
        ("listed", pairs, {}, None),
        ("named", {"default": one, "rag": two}, {}, None),
        ("file-beside-others", None, {jinja: one, tools: two}, None),
        ("default-among-others", None, {"additional_chat_templates/default.jinja": one, tools: two}, None),
        ("both-defaults", None, {jinja: one, "additional_chat_templates/default.jinja": two}, None),
        ("listed-without-default", pairs[:1], {}, none),
        ("named-without-default", {"rag": one, "tool_use": two}, {}, none),
        ("others-over-text", one, {tools: two}, none),
        ("no-template", None, {}, "has no chat template"),
        ("old-file", None, {"chat_template.json": json.dumps({"chat_template": one})}, "has no chat template"),
    ]:
        case(f"template-{label}", bytes_, refused=refused, files=files, chat_template=template)
    case("dropout", dropout, refused="model.dropout = 0.1 is not supported")
    case("unigram-as-it-is", unigram(), tokenizer_class="PreTrainedTokenizerFast")
    case("unigram-llama", unigram(), refused="LlamaTokenizer needs a vocabulary with merges", tokenizer_class="LlamaTokenizer")
    return found


def write(folder: Path, case: Json) -> None:
    folder.mkdir(parents=True)
    case["tokenizer"].save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(case["config"]))
    for path, text in case["files"].items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text)
    if case["map"]:
        (folder / "special_tokens_map.json").write_text(json.dumps(case["map"]))
    family, _, tokenizer_class = case["family"].partition(":")
    config = {"model_type": family} | ({"tokenizer_class": tokenizer_class} if tokenizer_class else {})
    (folder / "config.json").write_text(json.dumps(config))


def main(target: Path) -> None:
    result = {}
    for name, case in cases().items():
        write(target / name, case)
        if case["refused"]:
            result[name] = {"refused": case["refused"]}
            if name.startswith("template-"):
                fails(target / name)
            continue
        tokenizer = AutoTokenizer.from_pretrained(str(target / name))
        try:
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
        except Exception as error:  # noqa: BLE001
            # The class asks for tokens that the vocabulary lacks.
            result[name] = {"fails": str(error)}
            continue
        special = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        plain = [tokenizer(text)["input_ids"] for text in TEXTS]
        result[name] = {"ids": ids, "special": special, "plain": plain}
    (target / "tokenizers.json").write_text(json.dumps({"texts": TEXTS, "cases": result}))


def fails(folder: Path) -> None:
    """Fails if transformers finds a template in the folder."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    except ValueError:
        return
    raise SystemExit(f"{folder.name}: transformers finds a template")


def classes() -> list[str]:
    names = {name for name in dir(transformers) if name.endswith(("Tokenizer", "TokenizerFast"))}
    names |= {name for name in tokenization_auto.TOKENIZER_MAPPING_NAMES.values() if name}
    found = set()
    for name in {name.removesuffix("Fast") for name in names}:
        find = tokenization_auto.tokenizer_class_from_name
        kind = find(name) or find(name + "Fast")
        if kind in (None, TokenizersBackend, transformers.PreTrainedTokenizer):
            continue
        if issubclass(kind, TokenizersBackend):
            own = kind.__mro__[: kind.__mro__.index(TokenizersBackend)]
            if not any("__init__" in part.__dict__ for part in own):
                continue
        found.add(name)
    return sorted(found)


if sys.argv[1] == "families":
    for family, class_name in tokenization_auto.TOKENIZER_MAPPING_NAMES.items():
        print(family, class_name, family in tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS)
elif sys.argv[1] == "classes":
    print("\n".join(classes()))
else:
    main(Path(sys.argv[1]))
