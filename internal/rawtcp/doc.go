// Package rawtcp sends single TCP segments over the loopback interface, for tests of what
// a kernel does with them. The senders have addresses that no interface has, so the kernel
// answers nothing on their behalf. Linux only; it needs CAP_NET_RAW and CAP_NET_ADMIN in
// its network namespace, which a test has in a namespace of its own.
package rawtcp
