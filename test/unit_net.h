/* The peers of the scripted world: nameservers, and HTTP servers with and
 * without TLS, described by tables. */

/* ---- DNS: answers by script, one word a question, the last for ever ---- */

struct zone {
    const char *name, *type, *script;
    unsigned asked;
};
enum { ZONE_CNT = 24 };
static struct zone zone_tab[ZONE_CNT];
static char dns_log[8192];
static uint32_t dns_ttl = 300;

/* The n-th word of a script, or its last. */
static void script_word(const char *script, unsigned n, char out[200])
{
    sl rest = sl_str(script), word;
    out[0] = 0;
    for (unsigned i = 0; i <= n && sl_word(&rest, " ", &word); i++)
        snprintf(out, 200, "%.*s", (int)word.len, (const char *)word.p);
}

static void dns_records(struct bb *b, const char *what, unsigned *cnt)
{
    uint8_t nb[300];
    sl rest = sl_str(strchr(what, ':') + 1), word;
    bool is_srv = strncmp(what, "SRV", 3) == 0;
    while (sl_word(&rest, is_srv ? "+" : ",", &word)) {
        char text[200];
        snprintf(text, sizeof text, "%.*s", (int)word.len,
            (const char *)word.p);
        struct ip a;
        if (is_srv) {
            unsigned num[3];
            char host[150];
            uint8_t data[400];
            struct bb d = BB(data);
            if (sscanf(text, "%u/%u/%u/%149s", &num[0], &num[1], &num[2],
                       host) != 4)
                abort();
            for (int k = 0; k < 3; k++)
                put16(&d, num[k]);
            if (strcmp(host, ".") == 0)
                bb_byte(&d, 0);
            else
                bb_put(&d, wire_name(nb, host));
            dns_rec(b, 12, NULL, DNS_SRV, dns_ttl, work_done(&d));
        } else if (addr_of(text, &a)) {
            dns_rec(b, 12, NULL, a.v6 ? DNS_AAAA : DNS_A, dns_ttl,
                (sl){ a.b, a.v6 ? 16 : 4 });
        }
        (*cnt)++;
    }
}

/* Answer one question as its zone's script says. */
static void dns_serve(struct sock *s, sl q)
{
    uint8_t name[LIM_HOST_LEN], name_len, nb[300];
    size_t pos = 12;
    char what[200] = "nx";
    if (q.len < 17 || !dns_parse_name(q, &pos, name, &name_len))
        abort();
    unsigned type = be16(q.p + pos);
    const char *type_text = type == DNS_A ? "A" : type == DNS_AAAA ? "AAAA"
        : "SRV";
    size_t used = strlen(dns_log);
    snprintf(dns_log + used, sizeof dns_log - used, "%.*s/%s@%s%s ",
        name_len, name, type_text, sock_host(s), s->is_udp ? "" : "/tcp");
    for (struct zone *z = zone_tab; z < zone_tab + ZONE_CNT && z->name; z++)
        if (sl_eq((sl){ name, name_len }, sl_str(z->name))
            && strcmp(z->type, type_text) == 0) {
            script_word(z->script, z->asked++, what);
            break;
        }
    if (strcmp(what, "drop") == 0)
        return;
    if (strcmp(what, "unreach") == 0) {
        s->is_reset = true;
        return;
    }
    if (strcmp(what, "close") == 0) {
        s->is_eof = true;
        return;
    }
    static uint8_t pkt[70000];
    struct bb b = { pkt + 2, 0, sizeof pkt - 2, false };
    unsigned flags = strcmp(what, "nx") == 0 ? 0x8183
        : strcmp(what, "fail") == 0 ? 0x8182 : strcmp(what, "refuse") == 0
        ? 0x8185 : strcmp(what, "cut") == 0 ? 0x8380 : 0x8180;
    unsigned cnt = 0;
    put16(&b, be16(q.p) ^ (strcmp(what, "id") == 0));
    put16(&b, flags);
    put16(&b, 1);
    put16(&b, 0);
    put16(&b, 0);
    put16(&b, 0);
    bb_put(&b, (sl){ q.p + 12, q.len - 12 });
    if (strcmp(what, "ask") == 0)
        pkt[2 + 13] ^= 1;
    if (strcmp(what, "empty") == 0)
        b.len = 0;
    if (strncmp(what, "more:", 5) == 0) {
        dns_rec(&b, 12, NULL, DNS_CNAME, dns_ttl, wire_name(nb, what + 5));
        cnt = 1;
    } else if (strchr(what, ':')) {
        dns_records(&b, what, &cnt);
    }
    if (b.len)
        pkt[2 + 7] = (uint8_t)cnt;
    if (strcmp(what, "bad") == 0)
        pkt[2 + 7] = 9;
    pkt[0] = (uint8_t)(b.len >> 8);
    pkt[1] = (uint8_t)b.len;
    if (strcmp(what, "big") == 0)
        pkt[0] = pkt[1] = 0xff;
    if (s->is_udp)
        sock_give(s, pkt + 2, b.len);
    else if (strcmp(what, "half") == 0)
        sock_give(s, pkt, 7);
    else
        sock_give(s, pkt, b.len + 2);
    if (strcmp(what, "half") == 0)
        s->is_eof = true;
}

