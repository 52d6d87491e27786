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

// lateACK makes a client delay the final ACK of its handshake until it sends data, or for
// 200 ms. Until then the handshake is in flight for the server.
func lateACK(_, _ string, c syscall.RawConn) (err error) {
	cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_QUICKACK, 0) })
	return errors.Join(cerr, err)
}

// A crowd is a number of clients that connect repeatedly until they are told to stop.
type crowd struct {
	done     chan struct{}
	once     sync.Once
	wait     sync.WaitGroup
	ok, lost atomic.Int64
	out      atomic.Int64          // clients that could not connect
	first    atomic.Pointer[error] // the first error of a lost request
}

// errNotIn is the error of a client that could not connect: it was refused or dropped.
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
					c.out.Add(1)
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

// end tells the clients to stop and waits for them. It may be called more than once.
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

// A drain keeps new clients out in two ways: with a filter if it has CAP_NET_ADMIN,
// otherwise with a minimum TTL. A test that is not root can use only one of them.

const unprivilegedEnv = "ACCEPTQ_TEST_UNPRIVILEGED"

// inEachWay runs f in this process, and again in a process without CAP_NET_ADMIN.
func inEachWay(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	if os.Getenv(unprivilegedEnv) != "" {
		f(t)
		return
	}
	t.Run("in this process", f)
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
			runtime.LockOSThread() // never unlocked, because the thread has lost a capability
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

// dialTimeout is shorter than the second after which a client sends a dropped SYN again.
var dialTimeout = 100 * time.Millisecond

func dial(addr string) (net.Conn, error) {
	d := net.Dialer{Timeout: dialTimeout, Control: lateACK}
	c, err := d.Dial("tcp", addr)
	if err != nil {
		return nil, errors.Join(errNotIn, err)
	}
	return c, nil
}
