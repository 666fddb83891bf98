/* Redis: sections 10, 13 and 20, and what is stored (21). */

/* ---- RESP2 ---- */

/* What the front of the bytes is, as text. */
static sl resp_text(sl in, size_t cap, int n, const struct rsp *e)
{
    static uint8_t text[4][3000];
    static unsigned turn;
    struct bb b = { text[turn++ % 4], 0, sizeof text[0], false };
    static const char *const word[] = { "simple ", "error ", "int ",
        "bulk ", "nil", "array " };
    (void)cap;
    if (n < 0)
        bb_str(&b, ev_label(n));
    else if (n == 0)
        bb_str(&b, "more");
    if (n <= 0)
        return work_done(&b);
    bb_str(&b, e->type == RSP_BULK && !e->text.p ? "long " : word[e->type]);
    if (e->type == RSP_INT || e->type == RSP_ARRAY
        || (e->type == RSP_BULK && !e->text.p))
        bb_i64(&b, e->n);
    else if (e->type == RSP_BULK && e->text.len != (size_t)e->n)
        bb_str(&b, "another length");
    if (e->type != RSP_INT && e->text.len)
        bb_put(&b, e->text);
    if ((size_t)n != in.len) {
        bb_byte(&b, '|');
        bb_put(&b, sl_skip(in, (size_t)n));
    }
    return work_done(&b);
}

/* Read with the bytes [0, cut) here, then `more` at a time. */
static sl resp_run(sl in, size_t cap, size_t cut, size_t more)
{
    struct rsp e;
    for (;; cut = cut + more < in.len ? cut + more : in.len) {
        sl here = { guarded(in.p, cut), cut };
        int n = rsp_parse(here, cap, &e);
        if (n > 0 && cut < in.len) {     /* complete before the rest came */
            sl got = resp_text(here, cap, n, &e);
            struct bb b = { (uint8_t *)(uintptr_t)got.p, got.len, 3000,
                false };
            if ((size_t)n == cut)
                bb_byte(&b, '|');
            bb_put(&b, (sl){ in.p + cut, in.len - cut });
            return work_done(&b);
        }
        if (n != 0 || cut == in.len)
            return resp_text(here, cap, n, &e);
    }
}

static char resp_line[3][1100];

static void test_resp(void)
{
    static const struct { const char *in, *want; } tab[] = {
        { "+OK\r\n", "simple OK" }, { "+\r\n", "simple " },
        { "-ERR no\r\n", "error ERR no" }, { "-\r\n", "error " },
        { ":0\r\n", "int 0" }, { ":-7\r\n", "int -7" },
        { ":9223372036854775807\r\n", "int 9223372036854775807" },
        { ":9223372036854775808\r\n", "REDIS_PROTO" },
        { ":-9223372036854775808\r\n", "REDIS_PROTO" },
        { ":\r\n", "REDIS_PROTO" }, { ":-\r\n", "REDIS_PROTO" },
        { ":--1\r\n", "REDIS_PROTO" }, { ":+1\r\n", "REDIS_PROTO" },
        { ": 1\r\n", "REDIS_PROTO" }, { ":1 \r\n", "REDIS_PROTO" },
        { ":1.5\r\n", "REDIS_PROTO" }, { ":0x1\r\n", "REDIS_PROTO" },
        { "$0\r\n\r\n", "bulk " }, { "$3\r\nabc\r\n", "bulk abc" },
        { "$2\r\n\r\n\r\n", "bulk \r\n" }, { "$-1\r\n", "nil" },
        { "$-2\r\n", "REDIS_PROTO" }, { "$\r\n\r\n", "REDIS_PROTO" },
        { "$x\r\n", "REDIS_PROTO" }, { "$3\r\nabcd\r\n", "REDIS_PROTO" },
        { "$3\r\nabc\n\r", "REDIS_PROTO" }, { "$3\r\nabc\rx", "REDIS_PROTO" },
        { "$2147483647\r\n", "long 2147483647" },
        { "$2147483648\r\n", "REDIS_PROTO" },
        { "$99999999999999999999\r\n", "REDIS_PROTO" },
        { "$10\r\n", "more" }, { "$10\r\n0123456789", "more" },
        { "$10\r\n0123456789\r", "more" },
        { "$10\r\n0123456789\r\n", "bulk 0123456789" },
        { "$11\r\n", "long 11" }, { "$11\r\n0123", "long 11|0123" },
        { "*0\r\n", "array 0" }, { "*3\r\n", "array 3" },
        { "*3\r\n:1\r\n", "array 3|:1\r\n" }, { "*-1\r\n", "nil" },
        { "*-2\r\n", "REDIS_PROTO" }, { "*\r\n", "REDIS_PROTO" },
        { "*2147483648\r\n", "REDIS_PROTO" }, { "*1x\r\n", "REDIS_PROTO" },
        { "+OK\r\n+OK\r\n", "simple OK|+OK\r\n" },
        { "$1\r\na\r\n$1\r\nb\r\n", "bulk a|$1\r\nb\r\n" },
        { "+OK", "more" }, { "+OK\r", "more" }, { "", "more" },
        { "+", "more" }, { "$", "more" }, { "$3\r\nab", "more" },
        { "+OK\n", "REDIS_PROTO" }, { "\n", "REDIS_PROTO" },
        { "\r\n", "REDIS_PROTO" }, { "+O\rK\r\n", "simple O\rK" },
        { "OK\r\n", "REDIS_PROTO" }, { "_\r\n", "REDIS_PROTO" },
        { "#t\r\n", "REDIS_PROTO" }, { ",1.5\r\n", "REDIS_PROTO" },
        { "%1\r\n", "REDIS_PROTO" }, { "~1\r\n", "REDIS_PROTO" },
        { ">1\r\n", "REDIS_PROTO" }, { "(1\r\n", "REDIS_PROTO" },
        { "=4\r\ntxt:\r\n", "REDIS_PROTO" }, { "!3\r\nERR\r\n",
          "REDIS_PROTO" },
        { resp_line[0], "REDIS_PROTO" }, { resp_line[2], "REDIS_PROTO" },
    };
    memset(resp_line, 'x', sizeof resp_line);
    resp_line[0][0] = resp_line[1][0] = resp_line[2][0] = '+';
    strcpy(resp_line[0] + LIM_REDIS_LINE - 1, "\r\n");
    strcpy(resp_line[1] + LIM_REDIS_LINE - 2, "\r\n");
    resp_line[2][LIM_REDIS_LINE + 1] = 0;
    enum { CAP = 10 };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        sl in = sl_str(tab[i].in);
        row_str(name_of("resp %.40s", tab[i].in), resp_run(in, CAP, in.len,
            1), tab[i].want);
        bool same = sl_eq(resp_run(in, CAP, 0, 1), sl_str(tab[i].want));
        for (size_t cut = 0; cut <= in.len && same; cut++)
            same = sl_eq(resp_run(in, CAP, cut, in.len),
                sl_str(tab[i].want));
        row(name_of("resp %.40s: per byte and at every split", tab[i].in),
            same, "differs");
    }
    sl in = sl_str(resp_line[1]);
    row("a line as long as may be", sl_starts(resp_run(in, CAP, 0, 1),
        SL("simple xxx")), "refused");
    /* damage is never read past its end; whatever is taken fits */
    static const char *const seed[] = { "*2\r\n$3\r\nabc\r\n:12\r\n",
        "$10\r\n0123456789\r\n", "-ERR x\r\n+OK\r\n", ":-15\r\n$-1\r\n" };
    bool fits = true;
    for (int k = 0; k < 200000; k++) {
        char text[40];
        const char *from = seed[dice() % COUNT_OF(seed)];
        size_t len = strlen(from), at = 0;
        memcpy(text, from, len);
        for (uint64_t n = dice() % 4; n < 4; n++)
            text[dice() % len] = "0123456789-+:$*\r\n a\xff"[dice() % 20];
        len = dice() % 4 ? len : dice() % len;
        for (;;) {
            struct rsp e;
            int n = rsp_parse((sl){ guarded(text + at, len - at), len - at },
                CAP, &e);
            fits &= n <= (int)(len - at);
            if (n <= 0)
                break;
            at += (size_t)n;
        }
    }
    row("200,000 damaged replies", fits, "too much taken");
    struct bb b = work_bb();
    rsp_put_head(&b, 4);
    rsp_put(&b, SL("HSET"));
    rsp_put(&b, SL(""));
    rsp_put(&b, SL("a\r\nb"));
    rsp_put(&b, SL("0123456789"));
    row_str("a command", work_done(&b), "*4\r\n$4\r\nHSET\r\n$0\r\n\r\n"
        "$4\r\na\r\nb\r\n$10\r\n0123456789\r\n");
}

/* ---- RFC 3339 ---- */

static void test_times(void)
{
    static const struct { const char *in; int64_t sec; uint32_t ns; } good[]
        = {
        { "1970-01-01T00:00:00Z", 0, 0 },
        { "2026-07-23T07:28:51.12345Z", 1784791731, 123450000 },
        { "2026-07-23T09:28:51.12345+02:00", 1784791731, 123450000 },
        { "2026-07-22T19:58:51.12345-11:30", 1784791731, 123450000 },
        { "2026-07-23T07:28:51+00:00", 1784791731, 0 },
        { "2026-07-23T07:28:51-00:00", 1784791731, 0 },
        { "2026-07-24T07:27:51+23:59", 1784791731, 0 },
        { "2026-07-22T07:29:51-23:59", 1784791731, 0 },
        { "2026-07-23T07:28:51.1Z", 1784791731, 100000000 },
        { "2026-07-23T07:28:51.000000001Z", 1784791731, 1 },
        { "2026-07-23T07:28:51.999999999Z", 1784791731, 999999999 },
        { "2026-07-23T07:28:51.1234567891Z", 1784791731, 123456789 },
        { "2026-07-23T07:28:51.123456789012Z", 1784791731, 123456789 },
        { "2026-07-23T07:28:51.000000000999Z", 1784791731, 0 },
        { "2026-07-23T07:28:51.0+02:00", 1784784531, 0 },
        { "2024-02-29T00:00:00Z", 1709164800, 0 },
        { "2000-02-29T23:59:59Z", 951868799, 0 },
        { "2024-12-31T23:59:60Z", 1735689600, 0 },
        { "1969-12-31T23:59:59Z", -1, 0 },
        { "0000-01-01T00:00:00Z", -62167219200, 0 },
        { "9999-12-31T23:59:59Z", 253402300799, 0 },
        { "0001-01-01T00:00:00Z", -62135596800, 0 },
    };
    static const char *const bad[] = { "", "2026", "2026-07-23",
        "2026-07-23T07:28:51", "2026-07-23t07:28:51Z",
        "2026-07-23T07:28:51z", "2026-07-23 07:28:51Z",
        "2026-07-23T07:28Z", "2026-07-23T07:28:51.Z",
        "2026-07-23T07:28:51,5Z", "2026-07-23T07:28:51.1",
        "2026-07-23T07:28:51.1 Z", "2026-07-23T07:28:51Z ",
        " 2026-07-23T07:28:51Z", "2026-07-23T07:28:51ZZ",
        "2026-07-23T07:28:51+0200", "2026-07-23T07:28:51+02",
        "2026-07-23T07:28:51+2:00", "2026-07-23T07:28:51+02:0",
        "2026-07-23T07:28:51+24:00", "2026-07-23T07:28:51+02:60",
        "2026-07-23T07:28:51 02:00", "2026-07-23T07:28:51+02-00",
        "2026-07-23T07:28:51+02:000", "2026-00-23T07:28:51Z",
        "2026-13-23T07:28:51Z", "2026-07-00T07:28:51Z",
        "2026-07-32T07:28:51Z", "2026-06-31T07:28:51Z",
        "2026-02-29T07:28:51Z", "2025-02-29T00:00:00Z",
        "1900-02-29T00:00:00Z", "2026-02-30T07:28:51Z",
        "2026-07-23T24:00:00Z", "2026-07-23T07:60:51Z",
        "2026-07-23T07:28:61Z", "26-07-23T07:28:51Z",
        "12026-07-23T07:28:51Z", "2026-7-23T07:28:51Z",
        "2026/07/23T07:28:51Z", "2026-07-23T07.28.51Z",
        "20a6-07-23T07:28:51Z", "2026-07-23T0x:28:51Z",
        "-026-07-23T07:28:51Z", "2026-07--1T07:28:51Z",
        "2026-07-23T07:28:51.12a45Z", "2026-07-23T07:28:51.-5Z" };
    int64_t sec;
    uint32_t ns;
    for (size_t i = 0; i < COUNT_OF(good); i++) {
        size_t len = strlen(good[i].in);
        bool ok = rfc3339_parse((sl){ guarded(good[i].in, len), len }, &sec,
            &ns);
        row(name_of("time %s", good[i].in), ok && sec == good[i].sec
            && ns == good[i].ns, "%d %lld %u", ok, (long long)sec, ns);
        for (size_t cut = 0; ok && cut < len; cut++)
            ok = !rfc3339_parse((sl){ guarded(good[i].in, cut), cut }, &sec,
                &ns);
        row(name_of("time %s cut short", good[i].in), ok, "taken");
    }
    for (size_t i = 0; i < COUNT_OF(bad); i++) {
        size_t len = strlen(bad[i]);
        row(name_of("no time: %s", bad[i]), !rfc3339_parse((sl){
            guarded(bad[i], len), len }, &sec, &ns), "%lld", (long long)sec);
    }
    /* every day of 400 years, and the days that are none */
    int64_t day = 0;
    bool same = true;
    for (int y = 1970; y < 2370; y++)
        for (int m = 1; m <= 12; m++)
            for (int d = 1; d <= 31; d++) {
                char text[80];
                struct civil c;
                int n = snprintf(text, sizeof text,
                    "%04d-%02d-%02dT12:34:56.5Z", y, m, d);
                static const int days[] = { 31, 28, 31, 30, 31, 30, 31, 31,
                    30, 31, 30, 31 };
                bool leap = (y % 4 == 0 && y % 100) || y % 400 == 0;
                bool is = d <= days[m - 1] + (m == 2 && leap);
                bool ok = rfc3339_parse((sl){ (uint8_t *)text, (size_t)n },
                    &sec, &ns);
                same &= ok == is;
                if (!is)
                    continue;
                same &= sec == day++ * 86400 + 45296 && ns == 500000000;
                c = civil_from(sec);
                same &= c.year == y && (int)c.month == m && (int)c.day == d;
            }
    row("400 years of days", same && day == 146097, "%lld days",
        (long long)day);
}

/* ---- records ---- */

#define ROOM_ "O8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3qSc"
#define ID_ "J+T45tGruxc+HrUOqJJlyQSV33m728Cme4+vt8/SWrU"
#define FIELD_ "[\"" ROOM_ "\",\"" ID_ "\"]"
#define PARAMS_(t, more) "{\"Params\":{\"DelayId\":\"syd_x\"," \
    "\"DelayTimeout\":" t ",\"ServerName\":\"example.com\"," \
    "\"LiveKitRoom\":\"" ROOM_ "\",\"LiveKitIdentity\":\"" ID_ "\"" more "}"
#define AT_(at) ",\"RestartedAt\":\"" at "\"}"
#define VALUE_(t, more, at) PARAMS_(t, more) AT_(at)
#define T_ "7200000000000"
#define WHEN_ "2026-07-23T07:28:51.12345Z"

