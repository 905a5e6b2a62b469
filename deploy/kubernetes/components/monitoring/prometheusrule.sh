#!/bin/sh
# Write prometheusrule.yaml: deploy/monitoring/rules.yaml, a plain Prometheus rule file, wrapped in the object that the
# Prometheus Operator reads. kustomize cannot do that. Run this after every change of the rules; a test compares the two files.
set -eu
cd "$(dirname "$0")"
{
    cat <<'HEAD'
# Made by prometheusrule.sh; do not edit.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: em-inf-server
  labels:
    app.kubernetes.io/name: em-inf-server
spec:
HEAD
    sed '/^---$/d; s/^\(.\)/  \1/' ../../../monitoring/rules.yaml
} >prometheusrule.yaml
