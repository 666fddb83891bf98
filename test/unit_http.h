/* Section 08, the intake of 17, and the routes of 22. */

/* Show a head's bytes as they arrive: `cut` first, then `more` at a time.
 * The buffer moves between the calls, as a reader's may. */
static int head_run(sl in, bool is_reply, size_t cut, size_t more,
    struct h1_head *h)
{
    memset(h, 0, sizeof *h);
    for (;; cut = cut + more < in.len ? cut + more : in.len) {
        int n = h1_parse_head((sl){ guarded(in.p, cut), cut }, is_reply, h);
        if (n != 0 || cut == in.len)
            return n;
    }
}

/* What a head says, as text; an event when it is refused. */
static sl head_text(sl in, bool is_reply, int n, const struct h1_head *h)
{
    static uint8_t text[2][2048];
    static unsigned turn;
    uint8_t *out = text[turn++ % 2];
    struct bb b = { out, 0, sizeof text[0], false };
    struct h1_body body;
    if (n < 0) {
        bb_str(&b, ev_label(n));
        return work_done(&b);
    }
    if (n == 0)
        return SL("more");
    sl head = { guarded(in.p, (size_t)n), (size_t)n };
    int err = h1_framing(head, h, is_reply, &body);
    if (err) {
        bb_str(&b, ev_label(err));
        return work_done(&b);
    }
    if (is_reply) {
        bb_u64(&b, h->status);
    } else {
        bb_put(&b, h1_slice(head, h->method));
        bb_byte(&b, ' ');
        bb_put(&b, h1_slice(head, h->target));
    }
    bb_str(&b, " 1.");
    bb_u64(&b, h->minor);
    static const char *const kind[] = { " none", " length ", " chunked",
        " close" };
    bb_str(&b, kind[body.kind]);
    if (body.kind == H1_LENGTH)
        bb_u64(&b, body.len);
    bb_str(&b, h1_keeps(h) ? " keep " : " end ");
    bb_u64(&b, (uint64_t)n);
    return work_done(&b);
}

/* what it says, `+N` for the head's length | bytes */
static void head_row(struct vec *v, bool is_reply)
{
    struct h1_head h;
    sl in = vec_sl(v, 1), want = vec_sl(v, 0);
    char full[300];
    const char *name = vec_name(v, vec_str(v, 1));
    int n = head_run(in, is_reply, in.len, 1, &h);
    sl got = head_text(in, is_reply, n, &h);
    if (n > 0 && sl_find(want, ' ') < want.len) {
        snprintf(full, sizeof full, "%s %d", vec_str(v, 0), n);
        want = sl_str(full);
    }
    if (!row_text(name, got, want))
        return;
    struct h1_head h1;
    int n1 = head_run(in, is_reply, 0, 1, &h1);
    bool same = n1 == n && sl_eq(head_text(in, is_reply, n1, &h1), got);
    size_t stride = in.len > 1500 ? 61 : 1;
    for (size_t cut = 0; cut <= in.len && same; cut += stride) {
        n1 = head_run(in, is_reply, cut, in.len, &h1);
        same &= n1 == n && memcmp(&h, &h1, n > 0 ? sizeof h : 1) == 0;
    }
    row(vec_name(v, "per byte and at every split"), same, "%s",
        ev_label(n1));
    /* what follows the head is none of its business */
    if (n > 0 && in.len < 4000) {
        struct bb b = work_bb();
        bb_put(&b, in);
        bb_str(&b, "\xff\n\rGET");
        n1 = head_run(work_done(&b), is_reply, b.len, 1, &h1);
        row(vec_name(v, "with bytes behind it"), n1 == n, "%d, want %d",
            n1, n);
    }
}

static void request_row(struct vec *v)
{
    head_row(v, false);
}

static void reply_row(struct vec *v)
{
    head_row(v, true);
}

