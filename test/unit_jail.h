/* Section 25: the seccomp programs of all three architectures, run by an
 * interpreter of our own over every number and argument that matters, and
 * compared with a table made from the kernel's headers (asm/unistd_64.h,
 * asm-generic/unistd.h, asm/unistd-eabi.h of 32-bit ARM); then the one of
 * this machine, installed for a child and met by real calls. */
#include <sys/wait.h>

enum jt_want {
    JW_ENOSYS, JW_ALLOW, JW_KILL, JW_SOCKET, JW_FCNTL, JW_OPENAT, JW_EXEC,
    JW_UNLINK
};

#ifndef SYS_mmap                  /* 32 bits: the same, offsets in pages */
#define SYS_mmap SYS_mmap2
#endif
#ifdef SYS_fcntl64                /* 32 bits: the one that libraries call */
#undef SYS_fcntl
#define SYS_fcntl SYS_fcntl64
#endif
#ifdef __x86_64__
#define JT_N(name) #name, SYS_##name
#else
#define JT_N(name) #name, -1
#endif

/* name, the number that this machine's headers have, want, numbers */
static const struct jt_call {
    const char *name;
    int host;
    enum jt_want want;
    int nr[3];               /* x86_64, aarch64, armv7; -1: none */
} jt_call_tab[] = {
    { JT_N(read), JW_ALLOW, { 0, 63, 3 } },
    { JT_N(write), JW_ALLOW, { 1, 64, 4 } },
    { JT_N(writev), JW_ALLOW, { 20, 66, 146 } },
    { JT_N(close), JW_ALLOW, { 3, 57, 6 } },
    { JT_N(shutdown), JW_ALLOW, { 48, 210, 293 } },
    { JT_N(connect), JW_ALLOW, { 42, 203, 283 } },
    { JT_N(accept4), JW_ALLOW, { 288, 242, 366 } },
    { JT_N(sendto), JW_ALLOW, { 44, 206, 290 } },
    { JT_N(recvfrom), JW_ALLOW, { 45, 207, 292 } },
    { JT_N(sendmsg), JW_ALLOW, { 46, 211, 296 } },
    { JT_N(recvmsg), JW_ALLOW, { 47, 212, 297 } },
    { JT_N(getsockopt), JW_ALLOW, { 55, 209, 295 } },
    { JT_N(setsockopt), JW_ALLOW, { 54, 208, 294 } },
    { JT_N(getsockname), JW_ALLOW, { 51, 204, 286 } },
    { JT_N(getpeername), JW_ALLOW, { 52, 205, 287 } },
    { JT_N(poll), JW_ALLOW, { 7, -1, 168 } },
    { JT_N(epoll_ctl), JW_ALLOW, { 233, 21, 251 } },
    { JT_N(epoll_pwait), JW_ALLOW, { 281, 22, 346 } },
    { JT_N(ppoll), JW_ALLOW, { 271, 73, 336 } },
    { "ppoll_time64", -1, JW_ALLOW, { -1, -1, 414 } },
    { JT_N(clock_gettime), JW_ALLOW, { 228, 113, 263 } },
    { "clock_gettime64", -1, JW_ALLOW, { -1, -1, 403 } },
    { JT_N(getrandom), JW_ALLOW, { 318, 278, 384 } },
    { JT_N(getdents64), JW_ALLOW, { 217, 61, 217 } },
    { JT_N(fstat), JW_ALLOW, { 5, 80, 108 } },
    { "fstat64", -1, JW_ALLOW, { -1, -1, 197 } },
    { JT_N(newfstatat), JW_ALLOW, { 262, 79, -1 } },
    { "fstatat64", -1, JW_ALLOW, { -1, -1, 327 } },
    { JT_N(statx), JW_ALLOW, { 332, 291, 397 } },
    { JT_N(pread64), JW_ALLOW, { 17, 67, 180 } },
    { JT_N(rt_sigprocmask), JW_ALLOW, { 14, 135, 175 } },
    { JT_N(rt_sigreturn), JW_ALLOW, { 15, 139, 173 } },
    { "sigreturn", -1, JW_ALLOW, { -1, -1, 119 } },
    { JT_N(restart_syscall), JW_ALLOW, { 219, 128, 0 } },
    { JT_N(exit), JW_ALLOW, { 60, 93, 1 } },
    { JT_N(exit_group), JW_ALLOW, { 231, 94, 248 } },

    { JT_N(socket), JW_SOCKET, { 41, 198, 281 } },
    { JT_N(fcntl), JW_FCNTL, { 72, 25, -1 } },
    { "fcntl64", -1, JW_FCNTL, { -1, -1, 221 } },
    { JT_N(openat), JW_OPENAT, { 257, 56, 322 } },
    { JT_N(mmap), JW_EXEC, { 9, 222, -1 } },
    { "mmap2", -1, JW_EXEC, { -1, -1, 192 } },
    { JT_N(mprotect), JW_EXEC, { 10, 226, 125 } },
    { JT_N(unlink), JW_UNLINK, { 87, -1, 10 } },
    { JT_N(unlinkat), JW_UNLINK, { 263, 35, 328 } },

    { JT_N(execve), JW_KILL, { 59, 221, 11 } },
    { JT_N(execveat), JW_KILL, { 322, 281, 387 } },
    { JT_N(fork), JW_KILL, { 57, -1, 2 } },
    { JT_N(vfork), JW_KILL, { 58, -1, 190 } },
    { JT_N(clone), JW_KILL, { 56, 220, 120 } },
    { JT_N(clone3), JW_KILL, { 435, 435, 435 } },
    { JT_N(ptrace), JW_KILL, { 101, 117, 26 } },
    { JT_N(process_vm_readv), JW_KILL, { 310, 270, 376 } },
    { JT_N(process_vm_writev), JW_KILL, { 311, 271, 377 } },
    { JT_N(bpf), JW_KILL, { 321, 280, 386 } },
    { JT_N(mount), JW_KILL, { 165, 40, 21 } },
    { JT_N(unshare), JW_KILL, { 272, 97, 337 } },
    { JT_N(setns), JW_KILL, { 308, 268, 375 } },
    { JT_N(init_module), JW_KILL, { 175, 105, 128 } },
    { JT_N(finit_module), JW_KILL, { 313, 273, 379 } },
    { JT_N(delete_module), JW_KILL, { 176, 106, 129 } },
    { JT_N(kexec_load), JW_KILL, { 246, 104, 347 } },
    { JT_N(kexec_file_load), JW_KILL, { 320, 294, 401 } },
    { JT_N(io_uring_setup), JW_KILL, { 425, 425, 425 } },
    { JT_N(userfaultfd), JW_KILL, { 323, 282, 388 } },
    { JT_N(perf_event_open), JW_KILL, { 298, 241, 364 } },
};

