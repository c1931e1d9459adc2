"""What other programs load models through: inference engines find theirs by entry points, the rest is imported.

    rdmaload.integrations.vllm            entry point `vllm.general_plugins`
    rdmaload.integrations.sglang          entry point `sglang.srt.plugins`
    rdmaload.integrations.transformers    from_pretrained, materialize, load_adapter

None of them is imported by rdmaload itself, and none imports its engine before the engine has been started.
"""
