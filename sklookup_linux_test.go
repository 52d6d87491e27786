package acceptq

import (
	"encoding/binary"
	"os"
	"runtime"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// Commands of bpf(2) and constants of linux/bpf.h.
const (
	bpfMapCreate, bpfMapUpdate, bpfProgLoad, bpfLinkCreate = 0, 2, 5, 28

	bpfSockmap, bpfSkLookup, bpfAttachSkLookup = 15, 30, 36

	bpfCallLookup, bpfCallRelease, bpfCallAssign = 1, 86, 124

	bpfLookupPort = 60 // offset of local_port in struct bpf_sk_lookup, in host byte order
)

// bpf calls bpf(2) with an attribute and returns a descriptor.
func bpf[A any](t *testing.T, command uintptr, attr *A) int {
	t.Helper()
	fd, _, errno := unix.Syscall(unix.SYS_BPF, command, uintptr(unsafe.Pointer(attr)), unsafe.Sizeof(*attr))
	if errno == unix.EPERM || errno == unix.ENOSYS {
		t.Skip("bpf(2) is not allowed here: run as root, in the user namespace of the system")
	}
	require.Zero(t, errno, "bpf command %d", command)
	return int(fd)
}

// steerPortTo gives ln the clients of a local port, in the namespace of this test. It uses
// a program of type sk_lookup.
func steerPortTo(t *testing.T, port int, ln *Listener) {
	t.Helper()
	sockets := bpf(t, bpfMapCreate, &struct{ kind, key, value, entries, flags, _ uint32 }{bpfSockmap, 4, 8, 1, 0, 0})
	t.Cleanup(func() { unix.Close(sockets) })
	require.NoError(t, ln.intake.raw.Control(func(fd uintptr) {
		key, value := new(uint32), new(uint64)
		*value = uint64(fd)
		bpf(t, bpfMapUpdate, &struct {
			fd, _             uint32
			key, value, flags uint64
		}{uint32(sockets), 0, uint64(uintptr(unsafe.Pointer(key))), uint64(uintptr(unsafe.Pointer(value))), 0})
		runtime.KeepAlive(key)
		runtime.KeepAlive(value)
	}))
	var code []byte
	ins := func(op, dst, src byte, offset int16, immediate int32) {
		registers := dst | src<<4
		if binary.NativeEndian.Uint16([]byte{0, 1}) == 1 {
			registers = dst<<4 | src
		}
		code = append(code, op, registers)
		code = binary.NativeEndian.AppendUint16(code, uint16(offset))
		code = binary.NativeEndian.AppendUint32(code, uint32(immediate))
	}
	ins(0xbf, 6, 1, 0, 0)              // r6 = context
	ins(0x61, 2, 6, bpfLookupPort, 0)  // r2 = local port
	ins(0x55, 2, 0, 14, int32(port))   // if it is another port, goto pass
	ins(0x62, 10, 0, -4, 0)            // key = 0
	ins(0x18, 1, 1, 0, int32(sockets)) // r1 = sockets
	ins(0, 0, 0, 0, 0)                 // the second half of the address
	ins(0xbf, 2, 10, 0, 0)             // r2 = &key
	ins(0x07, 2, 0, 0, -4)             //
	ins(0x85, 0, 0, 0, bpfCallLookup)  // r0 = the socket
	ins(0x15, 0, 0, 7, 0)              // if there is none, goto pass
	ins(0xbf, 7, 0, 0, 0)              // r7 = the socket
	ins(0xbf, 1, 6, 0, 0)              // assign(context, socket, 0)
	ins(0xbf, 2, 7, 0, 0)              //
	ins(0xb7, 3, 0, 0, 0)              //
	ins(0x85, 0, 0, 0, bpfCallAssign)  //
	ins(0xbf, 1, 7, 0, 0)              // release(socket)
	ins(0x85, 0, 0, 0, bpfCallRelease) //
	ins(0xb7, 0, 0, 0, 1)              // pass: return SK_PASS
	ins(0x95, 0, 0, 0, 0)              // exit
	license := []byte("GPL\x00")
	program := bpf(t, bpfProgLoad, &struct {
		kind, count             uint32
		code, license           uint64
		logLevel, logSize       uint32
		log                     uint64
		version, flags          uint32
		name                    [16]byte
		ifindex, expectedAttach uint32
	}{
		kind: bpfSkLookup, count: uint32(len(code) / 8), code: uint64(uintptr(unsafe.Pointer(&code[0]))),
		license: uint64(uintptr(unsafe.Pointer(&license[0]))), expectedAttach: bpfAttachSkLookup,
	})
	runtime.KeepAlive(code)
	runtime.KeepAlive(license)
	defer unix.Close(program)
	ns, err := os.Open("/proc/thread-self/ns/net")
	require.NoError(t, err)
	defer ns.Close()
	link := bpf(t, bpfLinkCreate, &struct{ program, target, kind, flags uint32 }{uint32(program), uint32(ns.Fd()), bpfAttachSkLookup, 0})
	t.Cleanup(func() { unix.Close(link) })
}
