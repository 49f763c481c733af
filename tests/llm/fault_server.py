"""A server of chat completions that misbehaves on demand: `python fault_server.py --help`.

What is wrong with a row is a function of `--seed` and the row's own words (the first message of the
user): one of `FAULTS`, each with the probability `--rate`, or nothing. A fault of every second row
is permanent, of the others it is over after one or two completed attempts. A good answer is
`{"label": "a" to "d", "score": 0 to 9}`, a function of the words too; with `--answers=FILE` it is
what `answer(request)` in that Python file makes of the request's body.

It prints `port N` when it listens, and appends to `--log` one line of JSON for each request it
gets: the hash of the row's words, and when.
"""

import argparse
import asyncio
import collections
import contextlib
import hashlib
import importlib.util
import json
import logging
import random
import sys
import time

from aiohttp import web

FAULTS = (
    "rate_limited",
    "status_500",
    "status_503",
    "timeout",
    "cut_connection",
    "truncated_json",
    "wrong_schema",
    "outside_label",
    "empty_choices",
    "slow_first_byte",
    "oversized",
)


def digest(words: str) -> str:
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def fault_of(words: str, seed: int, rate: float) -> tuple[str, int | None]:
    """(the row's fault or "", attempts until it is over: None for never)."""
    rng = random.Random(f"{seed}:{words}")
    at = int(rng.random() / rate) if rate else len(FAULTS)
    if at >= len(FAULTS):
        return "", 0
    return FAULTS[at], rng.choice((None, None, 1, 2))


def good(words: str) -> dict:
    """The answer to a row."""
    number = int(digest(words), 16)
    return {"label": "abcd"[number % 4], "score": number // 4 % 10}


def completion(text: str, *, finish: str = "stop", prompt_tokens: int = 50) -> dict:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": "faulty",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": finish,
            }
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": 10,
            "total_tokens": prompt_tokens + 10,
        },
    }


