/* Vectors of others, driven through lkjwt's own functions: lkjwt.c is
 * included as by ../unit.c.
 *
 *   build/crypto-gcc FILE...       checks them: `N passed, N failed`
 *   build/crypto-gcc sign FILE     signs each payload, a token a line
 *
 * A file is Wycheproof's as Debian's BoringSSL has it, or one of check.py's
 * in the same form: `[name = value]` holds for the vectors that follow, the
 * lines `name = value` of one vector end with an empty one. What a file is
 * for, its first name tells.
 */
#include "../unit_world.h"

enum { FIELD_CNT = 24, FIELD_LEN = 70000 };
struct field { const char *name, *value; };
static struct field group_tab[FIELD_CNT], vector_tab[FIELD_CNT];
static size_t group_cnt, vector_cnt;
static const char *file_name;
static bool is_signing;

static const char *field_of(const char *name)
{
    for (size_t i = 0; i < vector_cnt; i++)
        if (strcmp(vector_tab[i].name, name) == 0)
            return vector_tab[i].value;
    for (size_t i = 0; i < group_cnt; i++)
        if (strcmp(group_tab[i].name, name) == 0)
            return group_tab[i].value;
    return "";
}

/* The bytes of a field of hex digits; each name has a buffer of its own. */
static sl bytes_of(const char *name)
{
    static struct { const char *name; uint8_t mem[FIELD_LEN / 2]; } tab[8];
    const char *hex = field_of(name);
    size_t i = 0;
    while (tab[i].name && strcmp(tab[i].name, name))
        i++;
    tab[i].name = name;
    return (sl){ tab[i].mem, hex_parse(hex, tab[i].mem, FIELD_LEN / 2) };
}

/* ---- HMAC-SHA256: made, and judged as a token's ---- */

static bool hmac_ok(void)
{
    struct api_key key = { .name = SL("k") };
    sl msg = bytes_of("msg"), tag = bytes_of("tag"), secret = bytes_of("key");
    uint8_t mac[32], text[44];
    br_hmac_context h;
    struct bb b = BB(text);
    br_hmac_key_init(&key.sec_key, &br_sha256_vtable, secret.p, secret.len);
    br_hmac_init(&h, &key.sec_key, 0);
    br_hmac_update(&h, msg.p, msg.len);
    br_hmac_out(&h, mac);
    b64_put(&b, b64_url, tag);
    bool is_made = tag.len <= 32 && memcmp(mac, tag.p, tag.len) == 0;
    bool is_taken = jwt_signers(msg, (sl){ text, b.len }, &key, 1) == 1;
    /* a shorter tag proves less: never taken, though it is right */
    return is_made && is_taken == (tag.len == 32);
}

/* ---- JWS: a token judged at a time, for one of two keys ---- */

static const char *jws_judge(void)
{
    struct api_key key[2] = { { .name = sl_str(field_of("name")) },
        { .name = SL("another") } };
    sl secret = bytes_of("secret");
    uint8_t sum[36];
    br_hmac_key_init(&key[0].sec_key, &br_sha256_vtable, secret.p,
        secret.len);
    br_hmac_key_init(&key[1].sec_key, &br_sha256_vtable, "other", 5);
    sl token = sl_str(field_of("token"));
    const char *why = jwt_check_webhook((sl){ guarded(token.p, token.len),
        token.len }, key, 2, atoll(field_of("now")), sum);
    return why ? why : "taken";
}

/* The token of a payload, by the function that signs all of ours. */
static void jws_sign(void)
{
    static uint8_t text[FIELD_LEN];
    br_hmac_key_context key;
    struct bb b = BB(text);
    sl secret = bytes_of("secret");
    br_hmac_key_init(&key, &br_sha256_vtable, secret.p, secret.len);
    jwt_sign(&b, &key, bytes_of("payload"));
    printf("%.*s\n", (int)b.len, (const char *)text);
}

/* ---- signatures of certificates ---- */

static size_t hash_of(sl msg, uint8_t out[64], const unsigned char **oid)
{
    static const struct { const char *name; size_t at, len;
        unsigned char oid[10]; } tab[] = {
        { "SHA-256", 0, 32, { 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 1 } },
        { "SHA-384", 1, 48, { 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 2 } },
        { "SHA-512", 2, 64, { 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 3 } },
    };
    uint8_t sum[3][64];
    tls_hashes(msg, sum);
    for (size_t i = 0; i < COUNT_OF(tab); i++)
        if (strcmp(field_of("sha"), tab[i].name) == 0) {
            memcpy(out, sum[tab[i].at], tab[i].len);
            *oid = tab[i].oid;
            return tab[i].len;
        }
    abort();
}

