package main

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/observe"
	"github.com/stretchr/testify/require"
)

// machine is a machine with a server that is stuck, a SO_REUSEPORT group, and a process that
// cannot be read.
func machine() reading {
	device := queue("0.0.0.0:9000", 7, 0, 4096, 0)
	device.Device = "eth0"
	only6 := queue("[::]:443", 8, 1, 511, 0, process(812, "nginx"), process(813, "nginx"), process(814, "nginx"))
	only6.V6Only = true
	return at(0,
		queue("127.0.0.1:8000", 1, 6, 5, 12, process(4711, "python3")),
		queue("127.0.0.1:8080", 2, 104, 127, 0, process(20, "app")),
		queue("127.0.0.1:8080", 3, 0, 127, 3, process(20, "app")),
		only6,
		device,
	)
}

func TestTable(t *testing.T) {
	now := machine()
	now.complete = false
	lines := strings.Split(table(now, nil, false, style{}), "\n")
	require.Contains(t, lines[len(lines)-2], "? Some processes cannot be read")
	require.Equal(t, strings.TrimPrefix(`
ADDRESS                  PROCESS       QUEUED                LIMIT  DROPS
127.0.0.1:8000           python3 4711  [##########] 6/6          5     12
127.0.0.1:8080 (1 of 2)  app 20        [########  ] 104/128    127      0
127.0.0.1:8080 (2 of 2)  app 20        [          ] 0/128      127      3
[::]:443 v6              nginx 812 +2  [#         ] 1/512      511      0
0.0.0.0:9000%eth0        ?             [          ] 0/4097    4096      0
`, "\n"), strings.Join(lines[:len(lines)-3], "\n")+"\n")
}

// On a narrow terminal no line is longer than the terminal, and nothing is left out.
func TestTableOfFortyColumns(t *testing.T) {
	now := machine()
	now.namespaces[0].listeners = now.namespaces[0].listeners[:2]
	long := queue("[2001:db8:1111:2222:3333:4444:5555:6666]:65535", 9, 1, 4096, 1<<32-1, process(1<<22, "a-name-of-15-by"))
	now.namespaces[0].listeners = append(now.namespaces[0].listeners, long)
	require.Equal(t, strings.TrimPrefix(`
127.0.0.1:8000
  python3 4711
  [##########] 6/6
  limit 5, drops 12
127.0.0.1:8080
  app 20
  [########  ] 104/128
  limit 127, drops 0
[2001:db8:1111:2222:3333:4444:5555:6666]
:65535
  a-name-of-15-by 4194304
  [#         ] 1/4097
  limit 4096, drops 4294967295
`, "\n"), table(now, nil, false, style{width: 40}))
	for width := 20; width < 100; width++ {
		for line := range strings.Lines(table(machine(), &now, true, style{width: width})) {
			require.LessOrEqual(t, utf8.RuneCountInString(strings.TrimSuffix(line, "\n")), width)
		}
	}
}

// Rates are those since the earlier reading. A counter that has wrapped has not gone back, and
// a listener that was not there has none.
func TestTableWithRates(t *testing.T) {
	before := at(0, queue("127.0.0.1:1", 1, 0, 9, 100), queue("127.0.0.1:2", 2, 0, 9, 1<<32-5), queue("127.0.0.1:3", 3, 0, 9, unknown),
		queue("127.0.0.1:9", 5, 0, 9, 7))
	now := at(4, queue("127.0.0.1:1", 1, 0, 9, 110), queue("127.0.0.1:2", 2, 0, 9, 5), queue("127.0.0.1:3", 3, 0, 9, unknown),
		queue("127.0.0.1:4", 4, 0, 9, 9), queue("127.0.0.1:5", 5, 0, 9, 9))
	var last []string
	for line := range strings.Lines(table(now, &before, true, style{})) {
		f := strings.Fields(line)
		if len(f) == 0 {
			break // the notes follow
		}
		last = append(last, f[len(f)-2]+" "+f[len(f)-1])
	}
	require.Equal(t, []string{"DROPS DROPS/S", "110 2.5", "5 2.5", "- -", "9 -", "9 -"}, last)
}

