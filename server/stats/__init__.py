"""Stats of the requests in flight (collector.py) and their Prometheus metrics (metrics.py)."""
