// What is measured. Each scenario starts a service of its own, and checks
// from the counters of the service and of the stand-ins that what it says
// did happen.
package main

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

var scenarios = []struct {
	name string
	run  func(b *bench, bin string) error
}{
	{"start", start},
	{"warm-16", warm16},
	{"warm-growth", growth},
	{"warm-servers", servers},
	{"closing", closing},
	{"dying", dying},
	{"first-contact", firstContact},
	{"healthz", healthz},
	{"idle-connections", idleConnections},
	{"preflight", preflight},
	{"webhooks", webhooks},
	{"jobs", jobs},
	{"evening", evening},
	{"storm", storm},
}

// ---- requests

const head = " HTTP/1.1\r\nHost: bench.example\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101\r\nAccept: */*\r\n"

var getHealthz = []byte("GET /healthz" + head + "\r\n")
var optionsToken = []byte("OPTIONS /get_token" + head + "Origin: https://call.example\r\n" +
	"Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: content-type\r\n\r\n")

func always(request []byte) func(int, []byte) ([]byte, int) {
	return func(_ int, b []byte) ([]byte, int) { return append(b, request...), 0 }
}

func post(b []byte, path, more, body string) []byte {
	return append(b, fmt.Sprintf("POST %s%sContent-Type: application/json\r\n%sContent-Length: %d\r\n\r\n%s",
		path, head, more, len(body), body)...)
}

var rooms int64

// exchange asks for a token, each for another room, users of the homeserver
// that name(i) says.
func exchange(name func(i int) string) func(int, []byte) ([]byte, int) {
	base := atomic.AddInt64(&rooms, 1) * 1000000
	return func(i int, b []byte) ([]byte, int) {
		n := name(i)
		return post(b, "/get_token", "Origin: https://call.example\r\n", member(fmt.Sprintf("!r%d:bench.example", base+int64(i)),
			fmt.Sprintf("u%d", i%4000), n, "")), 0
	}
}

const (
	memberID = "6f3c9a52-1d6b-4f0e-9c57-2f4f7ad0c3b1"
	deviceID = "ABCDEFGHIJ"
	slotID   = "m.call#ROOM"
)

func member(room, user, server, more string) string {
	return fmt.Sprintf(`{"room_id":"%s","slot_id":"%s","openid_token":{"access_token":"%s","token_type":"Bearer",`+
		`"matrix_server_name":"%s","expires_in":3600},"member":{"id":"%s","claimed_user_id":"@%s:%s","claimed_device_id":"%s"}%s}`,
		room, slotID, user, server, memberID, user, server, deviceID, more)
}

func hashed(parts ...string) string {
	sum := sha256.Sum256([]byte(`["` + strings.Join(parts, `","`) + `"]`))
	return base64.RawStdEncoding.EncodeToString(sum[:])
}

// webhook is a signed event as LiveKit sends it.
func webhook(b []byte, event, room, identity, more, id string) []byte {
	now := time.Now().Unix()
	body := fmt.Sprintf(`{"event":"%s","room":{"sid":"RM_%s","name":"%s","emptyTimeout":300,"departureTimeout":20,`+
		`"creationTime":"%d","turnPassword":"x","enabledCodecs":[{"mime":"audio/opus"},{"mime":"audio/red"},{"mime":"video/VP8"},`+
		`{"mime":"video/H264"},{"mime":"video/VP9"},{"mime":"video/AV1"}]},"participant":{"sid":"PA_bench","identity":"%s",`+
		`"state":"ACTIVE","joinedAt":"%d","version":3,"permission":{"canSubscribe":true,"canPublish":true,"canPublishData":true,`+
		`"canUpdateMetadata":true},"isPublisher":true%s},"id":"EV_%s","createdAt":"%d"}`,
		event, id, room, now, identity, now, more, id, now)
	sum := sha256.Sum256([]byte(body))
	e := base64.RawURLEncoding
	token := e.EncodeToString([]byte(`{"alg":"HS256","typ":"JWT"}`)) + "." + e.EncodeToString([]byte(fmt.Sprintf(
		`{"iss":"%s","exp":%d,"nbf":%d,"sha256":"%s"}`, apiKey, now+300, now, base64.StdEncoding.EncodeToString(sum[:]))))
	mac := hmac.New(sha256.New, []byte(apiSecret))
	mac.Write([]byte(token))
	return append(b, fmt.Sprintf("POST /sfu_webhook HTTP/1.1\r\nHost: bench.example\r\nUser-Agent: Go-http-client/1.1\r\n"+
		"Content-Length: %d\r\nAuthorization: %s.%s\r\nContent-Type: application/webhook+json\r\n\r\n%s",
		len(body), token, e.EncodeToString(mac.Sum(nil)), body)...)
}

