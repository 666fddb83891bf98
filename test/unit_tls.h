/* Section 16: the judge of certificate chains, its caches, sessions. */

/* The anchors in force become these certificates. */
static void trust_only(size_t cnt, const sl *der)
{
    struct anchors *set = &anchor_set[anchor_now];
    set->len = set->cnt = set->skipped = 0;
    for (size_t i = 0; i < cnt; i++) {
        struct cert c;
        struct bb b = { set->data, set->len, sizeof set->data, false };
        if (!cert_parse(der[i], true, &c) || !anchor_put(&b, &c))
            abort();
        set->len = b.len;
        set->cnt++;
    }
}

static struct hs *judge_hs(const char *peer)
{
    struct hs *h = &hs_pool[0];
    memset(h, 0, sizeof *h);
    h->vtable = &hs_class;
    h->is_insecure = cfg.insecure;
    if (!host_parse(sl_str(peer), true, &h->peer))
        h->peer = (struct name){ .host = sl_str(peer) };
    return h;
}

/* Show a chain to the judge as BearSSL would, `step` bytes at a time. */
static enum event judge(struct hs *h, size_t cnt, const sl *der, size_t step)
{
    const br_x509_class **ctx = &h->vtable;
    hs_class.start_chain(ctx, NULL);
    for (size_t i = 0; i < cnt; i++) {
        hs_class.start_cert(ctx, (uint32_t)der[i].len);
        for (size_t at = 0; at < der[i].len; at += step)
            hs_class.append(ctx, der[i].p + at, der[i].len - at < step
                ? der[i].len - at : step);
        hs_class.end_cert(ctx);
    }
    unsigned err = hs_class.end_chain(ctx);
    unsigned usages = 0;
    const br_x509_pkey *key = hs_class.get_pkey(
        (const br_x509_class *const *)ctx, &usages);
    if ((err == 0) != (h->why == EV_NONE) || (key != NULL) != (err == 0))
        return EV_BUG_MUST;
    return h->why;
}

/* Parts that chains are made of, by letter. */
static sl chain_part(char letter, const struct plan *leaf)
{
    struct plan p = { .is_ca = true, .subject = "inter", .key = K_INTER,
        .signer = K_ROOT };
    static const char eku_client[] = "300a 06082b06010505070302";
    static const char eku_server[] = "300a 06082b06010505070301";
    uint8_t n[128];
    switch (letter) {
    case 'L': return cert_make(*leaf);
    case 'I': break;
    case 'R': p = (struct plan){ .is_ca = true, .subject = "root",
        .key = K_ROOT, .signer = K_ROOT }; break;
    case 'x': p.until = "200102000000Z"; break;
    case 'n': p.from = "400101000000Z"; break;
    case 'c': p.is_ca = false; break;
    case 'u': p.usage = "03020780"; break;
    case 'b': p.break_sig = true; break;
    case 's': p.alg = alg_ecdsa_sha1; break;
    case 'k': p.eku = eku_client; break;
    case 'S': p.eku = eku_server; break;
    case 'p': p.constraints = "3007 a005 3003 8201 78"; break;   /* x */
    case 'q': p.constraints = "300b a009 3007 8205 612e6f7267"; break;
    case 'e': p.constraints = "300b a109 3007 8205 612e6f7267"; break;
    case 'm': p.constraints = "3007 a005 3003 8101 78"; break;
    case 'w': p.key = K_OTHER; break;
    case '1': p.version = ""; p.no_usage = p.no_basic = true; break;
    case '0': p.extra = "300f 0603551d13 0408 3006 0101ff 020100";
        p.no_basic = true; break;
    case 'E': p.extra = "300b 0603551d10 0402 3000 0500"; break;
    case 'C': p.extra = "300e 06032a0304 0101ff 0404 04020500"; break;
    case 'i': p = (struct plan){ .is_ca = true, .subject = "inter",
        .issuer = "inter", .key = K_INTER, .signer = K_INTER }; break;
    case 't': p = (struct plan){ .is_ca = true, .subject = "stray",
        .issuer = "stray", .key = K_OTHER, .signer = K_OTHER }; break;
    case '3': p.key = K_P384; break;
    case 'r': p.key = K_RSA; break;
    case 'd':                         /* an RSA key of 1,024 bits */
        memset(n, 0xff, sizeof n);
        der_used = sizeof der_mem / 2;
        p.spki = der_rsa_spki((sl){ n, 128 }, SL("\1\0\1"));
        break;
    case 'z': return SL("\x30\x03\x02\x01\x01");
    case 'D': p.extra = "300b 0603551d0f 0404 03020106"; break;
    default: abort();
    }
    return cert_make(p);
}

