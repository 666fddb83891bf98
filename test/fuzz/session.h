/* A whole session: clients, nameserver, homeserver, SFU and Redis are what
 * the input says. It is a list of lines, a letter and its text; in a text
 * `^` stands for CR LF and "`" for LF.
 *
 *   C M      a client of the service, of the metrics listener, sends this
 *   + @ !    the last client sends more; ends; resets
 *   G L J    POST of this JSON to /get_token, /sfu/get,
 *            /delegate_delayed_leave
 *   P        a signed webhook with this body
 *   H S R    the next reply of the homeserver, the SFU, Redis; at its front
 *            `~` the end follows, `%` a reset follows, `-` none at all
 *   D        the next DNS answer, behind its id: flags, counts, and what
 *            comes after the question
 *   X        what a TLS server sends next
 *   T        so many ms pass         W  the wall clock jumps so many s
 *   F        so many calls from here, one fails: `12 3` by its errno
 *   K        a read gives so many bytes at most; 0 all
 *   U        the next connection: 1 refused 2 unreachable 3 no answer
 *            4 late 5 takes ten bytes only
 *   Q        Redis is configured, and connected; `Q2` one with scripts and
 *            streams, whose 64 leases we get
 *   A        a record in it: field, tab, value
 *   V B      an entry of its stream: a signed webhook with this body; what
 *            XREAD says, as it is
 *   Z        SIGTERM
 */

enum { WAY_LEN = 60000, CLIENT_CNT = 12, REC_CNT = 6, WORD_CNT = 24 };
enum way { WAY_HS, WAY_SFU, WAY_REDIS, WAY_DNS, WAY_TLS, WAY_STREAM, WAYS };

static struct {
    sl input;                        /* what is left of it */
    sl reply[WAYS][16];
    size_t reply_at[WAYS], reply_cnt[WAYS];
    struct { struct sock *s; uint64_t id; } client[CLIENT_CNT];
    size_t client_cnt;
    uint64_t serial;
    int next_dial;
    bool has_scripts;
    sl record[REC_CNT][2];
    size_t record_cnt;
    uint64_t last_ms;                /* the stream's last entry */
    bool has_secret;                 /* the input itself names it */
} se;

static uint8_t se_text[1 << 17];
static size_t se_text_len;

/* The text of a line, its signs resolved, for the session's lifetime. */
static sl se_unescape(sl s)
{
    uint8_t *out = se_text + se_text_len;
    struct bb b = { out, 0, sizeof se_text - se_text_len, false };
    for (size_t i = 0; i < s.len; i++) {
        if (s.p[i] == '^')
            bb_str(&b, "\r\n");
        else
            bb_byte(&b, s.p[i] == '`' ? '\n' : s.p[i]);
    }
    se_text_len += b.len;
    return (sl){ out, b.over ? 0 : b.len };
}

static bool se_next(enum way w, sl *out)
{
    if (se.reply_at[w] == se.reply_cnt[w])
        return false;
    *out = se.reply[w][se.reply_at[w]++];
    return true;
}

static void se_give(struct sock *s, sl text)
{
    if (text.len < WAY_LEN && text.len + s->in_len < sizeof s->in)
        sock_give(s, text.p, text.len);
}

/* A scripted reply, or the usual one. */
static void se_answer(struct sock *s, enum way w, const char *usual,
    size_t len)
{
    sl text;
    if (!se_next(w, &text)) {
        se_give(s, (sl){ (const uint8_t *)usual, len });
        return;
    }
    uint8_t mark = text.len ? text.p[0] : 0;
    if (mark == '-')
        return;
    if (mark == '~' || mark == '%')
        text = sl_skip(text, 1);
    se_give(s, text);
    s->is_eof |= mark == '~';
    s->is_reset |= mark == '%';
}

