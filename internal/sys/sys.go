// Package sys holds the table of the system calls that this module makes. Tests replace a
// call in a copy of the table. The package knows neither listeners nor options.
//
// A port to another system begins here: see Calls.
package sys

// Unknown is the value of a number that the system does not report. It is not 0, because a
// queue of unknown length is not an empty queue.
const Unknown = -1
