// Package sockopt sets the options of a listening socket, checks what the kernel grants, and
// knows how the releases of each kernel differ. An option that a system cannot honor is an
// error that matches errors.ErrUnsupported.
//
// It gets a descriptor, an endpoint and the options. It knows no listener and no backlog.
// The sources are socket(7), tcp(7), the BSDs' setsockopt(2) and the kernel files that the
// comments name.
package sockopt
