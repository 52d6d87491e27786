package testkit

import (
	"context"
	"net"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// A Maker opens a listener. The listeners of this package must behave like those of net. If
// a test fails for the makers of net too, the test is wrong.
type Maker struct {
	Name   string
	Listen func(network, address string) (net.Listener, error)
}

// ListenTCPOnly listens with package net, on plain TCP like this package.
func ListenTCPOnly(hook func(network, address string, c syscall.RawConn) error) func(network, address string) (net.Listener, error) {
	return func(network, address string) (net.Listener, error) {
		lc := net.ListenConfig{Control: hook}
		lc.SetMultipathTCP(false)
		return lc.Listen(context.Background(), network, address)
	}
}

// Open opens a listener that is closed when the test ends.
func (m Maker) Open(t *testing.T, network, address string) TCPListener {
	t.Helper()
	ln, err := m.Listen(network, address)
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln.(TCPListener)
}