static const struct { const char *name; enum jail_arch arch; uint32_t audit; }
jt_arch_tab[] = {
    { "x86_64", JA_X86_64, 0xc000003e },
    { "aarch64", JA_AARCH64, 0xc00000b7 },
    { "armv7", JA_ARMV7, 0x40000028 },
};

/* What the kernel hands a program. */
struct jt_data {
    int32_t nr;
    uint32_t arch;
    uint64_t ip, arg[6];
};
enum { JV_ALLOW = 0x7fff0000, JV_ENOSYS = 0x00050000 | 38,
    JV_LEN = 4096 /* BPF_MAXINSNS */ };
#define JV_KILL 0x80000000u  /* the process, not the thread */
#define JV_WILD 0x12345678u  /* the program left its bounds */

static struct sock_filter jt_prog[JV_LEN + 1];
static size_t jt_prog_len;

/* Whether the kernel would take the program (seccomp_check_filter). */
static const char *jt_judge(void)
{
    if (jt_prog_len == 0 || jt_prog_len > JV_LEN)
        return "length";
    for (size_t i = 0; i < jt_prog_len; i++) {
        const struct sock_filter *f = &jt_prog[i];
        size_t left = jt_prog_len - 1 - i;
        switch (f->code) {
        case 0x20:                                      /* ld [k] */
            if (f->k >= sizeof(struct jt_data) || f->k % 4)
                return "ld";
            break;
        case 0x54: case 0x44: case 0x04: case 0x14:     /* and or add sub */
            break;
        case 0x05:                                      /* ja */
            if (f->k >= left)
                return "ja";
            break;
        case 0x15: case 0x25: case 0x35: case 0x45:     /* jeq gt ge set */
            if (f->jt >= left || f->jf >= left)
                return "jump";
            break;
        case 0x06:                                      /* ret k */
            break;
        default:
            return "code";
        }
    }
    return jt_prog[jt_prog_len - 1].code == 0x06 ? "" : "no ret";
}

