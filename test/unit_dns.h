/* Section 09: questions built, answers taken apart. */

/* An answer as text: rcode, flags, ttl, records. */
static sl dns_text(int got, uint16_t type, const struct dns_answer *a)
{
    static uint8_t text[2048];
    struct bb b = BB(text);
    if (got <= 0) {
        bb_str(&b, got ? ev_label(got) : "not ours");
        return work_done(&b);
    }
    bb_str(&b, "rcode ");
    bb_u64(&b, a->rcode);
    if (a->is_cut) {
        bb_str(&b, " cut");
        return work_done(&b);
    }
    bb_str(&b, " ttl ");
    bb_u64(&b, a->ttl);
    if (a->has_more) {
        bb_str(&b, " more ");
        bb_put(&b, (sl){ a->cname, a->cname_len });
    }
    for (size_t i = 0, at = 0; i < a->rec_cnt; i++) {
        const uint8_t *p = a->data + at;
        bb_str(&b, i ? ", " : ": ");
        if (type == DNS_SRV) {
            for (int k = 0; k < 6; k += 2) {
                bb_u64(&b, be16(p + k));
                bb_byte(&b, ' ');
            }
            bb_put(&b, (sl){ p + 7, p[6] });
            at += 7U + p[6];
        } else {
            struct ip ip = { .v6 = type == DNS_AAAA };
            memcpy(ip.b, p, ip.v6 ? 16 : 4);
            bb_ip(&b, &ip, 0);
            at += ip.v6 ? 16 : 4;
        }
    }
    return work_done(&b);
}

static uint16_t dns_type_of(const char *text)
{
    return strcmp(text, "A") == 0 ? DNS_A : strcmp(text, "AAAA") == 0
        ? DNS_AAAA : strcmp(text, "SRV") == 0 ? DNS_SRV : DNS_CNAME;
}

static struct dns_answer dns_out;

static int dns_run(sl pkt, uint16_t id, sl name, uint16_t type)
{
    memset(&dns_out, 0xee, sizeof dns_out);
    return dns_parse((sl){ guarded(pkt.p, pkt.len), pkt.len }, id, name,
        type, &dns_out);
}

/* What must hold of any answer taken. */
static bool dns_sane(int got)
{
    return got <= 1 && (got < 1 || dns_out.is_cut
        || (dns_out.rec_cnt <= LIM_DNS_REC_CNT
            && dns_out.data_len <= LIM_DNSDATA_LEN && dns_out.cname_len > 0
            && dns_out.cname_len < LIM_HOST_LEN));
}

static void dns_damage_of(const char *title, sl pkt, sl name, uint16_t type)
{
    static uint8_t copy[70000];
    bool sane = true, grows = false;
    int full = dns_run(pkt, 0x1234, name, type);
    unsigned recs = full == 1 && !dns_out.is_cut ? dns_out.rec_cnt : 0;
    for (size_t n = 0; n < pkt.len; n++) {
        int got = dns_run((sl){ pkt.p, n }, 0x1234, name, type);
        sane &= dns_sane(got);
        grows |= got == 1 && full == 1 && !dns_out.is_cut
            && dns_out.rec_cnt > recs;
    }
    row(name_of("%s, cut at every byte", title), sane && !grows, "unsound");
    for (size_t bit = 0; bit < pkt.len * 8; bit++) {
        memcpy(copy, pkt.p, pkt.len);
        copy[bit / 8] ^= (uint8_t)(1 << bit % 8);
        sane &= dns_sane(dns_run((sl){ copy, pkt.len }, 0x1234, name, type));
    }
    row(name_of("%s, each bit flipped", title), sane, "unsound");
    for (size_t at = 0; at < pkt.len; at++) {
        memcpy(copy, pkt.p, pkt.len);
        copy[at] = 0xff;
        sane &= dns_sane(dns_run((sl){ copy, pkt.len }, 0x1234, name, type));
        copy[at] = 0xc0;
        sane &= dns_sane(dns_run((sl){ copy, pkt.len }, 0x1234, name, type));
        copy[at] = 0;
        sane &= dns_sane(dns_run((sl){ copy, pkt.len }, 0x1234, name, type));
    }
    row(name_of("%s, each byte ff, c0, 00", title), sane, "unsound");
}

