/* The application-service mode: what is pure of it (registration files,
 * owners in stored jobs), and the places of the participants watched. The
 * rest is tested from outside: blackbox/test_appservice.py. */

static const struct {
    const char *name, *text;
    unsigned line;                   /* refused there; 0: read */
    const char *id, *as_token, *hs_token;
} registration_tab[] = {
    { "the least", "as_token: a\nhs_token: b", 0, "", "a", "b" },
    { "nothing", "", 0, "", "", "" },
    { "all three, other keys between", "id: x\nurl: null\nas_token: 'a b'\n"
      "sender_localpart: l\nhs_token: \"c\"\n", 0, "x", "a b", "c" },
    { "CR LF", "as_token: a\r\nhs_token: b\r\n", 0, "", "a", "b" },
    { "marker, blank lines, comments", "---\n\n  \n# c\n   # d\nas_token: a # e\n"
      "hs_token: 'b'# f\n", 7, "", "a", "" },
    { "a comment after quotes", "hs_token: 'b' # f\n", 0, "", "", "b" },
    { "a hash within", "as_token: a#b\nhs_token: \"c # d\"", 0, "", "a#b",
      "c # d" },
    { "a token that begins with a dash", "as_token: -a", 0, "", "-a", "" },
    { "colons within", "as_token: a:b", 0, "", "a:b", "" },
    { "what is deeper is passed over", "namespaces:\n  users:\n    - regex: "
      "'@.*:x'\n      exclusive: false\n  rooms: []\nas_token: a", 0, "",
      "a", "" },
    { "a token that is deeper", "x:\n  as_token: a\nhs_token: b", 0, "", "",
      "b" },
    { "lists at the margin", "scopes:\n- 'a'\n- b\nas_token: a", 0, "", "a",
      "" },
    { "lists and maps in brackets", "a: []\nb: {x: [y]}\nc: ['d', e]\n"
      "as_token: a", 0, "", "a", "" },
    { "a key twice", "as_token: a\nas_token: a", 2, "", "a", "" },
    { "an empty token", "as_token:\nhs_token: b", 1, "", "", "" },
    { "empty quotes", "as_token: ''", 1, "", "", "" },
    { "null", "as_token: null", 1, "", "", "" },
    { "null with a comment", "as_token: null # x", 1, "", "", "" },
    { "a tilde", "as_token: ~", 1, "", "", "" },
    { "null in quotes is a word", "as_token: 'null'", 0, "", "null", "" },
    { "a list for a token", "as_token: [a]", 1, "", "", "" },
    { "an anchor", "as_token: &a b", 1, "", "", "" },
    { "an alias", "x: *a", 1, "", "", "" },
    { "a tag", "as_token: !!str a", 1, "", "", "" },
    { "a block", "as_token: |\n  a", 1, "", "", "" },
    { "a folded block", "x: >-\n  a", 1, "", "", "" },
    { "an escape", "as_token: \"a\\n\"", 1, "", "", "" },
    { "two quotes", "as_token: 'it''s'", 1, "", "", "" },
    { "an open quote", "as_token: 'a", 1, "", "", "" },
    { "text behind quotes", "as_token: 'a' b", 1, "", "", "" },
    { "a value that goes on", "as_token: a\n  b", 2, "", "a", "" },
    { "a pair below a scalar", "id: x\n  y: z", 2, "x", "", "" },
    { "no pair", "hello", 1, "", "", "" },
    { "no blank behind the colon", "as_token:a", 1, "", "", "" },
    { "a blank before the colon", "as_token : a", 1, "", "", "" },
    { "a pair in a pair", "as_token: a: b", 1, "", "", "" },
    { "a key in quotes", "'as_token': a", 1, "", "", "" },
    { "a tab", "x:\n\ty: z", 2, "", "", "" },
    { "a marker further down", "id: x\n---\nas_token: a", 2, "x", "", "" },
    { "JSON", "{\"as_token\": \"a\"}", 1, "", "", "" },
    { "a control byte", "as_token: a\x01" "b", 1, "", "", "" },
    { "not ASCII", "as_token: \xc3\xa9", 1, "", "", "" },
    { "a question mark alone", "? x", 1, "", "", "" },
};

