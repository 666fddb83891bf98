/* Each call of section 23 fails, one a run, until a run ends in which none
 * did: what the clients are told, what becomes of the jobs, whether a normal
 * exchange works afterwards, and that every pool is empty in the end.
 *
 * Then what a wall clock that jumps changes (the times in tokens and the
 * validity of certificates) and what not (everything else); how secrets are
 * compared (S29), and that TLS contexts are seeded (S30).
 */

/* ---- one scenario ---- */

/* run: brings its world about, calls fault_arm() where the faults begin.
 * Returns NULL or what went wrong; fault_must_work says that no failure may
 * be told to a client. left: ends what is there; what was not given back. */
struct fault_row {
    const char *name;
    int64_t rest_ms;                     /* until failures are forgotten */
    const char *(*run)(void);
    const char *(*left)(void);
    bool is_process;                     /* of its own: nothing follows */
};

static long fault_next;                  /* of the run to come */
static bool fault_must_work;             /* EINTR, and what is short */
static char fault_text[1200];

static void fault_arm(void)
{
    fault_seen = 0;
    fault_at = fault_next;
}

static void fault_disarm(void)
{
    fault_at = FAULT_NONE;
}

__attribute__((format(printf, 1, 2)))
static const char *fault_wrong(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(fault_text, sizeof fault_text, fmt, ap);
    va_end(ap);
    return fault_text;
}

/* The SFU of the jobs' world creates rooms as well. */
static void (*fault_sent_before)(struct sock *s);

static void fault_sent(struct sock *s)
{
    char *at = s->seen < s->out_len ? strstr((char *)s->out + s->seen,
        "/CreateRoom ") : NULL;
    if (!at || !leave_is(s, "10.0.0.8")) {
        fault_sent_before(s);
        return;
    }
    const char *end = strstr(at, "\r\n\r\n");
    const char *cl = strstr(at, "\r\nContent-Length: ");
    if (!end || !cl || cl > end || s->out_len < (size_t)(end - (char *)s->out)
        + 4 + strtoul(cl + 18, NULL, 10))
        return;
    s->seen = s->out_len;
    sock_say(s, SFU_OK);
}

/* Once all that failed has been tried again: a normal exchange. Clients
 * that were never let in are gone by then. */
static const char *fault_after(int64_t rest_ms)
{
    char body[2000];
    body_fill("{$R,$M,$T}", body, sizeof body);
    fault_disarm();
    net_run(net_never, rest_ms);
    if (world_sent != net_sent) {
        fault_sent_before = world_sent;
        world_sent = fault_sent;
    }
    struct sock *s = exchange_post("/get_token", body);
    net_run(net_never, 10000);
    bool ok = strncmp(exchange_text(s), "200 ey", 6) == 0;
    if (!ok)
        (void)fault_wrong("afterwards: %s", exchange_text(s));
    s->is_eof = true;
    net_run(net_never, 1000);
    if (fault_sent_before)
        world_sent = fault_sent_before;
    fault_sent_before = NULL;
    return ok ? NULL : fault_text;
}

/* All errors, one call after the other. */
static void fault_each(const struct fault_row *tab, size_t cnt)
{
    static const char *const err_name[] = { "short", "EINTR", "EAGAIN",
        "ECONNRESET", "ENOBUFS", "ENOMEM", "EMFILE", "ENOSYS" };
    fault_fits = true;
    for (size_t i = 0; i < cnt; i++)
        for (size_t e = 0; e < COUNT_OF(fault_fit_tab); e++) {
            unsigned bad = 0;
            long seen;
            fault_errno = fault_fit_tab[e].err;
            fault_must_work = fault_errno == 0 || fault_errno == EINTR;
            for (fault_next = 0; ; fault_next++) {
                char why[1500] = "";
                const char *text = tab[i].run();
                seen = fault_seen;
                fault_disarm();
                if (!text && !tab[i].is_process)
                    text = fault_after(tab[i].rest_ms);
                if (text)
                    snprintf(why, sizeof why, "%s; ", text);
                text = tab[i].left();
                snprintf(why + strlen(why), sizeof why - strlen(why), "%s",
                    text);
                if (why[0] && bad++ < 3)
                    row(name_of("%s: %s of call %ld", tab[i].name,
                        err_name[e], fault_next), false, "%s", why);
                if (seen <= fault_next)      /* a run without a fault */
                    break;
            }
            bool fits = fault_errno != ENOMEM || fault_next > 0;
            if (fits)                    /* who does not wait has no such */
                row(name_of("%s: %s of each of %ld calls", tab[i].name,
                    err_name[e], fault_next), bad == 0 && fault_next > 0,
                    "%u bad", bad);
        }
    fault_fits = false;
}

/* ---- exchanges ---- */

/* No descriptor for a client: it is told so by the one in reserve. */
static bool fault_is_full(int status)
{
    return fault_errno == EMFILE && status == 503;
}

/* A grant, or a refusal that says so; nothing else, and no refusal where
 * nothing is wrong. */
static const char *fault_exchange_of(struct sock *s)
{
    net_run(net_never, 60000);
    fault_disarm();
    const char *got = exchange_text(s);
    bool ok = strncmp(got, "200 ey", 6) == 0;
    bool no = strncmp(got, "401 ", 4) == 0
        || strncmp(got, "500 M_UNKNOWN", 13) == 0
        || fault_is_full(leave_status(s));
    bool cut = strcmp(got, "none") == 0;     /* its own connection failed */
    s->is_eof = true;
    return ok || ((no || cut) && !fault_must_work) ? NULL
        : fault_wrong("%s %s", got, log_buf);
}

static const char *fault_exchange(void)
{
    char body[2000];
    body_fill("{$R,$M,$T}", body, sizeof body);
    exchange_reset(SUB_A, NULL);
    fault_arm();
    return fault_exchange_of(exchange_post("/get_token", body));
}

/* By SRV, well-known and DNS over TCP, each hop over TLS. */
static const char *fault_discovery(void)
{
    char body[2000];
    body_fill("{$R,$M,$T}", body, sizeof body);
    exchange_reset("", NULL);
    cfg.fed_cnt = 0;
    zone_add("a.org", "A", "cut A:10.0.0.1");
    zone_add("_matrix-fed._tcp.b.org", "SRV", "SRV:1/1/77/c.org");
    zone_add("c.org", "A", "A:10.0.0.2");
    site_tab[2] = (struct site){ "10.0.0.1", 443, .tls = TLS_YES,
        .san = "a.org", .reply = { WK("5\r\nb.org") } };
    site_tab[3] = (struct site){ "10.0.0.2", 77, .tls = TLS_YES,
        .san = "b.org", .reply = { SUB_A } };
    fault_arm();
    return fault_exchange_of(exchange_post("/get_token", body));
}

/* A request that the homeserver passes on: its head and body, one question
 * about the user, the room. */
