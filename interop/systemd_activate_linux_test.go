package interop

import (
	"bufio"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/coreos/go-systemd/v22/activation"
	"github.com/stretchr/testify/require"
)

func init() { helpers["activated"] = activatedHelper }

// activatedHelper is a service that systemd-socket-activate starts. It serves the
// queued clients, drains, and ends.
func activatedHelper() error {
	ls, err := activation.Listeners()
	if err != nil {
		return err
	}
	if len(ls) != 1 {
		return errors.New("want one listener")
	}
	ln, err := acceptq.Wrap(ls[0])
	if err != nil {
		return err
	}
	s, err := ln.Stats()
	if err != nil {
		return err
	}
	if err := (report{Who: "service", Addr: ln.Addr().String(), Inherited: (*numbers)(&s)}).send(); err != nil {
		return err
	}
	served, done := 0, make(chan error)
	go func() {
		for {
			if err := serve(slowListener{ln}, 1, "service"); err != nil {
				done <- err
				return
			}
			served++
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := drainShared(ctx, ln); err != nil {
		return err
	}
	ln.Close()
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		return err
	}
	return report{Who: "service", Served: served, Done: true}.send()
}

// socketActivate runs systemd-socket-activate, which starts this binary as the service
// at the first connection.
func socketActivate(t *testing.T, env string, args ...string) *exec.Cmd {
	t.Helper()
	program := need(t, "systemd-socket-activate", "systemd")
	self, err := os.Executable()
	require.NoError(t, err)
	// systemd sets LISTEN_PID between fork and exec; exec alone keeps the process id.
	script := env + ` exec "$0" -E ` + helperEnv + `=activated -E GORACE=atexit_sleep_ms=0 "$@"`
	args = append(append([]string{"-c", script, program}, args...), self)
	return exec.CommandContext(t.Context(), "/bin/sh", args...)
}

// The holder keeps the socket when a service ends, as systemd does. The first service
// serves the queued clients, drains and ends. The drain leaves the socket open for the
// next service. systemd-socket-activate passes the socket to both services. The test
// takes the part of systemd as the holder.
func TestSystemdSocketActivate(t *testing.T) {
	inEachWay(t, func(t *testing.T) {
		holder, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(16))
		require.NoError(t, err)
		defer holder.Close()
		addr := holder.Addr().String()
		for range 2 {
			const waiting = 8
			var clients []net.Conn
			for range waiting {
				clients = append(clients, connect(t, addr))
			}
			require.Eventually(t, func() bool {
				s, err := holder.Stats()
				return err == nil && s.Queued == waiting
			}, patience, time.Millisecond)
			cmd := socketActivate(t, "LISTEN_FDS=1 LISTEN_PID=$$")
			cmd.ExtraFiles = []*os.File{duplicate(t, holder.TCPListener())}
			r, served := runService(t, cmd)
			require.Equal(t, addr, r.Addr)
			require.Equal(t, waiting, r.Inherited.Queued)
			require.Equal(t, 16, r.Inherited.Limit)
			require.Equal(t, waiting, served, "a drain ended before its queue was empty")
			for _, c := range clients {
				require.Equal(t, "service", answer(t, c))
			}
		}
	})
}

// In this test systemd-socket-activate opens the socket too.
func TestSystemdSocketActivateListens(t *testing.T) {
	free, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	addr := free.Addr().String()
	free.Close()
	got := make(chan string)
	go func() {
		defer close(got)
		for deadline := time.Now().Add(patience); time.Now().Before(deadline); <-time.After(time.Millisecond) {
			if c, err := net.Dial("tcp", addr); err == nil {
				got <- answer(t, c)
				c.Close()
				return
			}
		}
	}()
	r, served := runService(t, socketActivate(t, "", "-l", addr))
	require.Equal(t, addr, r.Addr)
	require.Equal(t, 1, r.Inherited.Queued)
	require.Equal(t, 1, served)
	require.Equal(t, "service", <-got)
}

// runService runs a service to its end, and returns its two reports.
func runService(t *testing.T, cmd *exec.Cmd) (first report, served int) {
	t.Helper()
	var errs strings.Builder
	cmd.Stderr = &errs // systemd-socket-activate logs to it
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	lines := reports{bufio.NewScanner(out)}
	if !lines.lines.Scan() {
		cmd.Wait()
		t.Fatalf("the service did not run: %s", errs.String())
	}
	first = lines.last(t)
	last := lines.next(t)
	lines.end(t)
	require.NoError(t, cmd.Wait(), "%s", &errs)
	require.True(t, last.Done)
	return first, last.Served
}