func TestColors(t *testing.T) {
	text := table(machine(), nil, false, style{width: 100, color: true})
	require.Contains(t, text, "\x1b[31m127.0.0.1:8000")
	require.Contains(t, text, "\x1b[33m127.0.0.1:8080 (1 of 2)")
	require.Contains(t, text, "\n127.0.0.1:8080 (2 of 2)")
	require.NotContains(t, table(machine(), nil, false, style{width: 100}), "\x1b")
}

// A namespace has its own column, and the order is that of the fullest of all.
func TestTableOfNamespaces(t *testing.T) {
	now := at(0, queue("127.0.0.1:1", 1, 1, 9, 0, process(1, "a")))
	now.namespaces = append(now.namespaces, namespace{name: "docker 0123456789ab", listeners: []listener{
		queue("127.0.0.1:1", 2, 10, 9, 0, process(2, "b")),
	}})
	now.notes = []string{"The network namespace x cannot be read: no."}
	require.Equal(t, strings.TrimPrefix(`
ADDRESS      PROCESS  QUEUED              LIMIT  DROPS  NAMESPACE
127.0.0.1:1  b 2      [##########] 10/10      9      0  docker 0123456789ab
127.0.0.1:1  a 1      [#         ] 1/10       9      0

The network namespace x cannot be read: no.
`, "\n"), table(now, nil, false, style{}))
}

// Without processes the table has no such column, and no note that they are unknown.
func TestTableWithoutProcesses(t *testing.T) {
	now := at(0, queue("127.0.0.1:1", 1, 1, 9, 0))
	now.processesAt, now.complete = time.Time{}, false
	require.Equal(t, strings.TrimPrefix(`
ADDRESS      QUEUED             LIMIT  DROPS
127.0.0.1:1  [#         ] 1/10      9      0
`, "\n"), table(now, nil, false, style{}))
	require.Equal(t, "127.0.0.1:1\n  [#         ] 1/10\n  limit 9, drops 0\n", table(now, nil, false, style{width: 20}))
}

// systemd, the process 1, keeps a socket that it has passed to a server.
func TestSystemdIsNotTheServer(t *testing.T) {
	systemd, server := process(1, "systemd"), process(20, "app")
	require.Equal(t, []observe.Process{server, systemd}, systemdLast([]observe.Process{systemd, server}))
	require.Equal(t, []observe.Process{systemd}, systemdLast([]observe.Process{systemd}))
	require.Empty(t, systemdLast(nil))
}

// While the table is repeated, the processes are read again if a listener is new or if they
// are old.
func TestProcessesAreKept(t *testing.T) {
	before := at(0, queue("127.0.0.1:1", 1, 0, 9, 0, process(1, "a")), queue("127.0.0.1:2", 2, 0, 9, 0))
	for _, test := range []struct {
		now  reading
		kept bool
	}{
		{at(9, queue("127.0.0.1:1", 1, 0, 9, 0)), true},
		{at(10, queue("127.0.0.1:1", 1, 0, 9, 0)), false},
		{at(1, queue("127.0.0.1:1", 3, 0, 9, 0)), false},
		{at(1, queue("127.0.0.1:2", 1, 0, 9, 0)), false},
	} {
		now := test.now
		require.Equal(t, test.kept, now.keepProcesses(&before))
		if test.kept {
			require.Equal(t, before.namespaces[0].listeners[0].Processes, now.namespaces[0].listeners[0].Processes)
			require.Equal(t, before.at, now.processesAt)
		}
	}
	now := at(0)
	require.False(t, now.keepProcesses(nil))
}

func TestEmptyTable(t *testing.T) {
	require.Equal(t, "Nothing listens here.\n", table(at(0), nil, false, style{}))
}

// Only a full queue has a full bar, and only an empty one has an empty bar.
func TestBar(t *testing.T) {
	for want, s := range map[string]acceptq.Stats{
		"[          ]": {Queued: 0, Capacity: 100},
		"[#         ]": {Queued: 1, Capacity: 100_000},
		"[#####     ]": {Queued: 50, Capacity: 100},
		"[######### ]": {Queued: 99, Capacity: 100},
		"[##########]": {Queued: 101, Capacity: 100},
		"[??????????]": {Queued: unknown, Capacity: 100},
	} {
		require.Equal(t, want, bar(s))
	}
}

