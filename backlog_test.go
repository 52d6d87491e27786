package acceptq

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"reflect"
	"runtime"
	"testing"

	"github.com/acceptq/acceptq/internal/sys"
	"github.com/stretchr/testify/require"
)

// For each kernel: the argument of listen(2), the limit, the effective backlog and the
// capacity that follow from a request.
func TestRules(t *testing.T) {
	for _, tt := range []struct {
		system         string
		rule           string
		n              int
		ceiling, floor int
		argument       int
		limit          int
		effective      int
		capacity       int
	}{
		{"linux", "a number below the ceiling is kept", 15, 4096, 0, 15, 15, 15, 16},
		{"linux", "a number above the ceiling is clamped", 65536, 4096, 0, 65536, 4096, 4096, 4097},
		{"linux", "zero is kept and holds one", 0, 4096, 0, 0, 0, 0, 1},
		{"linux", "a negative number is the ceiling", -1, 4096, 0, math.MaxInt32, 4096, 4096, 4097},
		{"linux", "a ceiling of zero leaves one", 17, 0, 0, 17, 0, 0, 1},
		{"linux", "the ceiling has no 16 bits", 196602, 196602, 0, 196602, 196602, 196602, 196603},
		{"linux", "a number wider than listen(2) is the widest", beyond, 4096, 0, math.MaxInt32, 4096, 4096, 4097},
		{"linux", "the widest ceiling does not overflow", -1, math.MaxInt32, 0, math.MaxInt32, math.MaxInt32, math.MaxInt32, most},

		{"freebsd", "the queue grows to half as many again", 100, 128, 0, 100, 100, 150, 151},
		{"freebsd", "the half is rounded down", 5, 128, 0, 5, 5, 7, 8},
		{"freebsd", "a number above the ceiling is clamped", 1000, 128, 0, 1000, 128, 192, 193},
		{"freebsd", "a raised ceiling has no 16 bits", 100000, 100000, 0, 100000, 100000, 150000, 150001},
		{"freebsd", "zero is kept and holds one", 0, 128, 0, 0, 0, 0, 1},
		{"freebsd", "a negative number is the ceiling", -1, 128, 0, math.MaxInt32, 128, 192, 193},
		{"freebsd", "the highest ceiling does not overflow", -1, 1431655765, 0, math.MaxInt32, 1431655765, math.MaxInt32, most},

		{"darwin", "the limit is the first length refused", 5, 128, 0, 5, 5, 5, 5},
		{"darwin", "a number above the ceiling is clamped", 1000, 128, 0, 1000, 128, 128, 128},
		{"darwin", "zero is the ceiling", 0, 128, 0, math.MaxInt16, 128, 128, 128},
		{"darwin", "a negative number is the ceiling", -1, 128, 0, math.MaxInt16, 128, 128, 128},
		{"darwin", "under a raised ceiling 32768 does not turn negative", 32768, 100000, 0, math.MaxInt16, math.MaxInt16, math.MaxInt16, math.MaxInt16},
		{"darwin", "under a raised ceiling 65536 does not turn 0", 65536, 100000, 0, math.MaxInt16, math.MaxInt16, math.MaxInt16, math.MaxInt16},
		{"darwin", "under a raised ceiling the most is a short", -1, 100000, 0, math.MaxInt16, math.MaxInt16, math.MaxInt16, math.MaxInt16},
		{"darwin", "under a raised ceiling zero is a short", 0, 100000, 0, math.MaxInt16, math.MaxInt16, math.MaxInt16, math.MaxInt16},

		{"netbsd", "a number below the ceiling is kept", 10, 128, 0, 10, 10, 10, 11},
		{"netbsd", "a number above the ceiling is clamped", 129, 128, 0, 129, 128, 128, 129},
		{"netbsd", "zero is kept and holds one", 0, 128, 0, 0, 0, 0, 1},
		{"netbsd", "a negative number is not 0 but the ceiling", -1, 128, 0, math.MaxInt16, 128, 128, 129},
		{"netbsd", "no number wraps in a short", 65541, 128, 0, math.MaxInt16, 128, 128, 129},

		{"openbsd", "a number below the floor is raised", 5, 128, 80, 5, 80, 80, 81},
		{"openbsd", "zero is raised", 0, 128, 80, 0, 80, 80, 81},
		{"openbsd", "a number above the floor is kept", 100, 128, 80, 100, 100, 100, 101},
		{"openbsd", "a number above the ceiling is clamped", 4096, 128, 80, 4096, 128, 128, 129},
		{"openbsd", "a negative number is the ceiling", -1, 128, 80, math.MaxInt32, 128, 128, 129},
		{"openbsd", "the floor wins over a lower ceiling", 4096, 64, 80, 4096, 80, 80, 81},
		{"openbsd", "a lowered floor raises nothing", 5, 128, 0, 5, 5, 5, 6},
		{"openbsd", "of an unknown floor nothing follows", 100, 128, unknown, 100, unknown, unknown, unknown},

		{"dragonfly", "a number below the ceiling is kept", 10, 128, 0, 10, 10, 10, 11},
		{"dragonfly", "a number above the ceiling is clamped", 1000, 128, 0, 1000, 128, 128, 129},
		{"dragonfly", "zero is kept and holds one", 0, 128, 0, 0, 0, 0, 1},
		{"dragonfly", "a negative number is the ceiling", -1, 128, 0, math.MaxInt16, 128, 128, 129},
		{"dragonfly", "under a raised ceiling no number wraps in a short", 65536, 100000, 0, math.MaxInt16, math.MaxInt16, math.MaxInt16, math.MaxInt16 + 1},
	} {
		t.Run(tt.system+": "+tt.rule, func(t *testing.T) {
			r, known := ruleOf(tt.system)
			require.True(t, known)
			require.Equal(t, tt.argument, r.argument(tt.n), "argument of listen(2)")
			limit := r.limit(tt.n, tt.ceiling, tt.floor)
			require.Equal(t, tt.limit, limit, "limit")
			require.Equal(t, tt.effective, r.effective(limit), "effective")
			require.Equal(t, tt.capacity, r.capacity(limit), "capacity")
		})
	}
}

