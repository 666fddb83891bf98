/* What section 25 changes: a process as the kernel keeps it. While
 * kernel.is_on its calls change this and nothing real, and the one at
 * fault_at fails; else they go to the kernel. Included by unit_world.h.
 */
#include <grp.h>
#include <sys/prctl.h>

#if !defined SYS_getrlimit && defined SYS_ugetrlimit    /* 32-bit ARM */
#define SYS_getrlimit SYS_ugetrlimit
#endif

enum kernel_bit { KB_SETGID = 6, KB_SETUID = 7, KB_SETPCAP = 8,
    KB_SYS_ADMIN = 21, KB_CNT = 41 };
enum { KERNEL_CHILD = 4242, KERNEL_ABI = 5 };

static struct kernel {
    bool is_on;
    bool has_outer;          /* a filter that was there before */
    bool keeps_caps;         /* SECBIT_NO_SETUID_FIXUP */
    unsigned uid, gid;
    size_t group_cnt;
    uint64_t effective, permitted, inheritable, bounding, ambient;
    uint64_t core, soft, hard;       /* limits: of core files, of open ones */
    bool no_new_privs, is_dumpable, is_landlocked, is_filtered;
    unsigned rule_cnt;       /* folders that may be read */
    int fail_errno;          /* 0: a trial is killed */
    const char *failed;      /* which call it was; NULL: none */
} kernel;

static uint64_t kernel_all(void)
{
    return (1ull << KB_CNT) - 1;
}

static bool kernel_can(enum kernel_bit cap)
{
    return kernel.effective >> cap & 1;
}

/* Whether this call is the one that fails. */
static bool kernel_fails(const char *name)
{
    if (fault_seen++ != fault_at)
        return false;
    kernel.failed = name;
    errno = kernel.fail_errno;
    return true;
}

static int kernel_no(int err)
{
    errno = err;
    return -1;
}

static int w_prctl(int option, unsigned long a, unsigned long b,
    unsigned long c, unsigned long d)
{
    static const char *const name[64] = { [PR_GET_SECCOMP] = "get seccomp",
        [PR_CAPBSET_DROP] = "drop capability", [PR_SET_DUMPABLE] = "dumpable",
        [PR_SET_NO_NEW_PRIVS] = "no new privileges",
        [PR_SET_SECCOMP] = "seccomp" };
    if (!kernel.is_on)
        return prctl(option, a, b, c, d);
    if (option < 0 || option >= 64 || !name[option])
        abort();
    if (kernel_fails(name[option]))
        return -1;
    switch (option) {
    case PR_GET_SECCOMP:
        return kernel.has_outer || kernel.is_filtered ? 2 : 0;
    case PR_CAPBSET_DROP:
        if (!kernel_can(KB_SETPCAP))
            return kernel_no(EPERM);
        if (a >= KB_CNT)
            return kernel_no(EINVAL);
        kernel.bounding &= ~(1ull << a);
        return 0;
    case PR_SET_DUMPABLE:
        kernel.is_dumpable = a != 0;
        return 0;
    case PR_SET_NO_NEW_PRIVS:
        kernel.no_new_privs |= a == 1;
        return 0;
    default:                             /* PR_SET_SECCOMP */
        if (!kernel.no_new_privs && !kernel_can(KB_SYS_ADMIN))
            return kernel_no(EACCES);
        if (a != 2 || ((const struct { unsigned short len; void *p; } *)b)
                ->len < 2)
            return kernel_no(EINVAL);
        kernel.is_filtered = true;
        return 0;
    }
}

static uid_t w_geteuid(void)
{
    return kernel.is_on ? kernel.uid : geteuid();
}

static int w_setgroups(size_t cnt, const gid_t *list)
{
    if (!kernel.is_on)
        return setgroups(cnt, list);
    if (kernel_fails("setgroups"))
        return -1;
    if (!kernel_can(KB_SETGID))
        return kernel_no(EPERM);
    kernel.group_cnt = cnt;
    return 0;
}

static int w_setgid(gid_t gid)
{
    if (!kernel.is_on)
        return setgid(gid);
    if (kernel_fails("setgid"))
        return -1;
    if (!kernel_can(KB_SETGID) && gid != kernel.gid)
        return kernel_no(EPERM);
    kernel.gid = gid;
    return 0;
}

