/* The harness, and the scripted world that lkjwt.c runs in.
 *
 * Sockets are entries of sock_tab. A scenario sets world_dial (what becomes
 * of a connection), world_sent (what a peer does with bytes) and lets
 * loop_round() run: epoll_pwait() moves the clock to whatever happens next.
 */
#define _GNU_SOURCE
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <bearssl.h>

/* ---- rows ---- */

static unsigned passed, failed;
static const char *group = "";
static bool verbose;

__attribute__((format(printf, 3, 4)))
static bool row(const char *name, bool ok, const char *fmt, ...)
{
    va_list ap;
    ok ? passed++ : failed++;
    if (ok && !verbose)
        return ok;
    printf("%s %s: %s", ok ? "ok  " : "FAIL", group, name);
    if (!ok) {
        printf(": ");
        va_start(ap, fmt);
        vprintf(fmt, ap);
        va_end(ap);
    }
    printf("\n");
    fflush(stdout);
    return ok;
}

/* A name made of parts, for rows inside loops. */
__attribute__((format(printf, 1, 2)))
static const char *name_of(const char *fmt, ...)
{
    static char text[8][256];
    static unsigned turn;
    char *out = text[turn++ % 8];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(out, sizeof text[0], fmt, ap);
    va_end(ap);
    for (char *p = out; *p; p++)
        if ((unsigned char)*p < 0x20 || *p == 0x7f)
            *p = '?';
    return out;
}

/* ---- the guard page ---- */

enum { GUARD_LEN = 1 << 20 };
static uint8_t *guard_end;

static void guard_open(void)
{
    uint8_t *p = mmap(NULL, GUARD_LEN + 65536, PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED
        || mprotect(p + GUARD_LEN, 65536, PROT_NONE) != 0)
        abort();
    guard_end = p + GUARD_LEN;
}

/* A copy of the bytes that ends where reading traps. */
static uint8_t *guarded(const void *p, size_t len)
{
    if (len > GUARD_LEN)
        abort();
    if (len)
        memmove(guard_end - len, p, len);
    return guard_end - len;
}

/* ---- the world ---- */

enum { FD_BASE = 500, SOCK_CNT = 3500, SOCK_BUF = 70000 };

struct sock {
    unsigned serial;
    bool used, is_udp, is_listener, is_peer_closed, is_shut;
    int family, type;
    struct sockaddr_storage to;
    int64_t up_at;             /* connected from then on; INT64_MAX never */
    int dial_errno;            /* how connecting ends at up_at */
    int now_errno;             /* connect() itself fails */
    int64_t in_at;             /* in is readable from then on */
    size_t in_off, in_len, out_len, seen;
    bool is_eof, is_reset;     /* behind the bytes of in */
    size_t room;               /* bytes write() still takes */
    int tag;                   /* the scenario's own */
    void *peer;
    uint8_t in[SOCK_BUF], out[SOCK_BUF];
};
static struct sock *sock_tab[SOCK_CNT];
static int sock_top;                    /* none was ever used from there on */

static int64_t world_ms = 100000, world_wall = 1780000000000;
static int64_t world_skew;              /* our wall clock alone is off */
static int64_t world_end = INT64_MAX;   /* no wait is longer */
static size_t world_chunk = SIZE_MAX;   /* most that one read() gives */
static void (*world_dial)(struct sock *s);
static void (*world_sent)(struct sock *s);
static struct sock *world_client[64];   /* waiting to be accepted */
static unsigned world_client_cnt;
static int world_accept_errno;
static unsigned world_sockets, world_connects;

static void (*world_poll)(void);        /* before a wait */
static bool world_is_random = true;     /* else zero bytes: no choice */
static bool world_has_random = true;    /* getrandom() is there */

/* Faults: the n-th call (from 0) that may fail does, once. With fault_fits
 * every kind of call may, but only by an error that it can have; without,
 * those on sockets, by any. */
enum { FAULT_NONE = -1 };
enum call { CALL_SOCKET, CALL_CONNECT, CALL_ACCEPT, CALL_READ, CALL_WRITE,
    CALL_SO_ERROR, CALL_SET, CALL_SHUTDOWN, CALL_EPOLL,
    CALL_EPOLL_MAKE, CALL_EPOLL_CTL, CALL_RANDOM,
    CALL_STDERR, CALL_POLL, CALL_FILE, CALL_FILE_READ, CALL_BIND };
static long fault_at = FAULT_NONE, fault_seen;
static int fault_errno;                 /* 0: a short read or write */
static bool fault_fits;

