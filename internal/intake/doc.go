// Package intake decides who may come in to a listening socket: the gate in front of Accept,
// the stop that drops SYNs (a socket filter or a minimum TTL), the in-flight handshakes that a
// drain waits for, the programs that direct new clients to other members of a SO_REUSEPORT
// group, and one drain from its beginning to its end.
//
// It gets a TCP listener and a function that reads the accept queue. It does not know who uses
// it, no option and no text of an account. See net/core/sock_reuseport.c, socket(7) and ip(7).
package intake
