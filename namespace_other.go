//go:build !linux

package acceptq

// The systems here have one ceiling for all sockets that a process can make.

func (sys *system) boundsOf(int) (ceiling, floor int, err error) { return sys.bounds() }

func (l *Listener) ceiling() int {
	ceiling, _, _ := l.sys.bounds()
	return ceiling
}
