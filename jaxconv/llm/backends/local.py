"""Our own engine on a Hugging Face checkpoint: every answer is JSON that fits its task's schema.

The event loop hands calls to a thread that drives the engine. Slots are refilled as answers end, so
nobody waits for the longest.
"""

import asyncio
import collections
import dataclasses
import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxconv.data.conversation import Message
from jaxconv.data.fingerprint import digest, fingerprint
from jaxconv.errors import Failed, Refused
from jaxconv.llm.backends.base import Answer, Call
from jaxconv.llm.failures import NO_TOKENS, CallFailed, Failure
from jaxconv.llm.prices import FREE


class Local:
    """A checkpoint in this process (extra `local`).

    Args:
        path: a folder, or a hub id such as "Qwen/Qwen2.5-0.5B-Instruct".
        slots: answers at a time, on all devices together.
        seed: of sampling. What is drawn for a call depends on it, on the call and on how often it
            was made, and on nothing else.
        tensor: devices that hold one copy of the weights. There are as many copies as the devices
            of this process allow.

    Attributes:
        model: the checkpoint's name and a hash of its files, so that other weights or another
            chat template in the same folder are another model.

    Raises:
        Refused: no such folder, a folder without tokenizer, a chat template that cannot be taken
            apart, no `llguidance`.
    """

    is_model = True
    price = FREE

    def __init__(self, path: str | Path, *, slots: int = 32, seed: int = 0, tensor: int = 1):
        from jaxconv.data.template import take_apart
        from jaxconv.models.hf import checkpoint_files, load_tokenizer
        from jaxconv.rollout.grammar import guidance

        guidance()
        self._folder = checked_folder(path)
        tokenizer = load_tokenizer(self._folder)
        if tokenizer is None:
            raise Refused(f"{self._folder} holds no tokenizer")
        self._template = take_apart(tokenizer)
        self._slots, self._seed, self._tensor = slots, seed, tensor
        files = checkpoint_files(self._folder)
        name = self._folder.name if Path(path).expanduser().is_dir() else str(path)
        self.model = f"{name}@{digest(fingerprint(files, self._folder))}"
        self._writers: list[Any] = []

    async def __aenter__(self) -> "Local":
        if not self._writers:
            self._writers = await asyncio.to_thread(self._load)
        self._desk = _Desk(self._writers)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await asyncio.to_thread(self._desk.close)
        if self._desk.error is not None:
            self._writers = []  # what a device that failed left of them is unknown

    async def ask(self, call: Call) -> Answer:
        """The answer to one call.

        Raises:
            CallFailed: the prompt cannot be rendered or is too long for the model, or the schema
                is too much for `llguidance`.
            Refused: no grammar can be made of the task's schema.
            Failed: something went wrong on a device.
        """
        question = self._question(call)
        try:
            written = await self._desk.answer(question)
        except Exception as error:
            if error is not self._desk.error:
                raise
            line = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise Failed(f"the device that writes answers failed: {line}") from error
        if written.gave_up:
            message = f"llguidance gave up: {written.gave_up}"
            raise CallFailed(
                Failure("refused_request", message, written.text),
                tokens=(len(question.prompt), len(written.tokens)),
            )
        return Answer(written.text, not written.whole, len(question.prompt), len(written.tokens))

    def _question(self, call: Call):
        from jaxconv.rollout.constrained import Question
        from jaxconv.rollout.replies import prompt_ids
        from jaxconv.rollout.shape import Sampling

        messages = [Message(m["role"], m["content"]) for m in call.messages]
        try:
            prompt = prompt_ids(self._template, messages)
        except Refused as refused:
            failure = Failure("refused_request", str(refused))
            raise CallFailed(failure, tokens=NO_TOKENS) from None
        room, task, first = self._context - len(prompt) - 1, call.task, len(call.request.messages)
        if room < min(call.max_tokens, task.max_tokens):
            raise CallFailed(
                Failure(
                    "refused_request",
                    f"the prompt has {len(prompt)} tokens and the answer may have "
                    f"{task.max_tokens}; the model has room for {self._context - 1}",
                ),
                tokens=NO_TOKENS,
            )
        drawn = hashlib.sha256(f"{call.request.key}:{call.before}".encode()).digest()
        return Question(
            stream=int.from_bytes(drawn[:4], "little"),
            prompt=prompt,
            schema=call.request.schema,
            budget=min(call.max_tokens, room),
            sampling=Sampling(temperature=call.temperature, top_p=task.top_p),
            kind=f"{task.name} {task.prompt.version}" if len(messages) == first else "",
        )

    def _load(self) -> list[Any]:
        """What writes answers, one on each group of devices."""
        from jaxconv.rollout.writers import load_writers

        writers, self._context = load_writers(
            self._folder,
            self._template.end,
            slots=self._slots,
            seed=self._seed,
            tensor=self._tensor,
        )
        return writers


