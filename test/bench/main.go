// The benchmark: `bench` measures the service at LKJWT_BIN (./lkjwt) beside
// nginx and prints tables in Markdown; all figures go to build/bench/.
//
//	BENCH_PEER=path   the same against another service with the same
//	                  environment, and a column of ratios
//	BENCH_S=seconds   length of a timed scenario (1)
//	BENCH_RUNS=n      so many times; the tables show medians (1)
//	BENCH_ONLY=regexp the scenarios whose name matches
//	BENCH_LIMITS=1    the service has a tenth of a core and 64 MiB
//
// CPU time is that of the service's process alone, so the figures bear a
// shared machine; latencies and rates do not. Run it under test/netns.
package main

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"strconv"
	"syscall"
	"time"
)

// A Room{sid, name} in protobuf.
const roomReply = "\n\x0fRM_benchbench00\x12\x04room"

const manyPort, manyCount = 24000, 1000

type bench struct {
	dir, caFile, emptyDir string
	sec                   float64
	bins                  []string
	who                   int // whose figures: 0 ours, 1 the peer's
	limits                *limits
	report

	root, middle             *authority
	yard, sfu, cs, hs        *nginx
	sfuPort, csPort, yardAt  int
	warm, withIDs, withoutID string // names of homeservers
	names                    []string
	contacts                 map[string]*tls.Certificate
}

// times is a duration of so many BENCH_S.
func (b *bench) times(n float64) time.Duration {
	return time.Duration(n * b.sec * float64(time.Second))
}

// setUp makes certificates and starts what all scenarios share.
func (b *bench) setUp() (err error) {
	if b.root, err = newAuthority("bench root", nil); err != nil {
		return err
	}
	if b.middle, err = newAuthority("bench intermediate", b.root); err != nil {
		return err
	}
	b.emptyDir = filepath.Join(b.dir, "empty")
	if err = os.Mkdir(b.emptyDir, 0o755); err != nil {
		return err
	}
	bundle, err := debianBundle()
	if err != nil {
		return err
	}
	b.caFile = filepath.Join(b.dir, "ca.pem")
	if err = os.WriteFile(b.caFile, append(bundle, pemOf("CERTIFICATE", b.root.der)...), 0o644); err != nil {
		return err
	}
	leaf, err := b.middle.leaf(net.IPv4(127, 0, 0, 1))
	if err != nil {
		return err
	}
	key, err := keyPEM(leaf)
	if err != nil {
		return err
	}
	chain := filepath.Join(b.dir, "chain.pem")
	if err = os.WriteFile(chain, append(pemOf("CERTIFICATE", leaf.Certificate...), key...), 0o600); err != nil {
		return err
	}

	b.yardAt, b.sfuPort, b.csPort = freePort(), freePort(), freePort()
	if b.yard, err = startNginx(b.dir, "yardstick", fmt.Sprintf("server { listen 127.0.0.1:%d backlog=4096; location / { return 200; } }",
		b.yardAt)); err != nil {
		return err
	}
	// Protobuf: Room{sid, name}. No participant is found: webhooks tell.
	if b.sfu, err = startNginx(b.dir, "sfu", fmt.Sprintf("server { listen 127.0.0.1:%d;\n"+
		"location /twirp/livekit.RoomService/CreateRoom { default_type application/protobuf; return 200 \"%s\"; }\n"+
		"location /twirp/livekit.RoomService/GetParticipant { default_type application/json;\n"+
		"return 404 '{\"code\":\"not_found\",\"msg\":\"participant does not exist\"}'; } }", b.sfuPort, roomReply)); err != nil {
		return err
	}
	if b.cs, err = startNginx(b.dir, "client-api", fmt.Sprintf(
		"default_type application/json;\nserver { listen 127.0.0.1:%d; location / { return 200 \"{}\"; } }", b.csPort)); err != nil {
		return err
	}
	ports := []int{freePort(), freePort(), freePort()}
	for _, p := range ports {
		b.names = append(b.names, fmt.Sprintf("127.0.0.1:%d", p))
	}
	b.warm, b.withIDs, b.withoutID = b.names[0], b.names[1], b.names[2]
	answer := "location = /_matrix/federation/v1/openid/userinfo { return 200 '{\"sub\":\"@$arg_access_token:$http_host\"}'; }\n"
	many := ""
	for i := 0; i < manyCount; i++ {
		many += fmt.Sprintf("listen 127.0.0.1:%d ssl;\n", manyPort+i)
	}
	b.hs, err = startNginx(b.dir, "homeserver", fmt.Sprintf("default_type application/json;\nssl_certificate %s;\nssl_certificate_key %s;\n"+
		"ssl_protocols TLSv1.2;\nssl_session_tickets off;\n"+
		"server { listen 127.0.0.1:%d ssl; %sssl_session_cache shared:a:8m; %s}\n"+
		"server { listen 127.0.0.1:%d ssl; keepalive_timeout 0; ssl_session_cache shared:b:8m; %s}\n"+
		"server { listen 127.0.0.1:%d ssl; keepalive_timeout 0; ssl_session_cache off; %s}\n",
		chain, chain, ports[0], many, answer, ports[1], answer, ports[2], answer))
	if err != nil {
		return err
	}
	b.contacts = map[string]*tls.Certificate{}
	return nil
}

