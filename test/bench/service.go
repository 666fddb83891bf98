// The service under test: started with an environment of its own, asked for
// its metrics, stopped by its process id.
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"
	"unsafe"
)

type contextT = context.Context

func contextWith(ctx contextT, key, value any) contextT { return context.WithValue(ctx, key, value) }

func ptr[T any](p *T) unsafe.Pointer { return unsafe.Pointer(p) }

type service struct {
	cmd     *exec.Cmd
	addr    string
	metrics string // "" where it has none
	log     string
	first   time.Duration // from start to the first 200 of /healthz
	pid     int
}

const (
	apiKey    = "benchkey"
	apiSecret = "bench-secret-of-more-than-thirty-two-bytes"
)

// startService runs bin with exactly the given environment and our binds.
func (b *bench) startService(bin string, env map[string]string) (*service, error) {
	s := &service{addr: fmt.Sprintf("127.0.0.1:%d", freePort())}
	s.metrics = fmt.Sprintf("127.0.0.1:%d", freePort())
	all := map[string]string{
		"LIVEKIT_URL": fmt.Sprintf("ws://127.0.0.1:%d", b.sfuPort), "LIVEKIT_KEY": apiKey, "LIVEKIT_SECRET": apiSecret,
		"LIVEKIT_FULL_ACCESS_HOMESERVERS": strings.Join(b.names, ","),
		"LIVEKIT_JWT_BIND":                s.addr,
		"LIVEKIT_CS_API_URL_OVERRIDES":    fmt.Sprintf("%s=http://127.0.0.1:%d", b.warm, b.csPort),
		"SSL_CERT_FILE":                   b.caFile, "SSL_CERT_DIR": b.emptyDir,
		"LKJWT_METRICS_BIND": s.metrics, "LKJWT_ALLOW_NETWORKS": "127.0.0.0/8", "LKJWT_UID": "0",
	}
	// Some thousand names stand for all users: their rates are kept, and high.
	for _, name := range []string{"USER", "SERVER", "ROOMS_USER", "ROOMS_SERVER"} {
		all["LKJWT_RATE_"+name] = "1000000:10000"
	}
	for k, v := range env {
		all[k] = v
	}
	s.log = filepath.Join(b.dir, fmt.Sprintf("service-%d.log", freePort()))
	out, err := os.Create(s.log)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	s.cmd = b.limits.command(bin)
	s.cmd.Stdout, s.cmd.Stderr = out, out
	for k, v := range all {
		s.cmd.Env = append(s.cmd.Env, k+"="+v)
	}
	sort.Strings(s.cmd.Env)
	begin := time.Now()
	if err := startProcess(s.cmd); err != nil {
		return nil, err
	}
	s.pid = s.cmd.Process.Pid
	for end := begin.Add(15 * time.Second); ; time.Sleep(50 * time.Microsecond) {
		if s.healthy() {
			break
		}
		if time.Now().After(end) {
			stopProcess(s.cmd)
			text, _ := os.ReadFile(s.log)
			return nil, fmt.Errorf("%s does not answer /healthz: %.500s", bin, text)
		}
	}
	s.first = time.Since(begin)
	if _, err := s.counters(); err != nil {
		s.metrics = ""
	}
	return s, nil
}

func (s *service) healthy() bool {
	c, err := net.Dial("tcp4", s.addr)
	if err != nil {
		return false
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	fmt.Fprintf(c, "GET /healthz HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
	var got [12]byte
	_, err = io.ReadFull(c, got[:])
	return err == nil && string(got[9:12]) == "200"
}

// counters are the samples of /metrics, name{labels} to value.
func (s *service) counters() (map[string]float64, error) {
	if s.metrics == "" {
		return nil, nil
	}
	r, err := http.Get("http://" + s.metrics + "/metrics")
	if err != nil {
		return nil, err
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	if r.StatusCode != 200 {
		return nil, fmt.Errorf("/metrics: %s", r.Status)
	}
	m := map[string]float64{}
	for _, line := range strings.Split(string(text), "\n") {
		if i := strings.LastIndexByte(line, ' '); i > 0 && line[0] != '#' {
			if m[line[:i]], err = strconv.ParseFloat(line[i+1:], 64); err != nil {
				return nil, err
			}
		}
	}
	return m, nil
}

func (s *service) rss() float64 { return statusKB(s.pid, "VmRSS") / 1024 }

// stop ends it; anything but status 0 is told.
func (s *service) stop() error {
	http.DefaultClient.CloseIdleConnections()
	if err := stopProcess(s.cmd); err != nil {
		return fmt.Errorf("after SIGTERM: %v", err)
	}
	return nil
}