func granted(_, status int, body []byte) bool {
	return status == 200 && bytes.Contains(body, []byte(`"jwt":"eyJ`))
}

func one(name string) func(int) string { return func(int) string { return name } }

func manyNames(n int) func(int) string {
	return func(i int) string { return fmt.Sprintf("127.0.0.1:%d", manyPort+i%n) }
}

// ---- one load, measured

// measure runs a load. The service's counters must show as many requests of
// the routes named, answered with 200, as were sent.
func (b *bench) measure(s *service, l *load, routes ...string) (figures, *result, error) {
	type sample struct {
		cpu             time.Duration
		m               map[string]float64
		hsConns, hsAsks int
		sfuConns, rooms int
	}
	var errs []error
	take := func(p *sample, first bool) {
		var err error
		if !first { // asking for counters costs the service CPU
			p.cpu = cpuOf(s.pid)
		}
		if p.m, err = s.counters(); err != nil {
			errs = append(errs, err)
		}
		if p.hsConns, p.hsAsks, err = b.hs.counts(); err != nil {
			errs = append(errs, err)
		}
		if p.sfuConns, p.rooms, err = b.sfu.counts(); err != nil {
			errs = append(errs, err)
		}
		if first {
			p.cpu = cpuOf(s.pid)
		}
	}
	var from, to sample
	l.start = func() { take(&from, true) }
	l.end = func() { take(&to, false) }
	r, err := l.run()
	if err != nil {
		return nil, nil, err
	}
	if len(errs) > 0 {
		return nil, nil, errs[0]
	}
	if r.sent == 0 {
		return nil, nil, fmt.Errorf("no request was sent")
	}
	n := float64(r.sent)
	lat := r.sorted()
	delta := func(key string) float64 { return to.m[key] - from.m[key] }
	f := figures{
		"requests": n, "failed": float64(r.failed), "cpu_us": float64(to.cpu-from.cpu) / 1e3 / n,
		"p50_ms": quantile(lat, .5), "p99_ms": quantile(lat, .99), "p999_ms": quantile(lat, .999), "per_s": n / r.took.Seconds(),
		"cpu_share": (to.cpu - from.cpu).Seconds() / r.took.Seconds(), "rss_mb": s.rss(),
		"dialed":   float64(to.hsConns - from.hsConns + to.sfuConns - from.sfuConns),
		"userinfo": float64(to.hsAsks - from.hsAsks), "sfu_calls": float64(to.rooms - from.rooms),
	}
	if s.metrics != "" {
		f["handshakes"], f["resumed"] = delta("lkjwt_tls_handshakes_total"), delta("lkjwt_tls_resumed_total")
		f["reused"] = delta("lkjwt_upstream_reused_total")
		got := 0.0
		for _, route := range routes {
			got += delta(fmt.Sprintf(`lkjwt_http_requests_total{route="%s",code="200"}`, route))
		}
		if len(routes) > 0 && got != n {
			err = fmt.Errorf("%v requests sent, the service answered %v with 200", n, got)
		}
	}
	if problem := r.problem(); problem != "" {
		err = fmt.Errorf("of %d requests %s", r.sent, problem)
	}
	return f, r, err
}

