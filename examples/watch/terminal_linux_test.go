package main

import (
	"bytes"
	"fmt"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// The program restores the cursor of the terminal, whichever signal ends it.
func TestCursorComesBack(t *testing.T) {
	for _, sig := range []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		t.Run(sig.String(), func(t *testing.T) {
			screen, terminal := openTerminal(t)
			cmd := program(t)
			cmd.Env = append(cmd.Env, "TERM=xterm")
			cmd.Stdout = terminal
			require.NoError(t, cmd.Start())
			terminal.Close()

			var seen bytes.Buffer
			read := func(until string) {
				t.Helper()
				buf := make([]byte, 4096)
				for !bytes.Contains(seen.Bytes(), []byte(until)) {
					require.NoError(t, screen.SetReadDeadline(time.Now().Add(20*time.Second)))
					n, err := screen.Read(buf)
					seen.Write(buf[:n])
					require.NoError(t, err, "waiting for %q: %q", until, &seen)
				}
			}
			read("\x1b[?7h") // the first bar is drawn
			require.Contains(t, seen.String(), "\x1b[?25l", "the program has not hidden the cursor, so it cannot restore it")
			require.NotContains(t, seen.String(), "\x1b[?25h")
			require.NoError(t, cmd.Process.Signal(sig))
			read("\x1b[?25h")
			require.Contains(t, seen.String(), " served, ")
			require.NoError(t, cmd.Wait(), "exit status 0")
		})
	}
}

// openTerminal returns both sides of a pseudo-terminal. The output that a program writes
// to terminal can be read from screen.
func openTerminal(t *testing.T) (screen, terminal *os.File) {
	t.Helper()
	// Open it non-blocking, so that the screen can have a deadline.
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	require.NoError(t, err)
	screen = os.NewFile(uintptr(fd), "/dev/ptmx")
	t.Cleanup(func() { screen.Close() })
	require.NoError(t, unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	require.NoError(t, err)
	terminal, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	require.NoError(t, err)
	return screen, terminal
}
