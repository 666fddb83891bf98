/* Rates, breakers, memory of names, client addresses: sections 06, 08, 17. */

static const struct { const char *text; bool ok; int64_t burst, us; }
    rate_row_tab[] = {
    { "30:0.5", true, 30, 2000000 }, { "200:20", true, 200, 50000 },
    { "20:0.0167", true, 20, 59880239 }, { "1:0.0001", true, 1, 10000000000 },
    { "1000000:10000", true, 1000000, 100 }, { "7:2.25", true, 7, 444444 },
    { "off", true, 0, 0 }, { "", false, 0, 0 }, { "0:1", false, 0, 0 },
    { "1:0", false, 0, 0 }, { "1:0.0000", false, 0, 0 },
    { "1:10000.0001", false, 0, 0 }, { "1000001:1", false, 0, 0 },
    { "1", false, 0, 0 }, { "1:", false, 0, 0 }, { ":1", false, 0, 0 },
    { "1:1.", false, 0, 0 }, { "1:.5", false, 0, 0 },
    { "1:1.00001", false, 0, 0 }, { "1:1.5.5", false, 0, 0 },
    { " 1:1", false, 0, 0 }, { "1:1 ", false, 0, 0 },
    { "-1:1", false, 0, 0 }, { "1:-1", false, 0, 0 }, { "1:+1", false, 0, 0 },
    { "OFF", false, 0, 0 }, { "99999999999999999999:1", false, 0, 0 },
};

static void rate_texts(void)
{
    for (size_t i = 0; i < COUNT_OF(rate_row_tab); i++) {
        const char *text = rate_row_tab[i].text;
        struct rate r = { -1, -1 };
        uint8_t out[64];
        struct bb b = BB(out);
        sl in = { guarded((const uint8_t *)text, strlen(text)), strlen(text) };
        bool ok = rate_parse(in, &r);
        row(name_of("rate \"%s\"", text), ok == rate_row_tab[i].ok
            && (!ok || (r.burst == rate_row_tab[i].burst
                        && r.interval_us == rate_row_tab[i].us)),
            "%d %lld %lld", ok, (long long)r.burst, (long long)r.interval_us);
        if (!ok)
            continue;
        bb_rate(&b, &r);
        row_str(name_of("rate \"%s\", written", text), (sl){ out, b.len },
            text);
    }
}

/* A bucket never gives more than its burst and what has flowed in. */
static void rate_buckets(void)
{
    static const struct rate tab[] = { { 1, 1000000 }, { 3, 2000000 },
        { 200, 50000 }, { 5, 59880239 } };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        struct memo m = { 0 };
        int64_t got = 0, now = 1000, span = 600000;
        for (int64_t n = 0; n < tab[i].burst + 5; n++)
            got += rate_take(&m, &tab[i], now);
        row_int(name_of("burst of %lld", (long long)tab[i].burst), got,
            tab[i].burst);
        for (int64_t t = now; t < now + span; t += 10)
            got += rate_take(&m, &tab[i], t);
        int64_t flow = span * 1000 / tab[i].interval_us;
        row(name_of("flow into %lld", (long long)tab[i].burst),
            got >= tab[i].burst + flow - 1 && got <= tab[i].burst + flow,
            "%lld of %lld", (long long)got,
            (long long)(tab[i].burst + flow));
        now += 100 * span;
        for (int64_t n = got = 0; n < tab[i].burst + 5; n++)
            got += rate_take(&m, &tab[i], now);
        row_int(name_of("full again, %lld", (long long)tab[i].burst), got,
            tab[i].burst);
    }
}