def checked_folder(path: str | Path) -> Path:
    """The folder of a checkpoint.

    Raises:
        Refused: there is none.
    """
    from jaxconv.models.hf import model_folder

    folder = model_folder(path)
    if not (folder / "config.json").is_file():
        raise Refused(f"model path {path}: {folder / 'config.json'} is missing")
    return folder


@dataclasses.dataclass(eq=False)
class _Asked:
    """A question that somebody waits for in an event loop."""

    question: Any
    answer: asyncio.Future
    loop: asyncio.AbstractEventLoop
    unwanted: bool = False

    def settle(self, result: Any) -> None:
        self.loop.call_soon_threadsafe(self._settle, result)

    def _settle(self, result: Any) -> None:
        if self.answer.done():
            return
        if isinstance(result, BaseException):
            self.answer.set_exception(result)
        else:
            self.answer.set_result(result)


class _Desk:
    """Where questions wait until a writer has a free slot; each writer has a thread.

    Args:
        writers: a `rollout.constrained.Constrained` for each group of devices.

    Attributes:
        error: what went wrong on a device, such as no memory; nobody gets an answer after it.
    """

    def __init__(self, writers: Sequence[Any]):
        self._waiting: collections.deque[_Asked] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self.error: Exception | None = None
        self._threads = [
            threading.Thread(target=self._drive, args=(writer,), daemon=True) for writer in writers
        ]
        for thread in self._threads:
            thread.start()

    async def answer(self, question: Any) -> Any:
        """What is written to a question.

        Raises:
            Refused: no grammar can be made of its schema.
            Exception: what went wrong on a device.
        """
        loop = asyncio.get_running_loop()
        asked = _Asked(question, loop.create_future(), loop)
        with self._changed:
            if self.error is not None:
                raise self.error
            self._waiting.append(asked)
            self._changed.notify_all()
        try:
            return await asked.answer
        finally:
            asked.unwanted = True

    def close(self) -> None:
        """Ends the threads; what is under way is forgotten."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _drive(self, writer: Any) -> None:
        under_way: set[_Asked] = set()
        try:
            while not self._closed:
                for asked in [asked for asked in under_way if asked.unwanted]:
                    writer.drop(asked)
                    under_way.remove(asked)
                self._take(writer, under_way)
                for asked, written in writer.step().items():
                    under_way.remove(asked)
                    asked.settle(written)
            for asked in under_way:
                writer.drop(asked)
        except Exception as error:
            with self._changed:
                self.error, self._closed = error, True
                for asked in (*under_way, *self._waiting):
                    asked.settle(error)
                self._changed.notify_all()

    def _take(self, writer: Any, under_way: set[_Asked]) -> None:
        """Gives the writer what it has room for; waits where it has nothing to do."""
        with self._changed:
            while not (self._closed or self._waiting or under_way):
                self._changed.wait()
            taken = [self._waiting.popleft() for _ in range(min(writer.room, len(self._waiting)))]
        for asked in taken:
            if asked.unwanted:
                continue
            try:
                writer.ask(asked, asked.question)
            except Refused as refused:
                asked.settle(refused)
            else:
                under_way.add(asked)