/* What a record says, or what is wrong with it. */
static const char *record_text(sl field, sl value)
{
    static char text[2000];
    static uint8_t f[6000], v[6000];
    struct record r;
    memset(&r, 0x55, sizeof r);
    if (field.len > sizeof f || value.len > sizeof v)
        abort();
    /* decoded in place: the copies end before the guard page in turn */
    memcpy(f, field.p, field.len);
    memcpy(v, value.p, value.len);
    const char *why = rec_parse(f, field.len, guarded(v, value.len),
        value.len, &r);
    if (why)
        return why;
    snprintf(text, sizeof text, "%.*s %lld %.*s %lld.%09u %.*s %.*s %d",
        (int)r.delay_id.len, r.delay_id.p, (long long)r.timeout_ms,
        (int)r.server.len, r.server.p, (long long)r.restarted_s,
        r.restarted_ns, (int)r.identity2.len, r.identity2.p, (int)r.sid.len,
        r.sid.p, r.is_connected);
    if (r.delegated_ms)
        snprintf(text + strlen(text), 40, " %lld",
            (long long)r.delegated_ms);
    return sl_eq(r.alias, SL(ROOM_)) ? text : "another room";
}

static void test_records(void)
{
    static const char plain[] =
        "syd_x 7200000 example.com 1784791731.123450000   0";
    static const struct { const char *name, *field, *value, *want; } tab[] = {
        { "as written", FIELD_, VALUE_(T_, "", WHEN_), plain },
        { "another offset", FIELD_, VALUE_(T_, "",
          "2026-07-23T09:28:51.12345+02:00"), plain },
        { "no fraction, an unknown name", FIELD_, VALUE_(T_, ",\"Other\":1",
          "2026-07-23T07:28:51Z"),
          "syd_x 7200000 example.com 1784791731.000000000   0" },
        { "unknown names of every type", FIELD_, VALUE_(T_, ",\"a\":[{}],"
          "\"b\":{\"DelayId\":1},\"c\":null,\"d\":1.5e9,\"e\":true", WHEN_),
          plain },
        { "unknown names beside Params", FIELD_, PARAMS_(T_, "")
          ",\"DelayId\":\"x\",\"more\":[]" AT_(WHEN_), plain },
        { "another order", FIELD_, "{\"RestartedAt\":\"" WHEN_ "\","
          "\"Params\":{\"LiveKitIdentity\":\"" ID_ "\",\"LiveKitRoom\":\""
          ROOM_ "\",\"ServerName\":\"example.com\",\"DelayTimeout\":" T_
          ",\"DelayId\":\"syd_x\"}}", plain },
        { "blanks", " [ \"" ROOM_ "\" , \"" ID_ "\" ] ",
          " \n" VALUE_(T_, "", WHEN_) "\t ", plain },
        { "escapes", "[\"\\u004f" "8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3q"
          "Sc\",\"" ID_ "\"]", VALUE_(T_, "", WHEN_), plain },
        { "ours", FIELD_, VALUE_(T_, ",\"LiveKitIdentity2\":\"@u:e:D\","
          "\"Connected\":true,\"Sid\":\"PA_1\"", WHEN_),
          "syd_x 7200000 example.com 1784791731.123450000 @u:e:D PA_1 1" },
        { "when it was delegated", FIELD_, VALUE_(T_, ",\"DelegatedAt\":"
          "\"2026-07-23T09:28:50.5+02:00\"", WHEN_),
          "syd_x 7200000 example.com 1784791731.123450000   0 "
          "1784791730500" },
        { "delegated at no time", FIELD_, VALUE_(T_, ",\"DelegatedAt\":"
          "\"yesterday\"", WHEN_), "DelegatedAt" },
        { "ours, empty", FIELD_, VALUE_(T_, ",\"LiveKitIdentity2\":\"\","
          "\"Connected\":false,\"Sid\":\"\"", WHEN_), plain },
        { "ours, null", FIELD_, VALUE_(T_, ",\"LiveKitIdentity2\":null,"
          "\"Sid\":null", WHEN_), plain },
        { "a time before 1970", FIELD_, VALUE_(T_, "",
          "1969-12-31T23:59:59Z"),
          "syd_x 7200000 example.com -1.000000000   0" },
        { "T of 0", FIELD_, VALUE_("0", "", WHEN_),
          "syd_x 0 example.com 1784791731.123450000   0" },
        { "negative T", FIELD_, VALUE_("-7200000000000", "", WHEN_),
          "syd_x 0 example.com 1784791731.123450000   0" },
        { "the least T", FIELD_, VALUE_("-9223372036854775808", "", WHEN_),
          "syd_x 0 example.com 1784791731.123450000   0" },
        { "T of a nanosecond", FIELD_, VALUE_("1", "", WHEN_),
          "syd_x 1000 example.com 1784791731.123450000   0" },
        { "T over a day", FIELD_, VALUE_("86400000000001", "", WHEN_),
          "syd_x 86400000 example.com 1784791731.123450000   0" },
        { "the greatest T", FIELD_, VALUE_("9223372036854775807", "",
          WHEN_), "syd_x 86400000 example.com 1784791731.123450000   0" },
        { "T with an exponent", FIELD_, VALUE_("7.2e12", "", WHEN_),
          "value is not the JSON object expected" },
        { "T with a fraction", FIELD_, VALUE_("7200000000000.0", "", WHEN_),
          "value is not the JSON object expected" },
        { "T as a string", FIELD_, VALUE_("\"7200000000000\"", "", WHEN_),
          "value is not the JSON object expected" },
        { "T too great", FIELD_, VALUE_("9223372036854775808", "", WHEN_),
          "DelayTimeout" },
        { "T null", FIELD_, VALUE_("null", "", WHEN_), "DelayTimeout" },
        { "lower-case t", FIELD_, VALUE_(T_, "", "2026-07-23t07:28:51Z"),
          "RestartedAt" },
        { "a blank in the time", FIELD_, VALUE_(T_, "",
          "2026-07-23 07:28:51Z"), "RestartedAt" },
        { "no time", FIELD_, PARAMS_(T_, "") "}", "RestartedAt" },
        { "a time that is no string", FIELD_, PARAMS_(T_, "")
          ",\"RestartedAt\":1784791731}",
          "value is not the JSON object expected" },
        { "no Params", FIELD_, "{\"RestartedAt\":\"" WHEN_ "\"}",
          "field and value differ" },
        { "Params null", FIELD_, "{\"Params\":null,\"RestartedAt\":\"" WHEN_
          "\"}", "field and value differ" },
        { "Params twice", FIELD_, PARAMS_(T_, "") ",\"Params\":{}"
          AT_(WHEN_), "value is not the JSON object expected" },
        { "DelayId twice", FIELD_, VALUE_(T_, ",\"DelayId\":\"y\"", WHEN_),
          "value is not the JSON object expected" },
        { "names in lower case are other names", FIELD_, "{\"params\":{},"
          "\"RestartedAt\":\"" WHEN_ "\"}", "field and value differ" },
        { "no DelayId", FIELD_, "{\"Params\":{\"DelayTimeout\":" T_
          ",\"ServerName\":\"example.com\",\"LiveKitRoom\":\"" ROOM_
          "\",\"LiveKitIdentity\":\"" ID_ "\"}" AT_(WHEN_), "DelayId" },
        { "no DelayTimeout", FIELD_, "{\"Params\":{\"DelayId\":\"x\","
          "\"ServerName\":\"example.com\",\"LiveKitRoom\":\"" ROOM_
          "\",\"LiveKitIdentity\":\"" ID_ "\"}" AT_(WHEN_),
          "DelayTimeout" },
        { "no ServerName", FIELD_, "{\"Params\":{\"DelayId\":\"x\","
          "\"DelayTimeout\":" T_ ",\"LiveKitRoom\":\"" ROOM_
          "\",\"LiveKitIdentity\":\"" ID_ "\"}" AT_(WHEN_), "ServerName" },
        { "no LiveKitRoom", FIELD_, "{\"Params\":{\"DelayId\":\"x\","
          "\"DelayTimeout\":" T_ ",\"ServerName\":\"example.com\","
          "\"LiveKitIdentity\":\"" ID_ "\"}" AT_(WHEN_),
          "field and value differ" },
        { "no LiveKitIdentity", FIELD_, "{\"Params\":{\"DelayId\":\"x\","
          "\"DelayTimeout\":" T_ ",\"ServerName\":\"example.com\","
          "\"LiveKitRoom\":\"" ROOM_ "\"}" AT_(WHEN_),
          "field and value differ" },
        { "Connected as a string", FIELD_, VALUE_(T_,
          ",\"Connected\":\"true\"", WHEN_),
          "value is not the JSON object expected" },
        { "Sid as a number", FIELD_, VALUE_(T_, ",\"Sid\":1", WHEN_),
          "value is not the JSON object expected" },
        { "another room", "[\"P8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3qSc\""
          ",\"" ID_ "\"]", VALUE_(T_, "", WHEN_), "field and value differ" },
        { "another identity", "[\"" ROOM_ "\",\"x\"]", VALUE_(T_, "",
          WHEN_), "field and value differ" },
        { "a field of one", "[\"" ROOM_ "\"]", VALUE_(T_, "", WHEN_),
          "field is no JSON array of two strings" },
        { "a field of three", "[\"" ROOM_ "\",\"" ID_ "\",\"\"]",
          VALUE_(T_, "", WHEN_), "field is no JSON array of two strings" },
        { "a field of numbers", "[1,2]", VALUE_(T_, "", WHEN_),
          "field is no JSON array of two strings" },
        { "a field that is an object", "{\"" ROOM_ "\":\"" ID_ "\"}",
          VALUE_(T_, "", WHEN_), "field is no JSON array of two strings" },
        { "bytes behind the field", FIELD_ "x", VALUE_(T_, "", WHEN_),
          "field is no JSON array of two strings" },
        { "a field cut short", "[\"" ROOM_ "\",\"" ID_, VALUE_(T_, "",
          WHEN_), "field is no JSON array of two strings" },
        { "an empty field", "", VALUE_(T_, "", WHEN_),
          "field is no JSON array of two strings" },
        { "an empty value", FIELD_, "",
          "value is not the JSON object expected" },
        { "a value that is an array", FIELD_, "[]",
          "value is not the JSON object expected" },
        { "a value cut short", FIELD_, PARAMS_(T_, ""),
          "value is not the JSON object expected" },
        { "bytes behind the value", FIELD_, VALUE_(T_, "", WHEN_) "}",
          "value is not the JSON object expected" },
        { "no UTF-8", FIELD_, VALUE_(T_, ",\"x\":\"\xff\"", WHEN_),
          "value is not the JSON object expected" },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++)
        row_str(name_of("record: %s", tab[i].name), sl_str(record_text(
            sl_str(tab[i].field), sl_str(tab[i].value))), tab[i].want);
    /* delay ids and names are judged as a client's are */
    static const struct { const char *delay, *server, *want; } judge[] = {
        { "syd_x", "example.com", "" }, { "a.b~c-d_e", "e:8448", "" },
        { "..", "e.org", "DelayId" }, { ".", "e.org", "DelayId" },
        { "a/b", "e.org", "DelayId" }, { "a b", "e.org", "DelayId" },
        { "a%2e", "e.org", "DelayId" }, { "", "e.org", "DelayId" },
        { "\\u00e9", "e.org", "DelayId" }, { "a\\u0000", "e.org",
          "DelayId" },
        { "x", "", "ServerName" }, { "x", "a b", "ServerName" },
        { "x", "https://e.org", "ServerName" }, { "x", "e.org:0",
          "ServerName" }, { "x", "e.org:99999", "ServerName" },
    };
    for (size_t i = 0; i < COUNT_OF(judge); i++) {
        char text[1000];
        int n = snprintf(text, sizeof text, "{\"Params\":{\"DelayId\":"
            "\"%s\",\"DelayTimeout\":1000000000,\"ServerName\":\"%s\","
            "\"LiveKitRoom\":\"" ROOM_ "\",\"LiveKitIdentity\":\"" ID_
            "\"}" AT_(WHEN_), judge[i].delay, judge[i].server);
        const char *got = record_text(SL(FIELD_), (sl){ (uint8_t *)text,
            (size_t)n });
        row(name_of("record of %s at %s", judge[i].delay, judge[i].server),
            judge[i].want[0] ? strcmp(got, judge[i].want) == 0
            : strstr(got, " 1000 ") != NULL, "%s", got);
    }
    /* what is written: bytes and order */
    static const struct { const char *name; struct record r;
        const char *value; } put[] = {
        { "a record", { .delay_id = SL("syd_x"), .server = SL("example.com"),
          .alias = SL(ROOM_), .identity = SL(ID_), .timeout_ms = 7200000,
          .restarted_s = 1784791731, .restarted_ns = 123450000 },
          VALUE_(T_, "", WHEN_) },
        { "whole seconds", { .delay_id = SL("syd_x"),
          .server = SL("example.com"), .alias = SL(ROOM_),
          .identity = SL(ID_), .timeout_ms = 7200000,
          .restarted_s = 1784791731 }, VALUE_(T_, "",
          "2026-07-23T07:28:51Z") },
        { "a nanosecond", { .delay_id = SL("syd_x"),
          .server = SL("example.com"), .alias = SL(ROOM_),
          .identity = SL(ID_), .timeout_ms = 7200000,
          .restarted_s = 1784791731, .restarted_ns = 1 }, VALUE_(T_, "",
          "2026-07-23T07:28:51.000000001Z") },
        { "all nine digits", { .delay_id = SL("syd_x"),
          .server = SL("example.com"), .alias = SL(ROOM_),
          .identity = SL(ID_), .timeout_ms = 7200000,
          .restarted_s = 1784791731, .restarted_ns = 987654321 },
          VALUE_(T_, "", "2026-07-23T07:28:51.987654321Z") },
        { "a day", { .delay_id = SL("syd_x"), .server = SL("example.com"),
          .alias = SL(ROOM_), .identity = SL(ID_), .timeout_ms = 86400000,
          .restarted_s = 1784791731 }, VALUE_("86400000000000", "",
          "2026-07-23T07:28:51Z") },
        { "the second identity", { .delay_id = SL("syd_x"),
          .server = SL("example.com"), .alias = SL(ROOM_),
          .identity = SL(ID_), .timeout_ms = 7200000,
          .restarted_s = 1784791731, .identity2 = SL("@\"u:e:D\xc3\xa9") },
          VALUE_(T_, ",\"LiveKitIdentity2\":\"@\\\"u:e:D\xc3\xa9\"",
          "2026-07-23T07:28:51Z") },
        { "connected", { .delay_id = SL("syd_x"),
          .server = SL("example.com"), .alias = SL(ROOM_),
          .identity = SL(ID_), .timeout_ms = 7200000,
          .restarted_s = 1784791731, .is_connected = true },
          VALUE_(T_, ",\"Connected\":true", "2026-07-23T07:28:51Z") },
        { "connected, with a sid", { .delay_id = SL("syd_x"),
          .server = SL("example.com"), .alias = SL(ROOM_),
          .identity = SL(ID_), .timeout_ms = 7200000,
          .restarted_s = 1784791731, .is_connected = true,
          .sid = SL("PA_1") }, VALUE_(T_, ",\"Connected\":true,"
          "\"Sid\":\"PA_1\"", "2026-07-23T07:28:51Z") },
        { "delegated before", { .delay_id = SL("syd_x"),
          .server = SL("example.com"), .alias = SL(ROOM_),
          .identity = SL(ID_), .timeout_ms = 7200000,
          .restarted_s = 1784791731, .delegated_ms = 1784791730050 },
          VALUE_(T_, ",\"DelegatedAt\":\"2026-07-23T07:28:50.05Z\"",
          "2026-07-23T07:28:51Z") },
        { "delegated just then", { .delay_id = SL("syd_x"),
          .server = SL("example.com"), .alias = SL(ROOM_),
          .identity = SL(ID_), .timeout_ms = 7200000,
          .restarted_s = 1784791731, .restarted_ns = 50000000,
          .delegated_ms = 1784791731050 }, VALUE_(T_, "",
          "2026-07-23T07:28:51.05Z") },
        { "a sid alone", { .delay_id = SL("syd_x"),
          .server = SL("example.com"), .alias = SL(ROOM_),
          .identity = SL(ID_), .timeout_ms = 7200000,
          .restarted_s = 1784791731, .sid = SL("PA_1") }, VALUE_(T_,
          ",\"Sid\":\"PA_1\"", "2026-07-23T07:28:51Z") },
    };
    for (size_t i = 0; i < COUNT_OF(put); i++) {
        const struct record *r = &put[i].r;
        static uint8_t value[3000], field[500];
        struct bb v = BB(value), f = BB(field);
        rec_put(&v, r);
        rec_put_field(&f, r->alias, r->identity);
        row_str(name_of("written: %s", put[i].name), (sl){ value, v.len },
            put[i].value);
        row_str(name_of("written: %s: its field", put[i].name),
            (sl){ field, f.len }, FIELD_);
        char want[300];
        snprintf(want, sizeof want, "%.*s %lld %.*s %lld.%09u %.*s %.*s %d",
            (int)r->delay_id.len, r->delay_id.p, (long long)r->timeout_ms,
            (int)r->server.len, r->server.p, (long long)r->restarted_s,
            r->restarted_ns, (int)r->identity2.len, r->identity2.p
            ? (const char *)r->identity2.p : "", (int)r->sid.len, r->sid.p
            ? (const char *)r->sid.p : "", r->is_connected);
        if (strstr(put[i].value, "DelegatedAt"))
            snprintf(want + strlen(want), 40, " %lld",
                (long long)r->delegated_ms);
        row_str(name_of("written: %s: and read", put[i].name), sl_str(
            record_text((sl){ field, f.len }, (sl){ value, v.len })), want);
    }
    struct bb b = work_bb();
    rec_put_field(&b, SL("a\"b/c<\xe2\x82\xac"), SL("\\\x01\x7f"));
    row_str("a field is canonical JSON", work_done(&b),
        "[\"a\\\"b/c<\xe2\x82\xac\",\"\\\\\\u0001\x7f\"]");
}

