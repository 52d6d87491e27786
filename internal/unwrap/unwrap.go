// Package unwrap looks into wrappers of listeners and connections.
package unwrap

import (
	"net"
	"reflect"
	"syscall"
)

// Depth is the maximum number of nested wrappers. Without it, a wrapper that wraps itself
// would cause an endless loop.
const Depth = 16

// Conn returns c, or the connection that c wraps, that is a [syscall.Conn]. If there is none,
// it returns the innermost connection that c shows.
func Conn(c net.Conn) net.Conn {
	for range Depth {
		if _, ok := c.(syscall.Conn); ok {
			break
		}
		var inner net.Conn
		if w, ok := c.(interface{ NetConn() net.Conn }); ok {
			inner = w.NetConn()
		} else {
			inner = Field[net.Conn](c, "Conn")
		}
		if inner == nil {
			break
		}
		c = inner
	}
	return c
}

// Field returns the value of an exported field of the struct v or *v. It is the zero value if
// there is no such field, or if its value is not a T.
func Field[T any](v any, name string) (value T) {
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
