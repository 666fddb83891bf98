/* Section 12: DER, certificates, PEM, anchors. Certificates are made here,
 * field by field and signed by BearSSL, so that each can be wrong in one
 * place; those of build/unit/certs.txt are real ones, read by Python's
 * `cryptography`, to compare with. */

/* ---- writing DER ---- */

static void der_put(struct bb *b, uint8_t tag, sl body)
{
    bb_byte(b, tag);
    if (body.len < 0x80) {
        bb_byte(b, (uint8_t)body.len);
    } else if (body.len < 0x100) {
        bb_byte(b, 0x81);
        bb_byte(b, (uint8_t)body.len);
    } else {
        bb_byte(b, 0x82);
        put16(b, (unsigned)body.len);
    }
    bb_put(b, body);
}

/* Scratch for nested parts; all of a certificate's parts live until the
 * next cert_make. */
static uint8_t der_mem[1 << 18];
static size_t der_used;

static struct bb der_new(void)
{
    return (struct bb){ der_mem + der_used, 0, sizeof der_mem - der_used,
        false };
}

static sl der_keep(const struct bb *b)
{
    if (b->over)
        abort();
    der_used += b->len;
    return (sl){ b->p, b->len };
}

static sl der_of(uint8_t tag, sl body)
{
    uint8_t *copy = malloc(body.len + 1);
    memcpy(copy, body.p, body.len);
    struct bb b = der_new();
    der_put(&b, tag, (sl){ copy, body.len });
    free(copy);
    return der_keep(&b);
}

/* The parts one behind the other. */
static sl der_join(size_t cnt, const sl *part)
{
    struct bb b = der_new();
    for (size_t i = 0; i < cnt; i++)
        bb_put(&b, part[i]);
    return der_keep(&b);
}
#define JOIN(...) der_join(sizeof((sl[]){ __VA_ARGS__ }) / sizeof(sl), \
    (sl[]){ __VA_ARGS__ })
#define SEQ(...) der_of(0x30, JOIN(__VA_ARGS__))

static sl der_hex(const char *hex)
{
    struct bb b = der_new();
    b.len = hex_parse(hex, b.p, 4096);
    return der_keep(&b);
}

static sl der_name(const char *cn)
{
    return SEQ(der_of(0x31, SEQ(SL("\x06\x03\x55\x04\x03"),
        der_of(0x0c, sl_str(cn)))));
}

static sl der_date(const char *text)
{
    return der_of(strlen(text) == 13 ? 0x17 : 0x18, sl_str(text));
}

static sl der_oid_ext(uint8_t arc)
{
    struct bb b = der_new();
    bb_put(&b, SL("\x06\x03\x55\x1d"));
    bb_byte(&b, arc);
    return der_keep(&b);
}

static sl der_ext(uint8_t arc, bool critical, sl value)
{
    return SEQ(der_oid_ext(arc), critical ? SL("\x01\x01\xff")
        : (sl){ NULL, 0 }, der_of(0x04, value));
}

/* A subjectAltName of comma-separated names; an address becomes its bytes. */
static sl der_san(const char *names)
{
    struct bb b = der_new();
    sl rest = sl_str(names), word;
    uint8_t all[4096];
    struct bb list = BB(all);
    while (sl_word(&rest, ",", &word)) {
        struct ip a;
        if (ip_parse(word, &a))
            der_put(&list, 0x87, (sl){ a.b, a.v6 ? 16 : 4 });
        else
            der_put(&list, 0x82, word);
    }
    der_put(&b, 0x30, work_done(&list));
    return der_keep(&b);
}

/* ---- keys ---- */

enum key_name { K_ROOT, K_INTER, K_INTER2, K_LEAF, K_OTHER, K_P384, K_RSA,
    K_CNT };

static struct test_key {
    bool is_made, is_rsa;
    int curve;
    uint8_t raw[BR_EC_KBUF_PRIV_MAX_SIZE], pub[BR_EC_KBUF_PUB_MAX_SIZE];
    br_ec_private_key ec;
    br_ec_public_key ec_pub;
    uint8_t rsa_raw[BR_RSA_KBUF_PRIV_SIZE(2048)];
    uint8_t rsa_pub_raw[BR_RSA_KBUF_PUB_SIZE(2048)];
    br_rsa_private_key rsa;
    br_rsa_public_key rsa_pub;
} key_tab[K_CNT];

static br_hmac_drbg_context key_rng;

static struct test_key *key_get(enum key_name name)
{
    struct test_key *k = &key_tab[name];
    if (k->is_made)
        return k;
    if (!key_rng.vtable)
        br_hmac_drbg_init(&key_rng, &br_sha256_vtable, "unit", 4);
    k->is_made = true;
    k->is_rsa = name == K_RSA;
    k->curve = name == K_P384 ? BR_EC_secp384r1 : BR_EC_secp256r1;
    if (k->is_rsa) {
        if (!br_rsa_keygen_get_default()(&key_rng.vtable, &k->rsa,
                k->rsa_raw, &k->rsa_pub, k->rsa_pub_raw, 2048, 65537))
            abort();
        return k;
    }
    br_ec_keygen(&key_rng.vtable, br_ec_get_default(), &k->ec, k->raw,
        k->curve);
    br_ec_compute_pub(br_ec_get_default(), &k->ec_pub, k->pub, &k->ec);
    return k;
}

static sl der_bits(sl body)
{
    return der_of(0x03, JOIN(SL("\0"), body));
}

static sl der_uint(const uint8_t *p, size_t len)
{
    while (len > 1 && *p == 0) {
        p++;
        len--;
    }
    sl body = { p, len };
    return der_of(0x02, *p & 0x80 ? JOIN(SL("\0"), body) : body);
}

static sl der_rsa_spki(sl n, sl e)
{
    return SEQ(SEQ(der_of(0x06, OID(oid_rsa)), SL("\5\0")),
        der_bits(SEQ(der_uint(n.p, n.len), der_uint(e.p, e.len))));
}

static sl der_spki(enum key_name name)
{
    struct test_key *k = key_get(name);
    if (k->is_rsa)
        return der_rsa_spki((sl){ k->rsa_pub.n, k->rsa_pub.nlen },
            (sl){ k->rsa_pub.e, k->rsa_pub.elen });
    return SEQ(SEQ(der_of(0x06, OID(oid_ec)), der_of(0x06,
        k->curve == BR_EC_secp384r1 ? OID(oid_p384) : OID(oid_p256))),
        der_bits((sl){ k->ec_pub.q, k->ec_pub.qlen }));
}

static const char alg_ecdsa_sha256[] =
    "300a 06 08 2a8648ce3d040302";
static const char alg_ecdsa_sha384[] =
    "300a 06 08 2a8648ce3d040303";