#define ONE(c) 1u << CALL_##c
static const struct { int err; unsigned calls; } fault_fit_tab[] = {
    { 0, ONE(READ) | ONE(WRITE) | ONE(RANDOM) | ONE(STDERR)
        | ONE(FILE_READ) },
    { EINTR, ONE(CONNECT) | ONE(ACCEPT) | ONE(READ) | ONE(WRITE)
        | ONE(EPOLL) | ONE(RANDOM) | ONE(STDERR) | ONE(POLL)
        | ONE(FILE_READ) },
    { EAGAIN, ONE(CONNECT) | ONE(ACCEPT) | ONE(READ) | ONE(WRITE)
        | ONE(STDERR) },
    { ECONNRESET, ONE(CONNECT) | ONE(ACCEPT) | ONE(READ) | ONE(WRITE)
        | ONE(SO_ERROR) | ONE(SHUTDOWN) | ONE(STDERR) },
    { ENOBUFS, ONE(SOCKET) | ONE(CONNECT) | ONE(ACCEPT) | ONE(READ)
        | ONE(WRITE) | ONE(SO_ERROR) | ONE(SET) | ONE(EPOLL) | ONE(POLL)
        | ONE(FILE) | ONE(FILE_READ) | ONE(BIND) },
    { ENOMEM, ONE(EPOLL_MAKE) | ONE(EPOLL_CTL) },
    { EMFILE, ONE(SOCKET) | ONE(ACCEPT) | ONE(FILE) | ONE(EPOLL_MAKE) },
    { ENOSYS, ONE(SOCKET) | ONE(CONNECT) | ONE(ACCEPT) | ONE(SO_ERROR)
        | ONE(SET) | ONE(SHUTDOWN) | ONE(EPOLL) | ONE(EPOLL_MAKE) | ONE(POLL) | ONE(FILE)
        | ONE(BIND) },
};
#undef ONE

static bool fault_now(enum call call)
{
    if (!fault_fits)
        return call <= CALL_SO_ERROR && fault_seen++ == fault_at;
    for (size_t i = 0; i < sizeof fault_fit_tab / sizeof fault_fit_tab[0];
         i++)
        if (fault_fit_tab[i].err == fault_errno
            && fault_fit_tab[i].calls >> call & 1)
            return fault_seen++ == fault_at;
    return false;
}

/* The call fails. */
static bool fault_fails(enum call call)
{
    if (!fault_now(call))
        return false;
    errno = fault_errno;
    return true;
}

#include "unit_kernel.h"

/* Unix sockets that a scenario lets be: no files, paths in this list. A
 * path without a listener is what a killed process left. */
static char world_path[4][sizeof ((struct sockaddr_un *)0)->sun_path];
static bool world_has_paths;

static char *path_find(const char *path)
{
    for (size_t i = 0; i < sizeof world_path / sizeof world_path[0]; i++)
        if (strcmp(world_path[i], path) == 0)
            return world_path[i];
    return NULL;
}

static void path_add(const char *path)
{
    char *at = path_find("");
    if (!at)
        abort();
    strcpy(at, path);
}

/* What is written to stdout, where a scenario wants to see it. */
static char world_out[20000];
static size_t world_out_len;
static bool world_has_out;

/* Lines written to stderr. */
static char log_buf[1 << 20];
static size_t log_len;

static void log_clear(void)
{
    log_len = 0;
    log_buf[0] = 0;
}

static bool log_has(const char *text)
{
    return strstr(log_buf, text) != NULL;
}

static uint64_t dice_state = 88172645463325252u;

static uint64_t dice(void)
{
    dice_state ^= dice_state << 13;
    dice_state ^= dice_state >> 7;
    dice_state ^= dice_state << 17;
    return dice_state;
}

static struct sock *sock_of(int fd)
{
    return fd >= FD_BASE && fd < FD_BASE + SOCK_CNT
        && sock_tab[fd - FD_BASE] && sock_tab[fd - FD_BASE]->used
        ? sock_tab[fd - FD_BASE] : NULL;
}

static int sock_fd(const struct sock *s)
{
    for (int i = 0; i < SOCK_CNT; i++)
        if (sock_tab[i] == s)
            return i + FD_BASE;
    abort();
}

