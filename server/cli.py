"""`em-serve`: vLLM's `serve` command with all its flags and ours. Without a model it serves the demo model."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import demo
from em_sampler.params import MAX_STEPS, Params, parse_params, with_step_limit
from em_sampler.validation import ParamsError
from em_sampler.vllm_plugin.version import check_vllm_version
from server import auth
from server.processes import CHILD_ENV, end_with_parent
from server.protocol import Settings
from server.strategies.base import MIN_BRANCHES

# Plugin groups that VLLM_PLUGINS filters, besides the endpoint plugins: vllm/plugins/__init__.py.
FILTERED_GROUPS = ("general", "platform", "io_processor", "stat_logger")
HELP = """vLLM's OpenAI-compatible server with entropy minimisation (EM-INF) inside its sampler. Without MODEL it serves
the demo model. Flags are those of `vllm serve`, --help=em_inf, --help=strategy and --help=access; --help=all shows
them all, --help=WORD finds some."""
# No compilation at start-up: the model is small. No optional white space in JSON: a model that knows only sums would
# write it until it runs out of tokens. The user's flags come later and win.
DEMO_FLAGS = (
    *("--served-model-name", "demo", "--enforce-eager"),
    *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
)

DEMO_OWN_FLAGS = ("--strategy-refinement-prompt", "Check your answer.")  # its training data: demo/conversations.py

end_with_parent()  # in the processes that vLLM spawns, which import this module first


def main() -> None:
    """Run `em-serve`."""
    try:
        check_vllm_version()
        _reject_bypasses()
    except RuntimeError as error:
        sys.exit(f"em-serve: {error}")
    os.environ["VLLM_PLUGINS"] = ",".join(_plugins_to_load())
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ[CHILD_ENV] = "1"
    serve(sys.argv[1:])
    from server.drain import engine_died

    if engine_died.is_set():
        sys.exit("em-serve: the engine died")  # status 1; vLLM's own is 0, with which systemd would not restart it


def serve(argv: list[str]) -> None:
    """Parse `argv` and run the server until it gets SIGTERM or SIGINT."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from em_sampler.stats.transport import ADDRESS_ENV, SOCKET_DIR_ENV, socket_dir
    from em_sampler.vllm_plugin.transform import REQUIRE_FUSED_ENV
    from server.guards import prepare
    from server.model_files import StartError

    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="em-serve", description=__doc__)  # type: ignore[no-untyped-call]
    serve_parser = command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    serve_parser.prog, serve_parser.usage, serve_parser.description = "em-serve", "em-serve [MODEL] [options]", HELP
    _add_em_inf_flags(serve_parser)
    _add_strategy_flags(serve_parser)
    _add_access_flags(serve_parser)
    args = parser.parse_args(["serve", *argv])
    if args.model_tag is None and args.model == serve_parser.get_default("model"):
        args = parser.parse_args(["serve", str(demo.MODEL_PATH), *DEMO_FLAGS, *DEMO_OWN_FLAGS, *argv])
        # GiB; vLLM's default is nearly all of the machine's memory
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    _check_args(serve_parser, args)
    _guard_with_keys(serve_parser, args)
    command.validate(args)
    configure_logging_from_args(args)  # vLLM does so later: too late for what `prepare` says
    try:
        prepare(args)
    except StartError as error:
        serve_parser.error(str(error))
    if args.em_inf_statistics_address:
        os.environ[ADDRESS_ENV] = args.em_inf_statistics_address
    if args.em_inf_require_fused:
        os.environ[REQUIRE_FUSED_ENV] = "1"
    with socket_dir() as os.environ[SOCKET_DIR_ENV]:
        command.cmd(args)


def _add_em_inf_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("em_inf", "Entropy minimisation inside the sampler.")
    group.add_argument(
        "--em-inf-default",
        metavar="JSON",
        help="em_inf settings for requests without any, such as '{\"threshold\": 0.3}' or true.",
    )
    group.add_argument(
        "--em-inf-max-steps",
        type=int,
        default=Settings.em_inf_max_steps,
        choices=range(MAX_STEPS + 1),
        metavar="N",
        help=f"Most gradient steps per token that a request may ask for, 0 to {MAX_STEPS}.",
    )
    group.add_argument(
        "--em-inf-statistics-address",
        type=_address,
        metavar="HOST:PORT",
        help="Where workers on other machines send token stats: an address of the API servers' machine. API server i "
        "listens on PORT + i. Give the same to em-serve on every machine, and the same secret in the environment "
        "variable EM_INF_STATISTICS_KEY: `openssl rand -hex 32`. Default: unix sockets, on one machine.",
    )
    group.add_argument(
        "--em-inf-require-fused",
        action="store_true",
        help="End the start with an error if the fast transform (Numba on the CPU, Triton on CUDA) does not work in a "
        "worker, instead of using the eager one, which is many times slower.",
    )


