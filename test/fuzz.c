/* Fuzzing: one function a target over lkjwt.c, which is included as by
 * unit.c, with the scripted world below it. Three programs come of it:
 *
 *   build/fuzz          libFuzzer: FUZZ_TARGET=json build/fuzz CORPUS
 *   build/fuzz-afl      the same file by afl-clang-fast
 *   build/fuzz-gcc,     -DFUZZ_REPLAY: each seed once, `N passed, N failed`
 *   build/fuzz-clang        unpack TARGET FOLDER   seeds to files
 *                           pack FILE...           files to seed lines
 *                           TARGET FILE...         these, and their log
 *
 * Seeds are lines of test/fuzz/TARGET.txt, escaped as test/vectors are, and
 * columns of these vectors. An input that is refused, cut or repeated must
 * give the same as before; a parser gets copies that end where its bytes
 * end, so that AddressSanitizer sees a read behind them. Chance comes from
 * the input alone.
 */
#define _GNU_SOURCE
#include <sys/wait.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* must() logs and leaves by _exit(): no fuzzer would notice. */
static _Noreturn void fuzz_exit(int status);
#define _exit(status) fuzz_exit(status)
#include "unit_world.h"
#undef _exit

static _Noreturn void wrong(const char *what, int line)
{
    fprintf(stderr, "test/fuzz.c:%d: not so: %s\n%s\n", line, what, log_buf);
    abort();
}

#define want(cond) ((cond) ? (void)0 : wrong(#cond, __LINE__))

static _Noreturn void fuzz_exit(int status)
{
    (void)status;
    wrong("must() held", 0);
}

/* ---- tools ---- */

/* A copy that ends where its memory ends. */
static uint8_t *exact(sl s)
{
    uint8_t *p = malloc(s.len ? s.len : 1);
    want(p);
    if (s.len)
        memcpy(p, s.p, s.len);
    return p;
}

static bool is_event(int n)
{
    return n < 0 && -n < EV_CNT;
}

/* Whether part lies in whole; empty ones may lie anywhere. */
static bool in(sl part, sl whole)
{
    return part.len == 0 || (part.p >= whole.p
        && part.len <= whole.len
        && part.p - whole.p <= (ptrdiff_t)(whole.len - part.len));
}

static sl line_take(sl *rest)
{
    size_t n = sl_find(*rest, '\n');
    sl line = { rest->p, n };
    *rest = sl_skip(*rest, n + 1);
    return line;
}

static void dice_seed(sl s)
{
    dice_state = 88172645463325252u;
    for (size_t i = 0; i < s.len; i++)
        dice_state = (dice_state ^ s.p[i]) * 0x100000001b3u;
    dice_state |= 1;
}

/* How an input comes in: in steps of so many bytes, 0 by chance. */
static const size_t step_tab[] = { SIZE_MAX, 1, 0, 0, 2, 7 };

static size_t step_of(size_t step)
{
    return step ? step : 1 + dice() % (dice() % 2 ? 5 : 200);
}

static void none_big(void)
{
    for (size_t i = 0; i < COUNT_OF(big_used); i++)
        want(!big_used[i]);
}

/* What happened, as text: runs of one input are compared by it. */
enum { TRACE_LEN = 1 << 20 };
static uint8_t trace_mem[2][TRACE_LEN];
static struct bb trace;

static void trace_start(bool first)
{
    trace = (struct bb){ trace_mem[!first], 0, TRACE_LEN, false };
}

static void trace_int(const char *name, int64_t v)
{
    bb_byte(&trace, ' ');
    bb_str(&trace, name);
    bb_i64(&trace, v);
}

/* Run it once for each way to split, and compare with the whole. */
static void each_split(sl data, void (*run)(sl data, size_t step))
{
    size_t whole = 0;
    for (size_t i = 0; i < COUNT_OF(step_tab); i++) {
        if (step_tab[i] && step_tab[i] < 8 && data.len > 1200)
            continue;
        trace_start(i == 0);
        run(data, step_tab[i]);
        none_big();
        want(!trace.over);
        if (i == 0)
            whole = trace.len;
        else if (trace.len != whole
                 || memcmp(trace_mem[0], trace_mem[1], whole)) {
            fprintf(stderr, "whole: %.*s\nstep %zu: %.*s\n", (int)whole,
                (char *)trace_mem[0], step_tab[i], (int)trace.len,
                (char *)trace_mem[1]);
            wrong("split as whole", __LINE__);
        }
    }
}

/* ---- request, reply: heads, framing, bodies, the next message ---- */

static bool h1_is_reply;

/* The body at in[*at..] with a buffer of cap. False: the end. */
static bool h1_run_body(sl in_raw, size_t *at, struct h1_body body,
    size_t step)
{
    size_t cap = in_raw.len % 3 ? 256 : (size_t)LIM_IN_LEN, from = 40;
    size_t len = from, limit = h1_is_reply ? 3000 : 2000;
    uint8_t *buf = malloc(cap);
    want(buf);
    struct intake t;
    int err = 0;
    intake_start(&t, body, limit);
    while (!t.is_done && *at < in_raw.len && !err) {
        size_t n = step_of(step);
        n = n < cap - len ? n : cap - len;
        n = n < in_raw.len - *at ? n : in_raw.len - *at;
        want(n > 0);
        memcpy(buf + len, in_raw.p + *at, n);
        len += n;
        *at += n;
        err = intake_take(&t, buf, from, cap, &len);
        want(err == 0 || is_event(err));
        want(len >= from && len <= cap && t.len <= limit);
    }
    trace_int("body ", t.is_done);
    if (err) {
        bb_str(&trace, ev_label(err));
    } else {
        size_t left = len - from - (t.big ? 0 : t.len);
        want(t.is_done || left == 0);
        *at -= left;
        trace_int("at ", (int64_t)*at);
        bb_put(&trace, (sl){ intake_body(&t, buf, from), t.len });
    }
    big_free(&t.big);
    free(buf);
    return t.is_done && !err;
}

