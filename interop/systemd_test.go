//go:build unix

package interop

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/coreos/go-systemd/v22/activation"
	"github.com/stretchr/testify/require"
)

// activationHelper is a service that is started with a UDP and a TCP socket.
func activationHelper() error {
	// Set it here: systemd would set it between fork and exec.
	if err := os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid())); err != nil {
		return err
	}
	listeners, err := activation.Listeners()
	if err != nil {
		return err
	}
	if len(listeners) != 2 {
		return fmt.Errorf("%d listeners, not 2", len(listeners))
	}
	// A socket that is not a listener is returned as nil.
	if _, err := acceptq.Wrap(listeners[0]); !errors.Is(err, syscall.EINVAL) {
		return fmt.Errorf("Wrap of %v: %v", listeners[0], err)
	}
	ln, err := adopt("service", listeners[1])
	if err != nil {
		return err
	}
	if err := serve(ln, 3, "service"); err != nil {
		return err
	}
	return report{Who: "service", Done: true}.send()
}

// A service inherits a listener with queued clients, by the protocol of systemd. Holder
// and service see the same queue, and changes of the service stay after it has ended.
// The library of systemd reads the protocol. The test itself sets up the sockets and
// the LISTEN_ variables, so that it can watch the queue as the holder and use MPTCP.
// TestSystemdSocketActivate runs the program of systemd.
func TestActivationLibraryWithSocketsSetByHand(t *testing.T) {
	for name, listen := range newListeners {
		t.Run(name, func(t *testing.T) {
			original, err := listen()
			require.NoError(t, err)
			defer original.Close()
			multipath := isMultipath(t, original.(syscall.Conn))
			t.Log("MPTCP:", multipath)
			udp, err := net.ListenPacket("udp", "127.0.0.1:0")
			require.NoError(t, err)
			defer udp.Close()
			holder, err := acceptq.Wrap(original)
			require.NoError(t, err)
			before, err := holder.Stats()
			require.NoError(t, err)

			first, second := connect(t, holder.Addr().String()), connect(t, holder.Addr().String())
			require.Eventually(t, func() bool {
				s, err := holder.Stats()
				return err == nil && s.Queued == 2
			}, patience, time.Millisecond)

			cmd := helperCommand(t, "activation", "LISTEN_FDS=2")
			cmd.ExtraFiles = append(cmd.ExtraFiles,
				duplicate(t, udp.(syscall.Conn)), duplicate(t, original.(syscall.Conn))) // 3 and 4
			out, err := cmd.StdoutPipe()
			require.NoError(t, err)
			require.NoError(t, cmd.Start())
			service := reports{bufio.NewScanner(out)}
			r := service.next(t)
			requireInherited(t, r, 2, multipath)
			require.Equal(t, before.Limit, r.Inherited.Limit)
			require.Equal(t, "service", answer(t, first))
			require.Equal(t, "service", answer(t, second))
			require.Equal(t, "service", answer(t, connect(t, r.Addr)))
			require.True(t, service.next(t).Done)
			service.end(t)
			require.NoError(t, cmd.Wait())

			s, err := holder.Stats()
			require.NoError(t, err)
			require.Zero(t, s.Queued)
			b, err := holder.SetBacklog(7)
			require.NoError(t, err)
			require.Equal(t, 7, b.Limit)
			require.NoError(t, original.(interface{ SetDeadline(time.Time) error }).SetDeadline(time.Now().Add(patience)))
			late := connect(t, r.Addr)
			require.NoError(t, serve(original, 1, "holder"))
			require.Equal(t, "holder", answer(t, late))
		})
	}
}
