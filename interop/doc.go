// Package interop tries acceptq with the modules that hand listeners from one
// process to another. It holds tests only, in a module of its own, so that what
// they need is no dependency of the library.
package interop