static void h1_run(sl data, size_t step)
{
    size_t at = 0;
    for (int messages = 0; messages < 5; messages++) {
        struct h1_head h;
        struct h1_body body;
        int n;
        memset(&h, 0, sizeof h);
        for (size_t have = 0;;) {
            size_t more = step_of(step);
            have = more < data.len - at - have ? have + more : data.len - at;
            uint8_t *p = exact((sl){ data.p + at, have });
            n = h1_parse_head((sl){ p, have }, h1_is_reply, &h);
            free(p);
            want(n <= (int)have && (n >= 0 || is_event(n)));
            if (n || have == data.len - at)
                break;
        }
        if (n <= 0) {
            bb_str(&trace, n ? ev_label(n) : "more");
            return;
        }
        uint8_t *p = exact((sl){ data.p + at, (size_t)n });
        sl head = { p, (size_t)n };
        at += head.len;
        want(h.has_start && h.field_cnt <= (h1_is_reply ? LIM_REPLY_FIELDS
            : LIM_FIELD_CNT));
        int err = h1_framing(head, &h, h1_is_reply, &body);
        trace_int("head ", n);
        bb_put(&trace, h1_slice(head, h.method));
        bb_put(&trace, h1_slice(head, h.target));
        trace_int("status ", h.status);
        for (int f = 0; f < H1_FIELD_CNT; f++) {
            want(in(h1_get(head, &h, (enum h1_field)f), head));
            trace_int("n", h.seen[f]);
            bb_put(&trace, h1_get(head, &h, (enum h1_field)f));
        }
        if (!h1_is_reply) {
            sl path = h1_path(h1_slice(head, h.target));
            want(path.len && (path.p[0] == '/' || path.p[0] == '*'));
            bb_put(&trace, path);
        }
        trace_int(err ? ev_label(err) : "framing ", body.kind);
        trace_int("len ", (int64_t)body.len);
        trace_int("keeps ", h1_keeps(&h));
        free(p);
        want(err == 0 || is_event(err));
        /* INV-H1: both kinds of framing, or a length twice, are refused */
        want(err || h.seen[H1_CONTENT_LENGTH] < 2);
        want(err || !h.seen[H1_CONTENT_LENGTH]
            || !h.seen[H1_TRANSFER_ENCODING]);
        if (err || !h1_run_body(data, &at, body, step) || !h1_keeps(&h))
            return;
    }
}

static void fuzz_request(sl data)
{
    h1_is_reply = false;
    each_split(data, h1_run);
}

static void fuzz_reply(sl data)
{
    h1_is_reply = true;
    each_split(data, h1_run);
}

/* ---- chunk: the decoder alone ---- */

static void chunk_run(sl data, size_t step)
{
    struct h1_chunk c;
    size_t at = 0;
    memset(&c, 0, sizeof c);
    while (at < data.len && c.state != CHUNK_END) {
        size_t n = step_of(step), used = 0;
        n = n < data.len - at ? n : data.len - at;
        uint8_t *p = exact((sl){ data.p + at, n });
        while (used < n && c.state != CHUNK_END) {
            sl piece = { p + used, n - used }, run;
            int got = h1_parse_chunk(piece, &c, &run);
            if (got < 0) {
                want(is_event(got));
                bb_str(&trace, ev_label(got));
                free(p);
                return;
            }
            want(got > 0 && (size_t)got <= piece.len && in(run, piece));
            bb_put(&trace, run);
            used += (size_t)got;
        }
        at += used;
        free(p);
    }
    trace_int("state ", c.state);
    trace_int("at ", (int64_t)at);
    trace_int("left ", c.left);
}

static void fuzz_chunk(sl data)
{
    each_split(data, chunk_run);
}

/* ---- json: every table; duplicates; round trips ---- */

struct loose { sl s, text; struct js_int i, seconds; bool flag; sl t; };
#define AT(member) offsetof(struct loose, member)
static const struct js_field sub_field[] = { { "t", JS_STRING, AT(t),
    NULL } };
static const struct js_table sub_table = { sub_field, 1, false, false };
static const struct js_field loose_field[] = {
    { "s", JS_STRING, AT(s), NULL }, { "i", JS_INT, AT(i), NULL },
    { "text", JS_TEXT, AT(text), NULL },
    { "seconds", JS_SECONDS, AT(seconds), NULL },
    { "flag", JS_FLAG, AT(flag), NULL },
    { "o", JS_OBJECT, 0, &sub_table }, { "any", JS_ANY, 0, NULL } };
#undef AT
static const struct js_table loose_table = { loose_field, 7, false, false };
static const struct js_table strict_table = { loose_field, 7, true, true };
static const struct js_table free_table = { NULL, 0, false, false };
static const struct js_table *const json_tab[] = { &free_table,
    &loose_table, &strict_table, &jwt_head_table, &jwt_claim_table,
    &request_tab[EP_GET_TOKEN], &request_tab[EP_SFU_GET],
    &request_tab[EP_AS_USER], &request_tab[EP_AS_SERVER],
    &request_tab[EP_AS_DELEGATE] };

/* Large enough for each table's struct. */
static union { struct loose loose; struct claims claims;
    struct request request; } json_out[2];

/* A string comes back as it was written. */
static void json_string(sl s)
{
    static uint8_t text[LIM_HUGE_LEN];
    for (int ascii = 0; ascii < 2; ascii++) {
        struct bb b = BB(text);
        struct loose got = { .flag = false };
        sl made;
        bb_str(&b, "{\"s\":");
        js_put_str(&b, s, ascii);
        bb_byte(&b, '}');
        bool ok = bb_finish(&b, &made);
        want(ok == utf8_check(s));
        if (!ok)
            continue;
        for (size_t i = 0; ascii && i < made.len; i++)
            want(made.p[i] >= 0x20 && made.p[i] < 0x7f
                && made.p[i] != '>' && made.p[i] != '?');
        uint8_t *p = exact(made);
        want(js_parse(p, made.len, &strict_table, &got) == 0
            && sl_eq(got.s, s));
        free(p);
    }
}

/* The members twice are refused, wherever they stand. */
static void json_twice(sl data)
{
    sl text = sl_trim(data);
    text = sl_skip(text, 1);
    text.len--;
    if (sl_trim(text).len == 0)
        return;
    uint8_t *p = malloc(2 * text.len + 3);
    want(p);
    struct bb b = { p, 0, 2 * text.len + 3, false };
    bb_byte(&b, '{');
    bb_put(&b, text);
    bb_byte(&b, ',');
    bb_put(&b, text);
    bb_byte(&b, '}');
    int err = js_parse(p, b.len, &free_table, &json_out[0]);
    want(err == -EV_JSON_DUPLICATE || err == -EV_JSON_LIMIT);
    free(p);
}