/* Every byte at places of a head: how many are taken. */
static void head_bytes(void)
{
    static const struct { const char *name, *form; unsigned want; } tab[] = {
        /* want: bytes with which the head is complete and well framed */
        { "in the method", "G_T / HTTP/1.1\r\nHost: a\r\n\r\n", 77 },
        { "in the target", "GET /a_b HTTP/1.1\r\nHost: a\r\n\r\n", 93 },
        { "in a field name", "GET / HTTP/1.1\r\nHost: a\r\nX_: b\r\n\r\n",
          78 },
        { "in a field value", "GET / HTTP/1.1\r\nHost: a\r\nX: b_c\r\n\r\n",
          224 },
        { "behind a field name", "GET / HTTP/1.1\r\nHost: a\r\nX_b\r\n\r\n",
          1 },
        { "in a host", "GET / HTTP/1.1\r\nHost: a_b\r\n\r\n", 65 },
        { "in a Content-Length",
          "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1_\r\n\r\n", 12 },
        { "as minor version", "GET / HTTP/1._\r\nHost: a\r\n\r\n", 10 },
        { "as major version", "GET / HTTP/_.1\r\nHost: a\r\n\r\n", 1 },
        { "in the HTTP word", "GET / H_TP/1.1\r\nHost: a\r\n\r\n", 1 },
        { "between the words", "GET_/ HTTP/1.1\r\nHost: a\r\n\r\n", 1 },
        { "for the first CR", "GET / HTTP/1.1_\nHost: a\r\n\r\n", 1 },
        { "for the first LF", "GET / HTTP/1.1\r_Host: a\r\n\r\n", 1 },
        { "for the last LF", "GET / HTTP/1.1\r\nHost: a\r\n\r_", 1 },
        { "before a field", "GET / HTTP/1.1\r\n_Host: a\r\n\r\n", 0 },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        unsigned cnt = 0;
        size_t len = strlen(tab[i].form);
        size_t at = (size_t)(strchr(tab[i].form, '_') - tab[i].form);
        for (int c = 0; c < 256; c++) {
            char text[128];
            struct h1_head h;
            struct h1_body body;
            memcpy(text, tab[i].form, len);
            text[at] = (char)c;
            int n = head_run((sl){ (uint8_t *)text, len }, false, len, 1, &h);
            cnt += n == (int)len && h1_framing((sl){ guarded(text, len),
                len }, &h, false, &body) == 0;
        }
        row_int(name_of("bytes %s", tab[i].name), cnt, tab[i].want);
    }
}

/* The caps of SECURITY section 4, met and passed by one. */
static void head_limits(void)
{
    for (int over = 0; over < 2; over++) {
        struct h1_head h;
        struct bb b = work_bb();
        /* the cap counts the line without its CRLF */
        bb_str(&b, "GET /");
        while (b.len < LIM_LINE_LEN - 10U + (unsigned)over)
            bb_byte(&b, 'a');
        bb_str(&b, " HTTP/1.1\r\nHost: a\r\n\r\n");
        int n = head_run(work_done(&b), false, b.len, 1, &h);
        row_ev(name_of("request line of %d bytes", LIM_LINE_LEN + over - 1),
            n > 0 ? 0 : n, over ? -EV_H1_LINE_LONG : 0);
        for (int is_reply = 0; is_reply < 2; is_reply++) {
            int cap = is_reply ? LIM_REPLY_FIELDS : LIM_FIELD_CNT;
            b = work_bb();
            bb_str(&b, is_reply ? "HTTP/1.1 200 OK\r\n"
                : "GET / HTTP/1.1\r\nHost: a\r\n");
            for (int i = !is_reply; i < cap + over; i++)
                bb_str(&b, "X: y\r\n");
            bb_str(&b, "\r\n");
            n = head_run(work_done(&b), is_reply, b.len, 1, &h);
            row_ev(name_of("%d fields of a %s", cap + over,
                is_reply ? "reply" : "request"), n > 0 ? 0 : n,
                over ? -EV_HEAD_LIMIT : 0);
        }
    }
    /* wherever the last line ends, no head longer than its cap passes, and
     * none is waited for in vain */
    for (int is_reply = 0; is_reply < 2; is_reply++) {
        size_t cap = is_reply ? LIM_REPLY_HEAD : LIM_HEAD_LEN;
        unsigned passed_cnt = 0, waiting = 0, refused = 0;
        for (size_t end = cap - 40; end < cap + 8; end++) {
            struct h1_head h;
            struct bb b = work_bb();
            bb_str(&b, is_reply ? "HTTP/1.1 200 OK\r\n"
                : "GET / HTTP/1.1\r\nHost: a\r\n");
            while (b.len + 600 < end)
                bb_str(&b, "X-Filler: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
                    "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
                    "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
                    "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
                    "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
                    "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
                    "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
                    "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
                    "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
                    "xxxxxxxxxxxxxxxxxxxxxxxxxxxx\r\n");
            bb_str(&b, "Y: ");
            while (b.len < end)
                bb_byte(&b, 'y');
            bb_str(&b, "\r\n");         /* ends at end + 2 */
            size_t line_end = b.len;
            while (b.len < cap + 1500)
                bb_str(&b, "Z: zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz"
                    "zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz\r\n");
            bb_str(&b, "\r\n");
            int n = head_run(work_done(&b), is_reply, b.len, 1, &h);
            passed_cnt += n > 0;
            waiting += n == 0;
            refused += n == -EV_HEAD_LIMIT;
            /* cut there: a last line that just fits, then nothing */
            b.len = line_end;
            bb_str(&b, "\r\n");
            n = head_run(work_done(&b), is_reply, b.len, 1, &h);
            if (n > (int)cap + 1)
                passed_cnt++;
        }
        row(name_of("no %s head over %zu bytes", is_reply ? "reply"
            : "request", cap), passed_cnt == 0 && waiting == 0
            && refused == 48, "%u pass, %u are waited for, %u refused",
            passed_cnt, waiting, refused);
    }
}

