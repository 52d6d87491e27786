package acceptq

import (
	"fmt"
	"net"
	"syscall"
	"time"

	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/unwrap"
)

// QueueTime returns how long a connection waited in the accept queue: the time since its
// three-way handshake ended. Call it right after Accept and before anything is sent, for
// example in [net/http.Server.ConnContext].
//
// The time before the handshake is not in it. The result can be 0 for a client whose SYNs
// the kernel dropped for 3 s, because the queue was full. First make the queue long
// enough, and watch Drops in [Stats].
//
// c is a TCP connection or a wrapper. QueueTime finds the TCP connection in a wrapper that
//   - has the method SyscallConn, see [syscall.Conn]
//   - has the method NetConn, as [*crypto/tls.Conn] has
//   - is a struct with an exported field Conn, such as an embedded [net.Conn]. The connections
//     of golang.org/x/net/netutil.LimitListener are an example.
//
// QueueTime makes one system call. It does not allocate, unless it reads a field Conn. The
// result can be wrong by one kernel tick (1 to 10 ms). With [WithDeferAccept] the time
// begins when data arrives. On a fast-open connection the result is about one round trip
// too short. QueueTime also works if the client has closed or reset the connection.
//
// The result is -1 if there is an error. The error matches
//   - [syscall.EINVAL] if c was dialed, has sent data (Linux before 4.6 does not always
//     report that), or is not a TCP connection or such a wrapper
//   - [errors.ErrUnsupported] on systems other than Linux, see docs/evidence.md
//   - [net.ErrClosed] if c is closed
//
// The source is tcpi_last_data_sent of TCP_INFO, tcp(7).
func QueueTime(c net.Conn) (time.Duration, error) { return queueTimeOf(&sys.Real, c) }

func queueTimeOf(k *sys.Calls, c net.Conn) (time.Duration, error) {
	socket := unwrap.Conn(c)
	if _, ok := socket.(syscall.Conn); !ok { // the addresses of a wrapper may block: go-proxyproto reads a header first
		err := fmt.Errorf("no TCP connection found in a %T: %w", socket, syscall.EINVAL)
		return unknown, &net.OpError{Op: "queuetime", Net: "tcp", Err: err}
	}
	d, err := readQueueTime(k, socket)
	if err != nil {
		return unknown, &net.OpError{Op: "queuetime", Net: "tcp", Source: socket.LocalAddr(), Addr: socket.RemoteAddr(), Err: sys.Cause(err)}
	}
	return d, nil
}

func readQueueTime(k *sys.Calls, c net.Conn) (time.Duration, error) {
	r := readers.Get().(*reader)
	defer readers.Put(r)
	r.calls = k
	if err := onSocket(c, r.readTime); err != nil {
		return unknown, err
	}
	return r.waited, r.err
}

// onSocket calls f with the descriptor of c, which is a [syscall.Conn].
func onSocket(c net.Conn, f func(fd uintptr)) error {
	if tcp, ok := c.(*net.TCPConn); ok { // like below, but a concrete type avoids an allocation
		raw, err := tcp.SyscallConn()
		if err != nil {
			return err
		}
		return raw.Control(f)
	}
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		return err
	}
	return raw.Control(f)
}
