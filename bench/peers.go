//go:build linux

package main

import (
	"context"
	"net"

	"github.com/acceptq/acceptq"
	libp2p "github.com/libp2p/go-reuseport"
	fasthttp "github.com/valyala/fasthttp/reuseport"
	"github.com/valyala/tcplisten"
)

// A peer is one way to listen.
type peer struct {
	name   string
	listen func(addr string) (net.Listener, error)
}

// The names of those that others are compared with.
const (
	netDefault = "net.Listen"
	netAgain   = "net.Listen again (control)"
	netPlain   = "net, plain TCP"
	ours       = "acceptq"
)

func listenNet(addr string) (net.Listener, error) { return net.Listen("tcp", addr) }

func listenPlain(addr string) (net.Listener, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	return lc.Listen(context.Background(), "tcp", addr)
}

func listenOurs(addr string) (net.Listener, error) { return acceptq.ListenTCP(addr) }

func listenTCPListen(addr string) (net.Listener, error) {
	return (&tcplisten.Config{}).NewListener("tcp4", addr)
}

func listenLibp2p(addr string) (net.Listener, error) { return libp2p.Listen("tcp4", addr) }

func listenFasthttp(addr string) (net.Listener, error) { return fasthttp.Listen("tcp4", addr) }

// peers is everyone; net.Listen is there twice, and what is between these two is
// noise.
var peers = []peer{
	{netDefault, listenNet},
	{netAgain, listenNet},
	{netPlain, listenPlain},
	{ours, listenOurs},
	{"valyala/tcplisten", listenTCPListen},
	{"libp2p/go-reuseport", listenLibp2p},
	{"fasthttp/reuseport", listenFasthttp},
}