/* ---- the URL ---- */

static void test_redis_url(void)
{
    static const struct { const char *in; int64_t ms; } time_tab[] = {
        { "0", 0 }, { "5", 5000 }, { "3600", 3600000 }, { "3601", -1 },
        { "500ms", 500 }, { "1m30s", 90000 }, { "1h", 3600000 },
        { "60m", 3600000 }, { "3600s", 3600000 }, { "3600000ms", 3600000 },
        { "1h1ms", -1 }, { "61m", -1 }, { "1s500ms", 1500 }, { "1500us", 1 },
        { "999us", 0 }, { "5ns", 0 }, { "0s", 0 }, { "0h0m0s", 0 },
        { "1", 1000 }, { "-1", -1 }, { "-1s", -1 }, { "s", -1 },
        { "1x", -1 }, { "1S", -1 }, { "1 s", -1 }, { "1s ", -1 },
        { "1m30", -1 }, { "ms", -1 }, { "1ss", -1 }, { "1h1h", -1 },
        { "99999999999999999999s", -1 }, { "4000000000ms", -1 },
        { "18446744073709551616", -1 }, { "1d", -1 },
    };
    for (size_t i = 0; i < COUNT_OF(time_tab); i++) {
        size_t len = strlen(time_tab[i].in);
        int64_t ms;
        if (!cf_duration((sl){ guarded(time_tab[i].in, len), len }, &ms))
            ms = -1;
        row_int(name_of("duration %s", time_tab[i].in), ms, time_tab[i].ms);
    }
    static const struct { const char *in, *want; } tab[] = {
        { "redis://", "tcp localhost 6379 0 -/- - 5000 3000 3000" },
        { "redis://h", "tcp h 6379 0 -/- - 5000 3000 3000" },
        { "redis://h/", "tcp h 6379 0 -/- - 5000 3000 3000" },
        { "redis://h:7000/3", "tcp h 7000 3 -/- - 5000 3000 3000" },
        { "redis://:7000", "tcp localhost 7000 0 -/- - 5000 3000 3000" },
        { "rediss://h.org/15", "tls h.org 6379 15 -/- - 5000 3000 3000" },
        { "redis://10.0.0.1", "tcp 10.0.0.1 6379 0 -/- - 5000 3000 3000" },
        { "redis://[fd00::1]:7/0",
          "tcp [fd00::1] 7 0 -/- - 5000 3000 3000" },
        { "redis://[fd00::1]", "tcp [fd00::1] 6379 0 -/- - 5000 3000 3000" },
        { "redis://my_redis", "tcp my_redis 6379 0 -/- - 5000 3000 3000" },
        { "redis://:pw@h", "tcp h 6379 0 -/pw - 5000 3000 3000" },
        { "redis://u:pw@h", "tcp h 6379 0 u/pw - 5000 3000 3000" },
        { "redis://u@h", "tcp h 6379 0 u/- - 5000 3000 3000" },
        { "redis://@h", "tcp h 6379 0 -/- - 5000 3000 3000" },
        { "redis://u:p%40%2f%3a%25@h", "tcp h 6379 0 u/p@/:% - 5000 3000 "
          "3000" },
        { "redis://u:p@q@h", "tcp h 6379 0 u/p@q - 5000 3000 3000" },
        { "redis://u:p:q@h", "tcp h 6379 0 u/p:q - 5000 3000 3000" },
        { "redis://:pw@:7", "tcp localhost 7 0 -/pw - 5000 3000 3000" },
        { "unix:///run/redis.sock",
          "unix /run/redis.sock 0 -/- - 5000 3000 3000" },
        { "unix:///run/redis.sock?db=2",
          "unix /run/redis.sock 2 -/- - 5000 3000 3000" },
        { "unix://u:p@/run/x", "unix /run/x 0 u/p - 5000 3000 3000" },
        { "redis://h/3?db=4", "tcp h 6379 4 -/- - 5000 3000 3000" },
        { "redis://h?db=4&db=5", "tcp h 6379 5 -/- - 5000 3000 3000" },
        { "redis://h?client_name=a%20b", "tcp h 6379 0 -/- a b 5000 3000 "
          "3000" },
        { "redis://h?dial_timeout=1&read_timeout=500ms&write_timeout=1m30s",
          "tcp h 6379 0 -/- - 1000 500 90000" },
        { "redis://h?dial_timeout=0", "tcp h 6379 0 -/- - 5000 3000 3000" },
        { "redis://h?", "tcp h 6379 0 -/- - 5000 3000 3000" },
        { "redis://h?&&db=1&", "tcp h 6379 1 -/- - 5000 3000 3000" },
        { "redis://h?protocol=3&max_retries=-1&min_retry_backoff=x&"
          "max_retry_backoff=x&pool_fifo=x&pool_size=x&pool_timeout=x&"
          "min_idle_conns=x&max_idle_conns=x&max_active_conns=x&"
          "max_concurrent_dials=x&conn_max_idle_time=x&idle_timeout=x&"
          "conn_max_lifetime=x&max_conn_age=x&conn_max_lifetime_jitter=x",
          "tcp h 6379 0 -/- - 5000 3000 3000" },
        { "rediss://h?skip_verify=true",
          "tls h 6379 0 -/- - 5000 3000 3000 skip" },
        { "rediss://h?skip_verify=true&skip_verify=0",
          "tls h 6379 0 -/- - 5000 3000 3000" },
        { "redis://h?skip_verify=true", "unknown query key" },
        { "rediss://h?skip_verify=yes",
          "skip_verify must be true or false" },
        { "redis://h?x=1", "unknown query key" },
        { "redis://h?DB=1", "unknown query key" },
        { "redis://h?db=x", "db must be a number" },
        { "redis://h?db=-1", "db must be a number" },
        { "redis://h?db=", "db must be a number" },
        { "redis://h?db", "db must be a number" },
        { "redis://h?read_timeout=x",
          "time-outs must be seconds or like 500ms, 1m30s" },
        { "redis://h/x", "the path must be a database number" },
        { "redis://h/1/2", "the path must be a database number" },
        { "redis://h/1/", "the path must be a database number" },
        { "redis://h/-1", "the path must be a database number" },
        { "redis://h/99999999999999999999",
          "the path must be a database number" },
        { "redis://h:0", "malformed host or port" },
        { "redis://h:99999", "malformed host or port" },
        { "redis://h:x", "malformed host or port" },
        { "redis://h:", "malformed host or port" },
        { "redis://:0", "malformed port" }, { "redis://:x", "malformed port" },
        { "redis://:", "malformed port" },
        { "redis://fd00::1", "malformed host or port" },
        { "redis://[fd00::1", "malformed host or port" },
        { "redis://a b", "malformed host or port" },
        { "redis://p/w@h", "the path must be a database number" },
        { "redis://u:%zz@h", "malformed percent-encoding" },
        { "redis://%@h", "malformed percent-encoding" },
        { "redis://h?client_name=%2", "malformed percent-encoding" },
        { "unix://", "unix:// needs the socket's absolute path" },
        { "unix:///", "unix:// needs the socket's absolute path" },
        { "unix://run/x", "unix:// needs the socket's absolute path" },
        { "unix:/run/x", "must begin with redis://, rediss:// or unix://" },
        { "h:6379", "must begin with redis://, rediss:// or unix://" },
        { "http://h", "must begin with redis://, rediss:// or unix://" },
        { "REDIS://h", "must begin with redis://, rediss:// or unix://" },
        { "redis:/h", "must begin with redis://, rediss:// or unix://" },
        { "", "must begin with redis://, rediss:// or unix://" },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        static uint8_t mem[300];
        struct bb text = BB(mem), b = work_bb();
        struct redis_url u;
        size_t len = strlen(tab[i].in);
        const char *why = cf_redis_url((sl){ guarded(tab[i].in, len), len },
            &text, &u);
        if (why) {
            bb_str(&b, why);
        } else {
            bb_str(&b, u.is_unix ? "unix " : u.is_tls ? "tls " : "tcp ");
            bb_put(&b, u.is_unix ? u.path : u.host);
            bb_byte(&b, ' ');
            if (!u.is_unix) {
                bb_u64(&b, u.port);
                bb_byte(&b, ' ');
            }
            bb_u64(&b, u.db);
            bb_byte(&b, ' ');
            bb_put(&b, u.user.len ? u.user : SL("-"));
            bb_byte(&b, '/');
            bb_put(&b, u.sec_password.len ? u.sec_password : SL("-"));
            bb_byte(&b, ' ');
            bb_put(&b, u.client_name.len ? u.client_name : SL("-"));
            const int64_t ms[] = { u.dial_ms, u.read_ms, u.write_ms };
            for (int k = 0; k < 3; k++) {
                bb_byte(&b, ' ');
                bb_i64(&b, ms[k]);
            }
            bb_str(&b, u.skip_verify ? " skip" : "");
        }
        row_str(name_of("url %.60s", tab[i].in), work_done(&b),
            tab[i].want);
    }
    uint8_t mem[4];
    struct bb text = BB(mem);
    struct redis_url u;
    row_str("a password too long to keep", sl_str(cf_redis_url(
        SL("redis://:12345@h"), &text, &u)), "too long");
}

/* ---- a Redis in the scripted world, at 10.0.0.6:6379 ---- */

enum { STORE_WORDS = 16, STORE_TEXT = 2400 };

/* What the connections say and what is kept. */
static struct {
    struct { char field[400], value[STORE_TEXT]; } rec[12];
    unsigned rec_cnt;
    char lease[LIM_SHARD_CNT][20];
    int64_t lease_end[LIM_SHARD_CNT];
    struct { uint64_t ms, seq; char key[2][8], val[2][STORE_TEXT]; } ev[24];
    unsigned ev_cnt;
    char other[20];                  /* another live replica */
    const char *run_id;
    /* replies instead of its own: `COMMAND reply`, by command, once each
     * where once is set */
    const char *instead[6];
    bool once;
    const char *raw;                 /* the reply to all but a log-in */
    int64_t wait_ms;
    bool is_down;
    char trace[6000];                /* commands, or as much as fits */
    char dials[400];
    unsigned commands, writes;
    char wrong[200];
} rd;

struct store_conn {
    bool is_deaf;                    /* does not answer any more */
    bool is_blocked;                 /* an XREAD waits */
    struct place after;
};

static void store_wrong(const char *what, const char *more)
{
    if (!rd.wrong[0])
        snprintf(rd.wrong, sizeof rd.wrong, "%s %s", what, more);
}

static void store_say(struct sock *s, const char *text)
{
    if (s->in_off == s->in_len)
        s->in_at = world_ms + rd.wait_ms;
    sock_say(s, text);
}

__attribute__((format(printf, 2, 3)))
static void store_sayf(struct bb *b, const char *fmt, ...)
{
    char text[400];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    bb_str(b, text);
}

static void store_bulk(struct bb *b, const char *text)
{
    rsp_put(b, sl_str(text));
}

static int store_rec(const char *field)
{
    for (unsigned i = 0; i < rd.rec_cnt; i++)
        if (strcmp(rd.rec[i].field, field) == 0)
            return (int)i;
    return -1;
}

static void store_hset(const char *field, const char *value)
{
    int i = store_rec(field);
    if (i < 0) {
        if (rd.rec_cnt == COUNT_OF(rd.rec))
            abort();
        i = (int)rd.rec_cnt++;
    }
    snprintf(rd.rec[i].field, sizeof rd.rec[i].field, "%s", field);
    snprintf(rd.rec[i].value, sizeof rd.rec[i].value, "%s", value);
    rd.writes++;
}

static int store_hdel(const char *field)
{
    int i = store_rec(field);
    if (i < 0)
        return 0;
    rd.rec[i] = rd.rec[--rd.rec_cnt];
    rd.writes++;
    return 1;
}

static void store_put_events(struct bb *b, struct place after)
{
    unsigned n = 0, from = 0;
    for (unsigned i = 0; i < rd.ev_cnt; i++) {
        bool is = rd.ev[i].ms > after.ms
            || (rd.ev[i].ms == after.ms && rd.ev[i].seq > after.seq);
        from = n == 0 && is ? i : from;
        n += is;
    }
    if (n == 0)
        return;
    bb_str(b, "*1\r\n*2\r\n");
    store_bulk(b, "lk-jwt:webhooks");
    store_sayf(b, "*%u\r\n", n);
    for (unsigned i = from; i < rd.ev_cnt; i++) {
        char id[60];
        snprintf(id, sizeof id, "%llu-%llu", (unsigned long long)rd.ev[i].ms,
            (unsigned long long)rd.ev[i].seq);
        bb_str(b, "*2\r\n");
        store_bulk(b, id);
        bb_str(b, "*4\r\n");
        for (int k = 0; k < 2; k++) {
            store_bulk(b, rd.ev[i].key[k]);
            store_bulk(b, rd.ev[i].val[k]);
        }
    }
}

