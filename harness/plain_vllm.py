"""vLLM's own server as if this project were not installed: `python -m harness.plain_vllm MODEL [options]`.

vLLM starts its processes by `spawn`, which runs the top level of this module in each of them before anything else.
"""

import sys

import torch

from harness.hidden_plugin import hide_plugin
from harness.stock_vllm import main

hide_plugin()
torch.cpu._init_amx()  # as our plugin does: without it vLLM's attention on the CPU crashes (docs/findings/upstream.md)

if __name__ == "__main__":
    main(sys.argv[1:])
