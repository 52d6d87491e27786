// Package unwrap looks into wrappers of listeners and connections.
package unwrap

import (
	"net"
	"reflect"
	"syscall"
)

// depth is the maximum number of nested wrappers. Without it, a wrapper that wraps itself
// would cause an endless loop.
const depth = 16

// Conn returns c, or the connection that c wraps, that is a [syscall.Conn]. If there is none,
// it returns the innermost connection that c shows.
func Conn(c net.Conn) net.Conn {
	for range depth {
		if _, ok := c.(syscall.Conn); ok {
			break
		}
		var inner net.Conn
		if w, ok := c.(interface{ NetConn() net.Conn }); ok {
			inner = w.NetConn()
		} else {
			inner = field[net.Conn](c, "Conn")
		}
		if inner == nil {
			break
		}
		c = inner
	}
	return c
}

// Listener returns the listener of type L that ln is or wraps. It is the zero value if ln shows
// none. A listener of crypto/tls, like most that wrap another one, has it in a field named
// Listener.
func Listener[L net.Listener](ln net.Listener) (found L) {
	for range depth {
		if l, ok := ln.(L); ok || ln == nil {
			return l
		}
		ln = field[net.Listener](ln, "Listener")
	}
	return found
}

// field returns the value of an exported field of the struct v or *v. It is the zero value if
// there is no such field, or if its value is not a T.
func field[T any](v any, name string) (value T) {
	s := reflect.Indirect(reflect.ValueOf(v))
	if s.Kind() != reflect.Struct {
		return value
	}
	// A longer index leads through an embedded pointer, which may be nil.
	if f, ok := s.Type().FieldByName(name); ok && len(f.Index) == 1 {
		value, _ = s.Field(f.Index[0]).Interface().(T)
	}
	return value
}