/* ---- HTTP servers ---- */

enum site_tls { TLS_NO, TLS_YES, TLS_OLD_ALERT, TLS_REFUSE, TLS_CLOSE,
    TLS_SILENT, TLS_NOISE, TLS_RESET };
enum site_dial { DIAL_OK, DIAL_REFUSE, DIAL_AT_ONCE, DIAL_HOLE, DIAL_SLOW };

/* One listener. A reply that starts with `~` is followed by the end, with
 * `^` by a reset; an empty one never comes. */
struct site {
    const char *host;            /* address as printed */
    int port;
    enum site_dial dial;
    enum site_tls tls;
    const char *san;             /* of its certificate */
    const char *reply[6];        /* by request, the last for ever */
    bool no_write;               /* takes no more than ten bytes */
    int64_t slow_ms;             /* before each reply */
    int inters;                  /* so many intermediates; 0: one */
    /* what happened */
    int dials, requests, resumed;
    bool is_made;
    char sni[300], request[8192];
    uint8_t leaf[2000], inter[2000];
    br_x509_certificate chain[12];
};
enum { SITE_CNT = 16 };
static struct site site_tab[SITE_CNT];

struct site_conn {
    br_ssl_server_context sc;
    uint8_t io[BR_SSL_BUFSIZE_BIDI];
    char in[20000];
    size_t in_len;
};
static br_ssl_session_cache_lru site_sessions;
static uint8_t site_session_mem[20000];

static struct site *site_of(const struct sock *s)
{
    for (struct site *t = site_tab; t < site_tab + SITE_CNT && t->host; t++)
        if (t->port == sock_port(s) && strcmp(t->host, sock_host(s)) == 0)
            return t;
    return NULL;
}

static void site_out(struct sock *s, const void *p, size_t len);

/* Answer the complete requests in c->in. */
static void site_http(struct sock *s, struct site *t, struct site_conn *c)
{
    for (;;) {
        c->in[c->in_len] = 0;
        char *end = strstr(c->in, "\r\n\r\n");
        if (!end)
            return;
        size_t len = (size_t)(end - c->in) + 4;
        const char *cl = strstr(c->in, "Content-Length: ");
        if (cl && cl < end)
            len += strtoul(cl + 16, NULL, 10);
        if (len > c->in_len)
            return;
        snprintf(t->request, sizeof t->request, "%.*s", (int)len, c->in);
        memmove(c->in, c->in + len, c->in_len - len);
        c->in_len -= len;
        int n = t->requests++;
        while (n > 0 && (n >= 6 || !t->reply[n]))
            n--;
        const char *text = t->reply[n] ? t->reply[n] : "";
        char mark = text[0];
        if (mark == '~' || mark == '^')
            text++;
        if (t->slow_ms)
            s->in_at = world_ms + t->slow_ms;
        if (text[0])
            site_out(s, text, strlen(text));
        s->is_eof |= mark == '~';
        s->is_reset |= mark == '^';
    }
}