static const char alg_ecdsa_sha1[] = "3009 06 07 2a8648ce3d0401";
static const char alg_rsa_sha256[] =
    "300d 06 09 2a864886f70d01010b 0500";

static sl der_sign(enum key_name name, const char *alg, sl tbs)
{
    struct test_key *k = key_get(name);
    const br_hash_class *hc = alg == alg_ecdsa_sha384 ? &br_sha384_vtable
        : alg == alg_ecdsa_sha1 ? &br_sha1_vtable : &br_sha256_vtable;
    br_hash_compat_context h;
    uint8_t hash[64], sig[300];
    size_t len = 0;
    h.vtable = hc;
    hc->init(&h.vtable);
    hc->update(&h.vtable, tbs.p, tbs.len);
    hc->out(&h.vtable, hash);
    if (k->is_rsa) {
        len = 256;
        if (!br_rsa_pkcs1_sign_get_default()(BR_HASH_OID_SHA256, hash, 32,
                &k->rsa, sig))
            abort();
    } else {
        len = br_ecdsa_sign_asn1_get_default()(br_ec_get_default(), hc, hash,
            &k->ec, sig);
    }
    struct bb b = der_new();
    bb_put(&b, (sl){ sig, len });
    return der_bits(der_keep(&b));
}

/* ---- a certificate, each part replaceable ---- */

struct plan {
    enum key_name key, signer;
    const char *subject, *issuer;
    const char *from, *until;
    const char *san;             /* NULL: no such extension */
    bool is_ca, no_usage, no_basic;
    const char *usage, *eku, *constraints, *extra;   /* hex of values */
    const char *alg, *alg_inner; /* hex */
    const char *version, *serial;
    sl spki;                     /* instead of the key's */
    const char *uid;             /* hex of unique ids */
    int extra_cnt;               /* that many private extensions more */
    bool break_sig;
};

static uint8_t cert_mem[64][40000];
static unsigned cert_turn;

/* One certificate, valid until 63 more are made. */
static sl cert_make(struct plan p)
{
    der_used = 0;
    bool is_rsa = key_get(p.signer)->is_rsa;
    const char *alg = p.alg ? p.alg : is_rsa ? alg_rsa_sha256
        : alg_ecdsa_sha256;
    sl none = { NULL, 0 };
    struct bb e = der_new();
    sl ext[32] = { none };
    size_t n = 0;
    (void)e;
    if (!p.no_basic && p.is_ca)
        ext[n++] = der_ext(19, true, SL("\x30\x03\x01\x01\xff"));
    if (!p.no_usage)
        ext[n++] = der_ext(15, true, p.usage ? der_hex(p.usage)
            : p.is_ca ? SL("\x03\x02\x01\x06") : SL("\x03\x02\x07\x80"));
    if (p.san)
        ext[n++] = der_ext(17, false, der_san(p.san));
    if (p.eku)
        ext[n++] = der_ext(37, false, der_hex(p.eku));
    if (p.constraints)
        ext[n++] = der_ext(30, true, der_hex(p.constraints));
    if (p.extra)
        ext[n++] = der_hex(p.extra);
    sl more = none;
    for (int i = 0; i < p.extra_cnt; i++) {
        uint8_t oid[8] = { 0x06, 5, 0x2b, 6, 1, 4, (uint8_t)(i & 0x7f) };
        more = JOIN(more, SEQ((sl){ oid, 7 }, SL("\x04\x02\x05\x00")));
    }
    sl exts = JOIN(der_join(n, ext), more);
    sl tbs = SEQ(
        p.version ? der_hex(p.version) : SL("\xa0\x03\x02\x01\x02"),
        p.serial ? der_hex(p.serial) : SL("\x02\x01\x01"),
        der_hex(p.alg_inner ? p.alg_inner : alg),
        der_name(p.issuer ? p.issuer : "root"),
        SEQ(der_date(p.from ? p.from : "200101000000Z"),
            der_date(p.until ? p.until : "20491231235959Z")),
        der_name(p.subject ? p.subject : "leaf"),
        p.spki.len ? p.spki : der_spki(p.key),
        p.uid ? der_hex(p.uid) : none,
        exts.len ? der_of(0xa3, der_of(0x30, exts)) : none);
    sl cert = SEQ(tbs, der_hex(alg), der_sign(p.signer, alg, tbs));
    uint8_t *out = cert_mem[cert_turn++ % 64];
    if (cert.len > sizeof cert_mem[0])
        abort();
    memcpy(out, cert.p, cert.len);
    if (p.break_sig)
        out[cert.len - 1] ^= 1;
    return (sl){ out, cert.len };
}

static bool cert_try(sl der, bool anchor, struct cert *c)
{
    return cert_parse((sl){ guarded(der.p, der.len), der.len }, anchor, c);
}

/* ---- elements ---- */

