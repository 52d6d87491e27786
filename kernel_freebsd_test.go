package acceptq

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestConstantsAreOfTheSystem(t *testing.T) {
	require.Equal(t, unix.SO_LISTENQLIMIT, soListenQueueLimit)
	name, err := reusePort()
	require.NoError(t, err)
	require.Equal(t, unix.SO_REUSEPORT_LB, name)
}

// The account is what the kernel stored, for every request, under the default
// ceiling and under one that has more than 16 bits.
func TestAccountIsTheKernels(t *testing.T) {
	requests := []int{math.MinInt, math.MinInt32, -1, 0, 1, 2, 5, 127, 128, 129, 1000, 65536, math.MaxInt32, math.MaxInt}
	for _, ceiling := range []int{128, 100000} {
		t.Run(fmt.Sprintf("ceiling %d", ceiling), func(t *testing.T) {
			setSoacceptqueue(t, ceiling)
			for _, n := range requests {
				limit := n
				if n < 0 || n > ceiling {
					limit = ceiling
				}
				ln, err := ListenTCP("127.0.0.1:0", WithBacklog(n))
				require.NoError(t, err)
				require.Equal(t, Backlog{
					Requested: max(n, -1), Ceiling: ceiling, Limit: limit,
					Effective: 3 * limit / 2, Capacity: 3*limit/2 + 1, Measured: true,
				}, ln.Backlog(), "listen(%d)", n)
				require.Equal(t, 3*limit/2, ln.EffectiveBacklog(), "listen(%d)", n)
				require.Equal(t, limit, queueOption(t, ln, unix.SO_LISTENQLIMIT), "listen(%d)", n)
				require.NoError(t, ln.Close())
			}
		})
	}
}

// A listening socket keeps its limit when the ceiling is raised, the account
// shows the new ceiling, and listening again is granted more.
func TestCeilingRaisedUnderWay(t *testing.T) {
	setSoacceptqueue(t, 128)
	ln := bsdListen(t, "127.0.0.1:0", WithBacklog(1000))
	want := Backlog{Requested: 1000, Ceiling: 128, Limit: 128, Effective: 192, Capacity: 193, Measured: true}
	require.Equal(t, want, ln.Backlog())
	require.True(t, ln.Backlog().Clamped())
	_, err := ListenTCP("127.0.0.1:0", WithBacklog(1000), WithStrictBacklog())
	var clamp *ClampError
	require.ErrorAs(t, err, &clamp)
	require.Equal(t, &ClampError{
		Requested: 1000, Limit: 128, Ceiling: 128,
		Knob: "kern.ipc.soacceptqueue", Raise: "sysctl kern.ipc.soacceptqueue=1000",
	}, clamp)

	setSoacceptqueue(t, 4096)
	want.Ceiling = 4096
	require.Equal(t, want, ln.Backlog())
	require.Equal(t, 128, queueOption(t, ln, unix.SO_LISTENQLIMIT))
	bsdListen(t, "127.0.0.1:0", WithBacklog(1000), WithStrictBacklog())

	again := listenAgain(t, ln, 1000)
	require.Equal(t, Backlog{Requested: 1000, Ceiling: 4096, Limit: 1000, Effective: 1500, Capacity: 1501, Measured: true}, again)
	require.Equal(t, 1000, queueOption(t, ln, unix.SO_LISTENQLIMIT))
}

// Listening again grows and shrinks the queue at once.
func TestListenAgain(t *testing.T) {
	ceiling, _, err := realSystem.bounds()
	require.NoError(t, err)
	ln := bsdListen(t, "127.0.0.1:0", WithBacklog(5))
	for _, step := range []struct{ n, limit int }{{50, 50}, {0, 0}, {-1, ceiling}, {10, 10}} {
		account := listenAgain(t, ln, step.n)
		require.Equal(t, step.limit, account.Limit)
		require.Equal(t, step.limit, queueOption(t, ln, unix.SO_LISTENQLIMIT))
	}
}

