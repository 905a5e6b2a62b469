"""Calls by one library: `calls.py LIBRARY URL CALLS-AS-JSON`, each call [extra fields, streamed]; in a venv of its own.

Prints a line for each: {"text", "usage", "block"}, {"cannot"} if the library has no way to make it, or {"failed"}.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

QUESTION = "12+7*3-4"
TEMPERATURE = 0.01  # a vote refuses 0, at which its samples would be equal
TOKENS = 60
KEY = "unused"
Result = dict[str, Any]


def result(text: str | None, usage: Any, blocks: Any, extra: dict[str, Any]) -> Result:
    """Return what is printed. `blocks`: everything in which our block could be."""
    return {"text": text, "usage": bool(usage), "block": any(name in str(blocks) for name in extra) if extra else False}


def messages() -> list[dict[str, str]]:
    return [{"role": "user", "content": QUESTION}]


def _openai(url: str, extra: dict[str, Any], stream: bool) -> Result:
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    options: dict[str, Any] = {"model": "demo", "messages": messages(), "temperature": TEMPERATURE}
    options |= {"max_tokens": TOKENS, "extra_body": extra}
    if not stream:
        reply = client.chat.completions.create(**options)
        return result(reply.choices[0].message.content, reply.usage, reply.model_extra, extra)
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    usage = next((chunk.usage for chunk in chunks if chunk.usage), None)
    return result(text, usage, [chunk.model_extra for chunk in chunks], extra)


def _openai_helper(url: str, extra: dict[str, Any], stream: bool) -> Result:
    from openai import OpenAI

    if not stream:
        return {"cannot": "only streams"}
    client = OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    options: dict[str, Any] = {"model": "demo", "messages": messages(), "temperature": TEMPERATURE}
    options |= {"max_tokens": TOKENS, "extra_body": extra, "stream_options": {"include_usage": True}}
    with client.chat.completions.stream(**options) as events:
        final = events.get_final_completion()
    return result(final.choices[0].message.content, final.usage, final.model_extra, extra)


def _litellm(url: str, extra: dict[str, Any], stream: bool) -> Result:
    import litellm

    options: dict[str, Any] = {"model": "openai/demo", "api_base": f"{url}/v1", "api_key": KEY, "messages": messages()}
    options |= {"temperature": TEMPERATURE, "max_tokens": TOKENS, "extra_body": extra}
    if not stream:
        reply = litellm.completion(**options)
        return result(reply.choices[0].message.content, reply.usage, reply.model_dump(), extra)
    chunks = list(litellm.completion(stream=True, stream_options={"include_usage": True}, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    usage = next((chunk.usage for chunk in chunks if getattr(chunk, "usage", None)), None)
    return result(text, usage, [chunk.model_dump() for chunk in chunks], extra)


def _langchain(url: str, extra: dict[str, Any], stream: bool) -> Result:
    from langchain_openai import ChatOpenAI

    options: dict[str, Any] = {"model": "demo", "base_url": f"{url}/v1", "api_key": KEY, "max_tokens": TOKENS}
    chat = ChatOpenAI(temperature=TEMPERATURE, extra_body=extra, stream_usage=True, max_retries=0, **options)
    if not stream:
        reply: Any = chat.invoke(QUESTION)
    else:
        first, *rest = chat.stream(QUESTION)
        reply = first
        for chunk in rest:
            reply = reply + chunk
    return result(reply.content, reply.usage_metadata, [reply.response_metadata, reply.additional_kwargs], extra)


def _pydantic_ai(url: str, extra: dict[str, Any], stream: bool) -> Result:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIChatModelSettings
    from pydantic_ai.providers.openai import OpenAIProvider

    settings = OpenAIChatModelSettings(temperature=TEMPERATURE, max_tokens=TOKENS, extra_body=extra)
    model = OpenAIChatModel("demo", provider=OpenAIProvider(base_url=f"{url}/v1", api_key=KEY))
    agent = Agent(model, model_settings=settings)

    async def run() -> Result:
        if not stream:
            whole = await agent.run(QUESTION)
            return result(whole.output, _used(whole), whole.all_messages(), extra)
        async with agent.run_stream(QUESTION) as streamed:
            text = await streamed.get_output()
            return result(text, _used(streamed), streamed.all_messages(), extra)

    return asyncio.run(run())


def _used(run: Any) -> int:
    usage = run.usage() if callable(run.usage) else run.usage
    return int(usage.output_tokens)


def _llama_index(url: str, extra: dict[str, Any], stream: bool) -> Result:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    kwargs: dict[str, Any] = {"extra_body": extra}
    if stream:
        kwargs["stream_options"] = {"include_usage": True}
    options: dict[str, Any] = {"model": "demo", "api_base": f"{url}/v1", "api_key": KEY, "is_chat_model": True}
    model = OpenAILike(temperature=TEMPERATURE, max_tokens=TOKENS, additional_kwargs=kwargs, **options)
    asked = [ChatMessage(role="user", content=QUESTION)]
    replies = list(model.stream_chat(asked)) if stream else [model.chat(asked)]
    raw = [reply.raw for reply in replies]
    usage = next((each for each in map(_usage_of_raw, raw) if each), None)
    return result(replies[-1].message.content, usage, raw, extra)


def _usage_of_raw(raw: Any) -> Any:
    return raw.get("usage") if isinstance(raw, dict) else getattr(raw, "usage", None)


def _haystack(url: str, extra: dict[str, Any], stream: bool) -> Result:
    from haystack.components.generators.chat import OpenAIChatGenerator
    from haystack.dataclasses import ChatMessage
    from haystack.utils import Secret

    kwargs: dict[str, Any] = {"temperature": TEMPERATURE, "max_tokens": TOKENS, "extra_body": extra}
    if stream:
        kwargs["stream_options"] = {"include_usage": True}
    chunks: list[Any] = []
    generator = OpenAIChatGenerator(
        model="demo",
        api_base_url=f"{url}/v1",
        api_key=Secret.from_token(KEY),
        generation_kwargs=kwargs,
        streaming_callback=chunks.append if stream else None,
    )
    reply = generator.run(messages=[ChatMessage.from_user(QUESTION)])["replies"][0]
    return result(reply.text, reply.meta.get("usage"), [reply.meta, chunks], extra)


def _guidellm(url: str, extra: dict[str, Any], stream: bool) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        data, report = Path(folder, "data.jsonl"), Path(folder, "report.json")
        data.write_text(json.dumps({"prompt": QUESTION, "output_tokens_count": TOKENS}) + "\n")
        body = {"temperature": TEMPERATURE, "ignore_eos": False, **extra}
        backend = {"kind": "openai_http", "target": url, "model": "demo", "request_format": "/v1/chat/completions"}
        backend |= {"stream": stream, "extras": {"body": body}}
        command = [str(Path(sys.executable).parent / "guidellm"), "run", "--backend", json.dumps(backend)]
        command += ["--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=1"]
        command += ["--data", f"kind=json_file,path={data}", "--disable-console"]
        command += ["--output", f"kind=json,path={report}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=80)
        if not report.exists():
            raise RuntimeError((done.stderr + done.stdout)[-1500:])
        run = json.loads(report.read_text())
    request = run["benchmarks"][0]["requests"]["successful"][0]
    response = {name: value for name, value in request.items() if name != "request_args"}  # which have our fields
    return result(request["output"], request["output_metrics"].get("text_tokens"), response, extra)


def _lm_eval(url: str, extra: dict[str, Any], stream: bool) -> Result:
    from lm_eval.api.instance import Instance
    from lm_eval.models.api_models import JsonChatStr
    from lm_eval.models.openai_completions import LocalChatCompletion

    if stream:
        return {"cannot": "never streams"}
    model = LocalChatCompletion(base_url=f"{url}/v1/chat/completions", model="demo", tokenizer_backend=None)
    asked = json.dumps(messages())
    kwargs = {"temperature": TEMPERATURE, "max_gen_toks": TOKENS, "until": ["\n\n"], **extra}
    instance = Instance("generate_until", {}, (JsonChatStr(asked), kwargs), 0)
    return result(model.generate_until([instance])[0], None, None, extra)


def _curl(url: str, extra: dict[str, Any], stream: bool) -> Result:
    body = {"model": "demo", "messages": messages(), "temperature": TEMPERATURE, "max_tokens": TOKENS, **extra}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    command = ["curl", "-sSN", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    text = subprocess.run([*command, "-d", json.dumps(body)], capture_output=True, text=True, check=True).stdout
    if not stream:
        reply = json.loads(text)
        return result(reply["choices"][0]["message"]["content"], reply["usage"], reply, extra)
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    if lines[-1] != "[DONE]":
        raise RuntimeError("no [DONE]")
    chunks = [json.loads(line) for line in lines[:-1]]
    said = "".join(each["choices"][0]["delta"].get("content") or "" for each in chunks if each["choices"])
    return result(said, next((each["usage"] for each in chunks if each.get("usage")), None), chunks, extra)


LIBRARIES: dict[str, Callable[[str, dict[str, Any], bool], Result]] = {
    "openai": _openai,
    "openai, stream helper": _openai_helper,
    "litellm": _litellm,
    "langchain": _langchain,
    "pydantic-ai": _pydantic_ai,
    "llama-index": _llama_index,
    "haystack": _haystack,
    "guidellm": _guidellm,
    "lm-eval": _lm_eval,
    "curl": _curl,
}

if __name__ == "__main__":
    library, address, calls = sys.argv[1:]
    for fields, streamed in json.loads(calls):
        try:
            said = LIBRARIES[library](address, fields, streamed)
        except Exception as error:  # whatever a library raises is what its user sees
            said = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(said), flush=True)