static void site_tls_run(struct sock *s, struct site *t, struct site_conn *c)
{
    br_ssl_engine_context *eng = &c->sc.eng;
    for (;;) {
        unsigned st = br_ssl_engine_current_state(eng);
        size_t len;
        if (st & BR_SSL_CLOSED) {
            s->is_eof = true;
            return;
        }
        if (st & BR_SSL_SENDREC) {
            uint8_t *p = br_ssl_engine_sendrec_buf(eng, &len);
            sock_give(s, p, len);
            br_ssl_engine_sendrec_ack(eng, len);
        } else if (st & BR_SSL_RECVAPP) {
            uint8_t *p = br_ssl_engine_recvapp_buf(eng, &len);
            memcpy(c->in + c->in_len, p, len);
            c->in_len += len;
            br_ssl_engine_recvapp_ack(eng, len);
            snprintf(t->sni, sizeof t->sni, "%s",
                br_ssl_engine_get_server_name(eng));
            site_http(s, t, c);
        } else if ((st & BR_SSL_RECVREC) && s->seen < s->out_len) {
            uint8_t *p = br_ssl_engine_recvrec_buf(eng, &len);
            size_t n = s->out_len - s->seen < len ? s->out_len - s->seen
                : len;
            memcpy(p, s->out + s->seen, n);
            s->seen += n;
            br_ssl_engine_recvrec_ack(eng, n);
        } else {
            return;
        }
    }
}

static void site_out(struct sock *s, const void *p, size_t len)
{
    struct site *t = site_of(s);
    struct site_conn *c = s->peer;
    if (t->tls == TLS_NO) {
        sock_give(s, p, len);
        return;
    }
    for (size_t at = 0; at < len; ) {
        size_t room;
        uint8_t *to = br_ssl_engine_sendapp_buf(&c->sc.eng, &room);
        if (!to)
            abort();
        room = room < len - at ? room : len - at;
        memcpy(to, (const uint8_t *)p + at, room);
        br_ssl_engine_sendapp_ack(&c->sc.eng, room);
        br_ssl_engine_flush(&c->sc.eng, 0);
        at += room;
        while (br_ssl_engine_current_state(&c->sc.eng) & BR_SSL_SENDREC) {
            size_t n;
            uint8_t *r = br_ssl_engine_sendrec_buf(&c->sc.eng, &n);
            sock_give(s, r, n);
            br_ssl_engine_sendrec_ack(&c->sc.eng, n);
        }
    }
}

static void site_make(struct site *t)
{
    sl leaf = cert_make((struct plan){ .key = K_LEAF, .signer = K_INTER,
        .issuer = "inter", .san = t->san ? t->san : t->host });
    memcpy(t->leaf, leaf.p, leaf.len);
    t->chain[0] = (br_x509_certificate){ t->leaf, leaf.len };
    sl inter = chain_part('I', NULL);
    memcpy(t->inter, inter.p, inter.len);
    for (int i = 1; i < 12; i++)
        t->chain[i] = (br_x509_certificate){ t->inter, inter.len };
    t->is_made = true;
}

static void site_start_tls(struct site *t, struct site_conn *c)
{
    uint8_t seed[32];
    if (!t->is_made)
        site_make(t);
    if (!site_sessions.vtable)
        br_ssl_session_cache_lru_init(&site_sessions, site_session_mem,
            sizeof site_session_mem);
    br_ssl_server_init_full_ec(&c->sc, t->chain,
        t->inters ? 1 + (size_t)t->inters : 2, BR_KEYTYPE_EC,
        &key_get(K_LEAF)->ec);
    br_ssl_engine_set_buffer(&c->sc.eng, c->io, sizeof c->io, 1);
    br_ssl_server_set_cache(&c->sc, &site_sessions.vtable);
    for (size_t i = 0; i < sizeof seed; i++)
        seed[i] = (uint8_t)dice();
    br_ssl_engine_inject_entropy(&c->sc.eng, seed, sizeof seed);
    if (!br_ssl_server_reset(&c->sc))
        abort();
}

/* What becomes of a connection. */
static void net_dial(struct sock *s)
{
    struct site *t = site_of(s);
    if (s->is_udp)
        return;
    if (sock_port(s) == 53)
        return;
    s->up_at = world_ms + 1;
    if (!t) {
        s->dial_errno = ECONNREFUSED;
        return;
    }
    t->dials++;
    switch (t->dial) {
    case DIAL_OK: break;
    case DIAL_REFUSE: s->dial_errno = ECONNREFUSED; break;
    case DIAL_AT_ONCE: s->now_errno = ENETUNREACH; break;
    case DIAL_HOLE: s->up_at = INT64_MAX; break;
    case DIAL_SLOW: s->up_at = world_ms + 400; break;
    }
    if (t->no_write)
        s->room = 10;
    s->peer = calloc(1, sizeof(struct site_conn));
    if (t->tls == TLS_YES)
        site_start_tls(t, s->peer);
}