static void judge_rows(void)
{
    static const char client[] = "300a 06082b06010505070302";
    static const char server[] = "300a 06082b06010505070301";
    static const char any[] = "3006 0604551d2500";
#define LEAF .key = K_LEAF, .signer = K_INTER, .issuer = "inter"
    static const struct { const char *name, *chain, *peer; struct plan leaf;
        enum event want; } tab[] = {
        { "leaf, intermediate", "LI", "a.org", { LEAF, .san = "a.org" },
          EV_NONE },
        { "with its root", "LIR", "a.org", { LEAF, .san = "a.org" },
          EV_NONE },
        { "misordered", "LRI", "a.org", { LEAF, .san = "a.org" }, EV_NONE },
        { "doubled", "LIIRR", "a.org", { LEAF, .san = "a.org" }, EV_NONE },
        { "strays between", "LtIt", "a.org", { LEAF, .san = "a.org" },
          EV_NONE },
        { "noise between", "LzI", "a.org", { LEAF, .san = "a.org" },
          EV_NONE },
        { "a self-issued twin first", "LiI", "a.org", { LEAF,
          .san = "a.org" }, EV_NONE },
        { "straight below the root", "L", "a.org", { .key = K_LEAF,
          .signer = K_ROOT, .san = "a.org" }, EV_NONE },
        { "wildcard", "LI", "x.a.org", { LEAF, .san = "*.a.org" },
          EV_NONE },
        { "address", "LI", "10.0.0.1", { LEAF, .san = "10.0.0.1" },
          EV_NONE },
        { "IPv6 address", "LI", "[::1]", { LEAF, .san = "::1" }, EV_NONE },
        { "trailing dot of the peer", "LI", "a.org.", { LEAF,
          .san = "a.org" }, EV_NONE },
        { "P-384 leaf", "LI", "a.org", { .key = K_P384, .signer = K_INTER,
          .issuer = "inter", .san = "a.org" }, EV_NONE },
        { "SHA-384 signature", "LI", "a.org", { LEAF, .san = "a.org",
          .alg = alg_ecdsa_sha384 }, EV_NONE },
        { "P-384 intermediate", "L3", "a.org", { .key = K_LEAF,
          .signer = K_P384, .issuer = "inter", .san = "a.org" }, EV_NONE },
        { "RSA intermediate", "Lr", "a.org", { .key = K_LEAF,
          .signer = K_RSA, .issuer = "inter", .san = "a.org" }, EV_NONE },
        { "RSA leaf", "LI", "a.org", { .key = K_RSA, .signer = K_INTER,
          .issuer = "inter", .san = "a.org" }, EV_NONE },
        { "serverAuth", "LI", "a.org", { LEAF, .san = "a.org",
          .eku = server }, EV_NONE },
        { "any usage", "LI", "a.org", { LEAF, .san = "a.org", .eku = any },
          EV_NONE },
        { "critical serverAuth", "LI", "a.org", { LEAF, .san = "a.org",
          .extra = "3016 0603551d25 0101ff 040c 300a 06082b06010505070301" },
          EV_NONE },
        { "no keyUsage", "LI", "a.org", { LEAF, .san = "a.org",
          .no_usage = true }, EV_NONE },
        { "intermediate for servers", "LS", "a.org", { LEAF,
          .san = "a.org" }, EV_NONE },
        { "intermediate with the name permitted", "Lq", "a.org", { LEAF,
          .san = "a.org" }, EV_NONE },
        { "pathLen 0 above the leaf", "L0", "a.org", { LEAF,
          .san = "a.org" }, EV_NONE },
        /* names */
        { "another name", "LI", "b.org", { LEAF, .san = "a.org" },
          EV_TLS_NAME },
        { "wildcard for two labels", "LI", "y.x.a.org", { LEAF,
          .san = "*.a.org" }, EV_TLS_NAME },
        { "wildcard for the parent", "LI", "a.org", { LEAF,
          .san = "*.a.org" }, EV_TLS_NAME },
        { "wildcard under a top-level name", "LI", "a.org", { LEAF,
          .san = "*.org" }, EV_TLS_NAME },
        { "common name only", "LI", "leaf", { LEAF }, EV_TLS_NAME },
        { "another address", "LI", "10.0.0.2", { LEAF, .san = "10.0.0.1" },
          EV_TLS_NAME },
        { "name for an address", "LI", "10.0.0.1", { LEAF, .san = "a.org" },
          EV_TLS_NAME },
        { "mapped address", "LI", "[::ffff:10.0.0.1]", { LEAF,
          .san = "10.0.0.1" }, EV_TLS_NAME },
        /* usage */
        { "clientAuth only", "LI", "a.org", { LEAF, .san = "a.org",
          .eku = client }, EV_TLS_USAGE },
        { "no digitalSignature", "LI", "a.org", { LEAF, .san = "a.org",
          .usage = "03020520" }, EV_TLS_USAGE },
        { "an authority as leaf", "LI", "a.org", { LEAF, .san = "a.org",
          .is_ca = true, .usage = "03020186" }, EV_TLS_USAGE },
        { "intermediate for clients", "Lk", "a.org", { LEAF,
          .san = "a.org" }, EV_TLS_USAGE },
        /* time */
        { "expired leaf", "LI", "a.org", { LEAF, .san = "a.org",
          .until = "200102000000Z" }, EV_TLS_EXPIRED },
        { "leaf of the future", "LI", "a.org", { LEAF, .san = "a.org",
          .from = "400101000000Z" }, EV_TLS_EXPIRED },
        { "expired intermediate", "Lx", "a.org", { LEAF, .san = "a.org" },
          EV_TLS_EXPIRED },
        { "intermediate of the future", "Ln", "a.org", { LEAF,
          .san = "a.org" }, EV_TLS_EXPIRED },
        /* trust */
        { "no intermediate", "L", "a.org", { LEAF, .san = "a.org" },
          EV_TLS_UNTRUSTED },
        { "the root instead of it", "LR", "a.org", { LEAF,
          .san = "a.org" }, EV_TLS_UNTRUSTED },
        { "self-signed", "L", "a.org", { .key = K_LEAF, .signer = K_LEAF,
          .issuer = "leaf", .san = "a.org" }, EV_TLS_UNTRUSTED },
        { "unknown root", "Lt", "a.org", { .key = K_LEAF,
          .signer = K_OTHER, .issuer = "stray", .san = "a.org" },
          EV_TLS_UNTRUSTED },
        { "root of the same name, another key", "L", "a.org",
          { .key = K_LEAF, .signer = K_OTHER, .san = "a.org" },
          EV_TLS_UNTRUSTED },
        /* signatures */
        { "leaf signature altered", "LI", "a.org", { LEAF, .san = "a.org",
          .break_sig = true }, EV_TLS_SIGNATURE },
        { "intermediate signature altered: not the root's", "Lb", "a.org",
          { LEAF, .san = "a.org" }, EV_TLS_UNTRUSTED },
        { "leaf signed by another key", "LI", "a.org", { .key = K_LEAF,
          .signer = K_OTHER, .issuer = "inter", .san = "a.org" },
          EV_TLS_SIGNATURE },
        { "SHA-1 leaf", "LI", "a.org", { LEAF, .san = "a.org",
          .alg = alg_ecdsa_sha1 }, EV_TLS_SIGNATURE },
        { "SHA-1 intermediate", "Ls", "a.org", { LEAF, .san = "a.org" },
          EV_TLS_SIGNATURE },
        /* what issuers may not be */
        { "intermediate is no authority", "Lc", "a.org", { LEAF,
          .san = "a.org" }, EV_TLS_CHAIN },
        { "intermediate may not sign", "Lu", "a.org", { LEAF,
          .san = "a.org" }, EV_TLS_CHAIN },
        { "version 1 intermediate", "L1", "a.org", { LEAF,
          .san = "a.org" }, EV_TLS_UNTRUSTED },
        { "intermediate with a usage twice", "LD", "a.org", { LEAF,
          .san = "a.org" }, EV_TLS_UNTRUSTED },
        { "intermediate of RSA 1,024", "Ld", "a.org", { LEAF,
          .san = "a.org" }, EV_TLS_UNTRUSTED },
        { "intermediate with an unknown critical extension", "LC", "a.org",
          { LEAF, .san = "a.org" }, EV_TLS_CHAIN },
        /* constraints */
        { "name not permitted", "Lp", "a.org", { LEAF, .san = "a.org" },
          EV_TLS_CONSTRAINT },
        { "another name of the leaf not permitted", "Lq", "a.org", { LEAF,
          .san = "a.org,b.org" }, EV_TLS_CONSTRAINT },
        { "name excluded", "Le", "x.a.org", { LEAF, .san = "x.a.org" },
          EV_TLS_CONSTRAINT },
        { "constraint on mail names", "Lm", "a.org", { LEAF,
          .san = "a.org" }, EV_TLS_CONSTRAINT },
        /* form */
        { "nothing", "", "a.org", { .san = "a.org" }, EV_TLS_CHAIN },
        { "noise first", "zLI", "a.org", { LEAF, .san = "a.org" },
          EV_TLS_CHAIN },
        { "8 certificates", "LIIIIIII", "a.org", { LEAF, .san = "a.org" },
          EV_NONE },
        { "9 certificates", "LIIIIIIII", "a.org", { LEAF, .san = "a.org" },
          EV_TLS_CHAIN },
        { "leaf of version 1", "LI", "a.org", { LEAF, .version = "",
          .no_usage = true }, EV_TLS_CHAIN },
        { "leaf with a usage twice", "LI", "a.org", { LEAF, .san = "a.org",
          .extra = "300b 0603551d0f 0404 03020780" }, EV_TLS_CHAIN },
        { "leaf with an unknown critical extension", "LI", "a.org", { LEAF,
          .san = "a.org", .extra = "300e 06032a0304 0101ff 0404 04020500" },
          EV_TLS_CHAIN },
    };
    sl root = chain_part('R', NULL);
    static uint8_t keep[1000];
    memcpy(keep, root.p, root.len);
    root.p = keep;
    trust_only(1, &root);
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        sl chain[12];
        size_t cnt = strlen(tab[i].chain);
        struct hs *h = judge_hs(tab[i].peer);
        for (size_t k = 0; k < cnt; k++)
            chain[k] = chain_part(tab[i].chain[k], &tab[i].leaf);
        memset(sig_cache, 0, sizeof sig_cache);
        enum event got = judge(h, cnt, chain, 100000);
        row_ev(tab[i].name, -(int)got, -(int)tab[i].want);
        h = judge_hs(tab[i].peer);
        enum event again = judge(h, cnt, chain, 1);
        row_ev(name_of("%s, byte by byte, signatures cached", tab[i].name),
            -(int)again, -(int)tab[i].want);
        /* turned off, any certificate with a usable key of its own goes */
        cfg.insecure = true;
        h = judge_hs(tab[i].peer);
        got = judge(h, cnt, chain, 7);
        cfg.insecure = false;
        row_ev(name_of("%s, checks off", tab[i].name), -(int)got,
            tab[i].want == EV_TLS_CHAIN && strcmp(tab[i].chain, "Lc")
            && strcmp(tab[i].chain, "Lu") && strcmp(tab[i].chain, "LC")
            && !strstr(tab[i].name, "leaf with an unknown")
            ? -EV_TLS_CHAIN : 0);
    }
