#!/usr/bin/env bash
# Lints what is in deploy/ by the tools that are here, and says which are not: kubectl, hadolint, nginx, systemd-analyze, shellcheck, promtool.
set -uo pipefail
cd "$(dirname "$0")" || exit 2
failed=0

lint () {
  local tool=$1
  shift
  if ! command -v "$tool" > /dev/null; then echo "-- $tool is not here"; return; fi
  if output=$("$@" 2>&1); then echo "ok $*"; else echo "not ok $*"; echo "$output"; failed=1; fi
}

temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT
lint kubectl kubectl kustomize kubernetes
lint kubectl kubectl kustomize kubernetes-discovery
lint hadolint hadolint Dockerfile
lint nginx nginx -t -e stderr -p "$temp" -g "pid $temp/nginx.pid;" -c "$PWD/nginx.conf"
lint systemd-analyze systemd-analyze verify --man=no fastify-epd.service
lint shellcheck shellcheck lint.sh
lint promtool promtool check rules alerts.yml
exit "$failed"
