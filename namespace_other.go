//go:build !linux

package acceptq

// On these systems one ceiling applies to all sockets that a process can make.

func (l *Listener) ceiling() int {
	ceiling, _, _ := l.kernel.bounds()
	return ceiling
}
