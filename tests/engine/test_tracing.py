"""Where vLLM traces its requests, their spans carry the statistics: a real server, and a collector of OTLP."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.engine.launch import Server, serve
from tests.engine.support import EM, UNSURE

pytestmark = pytest.mark.engine


class Collector(ThreadingHTTPServer):
    """Keeps the attributes of every span that it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.spans: list[dict[str, Any]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def about(self, request: str) -> list[dict[str, Any]]:
        """The spans of an engine request whose id begins so, by sample."""
        found = [span for span in self.spans if str(span.get("gen_ai.request.id", "")).startswith(request)]
        return sorted(found, key=lambda span: span.get("em_inf.index", -1))


class Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        export = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
        for resource in export.resource_spans:
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                values = {a.key: getattr(a.value, str(a.value.WhichOneof("value"))) for a in span.attributes}
                self.server.spans.append(values | {"name": span.name})
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing, in a test's output."""


@pytest.fixture(scope="module")
def traced() -> Iterator[tuple[Server, Collector]]:
    collector = Collector()
    endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    settings = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "100"}
    with serve("--otlp-traces-endpoint", endpoint, **settings) as server:
        yield server, collector
    collector.shutdown()


def test_the_span_of_a_request_carries_its_summary(traced: tuple[Server, Collector]) -> None:
    server, collector = traced
    body = {"model": "demo", "prompt": UNSURE, "max_tokens": 12, "n": 2, "ignore_eos": True, "temperature": 1.5}
    answers = [
        server.http.post("/v1/completions", json=body | extra, headers={"X-Request-Id": name}).json()
        for name, extra in {
            "summed": {"em_inf": EM | {"stats": "summary"}},
            "silent": {"em_inf": EM},
            "plain": {},
        }.items()
    ]
    server.until(lambda: sum(span["name"] == "llm_request" for span in collector.spans) == 6)

    for entry, span in zip(answers[0]["em_inf"], collector.about("cmpl-summed"), strict=True):
        for name, value in entry.items():
            assert span[f"em_inf.{name}"] == value
        assert span["em_inf.method"] == "em_inf"
        assert span["gen_ai.usage.completion_tokens"] == entry["tokens"] == 12
    for span in collector.about("cmpl-silent"):  # the reply has none, the span has
        assert (span["em_inf.tokens"], span["em_inf.missing"]) == (12, 0)
        assert span["em_inf.optimized_tokens"] > 0
    assert "em_inf" not in answers[1]
    assert [any(name.startswith("em_inf") for name in span) for span in collector.about("cmpl-plain")] == [False] * 2
