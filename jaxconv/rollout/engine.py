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
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxconv.errors import Refused
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decode import DecodeWeights, prefill
from jaxconv.rollout.burst import BurstLog, SlotState, decode_burst, give_turns, grow

_prefill = jax.jit(prefill, static_argnames=("config",), donate_argnames=("cache",))


@functools.cache
def _silent(config: DecoderConfig, slots: int, length: int, device: jax.Device):
    """One program that makes fresh slots on a device: several times as quick as array by array."""
    return jax.jit(
        lambda: SlotState.silent(config, slots, length),
        out_shardings=SingleDeviceSharding(device),
    )


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The distribution that a turn is drawn from; its log-prob is what is recorded.

    Attributes:
        temperature: at least 0, which is greedy.
        top_k: at least 0, which is off.
        top_p: above 0, at most 1, which is off.
        min_p: from 0, which is off, to 1.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        for field, fits, expected in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
        ):
            if not fits:
                raise _refusal(field, getattr(self, field), expected)


@dataclasses.dataclass(frozen=True)
class EngineShape:
    """Sizes that are compiled into an engine.

    Attributes:
        slots: rows of the cache.
        lengths: cache lengths, ascending. The cache grows from one to the next when a stream gets
            there; the last one is where a stream ends.
        burst: most tokens that one dispatch decodes in a slot.
        leave: fraction of the slots speaking at the start of a burst after whose end the burst
            leaves early; above 0, at most 1.
        prefill_rows: row counts of a prefill, ascending. More slots take several prefills.
        prefill_tokens: token counts of a prefill, ascending; longer pieces take several.
    """

    slots: int = 64
    lengths: tuple[int, ...] = (128, 256)
    burst: int = 32
    leave: float = 0.75
    prefill_rows: tuple[int, ...] = (16, 64)
    prefill_tokens: tuple[int, ...] = (16, 64)

    def __post_init__(self):
        for field in ("slots", "burst"):
            if getattr(self, field) < 1:
                raise _refusal(field, getattr(self, field), "at least 1")
        for field in ("lengths", "prefill_rows", "prefill_tokens"):
            sizes = getattr(self, field)
            if not sizes or min(sizes) < 1 or list(sizes) != sorted(set(sizes)):
                raise _refusal(field, sizes, "sizes of at least 1 that ascend")
        if not 0 < self.leave <= 1:
            raise _refusal("leave", self.leave, "above 0 and at most 1")


def _refusal(field: str, value: object, expected: str) -> Refused:
    return Refused(f"rollout.{field}={value}; it must be {expected}")


