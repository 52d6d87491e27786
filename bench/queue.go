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
	"time"
	"unsafe"

	"github.com/acceptq/acceptq"
	mdlayher "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const queued = 3 // how many wait in the queue that is read

// A reader finds out how many connections wait on one listener.
type reader struct {
	name string
	read func() (int, error)
}

// measureQueue times one reading of an accept queue while the namespace has more
// and more other sockets. Each reader must find what is there.
func measureQueue(c config) (*Result, error) {
	ln, err := acceptq.ListenTCP("127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer ln.Close()
	clients, err := fill(ln, queued)
	defer func() {
		for _, c := range clients {
			c.close()
		}
	}()
	if err != nil {
		return nil, err
	}
	diag, err := mdlayher.Dial(unix.NETLINK_SOCK_DIAG, nil)
	if err != nil {
		return nil, err
	}
	defer diag.Close()
	file, err := ln.File()
	if err != nil {
		return nil, err
	}
	defer file.Close()
	raw, err := file.SyscallConn() // Fd would make the listener blocking
	if err != nil {
		return nil, err
	}
	var fd int
	if err := raw.Control(func(f uintptr) { fd = int(f) }); err != nil { // it is ours until file closes
		return nil, err
	}
	readers := readersOf(ln, fd, diag)

	r := &Result{Title: "3. Reading the queue"}
	t := Table{Name: "queue", Title: "One reading, beside other TCP sockets in the namespace"}
	sizes := pick(c, []int{10, 1000, 10000}, []int{10, 100})
	wall := make([][][]float64, len(sizes)) // by size and reader, one for each round
	for s := range sizes {
		wall[s] = newSamples(len(readers), c.rounds)
	}
	others := crowd{}
	defer others.close()
	// Each round goes through all the sizes, so that they are compared with each
	// other in the same minute.
	for round := -1; round < c.rounds; round++ {
		for s, size := range sizes {
			if err := others.grow(size); err != nil {
				return nil, fmt.Errorf("%d other sockets: %w", size, err)
			}
			for k := range readers {
				i := (round + 1 + k) % len(readers)
				one, err := timed(c, readers[i])
				if err != nil {
					return nil, err
				}
				if round >= 0 {
					wall[s][i][round] = one
				}
			}
		}
		others.close()
	}
	for i, q := range readers {
		row := Row{Label: q.name}
		for s := range sizes {
			row.Cells = append(row.Cells, summarize(wall[s][i]), summarize(ratios(wall[s][i], wall[s][0])))
		}
		t.Rows = append(t.Rows, row)
	}
	for _, size := range sizes {
		t.Columns = append(t.Columns, Column{strconv.Itoa(size), "ns"}, Column{"× Stats", "×"})
	}
	t.Note = "nothing can read the two numbers for less than the two calls of getsockopt(2)"
	r.Tables = append(r.Tables, t)

	last := len(sizes) - 1
	flat, control := summarize(ratios(wall[last][0], wall[0][0])), summarize(ratios(wall[last][1], wall[0][1]))
	r.Goals = append(r.Goals, Goal{
		Text:   fmt.Sprintf("Stats is flat from %d to %d sockets", sizes[0], sizes[last]),
		Figure: fmt.Sprintf("%s, the control %s", flat.format("×"), control.format("×")),
		Holds:  flat.Median <= 1.1,
	})
	nearest := firstPeer
	for i := range t.Rows[firstPeer:] {
		if t.Rows[firstPeer+i].Cells[3].Median < t.Rows[nearest].Cells[3].Median {
			nearest = firstPeer + i
		}
	}
	r.Goals = append(r.Goals, Goal{
		Text: fmt.Sprintf("at %d sockets at least 50 × cheaper than the nearest (%s)", sizes[1], t.Rows[nearest].Label),
		Figure: fmt.Sprintf("%s; than its two system calls by hand %s", t.Rows[nearest].Cells[3].format("×"),
			format(t.Rows[nearest].Cells[3].Median/t.Rows[bareCalls].Cells[3].Median, "×")),
		Holds: t.Rows[nearest].Cells[3].Median >= 50,
	})
	return r, nil
}

// The rows that come first in the table are ours.
const (
	bareCalls = 2 // getsockopt(2) alone
	firstPeer = 3 // of another library, or another way
)

// timed runs a reader for a while, and returns the time of one reading.
func timed(c config, q reader) (float64, error) {
	atLeast := pick(c, 30*time.Millisecond, time.Microsecond)
	start := time.Now()
	for n := 1; ; n++ {
		found, err := q.read()
		if err != nil {
			return 0, fmt.Errorf("%s: %w", q.name, err)
		}
		if found != queued {
			return 0, fmt.Errorf("%s: found %d in the queue, and there are %d", q.name, found, queued)
		}
		// The clock itself would be a part of the cheap ones.
		if n&(n-1) == 0 || n%64 == 0 {
			if d := time.Since(start); d >= atLeast {
				return float64(d) / float64(n), nil
			}
		}
	}
}

func readersOf(ln *acceptq.Listener, fd int, diag *mdlayher.Conn) []reader {
	port := ln.Addr().(*net.TCPAddr).Port
	stats := func() (int, error) {
		s, err := ln.Stats()
		return s.Queued, err
	}
	readers := []reader{
		{"acceptq Stats", stats},
		{"acceptq Stats again (control)", stats},
		{"getsockopt(2) twice, by hand", func() (int, error) { return bareQueued(fd) }},
		{"mdlayher/netlink, one socket", func() (int, error) { return diagQueued(diag, port, false) }},
		{"mdlayher/netlink, dump of listeners", func() (int, error) { return diagQueued(diag, port, true) }},
		{"vishvananda/netlink, dump", func() (int, error) {
			all, err := netlink.SocketDiagTCP(unix.AF_INET)
			if err != nil {
				return 0, err
			}
			for _, s := range all {
				if s.State == listenState && int(s.ID.SourcePort) == port {
					return int(s.RQueue), nil
				}
			}
			return 0, os.ErrNotExist
		}},
		{"/proc/net/tcp", func() (int, error) { return procQueued(port) }},
	}
	if ss, err := exec.LookPath("ss"); err == nil {
		readers = append(readers, reader{"ss", func() (int, error) {
			out, err := exec.Command(ss, "-Hltn", "sport", "=", ":"+strconv.Itoa(port)).Output()
			if err != nil {
				return 0, err
			}
			f := strings.Fields(string(out)) // LISTEN Recv-Q Send-Q ...
			if len(f) < 3 {
				return 0, os.ErrNotExist
			}
			return strconv.Atoi(f[1])
		}})
	}
	return readers
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
			return 0, errno
		}
	}
	return int(binary.NativeEndian.Uint32(info[24:])), nil // tcpi_unacked
}

