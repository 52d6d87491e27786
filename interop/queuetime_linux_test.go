package interop

import (
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/observe"
	"github.com/pires/go-proxyproto"
	"github.com/soheilhy/cmux"
	"github.com/stretchr/testify/require"
	"golang.org/x/net/netutil"
)

// QueueTime finds the TCP connection in the connections of most listeners that wrap another
// one. If a listener hides it, observe.Queue.Listener directly around ln still observes the
// wait, and Observe counts that the wait is unknown.
func TestQueueTimeOfWrappers(t *testing.T) {
	for _, tt := range []struct {
		name  string
		wrap  func(t *testing.T, ln net.Listener) net.Listener
		found bool
	}{
		{"netutil", func(_ *testing.T, ln net.Listener) net.Listener { return netutil.LimitListener(ln, 4) }, true},
		{"cmux", func(t *testing.T, ln net.Listener) net.Listener {
			m := cmux.New(ln)
			all := m.Match(cmux.Any())
			go m.Serve()
			t.Cleanup(m.Close)
			return all
		}, true},
		{"go-proxyproto", func(_ *testing.T, ln net.Listener) net.Listener { return &proxyproto.Listener{Listener: ln} }, false},
		{"netutil around go-proxyproto", func(_ *testing.T, ln net.Listener) net.Listener {
			return netutil.LimitListener(&proxyproto.Listener{Listener: ln}, 4)
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ln, err := acceptq.ListenTCP("127.0.0.1:0")
			require.NoError(t, err)
			defer ln.Close()
			inner, outer := new(waits), new(waits)
			add := func(w *waits) *observe.Queue {
				set := observe.NewSet(observe.Config{Export: func(*observe.Queue) observe.Exporter { return w }})
				t.Cleanup(func() { set.Close() })
				q, err := set.Add("api", ln)
				require.NoError(t, err)
				return q
			}
			before, after := add(inner), add(outer)
			wrapped := tt.wrap(t, before.Listener(ln))
			client, err := net.Dial("tcp", ln.Addr().String())
			require.NoError(t, err)
			defer client.Close()
			c, err := wrapped.Accept()
			require.NoError(t, err)
			defer c.Close()
			after.Observe(c)
			require.Len(t, *inner, 1)
			var r observe.Reading
			require.NoError(t, after.Read(&r))
			if tt.found {
				require.Len(t, *outer, 1)
				require.Zero(t, r.UnknownWaits)
			} else {
				_, err := acceptq.QueueTime(c)
				require.ErrorIs(t, err, syscall.EINVAL)
				require.Empty(t, *outer)
				require.EqualValues(t, 1, r.UnknownWaits)
			}
		})
	}
}

// waits are the waits that an exporter has got.
type waits []time.Duration

func (w *waits) Observe(wait time.Duration) { *w = append(*w, wait) }
func (*waits) Remove()                      {}
