//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/endpoint"
	"github.com/acceptq/acceptq/internal/sockopt"
	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/testkit"
)

func TestRawIntOfAClosedSocket(t *testing.T) {
	ln := listen(t)
	require.NoError(t, ln.Close())
	_, err := endpoint.RawInt(ln.intake.Raw, func(int) (int, error) { panic("there is no descriptor") })
	require.ErrorIs(t, err, net.ErrClosed)
}

// Listeners of one process above the maximum of a group are an error, because the kernel
// would let them listen and assign no connections to them. The maximum is 3 here.
func TestGroupHasAMaximum(t *testing.T) {
	if !testkit.Spreads() {
		t.Skip("no groups here")
	}
	k := sys.Real
	k.Memory = new(sync.Map)
	sockopt.NewCensus(&k, 3)
	open := func(t *testing.T, address string, opts ...Option) *Listener {
		t.Helper()
		ln, err := listenWith(&k, t.Context(), "tcp4", address, append(opts, WithReusePort()))
		require.NoError(t, err)
		t.Cleanup(func() { ln.Close() })
		return ln
	}
	refuse := func(t *testing.T, address string) {
		t.Helper()
		before := testkit.OpenDescriptors()
		ln, err := listenWith(&k, t.Context(), "tcp4", address, []Option{WithReusePort()})
		require.Nil(t, ln)
		require.ErrorIs(t, err, errors.ErrUnsupported)
		testkit.RequireOp(t, err, "listen")
		require.Equal(t, before, testkit.OpenDescriptors())
	}
	for _, host := range []string{"127.0.0.1", ""} {
		t.Run("on "+host, func(t *testing.T) {
			first := open(t, net.JoinHostPort(host, "0"))
			_, port, err := net.SplitHostPort(first.Addr().String())
			require.NoError(t, err)
			address := net.JoinHostPort(host, port)
			_, err = listenWith(&k, t.Context(), "tcp4", address, []Option{WithReusePort(),
				WithControl(func(string, string, syscall.RawConn) error { return errors.ErrUnsupported })})
			require.Error(t, err, "it must not keep its place")
			second := open(t, address)
			open(t, address)
			refuse(t, address)
			open(t, net.JoinHostPort(host, "0")) // another address has a group of its own
			require.NoError(t, second.Close())
			open(t, address)
			refuse(t, address)
			require.NoError(t, first.TCPListener().Close(), "closed without a method of the Listener")
			open(t, address)
			refuse(t, address)
		})
	}
	s, err := listenShards(&k, t.Context(), "tcp4", "127.0.0.1:0", 4, []Option{WithReusePort()})
	require.Nil(t, s)
	require.ErrorIs(t, err, errors.ErrUnsupported)
}

// A meddler stands between the package and the kernel. It answers one system call itself
// instead of passing it to the kernel.
type meddler struct {
	mu    sync.Mutex
	armed bool           // whether it counts calls and answers one
	calls map[string]int // number of calls so far, by name
	name  string         // the name of the call to answer, and its number
	nth   int
	met   bool
}

// turn counts a call and reports whether it is the call to answer.
func (m *meddler) turn(name string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.armed {
		return false
	}
	m.calls[name]++
	if name != m.name || m.calls[name] != m.nth {
		return false
	}
	m.met = true
	return true
}

func (m *meddler) arm(on bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.armed = on
}

// An answer is a possible result of a call: an error, or a result that makes no sense.
type answer struct {
	err  error
	n    int
	text []byte
	rows [][]byte
	addr unix.Sockaddr
}

func (a answer) String() string {
	if a.err != nil {
		return a.err.Error()
	}
	return fmt.Sprintf("n %d, %d bytes, %d rows, %v", a.n, len(a.text), len(a.rows), a.addr)
}

// refusals returns the errors of a call's manual page, and EINTR.
func refusals(errnos ...unix.Errno) (all []answer) {
	for _, errno := range append(errnos, unix.EINTR) {
		all = append(all, answer{err: errno})
	}
	return all
}

func numbers(all ...int) (answers []answer) {
	for _, n := range all {
		answers = append(answers, answer{n: n})
	}
	return answers
}

