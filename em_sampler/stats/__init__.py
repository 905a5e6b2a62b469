"""How a token's stats get out of a worker: recorder, aggregator, wire format, transport. server/stats receives them."""