static struct sock *sock_new(void)
{
    for (int i = 0; i < SOCK_CNT; i++) {
        if (sock_tab[i] && sock_tab[i]->used)
            continue;
        if (!sock_tab[i])
            sock_tab[i] = malloc(sizeof *sock_tab[i]);
        if (!sock_tab[i])
            abort();
        memset(sock_tab[i], 0, offsetof(struct sock, in));
        sock_tab[i]->out[0] = 0;
        sock_tab[i]->used = true;
        sock_top = i < sock_top ? sock_top : i + 1;
        sock_tab[i]->room = SIZE_MAX;
        sock_tab[i]->serial = ++world_sockets;
        return sock_tab[i];
    }
    abort();
}

static unsigned sock_open_cnt(void)
{
    unsigned cnt = 0;
    for (int i = 0; i < SOCK_CNT; i++)
        cnt += sock_tab[i] && sock_tab[i]->used && !sock_tab[i]->is_listener;
    return cnt;
}

/* Make bytes arrive at the program's side. */
static void sock_give(struct sock *s, const void *p, size_t len)
{
    if (s->in_off == s->in_len)
        s->in_off = s->in_len = 0;
    if (len > sizeof s->in - s->in_len)
        abort();
    memcpy(s->in + s->in_len, p, len);
    s->in_len += len;
}

static void sock_say(struct sock *s, const char *text)
{
    sock_give(s, text, strlen(text));
}

static uint16_t sock_port(const struct sock *s)
{
    return ntohs(s->family == AF_INET6
        ? ((const struct sockaddr_in6 *)(const void *)&s->to)->sin6_port
        : ((const struct sockaddr_in *)(const void *)&s->to)->sin_port);
}

/* The address dialled, as text. */
static const char *sock_host(const struct sock *s)
{
    static char text[INET6_ADDRSTRLEN];
    if (s->family == AF_INET6)
        inet_ntop(AF_INET6, &((const struct sockaddr_in6 *)(const void *)
            &s->to)->sin6_addr, text, sizeof text);
    else
        inet_ntop(AF_INET, &((const struct sockaddr_in *)(const void *)
            &s->to)->sin_addr, text, sizeof text);
    return text;
}

static int w_socket(int family, int type, int protocol)
{
    (void)protocol;
    if (fault_now(CALL_SOCKET) && fault_errno != EINTR
        && fault_errno != EAGAIN && fault_errno != 0) {
        errno = fault_errno;
        return -1;
    }
    struct sock *s = sock_new();
    s->family = family;
    s->type = type;
    s->is_udp = (type & 15) == SOCK_DGRAM;
    return sock_fd(s);
}

static int w_connect(int fd, const struct sockaddr *sa, socklen_t len)
{
    struct sock *s = sock_of(fd);
    if (!s)
        return connect(fd, sa, len);
    memcpy(&s->to, sa, len);
    world_connects++;
    s->up_at = s->is_udp ? 0 : world_ms;
    bool fails = fault_now(CALL_CONNECT) && fault_errno;
    if (fails && fault_errno != EINTR) {
        errno = fault_errno;
        return -1;
    }
    if (world_has_paths && sa->sa_family == AF_UNIX) {
        errno = ECONNREFUSED;            /* who listened there is gone */
        return -1;
    }
    if (world_dial)
        world_dial(s);
    /* interrupted, connecting goes on */
    errno = s->now_errno ? s->now_errno : fails ? EINTR : EINPROGRESS;
    return s->now_errno || fails || !s->is_udp ? -1 : 0;
}

static int w_accept4(int fd, struct sockaddr *sa, socklen_t *len, int flags)
{
    struct sock *s = sock_of(fd);
    if (!s)
        return accept4(fd, sa, len, flags);
    if (fault_now(CALL_ACCEPT) && fault_errno) {
        errno = fault_errno;
        return -1;
    }
    if (world_accept_errno) {
        errno = world_accept_errno;
        return -1;
    }
    for (unsigned i = 0; i < world_client_cnt; i++)
        if (world_client[i]->tag == s->tag) {
            struct sock *c = world_client[i];
            memmove(world_client + i, world_client + i + 1,
                (--world_client_cnt - i) * sizeof world_client[0]);
            return sock_fd(c);
        }
    errno = EAGAIN;
    return -1;
}

static ssize_t w_read(int fd, void *p, size_t len)
{
    struct sock *s = sock_of(fd);
    if (fault_now(s ? CALL_READ : CALL_FILE_READ)) {
        if (fault_errno) {
            errno = fault_errno;
            return -1;
        }
        len = len ? 1 : 0;
    }
    if (!s)
        return read(fd, p, len);
    size_t have = s->in_at > world_ms ? 0 : s->in_len - s->in_off;
    if (have == 0) {
        if (s->in_at > world_ms || (!s->is_eof && !s->is_reset)) {
            errno = EAGAIN;
            return -1;
        }
        errno = ECONNRESET;
        return s->is_reset ? -1 : 0;
    }
    size_t n = have < len ? have : len;
    if (!s->is_udp && n > world_chunk)
        n = world_chunk;
    memcpy(p, s->in + s->in_off, n);
    s->in_off = s->is_udp ? s->in_len : s->in_off + n;
    return (ssize_t)n;
}