// exchanges measures token exchanges. At nginx's stand-ins each must be one
// userinfo request and one room, no more and no less.
func (b *bench) exchanges(s *service, l *load, title, target string) (figures, error) {
	l.addr, l.good = s.addr, granted
	f, r, err := b.measure(s, l, "/get_token")
	if f != nil {
		b.row(title, target, f)
		b.curve(title, r)
		if err == nil && (f["userinfo"] != f["requests"] || f["sfu_calls"] != f["requests"]) {
			err = fmt.Errorf("%v exchanges: %v userinfo requests, %v rooms", f["requests"], f["userinfo"], f["sfu_calls"])
		}
	}
	if err != nil {
		err = fmt.Errorf("%s: %v", title, err)
	}
	return f, err
}

// warmUp makes connections, sessions and caches.
func warmUp(s *service, conns int, name func(int) string, n int) error {
	r, err := (&load{addr: s.addr, conns: conns, n: n, next: exchange(name), good: granted}).run()
	if err == nil && r.failed > 0 {
		err = fmt.Errorf("warming up: %s", r.problem())
	}
	return err
}

// with runs f beside a service.
func (b *bench) with(bin string, env map[string]string, f func(s *service) error) error {
	s, err := b.startService(bin, env)
	if err != nil {
		return err
	}
	err = f(s)
	stopped := s.stop()
	if err != nil {
		return fmt.Errorf("%v (log: %s)", err, s.log)
	}
	os.Remove(s.log)
	if b.who == 0 {
		return stopped
	}
	return nil
}

var everyone = map[string]string{"LIVEKIT_FULL_ACCESS_HOMESERVERS": "*"}

// ---- the scenarios

func start(b *bench, bin string) error {
	info, err := os.Stat(bin)
	if err != nil {
		return err
	}
	b.cell("binary", "KB", "512", float64(info.Size())/1024)
	var first, cpu, idle []float64
	for i := 0; i < 15; i++ {
		err := b.with(bin, nil, func(s *service) error {
			cpu = append(cpu, cpuOf(s.pid).Seconds()*1e3)
			first = append(first, s.first.Seconds()*1e3)
			idle = append(idle, s.rss())
			return nil
		})
		if err != nil {
			return err
		}
	}
	b.cell("start to first /healthz, Debian's CA bundle read", "ms", "5", median(first))
	b.cell("CPU of that", "ms", "", median(cpu))
	b.cell("resident, idle", "MB", "2", median(idle))
	return nil
}

func warm16(b *bench, bin string) error {
	return b.with(bin, nil, func(s *service) error {
		if err := warmUp(s, 16, one(b.warm), 64); err != nil {
			return err
		}
		f, err := b.exchanges(s, &load{conns: 16, n: 20000, next: exchange(one(b.warm))}, "exchange, warm, 16 clients", "35")
		if f != nil {
			b.cell("resident after 20,000 exchanges", "MB", "4", f["rss_mb"])
		}
		return err
	})
}

