package acceptq

import (
	"fmt"
	"net"
	"syscall"
	"time"

	"github.com/acceptq/acceptq/internal/sys"
)

// QueueTime returns how long a connection waited in the accept queue: the time since its
// three-way handshake ended. Call it right after Accept and before anything is sent, for
// example in [net/http.Server.ConnContext]. c is a TCP connection or a wrapper with a
// NetConn method, such as [*crypto/tls.Conn].
//
// The time before the handshake is not in it. The result can be 0 for a client whose SYNs
// the kernel dropped for 3 s, because the queue was full. First make the queue long
// enough, and watch Drops in [Stats].
//
// QueueTime makes one system call and does not allocate. The result can be wrong by one
// kernel tick (1 to 10 ms). With [WithDeferAccept] the time begins when data arrives. On
// a fast-open connection the result is about one round trip too short. QueueTime also
// works if the client has closed or reset the connection.
//
// The result is -1 if there is an error. The error matches
//   - [syscall.EINVAL] if c was dialed, has sent data (Linux before 4.6 does not always
//     report that), or is not a TCP connection
//   - [errors.ErrUnsupported] on systems other than Linux, see docs/evidence.md
//   - [net.ErrClosed] if c is closed
//
// The source is tcpi_last_data_sent of TCP_INFO, tcp(7).
func QueueTime(c net.Conn) (time.Duration, error) { return queueTimeOf(&sys.Real, c) }

func queueTimeOf(k *sys.Calls, c net.Conn) (time.Duration, error) {
	d, err := readQueueTime(k, c)
	if err == nil {
		return d, nil
	}
	op := &net.OpError{Op: "queuetime", Net: "tcp", Err: sys.Cause(err)}
	if c != nil {
		op.Source, op.Addr = c.LocalAddr(), c.RemoteAddr()
	}
	return unknown, op
}

func readQueueTime(k *sys.Calls, c net.Conn) (time.Duration, error) {
	r := readers.Get().(*reader)
	defer readers.Put(r)
	r.calls = k
	if err := onConn(c, r.readTime); err != nil {
		return unknown, err
	}
	return r.waited, r.err
}

// maxWrappers is the maximum number of nested wrappers. Without it, a wrapper whose
// NetConn returns the wrapper itself would cause an endless loop.
const maxWrappers = 16

// onConn calls f with the descriptor of c, or of the connection that c wraps.
func onConn(c net.Conn, f func(fd uintptr)) error {
	for range maxWrappers {
		switch wrapper := c.(type) {
		case *net.TCPConn: // like the next case, but a concrete type avoids an allocation
			raw, err := wrapper.SyscallConn()
			if err != nil {
				return err
			}
			return raw.Control(f)
		case syscall.Conn:
			raw, err := wrapper.SyscallConn()
			if err != nil {
				return err
			}
			return raw.Control(f)
		case interface{ NetConn() net.Conn }:
			c = wrapper.NetConn()
		default:
			return fmt.Errorf("a %T has neither SyscallConn nor NetConn: %w", c, syscall.EINVAL)
		}
	}
	return fmt.Errorf("more than %d wrappers around the connection: %w", maxWrappers, syscall.EINVAL)
}
