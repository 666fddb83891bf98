/* Section 24: the environment, variable by variable. */

/* Start over with an environment of NAME=value, `;` between. */
static bool cfg_try(const char *env)
{
    char copy[4096];
    clearenv();
    snprintf(copy, sizeof copy, "%s", env);
    for (char *p = strtok(copy, ";"); p; p = strtok(NULL, ";")) {
        char *eq = strchr(p, '=');
        *eq = 0;
        setenv(p, eq + 1, 1);
    }
    memset(&cfg, 0, sizeof cfg);
    memset(log_quota_tab, 0, sizeof log_quota_tab);
    cfg_text_len = 0;
    cfg_fault_cnt = 0;
    log_clear();
    return cfg_load();
}

#define ENV_MIN "LIVEKIT_URL=wss://sfu.example.org;LIVEKIT_KEY=k;" \
    "LIVEKIT_SECRET=0123456789abcdef0123456789abcdef;" \
    "LIVEKIT_FULL_ACCESS_HOMESERVERS=a.org;"

/* ok, warn or bad | environment beside the minimum | log line part; an
 * entry NAME- takes a variable of the minimum away */
static void env_row(struct vec *v)
{
    char env[4096] = "", copy[1024];
    static const char *const min[] = {
        "LIVEKIT_URL=wss://sfu.example.org", "LIVEKIT_KEY=k",
        "LIVEKIT_SECRET=0123456789abcdef0123456789abcdef",
        "LIVEKIT_FULL_ACCESS_HOMESERVERS=a.org" };
    const char *add = vec_str(v, 1), *want = vec_str(v, 0);
    for (size_t i = 0; i < COUNT_OF(min); i++) {
        size_t n = strcspn(min[i], "=");
        snprintf(copy, sizeof copy, ";%s", add);
        char minus[64], equal[64];
        snprintf(minus, sizeof minus, ";%.*s-", (int)n, min[i]);
        snprintf(equal, sizeof equal, ";%.*s=", (int)n, min[i]);
        if (strstr(copy, minus) || strstr(copy, equal))
            continue;
        strcat(env, min[i]);
        strcat(env, ";");
    }
    snprintf(copy, sizeof copy, "%s", add);
    for (char *p = strtok(copy, ";"); p; p = strtok(NULL, ";"))
        if (strchr(p, '=')) {
            strcat(env, p);
            strcat(env, ";");
        }
    bool ok = cfg_try(env);
    bool warned = log_has("event=CONFIG_WARN") || log_has("level=warning");
    row(vec_name(v, add), ok == (strcmp(want, "bad") != 0)
        && (strcmp(want, "ok") != 0 || (!warned && log_len == 0))
        && (strcmp(want, "warn") != 0 || warned)
        && (v->cnt < 3 || log_has(vec_str(v, 2)))
        && !log_has("0123456789abcdef0123456789abcdef"), "%s: %s",
        ok ? "taken" : "refused", log_buf);
}

