#!/usr/bin/env bash
# Makes a Debian with Python fit for a Ray node: the programs it needs, and the user it runs as.
#   cluster/image/system.sh
set -euo pipefail

# openssh-client, rsync: by them `ray up` reaches workers from the head and copies files into containers.
# wget: asks a node for its health, in HEALTHCHECK as in KubeRay's probes.
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends ca-certificates openssh-client rsync wget >/dev/null
rm -rf /var/lib/apt/lists/*

useradd --create-home --uid 1000 --user-group --shell /bin/bash carclass
# `ray up` uses login shells, and /etc/profile sets PATH anew.
printf 'export PATH=/opt/carclass/bin:$PATH\n' >/etc/profile.d/carclass.sh