// The limits that were measured on each kernel, row by row.
func TestLimitsAsMeasured(t *testing.T) {
	requests := []int{math.MinInt32, -1, 0, 1, 2, 5, 127, 128, 129, 1000, 65536, math.MaxInt32}
	for _, tt := range []struct {
		system  string
		ceiling int
		limits  []int
	}{
		{"linux", 4096, []int{4096, 4096, 0, 1, 2, 5, 127, 128, 129, 1000, 4096, 4096}},
		{"linux", 16, []int{16, 16, 0, 1, 2, 5, 16, 16, 16, 16, 16, 16}},
		{"linux", 0, []int{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}},
		{"linux", math.MaxInt32, []int{math.MaxInt32, math.MaxInt32, 0, 1, 2, 5, 127, 128, 129, 1000, 65536, math.MaxInt32}},
		{"freebsd", 128, []int{128, 128, 0, 1, 2, 5, 127, 128, 128, 128, 128, 128}},
		{"freebsd", 4096, []int{4096, 4096, 0, 1, 2, 5, 127, 128, 129, 1000, 4096, 4096}},
		{"netbsd", 128, []int{128, 128, 0, 1, 2, 5, 127, 128, 128, 128, 128, 128}}, // negative numbers are not passed to the kernel
	} {
		r, _ := ruleOf(tt.system)
		if r.knob == "" {
			require.Equal(t, tt.ceiling, r.compiled, tt.system)
		}
		for i, n := range requests {
			require.Equal(t, tt.limits[i], r.limit(n, tt.ceiling, 0), "%s at %d: listen(%d)", tt.system, tt.ceiling, n)
		}
	}
}

// The capacities that were measured on each kernel, with clients that connect one at a
// time.
func TestCapacitiesAsMeasured(t *testing.T) {
	for system, held := range map[string]map[int]int{
		"linux":   {0: 1, 1: 2, 2: 3, 5: 6, 16: 17, 128: 129},
		"freebsd": {0: 1, 1: 2, 2: 4, 3: 5, 4: 7, 5: 8, 7: 11, 10: 16, 16: 25, 100: 151, 128: 193},
		"netbsd":  {0: 1, 1: 2, 2: 3, 3: 4, 4: 5, 5: 6, 10: 11, 127: 128, 128: 129},
	} {
		r, _ := ruleOf(system)
		for limit, n := range held {
			require.Equal(t, n, r.capacity(limit), "%s: limit %d", system, limit)
		}
	}
}

