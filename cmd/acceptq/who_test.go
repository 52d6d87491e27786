package main

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/observe"
	"github.com/stretchr/testify/require"
)

// conn returns a connection from port 8080.
func conn(remote string, state uint8, inode uint64, processes ...observe.Process) connection {
	return connection{netip.MustParseAddrPort("127.0.0.1:8080"), netip.MustParseAddrPort(remote), state, inode, processes}
}

func TestWho(t *testing.T) {
	for name, test := range map[string]struct {
		use  use
		want string
	}{
		"a free port": {use{}, `
:8080 is free: no TCP socket of this network namespace uses it.
`},
		"a server with clients": {use{listeners: []listener{queue("0.0.0.0:8080", 1, 1, 511, 0, process(812, "nginx"))}, connections: []connection{
			conn("192.0.2.1:1", 1, 7, process(813, "nginx")), conn("192.0.2.1:2", 1, 8, process(813, "nginx")),
			conn("192.0.2.1:3", 1, 0), conn("192.0.2.1:4", timeWait, 0),
		}}, `
nginx (pid 812) listens on 0.0.0.0:8080: 1 queued of 512 (0%), limit 511, drops 0
4 connections have 8080 as the local port:
  2 ESTABLISHED, nginx 813, for example to 192.0.2.1:1
  1 ESTABLISHED, in the accept queue, for example to 192.0.2.1:3
  1 TIME_WAIT, no process, for example to 192.0.2.1:4

Why another program may get "address already in use":
- nginx (pid 812) listens on 0.0.0.0:8080. Another program can listen there only if both set SO_REUSEPORT and run as the same user.
`},
		"a group": {use{complete: true, listeners: []listener{
			queue("0.0.0.0:8080", 1, 0, 9, 0, process(1, "a")), queue("0.0.0.0:8080", 2, 0, 9, 0),
		}}, `
2 sockets listen on 0.0.0.0:8080 with SO_REUSEPORT:
  a 1: 0 queued of 10 (0%), limit 9, drops 0
  ?: 0 queued of 10 (0%), limit 9, drops 0

Why another program may get "address already in use":
- 2 sockets listen on 0.0.0.0:8080. Another program can listen there only if both set SO_REUSEPORT and run as the same user.
`},
		"a client that has got the port": {use{low: 1024, high: 60999, connections: []connection{
			conn("192.0.2.1:443", 1, 7, process(77, "curl")),
		}}, `
1 connection has 8080 as the local port:
  1 ESTABLISHED, curl 77, for example to 192.0.2.1:443

Why another program may get "address already in use":
- No socket listens, but 1 connection of curl 77 uses the port. If a program has dialed it, no server can listen on its local address, or on all addresses, until it ends. If a server that has ended had accepted it, a server that sets SO_REUSEADDR can listen.
- Port 8080 is in a range that the kernel gives to programs that dial, 1024 to 60999. To keep it for a server: sysctl -w net.ipv4.ip_local_reserved_ports=8080
`},
		"a port that is reserved": {use{low: 1024, high: 60999, reserved: "8000-8100", connections: []connection{
			conn("192.0.2.1:443", 1, 7, process(77, "curl")), conn("192.0.2.2:443", 1, 8, process(77, "curl")),
		}}, `
2 connections have 8080 as the local port:
  2 ESTABLISHED, curl 77, for example to 192.0.2.1:443

Why another program may get "address already in use":
- No socket listens, but 2 connections of curl 77 use the port. If a program has dialed them, no server can listen on their local address, or on all addresses, until they end. If a server that has ended had accepted them, a server that sets SO_REUSEADDR can listen.
`},
		"beside ports that are reserved": {use{low: 1024, high: 60999, reserved: "80,90-99", connections: []connection{
			conn("192.0.2.1:443", timeWait, 0),
		}}, `
1 connection has 8080 as the local port:
  1 TIME_WAIT, no process, for example to 192.0.2.1:443

Why another program may get "address already in use":
- 1 connection is in TIME_WAIT, for 60 s at most. If a server here had accepted them, a server that sets SO_REUSEADDR, as net.Listen of Go does, can listen now.
- Port 8080 is in a range that the kernel gives to programs that dial, 1024 to 60999. To keep it for a server: sysctl -w net.ipv4.ip_local_reserved_ports=80,90-99,8080
`},
		"an old server": {use{low: 32768, high: 60999, connections: []connection{
			conn("192.0.2.1:1", timeWait, 0), conn("192.0.2.1:2", timeWait, 0),
		}}, `
2 connections have 8080 as the local port:
  2 TIME_WAIT, no process, for example to 192.0.2.1:1

Why another program may get "address already in use":
- 2 connections are in TIME_WAIT, for 60 s at most. If a server here had accepted them, a server that sets SO_REUSEADDR, as net.Listen of Go does, can listen now.
`},
		"a socket that is only bound": {use{connections: []connection{conn("0.0.0.0:0", bound, 7, process(9, "app"))}}, `
1 connection has 8080 as the local port:
  1 BOUND, app 9

Why another program may get "address already in use":
- app 9 has bound the port and does not listen.
`},
	} {
		t.Run(name, func(t *testing.T) {
			test.use.at = target{port: 8080}
			require.Equal(t, strings.TrimPrefix(test.want, "\n"), test.use.text())
		})
	}
	u := use{at: target{port: 8080}, connections: []connection{conn("192.0.2.1:443", 1, 7)}}
	require.Contains(t, u.text(), "\n? Some processes cannot be read")
	for i := range maxRows + 5 {
		u.connections = append(u.connections, conn("192.0.2.1:443", 1, uint64(i+8), process(i, "p")))
	}
	require.Contains(t, u.text(), "\n  and 6 more kinds\n")
}

