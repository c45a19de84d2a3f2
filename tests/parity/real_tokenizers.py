"""What transformers makes of the corpus in chats.py, with the templates that TRL ships and with real tokenizers.

    real_tokenizers.py templates OUT.json             {"chats": …, "templates": {name: source}, "texts": {name: [a result per chat, with and
                                                      without the generation prompt]}}; a result is {"text", "generated": [[start, end]]}
                                                      in characters, or {"error", "raised": whether the template raised it}
    real_tokenizers.py tokens FOLDER TEMPLATE… OUT.json   {"chats": …, "texts": [text], "ids": [ids of each text], "plain": [ids with the
                                                      special tokens that are added], "templates": {name: {"source", "ids": [a list or null
                                                      per chat, with and without the generation prompt], "masks": [the same for
                                                      assistant_masks], "pairs": [{"prompt", "chosen", "rejected"} or null per chat]}}}.
                                                      A TEMPLATE is the name of one of TRL, `own`, or a file.
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import jinja2
import trl
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from trl.data_utils import _tokenize, common_prefix_length

from chats import CONTENTS, corpus

NOW = datetime.datetime(2026, 3, 7, 21, 5, 9)


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime.datetime:
        return NOW


# Templates that show values as Python sees them.
SHOWING = {
    "printed": "{{ messages }}|{{ tools }}|{{ documents }}|{{ custom }}|{{ enable_thinking }}",
    "as json": "{{ messages | tojson }}\n{{ tools | tojson(indent=2) }}\n{{ documents | tojson(sort_keys=true, separators=(',', ':')) }}"
    "{% for m in messages %}{{ m | tojson(ensure_ascii=true, indent=4, sort_keys=true) }}{% endfor %}",
    "as json with an indent of text": "{{ messages | tojson(indent='--', separators=('; ', '=')) }}",
    "walked": "{% macro walk(v, d=0) %}{{ d }}{% if v is mapping %}{% for k, w in v.items() %}<{{ k }}>{{ walk(w, d + 1) }}{% endfor %}"
    "{% elif v is string %}'{{ v }}'{% elif v is boolean %}b{{ v }}{% elif v is integer %}i{{ v + 1 }}{% elif v is float %}f{{ v }}"
    "{% elif v is none %}n{% elif v is sequence %}{% for w in v %}[{{ walk(w, d + 1) }}]{% endfor %}{% else %}?{% endif %}{% endmacro %}"
    "{{ walk(messages) }}{{ walk(tools) }}{{ walk(custom) }}",
    "truth": "{% for m in messages %}{% for k, v in m | dictsort %}{{ k }}={{ 'y' if v else 'n' }} {{ v is defined }} {% endfor %}"
    "{{ m.get('tool_calls', 'none') }}{{ (m.tool_calls or []) | length }}{{ m['content'] | default('d', true) }}\n{% endfor %}",
    "selected": "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}"
    "{{ messages | rejectattr('tool_calls', 'defined') | list | length }}{{ messages[-1:] }}{{ messages[::-1] | map(attribute='role') | join(', ') }}"
    "{{ messages | groupby('role') | map('first') | list }}{{ (messages | last).role }}",
    "worked on": "{% for m in messages %}{% if m.content is string %}{{ m.content.strip().split('\n')[0] }}|{{ m.content[:7] }}|"
    "{{ m.content[-3:] }}|{{ m.content | trim | upper }}|{{ m.content | length }}|{{ m.content.rstrip('\n') }}|"
    "{{ m.content.replace('a', 'b', 1) }}|{{ m.content.lstrip() | capitalize }}|{{ m.content.splitlines() }}|{{ m.content | indent(2) }}|"
    "{{ m.content.startswith(('W', 'I')) }}|{{ '%s %r' % (m.role, m.content) }}|{{ m.content.find('e') }}"
    "{% endif %}{% endfor %}",
    "generated twice": "{% for m in messages %}a{% generation %}{{ m.role }}{% endgeneration %}{% if loop.last %}{% generation %}{% endgeneration %}"
    "{% else %}{%- generation -%} é🙂 {%- endgeneration %}{% endif %}{% endfor %}",
    "dates": "".join(f"{flag}{letter}: {{{{ strftime_now('%{flag}{letter}') }}}}\n" for letter in "aAwdbBmyYHIpMSjUWGuVCeghntklfzZcxX%DFRrTP"
                     for flag in (("", "-", "_", "0", "^", "#", "12") if letter in "aAwdbBmyYHIpMSjUWGuVCegh" else ("",))),
}


def trl_templates() -> dict[str, str]:
    folder = Path(trl.__file__).parent / "chat_templates"
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.jinja"))}


def render(tokenizer: Any, template: str, chat: dict[str, Any], prompt: bool) -> dict[str, Any]:
    """As apply_chat_template renders with `return_assistant_tokens_mask`, which it allows only together with tokenising."""
    seen: list[Any] = []
    genuine = chat_template_utils._render_with_assistant_indices

    def observed(*args: Any, **named: Any) -> Any:
        seen.append(genuine(*args, **named))
        return seen[-1]

    given = {key: chat.get(key) for key in ("tools", "documents")} | chat.get("chat_template_kwargs", {})
    try:
        text = tokenizer.apply_chat_template(
            chat["messages"], chat_template=template, tokenize=False, add_generation_prompt=prompt, **given
        )
    except jinja2.TemplateError as error:
        raised = type(error) is jinja2.TemplateError
        return {"error": str(error), "raised": raised}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "raised": False}
    chat_template_utils._render_with_assistant_indices = observed
    try:
        tokenizer.apply_chat_template(
            chat["messages"], chat_template=template, add_generation_prompt=prompt, return_assistant_tokens_mask=True, **given
        )
    except Exception:
        # The tokenizer of this corpus has no vocabulary; only the indices matter.
        assert seen
    finally:
        chat_template_utils._render_with_assistant_indices = genuine
    assert seen[0][0] == text
    return {"text": text, "generated": seen[0][1]}


def templates(out: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>")
    chats, sources = corpus(), trl_templates() | SHOWING
    texts = {
        name: [render(tokenizer, source, chat, prompt) for chat in chats for prompt in (True, False)]
        for name, source in sources.items()
    }
    out.write_text(json.dumps({"chats": chats, "templates": sources, "texts": texts}, ensure_ascii=False))


def attempt(run: Any) -> Any:
    try:
        return run()
    except Exception:
        return None


def pair(tokenizer: Any, template: str, chat: dict[str, Any], rejected: str) -> dict[str, list[int]]:
    """As TRL's DPOTrainer tokenises a pair: the last message is the chosen answer."""
    given = {"chat_template": template, "tools": chat.get("tools"), **chat.get("chat_template_kwargs", {})}
    prompt, chosen = chat["messages"][:-1], chat["messages"][-1:]
    bare = _tokenize(tokenizer, prompt, add_generation_prompt=True, **given)["input_ids"]
    first, second = (
        _tokenize(tokenizer, prompt + answer, **given)["input_ids"] for answer in (chosen, [{**chosen[0], "content": rejected}])
    )
    length = min(common_prefix_length(bare, first), common_prefix_length(bare, second))
    return {"prompt": bare[:length], "chosen": first[length:], "rejected": second[length:]}


