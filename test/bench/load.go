// The load: keep-alive HTTP/1.1 clients in one epoll loop of one thread, so
// that the generator costs about as little as what it measures. The counts
// are exact: a run ends when every request sent was answered or has failed.
package main

import (
	"bytes"
	"fmt"
	"runtime"
	"sort"
	"strconv"
	"syscall"
	"time"
)

// Nothing is heard for so long: the rest of a run has failed.
const silence = 30 * time.Second

// load is one run of it.
type load struct {
	addr  string        // 127.0.0.1:port
	conns int           // clients; each has one request out
	n     int           // requests in all, or
	d     time.Duration // new ones for so long, or
	while func() bool   // as long as this is true
	rate  float64       // requests a second; 0: each client goes on at once
	// next appends request i to b and says what kind it is; the latencies
	// are kept by kind.
	next func(i int, b []byte) ([]byte, int)
	// good judges a reply; nil: its status is 200.
	good func(kind, status int, body []byte) bool
	// start and end are called with all clients connected and idle.
	start, end func()
}

type result struct {
	sent, failed, dials int
	took                time.Duration
	lat                 map[int][]int64 // nanoseconds, of good replies
	why                 map[string]int  // of the failures
}

// sorted are the latencies of the kinds named (none: all).
func (r *result) sorted(kinds ...int) []int64 {
	var all []int64
	if len(kinds) == 0 {
		for k := range r.lat {
			kinds = append(kinds, k)
		}
	}
	for _, k := range kinds {
		all = append(all, r.lat[k]...)
	}
	sort.Slice(all, func(i, j int) bool { return all[i] < all[j] })
	return all
}

// at is the latency at quantile q, in ms.
func (r *result) at(q float64, kinds ...int) float64 { return quantile(r.sorted(kinds...), q) }

func quantile(all []int64, q float64) float64 {
	if len(all) == 0 {
		return 0
	}
	i := int(q * float64(len(all)))
	if i >= len(all) {
		i = len(all) - 1
	}
	return float64(all[i]) / 1e6
}

func (r *result) problem() string {
	if r.failed == 0 {
		return ""
	}
	return fmt.Sprintf("%d failed: %v", r.failed, r.why)
}

type client struct {
	fd, kind, used int
	busy           bool
	since          time.Time
	buf            []byte
}

// dial connects; blocking, then not.
func dial(addr *syscall.SockaddrInet4) (int, error) {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err = syscall.Connect(fd, addr); err == nil {
		err = syscall.SetsockoptInt(fd, syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1)
	}
	if err == nil {
		err = syscall.SetNonblock(fd, true)
	}
	if err != nil {
		syscall.Close(fd)
		return -1, err
	}
	return fd, nil
}

func sockaddr(addr string) *syscall.SockaddrInet4 {
	i := bytes.IndexByte([]byte(addr), ':')
	port, err := strconv.Atoi(addr[i+1:])
	if err != nil {
		panic(err)
	}
	return &syscall.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}
}

// reply finds one whole HTTP reply at the front of b: its length, or 0 while
// it is not all there.
func reply(b []byte) (length, status int, body []byte, closes bool, err error) {
	head := bytes.Index(b, []byte("\r\n\r\n"))
	if head < 0 {
		return 0, 0, nil, false, nil
	}
	if head < 12 || !bytes.HasPrefix(b, []byte("HTTP/1.")) {
		return 0, 0, nil, false, fmt.Errorf("not HTTP")
	}
	status, _ = strconv.Atoi(string(b[9:12]))
	want, chunked := 0, false
	for rest := b[:head]; len(rest) > 0; {
		line := rest
		if i := bytes.Index(rest, []byte("\r\n")); i >= 0 {
			line, rest = rest[:i], rest[i+2:]
		} else {
			rest = nil
		}
		colon := bytes.IndexByte(line, ':')
		if colon < 0 {
			continue
		}
		switch name, value := line[:colon], bytes.TrimSpace(line[colon+1:]); {
		case len(name) == 14 && bytes.EqualFold(name, []byte("Content-Length")):
			if want, err = strconv.Atoi(string(value)); err != nil {
				return 0, 0, nil, false, err
			}
		case len(name) == 17 && bytes.EqualFold(name, []byte("Transfer-Encoding")):
			chunked = true
		case len(name) == 10 && bytes.EqualFold(name, []byte("Connection")):
			closes = bytes.EqualFold(value, []byte("close"))
		}
	}
	body = b[head+4:]
	if chunked {
		end := bytes.Index(body, []byte("0\r\n\r\n"))
		if end < 0 {
			return 0, 0, nil, false, nil
		}
		return head + 4 + end + 5, status, body[:end], closes, nil
	}
	if len(body) < want {
		return 0, 0, nil, false, nil
	}
	return head + 4 + want, status, body[:want], closes, nil
}