static ssize_t w_write(int fd, const void *p, size_t len)
{
    if (fd == 2) {
        if (fault_fits && fault_now(CALL_STDERR)) {
            errno = fault_errno;
            return fault_errno ? -1 : 1;
        }
        size_t room = sizeof log_buf - 1 - log_len;
        size_t n = len < room ? len : room;
        memcpy(log_buf + log_len, p, n);
        log_len += n;
        log_buf[log_len] = 0;
        return (ssize_t)len;
    }
    if (fd == 1 && world_has_out) {
        if (fault_fits && fault_now(CALL_STDERR)) {
            errno = fault_errno;
            if (fault_errno)
                return -1;
            len = 1;
        }
        if (len >= sizeof world_out - world_out_len)
            abort();
        memcpy(world_out + world_out_len, p, len);
        world_out_len += len;
        world_out[world_out_len] = 0;
        return (ssize_t)len;
    }
    struct sock *s = sock_of(fd);
    if (!s)
        return write(fd, p, len);
    if (fault_now(CALL_WRITE)) {
        if (fault_errno) {
            errno = fault_errno;
            return -1;
        }
        len = len && !s->is_udp ? 1 : len;
    }
    if (s->is_peer_closed || s->is_shut) {
        errno = EPIPE;
        return -1;
    }
    if (s->room == 0) {
        errno = EAGAIN;
        return -1;
    }
    size_t n = len < s->room ? len : s->room;
    if (s->room != SIZE_MAX)
        s->room -= n;
    if (s->is_udp || n >= sizeof s->out - s->out_len)
        s->out_len = s->seen = 0;
    if (n >= sizeof s->out)
        abort();
    memcpy(s->out + s->out_len, p, n);
    s->out_len += n;
    s->out[s->out_len] = 0;            /* tests look at it as text */
    if (world_sent)
        world_sent(s);
    return (ssize_t)n;
}

static int w_shutdown(int fd, int how)
{
    struct sock *s = sock_of(fd);
    if (!s)
        return shutdown(fd, how);
    if (fault_fits && fault_fails(CALL_SHUTDOWN))
        return -1;
    s->is_shut = true;
    return 0;
}

static int w_close(int fd)
{
    struct sock *s = sock_of(fd);
    if (!s && fd >= FD_BASE) {       /* closed twice, or never open */
        failed++;
        printf("FAIL %s: close(%d): no such descriptor\n", group, fd);
        errno = EBADF;
        return -1;
    }
    if (!s)
        return close(fd);
    s->used = false;
    free(s->peer);
    s->peer = NULL;
    return 0;
}

static int w_getsockopt(int fd, int level, int name, void *p, socklen_t *len)
{
    struct sock *s = sock_of(fd);
    if (!s)
        return getsockopt(fd, level, name, p, len);
    int err = fault_now(CALL_SO_ERROR) ? fault_errno : 0;
    if (err == ENOSYS) {
        errno = err;
        return -1;
    }
    if (err == EINTR || err == EAGAIN)
        err = 0;
    err = err ? err : s->up_at <= world_ms ? s->dial_errno : 0;
    memcpy(p, &err, sizeof err);
    return 0;
}

static int w_setsockopt(int fd, int level, int name, const void *p,
    socklen_t len)
{
    if (fault_fits && fault_fails(CALL_SET))
        return -1;
    return sock_of(fd) ? 0 : setsockopt(fd, level, name, p, len);
}

static int w_bind(int fd, const struct sockaddr *sa, socklen_t len)
{
    struct sock *s = sock_of(fd);
    if (!s)
        return bind(fd, sa, len);
    if (fault_fits && fault_fails(CALL_BIND))
        return -1;
    memcpy(&s->to, sa, len);
    if (world_has_paths && sa->sa_family == AF_UNIX) {
        const char *path = ((const struct sockaddr_un *)(const void *)sa)
            ->sun_path;
        if (path_find(path)) {
            errno = EADDRINUSE;
            return -1;
        }
        path_add(path);
    }
    return 0;
}

