// Package sockdiag is a client of sock_diag(7), the netlink interface that lists the sockets
// of the calling thread's network namespace (Linux). It needs no privilege: a request, the
// datagrams of the answer, and a parser for their rows, see linux/inet_diag.h.
//
// It knows no listener. Package sys has the netlink socket.
package sockdiag
