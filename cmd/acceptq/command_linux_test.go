package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
)

// The table and the JSON have the numbers of the sockets and the process that holds them.
func TestListing(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		full, idle := listen(t, "127.0.0.1:0", 2), listen(t, "[::1]:0", 300)
		fill(t, full)
		shards, err := acceptq.ListenTCPShards("127.0.0.1:0", 8)
		require.NoError(t, err)
		defer shards.Close()

		all := listed(t)
		require.Len(t, all, 3)
		for _, ln := range []*acceptq.Listener{full, idle} {
			want, err := ln.Stats()
			require.NoError(t, err)
			l := all[ln.Addr().String()]
			require.Equal(t, want, l.Stats)
			require.Len(t, l.Processes, 1)
			require.Equal(t, os.Getpid(), l.Processes[0].PID)
		}
		status, text, _ := command(t)
		require.Equal(t, statusOK, status)
		lines := strings.Split(text, "\n")
		require.True(t, strings.HasPrefix(lines[0], "ADDRESS "), text)
		require.Contains(t, lines[1], full.Addr().String()+" ")
		require.Contains(t, lines[1], "[##########] 3/3")
		require.Contains(t, lines[1], " "+strconv.Itoa(os.Getpid())+" ")
		for i := range 8 {
			require.Contains(t, text, fmt.Sprintf("%v (%d of 8)", shards.Addr(), i+1))
		}
		require.NotContains(t, text, "\x1b", "colors in a pipe")
		_, text, _ = command(t, "-n")
		require.NotContains(t, text, "PROCESS")
		require.Contains(t, text, full.Addr().String())
	})
}

// On a terminal of 40 columns no line is longer, and a full queue is red unless NO_COLOR is set.
func TestTerminal(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		full := listen(t, "127.0.0.1:0", 2)
		fill(t, full)
		for _, env := range []string{"NO_COLOR=", "NO_COLOR=1", "TERM=dumb"} {
			program, user := openTerminal(t, 40)
			cmd := start(t, 0)
			cmd.Env = append(cmd.Env, "TERM=xterm", env)
			cmd.Stdout = program
			require.NoError(t, cmd.Run())
			io.WriteString(program, "end\n")
			var lines []string
			for next := readLines(t, user); ; {
				line := strings.TrimRight(next(""), "\r\n")
				if line == "end" {
					break
				}
				lines = append(lines, line)
			}
			text := strings.Join(lines, "\n")
			require.Equal(t, env == "NO_COLOR=", strings.Contains(text, "\x1b[31m"), "%q", text)
			text = strings.NewReplacer("\x1b[31m", "", "\x1b[0m", "").Replace(text)
			require.NotContains(t, text, "\x1b")
			for line := range strings.SplitSeq(text, "\n") {
				require.LessOrEqual(t, len(line), 40)
			}
			require.Contains(t, text, full.Addr().String()+"\n  ")
			require.Contains(t, text, "\n  [##########] 3/3\n  limit 2, drops 1")
		}
	})
}

// A serial console does not know its size. Such a terminal has 80 columns, and not the fewest.
func TestTerminalOfUnknownSize(t *testing.T) {
	console, _ := openTerminal(t, 0)
	require.Equal(t, 80, terminal(console).width)
}

// On a terminal, -w shows the fullest queues, and follows the size of the window.
func TestWatchOnATerminal(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		full := listen(t, "127.0.0.1:0", 2)
		fill(t, full)
		for range 40 {
			listen(t, "127.0.0.1:0", 2)
		}
		program, user := openTerminal(t, 80)
		cmd := start(t, 0, "-w")
		cmd.Env = append(cmd.Env, "TERM=xterm", "NO_COLOR=1")
		cmd.Stdout = program
		require.NoError(t, cmd.Start())
		defer func() {
			cmd.Process.Kill()
			cmd.Wait()
		}()
		next := readLines(t, user)
		frame := func() (lines []string) { // from one clearing of the screen to the end
			lines = append(lines, next("\x1b[2J"))
			for !strings.HasPrefix(lines[len(lines)-1], "and ") {
				lines = append(lines, next(""))
			}
			return lines
		}
		first := frame()
		require.Len(t, first, 24)
		require.Contains(t, first[1], full.Addr().String())
		require.Equal(t, "and 19 lines more\r\n", first[23])
		size := unix.Winsize{Row: 10, Col: 30}
		require.NoError(t, unix.IoctlSetWinsize(int(user.Fd()), unix.TIOCSWINSZ, &size))
		require.Eventually(t, func() bool { return len(frame()) == 9 }, testkit.Patience, time.Millisecond)
		for _, line := range frame()[1:] {
			require.LessOrEqual(t, len(strings.TrimRight(line, "\r\n")), 30)
		}
	})
}