func TestNamesOfOneKernel(t *testing.T) {
	for name, other := range map[string]string{"android": "linux", "ios": "darwin"} {
		r, known := ruleOf(name)
		require.True(t, known)
		same, _ := ruleOf(other)
		require.Equal(t, same, r)
	}
}

func TestUnknownLimitGivesUnknownCapacity(t *testing.T) {
	for _, system := range []string{"linux", "freebsd", "darwin", "netbsd", "openbsd", "dragonfly", "windows"} {
		r, known := ruleOf(system)
		require.Equal(t, system != "windows", known)
		require.Equal(t, unknown, r.limit(100, unknown, 0), system)
		require.Equal(t, unknown, r.effective(unknown), system)
		require.Equal(t, unknown, r.capacity(unknown), system)
	}
}

// A number of connections never overflows to a negative one, even if int has 32 bits.
func TestNumbersSaturate(t *testing.T) {
	for _, system := range []string{"linux", "freebsd", "darwin", "netbsd", "openbsd", "dragonfly"} {
		r, _ := ruleOf(system)
		for _, limit := range []int{0, 1, r.highest, math.MaxInt32 - 1, math.MaxInt32} {
			require.GreaterOrEqual(t, r.effective(limit), limit, "%s: limit %d", system, limit)
			require.GreaterOrEqual(t, r.capacity(limit), r.effective(limit), "%s: limit %d", system, limit)
		}
	}
	require.Equal(t, math.MaxInt, saturate(math.MaxInt64))
}