static void fuzz_json(sl data)
{
    if (data.len > 40000)
        return;
    int loose = 0;
    for (size_t i = 0; i < COUNT_OF(json_tab); i++) {
        int err[2];
        uint8_t *p[2];
        for (int k = 0; k < 2; k++) {
            memset(&json_out[k], 0, sizeof json_out[k]);
            p[k] = exact(data);
            err[k] = js_parse(p[k], data.len, json_tab[i], &json_out[k]);
        }
        want(err[0] == 0 || is_event(err[0]));
        want(err[0] == err[1]
            && (!data.len || memcmp(p[0], p[1], data.len) == 0));
        if (i == 0)
            loose = err[0];
        /* what no table takes, none takes; null apart */
        want(err[0] || loose == 0 || json_tab[i]->null_ok);
        if (i == 0 && err[0] == 0)
            json_twice(data);
        if ((i == 1 || i == 2) && err[0] == 0) {
            const struct loose *g = &json_out[0].loose;
            sl whole = { p[0], data.len };
            want(in(g->s, whole) && in(g->text, whole) && in(g->t, whole));
            want(utf8_check(g->s) && utf8_check(g->t)
                && utf8_check(g->text));
            json_string(g->s);
            json_string(g->t);
            if (g->i.is_set && !g->i.over) {
                uint8_t text[40];
                struct bb b = BB(text);
                bb_i64(&b, g->i.v);
                struct js_int again = js_int_from((sl){ text, b.len });
                want(again.is_set && !again.over && again.v == g->i.v);
            }
        }
        free(p[0]);
        free(p[1]);
    }
    json_string(data.len < 2000 ? data : (sl){ data.p, 2000 });
    sl a, b;
    uint8_t *p = exact(data);
    if (js_pair(p, data.len, &a, &b)) {
        want(in(a, (sl){ p, data.len }) && in(b, (sl){ p, data.len }));
        static uint8_t text[LIM_HUGE_LEN], back[LIM_HUGE_LEN];
        struct bb o = BB(text);
        rec_put_field(&o, a, b);
        want(!o.over);
        memcpy(back, text, o.len);
        sl a2, b2;
        want(js_pair(back, o.len, &a2, &b2) && sl_eq(a, a2)
            && sl_eq(b, b2));
    }
    free(p);
}

/* ---- jwt: webhooks, `T token, body` or `P header, claims, body` ---- */

static const int64_t jwt_now = 1726760839;
static struct api_key jwt_key[2];

static void fuzz_keys(struct api_key key[2])
{
    static const char *const name[] = { "devkey", "otherkey" };
    static const char *const text[] = { "devsecret", "othersecret" };
    for (int i = 0; i < 2; i++) {
        key[i].name = sl_str(name[i]);
        br_hmac_key_init(&key[i].sec_key, &br_sha256_vtable, text[i],
            strlen(text[i]));
    }
}

static const char *jwt_judge(sl token, uint8_t sum[36])
{
    uint8_t *p = exact(token);
    const char *why = jwt_check_webhook((sl){ p, token.len }, jwt_key, 2,
        jwt_now, sum);
    free(p);
    return why;
}

/* What a token that passed must have said. */
static bool jwt_is_webhook(sl text, const uint8_t sum[32])
{
    struct claims c = { .crit = false };
    uint8_t hash[48], *p = exact(text);
    bool ok = js_parse(p, text.len, &jwt_claim_table, &c) == 0 && !c.join
        && (sl_eq(c.iss, jwt_key[0].name) || sl_eq(c.iss, jwt_key[1].name))
        && (!c.exp.is_set || (!c.exp.over && c.exp.v > jwt_now - 60))
        && (!c.nbf.is_set || (!c.nbf.over && c.nbf.v <= jwt_now + 60))
        && c.hash.len == 44 && b64_parse(c.hash, true, hash) == 32
        && memcmp(hash, sum, 32) == 0;
    free(p);
    return ok;
}

static void webhook_run(sl body)
{
    uint8_t *p = exact(body);
    struct webhook w;
    if (webhook_parse(p, body.len, &w)) {
        sl whole = { p, body.len };
        want(in(w.event, whole) && in(w.id, whole) && in(w.dropped, whole)
            && in(w.room, whole) && in(w.identity, whole)
            && in(w.sid, whole) && in(w.reason, whole)
            && in(w.reason_old, whole));
        want(disconnect_reason(w.reason) <= 255);
    }
    free(p);
}

static void fuzz_jwt(sl data)
{
    static uint8_t text[40000];
    uint8_t sum[36], again[36];
    struct bb b = BB(text);
    sl first = line_take(&data), claims = { NULL, 0 }, token;
    if (!jwt_key[0].name.len)
        fuzz_keys(jwt_key);
    if (first.len == 0 || first.len > 6000)
        return;
    bool is_signed = first.p[0] == 'P';
    first = sl_skip(first, 1);
    if (is_signed) {
        claims = line_take(&data);
        if (claims.len > 6000)
            return;
        uint8_t mac[32];
        br_hmac_context h;
        b64_put(&b, b64_url, first);
        bb_byte(&b, '.');
        b64_put(&b, b64_url, claims);
        br_hmac_init(&h, &jwt_key[claims.len % 2].sec_key, 0);
        br_hmac_update(&h, text, b.len);
        br_hmac_out(&h, mac);
        bb_byte(&b, '.');
        b64_put(&b, b64_url, (sl){ mac, 32 });
    } else {
        bb_put(&b, first);
    }
    want(bb_finish(&b, &token));
    const char *why = jwt_judge(token, sum);
    const char *twice = jwt_judge(token, again);
    want(why == twice);
    if (!why) {
        want(memcmp(sum, again, 32) == 0);
        want(!is_signed || jwt_is_webhook(claims, sum));
        /* a changed byte of what is signed is noticed */
        size_t at = dice() % token.len;
        if (text[at] != '.' && !sl_starts(token, SL("Bearer "))) {
            text[at] = text[at] == 'A' ? 'B' : 'A';
            want(jwt_judge(token, sum));
        }
    }
    webhook_run(data);
    /* S7: no token for a client, and none that we send, is a webhook's */
    if (first.len < 200 && utf8_check(first)) {
        struct grant g = { .key = SL("devkey"), .identity = first,
            .room = first, .now_wall = jwt_now, .ttl_s = 3600,
            .can_publish = dice() & 1, .can_update = dice() & 1 };
        static uint8_t payload[8000], made[12000];
        struct bb body = BB(payload), join = BB(made);
        jwt_put_join(&body, &g);
        want(bb_finish(&body, &claims));
        jwt_sign(&join, &jwt_key[0].sec_key, claims);
        want(bb_finish(&join, &token));
        want(jwt_judge(token, sum));
    }
}

