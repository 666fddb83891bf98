/* Delegated leaves (section 21) from job_accept to job_end: scripted SFU
 * and homeserver, a clock that jumps. Chance is switched off in the rows
 * with times: waits are then the least that may be (0.6 T, half the
 * backoff). A script is a list of `SECOND:WORD[=VALUE]`:
 *
 *   joined left aborted started lost   webhooks; left=REASON
 *   id=N sid=TEXT room=TEXT            of the webhooks from then on
 *   sfu= sfu2= hs=                     replies from then on, in turn, the
 *                                      last for ever: leave_say()
 *   sfuwait= hswait= sfudown= hsdown=  seconds before a reply; no listener
 *   new                                the same delegation again
 *
 * What happens is text as well: `0R 2160R` are restarts at second 0 and
 * 2160, S is send, r and s the same on the stable path, x another path;
 * looks are L1 and L2 by identity.
 */

enum { LEAVE_HOUR = 3600000 };
static const char leave_room[] =
    "RRRRRRRRRRRRRRRRRRRRRRRRRRRRRRRRRRRRRRRRRRR";

static struct {
    char script[3][400];             /* sfu of identity 1 and 2, hs */
    unsigned asked[3];
    int64_t wait_ms[2];              /* sfu, hs */
    bool is_down[2];
    char id[8], sid[80], room[64];   /* of webhooks */
    char sfu_sid[80];
    int64_t begin, timeout_ms;
    bool is_legacy;
    char calls[4000], looks[8000];
    char wrong[200];                 /* what a request must not be */
    unsigned restarts, sends, limited;
    bool is_quiet;                   /* count, note nothing */
    /* a homeserver that allows so much: tokens in ms */
    int64_t bucket_ms, bucket_cap_ms, bucket_at;
    void (*on_call)(sl delay_id, bool is_send, bool ok);
} lv;

/* Seconds without needless digits. */
static const char *leave_time(int64_t ms)
{
    static char text[40];
    int n = snprintf(text, sizeof text, "%lld.%03lld", (long long)(ms / 1000),
        (long long)(ms % 1000));
    while (text[n - 1] == '0')
        text[--n] = 0;
    if (text[n - 1] == '.')
        text[n - 1] = 0;
    return text;
}

__attribute__((format(printf, 3, 4)))
static void leave_note(char *to, size_t cap, const char *fmt, ...)
{
    size_t n = strlen(to);
    va_list ap;
    if (lv.is_quiet)
        return;
    n += (size_t)snprintf(to + n, cap - n, "%s%s", n ? " " : "",
        leave_time(world_ms - lv.begin));
    if (n >= cap)
        return;
    va_start(ap, fmt);
    vsnprintf(to + n, cap - n, fmt, ap);
    va_end(ap);
}

static void leave_wrong(const char *what)
{
    if (!lv.wrong[0])
        snprintf(lv.wrong, sizeof lv.wrong, "%s", what);
}

/* The word of a script that is next. */
static void leave_word(int which, char out[200])
{
    sl rest = sl_str(lv.script[which]), word = { NULL, 0 };
    for (unsigned i = 0; i <= lv.asked[which] && sl_word(&rest, ",", &word);
         i++)
        snprintf(out, 200, "%.*s", (int)word.len, (const char *)word.p);
    lv.asked[which]++;
}

static void leave_reply(struct sock *s, int status, const char *field,
    sl body)
{
    static char text[4096];
    int n = snprintf(text, sizeof text, "HTTP/1.1 %d x\r\n%s"
        "Content-Length: %zu\r\n\r\n", status, field, body.len);
    sock_give(s, text, (size_t)n);
    if (body.len)
        sock_give(s, body.p, body.len);
}

/* Say what a word stands for. Returns whether it was a success. */
static bool leave_say(struct sock *s, const char *word, sl identity)
{
    static const struct { const char *word; int status;
        const char *field, *body; } tab[] = {
        { "ok", 200, "", "{}" }, { "201", 201, "", "" },
        { "gone", 404, "", "{}" }, { "404", 404, "", "" },
        { "404array", 404, "", "[]" },
        { "404page", 404, "", "<html>no such page</html>" },
        { "404found", 404, "", "{\"errcode\":\"M_NOT_FOUND\"}" },
        { "404odd", 404, "", "{\"errcode\":5}" },
        { "unrec", 404, "", "{\"errcode\":\"M_UNRECOGNIZED\"}" },
        { "absent", 404, "", "{\"code\":\"not_found\",\"msg\":\"x\"}" },
        { "absent200", 200, "", "{\"code\":\"not_found\"}" },
        { "badroute", 404, "", "{\"code\":\"bad_route\",\"msg\":\"x\"}" },
        { "absent503", 503, "", "{\"code\":\"not_found\"}" },
        { "absent401", 401, "", "not_found" },
        { "another", 200, "", "\x0a\x02S1\x12\x02I3\x18\x02" },
        { "nobody", 200, "", "\x0a\x02S1\x18\x02" },
        { "broken", 200, "", "\x0a\x7fS1" },
        { "429late", 429, "Retry-After: Thu, 19 Sep 2024 15:47:49 GMT\r\n",
          "{}" },
        { "429past", 429, "Retry-After: Thu, 19 Sep 2024 15:00:00 GMT\r\n",
          "{}" },
    };
    int status;
    char field[300], body[100];
    if (strcmp(word, "hang") == 0)
        return false;
    if (strcmp(word, "close") == 0) {
        s->is_eof = true;
        return false;
    }
    if (strcmp(word, "reset") == 0) {
        s->is_reset = true;
        return false;
    }
    for (size_t i = 0; i < COUNT_OF(tab); i++)
        if (strcmp(tab[i].word, word) == 0) {
            leave_reply(s, tab[i].status, tab[i].field, sl_str(tab[i].body));
            return tab[i].status < 300;
        }
    for (char state = 0; state < 4; state++) {
        static const char *const name[] = { "joining", "joined", "present",
            "state3" };
        if (strcmp(word, name[(int)state]))
            continue;
        int n = snprintf(body, sizeof body, "\x0a\x02S1\x12%c%.*s\x18%c",
            (int)identity.len, (int)identity.len,
            (const char *)identity.p, state);
        leave_reply(s, 200, "", (sl){ (uint8_t *)body, (size_t)n });
        return true;
    }
    const char *at = strchr(word, '=');
    if (sscanf(word, "%d", &status) != 1)
        abort();
    if (at && strncmp(word, "429ms", 5) == 0) {
        snprintf(body, sizeof body, "{\"errcode\":\"M_LIMIT_EXCEEDED\","
            "\"retry_after_ms\":%s}", at + 1);
        leave_reply(s, 429, "", sl_str(body));
    } else if (at) {
        snprintf(field, sizeof field, "%s: %s\r\n", status == 429
            ? "Retry-After" : "Location", at + 1);
        leave_reply(s, status, field, SL("{}"));
    } else {
        leave_reply(s, status, "", SL("{\"errcode\":\"M_UNKNOWN\"}"));
    }
    return false;
}

/* A homeserver that refills one call a second: whether this one passes. */
static bool leave_bucket(struct sock *s)
{
    char word[40];
    lv.bucket_ms += world_ms - lv.bucket_at;
    lv.bucket_at = world_ms;
    if (lv.bucket_ms > lv.bucket_cap_ms)
        lv.bucket_ms = lv.bucket_cap_ms;
    if (lv.bucket_ms >= 1000) {
        lv.bucket_ms -= 1000;
        return true;
    }
    lv.limited++;
    snprintf(word, sizeof word, "429ms=%lld",
        (long long)(1000 - lv.bucket_ms));
    (void)leave_say(s, word, (sl){ NULL, 0 });
    return false;
}

/* No job may have two calls of a kind under way (INV-Q3). */
static void leave_check_calls(void)
{
    for (size_t i = LIM_UP_CNT + LIM_SFU_CNT; i < LIM_UP_ALL; i++)
        for (size_t k = i + 1; k < LIM_UP_ALL; k++)
            if (up_pool[i].state != UP_FREE && up_pool[k].state != UP_FREE
                && up_pool[i].call.owner == KIND_JOB
                && up_pool[k].call.owner == KIND_JOB
                && up_pool[i].call.owner_idx == up_pool[k].call.owner_idx
                && up_pool[i].call.label == up_pool[k].call.label)
                leave_wrong("two calls of a kind");
}

/* A restart, a send, or what a redirect made of it. */
static void leave_hs(struct sock *s, sl path, sl head, sl body)
{
    static const char unstable[] =
        "/_matrix/client/unstable/org.matrix.msc4140/delayed_events/";
    static const char stable[] = "/_matrix/client/v1/delayed_events/";
    bool is_stable = sl_starts(path, SL(stable));
    bool is_send = sl_ends(path, SL("/send"));
    sl id = is_stable ? sl_skip(path, strlen(stable))
        : sl_starts(path, SL(unstable)) ? sl_skip(path, strlen(unstable))
        : (sl){ NULL, 0 };
    char kind = !id.len ? 'x' : is_send ? 'S' : 'R', word[200] = "";
    if (id.len && !is_send && !sl_ends(path, SL("/restart")))
        leave_wrong("neither restart nor send");
    if (!sl_eq(body, SL("{}")))
        leave_wrong("another body than {}");
    if (memmem(head.p, head.len, "uthorization", 12))
        leave_wrong("a token for the homeserver");
    if (!memmem(head.p, head.len, "\r\nContent-Type: application/json\r\n",
                34))
        leave_wrong("no Content-Type");
    leave_note(lv.calls, sizeof lv.calls, "%c",
        is_stable ? kind + 32 : kind);
    bool ok = !lv.bucket_cap_ms || leave_bucket(s);
    if (ok) {
        leave_word(2, word);
        if (strcmp(word, "stable") == 0)
            strcpy(word, is_stable ? "ok" : "unrec");
        ok = leave_say(s, word, (sl){ NULL, 0 });
    }
    lv.restarts += ok && !is_send;
    lv.sends += ok && is_send;
    if (lv.on_call)
        lv.on_call(sl_skip((sl){ id.p, id.len - (is_send ? 5 : 8) }, 0),
            is_send, ok);
}

