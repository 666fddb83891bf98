/* Sections 15 to 22 and 26, driven row by row in the scripted world. */

/* ---- 15: the resolver (rows R1 to R3) ---- */

static enum res res_got;
static const struct dns_entry *res_entry;
static sl res_name;
static uint16_t res_type;
static bool res_stale_ok;

static bool res_is_done(void)
{
    res_got = res_exact(res_name, res_type, res_stale_ok, world_ms,
        &res_entry);
    return res_got != RES_WAIT;
}

/* Result of a lookup as text. */
static sl res_run(const char *name, uint16_t type, bool stale_ok)
{
    static uint8_t text[1024];
    struct bb b = BB(text);
    static const char *const word[] = { "wait", "ok", "none", "failed" };
    res_name = sl_str(name);
    res_type = type;
    res_stale_ok = stale_ok;
    (void)net_run(res_is_done, 60000);
    bb_str(&b, word[res_got]);
    for (size_t i = 0, at = 0; res_got == RES_OK && i < res_entry->rec_cnt;
         i++) {
        const uint8_t *p = res_entry->data + at;
        bb_byte(&b, ' ');
        if (type == DNS_SRV) {
            bb_put(&b, (sl){ p + 7, p[6] });
            at += 7U + p[6];
        } else {
            struct ip a = { .v6 = type == DNS_AAAA };
            memcpy(a.b, p, a.v6 ? 16 : 4);
            bb_ip(&b, &a, 0);
            at += a.v6 ? 16 : 4;
        }
    }
    return work_done(&b);
}

static void query_rows(void)
{
    static const struct { const char *name, *script, *want; int asked;
        int64_t ms; const char *log; } tab[] = {
        { "R1 answered", "A:1.2.3.4", "ok 1.2.3.4", 1, 0,
          "a.org/A@10.0.0.53 " },
        { "R1 no such name", "nx", "none", 1, 0, NULL },
        { "R1 no data", "nodata", "none", 1, 0, NULL },
        { "R1 timeout, next server", "drop A:1.2.3.4", "ok 1.2.3.4", 2,
          1500, "a.org/A@10.0.0.53 a.org/A@10.0.1.53 " },
        { "R1 second round", "drop drop A:1.2.3.4", "ok 1.2.3.4", 3, 3000,
          "a.org/A@10.0.0.53 a.org/A@10.0.1.53 a.org/A@10.0.0.53 " },
        { "R1 all silent: 5 s in all", "drop", "failed", 4, 5000, NULL },
        { "R1 server failure", "fail A:1.2.3.4", "ok 1.2.3.4", 2, 0, NULL },
        { "R1 refused", "refuse A:1.2.3.4", "ok 1.2.3.4", 2, 0, NULL },
        { "R1 all fail", "fail", "failed", 4, 0, NULL },
        { "R1 malformed", "bad A:1.2.3.4", "ok 1.2.3.4", 2, 0, NULL },
        { "R1 all malformed", "bad", "failed", 4, 0, NULL },
        { "R1 another id is waited past", "id A:1.2.3.4", "ok 1.2.3.4", 2,
          1500, NULL },
        { "R1 another question is waited past", "ask A:1.2.3.4",
          "ok 1.2.3.4", 2, 1500, NULL },
        { "R1 an empty packet is waited past", "empty A:1.2.3.4",
          "ok 1.2.3.4", 2, 1500, NULL },
        { "R1 port unreachable", "unreach A:1.2.3.4", "ok 1.2.3.4", 2, 0,
          NULL },
        { "R2, R3 cut, then TCP", "cut A:1.2.3.4", "ok 1.2.3.4", 2, 0,
          "a.org/A@10.0.0.53 a.org/A@10.0.0.53/tcp " },
        { "R3 TCP closes", "cut close A:1.2.3.4", "ok 1.2.3.4", 3, 0,
          "a.org/A@10.0.0.53 a.org/A@10.0.0.53/tcp a.org/A@10.0.1.53 " },
        { "R3 TCP ends half way", "cut half A:1.2.3.4", "ok 1.2.3.4", 3, 0,
          NULL },
        { "R3 TCP is reset", "cut unreach A:1.2.3.4", "ok 1.2.3.4", 3, 0,
          NULL },
        { "R3 TCP is silent", "cut drop A:1.2.3.4", "ok 1.2.3.4", 3, 1500,
          NULL },
        { "R3 TCP announces 64 KB", "cut big A:1.2.3.4", "ok 1.2.3.4", 3, 0,
          NULL },
        { "R3 TCP brings another id", "cut id A:1.2.3.4", "ok 1.2.3.4", 3,
          0, NULL },
        { "R3 TCP is cut as well", "cut cut A:1.2.3.4", "ok 1.2.3.4", 3, 0,
          NULL },
        { "R3 TCP fails", "cut fail A:1.2.3.4", "ok 1.2.3.4", 3, 0, NULL },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++)
        for (int drip = 0; drip < 2; drip++) {
            net_reset();
            world_chunk = drip ? 1 : SIZE_MAX;
            zone_add("a.org", "A", tab[i].script);
            int64_t begin = world_ms;
            sl got = res_run("a.org", DNS_A, false);
            bool ok = sl_eq(got, sl_str(tab[i].want))
                && zone_tab[0].asked == (unsigned)tab[i].asked
                && world_ms - begin == tab[i].ms
                && (!tab[i].log || strcmp(tab[i].log, dns_log) == 0);
            row(name_of("%s%s", tab[i].name, drip ? ", byte by byte" : ""),
                ok && net_left()[0] == 0,
                "%.*s, asked %u, %lld ms, %s%s", (int)got.len, got.p,
                zone_tab[0].asked, (long long)(world_ms - begin), dns_log,
                net_left());
        }
}

static void dial_no_tcp(struct sock *s)
{
    if (!s->is_udp) {
        s->up_at = world_ms + 5;
        s->dial_errno = ECONNREFUSED;
    }
}

static void dial_no_tcp_at_once(struct sock *s)
{
    if (!s->is_udp)
        s->now_errno = ENETUNREACH;
}

static void dial_hole_tcp(struct sock *s)
{
    if (!s->is_udp)
        s->up_at = INT64_MAX;
}

static void dial_no_udp(struct sock *s)
{
    if (s->is_udp && strcmp(sock_host(s), "10.0.0.53") == 0)
        s->now_errno = ENETUNREACH;
}

static void query_dial_rows(void)
{
    static const struct { const char *name; void (*dial)(struct sock *);
        const char *script; int64_t ms; unsigned asked; } tab[] = {
        { "R2 TCP refused", dial_no_tcp, "cut A:1.2.3.4", 5, 2 },
        { "R2 TCP refused at once", dial_no_tcp_at_once, "cut A:1.2.3.4", 0,
          2 },
        { "R2 TCP never connects", dial_hole_tcp, "cut A:1.2.3.4", 1500, 2 },
        { "R1 first server unreachable", dial_no_udp, "A:1.2.3.4", 0, 1 },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        net_reset();
        world_dial = tab[i].dial;
        zone_add("a.org", "A", tab[i].script);
        int64_t begin = world_ms;
        sl got = res_run("a.org", DNS_A, false);
        row(tab[i].name, sl_eq(got, SL("ok 1.2.3.4"))
            && zone_tab[0].asked == tab[i].asked
            && world_ms - begin == tab[i].ms && net_left()[0] == 0,
            "%.*s, asked %u, %lld ms%s", (int)got.len, got.p,
            zone_tab[0].asked, (long long)(world_ms - begin), net_left());
    }
}

/* Aliases that need another question; 8 are followed. */
static void alias_rows(void)
{
    static char name[12][24], script[12][24];
    for (int cnt = 7; cnt <= 9; cnt++) {
        net_reset();
        for (int i = 0; i <= cnt; i++) {
            snprintf(name[i], sizeof name[i], "c%d.org", i);
            if (i < cnt)
                snprintf(script[i], sizeof script[i], "more:c%d.org", i + 1);
            else
                strcpy(script[i], "A:1.2.3.4");
            zone_add(name[i], "A", script[i]);
        }
        row_str(name_of("%d aliases, a question each", cnt),
            res_run("c0.org", DNS_A, false), cnt <= LIM_CNAME_CNT
            ? "ok 1.2.3.4" : "none");
    }
    net_reset();
    zone_add("a.org", "A", "more:b.org");
    zone_add("b.org", "A", "more:a.org");
    row("aliases in a circle end", res_run("a.org", DNS_A, false).len > 0
        && res_got == RES_NONE && net_left()[0] == 0, "%s", net_left());
}

/* What is cached, and how long. */
static void cache_rows(void)
{
    static const struct { const char *name, *script; uint32_t ttl;
        int64_t keep_s; } tab[] = {
        { "TTL 300", "A:1.2.3.4", 300, 300 },
        { "TTL 0 counts as 5", "A:1.2.3.4", 0, 5 },
        { "TTL of a week counts as an hour", "A:1.2.3.4", 604800, 3600 },
        { "no such name, no SOA: 5", "nx", 300, 5 },
        { "failure: 5", "fail", 300, 5 },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        net_reset();
        dns_ttl = tab[i].ttl;
        zone_add("a.org", "A", tab[i].script);
        (void)res_run("a.org", DNS_A, false);
        unsigned first = zone_tab[0].asked;
        world_ms += tab[i].keep_s * 1000 - 1;
        (void)res_run("A.ORG", DNS_A, false);
        unsigned kept = zone_tab[0].asked;
        world_ms += 1;
        (void)res_run("a.org", DNS_A, false);
        row(name_of("cache: %s", tab[i].name), kept == first
            && zone_tab[0].asked > first, "asked %u, %u, %u", first, kept,
            zone_tab[0].asked);
    }
    /* a stale address serves the operator's names for an hour more */
    for (int mine = 0; mine < 2; mine++) {
        net_reset();
        zone_add("a.org", "A", "A:1.2.3.4 fail");
        (void)res_run("a.org", DNS_A, mine);
        world_ms += 301000;
        row_str(mine ? "stale for the operator's" : "not for a stranger's",
            res_run("a.org", DNS_A, mine), mine ? "ok 1.2.3.4" : "failed");
        world_ms += 3600000;
        row_str("after an hour for nobody", res_run("a.org", DNS_A, mine),
            "failed");
    }
    net_reset();
    zone_add("a.org", "A", "A:1.2.3.4 nx fail");
    (void)res_run("a.org", DNS_A, true);
    world_ms += 301000;
    row_str("a name that went away", res_run("a.org", DNS_A, true), "none");
    world_ms += 61000;
    row_str("is not brought back by a failure", res_run("a.org", DNS_A,
        true), "failed");
    /* equal questions in flight are one */
    net_reset();
    zone_add("a.org", "A", "drop A:1.2.3.4");
    const struct dns_entry *e;
    for (int i = 0; i < 50; i++)
        (void)!res_exact(SL("a.org"), DNS_A, false, world_ms, &e);
    row("50 equal questions", zone_tab[0].asked == 1, "asked %u",
        zone_tab[0].asked);
    /* a full pool refuses, and frees itself */
    net_reset();
    unsigned waiting = 0, refused = 0;
    for (int i = 0; i < LIM_QUERY_CNT + 10; i++) {
        char name[40];
        snprintf(name, sizeof name, "n%d.org", i);
        zone_tab[0] = (struct zone){ name, "A", "drop", 0 };
        enum res r = res_exact(sl_str(name), DNS_A, false, world_ms, &e);
        waiting += r == RES_WAIT;
        refused += r == RES_FAILED;
    }
    row("the pool of questions", waiting <= LIM_QUERY_CNT
        && waiting > LIM_QUERY_CNT - 40 && waiting + refused
        == LIM_QUERY_CNT + 10 && log_has("event=DNS_FULL"),
        "%u wait, %u refused", waiting, refused);
    zone_tab[0] = (struct zone){ 0 };
    net_run(net_never, 6000);
    row("all are free after 5 s", net_left()[0] == 0, "%s", net_left());
}

/* Addresses of both families, and the 50 ms one waits for the other. */
static struct ip addr_list[LIM_TRY_CNT];
static size_t addr_cnt;
static int64_t addr_first;
static sl addr_host;
static struct res_how addr_how;

static bool addr_is_done(void)
{
    res_got = res_addresses(addr_host, addr_how, world_ms, &addr_first,
        addr_list, &addr_cnt);
    if (res_got == RES_WAIT && addr_first)
        loop_set(KIND_SIGNAL, 0, -1, 0, addr_first + LIM_RESOLUTION_MS);
    return res_got != RES_WAIT;
}

/* The addresses of a host as text. */
static sl addr_run(const char *host, bool search)
{
    static uint8_t text[400];
    struct bb b = BB(text);
    addr_host = sl_str(host);
    addr_how = (struct res_how){ search, false };
    addr_first = 0;
    (void)net_run(addr_is_done, 60000);
    for (size_t k = 0; res_got == RES_OK && k < addr_cnt; k++) {
        bb_ip(&b, &addr_list[k], 0);
        bb_byte(&b, ' ');
    }
    if (res_got != RES_OK)
        bb_str(&b, res_got == RES_NONE ? "none" : "failed");
    return work_done(&b);
}

static void family_rows(void)
{
    static const struct { const char *name, *host, *a, *aaaa, *want;
        int64_t ms; } tab[] = {
        { "IPv6 first, then in turn", "a.org", "A:1.1.1.1,2.2.2.2",
          "AAAA:::1,::2", "[::1] 1.1.1.1 [::2] 2.2.2.2 ", 0 },
        { "four at most", "a.org", "A:1.1.1.1,2.2.2.2,3.3.3.3,4.4.4.4",
          "AAAA:::1,::2,::3,::4,::5", "[::1] 1.1.1.1 [::2] 2.2.2.2 ", 0 },
        { "IPv4 alone", "a.org", "A:1.1.1.1", "nx", "1.1.1.1 ", 0 },
        { "IPv6 alone", "a.org", "nodata", "AAAA:::1", "[::1] ", 0 },
        { "AAAA is silent: 50 ms", "a.org", "A:1.1.1.1", "drop",
          "1.1.1.1 ", 50 },
        { "A is silent: 50 ms", "a.org", "drop", "AAAA:::1", "[::1] ", 50 },
        { "AAAA fails", "a.org", "A:1.1.1.1", "fail", "1.1.1.1 ", 0 },
        { "none", "a.org", "nx", "nodata", "none", 0 },
        { "one fails, one none", "a.org", "nx", "fail", "failed", 0 },
        { "both silent", "a.org", "drop", "drop", "failed", 5000 },
        { "hosts file", "inhosts", "drop", "drop", "[fd00::7] 10.9.8.7 ",
          0 },
        { "hosts file, one family: the other is not asked", "v4only",
          "drop", "drop", "10.9.8.6 ", 0 },
    };
    file_write("hosts2",
        "10.9.8.7 inhosts\nfd00::7 inhosts\n10.9.8.6 v4only\n");
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        net_reset();
        cfg.hosts_file = SL("hosts2\0");
        zone_add("a.org", "A", tab[i].a);
        zone_add("a.org", "AAAA", tab[i].aaaa);
        int64_t begin = world_ms;
        sl got = addr_run(tab[i].host, false);
        row(name_of("addresses: %s", tab[i].name),
            sl_eq(got, sl_str(tab[i].want))
            && world_ms - begin == tab[i].ms, "%.*s, %lld ms", (int)got.len,
            got.p, (long long)(world_ms - begin));
    }
}

/* resolv.conf's search list and ndots: names asked, in order. */
static void search_rows(void)
{
    static const struct { const char *name; int ndots; bool search;
        const char *log, *want; } tab[] = {
        { "db", 1, true, "db.x.org/A db.y.org/A ", "1.2.3.4 " },
        { "db", 0, true, "db/A db.x.org/A db.y.org/A ", "1.2.3.4 " },
        { "db", 1, false, "db/A ", "none" },
        { "db.", 1, true, "db/A ", "none" },
        { "nosuch", 1, true, "nosuch.x.org/A nosuch.y.org/A nosuch/A ",
          "none" },
        { "a.b", 1, true, "a.b/A a.b.x.org/A a.b.y.org/A ", "none" },
        { "a.b", 2, true, "a.b.x.org/A a.b.y.org/A a.b/A ", "none" },
        { "bare", 1, true, "bare.x.org/A bare.y.org/A bare/A ",
          "5.6.7.8 " },
        { "half", 1, true, "half.x.org/A half.x.org/A half.x.org/A "
          "half.x.org/A half.y.org/A ", "1.2.3.4 " },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        net_reset();
        struct resolv *r = &cfg.resolver;
        r->ndots = (uint8_t)tab[i].ndots;
        r->search_cnt = 2;
        for (int k = 0; k < 2; k++) {
            r->search[k].len = 5;
            memcpy(r->search[k].text, k ? "y.org" : "x.org", 5);
        }
        zone_add("db.y.org", "A", "A:1.2.3.4");
        zone_add("bare", "A", "A:5.6.7.8");
        zone_add("half.x.org", "A", "fail");
        zone_add("half.y.org", "A", "A:1.2.3.4");
        row_str(name_of("search %s, ndots %d%s", tab[i].name, tab[i].ndots,
                        tab[i].search ? "" : ", no list"),
            addr_run(tab[i].name, tab[i].search), tab[i].want);
        char plain[8192] = "";
        for (char *p = strtok(dns_log, " "); p; p = strtok(NULL, " "))
            if (strstr(p, "/A@")) {
                strncat(plain, p, strcspn(p, "@"));
                strcat(plain, " ");
            }
        row_str(name_of("search %s, names asked", tab[i].name),
            sl_str(plain), tab[i].log);
    }
}

static void test_resolver(void)
{
    query_rows();
    query_dial_rows();
    alias_rows();
    cache_rows();
    search_rows();
    family_rows();
    /* every question: a new socket, its own id */
    net_reset();
    unsigned before = world_sockets;
    for (int i = 0; i < 100; i++) {
        char name[40];
        snprintf(name, sizeof name, "n%d.org", i);
        (void)res_run(name, DNS_A, false);
    }
    row_int("100 questions, 100 sockets", world_sockets - before, 100);
}