/* Twice: the second time a good one comes from the cache. */
static bool ecdsa_ok(void)
{
    const unsigned char *oid;
    uint8_t hash[64];
    sl q = bytes_of("key.uncompressed"), sig = bytes_of("sig");
    size_t len = hash_of(bytes_of("msg"), hash, &oid);
    bool is_p256 = strcmp(field_of("key.curve"), "secp256r1") == 0;
    br_ec_public_key pk = { is_p256 ? BR_EC_secp256r1 : BR_EC_secp384r1,
        (uint8_t *)(uintptr_t)q.p, q.len };
    bool ok[2];
    hs_now = &hs_pool[0];
    for (int k = 0; k < 2; k++) {
        hs_now->sig_cnt = 0;
        ok[k] = tls_ecdsa_vrfy(tls_ec(), hash, len, &pk, sig.p, sig.len);
    }
    if (ok[0] != ok[1])
        row(file_name, false, "the cache says otherwise");
    return ok[0];
}

static bool rsa_ok(void)
{
    const unsigned char *oid;
    uint8_t hash[64], got[64];
    sl n = bytes_of("n"), e = bytes_of("e"), sig = bytes_of("sig");
    size_t len = hash_of(bytes_of("msg"), hash, &oid);
    br_rsa_public_key pk = { (uint8_t *)(uintptr_t)n.p, n.len,
        (uint8_t *)(uintptr_t)e.p, e.len };
    bool ok[2];
    hs_now = &hs_pool[0];
    for (int k = 0; k < 2; k++) {
        hs_now->sig_cnt = 0;
        ok[k] = tls_rsa_vrfy(sig.p, sig.len, oid, len, &pk, got)
            && memcmp(got, hash, len) == 0;
    }
    if (ok[0] != ok[1])
        row(file_name, false, "the cache says otherwise");
    return ok[0];
}

/* ---- files ---- */

static void vector_end(void)
{
    const char *want = field_of("result");
    if (is_signing && vector_cnt)
        jws_sign();
    if (is_signing || vector_cnt == 0)
        return;
    const char *name = name_of("%s: %s %s", file_name, field_of("tcId"),
        field_of("comment"));
    if (field_of("secret")[0]) {
        const char *got = jws_judge();
        row(name, strcmp(got, want) == 0, "%s, not %s: %.200s", got, want,
            field_of("token"));
        return;
    }
    bool ok = field_of("tag")[0] ? hmac_ok()
        : field_of("key.curve")[0] ? ecdsa_ok() : rsa_ok();
    /* BER: BearSSL reads the lengths and leading zeros of r and s more
     * freely than DER is written. The two numbers are the same, so whoever
     * holds the key has signed; nothing here asks for one spelling. */
    if (strcmp(want, "acceptable") != 0
        && strcmp(field_of("flags"), "BER") != 0)
        row(name, ok == (strcmp(want, "valid") == 0), "%s, not %s (%s)",
            ok ? "taken" : "refused", want, field_of("flags"));
}

static void field_put(struct field *tab, size_t *cnt, char *line)
{
    char *cut = strstr(line, " =");
    if (!cut || *cnt == FIELD_CNT)
        abort();
    *cut = 0;
    cut += cut[2] == ' ' ? 3 : 2;
    for (size_t i = 0; i < *cnt; i++)
        if (strcmp(tab[i].name, line) == 0)
            abort();
    tab[(*cnt)++] = (struct field){ line, cut };
}

static void file_run(const char *path)
{
    static char text[8 << 20];
    size_t len;
    bool was_group = false;
    unsigned before = passed + failed;
    const char *slash = strrchr(path, '/');
    file_name = slash ? slash + 1 : path;
    group_cnt = vector_cnt = 0;
    file_read(path, text, sizeof text, &len);
    for (char *p = text; p < text + len; ) {
        char *end = strchr(p, '\n');
        end = end ? end : text + len;
        *end = 0;
        size_t n = (size_t)(end - p);
        if (n == 0) {
            vector_end();
            vector_cnt = 0;
        } else if (p[0] == '[' && p[n - 1] == ']') {
            p[n - 1] = 0;
            if (!was_group)
                group_cnt = 0;
            field_put(group_tab, &group_cnt, p + 1);
        } else if (strncmp(p, "# tcId", 6) == 0) {
            field_put(vector_tab, &vector_cnt, p + 2);
        } else if (p[0] != '#') {
            field_put(vector_tab, &vector_cnt, p);
        }
        was_group = p[0] == '[';
        p = end + 1;
    }
    vector_end();
    if (!is_signing && passed + failed == before)
        row(path, false, "no vector");
}

int main(int argc, char **argv)
{
    group = "crypto";
    guard_open();
    is_signing = argc > 1 && strcmp(argv[1], "sign") == 0;
    for (int i = 1 + is_signing; i < argc; i++)
        file_run(argv[i]);
    if (!is_signing)
        printf("%u passed, %u failed\n", passed, failed);
    return failed != 0;
}