static int w_listen(int fd, int backlog)
{
    struct sock *s = sock_of(fd);
    if (!s)
        return listen(fd, backlog);
    if (fault_fits && fault_fails(CALL_BIND))
        return -1;
    s->is_listener = true;
    return 0;
}

static int w_getsockname(int fd, struct sockaddr *sa, socklen_t *len)
{
    struct sock *s = sock_of(fd);
    if (!s)
        return getsockname(fd, sa, len);
    if (fault_fits && fault_fails(CALL_BIND))
        return -1;
    memcpy(sa, &s->to, *len);
    return 0;
}

static int w_fstatat(int dir, const char *path, struct stat *st, int flags)
{
    if (fault_fits && fault_fails(CALL_FILE))
        return -1;
    return fstatat(dir, path, st, flags);
}

static int w_stat(const char *path, struct stat *st)
{
    if (!world_has_paths)
        return stat(path, st);
    if (fault_fits && fault_fails(CALL_FILE))
        return -1;
    memset(st, 0, sizeof *st);
    st->st_mode = S_IFSOCK;
    errno = ENOENT;
    return path_find(path) ? 0 : -1;
}

static int w_chmod(const char *path, mode_t mode)
{
    if (!world_has_paths)
        return chmod(path, mode);
    if (fault_fits && fault_fails(CALL_FILE))
        return -1;
    errno = ENOENT;
    return path_find(path) ? 0 : -1;
}

static int w_unlink(const char *path)
{
    if (!world_has_paths)
        return unlink(path);
    if (fault_fits && fault_fails(CALL_FILE))
        return -1;
    char *at = path_find(path);
    errno = ENOENT;
    if (at)
        at[0] = 0;
    return at ? 0 : -1;
}

/* What poll says of a socket; *next is the time of its next change. */
static short sock_events(const struct sock *s, short want, int64_t *next)
{
    short got = 0;
    if (s->is_listener) {
        bool has = false;
        for (unsigned i = 0; i < world_client_cnt; i++)
            has |= world_client[i]->tag == s->tag;
        return has ? want & POLLIN : 0;
    }
    if (!s->is_udp && s->up_at > world_ms) {
        if (s->up_at < *next)
            *next = s->up_at;
        return 0;
    }
    if (s->dial_errno)
        got |= POLLERR | POLLHUP | (want & POLLOUT);
    bool has = s->in_len > s->in_off || s->is_eof || s->is_reset;
    if (has && s->in_at > world_ms) {
        if (s->in_at < *next)
            *next = s->in_at;
    } else if (has) {
        got |= want & POLLIN;
        if (s->is_reset)
            got |= POLLERR | POLLHUP;
    }
    if (s->room)
        got |= want & POLLOUT;
    return got;
}

/* Let time pass to the next change. False: the wait is over before it. */
static bool world_pass(int64_t next, int64_t limit)
{
    limit = limit < world_end ? limit : world_end;
    if (next < limit) {
        world_ms = next;
        return true;
    }
    if (limit == INT64_MAX)
        abort();                     /* nothing will ever happen */
    world_ms = limit > world_ms ? limit : world_ms;
    return false;
}

static int w_poll(struct pollfd *p, nfds_t cnt, int ms)
{
    const struct sock *s = cnt == 1 ? sock_of(p->fd) : NULL;
    int64_t next, limit = world_ms + ms;
    if (!s && (cnt != 1 || p->fd != 2))
        return poll(p, cnt, ms);
    if (s && world_poll)
        world_poll();
    if (fault_fits && fault_fails(CALL_POLL))
        return -1;
    if (!s) {                        /* io_log asks */
        p->revents = POLLOUT;
        return 1;
    }
    do {
        next = INT64_MAX;
        p->revents = sock_events(s, p->events, &next);
    } while (!p->revents && world_pass(next, limit));
    return p->revents != 0;
}

/* What epoll_ctl() set, by socket. It is gone when the socket is closed. */
static struct { const struct sock *sock; unsigned serial, events;
    uint64_t data; } world_epoll[SOCK_CNT];

static bool epoll_holds(int at)
{
    const struct sock *s = sock_tab[at];
    return s && s->used && world_epoll[at].sock == s
        && world_epoll[at].serial == s->serial;
}

static int w_epoll_create1(int flags)
{
    (void)flags;
    memset(world_epoll, 0, sizeof world_epoll);
    if (fault_fits && fault_fails(CALL_EPOLL_MAKE))
        return -1;
    return 499;
}

