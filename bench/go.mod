module github.com/acceptq/acceptq/bench

go 1.26.0

require (
	github.com/acceptq/acceptq v0.0.0
	github.com/libp2p/go-reuseport v0.4.0
	github.com/mdlayher/netlink v1.11.2
	github.com/valyala/fasthttp v1.74.0
	github.com/valyala/tcplisten v1.0.0
	github.com/vishvananda/netlink v1.3.1
	golang.org/x/perf v0.0.0-20260908200009-22c9c6c9d4da
	golang.org/x/sys v0.49.0
)

require (
	github.com/aclements/go-moremath v0.0.0-20210112150236-f10218a38794 // indirect
	github.com/google/go-cmp v0.7.0 // indirect
	github.com/mdlayher/socket v0.6.0 // indirect
	github.com/vishvananda/netns v0.0.5 // indirect
	golang.org/x/net v0.59.0 // indirect
	golang.org/x/sync v0.23.0 // indirect
)

replace github.com/acceptq/acceptq => ../