static void der_rows(void)
{
    static const struct { const char *name, *hex; int body; } tab[] = {
        /* body: its length, -1 refused */
        { "empty", "3000", 0 }, { "one byte", "3001aa", 1 },
        { "with more behind", "3001aabb", 1 }, { "nothing", "", -1 },
        { "a tag alone", "30", -1 }, { "another tag", "3100", -1 },
        { "body cut", "3002aa", -1 }, { "indefinite", "3080aa0000", -1 },
        { "127 bytes, short", "307f*", 127 },
        { "128 bytes, long", "308180*", 128 },
        { "127 bytes, long", "30817f*", -1 },
        { "5 bytes, long", "308105*", -1 },
        { "0 bytes, long", "308100", -1 },
        { "255 bytes", "3081ff*", 255 },
        { "256 bytes", "30820100*", 256 },
        { "255 bytes in two", "308200ff*", -1 },
        { "256 bytes in three", "3083000100*", -1 },
        { "65,536 bytes", "3083010000*", 65536 },
        { "four length bytes", "308400010000*", -1 },
        { "length cut", "3082", -1 }, { "length cut in two", "308201", -1 },
        { "127 length bytes", "30ff*", -1 },
        { "one too few", "30820101*-", -1 },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        static uint8_t text[70000];
        size_t n = hex_parse(tab[i].hex, text, sizeof text);
        if (strchr(tab[i].hex, '*')) {
            size_t body = strchr(tab[i].hex, '-') ? 256
                : tab[i].body > 0 ? (size_t)tab[i].body : 300;
            memset(text + n, 0xaa, body);
            n += body;
        }
        sl rest = { guarded(text, n), n }, body = { NULL, 0 }, whole;
        bool ok = der_take(&rest, 0x30, &body, &whole);
        row(name_of("element: %s", tab[i].name), tab[i].body < 0 ? !ok
            : ok && body.len == (size_t)tab[i].body
              && whole.p + whole.len == rest.p && whole.len + rest.len == n,
            "%d, %zu bytes", ok, body.len);
    }
    static const struct { const char *hex; int len; } num[] = {
        { "020101", 1 }, { "02017f", 1 }, { "02020080", 1 },
        { "0202ff00", -1 }, { "020180", -1 }, { "020100", -1 },
        { "0200", -1 }, { "02020001", -1 }, { "0203000080", -1 },
        { "0203010000", 3 }, { "03020101", -1 },
    };
    for (size_t i = 0; i < COUNT_OF(num); i++) {
        uint8_t text[16];
        size_t n = hex_parse(num[i].hex, text, sizeof text);
        sl rest = { guarded(text, n), n }, out = { NULL, 0 };
        bool ok = der_positive(&rest, &out);
        row_int(name_of("positive %s", num[i].hex), ok ? (int)out.len : -1,
            num[i].len);
    }
    static const struct { uint8_t tag; const char *text; int64_t want; }
    date[] = {
        { 0x17, "700101000000Z", 0 }, { 0x17, "491231235959Z", 2524607999 },
        { 0x17, "500101000000Z", -631152000 },
        { 0x17, "991231235959Z", 946684799 },
        { 0x18, "19700101000000Z", 0 },
        { 0x18, "20380119031408Z", 2147483648 },
        { 0x18, "99991231235959Z", 253402300799 },
        { 0x18, "00000101000000Z", -62167219200 },
        { 0x18, "20000229000000Z", 951782400 },
        /* 1: refused */
        { 0x17, "7001010000Z", 1 }, { 0x17, "700101000000", 1 },
        { 0x17, "700101000000+0000", 1 }, { 0x17, "19700101000000Z", 1 },
        { 0x18, "700101000000Z", 1 }, { 0x18, "19700101000000.0Z", 1 },
        { 0x18, "1970010100Z", 1 }, { 0x17, "701301000000Z", 1 },
        { 0x17, "700001000000Z", 1 }, { 0x17, "700132000000Z", 1 },
        { 0x17, "700100000000Z", 1 }, { 0x17, "700101240000Z", 1 },
        { 0x17, "700101006000Z", 1 }, { 0x17, "700101000061Z", 1 },
        { 0x17, "7001010000 0Z", 1 }, { 0x17, "-00101000000Z", 1 },
        { 0x17, "70010100000z", 1 }, { 0x17, "700101000000z", 1 },
        { 0x17, "", 1 }, { 0x04, "700101000000Z", 1 },
    };
    for (size_t i = 0; i < COUNT_OF(date); i++) {
        der_used = 0;
        sl rest = der_of(date[i].tag, sl_str(date[i].text));
        int64_t at = 1;
        rest.p = guarded(rest.p, rest.len);
        bool ok = der_time(&rest, &at);
        row_int(name_of("time %02x %s", date[i].tag, date[i].text),
            ok ? at : 1, date[i].want);
    }
}

/* Keys by kind, size and exponent. */
static void key_rows(void)
{
    static uint8_t n[1200];
    static const struct { const char *name; size_t bits, e_len; uint32_t e;
        int want; } rsa[] = {
        { "RSA 1024", 1024, 3, 65537, KEY_NONE },
        { "RSA 2047", 2047, 3, 65537, KEY_NONE },
        { "RSA 2048", 2048, 3, 65537, KEY_RSA },
        { "RSA 2049", 2049, 3, 65537, KEY_RSA },
        { "RSA 3072", 3072, 3, 65537, KEY_RSA },
        { "RSA 4096", 4096, 3, 65537, KEY_RSA },
        { "RSA 4097", 4097, 3, 65537, KEY_NONE },
        { "RSA 8192", 8192, 3, 65537, KEY_NONE },
        { "RSA 2048, e 3", 2048, 1, 3, KEY_RSA },
        { "RSA 2048, e 1", 2048, 1, 1, KEY_NONE },
        { "RSA 2048, e 2", 2048, 1, 2, KEY_NONE },
        { "RSA 2048, e 65536", 2048, 3, 65536, KEY_NONE },
        { "RSA 2048, e 2^32-1", 2048, 4, 0xffffffffu, KEY_RSA },
        { "RSA 2048, e of 5 bytes", 2048, 5, 1, KEY_NONE },
    };
    for (size_t i = 0; i < COUNT_OF(rsa); i++) {
        uint8_t e[5] = { 0 };
        size_t len = (rsa[i].bits + 7) / 8;
        der_used = 0;
        memset(n, 0xff, sizeof n);
        n[0] = (uint8_t)(0xff >> (len * 8 - rsa[i].bits));
        for (size_t k = 0; k < 4 && k < rsa[i].e_len; k++)
            e[rsa[i].e_len - 1 - k] = (uint8_t)(rsa[i].e >> 8 * k);
        if (rsa[i].e_len == 5)
            e[0] = 1;
        sl spki = der_rsa_spki((sl){ n, len }, (sl){ e, rsa[i].e_len }), in;
        struct pub_key k;
        spki.p = guarded(spki.p, spki.len);
        bool ok = der_take(&spki, 0x30, &in, NULL) && der_key(in, &k);
        row_int(rsa[i].name, ok ? (int)k.kind : -1, rsa[i].want);
    }
    static const struct { const char *name, *alg, *bits; size_t len;
        int want; } ec[] = {
        { "P-256", "3013 0607 2a8648ce3d0201 0608 2a8648ce3d030107", "0004",
          64, KEY_P256 },
        { "P-384", "3010 0607 2a8648ce3d0201 0605 2b81040022", "0004", 96,
          KEY_P384 },
        { "P-521", "3010 0607 2a8648ce3d0201 0605 2b81040023", "0004", 132,
          KEY_NONE },
        { "P-224", "3010 0607 2a8648ce3d0201 0605 2b81040021", "0004", 56,
          KEY_NONE },
        { "secp256k1", "3010 0607 2a8648ce3d0201 0605 2b8104000a", "0004",
          64, KEY_NONE },
        { "P-256, compressed",
          "3013 0607 2a8648ce3d0201 0608 2a8648ce3d030107", "0002", 32,
          KEY_NONE },
        { "P-256, hybrid form",
          "3013 0607 2a8648ce3d0201 0608 2a8648ce3d030107", "0006", 64, -1 },
        { "P-256, a byte short",
          "3013 0607 2a8648ce3d0201 0608 2a8648ce3d030107", "0004", 63,
          KEY_NONE },
        { "P-384 point on P-256",
          "3013 0607 2a8648ce3d0201 0608 2a8648ce3d030107", "0004", 96,
          KEY_NONE },
        { "EC without curve", "3009 0607 2a8648ce3d0201", "0004", 64, -1 },
        { "EC, explicit curve", "300b 0607 2a8648ce3d0201 3000", "0004", 64,
          -1 },
        { "EC, bytes behind the curve",
          "3015 0607 2a8648ce3d0201 0608 2a8648ce3d030107 0500", "0004", 64,
          -1 },
        { "Ed25519", "3005 0603 2b6570", "00", 32, KEY_NONE },
        { "X25519", "3005 0603 2b656e", "00", 32, KEY_NONE },
        { "RSA-PSS key", "300b 0609 2a864886f70d01010a", "00", 270,
          KEY_NONE },
        { "unused bits",
          "3013 0607 2a8648ce3d0201 0608 2a8648ce3d030107", "0104", 64, -1 },
        { "no bits", "3013 0607 2a8648ce3d0201 0608 2a8648ce3d030107", "",
          0, -1 },
        { "RSA, no numbers", "300d 0609 2a864886f70d010101 0500", "00 3000",
          0, -1 },
        { "RSA, negative modulus", "300d 0609 2a864886f70d010101 0500",
          "00 3006 0201ff 020103", 0, -1 },
        { "RSA, zero modulus", "300d 0609 2a864886f70d010101 0500",
          "00 3006 020100 020103", 0, -1 },
        { "RSA, three numbers", "300d 0609 2a864886f70d010101 0500",
          "00 3009 020105 020103 020103", 0, -1 },
        { "RSA, bytes behind", "300d 0609 2a864886f70d010101 0500",
          "00 3006 020105 020103 00", 0, -1 },
    };
    for (size_t i = 0; i < COUNT_OF(ec); i++) {
        uint8_t bits[400];
        size_t len = hex_parse(ec[i].bits, bits, sizeof bits);
        memset(bits + len, 0x55, ec[i].len);
        len += ec[i].len;
        der_used = 0;
        sl body = JOIN(der_hex(ec[i].alg), der_of(0x03, (sl){ bits, len }));
        struct pub_key k;
        bool ok = der_key((sl){ guarded(body.p, body.len), body.len }, &k);
        row_int(ec[i].name, ok ? (int)k.kind : -1, ec[i].want);
    }
}