static void se_dns(struct sock *s, sl q)
{
    static uint8_t pkt[WAY_LEN + 600];
    struct bb b = { pkt + 2, 0, sizeof pkt - 2, false };
    sl text;
    if (q.len < 17 || !se_next(WAY_DNS, &text) || text.len < 10)
        return;
    want(q.len < 512);
    bb_put(&b, (sl){ q.p, 2 });
    bb_put(&b, (sl){ text.p, 10 });
    bb_put(&b, sl_skip(q, 12));
    bb_put(&b, sl_skip(text, 10));
    if (b.over)
        return;
    pkt[0] = (uint8_t)(b.len >> 8);
    pkt[1] = (uint8_t)b.len;
    se_give(s, s->is_udp ? (sl){ pkt + 2, b.len } : (sl){ pkt, b.len + 2 });
}

static enum way se_way(const struct sock *s)
{
    const char *host = sock_host(s);
    uint16_t port = sock_port(s);
    return port == 53 ? WAY_DNS : strcmp(host, "10.0.0.7") == 0 ? WAY_HS
        : strcmp(host, "10.0.0.8") == 0 ? WAY_SFU
        : strcmp(host, "10.0.0.6") == 0 ? WAY_REDIS : WAY_TLS;
}

static void se_dial(struct sock *s)
{
    int how = se.next_dial;
    if (s->is_udp)
        return;
    se.next_dial = 0;
    s->up_at = world_ms + 1;
    if (how == 1)
        s->dial_errno = ECONNREFUSED;
    else if (how == 2)
        s->now_errno = ENETUNREACH;
    else if (how == 3)
        s->up_at = INT64_MAX;
    else if (how == 4)
        s->up_at = world_ms + 400;
    else if (how == 5)
        s->room = 10;
}

/* The usual reply: the token is @u:a.org's, the participant is there. */
static size_t se_usual(enum way w, sl head, sl body, char *out, size_t cap)
{
    uint8_t text[600];
    struct bb b = BB(text);
    struct participant p;
    if (w == WAY_SFU && memmem(head.p, head.len, "/GetParticipant", 15)) {
        want(pb_participant_parse(body, &p));  /* fields 1 and 2 as well */
        pb_put(&b, 0x0a, SL("S1"));
        pb_put(&b, 0x12, p.identity);
        pb_put(&b, 0x18, (sl){ NULL, 0 });     /* its length 0: state 0 */
        text[b.len - 1] = 2;
    } else if (w == WAY_HS) {
        bb_str(&b, memmem(head.p, head.len, "/userinfo?", 10)
            ? "{\"sub\":\"@u:a.org\"}" : "{}");
    }
    int n = snprintf(out, cap, "HTTP/1.1 200 OK\r\nContent-Length: %zu\r\n"
        "\r\n", b.len);
    want(!b.over && (size_t)n + b.len < cap);
    memcpy(out + n, text, b.len);
    return (size_t)n + b.len;
}

/* Requests that are complete; each gets a reply. */
static void se_http(struct sock *s, enum way w)
{
    char text[900];
    while (s->seen < s->out_len) {
        sl rest = { s->out + s->seen, s->out_len - s->seen };
        struct h1_head h = { .pos = 0 };
        struct h1_body body;
        int n = h1_parse_head(rest, false, &h);
        want(n >= 0);                /* we send no nonsense */
        if (n == 0)
            return;
        want(h1_framing((sl){ rest.p, (size_t)n }, &h, false, &body) == 0
            && body.kind != H1_CHUNKED);
        if (body.len > rest.len - (size_t)n)
            return;
        s->seen += (size_t)n + (size_t)body.len;
        sl head = { rest.p, (size_t)n };
        sl sent = { rest.p + n, (size_t)body.len };
        size_t len = se_usual(w, head, sent, text, sizeof text);
        se_answer(s, w, text, len);
    }
}

static void se_bulk(struct bb *b, const char *text)
{
    rsp_put(b, sl_str(text));
}