/* Bytes came from the program. */
static void net_sent(struct sock *s)
{
    struct site *t = site_of(s);
    if (sock_port(s) == 53) {
        sl q = { s->out + s->seen, s->out_len - s->seen };
        if (!s->is_udp) {
            if (q.len < 2 || q.len < 2U + be16(q.p))
                return;
            q = sl_skip(q, 2);
        }
        s->seen = s->out_len;
        dns_serve(s, q);
        return;
    }
    if (!t || !s->peer)
        return;
    struct site_conn *c = s->peer;
    switch (t->tls) {
    case TLS_NO:
        memcpy(c->in + c->in_len, s->out + s->seen, s->out_len - s->seen);
        c->in_len += s->out_len - s->seen;
        s->seen = s->out_len;
        site_http(s, t, c);
        break;
    case TLS_YES: site_tls_run(s, t, c); break;
    case TLS_OLD_ALERT: sock_give(s, "\x15\3\3\0\2\2\x46", 7); break;
    case TLS_REFUSE: sock_give(s, "\x15\3\3\0\2\2\x28", 7); break;
    case TLS_NOISE: sock_say(s, "HTTP/1.1 400 Bad Request\r\n\r\n"); break;
    case TLS_CLOSE: s->is_eof = true; break;
    case TLS_RESET: s->is_reset = true; break;
    case TLS_SILENT: break;
    }
}

/* ---- starting over ---- */

/* The sites and zones of a row, and nothing left of the last one. */
static void net_reset(void)
{
    for (int i = 0; i < SOCK_CNT; i++)
        if (sock_tab[i] && sock_tab[i]->used) {
            free(sock_tab[i]->peer);
            sock_tab[i]->peer = NULL;
            sock_tab[i]->used = false;
        }
#define ZERO(a) memset(a, 0, sizeof(a))
    ZERO(query_pool);
    ZERO(dns_cache);
    ZERO(wk_cache);
    ZERO(wk_key);
    ZERO(up_pool);
    ZERO(lookup_pool);
    ZERO(lookup_hot);
    ZERO(known_cache);
    ZERO(inq_pool);
    ZERO(inq_form);
    ZERO(member_cache);
    ZERO(exchange_states);
    lookup_active = lookup_strangers = lookup_unknown = 0;
    exchange_room_cnt = 0;
    exchange_starved = false;
    ZERO(chan_pool);
    chan_idle_cnt = 0;
    ZERO(session_cache);
    ZERO(big_used);
    ZERO(conn_pool);
    ZERO(exchange_pool);
    ZERO(watch_tab);
    ZERO(fd_tab);
    ZERO(zone_tab);
    ZERO(site_tab);
    ZERO(met.gauge);
    ZERO(log_quota_tab);
    for (size_t i = 0; i < LIM_HS_CNT; i++)
        hs_pool[i].used = false;
    stale_cnt = heap_cnt = wake_head = wake_cnt = 0;
    if (!loop_open())
        abort();
    memset(&cfg, 0, sizeof cfg);
    srv_stopping = 0;
    signal_stop = signal_reload = 0;
    loop_is_over = false;
    dns_log[0] = 0;
    dns_ttl = 300;
    world_chunk = SIZE_MAX;
    world_dial = net_dial;
    world_sent = net_sent;
    world_client_cnt = 0;
    world_accept_errno = 0;
    fault_at = FAULT_NONE;
    world_wall = 1790000000000 - world_ms;
    cfg.log_level = 'd';
    cfg.hosts_file = SL("none\0");
    cfg.has_resolver = true;
    cfg.resolver = (struct resolv){ .server_cnt = 2, .ndots = 1,
        .attempts = 2, .timeout_ms = 1500,
        .server = { { { .b = { 10, 0, 0, 53 } }, 53 },
                    { { .b = { 10, 0, 1, 53 } }, 53 } } };
    cfg.max_conns = LIM_CONN_CNT;
    cfg.max_body = LIM_BODY_LEN;
    cfg.keepalive_ms = LIM_KEEP_MS;
    cfg.lookup_ms = LIM_LOOKUP_MS;
    cfg.lookups_max = LIM_UP_CNT;
    cfg.lookups_per_server = LIM_DEST_CNT;
    cfg.token_ttl_s = 3600;
    cfg.drain_ms = LIM_DRAIN_MS;
    cfg.can_update = true;
    world_ms += 10000;                 /* past every one-second cache */
    for (size_t i = 0; i < LIM_LISTEN_CNT; i++) {
        memset(&listener_pool[i], 0, sizeof listener_pool[i]);
        listener_pool[i].fd = -1;
        if (i % 2)
            continue;
        struct sock *s = sock_new();   /* public, then metrics */
        s->is_listener = true;
        s->tag = i == 2;
        listener_pool[i].is_metrics = i == 2;
        listener_pool[i].fd = sock_fd(s);
        loop_set(KIND_LISTEN, i, listener_pool[i].fd, POLLIN, INT64_MAX);
    }
    static uint8_t keep[1000];
    sl root = chain_part('R', NULL);
    memcpy(keep, root.p, root.len);
    trust_only(1, &(sl){ keep, root.len });
    log_clear();
}