static int w_epoll_ctl(int set, int op, int fd, struct epoll_event *e)
{
    const struct sock *s = sock_of(fd);
    int at = fd - FD_BASE;
    (void)set;
    if (!s || epoll_holds(at) != (op != EPOLL_CTL_ADD)) {
        failed++;
        printf("FAIL %s: epoll_ctl(%d, %d): %s\n", group, op, fd, !s
            ? "no such descriptor" : "added twice, or never");
        errno = s ? EEXIST : EBADF;
        return -1;
    }
    if (fault_fits && fault_fails(CALL_EPOLL_CTL))
        return -1;
    world_epoll[at].sock = op == EPOLL_CTL_DEL ? NULL : s;
    world_epoll[at].serial = s->serial;
    world_epoll[at].events = e->events;
    world_epoll[at].data = e->data.u64;
    return 0;
}

static int w_epoll_pwait(int set, struct epoll_event *out, int cap, int ms,
    const sigset_t *mask)
{
    static int turn;                 /* the kernel serves all by turns */
    (void)set;
    (void)mask;
    if (world_poll)
        world_poll();
    if (fault_fits && fault_fails(CALL_EPOLL))
        return -1;
    int64_t next, limit = ms == INT_MAX ? INT64_MAX : world_ms + ms;
    int ready = 0;
    do {
        next = INT64_MAX;
        for (int i = 0; i < sock_top && ready < cap; i++) {
            int at = (turn + i) % sock_top;
            short got = !epoll_holds(at) ? 0 : sock_events(sock_tab[at],
                (short)world_epoll[at].events, &next);
            if (got)
                out[ready++] = (struct epoll_event){ .events = (uint16_t)got,
                    .data.u64 = world_epoll[at].data };
        }
    } while (!ready && world_pass(next, limit));
    turn += ready == cap;
    return ready;
}

static int w_clock_gettime(clockid_t id, struct timespec *t)
{
    int64_t ms = id == CLOCK_REALTIME ? world_wall + world_ms + world_skew
        : world_ms;
    t->tv_sec = ms / 1000;
    t->tv_nsec = ms % 1000 * 1000000;
    return 0;
}

/* The last 32 bytes that getrandom() gave. */
static uint8_t random_last[32];

static long w_syscall(long number, ...)
{
    long got;
    va_list ap;
    va_start(ap, number);
    long a = va_arg(ap, long), b = va_arg(ap, long), c = va_arg(ap, long);
    long d = va_arg(ap, long), e = va_arg(ap, long);
    va_end(ap);
    if (number == SYS_getrandom) {
        uint8_t *p = (uint8_t *)a;
        if (!world_has_random) {
            errno = ENOSYS;
            return -1;
        }
        if (fault_fits && fault_now(CALL_RANDOM)) {
            errno = fault_errno;
            if (fault_errno)
                return -1;
            b = b ? 1 : 0;
        }
        for (long i = 0; i < b; i++) {
            p[i] = world_is_random ? (uint8_t)(dice() >> 32) : 0;
            memmove(random_last, random_last + 1, sizeof random_last - 1);
            random_last[sizeof random_last - 1] = p[i];
        }
        return b;
    }
    if (kernel_syscall(number, (long[]){ a, b, c, d, e }, &got))
        return got;
    if (number == SYS_openat && fault_fits && fault_fails(CALL_FILE))
        return -1;
    return syscall(number, a, b, c, d, e);
}

/* What TLS contexts are seeded with (S30): a context that is started must
 * have got the 32 bytes that getrandom() gave last, and nobody else may
 * have got them. */
static unsigned tls_started, tls_unseeded;
static const void *tls_seeded;
static uint8_t tls_seed[32];

static void w_inject_entropy(br_ssl_engine_context *eng, const void *p,
    size_t len)
{
    bool ok = len == sizeof tls_seed
        && memcmp(p, random_last, sizeof tls_seed) == 0
        && (memcmp(p, tls_seed, sizeof tls_seed) != 0 || !world_is_random);
    tls_seeded = ok ? eng : NULL;
    if (ok)
        memcpy(tls_seed, p, sizeof tls_seed);
    br_ssl_engine_inject_entropy(eng, p, len);
}

static int w_client_reset(br_ssl_client_context *cc, const char *name,
    int resume)
{
    tls_started++;
    tls_unseeded += tls_seeded != &cc->eng;
    tls_seeded = NULL;
    return br_ssl_client_reset(cc, name, resume);
}

