//go:build !linux

package acceptq

import (
	"errors"
	"net"
)

// intake: nothing is changed on a socket whose kernel has no way to keep new
// handshakes out and let those in flight finish. IP_MINTTL drops the final ACK
// too (FreeBSD), and listen(fd, 0) is no stop anywhere.
type intake struct{}

type handshake struct{}

func (intake) stop(*system, int) bool      { return false }
func (intake) lift(*system, int) error     { return nil }
func (intake) clean(*system, *net.TCPConn) {}

func (*system) handshakes(int) (map[handshake]struct{}, error) {
	return nil, errors.ErrUnsupported
}