func TestDescribe(t *testing.T) {
	for _, tt := range []struct {
		system   string
		n        int
		limit    int
		ceiling  int // at the time when Backlog is called
		measured bool
		want     string
	}{
		// Granted in full.
		{"linux", 100, 100, 4096, true,
			"asked 100, granted 100, holds 101; net.core.somaxconn is 4096"},
		{"linux", -1, 4096, 4096, true,
			"granted 4096, holds 4097; net.core.somaxconn is 4096"},
		{"linux", 0, 0, 4096, true,
			"asked 0, granted 0, holds 1; net.core.somaxconn is 4096"},
		{"linux", 100, 100, unknown, true,
			"asked 100, granted 100, holds 101; net.core.somaxconn is unknown"},
		{"freebsd", 100, 100, 128, true,
			"asked 100, granted 100, may grow to 150, holds 151; kern.ipc.soacceptqueue is 128"},
		{"darwin", 100, 100, 128, false,
			"asked 100, granted 100 by the kernel's rule, holds 100; kern.ipc.somaxconn is 128"},
		{"netbsd", -1, 128, 128, false,
			"granted 128 by the kernel's rule, holds 129; the compiled-in ceiling is 128"},

		// Clamped: the text has the setting, the command, and how to apply it.
		{"linux", 4096, 128, 128, true,
			"asked 4096, granted 128, holds 129; net.core.somaxconn is 128: to raise it, sysctl -w net.core.somaxconn=4096, then SetBacklog(4096) or a restart"},
		{"linux", 4096, 128, unknown, true,
			"asked 4096, granted 128, holds 129; net.core.somaxconn is unknown: to raise it, sysctl -w net.core.somaxconn=4096, then SetBacklog(4096) or a restart"},
		{"linux", 4096, 128, 64, true,
			"asked 4096, granted 128, holds 129; net.core.somaxconn is 64: to raise it, sysctl -w net.core.somaxconn=4096, then SetBacklog(4096) or a restart"},
		{"freebsd", 4096, 128, 128, true,
			"asked 4096, granted 128, may grow to 192, holds 193; kern.ipc.soacceptqueue is 128: to raise it, sysctl kern.ipc.soacceptqueue=4096, then SetBacklog(4096) or a restart"},
		{"darwin", 4096, 128, 128, false,
			"asked 4096, granted 128 by the kernel's rule, holds 128; kern.ipc.somaxconn is 128: to raise it, sysctl -w kern.ipc.somaxconn=4096, then SetBacklog(4096) or a restart"},
		{"openbsd", 4096, 128, 128, false,
			"asked 4096, granted 128 by the kernel's rule, holds 129; kern.somaxconn is 128: to raise it, sysctl kern.somaxconn=4096, then SetBacklog(4096) or a restart"},
		{"dragonfly", 40000, 128, 128, false,
			"asked 40000, granted 128 by the kernel's rule, holds 129; kern.ipc.somaxconn is 128: to raise it, sysctl kern.ipc.somaxconn=32767, then SetBacklog(40000) or a restart"},

		// Clamped to a bound that no setting changes.
		{"netbsd", 4096, 128, 128, false,
			"asked 4096, granted 128 by the kernel's rule, holds 129; the compiled-in ceiling is 128"},
		{"openbsd", 40000, 32767, 32767, false,
			"asked 40000, granted 32767 by the kernel's rule, holds 32768; kern.somaxconn is 32767, and this kernel never grants more than 32767"},
		{"darwin", 40000, 32767, 100000, false,
			"asked 40000, granted 32767 by the kernel's rule, holds 32767; kern.ipc.somaxconn is 100000, and this kernel never grants more than 32767"},
		{"dragonfly", -1, 32767, 100000, false,
			"granted 32767 by the kernel's rule, holds 32768; kern.ipc.somaxconn is 100000, and this kernel never grants more than 32767"},

		// Raised.
		{"openbsd", 5, 80, 128, false,
			"asked 5, granted 80 by the kernel's rule, holds 81; the kernel raised it to its minimum, kern.sominconn"},
		{"openbsd", 0, 80, 128, false,
			"asked 0, granted 80 by the kernel's rule, holds 81; the kernel raised it to its minimum, kern.sominconn"},
		{"openbsd", 100, 100, 128, false,
			"asked 100, granted 100 by the kernel's rule, holds 101; kern.somaxconn is 128"},
		{"darwin", 0, 128, 128, false,
			"asked 0, granted 128 by the kernel's rule, holds 128; this kernel treats 0 as the maximum; kern.ipc.somaxconn is 128"},

		// The ceiling has changed since.
		{"linux", 4096, 128, 4096, true,
			"asked 4096, granted 128, holds 129; net.core.somaxconn is 4096 now: SetBacklog(4096) grows the queue to 4096 without a restart"},
		{"linux", 4096, 128, 1000, true,
			"asked 4096, granted 128, holds 129; net.core.somaxconn is 1000 now: SetBacklog(4096) grows the queue to 1000 without a restart"},
		{"linux", -1, 128, 4096, true,
			"granted 128, holds 129; net.core.somaxconn is 4096 now: SetBacklog(MaxBacklog) grows the queue to 4096 without a restart"},
		{"freebsd", 4096, 128, 4096, true,
			"asked 4096, granted 128, may grow to 192, holds 193; kern.ipc.soacceptqueue is 4096 now: SetBacklog(4096) grows the queue to 6144 without a restart"},
		{"darwin", 0, 128, 1000, false,
			"asked 0, granted 128 by the kernel's rule, holds 128; kern.ipc.somaxconn is 1000 now: SetBacklog(0) grows the queue to 1000 without a restart"},
		{"openbsd", 4096, 128, 1024, false,
			"asked 4096, granted 128 by the kernel's rule, holds 129; kern.somaxconn is 1024 now: SetBacklog(4096) grows the queue to 1024 without a restart"},
		{"linux", 4096, 4096, 128, true,
			"asked 4096, granted 4096, holds 4097; net.core.somaxconn is 128 now: a restart would get 128"},
		{"linux", -1, 4096, 128, true,
			"granted 4096, holds 4097; net.core.somaxconn is 128 now: a restart would get 128"},

		// Unknown.
		{"darwin", 100, unknown, unknown, false,
			"asked 100, granted unknown: kern.ipc.somaxconn cannot be read"},
		{"openbsd", 100, unknown, 128, false,
			"asked 100, granted unknown: this system does not report it; kern.somaxconn is 128"},
		{"windows", 100, unknown, unknown, false,
			"asked 100, granted unknown: this system does not report it"},
		{"windows", -1, unknown, unknown, false,
			"granted unknown: this system does not report it"},
	} {
		r, _ := ruleOf(tt.system)
		b := r.account(tt.n, tt.ceiling, tt.limit, tt.measured)
		require.Equal(t, tt.want, r.describe(b), tt.system)
	}
}