/* Packets of dns.txt: `== title`, `ask TYPE NAME`, `want TEXT`, then hex. */
static void dns_file(void (*use)(const char *title, sl pkt, sl name,
    uint16_t type, const char *want))
{
    static char text[200000];
    size_t len;
    file_read("test/vectors/dns.txt", text, sizeof text, &len);
    for (char *p = strstr(text, "\n== "); p; ) {
        char *next = strstr(p + 1, "\n== ");
        static uint8_t pkt[70000];
        char title[100], type[8], name[300], want[1000];
        if (next)
            *next = 0;
        int used = 0;
        if (sscanf(p, "\n== %99[^\n]\nask %7s %299s\nwant %999[^\n]%n",
                   title, type, name, want, &used) != 4) {
            row(p, false, "not understood");
            return;
        }
        size_t n = hex_parse(p + used, pkt, sizeof pkt);
        use(title, (sl){ pkt, n }, sl_str(name), dns_type_of(type), want);
        if (next)
            *next = '\n';
        p = next;
    }
}

static void dns_packet_row(const char *title, sl pkt, sl name, uint16_t type,
    const char *want)
{
    int got = dns_run(pkt, 0x1234, name, type);
    row_str(title, dns_text(got, type, &dns_out), want);
}

static void dns_damage_row(const char *title, sl pkt, sl name, uint16_t type,
    const char *want)
{
    (void)want;
    dns_damage_of(title, pkt, name, type);
}

static void put16(struct bb *b, unsigned v)
{
    bb_byte(b, (uint8_t)(v >> 8));
    bb_byte(b, (uint8_t)v);
}

/* Head and question of an answer with so many records. */
static struct bb dns_head(unsigned flags, sl name, uint16_t type,
    unsigned an, unsigned ns)
{
    struct bb b = work_bb();
    put16(&b, 0x1234);
    put16(&b, flags);
    put16(&b, 1);
    put16(&b, an);
    put16(&b, ns);
    put16(&b, 0);
    if (!dns_put_name(&b, name))
        b.over = true;
    put16(&b, type);
    put16(&b, 1);
    return b;
}

/* One record; its name a pointer to `at`, or text when at is 0. */
static void dns_rec(struct bb *b, unsigned at, const char *name,
    unsigned type, uint32_t ttl, sl data)
{
    if (at)
        put16(b, 0xc000 | at);
    else if (!dns_put_name(b, sl_str(name)))
        b->over = true;
    put16(b, type);
    put16(b, 1);
    put16(b, ttl >> 16);
    put16(b, ttl & 0xffff);
    put16(b, (unsigned)data.len);
    bb_put(b, data);
}

static sl wire_name(uint8_t buf[300], const char *name)
{
    struct bb b = { buf, 0, 300, false };
    return dns_put_name(&b, sl_str(name)) ? work_done(&b)
        : (sl){ NULL, 0 };
}