/* GetParticipant: alias, then identity. */
static void leave_sfu(struct sock *s, sl path, sl head, sl body)
{
    char word[200] = "";
    if (!sl_eq(path, SL("/twirp/livekit.RoomService/GetParticipant")))
        leave_wrong("another method of the SFU");
    if (!memmem(head.p, head.len, "\r\nAuthorization: Bearer ey", 26))
        leave_wrong("no token for the SFU");
    if (body.len < 4U + HASH_NAME_LEN || body.p[0] != 0x0a
        || body.p[1] != HASH_NAME_LEN || body.p[2 + HASH_NAME_LEN] != 0x12
        || body.len != 4U + HASH_NAME_LEN + body.p[3 + HASH_NAME_LEN])
        leave_wrong("another body of GetParticipant");
    sl id = sl_skip(body, 4U + HASH_NAME_LEN);
    int which = sl_eq(id, SL("I2"))      /* or user:device */
        || (id.len && memchr(id.p, ':', id.len));
    leave_note(lv.looks, sizeof lv.looks, "L%d", which + 1);
    leave_word(which, word);
    (void)leave_say(s, word, id);
}

static bool leave_is(const struct sock *s, const char *host)
{
    return !s->is_udp && sock_port(s) != 53
        && strcmp(sock_host(s), host) == 0;
}

static void leave_sent(struct sock *s)
{
    bool hs = leave_is(s, "10.0.0.7");
    if (!hs && !leave_is(s, "10.0.0.8")) {
        net_sent(s);
        return;
    }
    for (;;) {
        char *in = (char *)s->out + s->seen;
        char *end = strstr(in, "\r\n\r\n");
        if (!end)
            return;
        size_t len = (size_t)(end - in) + 4, body_len = 0;
        const char *cl = strstr(in, "\r\nContent-Length: ");
        if (cl && cl < end)
            body_len = strtoul(cl + 18, NULL, 10);
        if (len + body_len > s->out_len - s->seen)
            return;
        sl head = { (uint8_t *)in, len }, body = { (uint8_t *)in + len,
            body_len }, rest = head, method = { NULL, 0 },
            path = { NULL, 0 };
        if (!sl_word(&rest, " ", &method) || !sl_word(&rest, " ", &path)
            || !sl_eq(method, SL("POST")))
            leave_wrong("no POST");
        leave_check_calls();
        s->in_at = world_ms + lv.wait_ms[hs];
        (hs ? leave_hs : leave_sfu)(s, path, head, body);
        s->seen += len + body_len;
        if (s->seen == s->out_len) {
            s->seen = s->out_len = 0;
            s->out[0] = 0;
            return;
        }
    }
}

static void leave_dial(struct sock *s)
{
    bool hs = leave_is(s, "10.0.0.7");
    if (strncmp(sock_host(s), "10.0.1.", 7) == 0 && sock_port(s) == 80)
        return;                      /* takes all, says nothing */
    if (!hs && !leave_is(s, "10.0.0.8"))
        net_dial(s);
    else if (lv.is_down[hs])
        s->dial_errno = ECONNREFUSED;
}

/* ---- the program's side ---- */

static void leave_reset(void)
{
    exchange_reset("", NULL);
    ZERO(job_pool);
    ZERO(job_hot);
    ZERO(job_room);
    ZERO(api_pool);
    ZERO(redirect_pool);
    ZERO(seen_cache);
    ZERO(look_in_ring);
    ZERO(gone_ring);
    memset(&rep, 0, sizeof rep);
    rep.release = -1;
    rep.cnt = 1;
    store_mode = STORE_NONE;
    job_top = look_head = look_waiting = gone_cnt = 0;
    webhook_at = silence_told_at = 0;
    memset(&lv, 0, sizeof lv);
    for (int i = 0; i < 2; i++)
        strcpy(lv.script[i], "absent");
    strcpy(lv.script[2], "ok");
    strcpy(lv.id, "I1");
    strcpy(lv.sid, "S1");
    strcpy(lv.room, leave_room);
    lv.begin = world_ms;
    lv.timeout_ms = LEAVE_HOUR;
    world_dial = leave_dial;
    world_sent = leave_sent;
    world_is_random = false;
    cfg.cs[0].name = SL("a.org");
    if (!cfg_base(SL("http://10.0.0.7"), true, &cfg.cs[0].base))
        abort();
    cfg.cs_cnt = 1;
    cfg.jobs_max = LIM_JOB_CNT;
    cfg.jobs_per_user = LIM_JOB_CNT;
}

static bool leave_begin_at(const char *server, const char *room,
    const char *delay_id)
{
    struct api *a = api_find(sl_str(server), world_ms);
    struct job_params p = { .alias = sl_str(room),
        .identity = { SL("I1"), SL("I2") }, .server = sl_str(server),
        .delay_id = sl_str(delay_id), .user = SL("@u:a.org"),
        .timeout_ms = lv.timeout_ms };
    if (lv.is_legacy)
        p.identity[1].len = 0;
    return a && job_accept(&p, a, world_ms);
}

static bool leave_begin(const char *room, const char *delay_id)
{
    return leave_begin_at("a.org", room, delay_id);
}

/* A webhook of LiveKit's form, given to the jobs. */
static void leave_hook(const char *event, const char *reason,
    const char *more)
{
    static uint8_t text[1000];
    struct webhook w;
    int n = snprintf((char *)text, sizeof text, "{\"event\":\"%s\",\"room\":"
        "{\"sid\":\"RM_x\",\"name\":\"%s\"},\"participant\":{\"identity\":"
        "\"%s\",\"sid\":\"%s\"%s%s},\"createdAt\":\"1\"%s}", event, lv.room,
        lv.id, lv.sid, *reason ? ",\"disconnectReason\":" : "", reason,
        more);
    if (!webhook_parse(text, (size_t)n, &w)) {
        leave_wrong("the webhook is refused");
        return;
    }
    job_webhook(&w, io_wall_ms(), world_ms);
}

static void leave_step(const char *verb, const char *value)
{
    static const struct { const char *verb, *event; } hook_tab_[] = {
        { "joined", "participant_joined" }, { "left", "participant_left" },
        { "aborted", "participant_connection_aborted" },
        { "started", "room_started" }, { "finished", "room_finished" },
        { "published", "track_published" }, { "egress", "egress_started" },
    };
    char quoted[100] = "";
    for (size_t i = 0; i < COUNT_OF(hook_tab_); i++)
        if (strcmp(hook_tab_[i].verb, verb) == 0) {
            if (*value)
                snprintf(quoted, sizeof quoted, *value >= '0'
                    && *value <= '9' ? "%s" : "\"%s\"", value);
            leave_hook(hook_tab_[i].event, quoted, "");
            return;
        }
    struct { const char *verb; char *to; size_t cap; int which; } text[] = {
        { "id", lv.id, sizeof lv.id, -1 },
        { "sid", lv.sid, sizeof lv.sid, -1 },
        { "room", lv.room, sizeof lv.room, -1 },
        { "sfu", lv.script[0], sizeof lv.script[0], 0 },
        { "sfu2", lv.script[1], sizeof lv.script[1], 1 },
        { "hs", lv.script[2], sizeof lv.script[2], 2 },
    };
    for (size_t i = 0; i < COUNT_OF(text); i++)
        if (strcmp(text[i].verb, verb) == 0) {
            snprintf(text[i].to, text[i].cap, "%s", value);
            if (text[i].which >= 0)
                lv.asked[text[i].which] = 0;
            return;
        }
    double seconds = atof(value);
    if (strcmp(verb, "sfuwait") == 0)
        lv.wait_ms[0] = (int64_t)(seconds * 1000);
    else if (strcmp(verb, "hswait") == 0)
        lv.wait_ms[1] = (int64_t)(seconds * 1000);
    else if (strcmp(verb, "sfudown") == 0)
        lv.is_down[0] = seconds > 0;
    else if (strcmp(verb, "hsdown") == 0)
        lv.is_down[1] = seconds > 0;
    else if (strcmp(verb, "lost") == 0)
        leave_hook("room_finished", "", strcmp(value, "0") == 0
            ? ",\"numDropped\":0" : ",\"numDropped\":\"3\"");
    else if (strcmp(verb, "new") == 0 && !leave_begin(leave_room, "D"))
        leave_wrong("a delegation is refused");
    else if (strcmp(verb, "new"))
        abort();
}

static void leave_until(int64_t ms)
{
    if (lv.begin + ms > world_ms)
        net_run(net_never, lv.begin + ms - world_ms);
}

static void leave_play(const char *script)
{
    sl rest = sl_str(script), word;
    while (sl_word(&rest, " ", &word)) {
        char text[500];
        snprintf(text, sizeof text, "%.*s", (int)word.len,
            (const char *)word.p);
        char *verb = strchr(text, ':'), *value;
        if (!verb)
            abort();
        *verb++ = 0;
        value = strchr(verb, '=');
        if (value)
            *value++ = 0;
        leave_until((int64_t)(atof(text) * 1000 + 0.5));
        leave_step(verb, value ? value : "");
    }
}

/* The job's state, or why there is none any more. */
static const char *leave_state(void)
{
    static const char *const word[] = { "free", "waiting", "connected",
        "leaving" };
    static char text[200];
    const struct job *j = job_find(SL(leave_room), SL("I1"));
    if (j)
        return word[j->state];
    const char *at = NULL, *next = log_buf;
    while ((next = strstr(next, "event=JOB_ENDED ")) != NULL)
        at = next++;
    at = at ? strstr(at, " reason=") : NULL;
    if (!at)
        return "no job";
    snprintf(text, sizeof text, "%.*s", (int)strcspn(at + 8, "\n"), at + 8);
    size_t n = strlen(text);
    if (text[0] == '"') {
        memmove(text, text + 1, n);
        text[n - 2] = 0;
    }
    return text;
}