/* ---- dns: `A name` in a line, then the packet ---- */

static void dns_check(sl pkt, uint16_t id, sl name, uint16_t type)
{
    static struct dns_answer a;
    uint8_t *p = exact(pkt);
    int got = dns_parse((sl){ p, pkt.len }, id, name, type, &a);
    free(p);
    want(got == 0 || got == 1 || got == -EV_DNS_BAD);
    if (got != 1)
        return;
    want(a.rec_cnt <= LIM_DNS_REC_CNT && a.data_len <= LIM_DNSDATA_LEN
        && a.cname_len > 0 && a.cname_len < LIM_HOST_LEN);
    want(!(a.has_more && a.rec_cnt));
    size_t at = 0;
    for (unsigned i = 0; i < a.rec_cnt; i++) {
        if (type == DNS_SRV)
            want(at + 7 <= a.data_len && a.data[at + 6] > 0);
        at += type == DNS_A ? 4 : type == DNS_AAAA ? 16
            : 7U + a.data[at + 6];
        want(at <= a.data_len);
    }
    want(at == a.data_len);
    /* other id, other type: not ours */
    p = exact(pkt);
    want(dns_parse((sl){ p, pkt.len }, id ^ 1, name, type, &a) == 0);
    want(dns_parse((sl){ p, pkt.len }, id, name, type ^ 2, &a) == 0);
    free(p);
}

static void fuzz_dns(sl data)
{
    static const uint16_t type_tab[] = { DNS_A, DNS_AAAA, DNS_SRV };
    sl name = line_take(&data);
    if (name.len < 2 || name.len > 300 || data.len > 20000)
        return;
    uint16_t type = name.p[0] == 'S' ? DNS_SRV : name.p[0] == '6'
        ? DNS_AAAA : DNS_A;
    name = sl_skip(name, 2);
    uint16_t id = data.len > 1 ? be16(data.p) : 0;
    dns_check(data, id, name, type);
    for (int i = 0; i < 3; i++)
        dns_check((sl){ data.p, data.len ? dice() % data.len : 0 }, id,
            name, type);
    /* asked for what the packet says that was asked */
    uint8_t asked[LIM_HOST_LEN], asked_len, wire[300], *p = exact(data);
    size_t pos = 12;
    sl whole = { p, data.len };
    if (dns_parse_name(whole, &pos, asked, &asked_len)) {
        want(pos <= data.len && asked_len > 0);
        for (size_t i = 0; i < 3; i++)
            dns_check(data, id, (sl){ asked, asked_len }, type_tab[i]);
    }
    free(p);
    struct bb b = BB(wire);
    if (dns_build(&b, id, name, type)) {
        p = exact((sl){ wire, b.len });
        pos = 12;
        if (dns_parse_name((sl){ p, b.len }, &pos, asked, &asked_len)) {
            if (sl_ends(name, SL(".")))
                name.len--;
            want(pos == b.len - 4
                && sl_ieq((sl){ asked, asked_len }, name));
        }
        free(p);
    }
}

/* ---- resp: one element, and replies through rds_take ---- */

static void resp_item(const struct rsp *e, const unsigned *path,
    unsigned depth, int64_t now)
{
    (void)now;
    trace_int("item ", e->type);
    for (unsigned i = 0; i < depth; i++)
        trace_int(".", path[i]);
    trace_int("n ", e->n);
    bb_put(&trace, e->text.p ? e->text : SL("(none)"));
}

static void resp_done(uint16_t idx, const struct rsp *e, int64_t now)
{
    (void)now;
    trace_int("done ", idx);
    trace_int("type ", e->type);
    trace_int("n ", e->n);
}

static void resp_run(sl data, size_t step)
{
    static const struct rds_op op = { "FUZZ", 1, 0, 5000, resp_item,
        resp_done };
    struct rds *r = &rds_pool[RDS_MAIN];
    memset(r, 0, sizeof *r);
    r->state = RD_UP;
    for (size_t i = 0; i < LIM_REDIS_OPS; i++)
        r->pending[i].op = &op;
    r->cnt = LIM_REDIS_OPS < 20 ? LIM_REDIS_OPS : 20;
    for (size_t at = 0; at < data.len && !r->fault; ) {
        size_t n = step_of(step);
        n = n < LIM_REDIS_IN - r->in_len ? n : LIM_REDIS_IN - r->in_len;
        n = n < data.len - at ? n : data.len - at;
        want(n > 0);                 /* the buffer never stays full */
        memcpy(rds_in[RDS_MAIN] + r->in_len, data.p + at, n);
        r->in_len += n;
        at += n;
        rds_take(r, 1000);
        want(!r->is_stuck && r->depth <= LIM_REDIS_DEPTH);
    }
    bb_str(&trace, r->fault ? r->fault : " waits");
    if (!r->fault) {
        trace_int("depth ", r->depth);
        trace_int("replies ", (int64_t)r->cnt);
        trace_int("long ", (int64_t)(r->bulk_len - r->bulk_got));
    }
    big_free(&r->big);
    memset(r, 0, sizeof *r);
}

