package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
)

var (
	netMaker  = testkit.Maker{Name: "net.Listen", Listen: net.Listen}
	tcpMaker  = testkit.Maker{Name: "net.ListenConfig without MPTCP", Listen: testkit.ListenTCPOnly(nil)}
	ourMaker  = testkit.Maker{Name: "acceptq.Listen", Listen: listenOurs()}
	wrapMaker = testkit.Maker{Name: "acceptq.Wrap", Listen: wrapNets}
	allMakers = []testkit.Maker{netMaker, tcpMaker, ourMaker, wrapMaker}
)

func wrapNets(network, address string) (net.Listener, error) {
	ln, err := net.Listen(network, address)
	if err != nil {
		return nil, err
	}
	l, err := acceptq.Wrap(ln)
	if err != nil {
		ln.Close()
		return nil, err
	}
	return l, nil
}

func listenOurs(opts ...acceptq.Option) func(network, address string) (net.Listener, error) {
	return func(network, address string) (net.Listener, error) {
		ln, err := acceptq.Listen(context.Background(), network, address, opts...)
		if err != nil {
			return nil, err // not a nil *Listener in a non-nil interface
		}
		return ln, nil
	}
}

func TestBehavesAsNetListen(t *testing.T) {
	for _, rule := range []struct {
		name    string
		check   func(t *testing.T, ln testkit.TCPListener)
		sockets bool // needs a descriptor
	}{
		{name: "a client is accepted and talked with", check: acceptsAClient},
		{name: "Close ends a waiting Accept", check: closeEndsAccept},
		{name: "a second Close fails", check: secondCloseFails, sockets: true},
		{name: "a deadline ends Accept and can be lifted", check: deadlineEndsAccept},
		{name: "a File is independent", check: fileIsIndependent, sockets: true},
		{name: "SyscallConn shows the descriptor", check: syscallConnShowsDescriptor, sockets: true},
		{name: "eight may accept at once", check: eightAccept},
		{name: "port 0 is a free port", check: addrHasPort},
	} {
		for _, m := range allMakers {
			t.Run(rule.name+"/"+m.Name, func(t *testing.T) {
				if rule.sockets && testkit.OnFakeNet {
					t.Skip("net has no descriptor here")
				}
				rule.check(t, m.Open(t, "tcp", "127.0.0.1:0"))
			})
		}
	}
}

func acceptsAClient(t *testing.T, ln testkit.TCPListener) {
	client := testkit.Connect(t, "tcp", ln.Addr().String())
	server := accept(t, ln)
	require.Equal(t, client.LocalAddr().String(), server.RemoteAddr().String())
	_, err := client.Write([]byte("hello"))
	require.NoError(t, err)
	require.NoError(t, client.Close())
	got, err := io.ReadAll(server)
	require.NoError(t, err)
	require.Equal(t, "hello", string(got))
}

func closeEndsAccept(t *testing.T, ln testkit.TCPListener) {
	ended := make(chan error)
	go func() {
		_, err := ln.Accept()
		ended <- err
	}()
	require.NoError(t, ln.Close())
	require.ErrorIs(t, <-ended, net.ErrClosed)
}

func secondCloseFails(t *testing.T, ln testkit.TCPListener) {
	require.NoError(t, ln.Close())
	require.ErrorIs(t, ln.Close(), net.ErrClosed)
}

func deadlineEndsAccept(t *testing.T, ln testkit.TCPListener) {
	require.NoError(t, ln.SetDeadline(time.Now()))
	_, err := ln.Accept()
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	testkit.Connect(t, "tcp", ln.Addr().String())
	accept(t, ln)
}

func fileIsIndependent(t *testing.T, ln testkit.TCPListener) {
	first, err := ln.File()
	require.NoError(t, err)
	require.NoError(t, first.Close())
	testkit.Connect(t, "tcp", ln.Addr().String())
	accept(t, ln)

	second, err := ln.File()
	require.NoError(t, err)
	defer second.Close()
	require.NoError(t, ln.Close())
	heir, err := net.FileListener(second)
	require.NoError(t, err)
	defer heir.Close()
	testkit.Connect(t, "tcp", heir.Addr().String())
	accept(t, heir.(testkit.TCPListener))
}

func syscallConnShowsDescriptor(t *testing.T, ln testkit.TCPListener) {
	raw, err := ln.SyscallConn()
	require.NoError(t, err)
	called := 0
	require.NoError(t, raw.Control(func(uintptr) { called++ }))
	require.Equal(t, 1, called)
	require.Error(t, raw.Read(func(uintptr) bool { return true }), "Read of a listener must fail")

	require.NoError(t, ln.Close())
	require.ErrorIs(t, raw.Control(func(uintptr) { called++ }), net.ErrClosed)
	require.Equal(t, 1, called)
}

