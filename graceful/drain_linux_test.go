package graceful

import (
	"context"
	"errors"
	"net"
	"net/http"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
)

// lateClient is a client whose handshake is in flight. With TCP_QUICKACK off the kernel
// delays its final ACK until it sends data, or for about 40 ms.
func lateClient(t *testing.T, addr string) *client {
	t.Helper()
	d := net.Dialer{Timeout: patience, Control: func(_, _ string, c syscall.RawConn) error {
		var operr error
		err := c.Control(func(fd uintptr) {
			operr = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_QUICKACK, 0)
		})
		return errors.Join(err, operr)
	}}
	nc, err := d.Dial("tcp", addr)
	require.NoError(t, err)
	t.Cleanup(func() { nc.Close() })
	require.NoError(t, nc.SetDeadline(time.Now().Add(patience)))
	return newClient(t, nc)
}

// A client whose handshake is in flight when the stop begins gets its answer.
func TestHandshakesInFlight(t *testing.T) {
	t.Parallel()
	for range 10 {
		log := new(journal)
		r := start(t, &http.Server{Handler: hello}, listen(t), log.option(), WithLinger(0))
		var clients []*client
		for range 20 {
			clients = append(clients, lateClient(t, r.addr))
		}
		r.stop()
		for _, c := range clients {
			c.send(get)
			_, body := c.answer()
			require.Equal(t, "hello", body)
		}
		require.NoError(t, r.wait())
	}
}

// Close binds the socket of a drained listener to an interface that does not exist, unless
// other code had access to the descriptor before. Serve must not count as such code.
func TestServeClosesAsNobodyElseCan(t *testing.T) {
	t.Parallel()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	// A copy on its way over a socket is one that no drain can see.
	send := acceptq.WithControl(func(_, _ string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) { err = unix.Sendmsg(pair[0], []byte{0}, unix.UnixRights(int(fd)), nil, 0) })
		return errors.Join(cerr, err)
	})
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithReusePort(), send)
	require.NoError(t, err)
	next, err := acceptq.ListenTCP(ln.Addr().String(), acceptq.WithReusePort())
	require.NoError(t, err)
	defer next.Close()
	go http.Serve(next, hello)
	r := start(t, &http.Server{Handler: hello}, ln, WithLinger(0))
	r.stop()
	require.NoError(t, r.wait())

	rights := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(pair[1], make([]byte, 1), rights, unix.MSG_CMSG_CLOEXEC)
	require.NoError(t, err)
	messages, err := unix.ParseSocketControlMessage(rights[:n])
	require.NoError(t, err)
	fds, err := unix.ParseUnixRights(&messages[0])
	require.NoError(t, err)
	defer unix.Close(fds[0])
	index, err := unix.GetsockoptInt(fds[0], unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX)
	require.NoError(t, err)
	require.NotZero(t, index)
}

// A drain does not end while the server does not call Accept, here because ConnContext
// hangs. Its time limit or the second context ends it, and the error counts the queued
// connections.
func TestDrainThatHangs(t *testing.T) {
	t.Parallel()
	for name, abort := range map[string]bool{"time limit": false, "abort": true} {
		t.Run(name, func(t *testing.T) {
			going, hanging := make(chan bool), make(chan bool, 1)
			log, reason := new(journal), errors.New("enough")
			now, cancel := context.WithCancelCause(context.Background())
			defer cancel(nil)
			opts := []Option{log.option(), WithAbort(now), WithTimeout(time.Hour), part(time.Minute)}
			if !abort {
				opts = append(opts, WithTimeout(250*time.Millisecond), part(0))
			}
			ln := listen(t)
			r := start(t, &http.Server{Handler: hello, ConnContext: func(ctx context.Context, _ net.Conn) context.Context {
				select {
				case hanging <- true:
					<-going
				default:
				}
				return ctx
			}}, ln, opts...)
			dial(t, r.addr).send(get)
			until(t, "the hook", func() bool { return len(hanging) == 1 })
			queued := dial(t, r.addr)
			r.stop()
			log.after(t, "idle closed")
			if abort {
				cancel(reason)
			}
			err := r.wait()
			queued.closed()
			close(going)
			var cut *Error
			require.ErrorAs(t, err, &cut)
			require.Equal(t, 1, cut.Queued)
			var drain *acceptq.DrainError
			require.ErrorAs(t, err, &drain)
			if abort {
				require.ErrorIs(t, err, reason)
			} else {
				require.ErrorIs(t, err, context.DeadlineExceeded)
			}
		})
	}
}
