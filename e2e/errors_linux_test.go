package e2e

import (
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
)

// refusedAsByNet requires that net and this package fail with the same error.
func refusedAsByNet(t *testing.T, ctx context.Context, network, address string) error {
	t.Helper()
	var lc net.ListenConfig
	_, want := lc.Listen(ctx, network, address)
	require.Error(t, want)
	got := testkit.Refused(t, func() (*acceptq.Listener, error) { return acceptq.Listen(ctx, network, address) })
	testkit.RequireSameError(t, want, got)
	return got
}

// The only name server of this namespace answers that a name does not exist, or does
// not answer.
func TestNameErrorsMatchNet(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		require.NoError(t, unix.Mount("tmpfs", "/etc", "tmpfs", 0, ""))
		for name, text := range map[string]string{
			"hosts":         "127.0.0.1 localhost\n",
			"nsswitch.conf": "hosts: files dns\n",
			"resolv.conf":   "nameserver 127.0.0.1\n",
		} {
			require.NoError(t, os.WriteFile(filepath.Join("/etc", name), []byte(text), 0o644))
		}
		server, err := net.ListenPacket("udp", "127.0.0.1:53")
		require.NoError(t, err)
		asked, answer := make(chan bool, 1), make(chan bool)
		var served sync.WaitGroup
		served.Go(func() {
			for {
				p := make([]byte, 1500)
				n, client, err := server.ReadFrom(p)
				if err != nil {
					return
				}
				served.Go(func() {
					if bytes.Contains(p[:n], []byte("silent")) {
						select {
						case asked <- true:
						default:
						}
						<-answer
					}
					p[2], p[3] = 0x81, 0x83 // the answer to the question: NXDOMAIN
					_, _ = server.WriteTo(p[:n], client)
				})
			}
		})
		defer served.Wait()
		defer server.Close()

		for _, tc := range []struct{ rule, network, address string }{
			{"there is no such host", "tcp", "nosuchhost.invalid:0"},
			{"there is no such host, IPv6", "tcp6", "nosuchhost.invalid:0"},
			{"an address with a leading zero is a name", "tcp", "127.0.0.01:0"},
			{"a name has no such address", "tcp6", "localhost:0"},
		} {
			t.Run(tc.rule, func(t *testing.T) { refusedAsByNet(t, t.Context(), tc.network, tc.address) })
		}
		t.Run("ctx ends before the answer", func(t *testing.T) {
			untilAsked := func() context.Context {
				ctx, cancel := context.WithCancel(t.Context())
				go func() {
					defer cancel()
					select {
					case <-asked:
					case <-t.Context().Done():
					}
				}()
				return ctx
			}
			var want error
			got := testkit.Refused(t, func() (*acceptq.Listener, error) {
				defer close(answer) // lookups of net continue after the call
				_, want = new(net.ListenConfig).Listen(untilAsked(), "tcp", "silent.invalid:0")
				return acceptq.Listen(untilAsked(), "tcp", "silent.invalid:0")
			})
			testkit.RequireSameError(t, want, got)
			require.ErrorIs(t, got, context.Canceled)
		})
	})
}

func TestPrivilegedPortErrorMatchesNet(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.SetSysctl(t, "net.ipv4.ip_unprivileged_port_start", 1024)

		// This process is root, but this thread lacks the capability for privileged ports.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		header := &unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var caps [2]unix.CapUserData
		require.NoError(t, unix.Capget(header, &caps[0]))
		without := caps
		without[0].Effective &^= 1 << unix.CAP_NET_BIND_SERVICE
		require.NoError(t, unix.Capset(header, &without[0]))
		defer func() { require.NoError(t, unix.Capset(header, &caps[0])) }()

		for _, address := range []string{":80", "127.0.0.1:80", "[::1]:80", "0.0.0.0:1023", "127.0.0.1:1"} {
			err := refusedAsByNet(t, t.Context(), "tcp", address)
			require.ErrorIs(t, err, unix.EACCES)
			require.ErrorIs(t, err, os.ErrPermission)
		}
		ln, err := acceptq.ListenTCP("127.0.0.1:1024")
		require.NoError(t, err)
		require.NoError(t, ln.Close())
	})
}

func TestNoDescriptorIsLeft(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.FreeAgain(t, "tcp", ":0") // package net probes the address families once, which needs descriptors
		files := exhaust(t)
		for _, address := range []string{"127.0.0.1:0", "[::1]:0", ":0"} {
			err := refusedAsByNet(t, t.Context(), "tcp", address)
			require.ErrorIs(t, err, unix.EMFILE)
			testkit.RequireLayers(t, err, "tcp", "socket")
		}

		// net needs only one descriptor, because it makes no copy.
		require.NoError(t, files[0].Close())
		err := testkit.Refused(t, func() (*acceptq.Listener, error) { return acceptq.ListenTCP("127.0.0.1:0") })
		require.ErrorIs(t, err, unix.EMFILE)
		testkit.RequireLayers(t, err, "tcp", "fcntl")

		require.NoError(t, files[1].Close())
		ln, err := acceptq.ListenTCP("127.0.0.1:0")
		require.NoError(t, err)
		require.NoError(t, ln.Close())
	})
}

func TestIPv6SwitchedOff(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		if _, err := os.Stat("/proc/sys/net/ipv6"); err != nil {
			t.Skip("this kernel has no IPv6 to switch off")
		}
		testkit.SetSysctl(t, "net.ipv6.conf.all.disable_ipv6", 1)
		for _, address := range []string{":0", "0.0.0.0:0", "[::]:0"} {
			want := tcpMaker.Open(t, "tcp", address).Addr().(*net.TCPAddr)
			ln := ourMaker.Open(t, "tcp", address)
			got := ln.Addr().(*net.TCPAddr)
			require.Equal(t, want.IP, got.IP)
			got.IP = net.IPv4(127, 0, 0, 1)
			testkit.Connect(t, "tcp", got.String())
			accept(t, ln)
		}
		err := refusedAsByNet(t, t.Context(), "tcp", "[::1]:0")
		require.ErrorIs(t, err, unix.EADDRNOTAVAIL)
	})
}

func TestZones(t *testing.T) {
	testkit.InNamespace(t, func(t *testing.T) {
		testkit.AddLinkLocal(t, net.ParseIP("fe80::1"), 1)
		require.Eventually(t, func() bool { // once the kernel has checked for a duplicate address
			ln, err := net.Listen("tcp", "[fe80::1%lo]:0")
			return err == nil && ln.Close() == nil
		}, 20*time.Second, time.Millisecond)
		for _, address := range []string{"[fe80::1%lo]:0", "[fe80::1%1]:0"} {
			want := tcpMaker.Open(t, "tcp", address).Addr().(*net.TCPAddr)
			ln := ourMaker.Open(t, "tcp", address)
			got := ln.Addr().(*net.TCPAddr)
			require.Equal(t, want.IP, got.IP)
			require.Equal(t, want.Zone, got.Zone)
			testkit.Connect(t, "tcp", got.String())
			accept(t, ln)
		}
		for _, address := range []string{"[fe80::1]:0", "[fe80::1%nosuch]:0", "[fe80::1%2]:0", "[fe80::2%lo]:0"} {
			refusedAsByNet(t, t.Context(), "tcp", address)
		}
	})
}
