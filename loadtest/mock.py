"""An OpenAI-compatible server without a model, whose speed, errors, false usage and broken connections are scripted.

It solves the demo's problems by arithmetic, so that accuracy has a known value too.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from pydantic import BaseModel, ConfigDict, Field
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from demo.problems import solve

MODEL = "mock"
STALL_S = 3600.0


class Script(BaseModel):
    """What the server does. Shares are shares of requests, drawn from each request's seed and temperature."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int = Field(default=20, ge=1, description="Tokens of a reply, one per chunk.")
    first_token: float = Field(default=0.0, ge=0, description="Seconds until the first token.")
    per_token: float = Field(default=0.0, ge=0, description="Seconds between two tokens.")
    accuracy: float = Field(default=1.0, ge=0, le=1)
    refused: float = Field(default=0.0, ge=0, le=1, description="Share answered with `status`.")
    status: int = 500
    reset: float = Field(default=0.0, ge=0, le=1, description="Share whose connection breaks in the middle.")
    stalled: float = Field(default=0.0, ge=0, le=1, description="Share that stops in the middle while connected.")
    usage_factor: float = Field(default=1.0, description="Factor by which `usage` differs from the truth.")
    no_usage: bool = False
    seed: int = 0


class Mock:
    """The server; counts what it generates, like vLLM's /metrics."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests = 0
        self.running = 0
        self.most_running = 0
        self.generated = 0
        self.prompted = 0
        self.bodies: list[dict[str, Any]] = []  # of the latest 1,000 requests

    def app(self) -> Starlette:
        """Return the application for uvicorn."""
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/models", lambda _: JSONResponse({"data": [{"id": MODEL, "object": "model"}]})),
                Route("/version", lambda _: JSONResponse({"version": "mock"})),
                Route("/metrics", self.metrics),
            ]
        )

    def metrics(self, _: Request) -> Response:
        """Return the counters under vLLM's names."""
        counters = {"vllm:generation_tokens_total": self.generated, "vllm:prompt_tokens_total": self.prompted}
        return PlainTextResponse("".join(f'{name}{{model_name="{MODEL}"}} {n}\n' for name, n in counters.items()))

    async def chat(self, request: Request) -> Response:
        """Answer with a completion, or fail as scripted."""
        body = await request.json()
        self.requests += 1
        self.bodies = [*self.bodies[-999:], body]
        rng = random.Random(f"{self.script.seed}/{body.get('seed')}/{body.get('temperature')}")
        draw = rng.random()
        if draw < self.script.refused:
            return JSONResponse({"error": {"message": "scripted", "code": self.script.status}}, self.script.status)
        draw -= self.script.refused
        breaks = draw < self.script.reset
        stalls = not breaks and draw - self.script.reset < self.script.stalled
        question = body["messages"][-1]["content"]
        self.prompted += len(question)
        text = self._reply(question, rng)
        limit = min(self.script.tokens, body.get("max_tokens") or self.script.tokens)
        pieces = [text, *["."] * (limit - 1)]
        if body.get("stream"):
            return StreamingResponse(self._chunks(body, pieces, breaks, stalls), media_type="text/event-stream")
        async for _ in self._generate(pieces, breaks, stalls):
            pass
        message = {"role": "assistant", "content": "".join(pieces)}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        return JSONResponse(_header("chat.completion") | {"choices": choices} | self._usage(question, limit))

    def _reply(self, question: str, rng: random.Random) -> str:
        try:
            problem = solve(question)
        except ValueError:
            problem = None
        correct = problem.answer if problem else 0
        return f"\\boxed{{{correct if rng.random() < self.script.accuracy else correct + rng.randint(1, 9)}}}"

    def _usage(self, question: str, tokens: int) -> dict[str, Any]:
        claimed = round(tokens * self.script.usage_factor)
        usage = {"prompt_tokens": len(question), "completion_tokens": claimed, "total_tokens": len(question) + claimed}
        return {} if self.script.no_usage else {"usage": usage}

    async def _generate(self, pieces: list[str], breaks: bool, stalls: bool) -> AsyncIterator[str]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            due = time.monotonic() + self.script.first_token
            for position, piece in enumerate(pieces):
                if (wait := due - time.monotonic()) > 0:
                    await asyncio.sleep(wait)
                due += self.script.per_token
                if position == max(1, len(pieces) // 2):
                    if breaks:
                        raise ConnectionResetError("scripted")
                    if stalls:
                        await asyncio.sleep(STALL_S)
                self.generated += 1
                yield piece
        finally:
            self.running -= 1

    async def _chunks(
        self, body: dict[str, Any], pieces: list[str], breaks: bool, stalls: bool
    ) -> AsyncIterator[bytes]:
        header = json.dumps(_header("chat.completion.chunk"))[:-1]
        async for piece in self._generate(pieces, breaks, stalls):
            delta = json.dumps({"content": piece})
            yield f'data: {header}, "choices": [{{"index": 0, "delta": {delta}, "finish_reason": null}}]}}\n\n'.encode()
        end = [{"index": 0, "delta": {}, "finish_reason": "stop"}]
        yield f"data: {json.dumps(_header('chat.completion.chunk') | {'choices': end})}\n\n".encode()
        if (body.get("stream_options") or {}).get("include_usage"):
            usage = self._usage(body["messages"][-1]["content"], len(pieces))
            yield f"data: {json.dumps(_header('chat.completion.chunk') | {'choices': []} | usage)}\n\n".encode()
        yield b"data: [DONE]\n\n"


def _header(kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-mock", "object": kind, "created": 0, "model": MODEL}


def serve(script: Script, host: str, port: int) -> None:
    """Serve until interrupted."""
    uvicorn.run(Mock(script).app(), host=host, port=port, log_level="warning", timeout_keep_alive=5)
