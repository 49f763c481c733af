"""JSON that fits a schema, token by token, by `llguidance` (extra `local`).

A `Writing` knows which tokens may come next in one text. When few tokens are left it narrows them
to those that lead to an end: open strings and lists are closed and no optional field is begun,
while labels, numbers and other required fields stay the model's to choose.
"""

import copy
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxconv.errors import Refused

_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As `json.dumps` writes: where any white space may stand, a weak model writes nothing else."""

_LONGEST = 4096  # tokens that a shortest answer is looked for in
_LARGEST = 10**18  # of numbers without a bound: those with one have no exponent, which overflows
_SPARE = 16  # tokens beyond those that an end is known to take


class Grammars:
    """Grammars of JSON schemas over the vocabulary of one tokenizer.

    Args:
        tokenizer: a `transformers` tokenizer of the fast kind.
        vocab: entries of the model's output, at least those of the tokenizer.
        end: the token that ends a turn.

    Raises:
        Refused: `llguidance` is not installed, or the tokenizer is not of a kind that it reads.
    """

    def __init__(self, tokenizer: Any, vocab: int, end: int):
        self._guidance = guidance()
        try:
            self._tokens = self._guidance.LLTokenizer(
                _tokenizer_json(tokenizer), n_vocab=vocab, eos_token=end
            )
        except (ValueError, AttributeError) as error:
            raise Refused(f"llguidance does not read the tokenizer: {_line(error)}") from None
        self.words = -(-vocab // 32)  # of a mask
        self._end = end
        self._executor = self._guidance.LLExecutor()
        self._known: dict[str, _Grammar] = {}
        self._quote, self._brace, self._bracket, self._comma = map(self._byte, '"}],')
        self._probes = [self._byte(char) for char in "aZ5"]
        self._going_on = self._that_go_on(vocab)

    def begin(self, schema: Mapping[str, Any], budget: int) -> "Writing":
        """A text of at most `budget` tokens that fits a schema.

        Raises:
            Refused: the schema has what no grammar can be made of.
        """
        text = json.dumps(schema)
        if text not in self._known:
            self._known[text] = self._compiled(schema)
        return Writing(self, self._known[text], budget)

    def masks(self, writings: Mapping[int, "Writing"], rows: int) -> np.ndarray:
        """Packed masks uint32 [rows, words] of what may come next, by row; none in other rows."""
        masks = np.zeros((rows, self.words), np.int32)
        by_row = [(writing.matcher, row) for row, writing in writings.items()]
        self._executor.unsafe_compute_mask_ptr(by_row, masks.ctypes.data, 4 * self.words, rows)
        masks = masks.view(np.uint32)
        for row, writing in writings.items():
            writing.narrow(masks[row])
        return masks

    def text(self, tokens: Sequence[int]) -> str:
        return self._tokens.decode_bytes(list(tokens)).decode(errors="replace")

    def close(self, allowed: np.ndarray, tokens: Sequence[int]) -> None:
        """Takes off a mask, uint32 [words] after these tokens, in place, what leads away from the
        end of the text."""
        ending = allowed & ~self._going_on
        if ending.any():
            allowed[:] = ending
        token = self._closer(allowed, tokens)
        if token is not None:
            allowed[:] = 0
            allowed[token >> 5] = np.uint32(1 << (token & 31))

    def shortest(self, matcher: Any, limit: int) -> int | None:
        """Tokens to an end that is soon reached, None where none is found in so many."""
        matcher, chooser, tokens = matcher.deep_copy(), random.Random(0), []
        while not matcher.is_stopped() and len(tokens) <= limit:
            more = matcher.compute_ff_tokens()
            if not more:
                allowed = np.frombuffer(matcher.compute_bitmask(), np.uint32)
                more = [self._soonest(allowed, tokens, chooser)]
            matcher.consume_tokens(more)
            tokens += more
        return None if matcher.is_error() or len(tokens) > limit else len(tokens)

    def _soonest(self, allowed: np.ndarray, tokens: Sequence[int], chooser: random.Random) -> int:
        """A token with which an end comes soon: what closes something, or any."""
        token = self._closer(allowed, tokens)
        if token is not None:
            return token
        if _allows(allowed, self._quote) and not self._begun(tokens):
            return self._quote
        bits = np.unpackbits(allowed.view(np.uint8), bitorder="little")
        return int(chooser.choice(np.flatnonzero(bits)))

    def _closer(self, allowed: np.ndarray, tokens: Sequence[int]) -> int | None:
        """The token that brings the end nearer than all others, None where the model chooses."""

        def may(token: int | None) -> bool:
            return _allows(allowed, token)

        if may(self._end):
            return self._end
        if may(self._quote) and all(map(may, self._probes)):  # in a text, which no label is
            return self._quote
        if self._begun(tokens):
            return None
        if may(self._quote) and (may(self._brace) or may(self._bracket)):  # in one of few letters
            return self._quote
        closers = (self._brace, self._bracket, self._comma)
        return next((token for token in closers if may(token)), None)

    def _begun(self, tokens: Sequence[int]) -> bool:
        """Whether an object or a list has just begun: its first entry is the model's to choose."""
        last = self._tokens.decode_bytes(list(tokens[-1:]))[-1:]
        return last in (b"{", b"[")

    def _that_go_on(self, vocab: int) -> np.ndarray:
        """A mask, uint32 [words], of the tokens that end a value and begin another at once."""
        goes_on = np.zeros(32 * self.words, bool)
        for token in range(vocab):
            text = self._tokens.decode_bytes([token])
            goes_on[token] = any(both in text for both in (b'",', b"},", b"],"))
        return np.packbits(goes_on, bitorder="little").view(np.uint32)

    def _compiled(self, schema: Mapping[str, Any]) -> "_Grammar":
        matcher_class = self._guidance.LLMatcher
        schema = _closed(schema)
        grammar = matcher_class.grammar_from_json_schema(schema, overrides=_OPTIONS)
        if wrong := matcher_class.validate_grammar(grammar, self._tokens):
            raise Refused(
                f"no grammar can be made of the schema of {schema.get('title', 'the output')}: "
                f"{_line(wrong)}"
            )
        matcher = matcher_class(self._tokens, grammar, log_level=0)
        longest = sum(
            max(len(self._tokens.tokenize_str(json.dumps(value))) for value in part["enum"])
            for part in _parts(schema)
            if part.get("enum")
        )
        return _Grammar(matcher, _SPARE + longest, self.shortest(matcher, _LONGEST) or 0)

    def _byte(self, char: str) -> int | None:
        """The token of one character alone, None where there is none."""
        tokens = self._tokens.tokenize_str(char)
        alone = len(tokens) == 1 and self._tokens.decode_bytes(tokens) == char.encode()
        return tokens[0] if alone else None