// answersTo has all wrong answers to each call, by the name of the call in these tests.
func answersTo() map[string][]answer {
	all := map[string][]answer{
		"socket": refusals(unix.EACCES, unix.EPERM, unix.EAFNOSUPPORT, unix.EINVAL, unix.EMFILE, unix.ENFILE,
			unix.ENOBUFS, unix.ENOMEM, unix.EPROTONOSUPPORT),
		"setsockopt": refusals(unix.EBADF, unix.EFAULT, unix.EINVAL, unix.ENOPROTOOPT, unix.ENOTSOCK, unix.EPERM,
			unix.EACCES, unix.ENOBUFS, unix.ENOMEM, unix.EOPNOTSUPP, unix.EDOM),
		"getsockname": append(refusals(unix.EBADF, unix.EFAULT, unix.EINVAL, unix.ENOBUFS, unix.ENOTSOCK, unix.EAFNOSUPPORT),
			answer{addr: &unix.SockaddrUnix{Name: "x"}}, answer{addr: &unix.SockaddrInet4{}}, answer{addr: &unix.SockaddrInet6{ZoneId: 9}}),
		"bind": refusals(unix.EACCES, unix.EPERM, unix.EADDRINUSE, unix.EADDRNOTAVAIL, unix.EAFNOSUPPORT, unix.EBADF,
			unix.EFAULT, unix.EINVAL, unix.ENOBUFS, unix.ENOMEM, unix.ENOTSOCK),
		"listen": refusals(unix.EACCES, unix.EPERM, unix.EADDRINUSE, unix.EAGAIN, unix.EBADF, unix.EDESTADDRREQ,
			unix.EINVAL, unix.ENOBUFS, unix.ENOTSOCK, unix.EOPNOTSUPP),
	}
	all["getsockopt"] = append(refusals(unix.EBADF, unix.EFAULT, unix.EINVAL, unix.ENOBUFS, unix.ENOMEM, unix.ENOPROTOOPT, unix.ENOTSOCK,
		unix.EPERM, unix.EOPNOTSUPP), numbers(-1, 0, 1, math.MaxInt32, math.MinInt32)...)
	all["getsockopt, if it tells"] = all["getsockopt"]
	for _, errno := range []unix.Errno{unix.EBADF, unix.EINVAL, unix.EMFILE, unix.EINTR} { // errors of fcntl, which net calls
		all["fcntl"] = append(all["fcntl"], answer{err: &net.OpError{Op: "file", Net: "file+net", Err: os.NewSyscallError("fcntl", errno)}})
	}
	kernelAnswers(all)
	return all
}

// kernel returns base with m in front of each of its calls.
func (m *meddler) kernel(base sys.Calls, meddle func() answer) *sys.Calls {
	k := base
	k.Memory = new(sync.Map) // so that net is asked again
	k.Socket = func(domain int) (int, error) {
		if m.turn("socket") {
			return -1, meddle().err
		}
		return base.Socket(domain)
	}
	k.SetsockoptInt = func(fd, level, name, value int) error {
		if m.turn("setsockopt") {
			return meddle().err
		}
		return base.SetsockoptInt(fd, level, name, value)
	}
	k.GetsockoptInt = func(fd, level, name int) (int, error) {
		call := "getsockopt"
		if optional(level, name) {
			call = "getsockopt, if it tells"
		}
		if m.turn(call) {
			return meddle().n, meddle().err
		}
		return base.GetsockoptInt(fd, level, name)
	}
	k.Getsockname = func(fd int) (unix.Sockaddr, error) {
		if m.turn("getsockname") {
			return meddle().addr, meddle().err
		}
		return base.Getsockname(fd)
	}
	k.Bind = func(fd int, sa unix.Sockaddr) error {
		if m.turn("bind") {
			return meddle().err
		}
		return base.Bind(fd, sa)
	}
	k.Listen = func(fd, backlog int) error {
		if m.turn("listen") {
			return meddle().err
		}
		return base.Listen(fd, backlog)
	}
	k.Adopt = func(f *os.File) (net.Listener, error) {
		if m.turn("fcntl") {
			return nil, meddle().err
		}
		return base.Adopt(f)
	}
	m.ownCalls(&k, base, meddle)
	return &k
}

// The meddler must cover every call of kernel. The test fails if a new call is forgotten.
func TestMeddlerCoversEachCall(t *testing.T) {
	var same func(path string, a, b reflect.Value)
	calls := 0
	same = func(path string, a, b reflect.Value) {
		for i := range a.NumField() {
			name := path + a.Type().Field(i).Name
			if a.Field(i).Kind() == reflect.Struct {
				same(name+".", a.Field(i), b.Field(i))
				continue
			}
			if a.Field(i).Kind() != reflect.Func {
				continue
			}
			calls++
			require.NotEqual(t, a.Field(i).Pointer(), b.Field(i).Pointer(), name)
		}
	}
	k := new(meddler).kernel(sys.Real, func() answer { return answer{} })
	same("", reflect.ValueOf(sys.Real), reflect.ValueOf(*k))
	require.Greater(t, calls, 8)
}