#undef LEAF
}

/* Paths of so many certificates, and what they cost. */
static void path_rows(void)
{
    for (int len = 4; len <= 7; len++) {
        sl chain[8];
        char name[8][24];
        for (int i = 0; i < len; i++)
            snprintf(name[i], sizeof name[i], "level %d", i);
        for (int i = 0; i < len; i++)
            chain[i] = cert_make((struct plan){ .is_ca = i > 0,
                .subject = name[i], .issuer = i + 1 < len ? name[i + 1]
                    : "root", .san = i ? NULL : "a.org",
                .key = i % 2 ? K_INTER : K_INTER2,
                .signer = i + 1 == len ? K_ROOT
                    : i % 2 ? K_INTER2 : K_INTER });
        struct hs *h = judge_hs("a.org");
        memset(sig_cache, 0, sizeof sig_cache);
        enum event got = judge(h, (size_t)len, chain, 1000);
        row(name_of("a path of %d", len), got == (len <= LIM_PATH_CNT
            ? EV_NONE : EV_TLS_UNTRUSTED) && h->sig_cnt <= LIM_SIG_CNT,
            "%s, %u signatures", ev_label(-(int)got), h->sig_cnt);
        if (len > LIM_PATH_CNT)
            continue;
        unsigned first = h->sig_cnt;
        h = judge_hs("a.org");
        got = judge(h, (size_t)len, chain, 1000);
        row(name_of("a path of %d, cached", len), got == EV_NONE
            && first == (unsigned)len && h->sig_cnt == 0, "%s, %u then %u",
            ev_label(-(int)got), first, h->sig_cnt);
        /* a cached signature vouches for nothing else */
        sl other = cert_make((struct plan){ .subject = "level 0",
            .issuer = "level 1", .san = "b.org", .key = K_INTER2,
            .signer = K_OTHER });
        chain[0] = other;
        h = judge_hs("b.org");
        got = judge(h, (size_t)len, chain, 1000);
        row_ev(name_of("a path of %d, cached, another leaf", len),
            -(int)got, -EV_TLS_SIGNATURE);
    }
    /* 32 KB in all, by one certificate or many */
    static const struct { size_t each; size_t cnt; bool bad; } big[] = {
        { 32768, 1, false }, { 32769, 1, true }, { 4096, 8, false },
        { 4097, 8, true }, { 16384, 2, false }, { 16384, 3, true },
        { 0, 8, false }, { 0, 9, true }, { 1, 150, true },
    };
    for (size_t i = 0; i < COUNT_OF(big); i++) {
        struct hs *h = judge_hs("a.org");
        static sl chain[150];
        for (size_t k = 0; k < big[i].cnt; k++)
            chain[k] = (sl){ work_buf, big[i].each };
        enum event got = judge(h, big[i].cnt, chain, 1000);
        row(name_of("%zu certificates of %zu bytes", big[i].cnt,
                    big[i].each), got == EV_TLS_CHAIN
            && h->bad == big[i].bad && h->len <= LIM_CHAIN_LEN, "%s, bad %d",
            ev_label(-(int)got), h->bad);
    }
    /* announced as larger than it is, and the other way round */
    struct hs *h = judge_hs("a.org");
    hs_class.start_chain(&h->vtable, NULL);
    hs_class.start_cert(&h->vtable, 0xffffffu);
    row("16 MB announced", h->bad, "taken");
    hs_class.append(&h->vtable, work_buf, 1000);
    row("and nothing copied", h->len == 0, "%zu bytes", h->len);
}

