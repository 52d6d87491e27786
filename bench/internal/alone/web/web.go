// Package web is the HTTP server of the programs in the neighboring folders. It uses only
// the standard library.
package web

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

// The protocols of a server.
const (
	HTTP1 = "http1"
	H2TLS = "h2-tls"
	H2C   = "h2c"
)

// New returns the server. The program's third argument is the protocol, HTTP1 if there is
// none.
func New() *http.Server {
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("answered")) })}
	if len(os.Args) < 4 {
		return srv
	}
	switch os.Args[3] {
	case H2TLS:
		srv.TLSConfig = &tls.Config{Certificates: []tls.Certificate{certificate()}}
	case H2C:
		srv.Protocols = new(http.Protocols)
		srv.Protocols.SetUnencryptedHTTP2(true)
	}
	return srv
}

func certificate() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// Serve serves HTTP until SIGTERM. The program's arguments are the address, or
// "inherited" for a socket that is descriptor 3, how to stop, and the protocol, see
// [New]. The ways to stop:
//   - shutdown: Shutdown
//   - close: close the listener, wait, Shutdown
//   - drain: the listener's Drain, wait, Shutdown
//
// "wait" means to wait until every accepted connection has had its first answer. If the
// address is in use, the server listens as soon as it is free.
func Serve(listen func(addr string) (net.Listener, error)) {
	if err := serve(listen, os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func serve(listen func(addr string) (net.Listener, error), addr, end string) error {
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM)
	if addr == "inherited" {
		listen = func(string) (net.Listener, error) { return net.FileListener(os.NewFile(3, "socket")) }
	}
	ln, err := listen(addr)
	if errors.Is(err, syscall.EADDRINUSE) {
		fmt.Println("waiting for the port")
		for ; errors.Is(err, syscall.EADDRINUSE); ln, err = listen(addr) {
			time.Sleep(100 * time.Microsecond)
		}
	}
	if err != nil {
		return err
	}
	var unanswered sync.Map // connections before their first answer
	srv := New()
	srv.ConnState = func(c net.Conn, s http.ConnState) {
		switch s {
		case http.StateNew:
			unanswered.Store(c, nil)
		case http.StateIdle, http.StateClosed:
			unanswered.Delete(c)
		}
	}
	served := make(chan error, 1)
	go func() {
		if srv.TLSConfig != nil {
			served <- srv.ServeTLS(ln, "", "")
		} else {
			served <- srv.Serve(ln)
		}
	}()
	fmt.Println("serving")
	<-term
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	switch end {
	case "close":
		if err := ln.Close(); err != nil {
			return err
		}
		<-served // every accepted connection has been stored
	case "drain":
		if err := ln.(interface{ Drain(context.Context) error }).Drain(ctx); err != nil {
			return err
		}
	}
	for left := end != "shutdown"; left && ctx.Err() == nil; time.Sleep(time.Millisecond) {
		left = false
		unanswered.Range(func(any, any) bool { left = true; return false })
	}
	return srv.Shutdown(ctx)
}
