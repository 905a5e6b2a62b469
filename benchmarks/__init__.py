"""Benchmarks. A command is a `__main__.py`, run as `python -m` its folder; every other module is a helper of these.

benchmarks.transform                    time of the transform, beside eager torch, torch.compile and others
benchmarks.transform.figure             draws docs/figures/the-transform.png
benchmarks.transform.kept               draws docs/figures/method-*.svg: what each method makes of a real row
benchmarks.serving                      output tokens/s of em-serve with EM-INF on and off, and of plain vLLM
benchmarks.serving.stats_cost           output tokens/s with no stats, summaries, and every token's stats
benchmarks.serving.replica_limits       processor time and memory of one replica, for docs/scaling.md
benchmarks.loadtest                     em-loadtest's standard comparison on the demo model
benchmarks.loadtest.capacity            how much load em-loadtest can generate on one core
benchmarks.loadtest.against_vllm_bench  em-loadtest beside `vllm bench serve`
benchmarks.training                     EM-FT, EM-RL and a labelled baseline on the demo model
benchmarks.real_models                  fetches two real language models (a module, not a folder)
benchmarks.soak                         attacks on em-serve with the demo model, counted in a table
benchmarks.soak.reproducers             faults that were found, each with the requests that show it
benchmarks.training.entropy_loss        peak memory of the entropy loss
"""