// An act is an operation of a user, on a system on which one call fails.
type act struct {
	name string
	op   string // of the OpError
	base sys.Calls
	// begin makes the preparations. It returns the operation, and a check that must hold
	// after it whether it has failed or not.
	begin func(t *testing.T, k *sys.Calls) (do func() error, after func(err error) error)
	// If one of these calls fails, the operation must return an error that names the
	// call. A failure of any other call must have no effect.
	fatal []string
}

// testActs lets each call of each act fail in turn, with every wrong answer, and logs the
// number of faults.
func testActs(t *testing.T, acts []act) {
	wrong := answersTo()
	var faults, survived int
	for _, a := range acts {
		t.Run(a.name, func(t *testing.T) {
			counting := meddler{calls: map[string]int{}}
			k := counting.kernel(a.base, func() answer { return answer{} })
			if err := a.try(t, &counting, k, nil); err != nil {
				t.Fatalf("without a fault: %v", err)
			}
			for _, name := range slices.Sorted(maps.Keys(counting.calls)) {
				require.NotEmpty(t, wrong[name], name)
				had, did := faults, survived
				for nth := 1; nth <= counting.calls[name]; nth++ {
					for i, w := range wrong[name] {
						if testkit.Factor() < 5 && (i+nth)%3 != 0 {
							continue // a third of the answers to each call, unless all are asked for
						}
						m := &meddler{calls: map[string]int{}, name: name, nth: nth}
						err := a.try(t, m, m.kernel(a.base, func() answer { return w }), &w)
						if !m.met && nth > 1 && err == nil {
							continue // the number of looks of a drain varies
						}
						faults++
						if err != nil {
							t.Errorf("%s %d, %v: %v", name, nth, w, err)
							continue
						}
						survived++
					}
				}
				t.Logf("%-24s %3d calls x %2d answers: %4d faults, %4d survived",
					name, counting.calls[name], len(wrong[name]), faults-had, survived-did)
			}
		})
	}
	t.Logf("%d faults, %d survived", faults, survived)
	require.Equal(t, faults, survived)
	require.NotZero(t, faults)
}

// try runs an act once, and returns an error that says what does not hold.
func (a act) try(t *testing.T, m *meddler, k *sys.Calls, w *answer) (failure error) {
	goroutines, descriptor := runtime.NumGoroutine(), testkit.FreeDescriptor()
	do, after := a.begin(t, k)
	m.arm(true)
	panicked, err := caught(do)
	m.arm(false)
	if panicked != nil {
		return fmt.Errorf("panic: %v", panicked)
	}
	switch {
	case w == nil && err != nil && a.op != "": // a drain that cannot end returns an error
		if drained := new(DrainError); !errors.As(err, &drained) {
			return err
		}
	case w != nil && m.met:
		failure = a.shape(err, m.name, w)
	case w != nil && m.nth == 1:
		failure = errors.New("the call did not come")
	}
	if err := after(err); err != nil && failure == nil {
		failure = fmt.Errorf("afterwards: %w", err)
	}
	if failure == nil && !testkit.Eventually(func() bool { return runtime.NumGoroutine() <= goroutines }) {
		failure = errors.New("a goroutine is left")
	}
	if failure == nil && testkit.FreeDescriptor() != descriptor {
		failure = fmt.Errorf("descriptor %d was the next one, now it is %d", descriptor, testkit.FreeDescriptor())
	}
	return failure
}

func caught(do func() error) (panicked any, err error) {
	defer func() { panicked = recover() }()
	return nil, do()
}

// shape checks the error of an act in which a call was answered by w. It returns an error
// that says what is wrong with it.
func (a act) shape(err error, call string, w *answer) error {
	fatal := slices.Contains(a.fatal, call) && w.err != nil
	var drained *DrainError
	switch {
	case err == nil && fatal:
		return errors.New("no error")
	case err == nil:
		return nil
	case errors.As(err, &drained):
		if !errors.Is(err, context.DeadlineExceeded) {
			return fmt.Errorf("not the error of ctx: %w", err)
		}
		return nil
	}
	op, ok := err.(*net.OpError)
	if !ok || op.Op != a.op {
		return fmt.Errorf("%T: %w", err, err)
	}
	if errors.Is(err, ErrStillOpen) { // returned by a drain that could not keep new clients out
		return nil
	}
	if w.err == nil { // a wrong result may be detected
		return nil
	}
	if !fatal && errors.Is(err, errors.ErrUnsupported) { // the value cannot be known
		return nil
	}
	if runtime.GOOS == "dragonfly" && errors.Is(w.err, unix.EINVAL) && errors.Is(err, sys.ErrNotListening) {
		return nil // EINVAL is the answer for a socket that does not listen
	}
	var errno, want unix.Errno
	errors.As(w.err, &want)
	if !errors.As(err, &errno) || errno != want {
		return fmt.Errorf("not %v: %w", want, err)
	}
	if !fatal {
		return fmt.Errorf("the fault should have no effect: %w", err)
	}
	var sysErr *os.SyscallError
	name, _, _ := strings.Cut(call, ",") // the label of a call can have more than its name
	if !errors.As(err, &sysErr) || !strings.HasPrefix(sysErr.Syscall, name) {
		return fmt.Errorf("not of %s: %w", name, err)
	}
	return nil
}

