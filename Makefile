# GNU make. `make` alone leaves the static binary at ./lkjwt and never uses
# the network; `make help` lists the rest.
#
#   CC=       a compiler for musl (default musl-gcc)
#   HOSTCC=   the machine's own, for the unit tests
#   STAGE1=   what packs the trust anchors when CC is a cross compiler: host
#             (built by HOSTCC), or an lkjwt that runs here. AR= and STRIP=
#             must then know the target:
#             make CC='zig cc -target arm-linux-musleabihf' STAGE1=host \
#                 AR=llvm-ar STRIP=llvm-strip
#   BEARSSL=  folder of BearSSL 0.6's source; else the tarball that
#             test/setup.sh left; else the library of libbearssl-dev
#   CA_FILES= PEM files for the built-in trust anchors

ifeq ($(origin CC),default)
CC = musl-gcc
endif
HOSTCC ?= gcc
STRIP  ?= strip
SRC    ?= lkjwt.c
MAKEFLAGS += --no-builtin-rules
SHELL = /bin/sh
export LC_ALL = C

TARBALL     = .deps/bearssl_0.6+dfsg.1.orig.tar.xz
TARBALL_SHA = 102a625bd8f6155260867a50c508df8d8c3f796985dd744df1a68e5cd1a79004

# Mozilla's set as Debian keeps it, never the machine's bundle where the two
# can differ: that one may hold an authority of the machine's own.
MOZILLA  = /usr/share/ca-certificates/mozilla
CA_FILES ?= $(if $(wildcard $(MOZILLA)),$(MOZILLA)/*.crt,$(firstword \
	$(wildcard /etc/ssl/certs/ca-certificates.crt \
	/etc/pki/tls/certs/ca-bundle.crt /etc/ssl/cert.pem)))

# ---- flags ----------------------------------------------------------------

MAP   = -ffile-prefix-map=$(CURDIR)/= -ffile-prefix-map=$(CURDIR)=.
WARN  = -std=c11 -Wall -Wextra -Werror -Wshadow -Wconversion \
	-Wsign-conversion -Wcast-align -Wswitch-enum -Wvla -Wundef -Wcast-qual \
	-Wwrite-strings -Wpointer-arith -Wstrict-prototypes -Wdate-time \
	-Wmissing-prototypes -Wold-style-definition -Wnull-dereference \
	-Wformat=2 -Wimplicit-fallthrough -Wframe-larger-than=20480
# Nothing here unwinds a stack: its tables would be 33 KB of the binary.
OPT   = -O2 -g $(PIC) -ffunction-sections -fdata-sections \
	-fno-strict-overflow -fno-delete-null-pointer-checks \
	-fno-asynchronous-unwind-tables
HARD  = -fstack-protector-strong -fstack-clash-protection
LINK  = -static -Wl,--gc-sections -Wl,-z,noexecstack -Wl,-z,relro \
	-Wl,-z,now -Wl,-z,separate-code -Wl,--build-id=none
# A static PIE, so that code addresses are random too. musl-gcc's own
# -static-pie asks for a loader (INTERP): the start files are named instead.
# Zig brings musl for each target and makes a static PIE when asked.
ZIG = $(filter zig,$(notdir $(firstword $(CC))))
CRT = $(if $(filter musl-gcc,$(notdir $(firstword $(CC)))),$(patsubst \
	%/rcrt1.o,%,$(firstword $(wildcard /usr/lib/*-linux-musl/rcrt1.o \
	/usr/local/musl/lib/rcrt1.o))))
ifneq ($(ZIG),)
PIC    = -fPIE
LINKED = $(filter-out %separate-code,$(LINK)) -pie
HARD  += -Wno-unused-command-line-argument
else ifeq ($(CRT),)
PIC    = -fno-pie
LINKED = $(LINK)
else
PIC    = -fPIE
LINKED = $(LINK) -nostartfiles -Wl,-pie -Wl,--no-dynamic-linker -Wl,-z,text \
	$(CRT)/rcrt1.o $(CRT)/crti.o
CRTN   = $(CRT)/crtn.o
endif
# BearSSL finds time and randomness in what lkjwt hands it, or fails: it opens
# no device and reads no clock.
BOPT  = -DBR_USE_URANDOM=0 -DBR_USE_UNIX_TIME=0 -w

# ---- BearSSL --------------------------------------------------------------

ifdef BEARSSL
BSRC = $(abspath $(BEARSSL))
BDEP =
MAP += -ffile-prefix-map=$(BSRC)=bearssl
else ifneq ($(wildcard $(TARBALL)),)
BSRC = $(CURDIR)/build/bearssl
BDEP = build/bearssl/.unpacked
else
BDEB = $(firstword $(wildcard /usr/lib/*/libbearssl.a))
endif