/* Add a zone: what a name's records of a type are. */
static void zone_add(const char *name, const char *type, const char *script)
{
    size_t i = 0;
    while (zone_tab[i].name)
        i++;
    zone_tab[i] = (struct zone){ name, type, script, 0 };
}

/* What is not free: an empty text when all is. */
static const char *net_left(void)
{
    static char text[400];
    unsigned cnt[9] = { 0 };
    for (size_t i = 0; i < LIM_QUERY_CNT; i++)
        cnt[0] += query_pool[i].state != Q_FREE;
    for (size_t i = 0; i < COUNT_OF(up_pool); i++)
        cnt[1] += up_pool[i].state != UP_FREE;
    for (size_t i = 0; i < LIM_UP_CNT; i++)
        cnt[2] += lookup_pool[i].state != L_FREE;
    for (size_t i = 0; i < LIM_CHAN_CNT; i++)
        cnt[3] += chan_pool[i].state != CHAN_FREE;
    for (size_t i = 0; i < LIM_HS_CNT; i++)
        cnt[4] += hs_pool[i].used;
    for (size_t i = 0; i < LIM_SLOT_CNT; i++)
        cnt[5] += conn_pool[i].state != C_FREE;
    for (size_t i = 0; i < LIM_SLOT_CNT; i++)
        cnt[6] += exchange_pool[i].state != X_FREE;
    for (size_t i = 0; i < LIM_BIG_CNT; i++)
        cnt[7] += big_used[i];
    for (size_t i = 0; i < LIM_DNSCACHE_CNT; i++)
        cnt[8] += dns_cache[i].state == ENTRY_PENDING;
    for (size_t i = 0; i < LIM_WK_CNT; i++)
        cnt[8] += wk_cache[i].state == WK_PENDING;
    unsigned socks = sock_open_cnt();
    text[0] = 0;
    if (cnt[0] + cnt[1] + cnt[2] + cnt[3] + cnt[4] + cnt[5] + cnt[6]
        + cnt[7] + cnt[8] + socks)
        snprintf(text, sizeof text, "left: %u questions, %u calls, %u "
            "lookups, %u channels, %u handshakes, %u clients, %u exchanges, "
            "%u big buffers, %u pending, %u sockets", cnt[0], cnt[1],
            cnt[2], cnt[3], cnt[4], cnt[5], cnt[6], cnt[7], cnt[8], socks);
    return text;
}

/* Let time pass until `done` holds; false: it never did within ms. */
static bool net_run(bool (*done)(void), int64_t ms)
{
    bool ok = false;
    world_end = world_ms + ms;
    for (int rounds = 0; rounds < 200000; rounds++) {
        ok = done();
        if (ok || world_ms >= world_end)
            break;
        loop_round(NULL);
    }
    world_end = INT64_MAX;
    return ok;
}

static bool net_never(void)
{
    return false;
}

/* A client that waits at the listener. Its bytes go to `in`, the replies
 * are in `out`, also when it is closed, until the next client comes. */
static struct sock *client_new(bool is_metrics)
{
    struct sock *s = sock_new();
    s->family = AF_INET;
    s->tag = is_metrics;
    if (world_client_cnt == sizeof world_client / sizeof world_client[0])
        abort();
    world_client[world_client_cnt++] = s;
    return s;
}
