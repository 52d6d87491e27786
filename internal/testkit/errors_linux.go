package testkit

import (
	"net"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// AddLinkLocal gives the interface an address, as ip(8) would.
func AddLinkLocal(t *testing.T, ip net.IP, ifindex int32) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	defer unix.Close(fd)
	request := struct { // struct in6_ifreq of linux/ipv6.h
		addr      [16]byte
		prefixLen uint32
		ifindex   int32
	}{[16]byte(ip), 64, ifindex}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCSIFADDR, uintptr(unsafe.Pointer(&request)))
	require.Zero(t, errno)
}
