#!/bin/sh
# image-system.sh [PACKAGE...]: install Debian packages, and create the server's user and the folders that it may write to. A
# step of the Dockerfile; needs root.
set -eu
if [ $# -gt 0 ]; then
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends "$@" >/dev/null
    rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log
fi
# Numeric ids, because Kubernetes checks `runAsNonRoot` without reading the image's /etc/passwd; above the ids of usual users.
groupadd --gid 10001 em
useradd --uid 10001 --gid em --home-dir /home/em --no-create-home --shell /usr/sbin/nologin --no-log-init em
install --directory --owner em --group em /home/em /models
