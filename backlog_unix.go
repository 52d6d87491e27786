//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package acceptq

import (
	"errors"
	"fmt"
	"os"
	"runtime"
)

// listenFor calls listen(2) for a request of n connections, on a bound socket
// or on one that listens already, and finds out what was granted. The ceiling
// in the account is unknown, for it is read when asked for, except where the
// rule needed it.
func (k *kernel) listenFor(fd, n int) (Backlog, error) {
	r := hostRule()
	if err := k.listenCall(fd, r.argument(n)); err != nil {
		return Backlog{}, os.NewSyscallError("listen", err)
	}
	if limit, ok := k.limit(fd); ok {
		return r.account(n, unknown, limit, true), nil
	}
	b, _ := predict(n, k.boundsAt(fd)) // what cannot be read is unknown, and not a failure
	return b, nil
}

// boundsAt is boundsOf, to be called later.
func (k *kernel) boundsAt(fd int) func() (ceiling, floor int, err error) {
	return func() (int, int, error) { return k.boundsOf(fd) }
}

// tooShort is the error of a strict request that got b.
func tooShort(b Backlog, bounds func() (ceiling, floor int, err error)) error {
	if b.Limit == unknown {
		return fmt.Errorf("WithStrictBacklog: the limit cannot be known: %w", errors.ErrUnsupported)
	}
	r := hostRule()
	ceiling, _, _ := bounds()
	return r.clamp(b.Requested, b.Limit, ceiling)
}

// setBacklog calls listen(2) again on the listening socket fd. A strict one is
// left with the limit it had when the kernel would grant less than n. So is one with TCP
// Fast Open whose count of pending connections would become too small.
func (k *kernel) setBacklog(fd, n int, strict bool, fastOpen int, former Backlog) (Backlog, error) {
	bounds := k.boundsAt(fd)
	if strict || fastOpen != 0 {
		if b, err := predict(n, bounds); err == nil {
			if strict && b.Clamped() {
				return former, tooShort(b, bounds)
			}
			if err := fastOpenFits(runtime.GOOS, fastOpen, b.Limit); err != nil {
				return former, err
			}
		}
	}
	b, err := k.listenFor(fd, n)
	if err != nil {
		return former, err // what was granted before is granted still
	}
	if !strict || !b.Clamped() && b.Limit != unknown {
		return b, nil
	}
	if former.Limit == unknown {
		return b, tooShort(b, bounds) // there is no way back
	}
	// It could not be foreseen; the way back is the same call.
	back, err := k.listenFor(fd, former.Limit)
	if err != nil {
		return b, err
	}
	back.Requested = former.Requested
	return back, tooShort(b, bounds)
}
