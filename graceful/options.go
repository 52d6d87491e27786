package graceful

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/acceptq/acceptq"
)

// An Option changes how [Serve] and [ServeTLS] serve and stop. A nil Option is
// ignored.
type Option func(*options) error

type options struct {
	listeners []Listener
	named     []*acceptq.Listener
	shared    bool
	onStop    func()
	delay     time.Duration
	linger    time.Duration
	drain     time.Duration
	first     time.Duration
	requests  time.Duration // negative: what is left of total
	total     time.Duration
	abort     context.Context
	signals   []os.Signal
	logger    *slog.Logger
}

func newOptions(opts []Option) (*options, error) {
	o := &options{
		linger:   time.Second,
		drain:    5 * time.Second,
		first:    5 * time.Second,
		requests: -1,
		total:    25 * time.Second,
		abort:    context.Background(),
		logger:   slog.New(slog.DiscardHandler),
	}
	for _, opt := range opts {
		if opt == nil {
			continue
		}
		if err := opt(o); err != nil {
			return o, err
		}
	}
	if o.delay >= o.total {
		return o, fmt.Errorf("graceful: WithDelay(%v): no time is left of %v; raise WithTimeout", o.delay, o.total)
	}
	return o, nil
}

// duration sets a time that may not be negative.
func duration(name string, d time.Duration, set func(*options)) Option {
	return func(o *options) error {
		if d < 0 {
			return fmt.Errorf("graceful: %s(%v): negative", name, d)
		}
		set(o)
		return nil
	}
}

// WithListener serves on more listeners, in the same way as on the first.
func WithListener(lns ...Listener) Option {
	return func(o *options) error {
		o.listeners = append(o.listeners, lns...)
		return nil
	}
}

// WithSocket names a listener of package acceptq that lies below one that is
// served, and that Serve cannot find by itself. Serve finds it below a listener
// that has it in an exported field named Listener, as those of crypto/tls and of
// most PROXY protocol packages do. The outer listener must take its connections
// from ln by the Accept method of ln.
func WithSocket(ln *acceptq.Listener) Option {
	return func(o *options) error {
		if ln == nil {
			return errors.New("graceful: WithSocket(nil)")
		}
		o.named = append(o.named, ln)
		return nil
	}
}

// WithSharedSocket says that another process holds the same sockets and goes on
// with them: a successor that has inherited their descriptors, or the service
// manager that has passed them to this process. Then Serve does not drain them. It
// closes its own descriptors at the start of the stop; the accept queues and the
// clients in them stay with the other process.
//
// Serve cannot find that out: no system call tells whether another process holds a
// socket. Without this option a shared socket is drained, which loses nobody, and
// stalls clients for a second. With it on a socket that no other process holds,
// the connections in the queue are reset.
func WithSharedSocket() Option {
	return func(o *options) error {
		o.shared = true
		return nil
	}
}

// WithOnStop calls f once, when the stop begins, before the time of [WithDelay].
// A readiness check can turn red there. Serve waits until f returns.
func WithOnStop(f func()) Option {
	return func(o *options) error {
		o.onStop = f
		return nil
	}
}

// WithDelay lets the server go on as before for d after the start of the stop, so
// that load balancers notice that it is not ready. The default is 0.
func WithDelay(d time.Duration) Option {
	return duration("WithDelay", d, func(o *options) { o.delay = d })
}

// WithLinger sets for how long a kept-alive connection may stay idle before the
// stop closes it. A request that comes meanwhile gets its answer. The wait is over
// as soon as no connection is idle, and it takes no longer than 2d.
//
// The default is 1 s. Clients that are busy use a connection again within
// milliseconds, and are told to close it with the answer; a second gives those that
// are slower a chance and is short beside a restart. If d is 0, idle connections
// are closed at once, and requests on their way are lost.
func WithLinger(d time.Duration) Option {
	return duration("WithLinger", d, func(o *options) { o.linger = d })
}

// WithDrainTimeout sets for how long the listeners are drained. The default is
// 5 s: a drain waits for 3 s for handshakes in flight. After that time the
// connections that are still queued are reset, and Serve returns an [Error].
func WithDrainTimeout(d time.Duration) Option {
	return duration("WithDrainTimeout", d, func(o *options) { o.drain = d })
}

// WithFirstAnswerTimeout sets for how long the stop waits for the first request of
// connections that have not sent one. The default is 5 s, which is the time that
// net/http gives them too. After that time they are closed, and Serve returns an
// [Error].
func WithFirstAnswerTimeout(d time.Duration) Option {
	return duration("WithFirstAnswerTimeout", d, func(o *options) { o.first = d })
}

// WithRequestTimeout sets for how long the stop waits for requests that are being
// answered, once all else is done. After that time they are cut off, and Serve
// returns an [Error]. The default is what is left of the time of [WithTimeout].
func WithRequestTimeout(d time.Duration) Option {
	return duration("WithRequestTimeout", d, func(o *options) { o.requests = d })
}

// WithTimeout sets how long the whole stop may take, the time of [WithDelay]
// included. The default is 25 s, since Kubernetes kills a container 30 s after its
// SIGTERM. It is an error if d is not positive.
func WithTimeout(d time.Duration) Option {
	return func(o *options) error {
		if d <= 0 {
			return fmt.Errorf("graceful: WithTimeout(%v): not positive", d)
		}
		o.total = d
		return nil
	}
}

// WithAbort stops the server at once when ctx ends, in whatever phase it is:
// requests and connections are cut off, and Serve returns an [Error] that unwraps to
// the cause of ctx.
func WithAbort(ctx context.Context) Option {
	return func(o *options) error {
		if ctx == nil {
			return errors.New("graceful: WithAbort(nil)")
		}
		o.abort = ctx
		return nil
	}
}

// WithAbortSignal stops the server at once, as [WithAbort] does, when one of the
// signals arrives after the stop has begun. The [Error] matches [context.Canceled].
// With no signals it has no effect.
func WithAbortSignal(signals ...os.Signal) Option {
	return func(o *options) error {
		o.signals = append(o.signals, signals...)
		return nil
	}
}

// WithLogger logs a line when the stop begins and one at the end of each phase, with
// the numbers of connections. A phase that ran out of time is a warning. The
// default is not to log; nil means the same.
func WithLogger(l *slog.Logger) Option {
	return func(o *options) error {
		if l != nil {
			o.logger = l
		}
		return nil
	}
}
