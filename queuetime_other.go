//go:build !linux

package acceptq

import "time"

// timeInQueue: what these systems tell of a connection is not how long it waited.
//   - FreeBSD: tcpi_last_data_recv is the time since the client's last segment
//     (t_rcvtime): exact if the client has stayed silent, too short if it has sent.
//     A lower bound under the name of the time would make the numbers of two systems
//     look alike that are not. tcpi_last_data_sent is always 0.
//   - NetBSD: as FreeBSD, from which its tcp_fill_info comes.
//   - OpenBSD: tcpi_last_data_sent is set when the connection is made (t_sndtime in
//     syn_cache_get), as on Linux. Nobody has compared it with a known wait yet.
//   - macOS: TCP_CONNECTION_INFO has no time of this kind.
//   - DragonFly: there is no TCP_INFO.
func (*kernel) timeInQueue(int, []byte) (time.Duration, error) { return unknown, errNoQueueTime }
