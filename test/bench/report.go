// The tables and the JSON file.
package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"time"
)

type figures map[string]float64

// line is one row: a load, or a single value.
type line struct {
	Title  string       `json:"title"`
	Unit   string       `json:"unit,omitempty"` // "" for a load
	Target string       `json:"target,omitempty"`
	Runs   [2][]figures `json:"-"`
	Ours   figures      `json:"ours,omitempty"` // medians
	Peer   figures      `json:"peer,omitempty"`
}

type report struct {
	lines    []*line
	problems [2][]string
	machine  map[string]string
	growth   [2]map[int]float64 // CPU µs of an exchange by clients
	curves   [2][]curve
	took     time.Duration
}

func (r *report) add(who int, title, unit, target string, f figures) {
	for _, l := range r.lines {
		if l.Title == title {
			l.Runs[who] = append(l.Runs[who], f)
			return
		}
	}
	l := &line{Title: title, Unit: unit, Target: target}
	l.Runs[who] = append(l.Runs[who], f)
	r.lines = append(r.lines, l)
}

// row is a load's figures; cell is a single one.
func (b *bench) row(title, target string, f figures) { b.add(b.who, title, "", target, f) }
func (b *bench) cell(title, unit, target string, v float64) {
	b.add(b.who, title, unit, target, figures{"value": v})
}
func (b *bench) problem(name string, err error) {
	b.problems[b.who] = append(b.problems[b.who], fmt.Sprintf("%s: %v", name, err))
}
func (r *report) failed() bool { return len(r.problems[0]) > 0 }

func median(v []float64) float64 {
	sort.Float64s(v)
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}

func medians(runs []figures) figures {
	by := map[string][]float64{}
	for _, f := range runs {
		for k, v := range f {
			by[k] = append(by[k], v)
		}
	}
	out := figures{}
	for k, v := range by {
		out[k] = median(v)
	}
	return out
}

func (r *report) data() map[string]any {
	return map[string]any{"machine": r.machine, "seconds": r.took.Seconds(), "lines": r.lines,
		"problems": r.problems[0], "peer_problems": r.problems[1]}
}

