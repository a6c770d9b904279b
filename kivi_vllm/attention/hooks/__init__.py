"""All that reaches into vLLM; what differs between its versions is a file for each."""

from types import ModuleType


def of_this_version() -> ModuleType:
    """`v032` or `v033`, by what the vLLM that is imported here has."""
    import vllm.config.cache as cache_config

    if hasattr(cache_config, "register_kv_cache_dtype"):
        from kivi_vllm.attention.hooks import v033

        return v033
    from kivi_vllm.attention.hooks import v032

    return v032