// everyOption returns all options that can be combined on an address of network. The number
// of their system calls depends on the system.
func everyOption(network string) (opts []Option) {
	opts = []Option{
		WithBacklog(7), WithReceiveBuffer(50_000), WithSendBuffer(60_000),
		WithControl(func(_, _ string, c syscall.RawConn) error { return c.Control(func(uintptr) {}) }),
	}
	if _, err := sockopt.ReusePort(); err == nil && (runtime.GOOS != "dragonfly" || network == "tcp4") {
		opts = append(opts, WithReusePort())
	}
	return append(opts, kernelOptions()...)
}

var listeningCalls = []string{"socket", "setsockopt", "getsockopt", "getsockname", "bind", "listen", "fcntl"}

// listening returns an act that opens something at an address, and closes it.
func listening(name, address string, listen func(t *testing.T, k *sys.Calls) (io.Closer, error)) act {
	return act{
		name: name, op: "listen", base: willing(), fatal: listeningCalls,
		begin: func(t *testing.T, k *sys.Calls) (func() error, func(error) error) {
			var made io.Closer
			do := func() (err error) {
				made, err = listen(t, k)
				return err
			}
			return do, func(err error) error {
				if err == nil {
					if err := made.Close(); err != nil {
						return err
					}
				}
				return testkit.FreeNow(address)
			}
		},
	}
}

// A queueHolder is a listener with queued clients. They must stay queued.
type queueHolder struct {
	ln      *Listener
	clients []net.Conn
}

func holdQueue(t *testing.T, k *sys.Calls, n int, opts ...Option) *queueHolder {
	t.Helper()
	ln, err := listenWith(k, t.Context(), "tcp", "127.0.0.1:0", append([]Option{WithBacklog(8)}, opts...))
	require.NoError(t, err)
	h := &queueHolder{ln: ln}
	for range n {
		c, err := net.DialTimeout("tcp", ln.Addr().String(), testkit.Patience)
		require.NoError(t, err)
		h.clients = append(h.clients, c)
	}
	return h
}

// close first accepts the clients: each must still be queued and its data must arrive.
func (h *queueHolder) close() error {
	defer h.ln.Close()
	for _, c := range h.clients {
		defer c.Close()
		c.SetDeadline(time.Now().Add(testkit.Patience))
		if err := errors.Join(h.ln.SetDeadline(time.Now().Add(testkit.Patience)), takesOne(h.ln)); err != nil {
			return err
		}
		if _, err := io.ReadFull(c, make([]byte, 2)); err != nil {
			return err
		}
	}
	return nil
}

// takesOne accepts and serves one client of ln.
func takesOne(ln net.Listener) error {
	c, err := ln.Accept()
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Write([]byte("ok"))
	return err
}

// on returns an act on a listener with queued clients.
func on(name, op string, fatal []string, do func(t *testing.T, k *sys.Calls, ln *Listener) error) act {
	return act{
		name: name, op: op, base: sys.Real, fatal: fatal,
		begin: func(t *testing.T, k *sys.Calls) (func() error, func(error) error) {
			h := holdQueue(t, k, 2)
			return func() error { return do(t, k, h.ln) }, func(error) error { return h.close() }
		},
	}
}