static void dns_names(void)
{
    static const struct { const char *in; bool ok; } tab[] = {
        { "a", true }, { "a.", true }, { "example.org", true },
        { "_matrix-fed._tcp.example.org", true }, { "", false },
        { ".", false }, { "..", false }, { "a..b", false }, { ".a", false },
        { "a..", false },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        struct bb b = work_bb();
        row(name_of("name `%s`", tab[i].in), dns_put_name(&b,
            sl_str(tab[i].in)) == tab[i].ok, "wrong");
    }
    for (size_t label = 63; label < 65; label++) {
        char text[100];
        struct bb b = work_bb();
        snprintf(text, sizeof text, "%0*d.org", (int)label, 0);
        row(name_of("a label of %zu", label), dns_put_name(&b, sl_str(text))
            == (label == 63), "wrong");
    }
    for (size_t len = 250; len < 258; len++) {
        char text[300];
        struct bb b = work_bb();
        for (size_t i = 0; i < len; i++)
            text[i] = i % 2 ? '.' : 'a';
        text[len - 1] = 'a';
        text[len] = 0;
        if (len % 2 == 0)
            text[len - 2] = 'a';
        bool ok = dns_put_name(&b, (sl){ (uint8_t *)text, len });
        uint8_t back[LIM_HOST_LEN], back_len = 0;
        size_t pos = 0;
        bool again = ok && dns_parse_name((sl){ guarded(work_buf, b.len),
            b.len }, &pos, back, &back_len) && pos == b.len
            && sl_eq((sl){ back, back_len }, (sl){ (uint8_t *)text, len });
        row(name_of("a name of %zu", len), ok == (len <= 253)
            && again == ok && (!ok || b.len == len + 2), "%d %d", ok, again);
    }
    struct bb b = work_bb();
    bool ok = dns_build(&b, 0xabcd, SL("Ab.c"), DNS_SRV);
    row_text("a question's bytes", ok ? work_done(&b) : (sl){ NULL, 0 },
        SL("\xab\xcd\1\0\0\1\0\0\0\0\0\0\2Ab\1c\0\0\x21\0\1"));
    struct bb small = { work_buf, 0, 20, false };
    row("a question that does not fit", !dns_build(&small, 1, SL("a.b"),
        DNS_A), "built");
}

/* Names made of pointers: 64 jumps, then one more. */
static void dns_pointers(void)
{
    for (unsigned jumps = 1; jumps <= LIM_POINTER_CNT + 2; jumps++) {
        uint8_t pkt[300], out[LIM_HOST_LEN], out_len;
        struct bb b = BB(pkt);
        bb_put(&b, SL("\1a\0\0"));
        for (unsigned k = 0; k < jumps; k++)
            put16(&b, 0xc000 | (k ? 4 + 2 * (k - 1) : 0));
        size_t pos = b.len - 2;
        bool ok = dns_parse_name((sl){ guarded(pkt, b.len), b.len }, &pos,
            out, &out_len);
        if (jumps > 62)
            row(name_of("%u jumps", jumps), ok == (jumps
                <= LIM_POINTER_CNT) && (!ok || (out_len == 1
                && pos == b.len)), "%d", ok);
    }
    static const struct { const char *name, *hex; int at;
        const char *want; } tab[] = {          /* want NULL: refused */
        { "plain", "01'a'02'bc'00", 0, "a.bc" },
        { "root", "00", 0, "." },
        { "upper case", "03'WwW'00", 0, "www" },
        { "pointer", "01'a'00 01'b'c000", 3, "b.a" },
        { "pointer into a name", "01'a'01'b'00 c002", 5, "b" },
        { "pointer to itself", "c000", 0, NULL },
        { "pointer to itself later", "00 c001", 1, NULL },
        { "two that loop", "c002 c000", 2, NULL },
        { "forward", "c003 00 01'a'00", 0, NULL },
        { "label, then to itself", "00 01'a'c001", 1, NULL },
        { "back to its own label", "01'a'01'b'c002", 2, NULL },
        { "pointer cut", "00 c0", 1, NULL },
        { "label cut", "05'abc'", 0, NULL }, { "no end", "01'a'", 0, NULL },
        { "nothing", "", 0, NULL }, { "beyond", "00 c0ff", 1, NULL },
        { "label type 40", "40 00", 0, NULL },
        { "label type 80", "80 00", 0, NULL },
        { "label of 63", "3f'"
          "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'00",
          0, "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
          "aa" },
        { "dot in a label", "03'a.b'00", 0, NULL },
        { "blank in a label", "03'a b'00", 0, NULL },
        { "NUL in a label", "03 61 00 62 00", 0, NULL },
        { "control in a label", "01 1b 00", 0, NULL },
        { "DEL in a label", "01 7f 00", 0, NULL },
        { "byte over 7f in a label", "01 e4 00", 0, NULL },
        { "underscore", "04'_tcp'00", 0, "_tcp" },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        uint8_t pkt[200], out[LIM_HOST_LEN], out_len = 0;
        size_t n = hex_parse(tab[i].hex, pkt, sizeof pkt);
        size_t pos = (size_t)tab[i].at;
        bool ok = dns_parse_name((sl){ guarded(pkt, n), n }, &pos, out,
            &out_len);
        row(name_of("name: %s", tab[i].name), tab[i].want ? ok
            && sl_eq((sl){ out, out_len }, sl_str(tab[i].want)) && pos <= n
            : !ok, "%d %.*s", ok, out_len, out);
    }
}