/* Append to the stream; who waits for it is told. */
static void store_xadd(const char *const *word, struct bb *id)
{
    static uint8_t text[60000];
    if (rd.ev_cnt == COUNT_OF(rd.ev)) {
        memmove(rd.ev, rd.ev + 1, sizeof rd.ev - sizeof rd.ev[0]);
        rd.ev_cnt--;
    }
    uint64_t ms = (uint64_t)(world_wall + world_ms), seq = 0;
    if (rd.ev_cnt && rd.ev[rd.ev_cnt - 1].ms >= ms) {
        ms = rd.ev[rd.ev_cnt - 1].ms;
        seq = rd.ev[rd.ev_cnt - 1].seq + 1;
    }
    rd.ev[rd.ev_cnt].ms = ms;
    rd.ev[rd.ev_cnt].seq = seq;
    for (int k = 0; k < 2; k++) {
        snprintf(rd.ev[rd.ev_cnt].key[k], 8, "%s", word[2 * k]);
        snprintf(rd.ev[rd.ev_cnt].val[k], STORE_TEXT, "%s", word[2 * k + 1]);
    }
    rd.ev_cnt++;
    if (id)
        store_sayf(id, "%llu-%llu", (unsigned long long)ms,
            (unsigned long long)seq);
    for (int i = 0; i < SOCK_CNT; i++) {
        struct sock *s = sock_tab[i];
        struct store_conn *c = s && s->used ? s->peer : NULL;
        if (!c || !leave_is(s, "10.0.0.6") || !c->is_blocked
            || s->in_at <= world_ms)
            continue;
        struct bb b = BB(text);
        store_put_events(&b, c->after);
        c->is_blocked = false;
        s->in_off = s->in_len = 0;
        s->in_at = world_ms;
        sock_give(s, text, b.len);
    }
}

/* What the script of section 21 does to the leases. */
static void store_tick(struct bb *b, const char *const *arg)
{
    const char *me = arg[0], *own_text = arg[2];
    bool go = strcmp(arg[1], "go") == 0;
    int64_t ttl = atoll(arg[3]), soon = ttl;
    unsigned n = (go ? 0 : 1) + (rd.other[0] != 0), own[64], own_cnt = 0;
    unsigned free_[64], free_cnt = 0;
    for (unsigned k = 0; k < LIM_SHARD_CNT; k++) {
        char text[8];
        snprintf(text, sizeof text, "%u", k);
        if (rd.lease_end[k] <= world_ms)
            rd.lease[k][0] = 0;
        bool mine = strcmp(rd.lease[k], me) == 0;
        if (mine && (go || strcmp(own_text, text) == 0)) {
            rd.lease[k][0] = 0;
        } else if (mine) {
            rd.lease_end[k] = world_ms + ttl;
            own[own_cnt++] = k;
        } else if (!rd.lease[k][0]) {
            free_[free_cnt++] = k;
        } else if (rd.lease_end[k] - world_ms < soon) {
            soon = rd.lease_end[k] - world_ms;
        }
    }
    unsigned kept = own_cnt, share = 64 / (n ? n : 1), odd = 64 - share * n;
    if (rd.other[0] && strcmp(rd.other, me) < 0 && odd)
        odd--;
    share += odd > 0;
    for (unsigned i = 0; !go && i < free_cnt && own_cnt < share; i++) {
        snprintf(rd.lease[free_[i]], 20, "%s", me);
        rd.lease_end[free_[i]] = world_ms + ttl;
        own[own_cnt++] = free_[i];
    }
    char time[40], last[60] = "0-0";
    snprintf(time, sizeof time, "%lld", (long long)(world_wall + world_ms));
    if (rd.ev_cnt)
        snprintf(last, sizeof last, "%llu-%llu",
            (unsigned long long)rd.ev[rd.ev_cnt - 1].ms,
            (unsigned long long)rd.ev[rd.ev_cnt - 1].seq);
    store_sayf(b, "*%u\r\n:%u\r\n", 6 + own_cnt, n);
    store_bulk(b, time);
    store_bulk(b, last);
    store_sayf(b, ":%lld\r\n:%u\r\n:%u\r\n", (long long)soon, kept, share);
    for (unsigned i = 0; i < own_cnt; i++)
        store_sayf(b, ":%u\r\n", own[i]);
}

/* A time of a record up to its Z, empty: none. */
static void store_member(int rec, const char *name, char out[40])
{
    const char *at = rec < 0 ? NULL : strstr(rd.rec[rec].value, name);
    out[0] = 0;
    if (at)
        snprintf(out, 40, "%.*s", (int)strcspn(at + strlen(name), "Z\""),
            at + strlen(name));
}

/* Write or delete a record as the other script does. */
static void store_guarded(struct bb *b, const char *const *w)
{
    char want[300], at[40], born[40];
    const char *me = w[6], *field = w[7], *value = w[9], *date = w[11];
    bool new = w[12][0] != 0;
    int i = store_rec(field);
    unsigned shard = (unsigned)atoi(w[4] + 13) % LIM_SHARD_CNT;
    bool mine = strcmp(rd.lease[shard], me) == 0
        && rd.lease_end[shard] > world_ms;
    snprintf(want, sizeof want, "\"DelayId\":\"%s\"", w[8]);
    bool same = i >= 0 && strstr(rd.rec[i].value, want);
    store_member(i, "\"RestartedAt\":\"", at);
    store_member(i, "\"DelegatedAt\":\"", born);
    if (strcmp(w[12], "late") == 0 && i >= 0 && !same
        && strcmp(born[0] ? born : at, date) >= 0) {
        bb_str(b, ":0\r\n");
        return;
    }
    if (!new && i >= 0 && !same) {
        bb_str(b, ":0\r\n");
    } else if (!new && !value[0]) {
        if (mine)
            (void)store_hdel(field);
        bb_str(b, mine ? ":1\r\n" : ":-1\r\n");
    } else if (!new && !mine && i >= 0 && (!at[0] || strcmp(at, date) >= 0)) {
        bb_str(b, ":-1\r\n");
    } else {
        store_hset(field, value);
        if (new || !mine)
            store_xadd((const char *const[]){ "job", field, "record",
                value }, NULL);
        bb_str(b, new || mine ? ":1\r\n" : ":2\r\n");
    }
}

/* Run one command; its reply goes to b. */
static void store_run_command(struct store_conn *c, struct sock *s,
    const char *const *w, unsigned n, struct bb *b)
{
    const char *name = w[0];
    if (strcmp(name, "PING") == 0) {
        bb_str(b, "+PONG\r\n");
    } else if (strcmp(name, "AUTH") == 0 || strcmp(name, "SELECT") == 0
               || strcmp(name, "CLIENT") == 0) {
        bb_str(b, "+OK\r\n");
    } else if (strcmp(name, "INFO") == 0) {
        char text[200];
        snprintf(text, sizeof text, "# Server\r\nredis_version:7.2.4\r\n"
            "run_id:%s\r\ntcp_port:6379\r\n", rd.run_id ? rd.run_id : "abc");
        store_bulk(b, text);
    } else if (strcmp(name, "HGETALL") == 0) {
        store_sayf(b, "*%u\r\n", 2 * rd.rec_cnt);
        for (unsigned i = 0; i < rd.rec_cnt; i++) {
            store_bulk(b, rd.rec[i].field);
            store_bulk(b, rd.rec[i].value);
        }
    } else if (strcmp(name, "HSET") == 0 && n == 4) {
        store_sayf(b, ":%d\r\n", store_rec(w[2]) < 0);
        store_hset(w[2], w[3]);
    } else if (strcmp(name, "HDEL") == 0 && n == 3) {
        store_sayf(b, ":%d\r\n", store_hdel(w[2]));
    } else if (strcmp(name, "GET") == 0 && n == 2) {
        unsigned shard = (unsigned)atoi(w[1] + 13) % 64;
        if (rd.lease[shard][0] && rd.lease_end[shard] > world_ms)
            store_bulk(b, rd.lease[shard]);
        else
            bb_str(b, "$-1\r\n");
    } else if (strcmp(name, "XADD") == 0 && n == 5) {
        bb_str(b, "-ERR The ID specified in XADD must be greater than 0-0"
            "\r\n");
    } else if (strcmp(name, "XREAD") == 0 && strcmp(w[n - 1], "$") == 0) {
        bb_str(b, "*-1\r\n");
    } else if (strcmp(name, "XADD") == 0 && n >= 7) {
        unsigned at = n - 4;             /* the id stands before the pairs */
        uint8_t text[60];
        struct bb id = BB(text);
        store_xadd(w + at, &id);
        rsp_put(b, work_done(&id));
    } else if (strcmp(name, "XREAD") == 0) {
        bool blocks = strcmp(w[3], "BLOCK") == 0;
        unsigned long long ms, seq;
        if (sscanf(w[n - 1], "%llu-%llu", &ms, &seq) != 2)
            store_wrong("stream id", w[n - 1]);
        c->after = (struct place){ ms, seq };
        store_put_events(b, c->after);
        if (b->len == 0 && blocks) {
            c->is_blocked = true;
            s->in_at = world_ms + atoll(w[4]);
            sock_say(s, "*-1\r\n");
        } else if (b->len == 0) {
            bb_str(b, "*-1\r\n");
        }
    } else if (strcmp(name, "EVAL") == 0 && strcmp(w[2], "2") == 0) {
        store_tick(b, w + 5);
    } else if (strcmp(name, "EVAL") == 0 && strcmp(w[2], "3") == 0) {
        store_guarded(b, w);
    } else if (strcmp(name, "EVAL") == 0 && strcmp(w[2], "1") == 0) {
        int i = store_rec(w[4]);         /* a field and what stands there */
        bb_str(b, "*2\r\n");
        store_bulk(b, w[4]);
        if (i < 0)
            bb_str(b, "$-1\r\n");
        else
            store_bulk(b, rd.rec[i].value);
    } else {
        store_wrong("unknown command", name);
        bb_str(b, "-ERR unknown command\r\n");
    }
}

static void store_command(struct sock *s, const char *const *w, unsigned n)
{
    static uint8_t text[60000];
    struct store_conn *c = s->peer;
    struct bb b = BB(text);
    rd.commands++;
    size_t used = strlen(rd.trace);
    snprintf(rd.trace + used, sizeof rd.trace - used, "%s%s", used ? " " : "",
        w[0]);
    const char *label = strcmp(w[0], "EVAL") ? w[0]
        : w[2][0] == '3' ? "STORE" : w[2][0] == '2' ? "TICK" : "NOTICE";
    for (size_t i = 0; i < COUNT_OF(rd.instead); i++) {
        size_t len = rd.instead[i] ? strcspn(rd.instead[i], " ") : 0;
        if (!len || strlen(label) != len || memcmp(rd.instead[i], label, len))
            continue;
        const char *reply = rd.instead[i] + len + 1;
        if (rd.once)
            rd.instead[i] = NULL;
        if (strcmp(reply, "close") == 0)
            s->is_eof = true;
        else if (strcmp(reply, "reset") == 0)
            s->is_reset = true;
        else if (strcmp(reply, "hang") == 0)
            c->is_deaf = true;
        else
            store_say(s, reply);
        return;
    }
    if (rd.raw && strcmp(w[0], "PING")) {
        size_t len = strlen(rd.raw);
        if (len && rd.raw[len - 1] == '~')   /* and the end */
            s->is_eof = true;
        sock_give(s, rd.raw, len - s->is_eof);
        return;
    }
    store_run_command(c, s, w, n, &b);
    if (b.len && s->in_off == s->in_len)
        s->in_at = world_ms + rd.wait_ms;
    sock_give(s, text, b.len);
}

static void store_sent(struct sock *s)
{
    static char word[STORE_WORDS][STORE_TEXT + 1500];
    if (!leave_is(s, "10.0.0.6")) {
        leave_sent(s);
        return;
    }
    while (s->peer && s->seen < s->out_len && !s->is_eof && !s->is_reset
           && !((struct store_conn *)s->peer)->is_deaf) {
        sl in = { s->out + s->seen, s->out_len - s->seen };
        const char *w[STORE_WORDS] = { NULL };
        struct rsp e;
        int n = rsp_parse(in, sizeof word[0] - 1, &e);
        size_t at = (size_t)n;
        if (n == 0)
            return;
        if (n < 0 || e.type != RSP_ARRAY || e.n < 1 || e.n > STORE_WORDS)
            abort();
        unsigned cnt = (unsigned)e.n;
        for (unsigned i = 0; i < cnt; i++) {
            n = rsp_parse(sl_skip(in, at), sizeof word[0] - 1, &e);
            if (n == 0)
                return;
            if (n < 0 || e.type != RSP_BULK || !e.text.p)
                abort();
            memcpy(word[i], e.text.p, e.text.len);
            word[i][e.text.len] = 0;
            w[i] = word[i];
            at += (size_t)n;
        }
        s->seen += at;
        store_command(s, w, cnt);
    }
    if (s->seen == s->out_len)
        s->seen = s->out_len = 0;
}

static void store_dial(struct sock *s)
{
    if (!leave_is(s, "10.0.0.6")) {
        leave_dial(s);
        return;
    }
    size_t used = strlen(rd.dials);
    snprintf(rd.dials + used, sizeof rd.dials - used, "%s%s", used ? " " : "",
        leave_time(world_ms - lv.begin));
    if (rd.is_down)
        s->dial_errno = ECONNREFUSED;
    s->peer = calloc(1, sizeof(struct store_conn));
}

/* ---- the program's side ---- */

static uint8_t store_url_text[300];
static long store_fault = FAULT_NONE;    /* of the next run */
static void store_keep_book(sl delay_id, bool is_send, bool ok);

static void store_reset(const char *url)
{
    leave_web_reset();
    memset(&rd, 0, sizeof rd);
    ZERO(rds_pool);
    ZERO(store_in_ring);
    ZERO(store_is_done);
    ZERO(notice_pool);
    store_head = store_cnt = 0;
    store_pause_at = 0;
    stream_cnt = 0;
    memset(&stream_entry, 0, sizeof stream_entry);
    struct bb text = BB(store_url_text);
    cfg.has_redis = true;
    if (cf_redis_url(sl_str(url), &text, &cfg.redis))
        abort();
    memcpy(rep.id, "0123456789abcdef", sizeof rep.id);
    world_dial = store_dial;
    world_sent = store_sent;
    world_wall = 1800000000000 - world_ms;     /* behind the build date */
    lv.begin = world_ms;
    lv.on_call = store_keep_book;
    fault_at = store_fault;
    store_fault = FAULT_NONE;
}

/* As main_redis begins. */
static void store_start(void)
{
    store_mode = STORE_PROBE;
    rds_start(RDS_MAIN, world_ms);
}

