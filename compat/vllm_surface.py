"""Every place where this project touches vLLM. If you change the code, edit it and docs/vllm-surface.md too."""

from dataclasses import dataclass

from compat.expectations import Expectation, abstract_members, contains, has, matches, signature, value
from compat.sources import METADATA, MissingError, Sources

PROCESSOR, REQUEST, V1, V2 = (f"em_sampler/vllm_plugin/{name}.py" for name in ("processor", "request", "v1", "v2"))
TRANSFORM = "em_sampler/vllm_plugin/transform.py"
CLI, ENDPOINTS, HANDLER, PROTOCOL = (f"server/{name}.py" for name in ("cli", "endpoints", "handler", "protocol"))
ENGINE, TRACING, RESPONSE, ERRORS = (f"server/{name}.py" for name in ("engine", "tracing", "response", "errors"))
DRAIN, HEALTH = "server/drain.py", "server/health.py"
AUTH, GUARDS, CPU_DEFAULTS = "server/auth.py", "server/guards.py", "server/cpu_defaults.py"
BRANCHES, BASE = "server/strategies/branches.py", "server/strategies/base.py"

CONFIG, SAMPLING, SERVE = "vllm/config/__init__.py", "vllm/sampling_params.py", "vllm/entrypoints/cli/serve.py"
V1_LOADER, V1_INTERFACE = (f"vllm/v1/sample/logits_processor/{name}.py" for name in ("__init__", "interface"))
V2_LOADER, V2_INTERFACE = (f"vllm/v1/worker/gpu/sample/logits_processor/{name}.py" for name in ("loader", "interface"))
V1_SAMPLER, V2_SAMPLER = "vllm/v1/sample/sampler.py", "vllm/v1/worker/gpu/sample/sampler.py"
PLUGINS, ENDPOINT_PLUGINS = "vllm/plugins/__init__.py", "vllm/plugins/endpoint_plugins/interface.py"
ROUTES = "vllm/entrypoints"  # our code finds routes by path, so they may be in any module of it

V2_BUILD, V2_VALIDATE = "build_custom_logits_processors", "build_custom_logits_processors_params_validator"
GROUPS = ("endpoint", "general", "io_processor", "platform", "stat_logger")
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
XARGS = "self.vllm_xargs if self.vllm_xargs else {}"

