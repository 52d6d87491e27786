//go:build linux

package main

import "fmt"

// A measurement is a set of benchmarks that are run and published together. To add one,
// write its benchmarks and add a line to measurements; see "Adding a measurement" in
// README.md.
type measurement struct {
	name      string // the results are in results/NAME.txt, in Go's benchmark format
	bench     string // a regular expression that selects the benchmarks
	benchtime string // for go test; 1x with -short
	rounds    int    // each round is a new process
	code      string // the files of the library that it measures
	picture   string // the name of its picture, see pictures
	alt       string // what the picture shows, for readers who do not see it
	tables    []table

	meta    map[string]string    // of the run: commit, date, load, ...
	figures map[string][]float64 // by benchmark and unit, one value for each round
}

// A table shows one benchmark, with a row for each candidate.
type table struct {
	bench, title, note string
	rows               []string
	columns            []column
}

// A column is one unit of a benchmark. With a base, the column has ratios to that row.
type column struct {
	name, unit, base string
}

// The rows that others are compared with. net.Listen is measured twice: the difference
// between the two rows is noise.
const (
	netDefault = "net.Listen"
	netAgain   = "net.Listen again (control)"
	netPlain   = "net, plain TCP"
	ours       = "acceptq"
)

var peerNames = []string{netDefault, netAgain, netPlain, ours, "tcplisten", "go-reuseport", "fasthttp", "system calls by hand"}

const (
	readStats  = "acceptq Stats"
	readAgain  = "acceptq Stats again (control)"
	readByHand = "getsockopt(2) twice by hand"
)

var readerNames = []string{readStats, readAgain, readByHand, "mdlayher/netlink, one socket", "mdlayher/netlink, all listeners",
	"vishvananda/netlink, all sockets", "the file /proc/net/tcp", "ss -ltn"}

var readSizes = []int{10, 1000, 10000}

const (
	oneQueue   = "acceptq, 1 shard"
	manyQueues = "acceptq, 64 shards"
	longQueue  = "acceptq, 1 shard, somaxconn raised"
)

// A candidate is a row whose server is a program of internal/alone.
type candidate struct {
	name, program, arg string
	inherits           bool // a parent process passes the socket on to the successor
}

var programs = []candidate{
	{netDefault, "net", "", false},
	{ours, "acceptq", "", false},
	{"tcplisten", "tcplisten", "", false},
	{"go-reuseport", "libp2p", "", false},
	{"fasthttp", "fasthttp", "", false},
	{"net.Listen with net/http", "webnet", "", false},
	{"acceptq with net/http", "webacceptq", "", false},
}

var bursts = []candidate{
	{netDefault, "net", "", false},
	{netAgain, "net", "", false},
	{"tcplisten", "tcplisten", "", false},
	{"go-reuseport", "libp2p", "", false},
	{"fasthttp", "fasthttp", "", false},
	{"go-reuseport, 64 by hand", "libp2p64", "", false},
	{oneQueue, "acceptq", "", false},
	{"acceptq, 4 shards", "shards", "4", false},
	{"acceptq, 16 shards", "shards", "16", false},
	{manyQueues, "shards", "64", false},
	{longQueue, "acceptq", "", false},
}

const (
	restartNet     = "net.Listen: Shutdown, listen again"
	restartMigrate = "go-reuseport: the same, with tcp_migrate_req ²"
	restartBeside  = "acceptq: listen beside, Shutdown"
	restartAlone   = "acceptq: Drain, wait, Shutdown, listen again"
	restartOurs    = "acceptq: listen beside, Drain, wait, Shutdown"
	restartServe   = "acceptq: listen beside, graceful.Serve"
)

// The name of a restart lists all its steps in order. Every library is used in the best
// known way, which waits for first answers.
var restarts = []candidate{
	{restartNet, "webnet", "shutdown", false},
	{"net.Listen: the same again (control)", "webnet", "shutdown", false},
	{"net.Listen: close, listen again, wait, Shutdown", "webnet", "close", false},
	{"net.Listen: pass descriptor ¹, Shutdown", "webnet", "shutdown", true},
	{"net.Listen: pass descriptor ¹, close, wait, Shutdown", "webnet", "close", true},
	{"tcplisten: listen beside, close, wait, Shutdown", "webtcplisten", "close", false},
	{"fasthttp: listen beside, close, wait, Shutdown", "webfasthttp", "close", false},
	{"go-reuseport: listen beside, close, wait, Shutdown", "weblibp2p", "close", false},
	{restartMigrate, "weblibp2p", "close", false},
	{restartBeside, "webacceptqshared", "shutdown", false},
	{restartAlone, "webacceptq", "drain", false},
	{restartOurs, "webacceptqshared", "drain", false},
	{restartServe, "webgraceful", "", false},
}

// restartsKept are the ways with connections that are used for more than one request.
var restartsKept = []candidate{
	{restartBeside, "webacceptqshared", "shutdown", false},
	{restartBeside + " (control)", "webacceptqshared", "shutdown", false},
	{restartOurs, "webacceptqshared", "drain", false},
	{restartServe, "webgraceful", "", false},
}

func names(all []candidate) (names []string) {
	for _, c := range all {
		names = append(names, c.name)
	}
	return names
}

const restartNote = "A round is one restart. Lost: reset, cut or unanswered after 20 s. Refused: nobody listened; the client tries again at once, " +
	"so it can count more than once. Stalled: answered, but only after a packet was retransmitted. " +
	"Wait: until every accepted connection has had its first answer. ¹ Needs a parent process or socket activation. " +
	"² net.ipv4.tcp_migrate_req=1 needs root."