/* ---- 17: one HTTP call (rows U1 to U9) ---- */

#define OK_REPLY "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"

static struct up *up_test;

static bool up_is_over(void)
{
    return up_test->state == UP_DONE || up_test->state == UP_FAILED;
}

static int up_test_len;              /* of the request's body */

static void up_test_build(uint16_t idx, struct bb *b)
{
    (void)idx;
    bb_str(b, "POST /x HTTP/1.1\r\nHost: a.org\r\nContent-Length: ");
    bb_u64(b, (uint64_t)up_test_len);
    bb_str(b, "\r\n\r\n");
    for (int i = 0; i < up_test_len; i++)
        bb_byte(b, 'x');
}

struct up_opt { bool tls, denied; const char *host; enum class class;
    size_t cap; int64_t ms; int body; };

/* Open one call to a.org as the options say. */
static struct up *up_begin_test(struct up_opt o)
{
    up_test_len = o.body;
    struct up_call c = { .owner = KIND_EXCHANGE, .label = TL_SFU,
        .trust = { o.class, !o.denied }, .is_tls = o.tls,
        .host = sl_str(o.host ? o.host : "a.org"),
        .port = o.tls ? 443 : 80,
        .cert_name = sl_str(o.host ? o.host : "a.org"),
        .reply_cap = o.cap ? o.cap : 1000,
        .end = world_ms + (o.ms ? o.ms : 20000), .build = up_test_build };
    up_test = up_open(&c, 0, LIM_UP_CNT, world_ms);
    return up_test;
}

/* Outcome as text: status and body, or event at step. */
static sl up_text(const struct up *u)
{
    static uint8_t text[600];
    struct bb b = BB(text);
    if (u->state == UP_DONE) {
        bb_u64(&b, u->head.status);
        bb_byte(&b, ' ');
        sl body = { up_body(up_test), u->intake.len };
        if (body.len < 100)
            bb_put(&b, body);
        else
            bb_u64(&b, body.len);
    } else if (u->state == UP_FAILED) {
        bb_str(&b, event_tab[u->why].label);
        bb_byte(&b, ' ');
        bb_str(&b, u->step);
    } else {
        bb_str(&b, "unfinished");
    }
    return work_done(&b);
}

/* Nothing is left once the kept connections' minute is over. */
static const char *net_left_later(void)
{
    net_run(net_never, LIM_KEPT_MS + 10000);
    return net_left();
}

static char long_body[9000], long_head[20000];

static void call_rows(void)
{
#define A1 "A:10.0.0.1"
#define A12 "A:10.0.0.1,10.0.0.2"
#define S(n) "10.0.0." #n, 80
    static const struct { const char *name, *a, *want; struct site site[3];
        struct up_opt opt; int64_t ms; } tab[] = {
        /* U1 */
        { "U1 no such name", "nx", "DNS_NONE address", { { 0 } }, { 0 }, 0 },
        { "U1 servers fail", "fail", "DNS_FAILED address", { { 0 } }, { 0 },
          0 },
        { "U1 servers silent", "drop", "DNS_FAILED address", { { 0 } },
          { 0 }, 5000 },
        { "U1 the call's own end", "drop", "DNS_FAILED address", { { 0 } },
          { .ms = 700 }, 700 },
        /* U2 */
        { "U2 dialled", A1, "200 {}", { { S(1), .reply = { OK_REPLY } } },
          { 0 }, 1 },
        { "U2 refused", A1, "CONNECT_FAILED connect", { { S(1),
          .dial = DIAL_REFUSE } }, { 0 }, 1 },
        { "U2 refused at once", A1, "CONNECT_FAILED connect", { { S(1),
          .dial = DIAL_AT_ONCE } }, { 0 }, 0 },
        { "U2 refused, next", A12, "200 {}", { { S(1), .dial = DIAL_REFUSE },
          { S(2), .reply = { OK_REPLY } } }, { 0 }, 2 },
        { "U2 refused at once, next", A12, "200 {}", { { S(1),
          .dial = DIAL_AT_ONCE }, { S(2), .reply = { OK_REPLY } } }, { 0 },
          1 },
        { "U2 all refused", A12, "CONNECT_FAILED connect", { { S(1),
          .dial = DIAL_REFUSE }, { S(2), .dial = DIAL_REFUSE } }, { 0 }, 2 },
        { "U2 silent: the next after 250 ms", A12, "200 {}", { { S(1),
          .dial = DIAL_HOLE }, { S(2), .reply = { OK_REPLY } } }, { 0 },
          251 },
        { "U2 slow, the next is faster", A12, "200 {}", { { S(1),
          .dial = DIAL_SLOW }, { S(2), .reply = { OK_REPLY } } }, { 0 },
          251 },
        { "U2 slow, the next refused", A12, "200 {}", { { S(1),
          .dial = DIAL_SLOW, .reply = { OK_REPLY } },
          { S(2), .dial = DIAL_REFUSE } }, { 0 }, 400 },
        { "U2 silent: 5 s", A1, "CONNECT_TIMEOUT connect", { { S(1),
          .dial = DIAL_HOLE } }, { 0 }, 5000 },
        { "U2 two silent: 5 s", A12, "CONNECT_TIMEOUT connect", { { S(1),
          .dial = DIAL_HOLE }, { S(2), .dial = DIAL_HOLE } }, { 0 }, 5000 },
        { "U2 the call's own end", A1, "CONNECT_TIMEOUT connect", { { S(1),
          .dial = DIAL_HOLE } }, { .ms = 900 }, 900 },
        { "U2 denied", A1, "SSRF_DENIED connect", { { S(1),
          .reply = { OK_REPLY } } }, { .denied = true }, 0 },
        { "U2 denied, the next is not", "A:10.0.0.1,9.9.9.9", "200 {}",
          { { "9.9.9.9", 80, .reply = { OK_REPLY } } }, { .denied = true },
          1 },
        { "U2 never an address of class N", "A:0.0.0.0,224.0.0.1",
          "SSRF_DENIED connect", { { 0 } }, { .class = CLASS_OPERATOR }, 0 },
        { "U2 literal", "nx", "200 {}", { { S(1), .reply = { OK_REPLY } } },
          { .host = "10.0.0.1" }, 1 },
        { "U2 literal IPv6", "nx", "200 {}", { { "fd00::1", 80,
          .reply = { OK_REPLY } } }, { .host = "[fd00::1]" }, 1 },
        /* U5 */
        { "U5 takes ten bytes: 10 s", A1, "HS_TIMEOUT http", { { S(1),
          .no_write = true } }, { 0 }, 10001 },
        { "U5 a long request", A1, "200 {}", { { S(1),
          .reply = { OK_REPLY } } }, { .body = 8000 }, 1 },
        /* U6 */
        { "U6 silent: 10 s", A1, "HS_TIMEOUT http", { { S(1),
          .reply = { "" } } }, { 0 }, 10001 },
        { "U6 half a head: 10 s", A1, "HS_TIMEOUT http", { { S(1),
          .reply = { "HTTP/1.1 200 OK\r\n" } } }, { 0 }, 10001 },
        { "U6 half a body: 10 s", A1, "HS_TIMEOUT http", { { S(1), .reply = {
          "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{}" } } }, { 0 },
          10001 },
        { "U6 late: 9.9 s", A1, "200 {}", { { S(1), .reply = { OK_REPLY },
          .slow_ms = 9900 } }, { 0 }, 9901 },
        { "U6 the call's own end", A1, "HS_TIMEOUT http", { { S(1),
          .reply = { "" } } }, { .ms = 300 }, 300 },
        { "U6 closed", A1, "REPLY_CLOSED http", { { S(1),
          .reply = { "~" } } }, { 0 }, 1 },
        { "U6 reset", A1, "REPLY_CLOSED http", { { S(1),
          .reply = { "^" } } }, { 0 }, 1 },
        { "U6 closed in the head", A1, "REPLY_CLOSED http", { { S(1),
          .reply = { "~HTTP/1.1 200" } } }, { 0 }, 1 },
        { "U6 closed in the body", A1, "REPLY_CLOSED http", { { S(1),
          .reply = { "~HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{}" } } },
          { 0 }, 1 },
        { "U6 closed in the chunks", A1, "REPLY_CLOSED http", { { S(1),
          .reply = { "~HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
          "2\r\n{}\r\n0\r\n" } } }, { 0 }, 1 },
        { "U6 chunks", A1, "200 {\"a\":1}", { { S(1), .reply = {
          "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
          "3\r\n{\"a\r\n4;x\r\n\":1}\r\n0\r\nX: y\r\n\r\n" } } }, { 0 }, 1 },
        { "U6 until the end", A1, "200 {}", { { S(1), .reply = {
          "~HTTP/1.0 200 OK\r\n\r\n{}" } } }, { 0 }, 1 },
        { "U6 until a reset", A1, "REPLY_CLOSED http", { { S(1), .reply = {
          "^HTTP/1.0 200 OK\r\n\r\n{}" } } }, { 0 }, 1 },
        { "U6 no body", A1, "204 ", { { S(1), .reply = {
          "HTTP/1.1 204 No Content\r\n\r\n" } } }, { 0 }, 1 },
        { "U6 interim replies", A1, "200 {}", { { S(1), .reply = {
          "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nLink: x\r\n"
          "\r\n" OK_REPLY } } }, { 0 }, 1 },
        { "U6 four interim replies", A1, "200 {}", { { S(1), .reply = {
          "HTTP/1.1 100 a\r\n\r\nHTTP/1.1 100 a\r\n\r\nHTTP/1.1 100 a\r\n\r\n"
          "HTTP/1.1 100 a\r\n\r\n" OK_REPLY } } }, { 0 }, 1 },
        { "U6 five interim replies", A1, "REPLY_LIMIT http", { { S(1),
          .reply = { "HTTP/1.1 100 a\r\n\r\nHTTP/1.1 100 a\r\n\r\n"
          "HTTP/1.1 100 a\r\n\r\nHTTP/1.1 100 a\r\n\r\nHTTP/1.1 100 a\r\n\r\n"
          OK_REPLY } } }, { 0 }, 1 },
        { "U6 switching protocols", A1, "REPLY_BAD http", { { S(1),
          .reply = { "HTTP/1.1 101 Switching\r\n\r\n" } } }, { 0 }, 1 },
        { "U6 no HTTP", A1, "REPLY_BAD http", { { S(1), .reply = {
          "SSH-2.0-OpenSSH\r\n\r\n" } } }, { 0 }, 1 },
        { "U6 HTTP/2", A1, "REPLY_BAD http", { { S(1), .reply = {
          "HTTP/2.0 200 OK\r\n\r\n" } } }, { 0 }, 1 },
        { "U6 both lengths", A1, "REPLY_BAD http", { { S(1), .reply = {
          "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n"
          "Transfer-Encoding: chunked\r\n\r\n{}" } } }, { 0 }, 1 },
        { "U6 two lengths", A1, "REPLY_BAD http", { { S(1), .reply = {
          "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n"
          "{}" } } }, { 0 }, 1 },
        { "U6 bad chunk", A1, "REPLY_BAD http", { { S(1), .reply = {
          "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" } } },
          { 0 }, 1 },
        { "U6 compressed", A1, "REPLY_BAD http", { { S(1), .reply = {
          "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2"
          "\r\n\r\n{}" } } }, { 0 }, 1 },
        { "U6 identity is no compression", A1, "200 {}", { { S(1),
          .reply = { "HTTP/1.1 200 OK\r\nContent-Encoding: identity\r\n"
          "Content-Length: 2\r\n\r\n{}" } } }, { 0 }, 1 },
        { "U6 too long by its length", A1, "REPLY_LIMIT http", { { S(1),
          .reply = { "HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n" } } },
          { 0 }, 1 },
        { "U6 too long by its bytes", A1, "REPLY_LIMIT http", { { S(1),
          .reply = { long_body } } }, { 0 }, 1 },
        { "U6 long, allowed", A1, "200 8000", { { S(1),
          .reply = { long_body } } }, { .cap = 8000 }, 1 },
        { "U6 too long a head", A1, "REPLY_LIMIT http", { { S(1),
          .reply = { long_head } } }, { 0 }, 1 },
        { "U6 an error with a body", A1, "500 oops", { { S(1), .reply = {
          "HTTP/1.1 500 x\r\nContent-Length: 4\r\n\r\noops" } } }, { 0 },
          1 },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++)
        for (int drip = 0; drip < 2; drip++) {
            net_reset();
            world_chunk = drip ? 1 : SIZE_MAX;
            zone_add("a.org", "A", tab[i].a);
            memcpy(site_tab, tab[i].site, sizeof tab[i].site);
            int64_t begin = world_ms;
            (void)up_begin_test(tab[i].opt);
            bool over = net_run(up_is_over, 60000);
            sl got = up_text(up_test);
            int64_t ms = world_ms - begin;
            static uint8_t keep[600];
            memcpy(keep, got.p, got.len);
            got.p = keep;
            up_close(up_test, world_ms);
            const char *left = net_left_later();
            row(name_of("%s%s", tab[i].name, drip ? ", byte by byte" : ""),
                over && sl_eq(got, sl_str(tab[i].want))
                && ms == tab[i].ms && left[0] == 0, "%.*s, %lld ms, %s",
                (int)got.len, got.p, (long long)ms, left);
        }
}

/* TLS: rows U3 and U4. */
static void tls_rows(void)
{
    static const struct { const char *name, *a, *want; struct site site[3];
        int64_t ms; } tab[] = {
        { "U4 handshake", A1, "200 {}", { { "10.0.0.1", 443,
          .tls = TLS_YES, .san = "a.org", .reply = { OK_REPLY } } }, 1 },
        { "U4 another name", A1, "TLS_NAME tls", { { "10.0.0.1", 443,
          .tls = TLS_YES, .san = "b.org" } }, 1 },
        { "U4 refused for its name, next", A12, "200 {}", { { "10.0.0.1",
          443, .tls = TLS_YES, .san = "b.org" }, { "10.0.0.2", 443,
          .tls = TLS_YES, .san = "a.org", .reply = { OK_REPLY } } }, 2 },
        { "U4 protocol_version", A1, "TLS_VERSION tls", { { "10.0.0.1", 443,
          .tls = TLS_OLD_ALERT } }, 1 },
        { "U4 handshake_failure", A1, "TLS_REFUSED tls", { { "10.0.0.1",
          443, .tls = TLS_REFUSE } }, 1 },
        { "U4 closed", A1, "TLS_CLOSED tls", { { "10.0.0.1", 443,
          .tls = TLS_CLOSE } }, 1 },
        { "U4 reset", A1, "TLS_CLOSED tls", { { "10.0.0.1", 443,
          .tls = TLS_RESET } }, 1 },
        { "U4 no TLS there", A1, "TLS_NONE tls", { { "10.0.0.1", 443,
          .tls = TLS_NOISE } }, 1 },
        { "U4 silent: 5 s", A1, "TLS_TIMEOUT tls", { { "10.0.0.1", 443,
          .tls = TLS_SILENT } }, 5001 },
        { "U4 takes ten bytes: 5 s", A1, "TLS_TIMEOUT tls", { { "10.0.0.1",
          443, .tls = TLS_YES, .san = "a.org", .no_write = true } }, 5001 },
        { "U4 eight certificates", A1, "200 {}", { { "10.0.0.1", 443,
          .tls = TLS_YES, .san = "a.org", .reply = { OK_REPLY },
          .inters = 7 } }, 1 },
        { "U4 nine certificates", A1, "TLS_CHAIN tls", { { "10.0.0.1", 443,
          .tls = TLS_YES, .san = "a.org", .inters = 8 } }, 1 },
        { "U4 closed, next", A12, "200 {}", { { "10.0.0.1", 443,
          .tls = TLS_CLOSE }, { "10.0.0.2", 443, .tls = TLS_YES,
          .san = "a.org", .reply = { OK_REPLY } } }, 2 },
        { "U6 TLS until close_notify is missing", A1, "REPLY_CLOSED http",
          { { "10.0.0.1", 443, .tls = TLS_YES, .san = "a.org",
          .reply = { "~HTTP/1.1 200 OK\r\n\r\n{}" } } }, 1 },
        { "U6 TLS closed in the body", A1, "REPLY_CLOSED http", { {
          "10.0.0.1", 443, .tls = TLS_YES, .san = "a.org", .reply = {
          "~HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{}" } } }, 1 },
        { "U6 TLS, a long reply", A1, "REPLY_LIMIT http", { { "10.0.0.1",
          443, .tls = TLS_YES, .san = "a.org", .reply = { long_body } } },
          1 },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++)
        for (int drip = 0; drip < 2; drip++) {
            net_reset();
            world_chunk = drip ? 100 : SIZE_MAX;
            zone_add("a.org", "A", tab[i].a);
            memcpy(site_tab, tab[i].site, sizeof tab[i].site);
            int64_t begin = world_ms;
            (void)up_begin_test((struct up_opt){ .tls = true });
            bool over = net_run(up_is_over, 60000);
            sl got = up_text(up_test);
            int64_t ms = world_ms - begin;
            static uint8_t keep[600];
            memcpy(keep, got.p, got.len);
            got.p = keep;
            bool has_sni = tab[i].ms != 1 || sl_ends(got, SL("tls"))
                || strcmp(site_tab[0].sni, "a.org") == 0;
            up_close(up_test, world_ms);
            const char *left = net_left_later();
            row(name_of("%s%s", tab[i].name, drip ? ", in pieces" : ""),
                over && sl_eq(got, sl_str(tab[i].want))
                && ms == tab[i].ms && left[0] == 0 && has_sni,
                "%.*s, %lld ms, SNI `%s`, %s", (int)got.len, got.p,
                (long long)ms, site_tab[0].sni, left);
        }
    /* the insecure switch accepts another name */
    net_reset();
    cfg.insecure = true;
    zone_add("a.org", "A", A1);
    site_tab[0] = (struct site){ .host = "10.0.0.1", .port = 443,
        .tls = TLS_YES, .san = "b.org", .reply = { OK_REPLY } };
    (void)up_begin_test((struct up_opt){ .tls = true });
    (void)net_run(up_is_over, 60000);
    row_str("U4 checks off", up_text(up_test), "200 {}");
    up_close(up_test, world_ms);
    /* a trailing dot is no part of the names in TLS */
    net_reset();
    zone_add("a.org", "A", A1);
    site_tab[0] = (struct site){ .host = "10.0.0.1", .port = 443,
        .tls = TLS_YES, .san = "a.org", .reply = { OK_REPLY } };
    (void)up_begin_test((struct up_opt){ .tls = true, .host = "a.org." });
    (void)net_run(up_is_over, 60000);
    row("U4 a trailing dot", sl_eq(up_text(up_test), SL("200 {}"))
        && strcmp(site_tab[0].sni, "a.org") == 0, "%.*s, %s",
        (int)up_text(up_test).len, up_text(up_test).p, site_tab[0].sni);
    up_close(up_test, world_ms);
    /* an address has no SNI */
    net_reset();
    site_tab[0] = (struct site){ .host = "10.0.0.1", .port = 443,
        .tls = TLS_YES, .san = "10.0.0.1", .reply = { OK_REPLY } };
    (void)up_begin_test((struct up_opt){ .tls = true, .host = "10.0.0.1" });
    (void)net_run(up_is_over, 60000);
    row("U4 an address, no SNI", sl_eq(up_text(up_test), SL("200 {}"))
        && site_tab[0].sni[0] == 0, "%s", site_tab[0].sni);
    up_close(up_test, world_ms);
    /* U3: all slots taken by silent peers; one becomes free */
    net_reset();
    struct up *u[LIM_HS_CNT + 2];
    static char name[LIM_HS_CNT + 2][20], san[LIM_HS_CNT + 2][20];
    for (int i = 0; i < LIM_HS_CNT + 2; i++) {
        snprintf(san[i], sizeof san[i], "n%d.org", i);
        snprintf(name[i], sizeof name[i], "10.0.2.%d", i + 1);
        static char script[LIM_HS_CNT + 2][30];
        snprintf(script[i], sizeof script[i], "A:10.0.2.%d", i + 1);
        zone_add(san[i], "A", script[i]);
        site_tab[i] = (struct site){ .host = name[i], .port = 443,
            .tls = i < LIM_HS_CNT ? TLS_SILENT : TLS_YES, .san = san[i],
            .reply = { OK_REPLY } };
        u[i] = up_begin_test((struct up_opt){ .tls = true, .host = san[i],
            .class = CLASS_OPERATOR });
    }
    net_run(net_never, 1000);
    unsigned in_tls = 0, waiting = 0;
    for (int i = 0; i < LIM_HS_CNT + 2; i++) {
        in_tls += u[i]->state == UP_TLS;
        waiting += u[i]->state == UP_TLS_SLOT;
    }
    row("U3 eight handshakes, two wait", in_tls == LIM_HS_CNT
        && waiting == 2, "%u, %u wait", in_tls, waiting);
    struct up *own = up_begin_test((struct up_opt){ .tls = true,
        .host = san[LIM_HS_CNT], .class = CLASS_OPERATOR, .ms = 500 });
    net_run(net_never, 600);
    row("U3 the call's own end", sl_eq(up_text(own), SL("TLS_BUDGET tls")),
        "%.*s", (int)up_text(own).len, up_text(own).p);
    up_close(own, world_ms);
    up_close(u[3], world_ms);
    net_run(net_never, 100);
    row("U3 the longest waiting is next", u[LIM_HS_CNT]->state == UP_DONE
        && u[LIM_HS_CNT + 1]->state == UP_DONE, "%d, %d",
        u[LIM_HS_CNT]->state, u[LIM_HS_CNT + 1]->state);
    for (int i = 0; i < LIM_HS_CNT + 2; i++)
        up_close(u[i], world_ms);
    row("U3 nothing is left", net_left_later()[0] == 0, "%s", net_left());
}

