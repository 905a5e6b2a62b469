"""A receiver of the spans that vLLM sends by OTLP over HTTP."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class SpanServer(ThreadingHTTPServer):
    """Receives spans by OTLP over HTTP and keeps their attributes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), SpanHandler)
        self.spans: list[dict[str, Any]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        """For vLLM's --otlp-traces-endpoint."""
        return f"http://127.0.0.1:{self.server_port}/v1/traces"

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
                self.server.spans.append(values)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Log nothing: by default each request writes a line to standard error."""