static void fuzz_resp(sl data)
{
    struct rsp whole, e;
    static const size_t cap_tab[] = { 0, 10, LIM_REDIS_BULK };
    for (size_t c = 0; c < COUNT_OF(cap_tab); c++) {
        uint8_t *p = exact(data);
        int n = rsp_parse((sl){ p, data.len }, cap_tab[c], &whole);
        want(n <= (int)data.len && (n >= 0 || n == -EV_REDIS_PROTO));
        want(n <= 0 || in(whole.text, (sl){ p, data.len }));
        want(n <= 0 || memcmp(p + n - 2, "\r\n", 2) == 0);
        /* fewer bytes: not yet, or the same */
        for (int i = 0; i < 4; i++) {
            size_t cut = data.len ? dice() % data.len : 0;
            uint8_t *q = exact((sl){ data.p, cut });
            int m = rsp_parse((sl){ q, cut }, cap_tab[c], &e);
            want(m == 0 || m == n);
            want(m <= 0 || (e.type == whole.type && e.n == whole.n
                && sl_eq(e.text, whole.text)));
            want(n <= 0 || cut < (size_t)n || m == n);
            free(q);
        }
        free(p);
    }
    each_split(data, resp_run);
    /* a word of a command is a bulk string */
    static uint8_t text[70000];
    struct bb b = BB(text);
    if (data.len > LIM_REDIS_BULK)
        return;
    rsp_put(&b, data);
    uint8_t *p = exact((sl){ text, b.len });
    want(rsp_parse((sl){ p, b.len }, LIM_REDIS_BULK, &e) == (int)b.len
        && e.type == RSP_BULK && sl_eq(e.text, data));
    free(p);
}

/* ---- der: certificates, PEM, anchors ---- */

static void cert_check(sl der)
{
    static uint8_t packed[70000], text[60000], work[40000];
    static const char *const host_tab[] = { "a.org", "x.a.org", "10.0.0.1",
        "[::1]", "a.org.", "-", "x.y.example.com" };
    bool ok[2];
    for (int anchor = 0; anchor < 2; anchor++) {
        struct cert c;
        uint8_t *p = exact(der);
        sl whole = { p, der.len };
        ok[anchor] = cert_parse(whole, anchor, &c);
        if (ok[anchor]) {
            want(in(c.issuer, whole) && in(c.subject, whole)
                && in(c.spki, whole) && in(c.san, whole)
                && in(c.constraints, whole) && in(c.tbs, whole)
                && in(c.key.n, whole) && in(c.key.e, whole)
                && in(c.key.q, whole));
            for (int k = 0; k < 2; k++)
                want(!c.critical[k] || in((sl){ c.critical[k], 1 }, whole));
            want(c.key.kind != KEY_RSA || (c.key.n.len >= 256
                && c.key.n.len <= 512 && c.key.n.p[0]));
            for (size_t i = 0; i < COUNT_OF(host_tab); i++) {
                struct name n;
                if (!host_parse(sl_str(host_tab[i]), false, &n))
                    continue;
                bool named = cert_names_peer(&c, &n);
                bool keeps = cert_keeps_to(&c, c.constraints, &n);
                want(keeps || c.constraints.len);
                want(!named || c.san.len);
            }
            struct bb b = BB(packed);
            if (anchor_put(&b, &c)) {
                struct anchor a;
                uint8_t *q = exact((sl){ packed, b.len });
                sl rest = { q, b.len };
                want(anchor_has(rest, rest));
                want(anchor_take(&rest, &a) && rest.len == 0
                    && a.key.kind == c.key.kind && sl_eq(a.name, c.subject)
                    && sl_eq(a.key.n, c.key.n) && sl_eq(a.key.q, c.key.q)
                    && sl_eq(a.constraints, c.constraints));
                free(q);
            } else {
                want(b.len == 0 && !b.over);
            }
            /* no beginning of a certificate is one */
            for (size_t i = 1; i <= 6; i++) {
                size_t cut = i < 6 ? der.len - i : dice() % der.len;
                struct cert d;
                uint8_t *q = exact((sl){ p, cut });
                want(!cert_parse((sl){ q, cut }, anchor, &d));
                free(q);
            }
        }
        free(p);
    }
    want(!ok[0] || ok[1]);           /* an anchor may be worse, not better */
    if (der.len == 0 || der.len > 20000)
        return;
    struct bb b = BB(text);
    bb_str(&b, "-----BEGIN CERTIFICATE-----\r\n");
    for (size_t i = 0; i < der.len; i += 48) {
        size_t n = der.len - i < 48 ? der.len - i : 48;
        b64_put(&b, b64_std, (sl){ der.p + i, n });
        bb_str(&b, n % 3 == 1 ? "==" : n % 3 == 2 ? "=" : "");
        bb_byte(&b, '\n');
    }
    bb_str(&b, "-----END CERTIFICATE-----");
    uint8_t *p = exact((sl){ text, b.len });
    sl rest = { p, b.len }, back;
    want(pem_parse(&rest, work, sizeof work, &back) == 1
        && sl_eq(back, der) && pem_parse(&rest, work, sizeof work, &back)
        == 0);
    free(p);
}

static void fuzz_der(sl data)
{
    if (data.len > 30000)
        return;
    if (!memmem(data.p, data.len, "-----", 5)) {
        cert_check(data);
        return;
    }
    size_t cap = 1 + dice() % 4000;
    uint8_t *p = exact(data), *work = malloc(cap);
    sl rest = { p, data.len }, der;
    int got;
    while ((got = pem_parse(&rest, work, cap, &der)) == 1) {
        want(in(der, (sl){ work, cap }) && in(rest, (sl){ p, data.len }));
        cert_check(der);
    }
    want(got == 0 || got == -1);
    free(p);
    free(work);
}

/* ---- chain: what a TLS server shows, the last is our anchor ---- */

static enum event chain_judge(const sl *der, size_t cnt, size_t step)
{
    struct hs *h = &hs_pool[0];
    const br_x509_class **ctx = &h->vtable;
    memset(h, 0, sizeof *h);
    memset(sig_cache, 0, sizeof sig_cache);
    h->vtable = &hs_class;
    want(host_parse(SL("a.org"), true, &h->peer));
    hs_class.start_chain(ctx, NULL);
    for (size_t i = 0; i < cnt; i++) {
        hs_class.start_cert(ctx, (uint32_t)der[i].len);
        for (size_t at = 0; at < der[i].len; ) {
            size_t n = step_of(step);
            n = n < der[i].len - at ? n : der[i].len - at;
            uint8_t *p = exact((sl){ der[i].p + at, n });
            hs_class.append(ctx, p, n);
            free(p);
            at += n;
        }
        hs_class.end_cert(ctx);
    }
    bool ok = hs_class.end_chain(ctx) == 0;
    enum event why = h->why;
    want(ok == (why == EV_NONE) && why < EV_CNT && h->sig_cnt <= 5);
    struct cert c;
    if (ok)                          /* S21 */
        want(cert_parse(der[0], false, &c) && cert_names_peer(&c, &h->peer)
            && c.is_server);
    memset(h, 0, sizeof *h);
    return why;
}

