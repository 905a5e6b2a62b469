"""Where vLLM traces its requests (OpenTelemetry), the span of a request carries the summary of its statistics.

vLLM makes and ends the span when the last token has come, a moment before that token's record: so it is made to wait.
"""

import asyncio
import functools
from typing import Any
from weakref import WeakValueDictionary

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider

from server.stats.collector import RequestStats, summarize


class Tracing(SpanProcessor):
    """Puts the statistics of a request on the span that vLLM makes for it."""

    def __init__(self, engine_client: Any) -> None:
        """`engine_client`: vLLM's AsyncLLM."""
        provider = trace.get_tracer_provider()
        assert isinstance(provider, TracerProvider)  # vLLM has set one up
        provider.add_span_processor(self)
        self.tallies: WeakValueDictionary[str, RequestStats] = WeakValueDictionary()
        self.waiting: set[asyncio.Task[None]] = set()
        self.attributes: dict[str, Any] = {}  # of the span being made
        outputs = engine_client.output_processor
        outputs.do_tracing = functools.partial(self._later, outputs.do_tracing)

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """OpenTelemetry's call for every span of this process."""
        span.set_attributes(self.attributes)

    def _later(self, make_span: Any, output: Any, request: Any, iteration_stats: Any) -> None:
        """In place of vLLM's `OutputProcessor.do_tracing`."""
        make_span = functools.partial(make_span, output, request, iteration_stats)
        tally = self.tallies.get(request.external_req_id)
        if tally is None:
            make_span()
            return
        task = asyncio.get_running_loop().create_task(self._with_summary(make_span, tally, request.request_index))
        self.waiting.add(task)
        task.add_done_callback(self.waiting.discard)

    async def _with_summary(self, make_span: Any, tally: RequestStats, index: int) -> None:
        await tally.wait()
        entry = summarize(index, [tally.choices[index]], every_token=False) | {"method": tally.method}
        self.attributes = {f"em_inf.{name}": value for name, value in entry.items() if value is not None}
        try:
            make_span()
        finally:
            self.attributes = {}
