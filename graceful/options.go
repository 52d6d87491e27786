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

// An Option changes how [Serve], [ServeTLS], [ServeGRPC] and [Run] serve and stop. A nil
// Option is ignored.
type Option func(*options)

type options struct {
	err       error
	listeners []Listener
	named     []*acceptq.Listener
	shared    bool
	onStop    func()
	delay     time.Duration
	linger    time.Duration
	total     time.Duration
	// part is how long the stop waits while nothing moves, and what it reserves for the
	// drain and the answers.
	part    time.Duration
	abort   context.Context
	signals []os.Signal
	logger  *slog.Logger
}

func newOptions(opts []Option, raw bool) (*options, error) {
	o := &options{
		linger: -1,
		total:  25 * time.Second,
		abort:  context.Background(),
		logger: slog.New(slog.DiscardHandler),
	}
	for _, opt := range opts {
		if opt != nil {
			opt(o)
		}
	}
	if o.err != nil {
		return o, o.err
	}
	if o.part == 0 { // tests set it
		o.part = min(5*time.Second, o.total/5)
	}
	left := o.total - o.delay - max(o.linger, 0)
	if left < o.part {
		return o, fmt.Errorf("graceful: WithDelay(%v), WithLinger(%v): %v left of WithTimeout(%v), need %v for the drain and the answers; raise WithTimeout",
			o.delay, max(o.linger, 0), max(left, 0), o.total, o.part)
	}
	if o.linger < 0 && !raw {
		o.linger = min(time.Second, (left-o.part)/4)
	}
	o.linger = max(o.linger, 0)
	return o, nil
}

// duration returns an Option that sets a time of least or more.
func duration(name string, d, least time.Duration, field func(*options) *time.Duration) Option {
	return func(o *options) {
		if d < least {
			o.err = fmt.Errorf("graceful: %s(%v): too short", name, d)
		}
		*field(o) = d
	}
}

// WithListener adds listeners to that of [Serve]. Serve treats all of them alike.
func WithListener(lns ...Listener) Option {
	return func(o *options) { o.listeners = append(o.listeners, lns...) }
}

// WithSocket names the listener of package acceptq that a served listener wraps. The
// served listener must call the Accept method of ln.
//
// The option is not needed if the served listener has ln in an exported field named
// Listener, because Serve finds it there. Listeners of crypto/tls and of most PROXY
// protocol packages have this field.
func WithSocket(ln *acceptq.Listener) Option {
	return func(o *options) {
		if ln == nil {
			o.err = errors.New("graceful: WithSocket(nil): nil listener")
		}
		o.named = append(o.named, ln)
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
	return func(o *options) { o.shared = true }
}

// WithOnStop calls f once, when the stop begins and before the time of [WithDelay]. f can
// make a readiness check fail, for example. The stop waits until f returns. If f does not
// return while there is time for it, the stop goes on, and its error says so.
func WithOnStop(f func()) Option {
	return func(o *options) { o.onStop = f }
}

// WithDelay makes the server continue as before for d after the stop has begun, so that
// load balancers notice that it is not ready. The default is 0.
func WithDelay(d time.Duration) Option {
	return duration("WithDelay", d, 0, func(o *options) *time.Duration { return &o.delay })
}

// WithLinger sets how long a kept-alive connection may stay idle before the stop closes
// it. A request that arrives before that is answered.
//
// The default is 1 s, or less if [WithTimeout] leaves less. A busy client uses a connection
// again within milliseconds, and the answer tells it to close the connection. If d is 0,
// idle connections are closed at once, and requests that are on their way are lost. It is
// an error if WithDelay and WithLinger leave less than 5 s, or a fifth, of WithTimeout. For
// [Run] see there.
func WithLinger(d time.Duration) Option {
	return duration("WithLinger", d, 0, func(o *options) *time.Duration { return &o.linger })
}

// WithTimeout sets how long the whole stop may take, including the time of [WithDelay].
// Afterwards what is left is cut off, and the error is an [*Error]. The default is 25 s,
// because Kubernetes kills a container 30 s after its SIGTERM. It is an error if d is not
// positive.
func WithTimeout(d time.Duration) Option {
	return duration("WithTimeout", d, 1, func(o *options) *time.Duration { return &o.total })
}

// WithAbort stops the server at once when ctx ends, in any phase. Requests and connections
// are cut off, and the error is an [*Error] that unwraps to the cause of ctx.
func WithAbort(ctx context.Context) Option {
	return func(o *options) {
		if ctx == nil {
			o.err = errors.New("graceful: WithAbort(nil): nil context")
		}
		o.abort = ctx
	}
}

// WithAbortSignal stops the server at once, as [WithAbort] does, when one of the
// signals arrives after the stop has begun. The [Error] matches [context.Canceled].
// Without signals the option has no effect.
func WithAbortSignal(signals ...os.Signal) Option {
	return func(o *options) { o.signals = append(o.signals, signals...) }
}

// WithLogger logs a line when the stop begins and a line at the end of each phase, with
// the numbers of connections. The line is a warning if the phase has cut something off.
// By default, and if l is nil, nothing is logged.
func WithLogger(l *slog.Logger) Option {
	return func(o *options) {
		if l != nil {
			o.logger = l
		}
	}
}
