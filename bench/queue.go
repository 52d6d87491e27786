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
	readers := readersOf(ln, diag)

	r := &Result{Title: "3. Reading the queue"}
	t := Table{Name: "queue", Title: "One reading, beside other TCP sockets in the namespace"}
	for _, q := range readers {
		t.Rows = append(t.Rows, Row{Label: q.name})
	}
	others := crowd{}
	defer others.close()
	sizes := pick(c, []int{10, 1000, 10000}, []int{10, 100})
	for _, size := range sizes {
		if err := others.grow(size); err != nil {
			return nil, fmt.Errorf("%d other sockets: %w", size, err)
		}
		wall := newSamples(len(readers), c.rounds)
		err := interleave(c, len(readers), func(round, i int) error {
			one, err := timed(c, readers[i])
			if round >= 0 {
				wall[i][round] = one
			}
			return err
		})
		if err != nil {
			return nil, err
		}
		t.Columns = append(t.Columns, Column{strconv.Itoa(size), "ns"}, Column{"× Stats", "×"})
		for i := range readers {
			t.Rows[i].Cells = append(t.Rows[i].Cells, summarize(wall[i]), summarize(ratios(wall[i], wall[0])))
		}
	}
	r.Tables = append(r.Tables, t)

	first, last := t.Rows[0].Cells[0], t.Rows[0].Cells[len(t.Rows[0].Cells)-2]
	r.Goals = append(r.Goals, Goal{
		Text:   fmt.Sprintf("Stats is flat from %d to %d sockets", sizes[0], sizes[len(sizes)-1]),
		Figure: format(last.Median/first.Median, "×"),
		Holds:  last.Median/first.Median <= 1.1,
	})
	// The control is Stats itself; the second column of figures is of 1,000.
	nearest := 2
	for i := range t.Rows[2:] {
		if t.Rows[2+i].Cells[3].Median < t.Rows[nearest].Cells[3].Median {
			nearest = 2 + i
		}
	}
	r.Goals = append(r.Goals, Goal{
		Text:   fmt.Sprintf("at %d sockets at least 50 × cheaper than the nearest (%s)", sizes[1], t.Rows[nearest].Label),
		Figure: t.Rows[nearest].Cells[3].format("×"),
		Holds:  t.Rows[nearest].Cells[3].Median >= 50,
	})
	return r, nil
}

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

func readersOf(ln *acceptq.Listener, diag *mdlayher.Conn) []reader {
	port := ln.Addr().(*net.TCPAddr).Port
	stats := func() (int, error) {
		s, err := ln.Stats()
		return s.Queued, err
	}
	readers := []reader{
		{"acceptq Stats", stats},
		{"acceptq Stats again (control)", stats},
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
}