// What the command reports as losses are the counters that nstat prints.
func TestCountersAreThoseOfNstat(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("nstat"); err != nil {
		testkit.SkipUnprivileged(t, "nstat is missing: install iproute2")
	}
	testkit.InNamespace(t, func(t *testing.T) {
		full := listen(t, "127.0.0.1:0", 2)
		fill(t, full)
		r, err := readForCheck(t.Context(), false, false)
		require.NoError(t, err)
		nstat := exec.Command("nstat", "-asz")
		nstat.Env = append(os.Environ(), "NSTAT_HISTORY="+t.TempDir()+"/history")
		out, err := nstat.CombinedOutput()
		require.NoError(t, err, "%s", out)
		counters := map[string]int64{}
		for line := range strings.Lines(string(out)) {
			if f := strings.Fields(line); len(f) == 3 {
				counters[f[0]], _ = strconv.ParseInt(f[1], 10, 64)
			}
		}
		s := r.namespaces[0].system
		require.Positive(t, s.ListenOverflows)
		require.Equal(t, counters["TcpExtListenOverflows"], s.ListenOverflows)
		require.Equal(t, counters["TcpExtListenDrops"], s.ListenDrops)
		require.Equal(t, counters["TcpExtTCPReqQFullDrop"], s.ReqQFullDrop)
		require.Equal(t, counters["TcpExtTCPReqQFullDoCookies"], s.ReqQFullDoCookies)
		stats, err := full.Stats()
		require.NoError(t, err)
		require.Equal(t, s.ListenDrops, stats.Drops)
	})
}

// check reports a full queue, who has lost clients, and that nobody is accepted.
func TestCheck(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.SetSysctl(t, "net.core.somaxconn", 4096)
		idle := listen(t, "127.0.0.1:0", 300)
		status, text, _ := command(t, "check")
		require.Equal(t, statusOK, status, text)
		require.Contains(t, text, "OK: 1 listener, the fullest: ")

		full := listen(t, "127.0.0.1:0", 2)
		fill(t, full)
		status, text, _ = command(t, "check")
		require.Equal(t, statusCritical, status)
		require.Contains(t, text, fmt.Sprintf("(pid %d) on %v: the accept queue is full, 3 queued of 3.", os.Getpid(), full.Addr()))
		require.Contains(t, text, "WARNING: Since the start of this machine or container, full accept queues dropped 1 packet")
		require.Contains(t, text, fmt.Sprintf("on %v has dropped 1 packet.", full.Addr()))
		require.NotContains(t, text, idle.Addr().String())

		// While it watches, the first client stays the first.
		status, text, _ = command(t, "check", "-for", "1s")
		require.Equal(t, statusCritical, status)
		require.Regexp(t, `CRITICAL: .* has accepted nobody for .*: 3 clients wait, the first for `, text)
		peaks, err := watchPeaks(t.Context(), false, 0)
		require.NoError(t, err)
		for of, peak := range peaks {
			require.Equal(t, map[string]int{idle.Addr().String(): 0, full.Addr().String(): 3}[of.addr.String()], peak)
		}
		require.Len(t, peaks, 2)

		// Losses of the past do not count while it watches.
		for range 3 {
			c, err := full.Accept()
			require.NoError(t, err)
			defer c.Close()
		}
		status, text, _ = command(t, "check", "-for", "1ms")
		require.Equal(t, statusOK, status, text)
		require.NotContains(t, text, "dropped")
	})
}