/* The verdict on one call. */
static uint32_t jt_run(const struct jt_data *d)
{
    uint32_t a = JV_WILD, word[sizeof *d / 4];
    memcpy(word, d, sizeof word);
    for (size_t i = 0; i < jt_prog_len; i++) {
        const struct sock_filter *f = &jt_prog[i];
        switch (f->code) {
        case 0x20: a = word[f->k / 4]; break;
        case 0x54: a &= f->k; break;
        case 0x44: a |= f->k; break;
        case 0x04: a += f->k; break;
        case 0x14: a -= f->k; break;
        case 0x05: i += f->k; break;
        case 0x15: i += a == f->k ? f->jt : f->jf; break;
        case 0x25: i += a > f->k ? f->jt : f->jf; break;
        case 0x35: i += a >= f->k ? f->jt : f->jf; break;
        case 0x45: i += a & f->k ? f->jt : f->jf; break;
        case 0x06: return f->k;
        default: return JV_WILD;
        }
    }
    return JV_WILD;
}

static bool jt_unix_socket, jt_unix_bind;

static bool jt_socket_ok(uint32_t family, uint32_t type)
{
    uint32_t base = type & 15;                 /* the rest is flags */
    return (family == 2 || family == 10 || (family == 1 && jt_unix_socket))
        && (base == 1 || base == 2);
}

/* What SECURITY section 6 says of the call; arguments are the low halves,
 * as the kernel reads an int. */
static uint32_t jt_verdict(enum jt_want want, const struct jt_data *d)
{
    uint32_t b = (uint32_t)d->arg[1], c = (uint32_t)d->arg[2];
    bool ok = false;
    switch (want) {
    case JW_ENOSYS: break;
    case JW_ALLOW: ok = true; break;
    case JW_KILL: return JV_KILL;
    case JW_SOCKET: ok = jt_socket_ok((uint32_t)d->arg[0], b); break;
    case JW_FCNTL: ok = b == 2 || b == 3 || b == 4 || b == 1030; break;
    case JW_OPENAT: ok = (c & (3 | 0100 | 01000 | 020000000)) == 0; break;
    case JW_EXEC:
        if (c & 4)
            return JV_KILL;
        break;
    case JW_UNLINK: ok = jt_unix_bind; break;
    }
    return ok ? JV_ALLOW : JV_ENOSYS;
}

static const struct jt_call *jt_call_of(size_t arch, int nr)
{
    for (size_t i = 0; i < COUNT_OF(jt_call_tab); i++)
        if (nr >= 0 && jt_call_tab[i].nr[arch] == nr)
            return &jt_call_tab[i];
    return NULL;
}

/* One call as it is; again with bits the kernel does not read set, which may
 * be refused, but never let through where it is not without. */
static bool jt_same(const struct jt_data *d, enum jt_want want,
    bool is_wide)
{
    uint32_t expect = jt_verdict(want, d);
    if (jt_run(d) != expect)
        return false;
    for (size_t i = 0; is_wide && i < 6; i++) {
        struct jt_data odd = *d;
        odd.arg[i] |= 0xdead00000000u;
        uint32_t got = jt_run(&odd);
        if (got != expect && (expect != JV_ALLOW || got != JV_ENOSYS))
            return false;
    }
    return true;
}