/* Kept connections, and what may be repeated. */
static void kept_rows(void)
{
    static const struct { const char *name; struct site site;
        int64_t pause_ms; bool break_it; const char *first, *second;
        int dials, requests; } tab[] = {
        { "kept and used again", { .reply = { OK_REPLY } }, 100, false,
          "200 {}", "200 {}", 1, 2 },
        { "kept for a minute", { .reply = { OK_REPLY } }, 59999, false,
          "200 {}", "200 {}", 1, 2 },
        { "not for longer", { .reply = { OK_REPLY } }, 60001, false,
          "200 {}", "200 {}", 2, 2 },
        { "the peer closes meanwhile", { .reply = { OK_REPLY } }, 100, true,
          "200 {}", "200 {}", 2, 2 },
        { "it dies before a reply byte: repeated once", { .reply = {
          OK_REPLY, "~", OK_REPLY } }, 100, false, "200 {}", "200 {}", 2,
          3 },
        { "it dies, and so does the new one", { .reply = { OK_REPLY, "~",
          "~" } }, 100, false, "200 {}", "REPLY_CLOSED http", 2, 3 },
        { "it is reset before a reply byte", { .reply = { OK_REPLY, "^",
          OK_REPLY } }, 100, false, "200 {}", "200 {}", 2, 3 },
        { "it dies after a reply byte: not repeated", { .reply = { OK_REPLY,
          "~H", OK_REPLY } }, 100, false, "200 {}", "REPLY_CLOSED http", 1,
          2 },
        { "Connection: close", { .reply = { "HTTP/1.1 200 OK\r\n"
          "Connection: close\r\nContent-Length: 2\r\n\r\n{}" } }, 100, false,
          "200 {}", "200 {}", 2, 2 },
        { "HTTP/1.0", { .reply = { "HTTP/1.0 200 OK\r\nContent-Length: 2"
          "\r\n\r\n{}" } }, 100, false, "200 {}", "200 {}", 2, 2 },
        { "bytes behind the reply", { .reply = { OK_REPLY "x" } }, 100,
          false, "200 {}", "200 {}", 2, 2 },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++)
        for (int tls = 0; tls < 2; tls++) {
            net_reset();
            zone_add("a.org", "A", A1);
            site_tab[0] = tab[i].site;
            site_tab[0].host = "10.0.0.1";
            site_tab[0].port = tls ? 443 : 80;
            site_tab[0].tls = tls ? TLS_YES : TLS_NO;
            site_tab[0].san = "a.org";
            (void)up_begin_test((struct up_opt){ .tls = tls });
            (void)net_run(up_is_over, 60000);
            bool first = sl_eq(up_text(up_test), sl_str(tab[i].first));
            up_close(up_test, world_ms);
            net_run(net_never, tab[i].pause_ms);
            for (int k = 0; tab[i].break_it && k < SOCK_CNT; k++)
                if (sock_tab[k] && sock_tab[k]->used)
                    sock_tab[k]->is_eof = true;
            if (tab[i].break_it)
                net_run(net_never, 10);
            (void)up_begin_test((struct up_opt){ .tls = tls });
            (void)net_run(up_is_over, 60000);
            sl got = up_text(up_test);
            bool second = sl_eq(got, sl_str(tab[i].second));
            up_close(up_test, world_ms);
            int dials = site_tab[0].dials, requests = site_tab[0].requests;
            row(name_of("%s%s", tab[i].name, tls ? ", TLS" : ""), first
                && second && dials == tab[i].dials
                && requests == tab[i].requests && net_left_later()[0] == 0,
                "%d, %.*s, %d dials, %d requests %s", first, (int)got.len,
                got.p, dials, requests, net_left());
        }
    /* a second handshake is resumed, not with checks off, nor when the
     * certificate has ended meanwhile, nor after an hour */
    for (int k = 0; k < 4; k++) {
        static const char *const name[] = { "a session is resumed",
            "not an hour later", "not with checks turned off",
            "not past the certificate's end" };
        net_reset();
        zone_add("a.org", "A", A1);
        site_tab[0] = (struct site){ .host = "10.0.0.1", .port = 443,
            .tls = TLS_YES, .san = "a.org", .reply = { OK_REPLY } };
        if (k == 3) {
            sl leaf = cert_make((struct plan){ .key = K_LEAF,
                .signer = K_INTER, .issuer = "inter", .san = "a.org",
                .until = "261231235959Z" });
            site_make(&site_tab[0]);
            memcpy(site_tab[0].leaf, leaf.p, leaf.len);
            site_tab[0].chain[0].data_len = leaf.len;
            world_wall = 1798761500000 - world_ms;   /* 299 s before it */
        }
        uint64_t before = met.resumed, shakes = met.handshakes;
        (void)up_begin_test((struct up_opt){ .tls = true });
        (void)net_run(up_is_over, 60000);
        up_close(up_test, world_ms);
        net_run(net_never, k == 1 ? 3601000 : k == 3 ? 310000 : 70000);
        cfg.insecure = k == 2;
        (void)up_begin_test((struct up_opt){ .tls = true });
        (void)net_run(up_is_over, 60000);
        row(name[k], met.resumed - before == (k == 0)
            && met.handshakes - shakes == (k == 3 ? 1 : 2)
            && sl_eq(up_text(up_test), k == 3 ? SL("TLS_EXPIRED tls")
                     : SL("200 {}")), "%llu resumed, %.*s",
            (unsigned long long)(met.resumed - before),
            (int)up_text(up_test).len, up_text(up_test).p);
        up_close(up_test, world_ms);
    }
}

/* U9: calls for strangers per address, whatever names lead there. */
static void addr_rows(void)
{
    enum { MORE = 3 };
    struct up *u[LIM_DEST_OPEN + MORE];
    for (int open = 0; open < 2; open++) {
        int cap = open ? LIM_DEST_OPEN : LIM_DEST_ADDR;
        net_reset();
        cfg.is_open = open;
        site_tab[0] = (struct site){ .host = "10.0.0.1", .port = 80,
            .slow_ms = 3000, .reply = { OK_REPLY } };
        site_tab[1] = (struct site){ .host = "10.0.0.2", .port = 80,
            .reply = { OK_REPLY } };
        for (int i = 0; i < cap + MORE; i++)
            u[i] = up_begin_test((struct up_opt){ .host = "10.0.0.1" });
        net_run(net_never, 100);
        int out = 0, waiting = 0;
        for (int i = 0; i < cap + MORE; i++) {
            out += u[i]->state == UP_RECV;
            waiting += u[i]->state == UP_ADDR_SLOT;
        }
        row(name_of("U9 %d are out", cap), out == cap && waiting == MORE
            && site_tab[0].dials == cap, "%d, %d wait, %d dials", out,
            waiting, site_tab[0].dials);
        struct up *end = up_begin_test((struct up_opt){ .host = "10.0.0.1",
            .ms = 500 });
        struct up *listed = up_begin_test((struct up_opt){
            .host = "10.0.0.1", .class = CLASS_LISTED });
        struct up *other = up_begin_test((struct up_opt){
            .host = "10.0.0.2" });
        net_run(net_never, 600);
        up_test = end;
        row("U9 the call's own end",
            sl_eq(up_text(end), SL("WAIT_TIMEOUT connect")), "%.*s",
            (int)up_text(end).len, up_text(end).p);
        row("U9 not for the operator's", listed->state == UP_RECV,
            "%d", listed->state);
        row("U9 not for another address", other->state == UP_DONE,
            "%d", other->state);
        up_close(end, world_ms);
        up_close(listed, world_ms);
        up_close(other, world_ms);
        up_close(u[5], world_ms);
        net_run(net_never, 100);
        row("U9 the longest waiting is next", u[cap]->state == UP_RECV
            && u[cap + 1]->state == UP_ADDR_SLOT, "%d %d", u[cap]->state,
            u[cap + 1]->state);
        for (int i = 0; i < cap + MORE; i++)
            if (u[i]->state == UP_RECV)
                up_close(u[i], world_ms);
        net_run(net_never, 4000);
        row("U9 then all the others", u[cap + 1]->state == UP_DONE
            && u[cap + 2]->state == UP_DONE, "%d %d", u[cap + 1]->state,
            u[cap + 2]->state);
        for (int i = 0; i < cap + MORE; i++)
            up_close(u[i], world_ms);
        row("U9 nothing is left", net_left_later()[0] == 0, "%s",
            net_left());
    }
    cfg.is_open = false;
}

/* U3: parts of the TLS budget go to strangers in the order of their calls;
 * half of it is for those that are known. */
static void cold_rows(void)
{
    static char host[8][20];
    struct up *u[8];
    net_reset();
    world_ms += 60000;                   /* the budget is whole again */
    cfg.tls_cold_per_s = 1;
    for (int i = 0; i < 8; i++) {
        snprintf(host[i], sizeof host[i], "10.0.3.%d", i + 1);
        site_tab[i] = (struct site){ .host = host[i], .port = 443,
            .tls = TLS_YES, .san = host[i], .reply = { OK_REPLY } };
        u[i] = up_begin_test((struct up_opt){ .tls = true, .host = host[i],
            .ms = i == 3 ? 2300 : 0 });
        u[i]->call.is_known = i >= 6;
    }
    static const struct { int64_t ms; const char *want; } at[] = {
        { 100, "DD....DD" }, { 900, "DD....DD" }, { 1100, "DD....DD" },
        { 200, "DD.F..DD" }, { 800, "DDDF..DD" }, { 1000, "DDDFD.DD" },
        { 1000, "DDDFDDDD" },
    };
    for (size_t k = 0; k < COUNT_OF(at); k++) {
        char got[9] = "";
        net_run(net_never, at[k].ms);
        for (int i = 0; i < 8; i++)
            got[i] = u[i]->state == UP_DONE ? 'D'
                : u[i]->state == UP_FAILED ? 'F' : '.';
        row(name_of("U3 the budget in order, %zu", k),
            strcmp(got, at[k].want) == 0, "%s", got);
    }
    up_test = u[3];
    row_str("U3 whose turn did not come", up_text(u[3]), "TLS_BUDGET tls");
    for (int i = 0; i < 8; i++)
        up_close(u[i], world_ms);
    cfg.tls_cold_per_s = 0;
    row("U3 nobody is left", net_left_later()[0] == 0, "%s", net_left());
}

/* Who may hold how many of the handshakes at once. */
static void share_rows(void)
{
    static const struct { const char *name; enum class class; int dests;
        unsigned want; } tab[] = {
        { "a stranger's server", CLASS_STRANGER, 1, 2 },
        { "strangers", CLASS_STRANGER, 9, LIM_HS_CNT / 2 },
        { "a listed server", CLASS_LISTED, 1, LIM_HS_DEST },
        { "listed servers", CLASS_LISTED, 9, LIM_HS_CNT - 2 },
        { "one of the operator's", CLASS_OPERATOR, 1, LIM_HS_DEST },
        { "the operator's", CLASS_OPERATOR, 9, LIM_HS_CNT },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        unsigned cnt = 0;
        net_reset();
        for (int k = 0; k < 40; k++) {
            uint8_t key[16] = { (uint8_t)(1 + k % tab[i].dests) };
            cnt += hs_take(tab[i].class, key) != NULL;
        }
        row_int(name_of("U3 handshakes of %s", tab[i].name), cnt,
            tab[i].want);
    }
    /* strangers at their cap leave room for the others */
    net_reset();
    for (uint8_t k = 0; k < 20; k++)
        (void)hs_take(CLASS_STRANGER, (uint8_t[16]){ 1, k });
    unsigned listed = 0, own = 0;
    for (uint8_t k = 0; k < 20; k++)
        listed += hs_take(CLASS_LISTED, (uint8_t[16]){ 2, k }) != NULL;
    for (uint8_t k = 0; k < 20; k++)
        own += hs_take(CLASS_OPERATOR, (uint8_t[16]){ 3, k }) != NULL;
    row("U3 what strangers leave", listed == 2 && own == 2, "%u, %u",
        listed, own);
}

