// Package endpoint turns a network and an address into the endpoint of a socket, by the rules
// of package net. It parses a literal IP address with a numeric port itself and asks package
// net about every other address. So the family and every error are those of package net.
//
// It knows the table of system calls and nothing else of this module.
package endpoint