static void test_der(void)
{
    der_rows();
    key_rows();
}

/* ---- certificates ---- */

static void damage_rows(const char *title, sl der)
{
    struct cert c;
    unsigned taken = 0;
    for (size_t n = 0; n < der.len; n++)
        taken += cert_try((sl){ der.p, n }, true, &c);
    row_int(name_of("%s, cut at every byte", title), taken, 0);
    static uint8_t copy[40000];
    uint64_t sum = 0;
    for (size_t bit = 0; bit < der.len * 8; bit++) {
        memcpy(copy, der.p, der.len);
        copy[bit / 8] ^= (uint8_t)(1 << bit % 8);
        for (int anchor = 0; anchor < 2; anchor++)
            if (cert_try((sl){ copy, der.len }, anchor, &c))
                sum += c.subject.len + c.issuer.len + c.san.len
                    + c.key.n.len + c.key.q.len + c.constraints.len
                    + c.spki.len;
    }
    /* whatever is taken lies within the certificate */
    row(name_of("%s, each bit flipped", title), sum
        <= (uint64_t)der.len * der.len * 16, "slices beyond it");
    memcpy(copy, der.p, der.len);
    copy[der.len] = 0;
    row(name_of("%s, a byte behind", title), !cert_try((sl){ copy,
        der.len + 1 }, true, &c), "taken");
}