/* What the script of the leases says: all are ours. */
static void se_tick(struct bb *b)
{
    char text[60];
    bb_str(b, "*70\r\n:1\r\n");
    snprintf(text, sizeof text, "%lld", (long long)(world_wall + world_ms));
    se_bulk(b, text);
    snprintf(text, sizeof text, "%llu-0", (unsigned long long)se.last_ms);
    se_bulk(b, text);
    bb_str(b, ":4000\r\n:64\r\n:64\r\n");
    for (uint64_t i = 0; i < 64; i++) {
        bb_byte(b, ':');
        bb_u64(b, i);
        bb_str(b, "\r\n");
    }
}

static void se_xread(struct sock *s, const sl *word, size_t cnt,
    struct bb *b)
{
    sl text;
    uint64_t ms = 0;
    if (se_next(WAY_STREAM, &text)) {
        bb_put(b, text);
        return;
    }
    bb_str(b, "*-1\r\n");
    if (cnt > 4 && sl_eq(word[3], SL("BLOCK"))
        && sl_u64(word[4], 100000, &ms))
        s->in_at = world_ms + (int64_t)ms;
}

/* The usual Redis; without scripts it knows the hash only. */
static void se_redis_usual(struct sock *s, const sl *word, size_t cnt,
    struct bb *b)
{
    if (sl_eq(word[0], SL("PING"))) {
        bb_str(b, "+PONG\r\n");
    } else if (sl_eq(word[0], SL("AUTH")) || sl_eq(word[0], SL("SELECT"))) {
        bb_str(b, "+OK\r\n");
    } else if (sl_eq(word[0], SL("HGETALL"))) {
        rsp_put_head(b, 2 * se.record_cnt);
        for (size_t i = 0; i < 2 * se.record_cnt; i++)
            rsp_put(b, se.record[i / 2][i % 2]);
    } else if (sl_eq(word[0], SL("HSET")) || sl_eq(word[0], SL("HDEL"))) {
        bb_str(b, ":1\r\n");
    } else if (!se.has_scripts) {
        bb_str(b, "-ERR unknown command\r\n");
    } else if (sl_eq(word[0], SL("INFO"))) {
        se_bulk(b, "# Server\r\nrun_id:abc\r\n");
    } else if (sl_eq(word[0], SL("GET"))) {
        rsp_put(b, (sl){ (const uint8_t *)rep.id, sizeof rep.id });
    } else if (sl_eq(word[0], SL("EVAL")) && cnt > 2) {
        if (sl_eq(word[2], SL("2")))
            se_tick(b);
        else
            bb_str(b, ":1\r\n");
    } else if (sl_eq(word[0], SL("XADD"))) {
        bb_str(b, cnt == 5 ? "-ERR The ID specified in XADD must be greater "
            "than 0-0\r\n" : "$3\r\n1-0\r\n");
    } else if (sl_eq(word[0], SL("XREAD"))) {
        se_xread(s, word, cnt, b);
    } else {
        bb_str(b, "-ERR unknown command\r\n");
    }
}

/* Commands that are complete. */
static void se_redis(struct sock *s)
{
    static uint8_t text[WAY_LEN];
    for (;;) {
        size_t at = s->seen;
        struct rsp e;
        sl word[WORD_CNT];
        int n = rsp_parse((sl){ s->out + at, s->out_len - at }, 70000, &e);
        want(n >= 0);
        if (n == 0)
            return;
        want(e.type == RSP_ARRAY && e.n > 0 && e.n <= WORD_CNT);
        size_t cnt = (size_t)e.n;
        at += (size_t)n;
        for (size_t i = 0; i < cnt; i++) {
            n = rsp_parse((sl){ s->out + at, s->out_len - at }, 70000, &e);
            want(n >= 0);
            if (n == 0)
                return;
            want(e.type == RSP_BULK && e.text.p);
            word[i] = e.text;
            at += (size_t)n;
        }
        s->seen = at;
        struct bb b = { text, 0, sizeof text - 1, false };
        if (se.reply_at[WAY_REDIS] == se.reply_cnt[WAY_REDIS])
            se_redis_usual(s, word, cnt, &b);
        text[b.over ? 0 : b.len] = 0;
        se_answer(s, WAY_REDIS, (char *)text, b.len);
    }
}