/* End what is left and look for what was not given back. */
static const char *leave_left(void)
{
    static char text[500];
    for (size_t i = 0; i < LIM_JOB_CNT; i++)
        if (job_pool[i].state != J_FREE)
            job_end(&job_pool[i], NULL, world_ms);
    unsigned apis = 0, redirects = 0, rooms = 0;
    for (size_t i = 0; i < LIM_API_CNT; i++)
        apis += api_pool[i].job_cnt || api_pool[i].active
            || api_pool[i].lookup;
    for (size_t i = 0; i < COUNT_OF(redirect_pool); i++)
        redirects += redirect_pool[i].is_used;
    for (size_t i = 0; i < COUNT_OF(job_room); i++)
        rooms += job_room[i] > 0;
    const char *left = net_left_later();
    text[0] = 0;
    if (left[0] || apis || redirects || rooms || job_top
        || met.gauge[GA_JOBS] || met.gauge[GA_UPSTREAM] || lv.wrong[0]
        || !loop_is_sound())
        snprintf(text, sizeof text, "%s; %u APIs in use, %u redirects, %u "
            "rooms, top %zu, gauges %lld %lld, wrong: %s", left, apis,
            redirects, rooms, job_top, (long long)met.gauge[GA_JOBS],
            (long long)met.gauge[GA_UPSTREAM], lv.wrong);
    return text;
}

struct leave_row {
    const char *name;
    int64_t t;                       /* seconds */
    const char *script;
    int64_t end;                     /* seconds */
    const char *calls, *state;
    const char *looks;               /* NULL: any */
    int sanity_s;
    bool legacy;
};

static void leave_rows(const struct leave_row *tab, size_t cnt)
{
    for (size_t i = 0; i < cnt; i++)
        for (int drip = 0; drip < 2; drip++) {
            leave_reset();
            world_chunk = drip ? 1 : SIZE_MAX;
            lv.timeout_ms = tab[i].t * 1000;
            lv.is_legacy = tab[i].legacy;
            cfg.sanity_s = tab[i].sanity_s;
            leave_step("new", "");
            leave_play(tab[i].script);
            leave_until(tab[i].end * 1000 + 1);
            char state[200];
            snprintf(state, sizeof state, "%s", leave_state());
            bool ok = strcmp(lv.calls, tab[i].calls) == 0
                && strcmp(state, tab[i].state) == 0
                && (!tab[i].looks || strcmp(lv.looks, tab[i].looks) == 0);
            const char *left = leave_left();
            row(name_of("%s%s", tab[i].name, drip ? ", byte by byte" : ""),
                ok && !left[0], "`%s`, %s, looks `%s`%s", lv.calls, state,
                lv.looks, left);
        }
}

/* ---- the rows of section 21 ---- */

static void leave_connect_rows(void)
{
    static const struct leave_row tab[] = {
        { "Q1 joined", 3600, "5:joined", 2000, "5R", "connected",
          "0L1 0L2 1L1 1L2 2L1 2L2 3.125L1 3.125L2 4.812L1 4.812L2" },
        { "Q1 found at once", 3600, "0:sfu=present", 2000, "0R",
          "connected", "0L1" },
        { "Q1 found later", 3600, "0:sfu=absent,absent,absent,present",
          2000, "3.125R", "connected",
          "0L1 0L2 1L1 1L2 2L1 2L2 3.125L1" },
        { "Q1 found under the second identity", 100, "0:sfu2=present", 119,
          "0R 60R", "connected", "0L1 0L2 60L2" },
        { "Q1 the first is unknown, the second there", 3600,
          "0:sfu=500 0:sfu2=present", 10, "0R", "connected", "0L1 0L2" },
        { "Q1 errors, then there", 3600, "0:sfu=500,500,present", 10, "2R",
          "connected", "0L1 0L2 1L1 1L2 2L1" },
        { "Q1 joining counts", 3600, "0:sfu=joining", 10, "0R",
          "connected", "0L1" },
        { "Q1 joined counts", 3600, "0:sfu=joined", 10, "0R", "connected",
          "0L1" },
        { "Q1 disconnected is absent", 3600, "0:sfu=state3,present", 10,
          "1R", "connected", "0L1 0L2 1L1" },
        { "Q1 one identity alone", 3600, "0:sfu2=present", 3, "", "waiting",
          "0L1 1L1 2L1", .legacy = true },
        { "Q1 no second one to join by", 3600, "1.5:id=I2 1.5:joined", 1,
          "", "waiting", "0L1 1L1", .legacy = true },
        { "Q1 joined under the second, followed alone", 100,
          "0.5:id=I2 0.5:joined 1:sfu2=present 2:id=I1 2:left=1", 99,
          "0.5R 60.5R", "connected", "0L1 0L2 60.5L2" },
        { "Q1 the second one leaves", 100,
          "0.5:id=I2 0.5:joined 2:left=1", 99, "0.5R 2S", "sent" },
        { "Q1 the second one's join while the first is followed", 100,
          "0.5:joined 1:id=I2 1:joined 2:left=1", 50, "0.5R", "connected" },
        { "Q1 leaving under either before it was seen", 100,
          "0.5:id=I2 0.5:left=4", 50, "",
          "left before it was seen connected" },
        { "Q1 joined twice: one restart", 100, "1:joined 2:joined", 50,
          "1R", "connected" },
        { "Q1 another room", 3600, "0.5:room=R 0.5:joined", 0, "",
          "waiting" },
        { "Q1 another identity", 3600, "0.5:id=i1 0.5:joined", 0, "",
          "waiting" },
        { "Q1 no identity", 3600, "0.5:id= 0.5:joined", 0, "", "waiting",
          NULL, .legacy = true },
        { "Q1 other events", 3600, "0.2:published 0.3:finished 0.4:egress "
          "0.5:started 0.6:lost=3", 0, "", "waiting", "0L1 0L2" },
        { "Q1 a look-up under way gives way", 100,
          "0:sfu=hang 3:joined 3:sfu=present", 70, "3R 63R", "connected",
          "0L1 63L1" },
        { "Q1 the SFU is down", 3600, "0:sfudown=1 5:joined", 20, "5R",
          "connected", "" },
        { "Q1 the SFU hangs: 10 s a try", 3600,
          "0:sfu=hang,present 0:sfu2=hang", 40, "21R", "connected",
          "0L1 10L2 21L1" },
        /* what is no absence is no presence either */
        { "Q1 odd replies of the SFU", 3600, "0:sfu=404,absent200,badroute,"
          "absent503,absent401,broken,another,nobody,302=/x,404page,close,"
          "reset,present", 100, "86.231R", "connected", NULL,
          .legacy = true },
        { "Q1 odd replies of the SFU do not mean absent", 300,
          "0:joined 1:sfu=404,absent200,badroute,absent503,absent401,"
          "broken,another,nobody,302=/x,404page,close,reset,absent 1:left=9",
          150, "0R 87.231S", "sent" },
        { "Q4 waited T", 10, "", 20, "10S", "sent" },
        { "Q4 waited an hour", 86400, "", 3601, "3600S", "sent" },
        { "Q4 waited an hour of nearly two", 7000, "", 3601, "3600S",
          "sent" },
        { "Q4 presence unknown all the time: T more", 10,
          "0:sfu=500 0:sfu2=500", 30, "21.139S", "sent" },
        { "Q4 unknown at the end, then there", 10, "0:sfu=500 0:sfu2=500 "
          "12.5:sfu=present", 22, "13.125R 19.125R", "connected" },
        { "Q4 unknown at the end, then absent", 10, "0:sfu=500 0:sfu2=500 "
          "12.5:sfu=absent 12.5:sfu2=absent", 22, "13.125S", "sent" },
        { "Q4 one unknown, one absent at the end", 10, "0:sfu2=500 "
          "12.5:sfu2=absent", 22, "13.125S", "sent" },
        { "Q4 unknown once, absent at the end", 10, "0:sfu=500,absent", 22,
          "10S", "sent" },
        { "Q4 a second is all there is for sending", 10, "0:hs=503", 30,
          "10S 11S", "no answer within the budget" },
        { "Q4 refused", 10, "0:hs=403", 30, "10S",
          "refused by the homeserver" },
        { "Q4 T of a second", 1, "", 2, "1S", "sent" },
        { "replaced while waiting", 10, "5:new", 14, "", "waiting" },
        { "replaced while waiting, the new one's T", 10, "5:new", 16,
          "15S", "sent" },
        { "replaced while connected", 100, "0.5:joined 5:new 6:joined", 50,
          "0.5R 6R", "connected" },
        { "replaced, its restart given up", 100,
          "0:hs=hang,ok 0.5:joined 2:new 3:joined", 50, "0.5R 3R",
          "connected" },
        { "unrecognized on both paths is not remembered", 100,
          "0:hs=unrec,unrec,ok 0.5:joined 1:new 2:joined", 50,
          "0.5R 0.5r 2R", "connected" },
        { "the stable path is remembered", 100,
          "0:hs=stable 0.5:joined 1:new 2:joined", 50,
          "0.5R 0.5r 2r", "connected" },
        { "replaced while leaving", 100, "0:hs=ok,hang 0.5:joined 1:left=1 "
          "2:new", 50, "0.5R 1S", "waiting" },
    };
    leave_rows(tab, COUNT_OF(tab));
}

