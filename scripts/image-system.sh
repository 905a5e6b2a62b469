#!/bin/sh
# image-system.sh [PACKAGE...]: Debian packages, and the user that the server runs as with the folders that it may write
# to. A step of the Dockerfile; needs root.
set -eu
if [ $# -gt 0 ]; then
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends "$@" >/dev/null
    rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log
fi
# Numbers that Kubernetes can check without reading the image's files, and above those that systems give their users.
groupadd --gid 10001 em
useradd --uid 10001 --gid em --home-dir /home/em --no-create-home --shell /usr/sbin/nologin --no-log-init em
install --directory --owner em --group em /home/em /models