func eightAccept(t *testing.T, ln testkit.TCPListener) {
	const n = 8
	require.NoError(t, ln.SetDeadline(time.Now().Add(20*time.Second)))
	accepted := make(chan string)
	for range n {
		go func() {
			c, err := ln.Accept()
			if err != nil {
				accepted <- err.Error()
				return
			}
			defer c.Close()
			accepted <- c.RemoteAddr().String()
		}()
	}
	var clients, servers []string
	for range n {
		clients = append(clients, testkit.Connect(t, "tcp", ln.Addr().String()).LocalAddr().String())
	}
	for range n {
		servers = append(servers, <-accepted)
	}
	require.ElementsMatch(t, clients, servers)
}

func addrHasPort(t *testing.T, ln testkit.TCPListener) {
	addr := ln.Addr().(*net.TCPAddr)
	require.Equal(t, "tcp", addr.Network())
	require.NotZero(t, addr.Port)
	require.Equal(t, "127.0.0.1", addr.IP.String())
}

// The errors of a listener that is closed or past its deadline have the same text as those
// of net, except for the port.
func TestMethodErrorsMatchNet(t *testing.T) {
	if testkit.OnFakeNet {
		t.Skip("net's own listener does not fail here")
	}
	shut := func(ln testkit.TCPListener) error { return ln.Close() }
	late := func(ln testkit.TCPListener) error { return ln.SetDeadline(time.Now()) }
	for _, tc := range []struct {
		name   string
		before func(ln testkit.TCPListener) error
		call   func(ln testkit.TCPListener) error
	}{
		{"Accept, late", late, func(ln testkit.TCPListener) error { _, err := ln.Accept(); return err }},
		{"Accept", shut, func(ln testkit.TCPListener) error { _, err := ln.Accept(); return err }},
		{"AcceptTCP", shut, func(ln testkit.TCPListener) error { _, err := ln.AcceptTCP(); return err }},
		{"Close", shut, func(ln testkit.TCPListener) error { return ln.Close() }},
		{"SetDeadline", shut, func(ln testkit.TCPListener) error { return ln.SetDeadline(time.Now()) }},
		{"File", shut, func(ln testkit.TCPListener) error { _, err := ln.File(); return err }},
		{"SyscallConn", shut, func(ln testkit.TCPListener) error {
			raw, err := ln.SyscallConn()
			if err == nil {
				err = raw.Control(func(uintptr) {})
			}
			return err
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			words := func(m testkit.Maker) string {
				ln := m.Open(t, "tcp", "127.0.0.1:0")
				require.NoError(t, tc.before(ln))
				err := tc.call(ln)
				require.Error(t, err)
				return strings.ReplaceAll(err.Error(), ln.Addr().String(), "ADDR")
			}
			require.Equal(t, words(tcpMaker), words(ourMaker))

			want := tc.call(&net.TCPListener{})
			require.Error(t, want)
			require.Equal(t, want, tc.call(&acceptq.Listener{}), "the error of a zero Listener")
			require.Equal(t, want, tc.call((*acceptq.Listener)(nil)), "the error of a nil Listener")
		})
	}
}

// Backlog works after Close. For a Listener that never had a socket all its numbers are
// unknown.
func TestBacklogOfAClosedAndAZeroListener(t *testing.T) {
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(2))
	require.NoError(t, err)
	account, effective := ln.Backlog(), ln.EffectiveBacklog()
	require.NoError(t, ln.Close())
	require.Equal(t, account, ln.Backlog())
	require.Equal(t, effective, ln.EffectiveBacklog())

	for _, none := range []*acceptq.Listener{nil, {}} {
		require.Equal(t, -1, none.EffectiveBacklog())
		require.Equal(t, acceptq.Backlog{Requested: -1, Ceiling: -1, Limit: -1, Effective: -1, Capacity: -1}, none.Backlog())
		require.Nil(t, none.Addr())
		require.Nil(t, none.TCPListener())
		require.Equal(t, "tcp <nil>", none.String())
		_, err = none.Stats()
		require.ErrorIs(t, err, syscall.EINVAL)
		_, err = none.SetBacklog(1)
		require.ErrorIs(t, err, syscall.EINVAL)
		require.ErrorIs(t, none.Drain(t.Context()), syscall.EINVAL)
		_, err = acceptq.ReadStats(none)
		require.ErrorIs(t, err, syscall.EINVAL)
		_, err = acceptq.Wrap(none)
		require.ErrorIs(t, err, syscall.EINVAL)
	}
}

// A Listener is formatted as its address. Formatting does not read data that Accept or a
// drain writes; the race detector checks this.
func TestFormattingAListenerInUse(t *testing.T) {
	ln, err := acceptq.ListenTCP("127.0.0.1:0")
	require.NoError(t, err)
	var accepting sync.WaitGroup
	accepting.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	})
	want := "tcp " + ln.Addr().String()
	for range 100 {
		c, err := net.Dial("tcp", ln.Addr().String())
		require.NoError(t, err)
		c.Close()
		for _, verb := range []string{"%v", "%s", "%+v"} {
			require.Equal(t, want, fmt.Sprintf(verb, ln))
		}
	}
	require.NoError(t, ln.Close())
	accepting.Wait()
}

