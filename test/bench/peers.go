// The stand-ins: nginx where the answer is constant (it costs little), Go's
// own server where connections must die or every peer needs a certificate of
// its own. Also the public key infrastructure of both.
package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// ---- certificates

type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	der  []byte
}

var serial int64

func template(name string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano() + atomic.AddInt64(&serial, 1)),
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    time.Now().Add(-24 * time.Hour), NotAfter: time.Now().Add(90 * 24 * time.Hour),
		BasicConstraintsValid: true,
	}
}

// newAuthority makes a P-384 authority under parent, or a root.
func newAuthority(name string, parent *authority) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		return nil, err
	}
	t := template(name)
	t.IsCA, t.KeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageCRLSign
	by, with := t, key
	if parent != nil {
		by, with = parent.cert, parent.key
	}
	der, err := x509.CreateCertificate(rand.Reader, t, by, &key.PublicKey, with)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return &authority{cert, key, der}, err
}

// leaf makes a P-256 server certificate for an address; the chain is leaf
// and intermediate.
func (a *authority) leaf(ip net.IP) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	t := template("a homeserver")
	t.IPAddresses = []net.IP{ip}
	t.KeyUsage, t.ExtKeyUsage = x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	der, err := x509.CreateCertificate(rand.Reader, t, a.cert, &key.PublicKey, a.key)
	return &tls.Certificate{Certificate: [][]byte{der, a.der}, PrivateKey: key}, err
}

func pemOf(kind string, ders ...[]byte) []byte {
	var b bytes.Buffer
	for _, der := range ders {
		pem.Encode(&b, &pem.Block{Type: kind, Bytes: der})
	}
	return b.Bytes()
}

// ---- ports and processes

var lastPort = 18000 + os.Getpid()%2000

// freePort finds a port below the ephemeral range.
func freePort() int {
	for {
		lastPort++
		l, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", lastPort))
		if err == nil {
			l.Close()
			return lastPort
		}
	}
}

// await asks until f is true.
func await(what string, limit time.Duration, f func() bool) error {
	for end := time.Now().Add(limit); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			return fmt.Errorf("%s: not within %v", what, limit)
		}
	}
	return nil
}

func accepts(addr string) bool {
	c, err := net.DialTimeout("tcp4", addr, time.Second)
	if err == nil {
		c.Close()
	}
	return err == nil
}

// What we started and did not stop yet.
var (
	living     = map[*exec.Cmd]bool{}
	livingLock sync.Mutex
)

func startProcess(cmd *exec.Cmd) error {
	livingLock.Lock()
	defer livingLock.Unlock()
	err := cmd.Start()
	if err == nil {
		living[cmd] = true
	}
	return err
}

// stopProcess ends a process that we started.
func stopProcess(cmd *exec.Cmd) error {
	livingLock.Lock()
	delete(living, cmd)
	livingLock.Unlock()
	cmd.Process.Signal(syscall.SIGTERM)
	late := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
	defer late.Stop()
	return cmd.Wait()
}

// killAll is for an end that comes early.
func killAll() {
	livingLock.Lock()
	defer livingLock.Unlock()
	for cmd := range living {
		cmd.Process.Kill()
	}
}

// ---- nginx

type nginx struct {
	cmd    *exec.Cmd
	port   int // of its status page
	asked  int // status pages, which count themselves
	dialed int
}