class _Grammar:
    """What all texts of one schema begin with.

    Args:
        matcher: at the beginning of a text.
        margin: tokens by which an end may be longer than it was found to be.
        shortest: tokens of a whole text, about; 0 where nobody knows.
    """

    def __init__(self, matcher: Any, margin: int, shortest: int):
        self.matcher, self.margin, self.shortest = matcher, margin, shortest


class Writing:
    """One text on its way.

    Attributes:
        matcher: of `llguidance`.
        tokens: of the text.
        left: tokens that it may still have.
    """

    def __init__(self, grammars: Grammars, grammar: _Grammar, budget: int):
        self.matcher = grammar.matcher.deep_copy()
        self.tokens: list[int] = []
        self.left = budget
        self._grammars, self._margin = grammars, grammar.margin
        self._closing = False
        self._look_at = budget
        self._plan(grammar.shortest)

    @property
    def done(self) -> bool:
        """Whether the text is whole."""
        return self.matcher.is_stopped() and not self.matcher.is_error()

    @property
    def gave_up(self) -> str:
        """Why `llguidance` did, in one line, as it does where a grammar gets too large; or ""."""
        return _line(self.matcher.get_error()) if self.matcher.is_error() else ""

    @property
    def over(self) -> bool:
        """Whether nothing more may come."""
        return not self.left or self.matcher.is_stopped()

    @property
    def text(self) -> str:
        return self._grammars.text(self.tokens)

    def add(self, tokens: Sequence[int]) -> None:
        """Appends tokens, each of which was allowed.

        Raises:
            ValueError: it was not.
        """
        if not self.matcher.consume_tokens(list(tokens)):
            raise ValueError(f"tokens {list(tokens)}: {_line(self.matcher.get_error())}")
        self.tokens += tokens
        self.left -= len(tokens)

    def forced(self) -> list[int]:
        """Tokens that have to come next, all of them certain."""
        return self.matcher.compute_ff_tokens()

    def narrow(self, allowed: np.ndarray) -> None:
        """Takes off a mask, in place, what leads away from an end that has to come soon."""
        if not self._closing and self.left <= self._look_at:
            shortest = self._grammars.shortest(self.matcher, self.left)
            self._plan(self.left if shortest is None else shortest)
        if not self._closing:
            return
        self._grammars.close(allowed, self.tokens)

    def _plan(self, shortest: int) -> None:
        """Begins to close when no more is left than an end takes, and looks again in time."""
        slack = self.left - shortest - self._margin
        self._closing = slack <= 0
        self._look_at = self.left - max(1, slack // 2)


def _allows(allowed: np.ndarray, token: int | None) -> bool:
    return token is not None and bool(allowed[token >> 5] >> np.uint32(token & 31) & 1)


def guidance() -> Any:
    """The module `llguidance`; Refused where it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise Refused("llguidance is not installed; pip install 'jaxconv[local]'") from None
    return llguidance


def _tokenizer_json(tokenizer: Any) -> str:
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return backend.to_str()


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a schema whose objects have no other fields than those that it names, and whose
    numbers are within `_LARGEST`.

    JSON schema lets an object have more unless it says otherwise, and nobody would read them. That
    items of a set differ no grammar can say, and reading a set makes it so.
    """
    schema = copy.deepcopy(dict(schema))
    for part in _parts(schema):
        part.pop("uniqueItems", None)
        if "properties" in part:
            part.setdefault("additionalProperties", False)
        kind = part.get("type", ())
        kinds = (kind,) if isinstance(kind, str) else kind
        if "number" in kinds and not part.keys() & {"enum", "const"}:
            if not part.keys() & {"minimum", "exclusiveMinimum"}:
                part["minimum"] = -_LARGEST
            if not part.keys() & {"maximum", "exclusiveMaximum"}:
                part["maximum"] = _LARGEST
    return schema


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema and all schemas in it."""
    if not isinstance(schema, dict):
        return
    yield schema
    for name in ("properties", "$defs"):
        for part in schema.get(name, {}).values():
            yield from _parts(part)
    for name in ("anyOf", "allOf", "oneOf", "prefixItems"):
        for part in schema.get(name, ()):
            yield from _parts(part)
    for name in ("items", "additionalProperties"):
        yield from _parts(schema.get(name))


def _line(error: object) -> str:
    return " ".join(str(error).split("<state>")[0].split())[:300]
