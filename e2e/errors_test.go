package e2e

import (
	"context"
	"errors"
	"net"
	"runtime"
	"strconv"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
)

func TestBadInputErrorsMatchNet(t *testing.T) {
	for _, tc := range []struct{ rule, network, address string }{
		{"a port is needed", "tcp", "127.0.0.1"},
		{"a port is needed after a name", "tcp", "localhost"},
		{"a port is needed after brackets", "tcp", "[::1]"},
		{"IPv6 needs brackets", "tcp", "::1:80"},
		{"one colon too many", "tcp", "127.0.0.1:80:80"},
		{"a bracket is not closed", "tcp", "[::1:80"},
		{"a bracket is not opened", "tcp", "::1]:80"},
		{"text behind the bracket", "tcp", "[::1]x:80"},
		{"a port has 16 bits", "tcp", "127.0.0.1:65536"},
		{"a port has 16 bits, without a host", "tcp", ":65536"},
		{"a port is not negative", "tcp", "127.0.0.1:-1"},
		{"a port is far too large", "tcp", "127.0.0.1:99999999999999999999"},
		{"a service is unknown", "tcp", "127.0.0.1:nosuchservice"},
		{"a service is unknown, without a host", "tcp", ":nosuchservice"},
		{"a network is unknown", "nosuchnetwork", "127.0.0.1:0"},
		{"no network", "", "127.0.0.1:0"},
		{"a network is unknown, in capitals", "TCP", "127.0.0.1:0"},
		{"UDP does not listen", "udp", "127.0.0.1:0"},
		{"IP does not listen", "ip:tcp", "127.0.0.1"},
		{"tcp6 and an IPv4 wildcard", "tcp6", "0.0.0.0:0"},
		{"tcp6 and IPv4", "tcp6", "127.0.0.1:0"},
		{"tcp6 and IPv4 in IPv6", "tcp6", "[::ffff:127.0.0.1]:0"},
		{"tcp4 and IPv6", "tcp4", "[::1]:0"},
	} {
		t.Run(tc.rule, func(t *testing.T) {
			_, want := net.Listen(tc.network, tc.address)
			require.Error(t, want)
			got := testkit.Refused(t, func() (*acceptq.Listener, error) {
				return acceptq.Listen(t.Context(), tc.network, tc.address, acceptq.WithBacklog(2))
			})
			testkit.RequireSameError(t, want, got)
		})
	}
}

// Addresses that net accepts and the kernel refuses.
func TestKernelErrorsMatchNet(t *testing.T) {
	if testkit.OnFakeNet {
		t.Skip("there is no kernel here")
	}
	for _, tc := range []struct{ rule, network, address string }{
		{"an address of another machine", "tcp", "192.0.2.1:0"},
		{"an address of another machine, without a port", "tcp", "192.0.2.1:"},
		{"an address of another machine, IPv6", "tcp", "[2001:db8::1]:0"},
		{"an address of another machine, IPv4 in IPv6", "tcp", "[::ffff:192.0.2.1]:0"},
		{"a link-local address without a zone", "tcp", "[fe80::1]:0"},
		{"a link-local address in an unknown zone", "tcp", "[fe80::1%nosuch]:0"},
		{"a link-local address in an unknown zone, by number", "tcp", "[fe80::1%9999999]:0"},
	} {
		t.Run(tc.rule, func(t *testing.T) {
			ln, want := net.Listen(tc.network, tc.address)
			if want == nil {
				ln.Close()
				ourMaker.Open(t, tc.network, tc.address)
				t.Skip("this kernel has none")
			}
			testkit.RequireSameError(t, want, testkit.Refused(t, func() (*acceptq.Listener, error) {
				return acceptq.Listen(t.Context(), tc.network, tc.address)
			}))
		})
	}
}

func TestAddressInUseErrorMatchesNet(t *testing.T) {
	for _, tc := range []struct{ holder, network, host string }{
		{"127.0.0.1:0", "tcp", "127.0.0.1"},
		{"127.0.0.1:0", "tcp4", "127.0.0.1"},
		{"127.0.0.1:0", "tcp", "[::ffff:127.0.0.1]"},
		{"0.0.0.0:0", "tcp4", "0.0.0.0"},
		{"0.0.0.0:0", "tcp4", ""},
		{":0", "tcp", ""},
		{":0", "tcp", "0.0.0.0"},
		{":0", "tcp", "[::]"},
		{"[::1]:0", "tcp", "[::1]"},
		{"[::1]:0", "tcp6", "[::1]"},
	} {
		t.Run(tc.network+" "+tc.host, func(t *testing.T) {
			holder, err := ourMaker.Listen(tc.network, tc.holder)
			if err != nil {
				t.Skipf("cannot be held here: %v", err)
			}
			defer holder.Close()
			address := tc.host + ":" + strconv.Itoa(holder.Addr().(*net.TCPAddr).Port)
			second, want := net.Listen(tc.network, address)
			if want == nil {
				second.Close()
				require.True(t, testkit.OnFakeNet, "two listeners have one address")
				t.Skip("two listeners can have one address here")
			}
			testkit.RequireSameError(t, want, testkit.Refused(t, func() (*acceptq.Listener, error) {
				return acceptq.Listen(t.Context(), tc.network, address)
			}))

			require.NoError(t, holder.Close())
			testkit.FreeAgain(t, tc.network, address)
		})
	}
}

