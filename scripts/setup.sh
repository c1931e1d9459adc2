# Sourced by scripts/test, demo and lint: brings a bare Debian or Ubuntu machine to where the project builds and runs.
# System packages come with apt (sudo where needed) when missing; everything else goes into .venv. Safe to run again.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

missing_packages() {
  command -v g++ >/dev/null || echo g++
  command -v make >/dev/null || echo make
  command -v redis-server >/dev/null || echo redis-server
  [ -e /usr/include/doctest/doctest.h ] || echo doctest-dev
  command -v python3 >/dev/null || echo python3
  python3 -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
  python3 -c 'import os, sysconfig; assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))' \
    2>/dev/null || echo python3-dev
}

packages=$(missing_packages | tr '\n' ' ')
if [ -n "$packages" ]; then
  echo "installing system packages: $packages"
  sudo=$([ "$(id -u)" = 0 ] || echo sudo)
  $sudo apt-get update -qq
  # The redis-server package starts a service, which nobody asked for: an answer of 101 forbids it.
  policy=/usr/sbin/policy-rc.d
  if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' | $sudo tee $policy >/dev/null
    $sudo chmod 755 $policy
    trap '$sudo rm -f $policy' EXIT
  fi
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null
  if [ -n "$(trap -p EXIT)" ]; then
    $sudo rm -f $policy
    trap - EXIT
  fi
fi

if [ ! -x .venv/bin/python ]; then
  python3 -m venv .venv
fi
. .venv/bin/activate
# Editable: the Python files are used in place; the extension is built again only when what it is made of has changed.
made_of=$(find pyproject.toml CMakeLists.txt csrc -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum)
if [ "$(cat .venv/made-of 2>/dev/null)" != "$made_of" ]; then
  python -m pip install -q --disable-pip-version-check -e '.[dev]'
  echo "$made_of" > .venv/made-of
fi
