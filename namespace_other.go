//go:build !linux

package acceptq

// The systems here have one ceiling for all sockets that a process can make.

func (l *Listener) ceiling() int {
	ceiling, _, _ := l.kernel.bounds()
	return ceiling
}
