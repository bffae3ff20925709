"""The model as an OpenAI-compatible endpoint: `vlv serve`, and the plugin for vLLM."""
