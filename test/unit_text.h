/* Sections 05, 06, 13 and 14: bytes, text, small formats, metrics. */

static uint8_t work_buf[1 << 20];

static struct bb work_bb(void)
{
    return (struct bb){ work_buf, 0, sizeof work_buf, false };
}

static sl work_done(const struct bb *b)
{
    return (sl){ b->p, b->len };
}

/* ---- bytes ---- */

static void test_bytes(void)
{
    static const struct { const char *in, *seps, *want; } word_tab[] = {
        { "", " ,", "" }, { "a", " ,", "a|" }, { ",,a,,b ,", " ,", "a|b|" },
        { "a b\tc", " \t", "a|b|c|" }, { " ", " ", "" },
    };
    for (size_t i = 0; i < COUNT_OF(word_tab); i++) {
        size_t len = strlen(word_tab[i].in);
        sl rest = { guarded(word_tab[i].in, len), len }, word;
        struct bb b = work_bb();
        while (sl_word(&rest, word_tab[i].seps, &word)) {
            bb_put(&b, word);
            bb_byte(&b, '|');
        }
        row_str(name_of("words of `%s`", word_tab[i].in), work_done(&b),
            word_tab[i].want);
    }
    static const struct { const char *in; uint64_t max; bool ok;
        uint64_t want; } num_tab[] = {
        { "0", 9, true, 0 }, { "9", 9, true, 9 }, { "10", 9, false, 0 },
        { "", 9, false, 0 }, { "-1", 9, false, 0 }, { "+1", 9, false, 0 },
        { " 1", 9, false, 0 }, { "1 ", 9, false, 0 }, { "0x1", 9, false, 0 },
        { "007", 9, true, 7 }, { "1a", 99, false, 0 },
        { "9223372036854775807", INT64_MAX, true, INT64_MAX },
        { "9223372036854775808", INT64_MAX, false, 0 },
        { "9999999999999999999", INT64_MAX, false, 0 },
        { "9999999999999999999", UINT64_MAX, true, 9999999999999999999u },
        { "00000000000000000001", 9, false, 0 },     /* 20 digits */
        { "18446744073709551616", UINT64_MAX, false, 0 },
    };
    for (size_t i = 0; i < COUNT_OF(num_tab); i++) {
        size_t len = strlen(num_tab[i].in);
        uint64_t v = 0;
        bool ok = sl_u64((sl){ guarded(num_tab[i].in, len), len },
            num_tab[i].max, &v);
        row(name_of("number `%s` <= %llu", num_tab[i].in,
                    (unsigned long long)num_tab[i].max),
            ok == num_tab[i].ok && (!ok || v == num_tab[i].want),
            "got %d, %llu", ok, (unsigned long long)v);
    }
    static const struct { int64_t in; const char *want; } int_tab[] = {
        { 0, "0" }, { -1, "-1" }, { 42, "42" },
        { INT64_MAX, "9223372036854775807" },
        { INT64_MIN, "-9223372036854775808" },
    };
    for (size_t i = 0; i < COUNT_OF(int_tab); i++) {
        struct bb b = work_bb();
        bb_i64(&b, int_tab[i].in);
        row_str(int_tab[i].want, work_done(&b), int_tab[i].want);
    }
    static const struct { const char *in, *want; } trim_tab[] = {
        { "", "" }, { " \t\r\n", "" }, { " a b\r\n", "a b" }, { "a", "a" },
    };
    for (size_t i = 0; i < COUNT_OF(trim_tab); i++) {
        size_t len = strlen(trim_tab[i].in);
        row_str(name_of("trim %zu", i),
            sl_trim((sl){ guarded(trim_tab[i].in, len), len }),
            trim_tab[i].want);
    }
    row("a NUL is no blank", sl_trim(SL("\0a\0")).len == 3, "trimmed");
    row("ASCII case only", sl_ieq(SL("aZ[{"), SL("Az[{"))
        && !sl_ieq(SL("["), SL("{")) && !sl_ieq(SL("@"), SL("`"))
        && !sl_ieq(SL("\xc0"), SL("\xe0")), "wrong");
    /* a builder takes exactly its room, then latches and yields nothing */
    for (size_t cap = 0; cap < 9; cap++) {
        struct bb b = { guard_end - cap, 0, cap, false };
        sl out = { NULL, 7 };
        bb_str(&b, "1234");
        bb_byte(&b, '5');
        bb_u64(&b, 678);
        bb_str(&b, "");
        bool ok = bb_finish(&b, &out);
        row(name_of("builder of %zu bytes", cap), ok == (cap >= 8)
            && out.len == (ok ? 8 : 0), "ok %d, %zu bytes", ok, out.len);
    }
    struct bb b = { guard_end - 3, 0, 3, false };
    bb_str(&b, "1234");
    bb_str(&b, "1");
    row("overflow latches", b.over && b.len == 0, "took more");
    uint8_t one[32], two[32];
    hash_keyed((sl[]){ SL("ab"), SL("c") }, 2, one);
    hash_keyed((sl[]){ SL("a"), SL("bc") }, 2, two);
    row("hash_keyed keeps parts apart", memcmp(one, two, 32) != 0, "equal");
}

/* ---- base64 ---- */