/* Heads with a few bytes changed: the same verdict at any split, and never
 * more than there is. */
static void head_noise(bool is_reply)
{
    static const char *const seed[] = {
        "POST /get_token HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n"
        "Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: "
        "chunked\r\nLocation: https://a/\r\nExpires: 0\r\n\r\n" };
    static const char likely[] = "\r\n: \t,;0/1.HTPX\x7f\x80";
    unsigned differ = 0, beyond = 0, taken = 0;
    for (int i = 0; i < 20000; i++) {
        char text[300];
        struct h1_head a, b;
        size_t len = strlen(seed[is_reply]);
        memcpy(text, seed[is_reply], len);
        for (unsigned k = 1 + dice() % 3; k > 0; k--) {
            size_t at = dice() % len;
            if (dice() % 3 == 0) {
                memmove(text + at, text + at + 1, len - at - 1);
                len--;
            } else {
                text[at] = dice() % 4 ? likely[dice() % sizeof likely]
                    : (char)dice();
            }
        }
        sl in = { (uint8_t *)text, len };
        int n = head_run(in, is_reply, len, 1, &a);
        int m = head_run(in, is_reply, dice() % len, 1 + dice() % 5, &b);
        differ += n != m || (n > 0 && memcmp(&a, &b, sizeof a) != 0);
        beyond += n > (int)len;
        taken += n > 0;
    }
    row(name_of("20,000 %s with noise", is_reply ? "replies" : "requests"),
        differ == 0 && beyond == 0 && taken > 500 && taken < 19500,
        "%u differ, %u beyond, %u taken", differ, beyond, taken);
}

static void test_http_head(void)
{
    vec_each("requests.txt", request_row);
    vec_each("replies.txt", reply_row);
    head_bytes();
    head_limits();
    head_noise(false);
    head_noise(true);
    /* a prefix never decides as complete */
    static const char whole[] = "\r\nPOST /get_token HTTP/1.1\r\n"
        "Host: example.org\r\nContent-Length: 2\r\n\r\n";
    unsigned early = 0;
    for (size_t n = 0; n < sizeof whole - 1; n++) {
        struct h1_head h;
        early += head_run((sl){ (const uint8_t *)whole, n }, false, n, 1, &h)
            != 0;
    }
    row_int("a cut head is waited for", early, 0);
    struct h1_head h;
    row_ev("a line that no LF ends, shown per byte", head_run(
        (sl){ memset(work_buf, 'a', 5000), 5000 }, false, 0, 1, &h),
        -EV_H1_LINE_LONG);
}

/* event or what | Content-Length lines | Transfer-Encoding lines: framing
 * by itself, on top of the vectors: all pairs of values. */