static void se_sent(struct sock *s)
{
    sl text;
    if (s->peer)                     /* a client's */
        return;
    enum way w = se_way(s);
    if (w == WAY_DNS) {
        sl q = { s->out + s->seen, s->out_len - s->seen };
        if (!s->is_udp) {
            if (q.len < 2 || q.len < 2U + be16(q.p))
                return;
            q = sl_skip(q, 2);
        }
        s->seen = s->out_len;
        se_dns(s, q);
    } else if (w == WAY_REDIS) {
        se_redis(s);
    } else if (w == WAY_TLS) {
        if (se_next(WAY_TLS, &text))
            se_give(s, text);
    } else {
        se_http(s, w);
    }
    if (s->seen == s->out_len)
        s->seen = s->out_len = 0;
}

/* ---- the program's side ---- */

static void se_base(const char *text, struct base *out)
{
    want(cfg_base(sl_str(text), true, out));
}

static void se_config(void)
{
    memset(&cfg, 0, sizeof cfg);
    cfg.log_level = 'd';
    cfg.hosts_file = SL("/nonexistent\0");
    cfg.has_resolver = true;
    cfg.resolver = (struct resolv){ .server_cnt = 1, .ndots = 1,
        .attempts = 2, .timeout_ms = 1500,
        .server = { { { .b = { 10, 0, 0, 53 } }, 53 } } };
    cfg.max_conns = LIM_CONN_CNT;
    cfg.max_body = LIM_BODY_LEN;
    cfg.keepalive_ms = LIM_KEEP_MS;
    cfg.lookup_ms = LIM_LOOKUP_MS;
    cfg.lookups_max = LIM_UP_CNT;
    cfg.lookups_per_server = LIM_DEST_CNT;
    cfg.token_ttl_s = 3600;
    cfg.drain_ms = LIM_DRAIN_MS;
    cfg.can_update = true;
    cfg.jobs_max = cfg.jobs_per_user = 100;
    cfg.full_access[0] = SL("a.org");
    cfg.full_access_cnt = 1;
    cfg.fed[0].name = cfg.cs[0].name = SL("a.org");
    se_base("http://10.0.0.7", &cfg.fed[0].base);
    se_base("http://10.0.0.7", &cfg.cs[0].base);
    se_base("http://10.0.0.8:7880", &cfg.api);
    cfg.fed_cnt = cfg.cs_cnt = 1;
    cfg.livekit_url = SL("wss://sfu.example.org");
    fuzz_keys(cfg.key);
    cfg.key_cnt = 2;
}

static void se_listen(void)
{
    for (size_t i = 0; i < LIM_LISTEN_CNT; i++) {
        if (listener_pool[i].fd >= 0 && sock_of(listener_pool[i].fd))
            continue;
        listener_pool[i].fd = -1;
        if (i % 2)
            continue;
        struct sock *s = sock_new();
        s->is_listener = true;
        s->tag = i == 2;
        listener_pool[i].is_metrics = i == 2;
        listener_pool[i].fd = sock_fd(s);
        loop_set(KIND_LISTEN, i, listener_pool[i].fd, POLLIN, INT64_MAX);
    }
}