/* Certificates wrong in one place; want: 2 as leaf, 1 as anchor only, 0. */
static void cert_rows(void)
{
    static const char dup_usage[] = "300e 0603551d0f 0101ff 0404 03020780";
    static const struct { const char *name; struct plan p; int want; }
    tab[] = {
        { "plain", { .san = "a.org" }, 2 },
        { "no extension at all", { .no_usage = true }, 2 },
        { "32 extensions", { .san = "a.org", .extra_cnt = 30 }, 2 },
        { "33 extensions", { .san = "a.org", .extra_cnt = 31 }, 0 },
        { "version 1", { .version = "", .no_usage = true }, 1 },
        { "version 1, written out", { .version = "a003020100",
          .no_usage = true }, 0 },
        { "version 2", { .version = "a003020101", .no_usage = true }, 0 },
        { "version 4", { .version = "a003020103" }, 0 },
        { "version 1 with extensions", { .version = "" }, 0 },
        { "version of two bytes", { .version = "a00402020102" }, 0 },
        { "serial of 20 bytes", { .serial =
          "0214 7fffffffffffffffffffffffffffffffffffffff" }, 2 },
        { "serial of 20 bytes and a zero", { .serial =
          "0215 00ffffffffffffffffffffffffffffffffffffffff" }, 2 },
        { "serial of 21 bytes", { .serial =
          "0215 7fffffffffffffffffffffffffffffffffffffffff" }, 1 },
        { "serial 0", { .serial = "020100" }, 1 },
        { "negative serial", { .serial = "0201ff" }, 1 },
        { "serial with a leading zero", { .serial = "02020001" }, 1 },
        { "no serial", { .serial = "" }, 0 },
        { "algorithms differ", { .alg_inner = alg_ecdsa_sha384 }, 0 },
        { "algorithms differ in parameters", { .alg_inner =
          "300c 06082a8648ce3d040302 0500" }, 0 },
        { "generalized time before 2050", { .until = "20300101000000Z" },
          2 },
        { "time without seconds", { .until = "3001010000Z" }, 0 },
        { "time with a zone", { .until = "300101000000+0100" }, 0 },
        { "P-521 key", { .spki = { .len = 521 } }, 2 },
        { "usage twice", { .extra = dup_usage }, 0 },
        { "private extension twice", { .extra_cnt = 1,
          .extra = "300b 06052b06010400 0402 0500" }, 0 },
        { "basicConstraints empty", { .extra =
          "3009 0603551d13 0402 3000" }, 2 },
        { "basicConstraints with a pathLen", { .extra =
          "300f 0603551d13 0408 3006 0101ff 020100" }, 2 },
        { "basicConstraints, odd TRUE", { .extra =
          "300c 0603551d13 0405 3003 010101" }, 2 },
        { "basicConstraints, long boolean", { .extra =
          "300d 0603551d13 0406 3004 0102ffff" }, 0 },
        { "basicConstraints, no sequence", { .extra =
          "300a 0603551d13 0403 0101ff" }, 0 },
        { "keyUsage empty", { .usage = "030100" }, 0 },
        { "keyUsage, no bits", { .usage = "0300" }, 0 },
        { "keyUsage, 8 unused", { .usage = "03020880" }, 0 },
        { "keyUsage, no bit string", { .usage = "04020780" }, 0 },
        { "keyUsage with bytes behind", { .usage = "03020780 00" }, 0 },
        { "both unique ids", { .uid = "81020055 82020055" }, 2 },
        { "unique ids in another order", { .uid = "82020055 81020055" },
          0 },
        { "a unique id cut", { .uid = "817f55" }, 0 },
        { "a third unique id", { .uid = "84020055" }, 0 },
        { "EKU empty", { .eku = "3000" }, 0 },
        { "EKU, no OID", { .eku = "3003 020101" }, 0 },
        { "EKU with bytes behind", { .eku =
          "300a 06082b06010505070301 00" }, 0 },
        { "SAN empty", { .extra = "3009 0603551d11 0402 3000" }, 0 },
        { "SAN cut", { .extra = "300b 0603551d11 0404 3004 8205" }, 0 },
        { "SAN with bytes behind", { .extra =
          "300d 0603551d11 0406 3003 820161 00" }, 0 },
        { "constraints empty", { .constraints = "3000" }, 0 },
        { "extension without value", { .extra = "3005 0603551d20" }, 0 },
        { "extension value of another tag", { .extra =
          "3009 0603551d20 0302 3000" }, 0 },
        { "extension critical twice", { .extra =
          "300f 0603551d20 0101ff 0101ff 0402 3000" }, 0 },
        { "extension with a long boolean", { .extra =
          "300d 0603551d20 0102ffff 0402 3000" }, 0 },
        { "extension with bytes behind", { .extra =
          "300b 0603551d20 0402 3000 0500" }, 0 },
        { "extension without OID", { .extra = "3004 0402 3000" }, 0 },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        struct plan p = tab[i].p;
        struct cert c;
        uint8_t spki[200];
        if (p.spki.len == 521) {
            uint8_t bits[140] = { 0, 4 };
            der_used = 0;
            sl s = SEQ(der_hex("3010 0607 2a8648ce3d0201 0605 2b81040023"),
                der_of(0x03, (sl){ bits, 134 }));
            memcpy(spki, s.p, s.len);
            p.spki = (sl){ spki, s.len };
        }
        sl der = cert_make(p);
        int got = cert_try(der, false, &c) ? 2 : cert_try(der, true, &c);
        row_int(tab[i].name, got, tab[i].want);
    }
    struct cert c;
    sl der = cert_make((struct plan){ .san = "a.org,10.0.0.1,::1",
        .eku = "3014 06082b06010505070301 06082b06010505070302",
        .subject = "leaf", .issuer = "inter", .until = "300101000000Z" });
    bool ok = cert_try(der, false, &c);
    row("what a leaf says", ok && !c.is_v1 && !c.is_ca && !c.has_basic
        && c.has_usage && c.can_sign && c.has_ext_usage && c.is_server
        && c.key.kind == KEY_P256 && c.not_after == 1893456000
        && c.constraints.len == 0 && c.san.len == 7 + 6 + 18, "differs");
    der = cert_make((struct plan){ .is_ca = true,
        .constraints = "3007 a005 3003 8201 61" });
    ok = cert_try(der, false, &c);
    row("what an authority says", ok && c.is_ca && c.has_basic
        && c.has_usage && !c.can_sign && !c.has_ext_usage
        && c.constraints.len == 7 && c.san.len == 0, "differs");
    damage_rows("a leaf", cert_make((struct plan){ .san = "a.org,10.0.0.1",
        .eku = "300a 06082b06010505070301" }));
    damage_rows("an authority", cert_make((struct plan){ .is_ca = true,
        .key = K_P384, .constraints = "3009 a007 3005 8203 616263" }));
    damage_rows("an RSA leaf", cert_make((struct plan){ .key = K_RSA,
        .signer = K_RSA, .san = "a.org" }));
}

/* name | der | not_after | ca | kind | issuer | subject | key, by Python */
static void real_cert_rows(void)
{
    static char text[4 << 20];
    size_t len, cnt = 0;
    file_read("build/unit/certs.txt", text, sizeof text, &len);
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
        static uint8_t der[16384], part[3][4096];
        static char name[512], hex[32768], f[3][8192];
        long long not_after;
        int is_ca, kind;
        struct cert c;
        if (sscanf(line, "%511s %32767s %lld %d %d %8191s %8191s %8191s",
                   name, hex, &not_after, &is_ca, &kind, f[0], f[1], f[2])
            != 8) {
            row(name_of("%.60s", line), false, "not understood");
            continue;
        }
        size_t n = hex_parse(hex, der, sizeof der);
        sl want[3];
        for (int i = 0; i < 3; i++)
            want[i] = (sl){ part[i], hex_parse(f[i], part[i],
                sizeof part[i]) };
        bool ok = cert_try((sl){ der, n }, true, &c);
        row(name, ok && c.not_after == not_after
            && (c.is_v1 ? 1 : c.is_ca) == is_ca && (int)c.key.kind == kind
            && sl_eq(c.issuer, want[0]) && sl_eq(c.subject, want[1])
            && (kind == KEY_NONE || sl_eq(kind == KEY_RSA ? c.key.n
                                          : c.key.q, want[2])),
            "parsed %d, until %lld, ca %d, kind %d", ok,
            (long long)c.not_after, c.is_ca, c.key.kind);
        cnt++;
    }
    row("there are many", cnt > 100, "%zu", cnt);
}