static void leave_restart_rows(void)
{
    static const struct leave_row tab[] = {
        { "Q5 again and again", 10, "0:sfu=present", 25,
          "0R 6R 12R 18R 24R", "connected", "0L1 6L1 12L1 18L1 24L1" },
        { "Q5 T of a second: never under 0.8 s", 1, "0:sfu=present", 4,
          "0R 0.8R 1.6R 2.4R 3.2R 4R", "connected" },
        { "Q5 the deadline counts from the answer", 10,
          "0:sfu=present 0:hswait=3 4:hs=503", 30, "0R 9R",
          "deadline passed" },
        { "Q5 the deadline is renewed", 10, "0:sfu=present 0:hs=ok,503", 30,
          "0R 6R 7R 8R 9.125R", "deadline passed" },
        { "Q5 the look-up before it hangs: a quarter of the rest", 10,
          "0:joined 0:sfu=hang", 14, "0R 7R 13R", "connected",
          "6L1" },
        { "Q5 or 2 s at most", 1000, "0:joined 0:sfu=hang", 700, "0R 602R",
          "connected" },
        { "Q5 an unknown presence does not keep it", 10,
          "0:joined 0:sfu=500", 25, "0R 6R 12R 18R 24R", "connected" },
        { "Q5 fails once", 100, "0:hs=503,ok 0:joined", 50, "0R 1R",
          "connected" },
        { "Q5 backoff", 1000, "0:hs=503,503,503,503,503,503,ok 0:joined",
          100, "0R 1R 2R 3.125R 4.812R 7.343R 11.139R", "connected" },
        { "Q5 no connection", 1000, "0:hsdown=1 0:joined 2.5:hsdown=0", 100,
          "3.125R", "connected" },
        { "Q5 5 s an attempt", 1000, "0:hs=hang,ok 0:joined", 100, "0R 6R",
          "connected" },
        { "Q5 just in time", 10, "0:sfu=present 0:hs=ok,503,503,503,ok 1:"
          "hswait=0.5", 15, "0R 6R 7.5R 9R", "deadline passed" },
        { "Q6 the first one passes its deadline", 5, "0:hs=503 0:joined",
          10, "0R 1R 2R 3.125R 4.812R", "deadline passed" },
        { "Q6 an attempt under way at the deadline", 3,
          "0:hs=hang 0:joined", 10, "0R", "deadline passed" },
        { "Q6 refused", 100, "0:hs=403 0:joined", 50, "0R",
          "refused by the homeserver" },
        { "Q6 refused later", 100, "0:hs=ok,403 0:sfu=present", 70,
          "0R 60R", "refused by the homeserver" },
        { "Q7 off", 1000, "0:sfu=present", 599, "0R", "connected", "0L1" },
        { "Q7 present", 1000, "0:sfu=present", 100, "0R", "connected",
          "0L1 30L1 60L1 90L1", 30 },
        { "Q7 absent", 1000, "0:sfu=present,present,absent", 100, "0R 60S",
          "sent", "0L1 30L1 60L1", 30 },
        { "Q7 errors are nothing", 1000, "0:sfu=present,500,404,badroute,"
          "absent503,present", 170, "0R", "connected",
          "0L1 30L1 60L1 90L1 120L1 150L1", 30 },
        { "Q8 absent at a restart: twice", 100, "0:joined", 100,
          "0R 60R 80S", "sent" },
        { "Q8 the second look finds it", 100, "0:joined 61:sfu=present",
          130, "0R 60R 120R", "connected", "60L1 80L1 120L1" },
        { "Q8 the second look knows nothing: from the start", 100,
          "0:joined 61:sfu=500,absent", 200, "0R 60R 120R 140S", "sent",
          "60L1 80L1 120L1 140L1" },
        { "Q8 room_started", 1000, "0:joined 10:started", 100, "0R 30S",
          "sent" },
        { "Q8 room_started twice within 20 s", 1000,
          "0:joined 10:started 25:started", 100, "0R 30S", "sent" },
        { "Q8 joined again in between", 1000, "0:joined 10:started "
          "15:joined", 100, "0R", "connected" },
        { "Q8 webhooks were lost", 1000, "0:joined 10:lost=3", 100,
          "0R 30S", "sent" },
        { "Q8 none were lost", 1000, "0:joined 10:lost=0", 100, "0R",
          "connected" },
        { "Q8 T of 10 s: restarts go on", 10, "0:joined", 40,
          "0R 6R 12R 18R 24R 26S", "sent" },
        { "Q8 left meanwhile", 1000, "0:joined 10:started 20:left=1", 100,
          "0R 20S", "sent" },
    };
    leave_rows(tab, COUNT_OF(tab));
}

static void leave_send_rows(void)
{
#define AWAY "0:joined 1:left=1"
    static const struct leave_row tab[] = {
        { "Q9 sent", 100, AWAY, 50, "0R 1S", "sent" },
        { "Q9 gone is sent", 100, "0:hs=ok,gone " AWAY, 50, "0R 1S",
          "sent" },
        { "Q9 refused", 100, "0:hs=ok,403 " AWAY, 50, "0R 1S",
          "refused by the homeserver" },
        { "Q9 until the deadline", 100, "0:hs=ok,503 0:joined 10:left=1",
          200, "0R 10S 11S 12S 13.125S 14.812S 17.343S 21.139S 26.833S "
          "35.374S 48.186S 67.404S 96.231S", "no answer within the budget" },
        { "Q9 an hour at most", 86400, "0:hs=ok,429=1799 " AWAY, 7300,
          "0R 1S 1800S 3599S", "no answer within the budget" },
        { "Q9 an hour at most of nearly two", 7000, "0:hs=ok,429=1799 "
          AWAY, 7300, "0R 1S 1800S 3599S", "no answer within the budget" },
        { "Q9 a second at least", 10, "0:hs=ok,503 0:joined 6:hs=503 "
          "9.9:left=1", 20, "0R 6R 7R 8R 9.125R 9.9S 10.9S",
          "no answer within the budget" },
        { "Q9 a hint replaces the wait and starts the series again", 1000,
          "0:hs=ok,503,503,503,503,429=7,503,503,ok " AWAY, 100,
          "0R 1S 2S 3S 4.125S 5.812S 12.812S 13.812S 14.812S", "sent" },
        { "Q9 a replay under way is given up, another followed", 100,
          "0:hs=307=/x,hang,307=/y,ok 0:joined 2:left=1", 50,
          "0R 0x 2S 2x", "sent" },
        { "Q9 the restart under way is given up", 100,
          "0:hs=hang,ok 0:joined 2:left=1", 50, "0R 2S", "sent" },
        { "Q9 nothing brings it back", 100, "0:hs=ok,hang,hang,ok 0:joined "
          "1:left=1 1.5:joined 2:left=1 3:started 4:sfu=present 5:aborted "
          "5.5:lost=3", 50, "0R 1S 7S 13S", "sent" },
        { "Q9 down and up", 1000, "0:joined 0.5:hsdown=1 1:left=1 "
          "1.5:hs=close", 60, "0R 1S", "sent" },
    };
    leave_rows(tab, COUNT_OF(tab));
}

/* What the homeserver may answer (PROTOCOL section 8): to a restart, then
 * to a send. */
static void leave_reply_rows(void)
{
    static const struct { const char *reply, *restart, *ended, *send,
        *over; } tab[] = {
#define GOES_ON "connected"
#define REFUSED "refused by the homeserver"
        { "ok", "0R", GOES_ON, "0R 1S", "sent" },
        { "201", "0R", GOES_ON, "0R 1S", "sent" },
        { "gone,ok", "0R", REFUSED, "0R 1S", "sent" },
        { "404,ok", "0R", REFUSED, "0R 1S", "sent" },
        { "404found,ok", "0R", REFUSED, "0R 1S", "sent" },
        { "404array,ok", "0R", REFUSED, "0R 1S", "sent" },
        { "404odd,ok", "0R", REFUSED, "0R 1S", "sent" },
        { "404page,ok", "0R 1R", GOES_ON, "0R 1S 2S", "sent" },
        { "stable", "0R 0r", GOES_ON, "0R 1S 1s", "sent" },
        { "unrec", "0R 0r", REFUSED, "0R 1S 1s", REFUSED },
        { "unrec,503,ok", "0R 0r 1r", GOES_ON, "0R 1S 1s 2s", "sent" },
        { "unrec,gone", "0R 0r", REFUSED, "0R 1S 1s", "sent" },
        { "429=5,ok", "0R 5R", GOES_ON, "0R 1S 6S", "sent" },
        { "429=0,ok", "0R 1R", GOES_ON, "0R 1S 2S", "sent" },
        { "429=-5,ok", "0R 1R", GOES_ON, "0R 1S 2S", "sent" },
        { "429=soon,ok", "0R 1R", GOES_ON, "0R 1S 2S", "sent" },
        { "429=1.5,ok", "0R 1R", GOES_ON, "0R 1S 2S", "sent" },
        { "429past,ok", "0R 1R", GOES_ON, "0R 1S 2S", "sent" },
        { "429late,ok", "0R 30R", GOES_ON, "0R 1S 30S", "sent" },
        { "429ms=5000,ok", "0R 5R", GOES_ON, "0R 1S 6S", "sent" },
        { "429ms=5001,ok", "0R 6R", GOES_ON, "0R 1S 7S", "sent" },
        { "429ms=1,ok", "0R 1R", GOES_ON, "0R 1S 2S", "sent" },
        { "429ms=0,ok", "0R 1R", GOES_ON, "0R 1S 2S", "sent" },
        { "429ms=-7,ok", "0R 1R", GOES_ON, "0R 1S 2S", "sent" },
        { "429ms=99999999999999999999,ok", "0R", GOES_ON, "0R 1S",
          "no answer within the budget" },
        { "429=99999999999999999999,ok", "0R", GOES_ON, "0R 1S",
          "no answer within the budget" },
        { "429,ok", "0R 1R", GOES_ON, "0R 1S 2S", "sent" },
        { "408,ok", "0R 1R", GOES_ON, "0R 1S 2S", "sent" },
        { "421,ok", "0R 1R", GOES_ON, "0R 1S 2S", "sent" },
        { "423,ok", "0R 1R", GOES_ON, "0R 1S 2S", "sent" },
        { "425,ok", "0R 1R", GOES_ON, "0R 1S 2S", "sent" },
        { "500,ok", "0R 1R", GOES_ON, "0R 1S 2S", "sent" },
        { "502,ok", "0R 1R", GOES_ON, "0R 1S 2S", "sent" },
        { "503,ok", "0R 1R", GOES_ON, "0R 1S 2S", "sent" },
        { "599,ok", "0R 1R", GOES_ON, "0R 1S 2S", "sent" },
        { "close,ok", "0R 1R", GOES_ON, NULL, NULL },
        { "reset,ok", "0R 1R", GOES_ON, NULL, NULL },
        { "hang,ok", "0R 6R", GOES_ON, "0R 1S 7S", "sent" },
        { "400,ok", "0R", REFUSED, "0R 1S", REFUSED },
        { "401,ok", "0R", REFUSED, "0R 1S", REFUSED },
        { "403,ok", "0R", REFUSED, "0R 1S", REFUSED },
        { "405,ok", "0R", REFUSED, "0R 1S", REFUSED },
        { "409,ok", "0R", REFUSED, "0R 1S", REFUSED },
        { "410,ok", "0R", REFUSED, "0R 1S", REFUSED },
        { "307=/x,ok", "0R 0x", GOES_ON, "0R 1S 1x", "sent" },
        { "308=/x,ok", "0R 0x", GOES_ON, "0R 1S 1x", "sent" },
        { "307=http://10.0.0.7/x,ok", "0R 0x", GOES_ON, "0R 1S 1x", "sent" },
        { "307=http://10.0.0.7:80/x,ok", "0R 0x", GOES_ON, "0R 1S 1x",
          "sent" },
        { "307=//10.0.0.7/x,ok", "0R 0x", GOES_ON, "0R 1S 1x", "sent" },
        { "307=/x,503,ok", "0R 0x 1R", GOES_ON, "0R 1S 1x 2S", "sent" },
        { "307=/x,307=/y,ok", "0R 0x 1R", GOES_ON, "0R 1S 1x 2S", "sent" },
        { "307=/x,403", "0R 0x", REFUSED, "0R 1S 1x", REFUSED },
        { "307=http://10.0.0.7:81/x,ok", "0R 1R", GOES_ON, "0R 1S 2S",
          "sent" },
        { "307=https://10.0.0.7/x,ok", "0R 1R", GOES_ON, "0R 1S 2S",
          "sent" },
        { "307=http://10.0.0.8/x,ok", "0R 1R", GOES_ON, "0R 1S 2S",
          "sent" },
        { "307=http://10.0.0.7.b.org/x,ok", "0R 1R", GOES_ON, "0R 1S 2S",
          "sent" },
        { "307=http://u@10.0.0.7/x,ok", "0R 1R", GOES_ON, "0R 1S 2S",
          "sent" },
        { "307=x,ok", "0R 1R", GOES_ON, "0R 1S 2S", "sent" },
        { "307=/x#y,ok", "0R 1R", GOES_ON, "0R 1S 2S", "sent" },
        { "307,ok", "0R 1R", GOES_ON, "0R 1S 2S", "sent" },
        { "301=/x,ok", "0R 1R", GOES_ON, "0R 1S 2S", "sent" },
        { "302=/x,ok", "0R 1R", GOES_ON, "0R 1S 2S", "sent" },
        { "303=/x,ok", "0R 1R", GOES_ON, "0R 1S 2S", "sent" },
        { "304,ok", "0R 1R", GOES_ON, "0R 1S 2S", "sent" },
    };
    static char name[2][COUNT_OF(tab)][80], script[2][COUNT_OF(tab)][120];
    static struct leave_row rows[2 * COUNT_OF(tab)];
    size_t n = 0;
    for (size_t i = 0; i < COUNT_OF(tab); i++)
        for (int send = 0; send < (tab[i].send ? 2 : 1); send++) {
            snprintf(name[send][i], sizeof name[0][0], "%s: %s",
                send ? "send" : "restart", tab[i].reply);
            snprintf(script[send][i], sizeof script[0][0], send
                ? "0:joined 1:hs=%s 1:left=1" : "0:hs=%s 0:joined",
                tab[i].reply);
            rows[n++] = (struct leave_row){ .name = name[send][i], .t = 300,
                .script = script[send][i], .end = 160,
                .calls = send ? tab[i].send : tab[i].restart,
                .state = send ? tab[i].over : tab[i].ended };
        }
    leave_rows(rows, n);
}