static const char *fault_appservice(void)
{
    static const char body[] = "{\"room_id\":\"!r:a.org\",\"slot_id\":"
        "\"m.call#ROOM\",\"member_id\":\"m\",\"url\":"
        "\"wss://sfu.example.org\"}";
    char text[1000];
    exchange_reset(SUB_A, NULL);
    zone_add("api", "A", "A:10.0.0.9");
    site_tab[2] = (struct site){ "10.0.0.9", 80, .reply = {
        "HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{\"joined\":true}" } };
    cfg.has_as = true;
    cfg.sec_as_token = SL("as");
    sha256(SL("hs"), cfg.hs_token_sum);
    cfg.cs[0].name = SL("a.org");
    if (!name_parse(SL("a.org"), &cfg.hs_name)
        || !cfg_base(SL("http://api"), true, &cfg.cs[0].base))
        abort();
    cfg.cs_cnt = 1;
    fault_arm();
    struct sock *s = client_new(false);
    snprintf(text, sizeof text, "POST /_matrix/client/v1/rtc/livekit/get_token "
        "HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer hs\r\n"
        "X-Matrix-User-Identifier: @u:a.org\r\nContent-Length: %zu\r\n\r\n%s",
        sizeof body - 1, body);
    sock_say(s, text);
    net_run(net_never, 60000);
    fault_disarm();
    const char *got = exchange_text(s);
    bool ok = memmem(s->out, s->out_len, "\r\n\r\n{\"jwt\":\"ey", 14) != NULL;
    bool no = strncmp(got, "502 M_UNKNOWN", 13) == 0
        || strncmp(got, "400 M_BAD_JSON", 14) == 0
        || strncmp(got, "500 M_UNKNOWN", 13) == 0
        || strcmp(got, "none") == 0 || fault_is_full(leave_status(s));
    bool asked = strstr(site_tab[2].request, "Authorization: Bearer as\r\n");
    s->is_eof = true;
    cfg.has_as = false;
    if (ok && !asked)
        return fault_wrong("granted and not asked");
    return ok || (no && !fault_must_work) ? NULL
        : fault_wrong("%s %s", got, log_buf);
}

static const char *fault_appservice_left(void)
{
    for (size_t i = 0; i < LIM_INQ_CNT; i++)
        if (inq_pool[i].state != I_FREE)
            return fault_wrong("question %zu is in use", i);
    return net_left_later();
}

static const char *fault_health(void)
{
    exchange_reset(SUB_A, NULL);
    cfg.has_metrics = true;
    fault_arm();
    struct sock *s[2] = { client_new(false), client_new(true) };
    sock_say(s[0], GET("/healthz"));
    sock_say(s[1], GET("/metrics"));
    net_run(net_never, 1000);
    fault_disarm();
    int status[2];
    for (int i = 0; i < 2; i++) {
        status[i] = leave_status(s[i]);
        s[i]->is_eof = true;
    }
    bool ok = status[0] == 200 && status[1] == 200;
    bool cut = true;
    for (int i = 0; i < 2; i++)
        cut &= status[i] == 200 || !status[i] || fault_is_full(status[i]);
    return ok || (cut && !fault_must_work) ? NULL
        : fault_wrong("%d %d", status[0], status[1]);
}

/* Anchors read again, then the end. */
static const char *fault_signals(void)
{
    exchange_reset(SUB_A, NULL);
    stray_file(true);
    cfg.ca_file = SL(STRAY "\0");
    cfg.ca_only = true;
    unsigned before = anchor_gen;
    fault_arm();
    signal_reload = 1;
    net_run(net_never, 100);
    fault_disarm();
    bool ok = anchor_gen == before + 1
        && anchor_set[anchor_now].cnt == 1;
    bool kept = anchor_gen == before && anchor_set[anchor_now].cnt == 1;
    return ok || (kept && !fault_must_work) ? NULL
        : fault_wrong("generation %u after %u, %u anchors", anchor_gen,
            before, anchor_set[anchor_now].cnt);
}

/* ---- webhooks and delegations ---- */

/* Posted until it is taken, as LiveKit does; the body needs a buffer of its
 * own. Returns the attempts. */
static int fault_hook(const char *event, const char *id)
{
    static char body[21000], head[1000];
    snprintf(body, sizeof body, "{\"event\":\"%s\",\"id\":\"%s\","
        "\"room\":{\"name\":\"%s\",\"metadata\":\"%20000s\"},"
        "\"participant\":{\"identity\":\"@u:a.org:D\",\"sid\":\"S1\","
        "\"disconnectReason\":\"CLIENT_INITIATED\"}}", event, id, lv.room,
        "");
    snprintf(head, sizeof head, "POST /sfu_webhook HTTP/1.1\r\nHost: x\r\n"
        "Authorization: %s\r\nContent-Length: %zu\r\n\r\n",
        hook_token(body, "devsecret"), strlen(body));
    for (int n = 1; n < 4; n++) {
        struct sock *s = client_new(false);
        sock_say(s, head);
        sock_say(s, body);
        net_run(net_never, 3000);
        int status = leave_status(s);
        s->is_eof = true;
        net_run(net_never, 100);
        if (status == 200)
            return n;
    }
    return 4;
}

/* A job, then its webhooks while calls fail: joined, and left. */
static const char *fault_webhooks(void)
{
    leave_web_reset();
    struct sock *s = leave_post_job("100000");
    net_run(net_never, 100);
    const struct job *j = leave_web_job();
    if (leave_status(s) != 200 || !j)
        return "no job";
    strcpy(lv.script[1], "present");
    fault_arm();
    int n[2];
    n[0] = fault_hook("participant_joined", "EV_a");
    bool up = j->state == J_CONNECTED && lv.restarts >= 1;
    strcpy(lv.script[1], "absent");
    n[1] = fault_hook("participant_left", "EV_b");
    net_run(net_never, 60000);
    fault_disarm();
    s->is_eof = true;
    return up && n[0] + n[1] <= (fault_must_work ? 2 : 3) && lv.sends >= 1
        && lv.sends <= 2 && job_top == 0 ? NULL
        : fault_wrong("%sconnected, posted %d and %d times, %u sends, "
            "%zu jobs", up ? "" : "not ", n[0], n[1], lv.sends, job_top);
}

/* From the request to restart and send: who was told 200 is told to leave
 * in the end. */
static const char *fault_delegation(void)
{
    leave_web_reset();
    fault_arm();
    struct sock *s = leave_post_job("100000");
    net_run(net_never, 20000);
    int status = leave_status(s);
    (void)leave_web_job();
    strcpy(lv.script[1], "present");
    struct sock *hook[2];
    hook[0] = leave_post_hook("participant_joined", "", "devsecret");
    net_run(net_never, 62000);
    unsigned restarts = lv.restarts;
    strcpy(lv.script[1], "absent");
    hook[1] = leave_post_hook("participant_left", "", "devsecret");
    net_run(net_never, 200000);
    fault_disarm();
    s->is_eof = hook[0]->is_eof = hook[1]->is_eof = true;
    bool taken = status == 200;
    return job_top == 0 && (taken || !fault_must_work)
        && lv.sends >= taken && lv.sends <= 2 && restarts >= taken ? NULL
        : fault_wrong("%d, %u restarts, %u sends, %zu jobs", status,
            restarts, lv.sends, job_top);
}