static void test_upstream(void)
{
    int n = sprintf(long_body,
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1f40\r\n");
    memset(long_body + n, 'x', 8000);
    strcpy(long_body + n + 8000, "\r\n0\r\n\r\n");
    n = sprintf(long_head, "HTTP/1.1 200 OK\r\nX: ");
    memset(long_head + n, 'x', 17000);
    strcpy(long_head + n + 17000, "\r\nContent-Length: 0\r\n\r\n");
    call_rows();
    tls_rows();
    kept_rows();
    share_rows();
    addr_rows();
    cold_rows();
    /* 128 are kept idle; the oldest makes room */
    net_reset();
    struct bb hosts = work_bb();
    static char host[LIM_IDLE_CNT + 3][20];
    for (int i = 0; i < LIM_IDLE_CNT + 3; i++) {
        snprintf(host[i], sizeof host[i], "h%d.org", i);
        bb_str(&hosts, "10.0.0.1 ");
        bb_str(&hosts, host[i]);
        bb_str(&hosts, "\n");
    }
    bb_byte(&hosts, 0);
    file_write("hosts3", (char *)work_buf);
    cfg.hosts_file = SL("hosts3\0");
    site_tab[0] = (struct site){ .host = "10.0.0.1", .port = 80,
        .reply = { OK_REPLY } };
    for (int i = 0; i < LIM_IDLE_CNT + 3; i++) {
        (void)up_begin_test((struct up_opt){ .host = host[i] });
        (void)net_run(up_is_over, 60000);
        up_close(up_test, world_ms);
        net_run(net_never, 10);
    }
    row_int("idle connections kept", sock_open_cnt(), LIM_IDLE_CNT);
    for (int k = 0; k < 2; k++) {
        int before = site_tab[0].dials;
        (void)up_begin_test((struct up_opt){ .host = host[k ? 0 : 40] });
        (void)net_run(up_is_over, 60000);
        up_close(up_test, world_ms);
        row(k ? "the oldest is gone" : "a younger one is used",
            site_tab[0].dials - before == k, "%d dials",
            site_tab[0].dials - before);
    }
    /* an idle one gives way to a call; none left is an event */
    for (int k = 0; k < 2; k++) {
        net_reset();
        zone_add("a.org", "A", A1);
        site_tab[0] = (struct site){ .host = "10.0.0.1", .port = 80,
            .reply = { OK_REPLY } };
        (void)up_begin_test((struct up_opt){ .host = "10.0.0.1" });
        (void)net_run(up_is_over, 60000);
        up_close(up_test, world_ms);
        for (size_t i = k ? 0 : 1; i < LIM_CHAN_CNT; i++) {
            if (chan_pool[i].state == CHAN_IDLE)
                chan_close(&chan_pool[i]);
            chan_pool[i].state = CHAN_BUSY;
            chan_pool[i].fd = -1;
        }
        (void)up_begin_test((struct up_opt){ 0 });
        (void)net_run(up_is_over, 60000);
        row_str(k ? "no connection slot" : "an idle connection gives way",
            up_text(up_test), k ? "CHAN_FULL connect" : "200 {}");
        up_close(up_test, world_ms);
    }
    /* as many calls as there are, then none */
    net_reset();
    zone_add("a.org", "A", "drop");
    unsigned cnt = 0;
    while (up_begin_test((struct up_opt){ 0 }))
        cnt++;
    row_int("calls at once", cnt, LIM_UP_CNT);
    for (size_t i = 0; i < LIM_UP_CNT; i++)
        up_close(&up_pool[i], world_ms);
    net_run(net_never, 6000);
    row("all are free again", net_left()[0] == 0, "%s", net_left());
}

/* ---- 18: whose token is it (rows L1 to L6) ---- */

#define SUB(name) "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" \
    "Transfer-Encoding: chunked\r\n\r\n" \
    "10\r\n{\"x\":1,\"sub\":\"@u\r\n1\r\n:\r\n" name \
    "\r\n2\r\n\"}\r\n0\r\n\r\n"
#define SUB_A SUB("5\r\na.org")
#define WK(text) "HTTP/1.1 200 OK\r\nCache-Control: max-age=600\r\n" \
    "Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" \
    "D\r\n{\"m.server\":\"\r\n" text "\r\n2\r\n\"}\r\n0\r\n\r\n"
#define MOVED(where) "HTTP/1.1 302 Found\r\nLocation: " where \
    "\r\nContent-Length: 0\r\n\r\n"
#define STATUS(n) "HTTP/1.1 " #n " x\r\nContent-Length: 0\r\n\r\n"

static struct lookup *look_test;

static bool look_is_over(void)
{
    return look_test->state == L_DONE || look_test->state == L_FAILED;
}

static struct lookup *look_begin(const char *server)
{
    struct name n;
    if (!name_parse(sl_str(server), &n))
        abort();
    look_test = lookup_open(KIND_EXCHANGE, 0, &n,
        dest_hash(n.whole), SL("t+/=k"), SL("rq"), world_ms, world_ms);
    return look_test;
}

/* Outcome, and the userinfo request's address, Host and SNI. */
static const char *look_text(void)
{
    static char text[1000];
    char host[300] = "-";
    int n = look_test->state == L_DONE ? sprintf(text, "%.*s",
        (int)look_test->user.len, look_test->user.p)
        : look_test->state == L_FAILED ? sprintf(text, "%s %s",
        event_tab[look_test->why].label, look_test->step)
        : sprintf(text, "unfinished");
    for (struct site *t = site_tab; t < site_tab + SITE_CNT && t->host; t++)
        if (strstr(t->request, "/openid/userinfo?access_token=t%2B%2F%3Dk ")
            && look_test->state == L_DONE) {
            const char *h = strstr(t->request, "\r\nHost: ");
            if (h)
                sscanf(h + 8, "%299[^\r]", host);
            sprintf(text + n, " %s %d %s %s", t->host, t->port, host,
                t->tls == TLS_NO ? "plain" : t->sni[0] ? t->sni : "-");
        }
    return text;
}

struct disco {
    const char *name, *server, *want;
    const char *zone[7][3];
    struct site site[6];
    bool listed;
    const char *override;
    int64_t ms;                      /* -1: any */
};

static void disco_set(const struct disco *d)
{
    net_reset();
    for (int i = 0; i < 7 && d->zone[i][0]; i++)
        zone_add(d->zone[i][0], d->zone[i][1], d->zone[i][2]);
    memcpy(site_tab, d->site, sizeof d->site);
    if (d->listed) {
        cfg.full_access[0] = sl_str(d->server);
        cfg.full_access_cnt = 1;
    }
    if (d->override) {
        cfg.fed[0].name = sl_str(d->server);
        if (!cfg_base(sl_str(d->override), true, &cfg.fed[0].base))
            abort();
        cfg.fed_cnt = 1;
    }
}

/* The 9.9.9.x are public; site 1 is the server's own, 2 the delegated. */
#define W(n, ...) { "9.9.9." #n, 443, .tls = TLS_YES, __VA_ARGS__ }
#define F(n, ...) { "9.9.9." #n, 8448, .tls = TLS_YES, __VA_ARGS__ }
#define A_ORG { "a.org", "A", "A:9.9.9.1" }
#define B_ORG { "b.org", "A", "A:9.9.9.2" }
static const struct disco disco_tab[] = {
    { "1 literal", "9.9.9.1", "@u:9.9.9.1 9.9.9.1 8448 9.9.9.1 -", { { 0 } },
      { F(1, .san = "9.9.9.1", .reply = { SUB("7\r\n9.9.9.1") }) },
      .ms = 1 },
    { "1 literal with a port", "9.9.9.1:8449",
      "@u:9.9.9.1:8449 9.9.9.1 8449 9.9.9.1:8449 -", { { 0 } },
      { { "9.9.9.1", 8449, .tls = TLS_YES, .san = "9.9.9.1",
      .reply = { SUB("c\r\n9.9.9.1:8449") } } }, .ms = 1 },
    { "1 IPv6 literal", "[2600::1]",
      "@u:[2600::1] 2600::1 8448 [2600::1] -", { { 0 } },
      { { "2600::1", 8448, .tls = TLS_YES, .san = "2600::1",
      .reply = { SUB("9\r\n[2600::1]") } } }, .ms = 1 },
    { "1 literal, certificate for a name", "9.9.9.1", "TLS_NAME tls",
      { { 0 } }, { F(1, .san = "a.org") }, .ms = 1 },
    { "2 name with port: no well-known, no SRV", "a.org:1234",
      "@u:a.org:1234 9.9.9.1 1234 a.org:1234 a.org", { A_ORG },
      { { "9.9.9.1", 1234, .tls = TLS_YES, .san = "a.org",
      .reply = { SUB("a\r\na.org:1234") } }, W(1, .san = "a.org",
      .reply = { WK("5\r\nb.org") }) }, .ms = 1 },
    { "3.1 delegated to a literal", "a.org",
      "@u:a.org 9.9.9.2 8448 9.9.9.2 -", { A_ORG }, { W(1, .san = "a.org",
      .reply = { WK("7\r\n9.9.9.2") }), F(2, .san = "9.9.9.2",
      .reply = { SUB_A }) }, .ms = 2 },
    { "3.1 delegated to a literal with port", "a.org",
      "@u:a.org 9.9.9.2 99 9.9.9.2:99 -", { A_ORG }, { W(1, .san = "a.org",
      .reply = { WK("a\r\n9.9.9.2:99") }), { "9.9.9.2", 99, .tls = TLS_YES,
      .san = "9.9.9.2", .reply = { SUB_A } } }, .ms = 2 },
    { "3.2 delegated to a name with port", "a.org",
      "@u:a.org 9.9.9.2 443 b.org:443 b.org", { A_ORG, B_ORG,
      { "_matrix-fed._tcp.b.org", "SRV", "SRV:1/1/1/x.org" } },
      { W(1, .san = "a.org", .reply = { WK("9\r\nb.org:443") }),
      W(2, .san = "b.org", .reply = { SUB_A }) }, .ms = 2 },
    { "3.3 delegated, SRV", "a.org", "@u:a.org 9.9.9.3 77 b.org b.org",
      { A_ORG, { "_matrix-fed._tcp.b.org", "SRV", "SRV:1/1/77/c.org" },
      { "_matrix._tcp.b.org", "SRV", "SRV:1/1/78/c.org" },
      { "c.org", "A", "A:9.9.9.3" } }, { W(1, .san = "a.org",
      .reply = { WK("5\r\nb.org") }), { "9.9.9.3", 77, .tls = TLS_YES,
      .san = "b.org", .reply = { SUB_A } } }, .ms = 2 },
    { "3.4 delegated, old SRV", "a.org", "@u:a.org 9.9.9.3 78 b.org b.org",
      { A_ORG, { "_matrix._tcp.b.org", "SRV", "SRV:1/1/78/c.org" },
      { "c.org", "A", "A:9.9.9.3" } }, { W(1, .san = "a.org",
      .reply = { WK("5\r\nb.org") }), { "9.9.9.3", 78, .tls = TLS_YES,
      .san = "b.org", .reply = { SUB_A } } }, .ms = 2 },
    { "3.5 delegated, no SRV", "a.org",
      "@u:a.org 9.9.9.2 8448 b.org b.org", { A_ORG, B_ORG }, { W(1,
      .san = "a.org", .reply = { WK("5\r\nb.org") }), F(2, .san = "b.org",
      .reply = { SUB_A }) }, .ms = 2 },
    { "4 no well-known, SRV", "a.org", "@u:a.org 9.9.9.3 77 a.org a.org",
      { A_ORG, { "_matrix-fed._tcp.a.org", "SRV", "SRV:1/1/77/c.org" },
      { "c.org", "A", "A:9.9.9.3" } }, { W(1, .san = "a.org",
      .reply = { STATUS(404) }), { "9.9.9.3", 77, .tls = TLS_YES,
      .san = "a.org", .reply = { SUB_A } } }, .ms = 2 },
    { "4 certificate of the target's name", "a.org", "TLS_NAME tls",
      { A_ORG, { "_matrix-fed._tcp.a.org", "SRV", "SRV:1/1/77/c.org" },
      { "c.org", "A", "A:9.9.9.3" } }, { { "9.9.9.3", 77, .tls = TLS_YES,
      .san = "c.org", .reply = { SUB_A } } }, .ms = -1 },
    { "5 no well-known, old SRV", "a.org",
      "@u:a.org 9.9.9.3 78 a.org a.org", { A_ORG,
      { "_matrix-fed._tcp.a.org", "SRV", "SRV:0/0/0/." },
      { "_matrix._tcp.a.org", "SRV", "SRV:1/1/78/c.org" },
      { "c.org", "A", "A:9.9.9.3" } }, { { "9.9.9.3", 78, .tls = TLS_YES,
      .san = "a.org", .reply = { SUB_A } } }, .ms = 2 },
    { "6 neither", "a.org", "@u:a.org 9.9.9.1 8448 a.org a.org", { A_ORG },
      { F(1, .san = "a.org", .reply = { SUB_A }) }, .ms = 2 },
    { "6 SRV servers fail: 8448 at once", "a.org",
      "@u:a.org 9.9.9.1 8448 a.org a.org", { A_ORG,
      { "_matrix-fed._tcp.a.org", "SRV", "fail" },
      { "_matrix._tcp.a.org", "SRV", "SRV:1/1/78/c.org" } },
      { F(1, .san = "a.org", .reply = { SUB_A }) }, .ms = 2 },
    /* every way a well-known can fail leads to step 4 */
#define WK_BAD(what, ...) { "well-known: " what, "a.org", \
      "@u:a.org 9.9.9.1 8448 a.org a.org", { A_ORG }, { F(1, .san = "a.org",\
      .reply = { SUB_A }), W(1, .san = "a.org", __VA_ARGS__) }, .ms = -1 }
    WK_BAD("404", .reply = { STATUS(404) }),
    WK_BAD("500", .reply = { STATUS(500) }),
    WK_BAD("204", .reply = { STATUS(204) }),
    WK_BAD("no JSON", .reply = { "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n"
        "\r\n<html>" }),
    WK_BAD("empty", .reply = { STATUS(200) }),
    WK_BAD("no member", .reply = { "HTTP/1.1 200 OK\r\nContent-Length: 2"
        "\r\n\r\n{}" }),
    WK_BAD("no string", .reply = { "HTTP/1.1 200 OK\r\nContent-Length: 14"
        "\r\n\r\n{\"m.server\":1}" }),
    WK_BAD("no name", .reply = { WK("6\r\nb org:") }),
    WK_BAD("a URL", .reply = { WK("d\r\nhttps://b.org") }),
    WK_BAD("port 0", .reply = { WK("7\r\nb.org:0") }),
    WK_BAD("twice", .reply = { "HTTP/1.1 200 OK\r\nContent-Length: 31\r\n"
        "\r\n{\"m.server\":\"b\",\"m.server\":\"c\"}" }),
    WK_BAD("refused", .dial = DIAL_REFUSE),
    WK_BAD("silent", .reply = { "" }),
    WK_BAD("silent TLS", .reply = { "" }),
    WK_BAD("closed", .reply = { "~" }),
    WK_BAD("too long", .reply = { "HTTP/1.1 200 OK\r\n"
        "Content-Length: 51201\r\n\r\n" }),
    WK_BAD("redirect without target", .reply = { STATUS(302) }),
    /* where a redirect that was followed would lead to another server */
#define WK_LURE(what, ...) { "well-known: " what, "a.org", \
      "@u:a.org 9.9.9.1 8448 a.org a.org", { A_ORG, B_ORG, \
      { "b", "A", "A:9.9.9.2" } }, { F(1, .san = "a.org", \
      .reply = { SUB_A }), W(2, .san = "b.org,b,10.0.0.1", \
      .reply = { WK("7\r\n9.9.9.3") }), { "10.0.0.1", 443, .tls = TLS_YES, \
      .reply = { WK("7\r\n9.9.9.3") } }, F(3, .san = "9.9.9.3", \
      .reply = { SUB_A }), W(1, .san = "a.org", __VA_ARGS__) }, .ms = -1 }
    WK_LURE("redirect to http", .reply = { MOVED("http://b.org/") }),
    WK_LURE("redirect to a label", .reply = { MOVED("https://b/") }),
    WK_LURE("redirect with a user", .reply = { MOVED("https://u@b.org/") }),
    WK_LURE("redirect to a private address",
        .reply = { MOVED("https://10.0.0.1/") }),
    WK_LURE("relative redirect", .reply = { MOVED("b.org") }),
    WK_LURE("a fourth redirect", .reply = { MOVED("/1"), MOVED("/2"),
        MOVED("/3"), MOVED("https://b.org/"), WK("7\r\n9.9.9.3") }),
    WK_LURE("status 300", .reply = { "HTTP/1.1 300 x\r\nLocation: "
        "https://b.org/\r\nContent-Length: 0\r\n\r\n" }),
    WK_BAD("redirect to nowhere", .reply = { MOVED("https://") }),
    WK_BAD("redirects for ever", .reply = { MOVED("/x") }),
    WK_BAD("304", .reply = { STATUS(304) }),
    { "well-known: another certificate", "a.org",
      "@u:a.org 9.9.9.1 8448 a.org a.org", { A_ORG }, { F(1, .san = "a.org",
      .reply = { SUB_A }), W(1, .san = "b.org",
      .reply = { WK("5\r\nb.org") }) }, .ms = 2 },
    { "well-known: three redirects", "a.org",
      "@u:a.org 9.9.9.2 443 b.org:443 b.org", { A_ORG, B_ORG,
      { "c.org", "A", "A:9.9.9.3" } }, { W(1, .san = "a.org", .reply = {
      MOVED("/x"), MOVED("https://c.org/y?z"),
      WK("9\r\nb.org:443") }), W(3, .san = "c.org", .reply = {
      MOVED("//a.org/last") }), W(2, .san = "b.org",
      .reply = { SUB_A }) }, .ms = -1 },
    { "well-known: delegated to a label", "a.org", "NAME_BAD name",
      { A_ORG }, { W(1, .san = "a.org", .reply = { WK("4\r\nb:80") }) },
      .ms = 1 },
    { "well-known: delegated to a private address", "a.org",
      "SSRF_DENIED connect", { A_ORG }, { W(1, .san = "a.org",
      .reply = { WK("8\r\n10.0.0.1") }), { "10.0.0.1", 8448, .tls = TLS_YES,
      .san = "10.0.0.1", .reply = { SUB_A } } }, .ms = 1 },
    { "well-known: delegated to a private name", "a.org",
      "SSRF_DENIED connect", { A_ORG, { "b.org", "A", "A:127.0.0.1" } },
      { W(1, .san = "a.org", .reply = { WK("5\r\nb.org") }) }, .ms = 1 },
    { "SRV to a private address", "a.org", "SSRF_DENIED connect", { A_ORG,
      { "_matrix-fed._tcp.a.org", "SRV", "SRV:1/1/77/c.org" },
      { "c.org", "A", "A:169.254.169.254" } }, { { 0 } }, .ms = 1 },
    { "private literal", "10.0.0.1", "SSRF_DENIED connect", { { 0 } },
      { { 0 } }, .ms = 0 },
    { "private address, listed", "a.org",
      "@u:a.org 10.0.0.1 8448 a.org a.org", { { "a.org", "A",
      "A:10.0.0.1" } }, { { "10.0.0.1", 8448, .tls = TLS_YES,
      .san = "a.org", .reply = { SUB_A } } }, .listed = true, .ms = 2 },
    { "a label", "alpha", "NAME_BAD name", { { 0 } }, { { 0 } }, .ms = 0 },
    { "a label with port", "alpha:80", "NAME_BAD name", { { 0 } }, { { 0 } },
      .ms = 0 },
    { "a label, listed", "alpha", "@u:alpha 10.0.0.1 8448 alpha alpha",
      { { "alpha", "A", "A:10.0.0.1" } }, { { "10.0.0.1", 8448,
      .tls = TLS_YES, .san = "alpha", .reply = { SUB("5\r\nalpha") } } },
      .listed = true, .ms = 2 },
    /* SRV targets in turn */
    { "SRV by priority, the first refuses", "a.org",
      "@u:a.org 9.9.9.3 77 a.org a.org", { A_ORG,
      { "_matrix-fed._tcp.a.org", "SRV",
      "SRV:20/1/77/c.org+10/1/66/b.org" }, B_ORG,
      { "c.org", "A", "A:9.9.9.3" } }, { { "9.9.9.2", 66,
      .dial = DIAL_REFUSE }, { "9.9.9.3", 77, .tls = TLS_YES,
      .san = "a.org", .reply = { SUB_A } } }, .ms = 3 },
    { "SRV, the first is another's", "a.org",
      "@u:a.org 9.9.9.3 77 a.org a.org", { A_ORG,
      { "_matrix-fed._tcp.a.org", "SRV",
      "SRV:10/1/66/b.org+20/1/77/c.org" }, B_ORG,
      { "c.org", "A", "A:9.9.9.3" } }, { { "9.9.9.2", 66, .tls = TLS_YES,
      .san = "b.org" }, { "9.9.9.3", 77, .tls = TLS_YES, .san = "a.org",
      .reply = { SUB_A } } }, .ms = 3 },
    { "SRV, the first answers with an error: no other is asked", "a.org",
      "REPLY_STATUS http", { A_ORG, { "_matrix-fed._tcp.a.org", "SRV",
      "SRV:10/1/66/b.org+20/1/77/c.org" }, B_ORG,
      { "c.org", "A", "A:9.9.9.3" } }, { { "9.9.9.2", 66, .tls = TLS_YES,
      .san = "a.org", .reply = { STATUS(500) } }, { "9.9.9.3", 77,
      .tls = TLS_YES, .san = "a.org", .reply = { SUB_A } } }, .ms = 2 },
    { "SRV of port 0", "a.org", "@u:a.org 9.9.9.1 8448 a.org a.org",
      { A_ORG, { "_matrix-fed._tcp.a.org", "SRV", "SRV:1/1/0/c.org" } },
      { F(1, .san = "a.org", .reply = { SUB_A }) }, .ms = 2 },
    /* what userinfo may say */
