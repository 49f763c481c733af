"""Dialogues in lines with tabs, and the label that ratings of several annotators make."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxconv.data.conversation import Message
from jaxconv.data.quarantine import Quarantine
from jaxconv.data.readers.rated import dialogue_label, label_of
from jaxconv.data.sources import open_source
from jaxconv.errors import Refused

FILE = (
    'USER\ta table for "two"\tbook\t3,3,4\n'
    "SYSTEM\tfor when?\t\t\n"
    "USER\tI said tonight, twice\tbook\t1, 2,2\n"
    "USER\tOVERALL\t\t2,2,3\n"
    "\n\n"
    "USER\thi\t\t3\r\n"
    "SYSTEM\thello\r\n"
    "OVERALL\t\t\t5,4\r\n"
    "\n"
    "USER\tdanke schön\t\t3\n"
    "SYSTEM\tbitte\t\t\n"
    "USER\tнет\t\t2\n"
    "SYSTEM\tah\t\t\n"
    "USER\tgut\t\t5\n"
)


@pytest.fixture
def quarantine(tmp_path):
    return Quarantine(tmp_path / "cache" / "quarantine.jsonl")


@pytest.mark.parametrize("name", ["talks.tsv", "talks.tsv.gz"])
def test_dialogues_with_ratings(name, tmp_path, quarantine):
    path = tmp_path / name
    path.write_bytes(gzip.compress(FILE.encode()) if name.endswith("gz") else FILE.encode())
    talks = open_source(path, "auto", quarantine)
    assert talks.format == "rated" and len(talks) == 3 and not len(quarantine)
    first = talks[0]
    assert first.messages == (
        Message("user", 'a table for "two"'),
        Message("assistant", "for when?"),
        Message("user", "I said tonight, twice"),
    )
    assert first.meta == {
        "label": "dsat",
        "overall": [2, 2, 3],
        "ratings": [[3, 3, 4], [], [1, 2, 2]],
        "actions": ["book", "", "book"],
    }
    assert talks[1].meta["label"] == "sat" and talks[1].messages[1].content == "hello"
    # Without OVERALL: the first turn that is not neutral, whatever comes after.
    assert talks[2].meta["label"] == "dsat" and talks[2].meta["overall"] == []
    assert len({talk.id for talk in talks}) == 3


def test_bad_dialogues_are_kept_with_line_and_value(tmp_path, quarantine):
    bad = {
        "BOT\thi\t\t": ("unknown_role", "line 1, role: it is 'BOT'; it may be USER, SYSTEM"),
        "USER\thi\t\t3,--3": ("not_a_rating", "line 4, ratings: it has '--3'"),
        "USER": ("wrong_cells", "line 7: it has 1 cells"),
        "USER\tOVERALL\t\t3": ("early_overall", "line 10: OVERALL must be"),
    }
    lines = [f"{line}\nSYSTEM\tyes\t\t\n" for line in bad]
    lines += ["USER\t\udce9\t\t3\nSYSTEM\tyes\t\t\n", "USER\tfine\t\t4\nSYSTEM\tyes\t\t\n"]
    path = tmp_path / "talks.tsv"
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    talks = open_source(path, "rated", quarantine)
    assert [talk.messages[0].content for talk in talks] == ["fine"]
    kept = [json.loads(line) for line in quarantine.path.read_text().splitlines()]
    for entry, (reason, explanation) in zip(kept, bad.values(), strict=False):
        assert entry["reason"] == reason and entry["explanation"].startswith(explanation)
    assert kept[4]["reason"] == "invalid_unicode" and len(kept) == 5


def test_half_a_zipped_file_is_refused_by_name(tmp_path, quarantine):
    path = tmp_path / "talks.tsv.gz"
    path.write_bytes(gzip.compress(FILE.encode() * 50)[:-20])
    with pytest.raises(Refused, match=r"talks.tsv.gz cannot be unzipped to its end"):
        open_source(path, "auto", quarantine)


@pytest.mark.parametrize(
    ("overall", "turns", "label"),
    [
        ([4, 3, 3], [[1]], "sat"),  # OVERALL stands above its turns
        ([3, 3, 3], [[1]], "neutral"),
        ([1, 5], [], "neutral"),  # annotators who cancel each other out
        ([], [[3, 3], [], [4, 3], [1]], "sat"),
        ([], [[3], [3, 3]], "neutral"),
        ([], [[], []], None),
        ([], [], None),
    ],
)
def test_the_label_rule(overall, turns, label):
    assert dialogue_label(overall, turns) == label


def test_another_neutral_rating():
    assert label_of([1, 0], neutral=0.5) == "neutral"
    assert dialogue_label([2], [], neutral=1.5) == "sat"
    assert dialogue_label([1], [], neutral=1.5) == "dsat"


@given(st.lists(st.integers(1, 5), min_size=1, max_size=9))
def test_turning_a_scale_around_turns_the_label_around(ratings):
    other = {"sat": "dsat", "dsat": "sat", "neutral": "neutral"}
    assert label_of([6 - rating for rating in ratings]) == other[label_of(ratings)]
    # Exact where floating point is not: the same ratings twice say the same.
    assert label_of(ratings * 7) == label_of(ratings)
