//go:build linux

package main

import (
	"fmt"
	"slices"
)

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
	restartNet       = "net.Listen: Shutdown, listen again"
	restartMigrate   = "go-reuseport: the same, with tcp_migrate_req ²"
	restartShutdown  = "acceptq: listen beside, Shutdown"
	restartAlone     = "acceptq: Drain, wait, Shutdown, listen again"
	restartDrain     = "acceptq: listen beside, Drain, wait, Shutdown"
	restartUnsteered = "acceptq: the same, without steering"
	restartServe     = "acceptq: listen beside, graceful.Serve"
)

// The name of a restart lists all its steps in order. Every library is used in the best
// known way, which waits for first answers.
var restarts = slices.Concat(restartsAlone, restartsBeside)

// restartsAlone are the ways in which the port has one socket.
var restartsAlone = []candidate{
	{restartNet, "webnet", "shutdown", false},
	{"net.Listen: the same again (control)", "webnet", "shutdown", false},
	{"net.Listen: close, listen again, wait, Shutdown", "webnet", "close", false},
	{"net.Listen: pass descriptor ¹, Shutdown", "webnet", "shutdown", true},
	{"net.Listen: pass descriptor ¹, close, wait, Shutdown", "webnet", "close", true},
	{restartAlone, "webacceptq", "drain", false},
}

// restartsBeside are the ways in which every process has a socket of its own on the port.
var restartsBeside = []candidate{
	{"tcplisten: listen beside, close, wait, Shutdown", "webtcplisten", "close", false},
	{"fasthttp: listen beside, close, wait, Shutdown", "webfasthttp", "close", false},
	{"go-reuseport: listen beside, close, wait, Shutdown", "weblibp2p", "close", false},
	{restartMigrate, "weblibp2p", "close", false},
	{restartShutdown, "webacceptqshared", "shutdown", false},
	{restartDrain, "webacceptqshared", "drain", false},
	{restartUnsteered, "webacceptqunsteered", "drain", false},
	{restartServe, "webgraceful", "", false},
}

// restartsKept are the ways with connections that are used for more than one request.
var restartsKept = []candidate{
	{restartShutdown, "webacceptqshared", "shutdown", false},
	{restartShutdown + " (control)", "webacceptqshared", "shutdown", false},
	{restartDrain, "webacceptqshared", "drain", false},
	{restartServe, "webgraceful", "", false},
}

func names(all []candidate) (names []string) {
	for _, c := range all {
		names = append(names, c.name)
	}
	return names
}

const restartNote = "¹ Needs a parent process or socket activation. ² A sysctl that only root can set."

const (
	cpu  = "cpu-ns/op"
	kept = "kept-B/op"
	p99  = "p99-ns"
)

var (
	timeColumns    = []column{{"time", "ns/op", ""}, {"CPU time", cpu, netDefault}}
	restartColumns = []column{{"requests", "requests", ""}, {"lost", "lost", ""}, {"refused", "refused", ""},
		{"stalled", "stalled", ""}, {"a server stops in", "ns/op", ""}}
)

var measurements = []*measurement{
	{name: "listen", picture: "speed", alt: "CPU time of listening, accepting and serving, as a multiple of that of net.Listen.",
		bench: "Listen", benchtime: "100ms", rounds: 12,
		code: "listener.go backlog*.go options.go socket_*.go internal/endpoint/*.go internal/sockopt/*.go internal/sys/*.go", tables: []table{
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
	{name: "burst", picture: "burst", alt: "5,000 clients connect at once to a server that is stopped: how many are let in at once, and the time to the first byte.",
		bench: "Burst", benchtime: "1x", rounds: 7,
		code: "shards.go listener.go socket_*.go internal/sockopt/*.go", tables: []table{
			{"Burst", "5,000 clients at once, the server is stopped for 0.5 s, somaxconn is 128",
				"At once: answered, and the client's kernel retransmitted no packet. Somaxconn raised: to 5,000.", names(bursts), []column{
					{"at once", "at-once", ""}, {"stalled", "stalled", ""}, {"lost", "lost", ""},
					{"packets dropped", "dropped", ""}, {"first byte, p50", "p50-ns", ""}, {"first byte, p99", p99, ""},
					{"server's CPU time", "server-cpu-ns", netDefault}}},
		}},
	{name: "restart", picture: "restart", alt: "Requests lost, refused and stalled while one replica restarts under load, for each way to restart.",
		bench: "Restart|RestartKept", benchtime: "1x", rounds: 16,
		code: "drain.go internal/intake/*.go listener.go shards.go graceful/*.go", tables: []table{
			{restartBench(1, "busy"), "One replica restarts; 64 clients never rest", restartNote, names(restarts), restartColumns},
			{restartBench(1, "calm"), "One replica restarts; 64 clients rest for about 20 ms after each request", restartNote, names(restarts), restartColumns},
			{restartBench(3, "busy"), "Three replicas restart one after the other; 64 clients never rest", "", names(restartsBeside), restartColumns},
			{keptBench("http1"), "One replica restarts; 32 of 64 clients keep their connection, HTTP/1.1", "", names(restartsKept), restartColumns},
			{keptBench("h2-tls"), "One replica restarts; 32 of 64 clients keep their connection, HTTP/2 over TLS", "", names(restartsKept), restartColumns},
			{keptBench("h2c"), "One replica restarts; 32 of 64 clients keep their connection, h2c", "", names(restartsKept), restartColumns},
		}},
}

func restartBench(replicas int, clients string) string {
	return fmt.Sprintf("Restart/replicas=%d/clients=%s", replicas, clients)
}

func keptBench(protocol string) string { return "RestartKept/protocol=" + protocol }

func readBench(size int) string { return fmt.Sprintf("Read/sockets=%d", size) }

func readTables() (all []table) {
	for _, size := range readSizes {
		all = append(all, table{readBench(size), fmt.Sprintf("One reading of a queue, with %d other TCP sockets", size),
			"Three clients wait in the queue. vishvananda/netlink has SocketGet for one address too. It fails when more than one client is queued (`TestSocketGet`).",
			readerNames, []column{{"time", "ns/op", readStats}}})
	}
	return all
}