// run is the loop.
func (l *load) run() (*result, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	r := &result{lat: map[int][]int64{}, why: map[string]int{}}
	to := sockaddr(l.addr)
	ep, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
	if err != nil {
		return nil, err
	}
	defer syscall.Close(ep)
	all := make([]client, l.conns)
	open := func(i int) error {
		c := &all[i]
		if c.fd, err = dial(to); err != nil {
			return fmt.Errorf("client %d: %v", i, err)
		}
		c.used = 0
		r.dials++
		return syscall.EpollCtl(ep, syscall.EPOLL_CTL_ADD, c.fd,
			&syscall.EpollEvent{Events: syscall.EPOLLIN, Fd: int32(i)})
	}
	defer func() {
		for i := range all {
			if all[i].fd > 0 {
				syscall.Close(all[i].fd)
			}
		}
	}()
	for i := range all {
		all[i].buf = make([]byte, 4096)
		if err := open(i); err != nil {
			return nil, err
		}
	}
	time.Sleep(20 * time.Millisecond) // the service accepts them
	if l.start != nil {
		l.start()
	}
	if l.end != nil {
		defer l.end()
	}

	var scratch []byte
	out := 0 // requests without a reply yet
	begin := time.Now()
	more := func() bool {
		if l.n > 0 {
			return r.sent < l.n
		}
		if l.while != nil {
			return l.while()
		}
		return time.Since(begin) < l.d
	}
	fail := func(c *client, why string) {
		r.failed++
		r.why[why]++
		if c.busy {
			c.busy = false
			out--
		}
	}
	var idle []int
	for i := range all {
		idle = append(idle, i)
	}
	send := func(i int, due time.Time) error {
		c := &all[i]
		scratch, c.kind = l.next(r.sent, scratch[:0])
		r.sent++
		out++
		c.busy, c.since = true, due
		for try := 0; ; try++ {
			n, err := syscall.Write(c.fd, scratch)
			if n == len(scratch) {
				return nil
			}
			if try > 0 || err == nil {
				fail(c, fmt.Sprintf("write: %d %v", n, err))
				idle = append(idle, i)
				return nil
			}
			syscall.Close(c.fd) // it was closed while idle
			if err := open(i); err != nil {
				return err
			}
		}
	}
	events := make([]syscall.EpollEvent, 256)
	heard, starved := begin, false
	for {
		wait := 1000
		if l.rate > 0 {
			for more() {
				if len(idle) == 0 {
					starved = true
					break
				}
				due := begin.Add(time.Duration(float64(r.sent) / l.rate * 1e9))
				if ahead := time.Until(due); ahead > 0 {
					starved = false
					if wait = int(ahead/time.Millisecond) + 1; wait > 1000 {
						wait = 1000
					}
					break
				}
				if !starved { // what is late is our clock, not the service
					due = time.Now()
				}
				i := idle[0]
				idle = idle[1:]
				if err := send(i, due); err != nil {
					return r, err
				}
			}
		} else {
			for len(idle) > 0 && more() {
				i := idle[len(idle)-1]
				idle = idle[:len(idle)-1]
				if err := send(i, time.Now()); err != nil {
					return r, err
				}
			}
		}
		if out == 0 && !more() {
			break
		}
		n, err := syscall.EpollWait(ep, events, wait)
		if err != nil && err != syscall.EINTR {
			return r, err
		}
		now := time.Now()
		if n > 0 || out == 0 {
			heard = now
		} else if now.Sub(heard) > silence {
			for i := range all {
				if all[i].busy {
					fail(&all[i], "no reply")
				}
			}
			break
		}
		for e := 0; e < n; e++ {
			i := int(events[e].Fd)
			c := &all[i]
			if c.used == len(c.buf) {
				c.buf = append(c.buf, make([]byte, len(c.buf))...)
			}
			got, err := syscall.Read(c.fd, c.buf[c.used:])
			if err == syscall.EAGAIN || err == syscall.EINTR {
				continue
			}
			if got <= 0 {
				if c.busy {
					fail(c, "closed without a reply")
					idle = append(idle, i)
				}
				syscall.Close(c.fd)
				if err := open(i); err != nil {
					return r, err
				}
				continue
			}
			c.used += got
			length, status, body, closes, err := reply(c.buf[:c.used])
			if err == nil && length == 0 {
				continue
			}
			good := err == nil && status == 200
			if err == nil && l.good != nil {
				good = l.good(c.kind, status, body)
			}
			switch {
			case err != nil:
				fail(c, err.Error())
			case !c.busy:
				return r, fmt.Errorf("a reply nobody asked for")
			case length != c.used:
				fail(c, "more than a reply")
			case !good:
				fail(c, fmt.Sprintf("status %d", status))
			default:
				r.lat[c.kind] = append(r.lat[c.kind], int64(time.Since(c.since)))
				c.busy = false
				out--
			}
			c.used = 0
			idle = append(idle, i)
			if closes || err != nil {
				syscall.Close(c.fd)
				if err := open(i); err != nil {
					return r, err
				}
			}
		}
	}
	r.took = time.Since(begin)
	return r, nil
}

// askOnce sends a request on an idle connection and reads its reply.
func askOnce(fd int, request []byte) error {
	if _, err := syscall.Write(fd, request); err != nil {
		return err
	}
	var buf [4096]byte
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); {
		n, err := syscall.Read(fd, buf[:])
		if err == syscall.EAGAIN {
			time.Sleep(20 * time.Microsecond)
			continue
		}
		if err != nil {
			return err
		}
		if _, status, _, _, err := reply(buf[:n]); err != nil || status != 200 {
			return fmt.Errorf("status %d, %v", status, err)
		}
		return nil
	}
	return fmt.Errorf("no reply in 10 s")
}

func closeAll(fds []int) {
	for _, fd := range fds {
		syscall.Close(fd)
	}
}
