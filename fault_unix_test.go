//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"os"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

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
func (m *meddler) kernel(base kernel, meddle func() answer) *kernel {
	k := base
	k.memory = new(sync.Map) // so that net is asked again
	k.socket = func(domain int) (int, error) {
		if m.turn("socket") {
			return -1, meddle().err
		}
		return base.socket(domain)
	}
	k.setsockoptInt = func(fd, level, name, value int) error {
		if m.turn("setsockopt") {
			return meddle().err
		}
		return base.setsockoptInt(fd, level, name, value)
	}
	k.getsockoptInt = func(fd, level, name int) (int, error) {
		call := "getsockopt"
		if optional(level, name) {
			call = "getsockopt, if it tells"
		}
		if m.turn(call) {
			return meddle().n, meddle().err
		}
		return base.getsockoptInt(fd, level, name)
	}
	k.getsockname = func(fd int) (unix.Sockaddr, error) {
		if m.turn("getsockname") {
			return meddle().addr, meddle().err
		}
		return base.getsockname(fd)
	}
	k.bind = func(fd int, sa unix.Sockaddr) error {
		if m.turn("bind") {
			return meddle().err
		}
		return base.bind(fd, sa)
	}
	k.listenCall = func(fd, backlog int) error {
		if m.turn("listen") {
			return meddle().err
		}
		return base.listenCall(fd, backlog)
	}
	k.adopt = func(f *os.File) (net.Listener, error) {
		if m.turn("fcntl") {
			return nil, meddle().err
		}
		return base.adopt(f)
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
	k := new(meddler).kernel(realKernel, func() answer { return answer{} })
	same("", reflect.ValueOf(realKernel), reflect.ValueOf(*k))
	require.Greater(t, calls, 8)
}

// An act is an operation of a user, on a system on which one call fails.
type act struct {
	name string
	op   string // of the OpError
	base kernel
	// begin makes the preparations. It returns the operation, and a check that must hold
	// after it whether it has failed or not.
	begin func(t *testing.T, k *kernel) (do func() error, after func(err error) error)
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
					for _, w := range wrong[name] {
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
func (a act) try(t *testing.T, m *meddler, k *kernel, w *answer) (failure error) {
	goroutines, descriptor := runtime.NumGoroutine(), freeDescriptor()
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
	if failure == nil && !eventually(func() bool { return runtime.NumGoroutine() <= goroutines }) {
		failure = errors.New("a goroutine is left")
	}
	if failure == nil && freeDescriptor() != descriptor {
		failure = fmt.Errorf("descriptor %d was the next one, now it is %d", descriptor, freeDescriptor())
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
	if runtime.GOOS == "dragonfly" && errors.Is(w.err, unix.EINVAL) && errors.Is(err, errNotListening) {
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
	if _, err := reusePort(); err == nil && (runtime.GOOS != "dragonfly" || network == "tcp4") {
		opts = append(opts, WithReusePort())
	}
	return append(opts, kernelOptions()...)
}

var listeningCalls = []string{"socket", "setsockopt", "getsockopt", "getsockname", "bind", "listen", "fcntl"}

// listening returns an act that opens something at an address, and closes it.
func listening(name, address string, listen func(t *testing.T, k *kernel) (io.Closer, error)) act {
	return act{
		name: name, op: "listen", base: willing(), fatal: listeningCalls,
		begin: func(t *testing.T, k *kernel) (func() error, func(error) error) {
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
				return freeNow(address)
			}
		},
	}
}

// A queueHolder is a listener with queued clients. They must stay queued.
type queueHolder struct {
	ln      *Listener
	clients []net.Conn
}

func holdQueue(t *testing.T, k *kernel, n int, opts ...Option) *queueHolder {
	t.Helper()
	ln, err := k.listenWith(t.Context(), "tcp", "127.0.0.1:0", append([]Option{WithBacklog(8)}, opts...))
	require.NoError(t, err)
	h := &queueHolder{ln: ln}
	for range n {
		c, err := net.DialTimeout("tcp", ln.Addr().String(), patience)
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
		c.SetDeadline(time.Now().Add(patience))
		if err := errors.Join(h.ln.SetDeadline(time.Now().Add(patience)), takesOne(h.ln)); err != nil {
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
func on(name, op string, fatal []string, do func(t *testing.T, k *kernel, ln *Listener) error) act {
	return act{
		name: name, op: op, base: realKernel, fatal: fatal,
		begin: func(t *testing.T, k *kernel) (func() error, func(error) error) {
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
		address := aFreeAddress(where.network, where.host)
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
			acts = append(acts, listening("listening on "+where.network+" "+where.host+name, address, func(t *testing.T, k *kernel) (io.Closer, error) {
				ln, err := k.listenWith(t.Context(), where.network, address, opts)
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
	if _, err := reusePort(); err == nil {
		address := aFreeAddress("tcp", "127.0.0.1")
		for name, opts := range map[string][]Option{"": nil, ", not alone": {WithReusePort()}} {
			if name != "" && testing.Short() {
				continue
			}
			acts = append(acts, listening("three shards"+name, address, func(t *testing.T, k *kernel) (io.Closer, error) {
				s, err := k.shards(t.Context(), "tcp", address, 3, opts)
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
		on("Stats", "stats", statsCalls, func(t *testing.T, _ *kernel, ln *Listener) error {
			_, err := ln.Stats()
			return err
		}),
		on("Wrap", "wrap", []string{"getsockopt", "getsockname"}, func(t *testing.T, k *kernel, ln *Listener) error {
			_, err := k.wrap(ln.TCPListener())
			return err
		}),
		on("SetBacklog", "listen", []string{"listen"}, func(t *testing.T, _ *kernel, ln *Listener) error {
			before := ln.Backlog().Limit
			b, err := ln.SetBacklog(9)
			if err != nil && b.Limit != before {
				return fmt.Errorf("SetBacklog failed, but the limit is %d", b.Limit)
			}
			return err
		}),
		on("strict SetBacklog", "listen", []string{"listen"}, func(t *testing.T, k *kernel, ln *Listener) error {
			ln.strict = true
			_, err := ln.SetBacklog(9)
			return err
		}),
		on("Backlog, and the numbers of the system", "", nil, func(t *testing.T, k *kernel, ln *Listener) error {
			if b := ln.Backlog(); b.Ceiling < unknown {
				return fmt.Errorf("ceiling %d", b.Ceiling)
			}
			k.predict(5) // its error comes from reading the ceiling
			_, err := k.readSystem()
			return err
		}),
	)
	testActs(t, append(acts, kernelActs()...))
}

// requireLayers requires that err is an OpError with the network and an address, which
// wraps a SyscallError of the call, which wraps an errno.
func requireLayers(t *testing.T, err error, network, call string) {
	t.Helper()
	op, ok := err.(*net.OpError)
	require.True(t, ok, "%T", err)
	require.Equal(t, network, op.Net)
	require.NotNil(t, op.Addr)
	sysErr, ok := op.Err.(*os.SyscallError)
	require.True(t, ok, "%T", op.Err)
	require.Equal(t, call, sysErr.Syscall)
	require.IsType(t, unix.Errno(0), sysErr.Err)
}

func TestErrorsMatchTheKernelsErrno(t *testing.T) {
	holder := ourMaker.open(t, "tcp", "127.0.0.1:0")
	err := refused(t, func() (*Listener, error) { return ListenTCP(holder.Addr().String()) })
	require.ErrorIs(t, err, syscall.EADDRINUSE)
	requireLayers(t, err, "tcp", "bind")

	err = refused(t, func() (*Listener, error) { return ListenTCP("192.0.2.1:0") })
	require.ErrorIs(t, err, syscall.EADDRNOTAVAIL)
	requireLayers(t, err, "tcp", "bind")
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
		err := refused(t, func() (*Listener, error) { return ListenTCP(address) })
		var addrErr *net.AddrError
		require.ErrorAs(t, err, &addrErr)
		require.Equal(t, address, addrErr.Addr)
	}
}

func TestControlThatDoesNotReturnLeavesNothing(t *testing.T) {
	descriptors := openDescriptors()
	var bound string
	k := realKernel
	k.bind = noteBound(t, &bound)
	leave := func(how func()) {
		done := make(chan any)
		go func() {
			defer func() { done <- recover() }()
			_, _ = k.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{
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
	require.Equal(t, descriptors, openDescriptors())
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

// Several listeners can share a port only if each has the option.
func TestReusePort(t *testing.T) {
	if !spreads() {
		err := refused(t, func() (*Listener, error) { return ListenTCP("127.0.0.1:0", WithReusePort()) })
		require.ErrorIs(t, err, errors.ErrUnsupported)
		return
	}
	name, err := reusePort()
	require.NoError(t, err)
	o := socketOption{unix.SOL_SOCKET, name}
	plain := ourMaker.open(t, "tcp", "127.0.0.1:0")
	require.Zero(t, option(t, plain, o))

	first := maker{listen: listenOurs(WithReusePort())}.open(t, "tcp", "127.0.0.1:0")
	second := maker{listen: listenOurs(WithReusePort())}.open(t, "tcp", first.Addr().String())
	require.NotZero(t, option(t, first, o))
	require.Equal(t, first.Addr(), second.Addr())
	err = refused(t, func() (*Listener, error) { return ListenTCP(first.Addr().String()) })
	require.ErrorIs(t, err, syscall.EADDRINUSE, "every socket of the address needs it")
}