/* What outlives a session by design: caches, quotas, counters. */
static void se_begin(sl input)
{
    static int64_t epoch = 1000000;
    static bool is_known;
#define ZERO(a) memset(a, 0, sizeof(a))
    ZERO(dns_cache);
    ZERO(wk_cache);
    ZERO(session_cache);
    ZERO(api_pool);
    ZERO(redirect_pool);
    ZERO(seen_cache);
    ZERO(known_cache);
    ZERO(look_in_ring);
    ZERO(gone_ring);
    ZERO(rds_pool);
    ZERO(store_in_ring);
    ZERO(store_is_done);
    ZERO(log_quota_tab);
#undef ZERO
    memset(&met, 0, sizeof met);
    memset(&rep, 0, sizeof rep);
    memset(&stream_entry, 0, sizeof stream_entry);
    memcpy(rep.id, "0123456789abcdef", sizeof rep.id);
    rep.release = -1;
    rep.cnt = 1;
    store_mode = STORE_NONE;
    store_head = store_cnt = 0;
    store_pause_at = 0;
    stream_cnt = 0;
    look_head = look_waiting = gone_cnt = 0;
    webhook_at = silence_told_at = 0;
    srv_stopping = 0;
    signal_stop = signal_reload = 0;
    loop_is_over = false;
    epoch += 10000000;
    world_ms = world_ms < epoch ? epoch : world_ms + 1000000;
    epoch = world_ms;
    world_wall = 1790000000000 - world_ms;
    world_chunk = SIZE_MAX;
    world_dial = se_dial;
    world_sent = se_sent;
    world_client_cnt = 0;
    world_accept_errno = 0;
    fault_at = FAULT_NONE;
    fault_seen = 0;
    if (!is_known)
        for (size_t i = 0; i < LIM_LISTEN_CNT; i++)
            listener_pool[i].fd = -1;
    is_known = true;
    se_config();
    se_listen();
    memset(&se, 0, sizeof se);
    se.input = input;
    se.has_secret = memmem(input.p, input.len, "devsecret", 9) != NULL;
    se_text_len = 0;
}

/* So much time passes. The loop may not spin: with the clock standing, it
 * has only so much to do. */
static void se_pass(int64_t ms)
{
    unsigned still = 0;
    int64_t at = world_ms;
    world_end = world_ms + ms;
    for (int rounds = 0; world_ms < world_end && rounds < 20000
             && !loop_is_over; rounds++) {
        loop_round(NULL);
        still = world_ms == at ? still + 1 : 0;
        at = world_ms;
        want(still < 15000);
    }
    world_end = INT64_MAX;
}

/* ---- clients ---- */

static struct sock *se_client(size_t i)
{
    struct sock *s = i < se.client_cnt ? se.client[i].s : NULL;
    return s && s->used && s->peer
        && memcmp(s->peer, &se.client[i].id, 8) == 0 ? s : NULL;
}

static struct sock *se_new_client(bool is_metrics)
{
    if (se.client_cnt == CLIENT_CNT)
        return NULL;
    struct sock *s = sock_new();
    s->family = AF_INET;
    s->tag = is_metrics;
    s->peer = malloc(8);
    want(s->peer);
    memcpy(s->peer, &se.serial, 8);
    se.client[se.client_cnt].s = s;
    se.client[se.client_cnt++].id = se.serial++;
    world_client[world_client_cnt++] = s;
    return s;
}

static void se_post(const char *path, const char *field, sl more, sl body)
{
    struct sock *s = se_new_client(false);
    char text[300];
    if (!s)
        return;
    int n = snprintf(text, sizeof text, "POST %s HTTP/1.1\r\nHost: x\r\n"
        "Content-Length: %zu\r\n%s", path, body.len, field);
    se_give(s, (sl){ (uint8_t *)text, (size_t)n });
    se_give(s, more);
    se_give(s, SL("\r\n\r\n"));
    se_give(s, body);
}

/* The token of a webhook with this body. */
static sl se_token(sl body)
{
    static uint8_t token[600];
    uint8_t sum[32], claims[200];
    struct bb c = BB(claims), t = BB(token);
    sl text;
    sha256(body, sum);
    bb_str(&c, "{\"iss\":\"devkey\",\"exp\":");
    bb_i64(&c, (world_wall + world_ms) / 1000 + 300);
    bb_str(&c, ",\"sha256\":\"");
    b64_put(&c, b64_std, (sl){ sum, 32 });
    bb_str(&c, "=\"}");
    want(bb_finish(&c, &text));
    jwt_sign(&t, &cfg.key[0].sec_key, text);
    want(bb_finish(&t, &text));
    return text;
}