static void test_http_framing(void)
{
    static const char *const length[] = { NULL, "0", "5", "5, 5", "-1",
        "+5", "0x5", "", "9223372036854775807", "9223372036854775808",
        "99999999999999999999", "5 5", "five", "5;" };
    static const bool length_ok[] = { true, true, true, [8] = true,
        [13] = false };
    static const char *const coding[] = { NULL, "chunked", "Chunked",
        "identity", "gzip", "gzip, chunked", "chunked, gzip",
        "chunked, chunked", "chunked,", ",chunked", "", "x;y, chunked",
        "chunked;q=1", "\"chunked\"", "chunked chunked", "gzip,chunked" };
    static const int coding_want[] = { 0, 0, 0, -EV_H1_CODING,
        -EV_H1_CODING, -EV_H1_CODING_UNKNOWN, -EV_H1_CODING, -EV_H1_CODING,
        -EV_H1_CODING, -EV_H1_CODING, -EV_H1_CODING, -EV_H1_CODING,
        -EV_H1_CODING, -EV_H1_CODING, -EV_H1_CODING, -EV_H1_CODING_UNKNOWN };
    for (int is_reply = 0; is_reply < 2; is_reply++)
        for (int minor = 0; minor < 2; minor++)
            for (size_t l = 0; l < COUNT_OF(length); l++)
                for (size_t t = 0; t < COUNT_OF(coding); t++) {
                    char text[400];
                    struct h1_head h;
                    struct h1_body body;
                    int at = is_reply ? sprintf(text, "HTTP/1.%d 200 OK\r\n",
                        minor) : sprintf(text,
                        "POST / HTTP/1.%d\r\nHost: a\r\n", minor);
                    if (length[l])
                        at += sprintf(text + at, "Content-Length: %s\r\n",
                            length[l]);
                    if (coding[t])
                        at += sprintf(text + at,
                            "Transfer-Encoding: %s\r\n", coding[t]);
                    at += sprintf(text + at, "\r\n");
                    sl in = { (uint8_t *)text, (size_t)at };
                    int n = head_run(in, is_reply, in.len, 1, &h);
                    int got = n <= 0 ? -1 : h1_framing(
                        (sl){ guarded(text, in.len), in.len }, &h, is_reply,
                        &body);
                    int want = coding[t] && length[l] ? -EV_H1_LENGTH
                        : coding[t] && !minor ? -EV_H1_CODING
                        : coding[t] ? coding_want[t]
                        : length_ok[l] ? 0 : -EV_H1_LENGTH;
                    enum h1_kind kind = coding[t] ? H1_CHUNKED : length[l]
                        ? H1_LENGTH : is_reply ? H1_CLOSE : H1_NONE;
                    row(name_of("%s 1.%d, length `%s`, coding `%s`",
                                is_reply ? "reply" : "request", minor,
                                length[l] ? length[l] : "-",
                                coding[t] ? coding[t] : "-"),
                        got == want && (got || body.kind == kind),
                        "%s, kind %d", ev_label(got), body.kind);
                }
}

/* Decode a chunked body given in pieces; at most cap bytes to out. Returns
 * the bytes consumed, or an event. */
static int chunk_run(sl in, size_t cut, size_t more, struct bb *out,
    bool *ended)
{
    struct h1_chunk c = { 0 };
    size_t at = 0;
    out->len = 0;
    *ended = false;
    for (;; cut = cut + more < in.len ? cut + more : in.len) {
        while (at < cut) {
            sl data;
            int n = h1_parse_chunk((sl){ guarded(in.p + at, cut - at),
                cut - at }, &c, &data);
            if (n < 0)
                return n;
            bb_put(out, data);
            at += (size_t)n;
            if (c.state == CHUNK_END)
                break;
            if (n == 0)
                return -1;             /* would spin */
        }
        *ended = c.state == CHUNK_END;
        if (*ended || cut == in.len)
            return (int)at;
    }
}

static uint8_t chunk_out[2][VEC_LEN];