static void test_base64(void)
{
    static const struct { const char *in; bool padded; const char *want; }
    tab[] = {               /* want NULL: refused */
        { "", true, "" }, { "", false, "" },
        { "Zg==", true, "f" }, { "Zm8=", true, "fo" },
        { "Zm9v", true, "foo" }, { "Zm9vYg==", true, "foob" },
        { "Zm9vYmE=", true, "fooba" }, { "Zm9vYmFy", true, "foobar" },
        { "Zg", false, "f" }, { "Zm8", false, "fo" },
        { "Zm9v", false, "foo" }, { "Zm9vYg", false, "foob" },
        { "Zg", true, NULL }, { "Zm8", true, NULL },
        { "Zg==", false, NULL }, { "Zm8=", false, NULL },
        { "Zh==", true, NULL }, { "Zh", false, NULL },   /* unused bits */
        { "Zm9=", true, NULL }, { "Zm9", false, NULL },
        { "Z", false, NULL }, { "Z===", true, NULL }, { "====", true, NULL },
        { "=", true, NULL }, { "==", true, NULL }, { "Zg=", true, NULL },
        { "Zg===", true, NULL }, { "Zg==Zg==", true, NULL },
        { "Zm9v=", true, NULL }, { "=Zm9", true, NULL },
        { "Zm-_", true, NULL }, { "Zm9v\n", true, NULL },
        { " Zm9v", true, NULL }, { "Zm 9", true, NULL },
        { "Zm9v\nZm9v", true, NULL }, { "Zm9*", true, NULL },
        { "++//", true, "\xfb\xef\xff" }, { "Zg=\xc3", true, NULL },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        size_t len = strlen(tab[i].in);
        uint8_t *out = guard_end - 65536 - (len / 4 * 3 + 2);
        int n = b64_parse((sl){ guarded(tab[i].in, len), len },
            tab[i].padded, out);
        row(name_of("`%s` %s", tab[i].in, tab[i].padded ? "padded" : "bare"),
            tab[i].want ? n == (int)strlen(tab[i].want)
                && memcmp(out, tab[i].want, (size_t)n) == 0 : n == -1,
            "got %d", n);
    }
    int taken = 0;
    for (int c = 0; c < 256; c++) {
        uint8_t in[4] = { 'A', 'A', (uint8_t)c, 'A' }, out[8];
        taken += b64_parse((sl){ guarded(in, 4), 4 }, false, out) == 3;
    }
    row_int("64 characters are taken", taken, 64);
    bool ok = true;
    for (size_t len = 0; len < 67; len++) {
        uint8_t raw[67], back[67];
        for (size_t i = 0; i < len; i++)
            raw[i] = (uint8_t)dice();
        struct bb b = work_bb();
        b64_put(&b, b64_url, (sl){ guarded(raw, len), len });
        int n = b64_parse((sl){ guarded(work_buf, b.len), b.len }, false,
            back);
        ok &= n == (int)len && memcmp(raw, back, len) == 0;
    }
    row("round trips of 0 to 66 bytes", ok, "differ");
    struct bb b = work_bb();
    b64_put(&b, b64_url, SL("\xfb\xef\xff\xfa"));
    row_str("URL alphabet", work_done(&b), "--__-g");
}

/* ---- UTF-8 ---- */

static void test_utf8(void)
{
    static const struct { const char *in; uint32_t cp; } tab[] = {
        { "\x01", 1 }, { "\x7f", 0x7f }, { "\xc2\x80", 0x80 },
        { "\xdf\xbf", 0x7ff }, { "\xe0\xa0\x80", 0x800 },
        { "\xed\x9f\xbf", 0xd7ff }, { "\xee\x80\x80", 0xe000 },
        { "\xef\xbf\xbf", 0xffff }, { "\xf0\x90\x80\x80", 0x10000 },
        { "\xf4\x8f\xbf\xbf", 0x10ffff },
        /* 0: refused */
        { "\x80", 0 }, { "\xbf", 0 }, { "\xc0\x80", 0 }, { "\xc0\xaf", 0 },
        { "\xc1\xbf", 0 }, { "\xc2", 0 }, { "\xc2\x7f", 0 },
        { "\xc2\xc0", 0 }, { "\xdf\x41", 0 }, { "\xe0\x80\x80", 0 },
        { "\xe0\x9f\xbf", 0 }, { "\xe1\x80", 0 }, { "\xe1\x80\xc0", 0 },
        { "\xe1\x41\x80", 0 }, { "\xed\xa0\x80", 0 }, { "\xed\xbf\xbf", 0 },
        { "\xef\xbf", 0 }, { "\xf0\x80\x80\x80", 0 },
        { "\xf0\x8f\xbf\xbf", 0 }, { "\xf0\x90\x80", 0 }, { "\xf0\x90", 0 },
        { "\xf0", 0 }, { "\xf4\x90\x80\x80", 0 }, { "\xf5\x80\x80\x80", 0 },
        { "\xf7\xbf\xbf\xbf", 0 }, { "\xf8\x88\x80\x80\x80", 0 },
        { "\xfc\x84\x80\x80\x80\x80", 0 }, { "\xfe", 0 }, { "\xff", 0 },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        size_t len = strlen(tab[i].in);
        uint32_t cp = 0;
        size_t n = utf8_next((sl){ guarded(tab[i].in, len), len }, &cp);
        char hex[40] = "";
        for (size_t k = 0; k < len; k++)
            sprintf(hex + 3 * k, "%02x ", (uint8_t)tab[i].in[k]);
        row(hex, tab[i].cp ? n == len && cp == tab[i].cp : n == 0,
            "%zu bytes, U+%04X", n, cp);
        memmove(work_buf, "a", 1);
        memcpy(work_buf + 1, tab[i].in, len);
        row(name_of("a %s", hex), utf8_check((sl){ guarded(work_buf,
            len + 1), len + 1 }) == (tab[i].cp != 0), "wrong");
    }
    unsigned good = 0, bad = 0;
    for (uint32_t v = 0; v < 0x120000; v++) {
        uint8_t c[4];
        size_t n = v < 0x80 ? 1 : v < 0x800 ? 2 : v < 0x10000 ? 3 : 4;
        uint32_t rest = v, cp;
        for (size_t k = n; k-- > 1; rest >>= 6)
            c[k] = (uint8_t)(0x80 | (rest & 63));
        c[0] = (uint8_t)(n == 1 ? v : (0xf00u >> n & 0xff) | rest);
        size_t got = utf8_next((sl){ guarded(c, n), n }, &cp);
        good += got == n && cp == v;
        bad += got == 0;
    }
    row_int("code points taken", good, 0x110000 - 0x800);
    row_int("surrogates and beyond refused", bad, 0x10000 + 0x800);
    uint32_t cp;
    row("nothing", utf8_next((sl){ guard_end, 0 }, &cp) == 0
        && utf8_check((sl){ guard_end, 0 }), "wrong");
}

/* ---- server names ---- */

