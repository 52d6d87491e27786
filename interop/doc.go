// Package interop tests acceptq with other servers, proxies and supervisors.
// docs/interop.md has the table of them. The package has only tests. It is a separate
// module, so that their dependencies are not dependencies of the library.
package interop
