"""The entry point that vLLM calls in every process (group `vllm.general_plugins`)."""

from __future__ import annotations


def register() -> None:
    """Teach this process's vLLM the KIVI cache dtypes.

    vLLM calls it before it parses arguments, in `LLM()`, in the engine core and
    in every worker; a second call changes nothing. With a vLLM version that is
    not supported it warns and leaves vLLM as it is, so that everything else
    goes on working; `--kv-cache-dtype kivi_k3v2` is then refused by vLLM itself.
    """
    from vllm.logger import init_logger

    from kivi_vllm.attention import hooks, versions
    from kivi_vllm.attention.hooks import wraps

    ok, found = versions.supported_vllm()
    if not ok:
        init_logger("vllm.kivi_vllm").warning(
            "kivi_vllm is not registered: found %s. Install a supported version of "
            "either, or pip uninstall kivi-vllm.",
            found,
        )
        return
    hooks.of_this_version().register_dtypes()
    wraps.register_backend_name()
    wraps.register_cache_specs()
    wraps.select_backend_by_dtype()
    wraps.attach_residual_to_layers()
    wraps.keep_batches_of_chunked_layers()
    wraps.show_requests_to_managers()
    wraps.plan_cache_groups()
    wraps.keep_images_whole()
    wraps.publish_counts()
    wraps.check_engine_config()
