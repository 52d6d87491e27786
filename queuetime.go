package acceptq

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"syscall"
	"time"
)

// QueueTime returns how long a connection waited in the accept queue: the time since
// its three-way handshake ended. Call it right after Accept, for example in
// [net/http.Server.ConnContext]. c is a TCP connection, or a wrapper that has a NetConn
// method, such as [*crypto/tls.Conn].
//
// It makes one system call and does not allocate. The result can be one tick of the
// kernel (1 to 10 ms) too long or too short. If there is an error it is -1.
//
// A connection that the client has closed or reset meanwhile still tells its time. The
// wait begins when the connection enters the queue: with [WithDeferAccept] that is when
// data comes. On a fast-open connection the time is about one round trip too short.
//
// The error matches
//   - [syscall.EINVAL], if c was dialed or has sent data (as far as the kernel tells:
//     since Linux 4.6), or is not a TCP connection
//   - [errors.ErrUnsupported], on systems other than Linux; docs/overload.md says what
//     their fields of the same name mean
//   - [net.ErrClosed], if c is closed
//
// Source: tcpi_last_data_sent of TCP_INFO, tcp(7).
func QueueTime(c net.Conn) (time.Duration, error) { return realKernel.queueTime(c) }

func (k *kernel) queueTime(c net.Conn) (time.Duration, error) {
	d, err := k.readQueueTime(c)
	if err == nil {
		return d, nil
	}
	op := &net.OpError{Op: "queuetime", Net: "tcp", Err: cause(err)}
	if c != nil {
		op.Source, op.Addr = c.LocalAddr(), c.RemoteAddr()
	}
	return unknown, op
}

func (k *kernel) readQueueTime(c net.Conn) (time.Duration, error) {
	r := queueTimeReaders.Get().(*queueTimeReader)
	defer queueTimeReaders.Put(r)
	r.kernel = k
	if err := onConn(c, r.read); err != nil {
		return unknown, err
	}
	return r.waited, r.err
}

// maxWrappers is how many wrappers are taken off a connection: one that is its own
// NetConn must not keep the caller for ever.
const maxWrappers = 16

// onConn calls f with the descriptor below c.
func onConn(c net.Conn, f func(fd uintptr)) error {
	for range maxWrappers {
		switch wrapper := c.(type) {
		case *net.TCPConn: // as the next, but with a known type the RawConn is not allocated
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
	return fmt.Errorf("more than %d wrappers: %w", maxWrappers, syscall.EINVAL)
}

// errNoQueueTime is the error where the time cannot be known.
var errNoQueueTime = fmt.Errorf("the time in the accept queue: %w", errors.ErrUnsupported)

// A queueTimeReader is what one reading needs besides the descriptor. It is kept for
// the next one, and read is bound once, so that a reading allocates nothing.
type queueTimeReader struct {
	kernel *kernel
	buffer [256]byte
	waited time.Duration
	err    error
	read   func(fd uintptr)
}

var queueTimeReaders = sync.Pool{New: func() any {
	r := new(queueTimeReader)
	r.read = func(fd uintptr) { r.waited, r.err = r.kernel.timeInQueue(int(fd), r.buffer[:]) }
	return r
}}