/* end, more or an event | encoded | decoded | bytes left over */
static void chunk_row(struct vec *v)
{
    struct bb a = { chunk_out[0], 0, VEC_LEN, false };
    struct bb b = { chunk_out[1], 0, VEC_LEN, false };
    bool end_a, end_b;
    sl in = vec_sl(v, 1);
    const char *want = vec_str(v, 0);
    int got = chunk_run(in, in.len, 1, &a, &end_a);
    bool is_event = strcmp(want, "end") && strcmp(want, "more");
    const char *what = got < 0 ? ev_label(got) : end_a ? "end" : "more";
    if (!row(vec_name(v, vec_str(v, 1)), strcmp(what, want) == 0
             && (is_event || sl_eq(work_done(&a), vec_sl(v, 2)))
             && (!end_a || in.len - (size_t)got
                 == (size_t)atoi(vec_str(v, 3))),
             "%s, %zu bytes, %d taken", what, a.len, got))
        return;
    bool same = true;
    size_t stride = in.len > 1500 ? 97 : 1;
    for (size_t cut = 0; cut <= in.len && same; cut += stride) {
        int n = chunk_run(in, cut, cut ? in.len : 1, &b, &end_b);
        same &= n == got && end_a == end_b
            && (n < 0 || sl_eq(work_done(&a), work_done(&b)));
    }
    row(vec_name(v, "per byte and at every split"), same, "differs");
}

static void chunk_noise(void)
{
    static const char seed[] = "5;a=b\r\nhello\r\n10\r\n0123456789abcdef"
        "\r\n0\r\nX: y\r\n\r\n";
    static const char likely[] = "\r\n;:0123fF \t\x7f";
    unsigned differ = 0, taken = 0;
    for (int i = 0; i < 20000; i++) {
        char text[200];
        struct bb a = { chunk_out[0], 0, VEC_LEN, false };
        struct bb b = { chunk_out[1], 0, VEC_LEN, false };
        bool end_a, end_b;
        memcpy(text, seed, sizeof seed);
        for (unsigned k = 1 + dice() % 2; k > 0; k--)
            text[dice() % (sizeof seed - 1)] = likely[dice()
                % sizeof likely];
        sl in = { (uint8_t *)text, sizeof seed - 1 };
        int n = chunk_run(in, in.len, 1, &a, &end_a);
        int m = chunk_run(in, dice() % in.len, 1 + dice() % 5, &b, &end_b);
        differ += n != m || (n >= 0 && (end_a != end_b
            || !sl_eq(work_done(&a), work_done(&b))));
        taken += n >= 0 && end_a;
    }
    row("20,000 chunked bodies with noise", differ == 0 && taken > 500
        && taken < 19500, "%u differ, %u taken", differ, taken);
}

static void test_chunked(void)
{
    vec_each("chunked.txt", chunk_row);
    chunk_noise();
    static const struct { const char *name, *form; unsigned want; } tab[] = {
        { "as a size", "_\r\n", 22 - 2 },      /* 0 needs a trailer */
        { "behind a size", "1_\r\nx\r\n0\r\n\r\n", 1 },
        { "in an extension", "1;a_b\r\nx\r\n0\r\n\r\n", 224 },
        { "as data", "1\r\n_\r\n0\r\n\r\n", 256 },
        { "behind data", "1\r\nx_\n0\r\n\r\n", 1 },
        { "as the last LF", "0\r\n\r_", 1 },
        { "in a trailer's name", "0\r\na_: c\r\n\r\n", 78 },
        { "in a trailer's value", "0\r\na: b_c\r\n\r\n", 224 },
    };
    for (size_t i = 1; i < COUNT_OF(tab); i++) {
        unsigned cnt = 0;
        size_t len = strlen(tab[i].form);
        size_t at = (size_t)(strchr(tab[i].form, '_') - tab[i].form);
        for (int c = 0; c < 256; c++) {
            char text[64];
            struct bb out = { chunk_out[0], 0, VEC_LEN, false };
            bool ended;
            memcpy(text, tab[i].form, len);
            text[at] = (char)c;
            int n = chunk_run((sl){ (uint8_t *)text, len }, len, 1, &out,
                &ended);
            cnt += n == (int)len && ended && out.len <= 1;
        }
        row_int(name_of("bytes %s", tab[i].name), cnt, tab[i].want);
    }
    unsigned sizes = 0;
    for (int c = 0; c < 256; c++) {
        uint8_t byte = (uint8_t)c;
        struct h1_chunk k = { 0 };
        sizes += h1_chunk_byte(&k, byte) == 0;
    }
    row_int("bytes as a size", sizes, 22);
    struct h1_chunk k = { 0 };
    sl data;
    int n = h1_parse_chunk(SL("ffffffff\r\nxy"), &k, &data);
    row("a chunk of 4 GB less one", n == 12 && data.len == 2
        && k.left == 0xfffffffdu, "%d, %zu, %u left", n, data.len, k.left);
}

