// Plots, drawn by gnuplot: latencies of exchanges, CPU by concurrency.
package main

import (
	"bytes"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
)

// curve is the latency in ms at so many nines (1: 90 %, 2: 99 %).
type curve struct {
	title  string
	points [][2]float64
	look   string
}

func (b *bench) curve(title string, r *result) {
	all := r.sorted()
	c := curve{title: title}
	for nines := 0.0; 1-math.Pow(10, -nines) < 1-1/float64(len(all)+1); nines += .05 {
		c.points = append(c.points, [2]float64{nines, quantile(all, 1-math.Pow(10, -nines))})
	}
	for i := range b.curves[b.who] {
		if b.curves[b.who][i].title == title { // the last run is drawn
			b.curves[b.who][i] = c
			return
		}
	}
	b.curves[b.who] = append(b.curves[b.who], c)
}

func (r *report) plot(dir string) error {
	path, err := exec.LookPath("gnuplot")
	if err != nil {
		return fmt.Errorf("no gnuplot: no plots")
	}
	names := [2]string{"", "peer: "}
	var latencies, cost []curve
	colours := map[string]int{}
	look := func(title string, who int) string { // the peer's is dashed
		if colours[title] == 0 {
			colours[title] = len(colours) + 1
		}
		return fmt.Sprintf("linewidth 2 linetype %d dashtype %d", colours[title], who+1)
	}
	for who, list := range r.curves {
		for _, c := range list {
			// A few that differ in kind, not in number.
			for _, shown := range []string{"16 clients", "1 client", "1,000 clients", "closes", "first contact"} {
				if strings.Contains(c.title, shown) && !strings.Contains(c.title, "homeservers, 16") {
					latencies = append(latencies, curve{names[who] + c.title, c.points, look(c.title, who)})
					break
				}
			}
		}
		if len(r.growth[who]) > 0 {
			c := curve{title: names[who] + "warm exchange", look: look("", who)}
			for clients, us := range r.growth[who] {
				c.points = append(c.points, [2]float64{float64(clients), us})
			}
			sort.Slice(c.points, func(i, j int) bool { return c.points[i][0] < c.points[j][0] })
			cost = append(cost, c)
		}
	}
	const common = "set grid\nset key outside below maxcols 2\nset style data lines\n"
	for _, p := range []struct {
		name, setup string
		curves      []curve
	}{
		{"latency", "set logscale y\nset ylabel 'ms'\nset xlabel 'of all exchanges'\n" +
			"set xtics ('0 %%' 0, '50 %%' 0.301, '90 %%' 1, '99 %%' 2, '99.9 %%' 3, '99.99 %%' 4)\n", latencies},
		{"concurrency", "set logscale x\nset yrange [0:*]\nset ylabel 'CPU time of the service, µs an exchange'\n" +
			"set xlabel 'clients'\nset style data linespoints\n", cost},
	} {
		if len(p.curves) == 0 {
			continue
		}
		var s, data bytes.Buffer
		fmt.Fprintf(&s, "set encoding utf8\nset terminal svg size 900,600 background 'white'\nset output '%s'\n%s%splot ",
			filepath.Join(dir, p.name+".svg"), common, p.setup)
		for i, c := range p.curves {
			if i > 0 {
				s.WriteString(", ")
			}
			fmt.Fprintf(&s, "'-' title '%s' %s", c.title, c.look)
			for _, at := range c.points {
				fmt.Fprintf(&data, "%g %g\n", at[0], at[1])
			}
			data.WriteString("e\n")
		}
		s.WriteString("\n")
		s.Write(data.Bytes())
		cmd := exec.Command(path)
		cmd.Stdin = &s
		cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("gnuplot: %v %s", err, out)
		}
	}
	return nil
}