#define INFO(what, event, ...) { "userinfo: " what, "a.org:1", event, \
      { A_ORG }, { { "9.9.9.1", 1, .tls = TLS_YES, .san = "a.org", \
      __VA_ARGS__ } }, .ms = -1 }
    INFO("401", "TOKEN_UNKNOWN http", .reply = { STATUS(401) }),
    INFO("403", "REPLY_STATUS http", .reply = { STATUS(403) }),
    INFO("404", "REPLY_STATUS http", .reply = { STATUS(404) }),
    INFO("500", "REPLY_STATUS http", .reply = { STATUS(500) }),
    INFO("201", "REPLY_STATUS http", .reply = { STATUS(201) }),
    INFO("redirect", "REPLY_STATUS http", .reply = {
        MOVED("https://a.org:1/x") }),
    INFO("empty", "REPLY_JSON http", .reply = { STATUS(200) }),
    INFO("no object", "REPLY_JSON http", .reply = { "HTTP/1.1 200 OK\r\n"
        "Content-Length: 12\r\n\r\n[\"@u:a.org\"]" }),
    INFO("no sub", "SUB_BAD sub", .reply = { "HTTP/1.1 200 OK\r\n"
        "Content-Length: 2\r\n\r\n{}" }),
    INFO("sub null", "SUB_BAD sub", .reply = { "HTTP/1.1 200 OK\r\n"
        "Content-Length: 12\r\n\r\n{\"sub\":null}" }),
    INFO("sub is no string", "REPLY_JSON http", .reply = {
        "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{\"sub\":1}" }),
    INFO("sub twice", "REPLY_JSON http", .reply = { "HTTP/1.1 200 OK\r\n"
        "Content-Length: 33\r\n\r\n"
        "{\"sub\":\"@u:a.org:1\",\"sub\":\"@v:a\"}" }),
    INFO("of the name without port", "SUB_BAD sub", .reply = { SUB_A }),
    INFO("of another server", "SUB_BAD sub", .reply = {
        SUB("7\r\nb.org:1") }),
    INFO("too long", "REPLY_LIMIT http", .reply = { "HTTP/1.1 200 OK\r\n"
        "Content-Length: 8193\r\n\r\n" }),
    INFO("cut", "REPLY_CLOSED http", .reply = { "~HTTP/1.1 200 OK\r\n"
        "Content-Length: 30\r\n\r\n{\"sub\":\"@u:a.org:1\"}" }),
    INFO("silent", "HS_TIMEOUT http", .reply = { "" }),
    INFO("refused", "CONNECT_FAILED connect", .dial = DIAL_REFUSE),
    INFO("never connects", "CONNECT_TIMEOUT connect", .dial = DIAL_HOLE),
    { "a name with an empty label", "a..org:1", "DNS_NONE address",
      { { 0 } }, { { 0 } }, .ms = 0 },
    { "a name with a label of 64", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
      "aaaaaaaaaaaaaaaaaaaaaaaa.org:1", "DNS_NONE address", { { 0 } },
      { { 0 } }, .ms = 0 },
    { "no address", "a.org:1", "DNS_NONE address", { { 0 } }, { { 0 } },
      .ms = 0 },
    { "DNS fails", "a.org:1", "DNS_FAILED address", { { "a.org", "A",
      "fail" }, { "a.org", "AAAA", "fail" } }, { { 0 } }, .ms = 0 },
    /* overrides */
    { "override, plain, with a path", "a.org",
      "@u:a.org 10.0.0.7 8008 hs:8008 plain", { { "hs", "A",
      "A:10.0.0.7" } }, { { "10.0.0.7", 8008, .reply = { SUB_A } } },
      .override = "http://hs:8008/base/", .ms = 1 },
    { "override, TLS for the URL's name", "a.org",
      "@u:a.org 10.0.0.7 443 hs.lan hs.lan", { { "hs.lan", "A",
      "A:10.0.0.7" } }, { { "10.0.0.7", 443, .tls = TLS_YES,
      .san = "hs.lan", .reply = { SUB_A } } }, .override = "hs.lan",
      .ms = 1 },
    { "override, certificate of the server's name", "a.org",
      "TLS_NAME tls", { { "hs.lan", "A", "A:10.0.0.7" } }, { { "10.0.0.7",
      443, .tls = TLS_YES, .san = "a.org", .reply = { SUB_A } } },
      .override = "hs.lan", .ms = 1 },
    { "override, user of the URL's name", "a.org", "SUB_BAD sub",
      { { "b.org", "A", "A:10.0.0.7" } }, { { "10.0.0.7", 80,
      .reply = { SUB("5\r\nb.org") } } }, .override = "http://b.org",
      .ms = 1 },
    { "override, refused: nothing else is tried", "a.org",
      "CONNECT_FAILED connect", { A_ORG, { "hs", "A", "A:10.0.0.7" } },
      { F(1, .san = "a.org", .reply = { SUB_A }) },
      .override = "http://hs:8008", .ms = 1 },
    { "override, redirect", "a.org", "REPLY_STATUS http", { { "hs", "A",
      "A:10.0.0.7" } }, { { "10.0.0.7", 80, .reply = {
      MOVED("http://hs/x") } } }, .override = "http://hs", .ms = 1 },
};

static void disco_rows(void)
{
    for (size_t i = 0; i < COUNT_OF(disco_tab); i++) {
        const struct disco *d = &disco_tab[i];
        disco_set(d);
        int64_t begin = world_ms;
        (void)look_begin(d->server);
        bool over = net_run(look_is_over, 60000);
        int64_t ms = world_ms - begin;
        char got[1000];
        snprintf(got, sizeof got, "%s", look_text());
        lookup_close(look_test, world_ms);
        net_run(net_never, 80000);
        row(d->name, over && strcmp(got, d->want) == 0 && (d->ms < 0
            ? ms <= LIM_LOOKUP_MS : ms == d->ms) && net_left()[0] == 0,
            "%s, %lld ms %s", got, (long long)ms, net_left());
        row(name_of("%s: the token is in no log", d->name),
            !log_has("t+/=k") && !log_has("t%2B%2F"), "%s", log_buf);
    }
}

/* What the well-known cache holds, and for how long. */
static void wk_rows(void)
{
    static const struct disco good = { "", "a.org", "", { A_ORG, B_ORG,
        { "c.org", "A", "A:9.9.9.3" } }, { W(1, .san = "a.org",
        .reply = { WK("5\r\nb.org"), WK("5\r\nc.org") }), F(2,
        .san = "b.org", .reply = { SUB_A }), F(3, .san = "c.org",
        .reply = { SUB_A }) }, .ms = -1 };
    static const struct { const char *name; int64_t after_ms;
        int requests; const char *host; } tab[] = {
        { "at once", 1, 1, "9.9.9.2" },
        { "just in time", 599000, 1, "9.9.9.2" },
        { "after max-age", 601000, 2, "9.9.9.3" },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        disco_set(&good);
        (void)look_begin("a.org");
        (void)net_run(look_is_over, 60000);
        lookup_close(look_test, world_ms);
        net_run(net_never, tab[i].after_ms);
        site_tab[1].request[0] = 0;
        (void)look_begin("a.org");
        (void)net_run(look_is_over, 60000);
        row(name_of("delegation again, %s", tab[i].name),
            site_tab[0].requests == tab[i].requests
            && strstr(look_text(), tab[i].host), "%d requests, %s",
            site_tab[0].requests, look_text());
        lookup_close(look_test, world_ms);
    }
    /* times out of bounds, and other ways to say them */
    static const struct { const char *name, *field; int64_t keep_s; }
    keep[] = {
        { "max-age=1", "Cache-Control: max-age=1\r\n", 300 },
        { "max-age of a year", "Cache-Control: max-age=31536000\r\n",
          172800 },
        { "nothing said", "", 86400 },
        { "no-store", "Cache-Control: no-store\r\n", 300 },
        { "Expires in 10 min", "Expires: Mon, 21 Sep 2026 14:23:30 GMT\r\n",
          600 },
        { "Expires in the past", "Expires: 0\r\n", 300 },
        { "max-age before Expires", "Expires: 0\r\nCache-Control: public, "
          "max-age=900\r\n", 900 },
    };
    for (size_t i = 0; i < COUNT_OF(keep); i++) {
        static char reply[400];
        struct disco d = good;
        snprintf(reply, sizeof reply, "HTTP/1.1 200 OK\r\n%sConnection: "
            "close\r\nContent-Length: 20\r\n\r\n{\"m.server\":\"b.org\"}",
            keep[i].field);
        d.site[0].reply[0] = reply;
        d.site[0].reply[1] = NULL;
        disco_set(&d);
        int requests[2];
        for (int late = 0; late < 2; late++) {
            (void)look_begin("a.org");
            (void)net_run(look_is_over, 60000);
            lookup_close(look_test, world_ms);
            net_run(net_never, late ? 2000 : keep[i].keep_s * 1000 - 1000);
            (void)look_begin("a.org");
            (void)net_run(look_is_over, 60000);
            requests[late] = site_tab[0].requests;
            lookup_close(look_test, world_ms);
        }
        row(name_of("delegation, %s", keep[i].name), requests[0] == 1
            && requests[1] == 2, "%d, %d requests", requests[0],
            requests[1]);
    }
    /* failures: a minute, doubling to an hour; a listed one always one */
    for (int listed = 0; listed < 2; listed++) {
        struct disco bad = { "", "a.org", "", { A_ORG }, { W(1,
            .san = "a.org", .reply = { STATUS(404) }), F(1, .san = "a.org",
            .reply = { SUB_A }) }, .listed = listed, .ms = -1 };
        disco_set(&bad);
        int64_t wait = 60000;
        bool same = true;
        for (int n = 1; n < 10 && same; n++) {
            for (int late = 0; late < 2; late++) {
                (void)look_begin("a.org");
                (void)net_run(look_is_over, 60000);
                lookup_close(look_test, world_ms);
                same &= site_tab[0].requests == n;
                net_run(net_never, late ? 2000 : wait - 1000);
            }
            wait = listed ? 60000 : wait * 2 > 3600000 ? 3600000 : wait * 2;
        }
        row(listed ? "a listed one's failure: a minute each"
            : "a failure: a minute, doubling to an hour", same,
            "%d requests, wait %lld", site_tab[0].requests,
            (long long)wait);
    }
    /* a passing failure keeps the good answer for 48 hours, a lasting one
     * does not */
    for (int passing = 0; passing < 2; passing++) {
        struct disco d = good;
        d.site[0].reply[1] = passing ? STATUS(503) : STATUS(404);
        d.site[3] = (struct site)F(1, .san = "a.org", .reply = { SUB_A });
        disco_set(&d);
        (void)look_begin("a.org");
        (void)net_run(look_is_over, 60000);
        lookup_close(look_test, world_ms);
        net_run(net_never, 700000);
        site_tab[1].request[0] = 0;
        (void)look_begin("a.org");
        (void)net_run(look_is_over, 60000);
        row(passing ? "503 keeps the delegation" : "404 ends it",
            site_tab[0].requests == 2 && strstr(look_text(), passing
                ? "9.9.9.2" : "9.9.9.1 8448"), "%d requests, %s",
            site_tab[0].requests, look_text());
        lookup_close(look_test, world_ms);
    }
    /* a cached delegation that no longer connects is forgotten, once */
    struct disco moved = good;
    moved.site[1].dial = DIAL_OK;
    disco_set(&moved);
    (void)look_begin("a.org");
    (void)net_run(look_is_over, 60000);
    lookup_close(look_test, world_ms);
    net_run(net_never, 61000);
    site_tab[1].dial = DIAL_REFUSE;
    (void)look_begin("a.org");
    (void)net_run(look_is_over, 60000);
    row("a delegation that moved", strstr(look_text(), "9.9.9.3 8448")
        && site_tab[0].requests == 2, "%s", look_text());
    lookup_close(look_test, world_ms);
    net_run(net_never, 61000);
    site_tab[2].dial = DIAL_REFUSE;
    (void)look_begin("a.org");
    (void)net_run(look_is_over, 60000);
    row("a delegation that is down", strcmp(look_text(),
        "CONNECT_FAILED connect") == 0 && site_tab[0].requests == 3,
        "%s, %d requests", look_text(), site_tab[0].requests);
    lookup_close(look_test, world_ms);
    /* two at once: each forgets it once */
    site_tab[2].dial = DIAL_OK;
    net_run(net_never, 4000000);
    (void)look_begin("a.org");
    (void)net_run(look_is_over, 60000);
    lookup_close(look_test, world_ms);
    net_run(net_never, 61000);
    site_tab[2].dial = DIAL_REFUSE;
    int fetched = site_tab[0].requests;
    struct lookup *both[2] = { look_begin("a.org"), look_begin("a.org") };
    (void)net_run(look_is_over, 60000);
    net_run(net_never, 10);
    row("two at a delegation that is down", both[0]->state == L_FAILED
        && both[1]->state == L_FAILED && site_tab[0].requests - fetched <= 2,
        "%d %d, %d requests", both[0]->state, both[1]->state,
        site_tab[0].requests - fetched);
    lookup_close(both[0], world_ms);
    lookup_close(both[1], world_ms);
    /* L2: the second waits for the first one's fetch */
    disco_set(&good);
    struct lookup *first = look_begin("a.org");
    struct lookup *second = look_begin("a.org");
    row("L2 waits for another's fetch", first->state == L_WELL_KNOWN
        && second->state == L_WK_WAIT, "%d %d", first->state,
        second->state);
    (void)net_run(look_is_over, 60000);
    row("L2 goes on with its result", second->state == L_DONE
        && site_tab[0].requests == 1, "%s, %d requests", look_text(),
        site_tab[0].requests);
    lookup_close(first, world_ms);
    lookup_close(second, world_ms);
    /* L2: as long as its own time lasts */
    struct disco hang = good;
    hang.site[0].reply[0] = "";
    disco_set(&hang);
    cfg.lookup_ms = 3000;
    first = look_begin("a.org");
    cfg.lookup_ms = 1000;
    second = look_begin("a.org");
    (void)net_run(look_is_over, 60000);
    row("L2 its own end", second->state == L_FAILED
        && second->why == EV_HS_TIMEOUT, "%s", look_text());
    lookup_close(first, world_ms);
    lookup_close(second, world_ms);
    /* the call's time in all */
    disco_set(&hang);
    cfg.lookup_ms = 4000;
    int64_t begin = world_ms;
    (void)look_begin("a.org");
    (void)net_run(look_is_over, 60000);
    row("a lookup's time in all", look_test->state == L_FAILED
        && world_ms - begin == 4000, "%s, %lld ms", look_text(),
        (long long)(world_ms - begin));
    lookup_close(look_test, world_ms);
}

/* SRV records of one priority are taken by weight (RFC 2782). */
static void weight_rows(void)
{
    static struct dns_entry e;
    static struct lookup l;
    struct bb b = { e.data, 0, sizeof e.data, false };
    static const struct { uint16_t prio, weight; const char *host; } rec[] = {
        { 10, 60, "a" }, { 10, 30, "b" }, { 10, 10, "c" }, { 20, 1, "d" },
        { 5, 0, "e" } };
    for (size_t i = 0; i < COUNT_OF(rec); i++) {
        put16(&b, rec[i].prio);
        put16(&b, rec[i].weight);
        put16(&b, 1);
        bb_byte(&b, 1);
        bb_str(&b, rec[i].host);
    }
    e.data_len = (uint16_t)b.len;
    e.rec_cnt = COUNT_OF(rec);
    unsigned second[4] = { 0 }, wrong = 0;
    for (int i = 0; i < 10000; i++) {
        lookup_srv_targets(&l, &e);
        wrong += l.target_cnt != 4 || l.target[0].host[0] != 'e'
            || l.target[1].host[0] > 'c' || l.target[1].host[0] < 'a'
            || l.target[2].host[0] > 'c' || l.target[3].host[0] > 'c'
            || l.target[1].host[0] == l.target[2].host[0];
        second[l.target[1].host[0] & 3]++;
    }
    row("SRV: priorities ascend, four at most", wrong == 0, "%u wrong",
        wrong);
    row("SRV: chosen by weight", second[1] > 5500 && second[1] < 6500
        && second[2] > 2500 && second[2] < 3500 && second[3] > 600
        && second[3] < 1500, "%u %u %u", second[1], second[2], second[3]);
}