// Each system call of the package fails in turn, with every error of its manual page
// and with some wrong results. Either the operation returns an error that names the
// call, or the fault has no effect. No descriptor may leak, and no client may be lost.
func TestEverySystemCallFails(t *testing.T) {
	var acts []act
	for _, where := range []struct{ network, host string }{{"tcp", "127.0.0.1"}, {"tcp", "::1"}, {"tcp6", ""}} {
		address := testkit.AFreeAddress(where.network, where.host)
		if address == "" {
			t.Logf("%s %q: net cannot listen here", where.network, where.host)
			continue
		}
		if where.host == "" {
			_, port, err := net.SplitHostPort(address)
			require.NoError(t, err)
			address = ":" + port // net decides which addresses this means
		}
		family := "tcp6"
		if where.host == "127.0.0.1" {
			family = "tcp4"
		}
		for name, opts := range map[string][]Option{"": nil, ", every option": everyOption(family), ", strict": {WithBacklog(7), WithStrictBacklog()}} {
			if family == "tcp6" && testing.Short() {
				continue
			}
			acts = append(acts, listening("listening on "+where.network+" "+where.host+name, address, func(t *testing.T, k *sys.Calls) (io.Closer, error) {
				ln, err := listenWith(k, t.Context(), where.network, address, opts)
				if err != nil {
					if ln != nil {
						return nil, errors.New("an error and a Listener")
					}
					return nil, err
				}
				return ln, nil
			}))
		}
	}
	if _, err := sockopt.ReusePort(); err == nil {
		address := testkit.AFreeAddress("tcp", "127.0.0.1")
		for name, opts := range map[string][]Option{"": nil, ", not alone": {WithReusePort()}} {
			if name != "" && testing.Short() {
				continue
			}
			acts = append(acts, listening("three shards"+name, address, func(t *testing.T, k *sys.Calls) (io.Closer, error) {
				s, err := listenShards(k, t.Context(), "tcp", address, 3, opts)
				if err != nil {
					if s != nil {
						return nil, errors.New("an error and Shards")
					}
					return nil, err
				}
				return s, nil
			}))
		}
	}
	acts = append(acts,
		on("Stats", "stats", statsCalls, func(t *testing.T, _ *sys.Calls, ln *Listener) error {
			_, err := ln.Stats()
			return err
		}),
		on("Wrap", "wrap", []string{"getsockopt", "getsockname"}, func(t *testing.T, k *sys.Calls, ln *Listener) error {
			_, err := wrap(k, ln.TCPListener())
			return err
		}),
		on("SetBacklog", "listen", []string{"listen"}, func(t *testing.T, _ *sys.Calls, ln *Listener) error {
			before := ln.Backlog().Limit
			b, err := ln.SetBacklog(9)
			if err != nil && b.Limit != before {
				return fmt.Errorf("SetBacklog failed, but the limit is %d", b.Limit)
			}
			return err
		}),
		on("strict SetBacklog", "listen", []string{"listen"}, func(t *testing.T, k *sys.Calls, ln *Listener) error {
			ln.strict = true
			_, err := ln.SetBacklog(9)
			return err
		}),
		on("Backlog, and the numbers of the system", "", nil, func(t *testing.T, k *sys.Calls, ln *Listener) error {
			if b := ln.Backlog(); b.Ceiling < unknown {
				return fmt.Errorf("ceiling %d", b.Ceiling)
			}
			predict(k, 5) // its error comes from reading the ceiling
			if _, err := readSystem(k); !errors.Is(err, unix.EMFILE) && !errors.Is(err, unix.ENFILE) {
				return err
			}
			return nil // without a descriptor it says so
		}),
	)
	testActs(t, append(acts, kernelActs()...))
}

// Package net ignores an unknown zone if the kernel does not check it. acceptq returns an
// error instead, so that no listener has an unintended address.
func TestUnknownZoneIsAnError(t *testing.T) {
	ln, err := net.Listen("tcp", "[::1%nosuch]:0")
	if err != nil {
		t.Skipf("net cannot listen here: %v", err)
	}
	require.NoError(t, ln.Close())
	for _, address := range []string{"[::1%nosuch]:0", "[2001:db8::1%nosuch]:0"} {
		err := testkit.Refused(t, func() (*Listener, error) { return ListenTCP(address) })
		var addrErr *net.AddrError
		require.ErrorAs(t, err, &addrErr)
		require.Equal(t, address, addrErr.Addr)
	}
}

func TestControlThatDoesNotReturnLeavesNothing(t *testing.T) {
	descriptors := testkit.OpenDescriptors()
	var bound string
	k := sys.Real
	k.Bind = noteBound(t, &bound)
	leave := func(how func()) {
		done := make(chan any)
		go func() {
			defer func() { done <- recover() }()
			_, _ = listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{
				WithControl(func(_, _ string, c syscall.RawConn) error {
					return c.Control(func(uintptr) { how() })
				}),
			})
		}()
		<-done
	}
	leave(func() { panic("the hook's own") })
	leave(runtime.Goexit)
	require.Empty(t, bound)
	require.Equal(t, descriptors, testkit.OpenDescriptors())
}

func TestControlCannotKeepTheSocket(t *testing.T) {
	var kept syscall.RawConn
	ln, err := ListenTCP("127.0.0.1:0", WithControl(func(_, _ string, c syscall.RawConn) error {
		kept = c
		return nil
	}))
	require.NoError(t, err)
	defer ln.Close()
	require.Error(t, kept.Control(func(uintptr) { t.Error("called on a closed file") }))
}

