package testkit

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/acceptq/acceptq/internal/sys"
)

// Message returns a netlink message.
func Message(kind uint16, body []byte) []byte {
	p := make([]byte, unix.SizeofNlMsghdr, unix.SizeofNlMsghdr+len(body)+3)
	binary.NativeEndian.PutUint32(p[0:], uint32(len(p)+len(body)))
	binary.NativeEndian.PutUint16(p[4:], kind)
	p = append(p, body...)
	return append(p, make([]byte, -len(p)&3)...)
}

// A DumpCall is the seam of a kernel for sock_diag.
type DumpCall = func(request []byte) (sys.DiagAnswer, error)

// Listing returns a DumpCall whose answer has these rows.
func Listing(rows ...[]byte) DumpCall {
	return Answered(func(p []byte) (n int, err error) {
		for _, row := range rows {
			n += copy(p[n:], Message(unix.SOCK_DIAG_BY_FAMILY, row))
		}
		return n + copy(p[n:], Message(unix.NLMSG_DONE, make([]byte, 4))), nil
	})
}

// Answered returns a DumpCall whose answer has the datagrams that receive returns.
func Answered(receive func(p []byte) (int, error)) DumpCall {
	return func([]byte) (sys.DiagAnswer, error) { return sys.DiagAnswer{Receive: receive, Close: func() {}}, nil }
}

// StatesOf returns the states that a request selects.
func StatesOf(request []byte) uint32 {
	return binary.NativeEndian.Uint32(request[unix.SizeofNlMsghdr+4:])
}

// AttributeOf returns an attribute of a row with its padding.
func AttributeOf(kind uint16, value ...byte) []byte {
	p := binary.NativeEndian.AppendUint16(nil, uint16(unix.SizeofNlAttr+len(value)))
	p = append(binary.NativeEndian.AppendUint16(p, kind), value...)
	return append(p, make([]byte, -len(p)&3)...)
}