/* A set of four keeps what says most; keys of other sets do not disturb. */
static void memo_sets(void)
{
    static struct memo tab[16];
    memset(tab, 0, sizeof tab);
    for (uint64_t k = 1; k <= 4; k++)
        memo_make(tab, 16, k * 4, INT64_MAX)->at = (int64_t)(100 * k);
    bool all = true;
    for (uint64_t k = 1; k <= 4; k++)
        all = all && memo_holds(tab, 16, k * 4, 50);
    row("a set holds four", all, "not so");
    row("a look makes none", memo_find(tab, 16, 400) == NULL, "not so");
    uint64_t before = met.evicted;
    memo_make(tab, 16, 400, 99)->at = 900;
    row_int("its going is counted", (long long)(met.evicted - before), 1);
    row("the least goes", !memo_holds(tab, 16, 4, 50)
        && memo_holds(tab, 16, 8, 50) && memo_holds(tab, 16, 400, 50),
        "not so");
    memo_make(tab, 16, 404, 200)->at = 800;
    row_int("not when it meant nothing", (long long)(met.evicted - before),
        1);
    memo_make(tab, 16, 8, 0)->at = 200;
    row("until its time", memo_holds(tab, 16, 8, 199)
        && !memo_holds(tab, 16, 8, 200), "not so");
    row("another set is empty", memo_find(tab, 16, 5) == NULL, "not so");
    row("kinds keep apart", memo_key('u', SL("x")) != memo_key('s', SL("x")),
        "not so");
}

/* What happens to a breaker, step by step: F a failure, S a success, U a
 * request that was not made; r asks and is refused, a asks and may; digits
 * let as many seconds pass. Three failures open it. */
static const struct { const char *name, *steps; enum class class; }
    breaker_row_tab[] = {
    { "B1 two failures", "aFaFaaa", CLASS_STRANGER },
    { "B1 a success starts over", "aFaFaSaFaFaa", CLASS_STRANGER },
    { "B2 three failures", "aFaFaFrrr", CLASS_STRANGER },
    { "B2 what was under way is not counted", "aFFFFFFFFFr3ar",
      CLASS_STRANGER },
    { "B2 a success of before closes", "FFFrSaa", CLASS_STRANGER },
    { "B2 nor after the pause", "FFF3FFFaSaa", CLASS_STRANGER },
    { "B2 after the pause", "FFFr1r2a", CLASS_STRANGER },
    { "B3 one tries, the others wait", "FFF3arrrr", CLASS_STRANGER },
    { "B3 success", "FFF3arSaaa", CLASS_STRANGER },
    { "B3 failure doubles", "FFF3aFr3r2aFr6r4aFr9r3r9a", CLASS_STRANGER },
    { "B3 the operator's: 3 s at most", "FFF3aFr4aFr4aFr4a", CLASS_LISTED },
    { "B3 the same", "FFF3aFr4aFr4aFr4a", CLASS_OPERATOR },
    { "B3 not made: the next one tries", "FFF3arUar", CLASS_STRANGER },
    { "B3 never heard of: after 20 s another", "FFF3ar9r9r3ar",
      CLASS_STRANGER },
    { "B1 not made says nothing", "FFUUUaFr", CLASS_STRANGER },
};

static void breaker_rows(void)
{
    int64_t before = cfg.breaker;
    cfg.breaker = 3;
    for (size_t i = 0; i < COUNT_OF(breaker_row_tab); i++) {
        struct memo b = { 0 };
        int64_t now = 1000000;
        const char *at = breaker_row_tab[i].steps, *bad = "";
        for (; *at && !*bad; at++) {
            enum verdict v = *at == 'F' ? PEER_FAILED : *at == 'S' ? PEER_OK
                : PEER_UNASKED;
            if (*at >= '0' && *at <= '9')
                now += (*at - '0') * 1000;
            else if (*at == 'a' || *at == 'r')
                bad = breaker_refuses(&b, now) == (*at == 'r') ? "" : at;
            else
                breaker_report(&b, breaker_row_tab[i].class, v, SL("x"), now);
        }
        row(breaker_row_tab[i].name, !*bad, "at \"%s\"", bad);
    }
    cfg.breaker = 0;
    struct memo b = { 0 };
    for (int n = 0; n < 100; n++)
        breaker_report(&b, CLASS_STRANGER, PEER_FAILED, SL("x"), 1000);
    row("off", !breaker_refuses(&b, 1000), "not so");
    cfg.breaker = before;
}