func TestStringIsOfThisSystem(t *testing.T) {
	r := hostRule()
	r.place = ceilingPlace()
	for _, b := range []Backlog{r.account(4096, 128, 128, true), r.account(-1, unknown, unknown, false)} {
		require.Equal(t, "backlog: "+r.describe(b), b.String())
		require.Equal(t, "backlog: "+r.describe(b), fmt.Sprint(b))
	}
}

func TestClamped(t *testing.T) {
	for _, tt := range []struct {
		rule             string
		requested, limit int
		want             bool
	}{
		{"a limit below the request is a clamp", 4096, 128, true},
		{"a clamp to 0", 1, 0, true},
		{"the requested limit is not a clamp", 128, 128, false},
		{"a raised limit is not a clamp", 5, 80, false},
		{"a request for the maximum is never a clamp", -1, 128, false},
		{"an unknown limit is not a clamp", 4096, unknown, false},
	} {
		t.Run(tt.rule, func(t *testing.T) {
			require.Equal(t, tt.want, Backlog{Requested: tt.requested, Limit: tt.limit}.Clamped())
		})
	}
}

func TestBacklogIsLogged(t *testing.T) {
	plain := func(_ []string, a slog.Attr) slog.Attr { // without the attributes that slog adds
		if a.Key == slog.TimeKey || a.Key == slog.LevelKey || a.Key == slog.MessageKey {
			return slog.Attr{}
		}
		return a
	}
	freebsd, _ := ruleOf("freebsd")
	for _, tt := range []struct {
		account    Backlog
		text, json string
	}{
		{
			freebsd.account(4096, 128, 128, true),
			"q.requested=4096 q.ceiling=128 q.limit=128 q.effective=192 q.capacity=193 q.measured=true q.clamped=true\n",
			`{"q":{"requested":4096,"ceiling":128,"limit":128,"effective":192,"capacity":193,"measured":true,"clamped":true}}` + "\n",
		}, {
			rule{}.account(-5, unknown, unknown, false),
			"q.measured=false q.clamped=false\n",
			`{"q":{"measured":false,"clamped":false}}` + "\n",
		}, {
			Backlog{}, // the zero value
			"q.measured=false q.clamped=false\n",
			`{"q":{"measured":false,"clamped":false}}` + "\n",
		}, {
			rule{}.account(0, 0, 0, true), // 0 is known
			"q.requested=0 q.ceiling=0 q.limit=0 q.effective=0 q.capacity=1 q.measured=true q.clamped=false\n",
			`{"q":{"requested":0,"ceiling":0,"limit":0,"effective":0,"capacity":1,"measured":true,"clamped":false}}` + "\n",
		},
	} {
		var out bytes.Buffer
		options := &slog.HandlerOptions{ReplaceAttr: plain}
		slog.New(slog.NewTextHandler(&out, options)).Info("", "q", tt.account)
		require.Equal(t, tt.text, out.String())
		out.Reset()
		slog.New(slog.NewJSONHandler(&out, options)).Info("", "q", tt.account)
		require.Equal(t, tt.json, out.String())
	}
}

func TestBacklogAsJSON(t *testing.T) {
	linux, _ := ruleOf("linux")
	for _, tt := range []struct {
		account Backlog
		want    string
	}{
		{linux.account(4096, unknown, 0, true),
			`{"requested":4096,"ceiling":null,"limit":0,"effective":0,"capacity":1,"measured":true,"clamped":true}`},
		{rule{}.account(-1, unknown, unknown, false),
			`{"requested":-1,"ceiling":null,"limit":null,"effective":null,"capacity":null,"measured":false,"clamped":false}`},
		{Backlog{},
			`{"requested":-1,"ceiling":null,"limit":null,"effective":null,"capacity":null,"measured":false,"clamped":false}`},
	} {
		text, err := json.Marshal(tt.account)
		require.NoError(t, err)
		require.Equal(t, tt.want, string(text))
	}
}