/* Anchors: a leaf of its own, its constraints, many of one name. */
static void anchor_rows(void)
{
    static uint8_t keep[24][2000];
    sl set[24];
#define KEEP(i, ...) do { sl d_ = cert_make((struct plan){ __VA_ARGS__ }); \
    memcpy(keep[i], d_.p, d_.len); set[i] = (sl){ keep[i], d_.len }; \
    } while (0)
    KEEP(0, .key = K_LEAF, .signer = K_LEAF, .issuer = "leaf",
        .san = "a.org");
    trust_only(1, set);
    row_ev("a self-signed leaf that is an anchor",
        -(int)judge(judge_hs("a.org"), 1, set, 1000), 0);
    row_ev("the same for another name",
        -(int)judge(judge_hs("b.org"), 1, set, 1000), -EV_TLS_NAME);
    KEEP(1, .key = K_OTHER, .signer = K_OTHER, .issuer = "leaf",
        .san = "a.org");
    row("a leaf of its name with another key",
        judge(judge_hs("a.org"), 1, set + 1, 1000) != EV_NONE, "taken");
    KEEP(0, .is_ca = true, .usage = "03020186", .key = K_LEAF,
        .signer = K_LEAF, .issuer = "leaf", .san = "a.org");
    trust_only(1, set);
    row_ev("an authority that is leaf and anchor",
        -(int)judge(judge_hs("a.org"), 1, set, 1000), 0);
    KEEP(0, .is_ca = true, .subject = "root", .key = K_ROOT,
        .signer = K_ROOT, .constraints = "300b a009 3007 8205 612e6f7267");
    trust_only(1, set);
    KEEP(1, .key = K_LEAF, .signer = K_ROOT, .san = "a.org");
    KEEP(2, .key = K_LEAF, .signer = K_ROOT, .san = "b.org");
    row_ev("an anchor's constraint kept to",
        -(int)judge(judge_hs("a.org"), 1, set + 1, 1000), 0);
    row_ev("an anchor's constraint broken",
        -(int)judge(judge_hs("b.org"), 1, set + 2, 1000),
        -EV_TLS_CONSTRAINT);
    /* ten anchors of one name: the right key among them counts */
    for (int i = 0; i < 10; i++)
        KEEP(i, .is_ca = true, .subject = "root", .key = i == 9 ? K_ROOT
            : i % 2 ? K_OTHER : K_INTER2, .signer = K_ROOT,
            .until = i % 3 ? "300101000000Z" : "310101000000Z");
    trust_only(10, set);
    KEEP(20, .key = K_LEAF, .signer = K_ROOT, .san = "a.org");
    row_ev("ten anchors of one name",
        -(int)judge(judge_hs("a.org"), 1, set + 20, 1000), 0);
    trust_only(0, NULL);
    row_ev("no anchor", -(int)judge(judge_hs("a.org"), 1, set + 20, 1000),
        -EV_TLS_UNTRUSTED);