/* Every event with every reason, sid and presence in every state, against
 * PROTOCOL section 9 in other words. */
static void leave_matrix(void)
{
    static const char *const reason_name[] = { "UNKNOWN_REASON",
        "CLIENT_INITIATED", "DUPLICATE_IDENTITY", "SERVER_SHUTDOWN",
        "PARTICIPANT_REMOVED", "ROOM_DELETED", "STATE_MISMATCH",
        "JOIN_FAILURE", "MIGRATION", "SIGNAL_CLOSE", "ROOM_CLOSED",
        "USER_UNAVAILABLE", "USER_REJECTED", "SIP_TRUNK_FAILURE",
        "CONNECTION_TIMEOUT", "MEDIA_FAILURE", "AGENT_ERROR" };
    /* s: believed, b: may be back, c: the client's own will, ?: looked up */
    static const char class[] = "?cbbssb?b?s??????";
    static const char *const word[] = { "present", "absent", "500" };
    static const char *const sid[] = { "S1", "S2", "" };
    enum { CASES = 17 * 2 + 4 };
    for (int state = J_WAITING; state <= J_LEAVING; state++)
    for (int k = 0; k < CASES; k++)
    for (int p = 0; p < 3; p++)
    for (int s = 0; s < (state == J_CONNECTED ? 3 : 1); s++) {
        char reason[40] = "", c = '?', script[200], want[100];
        bool aborted = k >= CASES - 2;
        const char *ended;
        if (k < 17) {
            snprintf(reason, sizeof reason, "=%d", k);
            c = class[k];
        } else if (k < 34) {
            snprintf(reason, sizeof reason, "=%s", reason_name[k - 17]);
            c = class[k - 17];
        } else if (k == 35) {
            strcpy(reason, "=200");          /* newer than we are */
        } else if (k == 37) {
            strcpy(reason, "=SIGNAL_CLOSE");
        }
        if (state == J_CONNECTED && s == 1)
            c = 'b';                         /* of another join */
        snprintf(script, sizeof script, "%s 9.9:sfu=%s 9.9:sid=%s 10:%s%s",
            state == J_WAITING ? "0:sfu=absent" : state == J_CONNECTED
            ? "0:joined" : "0:hs=ok,hang 0:joined 8:left=1 9.8:hs=ok",
            word[p], sid[s], aborted ? "aborted" : "left", reason);
        bool stays = (c == 'b' || c == '?') && p == 0;
        strcpy(want, "");
        ended = "left before it was seen connected";
        if (state == J_LEAVING) {
            strcpy(want, "0R 8S 14S");       /* the first S hangs for 5 s */
            ended = "sent";
        } else if (state == J_CONNECTED && stays) {
            strcpy(want, "0R 60R 120R");
            ended = "connected";
        } else if (state == J_CONNECTED) {
            strcpy(want, c == 's' || c == 'c' ? "0R 10S" : p == 2
                ? "0R 60R 110S" : c == 'b' ? "0R 30S" : "0R 10S");
            ended = "sent";
        } else if (stays || (c == 'c' && p == 0)) {
            /* back, or found by the next of the regular look-ups */
            strcpy(want, stays ? "10R 70R 130R" : "11.139R 71.139R");
            ended = "connected";
        } else if (c == 'c' || (c != 's' && p == 2)) {
            /* unknown to the end: T more */
            strcpy(want, p == 2 ? "216.231S" : "100S");
            ended = "sent";
        }
        leave_reset();
        lv.timeout_ms = 100000;
        leave_step("new", "");
        leave_play(script);
        leave_until(strcmp(want, "216.231S") ? 130500 : 217000);
        char got[200];
        snprintf(got, sizeof got, "%s", leave_state());
        const char *left = leave_left();
        row(name_of("state %d, %s", state, script), strcmp(lv.calls, want)
            == 0 && strcmp(got, ended) == 0 && !left[0],
            "`%s` %s, want `%s` %s%s", lv.calls, got, want, ended, left);
    }
}

#define SID64 "0123456789012345678901234567890123456789012345678901234567890123"

/* What the sid decides, and how long the participant may take to be back. */
static void leave_back_rows(void)
{
    static const struct leave_row tab[] = {
        { "sid of the last join", 1000, "0:joined 10:left=1", 50, "0R 10S",
          "sent" },
        { "sid of another join: back", 1000, "0:joined 9:sfu=present "
          "9:sid=S2 10:left=1", 50, "0R", "connected", "10L1" },
        { "sid of another join: away", 1000, "0:joined 9:sid=S2 10:left=1",
          50, "0R 30S", "sent" },
        { "sid learned by a look-up", 1000, "0:sfu=present,absent "
          "9:sid=S2 10:left=1", 50, "0R 30S", "sent" },
        { "no sid at the join: nothing to compare", 1000,
          "0:sid= 0:joined 9:sid=S2 10:left=1", 50, "0R 10S", "sent" },
        { "the second join's sid counts", 1000, "0:joined 5:sid=S2 5:joined "
          "10:left=1", 50, "0R 10S", "sent" },
        { "the first join's leave comes late", 1000, "0:joined 5:sid=S2 "
          "5:joined 9:sfu=present 9:sid=S1 10:left=1", 50, "0R",
          "connected" },
        { "a sid of 64 bytes", 1000, "0:sid=" SID64 " 0:joined 9:sid=S1 "
          "10:left=1", 50, "0R 30S", "sent" },
        { "a sid of 64 bytes is that of the join", 1000, "0:sid=" SID64
          " 0:joined 10:left=1", 50, "0R 10S", "sent" },
        { "a sid of 65 bytes is none", 1000, "0:sid=x" SID64 " 0:joined "
          "9:sid=S1 10:left=1", 50, "0R 10S", "sent" },
        { "an aborted one of another join", 1000, "0:joined 9:sid=S2 "
          "10:aborted", 50, "0R 30S", "sent" },
        { "20 s: back at 19 s", 1000, "0:joined 10:left=2 29:sfu=present",
          60, "0R", "connected" },
        { "20 s: errors at first, absent at the end", 1000, "0:joined "
          "9:sfu=500 10:left=2 29.9:sfu=absent", 60, "0R 35.374S", "sent" },
        { "20 s: absent, then errors for T", 100, "0:joined 10:left=2 "
          "15:sfu=500", 200, "0R 60R 110S", "sent" },
        { "20 s: joined again", 1000, "0:joined 10:left=2 20:joined", 60,
          "0R", "connected" },
        { "20 s: lost webhooks do not matter", 1000, "0:joined 10:left=2 "
          "12:lost=3", 60, "0R 30S", "sent" },
        { "20 s: nor does the room's start", 1000, "0:joined 10:left=2 "
          "12:started", 60, "0R 30S", "sent" },
        { "20 s: waiting, then its own will: ignored", 1000, "10:left=2 "
          "12:left=1", 29, "", "waiting" },
        { "20 s: waiting, gone at the end", 1000, "10:left=2 12:left=1", 31,
          "", "left before it was seen connected" },
        { "20 s: a lesser doubt does not shorten it", 1000, "0:joined "
          "10:left=2 12:left=9", 60, "0R 30S", "sent" },
        { "20 s: surely gone", 1000, "0:joined 10:left=2 15:left=1", 60,
          "0R 15S", "sent" },
        { "20 s: twice, the first counts", 1000, "0:joined 10:left=8 "
          "20:left=8", 60, "0R 30S", "sent" },
        { "20 s: T of 10 s, restarts go on", 10, "0:joined 2:left=2", 40,
          "0R 6R 12R 18R 22S", "sent" },
        { "20 s: waiting, back", 1000, "10:left=2 20:sfu=present", 31,
          "21.139R", "connected" },
        { "20 s: waiting, both identities", 1000, "10:left=2 "
          "20:sfu2=present", 31, "21.139R", "connected" },
        { "one look: unknown, then absent", 1000, "0:joined 9:sfu=500,500,"
          "absent 10:left=9", 60, "0R 12S", "sent" },
        { "one look: unknown, then present", 1000, "0:joined 9:sfu=500,500,"
          "present 10:left=9", 60, "0R", "connected" },
        { "one look: hangs", 1000, "0:joined 9:sfu=hang,absent 10:left=9",
          60, "0R 21S", "sent" },
        { "unknown for T of an hour", 3600, "0:joined 9:sfu=500 10:left=9",
          4000, "0R 2160R 3610S", "sent" },
    };
    leave_rows(tab, COUNT_OF(tab));
}