// decoded decodes JSON into a value with other numbers.
func decoded[T any](t *testing.T, into T, text string) T {
	t.Helper()
	require.NoError(t, json.Unmarshal([]byte(text), &into), text)
	return into
}

// A value is the same after encoding and decoding. A missing number is unknown, never 0.
func TestJSONRoundTrip(t *testing.T) {
	linux, _ := ruleOf("linux")
	for _, b := range []Backlog{
		linux.account(4096, 128, 128, true), linux.account(-1, unknown, 0, true), linux.account(0, 0, 0, false),
		linux.account(math.MaxInt32, math.MaxInt32, math.MaxInt32, true), noBacklog,
	} {
		text, err := json.Marshal(b)
		require.NoError(t, err)
		require.Equal(t, b, decoded(t, Backlog{Requested: 7, Ceiling: 7}, string(text)))
	}
	for _, s := range []Stats{
		{Queued: 97, Incomplete: unknown, Limit: 128, Capacity: 129, Drops: math.MaxUint32},
		{Queued: 0, Incomplete: 0, Limit: 0, Capacity: 1, Drops: unknown}, noStats,
	} {
		text, err := json.Marshal(s)
		require.NoError(t, err)
		require.Equal(t, s, decoded(t, Stats{Queued: 7, Drops: 7}, string(text)))
	}
	for _, s := range []System{
		{1, "k", 2, 3, 4, 9, 5, 6, 7, math.MaxInt64}, {Ceiling: 128, SYNBacklog: unknown, ListenDrops: unknown}, noSystem,
	} {
		text, err := json.Marshal(s)
		require.NoError(t, err)
		require.Equal(t, s, decoded(t, System{SYNCookies: 7, Knob: "x"}, string(text)))
	}

	for _, text := range []string{"null", "{}", `{"another":1}`, `{"requested":-9,"queued":-2,"ceiling":-9223372036854775808}`} {
		require.Equal(t, noBacklog, decoded(t, Backlog{Limit: 7, Measured: true}, text))
		require.Equal(t, noStats, decoded(t, Stats{Limit: 7}, text))
		require.Equal(t, noSystem, decoded(t, System{Knob: "x"}, text))
	}
	require.Equal(t, math.MaxInt, decoded(t, Stats{}, `{"queued":9223372036854775807}`).Queued)
	for _, text := range []string{`[]`, `{"ceiling":"unknown","queued":"unknown"}`, `{"ceiling":1.5,"queued":1e99}`} {
		b, s, y := Backlog{Limit: 7}, Stats{Limit: 7}, System{Knob: "x"}
		require.Error(t, json.Unmarshal([]byte(text), &b), text)
		require.Error(t, json.Unmarshal([]byte(text), &s), text)
		require.Error(t, json.Unmarshal([]byte(text), &y), text)
		require.Equal(t, []any{Backlog{Limit: 7}, Stats{Limit: 7}, System{Knob: "x"}}, []any{b, s, y}, "untouched")
	}
}

// In a zero value every number counts as unknown.
func TestZeroValuesAreUnknown(t *testing.T) {
	require.Equal(t, "backlog: nothing known", Backlog{}.String())
	require.Equal(t, "nothing known", Stats{}.String())
	require.Equal(t, "nothing known", noStats.String())
	require.Empty(t, Stats{}.LogValue().Group())
	require.Empty(t, noStats.LogValue().Group())
	for _, zero := range []struct{ a, b any }{{Backlog{}, noBacklog}, {Stats{}, noStats}, {System{}, noSystem}} {
		got, err := json.Marshal(zero.a)
		require.NoError(t, err)
		want, err := json.Marshal(zero.b)
		require.NoError(t, err)
		require.Equal(t, string(want), string(got))
		require.Equal(t, zero.b.(slog.LogValuer).LogValue(), zero.a.(slog.LogValuer).LogValue())
	}
}

func FuzzJSON(f *testing.F) {
	for _, text := range []string{"null", "{}", `{"limit":null}`, `{"requested":-1,"ceiling":0,"queued":5,"knob":"k"}`, `{"drops":1e3}`} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		comesBack[Backlog](t, text)
		comesBack[Stats](t, text)
		comesBack[System](t, text)
	})
}