static const char *store_left(void)
{
    static char text[700];
    for (size_t i = 0; i < LIM_JOB_CNT; i++) {
        if (job_pool[i].state != J_FREE && job_pool[i].state != J_OVER)
            job_end(&job_pool[i], NULL, world_ms);
        store_cancel(&job_pool[i]);
    }
    for (int i = 0; i < LIM_REDIS_CNT; i++)
        if (rds_pool[i].state != RD_OFF) {
            rds_fail(&rds_pool[i], EV_REDIS_DOWN, "test", "over", world_ms);
            rds_pool[i].state = RD_OFF;
            loop_set(KIND_REDIS, (size_t)i, -1, 0, INT64_MAX);
        }
    for (size_t i = 0; i < LIM_JOB_CNT; i++) {
        store_cancel(&job_pool[i]);
        job_free(&job_pool[i]);
    }
    loop_set(KIND_REPLICA, 0, -1, 0, INT64_MAX);
    store_mode = STORE_NONE;
    const char *left = leave_left();
    unsigned pending = 0, huge = 0;
    for (int i = 0; i < LIM_REDIS_CNT; i++)
        pending += rds_pool[i].cnt + (rds_pool[i].big != 0);
    for (size_t i = 0; i < COUNT_OF(big_used); i++)
        huge += big_used[i];
    text[0] = 0;
    if (left[0] || pending || huge || met.gauge[GA_UNSAVED] || rd.wrong[0])
        snprintf(text, sizeof text, "%s; %u replies awaited, %u buffers, "
            "unsaved %lld, %s", left, pending, huge,
            (long long)met.gauge[GA_UNSAVED], rd.wrong);
    return text;
}

/* ---- the connection (rows D1 to D5) ---- */

static void redis_hello_rows(void)
{
#define R_ "redis://10.0.0.6"
    static const struct { const char *name, *url, *instead; bool once;
        int64_t ms; const char *trace; bool up; const char *log; } tab[] = {
        { "D4 PING", R_, NULL, false, 0, "PING INFO XADD XREAD EVAL", true,
          "event=REDIS_UP " },
        { "D4 a password", "redis://:pw@10.0.0.6", NULL, false, 0,
          "AUTH PING INFO XADD XREAD EVAL", true, "mode=replicas" },
        { "D4 all of it", "redis://u:pw@10.0.0.6/3?client_name=x", NULL,
          false, 0, "AUTH SELECT CLIENT PING INFO XADD XREAD EVAL", true,
          NULL },
        { "D4 a user without a password", "redis://u@10.0.0.6", NULL, false,
          0, "PING INFO XADD XREAD EVAL", true, NULL },
        { "D4 the name is refused", R_ "?client_name=x",
          "CLIENT -ERR unknown\r\n", false, 0,
          "CLIENT PING INFO XADD XREAD EVAL", true,
          NULL },
        { "D4 wrong password", "redis://:pw@10.0.0.6",
          "AUTH -WRONGPASS x\r\n", false, 0, "AUTH PING", false,
          "command=AUTH code=WRONGPASS" },
        { "D4 no such database", R_ "/9", "SELECT -ERR DB index\r\n", false,
          0, "SELECT PING", false, "command=SELECT code=ERR" },
        { "D4 a password is wanted", R_, "PING -NOAUTH x\r\n", false, 0,
          "PING", false, "command=PING code=NOAUTH" },
        { "D4 loading", R_, "PING -LOADING x\r\n", true, 0, "PING", false,
          "code=LOADING" },
        { "D4 an odd code is not logged", R_, "PING -Secret x\r\n", false, 0,
          "PING", false, "command=PING\n" },
        { "D4 PING answered by a number", R_, "PING :1\r\n", false, 0,
          "PING", false, "code=unexpected" },
        { "D4 silent until 3 s", R_, "PING hang", false, 2999, "PING", false,
          NULL },
        { "D4 silent for 3 s", R_, "PING hang", true, 3000, "PING", false,
          "reason=\"no answer in time\"" },
        { "D4 the URL's time", R_ "?read_timeout=500ms", "PING hang", true,
          500, "PING", false, "reason=\"no answer in time\"" },
        { "D4 closed", R_, "PING close", false, 0, "PING", false,
          "step=hello reason=\"connection closed\"" },
        { "D4 reset", R_, "PING reset", false, 0, "PING", false,
          "step=hello" },
        { "D4 no Redis at all", R_, "PING HTTP/1.1 400 x\r\n", false, 0,
          "PING", false, "event=REDIS_PROTO " },
        { "D4 more than was asked for", R_, "PING +PONG\r\n+PONG\r\n", false,
          0, "PING", false, "event=REDIS_PROTO " },
        { "D5 INFO refused", R_, "INFO -NOPERM x\r\n", false, 0,
          "PING INFO XADD XREAD EVAL", true, "mode=replicas" },
        { "D5 scripts refused", R_, "TICK -ERR unknown command\r\n", false,
          0, "PING INFO XADD XREAD EVAL HGETALL", true, "event=REDIS_SINGLE " },
        { "D5 scripts forbidden", R_, "TICK -NOPERM x\r\n", false, 0,
          "PING INFO XADD XREAD EVAL HGETALL", true, "mode=single" },
        { "D5 scripts forbidden by an older one", R_,
          "TICK -ERR Error running script: This Redis command is not allowed "
          "from scripts\r\n", false, 0, "PING INFO XADD XREAD EVAL HGETALL",
          true, "mode=single" },
        { "D5 streams refused", R_, "XADD -ERR unknown command 'XADD'\r\n",
          false, 0, "PING INFO XADD XREAD EVAL HGETALL", true,
          "mode=single" },
        { "D5 streams forbidden to read", R_, "XREAD -NOPERM x\r\n",
          false, 0, "PING INFO XADD XREAD EVAL HGETALL", true,
          "mode=single" },
        { "D5 another's key", R_, "XADD -WRONGTYPE x\r\n", false, 0,
          "PING INFO XADD XREAD EVAL HGETALL", true, "mode=single" },
        { "D5 no script for now", R_, "TICK -BUSY x\r\n", true, 1000,
          "PING INFO XADD XREAD EVAL EVAL", true, "mode=replicas" },
        { "D5 loading", R_, "TICK -LOADING x\r\n", true, 1000,
          "PING INFO XADD XREAD EVAL EVAL", true, "mode=replicas" },
        { "D5 a script with a mind of its own", R_, "TICK *1\r\n+x\r\n",
          false, 0, "PING INFO XADD XREAD EVAL", true, "event=REDIS_REFUSED " },
        { "D5 leases out of range", R_,
          "TICK *7\r\n:1\r\n$1\r\n1\r\n$3\r\n0-0\r\n:4000\r\n:0\r\n:64\r\n"
          ":64\r\n", false, 0, "PING INFO XADD XREAD EVAL", true,
          "event=REDIS_REFUSED " },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++)
        for (int drip = 0; drip < 2; drip++) {
            store_reset(tab[i].url);
            world_chunk = drip ? 1 : SIZE_MAX;
            rd.instead[0] = tab[i].instead;
            rd.once = tab[i].once;
            store_start();
            leave_until(tab[i].ms + 40);
            bool ok = strncmp(rd.trace, tab[i].trace, strlen(tab[i].trace))
                == 0 && rds_is_up(RDS_MAIN) == tab[i].up
                && (!tab[i].log || log_has(tab[i].log))
                && !log_has("Secret") && !log_has("pw");
            char trace[300];
            snprintf(trace, sizeof trace, "%.299s", rd.trace);
            const char *left = store_left();
            row(name_of("%s%s", tab[i].name, drip ? ", byte by byte" : ""),
                ok && !left[0], "`%s` %s %s", trace, left, log_buf);
        }
    /* how often it is tried again; chance is off: half of each wait */
    store_reset(R_);
    rd.is_down = true;
    store_start();
    leave_until(20000);
    row_str("D2 the pauses", sl_str(rd.dials), "0 0.05 0.15 0.35 0.75 1.55 "
        "3.15 5.65 8.15 10.65 13.15 15.65 18.15");
    rd.is_down = false;
    leave_until(30000);
    bool up = rds_is_up(RDS_MAIN);
    unsigned downs = 0;
    for (const char *p = log_buf; (p = strstr(p, "event=REDIS_DOWN ")); p++)
        downs++;
    row("D2 told once", up && downs == 1, "%d, %u", up, downs);
    /* once up, the pauses start again */
    rd.dials[0] = 0;
    rd.is_down = true;
    for (int k = 0; k < SOCK_CNT; k++)
        if (sock_tab[k] && sock_tab[k]->used
            && leave_is(sock_tab[k], "10.0.0.6")) {
            sock_tab[k]->in_at = world_ms;
            sock_tab[k]->in_off = sock_tab[k]->in_len = 0;
            sock_tab[k]->is_eof = true;
        }
    lv.begin = world_ms;
    leave_until(1000);
    /* both connections, each for itself */
    row_str("D2 the pauses after success", sl_str(rd.dials),
        "0.05 0.05 0.15 0.15 0.35 0.35 0.75 0.75");
    row_str("D2 nothing is left", sl_str(store_left()), "");
    /* what is not taken within the write time-out */
    store_reset(R_);
    store_start();
    leave_until(100);
    for (int k = 0; k < SOCK_CNT; k++)
        if (sock_tab[k] && sock_tab[k]->used
            && leave_is(sock_tab[k], "10.0.0.6"))
            sock_tab[k]->room = 0;
    int64_t begin = world_ms;
    rd.is_down = true;
    for (int k = 0; k < 2000 && rds_is_up(RDS_MAIN); k++)
        net_run(net_never, 10);
    row("D5 nothing is taken: 3 s", world_ms - begin >= 3000
        && world_ms - begin <= 3000 + LIM_TICK_MS + 10, "%lld ms",
        (long long)(world_ms - begin));
    row_str("D5 nothing is left", sl_str(store_left()), "");
    store_reset(R_ "?read_timeout=60&write_timeout=1");
    store_start();
    leave_until(100);
    for (int k = 0; k < SOCK_CNT; k++)
        if (sock_tab[k] && sock_tab[k]->used
            && leave_is(sock_tab[k], "10.0.0.6"))
            sock_tab[k]->room = 100;
    begin = world_ms;
    rd.is_down = true;
    for (int k = 0; k < 2000 && rds_is_up(RDS_MAIN); k++)
        net_run(net_never, 10);
    row("D5 no more is taken: the URL's write_timeout", world_ms - begin
        >= 1000 && world_ms - begin <= 1000 + LIM_TICK_MS + 10, "%lld ms",
        (long long)(world_ms - begin));
    row_str("D5 nothing is left", sl_str(store_left()), "");
}

/* ---- replies, element by element ---- */

static char reply_text[20000];
static unsigned reply_done;

static void reply_put(const struct rsp *e)
{
    size_t n = strlen(reply_text), cap = sizeof reply_text - n;
    static const char *const word[] = { "+", "-", ":", "$", "nil", "*" };
    if (cap < 200)
        return;
    if (e->type == RSP_BULK && !e->text.p)
        snprintf(reply_text + n, cap, "%s", e->n ? "long" : "$");
    else if (e->type == RSP_INT || e->type == RSP_ARRAY)
        snprintf(reply_text + n, cap, "%s%lld", word[e->type],
            (long long)e->n);
    else if (e->text.len > 100)
        snprintf(reply_text + n, cap, "%s%zu bytes", word[e->type],
            e->text.len);
    else
        snprintf(reply_text + n, cap, "%s%.*s", word[e->type],
            (int)e->text.len, e->text.len ? (const char *)e->text.p : "");
}

static void reply_item(const struct rsp *e, const unsigned *path,
    unsigned depth, int64_t now)
{
    size_t n = strlen(reply_text);
    (void)now;
    for (unsigned i = 0; i < depth && n < sizeof reply_text - 40; i++)
        n += (size_t)sprintf(reply_text + n, "%u%s", path[i],
            i + 1 < depth ? "." : "=");
    reply_put(e);
    if (strlen(reply_text) < sizeof reply_text - 2)
        strcat(reply_text, " ");
}

static void reply_end(uint16_t idx, const struct rsp *e, int64_t now)
{
    (void)idx;
    (void)now;
    reply_done++;
    if (e)
        reply_put(e);
    else
        strcat(reply_text, "lost");
}

static char reply_big[3][64000];

