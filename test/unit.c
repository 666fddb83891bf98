/* Unit tests: includes lkjwt.c, so every static function is in reach. The
 * system calls of its section 23 are replaced by a scripted world with its
 * own clock (unit_world.h); inputs lie before a page nobody may read. A
 * test is a row of a table; vectors in test/vectors/ are readable text.
 *
 *   build/unit-gcc [-v] [GROUP...]     -v names every row; `long` stands
 *                                      for the groups that take long;
 *                                      -GROUP leaves one out
 */
#include "unit_world.h"
#include "unit_text.h"
#include "unit_json.h"
#include "unit_http.h"
#include "unit_dns.h"
#include "unit_jwt.h"
#include "unit_leave.h"
#include "unit_der.h"
#include "unit_config.h"
#include "unit_tls.h"
#include "unit_net.h"
#include "unit_machines.h"
#include "unit_jobs.h"
#include "unit_jail.h"
#include "unit_store.h"
#include "unit_rates.h"
#include "unit_faults.h"
#include "unit_appservice.h"
#include <ftw.h>

static const struct { const char *name; void (*run)(void); bool is_long; }
    group_tab[] = {
    { "bytes", test_bytes }, { "base64", test_base64 },
    { "utf8", test_utf8 }, { "names", test_names }, { "users", test_users },
    { "urls", test_urls }, { "addresses", test_addresses },
    { "percent", test_percent }, { "dates", test_dates },
    { "logs", test_logs }, { "formats", test_formats },
    { "metrics", test_metrics }, { "json", test_json },
    { "json-suite", test_json_suite }, { "json-write", test_json_write },
    { "http-head", test_http_head }, { "http-framing", test_http_framing },
    { "chunked", test_chunked }, { "intake", test_intake },
    { "routes", test_routes }, { "dns", test_dns },
    { "dns-damage", test_dns_damage }, { "jwt", test_jwt },
    { "protobuf", test_protobuf }, { "webhooks", test_webhooks },
    { "leave", test_leave }, { "der", test_der },
    { "certificates", test_certificates }, { "pem", test_pem },
    { "anchors", test_anchors }, { "config", test_config },
    { "judge", test_judge }, { "sessions", test_sessions },
    { "resolver", test_resolver }, { "upstream", test_upstream },
    { "discovery", test_discovery }, { "server", test_server },
    { "exchange", test_exchange }, { "jobs", test_jobs },
    { "resp", test_resp }, { "times", test_times },
    { "records", test_records }, { "redis-url", test_redis_url },
    { "redis", test_redis },
    { "jail", test_jail },
    { "loop", test_loop },
    { "faults", test_faults }, { "rates", test_rates },
    { "clock", test_clock },
    { "registration", test_registration },
    { "appservice", test_appservice },
    { "s29-compare", test_s29_secrets_are_compared_in_constant_time },
    { "s30-seeds", test_s30_every_tls_context_is_seeded },
    { "failing-calls", test_s25_no_failing_call_does_harm, true },
};

/* The files that tests write lie in a folder of this process: several of
 * these run at once, and a file that is being written is empty. */
static char work_dir[] = "build/unit-XXXXXX";

static void work_begin(void)
{
    top_fd = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (top_fd < 0 || !mkdtemp(work_dir) || chdir(work_dir) != 0) {
        perror(work_dir);
        exit(1);
    }
}

static int work_remove(const char *path, const struct stat *st, int kind,
    struct FTW *at)
{
    (void)st, (void)kind, (void)at;
    return remove(path);
}

static void work_end(void)
{
    if (fchdir(top_fd) != 0
        || nftw(work_dir, work_remove, 8, FTW_DEPTH | FTW_PHYS) != 0)
        row(work_dir, false, "cannot be removed");
}

int main(int argc, char **argv)
{
    guard_open();
    generated();
    work_begin();
    for (size_t i = 0; i < COUNT_OF(group_tab); i++) {
        bool wanted = !group_tab[i].is_long;
        for (int k = 1; k < argc; k++) {
            if (strcmp(argv[k], "-v") == 0)
                verbose = true;
            else if (argv[k][0] != '-')
                wanted = false;
        }
        for (int k = 1; k < argc; k++)
            wanted |= strcmp(argv[k], group_tab[i].name) == 0
                || (group_tab[i].is_long && strcmp(argv[k], "long") == 0);
        for (int k = 1; k < argc; k++)
            wanted &= argv[k][0] != '-'
                || strcmp(argv[k] + 1, group_tab[i].name) != 0;
        if (!wanted)
            continue;
        group = group_tab[i].name;
        unsigned before = passed + failed;
        group_tab[i].run();
        if (passed + failed == before)
            row("the group has rows", false, "none ran");
    }
    work_end();
    printf("%u passed, %u failed\n", passed, failed);
    return failed != 0;
}