func growth(b *bench, bin string) error {
	cost := map[int]float64{}
	for _, clients := range []int{1, 4, 10, 32, 100, 320, 1000} {
		err := b.with(bin, nil, func(s *service) error {
			if err := warmUp(s, clients, one(b.warm), 2*clients); err != nil {
				return err
			}
			target, part := "", .4
			switch clients {
			case 1:
				target = "100"
				fallthrough
			case 10, 100, 1000:
				part = 1
			}
			title := fmt.Sprintf("exchange, warm, %s clients", whole(float64(clients)))
			if clients == 1 {
				title = "exchange, warm, 1 client"
			}
			f, err := b.exchanges(s, &load{conns: clients, d: b.times(part), next: exchange(one(b.warm))}, title, target)
			if f != nil {
				cost[clients] = f["cpu_us"]
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	b.growth[b.who] = cost
	b.cell("cost of an exchange, 1,000 clients against 10", "×", "1.25", cost[1000]/cost[10])
	return nil
}

func servers(b *bench, bin string) error {
	var cost []float64
	// What is measured is their cost, not how strangers are held back.
	env := map[string]string{"LIVEKIT_FULL_ACCESS_HOMESERVERS": "*", "LKJWT_TLS_COLD_PER_S": "1000"}
	for _, n := range []int{10, 100, 1000} {
		err := b.with(bin, env, func(s *service) error {
			if err := warmUp(s, 16, manyNames(n), 2*n); err != nil {
				return err
			}
			l := &load{conns: 16, d: b.times(1), next: exchange(manyNames(n))}
			title := fmt.Sprintf("exchange, %s homeservers, 16 clients", whole(float64(n)))
			f, err := b.exchanges(s, l, title, "")
			if f != nil {
				cost = append(cost, f["cpu_us"])
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	b.cell("cost of an exchange, 1,000 homeservers against 10", "×", "1.25", cost[2]/cost[0])
	return nil
}

func closing(b *bench, bin string) error {
	for _, c := range []struct{ name, title, target string }{
		{b.withIDs, "exchange, homeserver closes, session ids", "500"},
		{b.withoutID, "exchange, homeserver closes, no resumption", "1,600"},
	} {
		err := b.with(bin, nil, func(s *service) error {
			if err := warmUp(s, 16, one(c.name), 32); err != nil {
				return err
			}
			f, err := b.exchanges(s, &load{conns: 16, d: b.times(1.5), next: exchange(one(c.name))}, c.title, c.target)
			if err != nil {
				return err
			}
			if s.metrics != "" && f["handshakes"] != f["requests"] {
				return fmt.Errorf("%s: %v exchanges, %v handshakes", c.title, f["requests"], f["handshakes"])
			}
			if resumes := c.name == b.withIDs; s.metrics != "" && resumes != (f["resumed"] > .9*f["requests"]) {
				return fmt.Errorf("%s: %v of %v resumed", c.title, f["resumed"], f["handshakes"])
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// dying has both peers cut kept connections, with or without a reset, at
// times when a request may be on its way.
func dying(b *bench, bin string) error {
	leaf, err := b.middle.leaf(net.IPv4(127, 0, 0, 1))
	if err != nil {
		return err
	}
	hs, err := startHomeservers(func(net.IP) (*tls.Certificate, error) { return leaf, nil }, 7, userinfo)
	if err != nil {
		return err
	}
	defer hs.server.Close()
	sfu, err := startHomeservers(nil, 11, func(*http.Request) (string, []byte) {
		return "application/protobuf", []byte(roomReply)
	})
	if err != nil {
		return err
	}
	defer sfu.server.Close()
	name := fmt.Sprintf("127.0.0.1:%d", hs.port)
	env := map[string]string{"LIVEKIT_FULL_ACCESS_HOMESERVERS": name, "LIVEKIT_URL": fmt.Sprintf("ws://127.0.0.1:%d", sfu.port)}
	return b.with(bin, env, func(s *service) error {
		f, _, err := b.measure(s, &load{addr: s.addr, conns: 16, d: b.times(2), next: exchange(one(name)), good: granted}, "/get_token")
		if f == nil {
			return err
		}
		delete(f, "dialed") // nginx alone counts them
		b.row("exchange, kept connections die, 16 clients", "", f)
		b.cell("failed when kept connections die", "%", "0", 100*f["failed"]/f["requests"])
		killed := atomic.LoadInt64(&hs.killed) + atomic.LoadInt64(&sfu.killed)
		if float64(killed) < f["requests"]/10 {
			return fmt.Errorf("only %d connections died in %v exchanges", killed, f["requests"])
		}
		return err
	})
}

// contact names the i-th homeserver that was never met.
func contact(port, i int) (net.IP, string) {
	ip := net.IPv4(127, 10, byte(1+i/250), byte(1+i%250))
	return ip, fmt.Sprintf("%s:%d", ip, port)
}

// startContacts makes n homeservers, each with a leaf of its own, from one
// intermediate or each from its own.
func (b *bench) startContacts(n int, own bool) (*homeservers, error) {
	certs := map[string]*tls.Certificate{}
	for i := 0; i < n; i++ {
		ip, _ := contact(0, i)
		key := fmt.Sprint(ip, own)
		if b.contacts[key] == nil {
			by := b.middle
			var err error
			if own {
				if by, err = newAuthority(fmt.Sprintf("bench intermediate %d", i), b.root); err != nil {
					return nil, err
				}
			}
			if b.contacts[key], err = by.leaf(ip); err != nil {
				return nil, err
			}
		}
		certs[ip.String()] = b.contacts[key]
	}
	return startHomeservers(func(ip net.IP) (*tls.Certificate, error) {
		if c := certs[ip.String()]; c != nil {
			return c, nil
		}
		return nil, fmt.Errorf("no certificate for %v", ip)
	}, 0, userinfo)
}

func firstContact(b *bench, bin string) error {
	n := int(100 * b.sec)
	if n > 500 {
		n = 500
	} else if n < 20 {
		n = 20
	}
	for _, c := range []struct {
		title, target string
		own           bool
	}{
		{"first contact, all of the chain new", "9,000", true},
		{"first contact, intermediate known", "", false},
	} {
		hs, err := b.startContacts(n, c.own)
		if err != nil {
			return err
		}
		err = b.with(bin, everyone, func(s *service) error {
			if err := warmUp(s, 16, one(b.warm), 32); err != nil {
				return err
			}
			l := &load{addr: s.addr, conns: 16, n: n, good: granted, next: exchange(func(i int) string {
				_, name := contact(hs.port, i)
				return name
			})}
			f, r, err := b.measure(s, l, "/get_token")
			if f != nil {
				b.curve(c.title, r)
				f["dialed"] += float64(n)
				b.row(c.title, c.target, f)
			}
			if asked := atomic.LoadInt64(&hs.asked); err == nil && asked != int64(n) {
				err = fmt.Errorf("%s: %d userinfo requests for %d homeservers", c.title, asked, n)
			}
			if err == nil && s.metrics != "" && (f["handshakes"] != float64(n) || f["resumed"] != 0) {
				err = fmt.Errorf("%s: %v handshakes, %v resumed", c.title, f["handshakes"], f["resumed"])
			}
			return err
		})
		hs.server.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// besideNginx measures a request in turns with nginx's `return 200` under
// the same load; the medians of the turns count.
func (b *bench) besideNginx(s *service, l *load, route, title, target string) (figures, error) {
	const turns = 5
	var runs []figures
	var own, yard []float64
	for i := 0; i < turns; i++ {
		l.addr, l.d = s.addr, b.times(1.0/turns)
		f, _, err := b.measure(s, l, route)
		if err != nil {
			return nil, fmt.Errorf("%s: %v", title, err)
		}
		runs, own = append(runs, f), append(own, f["cpu_us"])
		var from, to time.Duration
		y := *l
		y.addr = fmt.Sprintf("127.0.0.1:%d", b.yardAt)
		y.start, y.end = func() { from = cpuOf(b.yard.cmd.Process.Pid) }, func() { to = cpuOf(b.yard.cmd.Process.Pid) }
		r, err := y.run()
		if err == nil && r.failed > 0 {
			err = fmt.Errorf("%s", r.problem())
		}
		if err != nil {
			return nil, fmt.Errorf("nginx: %v", err)
		}
		yard = append(yard, float64(to-from)/1e3/float64(r.sent))
	}
	f := medians(runs)
	f["requests"] *= turns
	f["nginx_us"], f["nginx_ratio"] = median(yard), median(own)/median(yard)
	b.row(title, target, f)
	return f, nil
}

func healthz(b *bench, bin string) error {
	return b.with(bin, nil, func(s *service) error {
		for _, c := range []struct {
			conns         int
			title, target string
		}{
			{1, "/healthz, 1 connection", "1.0 × nginx"},
			{64, "/healthz, 64 connections", "1.0 × nginx"},
			{1000, "/healthz, 1,000 connections", "1.1 × nginx"},
		} {
			f, err := b.besideNginx(s, &load{conns: c.conns, next: always(getHealthz)}, "/healthz", c.title, c.target)
			if err != nil {
				return err
			}
			if c.conns == 64 {
				b.cell("nginx's `return 200`, 64 connections", "µs", "", f["nginx_us"])
			}
			if c.conns == 1000 {
				b.cell("resident after 1,000 connections", "MB", "8", statusKB(s.pid, "VmHWM")/1024)
			}
		}
		return nil
	})
}

// idleConnections compares a light load with the same beside 1,000 clients
// that keep still.
func idleConnections(b *bench, bin string) error {
	return b.with(bin, nil, func(s *service) error {
		l := func() *load {
			return &load{addr: s.addr, conns: 8, rate: 2000, d: b.times(1), next: always(getHealthz)}
		}
		without, _, err := b.measure(s, l(), "/healthz")
		if err != nil {
			return err
		}
		to := sockaddr(s.addr)
		var held []int
		defer func() { closeAll(held) }()
		for i := 0; i < 1000; i++ {
			fd, err := dial(to)
			if err != nil {
				return err
			}
			held = append(held, fd)
			if err = askOnce(fd, getHealthz); err != nil {
				return err
			}
		}
		beside, _, err := b.measure(s, l(), "/healthz")
		if err != nil {
			return err
		}
		b.row("/healthz, 2,000 a second, 8 connections", "", without)
		b.row("the same beside 1,000 idle connections", "", beside)
		b.cell("cost of a request beside 1,000 idle connections", "×", "2", beside["cpu_us"]/without["cpu_us"])
		return nil
	})
}

func preflight(b *bench, bin string) error {
	return b.with(bin, nil, func(s *service) error {
		_, err := b.besideNginx(s, &load{conns: 64, next: always(optionsToken)}, "/get_token", "preflight, 64 connections", "")
		return err
	})
}

func webhooks(b *bench, bin string) error {
	return b.with(bin, nil, func(s *service) error {
		room, identity := hashed("!quiet:bench.example", slotID), hashed("@u:"+b.warm, deviceID, memberID)
		l := &load{addr: s.addr, conns: 16, d: b.times(1), next: func(i int, to []byte) ([]byte, int) {
			return webhook(to, "track_published", room, identity, "", fmt.Sprintf("%d", i)), 0
		}}
		f, _, err := b.measure(s, l, "/sfu_webhook")
		if f == nil {
			return err
		}
		b.row("webhook, 16 connections", "", f)
		if err == nil && s.metrics != "" {
			m, _ := s.counters()
			if bad := m[`lkjwt_events_total{event="WEBHOOK_BAD"}`]; bad != 0 {
				err = fmt.Errorf("%v webhooks were refused", bad)
			}
		}
		return err
	})
}

// jobs has 10,000 delegated leaves: handed over, idle, all leaving at once.
func jobs(b *bench, bin string) error {
	const count, perUser = 10000, 10
	user := func(i int) string { return fmt.Sprintf("j%d", i/perUser) }
	room := func(i int) string { return fmt.Sprintf("!job%d:bench.example", i) }
	return b.with(bin, nil, func(s *service) error {
		_, restarts, err := b.cs.counts()
		if err != nil {
			return err
		}
		calls := func(n int) func() bool {
			return func() bool {
				time.Sleep(20 * time.Millisecond)
				_, now, err := b.cs.counts()
				return err == nil && now-restarts >= n
			}
		}
		f, _, err := b.measure(s, &load{addr: s.addr, conns: 16, n: count, next: func(i int, to []byte) ([]byte, int) {
			return post(to, "/delegate_delayed_leave", "", member(room(i), user(i), b.warm,
				fmt.Sprintf(`,"delay_id":"syd_bench%d","delay_timeout":3600000`, i))), 0
		}}, "/delegate_delayed_leave")
		if f != nil {
			b.row("delegation of a leave, 16 clients", "", f)
		}
		if err != nil {
			return err
		}
		// The webhooks of all participants: event, with more in it.
		all := func(event, more string) func(int, []byte) ([]byte, int) {
			return func(i int, to []byte) ([]byte, int) {
				return webhook(to, event, hashed(room(i), slotID), hashed("@"+user(i)+":"+b.warm, deviceID, memberID), more,
					fmt.Sprintf("%s%d", event, i)), 0
			}
		}
		from, at := cpuOf(s.pid), time.Now()
		f, _, err = b.measure(s, &load{addr: s.addr, conns: 16, n: count, next: all("participant_joined", "")}, "/sfu_webhook")
		if f == nil || err != nil {
			return err
		}
		if err = await("10,000 restarts", 60*time.Second, calls(count)); err != nil {
			return err
		}
		b.cell("10,000 joins, first webhook to last restart", "s", "", time.Since(at).Seconds())
		b.cell("CPU of a join, webhook and restart", "µs", "", float64(cpuOf(s.pid)-from)/1e3/count)
		if s.metrics != "" {
			if err = await("10,000 connected", 10*time.Second, func() bool {
				m, _ := s.counters()
				return m["lkjwt_delayed_leaves_connected"] == count
			}); err != nil {
				return err
			}
		}
		time.Sleep(200 * time.Millisecond)
		b.cell("resident with 10,000 delegated leaves", "MB", "", s.rss())
		from, at = cpuOf(s.pid), time.Now()
		time.Sleep(b.times(1))
		b.cell("CPU of 10,000 idle delegated leaves", "ms a second", "", (cpuOf(s.pid)-from).Seconds()*1e3/time.Since(at).Seconds())

		from, at = cpuOf(s.pid), time.Now()
		f, _, err = b.measure(s, &load{addr: s.addr, conns: 16, n: count,
			next: all("participant_left", `,"disconnectReason":"CLIENT_INITIATED"`)}, "/sfu_webhook")
		if f == nil || err != nil {
			return err
		}
		if err = await("10,000 sends", 60*time.Second, calls(2*count)); err != nil {
			return err
		}
		b.cell("10,000 leaves, first webhook to last event sent", "s", "", time.Since(at).Seconds())
		b.cell("CPU of a leave, webhook and event sent", "µs", "", float64(cpuOf(s.pid)-from)/1e3/count)
		if s.metrics != "" {
			return await("all jobs ended and sent", 10*time.Second, func() bool {
				m, _ := s.counters()
				return m["lkjwt_delayed_leaves"] == 0 && m[`lkjwt_events_total{event="JOB_SENT"}`] == count
			})
		}
		return nil
	})
}

// evening is a mixture at a steady rate: preflights, exchanges with twenty
// homeservers, webhooks, probes, and now and then a homeserver that is slow
// or away.
func evening(b *bench, bin string) error {
	leaf, err := b.middle.leaf(net.IPv4(127, 0, 0, 1))
	if err != nil {
		return err
	}
	slow, err := startHomeservers(func(net.IP) (*tls.Certificate, error) { return leaf, nil }, 0,
		func(r *http.Request) (string, []byte) {
			time.Sleep(500 * time.Millisecond)
			return userinfo(r)
		})
	if err != nil {
		return err
	}
	defer slow.server.Close()
	away := fmt.Sprintf("127.0.0.1:%d", freePort())
	const known, other = 1, 2
	ask, askSlow := exchange(manyNames(20)), exchange(one(fmt.Sprintf("127.0.0.1:%d", slow.port)))
	askAway, room := exchange(one(away)), hashed("!evening:bench.example", slotID)
	return b.with(bin, everyone, func(s *service) error {
		if err := warmUp(s, 20, manyNames(20), 40); err != nil {
			return err
		}
		l := &load{addr: s.addr, conns: 200, rate: 500, d: b.times(3),
			next: func(i int, to []byte) ([]byte, int) {
				switch k := i % 40; {
				case k < 14:
					return append(to, optionsToken...), 0
				case k < 28:
					to, _ = ask(i, to)
					return to, known
				case k < 36:
					return webhook(to, "participant_joined", room, fmt.Sprintf("i%d", i), "", fmt.Sprintf("e%d", i)), 0
				case k < 38:
					return append(to, getHealthz...), 0
				case k == 38:
					to, _ = askSlow(i, to)
					return to, other
				}
				to, _ = askAway(i, to)
				return to, other + 1
			},
			good: func(kind, status int, body []byte) bool {
				switch kind {
				case known, other:
					return granted(0, status, body)
				case other + 1:
					return status == 401
				}
				return status == 200
			}}
		f, r, err := b.measure(s, l)
		if f == nil {
			return err
		}
		delete(f, "dialed") // nginx alone counts them
		b.row("an evening, 500 requests a second, 200 clients", "", f)
		b.cell("evening: of one core", "%", "", 100*f["cpu_share"])
		b.cell("evening: exchange with a good homeserver, p50", "ms", "", r.at(.5, known))
		b.cell("evening: exchange with a good homeserver, p99", "ms", "", r.at(.99, known))
		return err
	})
}

// storm is 500 homeservers met for the first time at once, beside probes and
// users of a homeserver that is known.
func storm(b *bench, bin string) error {
	const count = 500
	hs, err := b.startContacts(count, true)
	if err != nil {
		return err
	}
	defer hs.server.Close()
	return b.with(bin, everyone, func(s *service) error {
		if err := warmUp(s, 8, one(b.warm), 32); err != nil {
			return err
		}
		var over int32
		loads := []*load{
			{conns: 128, n: count, good: granted, next: exchange(func(i int) string {
				_, name := contact(hs.port, i)
				return name
			})},
			{conns: 8, rate: 100, next: always(getHealthz)},
			{conns: 16, rate: 100, good: granted, next: exchange(one(b.warm))},
		}
		results, errs := make([]*result, 3), make([]error, 3)
		var wait sync.WaitGroup
		for i, l := range loads {
			i, l := i, l
			l.addr = s.addr
			if i > 0 {
				l.while = func() bool { return atomic.LoadInt32(&over) == 0 }
			}
			wait.Add(1)
			go func() {
				defer wait.Done()
				if i == 0 {
					defer atomic.StoreInt32(&over, 1)
				}
				results[i], errs[i] = l.run()
			}()
		}
		wait.Wait()
		for i := range loads {
			if errs[i] == nil && results[i].failed > 0 {
				errs[i] = fmt.Errorf("%s", results[i].problem())
			}
			if errs[i] != nil {
				return fmt.Errorf("%s: %v", []string{"first contacts", "/healthz", "known homeserver"}[i], errs[i])
			}
		}
		if asked := atomic.LoadInt64(&hs.asked); asked != count {
			return fmt.Errorf("%d userinfo requests at 500 homeservers", asked)
		}
		b.cell("storm of 500 first contacts", "s", "", results[0].took.Seconds())
		b.cell("storm: /healthz p99", "ms", "50", results[1].at(.99))
		b.cell("storm: exchange with a known homeserver p50", "ms", "", results[2].at(.5))
		b.cell("storm: exchange with a known homeserver p99", "ms", "150", results[2].at(.99))
		return nil
	})
}
