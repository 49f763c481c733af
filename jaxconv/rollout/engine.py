"""The slot engine: many conversations at once, each with its own keys, its own cache rows and its
own randomness.

An engine owns a fixed number of slots. A slot is one row of the key-value cache and belongs to one
token stream for as long as its conversation lasts, so a conversation costs its own tokens once,
however many turns it has. All state on the device is one pytree; a *burst* decodes up to `burst`
tokens for every slot that is speaking and leaves early when enough of them have ended their turn.
`dispatch` only starts work; `collect` waits for it. A caller that dispatches the next burst before
it collects the last keeps the device busy while it steps its environments.

The last token of what a slot was given is not prefilled: it is the first input of the next burst.
So a prefill needs no logits, and a turn's first token is sampled by the same code as all others.

Where the caller says which tokens may come next (a grammar), it takes single steps instead of
bursts: `read` starts one, the caller finds its masks meanwhile, `choose` draws, `collect` waits.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jaxconv.errors import Refused
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decode import Cache, DecodeWeights
from jaxconv.models.device_group import DeviceGroup, refuse_uneven
from jaxconv.rollout.burst import BurstLog, decode_burst, give_turns, grow
from jaxconv.rollout.masked import Read, draw_allowed, put_prefix, read, take_prefix
from jaxconv.rollout.programs import (
    abstract_log,
    abstract_state,
    make_silent,
    state_shardings,
    write_prefill,
)
from jaxconv.rollout.shape import EngineShape, Sampling

_SHARED = 8  # prefixes that an engine keeps
_WORTH = 16  # tokens of a prefix: fewer are read again


@dataclasses.dataclass(frozen=True)
class Turn:
    """One finished turn of a slot.

    Attributes:
        slot: whose turn it was.
        tokens: sampled ids, the end token included when there is one.
        logprobs: log-prob of each under the distribution it was sampled from, float32.
        values: critic before each token, float32.
        end: "stop" (the end token was sampled), "budget" (turn length), "cache" (the stream is
            full) or "caller" (by `end`).
    """

    slot: int
    tokens: list[int]
    logprobs: list[float]
    values: list[float]
    end: str


@dataclasses.dataclass
class _Slot:
    """What the host knows of one slot: its stream, how much of it is cached, and the turn under
    way.
    """

    stream: int
    cached: int = 0  # tokens in the cache when the slot last spoke or heard something
    tail: list[int] = dataclasses.field(default_factory=list)  # known, not cached
    budget: int = 0  # tokens that the turn under way may still sample; 0 when silent
    closing: bool = False  # its stream is over, though the turn under way is not
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    values: list[float] = dataclasses.field(default_factory=list)


class Engine:
    """Slots and their cache for one set of weights.

    Args:
        config: the decoder's architecture.
        shape: compiled sizes.
        stop_ids: tokens that end a turn.
        key: typed key of the run. A stream's randomness is folded from it by stream id and then by
            position, so its text does not depend on its slot or on what else is in the batch.
        sampling: how turns are drawn; may be replaced at any time without a new compilation.
        group: devices of this process that the engine spans, where its cache lives and its
            programs run; the first one alone if not given. Weights must be set there, as
            `models.handover.hand_over` makes them.
    """

    def __init__(
        self,
        config: DecoderConfig,
        shape: EngineShape,
        *,
        stop_ids: Sequence[int],
        key: jax.Array,
        sampling: Sampling | None = None,
        group: DeviceGroup | None = None,
    ):
        if shape.lengths[-1] > config.max_positions:
            raise Refused(
                f"rollout.lengths={shape.lengths}; the last may be {config.max_positions} at most, "
                "the model has no more positions"
            )
        self.config, self.shape = config, shape
        self.sampling = sampling or Sampling()
        self._weights: DecodeWeights | None = None
        self.group = group or DeviceGroup((jax.local_devices()[0],))
        refuse_uneven(config, len(self.group.devices))
        self._key = jax.device_put(key, self.group.sharding())
        self._stop = frozenset(stop_ids)
        stop = np.array(sorted(self._stop), np.int32)
        self._stop_ids = jax.device_put(stop, self.group.sharding())
        self.reset()

    @property
    def weights(self) -> DecodeWeights | None:
        """What speaks from the next burst on. New ones end the sharing of prefixes."""
        return self._weights

    @weights.setter
    def weights(self, weights: DecodeWeights | None) -> None:
        self._weights = weights
        self._shared.clear()

    def reset(self) -> None:
        """Frees every slot and forgets everything but the weights."""
        b = self.shape.slots
        self._state = make_silent(self.config, b, self.shape.lengths[0], self.group)()
        self._free = list(range(b - 1, -1, -1))
        self._slots: dict[int, _Slot] = {}
        self._waiting: list[int] = []
        self._flying: collections.deque[BurstLog] = collections.deque()
        self._read: Read | None = None
        self._shared: dict[tuple[int, ...], Cache] = {}
        self.steps = 0  # slot-steps decoded, idle slots included: the denominator of occupancy
        self.sampled = 0  # tokens sampled
        self.prefilled = 0  # tokens written by prefills

    @property
    def device(self) -> jax.Device:
        """The first device that the engine is on; no two groups share it."""
        return self.group.devices[0]

    @property
    def free(self) -> int:
        """Slots that no stream holds."""
        return len(self._free)

    @property
    def speaking(self) -> bool:
        """Whether any slot has a turn under way, as far as the host has seen."""
        return any(slot.budget for slot in self._slots.values())

    @property
    def flying(self) -> int:
        """Bursts dispatched and not yet collected."""
        return len(self._flying)

    def open(self, stream: int) -> int:
        """Takes a free slot for a new stream. `stream` is unique in the run, below 2**32."""
        slot = self._free.pop()
        self._slots[slot] = _Slot(stream)
        return slot

    def close(self, slot: int) -> None:
        """Ends the slot's stream; a slot that speaks is freed when its turn has ended, unseen."""
        if self._slots[slot].budget:
            self._slots[slot].closing = True
        else:
            del self._slots[slot]
            self._free.append(slot)

    def room(self, slot: int) -> int:
        """Tokens that the slot's stream can still take before its cache is full."""
        held = self._slots[slot]
        return self.shape.lengths[-1] - held.cached - len(held.tail) - 1

    def say(self, slot: int, tokens: Sequence[int], budget: int) -> None:
        """Appends what the slot's stream has heard and lets it speak for at most `budget` tokens.

        The last sampled token of its previous turn is already part of the stream.

        Raises:
            ValueError: the slot is speaking, or `tokens` and one sampled token exceed `room`.
        """
        held = self._slots[slot]
        if held.budget:
            raise ValueError(f"slot {slot} is speaking already")
        if not tokens or len(tokens) > self.room(slot):
            raise ValueError(f"slot {slot}: {len(tokens)} tokens for room {self.room(slot)}")
        held.tail += tokens
        held.budget = min(budget, self.room(slot) + 1)
        self._waiting.append(slot)

    def dispatch(self) -> None:
        """Starts the prefills that wait and one burst; returns at once."""
        self._begin_turns()
        s = self.sampling
        with self.group.tracing():
            self._state, log = decode_burst(
                self.weights,
                self._state,
                np.array([s.temperature, s.top_k, s.top_p, s.min_p], np.float32),
                self._stop_ids,
                np.float32(self.shape.leave),
                config=self.config,
                burst=self.shape.burst,
            )
        self._flying.append(log)

    def read(self) -> None:
        """Starts the prefills that wait and the first half of one step; returns at once.

        Steps and bursts do not mix: an engine takes one kind until it is `reset`.
        """
        self._begin_turns()
        with self.group.tracing():
            self._state, self._read = read(self.weights, self._state, config=self.config)

    def choose(self, allowed_BW: np.ndarray, sampling: Mapping[int, Sampling]) -> None:
        """Starts the second half of a step, which samples one token for every slot that speaks.

        Args:
            allowed_BW: uint32 [slots, ceil(V / 32)]; bit i of word w allows token 32 w + i. Every
                slot that speaks has to be allowed one at least.
            sampling: by slot; others sample as `sampling` of the engine says.
        """
        if self._read is None:
            raise ValueError("`read` begins a step")
        speaking_B = np.zeros(self.shape.slots, bool)
        speaking_B[[slot for slot, held in self._slots.items() if held.budget]] = True
        sampling_B4 = np.empty((self.shape.slots, 4), np.float32)
        for slot in range(self.shape.slots):
            s = sampling.get(slot, self.sampling)
            sampling_B4[slot] = s.temperature, s.top_k, s.top_p, s.min_p
        cache = self._state.cache
        with self.group.tracing():
            state, log = draw_allowed(
                dataclasses.replace(self._state, cache=()),
                self._read,
                allowed_BW,
                speaking_B,
                sampling_B4,
                self._stop_ids,
                config=self.config,
            )
        self._state, self._read = dataclasses.replace(state, cache=cache), None
        self._flying.append(log)

    def said(self, slot: int) -> list[int]:
        """Tokens of the slot's turn under way, as far as they have been collected."""
        return self._slots[slot].tokens

    def end(self, slot: int) -> Turn:
        """Ends the turn under way of a slot between two steps, and returns it.

        A turn in which no token was sampled can be ended only to close the slot.
        """
        if self._flying or self._read is not None:
            raise ValueError("a step is under way")
        if slot in self._waiting:
            self._waiting.remove(slot)
            self._slots[slot].budget = 0
            return Turn(slot, [], [], [], "caller")
        return self._ended(slot, "caller")

    def share(self, tokens: Sequence[int]) -> None:
        """Reads a prefix once for all streams that will begin with some of it.

        What a new stream has in common with a shared prefix it takes from there and does not read
        again, if it is at least 16 tokens. The engine keeps the last few prefixes, until it gets
        other weights; snapshots have none.

        Raises:
            ValueError: no slot is free, or the prefix is empty or longer than a stream.
        """
        if not self._free or not 0 < len(tokens) < self.shape.lengths[-1]:
            raise ValueError(f"a prefix of {len(tokens)} tokens, and {len(self._free)} free slots")
        row = self._free[-1]
        self._grow(len(tokens) + 1)
        self._prefill({row: (0, tokens)})
        with self.group.tracing():
            taken = take_prefix(self._state.cache, np.int32(row), length=len(tokens))
        self._shared[tuple(tokens)] = taken
        if len(self._shared) > _SHARED:
            del self._shared[next(iter(self._shared))]

    def collect(self) -> list[Turn]:
        """Waits for the oldest burst under way and returns the turns that ended in it."""
        log = jax.device_get(self._flying.popleft())
        self.steps += int(log.steps) * self.shape.slots
        self.sampled += int(log.count.sum())
        turns = []
        for slot in np.flatnonzero(log.count).tolist():
            held, n = self._slots[slot], int(log.count[slot])
            held.tokens += log.token[slot, :n].tolist()
            held.logprobs += log.logprob[slot, :n].tolist()
            held.values += log.value[slot, :n].tolist()
            held.budget -= n
            if log.speaking[slot]:
                continue
            if held.closing:
                held.budget = 0
                self.close(slot)
                continue
            end = "budget" if held.cached + len(held.tokens) < self._last else "cache"
            end = "stop" if held.tokens[-1] in self._stop else end
            turns.append(self._ended(slot, end))
        return turns

    def snapshot(self) -> tuple[dict, dict]:
        """Everything but the weights, bursts under way included: (arrays, JSON-able).

        Nothing is waited for or finished first: after `restore` the engine does what it would have
        done, bit for bit.
        """
        host = {
            "length": self._state.cache[0][0].shape[2],
            "flying": len(self._flying),
            "free": list(self._free),
            "waiting": list(self._waiting),
            "slots": {str(slot): dataclasses.asdict(held) for slot, held in self._slots.items()},
            "counters": [self.steps, self.sampled],
        }
        return {"state": self._state, "flying": list(self._flying)}, host

    def like(self, host: dict) -> dict:
        """Shapes of the arrays of a snapshot, given its JSON-able part."""
        state = abstract_state(self.config, self.shape.slots, host["length"], self.group)
        log = abstract_log(self.shape, self.group)
        return {"state": state, "flying": [log] * host["flying"]}

    def restore(self, arrays: dict, host: dict) -> None:
        """Goes back to a snapshot."""
        where = state_shardings(self.config, self.group)
        self._state = jax.device_put(arrays["state"], where)
        self._flying = collections.deque(jax.device_put(arrays["flying"], self.group.sharding()))
        self._free, self._waiting = list(host["free"]), list(host["waiting"])
        self._slots = {int(slot): _Slot(**held) for slot, held in host["slots"].items()}
        self.steps, self.sampled = host["counters"]

    @property
    def _last(self) -> int:
        return self.shape.lengths[-1] - 1

    def _ended(self, slot: int, end: str) -> Turn:
        held = self._slots[slot]
        turn = Turn(slot, held.tokens, held.logprobs, held.values, end)
        held.cached += len(held.tokens)
        held.tail, held.budget = held.tokens[-1:], 0
        held.tokens, held.logprobs, held.values = [], [], []
        return turn

    def _begin_turns(self) -> None:
        self._grow()
        if not self._waiting:
            return
        self._prefill(
            {
                slot: (self._slots[slot].cached, self._slots[slot].tail[:-1])
                for slot in self._waiting
            }
        )
        self._give_turns(self._waiting)
        self._waiting = []

    def _grow(self, need: int = 0) -> None:
        """Pads the cache to the bucket that holds every stream at the end of the next burst.

        Attention reads the whole bucket at every step, so room for the rest of a turn's budget is
        made only when the turn gets there. The bursts under way may have sampled all they can.
        """
        bursts = (len(self._flying) + 1) * self.shape.burst
        speaking = max(
            (
                held.cached + max(len(held.tail), 1) + len(held.tokens) + min(held.budget, bursts)
                for held in self._slots.values()
                if held.budget
            ),
            default=0,
        )
        length = next(n for n in self.shape.lengths if n >= max(need, speaking))
        if length > self._state.cache[0][0].shape[2]:
            with self.group.tracing():
                cache = grow(self._state.cache, length=length)
            self._state = dataclasses.replace(self._state, cache=cache)

    def _prefill(self, given: Mapping[int, tuple[int, Sequence[int]]]) -> None:
        """Writes tokens to the cache, piece by piece: by slot, from which position on which."""
        left = dict(given)
        self._use_shared(left)
        widest = self.shape.prefill_tokens[-1]
        while left:
            by_width: dict[int, list[tuple[int, int, Sequence[int]]]] = {}
            for slot, (start, tokens) in list(left.items()):
                piece = tokens[:widest]
                if not piece:
                    del left[slot]
                    continue
                width = next(w for w in self.shape.prefill_tokens if w >= len(piece))
                by_width.setdefault(width, []).append((slot, start, piece))
                left[slot] = start + len(piece), tokens[len(piece) :]
            for width, rows in sorted(by_width.items()):
                for i in range(0, len(rows), self.shape.prefill_rows[-1]):
                    self._prefill_rows(rows[i : i + self.shape.prefill_rows[-1]], width)

    def _use_shared(self, left: dict[int, tuple[int, Sequence[int]]]) -> None:
        """Puts shared prefixes into the slots of streams that begin, and takes them off `left`."""
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for slot, (start, tokens) in left.items():
            if start or not self._shared:
                continue
            prefix = max(self._shared, key=lambda shared: in_common(shared, tokens))
            same = in_common(prefix, tokens)
            if same >= _WORTH:
                rows_of.setdefault(prefix, []).append(slot)
                left[slot] = same, tokens[same:]
        most = self.shape.prefill_rows[-1]
        for prefix, slots in rows_of.items():
            # What is put beyond what they have in common is written over before it is read.
            for i in range(0, len(slots), most):
                rows = self._padded_rows(slots[i : i + most])
                with self.group.tracing():
                    cache = put_prefix(self._state.cache, self._shared[prefix], rows)
                self._state = dataclasses.replace(self._state, cache=cache)

    def _padded_rows(self, slots: Sequence[int]) -> np.ndarray:
        """As many rows as some prefill has. Padding lies outside the cache, each at its place."""
        n = next(r for r in self.shape.prefill_rows if r >= len(slots))
        rows = np.arange(self.shape.slots, self.shape.slots + n, dtype=np.int32)
        rows[: len(slots)] = slots
        return rows

    def _prefill_rows(self, given: Sequence[tuple[int, int, Sequence[int]]], width: int) -> None:
        rows = self._padded_rows([slot for slot, _, _ in given])
        n = len(rows)
        tokens = np.zeros((n, width), np.int32)
        start, count = np.zeros(n, np.int32), np.zeros(n, np.int32)
        for i, (_, at, piece) in enumerate(given):
            tokens[i, : len(piece)] = piece
            start[i], count[i] = at, len(piece)
            self.prefilled += len(piece)
        with self.group.tracing():
            cache = write_prefill(
                self.weights, self.config, self._state.cache, tokens, rows, start, count
            )
        self._state = dataclasses.replace(self._state, cache=cache)

    def _give_turns(self, slots: Sequence[int]) -> None:
        b = self.shape.slots
        rows = np.arange(b, 2 * b, dtype=np.int32)
        stream, token = np.zeros(b, np.uint32), np.zeros(b, np.int32)
        length, budget = np.zeros(b, np.int32), np.zeros(b, np.int32)
        for i, slot in enumerate(slots):
            held = self._slots[slot]
            held.cached += len(held.tail) - 1
            rows[i], stream[i], token[i] = slot, held.stream, held.tail[-1]
            length[i], budget[i] = held.cached, held.budget
            held.tail = []
        with self.group.tracing():
            self._state = give_turns(self._state, self._key, rows, stream, token, length, budget)


def in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two streams begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
