// Package interop tests acceptqotel with the receiver of the OpenTelemetry Collector and
// with the exporter for Prometheus. It is a module of its own, so that users of acceptqotel
// do not depend on them.
package interop