static int w_setuid(uid_t uid)
{
    if (!kernel.is_on)
        return setuid(uid);
    if (kernel_fails("setuid"))
        return -1;
    if (!kernel_can(KB_SETUID) && uid != kernel.uid)
        return kernel_no(EPERM);
    if (kernel.uid == 0 && uid && !kernel.keeps_caps)
        kernel.effective = kernel.permitted = kernel.ambient = 0;
    kernel.uid = uid;
    return 0;
}

static ssize_t w_readlink(const char *path, char *buf, size_t cap)
{
    if (kernel.is_on && kernel_fails("readlink"))
        return -1;
    return readlink(path, buf, cap);
}

static int kernel_capset(const uint32_t *set)
{
    uint64_t to[3];
    for (int i = 0; i < 3; i++)
        to[i] = set[i] | (uint64_t)set[3 + i] << 32;
    if (to[1] & ~kernel.permitted || to[0] & ~to[1]
        || to[2] & ~(kernel.inheritable | kernel.permitted))
        return kernel_no(EPERM);
    kernel.effective = to[0];
    kernel.permitted = to[1];
    kernel.inheritable = to[2];
    kernel.ambient &= to[1] & to[2];
    return 0;
}

static int kernel_limit(long what, const uint64_t *set, uint64_t *get)
{
    bool is_core = what == RLIMIT_CORE;
    if (get) {
        get[0] = is_core ? kernel.core : kernel.soft;
        get[1] = is_core ? kernel.core : kernel.hard;
    }
    if (set && is_core)
        kernel.core = set[0];
    else if (set && set[1] <= kernel.hard && set[0] <= set[1])
        kernel.soft = set[0];
    else if (set)
        return kernel_no(EPERM);
    return 0;
}

/* A call by its number. False: not one of ours. */
static bool kernel_syscall(long number, const long *a, long *got)
{
    static const struct { long number; const char *name; } tab[] = {
        { SYS_clone, "clone" }, { SYS_wait4, "wait4" },
        { SYS_capget, "capget" }, { SYS_capset, "capset" },
        { SYS_prlimit64, "prlimit64" },
#ifdef SYS_getrlimit
        { SYS_getrlimit, "getrlimit" },
#endif
        { SYS_openat, "openat" }, { SYS_getdents64, "getdents64" },
        { 444, "landlock_create_ruleset" }, { 445, "landlock_add_rule" },
        { 446, "landlock_restrict_self" },
    };
    size_t i = 0;
    while (i < sizeof tab / sizeof tab[0] && tab[i].number != number)
        i++;
    if (!kernel.is_on || i == sizeof tab / sizeof tab[0])
        return false;
    bool fails = kernel_fails(tab[i].name);
    *got = -1;
    if (fails && (number != SYS_wait4 || kernel.fail_errno))
        return true;
    switch (number) {
    case SYS_clone:
        *got = KERNEL_CHILD;
        break;
    case SYS_wait4:                      /* the trial, ended well or not */
        *(int *)a[1] = fails ? SIGSYS : 0;
        *got = a[0];
        break;
    case SYS_capget:
        for (int k = 0; k < 6; k++)
            ((uint32_t *)a[1])[k] = (uint32_t)((k % 3 == 0 ? kernel.effective
                : k % 3 == 1 ? kernel.permitted : kernel.inheritable)
                >> (k < 3 ? 0 : 32));
        *got = 0;
        break;
    case SYS_capset:
        *got = kernel_capset((const uint32_t *)a[1]);
        break;
    case SYS_prlimit64:
        *got = kernel_limit(a[1], (const uint64_t *)a[2], (uint64_t *)a[3]);
        break;
    case 444:
        *got = a[0] ? open("/dev/null", O_RDONLY | O_CLOEXEC) : KERNEL_ABI;
        break;
    case 445:
        kernel.rule_cnt++;
        *got = 0;
        break;
    case 446:
        *got = kernel.no_new_privs || kernel_can(KB_SYS_ADMIN) ? 0
            : kernel_no(EPERM);
        kernel.is_landlocked |= *got == 0;
        break;
#ifdef SYS_getrlimit
    case SYS_getrlimit:
        ((unsigned long *)a[1])[0] = (unsigned long)kernel.soft;
        ((unsigned long *)a[1])[1] = (unsigned long)kernel.hard;
        *got = 0;
        break;
#endif
    default:                             /* files are the real ones */
        return false;
    }
    return true;
}
