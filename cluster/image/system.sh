#!/usr/bin/env bash
# Prepares a Debian with Python for a Ray node: programs, user, no installers of Python packages.
#   cluster/image/system.sh
set -euo pipefail

# openssh-client, rsync: with them `ray up` reaches workers from the head and copies files into containers.
# wget: queries a node's health, in HEALTHCHECK and in KubeRay's probes.
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends ca-certificates openssh-client rsync wget >/dev/null
rm -rf /var/lib/apt/lists/*

useradd --create-home --uid 1000 --user-group --shell /bin/bash carclass
# `ray up` uses login shells, in which /etc/profile resets PATH.
printf 'export PATH=/opt/carclass/bin:$PATH\n' >/etc/profile.d/carclass.sh

"$(dirname "$0")/remove_installers.sh"
