#!/usr/bin/env bash
# What tests/cluster needs of Debian: Slurm, munge, ssh, pdsh, iproute2. Nothing is started. Run as root.
# usage: bash tests/cluster/setup.sh
set -euo pipefail
packages=(slurmctld slurmd slurm-client munge openssh-server openssh-client pdsh iproute2)
if dpkg-query -W -f '${db:Status-Status}\n' "${packages[@]}" 2>/dev/null | sort -u | grep -qx installed &&
    [ "$(dpkg-query -W -f '${db:Status-Status}\n' "${packages[@]}" 2>/dev/null | grep -cx installed)" = "${#packages[@]}" ]; then
    exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "error: the cluster tests need root on Debian or Ubuntu, to install: ${packages[*]}" >&2
    exit 2
fi
export DEBIAN_FRONTEND=noninteractive
# The packages would start their services; the tests start their own, in namespaces.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get -o DPkg::Lock::Timeout=300 update -qq
apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