# (our file, vLLM's file): what is used, and what we rely on.
SURFACE: dict[tuple[str, str], dict[Expectation, str]] = {
    # What vLLM loads as a logits processor.
    (PROCESSOR, SAMPLING): {has("SamplingParams", "extra_args"): "where a request's settings arrive"},
    (REQUEST, SAMPLING): {
        has("SamplingParams", "extra_args", "sampling_type"): "where a request's settings arrive",
        has("SamplingType", "GREEDY"): "a greedy request is not changed",
    },
    (PROCESSOR, "vllm/exceptions.py"): {
        signature("VLLMValidationError.__init__(self, message, *, parameter=None, value=None)"): "HTTP 400",
    },
    (PROCESSOR, V1_LOADER): {
        value("LOGITSPROCS_GROUP", "'vllm.logits_processors'"): "the group of our entry point",
        contains(
            "build_logitsprocs", "ctor(vllm_config, device, is_pin_memory)"
        ): "three arguments: called by the V1 runner",
        contains("validate_logits_processors_parameters", "logits_procs.validate_params(sampling_params)"): "HTTP 400",
    },
    (PROCESSOR, V2_LOADER): {
        value("LOGITSPROCS_GROUP", "'vllm.logits_processors'"): "the same group, so one class for both",
        contains(
            "_load_v2_logitsprocs_plugins", "issubclass(cls, LogitsProcessor)"
        ): "why our class has both base classes",
        contains(V2_BUILD, "ctor(vllm_config, lp_req_state)"): "two arguments: called by the V2 runner",
        contains(V2_VALIDATE, "cls.validate_params(sampling_params)"): "HTTP 400",
    },
    (PROCESSOR, V1_INTERFACE): {signature("LogitsProcessor.validate_params(cls, sampling_params)"): "our validation"},
    (PROCESSOR, V2_INTERFACE): {signature("LogitsProcessor.validate_params(cls, sampling_params)"): "our validation"},
    # The transform of a worker.
    (TRANSFORM, CONFIG): {
        has("ParallelConfig", "rank", "world_size", "pipeline_parallel_size"): "which workers sample",
    },
    (TRANSFORM, "vllm/distributed/parallel_state.py"): {
        contains(
            "initialize_model_parallel", "data_parallel_size", "pipeline_model_parallel_size"
        ): "the last ranks of an engine are its last pipeline stage",
    },
    (TRANSFORM, "vllm/v1/worker/worker_base.py"): {
        contains("WorkerWrapperBase.__getattr__", "getattr(self.worker, attr)"): "our method is one of the worker's",
        has("WorkerBase", "execute_model"): "the base class of all workers, which gets our method",
    },
    (TRANSFORM, "vllm/v1/serial_utils.py"): {
        contains("run_method", "func = getattr(obj, method)"): "our method is found by its name",
    },
    # The V1 runner.
    (V1, CONFIG): {
        signature("VllmConfig.model_config.get_vocab_size(self)"): "columns of the logits",
        has("VllmConfig.scheduler_config", "max_num_seqs"): "the largest number of rows of the logits",
        has("VllmConfig.parallel_config", "tensor_parallel_size"): "only the first rank of each group sends stats",
    },
    (V1, SAMPLING): {has("SamplingParams", "extra_args"): "the settings of an added row"},
    (V1, "vllm/v1/worker/worker_base.py"): {
        contains(
            "WorkerBase.__init__", "self.parallel_config.rank = rank"
        ): "this worker's rank; the ranks of a tensor-parallel group are consecutive",
    },
    (V1, V1_INTERFACE): {
        abstract_members(
            "LogitsProcessor", "__init__", "apply", "is_argmax_invariant", "update_state"
        ): "ours defines these four",
        signature("LogitsProcessor.__init__(self, vllm_config, device, is_pin_memory)"): "the constructor",
        signature("LogitsProcessor.is_argmax_invariant(self)"): "False keeps us before the temperature",
        signature("LogitsProcessor.update_state(self, batch_update)"): "keeps our rows equal to those of the batch",
        signature("LogitsProcessor.apply(self, logits)"): "where the transform runs",
        has("BatchUpdate", "removed", "added", "moved"): "applied in this order",
        value("RemovedRequest", "int"): "a row",
        value(
            "AddedRequest", "tuple[int, SamplingParams, list[int] | None, list[int]]"
        ): "the row and its settings come first",
        value("MovedRequest", "tuple[int, int, MoveDirectionality]"): "source, target, direction",
        has("MoveDirectionality", "SWAP"): "any other value moves in one direction",
    },
    (V1, "vllm/v1/worker/gpu_input_batch.py"): {
        contains("InputBatch.refresh_metadata", "logit_proc.update_state(batch_update)"): "called when rows change",
        contains(
            "InputBatch._register_add_request", "request.output_token_ids"
        ): "a list that grows: its length is the position of the next sampled token",
    },
    (V1, V1_SAMPLER): {
        contains(
            "Sampler.forward", "logits = logits.to(torch.float32)", "self.apply_logits_processors", "self.sample"
        ): "in float32, before the temperature",
        contains("Sampler.apply_logits_processors", "sampling_metadata.logitsprocs.non_argmax_invariant"): "our list",
        contains("Sampler.apply_logits_processors", "logits = processor.apply(logits)"): "how we are called",
    },
    # The V2 runner.
    (V2, SAMPLING): {has("SamplingParams", "extra_args"): "the argument of `add_request`"},
    (V2, CONFIG): {
        has("VllmConfig", "num_speculative_tokens"): "one more row for each draft token",
        has("VllmConfig.parallel_config", "tensor_parallel_size"): "only the first rank of each group sends stats",
        has("VllmConfig.parallel_config", "enable_batch_sharded_sampling"): "with it, all ranks send stats",
    },
    (V2, "vllm/v1/worker/gpu/buffer_utils.py"): {
        contains(
            "UvaBackedTensor.__init__", "self.gpu = self.pool.copy_to_uva(self.np)"
        ): "lengths, read on the device",
    },
    (V2, V2_INTERFACE): {
        abstract_members("LogitsProcessor", "apply"): "ours defines it",
        signature("LogitsProcessor.__init__(self, vllm_config, req_states)"): "the constructor",
        signature("LogitsProcessor.add_request(self, req_idx, sampling_params)"): "a slot gets a new request",
        signature("LogitsProcessor.apply_staged_writes(self)"): "when the table is copied to the device",
        signature("LogitsProcessor.apply(self, logits, ctx)"): "where the transform runs",
        has("LogitsProcRequestState", "max_num_reqs", "device", "vocab_size"): "sizes and device",
        has(
            "LogitsProcRequestState", "prompt_len", "prefill_len"
        ): "where the reply begins, and which positions are sampled",
        has(
            "LogitsContext", "idx_mapping_np", "expanded_idx_mapping", "pos"
        ): "slots of requests, slots of rows, positions of rows",
    },
    (V2, V2_SAMPLER): {
        contains(
            "Sampler.add_request", "needs_processing |= processor.add_request(req_idx, sampling_params)"
        ): "called for every new request; False avoids the float32 copy",
        contains(
            "Sampler.apply_staged_writes", "processor.apply_staged_writes()"
        ): "called in every step, before sampling",
        contains(
            "Sampler.apply_sampling_params",
            "dtype=torch.float32",
            "logits = processor.apply(logits, ctx)",
            "self.sampling_states.apply_temperature",
        ): "in float32, before the temperature",
    },
    (V2, "vllm/v1/worker/gpu/spec_decode/rejection_sampler.py"): {
        contains(
            "RejectionSampler._verify", "self.sampler.apply_sampling_params"
        ): "draft tokens pass through the transform too",
    },
    # The command line.
    (CLI, SERVE): {
        contains("cmd_init", "ServeSubcommand()"): "vLLM's `serve` command, constructed without arguments",
        signature("ServeSubcommand.subparser_init(self, subparsers)"): "its flags, to which ours are added",
        signature("ServeSubcommand.validate(self, args)"): "its checks",
        signature("ServeSubcommand.cmd(args)"): "runs until SIGTERM or SIGINT",
        contains("ServeSubcommand.cmd", "getattr(args, 'grpc', False)"): "would bypass our routes: refused",
        contains("ServeSubcommand.cmd", "envs.VLLM_USE_RUST_FRONTEND"): "would bypass our routes: refused",
        contains("make_arg_parser", "'model_tag'"): "None if the user names no model",
    },
    (CLI, "vllm/engine/arg_utils.py"): {
        contains("EngineArgs.add_cli_args", f"'--{flag}'"): "how the demo model is served"
        for flag in ("model", "served-model-name", "enforce-eager", "enable-chunked-prefill")
    },
    (CLI, "vllm/logger.py"): {
        signature("configure_logging_from_args(args)"): "what em-serve says before the start is printed as vLLM's own",
    },
    (CLI, "vllm/utils/argparse_utils.py"): {
        signature("FlexibleArgumentParser.__init__(self, *args, **kwargs)"): "the outer parser",
        signature(
            "FlexibleArgumentParser.parse_args(self, args=None, namespace=None)"
        ): "parses `serve` and the user's flags",
    },
    (CLI, "vllm/envs.py"): {
        contains("environment_variables", "'VLLM_PLUGINS'"): "set before vLLM starts",
        contains("environment_variables", "'VLLM_WORKER_MULTIPROC_METHOD'"): "set before vLLM starts",
        contains("environment_variables", "'VLLM_USE_RUST_FRONTEND'"): "read before vLLM starts",
    },
    (CLI, PLUGINS): {
        matches('"vllm[.]([a-z_]+)_plugins"', *GROUPS): "FILTERED_GROUPS, and the endpoint plugins",
        contains("load_plugins_by_group", "envs.VLLM_PLUGINS"): "filters every group of plugins",
        contains("load_plugins_by_group", "plugin.name in allowed_plugins"): "compares the names of entry points",
    },
    # The endpoint plugin.
    (ENDPOINTS, PLUGINS): {
        contains("load_endpoint_plugins", "envs.VLLM_PLUGINS"): "loaded only if named there",
        contains(
            "load_endpoint_plugins", "plugin = factory()", "plugin.required_tasks"
        ): "ours has None: always loaded",
    },
    (ENDPOINTS, ENDPOINT_PLUGINS): {
        abstract_members(
            "EndpointPlugin", "name", "required_tasks", "attach_router", "init_state"
        ): "ours defines these four",
        signature("EndpointPlugin.attach_router(self, app)"): "our routes",
        signature("EndpointPlugin.init_state(self, engine_client, state, args)"): "our state",
        contains("attach_endpoint_plugins", "plugin.attach_router(app)"): "how it is called",
        contains("init_endpoint_plugins_state", "plugin.init_state(engine_client, state, args)"): "how it is called",
    },
    (ENDPOINTS, "vllm/entrypoints/launchers/app.py"): {
        contains(
            "build_app", "register_api_routers", "attach_endpoint_plugins"
        ): "vLLM's routes exist before our plugin is attached",
    },
    (ENDPOINTS, METADATA): {
        matches("^Requires-Dist: fastapi.*(<0[.]137)", "<0.137"): "up to 0.136 `app.router.routes` is a flat list",
    },
    (ENDPOINTS, ROUTES): {
        signature(f"{path}(request, raw_request)"): "the handler, found by the route's path and wrapped"
        for path in (CHAT, COMPLETIONS, RESPONSES)
    },
    (HANDLER, "vllm/entrypoints/openai/chat_completion/serving.py"): {
        signature("OpenAIServingChat.render_chat_request(self, request)"): "refinement's next prompt",
        contains(
            "OpenAIServingChat._create_chat_completion",
            "conversation, engine_inputs = result",
            "raw_request.state.request_metadata = request_metadata",
        ): "what it returns; where the id of a stream's chunks is",
        signature(
            "OpenAIServingChat._make_parser(self, request, tokenizer, chat_template_kwargs)"
        ): "a branch's reasoning tokens",
        signature("OpenAIServingChat._effective_chat_template_kwargs(self, request)"): "an argument of the parser",
        contains(
            "OpenAIServingChat.chat_completion_full_generator", "parser.count_reasoning_tokens(token_ids)"
        ): "how vLLM counts them; from 0.32 on, the parser gets the prompt first",
        contains(
            "OpenAIServingChat.__init__", "self._include_reasoning_tokens_details = bool(reasoning_parser)"
        ): "whether it does",
        contains(
            "OpenAIServingChat.__init__", "self.enable_force_include_usage = enable_force_include_usage"
        ): "whether every chunk of a stream has a usage",
    },
    (ENDPOINTS, "vllm/engine/protocol.py"): {
        has(
            "EngineClient.vllm_config", "model_config", "speculative_config", "use_v2_model_runner"
        ): "whether em_inf is available",
    },
    (ENDPOINTS, "vllm/config/model.py"): {
        contains("ModelConfig.__post_init__", "self.runner_type == 'pooling'"): "a pooling model samples no tokens",
    },
    (ENDPOINTS, V1_LOADER): {
        contains(
            "build_logitsprocs", "vllm_config.speculative_config"
        ): "why V1 has no em_inf with speculative decoding"
    },
    (ERRORS, "vllm/exceptions.py"): {
        signature("VLLMValidationError.__init__(self, message, *, parameter=None, value=None)"): "HTTP 400",
    },
    (HANDLER, ROUTES): {
        has(
            f"{CHAT}.request", "logprobs", "top_logprobs", "logprob_token_ids", "prompt_logprobs"
        ): "log-probabilities that the client asks for",
    },
    (HANDLER, "vllm/tokenizers/detokenizer_utils.py"): {
        signature("convert_ids_list_to_tokens(tokenizer, token_ids)"): "the texts of candidates, as in `logprobs`",
    },
    (HANDLER, "vllm/exceptions.py"): {
        contains("VLLMClientError", "VLLMError"): "the errors that count as rejected requests",
        contains("VLLMValidationError", "VLLMClientError"): "a refused setting is such an error",
    },
    # The engine client, through which every request passes.
    (ENGINE, "vllm/engine/protocol.py"): {
        matches(
            r"def (generate)\(\s+self,\s+prompt:[^*]+\bsampling_params: SamplingParams,\s+request_id: str,\s+[*],",
            "generate",
        ): "wrapped: every route calls the engine by it",
        signature("EngineClient.is_tracing_enabled(self)"): "whether requests have spans",
        signature("EngineClient.abort(self, request_id)"): "ends a branch",
        signature(
            "EngineClient.collective_rpc(self, method, timeout=None, args=(), kwargs=None)"
        ): "asks the workers which transforms they use",
    },
    (ENGINE, "vllm/config/model.py"): {
        has("ModelConfig", "max_logprobs", "logprobs_mode"): "a server's limit; what it returns"
    },
    (ENGINE, CONFIG): {has("VllmConfig.parallel_config", "_api_process_rank"): "the index of this API server"},
    (ENGINE, "vllm/exceptions.py"): {
        signature("VLLMValidationError.__init__(self, message, *, parameter=None, value=None)"): "HTTP 400",
        signature("GenerationError.__init__(self, message='Internal server error')"): "HTTP 500",
    },
    (ENGINE, "vllm/v1/engine/output_processor.py"): {
        contains(
            "OutputProcessor.abort_requests",
            "self.external_req_ids.pop(request_id, [])",
            "finish_reason=FinishReason.ABORT",
        ): "aborts all requests with the id that we gave to a branch alone; its last output follows",
        contains(
            "RequestState._new_completion_output", "logprobs[-num_new_tokens:]"
        ): "a list with an entry for each token is sliced, whatever the entries",
    },
    (ENGINE, "vllm/v1/engine/logprobs.py"): {
        signature("LogprobsProcessor.from_new_request(cls, tokenizer, request)"): "wrapped: makes our subclass",
        signature("LogprobsProcessor._update_sample_logprobs(self, logprobs_lists)"): "overridden",
        has("LogprobsProcessor", "logprobs", "cumulative_logprob", "num_logprobs"): "what it keeps",
        contains(
            "LogprobsProcessor._update_sample_logprobs", "sampled_token_logprob = logprobs[0]"
        ): "the sampled token comes first",
    },
    (ENGINE, "vllm/v1/outputs.py"): {has("LogprobsLists", "logprobs"): "a row for each token"},
    (ENGINE, "vllm/v1/engine/core_client.py"): {
        signature("AsyncMPClient.get_output_async(self)"): "wrapped: others have their turn before each step's outputs",
    },
    (ENGINE, SAMPLING): {
        has(
            "SamplingParams", "extra_args", "n", "output_kind"
        ): "the way to the worker; number of samples; how to count tokens",
        has("SamplingParams", "seed", "logprobs"): "the differences between branches; the weights of votes",
        has("SamplingParams", "flat_logprobs", "num_logprobs"): "marks branches: no HTTP request sets it",
        has(
            "SamplingParams", "prompt_logprobs", "_bad_words_token_ids", "_all_stop_token_ids"
        ): "what the client gets; the fields whose names differ from the request's",
        has("RequestOutputKind", "DELTA"): "outputs have only new tokens, otherwise all tokens",
    },
    (ENGINE, "vllm/outputs.py"): {
        contains(
            "RequestOutput.__init__", "self.outputs = outputs", "self.finished = finished"
        ): "what `generate` yields",
        has("CompletionOutput", "index", "token_ids"): "the sample and its tokens",
        signature("RequestOutput.add(self, next_output, aggregate)"): "joins deltas",
    },
    (BRANCHES, "vllm/outputs.py"): {
        has(
            "CompletionOutput", "text", "token_ids", "cumulative_logprob", "logprobs", "finish_reason"
        ): "the current state of a branch",
        contains(
            "RequestOutput.__init__",
            "self.prompt_token_ids = prompt_token_ids",
            "self.finished = finished",
            "self.num_cached_tokens = num_cached_tokens",
            "self.num_cache_creation_tokens = num_cache_creation_tokens",
        ): "the cost of a branch",
    },
    (BRANCHES, "vllm/logprobs.py"): {has("Logprob", "logprob", "rank"): "a token's confidence"},
    (BASE, SAMPLING): {value("_SAMPLING_EPS", "1e-05"): "the temperature from which on requests are sampled"},
    (ENGINE, "vllm/v1/engine/parallel_sampling.py"): {
        signature("ParentRequest.get_child_info(self, index)"): "wrapped: tells the samples of a request apart",
        contains("ParentRequest._get_child_sampling_params", "copy(self.sampling_params)"): "they share extra_args",
    },
    (ENGINE, "vllm/v1/engine/async_llm.py"): {
        contains("AsyncLLM.add_request", "parent_request.get_child_info(idx)"): "how it is called",
    },
    # The end.
    (AUTH, "vllm/entrypoints/launchers/app.py"): {
        contains("build_app", "app.state.args = args"): "where the keys are found",
    },
    (AUTH, "vllm/entrypoints/serve/middleware/register.py"): {
        contains(
            "init_entrypoints_middleware", "args.middleware", "app.add_middleware(imported)"
        ): "our check comes last, so it is the first to see a request",
    },
    (CPU_DEFAULTS, "vllm/utils/cpu_resource_utils.py"): {
        signature("get_allowed_cpu_list()"): "the first CPU's node is the one whose memory counts",
        signature("get_memory_node_info(node_id=0)"): "what vLLM compares with what it wants",
        has("MemoryNodeInfo", "total_memory", "available_memory"): "in bytes",
    },
    (CPU_DEFAULTS, "vllm/engine/arg_utils.py"): {
        has("EngineArgs", "gpu_memory_utilization"): "its default: the user has not said how much memory to take",
    },
    (GUARDS, "vllm/platforms/__init__.py"): {has("current_platform", "is_cpu"): "what the CPU build needs guards for"},
    (GUARDS, CONFIG): {
        has("VllmConfig", "use_v2_model_runner"): "that runner survives seeds in chunks",
        has("VllmConfig.scheduler_config", "enable_chunked_prefill"): "with it, a prompt may be prefilled in chunks",
    },
    (DRAIN, "vllm/engine/protocol.py"): {
        signature("EngineClient.shutdown(self, timeout=None)"): "wrapped: the drain runs before it",
    },
    (DRAIN, "vllm/entrypoints/launchers/launcher.py"): {
        contains("serve_http", "app.state.server = server"): "uvicorn's server, whose wait for clients we bound",
        contains(
            "serve_http",
            "loop.add_signal_handler(signal.SIGTERM, signal_handler)",
            "timeout = engine_client.vllm_config.shutdown_timeout",
            "loop.run_in_executor(None, partial(engine_client.shutdown, timeout=timeout))",
            "server.should_exit = True",
        ): "on SIGTERM it runs in a thread, while the event loop continues to serve",
    },
    (HEALTH, "vllm/engine/protocol.py"): {
        signature("EngineClient.check_health(self)"): "raises if the engine is dead",
    },
    (HEALTH, "vllm/entrypoints/launchers/api_server/app_state.py"): {
        contains("init_app_state", "state.engine_client = engine_client"): "where the readiness probe finds it",
    },
    (TRACING, "vllm/v1/engine/output_processor.py"): {
        signature(
            "OutputProcessor.do_tracing(self, engine_core_output, req_state, iteration_stats)"
        ): "delayed until the stats are final",
        signature(
            "OutputProcessor.add_request(self, request, prompt, parent_req=None, request_index=0, queue=None)"
        ): "wrapped: notes which stats belong to vLLM's own id",
        contains(
            "OutputProcessor.process_outputs", "self.do_tracing(engine_core_output, req_state, iteration_stats)"
        ): "how it is called",
        contains("RequestState.__init__", "self.request_id = request_id", "self.request_index"): "the reply of a span",
    },
    (TRACING, "vllm/tracing/otel.py"): {
        contains("init_otel_tracer", "set_tracer_provider(trace_provider)"): "where our span processor is added",
    },
    (RESPONSE, ROUTES): {
        contains(path, "StreamingResponse"): "a stream is one of these, other replies are bytes"
        for path in (CHAT, COMPLETIONS, RESPONSES)
    },
    # The request models, which we know by their fields alone.
    (PROTOCOL, ROUTES): {
        has(
            f"{CHAT}.request", "vllm_xargs", "use_beam_search"
        ): "where settings go; the field that conflicts with them",
        has(f"{CHAT}.request", "n", "tools", "tool_choice"): "fields that conflict with strategies",
        has(f"{COMPLETIONS}.request", "vllm_xargs", "use_beam_search"): "the same",
        has(f"{RESPONSES}.request", "vllm_xargs"): "the same; it has no beam search",
        contains(
            f"{CHAT}.request.to_sampling_params", XARGS, "extra_args=extra_args or None"
        ): "settings arrive in extra_args",
        contains(f"{COMPLETIONS}.request.to_sampling_params", XARGS, "extra_args=extra_args or None"): "the same",
        contains(f"{RESPONSES}.request.to_sampling_params", XARGS, "extra_args=extra_args"): "the same",
        **{
            value(f"{path}.request.model_config", "ConfigDict(extra='allow')"): "assigned values are not validated"
            for path in (CHAT, COMPLETIONS, RESPONSES)
        },
    },
}


@dataclass(frozen=True)
class TouchPoint:
    """One expectation of one of our files about one of vLLM's."""

    ours: str
    file: str  # vLLM's, as a wheel names it; a folder if our code works with any module in it
    expectation: Expectation
    reason: str  # what we rely on

    def mismatch(self, sources: Sources) -> str | None:
        """Return what these sources have instead, as one line; None if they are as expected."""
        try:
            actual = self.expectation.actual(sources, self.file)
        except MissingError as missing:
            actual = str(missing)
        if actual == self.expectation.expected:
            return None
        return f"{self.file}: expected {self.expectation.expected}; found {actual} (used by {self.ours})"

    def row(self) -> str:
        """Return its line of the table in docs/vllm-surface.md."""
        return f"| `{self.ours}` | `{self.file}` | `{self.expectation.expected}` | {self.reason} |"


TOUCH_POINTS = tuple(
    TouchPoint(*files, expectation, reason)
    for files, expectations in SURFACE.items()
    for expectation, reason in expectations.items()
)


def mismatches(sources: Sources) -> list[str]:
    """Return a line for each touch point that these sources do not fit."""
    return [f"{sources.release}: {line}" for point in TOUCH_POINTS if (line := point.mismatch(sources))]