/* ---- Redis ---- */

/* Connecting, and a record that is restored, found, restarted, sent. */
static const char *fault_restore(void)
{
    store_reset(R_);
    lv.is_legacy = true;
    store_hset(store_field(), store_value("D", 8000, 1000,
        ",\"Connected\":true"));
    strcpy(lv.script[0], "present");
    fault_arm();
    store_start();
    leave_until(7000);
    bool up = rds_is_up(RDS_MAIN) && rep_is_ready();
    unsigned restarts = lv.restarts;
    strcpy(lv.script[0], "absent");
    leave_until(40000);
    fault_disarm();
    return up && restarts >= 1 && lv.sends >= 1 && lv.sends <= 2
        && rd.rec_cnt == 0 && met.gauge[GA_JOBS] == 0 ? NULL
        : fault_wrong("%sready, %u restarts, %u sends, %u records, %s",
            up ? "" : "not ", restarts, lv.sends, rd.rec_cnt, log_buf);
}

/* A delegation is written down before the client is answered. */
static const char *fault_write(void)
{
    store_reset(R_);
    lv.is_legacy = true;
    store_start();
    leave_until(2000);
    fault_arm();
    struct sock *s = leave_post_job("100000");
    leave_until(12000);
    fault_disarm();
    int status = leave_status(s);
    s->is_eof = true;
    bool kept = rd.rec_cnt == 1 && strstr(rd.rec[0].value, "\"syd_x\"");
    bool taken = status == 200;
    return (taken || !fault_must_work) && kept >= taken
        && met.gauge[GA_UNSAVED] == 0
        && met.gauge[GA_JOBS] == rd.rec_cnt ? NULL
        : fault_wrong("%d, %u records, %lld jobs, %lld unsaved", status,
            rd.rec_cnt, (long long)met.gauge[GA_JOBS],
            (long long)met.gauge[GA_UNSAVED]);
}

/* What another replica took: a webhook and a delegation in the stream. */
static const char *fault_stream(void)
{
    store_reset(R_);
    lv.is_legacy = true;
    store_hset(store_field(), store_value("D", 100000, 0,
        ",\"Connected\":true,\"Sid\":\"S1\""));
    strcpy(lv.script[0], "present");
    store_start();
    leave_until(2000);
    unsigned restarts = lv.restarts;
    fault_arm();
    strcpy(lv.script[0], "absent");
    store_kill_connections();            /* they are dialled again first */
    store_stream_hook("participant_left", "devsecret");
    leave_until(22000);
    unsigned sends = lv.sends;
    store_hset(store_field(), store_value("E", 100000, 0, ""));
    store_xadd((const char *const[]){ "job", store_field(), "record",
        rd.rec[0].value }, NULL);
    leave_until(30000);
    fault_disarm();
    const struct job *j = job_find(SL(leave_room), SL("I1"));
    return restarts == 1 && sends >= 1 && sends <= 2 && j
        && sl_eq((sl){ j->delay_id, j->delay_len }, SL("E")) ? NULL
        : fault_wrong("%u restarts, %u sends, %s", restarts, sends,
            j ? "a job" : "no job");
}

/* Leases beside another replica: half of them, kept, the rest once the
 * other has gone; the job in one of those is taken over then. */
static const char *fault_tick(void)
{
    unsigned shard = store_shard(store_field());
    store_pair(-1, (int)shard);
    store_hset(store_field(), store_value("D", 100000, 0,
        ",\"Connected\":true"));
    strcpy(lv.script[0], "present");
    fault_arm();
    net_run(net_never, 12000);
    int64_t half = met.gauge[GA_SHARDS];
    unsigned early = lv.restarts + lv.sends;
    rd.other[0] = 0;
    for (unsigned k = 0; k < LIM_SHARD_CNT; k++)
        if (strcmp(rd.lease[k], store_other) == 0)
            rd.lease[k][0] = 0;
    net_run(net_never, 12000);
    fault_disarm();
    return half == 32 && early == 0 && met.gauge[GA_SHARDS] == 64
        && lv.restarts >= 1 && lv.sends == 0
        && strcmp(leave_state(), "connected") == 0 ? NULL
        : fault_wrong("%lld, then %lld shards, %u calls early, %u restarts, "
            "%u sends, %s", (long long)half,
            (long long)met.gauge[GA_SHARDS], early, lv.restarts, lv.sends,
            leave_state());
}

/* ---- start-up ---- */

/* What the child tells that starts and stops. */
static struct {
    long seen;                           /* calls before clients are let in */
    int status;                          /* of main_serve; -1: none */
    bool is_served, is_told;             /* a refusal names its reason */
    char left[1200];
} *fault_child;
static struct sock *fault_client[3];
static int64_t fault_since;
static bool fault_is_unix;               /* listeners are unix sockets */

/* As time passes: once there are listeners they are asked, once they have
 * answered the service is stopped. */
static void fault_start_poll(void)
{
    char body[2000];
    if (!watch_tab[loop_base(KIND_LISTEN)].fd_at || signal_stop)
        return;
    if (!fault_client[0]) {
        fault_child->seen = fault_seen;
        fault_disarm();
        sock_of(listener_pool[2].fd)->tag = 1;
        body_fill("{$R,$M,$T}", body, sizeof body);
        fault_client[0] = exchange_post("/get_token", body);
        fault_client[1] = client_new(false);
        sock_say(fault_client[1], GET("/healthz"));
        fault_client[2] = client_new(true);
        sock_say(fault_client[2], GET("/metrics"));
        fault_since = world_ms;
    }
    bool all = true;
    for (int i = 0; i < 3; i++)
        all &= leave_status(fault_client[i]) == 200;
    fault_child->is_served = all;
    if (!all && world_ms < fault_since + 30000)
        return;
    for (int i = 0; i < 3; i++)
        fault_client[i]->is_eof = true;
    signal_stop = 1;
}

/* The environment of a child; later rows win. */
static void fault_env(const char *const more[][2], size_t cnt)
{
    static const char *const env[][2] = {
        { "LIVEKIT_URL", "wss://sfu.example.org" },
        { "LKJWT_LIVEKIT_API_URL", "http://10.0.0.8:7880" },
        { "LIVEKIT_KEY_FILE", "keys" },
        { "LIVEKIT_FULL_ACCESS_HOMESERVERS", "a.org" },
        { "LKJWT_FEDERATION_API_URL_OVERRIDES", "a.org=http://10.0.0.9" },
        { "LKJWT_HOSTS_FILE", "hosts" },
        { "LKJWT_CA_FILE", STRAY },
        { "LKJWT_CA_ONLY", "true" },
        { "LIVEKIT_JWT_BIND", "127.0.0.1:8080" },
        { "LKJWT_METRICS_BIND", "127.0.0.1:8081" },
        { "LIVEKIT_REDIS_URL", "redis://10.0.0.6" },
        { "LKJWT_JAIL", "off" },
    };
    (void)clearenv();
    for (size_t i = 0; i < COUNT_OF(env); i++)
        (void)setenv(env[i][0], env[i][1], 1);
    for (size_t i = 0; i < cnt; i++)
        (void)setenv(more[i][0], more[i][1], 1);
    memset(&cfg, 0, sizeof cfg);
    ZERO(anchor_set);
}

