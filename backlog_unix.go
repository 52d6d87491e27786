//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"errors"
	"fmt"
	"os"
	"runtime"
)

// listenFor calls listen(2) for a request of n connections and returns what the kernel
// granted. fd is bound and may already listen. The account has the ceiling only if the
// rule needed it, because Backlog reads the ceiling at each call.
func (k *kernel) listenFor(fd, n int) (Backlog, error) {
	r := hostRule()
	if err := k.listenCall(fd, r.argument(n)); err != nil {
		return Backlog{}, os.NewSyscallError("listen", err)
	}
	if limit, ok := k.limit(fd); ok {
		return r.account(n, unknown, limit, true), nil
	}
	b, _ := predictWith(n, k.boundsAt(fd)) // a bound that cannot be read is unknown, not an error
	return b, nil
}

// boundsAt returns a function that calls boundsOf for fd.
func (k *kernel) boundsAt(fd int) func() (ceiling, floor int, err error) {
	return func() (int, int, error) { return k.boundsOf(fd) }
}

// boundsHere returns a function that calls bounds.
func (k *kernel) boundsHere() func() (ceiling, floor int, err error) {
	return func() (int, int, error) { return k.bounds() }
}

// tooShort returns the error of a strict request for which the kernel grants b.
func tooShort(b Backlog, bounds func() (ceiling, floor int, err error)) error {
	if b.Limit == unknown {
		return fmt.Errorf("WithStrictBacklog: this system does not report the limit: %w", errors.ErrUnsupported)
	}
	r := hostRule()
	ceiling, _, _ := bounds()
	return r.clamp(b.Requested, b.Limit, ceiling)
}

// setBacklog calls listen(2) again on the listening socket fd. It fails without a change
// if the listener is strict and the kernel would grant less than n. It also does so if
// the new limit would be too small for the qlen of TCP Fast Open.
//
// Both are predicted. listen(2) cannot be undone: if the ceiling is lower than the former
// limit, that limit cannot be restored. So setBacklog fails if it needs a prediction and
// cannot make it.
func (k *kernel) setBacklog(fd, n int, strict bool, fastOpen int, former Backlog) (Backlog, error) {
	bounds := k.boundsAt(fd)
	strict = strict && n >= 0 // a request for the maximum is never clamped
	if strict || fastOpenHalves(runtime.GOOS, fastOpen) {
		b, err := predictWith(n, bounds)
		if err != nil {
			return former, fmt.Errorf("SetBacklog(%d): what the kernel would grant cannot be predicted: %w: %w", n, errors.ErrUnsupported, err)
		}
		if strict && b.Clamped() {
			return former, tooShort(b, bounds)
		}
		if err := fastOpenFits(runtime.GOOS, fastOpen, b.Limit, bounds); err != nil {
			return former, err
		}
	}
	b, err := k.listenFor(fd, n)
	if err != nil {
		return former, err // the limit has not changed
	}
	if strict && (b.Clamped() || b.Limit == unknown) {
		return b, tooShort(b, bounds) // the prediction was wrong
	}
	return b, nil
}