/* ok or no | name | host | port | ip, when it is one */
static void names_row(struct vec *v)
{
    struct name n;
    sl in = vec_sl(v, 1);
    bool want = strcmp(vec_str(v, 0), "ok") == 0;
    bool ok = name_parse((sl){ guarded(in.p, in.len), in.len }, &n);
    uint8_t text[64];
    struct bb b = BB(text);
    if (ok && n.is_ip)
        bb_ip(&b, &n.ip, 0);
    row(vec_name(v, vec_str(v, 1)), ok == want && (!ok
        || (sl_eq(n.host, vec_sl(v, 2)) && n.port == atoi(vec_str(v, 3))
            && n.is_ip == (v->cnt > 4)
            && (v->cnt < 5 || sl_eq(work_done(&b), vec_sl(v, 4))))),
        "%d, host %.*s, port %d, ip %d", ok, (int)n.host.len, n.host.p,
        n.port, n.is_ip);
}

static void test_names(void)
{
    vec_each("names.txt", names_row);
    /* every byte as part of a name, alone and inside */
    unsigned one = 0, in = 0;
    for (int c = 0; c < 256; c++) {
        struct name n;
        uint8_t text[3] = { 'a', (uint8_t)c, 'b' };
        in += name_parse((sl){ guarded(text, 3), 3 }, &n);
        one += name_parse((sl){ guarded(text + 1, 1), 1 }, &n);
    }
    row_int("bytes a name may hold", in, 64);
    row_int("bytes that are a name", one, 64);
    struct name n;
    row("`_` is for URLs only", host_parse(SL("a_b:80"), true, &n)
        && !host_parse(SL("a_b:80"), false, &n), "wrong");
    static const struct { const char *name, *pattern; bool want; } tab[] = {
        { "example.org", "example.org", true },
        { "example.org", "Example.ORG", true },
        { "example.org:8448", "example.org", true },
        { "example.org:8448", "example.org:8448", true },
        { "example.org", "example.org:8448", false },
        { "example.org:1", "example.org:8448", false },
        { "a.example.org", "*.example.org", true },
        { "a.b.example.org", "*.example.org", true },
        { "example.org", "*.example.org", false },
        { "badexample.org", "*.example.org", false },
        { ".example.org", "*.example.org", false },
        { "a.example.org:8448", "*.example.org", true },
        { "A.Example.org", "*.example.ORG", true },
        { "a.org", "*", false }, { "a.org", "*.", false },
        { "a.org", "", false }, { "a.org", "a.org/", false },
        { "[::1]", "[::1]", true }, { "[::1]:8448", "[::1]", true },
    };
    static const struct { const char *name, *allowed, *blocked; bool want; }
    denied[] = {
        { "a.org", "", "", false }, { "a.org", "a.org", "", false },
        { "b.org", "a.org", "", true }, { "a.org", "", "a.org", true },
        { "a.org", "a.org", "a.org", true }, { "b.org", "", "a.org", false },
        { "a.org.", "", "a.org", true }, { "A.org", "", "a.org", true },
        { "x.a.org.:8448", "", "*.a.org", true },
        { "x.a.org", "*.a.org", "y.a.org", false },
        { "y.a.org", "*.a.org", "y.a.org", true },
    };
    for (size_t i = 0; i < COUNT_OF(denied); i++) {
        cfg.allowed_cnt = denied[i].allowed[0] != 0;
        cfg.allowed[0] = sl_str(denied[i].allowed);
        cfg.blocked_cnt = denied[i].blocked[0] != 0;
        cfg.blocked[0] = sl_str(denied[i].blocked);
        bool ok = name_parse(sl_str(denied[i].name), &n);
        row(name_of("%s, allowed `%s`, blocked `%s`", denied[i].name,
                    denied[i].allowed, denied[i].blocked),
            ok && name_denied(&n) == denied[i].want, "want %d",
            denied[i].want);
    }
    cfg.allowed_cnt = cfg.blocked_cnt = 0;
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        bool ok = name_parse(sl_str(tab[i].name), &n);
        row(name_of("%s in %s", tab[i].name, tab[i].pattern),
            ok && name_matches(&n, sl_str(tab[i].pattern)) == tab[i].want,
            "want %d", tab[i].want);
    }
}

/* ---- user, delay and request ids ---- */

static void ids_row(struct vec *v)
{
    sl in = vec_sl(v, 2), text = { guarded(in.p, in.len), in.len };
    const char *kind = vec_str(v, 0);
    bool want = strcmp(vec_str(v, 1), "ok") == 0;
    bool ok = strcmp(kind, "user") == 0 ? user_check(text, vec_sl(v, 3))
        : strcmp(kind, "delay") == 0 ? delay_id_check(text)
        : strcmp(kind, "token") == 0 ? is_one_word(text)
        : request_id_check(text);
    row(vec_name(v, vec_str(v, 2)), ok == want, "%s", ok ? "taken"
        : "refused");
}

static void test_users(void)
{
    vec_each("ids.txt", ids_row);
    unsigned delay = 0, request = 0, token = 0;
    for (int c = 0; c < 256; c++) {
        uint8_t text[2] = { 'a', (uint8_t)c };
        sl s = { guarded(text, 2), 2 };
        delay += delay_id_check(s);
        request += request_id_check(s);
        token += is_one_word(s);
    }
    row_int("bytes of a delay id", delay, 66);
    row_int("bytes of a request id", request, 65);
    row_int("bytes of a token", token, 256 - 34);
}

/* ---- URLs ---- */

/* ok or no | url | scheme | host | port | path | query */
static void urls_row(struct vec *v)
{
    struct url u;
    sl in = vec_sl(v, 1);
    bool want = strcmp(vec_str(v, 0), "ok") == 0;
    bool ok = url_parse((sl){ guarded(in.p, in.len), in.len }, &u);
    row(vec_name(v, vec_str(v, 1)), ok == want && (!ok
        || (sl_eq(u.scheme, vec_sl(v, 2)) && sl_eq(u.name.host, vec_sl(v, 3))
            && u.name.port == atoi(vec_str(v, 4))
            && sl_eq(u.path, vec_sl(v, 5))
            && u.has_query == (strcmp(vec_str(v, 6), "query") == 0))),
        "%d, scheme %.*s, host %.*s, port %d, path %.*s, query %d", ok,
        (int)u.scheme.len, u.scheme.p, (int)u.name.host.len, u.name.host.p,
        u.name.port, (int)u.path.len, u.path.p, u.has_query);
}

static void test_urls(void)
{
    vec_each("urls.txt", urls_row);
}

