"""The parts of the plug-in for SGLang: see `rdmaload.integrations.sglang`."""
