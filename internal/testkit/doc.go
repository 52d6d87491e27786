// Package testkit has what the tests of several packages share: network namespaces, clients,
// readings of the kernel that do not use the library, and checks for leaks. It knows no
// listener of acceptq. Only tests may import it.
package testkit