static void test_discovery(void)
{
    disco_rows();
    wk_rows();
    weight_rows();
    /* how many lookups may run: all, a server's, strangers' */
    net_reset();
    zone_add("x.org", "A", "drop");
    cfg.lookups_per_server = 5;
    unsigned cnt = 0;
    while (lookup_may_open(dest_hash(SL("x.org:1")), false, world_ms)
           && look_begin("x.org:1"))
        cnt++;
    row_int("lookups of a stranger", cnt, 5);
    for (int known = 0; known < 2; known++) {
        static char name[300][20];
        for (; cnt < 300; cnt++) {
            snprintf(name[cnt], sizeof name[0], "n%u.org:1", cnt);
            uint64_t dest = dest_hash(sl_str(name[cnt]));
            if (known)
                memo_make(known_cache, LIM_KNOWN_CNT, dest, 0)->at
                    = world_ms + 1;
            if (!lookup_may_open(dest, false, world_ms))
                break;
            (void)look_begin(name[cnt]);
        }
        row_int(known ? "lookups of strangers" : "of unknown ones", cnt,
            known ? LIM_STRANGER_CNT : LIM_STRANGER_CNT / 2);
    }
    row("the rest is for the listed", lookup_may_open(1, true, world_ms),
        "refused");
    cfg.is_open = true;
    row("full access for all: strangers may have all but 16",
        lookup_may_open(dest_hash(SL("z.org:1")), false, world_ms),
        "refused");
    cfg.is_open = false;
    for (size_t i = 0; i < LIM_UP_CNT; i++)
        if (lookup_pool[i].state != L_FREE)
            lookup_close(&lookup_pool[i], world_ms);
    net_run(net_never, 6000);
    row("all are free again", net_left()[0] == 0, "%s", net_left());
}

/* ---- 22: clients (rows C1 to C5) ---- */

/* Replies as text: `200+` each, `-` when it says close, `#` when bytes are
 * no reply; then `closed` when the connection is. */
static const char *client_text(const struct sock *s)
{
    static char text[4000];
    size_t n = 0;
    const char *p = (const char *)s->out, *end = p + s->out_len;
    text[0] = 0;
    while (p < end && n < sizeof text - 20) {
        int code;
        const char *body = memmem(p, (size_t)(end - p), "\r\n\r\n", 4);
        if (!body || sscanf(p, "HTTP/1.1 %3d ", &code) != 1) {
            strcat(text, "# ");
            break;
        }
        char head[2000];
        snprintf(head, sizeof head, "%.*s", (int)(body - p), p);
        const char *len = strstr(head, "\r\nContent-Length: ");
        body += 4;
        if (len && s->tag != 2)
            body += strtoul(len + 18, NULL, 10);
        n += (size_t)sprintf(text + n, "%d%s ", code, code == 100 ? ""
            : strstr(head, "\r\nConnection: close") ? "-" : "+");
        p = body;
    }
    if (!s->used)
        strcat(text, "closed");
    return text;
}

#define GET(path) "GET " path " HTTP/1.1\r\nHost: x\r\n\r\n"
#define POST(path, len) "POST " path " HTTP/1.1\r\nHost: x\r\n" \
    "Content-Length: " #len "\r\n\r\n"

static char long_post[70000], long_line[6000], long_field[10000];

/* What comes at 0 ms and at later_ms, and what is said at at_ms. */
static const struct client_case { const char *name, *in, *later;
    int64_t later_ms, at_ms; const char *want; bool eof; } client_tab[] = {
    { "C1 a request", GET("/healthz"), NULL, 0, 100, "200+ " },
    { "C1 HTTP/1.0", "GET /healthz HTTP/1.0\r\n\r\n", NULL, 0, 100,
      "200- closed" },
    { "C1 close asked", "GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: "
      "close\r\n\r\n", NULL, 0, 100, "200- closed" },
    { "C1 three at once, in order", GET("/healthz") GET("/x")
      "OPTIONS /get_token HTTP/1.1\r\nHost: x\r\n\r\n", NULL, 0, 100,
      "200+ 404+ 200+ " },
    { "C1 one after the other", GET("/healthz"), GET("/y"), 600000, 600001,
      "200+ 404+ " },
    { "C1 idle until 650 s", GET("/healthz"), NULL, 0, 649990, "200+ " },
    { "C1 idle after 650 s", GET("/healthz"), NULL, 0, 650100,
      "200+ closed" },
    { "C1 silent until 10 s", "", NULL, 0, 9990, "" },
    { "C1 silent after 10 s", "", NULL, 0, 10010, "closed" },
    { "C1 half a head until 10 s", "GET /", NULL, 0, 9990, "" },
    { "C1 half a head after 10 s", "GET /", NULL, 0, 10010, "408- " },
    { "C1 a byte more moves no deadline", "GET /", "x", 9900, 10010,
      "408- " },
    { "C1 the second head has its own 10 s", GET("/healthz"), "GET /",
      5000, 14900, "200+ " },
    { "C1 and no more", GET("/healthz"), "GET /", 5000, 15100,
      "200+ 408- " },
    { "C1 the end, nothing sent", "", NULL, 0, 100, "closed", true },
    { "C1 the end in a head", "GET /", NULL, 0, 100, "closed", true },
    { "C1 the end after a request", GET("/healthz"), NULL, 0, 100,
      "200+ closed", true },
    { "C1 the end after three", GET("/healthz") GET("/x") GET("/healthz"),
      NULL, 0, 100, "200+ 404+ 200+ closed", true },
    { "C1 no HTTP", "\x16\x03\x01\r\n\r\n", NULL, 0, 100, "400- " },
    { "C1 bare LF", "GET /healthz HTTP/1.1\nHost: x\n\n", NULL, 0, 100,
      "400- " },
    { "C1 HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", NULL, 0, 100,
      "505- " },
    { "C1 unknown coding", "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding"
      ": gzip, chunked\r\n\r\n", NULL, 0, 100, "501- " },
    { "C1 a refusal ends the queue", GET("/healthz") "X\r\n\r\n"
      GET("/healthz"), NULL, 0, 100, "200+ 400- " },
    { "C1 other Expect", "POST /get_token HTTP/1.1\r\nHost: x\r\nExpect: "
      "tea\r\nContent-Length: 2\r\n\r\n", NULL, 0, 100, "417- " },
    { "C1 a long line", long_line, NULL, 0, 100, "414- " },
    { "C1 a long head", long_field, NULL, 0, 100, "431- " },
    { "C2 long trailers", "POST /get_token HTTP/1.1\r\nHost: x\r\n"
      "Transfer-Encoding: chunked\r\n\r\n0\r\na:b\r\na:b\r\na:b\r\na:b\r\n"
      "a:b\r\na:b\r\na:b\r\na:b\r\na:b\r\na:b\r\na:b\r\na:b\r\na:b\r\n"
      "a:b\r\na:b\r\na:b\r\na:b\r\n\r\n", NULL, 0, 100, "431- " },
    { "C1 methods", "POST /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
      GET("/get_token") "get /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
      "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", NULL, 0, 100,
      "405+ 405+ 405+ 200+ " },
    { "C2 a body", POST("/get_token", 2) "xx", NULL, 0, 100, "400+ " },
    { "C2 no body", "POST /get_token HTTP/1.1\r\nHost: x\r\n\r\n", NULL, 0,
      100, "400+ " },
    { "C2 a body in two", POST("/get_token", 2) "x", "x", 14000, 14001,
      "400+ " },
    { "C2 half a body until 15 s", POST("/get_token", 2) "x", NULL, 0,
      14990, "" },
    { "C2 half a body after 15 s", POST("/get_token", 2) "x", NULL, 0,
      15010, "408- " },
    { "C2 the end in a body", POST("/get_token", 2) "x", NULL, 0, 100,
      "closed", true },
    { "C2 chunks", "POST /get_token HTTP/1.1\r\nHost: x\r\n"
      "Transfer-Encoding: chunked\r\n\r\n2\r\nxx\r\n0\r\n\r\n"
      GET("/healthz"), NULL, 0, 100, "400+ 200+ " },
    { "C2 bad chunks", "POST /get_token HTTP/1.1\r\nHost: x\r\n"
      "Transfer-Encoding: chunked\r\n\r\nzz\r\n" GET("/healthz"), NULL, 0,
      100, "400- " },
    { "C2 too long by its length", POST("/get_token", 65537), NULL, 0, 100,
      "413- " },
    { "C2 as long as may be, not here", POST("/get_token", 65536), NULL, 0,
      100, "" },
    { "C2 a long body", long_post, GET("/healthz"), 50, 100, "400+ 200+ " },
    { "C2 a body with GET", "GET /healthz HTTP/1.1\r\nHost: x\r\n"
      "Content-Length: 3\r\n\r\nabc" GET("/healthz"), NULL, 0, 100,
      "200+ 200+ " },
    { "C2 a long body elsewhere", "GET /healthz HTTP/1.1\r\nHost: x\r\n"
      "Content-Length: 99999\r\n\r\n", NULL, 0, 100, "200- " },
    { "C2 continue", "POST /get_token HTTP/1.1\r\nHost: x\r\nExpect: "
      "100-continue\r\nContent-Length: 2\r\n\r\n", "xx", 50, 100,
      "100 400+ " },
    { "C2 continue, body at once", "POST /get_token HTTP/1.1\r\nHost: x\r\n"
      "Expect: 100-Continue\r\nContent-Length: 2\r\n\r\nxx", NULL, 0, 100,
      "400+ " },
    { "C2 continue, refused", "POST /get_token HTTP/1.1\r\nHost: x\r\n"
      "Expect: 100-continue\r\nContent-Length: 99999\r\n\r\n", NULL, 0, 100,
      "413- " },
    { "C2 continue, HTTP/1.0", "POST /get_token HTTP/1.0\r\nExpect: "
      "100-continue\r\nContent-Length: 2\r\n\r\n", "xx", 50, 100,
      "400- closed" },
    { "C5 a refused client, until 2 s", "X\r\n\r\n", NULL, 0, 1990,
      "400- " },
    { "C5 a refused client, after 2 s", "X\r\n\r\n", NULL, 0, 2010,
      "400- closed" },
    { "C5 a refused client leaves", "X\r\n\r\n", NULL, 0, 100,
      "400- closed", true },
    { "C5 a refused client goes on: 64 KB are discarded", "X\r\n\r\n",
      long_post, 100, 200, "400- " },
};

static void client_rows(void)
{
    for (size_t i = 0; i < COUNT_OF(client_tab); i++)
        for (int drip = 0; drip < 2; drip++) {
            const struct client_case *k = &client_tab[i];
            net_reset();
            world_chunk = drip ? 1 : SIZE_MAX;
            struct sock *s = client_new(false);
            sock_say(s, k->in);
            s->is_eof = k->eof;
            if (k->later) {
                net_run(net_never, k->later_ms);
                sock_say(s, k->later);
                net_run(net_never, k->at_ms - k->later_ms);
            } else {
                net_run(net_never, k->at_ms);
            }
            char got[4000];
            snprintf(got, sizeof got, "%s", client_text(s));
            /* a head that comes byte by byte asks for its 100 */
            bool ok = strcmp(got, k->want) == 0
                || (drip && strstr(k->name, "body at once")
                    && strcmp(got, "100 400+ ") == 0);
            s->is_eof = true;
            net_run(net_never, 700000);
            row(name_of("%s%s", k->name, drip ? ", byte by byte" : ""), ok
                && net_left()[0] == 0, "`%s` %s", got, net_left());
        }
}

static bool is_head_reply(const struct sock *s)
{
    const char *p = memmem(s->out, s->out_len, "\r\n\r\n", 4);
    return p && p + 4 == (const char *)s->out + s->out_len;
}