/* ---- intake: bodies over a buffer ---- */

enum { INTAKE_CAP = 96 };

/* Feed `in` behind a head of `from` bytes, `more` at a time. The buffer
 * ends at the guard page. Returns 0 or an event; *rest what is left. */
static int intake_run(struct intake *t, sl in, size_t from, size_t more,
    sl *body, sl *rest)
{
    uint8_t *buf = guard_end - INTAKE_CAP;
    size_t len = from, at = 0;
    int err = 0;
    memset(buf, 'H', from);
    while (!t->is_done && !err && (at < in.len || len > from)) {
        size_t n = INTAKE_CAP - len < more ? INTAKE_CAP - len : more;
        n = in.len - at < n ? in.len - at : n;
        memcpy(buf + len, in.p + at, n);
        len += n;
        at += n;
        err = intake_take(t, buf, from, INTAKE_CAP, &len);
        if (!err && !t->is_done && n == 0)
            break;
    }
    *body = (sl){ intake_body(t, buf, from), t->len };
    size_t held = from + (t->big ? 0 : t->len);
    *rest = (sl){ buf + held, len - held };
    return err;
}

static void intake_rows(void)
{
    static const struct { const char *name; enum h1_kind kind;
        size_t len, limit, from, behind; int want; } tab[] = {
        { "none", H1_NONE, 0, 100, 10, 5, 0 },
        { "empty", H1_LENGTH, 0, 100, 10, 5, 0 },
        { "one byte", H1_LENGTH, 1, 100, 10, 0, 0 },
        { "fills its buffer", H1_LENGTH, 86, 1000, 10, 0, 0 },
        { "fills it but one", H1_LENGTH, 85, 1000, 10, 1, 0 },
        { "outgrows it by one", H1_LENGTH, 87, 1000, 10, 3, 0 },
        { "outgrows it", H1_LENGTH, 5000, 5000, 10, 7, 0 },
        { "no head", H1_LENGTH, 200, 1000, 0, 7, 0 },
        { "head fills all but one", H1_LENGTH, 50, 1000, 95, 0, 0 },
        { "at its limit", H1_LENGTH, 64, 64, 10, 7, 0 },
        { "over its limit", H1_LENGTH, 65, 64, 10, 0, -EV_BODY_LIMIT },
        { "largest", H1_LENGTH, LIM_BIG_LEN, LIM_BIG_LEN, 10, 9, 0 },
        { "largest and one", H1_LENGTH, LIM_BIG_LEN + 1, LIM_BIG_LEN, 10, 0,
          -EV_BODY_LIMIT },
        { "chunks", H1_CHUNKED, 40, 100, 10, 5, 0 },
        { "chunks outgrow it", H1_CHUNKED, 5000, 5000, 10, 5, 0 },
        { "chunks over the limit", H1_CHUNKED, 101, 100, 10, 0,
          -EV_BODY_LIMIT },
        { "chunks, largest", H1_CHUNKED, LIM_BIG_LEN, LIM_BIG_LEN, 10, 5,
          0 },
        { "to the end", H1_CLOSE, 50, 100, 10, 0, 0 },
        { "to the end, outgrows it", H1_CLOSE, 4000, 5000, 10, 0, 0 },
        { "to the end, over the limit", H1_CLOSE, 101, 100, 10, 0,
          -EV_BODY_LIMIT },
    };
    static uint8_t plain[LIM_BIG_LEN + 100], wire[4 * LIM_BIG_LEN];
    for (size_t i = 0; i < sizeof plain; i++)
        plain[i] = (uint8_t)(i * 7 + i / 251);
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        struct bb b = { wire, 0, sizeof wire, false };
        if (tab[i].kind == H1_CHUNKED) {
            for (size_t at = 0; at < tab[i].len; ) {
                char size[16];
                size_t n = at % 3 ? 11 : 4000;
                n = tab[i].len - at < n ? tab[i].len - at : n;
                snprintf(size, sizeof size, "%zx\r\n", n);
                bb_str(&b, size);
                bb_put(&b, (sl){ plain + at, n });
                bb_str(&b, "\r\n");
                at += n;
            }
            bb_str(&b, "0\r\n\r\n");
        } else {
            bb_put(&b, (sl){ plain, tab[i].len });
        }
        bb_put(&b, (sl){ (const uint8_t *)"GET /next", tab[i].behind });
        static const size_t step[] = { 1, 2, 3, 7, 16, 50, 95, 100000 };
        for (size_t k = 0; k < COUNT_OF(step); k++) {
            struct intake t;
            sl body, rest;
            intake_start(&t, (struct h1_body){ tab[i].kind,
                tab[i].kind == H1_LENGTH ? tab[i].len : 0 }, tab[i].limit);
            int err = intake_run(&t, work_done(&b), tab[i].from, step[k],
                &body, &rest);
            bool ok = err == tab[i].want;
            if (ok && !err)
                ok = sl_eq(body, (sl){ plain, tab[i].len })
                    && (t.is_done || tab[i].kind == H1_CLOSE)
                    && sl_starts(SL("GET /next"), rest)
                    && rest.len <= tab[i].behind
                    && *(guard_end - INTAKE_CAP) == (tab[i].from ? 'H'
                        : *(guard_end - INTAKE_CAP));
            row(name_of("%s, %zu at a time", tab[i].name, step[k]), ok,
                "%s, %zu bytes, rest %zu", ev_label(err), body.len,
                rest.len);
            big_free(&t.big);
        }
    }
}

