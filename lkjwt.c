/* ==== 00 MANUAL =======================================================
 * lkjwt: the MatrixRTC authorization service, one C file.
 * Copyright (c) 2026 the lkjwt developers. MIT; see LICENSE.
 *
 * A Matrix client that wants a video call shows us an OpenID token of its
 * homeserver. We ask the homeserver whose it is, create the room on the
 * LiveKit SFU when the user may, and sign a token that lets the user in.
 * lkjwt takes the place of element-hq's lk-jwt-service: same environment,
 * endpoints and exit codes.
 *
 * Usage      lkjwt [COMMAND]; command_tab (27) and `lkjwt --help`
 * Settings   the environment; ENV_TAB (24)
 * Endpoints  POST /get_token, /sfu/get, /delegate_delayed_leave and
 *            /sfu_webhook, GET|HEAD /healthz, and GET /metrics on a
 *            listener of its own; those of a homeserver that passes its
 *            users' requests on; route_tab (22)
 * Told       one line an event on stderr, EVENT_TAB (03); counters (14)
 * Sources    MSC4195, the Matrix server-server API, LiveKit's RoomService
 *            (Twirp v8), the RFCs named where they rule.
 *
 * How a request goes: listen_step accepts; conn_step reads, h1_parse_head
 * and h1_framing judge the bytes, route_find picks a row, exchange_start
 * reads the JSON; a lookup (18) finds and asks the homeserver through
 * calls (17) that resolve (15), dial and speak TLS (16); exchange_verified
 * decides; a call creates the room (19); jwt_put_join (11) writes the
 * grant; conn_answer replies. One thread, one wait: loop_round (26).
 * A delayed leave that is handed over becomes a job (21): webhooks and
 * look-ups tell it where the participant is, api_step restarts or sends.
 * Behind a homeserver (MSC4195 as homeserver endpoints) as_begin takes what
 * that passes on; inq_open (21a) asks it who is in the room, and as_proven
 * decides; seat_run removes from the SFU who is there no more.
 * With Redis (20) job_store writes it down before the client is answered;
 * rep_step leases shards of the jobs, stream_run reads the webhooks and
 * delegations that other replicas took.
 *
 * The file reads bottom-up; a function stands below all it calls.
 *   01 build     05 bytes    10 resp       15 log, resolver   23 io
 *   02 limits    06 text     11 jwt        16 tls             24 config
 *   03 events    07 json     12 der        17 upstream        25 jail
 *   04 types     08 http1    13 formats    18 matrix          26 loop
 *                09 dns      14 metrics    19 livekit         27 main
 *                                          20 redis
 *                                          21 jobs
 *                                          21a appservice
 *                                          22 server
 * PART I (05-14) is pure: bytes in, values out, no system call, nothing
 * remembered. Foreign bytes are indexed only there. PART II (15-22) holds
 * the state machines; they see the world through the io_* functions
 * declared at its head and a `now` parameter. PART III makes the system
 * calls.
 *
 * Whose bytes, and what they may do
 *   anyone      HTTP and JSON: one bounded lookup at the server it names
 *   homeserver  DNS, TLS, HTTP: accept or refuse its own users; with its
 *               token, as the one behind which we are: who asks, who is
 *               in which room
 *   nameserver  answers: addresses, which are filtered, then proven by TLS
 *   SFU         replies and signed webhooks: who is in a room
 *   Redis       stored jobs and events, judged as if they came from clients
 *   operator    environment and files: everything
 *
 * GRANTS: the functions that give something away; each is short.
 *   h1_framing         where a message ends and the next begins   (08)
 *   user_check         whose user this is                          (06)
 *   cert_names_peer    that a certificate is for the peer dialled  (12)
 *   hs_judge           that a peer is who it was dialled as        (16)
 *   has_full_access    which servers' users may create rooms       (18)
 *   exchange_verified  room or no room, token or no token          (22)
 *   as_is_homeserver   that the homeserver says who asks           (22)
 *   as_proven          room and token to who is in the Matrix room (22)
 *   jwt_put_join       what a join token allows                    (11)
 *   jwt_check_webhook  that a webhook is the SFU's                 (11)
 *
 * Security claims (SECURITY section 10), where each is kept, a test of it:
 *   S1   no connection to an address that SECURITY 3 denies, on any hop
 *        io_connect, net_allowed
 *        test_s01_no_connection_to_a_denied_address_on_any_hop
 *   S2   the sockaddr judged is the one connected
 *        io_connect
 *        test_s02_rebinding_gains_nothing
 *   S3   IPv4 embedded in IPv6 is judged as that IPv4
 *        ip_range
 *        test_s03_embedded_ipv4_is_judged_as_that_ipv4
 *   S4   userinfo and SFU calls follow no redirect
 *        lookup_step_call
 *        test_s04_no_redirect_is_followed
 *   S5   no token unless the server asked named its own user
 *        user_check, exchange_verified
 *        test_s05_sub_must_be_of_the_server_asked
 *   S6   a webhook acts only if signature, issuer, times, hash hold
 *        srv_webhook
 *        test_s06_bad_token
 *   S7   no token given to a client passes as a webhook's
 *        jwt_check_webhook
 *        test_s07_tokens_of_ours_do_not_pass
 *   S8   input changes an outbound path by one encoded segment
 *        bb_percent, delay_id_check
 *        test_s08_hostile_delay_id
 *   S9   no secret or token in a log, metric or error
 *        cfg_wipe
 *        test_s09_no_secret_anywhere
 *   S10  one event is one line without raw control bytes
 *        log_put_value
 *        test_s10_one_event_one_line
 *   S11  bytes have one framing
 *        h1_framing
 *        test_s11_requests_in_are_requests_out
 *   S12  no input enters a header outside its alphabet
 *        conn_request_id
 *        test_s12_request_id_is_made
 *   S13  no heap; a full pool refuses
 *        LIM_MEM_LEN
 *        test_s13_memory_stays
 *   S14  no peer holds a slot beyond its phase's deadline
 *        test_s14_deadlines
 *   S15  /healthz answers with all slots taken
 *        conn_slot
 *        test_s15_full_pool
 *   S16  a chain costs 5 signature checks, 8 certificates, 32 KB
 *        hs_start_cert
 *        test_s16_a_long_chain_costs_no_signature_check
 *   S17  a user's jobs are capped; restarts are 0.8 s apart
 *        job_refuses, job_done
 *        test_s17_jobs_of_a_user
 *   S18  overflow is an error
 *        bb_put, js_int_from, sl_u64
 *        test_s18_timeout_out_of_range
 *   S19  no stored job acts that a client could not create now
 *        rec_parse, load_job
 *        test_s19_poisoned_values
 *   S20  DNS answers match id and question; none loops
 *        dns_parse
 *        test_s20_mutated_answers
 *   S21  a certificate needs SAN, server use, an unconstrained path
 *        hs_judge
 *        test_s21_bad_certificates
 *   S22  a session never outlives its verification
 *        chan_tls_up, ca_reload
 *        test_s22_a_session_dies_with_its_certificate
 *   S23  strangers cannot take the slots kept for others
 *        test_s23_strangers_leave_slots_for_listed
 *   S24  all lookup failures reply alike
 *        exchange_fail
 *        test_s24_all_failures_look_the_same
 *   S25  no input ends the process: must() on our own state only
 *        test_s25_no_failing_call_does_harm
 *   S26  after start few files are opened, read-only; no program runs
 *        jail_enter
 *        test_s26_a_whole_life_under_strace
 *   S27  losing a peer loses no job, sends no leave while connected
 *        job_may_act, job_leave
 *        test_s27_acknowledged_before_the_reply_replicas
 *   S28  SIGTERM exits 0 within the drain time, sends no leave
 *        loop_drain
 *        test_s28_stopping_sends_nothing
 *   S29  secrets are compared in constant time
 *        ct_eq
 *        test_s29_secrets_are_compared_in_constant_time
 *   S30  every TLS context is seeded by getrandom()
 *        chan_start_tls
 *        test_s30_every_tls_context_is_seeded
 *
 * How to audit: build twice without a network and compare; `make audit`;
 * read 00-04, then 05-14 line by line, then the functions above.
 * Choices where the documents are silent
 *   - Without Redis jobs live in memory: a restart forgets them, and the
 *     homeserver fires the event when its own delay is over.
 *   - A restart needs no lease while Redis is slow or away (two are
 *     harmless, none throws a participant out), but for a replica that
 *     was itself asleep. Sends always need it, or five seconds' outage.
 *   - The caps on jobs hold on each replica for the shards it has.
 *   - A restart whose deadline is less than 30 s off goes before sends.
 *   - A wait that ends with the presence unknown asks on, at most T.
 *   - Without a webhook for ten minutes is told only of a participant that
 *     a look-up found: a quiet call has none.
 *   - A webhook's token is judged before a large body is read, its hash
 *     afterwards.
 *   - The look-up before a restart holds it up for 2 s at most, or a
 *     quarter of the time left: doubt must not let a deadline pass.
 *   - A client that leaves is not waited for, its lookup ends all the
 *     same: the caches and the kept connection serve the next one.
 *   - Who shows a token that is being asked about, or wants a room that is
 *     being created, shares the answer; the first one's leaving changes
 *     nothing.
 *   - Waiting requests are served in order; where client addresses are
 *     known, those of one address after one of each other.
 *   - A breaker counts lookups of a server, not their calls. Delayed events
 *     keep their own retries; an open breaker only delays them.
 *   - Limits per client address are refused without LKJWT_TRUSTED_PROXIES;
 *     IPv6 clients are counted by their /64.
 *   - Behind a homeserver, a user who is not in the room gets no token, and
 *     tokens are bounded by the participants watched: who cannot be watched
 *     is not let in. Who is watched is not stored.
 *   - A delayed event that the homeserver handed over is restarted while
 *     nobody has joined for its own delay, or as long as a token lives.
 *   - The loop waits by epoll, not poll(): that costs each round the whole
 *     set, at 1,000 clients a third of all CPU.
 *   - Of an SFU's error only Twirp's `code` is logged, never its text.
 */

/* ==== 01 BUILD ======================================================== */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#include <bearssl.h>

#define LKJWT_VERSION "0.1.0"
#define MUST_USE __attribute__((warn_unused_result))
#define ONCE __attribute__((cold))   /* at start, or by hand: small first */
#define COUNT_OF(a) (sizeof(a) / sizeof(a)[0])

_Static_assert(sizeof(size_t) >= 4, "32-bit sizes at least");
_Static_assert(sizeof(time_t) == 8, "64-bit time, also on 32-bit targets");

/* ==== 02 LIMITS =======================================================
 * Every number: what it bounds, and why. SECURITY.md section 4 is the
 * source. Pools are fixed here; an environment value can only lower them.
 */
enum {
    /* client side */
    LIM_CONN_CNT     = 1024,   /* client connections; LKJWT_MAX_CONNS */
    LIM_LANE_CNT     = 16,     /* above them, for /healthz when all are busy */
    LIM_METRICS_CNT  = 4,      /* connections of the metrics listener */
    LIM_SLOT_CNT     = LIM_CONN_CNT + LIM_LANE_CNT + LIM_METRICS_CNT,
    LIM_LISTEN_CNT   = 4,      /* public and metrics, two families each */
    LIM_READY_CNT    = 512,    /* descriptors served in one round */
    LIM_FD_CNT       = 4096,   /* descriptors, inherited ones too; a higher */
                               /* one counts as none free */
    LIM_LINE_LEN     = 4096,   /* request line; real ones < 300 */
    LIM_HEAD_LEN     = 8192,   /* request head; real ones < 1 KB */
    LIM_FIELD_CNT    = 64,     /* header fields of a request */
    LIM_IN_LEN       = 10240,  /* a head, and a small body beside it */
    LIM_OUT_LEN      = 2048,   /* reply bytes the socket did not take */
    LIM_SCRATCH_LEN  = 65536,  /* one reply or request under construction */
    LIM_BIG_CNT      = 64,     /* buffers for what outgrows the small ones */
    LIM_BIG_LEN      = 65536,
    LIM_HUGE_CNT     = 4,      /* buffers for webhook bodies that outgrow */
    LIM_HUGE_LEN     = 262144, /* the small ones; also their limit */
    LIM_BODY_LEN     = 65536,  /* request body; LKJWT_MAX_BODY */
    LIM_EXT_LEN      = 256,    /* chunk extension */
    LIM_OVERHEAD_LEN = 16384,  /* chunk framing of one body */
    LIM_TRAILER_LEN  = 2048,   /* trailer section */
    LIM_TRAILER_CNT  = 16,
    LIM_LINGER_LEN   = 65536,  /* bytes discarded after a refusal */
    LIM_REQUEST_ID_LEN = 64,

    LIM_YOUNG_MS  = 50,        /* a new connection is not thrown out, */
    LIM_YOUNG_LANE_MS = 5,     /* nor in the lane */
    LIM_HEAD_MS   = 10000,     /* absolute, from the first byte or accept */
    LIM_BODY_MS   = 15000,
    LIM_WRITE_MS  = 10000,
    LIM_LINGER_MS = 2000,
    LIM_KEEP_MS   = 650000,    /* LKJWT_KEEPALIVE_S: longer than any proxy */
    LIM_DRAIN_MS  = 7000,      /* LKJWT_DRAIN_S: after SIGTERM */

    /* JSON */
    LIM_JS_DEPTH   = 16,
    LIM_JS_CNT     = 2048,     /* values in one text */
    LIM_DIGIT_CNT  = 20,       /* digits of a number */

    /* fields of a token request, bytes */
    LIM_ID_LEN     = 255,      /* room and user ids, delay ids */
    LIM_OTHER_LEN  = 512,      /* slot, device, member ids, server names */
    LIM_TOKEN_LEN  = 4096,     /* OpenID tokens are opaque and < 100 */
    LIM_DELAY_MIN_MS = 1000,
    LIM_DELAY_MAX_MS = 86400000,

    /* outbound */
    LIM_UP_CNT       = 192,    /* homeserver lookups; LKJWT_LOOKUPS_MAX */
    LIM_SFU_CNT      = 48,     /* rooms created at the SFU, of their own */
    LIM_AS_CNT       = 24,     /* of them for the homeserver whose */
                               /* application service we are, if we are */
    LIM_STRANGER_CNT = 96,     /* of them at most for strangers */
    LIM_DEST_CNT     = 16,     /* per server; LKJWT_LOOKUPS_PER_SERVER */
    LIM_DEST_LISTED  = 64,     /* per server the operator named */
    LIM_DEST_OPEN    = 32,     /* per server under the lone `*` */
    LIM_DEST_ADDR    = 16,     /* calls for strangers per address, whatever */
                               /* names lead there; LIM_DEST_OPEN under `*` */
    LIM_WAIT_STRANGER = 1024,  /* waiting for a slot, all strangers */
    LIM_WAIT_DEST    = 128,    /* waiting, per stranger */
    LIM_WAIT_OPEN    = 512,    /* the same under the lone `*` */
    LIM_LOOK_CNT     = 24,     /* look-ups of participants at the SFU */
    LIM_JOBCALL_CNT  = 40,     /* calls for delayed events, their own */
    LIM_SPARE_CNT    = 16,     /* of them, for APIs that have none out */
    LIM_REDIS_CNT    = 2,      /* connections to Redis: commands, stream */
    LIM_UP_ALL       = LIM_UP_CNT + LIM_SFU_CNT + LIM_LOOK_CNT
        + LIM_JOBCALL_CNT + LIM_REDIS_CNT,
    LIM_CHAN_CNT     = 328,    /* connections: calls and kept idle ones */
    LIM_IDLE_CNT     = 128,    /* kept idle connections */
    LIM_HS_CNT       = 8,      /* TLS handshakes at once */
    LIM_HS_DEST      = 3,      /* of them per destination; strangers 2 */
    LIM_TRY_CNT      = 4,      /* addresses tried for one call */
    LIM_REPLY_HEAD   = 16384,  /* head of a peer's reply */
    LIM_REPLY_FIELDS = 100,
    LIM_REPLY_1XX    = 4,      /* interim replies */
    LIM_REPLY_IN     = 18432,  /* head, or body that needs no big buffer */
    LIM_WELL_KNOWN_LEN = 51200,
    LIM_USERINFO_LEN = 8192,
    LIM_RPC_LEN      = 65536,
    LIM_REDIRECT_CNT = 3,
    LIM_URL_LEN      = 1024,   /* URL taken from a peer or the environment */
    LIM_HOST_LEN     = 255,
    LIM_NAME_LEN     = 263,    /* host:port */

    LIM_LOOKUP_MS  = 20000,    /* userinfo in all; LKJWT_LOOKUP_TIMEOUT_S */
    LIM_SLACK_MS   = 4000,     /* a request in all: LIM_LOOKUP_MS, and this */
                               /* for a late lookup, and again for a room */
    LIM_DNS_MS     = 5000,
    LIM_CONNECT_MS = 5000,
    LIM_TLS_MS     = 5000,
    LIM_REPLY_MS   = 10000,
    LIM_RPC_MS     = 10000,    /* one call at the SFU, repeat included */
    LIM_STAGGER_MS = 250,      /* RFC 8305 section 5 */
    LIM_RESOLUTION_MS = 50,    /* RFC 8305 section 3 */
    LIM_RETRY_MS   = 200,      /* before CreateRoom is repeated */
    LIM_KEPT_MS    = 60000,    /* idle connection to a peer */

    /* who asks too much, which peer fails too often; tables are 4-way */
    LIM_RATE_CNT     = 4096,   /* token buckets */
    LIM_BREAKER_CNT  = 1024,   /* homeservers that failed lately */
    LIM_KNOWN_CNT    = 2048,   /* homeservers, a user of which was verified */
    LIM_KNOWN_MS     = 86400000,
    LIM_ROOM_CNT     = 4096,   /* rooms created lately: not new */
    LIM_ROOM_MS      = 600000,
    LIM_PAUSE_MS     = 2000,   /* an open breaker's first pause; doubles */
    LIM_PAUSE_STEPS  = 5,      /* to 60 s */
    LIM_PAUSE_MAX_MS = 60000,
    LIM_PAUSE_LISTED_MS = 3000,    /* the same for the operator's peers */
    LIM_COLD_BURST   = 4,      /* seconds of LKJWT_TLS_COLD_PER_S at once */
    LIM_COLD_WAIT_MS = 40,     /* between two looks at that budget */
    LIM_COLD_LEFT_MS = 500,    /* a call that has less is not worth a part */

    /* delegated leaves */
    LIM_JOB_CNT      = 10000,  /* jobs; LKJWT_JOBS_MAX */
    LIM_JOB_USER     = 16,     /* of one user; LKJWT_JOBS_PER_USER */
    LIM_JOB_SERVER   = 500,    /* of one server under the lone `*` */
    LIM_JOB_ID_LEN   = 256,    /* identity; LiveKit's own limit */
    LIM_SID_LEN      = 64,
    LIM_ROOM_HASH    = 4096,   /* chains of jobs by room */
    LIM_API_CNT      = 1024,   /* client-server APIs known */
    LIM_API_CALLS    = 8,      /* calls at one of them at once */
    LIM_URGENT_MS    = 30000,  /* to its deadline: a restart goes first */
    LIM_SEEN_CNT     = 4096,   /* webhooks remembered, 4-way */
    LIM_SEEN_MS      = 600000,
    LIM_WAIT_MS      = 3600000,    /* for a participant to connect */
    LIM_DELAYED_MS   = 5000,   /* one attempt to restart or send */
    LIM_BACKOFF_MIN_MS = 1000,
    LIM_BACKOFF_MAX_MS = 60000,
    LIM_SEND_MAX_MS  = 3600000,
    LIM_ABSENT_MS    = 20000,  /* between two confirmed absences */
    LIM_RESTART_MIN_MS = 800,
    LIM_API_OK_MS    = 14400000,   /* a client-server API is remembered */
    LIM_API_STALE_MS = 172800000,  /* at most, while it cannot be renewed */
    LIM_API_BAD_MS   = 60000,
    LIM_SILENCE_MS   = 600000, /* connected, and no webhook: told */

    /* Redis and replicas */
    LIM_REDIS_IN     = 20480,  /* an element, or what is known of it */
    LIM_REDIS_BULK   = 8192,   /* bulk strings taken whole; longer: skipped */
    LIM_REDIS_OUT    = 286720, /* a webhook, its token, some commands */
    LIM_REDIS_OPS    = 256,    /* commands whose replies are awaited */
    LIM_REDIS_LINE   = 1024,   /* one line of a reply */
    LIM_REDIS_DEPTH  = 8,      /* arrays in arrays */
    LIM_REDIS_ELEMENTS = 40000,
    LIM_RECORD_LEN   = 4096,   /* field or value of a stored job */
    LIM_REDIS_DIAL_MS = 5000,  /* defaults of the URL's time-outs */
    LIM_REDIS_READ_MS = 3000,
    LIM_REDIS_PAUSE_MS = 5000, /* between two attempts to connect, at most */
    LIM_LOAD_FACTOR  = 10,     /* HGETALL may take that many times as long */
    LIM_SHARD_CNT    = 64,
    LIM_LEASE_MS     = 4000,
    LIM_TICK_MS      = 1300,   /* leases are renewed */
    LIM_SHARE_MS     = 130,    /* the same, while shards are given away */
    LIM_OUTAGE_MS    = 5000,   /* then replicas act from memory */
    LIM_SLEEP_MS     = 2000,   /* not having run for so long is a sleep */
    LIM_STREAM_LEN   = 10000,  /* events kept in the stream, about */
    LIM_STREAM_CNT   = 64,     /* events asked for at once */
    LIM_NOTICE_CNT   = 4,      /* notices kept while they are asked for */
    LIM_BLOCK_MS     = 2000,   /* XREAD waits */
    LIM_GONE_CNT     = 4096,   /* departures remembered */
    LIM_GONE_MS      = 120000,
    LIM_RECHECK_MS   = 10000,  /* all jobs are verified within */
    LIM_STOP_RESTART_MS = 10000,   /* restarts due by then: before we stop */
    LIM_BUILD_S      = 1795478400, /* a clock before 2026-11-24 is wrong */

    /* application service of a homeserver */
    LIM_INQ_CNT      = 192,    /* questions for it, waiting ones included */
    LIM_INQ_MS       = 10000,  /* one of them */
    LIM_AS_MS        = 25000,  /* a request in all; Synapse waits for 30 s */
    LIM_MEMBER_CNT   = 2048,   /* answers remembered, 4-way */
    LIM_MEMBER_MS    = 5000,
    LIM_AS_TTL_S     = 600,    /* its tokens live so long at most */
    LIM_SEAT_CNT     = 3072,   /* participants whose membership is watched */
    LIM_SEAT_USER    = 32,     /* of one user */
    LIM_SEAT_SERVER  = 768,    /* of one other server; of all half */
    LIM_PIECE_CNT    = 9216,   /* pieces of their rooms' and users' ids */
    LIM_PIECE_LEN    = 32,
    LIM_SEAT_CALLS   = 8,      /* of them looked at, at once */
    LIM_SEAT_KEPT_MS = 780000, /* LIM_AS_TTL_S, as LiveKit's own refreshed */
                               /* tokens; its minute of leeway; two more */
    LIM_SEAT_RETRY_MS = 5000,  /* the SFU or all our slots were busy, or a */
                               /* first answer that the user has left */
    LIM_PROBE_MS     = 10000,  /* between two first contacts, doubling */
    LIM_TOKEN_RELAY  = 8192,   /* another server's token, handed on */

    /* certificates */
    LIM_CHAIN_CNT  = 8,        /* certificates taken from a peer */
    LIM_CHAIN_LEN  = 32768,    /* their bytes */
    LIM_PATH_CNT   = 5,        /* leaf to the last issuer below the anchor */
    LIM_SIG_CNT    = 5,        /* signatures checked in one handshake */
    LIM_CERT_EXT   = 32,       /* extensions of one certificate */
    LIM_ANCHOR_CNT = 1024,
    LIM_ANCHOR_LEN = 262144,   /* names and keys of one set */
    LIM_SIGCACHE_CNT = 512,    /* 4-way */
    LIM_SESSION_CNT = 1024,
    LIM_SESSION_S  = 3600,

    /* DNS and discovery */
    LIM_QUERY_CNT    = 512,    /* questions in flight: two a call */
    LIM_DNS_LEN      = 4096,   /* packet we take; EDNS is not asked for */
    LIM_DNSCACHE_CNT = 2048,   /* 4-way */
    LIM_DNSDATA_LEN  = 512,    /* addresses or targets of one entry */
    LIM_DNS_REC_CNT  = 16,
    LIM_CNAME_CNT    = 8,
    LIM_POINTER_CNT  = 64,     /* compression jumps in one name */
    LIM_SERVER_CNT   = 3,      /* nameservers */
    LIM_SEARCH_CNT   = 6,
    LIM_WK_CNT       = 1024,   /* well-known results */
    LIM_HOSTS_LEN    = 65536,  /* hosts file; the rest is ignored, logged */

    /* configuration */
    LIM_KEY_CNT      = 16,     /* API keys */
    LIM_LIST_CNT     = 256,    /* entries of one list variable */
    LIM_CONFIG_LEN   = 65536,  /* all copied values together */
    LIM_FILE_LEN     = 786432,     /* CA bundle; Debian's has 220 KB */
    LIM_MEM_LEN      = 48 << 20    /* all pools; resident: what was touched */
};

/* ==== 03 EVENTS =======================================================
 * One row per thing that is refused, fails, or is told to the operator.
 * The row gives the log line's level, event, num and msg, and the label of
 * lkjwt_events_total. Numbers are never used twice.
 * Level: e error, w warning, i info, d debug.
 */
#define EVENT_TAB(X) \
    X(START,          1001, 'i', "serving") \
    X(ANCHORS,        1002, 'i', "trust anchors loaded") \
    X(ANCHORS_BAD,    1003, 'e', \
      "trust anchors not reloaded, the old set stays") \
    X(CONFIG_WARN,    1004, 'w', "configuration") \
    X(CONFIG_BAD,     1005, 'e', "configuration") \
    X(STOPPING,       1006, 'i', "stopping") \
    X(STOPPED,        1007, 'i', "stopped") \
    X(INSECURE,       1008, 'w', \
      "TLS CERTIFICATES ARE NOT CHECKED: anyone on the network path can " \
      "impersonate every homeserver. For labs only.") \
    X(PRIVATE_OPEN,   1009, 'w', \
      "full access for everyone: private addresses are allowed for DNS " \
      "names") \
    X(LIMITS,         1010, 'i', "limits in force") \
    X(BIND_FAILED,    1011, 'e', "cannot listen") \
    X(FILES_READ,     1012, 'i', "resolver files read") \
    X(JAIL,           1013, 'i', "sandbox entered") \
    X(JAIL_BAD,       1014, 'e', "a layer of the sandbox does not hold") \
    X(REQUEST,        1101, 'd', "request answered") \
    X(NOT_FOUND,      1103, 'd', "no such path") \
    X(PREFIX_HINT,    1104, 'w', \
      "no such path; it ends in a known one: the proxy does not strip " \
      "its prefix, or LKJWT_PATH_PREFIX is missing") \
    X(H1_BARE_CR,     1201, 'i', "CR without LF") \
    X(H1_BARE_LF,     1202, 'i', "LF without CR") \
    X(H1_LINE,        1203, 'i', "malformed start line") \
    X(H1_VERSION,     1204, 'i', "HTTP major version other than 1") \
    X(H1_TARGET,      1205, 'i', "malformed request target") \
    X(H1_FIELD,       1206, 'i', "malformed header field") \
    X(H1_HOST,        1207, 'i', "Host missing, repeated or malformed") \
    X(H1_LENGTH,      1208, 'i', \
      "Content-Length malformed, repeated or together with " \
      "Transfer-Encoding") \
    X(H1_CODING,      1209, 'i', \
      "Transfer-Encoding malformed, repeated or not ending in chunked") \
    X(H1_CODING_UNKNOWN, 1210, 'i', "unknown transfer coding") \
    X(H1_CHUNK,       1211, 'i', "malformed chunk") \
    X(H1_TRAILER,     1212, 'i', "trailer section too large") \
    X(H1_EXPECT,      1213, 'i', "unknown Expect") \
    X(H1_LINE_LONG,   1214, 'i', "start line too long") \
    X(HEAD_LIMIT,     1215, 'i', "head too large or too many fields") \
    X(SLOW_HEAD,      1301, 'i', "request head not complete in time") \
    X(SLOW_BODY,      1302, 'i', "request body not complete in time") \
    X(SLOW_READ,      1303, 'i', "client does not read its reply") \
    X(BODY_LIMIT,     1304, 'i', "request body too large") \
    X(BODY_POOL,      1305, 'w', "no buffer for a large body") \
    X(CONN_FULL,      1306, 'w', "all connections in use") \
    X(FD_FULL,        1307, 'e', "no file descriptor left") \
    X(CLIENT_GONE,    1308, 'd', "client closed before its reply") \
    X(JSON_SYNTAX,    1401, 'i', "body is not one JSON object") \
    X(JSON_LIMIT,     1402, 'i', \
      "JSON too deep, too many values or too long a number") \
    X(JSON_DUPLICATE, 1403, 'i', "duplicate JSON member") \
    X(JSON_UTF8,      1404, 'i', "JSON text is not UTF-8") \
    X(JSON_UNKNOWN,   1405, 'i', "unknown JSON member") \
    X(JSON_TYPE,      1406, 'i', "JSON member of a wrong type") \
    X(FIELD_MISSING,  1407, 'i', "required member missing") \
    X(FIELD_LIMIT,    1408, 'i', "member too long") \
    X(FIELD_BAD,      1409, 'i', "malformed member") \
    X(DELEGATION_RESTRICTED, 1410, 'i', \
      "delegation asked by a restricted user") \
    X(JOBS_FULL,      1411, 'w', "no room for another delegated leave") \
    X(JOBS_USER,      1412, 'i', "user has too many delegated leaves") \
    X(API_UNKNOWN,    1413, 'w', \
      "client-server API of the homeserver cannot be found") \
    X(STOP_REFUSED,   1414, 'i', "delegation refused: stopping") \
    X(BODY_EMPTY,     1415, 'd', "empty body: a client looks what is there") \
    X(QUEUE_FULL,     1501, 'w', \
      "too many requests wait for this homeserver") \
    X(WAIT_TIMEOUT,   1502, 'w', "no lookup slot became free in time") \
    X(RATE_USER,      1503, 'i', "user asks too often") \
    X(RATE_SERVER,    1504, 'w', "users of this server ask too often") \
    X(RATE_ROOMS,     1505, 'w', "too many new rooms") \
    X(ADDR_LIMIT,     1506, 'i', \
      "client address asks too often or has too many connections") \
    X(TLS_BUDGET,     1507, 'w', \
      "no turn for a TLS handshake with this server in time") \
    X(BREAKER_OPEN,   1508, 'i', \
      "not asked: this destination has failed repeatedly") \
    X(BREAKER_TRIPPED, 1509, 'w', \
      "destination fails repeatedly: not asked for a while") \
    X(GRANTED,        1601, 'i', "token granted") \
    X(AS_READY,       1701, 'i', \
      "the homeserver takes us for its application service") \
    X(AS_LACKS,       1702, 'w', \
      "the homeserver lacks what the application-service mode needs") \
    X(AS_TOKEN_BAD,   1703, 'w', "request without the homeserver's token") \
    X(AS_IDENTITY_BAD, 1704, 'w', \
      "user or server header missing, repeated or malformed") \
    X(AS_FOREIGN,     1705, 'w', "user is not of the server that asks") \
    X(AS_URL,         1706, 'i', "asked for an SFU that is not ours") \
    X(NOT_JOINED,     1707, 'i', "not joined to the room") \
    X(AS_CALL_FAILED, 1708, 'w', \
      "the homeserver does not answer as an application service needs") \
    X(RELAY_REFUSED,  1709, 'i', "the other homeserver grants no token") \
    X(RELAY_FAILED,   1710, 'w', "no usable answer of the other homeserver") \
    X(RELAYED,        1711, 'i', "token of another homeserver handed on") \
    X(DELAY_UNKNOWN,  1712, 'i', "no such delayed event of this user") \
    X(SEATS_FULL,     1713, 'w', "too many tokens are outstanding") \
    X(SEAT_REMOVED,   1714, 'i', \
      "removed from the SFU: its user is not in the room any more") \
    X(NAME_BAD,       2001, 'i', "malformed server name") \
    X(SERVER_DENIED,  2002, 'i', "server name is blocked or not allowed") \
    X(TOKEN_BAD,      2003, 'i', \
      "OpenID token holds a control byte or blank") \
    X(DNS_NONE,       2101, 'i', "name has no address") \
    X(DNS_FAILED,     2102, 'w', "DNS server fails or does not answer") \
    X(DNS_BAD,        2103, 'i', "malformed DNS answer") \
    X(DNS_FULL,       2104, 'w', "too many DNS questions in flight") \
    X(SSRF_DENIED,    2201, 'w', "address not allowed for this server") \
    X(CONNECT_FAILED, 2202, 'w', "cannot connect") \
    X(CONNECT_TIMEOUT, 2203, 'w', "no connection in time") \
    X(CHAN_FULL,      2204, 'e', "no connection slot free") \
    X(HS_TIMEOUT,     2205, 'w', "no complete answer in time") \
    X(TLS_FAILED,     2301, 'w', "TLS handshake failed") \
    X(TLS_TIMEOUT,    2302, 'w', "no TLS handshake in time") \
    X(TLS_VERSION,    2303, 'w', \
      "peer refuses TLS 1.2: enable TLS 1.2 there, or set an http:// " \
      "override in LKJWT_FEDERATION_API_URL_OVERRIDES") \
    X(TLS_REFUSED,    2304, 'w', \
      "peer refuses the handshake: it may speak TLS 1.3 only, share no " \
      "cipher suite, have an Ed25519 key, or demand extended master " \
      "secret; enable TLS 1.2 with ECDHE and AES-GCM or ChaCha20 there, " \
      "or set an http:// override") \
    X(TLS_CHAIN,      2305, 'w', \
      "certificate chain refused: malformed, too long, too large or a " \
      "disallowed key") \
    X(TLS_NAME,       2306, 'w', "certificate is not for this name") \
    X(TLS_USAGE,      2307, 'w', "certificate is not for servers") \
    X(TLS_EXPIRED,    2308, 'w', "certificate not valid at this time") \
    X(TLS_UNTRUSTED,  2309, 'w', \
      "certificate chain leads to no trust anchor") \
    X(TLS_CONSTRAINT, 2310, 'w', \
      "certificate breaks an issuer's name constraints") \
    X(TLS_SIGNATURE,  2311, 'w', \
      "certificate signature wrong, weak or unsupported") \
    X(TLS_NONE,       2313, 'w', \
      "peer does not speak TLS on this port: wrong port, or plain HTTP") \
    X(TLS_CLOSED,     2312, 'w', "peer closed during the TLS handshake") \
    X(REPLY_CLOSED,   2401, 'w', "peer closed before its reply was complete") \
    X(REPLY_BAD,      2402, 'w', "malformed HTTP reply") \
    X(REPLY_LIMIT,    2403, 'w', "HTTP reply too large") \
    X(REPLY_STATUS,   2404, 'w', "unexpected HTTP status") \
    X(REPLY_JSON,     2405, 'w', "reply is not the JSON object expected") \
    X(REDIRECT_BAD,   2406, 'w', "redirect refused") \
    X(WELL_KNOWN_NONE, 2501, 'i', "no usable well-known delegation") \
    X(TOKEN_UNKNOWN,  2502, 'i', "homeserver does not know the OpenID token") \
    X(SUB_BAD,        2503, 'w', "homeserver named no valid user of its own") \
    X(CLAIM_MISMATCH, 2504, 'i', "claimed_user_id is not the token's user") \
    X(LOOKUP_STEP,    2505, 'd', "lookup step") \
    X(ROOM_CREATED,   2601, 'd', "room ready on the SFU") \
    X(SFU_REFUSED,    2602, 'e', "SFU refused the call") \
    X(SFU_AUTH,       2603, 'e', "SFU rejects our API key or secret") \
    X(WEBHOOK_BAD,    3001, 'w', "webhook refused") \
    X(WEBHOOK_DUPLICATE, 3002, 'd', "webhook seen before") \
    X(WEBHOOK,        3003, 'd', "webhook accepted") \
    X(NO_WEBHOOK,     3004, 'w', \
      "participants are connected, but the SFU sends no webhook: check its " \
      "webhook urls and api_key") \
    X(JOB_NEW,        3101, 'i', "delegated leave accepted") \
    X(JOB_REPLACED,   3102, 'd', "replaced by a newer delegation") \
    X(JOB_CONNECTED,  3103, 'd', "participant is connected") \
    X(JOB_RESTARTED,  3104, 'd', "delayed event restarted") \
    X(JOB_LEAVING,    3105, 'd', "participant is gone") \
    X(JOB_SENT,       3106, 'i', "delayed event sent") \
    X(JOB_ENDED,      3107, 'i', "delegated leave ended") \
    X(DELAYED_EVENT_FAILED, 3108, 'w', \
      "homeserver did not restart or send the delayed event") \
    X(DELAYED_EVENT_LIMITED, 3110, 'd', \
      "homeserver limits the rate of delayed events") \
    X(PRESENCE_UNKNOWN, 3109, 'd', "presence on the SFU unknown") \
    X(REDIS_UP,       3201, 'i', "connected to Redis") \
    X(REDIS_DOWN,     3202, 'w', \
      "no Redis: delegated leaves go on in memory") \
    X(REDIS_PROTO,    3203, 'w', "Redis sends what is not RESP2") \
    X(REDIS_REFUSED,  3204, 'w', "Redis refuses a command") \
    X(REDIS_SINGLE,   3205, 'w', \
      "Redis refuses scripts or streams: delegated leaves are kept, but " \
      "not shared; run one replica only") \
    X(REDIS_ENTRY_BAD, 3206, 'w', \
      "stored delegated leave cannot be used, left alone") \
    X(REDIS_CHANGED,  3207, 'w', \
      "another Redis, or one that lost its leases: all delegated leaves " \
      "are verified and written again") \
    X(SHARDS,         3208, 'd', "share of the delegated leaves") \
    X(JOBS_RESTORED,  3209, 'i', "stored delegated leaves taken over") \
    X(JOB_HANDED,     3210, 'd', "another replica has the delegated leave") \
    X(BUG_OVERFLOW,   9001, 'e', "reply did not fit its buffer") \
    X(BUG_MUST,       9002, 'e', "internal invariant broken")

enum event {
    EV_NONE,
#define X(name, num, level, text) EV_##name,
    EVENT_TAB(X)
#undef X
    EV_CNT
};
static const struct event_row {
    uint16_t num;
    char level;
    const char *label, *text;
} event_tab[EV_CNT] = {
#define X(name, num, level, text) [EV_##name] = { num, level, #name, text },
    EVENT_TAB(X)
#undef X
};

/* What a client is told. Several events share one reply: a 401 never says
 * which check failed (PROTOCOL section 4). A NULL text is filled in by the
 * site (names the field). */
#define REPLY_TAB(X) \
    X(TOO_LARGE,    413, "M_TOO_LARGE",      "Request body too large") \
    X(NOT_JSON,     400, "M_NOT_JSON",       "Error reading request") \
    X(BAD_JSON,     400, "M_BAD_JSON",       NULL) \
    X(LIMITED,      429, "M_LIMIT_EXCEEDED", "Too many requests") \
    X(UNAUTHORIZED, 401, "M_UNAUTHORIZED", \
      "The request could not be authorised.") \
    X(RESTRICTED,   400, "M_BAD_JSON", \
      "Delegation of delayed events is only supported for full access " \
      "users") \
    X(FORBIDDEN,    403, "M_FORBIDDEN", \
      "Delegation of delayed events is only supported for full access " \
      "users") \
    X(NO_API,       400, "M_BAD_JSON", \
      "Unable to resolve client-server API") \
    X(LONG_IDENTITY, 400, "M_BAD_JSON",      "Identity too long to delegate") \
    X(NO_DELEGATION, 400, "M_BAD_JSON", \
      "Too many delegated delayed events") \
    X(USER_LIMIT,   403, "M_USER_LIMIT_EXCEEDED", \
      "Too many delegated delayed events") \
    X(STOPPING,     503, "M_UNKNOWN",        "Service is shutting down") \
    X(SFU,          500, "M_UNKNOWN",        "Unable to create room on SFU") \
    X(NO_TOKEN,     401, "M_MISSING_TOKEN",  "Missing access token") \
    X(WRONG_TOKEN,  401, "M_UNKNOWN_TOKEN",  "Unknown access token") \
    X(BAD_PARAM,    400, "M_INVALID_PARAM",  "Invalid parameter") \
    X(NOT_ALLOWED,  403, "M_FORBIDDEN",      "Not joined to the room") \
    X(UPSTREAM,     502, "M_UNKNOWN", \
      "The homeserver did not answer as needed") \
    X(NO_DELAY,     503, "M_UNKNOWN", \
      "The delayed event could not be looked up") \
    X(BUSY,         503, "M_UNKNOWN",        "Too many connections") \
    X(INTERNAL,     500, "M_UNKNOWN",        "Internal Server Error")

enum reply {
#define X(name, http, errcode, text) RE_##name,
    REPLY_TAB(X)
#undef X
    RE_CNT
};
static const struct reply_row {
    uint16_t http;
    const char *errcode, *text;
} reply_tab[RE_CNT] = {
#define X(name, http, errcode, text) [RE_##name] = { http, errcode, text },
    REPLY_TAB(X)
#undef X
};

/* ==== 04 TYPES ========================================================
 * The value types, and the only prototypes: the world as PART II sees it.
 */

typedef struct { const uint8_t *p; size_t len; } sl;   /* borrowed */
typedef struct { uint16_t idx; uint32_t gen; } ref;    /* pool object */
struct bb { uint8_t *p; size_t len, cap; bool over; }; /* over latches */

struct ip { uint8_t b[16]; bool v6; };       /* IPv4 in the first 4 bytes */
struct addr { struct ip ip; uint16_t port; };
struct cidr { struct ip ip; uint8_t bits; };
enum range { RANGE_PUBLIC, RANGE_N, RANGE_L, RANGE_P };

/* A server name, checked: host[:port]. */
struct name {
    sl whole, host;          /* host keeps the brackets of IPv6 */
    uint16_t port;           /* 0: none given */
    bool is_ip;
    struct ip ip;
};

struct url {
    sl scheme;               /* empty: none given */
    struct name name;
    sl path;                 /* no trailing slash, may be empty */
    sl rest;                 /* path with query as given */
    bool has_query;          /* a query or fragment was there */
};

/* JSON members: what they must be and where they go. */
enum js_type { JS_ANY, JS_STRING, JS_INT, JS_OBJECT,
    JS_TEXT,                 /* a string, or a number's text */
    JS_SECONDS,              /* a number, fraction dropped; no exponent */
    JS_FLAG,                 /* true or false, to a bool */
    JS_TRUTH };              /* the same, to an int8_t: it may be absent */
struct js_int { int64_t v; bool is_set, over; };
struct js_table;
struct js_field {
    const char *name;
    enum js_type type;
    size_t offset;           /* of an sl or js_int in the target struct */
    const struct js_table *sub;
};
struct js_table {
    const struct js_field *field;
    size_t cnt;
    bool strict;             /* an unknown member is an error */
    bool null_ok;            /* a top-level null counts as {} */
};

/* A join token's content. */
struct grant {
    sl key, identity, room;
    int64_t now_wall, ttl_s;
    bool can_publish, can_update;
};

/* What a step of a machine tells its caller. */
enum step { STEP_WAIT, STEP_AGAIN, STEP_DONE, STEP_FAIL };

/* Trust class of a destination (SECURITY, first page). */
enum class { CLASS_STRANGER, CLASS_LISTED, CLASS_OPERATOR };

/* Kinds of objects that the loop drives; rows of dispatch_tab. */
enum kind { KIND_LISTEN, KIND_CONN, KIND_EXCHANGE, KIND_LOOKUP, KIND_UP,
    KIND_TRY, KIND_CHAN, KIND_QUERY, KIND_JOB, KIND_API, KIND_REDIS,
    KIND_REPLICA, KIND_INQUIRY, KIND_SEAT, KIND_SIGNAL, KIND_CNT };

struct trust {
    enum class class;
    bool private_ok;         /* private ranges allowed (SECURITY 3, P) */
};

/* A token bucket's shape: burst 0 is no limit. */
struct rate { int64_t burst, interval_us; };

/* Where to listen, or what the health check asks. */
struct bind {
    bool is_unix, is_any, is_dual;   /* is_any: address 0.0.0.0 or [::] */
    struct addr addr;
    sl host, path;           /* a name to resolve; socket path */
};

/* A base URL of the operator's. */
struct base {
    sl text;                 /* as configured */
    struct url url;
    bool is_tls;
    uint16_t port;
};

struct override { sl name; struct base base; };

/* Where Redis is (PROTOCOL section 12). */
struct redis_url {
    bool is_tls, is_unix, skip_verify;
    uint16_t port, db;
    sl host, path;           /* path: of the socket */
    sl user, sec_password, client_name;
    int64_t dial_ms, read_ms, write_ms;
};

/* One API key: its name, and HMAC's state for its secret. */
struct api_key { sl name; br_hmac_key_context sec_key; };

/* What resolv.conf(5) says; also filled from LKJWT_RESOLVER. */
struct resolv {
    struct addr server[LIM_SERVER_CNT];
    uint8_t server_cnt, search_cnt, ndots, attempts;
    int32_t timeout_ms;
    struct { uint8_t len, text[LIM_HOST_LEN]; } search[LIM_SEARCH_CNT];
};

/* The configuration: written before the loop starts, then only read.
 * Slices point into its own text store. */
struct cfg {
    sl livekit_url;
    struct base api;                 /* Twirp */
    struct api_key key[LIM_KEY_CNT];
    size_t key_cnt;
    sl full_access[LIM_LIST_CNT];
    size_t full_access_cnt;
    bool is_open;                    /* the lone `*` */
    sl allowed[LIM_LIST_CNT], blocked[LIM_LIST_CNT];
    size_t allowed_cnt, blocked_cnt;
    struct override fed[LIM_LIST_CNT], cs[LIM_LIST_CNT];
    size_t fed_cnt, cs_cnt;
    struct cidr network[LIM_LIST_CNT];
    size_t network_cnt;
    struct cidr proxy[LIM_LIST_CNT]; /* whose X-Forwarded-For is believed */
    size_t proxy_cnt;
    struct rate rate_user, rate_server, rate_room_user, rate_room_server;
    struct rate rate_addr;
    bool private_deny, insecure, restricted_publish, can_update, strict;
    bool log_json;
    char log_level;                  /* e w i d */
    char jail;                       /* a auto, o off, r require */
    int64_t uid;                     /* to change to from root */
    struct bind bind, metrics;
    bool has_metrics;
    sl prefix, hosts_file, ca_file, cert_file, cert_dir;
    bool ca_only;
    struct resolv resolver;          /* LKJWT_RESOLVER */
    bool has_resolver;
    int64_t token_ttl_s, max_body, max_conns, keepalive_ms, lookup_ms;
    int64_t lookups_max, lookups_per_server, lame_duck_ms, drain_ms;
    int64_t sanity_s, jobs_max, jobs_per_user;
    int64_t conns_per_addr, tls_cold_per_s, breaker;     /* 0: off */
    bool has_redis;
    struct redis_url redis;
    bool has_as;                     /* the homeserver of hs_name may ask */
    bool only_as;                    /* and nobody else, by OpenID tokens */
    struct name hs_name;
    sl as_id, sec_as_token;
    uint8_t hs_token_sum[32];        /* SHA-256: the token is not kept */
    int64_t member_ms;               /* membership is checked; 0: it is not */
};

/* ==== 05 BYTES ===================== PART I: PURE =====================
 * Purpose  Slices, the builder, big-endian reads, constant-time compare.
 * Trust    None needed: lengths travel with pointers.
 * INV-B1   A builder that overflowed yields nothing at all.
 */

#define SL_INIT(s) { (const uint8_t *)(s), sizeof(s) - 1 }
#define SL(s) ((sl)SL_INIT(s))

static inline sl sl_str(const char *s)
{
    return (sl){ (const uint8_t *)s, s ? strlen(s) : 0 };
}

static bool sl_eq(sl a, sl b)
{
    return a.len == b.len && (a.len == 0 || memcmp(a.p, b.p, a.len) == 0);
}

static uint8_t ascii_lower(uint8_t c)
{
    return c >= 'A' && c <= 'Z' ? (uint8_t)(c + 32) : c;
}

/* Equal but for the case of A-Z; other bytes must match exactly. */
static bool sl_ieq(sl a, sl b)
{
    if (a.len != b.len)
        return false;
    for (size_t i = 0; i < a.len; i++)
        if (ascii_lower(a.p[i]) != ascii_lower(b.p[i]))
            return false;
    return true;
}

static bool sl_starts(sl s, sl head)
{
    return s.len >= head.len && sl_eq((sl){ s.p, head.len }, head);
}

/* s without its first n bytes; empty when it has fewer. */
static sl sl_skip(sl s, size_t n)
{
    if (s.len == 0)                  /* p may be NULL */
        return s;
    return n >= s.len ? (sl){ s.p + s.len, 0 }
                      : (sl){ s.p + n, s.len - n };
}

static bool sl_ends(sl s, sl tail)
{
    return s.len >= tail.len
        && sl_eq(sl_skip(s, s.len - tail.len), tail);
}

/* Index of the first c, or s.len. */
static size_t sl_find(sl s, uint8_t c)
{
    const uint8_t *at = s.len ? memchr(s.p, c, s.len) : NULL;
    return at ? (size_t)(at - s.p) : s.len;
}

static bool is_blank(uint8_t c)
{
    return c == ' ' || c == '\t' || c == '\r' || c == '\n';
}

/* s without blanks, tabs, CR and LF at both ends. */
static sl sl_trim(sl s)
{
    while (s.len && is_blank(s.p[0]))
        s = sl_skip(s, 1);
    while (s.len && is_blank(s.p[s.len - 1]))
        s.len--;
    return s;
}

/* Take the next run of bytes outside `seps` off *rest. False at the end. */
static bool sl_word(sl *rest, const char *seps, sl *word)
{
    while (rest->len && rest->p[0] && strchr(seps, rest->p[0]))
        *rest = sl_skip(*rest, 1);
    size_t n = 0;
    while (n < rest->len && !(rest->p[n] && strchr(seps, rest->p[n])))
        n++;
    *word = (sl){ rest->p, n };
    *rest = sl_skip(*rest, n);
    return n > 0;
}

/* Decimal digits only, no sign, at most max. False otherwise. */
MUST_USE static bool sl_u64(sl s, uint64_t max, uint64_t *out)
{
    uint64_t v = 0;
    if (s.len == 0 || s.len > 19)
        return false;
    for (size_t i = 0; i < s.len; i++) {
        if (s.p[i] < '0' || s.p[i] > '9')
            return false;
        v = v * 10 + (uint64_t)(s.p[i] - '0');
    }
    *out = v;
    return v <= max;
}

static void bb_put(struct bb *b, sl s)
{
    if (b->over || s.len > b->cap - b->len) {
        b->over = true;
        return;
    }
    if (s.len)
        memcpy(b->p + b->len, s.p, s.len);
    b->len += s.len;
}

static void bb_byte(struct bb *b, uint8_t c)
{
    b->over |= b->len == b->cap;
    if (!b->over)
        b->p[b->len++] = c;
}

/* Inlined, so that the length of a literal costs nothing. */
static inline __attribute__((always_inline)) void bb_str(struct bb *b,
    const char *s)
{
    bb_put(b, sl_str(s));
}

static void bb_u64(struct bb *b, uint64_t v)
{
    uint8_t t[20];
    size_t n = sizeof t;
    do
        t[--n] = (uint8_t)('0' + v % 10);
    while (v /= 10);
    bb_put(b, (sl){ t + n, sizeof t - n });
}

static void bb_i64(struct bb *b, int64_t v)
{
    if (v < 0)
        bb_byte(b, '-');
    bb_u64(b, v < 0 ? 0 - (uint64_t)v : (uint64_t)v);
}

/* True if every put fitted. *out borrows from b, empty on overflow. */
MUST_USE static bool bb_finish(const struct bb *b, sl *out)
{
    *out = (sl){ b->p, b->over ? 0 : b->len };
    return !b->over;
}

#define BB(buf) ((struct bb){ (buf), 0, sizeof(buf), false })

static uint16_t be16(const uint8_t *p)
{
    return (uint16_t)(p[0] << 8 | p[1]);
}

static uint32_t be32(const uint8_t *p)
{
    return (uint32_t)be16(p) << 16 | be16(p + 2);
}

static uint64_t be64(const uint8_t *p)
{
    return (uint64_t)be32(p) << 32 | be32(p + 4);
}

static void sha256(sl s, uint8_t out[32])
{
    br_sha256_context c;
    br_sha256_init(&c);
    br_sha256_update(&c, s.p, s.len);
    br_sha256_out(&c, out);
}

/* Equality of n bytes in time that tells nothing of where they differ. */
static bool ct_eq(const uint8_t *a, const uint8_t *b, size_t n)
{
    uint8_t diff = 0;
    for (size_t i = 0; i < n; i++)
        diff |= a[i] ^ b[i];
    return diff == 0;
}

/* Overwrite a secret; the barrier keeps the compiler from dropping it. */
static void wipe(void *p, size_t len)
{
    if (len)
        memset(p, 0, len);
    __asm__ volatile("" : : "r"(p) : "memory");
}

/* ==== 06 TEXT ====================== PART I: PURE =====================
 * Purpose  base64, UTF-8, percent-encoding, addresses, the grammars of
 *          server names, user ids, delay ids and URLs.
 * Trust    All input is unchecked peer or operator text.
 * INV-T1   A name that passes holds only bytes of its grammar, so it can
 *          stand in a Host header or a log line as it is.
 */

static const char b64_std[] =
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
static const char b64_url[] =
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/* Append unpadded base64 of s (RFC 4648) in the given alphabet. */
static void b64_put(struct bb *b, const char *alphabet, sl s)
{
    size_t need = s.len / 3 * 4 + (s.len % 3 ? s.len % 3 + 1 : 0);
    b->over |= need > b->cap - b->len;
    if (b->over)
        return;
    uint8_t *to = b->p + b->len;
    b->len += need;
    for (; s.len >= 3; s = sl_skip(s, 3)) {
        uint32_t v = (uint32_t)be16(s.p) << 8 | s.p[2];
        *to++ = (uint8_t)alphabet[v >> 18];
        *to++ = (uint8_t)alphabet[v >> 12 & 63];
        *to++ = (uint8_t)alphabet[v >> 6 & 63];
        *to++ = (uint8_t)alphabet[v & 63];
    }
    if (s.len == 0)
        return;
    uint32_t v = (uint32_t)s.p[0] << 16
        | (s.len > 1 ? (uint32_t)s.p[1] << 8 : 0);
    *to++ = (uint8_t)alphabet[v >> 18];
    *to++ = (uint8_t)alphabet[v >> 12 & 63];
    if (s.len > 1)
        *to++ = (uint8_t)alphabet[v >> 6 & 63];
}

/* Value of one base64 character of either alphabet, 64 if it is none. */
static uint32_t b64_value(uint8_t c, bool url)
{
    return c >= 'A' && c <= 'Z' ? c - 'A' + 0U
        : c >= 'a' && c <= 'z' ? c - 'a' + 26U
        : c >= '0' && c <= '9' ? c - '0' + 52U
        : c == (url ? '-' : '+') ? 62U : c == (url ? '_' : '/') ? 63U : 64U;
}

/* Decode base64 without blanks: the standard alphabet with its padding, or
 * the URL one without. Unused bits must be zero, so each value has one
 * spelling. Returns the byte count or -1; needs text_raw.len/4*3 room; out
 * may be text_raw.p. */
MUST_USE static int b64_parse(sl text_raw, bool padded, uint8_t *out)
{
    size_t n = text_raw.len, got = 0;
    if (padded) {
        if (n % 4)
            return -1;
        for (int k = 0; k < 2 && n && text_raw.p[n - 1] == '='; k++)
            n--;
    }
    if (n % 4 == 1)
        return -1;
    uint32_t acc = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t v = b64_value(text_raw.p[i], !padded);
        if (v > 63)
            return -1;
        acc = acc << 6 | v;
        if (i % 4 == 1 || i % 4 == 2 || i % 4 == 3)
            out[got++] = (uint8_t)(acc >> (6 - i % 4 * 2));
    }
    uint32_t unused = n % 4 == 2 ? 15 : n % 4 == 3 ? 3 : 0;
    return acc & unused ? -1 : (int)got;
}

/* Decode one UTF-8 character (RFC 3629) from the front of s_raw.
 * Returns its length, 0 if malformed, overlong, a surrogate or above
 * U+10FFFF, or cut off. */
static size_t utf8_next(sl s_raw, uint32_t *cp)
{
    if (s_raw.len == 0)
        return 0;
    uint8_t c = s_raw.p[0];
    size_t n = c < 0x80 ? 1 : c >= 0xc2 && c < 0xe0 ? 2
        : c >= 0xe0 && c < 0xf0 ? 3 : c >= 0xf0 && c < 0xf5 ? 4 : 0;
    if (n == 0 || n > s_raw.len)
        return 0;
    uint32_t v = n == 1 ? c : c & (0x7fU >> n);
    for (size_t i = 1; i < n; i++) {
        if ((s_raw.p[i] & 0xc0) != 0x80)
            return 0;
        v = v << 6 | (s_raw.p[i] & 0x3f);
    }
    if ((n == 3 && v < 0x800) || (n == 4 && (v < 0x10000 || v > 0x10ffff))
        || (v >= 0xd800 && v < 0xe000))
        return 0;
    *cp = v;
    return n;
}

static bool utf8_check(sl s_raw)
{
    uint32_t cp;
    while (s_raw.len) {
        size_t n = utf8_next(s_raw, &cp);
        if (n == 0)
            return false;
        s_raw = sl_skip(s_raw, n);
    }
    return true;
}

static bool is_alnum(uint8_t c)
{
    return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z')
        || (c >= 'a' && c <= 'z');
}

/* How many bytes at the front are printable ASCII that no quoting touches. */
static size_t plain_run(sl s)
{
    size_t n = 0;
    while (n < s.len && s.p[n] >= 0x20 && s.p[n] < 0x7f && s.p[n] != '"'
           && s.p[n] != '\\')
        n++;
    return n;
}

/* RFC 3986 section 2.3: the bytes that need no percent-encoding. */
static bool is_unreserved(uint8_t c)
{
    return is_alnum(c) || c == '-' || c == '.' || c == '_' || c == '~';
}

/* Append s percent-encoded as one path segment or query value. */
static void bb_percent(struct bb *b, sl s)
{
    static const char hex[] = "0123456789ABCDEF";
    for (size_t i = 0; i < s.len; i++) {
        uint8_t c = s.p[i];
        if (is_unreserved(c))
            bb_byte(b, c);
        else
            bb_put(b, (sl){ (uint8_t[3]){ '%', (uint8_t)hex[c >> 4],
                (uint8_t)hex[c & 15] }, 3 });
    }
}

/* The value of a hex digit, or -1. */
static int hex_value(int c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f'
        ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* Append s_raw with its percent-encoding undone (RFC 3986 section 2.1).
 * False: a malformed one. */
MUST_USE static bool percent_parse(struct bb *b, sl s_raw)
{
    while (s_raw.len) {
        int hi = 0, lo = s_raw.p[0];
        bool coded = lo == '%';
        if (coded) {
            hi = s_raw.len < 3 ? -1 : hex_value(s_raw.p[1]);
            lo = hi < 0 ? -1 : hex_value(s_raw.p[2]);
            if (hi < 0 || lo < 0)
                return false;
        }
        bb_byte(b, (uint8_t)(hi << 4 | lo));
        s_raw = sl_skip(s_raw, coded ? 3 : 1);
    }
    return true;
}

static bool ip4_parse(sl s_raw, uint8_t out[4])
{
    for (int k = 0; k < 4; k++) {
        size_t n = 0;
        unsigned v = 0;
        while (n < s_raw.len && n < 3
               && s_raw.p[n] >= '0' && s_raw.p[n] <= '9')
            v = v * 10 + (unsigned)(s_raw.p[n++] - '0');
        if (n == 0 || v > 255 || (n > 1 && s_raw.p[0] == '0'))
            return false;
        out[k] = (uint8_t)v;
        s_raw = sl_skip(s_raw, n);
        if (k < 3) {
            if (s_raw.len == 0 || s_raw.p[0] != '.')
                return false;
            s_raw = sl_skip(s_raw, 1);
        }
    }
    return s_raw.len == 0;
}

/* Parse an IPv4 dotted quad (no leading zeros) or IPv6 text without
 * brackets or zone. */
MUST_USE static bool ip_parse(sl s_raw, struct ip *out)
{
    char text[INET6_ADDRSTRLEN];
    *out = (struct ip){ .v6 = false };
    if (ip4_parse(s_raw, out->b))
        return true;
    if (s_raw.len < 2 || s_raw.len >= sizeof text
        || sl_find(s_raw, 0) < s_raw.len)
        return false;
    memcpy(text, s_raw.p, s_raw.len);
    text[s_raw.len] = 0;
    out->v6 = true;
    return inet_pton(AF_INET6, text, out->b) == 1;
}

/* Append the address, IPv6 in brackets, then :port unless port is 0. */
static void bb_ip(struct bb *b, const struct ip *a, uint16_t port)
{
    char text[INET6_ADDRSTRLEN];
    if (!inet_ntop(a->v6 ? AF_INET6 : AF_INET, a->b, text, sizeof text))
        return;
    if (a->v6)
        bb_byte(b, '[');
    bb_str(b, text);
    if (a->v6)
        bb_byte(b, ']');
    if (port) {
        bb_byte(b, ':');
        bb_u64(b, port);
    }
}

static bool ip_eq(const struct ip *a, const struct ip *b)
{
    return a->v6 == b->v6 && memcmp(a->b, b->b, a->v6 ? 16 : 4) == 0;
}

static bool ip_in(const struct ip *a, const struct cidr *net)
{
    if (a->v6 != net->ip.v6)
        return false;
    unsigned bits = net->bits;
    size_t whole = bits / 8;
    if (memcmp(a->b, net->ip.b, whole) != 0)
        return false;
    uint8_t mask = (uint8_t)(0xff00U >> bits % 8);
    return bits % 8 == 0 || ((a->b[whole] ^ net->ip.b[whole]) & mask) == 0;
}

/* Parse BURST:PER_SECOND, the latter with up to four decimals, or `off`. */
MUST_USE static bool rate_parse(sl s_raw, struct rate *out)
{
    size_t colon = sl_find(s_raw, ':');
    sl rest = sl_skip(s_raw, colon + 1);
    size_t dot = sl_find(rest, '.');
    sl part = sl_skip(rest, dot + 1);
    uint64_t burst, whole, frac = 0;
    *out = (struct rate){ 0, 0 };
    if (sl_eq(s_raw, SL("off")))
        return true;
    if (colon == s_raw.len || !sl_u64((sl){ s_raw.p, colon }, 1000000, &burst)
        || !sl_u64((sl){ rest.p, dot }, 10000, &whole) || part.len > 4
        || (dot < rest.len && !sl_u64(part, 9999, &frac)))
        return false;
    for (size_t i = part.len; i < 4; i++)
        frac *= 10;
    frac += whole * 10000;
    if (burst == 0 || frac == 0 || frac > 100000000)
        return false;
    *out = (struct rate){ (int64_t)burst, (int64_t)(10000000000 / frac) };
    return true;
}

/* Append what rate_parse reads. */
static void bb_rate(struct bb *b, const struct rate *r)
{
    if (r->burst == 0) {
        bb_str(b, "off");
        return;
    }
    uint64_t per = 10000000000 / (uint64_t)r->interval_us;
    bb_u64(b, (uint64_t)r->burst);
    bb_byte(b, ':');
    bb_u64(b, per / 10000);
    if (per % 10000)
        bb_byte(b, '.');
    for (uint64_t left = per % 10000, unit = 1000; left; unit /= 10) {
        bb_byte(b, (uint8_t)('0' + left / unit));
        left %= unit;
    }
}

/* Parse ADDRESS/BITS or a bare ADDRESS (all its bits). */
MUST_USE static bool cidr_parse(sl s_raw, struct cidr *out)
{
    size_t cut = sl_find(s_raw, '/');
    uint64_t bits;
    if (!ip_parse((sl){ s_raw.p, cut }, &out->ip))
        return false;
    bits = out->ip.v6 ? 128 : 32;
    if (cut < s_raw.len
        && !sl_u64(sl_skip(s_raw, cut + 1), bits, &bits))
        return false;
    out->bits = (uint8_t)bits;
    return true;
}

static bool ip_in_any(const struct ip *a, const struct cidr *net, size_t cnt)
{
    for (size_t i = 0; i < cnt; i++)
        if (ip_in(a, &net[i]))
            return true;
    return false;
}

/* The address ranges of SECURITY section 3. N never, L link-local and
 * special, P private. */
static const struct range_row {
    enum range kind;
    bool v6;
    uint8_t bits, b[8];
    const char *name;
} range_tab[] = {
    { RANGE_N, false, 8, { 0 }, "0.0.0.0/8" },
    { RANGE_N, false, 4, { 224 }, "224.0.0.0/4" },
    { RANGE_N, false, 4, { 240 }, "240.0.0.0/4" },
    { RANGE_L, false, 16, { 169, 254 }, "169.254.0.0/16" },
    { RANGE_L, false, 24, { 192, 0, 0 }, "192.0.0.0/24" },
    { RANGE_L, false, 24, { 192, 0, 2 }, "192.0.2.0/24" },
    { RANGE_L, false, 24, { 192, 88, 99 }, "192.88.99.0/24" },
    { RANGE_L, false, 15, { 198, 18 }, "198.18.0.0/15" },
    { RANGE_L, false, 24, { 198, 51, 100 }, "198.51.100.0/24" },
    { RANGE_L, false, 24, { 203, 0, 113 }, "203.0.113.0/24" },
    { RANGE_P, false, 8, { 127 }, "127.0.0.0/8" },
    { RANGE_P, false, 8, { 10 }, "10.0.0.0/8" },
    { RANGE_P, false, 12, { 172, 16 }, "172.16.0.0/12" },
    { RANGE_P, false, 16, { 192, 168 }, "192.168.0.0/16" },
    { RANGE_P, false, 10, { 100, 64 }, "100.64.0.0/10" },
    { RANGE_N, true, 8, { 0xff }, "ff00::/8" },
    { RANGE_L, true, 48, { 0, 0x64, 0xff, 0x9b, 0, 1 }, "64:ff9b:1::/48" },
    { RANGE_L, true, 64, { 1 }, "100::/64" },
    { RANGE_L, true, 23, { 0x20, 1 }, "2001::/23" },
    { RANGE_L, true, 32, { 0x20, 1, 0xd, 0xb8 }, "2001:db8::/32" },
    { RANGE_L, true, 20, { 0x3f, 0xff }, "3fff::/20" },
    { RANGE_L, true, 16, { 0x5f }, "5f00::/16" },
    { RANGE_L, true, 10, { 0xfe, 0x80 }, "fe80::/10" },
    { RANGE_L, true, 10, { 0xfe, 0xc0 }, "fec0::/10" },
    { RANGE_P, true, 7, { 0xfc }, "fc00::/7" },
};

/* Strip the encodings that carry an IPv4 address inside an IPv6 one,
 * repeatedly: mapped, translated, NAT64, 6to4 (SECURITY section 3). */
static struct ip ip_unwrap(struct ip a)
{
    static const uint8_t mapped[12] = { [10] = 0xff, [11] = 0xff };
    static const uint8_t xlat[12] = { [8] = 0xff, [9] = 0xff };
    static const uint8_t nat64[12] = { 0, 0x64, 0xff, 0x9b };
    if (!a.v6)
        return a;
    const uint8_t *v4 = NULL;
    if (!memcmp(a.b, mapped, 12) || !memcmp(a.b, xlat, 12)
        || !memcmp(a.b, nat64, 12))
        v4 = a.b + 12;
    else if (a.b[0] == 0x20 && a.b[1] == 0x02)
        v4 = a.b + 2;
    if (!v4)
        return a;
    struct ip out = { .v6 = false };
    memcpy(out.b, v4, 4);
    return out;
}

/* Class of an address after unwrapping; *name is the range, for the log. */
static enum range ip_range(struct ip a, const char **name)
{
    static const uint8_t zero[16];
    a = ip_unwrap(a);
    if (a.v6 && !memcmp(a.b, zero, 12)) {   /* ::/96 but for ::1 */
        bool one = !memcmp(a.b, zero, 15) && a.b[15] == 1;
        *name = one ? "::1" : "::/96";
        return one ? RANGE_P : RANGE_N;
    }
    for (size_t i = 0; i < COUNT_OF(range_tab); i++) {
        const struct range_row *r = &range_tab[i];
        struct cidr net = { .ip = { .v6 = r->v6 }, .bits = r->bits };
        memcpy(net.ip.b, r->b, sizeof r->b);
        if (ip_in(&a, &net)) {
            *name = r->name;
            return r->kind;
        }
    }
    *name = "public";
    return RANGE_PUBLIC;
}

/* Split host[:port]; `_` in the host only when allowed. *out borrows from
 * s_raw. */
MUST_USE static bool host_parse(sl s_raw, bool underscore, struct name *out)
{
    size_t cut;
    *out = (struct name){ .whole = s_raw };
    if (s_raw.len && s_raw.p[0] == '[') {
        cut = sl_find(s_raw, ']');
        if (cut == s_raw.len || cut < 3 || cut > 46
            || !ip_parse((sl){ s_raw.p + 1, cut - 1 }, &out->ip)
            || !out->ip.v6)
            return false;
        out->is_ip = true;
        cut++;
    } else {
        cut = sl_find(s_raw, ':');
        if (cut < 1 || cut > LIM_HOST_LEN)
            return false;
        for (size_t i = 0; i < cut; i++)
            if (!is_alnum(s_raw.p[i]) && s_raw.p[i] != '.'
                && s_raw.p[i] != '-' && !(underscore && s_raw.p[i] == '_'))
                return false;
        out->is_ip = ip_parse((sl){ s_raw.p, cut }, &out->ip);
    }
    out->host = (sl){ s_raw.p, cut };
    if (cut < s_raw.len) {
        uint64_t port;
        sl digits = sl_skip(s_raw, cut + 1);
        if (s_raw.p[cut] != ':' || digits.len > 5
            || !sl_u64(digits, 65535, &port) || port == 0)
            return false;
        out->port = (uint16_t)port;
    }
    return true;
}

/* Check and split a Matrix server name (PROTOCOL section 7.2):
 * host[:port], no case folding. *out borrows from s_raw. */
MUST_USE static bool name_parse(sl s_raw, struct name *out)
{
    return host_parse(s_raw, false, out);
}

/* Check a user id that a homeserver vouches for: `@local:server`, server
 * byte-equal to the name asked, UTF-8, no control bytes, <= 255 bytes
 * (PROTOCOL section 7.1). The first `:` splits.
 * GRANTS: whose user this is. */
MUST_USE static bool user_check(sl user_raw, sl server)
{
    if (user_raw.len < 3 || user_raw.len > LIM_ID_LEN
        || user_raw.p[0] != '@' || !utf8_check(user_raw))
        return false;
    for (size_t i = 0; i < user_raw.len; i++)
        if (user_raw.p[i] < 0x20 || user_raw.p[i] == 0x7f)
            return false;
    size_t cut = sl_find(user_raw, ':');
    return cut > 1 && cut < user_raw.len
        && sl_eq(sl_skip(user_raw, cut + 1), server);
}

/* `[0-9A-Za-z._~-]{1,255}`, neither `.` nor `..`: safe as one segment. */
MUST_USE static bool delay_id_check(sl s_raw)
{
    if (s_raw.len < 1 || s_raw.len > LIM_ID_LEN || sl_eq(s_raw, SL("."))
        || sl_eq(s_raw, SL("..")))
        return false;
    for (size_t i = 0; i < s_raw.len; i++)
        if (!is_unreserved(s_raw.p[i]))
            return false;
    return true;
}

MUST_USE static bool request_id_check(sl s_raw)
{
    if (s_raw.len < 1 || s_raw.len > LIM_REQUEST_ID_LEN)
        return false;
    for (size_t i = 0; i < s_raw.len; i++)
        if (!is_unreserved(s_raw.p[i]) || s_raw.p[i] == '~')
            return false;
    return true;
}

/* Split an absolute URL. A missing scheme leaves `scheme` empty. The path
 * keeps its leading `/` and loses trailing ones; query and fragment are
 * reported, not kept. Refuses userinfo, blanks, controls and non-ASCII.
 * Port 0 means the scheme's own. *out borrows from s_raw. */
MUST_USE static bool url_parse(sl s_raw, struct url *out)
{
    *out = (struct url){ .scheme = { s_raw.p, 0 } };
    if (s_raw.len > LIM_URL_LEN)
        return false;
    for (size_t i = 0; i < s_raw.len; i++)
        if (s_raw.p[i] <= 0x20 || s_raw.p[i] >= 0x7f
            || strchr("\"<>\\^`{|}", s_raw.p[i]))
            return false;
    size_t colon = sl_find(s_raw, ':');
    if (sl_starts(sl_skip(s_raw, colon), SL("://"))) {
        if (colon == 0)
            return false;
        out->scheme = (sl){ s_raw.p, colon };
        s_raw = sl_skip(s_raw, colon + 3);
    }
    size_t cut = 0;
    while (cut < s_raw.len && !strchr("/?#", s_raw.p[cut]))
        cut++;
    if (sl_find((sl){ s_raw.p, cut }, '@') < cut)
        return false;
    if (!host_parse((sl){ s_raw.p, cut }, true, &out->name))
        return false;
    s_raw = sl_skip(s_raw, cut);
    cut = 0;
    while (cut < s_raw.len && s_raw.p[cut] != '?' && s_raw.p[cut] != '#')
        cut++;
    out->has_query = cut < s_raw.len;
    out->rest = (sl){ s_raw.p, sl_find(s_raw, '#') };
    out->path = (sl){ s_raw.p, cut };
    while (out->path.len && out->path.p[out->path.len - 1] == '/')
        out->path.len--;
    return true;
}

/* ==== 07 JSON ====================== PART I: PURE =====================
 * Purpose  Read one JSON object (RFC 8259) into a struct by a table of its
 *          members; write strings.
 * Trust    None: text from clients and peers.
 * Limits   LIM_JS_DEPTH, LIM_JS_CNT, LIM_DIGIT_CNT; LIM_HUGE_LEN.
 * INV-J1   A text has one reading: no duplicate member, nothing before or
 *          behind the value, no sloppy number or string.
 * Refuses  BOM, lone surrogates, invalid UTF-8, raw control bytes.
 *
 * Strings are decoded where they stand (never longer than their escapes),
 * so slices in the result borrow from the text's buffer.
 */

struct js {
    uint8_t *p;
    size_t len, pos;
    unsigned depth;
    unsigned value_cnt;
    size_t key_cnt;                 /* keys of all open objects */
    struct { uint32_t hash, off : 18, len : 14; } key[LIM_JS_CNT];
};

static void js_blank(struct js *j)
{
    while (j->pos < j->len && is_blank(j->p[j->pos]))
        j->pos++;
}

/* The byte at the cursor, or -1 at the end. */
static int js_peek(const struct js *j)
{
    return j->pos < j->len ? j->p[j->pos] : -1;
}

static bool js_take(struct js *j, uint8_t c)
{
    if (js_peek(j) != c)
        return false;
    j->pos++;
    return true;
}

/* Read four hex digits at the cursor. Returns the value or -1. */
static int32_t js_hex4(struct js *j)
{
    int32_t v = 0;
    for (int k = 0; k < 4; k++) {
        int d = hex_value(js_peek(j));
        if (d < 0)
            return -1;
        v = v << 4 | d;
        j->pos++;
    }
    return v;
}

/* Read what follows a backslash; append it at *at. */
MUST_USE static bool js_escape(struct js *j, size_t *at)
{
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    int c = js_peek(j);
    if (c < 0)
        return false;
    j->pos++;
    const char *hit = c ? strchr(from, c) : NULL;
    if (hit) {
        j->p[(*at)++] = (uint8_t)to[hit - from];
        return true;
    }
    int32_t v = c == 'u' ? js_hex4(j) : -1;
    if (v < 0 || (v >= 0xdc00 && v < 0xe000))
        return false;
    if (v >= 0xd800 && v < 0xdc00) {
        int32_t low = js_take(j, '\\') && js_take(j, 'u') ? js_hex4(j) : -1;
        if (low < 0xdc00 || low >= 0xe000)
            return false;
        v = 0x10000 + ((v - 0xd800) << 10) + (low - 0xdc00);
    }
    uint8_t *w = j->p + *at;
    size_t n = v < 0x80 ? 1 : v < 0x800 ? 2 : v < 0x10000 ? 3 : 4;
    for (size_t k = n; k-- > 1; v >>= 6)
        w[k] = (uint8_t)(0x80 | (v & 0x3f));
    w[0] = (uint8_t)(n == 1 ? v : (0xf00 >> n & 0xff) | v);
    *at += n;
    return true;
}

/* Read a string, cursor on its opening quote. Returns 0 or -EV_*. */
MUST_USE static int js_string(struct js *j, sl *out)
{
    if (!js_take(j, '"'))
        return -EV_JSON_SYNTAX;
    size_t from = j->pos, at = from;
    for (;;) {
        int c = js_peek(j);
        if (c < 0x20)                      /* the end included */
            return -EV_JSON_SYNTAX;
        if (c == '"')
            break;
        if (c == '\\') {
            j->pos++;
            if (!js_escape(j, &at))
                return -EV_JSON_SYNTAX;
            continue;
        }
        if (c < 0x80) {                    /* most are */
            j->p[at++] = (uint8_t)c;
            j->pos++;
            continue;
        }
        uint32_t cp;
        size_t n = utf8_next((sl){ j->p + j->pos, j->len - j->pos }, &cp);
        if (n == 0)
            return -EV_JSON_UTF8;
        memmove(j->p + at, j->p + j->pos, n);
        at += n;
        j->pos += n;
    }
    j->pos++;
    *out = (sl){ j->p + from, at - from };
    return 0;
}

/* Skip digits; returns how many. */
static size_t js_digits(struct js *j)
{
    size_t n = 0;
    while (js_peek(j) >= '0' && js_peek(j) <= '9') {
        j->pos++;
        n++;
    }
    return n;
}

/* Read a number's text. *is_int: it has neither fraction nor exponent. */
MUST_USE static int js_number(struct js *j, sl *text, bool *is_int)
{
    size_t from = j->pos, digits, n;
    (void)js_take(j, '-');
    bool zero = js_peek(j) == '0';
    digits = js_digits(j);
    if (digits == 0 || (zero && digits > 1))
        return -EV_JSON_SYNTAX;
    *is_int = true;
    if (js_take(j, '.')) {
        *is_int = false;
        n = js_digits(j);
        if (n == 0)
            return -EV_JSON_SYNTAX;
        digits += n;
    }
    if (js_peek(j) == 'e' || js_peek(j) == 'E') {
        *is_int = false;
        j->pos++;
        if (!js_take(j, '+'))
            (void)js_take(j, '-');
        n = js_digits(j);
        if (n == 0)
            return -EV_JSON_SYNTAX;
        digits += n;
    }
    if (digits > LIM_DIGIT_CNT)
        return -EV_JSON_LIMIT;
    *text = (sl){ j->p + from, j->pos - from };
    return 0;
}

/* Text of js_number to a struct js_int; `over` when beyond int64. */
static struct js_int js_int_from(sl text)
{
    struct js_int out = { .is_set = true };
    bool neg = text.p[0] == '-';
    uint64_t v = 0, max = (uint64_t)INT64_MAX + (neg ? 1 : 0);
    for (size_t i = neg ? 1 : 0; i < text.len; i++) {
        uint64_t d = (uint64_t)(text.p[i] - '0');
        if (v > (max - d) / 10) {
            out.over = true;
            return out;
        }
        v = v * 10 + d;
    }
    out.v = neg ? (int64_t)(0 - v) : (int64_t)v;
    return out;
}

static bool js_literal(struct js *j, sl word)
{
    sl rest = { j->p + j->pos, j->len - j->pos };
    if (!sl_starts(rest, word))
        return false;
    j->pos += word.len;
    return true;
}

/* Read a key; refuse one that its object (keys from `first`) has. */
MUST_USE static int js_key(struct js *j, size_t first, sl *key)
{
    int err = js_string(j, key);
    if (err)
        return err;
    uint32_t h = 2166136261u;                       /* FNV-1a */
    for (size_t i = 0; i < key->len; i++)
        h = (h ^ key->p[i]) * 16777619u;
    for (size_t i = first; i < j->key_cnt; i++)
        if (j->key[i].hash == h
            && sl_eq((sl){ j->p + j->key[i].off, j->key[i].len }, *key))
            return -EV_JSON_DUPLICATE;
    if (j->key_cnt == LIM_JS_CNT || key->len >= 1U << 14)
        return -EV_JSON_LIMIT;
    j->key[j->key_cnt].hash = h;
    j->key[j->key_cnt].off = (uint32_t)(key->p - j->p) & 0x3ffff;
    j->key[j->key_cnt++].len = key->len & 0x3fff;
    js_blank(j);
    if (!js_take(j, ':'))
        return -EV_JSON_SYNTAX;
    js_blank(j);
    return 0;
}

static int js_value(struct js *j, const struct js_field *f, void *base);

/* Read an object's members into base by the table `tab`, NULL: skip all.
 * Recursion is bounded by LIM_JS_DEPTH. Returns 0 or -EV_*. */
MUST_USE static int js_object(struct js *j, const struct js_table *tab,
    void *base)
{
    size_t first = j->key_cnt;
    if (!js_take(j, '{'))
        return -EV_JSON_TYPE;
    if (++j->depth > LIM_JS_DEPTH)
        return -EV_JSON_LIMIT;
    js_blank(j);
    for (bool more = !js_take(j, '}'); more; ) {
        sl key;
        int err = js_key(j, first, &key);
        if (err)
            return err;
        const struct js_field *f = NULL;
        for (size_t i = 0; tab && i < tab->cnt && !f; i++)
            if (sl_eq(key, sl_str(tab->field[i].name)))
                f = &tab->field[i];
        if (tab && !f && tab->strict)
            return -EV_JSON_UNKNOWN;
        err = js_value(j, f, base);
        if (err)
            return err;
        js_blank(j);
        more = js_take(j, ',');
        js_blank(j);
        if (!more && !js_take(j, '}'))
            return -EV_JSON_SYNTAX;
    }
    j->key_cnt = first;
    j->depth--;
    return 0;
}

MUST_USE static int js_array(struct js *j)
{
    (void)js_take(j, '[');
    if (++j->depth > LIM_JS_DEPTH)
        return -EV_JSON_LIMIT;
    js_blank(j);
    for (bool more = !js_take(j, ']'); more; ) {
        int err = js_value(j, NULL, NULL);
        if (err)
            return err;
        js_blank(j);
        more = js_take(j, ',');
        js_blank(j);
        if (!more && !js_take(j, ']'))
            return -EV_JSON_SYNTAX;
    }
    j->depth--;
    return 0;
}

/* Put a number where f wants it. Returns 0 or -EV_JSON_TYPE. */
MUST_USE static int js_store_number(const struct js_field *f, void *base,
    sl text, bool is_int)
{
    enum js_type want = f ? f->type : JS_ANY;
    if (want == JS_ANY)
        return 0;
    void *to = (uint8_t *)base + f->offset;
    if (want == JS_TEXT) {
        *(sl *)to = text;
        return 0;
    }
    if (want == JS_SECONDS && !is_int && sl_find(text, '.') < text.len
        && sl_find(text, 'e') == text.len && sl_find(text, 'E') == text.len) {
        text.len = sl_find(text, '.');
        is_int = true;
    }
    if ((want != JS_INT && want != JS_SECONDS) || !is_int)
        return -EV_JSON_TYPE;
    *(struct js_int *)to = js_int_from(text);
    return 0;
}

/* Read one value. f says what it must be and where it goes; NULL or JS_ANY
 * takes and drops anything. null leaves the target unset. */
MUST_USE static int js_value(struct js *j, const struct js_field *f,
    void *base)
{
    enum js_type want = f ? f->type : JS_ANY;
    int c = js_peek(j), err;
    sl text;
    bool is_int;
    if (++j->value_cnt > LIM_JS_CNT)
        return -EV_JSON_LIMIT;
    if (js_literal(j, SL("null")))
        return 0;
    if (c == '{') {
        if (want != JS_OBJECT && want != JS_ANY)
            return -EV_JSON_TYPE;
        return js_object(j, want == JS_ANY ? NULL : f->sub, base);
    }
    if (c == '"') {
        err = js_string(j, &text);
        if (err || want == JS_ANY)
            return err;
        if (want != JS_STRING && want != JS_TEXT)
            return -EV_JSON_TYPE;
        *(sl *)(void *)((uint8_t *)base + f->offset) = text;
        return 0;
    }
    if (c == '-' || (c >= '0' && c <= '9')) {
        err = js_number(j, &text, &is_int);
        return err ? err : js_store_number(f, base, text, is_int);
    }
    if (want == JS_FLAG && (c == 't' || c == 'f'))
        *(bool *)((uint8_t *)base + f->offset) = c == 't';
    else if (want == JS_TRUTH && (c == 't' || c == 'f'))
        *(int8_t *)((uint8_t *)base + f->offset) = c == 't';
    else if (want != JS_ANY && (c == '[' || c == 't' || c == 'f'))
        return -EV_JSON_TYPE;
    if (c == '[')
        return js_array(j);
    if (js_literal(j, SL("true")) || js_literal(j, SL("false")))
        return 0;
    return -EV_JSON_SYNTAX;
}

/* Read a whole text that must be one object, into base by tab. A top-level
 * null counts as {} when tab->null_ok.
 * Trust    text is unchecked; it is decoded in place.
 * Returns  0 or -EV_JSON_*; base may be partly filled on failure. */
MUST_USE static int js_parse(uint8_t *text_raw, size_t len,
    const struct js_table *tab, void *base)
{
    struct js j;
    if (len > LIM_HUGE_LEN)
        return -EV_JSON_LIMIT;
    j.p = text_raw;
    j.len = len;
    j.pos = j.key_cnt = 0;
    j.depth = j.value_cnt = 0;
    js_blank(&j);
    if (!tab->null_ok || !js_literal(&j, SL("null"))) {
        int c = js_peek(&j);
        if (c != '{')
            return -EV_JSON_SYNTAX;
        int err = js_object(&j, tab, base);
        if (err)
            return err;
    }
    js_blank(&j);
    return j.pos == j.len ? 0 : -EV_JSON_SYNTAX;
}

/* Read a whole text that must be an array of two strings, decoded in
 * place. */
MUST_USE static bool js_pair(uint8_t *text_raw, size_t len, sl *a, sl *b)
{
    struct js j;
    j.p = text_raw;
    j.len = len;
    j.pos = 0;
    for (int i = 0; i < 2; i++) {
        js_blank(&j);
        if (!js_take(&j, i ? ',' : '['))
            return false;
        js_blank(&j);
        if (js_string(&j, i ? b : a))
            return false;
    }
    js_blank(&j);
    bool closed = js_take(&j, ']');
    js_blank(&j);
    return closed && j.pos == j.len;
}

static void js_put_u(struct bb *b, uint32_t unit)
{
    static const char hex[] = "0123456789abcdef";
    bb_str(b, "\\u");
    for (int k = 12; k >= 0; k -= 4)
        bb_byte(b, (uint8_t)hex[unit >> k & 15]);
}

/* Append s, which is UTF-8, as a JSON string. Escapes are those of
 * canonical JSON; `ascii` adds all that would put `-` or `_` into
 * base64url or a byte above 0x7e into the text (PROTOCOL section 6). */
static void js_put_str(struct bb *b, sl s, bool ascii)
{
    static const char from[] = "\"\\\b\t\n\f\r", to[] = "\"\\btnfr";
    bb_byte(b, '"');
    while (s.len) {
        uint32_t cp;
        size_t n = plain_run(s);
        const char *hit;
        for (size_t i = 0; ascii && i < n; i++)
            if (s.p[i] == '>' || s.p[i] == '?' || s.p[i] == '~')
                n = i;
        if (n) {
            bb_put(b, (sl){ s.p, n });
            s = sl_skip(s, n);
            continue;
        }
        n = utf8_next(s, &cp);
        if (n == 0) {                     /* callers pass checked text */
            b->over = true;
            return;
        }
        if (cp && cp < 0x80 && (hit = strchr(from, (int)cp))) {
            bb_byte(b, '\\');
            bb_byte(b, (uint8_t)to[hit - from]);
        } else if (cp < 0x20
                   || (ascii && (cp >= 0x7f || strchr(">?~", (int)cp)))) {
            if (cp > 0xffff) {
                js_put_u(b, 0xd800 + ((cp - 0x10000) >> 10));
                js_put_u(b, 0xdc00 + ((cp - 0x10000) & 0x3ff));
            } else {
                js_put_u(b, cp);
            }
        } else {
            bb_put(b, (sl){ s.p, n });
        }
        s = sl_skip(s, n);
    }
    bb_byte(b, '"');
}

/* ==== 08 HTTP/1 ==================== PART I: PURE =====================
 * Purpose  One request or reply head from bytes, its one framing, and the
 *          chunked coding; or one numbered no.
 * Trust    None: clients and peers.
 * Limits   LIM_LINE_LEN, LIM_HEAD_LEN, LIM_FIELD_CNT, LIM_REPLY_HEAD,
 *          LIM_REPLY_FIELDS, LIM_EXT_LEN, LIM_OVERHEAD_LEN, LIM_TRAILER_*.
 * INV-H1   A head has exactly one reading; where two exist, refuse.
 * INV-H2   Nothing is read at or past in_raw.p + in_raw.len.
 * Refuses  Bare CR or LF, folding, a second Host, length with chunked
 *          (SECURITY section 7).
 */

/* The fields we look at; all others are checked and dropped. */
#define H1_FIELD_TAB(X) \
    X(HOST, "host") \
    X(CONTENT_LENGTH, "content-length") \
    X(TRANSFER_ENCODING, "transfer-encoding") \
    X(EXPECT, "expect") \
    X(AUTHORIZATION, "authorization") \
    X(RETRY_AFTER, "retry-after") \
    X(REQUEST_ID, "x-request-id") \
    X(LOCATION, "location") \
    X(CACHE_CONTROL, "cache-control") \
    X(EXPIRES, "expires") \
    X(CONTENT_ENCODING, "content-encoding") \
    X(FORWARDED_FOR, "x-forwarded-for") \
    X(MATRIX_USER, "x-matrix-user-identifier") \
    X(MATRIX_ORIGIN, "x-matrix-origin")

enum h1_field {
#define X(name, text) H1_##name,
    H1_FIELD_TAB(X)
#undef X
    H1_FIELD_CNT
};
static const sl h1_field_tab[H1_FIELD_CNT] = {
#define X(name, text) [H1_##name] = SL_INIT(text),
    H1_FIELD_TAB(X)
#undef X
};

/* Part of a head, by place: the buffer may lie elsewhere at the next call. */
struct span {
    uint16_t off, len;
};

/* What is known of a head so far. All zero at its first byte. */
struct h1_head {
    uint16_t pos;            /* where the next line starts */
    uint16_t status;         /* replies */
    uint8_t  minor;          /* HTTP/1.minor */
    uint8_t  field_cnt;
    bool     has_start;      /* the start line is read */
    bool     has_crlf;       /* the one tolerated empty line is skipped */
    bool     is_close, is_keep;    /* Connection options seen */
    struct span method, target;    /* requests */
    struct span field[H1_FIELD_CNT];
    uint8_t  seen[H1_FIELD_CNT];   /* how often each occurred */
};

enum h1_kind { H1_NONE, H1_LENGTH, H1_CHUNKED, H1_CLOSE };

/* How the body is delimited. */
struct h1_body {
    enum h1_kind kind;
    uint64_t len;            /* H1_LENGTH */
};

static sl h1_slice(sl in, struct span s)
{
    return (sl){ in.p + s.off, s.len };
}

static sl h1_get(sl in, const struct h1_head *h, enum h1_field f)
{
    return h1_slice(in, h->field[f]);
}

/* RFC 9110 section 5.6.2. */
static bool h1_is_token(sl s)
{
    for (size_t i = 0; i < s.len; i++)
        if (!is_alnum(s.p[i]) && s.p[i] != '-'
            && (s.p[i] == 0 || !strchr("!#$%&'*+.^_`|~", s.p[i])))
            return false;
    return s.len > 0;
}

/* Take one CRLF-ended line off the front of in_raw.
 * Trust    peer bytes, unchecked.
 * Returns  >0 bytes consumed with CRLF; *line borrows from in_raw
 *           0 not all here yet; *line untouched
 *          <0 -EV_*; no later byte can repair it
 * Bound    cap + 1 bytes looked at; `over` is the event beyond it. */
MUST_USE static int h1_parse_line(sl in_raw, size_t cap, enum event over,
    sl *line)
{
    for (size_t i = 0; i < in_raw.len && i < cap; i++) {
        if (in_raw.p[i] == '\n')
            return -EV_H1_BARE_LF;
        if (in_raw.p[i] != '\r')
            continue;
        if (i + 1 == in_raw.len)
            return 0;
        if (in_raw.p[i + 1] != '\n')
            return -EV_H1_BARE_CR;
        *line = (sl){ in_raw.p, i };
        return (int)i + 2;
    }
    return in_raw.len < cap ? 0 : -(int)over;
}

/* Check a request target (SECURITY section 7): origin-form, absolute-form
 * with http or https, or `*` for OPTIONS. */
MUST_USE static bool h1_check_target(sl method, sl target_raw)
{
    for (size_t i = 0; i < target_raw.len; i++)
        if (target_raw.p[i] <= 0x20 || target_raw.p[i] > 0x7e
            || target_raw.p[i] == '#')
            return false;
    if (sl_eq(target_raw, SL("*")))
        return sl_eq(method, SL("OPTIONS"));
    if (sl_eq(method, SL("CONNECT")))
        return false;
    if (target_raw.len && target_raw.p[0] == '/')
        return true;
    size_t colon = sl_find(target_raw, ':');
    sl scheme = { target_raw.p, colon };
    return (sl_ieq(scheme, SL("http")) || sl_ieq(scheme, SL("https")))
        && sl_starts(sl_skip(target_raw, colon), SL("://"))
        && target_raw.len > colon + 3;
}

/* No control byte but TAB (RFC 9110 section 5.5). */
static bool h1_is_value(sl s)
{
    for (size_t i = 0; i < s.len; i++)
        if ((s.p[i] < 0x20 && s.p[i] != '\t') || s.p[i] == 0x7f)
            return false;
    return true;
}

/* HTTP/1.x of a start line. Returns 0 or -EV_*. */
MUST_USE static int h1_version(sl v_raw, uint8_t *minor)
{
    if (v_raw.len != 8 || !sl_starts(v_raw, SL("HTTP/"))
        || v_raw.p[5] < '0' || v_raw.p[5] > '9' || v_raw.p[6] != '.'
        || v_raw.p[7] < '0' || v_raw.p[7] > '9')
        return -EV_H1_LINE;
    if (v_raw.p[5] != '1')
        return -EV_H1_VERSION;
    *minor = (uint8_t)(v_raw.p[7] - '0');
    return 0;
}

static struct span h1_span(sl in, sl part)
{
    return (struct span){ (uint16_t)(part.p - in.p), (uint16_t)part.len };
}

MUST_USE static int h1_parse_request_line(sl in, sl line_raw,
    struct h1_head *h)
{
    size_t a = sl_find(line_raw, ' ');
    sl rest = sl_skip(line_raw, a + 1);
    size_t b = sl_find(rest, ' ');
    sl method = { line_raw.p, a }, target = { rest.p, b };
    if (a == line_raw.len || b == rest.len || !h1_is_token(method))
        return -EV_H1_LINE;
    int err = h1_version(sl_skip(rest, b + 1), &h->minor);
    if (err)
        return err;
    if (!h1_check_target(method, target))
        return -EV_H1_TARGET;
    h->method = h1_span(in, method);
    h->target = h1_span(in, target);
    return 0;
}

MUST_USE static int h1_parse_status_line(sl line_raw, struct h1_head *h)
{
    uint64_t status;
    if (!h1_is_value(line_raw))
        return -EV_H1_LINE;
    if (line_raw.len < 12 || line_raw.p[8] != ' '
        || h1_version((sl){ line_raw.p, 8 }, &h->minor)
        || !sl_u64((sl){ line_raw.p + 9, 3 }, 599, &status) || status < 100
        || (line_raw.len > 12 && line_raw.p[12] != ' '))
        return -EV_H1_LINE;
    h->status = (uint16_t)status;
    return 0;
}

/* Note the options of one Connection field. */
static void h1_connection(sl value, struct h1_head *h)
{
    sl word;
    while (sl_word(&value, ", \t", &word)) {
        h->is_close |= sl_ieq(word, SL("close"));
        h->is_keep |= sl_ieq(word, SL("keep-alive"));
    }
}

MUST_USE static int h1_parse_field(sl in, sl line_raw, struct h1_head *h)
{
    size_t colon = sl_find(line_raw, ':');
    sl name = { line_raw.p, colon };
    if (colon == line_raw.len || !h1_is_token(name))
        return -EV_H1_FIELD;
    sl value = sl_skip(line_raw, colon + 1);
    if (!h1_is_value(value))
        return -EV_H1_FIELD;
    value = sl_trim(value);
    if (sl_ieq(name, SL("connection")))
        h1_connection(value, h);
    for (int f = 0; f < H1_FIELD_CNT; f++)
        if (sl_ieq(name, h1_field_tab[f])) {
            h->seen[f] = (uint8_t)(h->seen[f] + 1);
            h->field[f] = h1_span(in, value);
        }
    return 0;
}

/* The client that trusted proxies name in X-Forwarded-For: from the right,
 * the first address that is none of theirs.
 * Trust    the rightmost entry is a trusted proxy's, the rest anybody's.
 * Returns  false: none there. What stands left of an entry that is no
 *          address was not written by a proxy we trust. */
static bool forwarded_client(sl v_raw, const struct cidr *proxy, size_t cnt,
    struct ip *out)
{
    while (v_raw.len) {
        size_t at = v_raw.len;
        while (at > 0 && v_raw.p[at - 1] != ',')
            at--;
        sl word = sl_trim(sl_skip(v_raw, at));
        if (sl_starts(word, SL("[")) && sl_ends(word, SL("]")))
            word = (sl){ word.p + 1, word.len - 2 };
        if (!ip_parse(word, out))
            return false;
        *out = ip_unwrap(*out);
        if (!ip_in_any(out, proxy, cnt))
            return true;
        v_raw.len = at ? at - 1 : 0;
    }
    return false;
}

/* Read a head, line by line; call again with more bytes of the same.
 * Trust    peer bytes, unchecked.
 * Returns  >0 length of the head, empty line included
 *           0 not all here yet
 *          <0 -EV_*; no later byte can repair it */
MUST_USE static int h1_parse_head(sl in_raw, bool is_reply, struct h1_head *h)
{
    size_t cap = is_reply ? LIM_REPLY_HEAD : LIM_HEAD_LEN;
    size_t fields = is_reply ? LIM_REPLY_FIELDS : LIM_FIELD_CNT;
    for (;;) {
        sl line = { in_raw.p, 0 }, rest = sl_skip(in_raw, h->pos);
        bool at_start = !h->has_start;
        size_t room = h->pos < cap ? cap - h->pos : 0;
        int n = at_start && !is_reply
            ? h1_parse_line(rest, LIM_LINE_LEN, EV_H1_LINE_LONG, &line)
            : h1_parse_line(rest, room, EV_HEAD_LIMIT, &line);
        if (n <= 0)
            return n;
        h->pos = (uint16_t)(h->pos + n);
        int err = 0;
        if (at_start && line.len == 0) {
            if (is_reply || h->has_crlf)
                return -EV_H1_LINE;
            h->has_crlf = true;
            continue;
        }
        if (line.len == 0)
            return h->pos;
        if (at_start)
            err = is_reply ? h1_parse_status_line(line, h)
                           : h1_parse_request_line(in_raw, line, h);
        else if (h->field_cnt == fields)
            return -EV_HEAD_LIMIT;
        else
            err = h1_parse_field(in_raw, line, h);
        if (err)
            return err;
        if (!at_start)
            h->field_cnt++;
        h->has_start = true;
    }
}

/* RFC 9112 section 3.2: a request names its host once. */
static bool h1_host_ok(sl in, const struct h1_head *h)
{
    sl v = h1_get(in, h, H1_HOST);
    if (h->seen[H1_HOST] > 1 || (h->seen[H1_HOST] == 0 && h->minor > 0))
        return false;
    if (h->seen[H1_HOST] == 0)
        return true;
    struct name n;
    return host_parse(v, true, &n);
}

/* Judge a Transfer-Encoding value: only `chunked`. Returns 0 or -EV_*. */
MUST_USE static int h1_coding(sl value)
{
    bool last_chunked = false, unknown = false, bad = false, twice = false;
    for (bool more = true; more; ) {
        size_t cut = sl_find(value, ',');
        sl word = sl_trim((sl){ value.p, cut });
        more = cut < value.len;
        value = sl_skip(value, cut + 1);
        bool is_chunked = sl_ieq(word, SL("chunked"));
        twice |= is_chunked && last_chunked;
        bad |= !h1_is_token(word) || (!is_chunked && last_chunked);
        unknown |= !is_chunked;
        last_chunked |= is_chunked;
    }
    if (bad || twice || !last_chunked)
        return -EV_H1_CODING;
    return unknown ? -EV_H1_CODING_UNKNOWN : 0;
}

/* The one framing decision for a body.
 * GRANTS: where one message ends and the next begins.
 * Returns 0 and *body, or -EV_*. */
MUST_USE static int h1_framing(sl in, const struct h1_head *h, bool is_reply,
    struct h1_body *body)
{
    bool has_length = h->seen[H1_CONTENT_LENGTH] > 0;
    *body = (struct h1_body){ is_reply ? H1_CLOSE : H1_NONE, 0 };
    if (!is_reply && !h1_host_ok(in, h))
        return -EV_H1_HOST;
    if (h->seen[H1_TRANSFER_ENCODING]) {
        if (has_length)
            return -EV_H1_LENGTH;
        if (h->minor == 0 || h->seen[H1_TRANSFER_ENCODING] > 1)
            return -EV_H1_CODING;
        int err = h1_coding(h1_get(in, h, H1_TRANSFER_ENCODING));
        body->kind = H1_CHUNKED;
        return err;
    }
    if (has_length) {
        if (h->seen[H1_CONTENT_LENGTH] > 1
            || !sl_u64(h1_get(in, h, H1_CONTENT_LENGTH), INT64_MAX,
                       &body->len))
            return -EV_H1_LENGTH;
        body->kind = H1_LENGTH;
    }
    if (is_reply && (h->status == 204 || h->status == 304))
        *body = (struct h1_body){ H1_NONE, 0 };
    return 0;
}

/* Whether the connection may carry another message after this one. */
static bool h1_keeps(const struct h1_head *h)
{
    return h->minor > 0 && !h->is_close;
}

/* The path that routes: query cut off, authority of absolute-form dropped.
 * Slash runs and the prefix are srv_route's business. */
static sl h1_path(sl target)
{
    if (target.len && target.p[0] != '/' && target.p[0] != '*') {
        target = sl_skip(target, sl_find(target, ':') + 3);
        size_t cut = 0;
        while (cut < target.len && target.p[cut] != '/'
               && target.p[cut] != '?')
            cut++;
        target = sl_skip(target, cut);
        if (target.len == 0 || target.p[0] != '/')
            return SL("/");
    }
    return (sl){ target.p, sl_find(target, '?') };
}

enum chunk_state {
    CHUNK_SIZE, CHUNK_EXT, CHUNK_SIZE_LF, CHUNK_DATA, CHUNK_DATA_CR,
    CHUNK_DATA_LF, CHUNK_TRAILER, CHUNK_TRAILER_LF, CHUNK_END
};

/* Decoder of one chunked body. All zero at its first byte. */
struct h1_chunk {
    enum chunk_state state;
    uint32_t left;           /* data bytes of this chunk still to come */
    uint8_t  digit_cnt;
    uint16_t ext_len;        /* of this chunk */
    uint32_t overhead_len;   /* framing bytes of the body */
    uint16_t line_len, trailer_len, trailer_cnt;
    bool     has_colon;      /* in this trailer line */
};

/* Judge one framing byte. Returns 0 or -EV_*. */
MUST_USE static int h1_chunk_byte(struct h1_chunk *c, uint8_t byte)
{
    uint8_t low = ascii_lower(byte);
    bool is_hex = (byte >= '0' && byte <= '9') || (low >= 'a' && low <= 'f');
    bool is_text = byte == '\t' || (byte >= 0x20 && byte != 0x7f);
    switch (c->state) {
    case CHUNK_SIZE:
        if (is_hex && c->digit_cnt < 8) {
            c->left = c->left << 4
                | (uint32_t)(byte <= '9' ? byte - '0' : low - 'a' + 10);
            c->digit_cnt++;
            return 0;
        }
        if (c->digit_cnt == 0 || (byte != ';' && byte != '\r'))
            return -EV_H1_CHUNK;
        c->state = byte == ';' ? CHUNK_EXT : CHUNK_SIZE_LF;
        c->ext_len = 0;
        return 0;
    case CHUNK_EXT:
        if (byte == '\r')
            c->state = CHUNK_SIZE_LF;
        else if (!is_text || ++c->ext_len > LIM_EXT_LEN)
            return -EV_H1_CHUNK;
        return 0;
    case CHUNK_SIZE_LF:
        if (byte != '\n')
            return -EV_H1_CHUNK;
        c->digit_cnt = 0;
        c->line_len = 0;
        c->state = c->left ? CHUNK_DATA : CHUNK_TRAILER;
        return 0;
    case CHUNK_DATA_CR:
    case CHUNK_DATA_LF:
        if (byte != (c->state == CHUNK_DATA_CR ? '\r' : '\n'))
            return -EV_H1_CHUNK;
        c->state = c->state == CHUNK_DATA_CR ? CHUNK_DATA_LF : CHUNK_SIZE;
        return 0;
    case CHUNK_TRAILER:
        if (byte == '\r' && (c->has_colon || c->line_len == 0))
            c->state = CHUNK_TRAILER_LF;
        else if (!is_text || (byte == ':' && c->line_len == 0)
                 || (!c->has_colon && byte != ':'
                     && !h1_is_token((sl){ &byte, 1 })))
            return -EV_H1_CHUNK;
        else if (++c->trailer_len > LIM_TRAILER_LEN
                 || (c->line_len++ == 0
                     && ++c->trailer_cnt > LIM_TRAILER_CNT))
            return -EV_H1_TRAILER;
        c->has_colon |= byte == ':';
        return 0;
    case CHUNK_TRAILER_LF:
        if (byte != '\n')
            return -EV_H1_CHUNK;
        c->state = c->line_len ? CHUNK_TRAILER : CHUNK_END;
        c->line_len = 0;
        c->has_colon = false;
        return 0;
    case CHUNK_DATA:
    case CHUNK_END:
        break;
    }
    return -EV_H1_CHUNK;               /* unreachable: handled by the caller */
}

/* Take framing bytes, then at most one run of data, off the front.
 * Returns  >0 bytes consumed; *data (maybe empty) borrows from in_raw
 *           0 need more, or the body has ended (state CHUNK_END)
 *          <0 -EV_* */
MUST_USE static int h1_parse_chunk(sl in_raw, struct h1_chunk *c, sl *data)
{
    size_t i = 0;
    *data = (sl){ in_raw.p, 0 };
    while (i < in_raw.len && c->state != CHUNK_DATA && c->state != CHUNK_END) {
        int err = h1_chunk_byte(c, in_raw.p[i++]);
        if (err)
            return err;
        if (++c->overhead_len > LIM_OVERHEAD_LEN)
            return -EV_H1_CHUNK;
    }
    if (c->state == CHUNK_DATA && i < in_raw.len) {
        size_t n = in_raw.len - i < c->left ? in_raw.len - i : c->left;
        *data = (sl){ in_raw.p + i, n };
        c->left -= (uint32_t)n;
        if (c->left == 0)
            c->state = CHUNK_DATA_CR;
        i += n;
    }
    return (int)i;
}

/* ==== 09 DNS ======================= PART I: PURE =====================
 * Purpose  Build one question; take one answer apart (RFC 1035, 2782).
 * Trust    None: anyone on the path can send an answer.
 * Limits   LIM_DNS_REC_CNT, LIM_CNAME_CNT, LIM_POINTER_CNT.
 * INV-D1   Pointers lead backwards only, so no name loops.
 * INV-D2   Only records of the question's CNAME chain are taken.
 */

enum { DNS_A = 1, DNS_CNAME = 5, DNS_SOA = 6, DNS_AAAA = 28, DNS_SRV = 33 };

/* What an answer says. Records lie packed in data: A 4 bytes, AAAA 16,
 * SRV: priority, weight, port (2 each), name length (1), name. */
struct dns_answer {
    uint8_t  rcode;
    bool     is_cut;             /* TC: ask again by TCP */
    bool     has_more;           /* chain ends in a name without records */
    uint8_t  rec_cnt;
    uint16_t data_len;
    uint32_t ttl;                /* smallest of the chain, or negative TTL */
    uint8_t  cname_len;          /* name at the end of the chain */
    uint8_t  cname[LIM_HOST_LEN];
    uint8_t  data[LIM_DNSDATA_LEN];
};

/* Append the wire form of a name in text form (no escapes). False if a
 * label is empty or too long, or the whole exceeds 255 bytes. One trailing
 * dot is the root. */
MUST_USE static bool dns_put_name(struct bb *b, sl name)
{
    if (sl_ends(name, SL(".")))
        name.len--;
    if (name.len == 0 || name.len > 253)
        return false;
    for (bool more = true; more; ) {
        size_t n = sl_find(name, '.');
        if (n == 0 || n > 63)
            return false;
        bb_byte(b, (uint8_t)n);
        bb_put(b, (sl){ name.p, n });
        more = n < name.len;
        name = sl_skip(name, n + 1);
    }
    bb_byte(b, 0);
    return true;
}

/* Append one recursive question. */
MUST_USE static bool dns_build(struct bb *b, uint16_t id, sl name,
    uint16_t type)
{
    bb_put(b, (sl){ (uint8_t[12]){ (uint8_t)(id >> 8), (uint8_t)id, 1, 0,
        0, 1 }, 12 });
    if (!dns_put_name(b, name))
        return false;
    bb_put(b, (sl){ (uint8_t[4]){ (uint8_t)(type >> 8), (uint8_t)type, 0, 1 },
        4 });
    return !b->over;
}

/* Read the name at *pos into text form, lower case, without a trailing dot
 * ("." for the root). *pos moves behind it. Labels with a dot or a byte
 * outside 0x21-0x7e are refused. */
MUST_USE static bool dns_parse_name(sl pkt_raw, size_t *pos,
    uint8_t out[LIM_HOST_LEN], uint8_t *out_len)
{
    size_t at = *pos, len = 0, jumps = 0, lowest = at;
    bool moved = false;
    for (;;) {
        if (at >= pkt_raw.len)
            return false;
        uint8_t n = pkt_raw.p[at];
        if (n >= 0xc0) {
            if (at + 1 >= pkt_raw.len || ++jumps > LIM_POINTER_CNT)
                return false;
            size_t to = be16(pkt_raw.p + at) & 0x3fffU;
            if (to >= lowest)
                return false;
            if (!moved)
                *pos = at + 2;
            moved = true;
            at = lowest = to;
            continue;
        }
        if (n > 63 || at + 1 + n > pkt_raw.len)
            return false;
        if (n == 0)
            break;
        if (len + n + 1 > LIM_HOST_LEN - 1)
            return false;
        if (len)
            out[len++] = '.';
        for (size_t k = 1; k <= n; k++) {
            uint8_t c = ascii_lower(pkt_raw.p[at + k]);
            if (c <= 0x20 || c >= 0x7f || c == '.')
                return false;
            out[len++] = c;
        }
        at += 1U + n;
    }
    if (!moved)
        *pos = at + 1;
    if (len == 0)
        out[len++] = '.';
    *out_len = (uint8_t)len;
    return true;
}

/* One resource record's fixed part. */
struct dns_rec {
    uint8_t  name[LIM_HOST_LEN], name_len;
    uint16_t type, class, len;
    uint32_t ttl;
    size_t   at;                 /* of its data */
};

MUST_USE static bool dns_parse_rec(sl pkt_raw, size_t *pos, struct dns_rec *r)
{
    if (!dns_parse_name(pkt_raw, pos, r->name, &r->name_len)
        || pkt_raw.len - *pos < 10)
        return false;
    const uint8_t *p = pkt_raw.p + *pos;
    r->type = be16(p);
    r->class = be16(p + 2);
    r->ttl = be32(p + 4);
    r->len = be16(p + 8);
    r->at = *pos + 10;
    if (r->len > pkt_raw.len - r->at)
        return false;
    if (r->ttl > INT32_MAX)                     /* RFC 2181 section 8 */
        r->ttl = 0;
    *pos = r->at + r->len;
    return true;
}

/* Append the data of a wanted record. False if malformed; a record that
 * does not fit is left out. */
MUST_USE static bool dns_take(sl pkt_raw, const struct dns_rec *r,
    struct dns_answer *out)
{
    uint8_t buf[7 + LIM_HOST_LEN];
    size_t n = r->len;
    if (r->type == DNS_SRV) {
        size_t pos = r->at + 6;
        if (r->len < 7 || !dns_parse_name(pkt_raw, &pos, buf + 7, buf + 6)
            || pos != r->at + r->len)
            return false;
        memcpy(buf, pkt_raw.p + r->at, 6);
        n = 7U + buf[6];
    } else {
        if (n != (r->type == DNS_A ? 4 : 16))
            return false;
        memcpy(buf, pkt_raw.p + r->at, n);
    }
    if (out->rec_cnt == LIM_DNS_REC_CNT
        || n > (size_t)LIM_DNSDATA_LEN - out->data_len)
        return true;
    memcpy(out->data + out->data_len, buf, n);
    out->data_len = (uint16_t)(out->data_len + n);
    out->rec_cnt++;
    return true;
}

/* Walk the answer section once from `pos`: take the records of type at the
 * chain's end; move the end along a CNAME. *moved tells of a move. */
MUST_USE static bool dns_walk(sl pkt_raw, size_t pos, uint16_t type,
    struct dns_answer *out, bool *moved)
{
    *moved = false;
    out->rec_cnt = 0;              /* an earlier walk may have seen some */
    out->data_len = 0;
    for (unsigned i = be16(pkt_raw.p + 6); i > 0; i--) {
        struct dns_rec r;
        if (!dns_parse_rec(pkt_raw, &pos, &r))
            return false;
        if (r.class != 1 || !sl_eq((sl){ r.name, r.name_len },
                                   (sl){ out->cname, out->cname_len }))
            continue;
        if (r.type == type) {
            if (!dns_take(pkt_raw, &r, out))
                return false;
        } else if (r.type == DNS_CNAME && !*moved && out->rec_cnt == 0) {
            size_t at = r.at;
            if (!dns_parse_name(pkt_raw, &at, out->cname, &out->cname_len)
                || at != r.at + r.len)
                return false;
            *moved = true;
        } else {
            continue;
        }
        if (r.ttl < out->ttl)
            out->ttl = r.ttl;
    }
    return true;
}

/* Negative TTL (RFC 2308 section 5): of the SOA in the authority section,
 * the smaller of its TTL and its MINIMUM; 0 if there is none. */
static uint32_t dns_negative_ttl(sl pkt_raw, size_t pos)
{
    unsigned skip = be16(pkt_raw.p + 6);
    unsigned cnt = skip + be16(pkt_raw.p + 8);
    for (unsigned i = 0; i < cnt; i++) {
        struct dns_rec r;
        if (!dns_parse_rec(pkt_raw, &pos, &r))
            return 0;
        if (i < skip || r.type != DNS_SOA || r.len < 20)
            continue;
        uint32_t minimum = be32(pkt_raw.p + r.at + r.len - 4);
        return minimum < r.ttl ? minimum : r.ttl;
    }
    return 0;
}

/* Take an answer apart.
 * Trust    pkt_raw is unchecked; id and question must be ours.
 * Returns  1 it answers our question, *out is filled; 0 not ours: go on
 *          waiting; -EV_DNS_BAD ours, but malformed.
 * Bound    LIM_CNAME_CNT walks over at most 65,535 records of the packet. */
MUST_USE static int dns_parse(sl pkt_raw, uint16_t id, sl name, uint16_t type,
    struct dns_answer *out)
{
    uint8_t asked[LIM_HOST_LEN];
    size_t pos = 12;
    memset(out, 0, offsetof(struct dns_answer, cname));
    if (sl_ends(name, SL(".")))
        name.len--;
    if (pkt_raw.len < 12 || be16(pkt_raw.p) != id
        || (pkt_raw.p[2] & 0xf8) != 0x80 || be16(pkt_raw.p + 4) != 1
        || !dns_parse_name(pkt_raw, &pos, asked, &out->cname_len)
        || pkt_raw.len - pos < 4 || be16(pkt_raw.p + pos) != type
        || be16(pkt_raw.p + pos + 2) != 1
        || !sl_ieq((sl){ asked, out->cname_len }, name))
        return 0;
    pos += 4;
    memcpy(out->cname, asked, out->cname_len);
    out->rcode = pkt_raw.p[3] & 15;
    out->is_cut = (pkt_raw.p[2] & 2) != 0;
    out->ttl = UINT32_MAX;
    if (out->is_cut)
        return 1;
    bool moved = true;
    for (int hops = 0; moved; hops++) {
        if (hops > LIM_CNAME_CNT)
            return -EV_DNS_BAD;
        if (!dns_walk(pkt_raw, pos, type, out, &moved))
            return -EV_DNS_BAD;
    }
    if (out->rec_cnt == 0) {
        out->has_more = out->rcode == 0
            && !sl_ieq((sl){ out->cname, out->cname_len }, name);
        out->ttl = dns_negative_ttl(pkt_raw, pos);
    }
    return 1;
}

/* ==== 10 RESP ====================== PART I: PURE =====================
 * Purpose  Redis' protocol, RESP2: one element of a reply at a time, and
 *          commands.
 * Trust    Redis is the operator's; what others stored in it is not.
 * Limits   LIM_REDIS_LINE; the caller's cap on bulk strings.
 */

enum rsp_type { RSP_SIMPLE, RSP_ERROR, RSP_INT, RSP_BULK, RSP_NIL,
    RSP_ARRAY };

/* One element: text of the first two and of a bulk string, n of integers,
 * of an array's count and a bulk string's length. */
struct rsp { enum rsp_type type; int64_t n; sl text; };

/* The line's number, `-` allowed. False: none, or beyond int64. */
MUST_USE static bool rsp_int(sl s_raw, int64_t *out)
{
    bool negative = sl_starts(s_raw, SL("-"));
    uint64_t v;
    if (!sl_u64(sl_skip(s_raw, negative), INT64_MAX, &v))
        return false;
    *out = negative ? -(int64_t)v : (int64_t)v;
    return true;
}

/* Take one element off the front of in_raw. A bulk string longer than cap
 * yields its length only: text.p is NULL, n + 2 bytes of it follow. An
 * array yields its count: that many elements follow.
 * Returns >0 bytes consumed; out->text borrows from in_raw
 *          0 not all here yet
 *         <0 -EV_REDIS_PROTO */
MUST_USE static int rsp_parse(sl in_raw, size_t cap, struct rsp *out)
{
    size_t end = sl_find(in_raw, '\n');
    if (end == in_raw.len || end >= LIM_REDIS_LINE)
        return in_raw.len <= LIM_REDIS_LINE ? 0 : -EV_REDIS_PROTO;
    if (end < 2 || in_raw.p[end - 1] != '\r')
        return -EV_REDIS_PROTO;
    sl line = { in_raw.p + 1, end - 2 };
    int used = (int)end + 1;
    *out = (struct rsp){ .text = line };
    switch (in_raw.p[0]) {
    case '+':
        out->type = RSP_SIMPLE;
        return used;
    case '-':
        out->type = RSP_ERROR;
        return used;
    case ':':
        out->type = RSP_INT;
        return rsp_int(line, &out->n) ? used : -EV_REDIS_PROTO;
    case '*':
    case '$':
        break;
    default:
        return -EV_REDIS_PROTO;
    }
    if (!rsp_int(line, &out->n) || out->n < -1 || out->n > INT32_MAX)
        return -EV_REDIS_PROTO;
    bool is_array = in_raw.p[0] == '*';
    out->type = out->n < 0 ? RSP_NIL : is_array ? RSP_ARRAY : RSP_BULK;
    out->text = (sl){ NULL, 0 };
    if (out->type != RSP_BULK || (size_t)out->n > cap)
        return used;
    sl rest = sl_skip(in_raw, (size_t)used);
    size_t len = (size_t)out->n;
    if (rest.len < len + 2)
        return 0;
    if (rest.p[len] != '\r' || rest.p[len + 1] != '\n')
        return -EV_REDIS_PROTO;
    out->text = (sl){ rest.p, len };
    return used + (int)len + 2;
}

/* Append the head of a command of cnt words. */
static void rsp_put_head(struct bb *b, size_t cnt)
{
    bb_byte(b, '*');
    bb_u64(b, cnt);
    bb_str(b, "\r\n");
}

/* Append one word of a command. */
static void rsp_put(struct bb *b, sl word)
{
    bb_byte(b, '$');
    bb_u64(b, word.len);
    bb_str(b, "\r\n");
    bb_put(b, word);
    bb_str(b, "\r\n");
}

/* ==== 11 JWT ======================= PART I: PURE =====================
 * Purpose  Names of rooms and identities; HS256 tokens (RFC 7515, 7519).
 * Trust    Inputs are checked by the callers: UTF-8, verified user.
 * INV-W1   A token for a client holds no right but those of PROTOCOL
 *          section 6; one for the SFU lives 600 s and never goes to a
 *          client.
 */

enum { HASH_NAME_LEN = 43, SERVICE_TTL_S = 600 };

/* Unpadded standard base64 of SHA-256 over the canonical JSON array of the
 * parts (PROTOCOL section 5). False if they exceed the work buffer. */
MUST_USE static bool jwt_hash_name(const sl *part, size_t cnt,
    uint8_t out[HASH_NAME_LEN])
{
    uint8_t work[6 * (LIM_ID_LEN + 2 * LIM_OTHER_LEN) + 16], sum[32];
    struct bb b = BB(work);
    sl text;
    for (size_t i = 0; i < cnt; i++) {
        bb_byte(&b, i ? ',' : '[');
        js_put_str(&b, part[i], false);
    }
    bb_byte(&b, ']');
    if (!bb_finish(&b, &text))
        return false;
    sha256(text, sum);
    struct bb o = { out, 0, HASH_NAME_LEN, false };
    b64_put(&o, b64_std, (sl){ sum, 32 });
    return !o.over;
}

/* Whether s_raw has the form of a name that jwt_hash_name makes. */
static bool hash_name_check(sl s_raw)
{
    size_t i = 0;
    while (i < s_raw.len && b64_value(s_raw.p[i], false) < 64)
        i++;
    return i == s_raw.len && i == HASH_NAME_LEN;
}

/* Append the compact JWS of payload under key. */
static void jwt_sign(struct bb *b, const br_hmac_key_context *sec_key,
    sl payload)
{
    size_t from = b->len;
    uint8_t mac[32];
    br_hmac_context h;
    b64_put(b, b64_url, SL("{\"alg\":\"HS256\",\"typ\":\"JWT\"}"));
    bb_byte(b, '.');
    b64_put(b, b64_url, payload);
    br_hmac_init(&h, sec_key, 0);
    br_hmac_update(&h, b->p + from, b->len - from);
    br_hmac_out(&h, mac);
    bb_byte(b, '.');
    b64_put(b, b64_url, (sl){ mac, 32 });
}

/* Append iss, sub (unless empty), exp, nbf, iat: what all tokens share. */
static void jwt_times(struct bb *b, sl key, sl sub, int64_t now_wall,
    int64_t ttl_s)
{
    bb_str(b, "{\"iss\":");
    js_put_str(b, key, true);
    if (sub.len) {
        bb_str(b, ",\"sub\":");
        js_put_str(b, sub, true);
    }
    bb_str(b, ",\"exp\":");
    bb_i64(b, now_wall + ttl_s);
    bb_str(b, ",\"nbf\":");
    bb_i64(b, now_wall);
    bb_str(b, ",\"iat\":");
    bb_i64(b, now_wall);
}

/* Append a LiveKit join token's payload (PROTOCOL section 6, bytes and
 * order fixed). canPublish is always written: absence means true.
 * GRANTS: entry to one room under one identity. */
static void jwt_put_join(struct bb *b, const struct grant *g)
{
    jwt_times(b, g->key, g->identity, g->now_wall, g->ttl_s);
    bb_str(b, ",\"identity\":");
    js_put_str(b, g->identity, true);
    bb_str(b, ",\"video\":{\"roomJoin\":true,\"room\":");
    js_put_str(b, g->room, true);
    bb_str(b, ",\"canPublish\":");
    bb_str(b, g->can_publish ? "true" : "false");
    bb_str(b, ",\"canSubscribe\":true");
    if (g->can_update)
        bb_str(b, ",\"canUpdateOwnMetadata\":true");
    bb_str(b, "}}");
}

/* Append the payload of our own token for one SFU call: room creation, or
 * administration of `admin_room` when that is not empty. */
static void jwt_put_service(struct bb *b, sl key, sl admin_room,
    int64_t now_wall)
{
    jwt_times(b, key, (sl){ NULL, 0 }, now_wall, SERVICE_TTL_S);
    bb_str(b, ",\"video\":{");
    if (admin_room.len) {
        bb_str(b, "\"roomAdmin\":true,\"room\":");
        js_put_str(b, admin_room, true);
    } else {
        bb_str(b, "\"roomCreate\":true");
    }
    bb_str(b, "}}");
}

/* Read one JSON part of a token into base. work holds cap bytes. */
MUST_USE static bool jwt_part(sl part_raw, uint8_t *work, size_t cap,
    const struct js_table *tab, void *base)
{
    int n = part_raw.len / 4 * 3 + 3 > cap ? -1
        : b64_parse(part_raw, false, work);
    return n >= 0 && js_parse(work, (size_t)n, tab, base) == 0;
}

/* The keys whose secret signed the two parts, by bit. */
static uint32_t jwt_signers(sl signed_raw, sl mac_raw,
    const struct api_key *key, size_t cnt)
{
    uint8_t mac[48], want[32];
    uint32_t found = 0;
    if (mac_raw.len != 43 || b64_parse(mac_raw, false, mac) != 32)
        return 0;
    for (size_t i = 0; i < cnt; i++) {
        br_hmac_context h;
        br_hmac_init(&h, &key[i].sec_key, 0);
        br_hmac_update(&h, signed_raw.p, signed_raw.len);
        br_hmac_out(&h, want);
        found |= (uint32_t)ct_eq(mac, want, 32) << i;
    }
    return found;
}

/* What a webhook's token says. */
struct claims {
    sl alg, iss, hash;
    bool join;
    struct js_int crit, exp, nbf;
};
#define AT(member) offsetof(struct claims, member)
static const struct js_field jwt_head_field[] = {
    { "alg", JS_STRING, AT(alg), NULL },
    { "crit", JS_INT, AT(crit), NULL } };   /* any value but null refuses */
static const struct js_table jwt_head_table = { jwt_head_field, 2, false,
    false };
static const struct js_field jwt_video_field[] = {
    { "roomJoin", JS_FLAG, AT(join), NULL } };
static const struct js_table jwt_video_table = { jwt_video_field, 1, false,
    false };
static const struct js_field jwt_claim_field[] = {
    { "iss", JS_STRING, AT(iss), NULL },
    { "sha256", JS_STRING, AT(hash), NULL },
    { "exp", JS_SECONDS, AT(exp), NULL },
    { "nbf", JS_SECONDS, AT(nbf), NULL },
    { "video", JS_OBJECT, 0, &jwt_video_table } };
static const struct js_table jwt_claim_table = { jwt_claim_field, 5, false,
    false };
#undef AT

/* Judge the token of a webhook (PROTOCOL section 10): HS256 by one of our
 * keys, its issuer, times with 60 s leeway. A join token shares the secret,
 * but has roomJoin and no sha256. body_sum gets the hash it vouches for.
 * GRANTS: that the SFU said what a body of that hash says.
 * Returns NULL, or what is wrong with it. */
MUST_USE static const char *jwt_check_webhook(sl token_raw,
    const struct api_key *key, size_t cnt, int64_t now_wall,
    uint8_t body_sum[36])
{
    struct claims c = { .join = false };
    uint8_t head[1024], body[3072];
    if (sl_starts(token_raw, SL("Bearer ")))
        token_raw = sl_skip(token_raw, 7);
    size_t a = sl_find(token_raw, '.');
    sl rest = sl_skip(token_raw, a + 1);
    size_t b = sl_find(rest, '.');
    sl mac = sl_skip(rest, b + 1);
    if (token_raw.len > 4096 || b == rest.len || sl_find(mac, '.') < mac.len)
        return "no token";
    if (!jwt_part((sl){ token_raw.p, a }, head, sizeof head, &jwt_head_table,
                  &c) || c.crit.is_set || c.crit.over
        || !sl_eq(c.alg, SL("HS256")))
        return "token header";
    uint32_t signers = jwt_signers((sl){ token_raw.p, a + 1 + b }, mac, key,
        cnt);
    if (signers == 0)
        return "signature";
    if (!jwt_part((sl){ rest.p, b }, body, sizeof body, &jwt_claim_table, &c))
        return "claims";
    size_t i = 0;
    while (i < cnt && !(signers >> i & 1 && sl_eq(c.iss, key[i].name)))
        i++;
    if (i == cnt)
        return "issuer";
    if ((c.exp.is_set && (c.exp.over || now_wall - 60 >= c.exp.v))
        || (c.nbf.is_set && (c.nbf.over || now_wall + 60 < c.nbf.v)))
        return "time";
    if (c.join)
        return "join token";
    if (c.hash.len != 44 || b64_parse(c.hash, true, body_sum) != 32)
        return "no body hash";
    return NULL;
}

/* ==== 12 DER ======================= PART I: PURE =====================
 * Purpose  Certificates (RFC 5280): the checks that BearSSL's engine does
 *          not make; PEM; trust anchors and their packed form.
 * Trust    None: a peer's chain, an operator's file.
 * Limits   LIM_CERT_EXT, LIM_CHAIN_*, key sizes below.
 * INV-X1   What a certificate says is read once, here, from strict DER.
 * Refuses  Versions but 3, duplicate extensions, P-521, RSA outside
 *          2048-4096 bits, constraints of kinds we cannot judge.
 */

enum key_kind { KEY_NONE, KEY_RSA, KEY_P256, KEY_P384 };

/* A public key; slices borrow from the certificate. */
struct pub_key {
    enum key_kind kind;
    sl n, e;                 /* RSA, without leading zeros */
    sl q;                    /* EC point, uncompressed */
};

/* What we need of a certificate; slices borrow from its DER. */
struct cert {
    sl der;
    sl issuer, subject;      /* DER of the names, compared byte for byte */
    sl spki;                 /* for equality of keys */
    struct pub_key key;
    sl san, constraints;     /* extension values, empty when absent */
    int64_t not_after;       /* unix s */
    sl tbs;                  /* the signed part, with its header */
    const uint8_t *critical[2];      /* flag bytes of EKU, constraints */
    bool is_v1;
    bool has_basic, is_ca;
    bool has_usage, can_sign;        /* keyUsage, its digitalSignature */
    bool has_ext_usage, is_server;   /* EKU, serverAuth or any in it */
};

/* Take one element off *rest. Strict DER: definite, shortest length, tag
 * below 31. *body is its content, *whole (may be NULL) all of it. */
MUST_USE static bool der_take(sl *rest, uint8_t tag, sl *body, sl *whole)
{
    const uint8_t *p = rest->p;
    size_t len, head = 2;
    if (rest->len < 2 || p[0] != tag)
        return false;
    len = p[1];
    if (len > 0x80) {
        size_t n = len & 0x7f;
        if (n > 3 || rest->len < 2 + n || p[2] == 0)
            return false;
        len = 0;
        for (size_t k = 0; k < n; k++)
            len = len << 8 | p[2 + k];
        if (len < 0x80)
            return false;
        head += n;
    } else if (len == 0x80) {
        return false;
    }
    if (len > rest->len - head)
        return false;
    *body = (sl){ p + head, len };
    if (whole)
        *whole = (sl){ p, head + len };
    *rest = sl_skip(*rest, head + len);
    return true;
}

/* A positive INTEGER without its leading zero byte. */
MUST_USE static bool der_positive(sl *rest, sl *out)
{
    if (!der_take(rest, 0x02, out, NULL) || out->len == 0
        || out->p[0] & 0x80)
        return false;
    if (out->p[0] == 0) {
        if (out->len < 2 || !(out->p[1] & 0x80))
            return false;
        *out = sl_skip(*out, 1);
    }
    return true;
}

/* Days from 1970-01-01 of a Gregorian date. */
static int64_t days_from_civil(int64_t y, unsigned m, unsigned d)
{
    y -= m <= 2;
    int64_t era = (y >= 0 ? y : y - 399) / 400;
    unsigned yoe = (unsigned)(y - era * 400);
    unsigned doy = (153 * (m > 2 ? m - 3 : m + 9) + 2) / 5 + d - 1;
    return era * 146097 + yoe * 365 + yoe / 4 - yoe / 100 + doy - 719468;
}

/* UTCTime or GeneralizedTime, seconds present, Z. */
MUST_USE static bool der_time(sl *rest, int64_t *out)
{
    sl t;
    bool utc = rest->len && rest->p[0] == 0x17;
    size_t yl = utc ? 2 : 4;
    uint64_t v[6] = { 0 };
    if (!der_take(rest, utc ? 0x17 : 0x18, &t, NULL) || t.len != yl + 11
        || t.p[t.len - 1] != 'Z')
        return false;
    for (size_t k = 0, at = 0; k < 6; k++) {
        size_t n = k ? 2 : yl;
        if (!sl_u64((sl){ t.p + at, n }, 9999, &v[k]))
            return false;
        at += n;
    }
    if (utc)
        v[0] += v[0] < 50 ? 2000 : 1900;
    if (v[1] < 1 || v[1] > 12 || v[2] < 1 || v[2] > 31 || v[3] > 23
        || v[4] > 59 || v[5] > 60)
        return false;
    *out = days_from_civil((int64_t)v[0], (unsigned)v[1], (unsigned)v[2])
        * 86400 + (int64_t)(v[3] * 3600 + v[4] * 60 + v[5]);
    return true;
}

static const uint8_t oid_rsa[] = { 42, 134, 72, 134, 247, 13, 1, 1, 1 };
static const uint8_t oid_ec[] = { 42, 134, 72, 206, 61, 2, 1 };
static const uint8_t oid_p256[] = { 42, 134, 72, 206, 61, 3, 1, 7 };
static const uint8_t oid_p384[] = { 43, 129, 4, 0, 34 };
static const uint8_t oid_server_auth[] = { 43, 6, 1, 5, 5, 7, 3, 1 };
static const uint8_t oid_any_usage[] = { 85, 29, 37, 0 };
#define OID(a) ((sl){ (a), sizeof(a) })

/* Read a SubjectPublicKeyInfo body. Unsupported keys give KEY_NONE; false
 * is malformed DER. */
MUST_USE static bool der_key(sl spki_raw, struct pub_key *out)
{
    sl alg, oid, params, bits, seq;
    *out = (struct pub_key){ .kind = KEY_NONE };
    if (!der_take(&spki_raw, 0x30, &alg, NULL)
        || !der_take(&alg, 0x06, &oid, NULL)
        || !der_take(&spki_raw, 0x03, &bits, NULL) || spki_raw.len
        || bits.len < 1 || bits.p[0] != 0)
        return false;
    bits = sl_skip(bits, 1);
    if (sl_eq(oid, OID(oid_rsa))) {
        if (!der_take(&bits, 0x30, &seq, NULL) || bits.len
            || !der_positive(&seq, &out->n) || !der_positive(&seq, &out->e)
            || seq.len)
            return false;
        size_t n_len = out->n.len;
        bool big = n_len > 256 || (n_len == 256 && out->n.p[0] & 0x80);
        bool e_ok = out->e.len <= 4 && out->e.p[out->e.len - 1] & 1
            && (out->e.len > 1 || out->e.p[0] >= 3);
        if (big && n_len <= 512 && e_ok)
            out->kind = KEY_RSA;
    } else if (sl_eq(oid, OID(oid_ec))) {
        if (!der_take(&alg, 0x06, &params, NULL) || alg.len)
            return false;
        bool p256 = sl_eq(params, OID(oid_p256));
        bool p384 = sl_eq(params, OID(oid_p384));
        if ((p256 && bits.len == 65) || (p384 && bits.len == 97)) {
            if (bits.p[0] != 4)
                return false;
            out->kind = p256 ? KEY_P256 : KEY_P384;
            out->q = bits;
        }
    }
    return true;
}

/* Note one extension's meaning; `last` is the third arc under 2.5.29.
 * False if malformed. */
MUST_USE static bool cert_extension(struct cert *c, uint8_t last, sl value)
{
    sl seq, bits, oid, flag;
    switch (last) {
    case 17:
        return der_take(&value, 0x30, &c->san, NULL) && !value.len
            && c->san.len;
    case 30:
        return der_take(&value, 0x30, &c->constraints, NULL) && !value.len
            && c->constraints.len;
    case 15:
        if (!der_take(&value, 0x03, &bits, NULL) || value.len
            || bits.len < 2 || bits.p[0] > 7)
            return false;
        c->has_usage = true;
        c->can_sign = (bits.p[1] & 0x80) != 0;
        return true;
    case 19:
        if (!der_take(&value, 0x30, &seq, NULL) || value.len)
            return false;
        c->has_basic = true;
        if (seq.len && seq.p[0] == 0x01) {
            if (!der_take(&seq, 0x01, &flag, NULL) || flag.len != 1)
                return false;
            c->is_ca = flag.p[0] == 0xff;
        }
        return true;
    case 37:
        if (!der_take(&value, 0x30, &seq, NULL) || value.len || !seq.len)
            return false;
        c->has_ext_usage = true;
        while (seq.len) {
            if (!der_take(&seq, 0x06, &oid, NULL))
                return false;
            c->is_server |= sl_eq(oid, OID(oid_server_auth))
                || sl_eq(oid, OID(oid_any_usage));
        }
        return true;
    default:
        return true;          /* BearSSL refuses unknown critical ones */
    }
}

/* Read the Extensions list: at most LIM_CERT_EXT, no OID twice. */
MUST_USE static bool cert_extensions(struct cert *c, sl list_raw)
{
    sl ext, oid, flag, value, seen[LIM_CERT_EXT];
    size_t cnt = 0;
    while (list_raw.len) {
        if (cnt == LIM_CERT_EXT || !der_take(&list_raw, 0x30, &ext, NULL)
            || !der_take(&ext, 0x06, &oid, NULL))
            return false;
        flag = (sl){ NULL, 0 };
        if (ext.len && ext.p[0] == 0x01
            && (!der_take(&ext, 0x01, &flag, NULL) || flag.len != 1))
            return false;
        if (!der_take(&ext, 0x04, &value, NULL) || ext.len)
            return false;
        for (size_t i = 0; i < cnt; i++)
            if (sl_eq(seen[i], oid))
                return false;
        seen[cnt++] = oid;
        if (oid.len != 3 || oid.p[0] != 85 || oid.p[1] != 29)
            continue;
        if (!cert_extension(c, oid.p[2], value))
            return false;
        if (flag.len && (oid.p[2] == 37 || oid.p[2] == 30))
            c->critical[oid.p[2] == 30] = flag.p;
    }
    return cnt > 0;
}

/* Read a certificate. With `anchor` old roots pass too: version 1 and odd
 * serials, since only their name and key count.
 * Trust    der_raw is unchecked.
 * Returns  false: not a certificate we judge. */
MUST_USE static bool cert_parse(sl der_raw, bool anchor, struct cert *c)
{
    sl seq, tbs, alg, inner, bits, num, part, validity;
    int64_t not_before;
    *c = (struct cert){ .der = der_raw };
    if (!der_take(&der_raw, 0x30, &seq, NULL) || der_raw.len
        || !der_take(&seq, 0x30, &tbs, &c->tbs)
        || !der_take(&seq, 0x30, &part, &alg)
        || !der_take(&seq, 0x03, &bits, NULL) || seq.len)
        return false;
    c->is_v1 = !der_take(&tbs, 0xa0, &part, NULL);
    if (!c->is_v1 && (!der_positive(&part, &num) || part.len || num.len != 1
                      || num.p[0] != 2))
        return false;
    if (!anchor && c->is_v1)
        return false;
    if (anchor ? !der_take(&tbs, 0x02, &num, NULL)
               : !der_positive(&tbs, &num) || num.len > 20)
        return false;
    if (!der_take(&tbs, 0x30, &part, &inner) || !sl_eq(inner, alg)
        || !der_take(&tbs, 0x30, &part, &c->issuer)
        || !der_take(&tbs, 0x30, &validity, NULL)
        || !der_time(&validity, &not_before)
        || !der_time(&validity, &c->not_after) || validity.len
        || !der_take(&tbs, 0x30, &part, &c->subject)
        || !der_take(&tbs, 0x30, &c->spki, NULL)
        || !der_key(c->spki, &c->key))
        return false;
    for (uint8_t tag = 0x81; tag <= 0x82; tag++)     /* unique ids */
        if (tbs.len && tbs.p[0] == tag
            && !der_take(&tbs, tag, &part, NULL))
            return false;
    if (tbs.len == 0)
        return true;
    return !c->is_v1 && der_take(&tbs, 0xa3, &part, NULL) && !tbs.len
        && der_take(&part, 0x30, &seq, NULL) && !part.len
        && cert_extensions(c, seq);
}

/* One dNSName pattern against a host name (RFC 6125 section 6.4): ASCII
 * case-blind; `*` only as the whole first label, for exactly one label,
 * with at least two labels behind it. */
static bool cert_dns_match(sl pattern_raw, sl host)
{
    for (size_t i = 0; i < pattern_raw.len; i++)
        if (pattern_raw.p[i] <= 0x20 || pattern_raw.p[i] >= 0x7f)
            return false;
    if (sl_ends(host, SL(".")))
        host.len--;
    if (!sl_starts(pattern_raw, SL("*.")))
        return pattern_raw.len && sl_ieq(pattern_raw, host);
    sl tail = sl_skip(pattern_raw, 1);
    size_t dot = sl_find(host, '.');
    return sl_find(sl_skip(tail, 1), '.') < tail.len - 1
        && dot > 0 && sl_ieq(tail, sl_skip(host, dot));
}

/* Whether the SAN names the peer we dialled: a host name, or an address
 * as iPAddress. The common name never counts.
 * GRANTS: that this peer may speak for the name. */
MUST_USE static bool cert_names_peer(const struct cert *c,
    const struct name *peer)
{
    sl rest = c->san, body;
    while (rest.len) {
        uint8_t tag = rest.p[0];
        if (!der_take(&rest, tag, &body, NULL))
            return false;
        if (tag == 0x82 && !peer->is_ip && cert_dns_match(body, peer->host))
            return true;
        if (tag == 0x87 && peer->is_ip
            && sl_eq(body, (sl){ peer->ip.b, peer->ip.v6 ? 16 : 4 }))
            return true;
    }
    return false;
}

/* Whether a dNSName lies in a subtree (RFC 5280 section 4.2.1.10). A
 * subtree with a leading dot holds only names below it. */
static bool cert_dns_within(sl name, sl tree)
{
    if (sl_ends(name, SL(".")))
        name.len--;
    if (tree.len == 0)
        return true;
    if (name.len < tree.len
        || !sl_ieq(sl_skip(name, name.len - tree.len), tree))
        return false;
    return name.len == tree.len ? tree.p[0] != '.' || name.p[0] == '.'
        : tree.p[0] == '.' || name.p[name.len - tree.len - 1] == '.';
}

/* Whether an address lies in a subtree of address and mask. */
static bool cert_ip_within(sl addr, sl tree)
{
    if (tree.len != addr.len * 2)
        return false;
    for (size_t i = 0; i < addr.len; i++)
        if ((addr.p[i] ^ tree.p[i]) & tree.p[addr.len + i])
            return false;
    return true;
}

/* Judge one name (tag 0x82 or 0x87) by one list of subtrees. *listed: the
 * list has trees of its kind; *hit: one holds it. False if malformed or of
 * a kind we cannot judge. */
MUST_USE static bool cert_subtrees(sl list, uint8_t tag, sl name,
    bool *listed, bool *hit)
{
    sl tree, base;
    *listed = *hit = false;
    while (list.len) {
        if (!der_take(&list, 0x30, &tree, NULL) || tree.len == 0)
            return false;
        uint8_t kind = tree.p[0];
        if ((kind != 0x82 && kind != 0x87)
            || !der_take(&tree, kind, &base, NULL) || tree.len)
            return false;
        if (kind == 0x87 && base.len != 8 && base.len != 32)
            return false;
        if (kind != tag)
            continue;
        /* a v4 address is no member of a v6 tree, but is constrained */
        *listed = true;
        *hit |= tag == 0x82 ? cert_dns_within(name, base)
                            : cert_ip_within(name, base);
    }
    return true;
}

/* Judge one name by a nameConstraints value: inside the permitted trees of
 * its kind, if any, and outside the excluded ones. */
MUST_USE static bool cert_permits(sl constraints, uint8_t tag, sl name)
{
    sl permitted = { NULL, 0 }, excluded = { NULL, 0 };
    bool listed, hit;
    if (constraints.len && constraints.p[0] == 0xa0
        && !der_take(&constraints, 0xa0, &permitted, NULL))
        return false;
    if (constraints.len && !der_take(&constraints, 0xa1, &excluded, NULL))
        return false;
    if (constraints.len
        || !cert_subtrees(permitted, tag, name, &listed, &hit)
        || (listed && !hit)
        || !cert_subtrees(excluded, tag, name, &listed, &hit))
        return false;
    return !hit;
}

/* Whether all names of the leaf, and the peer's own, keep to an issuer's
 * constraints. A wildcard stands for its parent, and the peer's name for
 * what the wildcard was used for. */
MUST_USE static bool cert_keeps_to(const struct cert *leaf, sl constraints,
    const struct name *peer)
{
    sl rest = leaf->san, body;
    if (constraints.len == 0)
        return true;
    if (!peer->is_ip && !cert_permits(constraints, 0x82, peer->host))
        return false;
    while (rest.len) {
        uint8_t tag = rest.p[0];
        if (!der_take(&rest, tag, &body, NULL))
            return false;
        if (tag == 0x82 && sl_starts(body, SL("*.")))
            body = sl_skip(body, 1);
        if ((tag == 0x82 || tag == 0x87)
            && !cert_permits(constraints, tag, body))
            return false;
    }
    return true;
}

/* Take the next certificate out of PEM text (RFC 7468). Other blocks and
 * text between are skipped.
 * Returns  1 *der borrows from work; 0 no more; -1 a damaged block. */
MUST_USE static int pem_parse(sl *rest_raw, uint8_t *work, size_t cap,
    sl *der)
{
    static const char begin[] = "-----BEGIN CERTIFICATE-----";
    static const char end[] = "-----END CERTIFICATE-----";
    for (;;) {
        if (rest_raw->len == 0)
            return 0;
        size_t n = sl_find(*rest_raw, '\n');
        sl line = sl_trim((sl){ rest_raw->p, n });
        *rest_raw = sl_skip(*rest_raw, n + 1);
        if (sl_eq(line, SL(begin)))
            break;
    }
    size_t len = 0, held = 0;
    uint8_t quad[4];
    for (;;) {
        size_t n = sl_find(*rest_raw, '\n');
        sl line = sl_trim((sl){ rest_raw->p, n });
        if (rest_raw->len == 0)
            return -1;
        *rest_raw = sl_skip(*rest_raw, n + 1);
        if (sl_eq(line, SL(end)))
            break;
        for (size_t i = 0; i < line.len; i++) {
            quad[held++] = line.p[i];
            if (held < 4)
                continue;
            int got = len + 3 > cap ? -1
                : b64_parse((sl){ quad, 4 }, true, work + len);
            if (got < 0)
                return -1;
            len += (size_t)got;
            held = 0;
        }
    }
    *der = (sl){ work, len };
    return held ? -1 : 1;
}

/* A trust anchor. Packed: length of all behind it (2 bytes), is_ca (1),
 * kind (1), then name, first and second key part, name constraints, each
 * with a 2-byte length. */
struct anchor {
    bool is_ca;
    struct pub_key key;
    sl name, constraints;
};

static void bb_block(struct bb *b, sl s)
{
    bb_put(b, (sl){ (uint8_t[2]){ (uint8_t)(s.len >> 8), (uint8_t)s.len },
        2 });
    bb_put(b, s);
}

/* Append the packed anchor of a certificate. False, nothing appended, if
 * its key is unsupported or the builder is full. */
MUST_USE static bool anchor_put(struct bb *b, const struct cert *c)
{
    size_t from = b->len;
    bool is_ca = c->is_v1 || (c->has_basic && c->is_ca);
    if (c->key.kind == KEY_NONE || b->over)
        return false;
    bb_put(b, (sl){ (uint8_t[4]){ 0, 0, is_ca, (uint8_t)c->key.kind }, 4 });
    bb_block(b, c->subject);
    bb_block(b, c->key.kind == KEY_RSA ? c->key.n : c->key.q);
    bb_block(b, c->key.e);
    bb_block(b, c->constraints);
    if (b->over || b->len - from > 65535) {
        b->over = false;
        b->len = from;
        return false;
    }
    b->p[from] = (uint8_t)((b->len - from - 2) >> 8);
    b->p[from + 1] = (uint8_t)(b->len - from - 2);
    return true;
}

/* Take a 2-byte length and that many bytes off *rest. */
MUST_USE static bool block_take(sl *rest, sl *out)
{
    if (rest->len < 2 || be16(rest->p) > rest->len - 2)
        return false;
    *out = (sl){ rest->p + 2, be16(rest->p) };
    *rest = sl_skip(*rest, 2 + out->len);
    return true;
}

/* Take the next packed anchor off *rest. False at the end. */
MUST_USE static bool anchor_take(sl *rest, struct anchor *a)
{
    sl body, key, e;
    if (!block_take(rest, &body) || body.len < 2)
        return false;
    *a = (struct anchor){ .is_ca = body.p[0] == 1 };
    a->key.kind = (enum key_kind)body.p[1];
    body = sl_skip(body, 2);
    if (!block_take(&body, &a->name) || !block_take(&body, &key)
        || !block_take(&body, &e) || !block_take(&body, &a->constraints))
        return false;
    if (a->key.kind == KEY_RSA) {
        a->key.n = key;
        a->key.e = e;
    } else {
        a->key.q = key;
    }
    return true;
}

/* Whether the set holds an anchor of the same packed bytes. */
static bool anchor_has(sl set, sl packed)
{
    sl body;
    while (block_take(&set, &body))
        if (sl_eq(body, sl_skip(packed, 2)))
            return true;
    return false;
}

/* ==== 13 FORMATS =================== PART I: PURE =====================
 * Purpose  Small file and wire formats: hosts, resolv.conf, LiveKit key
 *          files, protobuf of the SFU calls, HTTP and RFC 3339 times.
 * Trust    Files are the operator's; HTTP fields and protobuf are peers'.
 */

/* Append the addresses of one family that a hosts file gives for name.
 * Returns how many were stored, at most cap. */
static size_t cf_hosts_find(sl text, sl name, bool v6, struct ip *out,
    size_t cap)
{
    size_t cnt = 0;
    if (sl_ends(name, SL(".")))
        name.len--;
    while (text.len && cnt < cap) {
        size_t n = sl_find(text, '\n');
        sl line = { text.p, n }, word;
        text = sl_skip(text, n + 1);
        line.len = sl_find(line, '#');
        struct ip a;
        if (!sl_word(&line, " \t\r", &word) || !ip_parse(word, &a)
            || a.v6 != v6)
            continue;
        while (sl_word(&line, " \t\r", &word))
            if (sl_ieq(word, name)) {
                out[cnt++] = a;
                break;
            }
    }
    return cnt;
}

/* Whether a hosts file knows the name in either family. */
static bool cf_hosts_has(sl text, sl name)
{
    struct ip a;
    return cf_hosts_find(text, name, false, &a, 1)
        + cf_hosts_find(text, name, true, &a, 1) > 0;
}

/* Read one `options` word of the form key:number, clamped. */
static void cf_resolv_option(sl word, struct resolv *r)
{
    size_t cut = sl_find(word, ':');
    sl key = { word.p, cut };
    uint64_t v;
    if (!sl_u64(sl_skip(word, cut + 1), 1000000, &v))
        return;
    if (sl_eq(key, SL("ndots")))
        r->ndots = (uint8_t)(v > 15 ? 15 : v);
    else if (sl_eq(key, SL("timeout")))
        r->timeout_ms = (int32_t)(v < 1 ? 1 : v > 30 ? 30 : v) * 1000;
    else if (sl_eq(key, SL("attempts")))
        r->attempts = (uint8_t)(v < 1 ? 1 : v > 5 ? 5 : v);
}

/* Note a search list; the last `search` or `domain` line wins. */
static void cf_resolv_search(sl line, struct resolv *r)
{
    sl word;
    r->search_cnt = 0;
    while (r->search_cnt < LIM_SEARCH_CNT && sl_word(&line, " \t\r", &word)) {
        if (word.len > 253)
            continue;
        r->search[r->search_cnt].len = (uint8_t)word.len;
        memcpy(r->search[r->search_cnt++].text, word.p, word.len);
    }
}

/* Read resolv.conf text. Unknown lines and options are ignored, a
 * nameserver with a zone (fe80::1%eth0) too. Without a nameserver the
 * local one is asked, as resolv.conf(5) says. */
static void cf_resolv_parse(sl text, struct resolv *r)
{
    *r = (struct resolv){ .ndots = 1, .attempts = 2, .timeout_ms = 1500 };
    while (text.len) {
        size_t n = sl_find(text, '\n');
        sl line = { text.p, n }, word;
        text = sl_skip(text, n + 1);
        if (!sl_word(&line, " \t\r", &word) || strchr("#;", word.p[0]))
            continue;
        if (sl_eq(word, SL("search")) || sl_eq(word, SL("domain")))
            cf_resolv_search(line, r);
        else if (sl_eq(word, SL("options")))
            while (sl_word(&line, " \t\r", &word))
                cf_resolv_option(word, r);
        else if (sl_eq(word, SL("nameserver"))
                 && r->server_cnt < LIM_SERVER_CNT
                 && sl_word(&line, " \t\r", &word)
                 && ip_parse(word, &r->server[r->server_cnt].ip))
            r->server[r->server_cnt++].port = 53;
    }
    if (r->server_cnt == 0)
        r->server[r->server_cnt++] = (struct addr){
            .ip = { .b = { 127, 0, 0, 1 } }, .port = 53 };
}

/* Parse `ip`, `ip:port` or `[v6]:port` with a default port. */
MUST_USE static bool addr_parse(sl s_raw, uint16_t port, struct addr *out)
{
    struct name n;
    out->port = port;
    if (ip_parse(s_raw, &out->ip))
        return true;
    if (!name_parse(s_raw, &n) || !n.is_ip)
        return false;
    out->ip = n.ip;
    if (n.port)
        out->port = n.port;
    return true;
}

/* One line of a LiveKit key file, `key: secret`. 1 a pair, 0 blank or a
 * comment, -1 not exactly one `:` or an empty side. */
MUST_USE static int cf_key_line(sl line, sl *key, sl *secret)
{
    line = sl_trim(line);
    if (line.len == 0 || line.p[0] == '#')
        return 0;
    size_t cut = sl_find(line, ':');
    *key = sl_trim((sl){ line.p, cut });
    *secret = sl_trim(sl_skip(line, cut + 1));
    return cut < line.len && key->len && secret->len
        && sl_find(*secret, ':') == secret->len ? 1 : -1;
}

/* One scalar of a YAML file, as far as we read YAML: plain, or in quotes
 * without escapes; a comment may follow. False: something else. */
MUST_USE static bool cf_yaml_scalar(sl s_raw, sl *out)
{
    s_raw = sl_trim(s_raw);
    uint8_t q = s_raw.len ? s_raw.p[0] : 0;
    if (q == '"' || q == '\'') {
        size_t n = sl_find(sl_skip(s_raw, 1), q);
        sl rest = sl_skip(s_raw, n + 2), tail = sl_trim(rest);
        *out = (sl){ s_raw.p + 1, n };
        return n + 2 <= s_raw.len && (q == '\'' || sl_find(*out, '\\') == n)
            && (tail.len == 0 || (tail.p[0] == '#' && rest.p != tail.p));
    }
    *out = s_raw;
    for (size_t i = 0; i < s_raw.len; i++) {
        bool blank = i == 0 || s_raw.p[i - 1] == ' ';
        if (s_raw.p[i] == '#' && blank) {
            *out = sl_trim((sl){ s_raw.p, i });
            break;
        }
        if (s_raw.p[i] < 0x20 || s_raw.p[i] > 0x7e || (s_raw.p[i] == ':'
                && (i + 1 == s_raw.len || s_raw.p[i + 1] == ' ')))
            return false;
    }
    return out->len == 0 || (!strchr("[]{},&*!|>%@`", out->p[0])
        && !(strchr("-?:", out->p[0]) && (out->len == 1
                                          || out->p[1] == ' ')));
}

/* What we read of a registration (YAML): three strings of its top level. */
struct registration { sl id, as_token, hs_token; };

/* Read one. A line is blank, a comment, `key: scalar`, or deeper in what an
 * empty `key:` began: `- scalar` or `key: scalar` in any depth. For other
 * keys than ours a scalar may be a list or map in brackets on its line.
 * Returns  0, or the number of the first line that is something else. */
MUST_USE static unsigned cf_registration(sl text, struct registration *r)
{
    const struct { sl key; sl *to; } tab[] = { { SL("id"), &r->id },
        { SL("as_token"), &r->as_token }, { SL("hs_token"), &r->hs_token } };
    bool is_open = false;                /* deeper lines may follow */
    memset(r, 0, sizeof *r);
    for (unsigned number = 1; text.len; number++) {
        size_t n = sl_find(text, '\n'), in = 0, cut = 0;
        sl line = { text.p, n }, value = { NULL, 0 };
        text = sl_skip(text, n + 1);
        if (sl_ends(line, SL("\r")))
            line.len--;
        while (in < line.len && line.p[in] == ' ')
            in++;
        sl rest = sl_skip(line, in);
        if (rest.len == 0 || rest.p[0] == '#'
            || (number == 1 && sl_eq(line, SL("---"))))
            continue;
        bool is_item = sl_starts(rest, SL("- "));
        while (sl_starts(rest, SL("- ")))
            rest = sl_trim(sl_skip(rest, 2));
        while (cut < rest.len && (is_alnum(rest.p[cut])
                   || strchr("_.-", rest.p[cut])))
            cut++;
        sl key = { rest.p, cut }, tail = sl_skip(rest, cut + 1);
        bool is_pair = cut > 0 && cut < rest.len && rest.p[cut] == ':'
            && (tail.len == 0 || tail.p[0] == ' ');
        sl plain = sl_trim(is_pair ? tail : rest);
        bool is_flow = (sl_starts(plain, SL("[")) && sl_ends(plain, SL("]")))
            || (sl_starts(plain, SL("{")) && sl_ends(plain, SL("}")));
        if (((in > 0 || is_item) && !is_open) || (!is_pair && !is_item)
            || (!is_flow && !cf_yaml_scalar(plain, &value)))
            return number;
        if (in > 0 || is_item)
            continue;
        is_open = plain.len == 0;
        for (size_t i = 0; i < COUNT_OF(tab); i++)
            if (sl_eq(key, tab[i].key)) {
                bool is_null = value.p == plain.p && (sl_eq(value, SL("null"))
                    || sl_eq(value, SL("~")));
                if (tab[i].to->p || is_flow || is_null || value.len == 0)
                    return number;
                *tab[i].to = value;
            }
    }
    return 0;
}

/* Whether a token can stand in a header: no blank, control or non-ASCII. */
static bool cf_token_check(sl s_raw)
{
    for (size_t i = 0; i < s_raw.len; i++)
        if (s_raw.p[i] < 0x21 || s_raw.p[i] > 0x7e)
            return false;
    return s_raw.len > 0 && s_raw.len <= LIM_OTHER_LEN;
}

/* CreateRoomRequest: name 1, empty_timeout 2 = 300 s, departure_timeout
 * 10 = 20 s (PROTOCOL section 11). The alias is HASH_NAME_LEN bytes. */
static void pb_create_room(struct bb *b, sl alias)
{
    bb_byte(b, 0x0a);
    bb_byte(b, (uint8_t)alias.len);
    bb_put(b, alias);
    bb_put(b, (sl){ (uint8_t[5]){ 0x10, 0xac, 0x02, 0x50, 0x14 }, 5 });
}

/* Append a bytes or string field: tag, length as a varint, text. */
static void pb_put(struct bb *b, uint8_t tag, sl text)
{
    size_t n = text.len;
    bb_byte(b, tag);
    for (; n > 127; n >>= 7)
        bb_byte(b, (uint8_t)(n | 128));
    bb_byte(b, (uint8_t)n);
    bb_put(b, text);
}

/* RoomParticipantIdentity: room 1, identity 2. */
static void pb_participant(struct bb *b, sl alias, sl identity)
{
    pb_put(b, 0x0a, alias);
    pb_put(b, 0x12, identity);
}

/* Read a protobuf varint. */
MUST_USE static bool pb_varint(sl *rest_raw, uint64_t *out)
{
    *out = 0;
    for (unsigned shift = 0; shift < 64 && rest_raw->len; shift += 7) {
        uint8_t c = rest_raw->p[0];
        *rest_raw = sl_skip(*rest_raw, 1);
        *out |= (uint64_t)(c & 0x7f) << shift;
        if (!(c & 0x80))
            return true;
    }
    return false;
}

/* What we read of a ParticipantInfo. */
struct participant { sl sid, identity; uint64_t state; };

/* Read a ParticipantInfo: sid 1, identity 2, state 3; the rest is dropped.
 * False if malformed. */
MUST_USE static bool pb_participant_parse(sl rest_raw, struct participant *p)
{
    *p = (struct participant){ .state = 0 };
    while (rest_raw.len) {
        uint64_t key, v = 0;
        if (!pb_varint(&rest_raw, &key))
            return false;
        unsigned type = key & 7;
        if (type == 0) {
            if (!pb_varint(&rest_raw, &v))
                return false;
            if (key >> 3 == 3)
                p->state = v;
            continue;
        }
        if (type == 2 && !pb_varint(&rest_raw, &v))
            return false;
        if (type != 1 && type != 2 && type != 5)
            return false;
        v = type == 1 ? 8 : type == 5 ? 4 : v;
        if (v > rest_raw.len)
            return false;
        if (key == (1 << 3 | 2))
            p->sid = (sl){ rest_raw.p, (size_t)v };
        else if (key == (2 << 3 | 2))
            p->identity = (sl){ rest_raw.p, (size_t)v };
        rest_raw = sl_skip(rest_raw, (size_t)v);
    }
    return true;
}

/* LiveKit's DisconnectReason by name or number; unknown ones are 0. */
static unsigned disconnect_reason(sl text)
{
    static const char *const name[] = { "UNKNOWN_REASON", "CLIENT_INITIATED",
        "DUPLICATE_IDENTITY", "SERVER_SHUTDOWN", "PARTICIPANT_REMOVED",
        "ROOM_DELETED", "STATE_MISMATCH", "JOIN_FAILURE", "MIGRATION",
        "SIGNAL_CLOSE", "ROOM_CLOSED" };
    uint64_t v;
    if (sl_u64(text, 255, &v))
        return (unsigned)v;
    for (unsigned i = 0; i < COUNT_OF(name); i++)
        if (sl_eq(text, sl_str(name[i])))
            return i;
    return 0;
}

struct civil { int64_t year; unsigned month, day, hour, min, sec, weekday; };

/* Gregorian calendar of a unix time; weekday 0 is Sunday. */
static struct civil civil_from(int64_t wall)
{
    int64_t days = wall / 86400, rem = wall % 86400;
    if (rem < 0) {
        rem += 86400;
        days--;
    }
    struct civil c = { .hour = (unsigned)(rem / 3600),
        .min = (unsigned)(rem / 60 % 60), .sec = (unsigned)(rem % 60),
        .weekday = (unsigned)((days % 7 + 11) % 7) };
    int64_t z = days + 719468, era = (z >= 0 ? z : z - 146096) / 146097;
    unsigned doe = (unsigned)(z - era * 146097);
    unsigned yoe = (doe - doe / 1460 + doe / 36524 - doe / 146096) / 365;
    unsigned doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    unsigned mp = (5 * doy + 2) / 153;
    c.day = doy - (153 * mp + 2) / 5 + 1;
    c.month = mp < 10 ? mp + 3 : mp - 9;
    c.year = (int64_t)yoe + era * 400 + (c.month <= 2);
    return c;
}

static const char month_tab[] = "JanFebMarAprMayJunJulAugSepOctNovDec";

static void bb_two(struct bb *b, unsigned v)
{
    bb_byte(b, (uint8_t)('0' + v / 10 % 10));
    bb_byte(b, (uint8_t)('0' + v % 10));
}

/* Append hh:mm:ss. */
static void bb_clock(struct bb *b, const struct civil *c)
{
    bb_two(b, c->hour);
    bb_byte(b, ':');
    bb_two(b, c->min);
    bb_byte(b, ':');
    bb_two(b, c->sec);
}

/* Append an IMF-fixdate (RFC 9110 section 5.6.7). */
static void bb_http_date(struct bb *b, int64_t wall)
{
    static const char day_tab[] = "SunMonTueWedThuFriSat";
    struct civil c = civil_from(wall);
    bb_put(b, (sl){ (const uint8_t *)day_tab + 3 * c.weekday, 3 });
    bb_str(b, ", ");
    bb_two(b, c.day);
    bb_byte(b, ' ');
    bb_put(b, (sl){ (const uint8_t *)month_tab + 3 * (c.month - 1), 3 });
    bb_byte(b, ' ');
    bb_u64(b, (uint64_t)c.year);
    bb_byte(b, ' ');
    bb_clock(b, &c);
    bb_str(b, " GMT");
}

/* Append YYYY-MM-DDThh:mm:ss. */
static void bb_date(struct bb *b, const struct civil *c)
{
    unsigned y = (unsigned)c->year;
    bb_two(b, y / 100);
    bb_two(b, y % 100);
    bb_byte(b, '-');
    bb_two(b, c->month);
    bb_byte(b, '-');
    bb_two(b, c->day);
    bb_byte(b, 'T');
    bb_clock(b, c);
}

/* Append an RFC 3339 UTC time with milliseconds. */
static void bb_rfc3339(struct bb *b, int64_t wall_ms)
{
    struct civil c = civil_from(wall_ms / 1000);
    unsigned ms = (unsigned)(wall_ms % 1000);
    bb_date(b, &c);
    bb_byte(b, '.');
    bb_byte(b, (uint8_t)('0' + ms / 100));
    bb_two(b, ms % 100);
    bb_byte(b, 'Z');
}

/* Parse an IMF-fixdate; the obsolete forms count as malformed. */
MUST_USE static bool http_date_parse(sl s_raw, int64_t *out)
{
    uint64_t day, year, hour, min, sec;
    if (s_raw.len != 29 || !sl_ends(s_raw, SL(" GMT"))
        || !sl_u64((sl){ s_raw.p + 5, 2 }, 31, &day)
        || !sl_u64((sl){ s_raw.p + 12, 4 }, 9999, &year)
        || !sl_u64((sl){ s_raw.p + 17, 2 }, 23, &hour)
        || !sl_u64((sl){ s_raw.p + 20, 2 }, 59, &min)
        || !sl_u64((sl){ s_raw.p + 23, 2 }, 60, &sec))
        return false;
    for (unsigned m = 0; m < 12; m++)
        if (memcmp(s_raw.p + 8, month_tab + 3 * m, 3) == 0) {
            *out = days_from_civil((int64_t)year, m + 1, (unsigned)day)
                * 86400 + (int64_t)(hour * 3600 + min * 60 + sec);
            return true;
        }
    return false;
}

/* Milliseconds of a Retry-After field: seconds (negative is 0) or a date;
 * -1: neither. */
static int64_t retry_after_ms(sl v, int64_t now_wall)
{
    uint64_t n;
    int64_t at;
    bool negative = sl_starts(v, SL("-"));
    sl digits = sl_skip(v, negative);
    size_t i = 0;
    while (i < digits.len && digits.p[i] >= '0' && digits.p[i] <= '9')
        i++;
    if (i > 0 && i == digits.len)
        return negative ? 0 : sl_u64(digits, 86400, &n) ? (int64_t)n * 1000
            : 86400000;
    if (!http_date_parse(v, &at))
        return -1;
    return at <= now_wall ? 0 : at - now_wall > 86400 ? 86400000
        : (at - now_wall) * 1000;
}

/* Seconds a reply may be cached: max-age, else Expires, else `other`.
 * no-store and no-cache count as 0; the caller clamps. */
static int64_t cache_seconds(sl cache_control, sl expires, int64_t now_wall,
    int64_t other)
{
    sl word;
    int64_t age = -1;
    while (sl_word(&cache_control, ", \t", &word)) {
        uint64_t v;
        size_t cut = sl_find(word, '=');
        sl key = { word.p, cut };
        if (sl_ieq(key, SL("no-store")) || sl_ieq(key, SL("no-cache")))
            return 0;
        if (sl_ieq(key, SL("max-age"))
            && sl_u64(sl_skip(word, cut + 1), INT64_MAX, &v) && age < 0)
            age = (int64_t)v;
    }
    int64_t at;
    if (age >= 0)
        return age;
    if (expires.len == 0)
        return other;
    return http_date_parse(expires, &at) ? at - now_wall : 0;
}

/* Digits [at, at + n) of s_raw as a number in [min, max]. */
MUST_USE static bool digits_at(sl s_raw, size_t at, size_t n, uint64_t min,
    uint64_t max, uint64_t *out)
{
    return at + n <= s_raw.len && sl_u64((sl){ s_raw.p + at, n }, max, out)
        && *out >= min;
}

/* Parse an RFC 3339 time (section 5.6) into unix seconds and nanoseconds.
 * `T` and `Z` are upper case; digits of the fraction beyond 9 are dropped;
 * a day must be in its month; a leap second counts as the next second. */
MUST_USE static bool rfc3339_parse(sl s_raw, int64_t *sec, uint32_t *ns)
{
    static const uint8_t days[] = { 31, 29, 31, 30, 31, 30, 31, 31, 30, 31,
        30, 31 };
    uint64_t y, mon, d, h, min, s, oh = 0, om = 0;
    uint32_t scale = 100000000;
    if (!digits_at(s_raw, 0, 4, 0, 9999, &y)
        || !digits_at(s_raw, 5, 2, 1, 12, &mon)
        || !digits_at(s_raw, 8, 2, 1, days[mon - 1], &d)
        || !digits_at(s_raw, 11, 2, 0, 23, &h)
        || !digits_at(s_raw, 14, 2, 0, 59, &min)
        || !digits_at(s_raw, 17, 2, 0, 60, &s))
        return false;
    bool leap = (y % 4 == 0 && y % 100 != 0) || y % 400 == 0;
    if (s_raw.p[4] != '-' || s_raw.p[7] != '-' || s_raw.p[10] != 'T'
        || s_raw.p[13] != ':' || s_raw.p[16] != ':'
        || (mon == 2 && d == 29 && !leap))
        return false;
    sl rest = sl_skip(s_raw, 19);
    *ns = 0;
    if (sl_starts(rest, SL("."))) {
        size_t n = 1;
        for (; n < rest.len && rest.p[n] >= '0' && rest.p[n] <= '9'; n++) {
            *ns += scale * (uint32_t)(rest.p[n] - '0');
            scale /= 10;
        }
        if (n == 1)
            return false;
        rest = sl_skip(rest, n);
    }
    bool west = sl_starts(rest, SL("-"));
    if (!sl_eq(rest, SL("Z"))
        && (rest.len != 6 || !(west || rest.p[0] == '+') || rest.p[3] != ':'
            || !digits_at(rest, 1, 2, 0, 23, &oh)
            || !digits_at(rest, 4, 2, 0, 59, &om)))
        return false;
    int64_t offset = (int64_t)(oh * 3600 + om * 60);
    *sec = days_from_civil((int64_t)y, (unsigned)mon, (unsigned)d) * 86400
        + (int64_t)(h * 3600 + min * 60 + s) + (west ? offset : -offset);
    return true;
}

/* Append an RFC 3339 time but for its Z, trailing zeros trimmed: as text
 * the earlier one is the lesser. */
static void bb_moment(struct bb *b, int64_t sec, uint32_t ns)
{
    struct civil c = civil_from(sec);
    bb_date(b, &c);
    bb_str(b, ns ? "." : "");
    for (uint32_t div = 100000000; ns; ns %= div, div /= 10)
        bb_byte(b, (uint8_t)('0' + ns / div));
}

static void bb_moment_ms(struct bb *b, int64_t wall_ms)
{
    bb_moment(b, wall_ms / 1000, (uint32_t)(wall_ms % 1000) * 1000000);
}

/* A delegated leave as it is stored (PROTOCOL section 12): field and value
 * of the hash lk-jwt:jobs. The last five are ours: readers that do not
 * know them pass over them. */
struct record {
    sl delay_id, server, alias, identity;
    int64_t timeout_ms;              /* 0 or less: expired */
    int64_t restarted_s;             /* unix time */
    uint32_t restarted_ns;
    sl identity2, sid, owner;        /* owner: of an application service */
    bool is_connected;
    int64_t delegated_ms;            /* unix time; written if it differs */
};

/* Append the field: the key of a job as canonical JSON. */
static void rec_put_field(struct bb *b, sl alias, sl identity)
{
    bb_byte(b, '[');
    js_put_str(b, alias, false);
    bb_byte(b, ',');
    js_put_str(b, identity, false);
    bb_byte(b, ']');
}

/* Append the value, bytes and order as lk-jwt-service writes them. */
static void rec_put(struct bb *b, const struct record *r)
{
    struct { const char *name; sl value; } part[] = {
        { "{\"Params\":{\"DelayId\":", r->delay_id },
        { ",\"ServerName\":", r->server },
        { ",\"LiveKitRoom\":", r->alias },
        { ",\"LiveKitIdentity\":", r->identity },
        { ",\"LiveKitIdentity2\":", r->identity2 },
        { ",\"Owner\":", r->owner },
        { r->is_connected ? ",\"Connected\":true,\"Sid\":" : ",\"Sid\":",
          r->sid } };
    for (size_t i = 0; i < COUNT_OF(part); i++) {
        if (i >= 4 && part[i].value.len == 0)
            continue;
        bb_str(b, part[i].name);
        js_put_str(b, part[i].value, false);
        if (i == 0) {
            bb_str(b, ",\"DelayTimeout\":");
            bb_i64(b, r->timeout_ms * 1000000);
        }
    }
    bb_str(b, r->is_connected && r->sid.len == 0 ? ",\"Connected\":true"
        : "");
    if (r->delegated_ms && r->delegated_ms != r->restarted_s * 1000
        + r->restarted_ns / 1000000) {
        bb_str(b, ",\"DelegatedAt\":\"");
        bb_moment_ms(b, r->delegated_ms);
        bb_str(b, "Z\"");
    }
    bb_str(b, "},\"RestartedAt\":\"");
    bb_moment(b, r->restarted_s, r->restarted_ns);
    bb_str(b, "Z\"}");
}

/* Read a stored job. It is judged as if a client had sent it (T25): field
 * and Params agree, room, ids and times are well-formed.
 * Trust    both are unchecked; they are decoded in place.
 * Returns  NULL, or what is wrong with it. */
MUST_USE static const char *rec_parse(uint8_t *field_raw, size_t field_len,
    uint8_t *value_raw, size_t value_len, struct record *r)
{
    struct raw {
        sl delay_id, server, alias, identity, identity2, sid, at, delegated;
        sl owner;
        struct js_int timeout;
        bool connected;
    } v = { .connected = false };
#define AT(member) offsetof(struct raw, member)
    static const struct js_field param_field[] = {
        { "DelayId", JS_STRING, AT(delay_id), NULL },
        { "DelayTimeout", JS_INT, AT(timeout), NULL },
        { "ServerName", JS_STRING, AT(server), NULL },
        { "LiveKitRoom", JS_STRING, AT(alias), NULL },
        { "LiveKitIdentity", JS_STRING, AT(identity), NULL },
        { "LiveKitIdentity2", JS_STRING, AT(identity2), NULL },
        { "Sid", JS_STRING, AT(sid), NULL },
        { "Owner", JS_STRING, AT(owner), NULL },
        { "DelegatedAt", JS_STRING, AT(delegated), NULL },
        { "Connected", JS_FLAG, AT(connected), NULL } };
    static const struct js_table param = { param_field,
        COUNT_OF(param_field), false, false };
    static const struct js_field field[] = {
        { "Params", JS_OBJECT, 0, &param },
        { "RestartedAt", JS_STRING, AT(at), NULL } };
    static const struct js_table tab = { field, COUNT_OF(field), false,
        false };
#undef AT
    sl alias, identity;
    struct name n;
    if (js_parse(value_raw, value_len, &tab, &v))
        return "value is not the JSON object expected";
    if (!js_pair(field_raw, field_len, &alias, &identity))
        return "field is no JSON array of two strings";
    if (!sl_eq(alias, v.alias) || !sl_eq(identity, v.identity))
        return "field and value differ";
    if (!hash_name_check(alias))
        return "LiveKitRoom";
    if (identity.len == 0 || identity.len > LIM_JOB_ID_LEN
        || v.identity2.len > LIM_JOB_ID_LEN)
        return "LiveKitIdentity";
    if (!delay_id_check(v.delay_id))
        return "DelayId";
    if (!v.timeout.is_set || v.timeout.over)
        return "DelayTimeout";
    if (v.server.len > LIM_NAME_LEN || !name_parse(v.server, &n))
        return "ServerName";
    if (v.sid.len > LIM_SID_LEN)
        return "Sid";
    if (v.owner.len && (v.identity2.len || !user_check(v.owner, v.server)))
        return "Owner";
    if (!rfc3339_parse(v.at, &r->restarted_s, &r->restarted_ns))
        return "RestartedAt";
    r->delegated_ms = 0;
    if (v.delegated.len) {
        int64_t sec;
        uint32_t ns;
        if (!rfc3339_parse(v.delegated, &sec, &ns))
            return "DelegatedAt";
        if (sec > 0)                     /* else as if it were not there */
            r->delegated_ms = sec * 1000 + ns / 1000000;
    }
    r->delay_id = v.delay_id;
    r->server = v.server;
    r->alias = alias;
    r->identity = identity;
    r->identity2 = v.identity2;
    r->sid = v.sid;
    r->owner = v.owner;
    r->is_connected = v.connected;
    int64_t t = v.timeout.v <= 0 ? 0 : v.timeout.v / 1000000;
    r->timeout_ms = v.timeout.v <= 0 ? 0 : t < LIM_DELAY_MIN_MS
        ? LIM_DELAY_MIN_MS : t > LIM_DELAY_MAX_MS ? LIM_DELAY_MAX_MS : t;
    return NULL;
}

/* Parse whole seconds, or numbers with units as Go writes them (500ms,
 * 1m30s), into milliseconds, at most an hour. */
MUST_USE static bool cf_duration(sl s_raw, int64_t *ms)
{
    static const struct { const char *unit; int64_t us; } unit_tab[] = {
        { "ns", 0 }, { "us", 1 }, { "ms", 1000 }, { "s", 1000000 },
        { "m", 60000000 }, { "h", 3600000000 } };
    uint64_t v;
    int64_t us = 0;
    if (sl_u64(s_raw, 3600, &v)) {
        *ms = (int64_t)v * 1000;
        return true;
    }
    while (s_raw.len) {
        size_t n = 0, u = 0, k;
        while (n < s_raw.len && s_raw.p[n] >= '0' && s_raw.p[n] <= '9')
            n++;
        while (n + u < s_raw.len && s_raw.p[n + u] >= 'a')
            u++;
        for (k = 0; k < COUNT_OF(unit_tab); k++)
            if (sl_eq((sl){ s_raw.p + n, u }, sl_str(unit_tab[k].unit)))
                break;
        if (k == COUNT_OF(unit_tab)
            || !sl_u64((sl){ s_raw.p, n }, 3600000000, &v))
            return false;
        us += v > 3600 && unit_tab[k].us >= 1000000 ? 3600000001
            : (int64_t)v * unit_tab[k].us;
        if (us > 3600000000)
            return false;
        s_raw = sl_skip(s_raw, n + u);
    }
    *ms = us / 1000;
    return true;
}

/* Use one key=value of a Redis URL's query. Returns NULL, or the fault. */
MUST_USE static const char *cf_redis_option(sl key, sl value,
    struct redis_url *out)
{
    static const char *const ignored[] = { "protocol", "max_retries",
        "min_retry_backoff", "max_retry_backoff", "pool_fifo", "pool_size",
        "pool_timeout", "min_idle_conns", "max_idle_conns",
        "max_active_conns", "max_concurrent_dials", "conn_max_idle_time",
        "idle_timeout", "conn_max_lifetime", "max_conn_age",
        "conn_max_lifetime_jitter" };
    struct { const char *name; int64_t *to; } time_tab[] = {
        { "dial_timeout", &out->dial_ms }, { "read_timeout", &out->read_ms },
        { "write_timeout", &out->write_ms } };
    uint64_t n;
    for (size_t i = 0; i < COUNT_OF(ignored); i++)
        if (sl_eq(key, sl_str(ignored[i])))
            return NULL;
    for (size_t i = 0; i < COUNT_OF(time_tab); i++)
        if (sl_eq(key, sl_str(time_tab[i].name))) {
            int64_t ms;
            if (!cf_duration(value, &ms))
                return "time-outs must be seconds or like 500ms, 1m30s";
            if (ms > 0)
                *time_tab[i].to = ms;
            return NULL;
        }
    if (sl_eq(key, SL("client_name"))) {
        out->client_name = value;
    } else if (sl_eq(key, SL("db"))) {
        if (!sl_u64(value, UINT16_MAX, &n))
            return "db must be a number";
        out->db = (uint16_t)n;
    } else if (sl_eq(key, SL("skip_verify")) && out->is_tls) {
        out->skip_verify = sl_eq(value, SL("true")) || sl_eq(value, SL("1"));
        if (!out->skip_verify && !sl_eq(value, SL("false"))
            && !sl_eq(value, SL("0")))
            return "skip_verify must be true or false";
    } else {
        return "unknown query key";
    }
    return NULL;
}

/* Split a Redis URL (PROTOCOL section 12). text keeps what had to be
 * decoded; *out borrows from both. Returns NULL, or the fault. */
MUST_USE static const char *cf_redis_url(sl s_raw, struct bb *text,
    struct redis_url *out)
{
    static const char *const scheme[] = { "redis://", "rediss://",
        "unix://" };
    size_t k = 0, cut;
    struct name n;
    uint64_t db;
    *out = (struct redis_url){ .port = 6379, .host = SL("localhost"),
        .dial_ms = LIM_REDIS_DIAL_MS, .read_ms = LIM_REDIS_READ_MS,
        .write_ms = LIM_REDIS_READ_MS };
    while (k < 3 && !sl_starts(s_raw, sl_str(scheme[k])))
        k++;
    if (k == 3)
        return "must begin with redis://, rediss:// or unix://";
    out->is_tls = k == 1;
    out->is_unix = k == 2;
    s_raw = sl_skip(s_raw, strlen(scheme[k]));
    cut = sl_find(s_raw, '?');
    sl query = sl_skip(s_raw, cut + 1);
    s_raw.len = cut;
    sl path = sl_skip(s_raw, sl_find(s_raw, '/'));
    sl host = { s_raw.p, s_raw.len - path.len };
    for (cut = host.len; cut > 0 && host.p[cut - 1] != '@'; )
        cut--;
    if (cut > 0) {
        sl who = { host.p, cut - 1 };
        size_t colon = sl_find(who, ':'), from = text->len;
        if (!percent_parse(text, (sl){ who.p, colon }))
            return "malformed percent-encoding";
        out->user = (sl){ text->p + from, text->len - from };
        from = text->len;
        if (!percent_parse(text, sl_skip(who, colon + 1)))
            return "malformed percent-encoding";
        out->sec_password = (sl){ text->p + from, text->len - from };
        host = sl_skip(host, cut);
    }
    if (out->is_unix) {
        if (host.len || path.len < 2)
            return "unix:// needs the socket's absolute path";
        out->path = path;
    } else if (path.len > 1 && !sl_u64(sl_skip(path, 1), UINT16_MAX, &db)) {
        return "the path must be a database number";
    } else if (path.len > 1) {
        out->db = (uint16_t)db;
    }
    if (sl_starts(host, SL(":"))) {
        if (!digits_at(host, 1, host.len - 1, 1, 65535, &db))
            return "malformed port";
        out->port = (uint16_t)db;
    } else if (host.len) {
        if (!host_parse(host, true, &n))
            return "malformed host or port";
        out->host = n.host;
        out->port = n.port ? n.port : 6379;
    }
    sl pair;
    while (sl_word(&query, "&", &pair)) {
        size_t eq = sl_find(pair, '='), from = text->len;
        if (!percent_parse(text, sl_skip(pair, eq + 1)))
            return "malformed percent-encoding";
        const char *fault = cf_redis_option((sl){ pair.p, eq },
            (sl){ text->p + from, text->len - from }, out);
        if (fault)
            return fault;
    }
    return text->over ? "too long" : NULL;
}

/* Append s as a log value: controls, quote, backslash, DEL and bad UTF-8
 * escaped, cut at 256 bytes. `json` uses JSON's escapes. */
static void log_put_value(struct bb *b, sl s, bool json)
{
    size_t n;
    bool cut = s.len > 256;
    if (cut)
        s.len = 256;
    for (; s.len; s = sl_skip(s, n)) {
        if ((n = plain_run(s)) > 0) {
            bb_put(b, (sl){ s.p, n });
            continue;
        }
        static const char hex[] = "0123456789abcdef";
        static const char from[] = "\"\\\n\r\t", to[] = "\"\\nrt";
        uint32_t cp = 0;
        n = utf8_next(s, &cp);
        uint8_t c = s.p[0];
        const char *hit = n && c ? strchr(from, c) : NULL;
        if (hit) {
            bb_byte(b, '\\');
            bb_byte(b, (uint8_t)to[hit - from]);
        } else if (n == 0 || c < 0x20 || c == 0x7f
                   || (cp >= 0x80 && cp < 0xa0)) {
            n = n ? n : 1;
            bb_str(b, json ? "\\u00" : "\\x");
            if (n == 2)                      /* C1 control */
                c = (uint8_t)cp;
            bb_byte(b, (uint8_t)hex[c >> 4]);
            bb_byte(b, (uint8_t)hex[c & 15]);
        } else {
            bb_put(b, (sl){ s.p, n });
        }
    }
    if (cut)
        bb_str(b, "...");
}

/* Append ` key=value` (logfmt, quoted when needed) or `,"key":"value"`. */
static void log_put(struct bb *b, const char *key, sl value, bool json)
{
    bool plain = value.len > 0;
    for (size_t i = 0; i < value.len; i++)
        plain &= value.p[i] > 0x20 && value.p[i] < 0x7f
            && value.p[i] != '"' && value.p[i] != '=' && value.p[i] != '\\';
    bb_str(b, json ? ",\"" : " ");
    bb_str(b, key);
    bb_str(b, json ? "\":\"" : plain ? "=" : "=\"");
    log_put_value(b, value, json);
    bb_str(b, json || !plain ? "\"" : "");
}

/* ==== 14 METRICS =================== PART I: PURE =====================
 * Purpose  The Prometheus text form (version 0.0.4) of given counters.
 * INV-M1   Labels come from the tables here, never from a client.
 */

#define ROUTE_LABEL_TAB(X) \
    X(GET_TOKEN, "/get_token") X(SFU_GET, "/sfu/get") \
    X(DELEGATE, "/delegate_delayed_leave") X(AS_CLIENT, "as_get_token") \
    X(AS_SERVER, "as_federation_get_token") X(AS_DELEGATE, "as_delegate") \
    X(WEBHOOK, "/sfu_webhook") X(HEALTHZ, "/healthz") \
    X(METRICS, "/metrics") X(AS_PING, "as_ping") X(OTHER, "other")
#define CODE_TAB(X) \
    X(200) X(400) X(401) X(403) X(404) X(405) X(408) X(413) X(414) \
    X(417) X(429) \
    X(431) X(500) X(501) X(502) X(503) X(505)
#define TARGET_TAB(X) \
    X(WELL_KNOWN, "well_known") X(USERINFO, "userinfo") X(SFU, "sfu") \
    X(CLIENT_API, "client_api") X(DELAYED_EVENT, "delayed_event") \
    X(DNS, "dns") X(REDIS, "redis") X(HOMESERVER, "homeserver")
#define GAUGE_TAB(X) \
    X(CONNECTIONS, "lkjwt_connections", "Client connections open.") \
    X(EXCHANGES, "lkjwt_exchanges", "Token requests in progress.") \
    X(WAITING, "lkjwt_exchanges_waiting", \
      "Token requests waiting for a lookup slot.") \
    X(UPSTREAM, "lkjwt_upstream_calls", "Outbound calls in progress.") \
    X(IDLE, "lkjwt_upstream_idle_connections", \
      "Connections kept for reuse.") \
    X(JOBS, "lkjwt_delayed_leaves", "Delegated leaves held.") \
    X(CONNECTED, "lkjwt_delayed_leaves_connected", \
      "Of them, participants connected.") \
    X(SEATS, "lkjwt_participants_watched", \
      "Participants whose membership in the Matrix room is checked.") \
    X(REDIS, "lkjwt_redis_up", "1 while Redis answers.") \
    X(UNSAVED, "lkjwt_redis_unsaved", \
      "Delegated leaves whose record is not yet written or deleted.") \
    X(REPLICAS, "lkjwt_replicas", "Replicas that share the Redis.") \
    X(SHARDS, "lkjwt_shards", \
      "Of 64 shards of the delegated leaves, held here.") \
    X(BREAKERS, "lkjwt_breakers_open", \
      "Destinations that are not asked: they failed repeatedly.") \
    X(ANCHORS, "lkjwt_trust_anchors", "Trust anchors loaded.") \
    X(STOPPING, "lkjwt_stopping", "1 from SIGTERM to the end.")

#define JAIL_LAYER_TAB(X) \
    X(CORE, "core") X(IDS, "ids") X(CAPS, "caps") X(PRIVS, "privs") \
    X(DUMP, "dump") X(LANDLOCK, "landlock") X(SECCOMP, "seccomp")

enum jail_layer {
#define X(name, text) JL_##name,
    JAIL_LAYER_TAB(X)
#undef X
    JL_CNT
};
static const char *const jail_layer_tab[JL_CNT] = {
#define X(name, text) [JL_##name] = text,
    JAIL_LAYER_TAB(X)
#undef X
};
enum route_label {
#define X(name, text) RL_##name,
    ROUTE_LABEL_TAB(X)
#undef X
    RL_CNT
};
enum target_label {
#define X(name, text) TL_##name,
    TARGET_TAB(X)
#undef X
    TL_CNT
};
enum gauge {
#define X(name, label, help) GA_##name,
    GAUGE_TAB(X)
#undef X
    GA_CNT
};
static const char *const route_label_tab[RL_CNT] = {
#define X(name, text) [RL_##name] = text,
    ROUTE_LABEL_TAB(X)
#undef X
};
static const char *const target_label_tab[TL_CNT] = {
#define X(name, text) [TL_##name] = text,
    TARGET_TAB(X)
#undef X
};
static const struct { const char *label, *help; } gauge_tab[GA_CNT] = {
#define X(name, label, help) [GA_##name] = { label, help },
    GAUGE_TAB(X)
#undef X
};
static const uint16_t code_tab[] = {
#define X(code) code,
    CODE_TAB(X)
#undef X
};
enum { CODE_CNT = COUNT_OF(code_tab), BUCKET_CNT = 10 };

/* Upper bounds, microseconds; the last bucket is +Inf. */
static const uint32_t bucket_tab[BUCKET_CNT] = { 1000, 5000, 10000, 25000,
    100000, 250000, 1000000, 2500000, 10000000, UINT32_MAX };

struct histogram {
    uint64_t bucket[BUCKET_CNT], sum_us;
};

/* Everything counted. reused, resumed, handshakes describe the TLS pool. */
struct met {
    uint64_t event[EV_CNT];
    uint64_t request[RL_CNT][CODE_CNT];
    struct histogram request_time[RL_CNT];
    uint64_t upstream[TL_CNT][2];          /* ok, error */
    struct histogram upstream_time[TL_CNT];
    uint64_t reused, resumed, handshakes, evicted, log_lost;
    int64_t gauge[GA_CNT];
    bool jail[JL_CNT];
    int64_t cpu_us, resident, start_ms;
};

static void met_observe(struct histogram *h, int64_t us)
{
    size_t i = 0;
    while (i < BUCKET_CNT - 1 && us > (int64_t)bucket_tab[i])
        i++;
    h->bucket[i]++;
    h->sum_us += (uint64_t)us;
}

static size_t met_code(unsigned code)
{
    for (size_t i = 0; i < CODE_CNT; i++)
        if (code_tab[i] == code)
            return i;
    return 0;
}

static void met_head(struct bb *b, const char *name, const char *type,
    const char *help)
{
    const char *part[] = { "# HELP ", name, " ", help, "\n# TYPE ", name,
        " ", type, "\n" };
    for (size_t i = 0; i < COUNT_OF(part); i++)
        bb_str(b, part[i]);
}

static void met_line(struct bb *b, const char *name, const char *labels,
    uint64_t v)
{
    bb_str(b, name);
    bb_str(b, labels);
    bb_byte(b, ' ');
    bb_u64(b, v);
    bb_byte(b, '\n');
}

/* Append microseconds as seconds, six decimals. */
static void met_seconds(struct bb *b, uint64_t us)
{
    bb_u64(b, us / 1000000);
    bb_byte(b, '.');
    for (uint64_t div = 100000; div; div /= 10)
        bb_byte(b, (uint8_t)('0' + us / div % 10));
}

static void met_histogram(struct bb *b, const char *name, const char *label,
    const char *value, const struct histogram *h)
{
    char text[96];
    uint64_t sum = 0;
    for (size_t i = 0; i < BUCKET_CNT; i++) {
        sum += h->bucket[i];
        snprintf(text, sizeof text, "_bucket{%s=\"%s\",le=\"", label, value);
        bb_str(b, name);
        bb_str(b, text);
        if (i + 1 < BUCKET_CNT)
            met_seconds(b, bucket_tab[i]);
        else
            bb_str(b, "+Inf");
        met_line(b, "", "\"}", sum);
    }
    snprintf(text, sizeof text, "{%s=\"%s\"}", label, value);
    bb_str(b, name);
    bb_str(b, "_sum");
    bb_str(b, text);
    bb_byte(b, ' ');
    met_seconds(b, h->sum_us);
    bb_byte(b, '\n');
    bb_str(b, name);
    met_line(b, "_count", text, sum);
}

static void met_put_requests(struct bb *b, const struct met *m)
{
    char text[96];
    met_head(b, "lkjwt_http_requests_total", "counter",
        "Requests answered, by route and status.");
    for (size_t r = 0; r < RL_CNT; r++)
        for (size_t i = 0; i < CODE_CNT; i++) {
            if (m->request[r][i] == 0 && r > RL_WEBHOOK && i > 2)
                continue;
            snprintf(text, sizeof text, "{route=\"%s\",code=\"%u\"}",
                route_label_tab[r], code_tab[i]);
            met_line(b, "lkjwt_http_requests_total", text, m->request[r][i]);
        }
    met_head(b, "lkjwt_http_request_duration_seconds", "histogram",
        "From the complete head to the reply's last byte written.");
    for (size_t r = 0; r <= RL_WEBHOOK; r++)
        met_histogram(b, "lkjwt_http_request_duration_seconds", "route",
            route_label_tab[r], &m->request_time[r]);
}

static void met_put_upstream(struct bb *b, const struct met *m)
{
    char text[96];
    met_head(b, "lkjwt_upstream_requests_total", "counter",
        "Outbound calls and DNS questions, by target and result.");
    for (size_t t = 0; t < TL_CNT; t++)
        for (int ok = 1; ok >= 0; ok--) {
            snprintf(text, sizeof text, "{target=\"%s\",result=\"%s\"}",
                target_label_tab[t], ok ? "ok" : "error");
            met_line(b, "lkjwt_upstream_requests_total", text,
                m->upstream[t][ok ? 0 : 1]);
        }
    met_head(b, "lkjwt_upstream_duration_seconds", "histogram",
        "Outbound calls and DNS questions, start to end.");
    for (size_t t = 0; t < TL_CNT; t++)
        met_histogram(b, "lkjwt_upstream_duration_seconds", "target",
            target_label_tab[t], &m->upstream_time[t]);
}

/* Append the whole text. */
static void met_put(struct bb *b, const struct met *m)
{
    static const struct { const char *name, *help; size_t at; } tab[] = {
        { "lkjwt_upstream_reused_total",
          "Calls on a kept connection.", offsetof(struct met, reused) },
        { "lkjwt_tls_handshakes_total",
          "TLS handshakes completed.", offsetof(struct met, handshakes) },
        { "lkjwt_tls_resumed_total", "Of them by a resumed session.",
          offsetof(struct met, resumed) },
        { "lkjwt_cache_evicted_total", "Cache entries displaced while valid.",
          offsetof(struct met, evicted) },
        { "lkjwt_log_lost_total", "Log lines dropped: stderr was blocked.",
          offsetof(struct met, log_lost) },
    };
    char text[96];
    met_put_requests(b, m);
    met_put_upstream(b, m);
    for (size_t i = 0; i < COUNT_OF(tab); i++) {
        met_head(b, tab[i].name, "counter", tab[i].help);
        met_line(b, tab[i].name, "",
            *(const uint64_t *)(const void *)((const uint8_t *)m
                                              + tab[i].at));
    }
    met_head(b, "lkjwt_events_total", "counter",
        "Events of the log's event table.");
    for (size_t e = 1; e < EV_CNT; e++) {
        snprintf(text, sizeof text, "{event=\"%s\"}", event_tab[e].label);
        met_line(b, "lkjwt_events_total", text, m->event[e]);
    }
    for (size_t g = 0; g < GA_CNT; g++) {
        met_head(b, gauge_tab[g].label, "gauge", gauge_tab[g].help);
        met_line(b, gauge_tab[g].label, "", (uint64_t)m->gauge[g]);
    }
    met_head(b, "lkjwt_jail", "gauge", "1: this layer of the sandbox holds.");
    for (size_t i = 0; i < JL_CNT; i++) {
        snprintf(text, sizeof text, "{layer=\"%s\"}", jail_layer_tab[i]);
        met_line(b, "lkjwt_jail", text, m->jail[i]);
    }
    met_head(b, "lkjwt_build_info", "gauge", "Always 1.");
    met_line(b, "lkjwt_build_info{version=\"" LKJWT_VERSION "\"}", "", 1);
    met_head(b, "process_cpu_seconds_total", "counter", "CPU time used.");
    bb_str(b, "process_cpu_seconds_total ");
    met_seconds(b, (uint64_t)m->cpu_us);
    bb_byte(b, '\n');
    met_head(b, "process_resident_memory_bytes", "gauge", "Resident memory.");
    met_line(b, "process_resident_memory_bytes", "", (uint64_t)m->resident);
    met_head(b, "process_start_time_seconds", "gauge", "Unix start time.");
    met_line(b, "process_start_time_seconds", "",
        (uint64_t)m->start_ms / 1000);
}

/* ==== 15 LOG, RESOLVER ============= PART II: MACHINES ================
 * Purpose  Addresses and SRV records of a name: hosts file, cache, DNS.
 * Log      One event, one line: the row of the event table and pairs.
 *          Values are escaped and cut; a blocked stderr loses lines, never
 *          time.
 * Trust    Nameservers are the operator's; their answers are not trusted
 *          beyond the question asked (section 09 judges them).
 * Limits   LIM_QUERY_CNT, LIM_DNSCACHE_CNT, LIM_DNS_MS.
 * INV-R1   A question in flight has exactly one pending cache entry; equal
 *          questions share it.
 *
 * row state      waits for  limit            success  failure, timeout
 * R1  Q_UDP      POLLIN     resolv timeout   done     next server, else done
 *                                            R2 when the answer is cut
 * R2  Q_TCP_DIAL POLLOUT    resolv timeout   R3       next server, else done
 * R3  Q_TCP_RECV POLLIN     resolv timeout   done     next server, else done
 * done: the cache entry gets the result, waiters are woken, slot is free
 */

static struct cfg cfg;
static struct met met;               /* what is counted (section 14) */

/* The world, as PART II sees it. Times: ms of CLOCK_BOOTTIME unless _wall.
 * Calls that return int give -errno on failure; EINTR is retried inside.
 */
static int64_t io_now(void);
static int64_t io_now_us(void);
static int64_t io_wall_ms(void);                 /* unix time */
static void io_random(void *p, size_t len);
static void io_usage(int64_t *cpu_us, int64_t *resident);
static int io_accept(int listener, struct ip *peer);     /* fd */
static int io_spare(int fd);                     /* a copy of one */
static int io_connect(const struct addr *a, const struct trust *t, bool udp);
static int io_connect_unix(sl path);
static int io_connected(int fd);                 /* 0, or why not */
static ssize_t io_read(int fd, uint8_t *p, size_t len);
static ssize_t io_write(int fd, sl s);
static void io_shutdown(int fd);
static void io_close(int *fd);
static void io_log(sl line);
static sl io_hosts(void);                        /* text of the file */
static const struct resolv *io_resolv(void);

/* What hash_keyed begins with: a block of secret bytes, of this process. */
static br_sha256_context hash_key;

static void hash_set_key(const uint8_t secret[64])
{
    br_sha256_init(&hash_key);
    br_sha256_update(&hash_key, secret, 64);
}

/* SHA-256 over parts, each preceded by its 4-byte length, so that no two
 * different lists give the same bytes, and nobody who sends them can tell
 * what it will be: for keys of tables. */
static void hash_keyed(const sl *parts, size_t cnt, uint8_t out[32])
{
    br_sha256_context c = hash_key;
    for (size_t i = 0; i < cnt; i++) {
        uint32_t n = (uint32_t)parts[i].len;
        uint8_t len[4] = { (uint8_t)(n >> 24), (uint8_t)(n >> 16),
                           (uint8_t)(n >> 8), (uint8_t)n };
        br_sha256_update(&c, len, 4);
        br_sha256_update(&c, parts[i].p, parts[i].len);
    }
    br_sha256_out(&c, out);
}

/* The loop's table of what is watched: set after each step of an object.
 * fd -1 watches the deadline alone; INT64_MAX is no deadline. */
static void loop_set(enum kind kind, size_t idx, int fd, int events,
    int64_t deadline);
static void loop_wake(enum kind kind, size_t idx);
static void loop_closed(int fd);                 /* it is about to be */

/* Set by SIGTERM: 1 lame duck, 2 draining. */
static int srv_stopping;

struct log_kv { const char *key; sl value; };
#define KV(key, ...) { (key), __VA_ARGS__ }
#define LOG(ev, ...) \
    log_event((ev), (struct log_kv[]){ __VA_ARGS__, { NULL, { NULL, 0 } } })
#define LOG0(ev) log_event((ev), (struct log_kv[]){ { NULL, { NULL, 0 } } })

/* Lines of one event in the current second. */
static struct log_quota { int64_t second; uint32_t cnt, lost; }
    log_quota_tab[EV_CNT];

/* Whether a line of this event may be written now. Request outcomes may
 * fill 500 lines a second, others 10 (SECURITY section 4), start-up lines
 * have no limit. */
static bool log_allowed(enum event ev, int64_t second)
{
    struct log_quota *q = &log_quota_tab[ev];
    uint16_t num = event_tab[ev].num;
    uint32_t cap = num < 1100 ? UINT32_MAX
        : num < 1200 || (num >= 1400 && num < 9000) ? 500 : 10;
    if (q->second != second) {
        q->second = second;
        q->cnt = 0;
    }
    if (q->cnt >= cap) {
        q->lost++;
        return false;
    }
    q->cnt++;
    return true;
}

static const char *log_level_name(char level)
{
    return level == 'e' ? "error" : level == 'w' ? "warning"
        : level == 'i' ? "info" : "debug";
}

static int level_rank(char level)
{
    return level == 'e' ? 0 : level == 'w' ? 1 : level == 'd' ? 3 : 2;
}

static bool log_wanted(enum event ev)
{
    return level_rank(event_tab[ev].level) <= level_rank(cfg.log_level);
}

/* Count an event and write its line. Pairs end at a NULL key; empty values
 * are left out. */
static void log_event(enum event ev, const struct log_kv *kv)
{
    static uint8_t text[2048];
    const struct event_row *row = &event_tab[ev];
    struct bb b = { text, 0, sizeof text - 8, false };
    uint8_t num[20];
    int64_t wall = io_wall_ms();
    bool json = cfg.log_json;
    met.event[ev]++;
    if (!log_wanted(ev) || !log_allowed(ev, wall / 1000))
        return;
    bb_str(&b, json ? "{\"ts\":\"" : "ts=");
    bb_rfc3339(&b, wall);
    bb_str(&b, json ? "\"" : "");
    log_put(&b, "level", sl_str(log_level_name(row->level)), json);
    log_put(&b, "event", sl_str(row->label), json);
    struct bb n = BB(num);
    bb_u64(&n, row->num);
    log_put(&b, "num", (sl){ num, n.len }, json);
    log_put(&b, "msg", sl_str(row->text), json);
    for (; kv->key; kv++)
        if (kv->value.len) {
            size_t before = b.len;
            log_put(&b, kv->key, kv->value, json);
            if (b.over) {             /* a line is never cut in a value */
                b.over = false;
                b.len = before;
            }
        }
    if (log_quota_tab[ev].lost) {
        n = BB(num);
        bb_u64(&n, log_quota_tab[ev].lost);
        log_put(&b, "suppressed", (sl){ num, n.len }, json);
        log_quota_tab[ev].lost = 0;
    }
    b.cap = sizeof text;
    bb_str(&b, json ? "}\n" : "\n");
    io_log((sl){ b.p, b.len });
}

/* An assertion that is never compiled out. No peer input may fail one. */
#define must(cond) ((cond) ? (void)0 : must_fail(#cond))

static _Noreturn void must_fail(const char *what)
{
    LOG(EV_BUG_MUST, KV("cond", sl_str(what)));
    _exit(70);
}

/* Text of small values for log lines; each call site names its buffer. */
static sl text_u64(uint8_t buf[20], uint64_t v)
{
    struct bb b = { buf, 0, 20, false };
    bb_u64(&b, v);
    return (sl){ buf, b.len };
}

static sl text_addr(uint8_t buf[64], const struct addr *a)
{
    struct bb b = { buf, 0, 64, false };
    bb_ip(&b, &a->ip, a->port);
    return (sl){ buf, b.len };
}

/* A random number in [lo, hi]. */
static int64_t random_between(int64_t lo, int64_t hi)
{
    uint64_t dice;
    io_random(&dice, sizeof dice);
    return lo + (int64_t)(dice % (uint64_t)(hi - lo + 1));
}

enum query_state { Q_FREE, Q_UDP, Q_TCP_DIAL, Q_TCP_RECV };

/* One question in flight.
 * owner:    query_pool
 * lifetime: res_start to res_finish */
struct query {
    enum query_state state;
    int fd;
    uint16_t id, type;
    uint16_t entry;            /* cache slot that waits */
    uint8_t name_len, name[LIM_HOST_LEN];   /* asked now, along CNAMEs */
    uint8_t hops, tries;
    int64_t try_end, end, begin_us;
    uint32_t ttl;
    size_t got;
    uint8_t big;               /* TCP assembly, index + 1 of a big buffer */
};
static struct query query_pool[LIM_QUERY_CNT];

enum entry_state { ENTRY_FREE, ENTRY_PENDING, ENTRY_OK, ENTRY_NONE,
    ENTRY_FAILED };

/* One cached answer; all zero is free. Data of an older success stays
 * behind a failure for stale use. */
struct dns_entry {
    uint8_t key[16];           /* of SHA-256(type, name) */
    uint8_t state;
    uint8_t rec_cnt;
    uint16_t data_len;
    int64_t until, stale_until;
    uint8_t data[LIM_DNSDATA_LEN];
};
static struct dns_entry dns_cache[LIM_DNSCACHE_CNT];

enum res { RES_WAIT, RES_OK, RES_NONE, RES_FAILED };

/* ---- buffers for what outgrows the small ones: bodies, replies, DNS by
 * TCP; lent by index + 1, 0 is none ---- */
static bool big_used[LIM_BIG_CNT + LIM_HUGE_CNT];
static uint8_t big_pool[LIM_BIG_CNT][LIM_BIG_LEN];
static uint8_t huge_pool[LIM_HUGE_CNT][LIM_HUGE_LEN];

/* The buffer of an index + 1: the big ones, then the huge ones. */
static uint8_t *big_buf(uint8_t big)
{
    return big <= LIM_BIG_CNT ? big_pool[big - 1]
        : huge_pool[big - 1 - LIM_BIG_CNT];
}

/* Lowest free buffer for len bytes as index + 1, or 0. */
static uint8_t big_take(size_t len)
{
    size_t from = len > LIM_BIG_LEN ? LIM_BIG_CNT : 0;
    size_t to = len > LIM_BIG_LEN ? LIM_BIG_CNT + LIM_HUGE_CNT : LIM_BIG_CNT;
    for (size_t i = from; i < to; i++)
        if (!big_used[i]) {
            big_used[i] = true;
            return (uint8_t)(i + 1);
        }
    return 0;
}

static void big_free(uint8_t *big)
{
    if (*big)
        big_used[*big - 1] = false;
    *big = 0;
}

static void res_wake_waiters(void);

static void query_watch(size_t idx)
{
    const struct query *q = &query_pool[idx];
    int want = q->state == Q_TCP_DIAL ? POLLOUT : POLLIN;
    int64_t end = q->try_end < q->end ? q->try_end : q->end;
    loop_set(KIND_QUERY, idx, q->fd, want, end);
}

/* End a question: write the result into its entry, wake who waits. */
static void res_finish(size_t idx, enum entry_state result,
    const struct dns_answer *a, int64_t now)
{
    struct query *q = &query_pool[idx];
    struct dns_entry *e = &dns_cache[q->entry];
    int64_t ttl = q->ttl;
    if (result == ENTRY_OK) {
        ttl = ttl < 5 ? 5 : ttl > 3600 ? 3600 : ttl;
        e->rec_cnt = a->rec_cnt;
        e->data_len = a->data_len;
        memcpy(e->data, a->data, a->data_len);
        e->stale_until = now + (ttl + 3600) * 1000;
    } else {
        ttl = result == ENTRY_FAILED || ttl < 5 ? 5 : ttl > 60 ? 60 : ttl;
        if (result == ENTRY_NONE)
            e->rec_cnt = 0;               /* what was there is gone */
    }
    e->state = (uint8_t)result;
    e->until = now + ttl * 1000;
    met.upstream[TL_DNS][result == ENTRY_FAILED]++;
    met_observe(&met.upstream_time[TL_DNS], io_now_us() - q->begin_us);
    io_close(&q->fd);
    big_free(&q->big);
    q->state = Q_FREE;
    loop_set(KIND_QUERY, idx, -1, 0, INT64_MAX);
    res_wake_waiters();
}

/* Ask the next server, or give up after all rounds. */
static void res_ask(size_t idx, int64_t now)
{
    static const struct trust trust = { CLASS_OPERATOR, true };
    const struct resolv *r = io_resolv();
    struct query *q = &query_pool[idx];
    uint8_t pkt[12 + LIM_HOST_LEN + 6];
    struct bb b = BB(pkt);
    io_close(&q->fd);
    while (q->tries < r->attempts * r->server_cnt && now < q->end) {
        const struct addr *server = &r->server[q->tries++ % r->server_cnt];
        io_random(&q->id, sizeof q->id);
        b.len = 0;
        if (!dns_build(&b, q->id, (sl){ q->name, q->name_len }, q->type))
            break;
        q->fd = io_connect(server, &trust, true);
        if (q->fd >= 0 && io_write(q->fd, (sl){ pkt, b.len })
            == (ssize_t)b.len) {
            q->state = Q_UDP;
            q->try_end = now + r->timeout_ms;
            query_watch(idx);
            return;
        }
        io_close(&q->fd);
    }
    res_finish(idx, ENTRY_FAILED, NULL, now);
}

/* Repeat the question by TCP at the server that cut its answer. */
static void res_ask_tcp(size_t idx, int64_t now)
{
    static const struct trust trust = { CLASS_OPERATOR, true };
    const struct resolv *r = io_resolv();
    struct query *q = &query_pool[idx];
    io_close(&q->fd);
    if (!q->big)
        q->big = big_take(2 + LIM_DNS_LEN);
    if (q->big)
        q->fd = io_connect(&r->server[(q->tries - 1) % r->server_cnt],
            &trust, false);
    if (q->fd < 0) {
        res_ask(idx, now);
        return;
    }
    q->state = Q_TCP_DIAL;
    q->got = 0;
    q->try_end = now + r->timeout_ms;
    query_watch(idx);
}

/* Use one packet. */
static void res_answer(size_t idx, sl pkt_raw, int64_t now)
{
    static struct dns_answer a;
    struct query *q = &query_pool[idx];
    int got = dns_parse(pkt_raw, q->id, (sl){ q->name, q->name_len },
        q->type, &a);
    if (got == 0) {
        if (q->state != Q_UDP)
            res_ask(idx, now);        /* TCP cannot bring a stranger's */
        return;
    }
    if (got < 0)
        LOG(EV_DNS_BAD, KV("name", ((sl){ q->name, q->name_len })));
    if (got < 0 || (a.rcode != 0 && a.rcode != 3)) {
        res_ask(idx, now);
        return;
    }
    if (a.is_cut) {
        if (q->state == Q_UDP)
            res_ask_tcp(idx, now);
        else
            res_ask(idx, now);
        return;
    }
    if (a.ttl < q->ttl)
        q->ttl = a.ttl;
    if (a.has_more && q->hops < LIM_CNAME_CNT) {
        q->hops++;
        q->name_len = a.cname_len;
        memcpy(q->name, a.cname, a.cname_len);
        q->tries = 0;
        res_ask(idx, now);
        return;
    }
    res_finish(idx, a.rec_cnt ? ENTRY_OK : ENTRY_NONE, &a, now);
}

/* Move at most one packet on. */
static enum step query_step(size_t idx, int revents, int64_t now)
{
    struct query *q = &query_pool[idx];
    static uint8_t pkt[LIM_DNS_LEN];
    ssize_t n;
    if (now >= q->try_end || now >= q->end) {
        res_ask(idx, now);
        return STEP_WAIT;
    }
    if (!revents)
        return STEP_WAIT;
    switch (q->state) {
    case Q_FREE:
        return STEP_WAIT;
    case Q_UDP:
        n = io_read(q->fd, pkt, sizeof pkt);
        if (n == -EAGAIN)
            return STEP_WAIT;
        if (n < 0)
            res_ask(idx, now);
        else
            res_answer(idx, (sl){ pkt, (size_t)n }, now);
        return STEP_WAIT;
    case Q_TCP_DIAL: {
        struct bb b = { pkt + 2, 0, sizeof pkt - 2, false };
        bool ok = io_connected(q->fd) == 0
            && dns_build(&b, q->id, (sl){ q->name, q->name_len }, q->type);
        pkt[0] = (uint8_t)(b.len >> 8);
        pkt[1] = (uint8_t)b.len;
        if (!ok || io_write(q->fd, (sl){ pkt, b.len + 2 })
            != (ssize_t)b.len + 2) {
            res_ask(idx, now);
            return STEP_WAIT;
        }
        q->state = Q_TCP_RECV;
        query_watch(idx);
        return STEP_WAIT;
    }
    case Q_TCP_RECV: {
        uint8_t *buf = big_buf(q->big);
        size_t cap = 2 + LIM_DNS_LEN;
        n = io_read(q->fd, buf + q->got, cap - q->got);
        if (n == -EAGAIN)
            return STEP_WAIT;
        q->got += n > 0 ? (size_t)n : 0;
        size_t len = q->got < 2 ? cap : 2U + be16(buf);
        if (q->got >= len)
            res_answer(idx, (sl){ buf + 2, len - 2 }, now);
        else if (n <= 0 || len > cap)
            res_ask(idx, now);
        return STEP_WAIT;
    }
    }
    return STEP_WAIT;                 /* unreachable: all named above */
}

/* The cache slot of a key: its own, else the one to replace. NULL if all
 * four candidates are pending. */
static struct dns_entry *res_slot(const uint8_t key[16], int64_t now)
{
    size_t set = be16(key) % (LIM_DNSCACHE_CNT / 4) * 4;
    struct dns_entry *best = NULL;
    for (size_t i = 0; i < 4; i++) {
        struct dns_entry *e = &dns_cache[set + i];
        if (e->state != ENTRY_FREE && memcmp(e->key, key, 16) == 0)
            return e;
        if (e->state != ENTRY_PENDING && (!best || e->until < best->until))
            best = e;
    }
    if (best && best->state != ENTRY_FREE && best->until > now)
        met.evicted++;
    if (best) {
        memset(best, 0, offsetof(struct dns_entry, data));
        memcpy(best->key, key, 16);
    }
    return best;
}

/* Look one exact name up in cache or DNS.
 * Returns RES_WAIT: waiters of res_wake_waiters are woken later. */
static enum res res_exact(sl name, uint16_t type, bool stale_ok, int64_t now,
    const struct dns_entry **out)
{
    uint8_t lower[LIM_HOST_LEN], sum[32], wire[LIM_HOST_LEN + 3];
    struct bb b = BB(wire);
    if (!dns_put_name(&b, name))
        return RES_NONE;                 /* DNS has no such name */
    for (size_t i = 0; i < name.len; i++)
        lower[i] = ascii_lower(name.p[i]);
    sl part[2] = { { lower, name.len },
        { (uint8_t[1]){ (uint8_t)type }, 1 } };
    hash_keyed(part, COUNT_OF(part), sum);
    struct dns_entry *e = res_slot(sum, now);
    *out = e;
    if (e && e->state == ENTRY_PENDING)
        return RES_WAIT;
    if (e && e->state != ENTRY_FREE && e->until > now) {
        if (e->state == ENTRY_OK)
            return RES_OK;
        if (e->state == ENTRY_NONE)
            return RES_NONE;
        return stale_ok && e->rec_cnt && e->stale_until > now ? RES_OK
            : RES_FAILED;
    }
    size_t idx = 0;
    while (idx < LIM_QUERY_CNT && query_pool[idx].state != Q_FREE)
        idx++;
    if (!e || idx == LIM_QUERY_CNT) {
        LOG(EV_DNS_FULL, KV("name", name));
        return e && stale_ok && e->rec_cnt && e->stale_until > now ? RES_OK
            : RES_FAILED;
    }
    struct query *q = &query_pool[idx];
    memset(q, 0, sizeof *q);
    q->fd = -1;
    q->state = Q_UDP;
    q->type = type;
    q->entry = (uint16_t)(e - dns_cache);
    q->ttl = UINT32_MAX;
    q->name_len = (uint8_t)name.len;
    memcpy(q->name, lower, name.len);
    q->end = now + LIM_DNS_MS;
    q->begin_us = io_now_us();
    e->state = ENTRY_PENDING;
    res_ask(idx, now);
    return e->state == ENTRY_PENDING ? RES_WAIT : RES_FAILED;
}

/* How a host is looked up. search: the list of resolv.conf applies (names
 * of the operator; a client's name is taken as it is). stale_ok: an old
 * answer may serve while DNS fails. */
struct res_how { bool search, stale_ok; };

/* The k-th name to ask for: with enough dots the name itself comes first,
 * then the search list; otherwise last. False: no more. */
static bool res_candidate(sl host, bool search, int k, struct bb *out)
{
    const struct resolv *r = io_resolv();
    unsigned dots = 0;
    if (sl_ends(host, SL("."))) {
        search = false;
        host.len--;
    }
    for (size_t i = 0; i < host.len; i++)
        dots += host.p[i] == '.';
    int plain = !search || dots >= r->ndots ? 0 : r->search_cnt;
    int suffix = plain == 0 ? k - 1 : k;
    out->len = 0;
    bb_put(out, host);
    if (k == plain)
        return true;
    if (!search || suffix >= r->search_cnt)
        return false;
    bb_byte(out, '.');
    bb_put(out, (sl){ r->search[suffix].text, r->search[suffix].len });
    return true;
}

/* Both families' addresses of the first candidate that has any. They are
 * copied at once: the other family's question may take their cache slot. */
static void res_families(sl host, struct res_how how, int64_t now,
    enum res got[2], struct ip list[2][LIM_TRY_CNT], size_t have[2])
{
    uint8_t text[2 * LIM_HOST_LEN + 2];
    struct bb name = BB(text);
    bool failed = false;
    for (int k = 0; res_candidate(host, how.search, k, &name); k++) {
        for (int v6 = 0; v6 < 2; v6++) {
            const struct dns_entry *e;
            size_t size = v6 ? 16 : 4;
            got[v6] = res_exact((sl){ text, name.len },
                v6 ? DNS_AAAA : DNS_A, how.stale_ok, now, &e);
            have[v6] = 0;
            while (got[v6] == RES_OK && have[v6] < e->rec_cnt
                   && have[v6] < LIM_TRY_CNT) {
                struct ip *ip = &list[v6][have[v6]];
                *ip = (struct ip){ .v6 = v6 };
                memcpy(ip->b, e->data + have[v6]++ * size, size);
            }
        }
        for (int v6 = 0; v6 < 2; v6++)
            if (got[v6] == RES_OK || got[v6] == RES_WAIT)
                return;
        failed |= got[0] == RES_FAILED || got[1] == RES_FAILED;
    }
    got[0] = failed ? RES_FAILED : RES_NONE;
}

/* Addresses of a host, families alternating, IPv6 first.
 * *first_at when the first family answered (0: not yet), so that the other
 *           is waited for LIM_RESOLUTION_MS only (RFC 8305 section 3)
 * Returns   RES_WAIT with *first_at set: call again by then, too. */
static enum res res_addresses(sl host, struct res_how how, int64_t now,
    int64_t *first_at, struct ip out[LIM_TRY_CNT], size_t *cnt)
{
    struct ip list[2][LIM_TRY_CNT];
    size_t have[2] = { 0, 0 };
    enum res got[2] = { RES_NONE, RES_NONE };
    sl hosts = io_hosts();
    if (!cf_hosts_has(hosts, host))
        res_families(host, how, now, got, list, have);
    else
        for (int v6 = 0; v6 < 2; v6++)
            have[v6] = cf_hosts_find(hosts, host, v6, list[v6], LIM_TRY_CNT);
    bool any_ok = have[0] + have[1] > 0;
    if (got[0] == RES_WAIT || got[1] == RES_WAIT) {
        if (!any_ok || *first_at == 0)
            *first_at = any_ok ? now : 0;
        if (!any_ok || now < *first_at + LIM_RESOLUTION_MS)
            return RES_WAIT;
    }
    *cnt = 0;
    for (size_t i = 0; i < LIM_TRY_CNT; i++)
        for (int v6 = 1; v6 >= 0; v6--)
            if (i < have[v6] && *cnt < LIM_TRY_CNT)
                out[(*cnt)++] = list[v6][i];
    if (*cnt)
        return RES_OK;
    return got[0] == RES_FAILED || got[1] == RES_FAILED ? RES_FAILED
        : RES_NONE;
}

/* ==== 16 TLS ======================= PART II: MACHINES ================
 * Purpose  BearSSL as a TLS 1.2 client: set-up, certificate judgement,
 *          session and signature caches, connections and their reuse.
 * Trust    None before a certificate is accepted; then the peer is who its
 *          name says, and still may send anything.
 * Limits   LIM_CHAN_CNT, LIM_IDLE_CNT, LIM_HS_CNT, LIM_CHAIN_*, LIM_PATH_CNT,
 *          LIM_SIG_CNT, LIM_SIGCACHE_CNT, LIM_SESSION_*.
 * INV-S1   A resumed session has the host, port, certificate name and
 *          trust mode of the handshake that verified it.
 * INV-S2   Every engine is seeded by io_random before its reset.
 *
 * BearSSL's signature callbacks carry no context, so the handshake being
 * judged stands in hs_now, set in hs_end_chain only.
 */

/* Trust anchors in force: packed anchors, and the set being built. */
static struct anchors {
    size_t len;
    unsigned cnt, skipped, read;     /* kept, unusable, seen at all */
    uint8_t data[LIM_ANCHOR_LEN];
} anchor_set[2];
static unsigned anchor_now, anchor_gen;     /* gen grows at each reload */

/* Add the certificates of PEM text to a set.
 * Returns how many are new, or -1: damaged block or set full. */
MUST_USE static int anchors_add_pem(struct anchors *set, sl text)
{
    static uint8_t work[16384];
    int added = 0, got;
    sl der;
    while ((got = pem_parse(&text, work, sizeof work, &der)) > 0) {
        struct cert c;
        struct bb b = { set->data, set->len, sizeof set->data, false };
        size_t from = b.len;
        set->read++;
        if (!cert_parse(der, true, &c) || c.key.kind == KEY_NONE) {
            set->skipped++;
            continue;
        }
        if (set->cnt == LIM_ANCHOR_CNT || !anchor_put(&b, &c))
            return -1;
        if (anchor_has((sl){ set->data, set->len },
                       (sl){ b.p + from, b.len - from }))
            continue;
        set->len = b.len;
        set->cnt++;
        added++;
    }
    return got < 0 ? -1 : added;
}

/* Add packed anchors, those of the binary. */
static void anchors_add_packed(struct anchors *set, sl packed)
{
    sl rest = packed, body;
    while (block_take(&rest, &body) && set->cnt < LIM_ANCHOR_CNT) {
        sl whole = { body.p - 2, body.len + 2 };
        if (anchor_has((sl){ set->data, set->len }, whole)
            || whole.len > sizeof set->data - set->len)
            continue;
        memcpy(set->data + set->len, whole.p, whole.len);
        set->len += whole.len;
        set->cnt++;
    }
}

/* One handshake: the peer's chain, and BearSSL's judge.
 * owner:    hs_pool; the channel it serves
 * lifetime: chan_start_tls to the end of the handshake */
struct hs {
    const br_x509_class *vtable;     /* first: BearSSL casts to it */
    bool used, bad, is_insecure, is_verified;
    enum class class;                /* of the destination */
    uint8_t key[16];                 /* the destination, see chan_key */
    enum event why;
    struct name peer;                /* host borrows from the up */
    size_t cnt, len, end[LIM_CHAIN_CNT];
    unsigned sig_cnt;
    /* hashes of signed parts as sent and as altered (hs_unmark), by length
     * 32, 48, 64 */
    struct { uint8_t sent[3][64], altered[3][64]; } swap[LIM_PATH_CNT];
    size_t swap_cnt;
    int64_t not_after;
    br_x509_pkey pkey;
    br_x509_minimal_context minimal;
    uint8_t der[LIM_CHAIN_LEN];
};
static struct hs hs_pool[LIM_HS_CNT];
static struct hs *hs_now;

/* Verified signatures: 4-way sets keyed by a keyed digest. */
static struct { uint8_t key[32], hash[64]; } sig_cache[LIM_SIGCACHE_CNT];
static unsigned sig_clock;

/* The cached hash of a digest, or NULL. */
static const uint8_t *sig_find(const uint8_t key[32])
{
    size_t set = be16(key) % (LIM_SIGCACHE_CNT / 4) * 4;
    for (size_t i = set; i < set + 4; i++)
        if (memcmp(sig_cache[i].key, key, 32) == 0)
            return sig_cache[i].hash;
    return NULL;
}

static void sig_store(const uint8_t key[32], const void *hash, size_t len)
{
    size_t at = be16(key) % (LIM_SIGCACHE_CNT / 4) * 4 + sig_clock++ % 4;
    memcpy(sig_cache[at].key, key, 32);
    memcpy(sig_cache[at].hash, hash, len);
}

/* SHA-256, -384 and -512 of s. */
static void tls_hashes(sl s, uint8_t out[3][64])
{
    br_sha256_context a;
    br_sha384_context b;
    br_sha512_context c;
    br_sha256_init(&a);
    br_sha256_update(&a, s.p, s.len);
    br_sha256_out(&a, out[0]);
    br_sha384_init(&b);
    br_sha384_update(&b, s.p, s.len);
    br_sha384_out(&b, out[1]);
    br_sha512_init(&c);
    br_sha512_update(&c, s.p, s.len);
    br_sha512_out(&c, out[2]);
}

/* The library refuses critical extended key usages and name constraints,
 * which this wrapper has judged. So it is shown the certificate with those
 * two flags cleared, and the hashes of both forms are kept for hs_swap. */
static void hs_unmark(struct hs *h, const struct cert *c)
{
    if (!c->critical[0] && !c->critical[1])
        return;
    size_t i = h->swap_cnt++;
    tls_hashes(c->tbs, h->swap[i].sent);
    for (int k = 0; k < 2; k++)
        if (c->critical[k])
            h->der[c->critical[k] - h->der] = 0;
    tls_hashes(c->tbs, h->swap[i].altered);
}

/* Replace the hash of one form by that of the other, so that signatures
 * are checked over the bytes the peer sent. Others stay. */
static void hs_swap(const struct hs *h, bool to_sent, uint8_t *hash,
    size_t len)
{
    size_t k = len == 32 ? 0 : len == 48 ? 1 : 2;
    for (size_t i = 0; i < h->swap_cnt; i++) {
        const uint8_t *from = to_sent ? h->swap[i].altered[k]
            : h->swap[i].sent[k];
        if (memcmp(hash, from, len) == 0) {
            memcpy(hash, to_sent ? h->swap[i].sent[k]
                : h->swap[i].altered[k], len);
            return;
        }
    }
}

/* ECDSA check for br_x509_minimal: cached successes, LIM_SIG_CNT others. */
static uint32_t tls_ecdsa_vrfy(const br_ec_impl *impl, const void *given,
    size_t hash_len, const br_ec_public_key *pk, const void *sig,
    size_t sig_len)
{
    uint8_t key[32], head[3] = { 1, (uint8_t)pk->curve, (uint8_t)hash_len };
    uint8_t hash[64];
    if (hash_len > sizeof hash)
        return 0;
    memcpy(hash, given, hash_len);
    hs_swap(hs_now, true, hash, hash_len);
    sl part[] = { { head, 3 }, { pk->q, pk->qlen },
        { sig, sig_len }, { hash, hash_len } };
    hash_keyed(part, COUNT_OF(part), key);
    if (sig_find(key))
        return 1;
    if (++hs_now->sig_cnt > LIM_SIG_CNT || !br_ecdsa_vrfy_asn1_get_default()(
            impl, hash, hash_len, pk, sig, sig_len))
        return 0;
    sig_store(key, hash, hash_len);
    return 1;
}

/* RSA check: gives the signed hash, which the library compares. */
static uint32_t tls_rsa_vrfy(const unsigned char *x, size_t xlen,
    const unsigned char *oid, size_t hash_len, const br_rsa_public_key *pk,
    unsigned char *hash_out)
{
    uint8_t key[32], head[3] = { 2, 0, (uint8_t)hash_len };
    sl part[] = { { head, 3 }, { pk->n, pk->nlen },
        { pk->e, pk->elen }, { x, xlen }, { oid, oid[0] + 1U } };
    hash_keyed(part, COUNT_OF(part), key);
    const uint8_t *hit = sig_find(key);
    if (hit) {
        memcpy(hash_out, hit, hash_len);
    } else {
        if (++hs_now->sig_cnt > LIM_SIG_CNT
            || !br_rsa_pkcs1_vrfy_get_default()(x, xlen, oid, hash_len, pk,
                                                hash_out))
            return 0;
        sig_store(key, hash_out, hash_len);
    }
    hs_swap(hs_now, false, hash_out, hash_len);
    return 1;
}

/* Elliptic curves without P-521, whose arithmetic costs 10 ms a check. */
static const br_ec_impl *tls_ec(void)
{
    static br_ec_impl ec;
    if (!ec.supported_curves) {
        ec = *br_ec_get_default();
        ec.supported_curves &= ~((uint32_t)1 << BR_EC_secp521r1);
    }
    return &ec;
}

static br_x509_pkey tls_pkey(const struct pub_key *k)
{
    br_x509_pkey out = { .key_type = BR_KEYTYPE_EC };
    if (k->kind == KEY_RSA) {
        out.key_type = BR_KEYTYPE_RSA;
        out.key.rsa = (br_rsa_public_key){ (uint8_t *)(uintptr_t)k->n.p,
            k->n.len, (uint8_t *)(uintptr_t)k->e.p, k->e.len };
    } else {
        out.key.ec = (br_ec_public_key){
            k->kind == KEY_P256 ? BR_EC_secp256r1 : BR_EC_secp384r1,
            (uint8_t *)(uintptr_t)k->q.p, k->q.len };
    }
    return out;
}

/* Order the chain: path[0] is the leaf, each next one the first unused
 * certificate that bears the issuer's name. Returns the length. */
static size_t hs_path(const struct cert *c, size_t cnt,
    size_t path[LIM_PATH_CNT])
{
    bool used[LIM_CHAIN_CNT] = { true };
    size_t n = 1;
    path[0] = 0;
    while (n < LIM_PATH_CNT) {
        const struct cert *cur = &c[path[n - 1]];
        size_t j = 1;
        while (j < cnt && (used[j] || c[j].key.kind == KEY_NONE
                           || !sl_eq(c[j].subject, cur->issuer)
                           || sl_eq(c[j].subject, c[j].issuer)))
            j++;
        if (j >= cnt)
            break;
        used[j] = true;
        path[n++] = j;
    }
    return n;
}

/* Collect the anchors that could end the path; their constraints bind the
 * leaf. Returns false when one refuses. */
MUST_USE static bool hs_anchors(const struct hs *h, const struct cert *c,
    const size_t *path, size_t path_cnt, br_x509_trust_anchor ta[16],
    size_t *ta_cnt)
{
    const struct anchors *set = &anchor_set[anchor_now];
    sl rest = { set->data, set->len };
    struct anchor a;
    *ta_cnt = 0;
    while (*ta_cnt < 16 && anchor_take(&rest, &a)) {
        bool fits = !a.is_ca && sl_eq(a.name, c[0].subject);
        for (size_t i = 0; a.is_ca && i < path_cnt; i++)
            fits |= sl_eq(a.name, c[path[i]].issuer);
        if (!fits)
            continue;
        if (!cert_keeps_to(&c[0], a.constraints, &h->peer))
            return false;
        ta[(*ta_cnt)++] = (br_x509_trust_anchor){
            .dn = { (uint8_t *)(uintptr_t)a.name.p, a.name.len },
            .flags = a.is_ca ? BR_X509_TA_CA : 0,
            .pkey = tls_pkey(&a.key) };
    }
    return true;
}

/* Whether the leaf's key is itself an anchor: then it may be a CA. */
static bool hs_is_anchor(const struct cert *leaf)
{
    const struct anchors *set = &anchor_set[anchor_now];
    sl rest = { set->data, set->len };
    struct anchor a;
    while (anchor_take(&rest, &a))
        if (a.key.kind == leaf->key.kind && sl_eq(a.key.n, leaf->key.n)
            && sl_eq(a.key.q, leaf->key.q) && sl_eq(a.name, leaf->subject))
            return true;
    return false;
}

/* Whether the leaf's usages allow a TLS server (step 3). */
static bool hs_may_serve(const struct cert *leaf)
{
    return (!leaf->has_ext_usage || leaf->is_server)
        && (!leaf->has_usage || leaf->can_sign)
        && (!leaf->is_ca || hs_is_anchor(leaf));
}

/* BearSSL's own verdict on the path. Returns 0 or a BR_ERR_X509_*. */
static unsigned hs_minimal(struct hs *h, const struct cert *c,
    const size_t *path, size_t path_cnt, const br_x509_trust_anchor *ta,
    size_t ta_cnt)
{
    br_x509_minimal_context *m = &h->minimal;
    int64_t wall = io_wall_ms() / 1000;
    br_x509_minimal_init(m, &br_sha256_vtable, ta, ta_cnt);
    br_x509_minimal_set_hash(m, br_sha256_ID, &br_sha256_vtable);
    br_x509_minimal_set_hash(m, br_sha384_ID, &br_sha384_vtable);
    br_x509_minimal_set_hash(m, br_sha512_ID, &br_sha512_vtable);
    br_x509_minimal_set_rsa(m, tls_rsa_vrfy);
    br_x509_minimal_set_ecdsa(m, tls_ec(), tls_ecdsa_vrfy);
    br_x509_minimal_set_minrsa(m, 256);
    br_x509_minimal_set_time(m, (uint32_t)(wall / 86400 + 719528),
        (uint32_t)(wall % 86400));
    m->vtable->start_chain(&m->vtable, NULL);
    h->swap_cnt = 0;
    for (size_t i = 0; i < path_cnt; i++) {
        sl der = c[path[i]].der;
        hs_unmark(h, &c[path[i]]);
        m->vtable->start_cert(&m->vtable, (uint32_t)der.len);
        m->vtable->append(&m->vtable, der.p, der.len);
        m->vtable->end_cert(&m->vtable);
    }
    return m->vtable->end_chain(&m->vtable);
}

static enum event hs_event(unsigned err)
{
    switch (err) {
    case BR_ERR_X509_EXPIRED: return EV_TLS_EXPIRED;
    case BR_ERR_X509_NOT_TRUSTED:
    case BR_ERR_X509_DN_MISMATCH: return EV_TLS_UNTRUSTED;
    case BR_ERR_X509_BAD_SIGNATURE:
    case BR_ERR_X509_UNSUPPORTED:
    case BR_ERR_X509_WEAK_PUBLIC_KEY:
    case BR_ERR_X509_WRONG_KEY_TYPE: return EV_TLS_SIGNATURE;
    default: return EV_TLS_CHAIN;
    }
}

/* Judge the collected chain (SECURITY section 5, steps 2 to 6).
 * GRANTS: that the peer is who it was dialled as.
 * Returns EV_NONE or the reason to refuse. */
static enum event hs_judge(struct hs *h)
{
    struct cert c[LIM_CHAIN_CNT];
    br_x509_trust_anchor ta[16];
    size_t path[LIM_PATH_CNT], ta_cnt, from = 0;
    if (h->bad || h->cnt == 0)
        return EV_TLS_CHAIN;
    for (size_t i = 0; i < h->cnt; i++) {
        sl der = { h->der + from, h->end[i] - from };
        from = h->end[i];
        if (!cert_parse(der, false, &c[i]))
            c[i].key.kind = KEY_NONE;     /* no part of any path */
    }
    if (c[0].key.kind == KEY_NONE)
        return EV_TLS_CHAIN;
    h->pkey = tls_pkey(&c[0].key);
    h->not_after = c[0].not_after;
    if (h->is_insecure)
        return EV_NONE;
    if (!hs_may_serve(&c[0]))
        return EV_TLS_USAGE;
    if (!cert_names_peer(&c[0], &h->peer))
        return EV_TLS_NAME;
    size_t path_cnt = hs_path(c, h->cnt, path);
    for (size_t i = 1; i < path_cnt; i++) {
        if (c[path[i]].has_ext_usage && !c[path[i]].is_server)
            return EV_TLS_USAGE;
        if (!cert_keeps_to(&c[0], c[path[i]].constraints, &h->peer))
            return EV_TLS_CONSTRAINT;
    }
    if (!hs_anchors(h, c, path, path_cnt, ta, &ta_cnt))
        return EV_TLS_CONSTRAINT;
    unsigned err = hs_minimal(h, c, path, path_cnt, ta, ta_cnt);
    return err ? hs_event(err) : EV_NONE;
}

static struct hs *hs_of(const br_x509_class **ctx)
{
    return (struct hs *)(void *)ctx;
}

static void hs_start_chain(const br_x509_class **ctx, const char *name)
{
    struct hs *h = hs_of(ctx);
    (void)name;                      /* h->peer says it, IPs included */
    h->cnt = h->len = 0;
    h->sig_cnt = 0;
    h->bad = h->is_verified = false;
}

static void hs_start_cert(const br_x509_class **ctx, uint32_t len)
{
    struct hs *h = hs_of(ctx);
    if (h->cnt == LIM_CHAIN_CNT || len > sizeof h->der - h->len)
        h->bad = true;
}

static void hs_append(const br_x509_class **ctx, const unsigned char *p,
    size_t len)
{
    struct hs *h = hs_of(ctx);
    if (h->bad || len > sizeof h->der - h->len) {
        h->bad = true;
        return;
    }
    memcpy(h->der + h->len, p, len);
    h->len += len;
}

static void hs_end_cert(const br_x509_class **ctx)
{
    struct hs *h = hs_of(ctx);
    if (!h->bad)
        h->end[h->cnt++] = h->len;
}

static unsigned hs_end_chain(const br_x509_class **ctx)
{
    hs_now = hs_of(ctx);
    hs_now->why = hs_judge(hs_now);
    hs_now->is_verified = hs_now->why == EV_NONE;
    return hs_now->is_verified ? 0 : BR_ERR_X509_NOT_TRUSTED;
}

static const br_x509_pkey *hs_get_pkey(const br_x509_class *const *ctx,
    unsigned *usages)
{
    const struct hs *h = (const struct hs *)(const void *)ctx;
    if (usages)
        *usages = BR_KEYTYPE_KEYX | BR_KEYTYPE_SIGN;
    return h->is_verified ? &h->pkey : NULL;
}

static const br_x509_class hs_class = {
    sizeof(struct hs), hs_start_chain, hs_start_cert, hs_append, hs_end_cert,
    hs_end_chain, hs_get_pkey
};

/* ---- tables by key: the keys in an array of their own, which costs less to
 * scan than what a small set forgets while others have room; 0 is none ---- */

/* Index of a key, or cnt. */
static size_t key_find(const uint64_t *keys, size_t cnt, uint64_t key)
{
    size_t i = 0;
    while (i < cnt && keys[i] != key)
        i++;
    return i;
}

/* The first of the four entries of which a newcomer's key may take one, when
 * no entry is free. */
static size_t key_set(uint64_t key, size_t cnt)
{
    return key % (cnt / 4) * 4;
}

/* Resumable sessions. */
static uint64_t session_key[LIM_SESSION_CNT];
static struct session {
    uint8_t key[16];
    int64_t until_wall, until_at;    /* both clocks: one may be set back */
    br_ssl_session_parameters params;
} session_cache[LIM_SESSION_CNT];

/* The session of a key, or where it would be kept: check its key. */
static struct session *session_slot(const uint8_t key[16])
{
    uint64_t k = be64(key);
    size_t i = key_find(session_key, LIM_SESSION_CNT, k);
    if (i == LIM_SESSION_CNT)
        i = key_find(session_key, LIM_SESSION_CNT, 0);
    if (i == LIM_SESSION_CNT) {
        i = key_set(k, LIM_SESSION_CNT);
        for (size_t n = i + 1, end = i + 4; n < end; n++)
            if (session_cache[n].until_wall < session_cache[i].until_wall)
                i = n;
    }
    return &session_cache[i];
}

static void session_store(const uint8_t key[16],
    const br_ssl_session_parameters *params, int64_t until_wall)
{
    struct session *s = session_slot(key);
    session_key[s - session_cache] = be64(key);
    memcpy(s->key, key, 16);
    s->until_wall = until_wall;
    s->until_at = io_now() + LIM_SESSION_S * 1000;
    s->params = *params;
}

/* How a connection is secured. */
enum tls_mode { TLS_OFF, TLS_VERIFIED, TLS_UNVERIFIED };

/* A connection to a peer, in use by one call or kept idle.
 * owner:    chan_pool; only chan_close() closes fd
 * lifetime: chan_open to chan_close */
enum chan_state { CHAN_FREE, CHAN_BUSY, CHAN_IDLE };
static struct chan {
    enum chan_state state;
    int fd;
    bool is_tls, is_up;                 /* is_up: handshake complete */
    struct hs *hs;                      /* while it lasts */
    uint8_t key[16];                    /* destination, see chan_key */
    struct addr addr;
    int64_t idle_until;
    unsigned anchor_gen;                /* anchors in force at its start */
    size_t out_off, out_len;            /* plain: what chan_io holds */
} chan_pool[LIM_CHAN_CNT];
static size_t chan_idle_cnt;         /* in CHAN_IDLE */
static br_ssl_client_context chan_tls[LIM_CHAN_CNT];
static uint8_t chan_io[LIM_CHAN_CNT][BR_SSL_BUFSIZE_MONO];

static void up_wake_tls_waiters(void);

/* Whether a connection to this address is allowed (SECURITY section 3).
 * io_connect asks it for the very sockaddr it connects. */
static bool net_allowed(const struct addr *a, const struct trust *t)
{
    const char *name;
    struct ip plain = ip_unwrap(a->ip);
    enum range range = ip_range(a->ip, &name);
    if (a->port == 0 || range == RANGE_N)
        return false;
    if (t->class == CLASS_OPERATOR || range == RANGE_PUBLIC
        || (range == RANGE_P && t->private_ok))
        return true;
    return ip_in_any(&plain, cfg.network, cfg.network_cnt);
}

/* Whether a handshake can be shortened (RFC 5246 section 7.3). */
static bool session_is_fresh(const uint8_t key[16])
{
    const struct session *s = session_slot(key);
    return s->until_wall > io_wall_ms() / 1000 && s->until_at > io_now()
        && memcmp(s->key, key, 16) == 0;
}

/* The key under which a connection and its session may be used again. */
static void chan_key(sl host, uint16_t port, sl cert_name,
    enum tls_mode tls, uint8_t out[16])
{
    uint8_t sum[32];
    uint8_t tail[3] = { (uint8_t)(port >> 8), (uint8_t)port, (uint8_t)tls };
    sl part[] = { host, cert_name, { tail, 3 } };
    hash_keyed(part, COUNT_OF(part), sum);
    memcpy(out, sum, 16);
}

/* Send close_notify, one try: without it a server may drop the session
 * that the next connection would resume (RFC 5246 section 7.2.1). */
static void chan_say_goodbye(struct chan *ch)
{
    br_ssl_engine_context *eng = &chan_tls[ch - chan_pool].eng;
    size_t len;
    br_ssl_engine_close(eng);
    const uint8_t *p = br_ssl_engine_sendrec_buf(eng, &len);
    if (p)
        (void)!io_write(ch->fd, (sl){ p, len });
}

static void chan_close(struct chan *ch)
{
    if (ch->state == CHAN_FREE)
        return;
    chan_idle_cnt -= ch->state == CHAN_IDLE;
    loop_set(KIND_CHAN, (size_t)(ch - chan_pool), -1, 0, INT64_MAX);
    if (ch->is_up)
        chan_say_goodbye(ch);
    io_close(&ch->fd);
    if (ch->hs) {
        ch->hs->used = false;
        ch->hs = NULL;
        up_wake_tls_waiters();
    }
    ch->state = CHAN_FREE;
}

/* Close the connection that has been idle longest, if `cnt` or more are. */
static void chan_close_oldest(size_t cnt)
{
    struct chan *oldest = NULL;
    if (chan_idle_cnt < cnt)
        return;
    for (size_t i = 0, left = chan_idle_cnt; left && i < LIM_CHAN_CNT; i++)
        if (chan_pool[i].state == CHAN_IDLE) {
            left--;
            if (!oldest || chan_pool[i].idle_until < oldest->idle_until)
                oldest = &chan_pool[i];
        }
    if (oldest)
        chan_close(oldest);
}

/* Keep a connection for the next call, unless the anchors it was judged by
 * were replaced or the engine holds bytes that nobody asked for. */
static void chan_keep(struct chan *ch, int64_t now)
{
    unsigned st = ch->is_tls ? br_ssl_engine_current_state(
        &chan_tls[ch - chan_pool].eng) : BR_SSL_SENDAPP;
    if (ch->anchor_gen != anchor_gen || !(st & BR_SSL_SENDAPP)
        || (st & BR_SSL_RECVAPP)) {
        chan_close(ch);
        return;
    }
    chan_close_oldest(LIM_IDLE_CNT);
    ch->state = CHAN_IDLE;
    chan_idle_cnt++;
    ch->idle_until = now + LIM_KEPT_MS;
    loop_set(KIND_CHAN, (size_t)(ch - chan_pool), ch->fd, POLLIN,
        ch->idle_until);
}

/* An idle connection: bytes, an end or an error mean it is of no use. */
static enum step chan_step(size_t idx, int revents, int64_t now)
{
    struct chan *ch = &chan_pool[idx];
    if (ch->state == CHAN_IDLE && (revents || now >= ch->idle_until))
        chan_close(ch);
    return STEP_WAIT;
}

/* Take a kept connection of this key to an address that this caller may
 * dial, or NULL. The newest is the least likely to be closed by the peer. */
static struct chan *chan_reuse(const uint8_t key[16], const struct trust *t)
{
    struct chan *best = NULL;
    for (size_t i = 0, left = chan_idle_cnt; left && i < LIM_CHAN_CNT; i++) {
        struct chan *ch = &chan_pool[i];
        left -= ch->state == CHAN_IDLE;
        if (ch->state == CHAN_IDLE
            && (!best || ch->idle_until > best->idle_until)
            && memcmp(ch->key, key, 16) == 0)
            best = ch;
    }
    if (best && !net_allowed(&best->addr, t))
        return NULL;
    if (best) {
        best->state = CHAN_BUSY;
        chan_idle_cnt--;
        loop_set(KIND_CHAN, (size_t)(best - chan_pool), -1, 0, INT64_MAX);
        met.reused++;
    }
    return best;
}

/* Make a connection object of a connected socket; NULL: none free. */
static struct chan *chan_open(int fd, const struct addr *a,
    const uint8_t key[16])
{
    size_t i = 0;
    for (int again = 0; again < 2; again++) {
        for (i = 0; i < LIM_CHAN_CNT && chan_pool[i].state != CHAN_FREE; )
            i++;
        if (i < LIM_CHAN_CNT)
            break;
        chan_close_oldest(1);
    }
    if (i == LIM_CHAN_CNT)
        return NULL;
    chan_pool[i] = (struct chan){ .state = CHAN_BUSY, .fd = fd, .addr = *a,
        .anchor_gen = anchor_gen };
    memcpy(chan_pool[i].key, key, 16);
    return &chan_pool[i];
}

/* A slot for a handshake. None but OPERATOR may fill them all, and no
 * destination many: a peer that stays silent holds its own for LIM_TLS_MS.
 * NULL: wait. */
static struct hs *hs_take(enum class class, const uint8_t key[16])
{
    static const size_t cap[] = { [CLASS_STRANGER] = LIM_HS_CNT / 2,
        [CLASS_LISTED] = LIM_HS_CNT - 2, [CLASS_OPERATOR] = LIM_HS_CNT };
    size_t mine = 0, same = 0, others = 0;
    struct hs *free = NULL;
    for (size_t i = 0; i < LIM_HS_CNT; i++) {
        struct hs *h = &hs_pool[i];
        mine += h->used && h->class <= class;
        others += h->used && h->class != CLASS_OPERATOR;
        same += h->used && memcmp(h->key, key, 16) == 0;
        free = h->used ? free : h;
    }
    if (!free || mine >= cap[class]
        || (class != CLASS_OPERATOR && others >= cap[CLASS_LISTED])
        || same >= (class == CLASS_STRANGER ? 2 : LIM_HS_DEST))
        return NULL;
    free->used = true;
    free->class = class;
    memcpy(free->key, key, 16);
    return free;
}

/* The profile of SECURITY section 5. */
static void tls_profile(br_ssl_client_context *cc, bool is_http)
{
    /* what this processor is better at comes first; servers often agree */
    static const uint16_t order[2][6] = {
        { BR_TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
          BR_TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
          BR_TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
          BR_TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
          BR_TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
          BR_TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384 },
        { BR_TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
          BR_TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
          BR_TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
          BR_TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
          BR_TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
          BR_TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256 } };
    const uint16_t *suite = order[br_aes_x86ni_ctr_get_vtable()
        && br_ghash_pclmul_get()];
    static const char *alpn[] = { "http/1.1" };
    br_ssl_engine_context *eng = &cc->eng;
    br_ssl_client_zero(cc);
    br_ssl_engine_set_versions(eng, BR_TLS12, BR_TLS12);
    br_ssl_engine_set_suites(eng, suite, COUNT_OF(order[0]));
    br_ssl_engine_set_default_rsavrfy(eng);
    br_ssl_engine_set_default_ecdsa(eng);
    br_ssl_engine_set_ec(eng, tls_ec());
    br_ssl_engine_set_hash(eng, br_sha256_ID, &br_sha256_vtable);
    br_ssl_engine_set_hash(eng, br_sha384_ID, &br_sha384_vtable);
    br_ssl_engine_set_hash(eng, br_sha512_ID, &br_sha512_vtable);
    br_ssl_engine_set_prf_sha256(eng, &br_tls12_sha256_prf);
    br_ssl_engine_set_prf_sha384(eng, &br_tls12_sha384_prf);
    br_ssl_engine_set_default_aes_gcm(eng);
    br_ssl_engine_set_default_chapol(eng);
    br_ssl_engine_set_protocol_names(eng, alpn, is_http);
    br_ssl_engine_add_flags(eng, BR_OPT_NO_RENEGOTIATION);
}

/* Begin a handshake on a connected channel, offering a cached session.
 * h was taken by hs_take and belongs to the channel from here on; the
 * peer's host must outlive the handshake. */
MUST_USE static bool chan_start_tls(struct chan *ch, struct hs *h,
    const struct name *peer, enum tls_mode mode, bool is_http)
{
    size_t idx = (size_t)(ch - chan_pool);
    br_ssl_client_context *cc = &chan_tls[idx];
    bool resume = session_is_fresh(ch->key);
    uint8_t seed[32];
    char sni[LIM_HOST_LEN + 1];
    ch->is_tls = true;
    ch->hs = h;
    h->vtable = &hs_class;
    h->why = EV_NONE;
    h->is_insecure = mode == TLS_UNVERIFIED;
    h->is_verified = h->bad = false;
    h->peer = *peer;
    tls_profile(cc, is_http);
    br_ssl_engine_set_x509(&cc->eng, &h->vtable);
    br_ssl_engine_set_buffer(&cc->eng, chan_io[idx], BR_SSL_BUFSIZE_MONO, 0);
    io_random(seed, sizeof seed);
    br_ssl_engine_inject_entropy(&cc->eng, seed, sizeof seed);
    wipe(seed, sizeof seed);
    if (resume)
        br_ssl_engine_set_session_parameters(&cc->eng,
            &session_slot(ch->key)->params);
    sl host = peer->host;
    if (sl_ends(host, SL(".")))
        host.len--;
    memcpy(sni, host.p, host.len);
    sni[host.len] = 0;
    return br_ssl_client_reset(cc, peer->is_ip ? NULL : sni, resume);
}

/* The handshake is complete: remember the session, free the judge. */
static void chan_tls_up(struct chan *ch)
{
    br_ssl_client_context *cc = &chan_tls[ch - chan_pool];
    int64_t wall = io_wall_ms() / 1000, until = wall + LIM_SESSION_S;
    met.handshakes++;
    if (ch->hs->is_verified) {
        br_ssl_session_parameters params;
        br_ssl_engine_get_session_parameters(&cc->eng, &params);
        if (!ch->hs->is_insecure && ch->hs->not_after < until)
            until = ch->hs->not_after;
        if (params.session_id_len == 0 || ch->anchor_gen != anchor_gen)
            until = 0;
        if (until || session_is_fresh(ch->key))
            session_store(ch->key, &params, until);
        wipe(&params, sizeof params);
    } else {
        met.resumed++;
    }
    br_ssl_engine_set_x509(&cc->eng, NULL);
    ch->hs->used = false;
    ch->hs = NULL;
    ch->is_up = true;
    up_wake_tls_waiters();
}

/* Move bytes between socket and engine: all that wait to be sent, and at
 * most `records` records in.
 * Returns 0 moved what could be, -EAGAIN nothing to do now, -ECONNRESET
 *         the connection is of no use (engine closed, socket gone). */
MUST_USE static int tls_pump(struct chan *ch, int records)
{
    br_ssl_engine_context *eng = &chan_tls[ch - chan_pool].eng;
    for (;;) {
        unsigned st = br_ssl_engine_current_state(eng);
        size_t len;
        ssize_t n;
        if (st & BR_SSL_CLOSED)
            return -ECONNRESET;
        if (st & BR_SSL_SENDREC) {
            uint8_t *p = br_ssl_engine_sendrec_buf(eng, &len);
            n = io_write(ch->fd, (sl){ p, len });
            if (n < 0)
                return n == -EAGAIN ? -EAGAIN : -ECONNRESET;
            br_ssl_engine_sendrec_ack(eng, (size_t)n);
            continue;
        }
        if (st & BR_SSL_RECVAPP || !(st & BR_SSL_RECVREC) || records-- == 0)
            return 0;
        uint8_t *p = br_ssl_engine_recvrec_buf(eng, &len);
        n = io_read(ch->fd, p, len);
        if (n <= 0)
            return n == -EAGAIN ? -EAGAIN : -ECONNRESET;
        br_ssl_engine_recvrec_ack(eng, (size_t)n);
        if (ch->hs && ch->hs->bad)       /* a chain over its limits */
            return -ECONNRESET;
    }
}

/* Why a handshake failed. */
static enum event chan_tls_why(const struct chan *ch)
{
    int err = br_ssl_engine_last_error(&chan_tls[ch - chan_pool].eng);
    if (ch->hs && ch->hs->bad)
        return EV_TLS_CHAIN;
    if (ch->hs && ch->hs->why != EV_NONE)
        return ch->hs->why;
    if (err == BR_ERR_RECV_FATAL_ALERT + BR_ALERT_PROTOCOL_VERSION)
        return EV_TLS_VERSION;
    /* both come of the first bytes; an old TLS has its own record version */
    if (err == BR_ERR_UNSUPPORTED_VERSION || err == BR_ERR_UNKNOWN_TYPE)
        return EV_TLS_NONE;
    if (err == BR_ERR_RECV_FATAL_ALERT + BR_ALERT_HANDSHAKE_FAILURE)
        return EV_TLS_REFUSED;
    return err == BR_ERR_OK ? EV_TLS_CLOSED : EV_TLS_FAILED;
}

/* Hand over a whole request. False: it does not fit the engine or buffer. */
MUST_USE static bool chan_put(struct chan *ch, sl request)
{
    size_t idx = (size_t)(ch - chan_pool), len;
    if (!ch->is_tls) {
        if (request.len > sizeof chan_io[idx])
            return false;
        memcpy(chan_io[idx], request.p, request.len);
        ch->out_off = 0;
        ch->out_len = request.len;
        return true;
    }
    br_ssl_engine_context *eng = &chan_tls[idx].eng;
    uint8_t *p = br_ssl_engine_sendapp_buf(eng, &len);
    if (!p || request.len > len)
        return false;
    memcpy(p, request.p, request.len);
    br_ssl_engine_sendapp_ack(eng, request.len);
    br_ssl_engine_flush(eng, 0);
    return true;
}

/* Send what the connection takes of s now.
 * Returns bytes taken, -EAGAIN, -ECONNRESET. */
MUST_USE static ssize_t chan_write(struct chan *ch, sl s)
{
    size_t len;
    if (!ch->is_tls) {
        ssize_t n = io_write(ch->fd, s);
        return n >= 0 || n == -EAGAIN ? n : -ECONNRESET;
    }
    br_ssl_engine_context *eng = &chan_tls[ch - chan_pool].eng;
    uint8_t *p = br_ssl_engine_sendapp_buf(eng, &len);
    if (p) {
        len = s.len < len ? s.len : len;
        memcpy(p, s.p, len);
        br_ssl_engine_sendapp_ack(eng, len);
        br_ssl_engine_flush(eng, 0);
    }
    int err = tls_pump(ch, 0);
    if (err == -ECONNRESET)
        return err;
    return p ? (ssize_t)len : -EAGAIN;
}

/* Push pending bytes out. Returns 0 all gone, -EAGAIN, -ECONNRESET. */
MUST_USE static int chan_flush(struct chan *ch)
{
    size_t idx = (size_t)(ch - chan_pool);
    if (ch->is_tls) {
        int err = tls_pump(ch, 0);
        return err ? err : 0;
    }
    while (ch->out_off < ch->out_len) {
        ssize_t n = io_write(ch->fd, (sl){ chan_io[idx] + ch->out_off,
            ch->out_len - ch->out_off });
        if (n < 0)
            return n == -EAGAIN ? -EAGAIN : -ECONNRESET;
        ch->out_off += (size_t)n;
    }
    return 0;
}

/* Read application bytes.
 * Returns >0, 0 a clean end (TLS: close_notify), -EAGAIN, -ECONNRESET. */
MUST_USE static ssize_t chan_read(struct chan *ch, uint8_t *p, size_t cap)
{
    if (!ch->is_tls) {
        ssize_t n = io_read(ch->fd, p, cap);
        return n >= 0 || n == -EAGAIN ? n : -ECONNRESET;
    }
    br_ssl_engine_context *eng = &chan_tls[ch - chan_pool].eng;
    int err = tls_pump(ch, 16);
    size_t len;
    if (br_ssl_engine_current_state(eng) & BR_SSL_RECVAPP) {
        const uint8_t *from = br_ssl_engine_recvapp_buf(eng, &len);
        len = len < cap ? len : cap;
        memcpy(p, from, len);
        br_ssl_engine_recvapp_ack(eng, len);
        return (ssize_t)len;
    }
    if (err == 0)
        return -EAGAIN;
    /* close_notify came, whether or not ours could be written */
    return err == -ECONNRESET && br_ssl_engine_last_error(eng) == BR_ERR_OK
        && eng->shutdown_recv ? 0 : err;
}

/* ==== 17 UPSTREAM ================== PART II: MACHINES ================
 * Purpose  One HTTP call to a peer: resolve, dial, TLS, send, receive.
 * Trust    Replies are unchecked bytes; section 08 judges the framing.
 * Limits   LIM_UP_*, LIM_TRY_CNT, LIM_REPLY_*, the stage deadlines.
 * INV-U1   why is set exactly in UP_FAILED.
 * INV-U2   A request is repeated only if it went out on a kept connection
 *          that died before a reply byte, and then once.
 *
 * row state        waits for          limit    success   failure, timeout
 * U1  UP_RESOLVE   waiter's wake      5 s      U2        U8
 * U2  UP_DIAL      a try's POLLOUT    5 s      U3 or U5  next try, U9, U8
 * U3  UP_TLS_SLOT  waiter's wake      call     U4        U8
 * U4  UP_TLS       engine's wish      5 s      U5        U2 (next try), U8
 * U5  UP_SEND      POLLOUT            10 s     U6        U8, U1 when kept
 * U6  UP_RECV      POLLIN             10 s     U7        U8, U1 when kept
 * U7  UP_DONE      -                  -        the owner reads and closes
 * U8  UP_FAILED    -                  -        the owner reads and closes
 * U9  UP_ADDR_SLOT waiter's wake, 1 s call     U2        U8
 * A kept connection enters at U5. The call's own deadline bounds all.
 */

/* ---- memory of names: rates, breakers, who is known --------------------
 * Tables of keyed hashes in sets of four. In a full set the entry with the
 * least `at` makes room: a bucket nearest to full, a failure longest ago.
 */
struct memo {
    uint64_t key;
    int64_t at;              /* what it means is the table's matter */
    uint16_t cnt;            /* breakers: failures running */
    bool is_trying;          /* breakers: one request is out as a probe */
};
static struct memo rate_cache[LIM_RATE_CNT];     /* at: full again, us */
static struct memo breaker_cache[LIM_BREAKER_CNT];   /* at: pause over */
static struct memo known_cache[LIM_KNOWN_CNT], room_cache[LIM_ROOM_CNT];

/* The key of a name; `kind` keeps apart what is counted. */
static uint64_t memo_key(char kind, sl name)
{
    uint8_t sum[32];
    sl part[] = { { (const uint8_t *)&kind, 1 }, name };
    hash_keyed(part, COUNT_OF(part), sum);
    return be64(sum);
}

/* The entry of a key, or NULL. */
static struct memo *memo_find(struct memo *tab, size_t cnt, uint64_t key)
{
    struct memo *set = &tab[key_set(key, cnt)];
    for (size_t i = 0; i < 4; i++)
        if (set[i].key == key)
            return &set[i];
    return NULL;
}

/* The entry of a key, if need be a new one; until: entries up to then mean
 * nothing any more. */
static struct memo *memo_make(struct memo *tab, size_t cnt, uint64_t key,
    int64_t until)
{
    struct memo *m = memo_find(tab, cnt, key);
    struct memo *set = &tab[key_set(key, cnt)], *oldest = set;
    if (m)
        return m;
    for (size_t i = 1; i < 4; i++)
        if (set[i].at < oldest->at)
            oldest = &set[i];
    met.evicted += oldest->at > until;
    *oldest = (struct memo){ .key = key };
    return oldest;
}

/* Whether an entry that is kept until `at` is there. */
static bool memo_holds(struct memo *tab, size_t cnt, uint64_t key,
    int64_t now)
{
    const struct memo *m = memo_find(tab, cnt, key);
    return m && m->at > now;
}

/* Take one from a bucket, by the generic cell rate algorithm: `full` is
 * when the bucket will be full again. False: it is empty. */
static bool rate_take(struct memo *m, const struct rate *r, int64_t now)
{
    int64_t us = now * 1000;
    int64_t full = (m->at > us ? m->at : us) + r->interval_us;
    if (full - us > r->burst * r->interval_us)
        return false;
    m->at = full;
    return true;
}

/* The same for the bucket of a key; no limit is always kept. */
static bool rate_ok(uint64_t key, const struct rate *r, int64_t now)
{
    return r->burst == 0
        || rate_take(memo_make(rate_cache, LIM_RATE_CNT, key, now * 1000), r,
                     now);
}

/* ---- circuit breakers (SECURITY section 8) -----------------------------
 * row state      waits for          to
 * B1  closed     LKJWT_BREAKER_FAILURES failures running    B2
 * B2  open       its pause          B3
 * B3  half-open  the one request    B1 on success, B2 longer on failure
 * Delayed events that cannot wait go out all the same: job_presses (21).
 */
enum verdict { PEER_OK, PEER_FAILED, PEER_UNASKED };

/* What the end of a call says of its peer. A complete HTTP reply is a
 * success whatever it says, lest a client's bad token closes the way for
 * all (T31); own limits say nothing. */
static enum verdict peer_verdict(enum event why)
{
    uint16_t num = event_tab[why].num;
    if (num >= event_tab[EV_REPLY_BAD].num && num < 2600)
        return PEER_OK;
    return num < event_tab[EV_DNS_NONE].num || num >= 2600
        || why == EV_DNS_FULL || why == EV_SSRF_DENIED || why == EV_CHAN_FULL
        ? PEER_UNASKED : PEER_FAILED;
}

/* Whether a call was given up for a limit of ours, and may do better. */
static bool up_was_held(enum event why)
{
    return why == EV_TLS_BUDGET || why == EV_WAIT_TIMEOUT;
}

static bool breaker_is_open(const struct memo *b, int64_t now)
{
    return cfg.breaker && b->cnt >= cfg.breaker && now < b->at;
}

/* Whether a request must not go out now. The first one after the pause
 * may, and breaker_report must hear of its end; the others wait for that. */
static bool breaker_refuses(struct memo *b, int64_t now)
{
    if (breaker_is_open(b, now))
        return true;
    if (cfg.breaker && b->cnt >= cfg.breaker) {
        b->is_trying = true;
        b->at = now + LIM_LOOKUP_MS;
    }
    return false;
}

/* Count the end of a request. What was under way when the breaker opened
 * is not counted again; while a probe is out it is taken for the probe. */
static void breaker_report(struct memo *b, enum class class, enum verdict v,
    sl name, int64_t now)
{
    bool was_trying = b->is_trying;
    b->is_trying = false;
    if (v == PEER_OK) {
        b->cnt = 0;
        b->at = 0;
    } else if (v == PEER_UNASKED) {
        b->at = was_trying ? now : b->at;
    } else if (cfg.breaker && (was_trying || b->cnt < cfg.breaker)) {
        b->cnt = (uint16_t)(b->cnt
            + (b->cnt < cfg.breaker + LIM_PAUSE_STEPS));
        b->at = now;
        if (b->cnt < cfg.breaker)
            return;
        int64_t pause = (int64_t)LIM_PAUSE_MS << (b->cnt - cfg.breaker);
        int64_t max = class == CLASS_STRANGER ? LIM_PAUSE_MAX_MS
            : LIM_PAUSE_LISTED_MS;
        pause = pause < max ? pause : max;
        pause = random_between(pause * 4 / 5, pause * 6 / 5);
        b->at = now + pause;
        uint8_t num[20];
        LOG(EV_BREAKER_TRIPPED, KV("server", name),
            KV("pause_ms", text_u64(num, (uint64_t)pause)));
    }
}

static int64_t breaker_open_cnt(const struct memo *tab, size_t cnt,
    int64_t now)
{
    int64_t n = 0;
    for (size_t i = 0; i < cnt; i++)
        n += breaker_is_open(&tab[i], now);
    return n;
}

enum up_state { UP_FREE, UP_RESOLVE, UP_ADDR_SLOT, UP_DIAL, UP_TLS_SLOT,
    UP_TLS, UP_SEND, UP_RECV, UP_DONE, UP_FAILED };

/* Decoding of one message body into a buffer, or a big one when it grows.
 * All zero before its use; big is index + 1. */
struct intake {
    struct h1_body body;
    struct h1_chunk chunk;
    uint64_t left;
    size_t len, limit;       /* decoded so far; above limit: refused */
    uint8_t big;
    bool is_done;
};
static void intake_start(struct intake *t, struct h1_body body, size_t limit)
{
    *t = (struct intake){ .body = body, .left = body.len, .limit = limit,
        .is_done = body.kind == H1_NONE
            || (body.kind == H1_LENGTH && body.len == 0) };
}

/* The next run of body data at the front of raw. Returns as
 * h1_parse_chunk. */
MUST_USE static int intake_decode(struct intake *t, sl raw, sl *data)
{
    if (t->body.kind == H1_CHUNKED) {
        int n = h1_parse_chunk(raw, &t->chunk, data);
        t->is_done = t->chunk.state == CHUNK_END;
        return n;
    }
    *data = raw;
    if (t->body.kind == H1_LENGTH) {
        if (data->len > t->left)
            data->len = (size_t)t->left;
        t->left -= data->len;
        t->is_done = t->left == 0;
    }
    return (int)data->len;
}

/* Decode what has arrived. buf[from..*len) holds the body so far (unless it
 * lies in a big buffer), then raw bytes; afterwards only the body, then
 * bytes of a next message.
 * Returns 0 (see is_done), -EV_BODY_LIMIT, -EV_BODY_POOL, -EV_H1_*. */
MUST_USE static int intake_take(struct intake *t, uint8_t *buf, size_t from,
    size_t cap, size_t *len)
{
    size_t at = from + (t->big ? 0 : t->len), begin = at;
    while (!t->is_done && at < *len) {
        sl data;
        int n = intake_decode(t, (sl){ buf + at, *len - at }, &data);
        if (n < 0)
            return n;
        if (data.len > t->limit - t->len)
            return -EV_BODY_LIMIT;
        uint8_t *to = t->big ? big_buf(t->big) : buf + from;
        memmove(to + t->len, data.p, data.len);
        t->len += data.len;
        at += (size_t)n;
    }
    begin = from + (t->big ? 0 : t->len);
    memmove(buf + begin, buf + at, *len - at);
    *len -= at - begin;
    if (t->is_done || t->big || *len < cap)
        return 0;
    t->big = big_take(t->limit);
    if (!t->big)
        return -EV_BODY_POOL;
    memcpy(big_buf(t->big), buf + from, t->len);
    *len = from;
    return 0;
}

static uint8_t *intake_body(const struct intake *t, uint8_t *buf, size_t from)
{
    return t->big ? big_buf(t->big) : buf + from;
}

/* What a call is: set by its owner, unchanged afterwards. */
struct up_call {
    enum kind owner;
    uint16_t owner_idx;
    enum target_label label;
    struct trust trust;
    bool is_tls, search;     /* search: resolv.conf's list may be used */
    bool is_known;           /* a stranger who named a user of its own */
    sl host;                 /* to resolve and dial; IPv6 in brackets */
    uint16_t port;
    sl cert_name;            /* for SNI and certificate */
    size_t reply_cap;
    size_t tries;            /* addresses that may be dialled; 0: all */
    int64_t end;             /* deadline of the call, absolute */
    /* the request; NULL: no HTTP, the owner takes over the connection */
    void (*build)(uint16_t owner_idx, struct bb *b);
    bool skip_verify;        /* without HTTP: accept any certificate */
    struct memo *breaker;    /* hears how the call ended; NULL: none */
    sl server;               /* its name in the log */
};

/* One call in progress.
 * owner:    up_pool; the owner object closes it with up_close()
 * lifetime: up_open to up_close */
struct up {
    enum up_state state;
    struct up_call call;
    uint8_t host[LIM_HOST_LEN + 2], cert[LIM_HOST_LEN + 2];
    struct name peer;
    enum tls_mode tls;
    uint8_t key[16];
    enum event why;
    const char *step;        /* where it failed: address connect tls http */
    int detail;              /* errno or BearSSL error, 0 none */
    struct addr addr;        /* last address dialled */
    bool has_addr, is_denied, is_kept, is_retried;
    bool has_turn;           /* TLS_BUDGET is charged */
    struct addr try_addr[LIM_TRY_CNT];
    int try_fd[LIM_TRY_CNT];
    bool try_over[LIM_TRY_CNT];      /* failed, or won */
    size_t try_cnt, dial_cnt;
    int64_t first_at, stage_end, stagger_at, begin_us;
    uint64_t number;         /* of all calls, in order of opening */
    struct chan *chan;
    struct h1_head head;
    size_t head_len, in_len;
    unsigned interim_cnt;
    struct intake intake;
};
static struct up up_pool[LIM_UP_ALL];
static uint8_t up_in[LIM_UP_ALL][LIM_REPLY_IN];

static uint64_t up_number;

static void lookup_wake_srv(void);

static void res_wake_waiters(void)
{
    for (size_t i = 0; i < COUNT_OF(up_pool); i++)
        if (up_pool[i].state == UP_RESOLVE)
            loop_wake(KIND_UP, i);
    lookup_wake_srv();
}

/* A handshake slot is free: wake who waits, the operator's calls first,
 * then listed servers', and in each class the oldest. */
static void up_wake_tls_waiters(void)
{
    for (int class = CLASS_OPERATOR; class >= CLASS_STRANGER; class--) {
        uint64_t after = 0;
        for (;;) {
            struct up *next = NULL;
            for (size_t i = 0; i < COUNT_OF(up_pool); i++) {
                struct up *u = &up_pool[i];
                if (u->state == UP_TLS_SLOT && u->number > after
                    && (int)u->call.trust.class == class
                    && (!next || u->number < next->number))
                    next = u;
            }
            if (!next)
                break;
            after = next->number;
            loop_wake(KIND_UP, (size_t)(next - up_pool));
        }
    }
}

/* The reply of a finished call. */
static uint8_t *up_body(struct up *u)
{
    return intake_body(&u->intake, up_in[u - up_pool], u->head_len);
}

/* What a call says of its peer, where a 5xx is a failure; one that is given
 * up says nothing. */
static enum verdict up_verdict(const struct up *u)
{
    if (u->state == UP_DONE && u->head.status == 500
        && u->call.owner == KIND_INQUIRY)
        return PEER_UNASKED;             /* a user's words may be why (T31) */
    if (u->state == UP_DONE)
        return u->head.status >= 500 ? PEER_FAILED : PEER_OK;
    return u->state == UP_FAILED ? peer_verdict(u->why) : PEER_UNASKED;
}

/* Tell the breaker of a call's peer. The owner asked breaker_refuses. */
static void up_report(const struct up_call *c, enum verdict v, int64_t now)
{
    if (c->breaker)
        breaker_report(c->breaker, c->trust.class, v, c->server, now);
}

static sl up_field(const struct up *u, enum h1_field f)
{
    return h1_get((sl){ up_in[u - up_pool], u->head_len }, &u->head, f);
}

/* Close all tries but the one at `keep` (LIM_TRY_CNT: all). */
static void up_drop_tries(struct up *u, size_t keep)
{
    for (size_t k = 0; k < LIM_TRY_CNT; k++)
        if (k != keep && u->try_fd[k] >= 0) {
            loop_set(KIND_TRY, (size_t)(u - up_pool) * LIM_TRY_CNT + k, -1,
                0, INT64_MAX);
            io_close(&u->try_fd[k]);
        }
}

/* The first address neither tried nor under way, or try_cnt. */
static size_t up_next_try(const struct up *u)
{
    size_t k = 0;
    while (k < u->try_cnt && (u->try_over[k] || u->try_fd[k] >= 0))
        k++;
    return k;
}

/* Watch what the state waits for. */
static void up_watch(struct up *u)
{
    size_t idx = (size_t)(u - up_pool);
    int64_t end = u->stage_end < u->call.end ? u->stage_end : u->call.end;
    int fd = u->chan ? u->chan->fd : -1, want = 0;
    switch (u->state) {
    case UP_FREE:
    case UP_DONE:
    case UP_FAILED:
        fd = -1;
        end = INT64_MAX;
        break;
    case UP_RESOLVE:
        if (u->first_at && u->first_at + LIM_RESOLUTION_MS < end)
            end = u->first_at + LIM_RESOLUTION_MS;
        break;
    case UP_DIAL:
        if (up_next_try(u) < u->try_cnt && u->stagger_at < end)
            end = u->stagger_at;
        break;
    case UP_ADDR_SLOT:
    case UP_TLS_SLOT:                /* a reset shows at the handshake */
        fd = -1;
        break;
    case UP_TLS:
        want = br_ssl_engine_current_state(
            &chan_tls[u->chan - chan_pool].eng) & BR_SSL_SENDREC
            ? POLLOUT : POLLIN;
        break;
    case UP_SEND:
        want = POLLOUT;
        break;
    case UP_RECV:
        want = POLLIN;
        break;
    }
    loop_set(KIND_UP, idx, fd, want, end);
}

static void up_end(struct up *u, enum up_state state)
{
    up_drop_tries(u, LIM_TRY_CNT);
    u->state = state;
    up_watch(u);
    met.upstream[u->call.label][state == UP_FAILED]++;
    met_observe(&met.upstream_time[u->call.label],
        io_now_us() - u->begin_us);
    loop_wake(u->call.owner, u->call.owner_idx);
}

static void up_fail(struct up *u, enum event why, const char *step, int detail)
{
    if (u->chan)
        loop_set(KIND_UP, (size_t)(u - up_pool), -1, 0, INT64_MAX);
    if (u->chan)
        chan_close(u->chan);
    u->chan = NULL;
    u->why = why;
    u->step = step;
    u->detail = detail;
    up_end(u, UP_FAILED);
}

static void up_start_tries(struct up *u, int64_t now);
static void up_send(struct up *u, int64_t now);

/* Begin, on a kept connection when there is one. */
static void up_begin(struct up *u, int64_t now)
{
    struct chan *kept = u->is_retried || !u->call.build ? NULL
        : chan_reuse(u->key, &u->call.trust);
    u->head = (struct h1_head){ 0 };
    u->head_len = u->in_len = 0;
    u->interim_cnt = 0;
    u->intake = (struct intake){ 0 };
    if (kept) {
        u->chan = kept;
        u->addr = kept->addr;
        u->has_addr = u->is_kept = true;
        up_send(u, now);
        return;
    }
    u->is_kept = false;
    u->first_at = 0;
    u->try_cnt = 0;
    memset(u->try_over, 0, sizeof u->try_over);
    u->state = UP_RESOLVE;
    u->stage_end = now + LIM_DNS_MS;
    loop_wake(KIND_UP, (size_t)(u - up_pool));
    up_watch(u);
}

/* Open a call in the slots [from, to). Returns NULL when none is free. The
 * owner is woken when the call is done or failed. */
static struct up *up_open(const struct up_call *call, size_t from, size_t to,
    int64_t now)
{
    size_t i = from;
    while (i < to && up_pool[i].state != UP_FREE)
        i++;
    if (i == to || call->host.len > LIM_HOST_LEN
        || call->cert_name.len > LIM_HOST_LEN) {
        up_report(call, PEER_UNASKED, now);
        return NULL;
    }
    struct up *u = &up_pool[i];
    memset(u, 0, sizeof *u);
    u->call = *call;
    memcpy(u->host, call->host.p, call->host.len);
    memcpy(u->cert, call->cert_name.p, call->cert_name.len);
    u->call.host = (sl){ u->host, call->host.len };
    u->call.cert_name = (sl){ u->cert, call->cert_name.len };
    for (size_t k = 0; k < LIM_TRY_CNT; k++)
        u->try_fd[k] = -1;
    if (!host_parse(u->call.cert_name, true, &u->peer))
        u->peer = (struct name){ .host = u->call.cert_name };
    u->tls = !call->is_tls ? TLS_OFF
        : (call->build ? cfg.insecure : call->skip_verify) ? TLS_UNVERIFIED
        : TLS_VERIFIED;
    chan_key(u->call.host, call->port, u->call.cert_name, u->tls, u->key);
    u->begin_us = io_now_us();
    u->number = ++up_number;
    met.gauge[GA_UPSTREAM]++;
    up_begin(u, now);
    return u;
}

/* Whether a call is at an address, or waits to be. */
static bool up_is_at(const struct up *u, const struct ip *ip)
{
    if (u->state == UP_ADDR_SLOT)
        return ip_eq(&u->try_addr[up_next_try(u)].ip, ip);
    bool is_at = u->chan && ip_eq(&u->addr.ip, ip);
    for (size_t k = 0; k < LIM_TRY_CNT; k++)
        is_at |= u->try_fd[k] >= 0 && ip_eq(&u->try_addr[k].ip, ip);
    return is_at;
}

/* Whether a stranger's call must not go to an address yet: as many as may
 * are there, or have waited longer. Many names can lead to one address. */
static bool up_addr_is_full(const struct up *u, const struct ip *ip)
{
    int cap = cfg.is_open ? LIM_DEST_OPEN : LIM_DEST_ADDR;
    for (size_t i = 0; i < LIM_UP_ALL && cap; i++) {
        const struct up *v = &up_pool[i];
        cap -= v != u && v->state != UP_FREE
            && v->call.trust.class == CLASS_STRANGER
            && (v->state != UP_ADDR_SLOT || v->number < u->number)
            && up_is_at(v, ip);
    }
    return cap == 0;
}

/* A call leaves its address: wake who has waited for it longest. */
static void up_wake_addr_waiter(const struct up *left)
{
    const struct up *next = NULL;
    for (size_t i = 0; i < LIM_UP_ALL; i++) {
        const struct up *u = &up_pool[i];
        if (u->state == UP_ADDR_SLOT && up_is_at(u, &left->addr.ip)
            && (!next || u->number < next->number))
            next = u;
    }
    if (next)
        loop_wake(KIND_UP, (size_t)(next - up_pool));
}

/* Free a call; a connection whose reply ended cleanly is kept. */
static void up_close(struct up *u, int64_t now)
{
    if (u->state == UP_FREE)
        return;
    up_report(&u->call, up_verdict(u), now);
    up_drop_tries(u, LIM_TRY_CNT);
    loop_set(KIND_UP, (size_t)(u - up_pool), -1, 0, INT64_MAX);
    if (u->chan) {
        bool clean = u->state == UP_DONE && h1_keeps(&u->head)
            && u->intake.body.kind != H1_CLOSE
            && u->in_len == u->head_len + (u->intake.big ? 0 : u->intake.len);
        if (clean)
            chan_keep(u->chan, now);
        else
            chan_close(u->chan);
    }
    u->chan = NULL;
    big_free(&u->intake.big);
    u->state = UP_FREE;
    met.gauge[GA_UPSTREAM]--;
    if (u->has_addr && u->call.trust.class == CLASS_STRANGER)
        up_wake_addr_waiter(u);
}

/* Dial the addresses that are known. */
static void up_dial(struct up *u, int64_t now)
{
    u->state = UP_DIAL;
    u->stage_end = now + LIM_CONNECT_MS;
    up_start_tries(u, now);
}

static void up_step_resolve(struct up *u, int64_t now)
{
    struct ip list[LIM_TRY_CNT];
    struct name n;
    enum res got = RES_OK;
    size_t cnt = 1;
    if (name_parse(u->call.host, &n) && n.is_ip)
        list[0] = n.ip;
    else
        got = res_addresses(u->call.host, (struct res_how){ u->call.search,
            u->call.trust.class != CLASS_STRANGER }, now, &u->first_at,
            list, &cnt);
    if (got == RES_WAIT) {
        up_watch(u);
        return;
    }
    if (got != RES_OK) {
        up_fail(u, got == RES_FAILED ? EV_DNS_FAILED : EV_DNS_NONE,
            "address", 0);
        return;
    }
    for (size_t i = 0; i < cnt; i++)
        u->try_addr[i] = (struct addr){ list[i], u->call.port };
    u->try_cnt = u->call.tries && u->call.tries < cnt ? u->call.tries : cnt;
    u->is_denied = true;
    up_dial(u, now);
}

/* A denied address: say which range, and how to allow it if that can be. */
static void up_log_denied(const struct up *u, const struct addr *a)
{
    const char *range;
    uint8_t text[64], hint[96];
    bool never = ip_range(a->ip, &range) == RANGE_N;
    struct bb b = BB(hint), ip = BB(text);
    bb_ip(&ip, &a->ip, 0);
    sl bare = a->ip.v6 ? (sl){ text + 1, ip.len - 2 } : (sl){ text, ip.len };
    bb_str(&b, "LKJWT_ALLOW_NETWORKS=");
    bb_put(&b, bare);
    LOG(EV_SSRF_DENIED, KV("host", u->call.host), KV("addr", bare),
        KV("range", sl_str(range)),
        KV("allow", (sl){ hint, never ? 0 : b.len }));
}

/* Start the next connection attempts: one now, another whenever
 * LIM_STAGGER_MS pass without success (RFC 8305 section 5). */
static void up_start_tries(struct up *u, int64_t now)
{
    size_t pending = 0, k, idx = (size_t)(u - up_pool);
    bool is_stranger = u->call.trust.class == CLASS_STRANGER;
    for (k = 0; k < LIM_TRY_CNT; k++)
        pending += u->try_fd[k] >= 0;
    while ((k = up_next_try(u)) < u->try_cnt
           && (pending == 0 || now >= u->stagger_at)) {
        if (is_stranger && up_addr_is_full(u, &u->try_addr[k].ip)) {
            u->stagger_at = now + LIM_STAGGER_MS;
            if (pending == 0) {
                u->state = UP_ADDR_SLOT;
                u->stage_end = now + 1000;
                up_watch(u);
                return;
            }
            break;
        }
        int fd = io_connect(&u->try_addr[k], &u->call.trust, false);
        if (fd == -EACCES)
            up_log_denied(u, &u->try_addr[k]);
        if (fd != -EACCES || u->is_denied) {
            u->addr = u->try_addr[k];
            u->has_addr = true;
        }
        u->try_over[k] = fd < 0;
        if (fd == -EACCES)
            continue;
        u->is_denied = false;
        u->dial_cnt++;
        u->detail = fd < 0 ? -fd : 0;
        if (fd < 0)
            continue;
        u->try_fd[k] = fd;
        u->stagger_at = now + LIM_STAGGER_MS;
        pending++;
        loop_set(KIND_TRY, idx * LIM_TRY_CNT + k, fd, POLLOUT, INT64_MAX);
    }
    if (pending)
        up_watch(u);
    else
        up_fail(u, u->is_denied ? EV_SSRF_DENIED : EV_CONNECT_FAILED,
            "connect", u->detail);
}

/* The handshake failed: the next address, when there is one. Attempts that
 * were given up for this one count as untried. */
static void up_tls_failed(struct up *u, enum event why, int detail,
    int64_t now)
{
    if (up_next_try(u) == u->try_cnt) {
        up_fail(u, why, "tls", detail);
        return;
    }
    loop_set(KIND_UP, (size_t)(u - up_pool), -1, 0, INT64_MAX);
    chan_close(u->chan);
    u->chan = NULL;
    u->has_turn = false;
    u->stagger_at = now;
    up_dial(u, now);
}

/* Who has waited longest for a part of the TLS budget, and has the time to
 * use it: strangers that are known, or those that are not. NULL: nobody. */
static struct up *up_first_cold(bool is_known, int64_t now)
{
    struct up *first = NULL;
    for (size_t i = 0; i < LIM_UP_ALL; i++) {
        struct up *u = &up_pool[i];
        if (u->state == UP_TLS_SLOT && !u->has_turn
            && u->call.is_known == is_known
            && now + LIM_COLD_LEFT_MS <= u->call.end
            && (!first || u->number < first->number))
            first = u;
    }
    return first;
}

/* Handshakes with strangers that no session shortens are counted: half the
 * budget is kept for those that are known. Its parts go out in order; the
 * first in the queue looks whether there is one, the others are woken.
 * False: not now, stage_end says when to look again. */
static bool up_take_turn(struct up *u, int64_t now)
{
    static struct memo cold;
    struct rate r = { cfg.tls_cold_per_s * LIM_COLD_BURST, 0 };
    if (u->call.trust.class != CLASS_STRANGER || r.burst == 0
        || session_is_fresh(u->key))
        u->has_turn = true;
    if (u->has_turn)
        return true;
    if (up_first_cold(u->call.is_known, now) != u) {
        u->stage_end = now + 1000;
        return false;
    }
    r.interval_us = 1000000 / cfg.tls_cold_per_s;
    r.burst = u->call.is_known ? r.burst : r.burst / 2;
    u->has_turn = rate_take(&cold, &r, now);
    struct up *next = u->has_turn ? up_first_cold(u->call.is_known, now)
        : NULL;
    if (next)
        loop_wake(KIND_UP, (size_t)(next - up_pool));
    u->stage_end = now + LIM_COLD_WAIT_MS;
    return u->has_turn;
}

/* Enter TLS as soon as one of the handshake slots is free. */
static void up_step_tls_slot(struct up *u, int64_t now)
{
    u->state = UP_TLS_SLOT;
    bool turn = up_take_turn(u, now);
    struct hs *h = turn ? hs_take(u->call.trust.class, u->key) : NULL;
    if (!h) {
        u->stage_end = turn ? u->call.end : u->stage_end;
        up_watch(u);
        return;
    }
    u->state = UP_TLS;
    u->stage_end = now + LIM_TLS_MS;
    if (!chan_start_tls(u->chan, h, &u->peer, u->tls,
                        u->call.build != NULL)) {
        up_fail(u, EV_TLS_FAILED, "tls", 0);
        return;
    }
    loop_wake(KIND_UP, (size_t)(u - up_pool));
    up_watch(u);
}

/* One attempt's socket became ready. */
static enum step try_step(size_t idx, int revents, int64_t now)
{
    struct up *u = &up_pool[idx / LIM_TRY_CNT];
    size_t k = idx % LIM_TRY_CNT;
    if (u->state != UP_DIAL || u->try_fd[k] < 0 || !revents)
        return STEP_WAIT;
    int err = io_connected(u->try_fd[k]);
    loop_set(KIND_TRY, idx, -1, 0, INT64_MAX);
    u->try_over[k] = true;
    if (err) {
        u->detail = -err;
        u->addr = u->try_addr[k];
        io_close(&u->try_fd[k]);
        up_start_tries(u, now);
        return STEP_WAIT;
    }
    u->chan = chan_open(u->try_fd[k], &u->try_addr[k], u->key);
    if (!u->chan) {
        up_fail(u, EV_CHAN_FULL, "connect", 0);
        return STEP_WAIT;
    }
    u->try_fd[k] = -1;
    u->addr = u->try_addr[k];
    up_drop_tries(u, LIM_TRY_CNT);
    if (u->call.is_tls)
        up_step_tls_slot(u, now);
    else
        up_send(u, now);
    return STEP_WAIT;
}

static void up_step_tls(struct up *u, int64_t now)
{
    struct chan *ch = u->chan;
    br_ssl_engine_context *eng = &chan_tls[ch - chan_pool].eng;
    int err = tls_pump(ch, 2);      /* one record: its head, its body */
    if (br_ssl_engine_current_state(eng) & BR_SSL_SENDAPP) {
        chan_tls_up(ch);
        up_send(u, now);
        return;
    }
    if (err == 0 || err == -EAGAIN) {
        up_watch(u);
        return;
    }
    up_tls_failed(u, chan_tls_why(ch), br_ssl_engine_last_error(eng), now);
}

static uint8_t scratch[LIM_SCRATCH_LEN];    /* one message being written */

static void up_step_send(struct up *u, int64_t now);
static void up_broken(struct up *u, int64_t now);

/* The connection stands: write the request. */
static void up_send(struct up *u, int64_t now)
{
    struct bb b = BB(scratch);
    sl text;
    if (!u->call.build) {
        up_end(u, UP_DONE);
        return;
    }
    u->state = UP_SEND;
    u->stage_end = now + LIM_REPLY_MS;
    u->call.build(u->call.owner_idx, &b);
    bool ok = bb_finish(&b, &text), taken = ok && chan_put(u->chan, text);
    wipe(scratch, b.len);
    if (taken)
        up_step_send(u, now);
    else if (ok && u->is_kept)       /* the engine has something else to say */
        up_broken(u, now);
    else
        up_fail(u, EV_BUG_OVERFLOW, "http", 0);
}

/* A connection died. A kept one, before any reply byte, is replaced once. */
static void up_broken(struct up *u, int64_t now)
{
    if (!u->is_kept || u->in_len > 0) {
        up_fail(u, EV_REPLY_CLOSED, "http", 0);
        return;
    }
    loop_set(KIND_UP, (size_t)(u - up_pool), -1, 0, INT64_MAX);
    chan_close(u->chan);
    u->chan = NULL;
    u->is_retried = true;
    up_begin(u, now);
}

static void up_step_send(struct up *u, int64_t now)
{
    int err = chan_flush(u->chan);
    if (err == -ECONNRESET) {
        up_broken(u, now);
        return;
    }
    if (err == 0) {
        u->state = UP_RECV;
        u->stage_end = now + LIM_REPLY_MS;
    }
    up_watch(u);
}

/* Judge a complete head; skip interim ones.
 * Returns 1 body follows, 0 an interim head was dropped, -EV_*. */
MUST_USE static int up_head(struct up *u, size_t head_len)
{
    uint8_t *in = up_in[u - up_pool];
    sl text = { in, head_len };
    struct h1_body body;
    if (u->head.status < 200) {
        if (u->head.status == 101)
            return -EV_REPLY_BAD;
        if (++u->interim_cnt > LIM_REPLY_1XX)
            return -EV_REPLY_LIMIT;
        memmove(in, in + head_len, u->in_len - head_len);
        u->in_len -= head_len;
        u->head = (struct h1_head){ 0 };
        return 0;
    }
    sl coding = h1_get(text, &u->head, H1_CONTENT_ENCODING);
    if (h1_framing(text, &u->head, true, &body)
        || (coding.len && !sl_ieq(coding, SL("identity"))))
        return -EV_REPLY_BAD;
    if (body.kind == H1_LENGTH && body.len > u->call.reply_cap)
        return -EV_REPLY_LIMIT;
    u->head_len = head_len;
    intake_start(&u->intake, body, u->call.reply_cap);
    return 1;
}

/* Use what has arrived. Returns 1 complete, 0 need more, -EV_*. */
MUST_USE static int up_take(struct up *u)
{
    uint8_t *in = up_in[u - up_pool];
    while (u->head_len == 0) {
        int n = h1_parse_head((sl){ in, u->in_len }, true, &u->head);
        if (n == 0)
            return 0;
        if (n < 0)
            return n == -EV_HEAD_LIMIT ? -EV_REPLY_LIMIT : -EV_REPLY_BAD;
        n = up_head(u, (size_t)n);
        if (n < 0)
            return n;
    }
    int err = intake_take(&u->intake, in, u->head_len, LIM_REPLY_IN,
        &u->in_len);
    if (err)
        return err == -EV_BODY_LIMIT ? -EV_REPLY_LIMIT
            : err == -EV_BODY_POOL ? err : -EV_REPLY_BAD;
    return u->intake.is_done;
}

static void up_step_recv(struct up *u, int64_t now)
{
    uint8_t *in = up_in[u - up_pool];
    for (int rounds = 0; rounds < 8; rounds++) {
        ssize_t n = chan_read(u->chan, in + u->in_len,
            LIM_REPLY_IN - u->in_len);
        if (n == -EAGAIN) {
            up_watch(u);
            return;
        }
        if (n == 0 && u->head_len && u->intake.body.kind == H1_CLOSE) {
            u->intake.is_done = true;
            up_end(u, UP_DONE);
            return;
        }
        if (n <= 0) {
            up_broken(u, now);
            return;
        }
        u->in_len += (size_t)n;
        int got = up_take(u);
        if (got < 0) {
            up_fail(u, (enum event)-got, "http", 0);
            return;
        }
        if (got) {
            up_end(u, UP_DONE);
            return;
        }
    }
    loop_wake(KIND_UP, (size_t)(u - up_pool));   /* the engine may hold more */
    up_watch(u);
}

/* The stage's deadline passed. */
static void up_timeout(struct up *u, int64_t now)
{
    switch (u->state) {
    case UP_RESOLVE:
        up_fail(u, EV_DNS_FAILED, "address", 0);
        return;
    case UP_DIAL:
        up_fail(u, EV_CONNECT_TIMEOUT, "connect", 0);
        return;
    case UP_ADDR_SLOT:
        up_fail(u, EV_WAIT_TIMEOUT, "connect", 0);
        return;
    case UP_TLS_SLOT:
        up_fail(u, EV_TLS_BUDGET, "tls", 0);
        return;
    case UP_TLS:
        if (now < u->call.end)
            up_tls_failed(u, EV_TLS_TIMEOUT, 0, now);
        else
            up_fail(u, EV_TLS_TIMEOUT, "tls", 0);
        return;
    case UP_SEND:
    case UP_RECV:
        up_fail(u, EV_HS_TIMEOUT, "http", 0);
        return;
    case UP_FREE:
    case UP_DONE:
    case UP_FAILED:
        return;
    }
}

/* Move at most one row on; the owner is woken at the end. */
static enum step up_step(size_t idx, int revents, int64_t now)
{
    struct up *u = &up_pool[idx];
    bool waits = u->state == UP_ADDR_SLOT || u->state == UP_TLS_SLOT;
    int64_t end = waits ? u->call.end : u->stage_end;
    (void)revents;
    if (u->state != UP_FREE && (now >= end || now >= u->call.end)) {
        up_timeout(u, now);
        return STEP_WAIT;
    }
    switch (u->state) {
    case UP_RESOLVE:  up_step_resolve(u, now); return STEP_WAIT;
    case UP_ADDR_SLOT: up_dial(u, now); return STEP_WAIT;
    case UP_DIAL:     up_start_tries(u, now); return STEP_WAIT;
    case UP_TLS_SLOT: up_step_tls_slot(u, now); return STEP_WAIT;
    case UP_TLS:      up_step_tls(u, now); return STEP_WAIT;
    case UP_SEND:     up_step_send(u, now); return STEP_WAIT;
    case UP_RECV:     up_step_recv(u, now); return STEP_WAIT;
    case UP_FREE:
    case UP_DONE:
    case UP_FAILED:   return STEP_WAIT;
    }
    return STEP_WAIT;                 /* unreachable: all named above */
}

/* ==== 18 MATRIX ==================== PART II: MACHINES ================
 * Purpose  Whose OpenID token is it? Find the homeserver of a server name
 *          (server-server API, "Server discovery") and ask it.
 * Trust    The server name is the client's. Whatever DNS, redirects and
 *          well-knowns say only chooses an address; the certificate must
 *          be for the name, and `sub` for the server name (INV-L1).
 * Limits   LIM_UP_CNT, LIM_WELL_KNOWN_LEN, LIM_REDIRECT_CNT, LIM_WK_CNT.
 * INV-L1   A lookup succeeds only with a user of exactly the server name
 *          that was asked for.
 *
 * row state         waits for         success             failure
 * L1  L_WELL_KNOWN  the call          L3, L4; next hop    L3 on the name
 * L2  L_WK_WAIT     another's L1      L3, L4              L3 on the name
 * L3  L_SRV         resolver          L4                  next service, L4
 * L4  L_CALL        the call          L5                  next target, L1
 *                                     (forgetting a cached delegation), L6
 * L5  L_DONE, L6 L_FAILED: the owner reads and closes
 */

enum lookup_state { L_FREE, L_WELL_KNOWN, L_WK_WAIT, L_SRV, L_CALL, L_DONE,
    L_FAILED };

struct target { uint16_t port; uint8_t len, host[LIM_HOST_LEN]; };

/* One lookup.
 * owner:    lookup_pool; the exchange (or --check) that opened it
 * lifetime: lookup_open to lookup_close */
struct lookup {
    enum lookup_state state;
    enum kind owner;
    uint16_t owner_idx;
    sl token, req;           /* borrowed from the owner */
    uint8_t text[LIM_NAME_LEN];
    struct name name;        /* the server name, in text */
    uint64_t dest;           /* its hash, for counting */
    struct trust trust;
    bool is_client;          /* wants the client-server API's base URL */
    bool is_passing;         /* failed, but may do better next time */
    bool is_listed, is_known;
    bool is_late;            /* began with little time left */
    bool is_forgetful;       /* delegation already resolved anew */
    const struct override *over;
    struct up *up;
    unsigned hops;
    uint8_t url_text[LIM_URL_LEN];
    struct url url;          /* of the well-known, in url_text */
    uint8_t dn_text[LIM_NAME_LEN];
    struct name dn;          /* name to resolve: delegated, or the server's */
    bool is_cached;          /* dn comes from the cache */
    unsigned srv_stage;
    struct target target[LIM_TRY_CNT];
    size_t target_cnt, target_next;
    size_t dial_cnt;         /* addresses dialled for userinfo */
    sl user;                 /* L_DONE: verified user, or the base URL */
    enum event why;
    const char *step;
    int64_t end;
};
static struct lookup lookup_pool[LIM_UP_CNT];

/* What is counted of them before one more begins. */
static struct { uint64_t dest, tail; bool is_used; } lookup_hot[LIM_UP_CNT];
static int64_t lookup_active, lookup_strangers, lookup_unknown;

/* Where --check wants to see each step; unset while serving. */
static void (*note_hook)(const char *step, bool ok, sl text);

/* Tell of one step towards a peer: debug log, and --check. */
static void note(const char *step, bool ok, sl server, sl text)
{
    LOG(EV_LOOKUP_STEP, KV("step", sl_str(step)), KV("server", server),
        KV("result", ok ? SL("ok") : SL("no")), KV("detail", text));
    if (note_hook)
        note_hook(step, ok, text);
}

/* Result of a well-known fetch; all zero is free. */
enum wk_state { WK_FREE, WK_PENDING, WK_OK, WK_NONE };
static uint64_t wk_key[LIM_WK_CNT];
static struct wk {
    uint8_t state, fails;
    uint16_t len;
    int64_t until, good_until;       /* good_until: text may still serve */
    uint8_t text[LIM_NAME_LEN];
} wk_cache[LIM_WK_CNT];

/* The slot of a server name: its own, else a free one, else one to replace;
 * NULL if the four that it may replace are being fetched. */
static struct wk *wk_slot(sl name, int64_t now)
{
    uint64_t key = memo_key('w', name);
    size_t i = key_find(wk_key, LIM_WK_CNT, key);
    if (i < LIM_WK_CNT)
        return &wk_cache[i];
    i = key_find(wk_key, LIM_WK_CNT, 0);
    struct wk *best = i < LIM_WK_CNT ? &wk_cache[i] : NULL;
    for (size_t n = 0; i == LIM_WK_CNT && n < 4; n++) {
        struct wk *w = &wk_cache[key_set(key, LIM_WK_CNT) + n];
        if (w->state != WK_PENDING && (!best || w->until < best->until))
            best = w;
    }
    if (best) {
        met.evicted += best->state != WK_FREE && best->until > now;
        memset(best, 0, sizeof *best);
        wk_key[best - wk_cache] = key;
    }
    return best;
}

static size_t lookup_idx(const struct lookup *l)
{
    return (size_t)(l - lookup_pool);
}

static void lookup_wake_srv(void)
{
    for (size_t i = 0; i < LIM_UP_CNT; i++)
        if (lookup_pool[i].state == L_SRV)
            loop_wake(KIND_LOOKUP, i);
}

static bool name_in(sl name, const sl *list, size_t cnt)
{
    for (size_t i = 0; i < cnt; i++)
        if (sl_eq(list[i], name))
            return true;
    return false;
}

/* `name` itself, or `*.suffix` for names below it. A pattern without a
 * port stands for every port. Hosts compare as DNS and IP do: case-blind,
 * without a trailing dot, addresses by value. */
static bool name_matches(const struct name *n, sl pattern)
{
    struct name p;
    bool below = sl_starts(pattern, SL("*."));
    if (!name_parse(below ? sl_skip(pattern, 2) : pattern, &p)
        || (p.port && p.port != n->port))
        return false;
    if (sl_ends(p.host, SL(".")))
        p.host.len--;
    if (p.is_ip || n->is_ip)
        return !below && p.is_ip && n->is_ip && ip_eq(&p.ip, &n->ip);
    if (!below)
        return sl_ieq(p.host, n->host);
    size_t cut = n->host.len - p.host.len;
    return n->host.len > p.host.len + 1 && n->host.p[cut - 1] == '.'
        && sl_ieq(sl_skip(n->host, cut), p.host);
}

/* LKJWT_ALLOWED_HOMESERVERS and LKJWT_BLOCKED_HOMESERVERS; blocked wins.
 * DNS is case-blind and knows a trailing dot, so the lists are too. */
static bool name_denied(const struct name *given)
{
    struct name n = *given;
    if (sl_ends(n.host, SL(".")))
        n.host.len--;
    bool ok = cfg.allowed_cnt == 0;
    for (size_t i = 0; i < cfg.allowed_cnt && !ok; i++)
        ok = name_matches(&n, cfg.allowed[i]);
    for (size_t i = 0; i < cfg.blocked_cnt && ok; i++)
        ok = !name_matches(&n, cfg.blocked[i]);
    return !ok;
}

static const struct override *override_find(const struct override *tab,
    size_t cnt, sl name)
{
    for (size_t i = 0; i < cnt; i++)
        if (sl_eq(tab[i].name, name))
            return &tab[i];
    return NULL;
}

/* Whether the operator named this server (SECURITY, destination classes). */
static bool name_is_listed(sl whole)
{
    return name_in(whole, cfg.full_access, cfg.full_access_cnt)
        || (cfg.has_as && sl_eq(whole, cfg.hs_name.whole))
        || override_find(cfg.fed, cfg.fed_cnt, whole)
        || override_find(cfg.cs, cfg.cs_cnt, whole);
}

/* Whether the verified server of a user has full access.
 * GRANTS: room creation and publishing. */
static bool has_full_access(sl verified_server)
{
    return cfg.is_open
        || name_in(verified_server, cfg.full_access, cfg.full_access_cnt);
}

static struct trust name_trust(const struct name *n, bool is_listed)
{
    return (struct trust){ is_listed ? CLASS_LISTED : CLASS_STRANGER,
        !cfg.private_deny && (is_listed || cfg.insecure
                              || (cfg.is_open && !n->is_ip)) };
}

static void wk_finish(struct lookup *l, sl dn, int64_t ttl_s, bool passing,
    int64_t now);

/* Tell the breaker of the server how its lookup ended; EV_NONE: well. */
static void lookup_report(const struct lookup *l, enum event why)
{
    enum verdict v = why == EV_NONE ? PEER_OK : peer_verdict(why);
    v = v == PEER_FAILED && l->is_late ? PEER_UNASKED : v;
    int64_t now = io_now();
    struct memo *b = l->is_client ? NULL : v == PEER_FAILED
        ? memo_make(breaker_cache, LIM_BREAKER_CNT, l->dest, now)
        : memo_find(breaker_cache, LIM_BREAKER_CNT, l->dest);
    if (b)
        breaker_report(b, l->trust.class, v, l->name.whole, now);
}

static void lookup_fail(struct lookup *l, enum event why, const char *step)
{
    uint8_t addr[64], num[20];
    if (l->state == L_WELL_KNOWN && !l->is_client)   /* nobody shall wait */
        wk_finish(l, (sl){ NULL, 0 },
            up_was_held(why) ? INT64_MIN : 0, true, io_now());
    if (why != EV_BREAKER_OPEN)
        lookup_report(l, why);
    const struct up *u = l->up;
    bool has_addr = u && u->has_addr;
    bool has_status = u && u->state == UP_DONE;
    l->state = L_FAILED;
    l->why = why;
    l->step = step;
    LOG(why, KV("req", l->req), KV("server", l->name.whole),
        KV("step", sl_str(step)),
        KV("host", u ? u->call.host : (sl){ NULL, 0 }),
        KV("addr", has_addr ? text_addr(addr, &u->addr) : (sl){ NULL, 0 }),
        KV(has_status ? "status" : "detail",
           has_status ? text_u64(num, u->head.status)
           : u && u->detail ? text_u64(num, (uint64_t)u->detail)
                            : (sl){ NULL, 0 }));
    loop_set(KIND_LOOKUP, lookup_idx(l), -1, 0, INT64_MAX);
    loop_wake(l->owner, l->owner_idx);
}

static void lookup_done(struct lookup *l)
{
    int64_t now = io_now();
    lookup_report(l, EV_NONE);
    if (!l->is_listed && !l->is_client)
        memo_make(known_cache, LIM_KNOWN_CNT, l->dest, now)->at
            = now + LIM_KNOWN_MS;
    l->state = L_DONE;
    loop_set(KIND_LOOKUP, lookup_idx(l), -1, 0, INT64_MAX);
    loop_wake(l->owner, l->owner_idx);
}

/* Tell how far the call got: connection, then certificate. */
static void lookup_note_call(const struct lookup *l)
{
    const struct up *u = l->up;
    uint8_t addr[64];
    bool http = u->state == UP_DONE || strcmp(u->step, "http") == 0;
    if (u->has_addr && (http || strcmp(u->step, "tls") == 0))
        note("connect", true, l->name.whole, text_addr(addr, &u->addr));
    if (http && u->call.is_tls)
        note("tls", true, l->name.whole, u->call.cert_name);
}

/* Keep n's text in buf, so that *to stays valid. */
static void lookup_keep_name(uint8_t *buf, struct name *to, sl text)
{
    memmove(buf, text.p, text.len);
    if (!name_parse((sl){ buf, text.len }, to))
        *to = (struct name){ .whole = { buf, 0 }, .host = { buf, 0 } };
}

/* A client-given host needs a dot, lest it reach names of the local
 * network (T21); the operator's own names do not. */
static bool host_is_public(const struct lookup *l, const struct name *n)
{
    return l->is_listed || n->is_ip
        || sl_find(n->host, '.') < n->host.len;
}

static bool is_single_label(sl host)
{
    return sl_find(host, '.') == host.len;
}

/* The Host header, and the name the certificate must bear: those of the
 * name that SRV or a port lookup started from (PROTOCOL section 7.3). */
static void lookup_build(uint16_t idx, struct bb *b)
{
    const struct lookup *l = &lookup_pool[idx];
    bb_str(b, "GET ");
    if (l->over)
        bb_put(b, l->over->base.url.path);
    bb_str(b, "/_matrix/federation/v1/openid/userinfo?access_token=");
    bb_percent(b, l->token);
    bb_str(b, " HTTP/1.1\r\nHost: ");
    bb_put(b, l->over ? l->over->base.url.name.whole : l->dn.whole);
    bb_str(b, "\r\nAccept: application/json\r\nUser-Agent: lkjwt/"
        LKJWT_VERSION "\r\n");
    if (l->over && l->req.len) {
        bb_str(b, "X-Request-Id: ");
        bb_put(b, l->req);
        bb_str(b, "\r\n");
    }
    bb_str(b, "\r\n");
}

static void lookup_build_wk(uint16_t idx, struct bb *b)
{
    const struct lookup *l = &lookup_pool[idx];
    bb_str(b, sl_starts(l->url.rest, SL("/")) ? "GET " : "GET /");
    bb_put(b, l->url.rest);
    bb_str(b, " HTTP/1.1\r\nHost: ");
    bb_put(b, l->url.name.whole);
    bb_str(b, "\r\nAccept: application/json\r\nUser-Agent: lkjwt/"
        LKJWT_VERSION "\r\n\r\n");
}

static void lookup_drop_up(struct lookup *l, int64_t now)
{
    if (l->up)
        up_close(l->up, now);
    l->up = NULL;
}

/* Ask the current target for the user. */
static void lookup_call(struct lookup *l, int64_t now)
{
    const struct base *o = l->over ? &l->over->base : NULL;
    const struct target *t = &l->target[l->target_next];
    struct up_call c = { .owner = KIND_LOOKUP,
        .owner_idx = (uint16_t)lookup_idx(l), .label = TL_USERINFO,
        .trust = l->trust, .is_tls = o ? o->is_tls : true,
        .host = o ? o->url.name.host : (sl){ t->host, t->len },
        .port = o ? o->port : t->port,
        .cert_name = o ? o->url.name.host : l->dn.host,
        .reply_cap = LIM_USERINFO_LEN, .end = l->end,
        .tries = LIM_TRY_CNT - l->dial_cnt, .build = lookup_build,
        .is_known = l->is_known };
    c.search = o || (l->is_listed && is_single_label(c.host));
    lookup_drop_up(l, now);
    l->state = L_CALL;
    l->up = up_open(&c, 0, LIM_UP_CNT, now);
    if (!l->up)
        lookup_fail(l, EV_CHAN_FULL, "connect");
    else
        loop_set(KIND_LOOKUP, lookup_idx(l), -1, 0, l->end);
}

static void lookup_one_target(struct lookup *l, uint16_t port, int64_t now)
{
    struct target *t = &l->target[0];
    t->port = port;
    t->len = (uint8_t)l->dn.host.len;
    memcpy(t->host, l->dn.host.p, l->dn.host.len);
    l->target_cnt = 1;
    l->target_next = 0;
    lookup_call(l, now);
}

/* One SRV record out of a cache entry at *at. False at the end. */
static bool srv_take(const struct dns_entry *e, size_t *at, uint16_t num[3],
    sl *host)
{
    const uint8_t *p = e->data + *at;
    if (*at + 7 > e->data_len)
        return false;
    num[0] = be16(p);
    num[1] = be16(p + 2);
    num[2] = be16(p + 4);
    *host = (sl){ p + 7, p[6] };
    *at += 7U + p[6];
    return true;
}

/* Order SRV records: ascending priority, weighted random within one (RFC
 * 2782), at most LIM_TRY_CNT. A lone `.` means no service. */
static void lookup_srv_targets(struct lookup *l, const struct dns_entry *e)
{
    bool used[LIM_DNS_REC_CNT] = { false };
    l->target_cnt = l->target_next = 0;
    while (l->target_cnt < LIM_TRY_CNT) {
        uint16_t num[3], lowest = UINT16_MAX;
        size_t at = 0, pick = LIM_DNS_REC_CNT;
        uint64_t total = 0;
        sl host, chosen = { NULL, 0 };
        uint16_t port = 0;
        for (size_t i = 0; srv_take(e, &at, num, &host); i++)
            if (!used[i] && num[0] <= lowest)
                lowest = num[0];
        at = 0;
        for (size_t i = 0; srv_take(e, &at, num, &host); i++) {
            uint32_t dice;
            if (used[i] || num[0] != lowest)
                continue;
            /* reservoir sampling: each record wins with its share */
            uint32_t weight = num[1] * 16U + 1;
            total += weight;
            io_random(&dice, sizeof dice);
            if (dice % total < weight) {
                pick = i;
                chosen = host;
                port = num[2];
            }
        }
        if (pick == LIM_DNS_REC_CNT)
            return;
        used[pick] = true;
        if (sl_eq(chosen, SL(".")) || port == 0)
            continue;
        struct target *t = &l->target[l->target_cnt++];
        t->port = port;
        t->len = (uint8_t)chosen.len;
        memcpy(t->host, chosen.p, chosen.len);
    }
}

/* Go through _matrix-fed._tcp, _matrix._tcp, then port 8448. */
static void lookup_srv(struct lookup *l, int64_t now)
{
    static const char *const service[] = { "_matrix-fed._tcp.",
        "_matrix._tcp." };
    uint8_t text[LIM_HOST_LEN + 20];
    l->state = L_SRV;
    for (; l->srv_stage < COUNT_OF(service); l->srv_stage++) {
        const struct dns_entry *e;
        struct bb b = BB(text);
        bb_str(&b, service[l->srv_stage]);
        bb_put(&b, l->dn.host);
        sl name = { text, b.len };
        enum res got = res_exact(name, DNS_SRV, l->is_listed, now, &e);
        if (got == RES_WAIT) {
            loop_set(KIND_LOOKUP, lookup_idx(l), -1, 0, l->end);
            return;
        }
        if (got == RES_OK) {
            lookup_srv_targets(l, e);
            if (l->target_cnt) {
                note("srv", true, l->name.whole, name);
                lookup_call(l, now);
                return;
            }
        }
        note("srv", got != RES_FAILED, l->name.whole,
            got == RES_FAILED ? SL("DNS server fails or does not answer")
                              : SL("no record"));
        if (got == RES_FAILED)
            break;
    }
    lookup_one_target(l, 8448, now);
}

/* Resolve the name in dn: literal, port, or services. */
static void lookup_resolve(struct lookup *l, int64_t now)
{
    l->srv_stage = 0;
    if (!host_is_public(l, &l->dn))
        lookup_fail(l, EV_NAME_BAD, "name");
    else if (l->dn.is_ip || l->dn.port)
        lookup_one_target(l, l->dn.port ? l->dn.port : 8448, now);
    else
        lookup_srv(l, now);
}

static void lookup_use(struct lookup *l, sl dn, bool is_cached, int64_t now)
{
    l->is_cached = is_cached;
    lookup_keep_name(l->dn_text, &l->dn, dn);
    lookup_resolve(l, now);
}

/* Write a fetch's result into the cache and wake who waits for it. A
 * refresh that failed for a passing reason keeps the last good answer. */
static void wk_finish(struct lookup *l, sl dn, int64_t ttl_s, bool passing,
    int64_t now)
{
    struct wk *w = wk_slot(l->name.whole, now);
    if (w && ttl_s == INT64_MIN) {       /* not asked: the next one may */
        w->state = w->len ? WK_OK : WK_NONE;
        w->until = now;
    } else if (w && dn.len) {
        ttl_s = ttl_s < 300 ? 300 : ttl_s > 172800 ? 172800 : ttl_s;
        w->state = WK_OK;
        w->fails = 0;
        w->len = (uint16_t)dn.len;
        memmove(w->text, dn.p, dn.len);
        w->until = now + ttl_s * 1000;
        w->good_until = now + 172800000;
    } else if (w) {
        int64_t wait = 60000LL << (w->fails < 6 ? w->fails : 6);
        wait = l->is_listed ? 60000 : wait > 3600000 ? 3600000 : wait;
        w->fails = (uint8_t)(w->fails + (w->fails < 6));
        w->state = passing && w->len && w->good_until > now ? WK_OK
            : WK_NONE;
        w->until = now + wait;
    }
    for (size_t i = 0; i < LIM_UP_CNT; i++)
        if (lookup_pool[i].state == L_WK_WAIT)
            loop_wake(KIND_LOOKUP, i);
}

/* Fetch l->url, one hop. */
static void lookup_fetch(struct lookup *l, int64_t now)
{
    int64_t end = now + LIM_REPLY_MS;
    struct up_call c = { .owner = KIND_LOOKUP,
        .owner_idx = (uint16_t)lookup_idx(l),
        .label = l->is_client ? TL_CLIENT_API : TL_WELL_KNOWN,
        .trust = l->trust, .is_tls = true, .host = l->url.name.host,
        .port = l->url.name.port ? l->url.name.port : 443,
        .cert_name = l->url.name.host,
        .reply_cap = l->is_client ? LIM_RPC_LEN : LIM_WELL_KNOWN_LEN,
        .end = end < l->end ? end : l->end, .build = lookup_build_wk,
        .is_known = l->is_known };
    c.search = l->is_listed && is_single_label(c.host);
    lookup_drop_up(l, now);
    l->up = up_open(&c, 0, LIM_UP_CNT, now);
    if (!l->up)
        lookup_fail(l, EV_CHAN_FULL, "connect");
    else
        loop_set(KIND_LOOKUP, lookup_idx(l), -1, 0, l->end);
}

/* The well-known led nowhere: the name itself is resolved. `passing`: the
 * failure may be gone tomorrow. */
static void lookup_wk_none(struct lookup *l, enum event why, bool passing,
    int64_t now)
{
    uint8_t addr[64];
    LOG(EV_WELL_KNOWN_NONE, KV("req", l->req), KV("server", l->name.whole),
        KV("step", SL("well-known")), KV("host", l->url.name.host),
        KV("addr", l->up && l->up->has_addr ? text_addr(addr, &l->up->addr)
                                            : (sl){ NULL, 0 }),
        KV("reason", sl_str(event_tab[why].label)));
    uint8_t text[256];
    struct bb b = BB(text);
    if (l->up && l->up->has_addr) {
        bb_ip(&b, &l->up->addr.ip, l->up->addr.port);
        bb_str(&b, ": ");
    }
    bb_str(&b, event_tab[why].text);
    note("well-known", false, l->name.whole, (sl){ text, b.len });
    if (l->is_client) {
        l->is_passing = passing;
        lookup_fail(l, why, "well-known");
        return;
    }
    wk_finish(l, (sl){ NULL, 0 }, 0, passing, now);
    lookup_drop_up(l, now);
    struct wk *w = wk_slot(l->name.whole, now);
    if (w && w->state == WK_OK)
        lookup_use(l, (sl){ w->text, w->len }, true, now);
    else
        lookup_use(l, l->name.whole, false, now);
}

/* Follow a redirect to https, at most LIM_REDIRECT_CNT of them. */
static void lookup_redirect(struct lookup *l, int64_t now)
{
    uint8_t text[LIM_URL_LEN + LIM_NAME_LEN + 8];
    struct bb b = BB(text);
    sl to = up_field(l->up, H1_LOCATION);
    struct url u;
    if (sl_starts(to, SL("//"))) {
        bb_str(&b, "https:");
    } else if (sl_starts(to, SL("/"))) {
        bb_str(&b, "https://");
        bb_put(&b, l->url.name.whole);
    }
    bb_put(&b, to);
    bool ok = !b.over && url_parse((sl){ text, b.len }, &u)
        && sl_ieq(u.scheme, SL("https")) && host_is_public(l, &u.name)
        && ++l->hops <= LIM_REDIRECT_CNT;
    if (!ok) {
        lookup_wk_none(l, EV_REDIRECT_BAD, false, now);
        return;
    }
    memcpy(l->url_text, text, b.len);
    if (!url_parse((sl){ l->url_text, b.len }, &l->url)) {
        lookup_wk_none(l, EV_REDIRECT_BAD, false, now);
        return;
    }
    lookup_fetch(l, now);
}

/* The well-known had no turn, for its address or its handshake: an old
 * delegation serves, and nothing is remembered. */
static void lookup_no_turn(struct lookup *l, int64_t now)
{
    struct wk *w = l->is_client ? NULL : wk_slot(l->name.whole, now);
    l->is_passing = true;
    if (!w || w->len == 0 || w->good_until <= now) {
        lookup_fail(l, l->up->why, l->up->step);
        return;
    }
    wk_finish(l, (sl){ NULL, 0 }, INT64_MIN, true, now);
    lookup_drop_up(l, now);
    lookup_use(l, (sl){ w->text, w->len }, true, now);
}

/* The well-known call ended. */
static void lookup_step_wk(struct lookup *l, int64_t now)
{
    static const struct js_field field[] = {
        { "m.server", JS_STRING, 0, NULL } };
    static const struct js_table tab = { field, 1, false, false };
    static const struct js_field url_field[] = {
        { "base_url", JS_STRING, 0, NULL } };
    static const struct js_table server = { url_field, 1, false, false };
    static const struct js_field client_field[] = {
        { "m.homeserver", JS_OBJECT, 0, &server } };
    static const struct js_table client = { client_field, 1, false, false };
    struct up *u = l->up;
    sl dn = { NULL, 0 };
    struct name n;
    if (u->state == UP_FAILED && up_was_held(u->why)) {
        lookup_no_turn(l, now);
        return;
    }
    if (u->state == UP_FAILED) {
        lookup_wk_none(l, u->why, u->why != EV_REPLY_BAD
                       && u->why != EV_REPLY_LIMIT, now);
        return;
    }
    unsigned st = u->head.status;
    if (st == 301 || st == 302 || st == 303 || st == 307 || st == 308) {
        lookup_redirect(l, now);
        return;
    }
    if (st != 200) {
        lookup_wk_none(l, EV_REPLY_STATUS, st >= 500, now);
        return;
    }
    if (l->is_client) {
        if (js_parse(up_body(u), u->intake.len, &client, &l->user)
            || l->user.len == 0) {
            lookup_wk_none(l, EV_REPLY_JSON, false, now);
            return;
        }
        lookup_done(l);
        return;
    }
    if (js_parse(up_body(u), u->intake.len, &tab, &dn) || dn.len == 0
        || dn.len > LIM_NAME_LEN || !name_parse(dn, &n)) {
        lookup_wk_none(l, EV_REPLY_JSON, false, now);
        return;
    }
    note("well-known", true, l->name.whole, dn);
    wk_finish(l, dn, cache_seconds(up_field(u, H1_CACHE_CONTROL),
        up_field(u, H1_EXPIRES), io_wall_ms() / 1000, 86400), false, now);
    lookup_keep_name(l->dn_text, &l->dn, dn);
    l->is_cached = false;
    lookup_drop_up(l, now);
    lookup_resolve(l, now);
}

/* Fetch a well-known of the server name's host. */
static void lookup_first_hop(struct lookup *l, const char *path, int64_t now)
{
    struct bb b = BB(l->url_text);
    bb_str(&b, "https://");
    bb_put(&b, l->name.host);
    bb_str(&b, path);
    l->state = L_WELL_KNOWN;
    l->hops = 0;
    if (url_parse((sl){ l->url_text, b.len }, &l->url))
        lookup_fetch(l, now);
    else
        lookup_wk_none(l, EV_NAME_BAD, false, now);
}

/* Consult the cache, or fetch, or wait for who fetches. */
static void lookup_well_known(struct lookup *l, int64_t now)
{
    struct wk *w = wk_slot(l->name.whole, now);
    if (w && w->state == WK_PENDING) {
        l->state = L_WK_WAIT;
        loop_set(KIND_LOOKUP, lookup_idx(l), -1, 0, l->end);
        return;
    }
    if (w && w->until > now && w->state != WK_FREE) {
        if (w->state == WK_OK)
            lookup_use(l, (sl){ w->text, w->len }, true, now);
        else
            lookup_use(l, l->name.whole, false, now);
        return;
    }
    if (w)
        w->state = WK_PENDING;
    lookup_first_hop(l, "/.well-known/matrix/server", now);
}

/* The userinfo call failed: go on where that may help. */
static void lookup_call_failed(struct lookup *l, int64_t now)
{
    struct up *u = l->up;
    bool unreachable = strcmp(u->step, "http") != 0
        && !up_was_held(u->why);
    l->dial_cnt += u->dial_cnt;
    if (unreachable && l->target_next + 1 < l->target_cnt
        && l->dial_cnt < LIM_TRY_CNT) {
        note(u->step, false, l->name.whole, sl_str(event_tab[u->why].text));
        l->target_next++;
        lookup_call(l, now);
        return;
    }
    if (unreachable && l->is_cached && !l->is_forgetful) {
        struct wk *w = wk_slot(l->name.whole, now);
        l->is_forgetful = true;
        l->dial_cnt = 0;
        if (w && w->state == WK_OK)
            w->until = 0;
        lookup_drop_up(l, now);
        lookup_well_known(l, now);
        return;
    }
    lookup_fail(l, u->why, u->step);
}

/* The userinfo call ended. */
static void lookup_step_call(struct lookup *l, int64_t now)
{
    static const struct js_field field[] = {
        { "sub", JS_STRING, 0, NULL } };
    static const struct js_table tab = { field, 1, false, false };
    struct up *u = l->up;
    lookup_note_call(l);
    if (u->state == UP_FAILED) {
        lookup_call_failed(l, now);
        return;
    }
    l->user = (sl){ NULL, 0 };
    if (u->head.status == 401)
        lookup_fail(l, EV_TOKEN_UNKNOWN, "http");
    else if (u->head.status != 200)
        lookup_fail(l, EV_REPLY_STATUS, "http");
    else if (js_parse(up_body(u), u->intake.len, &tab, &l->user))
        lookup_fail(l, EV_REPLY_JSON, "http");
    else if (!user_check(l->user, l->name.whole))
        lookup_fail(l, EV_SUB_BAD, "sub");
    else
        lookup_done(l);
}

/* Move on after a wake or at the deadline. */
static enum step lookup_step(size_t idx, int revents, int64_t now)
{
    struct lookup *l = &lookup_pool[idx];
    bool ended = l->up && (l->up->state == UP_DONE
                           || l->up->state == UP_FAILED);
    (void)revents;
    switch (l->state) {
    case L_WELL_KNOWN:
        if (ended)
            lookup_step_wk(l, now);
        break;
    case L_WK_WAIT:
        if (now >= l->end)
            lookup_fail(l, EV_HS_TIMEOUT, "well-known");
        else
            lookup_well_known(l, now);
        break;
    case L_SRV:
        if (now >= l->end)
            lookup_fail(l, EV_DNS_FAILED, "srv");
        else
            lookup_srv(l, now);
        break;
    case L_CALL:
        if (ended)
            lookup_step_call(l, now);
        break;
    case L_FREE:
    case L_DONE:
    case L_FAILED:
        break;
    }
    return STEP_WAIT;
}

/* A server name, for counting. */
static uint64_t dest_hash(sl name)
{
    return memo_key('d', name);
}

/* Whether a lookup may start now, but for its server's own cap. Strangers
 * leave slots to listed servers, and unknown ones half of theirs to the
 * known. */
static bool lookup_has_room(bool is_listed, bool is_known)
{
    int64_t share = (cfg.lookups_max + 1) / 2;
    if (cfg.is_open && cfg.lookups_max > 32)
        share = cfg.lookups_max - 16;
    else if (share > LIM_STRANGER_CNT)
        share = LIM_STRANGER_CNT;
    return lookup_active < cfg.lookups_max
        && (is_listed || (lookup_strangers < share
            && (is_known || lookup_unknown < (share + 1) / 2)));
}

static bool dest_is_known(uint64_t dest, int64_t now)
{
    return memo_holds(known_cache, LIM_KNOWN_CNT, dest, now);
}

/* The same, its server's own cap included. */
static bool lookup_has_slot(uint64_t dest, bool is_listed, bool is_known)
{
    int64_t same = 0, cap = is_listed ? LIM_DEST_LISTED
        : cfg.is_open ? LIM_DEST_OPEN : cfg.lookups_per_server;
    if (!lookup_has_room(is_listed, is_known))
        return false;
    int64_t left = lookup_active;
    for (size_t i = 0; left && i < LIM_UP_CNT; i++) {
        left -= lookup_hot[i].is_used;
        same += lookup_hot[i].is_used && lookup_hot[i].dest == dest;
    }
    return same < cap;
}

/* Whether another lookup of this server may start now. */
static bool lookup_may_open(uint64_t dest, bool is_listed, int64_t now)
{
    return lookup_has_slot(dest, is_listed, dest_is_known(dest, now));
}

/* What tells most tokens apart: their last bytes. */
static uint64_t token_tail(sl token)
{
    return token.len < 8 ? token.len : be64(token.p + token.len - 8);
}

/* Count a lookup that begins, 1, or has ended, -1. */
static void lookup_count(const struct lookup *l, int64_t n)
{
    lookup_hot[lookup_idx(l)].dest = l->dest;
    lookup_hot[lookup_idx(l)].is_used = n > 0;
    lookup_active += n;
    lookup_strangers += l->is_listed ? 0 : n;
    lookup_unknown += l->is_listed || l->is_known ? 0 : n;
}

/* A lookup of a checked name, not started yet. dest: dest_hash of it. NULL:
 * none free. */
static struct lookup *lookup_take(enum kind owner, uint16_t owner_idx,
    const struct name *name, uint64_t dest, int64_t since, int64_t now)
{
    size_t i = 0;
    while (i < LIM_UP_CNT && lookup_hot[i].is_used)
        i++;
    if (i == LIM_UP_CNT)
        return NULL;
    struct lookup *l = &lookup_pool[i];
    memset(l, 0, sizeof *l);
    l->state = L_CALL;               /* until it is known better */
    l->owner = owner;
    l->owner_idx = owner_idx;
    lookup_keep_name(l->text, &l->name, name->whole);
    l->dest = dest;
    l->is_listed = name_is_listed(l->name.whole);
    l->is_known = dest_is_known(l->dest, now);
    lookup_count(l, 1);
    l->trust = name_trust(&l->name, l->is_listed);
    int64_t end = since + LIM_SLACK_MS;
    l->end = (now < end ? now : end) + cfg.lookup_ms;
    l->is_late = l->end < now + LIM_REPLY_MS && now > end;
    lookup_keep_name(l->dn_text, &l->dn, l->name.whole);
    return l;
}

/* Start asking whose token it is; the caller asked lookup_may_open. token
 * and req must live until lookup_close. since: when the client asked, whose
 * patience counts. Returns NULL: none free. */
static struct lookup *lookup_open(enum kind owner, uint16_t owner_idx,
    const struct name *name, uint64_t dest, sl token, sl req, int64_t since,
    int64_t now)
{
    struct lookup *l = lookup_take(owner, owner_idx, name, dest, since, now);
    if (!l)
        return NULL;
    l->token = token;
    lookup_hot[lookup_idx(l)].tail = token_tail(token);
    l->req = req;
    l->over = override_find(cfg.fed, cfg.fed_cnt, l->name.whole);
    struct memo *b = memo_find(breaker_cache, LIM_BREAKER_CNT, l->dest);
    if (b && breaker_refuses(b, now)) {
        lookup_fail(l, EV_BREAKER_OPEN, "breaker");
    } else if (l->over) {
        l->trust = (struct trust){ CLASS_OPERATOR, true };
        l->target_cnt = 1;
        note("override", true, l->name.whole, l->over->base.text);
        lookup_call(l, now);
    } else if (l->name.is_ip || l->name.port) {
        lookup_resolve(l, now);
    } else if (!host_is_public(l, &l->name)) {
        lookup_fail(l, EV_NAME_BAD, "name");
    } else {
        lookup_well_known(l, now);
    }
    return l;
}

/* Start asking for the client-server API of a server name (PROTOCOL
 * section 8). Returns NULL: none free. */
static struct lookup *lookup_open_client(uint16_t api,
    const struct name *name, int64_t now)
{
    struct lookup *l = lookup_take(KIND_API, api, name,
        dest_hash(name->whole), now, now);
    if (!l)
        return NULL;
    l->is_client = true;
    if (host_is_public(l, &l->name))
        lookup_first_hop(l, "/.well-known/matrix/client", now);
    else
        lookup_fail(l, EV_NAME_BAD, "name");
    return l;
}

static void lookup_close(struct lookup *l, int64_t now)
{
    lookup_drop_up(l, now);
    loop_set(KIND_LOOKUP, lookup_idx(l), -1, 0, INT64_MAX);
    l->state = L_FREE;
    lookup_count(l, -1);
}

/* ---- client-server APIs: where delayed events are restarted and sent ---
 * One entry a server name: its base URL, its pace. Jobs wait in job_hot
 * (section 21); api_step starts their calls: sends first, then restarts by
 * deadline. A 429 stops the queue for as long as it asks and halves its
 * pace, success raises it again (PROTOCOL section 8).
 */
enum api_state { API_FREE, API_OK, API_BAD };
static struct api {
    enum api_state state;
    bool is_tls, is_stable;      /* is_stable: the path of MSC4140's end */
    bool is_starved;             /* found no slot for a call */
    uint16_t port, name_len, text_len;
    unsigned job_cnt, active;    /* active: calls out, of them sends */
    unsigned sends, max_out;     /* max_out: 2 while it is silent */
    struct trust trust;
    struct lookup *lookup;
    int64_t until, good_until;   /* of the base URL: fresh, usable */
    int64_t used_at;
    int64_t next_at, interval_ms;
    int64_t halved_us;           /* when the pace was halved */
    struct memo breaker;
    struct url url;              /* in text */
    uint8_t name[LIM_NAME_LEN], text[LIM_URL_LEN];
} api_pool[LIM_API_CNT];

static size_t api_idx(const struct api *a)
{
    return (size_t)(a - api_pool);
}

/* Take a base URL; http only where the server is the operator's, and never
 * where our token goes. One that differs is not taken while calls are out:
 * they were made for the old. */
MUST_USE static bool api_take_url(struct api *a, const struct lookup *l)
{
    sl text = l->user;
    struct url url;
    struct name n;
    if (text.len > sizeof a->text || !url_parse(text, &url) || url.has_query
        || !name_parse(url.name.whole, &n) || !host_is_public(l, &url.name))
        return false;
    bool http = sl_ieq(url.scheme, SL("http"));
    bool is_ours = cfg.has_as && sl_eq(l->name.whole, cfg.hs_name.whole);
    if (!sl_ieq(url.scheme, SL("https"))
        && !(http && l->is_listed && !is_ours))
        return false;
    bool same = a->state == API_OK
        && sl_eq(text, (sl){ a->text, a->text_len });
    if (same || a->active)
        return true;
    memcpy(a->text, text.p, text.len);
    a->text_len = (uint16_t)text.len;
    a->is_tls = !http;
    a->port = url.name.port ? url.name.port : http ? 80 : 443;
    return url_parse((sl){ a->text, text.len }, &a->url);
}

/* The entry of a server name; a new one takes the place of the longest
 * unused. NULL: all are in use. */
static struct api *api_find(sl name, int64_t now)
{
    struct api *best = NULL;
    for (size_t i = 0; i < LIM_API_CNT; i++) {
        struct api *a = &api_pool[i];
        if (a->state != API_FREE && sl_eq((sl){ a->name, a->name_len }, name))
            return a;
        if (a->job_cnt == 0 && !a->lookup && a->used_at < now - 60000
            && !(cfg.has_as && sl_eq((sl){ a->name, a->name_len },
                                     cfg.hs_name.whole))
            && (!best || a->used_at < best->used_at))
            best = a;
        if (a->state == API_FREE) {
            best = a;
            break;
        }
    }
    if (!best || name.len > LIM_NAME_LEN)
        return NULL;
    met.evicted += best->state != API_FREE;
    memset(best, 0, sizeof *best);
    best->state = API_BAD;
    best->max_out = LIM_API_CALLS;
    best->name_len = (uint16_t)name.len;
    memcpy(best->name, name.p, name.len);
    best->used_at = now;
    return best;
}

/* Make sure that the base URL is known. RES_WAIT: api_step goes on. A known
 * one serves while it is looked up again. */
static enum res api_resolve(struct api *a, int64_t now)
{
    sl name = { a->name, a->name_len };
    const struct override *o = override_find(cfg.cs, cfg.cs_cnt, name);
    bool known = a->state == API_OK && now < a->good_until;
    struct name n;
    a->used_at = now;
    if (a->lookup || a->until > now)
        return known ? RES_OK : a->lookup ? RES_WAIT : RES_FAILED;
    if (o) {
        a->state = API_OK;
        a->until = a->good_until = INT64_MAX;
        a->url = o->base.url;
        a->is_tls = o->base.is_tls;
        a->port = o->base.port;
        a->trust = (struct trust){ CLASS_OPERATOR, true };
        return RES_OK;
    }
    if (!name_parse(name, &n))
        return RES_FAILED;
    a->trust = name_trust(&n, name_is_listed(name));
    if (lookup_may_open(dest_hash(name), name_is_listed(name), now))
        a->lookup = lookup_open_client((uint16_t)api_idx(a), &n, now);
    if (!a->lookup)                     /* all lookups in use: soon again */
        a->until = now + 1000;
    return known ? RES_OK : a->lookup ? RES_WAIT : RES_FAILED;
}

/* Use the end of a base URL's lookup. A failure that may pass leaves the
 * old one in use for LIM_API_STALE_MS. */
static void api_resolved(struct api *a, int64_t now)
{
    struct lookup *l = a->lookup;
    if (!l || (l->state != L_DONE && l->state != L_FAILED))
        return;
    bool ok = l->state == L_DONE && api_take_url(a, l);
    if (l->state == L_DONE && !ok)
        LOG(EV_REPLY_JSON, KV("server", (sl){ a->name, a->name_len }),
            KV("step", SL("well-known")));
    bool keep = a->state == API_OK && l->state == L_FAILED && l->is_passing;
    a->until = now + (ok ? LIM_API_OK_MS : LIM_API_BAD_MS);
    if (ok)
        a->good_until = now + LIM_API_STALE_MS;
    if (!keep)
        a->state = ok ? API_OK : API_BAD;
    lookup_close(l, now);
    a->lookup = NULL;
}

/* A call of an API whose base URL is known. */
static struct up_call api_call(struct api *a, enum kind owner, size_t idx,
    enum target_label label, int64_t end)
{
    struct up_call c = { .owner = owner, .owner_idx = (uint16_t)idx,
        .label = label, .trust = a->trust, .is_tls = a->is_tls,
        .host = a->url.name.host, .port = a->port,
        .cert_name = a->url.name.host, .reply_cap = LIM_RPC_LEN, .end = end,
        .is_known = true, .breaker = &a->breaker,
        .server = { a->name, a->name_len } };
    c.search = a->trust.class == CLASS_OPERATOR
        || (a->trust.class == CLASS_LISTED && is_single_label(c.host));
    return c;
}

/* Append the fields of a request that every call of an API has, and, for
 * the homeserver whose application service we are, our token; then the end
 * of the head, and the body of a POST. */
static void api_put_rest(struct bb *b, const struct api *a, bool is_as,
    bool is_post, sl body)
{
    bb_str(b, " HTTP/1.1\r\nHost: ");
    bb_put(b, a->url.name.whole);
    bb_str(b, "\r\nAccept: application/json\r\nUser-Agent: lkjwt/"
        LKJWT_VERSION "\r\n");
    if (is_as) {
        must(cfg.has_as && sl_eq((sl){ a->name, a->name_len },
                                 cfg.hs_name.whole));
        bb_str(b, "Authorization: Bearer ");
        bb_put(b, cfg.sec_as_token);
        bb_str(b, "\r\n");
    }
    if (is_post) {
        bb_str(b, "Content-Type: application/json\r\nContent-Length: ");
        bb_u64(b, body.len);
        bb_str(b, "\r\n");
    }
    bb_str(b, "\r\n");
    bb_put(b, body);
}

/* ==== 19 LIVEKIT =================== PART II: MACHINES ================
 * Purpose  Calls of the SFU's RoomService (Twirp v8, protobuf).
 * Trust    The SFU is the operator's; its replies are still bounded.
 * INV-K1   Only lk_build_room asks for a room, and only an exchange of a
 *          full-access user, or of one whose homeserver says that it is in
 *          the Matrix room, calls it (section 22, exchange_room).
 * INV-K2   Absent is what the SFU says in Twirp's own words; all else that
 *          is no participant is unknown.
 */

/* Append a service token. The one for creating rooms is the same for all
 * requests of a second, and made once. */
static void lk_put_token(struct bb *b, sl admin_room)
{
    static uint8_t sec_text[1024];
    static size_t len;
    static int64_t made;
    uint8_t payload[512];
    struct bb p = BB(payload);
    int64_t wall = io_wall_ms() / 1000;
    size_t from = b->len;
    sl text;
    if (admin_room.len == 0 && len && made == wall) {
        bb_put(b, (sl){ sec_text, len });
        return;
    }
    jwt_put_service(&p, cfg.key[0].name, admin_room, wall);
    b->over |= !bb_finish(&p, &text);
    jwt_sign(b, &cfg.key[0].sec_key, text);
    if (admin_room.len || b->over || b->len - from > sizeof sec_text)
        return;
    len = b->len - from;
    memcpy(sec_text, b->p + from, len);
    made = wall;
}

/* Append a Twirp request of the given method with its token and body. */
static void lk_put(struct bb *b, const char *method, sl admin_room, sl body,
    sl req)
{
    bb_str(b, "POST ");
    bb_put(b, cfg.api.url.path);
    bb_str(b, "/twirp/livekit.RoomService/");
    bb_str(b, method);
    bb_str(b, " HTTP/1.1\r\nHost: ");
    bb_put(b, cfg.api.url.name.whole);
    bb_str(b, "\r\nContent-Type: application/protobuf\r\n"
        "Accept: application/protobuf\r\nUser-Agent: lkjwt/" LKJWT_VERSION
        "\r\nAuthorization: Bearer ");
    lk_put_token(b, admin_room);
    if (req.len) {
        bb_str(b, "\r\nX-Request-Id: ");
        bb_put(b, req);
    }
    bb_str(b, "\r\nContent-Length: ");
    bb_u64(b, body.len);
    bb_str(b, "\r\n\r\n");
    bb_put(b, body);
}

static struct memo lk_breaker;

/* Open a call at the SFU in the slots of exchanges or jobs. NULL: none
 * free. */
static struct up *lk_open(enum kind owner, uint16_t owner_idx,
    void (*build)(uint16_t, struct bb *), int64_t end, int64_t now)
{
    bool looks = owner == KIND_JOB || owner == KIND_SEAT;
    size_t from = LIM_UP_CNT + (looks ? LIM_SFU_CNT : 0);
    size_t to = from + (looks ? LIM_LOOK_CNT : cfg.has_as
        ? LIM_SFU_CNT - LIM_AS_CNT : LIM_SFU_CNT);
    struct up_call c = { .owner = owner, .owner_idx = owner_idx,
        .label = TL_SFU, .trust = { CLASS_OPERATOR, true },
        .is_tls = cfg.api.is_tls, .search = true,
        .host = cfg.api.url.name.host, .port = cfg.api.port,
        .cert_name = cfg.api.url.name.host, .reply_cap = LIM_RPC_LEN,
        .end = end, .build = build, .breaker = &lk_breaker,
        .server = cfg.api.url.name.whole };
    return up_open(&c, from, to, now);
}

/* The `code` of a Twirp error, if it is one of Twirp's own words. */
static sl lk_code(struct up *u)
{
    static const struct js_field field[] = {
        { "code", JS_STRING, 0, NULL } };
    static const struct js_table tab = { field, 1, false, false };
    sl code = { NULL, 0 };
    if (u->state != UP_DONE
        || js_parse(up_body(u), u->intake.len, &tab, &code)
        || code.len > 40)
        return (sl){ NULL, 0 };
    for (size_t i = 0; i < code.len; i++)
        if (code.p[i] != '_' && (code.p[i] < 'a' || code.p[i] > 'z'))
            return (sl){ NULL, 0 };
    return code;
}

/* Log why a call failed, and return it. */
static enum event lk_log(struct up *u, sl req)
{
    uint8_t addr[64], num[20];
    enum event why = u->state == UP_FAILED ? u->why
        : u->head.status == 401 ? EV_SFU_AUTH : EV_SFU_REFUSED;
    LOG(why, KV("req", req), KV("target", SL("sfu")),
        KV("step", u->state == UP_FAILED ? sl_str(u->step) : SL("http")),
        KV("host", u->call.host),
        KV("addr", u->has_addr ? text_addr(addr, &u->addr)
                               : (sl){ NULL, 0 }),
        KV("status", u->state == UP_DONE ? text_u64(num, u->head.status)
                                         : (sl){ NULL, 0 }),
        KV("code", lk_code(u)));
    return why;
}

enum presence { PRESENT, ABSENT, UNKNOWN };

/* What an ended GetParticipant call says of an identity; sid borrows from
 * its reply. */
static enum presence lk_presence(struct up *u, sl identity, sl *sid)
{
    struct participant p;
    *sid = (sl){ NULL, 0 };
    if (u->state != UP_DONE)
        return UNKNOWN;
    if (u->head.status != 200)
        return u->head.status == 404 && sl_eq(lk_code(u), SL("not_found"))
            ? ABSENT : UNKNOWN;
    if (!pb_participant_parse((sl){ up_body(u), u->intake.len }, &p)
        || !sl_eq(p.identity, identity))
        return UNKNOWN;
    *sid = p.sid;
    return p.state == 3 ? ABSENT : PRESENT;     /* 3: disconnected */
}

/* ==== 20 REDIS ===================== PART II: MACHINES ================
 * Purpose  Connections to Redis: dial, log in, send commands, hand their
 *          replies out in order; again after every failure.
 * Trust    The operator's server; what it replies is judged by section 10
 *          and by whoever asked.
 * Limits   LIM_REDIS_*; the URL's time-outs.
 * INV-D1   Each command sent has one entry in pending; its op is told once:
 *          the reply, or NULL when the connection was lost before.
 *
 * row state     waits for         limit           success  failure, timeout
 * D1  RD_OFF    rds_start         -               D3       -
 * D2  RD_PAUSE  0.1 s .. 5 s      -               D3       -
 * D3  RD_DIAL   a call (17)       dial_timeout    D4       D2
 * D4  RD_HELLO  AUTH SELECT PING  read_timeout    D5       D2
 * D5  RD_UP     replies           read_timeout a  -        D2
 *               reply, write_timeout for what is not taken
 */
enum { RDS_MAIN, RDS_STREAM };
enum rds_state { RD_OFF, RD_PAUSE, RD_DIAL, RD_HELLO, RD_UP };

/* What becomes of a reply. item is told of each element below the top;
 * path[d] is the element's place in the array at depth d, 0 the top's.
 * done gets the top element, NULL if the connection was lost. */
struct rds_op {
    const char *command;
    int64_t factor;                  /* times read_timeout, elements */
    int64_t extra_ms;                /* more of read_timeout */
    size_t bulk_cap;                 /* longest bulk string taken; 0: short */
    void (*item)(const struct rsp *e, const unsigned *path, unsigned depth,
        int64_t now);
    void (*done)(uint16_t idx, const struct rsp *e, int64_t now);
};

/* One connection.
 * owner:    rds_pool, for ever
 * lifetime: of chan: RD_HELLO to rds_fail */
static struct rds {
    enum rds_state state;
    bool is_told;                    /* REDIS_DOWN was logged */
    bool is_garbled, is_stuck;       /* stuck: no buffer for a long string */
    uint32_t serial;                 /* grows with each RD_UP */
    struct up *up;
    struct chan *chan;
    const char *fault;               /* set by an op: give up */
    int64_t end, write_end, up_at;
    int32_t wait_ms;
    size_t in_len, out_off, out_len;
    struct { const struct rds_op *op; uint16_t idx; }
        pending[LIM_REDIS_OPS];
    size_t head, cnt;
    struct rsp top;                  /* of the reply being read */
    unsigned depth, path[LIM_REDIS_DEPTH], elements;
    int64_t left[LIM_REDIS_DEPTH];   /* elements to come, by depth */
    uint8_t big;                     /* a long bulk string, see big_take */
    size_t bulk_len, bulk_got;       /* of it, with CR LF */
} rds_pool[LIM_REDIS_CNT];
static uint8_t rds_in[LIM_REDIS_CNT][LIM_REDIS_IN];
static uint8_t rds_out_main[LIM_REDIS_OUT], rds_out_stream[8192];
static const char *rds_last_fault = "";     /* for the command line */

static size_t rds_idx(const struct rds *r)
{
    return (size_t)(r - rds_pool);
}

static bool rds_is_up(size_t which)
{
    return rds_pool[which].state == RD_UP;
}

/* The space of commands not yet sent. */
static struct bb rds_out(const struct rds *r)
{
    return rds_idx(r) == RDS_MAIN
        ? (struct bb){ rds_out_main, r->out_len, sizeof rds_out_main, false }
        : (struct bb){ rds_out_stream, r->out_len, sizeof rds_out_stream,
                       false };
}

static void rds_watch(const struct rds *r)
{
    int want = POLLIN;
    int64_t end = r->end;
    bool idle = r->state == RD_OFF || (r->state == RD_UP && r->cnt == 0);
    if (!r->chan) {
        loop_set(KIND_REDIS, rds_idx(r), -1, 0, idle ? INT64_MAX : end);
        return;
    }
    bool has_out = r->chan->is_tls ? (br_ssl_engine_current_state(
        &chan_tls[r->chan - chan_pool].eng) & BR_SSL_SENDREC) != 0
        : r->out_off < r->out_len;
    if (has_out)
        want |= POLLOUT;
    if (r->out_off < r->out_len && r->write_end < end)
        end = r->write_end;
    if (r->is_stuck) {                   /* no buffer: soon again */
        want &= ~POLLIN;
        end = io_now() + 50;
    }
    loop_set(KIND_REDIS, rds_idx(r), r->chan->fd, want,
        idle ? INT64_MAX : end);
}

/* The connection is of no use: tell all who wait, try again later. */
static void rds_fail(struct rds *r, enum event why, const char *step,
    const char *reason, int64_t now)
{
    static const int32_t first_ms = 100;
    uint8_t addr[64];
    bool has_addr = r->up && r->up->has_addr;
    struct addr a = r->chan ? r->chan->addr : has_addr ? r->up->addr
        : (struct addr){ .port = 0 };
    rds_last_fault = reason;
    if (r->state == RD_UP && now - r->up_at >= LIM_REDIS_PAUSE_MS) {
        r->is_told = false;              /* it was of use meanwhile */
        r->wait_ms = 0;
    }
    if (why != EV_REDIS_DOWN)
        LOG(why, KV("reason", sl_str(reason)));
    if (!r->is_told)
        LOG(EV_REDIS_DOWN, KV("connection", rds_idx(r) == RDS_MAIN
                ? SL("commands") : SL("stream")),
            KV("step", sl_str(step)), KV("reason", sl_str(reason)),
            KV("addr", a.port ? text_addr(addr, &a) : (sl){ NULL, 0 }));
    r->is_told = true;
    if (r->up)
        up_close(r->up, now);
    if (r->chan) {
        loop_set(KIND_REDIS, rds_idx(r), -1, 0, INT64_MAX);
        chan_close(r->chan);
    }
    if (r->wait_ms == 0)
        r->wait_ms = first_ms;
    big_free(&r->big);
    r->up = NULL;
    r->chan = NULL;
    r->fault = NULL;
    r->is_stuck = false;
    r->in_len = r->out_off = r->out_len = r->bulk_len = r->bulk_got = 0;
    r->depth = r->elements = 0;
    r->state = RD_PAUSE;
    r->end = now + r->wait_ms / 2
        + random_between(0, r->wait_ms);
    r->wait_ms = r->wait_ms * 2 > LIM_REDIS_PAUSE_MS ? LIM_REDIS_PAUSE_MS
        : r->wait_ms * 2;
    if (rds_idx(r) == RDS_MAIN)
        met.gauge[GA_REDIS] = 0;
    for (size_t n = r->cnt; n > 0; n--) {
        const struct rds_op *op = r->pending[r->head].op;
        uint16_t idx = r->pending[r->head].idx;
        r->head = (r->head + 1) % LIM_REDIS_OPS;
        r->cnt--;
        op->done(idx, NULL, now);
    }
    r->is_garbled = false;
    rds_watch(r);
    loop_wake(KIND_REPLICA, 0);
}

/* Space for another command of `len` bytes and `ops` replies? */
static bool rds_has_room(size_t which, size_t len, size_t ops)
{
    struct rds *r = &rds_pool[which];
    struct bb b = rds_out(r);
    if (r->chan == NULL || r->cnt + ops > LIM_REDIS_OPS)
        return false;
    if (r->out_off && len > b.cap - b.len) {
        memmove(b.p, b.p + r->out_off, r->out_len - r->out_off);
        r->out_len -= r->out_off;
        r->out_off = 0;
    }
    return len <= b.cap - r->out_len;
}

/* When the reply that is due next must be here. */
static void rds_set_end(struct rds *r, int64_t now)
{
    const struct rds_op *op = r->pending[r->head].op;
    if (r->cnt)
        r->end = now + cfg.redis.read_ms * op->factor + op->extra_ms;
}

/* Send a command, await its reply; room was asked for. */
static void rds_send(size_t which, const struct rds_op *op, uint16_t idx,
    const sl *word, size_t cnt, int64_t now)
{
    struct rds *r = &rds_pool[which];
    struct bb b = rds_out(r);
    rsp_put_head(&b, cnt);
    for (size_t i = 0; i < cnt; i++)
        rsp_put(&b, word[i]);
    must(!b.over && r->cnt < LIM_REDIS_OPS);
    if (r->out_off == r->out_len)
        r->write_end = now + cfg.redis.write_ms;
    r->out_len = b.len;
    size_t at = (r->head + r->cnt++) % LIM_REDIS_OPS;
    r->pending[at].op = op;
    r->pending[at].idx = idx;
    if (r->cnt == 1)
        rds_set_end(r, now);
    loop_wake(KIND_REDIS, which);
}

/* The first word of an error, if it is one of Redis' own. */
static sl rds_code(const struct rsp *e)
{
    size_t n = 0;
    while (n < e->text.len && e->text.p[n] >= 'A' && e->text.p[n] <= 'Z')
        n++;
    bool whole = n == e->text.len || e->text.p[n] == ' ';
    return (sl){ e->text.p, whole && n <= 20 ? n : 0 };
}

static void rds_log_refused(const char *command, const struct rsp *e)
{
    LOG(EV_REDIS_REFUSED, KV("command", sl_str(command)),
        KV("code", e->type == RSP_ERROR ? rds_code(e) : SL("unexpected")));
}

/* ---- log in ---- */

static void rds_done_ignored(uint16_t idx, const struct rsp *e, int64_t now)
{
    (void)idx;
    (void)e;
    (void)now;
}

/* AUTH, SELECT and PING must be taken. */
static void rds_done_hello(uint16_t idx, const struct rsp *e, int64_t now)
{
    struct rds *r = &rds_pool[idx];
    const struct rds_op *op = r->pending[r->head].op;
    (void)now;
    if (!e || r->fault)
        return;
    if (e->type != RSP_SIMPLE) {
        rds_log_refused(op->command, e);
        r->fault = "log-in refused";
    }
}

static void rds_done_ping(uint16_t idx, const struct rsp *e, int64_t now)
{
    struct rds *r = &rds_pool[idx];
    rds_done_hello(idx, e, now);
    if (!e || r->fault)
        return;
    r->state = RD_UP;
    r->serial++;
    r->up_at = now;
    met.gauge[GA_REDIS] = rds_is_up(RDS_MAIN);
    loop_wake(KIND_REPLICA, 0);
}

static const struct rds_op
    rds_op_auth = { "AUTH", 1, 0, 0, NULL, rds_done_hello },
    rds_op_select = { "SELECT", 1, 0, 0, NULL, rds_done_hello },
    rds_op_ping = { "PING", 1, 0, 0, NULL, rds_done_ping },
    rds_op_ignored = { "", 1, 0, 0, NULL, rds_done_ignored };

/* A connection stands: log in. */
static void rds_hello(struct rds *r, struct chan *ch, int64_t now)
{
    uint16_t idx = (uint16_t)rds_idx(r);
    const struct redis_url *u = &cfg.redis;
    uint8_t db[20];
    r->chan = ch;
    r->state = RD_HELLO;
    if (u->sec_password.len && u->user.len)
        rds_send(idx, &rds_op_auth, idx, (sl[]){ SL("AUTH"), u->user,
            u->sec_password }, 3, now);
    else if (u->sec_password.len)
        rds_send(idx, &rds_op_auth, idx, (sl[]){ SL("AUTH"),
            u->sec_password }, 2, now);
    if (u->db)
        rds_send(idx, &rds_op_select, idx, (sl[]){ SL("SELECT"),
            text_u64(db, u->db) }, 2, now);
    if (u->client_name.len)
        rds_send(idx, &rds_op_ignored, 0, (sl[]){ SL("CLIENT"),
            SL("SETNAME"), u->client_name }, 3, now);
    rds_send(idx, &rds_op_ping, idx, (sl[]){ SL("PING") }, 1, now);
}

static void rds_dial(struct rds *r, int64_t now)
{
    static const uint8_t no_key[16];
    const struct redis_url *u = &cfg.redis;
    struct up_call c = { .owner = KIND_REDIS,
        .owner_idx = (uint16_t)rds_idx(r), .label = TL_REDIS,
        .trust = { CLASS_OPERATOR, true }, .is_tls = u->is_tls,
        .search = true, .host = u->host, .port = u->port,
        .cert_name = u->host, .end = now + u->dial_ms,
        .skip_verify = u->skip_verify };
    r->state = RD_DIAL;
    r->end = INT64_MAX;
    if (!u->is_unix) {
        r->up = up_open(&c, LIM_UP_ALL - LIM_REDIS_CNT, LIM_UP_ALL, now);
        if (!r->up)
            rds_fail(r, EV_REDIS_DOWN, "connect", "no slot", now);
        return;
    }
    int fd = io_connect_unix(u->path);
    struct chan *ch = fd < 0 ? NULL
        : chan_open(fd, &(struct addr){ .port = 0 }, no_key);
    if (ch)
        rds_hello(r, ch, now);
    else
        rds_fail(r, EV_REDIS_DOWN, "connect", event_tab[fd < 0
            ? EV_CONNECT_FAILED : EV_CHAN_FULL].text, now);
    if (!ch)
        io_close(&fd);
}

/* Begin; both connections use the same URL. */
static void rds_start(size_t which, int64_t now)
{
    if (rds_pool[which].state == RD_OFF) {
        rds_dial(&rds_pool[which], now);
        rds_watch(&rds_pool[which]);
    }
}

/* The dial ended. */
static void rds_dialled(struct rds *r, int64_t now)
{
    struct up *u = r->up;
    if (u->state == UP_FAILED) {
        rds_fail(r, EV_REDIS_DOWN, u->step, event_tab[u->why].text, now);
        return;
    }
    struct chan *ch = u->chan;
    u->chan = NULL;
    r->up = NULL;
    up_close(u, now);
    rds_hello(r, ch, now);
}

/* ---- replies ---- */

/* Hand out one element; at the end of a reply its op is done. */
static void rds_element(struct rds *r, const struct rsp *e, int64_t now)
{
    const struct rds_op *op = r->pending[r->head].op;
    if (r->depth == 0)
        r->top = *e;
    else if (op->item)
        op->item(e, r->path, r->depth, now);
    if (e->type == RSP_ARRAY && e->n > 0) {
        r->left[r->depth] = e->n;
        r->path[r->depth++] = 0;
        return;
    }
    while (r->depth && (r->path[r->depth - 1]++, --r->left[r->depth - 1] == 0))
        r->depth--;
    if (r->depth)
        return;
    uint16_t idx = r->pending[r->head].idx;
    r->elements = 0;
    op->done(idx, &r->top, now);
    r->head = (r->head + 1) % LIM_REDIS_OPS;
    r->cnt--;
    rds_set_end(r, now);
}

/* Collect a long bulk string, or skip it. Returns bytes used. */
static size_t rds_take_bulk(struct rds *r, sl in, int64_t now)
{
    size_t want = r->bulk_len - r->bulk_got;
    size_t n = in.len < want ? in.len : want;
    size_t room = r->bulk_len - 2 > r->bulk_got
        ? r->bulk_len - 2 - r->bulk_got : 0;
    if (r->big)
        memcpy(big_buf(r->big) + r->bulk_got, in.p, n < room ? n : room);
    r->bulk_got += n;
    if (r->bulk_got < r->bulk_len)
        return n;
    struct rsp e = { RSP_BULK, (int64_t)r->bulk_len - 2, { NULL, 0 } };
    if (r->big)
        e.text = (sl){ big_buf(r->big), r->bulk_len - 2 };
    r->bulk_len = r->bulk_got = 0;
    rds_element(r, &e, now);
    big_free(&r->big);
    return n;
}

/* Use what has arrived. */
static void rds_take(struct rds *r, int64_t now)
{
    uint8_t *buf = rds_in[rds_idx(r)];
    size_t at = 0;
    struct rsp e;
    while (!r->fault) {
        sl in = { buf + at, r->in_len - at };
        if (r->bulk_len) {
            if (in.len == 0)
                break;
            at += rds_take_bulk(r, in, now);
            continue;
        }
        int n = rsp_parse(in, LIM_REDIS_BULK, &e);
        if (n == 0)
            break;
        int64_t max = r->cnt == 0 ? 0
            : LIM_REDIS_ELEMENTS * r->pending[r->head].op->factor;
        if (n < 0 || ++r->elements > max || (e.type == RSP_ARRAY
                && (r->depth == LIM_REDIS_DEPTH || e.n > max))) {
            r->fault = "malformed, too long or unasked-for reply";
            r->is_garbled = true;
            break;
        }
        bool is_long = e.type == RSP_BULK && !e.text.p;
        bool is_kept = is_long
            && (size_t)e.n <= r->pending[r->head].op->bulk_cap;
        if (is_kept)
            r->big = big_take((size_t)e.n);
        r->is_stuck = is_kept && !r->big;
        if (r->is_stuck) {
            r->elements--;
            break;
        }
        at += (size_t)n;
        if (is_long)
            r->bulk_len = (size_t)e.n + 2;
        else
            rds_element(r, &e, now);
    }
    memmove(buf, buf + at, r->in_len - at);
    r->in_len -= at;
}

/* Send what waits. False: the connection is gone. */
MUST_USE static bool rds_flush(struct rds *r, int64_t now)
{
    struct bb b = rds_out(r);
    while (r->out_off < r->out_len) {
        ssize_t n = chan_write(r->chan, (sl){ b.p + r->out_off,
            r->out_len - r->out_off });
        if (n == -EAGAIN)
            return true;
        if (n < 0)
            return false;
        r->out_off += (size_t)n;
        r->write_end = now + cfg.redis.write_ms;
    }
    wipe(b.p, b.len < 1024 ? b.len : 1024);  /* AUTH stands at the front */
    r->out_off = r->out_len = 0;
    return !r->chan->is_tls || tls_pump(r->chan, 0) != -ECONNRESET;
}

/* Read and use what is there. False: the connection is gone. */
MUST_USE static bool rds_read(struct rds *r, int64_t now)
{
    if (r->is_stuck)
        rds_take(r, now);
    for (int rounds = 0; rounds < 8 && !r->fault; rounds++) {
        if (r->is_stuck)
            return true;
        ssize_t n = chan_read(r->chan, rds_in[rds_idx(r)] + r->in_len,
            LIM_REDIS_IN - r->in_len);
        if (n == -EAGAIN)
            return true;
        if (n <= 0)
            return false;
        r->in_len += (size_t)n;
        rds_take(r, now);
    }
    loop_wake(KIND_REDIS, rds_idx(r));   /* the engine may hold more */
    return true;
}

/* Move a connection on after a wake, a time or its socket. */
static enum step rds_step(size_t idx, int revents, int64_t now)
{
    struct rds *r = &rds_pool[idx];
    const char *fault = NULL;
    (void)revents;
    switch (r->state) {
    case RD_OFF:
        return STEP_WAIT;
    case RD_PAUSE:
        if (now >= r->end)
            rds_dial(r, now);
        break;
    case RD_DIAL:
        if (r->up->state == UP_DONE || r->up->state == UP_FAILED)
            rds_dialled(r, now);
        break;
    case RD_HELLO:
    case RD_UP:
        if (!rds_flush(r, now) || !rds_read(r, now))
            fault = "connection closed";
        else if (r->fault)
            fault = r->fault;
        else if ((r->cnt && now >= r->end)
                 || (r->out_off < r->out_len && now >= r->write_end))
            fault = "no answer in time";
        else if (!rds_flush(r, now))
            fault = "connection closed";
        break;
    }
    if (fault)
        rds_fail(r, r->is_garbled ? EV_REDIS_PROTO : EV_REDIS_DOWN,
            r->state == RD_UP ? "reply" : "hello", fault, now);
    rds_watch(r);
    return STEP_WAIT;
}

/* ==== 21 JOBS ====================== PART II: MACHINES ================
 * Purpose  Delegated delayed leave (MSC4140, MSC4195): postpone a user's
 *          delayed event while the participant is on the SFU, send it when
 *          the participant is gone.
 * Trust    Requests are checked, webhooks verified, before they get here.
 * Limits   LIM_JOB_*, the times of section 02; one job a key.
 * INV-Q1   A job ends once: `sent`, or without any call.
 * INV-Q2   An unknown presence alone never sends.
 * INV-Q3   A job has at most one look-up and one delayed-event call out.
 *
 * row event                          J_WAITING      J_CONNECTED   J_LEAVING
 * Q1  joined, or look-up finds it    J_CONNECTED    new sid       -
 * Q2  left, CLIENT_INITIATED         -              J_LEAVING     -
 * Q3  left otherwise, aborted        ended          J_LEAVING     -
 * Q4  min(1 h, T) waited             J_LEAVING      -             -
 * Q5  restart due                    -              restart, look -
 * Q6  restart refused, deadline      -              ended         -
 * Q7  sanity check: absent           -              J_LEAVING     -
 * Q8  absent twice, 20 s apart       -              J_LEAVING     -
 * Q9  sent, refused, budget spent    -              -             ended
 * Q3 looks first: once for most reasons, for 20 s where the participant
 * may be back (job_left). Q4, Q5 and Q9 are timed by job_clock.
 * A job that is_owned came by the homeserver whose application service we
 * are: its calls name the owner and bear our token; it is restarted while it
 * waits, too (Q5, Q6 in J_WAITING), as long as a token may still be used.
 *
 * With Redis (DESIGN section 6):
 * - A job waits in store_ring until Redis has been told of it (store_op);
 *   J_OVER keeps the slot of one that has ended until its record is gone.
 * - INV-Q4  Nothing is sent without the shard's lease, read again, and a
 *   last look-up (CK_SEND); or in an outage of 5 s, without the lease.
 * - INV-Q5  A record is changed only while its DelayId is the job's own.
 * - A record that was connected resumes in J_CONNECTED, is_unverified: it
 *   is restarted at once, and row Q8 is watched without waiting for Q5.
 *
 * row replica                 does
 * P1  every 1.3 s             rep_tick: renews, gives, takes leases
 * P2  lease taken             load_run: reads the records of the shard
 * P3  lease given or lost     rep_drop: its jobs end here, unsaved ones are
 *                             written first
 * P4  event in the stream     stream_webhook, stream_job: acts on own jobs
 * P5  lease gone before its   rep_changed: all is written again and
 *     time, another run_id    doubted
 * P6  no lease for 5 s        rep_away: acts from memory
 * P7  SIGTERM                 job_stop, then gives all leases away
 */

enum job_state { J_FREE, J_WAITING, J_CONNECTED, J_LEAVING,
    J_OVER };                        /* but Redis has yet to be told */

/* Why the SFU is asked. */
enum job_check { CK_NONE, CK_WAIT, CK_SANITY, CK_ABSENT, CK_LEFT,
    CK_DUPLICATE, CK_SEND };

/* Where jobs are kept: in memory only; in Redis, shared with other
 * replicas or ours alone; PROBE until Redis showed what it allows. */
enum store_mode { STORE_NONE, STORE_PROBE, STORE_SHARED, STORE_SINGLE };
static enum store_mode store_mode;

/* What Redis has yet to be told of a job. NEW: the delegation itself,
 * whatever stands there; SET and DEL: unless another replaced it. */
enum store_op { ST_NONE, ST_NEW, ST_SET, ST_DEL };

/* What is wanted of the homeserver. */
enum job_want { WANT_NONE, WANT_RESTART, WANT_SEND };

/* What a delegation asks for; slices of the caller's. */
struct job_params {
    sl alias, identity[2], server, delay_id, user;
    int64_t timeout_ms;              /* T, clamped */
    bool is_owned;                   /* by user, for whom we may act */
};

/* One delegated leave.
 * owner:    job_pool
 * lifetime: job_make to job_free */
struct job {
    uint8_t state, check;
    uint8_t store, storing;          /* store_op wanted, under way */
    uint8_t shard;
    bool is_unverified;              /* connected, as others say */
    bool is_forgotten;               /* its record is another's by now */
    bool is_late;                    /* NEW was not written at once */
    bool is_asking, is_asked;        /* for its lease; for this leave */
    uint16_t waiter;                 /* exchange + 1 that waits for NEW */
    uint8_t followed;                /* identity seen connected; 2: none */
    uint8_t probe;                   /* identity being looked up */
    bool first_unknown;              /* the first look-up of two failed */
    bool is_second_try;
    bool is_stable, is_send;         /* path, kind of the call that is out */
    bool is_unknown;                 /* the last look-up told nothing */
    bool is_found;                   /* connected, as no webhook told */
    bool is_owned;                   /* id[1] is its owner, not watched */
    uint8_t redirect;                /* slot + 1 of redirect_pool */
    uint16_t api, next;              /* next: chain of the room, idx + 1 */
    uint16_t id_len[2], delay_len, sid_len;
    struct up *look, *call;
    int64_t timeout_ms, wait_end, deadline, restart_at, sanity_at;
    int64_t check_at;                /* next look-up */
    int64_t check_end, unknown_end;  /* absent, unknown count as gone */
    int64_t absent_at, send_end, connected_at;
    int64_t restarted_wall_ms;       /* as the record says */
    int64_t accepted_wall_ms;
    int32_t look_wait_ms, call_wait_ms;       /* backoff of each series */
    uint8_t alias[HASH_NAME_LEN], sid[LIM_SID_LEN];
    uint8_t id[2][LIM_JOB_ID_LEN], delay_id[LIM_ID_LEN];
};
static struct job job_pool[LIM_JOB_CNT];
_Static_assert(sizeof(struct job) <= 1088, "a job is small");

/* What scans over all jobs read; index as job_pool. */
static struct job_hot {
    uint8_t want, is_used;
    bool is_out;                     /* its call is under way */
    bool is_last;                    /* restart before we stop */
    uint16_t api;
    uint64_t user;                   /* hash */
    int64_t at;                      /* wanted from then on */
    int64_t order;                   /* its end; least goes first */
} job_hot[LIM_JOB_CNT];
static size_t job_top;               /* above the highest job in use */
static uint16_t job_room[LIM_ROOM_HASH];
static int64_t webhook_at, silence_told_at;
static bool store_is_done[LIM_SLOT_CNT];     /* by waiter */
static bool store_in_ring[LIM_JOB_CNT];
static uint16_t store_ring[LIM_JOB_CNT];     /* jobs that Redis waits for */
static size_t store_head, store_cnt;
static int64_t store_pause_at;               /* Redis refused a write */

/* Replicas (DESIGN section 6). mine: shards by bit, leased until `until`;
 * load: of them, those whose records are yet to be read; loading: are
 * being read. from: place in the stream that those records cover. */
struct place { uint64_t ms, seq; };
static struct rep {
    uint8_t id[16], run_id[40];
    size_t run_id_len;
    uint32_t serial, told_serial;    /* of connections */
    bool is_ticking, is_reading, is_caught_up, is_loading, is_loaded;
    bool is_leaving, has_left, is_told, has_slept;
    bool is_reload;                  /* of records seen expired before */
    uint64_t mine, load, loading;
    uint64_t given;                  /* away, but perhaps not taken yet */
    int64_t given_at[LIM_SHARD_CNT];
    int release;                     /* shard to give away, -1: none */
    int64_t cnt, share;              /* live replicas, shards for us */
    int64_t until, sent_at, tick_at, changed_at, awake_at;
    int64_t load_at, reload_at;      /* not before; once more */
    int64_t good_at;                 /* last renewal was sent, or we woke */
    struct place from[LIM_SHARD_CNT], last, now;   /* last: read up to */
} rep = { .release = -1, .cnt = 1 };

/* The shard of a job's field (DESIGN section 6). */
static unsigned shard_of(sl field)
{
    uint8_t sum[32];
    sha256(field, sum);
    return sum[0] % LIM_SHARD_CNT;
}

/* Redis has confirmed no lease for so long that all are void: every replica
 * then acts from memory (restarts and repeated sends do no harm). A sleep
 * of ours is no such outage: it starts the time anew. */
static bool store_is_away(int64_t now)
{
    return now - rep.good_at >= LIM_OUTAGE_MS && !rep.is_loading
        && now - rep.awake_at < LIM_SLEEP_MS;
}

static bool job_is_mine(const struct job *j)
{
    return store_mode != STORE_SHARED || (rep.mine >> j->shard & 1);
}

/* Whether this replica may act for the job: it holds the lease, by its own
 * clock for two thirds of its time at most. */
static bool job_may_act(const struct job *j, int64_t now)
{
    return store_mode != STORE_SHARED || store_is_away(now)
        || (job_is_mine(j) && now < rep.until);
}

/* Whether it may restart: a second owner's restart does no harm, one that
 * is missing does. So a Redis that is slow or gone does not stop them; a
 * sleep of ours does, until the leases are confirmed. */
static bool job_may_restart(const struct job *j, int64_t now)
{
    return job_may_act(j, now)
        || ((rep.mine | rep.given) >> j->shard & 1 && !rep.has_slept
            && now - rep.awake_at < LIM_SLEEP_MS);
}

static size_t job_idx(const struct job *j)
{
    return (size_t)(j - job_pool);
}

static struct job_hot *job_hot_of(const struct job *j)
{
    return &job_hot[job_idx(j)];
}

static uint16_t *job_chain(sl alias)
{
    uint8_t sum[32];
    sl part[] = { alias };
    hash_keyed(part, COUNT_OF(part), sum);
    return &job_room[be16(sum) % LIM_ROOM_HASH];
}

static int64_t job_connected_cnt(void)
{
    int64_t n = 0;
    for (size_t i = 0; i < job_top; i++)
        n += job_pool[i].state == J_CONNECTED;
    return n;
}

/* The next wait of a series: 1 s, times 1.5, at most 60 s, 50 % jitter. */
static int64_t backoff_next(int32_t *wait_ms)
{
    int64_t base = *wait_ms ? *wait_ms : LIM_BACKOFF_MIN_MS;
    int64_t wait = random_between(base / 2, base * 3 / 2);
    *wait_ms = (int32_t)(base * 3 / 2 > LIM_BACKOFF_MAX_MS
        ? LIM_BACKOFF_MAX_MS : base * 3 / 2);
    return wait < LIM_BACKOFF_MIN_MS ? LIM_BACKOFF_MIN_MS : wait;
}

/* The server whose delayed event this is; its API's entry stays. */
static sl job_server(const struct job *j)
{
    return (sl){ api_pool[j->api].name, api_pool[j->api].name_len };
}

static void job_log(enum event ev, const struct job *j, const char *reason)
{
    LOG(ev, KV("server", job_server(j)),
        KV("room", (sl){ j->alias, HASH_NAME_LEN }),
        KV("reason", sl_str(reason)));
}

/* Whether the job postpones its event now. */
static bool job_restarts(const struct job *j)
{
    return j->state == J_CONNECTED || (j->state == J_WAITING && j->is_owned);
}

/* Set the timer for the earliest thing that is due. */
static void job_watch(const struct job *j)
{
    int64_t at = INT64_MAX;
    if (j->state == J_WAITING)
        at = j->wait_end;
    if (job_restarts(j)) {
        at = j->deadline < at ? j->deadline : at;
        if (job_hot_of(j)->want == WANT_NONE && j->restart_at < at)
            at = j->restart_at;
    }
    if (j->state == J_CONNECTED) {
        if (cfg.sanity_s && j->sanity_at < at)
            at = j->sanity_at;
        if (j->is_found && j->connected_at + LIM_SILENCE_MS < at)
            at = j->connected_at + LIM_SILENCE_MS;
        if (j->absent_at && j->check == CK_NONE
            && j->absent_at + LIM_ABSENT_MS < at)
            at = j->absent_at + LIM_ABSENT_MS;
    }
    if (j->state != J_FREE && j->state != J_OVER && j->check != CK_NONE
        && !j->look && j->check_at < at)
        at = j->check_at;
    loop_set(KIND_JOB, job_idx(j), -1, 0, at);
}

/* Jobs whose look-up found no slot, in order. */
static uint16_t look_ring[LIM_JOB_CNT];
static bool look_in_ring[LIM_JOB_CNT];
static size_t look_head, look_waiting;

/* A look-up is over: the next job that waits has its slot. */
static void look_wake_next(void)
{
    while (look_waiting) {
        size_t i = look_ring[look_head];
        look_head = (look_head + 1) % LIM_JOB_CNT;
        look_waiting--;
        look_in_ring[i] = false;
        if (job_pool[i].check == CK_NONE || job_pool[i].look)
            continue;
        job_pool[i].check_at = 0;
        loop_wake(KIND_JOB, i);
        return;
    }
}

static void job_close_look(struct job *j, int64_t now)
{
    if (!j->look)
        return;
    up_close(j->look, now);
    j->look = NULL;
    look_wake_next();
}

static void job_drop_look(struct job *j, int64_t now)
{
    job_close_look(j, now);
    j->probe = 0;
    j->first_unknown = false;
}

/* A call's slot is free: the next API that found none may have it. */
static void api_wake_next(void)
{
    static size_t turn;
    for (size_t n = 0; n < LIM_API_CNT; n++) {
        struct api *a = &api_pool[turn++ % LIM_API_CNT];
        if (a->is_starved) {
            a->is_starved = false;
            loop_wake(KIND_API, api_idx(a));
            return;
        }
    }
}

static void job_drop_redirect(struct job *j);

static void job_drop_call(struct job *j, int64_t now)
{
    struct api *a = &api_pool[j->api];
    job_drop_redirect(j);
    if (!j->call)
        return;
    up_close(j->call, now);
    j->call = NULL;
    j->is_second_try = false;
    job_hot_of(j)->is_out = false;
    a->active--;
    a->sends -= j->is_send;
    api_wake_next();
}

/* The slot is free once Redis has been told. */
static void job_free(struct job *j)
{
    if (j->state != J_OVER || j->store || j->storing || j->is_asking)
        return;
    api_pool[j->api].job_cnt--;
    j->state = J_FREE;
    job_watch(j);
    while (job_top && job_pool[job_top - 1].state == J_FREE)
        job_top--;
}

/* Let the exchange go on that waits for the record to be written. */
static void job_tell_waiter(struct job *j)
{
    if (j->waiter == 0)
        return;
    store_is_done[j->waiter - 1] = true;
    loop_wake(KIND_EXCHANGE, j->waiter - 1U);
    j->waiter = 0;
}

/* Redis need not be told any more. */
static void store_cancel(struct job *j)
{
    met.gauge[GA_UNSAVED] -= j->store && !j->storing;
    j->store = ST_NONE;
}

/* Tell Redis of the job as soon as it can be. */
static void job_store(struct job *j, enum store_op op)
{
    size_t i = job_idx(j);
    if (store_mode == STORE_NONE || (op == ST_SET && j->store == ST_NEW))
        return;
    met.gauge[GA_UNSAVED] += !j->store && !j->storing;
    j->store = (uint8_t)op;
    if (!store_in_ring[i] && !j->storing) {
        store_in_ring[i] = true;
        store_ring[(store_head + store_cnt++) % LIM_JOB_CNT] = (uint16_t)i;
    }
    loop_wake(KIND_REPLICA, 0);
}

/* The job is over; calls under way are given up. With a reason its record
 * is deleted, without one another replica or delegation has it. */
static void job_end(struct job *j, const char *reason, int64_t now)
{
    uint16_t *at = job_chain((sl){ j->alias, HASH_NAME_LEN });
    if (reason)
        job_log(EV_JOB_ENDED, j, reason);
    while (*at != job_idx(j) + 1)
        at = &job_pool[*at - 1].next;
    *at = j->next;
    job_drop_look(j, now);
    job_drop_call(j, now);
    loop_wake(KIND_API, j->api);
    job_hot[job_idx(j)] = (struct job_hot){ .want = WANT_NONE };
    met.gauge[GA_JOBS]--;
    job_tell_waiter(j);
    store_cancel(j);
    j->state = J_OVER;
    if (reason)
        job_store(j, ST_DEL);
    job_free(j);
}

/* Queue a call at the homeserver. */
static void job_want(struct job *j, enum job_want want, int64_t at)
{
    struct job_hot *h = job_hot_of(j);
    h->want = (uint8_t)want;
    h->at = at;
    h->order = want == WANT_SEND ? j->send_end : j->deadline;
    loop_wake(KIND_API, j->api);
}

/* Ask the SFU, at once; a check under way gives way. */
static void job_look(struct job *j, enum job_check check, int64_t now)
{
    job_drop_look(j, now);
    j->check = (uint8_t)check;
    j->check_at = now;
    j->look_wait_ms = 0;
    loop_wake(KIND_JOB, job_idx(j));
}

/* Row Q1. which: the identity seen. */
static void job_connect(struct job *j, unsigned which, sl sid,
    bool by_webhook, int64_t now)
{
    if (sid.len && sid.len <= LIM_SID_LEN) {
        if (j->state == J_CONNECTED
            && !sl_eq(sid, (sl){ j->sid, j->sid_len }))
            job_store(j, ST_SET);        /* the next owner must know it */
        j->sid_len = (uint16_t)sid.len;
        memcpy(j->sid, sid.p, sid.len);
    }
    if (by_webhook && sid.len == 0)
        j->sid_len = 0;                  /* a session that we cannot name */
    j->followed = (uint8_t)which;
    j->absent_at = 0;
    j->check = CK_NONE;
    j->is_unverified = false;
    if (j->state == J_CONNECTED)
        return;
    if (!j->is_owned)
        job_drop_call(j, now);
    j->state = J_CONNECTED;
    j->connected_at = now;
    j->is_found = !by_webhook;
    j->sanity_at = now + cfg.sanity_s * 1000;
    job_log(EV_JOB_CONNECTED, j, "");
    if (j->is_owned) {                   /* it is being restarted already */
        job_store(j, ST_SET);
        return;
    }
    j->deadline = now + j->timeout_ms;
    job_want(j, WANT_RESTART, j->restart_at > now
        && j->restart_at <= now + LIM_RESTART_MIN_MS ? j->restart_at : now);
}

/* Go to J_LEAVING and send. An unfinished restart is given up. */
static void job_leave(struct job *j, const char *reason, int64_t now)
{
    bool was_connected = j->state == J_CONNECTED;
    int64_t budget = job_restarts(j) ? j->deadline - now : 0;
    budget = budget < 1000 ? 1000
        : budget > LIM_SEND_MAX_MS ? LIM_SEND_MAX_MS : budget;
    job_drop_look(j, now);
    job_drop_call(j, now);
    j->check = CK_NONE;
    j->state = J_LEAVING;
    j->send_end = now + budget;
    j->call_wait_ms = 0;
    job_log(EV_JOB_LEAVING, j, reason);
    job_hot_of(j)->want = WANT_NONE;
    job_hot_of(j)->is_last = false;
    j->is_asked = false;
    if (store_mode == STORE_SHARED       /* look once more (DESIGN 6) */
        || (!was_connected && j->is_unknown)) {
        j->unknown_end = now + j->timeout_ms;
        job_look(j, CK_SEND, now);
    } else {
        job_want(j, WANT_SEND, now);
    }
}

/* Doubt that a participant is still there: two absences 20 s apart end
 * the job. The first look-up comes within wait_ms. */
static void job_doubt(struct job *j, int64_t wait_ms, int64_t now)
{
    if (j->state != J_CONNECTED || j->is_unverified)
        return;
    j->is_unverified = true;
    j->absent_at = 0;
    if (j->check == CK_NONE) {
        job_look(j, CK_ABSENT, now);
        j->check_at = now + random_between(0, wait_ms);
        job_watch(j);
    }
}

static void job_may_send(struct job *j, int64_t now);

/* Row Q3, after looking. */
static void job_gone(struct job *j, int64_t now)
{
    if (j->state == J_WAITING)
        job_end(j, "left before it was seen connected", now);
    else if (j->state == J_CONNECTED)
        job_leave(j, "left", now);
}

/* About to be sent, and the SFU has the participant. It is back, unless
 * the SFU is slow to forget: that shows within 20 s. */
static void job_back(struct job *j, sl sid, int64_t now)
{
    job_connect(j, j->probe, sid, false, now);
    job_doubt(j, 0, now);
    j->check_at = now + LIM_BACKOFF_MIN_MS;
}

/* The SFU was asked about all watched identities. */
static void job_looked(struct job *j, enum presence p, sl sid, int64_t now)
{
    enum job_check check = (enum job_check)j->check;
    int64_t wait = backoff_next(&j->look_wait_ms);
    if (p == UNKNOWN)
        job_log(EV_PRESENCE_UNKNOWN, j, "");
    j->is_unknown = p == UNKNOWN;
    if (p == PRESENT && check == CK_SEND)
        job_back(j, sid, now);
    else if (p == PRESENT)
        job_connect(j, j->probe, sid, false, now);
    if (job_hot_of(j)->want == WANT_RESTART && j->state == J_CONNECTED
        && !j->call_wait_ms && !job_hot_of(j)->is_out)
        job_want(j, WANT_RESTART, now);  /* it waited for this look-up */
    switch (check) {
    case CK_NONE:
        return;
    case CK_WAIT:
        j->check_at = now + wait;
        return;
    case CK_SANITY:
        j->check = CK_NONE;
        if (p == ABSENT)
            job_leave(j, "absent", now);
        return;
    case CK_ABSENT:
        if (p == UNKNOWN && j->is_unverified) {
            j->check_at = now + wait;
            return;
        }
        j->check = CK_NONE;
        if (p == UNKNOWN)
            j->absent_at = 0;            /* unconfirmed: start over */
        else if (p == ABSENT && j->absent_at
                 && now >= j->absent_at + LIM_ABSENT_MS)
            job_leave(j, "absent", now);
        else if (p == ABSENT && !j->absent_at)
            j->absent_at = now;
        return;
    case CK_LEFT:
    case CK_DUPLICATE:
        if (p == PRESENT)
            return;
        int64_t end = p == ABSENT ? j->check_end : j->unknown_end;
        if (now >= end)
            job_gone(j, now);
        else
            j->check_at = now + wait < end ? now + wait
                : end > now + LIM_BACKOFF_MIN_MS ? end
                : now + LIM_BACKOFF_MIN_MS;
        return;
    case CK_SEND:
        j->check_at = now + wait;
        if (p == ABSENT || (p == UNKNOWN && now >= j->unknown_end))
            job_may_send(j, now);
        return;
    }
}

static void job_build_look(uint16_t idx, struct bb *b)
{
    const struct job *j = &job_pool[idx];
    uint8_t text[HASH_NAME_LEN + LIM_JOB_ID_LEN + 8];
    struct bb body = BB(text);
    sl alias = { j->alias, HASH_NAME_LEN };
    pb_participant(&body, alias, (sl){ j->id[j->probe],
        j->id_len[j->probe] });
    lk_put(b, "GetParticipant", alias, (sl){ text, body.len },
        (sl){ NULL, 0 });
}

/* Use an ended look-up; the second identity comes after the first. */
static void job_look_ended(struct job *j, int64_t now)
{
    sl sid;
    uint8_t copy[LIM_SID_LEN];
    enum presence p = lk_presence(j->look, (sl){ j->id[j->probe],
        j->id_len[j->probe] }, &sid);
    bool both = j->followed == 2 && j->id_len[1] > 0;
    if (p == UNKNOWN && !j->is_unknown)  /* not each time */
        (void)lk_log(j->look, (sl){ NULL, 0 });
    sid.len = sid.len > LIM_SID_LEN ? 0 : sid.len;
    if (sid.len)
        memcpy(copy, sid.p, sid.len);
    job_close_look(j, now);
    if (p != PRESENT && both && j->probe == 0) {
        j->first_unknown = p == UNKNOWN;
        j->probe = 1;
        j->check_at = now;
        return;
    }
    if (p == ABSENT && j->first_unknown)
        p = UNKNOWN;
    j->first_unknown = false;
    job_looked(j, p, (sl){ copy, sid.len }, now);
    if (j->state != J_OVER && !j->look)
        j->probe = j->followed == 1;
}

/* Start the look-up that is due. */
static void job_start_look(struct job *j, int64_t now)
{
    if (j->check == CK_NONE || j->look || now < j->check_at)
        return;
    if (!job_may_act(j, now)) {
        j->check_at = now + LIM_TICK_MS / 2;
        return;
    }
    if (j->followed < 2)
        j->probe = j->followed;
    if (breaker_refuses(&lk_breaker, now)) {     /* as if it had failed */
        j->first_unknown = false;
        job_looked(j, UNKNOWN, (sl){ NULL, 0 }, now);
        if (j->state != J_OVER && !j->look)
            j->probe = j->followed == 1;
        return;
    }
    j->look = lk_open(KIND_JOB, (uint16_t)job_idx(j), job_build_look,
        now + LIM_RPC_MS, now);
    if (j->look)
        return;
    j->check_at = now + LIM_RPC_MS;      /* or when a slot is free */
    if (!look_in_ring[job_idx(j)]) {
        look_in_ring[job_idx(j)] = true;
        look_ring[(look_head + look_waiting++) % LIM_JOB_CNT] =
            (uint16_t)job_idx(j);
    }
}

/* ---- delayed events ---- */

/* The homeserver's answer, judged by PROTOCOL section 8. */
enum outcome { OUT_DONE, OUT_PERMANENT, OUT_TRANSIENT, OUT_LIMITED,
    OUT_OTHER_PATH };

struct delayed_error { sl errcode; struct js_int retry_after_ms; };

/* Judge an ended call. *wait_ms is set for OUT_LIMITED. */
static enum outcome delayed_judge(struct up *u, bool is_send,
    bool is_stable, struct delayed_error *e, int64_t *wait_ms)
{
    static const struct js_field field[] = {
        { "errcode", JS_STRING, offsetof(struct delayed_error, errcode),
          NULL },
        { "retry_after_ms", JS_INT,
          offsetof(struct delayed_error, retry_after_ms), NULL } };
    static const struct js_table tab = { field, 2, false, false };
    *e = (struct delayed_error){ .errcode = { NULL, 0 } };
    if (u->state != UP_DONE)
        return OUT_TRANSIENT;
    unsigned st = u->head.status;
    sl body = sl_trim((sl){ up_body(u), u->intake.len });
    bool other = sl_starts(body, SL("[")) || sl_starts(body, SL("\""))
        || sl_eq(body, SL("null"));
    int err = js_parse(up_body(u), u->intake.len, &tab, e);
    bool json = err == 0 || err == -EV_JSON_TYPE || err == -EV_JSON_LIMIT
        || err == -EV_JSON_DUPLICATE || other;
    *wait_ms = retry_after_ms(up_field(u, H1_RETRY_AFTER),
        io_wall_ms() / 1000);
    if (st < 300)
        return OUT_DONE;
    if (st == 404 && !json && u->intake.len)
        return OUT_TRANSIENT;                  /* an intermediary's page */
    if (st == 404 && sl_eq(e->errcode, SL("M_UNRECOGNIZED")))
        return is_stable ? OUT_PERMANENT : OUT_OTHER_PATH;
    if (st == 404)
        return is_send ? OUT_DONE : OUT_PERMANENT;
    if (st == 429 && *wait_ms < 0
        && (e->retry_after_ms.over || e->retry_after_ms.v > 0))
        *wait_ms = (e->retry_after_ms.over || e->retry_after_ms.v > 86400000)
            ? 86400000 : (e->retry_after_ms.v + 999) / 1000 * 1000;
    if (st == 429)
        return OUT_LIMITED;                    /* no hint: wait_ms is -1 */
    if (st == 408 || st == 421 || st == 423 || st == 425 || st >= 500
        || st < 400)
        return OUT_TRANSIENT;
    return OUT_PERMANENT;
}

/* Where 307 and 308 pointed, for the calls that repeat there. */
static struct { bool is_used; size_t len; uint8_t path[LIM_URL_LEN]; }
    redirect_pool[LIM_JOBCALL_CNT];

static void job_drop_redirect(struct job *j)
{
    if (j->redirect)
        redirect_pool[j->redirect - 1].is_used = false;
    j->redirect = 0;
}

static void job_build_call(uint16_t idx, struct bb *b)
{
    const struct job *j = &job_pool[idx];
    const struct api *a = &api_pool[j->api];
    bb_str(b, "POST ");
    if (j->redirect) {
        bb_put(b, (sl){ redirect_pool[j->redirect - 1].path,
            redirect_pool[j->redirect - 1].len });
    } else {
        bb_put(b, a->url.path);
        bb_str(b, j->is_stable ? "/_matrix/client/v1/delayed_events/"
            : "/_matrix/client/unstable/org.matrix.msc4140/delayed_events/");
        bb_percent(b, (sl){ j->delay_id, j->delay_len });
        bb_str(b, job_hot[idx].want == WANT_SEND ? "/send" : "/restart");
        if (j->is_owned) {
            bb_str(b, "?user_id=");
            bb_percent(b, (sl){ j->id[1], j->id_len[1] });
        }
    }
    api_put_rest(b, a, j->is_owned, true, SL("{}"));
}

/* Start the call that a job wants. False: no slot free. An API that has a
 * call out leaves some slots to the others. */
MUST_USE static bool job_start_call(struct job *j, bool is_stable,
    int64_t now)
{
    struct api *a = &api_pool[j->api];
    size_t to = LIM_UP_ALL - LIM_REDIS_CNT - (a->active ? LIM_SPARE_CNT : 0);
    struct up_call c = api_call(a, KIND_JOB, job_idx(j), TL_DELAYED_EVENT,
        now + LIM_DELAYED_MS);
    c.build = job_build_call;
    j->is_stable = is_stable;
    j->call = up_open(&c, LIM_UP_CNT + LIM_SFU_CNT + LIM_LOOK_CNT, to, now);
    if (!j->call)
        return false;
    job_hot_of(j)->is_out = true;
    a->active++;
    j->is_send = job_hot_of(j)->want == WANT_SEND;
    a->sends += j->is_send;
    return true;
}

/* Take a redirect to the same scheme, host and port, once (PROTOCOL 8).
 * Returns its slot + 1, 0: none to follow. */
MUST_USE static uint8_t job_redirect(const struct job *j)
{
    const struct api *a = &api_pool[j->api];
    const struct up *u = j->call;
    struct url url;
    size_t i = 0;
    if (j->is_second_try || u->state != UP_DONE
        || (u->head.status != 307 && u->head.status != 308))
        return 0;
    sl to = up_field(u, H1_LOCATION), path = to;
    if (!sl_starts(to, SL("/")) || sl_starts(to, SL("//"))) {
        if (!url_parse(sl_starts(to, SL("//")) ? sl_skip(to, 2) : to, &url)
            || (url.scheme.len && !sl_ieq(url.scheme, a->is_tls
                                          ? SL("https") : SL("http")))
            || !sl_ieq(url.name.host, a->url.name.host)
            || (url.name.port ? url.name.port : a->is_tls ? 443 : 80)
               != a->port)
            return 0;
        path = url.rest;
    }
    for (size_t k = 0; k < path.len; k++)
        if (path.p[k] <= 0x20 || path.p[k] >= 0x7f || path.p[k] == '#')
            return 0;
    while (i < LIM_JOBCALL_CNT && redirect_pool[i].is_used)
        i++;
    if (!sl_starts(path, SL("/")) || path.len > LIM_URL_LEN
        || i == LIM_JOBCALL_CNT)
        return 0;
    redirect_pool[i].is_used = true;
    redirect_pool[i].len = path.len;
    memcpy(redirect_pool[i].path, path.p, path.len);
    return (uint8_t)(i + 1);
}

/* A restart or send is done. */
static void job_done(struct job *j, bool is_send, int64_t now)
{
    j->call_wait_ms = 0;
    if (is_send) {
        job_log(EV_JOB_SENT, j, "");
        job_end(j, "sent", now);
        return;
    }
    int64_t wait = random_between(j->timeout_ms * 6 / 10,
        j->timeout_ms * 8 / 10);
    if (store_mode == STORE_SHARED && rep.cnt > 1
        && j->timeout_ms < LIM_BACKOFF_MAX_MS)
        wait = j->timeout_ms / 2;        /* leaves time for a takeover */
    j->restarted_wall_ms = io_wall_ms();
    job_store(j, ST_SET);
    j->deadline = now + j->timeout_ms;
    j->restart_at = now + (wait < LIM_RESTART_MIN_MS ? LIM_RESTART_MIN_MS
        : wait);
    job_hot_of(j)->want = WANT_NONE;
    job_log(EV_JOB_RESTARTED, j, "");
}

/* A restart or send failed for now: again after wait_ms, within the
 * budget. A restart's runs to the deadline, which job_clock watches. */
static void job_again(struct job *j, bool is_send, int64_t wait_ms,
    int64_t now)
{
    wait_ms = wait_ms < LIM_BACKOFF_MIN_MS ? LIM_BACKOFF_MIN_MS : wait_ms;
    job_hot_of(j)->is_last = false;
    if (is_send && now + wait_ms > j->send_end)
        job_end(j, "no answer within the budget", now);
    else
        job_want(j, is_send ? WANT_SEND : WANT_RESTART, now + wait_ms);
}

/* An errcode as it may stand in a log (T11): M_ and upper-case letters. */
static sl log_errcode(sl code)
{
    bool ok = sl_starts(code, SL("M_")) && code.len <= 42;
    for (size_t i = 0; i < code.len; i++)
        ok &= code.p[i] == '_' || (code.p[i] >= 'A' && code.p[i] <= 'Z');
    return ok ? code : (sl){ NULL, 0 };
}

static void job_log_failed(const struct job *j, enum outcome got,
    bool is_send, sl errcode)
{
    struct up *u = j->call;
    uint8_t addr[64], num[20];
    LOG(got == OUT_LIMITED ? EV_DELAYED_EVENT_LIMITED
        : EV_DELAYED_EVENT_FAILED, KV("server", job_server(j)),
        KV("room", (sl){ j->alias, HASH_NAME_LEN }),
        KV("action", is_send ? SL("send") : SL("restart")),
        KV("outcome", got == OUT_PERMANENT ? SL("permanent")
           : got == OUT_LIMITED ? SL("limited") : SL("transient")),
        KV("step", u->state == UP_FAILED ? sl_str(u->step) : SL("http")),
        KV("addr", u->has_addr ? text_addr(addr, &u->addr)
                               : (sl){ NULL, 0 }),
        KV("status", u->state == UP_DONE ? text_u64(num, u->head.status)
                                         : (sl){ NULL, 0 }),
        KV("errcode", log_errcode(errcode)),
        KV("hint", u->state == UP_DONE && u->head.status == 401
           ? SL("the homeserver wants authentication for delayed events")
           : (sl){ NULL, 0 }));
}

/* The pace of an API after an answer: a 429 stops it for wait_ms, a minute
 * at most (others' events need not wait for what one was told), and halves
 * it, once for all calls that were out together; success raises
 * it. begin_us is when the call was started. */
static void api_pace(struct api *a, enum outcome got, int64_t wait_ms,
    int64_t begin_us, int64_t now)
{
    if (got == OUT_DONE)
        a->interval_ms -= a->interval_ms / 8 + (a->interval_ms > 0);
    if (got != OUT_LIMITED)
        return;
    wait_ms = wait_ms < LIM_BACKOFF_MIN_MS ? LIM_BACKOFF_MIN_MS
        : wait_ms > LIM_BACKOFF_MAX_MS ? LIM_BACKOFF_MAX_MS : wait_ms;
    if (now + wait_ms > a->next_at)
        a->next_at = now + wait_ms;
    if (begin_us < a->halved_us)
        return;
    a->halved_us = io_now_us();
    a->interval_ms = a->interval_ms < 125 ? 250
        : a->interval_ms > 4000 ? 8000 : a->interval_ms * 2;
}

/* Use an ended delayed-event call. */
static void job_call_ended(struct job *j, int64_t now)
{
    struct api *a = &api_pool[j->api];
    bool is_send = j->is_send;
    bool is_answered = j->call->state == UP_DONE;
    struct delayed_error e;
    int64_t wait_ms = 0, begin_us = j->call->begin_us;
    enum outcome got = delayed_judge(j->call, is_send, j->is_stable, &e,
        &wait_ms);
    uint8_t target = job_redirect(j);
    bool again = (got == OUT_OTHER_PATH || target) && a->state == API_OK;
    if (got != OUT_DONE && !again)
        job_log_failed(j, got, is_send, e.errcode);
    if (is_answered && j->is_stable)     /* remembered once it is known */
        a->is_stable = !sl_eq(e.errcode, SL("M_UNRECOGNIZED"));
    a->max_out = !is_answered ? 2 : a->max_out < LIM_API_CALLS
        ? a->max_out + 1 : a->max_out;
    job_hot_of(j)->is_last = false;
    job_drop_call(j, now);
    j->redirect = target;
    if (again && job_start_call(j, got == OUT_OTHER_PATH || j->is_stable,
                                now)) {
        j->is_second_try = target > 0;
        return;
    }
    job_drop_redirect(j);
    j->is_second_try = false;
    if (got == OUT_LIMITED && wait_ms < 0)
        wait_ms = backoff_next(&j->call_wait_ms);
    else if (got == OUT_LIMITED)
        j->call_wait_ms = 0;             /* a hint restarts the series */
    api_pace(a, got, wait_ms, begin_us, now);
    loop_wake(KIND_API, j->api);
    switch (got) {
    case OUT_DONE:
        job_done(j, is_send, now);
        return;
    case OUT_PERMANENT:
        job_end(j, "refused by the homeserver", now);
        return;
    case OUT_LIMITED:
        job_again(j, is_send, wait_ms, now);
        return;
    case OUT_TRANSIENT:
    case OUT_OTHER_PATH:
        job_again(j, is_send, backoff_next(&j->call_wait_ms), now);
        return;
    }
}

/* Who goes first: a restart whose deadline is near, since others leaving
 * must not throw out who stays; then sends, then restarts. */
static int job_rank(const struct job_hot *h, int64_t now)
{
    return h->want == WANT_SEND ? 1
        : h->order - now < LIM_URGENT_MS ? 0 : 2;
}

/* The job of an API whose call is next, or NULL; *at: when one is due. */
static struct job *job_pick(const struct api *a, int64_t now, int64_t *at)
{
    uint16_t api = (uint16_t)api_idx(a);
    bool no_sends = srv_stopping == 2
        || a->sends >= (a->max_out > 2 ? a->max_out - 2 : 1);
    size_t best = job_top;
    int best_rank = 3;
    *at = INT64_MAX;
    for (size_t i = 0; i < job_top; i++) {
        const struct job_hot *h = &job_hot[i];
        if (!h->is_used || h->api != api || h->want == WANT_NONE || h->is_out
            || (h->want == WANT_SEND && no_sends))
            continue;
        int rank = job_rank(h, now);
        int64_t due = h->at > now || (h->want == WANT_SEND
            ? job_may_act(&job_pool[i], now)
            : job_may_restart(&job_pool[i], now)) ? h->at
            : now + LIM_TICK_MS / 2;
        if (due > now) {
            *at = due < *at ? due : *at;
        } else if (rank < best_rank || (rank == best_rank
                   && h->order < job_hot[best].order)) {
            best = i;
            best_rank = rank;
        }
    }
    return best < job_top ? &job_pool[best] : NULL;
}

/* The base URL is unknown until a->until: transient for all that is due. */
static void job_all_again(const struct api *a, int64_t now)
{
    for (size_t i = 0; i < job_top; i++) {
        const struct job_hot *h = &job_hot[i];
        if (h->is_used && h->api == api_idx(a) && h->want != WANT_NONE
            && !h->is_out && h->at <= now)
            job_again(&job_pool[i], h->want == WANT_SEND, a->until - now,
                now);
    }
}

/* What an open breaker does not hold up: a send's first try and a restart
 * near its deadline (PROTOCOL sections 8 and 9), the last ones of a stop. */
static bool job_presses(const struct job *j, int64_t now)
{
    const struct job_hot *h = job_hot_of(j);
    return h->is_last || job_rank(h, now) == 0
        || (h->want == WANT_SEND && !j->call_wait_ms);
}

/* Start what an API's pace allows. */
static void job_run_queue(struct api *a, int64_t now)
{
    int64_t at = INT64_MAX;
    struct job *j;
    while ((j = job_pick(a, now, &at)) != NULL) {
        enum res got = api_resolve(a, now);
        at = INT64_MAX;
        if (got == RES_WAIT)
            break;
        if (got == RES_FAILED) {
            job_all_again(a, now);
            continue;
        }
        if (a->active >= a->max_out)         /* an ended call wakes us */
            break;
        if (now < a->next_at) {
            at = a->next_at;
            break;
        }
        if (breaker_refuses(&a->breaker, now) && !job_presses(j, now)) {
            at = a->breaker.at;              /* or when its probe ends */
            break;
        }
        if (!job_start_call(j, a->is_stable, now)) {
            a->is_starved = true;            /* api_wake_next */
            at = now + 1000;
            break;
        }
        a->next_at = now + a->interval_ms;
    }
    loop_set(KIND_API, api_idx(a), -1, 0, at);
}

/* ---- events and time ---- */

/* What a webhook says; slices borrow from its body. */
struct webhook {
    sl event, id, dropped;
    sl room, identity, sid, reason, reason_old;
};

/* Read a webhook's body (PROTOCOL section 10). */
MUST_USE static bool webhook_parse(uint8_t *body_raw, size_t len,
    struct webhook *w)
{
#define AT(member) offsetof(struct webhook, member)
    static const struct js_field room_field[] = {
        { "name", JS_STRING, AT(room), NULL } };
    static const struct js_table room = { room_field, 1, false, false };
    static const struct js_field who_field[] = {
        { "identity", JS_STRING, AT(identity), NULL },
        { "sid", JS_STRING, AT(sid), NULL },
        { "disconnectReason", JS_TEXT, AT(reason), NULL },
        { "disconnect_reason", JS_TEXT, AT(reason_old), NULL } };
    static const struct js_table who = { who_field, 4, false, false };
    static const struct js_field field[] = {
        { "event", JS_STRING, AT(event), NULL },
        { "id", JS_STRING, AT(id), NULL },
        { "numDropped", JS_TEXT, AT(dropped), NULL },
        { "room", JS_OBJECT, 0, &room },
        { "participant", JS_OBJECT, 0, &who } };
    static const struct js_table tab = { field, 5, false, false };
#undef AT
    memset(w, 0, sizeof *w);
    uint64_t n;
    return js_parse(body_raw, len, &tab, w) == 0
        && (w->dropped.len == 0 || sl_u64(w->dropped, INT64_MAX, &n));
}

/* How a participant left. */
struct departure {
    unsigned reason;
    bool aborted, other_sid;         /* other: not the one that joined last */
    int64_t at;                      /* when we heard of it */
};

/* Rows Q2 and Q3: a watched participant is said to have left. */
static void job_left(struct job *j, const struct departure *d, int64_t now)
{
    unsigned reason = d->reason;
    bool maybe_back = reason == 2 || reason == 3 || reason == 6
        || reason == 8;                  /* or moved to another node */
    bool sure = reason == 1 || reason == 4 || reason == 5 || reason == 10;
    maybe_back |= d->other_sid;
    bool looks = maybe_back || d->aborted || !sure;
    if (j->state == J_LEAVING || (looks && j->check == CK_DUPLICATE))
        return;                          /* a look-up for 20 s is enough */
    if (!looks && reason == 1 && j->state == J_WAITING)
        return;                          /* it may have just begun */
    if (!looks) {
        job_gone(j, now);
        return;
    }
    j->unknown_end = now + j->timeout_ms;
    j->check_end = maybe_back ? d->at + LIM_ABSENT_MS : now;
    job_look(j, maybe_back ? CK_DUPLICATE : CK_LEFT, now);
}

/* Who joined or left in the last LIM_GONE_MS, for jobs that come later: a
 * replica may learn of a participant's job after its end. Newest last, one
 * entry a participant. */
static struct gone {
    uint64_t who, sid;               /* hashes; sid 0: not given */
    int64_t at, wall_ms;             /* wall_ms: when Redis was told */
    uint8_t reason;
    bool has_joined, is_aborted;
    bool is_same;                    /* left as it had joined */
} gone_ring[LIM_GONE_CNT];
static size_t gone_cnt;              /* ever */

static uint64_t gone_hash(sl room, sl identity)
{
    uint8_t sum[32];
    sl part[] = { room, identity };
    hash_keyed(part, COUNT_OF(part), sum);
    return be64(sum) | 1;
}

/* What was last heard of a participant, or NULL. */
static struct gone *gone_find(uint64_t who, int64_t now)
{
    for (size_t n = gone_cnt; n > 0 && n + LIM_GONE_CNT > gone_cnt; n--) {
        struct gone *g = &gone_ring[(n - 1) % LIM_GONE_CNT];
        if (g->at + LIM_GONE_MS < now)
            return NULL;
        if (g->who == who)
            return g;
    }
    return NULL;
}

static void gone_note(const struct webhook *w, bool joined,
    const struct departure *d, int64_t wall_ms, int64_t now)
{
    uint64_t who = gone_hash(w->room, w->identity);
    struct gone *last = gone_find(who, now), g = { .who = who,
        .sid = w->sid.len ? gone_hash(w->sid, w->sid) : 0, .at = now,
        .wall_ms = wall_ms, .reason = (uint8_t)d->reason,
        .has_joined = joined, .is_aborted = d->aborted };
    if (last) {
        g.is_same = last->has_joined && last->sid && last->sid == g.sid;
        last->who = 0;
    }
    gone_ring[gone_cnt++ % LIM_GONE_CNT] = g;
}

/* A job that is new here: was its participant seen to leave before? One
 * that is still waited for, and left after it delegated, was connected. */
static void gone_apply(struct job *j, int64_t now)
{
    sl sid = { j->sid, j->sid_len };
    for (unsigned which = 0; which < 2; which++) {
        const struct gone *g = j->id_len[which] && j->state != J_OVER
            && !(which == 1 && j->is_owned)
            ? gone_find(gone_hash((sl){ j->alias, HASH_NAME_LEN },
                (sl){ j->id[which], j->id_len[which] }), now) : NULL;
        if (!g || g->has_joined)
            continue;
        if (j->state == J_CONNECTED) {
            struct departure d = { g->reason, g->is_aborted, !g->is_same
                && g->sid && sid.len && g->sid != gone_hash(sid, sid),
                g->at };
            job_left(j, &d, now);
        } else if (j->state == J_WAITING && !g->is_aborted
                   && g->wall_ms > (j->is_owned ? j->accepted_wall_ms
                                    : j->restarted_wall_ms)) {
            job_connect(j, which, (sl){ NULL, 0 }, true, now);
            job_doubt(j, 0, now);
        }
    }
}

static void seat_joined(sl alias, sl identity, int64_t now);

/* Give one verified webhook to the jobs of its room. wall_ms: when it was
 * taken. */
static void job_webhook(const struct webhook *w, int64_t wall_ms, int64_t now)
{
    uint64_t dropped;
    bool joined = sl_eq(w->event, SL("participant_joined"));
    bool left = sl_eq(w->event, SL("participant_left"));
    bool aborted = sl_eq(w->event, SL("participant_connection_aborted"));
    bool started = sl_eq(w->event, SL("room_started"));
    bool lost = sl_u64(w->dropped, INT32_MAX, &dropped) && dropped > 0;
    webhook_at = now;
    if (joined)
        seat_joined(w->room, w->identity, now);
    for (size_t i = 0; lost && i < job_top; i++)
        if (job_pool[i].state == J_CONNECTED && job_pool[i].check == CK_NONE) {
            job_pool[i].check = CK_ABSENT;
            job_pool[i].check_at = now + random_between(0, 5000);
            job_watch(&job_pool[i]);
        }
    if (w->room.len == 0 || !(joined || left || aborted || started))
        return;
    struct departure d = { .reason = disconnect_reason(w->reason.len
        ? w->reason : w->reason_old), .aborted = aborted, .at = now };
    if (store_mode == STORE_SHARED && w->identity.len && !started)
        gone_note(w, joined, &d, wall_ms, now);
    uint16_t next;
    for (uint16_t at = *job_chain(w->room); at; at = next) {
        struct job *j = &job_pool[at - 1];
        next = j->next;
        if (!sl_eq(w->room, (sl){ j->alias, HASH_NAME_LEN }))
            continue;
        if (started && j->state == J_CONNECTED && j->check == CK_NONE)
            job_look(j, CK_ABSENT, now);
        unsigned which = 0;
        while (which < 2 && (w->identity.len == 0 || !sl_eq(w->identity,
                   (sl){ j->id[which], j->id_len[which] })))
            which++;
        if (which == 2 || (j->followed < 2 && j->followed != which))
            continue;
        if (joined && j->state != J_LEAVING) {
            job_drop_look(j, now);
            job_connect(j, which, w->sid, true, now);
        } else if (left || aborted) {
            d.other_sid = w->sid.len && j->sid_len
                && !sl_eq(w->sid, (sl){ j->sid, j->sid_len });
            job_left(j, &d, now);
        }
        job_watch(j);
    }
}

/* A participant was found by look-up, and from a minute before until
 * LIM_SILENCE_MS after no webhook came, though it must have joined: told,
 * as often at most. In a quiet call no webhook is no fault. */
static void job_tell_silence(struct job *j, int64_t now)
{
    if (!j->is_found || now < j->connected_at + LIM_SILENCE_MS)
        return;
    j->is_found = false;
    if ((webhook_at && webhook_at > j->connected_at - LIM_BACKOFF_MAX_MS)
        || (silence_told_at && now - silence_told_at < LIM_SILENCE_MS))
        return;
    silence_told_at = now;
    job_log(EV_NO_WEBHOOK, j, "");
}

/* What is due by the clock: rows Q4 to Q7. */
static void job_clock(struct job *j, int64_t now)
{
    if (j->state == J_WAITING && now >= j->wait_end) {
        if (job_may_act(j, now))
            job_leave(j, "never connected", now);
        else
            j->wait_end = now + LIM_TICK_MS;
        return;
    }
    if (j->state == J_WAITING && j->check == CK_NONE)
        job_look(j, CK_WAIT, now);
    if (job_restarts(j) && now >= j->deadline) {
        job_end(j, "deadline passed", now);
        return;
    }
    if (j->state == J_WAITING && j->is_owned && now >= j->restart_at
        && job_hot_of(j)->want == WANT_NONE)
        job_want(j, WANT_RESTART, now);
    if (j->state != J_CONNECTED)
        return;
    job_tell_silence(j, now);
    bool sanity = cfg.sanity_s && now >= j->sanity_at;
    bool look = j->absent_at && now >= j->absent_at + LIM_ABSENT_MS;
    if (sanity)
        j->sanity_at = now + cfg.sanity_s * 1000;
    if (job_hot_of(j)->want == WANT_NONE && now >= j->restart_at) {
        /* look first, but not for long: the deadline must not pass */
        int64_t wait = (j->deadline - now) / 4;
        wait = wait > 2000 ? 2000 : wait;
        look |= j->check == CK_NONE;
        job_want(j, WANT_RESTART, j->check == CK_NONE ? now + wait : now);
    }
    if (j->check == CK_NONE && (sanity || look))
        job_look(j, sanity ? CK_SANITY : CK_ABSENT, now);
}

static bool up_has_ended(const struct up *u)
{
    return u && (u->state == UP_DONE || u->state == UP_FAILED);
}

/* Move a job on after a wake or at a time. */
static enum step job_step(size_t idx, int revents, int64_t now)
{
    struct job *j = &job_pool[idx];
    (void)revents;
    if (up_has_ended(j->look))
        job_look_ended(j, now);
    if (up_has_ended(j->call))
        job_call_ended(j, now);
    if (j->state != J_FREE && j->state != J_OVER)
        job_clock(j, now);
    if (j->state != J_FREE && j->state != J_OVER)
        job_start_look(j, now);
    job_watch(j);
    return STEP_WAIT;
}

static bool job_has_key(const struct job *j, sl alias, sl identity)
{
    return sl_eq(alias, (sl){ j->alias, HASH_NAME_LEN })
        && sl_eq(identity, (sl){ j->id[0], j->id_len[0] });
}

/* The job of a key, or NULL. */
static struct job *job_find(sl alias, sl identity)
{
    for (uint16_t at = *job_chain(alias); at; at = job_pool[at - 1].next)
        if (job_has_key(&job_pool[at - 1], alias, identity))
            return &job_pool[at - 1];
    return NULL;
}

/* Whether a delegation exceeds a cap: EV_JOBS_FULL, EV_JOBS_USER, or
 * EV_NONE. One that replaces a job never does. */
static enum event job_refuses(const struct job_params *p)
{
    uint64_t user = dest_hash(p->user);
    int64_t all = met.gauge[GA_JOBS], same = 0, server = 0;
    if (job_find(p->alias, p->identity[0]))
        return EV_NONE;
    for (size_t i = 0; i < job_top; i++) {
        same += job_hot[i].is_used && job_hot[i].user == user;
        server += cfg.is_open && job_hot[i].is_used
            && sl_eq(p->server, job_server(&job_pool[i]));
    }
    if (all >= cfg.jobs_max || (cfg.is_open && server >= LIM_JOB_SERVER))
        return EV_JOBS_FULL;
    return same >= cfg.jobs_per_user ? EV_JOBS_USER : EV_NONE;
}

static void job_copy(uint8_t *to, uint16_t *len, sl s)
{
    *len = (uint16_t)s.len;
    if (s.len)
        memcpy(to, s.p, s.len);
}

/* A free slot; one that only waits to be deleted from Redis gives way. */
static struct job *job_slot(void)
{
    struct job *over = NULL;
    for (size_t i = 0; i < LIM_JOB_CNT; i++) {
        struct job *j = &job_pool[i];
        if (j->state == J_FREE)
            return j;
        if (j->state == J_OVER && !j->storing && !j->is_asking)
            over = j;
    }
    if (over) {
        store_cancel(over);
        job_free(over);
    }
    return over;
}

/* Fill a slot with what a delegation says; not yet part of any chain. */
static struct job *job_fill(const struct job_params *p, struct api *a)
{
    struct job *j = job_slot();
    uint8_t field[8 * LIM_JOB_ID_LEN];
    struct bb b = BB(field);
    if (!j)
        return NULL;
    memset(j, 0, sizeof *j);
    j->api = (uint16_t)api_idx(a);
    a->job_cnt++;
    j->timeout_ms = p->timeout_ms;
    memcpy(j->alias, p->alias.p, HASH_NAME_LEN);
    job_copy(j->id[0], &j->id_len[0], p->identity[0]);
    job_copy(j->id[1], &j->id_len[1], p->identity[1]);
    job_copy(j->delay_id, &j->delay_len, p->delay_id);
    rec_put_field(&b, p->alias, p->identity[0]);
    j->shard = (uint8_t)shard_of((sl){ b.p, b.len });
    size_t i = job_idx(j);
    job_top = i >= job_top ? i + 1 : job_top;
    return j;
}

/* A job in J_WAITING for a delegation that no cap forbids. NULL: full. */
static struct job *job_make(const struct job_params *p, struct api *a,
    int64_t now)
{
    struct job *j = job_fill(p, a);
    if (!j)
        return NULL;
    j->state = J_WAITING;
    j->is_owned = p->is_owned;
    j->followed = p->identity[1].len && !p->is_owned ? 2 : 0;
    int64_t wait = p->is_owned && p->timeout_ms < LIM_AS_TTL_S * 1000
        ? LIM_AS_TTL_S * 1000 : p->timeout_ms;
    j->wait_end = now + (wait < LIM_WAIT_MS ? wait : LIM_WAIT_MS);
    j->deadline = now + p->timeout_ms;
    j->restarted_wall_ms = j->accepted_wall_ms = io_wall_ms();
    uint16_t *chain = job_chain(p->alias);
    j->next = *chain;
    *chain = (uint16_t)(job_idx(j) + 1);
    job_hot[job_idx(j)] = (struct job_hot){ .is_used = 1, .api = j->api,
        .user = dest_hash(p->user) };
    met.gauge[GA_JOBS]++;
    return j;
}

/* Whether this delegation has ended here and its record is yet to go. */
static bool store_deletes(sl delay_id)
{
    for (size_t i = 0; met.gauge[GA_UNSAVED] && i < job_top; i++)
        if (job_pool[i].state == J_OVER && sl_eq(delay_id,
                (sl){ job_pool[i].delay_id, job_pool[i].delay_len }))
            return true;
    return false;
}

/* An ended job with this key must not delete the new one's record. */
static void store_forget(sl alias, sl identity)
{
    for (size_t i = 0; met.gauge[GA_UNSAVED] && i < job_top; i++) {
        struct job *j = &job_pool[i];
        if (j->state != J_OVER || !job_has_key(j, alias, identity))
            continue;
        j->is_forgotten = true;
        store_cancel(j);
        job_free(j);
    }
}

/* Start a job; one with the same key is replaced silently. NULL: full. */
MUST_USE static struct job *job_accept(const struct job_params *p,
    struct api *a, int64_t now)
{
    struct job *old = job_find(p->alias, p->identity[0]);
    if (job_refuses(p) != EV_NONE)
        return NULL;
    int64_t next = 0;
    if (old) {
        if (old->state == J_CONNECTED && sl_eq(p->delay_id,
                (sl){ old->delay_id, old->delay_len }))
            next = old->deadline - old->timeout_ms + LIM_RESTART_MIN_MS;
        job_log(EV_JOB_REPLACED, old, "");
        job_end(old, NULL, now);
    }
    store_forget(p->alias, p->identity[0]);
    struct job *j = job_make(p, a, now);
    if (!j)
        return NULL;
    j->restart_at = next;
    if (j->is_owned)
        job_want(j, WANT_RESTART, next > now ? next : now);
    j->is_late = !rds_is_up(RDS_MAIN);
    job_log(EV_JOB_NEW, j, "");
    job_store(j, ST_NEW);
    job_look(j, CK_WAIT, now);
    job_watch(j);
    return j;
}

/* ---- records in Redis ---- */

static const char store_key[] = "lk-jwt:jobs", store_stream[] =
    "lk-jwt:webhooks", store_replicas[] = "lk-jwt:replicas";

/* Write or, without ARGV[4], delete a record. ARGV[7] `new`: whatever
 * stands there, and tell who has the lease; `late`: unless a delegation
 * that is newer than ARGV[6] stands there. Else: if it is still that of the
 * delayed event ARGV[3] and the lease is ours.
 * Returns 1 done, 0 another delegation replaced it, -1 another replica has
 * it, 2 it was gone or older than ours, and whoever has the lease is told. */
static const char store_script[] =
    "local v=redis.call('HGET',KEYS[1],ARGV[2]) local at,born,id='','' "
    "local function t(s) return type(s)=='string' and s:sub(-1)=='Z' "
    "and s:sub(1,-2) or '' end "
    "if v then local ok,r=pcall(cjson.decode,v) "
    "if ok and type(r)=='table' and type(r.Params)=='table' then "
    "id,at,born=r.Params.DelayId,t(r.RestartedAt),t(r.Params.DelegatedAt) "
    "if born=='' then born=at end end end "
    "local new,same=ARGV[7]~='',v and id==ARGV[3] "
    "local mine=redis.call('GET',KEYS[2])==ARGV[1] "
    "if ARGV[7]=='late' and v and not same and born>=ARGV[6] "
    "then return 0 end "
    "if not new then if v and not same then return 0 end "
    "if ARGV[4]=='' then if not mine then return -1 end "
    "redis.call('HDEL',KEYS[1],ARGV[2]) return 1 end "
    "if not mine and v and (at=='' or at>=ARGV[6]) then return -1 end end "
    "redis.call('HSET',KEYS[1],ARGV[2],ARGV[4]) "
    "if mine and not new then return 1 end "
    "redis.call('XADD',KEYS[3],'MAXLEN','~',ARGV[5],'*','job',ARGV[2],"
    "'record',ARGV[4]) return new and 1 or 2";

enum stored { STORED, STORED_REPLACED, STORED_ELSEWHERE, STORED_NOT };

/* A write ended. */
static void store_ended(struct job *j, enum stored got, int64_t now)
{
    enum store_op op = (enum store_op)j->storing;
    j->storing = ST_NONE;
    bool again = got == STORED_NOT && j->store != ST_DEL
        && (j->store == ST_NONE || op == ST_NEW)
        && (j->state != J_OVER || (op == ST_DEL && !j->is_forgotten));
    if (again)
        j->store = (uint8_t)op;
    j->is_late |= again && op == ST_NEW;
    if (op == ST_NEW)                    /* or it is logged; memory has it */
        job_tell_waiter(j);
    if (j->store) {
        enum store_op next = (enum store_op)j->store;
        j->store = ST_NONE;
        met.gauge[GA_UNSAVED]--;
        job_store(j, next);
    } else {
        met.gauge[GA_UNSAVED]--;
    }
    if (store_cnt)
        loop_wake(KIND_REPLICA, 0);      /* there is room again */
    if (j->state == J_OVER) {
        job_free(j);
    } else if (got == STORED_REPLACED) {
        job_log(EV_JOB_REPLACED, j, "");
        rep.load |= rep.mine & 1ULL << j->shard;     /* by whom? */
        job_end(j, NULL, now);
    } else if (got == STORED_ELSEWHERE
               || (got == STORED && op == ST_NEW && !job_is_mine(j))) {
        job_log(EV_JOB_HANDED, j, "");
        job_end(j, NULL, now);
    }
}

/* Tell, once a connection, that Redis is there and what it is good for. */
static void store_tell_up(void)
{
    const struct chan *ch = rds_pool[RDS_MAIN].chan;
    uint8_t addr[64];
    if (rep.told_serial == rep.serial)
        return;
    rep.told_serial = rep.serial;
    LOG(EV_REDIS_UP, KV("addr", ch && ch->addr.port
            ? text_addr(addr, &ch->addr) : cfg.redis.path),
        KV("mode", store_mode == STORE_SINGLE ? SL("single")
           : SL("replicas")));
}

/* Whether Redis says that it never will: it lacks scripts or streams, its
 * ACL forbids them, or our keys are something else's. Older ones wrap what
 * a script met into an error of their own. */
static bool store_is_never(const struct rsp *e)
{
    static const char *const never[] = { "NOPERM", "WRONGTYPE",
        "unknown command", "unknown subcommand", "Unknown Redis command",
        "not allowed from script", "can't run this command" };
    for (size_t i = 0; e && e->type == RSP_ERROR && i < COUNT_OF(never); i++)
        if (memmem(e->text.p, e->text.len, never[i], strlen(never[i])))
            return true;
    return false;
}

/* Redis was asked what it can do, and refused: all jobs are ours. Later
 * refusals are outages, since other replicas may share on. */
static void store_probed(const struct rsp *e)
{
    if (store_mode != STORE_PROBE || !store_is_never(e))
        return;
    LOG(EV_REDIS_SINGLE, KV("code", rds_code(e)));
    store_mode = STORE_SINGLE;
    store_tell_up();
    rep.load = rep.mine = UINT64_MAX;
    met.gauge[GA_SHARDS] = LIM_SHARD_CNT;
    met.gauge[GA_REPLICAS] = rep.cnt = 1;
    loop_wake(KIND_REPLICA, 0);
}

/* Redis refuses writes for now: a pause. */
static void store_refused(const char *command, const struct rsp *e,
    int64_t now)
{
    rds_log_refused(command, e);
    store_pause_at = now + 1000;
    if (sl_starts(e->text, SL("READONLY")))  /* perhaps another is master */
        rds_pool[RDS_MAIN].fault = "read-only";
}

static void store_done_write(uint16_t idx, const struct rsp *e, int64_t now)
{
    bool ok = e && e->type == RSP_INT;
    if (e && !ok)
        store_refused(job_pool[idx].storing == ST_DEL ? "HDEL" : "HSET", e,
            now);
    store_ended(&job_pool[idx], ok ? STORED : STORED_NOT, now);
}

static void store_done_script(uint16_t idx, const struct rsp *e, int64_t now)
{
    bool ok = e && e->type == RSP_INT;
    if (e && !ok)
        store_refused("EVAL", e, now);
    store_ended(&job_pool[idx], !ok ? STORED_NOT : e->n == 1 ? STORED
        : e->n == 0 ? STORED_REPLACED : STORED_ELSEWHERE, now);
}

static const struct rds_op
    store_op_write = { "HSET", 1, 0, 0, NULL, store_done_write },
    store_op_script = { "EVAL", 1, 0, 0, NULL, store_done_script };

/* The record of a job. The second identity is left out where it would make
 * the value too long to be read again. */
static void job_put_record(const struct job *j, struct bb *b)
{
    struct record r = { .delay_id = { j->delay_id, j->delay_len },
        .server = job_server(j), .alias = { j->alias, HASH_NAME_LEN },
        .identity = { j->id[0], j->id_len[0] },
        .identity2 = { j->id[1], j->is_owned ? 0 : j->id_len[1] },
        .owner = { j->id[1], j->is_owned ? j->id_len[1] : 0 },
        .sid = { j->sid, j->sid_len }, .timeout_ms = j->timeout_ms,
        .is_connected = j->state == J_CONNECTED || j->state == J_LEAVING,
        .delegated_ms = j->accepted_wall_ms,
        .restarted_s = j->restarted_wall_ms / 1000,
        .restarted_ns = (uint32_t)(j->restarted_wall_ms % 1000) * 1000000 };
    rec_put(b, &r);
    if (b->len <= LIM_RECORD_LEN && !b->over)
        return;
    r.identity2.len = 0;
    b->len = 0;
    b->over = false;
    rec_put(b, &r);
}

static sl lease_key(uint8_t buf[24], unsigned shard)
{
    struct bb b = { buf, 0, 24, false };
    bb_str(&b, "lk-jwt:lease:");
    bb_u64(&b, shard);
    return (sl){ buf, b.len };
}

/* Send what Redis has yet to be told of a job; room was asked for. */
static void store_send(struct job *j, int64_t now)
{
    uint8_t field_text[8 * LIM_JOB_ID_LEN], value_text[2 * LIM_RECORD_LEN];
    uint8_t lease[24], len[20], date[40];
    struct bb f = BB(field_text), v = BB(value_text), at = BB(date);
    int64_t wall = j->store == ST_NEW ? j->accepted_wall_ms
        : j->restarted_wall_ms;
    uint16_t idx = (uint16_t)job_idx(j);
    enum store_op op = (enum store_op)j->store;
    rec_put_field(&f, (sl){ j->alias, HASH_NAME_LEN },
        (sl){ j->id[0], j->id_len[0] });
    if (op != ST_DEL)
        job_put_record(j, &v);
    bb_moment_ms(&at, wall);
    sl key = sl_str(store_key), field = { f.p, f.len };
    sl value = { v.p, v.len }, max = text_u64(len, LIM_STREAM_LEN);
    must(!f.over && !v.over);
    j->storing = j->store;
    j->store = ST_NONE;
    if (store_mode != STORE_SHARED) {
        if (op == ST_DEL)
            rds_send(RDS_MAIN, &store_op_write, idx, (sl[]){ SL("HDEL"),
                key, field }, 3, now);
        else
            rds_send(RDS_MAIN, &store_op_write, idx, (sl[]){ SL("HSET"),
                key, field, value }, 4, now);
        return;
    }
    rds_send(RDS_MAIN, &store_op_script, idx, (sl[]){ SL("EVAL"),
        sl_str(store_script), SL("3"), key, lease_key(lease, j->shard),
        sl_str(store_stream), { rep.id, sizeof rep.id }, field,
        { j->delay_id, j->delay_len }, value, max, { date, at.len },
        op != ST_NEW ? SL("") : j->is_late ? SL("late") : SL("new") }, 13,
        now);
}

/* Send as much as there is room for. */
static void store_run(int64_t now)
{
    while (store_cnt && rds_is_up(RDS_MAIN) && now >= store_pause_at
           && store_mode >= STORE_SHARED
           && (store_mode == STORE_SINGLE || now < rep.until)
           && rds_has_room(RDS_MAIN, 16384, 1)) {
        uint16_t idx = store_ring[store_head];
        store_head = (store_head + 1) % LIM_JOB_CNT;
        store_cnt--;
        store_in_ring[idx] = false;
        if (job_pool[idx].store && !job_pool[idx].storing)
            store_send(&job_pool[idx], now);
    }
}

/* Ask whether the lease is still ours, then send. */
static void store_done_lease(uint16_t idx, const struct rsp *e, int64_t now)
{
    struct job *j = &job_pool[idx];
    bool mine = e && e->type == RSP_BULK && j->is_asked
        && sl_eq(e->text, (sl){ rep.id, sizeof rep.id });
    j->is_asking = j->is_asked = false;
    job_free(j);
    if (j->state != J_LEAVING || j->check != CK_SEND || !mine)
        return;                          /* the next look-up asks again */
    j->check = CK_NONE;
    j->send_end = j->send_end < now + 1000 ? now + 1000 : j->send_end;
    job_want(j, WANT_SEND, now);
    job_watch(j);
}

static const struct rds_op store_op_lease = { "GET", 1, 0, 0, NULL,
    store_done_lease };

/* The SFU does not have the participant: the leave may be sent as soon as
 * the lease is confirmed. Without Redis everybody may. */
static void job_may_send(struct job *j, int64_t now)
{
    uint8_t key[24];
    struct rsp mine = { RSP_BULK, 0, { rep.id, sizeof rep.id } };
    if (j->is_asking)                    /* for an older leave */
        return;
    j->is_asked = true;
    j->is_asking = store_mode == STORE_SHARED && !store_is_away(now);
    if (!j->is_asking)
        store_done_lease((uint16_t)job_idx(j), &mine, now);
    else if (!rds_is_up(RDS_MAIN) || !rds_has_room(RDS_MAIN, 256, 1))
        j->is_asking = false;
    else
        rds_send(RDS_MAIN, &store_op_lease, (uint16_t)job_idx(j),
            (sl[]){ SL("GET"), lease_key(key, j->shard) }, 2, now);
}

/* ---- records read ---- */

static struct load_cnt { unsigned restored, expired, bad; } load_cnt;

/* The user of a record, as far as its identities tell: a legacy identity
 * is `@local:server:device`. */
static sl record_user(const struct record *r)
{
    sl id[] = { r->identity2, r->identity };
    if (r->owner.len)
        return r->owner;
    for (size_t i = 0; i < 2; i++) {
        size_t cut = sl_find(id[i], ':');
        sl rest = sl_skip(id[i], cut + 1);
        if (sl_starts(id[i], SL("@")) && sl_starts(rest, r->server)
            && sl_starts(sl_skip(rest, r->server.len), SL(":")))
            return (sl){ id[i].p, cut + 1 + r->server.len };
    }
    return r->identity;
}

static void load_bad(const char *reason)
{
    load_cnt.bad++;
    LOG(EV_REDIS_ENTRY_BAD, KV("reason", sl_str(reason)));
}

/* A record that has expired: delete it, if it still stands. */
static void load_expired(const struct job_params *p, struct api *a,
    int64_t at, int64_t now)
{
    if (store_mode == STORE_SHARED && (rep.cnt > 1 || rep.serial > 1)
        && !rep.is_reload) {             /* a replica may know better */
        rep.reload_at = now + LIM_RECHECK_MS;
        return;
    }
    struct job *j = job_fill(p, a);
    load_cnt.expired++;
    if (!j)
        return;
    j->state = J_OVER;
    j->restarted_wall_ms = at;
    job_store(j, ST_DEL);
}

/* One that was connected when it was written. */
static void job_resume(struct job *j, const struct record *r, int64_t left_ms,
    int64_t now)
{
    j->state = J_CONNECTED;
    j->connected_at = now;
    job_copy(j->sid, &j->sid_len, r->sid);
    j->deadline = now + left_ms;
    j->sanity_at = now + cfg.sanity_s * 1000;
    job_want(j, WANT_RESTART, now);
    job_doubt(j, 0, now);
}

/* Take over a stored job. Nothing is granted that a client could not have
 * now (S19). */
static void load_job(const struct record *r, int64_t now)
{
    struct job_params p = { .alias = r->alias, .identity = { r->identity,
        r->owner.len ? r->owner : r->identity2 }, .server = r->server,
        .delay_id = r->delay_id, .user = record_user(r),
        .timeout_ms = r->timeout_ms, .is_owned = r->owner.len > 0 };
    int64_t wall = io_wall_ms(), at = r->restarted_s > INT32_MAX * 16LL
        ? wall : r->restarted_s * 1000 + r->restarted_ns / 1000000;
    struct job *old = job_find(p.alias, p.identity[0]);
    struct api *a;
    if (at > wall || wall / 1000 < LIM_BUILD_S)
        at = wall;
    if ((old && (old->store == ST_NEW || old->storing == ST_NEW))
        || store_deletes(p.delay_id))
        return;
    if (old && sl_eq(p.delay_id, (sl){ old->delay_id, old->delay_len })) {
        if (old->state == J_CONNECTED && at > old->restarted_wall_ms) {
            old->restarted_wall_ms = at;     /* by a former owner */
            old->deadline = now + at + p.timeout_ms - wall;
            job_watch(old);
        }
        return;
    }
    a = api_find(p.server, now);
    if (!a) {
        load_bad("no room");
        return;
    }
    if (at + r->timeout_ms <= wall) {
        load_expired(&p, a, at, now);
        return;
    }
    if (old) {
        job_log(EV_JOB_REPLACED, old, "");
        job_end(old, NULL, now);
    }
    store_forget(p.alias, p.identity[0]);
    struct job *j = job_make(&p, a, now);
    if (!j) {
        load_bad("no room");
        return;
    }
    load_cnt.restored++;
    j->restarted_wall_ms = at;
    j->accepted_wall_ms = r->delegated_ms ? r->delegated_ms : at;
    if (r->is_connected) {
        job_resume(j, r, at + r->timeout_ms - wall, now);
    } else {
        j->deadline = now + at + r->timeout_ms - wall;
        if (j->is_owned)
            job_want(j, WANT_RESTART, now);
        job_look(j, CK_WAIT, now);
    }
    gone_apply(j, now);
    job_watch(j);
}

/* A field that is not spelled as ours: store the job under the canonical
 * one, whose shard may be another, tell its owner, delete this. */
static void load_rename(sl raw_field, sl field, sl raw_value, int64_t now)
{
    sl key = sl_str(store_key);
    if (!rds_has_room(RDS_MAIN, 6 * LIM_RECORD_LEN, 3))
        return;
    rds_send(RDS_MAIN, &rds_op_ignored, 0, (sl[]){ SL("HSET"), key, field,
        raw_value }, 4, now);
    if (store_mode == STORE_SHARED)
        rds_send(RDS_MAIN, &rds_op_ignored, 0, (sl[]){ SL("XADD"),
            sl_str(store_stream), SL("*"), SL("job"), field, SL("record"),
            raw_value }, 7, now);
    rds_send(RDS_MAIN, &rds_op_ignored, 0, (sl[]){ SL("HDEL"), key,
        raw_field }, 3, now);
}

/* Judge one field and value, and take the job over unless `look` says that
 * this is all. False: they are of no use, which is told. */
static bool load_record(sl raw_field, sl raw_value, bool look, int64_t now)
{
    static uint8_t field[LIM_RECORD_LEN], value[LIM_RECORD_LEN];
    uint8_t own[8 * LIM_JOB_ID_LEN];
    struct bb b = BB(own);
    struct record r;
    if (!raw_field.p || raw_field.len > LIM_RECORD_LEN || !raw_value.p
        || raw_value.len > LIM_RECORD_LEN) {
        load_bad("longer than 4 KB");
        return false;
    }
    memcpy(field, raw_field.p, raw_field.len);
    memcpy(value, raw_value.p, raw_value.len);
    const char *why = rec_parse(field, raw_field.len, value, raw_value.len,
        &r);
    if (!why && r.owner.len && !(cfg.has_as && sl_eq(r.server,
                                                     cfg.hs_name.whole)))
        why = "server is not that of our application service";
    else if (!why && !r.owner.len && !has_full_access(r.server))
        why = "server has no full access";
    if (why)
        load_bad(why);
    if (why || look)
        return !why;
    rec_put_field(&b, r.alias, r.identity);
    bool canonical = sl_eq(raw_field, (sl){ b.p, b.len });
    if (!canonical)
        load_rename(raw_field, (sl){ b.p, b.len }, raw_value, now);
    if (canonical || store_mode == STORE_SINGLE)
        load_job(&r, now);
    return true;
}

static uint8_t load_field[LIM_RECORD_LEN];
static size_t load_field_len;        /* more than fits: too long */

/* Fields and values take turns; those of the given shards are used. */
static void load_take(const struct rsp *e, const unsigned *path,
    unsigned depth, uint64_t shards, int64_t now)
{
    if (depth != 1 || e->type != RSP_BULK)
        return;
    if (path[0] % 2 == 0) {
        load_field_len = e->text.p && e->text.len <= LIM_RECORD_LEN
            ? e->text.len : SIZE_MAX;
        if (load_field_len <= LIM_RECORD_LEN && load_field_len)
            memcpy(load_field, e->text.p, load_field_len);
        return;
    }
    sl field = { load_field, load_field_len };
    if (load_field_len > LIM_RECORD_LEN) {
        load_bad("longer than 4 KB");
        return;
    }
    if (shards >> shard_of(field) & 1)
        (void)load_record(field, e->text, false, now);
}

static void load_item(const struct rsp *e, const unsigned *path,
    unsigned depth, int64_t now)
{
    load_take(e, path, depth, rep.loading & rep.mine, now);
}

/* A field that was noticed, and what stands there now. */
static void notice_item(const struct rsp *e, const unsigned *path,
    unsigned depth, int64_t now)
{
    load_take(e, path, depth, rep.mine, now);
}

/* Notices whose fields are being asked for, where there is room. Without an
 * answer what they say is taken: it may be gone from Redis for good, and who
 * had the delegation relies on us. */
static struct notice {
    bool is_used;
    uint8_t shard;
    uint16_t field_len, value_len;
    uint8_t text[2 * LIM_RECORD_LEN];
} notice_pool[LIM_NOTICE_CNT];

/* idx: of notice_pool, or behind it the shard. */
static void notice_done(uint16_t idx, const struct rsp *e, int64_t now)
{
    struct notice *n = idx < LIM_NOTICE_CNT ? &notice_pool[idx] : NULL;
    uint64_t shard = rep.mine & 1ULL << (n ? n->shard : idx - LIM_NOTICE_CNT);
    if (n && !e && shard)
        (void)load_record((sl){ n->text, n->field_len },
            (sl){ n->text + n->field_len, n->value_len }, false, now);
    if (!e || e->type != RSP_ARRAY)
        rep.load |= shard;
    if (n)
        n->is_used = false;
}

static void load_done(uint16_t idx, const struct rsp *e, int64_t now)
{
    uint8_t num[3][20];
    (void)idx;
    rep.is_loading = false;
    loop_wake(KIND_REPLICA, 0);
    rep.is_reload = false;
    if (e && e->type != RSP_ARRAY)
        rds_log_refused("HGETALL", e);
    if (!e || (e->type != RSP_ARRAY && !store_is_never(e))) {
        rep.load |= rep.loading;         /* again */
        rep.load_at = now + 1000;
        return;
    }
    if (e->type != RSP_ARRAY)
        rep.load = 0;                    /* in vain */
    if (!rep.is_loaded || load_cnt.restored || load_cnt.expired)
        LOG(EV_JOBS_RESTORED, KV("count", text_u64(num[0],
                load_cnt.restored)),
            KV("expired", text_u64(num[1], load_cnt.expired)),
            KV("bad", text_u64(num[2], load_cnt.bad)));
    rep.is_loaded = true;
}

static const struct rds_op
    load_op = { "HGETALL", LIM_LOAD_FACTOR, 0, 0, load_item, load_done },
    notice_op = { "EVAL", 1, 0, 0, notice_item, notice_done };

/* Read the records of the shards that are new here. */
static void load_run(int64_t now)
{
    bool reload = !rep.load && rep.reload_at && now >= rep.reload_at;
    if (!(rep.load || reload) || rep.is_loading || !rds_is_up(RDS_MAIN)
        || now < rep.load_at
        || (store_mode == STORE_SHARED && now >= rep.until)
        || !rds_has_room(RDS_MAIN, 256, 1)
        || store_mode < (rep.is_caught_up ? STORE_SHARED : STORE_SINGLE))
        return;
    load_cnt = (struct load_cnt){ 0 };
    rep.loading = reload ? rep.mine : rep.load;
    rep.load = 0;
    rep.is_loading = true;
    rep.is_reload = reload;
    if (reload)
        rep.reload_at = 0;
    rds_send(RDS_MAIN, &load_op, 0, (sl[]){ SL("HGETALL"),
        sl_str(store_key) }, 2, now);
}

/* ---- webhooks, ours and the stream's ---- */

/* Webhooks seen in the last LIM_SEEN_MS, 4-way sets: the same event again
 * has the same answer and no effect. */
static struct memo seen_cache[LIM_SEEN_CNT];

/* Whether a body, its event's id in it, was seen; with `mark` it counts as
 * seen from now on. */
static bool webhook_seen(const uint8_t body_sum[32], bool mark, int64_t now)
{
    uint64_t key = memo_key('w', (sl){ body_sum, 32 });
    bool seen = memo_holds(seen_cache, LIM_SEEN_CNT, key, now);
    if (mark && !seen)
        memo_make(seen_cache, LIM_SEEN_CNT, key, now)->at = now + LIM_SEEN_MS;
    return seen;
}

/* Let a verified webhook act, once. req: of the request it came by; mark:
 * as seen, but for one that others must still get. */
static void webhook_act(const struct webhook *w, const uint8_t sum[32],
    sl req, bool mark, int64_t wall_ms, int64_t now)
{
    if (w->id.len && webhook_seen(sum, mark, now)) {
        LOG(EV_WEBHOOK_DUPLICATE, KV("req", req));
        return;
    }
    LOG(EV_WEBHOOK, KV("req", req), KV("kind", w->event));
    job_webhook(w, wall_ms, now);
}

/* One webhook of the stream: others may write there, so it is judged as if
 * it came from the network. */
static void stream_webhook(sl token, sl body, int64_t wall_ms, int64_t now)
{
    struct webhook w;
    uint8_t sum[32], want[36];
    const char *why = body.p ? jwt_check_webhook(token, cfg.key, cfg.key_cnt,
        io_wall_ms() / 1000, want) : "body too long";
    if (!why) {
        sha256(body, sum);
        if (!ct_eq(sum, want, 32))
            why = "body hash";
    }
    if (!why && !webhook_parse((uint8_t *)(uintptr_t)body.p, body.len, &w))
        why = "body";
    if (why)
        LOG(EV_WEBHOOK_BAD, KV("source", SL("stream")),
            KV("reason", sl_str(why)));
    else
        webhook_act(&w, sum, (sl){ NULL, 0 }, true, wall_ms, now);
}

static bool place_is_after(struct place a, struct place b)
{
    return a.ms > b.ms || (a.ms == b.ms && a.seq > b.seq);
}

/* Parse a stream id, `ms-seq`. */
MUST_USE static bool place_parse(sl s_raw, struct place *out)
{
    size_t cut = sl_find(s_raw, '-');
    return sl_u64((sl){ s_raw.p, cut }, INT64_MAX, &out->ms)
        && sl_u64(sl_skip(s_raw, cut + 1), INT64_MAX, &out->seq);
}

/* A notice of a delegation, for whoever has its shard: what stands in the
 * hash now counts, since the notice of one that has ended may come late.
 * One that was there when the shard's records were read is stale. */
static void stream_job(sl field, sl value, struct place at, int64_t now)
{
    unsigned shard = shard_of(field);
    if (!(rep.mine >> shard & 1) || !place_is_after(at, rep.from[shard]))
        return;
    bool can_ask = rds_is_up(RDS_MAIN)
        && rds_has_room(RDS_MAIN, field.len + 512, 1);
    if (!load_record(field, value, can_ask, now) || !can_ask)
        return;
    uint16_t i = 0;
    while (i < LIM_NOTICE_CNT && notice_pool[i].is_used)
        i++;
    if (i < LIM_NOTICE_CNT) {
        struct notice *n = &notice_pool[i];
        n->is_used = true;
        n->shard = (uint8_t)shard;
        n->field_len = (uint16_t)field.len;
        n->value_len = (uint16_t)value.len;
        memcpy(n->text, field.p, field.len);
        memcpy(n->text + field.len, value.p, value.len);
    } else {
        i = (uint16_t)(i + shard);
    }
    rds_send(RDS_MAIN, &notice_op, i, (sl[]){ SL("EVAL"),
        SL("return {ARGV[1],redis.call('HGET',KEYS[1],ARGV[1])}"),
        SL("1"), sl_str(store_key), field }, 5, now);
}

/* The entry of the stream that is being read: its first value. */
static struct {
    struct place at;
    uint8_t key;                     /* t j: name of the first; else 0 */
    uint8_t next;                    /* first letter of the value to come */
    bool is_used;
    size_t len;
    uint8_t text[LIM_RECORD_LEN];
} stream_entry;
static unsigned stream_cnt;

/* The entry is complete. */
static void stream_next(void)
{
    if (!stream_entry.is_used)
        LOG(EV_WEBHOOK_BAD, KV("source", SL("stream")),
            KV("reason", SL("neither webhook nor delegation")));
    rep.last = stream_entry.at;
}

/* XREAD: streams, of them name and entries, of them id and fields. */
static void stream_item(const struct rsp *e, const unsigned *path,
    unsigned depth, int64_t now)
{
    if (depth == 4 && path[3] == 0) {
        if (stream_cnt++)
            stream_next();
        stream_entry.key = stream_entry.next = 0;
        stream_entry.is_used = false;
        if (e->type != RSP_BULK || !place_parse(e->text, &stream_entry.at))
            rds_pool[RDS_STREAM].fault = "malformed stream id";
    }
    if (depth != 5 || e->type != RSP_BULK)
        return;
    if (path[4] % 2 == 0) {
        stream_entry.next = sl_eq(e->text, SL("token")) ? 't'
            : sl_eq(e->text, SL("body")) ? 'b'
            : sl_eq(e->text, SL("job")) ? 'j'
            : sl_eq(e->text, SL("record")) ? 'r' : 0;
        return;
    }
    bool fits = e->text.p && e->text.len <= sizeof stream_entry.text;
    if (path[4] == 1) {
        stream_entry.key = fits ? stream_entry.next : 0;
        stream_entry.len = fits ? e->text.len : 0;
        if (stream_entry.len)
            memcpy(stream_entry.text, e->text.p, stream_entry.len);
    } else if (path[4] == 3 && stream_entry.key == 't'
               && stream_entry.next == 'b') {
        stream_entry.is_used = true;
        stream_webhook((sl){ stream_entry.text, stream_entry.len }, e->text,
            (int64_t)stream_entry.at.ms, now);
    } else if (path[4] == 3 && stream_entry.key == 'j'
               && stream_entry.next == 'r') {
        stream_entry.is_used = true;
        stream_job((sl){ stream_entry.text, stream_entry.len }, e->text,
            stream_entry.at, now);
    }
}

static void stream_done(uint16_t idx, const struct rsp *e, int64_t now)
{
    (void)idx;
    (void)now;
    rep.is_reading = false;
    loop_wake(KIND_REPLICA, 0);
    if (!e) {                            /* the last may be cut: again, */
        if (stream_cnt && rds_pool[RDS_STREAM].is_garbled)
            rep.last = stream_entry.at;  /* but not one that is garbage */
        stream_cnt = 0;
        return;
    }
    if (e->type == RSP_ERROR) {
        rds_log_refused("XREAD", e);
        rds_pool[RDS_STREAM].fault = "XREAD refused";
        return;
    }
    if (stream_cnt)
        stream_next();
    rep.is_caught_up |= stream_cnt < LIM_STREAM_CNT;
    stream_cnt = 0;
}

static const struct rds_op stream_op = { "XREAD", 1, LIM_BLOCK_MS,
    LIM_HUGE_LEN, stream_item, stream_done };

/* Read on. It waits for events once all older ones were read. */
static void stream_run(int64_t now)
{
    uint8_t text[48], num[2][20];
    struct bb b = BB(text);
    if (store_mode != STORE_SHARED || rep.is_reading || rep.last.ms == 0
        || !rds_is_up(RDS_STREAM) || !rds_has_room(RDS_STREAM, 512, 1))
        return;
    bb_u64(&b, rep.last.ms);
    bb_byte(&b, '-');
    bb_u64(&b, rep.last.seq);
    sl word[] = { SL("XREAD"), SL("COUNT"),
        text_u64(num[0], LIM_STREAM_CNT), SL("BLOCK"),
        text_u64(num[1], LIM_BLOCK_MS), SL("STREAMS"), sl_str(store_stream),
        { text, b.len } };
    if (!rep.is_caught_up) {             /* leave BLOCK out */
        memmove(&word[3], &word[5], 3 * sizeof word[0]);
        rds_send(RDS_STREAM, &stream_op, 0, word, 6, now);
    } else {
        rds_send(RDS_STREAM, &stream_op, 0, word, 8, now);
    }
    rep.is_reading = true;
}

/* Whether webhooks go by the stream. */
static bool stream_is_shared(void)
{
    return store_mode == STORE_SHARED && rds_is_up(RDS_MAIN);
}

/* ---- leases ---- */

/* Renew what is ours, give KEYS[..]ARGV[3] away, take what is free up to a
 * fair share (the first by id have one more where 64 does not divide).
 * ARGV[2] `go`: give all away. Returns live replicas, Redis' time, the
 * stream's last id, when the next foreign lease may end, how many leases
 * were renewed, our share, then the shards: renewed ones, then new ones. */
static const char rep_script[] =
    "local t=redis.call('TIME') "
    "local now=t[1]*1000+math.floor(t[2]/1000) "
    "local me,go=ARGV[1],ARGV[2]=='go' "
    "if go then redis.call('ZREM',KEYS[1],me) "
    "else redis.call('ZADD',KEYS[1],now,me) end "
    "redis.call('ZREMRANGEBYSCORE',KEYS[1],'-inf',now-ARGV[4]) "
    "local n=redis.call('ZCARD',KEYS[1]) "
    "local own,free,soon={},{},ARGV[4]*1 "
    "for s=0,63 do local k='lk-jwt:lease:'..s "
    "local v=redis.call('GET',k) "
    "if v==me and (go or ARGV[3]==tostring(s)) then redis.call('DEL',k) "
    "elseif v==me then redis.call('PEXPIRE',k,ARGV[4]) own[#own+1]=s "
    "elseif not v then free[#free+1]=s "
    "else soon=math.min(soon,math.max(redis.call('PTTL',k),0)) end end "
    "local kept,all=#own,redis.call('ZRANGE',KEYS[1],0,-1) "
    "local share=math.floor(64/math.max(n,1)) "
    "local odd=64-share*n "
    "for i=1,#all do if all[i]<me then odd=odd-1 end end "
    "if odd>0 then share=share+1 end "
    "if not go then "
    "for i=1,math.min(#free,share-kept) do local s=free[i] "
    "redis.call('SET','lk-jwt:lease:'..s,me,'PX',ARGV[4]) own[#own+1]=s "
    "end end "
    "local last=redis.call('XREVRANGE',KEYS[2],'+','-','COUNT',1) "
    "local r={n,string.format('%.0f',now),last[1] and last[1][1] or '0-0',"
    "soon,kept,share} "
    "for i=1,#own do r[#r+1]=own[i] end return r";

/* A tick's answer, as it comes in. */
static struct {
    int64_t cnt, soon, kept, share;
    uint64_t renewed, taken;
    struct place now, last;
    bool is_bad, is_last;            /* last: gives all leases away */
} tick;

static void rep_item(const struct rsp *e, const unsigned *path,
    unsigned depth, int64_t now)
{
    (void)now;
    unsigned i = path[0];
    if (depth != 1)
        return;
    if (i == 1)
        tick.is_bad |= e->type != RSP_BULK
            || !sl_u64(e->text, INT64_MAX, &tick.now.ms);
    else if (i == 2)
        tick.is_bad |= e->type != RSP_BULK
            || !place_parse(e->text, &tick.last);
    else if (e->type != RSP_INT || e->n < 0)
        tick.is_bad = true;
    else if (i == 0)
        tick.cnt = e->n;
    else if (i == 3)
        tick.soon = e->n;
    else if (i == 4)
        tick.kept = e->n;
    else if (i == 5)
        tick.share = e->n;
    else if (e->n >= LIM_SHARD_CNT)
        tick.is_bad = true;
    else if (i - 6 < (uint64_t)tick.kept)
        tick.renewed |= 1ULL << e->n;
    else
        tick.taken |= 1ULL << e->n;
}

/* Another Redis, or one that forgot: write all again, believe nothing. */
static void rep_changed(int64_t now)
{
    if (!rep.changed_at || now - rep.changed_at >= LIM_RECHECK_MS)
        LOG0(EV_REDIS_CHANGED);          /* not twice for one change */
    rep.changed_at = now;
    rep.last.ms = 0;                     /* set by the next tick */
    for (size_t i = 0; i < job_top; i++)
        if (job_pool[i].state != J_FREE && job_pool[i].state != J_OVER) {
            job_store(&job_pool[i], ST_SET);
            job_doubt(&job_pool[i], LIM_RECHECK_MS, now);
        }
}

/* Let go of the jobs of these shards. Of those that Redis has yet to be
 * told of, and of all after a change of Redis, the new owner is told. */
static void rep_drop(uint64_t shards, int64_t now)
{
    bool changed = rep.changed_at && now - rep.changed_at < LIM_RECHECK_MS;
    for (size_t i = 0; shards && i < job_top; i++) {
        struct job *j = &job_pool[i];
        if (j->state == J_FREE || j->state == J_OVER
            || !(shards >> j->shard & 1) || j->store == ST_NEW
            || j->storing == ST_NEW)
            continue;
        if (changed || j->store || j->storing) {
            job_store(j, ST_SET);        /* its write ends it */
            continue;
        }
        job_log(EV_JOB_HANDED, j, "");
        job_end(j, NULL, now);
    }
}

static int64_t bits_in(uint64_t v)
{
    int64_t n = 0;
    for (; v; v &= v - 1)
        n++;
    return n;
}

/* Use a tick's answer. */
static void rep_leases(int64_t now)
{
    uint8_t num[2][20];
    uint64_t own = tick.renewed | tick.taken, before = rep.mine;
    bool is_early = now < rep.until + LIM_LEASE_MS / 3;
    if (tick.taken & before || (is_early && before & ~own))
        rep_changed(now);                /* a lease was gone before its time */
    rep_drop(before & ~own, now);
    rep.given &= ~own;
    for (unsigned s = 0; s < LIM_SHARD_CNT; s++)
        if (rep.given >> s & 1
            && rep.sent_at - rep.given_at[s] >= 2 * LIM_TICK_MS) {
            rep.given &= ~(1ULL << s);
            rep_drop(1ULL << s, now);
        }
    rep.good_at = rep.sent_at;
    rep.is_told = false;
    rep.until = rep.sent_at + LIM_LEASE_MS * 2 / 3;
    rep.has_slept = false;
    rep.mine = own;
    uint64_t fresh = tick.taken | (own & ~before);
    rep.load = (rep.load & own) | fresh;
    rep.loading &= own;
    for (unsigned s = 0; s < LIM_SHARD_CNT; s++)
        if (fresh >> s & 1)
            rep.from[s] = tick.last;
    rep.cnt = tick.cnt;
    rep.share = tick.share;
    if (rep.last.ms == 0)
        rep.last.ms = tick.now.ms > LIM_GONE_MS ? tick.now.ms - LIM_GONE_MS
            : 1;
    if (tick.soon < LIM_TICK_MS && rep.tick_at > now + tick.soon + 20)
        rep.tick_at = now + tick.soon + 20;
    met.gauge[GA_REPLICAS] = rep.cnt;
    met.gauge[GA_SHARDS] = bits_in(own);
    if (own != before)
        LOG(EV_SHARDS, KV("held", text_u64(num[0], (uint64_t)bits_in(own))),
            KV("replicas", text_u64(num[1], (uint64_t)rep.cnt)));
}

static void rep_done(uint16_t idx, const struct rsp *e, int64_t now)
{
    (void)idx;
    rep.is_ticking = false;
    loop_wake(KIND_REPLICA, 0);
    store_probed(e);
    if (!e || store_mode == STORE_SINGLE)
        return;
    if (e->type != RSP_ARRAY || tick.is_bad) {
        store_refused("EVAL", e, now);
        rep.tick_at = now + 1000;
        return;
    }
    rep.has_left = tick.is_last;
    if (tick.is_last)
        return;
    store_mode = STORE_SHARED;
    store_tell_up();
    rep_leases(now);
    rds_start(RDS_STREAM, now);
}

static const struct rds_op rep_op = { "EVAL", 1, 0, 0, rep_item, rep_done };

/* A shard to give away: one of too many, none of whose jobs Redis has yet
 * to be told of. Its jobs stay until another must have taken it. */
static void rep_give(int64_t now)
{
    uint64_t busy = 0;
    rep.release = -1;
    if (bits_in(rep.mine) <= rep.share || rep.is_loading || rep.load)
        return;
    for (size_t i = 0; i < job_top; i++)
        if (job_pool[i].state != J_FREE
            && (job_pool[i].store || job_pool[i].storing))
            busy |= 1ULL << job_pool[i].shard;
    for (int s = 0; s < LIM_SHARD_CNT && rep.release < 0; s++)
        if (rep.mine >> s & ~busy >> s & 1)
            rep.release = s;
    if (rep.release < 0)
        return;
    rep.mine &= ~(1ULL << rep.release);
    rep.given |= 1ULL << rep.release;
    rep.given_at[rep.release] = now;
}

/* Renew the leases. */
static void rep_tick(int64_t now)
{
    uint8_t shard[20], ttl[20];
    if (rep.is_ticking || now < rep.tick_at || store_mode == STORE_SINGLE
        || !rds_is_up(RDS_MAIN) || !rds_has_room(RDS_MAIN, 4096, 1))
        return;
    rep_give(now);
    memset(&tick, 0, sizeof tick);
    tick.is_last = rep.is_leaving;
    rep.is_ticking = true;
    rep.sent_at = now;
    rep.tick_at = now + (rep.release < 0 ? LIM_TICK_MS : LIM_SHARE_MS);
    rds_send(RDS_MAIN, &rep_op, 0, (sl[]){ SL("EVAL"), sl_str(rep_script),
        SL("2"), sl_str(store_replicas), sl_str(store_stream),
        { rep.id, sizeof rep.id }, rep.is_leaving ? SL("go") : SL("stay"),
        rep.release < 0 ? SL("none") : text_u64(shard,
            (uint64_t)rep.release), text_u64(ttl, LIM_LEASE_MS) }, 9, now);
}

/* INFO server: whose Redis this is. */
static void rep_done_info(uint16_t idx, const struct rsp *e, int64_t now)
{
    sl text = e ? e->text : (sl){ NULL, 0 }, line, id = { NULL, 0 };
    (void)idx;
    while (e && e->type == RSP_BULK && sl_word(&text, "\r\n", &line))
        if (sl_starts(line, SL("run_id:")))
            id = sl_skip(line, 7);
    if (!e || id.len > sizeof rep.run_id)
        return;
    bool same = id.len && sl_eq(id, (sl){ rep.run_id, rep.run_id_len });
    if (rep.serial > 1 && !same)
        rep_changed(now);
    rep.run_id_len = id.len;
    if (id.len)
        memcpy(rep.run_id, id.p, id.len);
}

static void rep_done_probe(uint16_t idx, const struct rsp *e, int64_t now)
{
    (void)idx;
    (void)now;
    store_probed(e);
}

static const struct rds_op
    rep_op_info = { "INFO", 1, 0, 0, NULL, rep_done_info },
    rep_op_probe = { "XADD", 1, 0, 0, NULL, rep_done_probe };

/* Redis is there, perhaps again. What happened meanwhile went past. */
static void rep_connected(int64_t now)
{
    rep.serial = rds_pool[RDS_MAIN].serial;
    rep.tick_at = now;
    rep.until = 0;                       /* nothing is ours until it says so */
    store_pause_at = now;
    if (store_mode == STORE_SINGLE)
        store_tell_up();
    rds_send(RDS_MAIN, &rep_op_info, 0, (sl[]){ SL("INFO"), SL("server") },
        2, now);
    if (store_mode == STORE_PROBE) {     /* 0-0 is never taken */
        rds_send(RDS_MAIN, &rep_op_probe, 0, (sl[]){ SL("XADD"),
            sl_str(store_stream), SL("0-0"), SL("a"), SL("b") }, 5, now);
        rds_send(RDS_MAIN, &rep_op_probe, 0, (sl[]){ SL("XREAD"),
            SL("COUNT"), SL("1"), SL("STREAMS"), sl_str(store_stream),
            SL("$") }, 6, now);
    }
    for (size_t i = 0; rep.serial > 1 && rep.cnt > 1 && i < job_top; i++)
        job_doubt(&job_pool[i], LIM_RECHECK_MS, now);
}

/* Redis is away for good: every job may act, and no waiter waits. */
static void rep_away(int64_t now)
{
    for (size_t i = 0; i < job_top; i++) {
        struct job *j = &job_pool[i];
        j->is_late |= j->store == ST_NEW || j->storing == ST_NEW;
        job_tell_waiter(j);
        if (!rep.is_told && store_is_away(now))
            loop_wake(KIND_JOB, i);
    }
    rep.is_told |= store_is_away(now);
}

/* All that concerns Redis and the other replicas, after a wake or a time. */
static enum step rep_step(size_t idx, int revents, int64_t now)
{
    const struct rds *main = &rds_pool[RDS_MAIN];
    int64_t at = INT64_MAX;
    (void)idx;
    (void)revents;
    if (store_mode == STORE_NONE)        /* --check */
        return STEP_WAIT;
    if (now - rep.awake_at >= LIM_SLEEP_MS) {
        rep.has_slept = rep.awake_at > 0;
        rep.good_at = now;
        rep.until = 0;
    }
    rep.awake_at = now;
    if (main->state == RD_UP) {
        if (rep.serial != main->serial && rds_has_room(RDS_MAIN, 512, 3))
            rep_connected(now);
        rep_tick(now);
        load_run(now);
        store_run(now);
        at = store_mode != STORE_SINGLE && !rep.is_ticking ? rep.tick_at
            : at;
        int64_t later[] = { store_cnt ? store_pause_at : 0,
            rep.load ? rep.load_at : 0, rep.reload_at };
        for (size_t i = 0; i < COUNT_OF(later); i++)
            if (later[i] > now && later[i] < at)
                at = later[i];
    }
    if (main->state != RD_UP || store_is_away(now)) {
        rep_away(now);
        at = rep.is_told ? at : rep.good_at + LIM_OUTAGE_MS;
    }
    stream_run(now);
    if (store_mode == STORE_SHARED && at > now + LIM_SLEEP_MS / 2)
        at = now + LIM_SLEEP_MS / 2;     /* shows that we run */
    loop_set(KIND_REPLICA, 0, -1, 0, at);
    return STEP_WAIT;
}

/* Whether all that is stored was taken over, and what expired deleted. */
static bool rep_is_ready(void)
{
    return (store_mode == STORE_SINGLE ? rep.is_loaded
            : store_mode == STORE_SHARED && rep.is_caught_up)
        && !rep.is_loading && rep.load == 0 && met.gauge[GA_UNSAVED] == 0;
}

/* We are about to stop: restarts that are due soon come now. */
static void job_stop(int64_t now)
{
    for (size_t i = 0; i < job_top; i++) {
        struct job *j = &job_pool[i];
        struct job_hot *h = &job_hot[i];
        if (!job_restarts(j) || h->is_out || !job_may_restart(j, now)
            || j->restart_at > now + LIM_STOP_RESTART_MS)
            continue;
        h->is_last = true;
        job_want(j, WANT_RESTART, now);
    }
}

/* Whether nothing is left to do for jobs before we stop. */
static bool job_is_settled(int64_t now)
{
    for (size_t i = 0; i < job_top; i++)
        if (job_hot[i].is_used && (job_hot[i].is_last || job_hot[i].is_out))
            return false;
    if (store_mode < STORE_SHARED)
        return true;
    if (met.gauge[GA_UNSAVED] || !rds_is_up(RDS_MAIN))
        return !met.gauge[GA_UNSAVED];
    if (store_mode == STORE_SINGLE || rep.has_left)
        return true;
    if (!rep.is_leaving) {
        rep.is_leaving = true;
        rep.tick_at = now;
        loop_wake(KIND_REPLICA, 0);
    }
    return false;
}


/* ==== 21a APPSERVICE =============== PART II: MACHINES ================
 * Purpose  What we ask the homeserver whose application service we are:
 *          who is joined to a room (MSC4502), to pass a request on to
 *          another homeserver (MSC4512), a user's delayed event (MSC4140);
 *          and who on the SFU is not in the Matrix room any more.
 * Trust    The homeserver of LIVEKIT_HS_SERVER_NAME is the operator's: what
 *          it says of rooms and users is so. Its replies are bounded.
 * Limits   LIM_INQ_*, LIM_MEMBER_*, LIM_SEAT_*, LIM_AS_CNT.
 * INV-A1   Joined is what the homeserver says in so many words; all that is
 *          no answer grants nothing and removes nobody.
 * INV-A2   Our token goes to the API of LIVEKIT_HS_SERVER_NAME only, and
 *          unencrypted only to a URL that the operator wrote.
 *
 * row state      waits for                success       failure, timeout
 * A1  I_WAIT     base URL, or a slot      A2            A3
 * A2  I_OUT      the call                 A3            A1 in another form, A3
 * A3  I_DONE     -                        who asked reads and closes
 */
enum inq_kind { INQ_USER, INQ_SERVER, INQ_RELAY, INQ_DELAYED, INQ_PING,
    INQ_LOOP };
enum inq_state { I_FREE, I_WAIT, I_OUT, I_DONE };
enum inq_answer { INQ_UNKNOWN, INQ_NO, INQ_YES };    /* YES: see its reply */

/* How each is asked: the path before the first argument, as the MSC has it
 * in the end and as homeservers have it until then; what stands before the
 * second; what it means when there is no such path, and when it is denied. */
static const struct inq_row {
    const char *name, *path[2], *tail;   /* path: unstable, stable */
    bool is_post;
    const char *lack, *denied;
} inq_tab[] = {
    [INQ_USER] = { "is_joined",
        { "/_matrix/client/unstable/io.element.msc4502/rooms/",
          "/_matrix/client/v3/rooms/" }, "/is_joined?user_id=", false,
        "no MSC4502 (Synapse: experimental_features: msc4502_enabled): "
        "membership cannot be checked, nobody gets a token",
        "the registration lacks the scope of is_joined" },
    [INQ_SERVER] = { "is_joined",
        { "/_matrix/client/unstable/io.element.msc4502/rooms/",
          "/_matrix/client/v3/rooms/" }, "/is_joined?server_name=", false,
        "no MSC4502 (Synapse: experimental_features: msc4502_enabled): "
        "membership cannot be checked, nobody gets a token",
        "the registration lacks the scope of is_joined" },
    [INQ_RELAY] = { "fed_proxy",
        { "/_matrix/client/unstable/io.element.msc4512/appservice/fed_proxy",
          "/_matrix/client/v1/appservice/fed_proxy" }, "", true,
        "no MSC4512 (Synapse: experimental_features: msc4512_enabled): "
        "other homeservers' SFUs cannot be reached", NULL },
    [INQ_DELAYED] = { "delayed_events",
        { "/_matrix/client/unstable/org.matrix.msc4140/delayed_events/",
          "/_matrix/client/v1/delayed_events/" }, "?user_id=", false,
        "no MSC4140: delayed events cannot be looked up",
        "the user is not in the registration's namespaces" },
    [INQ_PING] = { "ping", { "/_matrix/client/v1/appservice/", NULL },
        "/ping", true, "no such endpoint", NULL },
    [INQ_LOOP] = { "proxy",
        { "/_matrix/client/unstable/io.element.msc4195/rtc/livekit/get_token",
          "/_matrix/client/v1/rtc/livekit/get_token" }, "", true,
        "requests are not passed on to us: no MSC4512, or no proxy_prefix "
        "rtc/livekit in the registration", NULL },
};

/* What a reply says; slices borrow from the call. */
struct inq_reply {
    sl errcode, delay_id, room_id, jwt, inner_errcode;
    struct js_int delay_ms, delay, status;
    int8_t joined;                   /* -1: not said */
    bool is_read;                    /* it is the JSON expected */
};

/* One question. Equal ones about members are one.
 * owner:    inq_pool
 * lifetime: inq_open to the inq_close of the last who asked */
static struct inquiry {
    enum inq_state state;
    enum inq_kind kind;
    enum inq_answer answer;
    enum event why;                  /* of INQ_UNKNOWN */
    const char *hint;                /* for the operator, or NULL */
    unsigned status;                 /* 0: no reply */
    struct inq_reply reply;          /* of INQ_YES; unused for members */
    bool is_stable, is_mxid;         /* the form it is asked in */
    bool is_switched, is_renamed;    /* other path, other name was tried */
    bool is_foreign;                 /* only other homeservers wait for it */
    uint16_t user_cnt;               /* who wait for it, or read it */
    uint16_t api, body_idx;
    void (*build_body)(uint16_t body_idx, struct bb *b);     /* NULL: {} */
    uint64_t key, number;            /* key: of members; order of opening */
    uint64_t dest;                   /* of a relay */
    struct up *up;
    int64_t end;
    sl arg[2];                       /* borrowed from the first who asked */
} inq_pool[LIM_INQ_CNT];
static uint64_t inq_number;

/* The form that was last understood. */
static struct { bool is_stable, is_mxid; } inq_form[COUNT_OF(inq_tab)];

/* Members: `at` is until when it is known, cnt whether joined. */
static struct memo member_cache[LIM_MEMBER_CNT];

static void exchange_wake_inquiry(size_t inq);
static void seat_wake_inquiry(size_t inq);

static size_t inq_idx(const struct inquiry *q)
{
    return (size_t)(q - inq_pool);
}

static bool inq_is_member(enum inq_kind kind)
{
    return kind == INQ_USER || kind == INQ_SERVER;
}

static uint64_t member_key(enum inq_kind kind, sl room, sl who)
{
    uint8_t sum[32], k = kind == INQ_USER ? 'U' : 'S';
    sl part[] = { { &k, 1 }, room, who };
    hash_keyed(part, COUNT_OF(part), sum);
    return be64(sum);
}

/* What is remembered of a member. */
static enum inq_answer member_known(enum inq_kind kind, sl room, sl who,
    int64_t now)
{
    const struct memo *m = memo_find(member_cache, LIM_MEMBER_CNT,
        member_key(kind, room, who));
    return !m || m->at <= now ? INQ_UNKNOWN : m->cnt ? INQ_YES : INQ_NO;
}

static void inq_build(uint16_t idx, struct bb *b)
{
    static uint8_t text[LIM_SCRATCH_LEN / 2];
    const struct inquiry *q = &inq_pool[idx];
    const struct inq_row *row = &inq_tab[q->kind];
    const struct api *a = &api_pool[q->api];
    struct bb body = BB(text);
    if (row->is_post && q->build_body)
        q->build_body(q->body_idx, &body);
    else if (row->is_post)
        bb_str(&body, "{}");
    b->over |= body.over;
    bb_str(b, row->is_post ? "POST " : "GET ");
    bb_put(b, a->url.path);
    bb_str(b, row->path[q->is_stable]);
    bb_percent(b, q->arg[0]);
    bb_str(b, q->is_mxid ? "/is_joined?mxid=" : row->tail);
    bb_percent(b, q->arg[1]);
    api_put_rest(b, a, true, row->is_post, (sl){ text, body.len });
}

static void inq_watch(const struct inquiry *q)
{
    loop_set(KIND_INQUIRY, inq_idx(q), -1, 0, q->state == I_WAIT ? q->end
        : INT64_MAX);
}

/* Whether a question has to leave the slots to others: those of other
 * homeservers have half of them, relays a third, of one server a few. */
static bool inq_must_wait(const struct inquiry *q)
{
    size_t far = 0, relays = 0, same = 0;
    for (size_t i = 0; i < LIM_INQ_CNT; i++) {
        const struct inquiry *p = &inq_pool[i];
        if (p->state != I_OUT)
            continue;
        far += p->is_foreign;
        relays += p->kind == INQ_RELAY;
        same += p->kind == INQ_RELAY && p->dest == q->dest;
    }
    return (q->is_foreign && far >= LIM_AS_CNT / 2)
        || (q->kind == INQ_RELAY && (relays >= LIM_AS_CNT / 3
                                     || same >= LIM_AS_CNT / 6));
}

/* Whether enough relays wait already, of all or of one server. */
static bool inq_relay_is_full(uint64_t dest)
{
    size_t all = 0, same = 0;
    for (size_t i = 0; i < LIM_INQ_CNT; i++) {
        const struct inquiry *p = &inq_pool[i];
        bool relay = p->state != I_FREE && p->kind == INQ_RELAY;
        all += relay;
        same += relay && p->dest == dest;
    }
    return all >= LIM_INQ_CNT / 3 || same >= LIM_INQ_CNT / 6;
}

/* A slot is free, or the base URL known: the oldest who waits. */
static void inq_wake_next(void)
{
    const struct inquiry *best = NULL;
    for (size_t i = 0; i < LIM_INQ_CNT; i++)
        if (inq_pool[i].state == I_WAIT
            && (!best || inq_pool[i].number < best->number)
            && !inq_must_wait(&inq_pool[i]))
            best = &inq_pool[i];
    if (best)
        loop_wake(KIND_INQUIRY, inq_idx(best));
}

static void inq_drop_up(struct inquiry *q, int64_t now)
{
    if (!q->up)
        return;
    up_close(q->up, now);
    q->up = NULL;
    inq_wake_next();
}

static void inq_done(struct inquiry *q, enum inq_answer answer,
    enum event why, int64_t now)
{
    const struct up *u = q->up;
    uint8_t addr[64], num[20];
    bool failed = u && u->state == UP_FAILED;
    if (answer == INQ_UNKNOWN || q->hint)
        LOG(EV_AS_CALL_FAILED, KV("call", sl_str(inq_tab[q->kind].name)),
            KV("server", cfg.hs_name.whole),
            KV("reason", sl_str(why ? event_tab[why].label : "")),
            KV("step", failed ? sl_str(u->step) : (sl){ NULL, 0 }),
            KV("addr", u && u->has_addr ? text_addr(addr, &u->addr)
                                        : (sl){ NULL, 0 }),
            KV("status", q->status ? text_u64(num, q->status)
                                   : (sl){ NULL, 0 }),
            KV("errcode", log_errcode(q->reply.errcode)),
            KV("hint", sl_str(q->hint)));
    q->answer = answer;
    q->why = why;
    q->state = I_DONE;
    if (inq_is_member(q->kind) || answer == INQ_UNKNOWN)
        inq_drop_up(q, now);
    if (!u)                              /* a wake it had no use for */
        inq_wake_next();
    inq_watch(q);
    exchange_wake_inquiry(inq_idx(q));
    seat_wake_inquiry(inq_idx(q));
}

/* Make the call, as soon as it can be made. */
static void inq_start(struct inquiry *q, int64_t now)
{
    struct api *a = api_find(cfg.hs_name.whole, now);
    enum res got = a ? api_resolve(a, now) : RES_FAILED;
    size_t from = LIM_UP_CNT + LIM_SFU_CNT - LIM_AS_CNT;
    q->state = I_WAIT;
    if (got == RES_FAILED) {
        inq_done(q, INQ_UNKNOWN, EV_API_UNKNOWN, now);
        return;
    }
    if (now >= q->end) {
        inq_done(q, INQ_UNKNOWN, EV_WAIT_TIMEOUT, now);
        return;
    }
    if (inq_must_wait(q)) {
        inq_watch(q);
        return;
    }
    /* a relay fails with the server that a user named, not with ours */
    bool counts = q->kind != INQ_RELAY && q->kind != INQ_LOOP;
    if (got == RES_OK && counts && breaker_refuses(&a->breaker, now)) {
        inq_done(q, INQ_UNKNOWN, EV_BREAKER_OPEN, now);
        return;
    }
    if (got == RES_OK) {
        struct up_call c = api_call(a, KIND_INQUIRY, inq_idx(q),
            TL_HOMESERVER, q->end);
        c.build = inq_build;
        c.breaker = counts ? c.breaker : NULL;
        q->api = (uint16_t)api_idx(a);
        q->up = up_open(&c, from, from + LIM_AS_CNT, now);
        if (q->up)
            q->state = I_OUT;
    }
    inq_watch(q);
}

/* What is wrong with a homeserver that replies so, if it is plain. */
static const char *inq_hint(const struct inquiry *q)
{
    const struct inq_row *row = &inq_tab[q->kind];
    bool inner = q->kind == INQ_LOOP;        /* the reply may be our own */
    if (sl_eq(q->reply.errcode, SL("M_UNRECOGNIZED")))
        return row->lack;
    if (q->status == 401 && !inner)
        return "LIVEKIT_AS_TOKEN is not accepted: is the registration loaded, "
            "and the token the same?";
    return q->status == 403 ? row->denied : NULL;
}

static void inq_parse(struct inquiry *q, struct up *u)
{
#define AT(member) offsetof(struct inq_reply, member)
    static const struct js_field inner_field[] = {
        { "jwt", JS_STRING, AT(jwt), NULL },
        { "errcode", JS_STRING, AT(inner_errcode), NULL } };
    static const struct js_table inner = { inner_field, 2, false, false };
    static const struct js_field field[] = {
        { "errcode", JS_STRING, AT(errcode), NULL },
        { "joined", JS_TRUTH, AT(joined), NULL },
        { "delay_id", JS_STRING, AT(delay_id), NULL },
        { "room_id", JS_STRING, AT(room_id), NULL },
        { "delay_ms", JS_INT, AT(delay_ms), NULL },
        { "delay", JS_INT, AT(delay), NULL },
        { "status", JS_INT, AT(status), NULL },
        { "content", JS_OBJECT, 0, &inner } };       /* a relay's only */
    static const struct js_table tab = { field, 7, false, false },
        relay = { field, 8, false, false };
#undef AT
    q->reply = (struct inq_reply){ .joined = -1 };
    q->status = u->head.status;
    if (js_parse(up_body(u), u->intake.len, q->kind == INQ_RELAY ? &relay
                 : &tab, &q->reply))
        q->reply = (struct inq_reply){ .joined = -1 };
    else
        q->reply.is_read = true;
}

/* The call ended: in another form where the homeserver knows none of this,
 * else that was the answer. */
static void inq_ended(struct inquiry *q, int64_t now)
{
    struct up *u = q->up;
    if (u->state == UP_FAILED) {
        inq_done(q, INQ_UNKNOWN, u->why, now);
        return;
    }
    inq_parse(q, u);
    bool unknown = sl_eq(q->reply.errcode, SL("M_UNRECOGNIZED"));
    if (unknown && !q->is_switched && inq_tab[q->kind].path[1]) {
        q->is_switched = true;
        q->is_stable = !q->is_stable;
    } else if (q->kind == INQ_USER && !q->is_renamed && !unknown
               && (q->status == 400 || q->status == 403)) {
        /* where `user_id` is no parameter yet it is taken for the user that
         * we speak for: 403 for one of another server */
        q->is_renamed = true;
        q->is_mxid = !q->is_mxid;
    } else {
        if (!unknown && q->status != 400) {
            inq_form[q->kind].is_stable = q->is_stable;
            inq_form[q->kind].is_mxid = q->is_mxid;
        }
        q->hint = inq_hint(q);
        if (!inq_is_member(q->kind)) {
            inq_done(q, INQ_YES, EV_NONE, now);
        } else if (q->status != 200 || q->reply.joined < 0) {
            inq_done(q, INQ_UNKNOWN, q->status == 200 ? EV_REPLY_JSON
                : EV_REPLY_STATUS, now);
        } else {
            struct memo *m = memo_make(member_cache, LIM_MEMBER_CNT, q->key,
                now);
            m->at = now + LIM_MEMBER_MS;
            m->cnt = q->reply.joined == 1;
            inq_done(q, m->cnt ? INQ_YES : INQ_NO, EV_NONE, now);
        }
        return;
    }
    inq_drop_up(q, now);
    inq_start(q, now);
}

/* Ask, or join who asks the same about a member. The arguments must live
 * until it is answered, and nobody who asked goes before that. A body is
 * built when the call is made. NULL: too many questions. */
static struct inquiry *inq_open(enum inq_kind kind, sl first, sl second,
    int64_t end)
{
    uint64_t key = member_key(kind, first, second);
    struct inquiry *q = NULL;
    for (size_t i = LIM_INQ_CNT; i-- > 0; ) {
        struct inquiry *p = &inq_pool[i];
        if (inq_is_member(kind) && p->kind == kind && p->key == key
            && (p->state == I_WAIT || p->state == I_OUT)) {
            p->user_cnt++;
            return p;
        }
        if (p->state == I_FREE)
            q = p;
    }
    if (!q)
        return NULL;
    memset(q, 0, sizeof *q);
    q->kind = kind;
    q->key = key;
    q->number = ++inq_number;
    q->user_cnt = 1;
    q->end = end;
    q->is_stable = inq_form[kind].is_stable;
    q->is_mxid = inq_form[kind].is_mxid;
    q->arg[0] = first;
    q->arg[1] = second;
    q->state = I_WAIT;
    loop_wake(KIND_INQUIRY, inq_idx(q));
    return q;
}

/* One who asked has read the answer, or does not want it. */
static void inq_close(struct inquiry *q, int64_t now)
{
    if (--q->user_cnt > 0)
        return;
    inq_drop_up(q, now);
    q->state = I_FREE;
    inq_watch(q);
}

static enum step inq_step(size_t idx, int revents, int64_t now)
{
    struct inquiry *q = &inq_pool[idx];
    (void)revents;
    if (q->state == I_OUT && up_has_ended(q->up))
        inq_ended(q, now);
    else if (q->state == I_WAIT)
        inq_start(q, now);
    return STEP_WAIT;
}

/* ---- seats: who may be on the SFU by a token of ours -------------------
 * Each is looked at every LIVEKIT_MEMBERSHIP_CHECK_INTERVAL_SECONDS, and
 * when it joins; LIM_SEAT_CALLS of them at once.
 *
 * row state      waits for             yes          no           unknown
 * T1  S_LOOK     SFU: is it there      T2           done, or     T2
 *                                                   seat is free
 * T2  S_MEMBER   homeserver: joined    done         soon again,  done
 *                                                   then T3
 * T3  S_REMOVE   SFU: remove it        done         done         soon again
 * A "no" of T2 counts when it was said twice: a worker of the homeserver may
 * lag behind a join. A seat outlives its token and what LiveKit refreshed of
 * it: a user who was removed and comes back is removed again.
 */
enum seat_state { S_FREE, S_LOOK, S_MEMBER, S_REMOVE };
static struct seat {
    uint8_t alias[HASH_NAME_LEN], identity[HASH_NAME_LEN];
} seat_pool[LIM_SEAT_CNT];

/* What scans over all seats read; index as seat_pool. */
static struct seat_hot {
    uint64_t key;                    /* of alias and identity */
    int64_t at, until;               /* next look; may be used until then */
    uint32_t user, server;           /* hashes */
    uint16_t piece;                  /* where room and user stand, side */
    uint8_t room_len, user_len;      /* by side */
    bool is_used, is_busy, is_foreign;
    bool is_again;                   /* joined while it was looked at */
    bool is_doubted;                 /* is said to have left, once */
} seat_hot[LIM_SEAT_CNT];
static size_t seat_top;              /* above the highest seat in use */
static uint8_t seat_text[LIM_PIECE_CNT * LIM_PIECE_LEN];
static bool seat_piece[LIM_PIECE_CNT];       /* in use */

static struct seat_check {
    enum seat_state state;
    uint16_t seat;
    struct up *up;
    struct inquiry *inq;
} seat_check_pool[LIM_SEAT_CALLS];

enum { SEAT_CLOCK = LIM_SEAT_CALLS, SEAT_PROBE, SEAT_OBJECTS };

/* How long a first "no" waits for the second. */
static int64_t seat_doubt_ms(void)
{
    return cfg.member_ms < 4 * LIM_SEAT_RETRY_MS ? cfg.member_ms / 4
        : LIM_SEAT_RETRY_MS;
}

/* From look to look: both answers come within the interval. */
static int64_t seat_wait_ms(void)
{
    return cfg.member_ms - seat_doubt_ms();
}

static uint64_t seat_key(sl alias, sl identity)
{
    return gone_hash(alias, identity);
}

static size_t seat_pieces(const struct seat_hot *h)
{
    return ((size_t)h->room_len + h->user_len + LIM_PIECE_LEN - 1)
        / LIM_PIECE_LEN;
}

static uint8_t *seat_ids(const struct seat_hot *h)
{
    return seat_text + (size_t)h->piece * LIM_PIECE_LEN;
}

static sl seat_room(const struct seat_hot *h)
{
    return (sl){ seat_ids(h), h->room_len };
}

static sl seat_user(const struct seat_hot *h)
{
    return (sl){ seat_ids(h) + h->room_len, h->user_len };
}

static void seat_mark(const struct seat_hot *h, bool used)
{
    memset(seat_piece + h->piece, used, seat_pieces(h));
}

/* Find room for a seat's ids. False: there is none. */
MUST_USE static bool seat_place(struct seat_hot *h)
{
    size_t run = 0, need = seat_pieces(h);
    for (size_t i = 0; i < LIM_PIECE_CNT; i++) {
        run = seat_piece[i] ? 0 : run + 1;
        if (run == need) {
            h->piece = (uint16_t)(i + 1 - need);
            return true;
        }
    }
    return false;
}

/* A participant that a token is about to be signed for; ids are checked. */
struct seat_params { sl alias, identity, room, user, server;
    bool is_foreign; };

/* Watch one more. False: there are too many. */
MUST_USE static bool seat_take(const struct seat_params *p, int64_t now)
{
    struct seat_hot new = { .is_used = true, .is_foreign = p->is_foreign,
        .key = seat_key(p->alias, p->identity),
        .user = (uint32_t)dest_hash(p->user),
        .server = (uint32_t)dest_hash(p->server),
        .room_len = (uint8_t)p->room.len, .user_len = (uint8_t)p->user.len,
        .at = now + seat_wait_ms(),
        .until = now + LIM_SEAT_KEPT_MS };
    size_t same = 0, near = 0, far = 0, at = seat_top;
    size_t near_text = seat_pieces(&new), far_text = near_text;
    if (cfg.member_ms == 0)
        return true;
    for (size_t i = seat_top; i-- > 0; ) {
        struct seat_hot *h = &seat_hot[i];
        if (h->is_used && h->key == new.key) {
            h->until = new.until > h->until ? new.until : h->until;
            return true;
        }
        same += h->is_used && h->user == new.user;
        at = h->is_used ? at : i;
        if (!h->is_used || !h->is_foreign)
            continue;
        bool is_near = h->server == new.server;
        far++;
        near += is_near;
        far_text += seat_pieces(h);
        near_text += is_near ? seat_pieces(h) : 0;
    }
    if (at == LIM_SEAT_CNT || same >= LIM_SEAT_USER || (p->is_foreign
            && (near >= LIM_SEAT_SERVER || far >= LIM_SEAT_CNT / 2
                || near_text > LIM_PIECE_CNT / 4
                || far_text > LIM_PIECE_CNT / 2))
        || !seat_place(&new))
        return false;
    seat_top += at == seat_top;
    seat_hot[at] = new;
    seat_mark(&new, true);
    memcpy(seat_ids(&new), p->room.p, p->room.len);
    memcpy(seat_ids(&new) + p->room.len, p->user.p, p->user.len);
    memcpy(seat_pool[at].alias, p->alias.p, HASH_NAME_LEN);
    memcpy(seat_pool[at].identity, p->identity.p, HASH_NAME_LEN);
    met.gauge[GA_SEATS]++;
    loop_wake(KIND_SEAT, SEAT_CLOCK);
    return true;
}

static void seat_free(size_t i)
{
    seat_mark(&seat_hot[i], false);
    seat_hot[i] = (struct seat_hot){ .is_used = false };
    met.gauge[GA_SEATS]--;
    while (seat_top && !seat_hot[seat_top - 1].is_used)
        seat_top--;
}

/* A webhook says that a participant joined: is it one of ours, look now. */
static void seat_joined(sl alias, sl identity, int64_t now)
{
    uint64_t key = seat_top ? seat_key(alias, identity) : 0;
    for (size_t i = 0; i < seat_top; i++)
        if (seat_hot[i].is_used && seat_hot[i].key == key) {
            seat_hot[i].at = now;
            seat_hot[i].is_again = seat_hot[i].is_busy;
            loop_wake(KIND_SEAT, SEAT_CLOCK);
        }
}

static void seat_build(uint16_t idx, struct bb *b, const char *method)
{
    const struct seat *s = &seat_pool[seat_check_pool[idx].seat];
    uint8_t text[2 * HASH_NAME_LEN + 8];
    struct bb body = BB(text);
    sl alias = { s->alias, HASH_NAME_LEN };
    pb_participant(&body, alias, (sl){ s->identity, HASH_NAME_LEN });
    lk_put(b, method, alias, (sl){ text, body.len }, (sl){ NULL, 0 });
}

static void seat_build_look(uint16_t idx, struct bb *b)
{
    seat_build(idx, b, "GetParticipant");
}

static void seat_build_remove(uint16_t idx, struct bb *b)
{
    seat_build(idx, b, "RemoveParticipant");
}

/* This look is over; the seat's next one is in wait_ms. */
static void seat_done(struct seat_check *c, int64_t wait_ms, int64_t now)
{
    struct seat_hot *h = &seat_hot[c->seat];
    c->state = S_FREE;
    h->at = h->is_again ? now : now + wait_ms;
    h->is_busy = h->is_again = false;
    loop_wake(KIND_SEAT, SEAT_CLOCK);
}

/* A call to the SFU is over; a job may wait for its slot. */
static void seat_close(struct seat_check *c, int64_t now)
{
    up_close(c->up, now);
    c->up = NULL;
    look_wake_next();
}

/* Ask the SFU. False: not now; it is tried again. */
MUST_USE static bool seat_call(struct seat_check *c, enum seat_state state,
    int64_t now)
{
    size_t i = (size_t)(c - seat_check_pool);
    c->state = state;
    c->up = breaker_refuses(&lk_breaker, now) ? NULL
        : lk_open(KIND_SEAT, (uint16_t)i, state == S_LOOK ? seat_build_look
                  : seat_build_remove, now + LIM_RPC_MS, now);
    if (!c->up)
        seat_done(c, LIM_SEAT_RETRY_MS, now);
    return c->up != NULL;
}

static void seat_ask(struct seat_check *c, int64_t now)
{
    const struct seat_hot *h = &seat_hot[c->seat];
    c->state = S_MEMBER;
    c->inq = inq_open(INQ_USER, seat_room(h), seat_user(h),
        now + LIM_INQ_MS);
    if (!c->inq) {
        seat_done(c, LIM_SEAT_RETRY_MS, now);
        return;
    }
    c->inq->is_foreign = false;
    loop_wake(KIND_INQUIRY, inq_idx(c->inq));
}

/* The SFU said whether it is there. */
static void seat_looked(struct seat_check *c, int64_t now)
{
    const struct seat *s = &seat_pool[c->seat];
    struct seat_hot *h = &seat_hot[c->seat];
    sl sid;
    enum presence p = lk_presence(c->up, (sl){ s->identity, HASH_NAME_LEN },
        &sid);
    if (p == UNKNOWN)
        lk_log(c->up, (sl){ NULL, 0 });
    seat_close(c, now);
    if (p == PRESENT && h->until < now + LIM_SEAT_KEPT_MS)
        h->until = now + LIM_SEAT_KEPT_MS;
    if (p != ABSENT) {
        seat_ask(c, now);
    } else if (now > h->until && !h->is_again) {
        c->state = S_FREE;
        seat_free(c->seat);
        loop_wake(KIND_SEAT, SEAT_CLOCK);
    } else {
        seat_done(c, seat_wait_ms(), now);
    }
}

static void seat_asked(struct seat_check *c, int64_t now)
{
    struct seat_hot *h = &seat_hot[c->seat];
    enum inq_answer a = c->inq->answer;
    inq_close(c->inq, now);
    c->inq = NULL;
    bool again = a == INQ_NO && h->is_doubted;
    h->is_doubted = a == INQ_NO || (a == INQ_UNKNOWN && h->is_doubted);
    if (again)
        (void)!seat_call(c, S_REMOVE, now);
    else
        seat_done(c, a == INQ_NO ? seat_doubt_ms() : seat_wait_ms(), now);
}

static void seat_removed(struct seat_check *c, int64_t now)
{
    bool gone = c->up->state == UP_DONE && c->up->head.status == 200;
    bool absent = !gone && c->up->state == UP_DONE
        && sl_eq(lk_code(c->up), SL("not_found"));
    if (gone)
        LOG(EV_SEAT_REMOVED, KV("user", seat_user(&seat_hot[c->seat])),
            KV("room", ((sl){ seat_pool[c->seat].alias, HASH_NAME_LEN })));
    else if (!absent)
        lk_log(c->up, (sl){ NULL, 0 });
    seat_close(c, now);
    seat_done(c, gone || absent ? seat_wait_ms() : LIM_SEAT_RETRY_MS, now);
}

/* Start looking at what is due, as far as that is allowed at once: who was
 * not reached goes first the next time, when a look is over. */
static void seat_run(int64_t now)
{
    static size_t turn;
    int64_t next = INT64_MAX;
    size_t k = 0, first = turn;
    for (size_t n = 0; n < seat_top; n++) {
        size_t i = (first + n) % seat_top;
        struct seat_hot *h = &seat_hot[i];
        if (!h->is_used || h->is_busy)
            continue;
        while (h->at <= now && k < LIM_SEAT_CALLS
               && seat_check_pool[k].state != S_FREE)
            k++;
        if (h->at <= now && k < LIM_SEAT_CALLS) {
            seat_check_pool[k].seat = (uint16_t)i;
            h->is_busy = true;
            (void)!seat_call(&seat_check_pool[k], S_LOOK, now);
            turn = i + 1;
        }
        if (h->at > now && h->at < next)
            next = h->at;
    }
    loop_set(KIND_SEAT, SEAT_CLOCK, -1, 0, next);
}

/* ---- the first contact: is the homeserver what the mode needs? */
static struct {
    struct inquiry *inq;
    int64_t at;
    int32_t wait_ms;
    bool is_joined_ok;               /* the second question is next */
} as_probe;

/* Ask about a room that nobody has, then for a relay of nothing. Told once
 * it is well, and each time that it is plain why it is not. */
static void probe_step(int64_t now)
{
    struct inquiry *q = as_probe.inq;
    if (q && q->state != I_DONE)
        return;
    if (q) {
        bool ok = q->answer != INQ_UNKNOWN && !q->hint
            && (inq_is_member(q->kind) || q->status == 400);
        if (q->hint)
            LOG(EV_AS_LACKS, KV("server", cfg.hs_name.whole),
                KV("detail", sl_str(q->hint)));
        inq_close(q, now);
        as_probe.inq = NULL;
        as_probe.at = now;
        if (ok && as_probe.is_joined_ok) {
            LOG(EV_AS_READY, KV("server", cfg.hs_name.whole));
            return;
        }
        as_probe.is_joined_ok = ok;
        if (!ok) {
            as_probe.wait_ms = as_probe.wait_ms ? as_probe.wait_ms * 2
                : LIM_PROBE_MS;
            if (as_probe.wait_ms > LIM_API_BAD_MS * 10)
                as_probe.wait_ms = LIM_API_BAD_MS * 10;
            as_probe.at = now + as_probe.wait_ms;
        }
    }
    if (now >= as_probe.at) {
        static uint8_t text[LIM_NAME_LEN + 8];
        struct bb b = BB(text);
        bb_str(&b, "!lkjwt:");
        bb_put(&b, cfg.hs_name.whole);
        as_probe.inq = as_probe.is_joined_ok
            ? inq_open(INQ_RELAY, SL(""), SL(""), now + LIM_INQ_MS)
            : inq_open(INQ_SERVER, (sl){ text, b.len }, cfg.hs_name.whole,
                       now + LIM_INQ_MS);
        as_probe.at = now + LIM_PROBE_MS;
    }
    loop_set(KIND_SEAT, SEAT_PROBE, -1, 0, as_probe.inq ? INT64_MAX
        : as_probe.at);
}

static void seat_wake_inquiry(size_t inq)
{
    for (size_t i = 0; i < LIM_SEAT_CALLS; i++)
        if (seat_check_pool[i].inq == &inq_pool[inq])
            loop_wake(KIND_SEAT, i);
    if (as_probe.inq == &inq_pool[inq])
        loop_wake(KIND_SEAT, SEAT_PROBE);
}

static enum step seat_step(size_t idx, int revents, int64_t now)
{
    (void)revents;
    if (idx == SEAT_CLOCK) {
        seat_run(now);
    } else if (idx == SEAT_PROBE) {
        probe_step(now);
    } else {
        struct seat_check *c = &seat_check_pool[idx];
        if (c->state == S_MEMBER && c->inq->state == I_DONE)
            seat_asked(c, now);
        else if (c->state == S_LOOK && up_has_ended(c->up))
            seat_looked(c, now);
        else if (c->state == S_REMOVE && up_has_ended(c->up))
            seat_removed(c, now);
    }
    return STEP_WAIT;
}

/* ==== 22 SERVER ==================== PART II: MACHINES ================
 * Purpose  Client connections, routes, and the token exchange.
 * Trust    Clients are anyone; nothing they send is believed before the
 *          homeserver has vouched for the user (exchange_verified), or is
 *          the one who asks (as_is_homeserver).
 * Limits   LIM_CONN_CNT and the client-side numbers of section 02.
 * INV-V1   One request of a connection is served at a time, in order.
 * INV-V2   Connection i serves exchange i; its buffers outlive it.
 *
 * row state      waits for  limit      success        failure, timeout
 * C1  C_HEAD     POLLIN     10 s, 650 s idle  C2      408 or silent close
 * C2  C_BODY     POLLIN     15 s       C3, C4         408
 * C3  C_WAIT     exchange   -          C4             -
 * C4  C_WRITE    POLLOUT    10 s       C1, C5, close  close
 * C5  C_LINGER   POLLIN     2 s, 64 KB close          close
 */

enum conn_state { C_FREE, C_HEAD, C_BODY, C_WAIT, C_WRITE, C_LINGER };

struct route;

/* One client connection; bulk in arrays of its own.
 * owner:    conn_pool; only conn_close() closes fd
 * lifetime: accept to conn_close */
struct conn {
    enum conn_state state;
    int fd;                          /* -1: the client left while waiting */
    bool is_keep, is_eof, is_refused;
    uint16_t code;                   /* of the reply */
    size_t in_len, in_top, head_len; /* in_top: bytes not yet wiped */
    size_t out_off, out_len;
    uint8_t out_big;                 /* pending reply in a big buffer */
    uint8_t req_len, req[LIM_REQUEST_ID_LEN];
    const struct route *route;       /* NULL: no such path */
    struct ip client;
    bool is_proxy;                   /* peer is in LKJWT_TRUSTED_PROXIES, or */
                                     /* behind a socket of the file system */
    bool has_client;                 /* client is known: it is counted */
    struct h1_head head;
    struct intake body;
    size_t discarded;
    int64_t end, since, begin_us;
};
static struct conn conn_pool[LIM_SLOT_CNT];
static uint8_t conn_in[LIM_SLOT_CNT][LIM_IN_LEN];
static uint8_t conn_out[LIM_SLOT_CNT][LIM_OUT_LEN];

enum { M_GET = 1, M_HEAD = 2, M_POST = 4, M_OPTIONS = 8, M_OTHER = 16,
    M_ANY = 31 };

/* Whose requests a route takes: anyone's; or only the homeserver's, which
 * passes on its users', other homeservers', or its own. */
enum route_for { FOR_ANYONE, FOR_USER, FOR_SERVER, FOR_HOMESERVER };

/* An endpoint is a row. start answers, or leaves the connection in C_WAIT. */
static const struct route {
    const char *path, *allow;
    uint8_t methods;
    bool is_json;                    /* JSON endpoint: its errors are, too */
    size_t body_cap;                 /* POST; 0: LKJWT_MAX_BODY */
    bool is_metrics;                 /* on the metrics listener instead */
    enum route_label label;
    void (*start)(struct conn *c, int64_t now);
    enum route_for who;
    uint8_t endpoint;                /* of a token request: enum endpoint */
} route_tab[];

/* Whether a route is there, as the operator has it. */
static bool route_is_on(const struct route *r)
{
    return r->who != FOR_ANYONE ? cfg.has_as : !(r->is_json && cfg.only_as);
}

static size_t conn_idx(const struct conn *c)
{
    return (size_t)(c - conn_pool);
}

static bool conn_is_lane(const struct conn *c)
{
    size_t i = conn_idx(c);
    return i >= (size_t)cfg.max_conns && i < LIM_CONN_CNT + LIM_LANE_CNT;
}

static bool conn_is_metrics(const struct conn *c)
{
    return conn_idx(c) >= LIM_CONN_CNT + LIM_LANE_CNT;
}

static void conn_watch(struct conn *c)
{
    int want = 0;
    switch (c->state) {
    case C_HEAD:
    case C_BODY:   want = c->is_eof ? 0 : POLLIN; break;
    case C_LINGER: want = POLLIN; break;
    case C_WRITE:  want = POLLOUT; break;
    case C_WAIT:
    case C_FREE:   break;
    }
    loop_set(KIND_CONN, conn_idx(c), c->fd, want, c->end);
}

/* Forget the request, the token in it first (T30); what lies behind it in
 * the buffer moves to its front. */
static void conn_forget(struct conn *c, size_t used)
{
    uint8_t *in = conn_in[conn_idx(c)];
    memmove(in, in + used, c->in_len - used);
    c->in_len -= used;
    wipe(in + c->in_len, c->in_top - c->in_len);
    c->in_top = c->in_len;
    if (c->body.big)
        wipe(big_buf(c->body.big), c->body.len);
    big_free(&c->body.big);
}

static void conn_close(struct conn *c)
{
    if (c->state == C_FREE)
        return;
    io_close(&c->fd);
    conn_forget(c, c->in_len);
    big_free(&c->out_big);
    c->state = C_FREE;
    loop_set(KIND_CONN, conn_idx(c), -1, 0, INT64_MAX);
    met.gauge[GA_CONNECTIONS]--;
}

/* Ready for the next request; what of it has arrived stays. */
static void conn_next(struct conn *c, int64_t now)
{
    conn_forget(c, c->head_len + (c->body.big ? 0 : c->body.len));
    c->is_keep = c->is_refused = false;
    c->has_client = c->has_client && !c->is_proxy;
    c->body = (struct intake){ 0 };
    c->head = (struct h1_head){ 0 };
    c->head_len = 0;
    c->route = NULL;
    c->req_len = 0;
    c->state = C_HEAD;
    c->since = now;
    c->end = now + (c->in_len ? LIM_HEAD_MS : cfg.keepalive_ms);
    if (c->in_len || c->is_eof)
        loop_wake(KIND_CONN, conn_idx(c));
    conn_watch(c);
}

/* The reply is written. */
static void conn_written(struct conn *c, int64_t now)
{
    big_free(&c->out_big);
    if (c->is_keep) {
        conn_next(c, now);
        return;
    }
    if (!c->is_refused && c->body.is_done
        && c->in_len == c->head_len + (c->body.big ? 0 : c->body.len)) {
        conn_close(c);
        return;
    }
    io_shutdown(c->fd);
    c->state = C_LINGER;
    c->discarded = 0;
    c->end = now + LIM_LINGER_MS;
    conn_watch(c);
}

/* Write a finished reply; what the socket does not take is kept. */
static void conn_send(struct conn *c, sl text, int64_t now)
{
    size_t idx = conn_idx(c);
    if (c->fd < 0) {                     /* the client left meanwhile */
        conn_close(c);
        return;
    }
    ssize_t n = io_write(c->fd, text);
    if (n == -EAGAIN)
        n = 0;
    if (n < 0) {
        conn_close(c);
        return;
    }
    text = sl_skip(text, (size_t)n);
    if (text.len == 0) {
        conn_written(c, now);
        return;
    }
    if (text.len > LIM_OUT_LEN && (c->out_big = big_take(LIM_BIG_LEN)) == 0) {
        LOG0(EV_BODY_POOL);
        conn_close(c);
        return;
    }
    memcpy(c->out_big ? big_buf(c->out_big) : conn_out[idx], text.p,
        text.len);
    c->out_off = 0;
    c->out_len = text.len;
    c->state = C_WRITE;
    c->end = now + LIM_WRITE_MS;
    conn_watch(c);
}

static const char *status_text(unsigned code)
{
    static const struct { uint16_t code; const char *text; } tab[] = {
        { 200, "OK" }, { 400, "Bad Request" }, { 401, "Unauthorized" },
        { 403, "Forbidden" }, { 404, "Not Found" },
        { 405, "Method Not Allowed" },
        { 408, "Request Timeout" }, { 413, "Content Too Large" },
        { 414, "URI Too Long" }, { 417, "Expectation Failed" },
        { 429, "Too Many Requests" },
        { 431, "Request Header Fields Too Large" },
        { 500, "Internal Server Error" }, { 501, "Not Implemented" },
        { 502, "Bad Gateway" },
        { 503, "Service Unavailable" },
        { 505, "HTTP Version Not Supported" },
    };
    for (size_t i = 0; i < COUNT_OF(tab); i++)
        if (tab[i].code == code)
            return tab[i].text;
    return "";
}

/* The Date field's value, made once a second. */
static sl http_date(void)
{
    static uint8_t text[32];
    static int64_t made;
    static size_t len;
    int64_t wall = io_wall_ms() / 1000;
    if (wall != made) {
        struct bb b = BB(text);
        bb_http_date(&b, wall);
        len = b.len;
        made = wall;
    }
    return (sl){ text, len };
}

/* A reply: status, extra header lines (each with CRLF), body. */
struct answer { unsigned code; const char *extra; sl body; };

/* Write the whole reply. Extra fields come from tables, never from input;
 * the request id is in its own alphabet (INV-T1, S12). */
static void conn_answer(struct conn *c, const struct answer *a, int64_t now)
{
    struct bb b = BB(scratch);
    sl text;
    bool is_head = sl_eq(h1_slice((sl){ conn_in[conn_idx(c)], c->in_len },
        c->head.method), SL("HEAD"));
    bool json = c->route && c->route->is_json;
    c->code = (uint16_t)a->code;
    c->is_keep = c->is_keep && !srv_stopping && !conn_is_lane(c)
        && h1_keeps(&c->head);
    bb_str(&b, "HTTP/1.1 ");
    bb_u64(&b, a->code);
    bb_byte(&b, ' ');
    bb_str(&b, status_text(a->code));
    bb_str(&b, "\r\nDate: ");
    bb_put(&b, http_date());
    if (json)
        bb_str(&b, "\r\nContent-Type: application/json");
    if (json && c->route->who <= FOR_USER)
        bb_str(&b, "\r\nAccess-Control-Allow-Origin: *"
            "\r\nAccess-Control-Allow-Methods: POST"
            "\r\nAccess-Control-Allow-Headers: Accept, Content-Type, "
            "Content-Length, Accept-Encoding, X-CSRF-Token");
    if (c->req_len) {
        bb_str(&b, "\r\nX-Request-Id: ");
        bb_put(&b, (sl){ c->req, c->req_len });
    }
    if (!c->is_keep)
        bb_str(&b, "\r\nConnection: close");
    bb_str(&b, "\r\nContent-Length: ");
    bb_u64(&b, a->body.len);
    bb_str(&b, "\r\n");
    bb_str(&b, a->extra);
    bb_str(&b, "\r\n");
    if (!is_head)
        bb_put(&b, a->body);
    if (!bb_finish(&b, &text)) {
        LOG0(EV_BUG_OVERFLOW);
        c->is_keep = false;
        text = SL("HTTP/1.1 500 Internal Server Error\r\n"
            "Connection: close\r\nContent-Length: 0\r\n\r\n");
    }
    enum route_label label = c->route ? c->route->label : RL_OTHER;
    int64_t us = io_now_us() - c->begin_us;
    met.request[label][met_code(a->code)]++;
    met_observe(&met.request_time[label], us);
    if (label != RL_HEALTHZ && label != RL_METRICS
        && log_wanted(EV_REQUEST)) {
        uint8_t code[20], took[20];
        LOG(EV_REQUEST, KV("req", ((sl){ c->req, c->req_len })),
            KV("path", h1_path(h1_slice(
                (sl){ conn_in[conn_idx(c)], c->in_len }, c->head.target))),
            KV("status", text_u64(code, a->code)),
            KV("us", text_u64(took, (uint64_t)us)));
    }
    conn_send(c, text, now);
}

/* A JSON error. `field` stands in for a row without text. */
static void conn_error(struct conn *c, enum reply re, const char *text,
    int64_t now)
{
    const struct reply_row *row = &reply_tab[re];
    uint8_t body[256];
    struct bb b = BB(body);
    bb_str(&b, "{\"errcode\":");
    js_put_str(&b, sl_str(row->errcode), false);
    bb_str(&b, ",\"error\":");
    js_put_str(&b, sl_str(row->text ? row->text : text), false);
    if (row->http == 429)
        bb_str(&b, ",\"retry_after_ms\":2000");
    bb_byte(&b, '}');
    conn_answer(c, &(struct answer){ row->http,
        row->http == 429 || row->http == 503 ? "Retry-After: 2\r\n" : "",
        { body, b.len } }, now);
}

/* Status of a framing failure. */
static unsigned framing_code(enum event ev)
{
    switch ((int)ev) {
    case EV_H1_VERSION: return 505;
    case EV_H1_LINE_LONG: return 414;
    case EV_HEAD_LIMIT:
    case EV_H1_TRAILER: return 431;
    case EV_H1_CODING_UNKNOWN: return 501;
    case EV_H1_EXPECT: return 417;
    case EV_SLOW_HEAD:
    case EV_SLOW_BODY: return 408;
    case EV_CONN_FULL: return 503;
    default: return 400;
    }
}

/* Refuse what is no request we can read on from: plain text, then close. */
static void conn_refuse(struct conn *c, enum event ev, int64_t now)
{
    uint8_t body[192];
    struct bb b = BB(body);
    LOG(ev, KV("req", ((sl){ c->req, c->req_len })));
    bb_str(&b, event_tab[ev].text);
    bb_byte(&b, '\n');
    c->route = NULL;
    c->is_keep = false;
    c->is_refused = true;
    conn_answer(c, &(struct answer){ framing_code(ev),
        "Content-Type: text/plain; charset=utf-8\r\n"
        "X-Content-Type-Options: nosniff\r\n", { body, b.len } }, now);
}

/* The route of a path: runs of `/` count as one, the prefix may lead. */
static const struct route *route_find(sl path, bool is_metrics)
{
    uint8_t text[LIM_LINE_LEN];
    struct bb b = BB(text);
    for (size_t i = 0; i < path.len; i++)
        if (path.p[i] != '/' || i == 0 || path.p[i - 1] != '/')
            bb_byte(&b, path.p[i]);
    sl plain = { text, b.len };
    if (cfg.prefix.len && sl_starts(plain, cfg.prefix)
        && plain.len > cfg.prefix.len && plain.p[cfg.prefix.len] == '/')
        plain = sl_skip(plain, cfg.prefix.len);
    for (const struct route *r = route_tab; r->path; r++)
        if (r->is_metrics == is_metrics && route_is_on(r)
            && sl_eq(plain, sl_str(r->path)))
            return r;
    return NULL;
}

static void conn_not_found(struct conn *c, sl path, int64_t now)
{
    bool hint = false;
    for (const struct route *r = route_tab; r->path; r++)
        hint |= route_is_on(r) && sl_ends(path, sl_str(r->path));
    LOG(hint ? EV_PREFIX_HINT : EV_NOT_FOUND,
        KV("req", ((sl){ c->req, c->req_len })), KV("path", path));
    conn_answer(c, &(struct answer){ 404,
        "Content-Type: text/plain; charset=utf-8\r\n"
        "X-Content-Type-Options: nosniff\r\n",
        SL("404 page not found\n") }, now);
}

static uint8_t method_bit(sl method)
{
    return sl_eq(method, SL("POST")) ? M_POST
        : sl_eq(method, SL("GET")) ? M_GET
        : sl_eq(method, SL("HEAD")) ? M_HEAD
        : sl_eq(method, SL("OPTIONS")) ? M_OPTIONS : M_OTHER;
}

/* The request is complete: answer, or start what answers. */
static void conn_dispatch(struct conn *c, int64_t now)
{
    sl in = { conn_in[conn_idx(c)], c->in_len };
    sl target = h1_slice(in, c->head.target);
    uint8_t bit = method_bit(h1_slice(in, c->head.method));
    c->state = C_WAIT;
    c->end = INT64_MAX;
    if (sl_eq(target, SL("*"))) {
        conn_answer(c, &(struct answer){ 200, "", { NULL, 0 } }, now);
    } else if (!c->route) {
        conn_not_found(c, h1_path(target), now);
    } else if (c->route->is_json && bit == M_OPTIONS
               && c->route->methods != M_ANY) {
        conn_answer(c, &(struct answer){ 200, "", { NULL, 0 } }, now);
    } else if (!(c->route->methods & bit)) {
        conn_answer(c, &(struct answer){ 405, c->route->allow,
            { NULL, 0 } }, now);
    } else {
        c->route->start(c, now);
    }
    if (c->state == C_WAIT)
        conn_watch(c);
}

/* Take the client's request id, or make one. */
static void conn_request_id(struct conn *c, sl in)
{
    static const char hex[] = "0123456789abcdef";
    sl given = h1_get(in, &c->head, H1_REQUEST_ID);
    uint8_t raw[8];
    if (request_id_check(given)) {
        c->req_len = (uint8_t)given.len;
        memcpy(c->req, given.p, given.len);
    } else if (!c->route || c->route->methods & M_POST) {
        io_random(raw, sizeof raw);
        c->req_len = 16;
        for (size_t i = 0; i < 16; i++)
            c->req[i] = (uint8_t)hex[raw[i / 2] >> (i % 2 ? 0 : 4) & 15];
    }
}

/* A body that cannot be taken. LiveKit gets 200 for one too large, lest it
 * send it again, and 503 for one that found no buffer, so that it does. */
static void conn_body_failed(struct conn *c, enum event ev, int64_t now)
{
    uint8_t bit = method_bit(h1_slice((sl){ conn_in[conn_idx(c)],
        c->in_len }, c->head.method));
    if (ev != EV_BODY_LIMIT && ev != EV_BODY_POOL) {
        conn_refuse(c, ev, now);
        return;
    }
    c->is_keep = false;
    c->is_refused = true;
    LOG(ev, KV("req", ((sl){ c->req, c->req_len })));
    if (!c->route || !(c->route->methods & M_POST) || bit != M_POST)
        conn_dispatch(c, now);
    else if (!c->route->is_json)
        conn_answer(c, &(struct answer){ ev == EV_BODY_LIMIT ? 200 : 503, "",
            { NULL, 0 } }, now);
    else
        conn_error(c, ev == EV_BODY_LIMIT ? RE_TOO_LARGE : RE_LIMITED, NULL,
            now);
}

/* Judge the token of a webhook request; want gets the body's hash. */
static const char *webhook_token(const struct conn *c, uint8_t want[36])
{
    sl in = { conn_in[conn_idx(c)], c->in_len };
    if (c->head.seen[H1_AUTHORIZATION] != 1)
        return "no token";
    return jwt_check_webhook(h1_get(in, &c->head, H1_AUTHORIZATION), cfg.key,
        cfg.key_cnt, io_wall_ms() / 1000, want);
}

/* A webhook whose body needs a large buffer gets none without a good token
 * (T7). True: refused and answered. */
static bool webhook_refused(struct conn *c, struct h1_body body, int64_t now)
{
    uint8_t sum[36];
    if (body.kind == H1_LENGTH && body.len <= LIM_IN_LEN - c->head_len)
        return false;
    const char *why = webhook_token(c, sum);
    if (!why)
        return false;
    c->is_keep = false;
    c->is_refused = true;
    LOG(EV_WEBHOOK_BAD, KV("req", ((sl){ c->req, c->req_len })),
        KV("reason", sl_str(why)));
    conn_answer(c, &(struct answer){ 200, "", { NULL, 0 } }, now);
    return true;
}

/* Whether a request bears the homeserver's token: one Authorization field,
 * compared by its hash, which tells nothing of its length either.
 * GRANTS: that the headers say who asks.
 * Returns  RE_CNT: it does; else what the client is told. */
MUST_USE static enum reply as_is_homeserver(const struct conn *c)
{
    sl in = { conn_in[conn_idx(c)], c->in_len };
    sl value = h1_get(in, &c->head, H1_AUTHORIZATION);
    uint8_t sum[32];
    if (c->head.seen[H1_AUTHORIZATION] == 0 || value.len <= 7
        || !sl_ieq((sl){ value.p, 7 }, SL("Bearer ")))
        return RE_NO_TOKEN;
    sha256(sl_skip(value, 7), sum);
    bool same = ct_eq(sum, cfg.hs_token_sum, 32);
    return same && c->head.seen[H1_AUTHORIZATION] == 1 ? RE_CNT
        : RE_WRONG_TOKEN;
}

/* The one value of an identity header, else an empty one. */
static sl as_header(const struct conn *c, enum h1_field f)
{
    return c->head.seen[f] == 1 ? h1_get((sl){ conn_in[conn_idx(c)],
        c->in_len }, &c->head, f) : (sl){ NULL, 0 };
}

/* A request that is not the homeserver's, or does not say for whom, is
 * refused before its body is read. True: it was, and is answered. */
static bool as_refused(struct conn *c, int64_t now)
{
    enum reply re = as_is_homeserver(c);
    bool named = c->route->who == FOR_HOMESERVER
        || as_header(c, c->route->who == FOR_USER ? H1_MATRIX_USER
                     : H1_MATRIX_ORIGIN).len > 0;
    if (re == RE_CNT && named)
        return false;
    if (!c->body.is_done) {
        c->is_keep = false;
        c->is_refused = true;
    }
    LOG(re == RE_CNT ? EV_AS_IDENTITY_BAD : EV_AS_TOKEN_BAD,
        KV("req", ((sl){ c->req, c->req_len })),
        KV("route", sl_str(c->route->path)), KV("reason", re == RE_NO_TOKEN
            ? SL("missing") : re == RE_CNT ? SL("header") : SL("wrong")));
    conn_error(c, re == RE_CNT ? RE_UNAUTHORIZED : re, NULL, now);
    return true;
}

static void conn_log_addr(const struct ip *client, sl req)
{
    uint8_t text[64];
    LOG(EV_ADDR_LIMIT, KV("req", req),
        KV("addr", text_addr(text, &(struct addr){ *client, 0 })));
}

/* Whether a client address is the same for counting: IPv6 by its /64, one
 * household's. */
static bool addr_same(const struct ip *a, const struct ip *b)
{
    return a->v6 == b->v6 && memcmp(a->b, b->b, a->v6 ? 8 : 4) == 0;
}

/* Whether an address has LKJWT_CONNS_PER_ADDR connections but `self`: its
 * own, or requests of proxies for it. */
static bool conn_addr_full(const struct ip *ip, const struct conn *self)
{
    int64_t same = 0;
    if (cfg.conns_per_addr == 0)
        return false;
    for (size_t i = 0; i < LIM_CONN_CNT + LIM_LANE_CNT; i++) {
        const struct conn *c = &conn_pool[i];
        same += c != self && c->state != C_FREE && c->has_client
            && addr_same(&c->client, ip);
    }
    return same >= cfg.conns_per_addr;
}

/* Who sends this request: behind a trusted proxy the rightmost address of
 * X-Forwarded-For that is no proxy's. None: not known, not counted. */
static void conn_client(struct conn *c, sl in)
{
    if (c->is_proxy)
        c->has_client = forwarded_client(h1_get(in, &c->head,
            H1_FORWARDED_FOR), cfg.proxy, cfg.proxy_cnt, &c->client);
}

/* A complete head: decide framing, route and whether a body is read. */
static void conn_head(struct conn *c, size_t head_len, int64_t now)
{
    sl in = { conn_in[conn_idx(c)], c->in_len };
    struct h1_body body;
    sl expect = h1_get(in, &c->head, H1_EXPECT);
    bool has_expect = c->head.seen[H1_EXPECT] && c->head.minor > 0;
    c->head_len = head_len;
    c->begin_us = io_now_us();
    int err = h1_framing(in, &c->head, false, &body);
    if (!err && has_expect && !sl_ieq(expect, SL("100-continue")))
        err = -EV_H1_EXPECT;
    if (err) {
        conn_refuse(c, (enum event)-err, now);
        return;
    }
    c->route = route_find(h1_path(h1_slice(in, c->head.target)),
        conn_is_metrics(c));
    conn_request_id(c, in);
    conn_client(c, in);
    if (c->is_proxy && c->has_client && c->route && c->route->is_json
        && conn_addr_full(&c->client, c)) {
        c->is_keep = false;
        c->is_refused = true;
        conn_log_addr(&c->client, (sl){ c->req, c->req_len });
        conn_error(c, RE_BUSY, NULL, now);
        return;
    }
    if (conn_is_lane(c) && (!c->route || c->route->is_json)) {
        if (!c->route) {
            conn_refuse(c, EV_CONN_FULL, now);
            return;
        }
        c->is_refused = true;
        LOG0(EV_CONN_FULL);
        conn_error(c, RE_BUSY, NULL, now);
        return;
    }
    bool wanted = c->route && c->route->methods & M_POST
        && method_bit(h1_slice(in, c->head.method)) == M_POST;
    size_t limit = !wanted ? LIM_BODY_LEN : c->route->body_cap
        ? c->route->body_cap : (size_t)cfg.max_body;
    intake_start(&c->body, body, limit);
    c->is_keep = true;
    if (body.len > limit || (has_expect && !wanted && !c->body.is_done)) {
        c->is_keep = false;
        if (wanted)
            conn_body_failed(c, EV_BODY_LIMIT, now);
        else
            conn_dispatch(c, now);
        return;
    }
    if (wanted && c->route->body_cap && webhook_refused(c, body, now))
        return;
    if (wanted && c->route->who != FOR_ANYONE && as_refused(c, now))
        return;
    if (has_expect && !c->body.is_done && c->in_len == head_len) {
        sl go = SL("HTTP/1.1 100 Continue\r\n\r\n");
        if (io_write(c->fd, go) != (ssize_t)go.len) {
            conn_close(c);
            return;
        }
    }
    c->state = C_BODY;
    c->end = now + LIM_BODY_MS;
}

/* Use what has arrived: at most one request. False: more must arrive. */
static bool conn_process(struct conn *c, int64_t now)
{
    uint8_t *in = conn_in[conn_idx(c)];
    if (c->state == C_HEAD) {
        int n = h1_parse_head((sl){ in, c->in_len }, false, &c->head);
        if (n == 0)
            return false;
        if (n < 0)
            conn_refuse(c, (enum event)-n, now);
        else
            conn_head(c, (size_t)n, now);
    }
    if (c->state != C_BODY)
        return true;
    int err = intake_take(&c->body, in, c->head_len, LIM_IN_LEN, &c->in_len);
    if (err)
        conn_body_failed(c, (enum event)-err, now);
    else if (c->body.is_done)
        conn_dispatch(c, now);
    return err || c->state != C_BODY;
}

/* The stage's deadline passed. */
static void conn_timeout(struct conn *c, int64_t now)
{
    if (c->state == C_HEAD && c->in_len)
        conn_refuse(c, EV_SLOW_HEAD, now);
    else if (c->state == C_BODY)
        conn_refuse(c, EV_SLOW_BODY, now);
    else {
        if (c->state == C_WRITE)
            LOG0(EV_SLOW_READ);
        conn_close(c);
    }
}

/* Discard what a refused client still sends. */
static void conn_discard(struct conn *c)
{
    ssize_t n = io_read(c->fd, conn_in[conn_idx(c)], LIM_IN_LEN);
    if (n == -EAGAIN)
        return;
    c->in_top = n > (ssize_t)c->in_top ? (size_t)n : c->in_top;
    c->discarded += n > 0 ? (size_t)n : 0;
    if (n <= 0 || c->discarded > LIM_LINGER_LEN)
        conn_close(c);
}

static void conn_write_rest(struct conn *c, int64_t now)
{
    const uint8_t *p = c->out_big ? big_buf(c->out_big)
        : conn_out[conn_idx(c)];
    ssize_t n = io_write(c->fd, (sl){ p + c->out_off,
        c->out_len - c->out_off });
    if (n == -EAGAIN)
        return;
    if (n < 0) {
        conn_close(c);
        return;
    }
    c->out_off += (size_t)n;
    if (c->out_off == c->out_len)
        conn_written(c, now);
}

/* Read once; the head's deadline starts at its first byte. */
static void conn_read(struct conn *c, int64_t now)
{
    size_t idx = conn_idx(c);
    ssize_t n = io_read(c->fd, conn_in[idx] + c->in_len,
        LIM_IN_LEN - c->in_len);
    if (n == -EAGAIN)
        return;
    if (n < 0) {
        conn_close(c);
        return;
    }
    if (n == 0)
        c->is_eof = true;
    else if (c->state == C_HEAD && c->in_len == 0) {
        c->end = now + LIM_HEAD_MS;
        c->begin_us = io_now_us();
    }
    c->in_len += (size_t)n;
    c->in_top = c->in_len > c->in_top ? c->in_len : c->in_top;
}

static bool exchange_gone(size_t idx, int64_t now);

/* Move a connection on: at most one request. */
static enum step conn_step(size_t idx, int revents, int64_t now)
{
    struct conn *c = &conn_pool[idx];
    if (c->state == C_FREE)
        return STEP_WAIT;
    if (now >= c->end) {
        conn_timeout(c, now);
        return STEP_WAIT;
    }
    switch (c->state) {
    case C_HEAD:
    case C_BODY:
        if (revents)
            conn_read(c, now);
        if (c->state != C_FREE && !conn_process(c, now) && c->is_eof)
            conn_close(c);
        break;
    case C_WAIT:
        if (revents & (POLLHUP | POLLERR)) {
            LOG(EV_CLIENT_GONE, KV("req", ((sl){ c->req, c->req_len })));
            io_close(&c->fd);
            if (exchange_gone(idx, now))
                conn_close(c);
        }
        break;
    case C_WRITE:
        conn_write_rest(c, now);
        break;
    case C_LINGER:
        conn_discard(c);
        break;
    case C_FREE:
        break;
    }
    if (c->state != C_FREE)
        conn_watch(c);
    return STEP_WAIT;
}

/* The oldest connection in [from, to) that holds no complete request. One
 * that just came may have its request on the way; in the lane that is
 * judged sooner, since a probe shall get in whoever else comes. */
static struct conn *conn_oldest_idle(size_t from, size_t to, int64_t now)
{
    struct conn *best = NULL;
    for (size_t i = from; i < to; i++) {
        struct conn *c = &conn_pool[i];
        int64_t young = now - (conn_is_lane(c) || conn_is_metrics(c)
            ? LIM_YOUNG_LANE_MS : LIM_YOUNG_MS);
        bool served = c->state == C_HEAD && c->code && c->in_len == 0;
        bool idle = c->state == C_LINGER || served
            || ((c->state == C_HEAD || c->state == C_BODY)
                && c->since <= young);
        if (idle && (!best || c->since < best->since))
            best = c;
    }
    return best;
}

/* A slot in [from, to): a free one, else the oldest idle one's. */
static struct conn *conn_slot_in(size_t from, size_t to, int64_t now)
{
    for (size_t i = from; i < to; i++)
        if (conn_pool[i].state == C_FREE)
            return &conn_pool[i];
    struct conn *old = conn_oldest_idle(from, to, now);
    if (old) {
        LOG0(EV_CONN_FULL);
        conn_close(old);
    }
    return old;
}

/* A slot for a new client: the pool, else the lane for health checks.
 * NULL: refuse. */
static struct conn *conn_slot(bool is_metrics, int64_t now)
{
    size_t max = (size_t)cfg.max_conns;
    if (is_metrics)
        return conn_slot_in(LIM_CONN_CNT + LIM_LANE_CNT, LIM_SLOT_CNT, now);
    struct conn *c = conn_slot_in(0, max, now);
    return c ? c : conn_slot_in(max, max + LIM_LANE_CNT, now);
}

/* Turn an accepted socket away. */
static void conn_turn_away(int fd)
{
    uint8_t text[160];
    struct bb b = BB(text);
    bb_str(&b, "HTTP/1.1 503 Service Unavailable\r\nDate: ");
    bb_put(&b, http_date());
    bb_str(&b, "\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
    (void)!io_write(fd, (sl){ text, b.len });
    io_close(&fd);
}

/* Adopt an accepted socket. */
static void conn_open(int fd, const struct ip *peer, bool is_metrics,
    int64_t now)
{
    bool is_proxy = !is_metrics && (cfg.bind.is_unix
        || ip_in_any(peer, cfg.proxy, cfg.proxy_cnt));
    if (!is_metrics && !is_proxy && conn_addr_full(peer, NULL)) {
        conn_log_addr(peer, (sl){ NULL, 0 });
        conn_turn_away(fd);
        return;
    }
    struct conn *c = conn_slot(is_metrics, now);
    if (!c) {
        LOG0(EV_CONN_FULL);
        conn_turn_away(fd);
        return;
    }
    memset(c, 0, sizeof *c);
    c->state = C_HEAD;
    c->fd = fd;
    c->client = *peer;
    c->is_proxy = is_proxy;
    c->has_client = !is_proxy && !is_metrics;
    c->since = now;
    c->end = now + LIM_HEAD_MS;
    met.gauge[GA_CONNECTIONS]++;
    (void)conn_step(conn_idx(c), POLLIN, now);   /* a request may be here */
}

/* GET /healthz: alive, and 503 from SIGTERM on. */
static void srv_healthz(struct conn *c, int64_t now)
{
    conn_answer(c, &(struct answer){ srv_stopping ? 503 : 200, "",
        { NULL, 0 } }, now);
}

/* GET /metrics, on its own listener. */
static void srv_metrics(struct conn *c, int64_t now)
{
    static uint8_t text[LIM_BIG_LEN - 1024];
    struct bb b = BB(text);
    io_usage(&met.cpu_us, &met.resident);
    met.gauge[GA_IDLE] = 0;
    for (size_t i = 0; i < LIM_CHAN_CNT; i++)
        met.gauge[GA_IDLE] += chan_pool[i].state == CHAN_IDLE;
    met.gauge[GA_BREAKERS] = breaker_open_cnt(breaker_cache,
        LIM_BREAKER_CNT, now) + breaker_open_cnt(&lk_breaker, 1, now);
    for (size_t i = 0; i < LIM_API_CNT; i++)
        met.gauge[GA_BREAKERS] += api_pool[i].state != API_FREE
            && breaker_is_open(&api_pool[i].breaker, now);
    met.gauge[GA_ANCHORS] = anchor_set[anchor_now].cnt;
    met.gauge[GA_STOPPING] = srv_stopping > 0;
    met.gauge[GA_CONNECTED] = job_connected_cnt();
    met_put(&b, &met);
    conn_answer(c, &(struct answer){ b.over ? 500 : 200,
        "Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n",
        { text, b.over ? 0 : b.len } }, now);
}

static void srv_exchange(struct conn *c, int64_t now);
static void srv_webhook(struct conn *c, int64_t now);
static void srv_as_ping(struct conn *c, int64_t now);

enum endpoint { EP_GET_TOKEN, EP_SFU_GET, EP_DELEGATE,
    EP_AS_USER, EP_AS_SERVER, EP_AS_DELEGATE };

#define AS_ROUTES(side, path, label, endpoint, who) \
    { "/_matrix/" side "/v1/rtc/livekit/" path, \
      "Allow: OPTIONS, POST\r\n", M_POST, true, 0, false, label, \
      srv_exchange, who, endpoint }, \
    { "/_matrix/" side "/unstable/io.element.msc4195/rtc/livekit/" path, \
      "Allow: OPTIONS, POST\r\n", M_POST, true, 0, false, label, \
      srv_exchange, who, endpoint }

static const struct route route_tab[] = {
    { "/get_token", "Allow: OPTIONS, POST\r\n", M_POST, true, 0, false,
      RL_GET_TOKEN, srv_exchange, FOR_ANYONE, EP_GET_TOKEN },
    { "/sfu/get", "Allow: OPTIONS, POST\r\n", M_POST, true, 0, false,
      RL_SFU_GET, srv_exchange, FOR_ANYONE, EP_SFU_GET },
    { "/delegate_delayed_leave", "Allow: OPTIONS, POST\r\n", M_POST, true, 0,
      false, RL_DELEGATE, srv_exchange, FOR_ANYONE, EP_DELEGATE },
    { "/sfu_webhook", "Allow: POST\r\n", M_POST, false, LIM_HUGE_LEN, false,
      RL_WEBHOOK, srv_webhook, FOR_ANYONE, 0 },
    { "/healthz", "Allow: GET, HEAD\r\n", M_GET | M_HEAD, false, 0, false,
      RL_HEALTHZ, srv_healthz, FOR_ANYONE, 0 },
    { "/metrics", "Allow: GET, HEAD\r\n", M_GET | M_HEAD, false, 0, true,
      RL_METRICS, srv_metrics, FOR_ANYONE, 0 },
    AS_ROUTES("client", "get_token", RL_AS_CLIENT, EP_AS_USER, FOR_USER),
    AS_ROUTES("client", "delegate_delayed_leave", RL_AS_DELEGATE,
              EP_AS_DELEGATE, FOR_USER),
    AS_ROUTES("federation", "get_token", RL_AS_SERVER, EP_AS_SERVER,
              FOR_SERVER),
    { "/_matrix/app/v1/ping", "", M_ANY, true, 0, false, RL_AS_PING,
      srv_as_ping, FOR_HOMESERVER, 0 },
    { NULL, NULL, 0, false, 0, false, RL_OTHER, NULL, FOR_ANYONE, 0 },
};

/* ---- the token exchange ----------------------------------------------
 * row state        waits for        success       failure
 * X1  X_WAIT       a lookup slot    X2            429 after 20 s
 * X2  X_LOOKUP     section 18       X3, X5, reply 401
 * X3  X_ROOM_WAIT  an SFU slot      X4            500 after 10 s
 * X4  X_ROOM       section 19       reply         X5 once, then 500
 * X5  X_ROOM_PAUSE 200 ms           X4            -
 * X6  X_API        section 18, APIs X3, reply     400 in time
 * X7  X_STORE      Redis            reply         reply: memory has it
 * X8  X_FOLLOW     another's X2, X3 as that one   as that one
 * X9  X_INQUIRY    section 21a      X9, X3, reply reply
 * Requests that the homeserver passes on begin with X9. X6 stands between
 * X2 and X3 when a delayed event is handed over. X8 is for the second who
 * shows a token that is being looked up, or wants a room that is being
 * created.
 */
enum exchange_state { X_FREE, X_WAIT, X_LOOKUP, X_ROOM_WAIT, X_ROOM,
    X_ROOM_PAUSE, X_API, X_STORE, X_FOLLOW, X_INQUIRY };

/* A token request's members; slices borrow from the request body. */
struct request {
    sl room_id, slot_id, room, device_id, delay_id;
    sl member_id, claimed_user_id, claimed_device_id;
    sl access_token, server_name, token_type;
    struct js_int expires_in, delay_timeout;
    sl url, user_id, old_member_id;  /* of the homeserver's requests */
};

/* One exchange; slot i serves conn i (INV-V2).
 * owner:    exchange_pool
 * lifetime: exchange_start to exchange_end */
static struct exchange {
    enum exchange_state state;
    enum endpoint endpoint;
    bool is_full, is_listed, has_retried;
    bool is_asked;                   /* for the room: its rate is charged */
    bool is_member;                  /* so says the homeserver */
    bool has_relayed;                /* by the unstable path, in vain */
    uint8_t asks;                    /* what is yet to be proven, by bit */
    struct inquiry *inq;
    uint16_t leader, follower_cnt;   /* leader is index + 1, 0: it is over */
    bool led_ok;                     /* how it went: if not, why, and what */
    enum event led_why;              /* the client is told */
    enum reply led_re;
    struct api *api;
    struct request r;
    struct name name;
    uint64_t dest, turn;             /* turn: its place while it waits */
    struct lookup *lookup;
    struct up *up;
    int64_t since, end;
    uint8_t user_len, user[LIM_ID_LEN];
    uint8_t alias[HASH_NAME_LEN];
} exchange_pool[LIM_SLOT_CNT];
/* The same, for scans: exchange_set keeps it. */
static uint8_t exchange_states[LIM_SLOT_CNT];
static struct { uint64_t dest, turn, room; int64_t since;
    bool is_listed, is_proven; } exchange_hot[LIM_SLOT_CNT];
static uint64_t exchange_turn;       /* of the last that waited and went on */
static bool exchange_starved;        /* slots are short, not one server's */
static size_t exchange_room_cnt;                 /* in X3 to X5 */

#define AT(member) offsetof(struct request, member)
static const struct js_field member_field[] = {
    { "id", JS_STRING, AT(member_id), NULL },
    { "claimed_user_id", JS_STRING, AT(claimed_user_id), NULL },
    { "claimed_device_id", JS_STRING, AT(claimed_device_id), NULL },
};
static const struct js_table member_table = { member_field, 3, true, false };
static const struct js_field openid_field[] = {
    { "access_token", JS_STRING, AT(access_token), NULL },
    { "matrix_server_name", JS_STRING, AT(server_name), NULL },
    { "token_type", JS_STRING, AT(token_type), NULL },
    { "expires_in", JS_INT, AT(expires_in), NULL },
};
static const struct js_table openid_table = { openid_field, 4, true, false };
static const struct js_field get_token_field[] = {
    { "room_id", JS_STRING, AT(room_id), NULL },
    { "slot_id", JS_STRING, AT(slot_id), NULL },
    { "member", JS_OBJECT, 0, &member_table },
    { "openid_token", JS_OBJECT, 0, &openid_table },
    { "delay_id", JS_STRING, AT(delay_id), NULL },
    { "delay_timeout", JS_INT, AT(delay_timeout), NULL },
    { "delay_cs_api_url", JS_ANY, 0, NULL },
};
/* /delegate_delayed_leave takes the same members. */
static const struct js_field sfu_get_field[] = {
    { "room", JS_STRING, AT(room), NULL },
    { "openid_token", JS_OBJECT, 0, &openid_table },
    { "device_id", JS_STRING, AT(device_id), NULL },
    { "delay_id", JS_STRING, AT(delay_id), NULL },
    { "delay_timeout", JS_INT, AT(delay_timeout), NULL },
    { "delay_cs_api_url", JS_ANY, 0, NULL },
    { "remove_me_user_id", JS_ANY, 0, NULL },
};
/* What the homeserver passes on: the MSC's members, and the `member` that
 * older clients send. */
static const struct js_field as_member_field[] = {
    { "id", JS_STRING, AT(old_member_id), NULL },
    { "claimed_user_id", JS_STRING, AT(claimed_user_id), NULL },
    { "claimed_device_id", JS_STRING, AT(claimed_device_id), NULL },
};
static const struct js_table as_member_table = { as_member_field, 3, true,
    false };
#define AS_FIELDS \
    { "room_id", JS_STRING, AT(room_id), NULL }, \
    { "slot_id", JS_STRING, AT(slot_id), NULL }, \
    { "member_id", JS_STRING, AT(member_id), NULL }, \
    { "member", JS_OBJECT, 0, &as_member_table }, \
    { "url", JS_STRING, AT(url), NULL }, \
    { "delay_cs_api_url", JS_ANY, 0, NULL }
static const struct js_field as_user_field[] = { AS_FIELDS,
    { "server_name", JS_STRING, AT(server_name), NULL } };
static const struct js_field as_server_field[] = { AS_FIELDS,
    { "user_id", JS_STRING, AT(user_id), NULL } };
static const struct js_field as_delegate_field[] = { AS_FIELDS,
    { "delay_id", JS_STRING, AT(delay_id), NULL } };

static const struct js_table request_tab[] = {
    [EP_GET_TOKEN] = { get_token_field, COUNT_OF(get_token_field), true,
        true },
    [EP_SFU_GET] = { sfu_get_field, COUNT_OF(sfu_get_field), true, true },
    [EP_DELEGATE] = { get_token_field, COUNT_OF(get_token_field), true,
        true },
    [EP_AS_USER] = { as_user_field, COUNT_OF(as_user_field), true, true },
    [EP_AS_SERVER] = { as_server_field, COUNT_OF(as_server_field), true,
        true },
    [EP_AS_DELEGATE] = { as_delegate_field, COUNT_OF(as_delegate_field),
        true, true },
};

/* Members that must be there, in the order of PROTOCOL section 4. */
enum { IN_NEW = 1 << EP_GET_TOKEN | 1 << EP_DELEGATE,
    IN_OLD = 1 << EP_SFU_GET, IN_SERVER = 1 << EP_AS_SERVER,
    IN_AS = 1 << EP_AS_USER | IN_SERVER | 1 << EP_AS_DELEGATE };
static const struct { const char *text; size_t at; size_t cap;
    uint8_t in; bool optional; } field_tab[] = {
    { "room_id", AT(room_id), LIM_ID_LEN, IN_NEW | IN_AS, false },
    { "slot_id", AT(slot_id), LIM_OTHER_LEN, IN_NEW | IN_AS, false },
    { "room", AT(room), LIM_ID_LEN, IN_OLD, false },
    { "member.id", AT(member_id), LIM_OTHER_LEN, IN_NEW, false },
    { "member.claimed_user_id", AT(claimed_user_id), LIM_ID_LEN, IN_NEW,
      false },
    { "member.claimed_device_id", AT(claimed_device_id), LIM_OTHER_LEN,
      IN_NEW, false },
    { "openid_token.access_token", AT(access_token), LIM_TOKEN_LEN,
      IN_NEW | IN_OLD, false },
    { "openid_token.matrix_server_name", AT(server_name), LIM_OTHER_LEN,
      IN_NEW | IN_OLD, false },
    { "device_id", AT(device_id), LIM_OTHER_LEN, IN_OLD, true },
    { "member_id", AT(member_id), LIM_OTHER_LEN, IN_AS, false },
    { "url", AT(url), LIM_URL_LEN, IN_AS, false },
    { "user_id", AT(user_id), LIM_ID_LEN, IN_SERVER, false },
    { "server_name", AT(server_name), LIM_OTHER_LEN, 1 << EP_AS_USER, true },
};
#undef AT

/* Whether there is no blank and no control in s: as a token it can stand in
 * a request line, as a room's id it does not make a homeserver's database
 * fail, which would be taken for the homeserver's fault (T31). */
static bool is_one_word(sl s_raw)
{
    for (size_t i = 0; i < s_raw.len; i++)
        if (s_raw.p[i] < 0x21 || s_raw.p[i] == 0x7f)
            return false;
    return true;
}

static sl request_id(const struct conn *c)
{
    return (sl){ c->req, c->req_len };
}

/* Check presence and lengths; answers itself when it finds fault. */
MUST_USE static bool request_check_fields(struct conn *c,
    const struct exchange *x, int64_t now)
{
    char text[80];
    for (size_t i = 0; i < COUNT_OF(field_tab); i++) {
        if (!(field_tab[i].in >> x->endpoint & 1))
            continue;
        sl v = *(const sl *)(const void *)((const uint8_t *)&x->r
                                           + field_tab[i].at);
        bool missing = v.len == 0 && !field_tab[i].optional;
        if (!missing && v.len <= field_tab[i].cap)
            continue;
        snprintf(text, sizeof text, missing ? "Missing parameter: %s"
            : "Parameter too long: %s", field_tab[i].text);
        LOG(missing ? EV_FIELD_MISSING : EV_FIELD_LIMIT,
            KV("req", request_id(c)), KV("field", sl_str(field_tab[i].text)));
        conn_error(c, RE_BAD_JSON, text, now);
        return false;
    }
    return true;
}

/* Check the delegation pair: both or neither, well-formed; both for
 * /delegate_delayed_leave. */
MUST_USE static bool request_check_delay(struct conn *c,
    const struct exchange *x, int64_t now)
{
    const struct request *r = &x->r;
    bool as = x->endpoint == EP_AS_DELEGATE;     /* it is looked up */
    bool required = x->endpoint == EP_DELEGATE || as;
    bool has_id = r->delay_id.len > 0;
    bool has_timeout = r->delay_timeout.is_set
        && (r->delay_timeout.over || r->delay_timeout.v != 0);
    bool bad_timeout = r->delay_timeout.over || r->delay_timeout.v < 0;
    const char *text = NULL, *field = "delay_id";
    if (has_id && !delay_id_check(r->delay_id)) {
        text = "Invalid parameter: delay_id";
    } else if (has_timeout && bad_timeout) {
        text = "Invalid parameter: delay_timeout";
        field = "delay_timeout";
    } else if (has_id && !has_timeout && !as) {
        text = "Missing parameter: delay_timeout";
        field = "delay_timeout";
    } else if (!has_id && (has_timeout || required)) {
        text = "Missing parameter: delay_id";
    }
    if (!text)
        return true;
    LOG(text[0] == 'M' ? EV_FIELD_MISSING : EV_FIELD_BAD,
        KV("req", request_id(c)), KV("field", sl_str(field)));
    conn_error(c, RE_BAD_JSON, text, now);
    return false;
}

static bool request_delegates(const struct request *r)
{
    return r->delay_id.len > 0;
}

static void exchange_watch(struct exchange *x)
{
    loop_set(KIND_EXCHANGE, (size_t)(x - exchange_pool), -1, 0,
        x->state == X_FREE ? INT64_MAX : x->end);
}

static struct conn *exchange_conn(const struct exchange *x)
{
    return &conn_pool[x - exchange_pool];
}

/* Its place in the queue: a client's next request comes after one of each
 * other client that waits, where clients are known. */
static uint64_t exchange_next_turn(const struct exchange *x)
{
    const struct conn *c = exchange_conn(x);
    uint64_t turn = exchange_turn;
    for (size_t i = 0; c->has_client && i < LIM_SLOT_CNT; i++)
        if (exchange_states[i] == X_WAIT && exchange_hot[i].turn >= turn
            && conn_pool[i].has_client
            && addr_same(&conn_pool[i].client, &c->client))
            turn = exchange_hot[i].turn + 1;
    return turn;
}

/* Whether i has waited longer than k, clients taking turns. */
static bool exchange_before(size_t i, size_t k)
{
    return exchange_hot[i].turn < exchange_hot[k].turn
        || (exchange_hot[i].turn == exchange_hot[k].turn
            && exchange_hot[i].since < exchange_hot[k].since);
}

/* Wake the exchange that has waited longest in a state. */
static void exchange_wake(enum exchange_state state)
{
    size_t best = LIM_SLOT_CNT;
    for (size_t i = 0; met.gauge[GA_WAITING] && i < LIM_SLOT_CNT; i++)
        if (exchange_states[i] == state
            && (best == LIM_SLOT_CNT || exchange_before(i, best)))
            best = i;
    if (best < LIM_SLOT_CNT)
        loop_wake(KIND_EXCHANGE, best);
}

/* Of those that wait for a lookup's slot and may have it wake who has waited
 * longest; of one server, or with 0 of any. */
static void exchange_wake_next(uint64_t dest, int64_t now)
{
    size_t best = LIM_SLOT_CNT;
    uint64_t judged = 0;                 /* many wait for the same server */
    bool may = false, known = false;
    if (dest == 0)
        exchange_starved = false;
    for (size_t i = 0; met.gauge[GA_WAITING] && i < LIM_SLOT_CNT
         && (may || !dest || judged != dest); i++) {
        uint64_t to = exchange_hot[i].dest;
        bool listed = exchange_hot[i].is_listed;
        if (exchange_states[i] != X_WAIT || (dest && to != dest)
            || (best < LIM_SLOT_CNT && !exchange_before(i, best)))
            continue;
        if (to != judged) {
            known = !listed && dest_is_known(to, now);
            may = lookup_has_slot(to, listed, known);
            judged = to;
        }
        best = may ? i : best;
        exchange_starved |= !may && !lookup_has_room(listed, known);
    }
    if (best < LIM_SLOT_CNT)
        loop_wake(KIND_EXCHANGE, best);
    exchange_starved |= dest == 0 && best < LIM_SLOT_CNT;
}

/* A lookup began or ended: who of its server may have the next slot, and
 * who of all? */
static void exchange_wake_waiting(uint64_t dest, int64_t now)
{
    exchange_wake_next(dest, now);
    if (exchange_starved)
        exchange_wake_next(0, now);
}

static void exchange_drop(struct exchange *x, int64_t now)
{
    if (x->lookup) {
        lookup_close(x->lookup, now);
        x->lookup = NULL;
        exchange_wake_waiting(x->dest, now);
    }
    if (x->up) {
        up_close(x->up, now);
        x->up = NULL;
        exchange_wake(X_ROOM_WAIT);
    }
    if (x->inq)
        inq_close(x->inq, now);
    x->inq = NULL;
}

static bool exchange_in_room(enum exchange_state s)
{
    return s == X_ROOM_WAIT || s == X_ROOM || s == X_ROOM_PAUSE;
}

static void exchange_set(struct exchange *x, enum exchange_state state)
{
    met.gauge[GA_WAITING] -= x->state == X_WAIT || x->state == X_ROOM_WAIT;
    met.gauge[GA_WAITING] += state == X_WAIT || state == X_ROOM_WAIT;
    exchange_room_cnt -= exchange_in_room(x->state);
    exchange_room_cnt += exchange_in_room(state);
    size_t i = (size_t)(x - exchange_pool);
    exchange_states[i] = (uint8_t)state;
    exchange_hot[i].dest = x->dest;
    exchange_hot[i].turn = x->turn;
    exchange_hot[i].room = be64(x->alias);
    exchange_hot[i].since = x->since;
    exchange_hot[i].is_listed = x->is_listed;
    exchange_hot[i].is_proven = x->is_full || x->is_member;
    x->state = state;
    exchange_watch(x);
}

/* Tell those who wait for x how it went. Who waits for a lookup learns the
 * user of the token, which was the same; who waits for a room has its own. */
static void exchange_lead(struct exchange *x, bool ok, enum event why,
    enum reply re)
{
    size_t leader = (size_t)(x - exchange_pool) + 1;
    for (size_t i = 0; i < LIM_SLOT_CNT && x->follower_cnt; i++) {
        struct exchange *f = &exchange_pool[i];
        if (exchange_states[i] != X_FOLLOW || f->leader != leader)
            continue;
        f->leader = 0;
        f->led_ok = ok;
        f->led_why = why;
        f->led_re = re;
        if (ok && x->state == X_LOOKUP) {
            f->user_len = x->user_len;
            memcpy(f->user, x->user, x->user_len);
        }
        x->follower_cnt--;
        loop_wake(KIND_EXCHANGE, i);
    }
}

static void exchange_follow(struct exchange *x, size_t leader)
{
    exchange_pool[leader].follower_cnt++;
    x->leader = (uint16_t)(leader + 1);
    x->end = INT64_MAX;
    exchange_set(x, X_FOLLOW);
}

/* Who asks already whose token x shows, or LIM_SLOT_CNT. */
static size_t exchange_find_lookup(const struct exchange *x)
{
    uint64_t tail = token_tail(x->r.access_token);
    int64_t left = lookup_active;
    for (size_t i = 0; left && i < LIM_UP_CNT; i++) {
        const struct lookup *l = &lookup_pool[i];
        left -= lookup_hot[i].is_used;
        if (lookup_hot[i].is_used && lookup_hot[i].dest == x->dest
            && lookup_hot[i].tail == tail && l->owner == KIND_EXCHANGE
            && l->state != L_DONE && l->state != L_FAILED
            && sl_eq(l->name.whole, x->name.whole)
            && sl_eq(l->token, x->r.access_token))
            return l->owner_idx;
    }
    return LIM_SLOT_CNT;
}

/* Who creates the room of x already, or LIM_SLOT_CNT. */
static size_t exchange_find_room(const struct exchange *x)
{
    uint64_t room = be64(x->alias);
    for (size_t i = 0, left = exchange_room_cnt; left && i < LIM_SLOT_CNT;
         i++) {
        if (!exchange_in_room((enum exchange_state)exchange_states[i]))
            continue;
        left--;
        if (exchange_hot[i].room == room && &exchange_pool[i] != x
            && memcmp(exchange_pool[i].alias, x->alias, HASH_NAME_LEN) == 0)
            return i;
    }
    return LIM_SLOT_CNT;
}

/* Free the exchange; the caller answers on its connection next. */
static void exchange_end(struct exchange *x, int64_t now)
{
    exchange_drop(x, now);
    if (x->leader)
        exchange_pool[x->leader - 1].follower_cnt--;
    must(x->follower_cnt == 0);
    exchange_set(x, X_FREE);
    met.gauge[GA_EXCHANGES]--;
}

/* The step of a lookup that an event of this section belongs to. */
static sl exchange_step_name(enum event ev)
{
    return ev == EV_NAME_BAD || ev == EV_SERVER_DENIED ? SL("name")
        : ev == EV_TOKEN_BAD ? SL("http")
        : ev == EV_CLAIM_MISMATCH ? SL("sub") : (sl){ NULL, 0 };
}

/* The client of an exchange left. True: it only waited, for itself, and is
 * ended. */
static bool exchange_gone(size_t idx, int64_t now)
{
    struct exchange *x = &exchange_pool[idx];
    if ((x->state != X_WAIT && x->state != X_ROOM_WAIT
         && x->state != X_FOLLOW) || x->follower_cnt)
        return false;
    exchange_end(x, now);
    return true;
}

static void exchange_fail(struct exchange *x, enum event ev, enum reply re,
    int64_t now)
{
    struct conn *c = exchange_conn(x);
    if (ev != EV_NONE)
        LOG(ev, KV("req", request_id(c)), KV("server", x->name.whole),
            KV("step", exchange_step_name(ev)));
    exchange_lead(x, false, ev == EV_NONE && x->lookup ? x->lookup->why : ev,
        re);
    exchange_end(x, now);
    conn_error(c, re, NULL, now);
}

/* The identity of the participant (PROTOCOL section 5), in work. */
MUST_USE static bool exchange_identity(const struct exchange *x,
    struct bb *work)
{
    sl user = { x->user, x->user_len };
    if (x->endpoint == EP_SFU_GET) {
        bb_put(work, user);
        bb_byte(work, ':');
        bb_put(work, x->r.device_id);
        return !work->over;
    }
    sl part[] = { user, x->r.claimed_device_id, x->r.member_id };
    uint8_t name[HASH_NAME_LEN];
    if (x->endpoint >= EP_AS_USER)       /* PROTOCOL section 17 */
        part[1] = part[2];
    if (!jwt_hash_name(part, x->endpoint >= EP_AS_USER ? 2 : 3, name))
        return false;
    bb_put(work, (sl){ name, sizeof name });
    return !work->over;
}

MUST_USE static bool exchange_alias(struct exchange *x)
{
    sl part[] = { x->endpoint == EP_SFU_GET ? x->r.room : x->r.room_id,
        x->endpoint == EP_SFU_GET ? SL("m.call#ROOM") : x->r.slot_id };
    return jwt_hash_name(part, 2, x->alias);
}

/* Whether one more participant by the homeserver can be watched. */
MUST_USE static bool exchange_seat(const struct exchange *x, sl identity,
    int64_t now)
{
    struct seat_params p = { { x->alias, HASH_NAME_LEN }, identity,
        x->r.room_id, { x->user, x->user_len }, x->name.whole,
        x->endpoint == EP_AS_SERVER };
    return x->endpoint < EP_AS_USER || seat_take(&p, now);
}

/* Sign the join token and answer. */
static void exchange_grant(struct exchange *x, int64_t now)
{
    static uint8_t payload[16384], body[40960];
    uint8_t identity[LIM_ID_LEN + 1 + LIM_OTHER_LEN], took[20];
    struct conn *c = exchange_conn(x);
    struct bb id = BB(identity), p = BB(payload), b = BB(body);
    bool as = x->endpoint >= EP_AS_USER;
    sl text, who = { NULL, 0 };
    bool ok = exchange_identity(x, &id) && bb_finish(&id, &who);
    if (ok) {
        struct grant g = { cfg.key[0].name, who,
            { x->alias, HASH_NAME_LEN }, io_wall_ms() / 1000,
            as && cfg.token_ttl_s > LIM_AS_TTL_S ? LIM_AS_TTL_S
                : cfg.token_ttl_s, x->is_full || cfg.restricted_publish,
            cfg.can_update };
        jwt_put_join(&p, &g);
        ok = bb_finish(&p, &text);
    }
    if (ok) {
        bb_byte(&b, '{');
        if (!as) {
            bb_str(&b, "\"url\":");
            js_put_str(&b, cfg.livekit_url, false);
            bb_byte(&b, ',');
        }
        bb_str(&b, "\"jwt\":\"");
        jwt_sign(&b, &cfg.key[0].sec_key, text);
        bb_str(&b, "\"}");
        ok = bb_finish(&b, &text);
    }
    if (!ok) {
        exchange_fail(x, EV_BUG_OVERFLOW, RE_INTERNAL, now);
        return;
    }
    LOG(EV_GRANTED, KV("req", request_id(c)),
        KV("route", sl_str(c->route->path)), KV("server", x->name.whole),
        KV("full", x->is_full ? SL("true") : SL("false")),
        KV("us", text_u64(took, (uint64_t)(io_now_us() - c->begin_us))));
    exchange_end(x, now);
    conn_answer(c, &(struct answer){ 200, "", text }, now);
}

/* The CreateRoom request of exchange idx. */
static void lk_build_room(uint16_t idx, struct bb *b)
{
    uint8_t text[64];
    struct bb body = BB(text);
    pb_create_room(&body, (sl){ exchange_pool[idx].alias, HASH_NAME_LEN });
    lk_put(b, "CreateRoom", (sl){ NULL, 0 }, (sl){ text, body.len },
        request_id(&conn_pool[idx]));
}

/* By when a room must be there, lest the client or its proxy gives up. */
static int64_t exchange_room_end(const struct exchange *x, int64_t now)
{
    int64_t end = x->since + cfg.lookup_ms + 2 * LIM_SLACK_MS;
    return end < now + LIM_RPC_MS ? end : now + LIM_RPC_MS;
}

/* The entry of x's room among those created of late. */
static uint64_t exchange_room_key(const struct exchange *x)
{
    return memo_key('a', (sl){ x->alias, HASH_NAME_LEN });
}

/* Whether a room may be created that was not of late. That is counted under
 * the lone `*`, and of other homeservers' users (T5). */
static bool exchange_new_room(struct exchange *x, int64_t now)
{
    bool counted = cfg.is_open || x->endpoint == EP_AS_SERVER;
    if (!counted || x->is_asked || memo_holds(room_cache, LIM_ROOM_CNT,
            exchange_room_key(x), now))
        return true;
    x->is_asked = true;
    return rate_ok(memo_key('r', (sl){ x->user, x->user_len }),
            &cfg.rate_room_user, now)
        && rate_ok(memo_key('R', x->name.whole), &cfg.rate_room_server, now);
}

/* Create the room on the SFU; only for full access, or a member. */
static void exchange_room(struct exchange *x, int64_t now)
{
    size_t leader = exchange_find_room(x);
    must(x->is_full || x->is_member);
    if (!exchange_in_room(x->state) && leader < LIM_SLOT_CNT
        && exchange_pool[leader].end <= x->end) {
        exchange_follow(x, leader);
        return;
    }
    if (!exchange_new_room(x, now)) {
        exchange_fail(x, EV_RATE_ROOMS, RE_LIMITED, now);
        return;
    }
    if (breaker_refuses(&lk_breaker, now)) {
        LOG(EV_BREAKER_OPEN, KV("req", request_id(exchange_conn(x))),
            KV("target", SL("sfu")), KV("server", cfg.api.url.name.whole));
        exchange_fail(x, EV_NONE, RE_SFU, now);
        exchange_wake(X_ROOM_WAIT);
        return;
    }
    x->up = lk_open(KIND_EXCHANGE, (uint16_t)(x - exchange_pool),
        lk_build_room, x->end, now);
    exchange_set(x, x->up ? X_ROOM : X_ROOM_WAIT);
    if (x->up)
        exchange_wake(X_ROOM_WAIT);
}

/* A refusal whose status differs between token endpoints and delegation. */
static void exchange_refuse(struct exchange *x, enum event ev,
    enum reply token_re, enum reply delegate_re, int64_t now)
{
    exchange_fail(x, ev, x->endpoint == EP_DELEGATE
        || x->endpoint == EP_AS_DELEGATE ? delegate_re : token_re, now);
}

/* The job that this exchange asks for. ids has room for both identities. */
MUST_USE static bool exchange_job(const struct exchange *x,
    struct job_params *p, uint8_t ids[2][LIM_JOB_ID_LEN])
{
    struct bb first = { ids[0], 0, LIM_JOB_ID_LEN, false };
    struct bb second = { ids[1], 0, LIM_JOB_ID_LEN, false };
    sl user = { x->user, x->user_len };
    if (!exchange_identity(x, &first))
        return false;
    bool is_owned = x->endpoint == EP_AS_DELEGATE;
    if (is_owned) {
        bb_put(&second, user);
    } else if (x->endpoint != EP_SFU_GET) {  /* it may have joined by that */
        bb_put(&second, user);
        bb_byte(&second, ':');
        bb_put(&second, x->r.claimed_device_id);
    }
    int64_t t = x->r.delay_timeout.v;
    t = t < LIM_DELAY_MIN_MS ? LIM_DELAY_MIN_MS
        : t > LIM_DELAY_MAX_MS ? LIM_DELAY_MAX_MS : t;
    *p = (struct job_params){ .alias = { x->alias, HASH_NAME_LEN },
        .identity = { { ids[0], first.len },
                      { ids[1], second.over ? 0 : second.len } },
        .server = x->name.whole, .delay_id = x->r.delay_id, .user = user,
        .timeout_ms = t, .is_owned = is_owned };
    return true;
}

/* A delegation that is beyond a cap, or whose identity is too long. */
static void exchange_full(struct exchange *x, enum event ev, int64_t now)
{
    if (ev == EV_FIELD_LIMIT)
        exchange_fail(x, ev, RE_LONG_IDENTITY, now);
    else
        exchange_refuse(x, ev, RE_NO_DELEGATION, ev == EV_JOBS_USER
            ? RE_USER_LIMIT : RE_LIMITED, now);
}

static void exchange_accept(struct exchange *x, int64_t now);

/* Steps 9 and 10 of PROTOCOL section 4, and the caps, which come before a
 * room is created. */
static void exchange_delegate(struct exchange *x, int64_t now)
{
    struct job_params p;
    uint8_t ids[2][LIM_JOB_ID_LEN];
    if (srv_stopping == 2) {
        exchange_fail(x, EV_STOP_REFUSED, RE_STOPPING, now);
        return;
    }
    enum event full = exchange_job(x, &p, ids) ? job_refuses(&p)
        : EV_FIELD_LIMIT;
    if (full != EV_NONE) {
        exchange_full(x, full, now);
        return;
    }
    if (!x->api)
        x->api = api_find(x->name.whole, now);
    enum res got = x->api ? api_resolve(x->api, now) : RES_FAILED;
    if (got == RES_WAIT && now < exchange_room_end(x, now)) {
        x->end = exchange_room_end(x, now);
        exchange_set(x, X_API);
    } else if (got != RES_OK) {
        exchange_fail(x, EV_API_UNKNOWN, RE_NO_API, now);
    } else if (x->endpoint == EP_DELEGATE || x->endpoint == EP_AS_DELEGATE) {
        exchange_accept(x, now);
    } else {
        x->end = exchange_room_end(x, now);
        exchange_room(x, now);
    }
}

/* The job has begun: answer. */
static void exchange_delegated(struct exchange *x, int64_t now)
{
    if (x->endpoint != EP_DELEGATE && x->endpoint != EP_AS_DELEGATE) {
        exchange_grant(x, now);
        return;
    }
    struct conn *c = exchange_conn(x);
    exchange_end(x, now);
    conn_answer(c, &(struct answer){ 200, "", SL("{}") }, now);
}

/* Start the job; answer once Redis has it, or cannot be asked. */
static void exchange_accept(struct exchange *x, int64_t now)
{
    size_t idx = (size_t)(x - exchange_pool);
    struct job *j = NULL;
    struct job_params p;
    uint8_t ids[2][LIM_JOB_ID_LEN];
    if (srv_stopping == 2) {
        exchange_fail(x, EV_STOP_REFUSED, RE_STOPPING, now);
        return;
    }
    enum event full = exchange_job(x, &p, ids) ? job_refuses(&p)
        : EV_FIELD_LIMIT;
    if (full == EV_NONE)
        j = job_accept(&p, x->api, now);
    if (!j) {
        exchange_full(x, full == EV_NONE ? EV_JOBS_FULL : full, now);
        return;
    }
    if (!j->store || !rds_is_up(RDS_MAIN)) {
        exchange_delegated(x, now);
        return;
    }
    j->waiter = (uint16_t)(idx + 1);
    store_is_done[idx] = false;
    x->end = INT64_MAX;
    exchange_set(x, X_STORE);
}

/* Charge the verified user, and the server where nobody listed it: a name
 * that is not proven shall not spend another's budget. */
static enum event exchange_rate(const struct exchange *x, int64_t now)
{
    if (!rate_ok(memo_key('u', (sl){ x->user, x->user_len }),
                 &cfg.rate_user, now))
        return EV_RATE_USER;
    return x->is_listed || rate_ok(memo_key('s', x->name.whole),
                                   &cfg.rate_server, now)
        ? EV_NONE : EV_RATE_SERVER;
}

/* The homeserver vouched for x->user: decide what the user may have.
 * GRANTS: room creation to full-access users, a token to the others. */
static void exchange_verified(struct exchange *x, int64_t now)
{
    sl user = { x->user, x->user_len };
    enum event rate = exchange_rate(x, now);
    x->is_full = has_full_access(x->name.whole);
    if (rate != EV_NONE)
        exchange_fail(x, rate, RE_LIMITED, now);
    else if (x->endpoint != EP_SFU_GET && !sl_eq(x->r.claimed_user_id, user))
        exchange_fail(x, EV_CLAIM_MISMATCH, RE_UNAUTHORIZED, now);
    else if (request_delegates(&x->r) && !x->is_full)
        exchange_refuse(x, EV_DELEGATION_RESTRICTED, RE_RESTRICTED,
            RE_FORBIDDEN, now);
    else if (!exchange_alias(x))
        exchange_fail(x, EV_BUG_OVERFLOW, RE_INTERNAL, now);
    else if (request_delegates(&x->r))
        exchange_delegate(x, now);
    else if (!x->is_full)
        exchange_grant(x, now);
    else {
        x->end = exchange_room_end(x, now);
        exchange_room(x, now);
    }
}

/* The room is there. */
static void exchange_roomed(struct exchange *x, int64_t now)
{
    if (request_delegates(&x->r))
        exchange_accept(x, now);
    else
        exchange_grant(x, now);
}

/* The one that this followed is over: go on as it did. */
static void exchange_step_follow(struct exchange *x, int64_t now)
{
    if (x->leader)
        return;
    if (!x->led_ok)
        exchange_fail(x, x->led_why, x->led_re, now);
    else if (x->is_full || x->is_member)
        exchange_roomed(x, now);
    else
        exchange_verified(x, now);
}

/* The SFU answered, or not. */
static void exchange_step_room(struct exchange *x, int64_t now)
{
    struct conn *c = exchange_conn(x);
    struct up *u = x->up;
    if (u->state != UP_DONE && u->state != UP_FAILED)
        return;
    bool passing = u->state == UP_FAILED ? u->why != EV_SSRF_DENIED
        : u->head.status >= 500;
    if (u->state == UP_DONE && u->head.status == 200) {
        LOG(EV_ROOM_CREATED, KV("req", request_id(c)));
        exchange_drop(x, now);
        if (cfg.is_open || cfg.has_as)
            memo_make(room_cache, LIM_ROOM_CNT, exchange_room_key(x), now)->at
                = now + LIM_ROOM_MS;
        exchange_lead(x, true, EV_NONE, RE_SFU);
        exchange_roomed(x, now);
        return;
    }
    enum event why = lk_log(u, request_id(c));
    exchange_drop(x, now);
    if (!passing || x->has_retried || now + LIM_RETRY_MS >= x->end) {
        exchange_lead(x, false, why, RE_SFU);
        exchange_fail(x, EV_NONE, RE_SFU, now);
        return;
    }
    x->has_retried = true;
    x->since = now + LIM_RETRY_MS;      /* when the pause is over */
    exchange_set(x, X_ROOM_PAUSE);
    loop_set(KIND_EXCHANGE, (size_t)(x - exchange_pool), -1, 0, x->since);
}

static void exchange_step_lookup(struct exchange *x, int64_t now)
{
    struct lookup *l = x->lookup;
    if (l->state == L_FAILED) {
        exchange_fail(x, EV_NONE, up_was_held(l->why) ? RE_LIMITED
            : RE_UNAUTHORIZED, now);
    } else if (l->state == L_DONE) {
        x->user_len = (uint8_t)l->user.len;
        memcpy(x->user, l->user.p, l->user.len);
        exchange_lead(x, true, EV_NONE, RE_UNAUTHORIZED);
        exchange_drop(x, now);
        exchange_verified(x, now);
    }
}

/* Wait a second, or for a wake. */
static void exchange_queue(struct exchange *x, int64_t now)
{
    exchange_starved |= !lookup_has_room(x->is_listed,
        dest_is_known(x->dest, now));
    x->end = now + 1000;
    exchange_set(x, X_WAIT);
}

/* Start the lookup when a slot is free, else wait. */
static void exchange_admit(struct exchange *x, int64_t now)
{
    struct conn *c = exchange_conn(x);
    if (now >= x->since + cfg.lookup_ms) {
        exchange_fail(x, EV_WAIT_TIMEOUT, RE_LIMITED, now);
        exchange_wake_next(0, now);
        return;
    }
    size_t leader = exchange_find_lookup(x);
    if (leader < LIM_SLOT_CNT) {
        exchange_follow(x, leader);
        exchange_wake_waiting(x->dest, now);
        return;
    }
    if (lookup_may_open(x->dest, x->is_listed, now))
        x->lookup = lookup_open(KIND_EXCHANGE,
            (uint16_t)(x - exchange_pool), &x->name, x->dest,
            x->r.access_token, request_id(c), x->since, now);
    if (!x->lookup) {
        exchange_queue(x, now);
        return;
    }
    exchange_turn = x->turn > exchange_turn ? x->turn : exchange_turn;
    x->turn = 0;
    x->end = INT64_MAX;
    exchange_set(x, X_LOOKUP);
    exchange_wake_waiting(x->dest, now); /* until nobody can be admitted */
}

/* ---- requests that the homeserver passes on (MSC4195 as of its homeserver
 * endpoints, MSC4512): as_is_homeserver has proven that its headers hold.
 */
enum { PROVE_USER = 1, PROVE_SERVER = 2 };   /* joined to the room */

static void exchange_wake_inquiry(size_t inq)
{
    for (size_t i = 0; i < LIM_SLOT_CNT; i++)
        if (exchange_states[i] == X_INQUIRY
            && exchange_pool[i].inq == &inq_pool[inq])
            loop_wake(KIND_EXCHANGE, i);
}

static void as_wait(struct exchange *x, struct inquiry *q, int64_t now)
{
    bool is_foreign = x->endpoint == EP_AS_SERVER;
    x->inq = q;
    x->end = INT64_MAX;                  /* the question has its own */
    if (q) {
        q->is_foreign = is_foreign && (q->user_cnt == 1 || q->is_foreign);
        loop_wake(KIND_INQUIRY, inq_idx(q));     /* it may be ours now */
        exchange_set(x, X_INQUIRY);
    } else {
        exchange_fail(x, EV_QUEUE_FULL, RE_LIMITED, now);
    }
}

/* Whether one more may ask: other homeservers leave half of the questions
 * to ours, and one of them some to each other. */
static bool as_may_ask(const struct exchange *x)
{
    size_t far = 0, same = 0;
    for (size_t i = 0; x->endpoint == EP_AS_SERVER && i < LIM_SLOT_CNT; i++)
        if (exchange_states[i] == X_INQUIRY
            && exchange_pool[i].endpoint == EP_AS_SERVER) {
            far++;
            same += exchange_pool[i].dest == x->dest;
        }
    return far < LIM_INQ_CNT / 2 && same < LIM_DEST_LISTED;
}

/* By when a question of x must be answered. */
static int64_t as_end(const struct exchange *x, int64_t now)
{
    int64_t end = x->since + LIM_AS_MS;
    return now + LIM_INQ_MS < end ? now + LIM_INQ_MS : end;
}

/* Whether a client wants the SFU of another homeserver. */
static bool as_is_remote(const struct exchange *x)
{
    return x->endpoint == EP_AS_USER && x->r.server_name.len
        && !sl_eq(x->r.server_name, cfg.hs_name.whole);
}

/* What is passed on to another homeserver: its get_token for servers. */
static void as_build_relay(uint16_t idx, struct bb *b)
{
    const struct exchange *x = &exchange_pool[idx];
    const struct { const char *name; sl value; } part[] = {
        { "{\"destination\":", x->r.server_name },
        { ",\"method\":\"POST\",\"path\":", x->has_relayed
          ? SL("/_matrix/federation/v1/rtc/livekit/get_token")
          : SL("/_matrix/federation/unstable/io.element.msc4195/rtc/livekit/"
               "get_token") },
        { ",\"body\":{\"user_id\":", { x->user, x->user_len } },
        { ",\"url\":", x->r.url }, { ",\"room_id\":", x->r.room_id },
        { ",\"slot_id\":", x->r.slot_id },
        { ",\"member_id\":", x->r.member_id } };
    for (size_t i = 0; i < COUNT_OF(part); i++) {
        bb_str(b, part[i].name);
        js_put_str(b, part[i].value, false);
    }
    bb_str(b, "}}");
}

static void as_relay(struct exchange *x, int64_t now)
{
    uint64_t dest = dest_hash(x->r.server_name);
    struct inquiry *q = inq_relay_is_full(dest) ? NULL
        : inq_open(INQ_RELAY, SL(""), SL(""), x->since + LIM_AS_MS);
    if (q) {
        q->dest = dest;
        q->build_body = as_build_relay;
        q->body_idx = (uint16_t)(x - exchange_pool);
    }
    as_wait(x, q, now);
}

/* All is proven: the user is in the room, and so is the other server where
 * one takes part.
 * GRANTS: room creation and a token; publishing to our own users. */
static void as_proven(struct exchange *x, int64_t now)
{
    must(x->asks == 0);
    if (as_is_remote(x)) {
        as_relay(x, now);
        return;
    }
    uint8_t identity[HASH_NAME_LEN];
    struct bb id = BB(identity);
    if (!exchange_identity(x, &id)       /* a refused one leaves no room */
        || !exchange_seat(x, (sl){ identity, id.len }, now)) {
        exchange_fail(x, EV_SEATS_FULL, RE_LIMITED, now);
        return;
    }
    x->is_member = true;
    x->is_full = x->endpoint == EP_AS_USER;
    x->end = exchange_room_end(x, now);
    exchange_room(x, now);
}

/* Have the next thing proven, or go on when nothing is left. */
static void as_prove(struct exchange *x, int64_t now)
{
    while (x->asks) {
        bool user = x->asks & PROVE_USER;
        enum inq_kind kind = user ? INQ_USER : INQ_SERVER;
        sl who = user ? (sl){ x->user, x->user_len }
            : as_is_remote(x) ? x->r.server_name : cfg.hs_name.whole;
        enum inq_answer known = member_known(kind, x->r.room_id, who, now);
        if (known == INQ_NO) {
            exchange_fail(x, EV_NOT_JOINED, RE_NOT_ALLOWED, now);
            return;
        }
        if (known == INQ_UNKNOWN) {
            as_wait(x, inq_open(kind, x->r.room_id, who, as_end(x, now)),
                now);
            return;
        }
        x->asks &= (uint8_t)(x->asks - 1);
    }
    as_proven(x, now);
}

/* A token of the other homeserver's is handed on if it looks like one. */
static bool as_token_check(sl s_raw)
{
    for (size_t i = 0; i < s_raw.len; i++)
        if (!is_unreserved(s_raw.p[i]) && s_raw.p[i] != '=')
            return false;
    return s_raw.len > 0 && s_raw.len <= LIM_TOKEN_RELAY;
}

/* The other homeserver answered: its token, and its 403 and 400, are passed
 * on; all else is no answer. */
static void as_relayed(struct exchange *x, int64_t now)
{
    static uint8_t body[LIM_TOKEN_RELAY + 16];
    const struct inquiry *q = x->inq;
    const struct inq_reply *r = &q->reply;
    struct conn *c = exchange_conn(x);
    struct bb b = BB(body);
    int64_t status = q->status == 200 && !r->status.over ? r->status.v : 0;
    sl code = r->inner_errcode;
    if (status == 404 && !x->has_relayed) {
        x->has_relayed = true;
        exchange_drop(x, now);
        as_relay(x, now);
    } else if (status == 200 && as_token_check(r->jwt)) {
        bb_str(&b, "{\"jwt\":\"");
        bb_put(&b, r->jwt);
        bb_str(&b, "\"}");
        LOG(EV_RELAYED, KV("req", request_id(c)),
            KV("server", x->r.server_name));
        exchange_end(x, now);
        conn_answer(c, &(struct answer){ 200, "", { body, b.len } }, now);
    } else if ((status == 403 && sl_eq(code, SL("M_FORBIDDEN")))
               || (status == 400 && sl_eq(code, SL("M_INVALID_PARAM")))) {
        exchange_fail(x, EV_RELAY_REFUSED, status == 403 ? RE_NOT_ALLOWED
            : RE_BAD_PARAM, now);
    } else {
        exchange_fail(x, EV_RELAY_FAILED, RE_UPSTREAM, now);
    }
}

/* The delayed event was looked up: is it there, the user's, of this room,
 * and after what delay does it fire? */
static void as_delayed(struct exchange *x, int64_t now)
{
    const struct inquiry *q = x->inq;
    const struct inq_reply *r = &q->reply;
    struct js_int t = r->delay_ms.is_set ? r->delay_ms : r->delay;
    bool gone = q->status == 404 && r->errcode.len && !q->hint;
    bool other = q->status == 200 && r->is_read
        && !(sl_eq(r->delay_id, x->r.delay_id)
             && sl_eq(r->room_id, x->r.room_id));
    if (gone || other) {
        exchange_fail(x, EV_DELAY_UNKNOWN, RE_BAD_PARAM, now);
    } else if (q->status != 200 || !t.is_set || t.over || t.v <= 0) {
        exchange_fail(x, EV_AS_CALL_FAILED, RE_NO_DELAY, now);
    } else {
        x->r.delay_timeout = t;
        exchange_drop(x, now);
        exchange_delegate(x, now);
    }
}

/* A question of x is answered. */
static void as_answered(struct exchange *x, int64_t now)
{
    const struct inquiry *q = x->inq;
    enum inq_kind kind = q->kind;
    enum inq_answer answer = q->answer;
    if (answer == INQ_UNKNOWN && q->why == EV_API_UNKNOWN) {
        exchange_fail(x, EV_API_UNKNOWN, RE_NO_API, now);
    } else if (answer == INQ_UNKNOWN) {
        exchange_fail(x, EV_NONE, kind == INQ_DELAYED ? RE_NO_DELAY
            : RE_UPSTREAM, now);
    } else if (kind == INQ_RELAY) {
        as_relayed(x, now);
    } else if (kind == INQ_DELAYED) {
        as_delayed(x, now);
    } else if (answer == INQ_NO) {
        exchange_fail(x, EV_NOT_JOINED, RE_NOT_ALLOWED, now);
    } else {
        exchange_drop(x, now);
        x->asks &= (uint8_t)(x->asks - 1);
        as_prove(x, now);
    }
}

/* Who asks, by the homeserver's headers, and for whom. Returns EV_NONE, or
 * what is wrong and *re. */
MUST_USE static enum event as_who(struct exchange *x, enum reply *re)
{
    const struct conn *c = exchange_conn(x);
    bool from_server = x->endpoint == EP_AS_SERVER;
    sl who = as_header(c, from_server ? H1_MATRIX_ORIGIN : H1_MATRIX_USER);
    sl user = from_server ? x->r.user_id : who;
    x->name = cfg.hs_name;
    *re = RE_BAD_PARAM;
    if (from_server && !name_parse(who, &x->name))
        return EV_AS_IDENTITY_BAD;
    size_t cut = sl_find(user, ':');
    if (!user_check(user, sl_skip(user, cut + 1)))
        return EV_AS_IDENTITY_BAD;
    *re = RE_NOT_ALLOWED;
    if (!user_check(user, x->name.whole))
        return EV_AS_FOREIGN;
    x->user_len = (uint8_t)user.len;
    memcpy(x->user, user.p, user.len);
    *re = RE_UNAUTHORIZED;
    return x->r.claimed_user_id.len && !sl_eq(x->r.claimed_user_id, user)
        ? EV_CLAIM_MISMATCH : EV_NONE;
}

/* The body is well-formed: who asks, what for, and what is to be proven. */
static void as_begin(struct exchange *x, int64_t now)
{
    enum reply re;
    enum event ev = as_who(x, &re);
    struct name n = x->name;
    bool remote = as_is_remote(x);
    bool two = x->r.old_member_id.len
        && !sl_eq(x->r.old_member_id, x->r.member_id);
    x->dest = dest_hash(x->name.whole);
    x->is_listed = name_is_listed(x->name.whole);
    enum event rate = ev ? EV_NONE : exchange_rate(x, now);
    if (ev != EV_NONE)
        exchange_fail(x, ev, re, now);
    else if (two || !is_one_word(x->r.room_id)
             || !sl_starts(x->r.room_id, SL("!"))
             || (remote && !name_parse(x->r.server_name, &n)))
        exchange_fail(x, EV_FIELD_BAD, RE_BAD_PARAM, now);
    else if (rate != EV_NONE || !as_may_ask(x))
        exchange_fail(x, rate ? rate : EV_QUEUE_FULL, RE_LIMITED, now);
    else if ((remote || x->endpoint == EP_AS_SERVER) && name_denied(&n))
        exchange_fail(x, EV_SERVER_DENIED, RE_NOT_ALLOWED, now);
    else if (!remote && !sl_eq(x->r.url, cfg.livekit_url))
        exchange_fail(x, EV_AS_URL, RE_BAD_PARAM, now);
    else if (!exchange_alias(x))
        exchange_fail(x, EV_BUG_OVERFLOW, RE_INTERNAL, now);
    else if (x->endpoint == EP_AS_DELEGATE)
        as_wait(x, inq_open(INQ_DELAYED, x->r.delay_id,
            (sl){ x->user, x->user_len }, as_end(x, now)), now);
    else {
        x->asks = (uint8_t)(PROVE_USER | (remote
            || x->endpoint == EP_AS_SERVER ? PROVE_SERVER : 0));
        as_prove(x, now);
    }
}

/* Move on after a wake or at the deadline. */
static enum step exchange_step(size_t idx, int revents, int64_t now)
{
    struct exchange *x = &exchange_pool[idx];
    (void)revents;
    switch (x->state) {
    case X_FREE:
        break;
    case X_WAIT:
        exchange_admit(x, now);
        break;
    case X_LOOKUP:
        exchange_step_lookup(x, now);
        break;
    case X_API:
        exchange_delegate(x, now);
        break;
    case X_ROOM_WAIT:
        if (now >= x->end)
            exchange_fail(x, EV_CHAN_FULL, RE_SFU, now);
        else
            exchange_room(x, now);
        break;
    case X_ROOM:
        exchange_step_room(x, now);
        break;
    case X_ROOM_PAUSE:
        if (now >= x->since)
            exchange_room(x, now);
        break;
    case X_STORE:
        if (store_is_done[idx])
            exchange_delegated(x, now);
        break;
    case X_FOLLOW:
        exchange_step_follow(x, now);
        break;
    case X_INQUIRY:
        if (x->inq->state == I_DONE)
            as_answered(x, now);
        break;
    }
    return STEP_WAIT;
}

/* An API's lookup ended, or its queue may go on. */
static enum step api_step(size_t idx, int revents, int64_t now)
{
    struct api *a = &api_pool[idx];
    bool was_pending = a->lookup != NULL;
    (void)revents;
    api_resolved(a, now);
    for (size_t i = 0; was_pending && !a->lookup && i < LIM_SLOT_CNT; i++)
        if (exchange_states[i] == X_API && exchange_pool[i].api == a)
            loop_wake(KIND_EXCHANGE, i);
    if (was_pending && !a->lookup)
        exchange_wake_next(0, now);
    for (size_t i = 0; was_pending && !a->lookup && i < LIM_INQ_CNT; i++)
        if (inq_pool[i].state == I_WAIT)
            loop_wake(KIND_INQUIRY, i);
    job_run_queue(a, now);
    return STEP_WAIT;
}

/* Whether others of this server wait already: a newcomer joins them. */
static bool exchange_has_queue(uint64_t dest)
{
    for (size_t i = 0; met.gauge[GA_WAITING] && i < LIM_SLOT_CNT; i++)
        if (exchange_states[i] == X_WAIT && exchange_hot[i].dest == dest)
            return true;
    return false;
}

/* Whether one more may wait for this server, for a slot or for the answer
 * that another gets (SECURITY section 4). */
static bool exchange_may_wait(const struct exchange *x)
{
    size_t strangers = 0, same = 0;
    if (x->is_listed)
        return true;
    for (size_t i = 0; i < LIM_SLOT_CNT; i++)
        if (exchange_states[i] == X_WAIT
            || (exchange_states[i] == X_FOLLOW
                && !exchange_hot[i].is_proven)) {
            strangers += !exchange_hot[i].is_listed;
            same += exchange_hot[i].dest == x->dest;
        }
    return strangers < LIM_WAIT_STRANGER
        && same < (cfg.is_open ? LIM_WAIT_OPEN : LIM_WAIT_DEST);
}

/* Join who asks already, start the lookup, or queue for it. */
static void exchange_enter(struct exchange *x, int64_t now)
{
    size_t leader = exchange_find_lookup(x);
    bool joins = leader < LIM_SLOT_CNT;
    if (!joins && !exchange_has_queue(x->dest)
        && lookup_may_open(x->dest, x->is_listed, now))
        exchange_admit(x, now);
    else if (!exchange_may_wait(x))
        exchange_fail(x, EV_QUEUE_FULL, RE_LIMITED, now);
    else if (joins)
        exchange_follow(x, leader);
    else {
        x->turn = exchange_next_turn(x);
        exchange_queue(x, now);
    }
}

/* Steps 2 to 7 of PROTOCOL section 4, then the lookup. */
static void exchange_start(struct conn *c, enum endpoint endpoint,
    int64_t now)
{
    struct exchange *x = &exchange_pool[conn_idx(c)];
    uint8_t *body = intake_body(&c->body, conn_in[conn_idx(c)], c->head_len);
    must(x->state == X_FREE);
    sl addr = { c->client.b, c->client.v6 ? 8 : 4 };
    if (cfg.rate_addr.burst && c->has_client
        && endpoint < EP_AS_USER && !rate_ok(memo_key(
            c->client.v6 ? '6' : '4', addr), &cfg.rate_addr, now)) {
        conn_log_addr(&c->client, request_id(c));
        conn_error(c, RE_LIMITED, NULL, now);
        return;
    }
    memset(x, 0, sizeof *x);
    x->endpoint = endpoint;
    x->since = now;
    int err = js_parse(body, c->body.len, &request_tab[endpoint], &x->r);
    if (!err && x->r.expires_in.over)
        err = -EV_JSON_TYPE;
    if (err) {
        LOG(c->body.len ? (enum event)-err : EV_BODY_EMPTY,
            KV("req", request_id(c)));
        conn_error(c, RE_NOT_JSON, NULL, now);
        return;
    }
    if (x->r.member_id.len == 0)
        x->r.member_id = x->r.old_member_id;
    if (!request_check_fields(c, x, now)
        || !request_check_delay(c, x, now))
        return;
    met.gauge[GA_EXCHANGES]++;
    if (endpoint >= EP_AS_USER) {
        as_begin(x, now);
        return;
    }
    if (!name_parse(x->r.server_name, &x->name)) {
        x->name.whole = x->r.server_name;
        exchange_fail(x, EV_NAME_BAD, RE_UNAUTHORIZED, now);
        return;
    }
    x->dest = dest_hash(x->name.whole);
    x->is_listed = name_is_listed(x->name.whole);
    if (name_denied(&x->name))
        exchange_fail(x, EV_SERVER_DENIED, RE_UNAUTHORIZED, now);
    else if (!is_one_word(x->r.access_token))
        exchange_fail(x, EV_TOKEN_BAD, RE_UNAUTHORIZED, now);
    else
        exchange_enter(x, now);
}

static void srv_exchange(struct conn *c, int64_t now)
{
    exchange_start(c, (enum endpoint)c->route->endpoint, now);
}

/* Any method: are you there, and is the token the right one? */
static void srv_as_ping(struct conn *c, int64_t now)
{
    if (!as_refused(c, now))
        conn_answer(c, &(struct answer){ 200, "", SL("{}") }, now);
}

/* Take a verified webhook that no stream carries. With other replicas that
 * do not get it the SFU is asked to send it again. */
static void webhook_alone(struct conn *c, const uint8_t sum[32], int64_t now)
{
    struct webhook w;
    uint8_t *body = intake_body(&c->body, conn_in[conn_idx(c)], c->head_len);
    bool shared = store_mode == STORE_SHARED && rep.cnt > 1;
    if (webhook_parse(body, c->body.len, &w)) {
        webhook_act(&w, sum, request_id(c), !shared, io_wall_ms(), now);
    } else {
        shared = false;
        LOG(EV_WEBHOOK_BAD, KV("req", request_id(c)),
            KV("reason", SL("body")));
    }
    conn_answer(c, &(struct answer){ shared ? 503 : 200, "", { NULL, 0 } },
        now);
}

/* Redis has the webhook, or not. */
static void webhook_done(uint16_t idx, const struct rsp *e, int64_t now)
{
    struct conn *c = &conn_pool[idx];
    uint8_t sum[32];
    must(c->state == C_WAIT);
    if (e && e->type == RSP_BULK) {
        conn_answer(c, &(struct answer){ 200, "", { NULL, 0 } }, now);
        return;
    }
    if (e)
        store_refused("XADD", e, now);
    sha256((sl){ intake_body(&c->body, conn_in[idx], c->head_len),
        c->body.len }, sum);
    webhook_alone(c, sum, now);
}

/* Append a verified webhook to the stream, unchanged; all replicas, this
 * one too, judge its body where they read it. */
static void webhook_share(struct conn *c, int64_t now)
{
    static const struct rds_op op = { "XADD", 1, 0, 0, NULL, webhook_done };
    sl in = { conn_in[conn_idx(c)], c->in_len };
    sl body = { intake_body(&c->body, conn_in[conn_idx(c)], c->head_len),
        c->body.len };
    sl token = h1_get(in, &c->head, H1_AUTHORIZATION);
    uint8_t max[20];
    if (rds_has_room(RDS_MAIN, body.len + token.len + 512, 8)) {
        rds_send(RDS_MAIN, &op, (uint16_t)conn_idx(c), (sl[]){ SL("XADD"),
            sl_str(store_stream), SL("MAXLEN"), SL("~"),
            text_u64(max, LIM_STREAM_LEN), SL("*"), SL("token"), token,
            SL("body"), body }, 10, now);
        return;
    }
    LOG(EV_BODY_POOL, KV("req", request_id(c)));
    conn_answer(c, &(struct answer){ 503, "", { NULL, 0 } }, now);
}

/* POST /sfu_webhook: 200 whatever it was, so that LiveKit does not repeat
 * it, but for one that could not be kept; nothing happens before signature
 * and body hash hold. */
static void srv_webhook(struct conn *c, int64_t now)
{
    uint8_t sum[32], want[36];
    sha256((sl){ intake_body(&c->body, conn_in[conn_idx(c)], c->head_len),
        c->body.len }, sum);
    const char *why = webhook_token(c, want);
    if (!why && !ct_eq(sum, want, 32))
        why = "body hash";
    if (why) {
        LOG(EV_WEBHOOK_BAD, KV("req", request_id(c)),
            KV("reason", sl_str(why)));
        conn_answer(c, &(struct answer){ 200, "", { NULL, 0 } }, now);
    } else if (stream_is_shared() && webhook_seen(sum, false, now)) {
        LOG(EV_WEBHOOK_DUPLICATE, KV("req", request_id(c)));
        conn_answer(c, &(struct answer){ 200, "", { NULL, 0 } }, now);
    } else if (stream_is_shared()) {
        webhook_share(c, now);
    } else {
        webhook_alone(c, sum, now);
    }
}

/* ==== 23 IO ======================== PART III: WORLD ==================
 * Purpose  The system calls, each behind one function; EINTR is retried.
 * INV-I1   Network addresses are connected to in io_connect only, as
 *          net_allowed judged them; a unix socket is the operator's.
 */

static int64_t io_clock(clockid_t id, int64_t per_second)
{
    struct timespec t;
    clock_gettime(id, &t);
    return (int64_t)t.tv_sec * per_second
        + t.tv_nsec / (1000000000 / per_second);
}

static int64_t io_now(void)
{
    return io_clock(CLOCK_BOOTTIME, 1000);
}

static int64_t io_now_us(void)
{
    return io_clock(CLOCK_MONOTONIC, 1000000);
}

static int64_t io_wall_ms(void)
{
    return io_clock(CLOCK_REALTIME, 1000);
}

/* Fill p from the kernel's generator; without one there is no service. */
static void io_random(void *p, size_t len)
{
    uint8_t *at = p;
    while (len) {
        long n = syscall(SYS_getrandom, at, len, 0);
        if (n < 0 && errno == EINTR)
            continue;
        must(n > 0);
        at += n;
        len -= (size_t)n;
    }
}

static int io_statm_fd = -1;

/* CPU time in microseconds, resident bytes (0 when /proc is missing). */
static void io_usage(int64_t *cpu_us, int64_t *resident)
{
    char text[128];
    *cpu_us = io_clock(CLOCK_PROCESS_CPUTIME_ID, 1000000);
    *resident = 0;
    ssize_t n = io_statm_fd < 0 ? 0
        : pread(io_statm_fd, text, sizeof text, 0);
    sl rest = { (uint8_t *)text, n > 0 ? (size_t)n : 0 }, word;
    uint64_t pages;
    if (sl_word(&rest, " \n", &word) && sl_word(&rest, " \n", &word)
        && sl_u64(word, INT32_MAX, &pages))
        *resident = (int64_t)pages * sysconf(_SC_PAGESIZE);
}

static socklen_t io_sockaddr(const struct addr *a,
    struct sockaddr_storage *out)
{
    struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)(void *)out;
    struct sockaddr_in *v4 = (struct sockaddr_in *)(void *)out;
    memset(out, 0, sizeof *out);
    if (a->ip.v6) {
        v6->sin6_family = AF_INET6;
        v6->sin6_port = htons(a->port);
        memcpy(&v6->sin6_addr, a->ip.b, 16);
        return sizeof *v6;
    }
    v4->sin_family = AF_INET;
    v4->sin_port = htons(a->port);
    memcpy(&v4->sin_addr, a->ip.b, 4);
    return sizeof *v4;
}

static void io_nodelay(int fd)
{
    int one = 1;
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

/* What a call for a socket returned: the descriptor, or -errno. One that is
 * too high for the loop's table is given back. */
static int io_fd(int fd)
{
    if (fd < 0)
        return -errno;
    if (fd < LIM_FD_CNT)
        return fd;
    close(fd);
    return -EMFILE;
}

/* The next waiting client: its descriptor, or -errno. */
static int io_accept(int listener, struct ip *peer)
{
    struct sockaddr_storage sa = { .ss_family = AF_UNSPEC };
    socklen_t len = sizeof sa;
    int fd;
    do
        fd = accept4(listener, (struct sockaddr *)&sa, &len,
            SOCK_NONBLOCK | SOCK_CLOEXEC);
    while (fd < 0 && (errno == EINTR || errno == ECONNABORTED));
    fd = io_fd(fd);
    if (fd < 0)
        return fd;
    *peer = (struct ip){ .v6 = sa.ss_family == AF_INET6 };
    if (sa.ss_family == AF_INET)
        memcpy(peer->b, &((struct sockaddr_in *)&sa)->sin_addr, 4);
    else if (peer->v6)
        memcpy(peer->b, &((struct sockaddr_in6 *)&sa)->sin6_addr, 16);
    *peer = ip_unwrap(*peer);
    io_nodelay(fd);
    return fd;
}

static int io_spare(int fd)
{
    int copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    return copy < 0 ? -errno : copy;
}

/* Begin a connection. Returns the descriptor; -EACCES: denied by policy. */
static int io_connect(const struct addr *a, const struct trust *t, bool udp)
{
    struct sockaddr_storage sa;
    socklen_t len = io_sockaddr(a, &sa);
    if (!net_allowed(a, t))
        return -EACCES;
    int fd = io_fd(socket(sa.ss_family, (udp ? SOCK_DGRAM : SOCK_STREAM)
        | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    if (fd < 0)
        return fd == -EACCES ? -EPERM : fd;
    if (!udp)
        io_nodelay(fd);
    if (connect(fd, (struct sockaddr *)&sa, len) < 0 && errno != EINPROGRESS
        && errno != EINTR) {
        int err = errno == EACCES ? EPERM : errno;
        close(fd);
        return -err;
    }
    return fd;
}

/* Fill a unix socket address. False: the path is too long. */
static bool io_unix_addr(sl path, struct sockaddr_un *out)
{
    memset(out, 0, sizeof *out);
    out->sun_family = AF_UNIX;
    if (path.len >= sizeof out->sun_path)
        return false;
    memcpy(out->sun_path, path.p, path.len);
    return true;
}

/* Begin a connection to a unix socket. Returns the descriptor or -errno. */
static int io_connect_unix(sl path)
{
    struct sockaddr_un sa;
    if (!io_unix_addr(path, &sa))
        return -ENAMETOOLONG;
    int fd = io_fd(socket(AF_UNIX,
        SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    if (fd < 0 || connect(fd, (struct sockaddr *)&sa, sizeof sa) == 0)
        return fd;
    int err = errno;
    io_close(&fd);
    return -err;
}

/* How a pending connection ended: 0 or -errno. */
static int io_connected(int fd)
{
    int err = 0;
    socklen_t len = sizeof err;
    if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &len) < 0)
        return -errno;
    return -err;
}

static ssize_t io_read(int fd, uint8_t *p, size_t len)
{
    ssize_t n;
    do
        n = read(fd, p, len);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n;
}

static ssize_t io_write(int fd, sl s)
{
    ssize_t n;
    do
        n = write(fd, s.p, s.len);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n;
}

static void io_shutdown(int fd)
{
    (void)shutdown(fd, SHUT_WR);
}

static void io_close(int *fd)
{
    if (*fd >= 0) {
        loop_closed(*fd);
        close(*fd);
    }
    *fd = -1;
}

/* Write a line to stderr, or count it as lost: a full pipe must not stop
 * the loop. A pipe that polls writable takes a line of 2 KB whole. */
static void io_log(sl line)
{
    struct pollfd p = { 2, POLLOUT, 0 };
    if (poll(&p, 1, 0) != 1 || !(p.revents & POLLOUT)
        || io_write(2, line) < 0)
        met.log_lost++;
}

/* A file that is re-read when it changes. */
struct watched {
    const char *path;
    int64_t checked;
    struct timespec mtime;
    ino_t ino;
    off_t size;
    bool is_read;
};

/* Read a whole file into buf. Returns its length, at most cap, or -errno. */
static ssize_t io_read_file(const char *path, uint8_t *buf, size_t cap)
{
    size_t len = 0;
    ssize_t n = 0;
    int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    while (len < cap && (n = io_read(fd, buf + len, cap - len)) > 0)
        len += (size_t)n;
    close(fd);
    return n < 0 ? n : (ssize_t)len;
}

/* stat(2) by the one call that the sandbox allows (a flag makes libc use
 * it on all architectures). */
static int io_stat(const char *path, struct stat *st)
{
    return fstatat(AT_FDCWD, path, st, AT_NO_AUTOMOUNT);
}

/* Whether a watched file is new since the last call; looked at once a
 * second at most. */
static bool io_changed(struct watched *w)
{
    struct stat st;
    int64_t now = io_now();
    if (w->is_read && now < w->checked + 1000)
        return false;
    w->checked = now;
    if (io_stat(w->path, &st) < 0)
        memset(&st, 0, sizeof st);
    bool same = w->is_read && st.st_ino == w->ino && st.st_size == w->size
        && st.st_mtim.tv_sec == w->mtime.tv_sec
        && st.st_mtim.tv_nsec == w->mtime.tv_nsec;
    w->is_read = true;
    w->ino = st.st_ino;
    w->size = st.st_size;
    w->mtime = st.st_mtim;
    return !same;
}

/* Text of the hosts file, empty when there is none. */
static sl io_hosts(void)
{
    static struct watched w;
    static uint8_t text[LIM_HOSTS_LEN], next[LIM_HOSTS_LEN];
    static size_t len;
    w.path = cfg.hosts_file.len ? (const char *)cfg.hosts_file.p
        : "/etc/hosts";
    if (io_changed(&w)) {
        ssize_t n = io_read_file(w.path, next, sizeof next);
        if (n >= 0)
            memcpy(text, next, (size_t)n);
        if (n >= 0 || n == -ENOENT)      /* else the old text stays */
            len = n > 0 ? (size_t)n : 0;
        LOG(EV_FILES_READ, KV("file", sl_str(w.path)),
            KV("error", n < 0 ? sl_str(strerror((int)-n))
                              : (sl){ NULL, 0 }));
    }
    return (sl){ text, len };
}

/* The nameservers: LKJWT_RESOLVER, else resolv.conf as it is now. */
static const struct resolv *io_resolv(void)
{
    static struct watched w = { .path = "/etc/resolv.conf" };
    static struct resolv r;
    uint8_t text[8192];
    if (cfg.has_resolver)
        return &cfg.resolver;
    if (io_changed(&w)) {
        ssize_t n = io_read_file(w.path, text, sizeof text);
        cf_resolv_parse((sl){ text, n > 0 ? (size_t)n : 0 }, &r);
        LOG(EV_FILES_READ, KV("file", sl_str(w.path)),
            KV("error", n < 0 ? sl_str(strerror((int)-n))
                              : (sl){ NULL, 0 }));
    }
    return &r;
}

/* A listening socket for a bind value; -errno. Both families are tried for
 * a bare port where IPv6 is missing. */
static int io_listen(const struct addr *a, bool is_dual)
{
    struct sockaddr_storage sa;
    socklen_t len = io_sockaddr(a, &sa);
    int one = 1, only = !is_dual;
    int fd = socket(sa.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC,
        0);
    if (fd < 0)
        return -errno;
    (void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (a->ip.v6)
        (void)setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &only, sizeof only);
    if (bind(fd, (struct sockaddr *)&sa, len) < 0 || listen(fd, 1024) < 0) {
        int err = errno;
        close(fd);
        return -err;
    }
    return fd;
}

/* Listen on a unix socket, mode 0666 less the umask. A stale socket that
 * nobody listens on is removed first. */
static int io_listen_unix(sl path)
{
    struct sockaddr_un sa;
    if (!io_unix_addr(path, &sa))
        return -ENAMETOOLONG;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    struct stat st;
    if (stat(sa.sun_path, &st) == 0 && S_ISSOCK(st.st_mode)) {
        int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (probe >= 0 && connect(probe, (struct sockaddr *)&sa, sizeof sa)
            < 0 && errno == ECONNREFUSED)
            (void)unlink(sa.sun_path);
        if (probe >= 0)
            close(probe);
    }
    mode_t mask = umask(0);
    (void)umask(mask);
    if (bind(fd, (struct sockaddr *)&sa, sizeof sa) < 0
        || chmod(sa.sun_path, 0666 & ~mask) < 0 || listen(fd, 1024) < 0) {
        int err = errno;
        close(fd);
        return -err;
    }
    return fd;
}

/* The port a listener got, for :0. */
static uint16_t io_port(int fd)
{
    struct sockaddr_storage sa;
    socklen_t len = sizeof sa;
    if (getsockname(fd, (struct sockaddr *)&sa, &len) < 0)
        return 0;
    return ntohs(sa.ss_family == AF_INET6
        ? ((struct sockaddr_in6 *)(void *)&sa)->sin6_port
        : ((struct sockaddr_in *)(void *)&sa)->sin_port);
}

/* ==== 24 CONFIG ==================== PART III: WORLD ==================
 * Purpose  The environment, as one table; the files it names; the trust
 *          anchors. All faults are told at once.
 * Trust    The operator's. Values of secrets are never printed.
 */

static uint8_t cfg_text[LIM_CONFIG_LEN];     /* values read from files */
static size_t cfg_text_len;
static unsigned cfg_fault_cnt;
static uint8_t file_buf[LIM_FILE_LEN];

enum env_kind { ENV_OTHER, ENV_SECRET, ENV_TEXT, ENV_FLAG, ENV_NUMBER,
    ENV_LIST, ENV_OVERRIDE, ENV_RATE, ENV_CIDRS };

#define TO(member) &cfg.member
/* X(name, kind, target, count, min, max, scale, default, help) */
#define ENV_TAB(X) \
    X(LIVEKIT_URL, ENV_OTHER, NULL, NULL, 0, 0, 0, "required", \
      "URL of the SFU given to clients: ws(s):// or http(s)://") \
    X(LIVEKIT_KEY, ENV_SECRET, NULL, NULL, 0, 0, 0, "required", \
      "API key of the SFU") \
    X(LIVEKIT_SECRET, ENV_SECRET, NULL, NULL, 0, 0, 0, "required", \
      "API secret of the SFU, 32 bytes or more") \
    X(LIVEKIT_KEY_FROM_FILE, ENV_OTHER, NULL, NULL, 0, 0, 0, "", \
      "file holding the API key; wins over LIVEKIT_KEY") \
    X(LIVEKIT_SECRET_FROM_FILE, ENV_OTHER, NULL, NULL, 0, 0, 0, "", \
      "file holding the API secret; wins over LIVEKIT_SECRET") \
    X(LIVEKIT_KEY_FILE, ENV_OTHER, NULL, NULL, 0, 0, 0, "", \
      "file of `key: secret` lines; the first pair signs; wins over all") \
    X(LIVEKIT_FULL_ACCESS_HOMESERVERS, ENV_LIST, TO(full_access), \
      TO(full_access_cnt), 0, 0, 0, "required", \
      "server names whose users may create rooms; `*` alone: everyone") \
    X(LIVEKIT_JWT_BIND, ENV_OTHER, NULL, NULL, 0, 0, 0, ":8080", \
      ":port, host:port, [v6]:port, unix:/path or /path") \
    X(LIVEKIT_JWT_PORT, ENV_OTHER, NULL, NULL, 0, 0, 0, "", \
      "deprecated: the port of LIVEKIT_JWT_BIND") \
    X(LIVEKIT_LOG_LEVEL, ENV_OTHER, NULL, NULL, 0, 0, 0, "info", \
      "debug, info, warning or error") \
    X(LIVEKIT_INSECURE_SKIP_VERIFY_TLS, ENV_OTHER, NULL, NULL, 0, 0, 0, "", \
      "YES_I_KNOW_WHAT_I_AM_DOING turns certificate checks off") \
    X(LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS, ENV_NUMBER, TO(sanity_s), NULL, \
      0, INT32_MAX, 1, "0", "interval of delegated-leave checks; 0 is off") \
    X(LIVEKIT_CS_API_URL_OVERRIDES, ENV_OVERRIDE, TO(cs), TO(cs_cnt), \
      0, 0, 0, "", "name=url,...: client-server API of a homeserver") \
    X(LIVEKIT_CAN_UPDATE_OWN_METADATA, ENV_FLAG, TO(can_update), NULL, \
      0, 0, 0, "true", "grant canUpdateOwnMetadata") \
    X(LKJWT_FEDERATION_API_URL_OVERRIDES, ENV_OVERRIDE, TO(fed), \
      TO(fed_cnt), 0, 0, 0, "", \
      "name=url,...: where to ask for a homeserver's users") \
    X(LKJWT_RESTRICTED_CAN_PUBLISH, ENV_FLAG, TO(restricted_publish), NULL, \
      0, 0, 0, "false", "restricted users may publish") \
    X(LKJWT_LIVEKIT_API_URL, ENV_OTHER, NULL, NULL, 0, 0, 0, "", \
      "URL of the SFU for our own calls, instead of LIVEKIT_URL") \
    X(LKJWT_PATH_PREFIX, ENV_TEXT, TO(prefix), NULL, 0, 0, 0, "", \
      "path prefix that the proxy leaves in, such as /livekit/jwt") \
    X(LKJWT_ALLOWED_HOMESERVERS, ENV_LIST, TO(allowed), TO(allowed_cnt), \
      0, 0, 0, "", "only these server names are looked up; *.suffix") \
    X(LKJWT_BLOCKED_HOMESERVERS, ENV_LIST, TO(blocked), TO(blocked_cnt), \
      0, 0, 0, "", "these server names are refused; *.suffix") \
    X(LKJWT_ALLOW_NETWORKS, ENV_CIDRS, TO(network), TO(network_cnt), 0, 0, \
      0, "", \
      "CIDRs that any homeserver may lie in") \
    X(LKJWT_PRIVATE_NETWORKS, ENV_OTHER, NULL, NULL, 0, 0, 0, "auto", \
      "deny: no private address but by LKJWT_ALLOW_NETWORKS") \
    X(SSL_CERT_FILE, ENV_TEXT, TO(cert_file), NULL, 0, 0, 0, "", \
      "PEM file of trust anchors, instead of the system's bundle") \
    X(SSL_CERT_DIR, ENV_TEXT, TO(cert_dir), NULL, 0, 0, 0, "", \
      "folders of PEM files, instead of the system's; colons between") \
    X(LKJWT_CA_FILE, ENV_TEXT, TO(ca_file), NULL, 0, 0, 0, "", \
      "PEM file of further trust anchors") \
    X(LKJWT_CA_ONLY, ENV_FLAG, TO(ca_only), NULL, 0, 0, 0, "false", \
      "trust only the files named here") \
    X(LKJWT_RESOLVER, ENV_OTHER, NULL, NULL, 0, 0, 0, "", \
      "ip[:port],...: nameservers instead of /etc/resolv.conf") \
    X(LKJWT_HOSTS_FILE, ENV_TEXT, TO(hosts_file), NULL, 0, 0, 0, \
      "/etc/hosts", "hosts file") \
    X(LKJWT_METRICS_BIND, ENV_OTHER, NULL, NULL, 0, 0, 0, "", \
      "listener for GET /metrics; off when unset") \
    X(LKJWT_LOG_FORMAT, ENV_OTHER, NULL, NULL, 0, 0, 0, "logfmt", \
      "logfmt or json") \
    X(LKJWT_TOKEN_TTL_S, ENV_NUMBER, TO(token_ttl_s), NULL, 60, 86400, 1, \
      "3600", "lifetime of join tokens, seconds") \
    X(LKJWT_MAX_BODY, ENV_NUMBER, TO(max_body), NULL, 1024, LIM_BODY_LEN, \
      1, "65536", "request body limit, bytes") \
    X(LKJWT_MAX_CONNS, ENV_NUMBER, TO(max_conns), NULL, 1, LIM_CONN_CNT, 1, \
      "1024", "client connections") \
    X(LKJWT_KEEPALIVE_S, ENV_NUMBER, TO(keepalive_ms), NULL, 1, 86400, \
      1000, "650", "idle client connections are closed after, seconds") \
    X(LKJWT_LOOKUP_TIMEOUT_S, ENV_NUMBER, TO(lookup_ms), NULL, 1, 60, 1000, \
      "20", "a homeserver lookup in all, seconds") \
    X(LKJWT_LOOKUPS_MAX, ENV_NUMBER, TO(lookups_max), NULL, 1, LIM_UP_CNT, \
      1, "192", "homeserver lookups at once") \
    X(LKJWT_LOOKUPS_PER_SERVER, ENV_NUMBER, TO(lookups_per_server), NULL, \
      1, LIM_DEST_CNT, 1, "16", "of them per server not named here") \
    X(LKJWT_JOBS_MAX, ENV_NUMBER, TO(jobs_max), NULL, 0, LIM_JOB_CNT, 1, \
      "10000", "delegated leaves held") \
    X(LKJWT_JOBS_PER_USER, ENV_NUMBER, TO(jobs_per_user), NULL, 0, \
      LIM_JOB_CNT, 1, "16", "of them per user") \
    X(LKJWT_BREAKER_FAILURES, ENV_NUMBER, TO(breaker), NULL, 0, 100, 1, "5", \
      "failures running after which a peer is not asked for a while; 0: off") \
    X(LKJWT_TLS_COLD_PER_S, ENV_NUMBER, TO(tls_cold_per_s), NULL, 0, 1000, \
      1, "25", "full TLS handshakes a second with servers not named here") \
    X(LKJWT_RATE_USER, ENV_RATE, TO(rate_user), NULL, 0, 0, 0, "30:0.5", \
      "requests of a user: burst:per_second, or off") \
    X(LKJWT_RATE_SERVER, ENV_RATE, TO(rate_server), NULL, 0, 0, 0, \
      "200:20", "the same of a server not named here; under the lone `*` " \
      "2000:100") \
    X(LKJWT_RATE_ROOMS_USER, ENV_RATE, TO(rate_room_user), NULL, 0, 0, 0, \
      "20:0.0167", "new rooms of a user under the lone `*`") \
    X(LKJWT_RATE_ROOMS_SERVER, ENV_RATE, TO(rate_room_server), NULL, \
      0, 0, 0, "500:5", "the same of a server") \
    X(LKJWT_RATE_ADDR, ENV_RATE, TO(rate_addr), NULL, 0, 0, 0, "off", \
      "requests of a client address; needs LKJWT_TRUSTED_PROXIES") \
    X(LKJWT_CONNS_PER_ADDR, ENV_NUMBER, TO(conns_per_addr), NULL, 0, \
      LIM_CONN_CNT, 1, "0", "connections of a client address; 0: off; " \
      "needs LKJWT_TRUSTED_PROXIES") \
    X(LKJWT_TRUSTED_PROXIES, ENV_CIDRS, TO(proxy), TO(proxy_cnt), 0, 0, 0, \
      "", "CIDRs of proxies whose X-Forwarded-For is believed") \
    X(LKJWT_LAME_DUCK_S, ENV_NUMBER, TO(lame_duck_ms), NULL, 0, 600, 1000, \
      "0", "seconds from SIGTERM to the end of accepting") \
    X(LKJWT_DRAIN_S, ENV_NUMBER, TO(drain_ms), NULL, 0, 600, 1000, "7", \
      "seconds for requests in flight after that") \
    X(LKJWT_JAIL, ENV_OTHER, NULL, NULL, 0, 0, 0, "auto", \
      "sandbox: auto, require (end where a layer does not hold) or off") \
    X(LKJWT_UID, ENV_NUMBER, TO(uid), NULL, 0, INT32_MAX, 1, "65532", \
      "user and group to become when started as root; 0: stay root") \
    X(LKJWT_STRICT, ENV_OTHER, NULL, NULL, 0, 0, 0, "", \
      "yes: short secrets, `*`, TLS-off, ws:// to a public host are fatal") \
    X(LIVEKIT_REDIS_URL, ENV_SECRET, NULL, NULL, 0, 0, 0, "", \
      "redis(s)://[user:password@]host[:port][/db] or unix://path: keeps " \
      "delegated leaves") \
    X(LIVEKIT_REDIS_PASSWORD, ENV_SECRET, NULL, NULL, 0, 0, 0, "", \
      "password, instead of the URL's") \
    X(LKJWT_REDIS_PASSWORD_FROM_FILE, ENV_OTHER, NULL, NULL, 0, 0, 0, "", \
      "file holding it") \
    X(LIVEKIT_AS_TOKEN, ENV_SECRET, NULL, NULL, 0, 0, 0, "", \
      "application service: our token at the homeserver") \
    X(LIVEKIT_HS_TOKEN, ENV_SECRET, NULL, NULL, 0, 0, 0, "", \
      "the homeserver's token at us") \
    X(LKJWT_AS_TOKEN_FROM_FILE, ENV_OTHER, NULL, NULL, 0, 0, 0, "", \
      "file holding LIVEKIT_AS_TOKEN") \
    X(LKJWT_HS_TOKEN_FROM_FILE, ENV_OTHER, NULL, NULL, 0, 0, 0, "", \
      "file holding LIVEKIT_HS_TOKEN") \
    X(LIVEKIT_AS_REGISTRATION_FILE, ENV_OTHER, NULL, NULL, 0, 0, 0, "", \
      "registration file (YAML) with both tokens; wins over all four") \
    X(LIVEKIT_HS_SERVER_NAME, ENV_OTHER, NULL, NULL, 0, 0, 0, "", \
      "server name of the homeserver whose application service this is") \
    X(LIVEKIT_MEMBERSHIP_CHECK_INTERVAL_SECONDS, ENV_NUMBER, TO(member_ms), \
      NULL, 0, 86400, 1000, "60", \
      "its users are removed from the SFU so soon after the room; 0: never") \
    X(LKJWT_STANDALONE, ENV_OTHER, NULL, NULL, 0, 0, 0, "on", \
      "off: only the homeserver may ask, no OpenID token is looked up")

static const struct env_row {
    const char *name;
    enum env_kind kind;
    void *to;
    size_t *cnt;
    int64_t min, max, scale;
    const char *def, *help;
} env_tab[] = {
#define X(name, kind, to, cnt, min, max, scale, def, help) \
    { #name, kind, to, cnt, min, max, scale, def, help },
    ENV_TAB(X)
#undef X
};

/* Old or rival names, used when the current one is unset. */
static const struct { const char *old, *name; } env_alias_tab[] = {
    { "LK_JWT_PORT", "LIVEKIT_JWT_PORT" },
    { "LIVEKIT_LOCAL_HOMESERVERS", "LIVEKIT_FULL_ACCESS_HOMESERVERS" },
    { "LIVEKIT_API_KEY", "LIVEKIT_KEY" },
    { "LIVEKIT_API_SECRET", "LIVEKIT_SECRET" },
};

static void cfg_say(enum event ev, const char *name, const char *text)
{
    LOG(ev, KV("var", sl_str(name)), KV("detail", sl_str(text)));
    cfg_fault_cnt += ev == EV_CONFIG_BAD;
}

/* The value of one variable; empty counts as unset, and so does what
 * Kubernetes sets for a service of that name (LK_JWT_PORT=tcp://...). */
static sl env_raw(const char *name)
{
    sl v = sl_str(getenv(name));
    bool is_port = sl_ends(sl_str(name), SL("_PORT"));
    return is_port && sl_starts(v, SL("tcp://")) ? (sl){ NULL, 0 } : v;
}

/* The value of a variable, or of its old name. */
static sl env_get(const char *name)
{
    sl v = env_raw(name);
    for (size_t i = 0; v.len == 0 && i < COUNT_OF(env_alias_tab); i++)
        if (strcmp(env_alias_tab[i].name, name) == 0)
            v = env_raw(env_alias_tab[i].old);
    return v;
}

/* A file's trimmed text, kept. False: unreadable or no room; told. */
MUST_USE static bool cfg_read_value(const char *name, sl path, sl *out)
{
    size_t room = sizeof cfg_text - cfg_text_len;
    ssize_t n = io_read_file((const char *)path.p, cfg_text + cfg_text_len,
        room);
    if (n < 0 || (size_t)n == room) {
        cfg_say(EV_CONFIG_BAD, name, n < 0 ? strerror((int)-n)
                                           : "file too large");
        return false;
    }
    *out = sl_trim((sl){ cfg_text + cfg_text_len, (size_t)n });
    cfg_text_len += (size_t)n;
    return true;
}

static void cfg_flag(const struct env_row *r, sl v)
{
    sl text = v.len ? v : sl_str(r->def);
    *(bool *)r->to = sl_eq(text, SL("true"));
    if (!sl_eq(text, SL("true")) && !sl_eq(text, SL("false")))
        cfg_say(EV_CONFIG_BAD, r->name, "must be true or false");
}

static void cfg_number(const struct env_row *r, sl v)
{
    uint64_t n;
    char text[80];
    if (!sl_u64(v.len ? v : sl_str(r->def), (uint64_t)r->max, &n)
        || (int64_t)n < r->min) {
        snprintf(text, sizeof text, "must be a whole number from %lld to %lld",
            (long long)r->min, (long long)r->max);
        cfg_say(EV_CONFIG_BAD, r->name, text);
        return;
    }
    *(int64_t *)r->to = (int64_t)n * r->scale;
}

static void cfg_list(const struct env_row *r, sl v)
{
    sl word;
    while (sl_word(&v, ", \t\r\n", &word)) {
        if (*r->cnt == LIM_LIST_CNT) {
            cfg_say(EV_CONFIG_BAD, r->name, "too many entries");
            return;
        }
        ((sl *)r->to)[(*r->cnt)++] = word;
    }
}

static void cfg_cidrs(const struct env_row *r, sl v)
{
    sl word;
    while (sl_word(&v, ", \t\r\n", &word))
        if (*r->cnt == LIM_LIST_CNT
            || !cidr_parse(word, &((struct cidr *)r->to)[(*r->cnt)++])) {
            cfg_say(EV_CONFIG_BAD, r->name,
                "must be address[/bits], commas between");
            return;
        }
}

static void cfg_rate(const struct env_row *r, sl v)
{
    if (!rate_parse(v.len ? v : sl_str(r->def), r->to))
        cfg_say(EV_CONFIG_BAD, r->name,
            "must be burst:per_second (1..1000000:0.0001..10000), or off");
}

/* Parse a base URL. `tls` is what a missing scheme means. */
MUST_USE static bool cfg_base(sl text, bool tls, struct base *out)
{
    *out = (struct base){ .text = text };
    if (!url_parse(sl_trim(text), &out->url))
        return false;
    sl scheme = out->url.scheme;
    if (sl_ieq(scheme, SL("https")) || sl_ieq(scheme, SL("wss")))
        tls = true;
    else if (sl_ieq(scheme, SL("http")) || sl_ieq(scheme, SL("ws")))
        tls = false;
    else if (scheme.len)
        return false;
    out->is_tls = tls;
    out->port = out->url.name.port ? out->url.name.port : tls ? 443 : 80;
    return true;
}

static void cfg_overrides(const struct env_row *r, sl v)
{
    struct override *tab = r->to;
    struct name n;
    while (v.len) {
        size_t cut = sl_find(v, ',');
        sl entry = sl_trim((sl){ v.p, cut });
        v = sl_skip(v, cut + 1);
        if (entry.len == 0)
            continue;
        size_t eq = sl_find(entry, '=');
        sl name = sl_trim((sl){ entry.p, eq });
        sl url = sl_trim(sl_skip(entry, eq + 1));
        if (*r->cnt == LIM_LIST_CNT) {
            cfg_say(EV_CONFIG_BAD, r->name, "too many entries");
            return;
        }
        struct override *o = &tab[*r->cnt];
        if (eq == entry.len || !name_parse(name, &n)
            || !cfg_base(url, true, &o->base)
            || sl_ieq(o->base.url.scheme, SL("ws"))
            || sl_ieq(o->base.url.scheme, SL("wss"))) {
            cfg_say(EV_CONFIG_BAD, r->name,
                "entries must be server_name=http(s)://host[:port][/path]");
            return;
        }
        o->name = name;
        (*r->cnt)++;
    }
}

/* Parse one bind value (PROTOCOL section 14). */
MUST_USE static bool cfg_bind(sl v, struct bind *out)
{
    uint64_t port;
    *out = (struct bind){ .is_unix = false };
    if (sl_starts(v, SL("unix:")) || sl_starts(v, SL("/"))) {
        out->is_unix = true;
        out->path = sl_starts(v, SL("unix:")) ? sl_skip(v, 5) : v;
        return out->path.len > 0 && out->path.p[0] == '/';
    }
    size_t colon = v.len;
    while (colon > 0 && v.p[colon - 1] != ':')
        colon--;
    if (!sl_u64(sl_skip(v, colon), 65535, &port))
        return false;
    sl host = { v.p, colon ? colon - 1 : 0 };
    out->addr.port = (uint16_t)port;
    out->host = host;
    if (host.len == 0) {
        out->is_any = out->is_dual = true;
        out->addr.ip.v6 = true;
        return true;
    }
    static const uint8_t zero[16];
    bool bracket = host.p[0] == '[' && host.p[host.len - 1] == ']';
    if (ip_parse(bracket ? (sl){ host.p + 1, host.len - 2 } : host,
                 &out->addr.ip)) {
        out->is_any = memcmp(out->addr.ip.b, zero, 16) == 0;
        out->is_dual = out->is_any && out->addr.ip.v6;
        out->host = (sl){ NULL, 0 };
        return bracket == out->addr.ip.v6;
    }
    for (int v6 = 0; v6 < 2; v6++)
        if (cf_hosts_find(io_hosts(), host, v6, &out->addr.ip, 1))
            return true;
    out->addr.ip = (struct ip){ .b = { 127, 0, 0, 1 } };
    return sl_ieq(host, SL("localhost"));
}

static void cfg_binds(void)
{
    sl bind = env_get("LIVEKIT_JWT_BIND"), port = env_get("LIVEKIT_JWT_PORT");
    uint64_t n;
    if (port.len && bind.len)
        cfg_say(EV_CONFIG_BAD, "LIVEKIT_JWT_PORT",
            "set together with LIVEKIT_JWT_BIND; keep one");
    else if (port.len)
        cfg_say(EV_CONFIG_WARN, "LIVEKIT_JWT_PORT",
            "deprecated, use LIVEKIT_JWT_BIND=:port");
    if (port.len && !sl_u64(port, 65535, &n))
        cfg_say(EV_CONFIG_BAD, "LIVEKIT_JWT_PORT", "must be a port");
    else if (!cfg_bind(port.len ? port : bind.len ? bind : SL(":8080"),
                       &cfg.bind))
        cfg_say(EV_CONFIG_BAD, "LIVEKIT_JWT_BIND",
            "must be :port, host:port, [v6]:port, unix:/path or /path");
    sl metrics = env_get("LKJWT_METRICS_BIND");
    cfg.has_metrics = metrics.len > 0;
    if (cfg.has_metrics && !cfg_bind(metrics, &cfg.metrics))
        cfg_say(EV_CONFIG_BAD, "LKJWT_METRICS_BIND",
            "must be :port, host:port, [v6]:port, unix:/path or /path");
}

static void cfg_add_key(sl name, sl sec_value)
{
    if (cfg.key_cnt == LIM_KEY_CNT) {
        cfg_say(EV_CONFIG_BAD, "LIVEKIT_KEY_FILE", "too many keys");
        return;
    }
    if (!utf8_check(name) || name.len > LIM_OTHER_LEN / 2)
        cfg_say(EV_CONFIG_BAD, "LIVEKIT_KEY", "not UTF-8 or too long");
    if (sec_value.len < 32)
        cfg_say(cfg.strict ? EV_CONFIG_BAD : EV_CONFIG_WARN,
            "LIVEKIT_SECRET", "under 32 bytes: guessable offline");
    cfg.key[cfg.key_cnt].name = name;
    br_hmac_key_init(&cfg.key[cfg.key_cnt++].sec_key, &br_sha256_vtable,
        sec_value.p, sec_value.len);
}

/* Pairs of a key file. The text stays: names point into it; secrets are
 * wiped. */
static void cfg_key_file(sl path)
{
    sl text, name, value;
    if (!cfg_read_value("LIVEKIT_KEY_FILE", path, &text))
        return;
    while (text.len) {
        size_t n = sl_find(text, '\n');
        int got = cf_key_line((sl){ text.p, n }, &name, &value);
        text = sl_skip(text, n + 1);
        if (got < 0) {
            cfg_say(EV_CONFIG_BAD, "LIVEKIT_KEY_FILE",
                "every line must be `key: secret` with exactly one colon");
            return;
        }
        if (got == 0)
            continue;
        cfg_add_key(name, value);
        wipe((uint8_t *)(uintptr_t)value.p, value.len);
    }
    if (cfg.key_cnt == 0)
        cfg_say(EV_CONFIG_BAD, "LIVEKIT_KEY_FILE", "holds no key");
}

/* One half of the pair, from its file or variable. */
static sl cfg_key_part(const char *name, const char *file_name)
{
    sl path = env_get(file_name), v = { NULL, 0 };
    if (path.len) {
        if (cfg_read_value(file_name, path, &v) && v.len == 0)
            cfg_say(EV_CONFIG_BAD, file_name, "file is empty");
        return v;
    }
    v = sl_trim(env_get(name));
    if (v.len == 0)
        cfg_say(EV_CONFIG_BAD, name, "required: set it, its _FROM_FILE, or "
            "LIVEKIT_KEY_FILE");
    return v;
}

static void cfg_keys(void)
{
    sl file = env_get("LIVEKIT_KEY_FILE");
    if (file.len) {
        cfg_key_file(file);
    } else {
        sl name = cfg_key_part("LIVEKIT_KEY", "LIVEKIT_KEY_FROM_FILE");
        sl value = cfg_key_part("LIVEKIT_SECRET",
            "LIVEKIT_SECRET_FROM_FILE");
        if (name.len && value.len)
            cfg_add_key(name, value);
        if (env_get("LIVEKIT_SECRET_FROM_FILE").len)
            wipe((uint8_t *)(uintptr_t)value.p, value.len);
    }
}

/* Overwrite the secrets in the environment and in file texts. */
static void cfg_wipe(void)
{
    static const char *const name[] = { "LIVEKIT_SECRET",
        "LIVEKIT_API_SECRET", "LIVEKIT_REDIS_PASSWORD", "LIVEKIT_REDIS_URL",
        "LIVEKIT_AS_TOKEN", "LIVEKIT_HS_TOKEN" };
    for (size_t i = 0; i < COUNT_OF(name); i++) {
        char *v = getenv(name[i]);
        if (v)
            wipe(v, strlen(v));
    }
    wipe(file_buf, sizeof file_buf < 65536 ? sizeof file_buf : 65536);
}

static void cfg_livekit_url(void)
{
    sl v = env_get("LIVEKIT_URL"), api = env_get("LKJWT_LIVEKIT_API_URL");
    struct base b = { .is_tls = false };
    const char *range;
    cfg.livekit_url = v;
    if (v.len == 0) {
        cfg_say(EV_CONFIG_BAD, "LIVEKIT_URL", "required");
    } else if (!cfg_base(v, false, &b)) {
        cfg_say(EV_CONFIG_BAD, "LIVEKIT_URL",
            "must be ws(s):// or http(s)://host[:port][/path]");
    } else {
        if (b.url.scheme.len == 0)
            cfg_say(EV_CONFIG_WARN, "LIVEKIT_URL",
                "no scheme: clients need wss://");
        if (b.url.has_query)
            cfg_say(EV_CONFIG_WARN, "LIVEKIT_URL",
                "query or fragment is dropped in our own calls");
        if (cfg.strict && !b.is_tls && (!b.url.name.is_ip
            || ip_range(b.url.name.ip, &range) == RANGE_PUBLIC))
            cfg_say(EV_CONFIG_BAD, "LIVEKIT_URL",
                "LKJWT_STRICT: not encrypted to a public host");
    }
    cfg.api = b;
    if (api.len && !cfg_base(api, false, &cfg.api))
        cfg_say(EV_CONFIG_BAD, "LKJWT_LIVEKIT_API_URL",
            "must be ws(s):// or http(s)://host[:port][/path]");
}

/* Redis: its URL, and the password's own variable or file. The text kept
 * is a copy: the environment is wiped. */
static void cfg_redis(void)
{
    sl url = env_get("LIVEKIT_REDIS_URL"), plain, file, value;
    struct bb text = { cfg_text + cfg_text_len,
        0, sizeof cfg_text - cfg_text_len, false };
    plain = env_get("LIVEKIT_REDIS_PASSWORD");
    file = env_get("LKJWT_REDIS_PASSWORD_FROM_FILE");
    bool has_value = plain.len > 0;
    cfg.has_redis = url.len > 0;
    if (plain.len && file.len)
        cfg_say(EV_CONFIG_BAD, "LKJWT_REDIS_PASSWORD_FROM_FILE",
            "set together with LIVEKIT_REDIS_PASSWORD; keep one");
    if (url.len == 0)
        return;
    bb_put(&text, url);
    url = (sl){ text.p, text.len };
    bb_put(&text, plain);
    value = (sl){ url.p + url.len, plain.len };
    bb_byte(&text, 0);
    const char *fault = text.over ? "too long"
        : cf_redis_url(url, &text, &cfg.redis);
    if (fault)
        cfg_say(EV_CONFIG_BAD, "LIVEKIT_REDIS_URL", fault);
    cfg_text_len += text.len;
    if (file.len && !fault) {
        has_value = cfg_read_value("LKJWT_REDIS_PASSWORD_FROM_FILE", file,
            &value);
        if (has_value && value.len == 0)
            cfg_say(EV_CONFIG_BAD, "LKJWT_REDIS_PASSWORD_FROM_FILE",
                "file is empty");
    }
    if (has_value)
        cfg.redis.sec_password = value;
    if (cfg.redis.user.len + cfg.redis.sec_password.len
        + cfg.redis.client_name.len > 4096)
        cfg_say(EV_CONFIG_BAD, "LIVEKIT_REDIS_URL",
            "user, password and client name exceed 4 KB");
}

/* One token of the application service, from its file or variable; the text
 * kept is a copy: the environment is wiped. */
static sl cfg_as_token(const char *name, const char *file_name)
{
    sl path = env_get(file_name), v = sl_trim(env_get(name));
    struct bb text = { cfg_text + cfg_text_len,
        0, sizeof cfg_text - cfg_text_len, false };
    if (path.len) {
        v.len = 0;
        if (cfg_read_value(file_name, path, &v) && v.len == 0)
            cfg_say(EV_CONFIG_BAD, file_name, "file is empty");
        return v;
    }
    bb_put(&text, v);
    cfg_text_len += text.len;
    return (sl){ text.p, text.len };
}

/* The registration file's strings, each kept where the file's text lies. */
static void cfg_as_file(sl path, sl *as_token, sl *hs_token)
{
    struct registration r;
    char fault[80];
    sl text;
    if (!cfg_read_value("LIVEKIT_AS_REGISTRATION_FILE", path, &text))
        return;
    unsigned line = cf_registration(text, &r);
    snprintf(fault, sizeof fault, line ? "line %u is not understood"
        : "as_token or hs_token is missing", line);
    if (line || !r.as_token.len || !r.hs_token.len)
        cfg_say(EV_CONFIG_BAD, "LIVEKIT_AS_REGISTRATION_FILE", fault);
    *as_token = r.as_token;
    *hs_token = r.hs_token;
    if (r.id.len)
        cfg.as_id = r.id;
}

/* The application-service mode: all of it, or nothing. */
static void cfg_appservice(void)
{
    sl file = env_get("LIVEKIT_AS_REGISTRATION_FILE"), as = { NULL, 0 };
    sl hs = { NULL, 0 }, name = env_get("LIVEKIT_HS_SERVER_NAME");
    sl word = env_get("LKJWT_STANDALONE");
    unsigned before = cfg_fault_cnt;
    cfg.as_id = SL("lkjwt");
    cfg.only_as = sl_eq(word, SL("off"));
    if (word.len && !cfg.only_as && !sl_eq(word, SL("on")))
        cfg_say(EV_CONFIG_BAD, "LKJWT_STANDALONE", "must be on or off");
    if (file.len) {
        cfg_as_file(file, &as, &hs);
    } else {
        as = cfg_as_token("LIVEKIT_AS_TOKEN", "LKJWT_AS_TOKEN_FROM_FILE");
        hs = cfg_as_token("LIVEKIT_HS_TOKEN", "LKJWT_HS_TOKEN_FROM_FILE");
    }
    cfg.has_as = as.len && hs.len && name.len && cfg_fault_cnt == before;
    if (!cfg.has_as && (as.len || hs.len || name.len)
        && cfg_fault_cnt == before)
        cfg_say(EV_CONFIG_BAD, "LIVEKIT_HS_SERVER_NAME", "the application "
            "service needs it, LIVEKIT_AS_TOKEN and LIVEKIT_HS_TOKEN: all "
            "or none");
    if (cfg.only_as && !cfg.has_as)
        cfg_say(EV_CONFIG_BAD, "LKJWT_STANDALONE",
            "off, and no application service: nobody could ask");
    if (!cfg.has_as)
        return;
    if (!name_parse(name, &cfg.hs_name) || name.len > LIM_NAME_LEN)
        cfg_say(EV_CONFIG_BAD, "LIVEKIT_HS_SERVER_NAME",
            "must be a server name, host[:port]");
    if (!cf_token_check(as) || !cf_token_check(hs))
        cfg_say(EV_CONFIG_BAD, "LIVEKIT_AS_TOKEN", "this and "
            "LIVEKIT_HS_TOKEN: up to 512 printable ASCII characters");
    if (sl_eq(as, hs))
        cfg_say(EV_CONFIG_BAD, "LIVEKIT_HS_TOKEN",
            "the same as LIVEKIT_AS_TOKEN");
    if (as.len < 32 || hs.len < 32)
        cfg_say(cfg.strict ? EV_CONFIG_BAD : EV_CONFIG_WARN,
            "LIVEKIT_HS_TOKEN", "a token under 32 bytes: guessable");
    cfg.sec_as_token = as;
    sha256(hs, cfg.hs_token_sum);
    wipe((uint8_t *)(uintptr_t)hs.p, hs.len);
}

static void cfg_access(void)
{
    struct name n;
    size_t stars = 0;
    for (size_t i = 0; i < cfg.full_access_cnt; i++) {
        bool star = sl_eq(cfg.full_access[i], SL("*"));
        stars += star;
        if (!star && !name_parse(cfg.full_access[i], &n))
            cfg_say(EV_CONFIG_WARN, "LIVEKIT_FULL_ACCESS_HOMESERVERS",
                "holds what is no server name; it matches nothing");
    }
    cfg.is_open = stars == 1 && cfg.full_access_cnt == 1;
    if (cfg.full_access_cnt == 0 && !cfg.only_as)
        cfg_say(EV_CONFIG_BAD, "LIVEKIT_FULL_ACCESS_HOMESERVERS",
            "required: server names, or `*` for everyone");
    else if (cfg.is_open)
        cfg_say(cfg.strict ? EV_CONFIG_BAD : EV_CONFIG_WARN,
            "LIVEKIT_FULL_ACCESS_HOMESERVERS",
            "`*`: users of every homeserver may create rooms");
    else if (stars)
        cfg_say(EV_CONFIG_WARN, "LIVEKIT_FULL_ACCESS_HOMESERVERS",
            "`*` beside other entries matches nothing");
    if (cfg.is_open && !cfg.private_deny)
        LOG0(EV_PRIVATE_OPEN);
    if (cfg.is_open && env_get("LKJWT_RATE_SERVER").len == 0)
        cfg.rate_server = (struct rate){ 2000, 10000 };
    if ((cfg.rate_addr.burst || cfg.conns_per_addr) && !cfg.proxy_cnt)
        cfg_say(EV_CONFIG_BAD, "LKJWT_TRUSTED_PROXIES",
            "required by LKJWT_RATE_ADDR and LKJWT_CONNS_PER_ADDR: behind a "
            "proxy all clients have its address");
}

static void cfg_networks(void)
{
    sl v = env_get("LKJWT_PRIVATE_NETWORKS");
    cfg.private_deny = sl_eq(v, SL("deny"));
    if (v.len && !cfg.private_deny && !sl_eq(v, SL("auto")))
        cfg_say(EV_CONFIG_BAD, "LKJWT_PRIVATE_NETWORKS",
            "must be auto or deny");
}

static void cfg_resolver(void)
{
    sl v = env_get("LKJWT_RESOLVER"), word;
    cfg.resolver = (struct resolv){ .ndots = 1, .attempts = 2,
        .timeout_ms = 1500 };
    while (sl_word(&v, ", \t\r\n", &word)) {
        struct resolv *r = &cfg.resolver;
        if (r->server_cnt == LIM_SERVER_CNT
            || !addr_parse(word, 53, &r->server[r->server_cnt++])) {
            cfg_say(EV_CONFIG_BAD, "LKJWT_RESOLVER",
                "must be up to 3 of ip[:port], commas between");
            return;
        }
        cfg.has_resolver = true;
    }
}

/* Words of a fixed set, and what follows from them. */
static void cfg_words(void)
{
    sl v = env_get("LIVEKIT_LOG_LEVEL");
    cfg.log_level = v.len == 0 || sl_ieq(v, SL("info")) ? 'i'
        : sl_ieq(v, SL("debug")) ? 'd' : sl_ieq(v, SL("error")) ? 'e'
        : sl_ieq(v, SL("warn")) || sl_ieq(v, SL("warning")) ? 'w' : 0;
    if (!cfg.log_level) {
        cfg.log_level = 'i';
        cfg_say(EV_CONFIG_WARN, "LIVEKIT_LOG_LEVEL",
            "unknown level, info is used");
    }
    v = env_get("LKJWT_LOG_FORMAT");
    cfg.log_json = sl_eq(v, SL("json"));
    if (v.len && !cfg.log_json && !sl_eq(v, SL("logfmt")))
        cfg_say(EV_CONFIG_BAD, "LKJWT_LOG_FORMAT", "must be logfmt or json");
    v = env_get("LKJWT_JAIL");
    cfg.jail = v.len == 0 || sl_eq(v, SL("auto")) ? 'a'
        : sl_eq(v, SL("off")) ? 'o' : sl_eq(v, SL("require")) ? 'r' : 0;
    if (!cfg.jail)
        cfg_say(EV_CONFIG_BAD, "LKJWT_JAIL", "must be auto, require or off");
    v = env_get("LKJWT_STRICT");
    cfg.strict = sl_eq(v, SL("yes")) || sl_eq(v, SL("true"));
    if (v.len && !cfg.strict && !sl_eq(v, SL("no")) && !sl_eq(v, SL("false")))
        cfg_say(EV_CONFIG_BAD, "LKJWT_STRICT", "must be yes or no");
    v = env_get("LIVEKIT_INSECURE_SKIP_VERIFY_TLS");
    cfg.insecure = sl_eq(v, SL("YES_I_KNOW_WHAT_I_AM_DOING"));
    if (cfg.insecure) {
        LOG0(EV_INSECURE);
        if (cfg.strict)
            cfg_say(EV_CONFIG_BAD, "LIVEKIT_INSECURE_SKIP_VERIFY_TLS",
                "LKJWT_STRICT refuses it");
    } else if (v.len) {
        cfg_say(EV_CONFIG_WARN, "LIVEKIT_INSECURE_SKIP_VERIFY_TLS",
            "ignored: only YES_I_KNOW_WHAT_I_AM_DOING turns checks off");
    }
}

static bool env_is_known(sl name)
{
    for (size_t i = 0; i < COUNT_OF(env_tab); i++)
        if (sl_eq(name, sl_str(env_tab[i].name)))
            return true;
    for (size_t i = 0; i < COUNT_OF(env_alias_tab); i++)
        if (sl_eq(name, sl_str(env_alias_tab[i].old)))
            return true;
    return false;
}

/* A variable's name without the prefixes people mix up. */
static sl env_stem(sl name)
{
    static const char *const head[] = { "LIVEKIT_", "LKJWT_", "LK_JWT_",
        "JWT_" };
    for (size_t i = 0; i < COUNT_OF(head); i++)
        if (sl_starts(name, sl_str(head[i])))
            name = sl_skip(name, strlen(head[i]));
    return name;
}

/* Whether two names differ by at most two edits (Levenshtein). */
static bool env_is_close(sl a, sl b)
{
    uint8_t row[64], prev, keep;
    if (a.len >= sizeof row || b.len >= sizeof row)
        return false;
    for (size_t j = 0; j <= b.len; j++)
        row[j] = (uint8_t)j;
    for (size_t i = 0; i < a.len; i++) {
        prev = row[0];
        row[0] = (uint8_t)(i + 1);
        for (size_t j = 0; j < b.len; j++) {
            keep = row[j + 1];
            uint8_t best = (uint8_t)(prev + (a.p[i] != b.p[j]));
            if (row[j] + 1 < best)
                best = (uint8_t)(row[j] + 1);
            if (keep + 1 < best)
                best = (uint8_t)(keep + 1);
            row[j + 1] = best;
            prev = keep;
        }
    }
    return row[b.len] <= 2;
}

/* Warn of a variable that is probably meant to be one of ours. */
static void env_near_miss(sl name)
{
    char text[128];
    bool ours = sl_starts(name, SL("LIVEKIT_"))
        || sl_starts(name, SL("LKJWT_")) || sl_starts(name, SL("LK_JWT_"));
    sl stem = env_stem(name);
    for (size_t i = 0; i < COUNT_OF(env_tab); i++) {
        sl known = sl_str(env_tab[i].name);
        bool same_stem = sl_eq(stem, env_stem(known))
            && (ours || sl_find(stem, '_') < stem.len);
        if (!same_stem && !(ours && env_is_close(name, known)))
            continue;
        snprintf(text, sizeof text, "unknown variable; did you mean %s?",
            env_tab[i].name);
        LOG(EV_CONFIG_WARN, KV("var", name), KV("detail", sl_str(text)));
        return;
    }
}

/* Warnings about what is set but means something else, or nothing. */
static void cfg_warn_environment(void)
{
    static const char *const proxy[] = { "HTTP_PROXY", "HTTPS_PROXY",
        "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy" };
    for (char **e = environ; e && *e; e++) {
        sl name = sl_str(*e);
        name.len = sl_find(name, '=');
        if (!env_is_known(name))
            env_near_miss(name);
    }
    for (size_t i = 0; i < COUNT_OF(env_alias_tab); i++)
        if (env_raw(env_alias_tab[i].old).len) {
            char text[96];
            snprintf(text, sizeof text, "old name of %s",
                env_alias_tab[i].name);
            cfg_say(EV_CONFIG_WARN, env_alias_tab[i].old, text);
        }
    for (size_t i = 0; i < COUNT_OF(proxy); i++)
        if (sl_str(getenv(proxy[i])).len) {
            cfg_say(EV_CONFIG_WARN, proxy[i],
                "proxy variables are not used");
            break;
        }
}

/* Read the variables that the table alone describes. */
ONCE static void cfg_table(void)
{
    for (size_t i = 0; i < COUNT_OF(env_tab); i++) {
        const struct env_row *r = &env_tab[i];
        sl v = env_get(r->name);
        switch (r->kind) {
        case ENV_TEXT:     *(sl *)r->to = v; break;
        case ENV_FLAG:     cfg_flag(r, v); break;
        case ENV_NUMBER:   cfg_number(r, v); break;
        case ENV_RATE:     cfg_rate(r, v); break;
        case ENV_CIDRS:    cfg_cidrs(r, v); break;
        case ENV_LIST:     cfg_list(r, v); break;
        case ENV_OVERRIDE: cfg_overrides(r, v); break;
        case ENV_OTHER:
        case ENV_SECRET:   break;
        }
    }
}

/* Read the whole environment. True if it can be served with. */
MUST_USE ONCE static bool cfg_load(void)
{
    cfg_words();                     /* log form and level first */
    cfg_table();
    cfg_networks();
    cfg_resolver();
    cfg_livekit_url();
    cfg_appservice();
    cfg_access();
    cfg_keys();
    cfg_redis();
    cfg_binds();
    while (cfg.prefix.len && cfg.prefix.p[cfg.prefix.len - 1] == '/')
        cfg.prefix.len--;
    if (cfg.prefix.len && cfg.prefix.p[0] != '/')
        cfg_say(EV_CONFIG_BAD, "LKJWT_PATH_PREFIX", "must begin with `/`");
    cfg_warn_environment();
    return cfg_fault_cnt == 0;
}

/* The anchors of the binary, packed by `lkjwt --ca-pack` at build time. */
__asm__(".section .rodata\n"
    ".hidden ca_blob\n.hidden ca_blob_end\n"
    "ca_blob:\n.incbin \"ca.bin\"\nca_blob_end:\n.byte 0\n.previous\n");
extern const uint8_t ca_blob[], ca_blob_end[];

/* Files read for one anchor set: each inode once. */
struct ca_load {
    struct anchors *set;
    struct { dev_t dev; ino_t ino; } seen[512];
    size_t seen_cnt;
    struct bb sources;
    uint8_t sources_text[512];
    bool is_bad;
};

/* Add one PEM file. Returns usable certificates in it, -1 bad, -2
 * unreadable, -3 read before. */
static int ca_file(struct ca_load *l, const char *path)
{
    struct stat st;
    if (io_stat(path, &st) < 0 || !S_ISREG(st.st_mode))
        return -2;
    for (size_t i = 0; i < l->seen_cnt; i++)
        if (l->seen[i].dev == st.st_dev && l->seen[i].ino == st.st_ino)
            return -3;
    if (l->seen_cnt < COUNT_OF(l->seen)) {
        l->seen[l->seen_cnt].dev = st.st_dev;
        l->seen[l->seen_cnt++].ino = st.st_ino;
    }
    ssize_t n = io_read_file(path, file_buf, sizeof file_buf);
    if (n < 0)
        return -2;
    if ((size_t)n == sizeof file_buf)
        return -1;
    unsigned before = l->set->read - l->set->skipped;
    int got = anchors_add_pem(l->set, (sl){ file_buf, (size_t)n });
    return got < 0 ? -1 : (int)(l->set->read - l->set->skipped - before);
}

static void ca_note(struct ca_load *l, sl source)
{
    if (l->sources.len)
        bb_byte(&l->sources, ',');
    bb_put(&l->sources, source);
}

/* A file the operator named must be readable and hold a certificate. */
static void ca_named(struct ca_load *l, const char *var, sl path)
{
    if (path.len == 0)
        return;
    int got = ca_file(l, (const char *)path.p);
    if (got == 0 || got == -1 || got == -2) {
        LOG(EV_ANCHORS_BAD, KV("var", sl_str(var)),
            KV("detail", got == -2 ? SL("cannot be read")
                                   : SL("damaged, too large or empty")));
        l->is_bad = true;
    }
    ca_note(l, path);
}

/* Every regular file of a folder; what is no PEM is passed over. */
static void ca_folder(struct ca_load *l, sl dir)
{
    char path[1024];
    union { uint64_t align; char b[4096]; } ents;
    if (dir.len == 0 || dir.len > 512)
        return;
    snprintf(path, sizeof path, "%.*s", (int)dir.len, (const char *)dir.p);
    int fd = (int)syscall(SYS_openat, AT_FDCWD, path,
        O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return;
    unsigned before = l->set->cnt;
    for (long n; (n = syscall(SYS_getdents64, fd, &ents, sizeof ents)) > 0;)
        for (long at = 0; at < n; ) {
            /* struct linux_dirent64: reclen at 16, name at 19 */
            uint16_t reclen;
            memcpy(&reclen, ents.b + at + 16, 2);
            const char *name = ents.b + at + 19;
            at += reclen;
            if (name[0] == '.')
                continue;
            snprintf(path, sizeof path, "%.*s/%s", (int)dir.len,
                (const char *)dir.p, name);
            (void)ca_file(l, path);
        }
    close(fd);
    if (l->set->cnt > before)
        ca_note(l, dir);
}

/* Where systems keep their bundle, in the order they are tried. */
static const char *const ca_bundle[] = {
    "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem", "/etc/pki/tls/cacert.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem" };

/* Folders of PEM files, colons between. */
static sl ca_folders(void)
{
    return cfg.cert_dir.len || cfg.ca_only ? cfg.cert_dir
        : SL("/etc/ssl/certs:/etc/pki/tls/certs");
}

/* Build a set from all sources (DESIGN 4.5), swap it in. A bad named file
 * keeps the old set. Returns false when there is no set to serve with. */
ONCE static bool ca_load(void)
{
    static struct ca_load load;
    struct ca_load *l = &load;
    uint8_t num[20], skipped[20];
    bool has_system = false;
    *l = (struct ca_load){ .set = &anchor_set[1 - anchor_now] };
    l->sources = (struct bb){ l->sources_text, 0, sizeof l->sources_text,
        false };
    l->set->len = l->set->cnt = l->set->skipped = l->set->read = 0;
    ca_named(l, "SSL_CERT_FILE", cfg.cert_file);
    for (size_t i = 0; i < COUNT_OF(ca_bundle) && !cfg.ca_only && !has_system;
         i++) {
        struct stat st;
        has_system = io_stat(ca_bundle[i], &st) == 0;
        if (has_system && cfg.cert_file.len == 0
            && ca_file(l, ca_bundle[i]) > 0)
            ca_note(l, sl_str(ca_bundle[i]));
    }
    sl dirs = ca_folders(), dir;
    while (sl_word(&dirs, ":", &dir))
        ca_folder(l, dir);
    ca_named(l, "LKJWT_CA_FILE", cfg.ca_file);
    if (!has_system && !cfg.ca_only) {
        anchors_add_packed(l->set, (sl){ ca_blob,
            (size_t)(ca_blob_end - ca_blob) });
        ca_note(l, SL("built-in"));
    }
    if (!l->is_bad && l->set->cnt == 0)
        LOG(EV_ANCHORS_BAD, KV("detail", SL("no trust anchor found")));
    if (l->is_bad || l->set->cnt == 0)
        return anchor_set[anchor_now].cnt > 0;
    anchor_now = 1 - anchor_now;
    LOG(EV_ANCHORS, KV("sources", ((sl){ l->sources_text, l->sources.len })),
        KV("count", text_u64(num, l->set->cnt)),
        KV("unsupported", text_u64(skipped, l->set->skipped)));
    return true;
}

/* SIGHUP: new anchors end what the old ones vouched for. */
static void ca_reload(void)
{
    unsigned before = anchor_now;
    (void)ca_load();
    if (anchor_now == before)
        return;
    anchor_gen++;
    for (size_t i = 0; i < LIM_SESSION_CNT; i++)
        session_cache[i].until_wall = 0;
    for (size_t i = 0; i < LIM_CHAN_CNT; i++)
        if (chan_pool[i].state == CHAN_IDLE)
            chan_close(&chan_pool[i]);
}

/* ==== 25 JAIL ====================== PART III: WORLD ==================
 * Purpose  Give up what serving does not need (SECURITY section 6), in
 *          layers; the start-up line and a metric say which ones hold.
 * INV-L1   After jail_enter only folders named here are readable, nothing
 *          is writable, no program runs (S26).
 * LKJWT_JAIL: auto goes on without what the kernel or an outer filter
 * forbids, require ends there, off does nothing.
 */
enum jail_arch { JA_X86_64, JA_AARCH64, JA_ARMV7, JA_CNT };
#if defined __x86_64__
static const enum jail_arch jail_here = JA_X86_64;
#elif defined __aarch64__
static const enum jail_arch jail_here = JA_AARCH64;
#elif defined __arm__
static const enum jail_arch jail_here = JA_ARMV7;
#else
static const enum jail_arch jail_here = JA_CNT;  /* no filter known */
#endif

/* What becomes of a system call. */
enum jail_rule { JR_ALLOW, JR_KILL, JR_SOCKET, JR_FCNTL, JR_OPENAT,
    JR_EXEC,                         /* mapped executable: killed */
    JR_UNLINK };                     /* our unix socket, at the end */

static const struct jail_row {
    int16_t nr[JA_CNT];              /* -1: there is none */
    uint8_t rule;
} jail_tab[] = {
    { { 0, 63, 3 }, JR_ALLOW },      /* read */
    { { 1, 64, 4 }, JR_ALLOW },      /* write */
    { { 20, 66, 146 }, JR_ALLOW },   /* writev */
    { { 3, 57, 6 }, JR_ALLOW },      /* close */
    { { 48, 210, 293 }, JR_ALLOW },  /* shutdown */
    { { 42, 203, 283 }, JR_ALLOW },  /* connect */
    { { 288, 242, 366 }, JR_ALLOW }, /* accept4 */
    { { 44, 206, 290 }, JR_ALLOW },  /* sendto */
    { { 45, 207, 292 }, JR_ALLOW },  /* recvfrom */
    { { 46, 211, 296 }, JR_ALLOW },  /* sendmsg */
    { { 47, 212, 297 }, JR_ALLOW },  /* recvmsg */
    { { 55, 209, 295 }, JR_ALLOW },  /* getsockopt */
    { { 54, 208, 294 }, JR_ALLOW },  /* setsockopt */
    { { 51, 204, 286 }, JR_ALLOW },  /* getsockname */
    { { 52, 205, 287 }, JR_ALLOW },  /* getpeername */
    { { 233, 21, 251 }, JR_ALLOW },  /* epoll_ctl */
    { { 281, 22, 346 }, JR_ALLOW },  /* epoll_pwait */
    { { 271, 73, 336 }, JR_ALLOW },  /* ppoll */
    { { -1, -1, 414 }, JR_ALLOW },   /* ppoll_time64 */
    { { 7, -1, 168 }, JR_ALLOW },    /* poll */
    { { 228, 113, 263 }, JR_ALLOW }, /* clock_gettime */
    { { -1, -1, 403 }, JR_ALLOW },   /* clock_gettime64 */
    { { 318, 278, 384 }, JR_ALLOW }, /* getrandom */
    { { 217, 61, 217 }, JR_ALLOW },  /* getdents64 */
    { { 5, 80, 108 }, JR_ALLOW },    /* fstat */
    { { -1, -1, 197 }, JR_ALLOW },   /* fstat64 */
    { { 262, 79, -1 }, JR_ALLOW },   /* newfstatat */
    { { -1, -1, 327 }, JR_ALLOW },   /* fstatat64 */
    { { 332, 291, 397 }, JR_ALLOW }, /* statx */
    { { 17, 67, 180 }, JR_ALLOW },   /* pread64 */
    { { 14, 135, 175 }, JR_ALLOW },  /* rt_sigprocmask */
    { { 15, 139, 173 }, JR_ALLOW },  /* rt_sigreturn */
    { { -1, -1, 119 }, JR_ALLOW },   /* sigreturn */
    { { 219, 128, 0 }, JR_ALLOW },   /* restart_syscall */
    { { 60, 93, 1 }, JR_ALLOW },     /* exit */
    { { 231, 94, 248 }, JR_ALLOW },  /* exit_group */
    { { 41, 198, 281 }, JR_SOCKET }, /* socket */
    { { 72, 25, -1 }, JR_FCNTL },    /* fcntl */
    { { -1, -1, 221 }, JR_FCNTL },   /* fcntl64 */
    { { 257, 56, 322 }, JR_OPENAT }, /* openat */
    { { 9, 222, -1 }, JR_EXEC },     /* mmap */
    { { -1, -1, 192 }, JR_EXEC },    /* mmap2 */
    { { 10, 226, 125 }, JR_EXEC },   /* mprotect */
    { { 87, -1, 10 }, JR_UNLINK },   /* unlink */
    { { 263, 35, 328 }, JR_UNLINK }, /* unlinkat */
    { { 59, 221, 11 }, JR_KILL },    /* execve */
    { { 322, 281, 387 }, JR_KILL },  /* execveat */
    { { 57, -1, 2 }, JR_KILL },      /* fork */
    { { 58, -1, 190 }, JR_KILL },    /* vfork */
    { { 56, 220, 120 }, JR_KILL },   /* clone */
    { { 435, 435, 435 }, JR_KILL },  /* clone3 */
    { { 101, 117, 26 }, JR_KILL },   /* ptrace */
    { { 310, 270, 376 }, JR_KILL },  /* process_vm_readv */
    { { 311, 271, 377 }, JR_KILL },  /* process_vm_writev */
    { { 321, 280, 386 }, JR_KILL },  /* bpf */
    { { 165, 40, 21 }, JR_KILL },    /* mount */
    { { 272, 97, 337 }, JR_KILL },   /* unshare */
    { { 308, 268, 375 }, JR_KILL },  /* setns */
    { { 175, 105, 128 }, JR_KILL },  /* init_module */
    { { 313, 273, 379 }, JR_KILL },  /* finit_module */
    { { 176, 106, 129 }, JR_KILL },  /* delete_module */
    { { 246, 104, 347 }, JR_KILL },  /* kexec_load */
    { { 320, 294, 401 }, JR_KILL },  /* kexec_file_load */
    { { 425, 425, 425 }, JR_KILL },  /* io_uring_setup */
    { { 323, 282, 388 }, JR_KILL },  /* userfaultfd */
    { { 298, 241, 364 }, JR_KILL },  /* perf_event_open */
};

/* The kernel's struct sock_filter, and the few codes used. */
struct sock_filter { uint16_t code; uint8_t jt, jf; uint32_t k; };
enum { BPF_LOAD = 0x20, BPF_AND = 0x54, BPF_JEQ = 0x15, BPF_JGE = 0x35,
    BPF_JSET = 0x45, BPF_RETURN = 0x06,
    JAIL_MAX = 8 + 16 * COUNT_OF(jail_tab) };
static const uint32_t jail_kill = 0x80000000, jail_allow = 0x7fff0000,
    jail_errno = 0x00050000 | ENOSYS;    /* libc then tries another way */

struct jail_prog { struct sock_filter *p; size_t n; };

static void jail_put(struct jail_prog *b, uint16_t code, uint32_t k,
    unsigned jt, unsigned jf)
{
    b->p[b->n++] = (struct sock_filter){ code, (uint8_t)jt, (uint8_t)jf, k };
}

/* Load the low half of argument i: little-endian on all three. */
static void jail_arg(struct jail_prog *b, unsigned i)
{
    jail_put(b, BPF_LOAD, 16 + 8 * i, 0, 0);
}

/* Go on if the accumulator is one of the values, else ENOSYS. */
static void jail_one_of(struct jail_prog *b, const uint32_t *v, unsigned cnt)
{
    for (unsigned i = 0; i < cnt; i++)
        jail_put(b, BPF_JEQ, v[i], cnt - i, 0);
    jail_put(b, BPF_RETURN, jail_errno, 0, 0);
}

/* What one row does once its number matched. */
static void jail_put_rule(struct jail_prog *b, enum jail_rule rule,
    bool unix_socket, bool unix_bind)
{
    static const uint32_t family[] = { AF_INET, AF_INET6, AF_UNIX };
    static const uint32_t type[] = { SOCK_STREAM, SOCK_DGRAM };
    static const uint32_t command[] = { F_GETFL, F_SETFL, F_SETFD,
        F_DUPFD_CLOEXEC };
    uint32_t end = jail_allow;
    switch (rule) {
    case JR_ALLOW:
        break;
    case JR_KILL:
        end = jail_kill;
        break;
    case JR_SOCKET:
        jail_arg(b, 0);
        jail_one_of(b, family, unix_socket ? 3 : 2);
        jail_arg(b, 1);
        jail_put(b, BPF_AND, 15, 0, 0);
        jail_one_of(b, type, 2);
        break;
    case JR_FCNTL:
        jail_arg(b, 1);
        jail_one_of(b, command, COUNT_OF(command));
        break;
    case JR_OPENAT:
        jail_arg(b, 2);
        jail_put(b, BPF_JSET, O_WRONLY | O_RDWR | O_CREAT | O_TRUNC
            | (O_TMPFILE & ~O_DIRECTORY), 0, 1);
        jail_put(b, BPF_RETURN, jail_errno, 0, 0);
        break;
    case JR_EXEC:
        jail_arg(b, 2);
        jail_put(b, BPF_JSET, 4, 0, 1);      /* PROT_EXEC */
        jail_put(b, BPF_RETURN, jail_kill, 0, 0);
        end = jail_errno;
        break;
    case JR_UNLINK:
        end = unix_bind ? jail_allow : jail_errno;
        break;
    }
    jail_put(b, BPF_RETURN, end, 0, 0);
}

/* Build the filter of an architecture; out has room for JAIL_MAX.
 * Returns its length. */
static size_t jail_filter(enum jail_arch arch, bool unix_socket,
    bool unix_bind, struct sock_filter *out)
{
    static const uint32_t audit[] = { 0xc000003e, 0xc00000b7, 0x40000028 };
    struct jail_prog b = { out, 0 };
    jail_put(&b, BPF_LOAD, 4, 0, 0);             /* architecture */
    jail_put(&b, BPF_JEQ, audit[arch], 1, 0);
    jail_put(&b, BPF_RETURN, jail_kill, 0, 0);
    jail_put(&b, BPF_LOAD, 0, 0, 0);             /* number */
    if (arch == JA_X86_64) {                     /* x32 */
        jail_put(&b, BPF_JGE, 0x40000000, 0, 1);
        jail_put(&b, BPF_RETURN, jail_kill, 0, 0);
    }
    for (size_t i = 0; i < COUNT_OF(jail_tab); i++) {
        const struct jail_row *r = &jail_tab[i];
        size_t at = b.n;
        if (r->nr[arch] < 0)
            continue;
        jail_put(&b, BPF_JEQ, (uint32_t)r->nr[arch], 0, 0);
        jail_put_rule(&b, (enum jail_rule)r->rule, unix_socket, unix_bind);
        out[at].jf = (uint8_t)(b.n - at - 1);
    }
    jail_put(&b, BPF_RETURN, jail_errno, 0, 0);
    return b.n;
}

/* landlock(7): numbers are the same everywhere. */
enum { LL_CREATE = 444, LL_ADD = 445, LL_RESTRICT = 446, LL_PATH_BENEATH = 1,
    LL_READ_FILE = 4, LL_READ_DIR = 8, LL_REMOVE_FILE = 32,
    LL_BIND_TCP = 1 };

/* Whether an outer filter, systemd's for one, lets us make a call: it may
 * kill instead of refusing, so a child tries. */
static bool jail_may_call(long nr)
{
    uint64_t lim[2];
    int status = 0;
    if (prctl(PR_GET_SECCOMP, 0, 0, 0, 0) != 2)
        return true;
    long pid = syscall(SYS_clone, 0, 0, 0, 0, 0);    /* no SIGCHLD */
    if (pid == 0) {
        (void)prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);    /* no core of it */
        if (nr == LL_CREATE)
            (void)syscall(LL_CREATE, NULL, 0, 1);
        else
            (void)syscall(nr, 0, RLIMIT_NOFILE, NULL, lim);
        _exit(0);
    }
    return pid > 0 && syscall(SYS_wait4, pid, &status, 0x40000000, NULL) == pid
        && status == 0;
}

/* The limit of open files; by an old call where prlimit64 may kill. */
static bool jail_nofile(bool by_prlimit, uint64_t *soft, uint64_t *hard)
{
    static const int16_t getrlimit_nr[JA_CNT + 1] = { 97, 163, 191, -1 };
    uint64_t now[2];
    unsigned long old[2];
    if (!by_prlimit
        || syscall(SYS_prlimit64, 0, RLIMIT_NOFILE, NULL, now) < 0) {
        if (syscall(getrlimit_nr[jail_here], RLIMIT_NOFILE, old) < 0)
            return false;
        now[0] = old[0];
        now[1] = old[1];
    }
    *soft = now[0];
    *hard = now[1];
    return true;
}

/* Let a folder be read, and with `more` what that says. */
static void jail_folder(int ruleset, const char *path, uint64_t more)
{
    struct __attribute__((packed)) { uint64_t access; int32_t fd; } rule;
    int fd = (int)syscall(SYS_openat, AT_FDCWD, path[0] ? path : "/",
        O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return;
    rule.access = LL_READ_FILE | LL_READ_DIR | more;
    rule.fd = fd;
    (void)syscall(LL_ADD, ruleset, LL_PATH_BENEATH, &rule, 0);
    close(fd);
}

/* Let the folder of a file be read, and those of the files it links to. */
static void jail_file(int ruleset, sl path, uint64_t more)
{
    char at[1024], next[1024];
    if (path.len == 0 || path.len >= sizeof at)
        return;
    snprintf(at, sizeof at, "%.*s", (int)path.len, (const char *)path.p);
    for (int hops = 0; hops < 8; hops++) {
        ssize_t n = readlink(at, next, sizeof next - 1);
        char *slash = strrchr(at, '/');
        if (slash)
            *slash = 0;
        jail_folder(ruleset, slash ? at : ".", more);
        if (n <= 0)
            return;
        next[n] = 0;
        size_t len = next[0] == '/' || !slash ? 0 : strlen(at) + 1;
        if (len + (size_t)n >= sizeof at)
            return;
        if (len)
            at[len - 1] = '/';
        memcpy(at + len, next, (size_t)n + 1);
    }
}

/* Let a folder of certificates be read, and what its entries link to. */
static void jail_links(int ruleset, sl dir)
{
    char path[1024], to[2];
    union { uint64_t align; char b[4096]; } ents;
    if (dir.len == 0 || dir.len > 512)
        return;
    snprintf(path, sizeof path, "%.*s", (int)dir.len, (const char *)dir.p);
    jail_folder(ruleset, path, 0);
    int fd = (int)syscall(SYS_openat, AT_FDCWD, path,
        O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    for (long n; fd >= 0
         && (n = syscall(SYS_getdents64, fd, &ents, sizeof ents)) > 0;)
        for (long i = 0; i < n; ) {
            uint16_t reclen;             /* struct linux_dirent64 */
            memcpy(&reclen, ents.b + i + 16, 2);
            snprintf(path, sizeof path, "%.*s/%s", (int)dir.len,
                (const char *)dir.p, ents.b + i + 19);
            i += reclen;
            if (readlink(path, to, sizeof to) > 0
                && (to[0] == '/' || to[0] == '.'))
                jail_file(ruleset, sl_str(path), 0);
        }
    io_close(&fd);
}

/* Only the folders of files that are read again, read-only; no listener
 * more. False: the kernel has no landlock, or we may not use it. */
static bool jail_landlock(void)
{
    static const uint64_t by_abi[] = { 0x1fff, 0x3fff, 0x7fff, 0x7fff,
        0xffff };
    struct { uint64_t fs, net; } attr = { 0, LL_BIND_TCP };
    sl dirs = ca_folders(), dir;
    if (!jail_may_call(LL_CREATE))
        return false;
    long abi = syscall(LL_CREATE, NULL, 0, 1);
    if (abi < 1)
        return false;
    attr.fs = by_abi[abi < 5 ? abi - 1 : 4];
    int ruleset = (int)syscall(LL_CREATE, &attr, abi < 4 ? 8 : 16, 0);
    if (ruleset < 0)
        return false;
    jail_file(ruleset, SL("/etc/resolv.conf"), 0);
    jail_file(ruleset, cfg.hosts_file.len ? cfg.hosts_file
        : SL("/etc/hosts"), 0);
    jail_file(ruleset, cfg.cert_file, 0);
    jail_file(ruleset, cfg.ca_file, 0);
    for (size_t i = 0; i < COUNT_OF(ca_bundle) && !cfg.ca_only; i++)
        jail_file(ruleset, sl_str(ca_bundle[i]), 0);
    while (sl_word(&dirs, ":", &dir))
        jail_links(ruleset, dir);
    if (cfg.bind.is_unix)
        jail_file(ruleset, cfg.bind.path, LL_REMOVE_FILE);
    if (cfg.has_metrics && cfg.metrics.is_unix)
        jail_file(ruleset, cfg.metrics.path, LL_REMOVE_FILE);
    bool ok = syscall(LL_RESTRICT, ruleset, 0) == 0;
    close(ruleset);
    return ok;
}

static bool jail_seccomp(void)
{
    static struct sock_filter filter[JAIL_MAX];
    struct { unsigned short len; struct sock_filter *filter; } prog;
    if (jail_here == JA_CNT)
        return false;
    prog.filter = filter;
    prog.len = (unsigned short)jail_filter(jail_here,
        cfg.has_redis && cfg.redis.is_unix, cfg.bind.is_unix
        || (cfg.has_metrics && cfg.metrics.is_unix), filter);
    return prctl(PR_SET_SECCOMP, 2, &prog, 0, 0) == 0;
}

/* No core dump: it would hold the secrets. */
static bool jail_core(void)
{
    uint64_t none[2] = { 0, 0 };
    return jail_may_call(SYS_prlimit64)
        && syscall(SYS_prlimit64, 0, RLIMIT_CORE, none, NULL) == 0;
}

/* Whether no capability is held; the ambient ones are among these. */
static bool jail_has_no_caps(void)
{
    struct { uint32_t version; int32_t pid; } self = { 0x20080522, 0 };
    uint32_t set[6] = { 0 }, all = 0;    /* effective, permitted, inherited */
    if (syscall(SYS_capget, &self, set) < 0)
        return false;
    for (size_t i = 0; i < COUNT_OF(set); i++)
        all |= set[i];
    return all == 0;
}

/* No capability, be it of a root that stays or given to another user. */
static bool jail_caps(void)
{
    struct { uint32_t version; int32_t pid; } self = { 0x20080522, 0 };
    static const uint32_t none[6];
    if (!jail_may_call(SYS_capget))
        return false;
    return jail_has_no_caps() || (jail_may_call(SYS_capset)
        && syscall(SYS_capset, &self, none) == 0 && jail_has_no_caps());
}

/* Not root, if that is how we were started, but for LKJWT_UID=0. The
 * bounding set is emptied first: that takes CAP_SETPCAP, which goes too. */
static bool jail_ids(void)
{
    uid_t uid = (uid_t)cfg.uid;
    for (unsigned long cap = 0; cap < 64; cap++)
        (void)prctl(PR_CAPBSET_DROP, cap, 0, 0, 0);
    if (geteuid() != 0)
        return true;
    if (uid == 0 || setgroups(0, NULL) < 0 || setgid(uid) < 0
        || setuid(uid) < 0)
        return false;
    (void)jail_caps();               /* securebits(7) may have kept them */
    return setuid(0) < 0;
}

static bool jail_privs(void)
{
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0;
}

static bool jail_dump(void)
{
    return prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) == 0;
}

/* Enter, layer by layer. False: one is required and does not hold. */
MUST_USE static bool jail_enter(void)
{
    static bool (*const layer[JL_CNT])(void) = { jail_core, jail_ids,
        jail_caps, jail_privs, jail_dump, jail_landlock, jail_seccomp };
    uint8_t text[2][80];
    struct bb list[2] = { BB(text[0]), BB(text[1]) };
    bool stays_root = geteuid() == 0 && cfg.uid == 0;
    bool is_bad = false;
    for (size_t i = 0; i < JL_CNT; i++) {
        bool ok = cfg.jail != 'o' && layer[i]();
        struct bb *b = &list[!ok];
        met.jail[i] = ok;
        is_bad |= !ok && !(i == JL_IDS && stays_root);
        bb_str(b, b->len ? "," : "");
        bb_str(b, jail_layer_tab[i]);
    }
    sl held = { text[0], list[0].len }, missing = { text[1], list[1].len };
    LOG(EV_JAIL, KV("layers", held.len ? held : SL("none")),
        KV("missing", missing));
    if (cfg.jail != 'r' || !is_bad)
        return true;
    LOG(EV_JAIL_BAD, KV("missing", missing));
    return false;
}

/* ==== 26 LOOP ====================== PART III: WORLD ==================
 * Purpose  What is watched, in one table; wait, then step what is ready.
 * INV-O1   A descriptor has one watcher, a deadline one place in the heap;
 *          both change only through loop_set.
 * INV-O2   Between two waits at most one call in a TLS handshake is
 *          stepped, after the clients (SECURITY section 5, loop rule).
 */

static enum step listen_step(size_t idx, int revents, int64_t now);
static enum step signal_step(size_t idx, int revents, int64_t now);

/* Rank of a call whose next step may be expensive, 0: it is not. */
static size_t up_weight(size_t idx)
{
    const struct up *u = &up_pool[idx];
    return u->state != UP_TLS ? 0 : u->call.trust.class == CLASS_STRANGER
        ? 2 : 1;
}

/* How many objects each kind has, and what moves them. */
static const struct dispatch_row {
    size_t cnt;
    enum step (*step)(size_t idx, int revents, int64_t now);
    size_t (*weight)(size_t idx);    /* not 0: one per round, least first */
} dispatch_tab[KIND_CNT] = {
    [KIND_LISTEN]   = { LIM_LISTEN_CNT, listen_step, NULL },
    [KIND_CONN]     = { LIM_SLOT_CNT, conn_step, NULL },
    [KIND_EXCHANGE] = { LIM_SLOT_CNT, exchange_step, NULL },
    [KIND_LOOKUP]   = { LIM_UP_CNT, lookup_step, NULL },
    [KIND_UP]       = { LIM_UP_ALL, up_step, up_weight },
    [KIND_TRY]      = { LIM_UP_ALL * LIM_TRY_CNT, try_step, NULL },
    [KIND_CHAN]     = { LIM_CHAN_CNT, chan_step, NULL },
    [KIND_QUERY]    = { LIM_QUERY_CNT, query_step, NULL },
    [KIND_JOB]      = { LIM_JOB_CNT, job_step, NULL },
    [KIND_API]      = { LIM_API_CNT, api_step, NULL },
    [KIND_REDIS]    = { LIM_REDIS_CNT, rds_step, NULL },
    [KIND_REPLICA]  = { 1, rep_step, NULL },
    [KIND_INQUIRY]  = { LIM_INQ_CNT, inq_step, NULL },
    [KIND_SEAT]     = { SEAT_OBJECTS, seat_step, NULL },
    [KIND_SIGNAL]   = { 1, signal_step, NULL },
};

enum { WATCH_CNT = LIM_LISTEN_CNT + 2 * LIM_SLOT_CNT + LIM_UP_CNT
    + LIM_UP_ALL * (1 + LIM_TRY_CNT) + LIM_CHAN_CNT + LIM_QUERY_CNT
    + LIM_JOB_CNT + LIM_API_CNT + LIM_REDIS_CNT + LIM_INQ_CNT
    + SEAT_OBJECTS + 2 };

/* One watched object. Places are index + 1; 0: not in that table. */
static struct watch {
    int64_t deadline;
    uint16_t fd_at, heap_at;
    uint16_t idx;
    uint8_t kind;
    bool is_woken;
} watch_tab[WATCH_CNT];
static uint16_t heap_tab[WATCH_CNT], wake_tab[WATCH_CNT];
static size_t heap_cnt, wake_head, wake_cnt;
static int64_t due_now;              /* while deadlines are served */

/* One descriptor, and what the kernel watches it for: told when that is not
 * enough (stale_tab), or when it reports what nobody wants. So a kept
 * connection costs no call between two requests. */
static struct watched_fd {
    uint32_t gen;            /* grows when it is closed: old events */
    uint16_t who;            /* place in watch_tab; 0: nobody */
    uint8_t want, has;       /* POLLIN, POLLOUT */
    bool is_known, is_stale; /* to the kernel; in stale_tab */
} fd_tab[LIM_FD_CNT];
static uint16_t stale_tab[LIM_FD_CNT];
static size_t stale_cnt;
static int loop_epoll = -1;

_Static_assert(POLLIN == EPOLLIN && POLLOUT == EPOLLOUT && POLLERR == EPOLLERR
    && POLLHUP == EPOLLHUP && WATCH_CNT < UINT16_MAX, "one set of bits");

static size_t loop_base(enum kind kind)
{
    static size_t base[KIND_CNT];
    if (base[KIND_CNT - 1] == 0)
        for (size_t k = 1; k < KIND_CNT; k++)
            base[k] = base[k - 1] + dispatch_tab[k - 1].cnt;
    return base[kind];
}

static void heap_put(size_t at, uint16_t who)
{
    heap_tab[at] = who;
    watch_tab[who].heap_at = (uint16_t)(at + 1);
}

/* Move `who`, which belongs at or near `at`, to its place. */
static void heap_fix(size_t at, uint16_t who)
{
    int64_t d = watch_tab[who].deadline;
    while (at > 0 && watch_tab[heap_tab[(at - 1) / 2]].deadline > d) {
        heap_put(at, heap_tab[(at - 1) / 2]);
        at = (at - 1) / 2;
    }
    for (;;) {
        size_t kid = 2 * at + 1;
        if (kid + 1 < heap_cnt && watch_tab[heap_tab[kid + 1]].deadline
            < watch_tab[heap_tab[kid]].deadline)
            kid++;
        if (kid >= heap_cnt || watch_tab[heap_tab[kid]].deadline >= d)
            break;
        heap_put(at, heap_tab[kid]);
        at = kid;
    }
    heap_put(at, who);
}

static void heap_remove(struct watch *w)
{
    size_t at = w->heap_at - 1U;
    w->heap_at = 0;
    uint16_t last = heap_tab[--heap_cnt];
    if (at < heap_cnt)
        heap_fix(at, last);
}

/* Whether the kernel watches a descriptor for less than is wanted. */
static bool fd_wants_more(const struct watched_fd *f)
{
    return f->who && (!f->is_known || (f->want & ~f->has));
}

/* Have the kernel watch a descriptor as wanted. False: it cannot now. */
static bool fd_tell(int fd)
{
    struct watched_fd *f = &fd_tab[fd];
    struct epoll_event e = { .events = f->want,
        .data.u64 = (uint64_t)f->gen << 32 | (uint32_t)fd };
    int op = !f->who ? EPOLL_CTL_DEL : f->is_known ? EPOLL_CTL_MOD
        : EPOLL_CTL_ADD;
    if (epoll_ctl(loop_epoll, op, fd, &e) < 0)
        return false;
    f->is_known = f->who > 0;
    f->has = f->want;
    return true;
}

static void fd_set_watch(uint16_t who, int fd, int events)
{
    struct watch *w = &watch_tab[who];
    if (w->fd_at && w->fd_at != fd + 1 && fd_tab[w->fd_at - 1].who == who + 1)
        fd_tab[w->fd_at - 1].who = 0;
    w->fd_at = (uint16_t)(fd + 1);
    if (fd < 0)
        return;
    struct watched_fd *f = &fd_tab[fd];
    f->who = (uint16_t)(who + 1);
    f->want = (uint8_t)events;
    if (!f->is_stale && fd_wants_more(f)) {
        f->is_stale = true;
        stale_tab[stale_cnt++] = (uint16_t)fd;
    }
}

/* Tell the kernel all that it must know before a wait. What it refuses, for
 * want of memory, is tried again. */
static void loop_tell(void)
{
    size_t kept = 0;
    for (size_t i = 0; i < stale_cnt; i++) {
        struct watched_fd *f = &fd_tab[stale_tab[i]];
        f->is_stale = fd_wants_more(f) && !fd_tell(stale_tab[i]);
        if (f->is_stale)
            stale_tab[kept++] = stale_tab[i];
    }
    stale_cnt = kept;
}

/* A descriptor is about to be closed: the kernel forgets it by itself. */
static void loop_closed(int fd)
{
    if (fd >= LIM_FD_CNT)
        return;
    struct watched_fd *f = &fd_tab[fd];
    *f = (struct watched_fd){ .gen = f->gen + 1, .is_stale = f->is_stale };
}

static void loop_set(enum kind kind, size_t idx, int fd, int events,
    int64_t deadline)
{
    uint16_t who = (uint16_t)(loop_base(kind) + idx);
    struct watch *w = &watch_tab[who];
    w->kind = (uint8_t)kind;
    w->idx = (uint16_t)idx;
    fd_set_watch(who, fd, events);
    if (due_now && deadline <= due_now)
        deadline = due_now + 1;          /* others have their turn first */
    if (w->deadline == deadline && (w->heap_at || deadline == INT64_MAX))
        return;
    w->deadline = deadline;
    if (deadline != INT64_MAX)
        heap_fix(w->heap_at ? w->heap_at - 1U : heap_cnt++, who);
    else if (w->heap_at)
        heap_remove(w);
}

static void loop_wake(enum kind kind, size_t idx)
{
    uint16_t who = (uint16_t)(loop_base(kind) + idx);
    struct watch *w = &watch_tab[who];
    w->kind = (uint8_t)kind;
    w->idx = (uint16_t)idx;
    if (w->is_woken)
        return;
    w->is_woken = true;
    wake_tab[(wake_head + wake_cnt++) % WATCH_CNT] = who;
}

static void loop_step(uint16_t who, int revents, int64_t now)
{
    const struct watch *w = &watch_tab[who];
    (void)dispatch_tab[w->kind].step(w->idx, revents, now);
}

/* Whose the event is, place in watch_tab + 1, and what of it is wanted. 0:
 * nobody's any more; the kernel watches in vain. */
static uint16_t fd_whose(const struct epoll_event *e, int *revents)
{
    int fd = (int)(e->data.u64 & UINT32_MAX);
    const struct watched_fd *f = &fd_tab[fd];
    if (f->gen != e->data.u64 >> 32)
        return 0;
    *revents = (int)e->events & (f->want | POLLERR | POLLHUP);
    if (f->who && *revents)
        return f->who;
    (void)fd_tell(fd);
    return 0;
}

/* Step what is ready: all light objects, then one heavy one, taking turns by
 * starting behind the last. */
static void loop_ready(const struct epoll_event *ready, size_t cnt,
    int64_t now)
{
    static size_t turn;
    size_t heavy = cnt, heavy_key = SIZE_MAX;
    int revents;
    for (size_t i = 0; i < cnt; i++) {
        uint16_t who = fd_whose(&ready[i], &revents);
        if (!who)
            continue;
        const struct watch *w = &watch_tab[who - 1];
        const struct dispatch_row *row = &dispatch_tab[w->kind];
        size_t weight = row->weight ? row->weight(w->idx) : 0;
        if (weight) {
            size_t key = weight * row->cnt
                + (w->idx + row->cnt - turn) % row->cnt;
            if (key < heavy_key) {
                heavy = i;
                heavy_key = key;
            }
            continue;
        }
        loop_step((uint16_t)(who - 1), revents, now);
    }
    uint16_t who = heavy < cnt ? fd_whose(&ready[heavy], &revents) : 0;
    if (who) {
        turn = watch_tab[who - 1].idx + 1U;
        loop_step((uint16_t)(who - 1), revents, now);
    }
}

/* Step what is past its deadline, then what others woke. Bounded, so that
 * sockets get their turn. */
static void loop_due(int64_t now)
{
    due_now = now;
    for (size_t n = 0; n < WATCH_CNT && heap_cnt; n++) {
        uint16_t who = heap_tab[0];
        if (watch_tab[who].deadline > now)
            break;
        watch_tab[who].deadline = INT64_MAX;      /* the step sets a new one */
        heap_remove(&watch_tab[who]);
        loop_step(who, 0, now);
    }
    due_now = 0;
    for (size_t n = wake_cnt; n > 0 && wake_cnt; n--) {
        uint16_t who = wake_tab[wake_head];
        wake_head = (wake_head + 1) % WATCH_CNT;
        wake_cnt--;
        watch_tab[who].is_woken = false;
        loop_step(who, 0, now);
    }
}

_Static_assert(sizeof conn_pool + sizeof conn_in + sizeof conn_out
    + sizeof exchange_pool + sizeof big_pool + sizeof huge_pool
    + sizeof chan_pool + sizeof chan_tls + sizeof chan_io + sizeof up_pool
    + sizeof up_in + sizeof lookup_pool + sizeof query_pool
    + sizeof dns_cache + sizeof wk_cache + sizeof session_cache
    + sizeof session_key + sizeof wk_key
    + sizeof sig_cache + sizeof seen_cache + sizeof rate_cache
    + sizeof breaker_cache + sizeof known_cache + sizeof room_cache
    + sizeof hs_pool
    + sizeof anchor_set + sizeof api_pool + sizeof job_pool
    + sizeof job_hot + sizeof rds_pool + sizeof rds_in + sizeof rds_out_main
    + sizeof notice_pool + sizeof inq_pool + sizeof member_cache
    + sizeof seat_pool + sizeof seat_hot + sizeof seat_text + sizeof gone_ring
    + sizeof store_ring + sizeof watch_tab + sizeof fd_tab
    + sizeof file_buf + sizeof cfg_text <= LIM_MEM_LEN,
    "pools exceed the promise");

static bool loop_is_over;

/* Before the first round. False, with errno: there can be no loop. */
MUST_USE static bool loop_open(void)
{
    loop_epoll = epoll_create1(EPOLL_CLOEXEC);
    return loop_epoll >= 0;
}

/* One round: wait for something, then move it. */
static void loop_round(const sigset_t *mask)
{
    static struct epoll_event ready[LIM_READY_CNT];
    loop_tell();
    int64_t ms = stale_cnt ? 100 : INT_MAX;
    if (wake_cnt) {
        ms = 0;
    } else if (heap_cnt) {
        int64_t due = watch_tab[heap_tab[0]].deadline - io_now();
        ms = due < 0 ? 0 : due < ms ? due : ms;
    }
    int n = epoll_pwait(loop_epoll, ready, COUNT_OF(ready), (int)ms, mask);
    int64_t now = io_now();
    if (n > 0)
        loop_ready(ready, (size_t)n, now);
    loop_due(now);
    (void)signal_step(0, 0, now);
}

/* Listeners by index: public 0 and 1, metrics 2 and 3. */
static struct listener { int fd; bool is_metrics; struct addr addr; }
    listener_pool[LIM_LISTEN_CNT];

/* Kept for the moment when there is no other: a client that cannot be
 * served is told, and does not stay in the listener's queue. */
static int spare_fd = -1;

/* No descriptor is free: the oldest idle client's, else the spare one
 * serves to turn one client away. False: nothing helps now. */
static bool listen_full(struct listener *l, int err, int64_t now)
{
    struct ip peer;
    LOG(EV_FD_FULL, KV("error", sl_str(strerror(err))));
    if (err != EMFILE && err != ENFILE)
        return false;
    struct conn *old = conn_oldest_idle(0, LIM_SLOT_CNT, now);
    if (old) {
        conn_close(old);
        return true;
    }
    if (spare_fd < 0)                    /* lost: with luck there is one now */
        spare_fd = io_spare(STDERR_FILENO);
    if (spare_fd < 0)
        return false;
    io_close(&spare_fd);
    int fd = io_accept(l->fd, &peer);
    if (fd >= 0)
        conn_turn_away(fd);
    spare_fd = io_spare(STDERR_FILENO);
    return fd >= 0;
}

/* Accept what waits, a few at a time; rest where no descriptor is free. */
static enum step listen_step(size_t idx, int revents, int64_t now)
{
    struct listener *l = &listener_pool[idx];
    (void)revents;
    for (int k = 0; k < 16 && l->fd >= 0; k++) {
        struct ip peer;
        int fd = io_accept(l->fd, &peer);
        if (fd == -EAGAIN)
            break;
        if (fd >= 0) {
            conn_open(fd, &peer, l->is_metrics, now);
        } else if (!listen_full(l, -fd, now)) {
            loop_set(KIND_LISTEN, idx, l->fd, 0, now + 100);
            return STEP_WAIT;
        }
    }
    loop_set(KIND_LISTEN, idx, l->fd, POLLIN, INT64_MAX);
    return STEP_WAIT;
}

static volatile sig_atomic_t signal_stop, signal_reload;

static void signal_note(int number)
{
    if (number == SIGHUP)
        signal_reload = 1;
    else
        signal_stop++;
}

/* Stop accepting; idle clients go, busy ones get their answer. */
static void loop_drain(int64_t now)
{
    srv_stopping = 2;
    /* now, not at exit: a successor may have its own there by then */
    if (cfg.bind.is_unix)
        (void)unlink((const char *)cfg.bind.path.p);
    if (cfg.has_metrics && cfg.metrics.is_unix)
        (void)unlink((const char *)cfg.metrics.path.p);
    for (size_t i = 0; i < LIM_LISTEN_CNT; i++)
        if (listener_pool[i].fd >= 0) {
            loop_set(KIND_LISTEN, i, -1, 0, INT64_MAX);
            io_close(&listener_pool[i].fd);
        }
    for (size_t i = 0; i < LIM_SLOT_CNT; i++)
        if (conn_pool[i].state == C_HEAD && conn_pool[i].in_len == 0)
            conn_close(&conn_pool[i]);
    job_stop(now);
    loop_set(KIND_SIGNAL, 0, -1, 0, now + cfg.drain_ms);
}

/* Act on signals, once a round, and on the stop's deadlines. */
static enum step signal_step(size_t idx, int revents, int64_t now)
{
    static int64_t next;
    (void)idx;
    (void)revents;
    if (signal_reload) {
        signal_reload = 0;
        ca_reload();
    }
    if (signal_stop && srv_stopping == 0) {
        uint8_t num[20];
        srv_stopping = 1;
        next = now + cfg.lame_duck_ms;
        LOG(EV_STOPPING, KV("lame_duck_ms",
            text_u64(num, (uint64_t)cfg.lame_duck_ms)));
        loop_set(KIND_SIGNAL, 0, -1, 0, next);
    }
    if (srv_stopping == 1 && now >= next) {
        loop_drain(now);
        next = now + cfg.drain_ms;
    }
    if (srv_stopping == 2)
        loop_is_over = (met.gauge[GA_CONNECTIONS] == 0
            && job_is_settled(now)) || now >= next;
    loop_is_over |= signal_stop > 1;
    if (srv_stopping && !loop_is_over && heap_cnt == 0)
        loop_set(KIND_SIGNAL, 0, -1, 0, next);
    return STEP_WAIT;
}

/* ==== 27 MAIN ====================== PART III: WORLD ==================
 * Purpose  The command line, the start-up list, then the loop.
 */

static const char license_text[] =
    "lkjwt - Copyright (c) 2026 the lkjwt developers\n"
    "BearSSL - Copyright (c) 2016 Thomas Pornin <pornin@bolet.org>\n"
    "musl - Copyright (c) 2005-2020 Rich Felker, et al.\n"
    "\n"
    "All three under the MIT license:\n"
    "\n"
    "Permission is hereby granted, free of charge, to any person obtaining a\n"
    "copy of this software and associated documentation files (the\n"
    "\"Software\"), to deal in the Software without restriction, including\n"
    "without limitation the rights to use, copy, modify, merge, publish,\n"
    "distribute, sublicense, and/or sell copies of the Software, and to\n"
    "permit persons to whom the Software is furnished to do so, subject to\n"
    "the following conditions:\n"
    "\n"
    "The above copyright notice and this permission notice shall be included\n"
    "in all copies or substantial portions of the Software.\n"
    "\n"
    "THE SOFTWARE IS PROVIDED \"AS IS\", WITHOUT WARRANTY OF ANY KIND, "
    "EXPRESS\n"
    "OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF\n"
    "MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT.\n"
    "IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY\n"
    "CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT,\n"
    "TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE\n"
    "SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.\n";

static bool out_failed;

/* Print to stdout at once; what a command prints is small. */
static void out(const char *text)
{
    sl rest = sl_str(text);
    while (rest.len) {
        ssize_t n = io_write(1, rest);
        out_failed |= n <= 0;
        if (n <= 0)
            return;
        rest = sl_skip(rest, (size_t)n);
    }
}

static int main_version(int argc, char **argv)
{
    (void)argc;
    (void)argv;
    out("lkjwt " LKJWT_VERSION "\n");
    return 0;
}

static int main_license(int argc, char **argv)
{
    (void)argc;
    (void)argv;
    out(license_text);
    return 0;
}

/* NAME=value of every variable, unset ones commented out. Secrets are
 * masked, and whatever may hold a URL's password. */
static int main_print_config(int argc, char **argv)
{
    char line[2048];
    (void)argc;
    (void)argv;
    for (size_t i = 0; i < COUNT_OF(env_tab); i++) {
        const struct env_row *r = &env_tab[i];
        sl v = env_get(r->name);
        uint8_t shown[1100];
        struct bb b = BB(shown);
        bool mask = r->kind == ENV_SECRET || sl_find(v, '@') < v.len;
        log_put_value(&b, v.len == 0 ? sl_str(r->def)
            : mask ? SL("********") : v, false);
        snprintf(line, sizeof line, "%s%s=%.*s\n", v.len ? "" : "# ",
            r->name, (int)b.len, (const char *)shown);
        out(line);
    }
    return cfg_load() ? 0 : 1;
}

/* Copy the common name, else the organisation, out of a DER name. */
static void main_dn_text(sl dn, char *text, size_t cap)
{
    sl seq, set, pair, oid, value = { NULL, 0 }, best = { NULL, 0 };
    if (!der_take(&dn, 0x30, &seq, NULL))
        return;
    while (der_take(&seq, 0x31, &set, NULL)
           && der_take(&set, 0x30, &pair, NULL)
           && der_take(&pair, 0x06, &oid, NULL) && pair.len > 1
           && der_take(&pair, pair.p[0], &value, NULL)) {
        bool is_cn = sl_eq(oid, ((sl){ (uint8_t[3]){ 85, 4, 3 }, 3 }));
        bool is_org = sl_eq(oid, ((sl){ (uint8_t[3]){ 85, 4, 10 }, 3 }));
        if (is_cn || (is_org && best.len == 0))
            best = value;
    }
    struct bb b = { (uint8_t *)text, 0, cap - 1, false };
    log_put_value(&b, best, false);
    text[b.len] = 0;
}

/* Names and keys of the anchors that would be in force. */
static int main_ca_list(int argc, char **argv)
{
    static const char *const kind[] = { "", "RSA", "P-256", "P-384" };
    char line[1200], name[1100];
    struct anchor a;
    (void)argc;
    (void)argv;
    cfg_table();
    bool ok = ca_load();
    sl rest = { anchor_set[anchor_now].data, anchor_set[anchor_now].len };
    while (anchor_take(&rest, &a)) {
        main_dn_text(a.name, name, sizeof name);
        if (a.key.kind == KEY_RSA)
            snprintf(line, sizeof line, "RSA-%u %s%s\n",
                (unsigned)a.key.n.len * 8, name, a.is_ca ? "" : " (leaf)");
        else
            snprintf(line, sizeof line, "%s %s%s\n", kind[a.key.kind], name,
                a.is_ca ? "" : " (leaf)");
        out(line);
    }
    snprintf(line, sizeof line, "%u trust anchors\n",
        anchor_set[anchor_now].cnt);
    out(line);
    return ok ? 0 : 1;
}

/* Build step: PEM on stdin, packed anchors on stdout. */
static int main_ca_pack(int argc, char **argv)
{
    size_t len = 0;
    ssize_t n;
    (void)argc;
    (void)argv;
    while (len < sizeof file_buf
           && (n = io_read(0, file_buf + len, sizeof file_buf - len)) > 0)
        len += (size_t)n;
    struct anchors *set = &anchor_set[0];
    if (anchors_add_pem(set, (sl){ file_buf, len }) <= 0)
        return 1;
    sl rest = { set->data, set->len };
    while (rest.len) {
        n = io_write(1, rest);
        if (n <= 0)
            return 1;
        rest = sl_skip(rest, (size_t)n);
    }
    return 0;
}

/* A registration file with fresh tokens, for a homeserver that finds us at
 * the given URL. */
static int main_registration(int argc, char **argv)
{
    static const char hex[] = "0123456789abcdef";
    sl name = env_get("LIVEKIT_HS_SERVER_NAME");
    uint8_t raw[64], text[2048];
    char token[2][65] = { "", "" };
    struct name n;
    struct bb b = BB(text);
    struct base base;
    const char *url = argc > 0 ? argv[0] : "http://127.0.0.1:8080";
    if (!name_parse(name, &n) || !cfg_base(sl_str(url), false, &base)
        || !sl_starts(base.url.scheme, SL("http"))) {
        out("LIVEKIT_HS_SERVER_NAME must be set to the homeserver's server "
            "name, URL to where it reaches lkjwt\n");
        return 1;
    }
    io_random(raw, sizeof raw);
    for (size_t i = 0; i < 128; i++)
        token[i / 64][i % 64] = hex[raw[i / 2] >> (i % 2 ? 0 : 4) & 15];
    const char *part[] = { "id: lkjwt\nurl: null\nas_token: ", token[0],
        "\nhs_token: ", token[1], "\nsender_localpart: lkjwt\n"
        "rate_limited: false\nnamespaces:\n  users:\n"
        "    - exclusive: false\n      regex: '@.*:", NULL,
        "'\n# MSC4512 and MSC4502, as Synapse reads them today\n"
        "io.element.msc4512.proxy_prefix: rtc/livekit\n"
        "io.element.msc4512.proxy_url: ", url, "\n"
        "io.element.msc4502.scopes:\n"
        "  - 'urn:matrix:client:io.element.msc4502:rooms:is_joined'\n"
        "# and as they will be called\nproxy_prefix: rtc/livekit\n"
        "proxy_url: ", url, "\nscopes:\n"
        "  - 'urn:matrix:client:rooms:is_joined'\n" };
    for (size_t i = 0; i < COUNT_OF(part); i++) {
        if (part[i])
            bb_str(&b, part[i]);
        for (size_t k = 0; !part[i] && k < name.len; k++) {
            if (name.p[k] == '.' || name.p[k] == '[' || name.p[k] == ']')
                bb_byte(&b, '\\');
            bb_byte(&b, name.p[k]);
        }
    }
    bb_byte(&b, 0);
    if (b.over)
        return 1;
    out((const char *)text);
    wipe(text, sizeof text);
    wipe(token, sizeof token);
    return 0;
}

static int main_help(int argc, char **argv);
static int main_check(int argc, char **argv);
static int main_healthcheck(int argc, char **argv);
static int main_serve(int argc, char **argv);

/* The command line: a row a command. */
static const struct command {
    const char *name, *args, *help;
    int max_args;
    int (*run)(int argc, char **argv);
} command_tab[] = {
    { "", "", "serve", 0, main_serve },
    { "--check", " [SERVER_NAME]",
      "test configuration, SFU, Redis, the homeserver whose application "
      "service this is and, when named, a homeserver", 1,
      main_check },
    { "--healthcheck", "", "exit 0 if the local instance answers", 0,
      main_healthcheck },
    { "--print-config", "", "print the configuration, secrets masked", 0,
      main_print_config },
    { "--registration", " [URL]", "print a registration file with new tokens "
      "for LIVEKIT_HS_SERVER_NAME; URL: of lkjwt, as that sees it", 1,
      main_registration },
    { "--ca-list", "", "print the trust anchors", 0, main_ca_list },
    { "--ca-pack", "", "build step: PEM on stdin to packed anchors", 0,
      main_ca_pack },
    { "--license", "", "print the licenses", 0, main_license },
    { "--version", "", "print the version", 0, main_version },
    { "--help", "", "print this", 0, main_help },
};

static int main_help(int argc, char **argv)
{
    char line[256];
    (void)argc;
    (void)argv;
    out("lkjwt: lets Matrix users into LiveKit rooms\n\nUsage:\n");
    for (size_t i = 0; i < COUNT_OF(command_tab); i++) {
        snprintf(line, sizeof line, "  lkjwt %s%s\n        %s\n",
            command_tab[i].name, command_tab[i].args, command_tab[i].help);
        out(line);
    }
    out("\nEnvironment:\n");
    for (size_t i = 0; i < COUNT_OF(env_tab); i++) {
        snprintf(line, sizeof line, "  %s%s%s%s\n        %s\n",
            env_tab[i].name, env_tab[i].def[0] ? " (" : "", env_tab[i].def,
            env_tab[i].def[0] ? ")" : "", env_tab[i].help);
        out(line);
    }
    return 0;
}

/* Open one listener of a bind value; nobody is let in yet. */
static bool main_listen(const struct bind *b, size_t idx, bool is_metrics)
{
    uint8_t text[64];
    struct addr a = b->addr;
    int fd;
    if (b->is_unix) {
        fd = io_listen_unix(b->path);
    } else {
        fd = io_listen(&a, b->is_dual);
        if (fd == -EAFNOSUPPORT && b->is_dual) {
            a.ip = (struct ip){ .v6 = false };
            fd = io_listen(&a, false);
        }
    }
    if (fd < 0) {
        LOG(EV_BIND_FAILED, KV("bind", b->is_unix ? b->path
            : text_addr(text, &a)), KV("error", sl_str(strerror(-fd))));
        return false;
    }
    if (!b->is_unix)
        a.port = io_port(fd);
    listener_pool[idx] = (struct listener){ fd, is_metrics, a };
    if (spare_fd < 0)
        spare_fd = io_spare(STDERR_FILENO);
    return true;
}

/* Let clients in. */
static void main_open(const struct bind *b, size_t idx)
{
    uint8_t text[64];
    const struct listener *l = &listener_pool[idx];
    loop_set(KIND_LISTEN, idx, l->fd, POLLIN, INT64_MAX);
    LOG(EV_START, KV(l->is_metrics ? "metrics" : "listen",
        b->is_unix ? b->path : text_addr(text, &l->addr)),
        KV("version", SL(LKJWT_VERSION)));
}

static void main_signals(sigset_t *old)
{
    static const int number[] = { SIGTERM, SIGINT, SIGHUP };
    struct sigaction act = { .sa_handler = signal_note };
    sigset_t block;
    sigemptyset(&block);
    for (size_t i = 0; i < COUNT_OF(number); i++) {
        (void)sigaction(number[i], &act, NULL);
        sigaddset(&block, number[i]);
    }
    (void)sigprocmask(SIG_BLOCK, &block, old);
}

/* Descriptors for all pools, or fewer clients, and say so. */
static void main_nofile(void)
{
    struct { uint64_t soft, hard; } lim;
    uint64_t fixed = LIM_LANE_CNT + LIM_METRICS_CNT + LIM_CHAN_CNT
        + LIM_QUERY_CNT + LIM_UP_ALL + 32;
    uint64_t need = fixed + (uint64_t)cfg.max_conns;
    char text[96];
    bool may_set = jail_may_call(SYS_prlimit64);
    if (!jail_nofile(may_set, &lim.soft, &lim.hard))
        return;
    if (may_set && lim.soft < need && lim.soft < lim.hard) {
        lim.soft = lim.hard < need ? lim.hard : need;
        (void)syscall(SYS_prlimit64, 0, RLIMIT_NOFILE, &lim, NULL);
        if (!jail_nofile(true, &lim.soft, &lim.hard))
            return;
    }
    if (lim.soft >= need)
        return;
    int64_t room = lim.soft > fixed ? (int64_t)(lim.soft - fixed)
        : (int64_t)(lim.soft / 4) + 1;
    cfg.max_conns = room < cfg.max_conns ? room : cfg.max_conns;
    snprintf(text, sizeof text, "descriptors: %llu; client connections: %lld",
        (unsigned long long)lim.soft, (long long)cfg.max_conns);
    cfg_say(EV_CONFIG_WARN, "LKJWT_MAX_CONNS", text);
}

/* What serving and checking share: configuration, anchors, caches' key. */
static bool main_begin(void)
{
    for (size_t i = 0; i < LIM_LISTEN_CNT; i++)
        listener_pool[i].fd = -1;
    uint8_t secret[64];
    io_random(secret, sizeof secret);
    hash_set_key(secret);
    wipe(secret, sizeof secret);
    met.start_ms = io_wall_ms();
    bool ok = cfg_load();
    ok = ca_load() && ok && !cfg_fault_cnt;
    cfg_wipe();
    if (!loop_open())
        cfg_say(EV_CONFIG_BAD, "-", "epoll_create1(2) is refused");
    return ok && loop_epoll >= 0;
}

/* Tell every limit that a variable sets, one pair each. */
static void main_limits(void)
{
    struct log_kv kv[COUNT_OF(env_tab) + 1];
    uint8_t text[COUNT_OF(env_tab)][32];
    size_t n = 0;
    for (size_t i = 0; i < COUNT_OF(env_tab); i++) {
        const struct env_row *r = &env_tab[i];
        struct bb b = BB(text[i]);
        if (r->kind == ENV_NUMBER)
            bb_u64(&b, (uint64_t)(*(const int64_t *)r->to / r->scale));
        else if (r->kind == ENV_RATE)
            bb_rate(&b, r->to);
        if (b.len)
            kv[n++] = (struct log_kv)KV(r->name, { text[i], b.len });
    }
    kv[n] = (struct log_kv){ NULL, { NULL, 0 } };
    log_event(EV_LIMITS, kv);
}

/* Connect to Redis and take over what it holds, before anybody is let in.
 * False: it cannot be had, or we were told to stop. */
static bool main_redis(const sigset_t *mask)
{
    static const char hex[] = "0123456789abcdef";
    struct rds *r = &rds_pool[RDS_MAIN];
    uint8_t raw[8];
    char text[128];
    io_random(raw, sizeof raw);
    for (size_t i = 0; i < sizeof rep.id; i++)
        rep.id[i] = (uint8_t)hex[raw[i / 2] >> (i % 2 ? 0 : 4) & 15];
    store_mode = STORE_PROBE;
    rds_start(RDS_MAIN, io_now());
    int64_t end = io_now() + LIM_RECHECK_MS;
    while (!loop_is_over && r->state != RD_PAUSE && !rep_is_ready()
           && (r->state != RD_UP || io_now() < end))
        loop_round(mask);
    if (r->state == RD_UP && !rep_is_ready())
        cfg_say(EV_CONFIG_WARN, "LIVEKIT_REDIS_URL",
            "stored leaves are not all taken over yet");
    snprintf(text, sizeof text, "no Redis there: %s", rds_last_fault);
    if (r->state == RD_PAUSE)
        cfg_say(EV_CONFIG_BAD, "LIVEKIT_REDIS_URL", text);
    return !loop_is_over && r->state != RD_PAUSE;
}

/* Start-up: 1 environment and files, 2 descriptors, 3 signals, 4 listeners,
 * 5 the sandbox, 6 Redis and what it holds, then clients and the loop. */
ONCE static int main_serve(int argc, char **argv)
{
    sigset_t mask;
    (void)argc;
    (void)argv;
    if (!main_begin())
        return 1;
    if (!cfg.has_redis)
        cfg_say(EV_CONFIG_WARN, "LIVEKIT_REDIS_URL",
            "unset: delegated leaves live in memory, a restart forgets them");
    (void)io_hosts();
    (void)io_resolv();
    main_nofile();
    main_signals(&mask);
    io_statm_fd = (int)syscall(SYS_openat, AT_FDCWD, "/proc/self/statm",
        O_RDONLY | O_CLOEXEC);
    main_limits();
    if (!main_listen(&cfg.bind, 0, false)
        || (cfg.has_metrics && !main_listen(&cfg.metrics, 2, true))
        || !jail_enter())
        return 1;
    if (cfg.has_redis && !main_redis(&mask))
        return srv_stopping ? 0 : 1;
    main_open(&cfg.bind, 0);
    if (cfg.has_metrics)
        main_open(&cfg.metrics, 2);
    if (cfg.has_as)
        loop_wake(KIND_SEAT, SEAT_PROBE);
    while (!loop_is_over)
        loop_round(&mask);
    LOG0(EV_STOPPED);
    return 0;
}

/* ---- --healthcheck ---- */

/* A question to a running instance: the request, where the reply goes, how
 * much of it is enough, until when. */
struct ask {
    sl request;
    uint8_t *reply;
    size_t cap, len;
    int64_t end;
};

/* Wait until the socket is ready. False: not in time. */
static bool ask_ready(const struct ask *k, int fd, short events)
{
    struct pollfd p = { fd, events, 0 };
    for (;;) {
        int64_t left = k->end - io_now();
        int n = left > 0 ? poll(&p, 1, (int)left) : 0;
        if (n >= 0 || errno != EINTR)
            return n == 1;
    }
}

/* Ask over a new socket. False: no complete answer. */
static bool ask_fd(struct ask *k, int fd, const struct sockaddr *sa,
    socklen_t len)
{
    sl rest = k->request;
    k->len = 0;
    if ((connect(fd, sa, len) < 0 && errno != EINPROGRESS && errno != EINTR)
        || !ask_ready(k, fd, POLLOUT) || io_connected(fd))
        return false;
    while (rest.len) {
        ssize_t n = ask_ready(k, fd, POLLOUT) ? io_write(fd, rest) : -EIO;
        if (n < 0 && n != -EAGAIN)
            return false;
        rest = sl_skip(rest, n > 0 ? (size_t)n : 0);
    }
    while (k->len < k->cap) {
        ssize_t n = ask_ready(k, fd, POLLIN)
            ? io_read(fd, k->reply + k->len, k->cap - k->len) : -EIO;
        if (n == 0 || (n < 0 && n != -EAGAIN))
            return n == 0 && k->len > 0;
        k->len += n > 0 ? (size_t)n : 0;
    }
    return true;
}

static bool ask_addr(struct ask *k, const struct addr *a)
{
    struct sockaddr_storage sa;
    socklen_t len = io_sockaddr(a, &sa);
    int fd = socket(sa.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC,
        0);
    bool ok = fd >= 0 && ask_fd(k, fd, (struct sockaddr *)&sa, len);
    io_close(&fd);
    return ok;
}

/* Ask whoever listens at a bind value (PROTOCOL section 14). */
static bool ask_bind(struct ask *k, const struct bind *b)
{
    static const struct ip loop4 = { .b = { 127, 0, 0, 1 } };
    static const struct ip loop6 = { .b = { [15] = 1 }, .v6 = true };
    struct addr a = b->addr, other = b->addr;
    struct sockaddr_un sa;
    if (b->is_unix) {
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC,
            0);
        bool ok = fd >= 0 && io_unix_addr(b->path, &sa)
            && ask_fd(k, fd, (struct sockaddr *)&sa, sizeof sa);
        io_close(&fd);
        return ok;
    }
    if (!b->is_any)
        return ask_addr(k, &a);
    bool six_first = b->is_dual && b->host.p == NULL;
    a.ip = six_first ? loop6 : loop4;
    other.ip = six_first ? loop4 : loop6;
    return ask_addr(k, &a) || (b->is_dual && ask_addr(k, &other));
}

/* Probe the address that the bind variables name. */
static int main_healthcheck(int argc, char **argv)
{
    uint8_t reply[13];
    struct ask k = { SL("GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
        "Connection: close\r\n\r\n"), reply, sizeof reply, 0,
        io_now() + 2500 };
    (void)argc;
    (void)argv;
    cfg.log_level = 'e';
    cfg_binds();
    if (cfg_fault_cnt) {
        out("unhealthy: LIVEKIT_JWT_BIND or LIVEKIT_JWT_PORT is unusable\n");
        return 1;
    }
    bool ok = ask_bind(&k, &cfg.bind) && k.len == sizeof reply
        && memcmp(reply, "HTTP/1.1 200 ", sizeof reply) == 0;
    if (!ok)
        out("unhealthy: no 200 from /healthz\n");
    return ok ? 0 : 1;
}

/* ---- --check ---- */

static bool check_failed;
static sl check_server;
static struct up *check_up;

static void check_line(const char *step, bool ok, sl text)
{
    char line[512];
    snprintf(line, sizeof line, "%-5s %-11s %.*s\n", ok ? "ok" : "no", step,
        (int)(text.len < 400 ? text.len : 400), (const char *)text.p);
    out(line);
}

/* GetParticipant in a room that does not exist: `not_found` proves that
 * the key is accepted, and changes nothing. */
static void check_build(uint16_t idx, struct bb *b)
{
    const sl nobody = SL("lkjwt-check-lkjwt-check-lkjwt-check-lkjwt-c");
    uint8_t text[128];
    struct bb body = BB(text);
    (void)idx;
    pb_participant(&body, nobody, SL("nobody"));
    lk_put(b, "GetParticipant", nobody,
        (sl){ text, body.len }, (sl){ NULL, 0 });
}

/* Run the loop until the object of a check has ended. */
static void check_run(bool (*is_over)(void))
{
    sigset_t mask;
    sigemptyset(&mask);
    while (!is_over())
        loop_round(&mask);
}

static bool check_up_over(void)
{
    return check_up->state == UP_DONE || check_up->state == UP_FAILED;
}

/* What stopped a call or a lookup; up may be NULL. For a denied address
 * which range it lies in, and whether that can be allowed. */
static void check_why(struct bb *b, enum event why, const struct up *up)
{
    const char *range;
    bb_str(b, event_tab[why].text);
    if (why != EV_SSRF_DENIED || !up)
        return;
    bool never = ip_range(up->addr.ip, &range) == RANGE_N;
    bb_str(b, ", range ");
    bb_str(b, range);
    bb_str(b, never ? "" : "; LKJWT_ALLOW_NETWORKS allows it");
}

static void check_sfu(int64_t now)
{
    char text[300];
    uint8_t addr[64];
    check_up = lk_open(KIND_SIGNAL, 0, check_build, now + LIM_RPC_MS, now);
    if (!check_up)
        return;
    check_run(check_up_over);
    struct up *u = check_up;
    sl at = u->has_addr ? text_addr(addr, &u->addr) : SL("no address");
    sl code = lk_code(u);
    bool ok = u->state == UP_DONE && u->head.status == 404
        && sl_eq(code, SL("not_found"));
    const char *why = u->state == UP_FAILED ? event_tab[u->why].text
        : ok ? "answers, key accepted"
        : u->head.status == 401 ? event_tab[EV_SFU_AUTH].text
        : "does not answer as LiveKit does; is the path right?";
    snprintf(text, sizeof text, "%.*s (%.*s): %s%s%s",
        (int)cfg.api.text.len, (const char *)cfg.api.text.p, (int)at.len,
        (const char *)at.p, u->state == UP_FAILED ? u->step : "",
        u->state == UP_FAILED ? ": " : "", why);
    check_line("sfu", ok, sl_str(text));
    check_failed |= !ok;
    up_close(u, io_now());
}

/* ---- --check: do clients find us? --------------------------------------
 * As they do it (MSC4143): the well-known for clients of a server that the
 * operator named, the service URL in it, and a request there. That is a
 * POST to /get_token with an empty body: a service refuses it before it
 * asks anybody, and unlike /healthz every proxy must let it through.
 */

/* The call at the URL of a focus; borrows from the well-known's reply. */
static struct url check_url;

static void check_build_focus(uint16_t idx, struct bb *b)
{
    (void)idx;
    bb_str(b, "POST ");
    bb_put(b, check_url.rest);
    bb_str(b, "/get_token HTTP/1.1\r\nHost: ");
    bb_put(b, check_url.name.whole);
    bb_str(b, "\r\nAccept: application/json\r\nUser-Agent: lkjwt/"
        LKJWT_VERSION "\r\nContent-Length: 0\r\n\r\n");
}

/* As much of a path as a line takes. */
static sl check_cut(sl path)
{
    return (sl){ path.p, path.len < 100 ? path.len : 100 };
}

static void check_put_url(struct bb *b, const struct url *url)
{
    bb_str(b, "https://");
    bb_put(b, url->name.whole);
    bb_put(b, check_cut(url->rest));
    bb_str(b, ": ");
}

/* Read the list of foci; *url is the first one of LiveKit's. Returns 0 or
 * -EV_JSON_*. */
MUST_USE static int check_foci(struct js *j, sl *url)
{
    struct focus { sl type, url; } f;
    static const struct js_field field[] = {
        { "type", JS_STRING, offsetof(struct focus, type), NULL },
        { "livekit_service_url", JS_STRING, offsetof(struct focus, url),
          NULL } };
    static const struct js_table tab = { field, 2, false, false };
    static const struct js_field item = { "", JS_OBJECT, 0, &tab };
    if (!js_take(j, '['))
        return -EV_JSON_TYPE;
    js_blank(j);
    for (bool more = !js_take(j, ']'); more; ) {
        f = (struct focus){ { NULL, 0 }, { NULL, 0 } };
        int err = js_value(j, &item, &f);
        if (err)
            return err;
        if (url->len == 0 && sl_eq(f.type, SL("livekit")))
            *url = f.url;
        js_blank(j);
        more = js_take(j, ',');
        js_blank(j);
        if (!more && !js_take(j, ']'))
            return -EV_JSON_SYNTAX;
    }
    return 0;
}

/* Find LiveKit's service URL in a well-known for clients, decoded in place.
 * Returns NULL or what is wrong. */
static const char *check_well_known(uint8_t *text_raw, size_t len, sl *url)
{
    static const char broken[] = "is not JSON as clients expect it";
    struct js j;
    bool found = false;
    j.p = text_raw;
    j.len = len;
    j.pos = j.key_cnt = 0;
    j.depth = 1;
    j.value_cnt = 0;
    js_blank(&j);
    if (!js_take(&j, '{'))
        return broken;
    js_blank(&j);
    for (bool more = !js_take(&j, '}'); more; ) {
        sl key;
        if (js_key(&j, 0, &key))
            return broken;
        bool is_foci = sl_eq(key, SL("org.matrix.msc4143.rtc_foci"));
        found |= is_foci;
        if (is_foci ? check_foci(&j, url) : js_value(&j, NULL, NULL))
            return broken;
        js_blank(&j);
        more = js_take(&j, ',');
        js_blank(&j);
        if (!more && !js_take(&j, '}'))
            return broken;
    }
    js_blank(&j);
    return j.pos < j.len ? broken
        : !found ? "has no org.matrix.msc4143.rtc_foci: clients do not know "
            "where calls are"
        : url->len == 0 ? "org.matrix.msc4143.rtc_foci has no entry of type "
            "livekit with a livekit_service_url"
        : NULL;
}

/* Ask for the well-known, redirects followed, and read it. Returns whether
 * check_url is where clients are led to; else b says what is wrong. */
static bool check_led(struct lookup *l, struct bb *b)
{
    sl at = { NULL, 0 };
    lookup_first_hop(l, "/.well-known/matrix/client", io_now());
    while (l->up && l->state != L_FAILED) {
        l->state = L_DONE;           /* the reply is ours to read */
        check_up = l->up;
        check_run(check_up_over);
        unsigned st = l->up->head.status;
        if (l->up->state == UP_FAILED || (st != 301 && st != 302 && st != 303
            && st != 307 && st != 308))
            break;
        lookup_redirect(l, io_now());
    }
    check_put_url(b, &l->url);
    struct up *u = l->up;
    bool failed = u && u->state == UP_FAILED;
    if (!u || failed || l->state == L_FAILED) {
        bb_str(b, failed ? u->step : "");
        bb_str(b, failed ? ": " : "");
        check_why(b, failed ? u->why : l->why, u);
        return false;
    }
    if (u->head.status != 200) {
        bb_str(b, "answers ");
        bb_u64(b, u->head.status);
        bb_str(b, "; clients read there where calls are");
        return false;
    }
    const char *why = check_well_known(up_body(u), u->intake.len, &at);
    if (!why && (!url_parse(at, &check_url) || check_url.has_query
        || !sl_ieq(check_url.scheme, SL("https"))
        || !host_is_public(l, &check_url.name)))
        why = "livekit_service_url is not a plain https:// URL";
    bb_str(b, why ? why : "");
    return !why;
}

/* Judge the answer at the URL of a focus. Returns whether it is ours. */
static bool check_focus_answer(struct up *u, struct bb *b)
{
    static const struct js_field field[] = {
        { "errcode", JS_STRING, 0, NULL } };
    static const struct js_table tab = { field, 1, false, false };
    unsigned st = u->head.status;
    sl code = { NULL, 0 };
    if (u->state == UP_FAILED) {
        bb_str(b, u->step);
        bb_str(b, ": ");
        check_why(b, u->why, u);
        return false;
    }
    bool matrix = !js_parse(up_body(u), u->intake.len, &tab, &code)
        && sl_starts(code, SL("M_"));
    if (matrix && st != 404) {
        bb_str(b, "answers");
        return true;
    }
    bb_str(b, "answers ");
    bb_u64(b, st);
    bb_str(b, " to /get_token: ");
    bb_str(b, st == 404 ? "the proxy leads it elsewhere"
        : st >= 300 && st < 400 ? "browsers do not follow; name the URL "
            "that it leads to"
        : st >= 502 && st <= 504 ? "the proxy does not reach lkjwt"
        : "not as lkjwt does");
    if (st == 404 && !matrix && check_url.path.len) {
        bb_str(b, ", or leaves the prefix in: strip it there or set "
            "LKJWT_PATH_PREFIX=");
        bb_put(b, check_cut(check_url.path));
    }
    return false;
}

/* Whether the clients of a server, which the operator named, find us. */
static void check_focus(const struct name *n, int64_t now)
{
    uint8_t text[800];
    struct bb b = BB(text);
    struct lookup *l = lookup_take(KIND_SIGNAL, 0, n, dest_hash(n->whole),
        now, now);
    if (!l)
        return;
    l->is_client = true;
    note_hook = NULL;
    bool ok = check_led(l, &b);
    loop_set(KIND_LOOKUP, lookup_idx(l), -1, 0, INT64_MAX);
    if (ok) {
        struct up_call c = { .owner = KIND_SIGNAL, .label = TL_CLIENT_API,
            .trust = name_trust(&check_url.name, l->is_listed),
            .is_tls = true, .host = check_url.name.host,
            .port = check_url.name.port ? check_url.name.port : 443,
            .cert_name = check_url.name.host, .reply_cap = LIM_RPC_LEN,
            .end = io_now() + LIM_RPC_MS, .build = check_build_focus,
            .search = is_single_label(check_url.name.host) };
        b.len = 0;
        check_put_url(&b, &check_url);
        check_up = up_open(&c, 0, LIM_UP_CNT, io_now());
        ok = check_up != NULL;
        if (ok) {
            check_run(check_up_over);
            ok = check_focus_answer(check_up, &b);
            up_close(check_up, io_now());
        }
    }
    check_line("focus", ok, (sl){ text, b.len });
    check_failed |= !ok;
    lookup_close(l, io_now());
}

static struct lookup *check_lookup;

static bool check_lookup_over(void)
{
    return check_lookup->state == L_DONE || check_lookup->state == L_FAILED;
}

/* Ask the homeserver about a token that cannot exist: 401 is the good
 * answer, it says that the openid listener is there. */
ONCE static void check_homeserver(int64_t now)
{
    struct name n;
    uint8_t addr[64], text[400];
    if (!name_parse(check_server, &n)) {
        check_line("name", false, sl_str(event_tab[EV_NAME_BAD].text));
        check_failed = true;
        return;
    }
    bool denied = name_denied(&n);
    bool full = has_full_access(n.whole);
    check_line("name", !denied, denied
        ? SL("refused by LKJWT_BLOCKED_HOMESERVERS or "
             "LKJWT_ALLOWED_HOMESERVERS")
        : full ? SL("full access: may create rooms")
               : SL("restricted: may join rooms that exist"));
    check_failed |= denied;
    check_lookup = lookup_open(KIND_SIGNAL, 0, &n, dest_hash(n.whole),
        SL("lkjwt-check"), (sl){ NULL, 0 }, now, now);
    if (!check_lookup)
        return;
    check_run(check_lookup_over);
    struct lookup *l = check_lookup;
    bool ok = l->why == EV_TOKEN_UNKNOWN;
    struct bb b = BB(text);
    bb_put(&b, l->up && l->up->has_addr ? text_addr(addr, &l->up->addr)
        : n.whole);
    bb_str(&b, ": ");
    if (ok)
        bb_str(&b, "knows OpenID tokens; all is well");
    else if (l->why == EV_REPLY_STATUS)
        bb_str(&b, "answers, but not to OpenID look-ups: is its `openid` or "
            "`federation` listener on?");
    else
        check_why(&b, l->why, l->up);
    check_line(ok ? "userinfo" : l->step ? l->step : "userinfo", ok,
        (sl){ text, b.len });
    check_failed |= !ok;
    lookup_close(l, io_now());
    if (name_in(n.whole, cfg.full_access, cfg.full_access_cnt))
        check_focus(&n, io_now());
}

static bool check_redis_over(void)
{
    return rds_is_up(RDS_MAIN) || rds_pool[RDS_MAIN].state == RD_PAUSE;
}

static void check_redis(int64_t now)
{
    if (!cfg.has_redis)
        return;
    rds_start(RDS_MAIN, now);
    check_run(check_redis_over);
    bool ok = rds_is_up(RDS_MAIN);
    const struct redis_url *r = &cfg.redis;
    sl at = r->is_unix ? r->path : r->host;
    char text[400], port[8] = "";
    if (!r->is_unix)
        snprintf(port, sizeof port, ":%u", r->port);
    snprintf(text, sizeof text, "%.*s%s: %s",
        (int)(at.len < 256 ? at.len : 256), (const char *)at.p, port,
        ok ? "answers, log-in accepted" : rds_last_fault);
    check_line("redis", ok, sl_str(text));
    check_failed |= !ok;
}

static struct inquiry *check_inq;

static bool check_inq_over(void)
{
    return check_inq->state == I_DONE;
}

/* Put one question to the homeserver that we are an application service of.
 * `want` is the status that shows that all is well, `errcode` one that
 * shows as much. */
static void check_ask(enum inq_kind kind, sl first, sl second,
    unsigned want, const char *errcode, const char *good)
{
    char text[300];
    int64_t now = io_now();
    check_inq = inq_open(kind, first, second, now + LIM_INQ_MS);
    if (!check_inq)
        return;
    check_run(check_inq_over);
    const struct inquiry *q = check_inq;
    bool known = errcode && sl_eq(q->reply.errcode, sl_str(errcode));
    bool ok = q->answer != INQ_UNKNOWN && !q->hint
        && (q->status == want || known);
    snprintf(text, sizeof text, "%s%s%.*s", ok ? good : q->hint ? q->hint
        : q->why ? event_tab[q->why].text : "unexpected answer ",
        "", ok || q->hint || q->why ? 0 : (int)log_errcode(
            q->reply.errcode).len, (const char *)q->reply.errcode.p);
    check_line(inq_tab[kind].name, ok, sl_str(text));
    check_failed |= !ok;
    inq_close(check_inq, now);
}

/* Ask the homeserver for all that the application-service mode needs: our
 * token, the scope, the relay, and that it passes requests on to a running
 * lkjwt whose token it knows. A registration without `url` cannot be pinged,
 * which shows that the token is accepted all the same. */
static void check_appservice(void)
{
    uint8_t text[LIM_NAME_LEN + 8];
    struct bb room = BB(text);
    if (!cfg.has_as)
        return;
    bb_str(&room, "!lkjwt:");
    bb_put(&room, cfg.hs_name.whole);
    check_ask(INQ_PING, cfg.as_id, SL(""), 200, "M_URL_NOT_SET",
        "the homeserver accepts LIVEKIT_AS_TOKEN");
    check_ask(INQ_SERVER, (sl){ text, room.len }, cfg.hs_name.whole, 200,
        NULL, "the homeserver tells who is joined");
    check_ask(INQ_RELAY, SL(""), SL(""), 400, NULL,
        "the homeserver relays to others");
    check_ask(INQ_LOOP, SL(""), SL(""), 400, NULL,
        "the homeserver passes requests on to lkjwt");
}

/* The value of a metric in a reply, 0 when it is not there. */
static uint64_t check_metric(sl text, const char *name)
{
    sl line, want = sl_str(name);
    uint64_t v = 0;
    while (sl_word(&text, "\r\n", &line))
        if (sl_starts(line, want)
            && !sl_u64(sl_skip(line, want.len), INT64_MAX, &v))
            return 0;
    return v;
}

/* Ask the running instance whether the SFU's webhooks arrive. */
static void check_webhooks(void)
{
    struct ask k = { SL("GET /metrics HTTP/1.0\r\n\r\n"), file_buf,
        sizeof file_buf, 0, io_now() + 2500 };
    char text[80];
    if (!cfg.has_metrics || !ask_bind(&k, &cfg.metrics))
        return;
    sl reply = { file_buf, k.len };
    uint64_t got = check_metric(reply,
        "lkjwt_events_total{event=\"WEBHOOK\"} ");
    bool ok = check_metric(reply,
        "lkjwt_events_total{event=\"NO_WEBHOOK\"} ") == 0;
    snprintf(text, sizeof text, "%llu since the start",
        (unsigned long long)got);
    check_line("webhooks", ok, sl_str(ok ? text
        : event_tab[EV_NO_WEBHOOK].text));
    check_failed |= !ok;
}

/* Test the configuration, the SFU, Redis and, when named, a homeserver: one
 * line a step on stdout. */
ONCE static int main_check(int argc, char **argv)
{
    char text[64];
    bool ok = main_begin();
    cfg.log_level = cfg.log_level == 'd' ? 'd' : 'e';
    check_line("config", cfg_fault_cnt == 0, cfg_fault_cnt == 0
        ? SL("complete") : SL("has faults, see the lines on stderr"));
    snprintf(text, sizeof text, "%u", anchor_set[anchor_now].cnt);
    check_line("anchors", anchor_set[anchor_now].cnt > 0, sl_str(text));
    if (!ok)
        return 1;
    check_sfu(io_now());
    check_redis(io_now());
    check_appservice();
    check_webhooks();
    if (argc > 0) {
        check_server = sl_str(argv[0]);
        note_hook = check_line;
        check_homeserver(io_now());
    }
    out(check_failed ? "there are faults\n" : "all is well\n");
    return check_failed ? 1 : 0;
}

int main(int argc, char **argv)
{
    const char *name = argc > 0 ? argv[0] : "";
    const char *slash = strrchr(name, '/');
    const char *want = argc > 1 ? argv[1] : "";
    (void)signal(SIGPIPE, SIG_IGN);
    for (int fd = 0; fd >= 0 && fd <= 2; ) { /* 0 to 2 are never sockets */
        fd = (int)syscall(SYS_openat, AT_FDCWD, "/", O_RDONLY);
        if (fd > 2)
            close(fd);
    }
    if (strcmp(slash ? slash + 1 : name, "lk-jwt-service-healthcheck") == 0)
        want = "--healthcheck";
    for (size_t i = 0; i < COUNT_OF(command_tab); i++)
        if (strcmp(want, command_tab[i].name) == 0
            && argc - 2 <= command_tab[i].max_args) {
            int status = command_tab[i].run(argc > 2 ? argc - 2 : 0,
                argv + 2);
            return status == 0 && out_failed ? 1 : status;
        }
    (void)main_help(0, NULL);
    return 1;
}
