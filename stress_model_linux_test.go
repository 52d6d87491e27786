package acceptq

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// seedEnv has the seed with which a test in random order repeats an earlier run.
const seedEnv = "ACCEPTQ_SEED"

func seedOf(t *testing.T) uint64 {
	t.Helper()
	seed := rand.Uint64()
	if text := os.Getenv(seedEnv); text != "" {
		var err error
		seed, err = strconv.ParseUint(text, 10, 64)
		require.NoError(t, err)
	}
	t.Logf("%s=%d", seedEnv, seed)
	return seed
}

// A subject is a Listener or Shards that random users call.
type subject struct {
	listeners  []*Listener
	stats      func() (Stats, error)
	setBacklog func(n int) error
	drain      func(ctx context.Context) error
	close      func() error
}

// A model holds what must be true of a subject.
type model struct {
	subject
	ceiling   int
	last      []int // for each user, the number of its last SetBacklog
	connected atomic.Int64
	served    atomic.Int64
	refused   atomic.Int64
}

// granted returns the limit for a request of n.
func (m *model) granted(n int) int {
	if n < 0 || n > m.ceiling {
		return m.ceiling
	}
	return n
}

// accepts answers clients until the listener is closed. Other users set the deadlines.
func (m *model) accepts(t *testing.T, l *Listener, accept func() (net.Conn, error), answers *sync.WaitGroup) {
	for {
		c, err := accept()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			l.SetDeadline(time.Time{}) // fails if the listener was closed, as Accept will
			continue
		}
		if err != nil {
			assert.ErrorIs(t, err, net.ErrClosed)
			return
		}
		answers.Go(func() {
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			p := make([]byte, 4)
			if _, err := io.ReadFull(c, p); assert.NoError(t, err) {
				c.Write(p)
			}
		})
	}
}

// comes connects one client. A client that gets in must be served.
func (m *model) comes(t *testing.T) {
	c, err := net.DialTimeout("tcp", m.listeners[0].Addr().String(), patience)
	if err != nil {
		m.refused.Add(1)
		return
	}
	defer c.Close()
	m.connected.Add(1)
	c.SetDeadline(time.Now().Add(patience))
	_, err = c.Write([]byte("word"))
	assert.NoError(t, err)
	if _, err := io.ReadFull(c, make([]byte, 4)); assert.NoError(t, err, "a client that was let in is lost") {
		m.served.Add(1)
	}
}

// use calls one method, which must succeed until the end.
func (m *model) use(t *testing.T, user int, r *rand.Rand) {
	l := m.listeners[r.IntN(len(m.listeners))]
	switch op := r.IntN(14); op {
	case 0, 1, 2:
		m.comes(t)
	case 3:
		s, err := m.stats()
		assert.NoError(t, err)
		assert.GreaterOrEqual(t, s.Queued, 0)
	case 4:
		s, err := ReadStats(l)
		assert.NoError(t, err)
		assert.Equal(t, s.Limit+1, s.Capacity)
	case 5:
		n := []int{32, 64, 100, -1, -5, 1 << 20}[r.IntN(6)]
		assert.NoError(t, m.setBacklog(n))
		m.last[user] = n
	case 6:
		b := l.Backlog()
		assert.Equal(t, m.granted(b.Requested), b.Limit)
		assert.True(t, b.Measured)
	case 7:
		assert.GreaterOrEqual(t, l.EffectiveBacklog(), 32)
	case 8:
		w, err := Wrap(l.TCPListener())
		if assert.NoError(t, err) {
			_, err = w.Stats()
			assert.NoError(t, err)
		}
	case 9:
		f, err := l.File()
		if assert.NoError(t, err) {
			assert.NoError(t, f.Close())
		}
	case 10:
		raw, err := l.SyscallConn()
		if assert.NoError(t, err) {
			assert.NoError(t, raw.Control(func(uintptr) {}))
		}
	case 11:
		assert.NoError(t, l.SetDeadline(time.Now().Add(time.Duration(r.IntN(4)-1)*time.Millisecond)))
	case 12:
		_, err := ReadSystem()
		assert.NoError(t, err)
		assert.NotNil(t, l.Addr())
	case 13:
		if r.IntN(4) > 0 { // a client that connects during a drain retries a second later
			return
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(r.IntN(10))*time.Millisecond)
		defer cancel()
		if err := m.drain(ctx); !errors.Is(err, ErrStillOpen) {
			assert.ErrorIs(t, err, context.DeadlineExceeded)
		}
	}
}

