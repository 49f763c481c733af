"""A model that answers TnT-LLM's questions by what it is asked, for `fault_server.py`."""

import hashlib
import html
import re

TURN = re.compile(r'<turn number="\d+" role="user">(.*?)</turn>', re.S)
LABEL = re.compile(r"<label><name>(.*?)</name>", re.S)
NUMBERED = re.compile(r'<label id="(\d+)"><name>(.*?)</name>', re.S)
SUMMARY = re.compile(r"<summary>(.*?)</summary>", re.S)
DOMAINS = ("trains", "soup", "query", "fees", "sleep", "speech")


def answer(request: dict) -> dict:
    words = next(m["content"] for m in request["messages"] if m["role"] == "user")
    said = " ".join(html.unescape(text) for text in TURN.findall(words))
    number = int(hashlib.sha256(words.encode()).hexdigest(), 16)
    if "Sum up, in at most" in words:
        return {"summary": " ".join(said.split()[:12]) or "nothing", "explanation": "as it stands"}
    if "Make a table" in words:
        return {"labels": _table([], SUMMARY.findall(words), words)}
    if "Rate from 0 to 100" in words:
        before = [html.unescape(name) for name in LABEL.findall(words)]
        labels = _table(before, SUMMARY.findall(words), words)
        return {"rating": number % 101, "explanation": "so", "edits": ["add"], "labels": labels}
    if "Which taxonomy" in words:
        return {"reason": "so", "best": 1 + number % words.count("<taxonomy ")}
    if "the primary" in words:
        labels = [(int(id), html.unescape(name)) for id, name in NUMBERED.findall(words)]
        chosen = labels[number % (len(labels) - 1)]
        name = chosen[1].upper() if number % 3 else chosen[1]  # models spell as they like
        named = {"id": chosen[0], "name": name}
        return {"primary": named, "applicable": [named, {"id": chosen[0], "name": chosen[1]}]}
    if "fits this conversation better" in words:
        return {"better": ("first", "second")[number % 2]}
    return {"relevant": bool(number % 2)}


def _table(before: list[str], summaries: list[str], words: str) -> list[dict]:
    most = int(re.search(r"are at most (\d+) in number", words)[1])
    found = [word for word in DOMAINS if any(word in text for text in summaries)]
    names = list(dict.fromkeys([*before, *found, "something else entirely"]))[:most]
    return [{"name": name, "description": f"about {name}"} for name in names]