/* ---- addresses ---- */

static bool addr_of(const char *text, struct ip *out)
{
    return ip_parse(sl_str(text), out);
}

static const char *const range_name[] = { "public", "N", "L", "P" };

/* class | address | range, as the log names it */
static void range_row_of(struct vec *v)
{
    struct ip a;
    const char *name = "";
    if (!addr_of(vec_str(v, 1), &a)) {
        row(vec_name(v, vec_str(v, 1)), false, "no address");
        return;
    }
    enum range got = ip_range(a, &name);
    row(vec_name(v, vec_str(v, 1)), strcmp(range_name[got], vec_str(v, 0))
        == 0 && strcmp(name, vec_str(v, 2)) == 0, "%s %s", range_name[got],
        name);
    if (a.v6)
        return;
    static const struct { const char *name; uint8_t b[16]; int at; } form[] = {
        { "mapped", { [10] = 0xff, [11] = 0xff }, 12 },
        { "translated", { [8] = 0xff, [9] = 0xff }, 12 },
        { "NAT64", { 0, 0x64, 0xff, 0x9b }, 12 },
        { "6to4", { 0x20, 2, [6] = 1, [15] = 9 }, 2 },
    };
    for (size_t i = 0; i < COUNT_OF(form); i++) {
        struct ip in = { .v6 = true };
        memcpy(in.b, form[i].b, 16);
        memcpy(in.b + form[i].at, a.b, 4);
        got = ip_range(in, &name);
        row(name_of("%s %s", vec_str(v, 1), form[i].name),
            strcmp(range_name[got], vec_str(v, 0)) == 0, "%s",
            range_name[got]);
    }
}

/* ok or no | text | as printed */
static void address_row(struct vec *v)
{
    struct ip a;
    uint8_t text[64];
    struct bb b = BB(text);
    sl in = vec_sl(v, 1);
    bool ok = ip_parse((sl){ guarded(in.p, in.len), in.len }, &a);
    if (ok)
        bb_ip(&b, &a, 0);
    row(vec_name(v, vec_str(v, 1)), ok == (strcmp(vec_str(v, 0), "ok") == 0)
        && (!ok || sl_eq(work_done(&b), vec_sl(v, 2))), "%d %.*s", ok,
        (int)b.len, text);
}

static void cidr_rows(void)
{
    static const struct { const char *net, *ip; int want; } tab[] = {
        /* -1: no network */
        { "10.0.0.0/8", "10.255.1.2", 1 }, { "10.0.0.0/8", "11.0.0.0", 0 },
        { "10.1.2.3/8", "10.9.9.9", 1 }, { "1.2.3.4", "1.2.3.4", 1 },
        { "1.2.3.4", "1.2.3.5", 0 }, { "1.2.3.4/32", "1.2.3.4", 1 },
        { "1.2.3.4/31", "1.2.3.5", 1 }, { "1.2.3.4/31", "1.2.3.6", 0 },
        { "0.0.0.0/0", "255.1.1.1", 1 }, { "0.0.0.0/0", "::1", 0 },
        { "::/0", "2001:db8::1", 1 }, { "::/0", "1.2.3.4", 0 },
        { "fd00::/8", "fd12::1", 1 }, { "fd00::/8", "fc00::1", 0 },
        { "2001:db8::/33", "2001:db8:7fff::1", 1 },
        { "2001:db8::/33", "2001:db8:8000::1", 0 },
        { "::1/128", "::1", 1 }, { "::1", "::2", 0 },
        { "172.16.0.0/12", "172.31.255.255", 1 },
        { "172.16.0.0/12", "172.32.0.0", 0 },
        { "10.0.0.0/33", "10.0.0.0", -1 }, { "::/129", "::", -1 },
        { "10.0.0.0/", "10.0.0.0", -1 }, { "10.0.0.0/8/8", "10.0.0.0", -1 },
        { "10.0.0.0/-1", "10.0.0.0", -1 }, { "10.0.0.0/ 8", "10.0.0.0", -1 },
        { "10.0.0/8", "10.0.0.0", -1 }, { "/8", "10.0.0.0", -1 },
        { "", "10.0.0.0", -1 }, { "localhost", "127.0.0.1", -1 },
        { "[::1]/128", "::1", -1 },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        struct cidr net;
        struct ip a = { .v6 = false };
        size_t len = strlen(tab[i].net);
        int got = !addr_of(tab[i].ip, &a) ? -2
            : !cidr_parse((sl){ guarded(tab[i].net, len), len }, &net) ? -1
            : ip_in(&a, &net);
        row_int(name_of("%s in %s", tab[i].ip, tab[i].net), got,
            tab[i].want);
    }
}

