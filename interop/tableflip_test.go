//go:build unix

package interop

import (
	"bufio"
	"context"
	"net"
	"os"
	"os/signal"
	"syscall"
	"testing"

	"github.com/acceptq/acceptq"
	"github.com/cloudflare/tableflip"
	"github.com/stretchr/testify/require"
)

// makerEnv has the name of the function in newListeners that the first generation uses.
const makerEnv = "ACCEPTQ_TEST_MAKER"

// tableflipHelper runs as a server that upgrades itself once, and as its upgrade.
func tableflipHelper() error {
	upg, err := tableflip.New(tableflip.Options{UpgradeTimeout: patience})
	if err != nil {
		return err
	}
	defer upg.Stop()
	listener, err := upg.ListenWithCallback("tcp", "127.0.0.1:0", func(string, string) (net.Listener, error) {
		return newListeners[os.Getenv(makerEnv)]()
	})
	if err != nil {
		return err
	}
	defer listener.Close()
	if upg.HasParent() {
		return newGeneration(upg, listener)
	}
	return oldGeneration(upg, listener)
}

// oldGeneration leaves its clients in the queue and upgrades. Then it accepts one of
// them, which shows that it still holds the listener.
func oldGeneration(upg *tableflip.Upgrader, listener net.Listener) error {
	ln, err := acceptq.Wrap(listener)
	if err != nil {
		return err
	}
	s, err := ln.Stats()
	if err != nil {
		return err
	}
	if err := upg.Ready(); err != nil {
		return err
	}
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	if err := (report{Who: "old", Addr: ln.Addr().String(), Inherited: (*numbers)(&s)}).send(); err != nil {
		return err
	}
	<-hangup
	if err := upg.Upgrade(); err != nil {
		return err
	}
	if s, err = ln.Stats(); err != nil {
		return err
	}
	if err := serve(ln, 1, "old"); err != nil {
		return err
	}
	return report{Who: "old", Resized: (*numbers)(&s), Done: true}.send()
}

// newGeneration adopts the listener, and serves after the old generation has ended.
func newGeneration(upg *tableflip.Upgrader, listener net.Listener) error {
	ln, err := adopt("new", listener)
	if err != nil {
		return err
	}
	if err := upg.Ready(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := upg.WaitForParent(ctx); err != nil {
		return err
	}
	if err := serve(ln, 2, "new"); err != nil {
		return err
	}
	return report{Who: "new", Done: true}.send()
}

// A server upgrades itself on SIGHUP with clients in its queue. The old and the new
// process see the same queue, and no client is lost.
func TestTableflipUpgrade(t *testing.T) {
	for name := range newListeners {
		t.Run(name, func(t *testing.T) {
			cmd := helperCommand(t, "tableflip", makerEnv+"="+name)
			out, err := cmd.StdoutPipe()
			require.NoError(t, err)
			require.NoError(t, cmd.Start())
			both := reports{bufio.NewScanner(out)}
			first := both.next(t)
			require.Equal(t, "old", first.Who)
			multipath := first.Inherited.Drops == -1
			t.Log("MPTCP:", multipath)
			if name == "acceptq" {
				require.Equal(t, 5, first.Inherited.Limit)
			}

			clients := []net.Conn{connect(t, first.Addr), connect(t, first.Addr)}
			require.NoError(t, cmd.Process.Signal(syscall.SIGHUP))
			adopted := both.next(t)
			require.Equal(t, "new", adopted.Who)
			require.Equal(t, first.Addr, adopted.Addr)
			requireInherited(t, adopted, 2, multipath)
			require.Equal(t, first.Inherited.Limit, adopted.Inherited.Limit)

			old := both.next(t)
			require.Equal(t, "old", old.Who)
			require.True(t, old.Done)
			require.Equal(t, 2, old.Resized.Queued)
			require.Equal(t, 9, old.Resized.Limit, "the new generation must change the limit of the shared socket")

			answers := []string{answer(t, clients[0]), answer(t, clients[1])}
			require.ElementsMatch(t, []string{"old", "new"}, answers)
			require.Equal(t, "new", answer(t, connect(t, first.Addr)))
			last := both.next(t)
			require.Equal(t, "new", last.Who)
			require.True(t, last.Done)
			both.end(t)
			require.NoError(t, cmd.Wait())
		})
	}
}