/* What XREAD says of one entry. */
static sl se_entry(sl body)
{
    char id[60];
    struct bb b = { se_text + se_text_len, 0, sizeof se_text - se_text_len,
        false };
    uint64_t ms = (uint64_t)(world_wall + world_ms);
    se.last_ms = ms > se.last_ms ? ms : se.last_ms + 1;
    snprintf(id, sizeof id, "%llu-0", (unsigned long long)se.last_ms);
    bb_str(&b, "*1\r\n*2\r\n");
    se_bulk(&b, "lk-jwt:webhooks");
    bb_str(&b, "*1\r\n*2\r\n");
    se_bulk(&b, id);
    bb_str(&b, "*4\r\n");
    se_bulk(&b, "token");
    rsp_put(&b, se_token(body));
    se_bulk(&b, "body");
    rsp_put(&b, body);
    if (b.over)
        return (sl){ NULL, 0 };
    se_text_len += b.len;
    return (sl){ b.p, b.len };
}

/* ---- the lines ---- */

static void se_queue(enum way w, sl text)
{
    if (se.reply_cnt[w] < COUNT_OF(se.reply[w]))
        se.reply[w][se.reply_cnt[w]++] = text;
}

static int64_t se_number(sl *rest, int64_t max)
{
    sl word;
    uint64_t v;
    return sl_word(rest, " ", &word) && sl_u64(word, (uint64_t)max, &v)
        ? (int64_t)v : 0;
}

static void se_line(uint8_t letter, sl text)
{
    static const int err_tab[] = { 0, EINTR, EAGAIN, ECONNRESET, ENOBUFS,
        EMFILE, EPIPE, ETIMEDOUT };
    struct sock *s = se.client_cnt ? se_client(se.client_cnt - 1) : NULL;
    sl raw = text;
    int64_t v;
    if (letter == '+' || letter == '@' || letter == '!') {
        if (s && letter == '+')
            se_give(s, se_unescape(text));
        else if (s && letter == '@')
            s->is_eof = true;
        else if (s)
            s->is_reset = s->is_peer_closed = true;
        return;
    }
    switch (letter) {
    case 'C':
    case 'M':
        s = se_new_client(letter == 'M');
        if (s)
            se_give(s, se_unescape(text));
        break;
    case 'G':
        se_post("/get_token", "X: ", SL("y"), se_unescape(text));
        break;
    case 'L':
        se_post("/sfu/get", "X: ", SL("y"), se_unescape(text));
        break;
    case 'J':
        se_post("/delegate_delayed_leave", "X: ", SL("y"),
            se_unescape(text));
        break;
    case 'P':
        text = se_unescape(text);
        se_post("/sfu_webhook", "Authorization: Bearer ", se_token(text),
            text);
        break;
    case 'V': se_queue(WAY_STREAM, se_entry(se_unescape(text))); break;
    case 'B': se_queue(WAY_STREAM, se_unescape(text)); break;
    case 'A':
        if (se.record_cnt == REC_CNT)
            break;
        text = se_unescape(text);
        v = (int64_t)sl_find(text, '\t');
        se.record[se.record_cnt][0] = (sl){ text.p, (size_t)v };
        se.record[se.record_cnt++][1] = sl_skip(text, (size_t)v + 1);
        break;
    case 'H': se_queue(WAY_HS, se_unescape(text)); break;
    case 'S': se_queue(WAY_SFU, se_unescape(text)); break;
    case 'R': se_queue(WAY_REDIS, se_unescape(text)); break;
    case 'D': se_queue(WAY_DNS, se_unescape(text)); break;
    case 'X': se_queue(WAY_TLS, se_unescape(text)); break;
    case 'T': se_pass(se_number(&raw, 90000000)); break;
    case 'W':
        v = se_number(&raw, 1000000000) * 1000;
        world_wall += sl_starts(text, SL(" ")) ? -v : v;
        if (world_wall + world_ms < 0)
            world_wall = -world_ms;
        break;
    case 'F':
        fault_at = fault_seen + se_number(&raw, 500);
        fault_errno = err_tab[se_number(&raw, 7)];
        break;
    case 'K':
        v = se_number(&raw, 100000);
        world_chunk = v ? (size_t)v : SIZE_MAX;
        break;
    case 'U': se.next_dial = (int)se_number(&raw, 5); break;
    case 'Q':
        if (cfg.has_redis)
            break;
        static uint8_t mem[100];
        struct bb b = BB(mem);
        cfg.has_redis = true;
        want(!cf_redis_url(SL("redis://:pw@10.0.0.6/1"), &b, &cfg.redis));
        se.has_scripts = sl_eq(text, SL("2"));
        store_mode = STORE_PROBE;
        rds_start(RDS_MAIN, world_ms);
        break;
    case 'Z': signal_stop = 1; break;
    default: break;
    }
}