// listen opens a listener that is closed when the test ends.
func listen(t *testing.T, opts ...Option) *Listener {
	t.Helper()
	ln, err := ListenTCP("127.0.0.1:0", opts...)
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln
}

// noteBound binds and records the address.
func noteBound(t *testing.T, bound *string) func(fd int, sa unix.Sockaddr) error {
	return func(fd int, sa unix.Sockaddr) error {
		if err := sys.Real.Bind(fd, sa); err != nil {
			return err
		}
		sa, err := unix.Getsockname(fd)
		require.NoError(t, err)
		switch sa := sa.(type) {
		case *unix.SockaddrInet4:
			*bound = (&net.TCPAddr{IP: sa.Addr[:], Port: sa.Port}).String()
		case *unix.SockaddrInet6:
			*bound = (&net.TCPAddr{IP: sa.Addr[:], Port: sa.Port}).String()
		}
		return nil
	}
}

// If a WithControl function fails or panics, nothing is left behind, and later ones are not
// called.
func TestControlFails(t *testing.T) {
	before := testkit.OpenDescriptors()
	for name, fail := range map[string]func() error{
		"error": func() error { return endpoint.ErrNoted },
		"panic": func() error { panic(endpoint.ErrNoted) },
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if r := recover(); r != nil {
					require.Equal(t, endpoint.ErrNoted, r)
				}
				require.Equal(t, before, testkit.OpenDescriptors())
			}()
			called := 0
			hook := func(next func() error) Option {
				return WithControl(func(string, string, syscall.RawConn) error {
					called++
					return next()
				})
			}
			ok := func() error { return nil }
			ln, err := ListenTCP("127.0.0.1:0", hook(ok), hook(fail), hook(ok))
			require.ErrorIs(t, err, endpoint.ErrNoted)
			require.Nil(t, ln)
			require.Equal(t, 2, called)
		})
	}
}

// Keep-alive values are checked on a socket of the same family as the listener, because
// a host may have no other family.
func TestKeepAliveNeedsNoOtherFamily(t *testing.T) {
	if _, timed := sockopt.KeepAliveNames(); !timed {
		t.Skip("this system checks no values")
	}
	for host, family := range map[string]int{"127.0.0.1": unix.AF_INET, "::1": unix.AF_INET6} {
		if testkit.AFreeAddress("tcp", host) == "" {
			continue
		}
		k := sys.Real
		k.Socket = func(domain int) (int, error) {
			if domain != family {
				return -1, unix.EAFNOSUPPORT
			}
			return sys.Real.Socket(domain)
		}
		ln, err := listenWith(&k, t.Context(), "tcp", net.JoinHostPort(host, "0"), []Option{
			WithKeepAlive(net.KeepAliveConfig{Enable: true, Idle: time.Minute}),
		})
		require.NoError(t, err)
		require.NoError(t, ln.Close())
	}
}

// A negative field stands for the system's own value. It is an error if the kernel does not
// report that value, as can happen on NetBSD.
func TestKeepAliveValueThatCannotBeRead(t *testing.T) {
	names, timed := sockopt.KeepAliveNames()
	if !timed {
		t.Skip("this system reads no value")
	}
	k := sys.Real
	k.GetsockoptInt = func(fd, level, name int) (int, error) {
		if level == unix.IPPROTO_TCP && slices.Contains(names[:], name) {
			return 0, unix.ENOPROTOOPT
		}
		return sys.Real.GetsockoptInt(fd, level, name)
	}
	for _, config := range []net.KeepAliveConfig{{Enable: true, Idle: -1}, {Enable: true, Interval: -1}, {Enable: true, Count: -1}} {
		err := testkit.Refused(t, func() (*Listener, error) {
			return listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{WithKeepAlive(config)})
		})
		require.ErrorIs(t, err, errors.ErrUnsupported)
		require.ErrorIs(t, err, unix.ENOPROTOOPT)
	}
	ln, err := listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{WithKeepAlive(net.KeepAliveConfig{Enable: true, Idle: time.Minute})})
	require.NoError(t, err)
	require.NoError(t, ln.Close())
}

// If the kernel refuses a buffer that is too large, as on the BSDs, the error is the
// same as for a clamped buffer.
func TestBufferThatTheKernelRefuses(t *testing.T) {
	k := sys.Real
	k.SetsockoptInt = func(fd, level, name, value int) error {
		if level == unix.SOL_SOCKET && (name == unix.SO_RCVBUF || name == unix.SO_SNDBUF) {
			return unix.ENOBUFS
		}
		return sys.Real.SetsockoptInt(fd, level, name, value)
	}
	for _, opt := range []Option{WithReceiveBuffer(8192), WithSendBuffer(8192)} {
		err := testkit.Refused(t, func() (*Listener, error) { return listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{opt}) })
		require.ErrorIs(t, err, errors.ErrUnsupported)
		require.ErrorIs(t, err, unix.ENOBUFS)
	}
}

