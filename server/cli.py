"""`em-serve`: vLLM's `serve` command with every flag it has, the demo model where none is named, and our own flags."""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from importlib import metadata

import demo
from em_sampler.params import MAX_STEPS, Params, parse_params, with_step_limit
from em_sampler.validation import ParamsError
from em_sampler.vllm_plugin.version import check_vllm_version
from server.protocol import MAX_IN_FLIGHT, REFINEMENT_PROMPT
from server.strategies.base import MAX_BRANCHES, MIN_BRANCHES

# The plugin groups that VLLM_PLUGINS filters, besides the endpoint plugins: vllm/plugins/__init__.py.
FILTERED_GROUPS = ("general", "platform", "io_processor", "stat_logger")
HELP = """vLLM's OpenAI-compatible server with entropy minimisation (EM-INF) inside its sampler. Without MODEL it serves
the demo model. Flags are those of `vllm serve`, --help=em_inf and --help=strategy; --help=all shows them all,
--help=WORD finds some."""
# A small model on any machine, so no compilation at start-up; no chunked prefill, in which vLLM 0.32's V1 runner on the
# CPU dies when the request has a seed (docs/findings/upstream.md); and no free white space in JSON, where a model that
# knows only sums would stay until it runs out of tokens. Flags given by the user come later and win.
DEMO_FLAGS = (
    *("--served-model-name", "demo", "--enforce-eager", "--no-enable-chunked-prefill"),
    *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
)

DEMO_OWN_FLAGS = ("--strategy-refinement-prompt", "Check your answer.")  # as it was taught (demo/conversations.py)


def main() -> None:
    """Entry point of `em-serve`."""
    try:
        check_vllm_version()
        _refuse_what_bypasses_the_plugin()
    except RuntimeError as error:
        sys.exit(f"em-serve: {error}")
    os.environ["VLLM_PLUGINS"] = ",".join(_plugins_to_load())
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    serve(sys.argv[1:])


def serve(argv: list[str]) -> None:
    """Parse `argv` and run the server until it is told to stop."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from em_sampler.stats.transport import ADDRESS_ENV, SOCKET_DIR_ENV, socket_dir

    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="em-serve", description=__doc__)  # type: ignore[no-untyped-call]
    serve_parser = command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    serve_parser.prog, serve_parser.usage, serve_parser.description = "em-serve", "em-serve [MODEL] [options]", HELP
    _add_flags(serve_parser)
    args = parser.parse_args(["serve", *argv])
    if args.model_tag is None and args.model == serve_parser.get_default("model"):
        args = parser.parse_args(["serve", str(demo.MODEL_PATH), *DEMO_FLAGS, *DEMO_OWN_FLAGS, *argv])
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; vLLM would take nearly all of the machine's memory
        if shutil.which("g++") is None:  # vLLM compiles what it needs for logprobs, eager or not, and dies without one
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if getattr(args, "grpc", False):
        serve_parser.error("argument --grpc: requests would be answered without this server's routes")
    args.em_inf_default = _default(serve_parser, args)
    if args.strategy_max_branches > args.strategy_max_in_flight:
        serve_parser.error(
            "argument --strategy-max-branches: above --strategy-max-in-flight, so it could not be served"
        )
    command.validate(args)
    if args.em_inf_statistics_address:
        os.environ[ADDRESS_ENV] = args.em_inf_statistics_address
    with socket_dir() as os.environ[SOCKET_DIR_ENV]:
        command.cmd(args)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("em_inf", "Entropy minimisation inside the sampler.")
    group.add_argument(
        "--em-inf-default",
        metavar="JSON",
        help="Settings for requests that say nothing, such as '{\"threshold\": 0.3}' or true.",
    )
    group.add_argument(
        "--em-inf-max-steps",
        type=int,
        default=MAX_STEPS,
        choices=range(MAX_STEPS + 1),
        metavar="N",
        help=f"Most gradient steps per token that a request may ask for, 0 to {MAX_STEPS}.",
    )
    group.add_argument(
        "--em-inf-statistics-address",
        type=_address,
        metavar="HOST:PORT",
        help="Where workers on other machines send statistics: an address of the API servers' machine. API server i "
        "listens on PORT + i; give it to em-serve on every machine. Without it, they go through sockets in a folder.",
    )
    group = parser.add_argument_group("strategy", "Several samples or rounds for one chat completion.")
    group.add_argument(
        "--strategy-max-branches",
        type=_at_least(MIN_BRANCHES),
        default=MAX_BRANCHES,
        metavar="N",
        help=f"Most samples or rounds that one request may ask for, at least {MIN_BRANCHES}.",
    )
    group.add_argument(
        "--strategy-max-in-flight",
        type=_at_least(1),
        default=MAX_IN_FLIGHT,
        metavar="N",
        help="Most samples of all requests at a time, in each API server; a request above it is answered with 429.",
    )
    group.add_argument(
        "--strategy-refinement-prompt",
        default=REFINEMENT_PROMPT,
        metavar="TEXT",
        help="What refinement says to the model after its reply.",
    )


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text!r}; must be an integer from {least} up")
        return int(text)

    return number


def _address(text: str) -> str:
    from em_sampler.stats.transport import parse_address

    try:
        parse_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _default(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Params | None:
    try:
        value = None if args.em_inf_default is None else json.loads(args.em_inf_default)
        return with_step_limit(parse_params(value), args.em_inf_max_steps)
    except (ParamsError, json.JSONDecodeError) as error:
        parser.error(f"argument --em-inf-default: {error}")


def _refuse_what_bypasses_the_plugin() -> None:
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0").lower() not in ("", "0", "false"):
        raise RuntimeError("VLLM_USE_RUST_FRONTEND answers requests without this server's routes: unset it")
    if any("em_sampler.vllm_plugin.processor" in argument for argument in sys.argv):
        raise RuntimeError("the sampler plugin is loaded by its entry point: drop it from --logits-processors")


def _plugins_to_load() -> list[str]:
    """VLLM_PLUGINS for this server. vLLM serves an endpoint plugin only if it is named there, and once the variable is
    set it filters the other plugin groups too: so those are all named, unless the user has chosen."""
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None:
        return [*filter(None, chosen.split(",")), "em_inf"]
    groups = [metadata.entry_points(group=f"vllm.{group}_plugins") for group in FILTERED_GROUPS]
    return sorted({entry_point.name for group in groups for entry_point in group} | {"em_inf"})


if __name__ == "__main__":
    main()
