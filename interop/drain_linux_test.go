package interop

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// lateACK makes a client hold the final ACK of its handshake back until it sends
// something (or for 200 ms): to the server the handshake is in flight.
func lateACK(_, _ string, c syscall.RawConn) (err error) {
	cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_QUICKACK, 0) })
	return errors.Join(cerr, err)
}

// A crowd is clients that come again and again until they are told to stop.
type crowd struct {
	done     chan struct{}
	once     sync.Once
	wait     sync.WaitGroup
	ok, lost atomic.Int64
	first    atomic.Pointer[error] // of those that were lost
}

// errNotIn is of a client that was not connected: refused, or dropped.
var errNotIn = errors.New("not connected")

func newCrowd(n int, visit func(id int) error) *crowd {
	c := &crowd{done: make(chan struct{})}
	for id := range n {
		c.wait.Go(func() {
			for {
				select {
				case <-c.done:
					return
				default:
				}
				switch err := visit(id); {
				case err == nil:
					c.ok.Add(1)
				case errors.Is(err, errNotIn):
					<-time.After(time.Millisecond)
				default:
					c.lost.Add(1)
					c.first.CompareAndSwap(nil, &err)
				}
			}
		})
	}
	return c
}

// end tells the clients to stop and waits for them. It may be called again.
func (c *crowd) end() {
	c.once.Do(func() { close(c.done) })
	c.wait.Wait()
}

func (c *crowd) failure() error {
	if err := c.first.Load(); err != nil {
		return *err
	}
	return nil
}

// Both ways of stopping: with CAP_NET_ADMIN a filter, without it a minimum TTL.
// A test that is not root has one only.

const unprivilegedEnv = "ACCEPTQ_TEST_UNPRIVILEGED"

// inEachWay runs f as it is, and once more in a process that has lost
// CAP_NET_ADMIN.
func inEachWay(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	if os.Getenv(unprivilegedEnv) != "" {
		f(t)
		return
	}
	t.Run("as it is", f)
	t.Run("unprivileged", func(t *testing.T) {
		if os.Geteuid() != 0 {
			t.Skip("unprivileged already")
		}
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		name, _, _ := cutLast(t.Name())
		cmd := exec.Command(self, "-test.run=^"+name+"$", "-test.v", "-test.timeout=55s")
		cmd.Env = append(os.Environ(), unprivilegedEnv+"=1")
		done := make(chan error)
		var out []byte
		go func() {
			runtime.LockOSThread() // and never unlocked: the thread is not as it was
			err := unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_NET_ADMIN, 0, 0, 0)
			if err == nil {
				out, err = cmd.CombinedOutput()
			}
			done <- err
		}()
		err = <-done
		t.Logf("without CAP_NET_ADMIN:\n%s", out)
		if err != nil {
			t.Fatal(err)
		}
	})
}

func cutLast(name string) (before, after string, found bool) {
	for i := len(name) - 1; i >= 0; i-- {
		if name[i] == '/' {
			return name[:i], name[i+1:], true
		}
	}
	return name, "", false
}

func dial(addr string) (net.Conn, error) {
	d := net.Dialer{Timeout: 100 * time.Millisecond, Control: lateACK}
	c, err := d.Dial("tcp", addr)
	if err != nil {
		return nil, errors.Join(errNotIn, err)
	}
	return c, nil
}