static void allowed_rows(void)
{
    static const struct { const char *ip; int port;
        bool want[5]; } tab[] = {
        /* STRANGER; STRANGER, private; LISTED; LISTED, private; OPERATOR */
        { "8.8.8.8", 443, { 1, 1, 1, 1, 1 } },
        { "8.8.8.8", 0, { 0, 0, 0, 0, 0 } },
        { "2606:4700::1", 8448, { 1, 1, 1, 1, 1 } },
        { "127.0.0.1", 443, { 0, 1, 0, 1, 1 } },
        { "10.1.2.3", 443, { 0, 1, 0, 1, 1 } },
        { "100.64.0.1", 443, { 0, 1, 0, 1, 1 } },
        { "::1", 443, { 0, 1, 0, 1, 1 } },
        { "fd00::1", 443, { 0, 1, 0, 1, 1 } },
        { "::ffff:10.1.2.3", 443, { 0, 1, 0, 1, 1 } },
        { "64:ff9b::7f00:1", 443, { 0, 1, 0, 1, 1 } },
        { "2002:7f00:1::", 443, { 0, 1, 0, 1, 1 } },
        { "169.254.169.254", 80, { 0, 0, 0, 0, 1 } },
        { "::ffff:169.254.169.254", 80, { 0, 0, 0, 0, 1 } },
        { "fe80::1", 80, { 0, 0, 0, 0, 1 } },
        { "192.0.2.1", 80, { 0, 0, 0, 0, 1 } },
        { "2001:db8::1", 80, { 0, 0, 0, 0, 1 } },
        { "0.0.0.0", 80, { 0, 0, 0, 0, 0 } },
        { "224.0.0.1", 80, { 0, 0, 0, 0, 0 } },
        { "255.255.255.255", 80, { 0, 0, 0, 0, 0 } },
        { "::", 80, { 0, 0, 0, 0, 0 } }, { "::2", 80, { 0, 0, 0, 0, 0 } },
        { "::7f00:1", 80, { 0, 0, 0, 0, 0 } },
        { "ff02::1", 80, { 0, 0, 0, 0, 0 } },
        { "::ffff:0.0.0.0", 80, { 0, 0, 0, 0, 0 } },
        { "2002:e000:1::", 80, { 0, 0, 0, 0, 0 } },
    };
    static const struct { const char *name; struct trust trust; } who[5] = {
        { "stranger", { CLASS_STRANGER, false } },
        { "stranger, private allowed", { CLASS_STRANGER, true } },
        { "listed", { CLASS_LISTED, false } },
        { "listed, private allowed", { CLASS_LISTED, true } },
        { "operator", { CLASS_OPERATOR, true } },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++)
        for (size_t k = 0; k < 5; k++) {
            struct addr a = { .port = (uint16_t)tab[i].port };
            bool ok = addr_of(tab[i].ip, &a.ip);
            row(name_of("%s port %d, %s", tab[i].ip, tab[i].port,
                        who[k].name),
                ok && net_allowed(&a, &who[k].trust) == tab[i].want[k],
                "want %d", tab[i].want[k]);
        }
    static const struct { const char *net, *ip; bool want; } extra[] = {
        { "10.0.0.0/8", "10.1.1.1", true },
        { "10.0.0.0/8", "::ffff:10.1.1.1", true },
        { "10.0.0.0/8", "2002:a01:101::", true },
        { "10.0.0.0/8", "192.168.1.1", false },
        { "169.254.0.0/16", "169.254.169.254", true },
        { "fe80::/10", "fe80::1", true },
        { "0.0.0.0/0", "0.0.0.0", false }, { "::/0", "ff02::1", false },
        { "0.0.0.0/0", "224.0.0.1", false },
        { "0.0.0.0/0", "127.0.0.1", true }, { "0.0.0.0/0", "::1", false },
    };
    for (size_t i = 0; i < COUNT_OF(extra); i++) {
        struct addr a = { .port = 443 };
        struct trust t = { CLASS_STRANGER, false };
        cfg.network_cnt = 1;
        bool ok = addr_of(extra[i].ip, &a.ip)
            && cidr_parse(sl_str(extra[i].net), &cfg.network[0]);
        row(name_of("%s with LKJWT_ALLOW_NETWORKS=%s", extra[i].ip,
                    extra[i].net),
            ok && net_allowed(&a, &t) == extra[i].want, "want %d",
            extra[i].want);
    }
    cfg.network_cnt = 0;
    /* who may reach private addresses, bit by bit */
    for (int bits = 0; bits < 32; bits++) {
        bool listed = bits & 1, open = bits & 2, deny = bits & 4;
        bool insecure = bits & 8, literal = bits & 16;
        struct name n;
        cfg.is_open = open;
        cfg.private_deny = deny;
        cfg.insecure = insecure;
        bool ok = name_parse(literal ? SL("10.0.0.1") : SL("a.org"), &n);
        struct trust t = name_trust(&n, listed);
        bool want = !deny && (listed || insecure || (open && !literal));
        row(name_of("private: listed %d open %d deny %d insecure %d "
                    "literal %d", listed, open, deny, insecure, literal),
            ok && t.private_ok == want && t.class
            == (listed ? CLASS_LISTED : CLASS_STRANGER), "want %d", want);
    }
    cfg.is_open = cfg.private_deny = cfg.insecure = false;
}

static void test_addresses(void)
{
    vec_each("addresses.txt", address_row);
    vec_each("ranges.txt", range_row_of);
    cidr_rows();
    allowed_rows();
    static const struct { const char *in, *want; } tab[] = {
        { "1.2.3.4", "1.2.3.4:53" }, { "1.2.3.4:5353", "1.2.3.4:5353" },
        { "::1", "[::1]:53" }, { "[::1]", "[::1]:53" },
        { "[::1]:54", "[::1]:54" }, { "localhost", "" }, { "", "" },
        { "1.2.3.4:", "" }, { "1.2.3.4:0", "" }, { "1.2.3.4:65536", "" },
        { "[1.2.3.4]:53", "" }, { "::1:53:", "" },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        struct addr a;
        uint8_t text[64];
        size_t len = strlen(tab[i].in);
        bool ok = addr_parse((sl){ guarded(tab[i].in, len), len }, 53, &a);
        row_str(name_of("nameserver `%s`", tab[i].in),
            ok ? text_addr(text, &a) : (sl){ NULL, 0 }, tab[i].want);
    }
}

/* ---- percent-encoding ---- */

static void test_percent(void)
{
    bool ok = true;
    for (int c = 0; c < 256; c++) {
        uint8_t in = (uint8_t)c;
        char want[8];
        struct bb b = work_bb();
        bb_percent(&b, (sl){ guarded(&in, 1), 1 });
        bool plain = c && strchr("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnop"
            "qrstuvwxyz0123456789-._~", c);
        snprintf(want, sizeof want, plain ? "%c" : "%%%02X", c);
        ok &= sl_eq(work_done(&b), sl_str(want));
    }
    row("each of 256 bytes", ok, "differs from RFC 3986");
    struct bb b = work_bb();
    bb_percent(&b, SL("a/b?c=\xc3\xa4&\r\n"));
    row_str("a run", work_done(&b), "a%2Fb%3Fc%3D%C3%A4%26%0D%0A");
}

/* ---- dates ---- */

