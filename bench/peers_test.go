//go:build linux

package main

import (
	"context"
	"net"
	"os"

	"github.com/acceptq/acceptq"
	libp2p "github.com/libp2p/go-reuseport"
	fasthttp "github.com/valyala/fasthttp/reuseport"
	"github.com/valyala/tcplisten"
	"golang.org/x/sys/unix"
)

type listenFunc func(addr string) (net.Listener, error)

// peers has a function that listens for each of peerNames.
var peers = map[string]listenFunc{
	netDefault: listenNet,
	netAgain:   listenNet,
	netPlain: func(addr string) (net.Listener, error) {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false)
		return lc.Listen(context.Background(), "tcp", addr)
	},
	ours:                   listenOurs,
	"tcplisten":            func(addr string) (net.Listener, error) { return (&tcplisten.Config{}).NewListener("tcp4", addr) },
	"go-reuseport":         listenLibp2p,
	"fasthttp":             listenFasthttp,
	"system calls by hand": byHand,
}

func listenNet(addr string) (net.Listener, error)      { return net.Listen("tcp", addr) }
func listenOurs(addr string) (net.Listener, error)     { return acceptq.ListenTCP(addr) }
func listenLibp2p(addr string) (net.Listener, error)   { return libp2p.Listen("tcp4", addr) }
func listenFasthttp(addr string) (net.Listener, error) { return fasthttp.Listen("tcp4", addr) }

// byHand makes the system calls that a library needs if it creates its own socket and
// passes it to package net. The difference to "net, plain TCP" is the cost of
// net.FileListener.
func byHand(addr string) (net.Listener, error) {
	domain, sa := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	if addr == ":0" {
		domain, sa = unix.AF_INET6, &unix.SockaddrInet6{}
	}
	fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), "by hand")
	defer file.Close()
	if domain == unix.AF_INET6 {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0); err != nil {
			return nil, err
		}
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return nil, err
	}
	if err := unix.Bind(fd, sa); err != nil {
		return nil, err
	}
	if err := unix.Listen(fd, unix.SOMAXCONN); err != nil {
		return nil, err
	}
	return net.FileListener(file)
}
