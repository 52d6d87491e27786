// Package sys has the table of the system calls that this module makes, and the readers of
// settings and counters. A test replaces a call in a copy of the table. The package knows no
// socket, no option and no listener, and it imports no other package of this module.
//
// A port to another system begins here: the section "Add a system" of CONTRIBUTING.md lists
// the functions to write, and the compiler names the missing ones.
package sys

// Unknown is the value of a number that the system does not report. It is not 0, because a
// queue of unknown length is not an empty queue.
const Unknown = -1
