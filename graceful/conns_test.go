package graceful

import (
	"context"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Functions begin and end on several connections while net/http reports their states and the
// stop looks. Each connection counts as active while a function runs, and none is left.
func TestConnectionsWithoutALock(t *testing.T) {
	var cs conns
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	var functions, looks sync.WaitGroup
	finished := make(chan bool)
	looks.Go(func() {
		for {
			select {
			case <-finished:
				return
			default:
				cs.look(time.Hour)
			}
		}
	})
	for range 500 {
		nc, other := net.Pipe()
		other.Close()
		c := cs.add(nc)
		c.http2.Store(rand.N(2) == 0)
		for range 3 {
			functions.Go(func() {
				for range rand.N(3) {
					c.begin()
					if c.running() < 1 {
						t.Error("a function that runs is not counted")
					}
					c.end(ended)
				}
			})
		}
		functions.Go(func() {
			c.set(idle)
			c.set(gone)
			c.set(idle)
		})
	}
	functions.Wait()
	close(finished)
	looks.Wait()
	require.Equal(t, counts{}, cs.look(0))
}

// A function that begins when its connection is gone already is waited for.
func TestFunctionThatBeginsLate(t *testing.T) {
	var cs conns
	nc, other := net.Pipe()
	defer other.Close()
	c := cs.add(nc)
	c.set(gone)
	require.Equal(t, counts{}, cs.look(0))
	c.begin()
	require.Equal(t, 1, cs.look(0)[active])
	c.end(t.Context())
	require.Equal(t, counts{}, cs.look(0))
}