def _add_strategy_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("strategy", "Several samples or rounds for one chat completion.")
    group.add_argument(
        "--strategy-max-branches",
        type=_at_least(MIN_BRANCHES),
        default=Settings.strategy_max_branches,
        metavar="N",
        help=f"Most samples or rounds that one request may ask for, at least {MIN_BRANCHES}.",
    )
    group.add_argument(
        "--strategy-max-in-flight",
        type=_at_least(1),
        default=Settings.strategy_max_in_flight,
        metavar="N",
        help="Most samples of all requests together, in each API server; a request that needs more gets a 429.",
    )
    group.add_argument(
        "--strategy-refinement-prompt",
        default=Settings.strategy_refinement_prompt,
        metavar="TEXT",
        help="The user message by which refinement asks the model for its next reply.",
    )


def _add_access_flags(parser: argparse.ArgumentParser) -> None:
    # "resolve": our --api-key takes the place of vLLM's, of which only the last one counts.
    group = parser.add_argument_group("access", "Who may send requests, of what size.", conflict_handler="resolve")
    group.add_argument(
        "--max-request-bytes",
        type=_at_least(1),
        default=Settings.max_request_bytes,
        metavar="N",
        help="Most bytes of a request's body; a larger one gets a 413. A proxy in front should have the same limit.",
    )
    group.add_argument(
        "--api-key",
        nargs="+",
        action="extend",
        metavar="KEY",
        help="A key that clients may send, as `Authorization: Bearer KEY`; may be repeated. Default: VLLM_API_KEY.",
    )
    group.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="API keys that clients may send, one a line (# begins a comment), in place of --api-key. The file is read "
        "again when it changes, so that keys rotate without a restart.",
    )


def _guard_with_keys(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Put our check of the keys before all routes; end with a usage error if the keys cannot be used."""
    args.middleware = [*args.middleware, auth.MIDDLEWARE]
    if args.api_key_file is None:
        return
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # in all processes: who sends it means "read the keys again"
    if args.api_key or os.environ.get("VLLM_API_KEY"):  # vLLM would accept these alone on /v1
        parser.error("argument --api-key-file: not together with --api-key or VLLM_API_KEY: put that key into the file")
    try:
        auth.read_keys(Path(args.api_key_file))
    except ValueError as error:
        parser.error(f"argument --api-key-file: {error}")


def _at_least(minimum: int) -> Callable[[str], int]:
    """Return an argparse type: an integer from `minimum` up."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"got {text!r}; must be an integer from {minimum} up")
        return int(text)

    return parse


def _address(text: str) -> str:
    """Check HOST:PORT, as an argparse type."""
    from em_sampler.stats.transport import parse_address

    try:
        parse_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Parse --em-inf-default in `args`; end with a usage error if it is invalid or flags contradict one another."""
    if getattr(args, "grpc", False):
        parser.error("argument --grpc: requests would be answered without this server's routes")
    try:
        args.em_inf_default = _parse_default(args.em_inf_default, args.em_inf_max_steps)
    except (ParamsError, json.JSONDecodeError) as error:
        parser.error(f"argument --em-inf-default: {error}")
    if args.em_inf_statistics_address:
        _check_statistics_key(parser)
    if args.strategy_max_branches > args.strategy_max_in_flight:
        parser.error("argument --strategy-max-branches: above --strategy-max-in-flight, so it could not be served")


def _check_statistics_key(parser: argparse.ArgumentParser) -> None:
    from em_sampler.stats.curve import read_key

    try:
        read_key()
    except RuntimeError as error:
        parser.error(f"argument --em-inf-statistics-address: {error}")


def _parse_default(text: str | None, max_steps: int) -> Params | None:
    return with_step_limit(parse_params(None if text is None else json.loads(text)), max_steps)


def _reject_bypasses() -> None:
    """Raise a RuntimeError for choices that would bypass our routes or load the plugin twice."""
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0").lower() not in ("", "0", "false"):
        raise RuntimeError("VLLM_USE_RUST_FRONTEND answers requests without this server's routes: unset it")
    if any("em_sampler.vllm_plugin.processor" in argument for argument in sys.argv):
        raise RuntimeError("the sampler plugin is loaded by its entry point: drop it from --logits-processors")


def _plugins_to_load() -> list[str]:
    """Return the names for VLLM_PLUGINS.

    vLLM loads an endpoint plugin only if this variable names it; but once set, the variable filters the other groups
    too. So all of their plugins are named, unless the user has set it.
    """
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None:
        return [*filter(None, chosen.split(",")), "em_inf"]
    groups = [metadata.entry_points(group=f"vllm.{group}_plugins") for group in FILTERED_GROUPS]
    return sorted({entry_point.name for group in groups for entry_point in group} | {"em_inf"})


if __name__ == "__main__":
    main()