def tokens(folder: Path, names: list[str], out: Path) -> None:
    tokenizer, chats, shipped = AutoTokenizer.from_pretrained(folder), corpus(), trl_templates()
    found: dict[str, Any] = {
        "chats": chats,
        "texts": CONTENTS,
        "ids": [tokenizer.encode(text, add_special_tokens=False) for text in CONTENTS],
        "plain": [tokenizer.encode(text) for text in CONTENTS],
        "templates": {},
    }
    for name in names:
        source = tokenizer.chat_template if name == "own" else shipped.get(name) or Path(name).read_text()

        def encode(chat: dict[str, Any], **more: Any) -> Any:
            given = {key: chat.get(key) for key in ("tools", "documents")} | chat.get("chat_template_kwargs", {}) | more
            return tokenizer.apply_chat_template(chat["messages"], chat_template=source, **given)

        masked = [attempt(lambda: encode(chat, return_assistant_tokens_mask=True)) for chat in chats]
        plain = [chat if chat["messages"][-1]["role"] == "assistant" else None for chat in chats]
        found["templates"][name] = {
            "source": source,
            "ids": [
                attempt(lambda: encode(chat, add_generation_prompt=prompt)["input_ids"]) for chat in chats for prompt in (True, False)
            ],
            "masks": [one and one["assistant_masks"] for one in masked],
            "pairs": [chat and attempt(lambda: pair(tokenizer, source, chat, "No idea, sorry.")) for chat in plain],
        }
    out.write_text(json.dumps(found, ensure_ascii=False))


def main() -> None:
    chat_template_utils.datetime = Clock
    match sys.argv[1:]:
        case ["templates", out]:
            templates(Path(out))
        case ["tokens", folder, *names, out]:
            tokens(Path(folder), names, Path(out))


main()
