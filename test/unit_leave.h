/* Webhooks and delayed events: sections 11, 13 and 21, their parsers. */

enum { WEBHOOK_NOW = 1726760839 };

/* What is wrong with a token for this body, "" for nothing. */
static const char *webhook_judge(sl token, sl body, int64_t now)
{
    struct api_key key = { SL("devkey"), { 0 } };
    uint8_t sum[32], want[36];
    br_sha256_context h;
    key_of(SL("devsecret"), &key.sec_key);
    const char *why = jwt_check_webhook((sl){ guarded(token.p, token.len),
        token.len }, &key, 1, now, want);
    br_sha256_init(&h);
    br_sha256_update(&h, body.p, body.len);
    br_sha256_out(&h, sum);
    return why ? why : ct_eq(sum, want, 32) ? "" : "body hash";
}

/* name | what is wrong | token | body */
static void webhook_row(struct vec *v)
{
    static const struct { const char *name; int64_t at; bool ok; } time_tab[]
        = { { "a second early", 1726760778, false },
            { "first second", 1726760779, true },
            { "last second", 1726761198, true },
            { "a second late", 1726761199, false } };
    sl token = vec_sl(v, 2), body = vec_sl(v, 3);
    row_str(vec_name(v, vec_str(v, 0)),
        sl_str(webhook_judge(token, body, WEBHOOK_NOW)), vec_str(v, 1));
    if (vec_sl(v, 1).len)
        return;
    for (size_t i = 0; i < COUNT_OF(time_tab); i++)
        row_str(vec_name(v, time_tab[i].name),
            sl_str(webhook_judge(token, body, time_tab[i].at)),
            time_tab[i].ok ? "" : "time");
    int passing = 0;                   /* no byte of a token may be another */
    for (size_t i = 0; i < token.len; i++) {
        uint8_t copy[1024];
        memcpy(copy, token.p, token.len);
        copy[i] = copy[i] == 'A' ? 'B' : 'A';
        passing += *webhook_judge((sl){ copy, token.len }, body,
            WEBHOOK_NOW) == 0;
    }
    row_int("tokens with one byte changed that pass", passing, 0);
    for (size_t cut = passing = 0; cut < token.len; cut++)
        passing += *webhook_judge((sl){ token.p, cut }, body,
            WEBHOOK_NOW) == 0;
    row_int("tokens cut short that pass", passing, 0);
}

/* Claims signed with the right key, and what is wrong with them. */
static const struct { const char *claims, *want; } claim_tab[] = {
    { "{\"iss\":\"devkey\",\"sha256\":\"$\"}", "" },
    { "{\"iss\":\"devkey\",\"exp\":null,\"nbf\":null,\"sha256\":\"$\"}", "" },
    { "{\"iss\":\"devkey\",\"exp\":1726760839.75,\"sha256\":\"$\"}", "" },
    { "{\"iss\":\"devkey\",\"exp\":1726760779,\"sha256\":\"$\"}", "time" },
    { "{\"iss\":\"devkey\",\"exp\":1726760780,\"sha256\":\"$\"}", "" },
    { "{\"iss\":\"devkey\",\"nbf\":1726760899,\"sha256\":\"$\"}", "" },
    { "{\"iss\":\"devkey\",\"nbf\":1726760900,\"sha256\":\"$\"}", "time" },
    { "{\"iss\":\"devkey\",\"exp\":\"1826760839\",\"sha256\":\"$\"}",
      "claims" },
    { "{\"iss\":\"devkey\",\"exp\":-9223372036854775808,\"sha256\":\"$\"}",
      "time" },
    { "{\"iss\":\"devkey\",\"exp\":99999999999999999999,\"sha256\":\"$\"}",
      "time" },
    { "{\"iss\":\"devkey2\",\"sha256\":\"$\"}", "issuer" },
    { "{\"sha256\":\"$\"}", "issuer" },
    { "{\"iss\":\"devkey\",\"sha256\":\"$\",\"video\":{\"roomJoin\":true}}",
      "join token" },
    { "{\"iss\":\"devkey\",\"sha256\":\"$\",\"video\":{\"roomJoin\":false}}",
      "" },
    { "{\"iss\":\"devkey\",\"sha256\":\"\"}", "no body hash" },
    { "{\"iss\":\"devkey\",\"sha256\":7}", "claims" },
    { "{\"iss\":\"devkey\",\"sha256\":\"$\",\"sha256\":\"$\"}", "claims" },
    { "[]", "claims" },
};

static void test_webhooks(void)
{
    static const char body[] = "{}";
    char claims[256], hash[45] = { 0 };
    uint8_t sum[32];
    br_sha256_context h;
    br_hmac_key_context key;
    vec_each("webhooks.txt", webhook_row);
    br_sha256_init(&h);
    br_sha256_update(&h, body, 2);
    br_sha256_out(&h, sum);
    struct bb text = { (uint8_t *)hash, 0, 44, false };
    b64_put(&text, b64_std, (sl){ sum, 32 });
    bb_byte(&text, '=');
    key_of(SL("devsecret"), &key);
    for (size_t i = 0; i < COUNT_OF(claim_tab); i++) {
        size_t n = 0;
        for (const char *c = claim_tab[i].claims; *c; c++)
            n += (size_t)snprintf(claims + n, sizeof claims - n, "%.*s",
                *c == '$' ? 44 : 1, *c == '$' ? hash : c);
        struct bb b = work_bb();
        jwt_sign(&b, &key, (sl){ (uint8_t *)claims, n });
        row_str(name_of("claims %s", claim_tab[i].claims),
            sl_str(webhook_judge(work_done(&b), SL(body), WEBHOOK_NOW)),
            claim_tab[i].want);
    }
}