#define br_ssl_engine_inject_entropy(a, b, c) w_inject_entropy(a, b, c)
#define br_ssl_client_reset(a, b, c) w_client_reset(a, b, c)
#define stat(a, b) w_stat(a, b)
#define chmod(a, b) w_chmod(a, b)
#define unlink(a) w_unlink(a)
#define readlink(a, b, c) w_readlink(a, b, c)
#define geteuid() w_geteuid()
#define setgroups(a, b) w_setgroups(a, b)
#define setgid(a) w_setgid(a)
#define setuid(a) w_setuid(a)
#define prctl(a, b, c, d, e) w_prctl(a, (unsigned long)(b), \
    (unsigned long)(c), (unsigned long)(d), (unsigned long)(e))
#define bind(a, b, c) w_bind(a, b, c)
#define listen(a, b) w_listen(a, b)
#define getsockname(a, b, c) w_getsockname(a, b, c)
#define fstatat(a, b, c, d) w_fstatat(a, b, c, d)
#define socket(a, b, c) w_socket(a, b, c)
#define connect(a, b, c) w_connect(a, b, c)
#define accept4(a, b, c, d) w_accept4(a, b, c, d)
#define read(a, b, c) w_read(a, b, c)
#define write(a, b, c) w_write(a, b, c)
#define shutdown(a, b) w_shutdown(a, b)
#define close(a) w_close(a)
#define getsockopt(a, b, c, d, e) w_getsockopt(a, b, c, d, e)
#define setsockopt(a, b, c, d, e) w_setsockopt(a, b, c, d, e)
#define poll(a, b, c) w_poll(a, b, c)
#define epoll_create1(a) w_epoll_create1(a)
#define epoll_ctl(a, b, c, d) w_epoll_ctl(a, b, c, d)
#define epoll_pwait(a, b, c, d, e) w_epoll_pwait(a, b, c, d, e)
#define clock_gettime(a, b) w_clock_gettime(a, b)
#define syscall(...) w_syscall(__VA_ARGS__, 0L, 0L, 0L, 0L, 0L)
#undef _GNU_SOURCE
#define main lkjwt_main
#include "../lkjwt.c"
#undef main
#undef br_ssl_engine_inject_entropy
#undef br_ssl_client_reset
#undef stat
#undef chmod
#undef unlink
#undef readlink
#undef geteuid
#undef setgroups
#undef setgid
#undef setuid
#undef prctl
#undef bind
#undef listen
#undef getsockname
#undef fstatat
#undef socket
#undef connect
#undef accept4
#undef read
#undef write
#undef shutdown
#undef close
#undef getsockopt
#undef setsockopt
#undef poll
#undef epoll_create1
#undef epoll_ctl
#undef epoll_pwait
#undef clock_gettime
#undef syscall

/* ---- comparing ---- */

static const char *ev_label(int code)
{
    static char text[32];
    int e = code < 0 ? -code : code;
    if (code >= 0 || e >= EV_CNT) {
        snprintf(text, sizeof text, "%d", code);
        return text;
    }
    return event_tab[e].label;
}

/* The event of a label, "ok" 0; -1: no such event. */
static int ev_find(const char *label)
{
    if (strcmp(label, "ok") == 0)
        return 0;
    for (int e = 1; e < EV_CNT; e++)
        if (strcmp(event_tab[e].label, label) == 0)
            return e;
    return -1;
}

static bool row_ev(const char *name, int got, int want)
{
    char text[32];
    snprintf(text, sizeof text, "%s", ev_label(want));
    return row(name, got == want, "got %s, want %s", ev_label(got), text);
}

static bool row_int(const char *name, int64_t got, int64_t want)
{
    return row(name, got == want, "got %lld, want %lld", (long long)got,
        (long long)want);
}

static bool row_text(const char *name, sl got, sl want)
{
    return row(name, sl_eq(got, want), "got `%.*s`, want `%.*s`",
        (int)got.len, (const char *)got.p, (int)want.len,
        (const char *)want.p);
}

static bool row_str(const char *name, sl got, const char *want)
{
    return row_text(name, got, sl_str(want));
}

/* ---- vector files ---- */

enum { VEC_FIELDS = 8, VEC_LEN = 200000 };

/* One line of a vector file, its fields unescaped. */
struct vec {
    const char *file;
    int line;
    size_t cnt;
    char *field[VEC_FIELDS];
    size_t len[VEC_FIELDS];
};

static sl vec_sl(const struct vec *v, size_t i)
{
    return i < v->cnt ? (sl){ (uint8_t *)v->field[i], v->len[i] }
                      : (sl){ NULL, 0 };
}

static const char *vec_str(const struct vec *v, size_t i)
{
    return i < v->cnt ? v->field[i] : "";
}