static void bind_rows(void)
{
    static const struct { const char *in; bool ok; const char *want; }
    tab[] = {
        { ":8080", true, "[::]:8080 any dual" },
        { "8080", true, "[::]:8080 any dual" },
        { ":0", true, "[::]" " any dual" },
        { ":65535", true, "[::]:65535 any dual" },
        { "0.0.0.0:8080", true, "0.0.0.0:8080 any" },
        { "[::]:8080", true, "[::]:8080 any dual" },
        { "127.0.0.1:1", true, "127.0.0.1:1" },
        { "[::1]:1", true, "[::1]:1" },
        { "localhost:80", true, "127.0.0.1:80" },
        { "LOCALHOST:80", true, "127.0.0.1:80" },
        { "inhosts:80", true, "10.9.8.7:80" },
        { "unix:/run/x.sock", true, "unix /run/x.sock" },
        { "/run/x.sock", true, "unix /run/x.sock" },
        { "unix:run/x", false, "" }, { "unix:", false, "" },
        { "", false, "" }, { ":", false, "" }, { "127.0.0.1", false, "" },
        { "127.0.0.1:", false, "" }, { ":65536", false, "" },
        { ":-1", false, "" }, { ":x", false, "" }, { ":80x", false, "" },
        { "::1:80", false, "" }, { "[::1]", false, "" },
        { "[::1:80", false, "" }, { "[127.0.0.1]:80", false, "" },
        { "no.such.host:80", false, "" }, { "a b:80", false, "" },
        { " :80", false, "" }, { "[]:80", false, "" }, { "]:80", false, "" },
        { "[:80", false, "" }, { "http://a:80", false, "" },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        struct bind bind;
        struct bb b = work_bb();
        bool ok = cfg_bind(sl_str(tab[i].in), &bind);
        if (ok && bind.is_unix) {
            bb_str(&b, "unix ");
            bb_put(&b, bind.path);
        } else if (ok) {
            bb_ip(&b, &bind.addr.ip, bind.addr.port);
            bb_str(&b, bind.is_any ? " any" : "");
            bb_str(&b, bind.is_dual ? " dual" : "");
        }
        row(name_of("bind `%s`", tab[i].in), ok == tab[i].ok && (!ok
            || sl_eq(work_done(&b), sl_str(tab[i].want))), "%d %.*s", ok,
            (int)b.len, work_buf);
    }
}

static void override_rows(void)
{
    static const struct { const char *in; int cnt;
        const char *name, *host; int port; bool is_tls;
        const char *path; } tab[] = {
        { "a.org=https://b.org", 1, "a.org", "b.org", 443, true, "" },
        { "a.org=http://b.org", 1, "a.org", "b.org", 80, false, "" },
        { "a.org=b.org", 1, "a.org", "b.org", 443, true, "" },
        { "a.org=b.org:8448/x/", 1, "a.org", "b.org", 8448, true, "/x" },
        { "a.org:8448=http://[::1]:8008//", 1, "a.org:8448", "[::1]", 8008,
          false, "" },
        { " a.org = http://my_host , ,", 1, "a.org", "my_host", 80, false,
          "" },
        { ",,a.org=http://b.org/p=q", 1, "a.org", "b.org", 80, false,
          "/p=q" },
        { "a.org=http://b,c.org=http://d", 2, "a.org", "b", 80, false, "" },
        { "", 0, "", "", 0, false, "" }, { ",", 0, "", "", 0, false, "" },
        { "a.org", -1, "", "", 0, false, "" },
        { "a.org=", -1, "", "", 0, false, "" },
        { "=http://b", -1, "", "", 0, false, "" },
        { "a b=http://b", -1, "", "", 0, false, "" },
        { "a.org=ws://b", -1, "", "", 0, false, "" },
        { "a.org=WSS://b", -1, "", "", 0, false, "" },
        { "a.org=ftp://b", -1, "", "", 0, false, "" },
        { "a.org=http://u@b", -1, "", "", 0, false, "" },
        { "a.org=http://b c", -1, "", "", 0, false, "" },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        char env[400];
        snprintf(env, sizeof env, ENV_MIN
            "LKJWT_FEDERATION_API_URL_OVERRIDES=%s", tab[i].in);
        bool ok = cfg_try(env);
        const struct override *o = &cfg.fed[0];
        row(name_of("overrides `%s`", tab[i].in), ok == (tab[i].cnt >= 0)
            && (!ok || (cfg.fed_cnt == (size_t)tab[i].cnt && (!tab[i].cnt
                || (sl_eq(o->name, sl_str(tab[i].name))
                    && sl_eq(o->base.url.name.host, sl_str(tab[i].host))
                    && o->base.port == tab[i].port
                    && o->base.is_tls == tab[i].is_tls
                    && sl_eq(o->base.url.path, sl_str(tab[i].path)))))),
            "%d, %zu entries, host %.*s port %d", ok, cfg.fed_cnt,
            (int)o->base.url.name.host.len, o->base.url.name.host.p,
            o->base.port);
    }
}

static void file_write(const char *path, const char *text)
{
    FILE *f = fopen(path, "wb");
    if (!f || fputs(text, f) < 0 || fclose(f) != 0)
        row(path, false, "cannot be written");
}

