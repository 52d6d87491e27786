//go:build linux

package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"github.com/acceptq/acceptq"
	mdlayher "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// readQueued is the number of clients in the queue that is read. It is more than 1
// because SocketGet of vishvananda/netlink fails then; see TestSocketGet.
const readQueued = 3

// openReaders returns for each of readerNames a function that returns the number of queued
// connections of ln.
func openReaders(b *testing.B, ln *acceptq.Listener) (readers map[string]func() (int, error), closeAll func()) {
	diag, err := mdlayher.Dial(unix.NETLINK_SOCK_DIAG, nil)
	if err != nil {
		b.Fatal(err)
	}
	file, err := ln.File()
	if err != nil {
		b.Fatal(err)
	}
	raw, err := file.SyscallConn() // Fd would make the listener blocking
	if err != nil {
		b.Fatal(err)
	}
	var fd int
	raw.Control(func(f uintptr) { fd = int(f) }) // open until file is closed
	port := ln.Addr().(*net.TCPAddr).Port
	stats := func() (int, error) {
		s, err := ln.Stats()
		return s.Queued, err
	}
	readers = map[string]func() (int, error){}
	for i, read := range []func() (int, error){
		stats,
		stats,
		func() (int, error) { return bareQueued(fd) },
		func() (int, error) { return diagQueued(diag, port, mdlayher.Request) },
		func() (int, error) { return diagQueued(diag, port, mdlayher.Request|mdlayher.Dump) },
		func() (int, error) {
			rows, err := netlink.SocketDiagTCP(unix.AF_INET)
			for _, s := range rows {
				if s.State == listenState && int(s.ID.SourcePort) == port {
					return int(s.RQueue), err
				}
			}
			return -1, err
		},
		func() (int, error) { return procQueued(port) },
		func() (int, error) {
			out, err := exec.Command("ss", "-Hltn", "sport", "=", ":"+strconv.Itoa(port)).Output()
			if f := strings.Fields(string(out)); len(f) > 2 { // LISTEN Recv-Q Send-Q ...
				return strconv.Atoi(f[1])
			}
			return -1, err
		},
	} {
		readers[readerNames[i]] = read
	}
	return readers, func() { diag.Close(); file.Close() }
}

// bareQueued makes the two system calls that Stats makes, and nothing else.
func bareQueued(fd int) (int, error) {
	var info [32]byte // struct tcp_info, up to tcpi_sacked
	var mem [unix.SK_MEMINFO_VARS]uint32
	for _, call := range []struct {
		level, name int
		p           unsafe.Pointer
		size        uint32
	}{
		{unix.IPPROTO_TCP, unix.TCP_INFO, unsafe.Pointer(&info), uint32(len(info))},
		{unix.SOL_SOCKET, unix.SO_MEMINFO, unsafe.Pointer(&mem), uint32(unsafe.Sizeof(mem))},
	} {
		if _, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(call.level), uintptr(call.name),
			uintptr(call.p), uintptr(unsafe.Pointer(&call.size)), 0); errno != 0 {
			return -1, errno
		}
	}
	return int(binary.NativeEndian.Uint32(info[24:])), nil // tcpi_unacked
}

const listenState = 10 // TCP_LISTEN, net/tcp_states.h

// diagQueued reads the listener of a port from sock_diag(7): by its address, or with
// the flag Dump by a listing of all listeners.
func diagQueued(conn *mdlayher.Conn, port int, flags mdlayher.HeaderFlags) (int, error) {
	req := make([]byte, 56) // struct inet_diag_req_v2, linux/inet_diag.h
	req[0], req[1] = unix.AF_INET, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(req[4:], 1<<listenState)
	binary.BigEndian.PutUint16(req[8:], uint16(port))
	copy(req[12:], []byte{127, 0, 0, 1})
	binary.NativeEndian.PutUint64(req[48:], ^uint64(0)) // no cookie
	rows, err := conn.Execute(mdlayher.Message{Header: mdlayher.Header{Type: unix.SOCK_DIAG_BY_FAMILY, Flags: flags}, Data: req})
	for _, row := range rows { // struct inet_diag_msg
		if len(row.Data) >= 72 && int(binary.BigEndian.Uint16(row.Data[4:])) == port {
			return int(binary.NativeEndian.Uint32(row.Data[56:])), err
		}
	}
	return -1, err
}

// procQueued reads the column rx_queue in the line of the listener.
func procQueued(port int) (int, error) {
	text, err := os.ReadFile("/proc/thread-self/net/tcp")
	local := fmt.Appendf(nil, "%08X:%04X", binary.NativeEndian.Uint32([]byte{127, 0, 0, 1}), port)
	for line := range bytes.Lines(text) {
		f := bytes.Fields(line)
		if len(f) > 4 && bytes.Equal(f[1], local) && string(f[3]) == "0A" {
			_, rx, _ := bytes.Cut(f[4], []byte(":"))
			n, err := strconv.ParseInt(string(rx), 16, 64)
			return int(n), err
		}
	}
	return -1, err
}

// TestSocketGet shows why SocketGet of vishvananda/netlink is not measured. It looks up
// an address and accepts a maximum of two sockets in the answer. But the listener and
// every queued connection have the same local address.
func TestSocketGet(t *testing.T) {
	ln, err := acceptq.ListenTCP("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for queued := range readQueued {
		s, err := netlink.SocketGet(ln.Addr(), &net.TCPAddr{IP: net.IPv4zero})
		if queued < 2 && err != nil || queued >= 2 && err == nil {
			t.Errorf("%d queued: %+v, %v", queued, s, err)
		}
		c, err := connectRaw(ln.Addr())
		if err != nil {
			t.Fatal(err)
		}
		defer c.close()
		if err := awaitQueued(ln, queued+1); err != nil {
			t.Fatal(err)
		}
	}
}