// run lets users call methods at random. Then it drains and closes while clients still
// connect.
func (m *model) run(t *testing.T, seed uint64) {
	const users, uses = 8, 60
	b, err := PredictBacklog(-1)
	require.NoError(t, err)
	m.ceiling = b.Ceiling
	require.GreaterOrEqual(t, m.ceiling, 100)
	m.last = make([]int, users)
	for i := range m.last {
		m.last[i] = 64
	}
	var loops, answers sync.WaitGroup
	for _, l := range m.listeners {
		// The socket may have another holder, so a drain is undone when it ends.
		f, err := l.File()
		require.NoError(t, err)
		require.NoError(t, f.Close())
		loops.Go(func() { m.accepts(t, l, l.Accept, &answers) })
		loops.Go(func() { m.accepts(t, l, func() (net.Conn, error) { return l.AcceptTCP() }, &answers) })
	}
	each(users, func(user int) {
		r := rand.New(rand.NewPCG(seed, uint64(user)))
		for range uses {
			m.use(t, user, r)
		}
	})
	assert.Zero(t, m.refused.Load(), "it was open all the time")
	assert.Equal(t, m.connected.Load(), m.served.Load())
	for _, l := range m.listeners {
		s, err := l.Stats()
		assert.NoError(t, err)
		assert.Equal(t, l.Backlog().Limit, s.Limit)
		var possible []int
		for _, n := range m.last {
			possible = append(possible, m.granted(n))
		}
		assert.Contains(t, possible, s.Limit, "as the last one set it")
	}

	var clients sync.WaitGroup
	closed := make(chan struct{})
	for range users {
		clients.Go(func() {
			for {
				select {
				case <-closed:
					return
				default:
					m.comes(t)
				}
			}
		})
	}
	was := m.served.Load()
	assert.True(t, eventually(func() bool { return m.served.Load() >= was+users }))
	// The socket is shared, so a client that connects between the end of the drain and
	// Close would be lost. For the last drain it is marked as not shared.
	for _, l := range m.listeners {
		l.intake.mu.Lock()
		l.intake.shared = false
		l.intake.shown.Store(false)
		l.intake.mu.Unlock()
	}
	assert.NoError(t, m.drain(within(t, patience)))
	assert.NoError(t, m.close())
	close(closed)
	clients.Wait()
	loops.Wait()
	answers.Wait()
	assert.Equal(t, m.connected.Load(), m.served.Load())
	t.Logf("%d clients served, %d came too late", m.served.Load(), m.refused.Load())

	// After Close every method returns net.ErrClosed, also with concurrent callers.
	each(users, func(int) {
		for _, l := range m.listeners {
			for name, err := range map[string]error{
				"Accept":      second(l.Accept()),
				"AcceptTCP":   second(l.AcceptTCP()),
				"Stats":       second(l.Stats()),
				"ReadStats":   second(ReadStats(l)),
				"SetBacklog":  second(l.SetBacklog(1)),
				"Drain":       l.Drain(t.Context()),
				"File":        second(l.File()),
				"Wrap":        second(Wrap(l.TCPListener())),
				"SetDeadline": l.SetDeadline(time.Now()),
				"Close":       l.Close(),
				"of all":      m.drain(t.Context()),
				"all's Stats": second(m.stats()),
				"all's limit": m.setBacklog(1),
			} {
				assert.ErrorIs(t, err, net.ErrClosed, name)
			}
			assert.NotNil(t, l.Addr())
			assert.NotZero(t, l.EffectiveBacklog())
		}
	})
}

func second[T any](_ T, err error) error { return err }

// Users call methods in any order. The limit must be that of the last SetBacklog, no client
// may be lost, and a closed listener must stay closed.
func TestModel(t *testing.T) {
	t.Parallel()
	inNamespace(t, func(t *testing.T) {
		seed := seedOf(t)
		t.Run("Listener", func(t *testing.T) {
			t.Parallel()
			l, err := ListenTCP("127.0.0.1:0", WithBacklog(64))
			require.NoError(t, err)
			(&model{subject: subject{
				listeners: []*Listener{l},
				stats:     l.Stats,
				setBacklog: func(n int) error {
					b, err := l.SetBacklog(n)
					if err == nil && b.Requested != max(n, -1) {
						t.Errorf("SetBacklog(%d): %+v", n, b)
					}
					return err
				},
				drain: l.Drain, close: l.Close,
			}}).run(t, seed)
		})
		t.Run("Shards", func(t *testing.T) {
			t.Parallel()
			s, err := ListenTCPShards("127.0.0.1:0", 3, WithBacklog(64))
			require.NoError(t, err)
			(&model{subject: subject{
				listeners: shardsOf(s), stats: s.Stats, setBacklog: s.SetBacklog, drain: s.Drain, close: s.Close,
			}}).run(t, seed)
		})
	})
}