static void key_file_rows(void)
{
    static const struct { const char *name, *text; int cnt;
        const char *first; } tab[] = {
        { "one pair", "k1: 0123456789abcdef0123456789abcdef\n", 1, "k1" },
        { "two pairs, comment, CRLF", "# keys\r\n\r\n"
          "k1: 0123456789abcdef0123456789abcdef\r\n"
          "k2: 1123456789abcdef0123456789abcdef", 2, "k1" },
        { "empty", "", -1, "" }, { "comments only", "# a\n\n", -1, "" },
        { "no colon", "k1 secret\n", -1, "" },
        { "two colons", "k1: a:b\n", -1, "" },
        { "good, then bad", "k1: 0123456789abcdef0123456789abcdef\nx\n", -1,
          "" },
        { "17 pairs", "a:1\nb:1\nc:1\nd:1\ne:1\nf:1\ng:1\nh:1\ni:1\nj:1\n"
          "k:1\nl:1\nm:1\nn:1\no:1\np:1\nq:1\n", -1, "" },
        { "key is no UTF-8", "\xff: 0123456789abcdef0123456789abcdef\n", -1,
          "" },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        file_write("keys", tab[i].text);
        bool ok = cfg_try(ENV_MIN "LIVEKIT_KEY_FILE=keys");
        row(name_of("key file: %s", tab[i].name), ok == (tab[i].cnt > 0)
            && (!ok || (cfg.key_cnt == (size_t)tab[i].cnt
                        && sl_eq(cfg.key[0].name, sl_str(tab[i].first))))
            && !log_has("0123456789abcdef"), "%d, %zu keys: %s", ok,
            cfg.key_cnt, log_buf);
    }
    /* the file's secret is what signs */
    file_write("keys", "devkey: devsecret\nk2: other\n");
    bool ok = cfg_try(ENV_MIN "LIVEKIT_KEY_FILE=keys");
    struct bb b = work_bb();
    jwt_sign(&b, &cfg.key[0].sec_key, SL("{\"iss\":\"devkey\",\"exp\":"
        "1726761439,\"nbf\":1726760839,\"iat\":1726760839,\"video\":"
        "{\"roomCreate\":true}}"));
    row("key file: the first pair signs", ok && sl_ends(work_done(&b),
        SL(".Qj-A6fnU9LS4OV3I109xyNIFuDiht59hpriAU9MReIE")), "%.*s",
        (int)b.len, work_buf);
    row("key file: secrets are wiped", memmem(cfg_text, sizeof cfg_text,
        "devsecret", 9) == NULL, "still there");
    static const struct { const char *name, *env; bool ok; const char *key; }
    from[] = {
        { "both from files", "LIVEKIT_KEY-;LIVEKIT_KEY_FROM_FILE=key;"
          "LIVEKIT_SECRET_FROM_FILE=secret", true, "filekey" },
        { "files win", "LIVEKIT_KEY_FROM_FILE=key", true, "filekey" },
        { "mixed", "LIVEKIT_SECRET_FROM_FILE=secret", true, "k" },
        { "no such file", "LIVEKIT_KEY_FROM_FILE=none", false, "" },
        { "empty file", "LIVEKIT_KEY_FROM_FILE=empty", false, "" },
        { "a folder", "LIVEKIT_SECRET_FROM_FILE=.", false, "" },
    };
    file_write("key", " filekey\r\n");
    file_write("secret", "0123456789abcdef0123456789abcdef\n");
    file_write("empty", " \n");
    for (size_t i = 0; i < COUNT_OF(from); i++) {
        char env[600];
        snprintf(env, sizeof env, ENV_MIN "%s", strstr(from[i].env, "-;")
            ? strstr(from[i].env, "-;") + 2 : from[i].env);
        ok = cfg_try(env);
        row(name_of("key: %s", from[i].name), ok == from[i].ok && (!ok
            || sl_eq(cfg.key[0].name, sl_str(from[i].key))), "%d: %s", ok,
            log_buf);
    }
}