/* The whole of a process: files, listeners, Redis, clients, the end. */
static void fault_start_child(void)
{
    static const char *const by_unix[][2] = {
        { "LIVEKIT_JWT_BIND", "unix:/run/x/public" },
        { "LKJWT_METRICS_BIND", "/run/x/metrics" },
        { "LIVEKIT_REDIS_URL", "" },
    };
    fault_env(by_unix, fault_is_unix ? COUNT_OF(by_unix) : 0);
    for (size_t i = 0; i < LIM_LISTEN_CNT; i++)
        if (listener_pool[i].fd >= 0)
            sock_of(listener_pool[i].fd)->used = false;
    ZERO(watch_tab);
    ZERO(fd_tab);
    stale_cnt = 0;
    world_has_paths = fault_is_unix;
    if (fault_is_unix) {                 /* left by one that was killed */
        path_add("/run/x/public");
        path_add("/run/x/metrics");
    }
    fault_sent_before = world_sent;
    world_sent = fault_sent;
    world_poll = fault_start_poll;
    fault_arm();
    fault_child->status = main_serve(0, NULL);
    fault_child->seen = fault_client[0] ? fault_child->seen : fault_seen;
    fault_child->is_told = strstr(log_buf, " level=error ")
        || strstr(log_buf, "level=error");
    unsigned open = sock_open_cnt();     /* but those of kept channels */
    for (size_t i = 0; i < LIM_CHAN_CNT; i++)
        open -= chan_pool[i].state != CHAN_FREE;
    if (fault_child->status == 0 && (open || listener_pool[0].fd >= 0
        || listener_pool[2].fd >= 0 || met.gauge[GA_CONNECTIONS]
        || path_find("/run/x/public") || path_find("/run/x/metrics")))
        snprintf(fault_child->left, sizeof fault_child->left,
            "%u sockets open, or a path left", open);
    if (fault_child->status == 0 ? !fault_child->is_served
        : !fault_child->is_told || fault_must_work)
        snprintf(fault_child->left, sizeof fault_child->left, "%.1100s",
            log_buf);
    _exit(0);
}

/* A process of its own, as it begins with nothing. It serves, or it says
 * why not and ends with status 1. */
static const char *fault_start(void)
{
    int status = 0;
    store_reset(R_);
    memset(fault_child, 0, sizeof *fault_child);
    fault_child->status = -1;
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0)
        fault_start_child();
    if (pid < 0 || waitpid(pid, &status, 0) != pid)
        abort();
    fault_seen = fault_child->seen;
    return status || fault_child->left[0] || fault_child->status < 0
        || fault_child->status > 1 ? fault_wrong("ended by %x, %d%s, %s",
            (unsigned)status, fault_child->status, fault_child->is_served
            ? ", served" : "", fault_child->left) : NULL;
}

static const char *fault_start_unix(void)
{
    fault_is_unix = true;
    const char *text = fault_start();
    fault_is_unix = false;
    return text;
}

/* Run as a program in a child with what it prints at hand, until
 * fault_child->left says what is wrong with it. */
static const char *fault_program(void (*child)(void))
{
    int status = 0;
    memset(fault_child, 0, sizeof *fault_child);
    fault_child->status = -1;
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        world_has_out = true;
        child();
        _exit(0);
    }
    if (pid < 0 || waitpid(pid, &status, 0) != pid)
        abort();
    fault_seen = fault_child->seen;
    return status || fault_child->left[0] ? fault_wrong("ended by %x, %d, %s",
        (unsigned)status, fault_child->status, fault_child->left) : NULL;
}

static void fault_main(const char *a, const char *b)
{
    char name[] = "lkjwt", arg[2][40];
    char *argv[] = { name, arg[0], b ? arg[1] : NULL, NULL };
    snprintf(arg[0], sizeof arg[0], "%s", a);
    snprintf(arg[1], sizeof arg[1], "%s", b ? b : "");
    fault_arm();
    fault_child->status = lkjwt_main(b ? 3 : 2, argv);
    fault_child->seen = fault_seen;
    fault_disarm();
}

/* The instance that is asked: at a unix socket, or at port 8080. */
static void fault_health_dial(struct sock *s)
{
    if (s->to.ss_family == AF_UNIX) {
        s->up_at = world_ms;
        s->tag = 7;
    } else {
        net_dial(s);
    }
}

static void fault_health_sent(struct sock *s)
{
    if (s->tag != 7)
        net_sent(s);
    else if (strstr((char *)s->out, "\r\n\r\n"))
        sock_say(s, OK_REPLY);
}

/* Well, or unhealthy and said so: nothing in between. */
static void fault_healthcheck_child(void)
{
    static const char *const by_unix[][2] = {
        { "LIVEKIT_JWT_BIND", "unix:/run/x/public" } };
    fault_env(by_unix, fault_is_unix);
    world_dial = fault_health_dial;
    world_sent = fault_health_sent;
    fault_main("--healthcheck", NULL);
    bool ok = fault_child->status == 0;
    bool is_told = strncmp(world_out, "unhealthy: no 200", 17) == 0
        || (fault_errno && world_out_len == 0);      /* stdout failed */
    if (ok ? world_out_len != 0 : fault_child->status != 1 || !is_told
        || fault_must_work)
        snprintf(fault_child->left, sizeof fault_child->left, "%.900s",
            world_out);
}

static const char *fault_healthcheck(void)
{
    net_reset();
    site_tab[0] = (struct site){ .host = "127.0.0.1", .port = 8080,
        .reply = { "~" OK_REPLY } };
    return fault_program(fault_healthcheck_child);
}

static const char *fault_healthcheck_unix(void)
{
    fault_is_unix = true;
    const char *text = fault_healthcheck();
    fault_is_unix = false;
    return text;
}

/* Redis beside the sites of the exchange. */
static void fault_check_dial(struct sock *s)
{
    leave_is(s, "10.0.0.6") ? store_dial(s) : net_dial(s);
}

static void fault_check_sent(struct sock *s)
{
    leave_is(s, "10.0.0.6") ? store_sent(s) : net_sent(s);
}

#define JSON(len, text) "HTTP/1.1 200 OK\r\nContent-Length: " #len \
    "\r\n\r\n" text
static const char check_told[] = "ok    config      complete\n"
    "ok    anchors     1\n"
    "ok    sfu         http://10.0.0.8:7880 (10.0.0.8:7880): answers, key "
    "accepted\n"
    "ok    redis       10.0.0.6:6379: answers, log-in accepted\n"
    "ok    webhooks    3 since the start\n"
    "ok    name        full access: may create rooms\n"
    "ok    override    http://10.0.0.9\n"
    "ok    connect     10.0.0.9:80\n"
    "ok    userinfo    10.0.0.9:80: knows OpenID tokens; all is well\n"
    "ok    focus       https://rtc.org/x: answers\n"
    "all is well\n";

/* What is told, but the line of an instance that does not answer: it need
 * not run for a check. */
