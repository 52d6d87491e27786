// Package netns says in whose network namespace a socket is, and calls functions there
// (Linux). Settings and tables of the kernel are those of the calling thread's namespace, and
// a program may use a socket from any thread.
//
// It follows SO_NETNS_COOKIE and SIOCGSKNS in net/core/sock.c and net/socket.c, and setns(2).
// It knows no listener.
package netns