static void fuzz_chain(sl data)
{
    sl der[LIM_CHAIN_CNT + 2], body, whole;
    size_t cnt = 0;
    while (cnt < COUNT_OF(der) && data.len) {
        if (!der_take(&data, 0x30, &body, &whole)) {
            der[cnt++] = data;
            break;
        }
        der[cnt++] = whole;
    }
    if (cnt < 2)
        return;
    struct anchors *set = &anchor_set[anchor_now];
    struct cert c;
    struct bb b = { set->data, 0, sizeof set->data, false };
    set->len = set->cnt = set->skipped = 0;
    if (cert_parse(der[--cnt], true, &c) && anchor_put(&b, &c)) {
        set->len = b.len;
        set->cnt = 1;
    }
    enum event why = chain_judge(der, cnt, SIZE_MAX);
    want(chain_judge(der, cnt, 0) == why);
    log_len = (size_t)snprintf(log_buf, sizeof log_buf, "%s\n",
        why ? event_tab[why].label : "trusted");
    if (why == EV_NONE) {            /* no anchor, no trust */
        set->len = set->cnt = 0;
        want(chain_judge(der, cnt, SIZE_MAX) != EV_NONE);
    }
}

/* ---- text: names, URLs, small files, times ---- */

static void text_names(sl s)
{
    struct name n;
    struct url u;
    struct ip a, b;
    struct cidr net;
    struct addr at;
    uint8_t text[400];
    const char *range;
    struct bb o = BB(text);
    for (int underscore = 0; underscore < 2; underscore++)
        if (host_parse(s, underscore, &n)) {
            want(sl_eq(n.whole, s) && n.host.len > 0
                && n.host.len <= LIM_HOST_LEN && in(n.host, s));
            want(n.port ? n.host.len < s.len : n.host.len == s.len);
            for (size_t i = 0; i < s.len; i++)
                want(s.p[i] > 0x20 && s.p[i] < 0x7f);
        }
    if (url_parse(s, &u)) {
        want(in(u.scheme, s) && in(u.path, s) && in(u.rest, s)
            && u.path.len <= u.rest.len && in(u.name.host, s));
        want(!u.path.len || u.path.p[0] == '/');
    }
    if (ip_parse(s, &a)) {
        bb_ip(&o, &a, 0);
        sl back = { text, o.len };
        if (a.v6)
            back = (sl){ text + 1, o.len - 2 };
        want(ip_parse(back, &b) && b.v6 == a.v6
            && memcmp(a.b, b.b, a.v6 ? 16 : 4) == 0);
        struct ip once = ip_unwrap(a);
        want(ip_range(a, &range) == ip_range(once, &range));
    }
    if (cidr_parse(s, &net))
        want(ip_in(&net.ip, &net));
    want(!addr_parse(s, 443, &at) || at.port);
    want(!user_check(s, SL("a.org")) || (sl_ends(s, SL(":a.org"))
        && s.p[0] == '@' && utf8_check(s)));
    if (delay_id_check(s)) {
        struct bb p = BB(text);
        bb_percent(&p, s);
        want(sl_eq((sl){ text, p.len }, s));
    }
    want(!request_id_check(s) || s.len <= LIM_REQUEST_ID_LEN);
    want(!hash_name_check(s) || s.len == HASH_NAME_LEN);
}

static void text_codings(sl s)
{
    static uint8_t text[70000], back[70000];
    for (int padded = 0; padded < 2; padded++) {
        uint8_t *p = malloc(s.len / 4 * 3 + 3);
        want(p);
        int n = b64_parse(s, padded, p);
        if (n >= 0) {
            struct bb b = BB(text);
            b64_put(&b, padded ? b64_std : b64_url, (sl){ p, (size_t)n });
            for (; padded && b.len % 4; )
                bb_byte(&b, '=');
            want(sl_eq((sl){ text, b.len }, s));
        }
        free(p);
    }
    struct bb b = BB(text), o = BB(back);
    bb_percent(&b, s);
    want(percent_parse(&o, (sl){ text, b.len })
        && sl_eq((sl){ back, o.len }, s));
    for (size_t i = 0; i < b.len; i++)
        want(is_unreserved(text[i]) || text[i] == '%');
    o = BB(back);
    if (percent_parse(&o, s))
        want(o.len <= s.len);
    for (int json = 0; json < 2; json++) {
        b = BB(text);
        log_put(&b, "k", s, json);
        want(!b.over);
        for (size_t i = 0; i < b.len; i++)
            want(text[i] >= 0x20 && text[i] != 0x7f);
        want(utf8_check((sl){ text, b.len }) && b.len < 2000);
    }
}

static void text_times(sl s)
{
    int64_t at, back, ms;
    uint32_t ns, back_ns;
    uint8_t text[100];
    struct bb b = BB(text);
    if (http_date_parse(s, &at) && at >= 0 && at < 253402300800) {
        bb_http_date(&b, at);
        want(http_date_parse((sl){ text, b.len }, &back) && back == at);
    }
    ms = retry_after_ms(s, jwt_now);
    want(ms >= -1 && ms <= 86400000);
    want(cache_seconds(s, (sl){ NULL, 0 }, jwt_now, 77) >= 0);
    (void)cache_seconds((sl){ NULL, 0 }, s, jwt_now, 77);
    b = BB(text);
    if (rfc3339_parse(s, &at, &ns)) {
        want(ns < 1000000000);
        if (at >= 0 && at < 253402300800) {
            bb_rfc3339(&b, at * 1000 + ns / 1000000);
            want(rfc3339_parse((sl){ text, b.len }, &back, &back_ns)
                && back == at && back_ns == ns / 1000000 * 1000000);
        }
    }
    if (cf_duration(s, &ms))
        want(ms >= 0 && ms <= 3600000);
}

static void text_registration(sl s)
{
    struct registration r;
    unsigned line = cf_registration(s, &r);
    const sl part[] = { r.id, r.as_token, r.hs_token };
    for (size_t i = 0; i < 3; i++)
        want(!part[i].p || (part[i].len && in(part[i], s)
            && sl_find(part[i], '\n') == part[i].len));
    /* what follows a refused line is not read: neither is it needed */
    want(line <= s.len + 1);
}