static void match_rows(void)
{
    static const struct { const char *pattern, *host; bool want; } tab[] = {
        { "a.org", "a.org", true }, { "A.Org", "a.oRG", true },
        { "a.org", "a.org.", true }, { "a.org", "b.org", false },
        { "a.org", "x.a.org", false }, { "x.a.org", "a.org", false },
        { "", "a.org", false }, { "a.org.", "a.org", false },
        { "*.a.org", "x.a.org", true }, { "*.a.org", "X.A.ORG", true },
        { "*.a.org", "x.a.org.", true }, { "*.a.org", "a.org", false },
        { "*.a.org", "y.x.a.org", false }, { "*.a.org", ".a.org", false },
        { "*.org", "a.org", false }, { "*.org", "x.a.org", false },
        { "*", "a", false }, { "*", "a.org", false }, { "*.", "a.", false },
        { "*..org", "a..org", true }, { "x*.a.org", "xy.a.org", false },
        { "*x.a.org", "yx.a.org", false }, { "x.*.org", "x.a.org", false },
        { "*.*.org", "x.a.org", false }, { "**.a.org", "x.a.org", false },
        { "*.a.org", "*.a.org", true }, { "a.org\x01", "a.org", false },
        { "a .org", "a .org", false }, { "\xc3\xa4.org", "\xc3\xa4.org",
          false }, { "*.\xc3\xa4.org", "x.\xc3\xa4.org", false },
        { "10.0.0.1", "10.0.0.1", true },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++)
        row(name_of("%s for %s", tab[i].pattern, tab[i].host),
            cert_dns_match(sl_str(tab[i].pattern), sl_str(tab[i].host))
            == tab[i].want, "want %d", tab[i].want);
    row("a NUL ends no pattern", !cert_dns_match(SL("a.org\0.b.org"),
        SL("a.org")), "matches");
    static const struct { const char *san, *peer; bool want; } san[] = {
        { "a.org", "a.org", true }, { "b.org,a.org", "a.org", true },
        { "b.org,*.a.org", "x.a.org", true }, { "b.org", "a.org", false },
        { "10.0.0.1", "10.0.0.1", true }, { "::1", "[::1]", true },
        { "10.0.0.2", "10.0.0.1", false }, { "::1", "10.0.0.1", false },
        { "::ffff:10.0.0.1", "10.0.0.1", false },
        { "a.org,10.0.0.1", "10.0.0.1", true },
        { "10.0.0.1", "a.org", false }, { "a.org", "10.0.0.1", false },
    };
    for (size_t i = 0; i < COUNT_OF(san); i++) {
        struct cert c;
        struct name peer;
        bool ok = cert_try(cert_make((struct plan){ .san = san[i].san }),
            false, &c) && host_parse(sl_str(san[i].peer), false, &peer);
        row(name_of("SAN %s for %s", san[i].san, san[i].peer), ok
            && cert_names_peer(&c, &peer) == san[i].want, "want %d",
            san[i].want);
    }
    struct cert c = { .san = SL("\x82\x08" "10.0.0.1") };
    struct name peer;
    bool ok = host_parse(SL("10.0.0.1"), false, &peer);
    row("an address as dNSName does not count", ok
        && !cert_names_peer(&c, &peer), "matches");
    ok = host_parse(SL("a.org"), false, &peer);
    c.san = SL("\x82\x05" "a.org");
    row("a dNSName counts", ok && cert_names_peer(&c, &peer), "no");
    c.san = SL("\x81\x05" "a.org" "\x86\x05" "a.org" "\xa2\x05" "a.org");
    row("other kinds of names do not", ok && !cert_names_peer(&c, &peer),
        "match");
    c.san = SL("\x82\x09" "a.org");
    row("a name cut off does not", ok && !cert_names_peer(&c, &peer),
        "matches");
}

/* Subtrees in hex by kind: dns:NAME ip:ADDRESS/MASKBITS other:HEX; `-`
 * separates permitted from excluded ones. */
static sl constraints_of(const char *text)
{
    uint8_t list[2][1024], all[2100];
    struct bb b[2] = { BB(list[0]), BB(list[1]) }, out = BB(all);
    int at = 0;
    sl rest = sl_str(text), word;
    while (sl_word(&rest, " ", &word)) {
        uint8_t tree[300], base[300];
        struct bb t = BB(tree);
        struct cidr net;
        if (sl_eq(word, SL("-"))) {
            at = 1;
        } else if (sl_starts(word, SL("dns:"))) {
            der_put(&t, 0x82, sl_skip(word, 4));
        } else if (sl_starts(word, SL("ip:"))
                   && cidr_parse(sl_skip(word, 3), &net)) {
            size_t size = net.ip.v6 ? 16 : 4;
            memcpy(base, net.ip.b, size);
            for (size_t i = 0; i < size; i++)
                base[size + i] = (uint8_t)(net.bits >= 8 * i + 8 ? 255
                    : net.bits > 8 * i ? 0xff00u >> (net.bits - 8 * i) : 0);
            der_put(&t, 0x87, (sl){ base, 2 * size });
        } else {
            char hex[200];
            snprintf(hex, sizeof hex, "%.*s", (int)word.len - 6,
                (const char *)word.p + 6);
            t.len = hex_parse(hex, tree, sizeof tree);
        }
        if (t.len)
            der_put(&b[at], 0x30, work_done(&t));
    }
    if (b[0].len)
        der_put(&out, 0xa0, work_done(&b[0]));
    if (b[1].len)
        der_put(&out, 0xa1, work_done(&b[1]));
    static uint8_t keep[2100];
    memcpy(keep, all, out.len);
    return (sl){ keep, out.len };
}

static void constraint_rows(void)
{
    static const struct { const char *trees, *name; bool want; } tab[] = {
        { "dns:a.org", "a.org", true }, { "dns:a.org", "x.a.org", true },
        { "dns:a.org", "y.x.A.ORG", true }, { "dns:a.org", "b.org", false },
        { "dns:a.org", "ba.org", false }, { "dns:A.ORG", "x.a.org", true },
        { "dns:.a.org", "x.a.org", true }, { "dns:.a.org", "a.org", false },
        { "dns:a.org dns:b.org", "x.b.org", true },
        { "dns:", "a.org", true }, { "- dns:", "a.org", false },
        { "- dns:a.org", "a.org", false }, { "- dns:a.org", "x.a.org",
          false }, { "- dns:a.org", "b.org", true },
        { "- dns:.a.org", "a.org", true },
        { "dns:a.org - dns:x.a.org", "y.a.org", true },
        { "dns:a.org - dns:x.a.org", "x.a.org", false },
        { "dns:a.org", "x.a.org.", true },
        { "dns:a.org", "10.0.0.1", true },       /* of another kind */
        { "ip:10.0.0.0/8", "10.1.2.3", true },
        { "ip:10.0.0.0/8", "11.1.2.3", false },
        { "ip:10.0.0.0/8", "::1", false }, { "ip:10.0.0.0/8", "a.org", true },
        { "ip:10.0.0.0/9", "10.128.0.1", false },
        { "ip:fd00::/8", "fd12::1", true }, { "ip:fd00::/8", "fe80::1",
          false }, { "ip:fd00::/8", "10.1.2.3", false },
        { "ip:0.0.0.0/0", "1.2.3.4", true },
        { "- ip:10.0.0.0/8", "10.1.2.3", false },
        { "- ip:10.0.0.0/8", "11.1.2.3", true },
        { "- ip:0.0.0.0/0 ip:::/0", "::1", false },
        { "- ip:0.0.0.0/0", "::1", true },
        { "dns:a.org ip:10.0.0.0/8", "10.0.0.1", true },
        /* kinds we cannot judge refuse, wherever they stand */
        { "other:8103612e62", "a.org", false },
        { "dns:a.org - other:8103612e62", "a.org", false },
        { "other:a4023000", "a.org", false },
        { "other:8603612e62", "a.org", false },
        /* malformed */
        { "other:87040a000000", "10.0.0.1", false },
        { "other:8707 0a000000ff0000", "10.0.0.1", false },
        { "other:8203 61", "a.org", false },
        { "other:820161800100", "a", false },
        { "other:820161810105", "a", false },
        { "other:", "a.org", true },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        struct ip a;
        bool is_ip = addr_of(tab[i].name, &a);
        sl trees = constraints_of(tab[i].trees);
        sl name = is_ip ? (sl){ a.b, a.v6 ? 16 : 4 } : sl_str(tab[i].name);
        row(name_of("%s in %s", tab[i].name, tab[i].trees), cert_permits(
            (sl){ guarded(trees.p, trees.len), trees.len },
            is_ip ? 0x87 : 0x82, name) == tab[i].want, "want %d",
            tab[i].want);
    }
    row("permitted cut", !cert_permits(SL("\xa0\x09\x30"), 0x82,
        SL("a.org")), "taken");
    row("a tree cut", !cert_permits(SL("\xa0\x03\x30\x09\x82"), 0x82,
        SL("a.org")), "taken");
    row("an empty tree", !cert_permits(SL("\xa0\x02\x30\x00"), 0x82,
        SL("a.org")), "taken");
    row("excluded before permitted", !cert_permits(SL("\xa1\x00\xa0\x00"),
        0x82, SL("a.org")), "taken");
    row("a third list", !cert_permits(SL("\xa0\x00\xa1\x00\xa2\x00"), 0x82,
        SL("a.org")), "taken");
    static const struct { const char *san, *trees, *peer; bool want; }
    keeps[] = {
        { "a.org", "", "a.org", true }, { "a.org", "dns:a.org", "a.org",
          true }, { "a.org,b.org", "dns:a.org", "a.org", false },
        { "*.a.org", "dns:a.org", "x.a.org", true },
        { "*.a.org", "dns:.a.org", "x.a.org", true },
        { "*.b.org", "dns:a.org", "x.b.org", false },
        { "*.a.org", "dns:x.a.org", "x.a.org", false },
        { "*.a.org", "- dns:x.a.org", "x.a.org", false },
        { "*.a.org", "- dns:x.a.org", "y.a.org", true },
        { "*.a.org", "- dns:a.org", "y.a.org", false },
        { "a.org,10.0.0.1", "dns:a.org", "a.org", true },
        { "a.org,10.0.0.1", "ip:11.0.0.0/8", "a.org", false },
        { "10.0.0.1", "ip:10.0.0.0/8", "10.0.0.1", true },
        { "10.0.0.1", "dns:a.org", "10.0.0.1", true },
    };
    for (size_t i = 0; i < COUNT_OF(keeps); i++) {
        struct cert c;
        struct name peer;
        bool ok = cert_try(cert_make((struct plan){ .san = keeps[i].san }),
            false, &c) && host_parse(sl_str(keeps[i].peer), false, &peer);
        row(name_of("%s under %s as %s", keeps[i].san, keeps[i].trees,
                    keeps[i].peer),
            ok && cert_keeps_to(&c, constraints_of(keeps[i].trees), &peer)
            == keeps[i].want, "want %d", keeps[i].want);
    }
}

