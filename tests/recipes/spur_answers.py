"""A model that answers SPUR's questions: a function of what it is asked, for `fault_server.py`."""

import hashlib
import html
import re

TURN = re.compile(r'<turn number="\d+" role="user">(.*?)</turn>', re.S)
ITEM = re.compile(r'<item id="(\w+)"><name>.*?</name>(.*?)</item>', re.S)
EXAMPLE = re.compile(r"<example>(.*?)</example>", re.S)
QUOTE = re.compile(r"<quote>(.*?)</quote>", re.S)


def answer(request: dict) -> dict:
    words = next(m["content"] for m in request["messages"] if m["role"] == "user")
    turns = [html.unescape(text) for text in TURN.findall(words)]
    if "reasons for it" in words:
        quotes = [turn.split(".")[0].strip() for turn in turns[1:3]]
        return {"patterns": [{"pattern": f"The user says {q}", "quote": q} for q in quotes if q]}
    if "signs of a satisfied user:" in words:
        return {"items": [_scored(id, rest, turns) for id, rest in ITEM.findall(words)]}
    if "<reason>" in words:
        found = dict.fromkeys(map(html.unescape, [*EXAMPLE.findall(words), *QUOTE.findall(words)]))
        limit = int(re.search(r"at most (\d+)", words)[1])
        return {
            "items": [
                {"name": quote[:60], "description": "says so", "examples": [quote]}
                for quote in list(found)[:limit]
            ]
        }
    number = int(hashlib.sha256(words.encode()).hexdigest(), 16)
    return {"label": ("sat", "dsat")[number % 2]}


def _scored(id: str, rest: str, turns: list[str]) -> dict:
    for example in map(html.unescape, EXAMPLE.findall(rest)):
        if any(example in turn for turn in turns):
            return {"id": id, "present": True, "quote": example, "score": 1 + len(example) % 10}
    return {"id": id, "present": False, "quote": "", "score": 0}