static void text_files(sl s)
{
    text_registration(s);
    struct resolv r;
    struct ip out[4];
    cf_resolv_parse(s, &r);
    want(r.server_cnt >= 1 && r.server_cnt <= LIM_SERVER_CNT
        && r.search_cnt <= LIM_SEARCH_CNT && r.ndots <= 15
        && r.attempts >= 1 && r.attempts <= 5 && r.timeout_ms >= 1000
        && r.timeout_ms <= 30000);
    for (size_t cap = 1; cap <= 4; cap++)
        for (int v6 = 0; v6 < 2; v6++) {
            size_t n = cf_hosts_find(s, SL("a.org"), v6, out, cap);
            want(n <= cap);
            for (size_t i = 0; i < n; i++)
                want(out[i].v6 == v6);
            want(n == 0 || cf_hosts_has(s, SL("a.org")));
        }
    for (sl rest = s; rest.len; ) {
        sl line = line_take(&rest), key, secret;
        if (cf_key_line(line, &key, &secret) == 1)
            want(key.len && secret.len && in(key, line)
                && in(secret, line));
    }
    uint8_t *mem = malloc(s.len + 1);    /* it never needs more */
    want(mem);
    struct bb text = { mem, 0, s.len, false };
    struct redis_url u;
    if (!cf_redis_url(s, &text, &u)) {
        sl decoded = { mem, text.len };
        want(u.port && (u.is_unix ? u.path.len > 1 : u.host.len > 0));
        want(in(u.user, decoded) && in(u.sec_password, decoded)
            && in(u.client_name, decoded) && in(u.path, s));
        want(u.dial_ms > 0 && u.read_ms > 0 && u.write_ms > 0);
    }
    free(mem);
}

static void fuzz_text(sl data)
{
    uint8_t *p = exact(data);
    sl s = { p, data.len };
    if (data.len <= 10000) {
        text_names(s);
        text_codings(s);
        text_times(s);
        text_files(s);
    }
    free(p);
}

/* ---- record: field in a line, then the value ---- */

/* When it was delegated, in ms. */
static int64_t record_begin(const struct record *r)
{
    return r->delegated_ms ? r->delegated_ms
        : r->restarted_s * 1000 + r->restarted_ns / 1000000;
}

static void fuzz_record(sl data)
{
    static uint8_t text[2][70000];
    sl field = line_take(&data);
    struct record r, again;
    uint8_t *f = exact(field), *v = exact(data);
    const char *why = rec_parse(f, field.len, v, data.len, &r);
    if (!why) {
        sl ff = { f, field.len }, vv = { v, data.len };
        want(in(r.alias, ff) && in(r.identity, ff) && in(r.delay_id, vv)
            && in(r.server, vv) && in(r.identity2, vv) && in(r.sid, vv)
            && in(r.owner, vv));
        want(r.timeout_ms == 0 || (r.timeout_ms >= LIM_DELAY_MIN_MS
            && r.timeout_ms <= LIM_DELAY_MAX_MS));
        struct bb a = BB(text[0]), b = BB(text[1]);
        rec_put_field(&a, r.alias, r.identity);
        rec_put(&b, &r);
        want(!a.over && !b.over);
        uint8_t *f2 = exact((sl){ text[0], a.len });
        uint8_t *v2 = exact((sl){ text[1], b.len });
        /* what bb_date can write, years 0000 to 9999 */
        bool in_years = r.restarted_s >= -62167219200
            && r.restarted_s < 253402300800
            && r.delegated_ms >= -62167219200000
            && r.delegated_ms < 253402300800000;
        why = rec_parse(f2, a.len, v2, b.len, &again);
        want(!in_years || !why);
        if (in_years)
            want(sl_eq(r.delay_id, again.delay_id)
                && sl_eq(r.server, again.server)
                && sl_eq(r.alias, again.alias)
                && sl_eq(r.identity, again.identity)
                && sl_eq(r.identity2, again.identity2)
                && sl_eq(r.sid, again.sid)
                && sl_eq(r.owner, again.owner)
                && r.is_connected == again.is_connected
                && r.timeout_ms == again.timeout_ms
                && r.restarted_s == again.restarted_s
                && r.restarted_ns == again.restarted_ns
                && record_begin(&r) == record_begin(&again));
        free(f2);
        free(v2);
    }
    free(f);
    free(v);
}

/* ---- protobuf ---- */

static void varint_put(struct bb *b, uint64_t v)
{
    for (; v > 127; v >>= 7)
        bb_byte(b, (uint8_t)(v | 128));
    bb_byte(b, (uint8_t)v);
}

static void fuzz_protobuf(sl data)
{
    static uint8_t text[140000];
    struct participant p, again;
    uint64_t v, w;
    uint8_t *mem = exact(data);
    sl whole = { mem, data.len }, rest = whole;
    if (pb_varint(&rest, &v)) {
        struct bb b = BB(text);
        varint_put(&b, v);
        sl made = { text, b.len };
        want(pb_varint(&made, &w) && w == v && made.len == 0);
    }
    want(in(rest, whole));
    if (pb_participant_parse(whole, &p)) {
        want(in(p.sid, whole) && in(p.identity, whole));
        struct bb b = BB(text);
        if (p.sid.len)
            pb_put(&b, 0x0a, p.sid);
        if (p.identity.len)
            pb_put(&b, 0x12, p.identity);
        bb_byte(&b, 0x18);
        varint_put(&b, p.state);
        uint8_t *q = exact((sl){ text, b.len });
        want(pb_participant_parse((sl){ q, b.len }, &again)
            && sl_eq(p.sid, again.sid) && sl_eq(p.identity, again.identity)
            && p.state == again.state);
        free(q);
    }
    free(mem);
    struct bb b = BB(text);
    sl half = { data.p, data.len / 2 }, other = sl_skip(data, data.len / 2);
    if (data.len > 60000)
        return;
    pb_participant(&b, half, other);
    want(pb_participant_parse((sl){ text, b.len }, &again)
        && sl_eq(again.sid, half) && sl_eq(again.identity, other));
}

#include "fuzz/session.h"

/* ---- targets ---- */

static const struct fuzz_target {
    const char *name;
    void (*run)(sl data);
} target_tab[] = {
    { "request", fuzz_request }, { "reply", fuzz_reply },
    { "chunk", fuzz_chunk }, { "json", fuzz_json }, { "jwt", fuzz_jwt },
    { "dns", fuzz_dns }, { "resp", fuzz_resp }, { "der", fuzz_der },
    { "chain", fuzz_chain },
    { "text", fuzz_text }, { "record", fuzz_record },
    { "protobuf", fuzz_protobuf }, { "session", fuzz_session },
};

