package main

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const containerID = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func TestContainerOf(t *testing.T) {
	for text, want := range map[string]string{
		"0::/system.slice/docker-" + containerID + ".scope\n":                               "docker 0123456789ab",
		"0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-" + containerID + ".scope\n": "containerd 0123456789ab",
		"0::/machine.slice/libpod-" + containerID + ".scope/container\n":                    "libpod 0123456789ab",
		"13:misc:/\n12:pids:/docker/" + containerID + "\n":                                  "docker 0123456789ab",
		"0::/kubepods/besteffort/pod2/" + containerID + "\n":                                "container 0123456789ab",
		"0::/user.slice/user-1000.slice/session-1.scope\n":                                  "",
		"0::/" + strings.ToUpper(containerID):                                               "",
		"":                                                                                  "",
	} {
		require.Equal(t, want, containerOf(text), text)
	}
}

func TestParseRange(t *testing.T) {
	for text, want := range map[string][2]int{
		"32768\t60999\n": {32768, 60999}, "1 1": {1, 1}, "2 1": {}, "1": {}, "": {}, "1 2 3": {}, "-1 5": {}, "1 65536": {}, "a b": {},
	} {
		low, high := parseRange(text)
		require.Equal(t, want, [2]int{low, high}, text)
	}
}

func TestIsReserved(t *testing.T) {
	for list, want := range map[string]bool{
		"8080": true, "80,8080,9000": true, "8000-8100": true, "1,8080-8080": true,
		"": false, "8081": false, "8081-8090,80": false, "-8080": false, "8080-": false, "8090-8070": false, "x": false,
	} {
		require.Equal(t, want, isReserved(list, 8080), list)
	}
}

func TestStateName(t *testing.T) {
	require.Equal(t, "ESTABLISHED", stateName(1))
	require.Equal(t, "TIME_WAIT", stateName(timeWait))
	require.Equal(t, "CLOSING", stateName(11))
	require.Equal(t, "BOUND", stateName(bound))
	require.Equal(t, "state 0", stateName(0))
	require.Equal(t, "state 200", stateName(200))
}

func TestProcessState(t *testing.T) {
	for stat, want := range map[string]byte{
		"1 (sh) S 0 1": 'S', "1 (a) T) T 0": 'T', "1 (a b) R": 'R', "1 (sh)": 0, "1 (sh) ": 0, "": 0, "1 sh S": 0,
	} {
		require.Equal(t, want, processState([]byte(stat)), stat)
	}
}

func FuzzProcessState(f *testing.F) {
	f.Add([]byte("1 (sh) S 0 1"))
	f.Fuzz(func(t *testing.T, stat []byte) {
		if state := processState(stat); state != 0 && !strings.Contains(string(stat), ")") {
			t.Fatal(state)
		}
	})
}

func FuzzContainerOf(f *testing.F) {
	f.Add("0::/system.slice/docker-" + containerID + ".scope\n")
	f.Add("a\n/\n-")
	f.Fuzz(func(t *testing.T, text string) {
		if id := containerOf(text); id != "" && (len(id) < 14 || printable(id) != id) {
			t.Fatalf("%q", id)
		}
	})
}

func FuzzIsReserved(f *testing.F) {
	f.Add("8080,9000-9010", uint16(9001))
	f.Fuzz(func(t *testing.T, list string, port uint16) {
		if isReserved(list, port) && !isReserved(list+",1", port) {
			t.Fatalf("%q %d", list, port)
		}
	})
}

func FuzzParseRange(f *testing.F) {
	f.Add("32768\t60999\n")
	f.Fuzz(func(t *testing.T, text string) {
		if low, high := parseRange(text); low < 0 || low > high || high > 65535 {
			t.Fatal(low, high)
		}
	})
}
