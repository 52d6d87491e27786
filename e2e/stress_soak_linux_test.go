package e2e

import (
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/intake"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/testkit"
)

// soakEnv has the duration of TestSoak.
const soakEnv = "ACCEPTQ_SOAK"

// A soak is one listener and its clients, with their counters.
type soak struct {
	t    *testing.T
	ln   *acceptq.Listener
	stop chan struct{}
	wait sync.WaitGroup

	accepted, answered, turnedAway, abandoned, wereReset, ended, read, resized atomic.Int64
}

// every calls f repeatedly until the soak stops, with a maximum of one call in d.
func (s *soak) every(d time.Duration, f func()) {
	s.wait.Go(func() {
		tick := time.NewTicker(d)
		defer tick.Stop()
		for {
			select {
			case <-s.stop:
				return
			case <-tick.C:
				f()
			}
		}
	})
}

// dial connects a client that does not wait for a retransmission of its SYN. It returns nil
// if the client was turned away. The connection is closed with a reset, so that the kernel
// keeps no state for it.
func (s *soak) dial(timeout time.Duration, control func(_, _ string, c syscall.RawConn) error) *net.TCPConn {
	d := net.Dialer{Timeout: timeout, Control: func(network, address string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptLinger(int(fd), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		})
		if control != nil {
			err = errors.Join(err, control(network, address, c))
		}
		return errors.Join(cerr, err)
	}}
	c, err := d.Dial("tcp", s.ln.Addr().String())
	if err != nil {
		s.turnedAway.Add(1)
		return nil
	}
	c.SetDeadline(time.Now().Add(time.Second))
	return c.(*net.TCPConn)
}

// storm connects many clients at the same moment. Each sends data once.
func (s *soak) storm() {
	var storm sync.WaitGroup
	for range 32 {
		storm.Go(func() {
			if c := s.dial(100*time.Millisecond, nil); c != nil {
				defer c.Close()
				s.ask(c)
			}
		})
	}
	storm.Wait()
}

// ask sends a byte and waits for its echo. There may be none: if the final ACK was dropped,
// only the client believes that it is connected.
func (s *soak) ask(c net.Conn) bool {
	var b [1]byte
	if _, err := c.Write([]byte{'x'}); err != nil {
		return false
	}
	if _, err := c.Read(b[:]); err != nil {
		return false
	}
	s.answered.Add(1)
	return true
}

// flood starts clients that never finish their handshake. Some drop the SYN-ACK and
// give up. Others delay their final ACK and close.
func (s *soak) flood() {
	var flood sync.WaitGroup
	for range 8 {
		flood.Go(func() {
			deaf := func(_, _ string, c syscall.RawConn) error { return testkit.SetMinTTL(c, intake.MaxTTL) }
			if c := s.dial(30*time.Millisecond, deaf); c != nil {
				s.t.Error("a client that drops the SYN-ACK got an answer")
				c.Close()
			}
		})
		flood.Go(func() {
			if c := s.dial(30*time.Millisecond, testkit.LateACK); c != nil {
				c.Close()
				s.abandoned.Add(1)
			}
		})
	}
	flood.Wait()
}

// reset is a client that resets its connection as soon as it is in the queue.
func (s *soak) reset() {
	if c := s.dial(100*time.Millisecond, nil); c != nil {
		c.Close()
	}
}

// slow is a client that waits before each byte.
func (s *soak) slow() {
	c := s.dial(100*time.Millisecond, nil)
	if c == nil {
		return
	}
	defer c.Close()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for range 5 {
		if !s.ask(c) {
			return
		}
		<-tick.C
	}
}

// silent is a client that sends nothing until the server closes the connection.
func (s *soak) silent() {
	if c := s.dial(100*time.Millisecond, nil); c != nil {
		defer c.Close()
		var b [1]byte
		c.Read(b[:])
	}
}