static bool fault_check_whole(void)
{
    static const char line[] = "ok    webhooks    3 since the start\n";
    const char *at = strstr(check_told, line);
    size_t before = (size_t)(at - check_told);
    return strcmp(world_out, check_told) == 0
        || (!fault_must_work && strncmp(world_out, check_told, before) == 0
            && strcmp(world_out + before, at + strlen(line)) == 0);
}

/* All steps are well and said to be, or one is not, and the status tells
 * it; a line that could not be printed counts as a fault. */
static void fault_check_child(void)
{
    static const char *const env[][2] = {
        { "LKJWT_CA_FILE", "root.pem" },
        { "LKJWT_RESOLVER", "10.0.0.53" } };
    fault_env(env, COUNT_OF(env));
    world_wall = 1790000000000 - world_ms;       /* within certificates */
    fault_main("--check", "a.org");
    bool whole = fault_check_whole();
    bool is_told = strstr(world_out, "\nno ") || strncmp(world_out, "no ", 3)
        == 0 || log_has("level=error")
        || (fault_errno && strcmp(world_out, check_told) != 0);
    if (fault_child->status == 0 ? !whole : fault_child->status != 1
        || fault_must_work || !is_told)
        snprintf(fault_child->left, sizeof fault_child->left, "%.1100s",
            world_out);
}

static const char *fault_check(void)
{
    store_reset(R_);
    net_reset();
    world_dial = fault_check_dial;
    world_sent = fault_check_sent;
    zone_add("a.org", "A", "A:10.0.0.1");
    zone_add("rtc.org", "A", "A:10.0.0.2");
    site_tab[0] = (struct site){ .host = "10.0.0.9", .port = 80, .reply = {
        "HTTP/1.1 401 X\r\nContent-Length: 2\r\n\r\n{}" } };
    site_tab[1] = (struct site){ .host = "10.0.0.8", .port = 7880, .reply = {
        "HTTP/1.1 404 X\r\nContent-Length: 20\r\n\r\n"
        "{\"code\":\"not_found\"}" } };
    site_tab[2] = (struct site){ .host = "127.0.0.1", .port = 8081,
        .reply = { "~" "HTTP/1.0 200 OK\r\n\r\n"
        "lkjwt_events_total{event=\"WEBHOOK\"} 3\n" } };
    site_tab[3] = (struct site){ .host = "10.0.0.1", .port = 443,
        .tls = TLS_YES, .san = "a.org", .reply = { JSON(94,
        "{\"org.matrix.msc4143.rtc_foci\":[{\"type\":\"livekit\","
        "\"livekit_service_url\":\"https://rtc.org/x\"}]}") } };
    site_tab[4] = (struct site){ .host = "10.0.0.2", .port = 443,
        .tls = TLS_YES, .san = "rtc.org", .reply = {
        "HTTP/1.1 400 X\r\nContent-Length: 24\r\n\r\n"
        "{\"errcode\":\"M_NOT_JSON\"}" } };
    return fault_program(fault_check_child);
}

/* The child's pools went with it. */
static const char *fault_start_left(void)
{
    return "";
}

