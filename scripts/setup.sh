# Sourced by scripts/test, demo and lint: brings a bare Debian or Ubuntu machine to where the project builds and runs.
# System packages come with apt (sudo where needed) when missing; everything else goes into .venv. Safe to run again.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

missing_packages() {
  command -v g++ >/dev/null || echo g++
  command -v make >/dev/null || echo make
  [ -n "${without_redis:-}" ] || command -v redis-server >/dev/null || echo redis-server
  [ -e /usr/include/doctest/doctest.h ] || echo doctest-dev
  [ -e /usr/include/openssl/ssl.h ] || echo libssl-dev
  # The build needs neither: the tests compare our declarations of these libraries with them.
  [ -e /usr/include/infiniband/verbs.h ] || echo libibverbs-dev
  [ -e /usr/include/rdma/rdma_cma.h ] || echo librdmacm-dev
  # For the guest of tests/rdma, which sees this file system.
  [ -e /etc/libibverbs.d/rxe.driver ] || echo ibverbs-providers
  [ -e /sbin/ip ] || echo iproute2
  command -v python3 >/dev/null || echo python3
  python3 -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
  python3 -c 'import os, sysconfig; assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))' \
    2>/dev/null || echo python3-dev
}

sudo=$([ "$(id -u)" = 0 ] || echo sudo)

install_packages() {
  echo "installing system packages: $*"
  $sudo apt-get update -qq || return 1
  # The server packages start services, which nobody asked for: an answer of 101 forbids it.
  local policy=/usr/sbin/policy-rc.d ours='' failed=0
  if [ ! -e $policy ]; then
    ours=1
    printf '#!/bin/sh\nexit 101\n' | $sudo tee $policy >/dev/null
    $sudo chmod 755 $policy
    trap "$sudo rm -f $policy" EXIT
  fi
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null || failed=1
  if [ -n "$ours" ]; then
    $sudo rm -f $policy
    trap - EXIT
  fi
  return $failed
}

packages=$(missing_packages | tr '\n' ' ')
if [ -n "$packages" ]; then
  install_packages $packages
fi

if [ ! -x .venv/bin/python ]; then
  python3 -m venv .venv
fi
. .venv/bin/activate

# The tests (which set want_valkey) also run against Valkey where there is one; asked for once. Debian 12 has it in its
# backports, from which apt takes nothing else unasked (priority 100).
install_valkey() {
  local sources=/etc/apt/sources.list.d/bookworm-backports.list
  if [ "$(. /etc/os-release && echo "${ID:-}-${VERSION_CODENAME:-}")" = debian-bookworm ] &&
    ! grep -rqs bookworm-backports /etc/apt/sources.list /etc/apt/sources.list.d; then
    local mirror
    mirror=$(grep -rhsoE 'https?://[^ ]+/debian/?( |$)' /etc/apt/sources.list /etc/apt/sources.list.d | head -1 | tr -d ' ')
    [ -n "$mirror" ] || return 1
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror bookworm-backports main" |
      $sudo tee $sources >/dev/null
  fi
  install_packages valkey-server
}
if [ -n "${want_valkey:-}" ] && ! command -v valkey-server >/dev/null && [ ! -e .venv/no-valkey ]; then
  install_valkey || {
    echo "valkey-server cannot be installed here: the tests against it will be skipped" >&2
    touch .venv/no-valkey
  }
fi

# The same for a real web server.
if [ -n "${want_nginx:-}" ] && ! [ -x /usr/sbin/nginx ] && ! command -v nginx >/dev/null && [ ! -e .venv/no-nginx ]; then
  install_packages nginx-light || {
    echo "nginx-light cannot be installed here: the tests against it will be skipped" >&2
    touch .venv/no-nginx
  }
fi

# Editable: the Python files are used in place; the extension is built again only when what it is made of has changed.
made_of=$(find pyproject.toml CMakeLists.txt csrc -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum)
if [ "$(cat .venv/made-of 2>/dev/null)" != "$made_of" ]; then
  python -m pip install -q --disable-pip-version-check -e '.[dev]'
  echo "$made_of" > .venv/made-of
fi