static void test_dates(void)
{
    static const struct { int64_t wall; const char *http, *iso; } tab[] = {
        { 0, "Thu, 01 Jan 1970 00:00:00 GMT", "1970-01-01T00:00:00.000Z" },
        { 784111777, "Sun, 06 Nov 1994 08:49:37 GMT",
          "1994-11-06T08:49:37.000Z" },
        { 951782399, "Mon, 28 Feb 2000 23:59:59 GMT",
          "2000-02-28T23:59:59.000Z" },
        { 951782400, "Tue, 29 Feb 2000 00:00:00 GMT",
          "2000-02-29T00:00:00.000Z" },
        { 951868800, "Wed, 01 Mar 2000 00:00:00 GMT",
          "2000-03-01T00:00:00.000Z" },
        { 1726760839, "Thu, 19 Sep 2024 15:47:19 GMT",
          "2024-09-19T15:47:19.000Z" },
        { 2147483647, "Tue, 19 Jan 2038 03:14:07 GMT",
          "2038-01-19T03:14:07.000Z" },
        { 4107542399, "Sun, 28 Feb 2100 23:59:59 GMT",
          "2100-02-28T23:59:59.000Z" },
        { 4107542400, "Mon, 01 Mar 2100 00:00:00 GMT",
          "2100-03-01T00:00:00.000Z" },
        { 253402300799, "Fri, 31 Dec 9999 23:59:59 GMT",
          "9999-12-31T23:59:59.000Z" },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        struct bb b = work_bb();
        int64_t back = -1;
        bb_http_date(&b, tab[i].wall);
        row_str(tab[i].http, work_done(&b), tab[i].http);
        bool ok = http_date_parse((sl){ guarded(tab[i].http, 29), 29 },
            &back);
        row_int(name_of("%s read", tab[i].http), ok ? back : -1,
            tab[i].wall);
        b = work_bb();
        bb_rfc3339(&b, tab[i].wall * 1000);
        row_str(tab[i].iso, work_done(&b), tab[i].iso);
    }
    struct civil old = civil_from(-1);
    row("a second before 1970", old.year == 1969 && old.month == 12
        && old.day == 31 && old.hour == 23 && old.sec == 59
        && old.weekday == 3, "differs");
    struct bb b = work_bb();
    bb_rfc3339(&b, 1726760839007);
    row_str("milliseconds", work_done(&b), "2024-09-19T15:47:19.007Z");
    static const char *const bad[] = { "", "Sun, 06 Nov 1994 08:49:37",
        "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994",
        "Sun, 06 Nov 1994 08:49:37 UTC", "Sun, 06 Foo 1994 08:49:37 GMT",
        "Sun, 32 Nov 1994 08:49:37 GMT", "Sun, 06 Nov 1994 24:49:37 GMT",
        "Sun, 06 Nov 1994 08:60:37 GMT", "Sun, 06 Nov 1994 08:49:61 GMT",
        "Sun, +6 Nov 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:49:37 GMT ",
        "Sun, 06 Nov -994 08:49:37 GMT" };
    for (size_t i = 0; i < COUNT_OF(bad); i++) {
        int64_t at;
        size_t len = strlen(bad[i]);
        row(name_of("`%s`", bad[i]), !http_date_parse((sl){
            guarded(bad[i], len), len }, &at), "taken");
    }
    bool same = true;
    for (int64_t day = -800000; day < 3000000; day += 37) {
        struct civil c = civil_from(day * 86400);
        same &= days_from_civil(c.year, c.month, c.day) == day
            && c.weekday == (unsigned)(((day + 4) % 7 + 7) % 7);
    }
    row("days and dates agree, years -220 to 10183", same, "differ");
    static const struct { const char *cc, *expires; int64_t want; } cache[] = {
        { "", "", 777 }, { "max-age=60", "", 60 }, { "MAX-AGE=60", "", 60 },
        { "public, max-age=60", "", 60 }, { "max-age=0", "", 0 },
        { "max-age=60, no-store", "", 0 }, { "no-store", "", 0 },
        { "no-cache, max-age=60", "", 0 }, { "max-age=x", "", 777 },
        { "max-age", "", 777 }, { "max-age=-1", "", 777 },
        { "s-maxage=5", "", 777 }, { "private", "", 777 },
        { "max-age=99999999999999999999", "", 777 },
        { "max-age=9223372036854775807", "", INT64_MAX },
        { "", "Thu, 19 Sep 2024 15:48:19 GMT", 60 },
        { "", "Thu, 19 Sep 2024 15:46:19 GMT", -60 }, { "", "0", 0 },
        { "max-age=5", "Thu, 19 Sep 2024 15:48:19 GMT", 5 },
        { "private", "Thu, 19 Sep 2024 15:48:19 GMT", 60 },
    };
    for (size_t i = 0; i < COUNT_OF(cache); i++) {
        int64_t got = cache_seconds(sl_str(cache[i].cc),
            sl_str(cache[i].expires), 1726760839, 777);
        row_int(name_of("cache `%s` `%s`", cache[i].cc, cache[i].expires),
            got, cache[i].want);
    }
}

/* ---- log values ---- */

/* logfmt or json | value | line part */
static void log_row(struct vec *v)
{
    sl in = vec_sl(v, 1);
    struct bb b = work_bb();
    log_put(&b, "k", (sl){ guarded(in.p, in.len), in.len },
        strcmp(vec_str(v, 0), "json") == 0);
    row_text(vec_name(v, vec_str(v, 2)), work_done(&b), vec_sl(v, 2));
}

