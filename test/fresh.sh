#!/bin/sh
# Both commands of the README on a fresh machine: a new minimal Debian 12 of
# its own, with nothing of this machine but the settings that tell package
# managers where their registries are. The checkout is copied as it stands,
# what git ignores left out. Root only; all of it is gone afterwards.
#   test/fresh.sh [command ...]   instead of the two: any command
#   FRESH_DIR=    where to make the root (default /var/tmp, takes 5 GB)
# shellcheck disable=SC2016,SC2086  # formats of apt; lists that are to split
set -eu
cd "$(dirname "$0")/.."
top=$PWD
[ "$(id -u)" = 0 ] || { echo "fresh: needs root" >&2; exit 1; }

if [ "${1-}" != --inside ]; then
    root=$(mktemp -d "${FRESH_DIR:-/var/tmp}/lkjwt-fresh.XXXXXX")
    # Mounts and processes end with their namespaces; then rm meets files
    # of the new root only.
    trap 'rm -rf --one-file-system "$root"' EXIT
    trap 'exit 1' INT TERM HUP
    chmod 755 "$root"

    suite=bookworm
    mirror=$(apt-get indextargets 'Identifier: Packages' \
        --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' |
        sed -n "s/^$suite main //p" | head -n 1)
    [ -n "$mirror" ] || mirror=$(apt-get indextargets \
        'Identifier: Packages' --format '$(COMPONENT) $(REPO_URI)' |
        sed -n 's/^main //p' | head -n 1)
    echo "fresh: debootstrap --variant=minbase $suite"
    debootstrap --variant=minbase "$suite" "$root" "$mirror" \
        >"$root.log" 2>&1 || { tail -n 20 "$root.log"; exit 1; }
    rm -f "$root.log"

    echo "fresh: the machine's package settings"
    rm -f "$root"/etc/apt/sources.list
    for path in /etc/apt/sources.list /etc/apt/sources.list.d \
        /etc/apt/auth.conf /etc/apt/auth.conf.d /etc/apt/preferences.d \
        /etc/apt/trusted.gpg /etc/apt/trusted.gpg.d /etc/apt/keyrings \
        /usr/share/keyrings /usr/local/share/ca-certificates \
        /etc/ssl/certs/ca-certificates.crt /etc/pip.conf /etc/xdg/pip \
        "$HOME/.pip" "$HOME/.config/pip" /etc/resolv.conf /etc/hosts; do
        [ -e "$path" ] || continue
        to=$root$(echo "$path" | sed "s#^$HOME#/root#")
        mkdir -p "$(dirname "$to")"
        rm -rf "$to"
        cp -rL "$path" "$to"
    done
    # Of apt's options only those on how to fetch.
    grep -l -s '^ *Acquire' /etc/apt/apt.conf /etc/apt/apt.conf.d/* |
        while read -r path; do cp "$path" "$root/etc/apt/apt.conf.d/"; done
    {
        cat "$(npm config get globalconfig 2>/dev/null)" "$HOME/.npmrc" ||
            true
    } 2>/dev/null >"$root/root/.npmrc"
    if goenv=$(go env GOENV 2>/dev/null) && [ -f "$goenv" ]; then
        mkdir -p "$root/root/.config/go"
        cp "$goenv" "$root/root/.config/go/env"
    fi
    mkdir -p "$root/root/lkjwt"
    git ls-files -z --cached --others --exclude-standard |
        tar -c --null -T - --ignore-failed-read 2>/dev/null |
        tar -x -C "$root/root/lkjwt"

    status=0
    unshare --mount --pid --fork --propagation private \
        "$top/test/fresh.sh" --inside "$root" "$@" || status=$?
    exit $status
fi

# Inside: own mounts and processes; the new root becomes the root.
root=$2
shift 2
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
cd "$root"
mkdir -p .old
pivot_root . .old
cd /root/lkjwt
umount -l /.old
rmdir /.old

# Registry settings that live in the environment, and no other variable.
keep=$(env | grep -iE '^([a-z]*_proxy|PIP_[A-Z_]*|npm_config_[a-z_]*|GOPROXY|GOSUMDB|GONOSUMDB|GOPRIVATE|GOFLAGS|NODE_EXTRA_CA_CERTS)=[^ ]*$' |
    grep -v '^PIP_FIND_LINKS=/' || true)  # a folder of this machine
inside() {
    env -i $keep HOME=/root LANG=C.UTF-8 TERM=dumb \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"
}
step() {
    began=$(date +%s)
    echo "fresh: $*"
    status=0
    inside sh -c "$*" </dev/null || status=$?
    echo "fresh: $(($(date +%s) - began)) s, exit status $status: $*"
    return $status
}

# The README's line that comes before its two commands.
first=$(sed -n 's/^\(sudo \)\{0,1\}\(apt-get .*\)$/\2/p' README.md |
    head -n 1 | sed 's/sudo //g')
step "${first:-apt-get update && apt-get install -y make}" >/dev/null
if [ $# -gt 0 ]; then
    step "$*"
else
    step "make demo"
    step "make test"
fi