// Networks that net can listen on and that are not TCP.
func TestUnixSocketsAreRefused(t *testing.T) {
	for _, network := range []string{"unix", "unixpacket", "unixgram"} {
		t.Run(network, func(t *testing.T) {
			err := testkit.Refused(t, func() (*acceptq.Listener, error) { return acceptq.Listen(t.Context(), network, "x.sock") })
			require.ErrorIs(t, err, net.UnknownNetworkError(network))
		})
	}
}

func TestListenWithAnEndedContext(t *testing.T) {
	ended, cancel := context.WithCancel(t.Context())
	cancel()

	t.Run("a literal address", func(t *testing.T) { // net ignores ctx here
		err := testkit.Refused(t, func() (*acceptq.Listener, error) { return acceptq.Listen(ended, "tcp", "127.0.0.1:0") })
		require.ErrorIs(t, err, context.Canceled)
	})
	t.Run("all addresses", func(t *testing.T) {
		err := testkit.Refused(t, func() (*acceptq.Listener, error) { return acceptq.Listen(ended, "tcp", ":0") })
		require.ErrorIs(t, err, context.Canceled)
	})
	t.Run("a name", func(t *testing.T) { // TestNameErrorsMatchNet compares the text with net
		err := testkit.Refused(t, func() (*acceptq.Listener, error) { return acceptq.Listen(ended, "tcp", "nosuchhost.invalid:0") })
		require.ErrorIs(t, err, context.Canceled)
	})
}

func TestMisuseIsAnError(t *testing.T) {
	var none context.Context
	for _, tc := range []struct {
		rule   string
		listen func() (*acceptq.Listener, error)
	}{
		{"WithControl(nil)", func() (*acceptq.Listener, error) { return acceptq.ListenTCP("127.0.0.1:0", acceptq.WithControl(nil)) }},
		{"nil Context", func() (*acceptq.Listener, error) { return acceptq.Listen(none, "tcp", "127.0.0.1:0") }},
		{"nil Context and a name", func() (*acceptq.Listener, error) { return acceptq.Listen(none, "tcp", "localhost:0") }},
	} {
		t.Run(tc.rule, func(t *testing.T) { testkit.Refused(t, tc.listen) })
	}
}

// hasControl reports whether the system has a socket to pass to a WithControl function.
const hasControl = !testkit.OnFakeNet && runtime.GOOS != "plan9"

func TestControlCallsMatchNet(t *testing.T) {
	if !hasControl {
		t.Skip("WithControl is unsupported here, see TestControlIsUnsupported")
	}
	type call struct{ network, address string }
	for _, tc := range []struct{ network, address string }{
		{"tcp", ""},
		{"tcp", ":0"},
		{"tcp", "0.0.0.0:0"},
		{"tcp", "[::]:0"},
		{"tcp4", ":0"},
		{"tcp6", ":0"},
		{"tcp", "127.0.0.1:0"},
		{"tcp4", "127.0.0.1:0"},
		{"tcp", "[::1]:0"},
		{"tcp6", "[::1]:0"},
		{"tcp", "[0:0:0:0:0:0:0:1]:0"},
		{"tcp", "[::ffff:127.0.0.1]:0"},
	} {
		t.Run(tc.network+" "+tc.address, func(t *testing.T) {
			var calls []call
			note := func(network, address string, c syscall.RawConn) error {
				calls = append(calls, call{network: network, address: address})
				return c.Control(func(uintptr) {})
			}
			ln, err := testkit.ListenTCPOnly(note)(tc.network, tc.address)
			if err != nil {
				t.Skipf("net cannot here: %v", err)
			}
			require.NoError(t, ln.Close())
			want := calls
			calls = nil
			ln, err = listenOurs(acceptq.WithControl(note))(tc.network, tc.address)
			require.NoError(t, err)
			require.NoError(t, ln.Close())
			require.Equal(t, want, calls)
			require.Len(t, calls, 1)
		})
	}
}

func TestControlsRunInOrderUntilOneFails(t *testing.T) {
	if !hasControl {
		t.Skip("WithControl is unsupported here, see TestControlIsUnsupported")
	}
	var order []string
	hook := func(name string, err error) acceptq.Option {
		return acceptq.WithControl(func(string, string, syscall.RawConn) error {
			order = append(order, name)
			return err
		})
	}
	ln, err := acceptq.ListenTCP("127.0.0.1:0", hook("first", nil), acceptq.WithBacklog(1), hook("second", nil))
	require.NoError(t, err)
	require.NoError(t, ln.Close())
	require.Equal(t, []string{"first", "second"}, order)

	order = nil
	errHook := errors.New("the hook's own")
	_, want := testkit.ListenTCPOnly(func(string, string, syscall.RawConn) error { return errHook })("tcp", "127.0.0.1:0")
	got := testkit.Refused(t, func() (*acceptq.Listener, error) {
		return acceptq.ListenTCP("127.0.0.1:0", hook("first", errHook), hook("second", nil))
	})
	require.ErrorIs(t, got, errHook)
	testkit.RequireSameError(t, want, got)
	require.Equal(t, []string{"first"}, order)
}