static void test_logs(void)
{
    vec_each("logs.txt", log_row);
    for (int json = 0; json < 2; json++) {
        bool ok = true;
        for (int a = 0; a < 256; a++)
            for (int z = 0; z < 256; z++) {
                uint8_t in[2] = { (uint8_t)a, (uint8_t)z };
                struct bb b = work_bb();
                log_put_value(&b, (sl){ guarded(in, 2), 2 }, json);
                for (size_t i = 0; i < b.len; i++)
                    ok &= b.p[i] >= 0x20 && b.p[i] != 0x7f;
                ok &= utf8_check(work_done(&b));
            }
        row(name_of("no raw control of 65,536 pairs, %s", json ? "json"
            : "logfmt"), ok, "one got through");
    }
    struct bb b = work_bb();
    memset(guard_end - 1000, 'x', 1000);
    log_put_value(&b, (sl){ guard_end - 1000, 1000 }, false);
    row("a value is cut at 256 bytes", b.len == 259
        && memcmp(b.p + 256, "...", 3) == 0, "%zu bytes", b.len);
    /* whole lines: one event, one line, in both forms */
    for (int json = 0; json < 2; json++) {
        log_clear();
        memset(log_quota_tab, 0, sizeof log_quota_tab);
        cfg.log_json = json;
        world_wall = 1726760839007 - world_ms;
        LOG(EV_NAME_BAD, KV("server", SL("a\nb\x1b[31m\"")),
            KV("empty", ((sl){ NULL, 0 })), KV("x", SL("1")));
        row_str(json ? "a json line" : "a logfmt line", sl_str(log_buf), json
            ? "{\"ts\":\"2024-09-19T15:47:19.007Z\",\"level\":\"info\","
              "\"event\":\"NAME_BAD\",\"num\":\"2001\",\"msg\":\"malformed "
              "server name\",\"server\":\"a\\nb\\u001b[31m\\\"\","
              "\"x\":\"1\"}\n"
            : "ts=2024-09-19T15:47:19.007Z level=info event=NAME_BAD "
              "num=2001 msg=\"malformed server name\" "
              "server=\"a\\nb\\x1b[31m\\\"\" x=1\n");
    }
    cfg.log_json = false;
    static const struct { char level; enum event ev; bool want; } level[] = {
        { 'e', EV_SFU_AUTH, true }, { 'e', EV_TLS_NAME, false },
        { 'w', EV_TLS_NAME, true }, { 'w', EV_NAME_BAD, false },
        { 'i', EV_NAME_BAD, true }, { 'i', EV_REQUEST, false },
        { 'd', EV_REQUEST, true }, { 0, EV_NAME_BAD, true },
        { 0, EV_REQUEST, false },
    };
    for (size_t i = 0; i < COUNT_OF(level); i++) {
        uint64_t before = met.event[level[i].ev];
        cfg.log_level = level[i].level;
        log_clear();
        LOG0(level[i].ev);
        row(name_of("level %c, %s", level[i].level ? level[i].level : '-',
                    event_tab[level[i].ev].label),
            (log_len > 0) == level[i].want
            && met.event[level[i].ev] == before + 1, "wrong or uncounted");
    }
    cfg.log_level = 'd';
    /* more than a second may hold: dropped, then told */
    log_clear();
    memset(log_quota_tab, 0, sizeof log_quota_tab);
    for (int i = 0; i < 600; i++)
        LOG0(EV_NAME_BAD);
    unsigned lines = 0;
    for (size_t i = 0; i < log_len; i++)
        lines += log_buf[i] == '\n';
    row_int("lines of one event in a second", lines, 500);
    world_ms += 1000;
    log_clear();
    LOG0(EV_NAME_BAD);
    row("the dropped ones are told", log_has("suppressed=100"), "%s",
        log_buf);
    LOG0(EV_NAME_BAD);
    row("and told once", strstr(strstr(log_buf, "suppressed=") + 1,
        "suppressed=") == NULL, "%s", log_buf);
    /* a line is at most 2 KB whatever its values */
    uint8_t big[256];
    memset(big, 0x1b, sizeof big);
    log_clear();
    sl v = { big, sizeof big };
    LOG(EV_NAME_BAD, KV("a", v), KV("b", v), KV("c", v), KV("d", v));
    row("a line keeps within 2 KB and its last byte", log_len <= 2048
        && log_len > 900 && log_buf[log_len - 1] == '\n'
        && !strstr(log_buf, " d=") && log_has(" a="), "%zu bytes", log_len);
    log_clear();
}

/* ---- hosts, resolv.conf, key files ---- */

static void hosts_rows(void)
{
    static const char text[] =
        "# a comment\n127.0.0.1 localhost\n::1 localhost ip6-localhost\n"
        "10.0.0.1\tdb Db.Example.org # db2\n10.0.0.2 db\r\n"
        "bad.address db\n10.0.0.3\n   10.0.0.4   spaced  \n"
        "10.0.0.5 cut\0name\n300.1.1.1 db\n10.0.0.6 last";
    static const struct { const char *name; bool v6; const char *want; }
    tab[] = {
        { "localhost", false, "127.0.0.1 " }, { "LOCALHOST", true, "[::1] " },
        { "localhost.", false, "127.0.0.1 " },
        { "db", false, "10.0.0.1 10.0.0.2 " },
        { "db.example.org", false, "10.0.0.1 " }, { "db2", false, "" },
        { "db", true, "" }, { "spaced", false, "10.0.0.4 " },
        { "last", false, "10.0.0.6 " }, { "cut", false, "" },
        { "nosuch", false, "" }, { "", false, "" },
        { "ip6-localhost", false, "" }, { "#", false, "" },
    };
    sl in = { guarded(text, sizeof text - 1), sizeof text - 1 };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        struct ip out[4];
        struct bb b = work_bb();
        size_t n = cf_hosts_find(in, sl_str(tab[i].name), tab[i].v6, out, 4);
        for (size_t k = 0; k < n; k++) {
            bb_ip(&b, &out[k], 0);
            bb_byte(&b, ' ');
        }
        row_str(name_of("hosts: %s %s", tab[i].name, tab[i].v6 ? "AAAA"
            : "A"), work_done(&b), tab[i].want);
    }
    struct ip one;
    row("hosts: no more than asked for", cf_hosts_find(in, SL("db"), false,
        &one, 1) == 1, "more");
    row("hosts: known in either family", cf_hosts_has(in,
        SL("ip6-localhost")) && !cf_hosts_has(in, SL("x")), "wrong");
}

/* text | what was read */
static void resolv_row(struct vec *v)
{
    sl in = vec_sl(v, 0);
    struct resolv r;
    struct bb b = work_bb();
    uint8_t text[64];
    cf_resolv_parse((sl){ guarded(in.p, in.len), in.len }, &r);
    for (size_t i = 0; i < r.server_cnt; i++) {
        bb_put(&b, text_addr(text, &r.server[i]));
        bb_byte(&b, ' ');
    }
    for (size_t i = 0; i < r.search_cnt; i++) {
        bb_put(&b, (sl){ r.search[i].text, r.search[i].len });
        bb_byte(&b, ' ');
    }
    bb_str(&b, "ndots ");
    bb_u64(&b, r.ndots);
    bb_str(&b, " attempts ");
    bb_u64(&b, r.attempts);
    bb_str(&b, " timeout ");
    bb_u64(&b, (uint64_t)r.timeout_ms);
    row_text(vec_name(v, vec_str(v, 0)), work_done(&b), vec_sl(v, 1));
}