static void redis_reply_rows(void)
{
    static const struct { const char *raw, *want; size_t cap; } tab[] = {
        { "+OK\r\n", "+OK", 0 }, { ":-1\r\n", ":-1", 0 },
        { "*0\r\n", "*0", 0 }, { "*-1\r\n", "nil", 0 },
        { "$-1\r\n", "nil", 0 }, { "$0\r\n\r\n", "$", 0 },
        { "*2\r\n:1\r\n$1\r\nx\r\n", "0=:1 1=$x *2", 0 },
        { "*2\r\n*2\r\n:1\r\n:2\r\n*1\r\n:3\r\n",
          "0=*2 0.0=:1 0.1=:2 1=*1 1.0=:3 *2", 0 },
        { "*3\r\n*0\r\n*-1\r\n*1\r\n*0\r\n",
          "0=*0 1=nil 2=*1 2.0=*0 *3", 0 },
        { "*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n:7\r\n",
          "0=*1 0.0=*1 0.0.0=*1 0.0.0.0=*1 0.0.0.0.0=*1 0.0.0.0.0.0=*1 "
          "0.0.0.0.0.0.0=*1 0.0.0.0.0.0.0.0=:7 *1", 0 },
        { "*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n:7\r\n",
          "0=*1 0.0=*1 0.0.0=*1 0.0.0.0=*1 0.0.0.0.0=*1 0.0.0.0.0.0=*1 "
          "0.0.0.0.0.0.0=*1 lost", 0 },
        { "*40001\r\n", "lost", 0 }, { "*2\r\n:1\r\n?\r\n", "0=:1 lost", 0 },
        { "*2\r\n:1\r\n~", "0=:1 lost", 0 }, { "$5\r\nab~", "lost", 0 },
        { "$9000\r\nab~", "lost", 0 }, { "$9000\r\nab~", "lost", 9000 },
        { "-ERR x\r\n", "-ERR x", 0 },
        { "*2\r\n-ERR x\r\n+OK\r\n", "0=-ERR x 1=+OK *2", 0 },
        { reply_big[0], "0=$8192 bytes 1=long 2=:5 *3", 0 },
        { reply_big[1], "long", 29999 },
        { reply_big[1], "$30000 bytes", 30000 },
        { reply_big[2], "0=long 1=$30000 bytes 2=$1000 bytes *3", 30000 },
    };
    char *p = reply_big[0];
    p += sprintf(p, "*3\r\n$8192\r\n");
    memset(p, 'x', 8192);
    p += 8192;
    p += sprintf(p, "\r\n$8193\r\n");
    memset(p, 'y', 8193);
    strcpy(p + 8193, "\r\n:5\r\n");
    p = reply_big[1] + sprintf(reply_big[1], "$30000\r\n");
    memset(p, 'z', 30000);
    strcpy(p + 30000, "\r\n");
    p = reply_big[2] + sprintf(reply_big[2], "*3\r\n$31000\r\n");
    memset(p, 'z', 31000);
    p += 31000;
    p += sprintf(p, "\r\n$30000\r\n");
    memset(p, 'z', 30000);
    p += 30000;
    p += sprintf(p, "\r\n$1000\r\n");
    memset(p, 'w', 1000);
    strcpy(p + 1000, "\r\n");
    static struct rds_op op = { "TEST", 1, 0, 0, reply_item, reply_end };
    for (size_t i = 0; i < COUNT_OF(tab); i++)
        for (size_t chunk = 0; chunk < 4; chunk++) {
            static const size_t size[] = { SIZE_MAX, 1, 7, 1000 };
            store_reset(R_);
            store_mode = STORE_SINGLE;
            rds_start(RDS_MAIN, world_ms);
            leave_until(10);             /* INFO was answered */
            world_chunk = size[chunk];
            rd.raw = tab[i].raw;
            op.bulk_cap = tab[i].cap;
            reply_text[0] = 0;
            reply_done = 0;
            rds_send(RDS_MAIN, &op, 0, (sl[]){ SL("TEST") }, 1, world_ms);
            leave_until(40);
            bool lost = strstr(tab[i].want, "lost") != NULL;
            char got[400];
            snprintf(got, sizeof got, "%.399s", reply_text);
            bool ok = strcmp(got, tab[i].want) == 0 && reply_done == 1
                && rds_is_up(RDS_MAIN) == !lost;
            if (lost) {                      /* the next one starts afresh */
                rd.raw = NULL;
                world_chunk = SIZE_MAX;
                leave_until(1000);
                ok &= rds_is_up(RDS_MAIN);
            }
            const char *left = store_left();
            row(name_of("reply %.30s, %zu at a time", tab[i].raw,
                size[chunk]), ok && !left[0], "`%s`, done %u %s", got,
                reply_done, left);
        }
    /* replies in order, and each op told once when the connection dies */
    store_reset(R_);
    store_mode = STORE_SINGLE;
    rds_start(RDS_MAIN, world_ms);
    leave_until(10);
    reply_text[0] = 0;
    reply_done = 0;
    rd.instead[0] = "A :1\r\n";
    rd.instead[1] = "B *2\r\n:2\r\n:3\r\n";
    rd.instead[2] = "C close";
    op.bulk_cap = 0;
    for (const char *c = "ABACAB"; *c; c++)
        rds_send(RDS_MAIN, &op, 0, (sl[]){ { (const uint8_t *)c, 1 } }, 1,
            world_ms);
    leave_until(40);
    row_str("replies in order, then lost", sl_str(reply_text),
        ":10=:2 1=:3 *2:1lostlostlost");
    row_str("replies: nothing is left", sl_str(store_left()), "");
    /* the limit of elements is one reply's */
    store_reset(R_);
    store_mode = STORE_SINGLE;
    rds_start(RDS_MAIN, world_ms);
    leave_until(10);
    char *many = reply_big[0] + sprintf(reply_big[0], "*400\r\n");
    for (int i = 0; i < 400; i++)
        many += sprintf(many, ":1\r\n");
    rd.raw = reply_big[0];
    reply_done = 0;
    static const struct rds_op plain = { "TEST", 1, 0, 0, NULL, reply_end };
    for (int i = 0; i < 200; i++) {
        reply_text[0] = 0;
        rds_send(RDS_MAIN, &plain, 0, (sl[]){ SL("TEST") }, 1, world_ms);
        net_run(net_never, 5);
    }
    row("80,200 elements in 200 replies", reply_done == 200
        && rds_is_up(RDS_MAIN), "%u done", reply_done);
    row_str("200 replies: nothing is left", sl_str(store_left()), "");
    /* no buffer for a long one: it waits until there is one */
    store_reset(R_);
    store_mode = STORE_SINGLE;
    rds_start(RDS_MAIN, world_ms);
    leave_until(10);
    memset(big_used, true, sizeof big_used);
    reply_text[0] = 0;
    rd.raw = reply_big[1];
    op.bulk_cap = 30000;
    rds_send(RDS_MAIN, &op, 0, (sl[]){ SL("TEST") }, 1, world_ms);
    leave_until(1000);
    bool waits = reply_text[0] == 0 && rds_is_up(RDS_MAIN);
    memset(big_used, false, sizeof big_used);
    leave_until(1200);
    row("a long reply waits for a buffer", waits && strcmp(reply_text,
        "$30000 bytes") == 0, "%d `%s`", waits, reply_text);
    row_str("a long reply: nothing is left", sl_str(store_left()), "");
    /* as many commands as may be out */
    store_reset(R_);
    store_mode = STORE_SINGLE;
    rds_start(RDS_MAIN, world_ms);
    leave_until(10);
    reply_done = 0;
    unsigned cnt = 0;
    rd.raw = "+OK\r\n";
    while (rds_has_room(RDS_MAIN, 100, 1) && cnt < 1000) {
        rds_send(RDS_MAIN, &op, 0, (sl[]){ SL("TEST") }, 1, world_ms);
        cnt++;
    }
    leave_until(40);
    row("commands at once", cnt == LIM_REDIS_OPS && reply_done == cnt,
        "%u, %u answered", cnt, reply_done);
    row_str("commands at once: nothing is left", sl_str(store_left()), "");
}

/* ---- records read at the start ---- */

/* A record's value: T, and how long ago it was restarted. */
static const char *store_value(const char *delay_id, int64_t t_ms,
    int64_t ago_ms, const char *more)
{
    static char text[4][STORE_TEXT];
    static unsigned turn;
    char at[60];
    char *out = text[turn++ % 4];
    int64_t ms = world_wall + world_ms - ago_ms;
    struct bb b = { (uint8_t *)at, 0, sizeof at - 1, false };
    bb_rfc3339(&b, ms);
    at[b.len] = 0;
    snprintf(out, STORE_TEXT, "{\"Params\":{\"DelayId\":\"%s\","
        "\"DelayTimeout\":%lld,\"ServerName\":\"a.org\",\"LiveKitRoom\":"
        "\"%s\",\"LiveKitIdentity\":\"I1\"%s},\"RestartedAt\":\"%s\"}",
        delay_id, (long long)t_ms * 1000000, leave_room, more, at);
    return out;
}

static const char *store_field(void)
{
    static char text[100];
    snprintf(text, sizeof text, "[\"%s\",\"I1\"]", leave_room);
    return text;
}

static unsigned log_count(const char *what)
{
    unsigned n = 0;
    for (const char *p = log_buf; (p = strstr(p, what)) != NULL; p++)
        n++;
    return n;
}

static void redis_restore_rows(void)
{
    static const struct { const char *name; int64_t t, ago; const char *more;
        const char *script, *calls, *state; unsigned rec;
        const char *log; int64_t end_ms; } tab[] = {
#define COUNT_(c, e, b) "count=" #c " expired=" #e " bad=" #b "\n"
        { "waiting", 100000, 10000, "", "", "", "waiting", 1,
          COUNT_(1, 0, 0), 50000 },
        { "waiting: the full wait again", 100000, 10000, "", "", "100S",
          "sent", 0, NULL, 101000 },
        { "waiting, found", 100000, 10000, "", "0:sfu=present", "0R 60R",
          "connected", 1, NULL, 61000 },
        { "waiting, found by the second identity", 100000, 10000,
          ",\"LiveKitIdentity2\":\"I2\"", "0:sfu2=present", "0R",
          "connected", 1, NULL, 1000 },
        { "connected, and there", 100000, 10000, ",\"Connected\":true",
          "0:sfu=present", "0R 60R", "connected", 1, COUNT_(1, 0, 0),
          61000 },
        { "connected, absent twice", 100000, 10000, ",\"Connected\":true",
          "", "0R 20S", "sent", 0, NULL, 30000 },
        { "connected, unknown", 100000, 10000, ",\"Connected\":true",
          "0:sfu=500", "0R 60R", "connected", 1, NULL, 61000 },
        { "connected, restarted at the last moment", 100000, 99000,
          ",\"Connected\":true", "0:sfu=present 0:hs=503", "0R",
          "deadline passed", 0, NULL, 2000 },
        { "connected, left with its sid", 100000, 10000,
          ",\"Connected\":true,\"Sid\":\"S1\"", "0:sfu=present 5:sfu=absent "
          "5:left=1", "0R 5S", "sent", 0, NULL, 10000 },
        { "connected, left with another", 100000, 10000,
          ",\"Connected\":true,\"Sid\":\"S9\"", "0:sfu=500 1:left=1",
          "0R 60R", "connected", 1, NULL, 61000 },
        { "just not expired", 100000, 99900, "", "", "", "waiting", 1,
          COUNT_(1, 0, 0), 50 },
        { "expired", 100000, 100000, "", "0:sfu=present", "", "no job", 0,
          COUNT_(0, 1, 0), 1000 },
        { "expired, connected", 100000, 100001, ",\"Connected\":true", "",
          "", "no job", 0, COUNT_(0, 1, 0), 1000 },
        { "T of 0", 0, 0, "", "", "", "no job", 0, COUNT_(0, 1, 0), 1000 },
        { "negative T", -5, -1000, "", "", "", "no job", 0,
          COUNT_(0, 1, 0), 1000 },
        { "restarted in the future", 100000, -50000, ",\"Connected\":true",
          "0:sfu=present 0:hs=hang", "0R 6R 12R 18.125R 24.812R 32.343R "
          "41.139R 51.833R 65.374R 83.186R", "deadline passed", 0,
          NULL, 101000 },
    };
    for (int single = 0; single < 2; single++)
        for (size_t i = 0; i < COUNT_OF(tab); i++) {
            store_reset(R_);
            lv.is_legacy = true;
            strcpy(lv.id, "I1");
            rd.instead[0] = single ? "TICK -ERR unknown command\r\n" : NULL;
            store_hset(store_field(), store_value("D", tab[i].t, tab[i].ago,
                tab[i].more));
            strcpy(lv.room, leave_room);
            store_start();
            leave_play(tab[i].script);
            leave_until(tab[i].end_ms);
            char state[200];
            snprintf(state, sizeof state, "%s", leave_state());
            /* shared: leaving looks once more, then reads the lease */
            bool ok = strcmp(lv.calls, tab[i].calls) == 0
                && strcmp(state, tab[i].state) == 0
                && rd.rec_cnt == tab[i].rec
                && (!tab[i].log || log_has(tab[i].log));
            const char *left = store_left();
            row(name_of("restored: %s%s", tab[i].name, single
                        ? ", single" : ""), ok && !left[0], "`%s` %s, %u "
                "records %s %s", lv.calls, state, rd.rec_cnt, left, log_buf);
        }
    /* what is left where it is, and told */
    static const struct { const char *name, *field, *value, *reason;
        unsigned rec; } bad[] = {
        { "no JSON", "[]", "x", "reason=\"value is not the JSON object "
          "expected\"", 1 },
        { "no full access", FIELD_, VALUE_(T_, "",
          "2027-01-15T07:00:00Z"), "full access", 1 },
        { "a long value", FIELD_, resp_line[0], "", 1 },
    };
    for (int single = 0; single < 2; single++)
        for (size_t i = 0; i < COUNT_OF(bad); i++) {
            store_reset(R_);
            cfg.full_access_cnt = 1;         /* a.org alone */
            rd.instead[0] = single ? "TICK -NOPERM x\r\n" : NULL;
            store_hset(bad[i].field, bad[i].value);
            store_hset(store_field(), store_value("D", 100000, 0, ""));
            store_start();
            leave_until(3000);
            row(name_of("not restored: %s%s", bad[i].name, single
                        ? ", single" : ""), rd.rec_cnt == 2
                && log_has(COUNT_(1, 0, 1)) && log_has(bad[i].reason)
                && strcmp(leave_state(), "waiting") == 0
                && rep_is_ready() && log_count("event=REDIS_ENTRY_BAD ")
                == 1, "%u records, %s %s", rd.rec_cnt, leave_state(),
                log_buf);
            row_str(name_of("not restored: %s: nothing is left",
                bad[i].name), sl_str(store_left()), "");
        }
    /* a clock before the build date proves nothing */
    store_reset(R_);
    world_wall = 1700000000000 - world_ms;
    lv.is_legacy = true;
    store_hset(store_field(), store_value("D", 100000, 500000, ""));
    store_start();
    leave_until(1000);
    row("restored: the clock is wrong", rd.rec_cnt == 1
        && strcmp(leave_state(), "waiting") == 0, "%u records, %s",
        rd.rec_cnt, leave_state());
    row_str("restored: the clock is wrong: nothing is left",
        sl_str(store_left()), "");
    /* a field that is not spelled as ours */
    for (int single = 0; single < 2; single++) {
        char field[120];
        store_reset(R_);
        lv.is_legacy = true;
        rd.instead[0] = single ? "TICK -NOPERM x\r\n" : NULL;
        snprintf(field, sizeof field, " [\"%s\", \"\\u0049" "1\"]",
            leave_room);
        store_hset(field, store_value("D", 100000, 0, ""));
        store_start();
        leave_until(5000);
        row(single ? "restored: another spelling, single"
            : "restored: another spelling", rd.rec_cnt == 1
            && strcmp(rd.rec[0].field, store_field()) == 0
            && strcmp(leave_state(), "waiting") == 0, "%u records, %s, %s",
            rd.rec_cnt, rd.rec[0].field, leave_state());
        leave_until(101000 + 5000);
        row("another spelling: sent once, deleted", rd.rec_cnt == 0
            && lv.sends == 1, "%u records, %u sends", rd.rec_cnt, lv.sends);
        row_str("another spelling: nothing is left", sl_str(store_left()),
            "");
    }
}

/* Redis' memory of who left, and of delegations that were replaced. */
static void store_stream_hook(const char *event, const char *secret);

static void redis_memory_rows(void)
{
    static const struct { const char *name; int64_t ago; bool connected;
        const char *event, *calls; } tab[] = {
        { "left a minute ago", 60000, true, "participant_left", "0S" },
        { "left two minutes and more ago", 125000, true, "participant_left",
          "0R 20S" },
        { "joined a minute ago", 60000, true, "participant_joined",
          "0R 20S" },
        { "left before it delegated", 60000, false, "participant_left",
          "" },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        store_reset(R_);
        lv.is_legacy = true;
        world_wall -= tab[i].ago;
        store_stream_hook(tab[i].event, "devsecret");
        world_wall += tab[i].ago;
        store_hset(store_field(), store_value("D", 1000000, tab[i].connected
            ? 100000 : 10000, tab[i].connected
            ? ",\"Connected\":true,\"Sid\":\"S1\"" : ""));
        store_start();
        leave_until(30000);
        row_str(name_of("restored: %s", tab[i].name), sl_str(lv.calls),
            tab[i].calls);
        row_str(name_of("restored: %s: nothing is left", tab[i].name),
            sl_str(store_left()), "");
    }
    /* the notice of a delegation that another has replaced since */
    for (int late = 0; late < 2; late++) {
        store_reset(R_);
        lv.is_legacy = true;
        if (!late)
            store_xadd((const char *const[]){ "job", store_field(), "record",
                store_value("old", 100000, 0, "") }, NULL);
        store_hset(store_field(), store_value("new", 100000, 0, ""));
        store_start();
        leave_until(1000);
        if (late)                        /* this one comes after it */
            store_hset(store_field(), store_value("later", 100000, 0, ""));
        if (late)
            store_xadd((const char *const[]){ "job", store_field(), "record",
                store_value("later", 100000, 0, "") }, NULL);
        leave_until(3000);
        const struct job *j = job_find(SL(leave_room), SL("I1"));
        row_str(late ? "a newer notice replaces" : "an old notice does not",
            j ? (sl){ j->delay_id, j->delay_len } : SL("none"), late
            ? "later" : "new");
        row_str("a notice: nothing is left", sl_str(store_left()), "");
    }
}

/* ---- a life with Redis, each system call failing in turn ---- */

/* Two stored jobs, one more delegated, its webhooks by the stream; in the
 * end nothing is stored but what cannot be read. */
