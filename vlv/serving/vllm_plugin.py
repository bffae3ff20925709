"""
Makes VLV known to vLLM, which calls [`register`] in each of its processes (entry point `vllm.general_plugins`).
Nothing here imports vLLM before that, so that the entry point does nothing where vLLM is not installed.
"""

ARCHITECTURES = ("VLVForConditionalGeneration", "VLVModel")  # what checkpoints call themselves


def register() -> None:
    """Registers model, config and processor, which has the chat template. May be called more than once."""
    from transformers import AutoConfig, AutoProcessor
    from vllm import ModelRegistry

    from configuration_vlv import VLVConfig
    from processing_vlv import VLVProcessor

    if not set(ARCHITECTURES) & set(ModelRegistry.get_supported_archs()):
        for architecture in ARCHITECTURES:  # by name: the module is imported only where the model is built
            ModelRegistry.register_model(architecture, "vlv.serving.vllm_model:VLVForVllm")
    AutoConfig.register(VLVConfig.model_type, VLVConfig, exist_ok=True)
    AutoProcessor.register(VLVConfig, VLVProcessor, exist_ok=True)