static int hex_digit(int c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f'
        ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* Undo \r \n \t \s \\ \xNN; \{N}TEXT{} is TEXT repeated N times. */
static size_t vec_unescape(char *out, const char *in, size_t len)
{
    size_t n = 0, times = 0, from = 0;
    for (size_t i = 0; i < len; i++) {
        if (times && in[i] == '{' && i + 1 < len && in[i + 1] == '}') {
            size_t unit = n - from;
            for (size_t k = 1; k < times; k++) {
                if (n + unit > VEC_LEN)
                    abort();
                memcpy(out + n, out + from, unit);
                n += unit;
            }
            times = 0;
            i++;
            continue;
        }
        if (in[i] != '\\' || i + 1 == len) {
            out[n++] = in[i];
            continue;
        }
        char c = in[++i];
        if (c == '{') {
            for (i++; in[i] != '}'; i++)
                times = times * 10 + (size_t)(in[i] - '0');
            from = n;
        } else if (c == 'x') {
            out[n++] = (char)(hex_digit(in[i + 1]) << 4
                | hex_digit(in[i + 2]));
            i += 2;
        } else {
            out[n++] = c == 'r' ? '\r' : c == 'n' ? '\n' : c == 't' ? '\t'
                : c == 's' ? ' ' : c;
        }
    }
    out[n] = 0;
    return n;
}

/* The project's folder; a suite may work in another, see unit.c. */
static int top_fd = AT_FDCWD;

static void file_read(const char *path, char *buf, size_t cap, size_t *len)
{
    int fd = openat(top_fd, path, O_RDONLY | O_CLOEXEC);
    FILE *f = fd < 0 ? NULL : fdopen(fd, "rb");
    *len = 0;
    if (!f) {
        row(path, false, "cannot be read");
        return;
    }
    *len = fread(buf, 1, cap - 1, f);
    buf[*len] = 0;
    fclose(f);
}

/* Call use for every line that is neither empty nor a comment. Fields are
 * separated by ` | `. */
static void vec_each(const char *file, void (*use)(struct vec *v))
{
    static char text[1 << 20], mem[VEC_FIELDS][VEC_LEN + 1];
    char path[256];
    size_t len;
    int line = 0;
    snprintf(path, sizeof path, "test/vectors/%s", file);
    file_read(path, text, sizeof text, &len);
    for (char *p = text; p < text + len; ) {
        char *end = memchr(p, '\n', (size_t)(text + len - p));
        end = end ? end : text + len;
        struct vec v = { .file = file, .line = ++line };
        if (p < end && *p != '#') {
            for (char *from = p; from <= end && v.cnt < VEC_FIELDS; ) {
                char *cut = memmem(from, (size_t)(end - from), " | ", 3);
                cut = cut ? cut : end;
                v.field[v.cnt] = mem[v.cnt];
                v.len[v.cnt] = vec_unescape(mem[v.cnt], from,
                    (size_t)(cut - from));
                v.cnt++;
                from = cut + (cut == end ? 1 : 3);
            }
            use(&v);
        }
        p = end + 1;
    }
}

static const char *vec_name(const struct vec *v, const char *text)
{
    return name_of("%s:%d %.80s", v->file, v->line, text);
}

/* Hex digits and 'quoted text' to bytes; `;` starts a comment. */
static size_t hex_parse(const char *in, uint8_t *out, size_t cap)
{
    size_t n = 0;
    for (; *in; in++) {
        if (*in == ';') {
            while (in[1] && in[1] != '\n')
                in++;
        } else if (*in == '\'') {
            while (*++in != '\'' && *in)
                out[n++] = (uint8_t)*in;
        } else if (hex_digit(*in) >= 0 && hex_digit(in[1]) >= 0) {
            out[n++] = (uint8_t)(hex_digit(*in) << 4 | hex_digit(in[1]));
            in++;
        }
        if (n + 1 >= cap)
            abort();
    }
    return n;
}

/* ---- what test/unit/make.py makes ---- */

static void generated(void)
{
    static bool is_made;
    static const char *const made[] = { "test/unit/make.py",
        "build/unit/done" };
    struct stat st[2];
    if (is_made)
        return;
    is_made = true;
    if (stat(made[0], &st[0]) == 0 && stat(made[1], &st[1]) == 0
        && st[1].st_mtime > st[0].st_mtime)
        return;
    int status = system(".deps/venv/bin/python test/unit/make.py");
    row("test/unit/make.py", status == 0, "exit status %d", status);
}