static void test_certificates(void)
{
    cert_rows();
    match_rows();
    constraint_rows();
    real_cert_rows();
}

/* ---- PEM ---- */

static void test_pem(void)
{
    static const struct { const char *name, *text; int want[3]; } tab[] = {
        /* lengths one after the other; 0 no more, -1 damaged */
        { "nothing", "", { 0 } }, { "other text", "hello\nworld\n", { 0 } },
        { "one", "-----BEGIN CERTIFICATE-----\nAQID\n"
          "-----END CERTIFICATE-----\n", { 3, 0 } },
        { "no last line end", "-----BEGIN CERTIFICATE-----\nAQID\n"
          "-----END CERTIFICATE-----", { 3, 0 } },
        { "CRLF", "-----BEGIN CERTIFICATE-----\r\nAQID\r\n"
          "-----END CERTIFICATE-----\r\n", { 3, 0 } },
        { "blanks about", "  -----BEGIN CERTIFICATE-----  \n\t AQID \n"
          " -----END CERTIFICATE----- \n", { 3, 0 } },
        { "short lines", "-----BEGIN CERTIFICATE-----\nA\nQ\n\nI\nDBA==\n"
          "-----END CERTIFICATE-----\n", { 4, 0 } },
        { "text between", "x\n-----BEGIN CERTIFICATE-----\nAQ==\n"
          "-----END CERTIFICATE-----\nhello\n"
          "-----BEGIN CERTIFICATE-----\nAQI=\n"
          "-----END CERTIFICATE-----\nbye", { 1, 2, 0 } },
        { "other blocks", "-----BEGIN PRIVATE KEY-----\n!!!\n"
          "-----END PRIVATE KEY-----\n-----BEGIN CERTIFICATE-----\nAQID\n"
          "-----END CERTIFICATE-----\n", { 3, 0 } },
        { "TRUSTED is another block",
          "-----BEGIN TRUSTED CERTIFICATE-----\nAQID\n"
          "-----END TRUSTED CERTIFICATE-----\n", { 0 } },
        { "empty block", "-----BEGIN CERTIFICATE-----\n"
          "-----END CERTIFICATE-----\n", { 0 } },
        { "no end", "-----BEGIN CERTIFICATE-----\nAQID\n", { -1 } },
        { "begin alone", "-----BEGIN CERTIFICATE-----", { -1 } },
        { "a second begin inside", "-----BEGIN CERTIFICATE-----\nAQID\n"
          "-----BEGIN CERTIFICATE-----\nAQID\n"
          "-----END CERTIFICATE-----\n", { -1 } },
        { "bad character", "-----BEGIN CERTIFICATE-----\nAQ*D\n"
          "-----END CERTIFICATE-----\n", { -1 } },
        { "blank inside a line", "-----BEGIN CERTIFICATE-----\nAQ ID\n"
          "-----END CERTIFICATE-----\n", { -1 } },
        { "cut quad", "-----BEGIN CERTIFICATE-----\nAQIDA\n"
          "-----END CERTIFICATE-----\n", { -1 } },
        { "padding left out", "-----BEGIN CERTIFICATE-----\nAQ\n"
          "-----END CERTIFICATE-----\n", { -1 } },
        { "unused bits", "-----BEGIN CERTIFICATE-----\nAR==\n"
          "-----END CERTIFICATE-----\n", { -1 } },
        { "NUL", "-----BEGIN CERTIFICATE-----\nAQ\x01=\n"
          "-----END CERTIFICATE-----\n", { -1 } },
        { "headers inside", "-----BEGIN CERTIFICATE-----\nX: y\n\nAQID\n"
          "-----END CERTIFICATE-----\n", { -1 } },
        { "room for no more", "-----BEGIN CERTIFICATE-----\n"
          "AQIDBAUGBwgJCgsMDQ4PEBES\n-----END CERTIFICATE-----\n", { -1 } },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        size_t len = strlen(tab[i].text);
        sl rest = { guarded(tab[i].text, len), len }, der;
        bool same = true;
        int got = 0;
        for (size_t k = 0; k < 3; k++) {
            uint8_t work[16];
            got = pem_parse(&rest, work, sizeof work, &der);
            got = got > 0 ? (int)der.len : got;
            same &= got == tab[i].want[k];
            if (tab[i].want[k] <= 0)
                break;
        }
        /* padding in the middle of a block and an empty block: as written
         * above, an empty block reads as no bytes */
        row(tab[i].name, same, "got %d last", got);
    }
    /* the real bundle, cut anywhere, is damaged or shorter, never longer */
    static char text[1 << 20];
    static uint8_t work[16384];
    size_t len, full = 0;
    file_read("build/unit/bundle.pem", text, sizeof text, &len);
    sl rest = { (uint8_t *)text, len }, der;
    while (pem_parse(&rest, work, sizeof work, &der) == 1)
        full++;
    row("a real bundle", full > 100, "%zu certificates", full);
    bool sound = true;
    for (size_t cut = 0; cut < len && cut < 60000; cut += 37) {
        size_t cnt = 0;
        rest = (sl){ guarded(text, cut), cut };
        while (pem_parse(&rest, work, sizeof work, &der) == 1)
            cnt++;
        sound &= cnt <= full;
    }
    row("a bundle cut anywhere", sound, "more certificates than before");
}