const keptNote = "A round is one restart. Half of the clients keep their connection for as long as the server lets them, the others have a new one " +
	"for each request. Nothing is sent twice: each request has a body that cannot be read again. Lost: no answer. Stalled: answered after more than 900 ms."

const (
	cpu  = "cpu-ns/op"
	kept = "kept-B/op"
	p99  = "p99-ns"
)

var (
	timeColumns    = []column{{"time", "ns/op", ""}, {"CPU time", cpu, netDefault}}
	keptColumns    = []column{{"requests", "requests", ""}, {"lost", "lost", ""}, {"stalled", "stalled", ""}, {"the old server ends after", "ns/op", ""}}
	restartColumns = []column{{"requests", "requests", ""}, {"lost", "lost", ""}, {"refused", "refused", ""},
		{"stalled", "stalled", ""}, {"the old server ends after", "ns/op", ""}}
)

var measurements = []*measurement{
	{name: "listen", picture: "speed", alt: "CPU time of listening, accepting and serving, as a multiple of that of net.Listen.",
		bench: "Listen", benchtime: "100ms", rounds: 12,
		code: "listener.go backlog*.go rule.go options.go socket_*.go internal/endpoint/*.go internal/sockopt/*.go internal/sys/*.go", tables: []table{
			{"Listen/addr=literal", `Listen on "127.0.0.1:0" and Close`, "", peerNames, timeColumns},
			{"Listen/addr=wildcard", `Listen on ":0" and Close`, "tcplisten, go-reuseport and fasthttp listen on IPv4 only here, the others on both IP families.", peerNames, timeColumns},
		}},
	{name: "accept",
		bench: "Accept|HTTP", benchtime: "100ms", rounds: 12,
		code: "listener.go options.go drain.go internal/intake/*.go", tables: []table{
			{"Accept", "Accept, while clients wait in the queue", "", peerNames, timeColumns},
			{"HTTP", "net/http, one request for each connection", "The clients run in the same process: time and CPU time include the clients.", peerNames, timeColumns},
		}},
	{name: "read", picture: "read", alt: "The time of one reading of an accept queue, in eight ways, with 10, 1,000 and 10,000 other sockets.",
		bench: "Read", benchtime: "20ms", rounds: 12,
		code: "stats*.go internal/sys/*.go internal/tcpinfo/*.go", tables: readTables()},
	{name: "memory",
		bench: "Memory", benchtime: "200x", rounds: 6, code: "*.go internal/*/*.go", tables: []table{
			{"Memory", "Go's heap, for each listener", "The kernel's memory for a socket is not counted.", peerNames, []column{
				{"allocated", "B/op", netDefault}, {"allocations", "allocs/op", ""}, {"kept while open", kept, netDefault}}},
		}},
	{name: "program",
		bench: "Program", benchtime: "1x", rounds: 1, code: "*.go internal/*/*.go go.mod", tables: []table{
			{"Program", "The smallest program that serves, built without symbols", "Packages: without those of Go and of the program itself.", names(programs), []column{
				{"size", "size-B", ""}, {"packages", "packages", ""}}},
		}},
	{name: "burst", picture: "burst", alt: "5,000 clients at once and a server that is stopped: how many are let in at once, and the time to the first byte, for net.Listen, other libraries, and 1 to 64 shards.",
		bench: "Burst", benchtime: "1x", rounds: 7,
		code: "shards.go listener.go socket_*.go internal/sockopt/*.go", tables: []table{
			{"Burst", "5,000 clients at once, the server is stopped for 0.5 s, somaxconn is 128",
				"At once: answered, and the client's kernel retransmitted no packet. Sent again: answered, but only after a packet was retransmitted. " +
					"Each client waits for up to a minute, and \"unanswered\" counts the clients without an answer then. " +
					"somaxconn raised: to 5,000. The CPU time is that of the server only.", names(bursts), []column{
					{"at once", "at-once", ""}, {"sent again", "sent-again", ""}, {"unanswered", "unanswered", ""},
					{"packets dropped", "dropped", ""}, {"first byte, p50", "p50-ns", ""}, {"first byte, p99", p99, ""},
					{"server's CPU time", "server-cpu-ns", netDefault}}},
		}},
	{name: "restart", picture: "restart", alt: "Requests lost, refused and stalled in one restart under load, for each way to restart.",
		bench: "Restart|RestartKept", benchtime: "1x", rounds: 16,
		code: "drain.go internal/intake/*.go listener.go shards.go graceful/*.go", tables: []table{
			{"Restart/clients=busy", "One restart of an HTTP server; 64 clients never rest", restartNote, names(restarts), restartColumns},
			{"Restart/clients=calm", "One restart of an HTTP server; 64 clients rest for about 20 ms after each request", restartNote, names(restarts), restartColumns},
			{"RestartKept/protocol=http1", "One restart; 64 clients, half with kept-alive connections, HTTP/1.1", keptNote, names(restartsKept), keptColumns},
			{"RestartKept/protocol=h2-tls", "One restart; 64 clients, half with kept-alive connections, HTTP/2 over TLS", keptNote, names(restartsKept), keptColumns},
			{"RestartKept/protocol=h2c", "One restart; 64 clients, half with kept-alive connections, h2c", keptNote, names(restartsKept), keptColumns},
		}},
}

func readBench(size int) string { return fmt.Sprintf("Read/sockets=%d", size) }

func readTables() (all []table) {
	for _, size := range readSizes {
		all = append(all, table{readBench(size), fmt.Sprintf("One reading of a queue in which 3 clients wait, with %d other TCP sockets", size),
			"vishvananda/netlink also has SocketGet for one address. It is not here because it fails when more than one client is queued.",
			readerNames, []column{{"time", "ns/op", readStats}}})
	}
	return all
}