static void fault_start_rows(void)
{
    static const struct fault_row tab[] = {
        { "start-up", 0, fault_start, fault_start_left, true },
        { "start-up on unix sockets", 0, fault_start_unix, fault_start_left,
            true },
        { "--healthcheck", 0, fault_healthcheck, fault_start_left, true },
        { "--healthcheck, unix", 0, fault_healthcheck_unix, fault_start_left,
            true },
        { "--check", 0, fault_check, fault_start_left, true } };
    fault_child = mmap(NULL, sizeof *fault_child, PROT_READ | PROT_WRITE,
        MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (fault_child == MAP_FAILED)
        abort();
    stray_file(true);
    struct bb root = work_bb();
    pem_put(&root, chain_part('R', NULL));
    bb_byte(&root, 0);
    file_write("root.pem", (char *)work_buf);
    file_write("hosts", "127.0.0.1 localhost\n");
    file_write("keys", "devkey: 0123456789abcdef0123456789abcdef\n");
    fault_each(tab, COUNT_OF(tab));
    world_has_random = false;
    row("start-up without getrandom(): no service", fault_start() != NULL
        && fault_child->status == -1 && !fault_child->is_served, "%d, %d",
        fault_child->status, fault_child->is_served);
    world_has_random = true;
    munmap(fault_child, sizeof *fault_child);
}

/* ---- the sandbox ---- */

/* Who starts it, and what there is: unit_kernel.h. */
static const struct {
    const char *name;
    struct kernel kernel;
    int64_t uid;                         /* LKJWT_UID */
} jail_start_tab[] = {
    { "root", { .uid = 0 }, 65532 },
    { "root that stays", { .uid = 0 }, 0 },
    { "root, capabilities kept", { .uid = 0, .keeps_caps = true }, 65532 },
    { "a user", { .uid = 1000 }, 65532 },
    { "a user with capabilities", { .uid = 1000, .ambient =
        1ull << KB_SETPCAP | 1ull << KB_SYS_ADMIN | 1ull << KB_SETUID },
        65532 },
};

#define JAIL_LINKS "links"
static int jail_start_errno;             /* of the call that fails */

static void jail_start(size_t who, char mode, bool has_outer)
{
    memset(&cfg, 0, sizeof cfg);
    memset(met.jail, 0, sizeof met.jail);
    log_clear();
    kernel = jail_start_tab[who].kernel;
    kernel.effective = kernel.permitted = kernel.uid == 0 ? kernel_all()
        : kernel.ambient;
    kernel.inheritable = kernel.ambient;
    kernel.bounding = kernel_all();
    kernel.has_outer = has_outer;
    kernel.fail_errno = jail_start_errno;
    kernel.group_cnt = 3;
    kernel.core = UINT64_MAX;
    kernel.soft = 1024;
    kernel.hard = 4096;
    kernel.is_dumpable = true;
    cfg.jail = mode;
    cfg.uid = jail_start_tab[who].uid;
    cfg.max_conns = LIM_CONN_CNT;
    cfg.ca_file = SL(STRAY "\0");
    cfg.ca_only = true;
    cfg.cert_dir = SL(JAIL_LINKS "\0");
    cfg.bind.is_unix = true;
    cfg.bind.path = SL("socket\0");
}

/* Whether a layer holds, as the kernel has it. */
static bool jail_holds(enum jail_layer layer)
{
    switch (layer) {
    case JL_CORE: return kernel.core == 0;
    case JL_IDS: return kernel.uid == 1000
        || (kernel.uid == 65532 && kernel.gid == 65532
            && kernel.group_cnt == 0 && !kernel_can(KB_SETUID));
    case JL_CAPS: return !(kernel.effective | kernel.permitted
        | kernel.inheritable | kernel.ambient);
    case JL_PRIVS: return kernel.no_new_privs;
    case JL_DUMP: return !kernel.is_dumpable;
    case JL_LANDLOCK: return kernel.is_landlocked;
    case JL_SECCOMP: return kernel.is_filtered;
    case JL_CNT: break;
    }
    return false;
}

/* One start. Returns NULL or what is wrong: a layer that is told and does
 * not hold; one more missing than the call stands for; a start that goes on
 * where a layer is required, or ends where none is. */
static const char *jail_run(size_t who, char mode, bool has_outer)
{
    static char line[500];
    unsigned missing = 0, lied = 0, idle = 0;
    jail_start(who, mode, has_outer);
    bool stays = cfg.uid == 0;
    kernel.is_on = true;
    fault_arm();
    main_nofile();
    bool goes_on = jail_enter();
    fault_disarm();
    kernel.is_on = false;
    char text[2][200] = { "", "" };
    for (enum jail_layer i = 0; i < JL_CNT; i++) {
        char *list = text[!met.jail[i]];
        snprintf(list + strlen(list), sizeof text[0] - strlen(list), "%s%s",
            list[0] ? "," : "", jail_layer_tab[i]);
        lied += met.jail[i] && !jail_holds(i);
        missing += !met.jail[i] && !(i == JL_IDS && stays);
        idle += !met.jail[i];
    }
    snprintf(line, sizeof line, " layers=%s%s%s\n", text[0][0]
        ? text[0] : "none", text[1][0] ? " missing=" : "", text[1]);
    bool is_told = log_has(line)
        && log_has("event=JAIL_BAD ") == (mode == 'r' && missing);
    bool is_off = mode == 'o' && idle == JL_CNT && kernel.uid
        == jail_start_tab[who].kernel.uid && kernel.permitted;
    bool has_bounding = mode != 'o' && !kernel.failed && kernel.bounding
        && jail_start_tab[who].kernel.uid == 0;
    bool has_room = cfg.max_conns + 32 < (int64_t)kernel.soft;
    return !lied && is_told && has_room && !has_bounding && goes_on == (mode != 'r'
        || !missing) && (mode == 'o' ? is_off || who == 3
        : missing <= (kernel.failed ? 3 : 0)) ? NULL
        : fault_wrong("%s failed: %u told and not so, goes on: %d, clients "
            "%lld of %lld, %.900s", kernel.failed ? kernel.failed : "nothing",
            lied, goes_on, (long long)cfg.max_conns, (long long)kernel.soft,
            log_buf);
}

static void fault_jail_rows(void)
{
    static const struct { const char *name; int err; } err_tab[] = {
        { "EPERM", EPERM }, { "ENOSYS", ENOSYS }, { "EINVAL", EINVAL },
        { "EAGAIN", EAGAIN }, { "ENOMEM", ENOMEM }, { "killed", 0 } };
    static const char mode_tab[] = "aro";
    (void)mkdir(JAIL_LINKS, 0755);
    (void)symlink("../ca2.pem", JAIL_LINKS "/ca.pem");
    for (size_t who = 0; who < COUNT_OF(jail_start_tab); who++)
        for (size_t m = 0; m < 3; m++)
            for (size_t e = 0; e < COUNT_OF(err_tab); e++) {
                unsigned bad = 0, calls = 0;
                for (int outer = 0; outer < 2; outer++)
                    for (fault_next = 0; ; fault_next++) {
                        /* of all calls only a trial can be killed */
                        jail_start_errno = err_tab[e].err;
                        const char *text = jail_run(who, mode_tab[m], outer);
                        if (text && bad++ < 3)
                            row(name_of("sandbox of %s, %c: %s of call %ld",
                                jail_start_tab[who].name, mode_tab[m],
                                err_tab[e].name, fault_next), false, "%s",
                                text);
                        calls++;
                        if (!kernel.failed)
                            break;
                    }
                row(name_of("sandbox of %s, %c: %s of each of %u calls",
                    jail_start_tab[who].name, mode_tab[m], err_tab[e].name,
                    calls), bad == 0 && calls > 2, "%u bad", bad);
            }
    net_reset();
}

static const struct fault_row fault_tab[] = {
    { "exchange", 70000, fault_exchange, net_left_later },
    { "exchange by discovery and TLS", 70000, fault_discovery,
        net_left_later },
    { "application service", 70000, fault_appservice,
        fault_appservice_left },
    { "health and metrics", 1000, fault_health, net_left_later },
    { "anchors read again", 1000, fault_signals, net_left_later },
    { "webhooks", 70000, fault_webhooks, leave_left },
    { "delegation", 5000, fault_delegation, leave_left },
    { "Redis: connect, restore", 5000, fault_restore, store_left },
    { "Redis: write", 5000, fault_write, store_left },
    { "Redis: stream", 5000, fault_stream, store_left },
    { "Redis: tick", 5000, fault_tick, store_left },
};

static void test_s25_no_failing_call_does_harm(void)
{
    fault_jail_rows();
    fault_start_rows();
    fault_each(fault_tab, COUNT_OF(fault_tab));
    world_is_random = true;
}

/* ---- the wall clock jumps ---- */

static const int64_t clock_jump_tab[] = { 3600000, -3600000, 36000000,
    -86400000, 31536000000, -31536000000, 315360000000, -315360000000,
    1000, -1000 };

/* Our wall clock is set anew before every poll. */
static void clock_jump(void)
{
    static unsigned turn;
    world_skew = clock_jump_tab[turn++ % COUNT_OF(clock_jump_tab)];
}

/* The number behind a claim's name in a token's payload, -1: not there. */
static int64_t clock_claim(sl token, const char *name)
{
    static uint8_t text[3000];
    const char *at;
    token = sl_skip(token, sl_find(token, '.') + 1);
    token.len = sl_find(token, '.');
    int n = token.len / 4 * 3 + 3 < sizeof text
        ? b64_parse(token, false, text) : -1;
    if (n < 0)
        return -1;
    text[n] = 0;
    at = strstr((char *)text, name);
    return at ? atoll(at + strlen(name)) : -1;
}

/* A user's token and ours for the SFU say the time at which they are made,
 * whatever it was when the request came. */
static void clock_token_rows(void)
{
    static const char *const name[] = { "\"iat\":", "\"nbf\":", "\"exp\":" };
    char body[2000];
    body_fill("{$R,$M,$T}", body, sizeof body);
    for (size_t i = 0; i < COUNT_OF(clock_jump_tab); i++) {
        exchange_reset(SUB_A, NULL);
        site_tab[0].slow_ms = 3000;
        world_skew = 0;
        struct sock *s = exchange_post("/get_token", body);
        net_run(net_never, 1000);
        world_skew = clock_jump_tab[i];
        int64_t wall = (world_wall + world_ms + world_skew) / 1000;
        net_run(net_never, 5000);
        const char *sfu = strstr(site_tab[1].request, "Bearer ");
        sl token[2] = { sl_str(exchange_text(s) + 4),
            sl_str(sfu ? sfu + 7 : "") };
        for (int k = 0; k < 2; k++)
            for (int c = 0; c < 3; c++) {
                int64_t got = clock_claim(token[k], name[c])
                    - (c < 2 ? 0 : k ? SERVICE_TTL_S : cfg.token_ttl_s);
                row(name_of("%s token, clock set by %lld s: %s", k ? "SFU's"
                    : "user's", (long long)clock_jump_tab[i] / 1000,
                    name[c]), got >= wall + 2 && got <= wall + 3,
                    "%lld after %lld", (long long)got, (long long)wall);
            }
        s->is_eof = true;
        row_str("clock set: nothing is left", sl_str(net_left_later()), "");
    }
    world_skew = 0;
}

/* Everything that waits, with a clock that stands and one that jumps: what
 * happens, and when, in ms. */
static const char *clock_waits(void)
{
    static char text[600];
    struct sock *s[4];
    int64_t end[4] = { 0 }, begin;
    exchange_reset("", NULL);
    cfg.fed_cnt = 0;
    cfg.lookup_ms = LIM_LOOKUP_MS;
    zone_add("hang.org", "A", "A:10.0.0.3");
    site_tab[2] = (struct site){ .host = "10.0.0.3", .port = 1,
        .tls = TLS_SILENT };
    begin = world_ms;
    s[0] = client_new(false);                /* says nothing */
    s[1] = client_new(false);
    sock_say(s[1], GET("/healthz"));         /* is kept, and idle */
    s[2] = client_new(false);
    sock_say(s[2], hang_body);               /* a lookup that hangs */
    s[3] = client_new(false);
    sock_say(s[3], "POST /sfu/get HTTP/1.1\r\nHost: x\r\n"
        "Content-Length: 9\r\n\r\n{");       /* a body that never comes */
    for (int round = 0; round < 20000 && world_ms < begin + 700000;
         round++) {
        net_run(net_never, 50);
        for (int i = 0; i < 4; i++)
            if (!end[i] && (i == 2 ? leave_status(s[i]) != 0
                : !s[i]->used))
                end[i] = world_ms;
    }
    s[2]->is_eof = true;
    snprintf(text, sizeof text, "silent %lld, idle %lld, lookup %lld, body "
        "%lld%s", (long long)(end[0] - begin), (long long)(end[1] - begin),
        (long long)(end[2] - begin), (long long)(end[3] - begin),
        net_left_later());
    return text;
}

static const char *clock_life(const char *script, int64_t t_s, int64_t end_s,
    int sanity_s)
{
    static char text[5000];
    leave_reset();
    lv.timeout_ms = t_s * 1000;
    cfg.sanity_s = sanity_s;
    leave_step("new", "");
    leave_play(script);
    leave_until(end_s * 1000 + 1);
    int n = snprintf(text, sizeof text, "%s; %s; %s", lv.calls, lv.looks,
        leave_state());
    snprintf(text + n, sizeof text - (size_t)n, "%s", leave_left());
    return text;
}

/* With Redis, whose own clock is right. */
static const char *clock_store(void)
{
    static char text[5000];
    store_reset(R_);
    lv.is_legacy = true;
    store_hset(store_field(), store_value("D", 20000, 1000, ""));
    store_start();
    leave_until(3000);                   /* taken over before it jumps */
    world_poll = world_skew ? clock_jump : NULL;
    strcpy(lv.script[0], "present");
    leave_until(100000);
    strcpy(lv.script[0], "absent");
    leave_until(200000);
    world_poll = NULL;
    int n = snprintf(text, sizeof text, "%s; %u records", lv.calls,
        rd.rec_cnt);
    snprintf(text + n, sizeof text - (size_t)n, "%s", store_left());
    return text;
}

static void clock_timer_rows(void)
{
    static const struct { const char *name, *script; int64_t t, end;
        int sanity_s; } tab[] = {
        { "waits and gives up", "", 3600, 3700, 0 },
        { "connected for a day", "5:joined 5:sfu=present", 3600, 86400, 0 },
        { "found, watched, gone", "0:sfu=present 900:sfu=absent", 3600,
          9000, 60 },
        { "leaves", "0:joined 0:sfu=present 500:left=1 500:sfu=absent", 600,
          2000, 0 },
        { "a homeserver that refuses", "0:joined 0:sfu=present "
          "1:hs=503,503,429ms=5000,ok", 100, 400, 0 },
    };
    static char want[5000];
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        world_skew = 0;
        snprintf(want, sizeof want, "%s", clock_life(tab[i].script,
            tab[i].t, tab[i].end, tab[i].sanity_s));
        world_poll = clock_jump;
        const char *got = clock_life(tab[i].script, tab[i].t, tab[i].end,
            tab[i].sanity_s);
        world_poll = NULL;
        row(name_of("a clock that jumps: a job %s", tab[i].name),
            strcmp(got, want) == 0 && strlen(want) > 10
            && !strstr(want, "left"), "%s, not %s", got, want);
    }
    world_skew = 0;
    snprintf(want, sizeof want, "%s", clock_waits());
    world_poll = clock_jump;
    const char *got = clock_waits();
    world_poll = NULL;
    row("a clock that jumps: clients, lookups", strcmp(got, want) == 0
        && !strstr(want, " 0") && !strstr(want, "left"), "%s, not %s", got,
        want);
    world_skew = 0;
    snprintf(want, sizeof want, "%s", clock_store());
    world_skew = 1;
    got = clock_store();
    world_skew = 0;
    row("a clock that jumps: a job in Redis", strcmp(got, want) == 0
        && strstr(want, "S; 0 records"), "%s, not %s", got, want);
}

