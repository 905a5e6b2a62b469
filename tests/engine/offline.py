"""Answers requests by vLLM's offline `LLM` on the demo model: offline.py REQUESTS.json ANSWERS.json [SCRIPT.py].

launch.py runs it. A request is {"prompt": ..., "params": {...}}; they run one at a time, so that no answer depends on
the other requests of a batch.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any


def main(inbox: str, outbox: str, script: str | None = None) -> None:
    """Answer the requests of the file `inbox` into the file `outbox`: token ids, or an error's text.

    The variable `llm` of a user's script answers, after the script has run; without a script, a new `LLM`.
    """
    llm = runpy.run_path(script, run_name="__main__")["llm"] if script else new_llm()
    from vllm import SamplingParams

    answers: list[list[int] | str] = []
    for request in json.loads(Path(inbox).read_text()):
        try:
            done = llm.generate(request["prompt"], SamplingParams(**request["params"]), use_tqdm=False)
            answers.append(list(done[0].outputs[0].token_ids))
        except Exception as error:
            answers.append(str(error))
    Path(outbox).write_text(json.dumps(answers))


def new_llm() -> Any:
    from vllm import LLM

    import demo

    return LLM(str(demo.MODEL_PATH), enforce_eager=True, dtype="float32", max_model_len=256, disable_log_stats=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