static void dns_built(void)
{
    uint8_t nb[300];
    char label[40];
    /* a chain of so many CNAMEs, in order and backwards */
    for (int cnt = 7; cnt <= 10; cnt++)
        for (int back = 0; back < 2; back++) {
            struct bb b = dns_head(0x8180, SL("c0.org"), DNS_A,
                (unsigned)cnt + 1, 0);
            for (int k = 0; k < cnt; k++) {
                int i = back ? cnt - 1 - k : k;
                char to[40];
                snprintf(label, sizeof label, "c%d.org", i);
                snprintf(to, sizeof to, "c%d.org", i + 1);
                if (back && k == 0) {
                    char last[40];
                    snprintf(last, sizeof last, "c%d.org", cnt);
                    dns_rec(&b, 0, last, DNS_A, 60, SL("\1\2\3\4"));
                }
                dns_rec(&b, 0, label, DNS_CNAME, 60, wire_name(nb, to));
            }
            if (!back) {
                snprintf(label, sizeof label, "c%d.org", cnt);
                dns_rec(&b, 0, label, DNS_A, 60, SL("\1\2\3\4"));
            }
            int got = dns_run(work_done(&b), 0x1234, SL("c0.org"), DNS_A);
            row_str(name_of("%d CNAMEs%s", cnt, back ? ", backwards" : ""),
                dns_text(got, DNS_A, &dns_out), cnt <= LIM_CNAME_CNT
                ? "rcode 0 ttl 60: 1.2.3.4" : "DNS_BAD");
        }
    /* more records than are kept */
    for (unsigned cnt = 15; cnt < 40; cnt += 8) {
        struct bb b = dns_head(0x8180, SL("a.org"), DNS_A, cnt, 0);
        for (unsigned i = 0; i < cnt; i++)
            dns_rec(&b, 12, NULL, DNS_A, 60, (sl){ (uint8_t[4]){ 10, 0, 0,
                (uint8_t)i }, 4 });
        int got = dns_run(work_done(&b), 0x1234, SL("a.org"), DNS_A);
        row_int(name_of("%u A records", cnt), got == 1 ? dns_out.rec_cnt
            : -1, cnt < 16 ? cnt : 16);
    }
    /* SRV records that outgrow the data are left out, the rest stays */
    struct bb b = dns_head(0x8180, SL("a.org"), DNS_SRV, 6, 0);
    for (int i = 0; i < 6; i++) {
        uint8_t data[300];
        struct bb d = BB(data);
        char name[240];
        snprintf(name, sizeof name, "%060d.%060d.%060d.x%d.org", 0, 0, 0, i);
        bb_put(&d, SL("\0\1\0\2\0\3"));
        bb_put(&d, wire_name(nb, name));
        dns_rec(&b, 12, NULL, DNS_SRV, 60, work_done(&d));
    }
    int got = dns_run(work_done(&b), 0x1234, SL("a.org"), DNS_SRV);
    row("SRV records over 512 bytes", got == 1 && dns_out.rec_cnt == 2
        && dns_out.data_len == 2 * (7 + 60 * 3 + 3 + 6), "%d, %u records, %u",
        got, dns_out.rec_cnt, dns_out.data_len);
    /* counts that promise more than there is */
    static const unsigned count[] = { 1, 2, 255, 65535 };
    for (size_t i = 0; i < COUNT_OF(count); i++) {
        b = dns_head(0x8180, SL("a.org"), DNS_A, count[i], 0);
        got = dns_run(work_done(&b), 0x1234, SL("a.org"), DNS_A);
        row_ev(name_of("%u answers promised, none there", count[i]), got,
            -EV_DNS_BAD);
        b = dns_head(0x8183, SL("a.org"), DNS_A, 0, count[i]);
        got = dns_run(work_done(&b), 0x1234, SL("a.org"), DNS_A);
        row_str(name_of("%u authorities promised, none there", count[i]),
            dns_text(got, DNS_A, &dns_out), "rcode 3 ttl 0");
    }
    /* 4,096 empty records of other names end in good time */
    b = dns_head(0x8180, SL("a.org"), DNS_A, 5000, 0);
    for (int i = 0; i < 5000; i++)
        dns_rec(&b, 0, i % 2 ? "b.org" : "c.org", DNS_CNAME, 60,
            wire_name(nb, i % 2 ? "c.org" : "b.org"));
    got = dns_run(work_done(&b), 0x1234, SL("a.org"), DNS_A);
    row("5,000 records of others", got == 1 && dns_out.rec_cnt == 0
        && !dns_out.has_more, "%d", got);
    /* an answer to another question than ours, in each part of it */
    b = dns_head(0x8180, SL("a.org"), DNS_A, 1, 0);
    dns_rec(&b, 12, NULL, DNS_A, 60, SL("\1\2\3\4"));
    sl pkt = work_done(&b);
    static const struct { const char *name; uint16_t id; const char *ask;
        uint16_t type; int want; } ask[] = {
        { "ours", 0x1234, "a.org", DNS_A, 1 },
        { "ours, upper case", 0x1234, "A.ORG", DNS_A, 1 },
        { "ours, rooted", 0x1234, "a.org.", DNS_A, 1 },
        { "other id", 0x1235, "a.org", DNS_A, 0 },
        { "id swapped", 0x3412, "a.org", DNS_A, 0 },
        { "other name", 0x1234, "b.org", DNS_A, 0 },
        { "longer name", 0x1234, "x.a.org", DNS_A, 0 },
        { "shorter name", 0x1234, "org", DNS_A, 0 },
        { "other type", 0x1234, "a.org", DNS_AAAA, 0 },
    };
    for (size_t i = 0; i < COUNT_OF(ask); i++)
        row_int(ask[i].name, dns_run(pkt, ask[i].id, sl_str(ask[i].ask),
            ask[i].type), ask[i].want);
    /* 0x20 mixed case in the answer's own names */
    b = dns_head(0x8180, SL("A.oRg"), DNS_A, 1, 0);
    dns_rec(&b, 0, "a.ORG", DNS_A, 60, SL("\1\2\3\4"));
    row_int("answer in mixed case", dns_run(work_done(&b), 0x1234,
        SL("a.Org"), DNS_A) == 1 ? dns_out.rec_cnt : -1, 1);
    dns_damage_of("a chain of pointers", pkt, SL("a.org"), DNS_A);
}

static void test_dns(void)
{
    dns_names();
    dns_pointers();
    dns_file(dns_packet_row);
    dns_built();
}

static void test_dns_damage(void)
{
    dns_file(dns_damage_row);
    /* noise behind a good head and question */
    bool sane = true;
    static const uint16_t type[] = { DNS_A, DNS_AAAA, DNS_SRV };
    for (int i = 0; i < 60000; i++) {
        struct bb b = dns_head(0x8180, SL("a.org"), type[i % 3],
            (unsigned)dice() % 5, (unsigned)dice() % 3);
        size_t n = dice() % 120;
        for (size_t k = 0; k < n; k++) {
            static const uint8_t likely[] = { 0xc0, 12, 0, 1, 0, 33, 0, 5,
                0, 28, 1, 'a', 3, 'o', 'r', 'g', 4, 16, 0xc0, 20 };
            bb_byte(&b, dice() % 4 ? likely[dice() % sizeof likely]
                : (uint8_t)dice());
        }
        sane &= dns_sane(dns_run(work_done(&b), 0x1234, SL("a.org"),
            type[i % 3]));
    }
    row("60,000 packets of likely noise", sane, "unsound");
}
