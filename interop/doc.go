// Package interop tries acceptq with the servers, proxies and supervisors that people
// use: docs/interop.md is the table of them. It holds tests only, in a module of its
// own, so that what they need is no dependency of the library.
package interop