const listenState = 10 // TCP_LISTEN, net/tcp_states.h

// diagQueued asks sock_diag(7) for the listener of a port, by its address or by
// going through all that listen.
func diagQueued(conn *mdlayher.Conn, port int, dump bool) (int, error) {
	// struct inet_diag_req_v2, linux/inet_diag.h
	req := make([]byte, 56)
	req[0], req[1] = unix.AF_INET, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(req[4:], 1<<listenState)
	binary.BigEndian.PutUint16(req[8:], uint16(port))
	copy(req[12:], []byte{127, 0, 0, 1})
	binary.NativeEndian.PutUint64(req[48:], ^uint64(0)) // no cookie
	flags := mdlayher.Request
	if dump {
		flags |= mdlayher.Dump
	}
	rows, err := conn.Execute(mdlayher.Message{
		Header: mdlayher.Header{Type: unix.SOCK_DIAG_BY_FAMILY, Flags: flags},
		Data:   req,
	})
	if err != nil {
		return 0, err
	}
	for _, row := range rows { // struct inet_diag_msg
		if len(row.Data) >= 72 && int(binary.BigEndian.Uint16(row.Data[4:])) == port {
			return int(binary.NativeEndian.Uint32(row.Data[56:])), nil
		}
	}
	return 0, os.ErrNotExist
}

// procQueued reads the rx_queue column of the listener's line.
func procQueued(port int) (int, error) {
	text, err := os.ReadFile("/proc/thread-self/net/tcp")
	if err != nil {
		return 0, err
	}
	local := []byte(fmt.Sprintf("%08X:%04X", binary.NativeEndian.Uint32([]byte{127, 0, 0, 1}), port))
	for line := range bytes.Lines(text) {
		f := bytes.Fields(line)
		if len(f) > 4 && bytes.Equal(f[1], local) && bytes.Equal(f[3], []byte("0A")) {
			_, rx, _ := bytes.Cut(f[4], []byte(":"))
			n, err := strconv.ParseInt(string(rx), 16, 64)
			return int(n), err
		}
	}
	return 0, os.ErrNotExist
}

// A crowd is connections that have nothing to do with the listener; each has two
// sockets.
type crowd struct {
	ln    net.Listener
	conns []net.Conn
	ends  []rawClient
}

func (o *crowd) grow(sockets int) (err error) {
	if o.ln == nil {
		if o.ln, err = listenPlain("127.0.0.1:0"); err != nil {
			return err
		}
	}
	for len(o.conns)+len(o.ends) < sockets {
		end, err := connectRaw(o.ln.Addr())
		if err != nil {
			return err
		}
		o.ends = append(o.ends, end)
		conn, err := o.ln.Accept()
		if err != nil {
			return err
		}
		o.conns = append(o.conns, conn)
	}
	return nil
}

func (o *crowd) close() {
	for _, c := range o.ends {
		c.close()
	}
	for _, c := range o.conns {
		c.Close()
	}
	if o.ln != nil {
		o.ln.Close()
	}
	*o = crowd{}
}