ifdef BSRC
BINC = $(BSRC)/inc
else
BINC = build/inc
endif

.PHONY: all
all: lkjwt
	@:

ifdef BSRC
build/bearssl/.unpacked: $(TARBALL)
	@echo "$(TARBALL_SHA)  $<" | sha256sum -c --quiet
	@rm -rf build/bearssl && mkdir -p build/bearssl
	@tar -xJf $< -C build/bearssl --strip-components=1 bearssl-0.6/src \
	    bearssl-0.6/inc bearssl-0.6/LICENSE.txt
	@touch $@

# One archive for each compiler; the linker takes what is used. Two files are
# worth 4 KB more where gcc would save: P-256 is a fifth faster (a handshake is
# four of its products), P-384 a fifteenth, which copies points byte by byte.
FAST = -fpeel-loops -ftree-vectorize -fvect-cost-model=dynamic
define bearssl_build
	@echo "  BEARSSL $@"
	@rm -rf $(@D)/obj && mkdir -p $(@D)/obj
	@cd $(@D)/obj && find $(BSRC)/src -name '*.c' | sort | xargs -n 40 \
	    -P 2 $(1) $(MAP) $(BOPT) -I$(BSRC)/src -I$(BSRC)/inc -c
	$(if $(findstring gcc,$(firstword $(1))),@cd $(@D)/obj && $(1) $(FAST) \
	    $(MAP) $(BOPT) -I$(BSRC)/src -I$(BSRC)/inc -c \
	    $(BSRC)/src/ec/ec_p256_m31.c $(BSRC)/src/codec/ccopy.c)
	@rm -f $@ && cd $(@D)/obj && $(2) rcsD $(abspath $@) *.o
endef
build/release/libbearssl.a: $(BDEP) Makefile
	$(call bearssl_build,$(CC) $(OPT) $(HARD),$(AR))
build/host/libbearssl.a: $(BDEP) Makefile
	$(call bearssl_build,$(HOSTCC) -O2 -g -ffunction-sections,ar)
build/inc.ok: $(BDEP)
	@mkdir -p build && touch $@
else ifneq ($(BDEB),)
# Debian's build is fortified for glibc: these are the names it expects.
define SHIMS
#include <stddef.h>
#include <string.h>
void *__memcpy_chk(void *d, const void *s, size_t n, size_t cap);
void *__memcpy_chk(void *d, const void *s, size_t n, size_t cap)
{ if (n > cap) __builtin_trap(); return memcpy(d, s, n); }
void *__memmove_chk(void *d, const void *s, size_t n, size_t cap);
void *__memmove_chk(void *d, const void *s, size_t n, size_t cap)
{ if (n > cap) __builtin_trap(); return memmove(d, s, n); }
void *__memset_chk(void *d, int c, size_t n, size_t cap);
void *__memset_chk(void *d, int c, size_t n, size_t cap)
{ if (n > cap) __builtin_trap(); return memset(d, c, n); }
endef
export SHIMS
build/inc.ok:
	@mkdir -p build/inc
	@cp /usr/include/bearssl/bearssl*.h build/inc/
	@touch $@
build/release/libbearssl.a: $(BDEB) Makefile
	@mkdir -p $(@D)/obj
	@printf '%s\n' "$$SHIMS" >$(@D)/obj/shims.c
	@cp $(BDEB) $@
	@$(CC) $(OPT) -fno-builtin -w -c $(@D)/obj/shims.c -o $(@D)/obj/shims.o
	@ar rD $@ $(@D)/obj/shims.o
build/host/libbearssl.a: $(BDEB) Makefile
	@mkdir -p $(@D) && cp $(BDEB) $@
else
build/inc.ok build/release/libbearssl.a build/host/libbearssl.a:
	@echo "No BearSSL 0.6. Run 'test/setup.sh build', or give its source:" \
	    "make BEARSSL=folder" >&2
	@exit 1
endif

# ---- the binary, in two stages --------------------------------------------