/* SIGHUP and start: which sets are kept. */
static void ca_rows(void)
{
    struct bb b = work_bb();
    static char pem[3][8192];
    for (int i = 0; i < 2; i++) {
        b = work_bb();
        pem_put(&b, cert_make((struct plan){ .is_ca = true,
            .subject = i ? "second" : "first" }));
        bb_byte(&b, 0);
        memcpy(pem[i], work_buf, b.len);
    }
    strcat(strcpy(pem[2], pem[0]), "-----BEGIN CERTIFICATE-----\nAQ");
    static const struct { const char *name; int file; int want; } tab[] = {
        /* want: anchors then, -1: a bad file keeps what there was */
        { "one", 0, 1 }, { "another", 1, 1 }, { "damaged", 2, -1 },
        { "empty", 3, -1 }, { "gone", 4, -1 }, { "the first again", 0, 1 },
    };
    unsigned cnt = 0;
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        bool ok = cfg_try(ENV_MIN "LKJWT_CA_ONLY=true;LKJWT_CA_FILE=ca.pem");
        unlink("ca.pem");
        if (tab[i].file < 4)
            file_write("ca.pem", tab[i].file < 3 ? pem[tab[i].file] : "");
        log_clear();
        bool served = ca_load();
        unsigned now = anchor_set[anchor_now].cnt;
        row(name_of("CA file: %s", tab[i].name), ok && served
            && now == (tab[i].want < 0 ? cnt : (unsigned)tab[i].want)
            && log_has(tab[i].want < 0 ? "event=ANCHORS_BAD"
                       : "event=ANCHORS "), "%u anchors: %s", now, log_buf);
        cnt = now;
    }
}

static void test_config(void)
{
    file_write("hosts", "10.9.8.7 inhosts\n");
    cfg.hosts_file = SL("hosts\0");
    world_ms += 5000;               /* files are looked at once a second */
    bind_rows();
    cfg.hosts_file = (sl){ NULL, 0 };
    vec_each("environment.txt", env_row);
    override_rows();
    key_file_rows();
    ca_rows();
    bool ok = cfg_try("LIVEKIT_URL=ftp://x;LIVEKIT_JWT_BIND=x;"
        "LKJWT_TOKEN_TTL_S=1;LKJWT_LOG_FORMAT=xml");
    static const char *const told[] = { "LIVEKIT_URL", "LIVEKIT_JWT_BIND",
        "LKJWT_TOKEN_TTL_S", "LKJWT_LOG_FORMAT", "LIVEKIT_KEY",
        "LIVEKIT_SECRET", "LIVEKIT_FULL_ACCESS_HOMESERVERS" };
    for (size_t i = 0; i < COUNT_OF(told); i++)
        row(name_of("all at once: %s", told[i]), !ok
            && log_has(name_of("var=%s ", told[i])), "%s", log_buf);
    ok = cfg_try(ENV_MIN "LKJWT_TOKEN_TTL_S=60;LKJWT_KEEPALIVE_S=7;"
        "LKJWT_MAX_CONNS=3;LKJWT_PATH_PREFIX=/a/b//");
    row("numbers in their units", ok && cfg.token_ttl_s == 60
        && cfg.keepalive_ms == 7000 && cfg.max_conns == 3
        && sl_eq(cfg.prefix, SL("/a/b")), "differ");
    ok = cfg_try(ENV_MIN);
    row("defaults", ok && cfg.token_ttl_s == 3600 && cfg.max_body == 65536
        && cfg.max_conns == 1024 && cfg.keepalive_ms == 650000
        && cfg.lookup_ms == 20000 && cfg.lookups_max == 192
        && cfg.lookups_per_server == 16 && cfg.drain_ms == 7000
        && cfg.lame_duck_ms == 0 && cfg.can_update && !cfg.private_deny
        && !cfg.restricted_publish && !cfg.insecure && cfg.log_level == 'i'
        && cfg.bind.addr.port == 8080 && cfg.bind.is_dual && cfg.api.is_tls
        && cfg.api.port == 443, "differ");
    clearenv();
}