func (b *bench) tearDown() {
	for _, n := range []*nginx{b.yard, b.sfu, b.cs, b.hs} {
		if n != nil {
			stopProcess(n.cmd)
		}
	}
}

func number(name string, fallback float64) float64 {
	text := os.Getenv(name)
	if text == "" {
		return fallback
	}
	v, err := strconv.ParseFloat(text, 64)
	if err != nil || v <= 0 {
		fmt.Fprintf(os.Stderr, "bench: %s=%q is no positive number\n", name, text)
		os.Exit(2)
	}
	return v
}

var scratch string // the folder of this run

// guarded turns the end of a process under our hands into an error.
func guarded(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%v", p)
		}
	}()
	return f()
}

func run() error {
	debug.SetGCPercent(400)
	runtime.GOMAXPROCS(2)
	// For us and, being set by hand, for what we start.
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		return err
	}
	files.Cur = files.Max
	if files.Cur > 16384 {
		files.Cur = 16384
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		return err
	}
	only, err := regexp.Compile(os.Getenv("BENCH_ONLY"))
	if err != nil {
		return err
	}
	b := &bench{sec: number("BENCH_S", 1)}
	bin := os.Getenv("LKJWT_BIN")
	if bin == "" {
		bin = "./lkjwt"
	}
	b.bins = []string{bin}
	if peer := os.Getenv("BENCH_PEER"); peer != "" {
		b.bins = append(b.bins, peer)
	}
	for i, path := range b.bins {
		if b.bins[i], err = filepath.Abs(path); err != nil {
			return err
		}
		if _, err = os.Stat(path); err != nil {
			return err
		}
	}
	if b.dir, err = os.MkdirTemp("", "lkjwt-bench-"); err != nil {
		return err
	}
	scratch = b.dir
	if os.Getenv("BENCH_LIMITS") != "" {
		if b.limits, err = newLimits(); err != nil {
			return err
		}
		defer b.limits.close()
	}
	defer b.tearDown()
	if err = b.setUp(); err != nil {
		return err
	}
	begin := time.Now()
	for runs := int(number("BENCH_RUNS", 1)); runs > 0; runs-- {
		for _, s := range scenarios {
			if !only.MatchString(s.name) {
				continue
			}
			for b.who = range b.bins {
				at := time.Now()
				err := guarded(func() error { return s.run(b, b.bins[b.who]) })
				fmt.Fprintf(os.Stderr, "bench: %s %s, %.1f s\n", s.name, [...]string{"", "(peer)"}[b.who], time.Since(at).Seconds())
				if err != nil {
					b.problem(s.name, err)
				}
			}
		}
	}
	b.took = time.Since(begin)
	b.describe(b.bins)
	folder := "build/bench"
	if b.limits != nil {
		folder = "build/bench/small"
		b.machine["limits"] = b.limits.String()
	}
	b.print(os.Stdout, len(b.bins) > 1)
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	text, err := json.MarshalIndent(b.report.data(), "", " ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(folder, "bench.json"), append(text, '\n'), 0o644); err != nil {
		return err
	}
	if err := b.plot(folder); err != nil {
		return err
	}
	if b.failed() {
		return fmt.Errorf("some scenarios did not do what they say; files in %s", b.dir)
	}
	return os.RemoveAll(b.dir)
}

func main() {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		<-stop
		killAll()
		if scratch != "" {
			os.RemoveAll(scratch)
		}
		os.Exit(1)
	}()
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}
