package intake

import (
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/acceptq/acceptq/internal/sys"
)

// Init prepares in for a socket.
func (in *Intake) Init(k *sys.Calls, ln *net.TCPListener, raw syscall.RawConn, mptcp bool, read func() (Queue, error)) {
	in.Calls, in.TCP, in.Raw, in.mptcp, in.queue = k, ln, raw, mptcp, read
	in.Gate.moved.L = &in.Gate.Mu
}

// An Intake holds what a drain has changed on the socket of a Listener. No other code
// changes these settings.
type Intake struct {
	Calls     *sys.Calls
	TCP       *net.TCPListener
	Raw       syscall.RawConn
	mptcp     bool // the kernel has no way to keep clients from it
	ReusePort bool // the socket has SO_REUSEPORT
	Steers    bool // a drain may steer new clients to the other members of the group
	Filtered  bool // the socket has an accept filter, which holds back connections

	queue     func() (Queue, error) // reads the accept queue
	Elsewhere atomic.Bool           // Accept has returned a connection with another local address
	Gate      gate

	Mu      sync.Mutex
	Running int         // the number of drains in progress
	resumes int         // how many times Resume was called
	Stop    *Stop       // what keeps new clients out; nil if nothing does
	Shared  bool        // another process, or other code, may hold the socket
	sole    bool        // at the end of the last drain no other holder was possible, and clients are kept out
	hidden  bool        // Close has begun, and no other holder could use the socket
	Shown   atomic.Bool // other code had access to the descriptor and may have copied it
	Lent    atomic.Bool // other code had access while the socket listened, and may have sent it elsewhere

	Inherited atomic.Pointer[inheritance]
	Steering  atomic.Pointer[place] // nil unless a drain steers or has steered clients
}

func (in *Intake) timesResumed() int {
	in.Mu.Lock()
	defer in.Mu.Unlock()
	return in.resumes
}

// Resume lets new clients in to listeners, and then steers clients to them again. It
// returns one error for each listener.
func Resume(listeners []*Intake) []error {
	errs := make([]error, len(listeners))
	var open []*Intake
	for i, l := range listeners {
		in := l
		in.Mu.Lock()
		if err := l.lift(); err != nil {
			errs[i] = err
		} else {
			in.resumes++
			open = append(open, l)
		}
		in.Mu.Unlock()
	}
	leaveSteering(open)
	return errs
}

// open lets new clients in again and stops steering them away from l. The caller holds
// intake.mu.
func (l *Intake) open() error {
	if err := l.lift(); err != nil {
		return err
	}
	leaveSteering([]*Intake{l})
	return nil
}

// lift lets new clients in again. If that fails, stop stays set, and the next call tries
// again. The caller holds intake.mu.
func (l *Intake) lift() error {
	in := l
	var (
		lifted *Stop
		operr  error
	)
	err := l.Raw.Control(func(fd uintptr) { lifted, operr = Lift(l.Calls, int(fd), in.Stop) })
	if err != nil { // the socket is closed
		return sys.Cause(err)
	}
	if operr != nil {
		return fmt.Errorf("new clients are still kept out: %w", operr)
	}
	if lifted != nil {
		in.Lifted(lifted)
	}
	in.Stop = nil
	return nil
}

// Lifted notes that s is no longer on the socket. Connections may still have it.
func (in *Intake) Lifted(s *Stop) {
	in.Inherited.Store(&inheritance{Stop: s, lifted: time.Now()})
}

// MarkShared notes that the socket may have another holder. It lets new clients in again,
// unless a drain is in progress, which will do so when it ends. It fails with net.ErrClosed
// if Close has begun and a copy would be useless.
func (l *Intake) MarkShared() error {
	in := l
	in.Mu.Lock()
	defer in.Mu.Unlock()
	if in.hidden {
		return net.ErrClosed
	}
	in.Shared = true
	if in.Running > 0 {
		return nil
	}
	return l.open()
}

// An inheritance is what accepted connections may have inherited from the listening
// socket, because they were made while it kept new clients out.
type inheritance struct {
	Stop   *Stop
	lifted time.Time // when the stop was removed; zero while it is in force
	Over   bool      // the queue can no longer hold such a connection
}

// InheritanceLast is how long after the removal of a stop the kernel may still queue a
// connection that was made before it.
const InheritanceLast = 100 * time.Millisecond

// RemoveStop removes from c, which Accept is about to return, what c inherited from l.
// before is the inheritance when the call of Accept began. It is needed because another
// call may have found the queue empty, and set over, after this call had taken c.
func (l *Intake) RemoveStop(c *net.TCPConn, before *inheritance) {
	now := l.Inherited.Load()
	if now == nil || now.Over && before == now {
		if l.ReusePort { // c may come from another listener of the group, see tcp_migrate_req
			removeMigrated(l.Calls, c)
		}
		return
	}
	if raw, err := c.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { removeInherited(l.Calls, int(fd)) })
	}
	if now.Over || now.lifted.IsZero() || time.Since(now.lifted) < InheritanceLast {
		return
	}
	if s, err := l.queue(); err == nil && s.Queued == 0 {
		l.Inherited.CompareAndSwap(now, &inheritance{Stop: now.Stop, Over: true})
	}
}

// mayHoldBack reports whether the kernel holds back connections from Accept, or may do so.
func (l *Intake) mayHoldBack(incomplete int) bool {
	return incomplete > 0 || incomplete == sys.Unknown && l.Filtered
}