/* ---- the end ---- */

/* What clients got are replies; what was logged are whole lines. */
static void se_check_output(void)
{
    for (size_t i = 0; i < se.client_cnt; i++) {
        struct sock *s = se_client(i);
        if (!s || s->out_len == 0)
            continue;
        struct h1_head h = { .pos = 0 };
        struct h1_body body;
        sl out = { s->out, s->out_len };
        int n = h1_parse_head(out, true, &h);
        want(n >= 0 && sl_starts(out, SL("HTTP/1.1 ")));
        want(n == 0 || h1_framing((sl){ out.p, (size_t)n }, &h, true, &body)
            == 0);
        want(se.has_secret || !memmem(out.p, out.len, "devsecret", 9));
    }
    sl rest = { (uint8_t *)log_buf, log_len };
    want(se.has_secret || !memmem(log_buf, log_len, "devsecret", 9));
    while (rest.len) {
        bool ends = sl_find(rest, '\n') < rest.len;
        sl line = line_take(&rest);
        for (size_t i = 0; i < line.len; i++)
            want(line.p[i] >= 0x20 && line.p[i] != 0x7f);
        want(!ends || sl_starts(line, SL("ts=")));
        sl word[3] = { { NULL, 0 } };    /* ts= level= event= */
        for (int i = 0; i < 3 && sl_word(&line, " ", &word[i]); )
            i++;
        want(!sl_starts(word[2], SL("event=BUG")));
    }
}