/* ---- many jobs, long times ---- */

static const char *leave_room_of(unsigned n)
{
    static char text[HASH_NAME_LEN + 1];
    snprintf(text, sizeof text, "%043u", n);
    return text;
}

/* Jobs 0 to cnt - 1, each in a room of its own, its delay id its number. */
static void leave_many(unsigned cnt, bool joined)
{
    char id[20];
    for (unsigned i = 0; i < cnt; i++) {
        snprintf(id, sizeof id, "%u", i);
        if (!leave_begin(leave_room_of(i), id))
            leave_wrong("a delegation is refused");
        strcpy(lv.room, leave_room_of(i));
        if (joined)
            leave_step("joined", "");
    }
}

static void leave_event_of(unsigned n, const char *verb, const char *value)
{
    strcpy(lv.room, leave_room_of(n));
    leave_step(verb, value);
}

/* One homeserver, several jobs. */
static void leave_queue_rows(void)
{
    static const struct { const char *name; unsigned cnt;
        const char *script, *calls; int64_t end; unsigned leave;
        bool all_end; } tab[] = {
        { "a 429 stops all of them", 4, "0:hswait=0.1 0:hs=429=10,429=3,ok,ok",
          "0R 0R 0R 0R 10.1R 10.29R", 100, 0 },
        { "a 429 without a hint, too", 4, "0:hswait=0.1 0:hs=429,429,ok,ok",
          "0R 0R 0R 0R 1.1R 1.29R", 100, 0 },
        { "sends first, then by deadline", 4,
          "0:hswait=0.1 0:hs=429=10,429=10,429=10,429=10,ok",
          "0R 0R 0R 0R 10.1S 10.35S 10.568R 10.758R", 100, 2 },
        { "all on the stable path", 3, "0:hs=stable", "0R 0R 0R 0r 0r 0r",
          100, 0 },
        { "all on neither path", 3, "0:hs=unrec", "0R 0R 0R 0r 0r 0r",
          100, 3, true },
        { "8 at once", 10, "0:hswait=1", "0R 0R 0R 0R 0R 0R 0R 0R 1R 1R",
          100, 0 },
        { "the pace is halved once for all that were out", 10,
          "0:hswait=1 0:hs=429=5,429=5,429=5,429=5,429=5,429=5,429=5,429=5,"
          "ok", "0R 0R 0R 0R 0R 0R 0R 0R 6R 6.25R 6.5R 6.75R 7R 7.25R "
          "7.468R 7.658R 7.824R 7.969R", 100, 0 },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        leave_reset();
        lv.timeout_ms = 1000000;
        leave_play(tab[i].script);
        leave_many(tab[i].cnt, true);
        leave_until(500);
        for (unsigned k = 0; !tab[i].all_end && k < tab[i].leave; k++)
            leave_event_of(tab[i].cnt - 1 - k, "left", "1");
        leave_until(tab[i].end * 1000);
        row(tab[i].name, strcmp(lv.calls, tab[i].calls) == 0
            && job_connected_cnt() == tab[i].cnt - tab[i].leave, "`%s`, "
            "%lld connected", lv.calls, (long long)job_connected_cnt());
        row_str(name_of("%s: nothing is left", tab[i].name),
            sl_str(leave_left()), "");
    }
}

/* Found by look-up, and no webhook comes: told once. */
static void leave_silence_rows(void)
{
    static const struct { const char *name; int64_t t, run_s; unsigned jobs;
        const char *script; unsigned want; } tab[] = {
        { "10 min less a second", 60, 599, 1, "", 0 },
        { "10 min", 60, 600, 1, "", 1 },
        { "10 min, whatever T", 3600, 600, 1, "", 1 },
        { "an hour: once", 60, 3599, 1, "", 1 },
        { "an hour, three jobs: once", 60, 3599, 3, "", 1 },
        { "one more, 11 min later: twice", 3600, 3599, 1, "660:new", 2 },
        { "one more, 9 min later: once", 3600, 3599, 1, "540:new", 1 },
        { "joined by webhook", 60, 3599, 1, "0:joined", 0 },
        { "a webhook of any kind", 60, 3599, 1, "300:egress", 0 },
        { "at the last moment", 60, 3599, 1, "599:egress", 0 },
        { "just before it was found", 3600, 3599, 0,
          "0:egress 59:new", 0 },
        { "long before it was found", 3600, 3599, 0,
          "0:egress 61:new", 1 },
        { "not yet found", 3600, 3000, 1, "0:sfu=absent", 0 },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        leave_reset();
        strcpy(lv.script[0], "present");
        lv.timeout_ms = tab[i].t * 1000;
        uint64_t before = met.event[EV_NO_WEBHOOK];
        leave_many(tab[i].jobs, false);
        strcpy(lv.room, leave_room_of(0));
        leave_play(tab[i].script);
        leave_until(tab[i].run_s * 1000 + 1);
        row_int(name_of("silence: %s", tab[i].name),
            (int64_t)(met.event[EV_NO_WEBHOOK] - before), tab[i].want);
        row_str(name_of("silence: %s: nothing is left", tab[i].name),
            sl_str(leave_left()), "");
    }
}

/* Where the homeserver's API is, and how long that holds. */
#define WELL(base) "HTTP/1.1 200 OK\r\nConnection: close\r\n" \
    "Transfer-Encoding: chunked\r\n\r\n1c\r\n{\"m.homeserver\":{\"base_url\":" \
    "\r\n" base "\r\n2\r\n}}\r\n0\r\n\r\n"
#define WELL_OK WELL("11\r\n\"http://10.0.0.7\"")

static void leave_api_rows(void)
{
    static const struct { const char *name, *reply; const char *calls; }
    tab[] = {
        { "base", WELL_OK, "0R" },
        { "base with a slash", WELL("12\r\n\"http://10.0.0.7/\""), "0R" },
        { "base with a path", WELL("13\r\n\"http://10.0.0.7/x\""), "0x" },
        { "base without scheme", WELL("a\r\n\"10.0.0.7\""), "" },
        { "another scheme", WELL("10\r\n\"ftp://10.0.0.7\""), "" },
        { "a query", WELL("16\r\n\"http://10.0.0.7/?x=y\""), "" },
        { "empty", WELL("2\r\n\"\""), "" },
        { "null", WELL("4\r\nnull"), "" },
        { "no string", WELL("1\r\n7"), "" },
        { "no JSON", WELL("1\r\nx"), "" },
        { "404", STATUS(404), "" }, { "500", STATUS(500), "" },
        { "cut", "~HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{", "" },
        { "too long", "HTTP/1.1 200 OK\r\nContent-Length: 65537\r\n\r\n",
          "" },
    };
    for (size_t i = 0; i <= COUNT_OF(tab) + 1; i++) {
        leave_reset();
        cfg.cs_cnt = 0;
        zone_add("a.org", "A", "A:9.9.9.1");
        site_tab[2] = (struct site){ "9.9.9.1", 443, .tls = TLS_YES,
            .san = "a.org" };
        struct site *t = &site_tab[2];
        if (i < COUNT_OF(tab)) {
            t->reply[0] = tab[i].reply;
            leave_step("new", "");
            leave_step("joined", "");
            leave_until(50000);
            char *at = lv.calls;         /* the look-up took some ms */
            bool ok = *tab[i].calls ? *at == '0' && strlen(at) > 1
                && at[strlen(at) - 1] == tab[i].calls[1] : !*at;
            row(name_of("client API: %s", tab[i].name), ok
                && strcmp(leave_state(), "connected") == 0, "`%s` %s",
                lv.calls, leave_state());
        } else if (i == COUNT_OF(tab)) {
            /* kept for 4 h: restarts are 36 min apart */
            t->reply[0] = WELL_OK;
            strcpy(lv.script[0], "present");
            leave_step("new", "");
            leave_until(14399000);
            int early = t->requests;
            leave_until(15125000);
            row("client API: kept for 4 h", early == 1 && t->requests == 2
                && lv.restarts == 8, "%d, %d, %u restarts", early,
                t->requests, lv.restarts);
        } else {
            /* a failure for 1 min: the jobs repeat meanwhile in vain */
            t->reply[0] = STATUS(404);
            t->reply[1] = WELL_OK;
            leave_step("new", "");
            leave_step("joined", "");
            leave_until(59900);
            int early = t->requests;
            leave_until(130000);
            row("client API: a failure is kept for a minute", early == 1
                && t->requests == 2 && lv.restarts == 1, "%d, %d, %u "
                "restarts", early, t->requests, lv.restarts);
        }
        row_str("client API: nothing is left", sl_str(leave_left()), "");
    }
}

