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
		return o, fmt.Errorf("graceful: WithDelay(%v): not less than WithTimeout(%v); raise WithTimeout", o.delay, o.total)
	}
	return o, nil
}

// duration returns an Option that sets a time. The time must not be negative.
func duration(name string, d time.Duration, set func(*options)) Option {
	return func(o *options) error {
		if d < 0 {
			return fmt.Errorf("graceful: %s(%v): negative", name, d)
		}
		set(o)
		return nil
	}
}

// WithListener adds listeners to that of [Serve]. Serve treats all of them alike.
func WithListener(lns ...Listener) Option {
	return func(o *options) error {
		o.listeners = append(o.listeners, lns...)
		return nil
	}
}

// WithSocket names the listener of package acceptq that a served listener wraps. The
// served listener must call the Accept method of ln.
//
// The option is not needed if the served listener has ln in an exported field named
// Listener, because Serve finds it there. Listeners of crypto/tls and of most PROXY
// protocol packages have this field.
func WithSocket(ln *acceptq.Listener) Option {
	return func(o *options) error {
		if ln == nil {
			return errors.New("graceful: WithSocket(nil): nil listener")
		}
		o.named = append(o.named, ln)
		return nil
	}
}

// WithSharedSocket says that another process holds the same sockets and continues to use
// them. It can be a successor that has inherited the descriptors or the service manager
// that has passed them to this process.
//
// With this option Serve does not drain the sockets. It closes its own descriptors when
// the stop begins. The accept queues and their connections stay with the other process.
//
// Serve cannot find out whether another process holds a socket, because no system call
// reports it. Without this option a shared socket is drained, which loses no client and
// stalls some for a second. With this option on a socket that no other process holds, the
// kernel resets the connections in the queue.
func WithSharedSocket() Option {
	return func(o *options) error {
		o.shared = true
		return nil
	}
}

// WithOnStop calls f once, when the stop begins and before the time of [WithDelay]. f can
// make a readiness check fail, for example. Serve waits until f returns.
func WithOnStop(f func()) Option {
	return func(o *options) error {
		o.onStop = f
		return nil
	}
}

// WithDelay makes the server continue as before for d after the stop has begun, so that
// load balancers notice that it is not ready. The default is 0.
func WithDelay(d time.Duration) Option {
	return duration("WithDelay", d, func(o *options) { o.delay = d })
}

// WithLinger sets how long a kept-alive connection may stay idle before the stop closes
// it. A request that arrives before that is answered. The wait ends when no connection is
// idle, after 2d at the latest.
//
// The default is 1 s. A busy client uses a connection again within milliseconds, and the
// answer tells it to close the connection. If d is 0, idle connections are closed at
// once, and requests that are on their way are lost.
func WithLinger(d time.Duration) Option {
	return duration("WithLinger", d, func(o *options) { o.linger = d })
}

// WithDrainTimeout sets how long the drain of the listeners may take. Afterwards the
// kernel resets the connections that are still queued, and Serve returns an [Error]. The
// default is 5 s, because a drain waits for in-flight handshakes for 3 s.
func WithDrainTimeout(d time.Duration) Option {
	return duration("WithDrainTimeout", d, func(o *options) { o.drain = d })
}

// WithFirstAnswerTimeout sets how long the stop waits for the first request on
// connections that have not sent one. Afterwards these connections are closed, and Serve
// returns an [Error]. The default is 5 s, as in net/http.
func WithFirstAnswerTimeout(d time.Duration) Option {
	return duration("WithFirstAnswerTimeout", d, func(o *options) { o.first = d })
}

// WithRequestTimeout sets how long the last phase of the stop waits for requests that are
// being answered. Afterwards they are cut off, and Serve returns an [Error]. The default
// is the remaining time of [WithTimeout].
func WithRequestTimeout(d time.Duration) Option {
	return duration("WithRequestTimeout", d, func(o *options) { o.requests = d })
}

// WithTimeout sets how long the whole stop may take, including the time of [WithDelay].
// The default is 25 s, because Kubernetes kills a container 30 s after its SIGTERM. It is
// an error if d is not positive.
func WithTimeout(d time.Duration) Option {
	return func(o *options) error {
		if d <= 0 {
			return fmt.Errorf("graceful: WithTimeout(%v): not positive", d)
		}
		o.total = d
		return nil
	}
}

// WithAbort stops the server at once when ctx ends, in any phase. Requests and connections
// are cut off, and Serve returns an [Error] that unwraps to the cause of ctx.
func WithAbort(ctx context.Context) Option {
	return func(o *options) error {
		if ctx == nil {
			return errors.New("graceful: WithAbort(nil): nil context")
		}
		o.abort = ctx
		return nil
	}
}

// WithAbortSignal stops the server at once, as [WithAbort] does, when one of the
// signals arrives after the stop has begun. The [Error] matches [context.Canceled].
// Without signals the option has no effect.
func WithAbortSignal(signals ...os.Signal) Option {
	return func(o *options) error {
		o.signals = append(o.signals, signals...)
		return nil
	}
}

// WithLogger logs a line when the stop begins and a line at the end of each phase, with
// the numbers of connections. The line is a warning if the phase reached its time limit.
// By default, and if l is nil, nothing is logged.
func WithLogger(l *slog.Logger) Option {
	return func(o *options) error {
		if l != nil {
			o.logger = l
		}
		return nil
	}
}
