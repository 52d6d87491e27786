package acceptq

import (
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"strings"
)

// errNoRule is the error of asking for a ceiling where the package knows of none.
var errNoRule = fmt.Errorf("acceptq: the ceiling of this system: %w", errors.ErrUnsupported)

// parseSysctl reads the text of a /proc/sys file that holds one number of
// connections. The kernel ends it with a newline.
func parseSysctl(text string) (int, error) {
	n, err := strconv.ParseInt(strings.TrimSpace(text), 10, 32)
	if err != nil {
		return unknown, err
	}
	if n < 0 {
		return unknown, &strconv.NumError{Func: "ParseInt", Num: text, Err: strconv.ErrRange}
	}
	return int(n), nil
}

// netstatCounter reads one counter from the text of /proc/net/netstat: pairs of
// lines that begin with a table's name, first the columns' names, then their
// values. New columns come in anywhere, so a column is found by its name. It is
// unknown if the table or the column is not there, or holds no number.
func netstatCounter(text, table, column string) int64 {
	var names []string
	for line := range strings.Lines(text) {
		prefix, rest, _ := strings.Cut(line, ":")
		if prefix != table {
			continue
		}
		fields := strings.Fields(rest)
		if names == nil {
			names = fields
			continue
		}
		i := slices.Index(names, column)
		if i < 0 || i >= len(fields) {
			return unknown
		}
		n, err := strconv.ParseUint(fields[i], 10, 63)
		if err != nil {
			return unknown
		}
		return int64(n)
	}
	return unknown
}

// System is what the system says of listening as a whole. The numbers are those of the
// calling thread's network namespace on Linux, of the machine on FreeBSD. One that cannot
// be known, or that the system does not have, is -1.
type System struct {
	// Ceiling is the largest limit that listen(2) grants, in connections, and
	// Knob the name of the setting that holds it; "" where it is compiled in.
	Ceiling int
	Knob    string
	// SYNBacklog is the number of unfinished handshakes of which three quarters
	// suffice to refuse clients that are new to the system, when SYN cookies are off:
	// net.ipv4.tcp_max_syn_backlog. The limit of a socket bounds its SYN queue in any
	// case. Linux only.
	SYNBacklog int
	// SYNCookies is 0 when a full SYN queue drops, 1 when it answers with
	// cookies, 2 when every SYN is answered with one. Linux:
	// net.ipv4.tcp_syncookies, tcp(7). FreeBSD: net.inet.tcp.syncookies,
	// syncookies(4), 0 or 1.
	SYNCookies int
	// AbortOnOverflow is 1 when a finished handshake that meets a full accept
	// queue is reset, 0 when it is left to the client to find out. Linux:
	// net.ipv4.tcp_abort_on_overflow, tcp(7); a SYN that meets a full queue is
	// dropped all the same. FreeBSD: net.inet.tcp.syncache.rst_on_sock_fail.
	AbortOnOverflow int

	// The counters are those of /proc/net/netstat, TcpExt, by their names there,
	// since boot or since the namespace was made. Linux only. They count packets,
	// not clients.
	ListenOverflows   int64 // a full accept queue was met, at the SYN or at the final ACK
	ListenDrops       int64 // the same, and SYNs dropped for any other reason
	ReqQFullDrop      int64 // TCPReqQFullDrop: SYNs dropped for a full SYN queue
	ReqQFullDoCookies int64 // TCPReqQFullDoCookies: SYNs answered with a cookie instead
}

// MarshalJSON writes the numbers with lower-case names. One that is unknown is
// null.
func (s System) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		Ceiling           count  `json:"ceiling"`
		Knob              string `json:"knob"`
		SYNBacklog        count  `json:"synBacklog"`
		SYNCookies        count  `json:"synCookies"`
		AbortOnOverflow   count  `json:"abortOnOverflow"`
		ListenOverflows   count  `json:"listenOverflows"`
		ListenDrops       count  `json:"listenDrops"`
		ReqQFullDrop      count  `json:"reqQFullDrop"`
		ReqQFullDoCookies count  `json:"reqQFullDoCookies"`
	}{
		count(s.Ceiling), s.Knob, count(s.SYNBacklog), count(s.SYNCookies), count(s.AbortOnOverflow),
		count(s.ListenOverflows), count(s.ListenDrops), count(s.ReqQFullDrop), count(s.ReqQFullDoCookies),
	})
}

// ReadSystem reads what the system says of listening now; nothing is kept. What
// cannot be read is -1 in the answer and no error: the error, which matches
// [errors.ErrUnsupported], is for systems of which the package can read nothing.
func ReadSystem() (System, error) {
	return realSystem.readSystem()
}

func (sys *system) readSystem() (System, error) {
	s := System{
		Ceiling: unknown, SYNBacklog: unknown, SYNCookies: unknown, AbortOnOverflow: unknown,
		ListenOverflows: unknown, ListenDrops: unknown, ReqQFullDrop: unknown, ReqQFullDoCookies: unknown,
	}
	r, known := ruleOf(runtime.GOOS)
	if !known {
		return s, errNoRule
	}
	s.Knob = r.knob
	s.Ceiling, _, _ = sys.bounds()
	sys.describe(&s)
	return s, nil
}