// Losses while check watches are critical, and it names the listener.
func TestCheckNamesTheListenerThatLoses(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		quiet, full := listen(t, "127.0.0.1:0", 0), listen(t, "127.0.0.1:0", 0)
		fill(t, quiet)
		before, err := readForCheck(t.Context(), false, true)
		require.NoError(t, err)
		fill(t, full)
		now, err := readForCheck(t.Context(), false, false)
		require.NoError(t, err)
		text := report(judge(&before, now), now)
		i := strings.Index(text, "full accept queues dropped 1 packet of new clients.")
		require.Positive(t, i, text)
		require.Contains(t, text[i:], fmt.Sprintf("on %v has dropped 1 packet.", full.Addr()))
		require.NotContains(t, text[i:], quiet.Addr().String()+" has dropped")
	})
}

// While a queue overflows all the time, check always knows the listener.
func TestCheckOfConstantOverflows(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		full := listen(t, "127.0.0.1:0", 0)
		fill(t, full)
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			for ctx.Err() == nil {
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					t.Error(err)
					return
				}
				unix.Connect(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: full.Addr().(*net.TCPAddr).Port})
				unix.Close(fd)
			}
		}()
		for range 200 {
			_, text, _ := command(t, "check", "-for", "1us")
			require.NotContains(t, text, "has probably been closed")
		}
		stop()
		<-done
	})
}

// check asks each address once who waits, however many there are. What it could not ask is
// unknown.
func TestCheckAsksAll(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		const n = 40
		for range n {
			ln := listen(t, "127.0.0.1:0", 100)
			testkit.Connect(t, "tcp", ln.Addr().String())
		}
		shards, err := acceptq.ListenTCPShards("127.0.0.1:0", 2)
		require.NoError(t, err)
		defer shards.Close()
		testkit.Connect(t, "tcp", shards.Addr().String())
		r, err := readForCheck(t.Context(), false, false)
		require.NoError(t, err)
		space := r.namespaces[0]
		require.Zero(t, space.unasked)
		asked := 0
		for _, l := range space.listeners {
			asked += len(l.waiting)
		}
		require.Equal(t, n+1, asked)
		space.ask(t.Context(), time.Now())
		require.Equal(t, n+1, space.unasked)
	})
}

// With net.ipv4.tcp_syncookies=2 the kernel counts each SYN as one that met a full SYN queue.
func TestCheckWithACookieForEverySYN(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.SetSysctl(t, "net.ipv4.tcp_syncookies", 2)
		ln := listen(t, "127.0.0.1:0", 9)
		before, err := readForCheck(t.Context(), false, true)
		require.NoError(t, err)
		testkit.Connect(t, "tcp", ln.Addr().String())
		now, err := readForCheck(t.Context(), false, false)
		require.NoError(t, err)
		require.Equal(t, before.namespaces[0].system.ReqQFullDoCookies+1, now.namespaces[0].system.ReqQFullDoCookies)
		require.NotContains(t, report(judge(&before, now), now), "SYN queues were full")
	})
}

// A process that a signal has stopped is named, with the command that continues it.
func TestCheckOfAStoppedProcess(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		ln := listen(t, "127.0.0.1:0", 3)
		f, err := ln.File()
		require.NoError(t, err)
		defer f.Close()
		holder := start(t, 0, "-w")
		holder.ExtraFiles = append(holder.ExtraFiles, f)
		require.NoError(t, holder.Start())
		defer func() {
			holder.Process.Kill()
			holder.Wait()
		}()
		require.NoError(t, holder.Process.Signal(syscall.SIGSTOP))
		require.Eventually(t, func() bool { return isStopped(holder.Process.Pid) }, testkit.Patience, time.Millisecond)
		fill(t, ln)
		status, text, _ := command(t, "check", "-for", "1ms")
		require.Equal(t, statusCritical, status)
		require.Contains(t, text, fmt.Sprintf("  A signal has stopped the process. Continue it: kill -CONT %d\n", holder.Process.Pid))
	})
}