#undef KEEP
}

static void test_judge(void)
{
    judge_rows();
    path_rows();
    anchor_rows();
    /* no damaged chain is ever taken, nor read past */
    sl root = chain_part('R', NULL);
    trust_only(1, &root);
    struct plan leaf = { .key = K_LEAF, .signer = K_INTER,
        .issuer = "inter", .san = "a.org" };
    sl chain[2] = { chain_part('L', &leaf), chain_part('I', NULL) };
    unsigned taken = 0;
    for (int c = 0; c < 2; c++)
        for (size_t at = 0; at < chain[c].len; at++) {
            uint8_t *p = (uint8_t *)(uintptr_t)chain[c].p;
            p[at] ^= (uint8_t)(1 << at % 8);
            taken += judge(judge_hs("a.org"), 2, chain, 1000) == EV_NONE;
            p[at] ^= (uint8_t)(1 << at % 8);
        }
    row("a bit flipped in each byte of a chain", taken == 0
        && judge(judge_hs("a.org"), 2, chain, 1000) == EV_NONE, "%u taken",
        taken);
}

static void number_put(uint8_t *to, uint64_t n)
{
    for (size_t i = 8; i-- > 0; n >>= 8)
        to[i] = (uint8_t)n;
}

static void test_sessions(void)
{
    uint8_t key[2][16], other[16];
    chan_key(SL("a.org"), 443, SL("a.org"), TLS_VERIFIED, key[0]);
    static const struct { const char *name, *host, *cert; int port;
        enum tls_mode mode; } tab[] = {
        { "another host", "b.org", "a.org", 443, TLS_VERIFIED },
        { "another name", "a.org", "b.org", 443, TLS_VERIFIED },
        { "another port", "a.org", "a.org", 444, TLS_VERIFIED },
        { "no TLS", "a.org", "a.org", 443, TLS_OFF },
        { "checks off", "a.org", "a.org", 443, TLS_UNVERIFIED },
        { "parts moved", "a.orga", ".org", 443, TLS_VERIFIED },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        chan_key(sl_str(tab[i].host), (uint16_t)tab[i].port,
            sl_str(tab[i].cert), tab[i].mode, other);
        row(name_of("another key: %s", tab[i].name), memcmp(other, key[0],
            16) != 0, "same");
    }
    chan_key(SL("a.org"), 443, SL("a.org"), TLS_VERIFIED, key[1]);
    row("the same destination", memcmp(key[0], key[1], 16) == 0, "differs");
    /* as many as there is room for; then the one of four that ends first */
    memset(session_cache, 0, sizeof session_cache);
    memset(session_key, 0, sizeof session_key);
    br_ssl_session_parameters params = { .session_id_len = 1 };
    uint8_t k[16] = { 0 };
    size_t held = 0;
    for (unsigned n = 1; n <= LIM_SESSION_CNT + 1; n++) {
        number_put(k, n);
        session_store(k, &params, n == 7 ? 99 : 100 + n);
    }
    for (unsigned n = 1; n <= LIM_SESSION_CNT + 1; n++) {
        number_put(k, n);
        held += memcmp(session_slot(k)->key, k, 16) == 0;
    }
    row("a full table drops one", held == LIM_SESSION_CNT, "%zu", held);
    /* key 1,025 may take one of places 4 to 7, which keys 5 to 8 have */
    number_put(k, LIM_SESSION_CNT + 1);
    row("of four, what ends first", session_slot(k) == &session_cache[6],
        "%td", session_slot(k) - session_cache);
    number_put(k, 5);
    number_put(k + 8, 1);
    row("half a key is no key", session_slot(k)->until_wall == 105
        && memcmp(session_slot(k)->key, k, 16) != 0, "the same");
    memset(session_key, 0, sizeof session_key);
    memset(session_cache, 0, sizeof session_cache);
}