static void store_life(bool single, int *status)
{
    struct sock *s[4];
    store_reset(R_);
    lv.is_legacy = true;
    rd.instead[0] = single ? "TICK -NOPERM x\r\n" : NULL;
    store_hset("not ours", "{}");
    store_hset(store_field(), store_value("one", 8000, 0, ""));
    char *other = rd.rec[rd.rec_cnt].field;
    store_hset("x", store_value("two", 20000, 0,
        ",\"Connected\":true"));
    snprintf(other, sizeof rd.rec[0].field, "[\"%s\",\"I5\"]", leave_room);
    char *id = strstr(rd.rec[rd.rec_cnt - 1].value, "\"I1\"");
    id[2] = '5';
    store_start();
    leave_until(2000);
    s[0] = leave_post_job("20000");
    leave_until(6000);
    *status = leave_status(s[0]);
    for (size_t i = 0; i < job_top; i++)
        if (job_pool[i].state != J_FREE && job_pool[i].delay_len == 5)
            snprintf(lv.room, sizeof lv.room, "%.*s", HASH_NAME_LEN,
                job_pool[i].alias);
    strcpy(lv.script[1], "present");
    s[1] = leave_post_hook("participant_joined", "", "devsecret");
    leave_until(9000);
    s[2] = leave_post_hook("room_finished", "", "devsecret");
    s[2]->is_reset = true;               /* gone before the answer */
    s[2]->dial_errno = ECONNRESET;
    leave_until(15000);
    strcpy(lv.script[1], "absent");
    s[3] = leave_post_hook("participant_left",
        ",\"disconnectReason\":\"CLIENT_INITIATED\"", "devsecret");
    leave_until(100000);
    for (int i = 0; i < 4; i++)
        s[i]->is_eof = true;
    net_run(net_never, 1000);
}

static unsigned store_sent_of[3];

static void store_keep_book(sl delay_id, bool is_send, bool ok)
{
    static const char *const name[] = { "one", "two", "syd_x" };
    for (size_t i = 0; i < 3; i++)
        store_sent_of[i] += is_send && ok
            && sl_eq(delay_id, sl_str(name[i]));
}

static void redis_life_rows(void)
{
    static const int err[] = { 0, EINTR, EAGAIN, ECONNRESET, ENOBUFS,
        EMFILE };
    static const char *const err_name[] = { "short", "EINTR", "EAGAIN",
        "ECONNRESET", "ENOBUFS", "EMFILE" };
    for (int single = 0; single < 2; single++) {
        long calls = 0;
        for (size_t e = 0; e < COUNT_OF(err); e++) {
            unsigned odd = 0, runs = 0, refused = 0;
            /* the later ones are ticks and what they wait for */
            for (long at = -1; at < calls || at < 0;
                 at += at < 250 ? 1 : 11) {
                int status = 0;
                memset(store_sent_of, 0, sizeof store_sent_of);
                fault_seen = 0;
                store_fault = at < 0 ? FAULT_NONE : at;
                fault_errno = err[e];
                store_life(single, &status);
                if (at < 0)
                    calls = fault_seen;
                fault_at = FAULT_NONE;
                for (unsigned i = 0; i < world_client_cnt; i++)
                    world_client[i]->used = false;
                world_client_cnt = 0;
                bool ok = rd.rec_cnt == 1
                    && strcmp(rd.rec[0].field, "not ours") == 0
                    && met.gauge[GA_UNSAVED] == 0 && store_sent_of[0] >= 1
                    && store_sent_of[1] >= 1
                    && store_sent_of[2] >= (status == 200);
                refused += status != 200;
                char left[900];
                snprintf(left, sizeof left, "%s", store_left());
                runs++;
                if ((!ok || left[0]) && odd++ < 3)
                    row(name_of("with Redis%s: call %ld of %ld: %s",
                        single ? ", single" : "", at, calls, err_name[e]),
                        false, "%d, %u records, unsaved %lld, sent %u %u %u "
                        "%s", status, rd.rec_cnt,
                        (long long)met.gauge[GA_UNSAVED], store_sent_of[0],
                        store_sent_of[1], store_sent_of[2], left);
            }
            row(name_of("with Redis%s: %u of %ld calls fail in turn: %s",
                single ? ", single" : "", runs, calls, err_name[e]),
                odd == 0 && runs > 100 && refused * 4 < runs, "%u odd, %u "
                "refused", odd, refused);
        }
    }
}

/* ---- other replicas, and a Redis that fails ---- */

static const char store_other[] = "ffffffffffffffff";

/* The shard of the job that leave_post_job delegates. */
static unsigned store_shard(const char *field)
{
    uint8_t sum[32];
    sha256(sl_str(field), sum);
    return sum[0] % LIM_SHARD_CNT;
}

static const char *store_web_field(void)
{
    static char text[200];
    char id[HASH_NAME_LEN + 1] = { 0 };
    const sl part[] = { SL("@u:a.org"), SL("D"), SL("m") };
    if (!jwt_hash_name(part, 3, (uint8_t *)id))
        abort();
    snprintf(text, sizeof text, "[\"6TgetaaS8wD6iiMztRaqyYjgTgu8xuTmPJNX//"
        "bFre8\",\"%s\"]", id);
    return text;
}

static void store_give(unsigned shard, const char *who, int64_t end)
{
    snprintf(rd.lease[shard], sizeof rd.lease[0], "%s", who);
    rd.lease_end[shard] = end;
}

static const char *store_pair_value;     /* a record that is there before */

/* Connected; another replica holds every second shard, `ours` but never
 * `theirs` (-1: as it comes). */
static void store_pair(int ours, int theirs)
{
    store_reset(R_);
    lv.is_legacy = true;
    strcpy(rd.other, store_other);
    unsigned given = 0;
    if (theirs >= 0) {
        store_give((unsigned)theirs, store_other, INT64_MAX);
        given++;
    }
    for (unsigned k = 0; k < LIM_SHARD_CNT && given < 32; k++)
        if ((int)k != ours && (int)k != theirs) {
            store_give(k, store_other, INT64_MAX);
            given++;
        }
    if (store_pair_value)
        store_hset(store_field(), store_pair_value);
    store_pair_value = NULL;
    store_start();
    leave_until(100);
}

static void store_forge(void)
{
    store_stream_hook("participant_left", "another");
    store_stream_hook("participant_joined", "devsecret");
    /* a body under the token of another */
    snprintf(rd.ev[rd.ev_cnt - 1].val[1], STORE_TEXT, "{\"event\":"
        "\"participant_left\",\"room\":{\"name\":\"%s\"},"
        "\"participant\":{\"identity\":\"I1\",\"disconnectReason\":1},"
        "\"id\":\"x\"}", leave_room);
}

static void store_done(const char *name)
{
    char left[900];
    snprintf(left, sizeof left, "%s", store_left());
    row_str(name_of("%s: nothing is left", name), sl_str(left), "");
}

/* What a webhook's token and body are, as they stand in the stream. */
static void store_stream_hook(const char *event, const char *secret)
{
    char body[600];
    static unsigned number;
    snprintf(body, sizeof body, "{\"event\":\"%s\",\"room\":"
        "{\"name\":\"%s\"},\"participant\":{\"identity\":\"I1\",\"sid\":"
        "\"S1\",\"disconnectReason\":1},\"id\":\"S_%u\"}", event, leave_room,
        number++);
    store_xadd((const char *const[]){ "token", hook_token(body, secret),
        "body", body }, NULL);
}

/* Until the client is answered; a clock that stands still ends it. */
static void store_await(const struct sock *s)
{
    int64_t at = world_ms - 1;
    for (int k = 0; k < 2000 && !leave_status(s) && world_ms > at; k++) {
        at = world_ms;
        net_run(net_never, 10);
    }
}

static void store_kill_connections(void)
{
    for (int k = 0; k < SOCK_CNT; k++)
        if (sock_tab[k] && sock_tab[k]->used
            && leave_is(sock_tab[k], "10.0.0.6")) {
            sock_tab[k]->in_at = world_ms;
            sock_tab[k]->in_off = sock_tab[k]->in_len = 0;
            sock_tab[k]->is_eof = true;
        }
}

static void redis_share_rows(void)
{
    unsigned web = store_shard(store_web_field());
    unsigned mine = store_shard(store_field());
    /* who starts a delegated job */
    for (int ours = 0; ours < 2; ours++) {
        store_pair(ours ? (int)web : -1, ours ? -1 : (int)web);
        row("32 shards of 64", met.gauge[GA_SHARDS] == 32
            && met.gauge[GA_REPLICAS] == 2, "%lld of %lld replicas",
            (long long)met.gauge[GA_SHARDS],
            (long long)met.gauge[GA_REPLICAS]);
        struct sock *s = leave_post_job("100000");
        net_run(net_never, 5000);
        row(ours ? "a delegation of our shard" : "one of another's shard",
            leave_status(s) == 200 && rd.rec_cnt == 1 && rd.ev_cnt == 1
            && strcmp(rd.rec[0].field, store_web_field()) == 0
            && met.gauge[GA_JOBS] == ours
            && log_has("event=JOB_HANDED ") == !ours, "%d, %s, %lld jobs %s",
            leave_status(s), rd.rec[0].field, (long long)met.gauge[GA_JOBS],
            log_buf);
        s->is_eof = true;
        store_done("a delegation");
    }
    /* a notice of another replica */
    for (int ours = 0; ours < 2; ours++) {
        store_pair(ours ? (int)mine : -1, ours ? -1 : (int)mine);
        const char *value = store_value("D", 100000, 0, "");
        store_hset(store_field(), value);
        store_xadd((const char *const[]){ "job", store_field(), "record",
            value }, NULL);
        net_run(net_never, 1000);
        row(ours ? "a notice for our shard" : "a notice for another's",
            strcmp(leave_state(), ours ? "waiting" : "no job") == 0, "%s",
            leave_state());
        /* the webhooks of others act here, forged ones do not */
        strcpy(lv.script[0], "present");
        net_run(net_never, 5000);
        strcpy(lv.script[0], "absent");
        store_forge();
        store_xadd((const char *const[]){ "x", "1", "y", "2" }, NULL);
        store_xadd((const char *const[]){ "token", "", "body", "" }, NULL);
        store_xadd((const char *const[]){ "job", "[]", "record", "{}" },
            NULL);
        net_run(net_never, 1000);
        unsigned before = lv.sends;
        store_stream_hook("participant_left", "devsecret");
        net_run(net_never, 2000);
        row(ours ? "webhooks of the stream" : "webhooks of others' jobs",
            before == 0 && lv.sends == (unsigned)ours
            && lv.restarts == (unsigned)ours
            && rd.rec_cnt == (unsigned)!ours
            && log_count("event=WEBHOOK_BAD ") == 4, "%u, %u sends, %u "
            "restarts, %u records %s", before, lv.sends, lv.restarts,
            rd.rec_cnt, log_buf);
        store_done("a notice");
    }
    /* Redis forgot the delegation before it could say what stands there */
    for (int lost = 0; lost < 2; lost++) {
        store_pair((int)mine, -1);
        rd.instead[0] = lost ? "NOTICE close" : NULL;
        rd.once = true;
        store_xadd((const char *const[]){ "job", store_field(), "record",
            store_value("D", 100000, 0, "") }, NULL);
        net_run(net_never, 3000);
        bool used = false;
        for (size_t i = 0; i < LIM_NOTICE_CNT; i++)
            used |= notice_pool[i].is_used;
        row(lost ? "a notice nobody can confirm" : "a notice of what is over",
            strcmp(leave_state(), lost ? "waiting" : "no job") == 0 && !used
            && log_has("event=REDIS_DOWN ") == lost, "%s, %s",
            leave_state(), log_buf);
        store_done("a notice without its record");
    }
    /* what is stored of another's shard is its own business */
    for (int ours = 0; ours < 2; ours++) {
        store_reset(R_);                 /* for the clock of the record */
        store_pair_value = store_value("D", 100000, 0, "");
        store_pair(ours ? (int)mine : -1, ours ? -1 : (int)mine);
        leave_until(5000);
        row(ours ? "a record of our shard" : "a record of another's",
            strcmp(leave_state(), ours ? "waiting" : "no job") == 0
            && rd.rec_cnt == 1, "%s", leave_state());
        store_done("a record");
    }
    /* the other dies: its jobs are ours within the lease and a tick */
    store_pair(-1, (int)mine);
    store_hset(store_field(), store_value("D", 100000, 0,
        ",\"Connected\":true"));
    net_run(net_never, 5000);
    bool none = lv.restarts == 0 && strcmp(leave_state(), "no job") == 0;
    rd.other[0] = 0;
    for (unsigned k = 0; k < LIM_SHARD_CNT; k++)
        if (rd.lease_end[k] == INT64_MAX)
            rd.lease_end[k] = world_ms + LIM_LEASE_MS;
    strcpy(lv.script[0], "present");
    net_run(net_never, 5000);
    row("a takeover within 5 s", none && lv.restarts == 1
        && strcmp(leave_state(), "connected") == 0
        && met.gauge[GA_SHARDS] == 64, "%d, %u restarts, %s, %lld shards",
        none, lv.restarts, leave_state(), (long long)met.gauge[GA_SHARDS]);
    store_done("a takeover");
    /* another comes: it gets its share, its jobs are let go */
    store_pair(-1, -1);
    rd.other[0] = 0;
    for (unsigned k = 0; k < LIM_SHARD_CNT; k++)
        if (rd.lease_end[k] == INT64_MAX)
            rd.lease[k][0] = 0;
    net_run(net_never, 3000);
    int64_t held = met.gauge[GA_SHARDS];
    strcpy(rd.other, store_other);
    for (int s = 0; s < 200; s++) {          /* as its own ticks would */
        net_run(net_never, 500);
        for (unsigned k = 0; k < LIM_SHARD_CNT; k++)
            if (!rd.lease[k][0])
                store_give(k, store_other, INT64_MAX);
    }
    row("another replica gets its share", held == 64
        && met.gauge[GA_SHARDS] == 32, "%lld, then %lld", (long long)held,
        (long long)met.gauge[GA_SHARDS]);
    store_done("another replica");
    /* a lease that is another's by now: nothing is sent */
    for (int lost = 0; lost < 2; lost++) {
        store_pair((int)mine, -1);
        store_hset(store_field(), store_value("D", 100000, 0,
            ",\"Connected\":true"));
        store_xadd((const char *const[]){ "job", store_field(), "record",
            rd.rec[0].value }, NULL);
        strcpy(lv.script[0], "present");
        net_run(net_never, 3000);
        bool is = strcmp(leave_state(), "connected") == 0;
        strcpy(lv.script[0], "absent");
        if (lost)
            store_give(mine, store_other, INT64_MAX);
        store_stream_hook("participant_left", "devsecret");
        net_run(net_never, 5000);
        row(lost ? "the lease is gone: no send" : "the lease is there: sent",
            is && lv.sends == (unsigned)!lost
            && rd.rec_cnt == (unsigned)lost
            && met.gauge[GA_JOBS] == 0, "%d, %u sends, %u records, %lld "
            "jobs", is, lv.sends, rd.rec_cnt, (long long)met.gauge[GA_JOBS]);
        store_done("a lease");
    }
    /* we slept, others went on: nothing is done by old rights */
    store_pair((int)mine, -1);
    store_hset(store_field(), store_value("D", 100000, 0,
        ",\"Connected\":true"));
    store_xadd((const char *const[]){ "job", store_field(), "record",
        rd.rec[0].value }, NULL);
    strcpy(lv.script[0], "present");
    net_run(net_never, 3000);
    unsigned before = lv.restarts;
    world_ms += 70000;                       /* a restart is overdue */
    rd.wait_ms = 500;                        /* and Redis tells it late */
    for (unsigned k = 0; k < LIM_SHARD_CNT; k++)
        store_give(k, store_other, INT64_MAX);
    net_run(net_never, 20000);
    row("after a sleep the old rights are void", before == 1
        && lv.restarts == 1 && lv.sends == 0 && met.gauge[GA_JOBS] == 0,
        "%u, %u restarts, %u sends, %lld jobs", before, lv.restarts,
        lv.sends, (long long)met.gauge[GA_JOBS]);
    store_done("a sleep");
}

