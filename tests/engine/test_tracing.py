"""If vLLM traces its requests, their spans carry the stats: a real server, and a receiver of OTLP."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.engine.launch import Server, serve
from tests.engine.support import EM, UNSURE

pytestmark = pytest.mark.engine


class SpanServer(ThreadingHTTPServer):
    """Receives spans by OTLP over HTTP and keeps their attributes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), SpanHandler)
        self.spans: list[dict[str, Any]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def spans_of(self, id_prefix: str) -> list[dict[str, Any]]:
        """Return the spans of engine requests whose id starts with `id_prefix`, in the order of their choices."""
        found = [span for span in self.spans if str(span.get("gen_ai.request.id", "")).startswith(id_prefix)]
        return sorted(found, key=lambda span: span.get("em_inf.index", -1))


class SpanHandler(BaseHTTPRequestHandler):
    server: SpanServer

    def do_POST(self) -> None:
        export = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
        for resource in export.resource_spans:
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                values = {a.key: getattr(a.value, str(a.value.WhichOneof("value"))) for a in span.attributes}
                self.server.spans.append(values | {"name": span.name})
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Log nothing: by default each request writes a line to standard error."""


@pytest.fixture(scope="module")
def traced() -> Iterator[tuple[Server, SpanServer]]:
    """Run a server that sends its spans to a receiver in this process."""
    receiver = SpanServer()
    endpoint = f"http://127.0.0.1:{receiver.server_port}/v1/traces"
    settings = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "100"}
    with serve("--otlp-traces-endpoint", endpoint, **settings) as server:
        yield server, receiver
    receiver.shutdown()


def test_the_span_of_a_request_carries_its_summary(traced: tuple[Server, SpanServer]) -> None:
    server, receiver = traced
    body = {"model": "demo", "prompt": UNSURE, "max_tokens": 12, "n": 2, "ignore_eos": True, "temperature": 1.5}
    responses = [
        server.http.post("/v1/completions", json=body | extra, headers={"X-Request-Id": name}).json()
        for name, extra in {
            "summary": {"em_inf": EM | {"stats": "summary"}},
            "no-stats": {"em_inf": EM},
            "plain": {},
        }.items()
    ]
    server.until(lambda: sum(span["name"] == "llm_request" for span in receiver.spans) == 6)

    for summary, span in zip(responses[0]["em_inf"], receiver.spans_of("cmpl-summary"), strict=True):
        for name, value in summary.items():
            assert span[f"em_inf.{name}"] == value
        assert span["em_inf.method"] == "em_inf"
        assert span["gen_ai.usage.completion_tokens"] == summary["tokens"] == 12
    for span in receiver.spans_of("cmpl-no-stats"):  # in the span, although the response has no stats
        assert (span["em_inf.tokens"], span["em_inf.missing"]) == (12, 0)
        assert span["em_inf.optimized_tokens"] > 0
    assert "em_inf" not in responses[1]
    assert [any(name.startswith("em_inf") for name in span) for span in receiver.spans_of("cmpl-plain")] == [False] * 2