// What who says about "address already in use" is what the kernel does.
func TestWhoOfRealSockets(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		ln := listen(t, "127.0.0.1:0", 10)
		address := ln.Addr().String()
		dialed := testkit.Connect(t, "tcp", address)
		accepted, err := ln.Accept()
		require.NoError(t, err)
		testkit.Connect(t, "tcp", address)
		_, port, err := net.SplitHostPort(address)
		require.NoError(t, err)

		status, text, _ := command(t, "who", port)
		require.Equal(t, statusOK, status)
		require.Contains(t, text, "listens on "+address+": 1 queued of 11")
		require.Contains(t, text, "2 connections have "+port+" as the local port:\n")
		require.Contains(t, text, "  1 ESTABLISHED, in the accept queue, for example to 127.0.0.1:")
		require.Contains(t, text, fmt.Sprintf(" %d, for example to %v\n", os.Getpid(), dialed.LocalAddr()))

		// Connections of a server that has ended do not keep another one out.
		require.NoError(t, accepted.Close())
		require.NoError(t, dialed.Close())
		require.NoError(t, ln.Close())
		require.Eventually(t, func() bool {
			_, text, _ = command(t, "who", address)
			return strings.Contains(text, " TIME_WAIT, no process")
		}, testkit.Patience, time.Millisecond, "%s", text)
		require.Contains(t, text, "If a server here had accepted them")
		again, err := net.Listen("tcp", address)
		require.NoError(t, err)
		defer again.Close()

		// A connection that was dialed from a port keeps a server out.
		client := testkit.Connect(t, "tcp", address)
		local := client.LocalAddr().String()
		_, err = net.Listen("tcp", local)
		require.ErrorIs(t, err, syscall.EADDRINUSE)
		_, text, _ = command(t, "who", local)
		require.Regexp(t, fmt.Sprintf(`No socket listens, but 1 connection of \S+ %d uses the port\.`, os.Getpid()), text)
		require.Contains(t, text, "is in a range that the kernel gives to programs that dial")
		require.Contains(t, text, "no server can listen on its local address, or on all addresses, until it ends.")
		_, dialedPort, err := net.SplitHostPort(local)
		require.NoError(t, err)
		_, err = net.Listen("tcp4", ":"+dialedPort)
		require.ErrorIs(t, err, syscall.EADDRINUSE)
		elsewhere, err := net.Listen("tcp", "127.0.0.2:"+dialedPort)
		require.NoError(t, err)
		require.NoError(t, elsewhere.Close())

		status, text, _ = command(t, "who", "127.0.0.1:9")
		require.Equal(t, statusWarning, status)
		require.Equal(t, "127.0.0.1:9 is free: no TCP socket of this network namespace uses it.\n", text)
	})
}

// A socket that is bound and does not listen is found where the kernel lists it.
func TestWhoOfABoundSocket(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		require.NoError(t, err)
		defer unix.Close(fd)
		require.NoError(t, unix.Bind(fd, &unix.SockaddrInet4{Port: 4711}))
		_, text, _ := command(t, "who", "4711")
		if strings.Contains(text, "is free") {
			t.Skip("this kernel does not list sockets that are only bound: that began with Linux 6.8")
		}
		require.Contains(t, text, "has bound the port and does not listen.")
	})
}

// waiting lists the clients of a listener that the command did not make.
func TestWaitingOfRealSockets(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		ln := listen(t, "127.0.0.1:0", 10)
		address := ln.Addr().String()
		stays, leaves := testkit.Connect(t, "tcp", address), testkit.Connect(t, "tcp", address)
		_, err := stays.Write([]byte("hello"))
		require.NoError(t, err)
		require.NoError(t, leaves.Close())
		var text string
		require.Eventually(t, func() bool {
			var status int
			status, text, _ = command(t, "waiting", address)
			return status == statusOK && strings.Contains(text, "  5 bytes\n") && strings.Contains(text, "  closed, so it has probably given up\n")
		}, testkit.Patience, time.Millisecond, "%s", text)
		require.Contains(t, text, stays.LocalAddr().String())
		require.Contains(t, text, leaves.LocalAddr().String())

		shards, err := acceptq.ListenTCPShards("127.0.0.1:0", 4)
		require.NoError(t, err)
		defer shards.Close()
		client := testkit.Connect(t, "tcp", shards.Addr().String())
		_, text, _ = command(t, "waiting", shards.Addr().String())
		require.Contains(t, text, "4 sockets listen on "+shards.Addr().String()+": 1 queued")
		require.Equal(t, 1, strings.Count(text, client.LocalAddr().String()), "a client is in one queue")

		status, text, _ := command(t, "waiting", "9")
		require.Equal(t, statusWarning, status)
		require.Equal(t, "No socket of this network namespace listens on :9.\n", text)
	})
}