/* Values of a flag word: none, each bit, each two, and all of them. */
static uint32_t jt_bits(unsigned i)
{
    return i == 1024 ? 0xffffffff : i == 1025 ? 0
        : 1u << i / 32 | 1u << i % 32;
}

/* Every value of the arguments that a rule may look at. */
static void jt_arguments(size_t at, const struct jt_call *c)
{
    struct jt_data d = { c->nr[at], jt_arch_tab[at].audit, 0, { 0 } };
    bool is_wide = jt_arch_tab[at].audit >> 31;
    unsigned bad = 0;
    uint32_t seen[2] = { 0, 0 };
    for (uint32_t i = 0; i < 1100; i++) {      /* families, commands */
        for (uint32_t k = 0; k < 4 * 18; k++) {
            d.arg[c->want == JW_FCNTL] = i;
            if (c->want == JW_SOCKET)
                d.arg[1] = k / 4 | (k & 1) << 11 | (k & 2) << 18;
            if (!jt_same(&d, c->want, is_wide) && bad++ == 0)
                memcpy(seen, (uint32_t[]){ i, (uint32_t)d.arg[1] }, 8);
            if (c->want != JW_SOCKET)
                break;
        }
    }
    for (unsigned i = 0; i <= 1025; i++) {     /* flags, protections */
        d = (struct jt_data){ d.nr, d.arch, 7, { 2, 1, 0, ~0u, 0, 9 } };
        d.arg[c->want == JW_SOCKET || c->want == JW_FCNTL ? 1 : 2]
            = jt_bits(i);
        if (!jt_same(&d, c->want, is_wide) && bad++ == 0)
            memcpy(seen, (uint32_t[]){ jt_bits(i), 0xffffffff }, 8);
    }
    row(name_of("%s: arguments of %s", jt_arch_tab[at].name, c->name),
        bad == 0,
        "%u wrong, first %u %x", bad, seen[0], seen[1]);
}

/* Every number, with three sets of arguments. */
static void jt_numbers(size_t at)
{
    static const uint64_t arg_tab[] = { 0, 0xffffffff, 0x5a5a5a5a5a5a5a5a };
    bool is_wide = jt_arch_tab[at].audit >> 31;
    unsigned bad = 0;
    int first = -1;
    for (int nr = 0; nr < 1024; nr++) {
        const struct jt_call *c = jt_call_of(at, nr);
        enum jt_want want = c ? c->want : JW_ENOSYS;
        for (size_t k = 0; k < COUNT_OF(arg_tab); k++) {
            uint64_t v = is_wide ? arg_tab[k] : (uint32_t)arg_tab[k];
            struct jt_data d = { nr, jt_arch_tab[at].audit, v,
                { v, v, v, v, v, v } };
            uint32_t got = jt_run(&d), expect = jt_verdict(want, &d);
            if (got != expect && bad++ == 0)
                first = nr;
        }
    }
    row(name_of("%s: numbers 0 to 1023", jt_arch_tab[at].name), bad == 0, "%u wrong, first %d", bad, first);
    for (size_t i = bad = 0; i < COUNT_OF(jt_call_tab); i++)
        if (jt_call_tab[i].nr[at] >= 0
            && jt_call_tab[i].want >= JW_SOCKET)
            jt_arguments(at, &jt_call_tab[i]);
}