// short prints three or four digits.
func short(v float64) string {
	switch {
	case v == 0:
		return "0"
	case v >= 100:
		return whole(v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	case v >= 0.095:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.3f", v)
}

// whole prints a count.
func whole(v float64) string {
	s := fmt.Sprintf("%.0f", v)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

func (f figures) count(key string) string {
	if v, ok := f[key]; ok {
		return whole(v)
	}
	return ""
}

func (f figures) get(key string) string {
	if v, ok := f[key]; ok {
		return short(v)
	}
	return ""
}

func ratio(a, b figures, key string) string {
	if a[key] > 0 && b[key] > 0 {
		return fmt.Sprintf("%.2f", a[key]/b[key])
	}
	return ""
}

func (r *report) print(w io.Writer, peer bool) {
	for _, l := range r.lines {
		l.Ours, l.Peer = medians(l.Runs[0]), medians(l.Runs[1])
	}
	table := func(heads ...string) {
		fmt.Fprintf(w, "| %s |\n|%s\n", strings.Join(heads, " | "), strings.Repeat("---|", len(heads)))
	}
	keys := make([]string, 0, len(r.machine))
	for k := range r.machine {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	for _, k := range keys {
		fmt.Fprintf(w, "%s: %s  \n", k, r.machine[k])
	}
	fmt.Fprintln(w)
	heads := []string{"load", "requests", "CPU µs each", "to reach", "against nginx", "p50 ms", "p99 ms", "p99.9 ms",
		"per second", "failed", "upstream connections", "TLS, resumed", "RSS MB"}
	if peer {
		heads = append(heads, "peer: CPU µs", "ours / peer", "peer: p99 ms", "peer: failed", "peer: RSS MB")
	}
	table(heads...)
	for _, l := range r.lines {
		if l.Unit != "" {
			continue
		}
		o, p := l.Ours, l.Peer
		tls := ""
		if o["handshakes"] > 0 {
			tls = o.count("handshakes") + ", " + o.count("resumed")
		}
		times := ""
		if v, ok := o["nginx_ratio"]; ok {
			times = fmt.Sprintf("%.2f ×", v)
		}
		cells := []string{l.Title, o.count("requests"), o.get("cpu_us"), l.Target, times, o.get("p50_ms"), o.get("p99_ms"),
			o.get("p999_ms"), o.count("per_s"), o.count("failed"), o.count("dialed"), tls, o.get("rss_mb")}
		if peer {
			cells = append(cells, p.get("cpu_us"), ratio(o, p, "cpu_us"), p.get("p99_ms"), p.count("failed"), p.get("rss_mb"))
		}
		fmt.Fprintf(w, "| %s |\n", strings.Join(cells, " | "))
	}
	fmt.Fprintln(w)
	heads = []string{"figure", "value", "to reach"}
	if peer {
		heads = append(heads, "peer", "ours / peer")
	}
	table(heads...)
	for _, l := range r.lines {
		if l.Unit == "" {
			continue
		}
		value := func(f figures) string {
			if f.get("value") == "" {
				return ""
			}
			return f.get("value") + " " + l.Unit
		}
		cells := []string{l.Title, value(l.Ours), l.Target}
		if peer {
			cells = append(cells, value(l.Peer), ratio(l.Ours, l.Peer, "value"))
		}
		fmt.Fprintf(w, "| %s |\n", strings.Join(cells, " | "))
	}
	for who, list := range r.problems {
		for _, p := range list {
			fmt.Fprintf(w, "\n%s%s\n", [...]string{"PROBLEM ", "PROBLEM of the peer: "}[who], p)
		}
	}
}

// describe says what machine this is and what ran on it.
func (r *report) describe(bins []string) {
	first := func(path, prefix string) string {
		text, _ := os.ReadFile(path)
		for _, s := range strings.Split(string(text), "\n") {
			if strings.HasPrefix(s, prefix) {
				return strings.TrimSpace(strings.TrimLeft(strings.TrimPrefix(s, prefix), "\t: "))
			}
		}
		return ""
	}
	say := func(name string, args ...string) string {
		cmd := exec.Command(name, args...)
		cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin")
		out, _ := cmd.CombinedOutput()
		return strings.TrimSpace(strings.SplitN(string(out), "\n", 2)[0])
	}
	nginxPath, err := exec.LookPath("nginx")
	if err != nil {
		nginxPath = "/usr/sbin/nginx"
	}
	cpus, _ := os.ReadFile("/proc/cpuinfo")
	r.machine = map[string]string{
		"processor": fmt.Sprintf("%d × %s", strings.Count(string(cpus), "\nprocessor")+1, first("/proc/cpuinfo", "model name")),
		"kernel":    say("uname", "-srm"),
		"load":      first("/proc/loadavg", "") + " (at the end, of all that runs)",
		"nginx":     strings.TrimPrefix(say(nginxPath, "-v"), "nginx version: "),
		"service":   say(bins[0], "--version"),
	}
	if len(bins) > 1 {
		r.machine["peer"] = filepath.Base(bins[1])
	}
}

// debianBundle is the CA bundle of Debian's ca-certificates.
func debianBundle() ([]byte, error) {
	files, err := filepath.Glob("/usr/share/ca-certificates/mozilla/*.crt")
	if err != nil || len(files) == 0 {
		return nil, fmt.Errorf("no certificates of Debian's ca-certificates")
	}
	var all bytes.Buffer
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		all.Write(text)
	}
	return all.Bytes(), nil
}

func keyPEM(c *tls.Certificate) ([]byte, error) {
	der, err := x509.MarshalECPrivateKey(c.PrivateKey.(*ecdsa.PrivateKey))
	return pemOf("EC PRIVATE KEY", der), err
}
