// A small box: a tenth of a core and 64 MiB of addresses for the service.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

const quotaUs, periodUs, limitKB = 10000, 100000, 64 << 10

// limits are lines of shell by which a service limits itself before it runs.
type limits struct {
	by, folder, shell string
}

// newLimits finds what this machine has for it: a cgroup of either version,
// else cpulimit.
func newLimits() (*limits, error) {
	for _, root := range []string{"/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup"} {
		folder := filepath.Join(root, fmt.Sprintf("lkjwt-bench-%d", os.Getpid()))
		if os.Mkdir(folder, 0o755) != nil {
			continue
		}
		for _, way := range [][2]string{
			{"cpu.cfs_quota_us", fmt.Sprint(quotaUs)},
			{"cpu.max", fmt.Sprintf("%d %d", quotaUs, periodUs)},
		} {
			file := filepath.Join(folder, way[0])
			if _, err := os.Stat(file); err == nil && os.WriteFile(file, []byte(way[1]), 0o644) == nil {
				return &limits{"cgroup " + way[0], folder, fmt.Sprintf("echo $$ >%s/cgroup.procs\n", folder)}, nil
			}
		}
		os.Remove(folder)
	}
	path, err := exec.LookPath("cpulimit")
	if err != nil {
		return nil, fmt.Errorf("neither a cgroup nor cpulimit for BENCH_LIMITS: %v", err)
	}
	return &limits{"cpulimit", "", fmt.Sprintf("%s -b -z -p $$ -l %d >/dev/null 2>&1\n", path, 100*quotaUs/periodUs)}, nil
}

// command is bin, limited from its first instruction on; without limits it
// is bin alone.
func (l *limits) command(bin string) *exec.Cmd {
	if l == nil {
		return exec.Command(bin)
	}
	return exec.Command("/bin/sh", "-ec", fmt.Sprintf("%sulimit -v %d\nexec \"$0\"", l.shell, limitKB), bin)
}

// waited says in how much of the time that it ran in a service had to wait.
func (l *limits) waited() string {
	text, err := os.ReadFile(filepath.Join(l.folder, "cpu.stat"))
	if err != nil {
		return ""
	}
	periods, throttled := 1.0, 0.0
	for _, line := range strings.Split(string(text), "\n") {
		fmt.Sscanf(line, "nr_periods %g", &periods)
		fmt.Sscanf(line, "nr_throttled %g", &throttled)
	}
	return fmt.Sprintf(", throttled in %.0f of 100 periods", 100*throttled/periods)
}

func (l *limits) String() string {
	return fmt.Sprintf("a tenth of a core (%s%s), 64 MiB of addresses", l.by, l.waited())
}

func (l *limits) close() {
	if l != nil && l.folder != "" {
		os.Remove(l.folder)
	}
}