static void test_formats(void)
{
    hosts_rows();
    vec_each("resolv.txt", resolv_row);
    static const struct { const char *in; int want; const char *key, *secret; }
    tab[] = {
        { "key: secret", 1, "key", "secret" },
        { "key:secret\r", 1, "key", "secret" },
        { "  key  :  secret  ", 1, "key", "secret" },
        { "", 0, "", "" }, { "   \t\r", 0, "", "" }, { "# x: y", 0, "", "" },
        { "key", -1, "", "" }, { ":", -1, "", "" }, { "key:", -1, "", "" },
        { ": secret", -1, "", "" }, { "a:b:c", -1, "", "" },
        { "a: b:", -1, "", "" }, { "key: a b", 1, "key", "a b" },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        sl key = { NULL, 0 }, secret = { NULL, 0 };
        size_t len = strlen(tab[i].in);
        int got = cf_key_line((sl){ guarded(tab[i].in, len), len }, &key,
            &secret);
        row(name_of("key line `%s`", tab[i].in), got == tab[i].want
            && (got < 1 || (sl_eq(key, sl_str(tab[i].key))
                            && sl_eq(secret, sl_str(tab[i].secret)))),
            "got %d", got);
    }
}

/* ---- metrics ---- */

/* Whether a line is a sample of the text format 0.0.4. */
static bool metric_line_ok(sl line)
{
    size_t i = 0;
    while (i < line.len && (is_alnum(line.p[i]) || line.p[i] == '_'))
        i++;
    if (i == 0)
        return false;
    if (i < line.len && line.p[i] == '{') {
        size_t end = sl_find(line, '}');
        unsigned quotes = 0;
        for (size_t k = i; k < end; k++) {
            quotes += line.p[k] == '"';
            if (line.p[k] == '\\' || line.p[k] == '\n')
                return false;
        }
        if (end == line.len || quotes % 2 || quotes == 0)
            return false;
        i = end + 1;
    }
    if (i + 1 >= line.len || line.p[i] != ' ')
        return false;
    for (i++; i < line.len; i++)
        if ((line.p[i] < '0' || line.p[i] > '9') && line.p[i] != '.')
            return false;
    return true;
}

static void test_metrics(void)
{
    static struct met m;
    struct bb b = work_bb();
    memset(&m, 0, sizeof m);
    m.request[RL_GET_TOKEN][met_code(200)] = 3;
    m.request[RL_SFU_GET][met_code(505)] = 18446744073709551615u;
    m.event[EV_NAME_BAD] = 7;
    m.cpu_us = 1234567;
    m.start_ms = 1726760839007;
    static const int64_t took[] = { 0, 1000, 1001, 99999999999 };
    for (size_t i = 0; i < COUNT_OF(took); i++)
        met_observe(&m.request_time[RL_GET_TOKEN], took[i]);
    met_put(&b, &m);
    row("fits the reply's buffer", b.len < LIM_BIG_LEN - 1024, "%zu", b.len);
    /* each line, and each name announced before its first sample */
    sl rest = work_done(&b);
    static char seen[32768];
    size_t bad = 0, twice = 0, unknown = 0, samples = 0;
    seen[0] = 0;
    while (rest.len) {
        size_t n = sl_find(rest, '\n');
        sl line = { rest.p, n };
        char key[256];
        rest = sl_skip(rest, n + 1);
        if (sl_starts(line, SL("# HELP "))) {
            sl name = sl_skip(line, 7);
            snprintf(key, sizeof key, "\n!%.*s ", (int)sl_find(name, ' '),
                (const char *)name.p);
            twice += strstr(seen, key) != NULL;
            strcat(seen, key);
            continue;
        }
        if (sl_starts(line, SL("# TYPE ")))
            continue;
        bad += !metric_line_ok(line);
        samples++;
        size_t stem = 0;
        while (stem < line.len && line.p[stem] != '{'
               && line.p[stem] != ' ')
            stem++;
        static const char *const tail[] = { "", "_bucket", "_sum",
            "_count" };
        bool known = false;
        for (size_t t = 0; t < COUNT_OF(tail); t++)
            if (sl_ends((sl){ line.p, stem }, sl_str(tail[t]))) {
                snprintf(key, sizeof key, "\n!%.*s ",
                    (int)(stem - strlen(tail[t])), (const char *)line.p);
                known |= strstr(seen, key) != NULL;
            }
        unknown += !known;
    }
    row_int("lines that are no sample", (int64_t)bad, 0);
    row_int("names announced twice", (int64_t)twice, 0);
    row_int("samples of unannounced names", (int64_t)unknown, 0);
    row("samples of every event", samples > EV_CNT, "%zu", samples);
    bb_byte(&b, 0);
    static const char *const want[] = {
        "\nlkjwt_http_requests_total{route=\"/get_token\",code=\"200\"} 3\n",
        "{route=\"/sfu/get\",code=\"505\"} 18446744073709551615\n",
        "{route=\"/get_token\",le=\"0.001000\"} 2\n",
        "{route=\"/get_token\",le=\"0.005000\"} 3\n",
        "{route=\"/get_token\",le=\"10.000000\"} 3\n",
        "{route=\"/get_token\",le=\"+Inf\"} 4\n",
        "_seconds_sum{route=\"/get_token\"} 100000.002000\n",
        "_seconds_count{route=\"/get_token\"} 4\n",
        "\nlkjwt_events_total{event=\"NAME_BAD\"} 7\n",
        "\nprocess_cpu_seconds_total 1.234567\n",
        "\nprocess_start_time_seconds 1726760839\n",
        "\nlkjwt_build_info{version=\"" LKJWT_VERSION "\"} 1\n",
    };
    for (size_t i = 0; i < COUNT_OF(want); i++)
        row(want[i] + (want[i][0] == '\n'), strstr((char *)work_buf, want[i])
            != NULL, "not in the text");
    bool fits = true;
    for (size_t cap = 0; cap < 3000; cap += 7) {
        struct bb s = { guard_end - cap, 0, cap, false };
        met_put(&s, &m);
        fits &= s.over;
    }
    row("a short buffer only latches", fits, "no overflow");
}