def _answers_of(path: str):
    """`answer` of a Python file."""
    spec = importlib.util.spec_from_file_location("answers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.answer


class Server:
    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.answer_to = _answers_of(options.answers) if options.answers else None
        self.completed: collections.Counter[str] = collections.Counter()
        self.active = self.most_active = self.received = 0
        self.log = open(options.log, "a", buffering=1) if options.log else None  # noqa: SIM115
        self.files: dict[str, str] = {}
        self.batches: dict[str, dict] = {}

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 28)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/stats", self.stats)
        app.router.add_post("/v1/files", self.upload)
        app.router.add_get("/v1/files/{name}/content", self.download)
        app.router.add_post("/v1/batches", self.create_batch)
        app.router.add_get("/v1/batches", self.list_batches)
        app.router.add_get("/v1/batches/{name}", self.batch)
        return app

    async def models(self, request: web.Request) -> web.Response:
        names = self.options.models.split(",")
        return web.json_response(
            {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}
        )

    async def stats(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"completed": self.completed.total(), "most_active": self.most_active}
        )

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        try:
            return await self.answer(request)
        finally:
            self.active -= 1

    async def answer(self, request: web.Request) -> web.StreamResponse:
        o = self.options
        body = await request.json()
        words = next(m["content"] for m in body["messages"] if m["role"] == "user")
        name = digest(words)
        if self.log:
            print(json.dumps({"row": name, "time": time.time()}), file=self.log)
        self.received += 1
        if o.revoke_after and self.received > o.revoke_after:
            return web.json_response({"error": {"message": "revoked"}}, status=401)
        if o.key and request.headers.get("authorization") != f"Bearer {o.key}":
            sent = request.headers.get("authorization")
            return web.json_response({"error": {"message": f"bad key: {sent}"}}, status=401)
        if o.echo_key:
            said = f"you sent {request.headers.get('authorization')}"
            if o.echo_key == "answer":
                return web.json_response(completion(said))
            return web.json_response({"error": {"message": said}}, status=400)
        if o.no_schema and "response_format" in body:
            return web.json_response(
                {"error": {"message": "response_format of type json_schema is unknown"}},
                status=400,
            )
        if o.latency:
            await asyncio.sleep(o.latency)
        fault, over = fault_of(words, o.seed, o.rate)
        if over is not None and self.completed[name] >= over:
            fault = ""
        self.completed[name] += 1
        answer = self.answer_to(body) if self.answer_to else good(words)
        return await self.respond(request, json.dumps(answer), fault)

    async def respond(self, request: web.Request, text: str, fault: str) -> web.StreamResponse:
        o = self.options
        if fault == "rate_limited":
            return web.json_response(
                {"error": {"message": "slow down"}},
                status=429,
                headers={"retry-after": str(o.retry_after)},
            )
        if fault in ("status_500", "status_503"):
            return web.json_response({"error": {"message": "broken"}}, status=int(fault[-3:]))
        if fault == "timeout":
            with contextlib.suppress(ConnectionError):
                await asyncio.sleep(o.hang)
        if fault == "cut_connection":
            response = web.StreamResponse(headers={"content-length": "1000"})
            await response.prepare(request)
            await response.write(b'{"id": "chatcmpl-1", "cho')
            request.transport.close()
            return response
        if fault == "truncated_json":
            return web.json_response(completion(text[:-4], finish="length"))
        if fault == "wrong_schema":
            return web.json_response(completion('{"label": "a", "score": "many"}'))
        if fault == "outside_label":
            return web.json_response(completion('{"label": "z", "score": 1}'))
        if fault == "empty_choices":
            return web.json_response(completion(text) | {"choices": []})
        if fault == "slow_first_byte":
            await asyncio.sleep(o.slow)
        if fault == "oversized":
            return web.json_response(completion('{"label": "a", "note": "' + "x" * o.big + '"}'))
        return web.json_response(completion(text))

    # ------------------------------------------------------------ the batch API

    async def upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        name = f"file-{len(self.files)}"
        self.files[name] = form["file"].file.read().decode()
        return web.json_response(
            {
                "id": name,
                "object": "file",
                "bytes": len(self.files[name]),
                "created_at": 0,
                "filename": "calls.jsonl",
                "purpose": "batch",
                "status": "processed",
            }
        )

    async def download(self, request: web.Request) -> web.Response:
        return web.Response(text=self.files[request.match_info["name"]])

    async def create_batch(self, request: web.Request) -> web.Response:
        body = await request.json()
        name = f"batch-{len(self.batches)}"
        self.batches[name] = {"input": body["input_file_id"], "ready": time.time() + 0.3}
        if self.options.lose_batch and len(self.batches) == 1:
            request.transport.close()
        return web.json_response(self.described(name))

    async def list_batches(self, request: web.Request) -> web.Response:
        data = [self.described(name) for name in reversed(self.batches)]
        return web.json_response({"object": "list", "data": data, "has_more": False})

    async def batch(self, request: web.Request) -> web.Response:
        return web.json_response(self.described(request.match_info["name"]))

    def described(self, name: str) -> dict:
        batch = self.batches[name]
        out = {
            "id": name,
            "object": "batch",
            "endpoint": "/v1/chat/completions",
            "input_file_id": batch["input"],
            "completion_window": "24h",
            "created_at": int(batch["ready"]),
            "status": "in_progress",
        }
        if time.time() < batch["ready"]:
            return out
        if "output" not in batch:
            batch["output"] = f"file-{len(self.files)}"
            self.files[batch["output"]] = "".join(
                self.batch_line(json.loads(line))
                for line in self.files[batch["input"]].splitlines()
            )
        return out | {"status": "completed", "output_file_id": batch["output"]}

    def batch_line(self, call: dict) -> str:
        words = next(m["content"] for m in call["body"]["messages"] if m["role"] == "user")
        name = digest(words)
        if self.log:
            print(json.dumps({"row": name, "time": time.time()}), file=self.log)
        fault, over = fault_of(words, self.options.seed, self.options.rate)
        if over is not None and self.completed[name] >= over:
            fault = ""
        self.completed[name] += 1
        status, body = 200, completion(json.dumps(good(words)))
        if fault in ("status_500", "status_503", "rate_limited", "timeout", "cut_connection"):
            status, body = 500, {"error": {"message": "broken"}}
        elif fault:
            body = completion('{"label": "z", "score": 1}')
        response = {"status_code": status, "request_id": "1", "body": body}
        return json.dumps({"custom_id": call["custom_id"], "response": response}) + "\n"


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.0, help="probability of each fault")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds of a good answer")
    parser.add_argument("--retry_after", type=float, default=0.02, help="seconds")
    parser.add_argument("--hang", type=float, default=30.0, help="seconds of a timeout")
    parser.add_argument("--slow", type=float, default=0.1, help="seconds of a slow first byte")
    parser.add_argument("--big", type=int, default=50_000, help="bytes of an oversized answer")
    parser.add_argument("--log", default="")
    parser.add_argument("--key", default="", help="answers 401 to any other key")
    parser.add_argument("--revoke_after", type=int, default=0, help="answers 401 after so many")
    parser.add_argument("--echo_key", default="", help="answers the key, in an error or an answer")
    parser.add_argument("--no_schema", action="store_true", help="refuses JSON schemas")
    parser.add_argument("--lose_batch", action="store_true", help="of the first tells nobody")
    parser.add_argument("--models", default="faulty")
    parser.add_argument("--answers", default="", help="a Python file with answer(request)")
    return parser


async def main() -> None:
    server = Server(options().parse_args())
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # clients are killed in tests
    # Connections that a client has left are noticed while their answer is still made.
    runner = web.AppRunner(server.app(), access_log=None, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=2048)
    await site.start()
    print(f"port {site._server.sockets[0].getsockname()[1]}", flush=True)
    # Ends with its parent, whose end of this pipe closes however it ends.
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
