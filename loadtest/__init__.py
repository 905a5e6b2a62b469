"""em-loadtest: decoding strategies compared on speed and accuracy together, against any OpenAI-compatible server."""
