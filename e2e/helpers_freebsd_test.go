package e2e

import (
	"errors"
	"net"
	"os"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
)

// queueOption reads a socket option about the queue of ln, without the library.
func queueOption(t *testing.T, ln *acceptq.Listener, name int) int {
	t.Helper()
	return testkit.Option(t, ln.TCPListener(), testkit.SocketOption{Level: unix.SOL_SOCKET, Name: name})
}

// setSoacceptqueue sets the ceiling of the whole system, until the test ends.
func setSoacceptqueue(t *testing.T, ceiling int) {
	t.Helper()
	const name = "kern.ipc.soacceptqueue"
	before, err := unix.SysctlUint32(name)
	require.NoError(t, err)
	err = writeSysctl(name, uint32(ceiling))
	if os.Geteuid() != 0 || errors.Is(err, unix.EPERM) { // also for root of a jail
		t.Skipf("%s cannot be set (%v): run this test as root of the host", name, err)
	}
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, writeSysctl(name, before)) })
	now, err := unix.SysctlUint32(name)
	require.NoError(t, err)
	require.EqualValues(t, ceiling, now)
}

// writeSysctl sets an unsigned int. x/sys can only read sysctls.
func writeSysctl(name string, value uint32) error {
	var mib [unix.CTL_MAXNAME + 2]int32
	size := unix.CTL_MAXNAME * unsafe.Sizeof(mib[0])
	text := []byte(name)
	// The sysctl 0.3 translates a name to its numbers.
	err := sysctl([]int32{0, 3}, unsafe.Pointer(&mib), &size, unsafe.Pointer(&text[0]), uintptr(len(text)))
	if err != nil {
		return err
	}
	return sysctl(mib[:size/unsafe.Sizeof(mib[0])], nil, nil, unsafe.Pointer(&value), unsafe.Sizeof(value))
}

// sysctl is __sysctl(2).
func sysctl(mib []int32, old unsafe.Pointer, oldSize *uintptr, value unsafe.Pointer, size uintptr) error {
	_, _, errno := unix.Syscall6(unix.SYS___SYSCTL, uintptr(unsafe.Pointer(&mib[0])), uintptr(len(mib)),
		uintptr(old), uintptr(unsafe.Pointer(oldSize)), uintptr(value), size)
	if errno != 0 {
		return errno
	}
	return nil
}

// needCeiling skips a test if the ceiling is below n.
func needCeiling(t *testing.T, n uint32) (ceiling uint32) {
	t.Helper()
	ceiling, err := unix.SysctlUint32("kern.ipc.soacceptqueue")
	require.NoError(t, err)
	if ceiling < n {
		t.Skipf("kern.ipc.soacceptqueue is %d: sysctl kern.ipc.soacceptqueue=%d", ceiling, n)
	}
	return ceiling
}

// turnedAway connects one client to a full queue. Its handshake ends before the
// kernel looks at the queue; then it is reset.
func turnedAway(t *testing.T, addr net.Addr) {
	t.Helper()
	c, err := net.Dial(addr.Network(), addr.String())
	if err == nil {
		defer c.Close()
		require.NoError(t, c.SetReadDeadline(time.Now().Add(testkit.TooLong)))
		_, err = c.Read(make([]byte, 1))
	}
	require.ErrorIs(t, err, syscall.ECONNRESET)
}

// needReset skips a test if the kernel does not reset clients above the capacity.
func needReset(t *testing.T) {
	t.Helper()
	if reset, err := unix.SysctlUint32("net.inet.tcp.syncache.rst_on_sock_fail"); err == nil && reset == 0 {
		t.Skip("the kernel does not reset clients above the capacity: sysctl net.inet.tcp.syncache.rst_on_sock_fail=1")
	}
}