func TestWaitingText(t *testing.T) {
	l := queue("127.0.0.1:8000", 1, 4, 5, 12, process(4711, "python3"))
	client := func(text string, waited time.Duration, received int64, closed bool) acceptq.Waiting {
		return acceptq.Waiting{Client: netip.MustParseAddrPort(text), Waited: waited, Received: received, Closed: closed}
	}
	require.Equal(t, strings.TrimPrefix(`
python3 (pid 4711) on 127.0.0.1:8000: 4 queued of 6 (67%), limit 5, drops 12
  192.0.2.1:1                    12s     120 bytes
  [2001:db8::1]:65535          1.23s       0 bytes  closed, so it has probably given up
  192.0.2.1:3                      ?       - bytes
  1 of 3 clients have closed the connection.
  1 queued connection is not listed here: reset by the client, or changed meanwhile.
`, "\n"), waitingText([]*listener{&l}, []acceptq.Waiting{
		client("192.0.2.1:1", 12340*time.Millisecond, 120, false), client("[2001:db8::1]:65535", 1234*time.Millisecond, 0, true),
		client("192.0.2.1:3", unknown, unknown, false),
	}, nil))
	shared := []acceptq.Waiting{{Client: netip.MustParseAddrPort("192.0.2.1:1"), Shared: true}}
	require.Contains(t, waitingText([]*listener{&l}, shared, nil), "  perhaps in the queue of another listener on this port\n")
	require.NotContains(t, waitingText([]*listener{&l, &l}, shared, nil), "perhaps")
	require.Contains(t, waitingText([]*listener{&l}, nil, errors.New("no")), "  The clients cannot be listed: no.\n")
	empty := queue("127.0.0.1:8000", 2, 0, 5, 0, process(4711, "python3"))
	require.Contains(t, waitingText([]*listener{&empty}, nil, nil), "  No client waits.\n")
	require.Contains(t, waitingText([]*listener{&l, &empty}, nil, nil), "2 sockets listen on 127.0.0.1:8000: 4 queued; the fullest: 4 queued of 6")
}