static sl registration_part(const struct registration *r, int i)
{
    return i == 0 ? r->id : i == 1 ? r->as_token : r->hs_token;
}

static void test_registration(void)
{
    for (size_t i = 0; i < COUNT_OF(registration_tab); i++) {
        size_t len = strlen(registration_tab[i].text);
        const char *want[3] = { registration_tab[i].id,
            registration_tab[i].as_token, registration_tab[i].hs_token };
        struct registration r;
        unsigned got = cf_registration((sl){ guarded(
            registration_tab[i].text, len), len }, &r);
        bool same = got == registration_tab[i].line;
        for (int k = 0; k < 3; k++)
            same &= sl_eq(registration_part(&r, k), sl_str(want[k]));
        row(name_of("registration: %s", registration_tab[i].name), same,
            "line %u, `%.*s` `%.*s` `%.*s`", got, (int)r.id.len,
            r.id.p ? (const char *)r.id.p : "", (int)r.as_token.len,
            r.as_token.p ? (const char *)r.as_token.p : "",
            (int)r.hs_token.len,
            r.hs_token.p ? (const char *)r.hs_token.p : "");
    }
    /* cut anywhere, it is read to its end and no further */
    static const char whole[] = "id: lkjwt\nas_token: \"a\" # x\nx:\n  - y: 'z'\n"
        "hs_token: b\n";
    bool inside = true;
    for (size_t len = 0; len < sizeof whole; len++) {
        struct registration r;
        const uint8_t *at = guarded(whole, len);
        inside &= cf_registration((sl){ at, len }, &r) <= 5;
        for (int k = 0; k < 3; k++) {
            sl s = registration_part(&r, k);
            inside &= !s.p || (s.p >= at && s.p + s.len <= at + len);
        }
    }
    row("registration: cut anywhere", inside, "outside of the text");
    row("tokens: what can stand in a header", cf_token_check(SL("a~!"))
        && !cf_token_check(SL("")) && !cf_token_check(SL("a b"))
        && !cf_token_check(SL("a\r")) && !cf_token_check(SL("\xc3\xa9"))
        && !cf_token_check(SL("a\x7f")), "wrong");
}

/* A delegated leave's owner is stored with it, and judged when it is read. */
static void test_owner(void)
{
    static const struct { const char *name, *more, *why; } tab[] = {
        { "one", ",\"Owner\":\"@a:example.com\"", NULL },
        { "none", "", NULL }, { "empty", ",\"Owner\":\"\"", NULL },
        { "of another server", ",\"Owner\":\"@a:example.org\"", "Owner" },
        { "no user", ",\"Owner\":\"a:example.com\"", "Owner" },
        { "with a control byte", ",\"Owner\":\"@a\\u0001:example.com\"",
          "Owner" },
        { "beside a second identity", ",\"LiveKitIdentity2\":\"x\","
          "\"Owner\":\"@a:example.com\"", "Owner" },
        { "a number", ",\"Owner\":1",
          "value is not the JSON object expected" },
    };
    static const char field[] = "[\"O8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3"
        "qSc\",\"M3VnsLXrkbxIDINXO64u8PZzFyD9ZYFiQULR2dshWYs\"]";
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        char value[600];
        static uint8_t copy[2][600], out[1200];
        snprintf(value, sizeof value, "{\"Params\":{\"DelayId\":\"d\","
            "\"DelayTimeout\":7200000000000,\"ServerName\":\"example.com\","
            "\"LiveKitRoom\":\"O8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3qSc\","
            "\"LiveKitIdentity\":\"M3VnsLXrkbxIDINXO64u8PZzFyD9ZYFiQULR2dshWYs"
            "\"%s},\"RestartedAt\":\"2026-07-23T07:28:51Z\"}", tab[i].more);
        struct record r;
        memcpy(copy[0], field, sizeof field);
        memcpy(copy[1], value, strlen(value));
        const char *why = rec_parse(copy[0], sizeof field - 1, copy[1],
            strlen(value), &r);
        row(name_of("owner: %s", tab[i].name), tab[i].why
            ? why && strcmp(why, tab[i].why) == 0 : !why, "%s",
            why ? why : "read");
        if (why || !r.owner.len)
            continue;
        struct bb b = BB(out);
        rec_put(&b, &r);
        row_str(name_of("owner: %s, written", tab[i].name),
            (sl){ out, b.len }, value);
    }
}