# Stage 1 has no trust anchors built in; it packs them for the real one.
ifeq ($(STAGE1),host)
S1_LIB = build/host/libbearssl.a
S1_CC  = $(HOSTCC) -O1 $(WARN)
else
S1_LIB = build/release/libbearssl.a
S1_CC  = $(CC) $(OPT) $(HARD) $(WARN) $(LINKED)
S1_END = $(CRTN)
endif
PACKER = $(if $(filter-out host,$(STAGE1)),$(abspath $(STAGE1)),$\
	build/stage1/lkjwt)
# Loops that are not aligned cost nothing here, and save 10 KB.
PACKED  = $(if $(filter %gcc,$(firstword $(CC))),-fno-align-jumps \
	-fno-align-loops)
COMPILE = $(CC) $(OPT) $(PACKED) $(HARD) $(WARN) $(MAP) -isystem $(BINC)

build/stage1/lkjwt: $(SRC) $(S1_LIB) build/inc.ok Makefile
	@echo "  STAGE1  $@"
	@mkdir -p $(@D) && : >$(@D)/ca.bin
	@$(S1_CC) $(MAP) -isystem $(BINC) -Wa,-I$(@D) $< $(S1_LIB) \
	    $(S1_END) -o $@
build/ca.bin: $(PACKER)
	@echo "  CA      $@"
	@test -n "$(strip $(CA_FILES))" || { echo "No CA certificates to" \
	    "build in. Run 'test/setup.sh build' or give CA_FILES=" >&2; exit 1; }
	@mkdir -p $(@D)
	@cat $(CA_FILES) | $< --ca-pack >$@.tmp && mv $@.tmp $@
build/lkjwt.o: $(SRC) build/ca.bin build/inc.ok Makefile
	@echo "  CC      $@"
	@$(COMPILE) -Wa,-Ibuild -c $< -o $@
build/lkjwt.unstripped: build/lkjwt.o build/release/libbearssl.a
	@echo "  LINK    $@"
	@$(CC) $(OPT) $(HARD) $(LINKED) $^ $(CRTN) -o $@
lkjwt: build/lkjwt.unstripped
	@$(STRIP) -s -R .comment -o $@ $<
	@echo "  DONE    ./$@, $$(wc -c <$@) bytes"
.DELETE_ON_ERROR:

# ---- compiled without a warning, by both compilers ------------------------

.PHONY: warn warn-gcc warn-clang warn-analyzer
warn: warn-gcc warn-clang warn-analyzer
warn-gcc warn-clang warn-analyzer: warn-%: build/warn/%.o
	@:
build/warn/gcc.o build/warn/clang.o: build/warn/%.o: $(SRC) build/inc.ok \
    Makefile
	@mkdir -p $(@D) && : >$(@D)/ca.bin
	@$* -O2 $(WARN) -isystem $(BINC) -Wa,-I$(@D) -c $< -o $@
build/warn/analyzer.o: $(SRC) build/inc.ok Makefile
	@mkdir -p $(@D) && : >$(@D)/ca.bin
	@gcc -O2 -std=c11 -Werror -fanalyzer -isystem $(BINC) \
	    -Wa,-I$(@D) -c $< -o $@

# ---- tests: `test` counts all of its suites, failed or not -----------------

PYTHON = .deps/venv/bin/python
PYTEST = test/netns $(PYTHON) -m pytest -q -p no:cacheprovider --timeout=300
# As test/count.py reads it: what computes gives way to what waits. Suites
# that build the same thing stand in one lane.
SUITES = low audit + low unit fuzz-replay + blackbox + realworld
SUITES_ALL = low audit analyze + low unit fuzz-replay faults fuzz fuzz-afl + \
	blackbox attack soak crypto release image + \
	realworld dash deploy load browser fresh

.PHONY: test test-all audit unit blackbox realworld fresh image demo bench \
	instructions clean help
test test-all:
	@{ test/setup.sh $(if $(filter test,$@),test,all) && \
	    $(MAKE) --no-print-directory all build/host/libbearssl.a; } || \
	    { echo "0 passed, 1 failed"; exit 1; }
	@python3 test/count.py $(if $(filter test,$@),$(SUITES),$(SUITES_ALL))

audit: lkjwt
	@python3 test/audit.py

# The same tests four times: what one compiler forgives, another shows. The
# three that take longest run twice, once with each compiler.
SANITIZE   = -fsanitize=address,undefined -fno-sanitize-recover=all
UNIT_CC    = -std=gnu11 -g -Wall -Wextra -Werror -Wno-unused-function \
	-fno-omit-frame-pointer -isystem $(BINC) -Wa,-Ibuild
