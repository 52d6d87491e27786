//go:build darwin || dragonfly || freebsd || netbsd || openbsd

package acceptq

func (*Listener) joinGroup(*options) {}
