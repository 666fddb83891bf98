#!/bin/sh
# Renders deploy/kubernetes from the chart, and copies the alert rules into
# it: deploy/render.sh [FOLDER]. HELM= names another helm than the pinned one.
set -eu
cd "$(dirname "$0")/.."
out=${1:-deploy/kubernetes}
helm=${HELM:-.deps/bin/helm}
[ -x "$helm" ] || helm=helm
rules=deploy/alerts/lkjwt.rules.yaml
[ -n "${1:-}" ] || cp "$rules" deploy/helm/files/lkjwt.rules.yaml
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

template() {
    "$helm" template lkjwt deploy/helm --namespace matrix-rtc \
        --values deploy/kubernetes/values.yaml "$@"
}
# One file, and what makes it differ from the defaults.
one() {
    file=$1
    shift
    template --show-only "templates/$file.yaml" "$@"
}

template --kube-version 1.21 --output-dir "$tmp" >/dev/null
one podmonitor --set podMonitor.enabled=true >"$tmp/podmonitor.yaml"
one prometheusrule --set prometheusRule.enabled=true \
    >"$tmp/prometheusrule.yaml"
one externalsecret --set secret.external.enabled=true \
    --set secret.external.store.name=store >"$tmp/externalsecret.yaml"
one poddisruptionbudget --kube-version 1.19 \
    >"$tmp/poddisruptionbudget-v1beta1.yaml"
mv "$tmp"/lkjwt/templates/*.yaml "$tmp"
# What kustomize makes the ConfigMap and the Secret of.
sed -n 's/^  \([A-Z_]*\): "*\([^"]*\)"*$/\1=\2/p' "$tmp/configmap.yaml" \
    >"$tmp/lkjwt.env"
sed -n 's/^  keys: "\(.*\)"$/\1/p' "$tmp/secret.yaml" >"$tmp/keys"
mkdir -p "$out"
cp "$tmp"/*.yaml "$tmp/lkjwt.env" "$tmp/keys" "$out"