/* Replies that the client takes slowly, or not at all (C4). */
static void write_rows(void)
{
    static const struct { const char *name; size_t room, step;
        int64_t every_ms; bool metrics; const char *want; } tab[] = {
        { "C4 takes nothing", 0, 0, 0, false, "closed" },
        { "C4 takes ten bytes", 10, 0, 0, false, "# closed" },
        { "C4 takes a byte a ms", 0, 1, 1, false, "200+ " },
        { "C4 takes all after 9 s", 0, 100000, 9000, false, "200+ " },
        { "C4 takes all after 11 s", 0, 100000, 11000, false, "closed" },
        { "C4 a long reply at once", 100000, 0, 0, true, "200+ " },
        { "C4 a long reply, 1 KB a ms", 0, 1000, 1, true, "200+ " },
        { "C4 a long reply, nothing taken", 0, 0, 0, true, "closed" },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        net_reset();
        struct sock *s = client_new(tab[i].metrics);
        s->room = tab[i].room;
        sock_say(s, tab[i].metrics ? GET("/metrics") : GET("/healthz"));
        net_run(net_never, 1);
        for (int64_t ms = 0; ms < 12000; ms += tab[i].every_ms
             ? tab[i].every_ms : 12000) {
            net_run(net_never, tab[i].every_ms ? tab[i].every_ms : 12000);
            s->room += tab[i].step;
        }
        net_run(net_never, 10);
        const char *got = client_text(s);
        row(tab[i].name, strcmp(got, tab[i].want) == 0
            && (strstr(tab[i].want, "closed") != NULL)
            == log_has("event=SLOW_READ"), "`%s` %s", got, log_buf);
        s->is_eof = true;
        net_run(net_never, 700000);
        row(name_of("%s: nothing is left", tab[i].name),
            net_left()[0] == 0, "%s", net_left());
    }
    net_reset();
    struct sock *s = client_new(false);
    sock_say(s, "HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\n");
    net_run(net_never, 10);
    row("HEAD has a head alone", is_head_reply(s), "%.*s", (int)s->out_len,
        s->out);
    s = client_new(true);
    s->tag = 1;
    sock_say(s, "HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    net_run(net_never, 10);
    row("HEAD of the metrics too", is_head_reply(s), "%zu bytes",
        s->out_len);
    s->out_len = s->seen = 0;
    sock_say(s, GET("/healthz"));
    net_run(net_never, 10);
    row("the metrics listener has no other route",
        strcmp(client_text(s), "404+ ") == 0, "%s", client_text(s));
    /* no big buffer is left for a reply, nor for a body */
    net_reset();
    memset(big_used, true, sizeof big_used);
    s = client_new(true);
    s->room = 100;
    sock_say(s, GET("/metrics"));
    net_run(net_never, 10);
    row("no buffer for a long reply", !s->used && log_has("BODY_POOL"),
        "%s", log_buf);
    s = client_new(false);
    sock_say(s, long_post);
    net_run(net_never, 10);
    row("no buffer for a long body", strstr((char *)s->out,
        "M_LIMIT_EXCEEDED") && strcmp(client_text(s), "429- ") == 0, "%s",
        client_text(s));
    memset(big_used, false, sizeof big_used);
}

/* Bodies that start an exchange, to hold a connection. */
static const char hang_body[] = "POST /sfu/get HTTP/1.1\r\nHost: x\r\n"
    "Content-Length: 101\r\n\r\n{\"room\":\"!r:x\",\"openid_token\":"
    "{\"access_token\":\"t\",\"matrix_server_name\":\"hang.org:1\"},"
    "\"device_id\":\"D\"}";

static void full_rows(void)
{
    net_reset();
    cfg.max_conns = 4;
    zone_add("hang.org", "A", "drop");
    zone_add("hang.org", "AAAA", "drop");
    /* idle ones make room, the oldest first, but not for the young */
    struct sock *idle[5];
    for (int i = 0; i < 4; i++) {
        idle[i] = client_new(false);
        net_run(net_never, 100);
    }
    idle[4] = client_new(false);
    sock_say(idle[4], GET("/healthz"));
    net_run(net_never, 100);
    row("a full house: the oldest silent one goes", !idle[0]->used
        && idle[1]->used && strstr(client_text(idle[4]), "200"), "%d %d %s",
        idle[0]->used, idle[1]->used, client_text(idle[4]));
    /* busy ones stay: the lane answers health checks only */
    net_reset();
    cfg.max_conns = 4;
    zone_add("hang.org", "A", "drop");
    zone_add("hang.org", "AAAA", "drop");
    struct sock *busy[4];
    for (int i = 0; i < 4; i++) {
        busy[i] = client_new(false);
        sock_say(busy[i], hang_body);
        net_run(net_never, 10);
    }
    unsigned waiting = 0;
    for (int i = 0; i < 4; i++)
        waiting += conn_pool[i].state == C_WAIT;
    row_int("C3 exchanges in progress", waiting, 4);
    struct sock *s = client_new(false);
    sock_say(s, GET("/healthz"));
    net_run(net_never, 10);
    row("the lane answers /healthz", strstr(client_text(s), "200-"), "%s",
        client_text(s));
    s = client_new(false);
    sock_say(s, hang_body);
    net_run(net_never, 10);
    row("the lane refuses the rest", strstr(client_text(s), "503-"), "%s",
        client_text(s));
    s = client_new(false);
    sock_say(s, GET("/nosuch"));
    net_run(net_never, 10);
    row("the lane refuses unknown paths", strstr(client_text(s), "503-"),
        "%s", client_text(s));
    /* 16 sitters in the lane, older than a moment: the next probe passes */
    for (int i = 0; i < LIM_LANE_CNT; i++) {
        (void)client_new(false);
        net_run(net_never, 100);
    }
    s = client_new(false);
    sock_say(s, GET("/healthz"));
    net_run(net_never, 200);
    row("sitters cannot hold the lane", strstr(client_text(s), "200-"),
        "%s", client_text(s));
    net_run(net_never, 700000);
    row("nothing is left", net_left()[0] == 0, "%s", net_left());
    /* nothing in the lane either: a bare 503 */
    net_reset();
    cfg.max_conns = 4;
    for (int i = 0; i < 4 + LIM_LANE_CNT; i++)
        conn_pool[i] = (struct conn){ .state = C_WAIT, .fd = -1,
            .end = INT64_MAX };
    s = client_new(false);
    sock_say(s, GET("/healthz"));
    net_run(net_never, 10);
    row("pool and lane are full", strstr(client_text(s), "503- closed")
        && log_has("event=CONN_FULL"), "%s", client_text(s));
    /* a client's own request id comes back, an odd one is replaced */
    net_reset();
    s = client_new(false);
    sock_say(s, "GET /healthz HTTP/1.1\r\nHost: x\r\nX-Request-Id: a.b-_9\r\n"
        "\r\nPOST /get_token HTTP/1.1\r\nHost: x\r\nX-Request-Id: a b\r\n"
        "\r\n");
    net_run(net_never, 10);
    row("request ids", strstr((char *)s->out, "\r\nX-Request-Id: a.b-_9\r\n")
        && !strstr((char *)s->out, "X-Request-Id: a b")
        && log_has(" req=") && !log_has("a b"), "%s", (char *)s->out);
    s->is_reset = true;
    net_run(net_never, 10);
    row("C1 a reset", net_left()[0] == 0, "%s", net_left());
    /* a client that leaves while it waits */
    net_reset();
    cfg.lookups_max = 1;
    zone_add("hang.org", "A", "drop");
    zone_add("hang.org", "AAAA", "drop");
    busy[0] = client_new(false);
    sock_say(busy[0], hang_body);
    net_run(net_never, 10);
    busy[1] = client_new(false);
    sock_say(busy[1], hang_body);
    net_run(net_never, 10);
    busy[1]->is_reset = true;
    busy[1]->dial_errno = ECONNRESET;
    net_run(net_never, 10);
    row("X1 a client that leaves waits no more", !busy[1]->used
        && met.gauge[GA_WAITING] == 0 && busy[0]->used, "%d, %lld wait",
        busy[1]->used, (long long)met.gauge[GA_WAITING]);
    net_run(net_never, 700000);
    row("X1 nothing is left of it", net_left()[0] == 0, "%s", net_left());
    /* a client that leaves while its exchange runs */
    net_reset();
    zone_add("hang.org", "A", "drop");
    zone_add("hang.org", "AAAA", "drop");
    s = client_new(false);
    sock_say(s, hang_body);
    net_run(net_never, 10);
    s->is_reset = true;
    s->dial_errno = ECONNRESET;
    net_run(net_never, 700000);
    row("C3 the client leaves", net_left()[0] == 0
        && log_has("event=CLIENT_GONE"), "%s %s", net_left(), log_buf);
    /* no descriptor left: a pause, then on */
    net_reset();
    world_accept_errno = EMFILE;
    s = client_new(false);
    sock_say(s, GET("/healthz"));
    net_run(net_never, 30);
    row("no descriptor left", log_has("event=FD_FULL") && s->out_len == 0,
        "%s", log_buf);
    world_accept_errno = 0;
    net_run(net_never, 200);
    row("and accepted later", strcmp(client_text(s), "200+ ") == 0, "%s",
        client_text(s));
}

static void test_server(void)
{
    int n = sprintf(long_post, "POST /get_token HTTP/1.1\r\nHost: x\r\n"
        "Content-Length: 60000\r\n\r\n");
    memset(long_post + n, 'x', 60000);
    strcpy(long_line, "GET /");
    memset(long_line + 5, 'x', 5000);
    strcpy(long_field, "GET / HTTP/1.1\r\nX: ");
    memset(long_field + strlen(long_field), 'x', 9000);
    client_rows();
    write_rows();
    full_rows();
}

/* ---- 22: the token exchange (rows X1 to X5) ---- */

#define SFU_OK "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"

/* The homeserver of every name at 10.0.0.7 by override, the SFU at
 * 10.0.0.8; users of a.org and example.com have full access. */
static void exchange_reset(const char *userinfo, const char *const *sfu)
{
    static const char *const name[] = { "a.org", "b.org", "example.com" };
    net_reset();
    zone_add("hs", "A", "A:10.0.0.7");
    zone_add("sfu", "A", "A:10.0.0.8");
    site_tab[0] = (struct site){ .host = "10.0.0.7", .port = 80,
        .reply = { userinfo } };
    site_tab[1] = (struct site){ .host = "10.0.0.8", .port = 7880,
        .reply = { SFU_OK } };
    for (int i = 0; sfu && i < 6 && sfu[i]; i++)
        site_tab[1].reply[i] = sfu[i];
    for (size_t i = 0; i < 3; i++) {
        cfg.fed[i].name = sl_str(name[i]);
        if (!cfg_base(SL("http://hs"), true, &cfg.fed[i].base))
            abort();
    }
    cfg.fed_cnt = 3;
    cfg.full_access[0] = SL("a.org");
    cfg.full_access[1] = SL("example.com");
    cfg.full_access_cnt = 2;
    cfg.blocked[0] = SL("*.blocked.org");
    cfg.blocked_cnt = 1;
    cfg.livekit_url = SL("wss://sfu.example.org");
    if (!cfg_base(SL("http://sfu:7880"), false, &cfg.api))
        abort();
    cfg.key[0].name = SL("devkey");
    key_of(SL("devsecret"), &cfg.key[0].sec_key);
    cfg.key_cnt = 1;
    world_wall = 1726760839000 - world_ms;
}

static struct sock *exchange_post(const char *path, const char *body)
{
    struct sock *s = client_new(false);
    char head[200];
    snprintf(head, sizeof head, "POST %s HTTP/1.1\r\nHost: x\r\n"
        "Content-Length: %zu\r\n\r\n", path, strlen(body));
    sock_say(s, head);
    sock_say(s, body);
    return s;
}

/* Replace $R $S $M $T by the members that most bodies have. */
static void body_fill(const char *in, char *out, size_t cap)
{
    static const struct { char c; const char *text; } part[] = {
        { 'R', "\"room_id\":\"!r:a.org\",\"slot_id\":\"m.call#ROOM\"" },
        { 'S', "\"room\":\"!r:a.org\"" },
        { 'M', "\"member\":{\"id\":\"m\",\"claimed_user_id\":\"@u:a.org\","
          "\"claimed_device_id\":\"D\"}" },
        { 'T', "\"openid_token\":{\"access_token\":\"tok\",\"expires_in\":"
          "3600,\"matrix_server_name\":\"a.org\",\"token_type\":\"Bearer\"}" },
    };
    size_t n = 0;
    for (; *in; in++) {
        const char *text = NULL;
        for (size_t i = 0; *in == '$' && i < COUNT_OF(part); i++)
            if (part[i].c == in[1])
                text = part[i].text;
        if (text) {
            n += (size_t)snprintf(out + n, cap - n, "%s", text);
            in++;
        } else if (n + 1 < cap) {
            out[n++] = *in;
        }
    }
    out[n < cap ? n : cap - 1] = 0;
}

/* What the reply is: status and errcode, or the join token's payload. */
static const char *exchange_text(const struct sock *s)
{
    static char text[4000];
    const char *p = memmem(s->out, s->out_len, "\r\n\r\n", 4);
    int code = 0;
    if (!p || sscanf((const char *)s->out, "HTTP/1.1 %d", &code) != 1)
        return "none";
    p += 4;
    sl body = { (const uint8_t *)p, s->out_len - (size_t)(p
        - (const char *)s->out) };
    if (body.len == 0) {
        snprintf(text, sizeof text, "%d", code);
        return text;
    }
    struct got { sl url, jwt, errcode, error; } got = { { 0 } };
    static const struct js_field field[] = {
        { "url", JS_STRING, offsetof(struct got, url), NULL },
        { "jwt", JS_STRING, offsetof(struct got, jwt), NULL },
        { "errcode", JS_STRING, offsetof(struct got, errcode), NULL },
        { "error", JS_STRING, offsetof(struct got, error), NULL },
        { "retry_after_ms", JS_ANY, 0, NULL } };
    static const struct js_table tab = { field, 5, true, false };
    static uint8_t copy[70000];
    memcpy(copy, body.p, body.len);
    if (js_parse(copy, body.len, &tab, &got))
        return "no JSON";
    if (got.errcode.len) {
        snprintf(text, sizeof text, "%d %.*s", code, (int)got.errcode.len,
            (const char *)got.errcode.p);
        return text;
    }
    if (!sl_eq(got.url, cfg.livekit_url))
        return "another url";
    snprintf(text, sizeof text, "%d %.*s", code, (int)got.jwt.len,
        (const char *)got.jwt.p);
    return text;
}

/* path | status errcode | event | body, or `200 jwt` */
static void exchange_row(struct vec *v)
{
    static char body[200000];
    exchange_reset("HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n"
        "{\"sub\":\"@u:a.org\"}", NULL);
    site_tab[0].reply[0] = "HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\n"
        "{\"sub\":\"@u:a.org\"}";
    if (strstr(vec_str(v, 3), "b.org"))
        site_tab[0].reply[0] = "HTTP/1.1 200 OK\r\nContent-Length: 18\r\n"
            "\r\n{\"sub\":\"@u:b.org\"}";
    body_fill(vec_str(v, 3), body, sizeof body);
    unsigned before = world_connects;
    struct sock *s = exchange_post(vec_str(v, 0), body);
    net_run(net_never, 3000);
    const char *want = vec_str(v, 1), *got = exchange_text(s);
    bool granted = strcmp(want, "200 jwt") == 0;
    char event[100];
    snprintf(event, sizeof event, "event=%s ", vec_str(v, 2));
    bool early = !granted && strncmp(want, "400 M_NOT", 9) == 0;
    row(vec_name(v, vec_str(v, 3)), (granted ? strncmp(got, "200 ey", 6) == 0
        : strcmp(got, want) == 0) && log_has(event)
        && (!early || world_connects == before), "%s %s", got, log_buf);
    net_run(net_never, 700000);
    if (net_left()[0])
        row(vec_name(v, "left"), false, "%s", net_left());
}

/* Tokens byte for byte as in tokens.txt. */
static void grant_rows(void)
{
    static const char alice[] = "HTTP/1.1 200 OK\r\nContent-Length: 28\r\n"
        "\r\n{\"sub\":\"@alice:example.com\"}";
    static const struct { const char *name, *path, *body; bool full,
        publish, update; const char *signature; const char *has; } tab[] = {
        { "full access", "/get_token", "{\"room_id\":\"!roomid:example.com"
          "\",\"slot_id\":\"slot1234\",\"member\":{\"id\":\"memberABC\","
          "\"claimed_user_id\":\"@alice:example.com\","
          "\"claimed_device_id\":\"DEVICE123\"},\"openid_token\":"
          "{\"access_token\":\"t\",\"matrix_server_name\":\"example.com\"}}",
          true, false, true,
          ".HDaz2PvwE1NCdaW2H8uJ6aI2EcEvYYcYJdAYq4hGZJ8", "CreateRoom" },
        { "restricted", "/get_token", "{\"room_id\":\"!roomid:example.com"
          "\",\"slot_id\":\"slot1234\",\"member\":{\"id\":\"memberABC\","
          "\"claimed_user_id\":\"@alice:example.com\","
          "\"claimed_device_id\":\"DEVICE123\"},\"openid_token\":"
          "{\"access_token\":\"t\",\"matrix_server_name\":\"example.com\"}}",
          false, false, true,
          ".E0dXXCytkS9YTefpWMEJ5XsTc8p6lfI-budXH8iIrJE", NULL },
        { "legacy, restricted, metadata off", "/sfu/get",
          "{\"room\":\"!tDLCaLXijNtYcJZEey:example.com\",\"device_id\":"
          "\"DEVICE123\",\"openid_token\":{\"access_token\":\"t\","
          "\"matrix_server_name\":\"example.com\"}}", false, false, false,
          ".Va_2MxKzGGxGSHxqNnpNPhFC--PqsSUny4_BIeRZhaY", NULL },
        { "restricted may publish by the switch", "/get_token",
          "{\"room_id\":\"!roomid:example.com\",\"slot_id\":\"slot1234\","
          "\"member\":{\"id\":\"memberABC\",\"claimed_user_id\":"
          "\"@alice:example.com\",\"claimed_device_id\":\"DEVICE123\"},"
          "\"openid_token\":{\"access_token\":\"t\","
          "\"matrix_server_name\":\"example.com\"}}", false, true, true,
          ".HDaz2PvwE1NCdaW2H8uJ6aI2EcEvYYcYJdAYq4hGZJ8", NULL },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        exchange_reset(alice, NULL);
        cfg.full_access_cnt = tab[i].full ? 2 : 1;
        cfg.restricted_publish = tab[i].publish;
        cfg.can_update = tab[i].update;
        struct sock *s = exchange_post(tab[i].path, tab[i].body);
        world_wall += 50;                 /* the second lasts */
        net_run(net_never, 900);
        const char *got = exchange_text(s);
        row(name_of("token: %s", tab[i].name), sl_ends(sl_str(got),
            sl_str(tab[i].signature)) && (site_tab[1].requests == 1)
            == tab[i].full, "%s, %d calls at the SFU: %s", got,
            site_tab[1].requests, log_buf);
        row(name_of("token: %s: it is in no log", tab[i].name),
            !log_has(tab[i].signature + 1), "%s", log_buf);
    }
    /* the call at the SFU, byte for byte */
    exchange_reset(alice, NULL);
    struct sock *s = exchange_post(tab[0].path, tab[0].body);
    net_run(net_never, 100);
    const char *r = site_tab[1].request;
    static const char *const part[] = {
        "POST /twirp/livekit.RoomService/CreateRoom HTTP/1.1\r\n",
        "\r\nHost: sfu:7880\r\n",
        "\r\nContent-Type: application/protobuf\r\n",
        "\r\nAccept: application/protobuf\r\n",
        "\r\nContent-Length: 50\r\n", "\r\nAuthorization: Bearer eyJ",
        "\r\n\r\n\n+O8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3qSc\x10\xac\2P"
        };
    for (size_t i = 0; i < COUNT_OF(part); i++)
        row(name_of("CreateRoom: %s", part[i]), strstr(r, part[i]) != NULL,
            "%s", r);
    (void)s;
}

/* X4 and X5: how often the SFU is called, and when. */
static void room_rows(void)
{
    static const char user[] = "HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\n"
        "{\"sub\":\"@u:a.org\"}";
    static const struct { const char *name; const char *sfu[4];
        enum site_dial dial; const char *want, *event; int calls;
        int64_t min_ms, max_ms; } tab[] = {
        { "X4 room ready", { SFU_OK }, DIAL_OK, "200 ey", "ROOM_CREATED", 1,
          0, 10 },
        { "X4 a reply with a body", { "HTTP/1.1 200 OK\r\n"
          "Content-Length: 3\r\n\r\nabc" }, DIAL_OK, "200 ey",
          "ROOM_CREATED", 1, 0, 10 },
        { "X5 an error, then ready", { STATUS(503), SFU_OK }, DIAL_OK,
          "200 ey", "ROOM_CREATED", 2, 200, 215 },
        { "X5 twice an error", { STATUS(503), STATUS(503), SFU_OK },
          DIAL_OK, "500 M_UNKNOWN", "SFU_REFUSED", 2, 200, 215 },
        { "X5 closed, then ready", { "~", SFU_OK }, DIAL_OK, "200 ey",
          "ROOM_CREATED", 2, 200, 215 },
        { "X4 wrong key: not repeated", { STATUS(401), SFU_OK }, DIAL_OK,
          "500 M_UNKNOWN", "SFU_AUTH", 1, 0, 10 },
        { "X4 refused: not repeated", { "HTTP/1.1 403 x\r\nContent-Length: "
          "28\r\n\r\n{\"code\":\"permission_denied\"}" }, DIAL_OK,
          "500 M_UNKNOWN", "SFU_REFUSED", 1, 0, 10 },
        { "X4 no such route", { STATUS(404) }, DIAL_OK, "500 M_UNKNOWN",
          "SFU_REFUSED", 1, 0, 10 },
        { "X4 redirect", { MOVED("http://sfu:7880/x") }, DIAL_OK,
          "500 M_UNKNOWN", "SFU_REFUSED", 1, 0, 10 },
        { "X4 unreachable, X5", { SFU_OK }, DIAL_REFUSE, "500 M_UNKNOWN",
          "CONNECT_FAILED", 0, 200, 215 },
        { "X4 never connects: 10 s in all", { SFU_OK }, DIAL_HOLE,
          "500 M_UNKNOWN", "CONNECT_TIMEOUT", 0, 9900, 10100 },
        { "X4 silent: 10 s in all", { "" }, DIAL_OK, "500 M_UNKNOWN",
          "HS_TIMEOUT", 1, 9900, 10100 },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        char body[2000];
        exchange_reset(user, tab[i].sfu);
        site_tab[1].dial = tab[i].dial;
        body_fill("{$R,$M,$T}", body, sizeof body);
        struct sock *s = exchange_post("/get_token", body);
        int64_t begin = world_ms;
        while (s->out_len == 0 && world_ms < begin + 30000)
            net_run(net_never, 1);
        int64_t ms = world_ms - begin;
        const char *got = exchange_text(s);
        char event[100];
        snprintf(event, sizeof event, "event=%s ", tab[i].event);
        row(tab[i].name, strncmp(got, tab[i].want, strlen(tab[i].want)) == 0
            && log_has(event) && site_tab[1].requests == tab[i].calls
            && ms >= tab[i].min_ms && ms <= tab[i].max_ms,
            "%s, %d calls, %lld ms %s", got, site_tab[1].requests,
            (long long)ms, log_buf);
        net_run(net_never, 700000);
        row(name_of("%s: nothing is left", tab[i].name), net_left()[0] == 0,
            "%s", net_left());
    }
}

/* A body with a token and a room of its own: equal ones share an answer. */
static const char *body_nth(const char *body, int n)
{
    static const char *const at[] = { "\"access_token\":\"",
        "\"room_id\":\"" };
    static char text[2][2200];
    snprintf(text[0], sizeof text[0], "%s", body);
    for (size_t i = 0; i < COUNT_OF(at); i++) {
        const char *cut = strstr(text[i % 2], at[i]) + strlen(at[i]);
        snprintf(text[1 - i % 2], sizeof text[0], "%.*sn%d-%s",
            (int)(cut - text[i % 2]), text[i % 2], n, cut);
    }
    return text[0];
}

/* X1 and X3: waiting for a slot. */
static void wait_rows(void)
{
    static const char user[] = "HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\n"
        "{\"sub\":\"@u:a.org\"}";
    static char body[2000];
    body_fill("{$R,$M,$T}", body, sizeof body);
    exchange_reset(user, NULL);
    cfg.lookups_max = 1;
    site_tab[0].slow_ms = 3000;
    struct sock *s[130];
    for (int i = 0; i < 3; i++)
        s[i] = exchange_post("/get_token", body_nth(body, i));
    net_run(net_never, 100);
    row("X1 one looks up, two wait", exchange_pool[0].state == X_LOOKUP
        && exchange_pool[1].state == X_WAIT
        && exchange_pool[2].state == X_WAIT
        && met.gauge[GA_WAITING] == 2, "%d %d %d",
        exchange_pool[0].state, exchange_pool[1].state,
        exchange_pool[2].state);
    net_run(net_never, 3100);
    row("X1 then the next", s[0]->out_len > 0 && s[1]->out_len == 0
        && exchange_pool[1].state == X_LOOKUP
        && exchange_pool[2].state == X_WAIT, "%zu %zu", s[0]->out_len,
        s[1]->out_len);
    net_run(net_never, 7000);
    row("X1 all are served", strncmp(exchange_text(s[2]), "200 ey", 6) == 0,
        "%s", exchange_text(s[2]));
    /* nobody waits longer than a lookup may take */
    exchange_reset("", NULL);
    cfg.lookups_max = 1;
    cfg.lookup_ms = 30000;
    s[0] = exchange_post("/get_token", body);
    net_run(net_never, 10);
    cfg.lookup_ms = 5000;
    s[1] = exchange_post("/get_token", body_nth(body, 1));
    int64_t begin = world_ms;
    while (s[1]->out_len == 0 && world_ms < begin + 30000)
        net_run(net_never, 10);
    row("X1 waited long enough", strcmp(exchange_text(s[1]),
        "429 M_LIMIT_EXCEEDED") == 0 && log_has("event=WAIT_TIMEOUT ")
        && world_ms - begin >= 5000 && world_ms - begin <= 6100
        && strstr((char *)s[1]->out, "\r\nRetry-After: "), "%s, %lld ms",
        exchange_text(s[1]), (long long)(world_ms - begin));
    /* too many wait for one stranger */
    exchange_reset("", NULL);
    zone_add("far.org", "A", "drop");
    cfg.lookups_per_server = 1;
    body_fill("{$R,\"member\":{\"id\":\"m\",\"claimed_user_id\":\"@u:f\","
        "\"claimed_device_id\":\"D\"},\"openid_token\":{\"access_token\":"
        "\"t\",\"matrix_server_name\":\"far.org:1\"}}", body, sizeof body);
    for (int i = 0; i < 130; i++) {
        s[i] = exchange_post("/get_token", body_nth(body, i));
        net_run(net_never, 1);
    }
    row("X1 the queue of a stranger is full", s[128]->out_len == 0
        && strcmp(exchange_text(s[129]), "429 M_LIMIT_EXCEEDED") == 0
        && log_has("event=QUEUE_FULL "), "%s", exchange_text(s[129]));
    struct sock *other = NULL;
    body_fill("{$R,$M,$T}", body, sizeof body);
    site_tab[0].reply[0] = user;
    other = exchange_post("/get_token", body);
    net_run(net_never, 100);
    row("X1 others are served meanwhile", strncmp(exchange_text(other),
        "200 ey", 6) == 0, "%s", exchange_text(other));
    net_run(net_never, 800000);
    row("X1 nothing is left", net_left()[0] == 0
        && met.gauge[GA_WAITING] == 0 && met.gauge[GA_EXCHANGES] == 0
        && met.gauge[GA_CONNECTIONS] == 0, "%s", net_left());
    /* X3: all calls at the SFU hang */
    exchange_reset(user, (const char *const[]){ "", NULL });
    struct sock *many[LIM_SFU_CNT + 1];
    for (int i = 0; i <= LIM_SFU_CNT; i++) {
        many[i] = exchange_post("/get_token", body_nth(body, i));
        net_run(net_never, 10);
    }
    unsigned room = 0, waiting = 0;
    for (int i = 0; i < LIM_SLOT_CNT; i++) {
        room += exchange_pool[i].state == X_ROOM;
        waiting += exchange_pool[i].state == X_ROOM_WAIT;
    }
    row("X3 one waits for an SFU slot", room == LIM_SFU_CNT && waiting == 1,
        "%u, %u wait", room, waiting);
    site_tab[1].reply[0] = SFU_OK;
    site_tab[1].reply[1] = NULL;
    net_run(net_never, 9400);
    row("X3 and gets one", strncmp(exchange_text(many[LIM_SFU_CNT]),
        "200 ey", 6) == 0 || exchange_pool[LIM_SFU_CNT].state
        == X_ROOM_WAIT, "%s", exchange_text(many[LIM_SFU_CNT]));
    net_run(net_never, 800000);
    row("X3 nothing is left", net_left()[0] == 0
        && met.gauge[GA_WAITING] == 0, "%s", net_left());
    unsigned answered = 0;
    for (int i = 0; i <= LIM_SFU_CNT; i++)
        answered += many[i]->out_len > 0;
    row_int("X3 all are answered", answered, LIM_SFU_CNT + 1);
    /* X3: its own 10 s */
    exchange_reset(user, (const char *const[]){ "", NULL });
    for (int i = 0; i < LIM_SFU_CNT; i++) {
        up_pool[LIM_UP_CNT + i].state = UP_DONE;   /* held by nobody */
    }
    other = exchange_post("/get_token", body);
    begin = world_ms;
    while (other->out_len == 0 && world_ms < begin + 30000)
        net_run(net_never, 10);
    row("X3 waited long enough", strcmp(exchange_text(other),
        "500 M_UNKNOWN") == 0 && log_has("event=CHAN_FULL ")
        && world_ms - begin >= 10000 && world_ms - begin < 10100,
        "%s, %lld ms", exchange_text(other), (long long)(world_ms - begin));
    for (int i = 0; i < LIM_SFU_CNT; i++)
        up_pool[LIM_UP_CNT + i].state = UP_FREE;
}

static void test_exchange(void)
{
    vec_each("exchange.txt", exchange_row);
    grant_rows();
    room_rows();
    wait_rows();
}

/* ---- 26: the loop, and stopping ---- */

/* Whether the tables of the loop agree with each other. */
static bool loop_is_sound(void)
{
    bool ok = true;
    for (size_t i = 0; i < heap_cnt; i++) {
        const struct watch *w = &watch_tab[heap_tab[i]];
        ok &= w->heap_at == i + 1
            && (i == 0 || watch_tab[heap_tab[(i - 1) / 2]].deadline
                <= w->deadline);
    }
    size_t heaps = 0, stale = 0;
    for (size_t i = 0; i < LIM_FD_CNT; i++) {
        ok &= !fd_tab[i].who || watch_tab[fd_tab[i].who - 1].fd_at == i + 1;
        stale += fd_tab[i].is_stale;
    }
    for (size_t i = 0; i < WATCH_CNT; i++)
        heaps += watch_tab[i].heap_at > 0;
    return ok && heaps == heap_cnt && stale == stale_cnt;
}

static int watched_cnt(void)
{
    int n = 0;
    for (size_t i = 0; i < LIM_FD_CNT; i++)
        n += fd_tab[i].who > 0;
    return n;
}

#define STRAY "ca2.pem"

/* A CA file with an authority that has signed nothing here, or with none. */
static void stray_file(bool is_good)
{
    struct bb b = work_bb();
    if (is_good)
        pem_put(&b, cert_make((struct plan){ .is_ca = true,
            .subject = "stray", .issuer = "stray", .key = K_OTHER,
            .signer = K_OTHER }));
    bb_byte(&b, 0);
    file_write(STRAY, (char *)work_buf);
}

static void test_loop(void)
{
    /* random settings against what they should add up to */
    net_reset();
    static struct { int fd; int64_t deadline; } want[LIM_UP_CNT * 4];
    for (size_t i = 0; i < COUNT_OF(want); i++) {
        want[i].fd = -1;
        want[i].deadline = INT64_MAX;
    }
    bool sound = true, same = true;
    for (int round = 0; round < 20000; round++) {
        size_t i = dice() % COUNT_OF(want);
        want[i].fd = dice() % 3 ? (int)(1300 + i + dice() % 2 * 1000) : -1;
        want[i].deadline = dice() % 4 ? (int64_t)(world_ms + 1000000
            + (int64_t)(dice() % 1000)) : INT64_MAX;
        loop_set(KIND_TRY, i, want[i].fd, POLLIN, want[i].deadline);
        if (round % 100)
            continue;
        sound &= loop_is_sound();
        int64_t least = INT64_MAX;
        for (size_t k = 0; k < COUNT_OF(want); k++) {
            const struct watch *w = &watch_tab[loop_base(KIND_TRY) + k];
            least = want[k].deadline < least ? want[k].deadline : least;
            same &= w->fd_at - 1 == want[k].fd && (want[k].fd < 0
                    || fd_tab[want[k].fd].want == POLLIN) && (want[k].deadline == INT64_MAX
                    ? w->heap_at == 0 : w->heap_at > 0
                      && w->deadline == want[k].deadline);
        }
        same &= heap_cnt == 0 || watch_tab[heap_tab[0]].deadline == least;
    }
    row("20,000 random settings: tables sound", sound, "unsound");
    row("20,000 random settings: all kept", same, "lost");
    for (size_t i = 0; i < COUNT_OF(want); i++)
        loop_set(KIND_TRY, i, -1, 0, INT64_MAX);
    row("all taken back", heap_cnt == 0 && watched_cnt() == 2, "%zu %d",
        heap_cnt, watched_cnt());
    loop_tell();                         /* nobody wants them any more */
    row_int("nothing is left to tell", (int64_t)stale_cnt, 0);
    for (int i = 0; i < 3; i++)
        loop_wake(KIND_EXCHANGE, 7);
    row_int("woken once", (int64_t)wake_cnt, 1);
    net_run(net_never, 1);
    row_int("and stepped", (int64_t)wake_cnt, 0);
    /* SIGTERM: lame duck, drain, over */
    static const struct { const char *name; int64_t lame_ms, drain_ms;
        bool busy, second; int64_t over_ms; } stop[] = {
        { "nothing to do: at once", 0, 7000, false, false, 0 },
        { "lame duck first", 2000, 7000, false, false, 2000 },
        { "an exchange in flight is waited for", 0, 7000, true, false,
          3000 },
        { "no longer than the drain time", 0, 1000, true, false, 1000 },
        { "a second signal ends it", 5000, 7000, true, true, 500 },
    };
    for (size_t i = 0; i < COUNT_OF(stop); i++) {
        char body[2000];
        exchange_reset("HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\n"
            "{\"sub\":\"@u:a.org\"}", NULL);
        body_fill("{$R,$M,$T}", body, sizeof body);
        cfg.lame_duck_ms = stop[i].lame_ms;
        cfg.drain_ms = stop[i].drain_ms;
        site_tab[0].slow_ms = 3000;
        struct sock *idle = client_new(false), *s = NULL;
        if (stop[i].busy)
            s = exchange_post("/get_token", body);
        net_run(net_never, 1);
        int64_t begin = world_ms;
        signal_stop = 1;
        while (!loop_is_over && world_ms < begin + 20000) {
            if (stop[i].second && world_ms >= begin + 500)
                signal_stop = 2;
            world_end = world_ms + 10;
            loop_round(NULL);
            world_end = INT64_MAX;
        }
        int64_t ms = world_ms - begin;
        row(name_of("stop: %s", stop[i].name), loop_is_over
            && ms >= stop[i].over_ms && ms <= stop[i].over_ms + 30
            && (stop[i].second || (!idle->used
                && listener_pool[0].fd == -1 && listener_pool[2].fd == -1)),
            "%d, %lld ms, %s", loop_is_over, (long long)ms, net_left());
        if (s && stop[i].over_ms == 3000)
            row("stop: the exchange got its answer, and close",
                strncmp(exchange_text(s), "200 ey", 6) == 0
                && strstr((char *)s->out, "\r\nConnection: close\r\n"),
                "%s", exchange_text(s));
    }
    /* SIGHUP: other anchors end what the old ones vouched for */
    for (int bad = 0; bad < 2; bad++) {
        net_reset();
        zone_add("a.org", "A", A1);
        site_tab[0] = (struct site){ .host = "10.0.0.1", .port = 443,
            .tls = TLS_YES, .san = "a.org", .reply = { OK_REPLY } };
        (void)up_begin_test((struct up_opt){ .tls = true });
        (void)net_run(up_is_over, 60000);
        up_close(up_test, world_ms);
        unsigned idle = sock_open_cnt(), held = 0;
        stray_file(!bad);
        cfg.ca_file = SL(STRAY "\0");
        cfg.ca_only = true;
        signal_reload = 1;
        net_run(net_never, 10);
        for (size_t i = 0; i < LIM_SESSION_CNT; i++)
            held += session_cache[i].until_wall > 0;
        (void)up_begin_test((struct up_opt){ .tls = true });
        (void)net_run(up_is_over, 60000);
        row(bad ? "SIGHUP, bad file: all stays" : "SIGHUP, other anchors",
            idle == 1 && (bad ? held == 1 && met.gauge[GA_UPSTREAM] == 1
                && site_tab[0].dials == 1 && log_has("event=ANCHORS_BAD")
                && sl_eq(up_text(up_test), SL("200 {}"))
            : held == 0 && site_tab[0].dials == 2
                && log_has("event=ANCHORS ")
                && sl_eq(up_text(up_test), SL("TLS_UNTRUSTED tls"))),
            "%u idle, %u sessions, %d dials, %.*s", idle, held,
            site_tab[0].dials, (int)up_text(up_test).len,
            up_text(up_test).p);
        up_close(up_test, world_ms);
    }
    /* what was in use meanwhile is not kept */
    net_reset();
    zone_add("a.org", "A", A1);
    site_tab[0] = (struct site){ .host = "10.0.0.1", .port = 443,
        .tls = TLS_YES, .san = "a.org", .reply = { OK_REPLY },
        .slow_ms = 1000 };
    (void)up_begin_test((struct up_opt){ .tls = true });
    net_run(net_never, 500);
    stray_file(true);
    cfg.ca_file = SL(STRAY "\0");
    cfg.ca_only = true;
    signal_reload = 1;
    (void)net_run(up_is_over, 60000);
    row("SIGHUP, a call in flight is finished", sl_eq(up_text(up_test),
        SL("200 {}")), "%.*s", (int)up_text(up_test).len,
        up_text(up_test).p);
    up_close(up_test, world_ms);
    row("SIGHUP, its connection is not kept", net_left()[0] == 0, "%s",
        net_left());
    exchange_reset("", NULL);
    cfg.lame_duck_ms = 5000;
    signal_stop = 1;
    net_run(net_never, 10);
    struct sock *s = client_new(false);
    sock_say(s, GET("/healthz"));
    net_run(net_never, 10);
    row("lame duck: /healthz says 503", strncmp((char *)s->out,
        "HTTP/1.1 503", 12) == 0 && strstr((char *)s->out,
        "\r\nConnection: close\r\n"), "%s", client_text(s));
}

/* ---- each system call fails in turn ---- */

static void test_faults(void)
{
    static const int err[] = { 0, EINTR, EAGAIN, ECONNRESET, ENOBUFS,
        EMFILE };
    static const char *const err_name[] = { "short", "EINTR", "EAGAIN",
        "ECONNRESET", "ENOBUFS", "EMFILE" };
    char body[2000];
    body_fill("{$R,$M,$T}", body, sizeof body);
    for (int tls = 0; tls < 2; tls++) {
        long calls = 0;
        for (size_t e = 0; e < COUNT_OF(err); e++) {
            unsigned ok = 0, refused = 0, closed = 0, odd = 0, left = 0;
            for (long at = -1; at < calls || at < 0; at++) {
                exchange_reset("HTTP/1.1 200 OK\r\nContent-Length: 18\r\n"
                    "\r\n{\"sub\":\"@u:a.org\"}", NULL);
                if (tls) {                 /* the whole discovery instead */
                    cfg.fed_cnt = 0;
                    zone_add("a.org", "A", "cut A:10.0.0.1");
                    zone_add("_matrix-fed._tcp.b.org", "SRV",
                        "SRV:1/1/77/c.org");
                    zone_add("c.org", "A", "A:10.0.0.2");
                    site_tab[2] = (struct site){ "10.0.0.1", 443,
                        .tls = TLS_YES, .san = "a.org",
                        .reply = { WK("5\r\nb.org") } };
                    site_tab[3] = (struct site){ "10.0.0.2", 77,
                        .tls = TLS_YES, .san = "b.org",
                        .reply = { SUB_A } };
                }
                fault_seen = 0;
                fault_at = at < 0 ? FAULT_NONE : at;
                fault_errno = err[e];
                struct sock *s = exchange_post("/get_token", body);
                net_run(net_never, 60000);
                if (at < 0)
                    calls = fault_seen;
                fault_at = FAULT_NONE;
                const char *got = exchange_text(s);
                ok += strncmp(got, "200 ey", 6) == 0;
                refused += strncmp(got, "401 ", 4) == 0
                    || strncmp(got, "500 M_UNKNOWN", 13) == 0
                    || strncmp(got, "503", 3) == 0;   /* the spare one */
                closed += s->out_len == 0 || strcmp(got, "none") == 0;
                odd += strncmp(got, "200 ey", 6) && strncmp(got, "401 ", 4)
                    && strncmp(got, "500 ", 4) && strncmp(got, "503", 3)
                    && strcmp(got, "none");
                /* what the client keeps open ends in its own time */
                net_run(net_never, 800000);
                if (world_client_cnt) {    /* accept itself failed */
                    world_client[0]->used = false;
                    world_client_cnt = 0;
                }
                left += net_left()[0] != 0;
                if (net_left()[0] && left < 3)
                    row(name_of("call %ld of %ld: %s", at, calls,
                        err_name[e]), false, "%s", net_left());
            }
            row(name_of("%ld calls fail in turn: %s%s", calls, err_name[e],
                        tls ? ", discovery by TLS" : ""), odd == 0
                && left == 0 && (long)(ok + refused + closed) == calls + 1
                && ok > 0
                && (err[e] != EINTR || refused + closed == 0)
                && (err[e] != 0 || closed == 0), "%u ok, %u refused, %u "
                "closed, %u odd, %u left", ok, refused, closed, odd, left);
        }
    }
}