// -w repeats the table until a signal, and -json makes each an object on one line.
func TestWatch(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		full := listen(t, "127.0.0.1:0", 0)
		for _, json := range []bool{true, false} {
			args := []string{"-w"}
			if json {
				args = append(args, "-json")
			}
			cmd := start(t, 0, args...)
			out, err := cmd.StdoutPipe()
			require.NoError(t, err)
			require.NoError(t, cmd.Start())
			next := readLines(t, out)
			first := next(full.Addr().String())
			fill(t, full)
			second := next(full.Addr().String())
			if json {
				require.Nil(t, parseListing(t, first)[full.Addr().String()].DropsPerSecond)
				rate := parseListing(t, second)[full.Addr().String()].DropsPerSecond
				require.NotNil(t, rate)
				require.Positive(t, *rate)
				c, err := full.Accept()
				require.NoError(t, err)
				defer c.Close()
			} else {
				require.Contains(t, first, " -")
				require.NotContains(t, strings.TrimSpace(second[len(second)-6:]), "-")
			}
			require.NoError(t, cmd.Process.Signal(os.Interrupt))
			require.NoError(t, cmd.Wait())
		}
	})
}

// -all lists the listeners of each network namespace once, with its name.
func TestAllNamespaces(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		if os.Getuid() == 0 && unix.Mount("tmpfs", "/run", "tmpfs", 0, "") != nil {
			t.Skip("no mount here")
		}
		here := listen(t, "127.0.0.1:0", 5)
		other := testkit.NewVisited(t)
		var there *acceptq.Listener
		require.NoError(t, os.MkdirAll("/run/netns", 0o755))
		require.NoError(t, os.WriteFile("/run/netns/blue", nil, 0o600))
		require.NoError(t, os.WriteFile("/run/netns/stale", nil, 0o600))
		other.In(func() {
			there = listen(t, "127.0.0.1:0", 7)
			require.NoError(t, unix.Mount("/proc/thread-self/ns/net", "/run/netns/blue", "", unix.MS_BIND, ""))
			for range 8 { // a goroutine of net.Dial would connect in the other namespace
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
				require.NoError(t, err)
				t.Cleanup(func() { unix.Close(fd) })
				to := unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: there.Addr().(*net.TCPAddr).Port}
				require.NoError(t, unix.Connect(fd, &to))
			}
		})

		all := listed(t, "-all")
		require.Empty(t, all[here.Addr().String()].Namespace)
		require.Equal(t, 5, all[here.Addr().String()].Stats.Limit)
		require.Equal(t, "blue", all[there.Addr().String()].Namespace)
		require.Equal(t, 8, all[there.Addr().String()].Stats.Queued)
		require.Equal(t, os.Getpid(), all[there.Addr().String()].Processes[0].PID)
		require.NotContains(t, listed(t), there.Addr().String())

		status, text, _ := command(t, "check", "-all")
		require.Equal(t, statusCritical, status)
		require.Contains(t, text, "on "+there.Addr().String()+" in the network namespace blue: the accept queue is full, 8 queued of 8.")
		require.Contains(t, text, "nsenter --net=/run/netns/blue acceptq waiting "+there.Addr().String()+"\n")
	})
}

