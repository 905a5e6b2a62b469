"""vLLM's offline `LLM` on the demo model, as in a user's script: offline.py REQUESTS.json ANSWERS.json.

launch.py runs it. A request is {"prompt": ..., "params": {...}}; they run one at a time, so that no answer depends on
the other requests of a batch.
"""

import json
import sys
from pathlib import Path


def main(inbox: str, outbox: str) -> None:
    """Answer the requests of the file `inbox` into the file `outbox`: token ids, or an error's text."""
    from vllm import LLM, SamplingParams

    import demo

    llm = LLM(str(demo.MODEL_PATH), enforce_eager=True, dtype="float32", max_model_len=256, disable_log_stats=True)
    answers: list[list[int] | str] = []
    for request in json.loads(Path(inbox).read_text()):
        try:
            done = llm.generate(request["prompt"], SamplingParams(**request["params"]), use_tqdm=False)
            answers.append(list(done[0].outputs[0].token_ids))
        except Exception as error:
            answers.append(str(error))
    Path(outbox).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