// A full queue resets the surplus client after its handshake, so that connect
// succeeds or not: who survives is what counts.
func TestWhatReallyFits(t *testing.T) {
	for _, tt := range []struct{ limit, held int }{
		{0, 1}, {1, 2}, {2, 4}, {3, 5}, {4, 7}, {5, 8}, {10, 16}, {100, 151}, {128, 193},
	} {
		if testing.Short() && tt.limit > 10 {
			continue
		}
		t.Run(fmt.Sprintf("limit %d", tt.limit), func(t *testing.T) {
			ln := bsdListen(t, "127.0.0.1:0", WithBacklog(tt.limit), WithStrictBacklog())
			require.Equal(t, tt.held, ln.Backlog().Capacity)

			for i := range tt.held + 3 {
				client, err := bsdDial(t, ln)
				if i < tt.held {
					require.NoError(t, err, "client %d", i+1)
					continue
				}
				if err == nil {
					require.NoError(t, client.SetReadDeadline(time.Now().Add(tooLong)))
					_, err = client.Read(make([]byte, 1))
				}
				require.ErrorIs(t, err, unix.ECONNRESET, "client %d", i+1)
			}

			require.Equal(t, tt.held, queueOption(t, ln, unix.SO_LISTENQLEN))
			bsdAccept(t, ln, tt.held)
			require.Zero(t, queueOption(t, ln, unix.SO_LISTENQLEN), "more than the capacity survived")
		})
	}
}

func TestReusePortSpreads(t *testing.T) {
	needSpread(t)
	first := bsdListen(t, "127.0.0.1:0", WithReusePort())
	second := bsdListen(t, first.Addr().String(), WithReusePort())
	_, err := ListenTCP(first.Addr().String())
	require.ErrorIs(t, err, unix.EADDRINUSE)

	accepted := make(chan int, 2)
	for _, ln := range []*Listener{first, second} {
		go func() {
			n := 0
			defer func() { accepted <- n }()
			for {
				conn, err := ln.Accept()
				if err != nil {
					return
				}
				n++
				conn.Write([]byte("!"))
				conn.Close()
			}
		}()
	}
	const clients = 64 // that one listener gets them all has a chance of 1 in 2^63
	for range clients {
		client, err := bsdDial(t, first)
		require.NoError(t, err)
		require.NoError(t, client.SetReadDeadline(time.Now().Add(tooLong)))
		_, err = io.ReadFull(client, make([]byte, 1))
		require.NoError(t, err)
	}
	first.Close()
	second.Close()
	a, b := <-accepted, <-accepted
	require.Equal(t, clients, a+b)
	require.NotZero(t, a)
	require.NotZero(t, b)
}

// queueOption asks the kernel about the queue of ln, past the library.
func queueOption(t *testing.T, ln *Listener, name int) int {
	t.Helper()
	return option(t, ln.TCPListener(), socketOption{unix.SOL_SOCKET, name})
}

// setSoacceptqueue sets the ceiling of the whole system, until the test ends.
func setSoacceptqueue(t *testing.T, ceiling int) {
	t.Helper()
	const name = "kern.ipc.soacceptqueue"
	before, err := unix.SysctlUint32(name)
	require.NoError(t, err)
	err = writeSysctl(name, uint32(ceiling))
	if os.Geteuid() != 0 || errors.Is(err, unix.EPERM) { // root of a jail may not
		t.Skipf("%s cannot be set (%v): run this test as root of the host", name, err)
	}
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, writeSysctl(name, before)) })
	now, err := unix.SysctlUint32(name)
	require.NoError(t, err)
	require.EqualValues(t, ceiling, now)
}

// writeSysctl sets an unsigned int. x/sys reads sysctls only.
func writeSysctl(name string, value uint32) error {
	var mib [unix.CTL_MAXNAME + 2]int32
	size := unix.CTL_MAXNAME * unsafe.Sizeof(mib[0])
	text := []byte(name)
	// Setting 0.3 to a name reads back the numbers of it.
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
