package acceptq

import (
	"embed"
	"errors"
	"io/fs"
	"math"
	"net"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq/internal/sockopt"
	"github.com/acceptq/acceptq/internal/testkit"
)

//go:embed docs/systems.md docs/migrating.md
var pages embed.FS

// page is the text of a page in docs.
func page(t *testing.T, name string) string {
	t.Helper()
	text, err := pages.ReadFile("docs/" + name)
	require.NoError(t, err)
	return string(text)
}

//go:embed example_control_linux_test.go example_control_freebsd_test.go
var recipes embed.FS

// column is the column of this system in the table of docs/systems.md.
func column() string {
	switch runtime.GOOS {
	case "linux", "android":
		return "Linux"
	case "freebsd":
		return "FreeBSD"
	case "netbsd":
		return "NetBSD"
	case "dragonfly":
		return "DragonFly"
	case "openbsd":
		return "OpenBSD"
	case "darwin", "ios":
		return "macOS"
	case "windows", "solaris", "illumos", "aix":
		return "Windows, Solaris, illumos, AIX"
	}
	return "Plan 9, js, wasip1"
}

// tableRows returns the cells of the table under a title of a page.
func tableRows(t *testing.T, text, title string) (rows [][]string) {
	t.Helper()
	_, text, found := strings.Cut(text, "\n## "+title+"\n")
	require.True(t, found, title)
	text, _, _ = strings.Cut(text, "\n#")
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if !strings.HasPrefix(line, "|") || strings.HasPrefix(line, "| ---") {
			continue
		}
		var row []string
		for cell := range strings.SplitSeq(strings.Trim(line, "|"), "|") {
			row = append(row, strings.Trim(strings.TrimSpace(cell), "`"))
		}
		rows = append(rows, row)
	}
	require.NotEmpty(t, rows, title)
	return rows
}

func TestNilOptionIsIgnored(t *testing.T) {
	ln, err := ListenTCP("127.0.0.1:0", nil, WithBacklog(5), nil)
	require.NoError(t, err)
	defer ln.Close()
	require.Equal(t, 5, ln.Backlog().Requested)
	s, err := ListenTCPShards("127.0.0.1:0", 1, nil)
	require.NoError(t, err)
	defer s.Close()
	require.Equal(t, MaxBacklog, s.Backlogs()[0].Requested)
}

// On this system each option works or makes listening fail, as the table of docs/systems.md
// says.
func TestOptionsAreHonouredOrRefused(t *testing.T) {
	called := false
	options := map[string]Option{
		"WithBacklog":       WithBacklog(5),
		"WithStrictBacklog": WithStrictBacklog(),
		"WithReusePort":     WithReusePort(),
		"WithoutSteering":   WithoutSteering(),
		"WithControl":       WithControl(func(string, string, syscall.RawConn) error { called = true; return nil }),
		"WithDeferAccept":   WithDeferAccept(time.Second),
		"WithAcceptFilter":  WithAcceptFilter("dataready", ""),
		"WithFastOpen":      WithFastOpen(1),
		"WithReceiveBuffer": WithReceiveBuffer(8192),
		"WithSendBuffer":    WithSendBuffer(8192),
		"WithKeepAlive":     WithKeepAlive(net.KeepAliveConfig{}),
	}
	rows := tableRows(t, page(t, "systems.md"), "Which option works where")
	require.Len(t, rows, 1+len(options))
	here := 0
	for i, head := range rows[0] {
		if head == column() {
			here = i
		}
	}
	require.NotZero(t, here, column())

	for _, row := range rows[1:] {
		t.Run(row[0], func(t *testing.T) {
			require.Contains(t, options, row[0])
			before := testkit.OpenDescriptors()
			ln, err := ListenTCP("127.0.0.1:0", options[row[0]])
			verdict, condition, _ := strings.Cut(row[here], " ")
			switch {
			case row[here] == "no effect":
				require.NoError(t, err)
			case verdict == "no":
				require.ErrorIs(t, err, errors.ErrUnsupported)
			case condition != "" && err != nil:
				require.True(t, errors.Is(err, errors.ErrUnsupported) || errors.Is(err, fs.ErrNotExist), "%v", err)
			default:
				require.Contains(t, []string{"yes", "hint"}, verdict)
				require.NoError(t, err)
			}
			if err == nil {
				require.Equal(t, row[0] == "WithControl", called, "the hook")
				called = false
				if verdict == "hint" {
					require.Equal(t, unknown, ln.Backlog().Limit)
				}
				require.NoError(t, ln.Close())
			} else {
				requireListenError(t, ln, err)
			}
			require.Equal(t, before, testkit.OpenDescriptors())
		})
	}
}

