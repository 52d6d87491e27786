package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"runtime"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/internal/testkit"
)

// A call that cannot list the queues returns an error, and not an empty list.
func TestQueuesThatCannotBeListed(t *testing.T) {
	ended, end := context.WithCancel(t.Context())
	end()
	ln := listenForStats(t)
	closed := listenForStats(t)
	require.NoError(t, closed.Close())
	var none context.Context
	for name, test := range map[string]struct {
		op    string
		list  func() ([]acceptq.Queue, error)
		linux error
	}{
		"no context":                 {"queues", func() ([]acceptq.Queue, error) { return acceptq.Queues(none) }, syscall.EINVAL},
		"a context that has ended":   {"queues", func() ([]acceptq.Queue, error) { return acceptq.Queues(ended) }, context.Canceled},
		"a group without a context":  {"group", func() ([]acceptq.Queue, error) { return ln.Group(none) }, syscall.EINVAL},
		"a group, the context ended": {"group", func() ([]acceptq.Queue, error) { return ln.Group(ended) }, context.Canceled},
		"the group of a closed one":  {"group", func() ([]acceptq.Queue, error) { return closed.Group(t.Context()) }, net.ErrClosed},
		"the group of nil":           {"group", func() ([]acceptq.Queue, error) { return (*acceptq.Listener)(nil).Group(t.Context()) }, syscall.EINVAL},
		"the group of a zero value":  {"group", func() ([]acceptq.Queue, error) { return new(acceptq.Listener).Group(t.Context()) }, syscall.EINVAL},
	} {
		all, err := test.list()
		require.Nil(t, all, name)
		testkit.RequireOp(t, err, test.op)
		if runtime.GOOS == "linux" {
			require.ErrorIs(t, err, test.linux, name)
		}
	}
	_, err := acceptq.Queue{}.Waiting(none)
	testkit.RequireOp(t, err, "waiting")
	require.ErrorIs(t, err, syscall.EINVAL)
	_, err = acceptq.Queue{}.Waiting(t.Context())
	require.ErrorIs(t, err, errors.ErrUnsupported, "no such socket")
	if runtime.GOOS != "linux" {
		_, err := acceptq.Queues(t.Context())
		require.ErrorIs(t, err, errors.ErrUnsupported)
		_, err = ln.Group(t.Context())
		require.ErrorIs(t, err, errors.ErrUnsupported)
	}
}

// The text and the JSON of a Queue do not change: programs read them.
func TestQueueInWords(t *testing.T) {
	for _, test := range []struct {
		queue      acceptq.Queue
		text, json string
	}{
		{
			acceptq.Queue{
				Addr: netip.MustParseAddrPort("127.0.0.1:80"), UID: 33, Inode: 4711,
				Stats: acceptq.Stats{Queued: 3, Incomplete: -1, Limit: 128, Capacity: 129, Drops: 7},
			},
			"127.0.0.1:80: 3 queued of 129 (2%), limit 128, drops 7",
			`{"addr":"127.0.0.1:80","v6Only":false,"device":"",` +
				`"stats":{"queued":3,"incomplete":null,"limit":128,"capacity":129,"drops":7},"uid":33,"inode":4711}`,
		},
		{
			acceptq.Queue{Addr: netip.MustParseAddrPort("[::]:80"), V6Only: true, Device: "eth0"},
			"[::]:80 on eth0: nothing known",
			`{"addr":"[::]:80","v6Only":true,"device":"eth0",` +
				`"stats":{"queued":null,"incomplete":null,"limit":null,"capacity":null,"drops":null},"uid":0,"inode":0}`,
		},
		{
			acceptq.Queue{Addr: netip.MustParseAddrPort("[fe80::1%eth0]:80"), Device: "eth0"},
			"[fe80::1%eth0]:80: nothing known",
			`{"addr":"[fe80::1%eth0]:80","v6Only":false,"device":"eth0",` +
				`"stats":{"queued":null,"incomplete":null,"limit":null,"capacity":null,"drops":null},"uid":0,"inode":0}`,
		},
	} {
		require.Equal(t, test.text, test.queue.String())
		text, err := json.Marshal(test.queue)
		require.NoError(t, err)
		require.Equal(t, test.json, string(text))
		if test.queue.Stats != (acceptq.Stats{}) {
			var back acceptq.Queue
			require.NoError(t, json.Unmarshal(text, &back))
			require.Equal(t, test.queue, back)
		}
	}
}