UNIT_RUNS  = gcc gcc-sanitized clang clang-sanitized
unit: $(UNIT_RUNS:%=build/unit-%)
	@fail=0; for v in $(UNIT_RUNS); do echo "-- unit, $$v"; \
	    case $$v in gcc-sanitized | clang) skip="-jobs -redis -faults" ;; \
	    *) skip= ;; esac; \
	    test/netns build/unit-$$v $$skip || fail=1; done; exit $$fail
build/unit-%: test/unit.c $(wildcard test/unit/* test/unit_*.h) $(SRC) build/ca.bin build/host/libbearssl.a
	@echo "  CC      $@"
	@$(firstword $(subst -, ,$*)) -O1 $(if $(findstring -sanitized,$*),$(SANITIZE)) \
	    $(UNIT_CC) $< build/host/libbearssl.a -o $@

# ---- proofs that take longer, of `make test-all` ---------------------------

# Each call of section 23 fails in turn; vectors of others; MemorySanitizer
# and the analyzers, each suppression explained in test/analyze.py.
FAULT_RUNS = gcc clang-sanitized
.PHONY: faults crypto analyze
faults: $(FAULT_RUNS:%=build/unit-%)
	@fail=0; for v in $(FAULT_RUNS); do echo "-- failing calls, $$v"; \
	    test/netns build/unit-$$v long || fail=1; done; exit $$fail

build/vectors: test/crypto/vectors.c test/unit_world.h $(SRC) build/ca.bin \
    build/host/libbearssl.a
	@echo "  CC      $@"
	@gcc -O1 $(SANITIZE) $(UNIT_CC) $< build/host/libbearssl.a -o $@
crypto:
	@test/setup.sh prove
	@$(MAKE) --no-print-directory build/vectors
	@$(PYTHON) test/crypto/check.py build/vectors

# BearSSL without assembly and intrinsics, which MemorySanitizer cannot see.
MSAN = clang -O1 -g -fsanitize=memory -fno-omit-frame-pointer
build/msan/libbearssl.a: $(BDEP) Makefile
	$(call bearssl_build,$(MSAN) -DBR_AES_X86NI=0 -DBR_SSE2=0 -DBR_RDRAND=0,ar)
build/unit-msan: test/unit.c $(wildcard test/unit/* test/unit_*.h) $(SRC) \
    build/ca.bin build/msan/libbearssl.a
	@echo "  CC      $@"
	@$(MSAN) $(UNIT_CC) $< build/msan/libbearssl.a -o $@
analyze:
	@test/setup.sh prove
	@$(MAKE) --no-print-directory build/unit-msan
	@python3 test/analyze.py $(BINC)

# ---- fuzzing: corpora in test/fuzz/, what is found in build/fuzz-found/ -----

# `fuzz-replay` reads each seed once (seconds); `fuzz` searches, FUZZ_S
# seconds a target, as many at once as there are processors:
# make fuzz FUZZ_S=600 FUZZ_TARGETS='session der'
FUZZ_S       = 30
FUZZ_TARGETS = request reply chunk json jwt dns resp der chain text \
	record protobuf session
FUZZ_SRC = test/fuzz.c test/fuzz/session.h test/unit_world.h $(SRC) \
	build/ca.bin build/host/libbearssl.a

.PHONY: fuzz fuzz-replay
build/fuzz-gcc build/fuzz-clang: build/fuzz-%: $(FUZZ_SRC)
	@echo "  CC      $@"
	@$* -O1 $(SANITIZE) $(UNIT_CC) -DFUZZ_REPLAY $< build/host/libbearssl.a -o $@
build/fuzz: $(FUZZ_SRC)
	@echo "  CC      $@"
	@clang -O1 $(SANITIZE) -fsanitize=fuzzer $(UNIT_CC) $< \
	    build/host/libbearssl.a -o $@
fuzz-replay: build/fuzz-gcc build/fuzz-clang
	@fail=0; for v in gcc clang; do echo "-- seeds, $$v"; \
	    build/fuzz-$$v || fail=1; done; exit $$fail

fuzz: build/fuzz build/fuzz-clang
	@python3 test/fuzz/search.py libfuzzer $(FUZZ_S) $(FUZZ_TARGETS)

# The same targets by AFL++, from the same seeds, without sanitizers.
# Five seconds each, or what FUZZ_S says.
AFL_S = $(if $(filter file,$(origin FUZZ_S)),5,$(FUZZ_S))
.PHONY: fuzz-afl
build/fuzz-afl: $(FUZZ_SRC)
	@echo "  CC      $@"
	@AFL_QUIET=1 afl-clang-fast -O1 -fsanitize=fuzzer $(UNIT_CC) $< \
	    build/host/libbearssl.a -o $@
fuzz-afl:
	@test/setup.sh prove
	@$(MAKE) --no-print-directory build/fuzz-afl build/fuzz-clang
	@python3 test/fuzz/search.py afl $(AFL_S) $(FUZZ_TARGETS)

blackbox: lkjwt
	@python3 test/modules.py test/$@
realworld: lkjwt
	@$(PYTEST) test/$@

# Attacks on the release binary; SOAK_S seconds of load amid faults, of the
# seed LKJWT_SEED if it is given: make soak SOAK_S=1800
SOAK_S = 120
.PHONY: attack soak
attack:
	@test/setup.sh attack
	@$(MAKE) --no-print-directory all
	@python3 test/modules.py test/attack
soak:
	@test/setup.sh attack
	@$(MAKE) --no-print-directory all
	@SOAK_S=$(SOAK_S) test/netns $(PYTHON) test/attack/soak.py

# Two browsers in a call by Element Call; screenshots in build/e2e.
.PHONY: browser
browser:
	@test/setup.sh browser
	@$(MAKE) --no-print-directory all
	@$(PYTEST) -x test/e2e

# Dashboard, alerts and manual page; deploy/ as operators' tools and proxies
# read it; load upon two replicas.
.PHONY: dash deploy load
dash deploy load:
	@test/setup.sh $@
	@$(MAKE) --no-print-directory all
	@$(PYTEST) test/$@

# Binaries of each architecture, tried under qemu-user: build/dist. The image
# holds the same ones.
.PHONY: release
release image:
	@test/setup.sh $@
	@$(MAKE) --no-print-directory all
	@.deps/release/bin/python test/$(if $(filter image,$@),image.py,release/release.py)

fresh:
	@test/fresh.sh

# Figures, never a verdict: tables on stdout, JSON and plots in build/bench.
# BENCH_LIMITS=1: as on a small box, in build/bench/small. `instructions`
# counts them, for each architecture.
bench:
	@test/setup.sh bench
	@$(MAKE) --no-print-directory all
	@mkdir -p build/bench
	@cd test/bench && go build -buildvcs=false -trimpath \
	    -o $(CURDIR)/build/bench/bench .
	@test/netns build/bench/bench

instructions:
	@test/setup.sh release
	@$(MAKE) --no-print-directory all
	@test/netns $(PYTHON) test/bench/$@.py

demo:
	@test/setup.sh demo
	@$(MAKE) --no-print-directory all
	@python3 test/demo/demo.py

clean:
	rm -rf build lkjwt

help:
	@echo "make            the static binary, ./lkjwt"
	@echo "make demo       what that misses, the binary, one exchange shown"
	@echo "make test       every suite: audit, unit, fuzz-replay, blackbox, realworld"
	@echo "make test-all   these, the image, and all of it on a fresh Debian"
	@echo "make audit      the invariants a reader may rely on"
	@echo "make browser    a call of two users of Element Call in Chromium"
	@echo "make dash       dashboard and alerts in Prometheus, lkjwt(8)"
	@echo "make load       a rolling restart under load, pod limits"
	@echo "make deploy     the chart, manifests, compose file, unit and proxies"
	@echo "make release    binaries of each architecture, in build/dist"
	@echo "make image      the image for each, in build/image"
	@echo "make unit, blackbox, realworld, fresh   one of the suites"
	@echo "make attack     slow clients, toxic peers, hostile chains, lighttpd"
	@echo "make soak       SOAK_S seconds of load amid faults"
	@echo "make faults     each system call fails in turn, in each scenario"
	@echo "make crypto     Wycheproof's vectors, tokens by and for PyJWT"
	@echo "make analyze    gcc's and clang's analyzers, cppcheck, MSan"
	@echo "make fuzz-afl   the fuzz targets by AFL++"
	@echo "make fuzz       searches FUZZ_S seconds a target; fuzz-replay:"
	@echo "                the seeds once"
	@echo "make bench      CPU, latency, memory beside nginx; BENCH_PEER=,"
	@echo "                BENCH_S=, BENCH_RUNS=, BENCH_ONLY=, BENCH_LIMITS=1"
	@echo "make instructions   the same by count, for each architecture"
	@echo "make warn       lkjwt.c by gcc, clang and the analyzer of gcc"
	@echo "make clean      removes build/ and ./lkjwt; .deps/ stays"
