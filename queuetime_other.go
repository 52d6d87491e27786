//go:build !linux

package acceptq

import "time"

// timeInQueue returns an error, because these systems do not report the time in the queue.
//   - FreeBSD: tcpi_last_data_recv is the time since the last segment of the client
//     (t_rcvtime). It is too short if the client has sent data, so it is only a lower
//     bound. tcpi_last_data_sent is always 0.
//   - NetBSD: like FreeBSD, because its tcp_fill_info comes from there.
//   - OpenBSD: tcpi_last_data_sent begins when the connection is made, as on Linux
//     (t_sndtime in syn_cache_get). That has not been tested, so it is not used.
//   - macOS: TCP_CONNECTION_INFO has no such field.
//   - DragonFly: there is no TCP_INFO.
func (*kernel) timeInQueue(int, []byte) (time.Duration, error) { return unknown, errNoQueueTime }