/* Who may have how many. */
static void leave_cap_rows(void)
{
    static const struct { const char *name; unsigned all, user, jobs;
        bool open; unsigned want; } tab[] = {
        { "of all", 3, 16, 5, false, 3 }, { "of a user", 10, 2, 5, false, 2 },
        { "of an open server", 10000, 10000, 600, true, LIM_JOB_SERVER },
        { "of a listed one", 10000, 10000, 600, false, 600 },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        leave_reset();
        cfg.jobs_max = tab[i].all;
        cfg.jobs_per_user = tab[i].user;
        cfg.is_open = tab[i].open;
        unsigned got = 0;
        for (unsigned k = 0; k < tab[i].jobs; k++)
            got += leave_begin(leave_room_of(k), "D");
        row_int(name_of("jobs %s", tab[i].name), got, tab[i].want);
        row(name_of("jobs %s: the same again", tab[i].name),
            leave_begin(leave_room_of(0), "E")
            && met.gauge[GA_JOBS] == tab[i].want, "%lld",
            (long long)met.gauge[GA_JOBS]);
        row_str(name_of("jobs %s: nothing is left", tab[i].name),
            sl_str(leave_left()), "");
    }
    /* a full pool */
    leave_reset();
    unsigned got = 0;
    for (unsigned k = 0; k < LIM_JOB_CNT; k++)
        job_pool[k].state = k == 700 ? J_FREE : J_LEAVING;
    for (unsigned k = 0; k < 2; k++)
        got += leave_begin(leave_room_of(k), "D");
    row_int("the pool is full", got, 1);
    ZERO(job_pool);
}

/* When each job was last restarted, and what was wrong with that. */
static struct { int64_t last, least, most; unsigned restarts, sends; }
    leave_book[2000];
static unsigned leave_restarts_all, leave_sends_all;

static void leave_keep_book(sl delay_id, bool is_send, bool ok)
{
    uint64_t n;
    leave_restarts_all += !is_send;
    leave_sends_all += is_send;
    if (!ok || !sl_u64(delay_id, COUNT_OF(leave_book) - 1, &n))
        return;
    if (is_send) {
        leave_book[n].sends++;
        return;
    }
    int64_t gap = world_ms - leave_book[n].last;
    if (leave_book[n].restarts++) {
        if (gap < leave_book[n].least)
            leave_book[n].least = gap;
        if (gap > leave_book[n].most)
            leave_book[n].most = gap;
    }
    leave_book[n].last = world_ms;
}

static void leave_book_open(void)
{
    for (size_t i = 0; i < COUNT_OF(leave_book); i++) {
        memset(&leave_book[i], 0, sizeof leave_book[i]);
        leave_book[i].least = INT64_MAX;
    }
    leave_restarts_all = leave_sends_all = 0;
    lv.on_call = leave_keep_book;
    lv.is_quiet = true;
    cfg.log_level = 'e';
    world_is_random = true;
}

/* A whole day: no restart early, none late, one job's life through. */
static void leave_day_rows(void)
{
    static const struct { const char *name; int64_t t_ms, least, most;
        unsigned fewest, mostest; } tab[] = {
        { "T of a day", 86400000, 51840000, 69120000, 2, 2 },
        { "T of an hour", 3600000, 2160000, 2880000, 30, 41 },
        { "T of 18 s", 18000, 10800, 14400, 6000, 8001 },
        { "T of a second", 1000, 800, 800, 108000, 108002 },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        leave_reset();
        leave_book_open();
        lv.timeout_ms = tab[i].t_ms;
        strcpy(lv.script[0], "present");
        leave_many(1, true);
        leave_until(0);
        for (int hour = 1; hour <= 24; hour++)
            leave_until((int64_t)hour * LEAVE_HOUR + 1);
        const struct job *j = &job_pool[0];
        bool alive = j->state == J_CONNECTED
            && j->deadline == leave_book[0].last + tab[i].t_ms;
        row(name_of("a day: %s", tab[i].name), alive
            && leave_book[0].least >= tab[i].least
            && leave_book[0].most <= tab[i].most
            && leave_book[0].restarts >= tab[i].fewest
            && leave_book[0].restarts <= tab[i].mostest, "state %d, %u "
            "restarts, %lld to %lld ms apart", j->state,
            leave_book[0].restarts, (long long)leave_book[0].least,
            (long long)leave_book[0].most);
        strcpy(lv.script[0], "absent");
        leave_event_of(0, "left", "1");
        net_run(net_never, 1000);
        row(name_of("a day: %s: then left", tab[i].name), job_top == 0
            && leave_book[0].sends == 1, "%u sends", leave_book[0].sends);
        row_str(name_of("a day: %s: nothing is left", tab[i].name),
            sl_str(leave_left()), "");
    }
}

/* 2,000 participants of a homeserver with Synapse's default limit. */
static void leave_crowd(void)
{
    enum { ALL = 2000, SOME = 400 };
    leave_reset();
    leave_book_open();
    lv.bucket_ms = lv.bucket_cap_ms = 5000;
    lv.bucket_at = world_ms;
    strcpy(lv.script[0], "present");
    leave_many(ALL, true);
    int64_t most = 0;
    for (int minute = 1; minute <= 240; minute++)
        leave_until((int64_t)minute * 60000);
    unsigned fewest = UINT32_MAX;
    for (unsigned i = 0; i < ALL; i++) {
        most = leave_book[i].most > most ? leave_book[i].most : most;
        fewest = leave_book[i].restarts < fewest ? leave_book[i].restarts
            : fewest;
    }
    row("a crowd: 4 h, none ends", job_connected_cnt() == ALL && fewest >= 3
        && most <= LEAVE_HOUR, "%lld connected, %u restarts at least, %lld "
        "ms apart at most", (long long)job_connected_cnt(), fewest,
        (long long)most);
    row("a crowd: few calls in vain", lv.limited * 4 < leave_restarts_all,
        "%u of %u", lv.limited, leave_restarts_all);
    /* some leave: theirs come first */
    int64_t begin = world_ms;
    unsigned before = leave_restarts_all, sent = 0;
    for (unsigned i = 0; i < SOME; i++)
        leave_event_of(i * 5, "left", "1");
    while (lv.sends < SOME && world_ms < begin + 2 * LEAVE_HOUR)
        net_run(net_never, 1000);
    row("a crowd: sends come before restarts", lv.sends == SOME
        && leave_restarts_all - before <= 2 * LIM_API_CALLS
        && world_ms - begin < 2 * SOME * 1000, "%u sent, %u restarts "
        "meanwhile, %lld ms", lv.sends, leave_restarts_all - before,
        (long long)(world_ms - begin));
    row_int("a crowd: the others stay", job_connected_cnt(), ALL - SOME);
    net_run(net_never, LEAVE_HOUR);
    row_int("a crowd: an hour later, too", job_connected_cnt(), ALL - SOME);
    strcpy(lv.script[0], "absent");
    for (unsigned i = 0; i < ALL; i++)
        leave_event_of(i, "left", "1");
    net_run(net_never, LEAVE_HOUR);
    for (unsigned i = 0; i < ALL; i++)
        sent += leave_book[i].sends == 1;
    row("a crowd: all leave, each once", sent == ALL && lv.sends == ALL
        && job_top == 0, "%u of %u, %zu left", sent, lv.sends, job_top);
    row_str("a crowd: nothing is left", sl_str(leave_left()), "");
}

/* What hangs takes nobody else with it (SECURITY section 4). */
static void leave_bulkheads(void)
{
    enum { HUNG = 7, EACH = 30, WELL = 20, MANY = 150 };
    static char name[HUNG][16], base[HUNG][32];
    unsigned room = 0, alive = 0;
    leave_reset();
    cfg.log_level = 'e';
    lv.timeout_ms = 10000;
    strcpy(lv.script[0], "present");
    for (int k = 0; k < HUNG; k++) {
        snprintf(name[k], sizeof name[k], "h%d", k);
        snprintf(base[k], sizeof base[k], "http://10.0.1.%d", k + 1);
        cfg.cs[cfg.cs_cnt].name = sl_str(name[k]);
        if (!cfg_base(sl_str(base[k]), true, &cfg.cs[cfg.cs_cnt++].base))
            abort();
    }
    leave_many(WELL, true);
    for (room = WELL; room < WELL + HUNG * EACH; room++) {
        if (!leave_begin_at(name[room % HUNG], leave_room_of(room), "D"))
            leave_wrong("a delegation is refused");
        leave_event_of(room, "joined", "");
    }
    leave_until(60000);
    for (unsigned i = 0; i < WELL; i++)
        alive += job_find(sl_str(leave_room_of(i)), SL("I1")) != NULL;
    row("7 silent homeservers: the 8th one's jobs live", alive == WELL
        && job_connected_cnt() == WELL && lv.restarts >= WELL * 7,
        "%u alive, %lld connected, %u restarts", alive,
        (long long)job_connected_cnt(), lv.restarts);
    row_str("7 silent homeservers: nothing is left", sl_str(leave_left()),
        "");
    /* the SFU hangs, the homeserver is well */
    leave_reset();
    cfg.log_level = 'e';
    lv.timeout_ms = 18000;
    strcpy(lv.script[0], "hang");
    leave_many(MANY, true);
    leave_until(60000);
    row("a silent SFU: no job ends", job_connected_cnt() == MANY
        && lv.restarts >= MANY * 4 && lv.sends == 0, "%lld connected, %u "
        "restarts, %u sends", (long long)job_connected_cnt(), lv.restarts,
        lv.sends);
    row_str("a silent SFU: nothing is left", sl_str(leave_left()), "");
    /* all are looked up, in vain; one leaves */
    leave_reset();
    cfg.log_level = 'e';
    lv.is_quiet = true;
    strcpy(lv.script[0], "hang");
    leave_many(2000, true);
    leave_until(300000);
    leave_event_of(7, "lost", "3");
    leave_until(310000);
    unsigned before = lv.sends;
    leave_event_of(7, "left", "1");
    leave_until(312000);
    row("a silent SFU, all in doubt: who leaves is sent", before == 0
        && lv.sends == 1 && job_connected_cnt() == 1999, "%u, %u sends, "
        "%lld connected", before, lv.sends,
        (long long)job_connected_cnt());
    row_str("all in doubt: nothing is left", sl_str(leave_left()), "");
}