/* Every event that ends a call, and what it says of the peer. */
static const struct { enum event why; enum verdict want; } verdict_tab[] = {
    { EV_DNS_NONE, PEER_FAILED }, { EV_DNS_FAILED, PEER_FAILED },
    { EV_DNS_BAD, PEER_FAILED }, { EV_DNS_FULL, PEER_UNASKED },
    { EV_SSRF_DENIED, PEER_UNASKED }, { EV_CONNECT_FAILED, PEER_FAILED },
    { EV_CONNECT_TIMEOUT, PEER_FAILED }, { EV_CHAN_FULL, PEER_UNASKED },
    { EV_HS_TIMEOUT, PEER_FAILED }, { EV_TLS_FAILED, PEER_FAILED },
    { EV_TLS_TIMEOUT, PEER_FAILED }, { EV_TLS_CLOSED, PEER_FAILED },
    { EV_TLS_EXPIRED, PEER_FAILED }, { EV_TLS_NONE, PEER_FAILED },
    { EV_TLS_BUDGET, PEER_UNASKED }, { EV_REPLY_CLOSED, PEER_FAILED },
    { EV_REPLY_BAD, PEER_OK }, { EV_REPLY_LIMIT, PEER_OK },
    { EV_REPLY_STATUS, PEER_OK }, { EV_REPLY_JSON, PEER_OK },
    { EV_TOKEN_UNKNOWN, PEER_OK }, { EV_SUB_BAD, PEER_OK },
    { EV_NAME_BAD, PEER_UNASKED }, { EV_BODY_POOL, PEER_UNASKED },
    { EV_BREAKER_OPEN, PEER_UNASKED }, { EV_BUG_OVERFLOW, PEER_UNASKED },
};

/* X-Forwarded-For and the client in it, "" for none; proxies 10.0.0.0/8 and
 * fd00::/8. */
static const struct { const char *value, *want; } forwarded_tab[] = {
    { "203.0.113.9", "203.0.113.9" },
    { "203.0.113.9, 10.1.2.3", "203.0.113.9" },
    { "1.2.3.4, 203.0.113.9", "203.0.113.9" },
    { "1.2.3.4,203.0.113.9 ,\t10.1.2.3", "203.0.113.9" },
    { "2001:db8::1", "[2001:db8::1]" }, { "[2001:db8::1]", "[2001:db8::1]" },
    { "::ffff:203.0.113.9", "203.0.113.9" },
    { "203.0.113.9, ::ffff:10.0.0.9", "203.0.113.9" },
    { "203.0.113.9, fd00::9", "203.0.113.9" },
    { "10.1.1.1", "" }, { "10.1.1.1, 10.2.2.2", "" },
    { "", "" }, { ",", "" }, { "unknown", "" }, { "203.0.113.9:443", "" },
    { "203.0.113.9, unknown", "" }, { "203.0.113.9, unknown, 10.2.2.2", "" },
    { "203.0.113.256", "" }, { "[", "" }, { "]", "" },
    { "[]", "" }, { "203.0.113.9,", "" },
};

static void forwarded_rows(void)
{
    struct cidr proxy[2];
    if (!cidr_parse(SL("10.0.0.0/8"), &proxy[0])
        || !cidr_parse(SL("fd00::/8"), &proxy[1]))
        abort();
    for (size_t i = 0; i < COUNT_OF(forwarded_tab); i++) {
        const char *v = forwarded_tab[i].value;
        struct ip ip;
        uint8_t out[64];
        struct bb b = BB(out);
        if (forwarded_client((sl){ guarded((const uint8_t *)v, strlen(v)),
            strlen(v) }, proxy, 2, &ip))
            bb_ip(&b, &ip, 0);
        row_str(name_of("forwarded \"%s\"", v), (sl){ out, b.len },
            forwarded_tab[i].want);
    }
}

static void test_rates(void)
{
    rate_texts();
    rate_buckets();
    memo_sets();
    breaker_rows();
    for (size_t i = 0; i < COUNT_OF(verdict_tab); i++)
        row(name_of("%s says", event_tab[verdict_tab[i].why].label),
            peer_verdict(verdict_tab[i].why) == verdict_tab[i].want, "not so");
    forwarded_rows();
}