func comesBack[T any](t *testing.T, text string) {
	var first, second T
	if json.Unmarshal([]byte(text), &first) != nil {
		return
	}
	again, err := json.Marshal(first)
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(again, &second))
	var zero T
	if !reflect.DeepEqual(zero, first) { // which is encoded as unknown
		require.Equal(t, first, second)
	}
}

func TestClampError(t *testing.T) {
	for _, tt := range []struct {
		system            string
		n, limit, ceiling int
		knob, raise       string
		text              string
	}{
		{"linux", 4096, 128, 128, "net.core.somaxconn", "sysctl -w net.core.somaxconn=4096",
			"backlog 4096 clamped to 128: net.core.somaxconn is 128; to raise it: sysctl -w net.core.somaxconn=4096"},
		{"linux", 4096, 128, unknown, "net.core.somaxconn", "sysctl -w net.core.somaxconn=4096",
			"backlog 4096 clamped to 128: net.core.somaxconn is unknown; to raise it: sysctl -w net.core.somaxconn=4096"},
		{"freebsd", 1000, 128, 128, "kern.ipc.soacceptqueue", "sysctl kern.ipc.soacceptqueue=1000",
			"backlog 1000 clamped to 128: kern.ipc.soacceptqueue is 128; to raise it: sysctl kern.ipc.soacceptqueue=1000"},
		{"freebsd", math.MaxInt32, 128, 128, "kern.ipc.soacceptqueue", "sysctl kern.ipc.soacceptqueue=1431655765",
			"backlog 2147483647 clamped to 128: kern.ipc.soacceptqueue is 128; to raise it: sysctl kern.ipc.soacceptqueue=1431655765"},
		{"darwin", 40000, 128, 128, "kern.ipc.somaxconn", "sysctl -w kern.ipc.somaxconn=32767",
			"backlog 40000 clamped to 128: kern.ipc.somaxconn is 128; to raise it: sysctl -w kern.ipc.somaxconn=32767"},
		{"darwin", 40000, 32767, 100000, "kern.ipc.somaxconn", "", // a higher ceiling would not help
			"backlog 40000 clamped to 32767: kern.ipc.somaxconn is 100000"},
		{"openbsd", 129, 128, 128, "kern.somaxconn", "sysctl kern.somaxconn=129",
			"backlog 129 clamped to 128: kern.somaxconn is 128; to raise it: sysctl kern.somaxconn=129"},
		{"netbsd", 129, 128, 128, "", "",
			"backlog 129 clamped to 128: the compiled-in ceiling is 128"},
	} {
		r, _ := ruleOf(tt.system)
		err := r.clamp(tt.n, tt.limit, tt.ceiling)
		require.Equal(t, &ClampError{Requested: tt.n, Limit: tt.limit, Ceiling: tt.ceiling, Knob: tt.knob, Raise: tt.raise}, err)
		if tt.raise != "" {
			tt.text += ceilingPlace()
		}
		require.Equal(t, tt.text, err.Error())
	}
}

// needRule skips a test of listen(2) on a system on which package net listens instead.
func needRule(t *testing.T) {
	t.Helper()
	if _, known := ruleOf(runtime.GOOS); !known {
		t.Skipf("the package has no rule for %s; socket_other_test.go tests that system", runtime.GOOS)
	}
}

// A listener gets what predict has predicted for this host.
func TestPredictMatchesListen(t *testing.T) {
	needRule(t)
	for _, n := range []int{math.MinInt, -1, 0, 1, 2, 5, 80, 127, 128, 129, 1000, 4096, 40000, 65536, math.MaxInt32, beyond, math.MaxInt} {
		predicted, err := predict(&sys.Real, n)
		require.NoError(t, err)
		require.False(t, predicted.Measured)
		require.NotEqual(t, unknown, predicted.Limit)

		ln, err := ListenTCP("127.0.0.1:0", WithBacklog(n))
		require.NoError(t, err)
		require.NoError(t, ln.Close())
		granted := ln.Backlog()
		granted.Measured = false
		require.Equal(t, predicted, granted, "listen(%d)", n)
		require.Equal(t, predicted.Effective, ln.EffectiveBacklog())
	}
}

