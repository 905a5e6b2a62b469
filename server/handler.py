"""One sampling request: check our fields, call vLLM's handler, add stats and strategy to the response.

Routes are in endpoints.py, the fields in protocol.py, what is added to a response in response.py.
"""

import time
from asyncio import CancelledError
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, get_type_hints

from fastapi import Request
from vllm.exceptions import VLLMClientError
from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens

from em_sampler.params import Params
from em_sampler.validation import ParamsError
from server.admission import TooManyBranchesError
from server.engine import request_stats_var, strategy_run_var
from server.errors import bad_request, too_many_branches, unsupported_field
from server.protocol import CHAT_ROUTE, COMPLETIONS_ROUTE, apply_em_inf, resolve_strategy, with_our_fields
from server.response import OnOutcome, ResponseExtras, with_extras
from server.stats.collector import TokenTexts
from server.stats.metrics import UNKNOWN_METHOD, Metrics
from server.strategies.branches import CountReasoning, NoNextPromptError
from server.strategies.registry import STRATEGY_KEY
from server.strategies.run import StrategyRun

TOO_LONG = ("input_tokens", "input_text")  # parameters of vLLM's errors for a prompt that is longer than the context
ALL_LOGPROBS = 10**6  # those of a whole vocabulary

VLLMHandler = Callable[[Any, Request], Awaitable[Any]]


def with_em_inf(vllm_handler: VLLMHandler, route: str) -> VLLMHandler:
    """Return the handler of `route`: it wraps vLLM's, with our fields on the request model."""
    model = with_our_fields(get_type_hints(vllm_handler)["request"], strategies=route == CHAT_ROUTE)

    async def handler(request: model, raw_request: Request) -> Any:  # type: ignore[valid-type]  # FastAPI reads it
        return await _handle(vllm_handler, route, request, raw_request)

    handler.__doc__ = vllm_handler.__doc__  # OpenAPI's description of the route
    return handler


async def _handle(vllm_handler: VLLMHandler, route: str, request: Any, raw_request: Request) -> Any:
    """Answer one request.

    Raises:
        VLLMValidationError: (400) if the settings are wrong or cannot work with this request.
    """
    params = _apply_em_inf(request, raw_request)
    if route != CHAT_ROUTE and getattr(request, STRATEGY_KEY, None) is not None:
        raise unsupported_field(route, STRATEGY_KEY, f"use {CHAT_ROUTE}")
    try:
        run = _reserve_strategy(request, raw_request, params) if route == CHAT_ROUTE else None
    except TooManyBranchesError as error:
        return too_many_branches(str(error))
    if params is None and run is None:
        return await vllm_handler(request, raw_request)
    stats, top = (params.stats, params.top) if params else ("none", 0)
    extras = ResponseExtras(
        stats,
        route == COMPLETIONS_ROUTE,
        run,
        _continuous_usage(request, raw_request),
        top,
        _token_texts(raw_request) if top else None,
    )
    request_stats_var.set(extras.request_stats)
    strategy_run_var.set(run)
    on_outcome = partial(_finish, raw_request.app.state.em_inf_metrics, params, run)
    return await _with_outcome(vllm_handler(request, raw_request), extras, on_outcome)


def _apply_em_inf(request: Any, raw_request: Request) -> Params | None:
    """Resolve the request's `em_inf`; a refused one is counted here, with the method unknown."""
    state = raw_request.app.state
    try:
        return apply_em_inf(request, state.em_inf)
    except ParamsError as error:
        state.em_inf_metrics.observe_request(UNKNOWN_METHOD, "rejected")
        raise bad_request(error) from None


def _reserve_strategy(request: Any, raw_request: Request, params: Params | None) -> StrategyRun | None:
    """Prepare the chat request's strategy, if it has one; its branches stay reserved until the run is closed.

    Raises:
        TooManyBranchesError: if fewer branches are free than the strategy needs.
        VLLMValidationError: (400) if the settings are wrong or cannot work with this request.
    """
    state = raw_request.app.state
    try:
        strategy = resolve_strategy(request, params, state.em_inf)
    except ParamsError as error:
        raise bad_request(error) from None
    if strategy is None:
        return None
    chat = _Chat(request, raw_request)
    needs = (chat.next_prompt, chat.chunk_header, chat.logprobs(), chat.reasoning_counter())
    return StrategyRun(strategy, state.branch_limit, state.strategy_metrics, *needs)