/* A handshake judges by the clock of its moment. The leaf ends with 2026;
 * the session of a first handshake does not help a later one. */
static void clock_certificate_rows(void)
{
    static const int64_t end_wall = 1798761599;
    static const struct { const char *name; int64_t wall[2];
        const char *want[2]; bool is_resumed; int64_t wait_ms; } tab[] = {
        { "set past the end", { -3600, 3600 }, { "200 {}",
          "TLS_EXPIRED tls" }, false, 70000 },
        { "set by ten years", { -3600, 315360000 }, { "200 {}",
          "TLS_EXPIRED tls" }, false, 70000 },
        { "set back to before the end", { 3600, -7200 }, {
          "TLS_EXPIRED tls", "200 {}" }, false, 70000 },
        { "set back to before the beginning", { -7200, -315360000 }, {
          "200 {}", "TLS_EXPIRED tls" }, false, 3670000 },
        { "set to 1970", { -7200, 86400 - 1798761599 }, { "200 {}",
          "TLS_EXPIRED tls" }, false, 3670000 },
        { "a session set back", { -7200, -31536000 }, { "200 {}",
          "200 {}" }, false, 7200000 },
        { "before the beginning, then right", { -315360000, -7200 }, {
          "TLS_EXPIRED tls", "200 {}" }, false, 70000 },
        { "not set: resumed", { -7200, -7100 }, { "200 {}", "200 {}" }, true,
          70000 },
        { "a session set ahead", { -7200 * 3, -7200 }, { "200 {}",
          "200 {}" }, false, 70000 },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        net_reset();
        zone_add("a.org", "A", A1);
        site_tab[0] = (struct site){ .host = "10.0.0.1", .port = 443,
            .tls = TLS_YES, .san = "a.org", .reply = { OK_REPLY } };
        sl leaf = cert_make((struct plan){ .key = K_LEAF,
            .signer = K_INTER, .issuer = "inter", .san = "a.org",
            .until = "261231235959Z" });
        site_make(&site_tab[0]);
        memcpy(site_tab[0].leaf, leaf.p, leaf.len);
        site_tab[0].chain[0].data_len = leaf.len;
        uint64_t before = met.resumed;
        for (int k = 0; k < 2; k++) {
            world_wall = (end_wall + tab[i].wall[k]) * 1000 - world_ms;
            (void)up_begin_test((struct up_opt){ .tls = true });
            (void)net_run(up_is_over, 60000);
            row_str(name_of("certificate: %s, %d", tab[i].name, k),
                up_text(up_test), tab[i].want[k]);
            up_close(up_test, world_ms);
            net_run(net_never, k ? 0 : tab[i].wait_ms);
        }
        row_int(name_of("certificate: %s: resumed", tab[i].name),
            (int64_t)(met.resumed - before), tab[i].is_resumed);
        row_str("certificate: nothing is left", sl_str(net_left_later()),
            "");
    }
}