// For a listener on all addresses the network decides which families can connect, as with
// net.
func TestFamiliesMatchNet(t *testing.T) {
	if testkit.OnFakeNet {
		t.Skip("net has no addresses here")
	}
	haveIPv6 := false
	if ln, err := net.Listen("tcp6", "[::1]:0"); err == nil {
		haveIPv6 = ln.Close() == nil
	}
	// These two systems have no sockets for both families.
	haveMapped := runtime.GOOS != "openbsd" && runtime.GOOS != "dragonfly"

	for _, tc := range []struct {
		network, address string
		v4, v6           bool
	}{
		{"tcp", ":0", true, haveIPv6 && haveMapped},
		{"tcp", "0.0.0.0:0", true, haveIPv6 && haveMapped},
		{"tcp", "[::]:0", true, haveIPv6 && haveMapped},
		{"tcp4", ":0", true, false},
		{"tcp6", ":0", false, true},
		{"tcp", "[::1]:0", false, true},
		{"tcp", "127.0.0.1:0", true, false},
	} {
		for _, m := range allMakers {
			t.Run(tc.network+" "+tc.address+"/"+m.Name, func(t *testing.T) {
				if !tc.v4 && !haveIPv6 {
					t.Skip("no IPv6 here")
				}
				ln := m.Open(t, tc.network, tc.address)
				require.Equal(t, "tcp", ln.Addr().Network())
				port := strconv.Itoa(ln.Addr().(*net.TCPAddr).Port)
				require.Equal(t, tc.v4, reaches(t, ln, "127.0.0.1", port), "reachable at 127.0.0.1")
				if haveIPv6 {
					require.Equal(t, tc.v6, reaches(t, ln, "::1", port), "reachable at ::1")
				}
			})
		}
	}
}

// reaches reports whether a connection to the port reaches ln. In the other family the port
// may belong to another program.
func reaches(t *testing.T, ln testkit.TCPListener, host, port string) bool {
	t.Helper()
	client, err := net.Dial("tcp", net.JoinHostPort(host, port))
	if err != nil {
		return false
	}
	defer client.Close()
	require.NoError(t, ln.SetDeadline(time.Now().Add(5*time.Second)))
	server, err := ln.AcceptTCP()
	if err != nil {
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		return false
	}
	defer server.Close()
	require.Equal(t, client.LocalAddr().String(), server.RemoteAddr().String())
	return true
}

// Addresses that net accepts are accepted here, with the same meaning.
func TestAddressesMatchNet(t *testing.T) {
	for _, tc := range []struct{ network, address string }{
		{"tcp", ""},
		{"tcp", ":"},
		{"tcp", ":0"},
		{"tcp4", ":0"},
		{"tcp", "0.0.0.0:0"},
		{"tcp4", "0.0.0.0:0"},
		{"tcp", "[::]:0"},
		{"tcp6", "[::]:0"},
		{"tcp4", "[::]:0"},
		{"tcp", "127.0.0.1:0"},
		{"tcp4", "127.0.0.1:0"},
		{"tcp", "127.0.0.1:"},
		{"tcp", "127.0.0.1:00"},
		{"tcp", "127.0.0.1:+0"},
		{"tcp", "[127.0.0.1]:0"},
		{"tcp", "[::1]:0"},
		{"tcp6", "[::1]:0"},
		{"tcp", "[0:0:0:0:0:0:0:1]:0"},
		{"tcp", "[::ffff:127.0.0.1]:0"},
		{"tcp4", "[::ffff:127.0.0.1]:0"},
		{"tcp", "[::ffff:0.0.0.0]:0"},
		{"tcp", "localhost:0"},
		{"tcp4", "localhost:0"},
		{"tcp6", "localhost:0"},
	} {
		t.Run(tc.network+" "+tc.address, func(t *testing.T) {
			if strings.HasPrefix(tc.address, "localhost") {
				if _, err := net.LookupHost("localhost"); err != nil {
					t.Skipf("localhost has no address here: %v", err)
				}
			}
			want, wantErr := tcpMaker.Listen(tc.network, tc.address)
			got, err := ourMaker.Listen(tc.network, tc.address)
			if wantErr != nil { // no IPv6, or no such address for localhost
				testkit.RequireSameError(t, wantErr, err)
				t.Skipf("net cannot here: %v", wantErr)
			}
			require.NoError(t, want.Close())
			require.NoError(t, err)
			require.NoError(t, got.Close())
			require.Equal(t, want.Addr().(*net.TCPAddr).IP, got.Addr().(*net.TCPAddr).IP)
			require.Equal(t, want.Addr().(*net.TCPAddr).Zone, got.Addr().(*net.TCPAddr).Zone)
		})
	}
}
