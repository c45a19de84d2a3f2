"""Conversations that use everything a chat template can read: the corpus of real_tokenizers.py."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]


def user(content: Any = "What is the weather?", **more: Any) -> Json:
    return {"role": "user", "content": content, **more}


def assistant(content: Any = "It is sunny.", **more: Any) -> Json:
    return {"role": "assistant", "content": content, **more}


def system(content: Any = "You are helpful.") -> Json:
    return {"role": "system", "content": content}


def call(name: str, arguments: Any, **more: Any) -> Json:
    return {**more, "type": "function", "function": {"name": name, "arguments": arguments}}


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Says what the weather is, in °C or °F.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "A <city> & its \"country\""},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
                "days": {"type": "integer", "minimum": 1, "maximum": 16, "default": 1},
                "at": {"type": "array", "items": {"type": "object", "properties": {"lat": {"type": "number"}, "lon": {"type": "number"}}}},
                "verbose": {"type": "boolean", "default": False},
                "note": {"type": ["string", "null"], "default": None},
                "any": {"anyOf": [{"type": "string"}, {"type": "number"}]},
            },
            "required": ["city"],
        },
        "return": {"type": "string", "description": "The weather"},
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "now", "description": "The time.\nIn UTC.", "parameters": {"type": "object", "properties": {}}},
}
BARE = {"name": "lookup", "description": "Finds a page", "parameters": {"type": "object", "properties": {"q": {"type": "string"}}}}

NESTED = {"z": 1, "a": {"list": [1, 2.5, -0.0, 1e16, 1e-7, True, None, "ü\n\"<&'>"], "empty": {}, "none": None}, "m": []}
TEXTS = {
    "combining": "e\u0301 a\u030a \u1112\u1161\u11ab \u0915\u094d\u0937 ﬁ \u212b Ⅷ ①",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽 ☃️ 🙂",
    "right to left": "שלום עולם \u200fمرحبا بالعالم\u200e \u202eabc\u202c",
    "controls": "a\tb\x07c\x1bd\x7fe\u0085f\u2028g\ufeffh\u200bi\x0bj\x0ck\x1cl",
    "line ends": "one\r\ntwo\rthree\n\n\nfour\n",
    "borders": "  \n\t two  words \t\n ",
    "only spaces": "   \n ",
    "long word": "Donaudampfschifffahrtsgesellschaft" * 40 + "ſ" * 300 + "東京都" * 200,
    "numbers": "1 12 123 1234 12345 1,234.50 0x1F 3.14e-10 ½ ² Ⅻ ٣٤٥ १२३",
    "code": "def f(x):\n    return {'a': [1, 2]}  # <b>&amp;</b>\n\tif x: pass\n",
    "contractions": "I'll don't we've I'M YOU'RE it’s 'tis O'Neil's",
    "cjk": "今日は良い天気ですね。我喜欢编程！한국어 텍스트입니다。ภาษาไทย",
    "markers": "<s></s><|im_end|><|im_start|>system\n<|eot_id|><|end_of_text|><bos><end_of_turn><|return|><|end|>"
    "<｜end▁of▁sentence｜><think>x</think>[INST][/INST]<tool_call></tool_call> <unk> <0x0A> ▁a ▁ <|endoftext|>",
    "jinja": "{{ 1 }} {% if %} {# #} {% generation %}",
    "accents": "Müller naïve façade ŒUVRE Straße ĲSSEL İstanbul ǅ Σίσυφος",
    "punctuation": "!!!???...--- —– ‘’“” ¿¡ @#$%^&*()_+=[]{}|\\/;:,.<>`~",
    "rare": "\U0001d54f\U0001d550 \U00020000 \U000e0041 \u0e33 \ufffd \u00ad \u034f",
}


# Texts for tokenizers alone: those above, their neighbours in one text, and parts of them.
CONTENTS = [*TEXTS.values(), " ".join(TEXTS.values()), "".join(reversed(TEXTS["markers"])), "", " ", "  ", "\n", "a", " a", "a ", "\n\n a"]
CONTENTS += [text[at : at + 9] for text in TEXTS.values() for at in range(0, min(len(text), 90), 7)]


def corpus() -> list[Json]:
    """Chats: name, messages and what else apply_chat_template gets."""
    found: list[Json] = []

    def chat(name: str, *messages: Json, **more: Any) -> None:
        found.append({"name": name, "messages": list(messages), **more})

    chat("one question", user())
    chat("question and answer", user(), assistant())
    chat("system", system(), user(), assistant())
    chat("empty system", system(""), user(), assistant())
    chat("blank system", system(" \n"), user(), assistant())
    chat("system alone", system())
    chat("several turns", system(), user("One?"), assistant("1"), user("Two?"), assistant("2"), user("Three?"), assistant("3"))
    chat("two users in a row", user("a"), user("b"), assistant("c"))
    chat("two assistants in a row", user("a"), assistant("b"), assistant("c"))
    chat("assistant first", assistant("Hello!"), user("Hi"), assistant("Well"))
    chat("system in the middle", user("a"), assistant("b"), system("Be brief."), user("c"), assistant("d"))
    chat("two systems", system("a"), system("b"), user(), assistant())
    chat("developer", {"role": "developer", "content": "Be brief."}, user(), assistant())
    chat("unknown role", {"role": "critic", "content": "Hm."}, user(), assistant())
    chat("empty contents", user(""), assistant(""))
    chat("null content", user(), assistant(None))
    chat("no content", user(), {"role": "assistant"})
    chat("no role", {"content": "x"}, assistant())
    chat("number as content", user(3), assistant(2.50))
    chat("other fields", user(name="Ann", weight=0.5), assistant(weight=1, id=7, cache=None))
    for name, text in TEXTS.items():
        chat(name, system(text), user(text), assistant(text), user(text), assistant(text))
    parts = [{"type": "text", "text": " one "}, {"type": "text", "text": "two\n"}]
    chat("text parts", system([{"type": "text", "text": "Be brief."}]), user(parts), assistant(parts))
    chat("one text part", user([{"type": "text", "text": "x"}]), assistant([{"type": "text", "text": "y"}]))
    chat("no parts", user([]), assistant([]))
    chat("image", user([{"type": "image"}, {"type": "text", "text": "What is this?"}]), assistant("A cat."))
    chat("unknown part", user([{"type": "smell", "smell": "x"}]), assistant("y"))
    thought = "The user asks.\n\nI think."
    chat("reasoning", user(), assistant(reasoning_content=thought))
    chat("reasoning by its other name", user(), assistant(reasoning=thought))
    chat("thinking", user(), assistant(thinking=thought))
    chat("empty reasoning", user(), assistant(reasoning_content=""))
    chat("reasoning in history", user("a"), assistant("b", reasoning_content="r1"), user("c"), assistant("d", reasoning_content="r2"))
    chat("reasoning in content", user("a"), assistant("<think>\nr1\n</think>\n\nb"), user("c"), assistant("<think>\nr2\n</think>\n\nd"))
    chat("broken reasoning in content", user("a"), assistant("r1\n</think>b"), user("c"), assistant("<think>d"))
    for value in (True, False):
        chat(f"enable_thinking {value}", user(), assistant(), chat_template_kwargs={"enable_thinking": value})
        chat(f"thinking {value}", system(), user("a"), assistant("b"), user("c"), assistant("d"), chat_template_kwargs={"thinking": value})
    chat("other variables", user(), assistant(reasoning_content=thought), chat_template_kwargs={
        "reasoning_effort": "high", "model_identity": "You are a test.", "builtin_tools": ["browser", "python"], "date_string": "1 Jan 2030",
        "custom_tools": None, "preserve_thinking": True, "clear_thinking": False, "custom": NESTED,
    })
    tools = [WEATHER, CLOCK]
    once = call("get_weather", {"city": "Köln", "days": 3, "at": [{"lat": 50.9, "lon": 7.0}], "verbose": False, "note": None}, id="call_1")
    chat("tools", system(), user(), assistant(), tools=tools)
    chat("tools without system", user(), assistant(), tools=tools)
    chat("no tools", user(), assistant(), tools=[])
    chat("bare tools", user(), assistant(), tools=[BARE])
    chat("odd tools", user(), assistant(), tools=[{"type": "retrieval", "x": NESTED}])
    asked = [system(), user(), assistant("", tool_calls=[once])]
    result = {"role": "tool", "tool_call_id": "call_1", "name": "get_weather", "content": "{\"temp\": 21.5}"}
    chat("tool call", *asked, tools=tools)
    chat("tool call without tools", *asked)
    chat("tool call without content", user(), {"role": "assistant", "tool_calls": [once]}, tools=tools)
    chat("tool call and content", user(), assistant("Let me see.", tool_calls=[once]), tools=tools)
    chat("tool call and reasoning", user(), assistant("", tool_calls=[once], reasoning_content="I need the weather."), tools=tools)
    chat("tool result", *asked, result, tools=tools)
    chat("tool result and answer", *asked, result, assistant(), user("Thanks"), assistant("Bye"), tools=tools)
    chat("nested arguments", user(), assistant("", tool_calls=[call("get_weather", NESTED, id="x")]), tools=tools)
    chat("no arguments", user(), assistant("", tool_calls=[call("now", {})]), tools=tools)
    chat("arguments as text", user(), assistant("", tool_calls=[call("get_weather", "{\"city\": \"Köln\"}", id="x")]), tools=tools)
    chat("flat call", user(), assistant("", tool_calls=[{"name": "now", "arguments": {"a": 1}}]), tools=tools)
    both = [call("get_weather", {"city": "A"}, id="call_1"), call("now", {}, id="call_2")]
    second = {"role": "tool", "tool_call_id": "call_2", "name": "now", "content": "12:00"}
    chat("parallel calls", user(), assistant("", tool_calls=both), result, second, assistant(), tools=tools)
    chat("parallel calls and reasoning", user(), assistant("", tool_calls=both, reasoning_content="Both."), result, second, assistant(), tools=tools)
    chat("calls in history", user("a"), assistant("", tool_calls=[once], reasoning_content="r"), result, assistant("b"), user("c"), assistant("d"), tools=tools)
    chat("result as object", user(), assistant("", tool_calls=[once]), {**result, "content": NESTED}, assistant(), tools=tools)
    chat("result as parts", user(), assistant("", tool_calls=[once]), {**result, "content": [{"type": "text", "text": "21"}]}, assistant(), tools=tools)
    chat("no calls", user(), assistant("x", tool_calls=[]), tools=tools)
    chat("null calls", user(), assistant("x", tool_calls=None), tools=tools)
    chat("result without a call", user(), result, assistant(), tools=tools)
    chat("documents", user(), assistant(), documents=[{"title": "T", "text": "Some text."}, {"title": "Ü", "text": "More", "n": 1}])
    return found
