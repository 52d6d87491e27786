package unwrap

import (
	"crypto/tls"
	"io"
	"net"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

type (
	exported struct{ Reader io.Reader }
	embedded struct{ io.Reader }
	hidden   struct{ reader io.Reader }
	other    struct{ Reader string }
	promoted struct{ *exported }
)

// A wrapped is a connection in a wrapper of the usual form, and an endless is one in itself.
type (
	wrapped struct{ net.Conn }
	endless struct{ net.Conn }
)

func (e *endless) NetConn() net.Conn { return e }

func TestConn(t *testing.T) {
	tcp := new(net.TCPConn)
	pipe, other := net.Pipe()
	defer pipe.Close()
	defer other.Close()
	around := new(endless)
	for _, row := range []struct{ c, want net.Conn }{
		{tcp, tcp},
		{tls.Client(wrapped{&wrapped{tcp}}, nil), tcp},
		{wrapped{pipe}, pipe},
		{wrapped{nil}, wrapped{nil}},
		{around, around},
		{nil, nil},
	} {
		require.Equal(t, row.want, Conn(row.c), "%T", row.c)
	}
}

func TestListener(t *testing.T) {
	tcp := new(net.TCPListener)
	type wrapper struct{ net.Listener }
	around := new(wrapper)
	around.Listener = around
	for _, ln := range []net.Listener{tcp, wrapper{tcp}, tls.NewListener(&wrapper{tcp}, nil)} {
		require.Same(t, tcp, Listener[*net.TCPListener](ln))
	}
	for _, ln := range []net.Listener{nil, wrapper{}, around, new(net.UnixListener)} {
		require.Nil(t, Listener[*net.TCPListener](ln))
	}
}

func TestField(t *testing.T) {
	r := strings.NewReader("")
	for _, v := range []any{exported{r}, &exported{r}, embedded{r}, &embedded{r}} {
		require.Equal(t, r, field[io.Reader](v, "Reader"))
	}
	for _, v := range []any{nil, 1, (*exported)(nil), exported{}, hidden{r}, other{"x"}, promoted{}, promoted{&exported{r}}} {
		require.Nil(t, field[io.Reader](v, "Reader"), "%T", v)
	}
}