// acceptSlowly runs the server until the deadline of the listener has passed.
func (s *soak) acceptSlowly() {
	var serving sync.WaitGroup
	defer serving.Wait()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for room := make(chan struct{}, 64); ; <-tick.C {
		c, err := s.ln.Accept()
		if err != nil {
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				s.t.Error(err)
			}
			return
		}
		s.accepted.Add(1)
		room <- struct{}{}
		serving.Go(func() {
			defer func() { <-room }()
			defer c.Close()
			s.serve(c)
		})
	}
}

func (s *soak) serve(c net.Conn) {
	for {
		var b [16]byte
		c.SetDeadline(time.Now().Add(50 * time.Millisecond))
		n, err := c.Read(b[:])
		if err == nil {
			_, err = c.Write(b[:n])
		}
		switch {
		case err == nil:
			continue
		case errors.Is(err, unix.ECONNRESET):
			s.wereReset.Add(1)
		case errors.Is(err, os.ErrDeadlineExceeded):
			s.ended.Add(1)
		}
		return
	}
}

// soakLimits are the backlogs that the soak sets in turn, up and down.
var soakLimits = []int{1, 64, 0, 8, 1, 2}

func (s *soak) resize() {
	n := soakLimits[int(s.resized.Add(1))%len(soakLimits)]
	b, err := s.ln.SetBacklog(n)
	want := acceptq.Backlog{Requested: n, Ceiling: b.Ceiling, Limit: n, Effective: n, Capacity: n + 1, Measured: true}
	if err != nil || b != want {
		s.t.Errorf("SetBacklog(%d): %+v, %v", n, b, err)
	}
}

// look returns a function that reads the queue and compares the result with the previous
// one.
func (s *soak) look() func() {
	var drops int64
	allowed := map[int]bool{}
	for _, n := range soakLimits {
		allowed[n] = true
	}
	return func() {
		st, err := s.ln.Stats()
		// Clients that connect at the same moment can exceed the capacity by a few, but
		// not by a factor of two.
		sound := err == nil && allowed[st.Limit] && st.Capacity == st.Limit+1 &&
			st.Queued >= 0 && st.Queued <= 2*(64+1) && st.Drops >= drops && st.Incomplete == sys.Unknown
		if !sound {
			s.t.Errorf("after %d drops: %+v, %v", drops, st, err)
		}
		drops = st.Drops
		s.read.Add(1)
	}
}

// lookAtSystem does the same for the counters of the namespace.
func (s *soak) lookAtSystem() func() {
	var before acceptq.System
	return func() {
		now, err := acceptq.ReadSystem()
		if err != nil || now.ListenOverflows < before.ListenOverflows || now.ListenDrops < before.ListenDrops ||
			now.ReqQFullDrop < before.ReqQFullDrop || now.ReqQFullDoCookies < before.ReqQFullDoCookies {
			s.t.Errorf("%+v after %+v: %v", now, before, err)
		}
		before = now
	}
}

