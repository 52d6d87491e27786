package main

import (
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
	"github.com/acceptq/acceptq/observe"
)

// commandEnv is set in a process of the test binary that is to be the command: to "here", or
// to "container" if it has a PID namespace of its own.
const commandEnv = "ACCEPTQ_TEST_COMMAND"

func TestMain(m *testing.M) {
	if place := os.Getenv(commandEnv); place != "" {
		enter(place)
		main()
	}
	testkit.Main(m)
}

// queue returns a listener with a queue, as the kernel lists it.
func queue(addr string, inode uint64, queued, limit int, drops int64, processes ...observe.Process) listener {
	return listener{
		Queue: acceptq.Queue{
			Addr: netip.MustParseAddrPort(addr), UID: 33, Inode: inode,
			Stats: acceptq.Stats{Queued: queued, Incomplete: unknown, Limit: limit, Capacity: limit + 1, Drops: drops},
		},
		Processes: processes,
	}
}

// at returns a reading of one namespace.
func at(seconds int, listeners ...listener) reading {
	now := time.Unix(1_800_000_000+int64(seconds), 0).UTC()
	return reading{
		at: now, namespaces: []namespace{{listeners: listeners, system: quiet}},
		processesAt: now, complete: true,
	}
}

// quiet is a system that has lost nothing.
var quiet = acceptq.System{Ceiling: 4096, Knob: "net.core.somaxconn", SYNBacklog: 1024, SYNCookies: 1}

func process(pid int, name string) observe.Process { return observe.Process{PID: pid, Name: name} }