// The ceilings in the table match the rules in the code.
func TestCeilingsOfThePage(t *testing.T) {
	known := 0
	for _, row := range tableRows(t, page(t, "systems.md"), "The limit")[1:] {
		goos := strings.ToLower(row[0])
		if goos == "macos" {
			goos = "darwin"
		}
		r, ok := ruleOf(goos)
		switch {
		case !ok:
			require.Equal(t, []string{"others", "unknown"}, row[:2])
			continue
		case r.compiled != 0:
			require.Equal(t, "compiled in", row[1])
			require.Equal(t, strconv.Itoa(r.compiled), row[2])
		default:
			require.Equal(t, r.knob, row[1], row[0])
		}
		known++
	}
	require.Equal(t, 6, known)
}

// Each recipe in docs/migrating.md has an example of that name.
func TestRecipesExist(t *testing.T) {
	var source strings.Builder
	for _, name := range []string{"example_control_linux_test.go", "example_control_freebsd_test.go"} {
		text, err := recipes.ReadFile(name)
		require.NoError(t, err)
		source.WriteString(string(text))
	}
	named := regexp.MustCompile("recipe `(\\w+)`").FindAllStringSubmatch(page(t, "migrating.md"), -1)
	require.NotEmpty(t, named)
	for _, name := range named {
		require.Contains(t, source.String(), "func ExampleWithControl_"+name[1]+"()")
	}
}

// An invalid value is an error on every system, and the error names the option.
func TestOptionValues(t *testing.T) {
	long := strings.Repeat("x", 256)
	for name, bad := range map[string][]Option{
		"WithControl":       {WithControl(nil)},
		"WithDeferAccept":   {WithDeferAccept(0), WithDeferAccept(-1), WithDeferAccept(math.MinInt64)},
		"WithFastOpen":      {WithFastOpen(0), WithFastOpen(-1), WithFastOpen(math.MinInt)},
		"WithReceiveBuffer": {WithReceiveBuffer(0), WithReceiveBuffer(-1), WithReceiveBuffer(math.MinInt)},
		"WithSendBuffer":    {WithSendBuffer(0), WithSendBuffer(-1), WithSendBuffer(math.MinInt)},
		"WithAcceptFilter": {
			WithAcceptFilter("", ""), WithAcceptFilter(long[:16], ""), WithAcceptFilter("a\x00b", ""),
			WithAcceptFilter("dataready", long[:240]), WithAcceptFilter("dataready", "\x00"),
		},
		"WithKeepAlive": {
			WithKeepAlive(net.KeepAliveConfig{Enable: true, Idle: (1<<32 + 5) * time.Second}), // net would use 5 s
			WithKeepAlive(net.KeepAliveConfig{Enable: true, Idle: math.MaxInt64}),
			WithKeepAlive(net.KeepAliveConfig{Enable: true, Interval: math.MaxInt64}),
		},
	} {
		if name == "WithKeepAlive" && math.MaxInt > math.MaxInt32 { // with 32 bits no Count is too large
			bad = append(bad, WithKeepAlive(net.KeepAliveConfig{Enable: true, Count: beyond}))
		}
		for i, opt := range bad {
			ln, err := ListenTCP("127.0.0.1:0", opt)
			require.Error(t, err, "%s, %d", name, i)
			require.ErrorContains(t, err, name)
			require.NotErrorIs(t, err, errors.ErrUnsupported, "no system can honor it")
			requireListenError(t, ln, err)

			// The error belongs to this call, so a later valid option does not remove it.
			_, err = ListenTCP("127.0.0.1:0", opt, WithDeferAccept(time.Second), WithKeepAlive(net.KeepAliveConfig{}))
			require.ErrorContains(t, err, name)
		}
	}
	for _, good := range []Option{
		WithAcceptFilter(long[:15], long[:239]), WithDeferAccept(math.MaxInt64), WithFastOpen(math.MaxInt),
		WithKeepAlive(net.KeepAliveConfig{Idle: math.MaxInt32 * time.Second, Interval: math.MaxInt32 * time.Second, Count: math.MaxInt32}),
	} {
		_, err := newOptions([]Option{good})
		require.NoError(t, err)
	}
}

// If several options are invalid, the error names the first.
func TestFirstBadOptionIsNamed(t *testing.T) {
	a, b := WithFastOpen(-1), WithSendBuffer(-2)
	for want, opts := range map[string][]Option{"WithFastOpen(-1)": {a, b}, "WithSendBuffer(-2)": {WithBacklog(1), b, a}} {
		_, err := newOptions(opts)
		require.ErrorContains(t, err, want)
	}
}

// A socket has one filter. If two options need it, the error names both, in either order.
func TestOptionsThatContradict(t *testing.T) {
	a, b := WithDeferAccept(time.Second), WithAcceptFilter("httpready", "")
	for _, opts := range [][]Option{{a, b}, {b, a}} {
		ln, err := ListenTCP("127.0.0.1:0", opts...)
		requireListenError(t, ln, err)
		require.ErrorContains(t, err, "WithDeferAccept")
		require.ErrorContains(t, err, "WithAcceptFilter")
	}
}