/* ---- from the request to the last answer ---- */

static void leave_web_reset(void)
{
    leave_reset();
    site_tab[0] = (struct site){ .host = "10.0.0.9", .port = 80,
        .reply = { "HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\n"
        "{\"sub\":\"@u:a.org\"}" } };
    if (!cfg_base(SL("http://10.0.0.9"), true, &cfg.fed[0].base))
        abort();
    lv.id[0] = 0;
}

static struct sock *leave_post_job(const char *timeout)
{
    char text[300], body[2000];
    snprintf(text, sizeof text, "{$R,$M,$T,\"delay_id\":\"syd_x\","
        "\"delay_timeout\":%s,\"delay_cs_api_url\":\"https://x\"}", timeout);
    body_fill(text, body, sizeof body);
    return exchange_post("/delegate_delayed_leave", body);
}

/* The token of a webhook's body, signed as LiveKit does. */
static const char *hook_token(const char *body, const char *secret)
{
    static char token[700];
    char claims[200], hash[45] = { 0 };
    uint8_t sum[32];
    br_hmac_key_context key;
    struct bb t = { (uint8_t *)token, 0, sizeof token - 1, false };
    struct bb text = { (uint8_t *)hash, 0, 44, false };
    sha256(sl_str(body), sum);
    b64_put(&text, b64_std, (sl){ sum, 32 });
    bb_byte(&text, '=');
    int n = snprintf(claims, sizeof claims, "{\"iss\":\"devkey\","
        "\"sha256\":\"%.44s\"}", hash);
    key_of(sl_str(secret), &key);
    jwt_sign(&t, &key, (sl){ (uint8_t *)claims, (size_t)n });
    token[t.len] = 0;
    return token;
}

/* Send a webhook to the listener, signed. */
static struct sock *leave_post_hook(const char *event, const char *more,
    const char *secret)
{
    static unsigned number;
    char body[600], head[1000];
    snprintf(body, sizeof body, "{\"event\":\"%s\",\"room\":"
        "{\"name\":\"%s\"},\"participant\":{\"identity\":\"@u:a.org:D\","
        "\"sid\":\"S1\"%s},\"id\":\"EV_%u\"}", event, lv.room, more,
        number++);
    struct sock *s = client_new(false);
    snprintf(head, sizeof head, "POST /sfu_webhook HTTP/1.1\r\nHost: x\r\n"
        "Authorization: %s\r\nContent-Type: application/webhook+json\r\n"
        "Content-Length: %zu\r\n\r\n", hook_token(body, secret),
        strlen(body));
    sock_say(s, head);
    sock_say(s, body);
    return s;
}

/* The one job, as the request made it; its room becomes the webhooks'. */
static const struct job *leave_web_job(void)
{
    for (size_t i = 0; i < job_top; i++)
        if (job_pool[i].state != J_FREE) {
            snprintf(lv.room, sizeof lv.room, "%.*s", HASH_NAME_LEN,
                job_pool[i].alias);
            return &job_pool[i];
        }
    return NULL;
}

static int leave_status(const struct sock *s)
{
    int status = 0;
    return sscanf((const char *)s->out, "HTTP/1.1 %d", &status) == 1
        ? status : 0;
}

static void leave_web_rows(void)
{
    static const struct { const char *timeout; int64_t want; } clamp[] = {
        { "1", 1000 }, { "999", 1000 }, { "1000", 1000 }, { "1001", 1001 },
        { "3600000", 3600000 }, { "86400000", 86400000 },
        { "86400001", 86400000 }, { "9223372036854775807", 86400000 },
        { "9223372036854775808", 0 }, { "-1", 0 }, { "0", 0 }, { "1.5", 0 },
    };
    for (size_t i = 0; i < COUNT_OF(clamp); i++) {
        leave_web_reset();
        struct sock *s = leave_post_job(clamp[i].timeout);
        net_run(net_never, 100);
        const struct job *j = leave_web_job();
        row(name_of("T of %s ms", clamp[i].timeout), clamp[i].want
            ? j && leave_status(s) == 200 && j->timeout_ms == clamp[i].want
            && j->wait_end - world_ms <= LIM_WAIT_MS
            : !j && leave_status(s) == 400, "%d, %lld", leave_status(s),
            j ? (long long)j->timeout_ms : 0);
        s->is_eof = true;
        row_str(name_of("T of %s ms: nothing is left", clamp[i].timeout),
            sl_str(leave_left()), "");
    }
    /* a life; a stranger's webhooks and repeated ones do nothing */
    leave_web_reset();
    struct sock *s[7];
    s[0] = leave_post_job("100000");
    net_run(net_never, 100);
    const struct job *j = leave_web_job();
    s[1] = leave_post_hook("participant_joined", "", "another");
    net_run(net_never, 100);
    bool ok = j && leave_status(s[0]) == 200 && leave_status(s[1]) == 200
        && j->state == J_WAITING && log_has("event=WEBHOOK_BAD ");
    row("a stranger's webhook", ok, "%d %d %s", leave_status(s[0]),
        leave_status(s[1]), log_buf);
    s[2] = leave_post_hook("participant_joined", "", "devsecret");
    net_run(net_never, 100);
    ok = j && leave_status(s[2]) == 200 && j->state == J_CONNECTED
        && lv.restarts == 1;
    row("the SFU's webhook", ok, "%d, state %d", leave_status(s[2]),
        j ? j->state : -1);
    s[3] = leave_post_hook("participant_left",
        ",\"disconnectReason\":\"CLIENT_INITIATED\"", "devsecret");
    net_run(net_never, 100);
    row("a life", lv.sends == 1 && job_top == 0
        && leave_status(s[3]) == 200, "%u sends", lv.sends);
    for (int i = 0; i < 4; i++)
        s[i]->is_eof = true;
    row_str("a life: nothing is left", sl_str(leave_left()), "");
}

/* Each system call of a life fails in turn: who was told 200 is told to
 * leave in the end. */
static void leave_faults(void)
{
    static const int err[] = { 0, EINTR, EAGAIN, ECONNRESET, ENOBUFS,
        EMFILE };
    static const char *const err_name[] = { "short", "EINTR", "EAGAIN",
        "ECONNRESET", "ENOBUFS", "EMFILE" };
    long calls = 0;
    for (size_t e = 0; e < COUNT_OF(err); e++) {
        unsigned sent = 0, refused = 0, odd = 0;
        for (long at = -1; at < calls || at < 0; at++) {
            struct sock *s[3];
            leave_web_reset();
            fault_seen = 0;
            fault_at = at < 0 ? FAULT_NONE : at;
            fault_errno = err[e];
            s[0] = leave_post_job("100000");
            net_run(net_never, 20000);
            bool accepted = leave_status(s[0]) == 200;
            (void)leave_web_job();
            strcpy(lv.script[1], "present");     /* by the second identity */
            s[1] = leave_post_hook("participant_joined", "", "devsecret");
            net_run(net_never, 62000);
            strcpy(lv.script[1], "absent");
            s[2] = leave_post_hook("participant_left", "", "devsecret");
            net_run(net_never, 200000);
            if (at < 0)
                calls = fault_seen;
            fault_at = FAULT_NONE;
            for (int i = 0; i < 3; i++)
                s[i]->is_eof = true;
            net_run(net_never, 1000);
            if (world_client_cnt) {        /* accept itself failed */
                world_client[0]->used = false;
                world_client_cnt = 0;
            }
            bool gone = job_top == 0;
            const char *left = leave_left();
            bool is_odd = !gone || left[0] || lv.sends < accepted;
            if (is_odd && odd++ < 3)
                row(name_of("life: call %ld of %ld: %s", at, calls,
                    err_name[e]), false, "%d, %u restarts, %u sends%s%s",
                    leave_status(s[0]), lv.restarts, lv.sends,
                    gone ? "" : ", a job is left", left);
            sent += lv.sends == 1;
            refused += !accepted;
        }
        row(name_of("life: %ld calls fail in turn: %s", calls, err_name[e]),
            odd == 0 && sent + refused == (unsigned)calls + 1 && sent > 0
            && ((err[e] != EINTR && err[e] != 0) || refused == 0),
            "%u sent, %u refused, %u odd", sent, refused, odd);
    }
}

/* GetParticipant's body; lengths over 127 take two bytes. */
static void leave_wire_rows(void)
{
    static const size_t len[] = { 1, 43, 127, 128, 129, 255, 256 };
    for (size_t i = 0; i < COUNT_OF(len); i++) {
        uint8_t id[256], out[320], want[320];
        struct bb b = BB(out), w = BB(want);
        memset(id, 'i', sizeof id);
        pb_participant(&b, sl_str(leave_room), (sl){ id, len[i] });
        bb_byte(&w, 0x0a);
        bb_byte(&w, HASH_NAME_LEN);
        bb_str(&w, leave_room);
        bb_byte(&w, 0x12);
        if (len[i] >= 128)
            bb_byte(&w, (uint8_t)(len[i] | 0x80));
        bb_byte(&w, (uint8_t)(len[i] >= 128 ? len[i] >> 7 : len[i]));
        bb_put(&w, (sl){ id, len[i] });
        row_text(name_of("an identity of %zu bytes", len[i]),
            work_done(&b), (sl){ want, w.len });
    }
}

static void test_jobs(void)
{
    leave_wire_rows();
    leave_connect_rows();
    leave_restart_rows();
    leave_send_rows();
    leave_reply_rows();
    leave_matrix();
    leave_back_rows();
    leave_queue_rows();
    leave_silence_rows();
    leave_api_rows();
    leave_cap_rows();
    leave_web_rows();
    leave_faults();
    leave_day_rows();
    leave_crowd();
    leave_bulkheads();
    world_is_random = true;
}