func TestStrictErrorNamesTheSetting(t *testing.T) {
	needRule(t)
	b, err := predict(&sys.Real, math.MaxInt)
	require.NoError(t, err)
	if !b.Clamped() {
		t.Skipf("nothing is clamped here: the ceiling is %d", b.Ceiling)
	}
	ln, err := ListenTCP("127.0.0.1:0", WithBacklog(math.MaxInt), WithStrictBacklog())
	require.Nil(t, ln)
	var op *net.OpError
	require.True(t, errors.As(err, &op))
	require.Equal(t, "listen", op.Op)
	r := hostRule()
	var clamp *ClampError
	require.True(t, errors.As(err, &clamp))
	require.Equal(t, r.clamp(math.MaxInt, b.Limit, b.Ceiling), clamp)
}

func TestStrictAcceptsWhatIsGranted(t *testing.T) {
	needRule(t)
	for _, n := range []int{-1, 0, 1} {
		ln, err := ListenTCP("127.0.0.1:0", WithBacklog(n), WithStrictBacklog())
		require.NoError(t, err)
		require.NoError(t, ln.Close())
	}
}

func TestSystemAnswers(t *testing.T) {
	s, err := ReadSystem()
	if !systemTells() {
		require.ErrorIs(t, err, errors.ErrUnsupported)
		require.Equal(t, System{
			Ceiling: unknown, SYNBacklog: unknown, SYNCookies: unknown, AbortOnOverflow: unknown, MigrateRequests: unknown,
			ListenOverflows: unknown, ListenDrops: unknown, ReqQFullDrop: unknown, ReqQFullDoCookies: unknown,
		}, s)
	} else {
		require.NoError(t, err)
		predicted, err := predict(&sys.Real, -1)
		if err == nil {
			require.Equal(t, predicted.Ceiling, s.Ceiling)
		}
	}
	some := System{Ceiling: 128, Knob: "k", SYNBacklog: unknown, ListenDrops: unknown}
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("", "system", some)
	require.Contains(t, log.String(), "system.ceiling=128 system.knob=k system.synCookies=0 system.abortOnOverflow=0 "+
		"system.migrateRequests=0 system.listenOverflows=0 system.reqQFullDrop=0 system.reqQFullDoCookies=0\n")
	text, err := json.Marshal(some)
	require.NoError(t, err)
	require.Equal(t, `{"ceiling":128,"knob":"k","synBacklog":null,"synCookies":0,"abortOnOverflow":0,`+
		`"migrateRequests":0,"listenOverflows":0,"listenDrops":null,"reqQFullDrop":0,"reqQFullDoCookies":0}`, string(text))
}

// A negative ceiling is not a large one. DragonFly accepts -1 and then refuses every client.
func TestNegativeCeiling(t *testing.T) {
	for _, tt := range []struct {
		n    uint32
		want int
	}{
		{0, 0}, {128, 128}, {math.MaxUint32 / 3, 1431655765}, {math.MaxInt32, math.MaxInt32},
		{math.MaxInt32 + 1, unknown}, {math.MaxUint32, unknown},
	} {
		n, err := sysctlCeiling(tt.n)
		require.Equal(t, tt.want, n)
		require.Equal(t, tt.want == unknown, errors.Is(err, errNegative), "%d: %v", tt.n, err)
	}
}

func TestSystemString(t *testing.T) {
	require.Equal(t, "nothing known", System{}.String())
	require.Equal(t, "nothing known", noSystem.String())
	require.Equal(t, "net.core.somaxconn is 4096, SYN backlog 2048, SYN cookies 1, abort on overflow 0, migrate requests 0, "+
		"7 listen overflows, 8 listen drops, 3 SYNs dropped by a full SYN queue, 4 SYNs answered with a cookie", fmt.Sprint(System{
		Ceiling: 4096, Knob: "net.core.somaxconn", SYNBacklog: 2048, SYNCookies: 1,
		ListenOverflows: 7, ListenDrops: 8, ReqQFullDrop: 3, ReqQFullDoCookies: 4,
	}))
	bsd := noSystem
	bsd.Ceiling = 128
	require.Equal(t, "the compiled-in ceiling is 128", bsd.String())
}