func startNginx(dir, name, http string) (*nginx, error) {
	path, err := exec.LookPath("nginx")
	if err != nil {
		path = "/usr/sbin/nginx"
	}
	n := &nginx{port: freePort()}
	dir = filepath.Join(dir, "nginx-"+name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	temp := ""
	for _, kind := range []string{"client_body", "proxy", "fastcgi", "uwsgi", "scgi"} {
		temp += fmt.Sprintf("%s_temp_path %s/%s;\n", kind, dir, kind)
	}
	// One process, as the service is one.
	user := ""
	if os.Getuid() == 0 {
		user = "user root;\n"
	}
	conf := fmt.Sprintf("daemon off;\nmaster_process off;\n%spid %s/pid;\nerror_log stderr warn;\n"+
		"worker_rlimit_nofile 8192;\nevents { worker_connections 4096; }\nhttp {\naccess_log off;\n"+
		"keepalive_requests 1000000000;\nkeepalive_timeout 900s;\n%s%s\n"+
		"server { listen 127.0.0.1:%d; location / { stub_status; } }\n}\n", user, dir, temp, http, n.port)
	file := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(file, []byte(conf), 0o644); err != nil {
		return nil, err
	}
	out, err := os.Create(filepath.Join(dir, "stderr"))
	if err != nil {
		return nil, err
	}
	defer out.Close()
	n.cmd = exec.Command(path, "-p", dir, "-c", file, "-e", "stderr")
	n.cmd.Stderr = out
	if err := startProcess(n.cmd); err != nil {
		return nil, err
	}
	err = await("nginx "+name+" ("+out.Name()+")", 10*time.Second,
		func() bool { return accepts(fmt.Sprintf("127.0.0.1:%d", n.port)) })
	if err != nil {
		stopProcess(n.cmd)
		return nil, err
	}
	n.dialed++
	return n, nil
}

// counts says how many connections and requests it had so far, without ours.
func (n *nginx) counts() (conns, requests int, err error) {
	c, err := net.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", n.port))
	if err != nil {
		return 0, 0, err
	}
	defer c.Close()
	n.asked++
	n.dialed++
	fmt.Fprintf(c, "GET / HTTP/1.0\r\n\r\n")
	text, err := io.ReadAll(c)
	if err != nil {
		return 0, 0, err
	}
	var handled int
	i := bytes.Index(text, []byte("requests\n"))
	if i < 0 {
		return 0, 0, fmt.Errorf("nginx: no status in %q", text)
	}
	_, err = fmt.Sscan(string(text[i+9:]), &conns, &handled, &requests)
	return conns - n.dialed, requests - n.asked, err
}

// ---- homeservers in Go

// A homeserver with a certificate for each address it is asked at. Its users
// are called what their token says.
type homeservers struct {
	port   int
	server *http.Server
	asked  int64 // userinfo requests that came whole
	killed int64 // connections cut without notice
}

type connKey struct{}

// startHomeservers serves TLS (or not: cert nil) on all of 127.0.0.0/8.
// Connections die without a word: every kill-th reply is a connection's last,
// its end comes up to 2 ms later, so that some requests meet it.
func startHomeservers(cert func(net.IP) (*tls.Certificate, error), kill int64, answer func(*http.Request) (string, []byte)) (*homeservers, error) {
	h := &homeservers{port: freePort()}
	l, err := net.Listen("tcp4", fmt.Sprintf("0.0.0.0:%d", h.port))
	if err != nil {
		return nil, err
	}
	h.server = &http.Server{
		// Handshakes that fail are told by the service under test.
		ErrorLog:    log.New(io.Discard, "", 0),
		ConnContext: func(ctx contextT, c net.Conn) contextT { return contextWith(ctx, connKey{}, c) },
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			n := atomic.AddInt64(&h.asked, 1)
			kind, body := answer(r)
			w.Header().Set("Content-Type", kind)
			w.Header().Set("Content-Length", fmt.Sprint(len(body)))
			w.Write(body)
			if kill > 0 && n%kill == 0 {
				w.(http.Flusher).Flush()
				c := r.Context().Value(connKey{}).(net.Conn)
				if t, ok := c.(*tls.Conn); ok {
					c = t.NetConn()
				}
				atomic.AddInt64(&h.killed, 1)
				time.AfterFunc(time.Duration(n/kill%20)*100*time.Microsecond, func() {
					if n/kill%2 == 0 {
						c.(*net.TCPConn).SetLinger(0) // a reset
					}
					c.Close()
				})
			}
		}),
	}
	if cert != nil {
		l = tls.NewListener(l, &tls.Config{
			MaxVersion: tls.VersionTLS12, SessionTicketsDisabled: true,
			GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
				return cert(hello.Conn.LocalAddr().(*net.TCPAddr).IP)
			},
		})
	}
	go h.server.Serve(l)
	return h, nil
}

func userinfo(r *http.Request) (string, []byte) {
	return "application/json", []byte(fmt.Sprintf(`{"sub":"@%s:%s"}`, r.URL.Query().Get("access_token"), r.Host))
}

// ---- CPU and memory of a process, from the kernel

// cpuOf is the CPU time a process has used, ended threads included: what
// /proc/PID/stat shows in ticks, in nanoseconds.
func cpuOf(pid int) time.Duration {
	var t syscall.Timespec
	clock := int32(^pid)<<3 | 2 // CPUCLOCK_SCHED of a process
	_, _, errno := syscall.Syscall(syscall.SYS_CLOCK_GETTIME, uintptr(uint32(clock)), uintptr(ptr(&t)), 0)
	if errno != 0 {
		panic(fmt.Sprintf("CPU clock of %d: %v", pid, errno))
	}
	return time.Duration(t.Nano())
}

// statusKB reads a line such as VmRSS of /proc/PID/status.
func statusKB(pid int, key string) (n float64) {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for _, line := range strings.Split(string(text), "\n") {
		if strings.HasPrefix(line, key+":") {
			fmt.Sscan(line[len(key)+1:], &n)
		}
	}
	return n
}
