"""Runs vLLM in a process of its own, through a list of actions, and prints what each gave as one line of JSON.

    python vllm_driver.py '[["start", {"model": "..."}], ["generate"], ["reload", "redis://..."], ["stop"]]'

start     an LLM with these arguments, beside those that make one small and its answers repeatable
generate  the tokens of the greedy answers to fixed prompts
reload    other weights into the running engine, by its own reload_weights
save      the weights of one rank, by save_sharded in this process
refused   start, which must fail; the type of the error and its text
sent_bytes   what a Redis has sent to anybody so far
left_behind  the processes that an engine has left, and the descriptors of shared memory in this one
stop      the engine's end
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
from pathlib import Path

PROMPTS = ["hello world", "the quick brown", "0123", "lazy dog jumps over"]

SMALL = {
    "dtype": "bfloat16",
    "max_model_len": 128,
    "enforce_eager": True,
    "max_num_seqs": 4,
    "gpu_memory_utilization": 0.3,
}


def left_behind():
    """Waits a while for processes that are ending."""
    deadline = time.monotonic() + 30
    while True:
        left = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                command = Path(f"/proc/{entry}/cmdline").read_bytes().decode()  # of one that has ended it is empty
                if os.getsid(int(entry)) == os.getsid(0) and int(entry) != os.getpid() and command:
                    left.append(command)
        left = [command for command in left if "resource_tracker" not in command]  # Python's, as long as this process
        for descriptor in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # that of the listing itself
                left += [link for link in [os.readlink(f"/proc/self/fd/{descriptor}")] if "memfd:rdmaload" in link]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def run(actions):
    import redis
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = None
    for action, *arguments in actions:
        answer = None
        if action in ("start", "refused"):
            keywords = {**SMALL, **arguments[0]}
            if keywords.get("tensor_parallel_size", 1) == 1:
                keywords.setdefault("distributed_executor_backend", "uni")
            try:
                llm = LLM(**keywords)
                answer = {
                    "model": llm.llm_engine.model_config.model,
                    "served": llm.llm_engine.model_config.served_model_name,
                    "load_format": str(llm.llm_engine.vllm_config.load_config.load_format),
                }
            except Exception as error:
                if action == "start":
                    raise
                answer = [type(error).__name__, str(error)]
        elif action == "generate":
            outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
            answer = [list(output.outputs[0].token_ids) for output in outputs]
        elif action == "reload":
            llm.collective_rpc("reload_weights", kwargs={"weights_path": arguments[0]})
            llm.reset_prefix_cache()
        elif action == "save":
            from rdmaload.integrations.vllm.sharding import save_sharded

            small = {name: SMALL[name] for name in ("dtype", "max_model_len")}
            save_sharded(**arguments[0], engine_args={**small, "distributed_executor_backend": "uni"})
            gc.collect()
            cleanup_dist_env_and_memory()
        elif action == "sent_bytes":
            with redis.Redis.from_url(arguments[0]) as client:
                answer = client.info("stats")["total_net_output_bytes"]
        elif action == "left_behind":
            gc.collect()
            answer = left_behind()
        elif action == "stop":
            del llm
            llm = None
            gc.collect()
            cleanup_dist_env_and_memory()
        else:
            raise ValueError(action)
        print("ANSWER " + json.dumps([action, answer]), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run(json.loads(sys.argv[1]))