@dataclasses.dataclass(frozen=True)
class Turn:
    """One finished turn of a slot.

    Attributes:
        slot: whose turn it was.
        tokens: sampled ids, the end token included when there is one.
        logprobs: log-prob of each under the distribution it was sampled from, float32.
        values: critic before each token, float32.
        end: "stop" (the end token was sampled), "budget" (turn length) or "cache" (the stream is
            full).
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
        device: where the cache lives and bursts run; the first local device if not given. Weights
            must be set there.
    """

    def __init__(
        self,
        config: DecoderConfig,
        shape: EngineShape,
        *,
        stop_ids: Sequence[int],
        key: jax.Array,
        sampling: Sampling | None = None,
        device: jax.Device | None = None,
    ):
        if shape.lengths[-1] > config.max_positions:
            raise Refused(
                f"rollout.lengths={shape.lengths}; the last may be {config.max_positions} at most, "
                "the model has no more positions"
            )
        self.config, self.shape = config, shape
        self.sampling = sampling or Sampling()
        self.weights: DecodeWeights | None = None
        self.device = device or jax.local_devices()[0]
        self._key = jax.device_put(key, self.device)
        self._stop = frozenset(stop_ids)
        self._stop_ids = jax.device_put(np.array(sorted(self._stop), np.int32), self.device)
        self.reset()

    def reset(self) -> None:
        """Frees every slot and forgets everything but the weights."""
        b = self.shape.slots
        self._state = _silent(self.config, b, self.shape.lengths[0], self.device)()
        self._free = list(range(b - 1, -1, -1))
        self._slots: dict[int, _Slot] = {}
        self._waiting: list[int] = []
        self._flying: collections.deque[BurstLog] = collections.deque()
        self.steps = 0  # slot-steps decoded, idle slots included: the denominator of occupancy
        self.sampled = 0  # tokens sampled

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
        self._grow()
        if self._waiting:
            self._prefill(self._waiting)
            self._give_turns(self._waiting)
            self._waiting = []
        s = self.sampling
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
            turns.append(Turn(slot, held.tokens, held.logprobs, held.values, end))
            held.cached += len(held.tokens)
            held.tail, held.budget = [held.tokens[-1]], 0
            held.tokens, held.logprobs, held.values = [], [], []
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
        state = SlotState.silent(self.config, self.shape.slots, host["length"])
        log = BurstLog.empty(self.shape.slots, self.shape.burst)
        return {"state": state, "flying": [log] * host["flying"]}

    def restore(self, arrays: dict, host: dict) -> None:
        """Goes back to a snapshot."""
        arrays = jax.device_put(arrays, self.device)
        self._state = arrays["state"]
        self._flying = collections.deque(arrays["flying"])
        self._free, self._waiting = list(host["free"]), list(host["waiting"])
        self._slots = {int(slot): _Slot(**held) for slot, held in host["slots"].items()}
        self.steps, self.sampled = host["counters"]

    @property
    def _last(self) -> int:
        return self.shape.lengths[-1] - 1

    def _grow(self) -> None:
        """Pads the cache to the bucket that holds every stream at the end of the next burst.

        Attention reads the whole bucket at every step, so room for the rest of a turn's budget is
        made only when the turn gets there. The bursts under way may have sampled all they can.
        """
        bursts = (len(self._flying) + 1) * self.shape.burst
        need = max(
            (
                held.cached + max(len(held.tail), 1) + len(held.tokens) + min(held.budget, bursts)
                for held in self._slots.values()
                if held.budget
            ),
            default=0,
        )
        length = next(n for n in self.shape.lengths if n >= need)
        if length > self._state.cache[0][0].shape[2]:
            cache = grow(self._state.cache, length=length)
            self._state = dataclasses.replace(self._state, cache=cache)

    def _prefill(self, slots: Sequence[int]) -> None:
        """Writes all but the last known token of each slot to the cache, piece by piece."""
        widest = self.shape.prefill_tokens[-1]
        pieces = dict.fromkeys(slots, 0)  # tokens of the tail already written
        while pieces:
            by_width: dict[int, list[tuple[int, int, int]]] = {}
            for slot, done in list(pieces.items()):
                count = min(len(self._slots[slot].tail) - 1 - done, widest)
                if count <= 0:
                    del pieces[slot]
                    continue
                width = next(w for w in self.shape.prefill_tokens if w >= count)
                by_width.setdefault(width, []).append((slot, done, count))
                pieces[slot] = done + count
            for width, rows in sorted(by_width.items()):
                for i in range(0, len(rows), self.shape.prefill_rows[-1]):
                    self._prefill_rows(rows[i : i + self.shape.prefill_rows[-1]], width)

    def _prefill_rows(self, rows: Sequence[tuple[int, int, int]], width: int) -> None:
        n = next(r for r in self.shape.prefill_rows if r >= len(rows))
        tokens = np.zeros((n, width), np.int32)
        # Padding rows lie outside the cache, each at a place of its own.
        at = np.arange(self.shape.slots, self.shape.slots + n, dtype=np.int32)
        start, count = np.zeros(n, np.int32), np.zeros(n, np.int32)
        for i, (slot, done, size) in enumerate(rows):
            held = self._slots[slot]
            tokens[i, :size] = held.tail[done : done + size]
            at[i], start[i], count[i] = slot, held.cached + done, size
        cache = _prefill(self.weights, self.config, self._state.cache, tokens, at, start, count)
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
        self._state = give_turns(self._state, self._key, rows, stream, token, length, budget)
