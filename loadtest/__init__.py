"""em-loadtest: compares the speed and accuracy of decoding configurations, against any OpenAI-compatible server."""