static void se_all_free(void)
{
    unsigned cnt[12] = { 0 };
    for (size_t i = 0; i < LIM_QUERY_CNT; i++)
        cnt[0] += query_pool[i].state != Q_FREE;
    for (size_t i = 0; i < COUNT_OF(up_pool); i++)
        cnt[1] += up_pool[i].state != UP_FREE;
    for (size_t i = 0; i < COUNT_OF(lookup_pool); i++)
        cnt[2] += lookup_pool[i].state != L_FREE;
    for (size_t i = 0; i < LIM_CHAN_CNT; i++)
        cnt[3] += chan_pool[i].state != CHAN_FREE;
    for (size_t i = 0; i < LIM_HS_CNT; i++)
        cnt[4] += hs_pool[i].used;
    for (size_t i = 0; i < LIM_SLOT_CNT; i++) {
        cnt[5] += conn_pool[i].state != C_FREE;
        cnt[6] += exchange_pool[i].state != X_FREE;
    }
    for (size_t i = 0; i < COUNT_OF(big_used); i++)
        cnt[7] += big_used[i];
    for (size_t i = 0; i < LIM_DNSCACHE_CNT; i++)
        cnt[8] += dns_cache[i].state == ENTRY_PENDING;
    for (size_t i = 0; i < LIM_WK_CNT; i++)
        cnt[8] += wk_cache[i].state == WK_PENDING;
    for (size_t i = 0; i < LIM_JOB_CNT; i++)
        cnt[9] += job_pool[i].state != J_FREE;
    for (size_t i = 0; i < COUNT_OF(job_room); i++)
        cnt[9] += job_room[i] > 0;
    for (size_t i = 0; i < LIM_API_CNT; i++)
        cnt[10] += api_pool[i].job_cnt || api_pool[i].active
            || api_pool[i].lookup;
    for (size_t i = 0; i < COUNT_OF(redirect_pool); i++)
        cnt[10] += redirect_pool[i].is_used;
    cnt[11] = sock_open_cnt();
    static const char *const name[] = { "queries", "calls", "lookups",
        "channels", "handshakes", "clients", "exchanges", "buffers",
        "pending", "jobs", "apis", "sockets" };
    bool ok = true;
    for (size_t i = 0; i < COUNT_OF(cnt); i++)
        if (cnt[i]) {
            fprintf(stderr, "left: %u %s\n", cnt[i], name[i]);
            ok = false;
        }
    if (!ok)
        wrong("all pools are empty", __LINE__);
    want(job_top == 0 && met.gauge[GA_JOBS] == 0
        && met.gauge[GA_CONNECTIONS] == 0 && met.gauge[GA_UPSTREAM] == 0
        && met.gauge[GA_EXCHANGES] == 0 && met.gauge[GA_UNSAVED] == 0);
    for (size_t i = 0; i < heap_cnt; i++)
        want(watch_tab[heap_tab[i]].heap_at == i + 1 && (i == 0
            || watch_tab[heap_tab[(i - 1) / 2]].deadline
                <= watch_tab[heap_tab[i]].deadline));
    for (size_t i = 0; i < LIM_FD_CNT; i++)
        want(!fd_tab[i].who || watch_tab[fd_tab[i].who - 1].fd_at == i + 1);
}

static void se_finish(void)
{
    fault_at = FAULT_NONE;
    world_chunk = SIZE_MAX;
    se_check_output();
    for (size_t i = 0; i < se.client_cnt; i++) {
        struct sock *s = se_client(i);
        if (s && !s->is_reset)
            s->is_eof = true;
    }
    /* those that no one accepted */
    for (unsigned i = 0; i < world_client_cnt; i++) {
        free(world_client[i]->peer);
        world_client[i]->peer = NULL;
        world_client[i]->used = false;
    }
    world_client_cnt = 0;
    srv_stopping = 0;
    signal_stop = 0;
    loop_is_over = false;
    loop_set(KIND_SIGNAL, 0, -1, 0, INT64_MAX);
    se_pass(60000);                  /* a request may still become a job */
    for (size_t i = 0; i < LIM_JOB_CNT && job_top; i++) {
        if (job_pool[i].state != J_FREE && job_pool[i].state != J_OVER)
            job_end(&job_pool[i], NULL, world_ms);
        store_cancel(&job_pool[i]);
    }
    for (int i = 0; i < LIM_REDIS_CNT; i++)
        if (rds_pool[i].state != RD_OFF) {
            rds_fail(&rds_pool[i], EV_REDIS_DOWN, "fuzz", "over", world_ms);
            rds_pool[i].state = RD_OFF;
            loop_set(KIND_REDIS, (size_t)i, -1, 0, INT64_MAX);
        }
    for (size_t i = 0; i < LIM_JOB_CNT && job_top; i++) {
        store_cancel(&job_pool[i]);
        job_free(&job_pool[i]);
    }
    loop_set(KIND_REPLICA, 0, -1, 0, INT64_MAX);
    store_mode = STORE_NONE;
    se_listen();
    se_pass(800000);
    se_check_output();
    se_all_free();
}

static void fuzz_session(sl data)
{
    if (data.len > 60000)
        return;
    se_begin(data);
    for (int lines = 0; se.input.len && lines < 60 && !loop_is_over;
         lines++) {
        sl line = line_take(&se.input);
        if (line.len)
            se_line(line.p[0], sl_skip(line, 1));
    }
    se_pass(3000);
    se_finish();
}