static void redis_outage_rows(void)
{
    /* away for ten minutes: jobs live on, what is new is kept */
    for (int pair = 0; pair < 2; pair++) {
        if (pair)
            store_pair((int)store_shard(store_web_field()), -1);
        else
            store_reset(R_);
        lv.is_legacy = true;
        if (!pair)
            store_start();
        net_run(net_never, 1000);
        rd.is_down = true;
        store_kill_connections();
        net_run(net_never, 100);
        int64_t begin = world_ms;
        struct sock *s = leave_post_job("60000");
        store_await(s);
        row("Redis is away: a delegation within 3 s", leave_status(s) == 200
            && world_ms - begin <= 3000, "%d, %lld ms", leave_status(s),
            (long long)(world_ms - begin));
        (void)leave_web_job();
        net_run(net_never, 10000);
        strcpy(lv.script[1], "present");
        struct sock *hook = leave_post_hook("participant_joined", "",
            "devsecret");
        net_run(net_never, 600000);
        row(pair ? "Redis is away, others may miss the webhook: 503"
            : "Redis is away: a webhook is taken",
            leave_status(hook) == (pair ? 503 : 200), "%d",
            leave_status(hook));
        row("Redis is away: restarts go on", lv.restarts >= 10
            && met.gauge[GA_JOBS] == 1 && met.gauge[GA_REDIS] == 0
            && met.gauge[GA_UNSAVED] == 1 && rd.rec_cnt == 0, "%u restarts, "
            "%lld jobs, %lld unsaved", lv.restarts,
            (long long)met.gauge[GA_JOBS], (long long)met.gauge[GA_UNSAVED]);
        rd.is_down = false;
        for (unsigned k = 0; k < LIM_SHARD_CNT; k++)
            if (rd.lease_end[k] != INT64_MAX)
                rd.lease[k][0] = 0;
        net_run(net_never, 30000);
        row("Redis is back: all is written", met.gauge[GA_UNSAVED] == 0
            && rd.rec_cnt == 1 && strstr(rd.rec[0].value, "\"Connected\":true")
            && met.gauge[GA_JOBS] == 1 && lv.sends == 0
            && met.gauge[GA_REDIS] == 1, "%lld unsaved, %u records, %lld "
            "jobs, %u sends", (long long)met.gauge[GA_UNSAVED], rd.rec_cnt,
            (long long)met.gauge[GA_JOBS], lv.sends);
        s->is_eof = hook->is_eof = true;
        store_done("Redis is away");
    }
    /* another Redis, and one that forgot all: written again from memory */
    for (int flush = 0; flush < 3; flush++) {
        store_reset(R_);
        lv.is_legacy = true;
        store_hset(store_field(), store_value("D", 100000, 0,
            ",\"Connected\":true"));
        strcpy(lv.script[0], "present");
        store_start();
        net_run(net_never, 3000);
        bool is = strcmp(leave_state(), "connected") == 0
            && rd.rec_cnt == 1;
        rd.rec_cnt = rd.ev_cnt = 0;
        if (flush < 2)                   /* 2: only its name tells */
            ZERO(rd.lease);
        rd.run_id = flush == 1 ? NULL : "def";
        if (flush != 1)
            store_kill_connections();
        net_run(net_never, 15000);
        row(flush == 1 ? "a Redis that forgot" : "another Redis", is
            && rd.rec_cnt == 1 && log_has("event=REDIS_CHANGED ")
            && strcmp(leave_state(), "connected") == 0 && lv.sends == 0
            && strstr(rd.rec[0].value, "\"DelayId\":\"D\"") != NULL,
            "%d, %u records, %s, %u sends %s", is, rd.rec_cnt,
            leave_state(), lv.sends, log_buf);
        /* and the participant that left meanwhile is found out */
        strcpy(lv.script[0], "absent");
        net_run(net_never, 100000);
        row(flush == 1 ? "a Redis that forgot: later sent"
            : "another Redis: later sent", lv.sends == 1 && rd.rec_cnt == 0,
            "%u sends, %u records", lv.sends, rd.rec_cnt);
        store_done("another Redis");
    }
    /* refused writes are repeated, the job lives */
    static const char *const refusal[] = { "STORE -OOM x\r\n",
        "STORE -READONLY x\r\n", "STORE hang", "STORE close",
        "STORE -BUSY x\r\n", "STORE -LOADING x\r\n", "STORE $-1\r\n",
        "STORE -NOPERM x\r\n", "STORE *0\r\n", "STORE -ERR x\r\n" };
    for (size_t i = 0; i < COUNT_OF(refusal); i++) {
        store_reset(R_);
        lv.is_legacy = true;
        store_start();
        net_run(net_never, 1000);
        rd.instead[0] = refusal[i];
        rd.once = true;
        struct sock *s = leave_post_job("100000");
        int64_t begin = world_ms;
        store_await(s);
        int64_t ms = world_ms - begin;
        net_run(net_never, 20000);
        row(name_of("refused once: %s", refusal[i]), leave_status(s) == 200
            && ms <= 3100 && rd.rec_cnt == 1 && met.gauge[GA_UNSAVED] == 0
            && log_has("event=REDIS_DOWN ") == (i >= 1 && i <= 3)
            && met.gauge[GA_JOBS] == 1, "%d after %lld ms, %u records, %lld "
            "unsaved, %lld jobs %s", leave_status(s), (long long)ms,
            rd.rec_cnt, (long long)met.gauge[GA_UNSAVED],
            (long long)met.gauge[GA_JOBS], log_buf);
        s->is_eof = true;
        store_done("refused once");
    }
    /* asked for while the leases are in doubt: answered in time */
    store_reset(R_);
    lv.is_legacy = true;
    store_start();
    net_run(net_never, 1000);
    rd.instead[0] = "TICK hang";
    unsigned commands = rd.commands;
    for (int k = 0; k < 1000 && rd.commands == commands; k++)
        net_run(net_never, 10);
    net_run(net_never, 2800);
    struct sock *doubt = leave_post_job("100000");
    int64_t begin = world_ms;
    store_await(doubt);
    row("a delegation while Redis hangs", leave_status(doubt) == 200
        && world_ms - begin <= 3000 && met.gauge[GA_JOBS] == 1, "%d after "
        "%lld ms", leave_status(doubt), (long long)(world_ms - begin));
    doubt->is_eof = true;
    store_done("while Redis hangs");
    /* what Redis could do at the start it can do later */
    store_reset(R_);
    lv.is_legacy = true;
    store_start();
    net_run(net_never, 1000);
    rd.instead[0] = "TICK -NOPERM x\r\n";
    rd.once = true;
    net_run(net_never, 10000);
    row("a tick is forbidden later: no other mode", store_mode
        == STORE_SHARED && rds_is_up(RDS_MAIN) && !log_has("REDIS_SINGLE")
        && log_has("command=EVAL code=NOPERM")
        && met.gauge[GA_SHARDS] == 64, "mode %d %s", store_mode, log_buf);
    store_done("a tick is forbidden");
    /* a restart renews the record */
    for (int single = 0; single < 2; single++) {
        char at[40];
        store_reset(R_);
        lv.is_legacy = true;
        rd.instead[0] = single ? "TICK -NOPERM x\r\n" : NULL;
        store_hset(store_field(), store_value("D", 10000, 1000,
            ",\"Connected\":true"));
        strcpy(lv.script[0], "present");
        store_start();
        leave_until(13000);                  /* restarts at 0, 6 and 12 s */
        struct bb b = { (uint8_t *)at, 0, sizeof at - 1, false };
        bb_rfc3339(&b, world_wall + lv.begin + 12000);
        at[19] = 0;
        row("a restart renews the record", rd.rec_cnt == 1
            && lv.restarts == 3 && strstr(rd.rec[0].value, at)
            && strstr(rd.rec[0].value, "\"Connected\":true"), "%u "
            "restarts, %s: %s", lv.restarts, at, rd.rec[0].value);
        store_done("a restart renews");
    }
    /* more to tell while the delegation is being written */
    for (int single = 0; single < 2; single++) {
        store_reset(R_);
        lv.is_legacy = true;
        rd.instead[0] = single ? "TICK -NOPERM x\r\n" : NULL;
        store_start();
        net_run(net_never, 1000);
        rd.wait_ms = 400;
        strcpy(lv.script[0], "present");     /* found and restarted at once */
        struct sock *s = leave_post_job("100000");
        net_run(net_never, 10000);
        row("connected while it is written", leave_status(s) == 200
            && rd.rec_cnt == 1 && met.gauge[GA_UNSAVED] == 0
            && lv.restarts == 1
            && strstr(rd.rec[0].value, "\"Connected\":true"), "%d, %u "
            "records, %lld unsaved, %u restarts", leave_status(s),
            rd.rec_cnt, (long long)met.gauge[GA_UNSAVED], lv.restarts);
        s->is_eof = true;
        store_done("connected while it is written");
    }
    /* delegated again while the first is being written */
    for (int single = 0; single < 2; single++) {
        store_reset(R_);
        lv.is_legacy = true;
        rd.instead[0] = single ? "TICK -NOPERM x\r\n" : NULL;
        store_start();
        net_run(net_never, 1000);
        rd.wait_ms = 400;
        struct sock *s[2];
        s[0] = leave_post_job("100000");
        net_run(net_never, 100);
        s[1] = leave_post_job("50000");
        net_run(net_never, 10000);
        row("replaced while it is written", leave_status(s[0]) == 200
            && leave_status(s[1]) == 200 && rd.rec_cnt == 1
            && strstr(rd.rec[0].value, "\"DelayTimeout\":50000000000,")
            && met.gauge[GA_UNSAVED] == 0 && met.gauge[GA_JOBS] == 1,
            "%d %d, %u records, %lld unsaved, %lld jobs", leave_status(s[0]),
            leave_status(s[1]), rd.rec_cnt,
            (long long)met.gauge[GA_UNSAVED], (long long)met.gauge[GA_JOBS]);
        s[0]->is_eof = s[1]->is_eof = true;
        store_done("replaced while it is written");
    }
    /* ended while Redis is away, then delegated again: the new one stays */
    for (int single = 0; single < 2; single++) {
        store_reset(R_);
        lv.is_legacy = true;
        rd.instead[0] = single ? "TICK -NOPERM x\r\n" : NULL;
        store_start();
        net_run(net_never, 1000);
        struct sock *s[2];
        s[0] = leave_post_job("2000");
        net_run(net_never, 500);
        rd.is_down = true;
        store_kill_connections();
        net_run(net_never, 30000);           /* waited, sent, to be deleted */
        bool ended = met.gauge[GA_JOBS] == 0 && lv.sends == 1
            && met.gauge[GA_UNSAVED] == 1 && rd.rec_cnt == 1;
        s[1] = leave_post_job("300000");
        net_run(net_never, 1000);
        rd.is_down = false;
        net_run(net_never, 20000);
        row("ended and delegated again while Redis is away", ended
            && leave_status(s[1]) == 200 && rd.rec_cnt == 1
            && strstr(rd.rec[0].value, "\"DelayTimeout\":300000000000,")
            && met.gauge[GA_UNSAVED] == 0 && met.gauge[GA_JOBS] == 1,
            "%d, %d, %u records, %lld unsaved, %lld jobs, %u sends", ended,
            leave_status(s[1]), rd.rec_cnt,
            (long long)met.gauge[GA_UNSAVED], (long long)met.gauge[GA_JOBS],
            lv.sends);
        s[0]->is_eof = s[1]->is_eof = true;
        store_done("delegated again");
    }
    /* taken while Redis is away; meanwhile another replica stored one */
    for (int newer = 0; newer < 2; newer++) {
        char value[STORE_TEXT];
        const char *field = store_web_field();
        store_reset(R_);
        lv.is_legacy = true;
        store_start();
        net_run(net_never, 1000);
        rd.is_down = true;
        store_kill_connections();
        net_run(net_never, newer ? 1000 : 30000);
        snprintf(value, sizeof value, "{\"Params\":{\"DelayId\":\"theirs\","
            "\"DelayTimeout\":300000000000,\"ServerName\":\"a.org\","
            "\"LiveKitRoom\":\"%.43s\",\"LiveKitIdentity\":\"%.43s\"},"
            "\"RestartedAt\":\"2027-01-15T08:00:20Z\"}", field + 2,
            field + 2 + HASH_NAME_LEN + 3);
        struct sock *s = leave_post_job("300000");
        net_run(net_never, 28000);
        store_hset(field, value);            /* at :20, ours at :02 or :31 */
        rd.is_down = false;
        net_run(net_never, 20000);
        const struct job *j = leave_web_job();
        row(newer ? "a newer delegation in Redis stays"
            : "an older delegation in Redis is replaced", rd.rec_cnt == 1
            && leave_status(s) == 200 && j && met.gauge[GA_JOBS] == 1
            && (strstr(rd.rec[0].value, "\"theirs\"") != NULL) == newer
            && sl_eq((sl){ j->delay_id, j->delay_len }, newer
                ? SL("theirs") : SL("syd_x")), "%d, %lld jobs, %s",
            leave_status(s), (long long)met.gauge[GA_JOBS],
            rd.rec_cnt ? rd.rec[0].value : "");
        s->is_eof = true;
        store_done("a late delegation");
    }
    /* stopping: due restarts, then the leases are given back */
    for (int due = 0; due < 2; due++) {
        store_reset(R_);
        lv.is_legacy = true;
        store_hset(store_field(), store_value("D", due ? 14000 : 100000, 0,
            ",\"Connected\":true"));
        strcpy(lv.script[0], "present");
        store_start();
        leave_until(3000);
        unsigned before = lv.restarts;
        begin = world_ms;
        signal_stop = 1;
        for (int k = 0; k < 2000 && !loop_is_over; k++)
            net_run(net_never, 10);
        unsigned held = 0;
        for (unsigned k = 0; k < LIM_SHARD_CNT; k++)
            held += rd.lease[k][0] != 0;
        row(due ? "stopping: a restart that is due soon" : "stopping",
            loop_is_over && world_ms - begin < 1000 && held == 0
            && before == 1 && lv.restarts == 1U + (unsigned)due
            && rd.rec_cnt == 1 && lv.sends == 0, "%d after %lld ms, %u "
            "leases held, %u and %u restarts", loop_is_over,
            (long long)(world_ms - begin), held, before, lv.restarts);
        loop_is_over = false;
        store_done("stopping");
    }
}

static void test_redis(void)
{
    redis_hello_rows();
    redis_reply_rows();
    redis_restore_rows();
    redis_memory_rows();
    redis_share_rows();
    redis_outage_rows();
    redis_life_rows();
    world_is_random = true;
}