/* Numbers beyond the table: x32's die on x86_64, none passes anywhere. */
static void jt_beyond(size_t at)
{
    static const uint32_t odd_tab[] = { 1024, 4096, 0xf0001, 0xf0002, 0xf0003,
        0xf0005, 0x0fffffff, 0x20000000, 0x3fffffff };
    bool is_x86 = jt_arch_tab[at].arch == JA_X86_64;
    struct jt_data d = { 0, jt_arch_tab[at].audit, 0, { 2, 1 } };
    unsigned bad = 0;
    for (uint32_t nr = 0; nr < 1024; nr++)
        for (uint32_t high = 1u << 30; high; high <<= 1) {
            d.nr = (int32_t)(nr | high);
            uint32_t got = jt_run(&d);
            bad += high == 1u << 30 && is_x86 ? got != JV_KILL
                : got != JV_KILL && got != JV_ENOSYS;
        }
    row(is_x86 ? "x32 is killed" : "numbers with high bits", bad == 0,
        "%u wrong", bad);
    for (size_t i = bad = 0; i < COUNT_OF(odd_tab); i++) {
        d.nr = (int32_t)odd_tab[i];
        bad += jt_run(&d) != JV_ENOSYS;
    }
    row("numbers past the table", bad == 0, "%u wrong", bad);
    for (uint32_t i = bad = 0; i < 32 + 3; i++)
        for (int nr = 0; nr < 1024; nr++) {
            d.nr = nr;
            d.arch = i < 32 ? jt_arch_tab[at].audit ^ 1u << i
                : i == 32 ? 0x40000003u : i == 33 ? 0 : 0xffffffff;
            bad += jt_run(&d) != JV_KILL;
        }
    for (size_t k = 0; k < COUNT_OF(jt_arch_tab); k++) {
        d.arch = jt_arch_tab[k].audit;
        for (d.nr = 0; k != at && d.nr < 1024; d.nr++)
            bad += jt_run(&d) != JV_KILL;
    }
    row("another architecture is killed", bad == 0, "%u wrong", bad);
}

/* ---- the program of this machine, in the kernel ---- */

/* One call in a child behind the program: its errno, 0 for none, or minus
 * the signal that ended it. */