// TestSoak puts load on a listener for the time in soakEnv. Then it compares the totals
// with the counters of the kernel.
func TestSoak(t *testing.T) {
	text := os.Getenv(soakEnv)
	if text == "" {
		t.Skipf("to run it: %s=10m go test -run '^TestSoak$' -timeout 20m .", soakEnv)
	}
	length, err := time.ParseDuration(text)
	require.NoError(t, err, soakEnv)
	require.GreaterOrEqual(t, length, time.Second, soakEnv)
	const settling = 2 * time.Minute // far more than the comparison takes
	if end, bounded := t.Deadline(); bounded {
		require.Greater(t, time.Until(end), length, "%s is longer than this test may take: see -timeout", soakEnv)
	}
	testkit.InNamespaceFor(t, length+settling, func(t *testing.T) {
		testkit.SetSysctl(t, "net.ipv4.tcp_synack_retries", 2) // the kernel drops a dead client after 7 s
		testkit.SetSysctl(t, "net.core.somaxconn", 128)
		goroutines, descriptors, heap := goleak.IgnoreCurrent(), testkit.OpenDescriptors(), heapInUse()
		ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(1))
		require.NoError(t, err)
		defer ln.Close()
		s := &soak{t: t, ln: ln, stop: make(chan struct{})}
		server := make(chan struct{})
		go func() {
			defer close(server)
			s.acceptSlowly()
		}()
		s.every(20*time.Millisecond, s.storm)
		s.every(20*time.Millisecond, s.flood)
		for range 4 {
			s.every(2*time.Millisecond, s.reset)
			s.every(2*time.Millisecond, s.slow)
			s.every(2*time.Millisecond, s.silent)
		}
		s.every(time.Millisecond, s.look())
		s.every(10*time.Millisecond, s.lookAtSystem())
		s.every(100*time.Millisecond, s.resize)
		<-time.After(length)

		// The server stops first, so that connections stay in the queue for the comparison.
		require.NoError(t, ln.SetDeadline(time.Unix(1, 0)))
		<-server
		full := testkit.Eventually(func() bool {
			st, err := ln.Stats()
			return err == nil && st.Queued >= st.Capacity
		})
		close(s.stop)
		s.wait.Wait()
		require.True(t, full, "no client filled the queue")
		require.Eventually(t, func() bool { return testkit.SynReceived(t, ln.Addr()) == 0 }, testkit.Patience, 10*time.Millisecond)

		// Read the counters of the kernel while they do not change.
		overflows := func() [2]int64 {
			return [2]int64{testkit.KernelCounter(t, "ListenOverflows"), testkit.KernelCounter(t, "ListenDrops")}
		}
		var said acceptq.System
		var counted [2]int64
		require.True(t, testkit.Eventually(func() bool {
			counted = overflows()
			said, err = acceptq.ReadSystem()
			return err == nil && counted == overflows()
		}))
		st, err := ln.Stats()
		require.NoError(t, err)
		t.Logf("%v: %d accepted, %d answers, %d resets seen, %d silent clients sent away; %d turned away, %d handshakes abandoned; "+
			"%d looks, %d new limits; drops %d, ListenOverflows %d, ListenDrops %d, TCPReqQFullDoCookies %d",
			length, s.accepted.Load(), s.answered.Load(), s.wereReset.Load(), s.ended.Load(), s.turnedAway.Load(), s.abandoned.Load(),
			s.read.Load(), s.resized.Load(), st.Drops, said.ListenOverflows, said.ListenDrops, said.ReqQFullDoCookies)
		require.Equal(t, counted, [2]int64{said.ListenOverflows, said.ListenDrops})
		require.Positive(t, said.ListenOverflows)
		require.GreaterOrEqual(t, said.ListenDrops, said.ListenOverflows)
		// Drops counts each of those, and the final ACKs among them twice.
		require.GreaterOrEqual(t, st.Drops, said.ListenDrops)
		require.LessOrEqual(t, st.Drops, 2*said.ListenDrops)
		for what, n := range map[string]*atomic.Int64{
			"accepted": &s.accepted, "answered": &s.answered, "turned away": &s.turnedAway, "reset": &s.wereReset,
			"sent away": &s.ended, "abandoned": &s.abandoned, "looks": &s.read, "new limits": &s.resized,
		} {
			require.Positive(t, n.Load(), "the load never led to: %s", what)
		}

		// All queued clients have reset their connections, which are still in the queue.
		require.Equal(t, testkit.KernelQueue(t, ln.Addr()), st.Queued)
		require.Positive(t, st.Queued)
		require.NoError(t, ln.SetDeadline(time.Now().Add(testkit.Patience)))
		for range st.Queued {
			c, err := ln.Accept()
			require.NoError(t, err)
			require.NoError(t, c.Close())
		}
		after, err := ln.Stats()
		require.NoError(t, err)
		require.Zero(t, after.Queued)
		require.Equal(t, st.Limit, after.Limit)

		require.NoError(t, ln.Close())
		goleak.VerifyNone(t, goroutines)
		require.Equal(t, descriptors, testkit.OpenDescriptors())
		grown := heapInUse() - heap
		t.Logf("%d descriptors before and after, the heap has grown by %d bytes", descriptors, grown)
		require.Less(t, grown, int64(heapSlack))
	})
}
