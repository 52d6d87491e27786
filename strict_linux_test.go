package acceptq

import (
	"math"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestStrict(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		setSysctl(t, "net.core.somaxconn", 3)

		for name, opts := range map[string][]Option{
			"less than the ceiling":     {WithBacklog(2)},
			"the ceiling":               {WithBacklog(3)},
			"nothing":                   {WithBacklog(0)},
			"as much as allowed":        {WithBacklog(-1)},
			"as much as allowed, large": {WithBacklog(math.MinInt)},
			"no number":                 nil,
		} {
			t.Run("granted: "+name, func(t *testing.T) {
				ln, err := ListenTCP("127.0.0.1:0", append(opts, WithStrictBacklog())...)
				require.NoError(t, err)
				require.NoError(t, ln.Close())
			})
		}

		const command = "sysctl -w net.core.somaxconn=4"
		for _, tc := range []struct {
			rule    string
			ceiling func(sys *system)
			said    int
			raise   string // "" where the command would lower what it said
			bound   bool   // refused by what the socket said
		}{
			{rule: "before bind where the ceiling can be read", ceiling: func(*system) {}, said: 3, raise: command},
			{rule: "by the socket where it is hidden", ceiling: hidden["ENOENT"], said: -1, raise: command, bound: true},
			{rule: "by the socket where it lies", ceiling: ceilingFile("1000\n", nil), said: 1000, bound: true},
		} {
			t.Run("refused "+tc.rule, func(t *testing.T) {
				sys := realSystem
				tc.ceiling(&sys)
				var bound string
				sys.bind = noteBound(t, &bound)
				err := refused(t, func() (*Listener, error) {
					return sys.listenWith(t.Context(), "tcp", "127.0.0.1:0", []Option{WithBacklog(4), WithStrictBacklog()})
				})
				var clamp *ClampError
				require.ErrorAs(t, err, &clamp)
				require.Equal(t, &ClampError{
					Requested: 4, Limit: 3, Ceiling: tc.said,
					Knob: "net.core.somaxconn", Raise: tc.raise,
				}, clamp)
				require.Equal(t, tc.bound, bound != "")
				if tc.bound {
					freeAgain(t, "tcp", bound)
				}
			})
		}

		t.Run("nobody sees the port", func(t *testing.T) {
			holder := ourMaker.open(t, "tcp", "127.0.0.1:0")
			address := holder.Addr().String()
			err := refused(t, func() (*Listener, error) {
				return ListenTCP(address, WithStrictBacklog(), WithBacklog(4))
			})
			var clamp *ClampError
			require.ErrorAs(t, err, &clamp)
			require.NotErrorIs(t, err, unix.EADDRINUSE)
		})
	})
}
