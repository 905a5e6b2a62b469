"""The plugin that vLLM loads as a logits processor, in the worker of either model runner."""
