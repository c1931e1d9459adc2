"""save-sharded: let an engine cut a checkpoint for its ranks, and save what each of them holds."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from rdmaload.amounts import count_text, size_text
from rdmaload.cli.arguments import ENVIRONMENT, Commands, add_command, options_of, whole_number
from rdmaload.cli.exits import UsageError
from rdmaload.cli.output import write_result
from rdmaload.cli.transfer import import_torch

__all__ = ["register"]

_VARIABLES = (
    f"{ENVIRONMENT} The engine reads its own variables; RDMALOAD_CACHE_DIR (else XDG_CACHE_HOME) is where the "
    "configuration of a model that is given by its url is kept."
)


def register(commands: Commands) -> None:
    """Add the command of this module."""
    command = add_command(
        commands,
        "save-sharded",
        _save_sharded,
        help="save what each rank of an engine holds of a model",
        description="Start the workers of an engine for a checkpoint, let each save its part of the weights, and end "
        "them: a start of that engine from the saved model then reads every byte once. It suits the engine's version, "
        "parallel sizes, quantisation and dtype that it was saved with, which the model records and a load compares. "
        "It needs the engine in this environment, and the devices that the engine needs.",
        prints="The ranks, files and bytes that are published; with --json url, world_size, files, bytes, generation, "
        "layout and identity.",
        environment=_VARIABLES,
        exits={7: "the weights cannot be saved per rank, or the source was sharded for another set-up"},
        examples=[
            "rdmaload save-sharded --engine vllm --model ./llama --url redis://h/l4 -tp 4",
            "rdmaload save-sharded --model redis://h/llama --url redis://h/llama_tp2 -tp 2",
            "rdmaload save-sharded --model ./m --url redis://h/m --engine-arg dtype=half",
            "rdmaload save-sharded --engine sglang --model ./llama --url redis://h/l2 -tp 2",
        ],
    )
    command.add_argument("--engine", choices=("vllm", "sglang"), default="vllm", help="which engine (vllm)")
    command.add_argument("--model", metavar="MODEL", required=True, help="a checkpoint's directory, or its url")
    command.add_argument("--url", metavar="URL", required=True, help="where to save it: a model in Redis or Valkey")
    command.add_argument(
        "-tp", "--tensor-parallel-size", type=whole_number, metavar="N", default=1, help="tensor parallel ranks (1)"
    )
    command.add_argument(
        "-pp", "--pipeline-parallel-size", type=whole_number, metavar="N", default=1, help="pipeline stages (1)"
    )
    command.add_argument(
        "--layout",
        choices=("rdmaload", "sglang"),
        default="rdmaload",
        help="sglang: values that SGLang's own Redis connector loads, without checksums and identity",
    )
    command.add_argument("--save-id", metavar="ID", help="a name for this save, which no other has")
    command.add_argument(
        "--engine-arg",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="an argument of the engine under its Python name, the value in JSON or text; may be repeated",
    )


def _save_sharded(args: argparse.Namespace) -> int:
    import rdmaload
    from rdmaload.urls import parse_url

    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
    if args.layout == "sglang" and args.save_id is not None:
        raise UsageError("--layout sglang resumes nothing: leave out --save-id")
    target = parse_url(args.url)
    if "://" not in args.model and not Path(args.model).is_dir():
        raise UsageError(f"--model {args.model} is neither a directory nor a url")
    opts = options_of(args)
    import_torch()
    with _stdout_to_stderr():
        _run_engine(args, _engine_arguments(args.engine_arg), opts)
    with rdmaload.open(args.url) as model:
        manifest = model.manifest
        document: dict[str, object] = {
            "url": model.url,
            "world_size": model.world_size,
            "files": len(model.files),
            "bytes": sum(file.size for file in model.files),
            "generation": model.generation,
            "layout": {} if manifest is None else dict(manifest.layout),
            "identity": {} if manifest is None else dict(manifest.identity),
        }
    size = size_text(sum(file.size for file in model.files))
    ranks = count_text(model.world_size, "rank")
    lines = [f"saved {count_text(len(model.files), 'file')} of {ranks}, {size}, to {target.redacted}"]
    if manifest is not None:
        lines += [f"  {name:<14} {value}" for name, value in {**manifest.layout, **manifest.identity}.items()]
    write_result(args.json, document, lines)
    return 0


def _run_engine(args: argparse.Namespace, engine_args: dict[str, object], opts: dict[str, object]) -> None:
    if args.engine == "sglang":
        from rdmaload.integrations.sglang_plugin import sharding as of_sglang

        if args.pipeline_parallel_size > 1:
            raise UsageError("--engine sglang saves the ranks of one pipeline stage: leave out -pp")
        of_sglang.save_sharded(
            args.model,
            args.url,
            tensor_parallel_size=args.tensor_parallel_size,
            layout=args.layout,
            save_id=args.save_id,
            engine_args=engine_args,
            loader_options=opts,
        )
        return
    from rdmaload.integrations.vllm.sharding import save_sharded

    save_sharded(
        args.model,
        args.url,
        tensor_parallel_size=args.tensor_parallel_size,
        pipeline_parallel_size=args.pipeline_parallel_size,
        layout=args.layout,
        save_id=args.save_id,
        engine_args=engine_args,
        loader_options=opts,
    )


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Engines and their workers log to stdout, which is for the result."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _engine_arguments(texts: list[str]) -> dict[str, object]:
    given: dict[str, object] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise UsageError(f"--engine-arg {text!r} is not NAME=VALUE")
        if name in ("model", "model_path", "load_format", "model_loader_extra_config"):
            raise UsageError(f"--engine-arg {name} is what save-sharded sets itself")
        if name in given:
            raise UsageError(f"--engine-arg {name} is given twice")
        try:
            given[name] = json.loads(value)
        except ValueError:
            given[name] = value
    return given