// If the system's own keep-alive value is so short that net would treat it as "not given",
// listening fails. It does not silently use the default of net.
func TestKeepAliveTooShortToSetAgain(t *testing.T) {
	if _, timed := sockopt.KeepAliveNames(); !timed {
		t.Skip("this system has no times of keep-alive")
	}
	k := sys.Real
	k.GetsockoptInt = func(int, int, int) (int, error) { return 0, nil }
	for _, config := range []net.KeepAliveConfig{
		{Enable: true, Idle: -1}, {Enable: true, Interval: -1}, {Enable: true, Count: -1},
	} {
		_, err := sockopt.TryKeepAlive(&k, endpoint.Endpoint{Network: "tcp4"}, &config)
		require.ErrorIs(t, err, errors.ErrUnsupported, "%+v", config)
		require.ErrorContains(t, err, "WithKeepAlive")
	}
}

func TestCappedLength(t *testing.T) {
	for _, row := range []struct{ n, most, want int }{
		{0, 32, 0}, {1, 32, 1}, {31, 32, 31}, {32, 32, unknown}, {33, 32, unknown},
		{0, 0, 0}, {500, 0, 500}, {500, -1, 500}, {500, math.MaxInt32, 500}, {0, 1, 0}, {1, 1, unknown},
	} {
		require.Equal(t, row.want, cappedLength(row.n, row.most), "%+v", row)
	}
	require.NotContains(t, Stats{Queued: cappedLength(32, 32), Capacity: 129}.String(), "%", "no part of an unknown length")
}

// What the error of WithFastOpen advises must work.
func TestFastOpenFits(t *testing.T) {
	for _, row := range []struct {
		goos                 string
		qlen, limit, ceiling int
		advice               string // "" if qlen fits
	}{
		{"freebsd", 5, 10, 128, ""}, {"freebsd", 5, 11, 128, ""},
		{"freebsd", 0, 0, 128, ""}, {"freebsd", 5, unknown, 128, ""}, {"linux", 5, 4, 128, ""},
		{"freebsd", 5, 9, 128, "ask for a backlog of 10: "}, {"freebsd", 64, 4, 128, "ask for a backlog of 128: "},
		{"freebsd", 65, 128, 128, "raise the ceiling, sysctl kern.ipc.soacceptqueue=130, and ask for a backlog of 130"},
		{"freebsd", 65, 128, unknown, "raise the ceiling, sysctl kern.ipc.soacceptqueue=130, and ask for a backlog of 130"},
		{"freebsd", math.MaxUint32/3/2 + 1, 128, 128, "this kernel never grants more than 715827882"},
		{"freebsd", math.MaxInt32, 128, 128, "this kernel never grants more than 715827882"},
		{"freebsd", math.MaxInt, 128, 128, "this kernel never grants more than 715827882"},
	} {
		err := fastOpenFits(row.goos, row.qlen, row.limit, func() (int, int, error) {
			if row.ceiling == unknown {
				return unknown, unknown, errors.New("unreadable")
			}
			return row.ceiling, 0, nil
		})
		if row.advice == "" {
			require.NoError(t, err, "%+v", row)
			continue
		}
		require.ErrorIs(t, err, errors.ErrUnsupported, "%+v", row)
		require.ErrorContains(t, err, fmt.Sprintf("WithFastOpen(%d): granted %d", row.qlen, row.limit/2))
		require.ErrorContains(t, err, row.advice)
	}
}

// If listen(2) fails in SetBacklog, Backlog still reports the former limit.
func TestFailedSetBacklogKeepsTheBacklog(t *testing.T) {
	k := sys.Real
	calls := 0
	k.Listen = func(fd, backlog int) error {
		if calls++; calls > 1 {
			return unix.EAGAIN // FreeBSD 14: another thread is in a call on the socket
		}
		return sys.Real.Listen(fd, backlog)
	}
	ln, err := listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(2)})
	require.NoError(t, err)
	defer ln.Close()
	before := ln.Backlog()

	account, err := ln.SetBacklog(3)
	require.ErrorIs(t, err, unix.EAGAIN)
	require.Equal(t, before, account)
	require.Equal(t, before, ln.Backlog())
	require.Equal(t, before.Effective, ln.EffectiveBacklog())
}