/* What stands in Redis was restarted by another's clock, or by ours before
 * it was set: the future counts as now. */
static void clock_record_rows(void)
{
    static const int64_t ahead[] = { 1000, 3600000, 31536000000,
        315360000000 };
    for (size_t i = 0; i < COUNT_OF(ahead); i++) {
        store_reset(R_);
        lv.is_legacy = true;
        store_hset(store_field(), store_value("D", 100000, -ahead[i],
            ",\"Connected\":true"));
        strcpy(lv.script[0], "present");
        strcpy(lv.script[2], "503");
        store_start();
        leave_until(1000);
        const struct job *j = job_find(SL(leave_room), SL("I1"));
        int64_t left = j ? j->deadline - lv.begin : 0;
        row(name_of("restarted %lld s from now: as if now",
            (long long)ahead[i] / 1000), left >= 100000 && left < 101000,
            "%lld ms left", (long long)left);
        row_str("restarted in the future: nothing is left",
            sl_str(store_left()), "");
    }
}

static void test_clock(void)
{
    clock_token_rows();
    clock_timer_rows();
    clock_certificate_rows();
    clock_record_rows();
    world_is_random = true;
}

/* ---- secrets are compared in constant time (S29) ---- */

#if defined __has_feature
#if __has_feature(memory_sanitizer)
#define HAS_MSAN 1
#include <sanitizer/msan_interface.h>
#endif
#endif

/* Where MemorySanitizer watches, what is compared counts as uninitialised:
 * a branch or an index that depends on it would end the test. */
static bool ct_of(const uint8_t *a, const uint8_t *b, size_t n)
{
    bool same;
    uint8_t copy[2][64];
    memcpy(copy[0], a, n);
    memcpy(copy[1], b, n);
#ifdef HAS_MSAN
    __msan_poison(copy, sizeof copy);
#endif
    same = ct_eq(copy[0], copy[1], n);
#ifdef HAS_MSAN
    __msan_unpoison(&same, sizeof same);
#endif
    return same;
}

static void test_s29_secrets_are_compared_in_constant_time(void)
{
    static uint8_t a[64], b[64];
    unsigned wrong = 0;
    for (size_t i = 0; i < sizeof a; i++)
        a[i] = b[i] = (uint8_t)(dice() >> 24);
    for (size_t n = 0; n <= sizeof a; n++) {
        wrong += !ct_of(a, b, n);
        for (size_t at = 0; at < n; at++)
            for (int bit = 0; bit < 8; bit++) {
                b[at] ^= (uint8_t)(1 << bit);
                wrong += ct_of(a, b, n);
                b[at] ^= (uint8_t)(1 << bit);
            }
    }
    row("equal, and unequal in each bit", wrong == 0, "%u wrong", wrong);
    /* a MAC that differs in one bit, wherever it is */
    struct api_key key = { .name = SL("k") };
    uint8_t text[200];
    struct bb t = BB(text);
    key_of(SL("a secret of thirty-two bytes and"), &key.sec_key);
    jwt_sign(&t, &key.sec_key, SL("{}"));
    sl token = { text, t.len }, mac = { text + t.len - 43, 43 };
    sl head = { text, t.len - 44 };
    row_int("the MAC itself", jwt_signers(head, mac, &key, 1), 1);
    for (size_t bit = wrong = 0; bit < 256; bit++) {
        uint8_t raw[36], again[44];
        struct bb o = BB(again);
        if (b64_parse(mac, false, raw) != 32)
            abort();
        raw[bit / 8] ^= (uint8_t)(1 << bit % 8);
        b64_put(&o, b64_url, (sl){ raw, 32 });
        wrong += jwt_signers(head, (sl){ again, o.len }, &key, 1) != 0;
    }
    row("a MAC wrong in one bit", wrong == 0, "%u accepted", wrong);
    for (size_t len = wrong = 0; len < 43; len++)
        wrong += jwt_signers(head, (sl){ mac.p, len }, &key, 1) != 0;
    row("a MAC cut short", wrong == 0, "%u accepted", wrong);
    (void)token;
}

/* ---- every TLS context is seeded by getrandom() (S30) ---- */

static void test_s30_every_tls_context_is_seeded(void)
{
    static uint8_t hello[2][32];
    static const unsigned char kind[] = { TLS_YES, TLS_YES, TLS_REFUSE,
        TLS_RESET, TLS_NOISE, TLS_YES };
    unsigned contexts = tls_started, unseeded = tls_unseeded;
    for (size_t i = 0; i < COUNT_OF(kind); i++) {
        net_reset();
        zone_add("a.org", "A", A1);
        site_tab[0] = (struct site){ .host = "10.0.0.1", .port = 443,
            .tls = kind[i], .san = i < 5 ? "a.org" : "b.org",
            .reply = { OK_REPLY } };
        for (int k = 0; k < 2; k++) {    /* the second may be resumed */
            (void)up_begin_test((struct up_opt){ .tls = true });
            (void)net_run(up_is_over, 60000);
            up_close(up_test, world_ms);
            net_run(net_never, 70000);
            memcpy(hello[k], tls_seed, 32);
        }
        row("two contexts, two seeds", memcmp(hello[0], hello[1], 32) != 0,
            "the same");
    }
    row("contexts were started", tls_started - contexts >= 10, "%u",
        tls_started - contexts);
    row("each was seeded by getrandom()", tls_unseeded == unseeded,
        "%u were not", tls_unseeded - unseeded);
    /* that the harness would notice */
    uint8_t seed[32] = { 0 };
    tls_profile(&chan_tls[0], false);
    br_ssl_engine_set_buffer(&chan_tls[0].eng, chan_io[0],
        BR_SSL_BUFSIZE_MONO, 0);
    w_inject_entropy(&chan_tls[0].eng, seed, sizeof seed);
    (void)w_client_reset(&chan_tls[0], "a.org", 0);
    row("another seed is noticed", tls_unseeded == unseeded + 1, "%u",
        tls_unseeded - unseeded);
    tls_unseeded = unseeded;
    memset(&chan_tls[0], 0, sizeof chan_tls[0]);
}