static int jt_real(long nr, long a, long b, long c)
{
    struct { unsigned short len; struct sock_filter *filter; } prog
        = { (unsigned short)jt_prog_len, jt_prog };
    int status = 0;
    pid_t pid = fork();
    if (pid == 0) {
        if (syscall(SYS_prctl, 38, 1L, 0L, 0L, 0L) != 0    /* NO_NEW_PRIVS */
            || syscall(SYS_prctl, 4, 0L, 0L, 0L, 0L) != 0  /* no core file */
            || syscall(SYS_prctl, 22, 2L, &prog, 0L, 0L) != 0)
            syscall(SYS_exit_group, 255);
        long got = syscall(nr, a, b, c, -1L, 0L, 0L);
        syscall(SYS_exit_group, got == -1 ? errno : 0);
    }
    if (pid < 0 || waitpid(pid, &status, 0) != pid)
        return 256;
    return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

static void jt_in_kernel(void)
{
    static const char *none[] = { NULL };
    static int fds[2];
    static uint8_t page[4096] __attribute__((aligned(4096)));
    const struct { const char *name; long nr, a, b, c; int want; } tab[] = {
        { "getrandom", SYS_getrandom, (long)page, 8, 0, 0 },
        { "read-only file", SYS_openat, AT_FDCWD, (long)"/", O_RDONLY, 0 },
        { "TCP", SYS_socket, AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0, 0 },
        { "UDP", SYS_socket, AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0, 0 },
        { "F_GETFL", SYS_fcntl, 2, F_GETFL, 0, 0 },
        { "F_DUPFD", SYS_fcntl, 2, F_DUPFD, 0, ENOSYS },
        { "getpid", SYS_getpid, 0, 0, 0, ENOSYS },
        { "listen", SYS_listen, 2, 1, 0, ENOSYS },
        { "bind", SYS_bind, 2, 0, 0, ENOSYS },
        { "kill", SYS_kill, 0, 0, 0, ENOSYS },
        { "unix socket", SYS_socket, AF_UNIX, SOCK_STREAM, 0, ENOSYS },
        { "netlink", SYS_socket, AF_NETLINK, SOCK_RAW, 0, ENOSYS },
        { "raw socket", SYS_socket, AF_INET, SOCK_RAW, 0, ENOSYS },
        { "socketpair", SYS_socketpair, AF_UNIX, SOCK_STREAM, 0, ENOSYS },
        { "pipe", SYS_pipe2, (long)fds, 0, 0, ENOSYS },
        { "file to write", SYS_openat, AT_FDCWD, (long)"/dev/null",
            O_WRONLY, ENOSYS },
        { "unlinkat", SYS_unlinkat, AT_FDCWD, (long)"/nowhere", 0, ENOSYS },
        { "mmap", SYS_mmap, 0, 4096, PROT_READ, ENOSYS },
        { "a lock of the jail", SYS_prctl, 22, 0, 0, ENOSYS },
        { "execve", SYS_execve, (long)"/bin/sh", (long)none, (long)none,
            -SIGSYS },
        { "clone", SYS_clone, SIGCHLD, 0, 0, -SIGSYS },
        { "ptrace", SYS_ptrace, 0, 0, 0, -SIGSYS },
        { "unshare", SYS_unshare, 0, 0, 0, -SIGSYS },
        { "executable memory", SYS_mmap, 0, 4096, PROT_READ | PROT_EXEC,
            -SIGSYS },
        { "memory made executable", SYS_mprotect, (long)page, 4096,
            PROT_READ | PROT_EXEC, -SIGSYS },
#ifdef __x86_64__
        { "open", SYS_open, (long)"/", O_RDONLY, 0, ENOSYS },
        { "fork", SYS_fork, 0, 0, 0, -SIGSYS },
        { "vfork", SYS_vfork, 0, 0, 0, -SIGSYS },
        { "x32", SYS_getpid | 1 << 30, 0, 0, 0, -SIGSYS },
#endif
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++)
        row_int(name_of("in the kernel: %s", tab[i].name),
            jt_real(tab[i].nr, tab[i].a, tab[i].b, tab[i].c),
            tab[i].want);
}

static void test_jail(void)
{
    for (size_t i = 0; i < COUNT_OF(jt_call_tab); i++)
        if (jt_call_tab[i].host >= 0 && jt_call_tab[i].nr[0] >= 0)
            row_int(jt_call_tab[i].name, jt_call_tab[i].nr[0],
                jt_call_tab[i].host);
    for (size_t at = 0; at < COUNT_OF(jt_arch_tab); at++)
        for (int k = 0; k < 4; k++) {
            const struct sock_filter none = { 0xaaaa, 0xaa, 0xaa,
                0xaaaaaaaa };
            size_t touched = JV_LEN + 1;
            jt_unix_socket = k & 1;
            jt_unix_bind = k & 2;
            for (size_t i = 0; i < touched; i++)
                jt_prog[i] = none;
            jt_prog_len = jail_filter(jt_arch_tab[at].arch,
                jt_unix_socket, jt_unix_bind, jt_prog);
            while (touched && memcmp(&jt_prog[touched - 1], &none,
                    sizeof none) == 0)
                touched--;
            row_int(name_of("%s, %d: what is written is what is counted",
                jt_arch_tab[at].name, k), (int64_t)touched,
                (int64_t)jt_prog_len);
            row_text("the kernel takes it", sl_str(jt_judge()), SL(""));
            row("it fits", jt_prog_len <= JAIL_MAX, "%zu instructions",
                jt_prog_len);
            jt_numbers(at);
            jt_beyond(at);
        }
    /* qemu-user has no seccomp: there the program is read, not run. */
#ifndef UNIT_EMULATED
    for (size_t at = 0; at < COUNT_OF(jt_arch_tab); at++) {
        if (jt_arch_tab[at].arch != jail_here)
            continue;
        jt_prog_len = jail_filter(jt_arch_tab[at].arch, false, false,
            jt_prog);
        jt_in_kernel();
    }
#else
    (void)jt_in_kernel;
#endif
}