// Another user gets every number, and is told that the processes cannot be read.
func TestAnotherUser(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("to act as another user the test must run as root")
	}
	testkit.InNamespace(t, func(t *testing.T) {
		full := listen(t, "127.0.0.1:0", 2)
		fill(t, full)
		out, err := start(t, 65534, "-json").Output()
		require.NoError(t, err)
		l := parseListing(t, string(out))[full.Addr().String()]
		want, err := full.Stats()
		require.NoError(t, err)
		require.Equal(t, want, l.Stats)
		require.Empty(t, l.Processes)
		require.Contains(t, string(out), `"complete": false`)

		out, err = start(t, 65534).Output()
		require.NoError(t, err)
		require.Contains(t, string(out), "  ?  ")
		require.Contains(t, string(out), "\n? Some processes cannot be read by this user: run acceptq as root.\n")
		out, err = start(t, 65534, "check").Output()
		var exit *exec.ExitError
		require.ErrorAs(t, err, &exit)
		require.Equal(t, statusCritical, exit.ExitCode())
		require.Contains(t, string(out), fmt.Sprintf("CRITICAL: The listener on %v: the accept queue is full, 3 queued of 3.", full.Addr()))
		out, err = start(t, 65534, "-all").Output()
		require.NoError(t, err)
		require.Contains(t, string(out), "The network namespaces of ")
	})
}

// If namespaces cannot be read, check -all cannot tell whether all is well.
func TestCheckOfHiddenNamespaces(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("to act as another user the test must run as root")
	}
	testkit.InNamespace(t, func(t *testing.T) {
		unknown := func(want string) {
			t.Helper()
			out, err := start(t, 65534, "check", "-all").CombinedOutput()
			var exit *exec.ExitError
			require.ErrorAs(t, err, &exit, "%s", out)
			require.Equal(t, statusUnknown, exit.ExitCode(), "%s", out)
			require.Regexp(t, `(?m)^UNKNOWN: `+want, string(out))
		}
		unknown(`The network namespaces of \d+ process(es)? cannot be read by this user: run acceptq as root\.$`)
		if err := unix.Mount("proc", "/proc", "proc", 0, "hidepid=2"); err != nil {
			testkit.SkipUnprivileged(t, "no /proc that hides processes here: "+err.Error())
		}
		unknown(`/proc hides processes\. Their network namespaces cannot be read by this user: run acceptq as root\.$`)
	})
}

// Without /proc the queues are there, and what is missing is said.
func TestWithoutProc(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		ln := listen(t, "127.0.0.1:0", 5)
		testkit.Connect(t, "tcp", ln.Addr().String())
		address := ln.Addr().String()
		if err := unix.Chroot(t.TempDir()); err != nil {
			testkit.SkipUnprivileged(t, "no chroot here: "+err.Error())
		}
		for _, test := range []struct {
			args   []string
			status int
			want   string
		}{
			{nil, statusOK, address + "  ?"},
			{[]string{"who", address}, statusOK, "listens on " + address + ": 1 queued of 6"},
			{[]string{"waiting", address}, statusOK, "1 queued of 6"},
			{[]string{"check"}, statusUnknown, "UNKNOWN: The counters of lost packets cannot be read"},
		} {
			status, text, stderr := command(t, test.args...)
			require.Equal(t, test.status, status, stderr)
			require.Contains(t, text, test.want)
			if test.args == nil || test.args[0] == "who" {
				require.Contains(t, text, "The processes cannot be read: acceptq: processes: open /proc: no such file or directory.")
			}
		}
	})
}

// In a container whose /proc does not show the server, every number is there, and the command
// says that the process is missing.
func TestContainerWithoutTheProcesses(t *testing.T) {
	t.Parallel()
	testkit.InNamespace(t, func(t *testing.T) {
		full := listen(t, "127.0.0.1:0", 2)
		fill(t, full)
		cmd := start(t, 0)
		cmd.Env = append(cmd.Env, commandEnv+"=container")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() == 77 {
			testkit.SkipUnprivileged(t, fmt.Sprintf("no PID namespace with a /proc here: %v, %s", err, out))
		}
		require.NoError(t, err, "%s", out)
		require.Regexp(t, `\n`+regexp.QuoteMeta(full.Addr().String())+` +\? +\[##########\] 3/3 +2 +1\n`, string(out))
		require.Contains(t, string(out), "\n? No process that /proc shows holds this socket.\n")
	})
}