static void test_intake(void)
{
    intake_rows();
    struct intake t;
    sl body, rest;
    memset(work_buf, 'x', 300);
    memset(big_used, true, sizeof big_used);
    intake_start(&t, (struct h1_body){ H1_LENGTH, 300 }, 1000);
    int err = intake_run(&t, (sl){ work_buf, 300 }, 10, 50, &body, &rest);
    row_ev("no big buffer is free", err, -EV_BODY_POOL);
    memset(big_used, false, sizeof big_used);
    intake_start(&t, (struct h1_body){ H1_CHUNKED, 0 }, 1000);
    err = intake_run(&t, SL("5\r\nhelloX"), 10, 50, &body, &rest);
    row_ev("a bad chunk", err, -EV_H1_CHUNK);
    unsigned used = 0;
    for (size_t i = 0; i < LIM_BIG_CNT; i++)
        used += big_used[i];
    row_int("big buffers left in use", used, 0);
}

/* ---- paths and routes ---- */

/* target | path | prefix | route, - for none */
static void route_row(struct vec *v)
{
    sl target = vec_sl(v, 0);
    sl path = h1_path((sl){ guarded(target.p, target.len), target.len });
    static uint8_t keep[8192];
    memcpy(keep, path.p, path.len);
    path.p = keep;
    row_text(vec_name(v, "path"), path, vec_sl(v, 1));
    cfg.prefix = vec_sl(v, 2);
    const struct route *r = route_find((sl){ guarded(path.p, path.len),
        path.len }, false);
    row_str(vec_name(v, vec_str(v, 0)), r ? sl_str(r->path) : SL("-"),
        vec_str(v, 3));
    cfg.prefix = (sl){ NULL, 0 };
}

static void test_routes(void)
{
    vec_each("routes.txt", route_row);
    row("metrics are on their own listener", !route_find(SL("/metrics"),
        false) && route_find(SL("/metrics"), true)
        && !route_find(SL("/healthz"), true), "wrong");
    struct bb b = work_bb();
    while (b.len < 4096)
        bb_byte(&b, '/');
    bb_str(&b, "healthz");
    row("4,096 slashes", !b.over && route_find((sl){ guarded(work_buf,
        b.len), b.len }, false) != NULL, "not found");
}