static const struct fuzz_target *target_find(const char *name)
{
    for (size_t i = 0; i < COUNT_OF(target_tab); i++)
        if (name && strcmp(target_tab[i].name, name) == 0)
            return &target_tab[i];
    fprintf(stderr, "no target %s; there are:", name ? name : "given");
    for (size_t i = 0; i < COUNT_OF(target_tab); i++)
        fprintf(stderr, " %s", target_tab[i].name);
    fprintf(stderr, "\n");
    exit(2);
}

static void target_run(const struct fuzz_target *t, sl data)
{
    if (data.len > LIM_HUGE_LEN)
        return;
    dice_seed(data);
    log_clear();
    t->run(data);
    want(failed == 0);               /* closed twice */
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    static const struct fuzz_target *t;
    if (!t)
        t = target_find(getenv("FUZZ_TARGET"));
    target_run(t, (sl){ data, len });
    return 0;
}

#ifdef FUZZ_REPLAY

static const struct fuzz_target *replay_target;
static const char *replay_folder;        /* unpack there, else run */
static unsigned *replay_done;            /* shared: seeds begun */
static unsigned replay_from, replay_at;

static void replay_one(sl data)
{
    if (replay_at++ < replay_from)
        return;
    *replay_done = replay_at;
    if (!replay_folder) {
        target_run(replay_target, data);
        return;
    }
    char path[600];
    snprintf(path, sizeof path, "%s/seed-%03u", replay_folder, replay_at);
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data.p, 1, data.len, f) != data.len || fclose(f)) {
        perror(path);
        exit(2);
    }
}

/* Columns of vector files that are seeds too. */
static const struct { const char *target, *file; size_t column; }
    vector_tab[] = {
    { "request", "requests.txt", 1 }, { "reply", "replies.txt", 1 },
    { "chunk", "chunked.txt", 1 }, { "json", "json.txt", 2 },
    { "text", "urls.txt", 1 }, { "text", "names.txt", 1 },
    { "text", "ids.txt", 2 }, { "text", "addresses.txt", 1 },
    { "text", "resolv.txt", 0 }, { "text", "logs.txt", 1 },
};
static size_t vector_column;

static void replay_column(struct vec *v)
{
    replay_one(vec_sl(v, vector_column));
}

/* All seeds of the target. Lines of its file are not split into fields. */
static void replay_seeds(void)
{
    static char text[1 << 20], line[VEC_LEN + 1];
    char path[100];
    size_t len;
    replay_at = 0;
    for (size_t i = 0; i < COUNT_OF(vector_tab); i++)
        if (strcmp(vector_tab[i].target, replay_target->name) == 0) {
            vector_column = vector_tab[i].column;
            vec_each(vector_tab[i].file, replay_column);
        }
    snprintf(path, sizeof path, "test/fuzz/%s.txt", replay_target->name);
    file_read(path, text, sizeof text, &len);
    want(failed == 0);
    for (sl rest = { (uint8_t *)text, len }; rest.len; ) {
        sl from = line_take(&rest);
        if (from.len == 0 || from.p[0] == '#')
            continue;
        size_t n = vec_unescape(line, (const char *)from.p, from.len);
        replay_one((sl){ (uint8_t *)line, n });
    }
}

/* A child runs them; where it dies is one that failed, another goes on. */
static void replay_run(const struct fuzz_target *t)
{
    unsigned ok = 0, bad = 0;
    replay_target = t;
    replay_from = *replay_done = 0;
    for (;;) {
        fflush(NULL);
        pid_t pid = fork();
        if (pid == 0) {
            failed = 0;
            replay_seeds();
            exit(0);
        }
        int status = 0;
        if (pid < 0 || waitpid(pid, &status, 0) != pid) {
            perror("fork");
            exit(2);
        }
        ok += *replay_done - replay_from;
        if (status == 0)
            break;
        ok -= ok > 0;
        bad++;
        printf("FAIL %s: seed %u\n", t->name, *replay_done);
        if (*replay_done == replay_from)   /* not even one */
            break;
        replay_from = *replay_done;
    }
    if (ok + bad == 0)
        bad++;
    printf("%-10s %5u seeds, %u failed\n", t->name, ok + bad, bad);
    passed += ok;
    failed += bad;
}

/* The bytes of a file as a line that vec_unescape reads. */
static void pack(const char *path)
{
    static char text[1 << 20];
    size_t len;
    file_read(path, text, sizeof text, &len);
    for (size_t i = 0; i < len; i++) {
        unsigned char c = (unsigned char)text[i];
        if (c == '\r' || c == '\n' || c == '\t')
            printf("\\%c", c == '\r' ? 'r' : c == '\n' ? 'n' : 't');
        else if (c == '\\')
            printf("\\\\");
        else if (c < 0x20 || c > 0x7e || (i == 0 && c == '#'))
            printf("\\x%02x", c);
        else
            putchar(c);
    }
    if (len)
        putchar('\n');
}

int main(int argc, char **argv)
{
    replay_done = mmap(NULL, sizeof *replay_done, PROT_READ | PROT_WRITE,
        MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (replay_done == MAP_FAILED)
        abort();
    if (argc > 1 && strcmp(argv[1], "pack") == 0) {
        for (int i = 2; i < argc; i++)
            pack(argv[i]);
        return 0;
    }
    if (argc == 4 && strcmp(argv[1], "unpack") == 0) {
        replay_target = target_find(argv[2]);
        replay_folder = argv[3];
        replay_seeds();
        return 0;
    }
    if (argc > 2) {
        for (int i = 2; i < argc; i++) {
            static char text[1 << 20];
            size_t len;
            file_read(argv[i], text, sizeof text, &len);
            uint8_t *p = exact((sl){ (uint8_t *)text, len });
            target_run(target_find(argv[1]), (sl){ p, len });
            free(p);
            printf("%s", log_buf);
        }
        return 0;
    }
    for (size_t i = 0; i < COUNT_OF(target_tab); i++)
        if (argc < 2 || strcmp(argv[1], target_tab[i].name) == 0)
            replay_run(&target_tab[i]);
    printf("%u passed, %u failed\n", passed, failed);
    return failed != 0;
}

#endif