// A process may give itself any name, which must not reach the terminal as it is.
func TestNamesArePrintable(t *testing.T) {
	require.Equal(t, "a?[31mb", printable("a\x1b[31mb"))
	require.Equal(t, "?", printable(""))
	require.Equal(t, "?é?", printable("\u009bé\x7f"))
	require.Equal(t, "?dx", printable("\u202edx"), "text from right to left")
}

// So may a user with a network namespace do with an interface. It is in the address of a
// listener that is bound to it, and in the zone of a client.
func TestInterfacesArePrintable(t *testing.T) {
	const name = "x\x1b[2J\x1bc"
	device, zone := queue("127.0.0.1:1", 1, 2, 1, 0), queue("127.0.0.1:2", 2, 2, 1, 0)
	device.Device = name
	zone.Device, zone.Addr = name, netip.AddrPortFrom(netip.MustParseAddr("fe80::1").WithZone(name), 2)
	client := netip.AddrPortFrom(netip.MustParseAddr("fe80::2").WithZone(name), 3)
	for _, l := range []listener{device, zone} {
		l.waiting = []acceptq.Waiting{{Client: client, Waited: time.Minute}}
		now := at(0, l)
		for _, text := range []string{
			table(now, nil, false, style{}),
			report(judge(nil, now), now),
			waitingText([]*listener{&l}, l.waiting, nil),
			use{listeners: []listener{l}}.text(),
		} {
			require.NotContains(t, text, "\x1b")
			require.Contains(t, text, "%x?[2J?c")
		}
	}
}

// The JSON of the table does not change, because programs read it.
func TestJSON(t *testing.T) {
	before, now := at(0, queue("127.0.0.1:1", 1, 0, 9, 0)), at(2, queue("127.0.0.1:1", 1, 0, 9, 3, process(5, "a")))
	now.namespaces[0].listeners = append(now.namespaces[0].listeners, queue("[::1]:2", 2, unknown, 9, unknown))
	text, err := asJSON(now, &before, true)
	require.NoError(t, err)
	require.Equal(t, `{"time":"2027-01-15T08:00:02Z","listeners":[`+
		`{"addr":"127.0.0.1:1","v6Only":false,"device":"","stats":{"queued":0,"incomplete":null,"limit":9,"capacity":10,"drops":3},`+
		`"uid":33,"inode":1,"processes":[{"pid":5,"name":"a"}],"namespace":"","dropsPerSecond":1.5},`+
		`{"addr":"[::1]:2","v6Only":false,"device":"","stats":{"queued":null,"incomplete":null,"limit":9,"capacity":10,"drops":null},`+
		`"uid":33,"inode":2,"processes":null,"namespace":""}],"complete":true}`+"\n", text)

	text, err = asJSON(at(0, queue("127.0.0.1:1", 1, 0, 9, 0, process(5, "a\u009b\x7fé"))), nil, true)
	require.NoError(t, err)
	require.Contains(t, text, `"a\u009b\u007fé"`)

	text, err = asJSON(at(0), nil, false)
	require.NoError(t, err)
	require.True(t, json.Valid([]byte(text)))
	require.Contains(t, text, "\n  \"listeners\": [],")
}

func TestFold(t *testing.T) {
	require.Equal(t, "short", fold("short", 0))
	require.Equal(t, "two words\nare three", fold("two words are three", 10))
	require.Equal(t, "0123456789\n0123", fold("01234567890123", 10))
}

// If the output ends, as a pipe to head does, the command ends too.
func TestOutputThatEnds(t *testing.T) {
	if _, err := acceptq.Queues(t.Context()); err != nil {
		t.Skip("no queues on this system:", err)
	}
	for _, args := range [][]string{nil, {"-json"}, {"-w"}, {"check"}, {"who", "1"}, {"waiting", "1"}, {"help"}} {
		var stderr strings.Builder
		require.Equal(t, statusUnknown, run(t.Context(), style{}, args, failing{}, &stderr), args)
		require.Equal(t, "acceptq: "+errFailing.Error()+"\n", stderr.String())
	}
	err := list(t.Context(), style{}, listing{watch: true}, failing{})
	require.ErrorIs(t, err, errFailing)
	ended, end := context.WithCancel(t.Context())
	end()
	require.ErrorIs(t, list(ended, style{}, listing{}, failing{}), context.Canceled)
}

var errFailing = errors.New("no more output")

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, errFailing }