/* Webhook bodies: what is read of them. */
static const struct { const char *in, *want; } hook_tab[] = {
    { "{}", "|||" },
    { "{\"event\":\"participant_left\",\"room\":{\"name\":\"R\",\"sid\":1},"
      "\"participant\":{\"identity\":\"I\",\"sid\":\"S\",\"x\":[{}]}}",
      "participant_left|R|I|S" },
    { "{\"event\":\"e\",\"room\":null,\"participant\":null}", "e|||" },
    { "{\"event\":\"e\",\"createdAt\":\"1\",\"track\":{\"a\":[1,2.5,true]}}",
      "e|||" },
    { "{\"numDropped\":\"3\"}", "|||" }, { "{\"numDropped\":3}", "|||" },
    { "{\"numDropped\":\"many\"}", "-" }, { "{\"numDropped\":-1}", "-" },
    { "{\"event\":1}", "-" }, { "{\"room\":\"R\"}", "-" },
    { "{\"participant\":{\"identity\":7}}", "-" },
    { "{\"event\":\"a\",\"event\":\"b\"}", "-" }, { "{} x", "-" },
    { "[]", "-" }, { "", "-" }, { "{\"event\":\"\xff\"}", "-" },
};

static const struct { const char *in; unsigned want; } reason_tab[] = {
    { "", 0 }, { "CLIENT_INITIATED", 1 }, { "1", 1 }, { "2", 2 },
    { "DUPLICATE_IDENTITY", 2 }, { "SERVER_SHUTDOWN", 3 },
    { "STATE_MISMATCH", 6 }, { "MIGRATION", 8 }, { "ROOM_CLOSED", 10 },
    { "14", 14 }, { "CONNECTION_TIMEOUT", 0 }, { "client_initiated", 0 },
    { "-1", 0 }, { "NEW_ONE", 0 },
};

static const struct { const char *in; int64_t want; } after_tab[] = {
    { "", -1 }, { "0", 0 }, { "5", 5000 }, { "86400", 86400000 },
    { "86401", 86400000 }, { "99999999999999999999999", 86400000 },
    { "-3", 0 }, { "1.5", -1 }, { "soon", -1 },
    { "Thu, 19 Sep 2024 15:47:29 GMT", 10000 },
    { "Thu, 19 Sep 2024 15:47:09 GMT", 0 },
    { "Fri, 19 Sep 2025 15:47:19 GMT", 86400000 },
};

/* ParticipantInfo in hex: sid, identity and state, "-" malformed. */
static const struct { const char *in, *want; } info_tab[] = {
    { "", "||0" }, { "0a0153", "S||0" }, { "0a01531201491802", "S|I|2" },
    { "1803", "||3" }, { "18030a0153", "S||3" }, { "0a02530a", "S\n||0" },
    { "0a", "-" }, { "18", "-" }, { "1880808080808080808080", "-" },
    { "0b", "-" }, { "3d00000000180a", "||10" }, { "3d000000", "-" },
    { "31000000000000000018020a00", "||2" }, { "0affffffff0f", "-" },
    { "1a0153", "||0" },
};

static void test_leave(void)
{
    for (size_t i = 0; i < COUNT_OF(hook_tab); i++) {
        struct webhook w;
        size_t len = strlen(hook_tab[i].in);
        struct bb b = work_bb();
        if (webhook_parse(guarded(hook_tab[i].in, len), len, &w)) {
            const sl part[] = { w.event, w.room, w.identity, w.sid };
            for (int k = 0; k < 4; k++) {
                bb_str(&b, k ? "|" : "");
                bb_put(&b, part[k]);
            }
        } else {
            bb_byte(&b, '-');
        }
        row_str(name_of("body %s", hook_tab[i].in), work_done(&b),
            hook_tab[i].want);
    }
    for (size_t i = 0; i < COUNT_OF(reason_tab); i++)
        row_int(name_of("reason %s", reason_tab[i].in),
            disconnect_reason(sl_str(reason_tab[i].in)), reason_tab[i].want);
    for (size_t i = 0; i < COUNT_OF(after_tab); i++)
        row_int(name_of("Retry-After %s", after_tab[i].in),
            retry_after_ms(sl_str(after_tab[i].in), WEBHOOK_NOW),
            after_tab[i].want);
    for (size_t i = 0; i < COUNT_OF(info_tab); i++) {
        const char *hex = info_tab[i].in;
        uint8_t raw[64];
        size_t len = strlen(hex) / 2;
        struct participant p;
        struct bb b = work_bb();
        for (size_t k = 0; k < len; k++)
            raw[k] = (uint8_t)(hex_digit(hex[2 * k]) << 4
                | hex_digit(hex[2 * k + 1]));
        if (pb_participant_parse((sl){ guarded(raw, len), len }, &p)) {
            bb_put(&b, p.sid);
            bb_byte(&b, '|');
            bb_put(&b, p.identity);
            bb_byte(&b, '|');
            bb_u64(&b, p.state);
        } else {
            bb_byte(&b, '-');
        }
        row_str(name_of("participant %s", hex), work_done(&b),
            info_tab[i].want);
    }
}