// Two calls of SetBacklog run one after the other. Otherwise Backlog could mix the
// request of one with the limit of the other. The test blocks the first in listen(2)
// until the second waits for the lock or, if there is no lock, is in listen(2) too.
func TestSetBacklogOneAtATime(t *testing.T) {
	k := sys.Real
	ln, err := listenWith(&k, t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(2)})
	require.NoError(t, err)
	defer ln.Close()

	var inside, most atomic.Int32
	var second sync.WaitGroup
	var once sync.Once
	k.Listen = func(fd, backlog int) error {
		most.Store(max(most.Load(), inside.Add(1)))
		defer inside.Add(-1)
		once.Do(func() {
			second.Go(func() { ln.SetBacklog(5) })
			require.True(t, testkit.Eventually(func() bool { return inside.Load() > 1 || waitsForResize() }))
		})
		return sys.Real.Listen(fd, backlog)
	}
	b, err := ln.SetBacklog(4)
	require.NoError(t, err)
	require.Equal(t, 4, b.Requested)
	second.Wait()
	require.EqualValues(t, 1, most.Load(), "calls of listen(2) at a time")
	b = ln.Backlog()
	require.Equal(t, 5, b.Requested)
	require.True(t, b.Limit >= 5 || b.Limit == unknown, "%v", b)
}

// waitsForResize reports whether a goroutine waits for a lock in SetBacklog.
func waitsForResize() bool {
	stacks := make([]byte, 1<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	for g := range bytes.SplitSeq(stacks, []byte("\n\n")) {
		if bytes.Contains(g, []byte("[sync.Mutex.Lock")) && bytes.Contains(g, []byte("(*Listener).SetBacklog(")) {
			return true
		}
	}
	return false
}

// DragonFly has no SO_ACCEPTCONN. SO_ACCEPTFILTER tells there which sockets listen. On other
// systems this test answers like DragonFly's kernel.
func TestSocketsThatDoNotListen(t *testing.T) {
	k := sys.Real
	if runtime.GOOS != "dragonfly" {
		k.GetsockoptInt = func(fd, level, name int) (int, error) {
			require.Equal(t, sockopt.SoAcceptFilter, name)
			if n, err := sys.Real.GetsockoptInt(fd, level, unix.SO_ACCEPTCONN); err != nil || n != 0 {
				return 0, err
			}
			return 0, unix.EINVAL
		}
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	client := testkit.Connect(t, "tcp", ln.Addr().String())
	server, err := ln.Accept()
	require.NoError(t, err)
	defer server.Close()
	reset := testkit.Connect(t, "tcp", ln.Addr().String())
	resetter, err := ln.Accept()
	require.NoError(t, err)
	require.NoError(t, resetter.(*net.TCPConn).SetLinger(0))
	require.NoError(t, resetter.Close())
	reset.SetReadDeadline(time.Now().Add(testkit.Patience))
	_, err = reset.Read(make([]byte, 1))
	require.ErrorIs(t, err, syscall.ECONNRESET)
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	defer udp.Close()
	local, err := net.Listen("unix", filepath.Join(t.TempDir(), "socket"))
	require.NoError(t, err)
	defer local.Close()
	bound, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	require.NoError(t, err)
	defer unix.Close(bound)
	require.NoError(t, unix.Bind(bound, &unix.SockaddrInet4{Addr: [...]byte{127, 0, 0, 1}}))

	look := func(c any) (yes bool) {
		raw, err := c.(syscall.Conn).SyscallConn()
		require.NoError(t, err)
		var operr error
		require.NoError(t, raw.Control(func(fd uintptr) { yes, operr = hasFilterOption(&k, int(fd)) }))
		require.NoError(t, operr)
		return yes
	}
	require.True(t, look(ln))
	for name, c := range map[string]any{
		"the client's end": client, "the server's end": server, "a reset connection": reset, "a UDP socket": udp,
	} {
		require.False(t, look(c), name)
		_, err := ReadStats(c.(syscall.Conn))
		require.ErrorIs(t, err, sys.ErrNotListening, name)
	}
	yes, err := hasFilterOption(&k, bound)
	require.NoError(t, err)
	require.False(t, yes, "a socket that is only bound")
	require.ErrorIs(t, mustListen(&sys.Real, bound), sys.ErrNotListening)
	_, err = ReadStats(local.(syscall.Conn))
	require.ErrorIs(t, err, sys.ErrNotListening, "a unix listener")

	k.GetsockoptInt = func(int, int, int) (int, error) { return 0, unix.ENOBUFS }
	_, err = hasFilterOption(&k, bound)
	require.ErrorIs(t, err, unix.ENOBUFS)
	require.ErrorContains(t, err, "getsockopt")
}
