//go:build !linux

package acceptq

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/acceptq/acceptq/internal/sys"
	"github.com/acceptq/acceptq/internal/tcpinfo"
)

// timeInQueue returns an error, because these systems do not report the time in the queue.
//   - FreeBSD: tcpi_last_data_recv is the time since the last segment of the client
//     (t_rcvtime). It is too short if the client has sent data, so it is only a lower
//     bound. tcpi_last_data_sent is always 0.
//   - NetBSD: like FreeBSD, because its tcp_fill_info comes from there.
//   - OpenBSD: tcpi_last_data_sent begins when the connection is made, as on Linux
//     (t_sndtime in syn_cache_get). That has not been tested, so it is not used.
//   - macOS: TCP_CONNECTION_INFO has no such field.
//   - DragonFly: there is no TCP_INFO.
func timeInQueue(*sys.Calls, int, []byte) (time.Duration, error) {
	return unknown, tcpinfo.ErrNoQueueTime
}

// listWaiting returns an error, because these systems do not report which connections are
// queued. FreeBSD's net.inet.tcp.pcblist has a row for each connection, including queued
// ones. But struct xtcpcb of netinet/tcp_var.h contains neither the listener nor the time
// at which the connection was made. The lists of the other systems have the same origin.
func listWaiting(*sys.Calls, context.Context, []*Listener) ([]Waiting, error) {
	return nil, fmt.Errorf("this system does not list the connections in the accept queue: %w", errors.ErrUnsupported)
}

// countHandshakes returns an error: FreeBSD and NetBSD keep handshakes in a cache for all
// listeners, and no other system lists them either.
func countHandshakes(*sys.Calls, context.Context, *Listener) (int, error) {
	return unknown, fmt.Errorf("this system does not list the in-flight handshakes of a listener: %w", errors.ErrUnsupported)
}

// listQueues returns an error, because these systems need another source, which the package
// does not read yet. On FreeBSD the sysctl net.inet.tcp.pcblist lists every TCP socket. A
// row whose t_state of struct xtcpcb is TCPS_LISTEN is a listener. Its struct xsocket has the
// length (so_qlen), the connections that an accept filter holds back (so_incqlen) and the limit
// (so_qlimit), but no drops and no inode. That has been read in the sources and not run.
func listQueues(*sys.Calls, context.Context) ([]Queue, error) { return nil, errNoQueues }

func listGroup(*sys.Calls, context.Context, *Listener) ([]Queue, error) { return nil, errNoQueues }

func listForeign(*sys.Calls, context.Context, Queue) ([]Waiting, error) { return nil, errNoQueues }

var errNoQueues = fmt.Errorf("this system does not list the accept queues of other processes: %w", errors.ErrUnsupported)

// ceilingPlace returns "": these systems have one ceiling for the machine.
func ceilingPlace() string { return "" }

// noDescriptor returns nil: these systems need no descriptor to read their settings.
func noDescriptor(error) error { return nil }
