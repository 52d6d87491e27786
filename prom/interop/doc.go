// Package interop tests the dashboard of acceptqprom with Grafana's own types. It is a
// module of its own, so that users of acceptqprom do not depend on them.
package interop