/* ---- anchors ---- */

static size_t pem_put(struct bb *b, sl der)
{
    size_t from = b->len;
    bb_str(b, "-----BEGIN CERTIFICATE-----\n");
    b64_put(b, b64_std, der);
    while ((b->len - from - 28) % 4)
        bb_byte(b, '=');
    bb_str(b, "\n-----END CERTIFICATE-----\n");
    return b->len - from;
}

static void test_anchors(void)
{
    static struct anchors set, again;
    struct bb b = work_bb();
    pem_put(&b, cert_make((struct plan){ .is_ca = true, .subject = "one" }));
    pem_put(&b, cert_make((struct plan){ .is_ca = true, .subject = "two",
        .key = K_RSA, .signer = K_RSA,
        .constraints = "3007 a005 3003 8201 61" }));
    pem_put(&b, cert_make((struct plan){ .version = "", .no_usage = true,
        .subject = "old" }));
    pem_put(&b, cert_make((struct plan){ .subject = "leaf", .key = K_P384,
        .san = "a.org" }));
    size_t once = b.len;
    set.len = set.cnt = set.skipped = 0;
    int got = anchors_add_pem(&set, work_done(&b));
    row("four are added", got == 4 && set.cnt == 4 && set.skipped == 0,
        "%d, %u, %u", got, set.cnt, set.skipped);
    got = anchors_add_pem(&set, (sl){ work_buf, once });
    row("duplicates are not", got == 0 && set.cnt == 4, "%d, %u", got,
        set.cnt);
    static const struct { const char *name; bool is_ca; int kind;
        size_t constraints; } want[] = {
        { "one", true, KEY_P256, 0 }, { "two", true, KEY_RSA, 7 },
        { "old", true, KEY_P256, 0 }, { "leaf", false, KEY_P384, 0 },
    };
    sl rest = { guarded(set.data, set.len), set.len };
    for (size_t i = 0; i < COUNT_OF(want); i++) {
        struct anchor a;
        der_used = 0;
        bool ok = anchor_take(&rest, &a);
        row(name_of("anchor `%s` as packed", want[i].name), ok
            && a.is_ca == want[i].is_ca && (int)a.key.kind == want[i].kind
            && sl_eq(a.name, der_name(want[i].name))
            && a.constraints.len == want[i].constraints, "differs");
    }
    row_int("nothing behind them", (int64_t)rest.len, 0);
    anchors_add_packed(&again, (sl){ set.data, set.len });
    anchors_add_packed(&again, (sl){ set.data, set.len });
    row("packed anchors add up once", again.cnt == 4
        && sl_eq((sl){ again.data, again.len }, (sl){ set.data, set.len }),
        "%u", again.cnt);
    /* cut and damaged packs: no overread, no anchor beyond the data */
    bool sound = true;
    for (size_t n = 0; n < set.len; n++) {
        struct anchor a;
        size_t sum = 0;
        rest = (sl){ guarded(set.data, n), n };
        while (anchor_take(&rest, &a))
            sum += a.name.len + a.key.n.len + a.key.q.len;
        sound &= sum <= n;
    }
    for (size_t i = 0; i < set.len; i++) {
        struct anchor a;
        uint8_t *p = guarded(set.data, set.len);
        p[i] ^= 0xff;
        rest = (sl){ p, set.len };
        while (anchor_take(&rest, &a))
            sound &= a.name.len <= set.len;
    }
    row("packs cut or damaged anywhere", sound, "unsound");
    b = work_bb();
    uint8_t n[1024];
    memset(n, 0xff, sizeof n);
    der_used = sizeof der_mem / 2;
    sl spki = der_rsa_spki((sl){ n, 1024 }, SL("\1\0\1"));
    pem_put(&b, cert_make((struct plan){ .is_ca = true, .spki = spki }));
    bb_str(&b, "-----BEGIN CERTIFICATE-----\nAQID\n"
        "-----END CERTIFICATE-----\n");
    got = anchors_add_pem(&set, work_done(&b));
    row("unsupported keys and no certificates are counted", got == 0
        && set.skipped == 2 && set.cnt == 4, "%d, %u", got, set.skipped);
    bb_str(&b, "-----BEGIN CERTIFICATE-----\nAQID\n");
    row_int("a damaged block", anchors_add_pem(&set, work_done(&b)), -1);
    /* as many as fit, then a refusal */
    set.len = set.cnt = set.skipped = 0;
    got = 0;
    for (int i = 0; i < LIM_ANCHOR_CNT + 2 && got >= 0; i++) {
        char name[20];
        snprintf(name, sizeof name, "ca %d", i);
        b = work_bb();
        pem_put(&b, cert_make((struct plan){ .is_ca = true,
            .subject = name }));
        got = anchors_add_pem(&set, work_done(&b));
    }
    row("1,024 anchors", got < 0 && set.cnt == LIM_ANCHOR_CNT, "%d, %u", got,
        set.cnt);
    /* those built in */
    memset(&again, 0, sizeof again);
    anchors_add_packed(&again, (sl){ ca_blob,
        (size_t)(ca_blob_end - ca_blob) });
    rest = (sl){ again.data, again.len };
    struct anchor a;
    unsigned cas = 0;
    while (anchor_take(&rest, &a))
        cas += a.is_ca && a.name.len > 10 && a.key.kind != KEY_NONE
            && (a.key.kind == KEY_RSA ? a.key.n.len >= 256
                : a.key.q.len >= 65);
    row("the binary's own anchors", cas == again.cnt && cas > 100
        && again.len == (size_t)(ca_blob_end - ca_blob), "%u of %u", cas,
        again.cnt);
}
