package main

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
)

// containerOf returns the container of a process from the text of /proc/PID/cgroup: the
// runtime and the first 12 digits of its ID, which the tools of the runtimes show too. It is
// empty if no path ends with the ID of a container.
//
//	0::/system.slice/docker-0123...def.scope
//	0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-0123...def.scope
//	12:pids:/docker/0123...def
func containerOf(text string) string {
	for line := range strings.Lines(text) {
		path := strings.Split(strings.TrimSpace(line), "/")
		for i := len(path) - 1; i > 0; i-- {
			name := strings.TrimSuffix(path[i], ".scope")
			kind := ""
			if dash := strings.LastIndexByte(name, '-'); dash >= 0 {
				kind, name = name[:dash], name[dash+1:]
			}
			if len(name) != 64 || strings.Trim(name, "0123456789abcdef") != "" {
				continue
			}
			if kind == "" && path[i-1] == "docker" {
				kind = "docker"
			}
			return printable(orDefault(strings.TrimPrefix(kind, "cri-"), "container")) + " " + name[:12]
		}
	}
	return ""
}

// parseRange parses the two numbers of net.ipv4.ip_local_port_range. They are 0 if the text has
// not two ports.
func parseRange(text string) (low, high int) {
	f := strings.Fields(text)
	if len(f) != 2 {
		return 0, 0
	}
	a, err1 := strconv.ParseUint(f[0], 10, 16)
	b, err2 := strconv.ParseUint(f[1], 10, 16)
	if err1 != nil || err2 != nil || a > b {
		return 0, 0
	}
	return int(a), int(b)
}

// isReserved reports whether a list as that of net.ipv4.ip_local_reserved_ports has a port:
// "8080,9000-9010".
func isReserved(list string, port uint16) bool {
	for part := range strings.SplitSeq(list, ",") {
		first, last, isRange := strings.Cut(part, "-")
		if !isRange {
			last = first
		}
		low, err1 := strconv.ParseUint(first, 10, 16)
		high, err2 := strconv.ParseUint(last, 10, 16)
		if err1 == nil && err2 == nil && low <= uint64(port) && uint64(port) <= high {
			return true
		}
	}
	return false
}

// stateName returns the name of a TCP state, as netstat and ss show it.
func stateName(state uint8) string {
	names := [...]string{
		1: "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT", "CLOSE", "CLOSE_WAIT", "LAST_ACK",
		"LISTEN", "CLOSING", "SYN_RECV", "BOUND",
	}
	if state == 0 || int(state) >= len(names) {
		return fmt.Sprintf("state %d", state)
	}
	return names[state]
}

// processState returns the state in /proc/PID/stat. The name before it is in parentheses and
// may have any characters.
func processState(stat []byte) byte {
	i := bytes.LastIndexByte(stat, ')')
	if i < 0 || i+2 >= len(stat) {
		return 0
	}
	return stat[i+2]
}
