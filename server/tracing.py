"""If vLLM traces its requests (OpenTelemetry), the span of a request carries the summary of its stats.

vLLM makes and ends the span when the last token has come, a moment before that token's stats: so the span is delayed.
"""

import asyncio
import functools
from collections.abc import Mapping
from typing import Any
from weakref import WeakValueDictionary

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider

from em_sampler.stats.aggregator import ReturnAddress
from server.stats.collector import RequestStats, summarize


class StatsSpanProcessor(SpanProcessor):
    """Puts the summary of a request's stats on the span that vLLM makes for the request."""

    def __init__(self, engine_client: Any, in_flight: Mapping[int, RequestStats]) -> None:
        """Add this processor to vLLM's tracer and delay the spans.

        Args:
            engine_client: vLLM's AsyncLLM.
            in_flight: the stats of the requests in flight by their number, which is in their return address.
        """
        provider = trace.get_tracer_provider()
        assert isinstance(provider, TracerProvider)  # vLLM has set one up
        provider.add_span_processor(self)
        self.in_flight = in_flight
        self.request_stats: WeakValueDictionary[str, RequestStats] = WeakValueDictionary()  # by vLLM's internal id
        self.delayed: set[asyncio.Task[None]] = set()
        self.attributes: dict[str, Any] = {}  # of the span being made
        outputs = engine_client.output_processor
        outputs.add_request = functools.partial(self._add_request, outputs.add_request)
        outputs.do_tracing = functools.partial(self._delay_span, outputs.do_tracing)

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Set the attributes; OpenTelemetry calls this for every span of the process."""
        span.set_attributes(self.attributes)

    def _add_request(self, add_request: Any, request: Any, *others: Any, **options: Any) -> None:
        """Note which stats are the request's. Replaces vLLM's `OutputProcessor.add_request`.

        vLLM has given the request an id of its own by now; clients may send several with the same id.
        """
        params = request.sampling_params
        address = ReturnAddress.from_extra_args(params.extra_args) if params else None
        if address and (stats := self.in_flight.get(address.request_number)):
            self.request_stats[request.request_id] = stats
        add_request(request, *others, **options)

    def _delay_span(self, make_span: Any, output: Any, request: Any, iteration_stats: Any) -> None:
        """Make the span once the request's stats are final. Replaces vLLM's `OutputProcessor.do_tracing`."""
        make_span = functools.partial(make_span, output, request, iteration_stats)
        stats = self.request_stats.get(request.request_id)
        if stats is None:
            make_span()
            return
        task = asyncio.get_running_loop().create_task(self._make_with_summary(make_span, stats, request.request_index))
        self.delayed.add(task)
        task.add_done_callback(self.delayed.discard)

    async def _make_with_summary(self, make_span: Any, stats: RequestStats, index: int) -> None:
        await stats.wait()
        summary = summarize(index, [stats.choices[index]], per_token=False) | {"method": stats.method}
        self.attributes = {f"em_inf.{name}": value for name, value in summary.items() if value is not None}
        try:
            make_span()
        finally:
            self.attributes = {}
