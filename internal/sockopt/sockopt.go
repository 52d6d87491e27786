package sockopt

import (
	"errors"
	"fmt"
	"net"
	"runtime"
	"time"
)

// Options holds the options of the socket. Zero and nil mean that the option was not
// given.
type Options struct {
	ReusePort     bool // set by WithReusePort, and for exclusive shards
	DeferAccept   time.Duration
	AcceptFilter  *AcceptFilter
	FastOpen      int
	ReceiveBuffer int
	SendBuffer    int
	KeepAlive     *net.KeepAliveConfig
}

// An AcceptFilter is the name of an accept filter and its argument, see accept_filter(9).
type AcceptFilter struct{ Name, Arg string }

// Unsupported returns the error of an option that this system does not support.
func Unsupported(option string) error { return fmt.Errorf("%s: %w", option, errors.ErrUnsupported) }

// BeyondNet is that of the options of the socket.
func (o *Options) BeyondNet() string {
	switch {
	case o.ReusePort:
		return "WithReusePort"
	case o.DeferAccept != 0:
		return "WithDeferAccept"
	case o.AcceptFilter != nil:
		return "WithAcceptFilter"
	case o.FastOpen != 0:
		return "WithFastOpen"
	case o.ReceiveBuffer != 0:
		return "WithReceiveBuffer"
	case o.SendBuffer != 0:
		return "WithSendBuffer"
	}
	if o.KeepAlive != nil {
		switch runtime.GOOS {
		case "plan9", "js", "wasip1":
			return "WithKeepAlive"
		}
	}
	return ""
}
