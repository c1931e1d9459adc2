"""Runs SGLang's engine in a process of its own, through a list of actions, and prints what each gave as JSON.

    python sglang_engine_driver.py '[["start", {"model_path": "..."}], ["generate"], ["update", "redis://..."]]'

start     an Engine with these arguments, beside those that make one small, for a CPU, and its answers repeatable
generate  the tokens of the greedy answers to fixed prompts
update    other weights into the running engine, by its own update_weights_from_disk; what it says
rpc       a method of all ranks' schedulers, with keyword arguments
refused   start, which must fail; the type of the error and its text
stop      the engine's end
"""

from __future__ import annotations

import json
import sys
import time

PROMPTS = ["hello world", "the quick brown", "0123", "lazy dog jumps over"]

SMALL = {
    "device": "cpu",
    "disable_cuda_graph": True,
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "max_total_tokens": 1024,
    "max_running_requests": 4,
    "mem_fraction_static": 0.3,
    "disable_overlap_schedule": True,
    "dtype": "bfloat16",
    "skip_server_warmup": True,
    "random_seed": 1,
    "log_level": "info",
}


def run(actions):
    from sglang import Engine

    engine = None
    for action, *arguments in actions:
        answer = None
        began = time.monotonic()
        if action in ("start", "refused"):
            try:
                engine = Engine(**{**SMALL, **arguments[0]})
                info = engine.get_server_info()
                answer = {name: info[name] for name in ("model_path", "load_format", "served_model_name")}
            except Exception as error:
                if action == "start":
                    raise
                answer = [type(error).__name__, str(error)]
        elif action == "generate":
            outputs = engine.generate(PROMPTS, {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True})
            answer = [output["output_ids"] for output in outputs]
        elif action == "update":
            answer = engine.update_weights_from_disk(*arguments)[:2]
        elif action == "rpc":
            engine.collective_rpc(arguments[0], **arguments[1])
        elif action == "stop":
            engine.shutdown()
            engine = None
        else:
            raise ValueError(action)
        print(f"{action}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
        print("ANSWER " + json.dumps([action, answer]), flush=True)
    if engine is not None:
        engine.shutdown()


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