class _Chat:
    """What a strategy needs of its chat request, besides the engine request."""

    def __init__(self, request: Any, raw_request: Request) -> None:
        self.request = request
        self.raw_request = raw_request
        self.state = raw_request.app.state
        # True until the first reply is taken: that is the rest of the last message, later ones are whole.
        self.reply_continues = bool(request.continue_final_message)

    async def next_prompt(self, reply: str) -> Any:
        """Render the conversation with `reply` and the refinement prompt.

        Raises:
            NoNextPromptError: if it is longer than the context, or if the chat template refuses it.
        """
        prompt = self.state.em_inf.strategy_refinement_prompt
        messages, turn = [*self.request.messages], {"role": "assistant", "content": reply}
        if self.request.continue_final_message:
            begun = messages.pop()
            if self.reply_continues:
                turn = begun | {"content": _joined(begun.get("content"), reply)}
            self.reply_continues = False
        messages += [turn, {"role": "user", "content": prompt}]
        fields = {"messages": messages, "add_generation_prompt": True}
        next_request = self.request.model_copy(update=fields | {"continue_final_message": False})
        try:
            rendered = await self.state.openai_serving_chat.render_chat_request(next_request)
        except VLLMClientError as error:
            too_long = getattr(error, "parameter", None) in TOO_LONG
            raise NoNextPromptError("context" if too_long else "template") from error
        if not isinstance(rendered, tuple):  # vLLM's error response
            raise NoNextPromptError("template")
        return rendered[1][0]

    def logprobs(self) -> int:
        """Return how many log-probabilities per token the client gets at most."""
        request = self.request
        asked = (request.top_logprobs, len(request.logprob_token_ids or ())) if request.logprobs else ()
        counts = [count or 0 for count in (*asked, request.prompt_logprobs)]
        return ALL_LOGPROBS if -1 in counts else max(counts)

    def reasoning_counter(self) -> CountReasoning | None:
        """Return what counts a reply's reasoning tokens as vLLM does; None if vLLM does not."""
        serving = self.state.openai_serving_chat
        if not serving._include_reasoning_tokens_details:
            return None

        def count(prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> int:
            template = serving._effective_chat_template_kwargs(self.request)
            parser = serving._make_parser(self.request, serving.renderer.tokenizer, template)  # it has a state
            if hasattr(parser, "set_prompt_token_ids"):  # not in vLLM 0.31
                parser.set_prompt_token_ids(prompt_token_ids)
            return int(parser.count_reasoning_tokens(token_ids))

        return count

    def chunk_header(self) -> dict[str, Any]:
        """Return the fields that all chunks of the stream share. vLLM has made the id by the time there is a stream."""
        request_id = self.raw_request.state.request_metadata.request_id
        model = self.request.model or self.state.em_inf_metrics.model
        return {"id": request_id, "object": "chat.completion.chunk", "created": int(time.time()), "model": model}


def _joined(content: Any, reply: str) -> Any:
    """Return a message's content with `reply` at its end: in the last part, if that is a text, as one text."""
    if not content or isinstance(content, str):
        return (content or "") + reply
    *parts, last = content
    if last.get("type") == "text":
        return [*parts, last | {"text": last["text"] + reply}]
    return [*parts, last, {"type": "text", "text": reply}]


def _continuous_usage(request: Any, raw_request: Request) -> bool:
    """Return whether every chunk of the request's stream has a usage."""
    options = getattr(request, "stream_options", None)
    forced = getattr(raw_request.app.state.openai_serving_chat, "enable_force_include_usage", False)
    return bool(forced or (options and options.include_usage and options.continuous_usage_stats))


def _token_texts(raw_request: Request) -> TokenTexts | None:
    """Return what gives the text of each token id, as `logprobs` has it; None without a tokenizer."""
    tokenizer = raw_request.app.state.openai_serving_chat.renderer.tokenizer
    return partial(token_texts, tokenizer) if tokenizer else None


def token_texts(tokenizer: Any, token_ids: list[int]) -> dict[int, str]:
    """Return the texts of those ids that the tokenizer has: a model may have more, and a worker may send any."""
    known = [token_id for token_id in token_ids if token_id < len(tokenizer)]
    return dict(zip(known, convert_ids_list_to_tokens(tokenizer, known), strict=True))


def _finish(metrics: Metrics, params: Params | None, run: StrategyRun | None, outcome: str) -> None:
    if params:
        metrics.observe_request(params.method, outcome)
    if run:
        run.close()


async def _with_outcome(vllm_response: Awaitable[Any], extras: ResponseExtras, on_outcome: OnOutcome) -> Any:
    """Await vLLM's response, add the extras and report the outcome, once."""
    try:
        response = await vllm_response
    except CancelledError:
        on_outcome("aborted")
        raise
    except Exception as error:
        rejected = isinstance(error, VLLMClientError) or getattr(error, "status_code", 500) < 500
        on_outcome("rejected" if rejected else "failed")
        raise
    if response is None:  # vLLM's return value if the client has disconnected
        on_outcome("aborted")
        return None
    return await with_extras(response, extras, on_outcome)
