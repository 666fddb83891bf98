/* Section 11, and the protobuf of 13, by vectors with fixed inputs. */

static void key_of(sl secret, br_hmac_key_context *out)
{
    br_hmac_key_init(out, &br_sha256_vtable, secret.p, secret.len);
}

/* result | part | part ... */
static void hash_row(struct vec *v)
{
    sl part[4];
    uint8_t out[HASH_NAME_LEN];
    size_t cnt = v->cnt - 1;
    for (size_t i = 0; i < cnt && i < 4; i++)
        part[i] = vec_sl(v, i + 1);
    bool ok = jwt_hash_name(part, cnt, out);
    row_text(vec_name(v, vec_str(v, 1)), ok ? (sl){ out, sizeof out }
        : (sl){ NULL, 0 }, vec_sl(v, 0));
}

/* key | secret | now | ttl | identity | room | publish,update | payload |
 * token: the identity is empty for a service token, the room too for one
 * that creates rooms. */
static void jwt_row(struct vec *v)
{
    br_hmac_key_context key;
    sl flags = vec_sl(v, 6);
    struct grant g = { vec_sl(v, 0), vec_sl(v, 4), vec_sl(v, 5),
        atoll(vec_str(v, 2)), atoll(vec_str(v, 3)),
        flags.len > 0 && flags.p[0] == 'p',
        flags.len > 0 && flags.p[flags.len - 1] == 'u' };
    struct bb p = work_bb();
    key_of(vec_sl(v, 1), &key);
    if (g.identity.len)
        jwt_put_join(&p, &g);
    else
        jwt_put_service(&p, g.key, g.room, g.now_wall);
    const char *name = vec_name(v, vec_str(v, 5));
    sl text;
    bool ok = bb_finish(&p, &text);
    sl want = vec_sl(v, 7);
    /* payload and token lie in one field, a blank between */
    size_t cut = sl_find(want, ' ');
    row_text(name, ok ? text : (sl){ NULL, 0 }, (sl){ want.p, cut });
    struct bb t = { work_buf + p.len, 0, sizeof work_buf - p.len, false };
    jwt_sign(&t, &key, text);
    row_text(vec_name(v, "token"), work_done(&t), sl_skip(want, cut + 1));
    /* what Element Call's atob() needs: neither - nor _ in the payload */
    sl token = work_done(&t);
    token = sl_skip(token, sl_find(token, '.') + 1);
    token.len = sl_find(token, '.');
    row(vec_name(v, "payload for atob()"), sl_find(token, '-') == token.len
        && sl_find(token, '_') == token.len, "holds - or _");
}

static void test_jwt(void)
{
    vec_each("hashes.txt", hash_row);
    vec_each("tokens.txt", jwt_row);
    /* HS256 of RFC 7515 A.1 has a CRLF in its header; the MAC itself by
     * RFC 4231 case 2 */
    br_hmac_key_context key;
    br_hmac_context h;
    uint8_t mac[32];
    key_of(SL("Jefe"), &key);
    br_hmac_init(&h, &key, 0);
    br_hmac_update(&h, "what do ya want for nothing?", 28);
    br_hmac_out(&h, mac);
    row_text("RFC 4231 case 2", (sl){ mac, 32 }, SL(
        "\x5b\xdc\xc1\x46\xbf\x60\x75\x4e\x6a\x04\x24\x26\x08\x95\x75\xc7"
        "\x5a\x00\x3f\x08\x9d\x27\x39\x83\x9d\xec\x58\xb9\x64\xec\x38\x43"));
    /* the longest inputs that a request may carry */
    static uint8_t big[LIM_OTHER_LEN];
    uint8_t out[HASH_NAME_LEN], again[HASH_NAME_LEN];
    memset(big, 1, sizeof big);
    sl part[3] = { { big, LIM_ID_LEN }, { big, LIM_OTHER_LEN },
        { big, LIM_OTHER_LEN } };
    row("the longest parts, each byte six", jwt_hash_name(part, 3, out),
        "overflow");
    part[2].len--;
    row("one byte less hashes otherwise", jwt_hash_name(part, 3, again)
        && memcmp(out, again, sizeof out) != 0, "same");
    memset(big, 0xff, 1);
    row("what is no UTF-8 has no name", !jwt_hash_name(part, 3, out),
        "hashed");
    /* short buffers only latch */
    bool latched = true;
    struct grant g = { SL("key"), SL("@a:b"), SL("room"), 1, 60, true,
        true };
    struct bb whole = work_bb();
    jwt_put_join(&whole, &g);
    for (size_t cap = 0; cap < whole.len; cap++) {
        struct bb b = { guard_end - cap, 0, cap, false };
        jwt_put_join(&b, &g);
        latched &= b.over;
    }
    row("a short buffer only latches", latched, "no overflow");
    /* no token but the service's own carries rights over rooms */
    bb_byte(&whole, 0);
    const char *text = (char *)work_buf;
    row("a join token's rights", !strstr(text, "roomCreate")
        && !strstr(text, "roomAdmin") && !strstr(text, "sha256")
        && !strstr(text, "canPublishData"), "%s", text);
}

/* method | hex | room | identity */
static void protobuf_row(struct vec *v)
{
    static uint8_t want[512];
    struct bb b = work_bb();
    size_t n = hex_parse(vec_str(v, 1), want, sizeof want);
    if (strcmp(vec_str(v, 0), "CreateRoom") == 0)
        pb_create_room(&b, vec_sl(v, 2));
    else
        pb_participant(&b, vec_sl(v, 2), vec_sl(v, 3));
    row(vec_name(v, vec_str(v, 0)), sl_eq(work_done(&b), (sl){ want, n }),
        "%zu bytes, want %zu, or they differ", b.len, n);
}

static void test_protobuf(void)
{
    vec_each("twirp.txt", protobuf_row);
    struct bb b = { guard_end - 49, 0, 49, false };
    pb_create_room(&b, SL("O8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3qSc"));
    row("one byte short", b.over, "no overflow");
}