/* What the seats hold is what stands in the table of pieces. */
static size_t seat_pieces_used(void)
{
    size_t n = 0;
    for (size_t i = 0; i < LIM_PIECE_CNT; i++)
        n += seat_piece[i];
    return n;
}

static bool seat_put(size_t n, size_t len, bool is_foreign, size_t user,
    int64_t now)
{
    static char room[LIM_ID_LEN + 1], who[64], names[2][HASH_NAME_LEN + 1];
    memset(room, 'r', len);
    snprintf(who, sizeof who, "@u%zu:s", user);
    snprintf(names[0], sizeof names[0], "%043zu", n % 7);
    snprintf(names[1], sizeof names[1], "%043zu", n);
    struct seat_params p = { sl_str(names[0]), sl_str(names[1]),
        { (uint8_t *)room, len }, sl_str(who), is_foreign ? SL("f")
        : SL("s"), is_foreign };
    return seat_take(&p, now);
}

static void test_seats(void)
{
    size_t n = 0, kept = 0;
    int64_t now = io_now();
    cfg.member_ms = 60000;
    while (n < 2 * LIM_SEAT_CNT && seat_put(n, 20 + n % 40, false, n, now))
        n++;
    row("seats: as many as there are", n == LIM_SEAT_CNT && seat_top == n
        && met.gauge[GA_SEATS] == LIM_SEAT_CNT, "%zu", n);
    row("seats: the same one again is no more", seat_put(5, 25, false, 5,
        now + 1000) && seat_hot[5].until == now + 1000
        + LIM_SEAT_KEPT_MS, "refused, or not kept longer");
    for (size_t i = 0; i < LIM_SEAT_CNT; i += 2)
        seat_free(i);
    for (size_t i = 1; i < LIM_SEAT_CNT; i += 2) {
        char who[64];
        snprintf(who, sizeof who, "@u%zu:s", i);
        kept += sl_eq(seat_user(&seat_hot[i]), sl_str(who))
            && seat_hot[i].room_len == 20 + i % 40;
    }
    row("seats: the others keep their ids", kept == LIM_SEAT_CNT / 2, "%zu",
        kept);
    /* long ids: no two seats share a piece, and the pieces end first */
    size_t more = 0;
    while (more < LIM_SEAT_CNT && seat_put(5000 + more, LIM_ID_LEN, false,
                                           5000 + more, now))
        more++;
    size_t sum = 0;
    for (size_t i = 0; i < seat_top; i++)
        sum += seat_hot[i].is_used ? seat_pieces(&seat_hot[i]) : 0;
    row("seats: no piece is given twice", sum == seat_pieces_used()
        && more > 0 && more < LIM_SEAT_CNT / 2, "%zu for %zu, %zu more",
        seat_pieces_used(), sum, more);
    for (size_t i = seat_top; i-- > 0; )
        if (seat_hot[i].is_used)
            seat_free(i);
    row("seats: all are free again", seat_top == 0 && seat_pieces_used() == 0
        && met.gauge[GA_SEATS] == 0, "%zu, %zu", seat_top,
        seat_pieces_used());
    for (n = 0; n < LIM_SEAT_CNT && seat_put(n, 20, false, 1, now); )
        n++;
    row("seats: of one user", n == LIM_SEAT_USER, "%zu", n);
    size_t far = 0;
    while (far < LIM_SEAT_CNT && seat_put(3000 + far, 20, true, 3000 + far,
                                          now))
        far++;
    row("seats: of one other server", far == LIM_SEAT_SERVER, "%zu", far);
    for (size_t i = seat_top; i-- > 0; )
        seat_free(i);
    cfg.member_ms = 0;
    row("seats: none when nobody is watched", seat_put(1, 20, false, 1, now)
        && seat_top == 0, "taken");
}

static void test_appservice(void)
{
    test_owner();
    test_seats();
}