// A later option replaces an earlier one of its kind. WithControl functions are called in
// order.
func TestLaterOptionWins(t *testing.T) {
	var order []int
	hook := func(n int) Option {
		return WithControl(func(string, string, syscall.RawConn) error { order = append(order, n); return nil })
	}
	o, err := newOptions([]Option{
		WithBacklog(1), WithBacklog(2), WithDeferAccept(1), WithDeferAccept(2), WithFastOpen(1), WithFastOpen(2),
		WithReceiveBuffer(1), WithReceiveBuffer(2), WithSendBuffer(1), WithSendBuffer(2), hook(1), hook(2), hook(3),
		WithKeepAlive(net.KeepAliveConfig{Count: 1}), WithKeepAlive(net.KeepAliveConfig{Count: 2}),
	})
	require.NoError(t, err)
	require.Equal(t, []int{2, 2, 2, 2, 2}, []int{o.backlog, int(o.DeferAccept), o.FastOpen, o.ReceiveBuffer, o.SendBuffer})
	require.Equal(t, 2, o.KeepAlive.Count)
	require.NoError(t, o.callControls("tcp4", "127.0.0.1:0", nil))
	require.Equal(t, []int{1, 2, 3}, order)

	o, err = newOptions([]Option{WithAcceptFilter("a", "1"), WithAcceptFilter("b", "")})
	require.NoError(t, err)
	require.Equal(t, &sockopt.AcceptFilter{Name: "b", Arg: ""}, o.AcceptFilter)
}

// An Option has no state: two listeners made with the same Option do not affect each other.
func TestOptionIsReusable(t *testing.T) {
	config := net.KeepAliveConfig{Count: 1}
	opts := []Option{WithKeepAlive(config), WithBacklog(3)}
	a, err := newOptions(opts)
	require.NoError(t, err)
	b, err := newOptions(append(opts, WithBacklog(4)))
	require.NoError(t, err)
	require.Equal(t, []int{3, 4}, []int{a.backlog, b.backlog})
}

// OpenBSD has keep-alive without times. NetBSD can set the times, but may not report them.
func TestKeepAliveTimes(t *testing.T) {
	ln, err := ListenTCP("127.0.0.1:0", WithKeepAlive(net.KeepAliveConfig{Enable: true, Idle: -1, Interval: -1, Count: -1}))
	timed, timedErr := ListenTCP("127.0.0.1:0", WithKeepAlive(net.KeepAliveConfig{Enable: true, Idle: time.Minute}))
	switch column() {
	case "Plan 9, js, wasip1":
		require.ErrorIs(t, err, errors.ErrUnsupported)
		require.ErrorIs(t, timedErr, errors.ErrUnsupported)
	case "OpenBSD":
		require.NoError(t, err)
		require.ErrorIs(t, timedErr, errors.ErrUnsupported)
	case "NetBSD":
		require.True(t, err == nil || errors.Is(err, errors.ErrUnsupported), "%v", err)
		require.NoError(t, timedErr)
	default:
		require.NoError(t, err)
		require.NoError(t, timedErr)
	}
	for _, l := range []*Listener{ln, timed} {
		if l != nil {
			l.Close()
		}
	}
}

// Each option is either honored by net or named by beyondNet. A new option fails this test
// until beyondNet handles it. The test sets one field of the options at a time.
func TestEachOptionIsHandledByBeyondNet(t *testing.T) {
	withNet := map[string]bool{
		"backlog":   true, // a hint
		"steers":    true, // used only with reusePort
		"unsteered": true, // only prevents an action
		"controls":  true, // listening shows whether net calls them
		"keepAlive": !testkit.OnFakeNet && runtime.GOOS != "plan9",
		"err":       true, // listening fails before that
	}
	asked := slices.DeleteFunc(reflect.VisibleFields(reflect.TypeFor[options]()), func(f reflect.StructField) bool { return f.Anonymous })
	require.GreaterOrEqual(t, len(asked), len(withNet))
	for _, f := range asked {
		name := strings.ToLower(f.Name[:1]) + f.Name[1:]
		var o options
		require.Empty(t, o.beyondNet())
		field := reflect.ValueOf(&o).Elem().FieldByIndex(f.Index)
		field = reflect.NewAt(field.Type(), field.Addr().UnsafePointer()).Elem() // so that it can be set
		switch field.Kind() {
		case reflect.Bool:
			field.SetBool(true)
		case reflect.Int, reflect.Int64:
			field.SetInt(1)
		case reflect.Pointer:
			field.Set(reflect.New(field.Type().Elem()))
		case reflect.Slice:
			field.Set(reflect.MakeSlice(field.Type(), 1, 1))
		default:
			require.Equal(t, "err", name, "this test cannot set a %v", field.Type())
		}
		require.Equal(t, withNet[name], o.beyondNet() == "", "%s: does beyondNet handle it?", name)
	}
}
